"""Check that frozen features do not depend on batches, and are computed once a row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of
from support.tiny import tiny_config
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hftl.config.data import Data, Table
from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.image_inputs import ImageInputs
from hftl.data.rows import Row
from hftl.data.text_inputs import TextInputs
from hftl.finetune import context as context_module
from hftl.finetune.trainable import apply_strategy
from hftl.models import features
from hftl.models.features import (
    FeatureCache,
    compute_frozen_features,
    predict_logits,
    predict_with_features,
)
from hftl.models.heads import build_model
from hftl.models.pooled_model import pool_tokens
from hftl.models.source import find_source, load_tokenizer

TEXTS = [("good film",), ("a dull plot with a story",), ("the scene was bright and warm it is",)]


@pytest.mark.parametrize("pooling", ["native", "mean", "cls"])
def test_features_are_the_last_layers_inputs_whatever_the_batch(
    pooling: str, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(Source(model=str(bert)))
    inputs = TextInputs(load_tokenizer(source), 16)
    built = build_model(source, "classification", pooling, 2, ["a", "b"], seed=0)
    rows = inputs.encode([Row(text, "", None, 0, "") for text in TEXTS])
    arguments = (built.model, built.last_linear, rows, inputs, "cpu")
    together = np.concatenate(compute_frozen_features(*arguments))
    with torch.no_grad():
        logits = built.last_linear(torch.from_numpy(together)).numpy()
    predicted = predict_logits(built.model, rows, inputs, "cpu")
    np.testing.assert_allclose(predicted, logits, atol=1e-6)
    for value, expected in zip(
        predict_with_features(*arguments), (predicted, together), strict=True
    ):
        assert np.array_equal(value, expected), "one pass gives what two give"
    beats: list[bool] = []
    monkeypatch.setattr(features, "BATCH_TOKENS", 1)
    monkeypatch.setattr(features.watchdog, "beat", lambda: beats.append(True))
    alone = np.concatenate(compute_frozen_features(*arguments))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert len(beats) == 3, "every batch reports that this process goes on"


def test_predictions_run_packed_and_merged_at_the_outputs_of_stock_classes(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(Source(model=str(bert)))
    inputs = TextInputs(load_tokenizer(source), 16)
    built = build_model(source, "classification", "native", 2, ["a", "b"], seed=0)
    model: Any = apply_strategy(built.model, Finetune(strategy="lora"), built.fresh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    rows = inputs.encode([Row(text, "", None, 0, "") for text in TEXTS])
    shapes: list[tuple[int, ...]] = []
    block = model.base_model.model.bert.encoder.layer[0]
    block.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape[:2]))
    layer, merged = block.intermediate.dense, []
    block.register_forward_pre_hook(lambda *_: merged.append(layer.merged))
    logits = [predict_logits(model, rows, inputs, "cpu", stock) for stock in (False, True)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    tokens = sum(inputs.length(row) for row in rows)
    assert shapes[0] == (1, tokens) and shapes[1][0] == 3
    assert merged == [True, False] and not layer.merged
    base = model.get_base_model().bert
    assert not base.packs_predictions


def test_mean_pooling_counts_real_tokens_only() -> None:
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    torch.testing.assert_close(pool_tokens(hidden, mask, "mean"), hidden[:, :2].mean(1))
    torch.testing.assert_close(pool_tokens(hidden, mask, "cls"), hidden[:, 0])


def test_each_row_is_computed_once() -> None:
    batch_sizes: list[int] = []

    def compute(rows: list[Row]) -> list[np.ndarray]:
        batch_sizes.append(len(rows))
        return [np.array([[float(len(row.content[0]))]]) for row in rows]

    rows = [Row((text,), "a", None, i, "") for i, text in enumerate(["x", "xx", "xxx"])]
    cache = FeatureCache(compute)
    assert cache.get(rows[:2]).tolist() == [[1.0], [2.0]]
    assert cache.get(rows).tolist() == [[1.0], [2.0], [3.0]]
    assert cache.get([rows[2], rows[0]]).tolist() == [[3.0], [1.0]]
    assert batch_sizes == [2, 1]


def test_features_of_a_seed_do_not_depend_on_which_seed_was_first(
    recipe_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped knows the features of no seed that is finished."""
    recipe = Recipe.parse(recipe_tree | {"data": recipe_tree["data"] | {"shots": 4}})
    passes: list[list[bytes]] = []

    def watch(model: Any, last: Any, encoded: Any, *rest: Any) -> Any:
        passes.append([bytes(row["input_ids"]) for row in encoded])
        return compute_frozen_features(model, last, encoded, *rest)

    monkeypatch.setattr(context_module, "compute_frozen_features", watch)
    seen = []
    for seeds in ((0, 1), (1,)):
        context = bench_of(recipe)
        context.seeds = (0, 1)
        passes.clear()
        for seed in seeds:
            rows = context.select_train_rows(seed)
            features = context.extract_features("mean", seed, rows)
        context.extract_features("mean", 1, context.prepared.rows["validation"])
        seen.append((passes[:], features))
    assert seen[0][0] == seen[1][0] and len(seen[0][0]) == 2
    assert len(seen[0][0][0]) > len(rows) and np.array_equal(seen[0][1], seen[1][1])


def test_model_may_train_after_a_forward_pass_of_another() -> None:
    """BEiT caches the positions of a grid's size for all models of the process."""
    config = tiny_config("beit", image_size=48, num_labels=2)
    processor = ViTImageProcessorPil(size={"height": 48, "width": 48})
    inputs = ImageInputs(Data(train=Table(path="none")), processor, {}, config.patch_size)
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 48, 48), dtype=np.uint8)
    rows = [{"pixel_values": image} for image in images]
    predict_logits(AutoModelForImageClassification.from_config(config), rows, inputs, "cpu")
    model = AutoModelForImageClassification.from_config(config)
    model(**inputs.collate(rows)).logits.sum().backward()
