"""Advise on a recipe before it runs, with the cost of every strategy; count how advice has done."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hftl import console
from hftl.analysis.advice_facts import AdviceSection
from hftl.analysis.facts import AnalysisSection
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.strategies import STRATEGIES
from hftl.measure.advice_outcome import count_history
from hftl.measure.record import Record
from hftl.pipeline.advice import build_advice
from hftl.pipeline.estimate import estimate_arm, measure_costs

READ_ANALYSES = ("curve", "distance")
"""Analyses in the run folder that rules read."""


def advise_recipe(recipe: Recipe, context: ExperimentContext, folder: Path) -> str:
    """Return what `hftl advise` prints: the advice, and what a seed of every strategy costs.

    Args:
        recipe: what to advise on.
        context: its source and rows.
        folder: the run folder, whose analyses are read where they were made.

    Raises:
        RecipeError: if the recipe has no task.
    """
    if recipe.data.task is None:
        raise RecipeError("data.task is null: advice is about labels", "Give data.task")
    section = build_advice(recipe, context, _read_analyses(folder))
    return console.format_advice(section, _estimate_seconds(recipe, context, section))


def _read_analyses(folder: Path) -> AnalysisSection:
    """Return the analyses that commands have left in a run folder."""
    parts = {name: folder / "analysis" / f"{name}.json" for name in READ_ANALYSES}
    texts = {name: path.read_text("utf-8") for name, path in parts.items() if path.is_file()}
    members = ", ".join(f'"{name}": {text}' for name, text in texts.items())
    return AnalysisSection.model_validate_json(f"{{{members}}}")


def _estimate_seconds(
    recipe: Recipe, context: ExperimentContext, section: AdviceSection
) -> dict[str, float]:
    """Return the seconds that one seed of each forecast strategy trains on this machine."""
    if section.forecast is None:
        return {}
    names = [row.strategy for row in section.forecast.strategies]
    own = recipe.arms[0]
    arms = [
        replace(
            own, name=name, strategy=name, stages=(), retain=None,
            finetune=own.finetune.model_copy(update={"strategy": name}),
        )
        for name in names
        if not STRATEGIES[name].is_solved
    ]  # fmt: skip
    costs = measure_costs(context, arms)
    seconds = {arm.name: estimate_arm(context, arm, recipe, costs).seed for arm in arms}
    return {name: seconds.get(name, 0.0) for name in names}


def summarize_history(runs: Sequence[Path]) -> str:
    """Return what `hftl advise --history` prints: how often advice and forecasts were right."""
    return console.format_history(count_history([Record.read(run) for run in runs]))
