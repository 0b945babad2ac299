"""Adapters on disk: bit-equal after a round trip, atomic, and refused where they do not fit."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import NO_DIGEST, SmallNet, need, randomise, snapshot, with_header_digest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import convlora
from convlora import CheckpointError, StateError
from convlora._checkpoint import fitting

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
PREFIX = "base_model.model."
FACTOR = PREFIX + "stem.lora_A.weight"


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def saved(net, images, train, tmp_path):
    """A base, its trained adapter on disk, and what the trained model predicts."""
    base = copy.deepcopy(net)
    convlora.inject(net, 3, norm="track")
    train(net, images)
    convlora.save_adapter(net, tmp_path / "adapter")
    return base, tmp_path / "adapter", net.eval()(images)


@pytest.mark.parametrize("norm", ["freeze", "track"])
@pytest.mark.parametrize("extra", [{}, {"target_modules": (nn.Conv2d, nn.Linear)}, {"target_modules": ()}])
@pytest.mark.parametrize("merged", [False, True])
def test_reloaded_adapter_predicts_the_same_bits(net, images, train, tmp_path, norm, extra, merged):
    base = copy.deepcopy(net)
    convlora.inject(net, 3, norm=norm, alpha=5, **extra)
    train(net, images)
    expected = net.eval()(images)
    if merged:
        convlora.merge(net)
    assert convlora.save_adapter(net, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert convlora.load_adapter(base, tmp_path / "new" / "folder") is base
    assert torch.equal(base.eval()(images), expected)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    if not merged:
        assert {name: p.requires_grad for name, p in base.named_parameters()} == flags


def test_reloaded_adapter_trains_on_like_the_first(saved, images, train):
    base, directory, _ = saved
    first, second = (convlora.load_adapter(copy.deepcopy(base), directory) for _ in range(2))
    train(first, images)
    assert not torch.equal(first.eval()(images), second.eval()(images))
    train(second, images)
    assert torch.equal(first.eval()(images), second.eval()(images))


def test_loaded_then_removed_is_the_base(saved, images):
    base, directory, _ = saved
    before = snapshot(base)
    convlora.remove(convlora.load_adapter(base, directory))
    assert snapshot(base) == before


def test_file_holds_the_adapter_alone_and_no_pickle(saved):
    _, directory, _ = saved
    assert files_in(directory) == [CARD, CONFIG, TENSORS]
    with safe_open(directory / TENSORS, framework="pt") as file:
        keys = set(file.keys())
    assert "base_model.model.stem.lora_A.weight" in keys
    assert "base_model.model.fc.weight" in keys and "base_model.model.bn1.running_mean" in keys
    assert not any("hidden" in key or key.endswith("block.3.weight") for key in keys)


def test_another_adapter_name(saved, images):
    base, directory, expected = saved
    convlora.load_adapter(base, directory, adapter_name="clinic_b")
    assert convlora.summary(base).adapter_name == "clinic_b"
    assert "stem.convlora.clinic_b.lora_A" in base.state_dict()
    assert torch.equal(base.eval()(images), expected)


def test_half_precision_base_of_the_same_numbers_loads(saved, images):
    base, directory, _ = saved
    convlora.load_adapter(base.half(), directory)
    assert base.stem.convlora["default"].lora_A.dtype == torch.float32


def test_shared_modules_survive_the_round_trip(tmp_path, train, images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.b = self.a
            self.fc = nn.Linear(8, 2)
            self.again = self.fc

        def forward(self, x):
            return self.fc((self.a(x) + self.b(x)).mean((2, 3)))

    base = Twice()
    model = convlora.inject(copy.deepcopy(base), 2, norm="track")
    train(model, images)
    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(base, tmp_path)
    assert torch.equal(base.eval()(images), model.eval()(images))


# ---- what does not fit is refused, every mismatch named, the model untouched


def refused(base, directory, message, **arguments):
    before = snapshot(base)
    with pytest.raises(CheckpointError, match=message):
        convlora.load_adapter(base, directory, **arguments)
    assert snapshot(base) == before


def test_other_head_is_named(saved):
    _, directory, _ = saved
    refused(
        SmallNet(num_classes=5), directory, r"(?s)fc\.bias.*fc\.weight: \(3, 12\) in the file, \(5, 12\) in the model"
    )


def test_other_layers_are_all_named(saved):
    base, directory, _ = saved
    base.stem = nn.Conv2d(3, 16, 5, 2, 2, bias=False)
    base.block[0] = nn.Conv2d(16, 16, 3, 1, 2, dilation=2, groups=16)
    del base.block[3]
    refused(
        base,
        directory,
        r"(?s)stem: weight \(16, 3, 3, 3\) in the file, \(16, 3, 5, 5\) in the model; padding \[1, 1\].*"
        r"block\.0: padding.*dilation \[1, 1\] in the file, \[2, 2\] in the model.*"
        r"block\.3: Conv2d in the file, no such layer in the model.*Nothing was changed",
    )


def test_other_weights_of_the_base_are_named_and_can_be_allowed(saved):
    base, directory, _ = saved
    with torch.no_grad():
        base.hidden.bias += 1
        base.stem.weight += 1
    refused(base, directory, r"(?s)stem\.weight: the base's weights differ.*hidden\.bias.*check_base=False")
    convlora.load_adapter(base, directory, check_base=False)


@pytest.mark.parametrize(
    "digest, message",
    [
        ("float33:0123456789abcdef", r" \('float33' in the file, 'float32' here\)"),
        ("float16:0123456789abcde", r" \('float16' in the file, 'float32' here\)"),
        ("int32:0123456789abcdef", r" \('int32' in the file, 'float32' here\)"),
        ("Int8Tensor:0123456789abcdef", r" \('Int8Tensor' in the file, 'float32' here\)"),
        ("float32:0123456789abcdeg", r"\n"),
        ("", r" \('' in the file, 'float32' here\)"),
    ],
)
def test_a_base_digest_of_an_unknown_form_is_another_base(saved, digest, message):
    base, directory, _ = saved
    rewrite(directory, lambda m, t: m["base"].update({"stem.weight": digest}) is None)
    refused(base, directory, r"stem\.weight: the base's weights differ" + message)
    convlora.load_adapter(base, directory, check_base=False)


def test_a_base_digest_of_another_float_is_not_compared(saved):
    base, directory, _ = saved
    rewrite(directory, lambda m, t: m["base"].update({"stem.weight": "bfloat16:0123456789abcdef"}) is None)
    convlora.load_adapter(base, directory)


def test_a_file_of_format_1_which_has_no_digest_of_its_header_is_read():
    """Written by convlora before there was one."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    convlora.load_adapter(net, Path(__file__).with_name("format_1.safetensors"))
    for factor in convlora.adapter_parameters(net):
        assert torch.equal(factor.flatten(), torch.arange(factor.numel()).float())


