"""Load a source model, name its parts, attach heads and adapters, and cache features."""
