"""Run the analyses of a recipe's frozen features, and write them to its run folder."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml

from hftl.analysis.curve import CurveOptions, compute_curve
from hftl.analysis.domains import compare_domains
from hftl.analysis.facts import CurveAnalysis, DistanceAnalysis, ProbeAnalysis, RankAnalysis
from hftl.analysis.feature_store import FeatureStore
from hftl.analysis.layer_probe import probe_layers
from hftl.analysis.rank import rank_sources
from hftl.analysis.tables import format_curve, format_distance, format_probe, format_rank
from hftl.card.analysis_plots import plot_curve, plot_distance, plot_probe, plot_rank
from hftl.config.overrides import apply_overrides, read_yaml, set_key
from hftl.config.recipe import Recipe
from hftl.data.facts import RecordPart
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.runtime import run_folder
from hftl.runtime.run_folder import to_json

Facts = TypeVar("Facts", bound=RecordPart)
FEATURES = Path("phases") / "features"


@contextmanager
def open_run(folder: Path) -> Iterator[Path]:
    """Create and lock a run folder; yield where the features of its rows are stored."""
    run_folder.create_run_folder(folder)
    with run_folder.lock_run(folder):
        yield folder / FEATURES


def write_analysis(
    folder: Path, name: str, facts: Facts, plot: Callable[[Facts, Path], None]
) -> str:
    """Write an analysis and its plot; return a line that names the files."""
    target = folder / "analysis"
    target.mkdir(exist_ok=True)
    aside = target / f".tmp-{name}.png"
    plot(facts, aside)
    shutil.move(aside, target / f"{name}.png")
    run_folder.write_text(target / f"{name}.json", to_json(facts.to_dict()))
    return f"wrote {target / name}.json, plot {name}.png"


def run_rank(
    recipe: Recipe, folder: Path, sources: list[str], most_rows: int
) -> tuple[RankAnalysis, str]:
    """Rank the recipe's source among others; return the result and what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        facts = rank_sources(recipe, [recipe.source.model, *sources], features, most_rows)
        written = write_analysis(folder, "rank", facts, plot_rank)
    return facts, f"{format_rank(facts)}\n{written}"


def check_task(recipe: Recipe) -> None:
    """Refuse a recipe without labels.

    Raises:
        RecipeError: naming the key.
    """
    if recipe.data.task is None:
        raise RecipeError("data.task is null: this analysis reads labels", "Give data.task")


def run_probe(recipe: Recipe, context: ExperimentContext, folder: Path, most_rows: int) -> str:
    """Probe every layer of the context's encoder; return what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        store = FeatureStore(context, features)
        facts: ProbeAnalysis = probe_layers(recipe, context, store, most_rows)
        return f"{format_probe(facts)}\n{write_analysis(folder, 'probe', facts, plot_probe)}"


def run_curve(
    recipe: Recipe, context: ExperimentContext, folder: Path, options: CurveOptions
) -> str:
    """Score arms against the number of labels; return what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        store = FeatureStore(context, features)
        facts: CurveAnalysis = compute_curve(recipe, context, store, options)
        return f"{format_curve(facts)}\n{write_analysis(folder, 'curve', facts, plot_curve)}"


def run_distance(
    recipe: Recipe, context: ExperimentContext, folder: Path, tables: list[str], most_rows: int
) -> str:
    """Compare the recipe's sets of rows and other tables; return what to print."""
    check_task(recipe)
    with open_run(folder) as features:
        facts: DistanceAnalysis = compare_domains(recipe, context, features, tables, most_rows)
        return (
            f"{format_distance(facts)}\n{write_analysis(folder, 'distance', facts, plot_distance)}"
        )


def write_winner(recipe: Path, overrides: list[str], facts: RankAnalysis, target: Path) -> None:
    """Write the recipe again with the first source, pooled as it is best where that is its end.

    Raises:
        RecipeError: if the file is there already.
    """
    if target.exists():
        raise RecipeError(f"{target} exists", "Choose another name for --write")
    winner = facts.sources[0]
    tree = apply_overrides(read_yaml(recipe), overrides)
    if winner.source != Recipe.load(recipe, overrides).source.model:
        set_key(tree, "source", {"model": winner.source})
    if winner.best.layer == winner.layers and winner.best.pooling in ("native", "mean", "cls"):
        set_key(tree, "finetune.pooling", winner.best.pooling)
    changed = Recipe.parse(tree, str(target))
    assert changed.source.model == winner.source
    run_folder.write_text(target, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
