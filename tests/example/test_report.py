import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import browser
import pytest
import torch
from layouts import write_wilds
from rich.console import Console

from examples.histopathology.data.dataset import open_splits
from examples.histopathology.files import replacing_directory, write_text
from examples.histopathology.report.charts import DRAWN, curves, pareto
from examples.histopathology.report.costs import Cost
from examples.histopathology.report.exhibits import Exhibits, Patch
from examples.histopathology.report.outputs import (
    HEADER,
    Report,
    SplitFacts,
    as_data,
    html,
    markdown,
    rich_tables,
    submission_csv,
    truths,
    write_report,
)
from examples.histopathology.report.published import HEADER as PUBLISHED
from examples.histopathology.runs.clinical import temperature, youden_threshold
from examples.histopathology.runs.comparison import Truth
from examples.histopathology.runs.experiment import Result
from examples.histopathology.runs.scores import auc
from examples.histopathology.training.recipe import Epoch
from examples.histopathology.training.verify import Proofs

PROOFS = Proofs(
    patches=4, reload_bit_equal=True, reload_difference=0.0, merge_same_labels=True, merge_difference=1.2e-6
)
SPLITS = [SplitFacts("train", 8, 0.5, {0: 5, 3: 3}), SplitFacts("test", 4, None, {2: 4})]


def result(method="lora", seed=0, val_loss=0.2, test_accuracy: float | None = 0.75) -> Result:
    history = [Epoch(0.5, val_loss + 0.1, 0.6, 1e-3, 2.0), Epoch(0.4, val_loss, 0.7 + seed / 100, 1e-3, 4.0)]
    return Result(
        method=method,
        seed=seed,
        adapter=Path(f"{method}-seed{seed}"),
        history=history,
        best_epoch=1,
        trainable=257_968,
        parameters=3_628_976,
        adapter_bytes=1_075_752,
        test_accuracy=test_accuracy,
        test_logits=torch.tensor([-1.0, 2.0, 0.5, -0.1]),
        proofs=PROOFS,
        val_loss=val_loss,
        val_accuracy=0.7 + seed / 100,
    )


def report(*results: Result, caveat: str = "") -> Report:
    return Report(results or (result("probe", val_loss=0.4, test_accuracy=0.5), result()), SPLITS, {"lr": 1e-3}, caveat)


def test_row_holds_what_was_measured():
    assert dict(zip(HEADER, report(result()).rows()[0], strict=True)) == {
        "method": "lora",
        "trainable": "257,968",
        "share": "7.11%",
        "adapter": "1.08 MB",
        "val loss": "0.200",
        "val acc.": "0.700",
        "test acc.": "0.750",
        "s/epoch": "3.0",
    }


def test_seeds_give_mean_deviation_and_range():
    row = report(*(result(seed=s, test_accuracy=0.7 + s / 10) for s in range(3))).rows()[0]
    assert row[HEADER.index("test acc.")] == "0.800 ± 0.100"


def test_the_terminals_tables_show_every_figure_of_thirteen_methods_in_80_characters():
    whole = report(*(result(f"method-{n}", seed) for n in range(13) for seed in range(2)))
    page = io.StringIO()
    Console(file=page, width=80).print(*rich_tables(whole), sep="\n")
    assert "…" not in page.getvalue()
    assert all(cell.split()[0] in page.getvalue() for row in whole.rows() for cell in row)


def test_differences_are_paired_by_seed_and_patch():
    labels = torch.tensor([0, 1, 1, 0])
    wrong = torch.tensor([-1.0, -2.0, 0.5, -0.1])
    probes = [dataclasses.replace(result("probe", s), test_logits=wrong) for s in range(3)]
    loras = [result("lora", s) for s in (2, 0, 1)]
    whole = dataclasses.replace(report(*probes, *loras), truth={"test": Truth(labels, torch.full((4,), 2))})
    (note,) = [note for note in whole.notes() if note.startswith("lora − probe")]
    # LoRA is right on one patch of four more: the mean of 0, 1, 0, 0 resampled lies between 0 and 0.75
    assert note == "lora − probe, test accuracy: +0.2500 [+0.0000, +0.7500] (by seed +0.250, +0.250, +0.250)"


