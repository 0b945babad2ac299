"""Hugging Face Trainer: a callback that writes the adapter beside each of its checkpoints.

``pip install "convlora[transformers]"``. Everything else of the Trainer works with an injected model as with any other.
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
"""Where in a checkpoint's folder the adapter is."""


class AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Writes ``checkpoint-N/adapter/``, a few MB that :func:`convlora.load_adapter` reads, when the Trainer saves.

    >>> convlora.inject(model, rank=8)
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[convlora.transformers.AdapterCallback()])
    >>> trainer.train()

    The Trainer's own checkpoint stays what it is: the whole injected model, from which it resumes.
    ``save_total_limit`` keeps few of them. The card says the metrics of the last evaluation.

    Raises:
        StateError: as :func:`convlora.save_adapter`, when the Trainer saves; where the model holds no adapter, say.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer before the first step: refuse or warn as :func:`convlora.trainable_parameters`."""
        if model is not None and next(injections(model), None) is not None:
            check_trainable(model, stacklevel=2)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer in every process once the checkpoint is written; one process writes."""
        if state.is_world_process_zero and model is not None:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_adapter(model, checkpoint / FOLDER, metrics=_evaluated(state))


def _evaluated(state: TrainerState) -> dict[str, float]:
    """The finite numbers that the last evaluation gave, without its running times."""
    logs = ({name: value for name, value in log.items() if name.startswith("eval_")} for log in state.log_history[::-1])
    last = next(filter(None, logs), {})
    return {name: value for name, value in last.items() if not _is_time(name) and _is_finite(value)}


def _is_time(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second", "_time"))


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
