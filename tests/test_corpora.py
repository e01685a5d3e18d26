"""Build the corpora of adaptation; documents that measure never enter them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FILLER, bench_of, pictures, sentences, write_csv
from PIL import Image

from hftl.config.recipe import Recipe
from hftl.errors import DataError
from hftl.pipeline.corpora import GENERAL_SAMPLE, Corpus, build_corpus
from hftl.pipeline.run import Run
from hftl.runtime import run_folder

Tiny = Callable[..., Path]
LONG = 28
OTHER_TEXTS = [[text] for text, _ in sentences(31, seed=9)]


def draw_long_texts(rows: int) -> list[tuple[str, str]]:
    """Return labelled sentences of many words, so that one word more makes a near copy."""
    draw = np.random.default_rng(0)
    known = [*FILLER, "good", "bad", "warm", "cold"]
    words = [" ".join(draw.choice(known, LONG)) for _ in range(rows)]
    return [(text, ("positive", "negative")[number % 2]) for number, text in enumerate(words)]


def build_tree(model: Path, table: Path, adapt: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "source": {"model": str(model)},
        "data": {"train": {"path": str(table)}, "max_length": 32} | data,
        "adapt": ({} if adapt.get("objective") == "mae" else {"pack": False}) | adapt,
        "measure": {"arms": []},
    }


def build(tree: dict[str, Any], folder: Path) -> tuple[Corpus, Any]:
    """Return the corpus of a recipe's first adaptation, and the context."""
    recipe = Recipe.parse(tree)
    context = bench_of(recipe)
    folder.mkdir(exist_ok=True)
    return build_corpus(Run(recipe, folder, print), context, recipe.stages[0]), context


def decode_texts(corpus: Corpus, context: Any) -> set[str]:
    """Return every document, decoded; one block each while documents are short."""
    tokenizer = context.inputs.tokenizer
    blocks = [part[i][0] for part in (corpus.train, corpus.held_out) for i in range(len(part))]
    return {tokenizer.decode(ids, skip_special_tokens=True) for ids in blocks}


def list_contents(context: Any, *splits: str) -> set[str]:
    return {row.content[0] for split in splits for row in context.prepared.rows[split]}


