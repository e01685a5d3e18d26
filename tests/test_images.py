"""Check image rows, and runs on images from the folder to predictions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bench_of, make_image_recipe, pictures
from PIL import Image

import hftl
from hftl.config.data import Data
from hftl.config.recipe import Recipe
from hftl.data.load import load_rows
from hftl.data.prepare import hash_data_files
from hftl.data.rows import BadRows, InputSpec
from hftl.errors import DataError, RecipeError
from hftl.inference.predict_table import predict_table
from hftl.pipeline import pipeline

pytestmark = pytest.mark.usefixtures("fast_reload")

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures", 12)


def read_rows(path: Path, bad: BadRows | None = None) -> list[Any]:
    data = Data.model_validate({"train": {"path": str(path)}, "max_pixels": 10_000})
    return load_rows(data, "train", bad or BadRows(), InputSpec("image", 8))


def test_rows_hold_content_size_and_place(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "dark" / "0.png", folder / "dark" / "copy.png")
    rows = read_rows(folder)
    assert {row.label for row in rows} == {"dark", "light"} and len(rows) == 25
    assert {row.size for row in rows} == {(40, 36)}
    content = {row.where: row.content for row in rows}
    assert content["dark/copy.png"] == content["dark/0.png"]
    assert len(set(content.values())) == 24
    cells = [{"bytes": (folder / "dark" / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 0]}), tmp_path / "t.parquet")
    stored = {row.content for row in read_rows(tmp_path / "t.parquet")}
    assert stored == {content[f"dark/{i}.png"] for i in range(3)}


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
def test_image_that_cannot_be_used_is_named(
    name: str, content: Any, why: str, folder: Path
) -> None:
    path = folder / name
    if isinstance(content, tuple):
        Image.new("RGB", content).save(path)
    else:
        whole = (folder / "dark" / "0.png").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(DataError, match=name.replace(".", r"\.") + f".*{why}"):
        read_rows(folder)
    bad = BadRows(skip=True)
    assert len(read_rows(folder, bad)) == 24
    assert [row.where for row in bad.dropped] == [name]


def test_table_names_images_relative_to_itself(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_text("image,label\ndark/0.png,a\nlight/0.png,b\nlight/none.png,b\n")
    with pytest.raises(DataError, match=r"t\.csv line 4: the file is missing"):
        read_rows(table)
    bad = BadRows(skip=True)
    assert [row.label for row in read_rows(table, bad)] == ["a", "b"]
    assert len(bad.dropped) == 1


def test_image_that_changes_is_noticed(folder: Path, tiny_model: Tiny) -> None:
    table = folder / "t.csv"
    table.write_text("image,label\ndark/0.png,a\nlight/0.png,b\n")
    data = Data.model_validate({"train": {"path": str(table)}})
    before = hash_data_files(data, "image")
    assert hash_data_files(data, "image") == before
    context = bench_of(make_image_recipe(folder, tiny_model("vit")))
    rows = [row for split in context.prepared.rows.values() for row in split]
    shutil.copy(folder / "dark" / "1.png", folder / "dark" / "0.png")
    assert hash_data_files(data, "image") != before
    with pytest.raises(DataError, match="is another picture now"):
        context.encode_rows(rows)
    (folder / "dark" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"dark/0\.png: the file is empty"):
        context.inputs.decode_images(rows)


def test_refuses_images_for_texts_and_texts_for_images(
    folder: Path, tiny_model: Tiny, table: Path
) -> None:
    with pytest.raises(DataError, match=r"imagefolder, but source\.model reads texts"):
        bench_of(make_image_recipe(folder, tiny_model("bert")))
    with pytest.raises(DataError, match=r"no column 'image'"):
        bench_of(make_image_recipe(table, tiny_model("vit")))
    with pytest.raises(RecipeError, match=r"data\.image_size is about images"):
        bench_of(make_image_recipe(table, tiny_model("bert"), image_size=32))
    with pytest.raises(RecipeError, match="needs a source that reads text"):
        bench_of(make_image_recipe(folder, tiny_model("vit"), task="token-classification"))


def test_refuses_folders_that_hold_no_classes(
    folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    vit = tiny_model("vit")
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "both" / split)
    (tmp_path / "none").mkdir()
    shutil.copytree(folder / "light", tmp_path / "one" / "light")
    table = folder / "t.csv"
    lines = [f"dark/{n}.png,{label}" for n in range(12) for label in ("a", "b")]
    table.write_text("\n".join(["image,label", *lines]) + "\n")
    for path, message in (
        (tmp_path / "both", "folders of both are test and train, which name splits"),
        (tmp_path / "none", "none is an empty folder"),
        (tmp_path / "one", "one class only: 'light'"),
        (folder / "dark" / "0.png", r"0\.png is one picture"),
        (table, r"two different labels.* \(24 rows\)"),
    ):
        with pytest.raises(DataError, match=message):
            bench_of(make_image_recipe(path, vit))


# Runs


def make_tree(model: Path, path: Path, **measure: Any) -> dict[str, Any]:
    return {
        "source": {"model": str(model), "published_as": "org/tiny"},
        "data": {"train": {"path": str(path)}},
        "finetune": {"strategy": "head"},
        "measure": {"seeds": [0]} | measure,
    }


def test_run_on_images_is_published_and_reuses_its_cache(
    folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    arms = ["head", "classical", "majority"]
    tree = make_tree(tiny_model("vit"), folder, arms=arms, seeds=[0, 1])
    (folder / "dark" / "broken.png").write_bytes(b"")
    tree["data"] |= {"image_size": 24, "augment": "light", "bad_rows": "skip"}
    training = {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False}
    tree["finetune"] = {"training": training}
    run = tmp_path / "run"
    record = pipeline.run(Recipe.parse(tree), run)
    assert record is not None and record["data"]["bad_rows"] == 1
    assert record["data"]["bad_rows_listed"][0]["where"] == "dark/broken.png"
    assert record["reload_difference"] <= 1e-5
    scores = {row["arm"]: row["test"] for row in record["ladder"]}
    assert scores["head"] == scores["classical"] == 1.0, "any pixel says light or dark"
    assert record["forward"] == {"interpolate_pos_encoding": True}
    names = {path.name for path in (run / "publish").iterdir()}
    assert {"preprocessor_config.json", "adapter_config.json", "README.md"} <= names
    card = (run / "publish" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "sorts pictures into" in card
    assert "interpolate_pos_encoding=True" in card and "downsampled pixels" in card
    cache = (run / "phases" / "pixels" / "pixels.npy").stat()
    pipeline.run(Recipe.parse(tree), run)
    assert (run / "phases" / "pixels" / "pixels.npy").stat() == cache


def test_table_in_another_order_is_the_same_run(
    folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    table = folder / "t.csv"
    lines = [f"{label}/{n}.png,{label}" for n in range(12) for label in ("dark", "light")]
    table.write_text("\n".join(["image,label", *lines]) + "\n")
    tree = make_tree(tiny_model("vit"), table, arms=["classical"])
    tree["data"]["shots"] = 3
    pipeline.run(Recipe.parse(tree), tmp_path / "run", until="measure")
    table.write_text("\n".join(["image,label", *reversed(lines)]) + "\n")
    tree["measure"]["seeds"] = [0, 1]
    record = pipeline.run(Recipe.parse(tree), tmp_path / "run", until="measure")
    assert record is not None
    assert {row["arm"]: row["test"] for row in record["ladder"]} == {"head": 1.0, "classical": 1.0}


def test_predictions_of_images_name_their_files(
    folder: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pipeline.run(Recipe.parse(make_tree(tiny_model("vit"), folder, arms=["majority"])), run)
    predict_table(str(run), folder, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["image"] == "dark/0.png"
    assert all(row["label"] == row["image"].split("/")[0] for row in rows)
    names = tmp_path / "names.txt"
    names.write_text(f"{folder}/dark/1.png\n{folder}/light/1.png\n")
    text = predict_table(str(run), names, None)
    assert text is not None and len(text.splitlines()) == 3
    texts = tmp_path / "texts"
    (texts / "a").mkdir(parents=True)
    (texts / "a" / "1.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"a/1\.txt.*not an image"):
        predict_table(str(run), texts, None)
    shutil.copy(folder / "dark" / "0.png", texts / "b.png")
    said: list[str] = []
    text = predict_table(str(run), texts, None, say=said.append, bad_rows="skip")
    assert text is not None and said[0].startswith("bad rows: 1 of 2 without a label")
    assert text.splitlines()[1:] == [
        'a/1.txt,,,,,"a/1.txt: not an image, or of a format that is not read"',
        text.splitlines()[2],
    ]
    assert text.splitlines()[2].startswith("b.png,dark,") and text.splitlines()[2].endswith(",")
    one = predict_table(str(run), texts / "b.png", None)
    assert one is not None and one.splitlines()[1] == text.splitlines()[2].removesuffix(",")
    model = hftl.load(run)
    assert model.predict([Image.open(folder / "dark" / "2.png")])[0]["label"] == "dark"
    with pytest.raises(DataError, match="input 1 .*missing"):
        model.predict(["none.png"])
    with pytest.raises(DataError, match="input 1: its pixels are within one patch of 8"):
        model.predict([Image.new("RGB", (3, 3))])
