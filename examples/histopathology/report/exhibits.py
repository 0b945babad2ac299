"""Single patches for the report: the wrong predictions with the highest loss, and saliency maps of some patches.

Maps are computed from the saved adapter, loaded as a user would load it, on the network's input image; see `explain`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..augment.draws import Draws
from ..augment.transforms import EvalTransform, Normalisation, Normalise
from ..data.dataset import HistoDataset
from ..data.rows import NO_CENTRE
from ..data.stain import Floats
from ..runs.experiment import Result, Transforms, load, open_backbone, read_card
from ..runs.scores import losses
from ..training.recipe import pick_device
from .explain import cam_layer, grad_cam, occlusion

WORST = 12
# Patches of each kind: false negatives, false positives, and the most confident true positives and true negatives.
EXPLAINED = 2


@dataclass(frozen=True)
class Patch:
    """One patch with its label, probability and pictures (PNGs in base64, by name)."""

    id: int
    centre: int | None
    label: int
    probability: float
    pictures: Mapping[str, str]

    @property
    def caption(self) -> str:
        """The patch's caption."""
        where = "" if self.centre is None else f", centre {self.centre}"
        return f"{self.id}{where}: label {self.label}, probability {self.probability:.3f}"


@dataclass(frozen=True)
class Exhibits:
    """The patches that the report shows of one method on one split; ``notes`` explains the maps."""

    method: str
    seed: int
    split: str
    worst: Sequence[Patch] = ()
    explained: Sequence[Patch] = ()
    notes: Sequence[str] = field(default_factory=list)


def labelled(result: Result, splits: Mapping[str, HistoDataset]) -> tuple[str, Tensor, Tensor] | None:
    """Name, logits and labels of the test split, or else of validation; None if neither has labels."""
    for name, logits in (("test", result.test_logits), ("val", result.val_logits)):
        labels = splits[name].labels
        if labels is not None and len(logits) == len(labels):
            return name, logits, labels
    return None


def exhibits(result: Result, splits: Mapping[str, HistoDataset]) -> Exhibits | None:
    """The patches of a result with the highest loss, and maps of some; None without labels.

    Raises:
        ExampleError: the adapter's folder or the backbone's weights are gone, or pixels cannot be read.
    """
    found = labelled(result, splits)
    if found is None:
        return None
    name, logits, labels = found
    loss = losses(logits, labels)
    worst = [i for i in loss.argsort(descending=True).tolist()[:WORST] if (logits[i] > 0) != labels[i]]
    explained, notes = _explained(result, splits[name], logits, labels, _chosen(logits, labels))
    shown = [_patch(splits[name], i, logits, labels, {"patch": _png(_pixels(splits[name], i))}) for i in worst]
    return Exhibits(result.method, result.seed, name, shown, explained, notes)


def _chosen(logits: Tensor, labels: Tensor) -> list[int]:
    """The most confident wrong and right patches of each label, a few of each."""
    sureness = logits.abs()
    chosen: list[int] = []
    for right in (False, True):
        for label in (1, 0):
            own = (((logits > 0) == labels.bool()) == right) & (labels == label)
            indices = own.nonzero().flatten()
            chosen += indices[sureness[indices].argsort(descending=True)][:EXPLAINED].tolist()
    return chosen


def _explained(
    result: Result, split: HistoDataset, logits: Tensor, labels: Tensor, indices: Sequence[int]
) -> tuple[list[Patch], list[str]]:
    recipe, method = read_card(result.adapter)
    device = pick_device()
    model = load(result.adapter, recipe, device)
    view = Transforms(method, recipe, open_backbone(recipe)[1]).view(split)
    images = torch.stack([view[i][0] for i in indices]).to(device)
    towards = torch.stack([logits[i] > 0 for i in indices])
    plain = EvalTransform(recipe.image_size, Normalise(Normalisation("none", "", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))
    patches = plain(torch.from_numpy(split.read(indices)), Draws(0, 0, indices)).clamp(0, 1)
    seen = [each.numpy().transpose(1, 2, 0) for each in patches]
    pictures = [{"network input": _png(each)} for each in seen]
    layer = cam_layer(model, images)
    notes = [f"Maps explain the predicted label, by the adapter on one view at {recipe.image_size} px."]
    if layer is None:
        notes.append("No Grad-CAM: this network has no layer whose output is known to be a feature map.")
    else:
        name = next(name for name, module in model.named_modules() if module is layer)
        notes.append(f"Grad-CAM uses the output of {name}; each map is scaled to its highest value.")
        _add(pictures, "Grad-CAM", seen, grad_cam(model, images, layer, towards))
    side = max(1, recipe.image_size // 4)
    falls = occlusion(model, images, side, max(1, side // 2), towards)
    notes.append(
        f"Occlusion: the fall of the logit when a {side}×{side} square is made grey; each map is scaled to its highest."
    )
    _add(pictures, "occlusion", seen, falls / falls.amax((1, 2), keepdim=True).clamp(min=1e-6))
    with torch.inference_mode():
        alone = model.eval()(images).flatten().float().cpu()
    # a batch of another size may round differently
    if not torch.allclose(alone, logits[torch.tensor(indices)], rtol=1e-3, atol=1e-3):
        notes.append("The method makes its own predictions differently (views, statistics or threshold).")
    return [_patch(split, i, logits, labels, p) for i, p in zip(indices, pictures, strict=True)], notes


def _add(pictures: Sequence[dict[str, str]], name: str, seen: Sequence[Floats], maps: Tensor) -> None:
    """Add each map over its image."""
    for own, image, heat in zip(pictures, seen, maps.cpu().numpy(), strict=True):
        own[name] = _png(overlaid(image, heat))


def overlaid(image: Floats, heat: Floats) -> Floats:
    """Overlay a map ``(H, W)`` in [0, 1] on an image ``(H, W, 3)``: grey where it is 0, coloured where it is high."""
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2)
    colour = matplotlib.colormaps["inferno"](heat)[..., :3]
    opacity = 0.75 * heat[..., None]
    mixed: Floats = (1 - opacity) * (0.5 * grey + 0.5 * image) + opacity * colour
    return mixed


def _patch(split: HistoDataset, i: int, logits: Tensor, labels: Tensor, pictures: Mapping[str, str]) -> Patch:
    centre = int(split.centres[i])
    return Patch(
        int(split.ids[i]),
        None if centre == NO_CENTRE else centre,
        int(labels[i]),
        float(logits[i].double().sigmoid()),
        pictures,
    )


def _pixels(split: HistoDataset, index: int) -> Floats:
    pixels: Floats = split.read([index])[0].transpose(1, 2, 0)
    return pixels


def _png(pixels: Floats) -> str:
    """Base64 of a PNG of ``(H, W, 3)`` in [0, 1]."""
    stream = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
