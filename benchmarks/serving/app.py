"""The HTTP application: ``POST /predict?adapter=NAME`` with an image as the body."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from PIL import Image
from torch import Tensor

from .batching import Batcher

LARGEST = 10_000_000
"""Bytes of a body."""


def make_app(batcher: Batcher, adapters: Iterable[str], size: int) -> FastAPI:
    """The application.

    Args:
        batcher: answers the requests; it is started and stopped with the application.
        adapters: the names that may be asked for; without one the base alone answers.
        size: images are resized to so many pixels a side.
    """
    names = tuple(adapters)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(title="One base, many adapters", lifespan=running)

    async def known() -> dict[str, Any]:
        return {"adapters": list(names)}

    async def predict(request: HttpRequest, adapter: str | None = None) -> dict[str, Any]:
        if adapter is not None and adapter not in names:
            raise HTTPException(404, f"no adapter {adapter!r}; there are {', '.join(names)}")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST:
                raise HTTPException(413, f"an image of more than {LARGEST:,} bytes")
        image = await asyncio.to_thread(pixels, bytes(body), size)  # other requests come in meanwhile
        logits = await batcher.predict(adapter, image)
        return {"adapter": adapter, "label": int(logits.argmax()), "logits": logits.tolist()}

    app.get("/adapters")(known)
    app.post("/predict")(predict)
    return app


def pixels(data: bytes, size: int) -> Tensor:
    """An image file as ``(3, size, size)``, from −1 to 1.

    Raises:
        HTTPException: 422 where it is no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB").resize((size, size))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as cause:  # Pillow's, of broken files
        raise HTTPException(422, "the body must be an image file: PNG, JPEG, …") from cause
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float()
    return values.view(size, size, 3).permute(2, 0, 1) / 127.5 - 1
