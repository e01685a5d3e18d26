"""Store the figures of a finished run, and write the tables of the READMEs from them.

    python benchmarks/results.py runs/movies-minilm-lora ...

A run's figures go to benchmarks/results/<run's name>.json; then the blocks between
`<!-- results:... -->` marks in the READMEs are written anew.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from hftl import console
from hftl.card.wording import format_adaptation_sentence, has_forgetting
from hftl.measure.record import Record
from hftl.measure.verdict import format_gain
from hftl.models.architectures import ARCHITECTURES, READ_AS, UNHEADED
from hftl.models.pairs import PAIRS
from hftl.publish.sanitize import sanitize_record
from hftl.runtime.run_folder import to_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESULT_KEYS = ("metric", "own_arm", "ladder", "transfer_gain", "verdict", "data", "environment",
        "scratch_search", "reload_difference", "adapt", "forgetting")  # fmt: skip
SHOWN = ("metric", "own_arm", "ladder", "transfer_gain", "verdict", "adapt", "forgetting")
"""The keys of a record that the pages' tables are written from."""
PAGES = tuple(ROOT / part / "README.md" for part in (".", "recipes", "benchmarks", "tests"))
INDEX = {
    "movies-minilm-lora": "recipes/movies-minilm/lora.yaml",
    "movies-minilm-valence": "recipes/movies-minilm/valence.yaml",
    "movies-minilm-zero-shot": "recipes/movies-minilm/zero-shot.yaml",
    "bbc-minilm-lora": "recipes/bbc-minilm/lora.yaml",
    "bbc-minilm-zero-shot": "recipes/bbc-minilm/zero-shot.yaml",
    "clipart-dinov2-lora": "recipes/clipart-dinov2/lora.yaml",
    "fashion-dinov2-head": "recipes/fashion-dinov2/head.yaml",
    "addresses-minilm-lora": "recipes/addresses-minilm/lora.yaml",
    "movies-minilm-tapt": "recipes/movies-minilm/tapt.yaml",
    "movies-minilm-dapt": "recipes/movies-minilm/dapt.yaml",
    "movies-minilm-harmful": "recipes/movies-minilm/harmful.yaml",
    "movies-minilm-whole": "recipes/movies-minilm/whole.yaml",
    "movies-minilm-kl": "recipes/movies-minilm/kl.yaml",
    "movies-minilm-partial-kl": "recipes/movies-minilm/partial-kl.yaml",
    "movies-minilm-gradual": "recipes/movies-minilm/gradual.yaml",
    "movies-minilm-layer-rates": "recipes/movies-minilm/layer-rates.yaml",
    "bbc-minilm-tapt": "recipes/bbc-minilm/tapt.yaml",
    "bbc-minilm-dapt": "recipes/bbc-minilm/dapt.yaml",
    "clipart-dinov2-mae": "recipes/clipart-dinov2/mae.yaml",
    "clipart-dinov2-kl": "recipes/clipart-dinov2/kl.yaml",
    "clipart-efficientnet-partial": "recipes/clipart-efficientnet/partial.yaml",
    "clipart-efficientnet-lora": "recipes/clipart-efficientnet/lora.yaml",
    "fashion-efficientnet-head": "recipes/fashion-efficientnet/head.yaml",
    "movies-smollm2-lora": "recipes/movies-smollm2/lora.yaml",
}
FAMILIES = (
    ("clip art, 20 a class", "DINOv2-small", "clipart-dinov2-lora"),
    ("", "EfficientNet-Lite0", "clipart-efficientnet-lora", "clipart-efficientnet-partial"),
    ("garments, 5 a class", "DINOv2-small", "fashion-dinov2-head"),
    ("", "EfficientNet-Lite0", "fashion-efficientnet-head"),
    ("movies, 200 a class", "MiniLM", "movies-minilm-lora", "movies-minilm-zero-shot"),
    ("", "SmolLM2-135M", "movies-smollm2-lora"),
    ("news, 20 a class", "MiniLM", "bbc-minilm-lora", "bbc-minilm-zero-shot"),
)
"""The rows of the table of families: task, source model, and the runs that its arms are of."""
FAMILY_ARMS = ("zero_shot", "head", "partial", "lora", "classical")


def save_results(run: Path) -> None:
    """Write a finished run's figures to benchmarks/results."""
    tree = sanitize_record(Record.read(run)).to_dict()
    RESULTS.mkdir(exist_ok=True)
    results = {key: tree[key] for key in (*RESULT_KEYS, "recipe")}
    (RESULTS / f"{run.name}.json").write_text(to_json(results), encoding="utf-8")


