"""``load_adapter``: reads an adapter, of convlora or another library, onto its base; all checks come first."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .._layer.adapted import CHILD
from .._layer.computed import weight_shape
from .._layer.places import BASE
from .._model.inject import applied
from .._model.keys import own_keys, places_of, tensors_as
from .._model.options import check_name, in_our_words
from .._model.state import activate, check_addable, root_of, the_adapter, the_injection
from .._model.targets import dotted
from .._plan import Plan
from ..errors import CheckpointError
from .contents import State, adapter_state
from .digests import digest
from .files import TensorFile, finite_faults, opened, plain, refusal
from .fitting import check_fits
from .foreign import file_in, no_prefix, read_foreign
from .hub import local_directory
from .manifest import Manifest, is_own, read_manifest
from .peft_format import PREFIX
from .peft_methods import MAGNITUDE

M = TypeVar("M", bound=nn.Module)


@in_our_words
def load_adapter(
    model: M,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    head: bool = True,
    prefix: str | None = None,
    check_base: bool = True,
    check_finite: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> M:
    """Inject a saved adapter into a base model, in place; the model then predicts bit for bit as when it was saved.

    >>> model = timm.create_model("resnet50", pretrained=True, num_classes=1)
    >>> convlora.load_adapter(model, "tumour/")                   # or "user/repo" on the Hugging Face Hub

    If the base carries adapters already, the loaded one is added and becomes active with ``set_adapter``. Files of
    Hugging Face peft, diffusers, LyCORIS and kohya's scripts are read too if the adapter predicts the same here;
    ``docs/peft.md`` lists them.

    Args:
        model: the base as it was built for training.
        directory: a directory that :func:`save_adapter` wrote; or peft's directory; or a ``.safetensors`` file; or, if
            no such path exists, a repository on the hub, ``"user/repo"``. The adapter's two files are downloaded once
            and kept in the hub's cache.
        adapter_name: another name for the adapter; default the saved one, or ``"default"``.
        head: False does not load the modules that the adapter trained in full, and trains the model's own instead, as
            for another number of classes. Only for files of convlora.
        prefix: chooses one model's adapter from a file that holds several: ``"unet"`` or ``"text_encoder"`` in
            diffusers' files, ``"lora_unet"`` or ``"lora_te1"`` in kohya's. Default: the only one.
        check_base: whether to refuse a base whose tensors differ from those that the adapter was trained on. Tensors
            that have another dtype than at training are not compared. False loads onto any base of the same
            architecture. Files of other libraries do not describe their base.
        check_finite: whether to refuse NaN and Inf in the adapter's factors, and in its head and statistics where the
            base's are finite.
        revision: a branch, tag or commit of the repository; default its main branch.
        token: for a private or gated repository, as huggingface_hub takes it; default the one you logged in with.

    Returns:
        The same object; factors and head are trainable as after :func:`convlora.inject`.

    Raises:
        CheckpointError: no adapter is found, the file is damaged, the base is another, or a tensor is not finite; every
            difference is named. The header is checked against the file's size and the model before tensors are read.
        StateError: the model carries an adapter of this name already, or is merged.

    Warns:
        UserWarning: tensors of the base differ from those at training by rounding alone.

    Whatever is raised, the model is as it was.
    """
    root = root_of(model)

    def named(plan: Plan) -> Plan:
        plan = plan if adapter_name is None else replace(plan, adapter_name=adapter_name)
        check_name(plan.adapter_name)
        check_addable(root, plan.adapter_name)
        return plan

    path = local_directory(directory, revision, token)
    plan, tensors, manifest = read_adapter(
        path, root, adapter_name or "default", named, check_base, check_finite, head=head, prefix=prefix
    )
    install(plan, tensors, manifest, root)
    return model


def read_adapter(
    path: Path,
    root: nn.Module,
    adapter_name: str,
    named: Callable[[Plan], Plan],
    check_base: bool,
    check_finite: bool,
    remembered: Callable[[Tensor], str] | None = None,
    head: bool = True,
    prefix: str | None = None,
) -> tuple[Plan, State, Manifest]:
    """Return the plan, tensors and manifest of an adapter that fits a base.

    Args:
        path: the file, or its directory.
        root: the base, plain or with adapters.
        adapter_name: the adapter's name if the file states none.
        named: returns the plan with its new name, or raises; called before the base is read, which takes long.
        check_base: as for :func:`load_adapter`; so are ``check_finite``, ``head`` and ``prefix``.
        remembered: returns the digest of a tensor of the base; default: computes it.
    """
    with opened(file_in(path)) as file:
        foreign = None if is_own(file) else read_foreign(file, root, adapter_name, prefix)
        if foreign and not head:
            raise CheckpointError(
                f"{file.path} was not written by convlora, and head=False is only for convlora's files. Load it into "
                "a model with the same head. Nothing was changed."
            )
        if prefix is not None and not foreign:
            raise no_prefix(file.path)
        manifest = foreign[0] if foreign else read_manifest(file)
        if not head:
            manifest = manifest.without_heads()
        plan = named(manifest.plan)
        if foreign is None:
            check_fits(manifest, root, check_base, remembered)
        if not head:
            plan = _counted_anew(plan, root)
        tensors = foreign[1] if foreign else read_tensors(file, manifest)
    if check_finite:
        _check_finite(manifest, tensors, root)
    return plan, tensors, manifest


def _counted_anew(plan: Plan, root: nn.Module) -> Plan:
    """Return the plan with the parameter counts and the skipped layers of this model's own head."""
    modules = dict(root.named_modules(remove_duplicate=False))
    saved = {id(p): p.numel() for name in plan.modules_to_save for p in modules[name].parameters()}
    saved |= {id(bias): bias.numel() for name in plan.biases for bias in (cast(Tensor, modules[name].bias),)}
    shapes = {each.name: weight_shape(modules[each.name]) for each in plan.skipped if each.name in modules}
    skipped = tuple(replace(each, weight_shape=shapes.get(each.name, ())) for each in plan.skipped)
    numbers = sum(p.numel() for name, p in root.named_parameters() if f".{CHILD}." not in f".{name}")
    return replace(plan, saved_parameters=sum(saved.values()), base_parameters=numbers, skipped=skipped)


