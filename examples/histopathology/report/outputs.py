"""The outputs of a run: tables, ``submission.csv``, ``results.json`` and one HTML page.

The terminal, ``table.md`` and ``report.html`` show the same rows. Accuracies are shares in [0, 1]; over several seeds a
cell holds mean ± standard deviation. This module computes `scores`, which `charts` draws; `exhibits` adds single
patches, and `costs` the costs.
"""

import csv
import dataclasses
import io
import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
from accelerate import Accelerator
from markupsafe import Markup
from rich import box
from rich.table import Table
from torch import Tensor

import convlora

from ..data.dataset import HistoDataset
from ..data.rows import NO_CENTRE, Rows
from ..files import write_text
from ..runs.clinical import OperatingPoint, numbered, operating_point
from ..runs.comparison import Difference, Truth, differences
from ..runs.configuration import NAME as CONFIGURATION
from ..runs.experiment import Result
from ..runs.scores import BINS, Confusion, auc, brier, confusion, confusion_by_centre, ece, reliability
from ..training.recipe import pick_device
from ..training.trackers import TrackedRun
from . import charts, costs
from .costs import Cost
from .exhibits import Exhibits
from .published import HEADER as PUBLISHED
from .published import UNITS, Published, publish, published_notes

HEADER = ("method", "test acc.", "val acc.", "val loss", "trainable", "share", "adapter", "s/epoch")
SCORES = ("method", "split", "AUC", "ECE", "Brier", "sensitivity", "specificity")
CENTRES = ("method", "split", "centre", "patches", "accuracy", "TP", "FN", "FP", "TN")
_NAMES = {"test": "test", "val": "validation"}
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "h5py")


@dataclass(frozen=True)
class SplitFacts:
    """One split's size, share of label 1 (None without labels) and patches per centre."""

    name: str
    patches: int
    positives: float | None
    centres: dict[int, int]


def truths(splits: Mapping[str, HistoDataset]) -> dict[str, Truth]:
    """The truth of the test and validation splits that have labels."""
    found = ((name, splits[name]) for name in ("test", "val") if name in splits)
    return {
        name: Truth(split.labels, split.centres, *_units(split.rows))
        for name, split in found
        if split.labels is not None
    }


