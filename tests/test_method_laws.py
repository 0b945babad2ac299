"""Every method by the same laws on every kind of layer, and what it computes by formulas that owe the library nothing.

A method is in all these tests as soon as it is registered; what it computes is to be written into ``FORMULAS``.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Geometry, bits, convolutions, need, snapshot, thorough, through_torch_save
from laws import at_most, given, st
from test_hostile import rewrite
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import convlora
from convlora import CheckpointError, StateError, TargetError, UnsupportedLayerError
from convlora._methods.registry import METHODS, named_methods

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning"),
]

Options = dict[str, Any]
NAMES = tuple(METHODS)
NAMED = named_methods()  # the others are what LoRA's init chooses
"""Before any test registers one of its own."""


# ---- what is asked for: each method as it is, and with each of its options at another value


def _others(default: object) -> list[Any]:
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [4 if default != 4 else 2]
    return [default / 2 or 0.5] if isinstance(default, float) else []


def _asked(name: str) -> Options:
    return {"method": name if name in NAMED else "lora", "init": METHODS[name].inits[0]}


def _all_asked() -> Iterator[tuple[str, Options]]:
    for name in NAMES:
        yield name, _asked(name)
        for option, default in METHODS[name].defaults.items():
            for value in _others(default):
                yield f"{name} {option}={value}", {**_asked(name), "method_options": {option: value}}


ASKED = dict(_all_asked())


# ---- layers


class Doubled(nn.Conv2d):
    """A user's own convolution, with arguments and a forward of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, 2 * self.weight, self.bias)


class Net(nn.Module):
    """The layer between what real networks have; ``more`` are its further arguments."""

    def __init__(self, layer: nn.Module, *more: Tensor) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, *(argument.to(x.dtype)[: len(x)] for argument in self.more))
        return y


def timm_layer(name: str, *arguments: Any, **options: Any) -> nn.Module:
    layer: nn.Module = getattr(need("timm.layers"), name)(*arguments, **options)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 6, 7)),
    "wide": (lambda: nn.Conv2d(32, 48, 3), (32, 5, 4)),
    "reflect": (lambda: nn.Conv2d(8, 12, 3, padding=(1, 2), padding_mode="reflect"), (8, 6, 7)),
    "circular": (lambda: nn.Conv2d(8, 12, 3, padding=2, padding_mode="circular", bias=False), (8, 6, 7)),
    "replicate": (lambda: nn.Conv2d(8, 12, 3, 2, 1, padding_mode="replicate"), (8, 6, 7)),
    "same, dilated": (lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2), (8, 6, 7)),
    "strided, not square": (lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 0), bias=False), (8, 6, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12), (12, 6, 7)),
    "depthwise, two each": (lambda: nn.Conv2d(8, 16, 5, dilation=2, padding=4, groups=8), (8, 6, 7)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1), (8, 4, 5)),
    "1x1, strided, grouped": (lambda: nn.Conv2d(16, 16, 1, 2, groups=2), (16, 4, 5)),
    "1-d": (lambda: nn.Conv1d(8, 12, 3, padding=1, dilation=2), (8, 9)),
    "3-d": (lambda: nn.Conv3d(4, 8, 2), (4, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, 2, groups=2), (8, 4, 5)),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(8, 12, 3), (8, 6)),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(4, 8, 2, 2, bias=False), (4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(12, 8), (12,)),
    "linear of a sequence": (lambda: nn.Linear(8, 12, bias=False), (5, 8)),
    "Conv2dSame": (lambda: timm_layer("create_conv2d", 8, 12, 3, stride=2, padding="same"), (8, 6, 7)),
    "StdConv2d": (lambda: timm_layer("StdConv2d", 8, 12, 3), (8, 6, 7)),
    "StdConv2dSame": (lambda: timm_layer("StdConv2dSame", 8, 12, 3, stride=2), (8, 6, 7)),
    "ScaledStdConv2d": (lambda: timm_layer("ScaledStdConv2d", 8, 12, 3, padding=1), (8, 6, 7)),
    "own forward": (lambda: Doubled(8), (8, 6, 7)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 12, 3)), (8, 6, 7)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 12, 3, groups=2)), (8, 6, 7)),
    "hooked weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 12)), (8,)),
    "bfloat16": (lambda: nn.Conv2d(8, 12, 3).bfloat16(), (8, 6, 7)),
    "float16, depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12).half(), (12, 6, 7)),
    "channels last": (lambda: nn.Conv2d(8, 12, 3, groups=2).to(memory_format=torch.channels_last), (8, 6, 7)),
    "float64": (lambda: nn.Conv2d(8, 12, 3).double(), (8, 6, 7)),
    "experts in flat rows": (lambda: timm_layer("CondConv2d", 8, 12, 3, num_experts=3), (8, 6, 7)),
    "deformable": (lambda: need("torchvision.ops").DeformConv2d(8, 12, 3, padding=1), (8, 5, 6)),
}
ORDINARY = ("3x3", "reflect", "same, dilated", "1x1", "1-d", "3-d", "grouped", "transposed", "linear", "wide")
"""Layers that every method has to take, as it is by default."""


