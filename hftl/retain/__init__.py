"""Penalize distance from the original model."""
