"""Turn tables, folders and hub datasets into examples, split by content."""
