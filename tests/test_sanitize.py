"""Detect secrets and names of machine and user in files to publish, and mask them in messages."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from hftl.config import secrets
from hftl.config.recipe import Recipe
from hftl.errors import RecipeError, RunFolderError
from hftl.publish.sanitize import find_leak

CANARY = "canary-5f8Zq1/+ä"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"


pytestmark = pytest.mark.usefixtures("named_user")


@pytest.fixture
def named_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set distinct names of user and machine, and a token."""
    monkeypatch.setenv("HOME", "/home/annabel")
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "annabel")
    monkeypatch.setattr("platform.node", lambda: "gpubox7.lab.example")
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("token-from-login\n", encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        f"hf_{LETTERS}", f"ghp_{LETTERS}", f"github_pat_11{LETTERS}", "AKIAIOSFODNN7EXAMPLE",
        f"glpat-{LETTERS}", f"sk-{LETTERS}", "xoxb-1234567890-abc", "https://ann:pass@host/data",
        "-----BEGIN OPENSSH PRIVATE KEY-----", "git+ssh://git:x-oauth@host/repo",
    ],
)  # fmt: skip
def test_text_like_a_secret_is_detected_and_masked(text: str) -> None:
    assert secrets.find_secret(f"before {text} after") == "what reads as a token or password"
    shown = secrets.mask_secrets(f"before {text} after")
    assert "***" in shown and shown.startswith("before ") and shown.endswith(" after")
    assert secrets.find_secret(shown) is None


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download", "hf_transfer", "https://huggingface.co/org/name", "sk-learn",
        "ghp_short", "http://127.0.0.1:8000/x@y", "AKIA", "a: b@c", "1e-4", "token: 12",
        "https://host/a:b/c@d",
    ],
)  # fmt: skip
def test_similar_text_passes(text: str) -> None:
    assert secrets.find_secret(text) is None and secrets.mask_secrets(text) == text


@pytest.mark.parametrize("form", [CANARY, "canary-5f8Zq1%2F%2B%C3%A4", "canary-5f8Zq1/+\\u00e4"])
def test_secret_of_the_environment_is_detected_in_every_spelling(form: str) -> None:
    assert secrets.find_secret(f'"{form}"') == "the environment's SOME_API_KEY"
    assert secrets.mask_secrets(f'"{form}"') == '"***"'


def test_token_of_a_login_is_detected() -> None:
    assert secrets.find_secret("x token-from-login y") == "the hub's token"


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_TOKENS", "4096409640"), ("TOKENIZERS_PARALLELISM", "sometimes"), ("X_TOKEN", "short"),
     ("HF_TOKEN_FILE", "/home/x/token"), ("PATH_OF_ALL", "something long")],
)  # fmt: skip
def test_settings_are_not_secrets(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert value not in secrets.list_secrets().values()


@pytest.mark.parametrize("value", [f"data/hf_{LETTERS}/a.csv", f"https://me:{CANARY}@host/a.csv"])
def test_recipe_with_a_secret_is_refused_without_repeating_it(value: str) -> None:
    tree = {"source": {"model": "org/m"}, "data": {"train": {"path": value}}}
    with pytest.raises(RecipeError, match=r"data\.train\.path holds a secret") as caught:
        Recipe.parse(tree)
    assert value not in str(caught.value) and CANARY not in str(caught.value)


TEXTS = {
    "a token": f"see hf_{LETTERS}",
    "a password": "clone https://ann:pass@host/x",
    "the environment's": f"key {CANARY}",
    "the home": '{"cache": "file:/home/annabel/x"}',
    "the user": "made by annabel.",
    "the host": "ran on gpubox7",
    "the whole host": "ran on gpubox7.lab.example",
    "a path": "at /mnt/disk/x",
}
SAID = {
    "a token": "a secret", "a password": "a secret", "the environment's": "a secret",
    "the home": "the home directory", "the user": "the user's name: annabel",
    "the host": "this machine's name: gpubox7", "the whole host": "this machine's name",
    "a path": "a path of this machine: /mnt/disk/x",
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("name", ["README.md", "hftl.json", "config.json"])
def test_names_of_the_user_are_detected_in_texts(case: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXTS[case], encoding="utf-8")
    assert (find_leak(tmp_path / name, name, frozenset()) or "").startswith(SAID[case])


@pytest.mark.parametrize("case", ["a token", "a password", "the environment's", "the home"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "merges.txt", "spiece.model"])
def test_vocabularies_hold_words_but_no_secrets(case: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("/home/x\nannabel\ngpubox7\n/usr/bin/env\n", encoding="utf-8")
    assert find_leak(tmp_path / name, name, frozenset()) is None
    (tmp_path / name).write_text(TEXTS[case], encoding="utf-8")
    assert (find_leak(tmp_path / name, name, frozenset()) or "").startswith(SAID[case])


@pytest.mark.parametrize("case", TEXTS)
def test_the_header_of_weights_is_read_and_their_numbers_are_not(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    words = np.frombuffer(TEXTS[case].encode(), dtype=np.uint8).copy()
    save_file({"a": torch.from_numpy(words)}, path, metadata={"format": "pt"})
    assert find_leak(path, path.name, frozenset()) is None
    save_file({"a": torch.ones(1)}, path, metadata={"note": TEXTS[case]})
    assert (find_leak(path, path.name, frozenset()) or "").startswith(SAID[case])


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"pickle", struct.pack("<Q", 1 << 62) + b"{}", b"\x02" + bytes(7) + b"[["):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(RunFolderError, match="is no safetensors file"):
            find_leak(tmp_path / "model.safetensors", "model.safetensors", frozenset())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("international", [False, True])
def test_the_texts_of_a_picture_are_read(packed: bool, international: bool, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    add = info.add_itxt if international else info.add_text
    add("Author", "by annabel", zip=packed)
    path = tmp_path / "ladder.png"
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    assert find_leak(path, "assets/ladder.png", frozenset()) == "the user's name: annabel"
    Image.new("RGB", (4, 4)).save(path)
    assert find_leak(path, "assets/ladder.png", frozenset()) is None
    # What only looks like packed text is none.
    broken = (
        path.read_bytes()[:-12]
        + b"\0\0\0\x03zTXt\x78\0\0"
        + struct.pack(">I", zlib.crc32(b"zTXt\x78\0\0"))
    )
    path.write_bytes(broken)
    assert find_leak(path, "assets/ladder.png", frozenset()) is None


def test_names_that_were_chosen_to_be_shown_pass(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# annabel/model", encoding="utf-8")
    assert find_leak(tmp_path / "README.md", "README.md", frozenset({"annabel", "model"})) is None


@pytest.mark.parametrize("text", ["annabelle", "re-annabel-x", "Annabel", "gpubox77"])
def test_words_that_hold_the_name_pass(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert find_leak(tmp_path / "README.md", "README.md", frozenset()) is None


@pytest.mark.parametrize("name", ["root", "ubuntu", "user", "al"])
def test_common_names_pass(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(key, name)
    (tmp_path / "README.md").write_text(f"the {name} of all", encoding="utf-8")
    assert find_leak(tmp_path / "README.md", "README.md", frozenset()) is None
