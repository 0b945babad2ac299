"""Build one method on its device, check what it trains, and measure its sizes and times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from . import measuring
from .peers import their_warnings_aside
from .runs import Result, Settings
from .subjects import Arm, Subject, make_base


@dataclass
class Bench:
    """A subject on its device with a batch and, for training, an optimizer."""

    settings: Settings
    arm: Arm
    subject: Subject
    optimizer: torch.optim.Optimizer
    images: Tensor
    """``(batch, 3, size, size)``."""
    labels: Tensor
    train: bool
    """Whether a run is a training step; otherwise it is a forward without gradients."""

    @classmethod
    def of(cls, settings: Settings, arm: Arm, *, train: bool) -> Bench:
        """Build the method on a fresh base, in train or in eval mode."""
        device = torch.device(settings.device)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        with their_warnings_aside():
            subject = arm.build(make_base(settings.model), settings.rank)
        subject.model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        if train:
            arm.ready(subject)
        else:
            subject.model.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(settings.batch, 3, settings.size, settings.size, generator=generator)
        return cls(
            settings=settings,
            arm=arm,
            subject=subject,
            optimizer=torch.optim.AdamW(_trainable(subject) or [torch.zeros(1)], lr=1e-4),
            images=images.to(device).contiguous(memory_format=layout),
            labels=torch.randint(0, 2, (settings.batch,), generator=generator).to(device),
            train=train,
        )

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.images.device

    def predict(self) -> Tensor:
        """The network's logits for the batch: ``(batch, 2)``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            found = self.subject.model(self.images)
        logits: Tensor = getattr(found, "logits", found)
        return logits

    def forward(self) -> Tensor:
        """The loss of the batch."""
        return F.cross_entropy(self.predict().float(), self.labels)

    def step(self) -> None:
        """Run a training step."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.forward())
        self.optimizer.step()

    def two_steps(self) -> None:
        """Run two training steps: after the first, B is no longer zero, so that A has a gradient too."""
        self.step()
        self.step()

    def look(self) -> None:
        """Run a forward without gradients."""
        with torch.no_grad():
            self.predict()

    def sizes(self) -> Result:
        """All figures except times."""
        return self.sizes_in_training() if self.train else self.sizes_in_inference()

    def sizes_in_training(self) -> Result:
        """The sizes of a training step; raises if the method trains too few or other tensors."""
        model = self.subject.model
        found = measuring.movement(model, self.two_steps)
        if found.strayed or not found.moved:
            raise RuntimeError(f"{self.arm.name}: trained {list(found.moved)[:3]}, changed {list(found.strayed)[:3]}")
        self.optimizer.zero_grad()
        saved = measuring.saved_bytes(self.forward, self._own())
        peak = measuring.peak_bytes(self.step, self.device)
        self.optimizer.zero_grad()
        trainable = sum(parameter.numel() for parameter in _trainable(self.subject))
        base = sum(parameter.numel() for parameter in make_base(self.settings.model).parameters())
        return replace(
            self._described(),
            trainable=trainable,
            share=trainable / base,
            stuck=len(found.stuck),
            saved=saved,
            peak=peak,
            optimizer=measuring.optimizer_bytes(self.optimizer),
            file=self._file_bytes(found),
        )

    def sizes_in_inference(self) -> Result:
        """The peak of a forward, and the bytes of the weights."""
        self.look()
        if self.subject.before is not None:
            self.subject.before()
        return replace(self._described(), peak=measuring.peak_bytes(self.look, self.device))

    def time(self) -> float:
        """Seconds of one run, without its preparation."""
        run, before = self.step if self.train else self.look, self.subject.before
        if before is None:
            return measuring.seconds(run, self.device, self.settings.repeats)
        total = 0.0
        for _ in range(self.settings.repeats):
            before()
            total += measuring.seconds(run, self.device)
        return total / self.settings.repeats

    def _own(self) -> list[Tensor]:
        return [*self.subject.model.parameters(), *self.subject.model.buffers()]

    def _described(self) -> Result:
        return Result(
            arm=self.arm.name,
            what=self.arm.what,
            adapted=self.subject.adapted,
            convolutions=self.subject.convolutions,
            resting=measuring.tensor_bytes(self._own()),
        )

    def _file_bytes(self, found: measuring.Movement) -> int:
        """Bytes of the files that the library writes, else of the tensors that moved, as safetensors."""
        if self.subject.write is None:
            tensors = dict(self.subject.model.named_parameters()) | dict(self.subject.model.named_buffers())
            names = (*found.moved, *found.stuck, *found.buffers)
            return len(save({name: tensors[name].detach().cpu().contiguous() for name in names}))
        with TemporaryDirectory() as folder, their_warnings_aside():
            self.subject.write(Path(folder) / "adapter")
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _trainable(subject: Subject) -> list[torch.nn.Parameter]:
    return [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
