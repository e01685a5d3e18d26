"""The corpora of adaptation, each made once: read, cleared of what measures, kept as files."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hftl.config.adapt import Adapt
from hftl.config.data import Data
from hftl.data import image_inputs, prepare
from hftl.data.corpus import BlockSpec, TokenBlocks, read_documents
from hftl.data.corpus import write_blocks as write_text
from hftl.data.duplicates import NearImageIndex, NearTextIndex
from hftl.data.image_inputs import ImageInputs
from hftl.data.load import load_images
from hftl.data.rows import BadRows, Row
from hftl.data.splits import hash_text
from hftl.errors import DataError
from hftl.finetune.context import (
    MEASURED_SPLITS,
    ExperimentContext,
    build_input_spec,
    pin_revisions,
)
from hftl.models.architectures import TOKEN_CLASSIFICATION
from hftl.pipeline.arms import Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.fingerprints import fingerprint, to_json

GENERAL_SAMPLE = 1000
"""Documents or pictures of general data that are looked at."""
HELD_OUT_ALL = 1 - 1e-9
"""The share of them that is held out: nothing is learnt from them."""


@dataclass(frozen=True)
class Corpus:
    """What an adaptation learns from: blocks of text, or the hashes of pictures.

    `facts` is what the record tells of it; `general` is None where the recipe names none.
    `fingerprint` tells all of them from others.
    """

    facts: dict[str, Any]
    fingerprint: str
    train: Any
    held_out: Any
    general: Any | None


def build_corpus(this: Run, bench: ExperimentContext, stage: Adapt) -> Corpus:
    """The corpus of an adaptation; rank 0 makes what does not stand yet.

    Raises:
        DataError: if nothing is left of it, or a row cannot be read.
    """
    part = _select_part(this, stage)
    made = _build_corpus_folder(this, bench, stage, part, "corpus")
    general = None
    if this.recipe.data.general is not None:
        general = _build_corpus_folder(this, bench, stage, "general", "general")
    facts = _read_facts(made)
    stamp = fingerprint(
        [_read_facts(folder)["fingerprint"] for folder in (made, general) if folder]
    )
    if bench.prepared.modality == "text":
        return Corpus(
            facts, stamp, TokenBlocks(made, "train"), TokenBlocks(made, "held_out"),
            TokenBlocks(general, "held_out") if general else None,
        )  # fmt: skip
    kept = json.loads((made / "kept.json").read_text("utf-8"))
    for folder in (made, general):
        if folder and isinstance(bench.inputs, ImageInputs):
            bench.inputs.load_cache(folder)
    others = json.loads((general / "kept.json").read_text("utf-8")) if general else None
    return Corpus(facts, stamp, kept["train"], kept["held_out"], others and others["held_out"])


def _select_part(this: Run, stage: Adapt) -> str:
    """Where the corpus lies in the recipe: `unlabeled`, or `train`, the task's own inputs."""
    if stage.corpus == "task" or this.recipe.data.unlabeled is None:
        return "train"
    return "unlabeled"


def _build_corpus_folder(
    this: Run, bench: ExperimentContext, stage: Adapt, part: str, name: str
) -> Path:
    """The folder of a corpus."""

    def make() -> str:
        reads = _build_corpus_key(this, bench, stage, part)
        folder = this.folder / "phases" / f"{name}-{fingerprint(reads)[:8]}"
        if run_folder.read_stage_inputs(folder) is None:
            maker = _write_texts if bench.prepared.modality == "text" else _write_images
            with run_folder.commit_stage(folder, reads) as aside:
                facts = maker(this, bench, stage, part, aside)
                told = {"from": part, "transductive": stage.transductive, **facts}
                run_folder.write_text(aside / "facts.json", to_json(told))
        return folder.name

    return this.folder / "phases" / distributed.broadcast_from_main(make)


def _pin_data(this: Run, bench: ExperimentContext) -> Data:
    """The data section, tables of the hub at the commits that the run has begun with."""
    return pin_revisions(this.recipe.data, bench.prepared.facts.hub_revisions)


