"""Write recipes from data: the guesses of `hftl init`, and that the recipe parses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import pictures, sentences, write_csv
from PIL import Image

from hftl.config.recipe import Recipe
from hftl.data.columns import guess_columns
from hftl.data.guessed_table import MAX_SAMPLE_ROWS
from hftl.errors import DataError, DataWarning, RecipeError
from hftl.init import write_recipe

TEXTS = [text for text, _ in sentences(40)]
LABELS = [label for _, label in sentences(40)]
SCORES = [round(0.37 * i, 2) for i in range(40)]


def columns(**given: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    return write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


CLASSES = "classification"
GUESSES: dict[str, tuple[list[dict[str, Any]], list[str], str, str, str | None]] = {
    "plain": (columns(text=TEXTS, label=LABELS), ["text"], "label", CLASSES, None),
    "id column": (columns(label=LABELS, review=TEXTS, id=list(range(40))), ["review"], "label",
                  CLASSES, None),
    "unnamed": (columns(essay=TEXTS, mood=LABELS), ["essay"], "mood", CLASSES, None),
    "regression": (columns(text=TEXTS, valence=SCORES), ["text"], "valence", "regression", None),
    "regression by name": (columns(text=TEXTS, label=SCORES), ["text"], "label", "regression",
                           None),
    "few numbers": (columns(text=TEXTS, label=list(range(40))), ["text"], "label", CLASSES, None),
    "stars": (columns(text=TEXTS, label=[i % 5 for i in range(40)]), ["text"], "label", CLASSES,
              None),
    "booleans": (columns(text=TEXTS, label=[i % 2 == 0 for i in range(40)]), ["text"], "label",
                 CLASSES, None),
    "pair": (columns(sentence1=TEXTS, sentence2=TEXTS[::-1], label=LABELS),
             ["sentence1", "sentence2"], "label", CLASSES, None),
    "premise": (columns(premise=TEXTS, hypothesis=TEXTS[::-1], label=LABELS),
                ["premise", "hypothesis"], "label", CLASSES, None),
    "label named as a group": (columns(text=TEXTS, user=LABELS), ["text"], "user", CLASSES, None),
    "group with gaps": (
        columns(text=TEXTS, label=LABELS, user=["" if i == 7 else f"u{i}" for i in range(40)]),
        ["text"], "label", CLASSES, None),
    "group": (columns(text=TEXTS, label=LABELS, document_id=[f"d{i // 4}" for i in range(40)]),
              ["text"], "label", CLASSES, "document_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", GUESSES)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_recipe_loads_and_the_notes_name_the_guesses(
    case: str, suffix: str, tmp_path: Path
) -> None:
    rows, texts, label, task, group = GUESSES[case]
    data = write(tmp_path / f"reviews{suffix}", rows)
    path, notes = write_recipe(data, "org/MiniLM", tmp_path / "new" / "r.yaml")
    recipe = Recipe.load(path)
    assert recipe.data.train.path == str(data) and recipe.source.model == "org/MiniLM"
    assert recipe.data.train.text_columns == texts and recipe.data.train.label == label
    assert (recipe.data.task, recipe.data.group) == (task, group)
    assert recipe.measure.metric == ("pearson" if task == "regression" else "accuracy")
    assert recipe.finetune.pooling == "mean"
    text = "\n".join(notes)
    assert " and ".join(texts) in text and f"label: {label}" in text and task in text
    assert (f"group: {group}" in text) == (group is not None)
    assert path.read_text("utf-8").count("# guessed") == 3


@pytest.mark.parametrize(
    ("names", "other"),
    [
        *(([name], f"{name} label")
          for name in ("yes", "1", "a: b", "# note", "it's", '"quoted"', "[x, y]", "ä")),
        (["a, b1", "a, b2"], "label"), (["no1", "no2"], "label"),
    ],
)  # fmt: skip
def test_any_column_name_survives_yaml(names: list[str], other: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.csv", columns(**dict.fromkeys(names, TEXTS), **{other: LABELS}))
    path, _ = write_recipe(data, "org/model", tmp_path / "r.yaml")
    train = Recipe.load(path).data.train
    assert (train.text_columns, train.label) == (names, other)


@pytest.mark.parametrize("name", ["my reviews: all #1.csv", "{braces}.csv"])
def test_any_path_survives_yaml(name: str, tmp_path: Path) -> None:
    data = write(tmp_path / name, columns(text=TEXTS, label=LABELS))
    (tmp_path / "model: 2 # b").mkdir()
    (tmp_path / "model: 2 # b" / "config.json").write_text('{"model_type": "bert"}')
    path, _ = write_recipe(data, str(tmp_path / "model: 2 # b"), tmp_path / "r.yaml")
    recipe = Recipe.load(path)
    assert recipe.data.train.path == str(data)
    assert recipe.source.model == str(tmp_path / "model: 2 # b")


@pytest.mark.parametrize(
    ("source", "message"),
    [("./nowhere", "holds no model"), ("package:no_such/model", "is not installed"),
     ("./broken", "is no JSON")],
)  # fmt: skip
def test_a_source_that_is_not_there(
    source: str, message: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=rf"--source: .*{message}"):
        write_recipe(table, source, tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", "[]", "names no model_type"), ("config.json", "{}", "names no model_type"),
        ("adapter_config.json", "{}", "holds an adapter"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_whole_model(
    name: str, content: str, why: str, table: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=f"--source.*{why}"):
        write_recipe(table, str(tmp_path), tmp_path / "r.yaml")
    for output in (table / "r.yaml", Path("/proc/r.yaml")):
        with pytest.raises(RecipeError, match="--output .*r.yaml cannot be written"):
            write_recipe(table, "org/model", output)


def test_a_recipe_lies_beside_you_and_is_never_overwritten(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = write_recipe(table, "bert-base-uncased", None)
    assert path == Path("reviews.yaml")
    assert Recipe.load(path).finetune.pooling == "native"
    path.write_text("mine")
    with pytest.raises(RecipeError, match=r"reviews\.yaml exists already.*--output"):
        write_recipe(table, "org/model", path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (columns(text=TEXTS, note=TEXTS[::-1]), "no column looks like a label; it has text"),
        (columns(text=TEXTS, label=[""] * 40), "no column looks like a label"),
        (columns(label=LABELS, weight=SCORES), "no column looks like text; it has label"),
        (columns(label=LABELS), "no column looks like text"),
    ],
    ids=["no label", "empty label", "no text", "label only"],
)
def test_columns_that_cannot_be_guessed_are_refused(rows: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(DataError, match=f"t.csv: {why}.*hftl schema"):
        guess_columns("t.csv", rows)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [("none.csv", None, "none.csv does not exist"), ("rows.csv", "text,label\n", "has no rows"),
     ("empty.csv", "", "is empty"),
     ("ragged.csv", "text,label\nfine,pos\ngood one, really,pos\n",
      "ragged.csv line 3: 3 fields where the header has 2. Correct it"),
     ("sheet.xlsx", "x", "suffix '.xlsx' is of a spreadsheet.*save the sheet as CSV UTF-8"),
     ("tabs.csv", "sentence\tstars\tid\n", r"separated by tabs, not by commas\. Rename it to tabs"),
     ("pipe.tsv", "sentence|stars\n", r"separated by '\|', not by tabs"),
     ("notes.docx", "x", "suffix '.docx' says no format")],
)  # fmt: skip
def test_data_that_cannot_be_read(name: str, content: str | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=why):
        write_recipe(tmp_path / name, "org/model", tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()


def test_a_folder_of_texts_or_pictures_has_its_classes_as_folders(tmp_path: Path) -> None:
    for text, label in sentences(20):
        (tmp_path / "news" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "news" / label / f"{text[:12]}.txt").write_text(text)
    images = pictures(tmp_path / "images", 3)
    for folder, column, absent in ((tmp_path / "news", "text", "image_size"),
                                   (images, "image", "max_length")):  # fmt: skip
        path, notes = write_recipe(folder, "org/model", tmp_path / f"{column}.yaml")
        train = Recipe.load(path).data.train
        assert (train.path, getattr(train, column), train.label) == (str(folder), column, "label")
        assert absent not in path.read_text() and notes[0].startswith(f"{column}: {column}")
        assert "label: label (2 classes), so the task is classification" in notes


@pytest.mark.parametrize(
    ("rows", "task", "inputs", "label", "metric"),
    [
        (columns(tokens=[t.split() for t in TEXTS],
                 ner_tags=[["O"] * len(t.split()) for t in TEXTS]),
         "token-classification", "tokens", "ner_tags", "f1"),
        (columns(text=TEXTS, moods=[[label] for label in LABELS]), "multi-label", "text", "moods",
         "micro_f1"),
        (columns(photo=[f"{i}.jpg" for i in range(40)], label=LABELS), "classification", "photo",
         "label", "accuracy"),
    ],
    ids=["words", "lists", "paths of pictures"],
)  # fmt: skip
def test_lists_and_pictures_are_recognized_by_their_values(
    rows: list[dict[str, Any]], task: str, inputs: str, label: str, metric: str, tmp_path: Path
) -> None:
    for photo in (row["photo"] for row in rows if "photo" in row):
        Image.new("RGB", (4, 4)).save(tmp_path / photo)
    path, notes = write_recipe(write(tmp_path / "d.jsonl", rows), "org/m", tmp_path / "r.yaml")
    recipe = Recipe.load(path)
    assert recipe.data.task == task and recipe.data.train.label == label
    column = recipe.data.train.image if inputs == "photo" else recipe.data.train.text
    assert column == inputs and recipe.measure.metric == metric
    assert f"so the task is {task}" in notes[1]


def test_pictures_that_do_not_open_are_named(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 12)
    (images / "light" / "3.png").write_bytes(b"<html>")
    path, notes = write_recipe(images, "org/model", tmp_path / "one.yaml")
    assert "pictures: 24 of 24 opened" in notes
    assert any("1 row cannot be used" in n and "light/3.png: not an image" in n for n in notes)
    assert Recipe.load(path).data.bad_rows == "skip"
    for number in (4, 5, 6):
        whole = (images / "dark" / f"{number}.png").read_bytes()
        (images / "dark" / f"{number}.png").write_bytes(whole[:-200])
    with pytest.raises(DataError, match=r"dark/4.png: .*truncated.*3 more bad rows"):
        write_recipe(images, "org/model", tmp_path / "four.yaml")
    assert not (tmp_path / "four.yaml").exists()


def test_labels_of_one_class_are_refused_wherever_another_may_stand(tmp_path: Path) -> None:
    lone = write(tmp_path / "one.csv", columns(text=TEXTS, label=["same"] * 40))
    with pytest.raises(DataError, match="one.csv: every row of the column 'label' is 'same'"):
        write_recipe(lone, "org/model", tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()
    (tmp_path / "news" / "sport").mkdir(parents=True)
    (tmp_path / "news" / "sport" / "a.txt").write_text("a match")
    with pytest.raises(DataError, match="news: every file is in the folder 'sport', expected a"):
        write_recipe(tmp_path / "news", "org/model", tmp_path / "r.yaml")
    # Of a sorted table the rows that are looked at are of one class.
    texts = [f"text {i}" for i in range(MAX_SAMPLE_ROWS + 2)]
    labels = ["first"] * (MAX_SAMPLE_ROWS + 1) + ["second"]
    whole = write(tmp_path / "sorted.csv", columns(text=texts, label=labels))
    write_recipe(whole, "org/model", tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml").data.train.label == "label"


@pytest.mark.parametrize("family", ["bert", "vit", "vit_mae", "clip", "no_such"])
def test_a_source_of_other_inputs_is_refused(family: str, table: Path, tmp_path: Path) -> None:
    model, images = tmp_path / "model", pictures(tmp_path / "images", 3)
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": family}))
    for data, kind, other in ((table, "texts", "pictures"), (images, "pictures", "texts")):
        recipe = tmp_path / f"{kind}.yaml"
        if family != "no_such" and (family == "bert") == (kind == "texts"):
            write_recipe(data, str(model), recipe)
            continue
        fault = f"reads {other}, and the data are {kind}"
        fault = "'no_such' of .* is not supported" if family == "no_such" else fault
        with pytest.raises(RecipeError, match=fault):
            write_recipe(data, str(model), recipe)
        assert not recipe.exists()


def test_a_listed_source_of_texts_is_refused_for_pictures(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", 3)
    with pytest.raises(RecipeError, match="bert-base-uncased reads texts.*--modality image"):
        write_recipe(images, "google-bert/bert-base-uncased", tmp_path / "r.yaml")


def notes_of(rows: list[dict[str, Any]], folder: Path, name: str = "t.csv") -> str:
    """Return the notes on a table of these rows, in lines."""
    return "\n".join(write_recipe(write(folder / name, rows), "org/m", folder / "r.yaml")[1])


def test_labels_are_counted_as_check_names_them_and_other_columns_are_named(
    tmp_path: Path,
) -> None:
    labels = [("pos", " pos", "neg", "neg ")[i % 4] for i in range(80)]
    rows = columns(id=list(range(80)), text=TEXTS * 2, label=labels)
    notes = notes_of(rows, tmp_path).splitlines()
    assert notes[1:] == [
        "label: label (2 classes), so the task is classification", "labels: pos (40), neg (40)",
        "not used: id",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "doubt"),
    [
        (columns(text=TEXTS[:3], label=["a", "b", "a"]), "3 rows are few, of which a fifth each"),
        (columns(text=TEXTS, label=[f"c{i}" for i in range(40)]),
         "every row has a label of its own, such as 'c0': label reads like an identifier"),
        (columns(text=TEXTS, label=[f"c{i // 2}" for i in range(40)]),
         "20 classes on 40 rows are fewer than 5 rows a class"),
        (columns(text=TEXTS, toxic=[i % 2 for i in range(40)],
                 insult=[i // 9 % 2 for i in range(40)]),
         r"0 and 1 stand in insult, too; where several .* label: \[toxic, insult\]"),
        (columns(text=TEXTS, tags=[("a", "a|b", "b", "b|c")[i % 4] for i in range(40)]),
         r"the label 'a\|b' reads like several"),
        (columns(text=TEXTS, label=["n/a", *LABELS[1:]]), r"the class 'n/a' \(1 label\) reads"),
        (columns(text=["", *TEXTS[1:]], label=LABELS),
         r"1 row cannot be used and is left out \(data.bad_rows: skip\).*line 2: text is empty"),
        (columns(text=["a\0b", *TEXTS[1:]], label=LABELS), "line 2: text is binary, not text"),
        (columns(text=TEXTS, label=["high", *SCORES[1:]]), "the target 'high' is not a number"),
        (columns(text=TEXTS, label=[*LABELS[:10], *[""] * 30]), "30 rows cannot be used and are"),
        (columns(text=TEXTS, label=["1", "good"] * 20), "some classes are numbers, such as '1'"),
    ],
    ids=["few", "unique", "many", "onehot", "joined", "missing", "lacking", "binary", "word",
         "labelled in part", "mixed"],
)  # fmt: skip
def test_what_may_not_be_meant_is_warned_of(
    rows: list[dict[str, Any]], doubt: str, tmp_path: Path
) -> None:
    notes = notes_of(rows, tmp_path)
    assert re.search(f"^warning: .*{doubt}", notes, re.MULTILINE), notes
    skips = Recipe.load(tmp_path / "r.yaml").data.bad_rows == "skip"
    assert skips == ("cannot be used" in notes), "hftl check would refuse the recipe"


@pytest.mark.parametrize(
    ("name", "rows", "why"),
    [
        ("t.csv", columns(text=TEXTS, label=[f"{i},5" for i in range(40)]),
         "'label' holds numbers with a comma, such as '0,5'. Write decimals with a point, as 0.5"),
        ("t.csv", columns(text=TEXTS, score=[f"{i},5" for i in range(39)] + ["7"]),
         "'score' holds numbers with a comma"),
        ("t.jsonl", columns(text=TEXTS, label=[1, "good"] * 20),
         r"mixed types: number \(t.jsonl line 1\) and text"),
        ("t.csv", columns(text=[*TEXTS[5:], *[""] * 5], label=LABELS), "line 37: text is empty"),
        ("t.csv", columns(text=TEXTS, label=[10**400 + i for i in range(40)]), "target is inf"),
    ],
    ids=["commas", "unnamed commas", "mixed", "many bad rows", "beyond a float"],
)  # fmt: skip
def test_what_check_refuses_is_not_written(
    name: str, rows: list[dict[str, Any]], why: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=why):
        write_recipe(write(tmp_path / name, rows), "org/m", tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()


def test_nothing_is_warned_of_a_sound_table(tmp_path: Path) -> None:
    texts = [text for text, _ in sentences(60)]
    assert "warning" not in notes_of(columns(text=texts, label=["a, b", "c"] * 30), tmp_path)


def test_an_empty_text_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column looks like text; it has text \(empty in every"):
        notes_of(columns(text=[""] * 40, label=LABELS), tmp_path)


def test_a_row_beyond_the_sample_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    lines = [f"text {i},{'ab'[i % 2]}" for i in range(MAX_SAMPLE_ROWS + 9)]
    lines += ["one, two,a", "fine,b", "three, four,a"]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    message = rf"a.csv line {MAX_SAMPLE_ROWS + 11}: 3 fields .*; and 1 more bad row: a.csv line"
    with pytest.raises(DataError, match=message):
        write_recipe(tmp_path / "a.csv", "org/m", tmp_path / "r.yaml")


def test_an_export_with_semicolons_is_read_and_said(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    lines = [f'{text};"{label}";0,{i}' for i, (text, label) in enumerate(sentences(40))]
    path.write_text("\n".join(["Text;Stimmung;Sterne", *lines]), "utf-16")
    with pytest.warns(DataWarning, match="export.csv: its columns are separated by ';'"):
        written, notes = write_recipe(path, "org/m", tmp_path / "r.yaml")
    train = Recipe.load(written).data.train
    assert (train.text, train.label) == ("Text", "Stimmung") and "not used: Sterne" in notes
    assert "# its columns are separated by ';'" in written.read_text("utf-8")


@pytest.mark.parametrize(("rows", "epochs", "rule"), [(60, 20, "head"), (600, 10, "partial")])
def test_rate_and_epochs_are_those_of_the_forecasts_runs(
    rows: int, epochs: int, rule: str, tmp_path: Path
) -> None:
    texts = [f"text {i}" for i in range(rows)]
    notes_of(columns(text=texts, label=["a", "b"] * (rows // 2)), tmp_path)
    training = Recipe.load(tmp_path / "r.yaml").finetune.training
    assert (training["learning_rate"], training["num_train_epochs"]) == (1e-3, epochs)
    written = (tmp_path / "r.yaml").read_text("utf-8")
    assert f"{round(0.3 * rows)} labels a class are for {rule}" in written


def test_comments_of_the_recipe_are_aligned(tmp_path: Path) -> None:
    rows = columns(text=TEXTS, a_label_with_a_name_that_is_very_long=LABELS)
    notes_of(rows, tmp_path)
    lines = (tmp_path / "r.yaml").read_text("utf-8").splitlines()
    places = [line.rindex("# ") for line in lines if "# " in line[8:]]
    assert "\t" not in "".join(lines) and len(places) > 12
    assert sorted(set(places))[0] == 31 and places.count(31) >= len(places) - 2


def test_sentences_that_end_in_a_files_name_are_texts(tmp_path: Path) -> None:
    names = [f"I opened picture {i}.png" for i in range(40)]
    rows = columns(text=names, label=LABELS)
    assert "text: text (by name)" in notes_of(rows, tmp_path)
    (tmp_path / names[0]).touch()
    assert guess_columns("t.csv", rows, tmp_path).kind == "image"


def test_words_that_recur_among_codes_are_classes() -> None:
    codes: list[object] = [250 + i % 60 / 100 for i in range(200)]
    rows = [{"text": f"a long report {i}", "label": code} for i, code in enumerate(codes)]
    assert guess_columns("t.csv", rows).task == "regression"
    rows[0]["label"] = rows[9]["label"] = "n/a"
    rows[5]["label"] = "unclear"
    assert guess_columns("t.csv", rows).task == "regression", "rows that cannot be used"
    for number in (20, 30, 40):
        rows[number]["label"] = "V58"
    assert guess_columns("t.csv", rows).task == CLASSES
