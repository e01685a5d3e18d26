"""Hold a run in progress, and what its stages hand to each other."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hftl.adapt.guard import AdaptationFacts
from hftl.analysis.facts import AnalysisSection
from hftl.config.recipe import Arm, Recipe
from hftl.finetune.context import ExperimentContext
from hftl.publish.reload_process import WaitingReload
from hftl.runtime.run_folder import read_part
from hftl.train.facts import ScratchSearch

ArmContexts = dict[str, ExperimentContext]
"""What each arm works with, by its name: the source as it is, or adapted."""


@dataclass(frozen=True)
class Run:
    """Hold one run in progress: the recipe, its folder, and the function that reports progress.

    `waiting` is a process that waits to check the reload, where one was prepared.
    """

    recipe: Recipe
    folder: Path
    say: Callable[[str], None]
    waiting: WaitingReload | None = None

    @property
    def arms(self) -> list[Arm]:
        """Return the recipe's arms, its own first."""
        return self.recipe.arms

    def arm_folder(self, name: str, seed: int) -> Path:
        """Return the folder of an arm's files."""
        return self.folder / "arms" / f"{name}-seed{seed}"

    def checkpoints(self, name: str, seed: int) -> Path:
        """Return the folder of an unfinished arm's checkpoints."""
        return self.folder / "checkpoints" / f"{name}-seed{seed}"

    def analysis_folder(self, name: str) -> Path:
        """Return the folder of a finished analysis."""
        return self.folder / "phases" / f"analysis-{name}"

    def read_analyses(self) -> AnalysisSection | None:
        """Return the analyses that the recipe names; None where it names none."""
        names = self.recipe.measure.analyses
        parts = {
            name: json.loads((self.analysis_folder(name) / f"{name}.json").read_text("utf-8"))
            for name in names
        }
        return AnalysisSection.model_validate(parts) if parts else None

    def read_scratch_search(self) -> ScratchSearch:
        """Return the finished search of scratch's learning rate."""
        path = self.folder / "phases" / "search" / "search.json"
        return read_part(path, ScratchSearch)


@dataclass(frozen=True)
class FinishedStage:
    """Hold one finished adaptation; the next one starts from `context`."""

    context: ExperimentContext
    facts: AdaptationFacts
    folder: Path
