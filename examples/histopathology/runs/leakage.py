"""Warnings of leakage: splits that share images, slides, patients or hospitals, and splits with one label.

Nothing is refused, since a user may have reasons. `inspect` and every run print the warnings; the report shows them.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence

from ..data.dataset import HistoDataset
from ..data.layout import SPLITS
from ..data.rows import NO_CENTRE
from .content import images_of

_SHOWN = 5


def warnings(splits: Mapping[str, HistoDataset]) -> dict[str, list[str]]:
    """Warnings by split: of contents that it shares with an earlier split, or of labels of one kind.

    Every image is read once. Slides and patients are compared if the layout names them, as WILDS does.

    Raises:
        ExampleError: as `content.look`.
    """
    names = [name for name in SPLITS if name in splits] + [name for name in splits if name not in SPLITS]
    found = {name: list(_one_label(name, splits[name])) for name in names}
    for a, b in itertools.combinations(names, 2):
        found[b] += _shared(a, splits[a], b, splits[b])
    return found


def _shared(a: str, first: HistoDataset, b: str, second: HistoDataset) -> Iterator[str]:
    known = {image.tobytes() for image in images_of(first)}
    twice = [int(i) for i, image in zip(second.ids, images_of(second), strict=True) if image.tobytes() in known]
    if twice:
        yield (
            f"{len(twice):,} of {len(second):,} images of {b} are in {a} too, pixel by pixel (ids {_listed(twice)}): "
            f"figures on {b} are too good, since {'the model' if a == 'train' else 'the choice by ' + a} has seen "
            "them. Remove them from one split."
        )
    # patches of the same slide have the same patient
    for what, own, other in (
        ("slide", first.rows.slides, second.rows.slides),
        ("patient", first.rows.patients, second.rows.patients),
    ):
        common = set(own or ()) & set(other or ())
        if common:
            yield (
                f"{len(common):,} {what}{'s have' if len(common) > 1 else ' has'} patches in {a} and in {b} "
                f"({_listed(sorted(common))}): patches of one {what} resemble each other, so figures on {b} are too "
                f"good. Keep each {what} in one split."
            )
            break
    centres = sorted((set(first.centres.tolist()) & set(second.centres.tolist())) - {NO_CENTRE})
    if centres:
        yield (
            f"{a} and {b} share {'centres' if len(centres) > 1 else 'centre'} {_listed(centres)}: figures on {b} say "
            f"less about hospitals that {'the model' if a == 'train' else 'the choice by ' + a} has not seen."
        )


def _one_label(name: str, split: HistoDataset) -> Iterator[str]:
    found = {label for label in split.rows.labels if label is not None}
    if len(found) == 1:
        yield (
            f"every labelled image of {name} has the label {found.pop()}: figures on {name} say nothing about the "
            "other label. Check the labels, or raise --limit."
        )


def _listed(values: Sequence[Hashable]) -> str:
    return ", ".join(map(str, values[:_SHOWN])) + (", ..." if len(values) > _SHOWN else "")
