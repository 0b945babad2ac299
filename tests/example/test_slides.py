"""Labelled patches from tissue pictures, here pictures drawn with two known stains."""

from conftest import need_extra

need_extra("histopathology")

import struct

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from examples.histopathology.data.dataset import open_splits
from examples.histopathology.data.stain import RUIFROK, intensity, unit_rows
from examples.histopathology.errors import ExampleError
from examples.histopathology.making.slides import cut_slides, find_slides, read_picture
from examples.histopathology.making.writing import SplitWriter

WARM = unit_rows([(0.55, 0.74, 0.38), (0.20, 0.88, 0.43)])


def tissue(height, width, seed=0, stains=RUIFROK):
    """``(height, width, 3)`` uint8 with blobs of haematoxylin on eosin."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.standard_normal((2, height, width)), (0, 6, 6))
    amounts = np.moveaxis(np.clip(smooth / smooth.std(), 0, None), 0, -1) * 0.5
    return np.rint(intensity(amounts @ stains) * 255).astype(np.uint8)


def table(folder, *lines):
    (folder / "slides.csv").write_text("\n".join(("file,split,centre", *lines)) + "\n")


@pytest.fixture
def folder(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, (name, size) in enumerate({"a.png": (300, 420), "b.png": (260, 260), "c.tif": (300, 300)}.items()):
        Image.fromarray(tissue(*size, seed=i, stains=(RUIFROK, WARM)[i % 2])).save(pictures / name)
    table(pictures, "a.png,train,0", "b.png, val, 1", "c.tif,test,2")
    return pictures


def test_every_slide_is_balanced_and_in_its_split(folder, tmp_path):
    counts = cut_slides(folder, tmp_path / "out")
    opened = open_splits(tmp_path / "out")
    assert {split: len(data) for split, data in opened.items()} == counts
    assert [set(data.centres.tolist()) for data in opened.values()] == [{0}, {1}, {2}]
    for data in opened.values():
        assert abs(int(data.labels.sum()) * 2 - len(data)) <= 1
        assert "median" in data.source


def test_the_stride_shrinks_until_a_slide_gives_enough(folder, tmp_path):
    counts = cut_slides(folder, tmp_path / "out", dtype="uint8")
    # At 32 pixels: 7 × 11, 6 × 6, 7 × 7 patches; at 24, the smallest step: 9 × 14, 7 × 7, 9 × 9.
    assert counts == {"train": 126, "val": 49, "test": 81}
    assert cut_slides(folder, tmp_path / "out", stride=96) == {"train": 12, "val": 4, "test": 9}


def test_patches_are_the_pictures_pixels_at_their_coordinates(folder, tmp_path):
    cut_slides(folder, tmp_path / "out", stride=96, dtype="uint8")
    picture = np.asarray(Image.open(folder / "a.png"))
    with h5py.File(tmp_path / "out" / "train.h5", "r") as file:
        for group in file.values():
            centre, slide, x, y = group["metadata"][()]
            assert (centre, slide) == (0, 0)
            assert np.array_equal(group["img"][()], picture[y : y + 96, x : x + 96].transpose(2, 0, 1))


def test_label_one_has_more_haematoxylin_in_the_centre(tmp_path):
    amounts = np.zeros((400, 400, 2))
    amounts[..., 1] = np.random.default_rng(0).uniform(0.2, 0.6, (400, 400))
    amounts[:, 200:] = amounts[:, 200:, ::-1]  # the right half is haematoxylin
    for name in ("x.png", "y.png", "z.png"):
        Image.fromarray(np.rint(intensity(amounts @ WARM) * 255).astype(np.uint8)).save(tmp_path / name)
    table(tmp_path, "x.png,train,0", "y.png,val,1", "z.png,test,2")
    cut_slides(tmp_path, tmp_path / "out", stride=101)
    with h5py.File(tmp_path / "out" / "train.h5", "r") as file:
        assert len(file) == 16
        for group in file.values():
            assert group["label"][()] == int(group["metadata"][2] >= 200)


def test_background_is_dropped_and_patches_are_limited(folder, tmp_path):
    picture = tissue(480, 480)
    picture[:, 240:] = 255
    Image.fromarray(picture).save(folder / "a.png")
    cut_slides(folder, tmp_path / "out", stride=48, max_per_slide=10)
    with h5py.File(tmp_path / "out" / "train.h5", "r") as file:
        assert len(file) == 10
        assert all(group["img"][()].mean() <= 0.9 for group in file.values())
        assert sum(group["label"][()] for group in file.values()) == 5


def test_a_larger_patch_is_resized(folder, tmp_path):
    cut_slides(folder, tmp_path / "out", patch=192, stride=40)
    with h5py.File(tmp_path / "out" / "train.h5", "r") as file:
        wanted = np.asarray(Image.open(folder / "a.png"))[:192, :192].reshape(96, 2, 96, 2, 3).mean((1, 3)) / 255
        # Pillow rounds the mean of four pixels to a whole step.
        np.testing.assert_allclose(file["0/img"][()], wanted.transpose(2, 0, 1), atol=1 / 255)


def test_known_names_need_no_table(tmp_path):
    for name in ("target_image.png", "histo.jpg", "ihc.png"):
        Image.fromarray(tissue(200, 200)).save(tmp_path / name)
    found = {slide.path.name: (slide.split, slide.centre) for slide in find_slides(tmp_path)}
    assert found == {"target_image.png": ("train", 3), "histo.jpg": ("val", 1), "ihc.png": ("test", 2)}


# -- kinds of picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_any_mode_reads_as_rgb(tmp_path, mode):
    step = 255 * np.tile([0, 1], (40, 20)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(step.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(step).convert("RGB" if mode == "CMYK" else mode.replace("LA", "L")).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    assert np.array_equal(read_picture(path), np.repeat(step[:, :, None], 3, 2))


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert (read_picture(tmp_path / "x.png") == 255).all()
    Image.new("P", (50, 50), 0).save(tmp_path / "p.png", transparency=0)
    assert (read_picture(tmp_path / "p.png") == 255).all()


@pytest.mark.parametrize("planar", [False, True])
def test_sixteen_bit_colour_is_read_by_tifffile(tmp_path, planar):
    picture = tissue(60, 70)
    wide = picture.astype(np.uint16) * 257
    path = tmp_path / "x.tif"
    if planar:
        tifffile.imwrite(path, np.moveaxis(wide, 2, 0), photometric="rgb", planarconfig="separate")
    else:
        tifffile.imwrite(path, wide, photometric="rgb")
    assert np.array_equal(read_picture(path), picture)


# -- faults ------------------------------------------------------------------------------------------------


def refuses(message, call, *args, **options):
    with pytest.raises(ExampleError, match=message) as caught:
        call(*args, **options)
    return str(caught.value)


def test_unknown_pictures_ask_for_a_table(folder, tmp_path):
    (folder / "slides.csv").unlink()
    text = refuses("which picture is for training", find_slides, folder)
    assert str(folder / "slides.csv") in text and "file,split,centre\na.png,train,0" in text


def test_faults_of_the_table_come_together(folder):
    table(folder, "a.png,train,0", "none.png,val,1", "b.png,valid,x", "a.png,test,2")
    text = refuses("line 3: no file 'none.png'", find_slides, folder)
    assert "line 4: split 'valid'" in text and "centre 'x'" in text and "a.png: listed twice" in text


def test_a_table_without_its_columns(folder):
    (folder / "slides.csv").write_text("name,set\n")
    refuses("first line must be file,split,centre", find_slides, folder)
    table(folder)
    refuses("no picture listed", find_slides, folder)


def test_every_split_needs_a_picture(folder, tmp_path):
    table(folder, "a.png,train,0")
    refuses("no picture for val, test", find_slides, folder)
    (tmp_path / "empty").mkdir()
    refuses("no picture here", find_slides, tmp_path / "empty")
    refuses("no such folder", find_slides, tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["a.png", "c.tif"])
def test_an_unreadable_picture_is_named_and_its_split_is_not_written(folder, tmp_path, name):
    (folder / name).write_bytes(b"not a picture")
    refuses(rf"{name}: cannot be read as a picture", cut_slides, folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))
    assert not (tmp_path / "out" / {"a.png": "train.h5", "c.tif": "test.h5"}[name]).exists()


def test_a_truncated_picture_is_named(folder):
    path = folder / "a.png"
    path.write_bytes(path.read_bytes()[:2000])
    refuses(r"a\.png: cannot be read", read_picture, path)


@pytest.mark.parametrize("name", ["a.png", "sixteen.tif"])
def test_a_decompression_bomb_is_refused(folder, monkeypatch, name):
    tifffile.imwrite(folder / "sixteen.tif", tissue(200, 200).astype(np.uint16), photometric="rgb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    refuses(rf"{name}: more than 10,000 pixels", read_picture, folder / name)


def canvas(kind):
    """A WebP of 16,384 × 16,384 that says so and ends."""
    side = (16_383).to_bytes(3, "little")
    chunks = {
        b"VP8X": bytes(4) + side + side,
        b"VP8L": b"/" + ((16_383 << 14) + 16_383).to_bytes(4, "little") + bytes(9),
        b"VP8 ": b"\0\0\0\x9d\x01\x2a" + b"\xff\x3f" * 2,
    }
    body = b"WEBP" + kind + len(chunks[kind]).to_bytes(4, "little") + chunks[kind]
    return b"RIFF" + len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture of a known"),
        ("a.png", b"GIF89a" + bytes(20), "not a picture of a known format"),
        ("a.webp", canvas(b"VP8X"), "more than .* pixels"),
        ("a.webp", canvas(b"VP8L"), "more than .* pixels"),
        ("a.webp", canvas(b"VP8 "), "more than .* pixels"),
        ("a.tif", b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 273, 4, 70_000, 8), "70,000 numbers in tag 273"),
        ("a.tif", b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHII", 273, 4, 70_000, 8), "70,000 numbers in tag 273"),
        (
            "a.tif",
            b"II+\0\x08\0\0\0" + struct.pack("<QQHHQQ", 16, 1, 273, 16, 70_000, 8),
            "70,000 numbers in tag 273",
        ),
        (
            "a.tif",
            b"MM\0*\0\0\0\x08\0\2" + struct.pack(">HHIIHHIHxx", 322, 4, 1, 30_000, 323, 3, 1, 30_000),
            "more than .* pixels",
        ),
        ("a.tif", b"II*\0\x08\0\0\0", "cannot be read as a picture"),
        ("a.jpg", b"\xff\xd8\xff" + b"\xff\xda" * 101, "101 scans"),
    ],
)
def test_what_a_strangers_picture_would_cost_is_known_before_it_is_opened(tmp_path, monkeypatch, name, data, message):
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(Image, "open", None)
    refuses(message, read_picture, tmp_path / name)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.full((200, 200, 3), 255, np.uint8), "0 of 25 patches hold tissue"),
        (tissue(80, 200), "200×80 pixels hold no patch of 96×96"),
        (
            np.repeat(tissue(200, 200)[:, :, :1], 3, 2),
            "its stains cannot be separated: all stained pixels are of one hue",
        ),
    ],
)
def test_a_picture_without_a_task_is_named(folder, tmp_path, picture, message):
    Image.fromarray(picture).save(folder / "b.png")
    refuses(rf"b\.png: {message}", cut_slides, folder, tmp_path / "out")


@pytest.mark.parametrize("option", [{"patch": 8}, {"stride": 0}, {"max_per_slide": 1}])
def test_numbers_out_of_range_are_named(folder, tmp_path, option):
    refuses(next(iter(option)), cut_slides, folder, tmp_path / "out", **option)


def test_data_of_another_origin_is_not_overwritten(folder, tmp_path):
    with SplitWriter(tmp_path, "test") as writer:
        writer.add(np.zeros((3, 96, 96)), 0, [2])
    refuses(r"test\.h5 exists", cut_slides, folder, tmp_path)
    assert not (tmp_path / "train.h5").exists()
