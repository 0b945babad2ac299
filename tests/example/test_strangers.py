"""Data sets from strangers: refused with one clear error at no cost, or read to what they hold."""

import itertools

import pytest
from conftest import need

need("h5py")
import h5py
import numpy as np
from strangers import ATTACKS, PIXELS, attempt

from examples.histopathology.data.challenge import ChallengeRows
from examples.histopathology.data.layout import SHAPE
from examples.histopathology.data.pcam import PcamRows
from examples.histopathology.errors import ExampleError


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_strangers_data_set_is_refused_with_words_or_read_and_takes_little_memory(tmp_path, attack):
    outcome = attempt(attack, tmp_path)
    if attack.says:
        assert outcome.rows is None
        with pytest.raises(ExampleError, match=attack.says):
            raise ExampleError(outcome.message)
        assert outcome.message.startswith(str(tmp_path)) and len(outcome.message) < 1000
    else:
        assert outcome.message == ""
    assert outcome.peak < 100  # MiB; the attacks ask for up to 4 GiB


def test_a_text_that_names_the_source_is_kept_and_many_are_not(tmp_path):
    (attack,) = (attack for attack in ATTACKS if attack.name == "a source of 2,000 long texts")
    assert attempt(attack, tmp_path).rows.source is None


COMPRESSED = [
    {"compression": packed, "shuffle": shuffled, "fletcher32": checked}
    for packed, shuffled, checked in itertools.product((None, "gzip", "lzf"), (False, True), (False, True))
]
NOISE = np.random.default_rng(0).integers(0, 40, (7, 96, 96, 3), np.uint8)


@pytest.mark.parametrize("options", COMPRESSED, ids=str)
@pytest.mark.parametrize("chunks", [True, (1, 96, 96), (2, 50, 96), (3, 96, 96)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_filter_that_is_known_gives_the_numbers_that_were_written(tmp_path, options, chunks, dtype):
    image = NOISE[0].transpose(2, 0, 1)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        group = file.create_group("0")
        group.create_dataset(
            "img", data=image if dtype == "uint8" else image / np.float32(255), chunks=chunks, **options
        )
        group.create_dataset("label", data=[1], chunks=(1,), **options)
        group.create_dataset("metadata", data=[3.0] * 5, chunks=(2,), maxshape=(None,), **options)
    rows, out = ChallengeRows(tmp_path / "train.h5"), np.empty(SHAPE, np.float32)
    rows.read(0, out)
    assert np.array_equal(out, image / np.float32(255)) and rows.labels == [1] and rows.centres.tolist() == [3]


@pytest.mark.parametrize("options", COMPRESSED, ids=str)
@pytest.mark.parametrize("chunks", [True, (1, 96, 96, 3), (3, 96, 96, 3), (2, 40, 96, 1)], ids=str)
def test_every_filter_that_is_known_gives_pcams_images(tmp_path, options, chunks):
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_dataset("x", data=NOISE, chunks=chunks, maxshape=(None, 96, 96, 3), **options)
        file.create_dataset("y", data=[0, 1, 0, 1, 1, 0, 1], chunks=(3,), **options)
    rows, out = PcamRows(tmp_path / "train.h5"), np.empty(SHAPE, np.float32)
    for index in range(7):
        rows.read(index, out)
        assert np.array_equal(out, NOISE[index].transpose(2, 0, 1) / np.float32(255))
    assert rows.labels == [0, 1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("where", ["img", "label", "metadata"])
def test_a_checksum_that_does_not_fit_is_refused(tmp_path, where):
    with h5py.File(tmp_path / "train.h5", "w") as file:
        group = file.create_group("0")
        arrays = {"img": PIXELS.reshape(SHAPE), "label": np.array([1]), "metadata": np.array([2.0, 0.0])}
        for name, value in arrays.items():
            group.create_dataset(name, data=value, chunks=value.shape, fletcher32=True)
        place = group[where].id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "train.h5").read_bytes())
    content[place] ^= 1
    (tmp_path / "train.h5").write_bytes(content)
    with pytest.raises(ExampleError, match=r"key 0 cannot be read .*get it again"):
        ChallengeRows(tmp_path / "train.h5").read(0, np.empty(SHAPE, np.float32))
