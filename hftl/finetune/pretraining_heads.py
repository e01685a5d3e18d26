"""KL on heads that the source brings along: its masked-language head, or CLIP's named classes."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTMAEConfig

from hftl.adapt.encoder_io import merge_encoder_state
from hftl.adapt.mae import load_mae
from hftl.adapt.masked_patches import MaskedImageDataset
from hftl.adapt.masked_patches import collate_masked_images as collate_pictures
from hftl.adapt.mlm import MaskedTokenKL, load_mlm, load_trained_mlm
from hftl.config.adapt import Decoder
from hftl.config.retain import KL
from hftl.data.general import GeneralData
from hftl.data.image_processing import ImageInputs, get_image_size
from hftl.data.load import Row
from hftl.data.masking import build_masking_spec, collate_masked_blocks, mask_tokens
from hftl.data.normalization import normalize_name
from hftl.data.splits import hash_row
from hftl.data.text import TextInputs
from hftl.errors import HftlError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.models.encoders import get_stock_encoder, get_task_class, has_prefix
from hftl.models.features import batch_by_length, compute_frozen_features, predict_logits
from hftl.models.heads import LoadedModel, PooledModel, build_model, load_class
from hftl.models.source import SourceModel, load_tokenizer
from hftl.retain.kl import ZeroShotKL, build_zero_shot_head
from hftl.retain.weights import PEFT_WRAPPING
from hftl.runtime import distributed

MASK_PROBABILITY = 0.15
"""The share of tokens that are hidden, as in BERT's pre-training."""


def build_head_regularizer(
    bench: ExperimentContext, kl: KL, seed: int, before: ExperimentContext | None = None
) -> MaskedTokenKL | ZeroShotKL:
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
        clip = _load_clip(bench.source)
        names = bench.prepared.names
        head = build_zero_shot_head(clip, load_tokenizer(bench.source), names)
        return ZeroShotKL(kl.weight, head, *how)
    held = bench if before is None else before
    masked, fresh = load_mlm(held.source, seed, held.mlm_head)
    if fresh:
        raise _build_no_head_error(held.source)
    # The rows of a batch are told token by token, so no word is known as a whole.
    tokenizer = bench.inputs.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    masking = build_masking_spec(tokenizer, MASK_PROBABILITY, False, bench.source.config.vocab_size)
    return MaskedTokenKL(kl.weight, masked, masking, seed, *how, apart=before is not None)


def check_pretraining_head(kl: KL, source: SourceModel, warmed: bool, task: str) -> None:
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
            raise _build_no_head_error(source)
        return
    if task != "classification":
        raise RecipeError(
            f"retain.kl.on=zero_shot tells classes by their names, and data.task is {task}",
            "Use relational or features",
        )
    _load_clip(source)
    load_tokenizer(source)


def _build_no_head_error(source: SourceModel) -> RecipeError:
    return RecipeError(
        f"retain.kl.on=mlm: {source.name} has no trained masked-language head",
        "Adapt by mlm first, which warms one for retain.reference=start, or use "
        "retain.kl.on=relational",
    )


