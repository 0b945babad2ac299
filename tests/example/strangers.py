"""Data sets that a stranger could send, each made here, and what the example's readers answer.

    python -m tests.example.strangers

prints a table of attack, bytes, peak memory beyond what was in use before, seconds and answer. ``test_strangers`` holds
the answers: an attack is refused with words, or read to the numbers that its file holds.
"""

from __future__ import annotations

import resource
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from examples.histopathology.data.challenge import ChallengeRows
from examples.histopathology.data.pcam import PcamRows
from examples.histopathology.data.rows import Rows
from examples.histopathology.data.wilds import WildsRows
from examples.histopathology.errors import ExampleError

SHAPE, ROW = (3, 96, 96), (1, 96, 96, 3)
PIXELS = (np.arange(27648) % 251).astype(np.uint8)
HEADER = ",patient,node,x_coord,y_coord,tumor,slide,center,split\n"
LINE = "0,004,4,1,2,1,0,0,0\n"
PICTURE = "patches/patient_004_node_4/patch_patient_004_node_4_x_1_y_2.png"


@dataclass(frozen=True)
class Attack:
    """What is tried.

    Attributes:
        name: in words.
        make: puts the files into an empty folder and opens what is to be read.
        says: a regular expression that the refusal holds; empty where the images are read.
    """

    name: str
    make: Callable[[Path], Callable[[], Rows]]
    says: str


@dataclass(frozen=True)
class Outcome:
    """Of one attack; ``rows`` where it was read."""

    sent: int
    peak: float
    seconds: float
    message: str
    rows: Rows | None
    pixels: Any


@contextmanager
def peaking() -> Iterator[list[float]]:
    """The MiB that the process needed inside the block beyond what it had before; in the list when the block ends."""
    with suppress(OSError):  # Linux alone sets its mark of the highest anew
        Path("/proc/self/clear_refs").write_text("5")
    before, found = _highest(), [0.0]
    try:
        yield found
    finally:
        found[0] = max(0.0, _highest() - before)


def _highest() -> float:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attempt(attack: Attack, folder: Path) -> Outcome:
    """Make the files and read every image of theirs, as a user does."""
    opened = attack.make(folder)
    sent = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    rows, pixels, message, began = None, np.zeros(SHAPE, np.float32), "", time.perf_counter()
    with peaking() as peak:
        try:
            rows = opened()
            for index in range(len(rows.ids)):
                rows.read(index, pixels)
        except ExampleError as error:
            rows, message = None, str(error)
    return Outcome(sent, peak[0], time.perf_counter() - began, message, rows, pixels)


# -- the challenge's files ---------------------------------------------------------------------------------


def challenge(**arrays: Any) -> Callable[[Path], Callable[[], Rows]]:
    """One image; an array that is a function is given group and name."""

    def make(folder: Path) -> Callable[[], Rows]:
        with h5py.File(folder / "train.h5", "w") as file:
            group = file.create_group("0")
            for name, value in {"img": PIXELS.reshape(SHAPE), "label": 1, "metadata": [2.0]}.items():
                value = arrays.get(name, value)
                if callable(value):
                    value(group, name)
                else:
                    group[name] = value
        return lambda: ChallengeRows(folder / "train.h5")

    return make


def compressed(shape: tuple[int, ...], chunk: bytes, dtype: str = "u1", **options: Any) -> Callable[[Any, str], None]:
    """An array whose only chunk is these bytes as they are."""

    def fill(group: Any, name: str) -> None:
        settings = {"compression": "gzip", "chunks": shape} | options
        data = group.create_dataset(name, shape, dtype, **settings)
        data.id.write_direct_chunk((0,) * len(shape), chunk)

    return fill


def gzip_of(size: int) -> bytes:
    """So many zeros."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    return b"".join(packer.compress(block[: size - at]) for at in range(0, size, len(block))) + packer.flush()


def lzf_of(size: int) -> bytes:
    """An LZF stream of a zero and its copies, 264 bytes for each three."""
    return b"\x00\x00" + b"\xe0\xff\x00" * (size // 264)


def plain_array(shape: tuple[int, ...], dtype: str = "u1", **options: Any) -> Callable[[Any, str], None]:
    """An array that is made and never written."""
    return lambda group, name: group.create_dataset(name, shape, dtype, **options)


def linked(link: Any) -> Callable[[Any, str], None]:
    """A link under the array's name."""
    return lambda group, name: group.__setitem__(name, link)


