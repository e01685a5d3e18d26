"""Tell what trains, keep its best values in memory, save it, and check what FSDP can do."""

import inspect
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_NAME

from hftl.errors import NumericError, RecipeError
from hftl.models.model_parts import get_model_spec
from hftl.runtime.distributed import broadcast_from_main

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def hold_running_statistics(model: nn.Module) -> None:
    """Mark every BatchNorm: it runs in eval mode from now on, also where its parameters train."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.holds_statistics = True  # pyright: ignore[reportArgumentType]


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model holds a BatchNorm."""
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


def has_live_batch_norm(model: nn.Module) -> bool:
    """Return whether a BatchNorm normalizes by the rows of its batch in training."""
    return has_batch_norm(model) and any(
        live and isinstance(module, BATCH_NORMS) for module, live in list_training_modes(model)
    )


def list_training_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return each module and whether it runs in train mode: only if all its parameters train.

    A module without parameters follows its parent; LoRA's own dropout, and the one directly
    before the head, are live. So is a layer whose activations are to be recomputed, for itself:
    transformers does so in train mode only. A BatchNorm that holds its statistics is not.

    Raises:
        RecipeError: for such a layer that is partly frozen and draws dropout in its own forward.
    """
    try:
        head_dropout = get_model_spec(model).head.dropout
    except RecipeError:  # A user's own model: its head is where its parameters train.
        head_dropout = None
    modes: list[tuple[nn.Module, bool]] = []

    def visit(module: nn.Module, path: str, parent: bool) -> None:
        trains = [parameter.requires_grad for parameter in module.parameters()]
        always = "lora_dropout" in path or path.removeprefix("base_model.model.") == head_dropout
        live = all(trains) if trains else parent or always
        live = live and not hasattr(module, "holds_statistics")
        modes.append((module, live or _needs_recompute(module, any(trains))))
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, live)

    visit(model, "", False)
    return modes


def _needs_recompute(module: nn.Module, trains: bool) -> bool:
    """Return whether a partly frozen layer must look as in training, to be recomputed."""
    if not (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing):
        return False
    forward = inspect.unwrap(type(module).forward)
    if trains and "self.training" in inspect.getsource(forward):
        raise RecipeError(
            f"gradient checkpointing would let the frozen part of {type(module).__name__} draw "
            "dropout",
            "Leave it out, or train everything",
        )
    return trains


def iterate_trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and detached tensor of all that training changes, sharded under FSDP.

    These are the trainable parameters, and the statistics of the BatchNorm modules that train.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP leaves the last layers whole after a forward pass, as copies of the shards.
            module.reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
    yield from iterate_running_statistics(model)


def iterate_running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the means and variances that BatchNorm moves in training.

    In eval mode, as frozen modules run, they stay as they are.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    if not norms:
        return
    live = {id(module) for module, trains in list_training_modes(model) if trains}
    for path, norm in norms.items():
        for name in ("running_mean", "running_var"):
            statistic = getattr(norm, name)
            if statistic is not None and id(norm) in live:
                yield f"{path}.{name}" if path else name, statistic


CallbackState = tuple[dict[str, Any], dict[str, Tensor]]
"""What JSON can hold, and tensors by name."""


class StatefulCallback(TrainerCallback):
    """Let checkpoints hold what a callback has seen so far."""

    def dump_state(self) -> CallbackState:
        """Return all that the callback holds."""
        raise NotImplementedError

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `dump_state` returned."""
        raise NotImplementedError


