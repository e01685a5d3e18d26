"""What must hold before anything leaves the machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hftl.errors import HftlError, RunFolderError
from hftl.model.source import SourceModel

ALLOWED = {
    "README.md", "hftl.json", "config.json", "adapter_config.json", "adapter_model.safetensors",
    "model.safetensors", "head.safetensors", "tokenizer.json", "tokenizer_config.json",
    "vocab.txt", "merges.txt", "vocab.json", "special_tokens_map.json", "added_tokens.json",
    "sentencepiece.bpe.model", "spiece.model", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
SHARDS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json")
PLOTS = re.compile(r"assets/[\w-]+\.png")
LOCAL_PATH = re.compile(
    r"(?:(?<![\w.:/<])|(?<=file://))(?:~|/[\w.-]+)/[\w./-]+|\b[A-Za-z]:[\\/]+\w[^\s\"']*"
)


def reload_difference(folder: Path, source: SourceModel, sample: Path, device: str) -> float:
    """Largest difference of logits after a fresh process loads the folder without hftl.

    Relative to the largest logit where that is above 1: fp32 cannot promise more.

    Raises:
        HftlError: if the fresh process fails; that is a bug.
    """
    script = Path(__file__).with_name("reload.py")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH"):
        environment.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(source.folder), str(sample), device],
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


def check_files(folder: Path) -> list[str]:
    """The files that would be pushed, by their path in the folder.

    Raises:
        RunFolderError: if one is not on the allow-list, or a text names a path of this machine.
    """
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in files:
        if name not in ALLOWED and not SHARDS.fullmatch(name) and not PLOTS.fullmatch(name):
            raise RunFolderError(
                f"{folder / name} is not among the files that may be published", "Remove it"
            )
        if name.endswith((".json", ".md")) and name not in ("tokenizer.json", "vocab.json"):
            found = LOCAL_PATH.search((folder / name).read_text(encoding="utf-8"))
            if found:
                raise RunFolderError(
                    f"{folder / name} names a path of this machine: {found.group()}",
                    "Give source.model as a hub id or package:, data paths relative",
                )
    return files
