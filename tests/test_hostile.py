"""Files from strangers: refused with one clear error that changes nothing, at no cost, or read to what they say.

Each case was found by reading, or by ``python -m tests.fuzz``, whose corpus is under ``corpus`` in part.
"""

import contextlib
import copy
import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from conftest import NO_DIGEST, dense_delta, need, peak, randomise, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora import CheckpointError
from convlora._checkpoint.files import LIMIT, VALUES, plain, strict_json

TENSORS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
FACTOR = PREFIX + "stem.lora_A.weight"


def refused(base, path, message, **arguments):
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=message):
        convlora.load_adapter(base, path, **arguments)
    assert snapshot(base) == before


@pytest.fixture
def saved(net, tmp_path):
    base = copy.deepcopy(net)
    convlora.inject(net, 3)
    randomise(net)
    convlora.save_adapter(net, tmp_path / "adapter")
    return base, tmp_path / "adapter"


def rewrite(directory, change):
    """The file with its manifest and tensors changed, and digests that are right: as an attacker writes it."""
    data = (directory / TENSORS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    manifest = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["convlora"])
    tensors = load_file(directory / TENSORS)
    change(manifest, tensors)
    save_file(tensors, directory / TENSORS, metadata={"convlora": json.dumps(manifest), **NO_DIGEST})
    (directory / TENSORS).write_bytes(fuzz.reseal((directory / TENSORS).read_bytes()))


def raw(file, header, body=b"", length=None):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


# ---- the header


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, body, length, message",
    [
        (b"{}", b"", 2**62, r"its header would have 4611686018427387904"),
        (b"[]", b"", None, r"no JSON object"),
        (b"{" * 50, b"", None, r"damaged"),
        (b"[" * 100_000, b"", None, r"damaged"),
        (b'{"a": 1, "a": 2}', b"", None, r"the key 'a' occurs twice"),
        (b'{"a": NaN}', b"", None, r"NaN is not a JSON number"),
        (b'{"\xff": 1}', b"", None, r"damaged"),
        ({"__metadata__": {"convlora": 3}}, b"", None, r"metadata are no texts"),
        ({"a": 3}, b"", None, r"'a' has no dtype, shape and data_offsets"),
        ({"a": entry("F99")}, bytes(4), None, r"'a' is of dtype 'F99'"),
        ({"a": entry(shape=(-1,))}, bytes(4), None, r"'a' has shape \[-1\]"),
        ({"a": entry(shape=(True,))}, bytes(4), None, r"'a' has shape \[True\]"),
        ({"a": entry(shape=(1.0,))}, bytes(4), None, r"'a' has shape \[1\.0\]"),
        ({"a": entry(shape=(10**12,))}, bytes(4), None, r"which do not go together"),
        ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", None, r"which do not go together"),
        ({"a": entry(), "b": entry()}, bytes(4), None, r"'b' does not begin where the tensor before it ends"),
        ({"a": entry(offsets=(4, 8))}, bytes(8), None, r"'a' does not begin where"),
        ({"a": entry()}, bytes(9), None, r"its tensors take 4 bytes, and it holds 9"),
        ({"a": entry()}, b"", None, r"its tensors take 4 bytes, and it holds 0"),
        ({"a\x1b[2J": entry()}, bytes(4), None, r"is no name of a tensor"),
        ({"a\ud800": entry()}, bytes(4), None, r"is no name of a tensor"),
        ({"a." * 10**6: entry()}, bytes(4), None, r"is no name of a tensor"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str) else "",
)
def test_a_header_that_claims_what_is_not_so(net, tmp_path, header, body, length, message):
    raw(tmp_path / TENSORS, header, body, length)
    refused(net, tmp_path, message)


def test_a_header_beyond_the_limit_is_not_parsed(net, tmp_path):
    raw(tmp_path / TENSORS, b"{" + b" " * LIMIT + b"}")
    refused(net, tmp_path, rf"its header has {LIMIT + 2} bytes; the limit is {LIMIT}")


def full_of(unit, count):
    """A JSON array of so many of these, and filled up to the limit by a text of which each letter takes four bytes."""
    text = "[" + unit * count + '"'
    return (text + "\U0001f600" + "x" * (LIMIT - len(text) - 6) + '"]').encode()


