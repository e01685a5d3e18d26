"""Find every planted defect under its kind, and none in sound adapters."""

import errno
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import sentences
from safetensors.torch import load_file, save_file
from support.examination import copied, kinds
from support.planted_defects import (
    COMMIT,
    NAMES,
    PLANTED,
    SOUND,
    plant,
    reconfigure,
    rewrite,
    save,
    snapshot,
    wrapped,
)  # fmt: skip
from support.tiny import tiny_tokenizer

from hftl import cli
from hftl.doctor import load_check, load_once, load_process
from hftl.doctor.adapter_folder import Finding
from hftl.doctor.checks import examine_adapter
from hftl.doctor.report import _format_findings, format_report
from hftl.errors import HubError, RecipeError

pytestmark = pytest.mark.usefixtures("loads_in_this_process")


@pytest.mark.parametrize("name", SOUND)
def test_sound_adapter_has_no_defect(name: str, adapters: dict[str, Path]) -> None:
    examination = examine_adapter(adapters[name])
    assert not examination.defects, examination.defects
    assert not examination.unexamined
    assert examination.exit_code == 0
    assert kinds(examination, defects=False) <= {"card"}


def test_adapter_trained_by_the_trainer_is_sound(hub_cache: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    adapted = wrapped(snapshot(hub_cache, "bert"), "bert", SOUND["bert"][1])
    tokenizer = AutoTokenizer.from_pretrained(snapshot(hub_cache, "bert"))
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
    assert not examine_adapter(tmp_path / "adapter").defects
    # What the Trainer itself writes has its pickled arguments in it.
    trainer.save_model(str(tmp_path / "saved"))
    assert kinds(examine_adapter(tmp_path / "saved")) == {"unsafe"}


def test_folder_published_by_hftl_is_sound(hub_cache: Path, tmp_path: Path) -> None:
    from support.published_model import open_context, publish_model

    bench, recipe = open_context(snapshot(hub_cache, "bert-mlm"), tmp_path, "mean", "lora")
    publish_model(bench, recipe, tmp_path)
    publish = tmp_path / "publish"
    rewrite(publish / "adapter_config.json", base_model_name_or_path="tiny/bert-mlm",
            revision=COMMIT)  # fmt: skip
    source = {"model": "tiny/bert-mlm", "weights_sha256": bench.weights_hash}
    rewrite(publish / "hftl.json", source=source, data={"labels": ["negative", "positive"]})
    examination = examine_adapter(publish)
    assert not examination.defects, examination.defects
    assert not examination.unexamined


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defect_is_reported(name: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, kind, _ = PLANTED[name]
    folder = copied(adapters, adapter, tmp_path)
    plant(name, folder)
    examination = examine_adapter(folder)
    assert kind in kinds(examination), (examination.findings, examination.unexamined)
    assert examination.exit_code == 4
    one = next(one for one in examination.defects if one.kind == kind)
    assert one.what and one.where and one.fix
    assert one.kind in format_report(examination, 120)


def test_an_id_is_never_cut_on_a_narrow_screen() -> None:
    name = "an-organisation-with-a-name/a-model-with-a-long-name"
    finding = Finding("base", "warning", f"{name} is not pinned", "adapter_config.json", "Set it")
    text = _format_findings([finding], 60)
    assert "…" not in text and name in text
    assert text.splitlines()[-2:] == ["    where: adapter_config.json", "    fix: Set it"]


def test_a_finding_is_read_line_by_line_on_a_narrow_screen() -> None:
    sound = Finding("card", "warning", "lacks a license", "README.md", "Add license: to its head")
    wrong = Finding("base", "defect", "names no base " * 8, "adapter_config.json", "Set it " * 20)
    lines = _format_findings([sound, wrong], 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("defect, base: names no base")
    assert [line for line in lines if line.startswith("warning")] == [
        "warning, card: lacks a license"
    ]
    fixes = lines[lines.index("    where: adapter_config.json") + 1 :]
    assert fixes[0].startswith("    fix: Set it Set it") and fixes[1].startswith("    Set it")


def test_whole_model_is_examined(hub_cache: Path, tmp_path: Path) -> None:
    model = wrapped(
        snapshot(hub_cache, "bert-mlm"), "bert-mlm", SOUND["bert"][1]
    ).merge_and_unload()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    assert not examine_adapter(tmp_path / "model").defects
    path = tmp_path / "model" / "model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if "pooler" not in k}
    save_file(tensors, path, {"format": "pt"})
    assert kinds(examine_adapter(tmp_path / "model")) == {"fresh", "reload"}
    rewrite(tmp_path / "model" / "config.json", auto_map={"AutoModel": "m.M"})
    examination = examine_adapter(tmp_path / "model")
    assert kinds(examination) == {"unsafe"} and examination.unexamined


def test_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no adapter_config\.json"):
        examine_adapter(tmp_path)
    with pytest.raises(RecipeError, match="no folder"):
        examine_adapter(tmp_path / "nothing" / "here")
    with pytest.raises(HubError):
        examine_adapter("somebody/unknown-adapter")


def test_other_kinds_of_adapter_are_examined_too(hub_cache: Path, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(snapshot(hub_cache, "bert"))
    model.name_or_path = "tiny/bert"
    model.config.update({"id2label": dict(enumerate(NAMES))})
    settings = IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[],
                         revision=COMMIT)  # fmt: skip
    adapter = save(get_peft_model(model, settings), tmp_path / "adapter")
    examination = examine_adapter(adapter)
    assert not examination.defects and not examination.unexamined
    reconfigure(adapter, peft_type="PROMPT_TUNING")
    assert "PROMPT_TUNING" in examine_adapter(adapter).unexamined[0]


ECHO = """
import sys
for line in sys.stdin:
    sys.exit("no such base") if "bad" in line else print(line.strip(), flush=True)
"""


def test_one_process_answers_requests_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # The fixture of this file starts no process.
    monkeypatch.setattr(load_process, "COMMAND", [sys.executable, "-c", ECHO])
    with load_process.prepare_loads(True) as process:
        assert process is not None
        assert json.loads(process.load(["a", "b"]).stdout) == {"loads": ["a", "b"]}
        assert json.loads(process.run(["c"]).stdout) == {"sample": ["c"]}
        failed = process.load(["bad"])
        assert (failed.returncode, failed.stdout) == (1, "") and "no such base" in failed.stderr
        assert not process.is_waiting


def test_a_load_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # The fixture of this file starts no process.
    monkeypatch.setattr(load_process, "COMMAND", [sys.executable, "-c", "input(); input()"])
    monkeypatch.setattr(load_process, "LOAD_TIMEOUT_SECONDS", 0.2)
    with load_process.prepare_loads(True) as process:
        assert process is not None
        assert process.load(["a"]).stderr == "it took more than 0.2 s"


def test_a_process_that_the_system_refuses_is_no_fault_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # The fixture of this file starts no process.

    def refuse() -> None:
        raise BlockingIOError(errno.EAGAIN, "no process is left")

    monkeypatch.setattr(load_check, "LoadProcess", refuse)
    with pytest.raises(BlockingIOError):
        load_check.predict_in_fresh_process(tmp_path, tmp_path, "BertModel")


def test_a_process_is_started_only_where_the_files_may_be_loaded(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[None] = []
    monkeypatch.setattr(load_process, "LoadProcess", lambda: started.append(None))
    damaged = copied(adapters, "bert", tmp_path)
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    for place, code, count in ((damaged, 4, 0), (tmp_path / "no" / "such", 2, 0),
                               (adapters["bert"], 0, 1)):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["hftl", "doctor", str(place)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code, len(started)) == (code, count)


def test_the_script_holds_the_models_of_one_request_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def count_held(folder: Path, base: Path, name: str, seed: int, keep: list[int]) -> list[float]:
        keep.append(seed)
        return [float(len(keep))]

    monkeypatch.setattr(load_once, "compute_output", count_held)
    request = json.dumps({"loads": ["folder", "base", "BertModel", "1", "2"]})
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{request}\n{request}\n"))
    load_once.main()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"outputs": [[1.0], [2.0]]}
    ] * 2


def test_the_script_answers_loads_as_they_are_computed_here(
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base, name = snapshot(hub_cache, "bert"), "BertForSequenceClassification"
    shutil.copytree(adapters["bert"], tmp_path / "a")
    shutil.copy(base / "config.json", tmp_path / "a" / "config.json")
    request = {"loads": [str(tmp_path / "a"), str(base), name, "1", "2"]}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request) + "\n"))
    load_once.main()
    (line,) = capsys.readouterr().out.splitlines()
    here = [load_once.compute_output(tmp_path / "a", base, name, seed) for seed in (1, 2)]
    assert json.loads(line) == {"outputs": here}
