"""``saved_bytes``: the bytes that a training step keeps for its backward, by module, measured in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._layer.adapted import CHILD
from .._layer.masked import Masked, mixin_for
from .._layer.swap import original_class
from .._plan import aligned
from .observe import left_as_it_was, run_batch
from .targets import names_of


@dataclass(frozen=True)
class KeptBytes:
    """The tensors that one module keeps from the forward for the backward.

    Attributes:
        name: the module's name; empty for the model itself.
        kind: the module's class.
        count: bytes. A tensor that several modules keep, such as an output that is the next module's input, is counted
            once, for the first module that keeps it.
        note: says if the module's own code keeps the bytes and not a module inside it, or if less could be kept.
    """

    name: str
    kind: str
    count: int
    note: str = ""


@dataclass(frozen=True)
class SavedBytes:
    """The tensors that a training step keeps from the forward for the backward; ``print`` shows a table.

    Attributes:
        modules: the modules that keep tensors, in the order of the forward.
    """

    modules: tuple[KeptBytes, ...]

    @property
    def total(self) -> int:
        """The bytes of all modules together."""
        return sum(each.count for each in self.modules)

    def __str__(self) -> str:
        total = max(self.total, 1)
        rows = [("module", "kind", "bytes", "share", "")]
        rows += [
            (each.name or "(the model itself)", each.kind, f"{each.count:,}", f"{each.count / total:.1%}", each.note)
            for each in self.modules
        ]
        rows.append(("together", "", f"{self.total:,}", "", ""))
        return "\n".join(aligned(rows, "llrrl"))


FUNCTIONAL = "by its own code: a functional activation, a product"
MASKABLE = "less with mask_activations=True"


def saved_bytes(model: nn.Module, example: Any) -> SavedBytes:
    """Return how many bytes a training step on a batch like this one keeps for the backward, by module.

    >>> convlora.inject(model, mask_activations=True)
    >>> print(convlora.saved_bytes(model, images))
    >>> convlora.saved_bytes(model, images).total

    It counts the storages of all tensors that autograd saves in a forward in train mode, each once, without the model's
    parameters and buffers. It does not count gradients, the optimizer's state, tensors that a loss saves, and tensors
    that ``torch.utils.checkpoint`` holds. With ``torch.autocast``, call it inside the block. It runs one forward and no
    backward; parameters, gradients, buffers, modes and random number generators are as before.

    Args:
        model: any module, injected or not. A plain module whose parameters are all trainable gives the bytes of full
            fine-tuning.
        example: a batch for the model: a tensor, a tuple that begins with one, or a dict of arguments.

    Returns:
        The bytes of each module; ``.total`` is their sum.
    """
    running: list[nn.Module] = []
    counts: dict[nn.Module, int] = {}

    def count(size: int) -> None:
        module = running[-1] if running else model
        counts[module] = counts.get(module, 0) + size

    with (
        left_as_it_was(model),
        _followed(model, running),
        torch.inference_mode(False),
        torch.enable_grad(),
        counting((*model.parameters(), *model.buffers()), count),
    ):
        model.train()
        run_batch(model, example)
    names = names_of(model)
    kept = (
        KeptBytes(names[module], original_class(module).__name__, count, _note(module))
        for module, count in counts.items()
    )
    return SavedBytes(tuple(kept))


def _note(module: nn.Module) -> str:
    if mixin_for(module) is not None:
        return "" if isinstance(module, Masked) else MASKABLE
    has_modules = any(name != CHILD for name, _ in module.named_children())
    return FUNCTIONAL if has_modules else ""


@contextmanager
def _followed(model: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Keep the modules whose forward is running in ``running``, the innermost last."""
    handles = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while running and running.pop() is not module:
            pass

    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counting(own: Iterable[Tensor], count: Callable[[int], object]) -> Iterator[None]:
    """Call ``count`` with the bytes of each storage that autograd saves in the block, once; ``own`` is not counted."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no new storage gets the address of an old one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in kept:
            kept[storage._cdata] = storage
            count(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