def table_of(value, values, before="", after=""):
    """A JSON object of as many keys as are read, each with this value."""
    return (before + "{" + ",".join(f'"{n:x}":{value}' for n in range((VALUES - 99) // values)) + "}" + after).encode()


EMPTY = '{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
DENSE = {
    "objects": full_of("{},", VALUES // 2 - 8),
    "filled objects": full_of('{"a":1},', VALUES // 2 - 8),
    "lists": full_of("[[]],", VALUES // 3 - 8),
    "texts": full_of('"ab",', VALUES - 8),
    "too many": full_of("{},", LIMIT // 3 - 40),
    "keys": table_of("0", 1),
    "metadata": table_of('""', 1, '{"__metadata__":', "}"),
    "tensors": table_of(EMPTY, 7),
    "own tensors": table_of(EMPTY, 7).replace(b"{", b'{"__metadata__":{"convlora":"{}"},', 1),
    "fields": table_of("3", 1).replace(b"{", b'{"peft_type":"LORA",', 1),
}
CONFIGURATIONS = {
    "fields of a configuration": DENSE["fields"],
    "alphas of a configuration": table_of("3", 1, '{"peft_type":"CONVLORA","alpha_pattern":', "}"),
    "no alphas": table_of('"3"', 1, '{"peft_type":"CONVLORA","alpha_pattern":', "}"),
    "modules of a configuration": table_of("3", 1, '{"peft_type":"CONVLORA","modules_to_save":[', "]}"),
}


@pytest.mark.parametrize("kind", [*DENSE, *CONFIGURATIONS])
def test_a_text_full_of_small_values_takes_no_more_memory_than_is_said(peft_like, kind):
    """Python takes up to 35 times the text's own length for them; ``docs/threat-model.md`` says 128 MiB at most."""
    base, directory = peft_like()
    if kind in DENSE:
        raw(directory / TENSORS, DENSE[kind])
    else:
        (directory / CONFIG).write_bytes(CONFIGURATIONS[kind])
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            convlora.load_adapter(base, directory)
        assert tracemalloc.get_traced_memory()[1] < 128 * 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_would_not_be_read_is_not_written(monkeypatch, saved):
    base, directory = saved
    model, before = convlora.load_adapter(base, directory), (directory / TENSORS).read_bytes()
    for name in ("LIMIT", "VALUES"):
        with monkeypatch.context() as patch:
            patch.setattr(f"convlora._checkpoint.files.{name}", 100)
            with pytest.raises(CheckpointError, match=r"The adapter has too many tensors: adapt fewer layers"):
                convlora.save_adapter(model, directory)
        assert (directory / TENSORS).read_bytes() == before


def sparse(file, header, size):
    raw(file, header)
    start = file.stat().st_size
    try:
        os.truncate(file, start + size)
    except OSError as cause:
        pytest.skip(f"no sparse files here: {cause}")


@pytest.mark.parametrize("kind", ["peft", "locon", "own"])
def test_a_rank_of_ten_million_in_a_file_as_large_costs_nothing(saved, kind):
    base, directory = saved
    rank = 10**7
    sizes = {"A": (rank, 3, 3, 3), "B": (16, rank, 1, 1)}
    names = {"A": FACTOR, "B": FACTOR.replace("_A", "_B")}
    if kind == "locon":
        names = {"A": "lora_stem.lora_down.weight", "B": "lora_stem.lora_up.weight"}
    header, end = {}, 0
    for side, shape in sizes.items():
        header[names[side]] = entry(shape=shape, offsets=(end, end := end + 4 * int(np.prod(shape))))
    if kind == "own":
        data = (directory / TENSORS).read_bytes()
        metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
        manifest = json.loads(metadata["convlora"])
        manifest["plan"]["layers"][0]["rank"], manifest["format"] = rank, 1
        header["__metadata__"] = {"convlora": json.dumps(manifest)}
    file = directory / ("x.safetensors" if kind == "locon" else TENSORS)
    before = peak()
    sparse(file, header, end)
    message = {"own": r"stem: rank 10000000 in the file", "peft": r"rank 10000000", "locon": r"rank 10000000"}[kind]
    refused(base, file if kind == "locon" else directory, message)
    assert peak() - before < 200  # MiB; the tensors claim 1,600


@pytest.mark.parametrize("rank", [10**9, 10**30])
def test_a_configuration_may_claim_any_rank(saved, rank):
    """peft's r is what was asked for; the tensors have their own, and their memory is all that is taken."""
    base, directory = saved
    save_file(load_file(directory / TENSORS), directory / TENSORS)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"peft_type": "CONVLORA", "r": rank}))
    before = peak()
    try:
        convlora.load_adapter(base, directory)
        assert base.stem.convlora["default"].lora_A.shape[0] == 3
    except CheckpointError as error:
        assert "no layer has so high a rank" in str(error)
    assert peak() - before < 100


# ---- the manifest


def listed(manifest):
    return manifest["plan"]["layers"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, t: m["plan"].update(alpha=1e300), r"alpha=1e\+300"),
        (lambda m, t: listed(m).update(scaling=1e300), r"scaling of stem=1e\+300"),
        (lambda m, t: listed(m).update(scaling=10**400), r"scaling of stem"),
        (lambda m, t: m["plan"].update(rank=10**30), r"no layer has so high a rank"),
        (lambda m, t: m["plan"].update(adapter_name="de\u200bfault"), r"adapter_name='de\\u200bfault'"),
        (lambda m, t: m["plan"].update(model="\x1b[2J"), r"is no text to show"),
        (lambda m, t: m["plan"]["skipped"].append(listed(m) | {"name": "x"}), r"skipped layer has a rank"),
        (lambda m, t: m["plan"].update(base_parameters="many"), r"'many' is no number of parameters"),
        (lambda m, t: m["plan"]["norms"].append("block.3"), r"block\.3: a norm with statistics in the file, a Conv2d"),
        (lambda m, t: m.update(format=True), r"is of format True"),
        (lambda m, t: t.update({FACTOR: t[FACTOR].to(torch.float8_e4m3fn)}), r"stem\.lora_A\.weight: .* float8"),
        (lambda m, t: t.update({PREFIX + "ѕtem.lora_A.weight": t.pop(FACTOR)}), r"\\u0455tem\.lora_A\.weight"),
        (lambda m, t: t[FACTOR].view(-1)[0].fill_(float("nan")), r"stem\.lora_A\.weight: holds NaN or Inf"),
        (lambda m, t: t[PREFIX + "fc.bias"][0].fill_(float("inf")), r"fc\.bias: holds NaN or Inf"),
    ],
)
def test_a_manifest_with_right_digests_that_lies(saved, change, message):
    base, directory = saved
    rewrite(directory, change)
    refused(base, directory, message)


def test_a_layer_that_is_there_under_two_names_is_adapted_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)
            self.b = self.a

    base = Twice()
    model = convlora.inject(copy.deepcopy(base), 2, modules_to_save=None)
    randomise(model)
    convlora.save_adapter(model, tmp_path)

    def twice(m, t):
        m["plan"]["layers"].append(listed(m) | {"name": "b"})
        t.update({key.replace("model.a.", "model.b."): tensor.clone() for key, tensor in list(t.items())})

    rewrite(tmp_path, twice)
    refused(base, tmp_path, r"b: a layer that the file adapts under another name already")


def test_nan_is_saved_with_a_warning_refused_on_load_and_read_when_asked_for(net, tmp_path):
    base = copy.deepcopy(net)
    convlora.inject(net, 2)
    randomise(net)
    with torch.no_grad():
        net.stem.convlora["default"].lora_B[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"stem\.lora_B\.weight: holds NaN or Inf: the training has diverged"):
        convlora.save_adapter(net, tmp_path)
    refused(base, tmp_path, r"(?s)stem\.lora_B\.weight: holds NaN or Inf\n.*check_finite=False")
    convlora.load_adapter(base, tmp_path, check_finite=False)
    assert torch.equal(base.stem.convlora["default"].lora_B, net.stem.convlora["default"].lora_B) is False
    assert base.stem.convlora["default"].lora_B.isnan().sum() == 1


def test_inf_that_the_base_holds_as_well_is_the_adapters_right(tmp_path):
    """A mask of −∞ in a module that is trained in full."""

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(8, 2)
            self.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]))

    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), Masked())
    model = convlora.inject(copy.deepcopy(base), 2, modules_to_save=["2"])
    randomise(model)
    with torch.no_grad():
        model[2].mask[1] = -torch.inf
    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(base, tmp_path)


