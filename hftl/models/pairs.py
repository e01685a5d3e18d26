"""Use pairs of an image and a text encoder that compare in one space: CLIP, SigLIP, MetaCLIP.

The stock classification classes pool an image otherwise than the pairs do. `EmbeddingModel` keeps
the pair's own embedding, so that a head can be made of texts; the text half is not part of it.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hftl.errors import RecipeError
from hftl.models.architectures import get_config_spec
from hftl.models.encoders import get_encoder_class
from hftl.models.heads import HEAD_STD, LoadedModel, load_class
from hftl.models.pooled_model import PooledModel
from hftl.models.source import SourceModel

EMBEDDING = "embedding"
"""The pooling of an `EmbeddingModel`."""
IMAGE_HALF_SUFFIX = "VisionModel"
"""The end of the name of the class that holds an image half, which a published config names."""
EMBEDDING_SCALE = 100.0
"""The length of its embeddings, about what pairs multiply cosines by: a head of the usual size and
learning rate would hardly move logits of vectors of length 1."""


@dataclass(frozen=True)
class PairSpec:
    """Describe how the halves of a pair are loaded.

    Args:
        image_class: loads the image half, with its projection where it has one.
        has_projection: the image half ends in a linear layer without bias.
        pads_to_longest: texts are padded to the longest of a batch, and their mask is read; else
            to the length that the text half was trained with, and no mask is read.
    """

    image_class: str
    has_projection: bool = True
    pads_to_longest: bool = True


PAIRS = {
    "clip": PairSpec("CLIPVisionModelWithProjection"),
    "metaclip_2": PairSpec("MetaClip2VisionModelWithProjection"),
    "siglip": PairSpec("SiglipVisionModel", has_projection=False, pads_to_longest=False),
    "siglip2": PairSpec("Siglip2VisionModel", has_projection=False, pads_to_longest=False),
}
"""The pairs by model type."""


class EmbeddingModel(PooledModel):
    """Hold the image half of a pair, its projection, and one linear head on its embeddings."""

    def __init__(self, encoder: nn.Module, projection: nn.Module, width: int, outputs: int) -> None:
        super().__init__(encoder, EMBEDDING, width, outputs)
        self.projection = projection

    @property
    def head_parts(self) -> list[nn.Module]:
        """Return the modules after the encoder, in order."""
        return [self.projection, self.head]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, labels: Tensor | None = None, **arguments: Any
    ) -> ImageClassifierOutput:
        """Return logits (batch, outputs) of images (batch, 3, height, width).

        The trainer computes the loss; `arguments` are further ones of the encoder.
        """
        pooled = self.encoder(pixel_values=pixel_values, **arguments).pooler_output
        embedding = F.normalize(self.projection(pooled).float(), dim=-1)
        logits = self.head(EMBEDDING_SCALE * embedding)
        return ImageClassifierOutput(logits=logits)  # pyright: ignore[reportArgumentType]


def build_embedding_model(
    source: SourceModel, outputs: int, seed: int, scratch: bool = False
) -> LoadedModel:
    """Load the image half of a pair with a new head on its embeddings, drawn from `seed`.

    Args:
        source: the pair's checkpoint.
        outputs: classes, or 1 for regression.
        seed: of every weight that the checkpoint lacks.
        scratch: draw all weights, by the architecture's own initialisation.

    Raises:
        RecipeError: if the source is no pair, or the checkpoint lacks weights of the image half.
    """
    import transformers

    pair = get_pair_spec(source, "finetune.pooling=embedding")
    config = deepcopy(source.config.vision_config)
    if pair.has_projection:
        # The image half has a size of its own, which a pair's config may leave at its default.
        config.projection_dim = source.config.projection_dim
    kind: Any = getattr(transformers, pair.image_class)
    torch.manual_seed(seed)
    model, missing = (kind(config), set()) if scratch else load_class(source, kind, config, {})
    if missing:
        raise RecipeError(
            f"source.model: {source.name} lacks {min(missing)} of the pair's image half",
            "Give the whole pair, as its authors published it",
        )
    tower = model.vision_model if pair.has_projection else model
    projection = model.visual_projection if pair.has_projection else nn.Identity()
    width = config.projection_dim if pair.has_projection else config.hidden_size
    built = EmbeddingModel(tower, projection, width, outputs)
    nn.init.normal_(built.head.weight, std=getattr(config, "initializer_range", HEAD_STD))
    nn.init.zeros_(built.head.bias)
    return LoadedModel(built, get_config_spec(tower.config), EMBEDDING, ())


def get_pair_spec(source: SourceModel, key: str) -> PairSpec:
    """Return how a pair is loaded.

    Raises:
        RecipeError: naming the key, if the source is no pair.
    """
    pair = PAIRS.get(source.model_type)
    if pair is None:
        raise RecipeError(
            f"{key}: {source.name} ({source.architecture}) is no pair of an image and a text "
            "encoder",
            "Use a CLIP, SigLIP or MetaCLIP source, or leave it out",
        )
    return pair


def load_pair(source: SourceModel, key: str) -> Any:
    """Load both halves of a pair.

    Raises:
        RecipeError: naming the key, if the source is no pair or lacks weights of a half.
    """
    get_pair_spec(source, key)
    pair, missing = load_class(
        source, get_encoder_class(source.config), deepcopy(source.config), {}
    )
    if missing:
        raise RecipeError(
            f"{key}: {source.name} is no whole pair of an image and a text encoder: it lacks "
            f"{min(missing)}",
            "Give the whole pair, as its authors published it",
        )
    return pair.eval()


def embed_texts(pair: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return a pair's embeddings of texts, (texts, width) of length 1."""
    spec, longest = PAIRS[pair.config.model_type], pair.config.text_config.max_position_embeddings
    ids = tokenizer(
        texts, padding=True if spec.pads_to_longest else "max_length", padding_side="right",
        max_length=longest, truncation=True, return_attention_mask=spec.pads_to_longest,
        return_tensors="pt",
    )  # fmt: skip
    names = ("input_ids", "attention_mask") if spec.pads_to_longest else ("input_ids",)
    with torch.no_grad():
        embedding = pair.get_text_features(**{name: ids[name] for name in names}).pooler_output
    return F.normalize(embedding.float(), dim=-1)


def get_scale_and_bias(pair: Any) -> tuple[float, float]:
    """Return what a pair multiplies cosines by, and adds to them."""
    bias = getattr(pair, "logit_bias", None)
    return float(pair.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach())
