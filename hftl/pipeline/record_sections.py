"""Build the record's sections on the source model, the data and the adaptations."""

from hftl.adapt.facts import AdaptedBase
from hftl.adapt.guard import summarize_adaptation
from hftl.config.recipe import Recipe
from hftl.data.facts import DataFacts, LabelCounts
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.context import ExperimentContext
from hftl.measure.gain import describe_adaptation_outcome, select_lesser_gain
from hftl.measure.record import AdaptSection, Gain, SourceFacts
from hftl.models.source import hash_source_weights
from hftl.pipeline.run import FinishedStage
from hftl.publish.sanitize import strip_parents
from hftl.runtime.paths import PACKAGE_PREFIX


def build_source_section(context: ExperimentContext) -> SourceFacts:
    """Return the record of the source model."""
    source = context.source
    return SourceFacts(
        model=source.name,
        name=source.public_id or strip_parents(source.name),
        local=source.is_local and not source.name.startswith(PACKAGE_PREFIX),
        published_as=source.public_id,
        revision=source.revision,
        architecture=source.architecture,
        weights_sha256=context.weights_hash,
        prefix_tokens=source.architecture_spec.prefix_tokens,
    )


def build_data_section(recipe: Recipe, context: ExperimentContext) -> DataFacts:
    """Return the data's facts, its name, and how many labels were read."""
    facts = context.prepared.facts
    draws = [context.select_train_rows(seed) for seed in recipe.measure.seeds]
    count_words = context.prepared.count_words
    read = [sum(count_words(rows)) for rows in draws]
    spread = {} if min(read) == max(read) else {"train_spread": (min(read), max(read))}
    if any(stage.guard in (None, "probe") for stage in recipe.stages):
        draws.append(context.select_train_rows(recipe.data.seed))
    train = {row.content: row for rows in draws for row in rows}
    measured = [row for split in MEASURED_SPLITS for row in context.prepared.rows[split]]
    path = recipe.data.train.path
    return DataFacts.model_validate(
        facts.to_dict()
        | {
            "name": path if "train" in facts.hub_revisions else strip_parents(path),
            "labels_read": LabelCounts(
                train_per_seed=read[0],
                **spread,
                total=sum(count_words([*train.values(), *measured])),
            ),
        }
    )


def build_adaptation_section(
    stages: list[FinishedStage],
    own: ExperimentContext | None,
    over_source: Gain | None,
    is_adapter: bool,
) -> AdaptSection | None:
    """Return the record of the recipe's adaptations; None without any.

    Args:
        stages: the adaptations, one after the other.
        own: what the own arm worked with.
        over_source: the own arm's gain over `source`.
        is_adapter: an adapter needs an adapted base of its own, a whole model none.
    """
    if not stages:
        return None
    facts = [summarize_adaptation(stage.facts) for stage in stages]
    context = own or stages[-1].context
    base = None
    if context.base_is_adapted and is_adapter:
        base = AdaptedBase(weights_sha256=hash_source_weights(context.public_base))
    return AdaptSection(
        stages=facts,
        gain=None if over_source is None else select_lesser_gain({"source": over_source}),
        outcome=describe_adaptation_outcome(facts, over_source),
        base=base,
    )
