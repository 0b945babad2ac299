"""The comparison: an equal learning-rate sweep for every trained method, several seeds, paired differences.

The sweep uses the first seed. While its best rate is the lowest or highest tried, it is extended at that end, twice at
most. The rate with the lowest validation loss trains the other seeds; the test set is not used. If the best rate is
still the lowest or highest, the report says so, since a better one may lie beyond.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.dataset import HistoDataset
from ..errors import ExampleError
from ..methods.method import Method, Predict
from ..training.processes import Job
from ..training.recipe import DIVERGED, Recipe
from . import rates
from .experiment import Result, run_method
from .sending import Answer, Here, Trainings, everything_there

TABLE = (
    "probe,probe-augmented,probe-centre-ensemble,norms,full,lora,lora-lean,lora-track,"
    "lora-ensemble,lora-balanced,lora-adabn,probe-augmented+balanced,full+ensemble"
)

# The challenge report's figures, single runs on the challenge's data: method -> (backbone, validation, test).
REPORTED = {
    "probe": [("ResNet50", ".8285", ".8981"), ("DINOv2", ".8745", ".9056")],
    "probe-augmented": [("DINOv2", ".8803", "-")],
    "probe-centre-ensemble": [("DINOv2", ".8935", ".9350")],
    "probe-centre-ensemble+balanced": [("DINOv2", ".8935", ".9432")],
    "lora-track": [("ResNet50", ".9391", ".9451")],
}
RESAMPLES = 2000
CHALLENGE = {"train": (100_000, {0, 3, 4}), "val": (34_904, {1}), "test": (85_054, {2})}


@dataclass(frozen=True)
class Sweep:
    """Validation losses of one training on the first seed, by learning rate."""

    training: str
    losses: dict[float, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The rate with the lowest validation loss."""
        return min(self.losses, key=lambda lr: self.losses[lr])

    @property
    def beyond(self) -> float | None:
        """The next rate beyond the end at which the best one lies; None if the best lies inside."""
        return rates.beyond(self.losses, self.best)

    def __str__(self) -> str:
        each = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in sorted(self.losses.items()))
        return f"{self.training}: {self.best:g} ({each}){'' if self.beyond is None else ', the end of the sweep'}"


def compare(
    methods: Sequence[Method],
    splits: Mapping[str, HistoDataset],
    recipe: Recipe,
    lrs: Sequence[float],
    seeds: int,
    job: Job,
    trainings: Trainings | None = None,
) -> tuple[list[Result], list[Sweep]]:
    """Sweep each training once, then run every method with every seed at the training's best rate.

    Args:
        methods: methods, the rows of the table.
        splits: "train", "val" and "test".
        recipe: the recipe of the first seed.
        lrs: learning rates to sweep.
        seeds: number of seeds, from the recipe's seed up.
        job: folder and processes.
        trainings: where trainings run; None for one after the other in this process.
    """
    trainings = trainings or Here(splits, job)
    shared = {method.training: method for method in methods}
    plain = [dataclasses.replace(method, name=name, predict=Predict()) for name, method in shared.items()]
    sweeps = sweep(plain, recipe, lrs, job, trainings)
    rows = [
        (method, dataclasses.replace(recipe, seed=seed, lr=sweeps[method.training].best))
        for seed in range(recipe.seed, recipe.seed + seeds)
        for method in methods
    ]
    if not isinstance(trainings, Here):
        # Trainings first: methods that share a training must find it done.
        kept = {(method.training, each.seed): (method, each) for method, each in rows}
        _wait([trainings.ran(_plain(method), each, suffix(each)) for method, each in kept.values()])
        others = [(method, each) for method, each in rows if method.predict != Predict()]
        _wait([trainings.ran(method, each, suffix(each)) for method, each in others])
        job = everything_there(job)
    results = [run_method(method, splits, each, job, suffix=suffix(each)) for method, each in rows]
    return results, list(sweeps.values())


def _plain(method: Method) -> Method:
    return dataclasses.replace(method, name=method.training, predict=Predict())


def _wait(sent: Sequence[Answer]) -> None:
    for each in sent:
        each.result()


def sweep(
    methods: Sequence[Method], recipe: Recipe, lrs: Sequence[float], job: Job, trainings: Trainings
) -> dict[str, Sweep]:
    """Train each method at each rate, then beyond the end that is best; a diverged training has an infinite loss."""
    sweeps = {method.training: Sweep(method.training) for method in methods}
    asked = [(method, lr) for method in methods for lr in lrs]
    for _ in range(1 + rates.FURTHER):
        sent = [
            (method.training, lr, _sent(method, dataclasses.replace(recipe, lr=lr), trainings)) for method, lr in asked
        ]
        for training, lr, future in sent:
            sweeps[training].losses[lr] = _val_loss(future, job, may_fail=len(lrs) > 1)
        beyond = [(method, sweeps[method.training].beyond) for method in methods]
        asked = [(method, lr) for method, lr in beyond if lr is not None]
    return sweeps


def _sent(method: Method, recipe: Recipe, trainings: Trainings) -> Answer:
    return trainings.tried(method, recipe, f"{method.training}{suffix(recipe)}")


