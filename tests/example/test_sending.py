"""A comparison whose trainings an executor runs gives the table of one that runs them here."""

from conftest import need, need_extra, thorough

need_extra("histopathology")

import executors
import pytest
import torch
from toy_patches import write_toy

from examples.histopathology.data.dataset import open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.methods.catalogue import find_methods
from examples.histopathology.runs import content, sending
from examples.histopathology.runs.comparison import compare
from examples.histopathology.runs.sending import find_executor
from examples.histopathology.training import recipe as training
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(image_size=32, epochs=1, batch_size=16)
METHODS = find_methods(["probe", "probe-dihedral", "probe+ensemble"])
RATES = [1e-3, 1e-2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def here(toy, tmp_path_factory):
    torch.set_num_threads(1)
    return compare(METHODS, open_splits(toy), RECIPE, RATES, 2, Job(tmp_path_factory.mktemp("here")))


def sent_by(executor, toy, out, resume=False):
    splits, job = open_splits(toy), Job(out, resume=resume)
    images = {name: content.images_of(split) for name, split in splits.items()}
    try:
        trainings = sending.Sent(executor, toy, None, images, job)
        return compare(METHODS, splits, RECIPE, RATES, 2, job, trainings)
    finally:
        executor.shutdown()


def same(first, second):
    (results, sweeps), (others, other_sweeps) = first, second
    assert [(s.training, dict(sorted(s.losses.items()))) for s in sweeps] == [
        (s.training, dict(sorted(s.losses.items()))) for s in other_sweeps
    ]
    assert len(results) == len(others) == 6
    for a, b in zip(results, others, strict=True):
        assert (a.method, a.seed, a.lr, a.val_loss, a.proofs) == (b.method, b.seed, b.lr, b.val_loss, b.proofs)
        assert torch.equal(a.test_logits, b.test_logits) and torch.equal(a.val_logits, b.val_logits)


def dask():
    need("distributed")
    return executors.dask()


@pytest.mark.parametrize(
    "executor",
    [executors.threads, thorough(dask), thorough(lambda: sending.local_processes(2))],
    ids=["threads", "dask", "processes"],
)
def test_an_executor_gives_the_table_of_one_process(here, toy, tmp_path, executor):
    same(here, sent_by(executor(), toy, tmp_path))


@pytest.mark.thorough
def test_what_was_sent_and_done_is_not_trained_again(toy, tmp_path, monkeypatch):
    first = sent_by(executors.threads(), toy, tmp_path)
    monkeypatch.setattr(training, "_epoch", None)
    same(first, sent_by(executors.threads(), toy, tmp_path, resume=True))


@pytest.mark.thorough
def test_a_training_that_is_cut_off_is_gone_on_with(toy, tmp_path, here):
    class Breaks:
        def __init__(self):
            self.inner, self.left = executors.threads(), 3

        def submit(self, *arguments):
            self.left -= 1
            return self.inner.submit(*arguments) if self.left >= 0 else self.inner.submit(int, "the worker is gone")

        def shutdown(self):
            self.inner.shutdown()

    with pytest.raises(ValueError, match="the worker is gone"):
        sent_by(Breaks(), toy, tmp_path)
    same(here, sent_by(executors.threads(), toy, tmp_path, resume=True))


def test_an_executor_is_found_by_name():
    assert find_executor(None, 1) is None
    threads = find_executor("executors:threads", 1)
    assert threads.submit(int, "3").result() == 3
    threads.shutdown()
    for name in ("executors", "executors:", "executors:absent", "no_such_module:threads", ":"):
        with pytest.raises(ExampleError, match=r"--executor .* Give module:callable"):
            find_executor(name, 1)
    with pytest.raises(ExampleError, match="returns a object, which has no `submit`"):
        find_executor("executors:nothing", 1)
    with pytest.raises(ExampleError, match="--jobs and --executor exclude each other"):
        find_executor("executors:threads", 2)