def virtual(group: Any, name: str) -> None:
    """An array put together of another file's numbers."""
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[:] = h5py.VirtualSource("other.h5", "secret", SHAPE)
    group.create_virtual_dataset(name, layout)


def virtual_of_itself(group: Any, name: str) -> None:
    """An array put together of its own numbers."""
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[:] = h5py.VirtualSource(".", f"/0/{name}", SHAPE)
    group.create_virtual_dataset(name, layout)


def references(kind: Any) -> Callable[[Any, str], None]:
    """References to a group, or to a part of an array."""

    def fill(group: Any, name: str) -> None:
        target = group.create_dataset("target", data=[1, 2])
        found = group.ref if kind is h5py.ref_dtype else target.regionref[:1]
        group.create_dataset(name, (), kind, data=found)

    return fill


def nested(depth: int) -> Callable[[Any, str], None]:
    """A type of a list of a list, and so on."""

    def fill(group: Any, name: str) -> None:
        kind = h5py.h5t.NATIVE_INT8
        for _ in range(depth):
            kind = h5py.h5t.vlen_create(kind)
        h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple((1,)))

    return fill


def filtered(*steps: tuple[Any, ...]) -> Callable[[Any, str], None]:
    """An image of zeros through these filters."""

    def fill(group: Any, name: str) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(SHAPE)
        for kind, *values in steps:
            plist.set_filter(kind, h5py.h5z.FLAG_OPTIONAL, tuple(values) or None)
        space = h5py.h5s.create_simple(SHAPE)
        data = h5py.h5d.create(group.id, name.encode(), h5py.h5t.NATIVE_UINT8, space, plist)
        data.write_direct_chunk((0, 0, 0), bytes(27648), 0xFFFF)

    return fill


def huge_numbers(group: Any, name: str) -> None:
    """Whole numbers of 4,096 bytes each."""
    kind = h5py.h5t.STD_I64LE.copy()
    kind.set_size(4096)
    kind.set_precision(8 * 4096)
    h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple((1,)))


def many_sources(folder: Path) -> Callable[[], Rows]:
    """The file says what made it in 2,000 texts of 60,000 letters, all of them the same one in the file."""
    opened = challenge()(folder)
    with h5py.File(folder / "train.h5", "r+") as file:
        file.attrs.create("source", ["a" * 60_000] + ["b"] * 1999, dtype=h5py.string_dtype())
    content = bytearray((folder / "train.h5").read_bytes())
    first = content.index(struct.pack("<I", 60_000))  # its length, its heap and its place there, in 16 bytes
    content[first : first + 2000 * 16] = content[first : first + 16] * 2000
    (folder / "train.h5").write_bytes(content)
    with h5py.File(folder / "train.h5") as file:  # the lie is one
        assert len(file.attrs["source"][1999]) == 60_000
    return opened


def lzf_that_claims(folder: Path) -> Callable[[], Rows]:
    """Whatever the file says that a chunk takes, lzf allots."""
    opened = challenge(img=compressed(SHAPE, lzf_of(27648), compression="lzf"))(folder)
    content = (folder / "train.h5").read_bytes()
    assert content.count(struct.pack("<II", 261, 27648)) == 1
    lie = struct.pack("<II", 261, 2**32 - 1)
    (folder / "train.h5").write_bytes(content.replace(struct.pack("<II", 261, 27648), lie))
    return opened


def linked_key(link: Any) -> Callable[[Path], Callable[[], Rows]]:
    """An image beside which another is a link."""

    def make(folder: Path) -> Callable[[], Rows]:
        opened = challenge()(folder)
        with h5py.File(folder / "train.h5", "r+") as file:
            file["1"] = link
        return opened

    return make


def same_group(folder: Path) -> Callable[[], Rows]:
    """A thousand keys, all of one group."""
    opened = challenge()(folder)
    with h5py.File(folder / "train.h5", "r+") as file:
        for key in range(1, 1000):
            file[str(key)] = file["0"]
    return opened


