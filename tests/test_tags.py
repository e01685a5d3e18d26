"""Recognize schemes of tags, against seqeval's strict mode and by brute force."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from seqeval import metrics as seq
from seqeval import scheme as schemes

from hftl.data.labels import decode_logits, encode_for_metrics, recognize_tag_scheme
from hftl.errors import DataError
from hftl.measure.error_analysis import compute_class_gains, compute_entity_scores
from hftl.measure.gain import SplitPredictions
from hftl.measure.metrics import METRICS, extract_entities

TASK = "token-classification"
WRITERS: dict[str, Any] = {
    "IOB2": lambda n, before: ["B"] + ["I"] * (n - 1),
    "IOB1": lambda n, before: ["B" if before else "I"] + ["I"] * (n - 1),
    "IOE2": lambda n, before: ["I"] * (n - 1) + ["E"],
    "IOBES": lambda n, before: ["S"] if n == 1 else ["B"] + ["I"] * (n - 2) + ["E"],
    "BILOU": lambda n, before: ["U"] if n == 1 else ["B"] + ["I"] * (n - 2) + ["L"],
}
"""Markers of an entity of n words; `before` is true where one of its type is right before it."""


def spans_drawn(draw: random.Random, length: int) -> list[tuple[str, int, int]]:
    """Draw entities, some beside each other, in a row of this length."""
    spans, word = [], 0
    while word < length:
        size = min(draw.randint(1, 3), length - word)
        if draw.random() < 0.6:
            spans.append((draw.choice(["PER", "LOC-A"]), word, word + size - 1))
        word += size
    return spans


def written(spans: list[tuple[str, int, int]], length: int, scheme: str) -> list[str]:
    """Return the tags of a row in a scheme."""
    tags, before = ["O"] * length, ("", 0, -2)
    for span in spans:
        kind, first, last = span
        beside = before[0] == kind and before[2] == first - 1
        markers = WRITERS[scheme](last - first + 1, beside)
        tags[first : last + 1] = [f"{marker}-{kind}" for marker in markers]
        before = span
    return tags


def drawn_rows(scheme: str, seed: int, rows: int = 60) -> tuple[list[list[str]], list[list[str]]]:
    """Draw well-formed labels and predictions, a third of whose rows are right."""
    draw = random.Random(seed)
    labels, predictions = [], []
    for _ in range(rows):
        length = draw.randint(1, 9)
        spans = spans_drawn(draw, length)
        guess = spans if draw.random() < 0.3 else spans_drawn(draw, length)
        labels.append(written(spans, length, scheme))
        predictions.append(written(guess, length, scheme))
    return labels, predictions


def encode(labels: Any, predictions: Any, names: list[str]) -> list[Any]:
    """Return labels and predictions as the metrics take them."""
    return [
        encode_for_metrics([tuple(row) for row in rows], TASK, names)
        for rows in (labels, predictions)
    ]


def score(labels: Any, predictions: Any, names: list[str]) -> dict[str, float]:
    """Return every metric of tags in this scheme."""
    pair = encode(labels, predictions, names)
    return {name: metric.score(*pair) for name, metric in METRICS[TASK].items()}


def names_in(*parts: list[list[str]]) -> list[str]:
    return sorted({tag for rows in parts for row in rows for tag in row})


SPELT = {
    "usual": lambda tag: tag,
    "lower-case o": lambda tag: "o" if tag == "O" else tag,
    "suffixed": lambda tag: "-".join([tag[2:], tag[0]]) if tag != "O" else tag,
    "underscore": lambda tag: tag.replace("-", "_", 1),
    "lower case": lambda tag: tag[0].lower() + tag[1:],
}


@pytest.mark.parametrize("spelling", SPELT)
@pytest.mark.parametrize("scheme", WRITERS)
@pytest.mark.parametrize("seed", range(3))
def test_entities_are_those_of_seqeval_in_strict_mode(
    scheme: str, spelling: str, seed: int
) -> None:
    labels, predictions = drawn_rows(scheme, seed)
    how = {"mode": "strict", "scheme": getattr(schemes, scheme), "zero_division": 0}
    oracles = (seq.f1_score, seq.precision_score, seq.recall_score)
    expected = [oracle(labels, predictions, **how) for oracle in oracles]
    assert 0.2 < expected[0] < 0.9
    spell = SPELT[spelling]
    labels, predictions = ([[spell(t) for t in row] for row in rows]
                           for rows in (labels, predictions))  # fmt: skip
    scores = score(labels, predictions, names_in(labels, predictions))
    assert [scores[name] for name in ("f1", "precision", "recall")] == pytest.approx(expected)


@pytest.mark.parametrize("outside", ["O", "o"])
@pytest.mark.parametrize("seed", range(5))
def test_bare_names_are_runs_of_one_tag(seed: int, outside: str) -> None:
    draw = random.Random(seed)
    kinds = ["ORG", "PER", "OTHER", "B-cell", outside]
    labels = [[draw.choice(kinds) for _ in range(draw.randint(1, 9))] for _ in range(60)]
    predictions = [[tag if draw.random() < 0.8 else draw.choice(kinds) for tag in row]
                   for row in labels]  # fmt: skip

    def runs(rows: list[list[str]]) -> set[tuple[int, str, int, int]]:
        actual = set()
        for number, row in enumerate(rows):
            place = 0
            for tag, run in itertools.groupby(row):
                size = len(list(run))
                if tag != outside:
                    actual.add((number, tag, place, place + size - 1))
                place += size
        return actual

    held, guessed = runs(labels), runs(predictions)
    actual = score(labels, predictions, kinds)
    assert recognize_tag_scheme(tuple(kinds)).name == "IO"
    assert actual["precision"] == pytest.approx(len(held & guessed) / len(guessed))
    assert actual["recall"] == pytest.approx(len(held & guessed) / len(held))
    right = [a == b for r, p in zip(labels, predictions, strict=True)
             for a, b in zip(r, p, strict=True)]  # fmt: skip
    assert actual["accuracy"] == pytest.approx(np.mean(right))


def test_a_type_that_begins_with_o_is_no_outside() -> None:
    """A model that misses every ORG had f1 1.0."""
    labels, predictions = [["ORG", "O", "PER"]], [["O", "O", "PER"]]
    assert score(labels, predictions, ["O", "ORG", "PER"])["recall"] == 0.5


@pytest.mark.parametrize(
    ("names", "scheme", "outside"),
    [
        ("O B-X I-X", "BIO", "O"), ("O I-X I-Y", "BIO", "O"), ("O I-X E-X", "IOE", "O"),
        ("O B-X I-X E-X S-X", "BIOES", "O"), ("O S-X", "BIOES", "O"),
        ("O B-X I-X L-X U-X", "BILOU", "O"), ("O B-X M-X E-X S-X", "BMES", "O"),
        ("O B-X M-X E-X W-X", "BMEWO", "O"), ("o X-B X-I", "BIO", "o"), ("O B I", "BIO", "O"),
        ("B_X I_X O", "BIO", "O"), ("ORG PER O", "IO", "O"), ("NOUN VERB ADJ", "IO", None),
        ("B-cell T-cell DNA O", "IO", "O"), ("E-mail S-Bahn O", "IO", "O"),
        ("B_DATE E_TIME O", "IO", "O"), ("A B C D E O", "IO", "O"),
    ],
)  # fmt: skip
def test_a_scheme_is_recognized(names: str, scheme: str, outside: str | None) -> None:
    for order in (names.split(), names.split()[::-1]):
        recognized = recognize_tag_scheme(tuple(order))
        assert (recognized.name, recognized.outside) == (scheme, outside)
        tags = [name for name in order if name != outside]
        assert all(extract_entities((recognized.standard[tag],)) for tag in tags)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("0 1 2", r"tags are ids \(0, 1, 2\).*Write the tags' names"),
        ("-100 3 B-PER", r"tags are ids \(-100, 3\)"), ("0 ORG PER", r"tags are ids \(0\)"),
        ("LABEL_0 LABEL_1", r"tags are ids \(LABEL_0, LABEL_1\)"),
        ("B-PER I-PER ORG O", r"marker \(B-PER\), and others have none \(ORG\)"),
        ("B-PER I-PER ORG-B ORG-I O", r"marker \(B-PER\), .* none \(ORG-B\)"),
        ("B-X I-X E-X L-X O", r"markers B, E, I, L, which no one scheme has"),
    ],
)  # fmt: skip
def test_tags_of_no_scheme_are_refused(names: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recognize_tag_scheme(tuple(names.split()))


def test_a_word_that_was_cut_off_is_outside_however_that_is_written() -> None:
    logits = np.array([[9.0, 0, 0], [np.nan] * 3])
    labels, _ = decode_logits(logits, TASK, ["B-X", "I-X", "o"], [2])
    assert labels == [("B-X", "o")]


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_entities_are_those_of_seqeval(seed: int) -> None:
    labels, predictions = drawn_rows("BILOU", seed)
    names = names_in(labels, predictions)
    pair = encode(labels, predictions, names)
    types = recognize_tag_scheme(tuple(names)).types
    expected = seq.classification_report(
        labels, predictions, mode="strict", scheme=schemes.BILOU, output_dict=True, zero_division=0
    )
    rows = compute_entity_scores(*pair, types)
    for row in rows:
        oracle = expected[row.label]
        assert [
            getattr(row, key) for key in ("precision", "recall", "f1", "rows")
        ] == pytest.approx([oracle[key] for key in ("precision", "recall", "f1-score", "support")])
    both = {"own": np.stack([pair[1]]), "other": np.stack([pair[0]])}
    gains = compute_class_gains(
        SplitPredictions(pair[0], np.arange(60), both), "own", "other", types
    )
    assert gains is not None and [row.label for row in gains.rows] == ["LOC-A", "PER"]
    assert [row.own for row in gains.rows] == [row.f1 for row in rows]
    assert [row.baseline for row in gains.rows] == [1.0, 1.0]
