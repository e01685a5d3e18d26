"""Check features of every layer against transformers' hidden states, and that a row runs once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, make_image_recipe, pictures, sentences, write_csv

from hftl.analysis import feature_store
from hftl.analysis.feature_store import FeatureStore
from hftl.config.recipe import Recipe
from hftl.errors import RunFolderError
from hftl.models.layer_features import LayerSite
from hftl.runtime import row_store


def make_context(model: Path, table: Path, **data: Any) -> Any:
    tree = {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 16, **data},
        "finetune": {"pooling": "native"},
    }
    return bench_of(Recipe.parse(tree))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the rows of every pass."""
    passes: list[int] = []
    compute = feature_store.compute_layer_features

    def count(built: Any, encoded: list[Any], *more: Any) -> Any:
        passes.append(len(encoded))
        return compute(built, encoded, *more)

    monkeypatch.setattr(feature_store, "compute_layer_features", count)
    return passes


@pytest.mark.parametrize("kind", ["bert", "distilbert", "albert", "fnet", "modernbert"])
def test_sites_are_the_hidden_states_of_transformers(
    kind: str, tiny_model: Any, table: Path, tmp_path: Path
) -> None:
    context = make_context(tiny_model(kind), table)
    rows = context.prepared.rows["test"][:6]
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    encoder = context.build_model("native", 0).encoder
    assert store.layers == 3
    for number, row in enumerate(rows):
        batch = context.inputs.collate([dict(context.encode_rows([row])[0])])
        if kind == "fnet":
            batch.pop("attention_mask")
        with torch.no_grad():
            states = encoder(**batch, output_hidden_states=True).hidden_states
        for layer in range(4) if kind != "fnet" else ():
            for pooling, value in (("mean", states[layer].mean(1)), ("cls", states[layer][:, 0])):
                features = store.get([row], LayerSite(layer, pooling))
                np.testing.assert_allclose(features, value.numpy(), atol=1e-5)
        if kind in ("bert", "fnet"):
            for pooling in ("mean", "cls"):
                site = store.find_site(pooling)
                expected = context.extract_features(pooling, 0, [row])
                np.testing.assert_allclose(store.get(rows, site)[[number]], expected, atol=1e-5)


def test_native_features_are_those_of_the_head_where_its_pooler_is_in_the_checkpoint(
    bert: Path, table: Path, tiny_model: Any, tmp_path: Path
) -> None:
    context = make_context(bert, table)
    rows = context.prepared.rows["test"]
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    site = store.find_site("native")
    np.testing.assert_allclose(
        store.get(rows, site), context.extract_features("native", 0, rows), atol=1e-5
    )
    fresh = FeatureStore(make_context(tiny_model("roberta"), table), tmp_path / "features")
    fresh.compute(rows)
    assert fresh.find_site("native") is None


def test_a_decoder_is_read_at_its_last_token(tiny_model: Any, table: Path, tmp_path: Path) -> None:
    context = make_context(tiny_model("llama"), table)
    rows = context.prepared.rows["test"]
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    assert {site.pooling for site in store.sites} == {"mean", "last", "native"}
    last = store.get(rows, LayerSite(3, "last"))
    np.testing.assert_allclose(last, context.extract_features("native", 0, rows), atol=1e-5)


@pytest.mark.parametrize(("kind", "poolings"), [
    ("vit", {"mean", "cls"}), ("dinov2_with_registers", {"mean", "cls"}), ("swin", {"mean"}),
])  # fmt: skip
def test_sites_of_images(kind: str, poolings: set[str], tiny_model: Any, tmp_path: Path) -> None:
    recipe = make_image_recipe(pictures(tmp_path / "images", 10), tiny_model(kind))
    context = bench_of(recipe)
    rows = context.prepared.rows["train"]
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    assert {site.pooling for site in store.sites if site.layer == 1} == poolings
    native = store.get(rows, store.find_site("native"))
    np.testing.assert_allclose(native, context.extract_features("native", 0, rows), atol=1e-5)
    if kind == "vit":
        np.testing.assert_allclose(store.get(rows, LayerSite(3, "cls")), native, atol=1e-5)


