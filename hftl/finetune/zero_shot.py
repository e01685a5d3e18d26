"""Classify without labels: compare each input with words for the classes, as the source can.

A source with an entailment head is asked whether a text entails a hypothesis of each class (Yin et
al. 2019, arXiv:1909.00161); where several may hold, each is weighed against its contradiction. A
vision-language source is asked how likely each class is as the answer to its prompt. Both are
passes for each row and class, and no head. Other sources compare embeddings: a class is the
direction of its prompts' embeddings, and a linear head holds all of them. Pairs of an image and a
text encoder embed the prompts by their text half, which the model with that head no longer needs.
"""

from collections.abc import Mapping
from copy import deepcopy

import numpy as np
import torch

from hftl.config.finetune import Finetune
from hftl.config.recipe import Arm, Recipe
from hftl.data.labels import NUMERIC_TAG, check_label_keys
from hftl.data.prompted_inputs import PromptedInputs
from hftl.data.rows import Row
from hftl.data.splits import MEASURED_SPLITS
from hftl.errors import RecipeError
from hftl.finetune.context import ExperimentContext
from hftl.finetune.strategies import ZERO_SHOT_ARM
from hftl.models.encoders import get_task_class
from hftl.models.features import predict_logits
from hftl.models.heads import LoadedModel, TargetScale, load_class
from hftl.models.likelihood import (
    compute_likelihoods,
    load_language_model,
    tokenize_answers,
)
from hftl.models.pairs import (
    EMBEDDING,
    EMBEDDING_SCALE,
    PAIRS,
    embed_texts,
    get_scale_and_bias,
    load_pair,
)
from hftl.models.source import SourceModel, load_tokenizer
from hftl.retain.pretraining_kl import ZeroShotHead
from hftl.runtime.run_folder import fingerprint

PHOTO_TEMPLATE = "a photo of a {}."
"""That of CLIP's paper, for pictures."""
ENTAILMENT_TEMPLATE = "This example is {}."
"""That of transformers' zero-shot pipeline."""
WORDS_TEMPLATE = "{}"
"""Sentence encoders compare texts of any form, so that the words stand alone."""
Prompts = dict[str, list[str]]
"""The texts that stand for each class, by label."""


def build_start_model(
    context: ExperimentContext, finetune: Finetune, seed: int, scale: TargetScale | None = None
) -> LoadedModel:
    """Return the model that a training starts from, its head as `head_init` says. Collective.

    Args:
        context: what all arms share.
        finetune: the recipe's section.
        seed: of the training rows that the probe reads, and of weights that are drawn.
        scale: of targets, where the head is one of standardized targets.
    """
    if finetune.head_init == "probe":
        weights = finetune.class_weight
        return context.build_probed_model(finetune.pooling, seed, scale, weights)
    if finetune.head_init == ZERO_SHOT_ARM:
        return build_zero_shot_model(context, finetune, seed)
    return context.build_model(finetune.pooling, seed)


def build_zero_shot_model(context: ExperimentContext, finetune: Finetune, seed: int) -> LoadedModel:
    """Return a new model whose head compares embeddings with those of the classes. Collective."""
    built = context.build_model(get_embedding_pooling(context, finetune), seed)
    prompts = list_prompts(context, finetune)
    if context.prepared.modality == "image":
        weight, bias = _embed_classes_by_pair(context, prompts)
    else:
        weight, bias = _embed_classes(context, prompts, built.pooling, seed), 0.0
        weight = weight / finetune.zero_shot.temperature
    with torch.no_grad():
        built.last_linear.weight.copy_(torch.from_numpy(weight))
        built.last_linear.bias.fill_(bias)
    return built


def get_embedding_pooling(context: ExperimentContext, finetune: Finetune) -> str:
    """Return how an input becomes an embedding: a text as the recipe pools, or by the mean."""
    if context.prepared.modality == "image":
        return EMBEDDING
    return "mean" if finetune.pooling == "native" else finetune.pooling


