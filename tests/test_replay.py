"""Check labelled replay: general rows whose loss counts, in an exact ratio to the target's."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bench_of, sentences, write_csv
from support.training import (
    GeneralRows,
    UnlabelledRows,
    assert_same_parameters,
    assert_same_step,
    build_probed_model,
    build_trainer,
    run_first_step,
    watch_batches,
)

from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.rows import InputSpec
from hftl.errors import DataError, HftlError, RecipeError
from hftl.pipeline.cache_keys import flatten_retain
from hftl.pipeline.pipeline import check_recipe, run
from hftl.train.loss import compute_replay_loss, compute_summed_loss

pytestmark = pytest.mark.usefixtures("fast_reload")


@pytest.mark.parametrize("kind", ["classes", "labels", "target"])
def test_general_row_counts_by_its_share(kind: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 1 if kind == "target" else 3)
    labels = {
        "classes": torch.randint(0, 3, (6,)),
        "labels": torch.rand(6, 3).round(),
        "target": torch.randn(6),
    }[kind]
    general = torch.tensor([False, True, False, False, True, True])
    losses = torch.stack([compute_summed_loss(logits[[i]], labels[[i]]) for i in range(6)])
    for share in (0.7, 0.0):
        expected = losses[~general].sum() + share * losses[general].sum()
        torch.testing.assert_close(compute_replay_loss(logits, labels, general, share), expected)


def build_replay_trainer(
    folder: Path, model: Any, general: Any, weight: float, **settings: Any
) -> Any:
    more = {"general_dataset": general, "general_ratio": 0.5, "general_weight": weight}
    return build_trainer(model, folder, [], more, **settings)


def test_step_is_the_sum_of_two_means_however_it_is_cut(bert: Path, tmp_path: Path) -> None:
    steps, batches = [], []
    for batch, accumulated in ((8, 1), (2, 4)):
        trainer = build_replay_trainer(
            tmp_path, build_probed_model(bert, "full"), GeneralRows(), 0.7,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        watch_batches(trainer, batches.append)
        steps.append(run_first_step(trainer))
    assert_same_step(*steps)
    whole, model = batches[0], build_probed_model(bert, "full").eval()
    general = whole["general"]
    assert int(general.sum()) == 4 and len(general) == 12
    logits = model(whole["input_ids"], whole["attention_mask"]).logits
    losses = F.cross_entropy(logits, whole["labels"], reduction="none")
    expected = losses[~general].mean() + 0.7 * losses[general].mean()
    expected.backward()
    named = model.named_parameters()
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    assert_same_step(steps[0], (expected.item(), gradients))


def test_ratio_is_exact_and_every_general_row_is_used(bert: Path, tmp_path: Path) -> None:
    trainer = build_replay_trainer(
        tmp_path, build_probed_model(bert, "lora"), GeneralRows(9), 1.0, num_train_epochs=3
    )
    numbers: list[int] = []

    def watch(batch: dict[str, torch.Tensor]) -> None:
        numbers.extend(batch["row"][batch["general"]].tolist())
        assert (batch["labels"] >= 0).all()

    watch_batches(trainer, watch)
    trainer.train()
    target = len(trainer.train_dataset)
    assert len(numbers) == 3 * target // 2
    for start in range(0, len(numbers) - 9, 9):
        assert sorted(numbers[start : start + 9]) == list(range(target, target + 9))


def test_weight_zero_is_replay_without_labels(bert: Path, tmp_path: Path) -> None:
    models = []
    for general, weight in ((GeneralRows(), 0.0), (UnlabelledRows(), 1.0), (GeneralRows(), 1.0)):
        models.append(build_probed_model(bert, "full"))
        build_replay_trainer(tmp_path, models[-1], general, weight).train()
    zero, unlabelled, labelled = models
    assert_same_parameters(zero, unlabelled)
    pairs = zip(labelled.parameters(), unlabelled.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in pairs)


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return a small recipe with general data that have the task's labels, and documents."""
    rows = [(text, label, str(i // 4)) for i, (text, label) in enumerate(sentences(80, seed=9))]
    general = write_csv(tmp_path / "general.csv", ["text", "label", "document"], rows)
    recipe_tree["data"] |= {
        "shots": 12, "general": {"path": str(general), "label": ["document", "label"]},
    }  # fmt: skip
    recipe_tree["finetune"]["strategy"] = "full"
    recipe_tree["retain"] = {"replay": {"labelled": True, "ratio": 0.5, "weight": 0.7}}
    recipe_tree["measure"] |= {"arms": [{"plain": {"retain": None}}], "seeds": [0]}
    return recipe_tree


def test_general_rows_hold_the_tasks_classes(tree: dict[str, Any]) -> None:
    recipe = Recipe.parse(tree)
    context = bench_of(recipe)
    context.general = load_general(recipe.data, context.prepared, InputSpec())
    examples = context.build_general_dataset(labelled=True)
    truth, names = dict(sentences(80, seed=9)), context.prepared.names
    labels = [names[int(examples[i]["labels"])] for i in range(len(examples))]
    assert labels == [truth[row.content[0]] for row in context.general.train_rows]
    assert set(labels) == set(names)
    bare = context.build_general_dataset()
    assert {int(np.asarray(bare[i]["labels"])) for i in range(len(bare))} == {-100}


def test_run_that_replays_labels_is_described_and_refuses_another_weight(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["retain"]["ewc"] = {"fisher": "empirical", "weight": 0.1, "samples": 8}
    record = run(Recipe.parse(deepcopy(tree)), tmp_path / "run")
    assert record is not None
    arms = {arm["arm"]: arm["training"] for arm in record["arms"]}
    assert arms["full"]["general_rows"] > 0
    assert arms["full"]["fisher"]["kind"] == "empirical" and arms["full"]["fisher"]["rows"] == 8
    assert arms["full"]["history"] != arms["plain"]["history"]
    card = (tmp_path / "run/publish/README.md").read_text("utf-8")
    assert "replay of labelled general rows, 0.5 for each of the task's, weight 0.7" in card
    assert "the empirical Fisher information of 8 general rows" in card
    tree["retain"]["replay"]["weight"] = 0.5
    with pytest.raises(HftlError, match=r"retain\.replay\.weight: 0\.7 -> 0\.5"):
        run(Recipe.parse(tree), tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "retain", "message"),
    [
        ({"general": {"label": "document"}}, {"replay": {"labelled": True}}, "a column 'label'"),
        ({"general": {"label": "document"}}, {"ewc": {"fisher": "empirical"}}, "need classific"),
        ({"task": "regression"}, {"replay": {"labelled": True}}, "need classification"),
        ({}, {"replay": {"weight": 0.5}}, "and labelled is false"),
        ({}, {"replay": {"labelled": True, "weight": -1}}, r"retain\.replay\.weight"),
        ({}, {"replay": {}}, "or retain.replay.labelled"),
    ],
)
def test_refuses_replay_without_labels(
    tree: dict[str, Any], data: Any, retain: Any, message: str
) -> None:
    general = tree["data"]["general"] | data.get("general", {})
    tree["data"] |= data | {"general": general}
    tree["retain"] = retain
    with pytest.raises(RecipeError) as caught:
        check_recipe(Recipe.parse(tree))
    assert caught.value.exit_code == 2
    assert re.search(message, f"{caught.value.what}. {caught.value.fix}")


def test_refuses_and_names_labels_that_the_task_lacks(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.parse(deepcopy(tree))
    general = load_general(recipe.data, bench_of(recipe).prepared, InputSpec())
    wrong = {general.train_rows[0].content[0], general.eval_rows[0].content[0]}
    rows = [(text, "cold" if text in wrong else label, str(i // 4))
            for i, (text, label) in enumerate(sentences(80, seed=9))]  # fmt: skip
    path = write_csv(tmp_path / "cold.csv", ["text", "label", "document"], rows)
    tree["data"]["general"]["path"] = str(path)
    for call in (check_recipe, lambda recipe: run(recipe, tmp_path / "run")):
        with pytest.raises(DataError, match="cold.csv.*the label 'cold', which train never"):
            call(Recipe.parse(deepcopy(tree)))
    tree["retain"] = {"ewc": {"fisher": "features", "samples": 8}}
    check_recipe(Recipe.parse(tree))


def test_weight_is_no_cache_key_without_labels(tree: dict[str, Any]) -> None:
    tree["retain"] = {"kl": {"inputs": "general"}, "replay": {"ratio": 0.25}}
    retain = Recipe.parse(tree).retain
    assert retain is not None
    assert {k for k in flatten_retain(retain) if "replay" in k} == {"retain.replay.ratio"}
