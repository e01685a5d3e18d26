"""Train a tiny model by every strategy: what trains, what stays, what reloads, what goes on."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FILLER, bench_of, write_csv
from PIL import Image
from safetensors.torch import save_file
from support.fresh_process import FreshProcess
from support.published_model import scale_logits
from support.reload_jobs import ReloadJob, reload_folders
from test_resume import KEY, assert_same, stop_after
from torch import Tensor

from hftl.config.finetune import Finetune
from hftl.config.measure import Search
from hftl.config.recipe import Recipe
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import ArmOutput
from hftl.finetune.baselines import SOLVERS, train_scratch
from hftl.finetune.context import ExperimentContext
from hftl.models.encoders import list_block_paths
from hftl.models.features import predict_logits
from hftl.models.model_parts import get_encoder, get_last_linear, get_model_spec
from hftl.publish.export import (
    export_model,
    rebuild_model,
    select_sample_logits,
    select_sample_rows,
    write_reload_sample,
)
from hftl.train.facts import ScratchSearch
from hftl.train.step_checkpoint import CheckpointSpec
from hftl.train.trainer import TransferTrainer

TRAINING = {
    "learning_rate": 1e-3, "bf16": False, "per_device_train_batch_size": 8, "num_train_epochs": 1,
}  # fmt: skip
EPOCH_STEPS = 3
STEPS = 2
"""After which a training is stopped; of gradual the steps of its second phase."""
PUBLISHED = ("head", "partial", "lora", "gradual", "full")
HELD = {"partial": True, "lora": None, "gradual": False, "full": False}
"""The recipe's `freeze_batchnorm`; of few rows None is True."""


@dataclass(frozen=True)
class Family:
    """Name what trains in a tiny model, by starts of names with spaces between them.

    Args:
        head: the last layer.
        after: what follows the last block, and trains with it; the head is in it.
        top: the last block.
        blocks: how many there are.
        layers: LoRA's layers, by the end of their names in a block.
        count: of LoRA's layers in all blocks.
        saved: the modules that LoRA trains and saves whole.
        before: what stands in a stage before its first block, the last of all, and is unfrozen
            with it.
        idle: what nothing trains, as no output depends on it.
        pooling: of the recipe.
        solved: the solved strategies that fit.
    """

    head: str
    after: str
    top: str
    blocks: int
    layers: str
    count: int
    saved: str
    before: str = ""
    idle: str = ""
    pooling: str = "native"
    solved: tuple[str, ...] = ("head",)


@dataclass
class Stopped:
    """Hold a model whose training was stopped, and its tensors before the first step."""

    model: Any = None
    before: dict[str, Tensor] = field(default_factory=dict)

    def list_moved(self) -> set[str]:
        """Return the names of the parameters and buffers that are not, bit for bit, as before."""
        tensors = self.model.state_dict()
        return {
            n for n, t in tensors.items() if n not in self.before or not t.equal(self.before[n])
        }

    def list_named(self, starts: str, idle: str) -> set[str]:
        """Return the parameters whose names have one of the starts, but for those of `idle`."""
        first, others = tuple(starts.split()) or "", tuple(idle.split())
        names = {name for name, _ in self.model.named_parameters()}
        return {n for n in names if n.startswith(first) and not n.startswith(others)}

    def list_trains(self) -> set[str]:
        """Return the names of the parameters that require a gradient."""
        return {name for name, p in self.model.named_parameters() if p.requires_grad}


