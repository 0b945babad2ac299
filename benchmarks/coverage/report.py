"""docs/coverage.md and docs/assets/coverage.csv from the rows of results: every figure on the page is counted here."""

from __future__ import annotations

import contextlib
import csv
import io
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
Line = dict[str, Any]
COLUMNS = (
    *("library", "network", "input", "adapted", "skipped", "convlora", "why", "head", "head by hand"),
    *("peft", "peft works", "peft why", "peft plain", "peft plain works", "peft plain why"),
)
"""Of coverage.csv. "peft plain" is peft without grouped and transposed convolutions."""
PACKAGES = ("torch", "torchvision", "timm", "peft", "transformers", "segmentation-models-pytorch")
FURTHER = (
    *("ultralytics", "monai", "dynamic-network-architectures", "diffusers", "open_clip_torch", "pytorchcv", "spandrel"),
    *("kornia", "facenet-pytorch", "torchxrayvision"),
)
"""Named with their versions where they are installed."""
TITLES = {"smp": "segmentation-models-pytorch", "handmade": "by hand"}

INTRO = """# Tested networks

<!-- Written from rows of `python -m benchmarks.coverage`; change benchmarks/coverage/ and run it again. -->

{result}

{table}
[coverage.csv](assets/coverage.csv) has a row for each network: its input, how many layers were adapted and skipped, the
outcome of each library, and the reason where it does not pass.

{failed}"""

STEPS = """## What passing means

1. *identity*: a fresh adapter changes no bit of the output, in eval mode, and in train mode with the same seed. The
   plain network that it is compared with is frozen alike, and its norm layers are in eval mode too.
2. *gradient*: factors get random values; one step in train mode. Every factor has a finite gradient, which is not zero
   where the plain network's own weight has one that is not zero. For convlora, output and gradients are also compared
   with those of the plain network that holds W + ΔW: within {oracle:g} in float32, or else {double:g} in float64.
3. *reload*: saved, and loaded into a fresh base, it gives the same bits.
4. *merge*: max |merged − unmerged| / max |unmerged| of the whole network's output is at most {merge:g}.
5. *unmerge*: every tensor is as before the merge, bit for bit.
6. *remove* (convlora): keys, classes, objects, attributes, hooks, modes, flags and bits are as before injection.
"""

PEFT = """## Beside peft

Hugging Face peft gets the same layers, rank and scaling. It *works* where it comes through these steps (without remove)
with rounding allowed: a merge may be off by up to {wrong:g}, and unmerge may round. peft refuses transposed layers,
and grouped ones whose groups do not divide the rank. *Without* is without such layers, so that the rest of its
steps can be seen.
"""

MEASURED = """## How it is measured

`python -m benchmarks.coverage all --jobs 2` measures all of this on the CPU in float32 with random weights and
downloads nothing. The *plans* build every architecture name of timm and torchvision without numbers; each convolution
and each parameter must be accounted for. The *networks* are the smallest of each kind, at rank 8. Two kinds are cut to
fit the machine: deepseek_vit_412m to two blocks, R-CNNs to 50 proposals. Networks of further libraries
(`pip install -e ".[coverage]"`) are built small, one block of each kind. tiatoolbox is left out: it asks for older
releases of torch and timm, and for a notebook server. MONAI's HoVerNet is left out, too: it takes more than five
minutes.

{environment}.
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
    """docs/coverage.md."""
    from .checks import DOUBLE_TOLERANCE, MERGE_TOLERANCE, ORACLE_TOLERANCE
    from .outcomes import WRONG

    found = list(rows)
    planned, numeric = ([row for row in found if row["kind"] == kind] for kind in ("plan", "numeric"))
    networks = lines(found)
    parts = [
        INTRO.format(result=_result(networks), table=_by_library(networks), failed=_failed(networks)),
        STEPS.format(oracle=ORACLE_TOLERANCE, double=DOUBLE_TOLERANCE, merge=MERGE_TOLERANCE) + _merge_errors(numeric),
        _heads(networks),
        PEFT.format(wrong=WRONG),
        _beside_peft(networks),
        _plans(planned),
        MEASURED.format(environment=_environment(found)),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def table(rows: Iterable[Row]) -> str:
    """docs/assets/coverage.csv: a line for each network."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines(rows))
    return text.getvalue()


