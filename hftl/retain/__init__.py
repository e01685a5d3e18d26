"""Penalise distance from the original model."""