@pytest.mark.parametrize("shots", [None, 4])
def test_corpus_of_the_task_is_train_before_shots(
    shots: int | None, table: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    other = write_csv(tmp_path / "c.csv", ["text"], OTHER_TEXTS)
    adapt = {"objective": "mlm", "corpus": "task"}
    tree = build_tree(tiny_model(), table, adapt, unlabeled=str(other), shots=shots)
    corpus, context = build(tree, tmp_path / "run")
    assert decode_texts(corpus, context) == list_contents(context, "train")
    assert len(list_contents(context, "validation", "test") & decode_texts(corpus, context)) == 0
    assert corpus.facts["from"] == "train" and corpus.facts["leaked"] == 0


def test_transductive_corpus_includes_validation_and_test(
    table: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    tree = build_tree(tiny_model(), table, {"objective": "mlm", "transductive": True})
    corpus, context = build(tree, tmp_path / "run")
    assert decode_texts(corpus, context) == list_contents(context, "train", "validation", "test")
    assert corpus.facts["transductive"] is True


@pytest.mark.parametrize("part", ["unlabeled", "general"])
@pytest.mark.parametrize("change", [{"text": "body"}, {"format": "txt"}])
def test_another_column_or_format_is_another_corpus(
    part: str, change: dict[str, str], table: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    """The bytes of the file are the same."""
    rows = [[text, other] for [text], (other, _) in zip(OTHER_TEXTS, sentences(31, 3), strict=True)]
    path = str(write_csv(tmp_path / "c.csv", ["text", "body"], rows))
    tree = build_tree(tiny_model(), table, {"objective": "mlm"}, **{part: {"path": path}})
    first, _ = build(tree, tmp_path / "run")
    same, _ = build(tree, tmp_path / "run")
    tree["data"][part] |= change
    other, _ = build(tree, tmp_path / "run")
    assert first.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("transductive", [False, True])
def test_copies_and_near_copies_of_the_test_are_counted_and_left_out(
    transductive: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "a.csv", ["text", "label"], draw_long_texts(80))
    adapt = {"objective": "mlm", "transductive": transductive}
    tree = build_tree(tiny_model(), table, adapt)
    measured = sorted(list_contents(bench_of(Recipe.parse(tree)), "validation", "test"))
    assert len(measured) > 20
    exact, near = measured[:3], [f"{text} sweet" for text in measured[3:7]]
    own = [text for text, _ in sentences(50, seed=9)]
    write_csv(tmp_path / "c.csv", ["text"], [[text] for text in [*exact, *own, *near, own[0]]])
    tree["data"]["unlabeled"] = str(tmp_path / "c.csv")
    corpus, context = build(tree, tmp_path / "run")
    assert corpus.facts["leaked"] == (0 if transductive else 7)
    assert corpus.facts["duplicates"] == 1
    remaining = own + (exact + near if transductive else [])
    texts = decode_texts(corpus, context)
    assert texts >= set(own) and len(texts & {*exact, *near}) == (7 if transductive else 0)
    documents = corpus.facts["documents"] + corpus.facts["held_out_documents"]
    assert documents == len(remaining)


def test_a_corpus_is_made_once_and_does_not_depend_on_places(
    table: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    first, second = tmp_path / "c.csv", tmp_path / "sub" / "d.csv"
    second.parent.mkdir()
    write_csv(first, ["text"], OTHER_TEXTS[:30])
    shutil.copy(first, second)
    facts = []
    for path in (first, second):
        tree = build_tree(tiny_model(), table, {"objective": "mlm"}, unlabeled=str(path))
        facts.append(build(tree, tmp_path / "run")[0].facts)
    assert facts[0] == facts[1]
    (folder,) = (tmp_path / "run" / "phases").glob("corpus-*")
    assert str(tmp_path) not in json.dumps(run_folder.read_stage_inputs(folder))
    write_csv(second, ["text"], OTHER_TEXTS)
    build(tree, tmp_path / "run")
    assert len(list((tmp_path / "run" / "phases").glob("corpus-*"))) == 2


def test_general_text_is_a_sample_and_nothing_of_it_trains(
    table: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    rows = [[text] for text, _ in sentences(GENERAL_SAMPLE + 200, seed=3)]
    samples = []
    for order in (1, -1):
        path = write_csv(tmp_path / f"g{order}.csv", ["text"], rows[::order])
        tree = build_tree(tiny_model(), table, {"objective": "mlm"}, general=str(path))
        corpus, context = build(tree, tmp_path / f"run{order}")
        assert corpus.general is not None
        assert GENERAL_SAMPLE - 1 <= len(corpus.general) <= GENERAL_SAMPLE
        ids = [tuple(corpus.general[i][0]) for i in range(len(corpus.general))]
        samples.append(set(ids))
        assert decode_texts(corpus, context) == list_contents(context, "train")
    assert samples[0] == samples[1]


def test_bad_rows_are_counted_or_refused(table: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    rows = OTHER_TEXTS[:30]
    path = write_csv(tmp_path / "c.csv", ["text"], [*rows, ["\x01\x02\x03\x04"]])
    adapt = {"objective": "mlm"}
    tree = build_tree(tiny_model(), table, adapt, unlabeled=str(path), bad_rows="skip")
    assert build(tree, tmp_path / "run")[0].facts["bad_rows"] == 1
    tree["data"]["bad_rows"] = "refuse"
    with pytest.raises(DataError, match=r"c\.csv line 32"):
        build(tree, tmp_path / "strict")


def test_images_of_the_test_are_left_out_too(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", 20)
    mae = {"objective": "mae", "held_out": 0.2}
    tree = build_tree(tiny_model("dinov2"), folder, mae)
    own, context = build(tree, tmp_path / "run")
    assert {*own.train, *own.held_out} == list_contents(context, "train")
    corpus_folder = tmp_path / "corpus"
    draw = np.random.default_rng(7)
    corpus_folder.mkdir()
    for number in range(12):
        smooth = Image.fromarray(draw.integers(0, 255, (5, 5, 3)).astype("uint8"))
        smooth.resize((40, 36)).save(corpus_folder / f"own{number}.png")
    for path in folder.rglob("*.png"):
        shutil.copy(path, corpus_folder / f"{path.parent.name}-{path.name}")
    tree["data"]["unlabeled"] = str(corpus_folder)
    corpus, context = build(tree, tmp_path / "other")
    remaining = {*corpus.train, *corpus.held_out}
    assert not remaining & list_contents(context, "validation", "test")
    assert corpus.facts["leaked"] >= len(list_contents(context, "validation", "test"))
    assert len(remaining) + corpus.facts["leaked"] == 12 + 40
    tree["adapt"]["transductive"] = True
    corpus, _ = build(tree, tmp_path / "other")
    assert corpus.facts["leaked"] == 0
    assert {*corpus.train, *corpus.held_out} >= list_contents(context, "validation", "test")


def test_too_few_images_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    tree = build_tree(
        tiny_model("dinov2"), pictures(tmp_path / "pics", 20), {"objective": "mae"},
        unlabeled=str(tmp_path / "c"),
    )  # fmt: skip
    (tmp_path / "c").mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (36, 40, 3)).astype("uint8")
    Image.fromarray(noise).save(tmp_path / "c" / "a.png")
    with pytest.raises(DataError, match="the corpus has 1 pictures"):
        build(tree, tmp_path / "run")
