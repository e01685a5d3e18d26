"""Secrets and names planted wherever they might slip through: none leaves, none is kept."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from localhub import LocalHub
from published import Pusher, finished_run, pusher
from pushed import ME, hub

__all__ = ["hub"]

LETTERS = "Qx7Rk2Vw9Tz4Lm6Np8Bc3Df5Gh1Js0YaUe"
SECRETS = {
    "HF_HUB_TOKEN": f"hf_{LETTERS}", "WANDB_API_KEY": f"wandb{LETTERS[::-1]}",
    "AWS_SECRET_ACCESS_KEY": f"aws/{LETTERS}+x", "DB_PASSWORD": f"päss {LETTERS[:9]}",
}  # fmt: skip
USER = "zebulonquist"
HOST = "canarybox77"
IN_URL = "hunterpass99"


@pytest.fixture(scope="module")
def planted(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A run made with canaries in environment, home, paths of model and data, and git remote."""
    home = tmp_path_factory.mktemp("planted") / "home" / USER
    (home / "secret-project").mkdir(parents=True)
    shutil.copytree(tiny_model(), home / "models" / "tiny")
    told = SECRETS | {"HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST}
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    remote = f"https://{USER}:{IN_URL}@host.example/{USER}/project"
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=home, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, value in told.items():
            patch.setenv(name, value)
        run = finished_run(home / "secret-project", home / "models" / "tiny", patch, {"measure.arms": []})
        yield run, told


@pytest.fixture(scope="module")
def push(
    planted: tuple[Path, dict[str, str]], hub: LocalHub, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pusher]:
    with pusher(hub.environment(tmp_path_factory.mktemp("cache")) | planted[1]) as found:
        yield found


def spelt(text: str) -> set[bytes]:
    """A text as it is, in JSON, in a URL, in base64 at every place, and in UTF-16."""
    forms = {text.encode(), json.dumps(text)[1:-1].encode(), quote(text, safe="").encode(),
             text.encode("utf-16-le")}  # fmt: skip
    for shift in range(3):
        told = base64.b64encode(b"x" * shift + text.encode())
        forms.add(told[4:-4] if shift else told[:-4])
    return forms


def holds(content: bytes, texts: list[str]) -> list[str]:
    return [text for text in texts if any(form in content for form in spelt(text))]


def on_the_wire(asked: dict[str, Any]) -> bytes:
    """All of a request but its Authorization, with what is packed in it unpacked."""
    body = base64.b64decode(asked["body"])
    found = f"{asked['path']} {unquote(asked['path'])} {json.dumps(asked['headers'])}".encode()
    if "/commit/" in asked["path"]:
        for line in body.splitlines():
            value = json.loads(line)["value"]
            found += base64.b64decode(value.get("content", ""))
    return found + body


def test_no_canary_leaves_and_no_secret_is_kept(
    planted: tuple[Path, dict[str, str]], hub: LocalHub, push: Pusher
) -> None:
    run, told = planted
    hub.control(restore=True, faults=[])
    code, out, err = push("publish", run, "--repo-id", ME, "--public")
    assert (code, err) == (0, "")
    tokens = [*SECRETS.values(), "hf_me_write", IN_URL]
    private = [*tokens, USER, told["HOME"], "secret-project"]
    assert len(hub.log) > 15
    for asked in hub.log:
        assert holds(on_the_wire(asked), private) == [], asked["path"]
    for path in (run / "publish").rglob("*"):
        assert path.is_dir() or holds(path.read_bytes(), private) == [], path
    for path in run.rglob("*"):
        assert path.is_dir() or holds(path.read_bytes(), tokens) == [], path
    assert holds(out.encode(), tokens) == []


@pytest.mark.parametrize("secret", [*SECRETS.values(), f"https://me:{IN_URL}@host.example/x"])
def test_a_secret_in_the_arguments_is_told_nowhere(
    secret: str, planted: tuple[Path, dict[str, str]], hub: LocalHub, push: Pusher, tmp_path: Path
) -> None:
    hub.control(restore=True, faults=[])
    run, recipe = planted[0], planted[0] / "recipe.yaml"
    output = tmp_path / "out"
    said = [
        push("publish", run, "--repo-id", ME, "--force", f"because {secret}"),
        push("publish", run, "--repo-id", secret),
        push("publish", run, secret),
        push("run", recipe, f"data.train.path=/data/{secret}/a.csv", "--output", output),
        push("run", recipe, f"hub_token={secret}", "--output", output),
        push("run", recipe, f"finetune.training.hub_token={secret}", "--output", output),
        push("run", recipe, f"'{secret}", "--output", output),
    ]
    assert [code for code, _, _ in said] == [2] * 7, said
    hidden = IN_URL if IN_URL in secret else secret
    for _, out, err in said:
        assert len(err.splitlines()) == 1 and hidden not in out + err, err
    assert not output.exists() and hub.log == []
    for path in run.rglob("*"):
        assert path.is_dir() or holds(path.read_bytes(), [hidden]) == [], path


def test_a_failure_tells_no_secret_on_the_screen_or_in_the_log(
    planted: tuple[Path, dict[str, str]], hub: LocalHub, push: Pusher
) -> None:
    run = planted[0]
    hub.control(restore=True, faults=[{"kind": "403", "path": "/commit/"}])
    code, out, err = push("--debug", "publish", run, "--repo-id", ME)
    assert code == 5 and "Traceback" in err
    log = (run / "log.txt").read_bytes() + (run / "error.json").read_bytes()
    tokens = [*SECRETS.values(), "hf_me_write", IN_URL]
    assert holds((out + err).encode() + log, tokens) == []
