"""Write the rows and source models that the contenders of the benchmark of speed read.

    python benchmarks/speed_inputs.py FOLDER    # the random source model of FOLDER/job.json

Texts are movie sentences of `assets.py movies`, pictures are drawn from a seed. MiniLM is real; the
other source models have random weights, on which no time depends.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from speed_jobs import LORA, MODEL, TARGETS, Inputs, Job

MOVIES = Path("assets/movies/movies.csv")
SIDE = 112
"""Pixels of a picture's side as ViT-S reads it."""
SHAPES: dict[str, dict[str, int]] = {
    "minilm-mlm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
                   "intermediate_size": 1536},
    "bert-tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "intermediate_size": 512},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                  "intermediate_size": 3072},
    "vit-small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
                  "intermediate_size": 1536},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
               "intermediate_size": 1536},
}  # fmt: skip
"""Shapes of the source models, as their configs name them."""


def write_inputs(job: Job, place: Path, bf16: bool) -> Inputs:
    """Write the rows and the source model of a job below a folder; return what contenders read."""
    folder = place / "rows"
    folder.mkdir(parents=True)
    if job.source == "vit-small":
        write_pictures(job, folder)
    else:
        write_texts(job, folder)
    source = str(find_minilm()) if job.source == "minilm" else str(place / "source")
    inputs = Inputs(folder, source, bf16 and not job.fp32, job)
    inputs.write()
    if job.source != "minilm" or job.kind == "predict":
        # In a process of its own: this one needs no torch.
        subprocess.run([sys.executable, __file__, str(folder)], check=True)
    return inputs


def find_minilm() -> Path:
    """Return the folder of MiniLM."""
    from hftl.runtime.paths import resolve_local_path

    folder = resolve_local_path(MODEL, "source.model")
    assert folder is not None
    return folder


def write_texts(job: Job, folder: Path) -> None:
    """Write one table a split: shuffled movie sentences, or rows of a given share of padding."""
    import pandas as pd

    rows = pd.read_csv(MOVIES).drop_duplicates("text").sample(frac=1, random_state=0)
    if job.padding is not None:
        rows = build_padded_rows(sum(job.rows.values()), job.padding, job.batch)
    copies = -(-sum(job.rows.values()) // len(rows))
    if copies > 1:
        # Exact copies would be dropped: a number makes every row a row of its own.
        rows = pd.concat([rows.assign(text=rows["text"] + f" {n}") for n in range(copies)])
    start = 0
    for split, count in job.rows.items():
        rows.iloc[start : start + count].to_csv(folder / f"{split}.csv", index=False)
        start += count


def build_padded_rows(count: int, padding: float, batch: int) -> Any:
    """Return random texts of which one in every quarter of a batch is long and the rest short."""
    import numpy as np
    import pandas as pd

    draw = np.random.default_rng(0)
    longest, every = 64, max(2, batch // 4)
    short = max(3, round(longest * (1 - padding * every / (every - 1))))
    words = np.array("film story actor scene music plot good bad great dull warm cold".split())
    lengths = [longest if number % every == 0 else short for number in range(count)]
    texts = [" ".join(draw.choice(words, length - 2)) for length in lengths]
    labels = draw.choice(["negative", "positive"], count)
    numbered = [f"{n} {text}" for n, text in enumerate(texts)]
    return pd.DataFrame({"text": numbered, "label": labels})


def write_pictures(job: Job, folder: Path) -> None:
    """Write pictures of coloured squares, a table a split; a class has its colour."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in job.rows.items():
        labels, names = draw.integers(0, 2, count), []
        for number, label in enumerate(labels):
            squares = draw.integers(0, 200, (12, 16, 3))
            squares[..., label] += 55
            picture = Image.fromarray(squares.astype(np.uint8)).resize((160, 120))
            names.append(f"{split}-{number}.png")
            picture.save(folder / names[-1])
        table = pd.DataFrame({"image": names, "label": np.array(["red", "green"])[labels]})
        table.to_csv(folder / f"{split}.csv", index=False)


def write_source(inputs: Inputs) -> None:
    """Write the random source model of a job with its tokenizer or processor."""
    import torch
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        BertModel,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPES[inputs.job.source]
    if inputs.job.source == "vit-small":
        ViTModel(ViTConfig(image_size=SIDE, **shape)).save_pretrained(inputs.source)
        size = {"height": SIDE, "width": SIDE}
        ViTImageProcessorPil(size=size).save_pretrained(inputs.source)
        return
    kind = BertForMaskedLM if inputs.job.source == "minilm-mlm" else BertModel
    kind(BertConfig(**shape)).save_pretrained(inputs.source)
    AutoTokenizer.from_pretrained(find_minilm()).save_pretrained(inputs.source)


def write_adapter(inputs: Inputs) -> None:
    """Write a plain peft adapter of MiniLM, its weights random, as a stranger publishes one."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    names = {0: "negative", 1: "positive"}
    base = AutoModelForSequenceClassification.from_pretrained(
        inputs.source, id2label=names, label2id={name: n for n, name in names.items()}
    )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, target_modules=TARGETS, init_lora_weights=False,
        modules_to_save=["classifier"], **LORA,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    folder = inputs.folder / "adapter"
    get_peft_model(base, config).save_pretrained(str(folder))
    base.config.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(inputs.source).save_pretrained(folder)


def main() -> None:
    """Write what the job of a folder needs beside its rows."""
    inputs = Inputs.read(Path(sys.argv[1]))
    if inputs.job.kind == "predict":
        write_adapter(inputs)
    else:
        write_source(inputs)


if __name__ == "__main__":
    main()
