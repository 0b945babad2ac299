"""Time each path of an adapted convolution on the layers of real networks: is the fastest one chosen?

    python -m benchmarks.paths --model resnet50 mobilenetv2_100 --batch 16 --size 224

Every layer shape of the networks is run forward and backward by each path, in interleaved rounds. Beside the times are
the choice of ``convlora/_layer/paths.py`` and the time that it loses. Grouped convolutions have one path and are
skipped. At the end are the constants of that file with which the choices would lose the least time on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convlora
from benchmarks.overhead.measuring import Quartiles, interleave, seconds
from benchmarks.overhead.runs import environment
from benchmarks.overhead.subjects import make_base
from benchmarks.overhead.tables import Row, as_text, figure, machine, wrapped
from convlora._layer import paths as chooser
from convlora._layer.adapted import AdaptedLayer, active_adapter
from convlora._layer.change import Change
from convlora._layer.convolution import convolve
from convlora._layer.fast import _padding, is_plain, sizes_of
from convlora._layer.functional import Geometry
from convlora._layer.paths import LayerSizes
from convlora._layer.swap import original_class

PATHS = ("fused", "weight", "branch")
WRONG = 0.05
"""A choice is called wrong if it is slower than the fastest path by more than this share."""
BALANCES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 13.0, 17.0, 22.0, 30.0, 40.0, 60.0, 100.0)
THINS = (1, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64)


@dataclass(frozen=True)
class Case:
    """A layer shape of a network."""

    weight: tuple[int, ...]
    """``(C_out, C_in, kH, kW)``."""
    geometry: Geometry
    x: tuple[int, ...]
    """Shape of the padded input: ``(N, C_in, H, W)``."""
    sizes: LayerSizes
    """The sizes from which the path is chosen."""

    def __str__(self) -> str:
        (out, into, height, width), stride, dilation = self.weight, self.geometry.stride, self.geometry.dilation
        stepped = f" /{stride[0]}" if stride[0] > 1 else ""
        dilated = f" d{dilation[0]}" if dilation[0] > 1 else ""
        first = "" if self.sizes.input_grad else " first"
        rank = f" r{self.sizes.rank}"
        return f"{into}→{out} {height}×{width}{stepped}{dilated} @{self.x[2]}×{self.x[3]}{rank}{first}"


@dataclass(frozen=True)
class Timed:
    """A layer shape, its count, and the median seconds of forward and backward by each path."""

    case: Case
    count: int
    times: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest path."""
        return min(self.times, key=lambda path: self.times[path])

    @property
    def chosen(self) -> str:
        """The path that the current constants choose."""
        return chooser.choose(self.case.sizes)

    @property
    def lost(self) -> float:
        """Seconds that the choice loses in one step, over all layers of this shape."""
        return self.count * (self.times[self.chosen] - self.times[self.best])

    @property
    def share_lost(self) -> float:
        """The time lost by the choice, as a share of the fastest path's."""
        return self.times[self.chosen] / self.times[self.best] - 1


def find_cases(name: str, rank: int, images: Tensor) -> tuple[Counter[Case], int]:
    """The shapes of a network's adapted convolutions without groups, with counts, and the number of grouped calls."""
    model = convlora.inject(make_base(name), rank).to(images.device).train()
    cases: Counter[Case] = Counter()
    grouped = 0

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal grouped
        if layer.groups > 1:
            grouped += 1
        elif (case := _case(layer, inputs[0])) is not None:
            cases[case] += 1

    for module in model.modules():
        if isinstance(module, AdaptedLayer) and isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    model(images)
    return cases, grouped


