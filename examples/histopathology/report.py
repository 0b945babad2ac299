"""What a run leaves behind: the table, curves, ``submission.csv``, ``results.json`` and one HTML page.

The same rows feed the terminal, ``table.md`` and ``report.html``. Accuracies are shares in [0, 1]; over several
seeds a cell reads mean ± standard deviation.
"""

import csv
import dataclasses
import io
import json
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from torch import Tensor

import convlora

from .comparison import differences
from .data import HistoDataset
from .experiment import Result
from .files import write_text
from .training import Epoch, pick_device

HEADER = ("method", "test acc.", "val acc.", "val loss", "trainable", "share", "adapter", "s/epoch")
# Okabe and Ito's colours, told apart by colour-blind readers; the dashes tell them apart in grey.
_COLOURS = ("#0072b2", "#d55e00", "#666666", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "h5py")


@dataclass(frozen=True)
class SplitFacts:
    """Size, share of label 1 (None without labels) and patches per centre of one split."""

    name: str
    patches: int
    positives: float | None
    centres: dict[int, int]


@dataclass(frozen=True)
class Report:
    """All that the outputs show. ``caveat`` is empty for the challenge's own data."""

    results: Sequence[Result]
    splits: Sequence[SplitFacts]
    arguments: Mapping[str, Any]
    caveat: str = ""
    labels: Tensor | None = None
    """Of the test set, for paired differences."""
    remarks: Sequence[str] = ()
    """Further footnotes."""
    environment: Mapping[str, Any] = field(default_factory=lambda: describe_environment())

    @property
    def best(self) -> Result:
        """The result with the lowest validation loss; the test set has no say in it."""
        return min(self.results, key=lambda result: result.best.val_loss)

    def rows(self) -> list[list[str]]:
        """One row of cells for each method, under `HEADER`."""
        return [_row(results) for results in self._by_method().values()]

    def notes(self) -> list[str]:
        """The table's footnotes."""
        return [
            "Every method saw the same patches in the same order, for the same seed.",
            *(
                [
                    "Transductive: unlabelled test images, together, decide about each of them; such a row does not "
                    "compare with one that sees one image at a time."
                ]
                if any(result.transductive for result in self.results)
                else []
            ),
            "Trainable: factors and head; share: of all parameters of the adapted model; adapter: "
            "adapter_model.safetensors. Seconds per epoch: the training pass, median over epochs.",
            "±: standard deviation over seeds." if len({r.seed for r in self.results}) > 1 else "One seed.",
            *([] if self.best.test_accuracy is None else [_sampling_error(len(self.best.test_logits))]),
            *self._paired_notes(),
            *self.remarks,
            *_proof_notes(self.results),
        ]

    def _by_method(self) -> dict[str, list[Result]]:
        names = dict.fromkeys(result.method for result in self.results)
        return {name: [r for r in self.results if r.method == name] for name in names}

    def abouts(self) -> list[tuple[str, str]]:
        """Each method's name and description."""
        return [(name, results[0].about) for name, results in self._by_method().items()]

    def _paired_notes(self) -> list[str]:
        found = differences(self.results, self.labels)
        explained = (
            "Differences are paired by seed and patch; in brackets the 95 % interval over patches (percentile "
            "bootstrap), which says nothing of other seeds and is too narrow where patches resemble each other."
        )
        return [*([explained] if found else []), *map(str, found)]


def describe_split(name: str, split: HistoDataset) -> SplitFacts:
    """Count a split's labels and centres."""
    centres, counts = torch.unique(split.centres, return_counts=True)
    positives = None if split.labels is None else float(split.labels.float().mean())
    return SplitFacts(name, len(split), positives, dict(zip(centres.tolist(), counts.tolist(), strict=True)))


def describe_environment() -> dict[str, str]:
    """Device, threads and versions; nothing that names the machine or its user."""
    device = pick_device()
    named = torch.cuda.get_device_name() if device.type == "cuda" else f"{device} ({platform.machine()})"
    versions = {"convlora": convlora.__version__} | {name: version(name) for name in _PACKAGES}
    return {
        "device": named,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
    }


def write_report(report: Report, out: Path, submission: str) -> None:
    """Write ``table.md``, ``results.json``, ``submission.csv`` and ``report.html`` into ``out``."""
    write_text(out / "submission.csv", submission)
    write_text(out / "table.md", markdown(report))
    write_text(out / "results.json", json.dumps(as_data(report), indent=2, default=str) + "\n")
    write_text(out / "report.html", html(report))


def rich_table(report: Report) -> Table:
    """The table for the terminal, a column for each method, so that it fits 80 characters also with spreads."""
    table = Table(title="Validation and test accuracy by method", caption=report.caveat or None, box=box.SIMPLE)
    names, *figures = zip(HEADER, *report.rows(), strict=True)
    for name in names:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for row in figures:
        table.add_row(*row)
    return table


