"""Examples of what the model gets wrong, for the report, and for the card where they may go out."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.card.plain import code, one_line

if TYPE_CHECKING:
    # Named only: with it torch would come along, and a push needs none.
    from hftl.measure.mistakes import Mistake

AROUND = 8
"""Words shown on either side of one that was tagged wrong."""
LONGEST = 200
"""Characters of a text that a card shows."""
SIDE = 96
"""Of a picture, in pixels."""
Picture = Callable[[str], np.ndarray]
"""The (3, height, width) uint8 pixels of the picture of a hash."""


def told_examples(
    mistakes: "list[Mistake]", picture: Picture | None, folder: Path
) -> list[dict[str, Any]]:
    """Mistakes as the published record tells them; pictures are written to the folder's assets.

    Args:
        mistakes: the surest first.
        picture: the pixels of what was read, where that is pictures.
        folder: what is published.
    """
    found = []
    for number, mistake in enumerate(mistakes):
        told: dict[str, Any] = {"true": mistake.label, "said": mistake.prediction}
        told["surety"] = mistake.surety
        if picture is not None:
            told["picture"] = f"assets/mistake-{number + 1:02d}.png"
            (folder / "assets").mkdir(exist_ok=True)
            (folder / told["picture"]).write_bytes(thumbnail(picture(mistake.content[0])))
        elif mistake.word is not None:
            told["words"] = in_context(mistake.content, mistake.word)
        else:
            told["texts"] = mistake.content
        found.append(told)
    return found


def widget_examples(
    samples: list[tuple[str, str, dict[str, float]]], most: int = 5
) -> list[dict[str, Any]]:
    """Return the Hub's widget examples with outputs, which show without a provider that serves.

    Args:
        samples: text, true label, and the probability of every class.
        most: classes that are shown of each, the likeliest first.
    """
    return [
        {
            "text": text,
            "example_title": f"true label: {one_line(label)}",
            "output": [
                {"label": one_line(name), "score": round(chances[name], 4)}
                for name in sorted(chances, key=lambda name: -chances[name])[:most]
            ],
        }
        for text, label, chances in samples
        if one_line(text, 2 * LONGEST) == text
    ]


def example_rows(record: dict[str, Any]) -> list[list[str]]:
    """The card's table of them, a header first; empty where none may go out."""
    examples = record.get("examples")
    if not examples:
        return []
    target = record["data"]["task"] == "regression"
    rows = [["input", "true", "said", "off by" if target else "probability"]]
    for told in examples:
        if "picture" in told:
            shown = f"![]({told['picture']})"
        elif "words" in told:
            before, word, after = (code(part, LONGEST) if part else "" for part in told["words"])
            shown = f"{before} **{word}** {after}"
        else:
            shown = " / ".join(code(text, LONGEST) for text in told["texts"])
        rows.append([shown, code(told["true"]), code(told["said"]), f"{told['surety']:.3f}"])
    return rows


def in_context(words: tuple[str, ...], place: int) -> tuple[str, str, str]:
    """What stands before a word, the word, and what stands after it."""
    before, after = words[max(0, place - AROUND) : place], words[place + 1 : place + 1 + AROUND]
    return " ".join(before), words[place], " ".join(after)


def thumbnail(pixels: np.ndarray) -> bytes:
    """A small PNG of (3, height, width) uint8 pixels."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(np.moveaxis(np.asarray(pixels), 0, -1)))
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
