"""What one method promises beside the laws of all methods (`methods`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import need, randomise, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import convlora
from convlora import TargetError


def adapted(layer: nn.Module, method: str, rank: int | None = None, **options: Any) -> nn.Module:
    """The layer, adapted and moved away from the base."""
    kind = type(layer)
    convlora.inject(layer, rank, target_modules=kind, modules_to_save=None, method=method, method_options=options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in convlora.trainable_parameters(layer):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)
    return layer


class Narrow(nn.Module):
    """Layers whose fan-in is 3 · 9, 8 · 9, 5 and 49 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.wide = nn.Conv2d(8, 16, 3)
        self.prime = nn.Conv1d(1, 16, 5)
        self.square = nn.Conv2d(1, 16, 7)


@pytest.mark.parametrize(
    "method, rank, ranks, note",
    [
        ("oft", 8, {"stem": 3, "wide": 8, "prime": 5, "square": 7}, "no block of such a size"),
        ("oft", 4, {"stem": 3, "wide": 4, "prime": 0, "square": 0}, "no block of such a size"),
        ("boft", 6, {"stem": 3, "wide": 6, "prime": 5, "square": 0}, "no block of such a size"),
        ("hra", 7, {"stem": 6, "wide": 6, "prime": 6, "square": 6}, "reflections come in pairs"),
        ("hra", 1, {"stem": 0, "wide": 0, "prime": 0, "square": 0}, "reflections come in pairs"),
    ],
)
def test_a_rank_that_the_weight_has_not_is_lowered_and_the_plan_says_why(method, rank, ranks, note):
    net = Narrow()
    asked = {"target_modules": (nn.Conv1d, nn.Conv2d), "modules_to_save": None, "method": method}
    if not any(ranks.values()):
        before = snapshot(net)
        with pytest.raises(TargetError, match=f"No layer of Narrow would be adapted .*stem: rank 1: {note}"):
            convlora.inject(net, rank, **asked)
        assert snapshot(net) == before
        return
    plan = convlora.summary(convlora.inject(net, rank, **asked))
    listed = [*plan.layers, *plan.skipped]
    assert {layer.name: layer.rank for layer in listed} == ranks
    assert all((note in layer.note) is (layer.rank < rank) for layer in listed)


def test_a_budget_hands_out_ranks_that_there_are():
    for method in ("oft", "boft", "hra"):
        net = Narrow()
        plan = convlora.plan(
            net, budget=500, method=method, target_modules=(nn.Conv1d, nn.Conv2d), modules_to_save=None
        )
        assert 0 < plan.adapter_parameters <= 500
        assert all(layer.rank % 2 == 0 for layer in plan.layers) or method != "hra"
        convlora.inject(net, budget=500, method=method, target_modules=(nn.Conv1d, nn.Conv2d), modules_to_save=None)


@pytest.mark.parametrize("method, options", [("oft", {}), ("oft", {"on_output": True}), ("boft", {}), ("hra", {})])
def test_a_turned_weight_keeps_lengths_and_angles(method, options):
    layer = nn.Conv2d(8, 12, 3, dtype=torch.float64)
    rows = layer.weight.detach().flatten(1).clone()
    adapted(layer, method, 4, **options)
    if method == "boft":
        layer.convlora["default"].boft_s.data.fill_(1)
    turned = layer.weight.detach().flatten(1)
    assert (turned - rows).abs().max() > 0.05
    before, after = (rows.T @ rows, turned.T @ turned) if options else (rows @ rows.T, turned @ turned.T)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_a_series_in_the_place_of_the_inverse_is_near_to_a_rotation_alone():
    rows = []
    for neumann in (5, 100):
        torch.manual_seed(0)
        layer = adapted(nn.Linear(12, 8, dtype=torch.float64), "oft", 4, neumann=neumann)
        base = convlora.base_weight(layer).detach()
        rows.append((layer.weight @ layer.weight.T - base @ base.T).abs().max().item())
    assert rows[1] < 1e-9 < 1e-3 < rows[0]
    with pytest.raises(TargetError, match="neumann=101; it must be from 0, which is exact, to 100"):
        adapted(nn.Linear(12, 8), "oft", 4, neumann=101)