def load_each_flip(base, directory, places):
    """Load the file once for each place, a byte and a bit of it, with that bit flipped alone; how many were refused."""
    data, before = (directory / TENSORS).read_bytes(), snapshot(base)
    for at, bit in places:
        with (directory / TENSORS).open("rb+", buffering=0) as file:
            file.seek(at)
            file.write(bytes([data[at] ^ (1 << bit)]))
            with pytest.raises(CheckpointError):
                convlora.load_adapter(base, directory)
                pytest.fail(f"bit {bit} of byte {at} may be flipped: {data[max(0, at - 20) : at + 20]!r}")
            file.seek(at)
            file.write(data[at : at + 1])
    assert snapshot(base) == before
    convlora.load_adapter(base, directory)
    return len(places)


def test_every_flipped_bit_of_a_file_is_refused(tmp_path):
    """Of its length, header and tensors; also those that make it look like an older file, or like peft's."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2))
    model = convlora.inject(copy.deepcopy(base), 1)
    randomise(model)
    convlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORA"  # which would be read, were it not ours
    size = (tmp_path / TENSORS).stat().st_size
    assert load_each_flip(base, tmp_path, [(at, bit) for at in range(size) for bit in range(8)]) > 10_000


def test_flipped_bits_of_a_file_with_a_head_and_statistics_are_refused(saved):
    base, directory = saved
    choose, size = np.random.default_rng(0), (directory / TENSORS).stat().st_size
    load_each_flip(base, directory, [(int(choose.integers(size)), int(choose.integers(8))) for _ in range(200)])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"norm": "track"}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_every_flipped_bit_of_larger_files_is_refused(net, tmp_path, options):
    base = copy.deepcopy(net)
    randomise(convlora.inject(net, 1, target_modules=["stem"], **options))
    convlora.save_adapter(net, tmp_path)
    size = (tmp_path / TENSORS).stat().st_size
    load_each_flip(base, tmp_path, [(at, bit) for at in range(size) for bit in range(8)])


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: texts.pop("convlora_digest"),
        lambda texts: texts.update(convlora_digest="0" * 16),
        lambda texts: texts.update(convlora_digest=""),
        lambda texts: texts.update(convlora_digest="sha256:" + "0" * 64),
        lambda texts: texts.pop("convlora"),  # a peft file then, by its configuration
        lambda texts: texts.update(convlora=texts["convlora"].replace('"format": 3', '"format": 1')),
    ],
)
def test_a_header_with_another_digest_or_none_is_refused(peft_like, change):
    base, directory = peft_like()
    convlora.save_adapter(convlora.load_adapter(copy.deepcopy(base), directory), directory)
    data = (directory / TENSORS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header["__metadata__"])
    raw(directory / TENSORS, json.dumps(header, separators=(",", ":")).encode(), data[start:])
    refused(base, directory, r"its header is not what was saved|its header has no digest")


def test_a_file_cut_at_any_length_is_refused(saved):
    base, directory = saved
    data = (directory / TENSORS).read_bytes()
    for length in {*range(0, 40), *range(40, len(data), len(data) // 40), len(data) - 1}:
        (directory / TENSORS).write_bytes(data[:length])
        refused(base, directory, "damaged or no safetensors file")


# ---- the file system


def test_links_are_followed_to_read_and_replaced_to_write(saved, tmp_path):
    """The cache of the hub is made of links; a link in a folder that is written to must not lead the write away."""
    base, directory = saved
    real = directory / TENSORS
    real.rename(tmp_path / "blob")
    real.symlink_to(tmp_path / "blob")
    model = convlora.load_adapter(copy.deepcopy(base), directory)
    before = (tmp_path / "blob").read_bytes()
    randomise(model, seed=4)
    convlora.save_adapter(model, directory)
    assert (tmp_path / "blob").read_bytes() == before and not real.is_symlink()


@pytest.mark.parametrize("name", [TENSORS, CONFIG, "README.md"])
def test_nothing_waits_for_a_pipe(saved, name):
    base, directory = saved
    save_file(load_file(directory / TENSORS), directory / TENSORS)  # peft's, as far as it tells
    (directory / name).unlink()
    os.mkfifo(directory / name)
    if name == "README.md":
        model = convlora.inject(base, 2)
        randomise(model)
        with pytest.warns(UserWarning, match="is kept"):
            convlora.save_adapter(model, directory)
    else:
        refused(base, directory, "does not exist|holds no convlora manifest")


def test_a_name_that_leads_elsewhere_is_only_a_name(saved, tmp_path):
    base, directory = saved
    convlora.load_adapter(base, directory, adapter_name="a/b/c")
    files = sorted(tmp_path.rglob("*"))
    convlora.save_adapter(base, directory)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_at_any_point_of_a_save_keeps_the_old_adapter(small_disk, net):
    base, directory = copy.deepcopy(net), small_disk / "adapter"
    convlora.inject(net, 3)
    randomise(net)
    convlora.save_adapter(net, directory)
    outcomes = set()
    for left in range(0, 128 * 1024, 4096):
        before = {file.name: file.read_bytes() for file in directory.iterdir()}
        randomise(net, seed=left + 2)
        free = os.statvfs(small_disk)
        (small_disk / "full").write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - left)))
        try:
            convlora.save_adapter(net, directory)
        except CheckpointError as error:
            assert "What was there before is still there" in str(error)
            assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
            outcomes.add("refused")
        else:
            loaded = convlora.load_adapter(copy.deepcopy(base), directory)
            assert all(map(torch.equal, convlora.adapter_parameters(loaded), convlora.adapter_parameters(net)))
            outcomes.add("saved")
        (small_disk / "full").unlink()
    assert outcomes == {"refused", "saved"}


@contextlib.contextmanager
def as_nobody():
    """As a user who owns nothing."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def others(net):
    """A base, and root's directory with an adapter, which all may read."""
    if not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("root alone can be somebody else")
    folder = Path(tempfile.mkdtemp())
    base = copy.deepcopy(net)
    convlora.inject(net, 2)
    randomise(net)
    convlora.save_adapter(net, folder / "adapter")
    for path in (folder, folder / "adapter"):
        path.chmod(0o755)
    convlora.load_adapter(copy.deepcopy(base), folder / "adapter")  # imports what it needs while it may
    yield base, net, folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("where", ["adapter", "new"])
