"""What keeps an arm near its original, made ready: what is found once is kept as a phase."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hftl.config.recipe import Arm, Recipe
from hftl.config.retain import Retain
from hftl.data.general import check_general_labels
from hftl.errors import RecipeError
from hftl.finetune.arm import init_head_from_probe, train_arm
from hftl.finetune.context import ExperimentContext
from hftl.finetune.retention import (
    LOGIT_KIND_OF_TASK,
    FisherResult,
    RegularizerSetup,
    build_general_dataset,
    build_regularizers,
    check_retention,
    embed_selection_rows,
    has_auto_weight,
    measure_lost_neighbours,
    measure_probe_quality,
    score_validation,
    select_kl_weight,
    set_kl_weight,
)
from hftl.finetune.targets import compute_target_scale
from hftl.models.heads import LoadedModel
from hftl.models.source import SourceModel
from hftl.pipeline.cache_keys import SEMANTICS
from hftl.retain.fisher import compute_fisher, describe_fisher, load_fisher, save_fisher
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import fingerprint, to_json
from hftl.runtime.progress import show_activity

FISHER_FILE = "fisher.safetensors"


def prepare_retention(
    bench: ExperimentContext,
    arm: Arm,
    seed: int,
    seeds: list[int],
    folder: Path,
    reads: dict[str, Any],
    say: Callable[[str], None],
) -> RegularizerSetup:
    """What keeps one training of an arm near its original.

    Args:
        bench: what the arm works with.
        arm: with its `retain`.
        seed: of this training.
        seeds: of all; a weight that is to be chosen is chosen on the first.
        folder: of the run.
        reads: what the arm reads, which the choice depends on.
        say: receives a line about a choice.
    """
    if arm.retain is None:
        return RegularizerSetup()
    retain = arm.retain
    facts = _describe_probe(bench, arm, seed, say)
    if has_auto_weight(retain):
        facts["kl_weight"] = _load_kl_weight(bench, arm, seeds[0], folder, reads, say)
        retain = set_kl_weight(retain, facts["kl_weight"]["weight"])
    kept = _build_setup(bench, arm, retain, seed, folder)
    return replace(kept, facts=kept.facts | facts)


def check_recipe_retention(recipe: Recipe, source: SourceModel) -> None:
    """Refuses what cannot keep an arm near its original, before a row is read.

    Raises:
        RecipeError: see `check_retention`; of an arm that is not the recipe's own, naming it.
    """
    for number, arm in enumerate(recipe.arms):
        try:
            check_retention(arm, source, str(recipe.data.task))
        except RecipeError as error:
            if number == 0:
                raise
            # What stands in the recipe may be right for its own arm.
            raise RecipeError(f"measure.arms.{arm.name}: {error.what}", error.fix) from None


def reads_general_labels(recipe: Recipe) -> bool:
    """Whether an arm learns from labels of general data."""
    return any(
        arm.retain is not None and arm.retain.reads_general_labels for arm in recipe.arms
    )


def check_replay_labels(recipe: Recipe, bench: ExperimentContext) -> None:
    """Refuses general data that an arm learns from by labels which the task has not.

    Raises:
        DataError: see `check_labels`.
    """
    if reads_general_labels(recipe):
        assert bench.general is not None
        check_general_labels(bench.general, bench.label_column, bench.prepared.names)


def _describe_probe(
    bench: ExperimentContext, arm: Arm, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """What the record tells of the head that KL is taken on; a weak one is told at once."""
    assert arm.retain is not None
    found = measure_probe_quality(bench, arm.retain, arm.finetune, seed)
    if found is None:
        return {}
    if found.is_weak:
        say(
            f"  warning: {arm.name} seed {seed}: kl.on=probe holds on to a head that says little "
            f"of the labels (loss {found.loss:.3f} on train, {found.shares:.3f} by their shares "
            "alone); consider retain.kl.on=relational"
        )
    return {"head_opinion": asdict(found) | {"weak": found.is_weak}}


def _build_setup(
    bench: ExperimentContext, arm: Arm, retain: Retain, seed: int, folder: Path,
    look: Callable[[LoadedModel], float] | None = None,
) -> RegularizerSetup:  # fmt: skip
    def original(before: ExperimentContext) -> nn.Module:
        return _build_start_model(before, arm, seed).model

    found = build_regularizers(
        bench,
        retain,
        arm.finetune,
        seed,
        lambda: _load_or_compute_fisher(bench, arm, retain, seed, folder),
        original,
    )
    return replace(found, look=look)


def _build_start_model(bench: ExperimentContext, arm: Arm, seed: int) -> LoadedModel:
    """The model that training starts from, with the probe as its head."""
    built = bench.build_model(arm.finetune.pooling, seed)
    init_head_from_probe(bench, built, arm.finetune.pooling, seed)
    return built


def _load_kl_weight(
    bench: ExperimentContext, arm: Arm, seed: int, folder: Path, reads: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The weight of KL, chosen once for all seeds, and what it was chosen from."""
    assert arm.retain is not None
    retain, place = arm.retain, folder / "phases" / f"weight-{arm.name}"
    before = embed_selection_rows(bench, _build_start_model(bench, arm, seed))

    def tried(weight: float) -> tuple[float, float, float]:
        kept = _build_setup(
            bench, arm, set_kl_weight(retain, weight), seed, folder,
            lambda built: measure_lost_neighbours(bench, before, built),
        )  # fmt: skip
        with show_activity(f"KL weight {weight:g}"):
            outcome = train_arm(bench, arm.finetune, seed, kept)
        score, error = score_validation(bench, outcome.logits["validation"])
        return score, error, outcome.facts["forgotten"]

    stands = distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(place))
    if stands != reads:
        found = select_kl_weight(tried)

        def keep() -> None:
            with run_folder.commit_stage(place, reads) as aside:
                run_folder.write_text(aside / "weight.json", to_json(found))

        distributed.broadcast_from_main(keep)
        say(f"  {arm.name}: KL weight {found['weight']:g} forgets least within one standard error")
    return json.loads((place / "weight.json").read_text("utf-8"))


