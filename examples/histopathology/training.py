"""The report's training recipe, the same for every method.

Batch 32, Adam, weight decay 1e-4, binary cross-entropy balanced by class, learning rate lowered on a plateau of
the validation loss (patience 5), early stopping (patience 10), the best model by validation loss kept.

One departure: the report's learning rate of 1e-4 is for its thousands of steps an epoch (``--full``). The small
default run takes under 200 steps in all and uses 1e-3, for every method alike.

On a CPU the same seed and number of workers give the same bits. Some CUDA kernels add in no fixed order.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

import convlora

from .data import HistoDataset
from .errors import ExampleError

# Batches of (images, labels, indices).
Batches: TypeAlias = "DataLoader[tuple[Tensor, Tensor, int]]"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained and how, apart from the method and the data."""

    backbone: str = "lite0"
    weights: Path | None = None
    image_size: int = 128
    rank: int = 8
    epochs: int = 6
    lr: float = 1e-3
    batch_size: int = 32
    seed: int = 0
    workers: int = 0
    dropout: float = 0.5
    weight_decay: float = 1e-4
    lr_patience: int = 5
    stop_patience: int = 10


@dataclass(frozen=True)
class Epoch:
    """One line of the history; ``seconds`` is the training pass alone, without validation."""

    train_loss: float
    val_loss: float
    val_accuracy: float
    lr: float
    seconds: float


