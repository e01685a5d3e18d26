"""Build the corpora of adaptation, each once: read, without validation and test rows, on disk."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, BaseModel, Field

from hftl.adapt.facts import CorpusFacts
from hftl.config.adapt import Adapt
from hftl.config.data import Data
from hftl.data import image_inputs, prepare
from hftl.data.corpus import BlockSpec, TokenBlocks
from hftl.data.corpus import write_blocks as write_text
from hftl.data.duplicates import NearImageIndex, NearTextIndex
from hftl.data.image_inputs import ImageInputs
from hftl.data.load import load_images, read_documents
from hftl.data.rows import BadRows, Row
from hftl.data.splits import MEASURED_SPLITS, hash_text
from hftl.errors import DataError
from hftl.finetune.build_context import infer_input_spec, pin_revisions
from hftl.finetune.context import ExperimentContext
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.pipeline.run import Run
from hftl.runtime import distributed, run_folder
from hftl.runtime.run_folder import fingerprint, to_json

GENERAL_SAMPLE = 1000
"""Documents or pictures of general data that are looked at."""
HELD_OUT_ALL = 1 - 1e-9
"""The share of them that is held out: nothing is learnt from them."""


class StoredCorpus(BaseModel, frozen=True):
    """Describe a corpus in its folder; the counts of blocks and tokens are None for images."""

    origin: str = Field(validation_alias=AliasChoices("from", "origin"), serialization_alias="from")
    transductive: bool
    documents: int
    held_out_documents: int
    duplicates: int
    leaked: int
    bad_rows: int
    fingerprint: str
    blocks: int | None = None
    held_out_blocks: int | None = None
    tokens: int | None = None
    held_out_tokens: int | None = None
    empty: int | None = None

    def to_dict(self) -> dict[str, str | int]:
        """Return the counts that are known, as the record holds them."""
        return self.model_dump(by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Corpus:
    """Hold the rows that an adaptation trains on: blocks of text, or the hashes of images.

    `facts` is what the record tells of it; `general` is None where the recipe names none.
    `fingerprint` tells all of them from others.
    """

    facts: CorpusFacts
    fingerprint: str
    train: Any
    held_out: Any
    general: Any | None


def build_corpus(run: Run, context: ExperimentContext, stage: Adapt) -> Corpus:
    """Return the corpus of an adaptation; the main process builds what is missing.

    Raises:
        DataError: if nothing is left of it, or a row cannot be read.
    """
    part = select_part(run.recipe.data, stage)
    made = _build_corpus_folder(run, context, stage, part, "corpus")
    general = None
    if run.recipe.data.general is not None:
        general = _build_corpus_folder(run, context, stage, "general", "general")
    stored = [_read_stored(folder) for folder in (made, general) if folder]
    facts = CorpusFacts.model_validate(stored[0].to_dict())
    stamp = fingerprint([corpus.fingerprint for corpus in stored])
    if context.prepared.modality == "text":
        return Corpus(
            facts, stamp, TokenBlocks(made, "train"), TokenBlocks(made, "held_out"),
            TokenBlocks(general, "held_out") if general else None,
        )  # fmt: skip
    splits = json.loads((made / "kept.json").read_text("utf-8"))
    for folder in (made, general):
        if folder and isinstance(context.inputs, ImageInputs):
            context.inputs.load_cache(folder)
    general_splits = json.loads((general / "kept.json").read_text("utf-8")) if general else None
    return Corpus(
        facts,
        stamp,
        splits["train"],
        splits["held_out"],
        general_splits and general_splits["held_out"],
    )


def select_part(data: Data, stage: Adapt) -> str:
    """Return the corpus's key under `data`: `unlabeled`, or `train` for the task's own inputs."""
    if stage.corpus == "task" or data.unlabeled is None:
        return "train"
    return "unlabeled"


def _build_corpus_folder(
    run: Run, context: ExperimentContext, stage: Adapt, part: str, name: str
) -> Path:
    """Return the folder of a corpus, built where it is missing."""

    def make() -> str:
        reads = _build_corpus_key(run, context, stage, part)
        folder = run.folder / "phases" / f"{name}-{fingerprint(reads)[:8]}"
        if run_folder.read_stage_inputs(folder) is None:
            maker = _write_texts if context.prepared.modality == "text" else _write_images
            with run_folder.commit_stage(folder, reads) as aside:
                stored = maker(run, context, stage, part, aside)
                run_folder.write_text(aside / "facts.json", to_json(stored.to_dict()))
        return folder.name

    return run.folder / "phases" / distributed.broadcast_from_main(make)


def _pin_data(run: Run, context: ExperimentContext) -> Data:
    """Return the data section, its hub tables at the commits that the run began with."""
    return pin_revisions(run.recipe.data, context.prepared.facts.hub_revisions)


def _read_stored(folder: Path) -> StoredCorpus:
    return run_folder.read_part(folder / "facts.json", StoredCorpus)


def _build_corpus_key(
    run: Run, context: ExperimentContext, stage: Adapt, part: str
) -> Mapping[str, object]:
    """Return what a corpus depends on: content, never paths."""
    data = _pin_data(run, context)
    rows = part == "train" and data.task is not None
    general = part == "general"
    content = prepare.hash_data_files(data, context.prepared.modality, (part,)) if not rows else ""
    return {
        "part": part,
        "content": content,
        # General data are only looked at: nothing is held out of them, and nothing is dropped.
        "measured": None if general else context.prepared.facts.fingerprint,
        "transductive": not general and stage.transductive,
        "bad_rows": data.bad_rows,
        **_build_encoding_key(run, context, stage, general),
    }


def _build_encoding_key(
    run: Run, context: ExperimentContext, stage: Adapt, general: bool
) -> Mapping[str, object]:
    """Return what the encoding of a corpus depends on."""
    if isinstance(context.inputs, ImageInputs):
        held = None if general else stage.held_out
        processor = context.preprocessing_hash
        return {"processor": processor, "held_out": held, "seed": run.recipe.data.seed}
    spec = _build_block_spec(run, context, stage, general)
    return {"tokenizer": context.preprocessing_hash, "cut": asdict(spec)}


def _build_block_spec(
    run: Run, context: ExperimentContext, stage: Adapt, general: bool = False
) -> BlockSpec:
    length: int = context.inputs.max_length  # pyright: ignore[reportAttributeAccessIssue]
    if general:
        return BlockSpec(length, False, HELD_OUT_ALL, run.recipe.data.seed)
    separator = None
    if stage.objective == "clm":
        separator = context.inputs.tokenizer.eos_token_id  # pyright: ignore
    return BlockSpec(length, stage.pack, stage.held_out, run.recipe.data.seed, separator)


def _write_texts(
    run: Run, context: ExperimentContext, stage: Adapt, part: str, folder: Path
) -> StoredCorpus:
    """Write the tokens of a text corpus, without texts of validation and test."""
    data, rows = _pin_data(run, context), context.prepared.rows
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
        texts = _sample_texts(texts, run.recipe.data.seed)
    near = NearTextIndex(
        _iterate_texts(data.task, (row for split in MEASURED_SPLITS for row in rows[split]))
    )
    drop: Callable[[str], bool] = lambda text: text in near  # noqa: E731
    if stage.transductive or general:
        drop = lambda text: False  # noqa: E731
    cut = _build_block_spec(run, context, stage, general)
    counts = write_text(texts, context.inputs.tokenizer, cut, drop, folder)  # pyright: ignore
    return StoredCorpus(
        origin=part, transductive=stage.transductive, bad_rows=bad.count, **asdict(counts)
    )


def build_leak_filter(context: ExperimentContext) -> Callable[[Row], bool]:
    """Return a predicate: True for a row that is, nearly or exactly, one of validation or test."""
    task, inputs = context.prepared.task, context.inputs
    rows = [row for split in MEASURED_SPLITS for row in context.prepared.rows[split]]
    if isinstance(inputs, ImageInputs):
        seen = NearImageIndex(context.get_canvases(rows))
        return lambda row: inputs.get_pixels(row.content[0]) in seen
    texts = NearTextIndex(_iterate_texts(task, rows))
    return lambda row: any(text in texts for text in _iterate_texts(task, [row]))


def _iterate_texts(task: str | None, rows: Iterable[Row]) -> Iterator[str]:
    """Yield the rows' texts: each of a pair, and the words of a row as one."""
    for row in rows:
        yield from [" ".join(row.content)] if task == TOKEN_CLASSIFICATION else row.content


