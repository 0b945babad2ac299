"""Ultralytics: a trainer that injects into the network that it builds, and writes checkpoints that Ultralytics reads.

``pip install "convlora[trainers]"``. Ultralytics' package is under the AGPL-3.0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checkpoint.saving import save_adapter
from ._model.inject import inject_requested
from ._model.integrity import check_trainable
from ._model.merge import merge
from ._model.options import Request
from ._model.remove import remove
from ._model.state import injections
from .errors import CheckpointError

try:
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.utils import RANK
    from ultralytics.utils.patches import torch_load
    from ultralytics.utils.torch_utils import unwrap_model
except ImportError as cause:
    raise ImportError(
        f"convlora.ultralytics needs Ultralytics 8.3 or newer ({cause}): pip install 'convlora[trainers]'."
    ) from cause

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._model.options import Options

STATE = "convlora_state"
"""The attribute of a checkpoint's network that holds base and adapter, separate and in full precision, for resuming."""


class AdapterTrainer(BaseTrainer):  # type: ignore[misc]
    """A mixin for Ultralytics' trainers: it injects into the network that the trainer builds, and trains the adapter.

    >>> class CellTrainer(convlora.ultralytics.AdapterTrainer, DetectionTrainer, rank=8):
    ...     pass
    >>> yolo = YOLO("yolo11n.pt")
    >>> yolo.train(trainer=CellTrainer, data="cells.yaml", epochs=50)

    ``best.pt`` and ``last.pt`` hold the merged network, in half precision like Ultralytics' own files, so ``predict``,
    ``val``, ``export`` and ``fuse`` do not need convlora. ``best_adapter/`` and ``last_adapter/`` beside them hold the
    adapter for :func:`convlora.load_adapter`. All of them have the weight average (EMA) of the trained parameters. An
    interrupted training is resumed with the same class.

    Args, after the bases of the class:
        rank: as for :func:`convlora.inject`.
        **options: the other arguments of :func:`convlora.inject`.

    Raises:
        TargetError: an argument is out of range. ``train`` also raises the errors of :func:`convlora.inject`.
        CheckpointError: a training is resumed from a file that this trainer did not write, or with other options.

    Warns:
        UserWarning: ``freeze=`` of Ultralytics freezes factors or heads.
    """

    request = Request()

    def __init_subclass__(cls, rank: int | None = None, **options: Unpack[Options]) -> None:
        super().__init_subclass__()
        if rank is not None or options:  # without own options a class inherits its base's
            cls.request = Request.named("AdapterTrainer", rank=rank, **options)

    def setup_model(self) -> dict[str, Any] | None:
        """Inject into the network that Ultralytics has built, or that the user gave to the trainer."""
        ckpt: dict[str, Any] | None = super().setup_model()
        model = unwrap_model(self.model)
        state = _state_in(ckpt) if ckpt is not None and self.resume else None
        if state is not None:
            model.load_state_dict(state["base"])
        if next(injections(model), None) is None:
            inject_requested(self.request, model)
        self.base = {key: tensor.cpu() for key, tensor in remove(deepcopy(model)).state_dict().items()}
        if state is not None:
            _resume(model, state)
        # Ultralytics warns of each frozen parameter and makes it trainable; build_optimizer freezes it again.
        self.frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return ckpt

    def auto_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Freeze the base before Ultralytics measures the memory of a step."""
        self._freeze()
        return super().auto_batch(*args, **kwargs)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Freeze the base again; raise or warn as :func:`convlora.trainable_parameters` does."""
        self._freeze()
        check_trainable(model)
        return super().build_optimizer(model, *args, **kwargs)

    def _freeze(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def save_model(self) -> Any:
        """Write the merged weight average as Ultralytics' checkpoint, and the adapter beside it."""
        own = self._changed_averages()
        averaged = deepcopy(self.ema.ema)
        averaged.load_state_dict(self.base | own)
        with warnings.catch_warnings():  # the warm-up's first steps have a learning rate of 0
            warnings.filterwarnings("ignore", "every .* nothing was trained")
            for name in ("last", "best") if self.best_fitness == self.fitness else ("last",):
                save_adapter(averaged, self.wdir / f"{name}_adapter", metrics=dict(_finite(self.metrics)))
        whole = remove(merge(averaged))
        setattr(whole, STATE, {"base": self.base, "adapter": own})
        average, self.ema.ema = self.ema.ema, whole
        try:
            return super().save_model()
        finally:
            self.ema.ema = average

    def _changed_averages(self) -> dict[str, Tensor]:
        """Return the averages of the tensors that training has changed; the average rounds the base's own tensors."""
        now, average = unwrap_model(self.model).state_dict(), self.ema.ema.state_dict()
        moved = (k for k, t in now.items() if k not in self.base or not torch.equal(t.cpu(), self.base[k]))
        return {key: average[key].cpu() for key in moved}

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Load the rest of a checkpoint; the network has its tensors already, and those in the file are merged."""
        super()._load_checkpoint_state(ckpt | {"ema": deepcopy(unwrap_model(self.model))})

    def _handle_nan_recovery(self, epoch: int) -> Any:
        """When Ultralytics loads the last checkpoint after a NaN, load its separate base and adapter instead."""

        def unmerged(module: nn.Module, loaded: dict[str, Any], *_: Any) -> None:
            if not self.base.keys() < loaded.keys():
                loaded.update(self.base | _state_in(torch_load(self.last))["adapter"])

        model = unwrap_model(self.model)
        handle = model.register_load_state_dict_pre_hook(unmerged)
        model._load_state_dict_pre_hooks.move_to_end(handle.id, last=False)
        try:
            return super()._handle_nan_recovery(epoch)
        finally:
            handle.remove()
            self.ema.ema._load_state_dict_pre_hooks.pop(handle.id, None)  # the EMA may be a copy made meanwhile

    def final_eval(self) -> None:
        """Remove the state for resuming from the files of a finished training, as Ultralytics removes the optimizer."""
        for file in (self.last, self.best):
            if RANK in {-1, 0} and file.exists():
                ckpt = torch_load(file)
                vars(ckpt["ema"]).pop(STATE, None)
                torch.save(ckpt, file)
        super().final_eval()


def _state_in(ckpt: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] | None = vars(ckpt.get("ema") or ckpt["model"]).get(STATE)
    if state is None:
        raise CheckpointError(
            "This checkpoint holds no adapter to resume from: AdapterTrainer did not write it, or its training is "
            "finished. Start a new training from it, without resume."
        )
    return state


def _resume(model: nn.Module, state: dict[str, dict[str, Tensor]]) -> None:
    try:
        model.load_state_dict(state["base"] | state["adapter"])
    except RuntimeError as cause:
        raise CheckpointError(
            f"This checkpoint has an adapter with other options ({cause}). Resume with the class that trained it."
        ) from cause


def _finite(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if math.isfinite(value):
            yield name, float(value)
