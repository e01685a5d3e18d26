"""Which rows make a step, whatever the number of processes."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker


class SeededSampler(Sampler[int]):
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


class RankBatchSampler(Sampler[list[int]]):
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
        self, order: SeededSampler, batch_size: int, processes: int, rank: int, drop_last: bool
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.processes = processes
        self.rank = rank
        self.drop_last = drop_last

    @property
    def is_idle(self) -> bool:
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


class ReplayBatchSampler(RankBatchSampler):
    """The same with rows of general data behind each process's own, in an exact ratio.

    The general row of number n, counted through the training, comes with the target row by which
    ratio times the number of target rows reaches n + 1: which rows a step holds does not depend on
    how it is cut into batches and processes. The processes take them in turn. General rows are
    told by numbers from the target's length on.

    Args:
        order: of the target's rows.
        general: of the general rows; its epochs are its own passes.
        ratio: general rows for each row of the target.
        batch_size: rows of the target in a full batch on each process.
        processes: how many share the batch.
        rank: which of them this is.
        drop_last: leave out a short last batch.
    """

    def __init__(
        self, order: SeededSampler, general: SeededSampler, ratio: float, batch_size: int,
        processes: int, rank: int, drop_last: bool,
    ) -> None:  # fmt: skip
        super().__init__(order, batch_size, processes, rank, drop_last)
        self.general = general
        self.ratio = ratio

    def __iter__(self) -> Iterator[list[int]]:
        rows = len(self.order)
        before = self.order.epoch * rows
        passes: dict[int, list[int]] = {}
        for step, batch in enumerate(super().__iter__()):
            first = before + step * self.global_size
            last = before + min((step + 1) * self.global_size, rows)
            numbers = range(math.floor(self.ratio * first), math.floor(self.ratio * last))
            mine = [n for n in numbers if n % self.processes == self.rank]
            yield batch + [rows + self._general_row(n, passes) for n in mine]

    def _general_row(self, number: int, passes: dict[int, list[int]]) -> int:
        epoch, place = divmod(number, len(self.general))
        if epoch not in passes:
            self.general.set_epoch(epoch)
            passes[epoch] = list(self.general)
        return passes[epoch][place]


# This process's batches: which rows make them, and what loads them.


def build_batch_sampler(
    order: SeededSampler, general: int | None, ratio: float, batch_size: int, drop_last: bool,
    accelerator: Accelerator,
) -> RankBatchSampler:  # fmt: skip
    """This process's share of every step.

    Args:
        order: of the target's rows.
        general: how many general rows are mixed in; None: there are none.
        ratio: general rows for each row of the target.
        batch_size: rows of the target in a full batch of one process.
        drop_last: leave out a short last batch.
        accelerator: knows the processes.
    """
    cut = (batch_size, accelerator.num_processes, accelerator.process_index, drop_last)
    if general is None:
        return RankBatchSampler(order, *cut)
    return ReplayBatchSampler(order, SeededSampler(general, order.seed), ratio, *cut)


def build_dataloader(
    dataset: Any, batches: RankBatchSampler, collate: Callable[[list[Any]], dict[str, Any]],
    args: TrainingArguments, accelerator: Accelerator,
) -> Any:  # fmt: skip
    """A loader of these batches that puts them on the device; nobody cuts them once more."""
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, **build_loader_settings(args, dataset)
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
        non_blocking=accelerator.non_blocking,
    )  # fmt: skip


def build_loader_settings(args: TrainingArguments, dataset: Any) -> dict[str, Any]:
    """DataLoader's arguments but for rows, sampler and collator, as transformers sets them."""
    workers = args.dataloader_num_workers
    return {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory,
        # A worker that lives on keeps the dataset of the first epoch.
        "persistent_workers": args.dataloader_persistent_workers
        and not hasattr(dataset, "set_epoch"),
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": args.dataloader_in_order,
        "worker_init_fn": partial(seed_worker, num_workers=workers, rank=args.process_index),
    }
