"""One method from a fresh backbone to its proven test logits, and a saved adapter back to predictions.

An adapter folder holds what ``convlora.save_adapter`` writes and ``run.json``, which names the backbone and the
image size that the adapter needs.
"""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convlora

from .backbones import Normalisation, check_input, load_backbone
from .data import HistoDataset, Transform
from .errors import ExampleError
from .files import replacing_directory, write_text
from .loading import View, make_loader
from .methods import Method
from .processes import Job
from .training import Epoch, Recipe, accuracy, fit, pick_device, place, predict
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


def make_views(splits: Mapping[str, HistoDataset], recipe: Recipe) -> dict[str, View]:
    """The splits through their transforms, whose draws are of the recipe's seed."""
    transforms = make_transforms(recipe)
    return {name: View(split, transforms[name], recipe.seed) for name, split in splits.items()}


def run_method(method: Method, splits: Mapping[str, HistoDataset], recipe: Recipe, name: str, job: Job) -> Result:
    """Train a method, save its best adapter, load it back on a fresh base, prove it, test it.

    What is written lies in the job's folder: ``adapters/NAME``, ``checkpoints/NAME.pt``, ``logs/NAME.csv`` and, when
    all is done, ``results/NAME.json``. A job that resumes reads that where it is there.

    Args:
        method: what to adapt.
        splits: "train", "val" and "test".
        recipe: everything else.
        name: of what is written.
        job: where, and with how many processes.

    Raises:
        ExampleError: as `training.fit` and `backbones.load_backbone`.
    """
    folder, file = job.out / "adapters" / name, job.out / "results" / f"{name}.json"
    identity = identity_of(method, recipe, splits)
    done = job.first_decides(lambda: read_result(file, identity, folder) if job.resume else _forget(file))
    if done is not None:
        job.console.print(f"{name}: done already", highlight=False)
        return done
    device = job.accelerator.device
    model, _ = open_backbone(recipe)
    model = place(method.prepare(model, recipe.rank), device)
    views = make_views(splits, recipe)
    fitted = fit(
        model,
        views,
        recipe,
        save=lambda: save(model, folder, method, recipe),
        job=job,
        name=name,
        identity={key: value for key, value in identity.items() if key != "epochs"},  # more may be asked for
    )

    def finished() -> Result:
        loader = make_loader(views["test"], recipe.batch_size, workers=recipe.workers)
        logits, proofs = prove(model, load(folder, recipe, device), loader)
        job.console.print(f"{name}: {proofs}", highlight=False)
        result = Result(
            method=method.name,
            seed=recipe.seed,
            adapter=folder,
            history=fitted.history,
            best_epoch=fitted.best_epoch,
            trainable=sum(p.numel() for p in convlora.trainable_parameters(model)),
            parameters=sum(p.numel() for p in model.parameters()),
            adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
            test_accuracy=accuracy(logits, _labels(splits["test"])),
            test_logits=logits,
            proofs=proofs,
        )
        write_result(file, identity, result)
        return result

    return job.first_decides(finished)


def identity_of(method: Method, recipe: Recipe, splits: Mapping[str, HistoDataset]) -> dict[str, Any]:
    """What a training depends on, as plain values; a result or checkpoint of anything else is not of this one."""
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(recipe).items()}
    return {**asked, "method": method.name, **{name: _digest(split) for name, split in splits.items()}}


def _digest(split: HistoDataset) -> str:
    """A split by its ids, labels and centres; its pixels are taken at its word."""
    columns = (torch.as_tensor(split.ids), _labels(split), torch.as_tensor(split.centres))
    digest = hashlib.sha256(b"".join(column.numpy().tobytes() for column in columns))
    return f"{len(split)} patches, {digest.hexdigest()[:12]}"


def _forget(file: Path) -> None:
    file.unlink(missing_ok=True)


def write_result(file: Path, identity: Mapping[str, Any], result: Result) -> None:
    """Write ``results/NAME.json``: a training that is done, whole."""
    kept = {**vars(result), "test_logits": result.test_logits.tolist(), "proofs": vars(result.proofs)}
    kept |= {"history": [vars(epoch) for epoch in result.history], "adapter": result.adapter.name}
    write_text(file, json.dumps({"identity": dict(identity), "result": kept}) + "\n")


def read_result(file: Path, identity: Mapping[str, Any], adapter: Path) -> Result | None:
    """What `write_result` left of this very training; None where there is none, or of another one."""
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["identity"] != json.loads(json.dumps(dict(identity))):
            return None
        kept = dict(stored["result"])
        kept["history"] = [Epoch(**epoch) for epoch in kept["history"]]
        kept["proofs"] = Proofs(**kept["proofs"])
        return Result(**{**kept, "test_logits": torch.tensor(kept["test_logits"]), "adapter": adapter})
    except (KeyError, TypeError, ValueError) as fault:
        raise ExampleError(f"{file} is damaged ({fault!r}); delete it to run this training again.") from fault


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
    view = View(split, make_transforms(recipe)["test"])
    logits, labels = predict(load(folder, recipe, pick_device()), make_loader(view, recipe.batch_size))
    return logits, accuracy(logits, labels)


def _labels(split: HistoDataset) -> Tensor:
    return torch.full((len(split),), torch.nan) if split.labels is None else split.labels.float()
