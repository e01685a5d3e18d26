"""Every planted defect is found under its kind, and sound adapters have none."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences
from planting import (
    BASES,
    COMMIT,
    NAMES,
    PLANTED,
    SOUND,
    as_in_transformers_4,
    base_is_a_local_path,
    into_cache,
    pooler_drawn_anew_by_every_load,
    reconfigure,
    rewrite,
    save,
    snapshot,
    wrapped,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from tiny import is_image, tiny_config, tiny_processor, tiny_tokenizer

from hftl import cli
from hftl.errors import HubError, RecipeError
from hftl.model.source import find_source, weights_sha256
from hftl.publish.doctor import once, reloading
from hftl.publish.doctor.examine import Examination, examine
from hftl.publish.doctor.mend import backup, mend
from hftl.publish.doctor.stale import modern, renamed_keys
from hftl.publish.doctor.told import diagnose, told
from hftl.sections import Source

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def hub(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A hub's cache with the bases, as `tiny/<name>` at COMMIT."""
    cache = tmp_path_factory.mktemp("cache")
    for name, made_of in BASES.items():
        into_cache(cache, name, tiny_model(*made_of))
    deeper = tmp_path_factory.mktemp("deeper")
    from transformers import AutoModel

    for name, kind, more in (("bert-2", "bert", {"num_hidden_layers": 2}),
                             ("bert-4", "bert", {"num_hidden_layers": 4}),
                             ("vit-wide", "vit", {"hidden_size": 32})):  # fmt: skip
        AutoModel.from_config(tiny_config(kind, **more)).save_pretrained(deeper / name)
        (tiny_processor if is_image(kind) else tiny_tokenizer)(deeper / name)
        into_cache(cache, name, deeper / name)
    for name in ("roberta", "vit"):
        into_cache(cache, f"{name}-bare", tiny_model(name))
        for file in ("tokenizer.json", "preprocessor_config.json"):
            (snapshot(cache, f"{name}-bare") / file).unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def adapters(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound adapters made with plain peft."""
    place = tmp_path_factory.mktemp("sound")
    return {
        name: save(wrapped(snapshot(hub, base), base, settings), place / name)
        for name, (base, settings) in SOUND.items()
    }


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads here instead of in two fresh processes, which take seconds each."""
    if "fresh_processes" not in request.keywords:
        monkeypatch.setattr(reloading, "loads", here)


def here(clean: Path, base: Path, name: str) -> list[np.ndarray]:
    return [np.array(once.output(clean, base, name, seed)) for seed in reloading.SEEDS]


def kinds(found: Examination, defects: bool = True) -> set[str]:
    return {one.kind for one in (found.defects if defects else found.findings)}


# --- sound -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_adapter_has_no_defect(name: str, adapters: dict[str, Path]) -> None:
    found = examine(adapters[name])
    assert not found.defects, found.defects
    assert not found.unexamined
    assert found.exit_code == 0
    assert kinds(found, defects=False) <= {"card"}


def test_what_the_trainer_trained_is_sound(hub: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    adapted = wrapped(snapshot(hub, "bert"), "bert", SOUND["bert"][1])
    tokenizer = AutoTokenizer.from_pretrained(snapshot(hub, "bert"))
    rows = [
        {**tokenizer(text, padding="max_length", max_length=12), "labels": int(label == "positive")}
        for text, label in sentences(16)
    ]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=rows, processing_class=tokenizer)  # pyright: ignore
    trainer.train()
    save(adapted, tmp_path / "adapter")
    assert not examine(tmp_path / "adapter").defects
    # What the Trainer itself writes has its pickled arguments in it.
    trainer.save_model(str(tmp_path / "saved"))
    assert kinds(examine(tmp_path / "saved")) == {"unsafe", "labels"}


def test_what_hftl_publishes_is_sound(hub: Path, tmp_path: Path) -> None:
    from test_reload import opened, published

    bench, recipe = opened(snapshot(hub, "bert-mlm"), tmp_path, "mean", "lora")
    published(bench, recipe, tmp_path)
    publish = tmp_path / "publish"
    rewrite(publish / "adapter_config.json", base_model_name_or_path="tiny/bert-mlm",
            revision=COMMIT)  # fmt: skip
    source = {"model": "tiny/bert-mlm", "weights_sha256": bench.weights}
    rewrite(publish / "hftl.json", source=source, data={"labels": ["negative", "positive"]})
    found = examine(publish)
    assert not found.defects, found.defects
    assert not found.unexamined


# --- planted -----------------------------------------------------------------------------------


@pytest.fixture
def planted(
    request: pytest.FixtureRequest, adapters: dict[str, Path], hub: Path, tmp_path: Path
) -> tuple[Path, str]:
    adapter, kind, how = PLANTED[request.param]
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[adapter], folder)
    how(folder, hub)
    return folder, kind


