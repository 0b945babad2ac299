"""The memory of a training step, and the largest batch that fits.

`LiveBytes` counts the bytes of the tensors that are alive at once, on any device: each storage from its creation until
it is freed. The step is real, with gradients and Adam's states, on a copy of the model. Memory that libraries allocate
inside an operation is not counted, so a margin is kept.

On a GPU the batch size is halved until a step runs (accelerate's ``find_executable_batch_size``). A CPU raises no
out-of-memory error before the system kills the process, so the bytes of two small batches are measured there and
extrapolated linearly.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ExampleError

# The share of free memory that is used: the rest is for allocations inside operations, the loader and fragmentation.
SHARE = 0.6
_PROBES = (2, 4)
_CACHE = "inactive_file "


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak bytes of all tensors that are created inside the block and alive at once.

    >>> with LiveBytes() as live:
    ...     a = torch.zeros(1000) + torch.zeros(1000)
    >>> live.peak
    12000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages that it created."""
        result = func(*args, **(kwargs or {}))
        # A result may share the storage of an input that is older than the block, and is then not new.
        old = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), old)
        return result

    def _count(self, storage: Any, old: set[int]) -> None:
        key = id(storage)
        if key in self._seen or key in old:
            return
        size = int(storage.nbytes())
        self._seen[key] = weakref.finalize(storage, self._gone, key, size)
        self._seen[key].atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


def step_bytes(
    model: nn.Module, batch_size: int, image_size: int, to_train_mode: Callable[[nn.Module], Any] = nn.Module.train
) -> int:
    """The peak bytes of one training step, weights included; the model is not changed.

    Args:
        model: the model; its trained parameters require a gradient.
        batch_size: images in the step.
        image_size: side of the images.
        to_train_mode: puts the model in the method's train mode.
    """
    model = copy.deepcopy(model)
    weights = sum(t.untyped_storage().nbytes() for t in {*model.parameters(), *model.buffers()})
    with LiveBytes() as live:
        _step(model, batch_size, image_size, to_train_mode)
    return int(weights + live.peak)


def largest_batch(
    model: nn.Module,
    most: int,
    image_size: int,
    to_train_mode: Callable[[nn.Module], Any] = nn.Module.train,
    free: int | None = None,
) -> int:
    """The batch size ``most``, or the first of its halves, at which a training step fits in memory.

    Args:
        model: the model on its device; not changed.
        most: the largest batch size.
        image_size: side of the images.
        to_train_mode: puts the model in the method's train mode.
        free: free bytes on a CPU; None asks the system.

    Raises:
        ExampleError: not even one image fits.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        return _largest_tried(model, most, image_size, to_train_mode)
    small, large = (step_bytes(model, size, image_size, to_train_mode) for size in _PROBES)
    each = (large - small) / (_PROBES[1] - _PROBES[0])
    room = SHARE * (free_bytes() if free is None else free)
    size = most
    while size >= 1:
        if small + each * (size - _PROBES[0]) <= room:
            return size
        size //= 2
    raise ExampleError(
        f"a training step of one {image_size}-pixel image takes {(small - each) / 1e6:,.0f} MB, and "
        f"{room / 1e6:,.0f} MB may be used; give a smaller --image-size or --backbone."
    )


def free_bytes() -> int:
    """The bytes that the system, or the container's limit if it is lower, still has free."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    limit, used = (_read_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    return max(0, min(free, limit - used + _file_cache(group / "memory.stat")))


def _largest_tried(model: nn.Module, most: int, image_size: int, to_train_mode: Callable[[nn.Module], Any]) -> int:
    size = most

    def halved() -> int:
        nonlocal size
        size //= 2
        return size

    @functools.partial(find_executable_batch_size, starting_batch_size=most, reduce_batch_size_fn=halved)
    def tried(batch_size: int) -> int:
        _step(copy.deepcopy(model), batch_size, image_size, to_train_mode)
        return batch_size

    try:
        return int(tried())
    except RuntimeError as fault:
        if "No executable batch size" not in str(fault):
            raise
        raise ExampleError(
            f"not even one {image_size}-pixel image fits into the memory of {next(model.parameters()).device}; "
            "give a smaller --image-size or --backbone."
        ) from fault


def _step(model: nn.Module, batch_size: int, image_size: int, to_train_mode: Callable[[nn.Module], Any]) -> None:
    """Run one training step on grey images."""
    device = next(model.parameters()).device
    to_train_mode(model)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    with torch.random.fork_rng():
        images = torch.zeros(batch_size, 3, image_size, image_size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        logits = model(images).squeeze(1)
        binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _file_cache(path: Path) -> int:
    """Bytes of the inactive file cache, which count as used but are freed when memory is needed."""
    try:
        return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(_CACHE)), 0)
    except (OSError, ValueError):
        return 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return None
