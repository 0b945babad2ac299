"""The overhead of a training step: torch's calls and Python, on images so small that arithmetic takes little time.

    python -m benchmarks.host                                   # four networks, 2 images of 32 px, one thread
    python -m benchmarks.host --models resnet50 --arms full convlora --rounds 40
    python -m benchmarks.host --calls                           # counts only: the same on any machine
    python -m benchmarks.host --compile inductor                # each method compiled
    python -m benchmarks.host --device cuda --compile inductor --mode reduce-overhead   # with CUDA graphs

It models a GPU that waits for Python. A step is that of `benchmarks.overhead`: zero_grad, forward in train mode,
cross-entropy, backward, AdamW. Calls are the operators that torch dispatches in one step below autograd, including
views. On a CPU the time is that of the process (`time.process_time`), which other processes affect less than wall-clock
time. Methods run in rounds; a ratio compares two times of the same round.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convlora

from .overhead import peers, subjects
from .overhead.bench import Bench
from .overhead.measuring import Quartiles, seconds
from .overhead.runs import Settings
from .overhead.subjects import Arm, Subject

NETWORKS = ("resnet50", "tf_efficientnet_lite0", "mobilenetv3_large_100", "convnext_atto")
FULL = "full"


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that torch dispatches inside the block, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def calls_of(run: Callable[[], object]) -> Counter[str]:
    """The operators that a run dispatches, by name."""
    calls = Calls()
    with calls:
        run()
    return calls.found


def as_peft(model: nn.Module, rank: int) -> Subject:
    """convlora on the convolutions that peft accepts."""
    trial = peers.peft(copy.deepcopy(model), rank).model
    taken = {name.removeprefix("base_model.model.") for name, m in trial.named_modules() if hasattr(m, "lora_A")}
    count = len(subjects.convolutions(model))
    convlora.inject(model, rank, target_modules=lambda name, module: name in taken)
    return Subject(model, count, len(taken))


ARMS = {
    arm.name: arm
    for arm in (
        Arm(FULL, "full fine-tuning", subjects.full, "moving"),
        Arm("convlora", "convlora", subjects.adapted()),
        Arm("convlora-freeze-A", "convlora, freeze_A", subjects.adapted(freeze_A=True)),
        Arm("peft", "peft LoRA, default norms", peers.peft, "moving"),
        Arm("convlora-as-peft", "convlora on the convolutions that peft takes", as_peft),
    )
}


@dataclass(frozen=True)
class Figures:
    """The figures of one method on one network."""

    arm: str
    adapted: int
    """The number of layers with an adapter."""
    forward: int
    backward: int
    optimizer: int
    """Calls of one step."""
    seconds: list[float]
    """Seconds of a step, one figure for each round; empty if only calls were counted."""

    @property
    def calls(self) -> int:
        """Calls of the whole step."""
        return self.forward + self.backward + self.optimizer

    def against(self, other: Figures) -> Quartiles:
        """Time over another method's, round by round."""
        return Quartiles.of([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


def count(bench: Bench) -> tuple[int, int, int]:
    """Calls of forward, backward and optimizer, after the work that only a first step does."""
    bench.two_steps()
    loss: list[torch.Tensor] = []
    bench.optimizer.zero_grad()
    forward = calls_of(lambda: loss.append(bench.forward()))
    backward = calls_of(loss[0].backward)
    return forward.total(), backward.total(), calls_of(bench.optimizer.step).total()


def measure(network: str, arms: Sequence[str], settings: Settings, compile: dict[str, Any] | None) -> list[Figures]:
    """Measure the methods on one network."""
    settings = Settings(**{**vars(settings), "model": network})
    benches = [Bench.of(settings, ARMS[name], train=True) for name in arms]
    counts = [count(bench) for bench in benches]
    for bench in benches if compile and settings.rounds else ():
        bench.subject.model = torch.compile(bench.subject.model, **compile)  # type: ignore
    seconds: dict[str, list[float]] = {bench.arm.name: [] for bench in benches}
    for number in range(settings.rounds + 1 if settings.rounds else 0):
        turn = number % len(benches)
        for bench in (*benches[turn:], *benches[:turn]):
            found = seconds_of(bench)
            if number:  # the first one warms up
                seconds[bench.arm.name].append(found)
    return [
        Figures(bench.arm.name, bench.subject.adapted, *counted, seconds[bench.arm.name])
        for bench, counted in zip(benches, counts, strict=True)
    ]


def seconds_of(bench: Bench) -> float:
    """The fastest of several steps in a row, by process time on a CPU and by the clock on an accelerator."""
    on_cpu = bench.device.type == "cpu"
    least = float("inf")
    for _ in range(bench.settings.repeats):
        if on_cpu:
            start = time.process_time()
            bench.step()
            least = min(least, time.process_time() - start)
        else:
            least = min(least, seconds(bench.step, bench.device))
    return least


def table(network: str, found: Sequence[Figures]) -> str:
    """A Markdown table of one network's methods."""
    by_name = {each.arm: each for each in found}
    full, lines = by_name.get(FULL), [f"### {network}", ""]
    lines += ["| method | layers | calls | forward | backward | optimizer | ms | × full | quartiles | µs a layer |"]
    lines += ["| --- " + "| ---: " * 9 + "|"]
    for each in found:
        row = [each.arm, each.adapted or "", f"{each.calls:,}", each.forward, each.backward, each.optimizer]
        if each.seconds and full:
            ratio, own = each.against(full), Quartiles.of(each.seconds).median
            beyond = (own - Quartiles.of(full.seconds).median) / max(each.adapted, 1)
            row += [f"{own * 1e3:.1f}", f"{ratio.median:.2f}", f"{ratio.low:.2f}–{ratio.high:.2f}"]
            row += [f"{beyond * 1e6:.0f}" if each.adapted else ""]
        else:
            row += ["", "", "", ""]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    mine, theirs = by_name.get("convlora-as-peft"), by_name.get("peft")
    if mine and theirs and mine.seconds:
        lines += ["", f"On the convolutions that peft takes: {mine.against(theirs).median:.2f} of peft's time."]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.host", description=__doc__)
    parser.add_argument("--models", nargs="+", default=NETWORKS, help="timm names, or torchvision:NAME")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="METHOD", help="methods to run (default: all)"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="steps in a row, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", action="store_true", help="count calls, without times")
    parser.add_argument("--compile", metavar="BACKEND", help="compile each method with this torch.compile backend")
    parser.add_argument("--mode", help="mode of torch.compile; reduce-overhead uses CUDA graphs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(
        batch=options.batch,
        size=options.size,
        rank=options.rank,
        rounds=0 if options.calls else options.rounds,
        repeats=options.repeats,
        device=options.device,
    )
    compile = (
        {"backend": options.compile} | ({"mode": options.mode} if options.mode else {}) if options.compile else None
    )
    for network in options.models:
        print(table(network, measure(network, options.arms, settings, compile)), flush=True)


if __name__ == "__main__":
    main()