def build(kind: str) -> tuple[Net, Tensor]:
    """A fresh network around a layer, and four samples."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    more = {
        "experts in flat rows": lambda: (torch.rand(4, 3),),
        "deformable": lambda: (torch.randn(4, 18, *shape[1:]),),
    }
    net = Net(layer, *more.get(kind, tuple)())
    x = torch.randn(4, *shape, dtype=next(net.parameters()).dtype)
    if kind == "channels last":
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():  # torch's older hooks write `weight` at each forward, and with its graph it has no deepcopy
        net(x)
    return net, x


def adapt(net: nn.Module, asked: Options, rank: int = 2, **more: Any) -> nn.Module:
    """The network, its layer adapted; a layer that a method does not take is passed over, in the method's words."""
    before = snapshot(net)
    named = {"target_modules": "layer", "modules_to_save": None}
    if "method" in asked:  # by name, so that one too small for it is not taken whole
        named["method_pattern"] = {"layer": asked["method"]}
    try:
        return convlora.inject(net, rank, **{**named, **asked, **more})
    except (TargetError, UnsupportedLayerError) as refusal:
        assert "layer" in str(refusal) and snapshot(net) == before
        pytest.skip(f"refused: {refusal}")


def nudge(net: nn.Module, size: float = 0.2, seed: int = 1) -> None:
    """Move every trained number, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in convlora.trainable_parameters(net):
            tensor += size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def change_of(net: nn.Module, name: str = "default") -> convlora.Change:
    change: convlora.Change = net.layer.convlora[name]
    return change


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return list(mine) == list(theirs) and all(bits(mine[key]) == bits(theirs[key]) for key in mine)


def trained(kind: str, asked: Options, **more: Any) -> tuple[Net, Net, Tensor, Tensor]:
    """The base, the adapted network as if it were trained, an input and the prediction, which is another than before.

    Both are in eval mode, where spectral_norm keeps still.
    """
    net, x = build(kind)
    net.eval()
    base = copy.deepcopy(net)
    adapt(net, asked, **more)
    nudge(net)
    with torch.no_grad():
        expected, before = net(x), base(x)
    assert expected.isfinite().all() and (expected - before).abs().max() > 1e-2 * before.abs().max()
    return base, net, x, expected


def predicts(net: nn.Module, x: Tensor, expected: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(net(x), expected)


# ---- the laws


def a_fresh_adapter_changes_no_bit(kind: str, asked: Options, path: Path) -> None:
    net, x = build(kind)
    base = copy.deepcopy(net)
    adapt(net, asked)
    assert change_of(net).is_fresh()
    for training in (True, False):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                assert torch.equal(net.train(training)(x), base.train(training)(x))


def merged_is_unmerged(kind: str, asked: Options, path: Path) -> None:
    _, net, x, expected = trained(kind, asked)
    with torch.no_grad():
        weight = net.layer.weight
        assert torch.equal(convlora.merge(net).layer.weight, weight)
    assert predicts(net, x, expected)
    assert isinstance(net.layer.weight, nn.Parameter) and "Adapted" not in type(net.layer).__name__
    assert convlora.unmerge(net) is net and "Adapted" in type(net.layer).__name__


def with_gradients_the_prediction_is_the_same(kind: str, asked: Options, path: Path) -> None:
    _, net, x, expected = trained(kind, asked)
    exact = x.dtype == torch.float64
    y = net(x.clone().requires_grad_())
    coarse = {"rtol": 2e-2, "atol": 2e-2}  # a branch is rounded apart, to eleven bits or eight
    torch.testing.assert_close(
        y, expected, **({"rtol": 1e-12, "atol": 1e-12} if exact else {} if x.dtype == torch.float32 else coarse)
    )


def unmerge_gives_every_bit_back(kind: str, asked: Options, path: Path) -> None:
    _, net, x, expected = trained(kind, asked)
    before = copy.deepcopy(net)
    for _ in range(3):
        convlora.unmerge(convlora.merge(net))
        assert same_tensors(net, before) and predicts(net, x, expected)


def remove_gives_the_base_back(kind: str, asked: Options, path: Path) -> None:
    net, x = build(kind)
    net.eval()
    before, predicted = snapshot(net), net(x).detach()
    for merged in (False, True):
        adapt(net, asked)
        nudge(net)
        if merged:
            convlora.unmerge(convlora.merge(net))
        assert convlora.remove(net) is net and predicts(net, x, predicted)
        if not kind.startswith("hooked"):  # its weight is a tensor that each forward writes anew
            assert snapshot(net) == before


def removed_after_merge_it_is_a_plain_model_that_predicts_the_same(kind: str, asked: Options, path: Path) -> None:
    _, net, x, expected = trained(kind, asked)
    convlora.remove(convlora.merge(net))
    assert predicts(net, x, expected)
    assert not [name for name, _ in net.named_modules() if "convlora" in name]


def saved_and_loaded_into_a_fresh_base_it_is_the_same_to_the_bit(kind: str, asked: Options, path: Path) -> None:
    base, net, x, expected = trained(kind, asked)
    convlora.save_adapter(net, path)
    loaded = convlora.load_adapter(base, path)
    assert predicts(loaded, x, expected) and same_tensors(loaded, net)
    assert convlora.summary(loaded) == convlora.summary(net)
    flags = [[(name, p.requires_grad) for name, p in each.named_parameters()] for each in (loaded, net)]
    assert flags[0] == flags[1]


def copies_are_the_same_and_on_their_own(kind: str, asked: Options, path: Path) -> None:
    _, net, x, expected = trained(kind, asked)
    ways = [copy.deepcopy, *([] if "_norm" in kind else [through_torch_save])]  # torch pickles no computed weight
    for way in ways:
        twin = way(net)
        assert predicts(twin, x, expected) and same_tensors(twin, net)
        nudge(twin)
        assert not predicts(twin, x, expected) and predicts(net, x, expected)


def keys_of_the_base_keep_their_names(kind: str, asked: Options, path: Path) -> None:
    net, x = build(kind)
    base = copy.deepcopy(net).eval()
    adapt(net, asked)
    nudge(net)
    numbers = [bits(tensor) for tensor in change_of(net).tensors()]
    assert [key for key in net.state_dict() if ".convlora." not in key] == list(base.state_dict())
    net.load_state_dict(base.state_dict())  # strictly
    assert [bits(tensor) for tensor in change_of(net).tensors()] == numbers
    twin = copy.deepcopy(base)
    adapt(twin, asked)
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert predicts(twin, x, net.eval()(x))


def each_sample_goes_to_its_own_adapter_beside_a_plain_lora(kind: str, asked: Options, path: Path) -> None:
    _, net, x, _ = trained(kind, asked)
    convlora.add_adapter(net, "plain", 2, target_modules="layer", modules_to_save=None)
    convlora.set_adapter(net, "plain")
    nudge(net, seed=2)
    alone: dict[str | None, Tensor] = {}
    with torch.no_grad():
        for name in ("default", "plain"):
            convlora.set_adapter(net, name)
            alone[name] = net(x)
        with convlora.disable_adapter(net):
            alone[None] = net(x)
        for names in (["default", "plain", None, "default"], ["default"] * 4, [None, None, "plain", "default"]):
            with convlora.use_adapters(net, names):
                mixed = net(x)
            expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
            wide = x.dtype in (torch.float32, torch.float64)
            torch.testing.assert_close(mixed, expected, **({} if wide else {"rtol": 2e-2, "atol": 2e-2}))


def several_adapters_are_switched_disabled_and_deleted(kind: str, asked: Options, path: Path) -> None:
    base, net, x, expected = trained(kind, asked)
    others = {name: _asked(name) for name in NAMES if name not in ("lora", asked["method"])}
    predicted = {"default": expected}
    for name, other in {"lora": _asked("lora"), **others}.items():
        try:
            convlora.add_adapter(net, f"of_{name}", 2, target_modules="layer", modules_to_save=None, **other)
        except (TargetError, UnsupportedLayerError):
            continue
        convlora.set_adapter(net, f"of_{name}")
        assert predicts(net, x, base(x).detach())
        nudge(net, seed=len(predicted))
        with torch.no_grad():
            predicted[f"of_{name}"] = net(x)
    for name, alone in predicted.items():
        convlora.set_adapter(net, name)
        assert predicts(net, x, alone)
    with convlora.disable_adapter(net):
        assert predicts(net, x, base(x).detach())
    convlora.save_adapter(net, path, adapter_name="default")
    convlora.load_adapter(base, path)
    assert predicts(base, x, expected)
    convlora.set_adapter(net, "default")
    for name in list(predicted)[1:]:
        convlora.delete_adapter(net, name)
    assert predicts(net, x, expected)


def dora_around_it_trains_each_channels_size_apart(kind: str, asked: Options, path: Path) -> None:
    net, x = build(kind)
    net.eval()
    base = copy.deepcopy(net)
    adapt(net, asked, use_dora=True)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(net(x), base(x))
    nudge(net)
    with torch.no_grad():
        weight, change = net.layer.weight.double(), change_of(net)
        if not change.use_dora:
            pytest.skip("given its whole difference: there is no room for magnitudes")
        weight = weight.view(change.weight_shape)
        channel = channels(net.layer, weight)
        sizes = torch.zeros(len(change.lora_magnitude), dtype=torch.float64)
        sizes.index_add_(0, channel.flatten(), weight.square().flatten())
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(x.dtype, 1e-2)
        torch.testing.assert_close(sizes.sqrt(), change.lora_magnitude.abs().double(), rtol=tolerance, atol=0)
        expected = net(x)
    convlora.save_adapter(net, path)
    assert predicts(convlora.load_adapter(base, path), x, expected)
    assert predicts(convlora.merge(net), x, expected)


def dropout_thins_the_change_alone_and_in_training_alone(kind: str, asked: Options, path: Path) -> None:
    net, x = build(kind)
    base = copy.deepcopy(net)
    adapt(net, asked, dropout=0.5)
    assert torch.equal(net.train()(x), base.train()(x))
    nudge(net)
    plain = convlora.remove(convlora.merge(copy.deepcopy(net))).layer
    delta = copy.deepcopy(plain)
    torch.manual_seed(3)
    y = net(x)
    with torch.no_grad():
        delta.weight.copy_(delta.weight.double() - base.layer.weight.double())
        plain.weight.copy_(base.layer.weight)
        if delta.bias is not None:
            delta.bias.zero_()
    torch.manual_seed(3)
    coarse = {"rtol": 2e-2, "atol": 5e-2}  # the change was rounded to half precision here
    wide = x.dtype in (torch.float32, torch.float64)
    thinned = plain(x) + delta(torch.dropout(x, 0.5, True))
    torch.testing.assert_close(y, thinned, **({"rtol": 1e-4, "atol": 5e-5} if wide else coarse))
    assert not torch.equal(net(x), y)
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), net(x))


def it_is_fresh_only_while_it_changes_nothing(kind: str, asked: Options, path: Path) -> None:
    net, _ = build(kind)
    net.eval()
    with torch.no_grad():
        base = net.layer.weight.clone()
        adapt(net, asked)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            convlora.save_adapter(net, path / "fresh")
        assert any("nothing was trained" in str(each.message) for each in caught)
        change = change_of(net)
        for tensor in change.parameters():
            before = tensor.clone()
            tensor += 0.3 * torch.randn_like(tensor)
            assert not change.is_fresh() or torch.equal(net.layer.weight, base)
            tensor.copy_(before)
        assert change.is_fresh()
        nudge(net)
        assert not change.is_fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convlora.save_adapter(net, path / "trained")


def it_trains_and_nothing_else_moves(kind: str, asked: Options, path: Path) -> None:
    net, x = build(kind)
    base, before = copy.deepcopy(net), {}
    adapt(net, asked).train()
    numbers = {name: p for name, p in net.named_parameters() if ".convlora." in name}
    numbers |= {f"{name}.bias": net.layer.bias for name in convlora.summary(net).biases}
    assert {name for name, p in net.named_parameters() if p.requires_grad} == numbers.keys()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(convlora.trainable_parameters(net), lr=0.1)
    losses = []
    target = torch.randn_like(net(x).detach().float())  # not their size alone, which no rotation changes
    for _ in range(4):
        optimizer.zero_grad()
        loss = (net(x).float() - target).square().mean()
        losses.append(loss.item())
        (loss / losses[0]).backward()  # some weights are standardised to outputs far from 1
        optimizer.step()
    assert min(losses[1:]) < losses[0]
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == numbers.keys()
    own = (p for name, p in numbers.items() if ".convlora." in name)  # a bias keeps the base's dtype
    assert all(p.dtype == torch.promote_types(x.dtype, torch.float32) for p in own)
    net.eval()
    with torch.no_grad():
        expected = net(x)
    convlora.save_adapter(net, path)
    loaded = convlora.load_adapter(base, path).eval()
    if kind != "spectral_norm":  # it is the base's own vectors that have moved, in training
        assert predicts(loaded, x, expected)


def checkpointed_it_has_the_same_gradients(kind: str, asked: Options, path: Path) -> None:
    _, net, x, _ = trained(kind, asked)
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        net.zero_grad()
        mine = x.clone().requires_grad_()
        run(mine).float().square().sum().backward()
        grads.append([mine.grad, *(p.grad.clone() for p in convlora.trainable_parameters(net))])
    assert all(map(torch.equal, *grads)) and all(grad.any() for grad in grads[0])


def check_finds_nothing_until_a_tensor_is_taken(kind: str, asked: Options, path: Path) -> None:
    _, net, _, _ = trained(kind, asked)
    assert convlora.check(net) == []
    convlora.unmerge(convlora.merge(net))
    assert convlora.check(net) == []
    change = change_of(net)
    del change._parameters[next(iter(change._parameters))]
    (finding,) = convlora.check(net)
    assert finding.name == "layer" and finding.level == "refused"
    with pytest.raises(StateError, match="layer"):
        convlora.save_adapter(net, path)


def a_scaling_written_by_hand_is_computed_with_and_saved(kind: str, asked: Options, path: Path) -> None:
    base, net, x, expected = trained(kind, asked)
    change_of(net).scaling *= 0.25
    with torch.no_grad():
        weaker = net(x)
    assert not torch.equal(weaker, expected)
    convlora.save_adapter(net, path)
    loaded = convlora.load_adapter(copy.deepcopy(base), path)
    assert predicts(loaded, x, weaker) and convlora.summary(loaded) == convlora.summary(net)
    assert predicts(convlora.merge(net), x, weaker)
    convlora.unmerge(net)
    change_of(net).scaling = 0.0
    with torch.no_grad():
        torch.testing.assert_close(net.layer.weight, base.layer.weight)  # a trained bias stays what it is


def the_plan_says_what_there_is(kind: str, asked: Options, path: Path) -> None:
    net, _ = build(kind)
    size = net.layer.weight.numel()
    adapt(net, asked)
    plan = convlora.summary(net)
    (layer,) = plan.layers
    tensors = dict(change_of(net).named_parameters())
    count = sum(tensor.numel() for tensor in tensors.values())
    assert (layer.method, layer.adapter_parameters, plan.adapter_parameters) == (change_of(net).method, count, count)
    assert layer.method == "dense" or issubclass(METHODS[layer.method], METHODS[asked["method"]])
    assert 0 < count <= size == layer.base_parameters
    assert layer.method == "dense" or dict(asked.get("method_options", {})).items() <= layer.options.items()
    assert convlora.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    own_name = asked["method"] in str(plan) or asked["init"] in str(plan) or asked["method"] == "lora"
    assert own_name and "layer" in str(plan) and repr(net)


def it_follows_the_model_to_another_dtype(kind: str, asked: Options, path: Path) -> None:
    _, net, x, expected = trained(kind, asked)
    net.double()
    assert {tensor.dtype for tensor in change_of(net).tensors()} == {torch.float64}
    loose = {"rtol": 1e-4, "atol": 1e-5} if x.dtype in (torch.float32, torch.float64) else {"rtol": 5e-2, "atol": 5e-2}
    with torch.no_grad():
        torch.testing.assert_close(net(x.double()), expected.double(), **loose)


LAWS = (
    a_fresh_adapter_changes_no_bit,
    merged_is_unmerged,
    with_gradients_the_prediction_is_the_same,
    unmerge_gives_every_bit_back,
    remove_gives_the_base_back,
    removed_after_merge_it_is_a_plain_model_that_predicts_the_same,
    saved_and_loaded_into_a_fresh_base_it_is_the_same_to_the_bit,
    copies_are_the_same_and_on_their_own,
    keys_of_the_base_keep_their_names,
    each_sample_goes_to_its_own_adapter_beside_a_plain_lora,
    several_adapters_are_switched_disabled_and_deleted,
    dora_around_it_trains_each_channels_size_apart,
    dropout_thins_the_change_alone_and_in_training_alone,
    it_is_fresh_only_while_it_changes_nothing,
    it_trains_and_nothing_else_moves,
    checkpointed_it_has_the_same_gradients,
    check_finds_nothing_until_a_tensor_is_taken,
    a_scaling_written_by_hand_is_computed_with_and_saved,
    the_plan_says_what_there_is,
    it_follows_the_model_to_another_dtype,
)


WAYS = (
    {},
    {"use_dora": True},
    {"training_path": "fused"},
    {"use_dora": True, "training_path": "weight"},
    {"training_path": "branch"},
)
"""Besides, what training may be asked for."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every method on every layer by every law; in the default run a Latin square of them, where each meets each.

    Of a method with an option at another value the default run takes every sixth layer.
    """
    third = next((name for name in ("law", "way") if name in metafunc.fixturenames), None)
    if third is None:
        return
    values: Any = LAWS if third == "law" else WAYS
    config = metafunc.config
    whole = config.option.run_all or config.option.markexpr or any("::" in each for each in config.args)
    cases = [
        pytest.param(method, kind, value, id=f"{method}-{kind}-{getattr(value, '__name__', value)}")
        for row, method in enumerate(ASKED)
        for column, kind in enumerate(LAYERS)
        for number, value in enumerate(values)
        if whole or ((row + column) % len(values) == number and (method in NAMES or (row + column) % 6 == 0))
    ]
    metafunc.parametrize(f"method, kind, {third}", cases)


def test_law(method: str, kind: str, law: Callable[[str, Options, Path], None], tmp_path: Path):
    law(kind, ASKED[method], tmp_path)


@pytest.mark.parametrize("kind", ["3x3", "linear"])
@pytest.mark.parametrize("name", NAMES)
def test_training_has_the_scaling_that_was_written_by_hand(name, kind):
    for use_dora in (False, True):
        for dropout in (0.0, 1e-30):  # which takes the branch and drops nothing
            net, x = build(kind)
            adapt(net.double(), ASKED[name], use_dora=use_dora, dropout=dropout)
            nudge(net)
            change_of(net).scaling = 0.3
            with torch.no_grad():
                expected = net.eval()(x.double())
            torch.testing.assert_close(net.train()(x.double()), expected)


@pytest.mark.parametrize("kind", ORDINARY)
def test_every_method_takes_ordinary_layers(kind):
    for name in NAMES:
        net, _ = build(kind)
        convlora.plan(net, 2, target_modules="layer", modules_to_save=None, **_asked(name))


# ---- what each method computes, from its paper


@dataclass
class Case:
    """A layer's change in numbers: what a formula may use."""

    tensors: dict[str, Tensor]
    scaling: float
    rank: int
    options: Options
    layer: nn.Module

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def lora(W: Tensor, t: Case) -> Tensor:
    """arXiv:2106.09685, section 4.1."""
    return W + t.scaling * torch.einsum("or,r...->o...", t["lora_B"], t["lora_A"])


