"""Compare trainings whose frozen blocks run once a row with trainings that run them every time."""

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bench_of, pictures, sentences, write_csv
from torch import nn

from hftl.config.recipe import Recipe
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.frozen_prefix import FrozenPrefix
from hftl.finetune.trainable import count_frozen_blocks
from hftl.retain.kl import KLToOriginal
from hftl.retain.regularizer import Retention
from hftl.runtime import row_store

TRAINING = {"num_train_epochs": 7, "learning_rate": 3e-4, "bf16": False, "logging_steps": 10}
DRAWN = {"head_init": "random"}
"""A probe of a random encoder has weights so large that losses are in the tens, and rounding with
them: changes of 1e-7 in the embeddings then move losses ten times as far as stored rows do."""
LORA_TOP = {"strategy": "lora", "lora": {"layers_to_transform": [2]}}
PARTIAL = {"strategy": "partial", "blocks": 1, "pooling": "mean"}
GRADUAL = {"strategy": "gradual", "pooling": "mean", "gradual": {"epochs": 2, "final_epochs": 1}}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 100 sentences, of which 60 train."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    return write_csv(path, ["text", "label"], sentences(100))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "two", 20)


def make_context(model: Path, data: Path, finetune: dict[str, Any], **more: Any) -> Any:
    """Return a context and the recipe's section `finetune`."""
    training = TRAINING | finetune.get("training", {})
    tree = {
        "source": {"model": str(model)}, "data": {"train": {"path": str(data)}, **more},
        "finetune": {**finetune, "training": training},
    }  # fmt: skip
    recipe = Recipe.parse(tree)
    return bench_of(recipe), recipe.finetune


def train(made: Any, cache: str, root: Path | None = None, **more: Any) -> ArmOutput:
    context, finetune = made
    context.feature_root = root
    finetune = finetune.model_copy(update={"cache": cache})
    return train_arm(context, finetune, more.pop("seed", 0), compared=False, **more)


def check_same(cached: ArmOutput, plain: ArmOutput, depth: int) -> None:
    assert cached.timings["cached_blocks"] == depth, cached.note
    assert plain.timings["cached_blocks"] == 0, plain.note
    histories = [output.facts.history or [] for output in (cached, plain)]
    assert len(histories[0]) == len(histories[1]) > 0
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-5)
    for split, logits in plain.logits.items():
        np.testing.assert_allclose(cached.logits[split], logits, atol=1e-3)
    assert cached.facts.model_copy(update={"history": None}) == plain.facts.model_copy(
        update={"history": None}
    )


@pytest.mark.parametrize(("kind", "finetune", "depth"), [
    ("bert", PARTIAL, 2),
    ("bert", GRADUAL, 3),
    *(
        pytest.param(kind, finetune, depth, marks=pytest.mark.slow)
        for kind, finetune, depth in [
            ("llama", LORA_TOP, 2), ("deberta-v2", PARTIAL, 2), ("modernbert", GRADUAL, 3),
            ("roberta", LORA_TOP | DRAWN, 2),
            ("bert", PARTIAL | DRAWN | {"pooling": "cls", "training": {"max_steps": 50}}, 2),
        ]
    ),
])  # fmt: skip
def test_texts_train_as_without_a_cache(
    kind: str, finetune: dict[str, Any], depth: int, tiny_model: Any, reviews: Path
) -> None:
    made = make_context(tiny_model(kind), reviews, finetune, max_length=16)
    check_same(train(made, "auto"), train(made, "never"), depth)


@pytest.mark.parametrize(("kind", "depth"), [
    ("vit", 2), *(pytest.param(kind, 2, marks=pytest.mark.slow) for kind in ("swin", "clip")),
])  # fmt: skip
def test_images_train_as_without_a_cache(
    kind: str, depth: int, tiny_model: Any, images: Path
) -> None:
    made = make_context(tiny_model(kind), images, PARTIAL | {"pooling": "native"})
    check_same(train(made, "auto"), train(made, "never"), depth)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many times the lowest block has really run in each training, probes apart."""
    runs: list[int] = []
    fill = FrozenPrefix.fill

    def count(prefix: FrozenPrefix, rows: Any) -> None:
        fill(prefix, rows)
        runs.append(0)

        def see(block: nn.Module, *_: Any) -> None:
            runs[-1] += "forward" not in vars(block) and torch.is_autocast_enabled("cpu")

        prefix._encoder.get_submodule(prefix._paths[0]).register_forward_hook(see)

    monkeypatch.setattr(FrozenPrefix, "fill", count)
    return runs


def test_training_evaluation_and_the_original_of_kl_read_the_same_rows(
    bert: Path, reviews: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, which predictions and checks leave: there the lowest block never runs."""
    training = {"bf16": True, "num_train_epochs": 2}
    rows: list[int] = []
    compute = FrozenPrefix._compute_batch
    monkeypatch.setattr(
        FrozenPrefix, "_compute_batch",
        lambda prefix, batch, depths: rows.append(len(batch)) or compute(prefix, batch, depths),
    )  # fmt: skip
    made = make_context(bert, reviews, LORA_TOP | {"training": training}, max_length=16)
    first = train(made, "auto", tmp_path, retention=Retention([KLToOriginal(0.5, anchors=8)]))
    assert sum(rows) == 80 and first.timings["cached_blocks"] == 2
    copy = shutil.copytree(bert, tmp_path / "elsewhere")
    partial = make_context(copy, reviews, PARTIAL | {"training": training}, max_length=16)
    uncached_kl = Retention([KLToOriginal(0.5, anchors=8, cached=False)])
    train(partial, "auto", tmp_path, retention=uncached_kl, seed=1)
    assert sum(rows) == 80, "another arm, seed and place reads what the first has stored"
    assert passes == [0, 0]
    again = train(made, "auto", tmp_path, retention=Retention([KLToOriginal(0.5, anchors=8)]))
    assert again.facts == first.facts, "a later run is the same to the last digit"


