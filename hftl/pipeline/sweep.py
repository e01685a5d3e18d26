"""Run the sweep of learning rates: keep every training in the run folder, and write the winner."""

from pathlib import Path

import numpy as np
import yaml
from pydantic import JsonValue
from safetensors.numpy import load_file, save_file

from hftl.analysis.layer_rates import apply_setting
from hftl.analysis.sweep import CHOOSING, HELD, SweepOptions, sweep_rates
from hftl.analysis.sweep_facts import RateSetting, SweepAnalysis
from hftl.analysis.tables import format_sweep
from hftl.card.analysis_plots import plot_sweep
from hftl.config.overrides import apply_overrides, read_yaml, set_key
from hftl.config.recipe import Recipe
from hftl.data.splits import hash_row
from hftl.errors import NumericError, RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.context import ExperimentContext
from hftl.pipeline.analysis_folder import check_task, open_run, write_analysis
from hftl.runtime import run_folder
from hftl.runtime.run_folder import SEMANTICS, fingerprint

TRIALS = Path("phases") / "sweep"
LOGITS = "logits.safetensors"


def run_sweep(
    recipe: Recipe, context: ExperimentContext, folder: Path, options: SweepOptions
) -> tuple[SweepAnalysis, str]:
    """Search learning rates by layer; return the result and what to print.

    Raises:
        RecipeError: if the recipe's own arm is solved, or needs more than a context.
    """
    check_task(recipe)
    arm = recipe.arms[0]
    if not arm.spec.changes_encoder:
        raise RecipeError(
            f"finetune.strategy={arm.strategy} is solved, and has no learning rates",
            "Sweep a recipe with lora, partial, gradual or full",
        )
    if arm.retain is not None or arm.stages:
        part = "adapt" if arm.stages else "retain"
        raise RecipeError(
            f"the recipe has {part}, which a sweep does not repeat for every setting",
            f"Give the override {part}=null, and keep the winner's rates",
        )
    with open_run(folder):
        trials = TrialStore(recipe, folder / TRIALS)
        facts = sweep_rates(recipe, context, options, trials.train)
        written = write_analysis(folder, "sweep", facts, plot_sweep)
    return facts, f"{format_sweep(facts)}\n{written}"


class TrialStore:
    """Train settings, each once in a run folder: an interrupted sweep goes on.

    Args:
        recipe: its strategy and training.
        root: where the predictions of every training are.
    """

    def __init__(self, recipe: Recipe, root: Path) -> None:
        self._finetune = recipe.finetune
        self._root = root

    def train(
        self, context: ExperimentContext, setting: RateSetting, share: float, seed: int
    ) -> dict[str, np.ndarray] | None:
        """Return the logits of both halves of validation; None where training diverged."""
        finetune = apply_setting(self._finetune, setting, share)
        reads: dict[str, JsonValue] = {
            "finetune": finetune.model_dump(mode="json"),
            "seed": seed,
            "shots": context.shots,
            "augment": context.augment,
            "weights": context.weights_hash,
            "config": context.config_hash,
            "preprocessing": context.preprocessing_hash,
            "data": context.prepared.facts.fingerprint,
            "halves": [
                fingerprint([hash_row(row).hex() for row in context.prepared.rows[half]])
                for half in (CHOOSING, HELD)
            ],
            "semantics": SEMANTICS,
        }
        stage = self._root / fingerprint(reads)[:16]
        if run_folder.read_stage_inputs(stage) != reads:
            logits: dict[str, np.ndarray] = {}
            try:
                logits = train_arm(
                    context, finetune, seed, compared=False, splits=(CHOOSING, HELD)
                ).logits
            except NumericError:
                # Kept empty: it would diverge again.
                pass
            with run_folder.commit_stage(stage, reads) as aside:
                save_file(
                    {k: np.ascontiguousarray(v, np.float32) for k, v in logits.items()},
                    aside / LOGITS,
                )
        return load_file(stage / LOGITS) or None


def write_rates(recipe: Path, overrides: list[str], facts: SweepAnalysis, target: Path) -> None:
    """Write the recipe again with the learning rates of the winner."""
    setting = facts.get_setting(facts.winner)
    tree = apply_overrides(read_yaml(recipe), overrides)
    set_key(tree, "finetune.training.learning_rate", setting.learning_rate)
    rates = {"embeddings": setting.embeddings, "head": setting.head}
    own: dict[str, object] = {name: rate for name, rate in rates.items() if rate is not None}
    if setting.blocks is not None:
        own["blocks"] = [*setting.blocks]
    set_key(tree, "finetune.layer_decay", setting.layer_decay)
    set_key(tree, "finetune.lr", own or None)
    changed = Recipe.parse(tree, str(target))
    assert changed.finetune.layer_decay == setting.layer_decay
    run_folder.write_text(target, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
