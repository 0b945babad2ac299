"""Work that is cut short: a save keeps the old adapter or leaves the new one; a model is as it was, or done with.

``tests/test_takeback.py`` interrupts inject, merge, unmerge, remove and switching; here come saving, loading and making
adapters out of others.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reliability
import torch
from conftest import SmallNet, randomise, snapshot
from test_takeback import run_interrupted

import convlora
from convlora import CheckpointError

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
PROJECT = Path(__file__).parents[1]


@pytest.mark.thorough
def test_a_save_that_is_killed_leaves_an_adapter():
    """At 6 random times, and at each of its calls to the file system; 1,000: `python -m tests.reliability`."""
    program = [sys.executable, "-m", "tests.reliability"]  # it forks, which a process with threads must not
    kills = subprocess.run([*program, "kills", "--count", "6"], cwd=PROJECT, capture_output=True, text=True)
    assert "random kills: 6 tried, 0 lost" in kills.stdout, kills.stdout + kills.stderr
    calls = subprocess.run([*program, "calls"], cwd=PROJECT, capture_output=True, text=True)
    assert calls.stdout.count(", 0 lost") == 2, calls.stdout + calls.stderr


@pytest.fixture
def two(tmp_path):
    """A model with adapters "a" and "b", and a directory with "a" as it was once."""
    torch.manual_seed(0)
    model = convlora.inject(SmallNet().eval(), 3, adapter_name="a", norm="track")
    randomise(model)
    convlora.save_adapter(model, tmp_path / "a")
    convlora.add_adapter(model, "b", 2)
    convlora.set_adapter(model, "b")
    randomise(model, seed=2)
    convlora.set_adapter(model, "a")
    randomise(model, seed=3)
    return model, tmp_path / "a"


def interruptions(call, prepare, step=1):
    """What `prepare` gives, after the call on it was cut short at the first line, the next, ... and not any more."""
    at = 1
    while True:
        subject = prepare()
        interrupted = run_interrupted(lambda subject=subject: call(subject), at)
        yield subject, interrupted
        if not interrupted:
            return
        at += step


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_an_interrupted_save_is_of_one_adapter_and_leaves_no_other_file(two, images):
    model, directory = two
    base = convlora.remove(copy.deepcopy(model))
    old = files(directory)
    expected = model(images)

    def prepare():
        for name, content in old.items():
            (directory / name).write_bytes(content)
        return model

    done = []
    for _ in interruptions(lambda model: convlora.save_adapter(model, directory), lambda: prepare(), step=53):
        now = files(directory)
        assert now.keys() == old.keys()
        loaded = convlora.load_adapter(copy.deepcopy(base), directory).eval()
        done.append(now[TENSORS] != old[TENSORS])
        assert torch.equal(loaded(images), expected) is done[-1]
        assert done[-1] or now == old
    assert done[-1] and not done[0]
    assert torch.equal(model(images), expected)


def test_an_interrupted_save_of_a_merged_model_leaves_it_merged(two, images):
    model, directory = two
    convlora.merge(model)
    expected = model(images)
    for subject, _ in interruptions(lambda m: convlora.save_adapter(m, directory), lambda: model, step=97):
        assert convlora.summary(subject).state == "merged"
        assert torch.equal(subject(images), expected)
    convlora.unmerge(model)


def test_an_interrupted_load_leaves_the_base_or_an_injected_model(two, images):
    model, directory = two
    base = convlora.remove(copy.deepcopy(model))
    expected = convlora.load_adapter(copy.deepcopy(base), directory)(images)
    for subject, _ in interruptions(
        lambda m: convlora.load_adapter(m, directory), lambda: _noted(copy.deepcopy(base)), step=67
    ):
        if "_convlora" in vars(subject):  # cut after the last change
            assert torch.equal(subject(images), expected)
            convlora.remove(subject)
        assert snapshot(subject) == NOTES.pop(id(subject))


NOTES = {}


def _noted(model):
    NOTES[id(model)] = snapshot(model)
    return model


def combine(model):
    convlora.combine_adapters(model, {"a": 0.5, "b": 0.5}, "both", method="svd", rank=2)


@pytest.mark.parametrize("call", [combine, lambda m: convlora.load_adapter(m, DIRECTORY[0], adapter_name="both")])
def test_interrupted_an_adapter_that_comes_beside_others_is_whole_or_not_there(two, images, call):
    start, directory = two
    DIRECTORY[:] = [directory]
    expected, keys = start(images), set(start.state_dict())
    whole = copy.deepcopy(start)
    call(whole)
    convlora.set_adapter(whole, "both")
    with_both = whole(images)
    for subject, interrupted in interruptions(call, lambda: copy.deepcopy(start), step=149):
        assert torch.equal(subject(images), expected)
        if "both" in subject.stem.convlora:
            convlora.set_adapter(subject, "both")
            assert torch.equal(subject(images), with_both)
        else:
            assert interrupted and set(subject.state_dict()) == keys


DIRECTORY = []


def test_interrupted_shrinking_is_done_or_not_begun(two, images):
    start, _ = two
    before, done = start(images), copy.deepcopy(start)
    convlora.shrink(done, 1)
    after = done(images)
    assert not torch.equal(before, after)
    for subject, interrupted in interruptions(lambda m: convlora.shrink(m, 1), lambda: copy.deepcopy(start), step=37):
        ranks = {layer.rank for layer in convlora.summary(subject).layers}
        assert torch.equal(subject(images), after if ranks == {1} else before)
        assert interrupted or ranks == {1}


def scale(model):
    with convlora.scaled(model, 0.5, interpolate=True):
        pass


LIVE = {
    "set_adapter": lambda m: convlora.set_adapter(m, {"a": 0.5, "b": 2.0}),
    "set_scale": lambda m: convlora.set_scale(m, "a", 0.5),
    "scaled": scale,
}


@pytest.mark.parametrize("call", LIVE)
def test_interrupted_a_change_of_weights_is_done_or_not_begun(two, images, call):
    start, _ = two
    before, done = start(images), copy.deepcopy(start)
    LIVE[call](done)
    after = done(images)
    assert torch.equal(before, after) is (call == "scaled")
    for subject, interrupted in interruptions(LIVE[call], lambda: copy.deepcopy(start), step=37):
        now = subject(images)
        assert torch.equal(now, after) or (interrupted and torch.equal(now, before))
        assert torch.equal(convlora.set_scale(convlora.set_adapter(subject, "a"), "a", 1)(images), before)


def test_interrupted_extraction_leaves_the_base(images):
    torch.manual_seed(0)
    base = SmallNet().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    for subject, _ in interruptions(
        lambda m: convlora.extract(m, tuned, 2), lambda: _noted(copy.deepcopy(base)), step=211
    ):
        if "_convlora" in vars(subject):
            convlora.remove(subject)
        assert snapshot(subject) == NOTES.pop(id(subject))


def test_a_failed_save_puts_the_small_files_back(two, monkeypatch):
    """The tensors' file comes last; where it cannot take its place, card and configuration are the old ones again."""
    model, directory = two
    before = files(directory)
    replace = Path.replace

    def fails(self, target):
        if Path(target).name == TENSORS:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(CheckpointError, match=r"What was there before is still there"):
        convlora.save_adapter(model, directory, metrics={"accuracy": 0.5})
    assert files(directory) == before