def test_a_directory_of_another_user_is_read_and_not_written(others, where):
    base, model, folder = others
    before = {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}
    with as_nobody():
        with pytest.raises(CheckpointError, match="cannot be written"):
            convlora.save_adapter(model, folder / where)
        convlora.load_adapter(base, folder / "adapter")
    assert {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()} == before
    assert [each.name for each in folder.iterdir()] == ["adapter"]


@pytest.mark.parametrize("what", ["adapter", f"adapter/{TENSORS}"])
def test_what_another_user_may_not_read_is_refused(others, what):
    base, _, folder = others
    (folder / what).chmod(0)
    with as_nobody():
        refused(base, folder / "adapter", "cannot be read")


def test_a_configuration_or_card_of_another_user_in_a_directory_that_all_write(others):
    _, model, folder = others
    (folder / "adapter").chmod(0o777)
    (folder / "adapter" / CONFIG).chmod(0)
    before = {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}
    with as_nobody(), pytest.raises(CheckpointError, match="cannot be written"):
        convlora.save_adapter(model, folder / "adapter")
    assert {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()} == before


# ---- peft's and LoCon's files


@pytest.fixture
def peft_like(saved):
    base, directory = saved
    save_file(load_file(directory / TENSORS), directory / TENSORS)
    config = json.loads((directory / CONFIG).read_text()) | {"peft_type": "CONVLORA"}

    def write(**change):
        (directory / CONFIG).write_text(json.dumps(config | change))
        return base, directory

    return write


