"""The costs of each method: parameters, file, time and memory.

Memory is measured here, in one step on the recipe's batch for each training, see `memory`. Times are from the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..runs.experiment import Result, has_fixed_images, open_backbone, read_card
from ..training.memory import step_bytes
from ..training.recipe import pick_device, place

HEADER = ("method", "parameters", "trainable", "share", "adapter", "all weights", "epochs", "training", "step memory")


@dataclass(frozen=True)
class Cost:
    """One method's costs; times are means over seeds. ``step_bytes`` is None with cached features."""

    method: str
    parameters: int
    trainable: int
    adapter_bytes: int
    epochs: float
    seconds: float
    step_bytes: int | None

    def row(self) -> list[str]:
        """Cells under `HEADER`."""
        return [
            self.method,
            f"{self.parameters:,}",
            f"{self.trainable:,}",
            f"{self.trainable / self.parameters:.2%}",
            f"{self.adapter_bytes / 1e6:.2f} MB",
            f"{4 * self.parameters / 1e6:.1f} MB",
            f"{self.epochs:.3g}",
            f"{self.seconds:,.1f} s",
            "features cached" if self.step_bytes is None else f"{self.step_bytes / 1e6:,.0f} MB",
        ]


def costs(results: Mapping[str, Sequence[Result]]) -> list[Cost]:
    """The costs of each method.

    Raises:
        ExampleError: an adapter's folder or the backbone's weights are gone.
    """
    measured: dict[str, int | None] = {}
    found = []
    for name, own in results.items():
        training = read_card(own[0].adapter)[1].training_parts()
        key = str(training)
        if key not in measured:
            measured[key] = _step_bytes(own[0])
        found.append(
            Cost(
                method=name,
                parameters=own[0].parameters,
                trainable=own[0].trainable,
                adapter_bytes=own[0].adapter_bytes,
                epochs=statistics.mean(len(result.history) for result in own),
                seconds=statistics.mean(sum(epoch.seconds for epoch in result.history) for result in own),
                step_bytes=measured[key],
            )
        )
    return found


def _step_bytes(result: Result) -> int | None:
    recipe, method = read_card(result.adapter)
    if method.frozen_backbone and has_fixed_images(method, recipe):
        return None
    model = place(method.prepare(open_backbone(recipe)[0], recipe.rank), pick_device())
    return step_bytes(model, recipe.batch_size, recipe.image_size, method.to_train_mode)
