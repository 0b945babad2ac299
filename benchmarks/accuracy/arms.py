"""The methods that are compared: each prepares a pretrained network for training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convlora
from benchmarks.overhead import peers
from benchmarks.overhead.subjects import NORMS, heads, train_only
from convlora._model.targets import modules_of

FULL = "full"
EVERYWHERE, ALL_IMAGES, FIRST_ALONE = 3, 2, 1
"""Where a method is run: on every task of both backbones; with all images, on both; with all images, on the first."""
LEAN = {"freeze_A": True, "mask_activations": True}
Batches = Sequence[tuple[Tensor, Tensor]]
"""Normalised images, and labels."""


@dataclass(frozen=True)
class Arm:
    """A method with its name; ``build`` changes a fresh network and returns the one to train.

    ``build`` also gets the first batches of the training, which most methods ignore.
    """

    name: str
    what: str
    build: Callable[[nn.Module, Batches], nn.Module]
    tracks: bool = False
    """Whether norm statistics move in training."""
    is_adapter: bool = False
    """Whether convlora can merge, save and load the result."""
    where: int = EVERYWHERE
    ratio: float = 1.0
    """The learning rate of B over that of all other parameters: LoRA+."""


def _full(model: nn.Module, _: Batches) -> nn.Module:
    return model.requires_grad_(True)


def _biases(model: nn.Module, _: Batches) -> nn.Module:
    train_only(model, *heads(model))
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            bias.requires_grad_(True)
    return model


def _norms(model: nn.Module, _: Batches) -> nn.Module:
    train_only(model, *(module for module in model.modules() if isinstance(module, NORMS)), *heads(model))
    return model


def _lora(model: nn.Module, batches: Batches, **options: Any) -> nn.Module:
    return convlora.inject(model, init_data=batches if options.get("init") == "eva" else None, **options)


def _dense(model: nn.Module, _: Batches, rank: int) -> nn.Module:
    return convlora.inject(model, rank, target_modules=lambda _, m: isinstance(m, nn.Conv2d) and m.groups == 1)


def _late(model: nn.Module, _: Batches, rank: int) -> nn.Module:
    layers = convlora.plan(model, rank).layers
    return convlora.inject(model, rank, target_modules=[layer.name for layer in layers[len(layers) // 2 :]])


def _by_gradient(model: nn.Module, batches: Batches, budget: str) -> nn.Module:
    """Choose ranks by the loss's gradient, after a short training of the head, since a fresh head is random."""
    fresh = copy.deepcopy(model.state_dict())
    train_only(model, *heads(model))
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
    for x, y in [*batches] * 3:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    scores = convlora.sensitivity(model, batches, lambda network, batch: F.cross_entropy(network(batch[0]), batch[1]))
    model.load_state_dict(fresh)  # trained from there, as in every other method
    return convlora.inject(model.requires_grad_(True), budget=budget, importance=scores)


def _lora_and_norms(model: nn.Module, _: Batches, rank: int) -> nn.Module:
    norms = [n.name for n in modules_of(model) if isinstance(n.module, NORMS)]
    return convlora.inject(model, rank, modules_to_save=(*norms, *convlora.plan(model, 1).modules_to_save))


def _peft(model: nn.Module, _: Batches, rank: int) -> nn.Module:
    return peers.peft(model, rank).model


def _adapter(
    name: str, what: str, where: int = EVERYWHERE, tracks: bool = False, ratio: float = 1.0, **options: Any
) -> Arm:
    return Arm(name, what, partial(_lora, **options), tracks, is_adapter=True, where=where, ratio=ratio)


