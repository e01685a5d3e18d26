"""Store what the frozen blocks of an arm return for each row, and let its training read it.

One pass over the rows writes every boundary that the schedule needs, in eval mode and in the
training's precision. Seeds, arms and later runs of a folder that freeze the same weights read the
same files.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pydantic import JsonValue
from torch import Tensor
from transformers import TrainingArguments

from hftl.config.finetune import Finetune
from hftl.data.rows import Row
from hftl.data.text_inputs import EncodedRow
from hftl.errors import is_disk_full
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import count_frozen_blocks, list_frozen_depths
from hftl.models.encoders import accepts_attention_mask, has_prefix, list_block_paths
from hftl.models.features import BATCH_TOKENS, batch_by_length
from hftl.models.heads import LoadedModel
from hftl.models.prefix_cache import (
    MemoryRows,
    PrefixCache,
    get_precision,
    hash_tensors,
    name_rows,
    split_rows,
)
from hftl.runtime import distributed, row_store
from hftl.runtime.hardware import is_sharded
from hftl.runtime.progress import open_bar
from hftl.runtime.row_store import RowStore, evict_unused
from hftl.runtime.run_folder import fingerprint
from hftl.train.hf_compat import count_changes, get_attention_implementation
from hftl.train.optimizer import compute_depths

NamedRow = tuple[bytes, EncodedRow]
"""A row as the encoder takes it, with the key of its content."""
LAYOUT = 1
"""Raised when the same address gives other states, or they are stored otherwise."""
TRIAL_ROWS = {"cpu": 8, "cuda": 32, "mps": 32}
"""Rows that run both ways before the others, to compare outputs and time."""
TOLERANCE = 1e-3
"""How far logits may be apart, as a share of the largest; on most encoders they are equal."""
WRITE_SPEED = 3e8
"""Bytes a second that a disk is expected to write."""
UNREAD_KEYS = (
    "_name_or_path", "id2label", "label2id", "num_labels", "problem_type", "transformers_version",
)  # fmt: skip
"""Keys of a config that no block reads; an adapted base may lie in a run folder that is moved."""


@dataclass(frozen=True)
class ReadTrial:
    """Hold how running and reading the states of a few rows compare.

    Args:
        obstacle: why reading is not the same; empty where it is.
        sizes: bytes of a state for each unit of the rows' length, by boundary.
        dtype: of the states.
        run_seconds: of a row, all blocks.
        read_seconds: of a row, the frozen blocks read.
    """

    obstacle: str
    sizes: Mapping[int, float]
    dtype: str = ""
    run_seconds: float = 0.0
    read_seconds: float = 0.0


class FrozenPrefix:
    """Hold the stores of an arm's boundaries, and let its model read the one that it needs.

    Args:
        context: of the rows.
        built: the model, on its device; all that trains at any time requires a gradient.
        finetune: the recipe's section.
        args: of the training.
        root: where the states of all arms are stored.
    """

    def __init__(
        self, context: ExperimentContext, built: LoadedModel, finetune: Finetune,
        args: TrainingArguments, root: Path,
    ) -> None:  # fmt: skip
        self.line = ""
        """Says whether the frozen blocks run once a row, and why; empty where none is frozen."""
        self.timings: dict[str, float] = {}
        self._context, self._finetune, self._args, self._root = context, finetune, args, root
        self._model, self._encoder, self._spec = built.model, built.encoder, built.architecture
        spec = self._spec
        self._paths = list_block_paths(built.encoder, spec)
        later = (*spec.final_parts, *spec.unused_parts, *((spec.pooler,) if spec.pooler else ()))
        self.cache = PrefixCache(built.encoder, self._paths, later)
        self._depths = list_frozen_depths(built.model, finetune)
        self._stores: dict[int, RowStore] = {}
        self._hashes: dict[int, tuple[object, str]] = {}

    def follow(self) -> None:
        """Read the states below the lowest part that trains from now on."""
        depth = count_frozen_blocks(self._model)
        store = self._stores.get(depth)
        # Weights below the boundary that have moved since have another address.
        is_current = store is not None and store.address == self._build_address(depth)
        self.cache.read(depth, store if is_current else None)

    def fill(self, groups: Sequence[list[Row]]) -> None:
        """Store the states of rows at every boundary of the training. Collective.

        Args:
            groups: rows that run together, apart from the others: a state's last digits depend on
                the rows of its batch.
        """
        if not self._depths:
            return
        started = time.perf_counter()
        self.cache.read(self._depths[0], None)
        reason = self._find_obstacle() or self._fill_stores(groups)
        seconds = time.perf_counter() - started
        self.timings = {
            "cached_blocks": float(max(self._stores, default=0)), "cache_seconds": seconds,
        }  # fmt: skip
        how = "run once a row" if self._stores else "run at every step"
        frozen = f"{self._depths[0]} of {len(self._paths)} blocks are frozen"
        self.line = f"{frozen} and {how}: {reason}"

    def _find_obstacle(self) -> str:
        """Return why states cannot be stored, as far as that is known before a row runs."""
        is_text = self._context.prepared.modality == "text"
        obstacles = {
            "finetune.cache is never": self._finetune.cache == "never",
            "pictures vary by data.augment": self._context.augment,
            "FSDP cuts the model": is_sharded(),
            "pictures stand among a prompt's tokens": self._context.reads_prompt,
            "torch_compile compiles them": self._args.torch_compile,
            "blocks of timm pass on more than one state": self._spec.blocks_are_listed,
            "the encoder takes no mask": is_text and not accepts_attention_mask(self._encoder),
        }
        return next((reason for reason, holds in obstacles.items() if holds), "")

    def _fill_stores(self, groups: Sequence[list[Row]]) -> str:
        """Store the states of rows where that is exact and pays; return the reason."""
        self._model.to(self._context.device)
        parts = [self._name_rows(rows) for rows in groups]
        named = {key: row for part in parts for key, row in part.items()}
        share = max(1, len(named) // TRIAL_ROWS[self._context.device])
        trial = self._try_reading(list(named.values())[::share])
        if trial.obstacle:
            return trial.obstacle
        stores = {depth: RowStore(self._root, self._build_address(depth)) for depth in self._depths}
        with ExitStack() as stack:
            if distributed.is_main():
                for depth in sorted(stores):
                    stack.enter_context(stores[depth].lock())
            missing = distributed.broadcast_from_main(lambda: _list_missing(named, stores))
            pays, reason = distributed.broadcast_from_main(
                lambda: self._decide(trial, len(named), len(missing))
            )
            if not pays:
                return reason
            length = sum(self._context.inputs.length(named[key]) for key in missing)
            count = distributed.broadcast_from_main(lambda: self._count_fitting(trial, length))
            stores = {depth: stores[depth] for depth in self._depths[:count]}
            if not stores:
                gigabytes = trial.sizes[self._depths[0]] * length / 2**30
                return f"their {gigabytes:.1f} GB do not fit"
            left = set(missing)
            batches = [
                batch
                for part in parts
                for batch in self._batch([(key, row) for key, row in part.items() if key in left])
            ]
            if missing and not self._write(stores, batches, trial):
                return "the disk is full"
        for store in stores.values():
            store.refresh()
        distributed.broadcast_from_main(
            lambda: evict_unused(self._root, [store.folder for store in stores.values()])
        )
        self._stores = stores
        return reason

    def _decide(self, trial: ReadTrial, rows: int, missing: int) -> tuple[bool, str]:
        """Return whether reading is the faster way, and why.

        On a CPU that is known beforehand: it reads a state a hundred times faster than it computes
        one. So the last digits of a result do not depend on the clock there.
        """
        ran, read = 1000 * trial.run_seconds, 1000 * trial.read_seconds
        times = f"a row takes {ran:.2g} ms, {read:.2g} ms with them stored"
        if self._finetune.cache == "always":
            return True, f"finetune.cache is always; {times}"
        passes = self._count_passes()
        if self._context.device == "cpu":
            plural = "" if passes == 1 else "es"
            return not missing or passes >= 2, f"{passes:g} pass{plural} over the rows; {times}"
        size = sum(trial.sizes.values()) / max(1, len(trial.sizes))
        cost = missing * (trial.run_seconds + size / WRITE_SPEED)
        return passes * rows * (trial.run_seconds - trial.read_seconds) > cost, times

    def _count_passes(self) -> float:
        """Return how often training reads a row while blocks are frozen."""
        args, finetune = self._args, self._finetune
        if finetune.spec.schedule == "phases":
            return finetune.gradual.epochs * len(self._depths)
        if args.max_steps > 0:
            step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return args.max_steps * step / len(self._context.select_train_rows(args.seed))
        return args.num_train_epochs

    def _count_fitting(self, trial: ReadTrial, length: int) -> int:
        """Return how many boundaries fit on the disk, the topmost first, which trains first."""
        room = min(row_store.MAX_BYTES, shutil.disk_usage(self._root).free / 2)
        sizes = np.cumsum([trial.sizes[depth] * length for depth in self._depths])
        return int((sizes <= room).sum())

    def _name_rows(self, rows: list[Row]) -> dict[bytes, EncodedRow]:
        """Return the rows as the encoder takes them, each once, by the keys of their content."""
        encoded = self._context.encode_rows(rows)
        named: dict[bytes, EncodedRow] = {}
        for batch in self._batch([(b"", row) for row in encoded]):
            encodings = [row for _, row in batch]
            keys = name_rows(self._collate(encodings))
            assert keys is not None, "the collator pads on the right"
            named.update(zip(keys.keys, encodings, strict=True))
        return named

    def _batch(self, rows: list[NamedRow]) -> list[list[NamedRow]]:
        """Return rows in batches of similar length."""
        lengths = [self._context.inputs.length(row) for _, row in rows]
        return [[rows[i] for i in batch] for batch in batch_by_length(lengths, BATCH_TOKENS)]

    def _collate(self, rows: list[EncodedRow]) -> dict[str, Any]:
        batch = self._context.inputs.collate([dict(row) for row in rows])
        device = self._context.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the training's precision."""
        dtype = torch.bfloat16 if self._args.bf16 else torch.float16 if self._args.fp16 else None
        return nullcontext() if dtype is None else torch.autocast(self._context.device, dtype)

    def _predict(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of a batch, of words those at tokens."""
        self._model.eval()
        # Not inference_mode: BEiT caches its table of positions, and training would reuse it.
        with torch.no_grad(), self._autocast():
            self.cache.precision = get_precision(self._encoder)
            logits = self._model(**batch).logits.float()
        return logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits

    def _try_reading(self, rows: list[EncodedRow]) -> ReadTrial:
        """Run a few rows both ways, and compare the logits and the time."""
        batch, cache, runs = self._collate(rows), self.cache, [0.0]
        named = name_rows(batch)
        assert named is not None

        def predict() -> Tensor:
            started = time.perf_counter()
            logits = self._predict(batch).cpu()
            runs.append((time.perf_counter() - started) / len(rows))
            return logits

        expected: list[Tensor] = []
        states = cache.record(lambda: expected.append(predict()), self._depths, whole=True)
        dtype, sizes = str(states[self._depths[0]].dtype), {}
        if set(cache.counts) != {1}:
            return ReadTrial("one block runs several times, or returns more than hidden states", {})
        length = sum(map(self._context.inputs.length, rows))
        for depth in reversed(self._depths):
            arrays = split_rows(named, states[depth])
            if arrays is None:
                return ReadTrial("blocks mix the rows of a batch", {})
            sizes[depth] = sum(array.nbytes for array in arrays) / length
            if depth not in (self._depths[0], self._depths[-1]):
                continue
            hits = cache.hits
            cache.read(depth, MemoryRows(dict(zip(named.keys, arrays, strict=True)), dtype))
            difference = (predict() - expected[0]).abs().max()
            if cache.hits == hits:
                return ReadTrial("the encoder takes other inputs than the rows", {})
            if not difference <= TOLERANCE * expected[0].abs().max().clamp(min=1):
                return ReadTrial("what follows reads more of them than their last states", {})
        if self._context.device != "cpu":
            # The first passes on an accelerator load its kernels.
            predict()
        read = runs[-1]
        cache.read(self._depths[0], None)
        if self._context.device != "cpu":
            predict()
            return ReadTrial("", sizes, dtype, runs[-1], read)
        return ReadTrial("", sizes, dtype, runs[1], read)

    def _write(
        self, stores: Mapping[int, RowStore], batches: list[list[NamedRow]], trial: ReadTrial
    ) -> bool:
        """Store the states of rows; return False where the disk is full. Collective."""
        # A store that another arm has filled gets no part: one without rows would be none.
        depths = distributed.broadcast_from_main(
            lambda: [
                depth for depth, store in stores.items()
                if any(key not in store for batch in batches for key, _ in batch)
            ]
        )  # fmt: skip
        states, is_done = self._compute_states(batches, depths), True
        if distributed.is_main():
            try:
                with ExitStack() as stack:
                    add = {
                        d: stack.enter_context(stores[d].write_part(trial.dtype)) for d in depths
                    }
                    for depth, key, state in states:
                        if key not in stores[depth]:
                            add[depth](key, state)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                is_done = False
        # Processes run together to the end, whatever the main one has written.
        for _ in states:
            pass
        return distributed.broadcast_from_main(lambda: is_done)

    def _compute_states(
        self, batches: list[list[NamedRow]], depths: list[int]
    ) -> Iterator[tuple[int, bytes, np.ndarray]]:
        """Yield boundary, key and state of rows; processes share the batches. Collective."""
        together = distributed.get_world_size()
        with open_bar("frozen blocks", len(batches)) as advance:
            for start in range(0, len(batches), together):
                group = distributed.shard_items(batches[start : start + together])
                computed = [self._compute_batch(batch, depths) for batch in group]
                for part in distributed.gather_values(computed):
                    for states in part:
                        yield from states
                advance(min(len(batches), start + together))

    def _compute_batch(
        self, rows: list[NamedRow], depths: list[int]
    ) -> list[tuple[int, bytes, np.ndarray]]:
        batch = self._collate([row for _, row in rows])
        named = name_rows(batch)
        assert named is not None
        states = self.cache.record(lambda: self._predict(batch), depths)
        return [
            (depth, key, state)
            for depth, hidden in states.items()
            for key, state in zip(named.keys, split_rows(named, hidden) or (), strict=True)
        ]

    def _build_address(self, depth: int) -> dict[str, JsonValue]:
        """Return all that the states after the lowest blocks depend on but the rows."""
        config: Any = self._encoder.config
        keys = json.loads(config.to_json_string(use_diff=False))
        precision = "bf16" if self._args.bf16 else "fp16" if self._args.fp16 else "fp32"
        return {
            "layout": LAYOUT,
            "blocks": depth,
            "weights": self._hash_below(depth),
            "class": type(self._encoder).__name__,
            "config": fingerprint({k: v for k, v in keys.items() if k not in UNREAD_KEYS}),
            "attention": get_attention_implementation(config),
            "precision": precision,
            "device": self._context.device,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def _hash_below(self, depth: int) -> str:
        """Return the hash of all tensors that the lowest blocks depend on."""
        names, blocks = compute_depths(self._model)
        depth_of = {id(p): names[name] for name, p in self._model.named_parameters()}
        parts: list[list[tuple[str, Tensor]]] = [[] for _ in range(blocks + 2)]
        for name, parameter in self._encoder.named_parameters():
            parts[depth_of[id(parameter)]].append((name, parameter))
        inside = tuple(self._paths)
        for name, buffer in self._encoder.named_buffers():
            owner = next((i for i, path in enumerate(inside, 1) if has_prefix(name, (path,))), 0)
            parts[owner].append((name, buffer))
        return fingerprint([self._hash_part(i, parts[i]) for i in range(depth + 1)])

    def _hash_part(self, number: int, tensors: list[tuple[str, Tensor]]) -> str:
        """Return the hash of a block's tensors, computed again only after they changed."""
        state = [(tensor.data_ptr(), count_changes(tensor)) for _, tensor in tensors]
        if number not in self._hashes or self._hashes[number][0] != state:
            self._hashes[number] = state, hash_tensors(tensors)
        return self._hashes[number][1]


def _list_missing(named: Mapping[bytes, EncodedRow], stores: Mapping[int, RowStore]) -> list[bytes]:
    return [key for key in named if any(key not in store for store in stores.values())]
