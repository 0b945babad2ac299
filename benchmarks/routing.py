"""One batch for several adapters: one routed forward against other ways to compute the same.

    python -m benchmarks.routing --model resnet50 --size 128 --adapters 2 8 32

Each adapter has its own factors in every convolution and its own head; samples alternate between adapters, as requests
do. The other ways are ``set_adapter`` and a forward for each adapter's samples, peft's ``adapter_names=`` in one
forward of the same network, and, for scale, the base's forward. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import convlora
from benchmarks.overhead.measuring import Quartiles, interleave, ratios, seconds
from benchmarks.overhead.peers import library, their_warnings_aside, versions
from benchmarks.overhead.subjects import NotAvailable, convolutions, head_names, make_base

ROUTED, TURNS, PEFT, BASE = "use_adapters", "one after another", "peft adapter_names", "base alone"
Way = Callable[[list[str], Tensor], Tensor]
"""Takes an adapter's name for each sample, and the batch; returns the outputs."""


def named(count: int) -> list[str]:
    """Names for this many adapters."""
    return [f"a{index}" for index in range(count)]


def ours(base: nn.Module, adapters: int, rank: int) -> nn.Module:
    """The network with this many convlora adapters, with random factors and heads."""
    model = copy.deepcopy(base)
    for index, name in enumerate(named(adapters)):
        if index:
            convlora.add_adapter(model, name, rank)
        else:
            convlora.inject(model, rank, adapter_name=name)
        convlora.set_adapter(model, name)
        for parameter in convlora.trainable_parameters(model):
            nn.init.normal_(parameter, std=1e-2)
    return model.eval()


def theirs(base: nn.Module, adapters: int, rank: int) -> Any:
    """The network with this many peft adapters; raises NotAvailable if peft is missing or refuses the network."""
    lib = library("peft", "peft")
    config = lib.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(convolutions(base)),
        modules_to_save=list(head_names(base)),
    )
    first, *others = named(adapters)
    try:
        with their_warnings_aside():
            model = lib.get_peft_model(copy.deepcopy(base), config, adapter_name=first)
            for name in others:
                model.add_adapter(name, config)
    except ValueError as cause:
        raise NotAvailable(str(cause)) from cause
    for key, parameter in model.named_parameters():
        if ".lora_" in key or ".modules_to_save." in key:
            nn.init.normal_(parameter, std=1e-2)
    return model.eval()


def routed(model: nn.Module) -> Way:
    """One forward in a ``use_adapters`` block; the time includes entering the block."""

    def run(names: list[str], images: Tensor) -> Tensor:
        with convlora.use_adapters(model, names):
            y: Tensor = model(images)
        return y

    return run


def in_turn(model: nn.Module) -> Way:
    """``set_adapter`` and a forward for each adapter's samples, with the outputs put in the batch's order."""

    def run(names: list[str], images: Tensor) -> Tensor:
        outputs: dict[int, Tensor] = {}
        for name in dict.fromkeys(names):
            rows = [row for row, each in enumerate(names) if each == name]
            convlora.set_adapter(model, name)
            outputs.update(zip(rows, model(images[rows]), strict=True))
        return torch.stack([outputs[row] for row in range(len(names))])

    return run


def ways(base: nn.Module, adapters: int, rank: int) -> dict[str, Way]:
    """The ways that can run here, by name."""
    model = ours(base, adapters, rank)
    found: dict[str, Way] = {ROUTED: routed(model), TURNS: in_turn(model), BASE: lambda _, images: base(images)}
    try:
        peer = theirs(base, adapters, rank)
        found[PEFT] = lambda names, images: peer(images, adapter_names=names)
    except NotAvailable as reason:
        print(f"{PEFT}: {reason}")
    return found


def compare(found: dict[str, Way], names: list[str], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in interleaved rounds, after a check that routing and taking turns predict the same."""
    with torch.inference_mode():
        torch.testing.assert_close(
            found[ROUTED](names, images), found[TURNS](names, images), rtol=1e-3, atol=1e-5
        )  # a tolerance for rounding, which networks with random weights amplify
        timed = {
            name: lambda way=way: seconds(lambda: way(names, images), images.device) for name, way in found.items()
        }
        return interleave(timed, rounds)


def report(adapters: int, times: dict[str, list[float]]) -> None:
    """Print medians and quartiles in ms, and each way's time over the routed forward's."""
    print(f"\n{adapters} adapters")
    for name, values in times.items():
        spread, ratio = Quartiles.of([1e3 * value for value in values]), Quartiles.of(ratios(values, times[ROUTED]))
        print(
            f"  {name:20s}{spread.median:9.1f} ms ({spread.low:.1f}–{spread.high:.1f})   "
            f"{ratio.median:5.2f} × the routed forward ({ratio.low:.2f}–{ratio.high:.2f})"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a timm name, or torchvision:NAME")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 8, 32], help="numbers of adapters in the batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    base = make_base(options.model).eval().to(device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    for adapters in options.adapters:
        found = ways(base, adapters, options.rank)
        names = [named(adapters)[row % adapters] for row in range(options.batch)]
        report(adapters, compare(found, names, images, options.rounds))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"\n{options.model}, batch {options.batch} × {options.size} px, rank {options.rank}; median (quartiles) of "
        f"{options.rounds} rounds; {where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, peft {versions()['peft']}"
    )


if __name__ == "__main__":
    main()
