"""Hugging Face Trainer: a callback that writes the adapter beside each of its checkpoints.

``pip install "convlora[transformers]"``. The rest of the Trainer works with an injected model as with any other.
"""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from ._checkpoint.saving import save_adapter
from ._model.integrity import check_trainable
from ._model.state import injections

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as cause:
    raise ImportError(
        f"convlora.transformers needs Hugging Face transformers ({cause}): pip install 'convlora[transformers]'."
    ) from cause

FOLDER = "adapter"
"""The subfolder of a checkpoint that holds the adapter."""


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the adapter into ``checkpoint-N/adapter/`` when the Trainer saves; :func:`convlora.load_adapter` reads it.

    >>> convlora.inject(model, rank=8)
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[convlora.transformers.AdapterCallback()])
    >>> trainer.train()

    The Trainer's own checkpoint still holds the whole injected model, from which it resumes; ``save_total_limit``
    limits their number. The model card has the metrics of the last evaluation.

    Raises:
        StateError: as from :func:`convlora.save_adapter`, when the Trainer saves: for a model without an adapter, say.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise or warn as :func:`convlora.trainable_parameters` does; the Trainer calls this before the first step."""
        if model is not None and next(injections(model), None) is not None:
            check_trainable(model)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the adapter; the Trainer calls this in every process after a checkpoint, and one process writes."""
        if state.is_world_process_zero and model is not None:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_adapter(model, checkpoint / FOLDER, metrics=_evaluated(state))


def _evaluated(state: TrainerState) -> dict[str, float]:
    """Return the finite metrics of the last evaluation, without its run times."""
    logs = ({name: value for name, value in log.items() if name.startswith("eval_")} for log in state.log_history[::-1])
    last = next(filter(None, logs), {})
    return {name: value for name, value in last.items() if not _is_time(name) and _is_finite(value)}


def _is_time(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second", "_time"))


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
