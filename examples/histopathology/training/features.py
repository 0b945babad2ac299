"""Cached features of a frozen backbone, with which a probe trains in seconds.

This is exact: it is used only if the images repeat in each epoch (no augmentation, or one of a fixed set of views), and
the rest of the network is its own dropout and linear head. The features are kept in ``features/`` of the job's folder
for every seed and learning rate.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora

from ..augment.draws import Draws
from ..augment.transforms import draw_views
from ..data.dataset import Sample
from ..files import replacing_file
from .loading import Batch, View, labels_of, make_loader
from .processes import Job
from .recipe import Recipe, predict


class Features:
    """Batches of features ``(views, N, D)``, with one view of each patch, drawn as by the policy "dihedral"."""

    def __init__(self, features: Tensor, labels: Tensor | None, seed: int) -> None:
        self.features, self.labels, self.seed = features, labels, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.features.shape[1]

    def __getitem__(self, index: int) -> Sample:
        features, labels, _ = self.__getitems__([index])
        return features[0], labels[0], index

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples of one batch."""
        rows = torch.as_tensor(indices)
        views = torch.zeros_like(rows)
        if len(self.features) > 1:
            views = torch.from_numpy(draw_views(Draws(self.seed, self.epoch, rows.numpy())))
        return self.features[views, rows], labels_of(self.labels, rows), rows

    def transformed(self, batch: Batch, device: torch.device | None = None) -> Batch:
        """Features have no transform."""
        features, labels, rows = batch
        return features.to(device), labels, rows


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The model's head if it is a linear layer and the only part that trains, else None."""
    names = convlora.summary(model).modules_to_save
    head = model.get_submodule(names[0]) if len(names) == 1 else None
    return head if isinstance(head, nn.Linear) else None


def head_alone(head: nn.Linear, dropout: float) -> nn.Module:
    """The dropout and the head, which is shared with the whole model."""
    return nn.Sequential(nn.Dropout(dropout), head)


def features_of(
    model: nn.Module, head: nn.Linear, views: Sequence[Callable[[], View]], key: str, recipe: Recipe, job: Job
) -> Tensor:
    """The head's input for each patch and view, ``(len(views), N, D)``; cached on disk.

    Args:
        model: the model.
        head: its linear head.
        views: functions that make the split under each view.
        key: identifies the split and the views; a digest of the backbone's weights is added.
        recipe: batch size and loader processes.
        job: the job, whose first process computes the features and whose folder keeps them.
    """
    path = job.out / "features" / f"{_digest(model, head, key)}.safetensors"
    if job.is_first and not path.is_file():
        _write(path, torch.stack([_inputs(model, head, view(), recipe) for view in views]))
    job.wait()
    return load_file(path)["features"]


def _write(path: Path, features: Tensor) -> None:
    with replacing_file(path, shared=True) as partial:
        save_file({"features": features}, partial)


def _inputs(model: nn.Module, head: nn.Linear, view: View, recipe: Recipe) -> Tensor:
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float().cpu()))
    try:
        predict(model, make_loader(view, recipe.batch_size, workers=recipe.workers))
    finally:
        hook.remove()
    return torch.cat(seen).clone()


def _digest(model: nn.Module, head: nn.Linear, key: str) -> str:
    """A digest of the key and of all weights of the backbone."""
    digest = hashlib.sha256(key.encode())
    own = {id(tensor) for tensor in head.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in own:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
