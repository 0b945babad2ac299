"""The README's table of what convlora, peft and LyCORIS can do on each kind of convolution.

    python -m benchmarks.libraries

One small layer of each kind gets an adapter of rank 4 with random factors. A library passes if the merged layer's
output equals the adapted one's, within 1e-4 of its size, and differs from the base's. The last rows test whether
unmerging restores the base's bits, and whether a network with BatchNorm, after one step in train mode, predicts the
same when it is saved and loaded into a fresh base.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

import convlora

from .overhead.peers import library, their_warnings_aside
from .overhead.tables import as_markdown

Outputs = Iterator[torch.Tensor]
"""Outputs of the adapted layer, then of the merged one."""


def _standardised() -> nn.Module:
    layer: nn.Module = library("timm.layers", "timm").StdConv2d(8, 8, 3)
    return layer


KINDS: dict[str, Callable[[], nn.Module]] = {
    "3×3, strided": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "1-D": lambda: nn.Conv1d(8, 8, 3),
    "3-D": lambda: nn.Conv3d(8, 8, 3),
    "grouped": lambda: nn.Conv2d(8, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "dilated": lambda: nn.Conv2d(8, 8, 3, dilation=2),
    "padding_mode='circular'": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3),
    "timm's StdConv2d": _standardised,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
}


def _randomise(module: nn.Module, marks: tuple[str, ...]) -> None:
    for name, parameter in module.named_parameters():
        if any(mark in name for mark in marks):
            nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def ours(base: nn.Module, x: torch.Tensor) -> Outputs:
    """Outputs with convlora: inject, then merge."""
    model = convlora.inject(nn.Sequential(base), 4, modules_to_save=None).eval()
    for parameter in convlora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    yield model(x)
    yield convlora.merge(model)(x)


@torch.no_grad()
def pefts(base: nn.Module, x: torch.Tensor) -> Outputs:
    """Outputs with peft: LoraConfig, then merge_and_unload."""
    lib = library("peft", "peft")
    model = lib.get_peft_model(nn.Sequential(base), lib.LoraConfig(r=4, target_modules=["0"])).eval()
    _randomise(model, ("lora_",))
    yield model(x)
    yield model.merge_and_unload()(x)


@torch.no_grad()
def lycoris(base: nn.Module, x: torch.Tensor) -> Outputs:
    """Outputs with LyCORIS: LoCon, then merge_to."""
    adapter = library("lycoris.modules.locon", "lycoris-lora").LoConModule("layer", base, 1.0, 4, 8)
    _randomise(adapter, ("lora_",))
    adapter.apply_to()
    yield base(x)
    adapter.restore()
    adapter.merge_to(1.0)
    yield base(x)


LIBRARIES: dict[str, tuple[str, Callable[[nn.Module, torch.Tensor], Outputs]]] = {
    "convlora": ("convlora", ours),
    "peft": ("peft", pefts),
    "LyCORIS": ("lycoris-lora", lycoris),
}


def outcome(adapt: Callable[[nn.Module, torch.Tensor], Outputs], make: Callable[[], nn.Module]) -> str:
    """A cell of the table: the result of one kind of layer in one library."""
    torch.manual_seed(0)
    base = make().eval()
    dimensions = {"Conv1d": 1, "Conv3d": 3}.get(type(base).__name__, 2)
    x = torch.randn(2, 8, *([9] * dimensions))
    with torch.no_grad():
        plain = base(x)
    outputs: list[torch.Tensor] = []
    try:
        with their_warnings_aside():
            outputs.extend(adapt(base, x))  # keeps the outputs before an error
    except Exception:  # any error is a result
        return "error in merging" if outputs else "error"
    before, merged = outputs
    if torch.allclose(before, plain):
        return "no effect"
    error = ((merged - before).norm() / before.norm()).item()
    return "yes" if error < 1e-4 else f"merged {100 * error:.0f} % off"


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def _step(model: nn.Module) -> torch.Tensor:
    """One step in train mode; returns images to predict."""
    images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(images).square().mean().backward()
    optimizer.step()
    model.eval()
    return images


def _same(one: Any, other: Any, images: torch.Tensor) -> str:
    with torch.no_grad():
        return "yes" if torch.equal(one.eval()(images), other.eval()(images)) else "no"


def properties(folder: Path) -> dict[str, tuple[str, str, str]]:
    """Rows on whole networks; LyCORIS has no call that unmerges."""
    peft_lib = library("peft", "peft")
    config = {"r": 4, "target_modules": ["0", "3"]}
    model = convlora.inject(_network(), 4, norm="track", modules_to_save=None)
    images = _step(model)
    convlora.save_adapter(model, folder / "ours")
    reloaded = _same(convlora.load_adapter(_network(), folder / "ours"), model, images)
    convlora.remove(convlora.unmerge(convlora.merge(model)))
    returned = all(torch.equal(a, b) for a, b in zip(model.parameters(), _network().parameters(), strict=True))

    wrapped: Any = peft_lib.get_peft_model(_network(), peft_lib.LoraConfig(**config))
    images = _step(wrapped)
    wrapped.save_pretrained(folder / "peft")
    peft_reloaded = _same(peft_lib.PeftModel.from_pretrained(_network(), folder / "peft"), wrapped, images)
    weights = [layer.weight for layer in wrapped.modules() if type(layer) is nn.Conv2d and layer.weight.shape[0] != 4]
    before = [weight.detach().clone() for weight in weights]
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    peft_returned = all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    word = {True: "yes", False: "no"}
    return {
        "merging and taking it back returns the base's bits": (word[returned], word[peft_returned], "no such call"),
        "the same prediction after saving and loading, BatchNorm moved": (reloaded, peft_reloaded, "not measured"),
    }


def table() -> str:
    """The table in Markdown."""
    head = ("", *(f"{name} {metadata.version(package)}" for name, (package, _) in LIBRARIES.items()))
    rows = [(kind, *(outcome(adapt, make) for _, adapt in LIBRARIES.values())) for kind, make in KINDS.items()]
    with tempfile.TemporaryDirectory() as folder, their_warnings_aside():
        rows += [(name, *cells) for name, cells in properties(Path(folder)).items()]
    return as_markdown([head, *rows])


if __name__ == "__main__":
    print(table())
