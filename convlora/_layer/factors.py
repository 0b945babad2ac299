"""One layer's factors of one adapter: lora_A, lora_B, and the change that they make."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .dora import dora_scale, dora_weight, scaled_output
from .functional import delta_weight, effective_weight
from .paths import Path


class LoRA(nn.Module):
    """All that one layer knows of one adapter.

    Attributes:
        lora_A: ``(rank, C_in / groups, kH, kW)``; in general ``(rank, *weight.shape[1:])``, so ``(rank, in_features)``
            for a linear layer and ``(rank, C_out / groups, kH, kW)`` for a transposed convolution.
        lora_B: ``(C_out, rank)``, in general ``(weight.shape[0], rank)``; zero at the start, so that a fresh adapter
            changes nothing.
        lora_A0, lora_B0: only where ``anchored``: the frozen factors that A and B began as. The change is then
            scaling · (B @ A − B0 @ A0), so that it is zero at the start whatever they are, and the base is untouched.
        lora_magnitude: only with DoRA: ``(C_out,)``, the size of the weight that meets each output channel.
        scaling: what multiplies B @ A.
        dropout: probability with which the branch's inputs are zeroed in training.
        path: which way a convolution takes in training; see ``paths.py``.
    """

    anchored: bool = False
    use_dora: bool = False
    groups: int = 0
    """Of a transposed convolution; 0 for every other layer."""

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        like: Tensor,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        path: Path = "auto",
        anchored: bool = False,
    ) -> None:
        super().__init__()
        # fp32 factors also on half-precision bases: steps of 1e-4 vanish in bf16.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, *weight_shape[1:], dtype=dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(weight_shape[0], rank, dtype=dtype, device=like.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = scaling
        self.dropout = dropout
        self.path: Path = path
        if anchored:
            self.anchored = True
            self.register_buffer("lora_A0", torch.zeros_like(self.lora_A))
            self.register_buffer("lora_B0", torch.zeros_like(self.lora_B))

    def give_magnitudes(self, norms: Tensor, groups: int) -> None:
        """Make it DoRA, with these sizes of the output channels' weights."""
        self.use_dora, self.groups = True, groups
        self.lora_magnitude = nn.Parameter(norms.to(self.lora_A.dtype))

    @property
    def rank(self) -> int:
        """The largest rank that the change can have: twice that of an anchored adapter's factors."""
        return self.lora_A.shape[0] * (2 if self.anchored else 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A ``(rank, ...)`` and B ``(C_out, rank)`` with ΔW = scaling · B @ A.

        Anchored, B @ A − B0 @ A0 = (B − B0) @ A + B0 @ (A − A0): written so, it is exactly zero at the start.
        """
        self._run_hooks()
        if not self.anchored:
            return self.lora_A, self.lora_B
        A, B, (A0, B0) = self.lora_A, self.lora_B, self._anchor()
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """As :meth:`factors`; anchored, [A; A0] and [B, −B0], which holds all bits of the four."""
        self._run_hooks()
        if not self.anchored:
            return self.lora_A, self.lora_B
        A0, B0 = self._anchor()
        return torch.cat([self.lora_A, A0]), torch.cat([self.lora_B, -B0], dim=1)

    def _run_hooks(self) -> None:
        """Let torch's older hooks, pruning's among them, compute their factor; nothing calls this module's forward."""
        for hook in self._forward_pre_hooks.values():
            if _computes_a_factor(hook):
                hook(self, ())

    def _anchor(self) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", (self._buffers["lora_A0"], self._buffers["lora_B0"]))

    def sources(self) -> tuple[Tensor, ...] | None:
        """All tensors that the effective weight is computed from besides the base's.

        None where a factor is itself computed (``parametrize``, pruning), by code that may read anything.
        """
        hooks = self._forward_pre_hooks
        if type(self) is not LoRA or (hooks and any(map(_computes_a_factor, hooks.values()))):
            return None
        return cast("tuple[Tensor, ...]", (*self._parameters.values(), *self._buffers.values()))

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Write numbers into the factors, in the form of :meth:`stored_factors`."""
        rank = self.lora_A.shape[0]
        with torch.no_grad():
            self.lora_A.copy_(lora_A[:rank])
            self.lora_B.copy_(lora_B[:, :rank])
            if self.anchored:
                A0, B0 = self._anchor()
                A0.copy_(lora_A[rank:])
                B0.copy_(-lora_B[:, rank:])

    def replace_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put other factors, of any rank, in the place of all that there are; may be run twice."""
        for name, new in (("lora_A", lora_A), ("lora_B", lora_B)):
            now = self.get_parameter(name)
            if now is not new:
                setattr(self, name, nn.Parameter(new.to(now.dtype), requires_grad=now.requires_grad))
        self.anchored = False
        self._buffers.clear()

    def is_fresh(self) -> bool:
        """Whether the factors still change nothing."""
        if self.anchored:
            return all(map(torch.equal, (self.lora_A, self.lora_B), self._anchor()))
        return not self.lora_B.any()

    def delta_weight(self) -> Tensor:
        """ΔW, shaped like the layer's weight, in the factors' dtype; with DoRA, before the magnitudes."""
        return delta_weight(*self.factors(), self.scaling)

    def effective_weight(self, base: Tensor) -> Tensor:
        """What the layer computes with in the place of its base weight: W + ΔW, with DoRA scaled per output channel."""
        if self.use_dora:
            return dora_weight(base, *self.factors(), self.scaling, self.lora_magnitude, self.groups)
        return effective_weight(base, *self.factors(), self.scaling)

    def scaled_output(self, layer: nn.Module, y: Tensor, base: Tensor) -> Tensor:
        """With DoRA, the output of a layer that computed y with W + ΔW."""
        scale = dora_scale(base, *self.factors(), self.scaling, self.lora_magnitude)
        return scaled_output(y, scale, cast("Tensor | None", layer.bias), -1 if isinstance(layer, nn.Linear) else 1)

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}{dropout}{', DoRA' if self.use_dora else ''}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the base holds no factors at all: it loads, strictly too, and leaves them as they are.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


def _computes_a_factor(hook: Any) -> bool:
    """Whether it is one of torch's hooks that write a tensor's attribute anew, and not a user's."""
    return str(getattr(hook, "_tensor_name", getattr(hook, "name", ""))).startswith("lora_")
