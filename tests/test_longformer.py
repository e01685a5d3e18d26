"""Check Longformer: the first token's global attention, what trains, and what is published."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.published_model import open_context, publish_model
from transformers import AutoModel

from hftl.analysis.feature_store import FeatureStore
from hftl.config.section import Source
from hftl.data.rows import Row
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import prepare
from hftl.models.features import predict_logits
from hftl.models.heads import build_model
from hftl.models.layer_features import LayerSite
from hftl.models.source import find_source
from hftl.publish.checks import measure_reload_difference

Tiny = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("fast_reload")


def list_rows_of_all_lengths(context: ExperimentContext) -> list[Row]:
    """Return test rows, the texts cut to 1 to 7 words."""
    rows = enumerate(context.prepared.rows["test"][:7], 1)
    return [replace(row, content=(" ".join(row.content[0].split()[:n]),)) for n, row in rows]


def test_features_are_those_of_a_first_token_that_sees_the_whole_text(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    context, _ = open_context(tiny_model("longformer"), tmp_path, "mean", "lora")
    rows = list_rows_of_all_lengths(context)
    encoded = context.encode_rows(rows)
    assert len({len(row["input_ids"]) for row in encoded}) == 7
    encoder = AutoModel.from_pretrained(tiny_model("longformer")).eval()
    expected, local = [], []
    for row in encoded:
        ids = torch.tensor([row["input_ids"]])
        first = torch.zeros_like(ids)
        first[:, 0] = 1
        with torch.no_grad():
            for states, mask in ((expected, first), (local, None)):
                hidden = encoder(input_ids=ids, global_attention_mask=mask).last_hidden_state
                states.append(hidden[0].mean(0).numpy())
    features = context.extract_features("mean", 0, rows)
    np.testing.assert_allclose(features, np.stack(expected), atol=1e-5)
    assert np.abs(features - np.stack(local)).max() > 1e-4
    # Windows are whole: blocks see more tokens than a batch has.
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    site = LayerSite(store.layers, "mean")
    np.testing.assert_allclose(store.get(rows, site), features, atol=1e-5)


def test_outputs_do_not_depend_on_padding(tiny_model: Tiny, tmp_path: Path) -> None:
    context, _ = open_context(tiny_model("longformer"), tmp_path, "native", "lora")
    encoded = context.encode_rows(list_rows_of_all_lengths(context))
    model = context.build_model("native", 0).model
    together = predict_logits(model, encoded, context.inputs, "cpu")
    alone = [predict_logits(model, [row], context.inputs, "cpu") for row in encoded]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


HEAD = ("classifier.dense.", "classifier.out_proj.")
TRAINED = {
    "head": ("classifier.out_proj.",), "partial": ("longformer.encoder.layer.2.", *HEAD),
    "full": ("longformer.", *HEAD),
}  # fmt: skip


@pytest.mark.parametrize("strategy", [*TRAINED, "lora"])
def test_what_is_intended_trains_and_the_rest_does_not_move(
    strategy: str, tiny_model: Tiny
) -> None:
    source = find_source(Source(model=str(tiny_model("longformer"))))
    built = build_model(source, "classification", "native", 2, ["a", "b"], 0)
    model = prepare(built.model, strategy, blocks=1, fresh=built.fresh)
    for path, parameter in model.named_parameters():
        starts = TRAINED.get(strategy, ())
        is_lora = ".lora_" in path or ".classifier.modules_to_save." in path
        expected = is_lora if strategy == "lora" else path.startswith(starts)
        assert parameter.requires_grad == expected, path
    adapted = {path.split(".lora_")[0].split(".layer.")[1][2:] for path, _ in
               model.named_parameters() if ".lora_A" in path}  # fmt: skip
    names = ("query", "key", "value", "query_global", "key_global", "value_global")
    dense = {"attention.output.dense", "intermediate.dense", "output.dense"}
    assert adapted == (
        {*(f"attention.self.{name}" for name in names), *dense} if strategy == "lora" else set()
    )
    before = {path: tensor.detach().clone() for path, tensor in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        ids = torch.randint(5, 30, (4, 7))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        assert all(p.grad is not None for p in trained)
    for path, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[path]), path


@pytest.mark.parametrize(
    ("strategy", "pooling"),
    [("lora", "native"), ("lora", "mean"), pytest.param("full", "cls", marks=pytest.mark.slow)],
)
def test_published_folder_reloads(
    strategy: str, pooling: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = tiny_model("longformer")
    context, recipe = open_context(model, tmp_path / "run", pooling, strategy)
    sample = publish_model(context, recipe, tmp_path / "run")
    publish = tmp_path / "run" / "publish"
    assert measure_reload_difference(publish, model, sample, "cpu") <= 1e-5


def test_words_are_refused(tiny_model: Tiny) -> None:
    source: Any = find_source(Source(model=str(tiny_model("longformer"))))
    with pytest.raises(RecipeError, match="longformer has no class for token-classification"):
        build_model(source, "token-classification", "native", 2, ["a", "b"], 0)
