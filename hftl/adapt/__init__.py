"""Continued pre-training: masked words, masked patches, and the guard that judges it."""
