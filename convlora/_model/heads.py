"""Finds the model's heads, from its attributes, names and layers, or from one forward of an example input."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from .._layer.computed import weight_shape
from .._layer.swap import original_class
from .._plan import LayerPlan
from ..errors import TargetError, warn
from .observe import base_alone
from .state import injections
from .targets import Named, is_adaptable, is_counting

CLASSIFIERS = ("fc", "classifier", "tail", "heads", "head")
DETECTORS = {"cls_logits", "bbox_pred", "bbox_reg", "bbox_ctrness", "cls_score", "mask_fcn_logits", "kps_score_lowres"}
"""The output layers of torchvision's and detectron2's detectors."""
HEAD = re.compile(
    r"(?!pre)((\w+_)?(heads?|classifiers?|logits?|outputs?|predictors?)|\w*fc|score|outc|outconv|seg_layers"
    r"|(final|last|out|output|pred|prediction|cls|seg|classification)(_?(conv|layer|block|proj)s?)?(_\d+)*"
    r"|conv_?(out|last|final|seg)|(\w+_)?tail|ending)"
)
LATENT = re.compile(r"(post_)?quant(_?conv)?\w*")
"""Layers of autoencoders that are registered after the decoder and run before it."""
AUXILIARY = re.compile(r"aux\w*", re.IGNORECASE)
ULTRALYTICS = re.compile(
    r"(one2one_)?cv[2-5](_\w+)?|(enc|dec)_(score|bbox)_head|denoising_class_embed|proto\.semseg|classifier|aux_head|head"
)
"""Parts of the last module of Ultralytics' networks that give an output, or have a size for each class."""


def find_heads(model: nn.Module, named: list[Named], example: object = None) -> tuple[list[Named], str]:
    """Return the layers that give the model's outputs, and how they were found; an empty list if none was found.

    In this order: timm's ``get_classifier()``; diffusers' models, which have no new head; the outputs of the example
    input; the names of detectors' output layers and of the model's attributes; the last layer, if no other layer with
    parameters follows it.

    Args:
        model: the model.
        named: the model's modules.
        example: the model's input: one argument, a tuple of arguments, or a dict of keyword arguments; None for none.

    Raises:
        TargetError: the model does not take the example.
    """
    constant = constants(model, named)
    inner = _unwrapped(model)
    found, how = _told(inner, named)
    is_told = bool(how)
    if not how and example is not None:
        found, how = outputs_of(model, named, constant, example), "the example's outputs"
        found += _of_detector(inner)  # in eval mode some detectors' output layers feed other layers, or do not run
    if not found and not is_told:
        found, how = _by_name(inner)
    if not how:
        found, how = _last(model, named, constant), LAST
    if found and not is_told:
        found += [
            layer for name, child in inner.named_children() if AUXILIARY.fullmatch(name) for layer in _ends(child)
        ]
    heads = [n for n in named if n.name and any(n.module is layer for layer in found)]
    return heads, how if heads or is_told or how == REMOVED else NONE


LAST = "the last layer"
NONE = "no head was found; name one with modules_to_save"
REMOVED = "its head has no layer"
WHOLE = "a model of diffusers, which has no new layers"


def constants(model: nn.Module, named: list[Named]) -> set[nn.Module]:
    """Return the layers that are no heads: those that the user froze (a backbone), and those that hold 0, 1, 2, …"""
    layers = {n.module for n in named if is_adaptable(n.module)}
    counting = {layer for layer in layers if is_counting(layer)}
    trainable = {layer for layer in layers if any(p.requires_grad for p in layer.parameters())}
    trainable |= {module for _, _, each in injections(model) for module, _ in each.frozen}
    return counting | (layers - trainable if layers & trainable else set())


def new_parts(model: nn.Module, named: list[Named]) -> list[Named]:
    """Return the largest parts whose norm layers all have their initial values, if other norms of the model do not.

    A norm that has seen data has changed statistics, and a trained one has changed weights. This distinguishes a new
    decoder on a pretrained encoder from a pretrained decoder; a network with random weights has no such part. A layer
    directly before a single new norm counts as new, too.
    """
    affine = {n.module: p for n in named if not is_adaptable(n.module) and (p := _vectors(n.module, "weight", "bias"))}
    statistics = {n.module: p for n in named if (p := _vectors(n.module, "running_mean", "running_var"))}
    trained, seen = ({m for m, tensors in each.items() if any(map(_varies, tensors))} for each in (affine, statistics))
    fresh = affine.keys() - trained - statistics.keys() if trained else set()
    if trained or seen:
        fresh |= statistics.keys() - seen - trained
    found = set(_all_fresh(model, fresh, seen | trained))
    return [n for n in named if n.module in found]


