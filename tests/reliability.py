"""What is left of adapters when things go wrong: kills and full disks during saves, threads that switch, long use.

    python -m tests.reliability kills --count 1000
    python -m tests.reliability calls
    python -m tests.reliability savers --seconds 30
    python -m tests.reliability threads --seconds 30
    python -m tests.reliability cycles --count 10000

Each prints what it did and how many losses there were. A loss is an adapter that cannot be read, is not the last that
was saved or the one that was being saved, or is made of two; an output that belongs to no adapter; a base that changed.
``kills`` ends a process that saves without pause by SIGKILL, each time after a random time. ``calls`` ends one at each
call that it makes to the file system, just before and just after it, and lets each such call fail in turn: disk full,
no permission, read-only. The numbers of an adapter are all the same, so that each file says which save it is of.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import gc
import io
import os
import random
import select
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convlora
from convlora._checkpoint import saving

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@dataclass
class Tally:
    """What was tried, and what was lost."""

    tried: int = 0
    losses: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        """Count a loss unless it holds."""
        if not holds:
            self.losses.append(what)

    def __str__(self) -> str:
        shown = "".join(f"\n  {loss}" for loss in self.losses[:8])
        return f"{self.tried:,} tried, {len(self.losses):,} lost{shown}"


def make_net() -> nn.Module:
    """A stem, a norm, a depthwise layer, a head; the same numbers in every process."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


BASE = make_net()


def fill(model: nn.Module, number: float) -> None:
    """Make all that trains this number."""
    with torch.no_grad():
        for parameter in convlora.trainable_parameters(model):
            parameter.fill_(number)


def number_in(directory: Path) -> float:
    """The number that the adapter there is made of.

    Raises:
        CheckpointError: it cannot be read.
        ValueError: it is made of several.
    """
    model = convlora.load_adapter(copy.deepcopy(BASE), directory)
    numbers = {float(n) for parameter in convlora.trainable_parameters(model) for n in parameter.flatten().tolist()}
    if len(numbers) != 1:
        raise ValueError(f"the adapter is of several saves: {sorted(numbers)}")
    return numbers.pop()


# -- kills -----------------------------------------------------------------------------------------------------


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does this with the writing end of a pipe; its id, and the reading end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        work(writing)
    finally:
        os._exit(0)


def saves(directory: Path, first: int, pipe: int) -> None:
    """Save without pause: first, first + 1, and so on; the pipe is told of each that is done."""
    model = convlora.inject(make_net(), 2, norm="track")
    for number in range(first, first + 10**6):
        fill(model, number)
        convlora.save_adapter(model, directory)
        os.write(pipe, number.to_bytes(8, "little"))


def random_kills(count: int, seed: int = 0) -> Tally:
    """SIGKILL after a random time, mostly in the midst of a save."""
    tally, choose = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "adapter")
        model = convlora.inject(make_net(), 2, norm="track")
        fill(model, 1)
        convlora.save_adapter(model, directory)
        done = 1
        for _ in range(count):
            child, pipe = forked(lambda writing, first=done + 1: saves(directory, first, writing))  # type: ignore[misc]
            select.select([pipe], [], [], 60)  # the first save is done: the child is at full speed
            time.sleep(choose.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with os.fdopen(pipe, "rb") as told:
                done = max([done, *(int.from_bytes(part, "little") for part in _parts(told.read()))])
            tally.tried += 1
            if tally.tried % 100 == 0:
                print(f"{tally.tried} kills, {len(tally.losses)} losses", flush=True)
            try:
                found = number_in(directory)
                tally.check(found in (done, done + 1), f"{done} was saved, and there is {found}")
                done = max(done, int(found))
            except ValueError as error:
                tally.check(False, repr(error))
        abandoned = [file for file in directory.iterdir() if file.name.startswith(".")]
        for file in abandoned:
            os.utime(file, (0, 0))
        convlora.save_adapter(model, directory)
        left = sorted(file.name for file in directory.iterdir())
        print(f"{len(abandoned)} temporary files were left; after a save that finds them old there are {left}")
        tally.check(left == sorted([TENSORS, CONFIG, CARD]), f"left: {left}")
    return tally


def _parts(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 8] for at in range(0, len(data) - 7, 8))


