import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import pytest
import torch
from toy_patches import write_toy

from examples.histopathology.augment.draws import Draws
from examples.histopathology.augment.transforms import Normalisation, Normalise
from examples.histopathology.data.dataset import HistoDataset
from examples.histopathology.errors import ExampleError
from examples.histopathology.training.loading import Batches, View, begin_epoch, make_loader

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), {"train": 50, "val": 21, "test": 8})


def noisy(images, draws):
    return images[:, :, :4, :4] + torch.from_numpy(draws.uniform()).float()[:, None, None, None]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_all_processes_make_the_batches_of_one(world):
    for epoch in (0, 5):
        parts = [Batches(50, 12, seed=3, rank=rank, world=world) for rank in range(world)]
        whole = Batches(50, 12, seed=3)
        for sampler in (*parts, whole):
            sampler.epoch = epoch
        joined = [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
        assert joined == list(whole)
        assert len(joined) == len(whole) == 4
        assert len(set(itertools.chain(*joined))) == 48


def test_each_epoch_has_its_own_order_and_the_same_one_again():
    sampler = Batches(50, 12, seed=3)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    sampler.epoch = 0
    assert first != second
    assert list(sampler) == first


def test_without_a_seed_every_index_comes_once_in_order():
    assert list(itertools.chain(*Batches(21, 4))) == list(range(21))
    shares = [list(itertools.chain(*Batches(21, 4, rank=rank, world=2))) for rank in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(21))
    assert len(Batches(21, 4, rank=1, world=2)) == len(list(Batches(21, 4, rank=1, world=2)))


def test_a_small_split_is_one_batch():
    assert [sorted(batch) for batch in Batches(5, 12, seed=0)] == [[0, 1, 2, 3, 4]]


def test_augmentation_depends_on_seed_epoch_and_patch_alone(toy):
    def images(epoch=0, seed=0, **options):
        view = View(HistoDataset(toy / "train.h5"), noisy, seed)
        loader = make_loader(view, 10, **options)
        begin_epoch(loader, epoch)
        found = {int(i): image for batch, _, indices in loader for image, i in zip(batch, indices, strict=True)}
        return torch.stack([found[i] for i in sorted(found)])

    once = images()
    assert torch.equal(once, images(seed=0, workers=2))
    assert not torch.equal(once, images(epoch=1))
    assert not torch.equal(once, images(seed=1))
    shuffled = make_loader(View(HistoDataset(toy / "train.h5"), noisy), 25, seed=9)
    for batch, _, indices in shuffled:
        assert torch.equal(batch, once[indices])


def test_augmentation_leaves_the_global_generator_alone(toy):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(make_loader(View(HistoDataset(toy / "train.h5"), noisy), 10, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_centre_is_normalised_by_its_own_numbers(toy):
    split = HistoDataset(toy / "train.h5")
    split.centres[1] = 7
    each = {0: Normalisation("a", "", (0.0,) * 3, (1.0,) * 3), 7: Normalisation("b", "", (0.5,) * 3, (2.0,) * 3)}
    images = torch.from_numpy(split.read([1, 0]))
    found = Normalise(each, split.centres)(images, Draws(0, 0, [1, 0]))
    assert torch.equal(found, torch.stack([(images[0] - 0.5) / 2, images[1]]))


def test_a_batch_that_processes_cannot_share_is_refused(toy):
    view = View(HistoDataset(toy / "train.h5"), noisy)
    with pytest.raises(ExampleError, match="--batch-size 16: 3 processes share each batch, so give a multiple of 3"):
        make_loader(view, 16, seed=0, world=3)


@pytest.mark.thorough
def test_two_processes_train_what_one_does(tmp_path):
    data = write_toy(tmp_path / "data", {"train": 48, "val": 21, "test": 8})
    histories = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = command if processes > 1 else [sys.executable]
        paths = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
        done = subprocess.run(
            [*command, str(HERE / "two_processes.py"), str(data), str(out)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        histories.append(json.loads((out / "history.json").read_text()))
    assert [history["processes"] for history in histories] == [1, 2]
    # fp32 sums in another order: where that moves an activation across the edge of a ReLU6, two epochs of Adam's steps
    # have made 3e-4 of it
    torch.testing.assert_close(*(torch.tensor(h["epochs"]) for h in histories), rtol=0, atol=1e-3)


def test_logs_hold_each_epoch_once_also_after_a_resume(tmp_path):
    from examples.histopathology.training.logs import Log
    from examples.histopathology.training.recipe import Epoch

    history = [Epoch(1.0, 2.0, 0.5, 1e-3, 3.0)]
    for _ in range(2):  # as two runs would
        log = Log(tmp_path, "x", history)
        history.append(Epoch(0.5, 1.0, 0.6, 1e-3, 3.0))
        log.write(history)
        log.close()
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,val_loss,val_accuracy,lr,seconds"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
