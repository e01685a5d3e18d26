"""Prepare what keeps an arm near its original; what is computed once for many arms is a stage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import EWC, Retain
from hftl.data.general import check_general_labels
from hftl.errors import RecipeError
from hftl.finetune.arm import init_head_from_probe, train_arm
from hftl.finetune.context import ExperimentContext, RegularizerSetup
from hftl.finetune.guard_metrics import score_validation
from hftl.finetune.regularizer_setup import (
    LOGIT_KIND_OF_TASK,
    FisherResult,
    build_general_dataset,
    build_setup,
    check_retention,
    embed_selection_rows,
    has_auto_weight,
    measure_lost_neighbours,
    measure_probe_quality,
    select_kl_weight,
    set_kl_weight,
)
from hftl.models.heads import LoadedModel
from hftl.models.source import SourceModel
from hftl.pipeline.cache_keys import SEMANTICS
from hftl.retain.build import Batch
from hftl.retain.fisher import compute_fisher, describe_fisher, load_fisher, save_fisher
from hftl.retain.reference import HeadQuality, move_batch
from hftl.runtime import distributed, run_folder
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, fingerprint, to_json
from hftl.train.facts import ChosenKLWeight, HeadFacts, TrainingFacts

FISHER_FILE = "fisher.safetensors"


def prepare_retention(
    context: ExperimentContext, arm: Arm, seed: int, seeds: list[int], folder: Path,
    reads: StageInputs, say: Callable[[str], None],
) -> RegularizerSetup:  # fmt: skip
    """Return what keeps one training of an arm near its original. Collective.

    Args:
        context: the arm's.
        arm: with its `retain`.
        seed: of this training.
        seeds: of all; a weight that is to be chosen is chosen on the first.
        folder: of the run.
        reads: what the arm depends on, and so does the choice.
        say: receives a line about a choice.
    """
    retain = arm.retain
    if retain is None:
        return RegularizerSetup()
    facts = TrainingFacts()
    quality = _measure_probe(context, arm, seed, say)
    if quality is not None:
        opinion = HeadFacts(loss=quality.loss, shares=quality.shares, weak=quality.is_weak)
        facts = TrainingFacts(head_opinion=opinion)
    if has_auto_weight(retain):
        chosen = _choose_kl_weight(context, arm, seeds[0], folder, reads, say)
        facts = facts.merge(TrainingFacts(kl_weight=chosen))
        retain = set_kl_weight(retain, chosen.weight)
    setup = _build_setup(context, arm, retain, seed, folder)
    return replace(setup, facts=setup.facts.merge(facts))


def check_recipe_retention(recipe: Recipe, source: SourceModel) -> None:
    """Refuse what cannot keep an arm near its original, before a row is read.

    Raises:
        RecipeError: see `check_retention`; it names an arm that is not the recipe's own.
    """
    for number, arm in enumerate(recipe.arms):
        try:
            check_retention(arm, source, str(recipe.data.task))
        except RecipeError as error:
            if number == 0:
                raise
            # The section may fit the recipe's own arm, and not one that inherits it.
            raise RecipeError(f"measure.arms.{arm.name}: {error.what}", error.fix) from None


def reads_general_labels(recipe: Recipe) -> bool:
    """Return True if an arm reads the task's labels of general data."""
    sections = [arm.retain for arm in recipe.arms]
    return any(retain is not None and retain.reads_general_labels for retain in sections)


def check_replay_labels(recipe: Recipe, context: ExperimentContext) -> None:
    """Refuse general data that an arm reads by labels which are not the task's.

    Raises:
        DataError: see `check_general_labels`.
    """
    if reads_general_labels(recipe):
        assert context.general is not None
        check_general_labels(context.general, context.label_column, context.prepared.names)


def _measure_probe(
    context: ExperimentContext, arm: Arm, seed: int, say: Callable[[str], None]
) -> HeadQuality | None:
    """Return the quality of the head that KL compares, and warn of a weak one. Collective."""
    assert arm.retain is not None
    quality = measure_probe_quality(context, arm.retain, arm.finetune, seed)
    if quality is not None and quality.is_weak:
        say(
            f"  warning: {arm.name} seed {seed}: kl.on=probe compares a head that hardly predicts "
            f"the labels (loss {quality.loss:.3f} on train, {quality.shares:.3f} by label "
            "frequencies alone); consider retain.kl.on=relational"
        )
    return quality


