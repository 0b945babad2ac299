"""Adapters made of others: combine, shrink, extract; each held against its definition on dense changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import SmallNet, dense_delta, need, randomise, snapshot
from laws import given, st
from torch import nn

import convlora
from convlora._layer.lowrank import Spectrum, tolerance_of

LAYERS = ("stem", "block.0", "block.3")


def several(norm="freeze", **options) -> SmallNet:
    """A base with two trained adapters, "a" (active) and "b", of other ranks and targets."""
    torch.manual_seed(0)
    net = SmallNet().double().train()
    convlora.inject(net, 4, adapter_name="a", norm=norm)
    convlora.add_adapter(net, "b", 2, alpha=3.0, target_modules=("stem", "block.3"), norm=norm, **options)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for seed, name in enumerate("ba"):
        convlora.set_adapter(net, name)
        randomise(net, 0.2, seed)
        optimizer = torch.optim.SGD(convlora.trainable_parameters(net), lr=0.05)
        net(x + seed).square().mean().backward()
        optimizer.step()
    return net


def delta(net: nn.Module, layer: str, name: str) -> torch.Tensor:
    module = net.get_submodule(layer)
    if name not in module.convlora:
        return torch.zeros_like(convlora.base_weight(module))
    return dense_delta(module, name).detach()


def plain_state(net: nn.Module, name: str) -> dict[str, torch.Tensor]:
    convlora.set_adapter(net, name)
    return {k: v.clone() for k, v in net.state_dict().items() if ".convlora." not in k}


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1.0, "b": -2.0}, {"b": 0.5}])
def test_exact_is_the_weighted_sum_of_the_changes(weights):
    net = several()
    report = convlora.combine_adapters(net, weights, "sum")
    assert report.error < 1e-15 and "sum" not in print_of(net, "a")
    for layer in LAYERS:
        expected = sum(weight * delta(net, layer, name) for name, weight in weights.items())
        torch.testing.assert_close(delta(net, layer, "sum"), expected, rtol=1e-12, atol=1e-14)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks["stem"] == sum({"a": 4, "b": 2}[name] for name in weights)


def print_of(net, name):
    return str(convlora.summary(net, name))


def test_exact_where_the_ranks_add_up_to_more_than_the_matrix_has():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.LazyLinear(3)).double()
    net(torch.randn(1, 2, 3, 3, dtype=torch.float64))
    convlora.inject(net, 1, adapter_name="a0")
    for name in ("a1", "a2"):
        convlora.add_adapter(net, name, 1)
    for seed, name in enumerate(("a2", "a1", "a0")):
        convlora.set_adapter(net, name)
        randomise(net, seed=seed)
    report = convlora.combine_adapters(net, {"a0": 1, "a1": 2, "a2": 3}, "sum")
    assert report.layers[0].rank == 2 and report.error < 1e-12
    expected = sum(w * delta(net, "0", f"a{w - 1}") for w in (1, 2, 3))
    torch.testing.assert_close(delta(net, "0", "sum"), expected, rtol=1e-12, atol=1e-14)


def test_svd_is_the_nearest_of_its_rank_and_says_how_near():
    net = several()
    report = convlora.combine_adapters(net, {"a": 0.6, "b": 0.4}, "near", method="svd", rank=3)
    for layer in report.layers:
        dense = 0.6 * delta(net, layer.name, "a") + 0.4 * delta(net, layer.name, "b")
        values = torch.linalg.svdvals(dense.flatten(1))
        best = float(values[layer.rank :].norm())
        assert layer.rank == min(3, 7 if layer.name == "block.0" else 16)
        assert math.isclose(layer.lost, best, rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(float((dense - delta(net, layer.name, "near")).norm()), best, rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(layer.size, float(dense.norm()), rel_tol=1e-9)


def ties_by_hand(changes: list[torch.Tensor]) -> torch.Tensor:
    result = torch.zeros_like(changes[0]).flatten()
    for i, values in enumerate(zip(*(c.flatten().tolist() for c in changes), strict=True)):
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [v for v in values if v * sign > 0]
        result[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result.view(changes[0].shape)


def test_ties_trims_elects_and_averages_as_published():
    net = several()
    convlora.combine_adapters(net, {"a": 1.0, "b": 0.5}, "ties", method="ties", rank=16, density=0.3)
    trimmed = {}
    for name, share in (("a", 1.0), ("b", 0.5)):
        dense = {layer: delta(net, layer, name) for layer in LAYERS}
        sizes = torch.cat([d.abs().flatten() for layer, d in dense.items() if name == "a" or layer != "block.0"])
        least = sizes.sort(descending=True).values[round(0.3 * sizes.numel()) - 1]
        trimmed[name] = {layer: share * torch.where(d.abs() >= least, d, 0.0) for layer, d in dense.items()}
    expected = ties_by_hand([trimmed["a"]["block.3"], trimmed["b"]["block.3"]])
    values = torch.linalg.svd(expected.flatten(1), full_matrices=False)
    rank = len(net.block[3].convlora["ties"].lora_A)
    near = (values.U[:, :rank] * values.S[:rank]) @ values.Vh[:rank]
    torch.testing.assert_close(delta(net, "block.3", "ties").flatten(1), near, rtol=1e-9, atol=1e-12)


def test_dare_with_every_entry_kept_is_the_sum_and_its_draws_repeat():
    net = several()
    kept = convlora.combine_adapters(net, {"a": 0.5, "b": 0.5}, "all", method="dare", rank=6, density=1.0)
    for layer in LAYERS:
        expected = 0.5 * delta(net, layer, "a") + 0.5 * delta(net, layer, "b")
        torch.testing.assert_close(delta(net, layer, "all"), expected, rtol=1e-9, atol=1e-12)
    assert kept.error < 1e-7
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        convlora.combine_adapters(net, {"a": 0.5, "b": 0.5}, name, method="dare", seed=seed)
    assert torch.equal(delta(net, "stem", "one"), delta(net, "stem", "again"))
    assert not torch.equal(delta(net, "stem", "one"), delta(net, "stem", "two"))


def test_dare_scales_up_what_it_keeps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Flatten()).double()
    convlora.inject(net, 1, adapter_name="a", modules_to_save=None)
    with torch.no_grad():
        net[0].convlora["a"].lora_A.fill_(1.0)
        net[0].convlora["a"].lora_B.fill_(0.5)  # scaling 2: every entry of the change is 1
    from convlora._algebra.methods import _dare

    combined = _dare({"0": {"a": (net[0].convlora["a"], 1.0)}}, 32, 0.25, 0)
    _, _, lost, size = combined["0"]
    # Entries are 0 or 4: ‖ΔW‖² = 16 · kept, and a quarter of 4096 is kept.
    assert abs(size**2 / 16 / 4096 - 0.25) < 0.03 and 0 < lost < size


def test_heads_are_summed_from_the_base_and_statistics_are_those_of_the_mixture():
    net = several(norm="track")
    convlora.combine_adapters(net, {"a": 0.75, "b": 0.25}, "sum")
    with convlora.disable_adapter(net):
        base = {k: v.clone() for k, v in net.state_dict().items()}
    a, b, both = (plain_state(net, name) for name in ("a", "b", "sum"))
    for key in ("fc.weight", "fc.bias"):
        assert not torch.equal(a[key], b[key])
        torch.testing.assert_close(both[key], base[key] + 0.75 * (a[key] - base[key]) + 0.25 * (b[key] - base[key]))
    mean = 0.75 * a["bn1.running_mean"] + 0.25 * b["bn1.running_mean"]
    second = sum(share * (s["bn1.running_var"] + s["bn1.running_mean"] ** 2) for share, s in ((0.75, a), (0.25, b)))
    torch.testing.assert_close(both["bn1.running_mean"], mean)
    torch.testing.assert_close(both["bn1.running_var"], second - mean**2)
    assert not torch.equal(a["bn1.running_mean"], b["bn1.running_mean"])
    assert both["bn1.num_batches_tracked"] == a["bn1.num_batches_tracked"]


def test_the_sum_of_one_predicts_like_it_and_is_saved_loaded_trained_and_deleted(tmp_path, images, train):
    net = several(norm="track")
    x = images.double()
    before = {name: plain_state(net, name) for name in "ab"}
    convlora.combine_adapters(net, {"a": 1.0}, "again")
    net.eval()
    outputs = {}
    for name in ("a", "again"):
        convlora.set_adapter(net, name)
        outputs[name] = net(x).detach()
    torch.testing.assert_close(outputs["a"], outputs["again"], rtol=1e-10, atol=1e-12)
    convlora.save_adapter(net, tmp_path / "again")
    torch.manual_seed(0)
    loaded = convlora.load_adapter(SmallNet().double(), tmp_path / "again").eval()
    assert torch.equal(loaded(x), outputs["again"])
    train(net, x)
    for name in "ab":
        after = plain_state(net, name)
        assert all(torch.equal(before[name][key], after[key]) for key in after)
    convlora.delete_adapter(net, "again")
    with pytest.raises(convlora.StateError, match="no adapter 'again'"):
        convlora.set_adapter(net, "again")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, "c"), convlora.TargetError, "names no adapter"),
        (({"a": 0.0}, "c"), convlora.TargetError, r"weights\['a'\]=0.0"),
        (({"a": math.nan}, "c"), convlora.TargetError, "finite"),
        (({"z": 1.0}, "c"), convlora.StateError, "no adapter 'z'"),
        (({"a": 1.0}, "b"), convlora.StateError, "'b' already"),
    ],
)
def test_what_cannot_be_combined_is_one_error_and_changes_nothing(arguments, error, message):
    net = several()
    before = snapshot(net)
    with pytest.raises(error, match=message):
        convlora.combine_adapters(net, *arguments)
    assert snapshot(net) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "'exact', 'svd', 'ties', 'dare'"),
        ({"rank": 4}, "rank=4 belongs"),
        ({"density": 0.5}, "density=0.5 belongs"),
        ({"method": "ties", "density": 0.0}, "above 0 to 1"),
        ({"method": "svd", "rank": 0}, "rank=0"),
    ],
)
def test_options_of_another_method_are_refused(options, message):
    net = several()
    with pytest.raises(convlora.TargetError, match=message):
        convlora.combine_adapters(net, {"a": 1.0}, "c", **options)


def test_adapted_in_one_and_trained_in_full_in_another_is_refused():
    net = several(modules_to_save=("fc", "hidden"))
    convlora.add_adapter(net, "c", 2, target_modules="hidden")
    before = snapshot(net)
    with pytest.raises(convlora.StateError, match="hidden is trained in full in 'b' and has factors in 'c'"):
        convlora.combine_adapters(net, {"b": 1.0, "c": 1.0}, "sum")
    assert snapshot(net) == before


def test_merged_or_disabled_is_refused():
    net = several()
    with convlora.disable_adapter(net), pytest.raises(convlora.StateError, match="disabled"):
        convlora.combine_adapters(net, {"a": 1.0}, "c")
    convlora.merge(net)
    for call in (lambda: convlora.combine_adapters(net, {"a": 1.0}, "c"), lambda: convlora.shrink(net, 1)):
        with pytest.raises(convlora.StateError, match="merged"):
            call()


# ---- shrink


def test_shrink_takes_the_nearest_and_keeps_scaling_flags_and_head(images):
    net = several()
    x = images.double()
    dense = {layer: delta(net, layer, "a") for layer in LAYERS}
    head = net.fc.weight.clone()
    report = convlora.shrink(net, 2)
    for layer in report.layers:
        values = torch.linalg.svdvals(dense[layer.name].flatten(1))
        assert layer.rank == 2
        assert math.isclose(layer.error, float(values[2:].norm() / values.norm()), rel_tol=1e-9)
        now = delta(net, layer.name, "a")
        assert math.isclose(float((now - dense[layer.name]).norm()), layer.lost, rel_tol=1e-9)
        lora = net.get_submodule(layer.name).convlora["a"]
        assert lora.scaling == 2.0 and lora.lora_A.requires_grad and len(lora.lora_A) == 2
    assert torch.equal(net.fc.weight, head)
    plan = convlora.summary(net)
    assert plan.rank == 2 and all(p.scaling == 2.0 for p in plan.layers)
    net(x).sum().backward()
    assert all(p.grad is not None for p in convlora.trainable_parameters(net))


def test_shrink_to_all_of_its_energy_changes_nothing_that_counts(images, tmp_path):
    torch.manual_seed(0)
    net = convlora.inject(SmallNet().double().eval(), 6)
    randomise(net)
    with torch.no_grad():
        for lora in (net.stem.convlora["default"], net.block[3].convlora["default"]):
            lora.lora_A[2:] = 0.0  # really of rank 2
    before = net(images.double())
    report = convlora.shrink(net, tolerance=1e-9)
    assert {layer.name: layer.rank for layer in report.layers}["stem"] == 2
    torch.testing.assert_close(net(images.double()), before, rtol=1e-10, atol=1e-12)
    convlora.save_adapter(net, tmp_path)
    torch.manual_seed(0)
    loaded = convlora.load_adapter(SmallNet().double(), tmp_path).eval()
    assert torch.equal(loaded(images.double()), net(images.double()))


def test_an_adapter_at_rest_is_shrunk_at_rest_and_wakes_trainable():
    net = several()
    convlora.shrink(net, 1, adapter_name="b")
    assert not net.stem.convlora["b"].lora_A.requires_grad and len(net.stem.convlora["b"].lora_A) == 1
    assert len(net.stem.convlora["a"].lora_A) == 4
    convlora.set_adapter(net, "b")
    assert net.stem.convlora["b"].lora_A.requires_grad


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}, {"tolerance": -0.1}])
def test_shrink_asks_for_one_goal_in_range(options):
    net = several()
    before = snapshot(net)
    with pytest.raises(convlora.TargetError):
        convlora.shrink(net, **options)
    assert snapshot(net) == before


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_the_rank_for_a_tolerance_is_the_smallest_that_holds_it(rows, columns, rank, tolerance, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    B = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    spectrum = Spectrum.of_sum([(A, B, -0.7)])
    torch.testing.assert_close((spectrum.U * spectrum.S) @ spectrum.V, -0.7 * B @ A)
    found = spectrum.rank_for(tolerance)
    assert 1 <= found <= max(1, min(rows, columns, rank))
    assert spectrum.lost(found) <= tolerance * spectrum.size * (1 + 1e-9) + 1e-12 * spectrum.size
    if found > 1:
        assert spectrum.lost(found - 1) > tolerance * spectrum.size
    lora_A, lora_B = spectrum.factors(rank, -2.0)
    torch.testing.assert_close(-2.0 * lora_B @ lora_A, -0.7 * B @ A)


def test_energy_and_tolerance_are_two_words_for_one_thing():
    spectrum = Spectrum.of(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    assert spectrum.rank_for(tolerance_of(13 / 14 - 1e-6)) == 2
    assert spectrum.rank_for(tolerance_of(13 / 14 + 1e-3)) == 3


# ---- extract


def tuned_from(base: nn.Module, steps: int = 3) -> nn.Module:
    tuned = copy.deepcopy(base).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    for seed in range(steps):
        x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        tuned(x).square().mean().backward()
        optimizer.step()
    return tuned.eval()


def bases() -> tuple[SmallNet, nn.Module]:
    torch.manual_seed(0)
    net = SmallNet().double().eval()
    return net, tuned_from(net)


def test_extract_carries_head_norms_and_depthwise_exactly_and_the_rest_nearly(images, tmp_path):
    base, tuned = bases()
    state = copy.deepcopy(tuned.state_dict())
    report = convlora.extract(base, tuned, rank=4)
    assert {layer.name: layer.rank for layer in report.layers} == {"stem": 4, "block.0": 4, "block.3": 4}
    assert report.left_out == ("block.3.bias",)  # the other one has a norm behind it and did not move
    for layer in report.layers:
        weight = f"{layer.name}.weight"
        dense = state[weight] - convlora.base_weight(base.get_submodule(layer.name))
        values = torch.linalg.svdvals(dense.flatten(1))
        assert math.isclose(layer.lost, float(values[layer.rank :].norm()), rel_tol=1e-6, abs_tol=1e-9)
        off = float((base.get_submodule(layer.name).weight - state[weight]).detach().norm())
        assert math.isclose(off, layer.lost, rel_tol=1e-6, abs_tol=1e-9)
    now = base.state_dict()
    for key in ("fc.weight", "hidden.weight", "hidden.bias", "bn1.weight", "bn1.running_var", "block.1.bias"):
        assert torch.equal(now[key], state[key]), key
    assert all(torch.equal(tensor, state[key]) for key, tensor in tuned.state_dict().items())  # only read
    convlora.save_adapter(base, tmp_path)
    torch.manual_seed(0)
    loaded = convlora.load_adapter(SmallNet().double().eval(), tmp_path)
    assert torch.equal(loaded(images.double()), base(images.double()))
    convlora.remove(base)
    torch.manual_seed(0)
    assert all(torch.equal(t, base.state_dict()[k]) for k, t in SmallNet().double().state_dict().items())


def test_extract_with_all_the_energy_predicts_like_the_tuned(images):
    torch.manual_seed(0)
    base = SmallNet().double().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():  # a change of low rank, and no bias moves
        for seed, layer in enumerate((tuned.stem, tuned.block[3])):
            generator = torch.Generator().manual_seed(seed)
            change = (
                torch.randn(16, 2, generator=generator).double()
                @ torch.randn(2, layer.weight[0].numel(), generator=generator).double()
            )
            layer.weight += 0.1 * change.view(layer.weight.shape)
        tuned.fc.bias += 1.0
    report = convlora.extract(base, tuned, tolerance=1e-6)
    assert {layer.name: layer.rank for layer in report.layers} == {"stem": 2, "block.3": 2}
    assert report.left_out == () and report.error < 1e-6
    torch.testing.assert_close(base(images.double()), tuned(images.double()), rtol=1e-9, atol=1e-10)
    assert "unchanged" in str(convlora.summary(base))


def test_extract_twice_and_combine(images):
    base, first = bases()
    second = tuned_from(base, steps=1)
    convlora.extract(base, first, energy=0.9, adapter_name="first")
    convlora.extract(base, second, energy=0.9, adapter_name="second")
    convlora.combine_adapters(base, {"first": 0.5, "second": 0.5}, "both")
    convlora.set_adapter(base, "both")
    expected = 0.5 * delta(base, "stem", "first") + 0.5 * delta(base, "stem", "second")
    torch.testing.assert_close(delta(base, "stem", "both"), expected)


def test_excluded_layers_are_left_out_and_said():
    base, tuned = bases()
    report = convlora.extract(base, tuned, rank=2, exclude_modules="stem")
    assert "stem.weight" in report.left_out and "left out: stem.weight" in str(report)


def test_extract_from_another_architecture_or_from_itself_is_one_error():
    base, tuned = bases()
    before = snapshot(base)
    for other, message in (
        (SmallNet(num_classes=5).double(), r"fc.weight: \(3, 12\) in base, \(5, 12\) in tuned"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "stem.weight: only in base"),
        (copy.deepcopy(base), "nothing to extract"),
    ):
        with pytest.raises(convlora.TargetError, match=message):
            convlora.extract(base, other, rank=2)
    with pytest.raises(convlora.StateError, match="carries the adapter"):
        convlora.extract(base, convlora.inject(tuned, 2), rank=2)
    assert snapshot(base) == before


def test_a_real_network(images):
    timm = need("timm")
    torch.manual_seed(0)
    base = timm.create_model("efficientnet_lite0", num_classes=2).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 64, 64)
    far = (base(x) - tuned(x)).norm()
    report = convlora.extract(base, tuned, energy=0.999)
    assert all(layer.error <= 0.04 or layer.rank == report_room(base, layer.name) for layer in report.layers)
    assert (base(x) - tuned(x)).norm() < far


def report_room(net: nn.Module, name: str) -> int:
    from convlora._layer.functional import largest_rank

    return largest_rank(convlora.base_weight(net.get_submodule(name)).shape)