def test_a_second_adapter_of_one_name_is_refused(saved):
    base, directory, _ = saved
    convlora.inject(base)
    with pytest.raises(StateError, match=r"There is an adapter 'default' already\. Give the new one another name"):
        convlora.load_adapter(base, directory)


def test_missing_directory(net, tmp_path):
    refused(net, tmp_path / "nowhere", r"nowhere.adapter_model\.safetensors does not exist; give the directory")


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_truncated_file(saved, length):
    base, directory, _ = saved
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(data[:length])
    refused(base, directory, r"adapter_model\.safetensors is damaged or no safetensors file")


def rewrite(directory, change):
    """The same file with its manifest or tensors changed."""
    with safe_open(directory / TENSORS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        manifest = json.loads(file.metadata()["convlora"])
    header = change(manifest, tensors)
    text = header if isinstance(header, str) else json.dumps(manifest)
    save_file(tensors, directory / TENSORS, metadata={"convlora": text, **NO_DIGEST})
    (directory / TENSORS).write_bytes(with_header_digest((directory / TENSORS).read_bytes()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, t: m.update(format=99), r"is of format 99, and this convlora reads formats up to 3: update"),
        (lambda m, t: m.pop("plan"), r"its manifest cannot be read \(KeyError\('plan'\)\)"),
        (lambda m, t: m["plan"].update(surprise=1), r"its manifest cannot be read"),
        (lambda m, t: "{", r"its manifest cannot be read"),
        (lambda m, t: "[1]", r"its manifest cannot be read"),
        (
            lambda m, t: t.pop("base_model.model.stem.lora_B.weight") is None,
            r"stem\.lora_B\.weight: nothing in the file",
        ),
        (lambda m, t: t.update(extra=torch.zeros(2)), r"tensor 'extra' belongs to no adapter"),
        (lambda m, t: t.update({PREFIX + "extra": torch.zeros(2)}), r"extra: \(2,\) in the file, nothing in the model"),
        (lambda m, t: t.update({FACTOR: t[FACTOR].long()}), r"stem\.lora_A\.weight: .* integer in the file"),
        (lambda m, t: t.update({FACTOR: t[FACTOR].bool()}), r"stem\.lora_A\.weight: .* bool in the file"),
        (lambda m, t: t[FACTOR].view(-1)[3].neg_() is None, r"damaged: stem\.lora_A\.weight is not what was saved"),
        (lambda m, t: m.update(buffers=["hidden.weight"]), r"hidden\.weight: no such buffer in the model"),
        (lambda m, t: m["plan"].update(alpha=-1.0), r"alpha=-1\.0; it must be a finite number above 0"),
        (
            lambda m, t: m["plan"].update(alpha=float("nan")),
            r"its manifest cannot be read \(.*NaN is not a JSON number",
        ),
        (lambda m, t: m["plan"].update(dropout=5.0), r"dropout=5\.0"),
        (lambda m, t: m["plan"].update(use_rslora="no"), r"use_rslora='no'"),
        (lambda m, t: m["plan"].update(adapter_name="a.b"), r"adapter_name='a\.b'"),
        (lambda m, t: m["plan"]["layers"][0].update(scaling="x"), r"scaling of stem='x'"),
        (lambda m, t: m["plan"]["layers"][0].update(rank=2.0), r"rank of stem=2\.0"),
        (lambda m, t: m["plan"]["layers"][0].update(geometry=None), r"geometry None"),
        (lambda m, t: m["plan"]["layers"].append(m["plan"]["layers"][0]), r"a layer is listed twice"),
        (lambda m, t: m["plan"]["layers"][0].update(name=["stem"]), r"\['stem'\] is not a layer name|cannot be read"),
        (lambda m, t: m["plan"]["modules_to_save"].append("stem"), r"stem: adapted and trained in full at once"),
        (lambda m, t: "[" * 100_000, r"its manifest cannot be read"),
        (lambda m, t: m.update(base=3), r"its manifest cannot be read"),
        (
            lambda m, t: m["plan"]["layers"][0].update(rank=4),
            r"stem\.lora_A\.weight: \(3, 3, 3, 3\) in the file, \(4, ",
        ),
        (lambda m, t: m["plan"]["layers"][0].update(rank=10**9), r"stem: rank 1000000000 in the file"),
        (lambda m, t: m["plan"]["modules_to_save"].append("tail"), r"tail: no such module in the model"),
    ],
)
def test_file_that_contradicts_itself(saved, change, message):
    base, directory, _ = saved
    rewrite(directory, change)
    refused(base, directory, message)


