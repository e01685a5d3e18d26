"""Solve the solved arms by their name, and train the same architecture from scratch.

Scratch gets a learning rate of its own and a longer budget (He et al. 2019, arXiv:1811.08883),
where validation prefers that, so that the gain is not one over a straw man.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hftl.config.finetune import Finetune
from hftl.config.measure import SEARCH_SHARE, Search
from hftl.config.recipe import Arm
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import NumericError
from hftl.finetune.arm import TrainedModel, fit_model, predict_split, predict_trained
from hftl.finetune.arm_files import (
    WEIGHTS,
    ArmOutput,
    collect_trained_tensors,
    load_trained_tensors,
)
from hftl.finetune.classical import solve_classical
from hftl.finetune.context import ExperimentContext
from hftl.finetune.solved_arms import solve_head, solve_zero_shot
from hftl.finetune.trainable import apply_strategy
from hftl.measure.metrics import METRICS, SELECTION_METRICS, compute_all_metrics
from hftl.models.heads import LoadedModel
from hftl.runtime import run_folder
from hftl.runtime.progress import show_activity
from hftl.runtime.run_folder import read_part, to_json
from hftl.train.facts import ScratchSearch, TrialFacts, TriedRate
from hftl.train.step_checkpoint import CheckpointSpec
from hftl.train.steps import scale_length

TRIAL_FILE = "trial.json"
MAX_EXTRA_RATES = 2
"""Rates that are tried at most beyond those given."""
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Trial:
    """Hold what a learning rate has come to, and the model that it trained; None: it diverged."""

    score: TriedRate
    trained: TrainedModel | None = None


RateAttempt = Callable[[float, float, Callable[[CheckpointSpec | None], Trial]], TriedRate]
"""Returns what a learning rate has come to over a share of the budget, from an earlier attempt or
by making one."""
SOLVERS: dict[str, Callable[[ExperimentContext, Finetune, int], ArmOutput]] = {
    "majority": lambda context, finetune, seed: solve_majority(context, seed),
    "classical": lambda context, finetune, seed: solve_classical(
        context, seed, finetune.class_weight
    ),
    "head": solve_head,
    "zero_shot": solve_zero_shot,
}
"""How the solved strategies and baselines are solved, by name."""


def solve_arm(context: ExperimentContext, arm: Arm, seed: int) -> ArmOutput:
    """Solve an arm whose strategy has the schedule `solved`."""
    return SOLVERS[arm.strategy](context, arm.finetune, seed)


@dataclass(frozen=True)
class _ScratchTrials:
    """Try learning rates of scratch; fields as of `search_rate`."""

    context: ExperimentContext
    finetune: Finetune
    search: Search
    seed: int
    say: Callable[[str], None]
    attempt: RateAttempt

    def try_given_rate(self, rate: float) -> TriedRate:
        """Try one of the recipe's rates over a share of the budget."""
        number, count = self.search.learning_rates.index(rate) + 1, len(self.search.learning_rates)
        return self.try_rate(rate, SEARCH_SHARE, f"rate {rate:.3g} ({number} of {count})")

    def try_rate(self, rate: float, share: float, title: str) -> TriedRate:
        """Return what a rate has come to over a share of the budget."""
        make = partial(self._make_trial, rate, share, f"scratch: {title}")
        return self.attempt(rate, share, make)

    def _make_trial(
        self, rate: float, share: float, title: str, checkpoints: CheckpointSpec | None
    ) -> Trial:
        """Try one rate over a share of the budget; report its score on validation, and seconds."""
        started = time.perf_counter()
        with show_activity(title):
            trial = _score_rate(
                self.context, self.finetune, self.search, rate, share, self.seed, checkpoints
            )
        outcome = _describe_outcome(self.context.prepared.task, trial.score)
        self.say(f"  {title}: {outcome}, {time.perf_counter() - started:.0f} s")
        return trial


