"""What an injected model remembers, so that everything can be taken back.

One :class:`Injection` is kept on the module that was given to ``inject``. It refers to modules, not only to names, so
that it follows deepcopy and pickle, and can tell where the user has replaced a part since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ._functional import move_like
from ._layer import CHILD, AdaptedLayer
from ._norms import FrozenNorm
from ._plan import Plan
from .errors import StateError

RECORD = "_convlora"


@dataclass
class Taken:
    """A tensor of the base whose place in its module the adapter's own tensor has taken."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def place(self) -> dict[str, Tensor | None]:
        """The module's parameters or buffers."""
        parameters: dict[str, Tensor | None] = self.module._parameters  # type: ignore[assignment]
        return parameters if self.is_parameter else self.module._buffers

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter; else a buffer."""
        return isinstance(self.tensor, nn.Parameter)

    def give_back(self) -> None:
        """Put the base's tensor back, bit for bit, on the device and in the dtype that the model has by now."""
        self.place[self.name] = move_like(self.tensor, self.place.get(self.name))


@dataclass
class Injection:
    """What was done to a model, in the order in which it was done."""

    plan: Plan
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Every module that the plan names."""
    taken: list[Taken] = field(default_factory=list)
    """The base's tensors in whose place are the adapter's own: the modules trained in full, tracked norms, buffers."""
    frozen: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Base parameters that were trainable, as (module, name)."""
    norms: list[nn.Module] = field(default_factory=list)
    """Norm layers frozen in place."""
    layers: list[nn.Module] = field(default_factory=list)
    """Adapted layers, in the plan's order."""

    @property
    def is_merged(self) -> bool:
        """Whether the merged weights are in the base's place; the plan's state says so."""
        return self.plan.state == "merged"


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


def the_injection(model: nn.Module) -> tuple[nn.Module, Injection]:
    """The one injected module in the model and its record.

    Raises:
        StateError: there is none, or there are several.
    """
    found = injected(model)
    if len(found) > 1:
        names = ", ".join(name or "the model" for name, _, _ in found)
        raise StateError(f"{type(model).__name__} holds several injected parts ({names}); give one of them.")
    return found[0][1], found[0][2]


def check_plain(model: nn.Module) -> None:
    """Raise StateError where a part of the model carries an adapter already, or is a part of what does."""
    for name, _, injection in injections(model):
        raise StateError(
            f"{name or type(model).__name__} carries the adapter {injection.plan.adapter_name!r} already; "
            "call convlora.remove(model) first. Nothing was changed."
        )
    for name, module in model.named_modules():
        if isinstance(module, (AdaptedLayer, FrozenNorm)) or CHILD in module._modules:
            raise StateError(
                f"{name or type(model).__name__} belongs to a model that carries an adapter already; "
                "call convlora.remove on that model first. Nothing was changed."
            )


def check_intact(root: nn.Module, injection: Injection) -> None:
    """Raise StateError where a module that the adapter concerns was replaced since: it would be passed over."""
    now = dict(root.named_modules(remove_duplicate=False))
    replaced = [name or "the model" for name, module in injection.modules.items() if now.get(name) is not module]
    if replaced:
        raise StateError(
            f"{', '.join(replaced)} of {type(root).__name__} was replaced after convlora.inject, and the adapter is "
            "on the old module still. Change a model before you inject: convlora.remove(model), change, inject again."
        )


def to_the_end(step: Callable[[], None]) -> None:
    """Run a step that may be run twice; an interrupt is let through when all is done, so that no half is left."""
    try:
        step()
    except BaseException:
        step()
        raise