def _all_fresh(module: nn.Module, fresh: set[nn.Module], others: set[nn.Module]) -> Iterator[nn.Module]:
    inside = set(module.modules())
    if inside & fresh and not inside & others:
        yield module
    elif inside & fresh:
        before: nn.Module | None = None
        for child in module.children():
            if child in fresh and before is not None and is_adaptable(before):
                yield before
            yield from _all_fresh(child, fresh, others)
            before = child


def _vectors(module: nn.Module, *names: str) -> list[Tensor]:
    """Return these tensors of a module if each is a vector of at least two values; else an empty list."""
    found = [getattr(module, name, None) for name in names]
    tensors = [t for t in found if isinstance(t, Tensor) and t.dim() == 1 and len(t) > 1 and not t.is_meta]
    return tensors if len(tensors) == len(names) else []


def _varies(tensor: Tensor) -> bool:
    return bool((tensor != tensor[0]).any())


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside a module that only holds it, such as a LightningModule; else the module."""
    children = [child for child in model.children() if _layers(child)]
    if callable(getattr(model, "get_classifier", None)) or len(children) != 1 or is_adaptable(children[0]):
        return model
    return _unwrapped(children[0]) if len(_layers(children[0])) > 1 else model


def _layers(module: object) -> list[nn.Module]:
    return [m for m in module.modules() if is_adaptable(m)] if isinstance(module, nn.Module) else []


def _told(model: nn.Module, named: list[Named]) -> tuple[list[nn.Module], str]:
    if any(cls.__module__.startswith("diffusers.") for cls in original_class(model).__mro__):
        return _made_of_unet(model), WHOLE
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return [], ""
    found = get_classifier()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    return [layer for head in heads for layer in _layers(head)[-1:]], "get_classifier()"


def _made_of_unet(model: nn.Module) -> list[nn.Module]:
    """Return a ControlNet's parts that its UNet lacks, while its zero-initialised convolutions are still zero."""
    parts = [child for name, child in model.named_children() if name.startswith("controlnet_")]
    weights = (layer._parameters.get("weight") for part in parts for layer in _layers(part))
    return parts if any(w is not None and not w.is_meta and not w.any() for w in weights) else []


def _by_name(model: nn.Module) -> tuple[list[nn.Module], str]:
    if detectors := _of_detector(model):
        return detectors, "names of a detector's outputs"
    for name in CLASSIFIERS:
        if found := _ends(getattr(model, name, None)):
            return found, f"attribute {name!r}"
    named = {name: _ends(child) for name, child in model.named_children() if HEAD.fullmatch(name) and _layers(child)}
    tails = {name: ends for name, ends in named.items() if name.endswith("tail")}
    if named := tails or named:
        return [layer for each in named.values() for layer in each], f"attribute {', '.join(map(repr, named))}"
    removed = any(isinstance(getattr(model, name, None), nn.Module) for name in CLASSIFIERS)
    return [], REMOVED if removed else ""


def _of_detector(model: nn.Module) -> list[nn.Module]:
    """Return the output layers of torchvision's, detectron2's and Ultralytics' networks, by their names."""
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in DETECTORS and is_adaptable(m)]
    for last in model.modules():
        if any(cls.__module__ == "ultralytics.nn.modules.head" for cls in type(last).__mro__):
            parts = [child for name, child in last.named_modules() if ULTRALYTICS.fullmatch(name)]
            parts = [part for each in parts for part in (each if isinstance(each, nn.ModuleList) else [each])]
            owning = [[m for m in part.modules() if next(m.parameters(False), None) is not None] for part in parts]
            ends = [each[-1] for each in owning if each]
            found += [end for end in ends if is_adaptable(end) or isinstance(end, nn.Embedding)]
    return found


def _ends(module: object) -> list[nn.Module]:
    """Return the output layers of a head: those of each part whose name is a head's, or else its last layer."""
    if not isinstance(module, nn.Module) or is_adaptable(module):
        return _layers(module)[:1]
    parts = [(name, child) for name, child in module.named_children() if _layers(child)]
    beside = _are_beside([_layers(child) for _, child in parts]) and len({str(_form(child)) for _, child in parts}) == 1
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or (beside and not any(is_adaptable(c) for _, c in parts)):
        inside = [_layers(child) for _, child in parts]
        chained = all(_outputs(a[-1]) == _inputs(b[0]) for a, b in pairwise(inside))
        chosen = parts[-1:] if chained else parts
    else:
        chosen = [part for part in parts if HEAD.fullmatch(part[0]) or part[0] in DETECTORS] or parts[-1:]
    return [layer for _, child in chosen for layer in _ends(child)]


