from conftest import need, need_extra

need_extra("histopathology")
need("sklearn")

import pytest
import torch
from sklearn import metrics

from examples.histopathology.runs.scores import (
    Confusion,
    auc,
    brier,
    confusion,
    confusion_by_centre,
    ece,
    losses,
    reliability,
    roc,
)

# Sums of doubles in another order.
CLOSE = {"rtol": 0, "atol": 1e-12}


def drawn(seed: int, size: int = 200, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (size,), generator=generator)
    logits = torch.randn(size, generator=generator) + labels
    return (logits.round() if ties else logits), labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_roc_and_its_area_are_scikit_learns(seed, ties):
    logits, labels = drawn(seed, ties=ties)
    false, true = roc(logits, labels)
    expected = metrics.roc_curve(labels, logits, drop_intermediate=False)
    torch.testing.assert_close(false, torch.from_numpy(expected[0]), **CLOSE)
    torch.testing.assert_close(true, torch.from_numpy(expected[1]), **CLOSE)
    assert auc(logits, labels) == pytest.approx(metrics.roc_auc_score(labels, logits), abs=1e-12)


def test_labels_of_one_kind_have_no_roc():
    assert auc(torch.randn(4), torch.ones(4)) is None
    with pytest.raises(ValueError, match="both labels"):
        roc(torch.randn(4), torch.zeros(4))


def test_bins_hold_what_lies_in_them_and_the_error_is_their_weighted_distance():
    logits, labels = drawn(5)
    probability = logits.double().sigmoid().tolist()
    expected = 0.0
    for each, low in zip(reliability(logits, labels), range(10), strict=True):
        own = [i for i, p in enumerate(probability) if low / 10 <= p < (low + 1) / 10]
        assert each.patches == len(own)
        if own:
            distance = sum(probability[i] for i in own) / len(own) - sum(int(labels[i]) for i in own) / len(own)
            expected += len(own) / len(labels) * abs(distance)
    assert ece(reliability(logits, labels)) == pytest.approx(expected, abs=1e-12)


def test_calibrated_probabilities_have_no_error_and_sure_ones_fall_into_the_last_bin():
    # a quarter of the patches at probability 1/4 have label 1
    quarter = torch.full((8,), 0.25).logit()
    assert ece(reliability(quarter, torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]))) == pytest.approx(0.0, abs=1e-7)
    sure = reliability(torch.tensor([100.0, -100.0]), torch.tensor([0, 1]))
    assert (sure[-1].patches, sure[0].patches, ece(sure)) == (1, 1, 1.0)


def test_brier_and_loss_are_scikit_learns():
    logits, labels = drawn(6)
    probability = logits.double().sigmoid()
    assert brier(logits, labels) == pytest.approx(metrics.brier_score_loss(labels, probability), abs=1e-12)
    assert float(losses(logits, labels).mean()) == pytest.approx(metrics.log_loss(labels, probability), abs=1e-12)


def test_confusion_counts_each_patch_once():
    logits, labels = drawn(7)
    found = confusion(logits, labels)
    expected = metrics.confusion_matrix(labels, logits > 0)
    assert [[found.true_negative, found.false_positive], [found.false_negative, found.true_positive]] == (
        expected.tolist()
    )
    assert found.patches == 200
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, logits > 0))
    assert found.sensitivity == pytest.approx(metrics.recall_score(labels, logits > 0))
    assert found.specificity == pytest.approx(metrics.recall_score(1 - labels, logits <= 0))
    assert Confusion(3, 0, 0, 0).sensitivity is None


def test_centres_share_the_patches_between_them():
    logits, labels = drawn(8)
    centres = torch.arange(200) % 3
    by_centre = confusion_by_centre(logits, labels, centres)
    assert list(by_centre) == [0, 1, 2]
    for name in ("true_negative", "false_positive", "false_negative", "true_positive"):
        assert sum(getattr(each, name) for each in by_centre.values()) == getattr(confusion(logits, labels), name)