LATER = "was never written|is not allocated"
OTHER = "the numbers of img lie in another file"
CHALLENGE = [
    Attack("plain", challenge(), ""),
    Attack("a chunk of 27 kB that inflates to 1 GB", challenge(img=compressed(SHAPE, gzip_of(2**30))), "is too large"),
    Attack(
        "a chunk of 27 kB, stored in as many, that inflates to 28 MB",
        challenge(img=compressed(SHAPE, gzip_of(27_600 * 1029))),
        "does not hold the 27,648 bytes",
    ),
    Attack(
        "a chunk that inflates to 10 bytes",
        challenge(img=compressed(SHAPE, gzip_of(10) + bytes(99))),
        "does not hold the 27,648 bytes",
    ),
    Attack("a chunk that is no gzip", challenge(img=compressed(SHAPE, b"x" * 99)), "a chunk is not a gzip stream"),
    Attack(
        "a chunk whose gzip is cut", challenge(img=compressed(SHAPE, gzip_of(27648)[:-9])), "gzip stream is cut short"
    ),
    Attack(
        "lzf that inflates to 2 MB",
        challenge(img=compressed(SHAPE, lzf_of(2**21), compression="lzf")),
        "does not hold the 27,648 bytes",
    ),
    Attack(
        "lzf that says it takes 4 GB",
        lzf_that_claims,
        "takes more than 27,648 bytes",
    ),
    Attack(
        "gzip twice",
        challenge(img=filtered((h5py.h5z.FILTER_DEFLATE, 9), (h5py.h5z.FILTER_DEFLATE, 9))),
        "may occur once",
    ),
    Attack(
        "shuffle behind gzip",
        challenge(img=filtered((h5py.h5z.FILTER_DEFLATE, 9), (h5py.h5z.FILTER_SHUFFLE, 1))),
        "shuffle before gzip",
    ),
    Attack("an unknown filter", challenge(img=filtered((32_015, 3))), "img has filter 32015 .*are read"),
    Attack(
        "scaleoffset",
        challenge(img=lambda g, n: g.create_dataset(n, data=PIXELS.reshape(SHAPE), scaleoffset=4)),
        "img has filter 6",
    ),
    Attack(
        "a chunk of 1.2 GB",
        challenge(
            img=compressed(SHAPE, b"x", maxshape=(None,) * 3, chunks=(3, 20000, 20000)),
        ),
        r"a chunk of img takes 1,200,000,000 bytes",
    ),
    Attack("never written", challenge(img=plain_array(SHAPE)), "more numbers than were written"),
    Attack(
        "never written, nor filled",
        challenge(img=plain_array(SHAPE, chunks=SHAPE, fill_time="never")),
        "more numbers than were written",
    ),
    Attack("written in part", challenge(img=compressed(SHAPE, gzip_of(9216), chunks=(1, 96, 96))), LATER),
    Attack("img is a soft link", challenge(img=linked(h5py.SoftLink("/0/label"))), "img is a link"),
    Attack("img is an external link", challenge(img=linked(h5py.ExternalLink("/etc/passwd", "/x"))), "img is a link"),
    Attack("label is a soft link", challenge(label=linked(h5py.SoftLink("/0/metadata"))), "label is a link"),
    Attack("img in another file", challenge(img=plain_array(SHAPE, external=[("/etc/passwd", 0, 27648)])), OTHER),
    Attack("metadata in another file", challenge(metadata=plain_array((9,), external=[("/etc/passwd", 0, 9)])), "lie"),
    Attack("img is virtual", challenge(img=virtual), OTHER),
    Attack("img is virtual, of itself", challenge(img=virtual_of_itself), OTHER),
    Attack("label is an object reference", challenge(label=references(h5py.ref_dtype)), "label holds no numbers"),
    Attack("label is a region reference", challenge(label=references(h5py.regionref_dtype)), "label holds no numbers"),
    Attack("metadata is text", challenge(metadata="centre 3"), "metadata is text"),
    Attack("label is a record", challenge(label=np.array([(1, 2)], [("a", "i4"), ("b", "f8")])), "no numbers"),
    Attack("label is empty", challenge(label=h5py.Empty("i8")), "label is empty"),
    Attack("img is complex", challenge(img=np.zeros(SHAPE, "c8")), "img holds no numbers"),
    Attack("img is bytes", challenge(img=np.zeros(SHAPE, "S4")), "img is text"),
    Attack("a type of lists, 400 deep", challenge(metadata=nested(400)), "metadata holds no numbers"),
    Attack("numbers of 4,096 bytes each", challenge(metadata=huge_numbers), "metadata holds no numbers"),
    Attack(
        "metadata of 10^12 numbers",
        challenge(metadata=plain_array((10**12,), "f8", chunks=(1000,))),
        "than were written",
    ),
    Attack("metadata of 5,000 numbers", challenge(metadata=np.zeros(5000)), "4096 numbers are read at most"),
    Attack(
        "metadata whose chunk inflates to 256 MB",
        challenge(metadata=compressed((4096,), gzip_of(2**28), "f8")),
        "is too large",
    ),
    Attack(
        "metadata in a chunk of 80 MB",
        challenge(metadata=compressed((4096,), b"x", "f8", chunks=(10**7,), maxshape=(None,))),
        "a chunk of metadata takes 80,000,000 bytes",
    ),
    Attack("a centre of 1e300", challenge(metadata=[1e300]), "a whole number"),
    Attack("a centre that is NaN", challenge(metadata=[np.nan]), "a whole number"),
    Attack("a key that is a soft link", linked_key(h5py.SoftLink("/0")), r"key 1 is not a group \(1 is a link\)"),
    Attack("a key that is an external link", linked_key(h5py.ExternalLink("other.h5", "/0")), "1 is a link"),
    Attack("a thousand keys of one group", same_group, ""),
    Attack("a source of 2,000 long texts", many_sources, ""),
]

