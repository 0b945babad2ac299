"""Tensors of the base that move by other ways than gradients: the base has what it had, each adapter has its own.

Each case is a small module with a convolution and something that its forward, or the training loop, writes by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, bits, need, randomise, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convlora


class Net(nn.Module):
    """A convolution, what is written, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv(x))
        return self.fc(x.mean((2, 3)))


class Codebook(Net):
    """A Parameter that follows an average of what is near it, as in a VQ-VAE: written through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Embedding(6, 8)
        self.codes.weight.requires_grad_(False)

    def middle(self, x: Tensor) -> Tensor:
        flat = x.detach().flatten(2).mT.flatten(0, 1)
        nearest = torch.cdist(flat, self.codes.weight).argmin(1)
        if self.training:
            mean = torch.zeros(6, 8).index_add_(0, nearest, flat) / len(flat)
            self.codes.weight.data.mul_(0.9).add_(mean, alpha=0.1)
        return x + self.codes(nearest).unflatten(0, (len(x), -1)).mT.unflatten(2, x.shape[2:])


class InPlace(Codebook):
    """The same, written under ``no_grad``."""

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.codes.weight.lerp_(x.detach().mean((0, 2, 3)).expand(6, 8), 0.1)
        return x + self.codes.weight.mean(0)[:, None, None]


class Indexed(Codebook):
    """One row of it alone, by an index."""

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.weight.data[2] = x.detach().mean((0, 2, 3))
        return x + self.codes.weight.sum(0)[:, None, None]


class Replaced(Codebook):
    """A new Parameter each time."""

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            new = self.codes.weight.detach() * 0.9 + x.detach().mean((0, 2, 3)) * 0.1
            self.codes.weight = nn.Parameter(new, requires_grad=False)
        return x + self.codes.weight.mean(0)[:, None, None]


class Tied(Codebook):
    """The same Parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.codes


class InBuffer(Net):
    """The same as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, 8))

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            self.codes.data.lerp_(x.detach().mean((0, 2, 3)).expand(6, 8), 0.1)
        return x + self.codes.mean(0)[:, None, None]


class Reparameterised(Net):
    """In evaluation one convolution stands for two, as spandrel's SPAN does it: ``.data`` is given other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.eval_conv = nn.Conv2d(8, 8, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            return self.first(x) + self.second(x)
        weight = self.second.weight.data + nn.functional.pad(self.first.weight.data, (1, 1, 1, 1))
        self.write(weight, self.first.bias.data + self.second.bias.data)
        return self.eval_conv(x)

    def write(self, weight: Tensor, bias: Tensor) -> None:
        self.eval_conv.weight.data = weight
        self.eval_conv.bias.data = bias


class Copied(Reparameterised):
    """The same, by ``copy_``."""

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor) -> None:
        self.eval_conv.weight.copy_(weight)
        self.eval_conv.bias.copy_(bias)


