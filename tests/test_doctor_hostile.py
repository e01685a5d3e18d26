"""Examine a hostile adapter without running or reading what it names."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from support.examination import copied, kinds
from support.fresh_process import FreshProcess
from support.planted_defects import plant, reconfigure, rewrite

from hftl import cli
from hftl.doctor.checks import examine_adapter
from hftl.doctor.report import format_report

ROOT = Path(__file__).parent.parent


def test_text_of_an_adapter_does_not_control_the_terminal(
    adapters: dict[str, Path], tmp_path: Path, loads_in_this_process: None
) -> None:
    folder = copied(adapters, "bert", tmp_path)
    reconfigure(folder, base_model_name_or_path="/x/\x1b[2J[red]\u202e\nsound")
    text = format_report(examine_adapter(folder), 200)
    assert "\x1b" not in text and "\u202e" not in text and "[red]" in text
    assert text.splitlines()[-1].endswith("1 defect and 1 warning")


def test_exit_codes_on_the_command_line(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], loads_in_this_process: None,
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
from hftl.doctor import load_check, load_once
from hftl.doctor.checks import examine_adapter
from hftl.doctor.report import format_report

cache, sound, *hostile = sys.argv[1:]
# Read from the environment when the libraries were imported, before this process began.
huggingface_hub.constants.HF_HUB_CACHE = cache
huggingface_hub.constants.HF_TOKEN_PATH = str(Path(cache, "token"))
# The hook must see the loads too.
load_check.predict_in_fresh_process = lambda clean, base, name, process: [
    numpy.array(load_once.compute_output(clean, base, name, seed)) for seed in load_check.SEEDS
]
BAD = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")
seen = {"import": [], "open": [], "bad": []}

def watch(event, args):
    if event in ("import", "open"):
        seen[event].append(str(args[0]))
    elif event in BAD:
        seen["bad"].append(event)

examine_adapter(sound)
sys.addaudithook(watch)
found = [examine_adapter(folder) for folder in hostile]
print(json.dumps(seen | {
    "kinds": [sorted({one.kind for one in each.defects}) for each in found],
    "reports": [format_report(each, 200) for each in found],
    "unexamined": [each.unexamined for each in found],
}))
"""


def make_hostile(folder: Path, secret: Path, mark: Path, base: str) -> None:
    """Write everything that a loader may be made to run or to read."""
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
    adapters: dict[str, Path], hub_cache: Path, tmp_path: Path, reload_server: FreshProcess
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
    words = [tmp_path / "doctor.py", hub_cache, adapters["bert"], *folders]
    done = reload_server.run(
        [sys.executable, "-P", *map(str, words)], cwd=folders[0],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert not mark.exists() and not seen["bad"]
    assert all("unsafe" in examination for examination in seen["kinds"])
    assert [bool(examination) for examination in seen["unexamined"]] == [False, True, True]
    assert not [name for name in seen["import"] if "evil" in name or name == "tiny_setup"]
    opened = {Path(name).resolve() for name in seen["open"] if not name.isdigit()}
    assert secret.resolve() not in opened
    ours = [path for path in opened if any(path.is_relative_to(home) for home in folders)]
    assert ours and not [path for path in ours if path.suffix in (".py", ".bin", ".pkl")]
    known = (sys.prefix, sys.base_prefix, ROOT, tempfile.gettempdir(), "/proc", "/sys", "/dev")
    assert not [path for path in opened if not any(path.is_relative_to(place) for place in known)]
    assert not [path for path in opened if path.is_relative_to(tmp_path) and path not in ours]


@pytest.mark.slow
def test_two_fresh_processes_detect_random_weights(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(adapters, "bert-mlm", tmp_path)
    plant("pooler drawn anew by every load", folder)
    assert kinds(examine_adapter(folder)) == {"fresh", "reload"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-mlm", "vit"])
def test_two_fresh_processes_agree_on_a_sound_adapter(name: str, adapters: dict[str, Path]) -> None:
    assert not examine_adapter(adapters[name]).defects