def _read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text("utf-8"))


def _build_corpus_key(
    this: Run, bench: ExperimentContext, stage: Adapt, part: str
) -> dict[str, Any]:
    """What a corpus depends on: content, never places."""
    data = _pin_data(this, bench)
    rows = part == "train" and data.task is not None
    general = part == "general"
    content = prepare.hash_data_files(data, bench.prepared.modality, (part,)) if not rows else ""
    return {
        "part": part,
        "content": content,
        # General data are only looked at: nothing is held out of them, and nothing is dropped.
        "measured": None if general else bench.prepared.facts.fingerprint,
        "transductive": not general and stage.transductive,
        "bad_rows": data.bad_rows,
        **_build_encoding_key(this, bench, stage, general),
    }


def _build_encoding_key(
    this: Run, bench: ExperimentContext, stage: Adapt, general: bool
) -> dict[str, Any]:
    """How the encoder sees the corpus."""
    if isinstance(bench.inputs, ImageInputs):
        seen = fingerprint(bench.inputs.processor.to_dict())
        held = None if general else stage.held_out
        return {"processor": seen, "held_out": held, "seed": this.recipe.data.seed}
    tokenizer = fingerprint(json.loads(bench.inputs.tokenizer.backend_tokenizer.to_str()))
    return {"tokenizer": tokenizer, "cut": asdict(_build_block_spec(this, bench, stage, general))}


def _build_block_spec(
    this: Run, bench: ExperimentContext, stage: Adapt, general: bool = False
) -> BlockSpec:
    length: int = bench.inputs.max_length  # pyright: ignore[reportAttributeAccessIssue]
    if general:
        return BlockSpec(length, False, HELD_OUT_ALL, this.recipe.data.seed)
    return BlockSpec(length, stage.pack, stage.held_out, this.recipe.data.seed)


def _write_texts(
    this: Run, bench: ExperimentContext, stage: Adapt, part: str, folder: Path
) -> dict[str, Any]:
    """Tokens of a corpus of texts, without those that stand in validation and test."""
    data, rows = _pin_data(this, bench), bench.prepared.rows
    bad = BadRows(skip=data.bad_rows == "skip")
    general = part == "general"
    if part == "train" and data.task is not None:
        splits = ("train", *MEASURED_SPLITS) if stage.transductive else ("train",)
        texts: Iterable[str] = _iterate_texts(
            data.task, (row for split in splits for row in rows[split])
        )
    else:
        texts = read_documents(data, part, bad)
    if general:
        texts = _sample_texts(texts, this.recipe.data.seed)
    near = NearTextIndex(
        _iterate_texts(data.task, (row for split in MEASURED_SPLITS for row in rows[split]))
    )
    drop: Callable[[str], bool] = lambda text: text in near  # noqa: E731
    if stage.transductive or general:
        drop = lambda text: False  # noqa: E731
    cut = _build_block_spec(this, bench, stage, general)
    facts = write_text(texts, bench.inputs.tokenizer, cut, drop, folder)  # pyright: ignore
    return {**asdict(facts), "bad_rows": bad.count}


def build_leak_test(bench: ExperimentContext) -> Callable[[Row], bool]:
    """Whether a row, whose pixels are known, is one of validation and test or nearly so."""
    task, inputs = bench.prepared.task, bench.inputs
    rows = [row for split in MEASURED_SPLITS for row in bench.prepared.rows[split]]
    if isinstance(inputs, ImageInputs):
        seen = NearImageIndex(canvas for row in rows for canvas in bench.stack_canvases([row]))
        return lambda row: inputs.get_pixels(row.content[0]) in seen
    texts = NearTextIndex(_iterate_texts(task, rows))
    return lambda row: any(text in texts for text in _iterate_texts(task, [row]))


