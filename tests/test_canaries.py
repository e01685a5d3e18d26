"""Plant secrets and names wherever they might slip through: none leaves, none is stored."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import yaml
from support.local_hub import LocalHub
from support.publishing import ME, Pusher, finish_run

from hftl.runtime.hardware import count_cores

pytestmark = pytest.mark.usefixtures("fast_reload")

LETTERS = "Qx7Rk2Vw9Tz4Lm6Np8Bc3Df5Gh1Js0YaUe"
SECRETS = {
    "HF_HUB_TOKEN": f"hf_{LETTERS}", "WANDB_API_KEY": f"wandb{LETTERS[::-1]}",
    "AWS_SECRET_ACCESS_KEY": f"aws/{LETTERS}+x", "DB_PASSWORD": f"päss {LETTERS[:9]}",
}  # fmt: skip
USER, HOST, PASSWORD = "zebulonquist", "canarybox77", "hunterpass99"
TOKENS = [*SECRETS.values(), "hf_me_write", PASSWORD]


@pytest.fixture(scope="module")
def planted(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Plant canaries in environment, home, paths of model and data, and git remote."""
    home = tmp_path_factory.mktemp("planted") / "home" / USER
    (home / "secret-project").mkdir(parents=True)
    shutil.copytree(tiny_model(), home / "models" / "tiny")
    environment = SECRETS | {"HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST}
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    remote = f"https://{USER}:{PASSWORD}@host.example/{USER}/project"
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=home, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, value in environment.items():
            patch.setenv(name, value)
        changes = {"measure.arms": []}
        model = home / "models" / "tiny"
        yield finish_run(home / "secret-project", model, changes), environment


@pytest.fixture(scope="module")
def push(push: Pusher, planted: tuple[Path, dict[str, str]]) -> Pusher:
    """Push in the environment of the canaries."""
    return push.within(planted[1])


def spellings(text: str) -> set[bytes]:
    """Return a text as it is, in JSON, in a URL, in base64 at every place, and in UTF-16."""
    forms = {text.encode(), json.dumps(text)[1:-1].encode(), quote(text, safe="").encode(),
             text.encode("utf-16-le")}  # fmt: skip
    for shift in range(3):
        coded = base64.b64encode(b"x" * shift + text.encode())
        forms.add(coded[4:-4] if shift else coded[:-4])
    return forms


def find_texts(content: bytes, texts: list[str]) -> list[str]:
    return [text for text in texts if any(form in content for form in spellings(text))]


def assert_clean(folder: Path, texts: list[str]) -> None:
    for path in folder.rglob("*"):
        assert path.is_dir() or find_texts(path.read_bytes(), texts) == [], path


def unpack_request(request: dict[str, Any]) -> bytes:
    """Return all of a request but its Authorization, with what is packed in it unpacked."""
    body, path = base64.b64decode(request["body"]), request["path"]
    content = f"{path} {unquote(path)} {json.dumps(request['headers'])}".encode()
    if "/commit/" in path:
        for line in body.splitlines():
            content += base64.b64decode(json.loads(line)["value"].get("content", ""))
    return content + body


def test_push_sends_no_canary_and_stores_no_secret(
    planted: tuple[Path, dict[str, str]], hub: LocalHub, push: Pusher
) -> None:
    run, environment = planted
    hub.control(restore="base", faults=[])
    code, out, err = push("publish", run, "--repo-id", ME, "--public")
    assert (code, err) == (0, "")
    private = [*TOKENS, USER, environment["HOME"], "secret-project"]
    assert len(hub.log) > 15
    for request in hub.log:
        assert find_texts(unpack_request(request), private) == [], request["path"]
    assert_clean(run / "publish", private)
    assert_clean(run, TOKENS)
    assert find_texts(out.encode(), TOKENS) == []


@pytest.mark.parametrize("secret", [*SECRETS.values(), f"https://me:{PASSWORD}@host.example/x"])
def test_secret_in_the_arguments_is_never_repeated(
    secret: str, planted: tuple[Path, dict[str, str]], hub: LocalHub, push: Pusher, tmp_path: Path
) -> None:
    hub.control(restore="base", faults=[])
    run, recipe, output = planted[0], planted[0] / "recipe.yaml", tmp_path / "out"
    results = [
        push("publish", run, "--repo-id", ME, "--force", f"because {secret}"),
        push("publish", run, "--repo-id", secret),
        push("publish", run, secret),
        push("run", recipe, f"data.train.path=/data/{secret}/a.csv", "--output", output),
        push("run", recipe, f"hub_token={secret}", "--output", output),
        push("run", recipe, f"finetune.training.hub_token={secret}", "--output", output),
        push("run", recipe, f"'{secret}", "--output", output),
    ]
    assert [code for code, _, _ in results] == [2] * 7, results
    hidden = PASSWORD if PASSWORD in secret else secret
    for _, out, err in results:
        assert len(err.splitlines()) == 1 and hidden not in out + err, err
    assert not output.exists() and hub.log == []
    assert_clean(run, [hidden])


def test_failure_prints_and_logs_no_secret(
    planted: tuple[Path, dict[str, str]], hub: LocalHub, push: Pusher
) -> None:
    run = planted[0]
    hub.control(restore="base", faults=[{"kind": "403", "path": "/commit/"}])
    code, out, err = push("--debug", "publish", run, "--repo-id", ME)
    assert code == 5 and "Traceback" in err
    log = (run / "log.txt").read_bytes() + (run / "error.json").read_bytes()
    assert find_texts((out + err).encode() + log, TOKENS) == []


@pytest.mark.slow
@pytest.mark.skipif(count_cores() < 2, reason="arms are dealt to as many processes as cores")
def test_no_process_of_a_run_has_a_secret_in_its_title(
    planted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Look at arms in two processes, the reload check and data workers while they run."""
    tree = yaml.safe_load((planted[0] / "recipe.yaml").read_text(encoding="utf-8"))
    tree["measure"] = {"seeds": [0], "arms": ["scratch", "head"], "parallel": "arms"}
    tree["finetune"]["training"]["dataloader_num_workers"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    words = ["-m", "hftl", "run", "recipe.yaml", "--output", "run"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    titles: set[bytes] = set()
    with subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        while process.poll() is None:
            titles |= {read_title(pid) for pid in list_descendants(process.pid)}
            time.sleep(0.02)
        assert process.stdout is not None
        screen = process.stdout.read()
    assert process.returncode == 0, screen.decode()
    shown = b"\n".join(titles)
    assert b"arm_worker" in shown and b"reload_check.py" in shown
    assert find_texts(shown + screen, TOKENS) == []
    assert_clean(tmp_path / "run", TOKENS)


def list_descendants(pid: int) -> list[int]:
    """Return a process and all below it that still run."""
    try:
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = [int(child) for file in files for child in file.read_text().split()]
    except OSError:
        return []
    return [pid, *(one for child in children for one in list_descendants(child))]


def read_title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
