"""The model card of a saved adapter: README.md, in the format of the Hugging Face Hub.

The YAML between two lines of ``---`` is for the hub (https://huggingface.co/docs/hub/model-cards), the rest for people.
The same adapter gives the same text. The last line is a comment with a digest of the text above it. If the digest
matches, the card is unedited and a save may replace it; an edited or foreign card is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .._model.targets import dotted
from .._plan import Plan
from .._version import __version__
from ..errors import TargetError
from .digests import fingerprint
from .markdown import cell, code, count, joined, quoted, shown, sizes, table, yaml_number
from .peft_format import factor_shapes

CARD = "README.md"
_SEAL = "<!-- convlora card {}: written anew with the adapter; once edited, it is left alone -->"
_SEALED = re.compile(r"(.*\n)" + re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{16})") + r"\s*", re.DOTALL)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class About:
    """The parts of a model card that the user gives."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    base_model: str | None = None
    """The base's name on the Hugging Face Hub."""
    source: str = "path/to/this/directory"
    """The argument of ``load_adapter`` in the card's example."""


def checked_about(metrics: Mapping[str, object] | None, base_model: str | None) -> About:
    """Return metrics and base model for the card, after checking them.

    Raises:
        TargetError: a metric's name or value is invalid, or ``base_model`` is not a name on the hub.
    """
    numbers = {name: _number(name, value) for name, value in (metrics or {}).items()}
    if base_model is not None and not (isinstance(base_model, str) and _HUB_NAME.fullmatch(base_model)):
        raise TargetError(
            f"base_model={base_model!r}; it must be a name on the Hugging Face Hub, such as "
            "'timm/resnet50.a1_in1k'. Nothing was written."
        )
    return About(numbers, base_model)


def _number(name: object, value: object) -> float:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise TargetError(f"metrics: {name!r} is not a name; use one such as 'accuracy'. Nothing was written.")
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise TargetError(f"metrics[{name!r}]={value!r}; a metric is one finite number. Nothing was written.")
    return number


def is_replaceable(file: Path) -> bool:
    """Return whether a card may be written to this path: no file exists, or it is an unedited card of convlora."""
    try:
        if file.exists() and not file.is_file():  # reading a pipe would block
            return False
        sealed = _SEALED.fullmatch(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, UnicodeDecodeError):
        return False
    return sealed is not None and _digest(sealed[1]) == sealed[2]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def card(plan: Plan, base: Mapping[str, str], tensors: Mapping[str, Tensor], about: About) -> str:
    """Return the text of README.md.

    Args:
        plan: the adapter's plan.
        base: the digest of every tensor of the base, by state-dict key.
        tensors: every tensor of the adapter, by its key in the file without peft's prefix.
        about: metrics, base model and source.
    """
    body = "\n".join(
        [
            *_front_matter(plan, about),
            *_introduction(plan),
            *_use(base, about),
            *_metrics(about),
            *_layers(plan),
            *_besides(plan, tensors),
            "",
        ]
    )
    return f"{body}{_SEAL.format(_digest(body))}\n"


def _front_matter(plan: Plan, about: About) -> list[str]:
    lines = ["---", "library_name: convlora", "tags:", "- convlora", "- lora"]
    if about.base_model is not None:
        lines += [f"base_model: {quoted(about.base_model)}", "base_model_relation: adapter"]
    if about.metrics:
        # The hub requires a task and a data set for each result; "other" and "unknown" say that they are not given.
        lines += ["model-index:", f"- name: {quoted(_name(plan))}", "  results:"]
        lines += ["  - task:", "      type: other", "    dataset:", "      type: unknown", "      name: unknown"]
        lines += ["    metrics:"]
        for name, value in about.metrics.items():
            lines += [f"    - type: {quoted(name)}", f"      value: {yaml_number(value)}"]
    return [*lines, "---", ""]


