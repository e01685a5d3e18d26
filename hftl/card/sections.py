"""Write the card's sections: how the model is made, what it was trained on, and its limits."""

from hftl.card.markdown import format_code
from hftl.card.wording import (
    describe_arm,
    find_public_base,
    has_forgetting,
    input_kind,
    join_words,
    list_validation_choices,
)
from hftl.data.near_copies import describe_near_copies
from hftl.data.splits import TASKS_WITHOUT_CLASS_SHOTS
from hftl.measure.record import ClassGains, Environment, Record
from hftl.measure.verdict import format_gain
from hftl.plurals import choose_verb, count_noun
from hftl.train.facts import ScratchSearch

MAX_WORSE_CLASSES = 5
"""Classes that are named where the baseline is better."""
MAX_PROMPTED_CLASSES, MAX_PROMPTS = 5, 2
"""Classes whose texts are shown, and texts of each."""
HEAD_STARTS = {
    "probe": "the linear probe", "random": "random weights",
    "zero_shot": "the source's embeddings of words for the classes",
}  # fmt: skip
"""By `finetune.head_init`."""


def format_data_sentence(record: Record) -> str:
    """Return what the model was trained, chosen and measured on."""
    data, shots = record.data, record.recipe.data.shots
    read = data.labels_read
    assert read is not None
    noun = "words" if input_kind(record) == "words" else "rows"
    count = f"{read.train_per_seed:,}"
    if read.train_spread is not None:
        count = "{:,} to {:,}".format(*read.train_spread)
    trained = f"trained on {count} labelled {noun} a seed"
    if not record.recipe.finetune.spec.reads_labels:
        trained = "no label was used to make it"
    elif shots:
        unit = "in all" if data.task in TASKS_WITHOUT_CLASS_SHOTS else "a class"
        trained += f" ({shots} {'rows ' if noun == 'words' else ''}{unit}, drawn by the seed)"
    return (
        f"{format_code(data.name)}: {trained}; {_format_validation_choices(record)} "
        f"chosen on {data.splits['validation']:,} validation rows, and every figure above is on "
        f"{data.splits['test']:,} test rows that nothing was chosen by"
        f"{_format_baseline_choice(record)}. In all, {read.total:,} labels were used: those of "
        "the training rows of every seed, of validation and of test."
    )


def _format_baseline_choice(record: Record) -> str:
    """Say that test decides which of several baselines the gain is over; nothing with one."""
    names = list(record.transfer_gain.baselines) if record.transfer_gain else []
    if len(names) < 2:
        return ""
    return f", but that the gain is the lesser of those over {' and '.join(names)}"


def _format_validation_choices(record: Record) -> str:
    """Return what validation decided, with its verb."""
    choices = list_validation_choices(record)
    verb = "was" if len(choices) < 2 else "were"
    return f"{join_words(choices) or 'nothing'} {verb}"


def format_data_lines(record: Record) -> list[str]:
    """Return what happened to the rows before training, a line a fact."""
    data = record.data
    drawn = " before train was cut to `data.shots`" if record.recipe.data.shots else ""
    lines = [f"{_count_done(data.rows_read, 'row')} read{drawn}"]
    if data.duplicates:
        same = "pixels" if data.modality == "image" else "but for case, form and white space"
        lines.append(f"{_count_done(data.duplicates, 'duplicate')} dropped (the same {same})")
    if data.leaked:
        lines.append(f"{data.leaked:,} of these stood in two tables; the copy that measures stayed")
    if data.conflicting:
        why = "dropped because the same input had two labels"
        lines.append(f"{_count_done(data.conflicting, 'row')} {why}")
    if data.bad_rows:
        lines.append(f"{_count_done(data.bad_rows, 'bad row')} skipped")
    if data.contradictory_inputs and data.distinct_inputs:
        share = data.contradictory_inputs / data.distinct_inputs
        lines.append(
            f"so {data.contradictory_inputs:,} of {data.distinct_inputs:,} distinct inputs "
            f"({share:.1%}) could not be measured; the figures are of the others"
        )
    if data.near_pictures:
        lines.append(
            f"{describe_near_copies(data.near_pictures, 'picture')}, and "
            f"{'counts' if data.near_pictures == 1 else 'count'} all the same"
        )
    if data.tag_scheme is not None:
        lines.append(f"entities are read from {data.tag_scheme.name} tags")
    if input_kind(record) == "image":
        lines.append("transparent pictures were laid on white, and turned as their EXIF data say")
    if record.recipe.data.group:
        lines.append("rows of one group never stand in two splits, and count as one unit")
    return lines


