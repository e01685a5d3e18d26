"""Warn of doubtful inputs and settings before anything trains: the list of checks of `hftl check`.

A check takes the planned run and yields warnings, each a sentence with what to do, or a `Finding`
of a fault of inputs or labels. To add one, write a function and its line in `CHECKS`, in the order
in which warnings are shown.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hftl.analysis.fingerprints import FINGERPRINT_CHECKS
from hftl.analysis.row_faults import MAX_PLACES, ROW_CHECKS
from hftl.config.measure import SEARCH_SHARE
from hftl.config.recipe import Arm, Recipe
from hftl.data.image_inputs import ImageInputs
from hftl.data.images import describe_narrow_images
from hftl.data.normalization import find_doubtful_names, is_stray_value
from hftl.data.prepare import PreparedData, suggest_multi_label
from hftl.data.text_inputs import TextInputs
from hftl.finetune.strategies import ZERO_SHOT_ARM
from hftl.models.architectures import get_encoder_config, get_max_tokens
from hftl.models.source import SourceModel
from hftl.models.weight_files import read_tensor_shapes
from hftl.plurals import choose_verb, count_noun
from hftl.runtime.paths import is_local
from hftl.train.facts import CheckFacts, Finding
from hftl.train.steps import (
    count_training_steps,
    scale_length,
    warn_of_late_evaluation,
    warn_of_long_warmup,
)

SAMPLED_ROWS = 2000
"""Training rows that lengths are measured on, at most."""
MAX_TRUNCATED = 0.1
MAX_UNKNOWN = 0.02
MAX_ENLARGED = 0.5
MAX_ELONGATED = 0.1
MIN_TEST_ROWS = 200
MAX_IMBALANCE = 10
WORD_PREDICTORS = ("ForMaskedLM", "ForPreTraining", "ForCausalLM")
"""The ends of the names of classes that predict words."""
MAX_LEARNING_RATE = 2e-4
"""Above this, full and partial fine-tuning of a pretrained encoder mostly diverges."""
HUGE_RATE = 0.02
"""Above this, adapters and heads do so."""
BLOCK_NUMBER = re.compile(r"(?!.*\bstages\.)(?:\w+\.)*?layers?\.(\d+)\.")
"""The number of a block in the names of its tensors; those of a stage are counted anew."""
ADAM = "adam"
"""Is in the names of the optimizers that these rates are of, and of the default."""


@dataclass(frozen=True)
class PreflightContext:
    """Hold what is known of a run before anything trains.

    `sizes` are the figures of the training rows' texts or images, see `summarize` of their inputs;
    `sharing` is how many processes share each training step.
    """

    recipe: Recipe
    arms: Sequence[Arm]
    source: SourceModel
    prepared: PreparedData
    sizes: dict[str, float]
    inputs: TextInputs | ImageInputs
    sharing: int = 1


Check = Callable[[PreflightContext], Iterator[str | Finding]]


def run_preflight_checks(
    recipe: Recipe,
    arms: Sequence[Arm],
    source: SourceModel,
    inputs: TextInputs | ImageInputs,
    prepared: PreparedData,
    sharing: int = 1,
) -> CheckFacts:
    """Return facts about the inputs, and `warnings`, each a sentence with what to do."""
    sizes = inputs.summarize(prepared.rows["train"][:SAMPLED_ROWS])
    run = PreflightContext(recipe, arms, source, prepared, sizes, inputs, sharing)
    results = [result for check in CHECKS for result in check(run)]
    findings = [result for result in results if isinstance(result, Finding)]
    warnings = [r.sentence if isinstance(r, Finding) else r for r in results]
    facts = {**sizes, "warnings": list(dict.fromkeys(warnings))}  # Several arms may give the same.
    return CheckFacts.model_validate(facts | ({"findings": findings} if findings else {}))


def check_image_sizes(run: PreflightContext) -> Iterator[str]:
    """Warn of pictures that are enlarged, cropped or squeezed."""
    if run.prepared.modality != "image":
        return
    sizes = run.sizes
    if sizes["enlarged"] > MAX_ENLARGED:
        yield (
            f"{sizes['enlarged']:.0%} of the pictures are smaller than {sizes['image_size']:.0f} "
            "pixels and are enlarged; a smaller data.image_size would be faster"
        )
    assert isinstance(run.inputs, ImageInputs)
    if sizes["elongated"] > MAX_ELONGATED and not run.inputs.keeps_shape:
        yield (
            f"{sizes['elongated']:.0%} of the pictures are more than twice as long as wide; the "
            "source's processor crops or squeezes them"
        )


def check_lengths(run: PreflightContext) -> Iterator[str | Finding]:
    """Warn of texts that are cut, and of tokens that the tokenizer does not know."""
    if run.prepared.modality == "image":
        return
    sizes, max_length = run.sizes, run.recipe.data.max_length
    yield from warn_of_positions(run.recipe, run.source)
    limit = get_max_tokens(run.source.config)
    if sizes["truncated"] > MAX_TRUNCATED:
        yield Finding(
            kind="long inputs",
            what=f"{sizes['truncated']:.0%} of the texts are longer than data.max_length="
            f"{max_length} tokens and are cut",
            confidence="certain",
            fix=f"the source takes up to {limit}",
        )
    if sizes["unknown_tokens"] > MAX_UNKNOWN:
        yield Finding(
            kind="tokenizer",
            what=f"{sizes['unknown_tokens']:.1%} of the tokens are unknown to the tokenizer",
            confidence="certain",
            fix="does it fit the language and the casing?",
        )


def warn_of_positions(recipe: Recipe, source: SourceModel) -> Iterator[str]:
    """Warn of a length of texts that the source cannot read."""
    if source.architecture_spec.modality != "text":
        return
    limit, max_length = get_max_tokens(source.config), recipe.data.max_length
    if max_length > limit:
        yield (
            f"data.max_length={max_length} is above the source model's positions; texts are cut at "
            f"{limit} tokens"
        )


def check_test_rows(run: PreflightContext) -> Iterator[str]:
    """Warn of too few test rows for a narrow interval."""
    rows = len(run.prepared.rows["test"])
    if rows < MIN_TEST_ROWS:
        verb = "gives" if rows == 1 else "give"
        yield f"{count_noun(rows, 'test row')} {verb} a wide interval; a few hundred are better"


def check_labels(run: PreflightContext) -> Iterator[str]:
    """Warn of labels that look like other spellings of one, and of a rare class."""
    counts = run.prepared.facts.label_counts or {}
    total = Counter[str]()
    for of_split in counts.values():
        total.update(of_split)
    yield from find_doubtful_names(total)
    yield from _warn_of_label_words(run.recipe.data.label_names or {})
    # Of a few rows that read like missing values nothing more is said than that.
    train = {n: k for n, k in counts.get("train", {}).items() if not is_stray_value(n, total[n])}
    least, most = min(train.values(), default=0), max(train.values(), default=0)
    if run.prepared.task == "classification" and most > MAX_IMBALANCE * least:
        rare = min(train, key=lambda name: train[name])
        is_weighted = any(arm.finetune.class_weight for arm in run.arms)
        weights = "" if is_weighted else ", and finetune.class_weight=balanced"
        yield (
            f"the class {rare!r} has {train[rare]} of {sum(train.values())} training rows; "
            f"accuracy hides it, consider measure.metric=f1{weights}"
        )


def _warn_of_label_words(words: Mapping[str, str]) -> Iterator[str]:
    """Warn of labels that a reader of the card could not tell apart, or not read."""
    labels: dict[str, str] = {}
    for label, text in words.items():
        if not text.strip():
            yield f"data.label_names has no words for {label!r}; give some, or leave it out"
        elif text in labels:
            both = f"{labels[text]!r} and {label!r}"
            yield f"data.label_names has {text!r} for {both}; tell them apart"
        labels.setdefault(text, label)


def check_learning_rates(run: PreflightContext) -> Iterator[str]:
    """Warn of learning rates that destroy the source's weights."""
    for arm in run.arms:
        rate = arm.finetune.training["learning_rate"]
        # What is usual is known of Adam and its kin; plain SGD takes a hundred times as much.
        if ADAM not in arm.finetune.training.get("optim", ADAM):
            continue
        if arm.spec.trains_encoder_weights and rate > MAX_LEARNING_RATE:
            yield (
                f"learning rate {rate:g} is high for {arm.strategy} fine-tuning; 1e-5 to 1e-4 is "
                "usual"
            )
        elif not arm.spec.is_solved and arm.spec.schedule != "rate_search" and rate > HUGE_RATE:
            yield f"learning rate {rate:g} is high for {arm.name}; 1e-4 to 2e-3 is usual"


