"""Adapters on disk: safetensors and JSON, never pickle.

``adapter_model.safetensors`` is whole in itself: factors, modules trained in full, buffers that moved, and in its
header the manifest (the plan, and a digest of every tensor of the base and of the adapter). One file means one
atomic rename: a save that is cut short leaves the old adapter readable. ``adapter_config.json`` beside it is for
people and for Hugging Face peft, whose key and field names both files use, and ``README.md`` a model card.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ._adapters import check_new
from ._card import CARD, About, card, checked_about, is_replaceable
from ._checks import check_model, check_values
from ._files import SHOWN, TensorFile, finite_faults, opened, ordered, plain
from ._foreign import file_in, read_foreign
from ._hub import local_directory
from ._inject import applied
from ._manifest import (
    CONFIG,
    FORMAT,
    TENSORS,
    Manifest,
    base_keys,
    check_fits,
    digest,
    is_own,
    own_keys,
    places_of,
    read_manifest,
    tensors_as,
)
from ._merge import unmerged
from ._peft_format import PREFIX, dotted, factor_shapes, peft_config
from ._places import BASE
from ._plan import Plan
from ._state import RECORD, Adapter, Injection, check_intact, check_plain, injections, the_adapter, the_injection
from .errors import CheckpointError, StateError

M = TypeVar("M", bound=nn.Module)
State = dict[str, Tensor]


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write everything that training changed: factors, head, and norm statistics that moved; a few MB.

    >>> convlora.save_adapter(model, "tumour/")

    The directory is made where missing; an adapter already in it is replaced atomically. Works merged, too. Beside it
    goes a model card, README.md; one that you have edited, or that is another's, is left as it is.

    Args:
        model: an injected model.
        directory: where to write.
        adapter_name: one of the model's adapters; default the active one.
        metrics: what card and file say of how good it is: ``{"accuracy": 0.95}``.
        base_model: the base's name on the Hugging Face Hub, for the card: ``"timm/resnet50.a1_in1k"``.

    Returns:
        The directory.

    Raises:
        StateError: the model holds no adapter, or several injected parts; a module was replaced since injection; or
            a parameter of the base requires a gradient, so that training it would be lost.
        CheckpointError: the directory cannot be written; what was there before is still there.
        TargetError: a metric is no finite number, or ``base_model`` no name on the hub.

    Warns:
        UserWarning: every lora_B is zero, as when the optimizer was made before the injection; a tensor holds NaN or
            Inf; or README.md was left as it is.
    """
    return write_adapter(model, directory, adapter_name, checked_about(metrics, base_model))


def write_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None, about: About) -> Path:
    """What :func:`save_adapter` does, with a card that says this; a warning names the caller's caller's line."""
    root, injection = the_injection(model)
    adapter = the_adapter(injection, adapter_name)
    check_intact(root, injection)
    with unmerged(root, injection):
        buffers = _moved_buffers(root, injection, adapter)
        own = own_keys(root, adapter.plan, buffers)
        _check_nothing_lost(root, injection)
        tensors = {key: _for_disk(tensor) for key, tensor in _adapter_state(root, adapter, own).items()}
        base = tensors_as(root, BASE)
        config = peft_config(root, adapter) | {"base_model_name_or_path": about.base_model}
    digests = {key: digest(base[key]) for key in base_keys(base, own)}
    manifest = {
        "format": FORMAT,
        "plan": adapter.plan.to_json(),
        "base": digests,
        "adapter": {key: digest(tensor) for key, tensor in tensors.items()},
        "buffers": sorted(buffers),
        "metrics": dict(about.metrics),
    }
    _warn_if_untrained(adapter)
    _warn_if_not_finite(tensors, base)
    path = Path(directory)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    has_new_card = is_replaceable(path / CARD)
    if has_new_card:
        texts[CARD] = card(adapter.plan, digests, tensors, about)
    try:
        _write(path, tensors, manifest, texts)
    except (OSError, SafetensorError) as cause:  # safetensors wraps a full disk in its own
        raise CheckpointError(f"{path} cannot be written ({cause}). What was there before is still there.") from cause
    if not has_new_card:
        warn_of_old_card(path / CARD)
    return path


def _write(path: Path, tensors: State, manifest: dict[str, Any], texts: Mapping[str, str]) -> None:
    header = {"format": "pt", "convlora": json.dumps(manifest)}
    path.mkdir(parents=True, exist_ok=True)
    _tidy(path)
    with ExitStack() as files:
        files.enter_context(_put_back([path / name for name in texts]))
        first = files.enter_context(replacing(path / TENSORS))
        # Not save_file, which makes a temporary file of its own, under a name that nobody could clear away later.
        data = ordered(save({PREFIX + key: tensor for key, tensor in tensors.items()}, metadata=header))
        with first.open("wb") as stream:
            stream.writelines(data)
        for name, text in texts.items():
            files.enter_context(replacing(path / name)).write_bytes(text.encode())