def test_a_butterfly_has_as_many_factors_as_the_columns_allow_and_then_reaches_all_of_them():
    counts = {}
    for columns in (12, 16, 18, 24):
        layer = adapted(nn.Linear(columns, 64, dtype=torch.float64), "boft", 2, factors=9)
        counts[columns] = len(layer.convlora["default"].boft_R)
    assert counts == {12: 2, 16: 4, 18: 1, 24: 3}
    layer = adapted(nn.Linear(16, 16, bias=False, dtype=torch.float64), "boft", 2, factors=9)
    with torch.no_grad():
        convlora.base_weight(layer).copy_(torch.eye(16))
    assert (layer.weight.abs() > 1e-6).all()
    with pytest.raises(TargetError, match="factors=0; a butterfly has at least one"):
        adapted(nn.Linear(16, 16), "boft", 2, factors=0)


class Asked(TorchDispatchMode):
    """Which gradients of convolutions are computed: of the input, the weight and the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method, options", [("ia3", {}), ("ia3", {"on_input": True}), ("ssf", {})])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_scale_per_channel_trains_without_a_gradient_of_the_weight(method, options, groups):
    layer = adapted(nn.Conv2d(8, 12, 3, groups=groups), method, **options)
    with Asked() as asked:
        layer(torch.randn(2, 8, 5, 5, requires_grad=True)).square().sum().backward()
    assert asked.masks and not any(mask[1] for mask in asked.masks)
    assert all(p.grad.any() for p in convlora.trainable_parameters(layer))


def test_a_scale_per_input_leaves_a_wrong_input_to_the_layer():
    layer = adapted(nn.Conv2d(3, 4, 1), "ia3", on_input=True)
    with pytest.raises(RuntimeError, match="expected input"):
        layer(torch.randn(2, 1, 5, 5))


class Shifted(nn.Module):
    """With a bias and without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bare = nn.Conv2d(8, 8, 1, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.up(self.bare(self.conv(x).relu()).relu()).mean((2, 3)))
        return y


def test_scale_and_shift_trains_the_bias_and_keeps_it_with_the_adapter(tmp_path):
    torch.manual_seed(0)
    base, x = Shifted().eval(), torch.randn(2, 3, 6, 6)
    net = copy.deepcopy(base)
    before = snapshot(net)
    convlora.inject(net, method="ssf", target_modules=(nn.Conv2d, nn.ConvTranspose2d))
    plan = convlora.summary(net)
    assert plan.biases == ("conv", "up") and plan.saved_parameters == 8 + 6 + 14
    assert {layer.name: layer.note for layer in plan.layers} == {
        "conv": "",
        "bare": "it has no bias to train",
        "up": "",
    }
    assert plan.adapter_parameters == 8 + 8 + 6
    assert torch.equal(net(x), base(x))
    numbers = {p.numel() for p in (net.conv.bias, net.up.bias) if p.requires_grad}
    assert numbers == {8, 6} and sum(p.numel() for p in convlora.trainable_parameters(net)) == plan.trainable_parameters

    gamma, beta = torch.rand(8) + 0.5, torch.randn(8)
    with torch.no_grad():  # as in the paper: γ · (W x + b) + β
        net.conv.convlora["default"].ssf_scale.copy_(gamma.view(1, 8, 1, 1))
        net.conv.bias.mul_(gamma).add_(beta)
        expected = base.conv(x) * gamma.view(8, 1, 1) + beta.view(8, 1, 1)
        torch.testing.assert_close(net.conv(x), expected)
        trained = net(x)
    convlora.save_adapter(net, tmp_path)
    loaded = convlora.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x), trained) and convlora.summary(loaded) == convlora.summary(net)
    with convlora.disable_adapter(net):
        assert torch.equal(net(x), base(x))
    with torch.no_grad(), convlora.use_adapters(net, ["default", None]):
        torch.testing.assert_close(net(x), torch.stack([trained[0], base(x)[1]]))
    with torch.no_grad():
        assert torch.equal(convlora.merge(net)(x), trained)
    convlora.remove(convlora.unmerge(net))
    assert snapshot(net) == before


@pytest.mark.parametrize("name", ["StdConv2d", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_a_scale_that_the_layer_would_divide_out_is_not_put_there(name):
    layer = getattr(need("timm.layers"), name)(8, 12, 3)
    net, x = nn.Sequential(layer, nn.Conv2d(12, 4, 1)).eval(), torch.randn(2, 8, 6, 6)
    for method in ("ia3", "ssf"):
        plan = convlora.plan(net, method=method, modules_to_save=None)
        assert [layer.name for layer in plan.layers] == ["1"]
        assert plan.skipped[0].note == "it standardises its weight, which takes a scale out again"
    before = net(x)
    convlora.inject(net, method="ia3", method_options={"on_input": True}, modules_to_save=None)
    randomise(net, 1.0)
    assert (net(x) - before).abs().max() > 0.1
