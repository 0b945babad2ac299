"""Experiment trackers: which are known, what a run of each training holds, and that none ends a training."""

from conftest import need, need_extra

need_extra("histopathology")

import pytest
from toy_patches import write_toy
from typer.testing import CliRunner

from examples.histopathology.__main__ import app
from examples.histopathology.training.processes import make_accelerator
from examples.histopathology.training.trackers import NAMES, PROJECT, TrackedRun, flat

pytestmark = pytest.mark.usefixtures("one_thread")


def train(data, out, *options, status=0):
    arguments = ["train", "--method", "probe", "--data", data, "--image-size", 32, "--epochs", 2, "--batch-size", 8]
    outcome = CliRunner().invoke(app, [str(each) for each in (*arguments, "--out", out, *options)])
    assert outcome.exit_code == status, outcome.output
    return outcome


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow, with its runs in files."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = need("mlflow")
    client.set_tracking_uri((tmp_path / "mlflow").as_uri())
    yield client
    client.end_run()


def test_mlflow_has_a_run_of_each_training_with_its_epochs_and_one_of_the_results(tmp_path, mlflow):
    data = write_toy(tmp_path / "data", {"train": 16, "val": 4, "test": 4})
    train(data, tmp_path / "out", "--tracker", "mlflow")
    client = mlflow.MlflowClient()
    found = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert set(runs) == {"probe-seed0", "results"} and {run.info.status for run in found} == {"FINISHED"}
    own = runs["probe-seed0"]
    assert (own.data.params["backbone"], own.data.params["adapt.trains"]) == ("lite0", "head")
    steps = client.get_metric_history(own.info.run_id, "val_loss")
    logged = (tmp_path / "out" / "logs" / "probe-seed0.csv").read_text().splitlines()[1:]
    assert [(each.step, each.value) for each in steps] == [
        (int(line.split(",")[0]), float(line.split(",")[2])) for line in logged
    ]
    assert "probe-seed0/test_accuracy" in runs["results"].data.metrics


def test_a_tracker_that_fails_is_left_out_and_ends_no_training():
    class Gone:
        name = "gone"

        def log(self, values, step):
            raise ConnectionError("no route to host")

    class Kept:
        name = "kept"
        seen: list = []  # noqa: RUF012

        def log(self, values, step):
            self.seen.append((step, values))

        def finish(self):
            self.seen.append("finished")

    run = TrackedRun(make_accelerator(), "x", {})
    run.trackers = [Gone(), Kept()]
    with pytest.warns(UserWarning, match=r"gone: run x is incomplete, since the tracker failed \(no route to host\)"):
        run.log(1, {"loss": 0.5, "accuracy": None})
    run.log(2, {"loss": 0.4})
    run.close()
    assert Kept.seen == [(1, {"loss": 0.5}), (2, {"loss": 0.4}), "finished"]


def test_a_tracker_that_begins_no_run_is_one_line(monkeypatch):
    accelerator = make_accelerator()
    accelerator.log_with = ["wandb"]

    def refused(*arguments, **options):
        raise RuntimeError("no API key\nand more")

    monkeypatch.setattr(accelerator, "init_trackers", refused)
    with pytest.raises(Exception, match=r"^--tracker wandb: cannot start a run \(no API key\)\.$"):
        TrackedRun(accelerator, "x", {})


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    assert (
        f"--tracker notes: give one of {', '.join(NAMES)}."
        in train(tmp_path, tmp_path / "out", "--tracker", "notes", status=1).stderr
    )
    monkeypatch.setattr("examples.histopathology.training.trackers.get_available_trackers", lambda: [])
    text = train(tmp_path, tmp_path / "out", "--tracker", "comet_ml", status=1).stderr
    assert "--tracker comet_ml: its package is not installed: pip install comet-ml." in text
    assert {"mlflow", "wandb"} <= set(NAMES) and "tensorboard" not in NAMES


def test_a_configuration_is_flat_and_plain():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": (1, 2)}) == {"a.b": 1, "a.c.d": "None", "e": "(1, 2)"}
