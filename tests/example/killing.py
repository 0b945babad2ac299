"""Trainings ended by SIGKILL and resumed, run as a program: it forks, which a test process with threads must not.

``python killing.py random OUT KILLS SEED`` ends a training after random times, ``python killing.py writes OUT`` one at
each write: just before and just after the first, the second, the third call that touches the disk's names, and so on
until a run gets through. ``python killing.py predictions OUT`` does that to predictions in parts, and
``python killing.py predictions-random OUT KILLS SEED`` ends these after random times. All print, as JSON,
how many kills struck and the digest of every number that came out.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from toy_patches import write_toy
from typer.testing import CliRunner

import convlora
from examples.histopathology.__main__ import app
from examples.histopathology.augment.transforms import EvalTransform, Normalisation, Normalise, TrainTransform
from examples.histopathology.data.dataset import open_splits
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.runs import experiment, shards
from examples.histopathology.training.loading import View
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe, fit

SIZES = {"train": 64, "val": 16, "test": 16}
RECIPE = Recipe(image_size=32, epochs=6, batch_size=16)


def train_lora(out: Path, data: Path) -> None:
    """A real network by the whole path, proofs included."""
    experiment.run_method(find_method("lora"), open_splits(data), RECIPE, Job(out, resume=True))


class Colours(nn.Module):
    """Trains in no time, and draws from the generator by its dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))


def train_colours(out: Path, data: Path) -> None:
    torch.manual_seed(0)
    model = convlora.inject(Colours(), target_modules=(), modules_to_save=["fc"])
    splits, plain = open_splits(data), Normalisation("none", "none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    views = {
        "train": View(splits["train"], TrainTransform(32, Normalise(plain))),
        "val": View(splits["val"], EvalTransform(32, Normalise(plain))),
    }
    folder = out / "adapters" / "lora"
    save = lambda: experiment.save(model, folder, find_method("probe"), RECIPE)  # noqa: E731
    fit(model, views, RECIPE, job=Job(out, resume=True), save=save, name="lora")


def predict(out: Path, data: Path) -> None:
    """Patches by an adapter, two of them a part."""
    shards.SIZE = 2
    CliRunner().invoke(
        app, ["predict", str(data / "adapter"), str(data / "test.h5"), "--batch-size", "2", "--out", str(out / "x.csv")]
    )


def written(out: Path) -> list[str]:
    """The digest of each file of a prediction."""
    return [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(out.iterdir())]


def start(train: Callable[[], None]) -> int:
    """A child process that trains; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            train()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> bool:
    """Whether the child got through; False where SIGKILL struck it; anything else fails."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the training ended with {code}")
    return code == 0


def kill_at_random(
    work: Callable[[Path], None], found: Callable[[Path], object], out: Path, kills: int, seed: int, longest: float
) -> int:
    """Kill until so many kills struck running work, then let it end; how many struck.

    Work that got through meanwhile must have come out as the undisturbed one, and begins anew.
    """
    draws, struck = random.Random(seed), 0
    for _ in range(50 * kills):
        if struck == kills:
            break
        pid = start(partial(work, out))
        time.sleep(draws.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        if not ended(pid):
            struck += 1
            continue
        if found(out) != found(out.with_name("whole")):
            raise RuntimeError(f"after {struck} kills the result came out otherwise")
        shutil.rmtree(out)
    ended(start(partial(work, out)))
    return struck


def kill_at_writes(train: Callable[[], None]) -> int:
    """As the module's docstring says; how many struck."""
    for number in range(200):
        if ended(start(partial(dying_at, number // 2, after=bool(number % 2), train=train))):
            return number
    raise RuntimeError("never got through")


def dying_at(call: int, after: bool, train: Callable[[], None]) -> None:
    calls = iter(range(10**6))

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            strike = next(calls) == call
            if strike and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if strike:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    train()


def digest(out: Path) -> str:
    """Every number of the adapter, of the checkpoint's model, optimizer, scheduler and history but its seconds."""
    adapter = load_file(out / "adapters" / "lora" / "adapter_model.safetensors")
    state = torch.load(out / "checkpoints" / "lora.pt", weights_only=True)["state"]
    for epoch in state["history"]:
        del epoch["seconds"]
    return hashlib.sha256(repr((plain(adapter), plain(state))).encode()).hexdigest()


def plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return sorted((str(key), plain(each)) for key, each in value.items())
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    mode, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    data = write_toy(out / "data", SIZES)
    if mode.startswith("predictions"):
        model, method = experiment.open_backbone(RECIPE)[0], find_method("lora")
        experiment.save(method.prepare(model), data / "adapter", method, RECIPE)
        begun = time.perf_counter()
        ended(start(lambda: predict(out / "whole", data)))
        seconds = time.perf_counter() - begun
        if mode == "predictions":
            struck = kill_at_writes(lambda: predict(out / "killed", data))
        else:
            kills, seed = int(sys.argv[3]), int(sys.argv[4])
            work = partial(predict, data=data)
            struck = kill_at_random(work, written, out / "killed", kills, seed, 0.95 * seconds)
        print(json.dumps({"struck": struck, "whole": written(out / "whole"), "killed": written(out / "killed")}))
        return
    train = train_lora if mode == "random" else train_colours
    begun = time.perf_counter()
    ended(start(lambda: train(out / "whole", data)))
    seconds = time.perf_counter() - begun
    if mode == "random":
        kills, seed = int(sys.argv[3]), int(sys.argv[4])
        # Up to 0.6 of a whole training: some strike at its beginning, some in its middle, some at its end.
        struck = kill_at_random(partial(train, data=data), digest, out / "killed", kills, seed, 0.6 * seconds)
    else:
        struck = kill_at_writes(lambda: train(out / "killed", data))
    print(json.dumps({"struck": struck, "whole": digest(out / "whole"), "killed": digest(out / "killed")}))


if __name__ == "__main__":
    main()
