"""Train one method, save and check its adapter and test it; load a saved adapter and predict.

An adapter folder holds the files of ``convlora.save_adapter``, and ``run.json`` with the adapter's backbone, image size
and method.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import convlora

from ..augment.transforms import VIEWS, EvalTransform, Normalisation, Normalise, TrainTransform
from ..data.dataset import HistoDataset, require_centres
from ..errors import ExampleError
from ..files import replacing_directory, write_text
from ..methods.catalogue import as_plain, method_from
from ..methods.method import Method, Predict
from ..training.backbones import check_input, load_backbone
from ..training.features import Features, features_of, head_alone, linear_head
from ..training.loading import Loader, View, make_loader
from ..training.memory import largest_batch
from ..training.prediction import ALONE, predict_by, tracked_norms
from ..training.processes import Job
from ..training.recipe import Epoch, Fit, Recipe, accuracy, balanced_loss, class_balance, fit, place, predict_together
from ..training.verify import Proofs, prove
from . import shards
from .clinical import OperatingPoint, operating_point
from .content import digest_of, digest_of_file

CARD = "run.json"
POINT = "operating_point"


@dataclass(frozen=True)
class Result:
    """The result of one method with one seed. Accuracies are in [0, 1], None without labels; logits are ``(N,)``.

    ``val_loss`` and ``val_accuracy`` are computed from the method's own predictions. If it predicts with several views,
    other statistics or another threshold, they are not those of any epoch.
    """

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
    val_loss: float
    val_accuracy: float
    lr: float = 1e-3
    transductive: bool = False
    about: str = ""
    val_logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """``(N,)``; empty in results of an earlier version."""

    @property
    def best(self) -> Epoch:
        """The epoch with the training's lowest validation loss, whose model was kept."""
        return self.history[self.best_epoch]

    def logits(self, split: str) -> Tensor:
        """The logits of "test" or "val"."""
        return {"test": self.test_logits, "val": self.val_logits}[split]

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters of the adapted model."""
        return self.trainable / self.parameters

    @property
    def seconds_per_epoch(self) -> float:
        """The median of the training passes, which a single disturbed epoch does not change."""
        return statistics.median(epoch.seconds for epoch in self.history)


def open_backbone(recipe: Recipe) -> tuple[nn.Module, Normalisation]:
    """The recipe's backbone with a fresh head drawn by its seed."""
    torch.manual_seed(recipe.seed)
    return load_backbone(recipe.backbone, dropout=recipe.dropout, image_size=recipe.image_size, weights=recipe.weights)


def check_backbone_takes(recipe: Recipe) -> None:
    """Run the backbone once at the image size, so that a size that does not work fails before any training."""
    model, _ = open_backbone(recipe)
    check_input(model, recipe.backbone, recipe.image_size)


def check_methods(methods: Sequence[Method], splits: Mapping[str, HistoDataset], recipe: Recipe) -> None:
    """Refuse, before any training, methods that need more than the data or the backbone have.

    Raises:
        ExampleError: centre normalisation without centres; AdaBN without batch norms, or with single images.
    """
    for method in methods:
        if method.normalise == "centre":
            for split in splits.values():
                require_centres(split, f"{method.name}: centre normalisation")
    if any(method.predict.adabn for method in methods):
        tracked_norms(open_backbone(recipe)[0])
        if min(recipe.batch_size, len(splits["val"]), len(splits["test"])) < 2:
            raise ExampleError(ALONE)


_STATISTICS: WeakKeyDictionary[HistoDataset, dict[int, Normalisation]] = WeakKeyDictionary()


def centre_statistics(split: HistoDataset, most: int = 2000) -> dict[int, Normalisation]:
    """Mean and deviation of each centre's images, over at most ``most`` evenly spread ones; cached for each split.

    Raises:
        ExampleError: an image names no centre.
    """
    require_centres(split, "centre normalisation")
    if split not in _STATISTICS:
        _STATISTICS[split] = _centre_statistics(split, most)
    return _STATISTICS[split]


