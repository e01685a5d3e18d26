"""Check labelled replay: general rows whose loss counts, in an exact ratio to the target's."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bench_of, sentences, write_csv
from support.training import (
    Rows,
    UnlabelledRows,
    build_probed_model,
    build_trainer,
    copy_parameters,
    run_first_step,
)
from torch import Tensor

from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.rows import InputSpec
from hftl.errors import DataError, RecipeError
from hftl.finetune.retention import build_general_dataset
from hftl.pipeline.cache_keys import flatten_retain
from hftl.pipeline.pipeline import check_recipe, run
from hftl.train.loss import compute_replay_loss, compute_summed_loss


@pytest.fixture
def bert(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("bert")


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
    each = torch.stack(
        [compute_summed_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(6)]
    )
    expected = each[~general].sum() + 0.7 * each[general].sum()
    torch.testing.assert_close(compute_replay_loss(logits, labels, general, 0.7), expected)
    assert compute_replay_loss(logits, labels, general, 0.0) == pytest.approx(
        float(each[~general].sum())
    )


class General(Rows):
    """Hold labelled rows that the target lacks."""

    def __init__(self, rows: int = 9) -> None:
        super().__init__(rows)
        self.ids = self.ids.flip(1)


def build_replay_trainer(
    folder: Path, model: Any, general: Any, weight: float, **settings: Any
) -> Any:
    more = {"general_dataset": general, "general_ratio": 0.5, "general_weight": weight}
    return build_trainer(model, folder, [], more, **settings)


def compute_step_loss(model: Any, batch: dict[str, Tensor], weight: float) -> Tensor:
    """Return the mean over the target's rows plus the weighted one over the general rows."""
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    each = F.cross_entropy(logits, batch["labels"], reduction="none")
    return each[~batch["general"]].mean() + weight * each[batch["general"]].mean()


def test_step_is_the_sum_of_two_means_however_it_is_cut(bert: Path, tmp_path: Path) -> None:
    steps, seen = [], []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = build_probed_model(bert, "full")
        trainer = build_replay_trainer(
            tmp_path, model, General(), 0.7,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        plain = trainer.compute_loss

        def noted(model: Any, inputs: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            seen.append(inputs)
            return plain(model, inputs, *args, **kwargs)

        trainer.compute_loss = noted
        steps.append(run_first_step(trainer))
    (loss, gradients), (other, others) = steps
    assert loss == pytest.approx(other, abs=1e-6)
    assert int(seen[0]["general"].sum()) == 4 and len(seen[0]["row"]) == 12
    model = build_probed_model(bert, "full").eval()
    expected = compute_step_loss(model, seen[0], 0.7)
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    expected.backward()
    assert gradients.keys() == others.keys()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(others[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_ratio_is_exact_and_every_general_row_is_used(bert: Path, tmp_path: Path) -> None:
    trainer = build_replay_trainer(
        tmp_path, build_probed_model(bert, "lora"), General(9), 1.0, num_train_epochs=3
    )
    numbers: list[int] = []
    plain = trainer.compute_loss

    def noted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        numbers.extend(inputs["row"][inputs["general"]].tolist())
        assert (inputs["labels"] >= 0).all()
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    trainer.train()
    target = len(trainer.train_dataset)
    assert len(numbers) == 3 * target // 2
    for start in range(0, len(numbers) - 9, 9):
        assert sorted(numbers[start : start + 9]) == list(range(target, target + 9))


def test_weight_zero_is_replay_without_labels(bert: Path, tmp_path: Path) -> None:
    states = []
    for general, weight in ((General(7), 0.0), (UnlabelledRows(7), 1.0), (General(7), 1.0)):
        model = build_probed_model(bert, "full")
        build_replay_trainer(tmp_path, model, general, weight).train()
        states.append(copy_parameters(model))
    zero, unlabelled, full = states
    assert all(torch.equal(value, unlabelled[name]) for name, value in zero.items())
    assert any(not torch.equal(value, unlabelled[name]) for name, value in full.items())


@pytest.fixture
def tree(recipe_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A small recipe with general data that have the task's labels, and documents."""
    rows = [(text, label, str(i // 4)) for i, (text, label) in enumerate(sentences(80, seed=9))]
    general = write_csv(tmp_path / "general.csv", ["text", "label", "document"], rows)
    recipe_tree["data"] |= {
        "shots": 12, "general": {"path": str(general), "label": ["document", "label"]},
    }  # fmt: skip
    recipe_tree["finetune"]["strategy"] = "full"
    recipe_tree["retain"] = {"replay": {"labelled": True, "ratio": 0.5, "weight": 0.7}}
    recipe_tree["measure"] |= {"arms": [{"plain": {"retain": None}}], "seeds": [0]}
    return recipe_tree


def test_general_rows_hold_the_task_s_classes(tree: dict[str, Any]) -> None:
    recipe = Recipe.parse(tree)
    bench = bench_of(recipe)
    bench.general = load_general(recipe.data, bench.prepared, InputSpec())
    examples = build_general_dataset(bench, labelled=True)
    truth = dict(sentences(80, seed=9))
    names = bench.prepared.names
    labels = [names[int(examples[i]["labels"])] for i in range(len(examples))]
    assert labels == [truth[row.content[0]] for row in bench.general.train_rows]
    assert set(labels) == set(names)
    bare = build_general_dataset(bench)
    assert {int(np.asarray(bare[i]["labels"])) for i in range(len(bare))} == {-100}


def test_a_run_that_replays_labels(tree: dict[str, Any], tmp_path: Path) -> None:
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
    with pytest.raises(Exception, match=r"retain\.replay\.weight: 0\.7 -> 0\.5"):
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
    tree["data"]["general"] |= data.pop("general", {})
    tree["data"] |= data
    tree["retain"] = retain
    with pytest.raises(RecipeError) as caught:
        check_recipe(Recipe.parse(tree))
    assert caught.value.exit_code == 2
    assert re.search(message, f"{caught.value.what}. {caught.value.fix}")


def test_refuses_and_names_labels_that_the_task_lacks(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.parse(deepcopy(tree))
    bench = bench_of(recipe)
    general = load_general(recipe.data, bench.prepared, InputSpec())
    wrong = {general.train_rows[0].content[0], general.eval_rows[0].content[0]}
    rows = [(text, "cold" if text in wrong else label, str(i // 4))
            for i, (text, label) in enumerate(sentences(80, seed=9))]  # fmt: skip
    path = write_csv(tmp_path / "cold.csv", ["text", "label", "document"], rows)
    tree["data"]["general"]["path"] = str(path)
    for go in (check_recipe, lambda made: run(made, tmp_path / "run")):
        with pytest.raises(DataError, match="cold.csv.*the label 'cold', which train never"):
            go(Recipe.parse(deepcopy(tree)))
    tree["retain"] = {"ewc": {"fisher": "features", "samples": 8}}
    check_recipe(Recipe.parse(tree))


def test_weight_is_no_cache_key_without_labels(tree: dict[str, Any]) -> None:
    tree["retain"] = {"kl": {"inputs": "general"}, "replay": {"ratio": 0.25}}
    retain = Recipe.parse(tree).retain
    assert retain is not None
    read = flatten_retain(retain)
    assert {key for key in read if "replay" in key} == {"retain.replay.ratio"}
