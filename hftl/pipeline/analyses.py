"""Run the analyses of a recipe's frozen features, and write them to its run folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import JsonValue

from hftl.analysis.curve import DEFAULT_ARMS, CurveOptions, Predict, compute_curve
from hftl.analysis.domains import compare_domains
from hftl.analysis.facts import (
    CurveAnalysis,
    DistanceAnalysis,
    ProbeAnalysis,
    RankAnalysis,
    RankedSource,
    ShiftAnalysis,
)
from hftl.analysis.feature_store import FeatureStore, build_store_key
from hftl.analysis.layer_probe import CKA_ROWS, PURPOSE, probe_layers
from hftl.analysis.rank import rank_sources
from hftl.analysis.shift import compare_sets
from hftl.analysis.tables import (
    format_curve,
    format_distance,
    format_probe,
    format_rank,
    format_shift,
)
from hftl.card.analysis_plots import plot_curve, plot_distance, plot_probe, plot_rank, plot_shift
from hftl.config.measure import UNLABELLED_ANALYSES
from hftl.config.overrides import apply_overrides, read_yaml, set_key
from hftl.config.recipe import Arm, Recipe
from hftl.data.prepare import hash_data_files
from hftl.data.splits import limit_rows
from hftl.errors import RecipeError, suggest_closest
from hftl.finetune.arm import train_arm
from hftl.finetune.baselines import search_rate, solve_arm, train_scratch
from hftl.finetune.classical import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.source import find_source
from hftl.pipeline.analysis_folder import FEATURES, check_task, open_run, write_analysis
from hftl.pipeline.run import Run
from hftl.pipeline.trained_layers import compare_trained_arms
from hftl.runtime import run_folder
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import SEMANTICS, to_json

LAYOUT = 7
"""Raised when an analysis holds other figures, or computes them otherwise."""
TOKEN_POOLINGS = ("mean", "cls", "cls+mean")
"""Poolings of an encoder's tokens, in the words of `finetune.pooling`."""
PROBE_ROWS, DISTANCE_ROWS, SHIFT_ROWS = 2000, 500, 1000
"""Rows that are read where the run makes the analysis, at most; the commands have an option."""


def run_rank(
    recipe: Recipe, folder: Path, sources: list[str], most_rows: int
) -> tuple[RankAnalysis, str]:
    """Rank the recipe's source among others; return the result and what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        facts = rank_sources(recipe, [recipe.source.model, *sources], features, most_rows)
        written = write_analysis(folder, "rank", facts, plot_rank)
    return facts, f"{format_rank(facts)}\n{written}"


def run_probe(recipe: Recipe, context: ExperimentContext, folder: Path, most_rows: int) -> str:
    """Probe every layer of the context's encoder; return what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        store = FeatureStore(context, features)
        facts: ProbeAnalysis = probe_layers(recipe, context, store, most_rows)
        held, task = context.prepared.rows["validation"], context.prepared.task
        rows = limit_rows(held, CKA_ROWS, task, 0, PURPOSE)
        run, pooling = Run(recipe, folder, lambda line: None), facts.similarity.pooling
        trained = compare_trained_arms(run, context, store, rows, pooling)
        facts = facts.model_copy(update={"trained": trained})
        return f"{format_probe(facts)}\n{write_analysis(folder, 'probe', facts, plot_probe)}"


def run_curve(
    recipe: Recipe, context: ExperimentContext, folder: Path, options: CurveOptions
) -> str:
    """Score arms against the number of labels; return what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        facts = _compute_curve(recipe, context, features, options)
        return f"{format_curve(facts)}\n{write_analysis(folder, 'curve', facts, plot_curve)}"


def run_distance(
    recipe: Recipe, context: ExperimentContext, folder: Path, tables: list[str], most_rows: int
) -> str:
    """Compare the recipe's sets of rows and other tables; return what to print."""
    with open_run(folder) as features:
        facts: DistanceAnalysis = compare_domains(recipe, context, features, tables, most_rows)
        return (
            f"{format_distance(facts)}\n{write_analysis(folder, 'distance', facts, plot_distance)}"
        )


def run_shift(recipe: Recipe, context: ExperimentContext, folder: Path, most_rows: int) -> str:
    """Compare test and unlabelled rows with train; return what to print."""
    with open_run(folder) as features:
        facts: ShiftAnalysis = compare_sets(recipe, context, features, most_rows)
        return f"{format_shift(facts)}\n{write_analysis(folder, 'shift', facts, plot_shift)}"


def _compute_curve(
    recipe: Recipe, context: ExperimentContext, root: Path, options: CurveOptions
) -> CurveAnalysis:
    store = FeatureStore(context, root)
    return compute_curve(recipe, context, store, options, partial(find_curve_arm, recipe, store))


def find_curve_arm(
    recipe: Recipe, store: FeatureStore, name: str, largest: ExperimentContext
) -> Predict:
    """Return the function that trains an arm on a context's rows and predicts test.

    Raises:
        RecipeError: if there is no such arm, or it needs more than a context.
    """
    if name == "head":
        return lambda context, seed: _solve_head(recipe, context, store, seed)
    if name == "classical":
        return lambda context, seed: solve_classical(context, seed).logits["test"]
    arms = {arm.name: arm for arm in recipe.arms}
    if name not in arms:
        raise RecipeError(
            f"--arms: the recipe has no arm {name!r}"
            + suggest_closest(name, [*DEFAULT_ARMS, *arms]),
            f"Use {', '.join(dict.fromkeys([*DEFAULT_ARMS, *arms]))}, or add it to measure.arms",
        )
    arm = arms[name]
    if arm.retain is not None or arm.stages:
        part = "adapt" if arm.stages else "retain"
        raise RecipeError(
            f"--arms: the arm {name!r} has {part}, which a curve does not repeat for every size",
            f"Give the override {part}=null",
        )
    if arm.spec.is_solved:
        return lambda context, seed: solve_arm(context, arm, seed).logits["test"]
    if arm.spec.schedule == "rate_search":
        search = recipe.measure.scratch
        chosen = search_rate(largest, arm.finetune, search, 0)
        return lambda context, seed: train_scratch(
            context, arm.finetune, search, chosen, seed
        ).logits["test"]  # fmt: skip
    return lambda context, seed: _train(context, arm, seed)


