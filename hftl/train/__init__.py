"""The one Trainer subclass and what it is made of."""
