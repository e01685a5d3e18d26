"""Say which numbers and words the arguments of transformers and peft may be.

Upstream takes nearly any number, and fails on it where it is used: after the data are read, or in
the middle of a training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Bound a number; None: there is no such bound.

    `above` and `below` leave the bound itself out, `least` and `most` hold it; `also` is a number
    outside that is allowed, which stands for none.
    """

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    whole: bool = False
    also: int | None = None

    def __contains__(self, value: object) -> bool:
        """Return whether a value is a finite number of this range; true and false are none."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if isinstance(value, float) and (self.whole or not math.isfinite(value)):
            return False
        return value == self.also or (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        """Return the range in words: `a whole number above 0`."""
        bounds = {
            "above": self.above, "of at least": self.least, "below": self.below,
            "of at most": self.most,
        }  # fmt: skip
        if self.least is not None and self.most is not None:
            bounds = {"from": self.least, "to": self.most}
        parts = [
            f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}"
            for word, bound in bounds.items()
            if bound is not None
        ]
        between = " " if "from" in bounds else " and "
        words = " ".join([f"a {'whole ' * self.whole}number", between.join(parts)]).strip()
        return words if self.also is None else f"{words}, or {self.also}"


POSITIVE, COUNT = Range(above=0), Range(above=0, whole=True)
NOT_NEGATIVE = Range(least=0)
WORKERS = Range(least=0, most=1024, whole=True)
"""Processes that read data; each takes memory."""
SHARE = Range(least=0, below=1)
ALPHA = Range(above=0, most=1e6)
"""Of LoRA: beyond, the update of a layer is no number in fp32."""

TRAINING_RANGES = {
    "learning_rate": POSITIVE, "num_train_epochs": POSITIVE,
    "max_steps": Range(above=0, whole=True, also=-1),
    "per_device_train_batch_size": COUNT, "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT, "eval_accumulation_steps": COUNT,
    "dataloader_num_workers": WORKERS, "dataloader_prefetch_factor": COUNT,
    "adam_beta1": SHARE, "adam_beta2": SHARE, "adam_epsilon": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE, "max_grad_norm": NOT_NEGATIVE, "warmup_steps": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    # A fraction is a share of all steps.
    "logging_steps": NOT_NEGATIVE, "eval_steps": NOT_NEGATIVE, "save_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE, "save_total_limit": COUNT, "torch_empty_cache_steps": COUNT,
    "ddp_timeout": COUNT, "ddp_bucket_cap_mb": COUNT,
}  # fmt: skip
LORA_RANGES = {"r": COUNT, "lora_alpha": ALPHA, "lora_dropout": SHARE}
PATTERN_RANGES = {"rank_pattern": COUNT, "alpha_pattern": ALPHA}
"""Of the values of these mappings."""

LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
TRAINING_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "log_level": LOG_LEVELS,
    "log_level_replica": LOG_LEVELS,
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "dataloader_multiprocessing_context": (None, "fork", "spawn", "forkserver"),
    "ddp_backend": (None, "nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    "torch_compile_mode": (
        None, "default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs",
    ),
    # A recipe cannot hold an object of accelerate's.
    "parallelism_config": (None,),
}  # fmt: skip
