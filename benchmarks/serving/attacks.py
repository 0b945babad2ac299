"""The cost of hostile requests to the server: bytes sent, the server's peak memory, time, and the answer.

Each attack has its own server process on the loopback, so that the peak is that of this attack.
``tests/test_serving.py`` tests the answers.
"""

from __future__ import annotations

import io
import multiprocessing
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
import uvicorn
from PIL import Image

from benchmarks.overhead.subjects import make_base
from benchmarks.routing import named, ours

from .app import LARGEST, make_app
from .batching import Batcher, routed

HERE = "127.0.0.1"
Body = bytes | Iterator[bytes]


class Attack(NamedTuple):
    """A request, the number of copies sent at once, and the expected answers."""

    body: Callable[[], Body]
    answers: set[int]
    times: int = 1
    headers: dict[str, str] | None = None
    adapter: str = "a0"


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def blank(side: int, kind: str = "PNG", **options: object) -> bytes:
    """A black picture."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, kind, **options)
    return file.getvalue()


def png(header: bytes, data: bytes) -> bytes:
    """By hand."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, int, int]], behind: bytes = b"") -> bytes:
    """A TIFF from tags as (type, count, value or offset); ``behind`` begins at `TIFF_END`."""
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(TIFF_END, b"\0") + behind


TIFF_END = 512
GRAY = {256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}


def strips() -> bytes:
    """A small TIFF that lists two million strips for its only row; Pillow makes an object of each."""
    number = 2_000_000
    places = {273: (4, number, TIFF_END), 278: (4, 1, 1), 279: (4, 1, 16)}
    return tiff(GRAY | places, struct.pack("<I", TIFF_END) * number)


def huge_tile() -> bytes:
    """A TIFF of 16 × 16 pixels in a tile of 30,000 × 30,000."""
    data = zlib.compress(bytes(30_000 * 3_000))
    tile = {259: (3, 1, 8), 322: (4, 1, 30_000), 323: (4, 1, 30_000)}
    return tiff(GRAY | tile | {324: (4, 1, TIFF_END), 325: (4, 1, len(data))}, data)


def scans() -> bytes:
    """A progressive JPEG that repeats one of its scans 2,000 times."""
    data = blank(4000, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 2000 + data[-2:]


def webp() -> bytes:
    """A WebP with an empty canvas of 16,384 × 16,384."""
    side = (16_383).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + side + side
    return b"RIFF" + struct.pack("<I", len(body)) + body


def endless() -> Iterator[bytes]:
    """A body without a stated length, of 200 MB."""
    for _ in range(200):
        yield bytes(1_000_000)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) print\n%%EOF\n"
ATTACKS = {
    "PNG of 13,300²": Attack(lambda: blank(13_300), {413}),
    "the same, 4 at once": Attack(lambda: blank(13_300), {413}, 4),
    "PNG that claims 2³¹−1 squared": Attack(
        lambda: png(struct.pack(">IIBBBBB", *[2**31 - 1] * 2, 8, 0, 0, 0, 0), b""), {413}
    ),
    "PNG of 4,000², as large as is read, 40 at once": Attack(lambda: blank(4000), {200, 503}, 40),
    "PNG with a header too short": Attack(lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"1234"), {422}),
    "PNG cut short": Attack(lambda: blank(64)[:-30], {422}),
    "PNG with 64 MB of text": Attack(
        lambda: blank(8)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 * 2**20))) + blank(8)[33:], {422}
    ),
    "JPEG of 2,000 scans more": Attack(scans, {422}),
    "WebP with a canvas of 16,384²": Attack(webp, {413}),
    "TIFF with a tile of 30,000²": Attack(huge_tile, {413}),
    "TIFF with 2,000,000 strips": Attack(strips, {422}),
    "EPS": Attack(lambda: EPS, {415}),
    "GIF": Attack(lambda: blank(64, "GIF"), {415}),
    "no image": Attack(lambda: b"no image", {415}),
    "nothing": Attack(lambda: b"", {400}),
    "a body too large": Attack(lambda: bytes(LARGEST + 1), {413}),
    "a body too large, without its length": Attack(endless, {413}),
    "a multipart form": Attack(lambda: blank(64), {415}, headers={"content-type": "multipart/form-data; boundary=x"}),
    "a gzipped body": Attack(lambda: blank(64), {415}, headers={"content-encoding": "gzip"}),
    "an adapter's name of 50,000 letters": Attack(lambda: blank(64), {404}, adapter="x" * 50_000),
    "an honest PNG of 512²": Attack(lambda: blank(512), {200}),
}


def _serve(pipe: Connection) -> None:
    """Run the server in its own process; on request it sends the peak of its memory in MiB."""
    torch.set_num_threads(1)
    model = ours(make_base("test_resnet"), 2, 2)
    app = make_app(Batcher(routed(model)), named(2), 32)
    app.get("/peak")(_peak)
    with socket.socket() as free:
        free.bind((HERE, 0))
        free.listen(128)
        pipe.send(free.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([free])


async def _peak() -> float:
    with Path("/proc/self/status").open(encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


def _send(address: str, attack: Attack, body: Body) -> int | str:
    try:
        return httpx.post(
            f"{address}/predict", params={"adapter": attack.adapter}, content=body, headers=attack.headers, timeout=60
        ).status_code
    except httpx.TransportError:  # the server has answered and closed while the body was still being sent
        return "closed"


def measure(attack: Attack) -> tuple[int, float, float, list[int | str]]:
    """Bytes sent each time, MiB beyond what an honest request took, seconds, and the answers."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        address = f"http://{HERE}:{here.recv()}"
        assert _send(address, Attack(lambda: b"", {200}), blank(64)) == 200
        before = httpx.get(f"{address}/peak").json()
        bodies = [attack.body() for _ in range(attack.times)]
        began = time.perf_counter()
        with ThreadPoolExecutor(attack.times) as clients:
            answers = list(clients.map(lambda body: _send(address, attack, body), bodies))
        seconds = time.perf_counter() - began
        after = httpx.get(f"{address}/peak").json()
    finally:
        process.terminate()
        process.join(10)
    return len(bodies[0]) if isinstance(bodies[0], bytes) else LARGEST, after - before, seconds, answers


def main() -> None:
    """Run every attack once and print a Markdown table."""
    print("| attack | bytes | MiB | ms | answer |\n|---|--:|--:|--:|---|")
    for name, attack in ATTACKS.items():
        sent, memory, seconds, answers = measure(attack)
        counts = ", ".join(
            f"{answer}" if attack.times == 1 else f"{answers.count(answer)} × {answer}"
            for answer in sorted(set(answers), key=str)
        )
        print(f"| {name} | {sent:,} | {memory:.0f} | {1e3 * seconds:,.0f} | {counts} |", flush=True)
