"""Compare the metrics that guard an adaptation with a probe and neighbours of stock features."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures, sentences, write_csv
from sklearn.neighbors import NearestNeighbors
from support.adaptations import load_objective
from support.training import perturb
from torch import Tensor
from transformers import AutoModel

from hftl.adapt.encoder_io import merge_encoder_state
from hftl.analysis.probe import fit_probe
from hftl.config.recipe import Recipe
from hftl.data.rows import Row
from hftl.errors import HftlError
from hftl.finetune import guard_metrics
from hftl.finetune.context import ExperimentContext
from hftl.finetune.guard_metrics import build_neighbour_agreement, build_probe_score

POOLING = {"text": "mean", "image": "native"}


@pytest.fixture(scope="module", params=["text", "image"])
def context(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExperimentContext:  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "text":
        model, data = "bert", write_csv(folder / "a.csv", ["text", "label"], sentences(100))
    else:
        model, data = "dinov2", pictures(folder / "images", 25)
    data = {"train": {"path": str(data)}, "max_length": 16}
    return bench_of(Recipe.parse({"source": {"model": str(tiny_model(model))}, "data": data}))


def load_model(context: ExperimentContext, method: str = "full") -> Any:
    """Return an objective's model over the context's source."""
    objective = "mlm" if context.prepared.modality == "text" else "mae"
    return load_objective(objective, Path(context.source.folder), method, dropout=0.1)


def merge_state(model: Any) -> dict[str, Tensor]:
    """Return the encoder's weights, an adapter merged into them by peft."""
    encoder = deepcopy(model).encoder
    if hasattr(encoder, "merge_and_unload"):
        encoder = encoder.merge_and_unload()
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def compute_plain_features(
    context: ExperimentContext, rows: list[Row], state: dict[str, Tensor]
) -> np.ndarray:
    """Return the stock encoder's pooled output, one row at a time."""
    encoder: Any = AutoModel.from_pretrained(context.source.folder)
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected and all("pooler" in key for key in missing)
    encoder.eval()
    features = []
    for row in context.encode_rows(rows):
        inputs = {k: v for k, v in context.inputs.collate([dict(row)]).items() if k != "labels"}
        with torch.no_grad():
            hidden = encoder(**inputs).last_hidden_state[0]
        if context.prepared.modality == "text":
            features.append(hidden.mean(0))
        else:  # Dinov2's own classifier looks at the first token and the mean of the patches.
            features.append(torch.cat([hidden[0], hidden[1:].mean(0)]))
    return torch.stack(features).numpy()


def compute_plain_score(context: ExperimentContext, state: dict[str, Tensor]) -> float:
    """Return the accuracy on validation of a probe on those features."""
    train, rows = context.select_train_rows(0), context.prepared.rows["validation"]
    targets = context.prepared.encode_targets(train)
    features = compute_plain_features(context, train, state)
    probe = fit_probe(features, targets, context.num_outputs, None)
    predictions = probe.logits(compute_plain_features(context, rows, state)).argmax(1)
    return float((predictions == context.prepared.encode_targets(rows)).mean())


def compute_probe_score(context: ExperimentContext, seed: int, rows: list[Row]) -> float:
    """Return the accuracy of fine-tuning's own probe."""
    pooling = POOLING[context.prepared.modality]
    features = context.extract_features(pooling, seed, rows)
    logits = context.solve_probe(pooling, seed).logits(features)
    return float((logits.argmax(1) == context.prepared.encode_targets(rows)).mean())


def build_score(context: ExperimentContext, model: Any, seed: int = 0) -> Callable[[], float]:
    pooling = POOLING[context.prepared.modality]
    return build_probe_score(context, pooling, seed, lambda: merge_encoder_state(model))


def build_agreement(context: ExperimentContext, model: Any) -> Callable[[], float]:
    encoded = context.encode_rows(context.prepared.rows["train"])
    return build_neighbour_agreement(context, encoded, 0, lambda: merge_encoder_state(model))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_at_the_original_the_score_is_the_probe_s_and_all_neighbours_agree(
    context: ExperimentContext, method: str
) -> None:
    model, rows = load_model(context, method), context.prepared.rows["validation"]
    measure = build_score(context, model, seed=1)
    assert measure() == compute_probe_score(context, 1, rows) == measure()
    assert build_agreement(context, model)() == 1.0


def test_score_follows_the_weights(
    context: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call one measure again while the weights move; LoRA counts as merged."""
    fitted: list[np.ndarray] = []

    def fit(features: np.ndarray, *args: Any) -> Any:
        fitted.append(features)
        return fit_probe(features, *args)

    monkeypatch.setattr(guard_metrics, "fit_probe", fit)
    model = load_model(context, "full" if context.prepared.modality == "text" else "lora+blocks")
    measure = build_score(context, model)
    for by in (0.02, 0.5):
        perturb(model, by)
        score, state = measure(), merge_state(model)
        assert score == compute_plain_score(context, state)
        expected = compute_plain_features(context, context.select_train_rows(0), state)
        assert np.abs(fitted[-1] - expected).max() < 1e-5
    assert np.abs(fitted[0] - fitted[1]).max() > 0.1, "they moved"


def test_measuring_changes_neither_model_nor_random_state(context: ExperimentContext) -> None:
    model = perturb(load_model(context, "lora"), 0.1)
    model.train()
    measures = [build_score(context, model), build_agreement(context, model)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    for measure in measures:
        measure()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_score_is_of_the_first_rows_alone(
    context: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_metrics, "PROBE_EVAL_ROWS", 5)
    rows = context.prepared.rows["validation"]
    assert len(rows) > 5
    expected = compute_probe_score(context, 0, rows[:5])
    assert build_score(context, load_model(context))() == expected


def test_neighbours_are_lost_as_the_encoder_drifts(context: ExperimentContext) -> None:
    rows, model = context.prepared.rows["train"], load_model(context)
    original, measure = merge_state(model), build_agreement(context, model)
    agreements = []
    for by in (0.003, 0.1, 2.0):
        perturb(model, by)
        agreements.append(measure())
    assert 1.0 > agreements[0] > agreements[1] > agreements[2]
    neighbours = []
    for state in (original, merge_state(model)):
        side = compute_plain_features(context, rows, state)
        nearest = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(side)
        neighbours.append(nearest.kneighbors(return_distance=False))
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(*neighbours, strict=True)]
    assert agreements[2] == pytest.approx(np.mean(shared), abs=0.02)


def test_weights_of_another_model_are_refused(context: ExperimentContext) -> None:
    measure = build_probe_score(
        context, POOLING[context.prepared.modality], 0, lambda: {"strange.weight": torch.ones(1)}
    )
    with pytest.raises(HftlError, match="the adapted encoder has no weight '"):
        measure()