def list_prompts(context: ExperimentContext, finetune: Finetune) -> Prompts:
    """Return the texts that stand for each class of the task."""
    template = WORDS_TEMPLATE
    if context.source.model_type in PAIRS:
        template = PHOTO_TEMPLATE
    elif find_entailment_output(context.source) is not None:
        template = ENTAILMENT_TEMPLATE
    return {
        label: finetune.zero_shot.list_prompts(label, words, template)
        for label, words in context.label_words.items()
    }


def _embed_classes(
    context: ExperimentContext, prompts: Prompts, pooling: str, seed: int
) -> np.ndarray:
    """Return each class's direction over the mean length of prompts, (classes, width) float32.

    Logits are then cosines, but for a text's own length relative to that mean: the head stays
    linear in the pooled tokens, and a text's nearest class is that of the cosines.
    """
    texts = [text for texts in prompts.values() for text in texts]
    rows = [Row((text,), "", None, i, "finetune.zero_shot") for i, text in enumerate(texts)]
    embeddings = context.extract_features(pooling, seed, rows)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return average_directions(embeddings / lengths, prompts) / lengths.mean()


def _embed_classes_by_pair(
    context: ExperimentContext, prompts: Prompts
) -> tuple[np.ndarray, float]:
    """Return weight and bias by which the head's logits are the pair's own."""
    pair = load_pair(context.source, "zero_shot")
    texts = [text for texts in prompts.values() for text in texts]
    embeddings = embed_texts(pair, load_tokenizer(context.source), texts).numpy()
    scale, bias = get_scale_and_bias(pair)
    return average_directions(embeddings, prompts) * (scale / EMBEDDING_SCALE), bias


def load_zero_shot_head(context: ExperimentContext, finetune: Finetune) -> ZeroShotHead:
    """Return the pair's own classifier of the task's classes, for KL.

    Raises:
        RecipeError: if the source is no whole pair.
    """
    pair, prompts = (
        load_pair(context.source, "retain.kl.on=zero_shot"),
        list_prompts(context, finetune),
    )
    texts = [text for texts in prompts.values() for text in texts]
    embeddings = embed_texts(pair, load_tokenizer(context.source), texts).numpy()
    projection = deepcopy(getattr(pair, "visual_projection", None)) or torch.nn.Identity()
    directions = torch.from_numpy(average_directions(embeddings, prompts))
    return ZeroShotHead(projection, directions, *get_scale_and_bias(pair)).requires_grad_(False)