def _centre_statistics(split: HistoDataset, most: int) -> dict[int, Normalisation]:
    found = {}
    for centre in sorted(set(torch.as_tensor(split.centres).tolist())):
        own = (torch.as_tensor(split.centres) == centre).nonzero().flatten()
        chosen = own[torch.linspace(0, len(own) - 1, min(most, len(own))).long()].tolist()
        sums = torch.zeros(2, 3, dtype=torch.float64)
        for start in range(0, len(chosen), 256):
            images = torch.from_numpy(split.read(chosen[start : start + 256])).double()
            sums += torch.stack([images.mean((2, 3)).sum(0), images.square().mean((2, 3)).sum(0)])
        mean, square = sums / len(chosen)
        std = (square - mean.square()).clamp(min=1e-6).sqrt()
        found[int(centre)] = Normalisation("centre", f"{len(chosen)} images", tuple(mean.tolist()), tuple(std.tolist()))
    return found


class Transforms:
    """The transforms of one method, normalised by the backbone's statistics or by each centre's own."""

    def __init__(self, method: Method, recipe: Recipe, normalisation: Normalisation) -> None:
        self.method, self.recipe, self.normalisation = method, recipe, normalisation

    def view(self, split: HistoDataset, *, train: bool = False, turns: Sequence[int] = (0,)) -> View:
        """A split under this method's transforms; for evaluation with some of the 8 rotations and flips."""
        if self.method.normalise == "backbone":
            normalise = Normalise(self.normalisation)
        else:
            normalise = Normalise(centre_statistics(split), split.centres)
        if train:
            return View(split, TrainTransform(self.recipe.image_size, normalise, self.method.augment), self.recipe.seed)
        return View(split, EvalTransform(self.recipe.image_size, normalise, turns))


def make_views(splits: Mapping[str, HistoDataset], recipe: Recipe, method: Method) -> dict[str, View]:
    """The splits under a method's transforms; augmentation is drawn by the recipe's seed."""
    transforms = Transforms(method, recipe, open_backbone(recipe)[1])
    return {name: transforms.view(split, train=name == "train") for name, split in splits.items()}


def run_method(
    method: Method, splits: Mapping[str, HistoDataset], recipe: Recipe, job: Job, *, suffix: str = ""
) -> Result:
    """Train a method, or use the training that it shares with another, and predict.

    Files are written to the job's folder: those of `train`, and ``predictions/NAME.json`` if the method does not
    predict image by image. A job that resumes reads them.

    Args:
        method: the method.
        splits: "train", "val" and "test".
        recipe: the training recipe.
        job: folder and processes.
        suffix: ending of the files' names, after the method's name.

    Raises:
        ExampleError: as `training.fit` and `backbones.load_backbone`.
    """
    shared = dataclasses.replace(method, name=method.training, predict=Predict())
    trained = train(shared, splits, recipe, job, f"{method.training}{suffix}")
    if method.predict == Predict():
        # the name may be that of another method with the same training
        return dataclasses.replace(trained, method=method.name, transductive=method.transductive, about=method.about)
    file = job.out / "predictions" / f"{method.name}{suffix}.json"
    identity = {**identity_of(shared, recipe, splits), "predict": dataclasses.asdict(method.predict)}

    done = job.first_decides(lambda: read_result(file, identity, trained.adapter) if job.resume else None)
    if done is not None:
        return done
    model = load(trained.adapter, recipe, job.accelerator.device)
    val, val_labels = predict_by(method.predict, model, _loaders(method, splits["val"], recipe), job)
    test, labels = predict_by(method.predict, model, _loaders(method, splits["test"], recipe), job)

    def written() -> Result:
        result = dataclasses.replace(
            trained,
            method=method.name,
            transductive=method.transductive,
            about=method.about,
            val_loss=balanced_loss(val, val_labels, class_balance(_labels(splits["train"]))),
            val_accuracy=accuracy(val, val_labels) or 0.0,
            val_logits=val,
            test_logits=test,
            test_accuracy=accuracy(test, labels),
        )
        write_result(file, identity, result)
        return result

    return job.first_decides(written)


