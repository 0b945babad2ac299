"""Runs a few batches through the base alone, and then restores modes, buffers, parameters and random generators."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._layer.writes import Writes
from .state import RECORD, Injection, activate
from .targets import names_of
from .written import slots


@contextmanager
def base_alone(root: nn.Module) -> Iterator[None]:
    """Disable all adapters and set eval mode inside the block; then restore all that a forward may change."""
    injection = vars(root).get(RECORD)
    with ExitStack() as undo:
        if isinstance(injection, Injection) and not injection.disabled:
            undo.callback(activate, root, injection, injection.now)
            activate(root, injection, injection.now, disabled=True)
        undo.enter_context(left_as_it_was(root))
        for module in root.modules():
            module.training = False  # not train(False), which modules may override
        yield


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers, parameters and random number generators after the block."""
    with ExitStack() as undo:
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
        undo.enter_context(torch.random.fork_rng(devices=sorted(device.index for device in devices)))
        buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        undo.callback(_put_back, buffers)
        writes = Writes(slots(model), names_of(model))
        undo.callback(_put_parameters_back, writes)
        undo.enter_context(writes)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        yield


def _put_parameters_back(writes: Writes) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for (module, name, parameter), before in writes.found():
            parameter.data = before
            module._parameters[name] = parameter


def _put_back(buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for module, name, buffer, numbers in buffers:
            module._buffers[name] = buffer
            if buffer is not None and numbers is not None and not torch.equal(buffer, numbers):
                buffer.copy_(numbers)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch of a data loader, which is moved to the model's device and dtype.

    Of a tuple or list the model gets the first entry: images, a list of images as detectors take it, or a mapping. Of a
    mapping it gets the entries that its forward has arguments for; if there are none, the first floating-point tensor.
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)

    def moved(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [moved(each) for each in value]
        if not isinstance(value, Tensor) or like is None:
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    if not isinstance(first, Mapping):
        return model(moved(first))
    named = {key: moved(value) for key, value in first.items() if key in _names(model, first)}
    images = [value for value in first.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return model(**named) if named or not images else model(moved(images[0]))


def _names(model: nn.Module, offered: Iterable[str]) -> Collection[str]:
    """Return those of the offered names that the model's forward takes as arguments."""
    parameters = inspect.signature(model.forward).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return set(offered)
    return {name for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