def check_lengths_of_training(run: PreflightContext) -> Iterator[str]:
    """Warn of warm-ups and first evaluations that come after the end of a training."""
    rows = len(run.prepared.draw_train_rows(run.recipe.data.shots, run.recipe.measure.seeds[0]))
    for arm in run.arms:
        if arm.spec.is_solved:
            continue
        training, epochs, what = _find_shortest_training(run.recipe, arm)
        steps = count_training_steps(training, rows, epochs, processes=run.sharing)
        whole = training | {"max_steps": -1}
        an_epoch = count_training_steps(whole, rows, 1, processes=run.sharing)
        yield from warn_of_long_warmup(training, steps, "finetune", what)
        yield from warn_of_late_evaluation(training, steps, steps / an_epoch, what)


def _find_shortest_training(recipe: Recipe, arm: Arm) -> tuple[dict[str, Any], float, str]:
    """Return the arguments of an arm's shortest training, its epochs, and what it is."""
    training = arm.finetune.training
    if arm.spec.schedule == "phases":
        phased = arm.finetune.gradual
        # Without a last phase its epochs are 0.
        epochs = min(phased.epochs, phased.final_epochs or phased.epochs)
        return training, epochs, f"a phase of {arm.name}"
    if arm.spec.schedule != "rate_search":
        return training, training["num_train_epochs"], arm.name
    training = scale_length(training, recipe.measure.scratch.epochs_factor * SEARCH_SHARE)
    return training, training["num_train_epochs"], f"a rate that {arm.name} tries"


