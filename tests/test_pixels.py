"""Pictures from the disk to the encoder: seen once, kept as bytes, found again by content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures
from PIL import Image

import hftl
from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data import image_inputs, prepare
from hftl.data.image_inputs import augment_image
from hftl.data.load import load_rows
from hftl.data.rows import BadRows, InputSpec
from hftl.errors import DataError, RecipeError
from hftl.inference.predict_table import predict_table
from hftl.pipeline import pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures", 12)


def recipe(folder: Path, model: Path, **data: Any) -> Recipe:
    return Recipe.parse(
        {"source": {"model": str(model)}, "data": {"train": {"path": str(folder)}, **data}}
    )


def rows_of(path: Path, bad: BadRows | None = None, **table: Any) -> list[Any]:
    data = Data.model_validate({"train": {"path": str(path), **table}, "max_pixels": 10_000})
    return load_rows(data, "train", bad or BadRows(), InputSpec("image", 8))


def test_rows_tell_content_size_and_place(folder: Path) -> None:
    shutil.copy(folder / "dark" / "0.png", folder / "dark" / "copy.png")
    rows = rows_of(folder)
    assert {row.label for row in rows} == {"dark", "light"} and len(rows) == 25
    assert {row.size for row in rows} == {(40, 36)}
    by_place = {row.where: row for row in rows}
    assert by_place["dark/copy.png"].content == by_place["dark/0.png"].content
    assert len({row.content for row in rows}) == 24


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("dark/cut.png", "half", "truncated"),
        ("dark/text.png", b"not a picture", "not an image"),
        ("light/empty.png", b"", "0 bytes"),
        ("light/notes.txt", b"notes", "not an image"),
        ("light/small.png", (7, 3), "7x3 pixels are within one patch of 8"),
        ("dark/big.png", (101, 100), "10,100 pixels, more than the 10,000 of data.max_pixels"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(
    name: str, content: Any, why: str, folder: Path
) -> None:
    path = folder / name
    if isinstance(content, tuple):
        Image.new("RGB", content).save(path)
    else:
        whole = (folder / "dark" / "0.png").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + f".*{why}"):
        rows_of(folder)
    bad = BadRows(skip=True)
    assert len(rows_of(folder, bad)) == 24
    assert [row.where for row in bad.dropped] == [name]


def test_a_table_names_pictures_relative_to_itself(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_text("image,label\ndark/0.png,a\nlight/0.png,b\nlight/none.png,b\n")
    with pytest.raises(DataError, match=r"t\.csv line 4: the file is missing"):
        rows_of(table)
    bad = BadRows(skip=True)
    assert [row.label for row in rows_of(table, bad)] == ["a", "b"]
    assert len(bad.dropped) == 1


def test_a_parquet_table_holds_its_pictures(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": (folder / "dark" / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 0]}), tmp_path / "t.parquet")
    stored = {row.content for row in rows_of(tmp_path / "t.parquet")}
    assert stored == {r.content for r in rows_of(folder) if r.where in {
        "dark/0.png", "dark/1.png", "dark/2.png"}}  # fmt: skip


def test_one_class_folder_is_one_class(folder: Path, tiny_model: Callable[..., Path]) -> None:
    shutil.rmtree(folder / "dark")
    with pytest.raises(DataError, match="one class only: 'light'"):
        bench_of(recipe(folder, tiny_model("vit")))


def test_pictures_for_a_reader_of_text_are_refused(
    folder: Path, tiny_model: Callable[..., Path], table: Path
) -> None:
    with pytest.raises(DataError, match=r"imagefolder, but source\.model reads texts"):
        bench_of(recipe(folder, tiny_model("bert")))
    with pytest.raises(DataError, match=r"no column 'image'"):
        bench_of(recipe(table, tiny_model("vit")))
    with pytest.raises(RecipeError, match=r"data\.image_size is about images"):
        bench_of(recipe(table, tiny_model("bert"), image_size=32))


@pytest.mark.parametrize(("size", "near"), [(30, "24 or 32"), (5, "8")])
def test_a_size_that_does_not_fit_the_patches_is_refused(
    size: int, near: str, folder: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(RecipeError, match=f"no multiple .* patch of 8 pixels. Use {near}"):
        bench_of(recipe(folder, tiny_model("vit"), image_size=size))


def test_the_store_holds_what_would_be_made_anew(
    folder: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    bench = bench_of(recipe(folder, tiny_model("vit"), image_size=24))
    again = bench_of(recipe(folder, tiny_model("vit"), image_size=24))
    rows = [row for split in ("train", "validation", "test") for row in bench.prepared.rows[split]]
    image_inputs.write_image_cache(bench.inputs, rows, tmp_path)
    again.inputs.load_cache(tmp_path)
    shutil.rmtree(folder)  # what stands in the store needs no picture any more
    with pytest.raises(DataError):
        bench.encode_rows(rows)
    stored = again.stack_canvases(rows)
    assert stored.shape == (24, 3, 24, 24) and stored.dtype == np.uint8
    # A light picture is light, a dark one dark.
    for row, picture in zip(rows, stored, strict=True):
        assert (picture.mean() > 127) == (row.label == "light")


def test_what_is_stored_depends_on_pictures_and_size(
    folder: Path, tiny_model: Callable[..., Path]
) -> None:
    bench = bench_of(recipe(folder, tiny_model("vit")))
    rows = bench.prepared.rows["train"]
    known = image_inputs.fingerprint_image_cache(bench.inputs, rows)
    assert image_inputs.fingerprint_image_cache(bench.inputs, rows[::-1]) == known
    assert image_inputs.fingerprint_image_cache(bench.inputs, rows[1:]) != known
    other = bench_of(recipe(folder, tiny_model("vit"), image_size=24))
    assert image_inputs.fingerprint_image_cache(other.inputs, rows) != known


def test_augmentation_is_a_function_of_seed_epoch_and_picture(
    folder: Path, tiny_model: Callable[..., Path]
) -> None:
    bench = bench_of(recipe(folder, tiny_model("vit"), augment="light"))
    rows = bench.prepared.rows["train"]
    training, plain = bench.build_dataset(rows, 0), bench.build_dataset(rows)

    def of(examples: Any, epoch: int) -> list[Any]:
        examples.set_epoch(epoch)
        return [np.asarray(examples[i]["pixel_values"]) for i in range(len(rows))]

    first, again, later = of(training, 0), of(training, 0), of(training, 1)
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, later))
    assert all(map(np.array_equal, of(plain, 0), of(plain, 1)))
    other = of(bench.build_dataset(rows, 1), 0)
    assert not any(map(np.array_equal, first, other))


def test_positions_are_interpolated_where_the_size_differs(
    folder: Path, tiny_model: Callable[..., Path]
) -> None:
    same = bench_of(recipe(folder, tiny_model("vit")))
    other = bench_of(recipe(folder, tiny_model("vit"), image_size=24))
    assert same.inputs.arguments == {}
    assert other.inputs.arguments == {"interpolate_pos_encoding": True}
    assert other.inputs.length({}) == 9
    encoded = other.encode_rows(other.prepared.rows["test"][:2])
    batch = other.inputs.collate([dict(row) for row in encoded])
    with torch.no_grad():
        assert other.build_model("native", 0).model(**batch).logits.shape == (2, 2)


def test_a_picture_that_changes_in_a_table_is_noticed(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_text("image,label\ndark/0.png,a\nlight/0.png,b\n")
    data = Data.model_validate({"train": {"path": str(table)}})
    before = prepare.hash_data_files(data, "image")
    assert prepare.hash_data_files(data, "image") == before
    shutil.copy(folder / "dark" / "1.png", folder / "dark" / "0.png")
    assert prepare.hash_data_files(data, "image") != before


def test_a_whole_run_on_pictures(
    folder: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    tree = {
        "source": {"model": str(tiny_model("vit")), "published_as": "org/tiny"},
        "data": {"train": {"path": str(folder)}, "image_size": 24, "augment": "light"},
        "finetune": {"training": {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False}},
        "measure": {"seeds": [0, 1], "arms": ["scratch", "head", "majority"],
                    "scratch": {"learning_rates": [1e-3], "epochs_factor": 1}},
    }  # fmt: skip
    (folder / "dark" / "broken.png").write_bytes(b"")
    tree["data"]["bad_rows"] = "skip"
    record = pipeline.run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None and record["data"]["bad_rows"] == 1
    assert record["data"]["bad_rows_listed"][0]["where"] == "dark/broken.png"
    assert record["reload_difference"] <= 1e-5
    scores = {row["arm"]: row["test"] for row in record["ladder"]}
    assert scores["head"] == scores["classical"] == 1.0, "light and dark are told by any pixel"
    assert record["forward"] == {"interpolate_pos_encoding": True}
    names = {path.name for path in (tmp_path / "run" / "publish").iterdir()}
    assert {"preprocessor_config.json", "adapter_config.json", "README.md"} <= names
    marks = (tmp_path / "run" / "phases" / "pixels" / "pixels.npy").stat()
    pipeline.run(Recipe.parse(tree), tmp_path / "run")
    assert (tmp_path / "run" / "phases" / "pixels" / "pixels.npy").stat() == marks
    card = (tmp_path / "run" / "publish" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "sorts pictures into" in card
    assert "interpolate_pos_encoding=True" in card and "downsampled pixels" in card


def test_light_pictures_keep_shape_and_type() -> None:
    row = {"pixel_values": np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8)}
    pixels = augment_image(row, 0, 0, b"key")["pixel_values"]
    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.uint8


def test_a_table_in_another_order_finds_the_same_pictures(
    folder: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    table = folder / "t.csv"
    lines = [f"{label}/{n}.png,{label}" for n in range(12) for label in ("dark", "light")]
    table.write_text("\n".join(["image,label", *lines]) + "\n")
    tree: dict[str, Any] = {
        "source": {"model": str(tiny_model("vit"))},
        "data": {"train": {"path": str(table)}, "shots": 3},
        "finetune": {"strategy": "head"},
        "measure": {"seeds": [0], "arms": ["classical"]},
    }
    pipeline.run(Recipe.parse(tree), tmp_path / "run")
    table.write_text("\n".join(["image,label", *reversed(lines)]) + "\n")
    tree["measure"]["seeds"] = [0, 1]
    record = pipeline.run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None
    scores = {row["arm"]: row["test"] for row in record["ladder"]}
    assert scores == {"head": 1.0, "classical": 1.0}, "light and dark are told by any pixel"


def test_a_picture_that_became_another_is_noticed(
    folder: Path, tiny_model: Callable[..., Path]
) -> None:
    bench = bench_of(recipe(folder, tiny_model("vit")))
    for label, other in (("dark", "light"), ("light", "dark")):
        shutil.move(folder / label, folder / f"new-{other}")
    for label in ("dark", "light"):
        shutil.move(folder / f"new-{label}", folder / label)
    with pytest.raises(DataError, match="is another picture now"):
        bench.encode_rows(bench.prepared.rows["train"])
    (folder / "dark" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"dark/0\.png: the file is empty"):
        bench.inputs.decode_images([r for s in bench.prepared.rows.values() for r in s])


def test_predictions_of_pictures_name_their_files(
    folder: Path, tiny_model: Callable[..., Path], tmp_path: Path, table: Path
) -> None:
    tree = {
        "source": {"model": str(tiny_model("vit"))},
        "data": {"train": {"path": str(folder)}},
        "finetune": {"strategy": "head"},
        "measure": {"seeds": [0], "arms": ["majority"]},
    }
    pipeline.run(Recipe.parse(tree), tmp_path / "run")
    predict_table(str(tmp_path / "run"), folder, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["image"] == "dark/0.png"
    assert all(row["label"] == row["image"].split("/")[0] for row in rows)
    names = tmp_path / "names.txt"
    names.write_text(f"{folder}/dark/1.png\n{folder}/light/1.png\n")
    text = predict_table(str(tmp_path / "run"), names, None)
    assert text is not None and len(text.splitlines()) == 3
    texts = tmp_path / "texts"
    (texts / "a").mkdir(parents=True)
    (texts / "a" / "1.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"a/1\.txt.*not an image"):
        predict_table(str(tmp_path / "run"), texts, None)
    model = hftl.load(tmp_path / "run")
    assert model.predict([Image.open(folder / "dark" / "2.png")])[0]["label"] == "dark"
    with pytest.raises(DataError, match="input 1 .*missing"):
        model.predict(["none.png"])
    with pytest.raises(DataError, match="input 1: its pixels are within one patch of 8"):
        model.predict([Image.new("RGB", (3, 3))])


def test_folders_that_name_splits_are_no_classes(
    folder: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "both" / split)
    with pytest.raises(DataError, match="folders of both are test and train, which name splits"):
        bench_of(recipe(tmp_path / "both", tiny_model("vit")))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none is an empty folder"):
        bench_of(recipe(tmp_path / "none", tiny_model("vit")))
    with pytest.raises(DataError, match=r"0\.png is one picture"):
        bench_of(recipe(folder / "dark" / "0.png", tiny_model("vit")))


def test_words_are_not_read_from_pictures(folder: Path, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="needs a source that reads text"):
        bench_of(recipe(folder, tiny_model("vit"), task="token-classification"))


def test_pictures_with_two_labels_each_are_none(
    folder: Path, tiny_model: Callable[..., Path]
) -> None:
    table = folder / "t.csv"
    lines = [f"dark/{n}.png,{label}" for n in range(12) for label in ("a", "b")]
    table.write_text("\n".join(["image,label", *lines]) + "\n")
    with pytest.raises(DataError, match=r"two different labels.* \(24 rows\)"):
        bench_of(recipe(table, tiny_model("vit")))