def check_every_strategy(
    family: Family, model: Path, data: Path, folder: Path, server: FreshProcess
) -> None:
    """Train by every strategy with a stop, and reload all that is published in one process.

    Args:
        family: of the model.
        model: the folder of the tiny model.
        data: rows of two classes, of which some twenty are trained on.
        folder: to work in.
        server: starts the process that reloads.
    """
    tree = {"source": {"model": str(model)}, "data": {"train": {"path": str(data)}}}
    context = bench_of(Recipe.parse(tree | {"finetune": {"pooling": family.pooling}}))
    assert EPOCH_STEPS - 1 < len(context.select_train_rows(0)) / 8 <= EPOCH_STEPS
    jobs = {}
    for strategy in (*family.solved, *PUBLISHED[1:], "scratch"):
        place = folder / strategy
        place.mkdir()
        finetune = make_section(family, strategy)
        if strategy in family.solved:
            output = check_solved(context, family, strategy, finetune)
        else:
            output = check_stopped(context, family, strategy, finetune, place)
        if strategy != "scratch":
            jobs[strategy] = publish_output(context, finetune, output, place)
    results = reload_folders(list(jobs.values()), folder, server)
    for strategy, result in zip(jobs, results, strict=True):
        assert not result.hftl_imported and result.largest < 2, (strategy, result)
        assert result.difference <= 1e-5, (strategy, result)


