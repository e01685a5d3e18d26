"""Masked image modelling: the encoder sees the visible patches, a decoder says the hidden ones.

MAE (He et al. 2022, arXiv:2111.06377); for BEiT SimMIM (Xie et al. 2022, arXiv:2111.09886).
"""

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

from hftl.adapt.encoder_io import MaskedOutput, check_encoder_complete, load_head
from hftl.data.image_inputs import ImageInputs
from hftl.data.masking import count_patches, count_visible, gather_tokens, split_by_noise
from hftl.errors import RecipeError
from hftl.models.architectures import ARCHITECTURES, get_patch_size
from hftl.models.encoders import get_encoder_class, get_submodule
from hftl.models.heads import load_class
from hftl.models.source import SourceModel
from hftl.models.timm_architecture import TIMM_WRAPPER

ATTENTION_HEAD_WIDTH = 32
"""Of each attention head of a new decoder, as in ViTMAE: 512 in 16 heads."""
TEACHER_BATCH_SIZE = 64


class PixelHead(nn.Module):
    """Predict pixels by a norm and a linear layer; a mask token is put for hidden patches."""

    def __init__(self, width: int, values: int, std: float) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * std)
        self.norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, values)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, masked, width) to (batch, masked, values)."""
        return self.pred(self.norm(hidden))


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches of an image, and predict the masked ones.

    A hook on the encoder's embeddings drops the hidden patches after positions were added. Under a
    `PixelHead` it puts the mask token in their places instead, before positions are added.

    Args:
        encoder: of `AutoModel`; it may be replaced by an adapter over itself.
        decoder: transformers' ViTMAE decoder, or a `PixelHead`.
        ratio: the share of patches that is hidden.
        fixed: paths in the encoder that never train.
    """

    def __init__(
        self, encoder: Any, decoder: ViTMAEDecoder | PixelHead, ratio: float, fixed: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.ratio = ratio
        self.fixed = fixed
        self.distill = 1.0
        """The penalty's weight."""
        self._ids: Tensor | None = None
        embeddings = get_submodule(encoder, "embeddings")
        if isinstance(decoder, PixelHead):
            get_submodule(embeddings, "patch_embeddings").register_forward_hook(self._cover)
        else:
            embeddings.register_forward_hook(self._drop)
        self._patches = 0

    def forward(
        self, pixel_values: Tensor, noise: Tensor, teacher: Tensor | None = None, **arguments: Any
    ) -> MaskedOutput:
        """Predict the masked patches, in the order of the masked ids of `split_by_noise`.

        Args:
            pixel_values: (batch, 3, side, side) float32.
            noise: (batch, patches) float32, which chooses.
            teacher: (batch, width), `compute_teacher_features` of the original; adds the penalty.
            arguments: what else the encoder takes.

        Returns:
            Logits (batch, masked, patch * patch * 3). Penalty (batch,): `distill` times the mean
            squared difference between teacher and the encoder's mean patch token of the whole
            picture, after GFM (Mendieta et al. 2023, arXiv:2302.04476, section 3.2).
        """
        visible, masked, restore = split_by_noise(noise, self.ratio)
        if isinstance(self.decoder, PixelHead):
            hidden = self._encoded(pixel_values, masked, noise.shape[1], arguments)
            logits = self.decoder(gather_tokens(hidden[:, -noise.shape[1] :], masked))
        else:
            hidden = self._encoded(pixel_values, visible, noise.shape[1], arguments)
            # Of the tokens before the patches the decoder knows the first alone.
            shown = torch.cat([hidden[:, :1], hidden[:, -visible.shape[1] :]], dim=1)
            logits = gather_tokens(self.decoder(shown, restore).logits, masked)
        penalty = None
        if teacher is not None:
            whole = self.features(pixel_values, noise.shape[1], **arguments)
            penalty = self.distill * (whole.float() - teacher).square().mean(1)
        return MaskedOutput(logits=logits, penalty=penalty)

    def features(self, pixel_values: Tensor, patches: int, **arguments: Any) -> Tensor:
        """Return the mean patch token of unmasked images: (batch, width)."""
        return self._encoded(pixel_values, None, patches, arguments)[:, -patches:].mean(1)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the decoder's trainable parameters, the mask token among them."""
        named = self.decoder.named_parameters(prefix="decoder")
        return {name: p for name, p in named if not name.endswith("decoder_pos_embed")}

    def head_state(self) -> dict[str, Tensor]:
        """Return the same as plain tensors."""
        return {name: p.detach() for name, p in self.head_parameters().items()}

    def _encoded(
        self, pixels: Tensor, ids: Tensor | None, patches: int, arguments: Mapping[str, object]
    ) -> Tensor:
        self._ids, self._patches = ids, patches
        try:
            return self.encoder(pixel_values=pixels, **arguments).last_hidden_state
        finally:
            self._ids = None

    def _drop(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if self._ids is None:
            return embedded
        before, tokens = embedded[:, : -self._patches], embedded[:, -self._patches :]
        return torch.cat([before, gather_tokens(tokens, self._ids)], dim=1)

    def _cover(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if self._ids is None:
            return embedded
        hidden = torch.zeros(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        hidden = hidden.scatter(1, self._ids, True).unsqueeze(-1)
        return torch.where(hidden, self.decoder.mask_token.to(embedded.dtype), embedded)


def load_mae(
    source: SourceModel, side: int, ratio: float, decoder: dict[str, int], seed: int,
    head: Path | None = None, origin: SourceModel | None = None,
) -> tuple[MaskedAutoencoder, tuple[str, ...]]:  # fmt: skip
    """Return the source with a decoder, in fp32.

    Args:
        source: the checkpoint.
        side: of the pictures, in pixels.
        ratio: the share of patches that is hidden.
        decoder: width, depth and, if it likes, heads of a new decoder. A ViTMAE checkpoint brings
            its own and BEiT has one linear layer: neither looks at it.
        seed: of the decoder's weights.
        head: a safetensors file of `head_state`, which an earlier stage has trained.
        origin: what the source was before an earlier stage adapted it, which brings its decoder.

    Returns:
        The model, and the names of the decoder's parameters that are new and have to be warmed.

    Raises:
        RecipeError: if the architecture has no such objective, the checkpoint lacks weights of the
            encoder, or patches, ratio or decoder make no sense.
    """
    check_mae_architecture(source)
    patches = count_patches(side, get_patch_size(source.config))
    count_visible(patches, ratio)  # refuses a ratio that leaves nothing to see or to say
    torch.manual_seed(seed)
    encoder = _load_encoder(source)
    made, new = _load_decoder(origin or source, patches, decoder)
    model = MaskedAutoencoder(encoder, made, ratio, _list_untrained_parts(origin or source))
    if head is not None:
        load_head(model, head)
        new = False
    return model, tuple(model.head_parameters()) if new else ()


def compute_teacher_features(
    model: MaskedAutoencoder, canvases: Sequence[Any], inputs: ImageInputs
) -> Tensor:
    """Return the current encoder's features of unmasked images, in eval mode, without gradient.

    Args:
        model: left in eval mode.
        canvases: (3, side, side) uint8 each.
        inputs: normalises them, and knows what else the encoder takes.

    Returns:
        (pictures, width) float32 on the CPU, `MaskedAutoencoder.features` of each.
    """
    model.eval()
    device = next(model.parameters()).device
    features = []
    with torch.no_grad():
        for start in range(0, len(canvases), TEACHER_BATCH_SIZE):
            part = range(start, min(start + TEACHER_BATCH_SIZE, len(canvases)))
            batch = inputs.collate([{"pixel_values": canvases[i]} for i in part])
            pixels = batch.pop("pixel_values").to(device)
            patches = count_patches(pixels.shape[-1], inputs.patch_size)
            features.append(model.features(pixels, patches, **batch).float().cpu())
    return torch.cat(features)


def check_mae_architecture(source: SourceModel) -> None:
    """Refuse an architecture that masked-image training does not support.

    Raises:
        RecipeError: with the reason.
    """
    reason = None
    if source.architecture_spec.modality != "image":
        reason = "reads text; mae needs images"
    elif source.model_type == TIMM_WRAPPER:
        reason = "runs whole pictures by timm, so no patch can be left out"
    elif source.architecture_spec.masked_images is None and _reads_full_grid(source):
        reason = "convolves or shifts windows over the full grid, so no patch can be left out"
    elif source.architecture_spec.masked_images is None:
        reason = "is no architecture that mae knows"
    if reason is not None:
        known = ["vit_mae", *(name for name, spec in ARCHITECTURES.items() if spec.masked_images)]
        raise RecipeError(
            f"adapt.objective=mae: {source.architecture} {reason}",
            f"Use a source of {', '.join(known)}, or leave adapt out and fine-tune it as it is",
        )


def _reads_full_grid(source: SourceModel) -> bool:
    """Return whether an encoder has no patches, or merges them in stages."""
    spec = source.architecture_spec
    return spec.patch_size is None or "*" in spec.blocks


def _list_untrained_parts(source: SourceModel) -> tuple[str, ...]:
    """Return the parts that no prediction depends on, and ViTMAE's sine and cosine positions."""
    positions = ("embeddings.position_embeddings",) if source.architecture == "vit_mae" else ()
    return (*source.architecture_spec.unused_parts, "embeddings.mask_token", "pooler", *positions)


def _load_encoder(source: SourceModel) -> Any:
    kind = get_encoder_class(source.config)
    takes = "add_pooling_layer" in inspect.signature(kind).parameters
    extra = (
        {"add_pooling_layer": False} if takes and source.architecture_spec.pooler is None else {}
    )
    encoder, missing = load_class(source, kind, deepcopy(source.config), extra)
    check_encoder_complete(source, missing, (*source.architecture_spec.unused_parts, "pooler"))
    return encoder


def _load_decoder(
    source: SourceModel, patches: int, settings: dict[str, int]
) -> tuple[ViTMAEDecoder | PixelHead, bool]:
    """Return the decoder, and whether its weights are new."""
    config = source.config
    if source.architecture_spec.masked_images == "cover":
        values = get_patch_size(config) ** 2 * config.num_channels
        return PixelHead(config.hidden_size, values, config.initializer_range), True
    own = _load_source_decoder(source)
    if own is None:
        return _build_decoder(_build_decoder_config(source, settings), patches), True
    decoder = _build_decoder(own.config, patches)
    _copy_decoder(own.decoder, decoder)
    return decoder, False


def _load_source_decoder(source: SourceModel) -> Any:
    """Return the checkpoint's model with its decoder, where it has one."""
    if source.architecture != "vit_mae":
        return None
    config = ViTMAEConfig.from_pretrained(source.folder)
    model, missing = load_class(source, ViTMAEForPreTraining, config, {})
    return None if any(name.startswith("decoder.") for name in missing) else model


def _build_decoder_config(source: SourceModel, decoder: dict[str, int]) -> Any:
    width, depth = decoder["width"], decoder["depth"]
    heads = decoder.get("heads") or max(1, width // ATTENTION_HEAD_WIDTH)
    if depth < 1 or width < 4 or width % heads or width % 4:
        raise RecipeError(
            f"adapt.decoder={{width: {width}, depth: {depth}, heads: {heads}}}",
            "Use a depth of at least 1 and a width that 4 and the heads divide",
        )
    return ViTMAEConfig(
        hidden_size=source.config.hidden_size, patch_size=get_patch_size(source.config),
        num_channels=source.config.num_channels, layer_norm_eps=source.config.layer_norm_eps,
        decoder_hidden_size=width, decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width,
        attn_implementation="sdpa",  # pyright: ignore
    )  # fmt: skip


def _build_decoder(config: Any, patches: int) -> ViTMAEDecoder:
    """Return a new decoder for this many patches, initialised as in MAE's code."""
    decoder = ViTMAEDecoder(config, patches)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return decoder


def _copy_decoder(own: ViTMAEDecoder, into: ViTMAEDecoder) -> None:
    """Copy the trained weights, and the positions where images have the checkpoint's size."""
    state = own.state_dict()
    if state["decoder_pos_embed"].shape != into.decoder_pos_embed.shape:
        state["decoder_pos_embed"] = into.decoder_pos_embed
    into.load_state_dict(state)
