"""Running a few batches through the base alone; the model is left as it was: modes, buffers, random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .state import RECORD, Injection, activate


@contextmanager
def base_alone(root: nn.Module) -> Iterator[None]:
    """The base in eval mode inside the block, no adapter active; all that a forward may move is put back after it."""
    injection = vars(root).get(RECORD)
    with ExitStack() as undo:
        if isinstance(injection, Injection) and not injection.disabled:
            undo.callback(activate, root, injection, injection.active)
            activate(root, injection, injection.active, disabled=True)
        undo.enter_context(left_as_it_was(root))
        for module in root.modules():
            module.training = False  # not train(False), which a module may have made do more
        yield


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and random numbers are after the block what they were before it."""
    with ExitStack() as undo:
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
        undo.enter_context(torch.random.fork_rng(devices=sorted(device.index for device in devices)))
        buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        undo.callback(_put_back, buffers)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        yield


def _put_back(buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for module, name, buffer, numbers in buffers:
            module._buffers[name] = buffer
            if buffer is not None and numbers is not None and not torch.equal(buffer, numbers):
                buffer.copy_(numbers)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model's output for what a loader gives: a tensor, a sequence that begins with one, or a dict of arguments."""
    like = next(iter((*model.parameters(), *model.buffers())), None)

    def moved(value: Any) -> Any:
        return value.to(like.device) if isinstance(value, Tensor) and like is not None else value

    if isinstance(batch, dict):
        return model(**{key: moved(value) for key, value in batch.items()})
    return model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))
