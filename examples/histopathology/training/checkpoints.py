"""Checkpoints, from which an interrupted training continues bit for bit.

After each epoch, one file for the training is written by ``torch.save`` under another name, synced and renamed, so that
it is complete whenever the process ends. It is not safetensors, because an optimizer's state is nested and has integer
keys. It is read with ``weights_only=True``, which builds tensors, containers and plain numbers and runs no code. The
adapter itself is safetensors and JSON.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExampleError
from ..files import replacing_file

FORMAT = 1


def moving(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that training may change, by name: parameters that require a gradient, and buffers. Not copies."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def put(saved: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write saved tensors into the model, in place."""
    with torch.no_grad():
        for name, tensor in moving(model).items():
            tensor.copy_(saved[name])


def seed_generators(seed: int) -> None:
    """Seed every generator that a training may use."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every generator that a training may use: torch, its GPU, numpy, Python."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), keys.tolist(), *rest],  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the generators to `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    random.setstate(state["python"])


def write_checkpoint(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint of a training; after an interruption the old or the new one is there, complete."""
    with replacing_file(path) as partial:
        torch.save({"format": FORMAT, "identity": dict(identity), "state": dict(state)}, partial)


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that `write_checkpoint` wrote; None if there is no file.

    Raises:
        ExampleError: a damaged file, or a checkpoint of other options or data; the error names what differs.
    """
    if not path.is_file():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        found, state, version = stored["identity"], stored["state"], stored["format"]
    except Exception as fault:  # torch, zipfile and pickle raise unrelated kinds of errors for a damaged file
        raise ExampleError(f"{path} is damaged ({type(fault).__name__}); delete it to train from the start.") from fault
    differing = [
        f"{key} {found.get(key)!r} there, {identity.get(key)!r} now"
        for key in sorted({*found, *identity})
        if found.get(key) != identity.get(key)
    ]
    if version != FORMAT:
        differing.insert(0, f"format {version} there, {FORMAT} now")
    if differing:
        raise ExampleError(
            f"{path} is of another training: {'; '.join(differing)}. Give the same options and data to continue it, or "
            "leave --resume out to start again."
        )
    return dict(state)
