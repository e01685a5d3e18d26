"""What the card says of the data, the limits and the making of a model."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.card.metadata import find_public_base
from hftl.card.result_sections import describe_retention, has_forgetting
from hftl.card.wording import describe_arm, format_code, input_kind, to_one_line
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS
from hftl.measure.verdict import format_gain

MAX_WORSE_CLASSES = 5
"""Classes that are named where the baseline is better."""


def format_data_sentence(record: dict[str, Any]) -> str:
    """What it was trained, chosen and measured on."""
    data = record["data"]
    splits = data["splits"]
    shots = record["recipe"]["data"]["shots"]
    noun = "words" if input_kind(record) == "words" else "rows"
    learnt = f"{record['data']['labels_read']['train_per_seed']:,} labelled {noun} a seed"
    if shots:
        unit = "in all" if data["task"] in TASKS_WITHOUT_CLASS_SHOTS else "a class"
        rows = "rows " if noun == "words" else ""
        learnt += f" ({shots} {rows}{unit}, drawn by the seed)"
    return (
        f"{format_code(data['name'])}: trained on {learnt}; {_format_validation_choices(record)} chosen on "
        f"{splits['validation']:,} validation rows, and every figure above is on "
        f"{splits['test']:,} test rows that nothing was chosen by{_format_baseline_choice(record)}. "
        f"{data['labels_read']['total']:,} labels were read in all."
    )


def _format_baseline_choice(record: dict[str, Any]) -> str:
    """That test decides which of several baselines the gain is over; nothing with one."""
    names = list((record["transfer_gain"] or {}).get("baselines", ()))
    if len(names) < 2:
        return ""
    return f", but that the gain is the lesser of those over {' and '.join(names)}"


def _format_validation_choices(record: dict[str, Any]) -> str:
    """What validation decided, with its verb."""
    chosen = [] if record["recipe"]["finetune"]["strategy"] == "head" else ["the best epoch"]
    if any(stage["guard"]["kind"] == "probe" for stage in list_stages(record)):
        chosen.append("the adaptation's weights")
    chosen.append("the published seed")
    if len(chosen) == 1:
        return f"{chosen[0]} was"
    return f"{', '.join(chosen[:-1])} and {chosen[-1]} were"


def format_data_lines(record: dict[str, Any]) -> list[str]:
    """What happened to the rows before anything was learnt."""
    data = record["data"]
    lines = [f"{data['rows_read']:,} rows were read"]
    for key, told in (
        ("duplicates", "duplicates were dropped (the same but for case, form and white space)"),
        ("leaked", "of these stood in train and in another table"),
        ("conflicting", "rows were dropped because the same input had two labels"),
        ("bad_rows", "bad rows were skipped"),
    ):
        if data[key]:
            lines.append(f"{data[key]:,} {told}")
    if data.get("contradictory_inputs"):
        share = data["contradictory_inputs"] / data["distinct_inputs"]
        lines.append(
            f"so {data['contradictory_inputs']:,} of {data['distinct_inputs']:,} distinct inputs "
            f"({share:.1%}) could not be measured; the figures are of the others"
        )
    if data.get("near_pictures"):
        lines.append(
            f"{data['near_pictures']:,} pictures of validation and test are near copies of one in "
            "another split, and count all the same"
        )
    if data.get("tag_scheme"):
        lines.append(f"entities are read from {data['tag_scheme']['name']} tags")
    if input_kind(record) == "image":
        lines.append("transparent pictures were laid on white, and turned as their EXIF data say")
    if record["recipe"]["data"]["group"]:
        lines.append("rows of one group never stand in two splits, and count as one unit")
    return lines


def format_limits(record: dict[str, Any]) -> list[str]:
    """Where it is worse, and what was not measured."""
    lines = []
    for row in record["ladder"]:
        gain = row["gain_of_own"]
        if gain is not None and gain["value"] < 0:
            lines.append(f"It is behind {describe_arm(row['arm'], record)}: {format_gain(gain)}.")
    lines += _format_worse_classes(record.get("classes"))
    lines += _format_scratch_limits(record["scratch_search"])
    lines.append(
        "Measured on rows of the same origin as its training rows; other domains were not measured."
    )
    lines.append(
        f"The weights are those of seed {record['published_seed']}, the best on validation; the "
        "figures are over all seeds."
    )
    if not has_forgetting(record):
        lines.append("Forgetting of what the source model knew was not measured.")
    return lines


def describe_scratch_search(search: dict[str, Any]) -> str:
    """Say how scratch's learning rate was chosen, in a few words."""
    words = f"learning rate {search['learning_rate']:g} is best on validation"
    # Records of before the search went on tell of none.
    if beyond := search.get("beyond"):
        rates = " and ".join(f"{rate:g}" for rate in beyond)
        verb = "was" if len(beyond) == 1 else "were"
        words += f"; as the best of those given is at their edge, {rates} {verb} tried, too"
    return words + ("; it is at the edge of those tried" if search.get("at_edge") else "")


def _format_scratch_limits(search: dict[str, Any] | None) -> list[str]:
    """Say where scratch's best rate was at the edge of those given, so that it may lie beyond."""
    if search is None or not (search.get("beyond") or search.get("at_edge")):
        return []
    unsure = ", so that scratch may be better than it is here" if search.get("at_edge") else ""
    return [f"Of scratch, {describe_scratch_search(search)}{unsure}."]