def estimate_rows(data: Data, bench: ExperimentContext, stage: Adapt) -> int | None:
    """About how many blocks or pictures of train's own inputs will train; None for another corpus,
    of which nothing is known before it is read."""
    if data.task is None or stage.corpus != "task" and data.unlabeled is not None:
        return None
    splits = ("train", *MEASURED_SPLITS) if stage.transductive else ("train",)
    rows = [row for split in splits for row in bench.prepared.rows[split]]
    kept = (1 - stage.held_out) * len(rows)
    if stage.objective == "mlm" and stage.pack:
        length: int = bench.inputs.max_length  # pyright: ignore[reportAttributeAccessIssue]
        kept *= bench.inputs.summarize(rows[:GENERAL_SAMPLE])["median_tokens"] / length
    return max(1, round(kept))


def _iterate_texts(task: str | None, rows: Iterable[Row]) -> Iterator[str]:
    """The rows' texts; of a pair each, of words one."""
    for row in rows:
        yield from [" ".join(row.content)] if task == TOKEN_CLASSIFICATION else row.content


def _sample_texts(texts: Iterable[str], seed: int) -> list[str]:
    """The documents of the smallest hashes: the same ones in whatever order they come."""
    kept: dict[bytes, str] = {}
    for text in texts:
        kept[hash_text(f"{seed} general {text}")] = text
        if len(kept) > 2 * GENERAL_SAMPLE:
            kept = dict(sorted(kept.items())[:GENERAL_SAMPLE])
    return [text for _, text in sorted(kept.items())[:GENERAL_SAMPLE]]


def _write_images(
    this: Run, bench: ExperimentContext, stage: Adapt, part: str, folder: Path
) -> dict[str, Any]:
    """Pixels of a corpus of pictures, without those that stand in validation and test."""
    data, prepared = _pin_data(this, bench), bench.prepared
    inputs = bench.inputs
    assert isinstance(inputs, ImageInputs)
    bad = BadRows(skip=data.bad_rows == "skip")
    if part == "train" and data.task is not None:
        splits = ("train", *MEASURED_SPLITS) if stage.transductive else ("train",)
        found = [row for split in splits for row in prepared.rows[split]]
    else:
        reading = build_input_spec(bench.source, str(data.task))
        found = load_images(data, part, bad, reading)
    distinct = {row.content[0]: row for row in found}
    key = {name: hash_text(f"{data.seed} {name}") for name in distinct}
    names = sorted(distinct, key=lambda name: key[name])
    if part == "general":
        names = names[:GENERAL_SAMPLE]
    image_inputs.write_image_cache(inputs, [distinct[name] for name in names], folder)
    inputs.load_cache(folder)
    kept = names
    if not stage.transductive and part != "general":
        measured = [row for split in MEASURED_SPLITS for row in prepared.rows[split]]
        near = NearImageIndex(c for row in measured for c in bench.stack_canvases([row]))
        known = {row.content[0] for row in measured}
        kept = [n for n in names if n not in known and inputs.get_pixels(n) not in near]
    held = len(kept) if part == "general" else round(stage.held_out * len(kept))
    if len(kept) - held < 1 and part != "general" or held < 1:
        raise DataError(
            f"the corpus has {len(kept)} pictures after duplicates are dropped, too few to hold "
            "any out",
            "Give more pictures, or another adapt.held_out",
        )
    told = {"held_out": kept[:held], "train": kept[held:]}
    run_folder.write_text(folder / "kept.json", json.dumps(told))
    return {
        "documents": len(told["train"]),
        "held_out_documents": held,
        "duplicates": len(found) - len(distinct),
        "leaked": len(names) - len(kept),
        "bad_rows": bad.count,
        "fingerprint": fingerprint(sorted(kept)),
    }


def load_canvases(bench: ExperimentContext, names: list[str]) -> list[np.ndarray]:
    """The stored pixels of pictures, by their hashes; they stay on the disk until read."""
    assert isinstance(bench.inputs, ImageInputs)
    return [bench.inputs.get_pixels(name) for name in names]
