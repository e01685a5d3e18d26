"""The sections of a recipe, a file each: their keys, defaults, and what each refuses.

The contract of every key stands in the README and in `hftl schema`. What a later version brings
is refused while it is not built, never ignored.
"""
