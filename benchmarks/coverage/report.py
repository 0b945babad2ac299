"""docs/coverage.md from the rows of results: every figure on the page is counted here."""

from __future__ import annotations

import contextlib
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import torchvision_cases
from .outcomes import merge_error, outcome

Row = dict[str, Any]
PACKAGES = ("torch", "torchvision", "timm", "peft", "transformers", "segmentation-models-pytorch")
FURTHER = (
    *("ultralytics", "monai", "dynamic-network-architectures", "diffusers", "open_clip_torch", "pytorchcv", "spandrel"),
    *("kornia", "facenet-pytorch", "torchxrayvision"),
)
"""Named with their versions where they are installed."""

INTRO = """# How wide it works

<!-- Written from rows of `python -m benchmarks.coverage`; change benchmarks/coverage/ and run it again. -->

{result}

{table}

*exact*: every step of the [list below](#what-passing-means) is as it should be, most of them bit for bit. *peft works*:
Hugging Face peft, given every convolution, or all but grouped and transposed ones, comes through with rounding allowed.

## How it is measured

Two sweeps, made by `python -m benchmarks.coverage all --jobs 2`. Everything is on the CPU in float32 with random
weights; nothing is downloaded. **Plan width**: every architecture name of timm and torchvision is built without numbers
and planned; each convolution and each parameter must be accounted for. **Numeric width**: the smallest network of each
kind goes the whole way with rank 8, and beside it Hugging Face peft with the same layers, rank and scaling. Two kinds
are cut to fit the machine: deepseek_vit_412m to two blocks, R-CNNs to 50 proposals. The networks of further libraries
(`pip install -e ".[coverage]"`) are built small, one block of each kind. The *head* that is chosen by default is
compared with a table that was written by hand from the networks' source before any was injected
(`benchmarks/coverage/heads.py`). tiatoolbox is left out: it asks for older releases of torch and timm, and for a
notebook server.

{environment}.
"""

STEPS = """## What passing means

1. *identity*: with a fresh adapter the output is that of the plain network bit for bit, in eval mode, and in train mode
   with the same seed. The plain network is frozen alike, and the same norms are held in eval behaviour, for peft too.
2. *gradient*: factors get random values; one step in train mode. Every factor has a finite gradient, not zero where the
   plain network's own weight has one that is not. For convlora the output and the gradients are also compared
   with those of the plain network holding W + ΔW: within {oracle:g} in float32, or else within {double:g} in float64.
3. *reload*: saved, and loaded into a fresh base, it gives the same bits.
4. *merge*: max |merged − unmerged| / max |unmerged| of the whole network's output is at most {merge:g}.
5. *unmerge*: every tensor as before the merge, bit for bit.
6. *remove* (convlora): keys, classes, objects, attributes, hooks, modes, flags and bits as before injection.

peft *passes* by the same criteria (without remove); it *works* where merge may be off by up to {wrong:g} and unmerge by
rounding. It refuses transposed convolutions, and those whose groups do not divide the rank; *without grouped,
transposed* it is given only the others, so that the rest of the way can be seen. A merge that is off by more than
{wrong:g} is called silently wrong.
"""


