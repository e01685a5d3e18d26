"""This process's batches: which rows make them, and what loads them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from hftl.train.order import MixedBatches, RankBatches, SeededOrder


def batches_of(
    order: SeededOrder, general: int | None, ratio: float, batch_size: int, drop_last: bool,
    accelerator: Accelerator,
) -> RankBatches:  # fmt: skip
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
        return RankBatches(order, *cut)
    return MixedBatches(order, SeededOrder(general, order.seed), ratio, *cut)


def loader_of(
    dataset: Any, batches: RankBatches, collate: Callable[[list[Any]], dict[str, Any]],
    args: TrainingArguments, accelerator: Accelerator,
) -> Any:  # fmt: skip
    """A loader of these batches that puts them on the device; nobody cuts them once more."""
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, **loader_settings(args, dataset)
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
        non_blocking=accelerator.non_blocking,
    )  # fmt: skip


def loader_settings(args: TrainingArguments, dataset: Any) -> dict[str, Any]:
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