def _format_worse_classes(found: dict[str, Any] | None) -> list[str]:
    """The classes that the baseline tells apart better, the worst first."""
    if found is None:
        return []
    behind = [row for row in found["rows"] if row["own"] < row["baseline"]]
    if not behind:
        return []
    behind.sort(key=lambda row: row["own"] - row["baseline"])
    named = ", ".join(
        f"{format_code(row['label'])} (F1 {row['own']:.3f} against {row['baseline']:.3f})"
        for row in behind[:MAX_WORSE_CLASSES]
    )
    most = ", most of all" if len(behind) > MAX_WORSE_CLASSES else ":"
    return [
        f"Class by class it is behind {found['baseline']} on {len(behind)} of "
        f"{len(found['rows'])}{most} {named}; no interval."
    ]


def list_stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The adaptations that came before; none without."""
    return record["adapt"]["stages"] if record["adapt"] else []


def format_base_sentence(record: dict[str, Any]) -> str:
    """What it goes on or comes from, and which weights exactly; nothing where it has no id."""
    base, revision = find_public_base(record)
    if base is None:
        return ""
    ours = (record["adapt"] or {}).get("base")
    weights = (ours or record["source"])["weights_sha256"]
    pinned = f" at commit {format_code(revision)}" if revision else ""
    return (
        f"Base: {format_code(base)}{pinned}; the hash of its weights begins with `{weights[:16]}`."
    )


def format_training_sentence(record: dict[str, Any]) -> str:
    """How it was trained."""
    finetune = record["recipe"]["finetune"]
    seeds = len(record["recipe"]["measure"]["seeds"])
    words = [f"Strategy `{finetune['strategy']}`, pooling `{finetune['pooling']}`"]
    if finetune["strategy"] == "head":
        words.append("solved on features of the frozen encoder, its penalty by cross-validation")
    else:
        started = "the linear probe" if finetune["head_init"] == "probe" else "random weights"
        words.append(f"the head started from {started}")
        rate, epochs = (finetune["training"][k] for k in ("learning_rate", "num_train_epochs"))
        last = _format_epochs(epochs)
        if finetune["strategy"] == "gradual":
            last = f"{_format_epochs(finetune['gradual']['epochs'])} a phase"
        words.append(f"learning rate {rate:g}, {last}, the best on validation kept")
        if finetune["layer_decay"]:
            words.append(f"each block's rate {finetune['layer_decay']:g} of that of the one above")
        words += describe_retention(record)
    return f"{'; '.join(words)}; {seeds} seed{'s' if seeds > 1 else ''}."


def _format_epochs(number: float) -> str:
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def format_environment(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Hardware and versions, a name and a value each."""
    plain = [
        (k, str(v)) for k, v in found.items() if k not in ("packages", "energy_kwh", "co2_grams")
    ]
    if "energy_kwh" in found:
        told = f"{found['energy_kwh']:.3g} kWh for all arms and seeds, as codecarbon estimates it"
        plain.append(("energy", told))
    if "co2_grams" in found:
        plain.append(("emissions", f"{found['co2_grams']:.3g} g of CO2 equivalents"))
    return plain + [(name, version) for name, version in found["packages"].items()]


# Examples of what the model gets wrong, for the report, and for the card where they may go out.


if TYPE_CHECKING:
    # Named only: with it torch would come along, and a push needs none.
    from hftl.measure.error_analysis import Mistake

CONTEXT_WORDS = 8
"""Words shown on either side of one that was tagged wrong."""
MAX_EXAMPLE_CHARACTERS = 200
"""Characters of a text that a card shows."""
THUMBNAIL_PIXELS = 96
"""Of a picture, in pixels."""
ImageLookup = Callable[[str], np.ndarray]
"""The (3, height, width) uint8 pixels of the picture of a hash."""


def build_examples(
    mistakes: "list[Mistake]", picture: ImageLookup | None, folder: Path
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
        told["surety"] = mistake.confidence
        if picture is not None:
            told["picture"] = f"assets/mistake-{number + 1:02d}.png"
            (folder / "assets").mkdir(exist_ok=True)
            (folder / told["picture"]).write_bytes(make_thumbnail(picture(mistake.content[0])))
        elif mistake.word is not None:
            told["words"] = split_context(mistake.content, mistake.word)
        else:
            told["texts"] = mistake.content
        found.append(told)
    return found


def build_widget_examples(
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
            "example_title": f"true label: {to_one_line(label)}",
            "output": [
                {"label": to_one_line(name), "score": round(chances[name], 4)}
                for name in sorted(chances, key=lambda name: -chances[name])[:most]
            ],
        }
        for text, label, chances in samples
        if to_one_line(text, 2 * MAX_EXAMPLE_CHARACTERS) == text
    ]


def build_example_rows(record: dict[str, Any]) -> list[list[str]]:
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
            before, word, after = (
                format_code(part, MAX_EXAMPLE_CHARACTERS) if part else "" for part in told["words"]
            )
            shown = f"{before} **{word}** {after}"
        else:
            shown = " / ".join(format_code(text, MAX_EXAMPLE_CHARACTERS) for text in told["texts"])
        rows.append(
            [shown, format_code(told["true"]), format_code(told["said"]), f"{told['surety']:.3f}"]
        )
    return rows


def split_context(words: tuple[str, ...], place: int) -> tuple[str, str, str]:
    """What stands before a word, the word, and what stands after it."""
    before, after = (
        words[max(0, place - CONTEXT_WORDS) : place],
        words[place + 1 : place + 1 + CONTEXT_WORDS],
    )
    return " ".join(before), words[place], " ".join(after)


def make_thumbnail(pixels: np.ndarray) -> bytes:
    """A small PNG of (3, height, width) uint8 pixels."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(np.moveaxis(np.asarray(pixels), 0, -1)))
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
