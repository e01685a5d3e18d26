"""Define the recipe: one file a section, overrides, and rules across sections.

The contract of every key is in the README and in `hftl schema`. A section that is not built yet
is refused, never ignored.
"""
