"""Diagonal Fisher information of an encoder at the original, row by row.

F_i = E_x E_y (d log p(y | x) / d theta_i)^2 (Kirkpatrick et al. 2017, arXiv:1612.00796); the kinds
differ in the y that they average over (van de Ven 2025, arXiv:2502.11756, section 3). The square of
a batch's mean gradient is none of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hftl.errors import NumericError, RecipeError
from hftl.retain.hooks import EmbeddingHook, ModelOutputs, eval_mode
from hftl.runtime import distributed

FISHER_KINDS = ("features", "exact", "sampled", "empirical")
LOGIT_KINDS = ("classes", "labels", "target")
FEATURE_DRAWS = 2
"""Directions that a row's features are looked at along."""
Batch = dict[str, Any]


def compute_fisher(
    model: nn.Module, parameters: dict[str, nn.Parameter], rows: int,
    batch: Callable[[int], Batch], kind: str, seed: int, answers: str = "classes",
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """The information of every parameter, with a mean of 1, and what it was divided by.

    `exact` averages over all answers as the head tells them, `sampled` over one drawn from it,
    `empirical` takes the row's own label; `features` needs no head: E_v (d v.f(x) / d theta)^2 with
    v normal is the diagonal of J^T J, the information of a Gaussian of variance 1 around the
    embedding f. Rows are shared among the processes; every one must come here.

    Args:
        model: the original; its modes and its gradients are left as they were.
        parameters: by the names that they are told under.
        rows: how many there are.
        batch: a batch of the one row of a number, with `labels` for `empirical`.
        kind: one of `FISHER_KINDS`.
        seed: of the draws.
        answers: what the logits are of: `classes`, `labels` that each hold or not, or a `target`,
            with a Gaussian of variance 1 around the prediction.

    Raises:
        RecipeError: for an unknown kind, for anything but `features` where a row has an answer a
            word, and for `empirical` without labels.
        NumericError: if nothing depends on any parameter, or a gradient is not finite.
    """
    if kind not in FISHER_KINDS:
        raise RecipeError(f"ewc.fisher={kind!r}", f"Use one of {', '.join(FISHER_KINDS)}")
    if answers not in LOGIT_KINDS:
        raise RecipeError(f"ewc: answers={answers!r}", f"Use one of {', '.join(LOGIT_KINDS)}")
    tap = EmbeddingHook(model)
    try:
        with eval_mode(model), torch.enable_grad(), _accumulate_squares(model, parameters) as total:
            for number in distributed.shard_items(list(range(rows))):
                given = batch(number)
                inputs = {key: value for key, value in given.items() if key != "labels"}
                view = tap.read_outputs(model(**inputs), given.get("attention_mask"))
                draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
                for share, value in _list_scalars(view, given.get("labels"), kind, answers, draw):
                    (value * share**0.5).backward(
                        retain_graph=True, inputs=list(parameters.values())
                    )
    finally:
        tap.close()
    return _normalize_fisher(total, rows)


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


def describe_fisher(told: dict[str, str]) -> dict[str, Any]:
    """What the record tells of an information, from the metadata of its file.

    Returns:
        `kind` and `rows`; `draws`, how many answers, or directions of features, were drawn for
        each row, None where none was drawn; `scale`, the mean over all parameters that it was
        divided by, and `mean`, what that left.
    """
    return {
        "kind": told["kind"],
        "rows": int(told["rows"]),
        "draws": {"features": FEATURE_DRAWS, "sampled": 1}.get(told["kind"]),
        "scale": float(told["scale"]),
        "mean": 1.0,
    }


@contextmanager
def _accumulate_squares(
    model: nn.Module, parameters: dict[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """Sums to which every backward pass inside adds the square of each parameter's gradient.

    A gradient is let go as soon as it is there: a second copy of the model would not fit the
    processor's cache. Those of embeddings hold the row's own tokens only.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not m.sparse]
    hooks: list[Any] = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad, parameter.grad = True, None
            hooks.append(
                parameter.register_post_accumulate_grad_hook(partial(_add_square, total[name]))
            )
        for table in tables:
            table.sparse = True
        yield total
    finally:
        for hook in hooks:
            hook.remove()
        for table in tables:
            table.sparse = False
        for parameter, trains, gradient in before:
            parameter.requires_grad, parameter.grad = trains, gradient


def _add_square(total: Tensor, parameter: Tensor) -> None:
    """Adds the square of the parameter's gradient, and drops the gradient."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    if gradient.is_sparse:
        found = gradient.coalesce()
        total.index_add_(0, found.indices()[0], found.values().float().square())
        return
    wide = gradient.float()
    total.addcmul_(wide, wide)


def _list_scalars(
    view: ModelOutputs, labels: Tensor | None, kind: str, answers: str, draw: torch.Generator
) -> list[tuple[float, Tensor]]:
    """What is differentiated for one row: scalars, and what each one's square counts."""
    if kind == "features":
        assert view.embedding is not None
        found = view.embedding[0]
        along = torch.randn(FEATURE_DRAWS, len(found), generator=draw).to(found.device)
        return [(1 / FEATURE_DRAWS, v @ found) for v in along]
    if view.logits.dim() > 2:
        raise RecipeError(
            f"ewc.fisher={kind} is of one answer a row, and the model has one a word",
            "Use features",
        )
    logits = view.logits[0]
    if kind == "exact":
        return _expand_expectation(logits, answers)
    if kind == "sampled":
        told = _sample_label(logits.detach().cpu(), answers, draw).to(logits.device)
    elif labels is None:
        raise RecipeError("ewc.fisher=empirical needs labels, and the rows have none", "Use exact")
    else:
        told = labels[0]
    return [(1.0, _compute_log_likelihood(logits, told, answers))]


def _expand_expectation(logits: Tensor, answers: str) -> list[tuple[float, Tensor]]:
    """Scalars and shares that make up the expectation over all answers.

    Of independent labels, and of a Gaussian, the score's products cancel: what remains is the
    variance of each answer times the square of its logit's gradient.
    """
    if answers == "classes":
        logs = F.log_softmax(logits, -1)
        return [(float(log.detach().exp()), log) for log in logs]
    if answers == "labels":
        shares = logits.detach().sigmoid()
        return [(float(p * (1 - p)), z) for p, z in zip(shares, logits, strict=True)]
    return [(1.0, logits[0])]


def _sample_label(logits: Tensor, answers: str, draw: torch.Generator) -> Tensor:
    """An answer, as likely as the model says."""
    if answers == "classes":
        return torch.multinomial(logits.softmax(-1), 1, generator=draw)
    if answers == "labels":
        return torch.bernoulli(logits.sigmoid(), generator=draw)
    return logits + torch.randn(logits.shape, generator=draw)


def _compute_log_likelihood(logits: Tensor, told: Tensor, answers: str) -> Tensor:
    """log p(told | x), up to a constant."""
    if answers == "classes":
        return F.log_softmax(logits, -1)[int(told)]
    if answers == "labels":
        return -F.binary_cross_entropy_with_logits(logits, told.float(), reduction="sum")
    return -(logits - told.float()).square().sum() / 2


def _normalize_fisher(total: dict[str, Tensor], rows: int) -> tuple[dict[str, Tensor], float]:
    """The mean over the rows of all processes, over the mean of all parameters."""
    parts = distributed.gather_values({name: tensor.cpu() for name, tensor in total.items()})
    mean = {name: torch.stack([part[name] for part in parts]).sum(0) / rows for name in total}
    numbers = sum(tensor.numel() for tensor in mean.values())
    scale = float(sum(tensor.double().sum() for tensor in mean.values()) / numbers)
    if not 0 < scale < float("inf"):
        raise NumericError(
            f"the Fisher information has a mean of {scale}", "Look at the general data"
        )
    return {name: tensor / scale for name, tensor in mean.items()}, scale
