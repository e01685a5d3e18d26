"""Compare kinds of Fisher information on linear tasks, where the joint optimum is known.

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
    """Hold inputs, targets with noise of standard deviation `NOISE`, and their true weights."""

    inputs: np.ndarray
    targets: np.ndarray
    truth: np.ndarray
    variances: np.ndarray

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs.T @ self.inputs / ROWS, self.inputs.T @ self.targets / ROWS

    def error(self, weights: np.ndarray) -> float:
        """Return the expected squared error beyond the noise."""
        return float(self.variances @ (weights - self.truth) ** 2)


def draw_tasks(draw: np.random.Generator) -> tuple[Task, Task]:
    """Return a task, and the same with its inputs permuted."""
    variances, truth = np.logspace(-2, 1, WIDTH), draw.normal(size=WIDTH)
    order = draw.permutation(WIDTH)
    pair = []
    for spread, weights in ((variances, truth), (variances[order], truth[order])):
        inputs = draw.normal(size=(ROWS, WIDTH)) * spread**0.5
        targets = inputs @ weights + NOISE * draw.normal(size=ROWS)
        pair.append(Task(inputs, targets, weights, spread))
    return pair[0], pair[1]


def compute_exact(task: Task) -> np.ndarray:
    """Return the mean over rows of the expected squared gradient of a Gaussian log p(y | x)."""
    return (task.inputs**2).mean(0)


def compute_batched(task: Task, draw: np.random.Generator) -> np.ndarray:
    """Return the square of each batch's mean gradient, at targets drawn from the model."""
    each = task.inputs * draw.normal(size=(ROWS, 1))
    return (each.reshape(-1, BATCH, WIDTH).mean(1) ** 2).mean(0)


def fine_tune(new: Task, start: np.ndarray, information: np.ndarray, weight: float) -> np.ndarray:
    """Return the minimum of 1/2 |y - Xw|^2 / n + weight / 2 sum_i F_i (w_i - start_i)^2."""
    hessian, linear = new.moments()
    penalty = weight * information / information.mean()
    return np.linalg.solve(hessian + np.diag(penalty), linear + penalty * start)


@pytest.fixture(scope="module")
def errors() -> dict[str, np.ndarray]:
    """Return the error on both tasks at the best weight, (seeds,), beyond the least possible."""
    results: dict[str, list[float]] = {k: [] for k in ("none", "joint", "exact", "batched", "even")}
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        old, new = draw_tasks(draw)
        start = np.linalg.solve(*old.moments())
        sums = [sum(parts) for parts in zip(old.moments(), new.moments(), strict=True)]

        meant = old.variances * old.truth + new.variances * new.truth
        least = meant / (old.variances + new.variances)

        def both(
            weights: np.ndarray, old: Task = old, new: Task = new, least: np.ndarray = least
        ) -> float:
            return sum(task.error(weights) - task.error(least) for task in (old, new))

        results["joint"].append(both(np.linalg.solve(*sums)))
        results["none"].append(both(np.linalg.solve(*new.moments())))
        kinds = {
            "exact": compute_exact(old),
            "batched": compute_batched(old, draw),
            "even": np.ones(WIDTH),
        }
        for kind, information in kinds.items():
            results[kind].append(min(both(fine_tune(new, start, information, w)) for w in WEIGHTS))
    return {kind: np.array(values) for kind, values in results.items()}


def test_exact_information_is_as_good_as_training_on_both(
    errors: dict[str, np.ndarray],
) -> None:
    assert np.median(errors["none"] / errors["joint"]) > 30
    assert np.median(errors["exact"] / errors["joint"]) < 1
    assert (errors["exact"] < 0.1 * errors["none"]).all()


def test_square_of_batch_means_is_worse(errors: dict[str, np.ndarray]) -> None:
    assert (errors["exact"] < errors["batched"]).all()
    assert np.median(errors["batched"] / errors["exact"]) > 2
    assert (errors["exact"] < errors["even"]).all(), "even is L2-SP, which weighs all alike"
    assert np.median(errors["even"] / errors["batched"]) > 2


def test_square_of_batches_of_one_row_is_exact() -> None:
    draw = np.random.default_rng(0)
    old, _ = draw_tasks(draw)
    each = old.inputs[None] * draw.normal(size=(4000, ROWS, 1))
    rows = (each**2).mean((0, 1))
    np.testing.assert_allclose(rows, compute_exact(old), rtol=0.1)
