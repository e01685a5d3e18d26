"""Check the loss that is summed over labels, for every kind of label."""

import pytest
import torch
import torch.nn.functional as F

from hftl.train.loss import MANY_CLASSES, compute_summed_loss, count_labels, has_labels, ignore_rows


def test_classes_and_numbers_are_summed_over_rows() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, -100, 2])
    counted = labels >= 0
    expected = -F.log_softmax(logits, -1)[counted, labels[counted]].sum()
    torch.testing.assert_close(compute_summed_loss(logits, labels), expected)
    values, targets = torch.randn(5, 1), torch.randn(5)
    squares = ((values[:, 0] - targets) ** 2).sum()
    torch.testing.assert_close(compute_summed_loss(values, targets), squares)
    labels = torch.tensor([0, 2, 1, 1, 2])
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.5, reduction="sum")
    torch.testing.assert_close(compute_summed_loss(logits, labels, 0.5), smoothed)


@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_loss_over_a_vocabulary_is_that_of_cross_entropy(rows: int) -> None:
    """Compare what is computed piece by piece with the whole."""
    torch.manual_seed(0)
    logits = torch.randn(rows, MANY_CLASSES + 5, requires_grad=True)
    labels = torch.randint(0, MANY_CLASSES + 5, (rows,))
    labels[1::5] = -100
    for scores in (logits, logits.detach().bfloat16().requires_grad_()):
        loss = compute_summed_loss(scores, labels)
        expected = F.cross_entropy(scores.float(), labels, reduction="sum", ignore_index=-100)
        torch.testing.assert_close(loss, expected)
        with torch.no_grad():
            torch.testing.assert_close(compute_summed_loss(scores, labels), expected)
        if scores is logits:
            gradients = [torch.autograd.grad(3 * value, scores)[0] for value in (loss, expected)]
            torch.testing.assert_close(*gradients)


def test_targets_without_a_number_do_not_count() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    targets = torch.tensor([0.5, torch.nan, -100.0, 2.0])
    loss = compute_summed_loss(logits, targets)
    torch.testing.assert_close(loss, sum((logits[i, 0] - targets[i]) ** 2 for i in (0, 2, 3)))
    assert count_labels(targets) == 3
    loss.backward()
    assert logits.grad is not None and logits.grad[1] == 0 and logits.grad.isfinite().all()


def test_several_labels_a_row_are_each_a_yes_or_no() -> None:
    logits = torch.randn(3, 4)
    labels = torch.tensor([[0.0, 1, 1, 0], [torch.nan] * 4, [1.0, 0, 0, 0]])
    p, y = logits[[0, 2]].sigmoid(), labels[[0, 2]]
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum()
    torch.testing.assert_close(compute_summed_loss(logits, labels), expected)
    assert count_labels(labels) == 8


def test_labels_of_tokens_count_one_by_one() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [0, -100, -100]])
    places = [(0, 0), (0, 2), (1, 0)]
    expected = -sum(logits.log_softmax(-1)[i, j, labels[i, j]] for i, j in places)
    torch.testing.assert_close(compute_summed_loss(logits, labels), expected)
    assert count_labels(labels) == 3


def test_ignored_rows_leave_the_others_and_the_original() -> None:
    for labels in (torch.tensor([[1, 2], [0, 1]]), torch.tensor([[1.0, 2], [0, 1]])):
        rest = ignore_rows(labels, slice(1, None))
        assert count_labels(rest) == 2 and count_labels(ignore_rows(labels)) == 0
        assert torch.equal(rest[0], labels[0]) and count_labels(labels) == 4


def test_loss_of_patches_is_that_of_masked_autoencoders() -> None:
    """Average each hidden patch's mean squared error over patches (He et al. 2022).

    Patches without a number, which a normalised target leaves out, count for nothing.
    """
    logits, labels = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    left_out = [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    for row, patch in left_out:
        labels[row, patch] = torch.nan
    errors = [
        ((logits[row, patch] - labels[row, patch]) ** 2).mean()
        for row in range(3) for patch in range(4) if (row, patch) not in left_out
    ]  # fmt: skip
    expected = torch.stack(errors).mean()
    assert count_labels(labels) == 7 * 6 and has_labels(labels).tolist() == [True, False, True]
    loss = compute_summed_loss(logits, labels) / count_labels(labels)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all()
    assert not any(gradients[0][place].any() for place in left_out)
    assert count_labels(ignore_rows(labels, slice(0, 1))) == 4 * 6