class BestWeightsCallback(StatefulCallback):
    """Hold what trains as it was at the best evaluation, and stop when none improves.

    Every process holds its own shard of sharded weights.

    Args:
        metric: a key of the evaluation's metrics, such as `eval_loss`.
        greater: whether more is better.
        patience: evaluations without improvement before training stops; None: never.
        least: the share of the best value so far that counts as an improvement for `patience`.

    `weights` are the best ones by name, `best` their value.
    """

    def __init__(
        self, metric: str, greater: bool, patience: int | None, least: float = 0.0
    ) -> None:
        self.metric = metric
        self.sign = 1 if greater else -1
        self.patience = patience
        self.least = least
        self.best: float | None = None
        self.epoch: float | None = None
        self.evaluations_without_gain = 0
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **_: Any
    ) -> None:
        """Copy the weights if the evaluation is the best so far; stop when patience ends."""
        # Rank 0's number decides for all: the last bit may differ between machines.
        value = broadcast_from_main(lambda: float(metrics[self.metric]))
        if not math.isfinite(value):
            shown = "NaN" if math.isnan(value) else f"{value}"
            raise NumericError(
                f"{self.metric} is {shown} after epoch {state.epoch:g}", "Lower the learning rate"
            )
        gained = math.inf if self.best is None else self.sign * (value - self.best)
        enough = gained > self.least * abs(self.best or 0.0)
        if gained > 0:
            self.best, self.epoch = value, state.epoch
            copy_trainable(model, self.weights)
        self.evaluations_without_gain = 0 if enough else self.evaluations_without_gain + 1
        if self.patience is not None and self.evaluations_without_gain >= self.patience:
            control.should_training_stop = True

    def dump_state(self) -> CallbackState:
        """Return the best evaluation, its weights, and how many evaluations were worse since."""
        values = {"best": self.best, "epoch": self.epoch, "waited": self.evaluations_without_gain}
        return values, self.weights

    def load_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what `dump_state` returned."""
        self.best, self.epoch = values["best"], values["epoch"]
        self.evaluations_without_gain, self.weights = values["waited"], tensors

    def restore(self, model: nn.Module) -> None:
        """Restore the best weights; without an evaluation the last ones stay."""
        for name, parameter in iterate_trainable(model):
            if name in self.weights:
                to_local_shard(parameter).copy_(self.weights[name])


def copy_trainable(model: nn.Module, held: dict[str, Tensor]) -> None:
    """Copy this process's part of all that trains into tensors on the CPU, by name.

    Args:
        model: what is copied from.
        held: an earlier copy, whose memory serves again, or empty.
    """
    for name, tensor in iterate_trainable(model):
        part = to_local_shard(tensor)
        if name in held:
            held[name].copy_(part)
        else:
            held[name] = part.to("cpu", copy=True)


def gather_trainable_state(model: nn.Module, accelerator: Any) -> dict[str, Tensor]:
    """Return copies of the trainable tensors, unsharded, on the CPU. Collective.

    It works without DDP, with it, and under FSDP; every process gets all tensors.
    """
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .to("cpu", copy=True)
        .contiguous()
        for name, tensor in iterate_trainable(accelerator.unwrap_model(model))
    }


def to_local_shard(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def collect_full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights and buffers of a module, each tied parameter under its first name."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {
        name: tensor.contiguous() if isinstance(tensor, Tensor) else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Write the trainable weights of a model that is not of transformers or peft."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in iterate_trainable(model)}
    save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Load what `save_trainable` has written."""
    stored = load_file(folder / SAFE_WEIGHTS_NAME)
    for name, tensor in iterate_trainable(model):
        tensor.copy_(stored[name])


def check_fsdp_available(is_sharded: bool, args: TrainingArguments) -> None:
    """Refuse a launch that asks for FSDP where the device has none.

    Raises:
        RecipeError: naming the device.
    """
    is_requested = args.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if is_requested and not is_sharded:
        raise RecipeError(
            f"the launcher asks for FSDP, and accelerate has none on {args.device}",
            "Launch with recipes/accelerate/multi_gpu.yaml, or on GPUs",
        )


def check_unsharded(cut: bool) -> None:
    """Refuse regularizers of sharded weights.

    Raises:
        RecipeError: if it does.
    """
    if cut:
        raise RecipeError(
            "retain does not run under FSDP, which cuts the weights it looks at",
            "Launch with recipes/accelerate/multi_gpu.yaml",
        )


def set_fsdp_blocks(plugin: Any, model: nn.Module) -> None:
    """Make each block a unit of FSDP, unless the launcher's configuration names the classes.

    transformers' own list holds the embeddings too, inside which accelerate then shards the word
    embeddings once more, and fails.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
        plugin.transformer_cls_names_to_wrap = [type(blocks[0]).__name__]