def _warn_if_untrained(adapter: Adapter) -> None:
    if adapter.loras and all(lora.is_fresh() for lora in adapter.loras):
        what = "factor is as it began" if any(p.anchored for p in adapter.plan.layers) else "lora_B is zero"
        warnings.warn(
            f"every {what}: nothing was trained. Was the optimizer made before convlora.inject? Make it after, "
            "from convlora.trainable_parameters(model).",
            stacklevel=4,
        )


def _warn_if_not_finite(tensors: State, base: State) -> None:
    faults = list(finite_faults(tensors, base))
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        warnings.warn(
            f"{faults[0]}{more}: the training has diverged. It is saved as it is, and convlora.load_adapter reads it "
            "with check_finite=False alone.",
            stacklevel=4,
        )


def warn_of_old_card(file: Path) -> None:
    """Say that a card was not written; of the caller's caller's caller's line."""
    warnings.warn(
        f"{file} was edited, or not written by convlora, and is left as it is: it may not describe this adapter. "
        "Delete it to have a new one.",
        stacklevel=4,
    )


def load_adapter(
    model: M,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    check_base: bool = True,
    check_finite: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> M:
    """Inject a saved adapter into a base model, in place; it then predicts bit for bit as when saved.

    >>> model = timm.create_model("resnet50", pretrained=True, num_classes=1)
    >>> convlora.load_adapter(model, "tumour/")                   # or "user/repo" on the Hugging Face Hub

    Where the base carries adapters already, the loaded one comes beside them and waits for ``set_adapter``.
    LoRA checkpoints of Hugging Face peft and LoCon files of kohya's scripts and LyCORIS are read too, where they
    predict the same here; ``docs/peft.md`` says which.

    Args:
        model: the base as it was built for training.
        directory: what :func:`save_adapter` wrote; or peft's directory; or a ``.safetensors`` file; or, where nothing
            is at that path, a repository on the hub, ``"user/repo"``, of which the adapter's two files are downloaded
            once and kept in the hub's cache.
        adapter_name: another name for the adapter; default the saved one, or ``"default"``.
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

    Whatever is raised, the model is as it was.
    """
    root = _root(model)
    with opened(file_in(local_directory(directory, revision, token))) as file:
        foreign = None if is_own(file) else read_foreign(file, root, adapter_name or "default")
        manifest = foreign[0] if foreign else read_manifest(file)
        plan = manifest.plan if adapter_name is None else replace(manifest.plan, adapter_name=adapter_name)
        check_values(plan.rank, plan.alpha, plan.norm, plan.dropout, plan.path, plan.adapter_name)
        before = vars(root).get(RECORD)
        if isinstance(before, Injection):
            check_new(before, plan.adapter_name)
            check_intact(root, before)
        if foreign is None:
            check_fits(manifest, root, check_base)
        tensors = foreign[1] if foreign else read_tensors(file, manifest)
    if check_finite:
        _check_finite(manifest, tensors, root)
    install(plan, tensors, manifest, root)
    return model


def install(plan: Plan, tensors: State, manifest: Manifest, root: nn.Module) -> None:
    """Carry out a plan that fits the model, and give the adapter its numbers; all or nothing."""
    with applied(plan, root):
        _copy_tensors(tensors, manifest, root, plan.adapter_name)


def _root(model: nn.Module) -> nn.Module:
    """The module that carries adapters already, or else the model, which then must be plain."""
    check_model(model)
    if list(injections(model)):
        return the_injection(model)[0]
    check_plain(model)
    return model


def adapter_tensors(root: nn.Module, injection: Injection, adapter: Adapter) -> tuple[State, frozenset[str]]:
    """Copies of an adapter's tensors by their keys in the file, and the keys of the buffers among them that moved."""
    buffers = _moved_buffers(root, injection, adapter)
    own = own_keys(root, adapter.plan, buffers)
    tensors = {key: tensor.detach().clone() for key, tensor in _adapter_state(root, adapter, own).items()}
    return tensors, frozenset(buffers)


def _moved_buffers(root: nn.Module, injection: Injection, adapter: Adapter) -> set[str]:
    """Keys of the base's persistent buffers whose numbers are no longer the base's in this adapter."""
    names = {module: name for name, module in root.named_modules()}
    moved = set()
    for place in injection.places:
        now, base = place.of(adapter.plan.adapter_name), place.of(BASE)
        is_there = place.name in place.home and place.module in names
        if now is None or place.is_parameter or not place.is_saved or not is_there:
            continue
        if base is None or not torch.equal(now, base.to(now.device, now.dtype)):
            moved.add(dotted(names[place.module], place.name))
    return moved


def _check_nothing_lost(root: nn.Module, injection: Injection) -> None:
    own = own_keys(root, the_adapter(injection, None).plan, ())
    factors = {id(p) for adapter in injection.adapters.values() for p in adapter.factors()}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad and name not in own and id(parameter) not in factors:
            raise StateError(
                f"{name} requires a gradient but belongs to the base, which is not saved. Name its module in "
                "modules_to_save when you inject, or freeze it with requires_grad_(False). Nothing was written."
            )


def _adapter_state(root: nn.Module, adapter: Adapter, own: set[str]) -> State:
    """Every tensor of the adapter by its key in the file: the model's own tensors, not copies."""
    state = tensors_as(root, adapter.plan.adapter_name)
    return dict(_factors(adapter)) | {key: state[key] for key in state if key in own}


def _factors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for plan, lora in zip(adapter.plan.layers, adapter.loras, strict=True):
        tensors = (*lora.stored_factors(), *((lora.lora_magnitude,) if lora.use_dora else ()))
        for (key, shape), tensor in zip(factor_shapes(plan).items(), tensors, strict=True):
            yield key, tensor.view(shape)


def _for_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the file is in its place, or the error is under way
            temporary.unlink(missing_ok=True)


@contextmanager
def _put_back(files: Iterable[Path]) -> Iterator[None]:
    """Where the block fails, small files hold again what they held."""
    before = {file: file.read_bytes() if file.is_file() else None for file in files}
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for file, content in before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                elif not file.is_file() or file.read_bytes() != content:
                    with replacing(file) as temporary:
                        temporary.write_bytes(content)
        raise


def _tidy(path: Path) -> None:
    """Remove what saves that were killed have left; a save that is under way is younger."""
    with suppress(OSError):
        for file in path.glob(f".*.{'[0-9a-f]' * 32}"):
            name = file.name[1:-33]
            if name in (TENSORS, CONFIG, CARD) and time.time() - file.stat().st_mtime > _ABANDONED:
                file.unlink()


_ABANDONED = 3600.0
"""Seconds after which a temporary file belongs to nobody."""


def read_tensors(file: TensorFile, manifest: Manifest) -> State:
    """Every tensor of a saved adapter, without peft's prefix.

    Raises:
        CheckpointError: one is not what was saved.
    """
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in file.read().items()}
    damaged = [key for key, tensor in tensors.items() if digest(tensor) != manifest.adapter.get(key)]
    if damaged:
        raise CheckpointError(f"{file.path} is damaged: {plain(damaged[0])} is not what was saved; get the file again.")
    return tensors


