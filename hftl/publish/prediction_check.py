"""Compare an arm's predictions, which were computed fast, with those of stock classes."""

import numpy as np

from hftl.errors import HftlError

TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest where that is above 1."""


def check_predictions(fast: np.ndarray, stock: np.ndarray, task: str) -> int:
    """Refuse logits that differ from the stock classes', and labels that do by more than rounding.

    Args:
        fast: (outputs, classes), as the arm has stored them; no number for words that were cut off.
        stock: the same of the rebuilt model, run as transformers and peft run it.
        task: the recipe's `data.task`.

    Returns:
        How many outputs have another label, each so near to it that rounding decides.

    Raises:
        HftlError: with the difference; that is a bug.
    """
    counted = np.isfinite(fast).all(1)
    if not np.array_equal(counted, np.isfinite(stock).all(1)):
        raise _build_error("are numbers for other words")
    fast, stock = fast[counted].astype(np.float64), stock[counted].astype(np.float64)
    allowed = TOLERANCE * max(1.0, float(np.abs(stock).max(initial=0.0)))
    difference = float(np.abs(fast - stock).max(initial=0.0))
    if difference > allowed:
        raise _build_error(f"differ by {difference:.2g}, expected at most {allowed:.2g},")
    if task == "regression":
        return 0
    if task == "multi-label":
        others, margins = (fast > 0) != (stock > 0), np.abs(stock)
    else:
        ordered = np.sort(stock, axis=1)
        others, margins = fast.argmax(1) != stock.argmax(1), ordered[:, -1] - ordered[:, -2]
    if (margins[others] > allowed).any():
        raise _build_error("give another label")
    return int(others.sum())


def _build_error(what: str) -> HftlError:
    return HftlError(
        f"the arm's stored logits of the test rows {what} from those of its weights in stock "
        "classes",
        "Report this with log.txt",
    )
