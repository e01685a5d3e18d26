"""KL on heads that the source brings along: its masked-language head, or CLIP's named classes."""

from typing import Any

import torch

from hftl.adapt.masked_kl import MaskedKL
from hftl.adapt.mlm import load_mlm
from hftl.data.masking import masking_of
from hftl.errors import RecipeError
from hftl.finetune.workbench import Workbench
from hftl.model.source import SourceModel, load_tokenizer
from hftl.retain.zeroshot import ZeroShotKL, zero_shot_head
from hftl.sections.retain import KL

HIDDEN = 0.15
"""The share of tokens that are hidden, as in BERT's pre-training."""


def head_term(
    bench: Workbench, kl: KL, seed: int, before: Workbench | None = None
) -> MaskedKL | ZeroShotKL:
    """The term on a head of the source.

    Args:
        bench: what fine-tuning starts from.
        kl: with `on` mlm or zero_shot.
        seed: of the masks.
        before: what the source was before adaptation, where that is the reference.
    """
    assert not isinstance(kl.weight, str)
    how = (kl.temperature, kl.direction, kl.inputs)
    if kl.on == "zero_shot":
        clip = _clip(bench.source)
        names = bench.prepared.names
        head = zero_shot_head(clip, load_tokenizer(bench.source), names)
        return ZeroShotKL(kl.weight, head, *how)
    held = bench if before is None else before
    masked, fresh = load_mlm(held.source, seed, held.mlm_head)
    if fresh:
        raise _no_head(held.source)
    # The rows of a batch are told token by token, so no word is known as a whole.
    tokenizer = bench.inputs.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    masking = masking_of(tokenizer, HIDDEN, False, bench.source.config.vocab_size)
    return MaskedKL(kl.weight, masked, masking, seed, *how, apart=before is not None)


def check_head(kl: KL, source: SourceModel, warmed: bool, task: str) -> None:
    """Refuses KL on a head that the source does not have.

    Args:
        kl: with `on` mlm or zero_shot.
        source: the checkpoint.
        warmed: whether adaptation leaves the reference a masked-language head.
        task: the recipe's.

    Raises:
        RecipeError: naming what is missing, the tokenizer of CLIP's texts among it.
    """
    if kl.on == "mlm":
        if not warmed and load_mlm(source, 0)[1]:
            raise _no_head(source)
        return
    if task != "classification":
        raise RecipeError(
            f"retain.kl.on=zero_shot tells classes by their names, and data.task is {task}",
            "Use relational or features",
        )
    _clip(source)
    load_tokenizer(source)


def _no_head(source: SourceModel) -> RecipeError:
    return RecipeError(
        f"retain.kl.on=mlm: {source.spec} has no trained masked-language head",
        "Adapt by mlm first, which warms one for retain.reference=start, or use "
        "retain.kl.on=relational",
    )


def _clip(source: SourceModel) -> Any:
    """The whole CLIP model of a checkpoint, texts and pictures.

    Raises:
        RecipeError: if it is none, or lacks a half.
    """
    from transformers import CLIPModel

    refused = RecipeError(
        f"retain.kl.on=zero_shot: {source.spec} is no CLIP model of texts and pictures",
        "Use a CLIP source, or retain.kl.on=relational",
    )
    if source.model_type != "clip":
        raise refused
    found: Any = CLIPModel.from_pretrained(
        source.folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    clip, told = found
    if told["missing_keys"]:
        raise refused
    return clip