def environment(jobs: int) -> Row:
    """Versions and kind of machine."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
        "jobs": jobs,
        "packages": {name: version(name) for name in PACKAGES} | _further_versions(),
    }


def _further_versions() -> dict[str, str]:
    found = {}
    for name in FURTHER:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    from .checks import DOUBLE_TOLERANCE, MERGE_TOLERANCE, ORACLE_TOLERANCE
    from .outcomes import WRONG

    found = list(rows)
    planned, numeric = ([row for row in found if row["kind"] == kind] for kind in ("plan", "numeric"))
    steps = STEPS.format(oracle=ORACLE_TOLERANCE, double=DOUBLE_TOLERANCE, merge=MERGE_TOLERANCE, wrong=WRONG)
    parts = [
        INTRO.format(environment=_environment(found), result=_result(numeric), table=_by_library(numeric)),
        _summary(planned, numeric),
        steps,
        _plan_width(planned),
        _peft_failures(numeric),
        *(_family(name, members) for name, members in _families(numeric).items()),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _result(numeric: list[Row]) -> str:
    exact, _, works, plain = _passes(numeric)
    heads = [row for row in numeric if row.get("named") is not None]
    found = sum(_is_as_named(row) for row in heads)
    return (
        f"Of {len(numeric)} networks, {exact} go the whole way **exactly**: inject, train, save, load, merge, unmerge, "
        f"remove. peft works on {works} of them with every convolution, on {plain} without grouped, transposed ones. "
        f"Of {len(heads)} networks whose head was named by hand, the same is found in {found}."
    )


def _by_library(numeric: list[Row]) -> str:
    libraries: dict[str, list[Row]] = {}
    for name, members in _families(numeric).items():
        libraries.setdefault(name.split(",")[0].split(" ")[0] if name != "by hand" else name, []).extend(members)
    lines = []
    for name, rows in libraries.items():
        exact, _, works, plain = _passes(rows)
        heads = [row for row in rows if row.get("named") is not None]
        found = f"{sum(map(_is_as_named, heads))} of {len(heads)}" if heads else "–"
        lines.append((name, len(rows), exact, found, works, plain))
    head = ("library", "networks", "exact", "head as named", "peft works", "without grouped, transposed")
    return _table(head, lines).rstrip()


def _is_as_named(row: Row) -> bool:
    return set(row.get("heads") or ()) == set(row["named"])


def _environment(rows: list[Row]) -> str:
    last = next((row for row in reversed(rows) if row["kind"] == "environment"), environment(1))
    packages = ", ".join(f"{name} {number}" for name, number in last["packages"].items())
    machine = f"{last['machine']}, one thread a process, {last['jobs']} at a time"
    return f"Python {last['python']}, {packages}; {machine}.{_time(rows)}"


def _time(rows: list[Row]) -> str:
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    most = max((row.get("peak_mib", 0) for row in rows), default=0)
    return f" Together {seconds / 60:.0f} minutes of these processes, the largest of {most / 1024:.1f} GiB"


def _summary(planned: list[Row], numeric: list[Row]) -> str:
    lines: list[tuple[object, ...]] = []
    for library in ("timm", "torchvision"):
        mine = [row for row in planned if row["name"].startswith(f"{library}/")]
        lines.append((f"plan: every {library} name", len(mine), sum(map(_is_planned, mine)), "–", "–", "–"))
    for name, members in _families(numeric).items():
        lines.append((f"numeric: {name}", len(members), *_passes(members)))
    lines.append(("**numeric: all**", len(numeric), *_passes(numeric)))
    errors = [error for row in numeric if (error := merge_error(row.get("convlora", {}))) is not None]
    worst = f"Worst merge error of convlora over the sweep: {max(errors):.1e}, {_zeros(errors)}" if errors else ""
    head = ("sweep", "networks", "convlora passes", "peft passes", "peft works", "without grouped, transposed")
    return f"## Every sweep\n\n{_table(head, lines)}\n{worst}{_unready(numeric)}\n"


def _zeros(errors: list[float]) -> str:
    return f"exactly 0 in {sum(error == 0 for error in errors)} of {len(errors)} merged networks.\n"


def _unready(numeric: list[Row]) -> str:
    failed = [f"{row['name']}: {row['error']}" for row in numeric if "error" in row]
    listed = "".join(f"\n- {_cell(text, 160)}" for text in failed)
    return f"\nNot run (the plain network, or a limit):\n{listed}\n" if failed else ""


def _is_planned(row: Row) -> bool:
    return "error" not in row and not row["problems"]


def _passes(rows: list[Row]) -> tuple[int, int, int, int]:
    ran = [row for row in rows if "error" not in row]
    ours, theirs = ([outcome(row[library]) for row in ran] for library in ("convlora", "peft"))
    ungrouped = [outcome(_ungrouped(row)) for row in ran]
    return (
        sum(o.strict for o in ours),
        sum(o.strict for o in theirs),
        sum(o.works for o in theirs),
        sum(o.works for o in ungrouped),
    )


def _ungrouped(row: Row) -> Row:
    """peft's steps without the grouped layers, where there were any."""
    steps: Row = row["peft_plain"] if "peft_plain" in row else row["peft"]
    return steps


def _families(numeric: list[Row]) -> dict[str, list[Row]]:
    """timm, torchvision by kind, transformers, smp, by hand; in the order of the sweep."""
    found: dict[str, list[Row]] = {}
    for row in numeric:
        family, name = row["name"].split("/", 1)
        title = f"torchvision {torchvision_cases.kind_of(name)}" if family == "torchvision" else family
        long = {"smp": "segmentation-models-pytorch", "handmade": "by hand", "timm": "timm, one of each model module"}
        found.setdefault(long.get(title, title), []).append(row)
    return found


def _peft_failures(numeric: list[Row]) -> str:
    """How often each outcome comes, for each library."""
    ran = [row for row in numeric if "error" not in row]
    libraries: dict[str, Callable[[Row], Row]] = {
        "convlora": lambda row: row["convlora"],
        "peft": lambda row: row["peft"],
        "peft without grouped, transposed": _ungrouped,
    }
    counts = {name: Counter(outcome(steps(row)).label for row in ran) for name, steps in libraries.items()}
    labels = sorted({label for c in counts.values() for label in c}, key=lambda label: -counts["peft"][label])
    lines = [(label, *(counts[name][label] for name in libraries)) for label in labels]
    within = [[merge_error(steps(row)) for row in ran] for steps in libraries.values()]
    lines.append(("*merge within 1e-05*", *(sum(e is not None and e <= 1e-5 for e in errors) for errors in within)))
    return f"## Outcomes\n\n{_table(('outcome', *libraries), lines)}\n## Network by network\n"


