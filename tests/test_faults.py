"""Plant faults in inputs, labels and splits: each is found, and none where there is none."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import BAD, FILLER, GOOD, sentences, write_csv
from scipy.stats import chi2_contingency, fisher_exact

from hftl import Recipe
from hftl.analysis.fingerprints import FINGERPRINT_CHECKS
from hftl.analysis.label_faults import (
    check_label_errors,
    count_group_neighbours,
    find_label_errors,
)
from hftl.analysis.label_maps import find_exchange, match_labels
from hftl.analysis.row_faults import (
    ROW_CHECKS,
    compare_shares,
    compute_fisher_p,
    compute_homogeneity_p,
)
from hftl.analysis.source_faults import READ_TOKENS, compare_readings, examine_rows, score_rows
from hftl.analysis.tokenizer_faults import compare_embeddings, list_stems, shuffle_ids
from hftl.config.data import Data, Table
from hftl.data.duplicates import build_shingles
from hftl.data.image_inputs import ImageInputs
from hftl.data.near_copies import MIN_SIMILARITY, pair_texts
from hftl.data.prepare import prepare_data, read_prepared_data, write_prepared_data
from hftl.data.rows import InputSpec, Row
from hftl.data.text_inputs import TextInputs
from hftl.models.architectures import get_max_tokens
from hftl.pipeline.faults import add_source_faults
from hftl.pipeline.pipeline import open_recipe
from hftl.train.facts import CheckFacts, Finding

Cells = list[tuple[str, ...]]


def write_tables(folder: Path, **tables: Cells) -> dict[str, Any]:
    """Write a table a split; return the recipe's section of them."""
    header = ["text", "label", "owner"]
    return {
        split: {"path": str(write_csv(folder / f"{split}.csv", header[: len(rows[0])], rows))}
        for split, rows in tables.items()
    }


def split_rows(rows: Cells) -> dict[str, Cells]:
    return {"train": rows[:120], "validation": rows[120:160], "test": rows[160:]}


def find_in_rows(data: dict[str, Any]) -> list[Finding]:
    recipe: Any = SimpleNamespace(data=Data.model_validate(data))
    prepared = prepare_data(recipe.data)
    return [finding for check in ROW_CHECKS for finding in check(recipe, prepared)]


# What rows show by themselves.


def test_pairs_of_texts_are_those_of_a_brute_force() -> None:
    draw = random.Random(0)
    texts = [
        " ".join(draw.choices("a b c d e f".split(), k=draw.randint(3, 14))) for _ in range(90)
    ]
    texts += [f"{text} g" for text in texts[:30]]
    sets = [build_shingles(text) if len(text.split()) >= 6 else set() for text in texts]
    expected = [
        (i, j)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if sets[i] and sets[j]
        and len(sets[i] & sets[j]) >= MIN_SIMILARITY * len(sets[i] | sets[j])
    ]  # fmt: skip
    assert sorted(pair_texts(texts)) == expected and len(expected) > 20


def test_rows_without_a_fault_have_no_finding(tmp_path: Path) -> None:
    assert find_in_rows(write_tables(tmp_path, **split_rows(sentences(220)))) == []


def test_near_copies_across_splits_are_leakage(tmp_path: Path) -> None:
    parts = split_rows(sentences(220))
    parts["test"] += [(f"{text} indeed", label) for text, label in parts["train"][:3]]
    (finding,) = find_in_rows(write_tables(tmp_path, **parts))
    assert finding.kind == "leakage" and finding.what.startswith("3 texts")
    assert len(finding.where) == 3 and "test.csv line" in finding.where[0]
    assert "train.csv line" in finding.where[0] and "data.group" in finding.sentence


def test_near_copies_with_another_label_are_named(tmp_path: Path) -> None:
    parts = split_rows(sentences(220))
    other = {"negative": "positive", "positive": "negative"}
    parts["train"] += [(f"{text} indeed", other[label]) for text, label in parts["train"][:2]]
    (finding,) = find_in_rows(write_tables(tmp_path, **parts))
    assert finding.kind == "near labels" and finding.what.startswith("2 pairs")