def train(method: Method, splits: Mapping[str, HistoDataset], recipe: Recipe, job: Job, name: str) -> Result:
    """Train a method, save its best adapter, load it on a fresh base, check it, and test it image by image.

    Writes ``adapters/NAME``, ``checkpoints/NAME.pt``, ``logs/NAME.csv`` and, when all is done, ``results/NAME.json``.
    A training that this job, or the job it resumes, has finished is read from its files. A training that the job has
    only tried (see `try_training`) is read from its checkpoint and checked.
    """
    folder, file = job.out / "adapters" / name, job.out / "results" / f"{name}.json"
    identity = identity_of(method, recipe, splits)
    done = _done(name, identity, job)
    if done is not None:
        job.console.print(f"{name}: done already", highlight=False)
        return done
    model, transforms, fitted = _fit(method, splits, recipe, job, name)
    device = job.accelerator.device
    test, val = (
        make_loader(transforms.view(splits[split]), recipe.batch_size, workers=recipe.workers)
        for split in ("test", "val")
    )
    logits, proofs = prove(model, load(folder, recipe, device), test, job)
    (val_logits,), _ = predict_together([model], val, job)

    def finished() -> Result:
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
            val_loss=fitted.best.val_loss,
            val_accuracy=fitted.best.val_accuracy,
            lr=recipe.lr,
            transductive=method.transductive,
            about=method.about,
            val_logits=val_logits,
        )
        point = operating_point(result.val_logits, _labels(splits["val"]))
        save(
            model, folder, method, recipe, _metrics(result), point
        )  # the same weights, now with the metrics in the card
        size = (folder / "adapter_model.safetensors").stat().st_size  # the card is in this file too
        result = dataclasses.replace(result, adapter_bytes=size)
        write_result(file, identity, result)
        return result

    return job.first_decides(finished)


def try_training(method: Method, splits: Mapping[str, HistoDataset], recipe: Recipe, job: Job, name: str) -> float:
    """Train for a sweep and return the validation loss, without reading the test set or checking the adapter.

    Writes all files of `train` except the result; `train` continues from there if this training is kept.
    """
    done = _done(name, identity_of(method, recipe, splits), job)
    if done is not None:
        return done.val_loss
    _, _, fitted = _fit(method, splits, recipe, job, name)
    return fitted.best.val_loss


def _done(name: str, identity: Mapping[str, Any], job: Job) -> Result | None:
    """The result of a training that this job, or the job it resumes, has finished; any other file is deleted."""
    folder, file = job.out / "adapters" / name, job.out / "results" / f"{name}.json"
    is_to_be_read = job.resume or name in job.done
    return job.first_decides(lambda: read_result(file, identity, folder) if is_to_be_read else _forget(file))


def _fit(
    method: Method, splits: Mapping[str, HistoDataset], recipe: Recipe, job: Job, name: str
) -> tuple[nn.Module, Transforms, Fit]:
    """Train and save the best adapter; a training that this job has done before is read from its checkpoint."""
    folder, identity = job.out / "adapters" / name, identity_of(method, recipe, splits)
    device = job.accelerator.device
    model, normalisation = open_backbone(recipe)
    transforms = Transforms(method, recipe, normalisation)
    train_view = transforms.view(splits["train"], train=True)
    images = make_loader(train_view, recipe.batch_size, workers=recipe.workers, seed=recipe.seed)
    model = place(method.prepare(place(model, device), recipe.rank, images), device)
    trained, views = _what_trains(model, method, transforms, splits, recipe, job)
    fitted = fit(
        trained,
        views,
        recipe,
        save=lambda: save(model, folder, method, recipe),
        job=dataclasses.replace(job, resume=job.resume or name in job.done),
        name=name,
        identity={key: value for key, value in identity.items() if key != "epochs"},  # more may be asked for
        to_train_mode=method.to_train_mode,
        lr_ratio=method.adapt.lr_ratio,
    )

    job.done.add(name)
    return model, transforms, fitted


