"""Serve a network with several adapters over HTTP, and measure it on this machine's loopback.

    python -m benchmarks.serving serve --model resnet18 --adapter tumour/ --adapter stain/ --weights base.safetensors
    python -m benchmarks.serving load --model resnet18 --adapters 8 --clients 16 --requests 400
    python -m benchmarks.serving attack

``load`` starts a server on 127.0.0.1 with random adapters. It alternates between gathering requests into batches and
answering them one after another, and prints requests a second and latency. ``attack`` sends hostile requests to a small
network's server on 127.0.0.1, and prints the memory and time of each (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import platform
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch import nn

import convlora
from benchmarks.overhead.measuring import Quartiles
from benchmarks.overhead.subjects import make_base
from benchmarks.routing import named, ours
from convlora.command.weights import load_weights

from . import attacks
from .app import WAITING, make_app
from .batching import Batcher, apart, routed

HERE = "127.0.0.1"
Round = tuple[float, list[float]]
"""Total seconds, and those of each request."""


def picture(size: int, seed: int) -> bytes:
    """A PNG of noise."""
    noise = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.frombytes("RGB", (size, size), bytes(noise.flatten().tolist())).save(file, "PNG")
    return file.getvalue()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serve the application on a free port of the loopback inside the block, and give its address."""
    with socket.socket() as free:
        free.bind((HERE, 0))
        free.listen(1024)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        task = asyncio.create_task(server.serve([free]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        try:
            yield f"http://{HERE}:{free.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def load(address: str, names: list[str], clients: int, requests: int, size: int) -> Round:
    """Total seconds and those of each request, with clients that send a new request after each answer."""
    pictures = [picture(size, seed) for seed in range(8)]
    numbers = iter(range(requests))
    times: list[float] = []

    async def ask(client: httpx.AsyncClient) -> None:
        for number in numbers:
            began = time.perf_counter()
            answer = await client.post(
                "/predict", params={"adapter": names[number % len(names)]}, content=pictures[number % len(pictures)]
            )
            answer.raise_for_status()
            times.append(time.perf_counter() - began)

    async with httpx.AsyncClient(base_url=address, timeout=120, limits=httpx.Limits(max_connections=clients)) as client:
        began = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        return time.perf_counter() - began, times


async def compare(model: nn.Module, names: list[str], options: argparse.Namespace) -> dict[str, list[Round]]:
    """Measure both ways alternately; the first round is not counted."""
    ways = {"gathered": options.largest, "one after another": 1}
    found: dict[str, list[Round]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way, largest in ways.items():
            batcher = Batcher(routed(model), largest, options.wait / 1e3)
            async with serving(make_app(batcher, names, options.size, max(WAITING, options.clients))) as address:
                result = await load(address, names, options.clients, options.requests, options.size)
            if turn:
                found[way].append(result)
                print(
                    f"{way}: {len(batcher.batches)} batches, {options.requests / len(batcher.batches):.1f} samples each"
                )
    return found


def report(found: dict[str, list[Round]], requests: int) -> None:
    """Print requests a second and the latencies p50 and p95, as medians of the rounds."""
    print(f"\n{'':20s}{'requests/s':>12s}{'p50 ms':>10s}{'p95 ms':>10s}")
    for way, rounds in found.items():
        rate = Quartiles.of([requests / total for total, _ in rounds])
        latency = sorted(1e3 * each for _, times in rounds for each in times)
        half, most = latency[len(latency) // 2], latency[int(0.95 * (len(latency) - 1))]
        print(f"{way:20s}{rate.median:12.1f}{half:10.0f}{most:10.0f}   ({rate.low:.1f}–{rate.high:.1f} requests/s)")
    first, second = ([total for total, _ in rounds] for rounds in found.values())
    ratio = Quartiles.of([b / a for a, b in zip(first, second, strict=True)])
    print(f"gathered answers {ratio.median:.2f} times as many ({ratio.low:.2f}–{ratio.high:.2f})")


def serve(options: argparse.Namespace) -> None:
    """Serve saved adapters until interrupted."""
    model = make_base(options.model, options.num_classes)
    if options.weights is not None:
        load_weights(model, options.weights)
    names = [folder.name for folder in options.adapter]
    for folder, name in zip(options.adapter, names, strict=True):
        convlora.load_adapter(model, folder, name)
    batcher = Batcher(routed(model.eval()), options.largest, options.wait / 1e3)
    app = make_app(batcher, names, options.size, apart=apart(model, names))
    uvicorn.run(app, host=options.host, port=options.port, limit_concurrency=8 * WAITING)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("serve", "load"):
        command = commands.add_parser(name)
        command.add_argument("--model", default="resnet18", help="a timm name, or torchvision:NAME")
        command.add_argument("--size", type=int, default=128, help="side of an image in pixels")
        command.add_argument("--largest", type=int, default=32, help="most samples in a batch")
        command.add_argument("--wait", type=float, default=5.0, help="milliseconds that a request waits for others")
    commands.add_parser("attack")
    served, loaded = (commands.choices[name] for name in ("serve", "load"))
    served.add_argument("--adapter", type=Path, action="append", required=True, help="folder")
    served.add_argument("--weights", type=Path, help="file of the base's weights")
    served.add_argument("--num-classes", type=int, default=2)
    served.add_argument("--host", default=HERE)
    served.add_argument("--port", type=int, default=8000)
    loaded.add_argument("--adapters", type=int, default=8)
    loaded.add_argument("--rank", type=int, default=8)
    loaded.add_argument("--clients", type=int, default=16)
    loaded.add_argument("--requests", type=int, default=400)
    loaded.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.command == "attack":
        attacks.main()
        return
    if options.command == "serve":
        serve(options)
        return
    names = named(options.adapters)
    model = ours(make_base(options.model), options.adapters, options.rank)
    report(asyncio.run(compare(model, names, options)), options.requests)
    print(
        f"\n{options.model}, {options.size} px, {options.adapters} adapters of rank {options.rank}, {options.clients} "
        f"clients, {options.requests} requests, {options.rounds} rounds; {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