@pytest.mark.parametrize(
    "change, message",
    [
        *(
            ({"alpha_pattern": {pattern: 1}}, r"is a regular expression; list the layers' names")
            for pattern in (
                *(
                    "([a-z0-9.]+)+!",
                    "(?x:([a-z0-9.]+) +)!",
                    ".*.*.*.*!",
                    "a?a?a?a?a?!",
                    "a{99999999999999999999}",
                    ".*",
                ),
                *("(" * 5000, "(?i)stem", "a|b", "[ab]", "", "^", "a$b", r"\d", r"\Astem", "\\"),
            )
        ),
        (
            {"alpha_pattern": {"a" * length + "." * dots + "b": 1 for length in range(40) for dots in range(40)}},
            r"patterns of 1600 forms; the limit is 1000",
        ),
        ({"alpha_pattern": [1]}, r"it must be a table of names"),
        ({"alpha_pattern": {"stem": "x"}}, r"each must be a finite number above 0"),
        ({"alpha_pattern": {"stem": [1]}}, r"each must be a finite number above 0"),
        ({"lora_alpha": "x"}, r"lora_alpha='x'"),
        ({"lora_alpha": 10**400}, r"lora_alpha"),
        ({"lora_alpha": None}, r"lora_alpha=None"),
        ({"lora_dropout": "x"}, r"dropout='x'"),
        ({"r": "x"}, r"rank='x'"),
    ],
    ids=str,
)
def test_a_configuration_that_would_hang_or_crash(peft_like, change, message):
    refused(*peft_like(**change), message)


