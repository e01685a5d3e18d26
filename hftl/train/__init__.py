"""Define the one Trainer subclass and its parts."""