def search_rate(
    context: ExperimentContext, finetune: Finetune, search: Search, seed: int,
    say: Callable[[str], None] = lambda line: None,
    attempt: RateAttempt = lambda rate, share, make: make(None).score,
) -> ScratchSearch:  # fmt: skip
    """Try each rate once, the best one over the whole budget, and choose by validation.

    No rate is dropped before its end, however far it is behind: from scratch, scores are those of
    chance until late. On the demo's rows the three rates scored .505, .513 and .535 after three of
    five epochs, and .608, .688 and .670 at the end.

    Where the best is the lowest or highest, the best may lie beyond: the search goes on by the
    grid's own ratio, at most `MAX_EXTRA_RATES` times, each at the cost of one more rate.

    A rate that is best over a third of the budget can be too high for the whole of it. Where the
    whole scores less, longer training made a weaker baseline, and the third is kept. `say` receives
    a line for each that `attempt` makes.

    Raises:
        NumericError: if every rate diverges.
    """
    trials = _ScratchTrials(context, finetune, search, seed, say, attempt)
    tried = [trials.try_given_rate(rate) for rate in search.learning_rates]
    beyond: list[float] = []
    best = _select_rate(context.prepared.task, tried)
    while len(beyond) < MAX_EXTRA_RATES and (rate := propose_rate(tried, best)) is not None:
        title = f"rate {rate:.3g} (added, as {best:.3g} was best, at the end)"
        tried.append(trials.try_rate(rate, SEARCH_SHARE, title))
        beyond.append(rate)
        best = _select_rate(context.prepared.task, tried)
    whole = trials.try_rate(best, 1.0, f"rate {best:.3g} over the whole budget")
    part = next(row for row in tried if row.learning_rate == best)
    return ScratchSearch(
        learning_rate=best,
        share=SEARCH_SHARE if _is_better(context.prepared.task, part, whole) else 1.0,
        at_edge=propose_rate(tried, best) is not None,
        beyond=beyond,
        tried=tried,
        whole=whole,
    )


def try_given_rate(
    context: ExperimentContext, finetune: Finetune, search: Search, rate: float, seed: int,
    say: Callable[[str], None], attempt: RateAttempt,
) -> TriedRate:  # fmt: skip
    """Try one of the recipe's learning rates; arguments as of `search_rate`."""
    return _ScratchTrials(context, finetune, search, seed, say, attempt).try_given_rate(rate)


def propose_rate(tried: list[TriedRate], best: float) -> float | None:
    """Return the rate one step beyond the best where that is the lowest or highest tried; else
    None, as with one rate."""
    rates = sorted({row.learning_rate for row in tried})
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    edge, inner = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
    return float(f"{edge * edge / inner:.6g}")


def _score_rate(
    context: ExperimentContext, finetune: Finetune, search: Search, rate: float, share: float,
    seed: int, checkpoints: CheckpointSpec | None,
) -> Trial:  # fmt: skip
    """Return one rate's metrics on validation; None where it diverged: others may not."""
    task, rows = context.prepared.task, context.prepared.rows["validation"]
    budget = _scale_budget(finetune, rate, search.epochs_factor * share)
    built = _build_scratch(context, budget, seed)
    try:
        trained = fit_model(context, built, budget, seed, checkpoints=checkpoints)
    except NumericError as error:
        return Trial(TriedRate(learning_rate=rate, metrics=None, diverged=error.what))
    logits = predict_split(context, trained.built, trained.scale, "validation")
    predictions = context.prepared.decode_for_metrics(rows, logits)
    metrics = compute_all_metrics(task, context.prepared.encode_for_metrics(rows), predictions)
    return Trial(TriedRate(learning_rate=rate, metrics=metrics), trained)


def _describe_outcome(task: str, row: TriedRate) -> str:
    """Return the score that a rate is chosen by, in words."""
    if row.metrics is None:
        return "diverged"
    name = SELECTION_METRICS[task]
    return f"validation {name} {row.metrics[name]:.3f}"


def _select_rate(task: str, tried: list[TriedRate]) -> float:
    """Return the rate that is best on validation; of equals the first tried."""
    best = tried[0]
    for row in tried[1:]:
        best = row if _is_better(task, row, best) else best
    if _rank_score(task, best) == -np.inf:
        raise NumericError("scratch diverged at every rate", "Lower measure.scratch.learning_rates")
    return best.learning_rate