def lines(rows: Iterable[Row]) -> list[Line]:
    """The lines of that table."""
    return [_line(row) for row in rows if row["kind"] == "numeric"]


def _line(row: Row) -> Line:
    library, name = row["name"].split("/", 1)
    title = f"torchvision {torchvision_cases.kind_of(name)}" if library == "torchvision" else library
    found = dict.fromkeys(COLUMNS, "") | {"library": TITLES.get(title, title), "network": name}
    if "error" in row:
        return found | {"convlora": "not run", "peft": "not run", "why": _cell(row["error"], 160)}
    ours, theirs = outcome(row["convlora"]), outcome(row["peft"])
    without = outcome(row["peft_plain"]) if "peft_plain" in row else theirs
    heads = {}
    if row.get("named") is not None:
        heads = {"head": " ".join(row["heads"] or ()), "head by hand": " ".join(row["named"]) or "none"}
    return (
        found
        | {key: row[key] for key in ("input", "adapted", "skipped")}
        | {"convlora": ours.label, "why": _cell(ours.reason, 160)}
        | heads
        | {"peft": theirs.label, "peft works": _yes(theirs.works), "peft why": _cell(theirs.reason, 160)}
        | {"peft plain": without.label, "peft plain works": _yes(without.works)}
        | {"peft plain why": _cell(without.reason, 160)}
    )


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _result(networks: list[Line]) -> str:
    exact = sum(map(_passes, networks))
    works, plain = (sum(line[column] == "yes" for line in networks) for column in ("peft works", "peft plain works"))
    return (
        f"**Of {len(networks)} networks, {exact} pass every step, exactly: inject, train, save, load, merge, unmerge, "
        f"remove.** Hugging Face peft works on {works} of them with every convolution, on {plain} without grouped and "
        "transposed ones."
    )


def _passes(line: Line) -> bool:
    return bool(line["convlora"] == "passes")