def _build_setup(
    context: ExperimentContext, arm: Arm, retain: Retain, seed: int, folder: Path
) -> RegularizerSetup:
    def build_original(before: ExperimentContext) -> nn.Module:
        return _build_start_model(before, arm, seed).model

    def compute(config: EWC) -> FisherResult:
        return _prepare_fisher(context, arm, config, seed, folder)

    return build_setup(context, retain, arm.finetune, seed, compute, build_original)


def _build_start_model(context: ExperimentContext, arm: Arm, seed: int) -> LoadedModel:
    """Return the model that training starts from, with the probe as its head."""
    loaded = context.build_model(arm.finetune.pooling, seed)
    init_head_from_probe(context, loaded, arm.finetune.pooling, seed)
    return loaded


def _choose_kl_weight(
    context: ExperimentContext, arm: Arm, seed: int, folder: Path, reads: StageInputs,
    say: Callable[[str], None],
) -> ChosenKLWeight:  # fmt: skip
    """Return the weight of KL and what was tried, chosen once for all seeds of an arm."""
    retain, stage = arm.retain, folder / "phases" / f"weight-{arm.name}"
    assert retain is not None
    # Every process embeds: the call is collective.
    original = embed_selection_rows(context, _build_start_model(context, arm, seed))

    def try_weight(weight: float) -> tuple[float, float, float]:
        setup = _build_setup(context, arm, set_kl_weight(retain, weight), seed, folder)
        setup = replace(
            setup,
            measure_forgetting=lambda model: measure_lost_neighbours(context, original, model),
        )
        with show_activity(f"KL weight {weight:g}"):
            output = train_arm(context, arm.finetune, seed, setup)
        score, error = score_validation(context, output.logits["validation"])
        assert output.facts.forgotten is not None
        return score, error, output.facts.forgotten

    if _share_inputs(stage) != reads:
        choice = select_kl_weight(try_weight)

        def commit() -> None:
            with run_folder.commit_stage(stage, reads) as aside:
                run_folder.write_text(aside / "weight.json", to_json(choice.to_dict()))

        distributed.broadcast_from_main(commit)
        say(f"  {arm.name}: KL weight {choice.weight:g} forgets least within one standard error")
    return run_folder.read_part(stage / "weight.json", ChosenKLWeight)


def _share_inputs(stage: Path) -> StageInputs | None:
    return distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(stage))


def _prepare_fisher(
    context: ExperimentContext, arm: Arm, config: EWC, seed: int, folder: Path
) -> FisherResult:
    """Return the Fisher information at the original, and the record's facts on it.

    It is a stage of its own, shared by all arms that read it.
    """
    general = context.general
    assert general is not None
    rows = general.train_rows[: config.samples]
    reads = {
        "semantics": SEMANTICS,
        "weights": context.weights_hash,
        "general": general.facts.fingerprint,
        "kind": config.fisher,
        "rows": len(rows),
        # The head depends on the seed; features need none.
        "head": None if config.fisher == "features" else [arm.finetune.pooling, seed],
        "pooling": arm.finetune.pooling,
        "max_length": getattr(context.inputs, "max_length", None),
    }
    stage = folder / "phases" / f"fisher-{fingerprint(reads)[:8]}"
    if _share_inputs(stage) != reads:
        fisher, scale = _compute_fisher(context, arm, config, seed, len(rows))

        def commit() -> None:
            metadata = {"kind": config.fisher, "rows": len(rows), "scale": scale}
            with run_folder.commit_stage(stage, reads) as aside:
                save_fisher(fisher, aside / FISHER_FILE, metadata)

        distributed.broadcast_from_main(commit)
    fisher, metadata = load_fisher(stage / FISHER_FILE)
    return fisher, describe_fisher(metadata)


def _compute_fisher(
    context: ExperimentContext, arm: Arm, config: EWC, seed: int, rows: int
) -> tuple[dict[str, Tensor], float]:
    """Return the information of the start model on general rows, and its scale."""
    loaded = _build_start_model(context, arm, seed)
    scale = context.compute_target_scale(seed)
    if scale is not None:
        # The Gaussian of variance 1 is around a standardized target.
        scale.standardize_head(loaded.model)
    loaded.model.to(context.device)
    # The empirical information alone reads labels.
    dataset = build_general_dataset(context, config.fisher == "empirical")

    def get_batch(number: int) -> Batch:
        batch = context.inputs.collate([dict(dataset[number])])
        return move_batch(batch, torch.device(context.device))

    return compute_fisher(
        loaded.model, dict(loaded.encoder.named_parameters()), rows, get_batch, config.fisher, 0,
        LOGIT_KIND_OF_TASK.get(context.prepared.task, "classes"),
    )  # fmt: skip
