"""Rows as a dataset for the Trainer."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from hftl.data.text import Encoded

Change = Callable[[Encoded, int, bytes], Encoded]


class Examples(Dataset):
    """Encoded rows with what they teach.

    Args:
        encoded: the rows as the encoder takes them.
        labels: an array a row: () int64 or float32, (classes,) float32, or (words,) int64.
        keys: what tells each row from the others.
        change: augmentation of (row, epoch, key), or None.
    """

    def __init__(
        self, encoded: list[Encoded], labels: list[Any], keys: list[bytes], change: Change | None
    ) -> None:
        self.encoded = encoded
        self.labels = labels
        self.keys = keys
        self.change = change
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose augmentation comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.encoded[index]
        if self.change is not None:
            row = self.change(row, self._epoch, self.keys[index])
        return {**row, "labels": self.labels[index]}