def anchored(W: Tensor, t: Case) -> Tensor:
    """arXiv:2404.02948: the base is W minus the first product."""
    return lora(W - t.scaling * torch.einsum("or,r...->o...", t["lora_B0"], t["lora_A0"]), t)


def dense(W: Tensor, t: Case) -> Tensor:
    return W + t["diff"]


def loha(W: Tensor, t: Case) -> Tensor:
    """arXiv:2108.06098, propositions 1 and 3."""
    product = torch.ones_like(W)
    for i in (1, 2):
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        if t.options["tucker"] and W[0, 0].numel() > 1:
            core = t[f"hada_t{i}"].reshape(t.rank, t.rank, *W.shape[2:])
            product = product * torch.einsum("po,qi,pq...->oi...", a, b, core)
        else:
            product = product * torch.einsum("or,rn->on", a, b).reshape(W.shape)
    return W + t.scaling * product


def lokr(W: Tensor, t: Case) -> Tensor:
    """arXiv:2309.14859, section 3: a Kronecker product for each place of the kernel."""
    first = t["lokr_w1"] if "lokr_w1" in t.tensors else t["lokr_w1_a"] @ t["lokr_w1_b"]
    rows, columns = W.shape[0] // len(first), W.shape[1] // first.shape[1]
    if "lokr_w2" in t.tensors:
        second = t["lokr_w2"]
    elif "lokr_t2" in t.tensors:
        second = torch.einsum("pc,qd,pq...->cd...", t["lokr_w2_a"], t["lokr_w2_b"], t["lokr_t2"])
    else:
        second = t["lokr_w2_a"] @ t["lokr_w2_b"]
    places = second.reshape(rows, columns, -1).unbind(-1)
    return W + t.scaling * torch.stack([torch.kron(first, each) for each in places], -1).reshape(W.shape)