def test_a_class_that_a_split_lacks_and_other_shares_are_found(tmp_path: Path) -> None:
    parts = split_rows(sentences(220))
    parts["validation"] = [row for row in parts["validation"] if row[1] == "positive"]
    findings = find_in_rows(write_tables(tmp_path, **parts))
    assert [finding.kind for finding in findings] == ["missing class", "label shift"]
    assert "'negative'" in findings[0].what and "validation" in findings[0].what
    assert "100% for 50%" in findings[1].what or "0% for 50%" in findings[1].what


def test_a_stray_missing_value_is_no_class_that_a_split_lacks(tmp_path: Path) -> None:
    parts = split_rows(sentences(220))
    parts["train"] = [(parts["train"][0][0], "n/a"), *parts["train"][1:]]
    assert find_in_rows(write_tables(tmp_path, **parts)) == []
    parts["train"] = [(text, "n/a") for text, _ in parts["train"][:6]] + parts["train"][6:]
    kinds = [finding.kind for finding in find_in_rows(write_tables(tmp_path, **parts))]
    assert kinds[:2] == ["missing class"] * 2


def test_one_class_of_many_that_differs_much_is_seen_in_few_rows() -> None:
    train, test = np.full(10, 40.0), np.array([20.0, *[5.0] * 9])
    assert chi2_contingency(np.stack([train, test]), correction=False).pvalue > 0.001  # pyright: ignore
    assert compare_shares(train, test, 1.0, 1.0) < 0.001
    assert compare_shares(train, np.array([8.0, *[6.0] * 9]), 1.0, 1.0) > 0.5
    # Rows of a group are alike: five of them count as one.
    assert compare_shares(train, test, 1.0, 0.2) > 0.001


def test_both_tests_of_shares_are_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    for size in (3, 30, 3000):
        for _ in range(20):
            table = draw.integers(1, size, (2, 2))
            expected: Any = fisher_exact(table)
            assert compute_fisher_p(*table.ravel().tolist()) == pytest.approx(
                expected.pvalue, rel=1e-6
            )
            counts = draw.integers(1, size, (2, 5)) * 0.7
            tested: Any = chi2_contingency(counts, correction=False)
            assert compute_homogeneity_p(counts) == pytest.approx(tested.pvalue)
    assert compute_fisher_p(0, 0, 5, 7) == 1.0


def test_near_pictures_are_known_after_the_rows_were_stored(tmp_path: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "p" / label).mkdir(parents=True)
    for label in ("a", "b"):
        for number in range(12):
            image = Image.fromarray(draw.integers(0, 255, (6, 6, 3), np.uint8)).resize((40, 40))
            image.save(tmp_path / "p" / label / f"{number}.png")
            if number < 2:
                other = {"a": "b", "b": "a"}[label]
                image.resize((60, 60)).save(tmp_path / "p" / other / f"{label}copy{number}.png")
    spec = InputSpec("image", 8)
    prepared = prepare_data(Data(train=Table(path=str(tmp_path / "p"))), spec)
    assert {p.row.label for p in prepared.near_copies} == {"a", "b"} and len(
        prepared.near_copies
    ) == 4
    write_prepared_data(prepared, tmp_path, "digest")
    assert read_prepared_data(tmp_path).near_copies == prepared.near_copies


# What a checkpoint declares.