def _count_done(count: int, noun: str) -> str:
    """Return `1 row was` or `2 rows were`."""
    return f"{count_noun(count, noun)} {choose_verb(count, 'was')}"


def format_limits(record: Record) -> list[str]:
    """Return where the model is worse, and what was not measured."""
    lines = [
        f"It is behind {describe_arm(row.arm, record)}: {format_gain(row.gain_of_own)}."
        for row in record.ladder
        if row.gain_of_own is not None and row.gain_of_own.value < 0
    ]
    lines += _format_worse_classes(record.classes)
    lines += _format_scratch_limits(record.scratch_search)
    lines.append(
        "Measured on rows of the same origin as its training rows; other domains were not measured."
    )
    lines.append(_format_published_seed(record))
    if not has_forgetting(record):
        lines.append("Forgetting of what the source model knew was not measured.")
    return lines


def _format_published_seed(record: Record) -> str:
    """Say which seed's weights are published, and what the figures are over."""
    seed = record.published_seed
    if len(record.recipe.measure.seeds) == 1:
        return f"Weights and figures are those of seed {seed} alone; another seed may differ."
    chosen = f"The weights are those of seed {seed}, the best on validation"
    return f"{chosen}; the figures are over all seeds."


def describe_scratch_search(search: ScratchSearch) -> str:
    """Return in a few words how scratch's learning rate and its length were chosen."""
    words = f"learning rate {search.learning_rate:.3g} scored best on validation"
    if search.share < 1:
        diverged = search.whole is not None and search.whole.metrics is None
        fate = "diverged" if diverged else "scored less"
        words += f"; over the whole budget it {fate}, and each seed trains for a third of that"
    if search.beyond:
        rates = " and ".join(f"{rate:.3g}" for rate in search.beyond)
        verb = "was" if len(search.beyond) == 1 else "were"
        words += (
            "; the best of the given rates was the lowest or highest of them, so "
            f"{rates} {verb} tried as well"
        )
    return words + ("; the best is still at the end of the rates tried" if search.at_edge else "")


def _format_scratch_limits(search: ScratchSearch | None) -> list[str]:
    """Say where scratch's best rate was at the edge of those given, so that it may lie beyond."""
    if search is None or not (search.beyond or search.at_edge):
        return []
    unsure = ", so that scratch may be better than it is here" if search.at_edge else ""
    return [f"For scratch, {describe_scratch_search(search)}{unsure}."]


def _format_worse_classes(classes: ClassGains | None) -> list[str]:
    """Return the classes that the baseline predicts better, the worst first."""
    if classes is None:
        return []
    behind = [row for row in classes.rows if row.own < row.baseline]
    if not behind:
        return []
    behind.sort(key=lambda row: row.own - row.baseline)
    named = ", ".join(
        f"{format_code(row.label)} (F1 {row.own:.3f} against {row.baseline:.3f})"
        for row in behind[:MAX_WORSE_CLASSES]
    )
    most = ", most of all" if len(behind) > MAX_WORSE_CLASSES else ":"
    return [
        f"Class by class it is behind {classes.baseline} on {len(behind)} of "
        f"{len(classes.rows)}{most} {named}; no interval."
    ]


