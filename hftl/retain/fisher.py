"""Weigh each weight's distance by the Fisher information (EWC), and compute it row by row.

F_i = E_x E_y (d log p(y | x) / d theta_i)^2 (Kirkpatrick et al. 2017, arXiv:1612.00796); the kinds
differ in the y that they average over (van de Ven 2025, arXiv:2502.11756, section 3). The square of
a batch's mean gradient is not one of them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hftl.config.retain import EWC as EWCSection
from hftl.errors import NumericError, RecipeError
from hftl.retain.original import EmbeddingHook, ModelOutputs, eval_mode
from hftl.retain.regularizer import Batch, RegularizerContext
from hftl.retain.weights import (
    WeightPenalty,
    compute_shift,
    compute_update,
    iterate_encoder_parameters,
    iterate_lora_layers,
)
from hftl.runtime import distributed
from hftl.train.facts import FisherFacts, TrainingFacts

FISHER_KINDS = ("features", "exact", "sampled", "empirical")
LOGIT_KINDS = ("classes", "labels", "target")
FEATURE_DRAWS = 2
"""Random directions in which a row's embedding is differentiated."""


class EWC(WeightPenalty[EWCSection]):
    """Penalize weight / 2 sum_i F_i (theta_i - theta0_i)^2 (Kirkpatrick et al. 2017, equation 3).

    Args:
        weight: of the penalty; F has a mean of 1, see `compute_fisher`.
        fisher: by the parameter's name in the encoder, of its shape; under LoRA those of the
            wrapped layers' weights. A parameter without an entry is free.

    Raises:
        RecipeError: for a negative weight.
    """

    section = EWCSection

    def __init__(self, weight: float, fisher: dict[str, Tensor]) -> None:
        super().__init__(weight)
        self._fisher = dict(fisher)
        self._facts = TrainingFacts()

    @classmethod
    def from_config(cls, config: EWCSection, context: RegularizerContext) -> Self:
        """Build the term of a recipe, with the information at the original."""
        fisher, facts = context.load_fisher(config)
        regularizer = cls(config.weight, fisher)
        regularizer._facts = TrainingFacts(fisher=facts)
        return regularizer

    @property
    def facts(self) -> TrainingFacts:
        """Return where the information comes from; see `describe_fisher`."""
        return self._facts

    def record_start(self, model: nn.Module) -> None:
        """Copy the encoder's trained weights, and the information of what can change.

        Raises:
            RecipeError: if nothing that trains has a Fisher information, or one has another shape;
                see `WeightPenalty`.
        """
        super().record_start(model)
        shapes = {name: p.shape for name, p in iterate_encoder_parameters(model)}
        shapes |= {
            f"{name}.weight": layer.get_base_layer().weight.shape
            for name, layer in iterate_lora_layers(model)
        }
        fisher = {name: f for name, f in self._fisher.items() if name in shapes}
        if not fisher:
            raise RecipeError(
                "ewc: nothing of the encoder that trains has a Fisher information",
                "Give that of the same source",
            )
        for name, tensor in fisher.items():
            if tensor.shape != shapes[name]:
                raise RecipeError(
                    f"ewc: the Fisher information of {name} is {tuple(tensor.shape)}, and the "
                    f"weight {tuple(shapes[name])}",
                    "Give that of the same source",
                )
        device = next(model.parameters()).device
        self._fisher = {name: f.to(device, torch.float32) for name, f in fisher.items()}

    def compute_penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty with its weight, a float32 scalar in any precision of training."""
        return self.weight / 2 * super().compute_penalty(model)

    def iterate_parts(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield sum_i F_i (theta_i - theta0_i)^2 of each parameter and LoRA layer."""
        for name, parameter in iterate_encoder_parameters(model):
            if name in self._fisher:
                shift = compute_shift(parameter, self._start[name])
                yield (self._fisher[name] * shift.square()).sum()
        for name, layer in iterate_lora_layers(model):
            if f"{name}.weight" in self._fisher:
                yield (self._fisher[f"{name}.weight"] * compute_update(layer).square()).sum()


def compute_fisher(
    model: nn.Module, parameters: dict[str, nn.Parameter], rows: int,
    get_batch: Callable[[int], Batch], kind: str, seed: int, logit_kind: str = "classes",
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """Return the information of every parameter, with a mean of 1, and what it was divided by.

    `exact` averages over all labels by the head's probabilities, `sampled` over one drawn from
    them, `empirical` takes the row's own label; `features` needs no head: E_v (d v.f(x) / d
    theta)^2 with v normal is the diagonal of J^T J, the information of a Gaussian of variance 1
    around the embedding f. Rows are distributed over the processes. Collective: every process must
    call it.

    Args:
        model: the original; its modes and its gradients are left unchanged.
        parameters: by the names of the result.
        rows: how many there are.
        get_batch: returns the batch of one row, by its number, with `labels` for `empirical`.
        kind: one of `FISHER_KINDS`.
        seed: of the draws.
        logit_kind: what the logits are of: `classes`, independent `labels`, or a `target`, with a
            Gaussian of variance 1 around the prediction.

    Raises:
        RecipeError: for an unknown kind, for anything but `features` where each word has a label,
            and for `empirical` without labels.
        NumericError: if nothing depends on any parameter, or a gradient is not finite.
    """
    if kind not in FISHER_KINDS:
        raise RecipeError(f"ewc.fisher={kind!r}", f"Use one of {', '.join(FISHER_KINDS)}")
    if logit_kind not in LOGIT_KINDS:
        raise RecipeError(f"ewc: logit_kind={logit_kind!r}", f"Use one of {', '.join(LOGIT_KINDS)}")
    hook = EmbeddingHook(model)
    try:
        with eval_mode(model), torch.enable_grad(), _accumulate_squares(model, parameters) as sums:
            for number in distributed.shard_items(list(range(rows))):
                batch = get_batch(number)
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                outputs = hook.read_outputs(model(**inputs), batch.get("attention_mask"))
                draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
                for share, scalar in _list_scalars(
                    outputs, batch.get("labels"), kind, logit_kind, draw
                ):
                    (scalar * share**0.5).backward(
                        retain_graph=True, inputs=list(parameters.values())
                    )
    finally:
        hook.remove()
    return _normalize_fisher(sums, rows)


def save_fisher(fisher: dict[str, Tensor], path: Path, metadata: Mapping[str, object]) -> None:
    """Write a safetensors file; the metadata hold kind, rows and scale."""
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in fisher.items()}, path,
        metadata={key: str(value) for key, value in metadata.items()},
    )  # fmt: skip