def find_fingerprints(model_type: str, inputs: Any, **config: Any) -> list[str]:
    source: Any = SimpleNamespace(
        config=SimpleNamespace(model_type=model_type, **config), architecture=model_type,
        architecture_spec=SimpleNamespace(is_causal=False),
    )  # fmt: skip
    return [finding.kind for check in FINGERPRINT_CHECKS for finding in check(source, inputs)]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, []),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, ["normalization"]),
        ({"do_normalize": False}, ["normalization"]),
        ({"rescale_factor": 1 / 255**2}, ["rescale"]),
        ({"do_rescale": False, "do_normalize": False}, ["rescale"]),
    ],
)
def test_the_processor_is_compared_with_its_family(
    settings: dict[str, Any], kinds: list[str]
) -> None:
    from transformers import ViTImageProcessorPil

    usual = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    whole: Any = {"size": {"height": 16, "width": 16}, **usual, **settings}
    processor = ViTImageProcessorPil(**whole)
    inputs = ImageInputs(Data(train=Table(path=".")), processor, {}, 8)
    assert find_fingerprints("dinov2", inputs) == kinds
    assert find_fingerprints("unknown", inputs) == [k for k in kinds if k == "rescale"]


class WordTokenizer:
    """Split at spaces; a vocabulary of 1200 words, cased or not."""

    all_special_tokens, pad_token_id = ["[PAD]"], 0

    def __init__(self, is_cased: bool, lowers: bool, letters: str = "Ww") -> None:
        words = [f"{letters[not (is_cased and i % 5 == 0)]}{i}" for i in range(1199)]
        self._vocabulary = {word: i for i, word in enumerate(["[PAD]", *words])}
        self._lowers = lowers

    def __len__(self) -> int:
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def tokenize(self, text: str) -> list[str]:
        return (text.lower() if self._lowers else text).split()


@pytest.mark.parametrize(("is_cased", "lowers"), [(a, b) for a in (0, 1) for b in (0, 1)])
def test_casing_is_compared_with_the_vocabulary(is_cased: bool, lowers: bool) -> None:
    inputs = TextInputs(WordTokenizer(is_cased, lowers), 8)
    expected = [] if lowers != is_cased else ["casing"]
    assert find_fingerprints("bert", inputs, pad_token_id=0, vocab_size=1200) == expected


@pytest.mark.parametrize(("letters", "expected"), [("Яя", ["casing"]), ("字字", [])])
def test_casing_is_that_of_the_script(letters: str, expected: list[str]) -> None:
    """A script without upper case says nothing; of another the vocabulary says what is meant."""
    inputs = TextInputs(WordTokenizer(True, True, letters), 8)
    assert find_fingerprints("bert", inputs, pad_token_id=0, vocab_size=1200) == expected


def test_tokenizer_of_another_model_is_found_by_padding_and_size() -> None:
    inputs = TextInputs(WordTokenizer(False, True), 8)
    kinds = find_fingerprints("bert", inputs, pad_token_id=1, vocab_size=30_000)
    assert kinds == ["tokenizer", "tokenizer"]


# What the frozen source says.


@pytest.fixture(scope="module")
def clean(tiny_model: Callable[..., Path]) -> Any:
    """Return a function that finds the kinds of faults of a recipe of the tiny encoder."""

    def find(data: dict[str, Any]) -> dict[str, Finding]:
        recipe = Recipe.parse(
            {
                "source": {"model": str(tiny_model())},
                "data": {"max_length": 16, **data},
                "finetune": {"pooling": "mean"},
                "measure": {
                    "seeds": [0],
                    "arms": [],
                    "analyses": ["shift"] if "unlabeled" in data else [],
                },
            }
        )
        facts = add_source_faults(recipe, open_recipe(recipe), CheckFacts(warnings=[]))
        assert [finding.sentence for finding in facts.findings] == facts.warnings
        assert facts.examined and facts.examined.startswith("faults sought on all")
        return {finding.kind: finding for finding in facts.findings}

    return find


def test_a_clean_table_has_no_finding(clean: Any, tmp_path: Path) -> None:
    # A random encoder knows no token, and that is said.
    kinds = clean(write_tables(tmp_path, train=sentences(300)))
    assert set(kinds) <= {"tokenizer"}


