"""``push_to_hub``: saves an adapter and uploads it to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from ..errors import TargetError
from .card import checked_about
from .hub import is_repository, send
from .saving import write_adapter


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload adapter with convlora",
    metrics: Mapping[str, float] | None = None,
    base_model: str | None = None,
) -> str:
    """Upload an adapter and its model card to the Hugging Face Hub in one commit; ``load_adapter`` loads it from there.

    >>> convlora.push_to_hub(model, "user/tumour", metrics={"accuracy": 0.95}, base_model="timm/resnet50.a1_in1k")
    >>> convlora.load_adapter(fresh, "user/tumour")

    The repository is made if it is missing. If its card was edited, or not written by convlora, it is kept.
    This needs ``pip install 'convlora[hub]'``.

    Args:
        model: an injected model.
        repo_id: ``"user/repo"``.
        adapter_name: one of the model's adapters; default the active one.
        private: whether a new repository is private; default public, or your organisation's setting.
        token: the hub's token, as huggingface_hub takes it; default the one you logged in with.
        commit_message: the message of the commit.
        metrics: metrics for the card: ``{"accuracy": 0.95}``.
        base_model: the base's name on the hub, for the card.

    Returns:
        The commit's URL.

    Raises:
        StateError: as from :func:`convlora.save_adapter`.
        TargetError: ``repo_id`` or ``base_model`` is not a name on the hub, a metric is not a finite number, or the
            message is empty.
        CheckpointError: huggingface_hub is not installed, the hub cannot be reached, or it refuses the token; or
            ``private`` is True and the repository is public.
    """
    if not isinstance(repo_id, str) or not is_repository(repo_id):
        raise TargetError(f"repo_id={repo_id!r}; it must be 'user/repo'. Nothing was uploaded.")
    if not commit_message:
        raise TargetError("commit_message is empty; describe the adapter. Nothing was uploaded.")
    about = replace(checked_about(metrics, base_model), source=repo_id)
    with TemporaryDirectory() as folder:
        write_adapter(model, folder, adapter_name, about)
        return send(Path(folder), repo_id, private=private, token=token, commit_message=commit_message)