@pytest.mark.parametrize(
    "patterns",
    [
        {"stem": 7, "block.3": 3},
        {r"^block\.3$": 3, "3": 4, "block.0": 5},
        {"3": 4, r"^block\.3$": 3},
        {"block_3": 2, "lock.3": 3, r"block\.3": 4},
        {"^block.3": 3, "^3": 4, "^stem$": 5, r"\^stem": 6},
        {"st.m": 2, r"st\.m": 3, "....": 4, ".......": 5},
        {".": 2, "..3": 3, "k.3": 4},
    ],
    ids=str,
)
def test_an_alpha_is_looked_up_as_in_peft(peft_like, patterns):
    base, directory = peft_like(alpha_pattern=patterns, lora_alpha=9)
    convlora.load_adapter(base, directory)
    for layer in convlora.summary(base).layers:
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer.name))
        assert layer.scaling == next(matching, 9) / layer.rank, layer.name


@pytest.mark.parametrize("text", ['{"r": 1, "r": 2}', '{"r": NaN}', '{"a":' * 100_000, "\ud800"])
def test_a_configuration_that_two_readers_could_read_otherwise(peft_like, text):
    base, directory = peft_like()
    (directory / CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(base, directory, r"adapter_config\.json cannot be read")
    (directory / CONFIG).write_text(" " * (LIMIT + 1))
    refused(base, directory, r"more than \d+ bytes")


def wide(**change):
    tensors = {"down.weight": torch.ones(2, 3, 3, 3), "up.weight": torch.ones(16, 2, 1, 1)}
    return {f"lycoris_stem.lora_{key}": t for key, t in (tensors | change).items() if t is not None}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (wide(**{"down.weight": torch.ones(())}), r"lora_down and lora_up must be matrices or kernels"),
        (wide(**{"up.weight": torch.ones(2)}), r"lora_down and lora_up must be matrices or kernels"),
        (wide() | {"lycoris_stem.alpha": torch.ones(2)}, r"alpha of shape \(2,\)"),
        (wide() | {"lycoris_stem.alpha": torch.ones(1, dtype=torch.complex64)}, r"it must be one real number"),
        (wide() | {"lycoris_stem.alpha": torch.tensor(float("nan"))}, r"stem: alpha=nan"),
        (wide() | {"lycoris_stem.alpha": torch.tensor(-1.0)}, r"stem: alpha=-1\.0"),
        (  # 4 MB that multiply to 4 TB
            wide(**{"down.weight": torch.ones(1, 10**6, 1, 1), "mid.weight": torch.ones(10**6, 1, 1, 1)}),
            r"its Tucker core \(1000000, 1, 1, 1\) does not fit its factors",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_locon_files_that_would_crash_or_grow(net, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    refused(net, tmp_path, message)


def two_by_two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 2, 2))


BYTES = {
    "LoCon": {"lora_unet_0.lora_down.weight": (1, 2, 2, 2), "lora_unet_0.lora_up.weight": (2, 1, 1, 1)},
    "LyCORIS": {
        "lycoris_0.lora_down.weight": (1, 2, 1, 1),
        "lycoris_0.lora_mid.weight": (1, 1, 2, 2),
        "lycoris_0.lora_up.weight": (2, 1),
    },
    "peft": {f"{PREFIX}0.lora_A.weight": (1, 2, 2, 2), f"{PREFIX}0.lora_B.weight": (2, 1, 1, 1)},
    "peft's configuration": {f"{PREFIX}0.lora_A.weight": (1, 2, 2, 2), f"{PREFIX}0.lora_B.weight": (2, 1, 1, 1)},
}


def change_of(kind, directory):
    """ΔW as the files say it, read by safetensors and json alone."""
    file = next(directory.glob("*.safetensors"))
    tensors = {key.split(".", 1)[1]: tensor.float() for key, tensor in load_file(file).items()}
    if kind.startswith("peft"):
        A, B = (tensors[f"model.0.lora_{side}.weight"] for side in "AB")
        config = json.loads((directory / CONFIG).read_text())
        # As peft looks it up: a pattern is a regular expression of the name's end.
        patterns = config.get("alpha_pattern", {}).items()
        default = config.get("lora_alpha", 8)
        alpha = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", "0")), default)
        return alpha * torch.einsum("or,riyx->oiyx", B.flatten(1), A)
    A, B = tensors["lora_down.weight"], tensors["lora_up.weight"].flatten(1)
    if "lora_mid.weight" in tensors:
        A = torch.einsum("rsyx,si->riyx", tensors["lora_mid.weight"], A.flatten(1))
    alpha = float(tensors.get("alpha", 0.0)) or 1.0  # 0 is the rank, as in kohya's scripts
    return alpha * torch.einsum("or,riyx->oiyx", B, A.view(1, 2, 2, 2))


def each_byte_otherwise(data, values):
    """The bytes with one of them changed, in each place; and cut at each length."""
    for at, byte in enumerate(data):
        for value in values(at, byte):
            yield data[:at] + bytes([value]) + data[at + 1 :]
    yield from (data[:length] for length in range(len(data)))


@pytest.mark.parametrize(
    "values",
    [
        lambda at, byte: [byte ^ (1 << at % 8)],
        pytest.param(lambda at, byte: range(256), marks=pytest.mark.slow),
    ],
    ids=["one flip", "every value"],
)
@pytest.mark.parametrize("kind", BYTES)
def test_foreign_files_byte_by_byte_are_refused_or_read_to_what_they_say(tmp_path, kind, values):
    base = two_by_two()
    tensors = {key: torch.randn(shape) for key, shape in BYTES[kind].items()}
    if not kind.startswith("peft"):
        tensors[f"{next(iter(tensors)).split('.')[0]}.alpha"] = torch.tensor(2.0)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": {"1": 3}, "bias": "none"}')
    file = tmp_path / (TENSORS if kind.startswith("peft") else "x.safetensors")
    save_file(tensors, file)
    changed = tmp_path / CONFIG if kind == "peft's configuration" else file
    convlora.remove(convlora.load_adapter(base, file if kind.startswith("L") else tmp_path))
    data, outcomes, before, memory = changed.read_bytes(), {"read": 0, "refused": 0}, snapshot(base), peak()
    for text in each_byte_otherwise(data, values):
        changed.write_bytes(text)
        try:
            convlora.load_adapter(base, file if kind.startswith("L") else tmp_path)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        torch.testing.assert_close(dense_delta(base[0]).detach(), change_of(kind, tmp_path), equal_nan=True)
        convlora.remove(base)
    assert snapshot(base) == before and peak() - memory < 64
    assert outcomes["read"] and outcomes["refused"] > 100


def test_what_an_error_shows_of_a_file_is_plain_and_short():
    assert plain("a\x1b[2Jb\u202ec") == "a\\x1b[2Jb\\u202ec" and len(plain("x" * 10**6)) < 400
    with pytest.raises(ValueError, match="twice"):
        strict_json('{"a": {"b": 1, "b": 1}}')


# ---- what the fuzzer found is refused or read


CORPUS = sorted((Path(__file__).parent / "corpus").glob("*"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    need("h5py")
    return fuzz.Target(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_each_input_of_the_corpus_is_read_or_refused(target, file):
    assert target(file.read_bytes()) in ("read", "refused")


def test_the_seeds_of_the_fuzzer_are_read(target):
    for data in fuzz.seeds():
        assert target(data) == "read", data[0]


@pytest.mark.parametrize("name", fuzz.READERS)
def test_what_is_fuzzed_is_there(name):
    if name.startswith("examples"):
        need("h5py")
    importlib.import_module(name)
