"""One method from a fresh backbone to its proven test logits, and a saved adapter back to predictions.

An adapter folder holds what ``convlora.save_adapter`` writes and ``run.json``, which names the backbone and the
image size that the adapter needs.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import convlora

from .backbones import Normalisation, check_input, load_backbone
from .data import HistoDataset, Transform
from .errors import ExampleError
from .files import replacing_directory, write_text
from .methods import Method
from .training import Epoch, Recipe, accuracy, fit, make_loader, pick_device, place, predict
from .transforms import eval_transform, train_transform
from .verify import Proofs, prove

CARD = "run.json"


@dataclass(frozen=True)
class Result:
    """What one training gave. Accuracies are in [0, 1], None without labels; ``test_logits`` is ``(N,)``."""

    method: str
    seed: int
    adapter: Path
    history: list[Epoch]
    best_epoch: int
    trainable: int
    parameters: int
    adapter_bytes: int
    test_accuracy: float | None
    test_logits: Tensor
    proofs: Proofs

    @property
    def best(self) -> Epoch:
        """The epoch of the lowest validation loss, whose model was kept."""
        return self.history[self.best_epoch]

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters of the adapted model."""
        return self.trainable / self.parameters

    @property
    def seconds_per_epoch(self) -> float:
        """Median of the training passes: one epoch on a machine busy elsewhere does not move it."""
        return statistics.median(epoch.seconds for epoch in self.history)


def open_backbone(recipe: Recipe) -> tuple[nn.Module, Normalisation]:
    """The recipe's backbone with the fresh head of its seed."""
    torch.manual_seed(recipe.seed)
    return load_backbone(recipe.backbone, dropout=recipe.dropout, image_size=recipe.image_size, weights=recipe.weights)


def make_transforms(recipe: Recipe) -> dict[str, Transform]:
    """Each split's transform, from the backbone's own normalisation; tries the backbone and image size once."""
    model, normalisation = open_backbone(recipe)
    check_input(model, recipe.backbone, recipe.image_size)
    evaluation = eval_transform(recipe.image_size, normalisation)
    return {"train": train_transform(recipe.image_size, normalisation), "val": evaluation, "test": evaluation}


def run_method(
    method: Method, splits: Mapping[str, HistoDataset], recipe: Recipe, folder: Path, console: Console
) -> Result:
    """Train a method, save its best adapter in ``folder``, load it back on a fresh base, prove it, test it.

    Args:
        method: what to adapt.
        splits: "train", "val" and "test", with their transforms set.
        recipe: everything else.
        folder: of the adapter; replaced whole at each improvement.
        console: where progress goes.

    Raises:
        ExampleError: as `training.fit` and `backbones.load_backbone`.
    """
    device = pick_device()
    model, _ = open_backbone(recipe)
    model = place(method.prepare(model, recipe.rank), device)
    name = f"{method.name} seed {recipe.seed}"
    fitted = fit(
        model, splits, recipe, save=lambda best: save(best, folder, method, recipe), console=console, name=name
    )
    loader = make_loader(splits["test"], recipe)
    logits, proofs = prove(fitted.model, load(folder, recipe, device), loader)
    console.print(f"{name}: {proofs}", highlight=False)
    return Result(
        method=method.name,
        seed=recipe.seed,
        adapter=folder,
        history=fitted.history,
        best_epoch=fitted.best_epoch,
        trainable=sum(p.numel() for p in convlora.trainable_parameters(fitted.model)),
        parameters=sum(p.numel() for p in fitted.model.parameters()),
        adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        test_accuracy=accuracy(logits, _labels(splits["test"])),
        test_logits=logits,
        proofs=proofs,
    )


def save(model: nn.Module, folder: Path, method: Method, recipe: Recipe) -> None:
    """Write the adapter and its ``run.json``; the folder is replaced only when both are whole."""
    card = {"method": method.name, "recipe": dataclasses.asdict(recipe)}
    with replacing_directory(folder) as partial:
        convlora.save_adapter(model, partial)
        write_text(partial / CARD, json.dumps(card, indent=2, default=str) + "\n")


def load(folder: Path, recipe: Recipe, device: torch.device) -> nn.Module:
    """A fresh backbone with the adapter of ``folder`` on it, on the device."""
    model, _ = open_backbone(recipe)
    return place(convlora.load_adapter(model, folder), device)


def read_recipe(folder: Path) -> Recipe:
    """The recipe that an adapter was trained by, from its ``run.json``."""
    path = folder / CARD
    if not path.is_file():
        raise ExampleError(f"no {CARD} in {folder}; give an adapter folder that `train` or the main job wrote.")
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        weights = stored["weights"]
        return Recipe(**{**stored, "weights": None if weights is None else Path(weights)})
    except (KeyError, TypeError, ValueError) as fault:
        raise ExampleError(f"{path} is damaged ({fault!r}); train again or restore the file.") from fault


def predict_split(folder: Path, split: HistoDataset, recipe: Recipe) -> tuple[Tensor, float | None]:
    """Logits ``(N,)`` of a saved adapter on a split, and the accuracy where it has labels."""
    split.transform = make_transforms(recipe)["test"]
    logits, labels = predict(load(folder, recipe, pick_device()), make_loader(split, recipe))
    return logits, accuracy(logits, labels)


def _labels(split: HistoDataset) -> Tensor:
    return torch.full((len(split),), torch.nan) if split.labels is None else split.labels.float()
