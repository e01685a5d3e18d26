"""Import the libraries without garbage collections."""

import gc


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
    if gc.get_freeze_count() == 0:
        gc.freeze()
    gc.enable()
