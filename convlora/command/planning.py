"""``convlora plan``: shows what an injection would do."""

from __future__ import annotations

from typing import Any

from .._model.planner import plan as make_plan
from .._plan import Plan
from .answers import Answer
from .models import build
from .options import Adapting, Building


def plan(model: str, building: Building, adapting: Adapting) -> Answer:
    """Return the plan, as the library prints it."""
    planned = make_plan(build(model, building).model, **adapting.arguments())
    return Answer(plan_data(planned), [str(planned)])


def plan_data(planned: Plan) -> dict[str, Any]:
    """Return the plan and its totals as JSON data."""
    totals = {
        "adapter_parameters": planned.adapter_parameters,
        "trainable_parameters": planned.trainable_parameters,
        "trainable_share": planned.trainable_share,
    }
    return planned.to_json() | totals