def read_result(name: str) -> dict[str, Any]:
    """Return the stored figures of a run, or of a job."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def build_record(tree: dict[str, Any]) -> Record:
    """Return the stored record of a run, which has some of its keys only."""
    fields = {
        name: TypeAdapter[Any](Record.model_fields[name].annotation).validate_python(value)  # pyright: ignore
        for name, value in tree.items()
        if name in SHOWN
    }
    return Record.model_construct(**dict.fromkeys(SHOWN) | fields)


def render_block(name: str) -> str:
    """Return the text between the marks `results:<name>`."""
    if name == "index":
        rows = ["| recipe | own arm | test | gain | of it adaptation | verdict |",
                "|---|---|---|---|---|---|"]  # fmt: skip
        rows += [_format_index_row(run, path) for run, path in INDEX.items()]
        return "\n".join(rows)
    if name == "sources":
        return "\n".join(_format_sources())
    if name == "families":
        return f"```\n{_format_families()}\n```"
    if name == "speed-short":
        return "```\n" + "\n".join(read_result("speed")["short_table"]) + "\n```"
    tree = read_result(name)
    if "table" in tree:
        return "```\n" + "\n".join(tree["table"]) + "\n```"
    record = build_record(tree)
    lines = [console.format_ladder(record)]
    if has_forgetting(record):
        lines += ["", console.format_forgetting(record), ""]
    if record.adapt is not None:
        lines += map(console.format_adaptation, record.stages)
        lines.append(format_adaptation_sentence(record))
    return "```\n" + "\n".join(lines) + "\n```"


def _format_index_row(run: str, path: str) -> str:
    record = build_record(read_result(run))
    gain = record.transfer_gain
    worth = "no baseline" if gain is None else f"{format_gain(gain)} over {gain.baseline}"
    decision = record.verdict.decision
    score = f"{record.metric} {record.own_row.test:.3f}"
    adapted = record.adapt and record.adapt.gain
    share = "" if adapted is None else format_gain(adapted)
    return f"| `{path}` | {record.own_arm} | {score} | {worth} | {share} | {decision} |"


def _format_sources() -> list[str]:
    """Return a table of the architectures that load, a row for each way to pool and to adapt."""
    alike: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in sorted([*ARCHITECTURES, *UNHEADED, *READ_AS]):
        alike[_describe_source(name)].append(f"`{name}`")
    return [
        "| reads | `finetune.pooling` | `adapt.objective` | transformers' model type |",
        "|---|---|---|---|",
        *(f"| {' | '.join(how)} | {', '.join(names)} |" for how, names in sorted(alike.items())),
    ]


def _describe_source(name: str) -> tuple[str, str, str]:
    """Return what a model type reads, how it is pooled, and how it is adapted, from its spec."""
    known = READ_AS.get(name, name)
    spec = (ARCHITECTURES | UNHEADED)[known]
    poolings = ["native"] if known in ARCHITECTURES else []
    if spec.reads_prompt:
        return "a picture and a prompt", "last", "none"
    if spec.modality == "text":
        objective = "clm" if spec.is_causal else "mlm"
        has_class = spec.is_causal or CONFIG_MAPPING[known] in MODEL_FOR_MASKED_LM_MAPPING
        poolings += ["mean"] if spec.is_causal else ["mean", "cls"]
        return "text", ", ".join(poolings), objective if has_class else "none"
    poolings += ["cls", "mean", "cls+mean"] if spec.prefix_tokens else []
    poolings += ["embedding"] if known in PAIRS else []
    return "pictures", ", ".join(poolings), "none" if spec.masked_images is None else "mae"


def _format_families() -> str:
    """Return the arms of several source models on the same task, a row a model.

    The gain is that of the first run's own arm over the classical model.
    """
    rows = [["task", "source", "test rows", *FAMILY_ARMS, "gain over classical"]]
    for task, source, *runs in FAMILIES:
        trees = [read_result(run) for run in runs]
        ladders = [build_record(tree).ladder for tree in trees]
        scores = {row.arm: row for ladder in reversed(ladders) for row in ladder}
        cells = [_format_score(scores[arm]) if arm in scores else "" for arm in FAMILY_ARMS]
        gain = scores["classical"].gain_of_own
        worth = "" if gain is None else f"{trees[0]['own_arm']} {format_gain(gain)}"
        rows.append([task, source, str(trees[0]["data"]["splits"]["test"]), *cells, worth])
    return console.format_table(rows)


def _format_score(row: Any) -> str:
    return f"{row.test:.3f} ({row.sd:.3f})"


def refresh_page(path: Path) -> str:
    """Return the page's text with every marked block written from the results."""
    return re.sub(
        r"(<!-- results:([\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)",
        lambda match: f"{match[1]}{render_block(match[2])}\n{match[3]}",
        path.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for run_ in map(Path, sys.argv[1:]):
        save_results(run_)
    for page in PAGES:
        page.write_text(refresh_page(page), encoding="utf-8")