def _sample_texts(texts: Iterable[str], seed: int) -> list[str]:
    """Return the documents of the smallest hashes, the same ones in any order of reading."""
    sample: dict[bytes, str] = {}
    for text in texts:
        sample[hash_text(f"{seed} general {text}")] = text
        if len(sample) > 2 * GENERAL_SAMPLE:
            sample = dict(sorted(sample.items())[:GENERAL_SAMPLE])
    return [text for _, text in sorted(sample.items())[:GENERAL_SAMPLE]]


def _write_images(
    run: Run, context: ExperimentContext, stage: Adapt, part: str, folder: Path
) -> StoredCorpus:
    """Write the pixels of an image corpus, without images of validation and test."""
    data, prepared = _pin_data(run, context), context.prepared
    inputs = context.inputs
    assert isinstance(inputs, ImageInputs)
    bad = BadRows(skip=data.bad_rows == "skip")
    if part == "train" and data.task is not None:
        splits = ("train", *MEASURED_SPLITS) if stage.transductive else ("train",)
        rows = [row for split in splits for row in prepared.rows[split]]
    else:
        reading = infer_input_spec(context.source, str(data.task))
        rows = load_images(data, part, bad, reading)
    distinct = {row.content[0]: row for row in rows}
    key = {name: hash_text(f"{data.seed} {name}") for name in distinct}
    names = sorted(distinct, key=lambda name: key[name])
    if part == "general":
        names = names[:GENERAL_SAMPLE]
    image_inputs.write_image_cache(inputs, [distinct[name] for name in names], folder)
    inputs.load_cache(folder)
    distinct_names = names
    if not stage.transductive and part != "general":
        measured = [row for split in MEASURED_SPLITS for row in prepared.rows[split]]
        near = NearImageIndex(context.get_canvases(measured))
        known = {row.content[0] for row in measured}
        distinct_names = [n for n in names if n not in known and inputs.get_pixels(n) not in near]
    held = len(distinct_names) if part == "general" else round(stage.held_out * len(distinct_names))
    if len(distinct_names) - held < 1 and part != "general" or held < 1:
        raise DataError(
            f"the corpus has {len(distinct_names)} pictures after duplicates are dropped, too few "
            "to hold any out",
            "Give more pictures, or another adapt.held_out",
        )
    splits = {"held_out": distinct_names[:held], "train": distinct_names[held:]}
    run_folder.write_text(folder / "kept.json", json.dumps(splits))
    return StoredCorpus(
        origin=part,
        transductive=stage.transductive,
        documents=len(splits["train"]),
        held_out_documents=held,
        duplicates=len(rows) - len(distinct),
        leaked=len(names) - len(distinct_names),
        bad_rows=bad.count,
        fingerprint=fingerprint(sorted(distinct_names)),
    )


def load_canvases(context: ExperimentContext, names: list[str]) -> list[np.ndarray]:
    """Return the stored pixels of images by their hashes; they are read from disk on use."""
    assert isinstance(context.inputs, ImageInputs)
    return [context.inputs.get_pixels(name) for name in names]