# -- PCam's files ------------------------------------------------------------------------------------------


def pcam(x: Any = None, y: Any = None) -> Callable[[Path], Callable[[], Rows]]:
    """Two images and their labels in one file."""

    def make(folder: Path) -> Callable[[], Rows]:
        with h5py.File(folder / "train.h5", "w") as file:
            for name, value in {"x": x, "y": y}.items():
                if callable(value):
                    value(file, name)
                else:
                    file[name] = np.stack([PIXELS.reshape(96, 96, 3)] * 2) if name == "x" else [0, 1]
        return lambda: PcamRows(folder / "train.h5")

    return make


TWO = (2, 96, 96, 3)
PCAM = [
    Attack("PCam: plain", pcam(), ""),
    Attack("PCam: 10^9 images", pcam(plain_array((10**9, 96, 96, 3), chunks=ROW)), "than were written"),
    Attack(
        "PCam: 10^9 images, one of them written",
        pcam(compressed((10**9, 96, 96, 3), gzip_of(27648), chunks=ROW)),
        "than were written|this size can hold",
    ),
    Attack("PCam: a chunk that inflates to 1 GB", pcam(compressed(TWO, gzip_of(2**30), chunks=ROW)), "is too large"),
    Attack(
        "PCam: chunks of 300 images",
        pcam(compressed(TWO, b"x", chunks=(300, 96, 96, 3), maxshape=(None, 96, 96, 3))),
        "a chunk of x takes 8,294,400 bytes",
    ),
    Attack(
        "PCam: chunks of a pixel of each of 27,000 images",
        pcam(compressed((27_000, 96, 96, 3), bytes(750_000), chunks=(27_000, 1, 1, 1))),
        "reading a part of x",
    ),
    Attack("PCam: x is a group", pcam(lambda file, name: file.create_group(name)), "x is not an array"),
    Attack("PCam: x in another file", pcam(plain_array(TWO, external=[("/etc/passwd", 0, 2 * 27648)])), "another file"),
    Attack("PCam: x is an external link", pcam(linked(h5py.ExternalLink("other.h5", "/x"))), "x is a link"),
    Attack("PCam: 10^12 labels", pcam(y=plain_array((10**6,) * 2, chunks=(1, 9))), "than were written"),
    Attack("PCam: labels that inflate to 256 MB", pcam(y=compressed((2,), gzip_of(2**28))), "is too large"),
    Attack(
        "PCam: labels in a chunk of 10 MB",
        pcam(y=compressed((2,), b"x", chunks=(10**7,), maxshape=(None,))),
        "a chunk of y takes 10,000,000 bytes",
    ),
    Attack("PCam: labels are text", pcam(y=lambda f, n: f.create_dataset(n, data=["a", "b"])), "y is text"),
    Attack("PCam: labels are a link", pcam(y=linked(h5py.SoftLink("/x"))), "y is a link"),
]

# -- WILDS -------------------------------------------------------------------------------------------------


def wilds(table: str, picture: Callable[[Path], object] | None = None) -> Callable[[Path], Callable[[], Rows]]:
    """A table, and the picture of `LINE`."""

    def make(folder: Path) -> Callable[[], Rows]:
        (folder / "metadata.csv").write_bytes(table.encode("utf-8", "surrogateescape"))
        path = folder / PICTURE
        path.parent.mkdir(parents=True)
        (picture or (lambda path: Image.new("RGB", (96, 96)).save(path)))(path)
        return lambda: WildsRows(folder / "metadata.csv", "train")

    return make