def test_what_killed_saves_left_is_cleared_away_once_it_is_old(two):
    model, directory = two
    left = [directory / f".{name}.{'0' * 32}" for name in (TENSORS, CONFIG, CARD)]
    mine = [directory / ".mine.txt", directory / f".other.{'0' * 32}"]
    for file in (*left, *mine):
        file.touch()
    convlora.save_adapter(model, directory)
    assert all(file.exists() for file in (*left, *mine))  # another process may be at work

    for file in (*left, *mine):
        os.utime(file, (0, 0))
    convlora.save_adapter(model, directory)
    assert not any(file.exists() for file in left) and all(file.exists() for file in mine)


def test_a_load_beside_a_save_reads_one_file_to_the_end(two, images, monkeypatch):
    """The manifest of one save and the tensors of the next would not go together."""
    model, directory = two
    import convlora._checkpoint.loading as room

    base = convlora.remove(copy.deepcopy(model))
    expected = convlora.load_adapter(copy.deepcopy(base), directory).eval()(images)
    check = room.check_fits

    def saved_meanwhile(*arguments):
        convlora.save_adapter(model, directory)
        check(*arguments)

    monkeypatch.setattr(room, "check_fits", saved_meanwhile)
    assert torch.equal(convlora.load_adapter(copy.deepcopy(base), directory).eval()(images), expected)
    monkeypatch.undo()
    assert not torch.equal(convlora.load_adapter(copy.deepcopy(base), directory).eval()(images), expected)


def test_each_save_says_which_it_is(tmp_path):
    """What the benchmark takes for a loss: an adapter of two saves."""
    model = convlora.inject(reliability.make_net(), 2)
    reliability.fill(model, 3)
    convlora.save_adapter(model, tmp_path)
    assert reliability.number_in(tmp_path) == 3
    with torch.no_grad():
        next(convlora.adapter_parameters(model)).fill_(4)
    convlora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="several saves"):
        reliability.number_in(tmp_path)
