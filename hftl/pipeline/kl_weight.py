"""Choose the weight of KL where a recipe says `auto`: the least forgetting at an equal score.

Each weight of a grid is trained once on the first seed. Of those within one standard error of the
best score on validation, the one that loses the fewest neighbours is taken for all seeds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hftl.analysis.neighbours import mean_shared_neighbours
from hftl.config.recipe import Arm
from hftl.config.retain import Retain
from hftl.data.rows import Row
from hftl.finetune.arm import train_arm
from hftl.finetune.context import ExperimentContext
from hftl.finetune.guard_metrics import score_validation
from hftl.finetune.pretraining_heads import embed_rows
from hftl.finetune.zero_shot import build_start_model
from hftl.measure.statistics import select_within_one_standard_error
from hftl.models.heads import LoadedModel
from hftl.pipeline.retention import build_retention
from hftl.pipeline.run import Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, to_json
from hftl.train.facts import ChosenKLWeight, TriedKLWeight

WEIGHT_GRID = (0.03, 0.1, 0.3, 1.0)
MAX_SELECTION_ROWS = 1000
"""Rows whose neighbours measure forgetting, at most."""


def has_auto_weight(retain: Retain | None) -> bool:
    """Return True if a weight of KL is still to be chosen."""
    return retain is not None and any(kl.weight == "auto" for kl in retain.kl_terms)


def set_kl_weight(retain: Retain, weight: float) -> Retain:
    """Return the section with a number for every weight that was to be chosen."""
    terms = [
        kl.model_copy(update={"weight": weight}) if kl.weight == "auto" else kl
        for kl in retain.kl_terms
    ]
    return retain.model_copy(update={"kl": terms})


def choose_kl_weight(
    run: Run, context: ExperimentContext, arm: Arm, reads: StageInputs
) -> ChosenKLWeight:
    """Return the weight of KL and what was tried, chosen once for all seeds. Collective.

    Args:
        run: its folder keeps the choice.
        context: the arm's.
        arm: with a weight that is to be chosen.
        reads: what the arm depends on, and so does the choice.
    """
    stage = run.folder / "phases" / f"weight-{arm.name}"
    if distributed.broadcast_from_main(lambda: run_folder.read_stage_inputs(stage)) != reads:
        choice = _try_weights(context, arm, run.recipe.measure.seeds[0], run.folder)

        def commit() -> None:
            with run_folder.commit_stage(stage, reads) as aside:
                run_folder.write_text(aside / "weight.json", to_json(choice.to_dict()))

        distributed.broadcast_from_main(commit)
        weight = f"{choice.weight:g}"
        run.say(f"  {arm.name}: KL weight {weight} forgets least within one standard error")
    return run_folder.read_part(stage / "weight.json", ChosenKLWeight)


def _try_weights(context: ExperimentContext, arm: Arm, seed: int, folder: Path) -> ChosenKLWeight:
    """Train the arm with each weight, and predict validation alone: the test chooses nothing."""
    retain, rows = arm.retain, list_selection_rows(context)
    assert retain is not None
    start = build_start_model(context, arm.finetune, seed)
    before = embed_rows(context, start, rows)

    def measure_lost_neighbours(trained: LoadedModel) -> float:
        after = embed_rows(context, trained, rows)
        return distributed.broadcast_from_main(lambda: 1 - mean_shared_neighbours(before, after))

    def try_weight(weight: float) -> tuple[float, float, float]:
        weighted = replace(arm, retain=set_kl_weight(retain, weight))
        retention = build_retention(context, weighted, seed, folder)
        with show_activity(f"KL weight {weight:g}"):
            output = train_arm(
                context, arm.finetune, seed, retention, compared=False, splits=("validation",),
                measure_forgetting=measure_lost_neighbours,
            )  # fmt: skip
        score, error = score_validation(context, output.logits["validation"])
        assert output.facts.forgotten is not None
        return score, error, output.facts.forgotten

    return select_kl_weight(try_weight)


def select_kl_weight(try_weight: Callable[[float], tuple[float, float, float]]) -> ChosenKLWeight:
    """Try the grid, and select the least forgetting within one standard error of the best score.

    Args:
        try_weight: returns the score on validation, more is better, its standard error, and how
            much was forgotten.
    """
    results = [try_weight(weight) for weight in WEIGHT_GRID]
    columns = [list(column) for column in zip(*results, strict=True)]
    selected = select_within_one_standard_error(*columns)
    return ChosenKLWeight(
        weight=WEIGHT_GRID[selected],
        tried=[
            TriedKLWeight(weight=weight, score=score, error=error, forgotten=forgotten)
            for weight, (score, error, forgotten) in zip(WEIGHT_GRID, results, strict=True)
        ],
    )


def list_selection_rows(context: ExperimentContext) -> list[Row]:
    """Return the rows by which a weight is chosen.

    These are general rows that training may read, or else the validation rows: the general rows
    that measure forgetting must choose nothing.
    """
    general = context.general
    rows = context.prepared.rows["validation"] if general is None else general.train_rows
    return rows[:MAX_SELECTION_ROWS]