@pytest.mark.parametrize("planted", PLANTED, indirect=True)
def test_a_planted_defect_is_found(planted: tuple[Path, str]) -> None:
    folder, kind = planted
    found = examine(folder)
    assert kind in kinds(found), (found.findings, found.unexamined)
    assert found.exit_code == 4
    one = next(one for one in found.defects if one.kind == kind)
    assert one.what and one.where and one.fix
    assert one.kind in told(found, 120)


def test_every_kind_is_planted_for_text_and_images() -> None:
    planted_kinds = {kind for _, kind, _ in PLANTED.values()}
    assert planted_kinds == {
        "fresh", "reload", "base", "base-shape", "base-weights", "stale-names", "unsafe", "labels",
        "tokenizer", "card", "corrupt", "config", "nan", "rank",
    }  # fmt: skip
    assert len(PLANTED) >= 20


# --- warnings, whole models, what cannot be examined --------------------------------------------


def copied(adapters: dict[str, Path], name: str, place: Path) -> Path:
    return Path(shutil.copytree(adapters[name], place / "adapter"))


def test_an_unpinned_base_is_a_warning(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, revision=None)
    found = examine(folder)
    assert not found.defects and "base" in kinds(found, defects=False)
    assert found.exit_code == 0


def test_a_base_that_is_away_is_said_and_nothing_is_called_sound(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "vit", tmp_path)
    reconfigure(folder, base_model_name_or_path="somebody/unknown")
    found = examine(folder)
    assert not found.defects
    assert "somebody/unknown" in found.unexamined[0]
    assert found.exit_code == 5
    (folder / "training_args.bin").write_bytes(b"")
    assert examine(folder).exit_code == 4


def test_a_base_that_the_hub_does_not_know_is_a_defect(
    adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*args: Any, **more: Any) -> Path:
        request = type("Request", (), {"headers": {}, "method": "GET", "url": ""})()
        response = type("Response", (), {"headers": {}, "request": request, "status_code": 404})()
        raise RepositoryNotFoundError("404", response=response)  # pyright: ignore

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    found = examine(adapters["bert"])
    assert kinds(found) == {"base"} and found.exit_code == 4


def test_a_base_given_is_compared_with_the_one_named(
    adapters: dict[str, Path], hub: Path, tmp_path: Path
) -> None:
    found = examine(adapters["bert"], str(snapshot(hub, "bert")))
    assert not found.defects and not found.unexamined
    assert kinds(examine(adapters["bert"], str(snapshot(hub, "bert-4")))) == {"base-shape"}
    other = examine(adapters["bert"], "tiny/bert-2")
    assert "base" in kinds(other, defects=False)
    with pytest.raises(RecipeError):
        examine(adapters["bert"], str(tmp_path / "nothing"))


