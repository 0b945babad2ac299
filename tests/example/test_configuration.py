"""A run as a file: what it gives, what goes before it, and that the file of a run repeats it."""

from conftest import need_extra

need_extra("histopathology")

import json

import pytest
import yaml
from toy_patches import write_toy
from typer.testing import CliRunner

from examples.histopathology import __main__ as command_line
from examples.histopathology.__main__ import app

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(monkeypatch):
    """What a command was asked for, in place of doing it."""
    found = []
    monkeypatch.setattr(command_line, "run", lambda *arguments, **more: found.append((*arguments, *more.values())))
    return found


def invoke(*arguments, status=0):
    outcome = CliRunner().invoke(app, [str(each) for each in arguments])
    assert outcome.exit_code == status, outcome.output
    return outcome


def write(path, **options):
    path.write_text(yaml.safe_dump(options))
    return path


def test_a_file_gives_options_by_their_names(tmp_path, asked):
    file = write(
        tmp_path / "a.yaml",
        **{
            "methods": ["probe", "lora+ensemble"],
            "image-size": 64,
            "lr": "3e-4",
            "out": "x",
            "full": True,
            "limit": 9,
        },
        seeds=2,
    )
    invoke("compare", "--config", file)
    options, methods, seeds, sweep, _ = asked[0]
    assert (options.limit, sweep) == (9, [3e-4])
    assert [method.name for method in methods] == ["probe", "lora+ensemble"]
    assert (options.image_size, options.lr, str(options.out), options.full, seeds) == (64, 3e-4, "x", True, 2)


def test_the_command_line_goes_before_the_file_and_what_neither_says_is_the_default(tmp_path, asked):
    file = write(tmp_path / "a.yaml", epochs=3, seed=4)
    invoke("train", "--epochs", 5, "--config", file)
    options = asked[0][0]
    assert (options.epochs, options.seed, options.batch_size) == (5, 4, 32)


def test_the_main_job_takes_one_too(tmp_path, asked):
    invoke("--config", write(tmp_path / "a.yaml", methods="probe", epochs=1))
    assert [method.name for method in asked[0][1]] == ["probe"] and asked[0][0].epochs == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "epoch: unknown option; did you mean epochs? Known: "),
        ("resume: true", "resume: unknown option"),
        ("lr: {a: 1}", "lr: holds keys; write one value, or a list."),
        ("- 1", "holds [1]; write a line for each option"),
        ("a: [", "cannot be read as YAML"),
        ("command: compare", "is for `compare`; run that, or remove the line `command`."),
        ("command: null", "is for the main job, without a sub-command; run that"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, asked, text, message):
    (tmp_path / "a.yaml").write_text(text)
    said = invoke("train", "--config", tmp_path / "a.yaml", status=1).stderr
    assert said.startswith(f"error: --config {tmp_path / 'a.yaml'}: ") and message in said and said.count("\n") == 1
    assert not asked


def test_no_such_file_and_a_value_of_another_kind_are_refused(tmp_path, asked):
    assert "cannot be read as YAML" in invoke("train", "--config", tmp_path / "none.yaml", status=1).stderr
    assert "--epochs" in invoke("train", "--config", write(tmp_path / "a.yaml", epochs="many"), status=2).stderr


@pytest.mark.parametrize("command", [(), ("train",), ("compare",), ("ablation",)])
def test_the_file_that_a_command_writes_asks_for_the_same_again(tmp_path, asked, command):
    invoke(*command, "--data", tmp_path, "--epochs", 3, "--fit-memory", "--out", tmp_path / "out")
    (tmp_path / "run.yaml").write_text(asked[0][0].made_by)
    invoke(*command, "--config", tmp_path / "run.yaml")
    first, again = ([getattr(each, "args", each) for each in arguments] for arguments in asked)  # of a partial
    assert again == first
    assert (asked[1][0].epochs, asked[1][0].fit_memory) == (3, True)


def test_a_run_leaves_its_file_and_the_report_prints_it(tmp_path):
    data = write_toy(tmp_path / "data", {"train": 16, "val": 4, "test": 4})
    arguments = ["--data", data, "--image-size", 32, "--epochs", 1, "--batch-size", 8]
    invoke("train", "--method", "probe", *arguments, "--out", tmp_path / "one")
    text = (tmp_path / "one" / "run.yaml").read_text()
    assert f"<pre>{text}</pre>" in (tmp_path / "one" / "report.html").read_text()
    stored = json.loads((tmp_path / "one" / "results.json").read_text())
    assert stored["configuration"] == text
    invoke("train", "--config", tmp_path / "one" / "run.yaml", "--out", tmp_path / "two")
    again = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [each["val_loss"] for each in again["results"]] == [each["val_loss"] for each in stored["results"]]
