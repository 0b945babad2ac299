"""Features of a frozen backbone, computed once, so that a probe trains in seconds.

Exact, not an approximation: only where the same images come back each epoch (no augmentation, or one of a fixed set of
views), and what lies between the features and the logit is what the whole network has there, dropout and a linear head.
They lie in ``features/`` of the job's folder, and serve every seed and learning rate.
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
    """Features ``(views, N, D)`` as batches; of each patch one view, drawn as the policy "dihedral" draws it."""

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
        """Features are what they are."""
        features, labels, rows = batch
        return features.to(device), labels, rows


def linear_head(model: nn.Module) -> nn.Linear | None:
    """The model's head where it is one linear layer that trains, and nothing else does."""
    names = convlora.summary(model).modules_to_save
    head = model.get_submodule(names[0]) if len(names) == 1 else None
    return head if isinstance(head, nn.Linear) else None


def head_alone(head: nn.Linear, dropout: float) -> nn.Module:
    """What comes after the features; shares the head with the whole model."""
    return nn.Sequential(nn.Dropout(dropout), head)


def features_of(
    model: nn.Module, head: nn.Linear, views: Sequence[Callable[[], View]], key: str, recipe: Recipe, job: Job
) -> Tensor:
    """What the head is given for each patch of each view: ``(len(views), N, D)``, read where they are on disk.

    Args:
        model: whose head is ``head``.
        head: its linear head.
        views: make the same split under each view.
        key: what the split and the views are; the backbone's own numbers are added.
        recipe: images at a time, and the processes that read them.
        job: whose folder keeps the features; its first process computes them.
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
    """Of the key and of every number of the backbone."""
    digest = hashlib.sha256(key.encode())
    own = {id(tensor) for tensor in head.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in own:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