def _check_finite(manifest: Manifest, tensors: State, root: nn.Module) -> None:
    faults = list(finite_faults(tensors, tensors_as(root, BASE)))
    if faults:
        more = [f"  and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        lines = [f"{manifest.file}: what it holds are not all numbers:", *(f"  {plain(f)}" for f in faults[:SHOWN])]
        remedy = "Take an adapter from before the training diverged, or pass check_finite=False. Nothing was changed."
        raise CheckpointError("\n".join([*lines, *more, remedy]))


def _copy_tensors(tensors: State, manifest: Manifest, root: nn.Module, adapter_name: str) -> None:
    adapter = the_adapter(the_injection(root)[1], adapter_name)
    own = own_keys(root, manifest.plan, manifest.buffers)
    with torch.inference_mode(False), torch.no_grad():
        for plan, lora in zip(manifest.plan.layers, adapter.loras, strict=True):
            A, B, *magnitudes = (tensors[key] for key in factor_shapes(plan))
            lora.to(A.dtype)  # as trained: another dtype would predict other bits
            lora.set_factors(A, B.flatten(1))
            for magnitude in magnitudes:
                lora.lora_magnitude.copy_(magnitude.flatten())
        own_tensors = {key: tensor for key, tensor in _adapter_state(root, adapter, own).items() if key in own}
        for key, tensor in own_tensors.items():
            tensor.copy_(tensors[key])
        for key, place in places_of(root).items():
            if key in tensors and key not in own_tensors:  # None in the base
                place.give(adapter_name, tensors[key].to(next(root.parameters()).device))