def average_directions(embeddings: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Return the mean embedding of each class's prompts at length 1, (classes, width) float32.

    Each prompt counts with length 1, too (Radford et al. 2021, arXiv:2103.00020, section 3.1.4).

    Args:
        embeddings: (prompts of all classes in their order, width), of length 1.
        prompts: by class.
    """
    counts = [len(texts) for texts in prompts.values()]
    means = np.stack([part.mean(0) for part in np.split(embeddings, np.cumsum(counts)[:-1])])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def find_entailment_output(source: SourceModel) -> int | None:
    """Return the number of the output that says a text entails another; None where none does."""
    return _find_output(source, ("entail",))


def find_contradiction_output(source: SourceModel) -> int | None:
    """Return the number of the output that says a text does not entail another; None without."""
    return _find_output(source, ("contradict", "not_entail"))


def _find_output(source: SourceModel, starts: tuple[str, ...]) -> int | None:
    if source.architecture_spec.modality == "image":
        return None
    names: Mapping[int, str] = source.config.id2label or {}
    return next((i for i, name in names.items() if str(name).lower().startswith(starts)), None)


def scores_every_class(source: SourceModel) -> bool:
    """Return whether zero-shot classification takes a pass for each class, and makes no head."""
    return source.architecture_spec.reads_prompt or find_entailment_output(source) is not None


def count_hypotheses(context: ExperimentContext, arm: Arm) -> int:
    """Count the passes that each row takes in an arm that scores every class; 0 in others."""
    if arm.strategy != ZERO_SHOT_ARM or not scores_every_class(context.source):
        return 0
    return sum(map(len, list_prompts(context, arm.finetune).values()))


def score_classes(context: ExperimentContext, prompts: Prompts) -> dict[str, np.ndarray]:
    """Return by split how strongly each row entails each class, or how likely it answers with it.

    (rows, classes); the logits of a class's prompts are averaged. Nothing depends on the seed, and
    it costs a pass for each row and prompt: all seeds share one.
    """
    key = fingerprint(prompts)
    if key not in context.class_scores:
        measure = _measure_entailment
        if context.reads_prompt:
            measure = _measure_likelihood
        context.class_scores[key] = {
            split: average_scores(measure(context, split, prompts), prompts)
            for split in MEASURED_SPLITS
        }
    return context.class_scores[key]


def average_scores(scores: np.ndarray, prompts: Prompts) -> np.ndarray:
    """Return (rows, classes) of (rows, prompts of all classes in their order)."""
    ends = np.cumsum([len(texts) for texts in prompts.values()])
    return np.stack([part.mean(1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)


def _measure_likelihood(context: ExperimentContext, split: str, prompts: Prompts) -> np.ndarray:
    """Return the log-likelihood of every class's texts as answers, (rows, prompts)."""
    inputs = context.inputs
    assert isinstance(inputs, PromptedInputs)
    texts = [text for texts in prompts.values() for text in texts]
    model = load_language_model(context.source).to(context.device)
    encoded = context.encode_rows(context.prepared.rows[split])
    answers = tokenize_answers(inputs, texts)
    return compute_likelihoods(model, encoded, answers, inputs, context.device)


def _measure_entailment(context: ExperimentContext, split: str, prompts: Prompts) -> np.ndarray:
    """Return the entailment logit of every row and hypothesis, (rows, prompts).

    Where several classes may hold it is that over contradiction, so that its sigmoid is the
    probability of one of the two.
    """
    model = _load_entailment_model(context.source).to(context.device)
    output = find_entailment_output(context.source)
    against = None
    if context.prepared.task == "multi-label":
        against = find_contradiction_output(context.source)
    columns = []
    for hypothesis in (text for texts in prompts.values() for text in texts):
        rows = [
            Row((*row.content, hypothesis), "", None, row.index, row.where)
            for row in context.prepared.rows[split]
        ]
        encoded = context.inputs.encode(rows)
        logits = predict_logits(model, encoded, context.inputs, context.device)
        columns.append(logits[:, output] - (0 if against is None else logits[:, against]))
    return np.stack(columns, axis=1)


def _load_entailment_model(source: SourceModel) -> torch.nn.Module:
    """Return the source with its own classifier.

    Raises:
        RecipeError: if the checkpoint lacks weights of it.
    """
    kind = get_task_class(source.config, "classification")
    model, missing = load_class(source, kind, deepcopy(source.config), {})
    if missing:
        raise RecipeError(
            f"source.model: the config of {source.name} names a class 'entailment', and its "
            f"weights lack {min(missing)}",
            "Give the whole checkpoint, with its classifier",
        )
    return model


# Before anything trains.


def check_zero_shot(recipe: Recipe, context: ExperimentContext) -> None:
    """Refuse arms that the source cannot classify for without labels, or classes without words.

    Raises:
        RecipeError: naming the arm's key, and what to do.
    """
    for number, arm in enumerate(recipe.arms):
        if not arm.reads_class_words:
            continue
        try:
            _check_arm(arm, context, is_own=number == 0)
        except RecipeError as error:
            if number == 0:
                raise
            raise RecipeError(f"measure.arms.{arm.name}: {error.what}", error.fix) from None


def _check_arm(arm: Arm, context: ExperimentContext, is_own: bool) -> None:
    descriptions = arm.finetune.zero_shot.descriptions
    check_label_keys(descriptions, context.prepared.names, "finetune.zero_shot.descriptions")
    _check_class_words(arm, context)
    is_arm = arm.strategy == ZERO_SHOT_ARM
    if not is_arm and not arm.starts_zero_shot:
        return
    needs_head = arm.starts_zero_shot or is_own
    if context.prepared.task == "multi-label":
        _check_contradiction(context.source)
    if context.reads_prompt:
        _check_answers(arm, context, needs_head)
    elif context.prepared.modality == "image":
        _check_pair(arm, context.source, needs_head)
    elif find_entailment_output(context.source) is not None:
        _check_entailment(arm, context, needs_head)
    elif needs_head and arm.finetune.pooling == "native":
        raise RecipeError(
            "a zero-shot head compares pooled tokens with words for classes, and "
            "finetune.pooling=native has layers between them",
            "Set finetune.pooling=mean, or cls where the source was trained to compare that token",
        )


def _check_contradiction(source: SourceModel) -> None:
    """Refuse several labels at once for a source that does not say which of them do not hold."""
    if None in (find_entailment_output(source), find_contradiction_output(source)):
        raise RecipeError(
            "zero-shot classification into several labels weighs each label's entailment against "
            f"its contradiction, and {source.name} ({source.architecture}) has no head of both: "
            "a similarity to words does not say from where on a label holds",
            "Use a source with an entailment head, as MoritzLaurer/deberta-v3-base-zeroshot-v2.0, "
            "or leave zero_shot out",
        )


def _check_class_words(arm: Arm, context: ExperimentContext) -> None:
    """Refuse classes whose only words are a number, and classes of the same words."""
    descriptions = arm.finetune.zero_shot.descriptions
    numbers = [
        label
        for label, words in context.label_words.items()
        if label not in descriptions and NUMERIC_TAG.fullmatch(words.replace(" ", "_"))
    ]
    if numbers:
        example = ", ".join(f"{label}: ..." for label in numbers[:3])
        raise RecipeError(
            "zero-shot classification compares inputs with words for the classes, and the labels "
            f"are numbers without words: {', '.join(numbers[:3])}",
            f"Say what they mean: data.label_names: {{{example}}}",
        )
    first_of: dict[frozenset[str], str] = {}
    for label, texts in list_prompts(context, arm.finetune).items():
        other = first_of.setdefault(frozenset(texts), label)
        if other != label:
            raise RecipeError(
                f"zero-shot classification cannot tell the classes {other!r} and {label!r} apart: "
                f"both are {texts[0]!r}",
                "Give them other words in data.label_names or finetune.zero_shot.descriptions",
            )


def _check_pair(arm: Arm, source: SourceModel, needs_head: bool) -> None:
    """Refuse pictures without an encoder of texts, and a head on another pooling."""
    if source.model_type not in PAIRS:
        raise RecipeError(
            "zero-shot classification of pictures needs an encoder of texts beside that of "
            f"pictures, and {source.name} ({source.architecture}) has none",
            "Use a CLIP, SigLIP or MetaCLIP source, or leave zero_shot out",
        )
    if needs_head and arm.finetune.pooling != EMBEDDING:
        raise RecipeError(
            "a zero-shot head compares the pair's own embedding with words for classes, and "
            f"finetune.pooling={arm.finetune.pooling} makes another",
            f"Set finetune.pooling={EMBEDDING}",
        )
    load_pair(source, "zero_shot")
    load_tokenizer(source)


def _check_answers(arm: Arm, context: ExperimentContext, needs_head: bool) -> None:
    """Refuse likelihoods where a head is needed."""
    if needs_head:
        how = "the likelihood of each class as an answer, which reads a picture"
        raise _build_no_head_error(context, how)


def _build_no_head_error(context: ExperimentContext, how: str) -> RecipeError:
    """Return the refusal to train or publish what makes no head."""
    return RecipeError(
        f"{context.source.name} classifies by {how} once for each class and is no head that could "
        "be trained or published",
        "Measure it beside another strategy: measure.arms: [zero_shot]",
    )


def _check_entailment(arm: Arm, context: ExperimentContext, needs_head: bool) -> None:
    """Refuse entailment where a head is needed, or where adaptation changes what is under it."""
    if needs_head:
        raise _build_no_head_error(context, "entailment, which reads a text")
    if arm.stages:
        raise RecipeError(
            f"{context.source.name} classifies by entailment, and adapt changes its encoder and "
            "not the entailment head above it",
            "Write the arm as {zero_shot: {adapt: null}}",
        )
    _load_entailment_model(context.source)
