"""The measured networks of other libraries; each library is imported only when it is measured.

All of them get the rank, an alpha of twice the rank, and the same head trained in full.
"""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import nn

from .subjects import NotAvailable, Subject, convolutions, head_names, heads, train_only

PACKAGES = ("timm", "torchvision", "peft", "loralib", "lycoris-lora")
"""The libraries of the networks, and the compared libraries."""


def library(name: str, package: str) -> Any:
    """Import an optional library; raises NotAvailable if that fails."""
    try:
        with their_warnings_aside():
            return importlib.import_module(name)
    except ImportError as cause:
        missing = isinstance(cause, ModuleNotFoundError) and cause.name == name.partition(".")[0]
        why = "not installed" if missing else f"cannot be imported ({cause})"
        raise NotAvailable(f"{why}; pip install {package}") from cause


@contextmanager
def their_warnings_aside() -> Iterator[None]:
    """Silence other libraries' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def works(layer: Callable[[torch.Tensor], Any], conv: nn.Conv2d) -> bool:
    """Whether an adapted layer takes an input of the convolution and gives an output of its shape."""
    size = [d * (k - 1) + s + 1 for d, k, s in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)]
    x = torch.zeros(1, conv.in_channels, *size)
    try:
        with torch.no_grad():
            return bool(layer(x).shape == conv(x).shape)
    except (RuntimeError, ValueError, TypeError):
        return False


PEFT_CONFIGS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "lora": ("LoraConfig", lambda rank: {"r": rank, "lora_alpha": 2 * rank}),
    "loha": ("LoHaConfig", lambda rank: {"r": rank, "alpha": 2 * rank}),
    "lokr": ("LoKrConfig", lambda rank: {"r": rank, "alpha": 2 * rank}),
    "hira": ("HiraConfig", lambda rank: {"r": rank}),
    "ia3": ("IA3Config", lambda rank: {"feedforward_modules": []}),
    "oft": ("OFTConfig", lambda rank: {"r": 0, "oft_block_size": rank}),
    "boft": ("BOFTConfig", lambda rank: {"boft_block_size": rank, "boft_n_butterfly_factor": 2}),
    "hra": ("HRAConfig", lambda rank: {"r": rank}),
}
"""peft's configuration of each method: its class, and its options at a rank."""


def peft(model: nn.Module, rank: int, method: str = "lora") -> Subject:
    """Hugging Face peft's layers of a method on the convolutions that it accepts."""
    lib, found = library("peft", "peft"), convolutions(model)
    with their_warnings_aside():
        names = [name for name, conv in found.items() if _peft_takes(lib, conv, rank, method)]
        _refuse_none(names, found)
        targets, saved = "|".join(map(re.escape, names)), list(head_names(model))
        wrapped = lib.get_peft_model(model, _peft_config(lib, rank, method, targets, modules_to_save=saved))
    return Subject(wrapped, len(found), len(names), write=wrapped.save_pretrained)


def _peft_config(lib: Any, rank: int, method: str, targets: str | list[str], **more: Any) -> Any:
    name, options = PEFT_CONFIGS[method]
    if not hasattr(lib, name):
        raise NotAvailable(f"has no {name}")
    return getattr(lib, name)(target_modules=targets, **options(rank), **more)


def _peft_takes(lib: Any, conv: nn.Conv2d, rank: int, method: str) -> bool:
    """Whether peft accepts the convolution, by trying: it refuses a rank that the groups do not divide, for example."""
    if (
        method == "oft" and max(conv.kernel_size) > 1
    ):  # peft then sums overlapping patches, so a fresh adapter changes W
        return False
    config = _peft_config(lib, rank, method, ["0"])
    try:
        return works(lib.get_peft_model(nn.Sequential(copy.deepcopy(conv)), config), conv)
    except (ValueError, NotImplementedError):
        return False


