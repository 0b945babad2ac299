"""The tensors of an adapter, by their keys in the file."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .._model.keys import own_keys, tensors_as
from .._model.state import Adapter, Injection
from .._model.targets import dotted, names_of
from .peft_format import factor_shapes

State = dict[str, Tensor]


def adapter_tensors(root: nn.Module, injection: Injection, adapter: Adapter) -> tuple[State, frozenset[str]]:
    """Return copies of an adapter's tensors by file key, and the keys of the buffers that differ from the base's."""
    buffers = moved_buffers(root, injection, adapter)
    own = own_keys(root, adapter.plan, buffers)
    tensors = {key: tensor.detach().clone() for key, tensor in adapter_state(root, adapter, own).items()}
    return tensors, frozenset(buffers)


def moved_buffers(root: nn.Module, injection: Injection, adapter: Adapter) -> set[str]:
    """Return the state-dict keys of the persistent buffers whose values in this adapter differ from the base's."""
    names = names_of(root)
    moved = set()
    for place in injection.places:
        is_there = place.name in place.home and place.module in names
        if place.is_parameter or not place.is_saved or not is_there:
            continue
        if place.has_moved(adapter.plan.adapter_name):
            moved.add(dotted(names[place.module], place.name))
    return moved


def adapter_state(root: nn.Module, adapter: Adapter, own: set[str]) -> State:
    """Return every tensor of the adapter by its key in the file: the model's own tensors, not copies."""
    state = tensors_as(root, adapter.plan.adapter_name)
    return dict(_factors(adapter)) | {key: state[key] for key in state if key in own}


def _factors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for plan, change in zip(adapter.plan.layers, adapter.changes, strict=True):
        change.run_hooks()
        tensors = (*change.stored().values(), *((change.lora_magnitude,) if change.use_dora else ()))
        for (key, shape), tensor in zip(factor_shapes(plan).items(), tensors, strict=True):
            yield key, tensor.view(shape)
