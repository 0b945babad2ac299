"""Which tensors are an adapter's, by their keys in the file."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .._model.keys import own_keys, tensors_as
from .._model.state import Adapter, Injection
from .._model.targets import dotted
from .peft_format import factor_shapes

State = dict[str, Tensor]


def adapter_tensors(root: nn.Module, injection: Injection, adapter: Adapter) -> tuple[State, frozenset[str]]:
    """Copies of an adapter's tensors by their keys in the file, and the keys of the buffers among them that moved."""
    buffers = moved_buffers(root, injection, adapter)
    own = own_keys(root, adapter.plan, buffers)
    tensors = {key: tensor.detach().clone() for key, tensor in adapter_state(root, adapter, own).items()}
    return tensors, frozenset(buffers)


def moved_buffers(root: nn.Module, injection: Injection, adapter: Adapter) -> set[str]:
    """Keys of the base's persistent buffers whose numbers are no longer the base's in this adapter."""
    names = {module: name for name, module in root.named_modules()}
    moved = set()
    for place in injection.places:
        is_there = place.name in place.home and place.module in names
        if place.is_parameter or not place.is_saved or not is_there:
            continue
        if place.has_moved(adapter.plan.adapter_name):
            moved.add(dotted(names[place.module], place.name))
    return moved


def adapter_state(root: nn.Module, adapter: Adapter, own: set[str]) -> State:
    """Every tensor of the adapter by its key in the file: the model's own tensors, not copies."""
    state = tensors_as(root, adapter.plan.adapter_name)
    return dict(_factors(adapter)) | {key: state[key] for key in state if key in own}


def _factors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for plan, change in zip(adapter.plan.layers, adapter.changes, strict=True):
        change.run_hooks()
        tensors = (*change.stored().values(), *((change.lora_magnitude,) if change.use_dora else ()))
        for (key, shape), tensor in zip(factor_shapes(plan).items(), tensors, strict=True):
            yield key, tensor.view(shape)