_ALL = (
    _adapter("probe", "the head alone", target_modules=()),
    Arm("biases", "every bias, and the head", _biases, where=ALL_IMAGES),
    Arm("norms", "scale and shift of norms, and the head", _norms),
    _adapter("lora-1", "inject(model, rank=1)", rank=1),
    _adapter("lora-2", "inject(model, rank=2)", ALL_IMAGES, rank=2),
    _adapter("lora-4", "inject(model, rank=4)", ALL_IMAGES, rank=4),
    _adapter("lora-8", "inject(model, rank=8)", rank=8),
    _adapter(
        "lora-16-capped",
        'rank 16, no layer with method="dense"',
        FIRST_ALONE,
        rank=16,
        method_pattern={"*": "lora"},
    ),
    *(
        _adapter(
            f"lora-8-plus-{ratio}",
            f"rank 8, {ratio} times the learning rate for B",
            ALL_IMAGES,
            ratio=ratio,
            rank=8,
        )
        for ratio in (4, 16)
    ),
    _adapter("hira-8-plus-16", 'the same, method="hira"', ALL_IMAGES, ratio=16, rank=8, method="hira"),
    _adapter("lora-16", "inject(model, rank=16)", FIRST_ALONE, rank=16),
    _adapter("lora-32", "inject(model, rank=32)", ALL_IMAGES, rank=32),
    _adapter("lora-8-track", 'rank 8, norm="track"', ALL_IMAGES, tracks=True, rank=8, norm="track"),
    _adapter("lora-8-alpha-8", "rank 8, alpha 8: a scaling of 1", ALL_IMAGES, rank=8, alpha=8),
    _adapter("lora-8-alpha-64", "rank 8, alpha 64: a scaling of 8", ALL_IMAGES, rank=8, alpha=64),
    Arm(
        "lora-8-dense",
        "rank 8 in convolutions without groups alone",
        partial(_dense, rank=8),
        is_adapter=True,
        where=FIRST_ALONE,
    ),
    Arm(
        "lora-8-late",
        "rank 8 in the second half of the convolutions",
        partial(_late, rank=8),
        is_adapter=True,
        where=ALL_IMAGES,
    ),
    _adapter("rslora-8", "rank 8, use_rslora", FIRST_ALONE, rank=8, use_rslora=True),
    _adapter("dora-8", "rank 8, use_dora", FIRST_ALONE, rank=8, use_dora=True),
    _adapter("pissa-8", 'rank 8, init="pissa"', ALL_IMAGES, rank=8, init="pissa"),
    _adapter("olora-8", 'rank 8, init="olora"', FIRST_ALONE, rank=8, init="olora"),
    _adapter("orthogonal-8", 'rank 8, init="orthogonal"', FIRST_ALONE, rank=8, init="orthogonal"),
    _adapter("gaussian-8", 'rank 8, init="gaussian"', FIRST_ALONE, rank=8, init="gaussian"),
    *(
        _adapter(f"{method}-8", f'rank 8, method="{method}"', ALL_IMAGES, rank=8, method=method)
        for method in ("loha", "lokr", "hira", "oft", "boft", "hra")
    ),
    *(_adapter(method, f'method="{method}"', ALL_IMAGES, method=method) for method in ("ia3", "ssf", "dense")),
    _adapter("eva-8", "rank 8, init_data", rank=8, init="eva"),
    _adapter("lean-8", "rank 8, init_data, freeze_A, mask_activations", rank=8, init="eva", **LEAN),
    _adapter("lean-16", "the same, rank 16", rank=16, init="eva", **LEAN),
    _adapter("lora-8-freeze-a", "rank 8, freeze_A", rank=8, freeze_A=True),
    _adapter("gaussian-8-freeze-a", 'rank 8, init="gaussian", freeze_A', rank=8, init="gaussian", freeze_A=True),
    _adapter("orthogonal-8-freeze-a", 'rank 8, init="orthogonal", freeze_A', rank=8, init="orthogonal", freeze_A=True),
    _adapter("pissa-8-freeze-a", 'rank 8, init="pissa", freeze_A', rank=8, init="pissa", freeze_A=True),
    _adapter("olora-8-freeze-a", 'rank 8, init="olora", freeze_A', rank=8, init="olora", freeze_A=True),
    _adapter("budget-2%", 'ranks as equal as budget="2%" allows', ALL_IMAGES, budget="2%"),
    Arm(
        "budget-2%-gradient",
        'budget="2%", importance by sensitivity on eight batches, with a head trained on them',
        partial(_by_gradient, budget="2%"),
        is_adapter=True,
        where=FIRST_ALONE,
    ),
    Arm(
        "lora-8-norms",
        "rank 8, norms trained in full",
        partial(_lora_and_norms, rank=8),
        tracks=True,
        is_adapter=True,
        where=ALL_IMAGES,
    ),
    Arm("peft-8", "peft LoRA of rank 8 on the layers that it accepts", partial(_peft, rank=8), where=FIRST_ALONE),
    Arm("full-freeze", "full fine-tuning, norm statistics constant", _full, where=ALL_IMAGES),
    Arm(FULL, "full fine-tuning", _full, tracks=True),
)
ARMS = {arm.name: arm for arm in _ALL}
QUICK = ("probe", "norms", "lora-8", FULL)
"""The methods of a quick run."""
