"""Build an adaptation: the objective's model, its masked corpus and its guard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

from hftl.adapt import adaptation as training
from hftl.adapt.encoder_io import merge_encoder_state
from hftl.adapt.guard import AdaptationFacts, GuardRule
from hftl.adapt.language_model import find_clm_class, find_mlm_class, load_clm, load_mlm
from hftl.adapt.mae import check_mae_architecture, compute_teacher_features, load_mae
from hftl.analysis.neighbours import NEIGHBOURS
from hftl.config.adapt import DEFAULT_TOLERANCES, Adapt
from hftl.config.recipe import Recipe
from hftl.data import image_inputs as canvases
from hftl.data import masking
from hftl.data.image_inputs import ImageInputs
from hftl.data.image_processing import get_image_size
from hftl.data.masking import MaskedImageDataset
from hftl.data.masking import collate_masked_images as collate_pictures
from hftl.data.next_tokens import NextTokenBlocks
from hftl.data.text_inputs import EncodedRow
from hftl.errors import DataError, RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.guard_metrics import build_neighbour_agreement, build_probe_score
from hftl.models.source import SourceModel, load_tokenizer
from hftl.pipeline.corpora import GENERAL_SAMPLE, Corpus, load_canvases
from hftl.plurals import choose_verb, count_noun
from hftl.train.steps import warn_of_long_warmup

MIN_STEPS = 10
"""Steps below which an adaptation hardly moves the encoder."""
MIN_HELD_OUT = 10
"""Rows below which the held-out loss says little."""
HELD_OUT_ROWS = 256
"""Blocks or pictures that a held-out loss is taken on, at most."""


def check_objective(stage: Adapt, source: SourceModel) -> None:
    """Refuse an objective that the source does not support.

    Raises:
        RecipeError: naming the architecture, or what the tokenizer lacks or has too much.
    """
    if stage.objective == "mae":
        check_mae_architecture(source)
    elif stage.objective == "clm":
        find_clm_class(source)
        tokenizer = load_tokenizer(source)
        if tokenizer.eos_token_id is None:
            raise RecipeError(
                f"source.model: the tokenizer of {source.name} has no token that ends a text, and "
                "adapt.objective=clm separates documents by it",
                "Set eos_token in its tokenizer_config.json",
            )
        _check_embedded(source, tokenizer)
    else:
        find_mlm_class(source)
        tokenizer = load_tokenizer(source)
        masking.build_masking_spec(tokenizer, stage.masked_share, stage.whole_words)
        _check_embedded(source, tokenizer)


def _check_embedded(source: SourceModel, tokenizer: Any) -> None:
    """Refuse a tokenizer with more tokens than the model embeds."""
    tokens, embedded = max(tokenizer.get_vocab().values()) + 1, source.config.vocab_size
    if tokens > embedded:
        raise RecipeError(
            f"source.model: the tokenizer of {source.name} has {tokens} tokens, and the model "
            f"embeds {embedded}, so that adaptation may meet tokens without an embedding",
            "Save the source model with embeddings for all tokens (resize_token_embeddings), "
            "or with its own tokenizer",
        )


def build_objective(
    context: ExperimentContext, plain: ExperimentContext, stage: Adapt, seed: int, head: Path | None
) -> tuple[Any, tuple[str, ...]]:
    """Build the model of an objective; return it and the names of its untrained head's modules.

    Args:
        context: the source, or what an earlier adaptation has made of it.
        plain: the source as it is, whose decoder it is.
        stage: the recipe's section.
        seed: of what the source lacks.
        head: a file of the head's weights, where it was trained before.
    """
    if stage.objective == "mlm":
        return load_mlm(context.source, seed, head)
    if stage.objective == "clm":
        return load_clm(context.source, seed, head)
    assert isinstance(context.inputs, ImageInputs)
    side = get_image_size(context.inputs.processor)
    model, fresh = load_mae(
        context.source, side, stage.masked_share, stage.decoder.model_dump(), seed, head,
        plain.source,
    )  # fmt: skip
    model.distill = stage.distill
    return model, fresh


def build_guard_rule(recipe: Recipe, stage: Adapt, first: AdaptationFacts | None) -> GuardRule:
    """Return the guard that the recipe names, else the strongest that its data allow."""
    guard = stage.guard
    if guard is None:
        guard = "neighbours" if recipe.data.task is None else "probe"
    tolerance = DEFAULT_TOLERANCES[guard] if stage.tolerance is None else stage.tolerance
    probed, masked = guard == "probe", stage.objective == "mae"
    same = first is not None and first.guard == guard and guard != "off"
    return GuardRule(
        guard, tolerance, origin=first.history[0].guard if first and same else None,
        by_guard=masked and probed,
        relative=probed and recipe.data.task == "regression" or masked and guard == "general",
    )  # fmt: skip


def build_guard_metric(
    recipe: Recipe, context: ExperimentContext, rule: GuardRule, corpus: Corpus, model: Any
) -> Callable[[], float] | None:
    """Return the function that the guard calls at every evaluation; None where it needs none."""
    finetune = recipe.finetune
    if rule.guard == "probe":
        seed = recipe.data.seed
        return build_probe_score(
            context, finetune.pooling, seed, lambda: merge_encoder_state(model)
        )
    if rule.guard != "neighbours":
        return None
    encoded = _encode_neighbour_rows(context, corpus)
    return build_neighbour_agreement(
        context, encoded, recipe.data.seed, lambda: merge_encoder_state(model)
    )


def _encode_neighbour_rows(context: ExperimentContext, corpus: Corpus) -> list[EncodedRow]:
    """Return the rows whose neighbours the guard looks at.

    Raises:
        DataError: if they are too few to have neighbours.
    """
    rows = corpus.general if corpus.general is not None else corpus.held_out
    if isinstance(context.inputs, ImageInputs):
        encoded: list[EncodedRow] = [
            {"pixel_values": picture} for picture in load_canvases(context, rows)
        ]
    else:
        ids = [rows[i][0].tolist() for i in _spread_indices(len(rows), GENERAL_SAMPLE)]
        encoded = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    if len(encoded) <= NEIGHBOURS:
        raise DataError(
            f"adapt.guard=neighbours looks at {NEIGHBOURS} neighbours of each row, and only "
            f"{count_noun(len(encoded), 'row')} {choose_verb(len(encoded), 'is')} held out",
            "Give data.general, a larger adapt.held_out, or another guard",
        )
    return encoded


def list_adaptation_warnings(stage: Adapt, rows: int, held_out: int) -> list[str]:
    """Return warnings of too few steps, for a warm-up or at all, and of too few rows that the
    weights are chosen by.

    Args:
        stage: the recipe's section.
        rows: blocks or pictures that train.
        held_out: blocks or pictures that the loss is measured on.
    """
    warnings: list[str] = []
    steps = training.count_steps(stage, rows)
    unit = "picture" if stage.objective == "mae" else "block"
    if steps < MIN_STEPS:
        warnings.append(
            f"adapt: {stage.objective} {stage.method} has {count_noun(steps, 'optimizer step')}, "
            "too few to learn a domain; give a larger corpus, more "
            "adapt.training.num_train_epochs, or a smaller per_device_train_batch_size"
        )
    what = f"{stage.objective} {stage.method}"
    warnings += warn_of_long_warmup(stage.training, steps, "adapt", what)
    if held_out < MIN_HELD_OUT:
        warnings.append(
            f"adapt: {count_noun(held_out, unit)} {choose_verb(held_out, 'is')} held out, too few "
            "to choose weights by; give a larger corpus or adapt.held_out"
        )
    return warnings


def check_corpus(recipe: Recipe, context: ExperimentContext, stage: Adapt, corpus: Corpus) -> None:
    """Refuse a corpus that the objective or the guard cannot measure on.

    Raises:
        DataError: if too few rows are held out for the guard.
        RecipeError: if no token of what is held out is hidden.
    """
    if stage.objective != "mae":
        _build_text_task(context, stage, corpus, recipe.data.seed)
    if build_guard_rule(recipe, stage, None).guard == "neighbours":
        _encode_neighbour_rows(context, corpus)


def build_adaptation_task(
    context: ExperimentContext, plain: ExperimentContext, stage: Adapt, corpus: Corpus, seed: int
) -> training.AdaptationData:
    """Return the masked corpus of an objective: masked anew in every epoch, in evaluation always
    alike."""
    if stage.objective != "mae":
        return _build_text_task(context, stage, corpus, seed)
    return _build_image_task(context, plain, stage, corpus, seed)


def _build_text_task(
    context: ExperimentContext, stage: Adapt, corpus: Corpus, seed: int
) -> training.AdaptationData:
    tokenizer: Any = context.inputs.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    pad_id = tokenizer.pad_token_id

    def predicted(blocks: Any, fixed: bool) -> Any:
        if stage.objective == "clm":
            return NextTokenBlocks(blocks, pad_id)
        masks = masking.build_masking_spec(tokenizer, stage.masked_share, stage.whole_words)
        return masking.MaskedBlocks(blocks, masks, seed, pad_id, fixed)

    def held(blocks: Any) -> Subset[Any]:
        rows = Subset(predicted(blocks, True), _spread_indices(len(blocks), HELD_OUT_ROWS))
        check_something_is_hidden(rows, stage)
        return rows

    return training.AdaptationData(
        predicted(corpus.train, False),
        held(corpus.held_out),
        None if corpus.general is None else held(corpus.general),
        lambda rows: masking.collate_masked_blocks(rows, tokenizer.pad_token_id),
    )


def check_something_is_hidden(rows: Subset[Any], stage: Adapt) -> None:
    """Refuse blocks of which no token is to be predicted: they have no loss.

    Raises:
        RecipeError: naming `adapt.mask_ratio`.
    """
    if stage.objective != "mlm":
        return
    if not any(len(rows[i]["positions"]) for i in range(len(rows))):
        raise RecipeError(
            f"adapt.mask_ratio={stage.masked_share} hides no token of the texts that the loss is "
            "measured on",
            "Use a larger share, such as 0.15, or give more text",
        )


def _build_image_task(
    context: ExperimentContext, plain: ExperimentContext, stage: Adapt, corpus: Corpus, seed: int
) -> training.AdaptationData:
    inputs = context.inputs
    assert isinstance(inputs, ImageInputs)
    canvases_of_train = load_canvases(context, corpus.train)
    teacher = None
    if stage.distill:
        original, _ = build_objective(plain, plain, stage, seed, None)
        teacher = compute_teacher_features(
            original.to(context.device), canvases_of_train, inputs
        ).numpy()
    change = None
    if context.augment:
        change = lambda row, epoch, key: canvases.augment_image(row, seed, epoch, key)  # noqa: E731

    def hidden(names: list[str], fixed: bool, **more: Any) -> MaskedImageDataset:
        keys = [name.encode() for name in names]
        return MaskedImageDataset(
            load_canvases(context, names), keys, inputs.patch_size, seed, fixed=fixed, **more
        )

    return training.AdaptationData(
        hidden(corpus.train, False, change=change, teacher=teacher),
        hidden(corpus.held_out[:HELD_OUT_ROWS], True),
        None if corpus.general is None else hidden(corpus.general[:HELD_OUT_ROWS], True),
        lambda rows: collate_pictures(rows, inputs, stage.masked_share, stage.norm_pix_loss),
    )


def _spread_indices(rows: int, count: int) -> list[int]:
    """Return `count` row indices, evenly spread."""
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).round().astype(int)).tolist()