def test_words_have_a_row_each(tmp_path: Path, bert: Path) -> None:
    lines = [
        f'{{"text": {str(text.split()).replace(chr(39), chr(34))}, "label": ["O", "B-X", "O", "O", '
        f'"O", "O", "O"]}}\n'
        for text, _ in sentences(40)
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(lines))
    context = make_context(bert, path, task="token-classification", max_length=6)
    rows = context.prepared.rows["train"]
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    features = store.get(rows, store.find_site("native"))
    expected = context.extract_features("native", 0, rows)
    assert features.shape == (7 * len(rows), 16) and np.isnan(features).any(), "words are cut off"
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_row_runs_once_whoever_asks(
    bert: Path, table: Path, tmp_path: Path, forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(feature_store, "PART_ROWS", 16)
    context = make_context(bert, table)
    rows = context.prepared.rows["train"][:40]
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows[:20])
    assert forwards == [16, 4], "a part at a time"
    mean = LayerSite(2, "mean")
    first = store.get(rows[:20], mean)
    again = FeatureStore(make_context(bert, table), tmp_path / "features")
    np.testing.assert_array_equal(again.get(rows[:20], mean), first)
    assert forwards == [16, 4], "a second command makes no pass"
    np.testing.assert_array_equal(again.get(rows[::-1], mean)[-20:], first[::-1])
    assert forwards == [16, 4, 16, 4], "new rows alone run"
    shorter = FeatureStore(make_context(bert, table, max_length=5), tmp_path / "features")
    assert shorter.folder != store.folder
    shorter.compute(rows[:3])
    assert forwards[-1] == 3, "another encoding is another address"


def test_a_pass_that_breaks_leaves_whole_parts_and_a_damaged_one_is_refused(
    bert: Path, table: Path, tmp_path: Path, forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(feature_store, "PART_ROWS", 16)
    context = make_context(bert, table)
    rows = context.prepared.rows["train"][:40]
    save = np.save

    def fail(path: Any, values: Any) -> None:
        if len(forwards) == 2:
            raise KeyboardInterrupt
        save(path, values)

    monkeypatch.setattr(row_store.np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(context, tmp_path / "features").compute(rows)
    monkeypatch.setattr(row_store.np, "save", save)
    store = FeatureStore(context, tmp_path / "features")
    store.compute(rows)
    assert forwards == [16, 16, 16, 8], "the first part of the broken pass is used"
    with open(store.folder / "part-0001" / "values.bin", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(RunFolderError, match="part-0001.*values.bin is not what was written"):
        FeatureStore(context, tmp_path / "features")


def test_features_unused_for_longest_go_when_all_take_too_much(
    bert: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "features"
    folders = []
    for length in (6, 7, 8):
        store = FeatureStore(make_context(bert, table, max_length=length), root)
        store.compute(store._context.prepared.rows["test"])
        folders.append(store.folder)
        assert all(folder.exists() for folder in folders)
    size = sum(row_store.list_sizes(folders[0]))
    monkeypatch.setattr(row_store, "MAX_BYTES", 3 * size)
    FeatureStore(make_context(bert, table, max_length=6), root)  # used again
    last = FeatureStore(make_context(bert, table, max_length=9), root)
    last.compute(last._context.prepared.rows["test"])
    assert [folder.exists() for folder in folders] == [True, False, True] and last.folder.exists()


def test_duplicate_texts_share_their_features(bert: Path, tmp_path: Path) -> None:
    rows = [*sentences(30), *[(f"{text} ", label) for text, label in sentences(4)]]
    context = make_context(bert, write_csv(tmp_path / "t.csv", ["text", "label"], rows))
    every = [row for split in context.prepared.rows.values() for row in split]
    store = FeatureStore(context, tmp_path / "features")
    assert store.get([every[0], every[1], every[0]], LayerSite(0, "cls")).shape == (3, 16)
