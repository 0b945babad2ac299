"""All cases of the numeric sweep by name, and the row of results of a case."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict
from importlib.util import find_spec
from inspect import signature
from typing import Any

from torch import nn

import convlora

from . import (
    diffusers_cases,
    handmade,
    monai_cases,
    pytorchcv_cases,
    smp_cases,
    spandrel_cases,
    timm_cases,
    torchvision_cases,
    transformers_cases,
    ultralytics_cases,
    vision_cases,
)
from .cases import Case, Subject, prepare
from .checks import check
from .heads import named_by_hand
from .libraries import Convlora, Library, Peft, convolutions, is_plain

FAMILIES = (torchvision_cases, transformers_cases, smp_cases, handmade)
FURTHER = (ultralytics_cases, monai_cases, diffusers_cases, spandrel_cases, vision_cases, pytorchcv_cases)
"""The libraries of the extra ``coverage``."""
PACKAGES = {
    "ultralytics": "ultralytics",
    "monai": "monai",
    "nnunet": "dynamic_network_architectures",
    "diffusers": "diffusers",
    "open_clip": "open_clip",
    "kornia": "kornia",
    "facenet": "facenet_pytorch",
    "torchxrayvision": "torchxrayvision",
    "spandrel": "spandrel",
    "pytorchcv": "pytorchcv",
}
"""The module to import for each of them."""


def cases(planned: Iterable[dict[str, Any]]) -> dict[str, Case]:
    """All cases by name; timm's are chosen from the rows of the plan sweep."""
    timm_rows = [row for row in planned if row["name"].startswith("timm/") and "error" not in row]
    found = [timm_cases.case(name) for name in (*timm_cases.smallest(timm_rows), *timm_cases.BESIDES)]
    found += [case for family in FAMILIES for case in family.cases()]
    return {case.name: case for case in found} | further_cases()


def further_cases() -> dict[str, Case]:
    """The cases of the further libraries that are installed."""
    found = [case for family in FURTHER for case in family.cases()]
    return {case.name: case for case in found if find_spec(PACKAGES[case.name.split("/")[0]])}


def check_case(case: Case, libraries: Iterable[Library] | None = None) -> dict[str, Any]:
    """One row: the network, the numbers of adapted and skipped layers, and each library's steps."""
    subject = prepare(case)
    model = subject.fresh()
    row: dict[str, Any] = {
        "input": subject.sample.shapes(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **_planned(subject, model),
    }
    plain = [is_plain(layer) for layer in convolutions(model).values()]
    for library in libraries or (Convlora(), Peft(), *([Peft(every=False)] if any(plain) and not all(plain) else ())):
        row[library.name] = {name: asdict(step) for name, step in check(subject, library).items()}
    return row


def _planned(subject: Subject, model: nn.Module) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            plan = convlora.plan(model)
        except convlora.ConvLoraError:
            return {"adapted": 0, "skipped": None}  # the check's first step gives the reason
    found: dict[str, Any] = {"adapted": len(plan.layers), "skipped": len(plan.skipped)}
    found["heads"] = list(plan.modules_to_save)
    found["named"] = named_by_hand(subject.case.name, model)
    found["warned"] = any("no head was found" in str(each.message) for each in told)
    return found | _by_example(subject, model)


def _by_example(subject: Subject, model: nn.Module) -> dict[str, Any]:
    """The heads that an example input shows, or why it shows none."""
    sample = subject.sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given = signature(model.forward).bind(*sample.args, **sample.kwargs)
            plan = convlora.plan(model, example=given.args if sample.args and not sample.kwargs else given.arguments)
        except convlora.ConvLoraError as refusal:
            return {"heads_by_example": None, "example_refused": str(refusal)}
    return {"heads_by_example": list(plan.modules_to_save)}
