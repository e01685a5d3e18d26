"""Choose the rows of every step, read them with their numbers, and load their batches.

The order of rows is a function of (seed, epoch); a step holds the same rows on any number of
processes, general rows for replay among them.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import seed_worker

from hftl.data.text_inputs import IGNORE_INDEX, EncodedRow
from hftl.errors import RecipeError
from hftl.models.features import batch_by_length
from hftl.retain.regularizer import Batch, TrainingRows
from hftl.train import hf_compat
from hftl.train.loss import drop_retention_keys

BATCH_TOKENS = 4096
BATCH_ROWS = 32
"""Size of the original's batches: tokens of texts after padding, or images."""
DETERMINISM_ROWS = 16
"""Rows that are read twice to see whether they are the same."""


class SeededSampler(Sampler[int]):
    """Draw a permutation that is a function of (seed, epoch), not of workers or processes."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()


def build_unseeded_error(args: TrainingArguments) -> RecipeError:
    """Return the refusal to number rows whose order the seed does not fix."""
    return RecipeError(
        "retain and general_dataset need rows in a seeded order, got "
        f"train_sampling_strategy={args.train_sampling_strategy} or a dataset without a length",
        "Use random sampling of a dataset with a length",
    )


def build_seeded_sampler(rows: Any, args: TrainingArguments) -> SeededSampler:
    """Return the order of a training's rows, by the seed of its data.

    Raises:
        RecipeError: if there are no rows.
    """
    if not len(rows):
        raise RecipeError("train_dataset holds no rows", "Give it some, or skip train()")
    return SeededSampler(len(rows), args.seed if args.data_seed is None else args.data_seed)


class RankBatchSampler(Sampler[list[int]]):
    """Draw one process's share of every global batch: consecutive rows, cut evenly.

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
        """Return whether this process has no row of its own in the last batch."""
        last = len(self.order) % self.global_size
        return last > 0 and not self.drop_last and not self._share(range(last))

    @property
    def global_size(self) -> int:
        """Return the rows of a full batch over all processes."""
        return self.batch_size * self.processes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.global_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        for step in range(len(self)):
            batch = rows[step * self.global_size : (step + 1) * self.global_size]
            yield [batch[i] for i in self._share(range(len(batch)))] or batch[:1]

    def _share(self, places: range) -> range:
        rows = len(places)
        return places[rows * self.rank // self.processes : rows * (self.rank + 1) // self.processes]


def list_step_rows(batches: RankBatchSampler, epoch: float, count: int) -> list[int]:
    """Return the numbers of the target's rows in a step, on all processes together.

    Args:
        batches: of the training.
        epoch: where the step begins, in epochs.
        count: micro-batches of a step.
    """
    number, place = divmod(round(epoch * len(batches)), len(batches))
    order = SeededSampler(len(batches.order), batches.order.seed)
    order.set_epoch(number)
    rows, size = list(order), batches.global_size
    return rows[place * size : min(place + count, len(batches)) * size]


class ReplayBatchSampler(RankBatchSampler):
    """Append rows of general data to each process's batches, in an exact ratio.

    The general row of number n, counted through the training, comes with the target row by which
    ratio times the number of target rows reaches n + 1: which rows a step holds does not depend on
    how it is cut into batches and processes. The processes take them in turn. General rows have
    numbers from the target's length on.

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
            share = [n for n in numbers if n % self.processes == self.rank]
            yield batch + [rows + self._general_row(n, passes) for n in share]

    def _general_row(self, number: int, passes: dict[int, list[int]]) -> int:
        epoch, place = divmod(number, len(self.general))
        if epoch not in passes:
            self.general.set_epoch(epoch)
            passes[epoch] = list(self.general)
        return passes[epoch][place]


def build_batch_sampler(
    order: SeededSampler, general: int | None, ratio: float, batch_size: int, drop_last: bool,
    accelerator: Accelerator,
) -> RankBatchSampler:  # fmt: skip
    """Return the sampler of this process's share of every step.

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
    dataset: Any, collate: Callable[[list[EncodedRow]], Batch], batches: RankBatchSampler,
    args: TrainingArguments, accelerator: Accelerator,
) -> Any:  # fmt: skip
    """Return a loader of these batches that puts them on the device, without cutting them again."""
    workers = args.dataloader_num_workers
    # All but rows, sampler and collator is set as transformers sets it.
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        # A worker that lives on keeps the dataset of the first epoch.
        persistent_workers=args.dataloader_persistent_workers and not hasattr(dataset, "set_epoch"),
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
        non_blocking=accelerator.non_blocking,
    )  # fmt: skip


