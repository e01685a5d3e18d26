"""Pool a text before the last layer of a stock class that pools its logits.

The classes of decoders, and EuroBERT's, compute logits of every token and then select those of the
last token, or average them. The last layer is linear, so that pooling its input gives the same
logits, and features, probe and regularizers read one vector a text there.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hftl.errors import RecipeError
from hftl.models.architecture_spec import HeadSpec
from hftl.models.architectures import get_config_spec
from hftl.models.encoders import get_task_class


def pool_before_head(model: nn.Module) -> None:
    """Make a stock class that pools its logits pool before its last layer; leave others alone.

    Its class keeps its name, which transformers writes into config.json, and its forward what
    `inspect` says of it.
    """
    config: Any = model.config
    kind = type(model)
    if kind is not get_task_class(config, "classification"):
        return
    spec = get_config_spec(config)
    if spec.pooled_logits is not None:
        forward = _build_forward(kind.forward, spec.pooled_logits, spec.head)
        namespace = {"__module__": kind.__module__, "forward": forward}
        model.__class__ = type(kind.__name__, (kind,), namespace)


def find_last_tokens(input_ids: Tensor, pad_id: int | None) -> Tensor:
    """Return the place of each row's last token that is not the padding token, (batch,) int64.

    Other than an attention mask it is what the stock classes read. A row of padding alone has 0.

    Args:
        input_ids: (batch, length), padded on either side.
        pad_id: None where the model has no padding token.

    Raises:
        RecipeError: if several rows have no padding token to tell their ends by.
    """
    if pad_id is None:
        if len(input_ids) > 1:
            raise RecipeError(
                f"the model has no padding token, and a batch has {len(input_ids)} rows, whose "
                "last tokens it finds by that",
                "Set pad_token_id in its config, or per_device_train_batch_size=1",
            )
        return input_ids.new_full((1,), input_ids.shape[1] - 1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (places * (input_ids != pad_id)).argmax(-1)


def _build_forward(stock: Any, pooling: str, head: HeadSpec) -> Any:
    """Return the forward that pools before the last layer, in the place of the stock class's."""

    @wraps(stock)
    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor | None = None,
        labels: Tensor | None = None, return_dict: bool | None = None, **more: Any,
    ) -> SequenceClassifierOutput:  # fmt: skip
        del return_dict
        encoder = self.base_model
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **more)[0]
        if pooling == "last":
            rows = torch.arange(len(hidden), device=hidden.device)
            hidden = hidden[rows, find_last_tokens(input_ids, self.config.pad_token_id)]
        for name in head.before_last:
            hidden = getattr(self, name)(hidden)
        if pooling == "mean":
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            hidden = (hidden * weight).sum(1) / weight.sum(1)
        logits = getattr(self, head.last_linear)(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)

    return forward