def test_differences_are_resampled_by_patient_or_slide_where_the_data_name_them():
    labels, units = torch.tensor([0, 1, 1, 0]), torch.tensor([7, 3, 7, 7])
    probe = dataclasses.replace(result("probe"), test_logits=torch.tensor([-1.0, -2.0, 0.5, -0.1]))
    truth = {"test": Truth(labels, torch.full((4,), 2), units, "slide")}
    whole = dataclasses.replace(report(probe, result("lora")), truth=truth)
    # LoRA gains on the one patch of slide 3. Two slides drawn are 3 and 3 (mean 1), both (1/4), or 7 and 7 (0),
    # each with a chance above 2.5 %; single patches would give 0.75 at most.
    assert [(each.low, each.high, each.unit) for each in whole.differences()] == [(0.0, 1.0, "slide")]
    (said,) = [note for note in whole.notes() if note.startswith("Differences are paired")]
    assert "interval over slides" in said and "Whole slides were resampled" in said and "too narrow" not in said
    alone = dataclasses.replace(whole, truth={"test": Truth(labels, torch.full((4,), 2), torch.zeros(4), "patient")})
    assert "[no interval from one patient]" in str(alone.differences()[0])


def test_without_test_labels_differences_are_of_validation_and_say_that_it_chose():
    logits = {"probe": torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0]), "lora": torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0])}
    results = [
        dataclasses.replace(result(name, seed, test_accuracy=None), val_logits=own)
        for name, own in logits.items()
        for seed in range(2)
    ]
    truth = {"val": Truth(torch.tensor([0, 1, 0, 0, 1]), torch.full((5,), 1))}
    whole = dataclasses.replace(report(*results), truth=truth)
    (note,) = [note for note in whole.notes() if note.startswith("lora − probe")]
    # right on two patches of five more; of five such gains resampled, 95 % of the means lie between 0 and 0.8
    assert note == "lora − probe, validation accuracy: +0.4000 [+0.0000, +0.8000] (by seed +0.400, +0.400)"
    assert [each["split"] for each in as_data(whole)["differences"]] == ["val"]
    (said,) = [note for note in whole.notes() if note.startswith("The test set has no labels")]
    assert "of validation, which also chose the learning rate and the epoch" in said and "optimistic" in said
    assert "One standard error of an accuracy of 0.9 on 5 validation patches is 0.134." in whole.notes()
    assert "The test set has no labels" in markdown(whole) and "The test set has no labels" in html(whole)


def test_with_test_labels_validation_decides_no_difference():
    whole = whole_report()
    assert {each.split for each in whole.differences()} == {"test"}
    assert not any(note.startswith("The test set has no labels") for note in whole.notes())


def test_without_test_labels_the_frontier_is_of_validation():
    drawn = curves([result(name, test_accuracy=None) for name in ("probe", "norms", "lora")])
    assert "Validation accuracy against trainable share" in drawn


def test_a_difference_over_one_patch_has_no_interval():
    one = {"truth": {"test": Truth(torch.tensor([1]), torch.tensor([2]))}}
    results = [
        dataclasses.replace(result(name), test_logits=torch.tensor([logit]))
        for name, logit in (("probe", -1.0), ("lora", 1.0))
    ]
    whole = dataclasses.replace(report(*results), **one)
    assert str(whole.differences()[0]) == (
        "lora − probe, test accuracy: +1.0000 [no interval from one patch] (by seed +1.000)"
    )
    assert as_data(whole)["differences"][0]["low"] is None


def test_transductive_rows_are_marked():
    whole = report(result("probe"), dataclasses.replace(result("lora+balanced"), transductive=True))
    assert [row[0] for row in whole.rows()] == ["probe", "lora+balanced (transductive)"]
    assert any(note.startswith("Transductive: ") for note in whole.notes())
    assert not any(note.startswith("Transductive: ") for note in report().notes())


def test_the_frontier_is_what_nothing_beats_on_both():
    points = [(0.5, 0.9), (0.1, 0.8), (0.2, 0.7), (0.3, 0.95), (0.3, 0.94)]
    assert pareto(points) == [(0.1, 0.8), (0.3, 0.95)]
    assert html(report(result("a"), result("b"), result("c"))).count("<svg") == 3