def _are_beside(parts: list[list[nn.Module]]) -> bool:
    """Return whether several parts are parallel: all have the same input channels, which no part outputs."""
    read = {_inputs(part[0]) for part in parts}
    return len(parts) > 1 and len(read) == 1 and not read & {_outputs(part[-1]) for part in parts}


def _outputs(layer: nn.Module) -> int:
    return int(getattr(layer, "out_channels", getattr(layer, "out_features", 0)))


def _inputs(layer: nn.Module) -> int:
    return int(getattr(layer, "in_channels", getattr(layer, "in_features", 0)))


def _last(model: nn.Module, named: list[Named], constant: set[nn.Module]) -> list[nn.Module]:
    """Return the last layer, unless layers with parameters follow it or it is in one of several equal blocks.

    For the last of a list of parallel layers, all layers of the list and of the lists beside it are returned.
    """
    owning = [n for n in named if any(p is not None for p in n.module._parameters.values()) or _counts(n.module)]
    owning = [n for n in owning if n.module not in constant and not LATENT.fullmatch(n.name.partition(".")[0])]
    if not owning or not is_adaptable(owning[-1].module) or _repeats(model, owning[-1].name):
        return []
    last = owning[-1]
    for above in _above(last.name):
        parent = model.get_submodule(above)
        if isinstance(parent, nn.ModuleList):
            beside = model.get_submodule(above.rpartition(".")[0]).children()
            lists = [each for each in beside if each is parent or _parallel(each, len(parent))]
            if _parallel(parent, len(parent)):
                return [layer for each in lists for layer in _ends(each)]
    return _numbered_beside(model, last)


def _counts(module: nn.Module) -> bool:
    return is_adaptable(module) or isinstance(module, _NormBase)  # also a norm without parameters


def _numbered_beside(model: nn.Module, last: Named) -> list[nn.Module]:
    """Return the last layer, and the parallel layers whose names differ from its name only in the last number."""
    above, _, name = last.name.rpartition(".")
    stem = name.rstrip("0123456789")
    numbered = [child for each, child in model.get_submodule(above).named_children() if _is_numbered(each, stem)]
    layers = [child for child in numbered if is_adaptable(child)]
    return layers if stem.endswith("_") and _are_beside([[layer] for layer in layers]) else [last.module]


def _is_numbered(name: str, stem: str) -> bool:
    return name.startswith(stem) and name[len(stem) :].isdigit()


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _parallel(module: nn.Module, length: int) -> bool:
    """Return whether this is a list of ``length`` parts that all end in a pointwise layer with equal outputs."""
    if not isinstance(module, nn.ModuleList) or len(module) != length:
        return False
    ends = _ends(module)
    pointwise = all(isinstance(end, nn.Linear) or set(getattr(end, "kernel_size", ())) == {1} for end in ends)
    return len(ends) == length > 1 and pointwise and len({_outputs(end) for end in ends}) == 1


def _repeats(model: nn.Module, name: str) -> bool:
    """Return whether the layer is in one of several equal blocks, like the last layer of a feature extractor."""
    inner, repeated = name, False
    for above in _above(name):
        parent, entry = model.get_submodule(above), model.get_submodule(inner)
        if not isinstance(entry, nn.Linear) and isinstance(parent, (nn.Sequential, nn.ModuleList)):
            repeated |= any(_form(each) == _form(entry) for each in parent.children() if each is not entry)
        inner = above
    return repeated


def _form(module: nn.Module) -> list[tuple[type, object]]:
    return [(original_class(m), weight_shape(m)) for m in _layers(module)]


def warn_of_frozen(model: nn.Module, named: list[Named], settled: set[nn.Module]) -> None:
    """Warn if no head was found and layers that may be one stay frozen: linear layers, and layers with one output.

    Args:
        model: the model.
        named: its modules.
        settled: layers that are adapted, or that the user excluded; they cause no warning.
    """
    constant = constants(model, named)
    candidates = [
        n
        for n in named
        if n.name and n.module not in constant | settled and is_adaptable(n.module)
        if (isinstance(n.module, nn.Linear) or _outputs(n.module) == 1) and not _repeats(model, n.name)
    ]
    if candidates:
        fewest = sorted(candidates, key=lambda n: _outputs(n.module))
        names = ", ".join(n.name for n in fewest[:4]) + (", …" if len(fewest) > 4 else "")
        warn(
            f"{original_class(model).__name__}: no head was found, and layers stay frozen that may be new: {names}. "
            f"Name the new layers, modules_to_save=[{fewest[0].name!r}], or give an input of the model, example=x. "
            "If no layer is new, write modules_to_save=None.",
        )


