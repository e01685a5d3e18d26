"""Which rows make a step, whatever the number of processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class SeededOrder(Sampler[int]):
    """A permutation that is a function of (seed, epoch) alone, not of workers or processes."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()


class RankBatches(Sampler[list[int]]):
    """One process's share of every global batch: consecutive rows of the order, cut evenly.

    A short last batch is cut as evenly, no row repeated. Every process must make every step, so one
    that is left without rows gets the batch's first row, which must count for nothing (`idle`).

    Args:
        order: of all rows, the same on every process.
        batch_size: rows of a full batch on each process.
        processes: how many share the batch.
        rank: which of them this is.
        drop_last: leave out a short last batch.
    """

    def __init__(
        self, order: SeededOrder, batch_size: int, processes: int, rank: int, drop_last: bool
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.processes = processes
        self.rank = rank
        self.drop_last = drop_last

    @property
    def idle(self) -> bool:
        """Whether this process has no row of its own in the last batch."""
        last = len(self.order) % self.global_size
        return last > 0 and not self.drop_last and not self._share(range(last))

    @property
    def global_size(self) -> int:
        """Rows of a full batch over all processes."""
        return self.batch_size * self.processes

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.global_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        for step in range(len(self)):
            batch = rows[step * self.global_size : (step + 1) * self.global_size]
            mine = self._share(range(len(batch)))
            yield [batch[i] for i in mine] or batch[:1]

    def _share(self, places: range) -> range:
        rows = len(places)
        return places[rows * self.rank // self.processes : rows * (self.rank + 1) // self.processes]
