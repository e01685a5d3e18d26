"""Penalties that keep a model near its original."""