def load_fisher(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata that `save_fisher` wrote."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), metadata


def describe_fisher(metadata: dict[str, str]) -> FisherFacts:
    """Return the record's facts on an information, from the metadata of its file."""
    return FisherFacts(
        kind=metadata["kind"],
        rows=int(metadata["rows"]),
        draws={"features": FEATURE_DRAWS, "sampled": 1}.get(metadata["kind"]),
        scale=float(metadata["scale"]),
        mean=1.0,
    )


@contextmanager
def _accumulate_squares(
    model: nn.Module, parameters: dict[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """Yield sums to which every backward pass adds the square of each parameter's gradient.

    Each gradient is dropped at once: a second copy of the model would not fit the processor's
    cache. Those of embeddings are sparse, and hold the row's own tokens only.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not m.sparse]
    handles: list[Any] = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad, parameter.grad = True, None
            handles.append(
                parameter.register_post_accumulate_grad_hook(partial(_add_square, sums[name]))
            )
        for table in tables:
            table.sparse = True
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for table in tables:
            table.sparse = False
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad, parameter.grad = requires_grad, gradient


def _add_square(total: Tensor, parameter: Tensor) -> None:
    """Add the square of the parameter's gradient, and drop the gradient."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        total.index_add_(0, gradient.indices()[0], gradient.values().float().square())
        return
    gradient = gradient.float()
    total.addcmul_(gradient, gradient)


def _list_scalars(
    outputs: ModelOutputs, labels: Tensor | None, kind: str, logit_kind: str,
    draw: torch.Generator,
) -> list[tuple[float, Tensor]]:  # fmt: skip
    """Return the scalars to differentiate for one row, each with the share of its square."""
    if kind == "features":
        embedding = outputs.embedding[0]
        directions = torch.randn(FEATURE_DRAWS, len(embedding), generator=draw)
        return [(1 / FEATURE_DRAWS, v @ embedding) for v in directions.to(embedding.device)]
    if outputs.logits.dim() > 2:
        raise RecipeError(
            f"ewc.fisher={kind} is of one label a row, and the model has one a word",
            "Use features",
        )
    logits = outputs.logits[0]
    if kind == "exact":
        return _expand_expectation(logits, logit_kind)
    if kind == "sampled":
        label = _sample_label(logits.detach().cpu(), logit_kind, draw).to(logits.device)
    elif labels is None:
        raise RecipeError("ewc.fisher=empirical needs labels, and the rows have none", "Use exact")
    else:
        label = labels[0]
    return [(1.0, _compute_log_likelihood(logits, label, logit_kind))]


def _expand_expectation(logits: Tensor, logit_kind: str) -> list[tuple[float, Tensor]]:
    """Return scalars and shares that make up the expectation over all labels.

    Of independent labels, and of a Gaussian, the score's products cancel: what remains is the
    variance of each label times the square of its logit's gradient.
    """
    if logit_kind == "classes":
        logs = F.log_softmax(logits, -1)
        return [(float(log.detach().exp()), log) for log in logs]
    if logit_kind == "labels":
        probabilities = logits.detach().sigmoid()
        return [(float(p * (1 - p)), z) for p, z in zip(probabilities, logits, strict=True)]
    return [(1.0, logits[0])]


def _sample_label(logits: Tensor, logit_kind: str, draw: torch.Generator) -> Tensor:
    """Return a label drawn from the model's distribution."""
    if logit_kind == "classes":
        return torch.multinomial(logits.softmax(-1), 1, generator=draw)
    if logit_kind == "labels":
        return torch.bernoulli(logits.sigmoid(), generator=draw)
    return logits + torch.randn(logits.shape, generator=draw)


def _compute_log_likelihood(logits: Tensor, label: Tensor, logit_kind: str) -> Tensor:
    """Return log p(label | x), up to a constant."""
    if logit_kind == "classes":
        return F.log_softmax(logits, -1)[int(label)]
    if logit_kind == "labels":
        return -F.binary_cross_entropy_with_logits(logits, label.float(), reduction="sum")
    return -(logits - label.float()).square().sum() / 2


def _normalize_fisher(sums: dict[str, Tensor], rows: int) -> tuple[dict[str, Tensor], float]:
    """Return the mean over the rows of all processes, divided by its mean over all parameters."""
    parts = distributed.gather_values({name: tensor.cpu() for name, tensor in sums.items()})
    fisher = {name: torch.stack([part[name] for part in parts]).sum(0) / rows for name in sums}
    count = sum(tensor.numel() for tensor in fisher.values())
    scale = float(sum(tensor.double().sum() for tensor in fisher.values()) / count)
    if not 0 < scale < float("inf"):
        raise NumericError(
            f"the Fisher information has a mean of {scale}", "Look at the general data"
        )
    return {name: tensor / scale for name, tensor in fisher.items()}, scale