def hira(W: Tensor, t: Case) -> Tensor:
    """HiRA, ICLR 2025, equation 3."""
    return W * (1 + torch.einsum("or,rn->on", t["hira_B"].flatten(1), t["hira_A"].flatten(1)).reshape(W.shape))


def ia3(W: Tensor, t: Case) -> Tensor:
    """arXiv:2205.05638, section 3.3."""
    return W * t["ia3_l"].flatten()[(inputs if t.options["on_input"] else channels)(t.layer, W)]


def ssf(W: Tensor, t: Case) -> Tensor:
    """arXiv:2210.08823, equation 3; the shift is the bias."""
    return W * t["ssf_scale"].flatten()[channels(t.layer, W)]


def skew(triangle: Tensor, size: int) -> Tensor:
    places = [(i, j) for i in range(size) for j in range(i + 1, size)]
    one = torch.eye(size, dtype=triangle.dtype)
    terms = [
        q * (one[i, :, None] * one[j] - one[j, :, None] * one[i]) for q, (i, j) in zip(triangle, places, strict=True)
    ]
    return torch.stack(terms).sum(0)


def cayley(Q: Tensor, terms: int = 0) -> Tensor:
    """arXiv:2306.07280, section 3; by a Neumann series, arXiv:2506.19847, as peft sums it."""
    one = torch.eye(len(Q), dtype=Q.dtype)
    if not terms:
        return (one - Q) @ torch.linalg.inv(one + Q)
    weights = {1: [], 2: [2], 3: [2, 2, 1], 4: [2, 2, 1], 5: [2, 2, 2, 1]}[terms]  # peft's third brings a fourth
    return one + sum(weight * torch.linalg.matrix_power(Q, k) for k, weight in enumerate(weights, 1))


