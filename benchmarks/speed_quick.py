"""Count what hftl and its peers do for the jobs of `speed.py` on a tiny model, and check bounds.

Counts are the same on every machine and in every run, so that a test holds them: a pass that is run
twice, padding that is computed, a host that waits at every step show, however busy the machine is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from speed_counts import Counts, count_operations
from speed_hftl import build_recipe
from speed_jobs import JOBS, Inputs
from speed_peers import run as run_peer
from speed_solved import train_frozen
from transformers import BertConfig, BertModel

BLOCK = "BertLayer"
LAYERS = 3
WORDS = "good bad great dull warm cold film story actor scene music plot the a of and".split()
BOUNDS: dict[str, dict[str, float]] = {
    "lora": {"tokens": 1.2, "flops": 1.25, "written": 1.95, "syncs": 0.75},
    "full": {"tokens": 1.2, "flops": 1.38, "written": 1.3, "syncs": 0.75},
    "top-1": {"tokens": 2.55, "flops": 2.15, "written": 2.4, "syncs": 0.7},
    "lora-kl": {"tokens": 1.8, "flops": 1.5, "written": 2.2, "syncs": 0.55},
    "lora-top-2-kl": {"tokens": 2.95, "flops": 2.25, "written": 2.8, "syncs": 0.5},
    "probe-text": {"tokens": 8.0, "flops": 8.0, "written": 18.0, "syncs": 20.0},
}
"""Least ratios peer / hftl of each count, for the jobs that are counted. Syncs include what only a
CPU does, where they cost nothing: each batch's mask is read to leave its padding out."""


def check_counts(names: Sequence[str] | None = None) -> list[str]:
    """Count the jobs, all that have bounds by default; return a line each.

    Raises:
        SystemExit: naming every count that is out of its bound.
    """
    lines, faults = [], []
    with tempfile.TemporaryDirectory() as place:
        source = write_source(Path(place) / "source")
        for name in names or BOUNDS:
            inputs = write_job(name, Path(place) / name, source)
            ours, peer = count_hftl(inputs), count_peer(inputs)
            ratios = {part: getattr(peer, part) / getattr(ours, part) for part in BOUNDS[name]}
            lines.append(f"  {name:14}" + "".join(f"{p} {r:.2f}  " for p, r in ratios.items()))
            faults += [
                f"{name}: {part} {ratio:.2f}, at least {BOUNDS[name][part]}: hftl "
                f"{getattr(ours, part):,.0f}, its peer {getattr(peer, part):,.0f}"
                for part, ratio in ratios.items()
                if ratio < BOUNDS[name][part]
            ]
    if faults:
        raise SystemExit("\n".join([*lines, *faults]))
    return lines


def write_source(folder: Path) -> str:
    """Write a random BERT of three small blocks with a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    core.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def write_job(name: str, folder: Path, source: str) -> Inputs:
    """Write rows of many lengths, and the job for the tiny model."""
    import numpy as np
    import pandas as pd

    folder.mkdir()
    job = replace(JOBS[name], train=48, validation=16, test=16, batch=16, fp32=True)
    job = replace(job, lora_layers=(LAYERS - 1,) if job.lora_layers else ())
    draw = np.random.default_rng(0)
    for split, count in job.rows.items():
        texts = [" ".join(draw.choice(WORDS, draw.integers(4, 40))) for _ in range(count)]
        labels = ["negative", "positive"] * (count // 2)
        pd.DataFrame({"text": texts, "label": labels}).to_csv(folder / f"{split}.csv", index=False)
    return Inputs(folder, source, False, job)


def count_hftl(inputs: Inputs) -> Counts:
    """Count the arm of a job: training or solving, and its predictions."""
    from hftl.config.recipe import Recipe
    from hftl.finetune.arm import train_arm
    from hftl.finetune.baselines import solve_arm
    from hftl.pipeline.pipeline import open_recipe
    from hftl.pipeline.retention import build_retention

    recipe = Recipe.parse(build_recipe(inputs))
    context, (arm,) = open_recipe(recipe), recipe.arms
    with count_operations(BLOCK) as counts:
        if arm.spec.is_solved:
            solve_arm(context, arm, 0)
        else:
            retention = build_retention(context, arm, 0, inputs.folder / "run")
            train_arm(context, arm.finetune, 0, retention)
    return counts


def count_peer(inputs: Inputs) -> Counts:
    """Count the tuned peer, or the Trainer on a frozen encoder, on a job."""
    with count_operations(BLOCK) as counts:
        if inputs.job.strategy == "head":
            train_frozen(inputs)
        else:
            run_peer(inputs, "tuned")
    return counts