def _refuse_none(adapted: list[Any], found: dict[str, nn.Conv2d]) -> None:
    if not adapted:
        raise NotAvailable(f"accepts none of the {len(found)} convolutions")


def peft_unmerged(model: nn.Module, rank: int) -> Subject:
    """peft's layers, with factors that are not zero."""
    subject = peft(model, rank)
    for name, parameter in subject.model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=1e-2)
    return subject


def peft_merged(model: nn.Module, rank: int) -> Subject:
    """peft's plain model after merging."""
    subject = peft_unmerged(model, rank)
    wrapped: Any = subject.model
    try:
        with their_warnings_aside():
            subject.model = wrapped.merge_and_unload()
    except NotImplementedError as cause:
        raise NotAvailable(f"does not merge: {cause}") from cause
    return subject


def loralib(model: nn.Module, rank: int) -> Subject:
    """loralib's layers: W + (B @ A) · scaling in each forward, rank r · k for a kernel of k × k, dense gradients."""
    lib, found, head = library("loralib", "loralib"), convolutions(model), list(heads(model))
    layers = {name: _loralib_layer(lib, conv, rank) for name, conv in found.items()}
    accepted = {name: layer for name, layer in layers.items() if layer is not None and works(layer, found[name])}
    _refuse_none(list(accepted), found)
    train_only(model)
    for name, layer in accepted.items():
        model.set_submodule(name, layer)
    for module in head:
        module.requires_grad_(True)
    return Subject(model, len(found), len(accepted))


def _loralib_layer(lib: Any, conv: nn.Conv2d, rank: int) -> nn.Module | None:
    """The convolution as a loralib layer; None if loralib has none (subclasses, kernels that are not square)."""
    if type(conv) is not nn.Conv2d or len(set(conv.kernel_size)) > 1:
        return None
    layer = lib.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        r=rank,
        lora_alpha=2 * rank,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    layer.conv.load_state_dict(conv.state_dict())
    layer.conv.requires_grad_(False)
    adapted: nn.Module = layer
    return adapted


LYCORIS_MODULES = {
    "lora": "locon.LoConModule",
    "dense": "full.FullModule",
    "loha": "loha.LohaModule",
    "lokr": "lokr.LokrModule",
    "ia3": "ia3.IA3Module",
    "oft": "diag_oft.DiagOFTModule",
    "boft": "boft.ButterflyOFTModule",
}
"""LyCORIS' class of each method, in ``lycoris.modules``."""


def lycoris(model: nn.Module, rank: int, method: str = "lora") -> Subject:
    """LyCORIS' modules of a method on every convolution that they accept, with default options."""
    file, name = LYCORIS_MODULES[method].split(".")
    make, found = getattr(library(f"lycoris.modules.{file}", "lycoris-lora"), name), convolutions(model)
    train_only(model, *heads(model))
    accepted = {name: conv for name, conv in found.items() if _lycoris_takes(make, conv, rank)}
    modules = [make(name.replace(".", "_"), conv, 1.0, rank, *_alpha(method, rank)) for name, conv in accepted.items()]
    _refuse_none(modules, found)
    for module in modules:
        module.apply_to()
    model.add_module("lycoris_modules", nn.ModuleList(modules))
    return Subject(model, len(found), len(modules))


def _alpha(method: str, rank: int) -> tuple[int, ...]:
    """The alpha, if it follows the rank; for rotations it is a bound instead, with no default."""
    return () if method in ("oft", "boft") else (2 * rank,)


def _lycoris_takes(make: Any, conv: nn.Conv2d, rank: int) -> bool:
    if type(conv) is not nn.Conv2d:
        return False
    try:
        trial = make("trial", copy.deepcopy(conv), 1.0, rank)
    except ValueError:  # no blocks of such a size
        return False
    trial.apply_to()
    return works(trial.org_module[0], conv)


def versions() -> dict[str, str]:
    """The installed version of each peer, and of the libraries that the networks come from."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