def track_results(accelerator: Accelerator, config: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Log all results as one more run in the experiment trackers."""
    run = TrackedRun(accelerator, "results", config)
    for result in results:
        # MLflow allows no plus sign in a name
        name = f"{result.method.replace('+', '_')}-seed{result.seed}"
        numbers = {"test_accuracy": result.test_accuracy, "val_accuracy": result.val_accuracy}
        run.log(0, {f"{name}/{key}": value for key, value in {**numbers, "val_loss": result.val_loss}.items()})
    run.close()


def _units(rows: Rows) -> tuple[Tensor | None, str]:
    """The largest unit that the data name: patients, else slides, else patches."""
    if rows.patients is not None:
        return numbered(rows.patients), "patient"
    if rows.slides is not None:
        return numbered(rows.slides), "slide"
    return None, "patch"


@dataclass(frozen=True)
class Report:
    """All contents of the outputs. ``caveat`` is empty for the challenge's own data."""

    results: Sequence[Result]
    splits: Sequence[SplitFacts]
    arguments: Mapping[str, Any]
    caveat: str = ""
    remarks: Sequence[str] = ()
    """Further footnotes."""
    truth: Mapping[str, Truth] = field(default_factory=dict)
    """Truth by split, "test" before "val"."""
    exhibits: Exhibits | None = None
    costs: Sequence[Cost] = ()
    warnings: Sequence[str] = ()
    """Sentences on leakage between splits, see `leakage`."""
    configuration: str = ""
    """The run's options as a file, see `configuration`."""
    environment: Mapping[str, Any] = field(default_factory=lambda: describe_environment())

    @property
    def best(self) -> Result:
        """The first result with the lowest validation loss, computed from its own predictions. The test set's labels
        have no influence on it."""
        return min(self.results, key=lambda result: result.val_loss)

    def rows(self) -> list[list[str]]:
        """Cells under `HEADER`, one row for each method."""
        return [_row(results) for results in self.by_method().values()]

    def notes(self) -> list[str]:
        """The table's footnotes."""
        return [
            "With the same seed, every method saw the same patches in the same order.",
            *(
                [
                    "Transductive: the prediction uses the unlabelled test images together; such a row is not "
                    "comparable with methods that see one image at a time."
                ]
                if any(result.transductive for result in self.results)
                else []
            ),
            "Trainable: parameters of factors and head; share: of all parameters of the adapted model; adapter: size "
            "of adapter_model.safetensors. Seconds per epoch: the training pass, median over epochs.",
            "±: standard deviation over seeds." if len({r.seed for r in self.results}) > 1 else "One seed.",
            *self._judged_notes(),
            *self._paired_notes(),
            *self.remarks,
            *_proof_notes(self.results),
        ]

    def by_method(self) -> dict[str, list[Result]]:
        """The results of each method, by its name."""
        names = dict.fromkeys(result.method for result in self.results)
        return {name: [r for r in self.results if r.method == name] for name in names}

    def abouts(self) -> list[tuple[str, str]]:
        """Names and descriptions of the methods."""
        return [(name, results[0].about) for name, results in self.by_method().items()]

    def chosen(self) -> dict[str, Result]:
        """The seed with the lowest validation loss of each method, which charts and confusion tables show."""
        return {name: min(own, key=lambda result: result.val_loss) for name, own in self.by_method().items()}

    def judged(self, result: Result) -> dict[str, tuple[Tensor, Truth]]:
        """A result's logits with the truth of each split that has labels."""
        logits = {name: result.logits(name) for name in self.truth}
        return {name: (logits[name], t) for name, t in self.truth.items() if len(logits[name]) == len(t.labels)}

    def score_rows(self) -> list[list[str]]:
        """Cells under `SCORES`: mean ± standard deviation over seeds."""
        return [
            [_title(own[0]), _NAMES[split], *_scores([self.judged(result)[split] for result in own])]
            for own in self.by_method().values()
            for split in self.truth
            if all(split in self.judged(result) for result in own)
        ]

    def centre_rows(self) -> list[list[str]]:
        """Cells under `CENTRES`, by method, split and centre."""
        return [
            [_title(result), _NAMES[split], "none named" if centre == NO_CENTRE else str(centre), *_counts(each)]
            for result in self.chosen().values()
            for split, (logits, truth) in self.judged(result).items()
            for centre, each in confusion_by_centre(logits, truth.labels, truth.centres).items()
        ]

    @cached_property
    def published(self) -> list[Published]:
        """The numbers to publish of each method's chosen seed: of each split and, if there are several, each centre."""
        return [
            each
            for result in self.chosen().values()
            for point in [self._operating_point(result)]
            for split, (logits, truth) in self.judged(result).items()
            for each in publish(
                _title(result), _NAMES[split], logits, truth.labels, truth.centres, truth.units, truth.unit, point
            )
        ]

    def published_rows(self) -> list[list[str]]:
        """Cells under `PUBLISHED`."""
        return [each.row() for each in self.published]

    def _operating_point(self, result: Result) -> OperatingPoint:
        judged = self.judged(result)
        if "val" not in judged:
            return OperatingPoint(None, None)
        logits, truth = judged["val"]
        return operating_point(logits, truth.labels)

    def differences(self) -> list[Difference]:
        """Paired differences on the test set or, if it has no labels, on validation."""
        return differences(self.results, self.truth)

    def _judged_notes(self) -> list[str]:
        """Notes on the accuracies: their standard error, and on which split they were measured."""
        if self.best.test_accuracy is not None:
            return [_sampling_error(len(self.best.test_logits), "test")]
        return [
            "The test set has no labels: every figure and difference is of validation, which also chose the learning "
            "rate and the epoch. They are therefore optimistic.",
            *([_sampling_error(len(self.truth["val"].labels), "validation")] if "val" in self.truth else []),
        ]

    def _paired_notes(self) -> list[str]:
        found = self.differences()
        if not found:
            return []
        unit = found[0].unit
        drawn = (
            "The data name no patient and no slide, so single patches were resampled: the interval is too narrow where "
            "patches resemble each other."
            if unit == "patch"
            else f"Whole {UNITS[unit]} were resampled, with all of their patches."
        )
        explained = (
            f"Differences are paired by seed and patch; in brackets the 95 % interval over {UNITS[unit]} (percentile "
            f"bootstrap), which says nothing about other seeds. {drawn}"
        )
        return [explained, *map(str, found)]


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
    """Write ``table.md``, ``results.json``, ``submission.csv``, ``report.html`` and ``run.yaml`` into ``out``."""
    write_text(out / "submission.csv", submission)
    write_text(out / "table.md", markdown(report))
    write_text(out / "results.json", json.dumps(as_data(report), indent=2, default=str) + "\n")
    write_text(out / "report.html", html(report))
    if report.configuration:
        write_text(out / CONFIGURATION, report.configuration)


def rich_tables(report: Report) -> list[Table]:
    """Tables for the terminal with a column for each method, four methods a table, to fit 80 characters."""
    rows = report.rows()
    return [_rich_table(rows[start : start + 4]) for start in range(0, len(rows), 4)]


def _rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """A table with a column for each of these methods' rows."""
    table = Table(box=box.SIMPLE)
    names, *figures = zip(HEADER, *rows, strict=True)
    for name in names:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for row in figures:
        table.add_row(*row)
    return table


def markdown(report: Report) -> str:
    """The table with its caveat and footnotes, for ``table.md``."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in report.rows()]
    caveat = [f"**{report.caveat}**", ""] if report.caveat else []
    caveat += [line for warning in report.warnings for line in (f"**Warning: {warning}**", "")]
    notes = [f"- {note}" for note in (*(f"{name}: {about}." for name, about in report.abouts()), *report.notes())]
    return "\n".join([*caveat, *lines, "", *notes, "", *_published_lines(report)])


def _published_lines(report: Report) -> list[str]:
    """The numbers to publish, as a second table."""
    if not report.published:
        return []
    lines = ["| " + " | ".join(PUBLISHED) + " |", "|---" * 4 + "|---:" * (len(PUBLISHED) - 4) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in report.published_rows()]
    return [*lines, "", *(f"- {note}" for note in published_notes(report.published)), ""]


def as_data(report: Report) -> dict[str, Any]:
    """All measurements for ``results.json``: the figures unrounded, with every epoch."""
    return {
        "caveat": report.caveat,
        "warnings": list(report.warnings),
        "environment": dict(report.environment),
        "arguments": dict(report.arguments),
        "configuration": report.configuration,
        "splits": [dataclasses.asdict(split) for split in report.splits],
        "differences": [dataclasses.asdict(each) for each in report.differences()],
        "best": {"method": report.best.method, "seed": report.best.seed},
        "scores": [dict(zip(SCORES, row, strict=True)) for row in report.score_rows()],
        "published": [dataclasses.asdict(each) for each in report.published],
        "centres": [dict(zip(CENTRES, row, strict=True)) for row in report.centre_rows()],
        "costs": [dataclasses.asdict(cost) for cost in report.costs],
        "results": [_result_data(result) for result in report.results],
    }


def html(report: Report) -> str:
    """The report as one page without outside requests; style and charts are inside it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        header=HEADER,
        scores_header=SCORES,
        centres_header=CENTRES,
        published_header=PUBLISHED,
        published_notes=published_notes(report.published),
        costs_header=costs.HEADER,
        cost_rows=[cost.row() for cost in report.costs],
        bins=BINS,
        curves=charts.curves(report.results),
        rocs=rocs(report),
        reliabilities=reliabilities(report),
        drawn=drawn(report),
    )


