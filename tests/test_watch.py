"""What guards an adaptation, against a probe and neighbours worked out from the model itself."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from transformers import AutoModel

from hftl.adapt.encoder_io import merge_encoder_state, set_trainable
from hftl.adapt.mae import load_mae
from hftl.adapt.mlm import load_mlm
from hftl.analysis.probe import fit_probe
from hftl.config.recipe import Recipe
from hftl.data.rows import Row
from hftl.errors import HftlError
from hftl.finetune import guard_metrics
from hftl.finetune.context import ExperimentContext
from hftl.finetune.guard_metrics import build_neighbour_agreement, build_probe_score

Tiny = Callable[..., Path]
LORA = {"r": 4, "lora_alpha": 8}
POOLING = {"text": "mean", "image": "native"}


@pytest.fixture(params=["text", "image"])
def bench(
    request: pytest.FixtureRequest, recipe_tree: dict[str, Any], tiny_model: Tiny, tmp_path: Path
) -> ExperimentContext:
    tree = recipe_tree
    if request.param == "image":
        tree["source"] = {"model": str(tiny_model("dinov2"))}
        tree["data"] = {"train": {"path": str(pictures(tmp_path / "pictures", 30))}}
    return bench_of(Recipe.model_validate(tree))


def objective_of(bench: ExperimentContext, method: str = "full") -> Any:
    """An objective's model over the bench's source."""
    if bench.prepared.modality == "text":
        model: Any = load_mlm(bench.source, seed=0)[0]
    else:
        decoder = {"width": 16, "depth": 1, "heads": 2}
        model = load_mae(bench.source, 32, 0.5, decoder, seed=0)[0]
    set_trainable(model, bench.source.architecture_spec, method, 1, LORA)
    return model


def drift(model: Any, by: float) -> None:
    """Moves all that trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def plain_features(
    bench: ExperimentContext, rows: list[Row], state: dict[str, Tensor]
) -> np.ndarray:
    """The stock encoder's pooled output, one row at a time."""
    encoder: Any = AutoModel.from_pretrained(bench.source.folder)
    found = encoder.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and all("pooler" in key for key in found.missing_keys)
    encoder.eval()
    features = []
    for row in bench.encode_rows(rows):
        inputs = {k: v for k, v in bench.inputs.collate([dict(row)]).items() if k != "labels"}
        with torch.no_grad():
            hidden = encoder(**inputs).last_hidden_state[0]
        if bench.prepared.modality == "text":
            features.append(hidden.mean(0))
        else:  # Dinov2's own classifier looks at the first token and the mean of the patches.
            features.append(torch.cat([hidden[0], hidden[1:].mean(0)]))
    return torch.stack(features).numpy()


def plain_score(bench: ExperimentContext, state: dict[str, Tensor]) -> float:
    """The accuracy on validation of a probe on those features."""
    train, held = bench.select_train_rows(0), bench.prepared.rows["validation"]
    targets = bench.prepared.encode_targets(train)
    probe = fit_probe(plain_features(bench, train, state), targets, bench.num_outputs, None)
    told = probe.logits(plain_features(bench, held, state)).argmax(1)
    return float((told == bench.prepared.encode_targets(held)).mean())


def own_score(bench: ExperimentContext, seed: int) -> float:
    """What fine-tuning's own probe has on validation."""
    pooling = POOLING[bench.prepared.modality]
    held = bench.prepared.rows["validation"]
    logits = bench.solve_probe(pooling, seed).logits(bench.extract_features(pooling, seed, held))
    return float((logits.argmax(1) == bench.prepared.encode_targets(held)).mean())


def score_of(bench: ExperimentContext, model: Any, seed: int = 0) -> Callable[[], float]:
    pooling = POOLING[bench.prepared.modality]
    return build_probe_score(bench, pooling, seed, lambda: merge_encoder_state(model))