def _turned(W: Tensor, t: Case, R: Tensor) -> Tensor:
    matrix = W.flatten(1)
    return (R @ matrix if t.options["on_output"] else matrix @ R.T).reshape(W.shape)


def oft(W: Tensor, t: Case) -> Tensor:
    blocks = [cayley(skew(triangle, t.rank), t.options["neumann"]) for triangle in t["oft_R"]]
    return _turned(W, t, torch.block_diag(*blocks))


def boft(W: Tensor, t: Case) -> Tensor:
    """arXiv:2311.06243, section 4: the factor i turns blocks of numbers that lie 2ⁱ · rank / 2 apart."""
    R = torch.eye(W.shape[0] if t.options["on_output"] else W[0].numel(), dtype=W.dtype)
    for i, triangles in enumerate(t["boft_R"]):
        factor = torch.block_diag(*(cayley(skew(triangle, t.rank)) for triangle in triangles))
        if len(t["boft_R"]) > 1:
            order = torch.arange(len(R)).view(-1, 2**i, 2, t.rank // 2).transpose(1, 2).flatten()
            shuffle = torch.eye(len(R), dtype=W.dtype)[order]
            factor = shuffle @ factor @ shuffle.T
        R = factor @ R
    return _turned(W, t, R) * t["boft_s"].flatten()[channels(t.layer, W)]


def hra(W: Tensor, t: Case) -> Tensor:
    """arXiv:2405.17484, equation 4."""
    matrix = W.flatten(1)
    for u in t["hra_u"].T:
        matrix = matrix @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return matrix.reshape(W.shape)


Formula = Callable[[Tensor, Case], Tensor]
FORMULAS: dict[str, Formula] = {
    each.__name__: each for each in (lora, anchored, dense, loha, lokr, hira, ia3, ssf, oft, boft, hra)
}
"""What becomes of a base weight, which comes in ``weight_shape``; by method."""


def inputs(layer: nn.Module, weight: Tensor) -> Tensor:
    """The input channel that each number of a weight is multiplied with."""
    rows, columns = weight.shape[:2]
    row, each = torch.arange(rows)[:, None], [1] * (weight.ndim - 2)
    if getattr(layer, "transposed", False):
        return row.view(rows, 1, *each).expand(weight.shape)
    group = row // (rows // getattr(layer, "groups", 1))
    return (group * columns + torch.arange(columns)).view(rows, columns, *each).expand(weight.shape)


def channels(layer: nn.Module, weight: Tensor) -> Tensor:
    """The output channel that each number of a weight leads to."""
    rows, columns = weight.shape[:2]
    channel = torch.arange(rows)[:, None]
    if getattr(layer, "transposed", False):
        channel = (channel // (rows // layer.groups)) * columns + torch.arange(columns)
    return channel.view(rows, -1, *[1] * (weight.ndim - 2)).expand(weight.shape)


def dora(V: Tensor, magnitude: Tensor, layer: nn.Module) -> Tensor:
    """arXiv:2402.09353, with the norm as a constant to the gradient, section 4.3."""
    channel = channels(layer, V)
    squares = torch.zeros_like(magnitude).index_add(0, channel.flatten(), V.detach().square().flatten())
    return magnitude[channel] * V / squares.sqrt()[channel]


def test_gradients_in_fp64_are_those_of_the_formula(method: str, kind: str, way: Options):
    net, x = build(kind)
    net, x, asked = net.double().eval(), x.double(), ASKED[method]
    with torch.no_grad():
        net(x)  # torch's older hooks compute the weight here
    W = net.layer.weight.detach().clone()
    adapt(net, asked, alpha=3, **way)
    plain = convlora.remove(convlora.merge(copy.deepcopy(net)))
    nudge(net)
    change = change_of(net)  # dense where the layer has no room for what was asked for
    leaves = {name: p.detach().clone().requires_grad_() for name, p in change.named_parameters()}
    bias = {f"{name}.bias": net.get_parameter(f"{name}.bias") for name in convlora.summary(net).biases}
    biases = {name: p.detach().clone().requires_grad_() for name, p in bias.items()}
    case = Case(
        tensors=leaves | dict(change.named_buffers()),
        scaling=3 / 2 if change.has_alpha else 1.0,
        rank=change.rank,
        options={**change.defaults, **asked.get("method_options", {})},
        layer=net.layer,
    )
    formula = FORMULAS[change.method](W.view(change.weight_shape), case)
    if change.use_dora:
        formula = dora(formula, leaves["lora_magnitude"], net.layer)
    torch.testing.assert_close(net.layer.weight, formula.view(W.shape), rtol=1e-12, atol=1e-12)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = {"layer.weight": formula.view(W.shape), **biases}
    y, expected = net(mine), torch.func.functional_call(plain, values, (theirs,))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-11)
    for name, leaf in leaves.items():
        assert leaf.grad.any(), name
        torch.testing.assert_close(change.get_parameter(name).grad, leaf.grad, rtol=1e-10, atol=1e-11)
    for name, leaf in biases.items():
        torch.testing.assert_close(bias[name].grad, leaf.grad, rtol=1e-10, atol=1e-11)


@at_most(25)
@given(geometry=convolutions(), method=st.sampled_from(list(ASKED)), rank=st.integers(1, 6), use_dora=st.booleans())
def test_a_convolution_of_any_geometry_at_any_rank(geometry: Geometry, method: str, rank: int, use_dora: bool):
    conv, x = geometry.build()
    net = Net(conv)
    base = copy.deepcopy(net)
    try:
        convlora.inject(net, rank, modules_to_save=None, use_dora=use_dora, **ASKED[method])
    except TargetError as refusal:
        assert "layer" in str(refusal)
        return
    (planned,) = convlora.summary(net).layers
    assert planned.rank <= rank and planned.adapter_parameters <= planned.base_parameters
    assert torch.equal(net(x), base(x))
    nudge(net)
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        expected = net(x)
        convlora.save_adapter(net, directory)
        assert predicts(convlora.load_adapter(base, directory), x, expected)
        assert predicts(convlora.merge(net), x, expected)
        convlora.unmerge(net)
        assert predicts(net, x, expected) and same_tensors(net, base)


# ---- all methods in one network


class Every(nn.Module):
    """A layer for each method."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {name: nn.Conv2d(8, 8, 3, padding=1, groups=1 + i % 2) for i, name in enumerate(NAMED)}
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs.values():
            x = x + conv(x).relu() / 2
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def every(**options: Any) -> tuple[Every, Every, Tensor]:
    torch.manual_seed(0)
    net, x = Every().eval(), torch.randn(2, 8, 6, 6)
    base = copy.deepcopy(net)
    pattern = {f"convs.{name}": name for name in NAMED if name != "lora"}
    convlora.inject(net, 2, method_pattern=pattern, **options)
    return base, net, x


def test_a_method_for_each_layer(tmp_path):
    base, net, x = every()
    plan = convlora.summary(net)
    assert {layer.name: layer.method for layer in plan.layers} == {f"convs.{name}": name for name in NAMED}
    assert predicts(net, x, base(x).detach())
    nudge(net)
    with torch.no_grad():
        expected = net(x)
    convlora.save_adapter(net, tmp_path)
    assert predicts(convlora.load_adapter(base, tmp_path), x, expected) and convlora.summary(base) == plan
    assert predicts(convlora.merge(net), x, expected)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*jit:FutureWarning")
@pytest.mark.parametrize("use_dora", [False, thorough(True)])
def test_all_methods_compile_trace_and_export(use_dora):
    _, net, x = every(use_dora=use_dora)
    nudge(net)
    expected = net(x)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}  # compilers fuse and reorder fp32 sums
    for name, grad in grads.items():
        torch.testing.assert_close(net.get_parameter(name).grad, grad, **close)
    for other in (compiled, torch.jit.trace(net, x), torch.export.export(net, (x,)).module()):
        torch.testing.assert_close(other(x), expected, **close)


# ---- plans from strangers


WRONG: dict[str, Any] = {
    "a method that is none": lambda layer: layer.update(method="nope"),
    "a method that is no text": lambda layer: layer.update(method=["lora"]),
    "no method": lambda layer: layer.update(method=None),
    "options that are no object": lambda layer: layer.update(options=[1]),
    "an option that is none": lambda layer: layer["options"].update(nope=1),
    "an option without a name": lambda layer: layer["options"].update({"": 1}),
    "no scaling": lambda layer: layer.update(scaling=None),
    "a scaling that is no number": lambda layer: layer.update(scaling="2"),
    "a rank of nothing": lambda layer: layer.update(rank=0),
    "a rank that is no number": lambda layer: layer.update(rank="2"),
    "a rank of a billion": lambda layer: layer.update(rank=10**9),
    "another weight": lambda layer: layer.update(weight_shape=[12, 8, 5, 5]),
    "a weight without channels": lambda layer: layer.update(weight_shape=[0, 8, 3, 3]),
    "a vector": lambda layer: layer.update(weight_shape=[12]),
}


@pytest.fixture(scope="module", params=NAMES)
def of_a_stranger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Net, Path]:
    net, _ = build("3x3")
    base = copy.deepcopy(net)
    adapt(net, _asked(request.param))
    nudge(net)
    folder = tmp_path_factory.mktemp("stranger")
    convlora.save_adapter(net, folder)
    return request.param, base, folder


def _hostile(defaults: dict[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
    yield from WRONG.items()
    for option in defaults:
        for value in (None, [], "x", 10**30, -1, 0, 0.5, True, 3, 5, 2**40, 1e300):
            yield f"{option}={value!r}", lambda layer, o=option, v=value: layer["options"].update({o: v})


def test_a_plan_of_wrong_values_is_refused_or_read_to_what_it_says(of_a_stranger, tmp_path):
    """Whatever a file's plan says of the layer: one error of ours with nothing changed, or what the file says."""
    name, base, folder = of_a_stranger
    file = folder / "adapter_model.safetensors"
    untouched, before = file.read_bytes(), snapshot(base)
    for what, change in _hostile(METHODS[name].defaults):

        def lie(manifest: Any, tensors: Any, change: Any = change) -> None:
            change(manifest["plan"]["layers"][0])

        file.write_bytes(untouched)
        rewrite(folder, lie)
        must_fail = what in WRONG
        try:
            convlora.load_adapter(base, folder)
        except CheckpointError as error:
            assert "Traceback" not in str(error)
        else:
            assert not must_fail, what
            convlora.remove(base)
        assert snapshot(base) == before, what
    file.write_bytes(untouched)
    convlora.load_adapter(base, folder)
    convlora.remove(base)


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_wrong_type_or_name_are_refused(name):
    net, _ = build("3x3")
    before = snapshot(net)
    wrong: list[Options] = [{"nope": 1}, {"": 1}]
    wrong += [{option: value} for option in METHODS[name].defaults for value in (None, [], "x", 1.5, 1 + 2j)]
    for options in wrong:
        ((option, value),) = options.items()
        default = METHODS[name].defaults.get(option)
        if type(value) is type(default) and default is not None:
            continue
        with pytest.raises(TargetError, match="method_options"):
            convlora.inject(net, 2, method_options=options, modules_to_save=None, **_asked(name))
        assert snapshot(net) == before


# ---- methods by name


def test_a_method_that_is_none_is_refused(net):
    before = snapshot(net)
    with pytest.raises(TargetError, match="method='nope'; it must be one of 'lora'"):
        convlora.inject(net, method="nope")
    with pytest.raises(TargetError, match="method_pattern for stem='nope'; it must be one of 'lora'"):
        convlora.inject(net, method_pattern={"stem": "nope"})
    with pytest.raises(TargetError, match="method_pattern"):
        convlora.inject(net, method_pattern={"no layer": "dense"})
    assert snapshot(net) == before


def test_a_beginning_that_a_method_has_not_is_refused(net):
    before = snapshot(net)
    for name in NAMED:
        for init in {"kaiming", "pissa", "eva"} - set(METHODS[name].inits):
            if name == "lora" and init == "pissa":
                continue  # the anchored method is LoRA, too
            with pytest.raises(TargetError, match=f"init='{init}' is not an init of method='{name}'"):
                convlora.inject(net, method=name, init=init)
    assert snapshot(net) == before


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[convlora.Change]]:
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_what_cannot_be_registered_is_refused(registry):
    class Nameless(convlora.Change):
        pass

    class Number(convlora.Change):
        method = "2 words"

    class Taken(convlora.Change):
        method = "lora"

    for cls, message in ((Nameless, "must be a name"), (Number, "must be a name"), (Taken, "'lora' is convlora")):
        with pytest.raises(TargetError, match=message):
            convlora.register_method(cls)
    for thing in (nn.Module, 3, "lora"):
        with pytest.raises(TargetError, match=r"no subclass of convlora\.Change"):
            convlora.register_method(thing)
    assert tuple(registry) == NAMES


