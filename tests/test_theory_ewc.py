"""Which Fisher information keeps an old task: on linear tasks, where the joint optimum is known.

Two regressions whose inputs are each other's, permuted. Fine-tuning on the second under EWC at the
first ends where the normal equations say. By the exact information that is no worse than training
on both; by the square of batch-mean gradients some weights that matter look free (van de Ven 2025,
arXiv:2502.11756, section 4).
"""

from dataclasses import dataclass

import numpy as np
import pytest

WIDTH, ROWS, BATCH, NOISE, SEEDS = 20, 256, 64, 1.0, 40
WEIGHTS = np.logspace(-3, 3, 25)


@dataclass(frozen=True)
class Task:
    """Inputs, answers with noise of standard deviation `NOISE`, and the weights that make them."""

    inputs: np.ndarray
    answers: np.ndarray
    truth: np.ndarray
    variances: np.ndarray

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs.T @ self.inputs / ROWS, self.inputs.T @ self.answers / ROWS

    def error(self, found: np.ndarray) -> float:
        """The expected squared error beyond the noise."""
        return float(self.variances @ (found - self.truth) ** 2)


def tasks(draw: np.random.Generator) -> tuple[Task, Task]:
    """A task, and the same with its inputs permuted."""
    variances, truth = np.logspace(-2, 1, WIDTH), draw.normal(size=WIDTH)
    order = draw.permutation(WIDTH)
    made = []
    for spread, weights in ((variances, truth), (variances[order], truth[order])):
        inputs = draw.normal(size=(ROWS, WIDTH)) * spread**0.5
        answers = inputs @ weights + NOISE * draw.normal(size=ROWS)
        made.append(Task(inputs, answers, weights, spread))
    return made[0], made[1]


def exact(task: Task) -> np.ndarray:
    """The mean over rows of the expected squared gradient of log p(y | x), of a unit Gaussian."""
    return (task.inputs**2).mean(0)


def batched(task: Task, draw: np.random.Generator) -> np.ndarray:
    """The square of each batch's mean gradient, at answers drawn from the model."""
    each = task.inputs * draw.normal(size=(ROWS, 1))
    return (each.reshape(-1, BATCH, WIDTH).mean(1) ** 2).mean(0)


def tuned(new: Task, start: np.ndarray, information: np.ndarray, weight: float) -> np.ndarray:
    """Where fine-tuning ends: 1/2 |y - Xw|^2 / n + weight / 2 sum_i F_i (w_i - start_i)^2."""
    hessian, linear = new.moments()
    penalty = weight * information / information.mean()
    return np.linalg.solve(hessian + np.diag(penalty), linear + penalty * start)


@pytest.fixture(scope="module")
def errors() -> dict[str, np.ndarray]:
    """(seeds,) the error on both tasks together, at the best weight, beyond what no weights can
    undercut, since the tasks are at odds."""
    found: dict[str, list[float]] = {k: [] for k in ("none", "joint", "exact", "batched", "even")}
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        old, new = tasks(draw)
        start = np.linalg.solve(*old.moments())
        sums = [sum(parts) for parts in zip(old.moments(), new.moments(), strict=True)]

        meant = old.variances * old.truth + new.variances * new.truth
        least = meant / (old.variances + new.variances)

        def both(
            weights: np.ndarray, old: Task = old, new: Task = new, least: np.ndarray = least
        ) -> float:
            found = (task.error(weights) - task.error(least) for task in (old, new))
            return sum(found)

        found["joint"].append(both(np.linalg.solve(*sums)))
        found["none"].append(both(np.linalg.solve(*new.moments())))
        kinds = {"exact": exact(old), "batched": batched(old, draw), "even": np.ones(WIDTH)}
        for kind, information in kinds.items():
            found[kind].append(min(both(tuned(new, start, information, w)) for w in WEIGHTS))
    return {kind: np.array(values) for kind, values in found.items()}


def test_by_the_exact_information_ewc_is_as_good_as_training_on_both(
    errors: dict[str, np.ndarray],
) -> None:
    assert np.median(errors["none"] / errors["joint"]) > 30
    assert np.median(errors["exact"] / errors["joint"]) < 1
    assert (errors["exact"] < 0.1 * errors["none"]).all()


def test_the_square_of_batch_means_is_worse(errors: dict[str, np.ndarray]) -> None:
    assert (errors["exact"] < errors["batched"]).all()
    assert np.median(errors["batched"] / errors["exact"]) > 2
    assert (errors["exact"] < errors["even"]).all(), "even is L2-SP, for which weights are alike"
    assert np.median(errors["even"] / errors["batched"]) > 2, "and still it tells something"


def test_of_one_row_a_batch_it_is_the_same_information() -> None:
    draw = np.random.default_rng(0)
    old, _ = tasks(draw)
    each = old.inputs[None] * draw.normal(size=(4000, ROWS, 1))
    rows = (each**2).mean((0, 1))
    np.testing.assert_allclose(rows, exact(old), rtol=0.1)