def test_at_the_original_the_score_is_the_probe_s_own(bench: ExperimentContext) -> None:
    for method in ("full", "lora"):
        measure = score_of(bench, objective_of(bench, method), seed=1)
        assert measure() == own_score(bench, 1) == measure()


@pytest.mark.parametrize("method", ["full", "lora+blocks"])
def test_the_score_is_that_of_the_weights_as_they_are(
    bench: ExperimentContext, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One measure, asked again while the weights move; LoRA counts as merged."""
    fitted: list[np.ndarray] = []

    def spied(features: np.ndarray, *args: Any) -> Any:
        fitted.append(features)
        return fit_probe(features, *args)

    monkeypatch.setattr(guard_metrics, "fit_probe", spied)
    model = objective_of(bench, method)
    measure = score_of(bench, model)
    for by in (0.02, 0.5):
        drift(model, by)
        found, state = measure(), merged_state(model)
        assert found == plain_score(bench, state)
        expected = plain_features(bench, bench.select_train_rows(0), state)
        assert np.abs(fitted[-1] - expected).max() < 1e-5
    assert np.abs(fitted[0] - fitted[1]).max() > 0.1, "they moved: it can tell"


def merged_state(model: Any) -> dict[str, Tensor]:
    """The encoder's weights, an adapter merged into them by peft itself."""
    encoder = deepcopy(model).encoder
    if hasattr(encoder, "merge_and_unload"):
        encoder = encoder.merge_and_unload()
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def test_measuring_leaves_the_model_and_the_random_state_alone(bench: ExperimentContext) -> None:
    model = objective_of(bench, "lora")
    drift(model, 0.1)
    model.train()
    encoded = bench.encode_rows(bench.prepared.rows["train"])
    measures = [
        score_of(bench, model),
        build_neighbour_agreement(bench, encoded, 0, lambda: merge_encoder_state(model)),
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    for measure in measures:
        measure()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_more_rows_than_needed_are_left_out(
    bench: ExperimentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_metrics, "PROBE_EVAL_ROWS", 5)
    held = bench.prepared.rows["validation"]
    assert len(held) > 5
    bench.prepared.rows["validation"] = held[:5]
    few = own_score(bench, 0)
    bench.prepared.rows["validation"] = held
    assert score_of(bench, objective_of(bench))() == few


def test_neighbours_of_the_original_are_all_kept(bench: ExperimentContext) -> None:
    encoded = bench.encode_rows(bench.prepared.rows["train"])
    for method in ("full", "lora"):
        model = objective_of(bench, method)
        assert (
            build_neighbour_agreement(bench, encoded, 0, lambda m=model: merge_encoder_state(m))()
            == 1.0
        )


def test_neighbours_are_lost_as_the_encoder_drifts(bench: ExperimentContext) -> None:
    rows = bench.prepared.rows["train"]
    model = objective_of(bench, "full")
    original = merged_state(model)
    measure = build_neighbour_agreement(
        bench, bench.encode_rows(rows), 0, lambda: merge_encoder_state(model)
    )
    seen = []
    for by in (0.003, 0.1, 2.0):
        drift(model, by)
        seen.append(measure())
    assert 1.0 > seen[0] > seen[1] > seen[2]
    before = plain_features(bench, rows, original)
    after = plain_features(bench, rows, merged_state(model))
    assert seen[2] == pytest.approx(shared_neighbours(before, after), abs=0.02)


def shared_neighbours(before: np.ndarray, after: np.ndarray) -> float:
    sides = [
        NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(side)
        .kneighbors(return_distance=False)
        for side in (before, after)
    ]  # fmt: skip
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(*sides, strict=True)])) / 10


def test_weights_of_another_model_are_refused(bench: ExperimentContext) -> None:
    measure = build_probe_score(
        bench, POOLING[bench.prepared.modality], 0, lambda: {"strange.weight": torch.ones(1)}
    )
    with pytest.raises(HftlError, match="the adapted encoder has no weight '"):
        measure()
