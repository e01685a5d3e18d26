"""List settings of layer-wise learning rates, and put them into a recipe's section."""

from collections.abc import Mapping, Sequence

import numpy as np

from hftl.analysis.sweep_facts import PartEffect, RateSetting
from hftl.config.finetune import Finetune, Rates
from hftl.train.optimizer import LayerLearningRates, build_layer_rates

RATE_FACTORS = (1 / 3, 1.0, 3.0)
"""Of the recipe's learning rate, where no rates are given."""
DECAYS = (0.95, 0.85, 0.7, 0.5)
"""The usual values lie between .65 of vision transformers (He et al. 2022, arXiv:2111.06377) and
.95 of BERT (Zhang et al. 2021, arXiv:2006.05987)."""
PART_FACTORS = (0.0, 3.0)
"""Of the one rate, for one part: the part is frozen, or moves further."""
MAX_PARTS = 12
"""Of blocks whose rates are searched one by one."""


def list_settings(
    finetune: Finetune, rates: Sequence[float], decays: Sequence[float]
) -> list[RateSetting]:
    """Return every pair of a rate and a decay, one rate for all included, and the recipe's own.

    Args:
        finetune: the recipe's section.
        rates: learning rates; none: around the recipe's.
        decays: below 1; none: `DECAYS`.
    """
    base = finetune.training["learning_rate"]
    decays = decays or DECAYS
    rates = rates or [float(f"{base * factor:.3g}") for factor in RATE_FACTORS]
    settings = [
        RateSetting(name=f"{rate:.3g}, decay {decay:g}", learning_rate=rate, layer_decay=decay)
        for rate in rates
        for decay in decays
    ]
    if finetune.lr is not None or finetune.layer_decay is not None:
        own = Rates() if finetune.lr is None else finetune.lr
        settings.append(
            RateSetting(
                name="the recipe's", learning_rate=base, layer_decay=finetune.layer_decay,
                embeddings=own.embeddings, head=own.head,
                blocks=None if own.blocks is None else tuple(own.blocks),
            )
        )  # fmt: skip
    singles = [RateSetting(name=f"one rate {rate:.3g}", learning_rate=rate) for rate in rates]
    return [*singles, *settings]


def apply_setting(finetune: Finetune, setting: RateSetting, share: float = 1.0) -> Finetune:
    """Return the section with these learning rates, and a share of its epochs or steps."""
    training = finetune.training | {"learning_rate": setting.learning_rate}
    training["num_train_epochs"] = float(training["num_train_epochs"]) * share
    if training.get("max_steps", 0) > 0:
        training["max_steps"] = max(1, round(training["max_steps"] * share))
    phases = finetune.gradual
    gradual = phases.model_copy(
        update={"epochs": phases.epochs * share, "final_epochs": phases.final_epochs * share}
    )
    return finetune.model_copy(
        update={
            "training": training, "gradual": gradual, "lr": _build_rates(setting),
            "layer_decay": setting.layer_decay,
        }
    )  # fmt: skip


def _build_rates(setting: RateSetting) -> Rates | None:
    """Return the rates of parts; None where none has its own."""
    blocks = None if setting.blocks is None else list(setting.blocks)
    rates = Rates(embeddings=setting.embeddings, blocks=blocks, head=setting.head)
    return None if rates == Rates() else rates


def compute_mean_rate(setting: RateSetting, parts: Sequence[str], blocks: int) -> float:
    """Return the mean learning rate of the parts that train: settings are compared by it.

    Args:
        setting: its rates.
        parts: `embeddings`, `block 3` and the like.
        blocks: how many there are.
    """
    rates = _build_rates(setting)
    chosen = build_layer_rates(setting.layer_decay, rates and rates.model_dump())
    chosen = LayerLearningRates() if chosen is None else chosen
    depths = [0 if part == "embeddings" else int(part.split()[1]) for part in parts]
    return float(np.mean([chosen.rate(setting.learning_rate, d, blocks) for d in depths]))


def group_parts(names: Sequence[str], most: int = MAX_PARTS) -> dict[str, list[str]]:
    """Return the parts below the head by name, from the bottom: their rates are searched.

    Neighbouring blocks are one part where there are many.

    Args:
        names: of all that trains: `embeddings`, `block 3`, `head`.
        most: parts of blocks, at most.
    """
    blocks = [name for name in names if name.startswith("block ")]
    size = -(-len(blocks) // most)
    parts = {name: [name] for name in names if name == "embeddings"}
    for start in range(0, len(blocks), max(size, 1)):
        members = blocks[start : start + size]
        first, last = members[0], members[-1].split()[1]
        parts[first if len(members) == 1 else f"blocks {first.split()[1]}-{last}"] = members
    return parts


def change_parts(
    single: RateSetting, factors: Mapping[str, float], parts: Mapping[str, list[str]], blocks: int,
    name: str,
) -> RateSetting:  # fmt: skip
    """Return a setting of one rate, but for the parts that have a factor of their own.

    Args:
        single: the one rate.
        factors: by the name of the part.
        parts: see `group_parts`.
        blocks: how many there are.
        name: of the setting.
    """
    rate = single.learning_rate
    of_name = {member: factor for part, factor in factors.items() for member in parts[part]}
    values = tuple(rate * of_name.get(f"block {n}", 1.0) for n in range(1, blocks + 1))
    embeddings = of_name.get("embeddings")
    return RateSetting(
        name=name, learning_rate=rate, blocks=values,
        embeddings=None if embeddings is None else rate * embeddings,
    )  # fmt: skip


def select_factors(effects: Sequence[PartEffect]) -> dict[str, float]:
    """Return the best factor of every part that gains more than its standard error by it."""
    chosen: dict[str, PartEffect] = {}
    for effect in effects:
        if effect.gain is None or effect.gain <= (effect.error or 0.0):
            continue
        best = chosen.get(effect.part)
        if best is None or best.gain is None or effect.gain > best.gain:
            chosen[effect.part] = effect
    return {part: effect.factor for part, effect in chosen.items()}
