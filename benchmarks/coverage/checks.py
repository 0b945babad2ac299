"""Check all steps of one library on one network, and record each outcome.

The steps are inject, forward, identity, gradient, reload, copy, merge, unmerge and remove; copy and remove are for
convlora only. A step that depends on a failed one is skipped; all others are tried. The oracle is the plain network
that holds W + ΔW, with ΔW by einsum from the definition.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from .cases import Sample, Subject, equal, evaluate, relative_error, run
from .libraries import Convlora, LayerFactors, Library

MERGE_TOLERANCE = 1e-5
"""Tolerance relative to the largest output: float32 rounding through a whole network, with a margin."""
ORACLE_TOLERANCE = 1e-4
"""Tolerance against the plain network with W + ΔW in float32; a larger difference is measured again in float64."""
DOUBLE_TOLERANCE = 1e-6
"""Tolerance in float64: rounding of 1e-16, amplified by a deep untrained network."""
NO_GRADIENT = 1e-20
"""A weight's gradient below this counts as zero: its product with a factor would underflow."""
FACTOR_SIZE = 0.02
"""Standard deviation of the factors, with which ΔW is a few per cent of W in a typical layer."""


@dataclass(frozen=True)
class Step:
    """The outcome of a step: ``value`` is its error, if it has one, ``reason`` why it failed."""

    ok: bool
    value: float | None = None
    reason: str = ""


class Failed(Exception):
    """A step gave a wrong result; ``value`` is the error, if there is one."""

    def __init__(self, reason: str, value: float | None = None) -> None:
        super().__init__(reason)
        self.value = value


def check(subject: Subject, library: Library) -> dict[str, Step]:
    """The outcome of each step, in order."""
    way = _Way(subject, library)
    if way.take("inject", way.inject) and way.take("forward", way.forward):
        way.take("identity", way.identity)
        if way.take("gradient", way.gradient):
            way.take("reload", way.reload)
            if isinstance(library, Convlora) and _is_copied(subject):
                way.take("copy", way.copy)
        if way.take("merge", way.merge) or way.steps["merge"].value is not None:
            way.take("unmerge", way.unmerge)
    if isinstance(library, Convlora) and way.steps["inject"].ok:
        way.take("remove", way.remove)
    return way.steps


