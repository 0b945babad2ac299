"""The report's charts, each an ``<svg>`` element for a page, without files, scripts or outside requests."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..runs.experiment import Result
from ..runs.scores import Bin, auc, ece, roc
from ..training.recipe import Epoch

# Okabe and Ito's colours, which colour-blind readers can distinguish; the dashes distinguish them in grey.
_COLOURS = ("#0072b2", "#d55e00", "#666666", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_COUNTED = re.compile(r'<g id="[\w.]+_\d+">')
_DASHES = ("-", "--", ":", "-.")
# A curve of 85,000 patches would take megabytes for corners that nobody sees.
_POINTS = 400
DRAWN = len(_COLOURS)
"""The most methods that a chart can distinguish."""


def curves(results: Sequence[Result]) -> dict[str, Markup]:
    """Charts of loss and accuracy by epoch and, if there are labels, of accuracy against the trainable share."""
    drawn = {
        "Validation loss": _curve(results, "validation loss", lambda epoch: epoch.val_loss),
        "Validation accuracy": _curve(results, "validation accuracy", lambda epoch: epoch.val_accuracy),
    }
    if len({result.method for result in results}) > 2:
        split = "test" if all(result.test_accuracy is not None for result in results) else "validation"
        drawn[f"{split.capitalize()} accuracy against trainable share"] = frontier(results, split)
    return drawn


def frontier(results: Sequence[Result], split: str = "test") -> Markup:
    """Mean accuracy against the trainable share, with its Pareto front.

    Transductive methods are hollow and not part of the front. ``split`` is "test" or "validation".
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="trainable share", ylabel=f"{split} accuracy", xscale="log")
    points = []
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        share, height = own[0].share, statistics.mean(_accuracy(r, split) for r in own)
        hollow = own[0].transductive
        axes.plot(share, height, "o", color=_COLOURS[0], fillstyle="none" if hollow else "full", ms=4)
        axes.annotate(name, (share, height), xytext=(3, 3), textcoords="offset points", fontsize=7)
        if not hollow:
            points.append((share, height))
    line = pareto(points)
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color="#666666", lw=0.8, zorder=0)
    return _svg(figure, axes, "frontier")


def _accuracy(result: Result, split: str) -> float:
    return result.val_accuracy if split == "validation" else result.test_accuracy or 0.0


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other point beats on both, by cost."""
    line: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not line or gain > line[-1][1]:
            line.append((cost, gain))
    return line


def roc_chart(predictions: Mapping[str, Tensor], labels: Tensor, what: str) -> Markup:
    """ROC curves by name; the dot marks the threshold of the predictions, logit 0."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="false positive rate", ylabel="true positive rate", aspect="equal", title=what)
    axes.plot((0, 1), (0, 1), color="#bbbbbb", lw=0.8)
    for number, (name, logits) in enumerate(predictions.items()):
        false, true = roc(logits, labels)
        kept = torch.linspace(0, len(false) - 1, min(len(false), _POINTS)).long()
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
        axes.plot(false[kept], true[kept], color=colour, ls=dash, label=f"{name} ({auc(logits, labels):.3f})")
        called, positive = logits > 0, labels.bool()
        axes.plot(float(called[~positive].float().mean()), float(called[positive].float().mean()), "o", color=colour)
    _legend(figure, len(predictions))
    return _svg(figure, axes, f"roc {what}")


def reliability_chart(bins: Sequence[Bin], title: str) -> Markup:
    """Share of label 1 against the predicted probability, one dot for each bin, its area by the bin's patches."""
    figure = Figure(figsize=(3, 3.1), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted probability", ylabel="share of label 1", aspect="equal")
    axes.set_title(f"{title}\nECE {ece(bins):.3f}", fontsize=9)
    axes.plot((0, 1), (0, 1), color="#bbbbbb", lw=0.8)
    filled = [each for each in bins if each.patches]
    most = max(each.patches for each in filled)
    axes.plot([b.probability for b in filled], [b.share for b in filled], color=_COLOURS[0], lw=1)
    sizes = [8 + 72 * each.patches / most for each in filled]
    axes.scatter([b.probability for b in filled], [b.share for b in filled], sizes, color=_COLOURS[0], zorder=2)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return _svg(figure, axes, f"reliability {title}")


def _curve(results: Sequence[Result], label: str, value: Callable[[Epoch], float]) -> Markup:
    # Methods that differ in prediction alone share a training, which is drawn once.
    results = list({result.adapter: result for result in reversed(results)}.values())[::-1]
    order = list(dict.fromkeys(result.method for result in results))
    figure = Figure(figsize=(5, 3.2 + 0.13 * len(order)), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=label)
    named: set[str] = set()
    for result in results:
        epochs = range(1, len(result.history) + 1)
        number = order.index(result.method)
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
        legend = None if result.method in named else result.method
        named.add(result.method)
        marks = [result.best_epoch]  # the epoch whose model was kept
        heights = [value(epoch) for epoch in result.history]
        axes.plot(epochs, heights, color=colour, ls=dash, marker="o", ms=4, markevery=marks, label=legend)
    axes.set_xlim(0.5, max(len(result.history) for result in results) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure, len(order))
    return _svg(figure, axes, label)


def _legend(figure: Figure, entries: int) -> None:
    """Below the axes, where it hides nothing."""
    figure.legend(loc="outside lower center", ncols=1 if entries < 3 else 2, frameon=False, fontsize=8)


def _svg(figure: Figure, axes: Axes, salt: str) -> Markup:
    """The figure as an ``<svg>`` element: without prolog, date or metadata; ids made from ``salt``."""
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return Markup(_COUNTED.sub("<g>", svg))  # several charts in one page would each have a figure_1
