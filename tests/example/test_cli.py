import csv
import json
import subprocess
import sys
from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import pytest
from layouts import write_challenge
from toy_patches import SIZES, write_toy
from typer.testing import CliRunner

from examples.histopathology.__main__ import Options, app
from examples.histopathology.errors import ExampleError
from examples.histopathology.making import synthetic
from examples.histopathology.report import costs, exhibits
from examples.histopathology.runs import experiment
from examples.histopathology.training import memory

SMALL = ["--image-size", "64", "--epochs", "1", "--batch-size", "16"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The main job, run once: its printed text and its folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    return run("--data", toy, *SMALL, "--out", out).stdout, out


def run(*arguments: object, status: int = 0):
    outcome = CliRunner().invoke(app, [str(a) for a in arguments])
    assert outcome.exit_code == status, outcome.output
    return outcome


def refused(*arguments: object) -> str:
    """The one line that a refused command prints to stderr."""
    outcome = run(*arguments, status=1)
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout.strip() == ""  # an older rich ends an empty progress with a line
    return outcome.stderr


def submission(path: Path) -> list[tuple[int, int]]:
    with path.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ID", "Pred"]
    return [(int(i), int(pred)) for i, pred in rows[1:]]


def test_main_job_writes_everything_and_says_where(finished):
    printed, out = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "adapters",
        "checkpoints",
        "features",
        "logs",
        "report.html",
        "results",
        "results.json",
        "run.yaml",
        "submission.csv",
        "table.md",
    ]
    for name in ("adapters", "logs", "report.html", "results.json", "submission.csv", "table.md"):
        assert str(out / name) in printed
    for name in ("probe", "probe-augmented", "lora", "lora-track"):
        assert f"| {name} |" in (out / "table.md").read_text()
        assert name in printed
    proofs = [r["proofs"] for r in json.loads((out / "results.json").read_text())["results"]]
    assert [(p["reload_bit_equal"], p["merge_same_labels"], p["patches"]) for p in proofs] == [(True, True, 24)] * 4


def test_the_page_shows_patches_maps_and_costs_of_what_was_trained(finished):
    page = (finished[1] / "report.html").read_text()
    assert "No patches are shown" not in page and "No costs are shown" not in page
    assert page.count("Grad-CAM uses the output of") == 1
    assert "predictions differently" not in page
    assert page.count('src="data:image/png;base64,') >= 3 * 4  # at least two right ones of each label, or wrong ones
    data = json.loads((finished[1] / "results.json").read_text())
    assert {row["split"] for row in data["scores"]} == {"test", "validation"}
    cost = {cost["method"]: cost["step_bytes"] for cost in data["costs"]}
    assert cost["probe"] is None  # its features are kept
    assert cost["lora-track"] > cost["lora"] > cost["probe-augmented"] > 0


