"""The arms by name, in the order of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from . import peers, subjects
from .subjects import Arm

FULL, BASE = "full", "base"
"""What the ratios of training and of inference refer to."""
FULL_CONSTANT = "full-freeze"
"""The fair reference of the arms that hold norm statistics constant."""

CHOSEN = ("dense", "loha", "lokr", "hira", "ia3", "ssf", "oft", "boft", "hra")
"""The methods besides LoRA."""


def _of_method(method: str) -> Iterator[Arm]:
    what = f"{method}, norm statistics constant"
    yield Arm(f"convlora-of-{method}", f"convlora {what}", subjects.adapted(method=method))
    if method in peers.PEFT_CONFIGS:
        yield Arm(f"peft-of-{method}", f"peft {what}", partial(peers.peft, method=method), "constant")
    if method in peers.LYCORIS_MODULES:
        yield Arm(f"lycoris-of-{method}", f"LyCORIS {what}", partial(peers.lycoris, method=method), "constant")


_TRAINING = (
    Arm(FULL, "full fine-tuning", subjects.full, "moving"),
    Arm(FULL_CONSTANT, "full fine-tuning, norm statistics constant", subjects.full, "constant"),
    Arm("probe", "head only, norm statistics constant", subjects.probe, "constant"),
    Arm("norms", "scale and shift of norms, and head", subjects.norms_and_head, "moving"),
    Arm("convlora", 'convlora, path="auto", norm="freeze"', subjects.adapted()),
    Arm("convlora-track", 'convlora, path="auto", norm="track"', subjects.adapted(norm="track")),
    Arm("convlora-fused", 'convlora, path="fused", norm="freeze"', subjects.adapted(path="fused")),
    Arm("convlora-weight", 'convlora, path="weight", norm="freeze"', subjects.adapted(path="weight")),
    Arm("convlora-branch", 'convlora, path="branch", norm="freeze"', subjects.adapted(path="branch")),
    Arm("convlora-masks", "convlora, mask_activations=True", subjects.adapted(mask_activations=True)),
    Arm("convlora-freeze-A", "convlora, freeze_A=True", subjects.adapted(freeze_A=True)),
    Arm(
        "convlora-lean",
        "convlora, freeze_A=True, mask_activations=True",
        subjects.adapted(freeze_A=True, mask_activations=True),
    ),
    Arm(
        "convlora-lean-bits",
        'convlora, freeze_A=True, mask_activations="bits"',
        subjects.adapted(freeze_A=True, mask_activations="bits"),
    ),
    Arm("floor", "torch's own gradients to every layer and for none, norm statistics constant", subjects.floor()),
    Arm("floor-track", "the same, norm statistics moving", subjects.floor("track")),
    Arm("peft", "peft LoRA, as it is", peers.peft, "moving"),
    Arm("peft-freeze", "peft LoRA, norm statistics constant", peers.peft, "constant"),
    Arm("loralib", "loralib Conv2d, as it is", peers.loralib, "moving"),
    Arm("loralib-freeze", "loralib Conv2d, norm statistics constant", peers.loralib, "constant"),
    Arm("lycoris", "LyCORIS LoCon, as it is", peers.lycoris, "moving"),
    Arm("lycoris-freeze", "LyCORIS LoCon, norm statistics constant", peers.lycoris, "constant"),
)
_INFERENCE = (
    Arm(BASE, "the plain network", subjects.full),
    Arm("base-again", "the same, built a second time: how far it is from 1 is noise", subjects.full),
    Arm("merged", "convlora, merged", subjects.merged),
    Arm("unmerged", "convlora, unmerged: W + ΔW kept between forwards", subjects.unmerged),
    Arm("not-kept", "convlora, unmerged, the kept weight dropped before each forward", subjects.not_kept),
    Arm("peft-merged", "peft, merged and unloaded", peers.peft_merged),
    Arm("peft-unmerged", "peft, unmerged", peers.peft_unmerged),
)
TRAINING = {arm.name: arm for arm in _TRAINING}
METHODS = {arm.name: arm for name in ("lora", *CHOSEN) for arm in _of_method(name)}
"""Each method, beside peft's and LyCORIS' own layers of it; only where they are asked for."""
ALL_TRAINING = TRAINING | METHODS
INFERENCE = {arm.name: arm for arm in _INFERENCE}
SWEPT = (FULL, FULL_CONSTANT, "convlora", "peft", "peft-freeze")
"""The arms of a sweep."""
