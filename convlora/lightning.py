"""Lightning: a callback that injects, leaves the base out of checkpoints, and checks the base when one is loaded.

``pip install "convlora[lightning]"``. The rest of Lightning works with an injected model as with any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._checkpoint.digests import digest, is_near, is_other, sketch
from ._model.inject import inject_requested
from ._model.integrity import check_trainable
from ._model.keys import base_keys
from ._model.options import Request
from ._model.state import injections
from ._model.targets import dotted
from .errors import CheckpointError, TargetError, listing

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as cause:
    raise ImportError(
        f"convlora.lightning needs Lightning 2.2 or newer ({cause}): pip install 'convlora[lightning]'."
    ) from cause

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Unpack

    from ._model.options import Options

KEY = "convlora_base"
"""The key of a checkpoint that holds the digests of the base's tensors, which are left out."""


class AdapterCallback(Callback):  # type: ignore[misc]
    """Injects into a LightningModule before its optimizer is made, and leaves the base out of checkpoints.

    >>> trainer = lightning.Trainer(callbacks=[convlora.lightning.AdapterCallback(rank=8)])
    >>> trainer.fit(module)                                      # module.model is injected
    >>> convlora.save_adapter(module.model, "tumour/")

    A checkpoint holds factors, head, buffers, optimizer and all other trainable parameters, but no frozen parameter of
    the injected network. ``trainer.fit(module, ckpt_path=…)``, ``test`` and the others load it with this callback into
    a module with the same base. A network that is injected already is not injected again.

    Args:
        rank: as for :func:`convlora.inject`.
        attribute: the LightningModule's attribute that holds the network, or ``""`` for the whole LightningModule.
        **options: the other arguments of :func:`convlora.inject`.

    Raises:
        TargetError: the LightningModule has no such attribute. Lightning's ``setup`` also raises the errors of
            :func:`convlora.inject`.
        CheckpointError: a checkpoint that is loaded is for another base, or has missing or unexpected tensors.
    """

    def __init__(self, rank: int | None = None, *, attribute: str = "model", **options: Unpack[Options]) -> None:
        super().__init__()
        self.request, self.attribute = Request.named("AdapterCallback", rank=rank, **options), attribute
        self._watch: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject. Lightning calls this before it loads a checkpoint and before it makes the optimizer."""
        if next(injections(pl_module), None) is None:
            inject_requested(self.request, self._network(pl_module))
        self._unwatch()
        self._watch = pl_module.register_load_state_dict_pre_hook(_before_load)
        self._let_copy_again(trainer, pl_module, stage)

    def _let_copy_again(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set up earlier callbacks again if they copied the module (to average weights) before the injection."""
        callbacks: list[Any] = trainer.callbacks
        for callback in callbacks[: callbacks.index(self)] if self in callbacks else ():
            if list(_copies(callback, pl_module)):
                callback.setup(trainer, pl_module, stage)
            if any(next(injections(copy), None) is None for copy in _copies(callback, pl_module)):
                raise TargetError(
                    f"{type(callback).__name__} has copied the module before it was injected. Put AdapterCallback "
                    "before it: Trainer(callbacks=[AdapterCallback(…), …])."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise or warn as :func:`convlora.trainable_parameters` does, at the start of each epoch."""
        if batch_idx == 0:
            check_trainable(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the check from the module's ``load_state_dict``."""
        self._unwatch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do what ``teardown`` does; after an exception Lightning does not call it."""
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _network(self, pl_module: LightningModule) -> nn.Module:
        network = getattr(pl_module, self.attribute, None) if self.attribute else pl_module
        if not isinstance(network, nn.Module):
            names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise TargetError(
                f"attribute={self.attribute!r}: {type(pl_module).__name__} has no such module; it has {names}. "
                "Nothing was changed."
            )
        return network

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the base's tensors in the checkpoint by their digests."""
        state: dict[str, Tensor] = checkpoint["state_dict"]
        base = set(_base_keys(pl_module)) & state.keys()
        checkpoint[KEY] = {key: f"{digest(state[key])} {sketch(state[key])}" for key in sorted(base)}
        for name, part in checkpoint.items():  # a weight average's checkpoint holds the model's state in another part
            if name != KEY and isinstance(part, dict) and base & part.keys():
                checkpoint[name] = {key: tensor for key, tensor in part.items() if key not in base}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint's base, of which it holds the digests, is the model's."""
        model, stored, base = pl_module.state_dict(), checkpoint["state_dict"], checkpoint.get(KEY, {})
        known = {*stored, *base}
        parts = {key: text.partition(" ") for key, text in base.items() if key in model}
        unlike = [key for key, (text, _, near) in parts.items() if is_other(text, near, model[key], digest(model[key]))]
        _refuse(
            [
                *(f"{key}: not in the checkpoint" for key in _base_keys(pl_module) if key not in known),
                *(f"{key}: not in the model" for key in base if key not in model),
                *(f"{key}: other values than at training" for key in unlike),
            ]
        )


def _before_load(module: nn.Module, stored: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading, check that the state dict has exactly the model's tensors, with or without the base's.

    The model keeps its own tensor of the base if the state dict lacks it, or has it up to a weight average's rounding.
    This is a hook of the module because Lightning shows callbacks a checkpoint only after loading it, and with
    ``save_weights_only`` not at all. Copies of the module have the hook too.
    """
    model, base = {prefix + key: tensor for key, tensor in module.state_dict().items()}, _base_keys(module)
    own = {key: model[key] for key in (prefix + name for name in base)}
    _refuse(
        [
            *(f"{key}: not in the checkpoint" for key in model if key not in stored and key not in own),
            *(f"{key}: not in the model" for key in stored if key.startswith(prefix) and key not in model),
        ]
    )
    for key, tensor in own.items():
        if key not in stored or (stored[key].shape == tensor.shape and is_near(sketch(tensor), stored[key])):
            stored[key] = tensor


def _copies(callback: object, pl_module: LightningModule) -> Iterator[nn.Module]:
    """Yield the copies of the module that a callback holds, as a weight average does."""
    for held in vars(callback).values():
        for part in held.modules() if isinstance(held, nn.Module) and held is not pl_module else ():
            if type(part) is type(pl_module):
                yield part


def _base_keys(pl_module: nn.Module) -> Iterator[str]:
    """Yield the state-dict keys of the frozen parameters of each injected part, without inactive adapters' factors."""
    for name, root, _ in injections(pl_module):
        parameters = root.named_parameters(remove_duplicate=False)
        frozen = {key: parameter for key, parameter in parameters if not parameter.requires_grad}
        yield from (dotted(name, key) for key in base_keys(root, frozen, set()))


def _refuse(faults: list[str]) -> None:
    if faults:
        title = "This checkpoint was made on another base, or with another adapter:"
        remedy = "Build the module as it was trained (same weights, same arguments of AdapterCallback) and load again."
        raise CheckpointError(listing(title, faults, remedy))