def many_rows(size: int) -> str:
    """A table of so many bytes, its rows as short as they may be."""
    rows = []
    while size > 0:
        rows.append(f"{len(rows)},004,4,1,2,1,0,0,0\n")
        size -= len(rows[-1])
    return HEADER + "".join(rows)


def blank(size: tuple[int, int], kind: str, mode: str = "1") -> Callable[[Path], object]:
    """A picture of so many black pixels."""
    return lambda path: Image.new(mode, size).save(path, kind)


WILDS = [
    Attack("WILDS: plain", wilds(HEADER + LINE), ""),
    Attack("WILDS: a table of 33 MB", wilds(many_rows(2**25 + 2**20)), r"33,554,432 are read at most"),
    Attack("WILDS: a table of 2 MB, one picture", wilds(many_rows(2**21).replace(",1,2,", ",2,2,")), "no such picture"),
    Attack("WILDS: the path of another folder", wilds(HEADER + LINE.replace("004", "../../etc")), "three digits"),
    Attack("WILDS: digits of another script", wilds(HEADER + LINE.replace("004", "٠٠٤")), "three digits"),
    Attack("WILDS: a node that is a path", wilds(HEADER + LINE.replace(",4,", ",/etc,")), "node is '/etc'"),
    Attack("WILDS: an index of 1e300", wilds(HEADER + "1e300" + LINE[1:]), "the index is '1e300', not a whole number"),
    Attack("WILDS: an index of 1_0", wilds(HEADER + "1_0" + LINE[1:]), "the index is '1_0', not a whole number"),
    Attack("WILDS: an index twice", wilds(HEADER + LINE * 2), "2 rows have the index 0"),
    Attack("WILDS: a coordinate of 1e999", wilds(HEADER + LINE.replace(",1,2,", ",1e999,2,")), "x_coord is '1e999'"),
    Attack("WILDS: a center that is NaN", wilds(HEADER + "0,004,4,1,2,1,0,nan,0\n"), "center is 'nan'"),
    Attack("WILDS: a cell of 200,000 letters", wilds(HEADER + "0," + "a" * 200_000 + LINE[5:]), "line 2: longer than"),
    Attack("WILDS: a million cells in a line", wilds(HEADER + "0," * 10**6), "line 2: longer than 4,096 characters"),
    Attack("WILDS: a row of quoted lines", wilds(HEADER + '"\n",' * 10**5), "line 2: a quote without its end"),
    Attack("WILDS: a header of 5,000 columns", wilds("x," * 5000), "line 1: longer than"),
    Attack("WILDS: a column twice", wilds(HEADER.replace("slide", "center") + LINE), "two columns center"),
    Attack(
        "WILDS: 2,000 hospitals",
        wilds(HEADER + "".join(f"{i},004,4,1,2,1,0,{i + 3},0\n" for i in range(2000))),
        "more than 1,000 different pairs",
    ),
    Attack("WILDS: no UTF-8", wilds(HEADER + LINE.replace("004", "\udcff")), "cannot be read as a table"),
    Attack("WILDS: a NUL", wilds(HEADER + LINE.replace("004", "0\0004")), "three digits|cannot be read as a table"),
    Attack("WILDS: a picture of 9,000²", wilds(HEADER + LINE, blank((9000, 9000), "PNG")), "9000×9000 pixels"),
    Attack("WILDS: a picture of 12,000²", wilds(HEADER + LINE, blank((12000, 12000), "PNG")), "12000×12000 pixels"),
    Attack(
        "WILDS: a picture of 20,000²", wilds(HEADER + LINE, blank((20000, 20000), "PNG")), "cannot be read as a PNG"
    ),
    Attack("WILDS: a BMP", wilds(HEADER + LINE, blank((96, 96), "BMP")), "cannot be read as a PNG"),
]


ATTACKS = [*CHALLENGE, *PCAM, *WILDS]


def main() -> None:
    """Print the table."""
    print(f"{'attack':58s}{'bytes':>12s}{'MiB':>8s}{'s':>7s}  answer")
    for attack in ATTACKS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = attempt(attack, Path(folder))
        answer = outcome.message.replace(folder, "").partition(". ")[0].lstrip("/") or "read"
        print(f"{attack.name:58s}{outcome.sent:12,}{outcome.peak:8.0f}{outcome.seconds:7.2f}  {answer[:120]}")


if __name__ == "__main__":
    main()