def test_safetensors_of_another_program(net, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / TENSORS)
    refused(net, tmp_path, "holds no convlora manifest")


def test_failed_save_keeps_the_old_adapter(saved, images, monkeypatch):
    base, directory, expected = saved
    model = convlora.load_adapter(copy.deepcopy(base), directory)
    randomise(model)

    def fails(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left.*still there"):
        convlora.save_adapter(model, directory)
    monkeypatch.undo()
    assert files_in(directory) == [CARD, CONFIG, TENSORS]
    assert torch.equal(convlora.load_adapter(base, directory).eval()(images), expected)


def test_saving_again_replaces(saved, images):
    base, directory, _ = saved
    model = convlora.load_adapter(copy.deepcopy(base), directory)
    randomise(model)
    convlora.save_adapter(model, directory)
    assert files_in(directory) == [CARD, CONFIG, TENSORS]
    assert torch.equal(convlora.load_adapter(base, directory).eval()(images), model.eval()(images))


def test_plain_model_and_several_parts_are_refused(net, tmp_path):
    with pytest.raises(StateError, match="carries no adapter"):
        convlora.save_adapter(net, tmp_path / "x")
    pair = nn.ModuleDict({"left": convlora.inject(SmallNet()), "right": convlora.inject(SmallNet())})
    with pytest.raises(StateError, match=r"several injected parts \(left, right\)"):
        convlora.save_adapter(pair, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_larger_network_of_the_same_layers_is_another_architecture(saved):
    base, directory, _ = saved
    base.block.append(nn.Conv2d(16, 16, 1))
    for check in (True, False):
        refused(base, directory, r"(?s)block\.4\.weight: only in the model's base.*same architecture", check_base=check)


def test_saving_what_was_never_trained_warns(net, tmp_path):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    convlora.inject(net)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"every lora_B is zero.*optimizer made before convlora\.inject"):
        convlora.save_adapter(net, tmp_path)


def test_files_are_as_readable_as_the_user_wants(saved):
    _, directory, _ = saved
    (directory / "mine").touch()
    assert {path.stat().st_mode for path in directory.iterdir()} == {(directory / "mine").stat().st_mode}


def test_place_that_cannot_be_written(net, tmp_path):
    convlora.inject(net)
    randomise(net)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file cannot be written"):
        convlora.save_adapter(net, tmp_path / "file")


def test_full_disk_keeps_the_old_adapter(saved, images):
    resource = need("resource")
    base, directory, expected = saved
    model = convlora.load_adapter(copy.deepcopy(base), directory)
    randomise(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written.*still there"):
            convlora.save_adapter(model, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert files_in(directory) == [CARD, CONFIG, TENSORS]
    assert torch.equal(convlora.load_adapter(base, directory).eval()(images), expected)


def test_loading_reads_each_tensor_of_the_base_once(saved, monkeypatch):
    base, directory, _ = saved
    hashed, digest = [], fitting.digest
    monkeypatch.setattr(fitting, "digest", lambda tensor: hashed.append(tensor.data_ptr()) or digest(tensor))
    convlora.load_adapter(base, directory)
    assert hashed and len(hashed) == len(set(hashed))


@pytest.mark.parametrize("export", [False, True])
def test_every_file_is_written_with_the_same_checks_and_warnings(net, tmp_path, export):
    def write():
        if export:
            convlora.export_adapter(net, tmp_path / "adapter.safetensors", "lycoris")
        else:
            convlora.save_adapter(net, tmp_path)

    convlora.inject(net, 3, modules_to_save=None)
    with pytest.warns(UserWarning, match="nothing was trained") as caught:
        write()
    assert caught[0].filename == __file__
    randomise(net)
    with torch.no_grad():
        next(iter(convlora.adapter_parameters(net))).flatten()[0] = torch.nan
    with pytest.warns(UserWarning, match="holds NaN or Inf: the training has diverged"):
        write()
    randomise(net)
    net.hidden.bias.requires_grad_(True)
    with pytest.raises(StateError, match=r"hidden\.bias requires a gradient but belongs to the base"):
        write()


def test_a_parameter_that_changed_without_a_gradient_is_named_when_another_librarys_file_is_written(net, tmp_path):
    convlora.inject(net, 3, modules_to_save=None)
    randomise(net)
    net.hidden.bias.data.add_(1)
    file = tmp_path / "adapter.safetensors"
    with (
        pytest.warns(UserWarning, match=r"hidden\.bias: changed since convlora\.inject"),
        pytest.raises(CheckpointError, match=r"hidden\.bias: it changes without a gradient"),
    ):
        convlora.export_adapter(net, file, "diffusers")
    assert not file.exists()