def _load_clip(source: SourceModel) -> Any:
    """The whole CLIP model of a checkpoint, texts and pictures.

    Raises:
        RecipeError: if it is none, or lacks a half.
    """
    from transformers import CLIPModel

    refused = RecipeError(
        f"retain.kl.on=zero_shot: {source.name} is no CLIP model of texts and pictures",
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


# What the source's own heads still make of general rows, on an encoder that has been trained on.
#
# The heads are the checkpoint's, as it has them: that of masked language, the decoder of masked
# images, and the one of the classes that it was trained for. What it lacks is not asked.


MASK_SEED = 0
"""Of what is hidden: the same before and after, for every arm and seed."""
BATCH_TOKENS = 2048
BATCH_IMAGES = 64


def measure_pretraining_heads(
    bench: ExperimentContext, built: LoadedModel
) -> dict[str, np.ndarray]:
    """(rows, 2) float32 for each of the source's heads: of each measured general row a value, and
    how many it is a mean of.

    `mlm_loss`: in nats a hidden token; `mae_loss`: the squared error a value of a hidden patch;
    `backward`: 1 where the row's class is told right, else 0. Every process must come here.
    """
    general, source = bench.general, (bench.original or bench).source
    if general is None:
        return {}
    found = {
        "mlm_loss": _score_masked_tokens(bench, source, built),
        "mae_loss": _score_masked_patches(bench, source, built),
        "backward": _score_classifier(bench, general, source, built),
    }
    return {name: told for name, told in found.items() if told is not None}


def find_source_classes(source: SourceModel, general: GeneralData) -> tuple[str, list[str]] | None:
    """The control whose values are all among the classes that the source tells, and those classes
    in the order of its outputs; None where there is none."""
    config = source.config
    if config.problem_type == "multi_label_classification":
        return None
    names = [normalize_name(config.id2label[i]) for i in range(config.num_labels)]
    for control in general.controls:
        if set(general.get_control_values(control)) <= set(names):
            return control, names
    return None


def _score_classifier(
    bench: ExperimentContext, general: GeneralData, source: SourceModel, built: LoadedModel
) -> np.ndarray | None:
    """Which rows the source's own classifier gets right."""
    known = find_source_classes(source, general)
    if known is None:
        return None
    control, names = known
    kind = get_task_class(source.config, "classification")
    model, missing = load_class(source, kind, deepcopy(source.config), {})
    encoder, architecture = get_stock_encoder(model, source.architecture_spec), source.architecture_spec
    if any(
        not has_prefix(n.removeprefix(f"{architecture.encoder}."), architecture.unused_parts) for n in missing
    ):
        return None
    _fill_encoder(encoder, built, architecture.pooler)
    inputs: Any = bench.inputs
    if bench.prepared.modality == "text":
        inputs = TextInputs(inputs.tokenizer, inputs.max_length)
    model.to(bench.device)
    told = predict_logits(model, bench.encode_rows(general.eval_rows), inputs, bench.device).argmax(
        1
    )
    right = np.array(names)[told] == general.get_control_values(control)
    return np.stack([right, np.ones(len(right))], 1).astype(np.float32)


def _score_masked_tokens(
    bench: ExperimentContext, source: SourceModel, built: LoadedModel
) -> np.ndarray | None:
    """The loss of the masked-language head at hidden tokens."""
    assert bench.general is not None
    tokenizer = getattr(bench.inputs, "tokenizer", None)
    if tokenizer is None or tokenizer.mask_token_id is None:
        return None
    model = load_trained_mlm(source)
    if model is None:
        return None
    masking = build_masking_spec(tokenizer, MASK_PROBABILITY, False, bench.source.config.vocab_size)
    rows = []
    for number, encoded in enumerate(bench.encode_rows(bench.general.eval_rows)):
        ids = np.array(encoded["input_ids"])
        draw = np.random.default_rng([MASK_SEED, number])
        shown, positions = mask_tokens(ids, np.zeros_like(ids), masking, draw)
        rows.append({"input_ids": shown, "positions": positions, "labels": ids[positions]})

    def losses(chosen: list[dict[str, Any]]) -> Tensor:
        batch = {
            k: v.to(bench.device)
            for k, v in collate_masked_blocks(chosen, tokenizer.pad_token_id).items()
        }
        told = batch.pop("labels").reshape(-1)[batch["slots"]]
        each = F.cross_entropy(model(**batch).logits.float(), told, reduction="none")
        of_row = batch["flat"] // batch["input_ids"].shape[1]
        parts = torch.stack([each, torch.ones_like(each)], 1)
        return each.new_zeros(len(chosen), 2).index_add(0, of_row, parts)

    own, model.encoder = model.encoder, built.encoder
    model.to(bench.device).eval()
    lengths = [len(row["input_ids"]) for row in rows]
    found = _average_rows(rows, batch_by_length(lengths, BATCH_TOKENS), losses)
    # The hook that picks places leaves the trained encoder with the head.
    model.encoder = own
    return found


def _score_masked_patches(
    bench: ExperimentContext, source: SourceModel, built: LoadedModel
) -> np.ndarray | None:
    """The loss of a ViTMAE checkpoint's decoder at hidden patches."""
    inputs, general = bench.inputs, bench.general
    assert general is not None
    if source.architecture != "vit_mae" or not isinstance(inputs, ImageInputs):
        return None
    config = ViTMAEConfig.from_pretrained(source.folder)
    side, ratio = get_image_size(inputs.processor), config.mask_ratio
    model, fresh = load_mae(source, side, ratio, Decoder().model_dump(), MASK_SEED)
    if fresh:
        return None
    _fill_encoder(model.encoder, built, "pooler")
    model.to(bench.device).eval()
    pictures = [row["pixel_values"] for row in bench.encode_rows(general.eval_rows)]
    keys = [hash_row(row) for row in general.eval_rows]
    hidden = MaskedImageDataset(pictures, keys, inputs.patch_size, MASK_SEED, fixed=True)

    def losses(chosen: list[dict[str, Any]]) -> Tensor:
        batch = collate_pictures(chosen, inputs, ratio, config.norm_pix_loss)
        batch = {k: v.to(bench.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        told = batch.pop("labels").flatten(1)
        there = ~told.isnan()
        each = (model(**batch).logits.float().flatten(1) - told).square().where(there, 0.0)
        return torch.stack([each.sum(1), there.sum(1)], 1)

    numbers = list(range(len(hidden)))
    batches = [numbers[i : i + BATCH_IMAGES] for i in range(0, len(numbers), BATCH_IMAGES)]
    return _average_rows(hidden, batches, losses)


def _average_rows(
    rows: Any, batches: list[list[int]], sums: Callable[[list[Any]], Tensor]
) -> np.ndarray:
    """(rows, 2) means and counts, from sums and counts of the rows of each batch; the batches are
    shared among the processes."""
    mine: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for numbers in distributed.shard_items(batches):
            told = sums([rows[n] for n in numbers]).double().cpu().numpy()
            mine.update(zip(numbers, told, strict=True))
    whole = {
        number: told for part in distributed.gather_values(mine) for number, told in part.items()
    }
    found = np.stack([whole[number] for number in range(len(rows))])
    found[:, 0] /= np.maximum(found[:, 1], 1)
    return found.astype(np.float32)


def _fill_encoder(encoder: Any, built: LoadedModel, pooler: str | None) -> None:
    """Puts the trained weights into an encoder of the source, adapters merged; a pooler that the
    trained one does without stays."""
    state = {
        PEFT_WRAPPING.sub("", name): tensor
        for name, tensor in merge_encoder_state(built).items()
        if ".original_module." not in name
    }
    missing, _ = encoder.load_state_dict(state, strict=False)
    lost = [name for name in missing if pooler is None or not has_prefix(name, (pooler,))]
    if lost:
        raise HftlError(f"the trained encoder lacks {lost[0]!r} of the source's", "Report this")


# Where rows lie in an encoder's space, from which it is told what the encoder has forgotten.


MAX_NEW_ROWS = 2000
"""Test rows that are compared, at most; they stand in the order of a hash."""


def select_compared_rows(bench: ExperimentContext) -> dict[str, list[Row]]:
    """The rows: `general`, those of general data that measure, if any, and `new`, those of test."""
    new = bench.prepared.rows["test"][:MAX_NEW_ROWS]
    return (
        {"new": new} if bench.general is None else {"general": bench.general.eval_rows, "new": new}
    )


def embed_compared_rows(bench: ExperimentContext, built: LoadedModel) -> dict[str, np.ndarray]:
    """(rows, width) float32 for each part of `select_compared_rows`, see `embed_rows`; and what the source's
    own heads say, see `measure_pretraining_heads`."""
    found = {
        part: embed_rows(bench, built, rows) for part, rows in select_compared_rows(bench).items()
    }
    return found | measure_pretraining_heads(bench, built)


def embed_rows(bench: ExperimentContext, built: LoadedModel, rows: list[Row]) -> np.ndarray:
    """(rows, width) float32, in eval mode and fp32.

    Of a text the mean of the encoder's last hidden states over its tokens, of a picture what the
    last linear layer sees. Every process must come here.
    """
    inputs, model, last = bench.inputs, built.model, built.last_linear
    if bench.prepared.modality == "text":
        # Words that are tagged one by one make up a text here, too.
        inputs = TextInputs(inputs.tokenizer, inputs.max_length)  # pyright: ignore
        model = PooledModel(built.encoder, "mean", bench.source.config.hidden_size, 1)
        last = model.head
    model.to(bench.device)
    found = compute_frozen_features(model, last, bench.encode_rows(rows), inputs, bench.device)
    return np.concatenate(found)


def embed_source(bench: ExperimentContext, seed: int) -> dict[str, np.ndarray]:
    """The same of the source as it is.

    Args:
        bench: the source as it is, and the rows.
        seed: of weights above the encoder that the checkpoint lacks.
    """
    pooling = "mean" if bench.prepared.modality == "text" else "native"
    return embed_compared_rows(bench, build_model(bench.source, "regression", pooling, 1, [], seed))
