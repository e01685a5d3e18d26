"""Check that fast predictions must be those of stock classes."""

import numpy as np
import pytest

from hftl.errors import HftlError
from hftl.publish.prediction_check import check_predictions

STOCK = np.array([[2.0, -1.0, 0.5], [1.0, 1.0004, -3.0], [np.nan] * 3, [-1.0, 4.0, 3.9]])


def change(row: int, column: int, value: float) -> np.ndarray:
    changed = STOCK.copy()
    changed[row, column] += value
    return changed


def test_rounding_passes_and_a_tie_that_it_decides_is_counted() -> None:
    assert check_predictions(STOCK, STOCK, "classification") == 0
    assert check_predictions(change(0, 0, 1e-3), STOCK, "classification") == 0
    assert check_predictions(change(1, 0, 1e-3), STOCK, "token-classification") == 1
    near = np.array([[3e-4, 1.0]])
    assert check_predictions(near - 5e-4, near, "multi-label") == 1
    assert check_predictions(near[:, :1] - 5e-4, near[:, :1], "regression") == 0


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression"])
def test_other_logits_are_refused(task: str) -> None:
    with pytest.raises(HftlError, match="differ by 0.008, expected at most 0.004"):
        check_predictions(change(3, 1, -8e-3), STOCK, task)
    with pytest.raises(HftlError, match="other words"):
        check_predictions(change(0, 0, np.nan), STOCK, task)


def test_another_label_is_refused() -> None:
    stock = np.array([[1.0, 1.0015, 0.0]])
    with pytest.raises(HftlError, match="another label"):
        check_predictions(stock + [[9e-4, -9e-4, 0.0]], stock, "classification")