def _load_or_compute_fisher(
    bench: ExperimentContext, arm: Arm, retain: Retain, seed: int, folder: Path
) -> FisherResult:
    """The Fisher information at the original, on general rows, kept for all arms that read it; and
    where it comes from."""
    ewc, general = retain.ewc, bench.general
    assert ewc is not None and general is not None
    rows = general.train_rows[: ewc.samples]
    reads = {
        "semantics": SEMANTICS,
        "weights": bench.weights_hash,
        "general": general.facts["fingerprint"],
        "kind": ewc.fisher,
        "rows": len(rows),
        # The head that the classes are told by is the seed's; features have none.
        "head": None if ewc.fisher == "features" else [arm.finetune.pooling, seed],
        "pooling": arm.finetune.pooling,
        "max_length": getattr(bench.inputs, "max_length", None),
    }
    place = folder / "phases" / f"fisher-{fingerprint(reads)[:8]}"
    if distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(place)) != reads:
        built = _build_start_model(bench, arm, seed)
        if (targets := compute_target_scale(bench, seed)) is not None:
            # The Gaussian of variance 1 is around a standardised target.
            targets.standardize_head(built.model)
        built.model.to(bench.device)
        # A label is looked at by the empirical information alone.
        examples = build_general_dataset(bench, ewc.fisher == "empirical")
        found, scale = compute_fisher(
            built.model, dict(built.encoder.named_parameters()), len(rows),
            lambda number: _collate_row(bench, examples[number]), ewc.fisher, 0,
            LOGIT_KIND_OF_TASK.get(bench.prepared.task, "classes"),
        )  # fmt: skip

        def keep() -> None:
            told = {"kind": ewc.fisher, "rows": len(rows), "scale": scale}
            with run_folder.commit_stage(place, reads) as aside:
                save_fisher(found, aside / FISHER_FILE, told)

        distributed.broadcast_from_main(keep)
    information, told = load_fisher(place / FISHER_FILE)
    return information, describe_fisher(told)


def _collate_row(bench: ExperimentContext, row: Any) -> dict[str, Any]:
    """A batch of one row, on the device."""
    batch = bench.inputs.collate([dict(row)])
    return {k: v.to(bench.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
