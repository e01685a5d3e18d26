"""Import the libraries without garbage collections."""

import gc
from functools import cache


def pause_collections() -> None:
    """Collect no garbage until `freeze_imports`; in a process of hftl's own, before its imports.

    Importing torch and transformers makes a million objects that stay, and the collections in
    between walk through them all again and again: a fifth of the time that the imports take.
    """
    gc.disable()


def freeze_imports() -> None:
    """Collect garbage again, but nothing that the imports made; once, in a process of hftl's own.

    accelerate collects at the end of every training, and the interpreter at its own end: each would
    walk through all objects of torch and transformers, for 0.3 s and for 1 s.
    """
    _freeze_once()
    gc.enable()


@cache
def _freeze_once() -> None:
    """Freeze what is there; to ask whether it is frozen would count it, for 0.1 s a command."""
    gc.freeze()
