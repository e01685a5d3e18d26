"""Use a published model: find it, load it, predict, and compare it with others."""