@pytest.mark.parametrize(("cut", "is_read_on"), [(3, True), (16, False)])
def test_labels_are_judged_by_more_of_a_text_than_the_recipe_leaves(
    cut: int, is_read_on: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Of texts that were cut to three tokens right labels looked wrong."""
    tree: dict[str, Any] = {
        "source": {"model": str(tiny_model())},
        "data": write_tables(tmp_path, train=sentences(80)) | {"max_length": cut},
        "measure": {"seeds": [0], "arms": []},
    }
    recipe = Recipe.parse(tree)
    examined = examine_rows(recipe, open_recipe(recipe))
    assert examined is not None and isinstance(examined.context.inputs, TextInputs)
    most = min(READ_TOKENS, get_max_tokens(examined.context.source.config))
    assert examined.context.inputs.max_length == (most if is_read_on else cut)
    assert recipe.data.max_length == cut


@pytest.mark.parametrize("declared", [None, "tokenizer", "leakage"])
def test_wrong_labels_are_not_said_of_words_that_mean_nothing(
    declared: Any, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In upper case the rows of movies were unknown tokens, which the tables show by themselves,
    and their labels were called wrong."""
    wrong = Finding(kind="label errors", what="labels err", confidence="possible", fix="look")
    monkeypatch.setattr("hftl.pipeline.faults.SOURCE_CHECKS", (lambda examined: iter([wrong]),))
    tree: dict[str, Any] = {
        "source": {"model": str(tiny_model())},
        "data": write_tables(tmp_path, train=sentences(80)) | {"max_length": 16},
        "measure": {"seeds": [0], "arms": []},
    }
    recipe = Recipe.parse(tree)
    facts = CheckFacts(warnings=[])
    if declared is not None:
        facts.findings.append(Finding(kind=declared, what="it", confidence="likely", fix="mend it"))
    examined = add_source_faults(recipe, open_recipe(recipe), facts)
    is_misled = declared == "tokenizer"
    assert ("label errors" not in [one.kind for one in examined.findings]) == is_misled
    assert (examined.examined or "").endswith("are mended") == is_misled


def test_permuted_labels_of_a_table_are_found(clean: Any, tmp_path: Path) -> None:
    parts = split_rows(sentences(260))
    other = {"negative": "positive", "positive": "negative"}
    parts["test"] = [(text, other[label]) for text, label in parts["test"]]
    finding = clean(write_tables(tmp_path, **parts))["label map"]
    assert "test" in finding.what and finding.cost > 0.3 and finding.confidence == "likely"


def examine(flipped: float, scale: float) -> tuple[list[Finding], np.ndarray]:
    """Return the findings of rows that a probe reads so well, and which labels were flipped."""
    draw = np.random.default_rng(0)
    true = draw.integers(0, 3, 800)
    logits = scale * np.eye(3)[true] + draw.normal(size=(800, 3))
    wrong = draw.random(800) < flipped
    examined: Any = SimpleNamespace(
        logits=logits,
        targets=np.where(wrong, (true + 1) % 3, true),
        rows=[Row(("",), "", None, i, f"line {i}") for i in range(800)],
        context=SimpleNamespace(
            prepared=SimpleNamespace(task="classification", names=["a", "b", "c"])
        ),
    )
    return list(check_label_errors(examined)), wrong


HARD = pytest.mark.xfail(strict=True, reason="wrong labels among many hard rows are not seen")


@pytest.mark.parametrize("scale", [pytest.param(2.0, marks=HARD), 2.5, 3.0, 4.0])
def test_wrong_labels_are_found_and_hard_rows_are_none(scale: float) -> None:
    assert examine(0.0, scale)[0] == []
    (finding,), wrong = examine(0.12, scale)
    assert finding.kind == "label errors" and finding.confidence == "possible"
    lines = [int(place.split()[1].rstrip(":")) for place in finding.where]
    assert len(lines) == 3 and wrong[lines].sum() >= 2


def test_groups_across_splits_are_found_by_any_column(clean: Any, tmp_path: Path) -> None:
    draw = random.Random(1)
    rows: Cells = []
    for owner in range(60):
        style = draw.sample(FILLER, 4)
        for number in range(5):
            label = ("negative", "positive")[(owner + number) % 2]
            words = style + draw.sample(GOOD if label == "positive" else BAD, 2)
            draw.shuffle(words)
            rows.append((" ".join(words), label, f"{owner}_{number}"))
    finding = clean(write_tables(tmp_path, train=rows))["groups"]
    assert "of owner before its last number are in several splits" in finding.what
    assert "data.group" in finding.fix


def test_other_shares_in_unlabelled_rows_are_found(clean: Any, tmp_path: Path) -> None:
    rows = sentences(600)
    positive = [row for row in rows[300:] if row[1] == "positive"]
    tables = write_tables(tmp_path, train=rows[:300], unlabeled=positive)
    assert "data.unlabeled" in clean(tables)["label shift"].what


def test_confident_learning_finds_planted_errors() -> None:
    draw = np.random.default_rng(0)
    true = draw.integers(0, 3, 600)
    logits = 4 * np.eye(3)[true] + draw.normal(0, 1, (600, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    given = true.copy()
    wrong = draw.choice(600, 60, replace=False)
    given[wrong] = (given[wrong] + 1) % 3
    suspects = find_label_errors(probabilities, given)
    assert len(set(suspects) & set(wrong)) >= 54 and len(set(suspects) - set(wrong)) <= 6


def test_match_of_labels_undoes_a_permutation() -> None:
    draw = np.random.default_rng(0)
    true, permutation = draw.integers(0, 4, 300), np.array([2, 0, 3, 1])
    predicted = np.where(draw.random(300) < 0.2, draw.integers(0, 4, 300), true)
    assert match_labels(predicted, permutation[true], 4).tolist() == permutation.tolist()
    assert match_labels(np.zeros(4, int), np.zeros(4, int), 4).tolist() == [0, 1, 2, 3]


def has_exchange(predicted: np.ndarray, labels: np.ndarray, classes: int) -> bool:
    names = [str(number) for number in range(classes)]
    return find_exchange(predicted, labels, names, None) is not None


@pytest.mark.parametrize(("classes", "draws"), [(2, 100), (3, 100), (20, 100), (150, 30), (999, 1)])
def test_labels_are_exchanged_by_fault_alone(classes: int, draws: int) -> None:
    draw = np.random.default_rng(classes)
    for _ in range(draws):
        labels, others = draw.integers(0, classes, (2, 300))
        right = np.where(draw.random(300) < 0.7, labels, others)
        assert not has_exchange(others, labels, classes)
        assert not has_exchange(right, labels, classes)
        if classes < 999:  # Of three rows in ten classes nothing is known.
            assert has_exchange(right, (labels + 1) % classes, classes)


def test_two_exchanged_classes_are_named() -> None:
    draw = np.random.default_rng(0)
    labels, others = draw.integers(0, 6, (2, 300))
    predicted = np.where(draw.random(300) < 0.8, labels, others)
    written = np.array([1, 0, 2, 3, 4, 5])[labels]
    exchange = find_exchange(predicted, written, list("abcdef"), None)
    assert exchange is not None and exchange.names == "'b' for 'a', 'a' for 'b'"
    assert 0.45 < exchange.straight < 0.65 and exchange.mapped > 0.75
    assert np.isclose(exchange.gain, exchange.mapped - exchange.straight)


def test_shares_and_absent_classes_are_no_exchange() -> None:
    draw = np.random.default_rng(0)
    # Predictions that know nothing, of a table where the rare class is the frequent one.
    labels, predicted = draw.random((2, 400)) < np.array([[0.8], [0.2]])
    assert (predicted == labels).mean() < 0.4
    assert not has_exchange(predicted.astype(int), labels.astype(int), 2)
    # A table of one class, which is taken for another.
    predicted = np.where(draw.random(400) < 0.7, 0, 1)
    assert not has_exchange(predicted, np.ones(400, int), 2)


def test_documents_count_once_in_an_exchange() -> None:
    draw = np.random.default_rng(0)
    documents = np.repeat(np.arange(20).astype(str), 20)
    as_rows = 0
    for _ in range(60):
        predicted, labels = np.repeat(draw.integers(0, 2, (2, 20)), 20, axis=1)
        as_rows += has_exchange(predicted, labels, 2)
        assert find_exchange(predicted, labels, ["a", "b"], documents) is None
        assert find_exchange(1 - labels, labels, ["a", "b"], documents) is not None
    assert as_rows > 3


def test_chance_of_a_group_neighbour_counts_rows_of_the_same_label() -> None:
    draw = np.random.default_rng(0)
    labels, groups = draw.integers(0, 2, 300), [f"{i % 30}" for i in range(300)]
    rows = [Row((str(i),), str(labels[i]), None, i, "") for i in range(300)]
    hits, chance = count_group_neighbours(draw.normal(size=(300, 8)), groups, rows)
    assert abs(hits / 300 - chance) < 0.05 and 0.02 < chance < 0.05
    centres = draw.normal(size=(30, 8))
    near = np.array([centres[i % 30] for i in range(300)]) + 0.1 * draw.normal(size=(300, 8))
    assert count_group_neighbours(near, groups, rows)[0] > 250


@pytest.mark.parametrize("better", [False, True])
def test_another_reading_is_better_beyond_noise_or_not(better: bool) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 300)
    own, other = (
        score_rows(scale * np.eye(3)[labels] + draw.normal(size=(300, 3)), labels, 3, None)
        for scale in (1, 2 if better else 1)
    )
    p_value, cost = compare_readings(own, other)
    assert (p_value < 0.002 and cost > 0.1) if better else p_value > 0.01
    assert compare_readings(own, own) == (1.0, 0.0)


def test_exchanged_tokens_are_exchanged_one_to_one() -> None:
    tokenizer: Any = SimpleNamespace(all_special_ids=[0, 2, 3])
    rows: Any = [{"input_ids": [2, 7, 8, 9, 3]}, {"input_ids": [2, 9, 7, 3]}]
    shuffled = shuffle_ids(rows, TextInputs(tokenizer, 8), 1)
    mapping = dict(zip(rows[0]["input_ids"], shuffled[0]["input_ids"], strict=True))
    assert [mapping[i] for i in rows[1]["input_ids"]] == shuffled[1]["input_ids"]
    assert mapping[2] == 2 and mapping[3] == 3 and {mapping[i] for i in (7, 8, 9)} == {7, 8, 9}


def test_embeddings_of_a_words_forms_are_alike_under_the_models_ids() -> None:
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghij"), 6)) for _ in range(300)]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"{w}s" for w in words), "##x"])}
    pairs = list_stems(vocabulary)
    assert len(pairs) == 300 and all(b - a == 300 for a, b in pairs.tolist())
    stems = draw.normal(size=(300, 16))
    noise = draw.normal(size=(300, 16))
    weights = np.concatenate([stems, stems + noise, draw.normal(size=(1, 16))])
    assert compare_embeddings(weights, pairs).mean() > 0.5
    assert abs(compare_embeddings(draw.permutation(weights), pairs).mean()) < 0.1
    assert len(compare_embeddings(weights[:400], pairs)) == 100


def test_findings_keep_their_places_from_a_published_record() -> None:
    from support.records import make_record

    from hftl.measure.record import Record
    from hftl.publish.sanitize import sanitize_record

    tree = make_record()
    finding = Finding(
        kind="leakage", what="a", where=["t.csv line 3"], confidence="likely", evidence="b", fix="c"
    )
    tree["check"]["findings"] = [finding.to_dict()]
    published = sanitize_record(Record.parse(tree))
    assert published.check.findings[0].where == [] and "line 3" not in published.to_json()
    assert finding.sentence == "a (likely: b); c"
