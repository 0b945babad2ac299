"""The challenge report's training recipe, the same for every method.

Batch 32, Adam, weight decay 1e-4, class-balanced binary cross-entropy, learning rate lowered on a plateau of the
validation loss (patience 5), early stopping (patience 10), best model by validation loss.

The report's learning rate of 1e-4 is for thousands of steps an epoch (``--full``). The small default run takes under
200 steps in all and uses 1e-3, for every method alike.

On a CPU the same seed gives the same bits, also after an interruption and ``--resume`` from the last epoch's
checkpoint. Some CUDA kernels add in no fixed order.

Several processes share each batch. Without dropout, which each process draws by itself, they train as one process does.
With bf16 only the training steps use it: factors, optimizer and validation stay in fp32.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import ReduceLROnPlateau

import convlora

from ..errors import ExampleError
from .checkpoints import (
    copies,
    moving,
    put,
    random_state,
    read_checkpoint,
    seed_generators,
    set_random_state,
    write_checkpoint,
)
from .loading import Batched, Loader, begin_epoch, make_loader
from .logs import Log
from .processes import Job
from .progress import progress_bar
from .trackers import TrackedRun

CAMELYON_MPP = 0.97
"""Microns per pixel of the challenge's, WILDS's and PCam's patches: Camelyon16's and 17's slides at level 2."""


DIVERGED = "the loss became"
"""Words in the error of a diverged training, after which a sweep continues."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a training, apart from the method and the data."""

    backbone: str = "lite0"
    weights: Path | None = None
    image_size: int = 96
    rank: int | None = None
    """The rank of every method, in place of its own."""
    epochs: int = 6
    lr: float = 1e-3
    batch_size: int = 32
    seed: int = 0
    workers: int = 0
    dropout: float = 0.5
    weight_decay: float = 1e-4
    lr_patience: int = 5
    stop_patience: int = 10
    precision: str = "fp32"
    mpp: float | None = CAMELYON_MPP
    """Microns per pixel of the patches, at which slides are cut for prediction; None if unknown."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of the history; ``seconds`` is the time of the training pass, without validation."""

    train_loss: float
    val_loss: float
    val_accuracy: float
    lr: float
    seconds: float