def test_a_file_of_a_method_that_is_not_registered_says_so(registry, tmp_path):
    @convlora.register_method
    class Sign(convlora.Change):
        method = "sign"
        formula = "W ⊙ (1 + s)"
        has_rank = has_alpha = False

        @classmethod
        def shapes(cls, weight, rank, **options):
            return {"sign": (weight[0],)}

        def begin(self):
            pass

        def is_fresh(self):
            return not self.sign.any()

        def changed(self, weight):
            return weight + weight * self.sign.view(-1, *[1] * (weight.ndim - 1))

    for kind in ORDINARY:
        net, x = build(kind)
        base = copy.deepcopy(net)
        convlora.inject(net, target_modules="layer", modules_to_save=None, method="sign")
        assert predicts(net, x, base(x).detach())
        nudge(net)
        convlora.save_adapter(net, tmp_path / kind)
        assert predicts(convlora.load_adapter(base, tmp_path / kind), x, net(x).detach())
        convlora.remove(base)
    net, _ = build(kind)
    adapt(net, {"method": "sign", "method_pattern": {"layer": "lora"}})  # named, and no layer's
    nudge(net)
    convlora.save_adapter(net, tmp_path / "named alone")
    del registry["sign"]
    before = snapshot(base)
    for file in (kind, "named alone"):
        with pytest.raises(CheckpointError, match=r"needs method 'sign', which is not registered\. Import the code"):
            convlora.load_adapter(base, tmp_path / file)
    assert snapshot(base) == before
