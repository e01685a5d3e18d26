"""Word what a card and the terminal say: names of arms, and the phrases for adaptation and
forgetting, each in one place."""

from hftl.adapt.facts import AdaptStage, LossChange
from hftl.card.markdown import escape_markup, format_code
from hftl.config.section import is_hub_id
from hftl.finetune.strategies import STRATEGIES
from hftl.measure.facts import Estimate
from hftl.measure.forgetting_facts import (
    Figure,
    ForgettingArm,
    ForgettingSection,
    Headline,
    Reduction,
)
from hftl.measure.record import Interval, Record
from hftl.measure.verdict import format_gain


def name_surety(record: Record) -> str:
    """Return what is said of a mistake: how far off it is, or its probability."""
    if record.data.task == "regression":
        return "off by"
    is_calibrated = record.calibration is not None and record.calibration.after is not None
    return "calibrated probability" if is_calibrated else "probability"


# Arms, inputs and certainty.


SOURCE_ARM_PHRASE = "the same without adaptation"
MEAN_ARM_PHRASE = "always the mean of the training targets"
TASK_PHRASES = {"text": "sorts text into", "words": "tags words as", "image": "sorts pictures into"}


def input_kind(record: Record) -> str:
    """Return what a model of this record takes: `text`, `words` or `image`."""
    return "words" if record.data.task == "token-classification" else record.data.modality


def describe_arm(arm: str, record: Record) -> str:
    """Return an arm's name, and what it is where that is known."""
    words = STRATEGIES[arm].arm_words if arm in STRATEGIES else ""
    if not isinstance(words, str):
        words = words[input_kind(record)]
    if arm == "majority" and record.data.task == "regression":
        words = MEAN_ARM_PHRASE
    if arm == "source":
        words = SOURCE_ARM_PHRASE
    return f"{arm} ({words})" if words else escape_markup(arm)


def is_pooled(record: Record) -> bool:
    """Return whether the head is hftl's own, above its own pooling; stock classes do not
    load it, so that without hftl only the encoder's features are had."""
    return record.recipe.finetune.pooling != "native"


def find_pipeline_tag(record: Record) -> str:
    """Return the hub's name for the task."""
    start = "token" if input_kind(record) == "words" else record.data.modality
    return f"{start}-classification"


def list_validation_choices(record: Record) -> list[str]:
    """Return what validation decided about the published weights; a solved arm has no epochs."""
    choices = [] if record.recipe.finetune.spec.is_solved else ["the best epoch"]
    if any(stage.guard.kind == "probe" for stage in record.stages):
        choices.append("the adaptation's weights")
    if len(record.recipe.measure.seeds) > 1:
        choices.append("the published seed")
    return choices


