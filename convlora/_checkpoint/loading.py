"""Reading an adapter, ours or another library's, onto its base; everything is checked before anything is changed."""

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
from ..errors import CheckpointError, few
from .contents import State, adapter_state
from .digests import digest
from .files import TensorFile, finite_faults, opened, plain
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
    """Inject a saved adapter into a base model, in place; it then predicts bit for bit as when saved.

    >>> model = timm.create_model("resnet50", pretrained=True, num_classes=1)
    >>> convlora.load_adapter(model, "tumour/")                   # or "user/repo" on the Hugging Face Hub

    Where the base carries adapters already, the loaded one comes beside them and waits for ``set_adapter``.
    LoRA checkpoints of Hugging Face peft and of diffusers, and files of kohya's scripts and LyCORIS, are read too,
    where they predict the same here; ``docs/peft.md`` says which.

    Args:
        model: the base as it was built for training.
        directory: what :func:`save_adapter` wrote; or peft's directory; or a ``.safetensors`` file; or, where nothing
            is at that path, a repository on the hub, ``"user/repo"``, of which the adapter's two files are downloaded
            once and kept in the hub's cache.
        adapter_name: another name for the adapter; default the saved one, or ``"default"``.
        head: False leaves the modules that the adapter trained in full in the file, and trains the model's own in their
            place: for another number of classes. In files of convlora's alone.
        prefix: which model's adapter is loaded, from a file that holds those of several: ``"unet"`` or
            ``"text_encoder"`` in diffusers' files, ``"lora_unet"`` or ``"lora_te1"`` in kohya's. Default: the only one.
        check_base: refuse a base whose tensors differ from those that the adapter was trained on. Tensors in
            another dtype than then are not compared. False loads onto any base of the same architecture. The files
            of other libraries do not say what base they are for.
        check_finite: refuse NaN and Inf in the adapter's factors, and in its head and statistics where the base's own
            are finite. False loads them.
        revision: a branch, tag or commit of the repository; default its main branch.
        token: for a private or gated repository, as huggingface_hub takes it; default the one you logged in with.

    Returns:
        The same object; factors and head are trainable as after :func:`convlora.inject`.

    Raises:
        CheckpointError: no adapter there, a damaged file, another base, or NaN; what differs is named. Whatever a file
            claims is checked against its size and the model before its tensors are read.
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
    """The plan, tensors and manifest of an adapter that fits a base; a warning names the caller's caller's line.

    Args:
        path: of the file, or of the directory that it is in.
        root: the base, plain or with adapters.
        adapter_name: what it is called where the file does not say it.
        named: gives the plan the name that it is to have, or raises; before the base is read, which takes long.
        check_base: as for :func:`load_adapter`; ``check_finite``, ``head`` and ``prefix`` likewise.
        remembered: gives digests of the base's tensors; default computing them.
    """
    with opened(file_in(path)) as file:
        foreign = None if is_own(file) else read_foreign(file, root, adapter_name, prefix)
        if foreign and not head:
            raise CheckpointError(
                f"{file.path} was not written by convlora, and head=False is for files that were. Load it into a model "
                "with the same head. Nothing was changed."
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
    """The plan with the numbers of this model's head, and the head's layers as they are here."""
    modules = dict(root.named_modules(remove_duplicate=False))
    saved = {id(p): p.numel() for name in plan.modules_to_save for p in modules[name].parameters()}
    saved |= {id(bias): bias.numel() for name in plan.biases for bias in (cast(Tensor, modules[name].bias),)}
    shapes = {each.name: weight_shape(modules[each.name]) for each in plan.skipped if each.name in modules}
    skipped = tuple(replace(each, weight_shape=shapes.get(each.name, ())) for each in plan.skipped)
    numbers = sum(p.numel() for name, p in root.named_parameters() if f".{CHILD}." not in f".{name}")
    return replace(plan, saved_parameters=sum(saved.values()), base_parameters=numbers, skipped=skipped)


def install(plan: Plan, tensors: State, manifest: Manifest, root: nn.Module) -> None:
    """Carry out a plan that fits the model, and give the adapter its numbers; all or nothing."""
    with applied(plan, root):
        _copy_tensors(tensors, manifest, root, plan.adapter_name)
        injection = the_injection(root)[1]
        activate(root, injection, injection.now, injection.disabled)  # a bias at a strength is mixed of these numbers


def read_tensors(file: TensorFile, manifest: Manifest) -> State:
    """Every tensor of a saved adapter, without peft's prefix.

    Raises:
        CheckpointError: one is not what was saved.
    """
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in file.read().items()}
    damaged = [key for key, tensor in tensors.items() if digest(tensor) != manifest.adapter.get(key)]
    if damaged:
        raise CheckpointError(f"{file.path} is damaged: {plain(damaged[0])} is not what was saved; get the file again.")
    return {key: tensor for key, tensor in tensors.items() if manifest.takes(key)}


def _check_finite(manifest: Manifest, tensors: State, root: nn.Module) -> None:
    faults = list(finite_faults(tensors, tensors_as(root, BASE)))
    if faults:
        lines = [f"{manifest.file}: what it holds are not all numbers:", *few([f"  {plain(f)}" for f in faults])]
        remedy = "Take an adapter from before the training diverged, or pass check_finite=False. Nothing was changed."
        raise CheckpointError("\n".join([*lines, remedy]))


def _copy_tensors(tensors: State, manifest: Manifest, root: nn.Module, adapter_name: str) -> None:
    adapter = the_adapter(the_injection(root)[1], adapter_name)
    own = own_keys(root, manifest.plan, manifest.buffers)
    with torch.inference_mode(False), torch.no_grad():
        for plan, change in zip(manifest.plan.layers, adapter.changes, strict=True):
            stored = {name: tensors[dotted(plan.name, name)] for name in plan.stored_shapes}
            change.to(next(iter(stored.values())).dtype)  # as trained: another dtype would predict other bits
            change.restore(stored)
            if plan.use_dora:
                change.lora_magnitude.copy_(tensors[dotted(plan.name, MAGNITUDE)].flatten())
        there = adapter_state(root, adapter, own)
        own_tensors = {key: tensor for key, tensor in there.items() if key in own and manifest.takes(key)}
        for key, tensor in own_tensors.items():
            tensor.copy_(tensors[key])
        for key, place in places_of(root).items():
            if key in tensors and key not in own_tensors:  # None in the base
                place.set_tensor(adapter_name, tensors[key].to(next(root.parameters()).device))