def _case(layer: Any, x: Tensor) -> Case | None:
    """The layer's shape with this input, padded; None if the layer has no paths to choose from."""
    padding, change = _padding(layer), active_adapter(layer)
    if padding is None or not isinstance(change, Change) or not is_plain(layer, original_class(layer)):
        return None
    size = tuple(x.shape)
    if layer.padding_mode != "zeros":
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        size, padding = (*size[:2], size[2] + top + bottom, size[3] + left + right), (0, 0)
    geometry = Geometry(layer.stride, padding, layer.dilation, layer.groups)
    seen = torch.empty(1, dtype=x.dtype).expand(size).requires_grad_(x.requires_grad)
    sizes = sizes_of(layer, seen, geometry, change.rank)
    weight = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return Case(weight, geometry, size, sizes)


def pass_of(case: Case, path: str, device: torch.device, layout: torch.memory_format) -> Callable[[], object]:
    """A function that runs this shape forward and backward by this path, on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    rank = case.sizes.rank
    x = numbers(*case.x).contiguous(memory_format=layout).requires_grad_(case.sizes.input_grad)
    weight = numbers(*case.weight).contiguous(memory_format=layout)
    lora_A = numbers(rank, *case.weight[1:]).contiguous(memory_format=layout).requires_grad_()
    lora_B = numbers(case.weight[0], rank).requires_grad_()
    asked = [tensor for tensor in (x, lora_A, lora_B) if tensor.requires_grad]
    forward = partial(convolve, x, weight, lora_A, lora_B, None, 2.0, case.geometry, path)
    g = torch.randn_like(forward().detach())
    return lambda: torch.autograd.grad(forward(), asked, g)


def time_case(
    case: Case, count: int, rounds: int, repeats: int, device: torch.device, layout: torch.memory_format
) -> Timed:
    """Time each path of a shape in interleaved rounds."""
    ways = {path: partial(seconds, pass_of(case, path, device, layout), device, repeats) for path in PATHS}
    times = interleave(ways, rounds)
    return Timed(case, count, {path: Quartiles.of(values).median for path, values in times.items()})


@contextmanager
def constants(balance: float, thin: int) -> Iterator[None]:
    """Use other constants in ``convlora/_layer/paths.py`` inside the block."""
    before = chooser.BALANCE, chooser.THIN
    chooser.BALANCE, chooser.THIN = balance, thin
    try:
        yield
    finally:
        chooser.BALANCE, chooser.THIN = before


@dataclass(frozen=True)
class Suggestion:
    """A pair of constants, and the seconds that it loses in a step."""

    balance: float
    thin: int
    lost: float


def suggest(timed: Sequence[Timed]) -> Suggestion:
    """The pair of the grid that loses the least; of equal pairs, the nearest to the current one."""
    present = chooser.BALANCE, chooser.THIN

    def lost(balance: float, thin: int) -> float:
        with constants(balance, thin):
            return sum(item.lost for item in timed)

    def distance(balance: float, thin: int) -> float:
        return abs(math.log((balance + 1) / (present[0] + 1))) + abs(math.log(thin / present[1]))

    pairs = {present, *itertools.product(BALANCES, THINS)}
    found = [Suggestion(balance, thin, lost(balance, thin)) for balance, thin in pairs]
    return min(found, key=lambda s: (round(s.lost, 9), distance(s.balance, s.thin)))


def table(timed: Sequence[Timed]) -> str:
    """A table with a line for each shape, by time lost."""
    rows: list[Row] = [("shape", "n", *PATHS, "chosen", "best", "lost%", "")]
    for item in sorted(timed, key=lambda item: -item.lost):
        cells = (figure(1e3 * item.times[path]) for path in PATHS)
        wrong = "wrong" if item.share_lost > WRONG else ""
        line = (item.chosen, item.best, f"{100 * item.share_lost:.0f}", wrong)
        rows.append((str(item.case), str(item.count), *cells, *line))
    return as_text(rows)


def estimates(timed: Sequence[Timed]) -> str:
    """A table with a line for each shape: ``chooser.estimate``'s estimates, and each path's time beyond the fastest."""
    rows: list[Row] = [("shape", *(f"{path}{unit}" for path in PATHS for unit in ("", " ms")))]
    for item in timed:
        costs = {str(path): cost for path, cost in chooser.estimate(item.case.sizes).items()}
        least = item.times[item.best]
        pairs = ((figure(costs[path] / 1e6), figure(1e3 * (item.times[path] - least))) for path in PATHS)
        rows.append((str(item.case), *itertools.chain.from_iterable(pairs)))
    return as_text(rows)


def conclusion(timed: Sequence[Timed]) -> str:
    """The time lost by the choices and by always taking one path, and the constants that would lose less."""
    best = sum(item.count * item.times[item.best] for item in timed)
    lost = sum(item.lost for item in timed)
    wrong = sum(item.share_lost > WRONG for item in timed)
    always = {path: sum(item.count * item.times[path] for item in timed) / best - 1 for path in PATHS}
    found = suggest(timed)
    return wrapped(
        [
            f"Lost by the choices: {100 * lost / best:.1f} % ({1e3 * lost:.2f} ms a step beside {1e3 * best:.1f} ms, "
            f"each shape as often as it occurs); {wrong} of {len(timed)} shapes lose more than {100 * WRONG:.0f} %.",
            "Always one path would lose: " + ", ".join(f"{path} {100 * share:.1f} %" for path, share in always.items()),
            f"Constants now: BALANCE {chooser.BALANCE:g}, THIN {chooser.THIN}. The least would be lost with BALANCE "
            f"{found.balance:g}, THIN {found.thin}: {100 * found.lost / best:.1f} %.",
        ]
    )


def to_json(timed: Sequence[Timed], where: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, as plain JSON data."""
    names = ("model", "batch", "size", "rank", "rounds", "repeats", "channels_last")
    layers = [asdict(item) | {"chosen": item.chosen, "best": item.best, "lost": item.lost} for item in timed]
    costs = [chooser.estimate(item.case.sizes) for item in timed]
    return {
        "settings": {name: getattr(options, name) for name in names},
        "environment": where,
        "constants": {"BALANCE": chooser.BALANCE, "THIN": chooser.THIN},
        "layers": [layer | {"estimate": found} for layer, found in zip(layers, costs, strict=True)],
        "suggestion": asdict(suggest(timed)),
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m benchmarks.paths", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--model", nargs="+", default=["resnet50", "mobilenetv2_100"], help="timm names, torchvision:NAME"
    )
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    found.add_argument("--rank", type=int, default=8)
    found.add_argument("--rounds", type=int, default=7, help="counted ones")
    found.add_argument("--repeats", type=int, default=3, help="passes in a row for one figure")
    found.add_argument("--threads", type=int, help="torch's threads on a CPU")
    found.add_argument("--device", default="cpu")
    found.add_argument("--channels-last", action="store_true")
    found.add_argument("--estimates", action="store_true", help="print the estimates too")
    found.add_argument("--json", type=Path, help="file for all results")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images = torch.zeros(options.batch, 3, options.size, options.size, device=device)
    cases: Counter[Case] = Counter()
    grouped = 0
    for name in options.model:
        found, more = find_cases(name, options.rank, images)
        cases += found
        grouped += more
    timed = []
    for number, (case, count) in enumerate(cases.items(), 1):
        print(f"{number} of {len(cases)}: {case}", file=sys.stderr)
        timed.append(time_case(case, count, options.rounds, options.repeats, device, layout))
    where = environment(device)
    heading = (
        f"{', '.join(options.model)}; batch {options.batch}, {options.size} × {options.size} px, rank {options.rank}, "
        f"{options.rounds} rounds; {machine(where)}; {grouped} grouped convolutions left out."
    )
    print(wrapped([heading]), "Forward and backward, ms; n: how often the shape occurs", table(timed), sep="\n\n")
    if options.estimates:
        print(f"\nEstimates in MFLOP, beside ms beyond the fastest path's:\n\n{estimates(timed)}")
    print(f"\n{conclusion(timed)}")
    if options.json:
        options.json.write_text(json.dumps(to_json(timed, where, options), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