def _what_trains(
    model: nn.Module,
    method: Method,
    transforms: Transforms,
    splits: Mapping[str, HistoDataset],
    recipe: Recipe,
    job: Job,
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model and its images, or its head and their features if these are the same in each epoch."""
    head = linear_head(model) if method.frozen_backbone else None
    augment = method.augment
    if head is None or not has_fixed_images(method, recipe):
        return model, {name: transforms.view(splits[name], train=name == "train") for name in ("train", "val")}
    cached = {}
    for name in ("train", "val"):
        turns = range(VIEWS) if name == "train" and augment.policy == "dihedral" else range(1)
        views = [functools.partial(transforms.view, splits[name], turns=[turn]) for turn in turns]
        seen = (recipe.image_size, method.normalise, transforms.normalisation.mean, transforms.normalisation.std)
        key = f"{digest_of(splits[name])} {recipe.backbone} {seen} {len(turns)}"
        features = features_of(model, head, views, key, recipe, job)
        cached[name] = Features(features, splits[name].labels, recipe.seed)
    return head_alone(head, recipe.dropout), cached


def has_fixed_images(method: Method, recipe: Recipe) -> bool:
    """Whether the images repeat in each epoch, so that a frozen backbone's features can be cached."""
    augment = method.augment
    return augment.policy in ("none", "dihedral") and not augment.stain_jitter and recipe.precision == "fp32"


def _metrics(result: Result) -> dict[str, float]:
    """The metrics in the adapter's model card."""
    test = {} if result.test_accuracy is None else {"test accuracy": result.test_accuracy}
    return {"validation accuracy": result.val_accuracy, "validation loss": result.val_loss, **test}


def _loaders(method: Method, split: HistoDataset, recipe: Recipe) -> Callable[[int], Loader]:
    """Returns a function that makes loaders of a split with so many views of each patch."""
    transforms = Transforms(method, recipe, open_backbone(recipe)[1])
    return lambda views: make_loader(
        transforms.view(split, turns=range(views)), recipe.batch_size, workers=recipe.workers
    )


def identity_of(method: Method, recipe: Recipe, splits: Mapping[str, HistoDataset]) -> dict[str, Any]:
    """All settings that a training depends on, as plain values, which identify its results and checkpoints.

    Splits, and weights from a file, are identified by their contents.
    """
    asked = {**vars(recipe), "weights": None if recipe.weights is None else digest_of_file(recipe.weights)}
    return {**asked, **method.training_parts(), **{name: digest_of(split) for name, split in splits.items()}}


def _forget(file: Path) -> None:
    file.unlink(missing_ok=True)


def write_result(file: Path, identity: Mapping[str, Any], result: Result) -> None:
    """Write ``results/NAME.json`` of a finished training."""
    logits = {"test_logits": result.test_logits.tolist(), "val_logits": result.val_logits.tolist()}
    kept = {**vars(result), **logits, "proofs": vars(result.proofs)}
    kept |= {"history": [vars(epoch) for epoch in result.history], "adapter": result.adapter.name}
    write_text(file, json.dumps({"identity": dict(identity), "result": kept}) + "\n")


def read_result(file: Path, identity: Mapping[str, Any], adapter: Path) -> Result | None:
    """Read the result of this training; None if there is none, or if it is of another training."""
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["identity"] != json.loads(json.dumps(dict(identity))):
            return None
        kept = dict(stored["result"])
        kept["history"] = [Epoch(**epoch) for epoch in kept["history"]]
        kept["proofs"] = Proofs(**kept["proofs"])
        logits = {name: torch.tensor(kept.get(name, [])) for name in ("test_logits", "val_logits")}
        return Result(**{**kept, **logits, "adapter": adapter})
    except (KeyError, TypeError, ValueError) as fault:
        raise ExampleError(f"{file} is damaged ({fault!r}); delete it to run this training again.") from fault


def save(
    model: nn.Module,
    folder: Path,
    method: Method,
    recipe: Recipe,
    metrics: Mapping[str, float] | None = None,
    point: OperatingPoint | None = None,
) -> None:
    """Write the adapter, its card and its ``run.json``; the folder is replaced only when all files are complete."""
    card = {"method": method.name, "configuration": as_plain(method), "recipe": dataclasses.asdict(recipe)}
    if point is not None:
        card[POINT] = dataclasses.asdict(point)
    with replacing_directory(folder) as partial:
        convlora.save_adapter(model, partial, metrics=metrics)
        write_text(partial / CARD, json.dumps(card, indent=2, default=str) + "\n")


def load(folder: Path, recipe: Recipe, device: torch.device) -> nn.Module:
    """A fresh backbone on the device, with the adapter of ``folder``."""
    model, _ = open_backbone(recipe)
    return place(convlora.load_adapter(model, folder), device)


def read_card(folder: Path) -> tuple[Recipe, Method]:
    """Read the recipe and the method of an adapter from its ``run.json``."""
    path = folder / CARD
    if not path.is_file():
        raise ExampleError(f"no {CARD} in {folder}; give an adapter folder that `train` or the main job wrote.")
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored, weights = card["recipe"], card["recipe"]["weights"]
        recipe = Recipe(**{**stored, "weights": None if weights is None else Path(weights)})
        return recipe, method_from(card["configuration"], card["method"], path)
    except (KeyError, TypeError, ValueError) as fault:
        raise ExampleError(f"{path} is damaged ({fault!r}); train again or restore the file.") from fault


def read_point(folder: Path) -> OperatingPoint:
    """Read the threshold and the temperature that were chosen on validation.

    Raises:
        ExampleError: the adapter's ``run.json`` has none: its training was interrupted, or an earlier version wrote it,
            or the validation patches had one label.
    """
    read_card(folder)
    stored = json.loads((folder / CARD).read_text(encoding="utf-8")).get(POINT) or {}
    threshold, temperature = stored.get("threshold"), stored.get("temperature")
    if not (isinstance(threshold, float) and isinstance(temperature, float) and temperature > 0):
        raise ExampleError(
            f"--calibrated: {folder / CARD} holds no threshold and temperature; a training writes them at its end, if "
            "validation has both labels. Leave it out, or train again."
        )
    return OperatingPoint(threshold, temperature)


def predict_split(
    folder: Path, split: HistoDataset, recipe: Recipe, method: Method, job: Job, parts: Path | None = None
) -> Tensor:
    """Logits ``(N,)`` of a saved adapter on a split, see `shards`.

    Args:
        folder: the adapter's folder.
        split: the patches.
        recipe: the adapter's recipe, see `read_card`.
        method: the method, whose way of predicting is used.
        job: the job, whose processes share the patches.
        parts: folder for finished parts, deleted by the caller; by default ``parts`` in the job's folder.
    """
    model = load(folder, recipe, job.accelerator.device)
    identity = shards.identity_of(folder, split, method.predict, recipe.batch_size)
    loaders = _loaders(method, split, recipe)
    return shards.predict_in_shards(method.predict, model, loaders, parts or job.out / "parts", identity, job)


def largest_common_batch(methods: Sequence[Method], recipe: Recipe, job: Job) -> int:
    """The recipe's batch size or the first of its halves at which a training step of every method fits in memory.

    Raises:
        ExampleError: not even one image fits; as `open_backbone`.
    """
    size = recipe.batch_size // job.processes
    for method in {method.training: method for method in methods}.values():
        model = place(method.prepare(open_backbone(recipe)[0], recipe.rank), job.accelerator.device)
        size = largest_batch(model, size, recipe.image_size, method.to_train_mode)
    return size * job.processes


def _labels(split: HistoDataset) -> Tensor:
    return torch.full((len(split),), torch.nan) if split.labels is None else split.labels.float()