def _plan_width(planned: list[Row]) -> str:
    parts = ["## Plan width\n", _plan_table(planned)]
    for library in ("timm", "torchvision"):
        mine = [row for row in planned if row["name"].startswith(f"{library}/") and "error" not in row]
        reasons = sum((Counter(row.get("skipped", {})) for row in mine), Counter[str]())
        if reasons:
            parts.append(f"Skipped in {library}: " + "; ".join(f"{n:,} × {why}" for why, n in reasons.items()) + ".\n")
        none = [row["name"].split("/")[1] for row in mine if row["targets"] != "Conv2d" and row["convolutions"]]
        if none:
            parts.append(f"Without any Conv2d, planned with their other convolutions: {_names(none)}.\n")
        bare = [row["name"].split("/")[1] for row in mine if not row["convolutions"]]
        if bare:
            parts.append(f"Without any convolution, refused with the clear error: {_names(bare)}.\n")
    wrong = [(row["name"], row.get("error") or "; ".join(row["problems"])) for row in planned if not _is_planned(row)]
    if wrong:
        parts.append("Not fully planned:\n\n" + "".join(f"- {name}: {_cell(why, 200)}\n" for name, why in wrong))
    return "\n".join(parts)


def _plan_table(planned: list[Row]) -> str:
    lines = []
    for library in ("timm", "torchvision"):
        mine = [row for row in planned if row["name"].startswith(f"{library}/")]
        built = [row for row in mine if "error" not in row]
        lines.append(
            (
                library,
                len(mine),
                sum(map(_is_planned, mine)),
                sum(not row["convolutions"] for row in built),
                *(f"{sum(row.get(key, 0) for row in built):,}" for key in ("convolutions", "adapted", "capped")),
                f"{sum(sum(row.get('skipped', {}).values()) for row in built):,}",
                sum(row["means"] != "meta device" for row in built),
            )
        )
    head = "library;names;planned;without convolution;conv layers;adapted;with lowered rank;skipped"
    more = "built with only parameters on meta"
    return _table(tuple(f"{head};{more}".split(";")), lines)


def _family(name: str, rows: list[Row]) -> str:
    heads = any(row.get("named") is not None for row in rows)
    head = ("network", "input", "adapted", "skipped", "convlora", *(["head"] if heads else []), "peft", "why")
    lines = [_network(row, heads) for row in rows]
    title = f"{name[0].upper()}{name[1:]}: {len(rows)} networks"
    return f'<details markdown="1"><summary>{title}</summary>\n\n{_table(head, lines)}\n</details>\n'


def _network(row: Row, heads: bool) -> tuple[object, ...]:
    name = row["name"].split("/", 1)[1]
    if "error" in row:
        return name, "–", "–", "–", "not run", *(["–"] if heads else []), "not run", _cell(row["error"], 90)
    ours, theirs = outcome(row["convlora"]), outcome(row["peft"])
    mine = ours.label if ours.strict else f"**{ours.label}**: {_cell(ours.reason, 120)}"
    left = "–" if row["skipped"] is None else row["skipped"]
    chosen = [_head(row)] if heads else []
    return name, row["input"], row["adapted"], left, mine, *chosen, theirs.label, _peft_reason(row, theirs.reason)


def _head(row: Row) -> str:
    """The head that was chosen, shortened, and the one that the table names where that is another."""
    found = _layers(row.get("heads") or [])
    return found if _is_as_named(row) else f"**{found}**, by hand: {_layers(row['named'])}"


def _layers(names: list[str]) -> str:
    """One name, or the first and how many more."""
    if not names:
        return "none"
    return f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _peft_reason(row: Row, reason: str) -> str:
    found = re.search(r"groups=(\d+) and rank \d+", reason)
    short = f"groups={found[1]} do not divide the rank" if found else _cell(reason, 90)
    if "peft_plain" in row:
        without = outcome(row["peft_plain"])
        note = f": {_cell(without.reason, 60)}" if not without.works else ""
        short += f"; without grouped, transposed: {without.label}{note}"
    return short


def _names(names: list[str]) -> str:
    return ", ".join(names)


def _cell(text: str, length: int) -> str:
    """A reason on one line of a table, without paths and object addresses."""
    plain = re.sub(r"(/[\w.-]+){2,}/", "…/", re.sub(r" at 0x[0-9a-f]+", "", text)).replace("|", "\\|")
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def _table(head: tuple[str, ...], lines: Iterable[tuple[object, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
