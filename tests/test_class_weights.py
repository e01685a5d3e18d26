"""Check class weights and focal loss against definitions, torch and scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bench_of, sentences, write_csv
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from support.training import (
    GeneralRows,
    Rows,
    assert_same_parameters,
    assert_same_step,
    build_classifier,
    build_probed_model,
    build_trainer,
    run_first_step,
    stack_rows,
    watch_batches,
)
from transformers import AutoModelForSequenceClassification

from hftl.analysis.probe import fit_probe
from hftl.config.overrides import apply_overrides
from hftl.config.recipe import Recipe
from hftl.data.class_weights import ClassWeights, compute_class_weights, describe_class_weights
from hftl.errors import RecipeError
from hftl.finetune.arm import train_arm
from hftl.finetune.classical import solve_classical
from hftl.finetune.solved_arms import solve_head
from hftl.pipeline.pipeline import check_recipe, run
from hftl.train.loss import compute_summed_loss, sum_items
from hftl.train.weight_arguments import build_weighting
from hftl.train.weighted_loss import LossWeighting

pytestmark = pytest.mark.usefixtures("fast_reload")

WEIGHTS = [0.3, 2.0, 5.0]
ROWS = Rows().labels.numpy()


def weigh(gamma: float = 0.0, weights: Any = WEIGHTS, negative: Any = None) -> LossWeighting:
    positive, others = (None if w is None else torch.tensor(w) for w in (weights, negative))
    return LossWeighting(positive, others, gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_loss_and_gradient_of_classes_are_the_definition(
    gamma: float, smoothing: float, weights: Any
) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 4, 3)).requires_grad_()
    labels = torch.tensor([[0, 2, -100, 1], [1, -100, 0, 2]])
    weighting = weigh(gamma, weights)
    terms, total = [], 0.0
    for i, j in np.ndindex(2, 4):
        label = int(labels[i, j])
        if label < 0:
            continue
        p, w = logits[i, j].double().softmax(-1), weights or [1.0] * 3
        own = [w[c] * (1 - p[c]) ** gamma * -p[c].log() for c in range(3)]
        terms.append((1 - smoothing) * own[label] + smoothing * sum(own) / 3)
        total += w[label]
    loss = compute_summed_loss(logits, labels, smoothing, weighting=weighting)
    expected = torch.stack(terms).sum()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert sum_items(labels, weighting).item() == pytest.approx(total)
    if not gamma and weights:
        mean = F.cross_entropy(
            logits.reshape(-1, 3), labels.reshape(-1), torch.tensor(weights),
            label_smoothing=smoothing,
        )  # fmt: skip
        torch.testing.assert_close(loss / sum_items(labels, weighting), mean)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_loss_and_gradient_of_labels_are_the_definition(gamma: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 3)).requires_grad_()
    labels = torch.tensor([[0, 1, 1], [1, 0, 0], [torch.nan] * 3, [0, 0, 1.0]])
    negative = [1.5, 0.5, 1.0]
    weighting = weigh(gamma, WEIGHTS, negative)
    terms, total = [], 0.0
    for i, c in np.ndindex(4, 3):
        if labels[i, c].isnan():
            continue
        p = logits[i, c].double().sigmoid()
        p, w = (p, WEIGHTS[c]) if labels[i, c] else (1 - p, negative[c])
        terms.append(w * (1 - p) ** gamma * -p.log())
        total += w
    loss, expected = (
        compute_summed_loss(logits, labels, weighting=weighting),
        torch.stack(terms).sum(),
    )
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert sum_items(labels, weighting).item() == pytest.approx(total)
    known = [0, 1, 3]
    stock = F.binary_cross_entropy_with_logits(
        logits[known], labels[known], pos_weight=torch.tensor(WEIGHTS), reduction="sum"
    )
    by_hand = weigh(0.0, WEIGHTS, [1.0] * 3)
    torch.testing.assert_close(compute_summed_loss(logits, labels, weighting=by_hand), stock)


@pytest.mark.parametrize("gamma", [0.1, 2.0])
def test_certain_logits_have_finite_gradients(gamma: float) -> None:
    for labels in (torch.tensor([0, 1]), torch.tensor([[1.0, 0, 0], [0, 1, 0]])):
        logits = torch.tensor([[500.0, -500, -500], [500, -500, 0]], requires_grad=True)
        loss = compute_summed_loss(logits, labels, weighting=weigh(gamma, None))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss > 900 and gradient.isfinite().all() and gradient[1].any()


def test_balanced_weights_are_scikit_learns() -> None:
    targets, names = np.array([0, 1, 1, 1, 3, 3, 3, 3, 3, 3]), list("abcd")
    weights = compute_class_weights("balanced", targets, names)
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=targets)
    np.testing.assert_allclose(weights.positive[[0, 1, 3]], expected)
    assert weights.positive[2] == 1 and weights.weigh(targets).sum() == pytest.approx(10)
    several = np.array([[1, 0], [0, 0], [0, 0], [1, 0.0]])
    weights = compute_class_weights("balanced", several, ["a", "b"])
    assert weights is not None and weights.negative is not None
    assert weights.positive.tolist() == [1, 1] and weights.negative.tolist() == [1, 1]
    several[0, 0] = 0
    facts = describe_class_weights("balanced", several, ["a", "b"]).class_weights
    assert facts is not None and facts.counts == {"a": 1, "b": 0}
    assert facts.weights["a"] == 2 and facts.negative == {"a": pytest.approx(2 / 3), "b": 1}


@pytest.mark.parametrize(("gamma", "smoothing"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.2)])
def test_step_is_the_weighted_mean_however_it_is_cut(
    gamma: float, smoothing: float, bert: Path, tmp_path: Path
) -> None:
    steps, more = [], {"class_weight": WEIGHTS, "focal_gamma": gamma}
    batches: list[Any] = []
    for size, accumulated in ((8, 1), (2, 4)):
        trainer = build_trainer(
            build_probed_model(bert, "full"), tmp_path, more=more,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        watch_batches(trainer, batches.append)
        steps.append(run_first_step(trainer))
    assert_same_step(*steps)
    model, whole = build_probed_model(bert, "full").eval(), batches[0]
    logits = model(whole["input_ids"], whole["attention_mask"]).logits
    labels, weights = whole["labels"], torch.tensor(WEIGHTS)
    if gamma:
        p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
        expected = (weights[labels] * (1 - p) ** gamma * -p.log()).sum() / weights[labels].sum()
    else:
        expected = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_step(steps[0], (expected.item(), gradients))


def test_accumulation_does_not_change_a_short_last_step(bert: Path, tmp_path: Path) -> None:
    """Use weights whose sum is below 1, which a count of elements never is."""
    models = []
    for size, accumulated in ((16, 1), (4, 4)):
        models.append(build_classifier(bert, "full"))
        build_trainer(
            models[-1], tmp_path, more={"class_weight": [0.001, 0.02, 0.003], "focal_gamma": 1.0},
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
        ).train()  # fmt: skip
    assert_same_parameters(*models, atol=1e-6)


def test_weights_leave_the_mean_over_general_rows(bert: Path, tmp_path: Path) -> None:
    batches: list[Any] = []
    more = {"general_dataset": GeneralRows(), "general_weight": 0.7, "class_weight": WEIGHTS}
    trainer = build_trainer(build_probed_model(bert, "full"), tmp_path, [], more)
    watch_batches(trainer, batches.append)
    step, whole = run_first_step(trainer), batches[0]
    model, general = build_probed_model(bert, "full").eval(), whole["general"]
    logits, labels = model(whole["input_ids"], whole["attention_mask"]).logits, whole["labels"]
    own = F.cross_entropy(logits[~general], labels[~general], torch.tensor(WEIGHTS))
    expected = own + 0.7 * F.cross_entropy(logits[general], labels[general])
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_step(step, (expected.item(), gradients))


def test_evaluation_loss_is_the_weighted_mean(bert: Path, tmp_path: Path) -> None:
    model = build_classifier(bert, "full")
    trainer = build_trainer(
        model, tmp_path, more={"class_weight": "balanced", "eval_dataset": Rows(10)},
        per_device_eval_batch_size=3,
    )  # fmt: skip
    batch = stack_rows(24)
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=ROWS)
    with torch.no_grad():
        rows = Rows(10)
        logits = model.eval()(rows.ids, torch.ones(10, 6)).logits
        expected = F.cross_entropy(logits, rows.labels, torch.tensor(balanced).float())
    assert len(batch["labels"]) == 24
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_balanced_probe_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 300, p=[0.8, 0.15, 0.05])
    x = (rng.normal(size=(300, 5)) + labels[:, None] * 0.7).astype(np.float32)
    weights = compute_class_weights("balanced", labels, list("abc"))
    assert weights is not None
    probe = fit_probe(x, labels, 3, None, weights=weights.weigh(labels))
    standard = StandardScaler().fit_transform(x.astype(np.float64))
    solver = LogisticRegression(
        C=probe.penalty, class_weight="balanced", max_iter=10_000, tol=1e-8
    ).fit(standard, labels)
    logits, expected = probe.logits(x), solver.decision_function(standard)
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected, atol=1e-3 * np.abs(expected).max()
    )
    several = np.stack([labels > 0, labels > 1], axis=1).astype(np.float64)
    pairs = compute_class_weights("balanced", several, ["a", "b"])
    assert pairs is not None
    probe = fit_probe(x, several, 2, None, np.array([0.1]), weights=pairs.weigh(several))
    for column in range(2):
        solver = LogisticRegression(C=0.1, class_weight="balanced", max_iter=10_000, tol=1e-8)
        expected = solver.fit(standard, several[:, column]).decision_function(standard)
        np.testing.assert_allclose(probe.logits(x)[:, column], expected, atol=1e-3)


def test_class_of_weight_zero_is_never_predicted() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 90)
    x = (rng.normal(size=(90, 4)) + 2 * np.eye(3, 4)[labels]).astype(np.float32)
    weights = ClassWeights(np.array([1.0, 0.0, 2.0])).weigh(labels)
    assert set(fit_probe(x, labels, 3, None, weights=weights).logits(x).argmax(1)) == {0, 2}


def test_weights_raise_macro_f1_of_an_imbalanced_problem(tmp_path: Path) -> None:
    """Draw 19 to 1, of classes two standard deviations apart."""
    rng = np.random.default_rng(0)

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (rng.random(rows) < 0.05).astype(np.int64)
        return (rng.normal(size=(rows, 3)) + labels[:, None] * 1.2).astype(np.float32), labels

    (x, y), (test, truth) = draw(400), draw(4000)
    names = ["many", "few"]
    scores = {}
    for name, setting in (("plain", None), ("weighted", {"few": 4.0})):
        weights = compute_class_weights(setting, y, names)
        element = None if weights is None else weights.weigh(y)
        probe = fit_probe(x, y, 2, None, weights=element)
        scores["solved", name] = f1_score(truth, probe.logits(test).argmax(1), average="macro")
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        data = [
            {"input": torch.tensor(row), "labels": int(label)}
            for row, label in zip(x, y, strict=True)
        ]
        build_trainer(
            model, tmp_path, data=data, more={"class_weight": weights}, num_train_epochs=8,
            learning_rate=0.3, per_device_train_batch_size=32, remove_unused_columns=False,
        ).train()  # fmt: skip
        with torch.no_grad():
            predicted = model(torch.tensor(test)).argmax(1).numpy()
        scores["trained", name] = f1_score(truth, predicted, average="macro")
    for kind in ("solved", "trained"):
        assert scores[kind, "weighted"] > scores[kind, "plain"] + 0.02, scores


# A recipe, its arms, and what is said of them


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a recipe of 100 negative and 25 positive sentences."""
    drawn = sentences(200)
    rows = [row for row in drawn if row[1] == "negative"][:100]
    rows += [row for row in drawn if row[1] == "positive"][:25]
    table = write_csv(tmp_path / "skewed.csv", ["text", "label"], rows)
    recipe_tree["data"]["train"] = {"path": str(table)}
    recipe_tree["finetune"] |= {"strategy": "full", "class_weight": "balanced"}
    recipe_tree["measure"] |= {"seeds": [0], "arms": []}
    return recipe_tree


