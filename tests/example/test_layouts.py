"""Three layouts behind one dataset: each is recognised, read to the same tensors, and its faults are named."""

import pickle

from conftest import need_extra

need_extra("histopathology")

import h5py
import numpy as np
import pytest
import torch
from layouts import pixels, wilds_rows, write_challenge, write_pcam, write_table, write_wilds
from PIL import Image

from examples.histopathology.data.dataset import HistoDataset, find_splits, open_splits, require_centres
from examples.histopathology.errors import ExampleError

SIZES = {"train": 6, "val": 4, "test": 4}
WRITERS = {"challenge HDF5": write_challenge, "PCam HDF5": write_pcam, "WILDS Camelyon17 folder": write_wilds}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {layout: write(tmp_path_factory.mktemp("data"), SIZES) for layout, write in WRITERS.items()}


@pytest.fixture
def wilds(tmp_path):
    return write_wilds(tmp_path / "wilds", SIZES)


@pytest.fixture
def pcam(tmp_path):
    return write_pcam(tmp_path / "pcam", SIZES)


def refused(call, *args, **options):
    with pytest.raises(ExampleError) as caught:
        call(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("layout", WRITERS)
def test_each_layout_is_recognised_and_read_to_the_same_tensors(folders, layout):
    splits = open_splits(folders[layout])
    assert {split: len(data) for split, data in splits.items()} == SIZES
    for data in splits.values():
        assert data.layout == layout
        for i, (image, label, index) in enumerate(data.__getitems__(range(len(data)))):
            wanted = pixels(int(data.ids[i]), int(data.labels[i])).transpose(2, 0, 1).astype(np.float32) / 255
            # The float32 file holds float64 quotients, rounded once more.
            torch.testing.assert_close(image, torch.from_numpy(wanted), rtol=0, atol=1e-7)
            assert (image.dtype, index, float(label)) == (torch.float32, i, float(data.labels[i]))


@pytest.mark.parametrize("layout", WRITERS)
def test_a_pickled_split_reads_the_same_in_another_process(folders, layout):
    data = open_splits(folders[layout])["val"]
    first = data[2][0]
    assert torch.equal(pickle.loads(pickle.dumps(data))[2][0], first)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_limit_keeps_images_and_what_is_known_of_them_together(folders, layout):
    path = find_splits(folders[layout])["train"]
    every, few = HistoDataset(path, split="train"), HistoDataset(path, split="train", limit=3)
    where = [every.ids.tolist().index(i) for i in few.ids]
    assert few.labels.tolist() == every.labels[where].tolist()
    assert few.centres.tolist() == every.centres[where].tolist()
    assert np.array_equal(few.read(range(3)), every.read(where))


def test_wilds_splits_go_by_centre_first(wilds):
    splits = open_splits(wilds)
    assert [sorted(set(data.centres.tolist())) for data in splits.values()] == [[0, 3, 4], [1], [2]]
    assert splits["train"].rows.notes[0].startswith("2 rows of split 1 left out")
    rows = {row[""]: row for row in wilds_rows(SIZES)}
    for data in splits.values():
        assert data.ids.tolist() == sorted(data.ids.tolist())
        assert data.labels.tolist() == [rows[int(i)]["tumor"] for i in data.ids]


def test_wilds_table_may_be_named_itself(wilds):
    assert len(HistoDataset(wilds / "metadata.csv", split="val")) == SIZES["val"]
    assert "say which one is meant: train, val, test" in refused(HistoDataset, wilds)


def test_pcam_has_no_centres_and_says_so(pcam, folders):
    data = open_splits(pcam)["train"]
    assert not data.has_centres and "names no centre" in data.rows.notes[0]
    message = refused(require_centres, data, "centre normalisation")
    assert message.startswith("centre normalisation needs each image's hospital") and "6 of 6" in message
    with_centres = open_splits(folders["challenge HDF5"])["train"]
    assert require_centres(with_centres, "centre normalisation") is with_centres.centres


def test_pcam_test_may_come_without_labels_and_train_may_not(pcam):
    (pcam / "camelyonpatch_level_2_split_test_y.h5").unlink()
    assert open_splits(pcam)["test"].labels is None
    (pcam / "camelyonpatch_level_2_split_train_y.h5").unlink()
    assert "row 0 of x has no label (6 of 6" in refused(open_splits, pcam)


def test_pcam_arrays_may_share_a_file(tmp_path):
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["x"] = np.stack([pixels(0, 0), pixels(1, 1)])
        file["y"] = [0, 1]
    data = HistoDataset(tmp_path / "train.h5")
    assert data.layout == "PCam HDF5" and data.labels.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_a_challenge_file_remembers_what_it_stores(tmp_path, dtype):
    data = HistoDataset(write_challenge(tmp_path, {"train": 12}, dtype) / "train.h5")
    assert data.rows.dtypes == {dtype: 12} and data.rows.shape == (3, 96, 96)
    assert data.ids.tolist() == list(range(12)) and "listed out of order" in data.rows.notes[0]


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center": "north"}, "line 3: center is 'north', not a whole number"),
        ({"tumor": "2"}, "line 3: tumor is '2'; it must be 0 or 1"),
        ({"split": 5, "center": 0}, "line 3: split is 5"),
        ({"x_coord": ""}, "line 3: x_coord is '', not a whole number"),
        ({"": 0}, "2 rows have the index 0"),
        ({"patient": "4"}, "patient_4_node_1: no such folder, but metadata.csv lists pictures in it. Were the"),
    ],
)
def test_a_faulty_row_of_wilds_is_named_by_its_line(wilds, change, message):
    rows = sorted(wilds_rows(SIZES), key=lambda row: (row["center"] != 1, row[""]))  # validation first
    rows = [dict(row, **({"": 0} if i == 0 and "" in change else {})) for i, row in enumerate(rows)]
    rows[1] |= change
    write_table(wilds, rows)
    text = refused(open_splits, wilds)
    assert message in text and str(wilds) in text


