"""One arm and seed: what trains, for how long, and the baselines beside it."""
