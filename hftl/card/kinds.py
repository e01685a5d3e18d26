"""What the card says differently for texts, words and pictures."""

from typing import Any

from hftl.card.plain import inert

CLASSICAL = {
    "text": "TF-IDF with a linear model",
    "words": "the words' spelling with a linear model",
    "image": "downsampled pixels with a linear model",
}
WHAT = {
    "scratch": "the same architecture trained from scratch",
    "head": "the frozen encoder with a linear head",
    "majority": "always the most frequent answer",
    "source": "the same without adaptation",
}
DOES = {"text": "sorts text into", "words": "tags words as", "image": "sorts pictures into"}


def kind_of(record: dict[str, Any]) -> str:
    """What a model of this record takes: `text`, `words` or `image`."""
    if record["data"]["task"] == "token-classification":
        return "words"
    return record["data"].get("modality", "text")


def called(arm: str, record: dict[str, Any]) -> str:
    """An arm's name, and what it is where that is known."""
    known = WHAT | {"classical": CLASSICAL[kind_of(record)]}
    return f"{arm} ({known[arm]})" if arm in known else inert(arm)


def is_pooled(record: dict[str, Any]) -> bool:
    """Return whether the head is hftl's own, above `mean` or `cls` pooling; stock classes do not
    answer with it, so that only the encoder's features load without hftl."""
    return record["recipe"]["finetune"]["pooling"] != "native"


def pipeline_tag(record: dict[str, Any]) -> str:
    """Return the hub's name for the task."""
    start = "token" if kind_of(record) == "words" else record["data"].get("modality", "text")
    return f"{start}-classification"


def example_of(record: dict[str, Any]) -> str:
    """One input, as `predict` takes it, in source code."""
    columns = record["recipe"]["data"]["train"]["text"]
    if kind_of(record) == "text" and isinstance(columns, list) and len(columns) == 2:
        return '("A first text.", "A second text.")'
    return {
        "text": '"A text of your own."',
        "words": '["Each", "word", "apart"]',
        "image": '"a_picture.png"',
    }[kind_of(record)]