class _Way:
    """The steps on one network; ``base`` is the plain network, and from the gradient step on the oracle."""

    adapted: nn.Module
    base: nn.Module

    def __init__(self, subject: Subject, library: Library) -> None:
        self.subject, self.library, self.sample = subject, library, subject.sample
        self.steps: dict[str, Step] = {}

    def take(self, name: str, step: Callable[[], float | None]) -> bool:
        """Run one step and record its outcome."""
        try:
            self.steps[name] = Step(True, step())
        except Exception as cause:
            lines = str(cause).strip().splitlines() or [""]
            reason = lines[0] if isinstance(cause, Failed) else f"{type(cause).__name__}: {lines[0]}"
            self.steps[name] = Step(False, getattr(cause, "value", None), reason)
        return self.steps[name].ok

    def inject(self) -> None:
        """Inject the adapter, after recording the model's state."""
        self.model = self.subject.fresh().train()
        evaluate(self.model, self.sample)  # some networks (transformers) put hooks on themselves at the first call
        self.before = snapshot(self.model)
        self.adapted = self.library.inject(self.model, self.subject.case)
        self.held = self.library.held(self.adapted)

    def forward(self) -> None:
        """Run the adapted network in both modes."""
        self.outputs = [evaluate(self.adapted, self.sample), self._train(self.adapted, self.sample)]

    def identity(self) -> float:
        """Check that a fresh adapter changes no bit, in eval mode and in train mode with the same dropout."""
        self.base = self.subject.fresh()
        _freeze_alike(self.base, self.adapted)
        plain = [evaluate(self.base, self.sample), self._train(self.base, self.sample)]
        for mode, found, expected in zip(("eval", "train"), self.outputs, plain, strict=True):
            if not equal(found, expected):
                raise Failed(f"the output in {mode} mode differs", relative_error(found, expected))
        return 0.0

    def gradient(self) -> float | None:
        """Check each factor's gradient in one training step; for convlora, against the oracle and the chain rule."""
        factors = self.library.factors(self.adapted)
        randomise(factors)
        exact = _add_all(self.base, factors)
        error = self._against(self.base, self.adapted, factors, self.sample)
        if isinstance(self.library, Convlora) and exact and error > ORACLE_TOLERANCE:
            error = self._in_double(factors)  # tells rounding, which deep untrained networks amplify, from a mistake
            if error > DOUBLE_TOLERANCE:
                raise Failed("output or gradients differ from those of the plain network with W + ΔW", error)
        torch.optim.Adam([t for f in factors.values() for t in (f.a, f.b)], lr=1e-4).step()
        return error if exact else None

    def _against(
        self, oracle: nn.Module, adapted: nn.Module, factors: dict[str, LayerFactors], sample: Sample
    ) -> float:
        """The larger error of the output in eval mode and of the worst factor gradient after one backward."""
        difference = relative_error(evaluate(adapted, sample), evaluate(oracle, sample))
        for name in factors:
            oracle.get_submodule(name).get_parameter("weight").requires_grad_(True)
        for model in (oracle, adapted):
            torch.autograd.backward(loss(self._train(model, sample, gradients=True)))
        return max(difference, *(_compare(name, f, oracle.get_submodule(name)) for name, f in factors.items()))

    def _in_double(self, factors: dict[str, LayerFactors]) -> float:
        """The same error in float64, where rounding is far below any mistake."""
        oracle, adapted = self.subject.fresh().double(), self.subject.fresh().double()
        adapted = self.library.inject(adapted, self.subject.case)
        wide = self.library.factors(adapted)
        with torch.no_grad():
            for name, factor in factors.items():
                wide[name].a.copy_(factor.a)
                wide[name].b.copy_(factor.b)
        _freeze_alike(oracle, adapted)
        _add_all(oracle, wide)
        try:
            return self._against(oracle, adapted, wide, self.sample.double())
        except RuntimeError:  # RAFT makes its grid in float32, whatever its weights
            with mock.patch.object(Tensor, "float", Tensor.double):
                return self._against(oracle, adapted, wide, self.sample.double())

    def reload(self) -> None:
        """Check that the adapter gives the same bits when saved and loaded into a fresh base."""
        with tempfile.TemporaryDirectory() as folder:
            self.library.save(self.adapted, Path(folder) / "adapter")
            loaded = self.library.load(self.subject.fresh(), Path(folder) / "adapter")
        found, expected = evaluate(loaded, self.sample), evaluate(self.adapted, self.sample)
        if not equal(found, expected):
            raise Failed("the reloaded adapter's output differs", relative_error(found, expected))

    def copy(self) -> None:
        """Check that a deep copy gives the same bits and shares no tensor."""
        copied = copy.deepcopy(self.adapted)
        found, expected = evaluate(copied, self.sample), evaluate(self.adapted, self.sample)
        if not equal(found, expected):
            raise Failed("the copy's output differs", relative_error(found, expected))
        if {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in self.adapted.parameters() if p.numel()}:
            raise Failed("the copy shares parameters")

    def merge(self) -> float:
        """Compare the merged network's output with the unmerged one's."""
        self.__dict__.pop("base", None)  # large networks need the room
        unmerged = evaluate(self.adapted, self.sample)
        self.state = {key: tensor.detach().clone() for key, tensor in self.adapted.state_dict().items()}
        self.library.merge(self.adapted)
        error = relative_error(evaluate(self.adapted, self.sample), unmerged)
        if error > ORACLE_TOLERANCE and self._merge_in_double() <= DOUBLE_TOLERANCE:
            raise Failed("rounding, which this deep untrained network enlarges", ORACLE_TOLERANCE)
        if error > MERGE_TOLERANCE:
            raise Failed("the merged output differs", error)
        return error

    def _merge_in_double(self) -> float:
        """The merge's error in float64, where rounding is far below any mistake."""
        adapted = self.library.inject(self.subject.fresh().double(), self.subject.case)
        factors = self.library.factors(adapted)
        for factor in (t for f in factors.values() for t in (f.a, f.b)):
            factor.data = factor.data.double()
        randomise(factors)
        sample = self.sample.double()
        unmerged = evaluate(adapted, sample)
        self.library.merge(adapted)
        return relative_error(evaluate(adapted, sample), unmerged)

    def unmerge(self) -> float:
        """Check that every tensor is as before the merge."""
        self.library.unmerge(self.adapted)
        state = self.adapted.state_dict()
        changed = [key for key, tensor in self.state.items() if not torch.equal(tensor, state[key])]
        if changed:
            error = max(relative_error([state[key]], [self.state[key]]) for key in changed)
            raise Failed(f"{len(changed)} tensors are not as before", error)
        return 0.0

    def remove(self) -> None:
        """Check that keys, classes, objects, attributes, hooks, modes, flags and bits are as before injection."""
        assert isinstance(self.library, Convlora)
        self.library.remove(self.adapted.train())
        after = snapshot(self.model)
        changed = [key for key, value in self.before.items() if after[key] != value]
        if changed:
            raise Failed(f"not as before injection: {', '.join(changed)}")

    def _train(self, model: nn.Module, sample: Sample, *, gradients: bool = False) -> list[Tensor]:
        """Outputs in train mode, with the same norms in eval mode as in the adapted network."""
        model.train()
        plain = getattr(model, "get_base_model", lambda: model)()
        for name in self.held:
            plain.get_submodule(name).training = False
        with torch.set_grad_enabled(gradients):
            return run(model, sample, training=True)


