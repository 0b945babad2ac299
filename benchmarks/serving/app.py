"""The HTTP application: ``POST /predict?adapter=NAME`` with an image as the body.

``adapter=NAME:WEIGHT``, once for each of several, asks for them together; without one the base alone answers.

Clients may send anything. The number of requests accepted at once, the bytes and seconds of a body, an image's pixels
before decoding, and the number of images decoded at once are therefore bounded.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import combinations
from typing import Annotated, Any

import torch
from fastapi import FastAPI, HTTPException, Query
from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect
from torch import Tensor

from examples.histopathology.data.pictures import PictureError, TooLargeError, UnknownFormatError, opened

from .batching import Asked, Batcher

LARGEST = 10_000_000
"""The most bytes of a body."""
PIXELS = 16_000_000
"""The most pixels of an image."""
WAITING = 32
"""The most requests accepted at once, each with its body in memory."""
DECODERS = 2
"""The most images decoded at once."""
PATIENCE = 30.0
"""The most seconds for a body to arrive."""
STRONGEST = 10.0
"""The largest weight of an adapter, with either sign."""


def make_app(
    batcher: Batcher,
    adapters: Iterable[str],
    size: int,
    waiting: int = WAITING,
    patience: float = PATIENCE,
    apart: Mapping[frozenset[str], str] | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        batcher: answers the requests; it is started and stopped with the application.
        adapters: names that requests may give; a request without a name is answered by the base alone.
        size: images are resized to so many pixels a side.
        waiting: the most requests accepted at once; one more is answered 503.
        patience: the most seconds for a body to arrive.
        apart: pairs of adapters that a request may not combine, and why.
    """
    names = tuple(adapters)
    barred = {} if apart is None else apart
    # Threads, not a semaphore: a request that is cancelled leaves its thread at work, and would free its place.
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
    taken = 0

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield
        decoders.shutdown(cancel_futures=True)

    app = FastAPI(title="One base, many adapters", lifespan=running)

    async def known() -> dict[str, Any]:
        return {"adapters": list(names)}

    async def predict(request: HttpRequest, adapter: Annotated[list[str], Query()] = []) -> dict[str, Any]:  # noqa: B006
        nonlocal taken
        asked = asked_for(adapter, names, barred)
        check_headers(request)
        if taken >= waiting:  # before the body is read
            raise HTTPException(503, f"{waiting} requests wait already; try again later", {"Retry-After": "1"})
        taken += 1
        try:
            body = await received(request, patience)
            image = await asyncio.get_running_loop().run_in_executor(decoders, pixels, body, size)
            logits = await batcher.predict(asked, image)
        finally:
            taken -= 1
        return {"adapter": asked, "label": int(logits.argmax()), "logits": logits.tolist()}

    app.get("/adapters")(known)
    app.post("/predict")(predict)
    return app


def asked_for(words: list[str], names: tuple[str, ...], apart: Mapping[frozenset[str], str]) -> Asked:
    """The adapters of a request: a name alone, or the weight of each.

    All checks are here, since an error in the forward would be raised for all requests of the batch.

    Raises:
        HTTPException: 404 for an unknown name, 422 for a weight that is not a number, a repeated name, or two adapters
            that cannot be combined.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, _, number = (word, "", "1") if word in names else word.rpartition(":")
        if name not in names:
            raise HTTPException(404, f"no adapter {word[:64]!r}; there are {', '.join(names)}")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not abs(weight) <= STRONGEST:
            raise HTTPException(422, f"{name}:{number[:64]}: a weight is a number from {-STRONGEST:g} to {STRONGEST:g}")
        if name in weights:
            raise HTTPException(422, f"{name} is asked for twice")
        weights[name] = weight
    for pair in combinations(weights, 2):
        if reason := apart.get(frozenset(pair)):
            raise HTTPException(422, reason[:400])
    alone = len(words) == 1 and words[0] in names
    return words[0] if alone else weights or None


def check_headers(request: HttpRequest) -> None:
    """Refuse a body that is too large or not a plain image by its headers, before it is read.

    Other content types pass: ``curl --data-binary`` says that the body is a form.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise HTTPException(415, "the body must be the image itself, not a form: curl --data-binary @image.png")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "the body must not be compressed: send the image file as it is")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()):
        raise HTTPException(400, "Content-Length must be a number")
    if len(length) > 19 or int(length) > LARGEST:
        raise HTTPException(413, f"an image of more than {LARGEST:,} bytes")


async def received(request: HttpRequest, patience: float) -> bytes:
    """Read the body, without trusting its headers.

    Raises:
        HTTPException: 400 if it is empty or the client disconnects, 408 if it takes too long, 413 if it is too large.
    """

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > LARGEST:
                raise HTTPException(413, f"an image of more than {LARGEST:,} bytes")
            body += chunk
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), patience)
    except asyncio.TimeoutError as cause:
        raise HTTPException(408, f"the body took more than {patience:g} seconds", {"Connection": "close"}) from cause
    except ClientDisconnect as cause:
        raise HTTPException(400, "the body ended early") from cause
    if not body:
        raise HTTPException(400, "the body is empty: send an image file")
    return body


def pixels(data: bytes, size: int) -> Tensor:
    """Decode an image file as ``(3, size, size)`` in [−1, 1].

    Raises:
        HTTPException: 415 for an unknown format, 413 for too many pixels, 422 for a broken file.
    """
    try:
        with opened(io.BytesIO(data), PIXELS) as image:
            small = image.convert("RGB").resize((size, size))
    except PictureError as cause:
        status = 415 if isinstance(cause, UnknownFormatError) else 413 if isinstance(cause, TooLargeError) else 422
        raise HTTPException(status, f"the body cannot be read as an image: {str(cause)[:200]}") from cause
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float()
    return values.view(size, size, 3).permute(2, 0, 1) / 127.5 - 1
