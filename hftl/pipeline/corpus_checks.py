"""Read and split the corpora of adaptation before anything trains: what a run would refuse."""

import tempfile
from itertools import islice
from pathlib import Path

from hftl.config.recipe import Recipe
from hftl.data.load import load_images, read_documents
from hftl.data.rows import BadRows
from hftl.data.splits import MEASURED_SPLITS
from hftl.finetune.build_context import infer_input_spec, pin_revisions
from hftl.finetune.context import ExperimentContext
from hftl.pipeline.corpora import build_corpus, select_part
from hftl.pipeline.objectives import check_corpus, list_adaptation_warnings
from hftl.pipeline.run import Run

MAX_ROWS = {"text": 5_000, "image": 200}
"""Rows of a table without labels that are read before a run: seconds. Of a larger one the first."""
MANY_ROWS = 10**9
"""Stands for the number of rows of a corpus that is read in part: it is not too small."""


def check_corpora(recipe: Recipe, context: ExperimentContext) -> list[str]:
    """Return warnings of every adaptation's corpus; write nothing that stays.

    A corpus of at most `MAX_ROWS` is built as the run builds it. Of a larger one the first rows are
    read, as are those of `data.unlabeled` where only an analysis names it.

    Raises:
        DataError: if a file or column is missing, a row cannot be used, or too few are left to
            train on, to hold out, or for the guard.
        RecipeError: if nothing of what is held out is masked.
    """
    warnings: list[str] = []
    data = recipe.data
    every = recipe.all_stages
    stages = [stage for number, stage in enumerate(every) if stage not in every[:number]]
    parts = {select_part(data, stage) for stage in stages}
    parts |= {"unlabeled"} if data.unlabeled is not None else set()
    # Without an adaptation general data are rows, which are loaded for forgetting.
    parts |= {"general"} if stages and data.general is not None else set()
    whole = {part: _read_first_rows(recipe, context, part) for part in sorted(parts)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = Run(recipe, Path(folder), print)
        for stage in stages:
            rows = held_out = MANY_ROWS
            part = select_part(data, stage)
            if whole[part] and whole.get("general", True):
                corpus = build_corpus(run, context, stage)
                check_corpus(recipe, context, stage, corpus)
                rows, held_out = len(corpus.train), len(corpus.held_out)
            elif stage.objective == "mae" and part == "train" and data.task is not None:
                # These have been read, and each trains: texts may be joined into fewer blocks.
                splits = ("train", *MEASURED_SPLITS) if stage.transductive else ("train",)
                pictures = sum(len(context.prepared.rows[split]) for split in splits)
                rows = round((1 - stage.held_out) * pictures)
            warnings += list_adaptation_warnings(stage, rows, held_out)
    return warnings


def _read_first_rows(recipe: Recipe, context: ExperimentContext, part: str) -> bool:
    """Read the first rows of a table without labels; return whether these are all of them."""
    data, modality = recipe.data, context.prepared.modality
    most = MAX_ROWS[modality]
    if part == "train" and data.task is not None:
        return len(context.prepared.rows["train"]) <= most
    data = pin_revisions(data, context.prepared.facts.hub_revisions)
    bad = BadRows(skip=data.bad_rows == "skip")
    if modality == "text":
        return sum(1 for _ in islice(read_documents(data, part, bad), most + 1)) <= most
    spec = infer_input_spec(context.source, str(data.task))
    return len(load_images(data, part, bad, spec, most + 1)) + bad.count <= most