def markdown(report: Report) -> str:
    """The table with its caveat and footnotes, as ``table.md``."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows()]
    caveat = [f"**{report.caveat}**", ""] if report.caveat else []
    notes = [f"- {note}" for note in (*(f"{name}: {about}." for name, about in report.abouts()), *report.notes())]
    return "\n".join([*caveat, *lines, "", *notes, ""])


def as_data(report: Report) -> dict[str, Any]:
    """Everything measured, for ``results.json``: the same figures unrounded, with every epoch."""
    return {
        "caveat": report.caveat,
        "environment": dict(report.environment),
        "arguments": dict(report.arguments),
        "splits": [dataclasses.asdict(split) for split in report.splits],
        "differences": [dataclasses.asdict(each) for each in differences(report.results, report.labels)],
        "best": {"method": report.best.method, "seed": report.best.seed},
        "results": [_result_data(result) for result in report.results],
    }


def html(report: Report) -> str:
    """One page without any outside request: style and curves are inside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("report.html.j2")
    return template.render(report=report, header=HEADER, curves=curves(report.results))


def submission_csv(ids: Sequence[int], logits: Tensor) -> str:
    """``ID,Pred`` lines with 0 or 1 as the prediction, by ascending integer ID."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("ID", "Pred"))
    writer.writerows(sorted((int(i), int(logit > 0)) for i, logit in zip(ids, logits, strict=True)))
    return text.getvalue()


def curves(results: Sequence[Result]) -> dict[str, Markup]:
    """Loss and accuracy over the epochs, each an ``<svg>`` element to put into a page."""
    drawn = {
        "Validation loss": _curve(results, "validation loss", lambda epoch: epoch.val_loss),
        "Validation accuracy": _curve(results, "validation accuracy", lambda epoch: epoch.val_accuracy),
    }
    if len({result.method for result in results}) > 2 and all(r.test_accuracy is not None for r in results):
        drawn["Test accuracy against trainable share"] = frontier(results)
    return drawn


def frontier(results: Sequence[Result]) -> Markup:
    """Mean test accuracy against the share of parameters that train, with the line of what nothing beats on both.

    Transductive methods are hollow, and have no part in the line.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="trainable share", ylabel="test accuracy", xscale="log")
    points = []
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        share, height = own[0].share, statistics.mean(r.test_accuracy or 0.0 for r in own)
        hollow = own[0].transductive
        axes.plot(share, height, "o", color=_COLOURS[0], fillstyle="none" if hollow else "full", ms=4)
        axes.annotate(name, (share, height), xytext=(3, 3), textcoords="offset points", fontsize=6)
        if not hollow:
            points.append((share, height))
    line = pareto(points)
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color="#666666", lw=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, "frontier")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other beats on both, by cost."""
    line: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not line or gain > line[-1][1]:
            line.append((cost, gain))
    return line


def _curve(results: Sequence[Result], label: str, value: Callable[[Epoch], float]) -> Markup:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=label)
    named: set[str] = set()
    order = list(dict.fromkeys(result.method for result in results))
    for result in results:
        epochs = range(1, len(result.history) + 1)
        number = order.index(result.method)
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
        legend = None if result.method in named else result.method
        named.add(result.method)
        marks = [result.best_epoch]  # the epoch whose model was kept
        heights = [value(epoch) for epoch in result.history]
        axes.plot(epochs, heights, color=colour, ls=dash, marker="o", markevery=marks, label=legend)
    axes.set_xlim(0.5, max(len(result.history) for result in results) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _svg(figure, label)


def _svg(figure: Figure, salt: str) -> Markup:
    """The figure as an ``<svg>`` element: without prolog, date or metadata; ids made from ``salt``."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def _row(results: Sequence[Result]) -> list[str]:
    first = results[0]
    return [
        f"{first.method} (transductive)" if first.transductive else first.method,
        _cell([r.test_accuracy for r in results]),
        _cell([r.val_accuracy for r in results]),
        _cell([r.best.val_loss for r in results]),
        f"{first.trainable:,}",
        f"{first.share:.2%}",
        f"{first.adapter_bytes / 1e6:.2f} MB",
        _cell([r.seconds_per_epoch for r in results], digits=1),
    ]


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "no labels"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def _sampling_error(patches: int) -> str:
    """How far chance alone moves an accuracy measured on this many patches."""
    return f"One standard error of an accuracy of 0.9 on {patches:,} test patches is {math.sqrt(0.09 / patches):.3f}."


def _proof_notes(results: Sequence[Result]) -> list[str]:
    """One sentence where every proof held; each proof that failed by name where not."""
    failed = [f"FAILED, {r.method} seed {r.seed}: {r.proofs}." for r in results if not r.proofs.held]
    largest = max(r.proofs.merge_difference for r in results)
    held = (
        "Every saved adapter, loaded on a fresh base, gave bit-equal logits to the trained model in memory on all "
        f"{results[0].proofs.patches:,} test patches, and merged the same labels; largest logit difference "
        f"by merging: {largest:.1g}."
    )
    return failed or [held]


def _result_data(result: Result) -> dict[str, Any]:
    kept = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "test_logits"}
    kept["history"] = [dataclasses.asdict(epoch) for epoch in result.history]
    kept["proofs"] = dataclasses.asdict(result.proofs)
    kept["adapter"] = result.adapter.name
    return kept | {
        "share": result.share,
        "val_loss": result.best.val_loss,
        "seconds_per_epoch": result.seconds_per_epoch,
    }
