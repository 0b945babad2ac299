"""Every case of the numeric width by name, and one row of results for a case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

import convlora

from . import handmade, smp_cases, timm_cases, torchvision_cases, transformers_cases
from .cases import Case, Subject, prepare
from .checks import check
from .libraries import Convlora, Library, Peft, has_one_group

FAMILIES = (torchvision_cases, transformers_cases, smp_cases, handmade)


def cases(planned: Iterable[dict[str, Any]]) -> dict[str, Case]:
    """All cases by name; timm's are chosen among the rows of the plan width."""
    timm_rows = [row for row in planned if row["name"].startswith("timm/") and "error" not in row]
    found = [timm_cases.case(name) for name in (*timm_cases.smallest(timm_rows), *timm_cases.BESIDES)]
    found += [case for family in FAMILIES for case in family.cases()]
    return {case.name: case for case in found}


def check_case(case: Case, libraries: Iterable[Library] | None = None) -> dict[str, Any]:
    """One row: the network, what was adapted and skipped, and each library's steps."""
    subject = prepare(case)
    model = subject.fresh()
    row: dict[str, Any] = {
        "input": subject.sample.shapes(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **_planned(subject, model),
    }
    grouped = [m for m in model.modules() if isinstance(m, case.kinds) and not has_one_group(m)]
    ungrouped = (
        [Peft(grouped=False)] if 0 < len(grouped) < sum(isinstance(m, case.kinds) for m in model.modules()) else []
    )
    for library in libraries or (Convlora(), Peft(), *ungrouped):
        row[library.name] = {name: asdict(step) for name, step in check(subject, library).items()}
    return row


def _planned(subject: Subject, model: nn.Module) -> dict[str, Any]:
    try:
        plan = convlora.plan(model, target_modules=subject.case.targets)
    except convlora.ConvLoraError:
        return {"adapted": 0, "skipped": None}  # the check's first step says why
    return {"adapted": len(plan.layers), "skipped": len(plan.skipped)}