def check_zero_shot_source(run: PreflightContext) -> Iterator[str]:
    """Warn of zero-shot classification by an encoder that was not trained to compare texts."""
    trained_as = (run.source.config.architectures or [""])[0]
    reads = any(arm.strategy == ZERO_SHOT_ARM or arm.starts_zero_shot for arm in run.arms)
    if reads and run.prepared.modality == "text" and trained_as.endswith(WORD_PREDICTORS):
        yield (
            f"{run.source.name} was trained to predict words ({trained_as}), not to compare texts, "
            "and zero-shot classification by it is hardly above chance; use a sentence encoder, or "
            "a source with an entailment head"
        )


def check_unread_blocks(run: PreflightContext) -> Iterator[str]:
    """Warn of a config with fewer blocks than the weights: the last ones are not read."""
    config = run.source.config
    count = getattr(config, "num_hidden_layers", None)
    # The halves of a pair name their blocks alike.
    if count is None or get_encoder_config(config) is not config:
        return
    numbers = map(BLOCK_NUMBER.match, read_tensor_shapes(run.source.folder))
    saved = max((int(number[1]) + 1 for number in numbers if number), default=0)
    if saved > count > 0:
        yield (
            f"the config.json of {run.source.name} says {count} layer(s), and its weights hold "
            f"{saved}: the last {saved - count} are not read; correct num_hidden_layers, unless "
            "that is meant"
        )


def check_base_reference(run: PreflightContext) -> Iterator[str]:
    """Warn of a source that strangers could not load an adapter on, and of a commit of no hub."""
    if run.source.public_id is None:
        yield (
            "the source model has no public id, so the adapter could not be pushed; set "
            "source.published_as"
        )
    source = run.recipe.source
    # Of a copy on this machine it is the commit of `published_as`, which a push names.
    if source.revision and source.published_as is None and is_local(source.model):
        yield (
            "source.revision is of the hub, and source.model is on this machine: it is not read; "
            "remove it, or set source.published_as"
        )


def check_dropped_rows(run: PreflightContext) -> Iterator[str | Finding]:
    """Warn of rows that are in two splits, have differing labels, or cannot be used."""
    facts = run.prepared.facts
    if facts.leaked:
        yield Finding(
            kind="leakage",
            what=f"{count_noun(facts.leaked, 'row')} {choose_verb(facts.leaked, 'is')} in two of "
            "the tables train, validation and test",
            confidence="certain",
            fix=f"{'it was' if facts.leaked == 1 else 'they were'} dropped from train, or from "
            "validation where test has the other",
        )
    # A run folder may hold data that an older version prepared without these counts.
    if facts.contradictory_inputs:
        share = facts.contradictory_inputs / facts.distinct_inputs
        yield (
            f"{facts.contradictory_inputs} of {facts.distinct_inputs} distinct inputs "
            f"({share:.0%}) {choose_verb(facts.contradictory_inputs, 'has')} differing labels and "
            f"{choose_verb(facts.contradictory_inputs, 'is')} dropped ({facts.conflicting} rows): "
            "what is measured is the others, which may be the easier ones; correct "
            f"the labels{suggest_multi_label(run.prepared.task)}"
        )
    if facts.narrow_pictures:
        what, _, fix = describe_narrow_images(facts.narrow_pictures).partition("; ")
        yield Finding(kind="rescale", what=what, confidence="certain", fix=fix)
    if facts.bad_rows:
        verb = choose_verb(facts.bad_rows, "was")
        yield Finding(
            kind="bad rows",
            what=f"{count_noun(facts.bad_rows, 'bad row')} {verb} skipped",
            where=[f"{row.where}: {row.why}" for row in facts.bad_rows_listed[:MAX_PLACES]],
            confidence="certain",
            fix="the record of a run lists them, data.bad_rows_listed",
        )


def check_rows(run: PreflightContext) -> Iterator[Finding]:
    """Warn of near copies, and of splits whose classes or their shares differ."""
    for check in ROW_CHECKS:
        yield from check(run.recipe, run.prepared)


def check_fingerprints(run: PreflightContext) -> Iterator[Finding]:
    """Warn of a tokenizer or processor that does not fit what the checkpoint declares."""
    for check in FINGERPRINT_CHECKS:
        yield from check(run.source, run.inputs)


CHECKS: tuple[Check, ...] = (
    check_image_sizes,
    check_lengths,
    check_test_rows,
    check_labels,
    check_learning_rates,
    check_lengths_of_training,
    check_zero_shot_source,
    check_unread_blocks,
    check_base_reference,
    check_dropped_rows,
    check_rows,
    check_fingerprints,
)
