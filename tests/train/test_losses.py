from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import DataError
from ditr_train import losses
from ditr_train.losses import lovasz_softmax, segmentation_loss


def example(count: int = 40, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    segment = torch.randint(0, classes - 1, (count,), generator=generator)  # the last class is absent
    segment[torch.rand(count, generator=generator) < 0.2] = -1
    return logits.requires_grad_(), segment


def lovasz_by_definition(probabilities: Tensor, target: Tensor) -> Tensor:
    """Sum over the sorted errors m_1 >= m_2 >= ... of m_i (J({1..i}) - J({1..i-1})), J the Jaccard loss of a set of
    mistakes: |M| / |foreground or M|."""
    total = probabilities.new_zeros(())
    present = [c for c in range(probabilities.shape[1]) if c in target.tolist()]
    for c in present:
        is_class = [t == c for t in target.tolist()]
        errors = [1 - p if own else p for p, own in zip(probabilities[:, c], is_class, strict=True)]
        order = sorted(range(len(errors)), key=lambda i: -float(errors[i].detach()))
        mistakes: set[int] = set()
        before = 0.0
        for i in order:
            mistakes.add(i)
            union = len(mistakes | {j for j, own in enumerate(is_class) if own})
            jaccard = len(mistakes) / union
            total = total + errors[i] * (jaccard - before)
            before = jaccard
    return total / len(present)


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_equals_its_definition_with_gradients(seed: int) -> None:
    logits, segment = example(seed=seed)
    target = segment[segment >= 0]
    probabilities = logits.softmax(dim=1)[segment >= 0]
    ours, expected = lovasz_softmax(probabilities, target), lovasz_by_definition(probabilities, target)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    (a,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (b,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_lovasz_in_portions_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, segment = example()
    whole = segmentation_loss(logits, segment)
    monkeypatch.setattr(losses, "_MAX_ELEMENTS", 1)
    torch.testing.assert_close(segmentation_loss(logits, segment), whole)


def test_lovasz_is_zero_for_a_perfect_and_one_for_a_wrong_answer() -> None:
    target = torch.tensor([0, 1, 1, 2])
    assert lovasz_softmax(F.one_hot(target, 4).float(), target).item() == pytest.approx(0.0)
    assert lovasz_softmax(F.one_hot((target + 1) % 3, 4).float(), target).item() == pytest.approx(1.0)


def test_is_cross_entropy_plus_weighted_lovasz() -> None:
    logits, segment = example()
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0])
    options = {"class_weights": weights, "label_smoothing": 0.1}
    plain = segmentation_loss(logits, segment, lovasz_weight=0.0, **options)
    torch.testing.assert_close(
        plain, F.cross_entropy(logits, segment, weight=weights, ignore_index=-1, label_smoothing=0.1)
    )
    lovasz = lovasz_softmax(logits.softmax(dim=1)[segment >= 0], segment[segment >= 0])
    torch.testing.assert_close(segmentation_loss(logits, segment, lovasz_weight=0.7, **options), plain + 0.7 * lovasz)


@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_ignored_points_change_nothing(ignore_index: int) -> None:
    logits, segment = example()
    labelled = segment >= 0
    relabelled = segment.masked_fill(~labelled, ignore_index)
    torch.testing.assert_close(
        segmentation_loss(logits, relabelled, ignore_index=ignore_index),
        segmentation_loss(logits[labelled], segment[labelled]),
    )


@pytest.mark.parametrize("count", [0, 5])
def test_without_labels_the_loss_is_zero_and_keeps_its_graph(count: int) -> None:
    logits = torch.randn(count, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((count,), -1))
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_labelled_points_of_weight_zero_only() -> None:
    logits, _ = example(6)
    loss = segmentation_loss(
        logits, torch.zeros(6, dtype=torch.int64), class_weights=torch.tensor([0.0, 1, 1, 1, 1]), lovasz_weight=0.0
    )
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


def test_half_precision_scores_give_a_float32_loss() -> None:
    logits, segment = example()
    loss = segmentation_loss(logits.detach().bfloat16(), segment)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(segmentation_loss(logits, segment).item(), rel=0.02)


def test_bad_input_is_refused() -> None:
    logits, segment = example()
    with pytest.raises(DataError, match=r"\[0, 5\).*7"):
        segmentation_loss(logits, segment.masked_fill(segment == 0, 7))
    with pytest.raises(DataError, match="ignore index"):
        segmentation_loss(logits, segment.masked_fill(segment == 0, -2))
    with pytest.raises(DataError, match="labels"):
        segmentation_loss(logits, segment[1:])
    with pytest.raises(DataError, match="class weights"):
        segmentation_loss(logits, segment, class_weights=torch.ones(4))
