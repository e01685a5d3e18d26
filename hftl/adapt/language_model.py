"""Predict tokens with a stock language model, its head on the chosen places alone.

Masked ones, with an encoder: Devlin et al. 2019, arXiv:1810.04805, section 3.1. The next one of
every place, a decoder's own pre-training: as domain adaptation Gururangan et al. 2020,
arXiv:2004.10964.
"""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hftl.adapt.encoder_io import MaskedOutput, check_encoder_complete, load_head
from hftl.errors import RecipeError
from hftl.models.architecture_spec import ArchitectureSpec
from hftl.models.encoders import get_blocks
from hftl.models.heads import load_class
from hftl.models.model_parts import unwrap_adapter
from hftl.models.source import SourceModel

POSITION_MULTIPLE = 32
"""Places are answered in multiples of this: a product of ever another shape is made ready anew each
time, and on CPUs kept, so that time and memory grow."""


class LanguageModel(nn.Module):
    """Predict tokens at chosen positions only, with a stock masked or causal language model.

    A hook keeps the hidden states of the chosen places, so that the model's own head, which looks
    at each place for itself, sees no others. In some architectures it stands before the last
    block's feed-forward layers. Both are exact.

    `fixed` are paths in the encoder that never train, since no logit depends on them.
    """

    def __init__(self, stock: Any, architecture: ArchitectureSpec) -> None:
        super().__init__()
        self.stock = stock
        self.architecture = architecture
        self.fixed = (*architecture.unused_parts, architecture.pooler or "pooler")
        self._takes_mask = "attention_mask" in inspect.signature(stock.forward).parameters
        self._flat: Tensor | None = None
        self._hook: Any = None
        self._listen()

    def forward(
        self, input_ids: Tensor, flat: Tensor, slots: Tensor, attention_mask: Tensor | None = None
    ) -> MaskedOutput:
        """Return logits (places, vocabulary) at the chosen places.

        Args:
            input_ids: (batch, length) int64.
            flat: (places,) int64, their indices in the flattened ids.
            slots: (places,) int64, handed through.
            attention_mask: (batch, length), None where nothing is padded; FNet has none.
        """
        mask = {"attention_mask": attention_mask} if self._takes_mask else {}
        self._flat = nn.functional.pad(flat, (0, -len(flat) % POSITION_MULTIPLE))
        try:
            outputs = self.stock(input_ids=input_ids, **mask)
        finally:
            self._flat = None
        return MaskedOutput(logits=outputs.logits.squeeze(0)[: len(flat)], slots=slots)

    @property
    def encoder(self) -> Any:
        """Return the encoder, wrapped for LoRA or not; set it to put an adapter over it."""
        return self.stock.base_model

    @encoder.setter
    def encoder(self, encoder: nn.Module) -> None:
        setattr(self.stock, self.stock.base_model_prefix, encoder)
        self._listen()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder":
            # nn.Module would keep a module beside the property instead of calling its setter.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters outside the encoder by stock names; a tied one is inside."""
        inside = {id(parameter) for parameter in self.encoder.parameters()}
        return {name: p for name, p in self.stock.named_parameters() if id(p) not in inside}

    def head_state(self) -> dict[str, Tensor]:
        """Return the same as plain tensors."""
        return {name: p.detach() for name, p in self.head_parameters().items()}

    def _listen(self) -> None:
        """Register the hook after the last module that mixes tokens."""
        if self._hook is not None:
            self._hook.remove()
        where: Any = self.encoder
        mixer = self.architecture.token_mixer
        if mixer is not None:
            where = get_blocks(unwrap_adapter(where), self.architecture)[-1].get_submodule(mixer)
        self._hook = where.register_forward_hook(self._choose)

    def _choose(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Select (1, places, width) of (batch, length, width) in a module's output."""
        if self._flat is None:
            return output
        places, packing = self._flat, getattr(unwrap_adapter(self.encoder), "packing", None)
        if packing is not None:
            # A hook inside a packed encoder; that of the encoder itself sees the batch again.
            places, packing.is_whole = packing.locate(places), False
        hidden = output[0].flatten(0, 1).index_select(0, places).unsqueeze(0)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output


def load_mlm(
    source: SourceModel, seed: int, head: Path | None = None
) -> tuple[LanguageModel, tuple[str, ...]]:
    """Return the source with its masked-LM head, in fp32.

    Args:
        source: the checkpoint.
        seed: of the head's weights that it lacks.
        head: a safetensors file of `head_state`, which an earlier stage has trained.

    Returns:
        The model, and the names of the head's parameters that are new and have to be warmed; a
        decoder that the checkpoint lacks is not new but tied to the input embeddings.

    Raises:
        RecipeError: if the architecture has no masked-LM class, or the checkpoint lacks weights of
            the encoder.
    """
    return load_language_model(source, find_mlm_class(source), seed, head)


def load_language_model(
    source: SourceModel, kind: Any, seed: int, head: Path | None
) -> tuple[LanguageModel, tuple[str, ...]]:
    """Return the source under a stock class that predicts tokens; see `load_mlm`."""
    torch.manual_seed(seed)
    stock, missing = load_class(source, kind, deepcopy(source.config), {})
    if not source.architecture_spec.is_causal:
        missing -= _tie_decoder(stock, missing, source)
    model = LanguageModel(stock, source.architecture_spec)
    prefix = f"{stock.base_model_prefix}."
    inside = {name.removeprefix(prefix) for name in missing if name.startswith(prefix)}
    check_encoder_complete(source, inside, model.fixed)
    if head is not None:
        load_head(model, head)
        return model, ()
    return model, _init_new_head(model, missing)


def load_trained_mlm(source: SourceModel) -> LanguageModel | None:
    """Return the source with its trained masked-LM head; None where the checkpoint has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    kind: Any = MODEL_FOR_MASKED_LM_MAPPING.get(type(source.config), None)
    if source.architecture_spec.modality != "text" or kind is None:
        return None
    stock, missing = load_class(source, kind, deepcopy(source.config), {})
    tied = {n for n, m in stock.named_modules() if m is stock.get_output_embeddings()}
    inside = tuple(f"{name}." for name in (stock.base_model_prefix, *tied))
    if any(not name.startswith(inside) for name in missing):
        return None
    model, fresh = load_mlm(source, 0)
    return None if fresh else model


def _init_new_head(model: LanguageModel, missing: set[str]) -> tuple[str, ...]:
    """Zero the biases of the head's new parameters, and return all their names."""
    named = model.stock.named_parameters(remove_duplicate=False)
    new = {id(parameter) for name, parameter in named if name in missing}
    parameters = {name: p for name, p in model.head_parameters().items() if id(p) in new}
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            # transformers leaves those of FNet and data2vec as the memory happened to be.
            nn.init.zeros_(parameter)
    return tuple(parameters)


def find_mlm_class(source: SourceModel, place: str = "adapt.objective") -> Any:
    """Return the stock masked-LM class of the source's architecture.

    Args:
        source: the checkpoint.
        place: the recipe key that names it.

    Raises:
        RecipeError: if there is none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if source.architecture_spec.modality != "text":
        raise RecipeError(
            f"adapt.objective=mlm: {source.architecture} reads images; mlm needs text",
            "Use adapt.objective=mae",
        )
    if source.architecture_spec.is_causal:
        raise RecipeError(
            f"{place}=mlm: {source.architecture} is a decoder, which learns the next token",
            f"Use {place}=clm",
        )
    mlm_class = MODEL_FOR_MASKED_LM_MAPPING.get(type(source.config), None)
    if mlm_class is None:
        raise RecipeError(
            f"adapt.objective=mlm: transformers has no masked-LM class of {source.architecture}",
            "Leave adapt out, or use another source.model",
        )
    return mlm_class


def _tie_decoder(stock: Any, missing: set[str], source: SourceModel) -> set[str]:
    """Tie a missing decoder to the input embeddings; return the names that this provides."""
    decoder, words = stock.get_output_embeddings(), stock.get_input_embeddings().weight
    name = next(f"{path}.weight" for path, m in stock.named_modules() if m is decoder)
    # Where the head has no decoder of its own (new DeBERTa), another layer is called its output.
    if name not in missing or len(decoder.weight) != len(words):
        return set()
    if decoder.weight.shape != words.shape:
        raise RecipeError(
            f"source.model: {source.name} lacks the masked-LM decoder, and the embeddings of "
            f"{source.architecture} have another width",
            "Give a checkpoint with its masked-LM head",
        )
    decoder.weight = words
    return {name}


def load_clm(
    source: SourceModel, seed: int, head: Path | None = None
) -> tuple[LanguageModel, tuple[str, ...]]:
    """Return the source with its causal-LM head, in fp32, and the names of its new parameters.

    Args:
        source: the checkpoint.
        seed: of the head's weights that it lacks; those that are tied to the embeddings it has.
        head: a safetensors file of `head_state`, which an earlier stage has trained.

    Raises:
        RecipeError: if the architecture is no decoder, or the checkpoint lacks weights of it.
    """
    return load_language_model(source, find_clm_class(source), seed, head)


def find_clm_class(source: SourceModel, place: str = "adapt.objective") -> Any:
    """Return the stock causal-LM class of the source's architecture.

    Args:
        source: the checkpoint.
        place: the recipe key that names it.

    Raises:
        RecipeError: if there is none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    architecture = source.architecture_spec
    if not architecture.is_causal:
        images = architecture.modality == "image"
        what = "reads images" if images else "is an encoder, which sees every token at once"
        other = "mae" if images else "mlm"
        raise RecipeError(
            f"{place}=clm: {source.architecture} {what}; clm is for decoders",
            f"Use {place}={other}" if place.startswith("adapt") else "Use another form of KL",
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
