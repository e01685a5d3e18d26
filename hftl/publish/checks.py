"""What must hold before anything leaves the machine."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hftl.card.validation import validate_card
from hftl.errors import HftlError, RunFolderError
from hftl.measure.record import PUBLISHED_FILE, Record
from hftl.measure.verdict import RELOAD_TOLERANCE
from hftl.publish.sanitize import find_leak
from hftl.runtime import run_folder

ALLOWED_FILES = {
    "README.md", "hftl.json", "every_eval_ever.json", "config.json", "adapter_config.json",
    "adapter_model.safetensors", "model.safetensors", "head.safetensors",
    "tokenizer.json", "tokenizer_config.json",
    "vocab.txt", "merges.txt", "vocab.json", "special_tokens_map.json", "added_tokens.json",
    "sentencepiece.bpe.model", "spiece.model", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
SHARD_FILES = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json")
EVAL_RESULT_FILES = re.compile(r"\.eval_results/hftl-\w[\w.-]*\.yaml")
PLOT_FILES = re.compile(r"assets/[\w-]+\.png")


def is_publishable(name: str) -> bool:
    """Whether a file of this path is one that hftl publishes."""
    return bool(
        name in ALLOWED_FILES
        or SHARD_FILES.fullmatch(name)
        or PLOT_FILES.fullmatch(name)
        or EVAL_RESULT_FILES.fullmatch(name)
    )


def measure_reload_difference(folder: Path, base: Path, sample: Path, device: str) -> float:
    """Largest difference of logits after a fresh process loads the folder without hftl.

    Relative to the largest logit where that is above 1: fp32 cannot promise more.

    Raises:
        HftlError: if the fresh process fails; that is a bug.
    """
    script = Path(__file__).with_name("reload_check.py")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
        environment.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(base), str(sample), device],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if found.returncode != 0:
        raise HftlError(
            f"the publish folder does not load in a fresh process: {found.stderr.strip()[-800:]}",
            "Report this with log.txt",
        )
    told = json.loads(found.stdout.strip().splitlines()[-1])
    if told["hftl_imported"]:
        raise HftlError("the fresh process imported hftl", "Report this with log.txt")
    return told["difference"] / max(1.0, told["largest"])


def check_files(folder: Path, words: frozenset[str] = frozenset()) -> list[str]:
    """The files that would be pushed, by their path in the folder.

    Args:
        folder: a publish folder.
        words: names that may stand in them, see `leaks.leak`.

    Raises:
        RunFolderError: if one is a link, not on the allow-list, or tells of machine or user.
    """
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in files:
        if (folder / name).is_symlink():
            raise RunFolderError(
                f"{folder / name} is a link, and what it leads to would go", "Remove it"
            )
        if not is_publishable(name):
            raise RunFolderError(
                f"{folder / name} is not among the files that may be published", "Remove it"
            )
        found = find_leak(folder / name, name, words)
        if found is not None:
            raise RunFolderError(
                f"{folder / name} names {found}",
                "Give source.model as a hub id or package:, data paths relative, and no secrets",
            )
    return files


def check_card(text: str, run: Path) -> None:
    """Looks at a card as the hub will.

    Args:
        text: the whole README.md.
        run: the run that it is of.

    Raises:
        RunFolderError: naming the first problem.
    """
    problems = validate_card(text)
    if problems:
        raise RunFolderError(
            f"the card of {run} cannot be published: {problems[0]}",
            f"Write it again: hftl card {run}",
        )


def check_reload_proof(run: Path, record: Record) -> None:
    """Looks for the proof that the published weights reload, and whether they are the proved ones.

    An encoder without a task has none: it has no logits to compare.

    Raises:
        RunFolderError: if there is no proof, it failed, or the files are others.
    """
    if not record.arms:
        return
    again = "Run the same `hftl run` again"
    package = run / "phases" / "package"
    difference = record.reload_difference
    if (
        run_folder.read_stage_inputs(package) is None
        or difference is None
        or difference > RELOAD_TOLERANCE
    ):
        raise RunFolderError(
            f"{run} has no proof that its model reloads to the same outputs", again
        )
    for name in ("model", "base"):
        for proved in sorted((package / name).glob("*.safetensors")):
            folder = run / ("publish" if name == "model" else "publish-base")
            here = folder / proved.name
            if not here.exists() or run_folder.hash_file(here) != run_folder.hash_file(proved):
                raise RunFolderError(f"{here} is not the file whose reload was proved", again)


# What a push would send.


@dataclass(frozen=True)
class PushPreview:
    """The files with their sizes in bytes, the verdict, and what they load on, if it is known.

    `base_files` are those of a base that the run itself has adapted, which goes first.
    """

    files: list[tuple[str, int]]
    base_files: list[tuple[str, int]]
    decision: str
    reasons: list[str]
    base: str | None


def preview_push(run: Path, words: frozenset[str] = frozenset()) -> PushPreview:
    """Looks at a finished run's publish folder as a push would.

    Args:
        run: the run folder.
        words: names that may stand in the files, see `leaks.leak`.

    Raises:
        RunFolderError: if there is no publish folder, or a file may not leave the machine.
    """
    folder = run / "publish"
    if not (folder / PUBLISHED_FILE).exists():
        raise RunFolderError(f"{run} has no publish folder", "Finish it with `hftl run`")
    base = run / "publish-base"
    files = _list_sizes(folder, words)
    base_files = _list_sizes(base, words) if base.exists() else []
    record = Record.read_file(folder / PUBLISHED_FILE)
    verdict = record.verdict
    named = base.name if base_files else record.source.published_as
    if not (folder / "adapter_config.json").exists():
        named = "the model itself"
    return PushPreview(files, base_files, verdict.decision, verdict.reasons, named)


def _list_sizes(folder: Path, words: frozenset[str]) -> list[tuple[str, int]]:
    return [(name, (folder / name).stat().st_size) for name in check_files(folder, words)]
