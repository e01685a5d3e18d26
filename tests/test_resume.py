"""Stop trainings at any step, damage what they left, and compare the end with one without a stop.

tests/test_adapt_stage.py does so for adaptations, tests/test_processes.py on two processes, and
tests/campaign.py kills whole runs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import bench_of, make_image_recipe, pictures, sentences, write_csv

import hftl
from hftl.config.finetune import Finetune
from hftl.config.recipe import Recipe
from hftl.data.general import load_general
from hftl.data.rows import InputSpec
from hftl.errors import DataWarning, RunFolderError
from hftl.finetune import baselines
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import ArmOutput, read_metrics_file
from hftl.finetune.baselines import train_scratch
from hftl.finetune.context import ExperimentContext
from hftl.pipeline import arms
from hftl.pipeline.changed_inputs import check_unfinished
from hftl.retain.kl import KLToOriginal
from hftl.retain.regularizer import Retention
from hftl.retain.weights import L2SP
from hftl.runtime import interruption
from hftl.runtime.interruption import defer_signals
from hftl.train import step_checkpoint
from hftl.train.facts import ScratchSearch
from hftl.train.step_checkpoint import CheckpointSpec, CheckpointWriter, find_checkpoint
from hftl.train.trainer import TransferTrainer

KEY = {"of": "a test"}
TRAINING = {
    "learning_rate": 5e-3, "bf16": False, "per_device_train_batch_size": 8, "num_train_epochs": 2,
}  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}},
    "full": {"layer_decay": 0.7, "patience": 1},
    "partial": {"blocks": 1, "cache": "always"},
    "gradual": {"gradual": {"epochs": 1, "final_epochs": 1}},
    "scratch": {},
}
"""A section of the recipe for each strategy; 36 rows are 5 steps an epoch, the last one short."""
ENDS = [3, 5, 6]
"""Steps after which a training is stopped: in an epoch, at its end, and after the first of one."""


@pytest.fixture(scope="module")
def context(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentContext:
    """Return 36 rows to train on and, for replay, general rows."""
    folder = tmp_path_factory.mktemp("resume")
    table = write_csv(folder / "reviews.csv", ["text", "label"], sentences(80))
    general = write_csv(folder / "general.csv", ["text", "label"], sentences(40, seed=9))
    recipe = Recipe.parse({
        "source": {"model": str(bert)},
        "data": {
            "train": {"path": str(table)}, "general": {"path": str(general)}, "max_length": 16,
            "shots": 18,
        },
    })  # fmt: skip
    context = bench_of(recipe)
    context.general = load_general(recipe.data, context.prepared, InputSpec())
    context.feature_root = folder / "features"
    return context


def train(
    context: ExperimentContext, strategy: str, folder: Path | None, **training: Any
) -> ArmOutput:
    """Train one arm with dropout; KL to the original, L2-SP and replay where it has an original."""
    section = Finetune.model_validate({
        "strategy": "full" if strategy == "scratch" else strategy, "pooling": "mean",
        "training": TRAINING | training, **SECTIONS[strategy],
    })  # fmt: skip
    torch.manual_seed(torch.seed())  # What was drawn before must not matter.
    checkpoints = None if folder is None else CheckpointSpec(folder, KEY, every=1)
    if strategy == "scratch":
        search = Recipe.parse({"source": {"model": "m"}, "data": {"train": {"path": "t"}}}).measure
        chosen = ScratchSearch(learning_rate=1e-3)
        return train_scratch(context, section, search.scratch, chosen, 0, checkpoints)
    retention = Retention([KLToOriginal(0.5), L2SP(0.1)])
    if context.general is not None and strategy in ("lora", "full"):
        retention = replace(retention, general=context.build_general_dataset(), ratio=0.5)
    return train_arm(context, section, 0, retention, checkpoints)


@contextmanager
def stop_after(steps: int) -> Iterator[None]:
    """Let the power fail in the training step after so many, counted over all phases."""
    train_batch, done = TransferTrainer.training_step, []

    def stop(trainer: TransferTrainer, *args: Any) -> torch.Tensor:
        if len(done) == steps:
            raise KeyboardInterrupt
        loss = train_batch(trainer, *args)
        if trainer.accelerator.sync_gradients:
            done.append(trainer.state.global_step)
        return loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransferTrainer, "training_step", stop)
        yield


def assert_same(one: ArmOutput, other: ArmOutput) -> None:
    """Compare facts, weights, predictions and embeddings, bit for bit."""
    assert one.facts == other.facts
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(tensor, other.weights[n]) for n, tensor in one.weights.items())
    for part in ("logits", "embeddings"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(values, theirs[name]) for name, values in ours.items())


def check_stopped_training(context: ExperimentContext, finetune: Finetune, folder: Path) -> None:
    """Stop an arm after its third step, let it go on, and compare with one without a stop."""
    checkpoints = CheckpointSpec(folder / "steps", KEY, every=1)
    expected = train_arm(context, finetune, 0)
    with stop_after(3):
        train_arm(context, finetune, 0, checkpoints=checkpoints)
    assert find_checkpoint(folder / "steps", KEY) is not None
    assert_same(train_arm(context, finetune, 0, checkpoints=checkpoints), expected)


@pytest.fixture(scope="module")
def whole(context: ExperimentContext) -> Callable[..., ArmOutput]:
    """`whole(strategy, **training)`: the output of an arm that was never stopped."""
    outputs: dict[str, ArmOutput] = {}

    def find(strategy: str, **training: Any) -> ArmOutput:
        name = f"{strategy} {training}"
        if name not in outputs:
            outputs[name] = train(context, strategy, None, **training)
        return outputs[name]

    return find


GRID = [
    ("lora", ENDS, {}), ("full", [5], {}),
    *(
        pytest.param(strategy, ends, training, marks=pytest.mark.slow)
        for strategy in SECTIONS for ends in (ENDS, [1, 2], [9])
        for training in (
            {}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            {"dataloader_num_workers": 2}, {"lr_scheduler_type": "cosine", "optim": "adafactor"},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "ends", "training"), GRID)
def test_stopped_training_ends_as_one_without_a_stop(
    strategy: str, ends: list[int], training: dict[str, Any], context: ExperimentContext,
    whole: Callable[..., ArmOutput], tmp_path: Path,
) -> None:  # fmt: skip
    before = 0
    for end in ends:
        with stop_after(end - before):
            train(context, strategy, tmp_path, **training)
        before = end
    assert_same(train(context, strategy, tmp_path, **training), whole(strategy, **training))


@pytest.mark.slow
def test_pictures_vary_after_a_stop_as_before(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "pictures", 30)
    recipe = make_image_recipe(folder, tiny_model("vit"), augment="light", image_size=24, shots=18)
    context = bench_of(recipe)
    expected = train(context, "full", None, dataloader_num_workers=1)
    with stop_after(3):
        train(context, "full", tmp_path / "stopped")
    assert_same(train(context, "full", tmp_path / "stopped"), expected)


def test_training_without_its_random_state_ends_otherwise(
    context: ExperimentContext, whole: Callable[..., ArmOutput], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Show that dropout depends on it: else the tests above could not fail."""
    with stop_after(3):
        train(context, "lora", tmp_path)
    monkeypatch.setattr(TransferTrainer, "load_checkpoint_random_state", lambda *_: None)
    resumed, expected = train(context, "lora", tmp_path), whole("lora")
    assert any(not torch.equal(t, resumed.weights[n]) for n, t in expected.weights.items())