def _libraries(networks: list[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in networks:
        found.setdefault(line["library"], []).append(line)
    return found


def _by_library(networks: list[Line]) -> str:
    cells = [
        (
            library,
            len(found),
            sum(map(_passes, found)),
            "; ".join(f"{line['network']}: {line['convlora']}" for line in found if not _passes(line)),
        )
        for library, found in _libraries(networks).items()
    ]
    return _table(("library", "tried", "pass", "what does not"), cells)


def _failed(networks: list[Line]) -> str:
    failed = [line for line in networks if not _passes(line)]
    listed = "".join(
        f"- **{line['library']}/{line['network']}**: {line['convlora']}: {line['why']}\n" for line in failed
    )
    return f"## What does not pass\n\n{listed}" if failed else ""


def _merge_errors(numeric: list[Row]) -> str:
    errors = [error for row in numeric if (error := merge_error(row.get("convlora", {}))) is not None]
    if not errors:
        return ""
    zero = sum(error == 0 for error in errors)
    return f"\nThe merge error is exactly 0 in {zero} of {len(errors)} merged networks, {max(errors):.1e} at worst.\n"


def _heads(networks: list[Line]) -> str:
    named = [line for line in networks if line["head by hand"]]
    others = [line for line in named if not _is_as_named(line)]
    listed = "".join(
        f"- {line['library']}/{line['network']}: {_layers(line['head'])}; by hand {_layers(line['head by hand'])}\n"
        for line in others
    )
    if not named:
        return ""
    return (
        "## The head\n\nThe layers that `inject` trains in full by default are those of a table written by hand "
        f"from the networks' source (`benchmarks/coverage/heads.py`) in {len(named) - len(others)} of {len(named)} "
        f"networks. The others, with what was chosen:\n\n{listed}"
    )


def _is_as_named(line: Line) -> bool:
    return bool(set(line["head"].split()) == set(line["head by hand"].split()) - {"none"})


def _layers(names: str) -> str:
    """One name, or the first and how many more."""
    first, *more = names.split() or ["none"]
    return f"`{first}`" + (f" and {len(more)} more" if more else "") if first != "none" else first


def _beside_peft(networks: list[Line]) -> str:
    works = ("peft works", "peft plain works")
    counted = [
        (library, len(found), *(sum(line[key] == "yes" for line in found) for key in works))
        for library, found in _libraries(networks).items()
    ]
    outcomes = [Counter(line[key] for line in networks) for key in ("convlora", "peft", "peft plain")]
    labels = sorted({label for c in outcomes for label in c if label}, key=lambda label: -outcomes[1][label])
    return (
        f"{_table(('library', 'tried', 'works', 'without grouped, transposed'), counted)}\n"
        "The outcomes, in which a merge or an unmerge that rounds counts as a failure:\n\n"
        + _table(("outcome", "convlora", "peft", "peft without"), [(x, *(c[x] for c in outcomes)) for x in labels])
    )


def _environment(rows: list[Row]) -> str:
    last = next((row for row in reversed(rows) if row["kind"] == "environment"), environment(1))
    packages = ", ".join(f"{name} {number}" for name, number in last["packages"].items())
    machine = f"{last['machine']}, one thread a process, {last['jobs']} at a time"
    return f"Python {last['python']}, {packages}; {machine}.{_time(rows)}"


def _time(rows: list[Row]) -> str:
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    most = max((row.get("peak_mib", 0) for row in rows), default=0)
    return f" Together {seconds / 60:.0f} minutes of these processes, the largest of {most / 1024:.1f} GiB"


def _is_planned(row: Row) -> bool:
    return "error" not in row and not row["problems"]


def _plans(planned: list[Row]) -> str:
    libraries = ("timm", "torchvision")
    by_library = {name: [row for row in planned if row["name"].startswith(f"{name}/")] for name in libraries}
    timm, torchvision = map(_plan_figures, by_library.values())
    cells = [(label, f"{number:,}", f"{torchvision[label]:,}") for label, number in timm.items()]
    parts = ["## Plans of every architecture\n", _table(("", *by_library), cells)]
    for library, rows in by_library.items():
        mine = [row for row in rows if "error" not in row]
        reasons = sum((Counter(row.get("skipped", {})) for row in mine), Counter[str]())
        if reasons:
            parts.append(f"Skipped in {library}: " + "; ".join(f"{n:,} × {why}" for why, n in reasons.items()) + ".\n")
        none = [row["name"].split("/")[1] for row in mine if row["targets"] != "Conv2d" and row["convolutions"]]
        if none:
            parts.append(f"Without any Conv2d, planned with their other convolutions: {', '.join(none)}.\n")
        bare = [row["name"].split("/")[1] for row in mine if not row["convolutions"]]
        if bare:
            parts.append(f"Without any convolution, refused by an error that says so: {', '.join(bare)}.\n")
    wrong = [(row["name"], row.get("error") or "; ".join(row["problems"])) for row in planned if not _is_planned(row)]
    if wrong:
        parts.append("Not fully planned:\n\n" + "".join(f"- {name}: {_cell(why, 200)}\n" for name, why in wrong))
    return "\n".join(parts)


def _plan_figures(rows: list[Row]) -> dict[str, int]:
    built = [row for row in rows if "error" not in row]
    sums: dict[str, Callable[[Row], int]] = {
        "without convolution": lambda row: not row["convolutions"],
        "convolutions": lambda row: row.get("convolutions", 0),
        "adapted": lambda row: row.get("adapted", 0),
        "with lowered rank": lambda row: row.get("capped", 0),
        "skipped": lambda row: sum(row.get("skipped", {}).values()),
        "built with only parameters on meta": lambda row: row["means"] != "meta device",
    }
    figures = {"names": len(rows), "planned": sum(map(_is_planned, rows))}
    return figures | {label: sum(map(count, built)) for label, count in sums.items()}


def _cell(text: str, length: int) -> str:
    """A reason on one line, without paths and object addresses."""
    plain = re.sub(r"(/[\w.-]+){2,}/", "…/", re.sub(r" at 0x[0-9a-f]+", "", text)).replace("\n", " ")
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def _table(head: tuple[str, ...], cells: Iterable[tuple[object, ...]]) -> str:
    rows = [head, ("---",) * len(head), *cells]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
