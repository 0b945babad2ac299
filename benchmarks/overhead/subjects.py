"""The measured networks of convlora and torch: a base prepared for each way of training or running it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import convlora
from convlora._layer.adapted import AdaptedLayer, held
from convlora._layer.kept import Kept
from convlora._model.options import Options
from convlora._plan import NormPolicy

if TYPE_CHECKING:
    from typing_extensions import Unpack

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


class NotAvailable(Exception):
    """A peer is not installed, or refuses the network; the message says why."""


@dataclass
class Subject:
    """A prepared network with its ``requires_grad`` flags set."""

    model: nn.Module
    convolutions: int
    """The number of convolutions."""
    adapted: int = 0
    """The number of convolutions with an adapter."""
    write: Callable[[Path], object] | None = None
    """Writes the adapter into a folder as its library does; if None, the tensors that moved are the file."""
    before: Callable[[], object] | None = None
    """Called before each run, without being timed."""


@dataclass(frozen=True)
class Arm:
    """A method that is compared, with its name."""

    name: str
    what: str
    build: Callable[[nn.Module, int], Subject]
    """Makes a subject from a fresh base network and a rank."""
    norms: Literal["moving", "constant", "own"] = "own"
    """Whether norm statistics move in training, are held constant, or are left to the library."""

    def ready(self, subject: Subject) -> None:
        """Put the subject in train mode, with the method's norm statistics."""
        subject.model.train()
        if self.norms == "constant":
            for module in subject.model.modules():
                if isinstance(module, _NormBase):
                    module.eval()


def make_base(name: str, classes: int = 2) -> nn.Module:
    """A network of timm, or ``torchvision:NAME``, with random weights.

    Norms whose scale starts at zero get a small one, as trained networks have: behind a scale of zero all gradients are
    zero.
    """
    torch.manual_seed(0)
    model: nn.Module
    if name.startswith("torchvision:"):
        models = importlib.import_module("torchvision.models")
        model = models.get_model(name.removeprefix("torchvision:"), num_classes=classes)
    else:
        model = importlib.import_module("timm").create_model(name, num_classes=classes)
    for module in model.modules():
        scale = module._parameters.get("weight")
        if isinstance(module, NORMS) and scale is not None and not scale.any():
            nn.init.constant_(scale, 0.25)
    return model


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Every two-dimensional convolution by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The modules that every adapter trains in full."""
    return convlora.plan(model, 1).modules_to_save


def heads(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of :func:`head_names`."""
    return (model.get_submodule(name) for name in head_names(model))


def train_only(model: nn.Module, *modules: nn.Module) -> None:
    """Freeze the model except these modules' parameters."""
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)


def full(model: nn.Module, rank: int) -> Subject:
    """Full fine-tuning."""
    return Subject(model.requires_grad_(True), len(convolutions(model)))


def probe(model: nn.Module, rank: int) -> Subject:
    """The head alone."""
    train_only(model, *heads(model))
    return Subject(model, len(convolutions(model)))


def norms_and_head(model: nn.Module, rank: int) -> Subject:
    """Scale and shift of every norm layer, and the head."""
    train_only(model, *(module for module in model.modules() if isinstance(module, NORMS)), *heads(model))
    return Subject(model, len(convolutions(model)))


def adapted(**options: Unpack[Options]) -> Callable[[nn.Module, int], Subject]:
    """convlora's adapter with these options of :func:`convlora.inject`."""

    def build(model: nn.Module, rank: int) -> Subject:
        count = len(convolutions(model))
        convlora.inject(model, rank, **options)
        layers = sum(isinstance(module, AdaptedLayer) for module in model.modules())
        return Subject(model, count, layers, write=lambda folder: convlora.save_adapter(model, folder))

    return build


def lower_bound(norm: NormPolicy = "freeze") -> Callable[[nn.Module, int], Subject]:
    """The least that any adapter of all layers costs: the gradient goes back to the first convolution's output.

    Only the head trains; convolutions are the base's own, and norms are as in convlora.
    """

    def build(model: nn.Module, rank: int) -> Subject:
        layers = list(convolutions(model).values())
        convlora.inject(model, rank, target_modules=(), norm=norm)
        layers[0].register_forward_hook(lambda layer, inputs, y: y.requires_grad_() if torch.is_grad_enabled() else y)
        return Subject(model, len(layers), write=lambda folder: convlora.save_adapter(model, folder))

    return build


def unmerged(model: nn.Module, rank: int) -> Subject:
    """convlora's adapter, unmerged, with factors that are not zero."""
    subject = adapted()(model, rank)
    for parameter in convlora.adapter_parameters(model):
        nn.init.normal_(parameter, std=1e-2)
    return subject


def merged(model: nn.Module, rank: int) -> Subject:
    """convlora's adapter, merged into plain weights."""
    subject = unmerged(model, rank)
    convlora.merge(model)
    return subject


def not_kept(model: nn.Module, rank: int) -> Subject:
    """convlora's adapter, unmerged; the kept weights are dropped before each run, so that each run computes W + ΔW."""
    subject = unmerged(model, rank)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]

    def drop() -> None:
        for layer in layers:
            held(layer).kept = Kept()

    subject.before = drop
    return subject
