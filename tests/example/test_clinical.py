"""Numbers to publish: scikit-learn's where it has them; intervals cover, threshold and temperature are the best."""

from conftest import need, need_extra

need_extra("histopathology")
need("sklearn")

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from examples.histopathology.runs import clinical
from examples.histopathology.runs.clinical import (
    SPECIFICITY,
    estimates,
    numbered,
    operating_point,
    temperature,
    youden_threshold,
)


def drawn(seed: int, size: int = 300, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (size,), generator=generator)
    logits = 1.5 * torch.randn(size, generator=generator) + labels
    return (logits.round() if ties else logits), labels


def values(*args, **options) -> dict[str, float | None]:
    return {name: each.value for name, each in estimates(*args, **options).items()}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_scikit_learns(seed, ties):
    logits, labels = drawn(seed, ties=ties)
    found = values(logits, labels, threshold=0.3)
    called = logits >= 0.3
    false, true, _ = metrics.roc_curve(labels, logits, drop_intermediate=False)
    expected = {
        "auroc": metrics.roc_auc_score(labels, logits),
        "auprc": metrics.average_precision_score(labels, logits),
        "sensitivity_at": true[false <= 1 - SPECIFICITY + 1e-12].max(),
        "f1": metrics.f1_score(labels, called),
        "sensitivity": metrics.recall_score(labels, called),
        "specificity": metrics.recall_score(1 - labels, ~called),
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_patch_that_is_drawn_twice_counts_as_two_patches():
    logits, labels = drawn(4, 60, ties=True)
    weights = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))
    ranked = clinical._Ranked(logits, labels, 0.5)
    weighted = ranked.measure(weights.double().numpy()[ranked.order])
    repeated = values(logits.repeat_interleave(weights), labels.repeat_interleave(weights), threshold=0.5)
    np.testing.assert_allclose(weighted, list(repeated.values()), atol=1e-12)


def test_intervals_hold_the_number_and_are_those_of_plain_resampling():
    logits, labels = drawn(1, 120)
    found = estimates(logits, labels, threshold=0.0)
    for each in found.values():
        assert each.low <= each.value <= each.high
    rng = np.random.default_rng(7)
    plain = []
    for _ in range(300):
        chosen = rng.integers(120, size=120)
        plain.append(metrics.roc_auc_score(labels[chosen], logits[chosen]))
    # Two bootstraps of 300 and 1,000 draws: their ends differ by chance in the third digit.
    assert (found["auroc"].low, found["auroc"].high) == pytest.approx(np.quantile(plain, (0.025, 0.975)), abs=0.02)


def test_patches_of_one_patient_are_drawn_together_so_that_copies_narrow_nothing():
    """Forty patients of one patch each, or of 25 equal ones: what is known is the same."""
    logits, labels = drawn(2, 40)
    alone = estimates(logits, labels)["auroc"]
    copies = logits.repeat_interleave(25), labels.repeat_interleave(25)
    patients = torch.arange(40).repeat_interleave(25)
    together = estimates(*copies, units=patients)["auroc"]
    assert (together.value, together.low, together.high) == pytest.approx((alone.value, alone.low, alone.high))
    apart = estimates(*copies)["auroc"]
    assert apart.high - apart.low < 0.4 * (alone.high - alone.low)


@pytest.mark.thorough
def test_of_a_hundred_intervals_about_95_cover_the_truth():
    truth = 0.5 * (1 + math.erf(1 / 3))  # two normals of spread 1.5, 1 apart
    covered = sum(
        found.low <= truth <= found.high
        for found in (estimates(*drawn(seed, 200), seed=seed)["auroc"] for seed in range(100, 200))
    )
    assert 88 <= covered <= 100  # binomial of 100 at .95: 88 is more than three deviations below


@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_is_better_on_validation(seed):
    logits, labels = drawn(seed, 50, ties=seed % 2 == 1)

    def index(threshold):
        called = logits >= threshold
        return metrics.recall_score(labels, called) + metrics.recall_score(1 - labels, ~called)

    chosen = youden_threshold(logits, labels)
    assert index(chosen) == pytest.approx(max(index(each) for each in [*logits.tolist(), 99.0]))


def test_logits_against_their_labels_call_nothing_positive_or_everything():
    assert youden_threshold(torch.tensor([2.0, 1.0]), torch.tensor([0, 1])) > 2
    threshold = youden_threshold(torch.tensor([2.0, 1.0]), torch.tensor([1, 0]))
    assert 1 < threshold < 2


@pytest.mark.parametrize("factor", [0.25, 1.0, 8.0])
def test_temperature_takes_back_what_made_logits_too_sure(factor):
    generator = torch.Generator().manual_seed(3)
    honest = 2 * torch.randn(4000, generator=generator)
    labels = (torch.rand(4000, generator=generator) < honest.sigmoid()).long()
    found = temperature(honest * factor, labels)
    assert found == pytest.approx(factor * temperature(honest, labels), rel=1e-3)
    assert found == pytest.approx(factor, rel=0.1)  # 4,000 labels tell a slope to a few hundredths


def test_labels_of_one_kind_have_no_number_and_one_patient_no_interval():
    assert values(torch.randn(5), torch.ones(5, dtype=torch.long)) == dict.fromkeys(clinical.NAMES)
    assert operating_point(torch.randn(5), torch.zeros(5)) == clinical.OperatingPoint(None, None)
    logits, labels = drawn(0, 20)
    one = estimates(logits, labels, units=torch.zeros(20, dtype=torch.long))["auroc"]
    assert (one.low, one.high) == (None, None) and one.value is not None
    assert str(one) == f"{one.value:.3f}"
    assert estimates(logits, labels)["f1"].value is None  # no threshold


def test_names_become_numbers_that_are_equal_where_they_are():
    assert numbered(["b", "a", "b", "c"]).tolist() == [1, 0, 1, 2]