def drawn(report: Report) -> dict[str, Result]:
    """The methods in the charts of predictions: those with the lowest validation losses, as many as fit a chart."""
    by_loss = sorted(report.chosen().items(), key=lambda item: item[1].val_loss)[: charts.DRAWN]
    kept = dict(by_loss)
    return {name: result for name, result in report.chosen().items() if name in kept}


def rocs(report: Report) -> list[Markup]:
    """ROC charts, one for each split that has both labels."""
    found = []
    for split, truth in report.truth.items():
        logits = {
            name: report.judged(result)[split][0]
            for name, result in drawn(report).items()
            if split in report.judged(result)
        }
        if logits and 0 < int(truth.labels.sum()) < len(truth.labels):
            found.append(charts.roc_chart(logits, truth.labels, _NAMES[split]))
    return found


def reliabilities(report: Report) -> list[Markup]:
    """Reliability charts, one for each method, of the test set or, if it has no labels, of validation."""
    found = []
    for name, result in drawn(report).items():
        for split, (logits, truth) in list(report.judged(result).items())[:1]:
            found.append(charts.reliability_chart(reliability(logits, truth.labels), f"{name}, {_NAMES[split]}"))
    return found


def submission_csv(ids: Sequence[int], logits: Tensor) -> str:
    """``ID,Pred`` lines with predictions 0 or 1, by ascending integer ID."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("ID", "Pred"))
    writer.writerows(sorted((int(i), int(logit > 0)) for i, logit in zip(ids, logits, strict=True)))
    return text.getvalue()


def probabilities_csv(split: HistoDataset, logits: Tensor, threshold: float = 0.0, temperature: float = 1.0) -> str:
    """``ID,Name,Probability,Pred`` lines by ascending ID, with the probability of label 1.

    Args:
        split: the patches.
        logits: ``(N,)``.
        threshold: the logit above which a patch is called 1.
        temperature: number by which the logits are divided for the probabilities.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("ID", "Name", "Probability", "Pred"))
    for i in split.ids.argsort().tolist():
        name = split.rows.name(i).removeprefix("img of ")
        probability = float((logits[i].double() / temperature).sigmoid())
        writer.writerow((int(split.ids[i]), name, f"{probability:.6f}", int(logits[i] > threshold)))
    return text.getvalue()