@dataclass
class EarlyStopping:
    """Counts the epochs since the validation loss was last lower than ever before."""

    patience: int
    best: float = math.inf
    waited: int = 0

    def improved(self, loss: float) -> bool:
        """Take in one epoch's loss; whether it is the lowest so far."""
        better = loss < self.best
        self.best = min(self.best, loss)
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` epochs in a row brought nothing."""
        return self.waited >= self.patience


@dataclass
class Fit:
    """A finished training: its history and the best model as it was in memory (its index is ``best_epoch``)."""

    model: nn.Module
    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move to the device in channels-last layout, in which CPUs and tensor cores convolve faster."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def make_loader(dataset: HistoDataset, recipe: Recipe, *, train: bool = False) -> Batches:
    """Batches of ``(images, labels, indices)``; shuffled by the recipe's seed for training, else in order."""
    return DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        shuffle=train,
        # A last batch of one patch would stop BatchNorm in train mode.
        drop_last=train and len(dataset) > recipe.batch_size,
        num_workers=recipe.workers,
        pin_memory=torch.cuda.is_available(),
        # Seeds the shuffle and, through it, every worker's augmentation.
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def class_balance(labels: Tensor) -> Tensor:
    """The positive class's weight, negatives / positives, that makes both classes weigh the same."""
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise ExampleError(
            f"all {len(labels)} training patches have the label {int(positives > 0)}; training needs both. "
            "Check the data or raise --limit."
        )
    return torch.tensor((len(labels) - positives) / positives)


def fit(
    model: nn.Module,
    splits: Mapping[str, HistoDataset],
    recipe: Recipe,
    *,
    save: Callable[[nn.Module], None],
    console: Console,
    name: str = "training",
) -> Fit:
    """Train until the epochs or the patience end; ``save`` is called with each new best model.

    Args:
        model: on its device; only its trainable parameters are optimised.
        splits: "train" and "val", with their transforms set.
        save: called once at least; what it saved last is the best model even after an interruption.
        console: where progress goes.
        name: shown on each line.

    Raises:
        ExampleError: one class only in the training labels, or a loss that is not finite.
    """
    # Every method sees the same augmentation and dropout draws, whatever building its model consumed.
    torch.manual_seed(recipe.seed)
    balance = class_balance(_labels(splits["train"]))
    optimiser = torch.optim.Adam(convlora.trainable_parameters(model), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = ReduceLROnPlateau(optimiser, patience=recipe.lr_patience)
    loaders = {key: make_loader(splits[key], recipe, train=key == "train") for key in ("train", "val")}
    stopping, result = EarlyStopping(recipe.stop_patience), Fit(model)
    for number in range(recipe.epochs):
        epoch = _epoch(model, loaders, optimiser, balance, console, f"{name} {number + 1}/{recipe.epochs}")
        result.history.append(epoch)
        schedule.step(epoch.val_loss)
        if stopping.improved(epoch.val_loss):
            save(model)
            result.model, result.best_epoch = copy.deepcopy(model), number
        if stopping.exhausted:
            console.print(f"{name}: no better validation loss in {recipe.stop_patience} epochs, stopped early")
            break
    return result


def predict(model: nn.Module, loader: Batches) -> tuple[Tensor, Tensor]:
    """Logits and labels ``(N,)`` on the CPU in the loader's order, in eval mode; absent labels are NaN."""
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    with torch.inference_mode():
        for images, targets, _ in loader:
            logits.append(model(_to(images, device)).squeeze(1).float().cpu())
            labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """Share of patches on the right side of logit 0; None where labels are absent."""
    if labels.isnan().any():
        return None
    return float(((logits > 0) == labels.bool()).float().mean())


def _epoch(
    model: nn.Module,
    loaders: Mapping[str, Batches],
    optimiser: torch.optim.Optimizer,
    balance: Tensor,
    console: Console,
    name: str,
) -> Epoch:
    """One training pass, then the validation loss and accuracy."""
    lr = optimiser.param_groups[0]["lr"]
    start = time.perf_counter()
    train_loss = _train_pass(model, loaders["train"], optimiser, balance, console, name)
    seconds = time.perf_counter() - start
    logits, labels = predict(model, loaders["val"])
    val_loss = _finite(float(binary_cross_entropy_with_logits(logits, labels, pos_weight=balance)), name, lr)
    epoch = Epoch(train_loss, val_loss, accuracy(logits, labels) or 0.0, lr, seconds)
    console.print(
        f"{name}  loss train {train_loss:.3f}  val {val_loss:.3f}  val accuracy {epoch.val_accuracy:.3f}  "
        f"{seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return epoch


def _train_pass(
    model: nn.Module,
    loader: Batches,
    optimiser: torch.optim.Optimizer,
    balance: Tensor,
    console: Console,
    name: str,
) -> float:
    """The mean loss over one pass through the training set."""
    model.train()
    device = next(model.parameters()).device
    balance = balance.to(device)
    losses: list[float] = []
    with _progress_bar(console, name, len(loader) * (loader.batch_size or 1)) as advance:
        for images, labels, _ in loader:
            logits = model(_to(images, device)).squeeze(1)
            loss = binary_cross_entropy_with_logits(logits, labels.to(device), pos_weight=balance)
            losses.append(_finite(loss.item(), name, optimiser.param_groups[0]["lr"]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            advance(len(images), losses[-1])
    return sum(losses) / len(losses)


@contextmanager
def _progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int, float], None]]:
    """A bar that goes away when done; yields a function to call with (images done, loss) after each step."""
    words = TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[note]}")
    columns = (TextColumn(name), BarColumn(), words, TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, note="")

        def advance(images: int, loss: float) -> None:
            progress.advance(task, images)
            speed = progress.tasks[0].completed / (time.perf_counter() - start)
            progress.update(task, note=f"{speed:.0f} images/s  loss {loss:.3f}")

        yield advance


def _finite(loss: float, name: str, lr: float) -> float:
    if not math.isfinite(loss):
        raise ExampleError(f"{name}: the loss became {loss} at learning rate {lr:g}; try a lower --lr.")
    return loss


def _to(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, non_blocking=True, memory_format=torch.channels_last)


def _labels(dataset: HistoDataset) -> Tensor:
    if dataset.labels is None:
        raise ExampleError("the training split has no labels; only the test split may lack them.")
    return dataset.labels


def default_workers(device: torch.device) -> int:
    """Loader processes: none on a CPU, where the network itself needs the cores; else up to eight."""
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