def _train(context: ExperimentContext, arm: Arm, seed: int) -> np.ndarray:
    return train_arm(context, arm.finetune, seed, compared=False, splits=("test",)).logits["test"]


def _solve_head(
    recipe: Recipe, context: ExperimentContext, store: FeatureStore, seed: int
) -> np.ndarray:
    """Return the logits of the probe on the features that the recipe's head reads."""
    train, test = context.select_train_rows(seed), context.prepared.rows["test"]
    site = store.find_site(recipe.finetune.pooling)
    features, queries = (
        context.extract_features(recipe.finetune.pooling, seed, rows)
        if site is None
        else store.get(rows, site)
        for rows in (train, test)
    )
    finetune = recipe.finetune
    probe = context.fit_probe_on(features, train, finetune.pooling, finetune.class_weight)
    return probe.logits(queries)


MADE_WITH_RUN: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "probe": (
        lambda recipe, context, root: probe_layers(
            recipe, context, FeatureStore(context, root), PROBE_ROWS
        ),
        plot_probe,
    ),
    "curve": (
        lambda recipe, context, root: _compute_curve(recipe, context, root, CurveOptions()),
        plot_curve,
    ),
    "distance": (
        lambda recipe, context, root: compare_domains(recipe, context, root, [], DISTANCE_ROWS),
        plot_distance,
    ),
    "shift": (
        lambda recipe, context, root: compare_sets(recipe, context, root, SHIFT_ROWS),
        plot_shift,
    ),
}
"""What computes an analysis of `measure.analyses`, and what draws it."""


def make_analyses(run: Run, context: ExperimentContext) -> None:
    """Make the analyses that the recipe names and that are missing, and show them in the run."""
    for name in run.recipe.measure.analyses:
        if name not in UNLABELLED_ANALYSES:
            check_task(run.recipe)
        stage, reads = run.analysis_folder(name), build_analysis_key(run.recipe, context, name)
        compute, plot = MADE_WITH_RUN[name]
        if run_folder.read_stage_inputs(stage) != reads:
            with show_activity(f"analysis: {name}"):
                facts = compute(run.recipe, context, run.folder / FEATURES)
            with run_folder.commit_stage(stage, reads) as aside:
                plot(facts, aside / f"{name}.png")
                (aside / f"{name}.json").write_text(to_json(facts.to_dict()), encoding="utf-8")
        for file in (f"{name}.json", f"{name}.png"):
            (run.folder / "analysis").mkdir(exist_ok=True)
            run_folder.write_bytes(run.folder / "analysis" / file, (stage / file).read_bytes())


def build_analysis_key(
    recipe: Recipe, context: ExperimentContext, name: str
) -> dict[str, JsonValue]:
    """Return all that an analysis depends on."""
    parts = [part for part in ("unlabeled", "general") if getattr(recipe.data, part) is not None]
    return {
        "features": build_store_key(context),
        "rows": context.prepared.facts.fingerprint,
        "others": hash_data_files(recipe.data, context.prepared.modality, parts)
        if name in UNLABELLED_ANALYSES
        else None,
        "metric": recipe.measure.metric,
        "seeds": [*recipe.measure.seeds],
        "pooling": recipe.finetune.pooling,
        "shots": recipe.data.shots,
        "semantics": SEMANTICS,
        "layout": LAYOUT,
    }


def write_winner(recipe: Path, overrides: list[str], facts: RankAnalysis, target: Path) -> None:
    """Write the recipe again with the first source, pooled as it is best where that is its end.

    Raises:
        RecipeError: if the file is there already.
    """
    if target.exists():
        raise RecipeError(f"{target} exists", "Choose another name for --write")
    winner, before = facts.sources[0], Recipe.load(recipe, overrides)
    tree = apply_overrides(read_yaml(recipe), overrides)
    if winner.source != before.source.model:
        set_key(tree, "source", {"model": winner.source})
    source = find_source(Recipe.parse(tree, str(target)).source)
    pooling = _choose_pooling(winner, source.architecture_spec, before.finetune.pooling)
    if pooling != before.finetune.pooling:
        set_key(tree, "finetune.pooling", pooling)
    changed = Recipe.parse(tree, str(target))
    assert changed.source.model == winner.source
    run_folder.write_text(target, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _choose_pooling(winner: RankedSource, spec: ArchitectureSpec, before: str) -> str:
    """Return the pooling at the winner's best site where a head can read that, else the recipe's.

    Pictures without a class token are pooled by the stock class alone, and a prompt is read at its
    last token.
    """
    pools_tokens = spec.modality == "text" or spec.prefix_tokens > 0
    if not spec.reads_prompt and not pools_tokens:
        return "native" if before in TOKEN_POOLINGS else before
    at_end = winner.best.layer == winner.layers and winner.best.pooling in ("native", "mean", "cls")
    return winner.best.pooling if at_end and not spec.reads_prompt else before