def test_a_training_that_methods_share_is_drawn_once():
    shared = dataclasses.replace(result("lora+balanced"), adapter=result("lora").adapter)
    drawn = curves([result("probe"), result("lora"), shared])["Validation loss"]
    assert ">lora<" in drawn and ">probe<" in drawn and "balanced" not in drawn


def test_best_is_by_validation_loss_whatever_the_test_says():
    chosen = report(result(seed=0, val_loss=0.1, test_accuracy=0.1), result(seed=1, val_loss=0.2, test_accuracy=0.9))
    assert chosen.best.seed == 0


def test_a_failed_proof_is_loud():
    failed = dataclasses.replace(PROOFS, reload_bit_equal=False, reload_difference=0.5, merge_same_labels=False)
    assert "NOT EQUAL, off by 0.5" in str(failed)
    assert "OTHER LABELS" in str(failed)
    notes = report(result("probe"), dataclasses.replace(result(), proofs=failed)).notes()
    assert [note for note in notes if "logits" in note] == [f"FAILED, lora seed 0: {failed}."]


def test_proofs_that_held_are_one_sentence():
    (note,) = [note for note in report().notes() if "logits" in note]
    assert "bit-equal" in note
    assert "difference after merging: 1e-06" in note


def test_absent_test_labels_are_said():
    unlabelled = report(result("probe", test_accuracy=None), result(test_accuracy=None))
    assert unlabelled.rows()[0][HEADER.index("test acc.")] == "no labels"
    assert not any("test accuracy" in note for note in unlabelled.notes())


def test_submission_is_integer_ids_in_order():
    assert submission_csv([10, 9, 100, 2], torch.tensor([-1.0, 2.0, 0.5, -0.1])) == "ID,Pred\n2,0\n9,1\n10,0\n100,1\n"


# One red pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def whole_report(*results: Result, **changes) -> Report:
    """Every section, as a run with labels gives it."""
    results = results or (result("probe", val_loss=0.4), result(), result(seed=1))
    results = [dataclasses.replace(r, val_logits=torch.tensor([3.0, -3.0])) for r in results]
    truth = {
        "test": Truth(torch.tensor([0, 1, 0, 0]), torch.tensor([2, 2, 2, 5])),
        "val": Truth(torch.tensor([1, 0]), torch.tensor([-1, -1])),
    }
    patch = Patch(7, 2, 1, 0.02, {"patch": PNG})
    explained = Patch(8, None, 0, 0.9, {"network input": PNG, "Grad-CAM": PNG, "occlusion": PNG})
    shown = Exhibits("lora", 0, "test", [patch], [explained], ["Maps are of something."])
    costs = [Cost("probe", 1000, 10, 500, 2.0, 1.5, None), Cost("lora", 1100, 110, 900, 2.0, 3.0, 2_000_000)]
    given = {"truth": truth, "exhibits": shown, "costs": costs, **changes}
    return dataclasses.replace(report(*results), **given)


