"""The source model: found, its parts named, a head put on, adapters read."""
