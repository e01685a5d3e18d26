"""Train one arm with one seed, and the baselines beside it."""
