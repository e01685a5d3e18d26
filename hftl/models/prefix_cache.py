"""Run frozen blocks once a row: later passes read what the topmost of them returned.

Frozen blocks run in eval mode, so that their output is a function of the row alone. The encoder
still builds its masks and positions; only the frozen blocks are passed over. Nothing is computed
backward through them, also where transformers makes the embeddings require a gradient, as it does
to recompute activations.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hftl.models.encoders import has_prefix
from hftl.models.packing import round_up_size


class StoredRows(Protocol):
    """Hold the state of each row after a block: a `RowStore`, or the same in memory."""

    @property
    def details(self) -> Any:
        """Return the name of the states' dtype."""
        ...

    def __contains__(self, key: bytes) -> bool: ...

    def gather(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the states of rows, one behind the other."""
        ...


@dataclass(frozen=True)
class MemoryRows:
    """Hold the states of a few rows in memory."""

    states: Mapping[bytes, np.ndarray]
    details: str

    def __contains__(self, key: bytes) -> bool:
        return key in self.states

    def gather(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the states of rows, one behind the other."""
        return np.concatenate([self.states[key] for key in keys])


@dataclass(frozen=True)
class RowKeys:
    """Name the rows of a batch.

    Args:
        keys: of the content of each row, 16 bytes.
        lengths: the tokens of each text; None for images.
        padded: positions of a row of the batch.
    """

    keys: list[bytes]
    lengths: list[int] | None = None
    padded: int = 0


class _RunEnd(Exception):  # noqa: N818
    """End a run whose states are all recorded."""


class PrefixCache:
    """Pass over the lowest `depth` blocks of an encoder wherever all rows of a batch are stored.

    Args:
        encoder: of the model that trains, without a peft wrapper around it.
        paths: of its blocks, from bottom to top.
        later: paths of its parts that run after all blocks.
    """

    def __init__(self, encoder: nn.Module, paths: Sequence[str], later: tuple[str, ...]) -> None:
        self.depth = 0
        self.store: StoredRows | None = None
        self.precision = ""
        self.hits = 0
        self.counts: list[int] = []
        """How often each block has run since the recording began."""
        self._encoder = encoder
        self._blocks = [encoder.get_submodule(path) for path in paths]
        outside = (*paths, *later)
        self._dropouts = [
            module
            for name, module in encoder.named_modules()
            if isinstance(module, nn.Dropout) and module.p > 0 and not has_prefix(name, outside)
        ]
        self._lengths_of_outputs: list[int] = [0] * len(paths)
        self._recorded: dict[int, Tensor] | None = None
        self._is_whole = True
        self._rows: RowKeys | None = None

    @contextmanager
    def install(self) -> Iterator[None]:
        """Register the hooks on the encoder and its blocks while the context is open."""
        encoder = self._encoder
        handles = [
            encoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            encoder.register_forward_hook(self._end, always_call=True),
            *(block.register_forward_hook(self._leave) for block in self._blocks),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, depth: int, store: StoredRows | None) -> None:
        """Pass over the lowest blocks from now on; without a store they run, forward only."""
        self.depth, self.store = depth, store

    def record(
        self, run: Callable[[], object], depths: Iterable[int], whole: bool = False
    ) -> dict[int, Tensor]:
        """Return what the topmost of the lowest blocks returns in a run, by their number.

        Args:
            run: runs the model, once.
            depths: numbers of lowest blocks.
            whole: whether the blocks above run, too.
        """
        self._recorded = dict.fromkeys(depths, torch.empty(0))
        self.counts = [0] * len(self._blocks)
        self._is_whole = whole
        try:
            with suppress(_RunEnd):
                run()
            return self._recorded
        finally:
            self._recorded = None

    def _begin(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look the rows of a batch up; where all are known, pass over the frozen blocks."""
        if self._recorded is not None or self.store is None or self._is_live():
            return
        if self.precision != get_precision(self._blocks[0]):
            return
        main: Any = encoder.main_input_name
        rows = name_rows(kwargs | dict(zip([str(main)], args, strict=False)))
        if rows is None or len(args) > 1 or not all(key in self.store for key in rows.keys):
            return
        self.hits += 1
        self._rows = rows
        self._pass_over(range(self.depth))

    def _end(self, *_: Any) -> None:
        if self._rows is not None:
            self._restore()

    def _pass_over(self, numbers: range) -> None:
        """Let blocks return their input until `_restore`."""
        for number in numbers:
            self._blocks[number].forward = partial(self._hand_on, number)

    def _restore(self) -> None:
        self._rows = None
        for block in self._blocks:
            vars(block).pop("forward", None)

    def _is_live(self) -> bool:
        return any(module.training for module in (*self._dropouts, *self._blocks[: self.depth]))

    def _hand_on(self, index: int, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return the input of a block in the form of its output; of the topmost, what is stored."""
        if self._rows is not None and index == self.depth - 1:
            hidden_states = self._read_rows(self._rows, hidden_states)
        count = self._lengths_of_outputs[index]
        return (hidden_states, *[None] * (count - 1)) if count else hidden_states

    def _leave(self, block: nn.Module, _: Any, output: Any) -> Any:
        index = self._blocks.index(block)
        hidden, *more = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor) or any(part is not None for part in more):
            # A block that returns more, such as its attention, is not passed over, nor counted.
            return None
        if self._recorded is not None and "forward" not in vars(block):
            self.counts[index] += 1
            self._lengths_of_outputs[index] = 1 + len(more) if isinstance(output, tuple) else 0
            if index + 1 in self._recorded:
                self._recorded[index + 1] = hidden.detach()
                # Blocks that widen cannot be passed over: the head would read too few channels.
                if not self._is_whole and index + 1 == max(self._recorded):
                    raise _RunEnd
        if index != self.depth - 1 or not torch.is_grad_enabled():
            return None
        upper = self._blocks[index + 1] if index + 1 < len(self._blocks) else None
        # Recomputing a block, torch's older way finds its gradients by its input's.
        needs_leaf = bool(getattr(upper, "gradient_checkpointing", False))
        if not hidden.requires_grad and not needs_leaf:
            return None
        hidden = hidden.detach().requires_grad_(needs_leaf)
        return (hidden, *more) if isinstance(output, tuple) else hidden

    def _read_rows(self, rows: RowKeys, hidden: Tensor) -> Tensor:
        """Return the stored states of rows as a block returns them: packed, padded or stacked."""
        assert self.store is not None
        stored = to_tensor(self.store.gather(rows.keys), self.store.details).to(hidden.device)
        if rows.lengths is None:
            return stored.view(len(rows.keys), -1, *stored.shape[1:])
        if hidden.shape[0] == 1:
            # A packed row, which may be longer than its tokens, or the only row of a batch.
            packed = stored.new_zeros(1, hidden.shape[1], *stored.shape[1:])
            packed[0, : len(stored)] = stored
            return packed
        padded = stored.new_zeros(len(rows.keys), hidden.shape[1], *stored.shape[1:])
        for row, part in enumerate(stored.split(rows.lengths)):
            padded[row, : len(part)] = part
        return padded


def get_precision(module: nn.Module) -> str:
    """Return the precision that modules multiply in at this moment, as `torch.bfloat16`."""
    parameter = next(module.parameters())
    device = parameter.device.type
    if torch.is_autocast_enabled(device):
        return str(torch.get_autocast_dtype(device))
    return str(torch.float32)


def name_rows(inputs: Mapping[str, Any]) -> RowKeys | None:
    """Return the keys of a batch's rows, by all tensors that describe them.

    None where rows are not plain: texts whose padding is not on the right, or whose hidden states
    or attentions are returned.

    Args:
        inputs: of an encoder, by name.
    """
    if inputs.get("output_hidden_states") or inputs.get("output_attentions"):
        return None
    arrays = {
        name: value.cpu().numpy()
        for name, value in sorted(inputs.items())
        if isinstance(value, Tensor) and name != "labels"
    }
    mask, ids = arrays.pop("attention_mask", None), arrays.get("input_ids")
    size = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(size) != 1:
        return None
    if ids is None:
        keys = [_hash_row(array[row] for array in arrays.values()) for row in range(*size)]
        return RowKeys(keys)
    if mask is None or any(array.shape != mask.shape for array in arrays.values()):
        return None
    lengths = mask.sum(1)
    if not np.array_equal((mask * np.arange(1, mask.shape[1] + 1)).max(1), lengths):
        return None
    keys = [
        _hash_row(array[row, :length] for array in arrays.values())
        for row, length in enumerate(lengths)
    ]
    return RowKeys(keys, lengths.tolist(), mask.shape[1])


def _hash_row(arrays: Iterable[np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def split_rows(rows: RowKeys, hidden: Tensor) -> list[np.ndarray] | None:
    """Return the states of each row without padding; None where a block mixes rows.

    Args:
        rows: of the batch.
        hidden: what a block returned: (batch, ...), or packed (1, tokens, width).
    """
    hidden = hidden.cpu()
    if rows.lengths is None:
        return to_arrays(hidden) if len(hidden) == len(rows.keys) else None
    if tuple(hidden.shape[:2]) == (len(rows.keys), rows.padded):
        pairs = zip(hidden, rows.lengths, strict=True)
        return to_arrays(part[:length] for part, length in pairs)
    tokens = sum(rows.lengths)
    if hidden.shape[0] == 1 and tokens <= hidden.shape[1] <= round_up_size(tokens):
        return to_arrays(hidden[0, :tokens].split(rows.lengths))
    return None


def to_arrays(tensors: Iterable[Tensor]) -> list[np.ndarray]:
    """Return tensors as arrays; numpy has no bfloat16, which is stored as its bits."""
    return [
        (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for tensor in tensors
    ]


def to_tensor(array: np.ndarray, dtype: Any) -> Tensor:
    """Return an array of `to_arrays` as a tensor of the dtype of that name."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == str(torch.bfloat16) else tensor


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of tensors with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data if len(plain) else b"")
    return digest.hexdigest()
