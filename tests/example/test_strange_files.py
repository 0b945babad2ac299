"""Data sets from strangers, HDF5, tables and pictures: refused with one clear error, at no cost."""

from conftest import need_extra, peak

need_extra("histopathology")

import h5py
import numpy as np
import pytest
from PIL import Image

from examples.histopathology.challenge import ChallengeRows
from examples.histopathology.errors import ExampleError
from examples.histopathology.pcam import PcamRows
from examples.histopathology.wilds import WildsRows


def challenge(path, **change):
    with h5py.File(path, "w") as file:
        group = file.create_group("0")
        arrays = {"img": np.zeros((3, 96, 96), np.uint8), "label": 1, "metadata": [2.0]} | change
        for name, value in arrays.items():
            if callable(value):
                value(group, name)
            elif value is not None:
                group[name] = value
    return path


def refused_data(kind, message, *arguments):
    before = peak()
    with pytest.raises(ExampleError, match=message):
        kind(*arguments)
    assert peak() - before < 200


def elsewhere(group, name):
    group.create_dataset(name, (3, 96, 96), np.uint8, external=[("/etc/passwd", 0, 27648)])


def virtual(group, name):
    layout = h5py.VirtualLayout((3, 96, 96), np.uint8)
    layout[:] = h5py.VirtualSource("other.h5", "secret", (3, 96, 96))
    group.create_virtual_dataset(name, layout)


def bomb(group, name):
    group.create_dataset(
        name, (3, 96, 96), np.uint8, maxshape=(None,) * 3, chunks=(3, 20000, 20000), compression="gzip"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img": lambda g, n: g.__setitem__(n, h5py.SoftLink("/0/label"))}, r"img is a link"),
        ({"img": lambda g, n: g.__setitem__(n, h5py.ExternalLink("/etc/passwd", "/x"))}, r"img is a link"),
        ({"img": elsewhere}, r"the numbers of img lie in another file"),
        ({"img": virtual}, r"the numbers of img lie in another file"),
        ({"img": bomb}, r"a chunk of img takes 1,200,000,000 bytes"),
        ({"metadata": lambda g, n: g.create_dataset(n, (10**12,), "f8", chunks=(1000,))}, r"4096 numbers are read"),
        ({"label": lambda g, n: g.create_dataset(n, (10**6,) * 3, "u1", chunks=(1, 1, 9))}, r"4096 numbers are read"),
        ({"metadata": [1e300]}, r"a whole number"),
        ({"metadata": [np.nan]}, r"a whole number"),
        ({"metadata": "centre 3"}, r"no numbers"),
        ({"label": np.array([(1, 2)], dtype=[("a", "i4"), ("b", "f8")])}, r"no numbers"),
        ({"img": np.zeros((3, 96, 96), "c8")}, r"dtype complex64"),
        ({"img": np.zeros((3, 96, 96), "S4")}, r"dtype bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_challenge_files_from_strangers(tmp_path, change, message):
    refused_data(ChallengeRows, message, challenge(tmp_path / "train.h5", **change))


@pytest.mark.parametrize("link", [h5py.SoftLink("/0"), h5py.ExternalLink("other.h5", "/0")], ids=["soft", "external"])
def test_a_key_that_is_a_link(tmp_path, link):
    challenge(tmp_path / "other.h5")
    with h5py.File(challenge(tmp_path / "train.h5"), "r+") as file:
        file["1"] = link
    refused_data(ChallengeRows, r"key 1 is no group \(1 is a link\)", tmp_path / "train.h5")


def pcam_x(file, count=2, **options):
    file.create_dataset("x", (count, 96, 96, 3), np.uint8, **options)


@pytest.mark.parametrize(
    "fill, message",
    [
        (lambda f: pcam_x(f, 10**9, chunks=(1, 96, 96, 3)), r"more images than a file of this size can hold"),
        (lambda f: f.create_group("x"), r"x cannot be read"),
        (lambda f: pcam_x(f, external=[("/etc/passwd", 0, 2 * 27648)]), r"the numbers of x lie in another file"),
        (lambda f: f.__setitem__("x", h5py.ExternalLink("other.h5", "/x")), r"x is a link"),
        (lambda f: (pcam_x(f), f.create_dataset("y", (10**6,) * 2, "u1", chunks=(1, 9))), r"y has shape"),
        (lambda f: (pcam_x(f), f.create_dataset("y", data=["a", "b"])), r"y has dtype object"),
        (lambda f: (pcam_x(f), f.__setitem__("y", h5py.SoftLink("/x"))), r"y is a link"),
    ],
)
def test_pcam_files_from_strangers(tmp_path, fill, message):
    with h5py.File(tmp_path / "train.h5", "w") as file:
        fill(file)
    refused_data(PcamRows, message, tmp_path / "train.h5")


HEADER = ",patient,node,x_coord,y_coord,tumor,slide,center,split\n"


@pytest.mark.parametrize(
    "line, message",
    [
        ("0,../../../etc,4,1,2,1,0,0,0", r"patient is '\.\./\.\./\.\./etc'; it must be three digits"),
        ("0,٠٠٤,4,1,2,1,0,0,0", r"it must be three digits"),
        ("1e300,004,4,1,2,1,0,0,0", r"the index is '1e300', not a whole number"),
        ("0,004,4,1e999,2,1,0,0,0", r"x_coord is '1e999'"),
        ("0,004,4,1,2,1,0,nan,0", r"center is 'nan'"),
        ('0,"' + "a" * 200_000 + '",4,1,2,1,0,0,0', r"cannot be read as a table"),
        ("0,\udcff,4,1,2,1,0,0,0", r"cannot be read as a table"),
    ],
    ids=lambda value: value[:12],
)
def test_tables_from_strangers(tmp_path, line, message):
    (tmp_path / "metadata.csv").write_bytes((HEADER + line + "\n").encode("utf-8", "surrogateescape"))
    refused_data(WildsRows, message, tmp_path / "metadata.csv", "train")


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("large", lambda path: Image.new("1", (9000, 9000)).save(path, "PNG"), r"9000×9000 pixels"),
        ("other", lambda path: Image.new("RGB", (96, 96)).save(path, "BMP"), r"cannot be read as a PNG"),
        ("bomb", lambda path: Image.new("1", (20000, 20000)).save(path, "PNG"), r"cannot be read as a PNG"),
    ],
)
def test_pictures_from_strangers(tmp_path, name, make, message):
    folder = tmp_path / "patches" / "patient_004_node_4"
    folder.mkdir(parents=True)
    (tmp_path / "metadata.csv").write_text(HEADER + "0,004,4,1,2,1,0,0,0\n")
    make(folder / "patch_patient_004_node_4_x_1_y_2.png")
    rows = WildsRows(tmp_path / "metadata.csv", "train")
    refused_data(rows.read, message, 0, np.empty((3, 96, 96), np.float32))