class Addresses(HTMLParser):
    """Everything that a browser would fetch for a page, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if tag == "a" and name == "href":
                self.anchors.append(value)
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "content"):
                self.fetched.append(value)


def test_page_asks_nothing_of_a_network_and_keeps_its_caveat():
    page = html(dataclasses.replace(whole_report(), caveat="Synthetic & no evidence"))
    found = Addresses()
    found.feed(page)
    pictures = [value for value in found.fetched if value.startswith("data:image/png;base64,")]
    assert len(pictures) == 4
    # what is left are the viewport and, inside charts, references to their own parts
    rest = [value for value in found.fetched if not value.startswith("data:")]
    assert [value for value in rest if not value.startswith("#")] == ["width=device-width, initial-scale=1"]
    assert not re.search(r"@import|url\((?!#)", page)
    assert found.scripts == 0
    # the one kind of address left is a namespace's name, which nothing fetches
    assert re.findall(r'(?<!xmlns)(?<!xmlns:xlink)="\s*(?:https?:)?//', page) == []
    assert "Synthetic &amp; no evidence" in page


def test_every_id_is_one_and_every_link_leads_somewhere():
    found = Addresses()
    found.feed(html(whole_report()))
    assert len(found.ids) == len(set(found.ids))
    assert len(found.anchors) == 9
    assert {anchor.removeprefix("#") for anchor in found.anchors} <= set(found.ids)


def test_sections_are_there_where_there_is_something_to_show():
    sections = ("Probabilities", "Confusion by centre", "Patches", "Costs")
    everything, nothing = html(whole_report()), html(report())
    for section in sections:
        assert f">{section}</h2>" in everything
        assert f">{section}<" not in nothing
    # loss, accuracy; ROC of both splits; calibration of both methods
    assert everything.count("<svg") == 2 + 2 + 2
    assert nothing.count("<svg") == 2


def test_scores_are_of_each_split_with_labels_over_seeds():
    whole = whole_report()
    assert [row[:2] for row in whole.score_rows()] == [
        ["probe", "test"],
        ["probe", "validation"],
        ["lora", "test"],
        ["lora", "validation"],
    ]
    probe, _, lora, validation = whole.score_rows()
    # logits -1, 2, 0.5, -0.1 against 0, 1, 0, 0: one of three zeros is called 1
    assert probe[2] == "1.000"
    assert probe[5:] == ["1.000", "0.667"]
    assert lora[2] == "1.000 ± 0.000"
    assert validation[5:] == ["1.000 ± 0.000"] * 2


def test_confusion_is_by_centre_and_says_where_none_is_named():
    rows = [row[1:] for row in whole_report().centre_rows() if row[0] == "lora"]
    assert rows == [
        ["test", "2", "3", "0.667", "1", "0", "1", "1"],
        ["test", "5", "1", "1.000", "0", "0", "0", "1"],
        ["validation", "none named", "2", "1.000", "1", "0", "0", "1"],
    ]


def test_without_test_labels_validation_is_shown():
    whole = whole_report(truth={"val": whole_report().truth["val"]})
    assert {row[1] for row in whole.score_rows()} == {"validation"}
    assert html(whole).count("<svg") == 2 + 1 + 2


def test_results_of_an_earlier_version_have_no_validation_scores():
    old = dataclasses.replace(whole_report(), results=[result("probe"), result()])
    assert {row[1] for row in old.score_rows()} == {"test"}


def test_labels_of_one_kind_have_no_roc_and_say_so():
    truth = {"val": Truth(torch.tensor([1, 1]), torch.tensor([1, 1]))}
    whole = whole_report(truth=truth)
    assert {row[2] for row in whole.score_rows()} == {"one label only"}
    assert "<h3>ROC</h3>" not in html(whole)


def test_charts_draw_no_more_methods_than_can_be_told_apart():
    many = whole_report(*(result(f"m{i}", val_loss=i / 10) for i in range(DRAWN + 3)))
    page = html(many)
    assert f"and the {DRAWN} methods of the lowest" in page
    assert f"m{DRAWN - 1}, test" in page
    assert f"m{DRAWN}, test" not in page
    assert len(many.score_rows()) == 2 * (DRAWN + 3)


@pytest.mark.skipif(browser.BROWSER is None or browser.DRIVER is None, reason="needs chromium and chromedriver")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_the_page_fits_asks_for_nothing_and_has_no_errors(tmp_path, width):
    names = [f"a-method-with-a-long-name-{i}" for i in range(5)]
    page = tmp_path / "report.html"
    page.write_text(html(whole_report(*(result(name, seed) for name in names for seed in range(2)))))
    seen = browser.look(page, width)
    assert (seen.errors, seen.requests, seen.wider) == ([], [], 0)
    wide, scrolling = seen.tables
    assert wide == scrolling
    assert width == 1280 or wide > 0


def test_page_has_every_cell_split_and_version():
    whole = report()
    page = html(whole)
    for row in whole.rows():
        assert all(f"<td>{cell}</td>" in page for cell in row)
    assert "centre 0: 5, centre 3: 3" in page
    assert torch.__version__.split("+")[0] in page


def test_pages_of_equal_results_are_equal():
    assert html(report()) == html(report())


def test_markdown_and_data_agree_with_the_rows():
    whole = report(caveat="Made by a program.")
    lines = markdown(whole).splitlines()
    assert lines[0] == "**Made by a program.**"
    assert [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:] == whole.rows()
    data = json.loads(json.dumps(as_data(whole)))
    assert data["best"] == {"method": "lora", "seed": 0}
    assert data["results"][1]["test_accuracy"] == 0.75
    assert len(data["results"][1]["history"]) == 2


def test_outputs_appear_whole(tmp_path):
    write_report(report(), tmp_path / "out", "ID,Pred\n")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["report.html", "results.json", "submission.csv", "table.md"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "new \ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    folder = tmp_path / "adapter"
    for content in ("first", "second"):
        with replacing_directory(folder) as partial:
            (partial / "x").write_text(content)
    with pytest.raises(ZeroDivisionError), replacing_directory(folder) as partial:
        (partial / "x").write_text("third")
        raise ZeroDivisionError
    assert (folder / "x").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "adapter"]


# -- numbers to publish ------------------------------------------------------------------------------------


def judged_report(units: torch.Tensor | None = None, unit: str = "patch") -> Report:
    """One method whose validation logits are twice too sure, and a test set of two centres."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(400, generator=generator)
    labels = (torch.rand(400, generator=generator) < honest.sigmoid()).long()
    one = dataclasses.replace(result(), val_logits=2 * honest + 1, test_logits=2 * honest + 1)
    truth = Truth(labels, torch.arange(400) % 2, units, unit)
    return dataclasses.replace(report(one), truth={"test": truth, "val": truth})