def _introduction(plan: Plan) -> list[str]:
    what = [f"low-rank factors for {count(len(plan.layers), 'layer')}"] if plan.layers else []
    what += [f"{_names(plan.modules_to_save)} in full"] if plan.modules_to_save else []
    what += [f"the biases of {count(len(plan.biases), 'module')}"] if plan.biases else []
    what += ["the norm layers' statistics, scales and shifts"] if plan.norm == "track" and plan.norms else []
    return [
        f"# {cell(_name(plan))}",
        "",
        f"What a fine-tuning of a {code(plan.model)} changed, without the {code(plan.model)} itself: {joined(what)}.",
        f"Written with convlora {__version__} and torch {torch.__version__}.",
        "",
    ]


def _use(base: Mapping[str, str], about: About) -> list[str]:
    known = "" if about.base_model is None else f", {about.base_model}"
    return [
        "## Use",
        "",
        "```python",
        "import convlora",
        f"model = ...  # the base as it was built for training{known}: same architecture, weights and head",
        f"convlora.load_adapter(model, {json.dumps(about.source)})",
        "```",
        "",
        "It then predicts bit for bit as when it was saved. Loading first checks, tensor by tensor, that the base is",
        "the one that this was trained on, and names what differs.",
        "",
        f"Fingerprint of the base: {code(fingerprint(base))}, over {count(len(base), 'tensor')}.",
        "",
    ]


def _metrics(about: About) -> list[str]:
    if not about.metrics:
        return []
    rows = [(cell(name), f"{value:g}") for name, value in about.metrics.items()]
    return ["## Metrics", "", *table(("metric", "value"), rows, "lr"), ""]


def _layers(plan: Plan) -> list[str]:
    """Return the layers' formula, and the plan as ``print(convlora.summary(model))`` shows it."""
    scaling = "alpha / √rank (rsLoRA)" if plan.use_rslora else "alpha / rank"
    lines = ["## Layers", "", f"Each computes with {_formula(plan, scaling)}; the sizes are in parameters.", ""]
    listed = [f"    {line}" for line in str(replace(plan, state="saved")).splitlines()]
    return [*(lines if plan.layers else ["## Plan", ""]), *listed, ""]


def _formula(plan: Plan, scaling: str) -> str:
    """Return the formula of the layers' new weight W'."""
    formulas = dict.fromkeys(layer.change.formula for layer in plan.layers)
    began = f"as they began ({plan.init})"
    changed = " or ".join(formulas).replace("scaling", scaling).replace("as they began", began)
    return f"m · W' / ‖W'‖ for each output channel (DoRA), W' = {changed}" if plan.use_dora else changed


def _besides(plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    factors = {key for layer in plan.layers for key in factor_shapes(layer)}
    rest = [key for key in tensors if key not in factors]
    in_full = {name: [key for key in rest if key.startswith(_within(name))] for name in plan.modules_to_save}
    lines = ["## Besides the factors", ""]
    for name, keys in in_full.items():
        parts = [f"{code(key.removeprefix(_within(name)))} {sizes(tensors[key].shape) or 'scalar'}" for key in keys]
        lines.append(f"- Trained in full: {code(name or 'the model itself')} ({shown(parts)}).")
    lines += [f"- Biases trained with their layers: {_names(plan.biases)}."] if plan.biases else []
    moves = "statistics, scales and shifts moved and belong to the adapter" if plan.norm == "track" else "frozen"
    lines.append(f"- Norm layers with statistics: {len(plan.norms)}, {moves} (`norm={json.dumps(plan.norm)}`).")
    listed = {key for keys in in_full.values() for key in keys} | {dotted(name, "bias") for name in plan.biases}
    norms = tuple(_within(name) for name in plan.norms) if plan.norm == "track" else ()
    buffers = [key for key in rest if key not in listed and not key.startswith(norms)]
    lines += [f"- Buffers that moved: {_names(buffers)}."] if buffers else []
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return [*lines, "", f"All tensors in the file: {size / 1e6:,.2f} MB.", ""]


def _within(name: str) -> str:
    """Return the prefix of the state-dict keys of a module's tensors."""
    return f"{name}." if name else ""


def _name(plan: Plan) -> str:
    name = "" if plan.adapter_name == "default" else f" {plan.adapter_name}"
    return f"LoRA adapter{name} for {plan.model}"


def _names(names: Sequence[str]) -> str:
    return shown([code(name or "the model itself") for name in names])