class Spectral(Net):
    """A convolution whose weight is divided by its largest singular value, which each forward comes nearer to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.spectral_norm(self.conv)


CASES = [Codebook, InPlace, Indexed, Replaced, Tied, InBuffer, Reparameterised, Copied, Spectral]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
OPTIONS = {"exclude_modules": "eval_conv*"}


def build(case: type[Net]) -> Net:
    torch.manual_seed(0)
    return case()


def inject(net: Net, **options) -> Net:
    return convlora.inject(net, 2, **((OPTIONS if hasattr(net, "eval_conv") else {}) | options))


def predict(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def numbers(net: nn.Module) -> dict[str, bytes]:
    return {key: bits(tensor) for key, tensor in net.state_dict().items()}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


@EACH
def test_a_fresh_adapter_writes_as_the_base_does(case: type[Net], x: Tensor):
    base, net = build(case), inject(build(case))
    for _ in range(3):
        assert torch.equal(net.train()(x), base.train()(x))
    assert torch.equal(predict(net, x), predict(base, x))


@EACH
def test_what_was_written_is_saved_with_the_adapter_and_loaded(case: type[Net], x: Tensor, tmp_path: Path, train):
    net = inject(build(case))
    train(net, x)
    y = predict(net, x)
    convlora.save_adapter(net, tmp_path)
    loaded = convlora.load_adapter(build(case), tmp_path)
    assert torch.equal(predict(loaded, x), y)
    convlora.save_adapter(loaded, tmp_path / "again")
    assert torch.equal(predict(convlora.load_adapter(build(case), tmp_path / "again"), x), y)


@EACH
def test_remove_gives_the_base_as_it_was(case: type[Net], x: Tensor, train):
    net = build(case)
    before = snapshot(net)
    inject(net)
    train(net, x)
    predict(net, x)
    convlora.remove(net)
    net.train()
    assert snapshot(net) == before


@EACH
def test_the_loaded_adapter_is_removed_as_well(case: type[Net], x: Tensor, tmp_path: Path, train):
    net = inject(build(case))
    train(net, x)
    predict(net, x)
    convlora.save_adapter(net, tmp_path)
    other = build(case)
    before = snapshot(other)
    convlora.load_adapter(other, tmp_path)
    train(other, x)
    predict(other, x)
    assert snapshot(convlora.remove(other).train()) == before


@EACH
def test_while_adapters_are_disabled_the_base_computes_and_stays(case: type[Net], x: Tensor, train):
    base, net = build(case), inject(build(case))
    train(net, x)
    y = predict(net, x)
    with convlora.disable_adapter(net):
        assert torch.equal(predict(net, x), predict(copy.deepcopy(base), x))
        net.train()(x)
    assert torch.equal(predict(net, x), y)
    convlora.remove(net)
    assert numbers(net) == numbers(base)


@EACH
def test_a_first_forward_while_disabled_writes_to_a_passing_copy(case: type[Net], x: Tensor):
    base, net = build(case), inject(build(case))
    with convlora.disable_adapter(net):
        net.train()(x)
        predict(net, x)
    fresh = inject(build(case))
    assert torch.equal(net.train()(x), fresh.train()(x))
    assert numbers(convlora.remove(net)) == numbers(base)


@EACH
def test_each_adapter_has_its_own(case: type[Net], x: Tensor, train):
    net = inject(build(case))
    train(net, x)
    y = predict(net, x)
    convlora.add_adapter(net, "other", 2, **(OPTIONS if hasattr(net, "eval_conv") else {}))
    convlora.set_adapter(net, "other")
    train(net, 3 * x)
    other = predict(net, x)
    convlora.set_adapter(net, "default")
    assert torch.equal(predict(net, x), y)
    convlora.set_adapter(net, "other")
    assert torch.equal(predict(net, x), other) and not torch.equal(other, y)
    alone = inject(build(case))
    convlora.add_adapter(alone, "other", 2, **(OPTIONS if hasattr(alone, "eval_conv") else {}))
    for name, factor in net.state_dict().items():
        if "convlora.other" in name:
            alone.state_dict()[name].copy_(factor)
    convlora.delete_adapter(net, "default")
    assert torch.equal(predict(net, x), other)


@EACH
def test_another_adapter_that_was_there_at_the_first_write_begins_from_the_base(case: type[Net], x: Tensor, train):
    net = inject(build(case))
    convlora.add_adapter(net, "other", 2, **(OPTIONS if hasattr(net, "eval_conv") else {}))
    train(net, x)
    convlora.set_adapter(net, "other")
    assert torch.equal(net.train()(x), build(case).train()(x))


@EACH
def test_merged_it_predicts_the_same_and_unmerge_takes_it_back(case: type[Net], x: Tensor, train):
    net = inject(build(case))
    train(net, x)
    y = predict(net, x)
    before = numbers(net)
    assert torch.equal(predict(convlora.merge(net), x), y)
    convlora.unmerge(net)
    assert numbers(net) == before
    plain = convlora.remove(convlora.merge(net))
    assert torch.equal(predict(plain, x), y)


@EACH
def test_a_training_goes_on_from_its_state_dict(case: type[Net], x: Tensor, tmp_path: Path, train):
    """Where a process ended; what is saved then fits the base all the same."""
    net = inject(build(case))
    train(net, x)
    resumed = inject(build(case))
    resumed.load_state_dict(net.state_dict())
    train(net, x)
    train(resumed, x)
    assert torch.equal(predict(resumed, x), predict(net, x))
    convlora.save_adapter(resumed, tmp_path)
    assert torch.equal(predict(convlora.load_adapter(build(case), tmp_path), x), predict(net, x))
    assert numbers(convlora.remove(resumed)) == numbers(build(case))


@EACH
def test_a_copy_has_its_own_as_well(case: type[Net], x: Tensor, train):
    net = inject(build(case))
    train(net, x)
    y = predict(net, x)
    twin = copy.deepcopy(net)
    train(twin, x)
    assert torch.equal(predict(net, x), y)
    assert numbers(convlora.remove(twin)) == numbers(build(case))


@EACH
def test_batches_that_are_only_looked_at_write_nothing(case: type[Net], x: Tensor):
    net = build(case)
    before = numbers(net)
    reached = {"exclude_modules": ["eval_conv", "first", "second"]} if hasattr(net, "eval_conv") else {}
    inject(net, init="eva", init_data=[x], example=x, **reached)
    assert {key: value for key, value in numbers(net).items() if key in before} == before


def test_a_write_to_the_weight_of_an_adapted_layer_is_refused_by_name(x: Tensor):
    for case in (Reparameterised, Copied):
        net = inject(build(case), exclude_modules=None)
        net.train()(x)
        for _ in range(2):  # not only the first time
            with pytest.raises(
                convlora.StateError, match=r"writes to eval_conv.weight.*exclude_modules=\['eval_conv'\]"
            ):
                net.eval()(x)
        with convlora.disable_adapter(net), pytest.raises(convlora.StateError, match=r"eval_conv\.weight"):
            net.eval()(x)
        assert numbers(convlora.remove(net)) == numbers(build(case))


@pytest.mark.parametrize("case", [Codebook, Replaced, Reparameterised], ids=lambda case: case.__name__)
def test_a_write_that_no_forward_of_the_whole_was_seen_to_do_is_found_on_saving(
    case: type[Net], x: Tensor, tmp_path: Path
):
    """Where a part is called by itself, say. Of what was replaced, the base has the old one still."""
    net = inject(build(case))
    net.train().middle(torch.randn(2, 8, 5, 5))
    net.eval().middle(torch.randn(2, 8, 5, 5))
    what = "eval_conv" if case is Reparameterised else "codes"
    with pytest.warns(UserWarning, match=rf"{what}.weight.*saved with the adapter"):
        convlora.save_adapter(net, tmp_path)
    loaded = convlora.load_adapter(build(case), tmp_path)
    assert torch.equal(predict(loaded, x), predict(net, x))
    if case is Replaced:
        assert numbers(convlora.remove(net)) == numbers(build(case))


def test_a_base_that_is_loaded_after_injection_is_no_write(x: Tensor, tmp_path: Path):
    torch.manual_seed(3)
    other = Codebook()
    net = inject(build(Codebook))
    net.load_state_dict(other.state_dict(), strict=False)
    convlora.save_adapter(net, tmp_path)
    assert convlora.summary(net).written == ()
    convlora.load_adapter(other, tmp_path)


def test_what_forwards_write_is_in_the_summary(x: Tensor):
    net = inject(build(Codebook))
    assert convlora.summary(net).written == ()
    net.train()(x)
    assert convlora.summary(net).written == ("codes.weight",)
    assert "written by forwards, each adapter's own: codes.weight" in str(convlora.summary(net))


def test_after_a_forward_of_each_mode_nothing_is_watched(x: Tensor):
    net = inject(build(Codebook))
    assert type(net) is not Codebook and type(net).__name__ == "Codebook"
    net.train()(x)
    net.eval()(x)
    assert type(net) is Codebook


def test_a_forward_that_raises_is_watched_again(x: Tensor):
    net = inject(build(Codebook)).train()
    with pytest.raises(RuntimeError):
        net(x[:, :2])
    net(x)
    assert convlora.summary(net).written == ("codes.weight",)


@pytest.mark.parametrize("change", [convlora.merge, convlora.remove])
def test_who_keeps_the_models_call_gets_what_the_model_computes(change):
    """``torch.compile`` keeps the method that the root had when it was compiled."""
    torch.manual_seed(0)
    net, x = convlora.inject(SmallNet().eval(), 4), torch.randn(2, 3, 16, 16)
    randomise(net)
    call = net.__call__
    change(net)
    assert torch.equal(call(x), net(x))


@pytest.mark.parametrize("options", [{}, {"norm": "track"}, {"mask_activations": True}], ids=str)
def test_who_keeps_a_modules_forward_gets_the_base_after_removal(options):
    """accelerate keeps it, and ``torch.compile`` of a part."""
    torch.manual_seed(0)
    inside = (nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1))
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), *inside), torch.randn(2, 8, 8, 8)
    convlora.prepare_for_hotswap(convlora.inject(net, 4, modules_to_save=None, **options), 4)
    call, kept = net.__call__, [module.forward for module in inside]
    convlora.remove(net.eval())
    assert all(torch.equal(forward(x), module(x)) for forward, module in zip(kept, inside, strict=True))
    assert torch.equal(call(x[:, :3]), net(x[:, :3]))


def test_a_vqvae_of_monai_is_trained_saved_and_given_back(tmp_path: Path, train: Callable[..., None]):
    nets = need("monai.networks.nets")

    def vqvae() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"channels": (4, 4), "num_res_channels": (4, 4), "num_res_layers": 1}
        codes = {"num_embeddings": 8, "embedding_dim": 4}
        down, up = ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2
        ways = {"downsample_parameters": down, "upsample_parameters": up}
        return nets.VQVAE(spatial_dims=3, in_channels=1, out_channels=1, **sizes, **codes, **ways)

    volume = torch.randn(1, 1, 8, 8, 8)
    net = convlora.inject(vqvae(), 2, modules_to_save=None)
    net.train()(volume)[0].square().mean().backward()
    convlora.save_adapter(net, tmp_path)
    loaded = convlora.load_adapter(vqvae(), tmp_path)
    assert convlora.summary(net).written == ("quantizer.quantizer.embedding.weight",)
    assert torch.equal(loaded.eval()(volume)[0], net.eval()(volume)[0])
    assert numbers(convlora.remove(net)) == numbers(vqvae())


@pytest.mark.parametrize("to", ["diffusers", "lycoris"])
def test_a_file_for_another_library_is_refused_by_the_written_parameters_name(to, tmp_path):
    model = convlora.inject(Codebook(), rank=2, modules_to_save=None)
    model.train()(torch.randn(2, 3, 8, 8))
    (name,) = convlora.summary(model).written
    with pytest.raises(convlora.CheckpointError, match=f"{name}: it changes without a gradient"):
        convlora.export_adapter(model, tmp_path / "adapter.safetensors", to)
    assert not list(tmp_path.iterdir())
