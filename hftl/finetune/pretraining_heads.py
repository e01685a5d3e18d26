"""Load the heads that a source brings along, and measure what they predict after training.

The heads are the checkpoint's own: masked language, the decoder of masked images, and the classes
it was trained for. Beside them the embeddings by which forgetting is measured.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTMAEConfig

from hftl.adapt.encoder_io import merge_encoder_state
from hftl.adapt.language_model import (
    LanguageModel,
    find_clm_class,
    find_mlm_class,
    load_clm,
    load_mlm,
    load_trained_mlm,
)
from hftl.adapt.mae import load_mae
from hftl.config.adapt import Decoder
from hftl.config.retain import KL
from hftl.data.general import GeneralData
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import get_image_size
from hftl.data.masking import (
    MaskedImageDataset,
    MaskingSpec,
    build_masking_spec,
    collate_masked_blocks,
    collate_masked_images,
    mask_tokens,
)
from hftl.data.normalization import normalize_name
from hftl.data.rows import Row
from hftl.data.splits import hash_row
from hftl.data.text_inputs import EncodedRow, TextInputs
from hftl.errors import HftlError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.models.encoders import get_stock_encoder, get_task_class, has_prefix
from hftl.models.features import batch_by_length, compute_frozen_features, predict_logits
from hftl.models.heads import LoadedModel, build_model, get_source_pooling, load_class
from hftl.models.pairs import load_pair
from hftl.models.pooled_model import PooledModel
from hftl.models.source import SourceModel, load_tokenizer
from hftl.retain.weights import PEFT_WRAPPING
from hftl.runtime import distributed

MASK_PROBABILITY = 0.15
"""The share of tokens that are masked, as in BERT's pre-training."""
MASK_SEED = 0
"""Of the masks that measure forgetting: the same before and after, for every arm and seed."""
BATCH_TOKENS = 2048
BATCH_IMAGES = 64
MAX_NEW_ROWS = 2000
"""Test rows whose embeddings are compared, at most: the first in the order of a hash."""


def load_masked_lm(
    original: ExperimentContext, context: ExperimentContext, seed: int
) -> tuple[LanguageModel, MaskingSpec]:
    """Return the original's masked-LM model with its trained head, and which tokens it masks.

    Args:
        original: the source, adapted or not, whose head it is.
        context: whose rows are masked.
        seed: of the model's new weights; there are none.

    Raises:
        RecipeError: if the head is not trained.
    """
    masked_lm, new_weights = load_mlm(original.source, seed, original.lm_head)
    if new_weights:
        raise _build_no_head_error(original.source, "mlm")
    return masked_lm, _build_masking(context)


def load_causal_lm(original: ExperimentContext, seed: int) -> LanguageModel:
    """Return the original's causal-LM model with its trained head.

    Args:
        original: the source, adapted or not, whose head it is.
        seed: of the model's new weights; there are none.

    Raises:
        RecipeError: if the head is not trained.
    """
    causal_lm, new_weights = load_clm(original.source, seed, original.lm_head)
    if new_weights:
        raise _build_no_head_error(original.source, "clm")
    return causal_lm


def check_pretraining_head(kl: KL, source: SourceModel, has_head: bool, task: str) -> None:
    """Refuse KL on a head that the source does not have.

    Args:
        kl: with `on` mlm, clm or zero_shot.
        source: the checkpoint.
        has_head: True if adaptation trains the reference such a head.
        task: the recipe's.

    Raises:
        RecipeError: naming what is missing; a pair needs its tokenizer, too.
    """
    if kl.on in ("mlm", "clm"):
        find, load = (find_mlm_class, load_mlm) if kl.on == "mlm" else (find_clm_class, load_clm)
        find(source, "retain.kl.on")
        if not has_head and load(source, 0)[1]:
            raise _build_no_head_error(source, kl.on)
        return
    if task != "classification":
        raise RecipeError(
            f"retain.kl.on=zero_shot classifies by class names, and data.task is {task}",
            "Use relational or features",
        )
    load_pair(source, "retain.kl.on=zero_shot")
    load_tokenizer(source)


