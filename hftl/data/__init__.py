"""From tables, folders and hub datasets to examples, split by content."""