def test_faults_of_the_wilds_folder(wilds, tmp_path):
    (wilds / "patches" / "patient_024_node_1" / "patch_patient_024_node_1_x_100_y_7.png").unlink()
    assert "x_100_y_7.png: no such picture" in refused(open_splits(wilds)["val"].__getitem__, 0)
    other = wilds / "patches" / "patient_024_node_1" / "patch_patient_024_node_1_x_101_y_7.png"
    Image.new("RGB", (64, 96)).save(other)
    assert "64×96 pixels; WILDS patches are 96×96" in refused(open_splits(wilds)["val"].__getitem__, 1)
    other.write_bytes(b"no picture")
    assert "cannot be read as a PNG" in refused(open_splits(wilds)["val"].__getitem__, 1)
    (wilds / "metadata.csv").write_text(",patient,node\n0,004,1\n")
    assert "no column x_coord, y_coord, tumor, center, split (found: , patient, node)" in refused(open_splits, wilds)
    (wilds / "metadata.csv").write_text(",patient,node,x_coord,y_coord,tumor,slide,center,split\n0,004\n")
    assert "line 2: 2 cells, 9 columns" in refused(open_splits, wilds)


def test_a_wilds_folder_one_level_down_is_pointed_at(wilds):
    assert f"{wilds} looks like a WILDS folder: give that one" in refused(open_splits, wilds.parent)


def test_a_wilds_table_without_a_split(tmp_path):
    write_wilds(tmp_path, {"train": 3, "val": 2, "test": 0})
    assert "no test (found: metadata.csv)" in refused(open_splits, tmp_path)
    assert "no row of the test split. It is center 2." in refused(HistoDataset, tmp_path, split="test")


def test_faults_of_pcam_files(pcam):
    stem = str(pcam / "camelyonpatch_level_2_split_train")
    assert "has no array x, only y" in refused(HistoDataset, f"{stem}_y.h5")
    with h5py.File(f"{stem}_y.h5", "r+") as file:
        file["y"][4] = 3
    assert "train_y.h5: y of row 4 is 3; it must be 0 or 1" in refused(open_splits, pcam)
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = np.zeros((5, 1, 1, 1))
    assert "y has shape (5, 1, 1, 1); 6 images need (6, 1, 1, 1)" in refused(open_splits, pcam)
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = np.zeros((5, 3, 96, 96), np.uint8)
    assert "x has shape (5, 3, 96, 96) and dtype uint8; PCam has (N, 96, 96, 3)" in refused(open_splits, pcam)


def test_compressed_pcam_files_ask_for_gunzip(tmp_path):
    (tmp_path / "camelyonpatch_level_2_split_train_x.h5.gz").touch()
    assert "is compressed: run `gunzip`" in refused(find_splits, tmp_path)


def test_two_layouts_in_one_folder_are_refused(pcam):
    write_challenge(pcam, SIZES)
    text = refused(open_splits, pcam)
    assert "files of 2 layouts" in text and "train.h5, val.h5, test.h5 of the challenge" in text