@dataclass
class EarlyStopping:
    """Counts the epochs since the lowest validation loss."""

    patience: int
    best: float = math.inf
    waited: int = 0

    def improved(self, loss: float) -> bool:
        """Record one epoch's loss; returns whether it is the lowest so far."""
        better = loss < self.best
        self.best = min(self.best, loss)
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` epochs in a row brought no lower loss."""
        return self.waited >= self.patience


@dataclass
class Fit:
    """A finished training: its history, and the epoch whose weights the model has."""

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def best(self) -> Epoch:
        """The epoch whose weights the model has."""
        return self.history[self.best_epoch]


@dataclass
class Training:
    """The state of a training between two epochs, all of which is in its checkpoint."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: ReduceLROnPlateau
    stopping: EarlyStopping
    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def took(self, epoch: Epoch) -> bool:
        """Record an epoch; returns whether it is the best so far."""
        self.history.append(epoch)
        self.schedule.step(epoch.val_loss)
        improved = self.stopping.improved(epoch.val_loss)
        if improved:
            self.best_epoch, self.best = len(self.history) - 1, copies(moving(self.model))
        return improved

    def state(self, random_states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """All state that the next epoch depends on; the sampler's state is the number of epochs done."""
        return {
            "model": copies(moving(self.model)),
            "optimizer": self.optimiser.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "stopping": asdict(self.stopping),
            "random": list(random_states),
            "sampler": {"epoch": len(self.history)},
            "history": [asdict(epoch) for epoch in self.history],
            "best": {"epoch": self.best_epoch, "model": self.best},
        }

    def restore(self, state: Mapping[str, Any], process: int) -> None:
        """Restore what `state` returned, with the generators of one process."""
        put(state["model"], self.model)
        self.optimiser.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        self.stopping = EarlyStopping(**state["stopping"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.best_epoch, self.best = state["best"]["epoch"], state["best"]["model"]
        set_random_state(state["random"][process])


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move to the device in channels-last layout, in which CPUs and tensor cores convolve faster."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def class_balance(labels: Tensor) -> Tensor:
    """The weight of the positive class, negatives / positives, which balances the classes."""
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        raise ExampleError(
            f"all {len(labels)} training patches have the label {int(positives > 0)}; training needs both. "
            "Check the data or raise --limit."
        )
    return torch.tensor((len(labels) - positives) / positives)


def optimiser_for(model: nn.Module, recipe: Recipe, lr_ratio: float = 1.0) -> torch.optim.Optimizer:
    """Adam on all trainable parameters, with the recipe's learning rate and weight decay.

    With a ratio other than 1 the factors B train at that multiple of the rate (LoRA+), and no factor, bias or norm has
    weight decay.
    """
    parameters: Any = [p for p in model.parameters() if p.requires_grad]
    if lr_ratio != 1:
        parameters = convlora.parameter_groups(model, lr=recipe.lr, lr_B=lr_ratio * recipe.lr)
    return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def fit(
    model: nn.Module,
    views: Mapping[str, Batched],
    recipe: Recipe,
    *,
    job: Job,
    save: Callable[[], None] = lambda: None,
    name: str = "training",
    identity: Mapping[str, Any] | None = None,
    to_train_mode: Callable[[nn.Module], Any] = nn.Module.train,
    lr_ratio: float = 1.0,
) -> Fit:
    """Train until the last epoch or until early stopping; the model then has the weights of its best epoch.

    After each epoch the job's folder holds ``checkpoints/NAME.pt`` and ``logs/NAME.csv``. A job that resumes continues
    from the checkpoint, bit for bit on a CPU.

    Args:
        model: the model on its device; only its trainable parameters are optimised.
        views: "train" and "val", with ``labels``.
        recipe: learning rate, patience, epochs, and so on.
        job: folder and processes.
        save: called by the first process when the model is the best so far, before the epoch's checkpoint is written.
        name: name of the files and of the printed lines.
        identity: what the training depends on; a checkpoint with another identity is refused.
        to_train_mode: puts the model in train mode.
        lr_ratio: see `optimiser_for`.

    Raises:
        ExampleError: training labels of one class; a loss that is not finite; a batch that the processes cannot share;
            a checkpoint of another training.
    """
    rank, world = int(job.accelerator.process_index), job.processes
    # Seeded again, so that every method has the same augmentation and dropout, however its model was built.
    seed_generators(recipe.seed + 1_000_003 * rank)
    balance = class_balance(_labels(views["train"]))
    size, workers = recipe.batch_size, recipe.workers
    loaders = {
        "train": make_loader(views["train"], size, workers=workers, seed=recipe.seed, rank=rank, world=world),
        "val": make_loader(views["val"], size, workers=workers),
    }
    optimiser = optimiser_for(model, recipe, lr_ratio)
    schedule = ReduceLROnPlateau(optimiser, patience=recipe.lr_patience)
    training = Training(model, optimiser, schedule, EarlyStopping(recipe.stop_patience))
    path, identity = job.out / "checkpoints" / f"{name}.pt", {**(identity or {}), "processes": world}
    _resume_or_clear(training, path, identity, job)
    log = _log(job, name, identity, training.history) if job.is_first else None
    wrapped = job.accelerator.prepare_model(_Logits(model))
    try:
        while len(training.history) < recipe.epochs and not training.stopping.exhausted:
            number = len(training.history)
            begin_epoch(loaders["train"], number)
            line = f"{name} {number + 1}/{recipe.epochs}"
            to_train_mode(model)
            if training.took(_epoch(wrapped, loaders, optimiser, balance, job, line)) and job.is_first:
                save()
            random_states = job.gathered([random_state()])
            if job.is_first:
                write_checkpoint(path, identity, training.state(random_states))
            if log is not None:
                log.write(training.history)
    finally:
        job.accelerator.free_memory()
        if log is not None:
            log.close()
    if len(training.history) < recipe.epochs:
        job.console.print(f"{name}: stopped early, no lower validation loss in {recipe.stop_patience} epochs")
    put(training.best, model)
    job.wait()
    return Fit(training.history, training.best_epoch)


def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Predict in eval mode; returns logits and labels ``(N,)`` on the CPU in the loader's order, NaN without labels.

    If the loader gives several views of each patch, the logits are ``(views, N)``.
    """
    (logits,), labels = predict_each([model], loader)
    return logits, labels


def predict_each(models: Sequence[nn.Module], loader: Loader) -> tuple[list[Tensor], Tensor]:
    """Predict with several models in one pass over the patches, see `predict`."""
    device = next(models[0].parameters()).device
    logits: list[list[Tensor]] = [[] for _ in models]
    labels = []
    for model in models:
        model.eval()
    with torch.inference_mode():
        for images, targets, _ in loader.on(device):
            # All views at once keep a GPU busy; on a CPU they would only take memory.
            step = len(targets) if device.type == "cpu" else len(images)
            parts = [_to(part, device) for part in torch.split(images, step)]
            for own, model in zip(logits, models, strict=True):
                own.append(torch.cat([model(part).float() for part in parts]).reshape(-1, len(targets)))
            labels.append(targets)
    whole = [torch.cat(own, 1).cpu() for own in logits]
    return [each[0] if len(each) == 1 else each for each in whole], torch.cat(labels)


def predict_together(models: Sequence[nn.Module], loader: Loader, job: Job) -> tuple[list[Tensor], Tensor]:
    """Predict as `predict_each`, with the patches shared among the job's processes; each gets the whole result.

    Args:
        models: the models, the same in every process.
        loader: a loader of the whole split, in order.
        job: the job.
    """
    own = loader.part(int(job.accelerator.process_index), job.processes)
    parts = job.gathered([predict_each(models, own) if len(own) else None])
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    held = [(number, part) for number, part in enumerate(parts) if part is not None]
    size = loader.batch_sampler.size
    labels = torch.empty(size)
    whole = [torch.empty(*each.shape[:-1], size) for each in held[0][1][0]]
    for number, (logits, own_labels) in held:
        labels[number :: len(parts)] = own_labels
        for all_logits, own_logits in zip(whole, logits, strict=True):
            all_logits[..., number :: len(parts)] = own_logits
    return whole, labels


def accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """The share of patches whose logit has the label's sign; None without labels."""
    if labels.isnan().any():
        return None
    return float(((logits > 0) == labels.bool()).float().mean())


def balanced_loss(logits: Tensor, labels: Tensor, balance: Tensor) -> float:
    """Mean cross-entropy, with label 1 weighted by `class_balance`: the loss of training and validation."""
    return float(binary_cross_entropy_with_logits(logits, labels, pos_weight=balance))


class _Logits(nn.Module):
    """A wrapper of the model for several processes: accelerate changes the wrapper's ``forward``, not the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).squeeze(1)
        return logits


def _log(job: Job, name: str, identity: Mapping[str, Any], history: Sequence[Epoch]) -> Log:
    return Log(job.out / "logs", name, history, TrackedRun(job.accelerator, name, identity))


def _resume_or_clear(training: Training, path: Path, identity: Mapping[str, Any], job: Job) -> None:
    """Continue from the checkpoint if the job resumes and there is one; otherwise delete it."""
    state = read_checkpoint(path, identity) if job.resume else None
    if state is not None:
        training.restore(state, int(job.accelerator.process_index))
        job.console.print(f"{path.stem}: resumed after epoch {len(training.history)}", highlight=False)
    job.wait()  # all processes read before one writes
    if state is None and job.is_first:
        path.unlink(missing_ok=True)


def _epoch(
    wrapped: nn.Module,
    loaders: Mapping[str, Loader],
    optimiser: torch.optim.Optimizer,
    balance: Tensor,
    job: Job,
    name: str,
) -> Epoch:
    """Run one training pass, then compute the validation loss and accuracy."""
    lr = optimiser.param_groups[-1]["lr"]  # the head's rate; B may have another
    start = time.perf_counter()
    train_loss = _train_pass(wrapped, loaders["train"], optimiser, balance, job, name)
    seconds = time.perf_counter() - start
    logits, labels = _validate(job.accelerator.unwrap_model(wrapped).model, loaders["val"], job)
    val_loss = _finite(balanced_loss(logits, labels, balance), name, lr)
    epoch = Epoch(train_loss, val_loss, accuracy(logits, labels) or 0.0, lr, seconds)
    job.console.print(
        f"{name}  loss train {train_loss:.3f}  val {val_loss:.3f}  val accuracy {epoch.val_accuracy:.3f}  "
        f"{seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return epoch


def _train_pass(
    wrapped: nn.Module,
    loader: Loader,
    optimiser: torch.optim.Optimizer,
    balance: Tensor,
    job: Job,
    name: str,
) -> float:
    """Run one pass through the training set; returns the mean loss over all processes."""
    device = next(wrapped.parameters()).device
    balance = balance.to(device)
    losses: list[float] = []
    with progress_bar(job.console, name, len(loader) * loader.batch_sampler.batch_size) as advance:
        for images, labels, _ in loader.on(device):
            logits = wrapped(_to(images, device))
            loss = binary_cross_entropy_with_logits(logits, labels.to(device), pos_weight=balance)
            losses.append(_finite(loss.item(), name, optimiser.param_groups[-1]["lr"]))
            optimiser.zero_grad()
            job.accelerator.backward(loss)
            optimiser.step()
            advance(len(images) * job.processes, losses[-1])
    means = job.gathered([sum(losses) / len(losses)])
    return sum(means) / len(means)


def _validate(model: nn.Module, loader: Loader, job: Job) -> tuple[Tensor, Tensor]:
    """Logits and labels of the whole split in order, in every process."""
    job.share_buffers(model)
    (logits,), labels = predict_together([model], loader, job)
    return logits, labels


def _finite(loss: float, name: str, lr: float) -> float:
    if not math.isfinite(loss):
        raise ExampleError(f"{name}: {DIVERGED} {loss} at learning rate {lr:g}; try a lower --lr.")
    return loss


def _to(images: Tensor, device: torch.device) -> Tensor:
    if images.ndim == 4:
        return images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images.to(device, non_blocking=True)


def _labels(dataset: Any) -> Tensor:
    if dataset.labels is None:
        raise ExampleError("the training split has no labels; only the test split may lack them.")
    labels: Tensor = dataset.labels
    return labels


def default_workers(device: torch.device) -> int:
    """The number of loader processes: none on a CPU, where the network itself needs the cores, else up to eight."""
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
