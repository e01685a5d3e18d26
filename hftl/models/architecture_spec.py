"""Describe where the blocks, the head and the other parts of an architecture lie."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from hftl.errors import RecipeError

TOKEN_CLASSIFICATION = "token-classification"
WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers that LoRA can wrap."""
BERT_LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
)  # fmt: skip
SWIGLU_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class PostNormBlock:
    """Name the parts of a block that normalises the sums after attention and feed-forward layers.

    Args:
        linears: query, key, value, attention's output, and the feed-forward layers.
        attention: the module that holds the heads and their dropout.
        dropouts: of attention's output and of the feed-forward layers', where there is one.
        norms: after attention, and after the feed-forward layers.
        activation: the config's key for the feed-forward activation.
    """

    linears: tuple[str, ...] = BERT_LINEARS
    attention: str = "attention.self"
    dropouts: tuple[str | None, ...] = ("attention.output.dropout", "output.dropout")
    norms: tuple[str, ...] = ("attention.output.LayerNorm", "output.LayerNorm")
    activation: str = "hidden_act"


@dataclass(frozen=True)
class HeadSpec:
    """Describe the head of one stock class.

    Args:
        parts: modules after the encoder, new for every task.
        last_linear: path of the last layer, which the probe initialises.
        dropout: path of the dropout directly before it, where there is one.
        has_bias: the last layer has a bias; without one the probe has no intercept.
        before_last: modules that hidden states pass between the encoder and the last layer, in
            their order, where the stock class pools logits.
    """

    parts: tuple[str, ...] = ("classifier",)
    last_linear: str = "classifier"
    dropout: str | None = "dropout"
    has_bias: bool = True
    before_last: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArchitectureSpec:
    """Describe the named parts of one architecture.

    Paths inside the encoder are relative to it, so they hold for `AutoModel` and for the stock
    task class alike. Blocks are whatever is unfrozen one after the other: transformer layers, or
    the residual blocks of a convolutional network's stages.

    Args:
        encoder: the encoder's attribute in the stock classification class.
        blocks: path in the encoder of the list of blocks, a `ModuleList` or `Sequential`, or
            several paths, bottom to top; `*` stands for every index of an outer list, as of
            stages.
        lora_targets: suffixes of the linear and convolutional layers that every block holds and
            LoRA wraps.
        modality: what the encoder reads.
        optional_targets: suffixes of layers that LoRA wraps and only some blocks hold, as the
            shortcut of the first residual block of a stage.
        skipped_layers: suffixes of a block's layers that LoRA leaves alone, as convolutions of
            groups of channels.
        pooler: path of the pooler in the encoder, where `AutoModel` or the stock class has one.
        final_parts: parts of the encoder after the blocks, on the way to the head; not the pooler.
        unused_parts: parts of the encoder that no output of the stock class depends on.
        head: the head of the sequence or image classification class.
        token_head: the head of the token classification class, where there is one.
        add_pooling_layer: `AutoModel` takes that argument.
        has_padding_offset: positions count from the padding id on, so that fewer are left.
        packs: tokens meet in attention alone, by transformers' attention interface, and positions
            are an argument: a batch may run as one row without padding, at the same outputs.
        post_norm: the parts of its blocks, where packed ones may run as one function.
        prefix_tokens: tokens of an image before those of its patches: the class token, then
            registers. 0: the stock class alone pools it.
        patch_size: the config's key for the side of an image patch; None: sides of any length.
        image_sizes: the encoder takes images of the config's size only (`fixed`), of any size
            with the argument `interpolate_pos_encoding` (`argument`), of any size (`any`), or rows
            of patches of images of any shape (`patches`), with their mask and grid.
        masked_images: how masked-image pre-training hides patches: it drops them where blocks
            take any number of tokens (MAE), or covers them with a mask token (SimMIM).
        token_mixer: path in the last block of its layer that mixes positions, where all that
            comes after it sees one position at a time: masked-LM runs that at masked positions
            alone.
        is_causal: every token sees only those before it, as in a decoder.
        pooled_logits: the stock class computes logits of every token, and takes those of the last
            token that is no padding, or their mean.
        reads_prompt: the encoder is a language model that sees a picture among the tokens of a
            prompt; blocks are the language model's, and no stock class puts a head on it.
        adjust: returns the spec of a config whose settings change it.
        blocks_are_listed: `blocks` are the paths of the blocks themselves, not of their lists.
        initialize: draws all weights of a stock model anew, where its class does so otherwise than
            the architecture's authors.
    """

    encoder: str
    blocks: str | tuple[str, ...]
    lora_targets: tuple[str, ...]
    modality: Literal["text", "image"] = "text"
    optional_targets: tuple[str, ...] = ()
    skipped_layers: tuple[str, ...] = ()
    pooler: str | None = None
    final_parts: tuple[str, ...] = ()
    unused_parts: tuple[str, ...] = ()
    head: HeadSpec = HeadSpec()
    token_head: HeadSpec | None = HeadSpec()
    add_pooling_layer: bool = False
    has_padding_offset: bool = False
    packs: bool = False
    post_norm: PostNormBlock | None = None
    prefix_tokens: int = 0
    patch_size: str | None = None
    image_sizes: Literal["fixed", "argument", "any", "patches"] = "fixed"
    masked_images: Literal["drop", "cover"] | None = None
    token_mixer: str | None = None
    is_causal: bool = False
    pooled_logits: Literal["last", "mean"] | None = None
    reads_prompt: bool = False
    adjust: Callable[["ArchitectureSpec", Any], "ArchitectureSpec"] | None = None
    blocks_are_listed: bool = False
    initialize: Callable[[Any], None] | None = None

    def for_task(self, task: str) -> "ArchitectureSpec":
        """Return the spec of the task's stock class.

        Raises:
            RecipeError: if there is no such class.
        """
        if task != TOKEN_CLASSIFICATION:
            return self
        if self.token_head is None:
            raise RecipeError(
                f"data.task: {self.encoder} has no class for {TOKEN_CLASSIFICATION}",
                "Use another source.model or another data.task",
            )
        return replace(self, pooler=None, head=self.token_head, pooled_logits=None)
