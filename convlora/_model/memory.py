"""How many bytes a training step will keep for its backward, and of which modules; found by one forward."""

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
from .observe import left_as_it_was, run_batch


@dataclass(frozen=True)
class KeptBytes:
    """What one module keeps from the forward for the backward.

    Attributes:
        name: of the module; empty for the model itself.
        kind: its class.
        count: bytes. What several modules keep, an output that the next one keeps as its input say, is counted once,
            where it was kept first.
        note: where the bytes are kept by code of its own and not by a module inside, or where less could be kept.
    """

    name: str
    kind: str
    count: int
    note: str = ""


@dataclass(frozen=True)
class SavedBytes:
    """What a training step keeps from the forward for the backward; ``print`` shows it as a table.

    Attributes:
        modules: those that keep something, in the order in which they begin to.
    """

    modules: tuple[KeptBytes, ...]

    @property
    def total(self) -> int:
        """Bytes of all modules together."""
        return sum(each.count for each in self.modules)

    def __str__(self) -> str:
        total = max(self.total, 1)
        rows = [("module", "kind", "bytes", "share", "")]
        rows += [
            (each.name or "(the model itself)", each.kind, f"{each.count:,}", f"{each.count / total:.1%}", each.note)
            for each in self.modules
        ]
        rows.append(("together", "", f"{self.total:,}", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{name:{widths[0]}}  {kind:{widths[1]}}  {count:>{widths[2]}}  {share:>{widths[3]}}  {note}".rstrip()
            for name, kind, count, share, note in rows
        )


FUNCTIONAL = "by its own code: a functional activation, a product"
MASKABLE = "less with mask_activations=True"


def saved_bytes(model: nn.Module, example: Any) -> SavedBytes:
    """How many bytes a training step on a batch like this one will keep for the backward, and of which modules.

    >>> convlora.inject(model, mask_activations=True)
    >>> print(convlora.saved_bytes(model, images))
    >>> convlora.saved_bytes(model, images).total

    Counted is the memory of every tensor that autograd keeps from a forward in train mode, each storage once, without
    the model's own parameters and buffers. Gradients, the optimizer's state and what a loss keeps are not among them;
    neither is what ``torch.utils.checkpoint`` keeps in ways of its own. Under ``torch.autocast`` call it inside the
    block. One forward is run, and no backward; parameters, gradients, buffers, modes and random numbers are as they
    were.

    Args:
        model: any module, injected or not: a plain one, all of it trainable, keeps what full fine-tuning keeps.
        example: a batch as the model takes it: a tensor, a tuple that begins with one, or a dict of arguments.
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
    names = {module: name for name, module in model.named_modules()}
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
    """Which modules are running, the innermost last."""
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
    """Tell the bytes of each storage that autograd keeps inside the block, once; those of ``own`` not at all."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that none takes another's address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in kept:
            kept[storage._cdata] = storage
            count(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
