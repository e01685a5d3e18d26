"""Weigh the loss of each element by its class and by how hard it is: class weights, focal loss.

Cross-entropy of an element whose label has probability p becomes w (1 - p)^gamma (-log p), the
focal loss of Lin et al. 2017 (arXiv:1708.02002, equation 4) with the class weight w as its alpha.
As in torch's `CrossEntropyLoss(weight, reduction="mean")` the sum is divided by the sum of w, here
over the whole step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hftl.errors import RecipeError

MAX_LOG_PROBABILITY = -1e-7
"""Above it 1 - p is 0 in float32, and the gradient of its logarithm is not finite."""


@dataclass(frozen=True)
class LossWeighting:
    """Hold the weight of each class and the exponent of focal loss.

    `positive` and `negative` are (classes,) float32, see `ClassWeights`; None: all weigh 1.
    """

    positive: Tensor | None
    negative: Tensor | None
    gamma: float

    def sum_class_loss(
        self, logits: Tensor, labels: Tensor, is_labelled: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Return the weighted loss of single labels, summed.

        Smoothing spreads a share of each label over all classes, each with its own weight, as torch
        does; the divisor stays the sum of the labels' weights.

        Args:
            logits: (elements, classes) float32.
            labels: (elements,) class ids; any class where there is no label.
            is_labelled: (elements,) bool.
            smoothing: share of each label's weight that is spread.
        """
        self._check_classes(logits)
        logs = logits.log_softmax(-1)
        each = -logs if self.positive is None else -logs * self._move(self.positive, logits)
        if self.gamma:
            # (1 - p)^gamma by its logarithm, whose gradient is finite for gamma below 1, too.
            hardness = torch.log(-torch.expm1(logs.clamp(max=MAX_LOG_PROBABILITY)))
            each = each * (self.gamma * hardness).exp()
        own = each.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if smoothing:
            own = (1 - smoothing) * own + smoothing * each.mean(-1)
        return own.where(is_labelled, 0.0).sum()

    def sum_label_loss(self, logits: Tensor, targets: Tensor, is_labelled: Tensor) -> Tensor:
        """Return the weighted loss of several labels a row, summed.

        Args:
            logits: (rows, classes) float32.
            targets: (rows, classes) of 0 to 1; anything where there is no label.
            is_labelled: (rows, classes) bool.
        """
        self._check_classes(logits)
        yes, no = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        if self.gamma:
            # -log p of the other answer is -log(1 - p) of this one.
            yes, no = yes * (-self.gamma * no).exp(), no * (-self.gamma * yes).exp()
        positive, negative = self._weigh(targets)
        return (positive * yes + negative * no).where(is_labelled, 0.0).sum()

    def sum_weights(self, labels: Tensor, is_labelled: Tensor) -> Tensor:
        """Return the sum of the elements' weights, which a loss is divided by: a scalar float32.

        Args:
            labels: (...) class ids, or (rows, classes) float.
            is_labelled: of the same shape, bool.
        """
        if labels.is_floating_point():
            positive, negative = self._weigh(labels.where(is_labelled, 0.0))
            weights = positive + negative
        elif self.positive is None:
            weights = torch.ones_like(labels, dtype=torch.float32)
        else:
            weights = self._move(self.positive, labels)[labels.where(is_labelled, 0)]
        return weights.where(is_labelled, 0.0).sum()

    def _weigh(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of yes and of no for each element."""
        positive, negative = targets.float(), 1 - targets.float()
        if self.positive is not None:
            positive = positive * self._move(self.positive, targets)
        if self.negative is not None:
            negative = negative * self._move(self.negative, targets)
        return positive, negative

    def _check_classes(self, logits: Tensor) -> None:
        if self.positive is not None and len(self.positive) != logits.shape[-1]:
            raise RecipeError(
                f"class_weight holds {len(self.positive)} weights, and the model has "
                f"{logits.shape[-1]} classes",
                "Give a weight for each class",
            )

    @staticmethod
    def _move(weights: Tensor, like: Tensor) -> Tensor:
        return weights.to(like.device)