def test_numbers_to_publish_are_by_centre_at_validations_threshold_and_temperature():
    whole = judged_report()
    assert [(each.split, each.centre, each.units) for each in whole.published] == [
        ("test", "all", 400),
        ("test", "0", 200),
        ("test", "1", 200),
        ("validation", "all", 400),
        ("validation", "0", 200),
        ("validation", "1", 200),
    ]
    logits, truth = whole.judged(whole.results[0])["val"]
    for each in whole.published:
        assert each.threshold == youden_threshold(logits, truth.labels)
        assert each.temperature == temperature(logits, truth.labels)
    first, zero = whole.published[:2]
    assert first.calibrated_ece < first.ece
    own = truth.centres == 0
    called = logits[own] >= zero.threshold
    assert zero.estimates["sensitivity"].value == pytest.approx(float(called[truth.labels[own] == 1].double().mean()))
    assert zero.estimates["auroc"].value == pytest.approx(auc(logits[own], truth.labels[own]))
    page, table = html(whole), markdown(whole)
    for cell in (str(first.estimates["auroc"]), f"{first.ece:.3f} → {first.calibrated_ece:.3f}", "400 patches"):
        assert cell in page and cell in table
    stored = json.loads(json.dumps(as_data(whole)))["published"]
    assert stored[1]["estimates"]["auroc"] == dataclasses.asdict(zero.estimates["auroc"])


def test_patients_are_drawn_where_they_are_named_and_the_page_says_so():
    apart, together = judged_report(), judged_report(torch.arange(400) // 40, "patient")
    assert [each.units for each in together.published[:3]] == [10, 10, 10]
    assert "10 patients" in markdown(together) and "Whole patients were resampled" in html(together)
    assert "Single patches were resampled" in html(apart)
    assert apart.published[0].estimates["auroc"] != together.published[0].estimates["auroc"]


def test_units_are_patients_before_slides(tmp_path):
    split = open_splits(write_wilds(tmp_path / "data", {"train": 12, "val": 8, "test": 8}))["test"]
    truth = truths({"test": split})["test"]
    assert truth.unit == "patient"
    assert len(truth.units.unique()) == len(set(split.rows.patients))
    split.rows.patients = None
    assert truths({"test": split})["test"].unit == "slide"
    split.rows.slides = None
    assert truths({"test": split})["test"].unit == "patch"


def test_validation_of_one_label_gives_no_threshold_and_says_so():
    whole = judged_report()
    blind = dataclasses.replace(whole.truth["val"], labels=torch.ones(400, dtype=torch.long))
    whole = dataclasses.replace(whole, truth={"test": whole.truth["test"], "val": blind})
    row = dict(zip(PUBLISHED, whole.published_rows()[0], strict=True))
    assert (row["F1"], row["sensitivity"], row["specificity"], row["T"]) == (*["no threshold"] * 3, "none")
    assert "→" not in row["ECE"] and row["AUROC"].startswith("0.")
