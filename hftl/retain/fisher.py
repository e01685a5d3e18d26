"""Diagonal Fisher information of an encoder at the original, row by row.

F_i = E_x E_y (d log p(y | x) / d theta_i)^2 (Kirkpatrick et al. 2017, arXiv:1612.00796); the kinds
differ in the y that they average over (van de Ven 2025, arXiv:2502.11756, section 3). The square of
a batch's mean gradient is none of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hftl import processes
from hftl.errors import NumericError, RecipeError
from hftl.retain.view import Tap, View, in_eval

KINDS = ("features", "exact", "sampled", "empirical")
DRAWS = 4
"""Directions that a row's features are looked at along."""
Batch = dict[str, Any]


def fisher_information(
    model: nn.Module, parameters: dict[str, nn.Parameter], rows: int,
    batch: Callable[[int], Batch], kind: str, seed: int,
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """The information of every parameter, with a mean of 1, and what it was divided by.

    `exact` averages over all classes as the head tells them, `sampled` over one drawn from it,
    `empirical` takes the row's own label; `features` needs no head: E_v (d v.f(x) / d theta)^2 with
    v normal is the diagonal of J^T J, the information of a Gaussian of variance 1 around the
    embedding f. Rows are shared among the processes; every one must come here.

    Args:
        model: the original; its modes and its gradients are left as they were.
        parameters: by the names that they are told under.
        rows: how many there are.
        batch: a batch of the one row of a number, with `labels` for `empirical`.
        kind: one of `KINDS`.
        seed: of the draws.

    Raises:
        RecipeError: for an unknown kind.
        NumericError: if nothing depends on any parameter, or a gradient is not finite.
    """
    if kind not in KINDS:
        raise RecipeError(f"ewc.fisher={kind!r}", f"Use one of {', '.join(KINDS)}")
    tap, trains = Tap(model), [p.requires_grad for p in parameters.values()]
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad = True
        with in_eval(model), torch.enable_grad():
            for number in processes.mine(list(range(rows))):
                given = batch(number)
                inputs = {key: value for key, value in given.items() if key != "labels"}
                view = tap.view(model(**inputs), given.get("attention_mask"))
                draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
                for share, value in _directions(view, given.get("labels"), kind, draw):
                    _add(total, parameters, value, share)
    finally:
        tap.close()
        for parameter, before in zip(parameters.values(), trains, strict=True):
            parameter.requires_grad = before
    return _normalised(total, rows)


def save_fisher(fisher: dict[str, Tensor], path: Path, told: dict[str, Any]) -> None:
    """Writes a safetensors file; `told` is its metadata, such as kind, rows and scale."""
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in fisher.items()}, path,
        metadata={key: str(value) for key, value in told.items()},
    )  # fmt: skip


def load_fisher(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_fisher` wrote."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    return load_file(path), told


def _directions(
    view: View, labels: Tensor | None, kind: str, draw: torch.Generator
) -> list[tuple[float, Tensor]]:
    """What is differentiated for one row: scalars, and what each one's square counts."""
    if kind == "features":
        assert view.embedding is not None
        found = view.embedding[0]
        along = torch.randn(DRAWS, len(found), generator=draw).to(found.device)
        return [(1 / DRAWS, v @ found) for v in along]
    if view.logits.shape[-1] == 1:
        # A Gaussian of variance 1 around the prediction: the square of its gradient.
        return [(1.0, view.logits.sum())]
    logs = F.log_softmax(view.logits.reshape(-1, view.logits.shape[-1])[0], -1)
    shares = logs.detach().exp()
    if kind == "exact":
        return [(float(share), log) for share, log in zip(shares, logs, strict=True)]
    if kind == "sampled":
        return [(1.0, logs[int(torch.multinomial(shares.cpu(), 1, generator=draw))])]
    if labels is None:
        raise RecipeError("ewc.fisher=empirical needs labels, and the rows have none", "Use exact")
    return [(1.0, logs[int(labels.reshape(-1)[0])])]


def _add(
    total: dict[str, Tensor], parameters: dict[str, nn.Parameter], value: Tensor, share: float
) -> None:
    """Adds the squares of a scalar's gradient."""
    found = torch.autograd.grad(
        value, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    for sum_, gradient in zip(total.values(), found, strict=True):
        if gradient is not None:
            sum_ += share * gradient.float().square()


def _normalised(total: dict[str, Tensor], rows: int) -> tuple[dict[str, Tensor], float]:
    """The mean over the rows of all processes, over the mean of all parameters."""
    parts = processes.gather({name: tensor.cpu() for name, tensor in total.items()})
    mean = {name: torch.stack([part[name] for part in parts]).sum(0) / rows for name in total}
    numbers = sum(tensor.numel() for tensor in mean.values())
    scale = float(sum(tensor.double().sum() for tensor in mean.values()) / numbers)
    if not 0 < scale < float("inf"):
        raise NumericError(
            f"the Fisher information has a mean of {scale}", "Look at the general data"
        )
    return {name: tensor / scale for name, tensor in mean.items()}, scale