CALLS = [(os, name) for name in ("mkdir", "replace", "unlink", "fsync", "chmod", "stat")]
CALLS += [(io, "open"), (saving, "save")]


@contextlib.contextmanager
def counted(strike: Callable[[int, str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Every call of a save to the file system goes by ``strike(how many, its name, the call)``."""
    count = 0

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if name == "open" and "adapter" not in str(args[0]):  # other libraries' files
                return call(*args, **kwargs)
            count += 1
            return strike(count, name, lambda: call(*args, **kwargs))

        return counting

    before = [(module, name, getattr(module, name)) for module, name in CALLS]
    try:
        for module, name, call in before:
            setattr(module, name, wrap(name, call))
        yield
    finally:
        for module, name, call in before:
            setattr(module, name, call)


def kills_at_each_call() -> Tally:
    """SIGKILL just before and after the first call to the file system, the second, ... until a save gets through."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "adapter")
        model = convlora.inject(make_net(), 2)
        fill(model, 1)
        convlora.save_adapter(model, directory)
        fill(model, 2)
        for late in (False, True):
            at = 0
            while True:
                at += 1

                def strike(count: int, name: str, call: Callable[[], Any], at: int = at, late: bool = late) -> Any:
                    if count == at and not late:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = call()
                    if count == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                def work(_: int, strike: Callable[[int, str, Callable[[], Any]], Any] = strike) -> None:
                    with counted(strike):
                        convlora.save_adapter(model, directory)

                child, pipe = forked(work)
                status = os.waitpid(child, 0)[1]
                os.close(pipe)
                if not os.WIFSIGNALED(status):
                    break
                tally.tried += 1
                try:
                    tally.check(number_in(directory) in (1, 2), "neither the old nor the new")
                except ValueError as error:
                    tally.check(False, f"{error!r} at call {at}")
                for file in directory.glob(".*"):  # else each save would have more calls than the last
                    file.unlink()
    return tally


def failures_at_each_call() -> Tally:
    """Each call fails in turn: the save raises, and all files are as they were; or it goes on, and they are new."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a card that cannot be read is left as it is
        directory = Path(folder, "adapter")
        model = convlora.inject(make_net(), 2)
        fill(model, 1)
        convlora.save_adapter(model, directory)
        for code in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            at, failed = 0, True
            while failed:
                at, failed = at + 1, False
                fill(model, at + 1)
                before = contents(directory)

                def strike(count: int, name: str, call: Callable[[], Any], at: int = at, code: int = code) -> Any:
                    nonlocal failed
                    if count == at:
                        failed = True
                        raise OSError(code, os.strerror(code))
                    return call()

                refused = False
                with counted(strike):
                    try:
                        convlora.save_adapter(model, directory)
                    except convlora.CheckpointError:
                        refused = True
                tally.tried += failed
                where = f"call {at}, {os.strerror(code)}"
                after = contents(directory)
                try:
                    tally.check(after == before if refused else number_in(directory) == at + 1, f"{where}: {refused}")
                except ValueError as error:
                    tally.check(False, f"{where}: {error!r}")
    return tally


def contents(directory: Path) -> dict[str, bytes]:
    """The adapter's files."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if not file.name.startswith(".")}


def savers_and_loaders(seconds: float, savers: int = 2, loaders: int = 2) -> Tally:
    """Processes that save into one directory, and threads that load from it."""
    tally, lock, end = Tally(), threading.Lock(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "adapter")
        model = convlora.inject(make_net(), 2, norm="track")
        fill(model, 1)
        convlora.save_adapter(model, directory)
        children = []
        for each in range(savers):
            first = 10**6 * (each + 1)
            children.append(forked(lambda writing, first=first: saves(directory, first, writing)))  # type: ignore[misc]

        def load() -> None:
            while time.monotonic() < end:
                try:
                    number_in(directory)
                    problem = ""
                except ValueError as error:
                    problem = repr(error)
                with lock:
                    tally.tried += 1
                    tally.check(not problem, problem)

        threads = [threading.Thread(target=load) for _ in range(loaders)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for _, pipe in children:
                if select.select([pipe], [], [], 0.01)[0]:
                    os.read(pipe, 65536)
        for child, pipe in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(pipe)
    return tally


# -- threads and long use --------------------------------------------------------------------------------------


def two_adapters() -> nn.Module:
    """A network with adapters "a" and "b" that predict otherwise."""
    model = convlora.inject(make_net(), 2, adapter_name="a", norm="track")
    convlora.add_adapter(model, "b", 2)
    for name, number in (("a", 0.01), ("b", -0.02)):
        convlora.set_adapter(model, name)
        fill(model, number)
    return model


def threads_that_route(seconds: float, threads: int = 4) -> Tally:
    """Threads infer, each in blocks of its own; one more switches the active adapter all the while."""
    tally, lock, end = Tally(), threading.Lock(), time.monotonic() + seconds
    model, images = two_adapters(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected: dict[str | None, Tensor] = {}
        for name in ("a", "b"):
            convlora.set_adapter(model, name)
            expected[name] = model(images)
        with convlora.disable_adapter(model):
            expected[None] = model(images)

    def infer(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end:
            names = [choose.choice(["a", "b", None]) for _ in range(3)]
            with convlora.use_adapters(model, names), torch.no_grad():
                outputs = model(images)
            wanted = torch.stack([expected[name][row] for row, name in enumerate(names)])
            # rounding of fp32: W ∗ x + B (A ∗ x) against (W + BA) ∗ x
            same = torch.allclose(outputs, wanted, rtol=1e-4, atol=1e-5)
            with lock:
                tally.tried += 1
                tally.check(same, f"{names}: off by {(outputs - wanted).abs().max():.2g}")

    def switch() -> None:
        while time.monotonic() < end:
            for name in ("a", "b"):
                convlora.set_adapter(model, name)

    started = [threading.Thread(target=infer, args=(seed,)) for seed in range(threads)]
    started.append(threading.Thread(target=switch))
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return tally


def cycles(count: int, after: int | None = None) -> tuple[Tally, list[tuple[int, int, float]]]:
    """Merge, unmerge, switch, disable and route over and over.

    Args:
        count: how often.
        after: how often before memory is first looked at; default a tenth.

    Returns:
        Outputs that were not those of the adapter, bit for bit; and (cycle, objects that Python's collector knows,
        resident MiB), at first and at last.
    """
    tally, model, images = Tally(), two_adapters(), torch.randn(2, 3, 8, 8)
    convlora.set_adapter(model, "a")
    with torch.no_grad():
        expected, weight = model(images), convlora.base_weight(model[0][0]).clone()  # type: ignore[index]
        seen: list[tuple[int, int, float]] = []
        for number in range(count + 1):
            if number in (count // 10 if after is None else after, count):
                gc.collect()
                seen.append((number, len(gc.get_objects()), resident()))
            convlora.merge(model)
            merged = model(images)
            convlora.unmerge(model)
            convlora.set_adapter(model, "b")
            with convlora.disable_adapter(model):
                model(images)
            with convlora.use_adapters(model, ["a", "b"]):
                model(images)
            convlora.set_adapter(model, "a")
            tally.tried += 1
            same = torch.equal(merged, expected) and torch.equal(model(images), expected)
            tally.check(same and torch.equal(convlora.base_weight(model[0][0]), weight), f"cycle {number}")  # type: ignore[index]
    return tally, seen


def resident() -> float:
    """MiB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Read the options and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "calls", "savers", "threads", "cycles"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads must not fork
    if options.what == "kills":
        print(f"random kills: {random_kills(options.count, options.seed)}")
    elif options.what == "calls":
        print(f"kills at each call: {kills_at_each_call()}")
        print(f"failures at each call: {failures_at_each_call()}")
    elif options.what == "savers":
        print(f"loads beside two processes that save: {savers_and_loaders(options.seconds)}")
    elif options.what == "threads":
        print(f"routed batches of four threads beside one that switches: {threads_that_route(options.seconds)}")
    else:
        tally, seen = cycles(options.count)
        print(f"cycles: {tally}")
        for number, objects, size in seen:
            print(f"  after {number:,}: {objects:,} objects, {size:.1f} MiB resident")


if __name__ == "__main__":
    main()