def _is_better(task: str, row: TriedRate, other: TriedRate) -> bool:
    """Return True if a training scored more on validation than another."""
    return _rank_score(task, row) > _rank_score(task, other)


def _rank_score(task: str, row: TriedRate) -> float:
    """Return the score on validation, higher is better; -inf where it diverged."""
    name = SELECTION_METRICS[task]
    value = None if row.metrics is None else row.metrics[name]
    return -np.inf if value is None else METRICS[task][name].sign * value


def train_scratch(
    context: ExperimentContext, finetune: Finetune, search: Search, chosen: ScratchSearch,
    seed: int, checkpoints: CheckpointSpec | None = None,
) -> ArmOutput:  # fmt: skip
    """Train the source's architecture from its own initialisation, as the search has chosen."""
    budget = _scale_budget(finetune, chosen.learning_rate, search.epochs_factor * chosen.share)
    built = _build_scratch(context, budget, seed)
    trained = fit_model(context, built, budget, seed, checkpoints=checkpoints)
    return predict_trained(context, trained, compared=False)


def predict_trial(
    context: ExperimentContext, finetune: Finetune, seed: int, folder: Path
) -> ArmOutput:
    """Predict with the model of a trial, which is what `train_scratch` would train for its seed."""
    built = _build_scratch(context, _scale_budget(finetune, 1.0, 1.0), seed)
    load_trained_tensors(built.model, folder / WEIGHTS)
    tried = read_part(folder / TRIAL_FILE, TrialFacts)
    if tried.training is None:
        raise RuntimeError(f"{folder}: the chosen trial diverged")
    scale = context.compute_target_scale(seed)
    trained = TrainedModel(built, scale, tried.training, tried.timings)
    return predict_trained(context, trained, compared=False)


def write_trial(folder: Path, trial: Trial, energy: Mapping[str, float]) -> None:
    """Write a trial's score, and its model, with what it spent, for `predict_trial`."""
    facts, trained = TrialFacts(score=trial.score), trial.trained
    if trained is not None:
        save_file(collect_trained_tensors(trained.built), folder / WEIGHTS)
        timings = {**trained.timings, **energy}
        facts = facts.model_copy(update={"training": trained.facts, "timings": timings})
    run_folder.write_text(folder / TRIAL_FILE, to_json(facts.to_dict()))


def read_trial_score(folder: Path) -> TriedRate:
    """Read the score of a trial that `write_trial` wrote."""
    return read_part(folder / TRIAL_FILE, TrialFacts).score


def solve_majority(context: ExperimentContext, seed: int) -> ArmOutput:
    """Predict train's most frequent label, or mean target, for every row or word."""
    targets = context.prepared.encode_targets(context.select_train_rows(seed))
    if context.prepared.task == "regression":
        constant = np.array([targets.mean()])
    elif context.prepared.task == "multi-label":
        share = np.clip(targets.mean(0), 1e-6, 1 - 1e-6)
        constant = np.log(share / (1 - share))
    else:
        constant = np.log(np.maximum(np.bincount(targets, minlength=context.num_outputs), 1e-12))
    sizes = {
        split: sum(context.prepared.count_words(context.prepared.rows[split]))
        for split in MEASURED_SPLITS
    }
    logits = {split: np.tile(constant, (size, 1)) for split, size in sizes.items()}
    return ArmOutput(logits, {"constant": torch.from_numpy(constant)}, 0)


def _scale_budget(finetune: Finetune, rate: float, factor: float) -> Finetune:
    """Return scratch's own training: everything at one rate, and never stopped early."""
    training = {"warmup_steps": WARMUP_SHARE, **finetune.training, "learning_rate": rate}
    # The statistics of random weights are those of no data.
    own = {
        "strategy": "full", "training": scale_length(training, factor), "freeze_batchnorm": False,
    }  # fmt: skip
    unset = dict.fromkeys(("patience", "layer_decay", "lr"))
    return finetune.model_copy(update=own | unset)


def _build_scratch(context: ExperimentContext, finetune: Finetune, seed: int) -> LoadedModel:
    """Build the source's architecture with random weights of the seed, all of which train."""
    built = context.build_model(finetune.pooling, seed, scratch=True)
    apply_strategy(built.model, finetune)
    return built