class IndexedDataset(Dataset):
    """Number the rows of a training dataset; general rows follow the target's.

    Its length is the target's. General rows without `labels` get labels that count for nothing.

    Args:
        target: has a length and `labels` in its rows.
        general: None where there is none.
    """

    def __init__(self, target: Any, general: Any | None) -> None:
        self.target = target
        self.general = general

    @property
    def total_rows(self) -> int:
        """Return the number of rows, general ones included."""
        return len(self.target) + (0 if self.general is None else len(self.general))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of both datasets."""
        for part in (self.target, self.general):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, number: int) -> EncodedRow:
        behind = number - len(self.target)
        if behind < 0:
            return {**self.target[number], "row": number}  # pyright: ignore[reportReturnType]
        assert self.general is not None
        row = dict(self.general[behind])
        if "labels" not in row and "label" not in row:
            row["labels"] = build_ignored_labels(self.target[0], row)
        return {**row, "row": number}  # pyright: ignore[reportReturnType]


def build_ignored_labels(like: EncodedRow, row: EncodedRow) -> np.ndarray | Tensor:
    """Return labels that the loss ignores, of the shape of another row's labels.

    Args:
        like: a row with `labels` or `label`.
        row: the row that has none; of words it gets one a word, or one a token.
    """
    example = like["labels"] if "labels" in like else like["label"]
    label = np.asarray(example)
    if label.dtype.kind == "f":
        labels = np.full(label.shape, np.nan, np.float32)
    elif label.ndim == 0:
        labels = np.full((), IGNORE_INDEX, np.int64)
    else:
        words = row["words"] if "words" in row else row["input_ids"]
        labels = np.full(len(words), IGNORE_INDEX, np.int64)
    return torch.from_numpy(labels) if isinstance(example, Tensor) else labels


class IndexedCollator:
    """Collate rows with their numbers, `row`, and `general`, whether each is general data.

    Where every word has a label, `labelled_tokens` (batch, length) bool are words' first tokens.

    Args:
        collate: makes a batch of rows.
        target: rows of the target.
    """

    def __init__(self, collate: Callable[[list[EncodedRow]], Batch], target: int) -> None:
        self.collate = collate
        self.target = target

    def __call__(self, rows: list[EncodedRow]) -> Batch:
        """Return a batch with the number of each row."""
        numbers = torch.tensor([row["row"] for row in rows])
        plain = [{key: value for key, value in row.items() if key != "row"} for row in rows]
        batch = dict(self.collate(plain))
        labels = batch.get("labels")
        if labels is not None and _has_token_labels(labels):
            mask = batch.get("attention_mask", torch.ones_like(labels))
            batch["labelled_tokens"] = find_word_tokens(plain, labels, mask)
        return {**batch, "row": numbers, "general": numbers >= self.target}


def find_word_tokens(rows: list[EncodedRow], labels: Tensor, mask: Tensor) -> Tensor:
    """Return the first tokens of words, labelled or not: (batch, length) bool.

    Args:
        rows: with `words`, the places of their words' first tokens; of rows without it these are
            the tokens that have a label, and where none has one, as in general data, all.
        labels: (batch, length) int64, -100 where there is none.
        mask: (batch, length), 1 where a token counts.
    """
    if "words" not in rows[0]:
        labelled = labels != IGNORE_INDEX
        return torch.where(labelled.any(1, keepdim=True), labelled, mask > 0)
    first_tokens = torch.zeros_like(labels, dtype=torch.bool)
    for number, row in enumerate(rows):
        places = torch.as_tensor(row["words"])
        # Behind the padding, where that comes first.
        first_tokens[number, places[places >= 0] + int(mask[number].argmax())] = True
    return first_tokens


def build_training_data(trainer: Trainer, general: Any, is_indexed: bool) -> tuple[Any, Any]:
    """Return a Trainer's training rows and their collator, without columns that nothing reads.

    Args:
        trainer: with `train_dataset` and `data_collator`.
        general: the general rows; None: there are none.
        is_indexed: whether rows carry their numbers, and general rows follow the target's.
    """
    dataset, general = (
        hf_compat.drop_unused_columns(trainer, part) if isinstance(part, datasets.Dataset) else part
        for part in (trainer.train_dataset, general)
    )
    collate: Any = trainer.data_collator
    if not isinstance(dataset, datasets.Dataset):
        collate = hf_compat.wrap_collator(trainer, collate)
    if not is_indexed:
        return dataset, collate
    rows = IndexedDataset(dataset, general)
    return rows, IndexedCollator(collate, len(rows))


def is_deterministic(rows: IndexedDataset, collate: Callable[[list[EncodedRow]], Batch]) -> bool:
    """Return whether rows are the same each time they are read, and in every epoch.

    It reads a few of them twice, in the first epoch and the second, and leaves the first.
    """
    numbers = [*range(min(DETERMINISM_ROWS, len(rows)))]
    numbers += [*range(len(rows), min(len(rows) + DETERMINISM_ROWS, rows.total_rows))]
    reads = []
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        reads.append(collate([rows[number] for number in numbers]))
    rows.set_epoch(0)
    return reads[0].keys() == reads[1].keys() and all(
        torch.equal(value, reads[1][key]) if isinstance(value, Tensor) else value == reads[1][key]
        for key, value in reads[0].items()
        if key != "labels"
    )


def build_training_rows(rows: IndexedDataset, collate: IndexedCollator) -> TrainingRows:
    """Return all rows of a training in batches, for the original's outputs."""
    lengths = [len(rows[n].get("input_ids", ())) for n in range(rows.total_rows)]
    if any(lengths):
        batches = batch_by_length(lengths, BATCH_TOKENS)
    else:
        numbers = list(range(rows.total_rows))
        batches = [numbers[i : i + BATCH_ROWS] for i in range(0, rows.total_rows, BATCH_ROWS)]

    def batch(numbers: list[int]) -> Batch:
        return drop_retention_keys(collate([rows[n] for n in numbers]))

    return TrainingRows(
        len(rows), rows.total_rows, batches, batch, is_deterministic(rows, collate.collate)
    )


def _has_token_labels(labels: Tensor) -> bool:
    """Return whether labels are classes of tokens."""
    return labels.dim() == 2 and not labels.is_floating_point()