def test_the_hash_of_the_right_base_is_no_finding(
    adapters: dict[str, Path], hub: Path, tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    right = weights_sha256(find_source(Source(model=str(snapshot(hub, "bert")))))
    rewrite(folder / "hftl.json", source={"weights_sha256": right})
    assert not examine(folder).defects


def test_a_folder_here_is_not_taken_for_the_base_that_the_adapter_names(
    adapters: dict[str, Path], hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = Path(shutil.copytree(snapshot(hub, "vit"), tmp_path / "tiny" / "bert"))
    monkeypatch.chdir(tmp_path)
    found = examine(adapters["bert"])
    assert found.source is not None and not found.source.local and not found.defects
    given = examine(adapters["bert"], "tiny/bert").source
    assert given is not None and given.folder.resolve() == decoy


def test_a_base_of_pickles_is_not_opened(
    adapters: dict[str, Path], hub: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(snapshot(hub, "bert"), tmp_path / "base"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    found = examine(adapters["bert"], str(base))
    assert "pickles are not opened" in found.unexamined[0]


def test_a_whole_model(hub: Path, tmp_path: Path) -> None:
    model = wrapped(snapshot(hub, "bert-mlm"), "bert-mlm", SOUND["bert"][1]).merge_and_unload()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    assert not examine(tmp_path / "model").defects
    path = tmp_path / "model" / "model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if "pooler" not in k}
    save_file(tensors, path, {"format": "pt"})
    assert kinds(examine(tmp_path / "model")) == {"fresh", "reload"}
    rewrite(tmp_path / "model" / "config.json", auto_map={"AutoModel": "m.M"})
    found = examine(tmp_path / "model")
    assert kinds(found) == {"unsafe"} and found.unexamined


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no adapter_config\.json"):
        examine(tmp_path)
    with pytest.raises(RecipeError, match="no folder"):
        examine(tmp_path / "nothing" / "here")
    with pytest.raises(HubError):
        examine("somebody/unknown-adapter")


def test_other_kinds_of_adapter_are_examined_too(hub: Path, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(snapshot(hub, "bert"))
    model.name_or_path = "tiny/bert"
    model.config.update({"id2label": dict(enumerate(NAMES))})
    settings = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[],
                         revision=COMMIT)  # fmt: skip
    adapter = save(get_peft_model(model, settings), tmp_path / "adapter")
    found = examine(adapter)
    assert not found.defects and not found.unexamined
    reconfigure(adapter, peft_type="PROMPT_TUNING")
    assert "PROMPT_TUNING" in examine(adapter).unexamined[0]


@pytest.mark.slow
@pytest.mark.fresh_processes
def test_two_fresh_processes_tell_random_weights(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert-mlm", tmp_path)
    pooler_drawn_anew_by_every_load(folder, tmp_path)
    assert kinds(examine(folder)) == {"fresh", "reload"}


@pytest.mark.slow
@pytest.mark.fresh_processes
@pytest.mark.parametrize("name", ["bert-mlm", "vit"])
def test_two_fresh_processes_say_the_same_of_a_sound_adapter(
    name: str, adapters: dict[str, Path]
) -> None:
    assert not examine(adapters[name]).defects


# --- mending -----------------------------------------------------------------------------------


def mended(folder: Path, base: str | None = None) -> tuple[list[str], Examination]:
    lines = mend(examine(folder, base), base)
    return lines, examine(folder, base)


@pytest.mark.parametrize(
    ("adapter", "model", "lists"),
    [("vit", "vit", "encoder.layer"), ("dinov2", "dinov2", "layers"), ("vit-mae", "vit", "layers")],
)
def test_old_names_are_renamed_and_the_model_says_the_same(
    adapter: str, model: str, lists: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, adapter, tmp_path)
    if adapter == "vit-mae":
        reconfigure(folder, target_modules=["intermediate.dense"])
    else:
        as_in_transformers_4(folder, model, lists)
    before = (folder / "adapter_config.json").read_bytes()
    assert "stale-names" in kinds(examine(folder))
    lines, found = mended(folder)
    assert lines and not found.defects
    right, ours = (load_file(f / "adapter_model.safetensors") for f in (adapters[adapter], folder))
    assert right.keys() == ours.keys()
    assert all(torch.equal(right[key], ours[key]) for key in right)
    assert (backup(folder) / "adapter_config.json").read_bytes() == before
    targets = [json.loads((f / "adapter_config.json").read_text())["target_modules"]
               for f in (adapters[adapter], folder)]  # fmt: skip
    assert sorted(targets[0]) == sorted(targets[1])


def test_patterns_are_renamed_too(hub: Path, tmp_path: Path) -> None:
    settings = SOUND["vit"][1] | {"rank_pattern": {"layers.1.attention.q_proj": 2}}
    folder = save(wrapped(snapshot(hub, "vit"), "vit", settings), tmp_path / "adapter")
    assert not examine(folder).defects
    as_in_transformers_4(folder, "vit", "encoder.layer")
    reconfigure(folder, rank_pattern={"encoder.layer.1.attention.attention.query": 2})
    _, found = mended(folder)
    assert not found.defects


def test_the_base_told_by_its_hub_id_is_named_and_pinned(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    base_is_a_local_path(folder, tmp_path)
    (folder / "README.md").write_text(
        "---\nbase_model: /home/x/bert\nlibrary_name: peft\n---\nIt\n"
    )
    lines, found = mended(folder, "tiny/bert")
    assert len(lines) == 2 and not found.defects
    told_now = json.loads((folder / "adapter_config.json").read_text())
    assert told_now["base_model_name_or_path"] == "tiny/bert" and told_now["revision"] == COMMIT
    assert "base_model: tiny/bert" in (folder / "README.md").read_text()


def test_a_base_that_does_not_fit_is_not_written(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    base_is_a_local_path(folder, tmp_path)
    assert mended(folder, "tiny/bert-2")[0] == []


def test_only_a_proven_base_is_pinned(adapters: dict[str, Path], hub: Path, tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, revision=None)
    assert mended(folder)[0] == []
    right = weights_sha256(find_source(Source(model=str(snapshot(hub, "bert")))))
    rewrite(folder / "hftl.json", source={"weights_sha256": right})
    lines, found = mended(folder)
    assert COMMIT in lines[0] and "base" not in kinds(found, defects=False)


def test_labels_and_inputs_are_taken_from_record_and_base(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "vit", tmp_path)
    (folder / "config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    assert not any("labels" in line for line in mended(folder)[0])
    assert (folder / "preprocessor_config.json").exists()
    rewrite(folder / "hftl.json", data={"labels": NAMES})
    lines, found = mended(folder)
    assert lines and not found.defects
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["architectures"] == ["ViTForImageClassification"]


def test_pickles_are_left_where_they_are(adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(adapters, "bert", tmp_path)
    (folder / "training_args.bin").write_bytes(b"x")
    said: list[str] = []
    assert diagnose(str(folder), None, True, said.append) == 4
    assert (folder / "training_args.bin").exists()
    assert "nothing here can be fixed without you" in said


def test_a_hubs_copy_and_a_runs_folder_are_not_changed(
    adapters: dict[str, Path], hub: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapters["bert"], run / "publish")
    source = {"model": str(snapshot(hub, "bert"))}
    (run / "recipe.yaml").write_text(
        json.dumps({"source": source, "data": {"train": {"path": "x.csv"}}})
    )
    found = examine(run)
    assert not found.defects and found.patient.run == run
    assert examine(run / "publish").patient.run == run
    with pytest.raises(RecipeError, match="its run writes it"):
        mend(found, None)
    into_cache(hub, "adapter", adapters["bert"])
    found = examine("tiny/adapter")
    assert not found.defects
    with pytest.raises(RecipeError, match="on a hub"):
        mend(found, None)


# --- what it says, and what it never does --------------------------------------------------------


def test_a_strangers_text_does_not_steer_the_terminal(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, base_model_name_or_path="/x/\x1b[2J[red]\u202e\nsound")
    text = told(examine(folder), 200)
    assert "\x1b" not in text and "\u202e" not in text and "[red]" in text
    assert text.splitlines()[-1].endswith("1 defect and 1 warning")


def test_exit_codes_on_the_command_line(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = copied(adapters, "bert", tmp_path)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["hftl", "doctor", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(str(stop.value.code))

    assert call(str(folder)) == 0
    assert ": sound" in capsys.readouterr().out.splitlines()[-1]
    reconfigure(folder, base_model_name_or_path=None)
    assert call(str(folder), "--base", "tiny/bert") == 4
    assert call(str(folder), "--base", "tiny/bert", "--fix") == 0
    assert call(str(tmp_path / "no" / "where")) == 2
    assert call("somebody/unknown") == 5


HOSTILE = """
import json, sys
from pathlib import Path
import numpy, torch, peft, transformers, huggingface_hub
from hftl.publish.doctor import once, reloading
from hftl.publish.doctor.examine import examine
from hftl.publish.doctor.told import told

sound, *hostile = sys.argv[1:]
# The loads stand under the watch too.
reloading.loads = lambda clean, base, name: [
    numpy.array(once.output(clean, base, name, seed)) for seed in reloading.SEEDS
]
BAD = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")
seen = {"import": [], "open": [], "bad": []}

def watch(event, args):
    if event in ("import", "open"):
        seen[event].append(str(args[0]))
    elif event in BAD:
        seen["bad"].append(event)

examine(sound)
sys.addaudithook(watch)
found = [examine(folder) for folder in hostile]
print(json.dumps(seen | {
    "kinds": [sorted({one.kind for one in each.defects}) for each in found],
    "told": [told(each, 200) for each in found],
    "unexamined": [each.unexamined for each in found],
}))
"""


def make_hostile(folder: Path, secret: Path, mark: Path, base: str) -> None:
    """Everything that a loader may be made to run or to read."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("evil_library.py", "modeling_evil.py", "tiny_setup.py"):
        (folder / name).write_text(code)
    pickled = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    for name in ("adapter_model.bin", "training_args.bin", "pytorch_model.bin", "head.pkl"):
        (folder / name).write_bytes(pickled)
    (folder / "vocab.txt").symlink_to(secret)
    rewrite(folder / "config.json", auto_map={"AutoConfig": "modeling_evil.C"},
            _attn_implementation_internal="evil/kernel", model_type="evil")  # fmt: skip
    rewrite(folder / "tokenizer_config.json", vocab_file=str(secret), trust_remote_code=True,
            auto_map={"AutoTokenizer": ["modeling_evil.T", None]})  # fmt: skip
    reconfigure(
        folder, base_model_name_or_path=base, megatron_config={"a": 1},
        megatron_core="evil_library", tokenizer_name_or_path=str(secret),
        runtime_config={"x": "evil_library"},
    )  # fmt: skip


def test_a_hostile_adapter_runs_and_reads_nothing(
    adapters: dict[str, Path], hub: Path, tmp_path: Path
) -> None:
    secret, mark = tmp_path / "secret.env", tmp_path / "mark"
    secret.write_text("TOKEN=1")
    homes = [tmp_path / name for name in ("loaded", "pathed", "mapped")]
    for home, base in zip(homes, ("tiny/bert", str(secret), "tiny/bert"), strict=True):
        make_hostile(copied(adapters, "bert", home), secret, mark, base)
    folders = [(home / "adapter").resolve() for home in homes]
    mapping = {"parent_library": "evil_library", "base_model_class": "os"}
    reconfigure(folders[2], auto_mapping=mapping)
    (tmp_path / "doctor.py").write_text(HOSTILE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "doctor.py"), str(adapters["bert"]), *map(str, folders)],
        capture_output=True, text=True, cwd=folders[0], check=False,
        env=os.environ | {"HF_HUB_CACHE": str(hub), "HF_HOME": str(hub), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert not mark.exists() and not seen["bad"]
    assert all("unsafe" in found for found in seen["kinds"])
    assert [bool(found) for found in seen["unexamined"]] == [False, True, True]
    assert not [name for name in seen["import"] if "evil" in name or name == "tiny_setup"]
    opened = {Path(name).resolve() for name in seen["open"] if not name.isdigit()}
    assert secret.resolve() not in opened
    ours = [path for path in opened if any(path.is_relative_to(home) for home in folders)]
    assert ours and not [path for path in ours if path.suffix in (".py", ".bin", ".pkl")]
    known = (sys.prefix, sys.base_prefix, ROOT, tempfile.gettempdir(), "/proc", "/sys", "/dev")
    assert not [path for path in opened if not any(path.is_relative_to(place) for place in known)]
    assert not [path for path in opened if path.is_relative_to(tmp_path) and path not in ours]


def test_modern_names() -> None:
    modules = ["vit.layers.0.attention.q_proj", "dinov2.encoder.layer.3.attention.o_proj",
               "swin.encoder.layers.0.blocks.1.attention.v_proj", "vit.layers.0.mlp.fc1",
               "vit.layers.0.mlp.fc2", "bert.encoder.layer.0.attention.self.query"]  # fmt: skip
    old = {
        "vit.encoder.layer.0.attention.attention.query": modules[0],
        "dinov2.encoder.layer.3.attention.output.dense": modules[1],
        "swin.encoder.layers.0.blocks.1.attention.self.value": modules[2],
        "vit.encoder.layer.0.intermediate.dense": modules[3],
        "vit.encoder.layer.0.output.dense": modules[4],
        "bert.encoder.layer.0.attention.self.query": None,
        "bert.encoder.layer.9.attention.self.query": None,
        "vit.encoder.layer.7.attention.attention.query": None,
    }
    assert {name: modern(name, modules) for name in old} == old
    keys = {f"base_model.model.{name}.lora_A.weight": new for name, new in old.items()}
    expected = {k: f"base_model.model.{new}.lora_A.weight" for k, new in keys.items() if new}
    assert renamed_keys(keys, modules) == expected
