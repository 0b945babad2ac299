"""The methods that are compared, by name, in the order of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from . import peers, subjects
from .subjects import Arm

FULL, BASE = "full", "base"
"""The references of the ratios of training and of inference."""
FULL_CONSTANT = "full-freeze"
"""The fair reference of methods with constant norm statistics."""

CHOSEN = ("dense", "loha", "lokr", "hira", "ia3", "ssf", "oft", "boft", "hra")
"""convlora's methods other than LoRA."""


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
    Arm("convlora", 'convlora, training_path="auto", norm="freeze"', subjects.adapted()),
    Arm("convlora-track", 'convlora, training_path="auto", norm="track"', subjects.adapted(norm="track")),
    Arm("convlora-fused", 'convlora, training_path="fused", norm="freeze"', subjects.adapted(training_path="fused")),
    Arm("convlora-weight", 'convlora, training_path="weight", norm="freeze"', subjects.adapted(training_path="weight")),
    Arm("convlora-branch", 'convlora, training_path="branch", norm="freeze"', subjects.adapted(training_path="branch")),
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
    Arm("lower-bound", "gradients to every layer and for no weight, norm statistics constant", subjects.lower_bound()),
    Arm(
        "lower-bound-track",
        "gradients to every layer and for no weight, norm statistics moving",
        subjects.lower_bound("track"),
    ),
    Arm("peft", "peft LoRA, default norms", peers.peft, "moving"),
    Arm("peft-freeze", "peft LoRA, norm statistics constant", peers.peft, "constant"),
    Arm("loralib", "loralib Conv2d, default norms", peers.loralib, "moving"),
    Arm("loralib-freeze", "loralib Conv2d, norm statistics constant", peers.loralib, "constant"),
    Arm("lycoris", "LyCORIS LoCon, default norms", peers.lycoris, "moving"),
    Arm("lycoris-freeze", "LyCORIS LoCon, norm statistics constant", peers.lycoris, "constant"),
)
_INFERENCE = (
    Arm(BASE, "the plain network", subjects.full),
    Arm("base-again", "the plain network, built again: its distance from 1 is noise", subjects.full),
    Arm("merged", "convlora, merged", subjects.merged),
    Arm("unmerged", "convlora, unmerged: W + ΔW kept between forwards", subjects.unmerged),
    Arm("not-kept", "convlora, unmerged: W + ΔW computed in each forward", subjects.not_kept),
    Arm("peft-merged", "peft, merged and unloaded", peers.peft_merged),
    Arm("peft-unmerged", "peft, unmerged", peers.peft_unmerged),
)
TRAINING = {arm.name: arm for arm in _TRAINING}
METHODS = {arm.name: arm for name in ("lora", *CHOSEN) for arm in _of_method(name)}
"""convlora's, peft's and LyCORIS' layers of each method; measured with ``--methods``."""
ALL_TRAINING = TRAINING | METHODS
INFERENCE = {arm.name: arm for arm in _INFERENCE}
SWEPT = (FULL, FULL_CONSTANT, "convlora", "peft", "peft-freeze")
"""The methods that a sweep measures."""