def _build_no_head_error(source: SourceModel, objective: str) -> RecipeError:
    head = "masked-language" if objective == "mlm" else "causal-language"
    return RecipeError(
        f"retain.kl.on={objective}: {source.name} has no trained {head} head",
        f"Adapt by {objective} first, which trains one for retain.reference=start, or use "
        "retain.kl.on=relational",
    )


def measure_pretraining_heads(
    context: ExperimentContext, trained: LoadedModel
) -> dict[str, np.ndarray]:
    """Return what each of the source's heads predicts on the trained encoder, (rows, 2) float32.

    A row holds the value of a general row that measures forgetting, and the number of elements it
    is a mean of. `mlm_loss`: in nats a masked token; `mae_loss`: the squared error a value of a
    masked patch; `backward`: 1 where the row's class is predicted, else 0. A head that the source
    lacks has no entry. Collective: every process must call it.
    """
    general, source = context.general, (context.original or context).source
    if general is None or source.quantization is not None:
        # Each of them is loaded whole, and takes no weights of 4 bits.
        return {}
    values = {
        "mlm_loss": _score_masked_tokens(context, source, trained),
        "mae_loss": _score_masked_patches(context, source, trained),
        "backward": _score_classifier(context, general, source, trained),
    }
    return {name: value for name, value in values.items() if value is not None}


def find_source_classes(source: SourceModel, general: GeneralData) -> tuple[str, list[str]] | None:
    """Return the control column whose values are all classes of the source, and those classes.

    They are in the order of the source's outputs. None where there is no such column.
    """
    config = source.config
    if config.problem_type == "multi_label_classification":
        return None
    names = [normalize_name(config.id2label[i]) for i in range(config.num_labels)]
    for control in general.controls:
        if set(general.get_control_values(control)) <= set(names):
            return control, names
    return None


def _score_classifier(
    context: ExperimentContext, general: GeneralData, source: SourceModel, trained: LoadedModel
) -> np.ndarray | None:
    """Return which rows the source's own classifier gets right; None where it has none."""
    classes = find_source_classes(source, general)
    if classes is None:
        return None
    control, names = classes
    architecture = source.architecture_spec
    kind = get_task_class(source.config, "classification")
    if kind is None:
        return None
    model, missing = load_class(source, kind, deepcopy(source.config), {})
    in_encoder = [name.removeprefix(f"{architecture.encoder}.") for name in missing]
    if any(not has_prefix(name, architecture.unused_parts) for name in in_encoder):
        return None
    _fill_encoder(get_stock_encoder(model, architecture), trained, architecture.pooler)
    inputs: Any = context.inputs
    if context.prepared.modality == "text":
        inputs = TextInputs(inputs.tokenizer, inputs.max_length)
    model.to(context.device)
    rows = context.encode_rows(general.eval_rows)
    predictions = predict_logits(model, rows, inputs, context.device).argmax(1)
    is_right = np.array(names)[predictions] == general.get_control_values(control)
    return np.stack([is_right, np.ones(len(is_right))], 1).astype(np.float32)


def _score_masked_tokens(
    context: ExperimentContext, source: SourceModel, trained: LoadedModel
) -> np.ndarray | None:
    """Return the loss of the masked-language head at masked tokens; None where it has none."""
    assert context.general is not None
    tokenizer = getattr(context.inputs, "tokenizer", None)
    if tokenizer is None or tokenizer.mask_token_id is None:
        return None
    model = load_trained_mlm(source)
    if model is None:
        return None
    masking, rows = _build_masking(context), []
    for number, encoded in enumerate(context.encode_rows(context.general.eval_rows)):
        ids = np.array(encoded["input_ids"])
        draw = np.random.default_rng([MASK_SEED, number])
        masked, positions = mask_tokens(ids, np.zeros_like(ids), masking, draw)
        rows.append({"input_ids": masked, "positions": positions, "labels": ids[positions]})

    def sum_losses(chosen: list[dict[str, np.ndarray]]) -> Tensor:
        batch = collate_masked_blocks(chosen, tokenizer.pad_token_id)
        batch = {key: value.to(context.device) for key, value in batch.items()}
        labels = batch.pop("labels").reshape(-1)[batch["slots"]]
        losses = F.cross_entropy(model(**batch).logits.float(), labels, reduction="none")
        row_index = batch["flat"] // batch["input_ids"].shape[1]
        parts = torch.stack([losses, torch.ones_like(losses)], 1)
        return losses.new_zeros(len(chosen), 2).index_add(0, row_index, parts)

    source_encoder, model.encoder = model.encoder, trained.encoder
    model.to(context.device).eval()
    lengths = [len(row["input_ids"]) for row in rows]
    means = _average_rows(rows, batch_by_length(lengths, BATCH_TOKENS), sum_losses)
    # The hook that selects positions is then removed from the trained encoder.
    model.encoder = source_encoder
    return means


