"""Answer requests that arrive within a few milliseconds of each other by one forward.

Each request may name its own adapter, or several with weights; ``convlora.use_adapters`` routes every sample of the
batch to its adapters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

import convlora

Asked = str | Mapping[str, float] | None
"""An adapter's name, several names with weights, or None for the base."""
Forward = Callable[[list[Asked], Tensor], Tensor]
"""Takes each sample's adapters and a batch ``(batch, …)``; returns an output for each sample."""


def apart(model: nn.Module, names: list[str]) -> dict[frozenset[str], str]:
    """Pairs of adapters that cannot be combined in one sample, and why."""
    found = {frozenset(pair): _refusal(model, pair) for pair in combinations(names, 2)}
    return {pair: reason for pair, reason in found.items() if reason}


def _refusal(model: nn.Module, names: Iterable[str]) -> str:
    try:
        with convlora.use_adapters(model, [dict.fromkeys(names, 1.0)]):
            return ""
    except convlora.StateError as reason:
        return str(reason)


def routed(model: nn.Module) -> Forward:
    """The model's forward, each sample with its own adapter or adapters."""

    def forward(names: list[Asked], images: Tensor) -> Tensor:
        with convlora.use_adapters(model, names), torch.inference_mode():
            y: Tensor = model(images)
        return y

    return forward


@dataclass
class Request:
    """A sample that waits for its output."""

    asked: Asked
    image: Tensor
    answer: asyncio.Future[Tensor]


class Batcher:
    """Gathers samples and answers them together.

    >>> async with Batcher(routed(model)) as batcher:
    ...     prediction = await batcher.predict("tumour", image)

    Args:
        forward: the forward of a batch; it runs in its own thread, so that requests are accepted meanwhile.
        largest: the most samples in a batch; 1 answers requests one after another.
        wait: seconds that the first request of a batch waits for others.
    """

    def __init__(self, forward: Forward, largest: int = 32, wait: float = 0.005) -> None:
        self.forward, self.largest, self.wait = forward, largest, wait
        self.batches: list[int] = []
        """The size of every batch so far."""
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        while not self._queue.empty():
            self._queue.get_nowait().answer.cancel()
        self._thread.shutdown()

    async def predict(self, asked: Asked, image: Tensor) -> Tensor:
        """The output for one sample; an error of the forward is raised for every request of its batch."""
        request = Request(asked, image, asyncio.get_running_loop().create_future())
        await self._queue.put(request)
        return await request.answer

    async def _run(self) -> None:
        while True:
            batch: list[Request] = []
            try:
                await self._gather(batch)
                self.batches.append(len(batch))
                names, images = [each.asked for each in batch], torch.stack([each.image for each in batch])
                loop = asyncio.get_running_loop()
                outputs = await loop.run_in_executor(self._thread, self.forward, names, images)
                pairs = list(zip(batch, outputs, strict=True))
            except asyncio.CancelledError:
                for each in batch:
                    each.answer.cancel()
                raise
            except Exception as error:
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            for each, output in pairs:
                if not each.answer.done():  # its client has gone
                    each.answer.set_result(output)

    async def _gather(self, batch: list[Request]) -> None:
        """Collect the first request, and others until the wait is over or the batch is full."""
        batch.append(await self._queue.get())
        until = asyncio.get_running_loop().time() + self.wait
        while len(batch) < self.largest:
            left = until - asyncio.get_running_loop().time()
            try:
                if left > 0:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                else:
                    batch.append(self._queue.get_nowait())
            except (asyncio.TimeoutError, asyncio.QueueEmpty):
                break
