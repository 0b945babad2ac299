"""Measure the methods: the sizes of each, then the times in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from . import measuring
from .apart import Apart
from .arms import ALL_TRAINING, BASE, FULL, FULL_CONSTANT, INFERENCE
from .bench import Bench
from .runs import Result, Run, Say, Settings, environment, with_reference
from .subjects import Arm, NotAvailable


def _measure(settings: Settings, arms: Sequence[Arm], say: Say, reference: str, others: Sequence[str]) -> list[Result]:
    """Measure the sizes of every method that can be built, then the times in rounds."""
    if not arms:
        return []
    benches: dict[str, Bench | Apart] = {}
    results: dict[str, Result] = {}
    with ExitStack() as processes:
        for arm in arms:
            say(f"building {arm.name}")
            results[arm.name] = Result(arm.name, arm.what)
            try:
                bench = _bench(settings, arm, processes)
                say(f"sizes of {arm.name}")
                benches[arm.name], results[arm.name] = bench, bench.sizes()
            except NotAvailable as reason:
                results[arm.name] = Result(arm.name, arm.what, unavailable=str(reason))
        say(f"{settings.rounds + 1} rounds of {len(benches)} methods")
        times = measuring.interleave({name: bench.time for name, bench in benches.items()}, settings.rounds)
    return _with_times(results, times, reference, others)


def _bench(settings: Settings, arm: Arm, processes: ExitStack) -> Bench | Apart:
    if settings.apart:
        return processes.enter_context(Apart(settings, arm.name))
    return Bench.of(settings, arm, train=arm.name in ALL_TRAINING)


def _with_times(
    results: dict[str, Result], times: dict[str, list[float]], reference: str, others: Sequence[str]
) -> list[Result]:
    for name, seconds in times.items():
        results[name] = replace(
            results[name],
            seconds=seconds,
            ratios=measuring.ratios(seconds, times[reference]),
            other_ratios={o: measuring.ratios(seconds, times[o]) for o in others if o in times},
        )
    return list(results.values())


def _silent(line: str) -> None:
    """Say nothing."""


def run(
    settings: Settings, training: Sequence[str], inference: Sequence[str], say: Say = _silent, sweep: str = ""
) -> Run:
    """Measure these methods, and the reference of training or inference with them."""
    training, inference = with_reference(training, FULL), with_reference(inference, BASE)
    return Run(
        settings=settings,
        training=_measure(settings, [ALL_TRAINING[name] for name in training], say, FULL, (FULL_CONSTANT,)),
        inference=_measure(settings, [INFERENCE[name] for name in inference], say, BASE, ()),
        environment=environment(torch.device(settings.device)),
        sweep=sweep,
    )
