"""The methods compared: what each one lets training change. Augmentation, data and learning rate are shared.

``lora-track`` is what the report did: its BatchNorm layers ran in train mode, so that their statistics moved.
``lora`` freezes them, which is this library's default. ``probe`` adapts no layer and is the control: what the
fresh head alone can do under the same augmentation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

import convlora

from .errors import ExampleError


@dataclass(frozen=True)
class Method:
    """A row of the table: which layers get factors, and what the norm layers do in training."""

    name: str
    about: str
    adapts_convolutions: bool
    norm: Literal["freeze", "track"]

    def prepare(self, model: nn.Module, rank: int) -> nn.Module:
        """Inject this method's adapter into a backbone, in place; the head always trains."""
        targets = None if self.adapts_convolutions else ()
        return convlora.inject(model, rank, target_modules=targets, norm=self.norm)


METHODS = {
    method.name: method
    for method in (
        Method("probe", "frozen backbone, new head", False, "freeze"),
        Method("lora", "LoRA on every convolution, norm statistics frozen", True, "freeze"),
        Method("lora-track", "LoRA on every convolution, norm statistics tracked (the report's way)", True, "track"),
    )
}


def find_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, in this order; an unknown, repeated or absent name is an ExampleError."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ExampleError(f"unknown method {', '.join(unknown) or '(none given)'}; known: {', '.join(METHODS)}.")
    if len(set(names)) < len(names):
        raise ExampleError(f"--methods {','.join(names)} names a method twice; name each once.")
    return [METHODS[name] for name in names]
