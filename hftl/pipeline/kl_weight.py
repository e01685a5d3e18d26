"""Choose the weight of KL where a recipe says `auto`: the least forgetting at an equal score.

Each weight of a grid is trained once on the first seed. Of those within one standard error of the
best score on validation, the one that loses the fewest neighbours is taken for all seeds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hftl.analysis.neighbours import mean_shared_neighbours
from hftl.config.recipe import Arm
from hftl.finetune.arm import train_arm
from hftl.finetune.context import ExperimentContext
from hftl.finetune.guard_metrics import score_validation
from hftl.finetune.pretraining_heads import embed_rows
from hftl.finetune.zero_shot import build_start_model
from hftl.measure.statistics import select_within_one_standard_error
from hftl.models.heads import LoadedModel
from hftl.pipeline import weight_grid
from hftl.pipeline.retention import build_retention
from hftl.pipeline.run import Run
from hftl.pipeline.weight_grid import list_selection_rows, set_kl_weight
from hftl.runtime import distributed, run_folder
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import StageInputs, to_json
from hftl.train.facts import ChosenKLWeight, TriedKLWeight


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
    stage = _get_stage(run, arm)
    if not distributed.broadcast_from_main(lambda: is_weight_chosen(run, arm, reads)):
        choice = _try_weights(context, arm, run.recipe.measure.seeds[0], run.folder)

        def commit() -> None:
            with run_folder.commit_stage(stage, reads) as aside:
                run_folder.write_text(aside / "weight.json", to_json(choice.to_dict()))

        distributed.broadcast_from_main(commit)
        weight = f"{choice.weight:g}"
        run.say(f"  {arm.name}: KL weight {weight} forgets least within one standard error")
    return run_folder.read_part(stage / "weight.json", ChosenKLWeight)


def is_weight_chosen(run: Run, arm: Arm, reads: StageInputs) -> bool:
    """Return True if the weight of KL was chosen for the arm as it is."""
    return run_folder.read_stage_inputs(_get_stage(run, arm)) == reads


def _get_stage(run: Run, arm: Arm) -> Path:
    return run.folder / "phases" / f"weight-{arm.name}"


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
    grid = weight_grid.WEIGHT_GRID
    results = [try_weight(weight) for weight in grid]
    columns = [list(column) for column in zip(*results, strict=True)]
    selected = select_within_one_standard_error(*columns)
    return ChosenKLWeight(
        weight=grid[selected],
        tried=[
            TriedKLWeight(weight=weight, score=score, error=error, forgotten=forgotten)
            for weight, (score, error, forgotten) in zip(grid, results, strict=True)
        ],
    )