def warn_of_linear(model: nn.Module, layers: list[LayerPlan], others: list[nn.Module]) -> None:
    """Warn if only convolutions are adapted by default, and the model's linear layers have more parameters."""
    adapted = [layer for layer in layers if layer.rank]
    linear = [math.prod(weight_shape(module)) for module in others if isinstance(module, nn.Linear)]
    if len(linear) > len(adapted) and sum(linear) > sum(layer.base_parameters for layer in adapted):
        warn(
            f"{original_class(model).__name__}: by default only convolutions are adapted, {len(adapted)} here, and "
            f"{len(linear)} linear layers with {sum(linear):,} parameters stay frozen. Adapt both with "
            "target_modules=[nn.Conv2d, nn.Linear], or write target_modules=nn.Conv2d if this is intended.",
        )


def outputs_of(model: nn.Module, named: list[Named], constant: set[nn.Module], example: object) -> list[nn.Module]:
    """Return the layers that compute the model's outputs, found in one forward in eval mode; nothing is changed.

    Operations without parameters may follow such a layer: an activation, an interpolation, a sum of two heads. A layer
    that a norm layer follows is no head. If an output is the sum of several layers' outputs, layers whose output other
    layers read too are left out, such as the blocks of a residual network.

    Args:
        model: the model.
        named: its modules.
        constant: layers that are no heads.
        example: the model's input: one argument, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        TargetError: the model does not take it.
    """
    flow = _Flow()
    leaves = [n.module for n in named if is_adaptable(n.module) or not any(True for _ in n.module.children())]
    owning = [m for m in leaves if m not in constant and (_counts(m) or any(True for _ in m.parameters()))]
    with ExitStack() as undo:
        undo.enter_context(base_alone(model))
        for module in owning:
            undo.callback(module.register_forward_pre_hook(flow.read, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(flow.write).remove)
        undo.enter_context(torch.no_grad())
        undo.enter_context(flow)
        try:
            if isinstance(example, Mapping):
                output = model(**example)
            else:
                output = model(*example) if isinstance(example, tuple) else model(example)
        except Exception as cause:
            raise TargetError(
                f"{type(model).__name__} does not take the example ({type(cause).__name__}: {cause}). Give what "
                "its forward takes: one argument, a tuple of arguments, or a dict of keyword arguments. Nothing was "
                "changed."
            ) from cause
    seen = [flow.sources_of([tensor]) for tensor in tensors_in(output)]
    heads = {layer for sources in seen for layer in sources if len(sources) == 1 or layer not in flow.was_read}
    return [module for module in owning if module in heads and is_adaptable(module)]


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records for each tensor the last layers from whose outputs it was computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.was_read: set[nn.Module] = set()
        self._sources: dict[StorageWeakRef, set[nn.Module]] = {}  # by storage, since views share their values

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True torch imports its compiler at the first operation, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; its results get the layers of its arguments."""
        result = func(*args, **(kwargs or {}))
        sources = self.sources_of(tensors_in((args, kwargs)))
        if sources:
            for key in map(_storage, tensors_in(result)):
                self._sources[key] = self._sources.get(key, set()) | sources
        return result

    def sources_of(self, tensors: Iterable[Tensor]) -> set[nn.Module]:
        """Return the layers from whose outputs these tensors were computed."""
        return {layer for tensor in tensors for layer in self._sources.get(_storage(tensor), ())}

    def read(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record, before a layer's forward, the layers whose outputs it reads."""
        self.was_read |= self.sources_of(tensors_in((args, kwargs)))

    def write(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record, after a layer's forward, that its outputs come from this layer."""
        for tensor in tensors_in(output):
            self._sources[_storage(tensor)] = {module}


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Return a key of the tensor's storage, which no later storage gets while the key is held."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield every strided tensor in a forward's arguments or output: nested sequences, mappings and data classes."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list, set)):
        for each in value:
            yield from tensors_in(each)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, each.name) for each in fields(value)])
