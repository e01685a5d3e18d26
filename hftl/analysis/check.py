"""Warn of doubtful inputs and settings before anything trains."""

from collections import Counter
from typing import Any

from hftl.config.finetune import Finetune
from hftl.data.image_inputs import ImageInputs
from hftl.data.images import describe_narrow_images
from hftl.data.normalization import find_doubtful_names
from hftl.data.prepare import PreparedData, suggest_multi_label
from hftl.data.text_inputs import TextInputs
from hftl.models.architectures import get_max_tokens
from hftl.models.source import SourceModel

SAMPLED_ROWS = 2000
"""Training rows that lengths are measured on, at most."""
MAX_TRUNCATED = 0.1
MAX_UNKNOWN = 0.02
MAX_ENLARGED = 0.5
MAX_ELONGATED = 0.1
MIN_TEST_ROWS = 200
MAX_IMBALANCE = 10
MAX_LEARNING_RATE = 2e-4
"""Above this, full and partial fine-tuning of a pretrained encoder mostly diverges."""


def check_inputs(
    source: SourceModel,
    inputs: TextInputs | ImageInputs,
    prepared: PreparedData,
    max_length: int,
    arms: list[Finetune],
) -> dict[str, Any]:
    """Return facts about the inputs, and `warnings`, each a sentence with what to do."""
    sizes = inputs.summarize(prepared.rows["train"][:SAMPLED_ROWS])
    if prepared.modality == "image":
        warnings = _list_image_warnings(sizes)
    else:
        warnings = _list_length_warnings(sizes, max_length, get_max_tokens(source.config))
    warnings += [*_list_label_warnings(prepared), *_list_learning_rate_warnings(arms)]
    if source.public_id is None:
        warnings.append(
            "the source model has no public id, so the adapter could not be pushed; set "
            "source.published_as"
        )
    facts = prepared.facts
    if facts.leaked:
        warnings.append(
            f"{facts.leaked} inputs of train are also in validation or test; they were "
            "dropped from train"
        )
    # A run folder may hold data that an older version prepared without these counts.
    if facts.contradictory_inputs:
        share = facts.contradictory_inputs / facts.distinct_inputs
        warnings.append(
            f"{facts.contradictory_inputs} of {facts.distinct_inputs} distinct inputs "
            f"({share:.0%}) have differing labels and are dropped ({facts.conflicting} rows): "
            "what is measured is the others, which may be the easier ones; correct "
            f"the labels{suggest_multi_label(prepared.task)}"
        )
    if facts.near_pictures:
        warnings.append(
            f"{facts.near_pictures} pictures of validation and test are near copies "
            "(re-encoded or resized) of one in another split; name what they share in data.group, "
            "or remove them"
        )
    if facts.narrow_pictures:
        warnings.append(describe_narrow_images(facts.narrow_pictures))
    if facts.bad_rows:
        warnings.append(f"{facts.bad_rows} bad rows were skipped; the record lists them")
    # Several arms may give the same warning.
    return {**sizes, "warnings": list(dict.fromkeys(warnings))}


def _list_image_warnings(facts: dict[str, float]) -> list[str]:
    warnings = []
    if facts["enlarged"] > MAX_ENLARGED:
        warnings.append(
            f"{facts['enlarged']:.0%} of the pictures are smaller than {facts['image_size']:.0f} "
            "pixels and are enlarged; a smaller data.image_size would be faster"
        )
    if facts["elongated"] > MAX_ELONGATED:
        warnings.append(
            f"{facts['elongated']:.0%} of the pictures are more than twice as long as wide; the "
            "source's processor crops or squeezes them"
        )
    return warnings


def _list_length_warnings(lengths: dict[str, float], max_length: int, limit: int) -> list[str]:
    warnings = []
    if max_length > limit:
        warnings.append(
            f"data.max_length={max_length} is above the source model's positions; texts are cut at "
            f"{limit} tokens"
        )
    if lengths["truncated"] > MAX_TRUNCATED:
        warnings.append(
            f"{lengths['truncated']:.0%} of the texts are longer than data.max_length="
            f"{max_length} tokens and are cut; the source takes up to {limit}"
        )
    if lengths["unknown_tokens"] > MAX_UNKNOWN:
        warnings.append(
            f"{lengths['unknown_tokens']:.1%} of the tokens are unknown to the tokenizer; does it "
            "fit the language and the casing?"
        )
    return warnings


def _list_label_warnings(prepared: PreparedData) -> list[str]:
    warnings = []
    test = prepared.rows["test"]
    if len(test) < MIN_TEST_ROWS:
        warnings.append(f"{len(test)} test rows give a wide interval; a few hundred are better")
    counts = (prepared.facts.label_counts or {}).get("train", {})
    every = Counter[str]()
    for of_split in (prepared.facts.label_counts or {}).values():
        every.update(of_split)
    warnings += find_doubtful_names(every)
    if prepared.task == "classification" and max(counts.values()) > MAX_IMBALANCE * min(
        counts.values()
    ):
        rare = min(counts, key=lambda name: counts[name])
        warnings.append(
            f"the class {rare!r} has {counts[rare]} of {sum(counts.values())} training rows; "
            "accuracy hides it, consider measure.metric=f1"
        )
    return warnings


def _list_learning_rate_warnings(arms: list[Finetune]) -> list[str]:
    return [
        f"learning rate {arm.training['learning_rate']:g} is high for {arm.strategy} fine-tuning; "
        "1e-5 to 1e-4 is usual"
        for arm in arms
        if arm.training["learning_rate"] > MAX_LEARNING_RATE
    ]