def _build_masking(context: ExperimentContext) -> MaskingSpec:
    """Return which tokens are masked: one by one, because rows do not say which make up a word."""
    tokenizer = context.inputs.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    return build_masking_spec(tokenizer, MASK_PROBABILITY, False, context.source.config.vocab_size)


def _score_masked_patches(
    context: ExperimentContext, source: SourceModel, trained: LoadedModel
) -> np.ndarray | None:
    """Return the loss of a ViTMAE checkpoint's decoder at masked patches; None for others."""
    inputs, general = context.inputs, context.general
    assert general is not None
    if source.architecture != "vit_mae" or not isinstance(inputs, ImageInputs):
        return None
    config = ViTMAEConfig.from_pretrained(source.folder)
    size, ratio = get_image_size(inputs.processor), config.mask_ratio
    model, new_weights = load_mae(source, size, ratio, Decoder().model_dump(), MASK_SEED)
    if new_weights:
        return None
    _fill_encoder(model.encoder, trained, "pooler")
    model.to(context.device).eval()
    images = [row["pixel_values"] for row in context.encode_rows(general.eval_rows)]
    keys = [hash_row(row) for row in general.eval_rows]
    rows = MaskedImageDataset(images, keys, inputs.patch_size, MASK_SEED, fixed=True)

    def sum_losses(chosen: list[EncodedRow]) -> Tensor:
        batch = collate_masked_images(chosen, inputs, ratio, config.norm_pix_loss)
        batch = {k: v.to(context.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        pixels = batch.pop("labels").flatten(1)
        is_masked = ~pixels.isnan()
        errors = (model(**batch).logits.float().flatten(1) - pixels).square()
        return torch.stack([errors.where(is_masked, 0.0).sum(1), is_masked.sum(1)], 1)

    numbers = list(range(len(rows)))
    batches = [numbers[i : i + BATCH_IMAGES] for i in range(0, len(numbers), BATCH_IMAGES)]
    return _average_rows(rows, batches, sum_losses)


def _average_rows(
    rows: Any, batches: list[list[int]], compute_sums: Callable[[list[Any]], Tensor]
) -> np.ndarray:
    """Return (rows, 2) means and counts, from sums and counts of the rows of each batch.

    Batches are distributed over the processes, and the results gathered.
    """
    local: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for numbers in distributed.shard_items(batches):
            sums = compute_sums([rows[n] for n in numbers]).double().cpu().numpy()
            local.update(zip(numbers, sums, strict=True))
    gathered = {n: sums for part in distributed.gather_values(local) for n, sums in part.items()}
    means = np.stack([gathered[number] for number in range(len(rows))])
    means[:, 0] /= np.maximum(means[:, 1], 1)
    return means.astype(np.float32)


def _fill_encoder(encoder: Any, trained: LoadedModel, pooler: str | None) -> None:
    """Load the trained weights, adapters merged, into an encoder of the source.

    A pooler that the trained encoder lacks stays the source's.
    """
    state = {
        PEFT_WRAPPING.sub("", name): tensor
        for name, tensor in merge_encoder_state(trained).items()
        if ".original_module." not in name
    }
    missing, _ = encoder.load_state_dict(state, strict=False)
    missing = [name for name in missing if pooler is None or not has_prefix(name, (pooler,))]
    if missing:
        raise HftlError(f"the trained encoder lacks {missing[0]!r} of the source's", "Report this")


def select_compared_rows(context: ExperimentContext) -> dict[str, list[Row]]:
    """Return the rows that measure forgetting: `general`, if there are any, and `new`, of test."""
    rows = {} if context.general is None else {"general": context.general.eval_rows}
    return rows | {"new": context.prepared.rows["test"][:MAX_NEW_ROWS]}


def embed_compared_rows(
    context: ExperimentContext, loaded: LoadedModel, test_features: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return embeddings of `select_compared_rows`, and the values of `measure_pretraining_heads`.

    Each is (rows, width) float32. Collective: every process must call it.

    Args:
        context: the rows.
        loaded: the model.
        test_features: the inputs of the last linear layer for all rows of test, where they are
            known; they are not computed again if they are what `embed_rows` returns.
    """
    compared = select_compared_rows(context)
    embeddings: dict[str, np.ndarray] = {}
    if test_features is not None and _embeds_by_features(context, loaded):
        embeddings["new"] = test_features[: len(compared["new"])]
    for part, rows in compared.items():
        if part not in embeddings:
            embeddings[part] = embed_rows(context, loaded, rows)
    return embeddings | measure_pretraining_heads(context, loaded)


def _embeds_by_features(context: ExperimentContext, loaded: LoadedModel) -> bool:
    """Return whether `embed_rows` returns the input of the last linear layer."""
    if context.prepared.modality == "image":
        return loaded.pooling == get_source_pooling(context.source)
    return loaded.pooling == "mean" and type(context.inputs) is TextInputs


def embed_rows(context: ExperimentContext, loaded: LoadedModel, rows: list[Row]) -> np.ndarray:
    """Return a model's embeddings of rows, (rows, width) float32, in eval mode and fp32.

    For a text the mean of the encoder's last hidden states over its tokens, for an image the input
    of the last linear layer under `get_source_pooling`. Collective: every process must call it.
    """
    inputs, model, last = context.inputs, loaded.model, loaded.last_linear
    if context.prepared.modality == "text":
        # Rows of tagged words are embedded as texts, too.
        inputs = TextInputs(inputs.tokenizer, inputs.max_length)  # pyright: ignore
        model = PooledModel(loaded.encoder, "mean", context.source.config.hidden_size, 1)
        last = model.head
    elif not _embeds_by_features(context, loaded):
        # The source is pooled otherwise than this model, which has the same encoder.
        pooled = build_model(
            context.source, "regression", get_source_pooling(context.source), 1, [], 0
        )
        is_own = isinstance(pooled.model, PooledModel)
        setattr(pooled.model, "encoder" if is_own else pooled.architecture.encoder, loaded.encoder)
        model, last = pooled.model, pooled.last_linear
    model.to(context.device)
    encoded = context.encode_rows(rows)
    return np.concatenate(compute_frozen_features(model, last, encoded, inputs, context.device))


def embed_source(
    context: ExperimentContext, seed: int, head_poolings: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Return `embed_compared_rows` of the source as it is.

    Of texts that is what a head on frozen features reads, which a run has of test already. Where
    it was stopped in between, all of test passes again: the last bits of a row's features depend
    on the rows that ran with it.

    Args:
        context: of the source as it is.
        seed: of weights above the encoder that the checkpoint lacks.
        head_poolings: those under which heads on its frozen features have read all of test.
    """
    pooling = get_source_pooling(context.source)
    model = build_model(context.source, "regression", pooling, 1, [], seed)
    if context.prepared.modality == "image" or not _embeds_by_features(context, model):
        return embed_compared_rows(context, model)
    compared = select_compared_rows(context)
    if pooling in head_poolings:
        context.extract_features(pooling, seed, context.prepared.rows["test"])
    embeddings = {
        part: context.extract_features(pooling, seed, rows) for part, rows in compared.items()
    }
    return embeddings | measure_pretraining_heads(context, model)