def _val_loss(future: Answer, job: Job, may_fail: bool) -> float:
    try:
        return float(future.result())
    except ExampleError as error:
        if not may_fail or DIVERGED not in str(error):
            raise
        job.console.print(str(error), highlight=False)
        return math.inf


def suffix(recipe: Recipe) -> str:
    """The ending of the names of a training's files, after its method."""
    return f"-lr{recipe.lr:g}-seed{recipe.seed}"


@dataclass(frozen=True)
class Truth:
    """Labels and centres ``(N,)`` of a split; a centre is -1 if none is named."""

    labels: Tensor
    centres: Tensor
    units: Tensor | None = None
    """``(N,)``: number of each patch's patient or slide, if the data name them."""
    unit: str = "patch"
    """The unit that is resampled for intervals."""


@dataclass(frozen=True)
class Difference:
    """The accuracy of one method minus another's on the same patches, mean over seeds, with a 95 % interval.

    ``split`` is "test" or "val". ``unit`` is the unit that was resampled: patients, slides or patches. The ends of the
    interval are None if there is one unit only.
    """

    first: str
    second: str
    mean: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    split: str = "test"
    unit: str = "patch"

    def __str__(self) -> str:
        each = ", ".join(f"{value:+.3f}" for value in self.by_seed)
        what = {"test": "test", "val": "validation"}[self.split]
        spread = f"no interval from one {self.unit}" if self.low is None else f"{self.low:+.4f}, {self.high:+.4f}"
        return f"{self.first} − {self.second}, {what} accuracy: {self.mean:+.4f} [{spread}] (by seed {each})"


def difference(first: Sequence[Result], second: Sequence[Result], truth: Truth, split: str = "test") -> Difference:
    """The difference of two methods, paired by seed and patch, with a percentile bootstrap over the data's units.

    The interval shows how much the difference varies between patients, slides or patches, not between seeds, which
    ``by_seed`` shows. If the data name neither patients nor slides, patches are resampled, and the interval is too
    narrow where patches resemble each other, as those of one slide do.

    Args:
        first: results of one method.
        second: results of the other; seeds of only one of the two are ignored.
        truth: the split's truth.
        split: "test" or "val".

    Raises:
        ValueError: no seed in common.
    """
    control = {result.seed: result for result in second}
    pairs = [(result, control[result.seed]) for result in first if result.seed in control]
    if not pairs:
        raise ValueError("the two methods have no seed in common")
    right = [[((r.logits(split) > 0) == truth.labels.bool()).double() for r in pair] for pair in pairs]
    gains = torch.stack([a - b for a, b in right])
    low, high = _interval(gains.mean(0).numpy(), truth.units)
    by_seed = tuple(gains.mean(1).tolist())
    return Difference(first[0].method, second[0].method, float(gains.mean()), low, high, by_seed, split, truth.unit)


def _interval(each: npt.NDArray[np.float64], units: Tensor | None) -> tuple[float | None, float | None]:
    """The 95 % interval of the patches' mean by resampling whole units."""
    own = np.arange(len(each)) if units is None else np.unique(units.numpy(), return_inverse=True)[1]
    sums, sizes = np.bincount(own, each), np.bincount(own)
    count = len(sizes)
    if count < 2:
        return None, None
    rng = np.random.default_rng(0)
    drawn = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    low, high = np.quantile([(times @ sums) / (times @ sizes) for times in drawn], (0.025, 0.975))
    return float(low), float(high)


def differences(results: Sequence[Result], truths: Mapping[str, Truth]) -> list[Difference]:
    """Every method minus the probe with the same augmentation, and LoRA minus every other trained method.

    Args:
        results: results of any methods and seeds.
        truths: truth of the splits that have labels. The test set is used or, if it has no labels, validation, which
            also chose the learning rate and the epoch, so that these differences are optimistic.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.method, []).append(result)
    split = next((name for name in ("test", "val") if name in truths), None)
    if split is None or any(len(result.logits(split)) != len(truths[split].labels) for result in results):
        return []
    control = next((name for name in ("probe-augmented", "probe") if name in groups), None)
    pairs: list[tuple[str, str]] = [(name, control) for name in groups if control is not None and name != control]
    pairs += [("lora", name) for name in groups if "lora" in groups and name in ("norms", "full", "full-track")]
    return [difference(groups[a], groups[b], truths[split], split) for a, b in pairs]


def is_the_challenge(splits: Mapping[str, HistoDataset]) -> bool:
    """Whether these are all of the challenge's data: by size and centres, and no attribute ``source``."""
    return all(
        name in splits
        and splits[name].source is None
        and len(splits[name]) == size
        and set(torch.as_tensor(splits[name].centres).tolist()) == centres
        for name, (size, centres) in CHALLENGE.items()
    )


def reported(methods: Sequence[str], splits: Mapping[str, HistoDataset]) -> list[str]:
    """The challenge report's figures for these methods, if the data are the same."""
    if not is_the_challenge(splits):
        return []
    return [
        f"The challenge report's {name}, {backbone}, a single run: validation {val}, test {test}."
        for name in methods
        for backbone, val, test in REPORTED.get(name, [])
    ]
