"""The arms: each makes a pretrained network ready, and says what training may change in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import convlora
from benchmarks.overhead import peers
from benchmarks.overhead.subjects import NORMS, heads, train_only
from convlora._targets import modules_of

FULL = "full"


@dataclass(frozen=True)
class Arm:
    """A way of adapting, by name; ``build`` changes a fresh network and returns the one to train."""

    name: str
    what: str
    build: Callable[[nn.Module], nn.Module]
    tracks: bool = False
    """Whether statistics of norms move in training."""
    is_adapter: bool = False
    """Whether convlora's merge, save and load can be asked of it."""


def _full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _biases(model: nn.Module) -> nn.Module:
    train_only(model, *heads(model))
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            bias.requires_grad_(True)
    return model


def _norms(model: nn.Module) -> nn.Module:
    train_only(model, *(module for module in model.modules() if isinstance(module, NORMS)), *heads(model))
    return model


def _lora(model: nn.Module, **options: Any) -> nn.Module:
    return convlora.inject(model, **options)


def _lora_and_norms(model: nn.Module, rank: int) -> nn.Module:
    norms = [n.name for n in modules_of(model) if isinstance(n.module, NORMS)]
    return convlora.inject(model, rank, modules_to_save=(*norms, *convlora.plan(model, 1).modules_to_save))


def _peft(model: nn.Module, rank: int) -> nn.Module:
    return peers.peft(model, rank).model


def _adapter(name: str, what: str, tracks: bool = False, **options: Any) -> Arm:
    return Arm(name, what, partial(_lora, **options), tracks, is_adapter=True)


_ALL = (
    _adapter("probe", "the head alone", target_modules=()),
    Arm("biases", "every bias, and the head", _biases),
    Arm("norms", "scale and shift of norms, and the head", _norms),
    *(_adapter(f"lora-{r}", f"inject(model, rank={r})", rank=r) for r in (1, 2, 4, 8, 16, 32)),
    _adapter("lora-8-track", 'rank 8, norm="track"', tracks=True, rank=8, norm="track"),
    _adapter("lora-8-alpha-8", "rank 8, alpha 8: a scaling of 1", rank=8, alpha=8),
    _adapter("lora-8-alpha-64", "rank 8, alpha 64: a scaling of 8", rank=8, alpha=64),
    _adapter("rslora-8", "rank 8, use_rslora", rank=8, use_rslora=True),
    _adapter("dora-8", "rank 8, use_dora", rank=8, use_dora=True),
    _adapter("pissa-8", 'rank 8, init="pissa"', rank=8, init="pissa"),
    _adapter("olora-8", 'rank 8, init="olora"', rank=8, init="olora"),
    _adapter("orthogonal-8", 'rank 8, init="orthogonal"', rank=8, init="orthogonal"),
    _adapter("budget-2%", 'ranks by size, budget="2%"', budget="2%"),
    Arm("lora-8-norms", "rank 8, and norms trained in full", partial(_lora_and_norms, rank=8), True, True),
    Arm("peft-8", "peft LoRA of rank 8 on the layers that it accepts", partial(_peft, rank=8)),
    Arm("full-freeze", "full fine-tuning, norm statistics constant", _full),
    Arm(FULL, "full fine-tuning", _full, tracks=True),
)
ARMS = {arm.name: arm for arm in _ALL}
FEW = ("probe", "norms", "lora-1", "lora-8", "dora-8", "lora-8-norms", "full-freeze", FULL)
"""The arms of the few-shot tasks."""
SECOND = (
    *FEW,
    "biases",
    "lora-2",
    "lora-32",
    "lora-8-track",
    "lora-8-alpha-8",
    "lora-8-alpha-64",
    "pissa-8",
    "budget-2%",
)
"""The arms of the second backbone: those that the choice of defaults hangs on."""
QUICK = ("probe", "norms", "lora-8", FULL)
"""The arms of a quick run."""