def _title(result: Result) -> str:
    return f"{result.method} (transductive)" if result.transductive else result.method


def _scores(judged: Sequence[tuple[Tensor, Truth]]) -> list[str]:
    """AUC, ECE, Brier score, sensitivity and specificity of one method's seeds."""
    counts = [confusion(logits, truth.labels) for logits, truth in judged]
    values: list[list[float | None]] = [
        [auc(logits, truth.labels) for logits, truth in judged],
        [ece(reliability(logits, truth.labels)) for logits, truth in judged],
        [brier(logits, truth.labels) for logits, truth in judged],
        [each.sensitivity for each in counts],
        [each.specificity for each in counts],
    ]
    return [_cell(each, nothing="one label only") for each in values]


def _counts(each: Confusion) -> list[str]:
    numbers = (each.true_positive, each.false_negative, each.false_positive, each.true_negative)
    return [f"{each.patches:,}", f"{each.accuracy:.3f}", *(f"{number:,}" for number in numbers)]


def _row(results: Sequence[Result]) -> list[str]:
    first = results[0]
    return [
        _title(first),
        _cell([r.test_accuracy for r in results]),
        _cell([r.val_accuracy for r in results]),
        _cell([r.val_loss for r in results]),
        f"{first.trainable:,}",
        f"{first.share:.2%}",
        f"{first.adapter_bytes / 1e6:.2f} MB",
        _cell([r.seconds_per_epoch for r in results], digits=1),
    ]


def _cell(values: Sequence[float | None], digits: int = 3, nothing: str = "no labels") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return nothing
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def _sampling_error(patches: int, split: str) -> str:
    """The standard error of an accuracy measured on this many patches."""
    return (
        f"One standard error of an accuracy of 0.9 on {patches:,} {split} patches is {math.sqrt(0.09 / patches):.3f}."
    )


def _proof_notes(results: Sequence[Result]) -> list[str]:
    """One sentence if every check passed, else one for each check that failed."""
    failed = [f"FAILED, {r.method} seed {r.seed}: {r.proofs}." for r in results if not r.proofs.held]
    largest = max(r.proofs.merge_difference for r in results)
    held = (
        "Every saved adapter, loaded on a fresh base, gave logits bit-equal to those of the trained model on all "
        f"{results[0].proofs.patches:,} test patches, and the same labels when merged; largest logit difference "
        f"after merging: {largest:.1g}."
    )
    return failed or [held]


def _result_data(result: Result) -> dict[str, Any]:
    kept = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if not f.name.endswith("logits")}
    kept["history"] = [dataclasses.asdict(epoch) for epoch in result.history]
    kept["proofs"] = dataclasses.asdict(result.proofs)
    kept["adapter"] = result.adapter.name
    return kept | {
        "share": result.share,
        "seconds_per_epoch": result.seconds_per_epoch,
    }