def save_stripes(folder: Path, each: int = 16) -> Path:
    """Save noisy pictures of two classes, striped across or along: no network is blind to these.

    Brightness alone is nothing to BiT, whose convolutions take the mean off their weights; a head
    would magnify what little is left, and its rounding.
    """
    draw = np.random.default_rng(0)
    for label in ("across", "along"):
        (folder / label).mkdir(parents=True)
        for number in range(each):
            stripes = np.where(np.arange(32) // 4 % 2, 190, 60)[:, None].repeat(32, 1)
            stripes = stripes if label == "across" else stripes.T
            noisy = stripes[..., None] + draw.integers(-50, 50, (32, 32, 3))
            Image.fromarray(noisy.astype("uint8")).save(folder / label / f"{number}.png")
    return folder


def save_sentences(path: Path, each: int = 16) -> Path:
    """Save sentences that begin and end with the word for their class, so that a head finds it."""
    draw = random.Random(0)
    words = [word for word in ("good", "bad") for _ in range(each)]
    rows = [(" ".join([word, *draw.sample(FILLER, 3), word]), word) for word in words]
    return write_csv(path, ["text", "label"], rows)


def make_section(family: Family, strategy: str) -> Finetune:
    """Return the recipe's section."""
    of_trained = {
        "blocks": 1, "lora": {"r": 2}, "gradual": {"epochs": 1},
        "freeze_batchnorm": HELD.get(strategy),
    }  # fmt: skip
    known = strategy if strategy != "scratch" else "full"
    common = {"strategy": known, "pooling": family.pooling, "training": TRAINING}
    return Finetune.model_validate(common | of_trained)


def check_solved(
    context: ExperimentContext, family: Family, strategy: str, finetune: Finetune
) -> ArmOutput:
    """Solve a head twice, and compare all that it is with the last layer."""
    output, again = (SOLVERS[strategy](context, finetune, 0) for _ in range(2))
    assert_same(output, again)
    trained = {n for n in output.weights if n.startswith(family.head)}
    fresh = {n for n in output.weights if n.startswith(tuple(family.saved.split()))}
    assert trained and output.weights.keys() == trained | fresh
    return output


def check_stopped(
    context: ExperimentContext, family: Family, strategy: str, finetune: Finetune, folder: Path
) -> ArmOutput:
    """Stop a training, look at the model, and let the training go on to the same end."""
    checkpoints = CheckpointSpec(folder / "steps", KEY, every=1)

    def train(checkpoints: CheckpointSpec | None) -> ArmOutput:
        if strategy != "scratch":
            return train_arm(context, finetune, 0, checkpoints=checkpoints)
        search = Search(learning_rates=[1e-3], epochs_factor=1)
        return train_scratch(
            context, finetune, search, ScratchSearch(learning_rate=1e-3), 0, checkpoints
        )

    with watch_first_step() as stopped, stop_after(STEPS + EPOCH_STEPS * (strategy == "gradual")):
        train(checkpoints)
    if strategy == "lora":
        check_adapters(stopped, family)
    else:
        check_trains(stopped, family, strategy)
    check_moved(stopped, is_held=HELD.get(strategy, False) is not False)
    # timm's initialisation ends residual branches by 0: what is in them moves later.
    moved = len(stopped.list_moved() & stopped.list_trains())
    assert moved > len(stopped.list_trains()) / 4 or strategy == "scratch"
    assert list(checkpoints.folder.rglob("step-*"))
    output = train(checkpoints)
    assert_same(output, train(None))
    trained = (
        stopped.list_trains() if strategy != "gradual" else stopped.list_named("", family.idle)
    )
    assert {name for name in output.weights if ".running_" not in name} >= trained
    return output


@contextmanager
def watch_first_step() -> Iterator[Stopped]:
    """Copy all tensors of the model that is trained next, before its first step."""
    train_batch, stopped = TransferTrainer.training_step, Stopped()

    def copy_once(trainer: TransferTrainer, model: Any, *args: Any) -> Tensor:
        if stopped.model is None:
            stopped.model = model
            stopped.before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
        return train_batch(trainer, model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", copy_once)
        yield stopped


def check_trains(stopped: Stopped, family: Family, strategy: str) -> None:
    """Compare the parameters that require a gradient with the table; some of each start moved."""
    top = f"{family.after} {family.top}"
    expected = {"partial": top, "gradual": f"{top} {family.before}"}.get(strategy, "")
    assert stopped.list_trains() == stopped.list_named(expected, family.idle)
    moved = stopped.list_moved()
    assert all(any(n.startswith(start) for n in moved) for start in (*top.split(), family.head))


def check_adapters(stopped: Stopped, family: Family) -> None:
    """Compare LoRA's layers, and the modules that train whole, with the table."""
    spec = get_model_spec(stopped.model)
    blocks = list_block_paths(get_encoder(stopped.model, spec), spec)
    assert len(blocks) == family.blocks and family.top.endswith(f"{blocks[-1]}.")
    trains = stopped.list_trains()
    paths = {f".{name.split('.lora_')[0]}" for name in trains if ".lora_" in name}
    ends = {path.split(f".{b}.", 1)[1] for path in paths for b in blocks if f".{b}." in path}
    assert (ends, len(paths)) == (set(family.layers.split()), family.count)
    whole = {
        re.split(r"\.modules_to_save\.|\.weight$|\.bias$", n)[0]
        for n in trains
        if ".lora_" not in n
    }
    assert {n.removeprefix("base_model.model.") for n in whole} == set(family.saved.split())


def check_moved(stopped: Stopped, is_held: bool) -> None:
    """Check that what does not train is bit for bit as before, running statistics too."""
    trains, moved = stopped.list_trains(), stopped.list_moved()
    owners = {name.rpartition(".")[0] for name in trains}
    statistics = {
        n for n in stopped.before if re.search(r"\.(running_\w+|num_batches_tracked)$", n)
    }
    live = set() if is_held else {n for n in statistics if n.rpartition(".")[0] in owners}
    assert moved <= trains | live and (moved & statistics or not live)


def publish_output(
    context: ExperimentContext, finetune: Finetune, output: ArmOutput, folder: Path
) -> ReloadJob:
    """Publish what an arm left, its logits brought to about 1, beside a sample."""
    save_file(output.weights, folder / "weights.safetensors")
    model = rebuild_model(context, finetune, 0, folder / "weights.safetensors")
    rows = [context.prepared.rows["test"][i] for i in select_sample_rows(context)]
    expected = select_sample_logits(context, output.logits["test"])

    def predict() -> np.ndarray:
        return predict_logits(model, context.encode_rows(rows), context.inputs, "cpu")

    np.testing.assert_allclose(predict(), expected, rtol=0, atol=1e-5 * max(1, abs(expected).max()))
    if scale_logits(get_last_linear(model, get_model_spec(model)), expected):
        expected = predict()
    assert np.ptp(expected, axis=0).max() > 1e-3, "rows differ"
    (folder / "publish").mkdir()
    export_model(context, model, finetune, folder / "publish")
    sample = write_reload_sample(context, expected, folder)
    return ReloadJob(folder / "publish", context.source.folder, sample)