def format_base_sentence(record: Record) -> str:
    """Return the base's id or folder, and which weights exactly."""
    base, revision = find_public_base(record)
    adapted = record.adapt and record.adapt.base
    weights = (adapted or record.source).weights_sha256
    if base is not None:
        named = format_code(base) + (f" at commit {format_code(revision)}" if revision else "")
    elif adapted:
        named = "what this run has adapted, in `publish-base`, which is not published yet"
    else:
        named = f"{format_code(record.source.name)}, which has no public id"
        if record.recipe.finetune.spec.trains_adapter:
            named += ", so that only who has its folder can load this model"
    sentence = f"Base: {named}; the hash of its weights begins with `{weights[:16]}`."
    if record.recipe.source.quantization is None:
        return sentence
    return (
        f"{sentence} Its frozen weights were held in 4 bits (NF4, by bitsandbytes) in training and "
        "for the figures of every arm that reads them; on the whole weights the outputs are others."
    )


def format_training_sentence(record: Record) -> str:
    """Return how the model was trained."""
    finetune, seeds = record.recipe.finetune, len(record.recipe.measure.seeds)
    clauses = [f"Strategy `{finetune.strategy}`, pooling `{finetune.pooling}`"]
    if not finetune.spec.reads_labels:
        clauses.append(f"nothing was trained: {_format_prompts(record)}")
    elif finetune.spec.is_solved:
        clauses.append("solved on features of the frozen encoder, its penalty by cross-validation")
        clauses += _format_class_weights(record)
    else:
        clauses.append(f"the head started from {HEAD_STARTS[finetune.head_init]}")
        rate, epochs = (finetune.training[k] for k in ("learning_rate", "num_train_epochs"))
        length = _format_epochs(epochs)
        if finetune.spec.schedule == "phases":
            length = f"{_format_epochs(finetune.gradual.epochs)} a phase"
        clauses.append(f"learning rate {rate:g}, {length}, the best on validation kept")
        clauses += _format_class_weights(record)
        if finetune.focal_gamma:
            clauses.append(f"focal loss of gamma {finetune.focal_gamma:g}")
        if finetune.layer_decay:
            decay = f"{finetune.layer_decay:g}"
            clauses.append(f"each block's rate {decay} of that of the one above")
        if record.recipe.retain is not None:
            training = [entry.training for entry in record.own_entries]
            clauses += record.recipe.retain.describe(training)
    return f"{'; '.join(clauses)}; {seeds} seed{'s' if seeds > 1 else ''}."


def _format_class_weights(record: Record) -> list[str]:
    """Return how classes were weighted, from the lightest to the heaviest; nothing if not."""
    facts = record.own_entries[0].training.class_weights
    if facts is None:
        return []
    ordered = sorted(facts.weights, key=lambda name: facts.weights[name])
    ends = " to ".join(
        f"{facts.weights[name]:.3g} ({format_code(name)}, {facts.counts[name]:,} labelled)"
        for name in (ordered[0], ordered[-1])
    )
    how = (
        "against their frequency"
        if record.recipe.finetune.class_weight == "balanced"
        else "by hand"
    )
    return [f"classes were weighted {how}, from {ends}"]


def _format_prompts(record: Record) -> str:
    """Return the texts that stand for the first classes, as code."""
    prompts = record.own_entries[0].training.prompts or {}
    shown = [
        f"{format_code(label)} is {', '.join(map(format_code, texts[:MAX_PROMPTS]))}"
        for label, texts in list(prompts.items())[:MAX_PROMPTED_CLASSES]
    ]
    more = len(prompts) - len(shown)
    return (
        "an input is compared with texts, "
        + ", ".join(shown)
        + (f" and those of {more} more classes" if more > 0 else "")
    )


def _format_epochs(number: float) -> str:
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def format_environment(facts: Environment) -> list[tuple[str, str]]:
    """Return hardware and versions, a name and a value each."""
    names = ("device", "dtype", "platform", "python")
    lines = [(name, getattr(facts, name)) for name in names]
    if facts.processes is not None and facts.processes > 1:
        lines.append(("processes", str(facts.processes)))
    if facts.threads is not None:
        lines.append(("threads", str(facts.threads)))
    if facts.energy_kwh is not None:
        energy = f"{facts.energy_kwh:.3g} kWh for all arms and seeds, as codecarbon estimates it"
        lines.append(("energy", energy))
    if facts.co2_grams is not None:
        lines.append(("emissions", f"{facts.co2_grams:.3g} g of CO2 equivalents"))
    return lines + list(facts.packages.items())
