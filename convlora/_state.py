"""What an injected model remembers, so that everything can be taken back.

One :class:`Injection` is kept on the module that was given to ``inject``. It refers to modules, not to names, so that
it follows deepcopy and pickle, and stays right where the user moves a part of the model elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ._plan import Plan
from .errors import StateError

RECORD = "_convlora"


@dataclass
class Taken:
    """A tensor of the base whose place in its module the adapter's own tensor has taken."""

    module: nn.Module
    name: str
    tensor: Tensor

    def give_back(self) -> None:
        """Put the base's tensor back, bit for bit, on the device and in the dtype that the model has by now."""
        place = self._place()
        now = place[self.name]
        if now is not None and (now.device, now.dtype) != (self.tensor.device, self.tensor.dtype):
            self.tensor.data = self.tensor.data.to(now.device, now.dtype)
        place[self.name] = self.tensor

    def replace(self, tensor: Tensor) -> None:
        """Put the adapter's tensor in the base's place."""
        self._place()[self.name] = tensor

    def _place(self) -> dict[str, Tensor | None]:
        parameters: dict[str, Tensor | None] = self.module._parameters  # type: ignore[assignment]
        return parameters if self.name in parameters else self.module._buffers


@dataclass
class Injection:
    """What was done to a model, in the order in which it was done."""

    plan: Plan
    frozen: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Base parameters that were trainable, as (module, name)."""
    taken: list[Taken] = field(default_factory=list)
    """Base tensors of the modules trained in full and, with norm="track", of the norm layers."""
    norms: list[nn.Module] = field(default_factory=list)
    """Norm layers frozen in place."""
    layers: list[nn.Module] = field(default_factory=list)
    """Adapted layers, in the plan's order."""
    merged: list[Taken] = field(default_factory=list)
    """Base weights aside while the merged ones are in their place; empty unless merged."""
    is_merged: bool = False


def injections(model: nn.Module) -> Iterator[tuple[str, nn.Module, Injection]]:
    """Every injected module in the model, with its name: the model itself, or parts, or what a wrapper holds."""
    for name, module in model.named_modules():
        if RECORD in vars(module):
            yield name, module, vars(module)[RECORD]


def injected(model: nn.Module) -> list[tuple[str, nn.Module, Injection]]:
    """As :func:`injections`, at least one.

    Raises:
        StateError: there is none.
    """
    found = list(injections(model))
    if not found:
        raise StateError(
            f"{type(model).__name__} carries no adapter. Call convlora.inject(model) first; if you injected into "
            "a larger model, give that one."
        )
    return found


def check_plain(model: nn.Module) -> None:
    """Raise StateError where a part of the model carries an adapter already."""
    for name, _, injection in injections(model):
        raise StateError(
            f"{name or type(model).__name__} carries the adapter {injection.plan.adapter_name!r} already; "
            "call convlora.remove(model) first. Nothing was changed."
        )
