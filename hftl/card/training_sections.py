"""What the card says of the data, the limits and the making of a model."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.card.metadata import base_of
from hftl.card.result_sections import retention_words, was_measured
from hftl.card.wording import called, code, kind_of, one_line
from hftl.data.splits import IN_ALL
from hftl.measure.verdict import interval_text

WORSE = 5
"""Classes that are named where the baseline is better."""


def data_sentence(record: dict[str, Any]) -> str:
    """What it was trained, chosen and measured on."""
    data = record["data"]
    splits = data["splits"]
    shots = record["recipe"]["data"]["shots"]
    noun = "words" if kind_of(record) == "words" else "rows"
    learnt = f"{record['data']['labels_read']['train_per_seed']:,} labelled {noun} a seed"
    if shots:
        unit = "in all" if data["task"] in IN_ALL else "a class"
        rows = "rows " if noun == "words" else ""
        learnt += f" ({shots} {rows}{unit}, drawn by the seed)"
    return (
        f"{code(data['name'])}: trained on {learnt}; {_chosen(record)} chosen on "
        f"{splits['validation']:,} validation rows, and every figure above is on "
        f"{splits['test']:,} test rows that nothing was chosen by{_but_the_baseline(record)}. "
        f"{data['labels_read']['total']:,} labels were read in all."
    )


def _but_the_baseline(record: dict[str, Any]) -> str:
    """That test decides which of several baselines the gain is over; nothing with one."""
    names = list((record["transfer_gain"] or {}).get("baselines", ()))
    if len(names) < 2:
        return ""
    return f", but that the gain is the lesser of those over {' and '.join(names)}"


def _chosen(record: dict[str, Any]) -> str:
    """What validation decided, with its verb."""
    chosen = [] if record["recipe"]["finetune"]["strategy"] == "head" else ["the best epoch"]
    if any(stage["guard"]["kind"] == "probe" for stage in stages_of(record)):
        chosen.append("the adaptation's weights")
    chosen.append("the published seed")
    if len(chosen) == 1:
        return f"{chosen[0]} was"
    return f"{', '.join(chosen[:-1])} and {chosen[-1]} were"


def data_lines(record: dict[str, Any]) -> list[str]:
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
    if kind_of(record) == "image":
        lines.append("transparent pictures were laid on white, and turned as their EXIF data say")
    if record["recipe"]["data"]["group"]:
        lines.append("rows of one group never stand in two splits, and count as one unit")
    return lines


def limits(record: dict[str, Any]) -> list[str]:
    """Where it is worse, and what was not measured."""
    lines = []
    for row in record["ladder"]:
        gain = row["gain_of_own"]
        if gain is not None and gain["value"] < 0:
            lines.append(f"It is behind {called(row['arm'], record)}: {interval_text(gain)}.")
    lines += _worse_classes(record.get("classes"))
    lines += _scratch_search(record["scratch_search"])
    lines.append(
        "Measured on rows of the same origin as its training rows; other domains were not measured."
    )
    lines.append(
        f"The weights are those of seed {record['published_seed']}, the best on validation; the "
        "figures are over all seeds."
    )
    if not was_measured(record):
        lines.append("Forgetting of what the source model knew was not measured.")
    return lines


def search_words(search: dict[str, Any]) -> str:
    """Say how scratch's learning rate was chosen, in a few words."""
    words = f"learning rate {search['learning_rate']:g} is best on validation"
    # Records of before the search went on tell of none.
    if beyond := search.get("beyond"):
        rates = " and ".join(f"{rate:g}" for rate in beyond)
        verb = "was" if len(beyond) == 1 else "were"
        words += f"; as the best of those given is at their edge, {rates} {verb} tried, too"
    return words + ("; it is at the edge of those tried" if search.get("at_edge") else "")


def _scratch_search(search: dict[str, Any] | None) -> list[str]:
    """Say where scratch's best rate was at the edge of those given, so that it may lie beyond."""
    if search is None or not (search.get("beyond") or search.get("at_edge")):
        return []
    unsure = ", so that scratch may be better than it is here" if search.get("at_edge") else ""
    return [f"Of scratch, {search_words(search)}{unsure}."]


def _worse_classes(found: dict[str, Any] | None) -> list[str]:
    """The classes that the baseline tells apart better, the worst first."""
    if found is None:
        return []
    behind = [row for row in found["rows"] if row["own"] < row["baseline"]]
    if not behind:
        return []
    behind.sort(key=lambda row: row["own"] - row["baseline"])
    named = ", ".join(
        f"{code(row['label'])} (F1 {row['own']:.3f} against {row['baseline']:.3f})"
        for row in behind[:WORSE]
    )
    most = ", most of all" if len(behind) > WORSE else ":"
    return [
        f"Class by class it is behind {found['baseline']} on {len(behind)} of "
        f"{len(found['rows'])}{most} {named}; no interval."
    ]


def stages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The adaptations that came before; none without."""
    return record["adapt"]["stages"] if record["adapt"] else []


def base_sentence(record: dict[str, Any]) -> str:
    """What it goes on or comes from, and which weights exactly; nothing where it has no id."""
    base, revision = base_of(record)
    if base is None:
        return ""
    ours = (record["adapt"] or {}).get("base")
    weights = (ours or record["source"])["weights_sha256"]
    pinned = f" at commit {code(revision)}" if revision else ""
    return f"Base: {code(base)}{pinned}; the hash of its weights begins with `{weights[:16]}`."


def training_sentence(record: dict[str, Any]) -> str:
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
        last = _epochs(epochs)
        if finetune["strategy"] == "gradual":
            last = f"{_epochs(finetune['gradual']['epochs'])} a phase"
        words.append(f"learning rate {rate:g}, {last}, the best on validation kept")
        if finetune["layer_decay"]:
            words.append(f"each block's rate {finetune['layer_decay']:g} of that of the one above")
        words += retention_words(record)
    return f"{'; '.join(words)}; {seeds} seed{'s' if seeds > 1 else ''}."


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def environment(found: dict[str, Any]) -> list[tuple[str, str]]:
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