@pytest.mark.thorough
def test_a_report_without_its_adapters_is_written_all_the_same(toy, tmp_path, monkeypatch):
    def gone(folder):
        raise ExampleError(f"no run.json in {folder}")

    monkeypatch.setattr(exhibits, "read_card", gone)
    monkeypatch.setattr(costs, "read_card", gone)
    run("train", "--method", "probe", "--data", toy, *SMALL, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No patches are shown: no run.json in" in page
    assert "No costs are shown: no run.json in" in page


def test_an_adapters_card_says_how_good_it_is(finished):
    folder = finished[1] / "adapters" / "lora-seed0"
    data = json.loads((finished[1] / "results.json").read_text())
    (own,) = [each for each in data["results"] if each["method"] == "lora"]
    card = (folder / "README.md").read_text()
    for name, value in (("validation loss", own["val_loss"]), ("test accuracy", own["test_accuracy"])):
        assert f"| {name} | {value:g} |" in card
    assert (folder / "adapter_model.safetensors").stat().st_size == own["adapter_bytes"]


@pytest.mark.thorough
def test_the_batch_that_fits_is_kept_for_who_resumes(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    command = ["train", "--method", "probe", "--data", toy, *SMALL, "--fit-memory", "--out", tmp_path / "out"]
    assert "a training step of one 64-pixel image takes" in refused(*command)
    monkeypatch.setattr(memory, "free_bytes", lambda: 30_000_000)
    printed = run(*command).stdout
    found = json.loads((tmp_path / "out" / "batch-size.json").read_text())
    assert found["asked"] == 16
    assert 1 <= found["batch_size"] < 16
    assert f"batch size {found['batch_size']}: the largest of 16" in printed
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**12)
    assert "done already" in run(*command, "--resume").stdout


def test_the_backbones_own_size_is_taken_when_asked():
    assert Options(native_size=True).recipe().image_size == 224
    assert Options(native_size=True, backbone="tf_efficientnet_b3").recipe().image_size == 300
    assert Options(full=True, native_size=True, backbone="tf_efficientnet_b3").recipe().image_size == 300


def test_submission_has_every_id_in_order(finished):
    rows = submission(finished[1] / "submission.csv")
    assert [i for i, _ in rows] == list(range(SIZES["test"]))
    assert {pred for _, pred in rows} <= {0, 1}


def test_predict_repeats_the_submission_of_the_best_method(finished, toy, tmp_path):
    _, out = finished
    best = json.loads((out / "results.json").read_text())["best"]
    adapter = out / "adapters" / f"{best['method']}-seed{best['seed']}"
    for data in (toy, toy / "test.h5"):
        printed = run("predict", adapter, data, "--out", tmp_path / "again.csv", "--batch-size", 16).stdout
        assert "accuracy" in printed
        assert submission(tmp_path / "again.csv") == submission(out / "submission.csv")


def test_probabilities_agree_with_the_submission(finished, toy, tmp_path):
    adapter = finished[1] / "adapters" / "lora-seed0"
    run("predict", adapter, toy, "--out", tmp_path / "s.csv")
    with (tmp_path / "s-probabilities.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["ID"]), int(row["Pred"])) for row in rows] == submission(tmp_path / "s.csv")
    assert all((float(row["Probability"]) > 0.5) == (row["Pred"] == "1") for row in rows)
    assert [row["Name"] for row in rows] == [f"key {i}" for i in range(SIZES["test"])]


def test_only_what_training_did_not_decide_can_be_asked_of_a_prediction(finished, toy):
    adapter = finished[1] / "adapters" / "lora-seed0"
    assert "--how stain: give any of ensemble, balanced, adabn" in refused("predict", adapter, toy, "--how", "stain")


@pytest.mark.thorough
def test_predict_and_train_do_without_test_labels(tmp_path):
    data = write_toy(tmp_path / "data", test_labels=False)
    run("train", "--method", "probe", "--data", data, *SMALL, "--out", tmp_path / "out")
    assert "no labels" in (tmp_path / "out" / "table.md").read_text()
    adapter = tmp_path / "out" / "adapters" / "probe-seed0"
    assert "accuracy" not in run("predict", adapter, data, "--out", tmp_path / "s.csv").stdout


@pytest.mark.thorough
def test_compare_sweeps_every_training_alike_and_pairs_seeds(toy, tmp_path):
    methods = "probe,probe-dihedral,probe-dihedral+ensemble+balanced"
    options = ["--methods", methods, "--seeds", "2", "--limit", "16", "--lrs", "1e-3,1e-2"]
    command = ["compare", "--data", toy, *SMALL, *options, "--out", tmp_path]
    run(*command)
    table = (tmp_path / "table.md").read_text()
    assert "±" in table
    assert "probe-dihedral − probe, test accuracy:" in table
    assert "| probe-dihedral+ensemble+balanced (transductive) |" in table
    assert "Learning rate by validation loss on seed 0, probe: " in table
    # two trainings, each with two rates and up to two beyond them on the first seed, and one more seed at the best
    tried = [line.split("(")[1].count(": ") for line in table.splitlines() if "Learning rate by validation" in line]
    assert len(tried) == 2
    assert all(2 <= each <= 4 for each in tried)
    assert len(list((tmp_path / "adapters").iterdir())) == sum(tried) + 2
    assert len(list((tmp_path / "predictions").iterdir())) == 2
    again = run(*command, "--resume")
    assert again.stdout.count("done already") >= 6
    assert "loss train" not in again.stdout
    assert (tmp_path / "table.md").read_text() == table


@pytest.mark.thorough
def test_synthetic_data_are_made_marked_and_called_no_evidence(tmp_path):
    run("make-data", tmp_path / "data", "--train", 16, "--val", 8, "--test", 8, "--dtype", "uint8")
    assert (tmp_path / "data" / "synthetic.json").is_file()
    run("train", "--method", "probe", "--data", tmp_path / "data", *SMALL, "--out", tmp_path / "out")
    for name in ("table.md", "report.html", "results.json"):
        assert "no evidence about Camelyon17" in (tmp_path / "out" / name).read_text()


@pytest.mark.thorough
def test_without_data_the_job_makes_its_own(tmp_path, monkeypatch):
    def quick(folder, sizes, *, seed, dtype, progress):
        assert sizes == {"train": 16, "val": 16, "test": 16}
        progress(48)
        write_toy(folder, sizes, source=synthetic.SOURCE)

    monkeypatch.setattr(synthetic, "make_synthetic", quick)
    run("train", "--method", "probe", *SMALL, "--limit", 16, "--out", tmp_path / "out")
    assert "no evidence about Camelyon17" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--batch-size", "-3"], "--batch-size -3: must be at least 1"),
        (["--image-size", "31"], "--image-size 31: must be at least 32"),
        (["--lr", "nan"], "--lr nan: must be a positive number"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--backbone", "resnet51"], "did you mean"),
        (["--methods", "probe,dora"], "unknown method dora; known: full"),
        (["--methods", "lora,lora"], "twice"),
        (["--data", "absent"], "absent: no such folder"),
        (["--data", ".", "--slides", "."], "exclude each other"),
        (["--weights", "absent.pth"], "no weights file at absent.pth"),
        (["--slides", "absent"], "absent"),
        (["--epochs", "2", "train"], "put --epochs after `train`"),
        (["train", "--method", "dora"], "unknown method dora"),
        (["compare", "--lrs", "1e-3,no"], "--lrs 1e-3,no: give different positive numbers"),
        (["compare", "--lr", "1e-3", "--lrs", "1e-3"], "exclude each other"),
        (["ablation", "--rank", "3"], "--rank"),
        (["--native-size", "--image-size", "64"], "exclude each other"),
        (["--precision", "fp8"], "--precision fp8: give one of fp32, bf16"),
        (["compare", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["predict", "absent", "absent"], "no run.json in absent"),
        (["predict", "absent.onnx", "absent"], "absent"),
        (["export", "absent"], "no run.json in absent"),
        (["export", "absent", "--out", "model.pt"], "the name must end in .onnx"),
        (["make-data", "made", "--train", "0"], "--train 0: must be at least 1"),
        (["make-data", "made", "--dtype", "int4"], "int4"),
        (["make-data", "made", "--slides", "absent"], "absent"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_truncated_data_are_found_before_training(toy, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.h5", "val.h5"):
        (data / name).write_bytes((toy / name).read_bytes())
    assert "no test.h5" in refused("--data", data, *SMALL, "--out", tmp_path / "out")
    (data / "test.h5").write_bytes((toy / "test.h5").read_bytes()[:1000])
    assert "test.h5 is an HDF5 file that cannot be read" in refused("--data", data, *SMALL, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interruption_says_where_the_best_adapters_are(toy, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_method", interrupted)
    outcome = run("--data", toy, *SMALL, "--out", tmp_path / "out", status=130)
    assert f"best adapters so far are in {tmp_path / 'out' / 'adapters'}" in outcome.stderr


def test_a_damaged_adapter_is_refused_without_a_traceback(finished, toy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (finished[1] / "adapters" / "lora-seed0").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    (adapter / "adapter_model.safetensors").write_bytes(b"cut short")
    outcome = run("predict", adapter, toy, "--out", tmp_path / "s.csv", status=1)
    assert outcome.stderr.startswith("error: ")
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.thorough
def test_the_module_runs_and_fails_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "examples.histopathology", "--rank", "0", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: --rank 0: must be at least 1.\n"


def test_packed_data_predict_as_the_data_do_to_the_bit(finished, toy, tmp_path):
    _, out = finished
    plain, packed = write_challenge(tmp_path / "plain", {"test": 20}, "float16"), tmp_path / "packed"
    assert "20 images, 1 MB, bit for bit" in run("pack", plain, packed).stdout
    adapter = next(path for path in (out / "adapters").iterdir() if path.name.startswith("lora-seed"))
    for folder in (plain, packed):
        run("predict", adapter, folder, "--out", folder / "submission.csv")
    assert (plain / "submission-probabilities.csv").read_text() == (packed / "submission-probabilities.csv").read_text()
    assert "packed HDF5" in run("inspect", packed, "--out", tmp_path / "inspect").stdout
    assert "--round" in refused("pack", toy, tmp_path / "other")  # the toy's pixels are drawn in floats


@pytest.mark.thorough
def test_compare_by_an_executor_writes_the_table_of_one_process(toy, tmp_path):
    tables = []
    for number, asked in enumerate([(), ("--executor", "executors:threads")]):
        out = tmp_path / str(number)
        run("compare", "--data", toy, "--methods", "probe,probe+ensemble", "--seeds", 1, *SMALL, "--out", out, *asked)
        results = json.loads((out / "results.json").read_text())["results"]
        tables.append(
            [{k: v for k, v in r.items() if k in ("method", "lr", "val_loss", "test_accuracy")} for r in results]
        )
    assert tables[0] == tables[1] and len(tables[0]) == 2
    assert "--jobs 0: must be at least 1" in refused("compare", "--data", toy, "--jobs", 0)