def test_every_arm_that_reads_labels_has_the_same_weights(tree: dict[str, Any]) -> None:
    recipe = Recipe.parse(tree)
    context, finetune = bench_of(recipe), recipe.finetune
    targets = context.prepared.encode_targets(context.select_train_rows(0))
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=targets)
    outputs = [
        solve_head(context, finetune, 0),
        solve_classical(context, 0, finetune.class_weight),
        train_arm(context, finetune, 0),
    ]
    for output in outputs:
        facts = output.facts.class_weights
        assert facts is not None and list(facts.weights) == ["negative", "positive"]
        np.testing.assert_allclose(list(facts.weights.values()), expected)
        assert list(facts.counts.values()) == np.bincount(targets).tolist()
    assert not np.allclose(outputs[0].logits["test"], plain_head(context, recipe))
    assert not np.allclose(
        outputs[1].logits["test"], solve_classical(context, 0).logits["test"], atol=1e-3
    )


def plain_head(context: Any, recipe: Recipe) -> np.ndarray:
    unweighted = recipe.finetune.model_copy(update={"class_weight": None})
    output = solve_head(context, unweighted, 0)
    assert output.facts.class_weights is None
    return output.logits["test"]


def test_run_records_the_weights_and_the_card_says_them(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["finetune"]["focal_gamma"] = 2.0
    tree["measure"]["arms"] = ["head", {"plain": {"finetune.class_weight": None}}]
    record = run(Recipe.parse(tree), tmp_path / "run")
    assert record is not None
    weights = {entry.arm: entry.training.class_weights for entry in record.arms}
    assert weights["full"] == weights["head"] is not None and weights["plain"] is None
    card = (tmp_path / "run" / "publish" / "README.md").read_text(encoding="utf-8")
    assert "classes were weighted against their frequency, from 0.6" in card
    assert "focal loss of gamma 2" in card


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.class_weight={negativ: 2}"], "no row has the label 'negativ'.*'negative'"),
        (["finetune.class_weight={negative: -1}"], "'negative' weighs -1, expected a number"),
        (["finetune.class_weight={negative: .inf}"], "must be a finite number, got inf"),
        (["finetune.class_weight={negative: true}"], "'negative' weighs True, expected a number"),
        (["finetune.class_weight={negative: 0, positive: 0}"], "every class weighs 0"),
        (["finetune.class_weight={}"], "finetune.class_weight is {}"),
        (["finetune.class_weight=inverse"], "finetune.class_weight is 'inverse'"),
        (["finetune.focal_gamma=-1"], "'finetune.focal_gamma' must be a number of at least 0"),
        (["data.task=regression"], "finetune.class_weight=balanced weighs classes"),
        (
            ["data.task=regression", "finetune.class_weight=null", "finetune.focal_gamma=2"],
            "finetune.focal_gamma=2.0 weighs classes, and data.task=regression has none",
        ),
        (["finetune.strategy=head", "finetune.focal_gamma=2"], "focal_gamma shapes a loss"),
        (["finetune.strategy=zero_shot"], "class_weight weighs training rows"),
    ],
)
def test_recipe_refuses_weights_that_mean_nothing(
    tree: dict[str, Any], overrides: list[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        check_recipe(Recipe.parse(apply_overrides(tree, overrides)))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"class_weight": [1.0, -1.0, 1.0]}, "finite weights of at least 0"),
        ({"class_weight": [0.0, 0.0, 0.0]}, "finite weights of at least 0"),
        ({"class_weight": [1.0, float("nan"), 1.0]}, "finite weights of at least 0"),
        ({"class_weight": {"d": 2.0}}, "class_weight: no row has the label 'd'"),
        ({"class_weight": "inverse"}, "class_weight='inverse' is not known"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0, expected a number of at least 0"),
        ({"class_weight": [1.0, 1.0]}, "2 weights, and the model has 3 classes"),
        (
            {"focal_gamma": 1.0, "compute_loss_func": lambda *_, **__: None},
            "compute_loss_func, computes the loss of a batch by itself",
        ),
    ],
)
def test_trainer_refuses_weights_that_mean_nothing(
    more: dict[str, Any], words: str, bert: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        bert, id2label={0: "a", 1: "b", 2: "c"}
    )
    with pytest.raises(RecipeError, match=words):
        build_trainer(model, tmp_path, more=more).train()


def test_trainer_reads_weights_by_name_and_refuses_targets(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        bert, id2label={0: "a", 1: "b", 2: "c"}
    )
    for given in ({"b": 3.0}, {1: 3.0}, [1.0, 3.0, 1.0]):
        weighting = build_weighting(given, 0.0, None, model)
        assert weighting is not None and weighting.positive is not None
        assert weighting.positive.tolist() == [1, 3, 1] and weighting.negative is None
    assert build_weighting(None, 0.0, None, model) is None
    numbers = [{"input_ids": [5, 6], "labels": float(i)} for i in range(8)]
    target = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1)
    with pytest.raises(RecipeError, match="the labels are numbers"):
        build_trainer(target, tmp_path, data=numbers, more={"class_weight": "balanced"})
    with pytest.raises(RecipeError, match="weigh the loss of each labelled element, and"):
        build_trainer(target, tmp_path, data=numbers, more={"focal_gamma": 2.0}).train()