# Damage


@pytest.fixture(scope="module")
def stopped(context: ExperimentContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a LoRA arm that was stopped after its fourth step has left."""
    folder = tmp_path_factory.mktemp("stopped") / "steps"
    with stop_after(4):
        train(context, "lora", folder)
    return folder


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def take_from_another(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-3" / path.name, path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "short": lambda path: os.truncate(path, int(0.99 * path.stat().st_size)),
    "header": lambda path: flip(path, 0.0),
    "payload": lambda path: flip(path, 0.8),
    "of another step": take_from_another,
    "a folder": replace_by_folder,
    "a link": replace_by_link,
}
FILES = (
    "weights.safetensors", "optimizer.safetensors", "callbacks.safetensors", "random.safetensors",
    "state.json", "trainer_state.json", "inputs.json", "MANIFEST.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    name: str, damage: str, stopped: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "steps"))
    same = (folder / "step-3" / name).read_bytes() == (folder / "step-4" / name).read_bytes()
    if damage == "of another step" and same:
        pytest.skip("both steps hold the same")
    DAMAGES[damage](folder / "step-4" / name)
    with pytest.warns(DataWarning, match=r"step-4.*an earlier state is used") as said:
        assert find_checkpoint(folder, KEY) == folder / "step-3"
    assert len(said) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["quarantine-step-4", "step-3"]


def test_damaged_checkpoint_changes_no_result(
    stopped: Path, context: ExperimentContext, whole: Callable[..., ArmOutput], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "steps"))
    flip(folder / "step-4" / "optimizer.safetensors", 0.9)
    with pytest.warns(DataWarning):
        assert_same(train(context, "lora", folder), whole("lora"))
    for path in folder.glob("step-*"):
        flip(path / "weights.safetensors", 0.9)
    with pytest.warns(DataWarning) as said:
        assert find_checkpoint(folder, KEY) is None
    assert len(said) == 2


def test_checkpoint_holds_no_pickle_and_one_of_another_training_is_not_used(
    stopped: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "steps"))
    assert {path.name for path in (folder / "step-4").iterdir()} == set(FILES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What the recipe itself says of an arm's keys changes no step.
        assert find_checkpoint(folder, {**KEY, "asked": {"a": 1}}) == folder / "step-4"
    with pytest.warns(DataWarning, match=r"step-\d was of another training.*\(changed: a\.c, of\)"):
        other = {"of": "another", "recipe": {"a.c": 1}}
        assert find_checkpoint(folder, other) is None
    assert not list(folder.iterdir())


# Rhythm


def test_rhythm_follows_the_cost_and_short_trainings_write_nothing(
    context: ExperimentContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(step_checkpoint.time, "monotonic", lambda: now[0])
    writer, model = CheckpointWriter(CheckpointSpec(tmp_path, KEY)), torch.nn.Linear(2, 2)
    assert writer.compute_request(1, model) == 0
    now[0] += step_checkpoint.MIN_SECONDS - 0.1
    assert writer.compute_request(2, model) == 0
    now[0] += 0.1
    assert writer.compute_request(3, model) == 1
    assert writer.rhythm is not None
    writer.rhythm.note_written(10.0)
    assert writer.rhythm.interval == pytest.approx(10 / step_checkpoint.COST_SHARE) == 400
    now[0] += 399.9
    assert writer.compute_request(4, model) == 0
    now[0] += 0.2
    assert writer.compute_request(5, model) == 1
    large = CheckpointWriter(CheckpointSpec(tmp_path, KEY))
    large.compute_request(1, torch.nn.Linear(20_000, 20_000, device="meta"))
    assert large.rhythm is not None and large.rhythm.interval > 1000


# Signals


def send(number: int, step: int) -> Any:
    """Return a training step that sends this process a signal in a step."""
    train_batch = TransferTrainer.training_step

    def signal_in_step(trainer: TransferTrainer, *args: Any) -> torch.Tensor:
        if trainer.state.global_step + 1 == step:
            os.kill(os.getpid(), number)
        return train_batch(trainer, *args)

    return signal_in_step


@pytest.mark.parametrize(
    ("number", "step", "end"),
    [
        (signal.SIGUSR1, 4, SystemExit), (signal.SIGINT, 5, KeyboardInterrupt),
        pytest.param(signal.SIGTERM, 4, SystemExit, marks=pytest.mark.slow),
        # After the last step there is nothing to write, and no next phase.
        pytest.param(signal.SIGTERM, 10, SystemExit, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_signal_ends_a_training_after_one_checkpoint(
    number: int, step: int, end: type[BaseException], context: ExperimentContext,
    whole: Callable[..., ArmOutput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = signal.getsignal(number)
    spec = CheckpointSpec(tmp_path, KEY)
    section = Finetune.model_validate(
        {"strategy": "lora", "pooling": "mean", "training": TRAINING, **SECTIONS["lora"]}
    )
    general = context.build_general_dataset()

    def run() -> ArmOutput:
        retention = Retention([KLToOriginal(0.5), L2SP(0.1)], general=general, ratio=0.5)
        return train_arm(context, section, 0, retention, spec)

    with monkeypatch.context() as patch, pytest.raises(end) as ended:
        patch.setattr(TransferTrainer, "training_step", send(number, step))
        run()
    if end is SystemExit:
        assert ended.value.code == 143  # pyright: ignore[reportAttributeAccessIssue]
    assert [path.name for path in tmp_path.iterdir()] == ([f"step-{step}"] if step < 10 else [])
    assert signal.getsignal(number) is before
    assert_same(run(), whole("lora"))


def test_second_interrupt_and_the_end_of_the_grace_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KeyboardInterrupt), defer_signals() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(interruption, "GRACE_SECONDS", 0.02)
    with pytest.raises(SystemExit) as ended, defer_signals() as flag:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert ended.value.code == 143
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_handler_of_a_notice_that_is_a_program_s_own_stays() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    came: list[int] = []
    try:
        signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
        with defer_signals() as flag:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (flag.number, came) == (0, [signal.SIGUSR1])
        interruption.exit_on_notices()
        with defer_signals() as flag:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert flag.number == signal.SIGTERM
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGUSR1)
            signal.pause()
        assert ended.value.code == 143
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_gets_no_signals() -> None:
    numbers = []

    def wait() -> None:
        with defer_signals() as flag:
            numbers.append(flag.number)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert numbers == [0]


# Whole runs


@pytest.fixture
def unfinished(
    recipe_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Return a recipe and a run that lost its power in the first arm that trains."""
    recipe_tree["finetune"] |= {"strategy": "full"}
    recipe_tree["measure"] = {"seeds": [0], "arms": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    monkeypatch.setattr(step_checkpoint, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(step_checkpoint, "COST_SHARE", 1.0)
    with stop_after(4):
        hftl.run(path, tmp_path / "run", until="finetune")
    assert list((tmp_path / "run" / "checkpoints" / "full-seed0").glob("step-*"))
    return path, tmp_path / "run"


def test_changed_recipe_source_and_processes_are_refused_after_a_stop(
    unfinished: tuple[Path, Path],
) -> None:
    recipe, run = unfinished
    before = sorted(path for path in run.rglob("*") if path.is_file())
    for key, change in {
        "finetune.training.learning_rate": "learning_rate: 0.005 -> 0.001",
        "finetune.training.warmup_steps": "warmup_steps: unset -> 0.001",
        "finetune.head_init": "head_init: probe -> random",
    }.items():
        value = "random" if key.endswith("init") else 0.001
        with pytest.raises(RunFolderError, match=f"{re.escape(key[:9])}.*{re.escape(change)}"):
            hftl.run(Recipe.load(recipe, [f"{key}={value}"]), run, until="finetune")
    folder = run / "checkpoints" / "full-seed0"
    (stored, *_) = step_checkpoint.read_cache_keys(folder)
    for key, value, message in (
        ("weights", "0123456789", r"another source model.*weights: \w{8} -> 01234567"),
        ("data", "0123456789", r"other data.*data: \w{8} -> 01234567"),
        ("preprocessing", "0123456789", r"another tokenizer.*preprocessing: \w{8} -> 01234567"),
    ):
        with pytest.raises(RunFolderError, match=message):
            check_unfinished(run, folder, {**stored, key: value})  # pyright: ignore
    check_unfinished(run, folder, stored)  # pyright: ignore
    for key, value, message in (
        ("processes", 2, "share each step: 1 -> 2"), ("device", "tpu", r"device: \w+ -> tpu"),
        ("precision", "fp8", r"precision: \w+ -> fp8"),
    ):  # fmt: skip
        with pytest.raises(RunFolderError, match=f"{message}, for full-seed0"):
            check_unfinished(run, folder, {**stored, key: value})  # pyright: ignore
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before
    # Of an arm that the recipe has dropped, of its adaptation, and of a search that was finished.
    for name in ("dropped-seed0", "adapt-dropped-1", "rates"):
        (run / "checkpoints" / name / "step-3").mkdir(parents=True)
    hftl.run(recipe, run, until="finetune")
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(("seed", "trained"), [(0, []), (1, [1])])
def test_seed_is_predicted_by_a_trial_of_its_own_alone(
    seed: int, trained: list[int], recipe_tree: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run that was killed after its search may go on with another first seed.

    What a trial has spent counts for the seed that is predicted by it, though the trial was made by
    another process.
    """
    recipe_tree["finetune"]["strategy"] = "head"
    recipe_tree["measure"] |= {"arms": ["scratch"], "seeds": [0], "parallel": "data"}
    seeds: list[int] = []

    @contextmanager
    def spend_one(sharers: int = 1) -> Iterator[dict[str, float]]:
        yield (energy := {})
        energy["energy_kwh"] = 1.0

    monkeypatch.setattr(arms, "measure_energy", spend_one)

    def kill(*_: Any) -> None:
        raise RuntimeError("killed")

    def train(context: Any, finetune: Any, search: Any, chosen: Any, seed: int, *rest: Any) -> Any:
        seeds.append(seed)
        return train_scratch(context, finetune, search, chosen, seed, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(baselines, "predict_trial", kill)
        hftl.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    recipe_tree["measure"]["seeds"] = [seed]
    monkeypatch.setattr(baselines, "train_scratch", train)
    hftl.run(Recipe.parse(recipe_tree), tmp_path / "run", until="finetune")
    assert seeds == trained
    arm = read_metrics_file(tmp_path / "run" / "arms" / f"scratch-seed{seed}")
    assert arm.timings["energy_kwh"] == (1.0 if trained else 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["text", "image"])
def test_sample_of_the_campaign(only: str) -> None:
    counts = {"kills": 6, "signals": 4, "faults": 4, "races": 2, "ranks": 0, "fuzz": 0}
    words = ["--only", only, *(f"--{kind}={number}" for kind, number in counts.items())]
    command = [sys.executable, "-m", "tests.campaign", *words]
    ended = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert all(f"{kind}: {n} of {n} as promised" in ended.stdout for kind, n in counts.items())
