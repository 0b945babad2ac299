"""convlora and peft under one interface: inject, merge, unmerge, save, load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import convlora

from .cases import Case

RANK, ALPHA = 8, 16.0


@dataclass(frozen=True)
class LayerFactors:
    """One layer's B and A, as stored, and the scaling of their product."""

    a: Tensor
    b: Tensor
    scaling: float

    def delta(self, weight: Tensor) -> Tensor | None:
        """ΔW from its definition; None if the factors have other shapes than ``(r, …)`` and ``(C_out, r)``."""
        a, b = self.a.detach().flatten(1), self.b.detach().flatten(1)
        if b.shape[1] != a.shape[0] or b.shape[0] * a.shape[1] != weight.numel():
            return None
        return (self.scaling * torch.einsum("or,ri->oi", b, a)).reshape(weight.shape).to(weight.dtype)


class Library(Protocol):
    """The calls that the check makes on a library."""

    name: str

    def inject(self, model: nn.Module, case: Case) -> nn.Module:
        """Inject an adapter of rank 8 into the case's layers; returns the module to call."""

    def factors(self, adapted: nn.Module) -> dict[str, LayerFactors]:
        """The factors of each adapted layer, by the layer's name in the base."""

    def held(self, adapted: nn.Module) -> list[str]:
        """Names of the norms that stay in eval mode in training."""

    def merge(self, adapted: nn.Module) -> None:
        """Fold in."""

    def unmerge(self, adapted: nn.Module) -> None:
        """Take back."""

    def save(self, adapted: nn.Module, folder: Path) -> None:
        """Write the adapter."""

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Load the adapter into a fresh base."""


class Convlora:
    """convlora, used as in the README."""

    name = "convlora"

    def inject(self, model: nn.Module, case: Case) -> nn.Module:
        """Inject in place, with factors in every layer, as the other libraries do, and no layer trained in full."""
        return convlora.inject(model, RANK, alpha=ALPHA, method_pattern={"*": "lora"})

    def factors(self, adapted: nn.Module) -> dict[str, LayerFactors]:
        """The factors in the children of the adapted layers."""
        layers = {layer.name: adapted.get_submodule(layer.name) for layer in convlora.summary(adapted).layers}
        loras: dict[str, Any] = {name: layer.get_submodule("convlora.default") for name, layer in layers.items()}
        return {name: LayerFactors(lora.lora_A, lora.lora_B, lora.scaling) for name, lora in loras.items()}

    def held(self, adapted: nn.Module) -> list[str]:
        """The norms that the plan lists."""
        return list(convlora.summary(adapted).norms)

    def merge(self, adapted: nn.Module) -> None:
        """In place."""
        convlora.merge(adapted)

    def unmerge(self, adapted: nn.Module) -> None:
        """In place."""
        convlora.unmerge(adapted)

    def save(self, adapted: nn.Module, folder: Path) -> None:
        """Write one file of tensors."""
        convlora.save_adapter(adapted, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """In place."""
        return convlora.load_adapter(model, folder)

    def remove(self, adapted: nn.Module) -> None:
        """Remove the adapter."""
        convlora.remove(adapted)


def convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    """Every convolution of torch's classes by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}


def is_plain(layer: _ConvNd) -> bool:
    """Whether a convolution is neither grouped nor transposed; peft accepts few of the others."""
    return layer.groups == 1 and not layer.transposed


class Peft:
    """Hugging Face peft's LoRA in the same layers; ``every=False`` skips grouped and transposed ones."""

    def __init__(self, every: bool = True) -> None:
        self.every = every
        self.name = "peft" if every else "peft_plain"

    def inject(self, model: nn.Module, case: Case) -> nn.Module:
        """Inject into every convolution, by full names; a list of names would also match as suffixes."""
        import peft

        names = [re.escape(name) for name, layer in convolutions(model).items() if self.every or is_plain(layer)]
        config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="|".join(names))
        adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted

    def factors(self, adapted: nn.Module) -> dict[str, LayerFactors]:
        """The factors in peft's layers."""
        from peft.tuners.lora import LoraLayer

        base: Any = adapted.get_base_model()  # type: ignore[operator]
        found = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
        return {
            name: LayerFactors(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
            for name, layer in found.items()
        }

    def held(self, adapted: nn.Module) -> list[str]:
        """The norms that convlora freezes: peft saves no statistics, so a careful user would freeze them."""
        base: Any = adapted.get_base_model()  # type: ignore[operator]
        named = base.named_modules()
        return [name for name, m in named if any(key.startswith("running_") for key in m._buffers)]

    def merge(self, adapted: nn.Module) -> None:
        """In place."""
        adapted.merge_adapter()  # type: ignore[operator]

    def unmerge(self, adapted: nn.Module) -> None:
        """In place."""
        adapted.unmerge_adapter()  # type: ignore[operator]

    def save(self, adapted: nn.Module, folder: Path) -> None:
        """Write factors and configuration."""
        adapted.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Load around a fresh base."""
        import peft

        loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
        return loaded