def install(plan: Plan, tensors: State, manifest: Manifest, root: nn.Module) -> None:
    """Carry out a plan that fits the model and load the adapter's tensors; all or nothing."""
    with applied(plan, root):
        _copy_tensors(tensors, manifest, root, plan.adapter_name)
        injection = the_injection(root)[1]
        activate(root, injection, injection.now, injection.disabled)  # mixtures are computed from the loaded tensors


def read_tensors(file: TensorFile, manifest: Manifest) -> State:
    """Return every tensor of a saved adapter, by key without peft's prefix.

    Raises:
        CheckpointError: a tensor differs from its digest.
    """
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in file.read().items()}
    damaged = [key for key, tensor in tensors.items() if digest(tensor) != manifest.adapter.get(key)]
    if damaged:
        raise CheckpointError(f"{file.path} is damaged: {plain(damaged[0])} is not what was saved; get the file again.")
    return {key: tensor for key, tensor in tensors.items() if manifest.takes(key)}


def _check_finite(manifest: Manifest, tensors: State, root: nn.Module) -> None:
    faults = list(finite_faults(tensors, tensors_as(root, BASE)))
    if faults:
        remedy = "Take an adapter from before the training diverged, or pass check_finite=False. Nothing was changed."
        raise refusal(f"{manifest.file}: its tensors are not finite:", faults, remedy)


def _copy_tensors(tensors: State, manifest: Manifest, root: nn.Module, adapter_name: str) -> None:
    adapter = the_adapter(the_injection(root)[1], adapter_name)
    own = own_keys(root, manifest.plan, manifest.buffers)
    with torch.inference_mode(False), torch.no_grad():
        for plan, change in zip(manifest.plan.layers, adapter.changes, strict=True):
            stored = {name: tensors[dotted(plan.name, name)] for name in plan.stored_shapes}
            change.to(next(iter(stored.values())).dtype)  # in another dtype the factors would predict other bits
            change.restore(stored)
            if plan.use_dora:
                change.lora_magnitude.copy_(tensors[dotted(plan.name, MAGNITUDE)].flatten())
        there = adapter_state(root, adapter, own)
        own_tensors = {key: tensor for key, tensor in there.items() if key in own and manifest.takes(key)}
        for key, tensor in own_tensors.items():
            tensor.copy_(tensors[key])
        for key, place in places_of(root).items():
            if key in tensors and key not in own_tensors:  # a buffer that is None in the base
                place.set_tensor(adapter_name, tensors[key].to(next(root.parameters()).device))