def join_words(words: list[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


PICTURE_EXAMPLE = '"a_picture.png"'


def example_input(record: Record) -> str:
    """Return one input, as `predict` takes it, in source code."""
    columns = record.recipe.data.train.text
    if input_kind(record) == "text" and isinstance(columns, list) and len(columns) == 2:
        return '("A first text.", "A second text.")'
    if record.recipe.data.reads_text_beside:
        return f'({PICTURE_EXAMPLE}, "A text of your own.")'
    return {
        "text": '"A text of your own."',
        "words": '["Each", "word", "apart"]',
        "image": PICTURE_EXAMPLE,
    }[input_kind(record)]


def format_interval_basis(ci95: Interval | None, seeds: int) -> str:
    """Return what an interval rests on: `95 % interval, 3 seeds`."""
    return f"95 % interval, {seeds} seeds" if ci95 else "no interval"


# Adaptation.


OBJECTIVE_PHRASES = {
    "mlm": "masked language modelling",
    "clm": "causal language modelling",
    "mae": "masked image modelling",
}
LOSS_UNITS = {"mlm": "a hidden token", "clm": "a token", "mae": "a pixel of a hidden patch"}
METHOD_PHRASES = {
    "full": "every weight of the encoder",
    "lora": "LoRA adapters in every block",
    "lora+blocks": "LoRA adapters in every block and the top blocks whole",
}
GUARD_PHRASES = {
    "probe": "a linear probe's score on validation",
    "general": "minus the loss on general data",
    "neighbours": "the share of nearest neighbours that stay the original's",
}
CORPUS_PHRASES = {"train": "train's own inputs, without labels", "unlabeled": "another corpus"}


def format_adaptation_sentence(record: Record) -> str:
    """Return in one sentence with both scores whether adaptation beat no adaptation."""
    adapt = record.adapt
    assert adapt is not None
    gain = adapt.gain
    if gain is None or all(stage.kept == "original" for stage in adapt.stages):
        return f"{adapt.outcome}."
    test = {row.arm: row.test for row in record.ladder}
    return (
        f"{adapt.outcome}: {gain.metric} {record.own_row.test:.3f} against {test['source']:.3f} "
        f"without it, a gain of {format_gain(gain)} "
        f"({format_interval_basis(gain.ci95, gain.seeds)})."
    )


def format_adaptation_lines(record: Record) -> list[str]:
    """Return a line an adaptation and fact: corpus, losses, guard, leakage."""
    lines: list[str] = []
    for stage in record.stages:
        lines += [_format_stage(stage), _format_stage_losses(stage), _format_guard(stage)]
        # Without a task there is neither validation nor test.
        lines += [_format_leakage(stage)] if record.recipe.data.task else []
    if record.adapt is not None and record.adapt.gain is not None:
        lines.append(
            "Adaptation was made once; its gain counts the luck of the seeds of fine-tuning and of "
            "the test items, not that of adaptation itself"
        )
    return [f"{line}." for line in lines]


def _format_stage(stage: AdaptStage) -> str:
    corpus = stage.corpus
    size = f"{corpus.documents:,} {'pictures' if stage.objective == 'mae' else 'texts'}"
    if corpus.tokens is not None:
        size += f" ({corpus.tokens:,} tokens)"
    return (
        f"Adapted by {OBJECTIVE_PHRASES[stage.objective]} on {size} of "
        f"{CORPUS_PHRASES[corpus.origin]}, training {METHOD_PHRASES[stage.method]}, "
        f"learning rate {stage.learning_rate:g}, {stage.steps:,} steps"
    )


def _format_stage_losses(stage: AdaptStage) -> str:
    unit = LOSS_UNITS[stage.objective]
    text = f"Loss {unit} on what was held out: {_format_loss_change(stage.loss)}"
    if stage.general is not None:
        text += f"; on rows of general data {_format_loss_change(stage.general)}"
    if stage.kept == "original":
        text += f". What it started from was kept: {stage.why}"
    return text


def _format_guard(stage: AdaptStage) -> str:
    guard = stage.guard
    if guard.kind == "off":
        return "Nothing guarded what the encoder knew before"
    return (
        f"The guard was {GUARD_PHRASES[guard.kind]}: {guard.before:.3f} before, "
        f"{guard.after:.3f} after, at most {guard.tolerance:g} "
        f"{'of it ' if stage.relative else ''}to be lost"
    )


def _format_leakage(stage: AdaptStage) -> str:
    if stage.transductive:
        return (
            "Transductive: inputs of validation and test, without their labels, were in the corpus"
        )
    leaked = stage.corpus.leaked
    if leaked:
        return (
            f"{leaked:,} copies or near copies of validation and test were taken out of the corpus"
        )
    return "The corpus holds no copy or near copy of validation and test"


def _format_loss_change(loss: LossChange) -> str:
    text = f"{loss.before:.3f} before, {loss.after:.3f} after"
    if loss.perplexity and None not in loss.perplexity:
        text += f" (perplexity {loss.perplexity[0]:.1f} and {loss.perplexity[1]:.1f})"
    return text


# Forgetting.


FIGURE_PHRASES = {
    "neighbours": "same ten nearest neighbours",
    "cka": "linear CKA with the original, debiased",
    "cosine": "mean cosine with the original",
    "kl": "KL of similarities, in nats",
    "new_kl": "KL of similarities of test inputs, in nats",
    "mlm_loss": "loss of the original's masked-language head, in nats a hidden token",
    "mae_loss": "loss of the original's masked-image decoder, squared error a hidden value",
    "backward": "accuracy of the original's own classes (its change is backward transfer)",
}
"""The figures that need no labels of the task."""
CONTROL_PHRASES = {
    "same": "nearest neighbour of the same {}",
    "probe_fixed": "{} by a probe of the original",
    "probe_refitted": "{} by a probe fitted anew",
}


def has_forgetting(record: Record) -> bool:
    """Return whether forgetting was measured on general data."""
    return record.forgetting is not None and record.forgetting.headline is not None


def _find_headline(record: Record) -> tuple[ForgettingSection, Headline]:
    forgetting = record.forgetting
    assert forgetting is not None and forgetting.headline is not None
    return forgetting, forgetting.headline


def describe_headline(record: Record) -> str:
    """Return the figure that forgetting is told by, in a few words."""
    _, headline = _find_headline(record)
    if headline.control is None:
        return FIGURE_PHRASES[headline.figure]
    return CONTROL_PHRASES[headline.figure].format(escape_markup(headline.control))


def format_forgetting_sentence(record: Record) -> str:
    """Return in one sentence what the own arm has forgotten."""
    forgetting, headline = _find_headline(record)
    own = forgetting.arms[0]
    figure, forgotten = _find_headline_figure(own, headline), own.forgotten
    assert forgotten is not None
    words = describe_headline(record)
    text = (
        f"{words[:1].upper()}{words[1:]}: a share of {figure.before:.3f} under the original, "
        f"{figure.after:.3f} under this model, {format_gain(forgotten)} forgotten "
        f"({format_interval_basis(forgotten.ci95, len(forgotten.per_seed))})"
    )
    if reduction := _format_reduction(own.against):
        text += f", {reduction}"
    return f"{text}."


def build_forgetting_rows(record: Record) -> list[list[str]]:
    """Return a header and a row an arm: the headline before and after, how much of it was
    forgotten, and how that compares with the same arm without retention, where there is one."""
    forgetting, headline = _find_headline(record)
    against = any(_format_reduction(entry.against) for entry in forgetting.arms)
    rows = [["arm", "original", "after", "forgotten", *(["against"] if against else [])]]
    for entry in forgetting.arms:
        figure = _find_headline_figure(entry, headline)
        assert entry.forgotten is not None
        row = [
            entry.arm, f"{figure.before:.3f}", f"{figure.after:.3f}", format_gain(entry.forgotten)
        ]  # fmt: skip
        rows.append([*row, _format_reduction(entry.against)] if against else row)
    return rows


def build_figure_rows(record: Record) -> list[list[str]]:
    """Return a header and a row a figure of the own arm: name, original, after, and change."""
    forgetting, _ = _find_headline(record)
    own = forgetting.arms[0].figures
    rows = [["this model on general data", "original", "after", "change"]]
    for control, figures in own.controls.items():
        for name, phrase in CONTROL_PHRASES.items():
            if (figure := getattr(figures, name)) is not None:
                rows.append(_build_figure_row(phrase.format(escape_markup(control)), figure))
    for name, phrase in FIGURE_PHRASES.items():
        if (figure := getattr(own, name)) is not None:
            rows.append(_build_figure_row(phrase, figure))
    return rows


def format_forgetting_lines(record: Record) -> list[str]:
    """Return how forgetting was measured, a line a fact."""
    forgetting, _ = _find_headline(record)
    general, table = forgetting.general, record.recipe.data.general
    assert general is not None and table is not None
    on_hub = "general" in record.data.hub_revisions
    name = table.path if on_hub else table.path.rsplit("/", 1)[-1]
    lines = [
        f"Measured on {forgetting.rows:,} rows of {format_code(name)} "
        f"({general.rows_read:,} were read), which no retention used",
        "The original is the source model as it was, before any adaptation",
    ]
    if general.documents:
        lines.append(f"Rows of one {format_code(general.documents)} count as one unit")
    if general.known:
        lines.append(f"{general.known:,} copies of the run's own inputs were left out")
    if general.near:
        lines.append(
            f"{general.near:,} rows that are nearly one of validation or test were not used"
        )
    return [f"{line}." for line in lines]


def _find_headline_figure(entry: ForgettingArm, headline: Headline) -> Figure:
    figures = (
        entry.figures if headline.control is None else entry.figures.controls[headline.control]
    )
    return getattr(figures, headline.figure)


def _format_reduction(against: Reduction | None) -> str:
    if against is None or against.gone is None:
        return ""
    if against.gone < 0:
        return f"{-against.gone:.0%} more than {against.arm}"
    return f"{against.gone:.0%} less than {against.arm}"


def _build_figure_row(words: str, figure: Figure) -> list[str]:
    if figure.floor is not None:
        words += f" (rows paired by chance: up to {figure.floor:.3f})"
    change = format_gain(Estimate(figure.change, figure.ci95))
    return [words, f"{figure.before:.3f}", f"{figure.after:.3f}", change]


def find_public_base(record: Record) -> tuple[str | None, str | None]:
    """Return the public id and the commit of the base that the published model comes from.

    Where the run has adapted a base of its own, that is the base, once it is published.
    """
    base = (record.adapt and record.adapt.base) or record.source
    if not base.published_as or not is_hub_id(base.published_as):
        return None, None
    return base.published_as, base.revision