def _is_copied(subject: Subject) -> bool:
    """Whether the plain network can be copied after a forward, which some networks do not allow."""
    model = subject.fresh().train()
    evaluate(model, subject.sample)
    try:
        return equal(evaluate(copy.deepcopy(model), subject.sample), evaluate(model, subject.sample))
    except Exception:
        return False


def randomise(factors: dict[str, LayerFactors]) -> None:
    """Give the factors small random values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in (t for f in factors.values() for t in (f.a, f.b)):
            factor.copy_(FACTOR_SIZE * torch.randn(factor.shape, generator=generator))


def loss(outputs: list[Tensor]) -> Tensor:
    """A random projection of every output; a mean's gradient would vanish behind a normalisation."""
    generator = torch.Generator().manual_seed(5)
    drawn = [(t, torch.randn(t.shape, generator=generator)) for t in outputs]
    terms = [(t * weights.to(t.dtype))[t.isfinite()].mean() for t, weights in drawn if t.requires_grad]
    return torch.stack(terms).sum()


def _freeze_alike(base: nn.Module, adapted: nn.Module) -> None:
    """Freeze the plain network as the adapted one, since torch's linear rounds differently for a trained weight."""
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in trained)


def _add_all(model: nn.Module, factors: dict[str, LayerFactors]) -> bool:
    """Turn a plain network into the oracle; False if some layer could not be changed."""
    added = [_add(model.get_submodule(name), factor) for name, factor in factors.items()]
    return all(added)


def _add(layer: nn.Module, factor: LayerFactors) -> bool:
    """Put W + ΔW into a plain layer; False if its weight is not a Parameter or ΔW has another shape."""
    plain = isinstance(layer._parameters.get("weight"), nn.Parameter)
    if not plain:
        _materialise(layer)
    weight: Any = layer.weight
    delta = factor.delta(weight)
    if delta is not None:
        weight.data += delta
    return plain and delta is not None


def _materialise(layer: nn.Module) -> None:
    """Make a computed weight (weight_norm, spectral_norm, in both of torch's forms) a Parameter."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    elif "weight_g" in layer._parameters:
        remove_weight_norm(layer)
    else:
        remove_spectral_norm(layer)
    weight: Any = layer.weight
    if not isinstance(weight, nn.Parameter):
        del layer.weight
        layer.weight = nn.Parameter(weight.detach())


def _compare(name: str, factor: LayerFactors, layer: nn.Module) -> float:
    """The relative error of a layer's factor gradients against dB = s·dW·Aᵀ and dA = s·Bᵀ·dW; 0 if none applies."""
    weight: Any = layer.weight
    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    alive = grad.abs().max().item() > NO_GRADIENT
    for letter, value in (("A", factor.a), ("B", factor.b)):
        if value.grad is None and alive:
            raise Failed(f"{name}: no gradient for {letter}")
        if value.grad is not None and not value.grad.isfinite().all():
            raise Failed(f"{name}: the gradient for {letter} is not finite")
        if alive and not value.grad.any():  # type: ignore[union-attr]
            raise Failed(f"{name}: the gradient for {letter} is zero, the weight's own is not")
    if not alive or factor.delta(weight) is None or factor.a.grad is None or factor.b.grad is None:
        return 0.0
    a, b = factor.a.detach().flatten(1), factor.b.detach().flatten(1)
    flat = grad.reshape(b.shape[0], a.shape[1])
    expected = [factor.scaling * b.T @ flat, factor.scaling * flat @ a.T]
    return relative_error([factor.a.grad.flatten(1), factor.b.grad.flatten(1)], expected)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All state that injection could change and ``remove`` must restore, comparable by ==."""
    named = list(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "classes": [(name, type(module)) for name, module in named],
        "objects": [(name, id(module)) for name, module in named],
        "attributes": [(name, sorted(vars(module))) for name, module in named],
        "modes": [(name, module.training) for name, module in named],
        "keys": list(model.state_dict()),
        "tensors": [(key, id(tensor)) for key, tensor in model.state_dict(keep_vars=True).items()],
        "bits": [(key, tensor.dtype, _digest(tensor)) for key, tensor in model.state_dict().items()],
        "flags": [(key, parameter.requires_grad) for key, parameter in model.named_parameters()],
        "hooks": [(name, [list(getattr(module, kind)) for kind in hooks]) for name, module in named],
    }


def _digest(tensor: Tensor) -> str:
    raw: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
