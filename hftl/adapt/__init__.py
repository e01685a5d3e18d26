"""Continue pre-training on masked words or patches, under a guard."""