def test_no_state_depends_on_the_seed_or_arm_that_is_first(
    bert: Path, reviews: Path, tmp_path: Path
) -> None:
    """Rows of all seeds run in one pass: seeds in another order end with the same digits."""
    made = make_context(bert, reviews, PARTIAL | {"training": {"max_steps": 24}}, shots=8)
    made[0].seeds = (0, 1)
    outputs = {
        order: {seed: train(made, "auto", tmp_path / str(order), seed=seed) for seed in order}
        for order in ((0, 1), (1, 0))
    }
    parts = [len(list((tmp_path / str(order)).rglob("part-*"))) for order in outputs]
    assert parts == [1, 1], "the second seed computes nothing"
    for seed in (0, 1):
        one, other = (output[seed] for output in outputs.values())
        assert one.timings["cached_blocks"] == 2 and one.facts == other.facts
        assert all(torch.equal(tensor, other.weights[n]) for n, tensor in one.weights.items())


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("albert", {}, "runs several times"),
    ("bert", {"training": {"num_train_epochs": 1}}, "1 pass over"),
    ("bert", {"strategy": "lora"}, ""),
    ("bert", {"bytes": 1000}, "do not fit"),
    ("bert", {"full": True}, "the disk is full"),
    ("vit", {"augment": "light"}, "pictures vary"),
])  # fmt: skip
def test_what_is_not_stored_trains_as_ever(
    kind: str, change: dict[str, Any], words: str, tiny_model: Any, reviews: Path, images: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(row_store, "MAX_BYTES", change.get("bytes", row_store.MAX_BYTES))
    if change.get("full"):
        save = np.save

        def fail(path: Path, values: Any) -> None:
            save(path, values)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(row_store.np, "save", fail)
    finetune = PARTIAL | {"training": {"max_steps": 24}} | {
        key: value for key, value in change.items() if key in ("training", "strategy")
    }  # fmt: skip
    more = {"augment": "light"} if "augment" in change else {}
    if kind == "vit":
        finetune["pooling"] = "native"
    else:
        more["max_length"] = 16
    if kind == "albert":
        tiny_model = lambda name: save_two_blocks(tmp_path / "albert")  # noqa: E731
    made = make_context(tiny_model(kind), images if kind == "vit" else reviews, finetune, **more)
    output = train(made, "auto", tmp_path / "features")
    assert words in output.note and bool(words) == bool(output.note)
    assert output.timings.get("cached_blocks", 0) == 0
    assert not list((tmp_path / "features").rglob("part-*")) and output.facts.history


def save_two_blocks(folder: Path) -> Path:
    """Save an ALBERT of two groups of layers, of which the upper one trains."""
    from support.tiny import tiny_config, tiny_tokenizer
    from transformers import AutoModel

    config = tiny_config("albert", num_hidden_groups=2, num_hidden_layers=4)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def test_weights_that_have_moved_are_not_read(bert: Path, reviews: Path, tmp_path: Path) -> None:
    from hftl.finetune.trainable import apply_strategy
    from hftl.models.heads import LoadedModel
    from hftl.train.arguments import build_finetune_arguments

    context, finetune = make_context(bert, reviews, PARTIAL, max_length=16)
    built = context.build_model("mean", 0)
    model = apply_strategy(built.model, finetune, built.fresh)
    built = LoadedModel(model, built.architecture, built.pooling, built.fresh)
    args = build_finetune_arguments(finetune.training, "classification", str(tmp_path), 0, "cpu")
    prefix = FrozenPrefix(context, built, finetune, args, tmp_path)
    with prefix.cache.install():
        prefix.fill([context.prepared.rows["validation"]])
        prefix.follow()
        assert prefix.cache.store is not None and prefix.cache.depth == 2
        with torch.no_grad():
            next(built.encoder.parameters()).add_(1e-3)
        prefix.follow()
        assert prefix.cache.store is None and prefix.cache.depth == 2
    assert count_frozen_blocks(model) == 2


def test_an_arm_adds_the_boundaries_that_another_has_not_stored(
    bert: Path, reviews: Path, tmp_path: Path
) -> None:
    partial = make_context(bert, reviews, PARTIAL, max_length=16)
    assert train(partial, "auto", tmp_path).timings["cached_blocks"] == 2
    gradual = make_context(bert, reviews, GRADUAL, max_length=16)
    check_same(train(gradual, "auto", tmp_path), train(gradual, "never"), 3)
