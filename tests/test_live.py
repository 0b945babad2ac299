"""Adapters at another strength, and several at once: each law against sums of dense weights."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import SmallNet, snapshot
from torch import nn
from torch.func import functional_call

import convlora
from convlora import StateError, TargetError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
KINDS = {
    "lora": {},
    "lora, DoRA": {"use_dora": True},
    "lora, PiSSA": {"init": "pissa"},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr"},
    "hira": {"method": "hira"},
    "ssf": {"method": "ssf"},
    "oft": {"method": "oft"},
    "hra": {"method": "hra"},
    "dense": {"method": "dense"},
}
LAYERS = {"target_modules": nn.Conv2d, "modules_to_save": "fc"}


def moved(model, seed, size=0.1):
    """All that is trained, and the active adapter's statistics, away from where they began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(size * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.mul_(1 + torch.rand(buffer.shape, generator=generator))
    return model


def base_net():
    torch.manual_seed(0)
    return moved(SmallNet(), 9).eval()


def two(first="lora", second="loha", net=None):
    """A base, and it with adapters ``a`` and ``b``, each with numbers of its own in everything that it may train."""
    base = base_net() if net is None else net
    model = convlora.inject(copy.deepcopy(base), 2, adapter_name="a", norm="track", **LAYERS, **KINDS[first])
    convlora.add_adapter(model, "b", 3, norm="track", **LAYERS, **KINDS[second])
    for seed, name in enumerate("ab"):
        moved(convlora.set_adapter(model, name), seed)
    return base, convlora.set_adapter(model, "a").eval()


def outputs(model):
    with torch.no_grad():
        return model(IMAGES)


def plain(model):
    """The state dict of the plain network that the model is with what is active now."""
    return convlora.remove(convlora.merge(copy.deepcopy(model))).state_dict()


def alone(model, name):
    """As :func:`plain`, with one adapter at the strength that it has."""
    return plain(convlora.set_adapter(copy.deepcopy(model), name))


def dense(base, shares, of_rest):
    """The plain network with base + Σ weight · (each − base) in the layers, and ``of_rest`` for all other tensors."""
    start = base.state_dict()
    layers = {f"{name}.weight" for name, m in base.named_modules() if isinstance(m, nn.Conv2d)}
    layers |= {f"{name}.bias" for name, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    state = dict(of_rest)
    for key in layers:
        state[key] = start[key].double() + sum(w * (theirs[key].double() - start[key].double()) for w, theirs in shares)
    net = copy.deepcopy(base).double()
    net.load_state_dict(state)
    with torch.no_grad():
        return net(IMAGES.double()).float()


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- strength


@pytest.mark.parametrize("factor", [0.5, -1.0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_adapter_is_the_base_and_so_much_of_the_whole_change(kind, factor):
    base, model = two(kind)
    full = alone(model, "a")
    with convlora.scaled(model, factor):
        near(outputs(model), dense(base, [(factor, full)], full))


@pytest.mark.parametrize("kind", KINDS)
def test_factor_1_is_the_adapter_and_factor_0_the_base_both_to_the_bit(kind):
    base, model = two(kind)
    expected = outputs(model)
    with convlora.scaled(model, 1):
        assert torch.equal(outputs(model), expected)
    with convlora.scaled(model, 0, interpolate=True):
        assert torch.equal(outputs(model), outputs(base))
    with convlora.scaled(model, 0):
        assert torch.equal(outputs(model), outputs_with(base, alone(model, "a")))
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("factor", [0.25, 1.5])
def test_interpolated_head_and_statistics_are_between_the_base_s_and_the_adapter_s(factor):
    base, model = two()
    start, full = base.state_dict(), alone(model, "a")
    rest = {key: start[key] + factor * (full[key] - start[key]) for key in start if key.startswith("fc.")}
    of_base = max(0.0, 1 - factor)
    for key in (key for key in start if key.endswith("running_mean")):
        other = key.replace("mean", "var")
        means, variances = [start[key], full[key]], [start[other], full[other]]
        shares = [of_base / (of_base + factor), factor / (of_base + factor)]
        rest[key] = sum(s * mean for s, mean in zip(shares, means, strict=True))
        square = sum(s * (v + m**2) for s, v, m in zip(shares, variances, means, strict=True))  # E[x²] of all data
        rest[other] = square - rest[key] ** 2
    with convlora.scaled(model, factor, interpolate=True):
        near(outputs(model), dense(base, [(factor, full)], {**full, **rest}))


def test_a_pattern_scales_its_layers_alone_and_a_name_its_adapter_alone():
    base, model = two()
    convlora.set_adapter(model, {"a": 1.0, "b": 1.0}, owner="a")
    a, b = alone(model, "a"), alone(model, "b")
    with convlora.scaled(model, 0.5, "b"):
        near(outputs(model), dense(base, [(1, a), (0.5, b)], a))
    half = {key: a[key] if not key.startswith("block.") else (base.state_dict()[key] + a[key]) / 2 for key in a}
    convlora.set_adapter(model, "a")
    with convlora.scaled(model, 0.5, target_modules="block.*"):
        near(outputs(model), dense(base, [(1, half)], a))


def test_open_blocks_multiply_and_all_is_as_before_when_they_are_left():
    _, model = two()
    before, expected = snapshot(model), outputs(model)
    with convlora.scaled(model, 0.2):
        fifth = outputs(model)
    with convlora.scaled(model, 0.4), convlora.scaled(model, 0.5):
        near(outputs(model), fifth)
    with pytest.raises(ZeroDivisionError), convlora.scaled(model, 0.4, interpolate=True):
        outputs(model).div(1 // 0)
    assert snapshot(model) == before and torch.equal(outputs(model), expected)


def test_blocks_of_several_threads_end_in_any_order_in_the_same_bits():
    _, model = two()
    expected, opened, leave = outputs(model), threading.Barrier(3), [threading.Event(), threading.Event()]

    def hold(number):
        with convlora.scaled(model, 0.5, interpolate=bool(number)):
            opened.wait()
            leave[number].wait()

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    opened.wait()
    with convlora.scaled(model, 4), torch.no_grad():  # 0.5 · 0.5 · 4
        assert not torch.equal(model(IMAGES), expected)
    for number, thread in enumerate(threads):
        assert not torch.equal(outputs(model), expected)
        leave[number].set()
        thread.join()
    assert torch.equal(outputs(model), expected)


def test_a_scale_is_saved_with_the_adapter_and_1_is_what_was_trained(tmp_path):
    base, model = two()
    full, expected = alone(model, "a"), outputs(model)
    convlora.set_scale(model, "a", 0.7)
    scaled = outputs(model)
    near(scaled, dense(base, [(0.7, full)], full))
    convlora.save_adapter(model, tmp_path)
    loaded = convlora.load_adapter(base, tmp_path).eval()
    assert torch.equal(outputs(loaded), scaled)
    assert "scaled by 0.7" in str(convlora.summary(loaded)) and "strength=0.7" in repr(loaded.stem)
    assert torch.equal(outputs(convlora.set_scale(loaded, "a", 1)), expected)
    assert torch.equal(outputs(convlora.set_scale(model, "a", 1)), expected)


def test_a_scale_concerns_one_adapter_active_or_not_and_the_layers_of_a_pattern():
    base, model = two()
    expected = outputs(model)
    convlora.set_scale(model, "b", 0.5, target_modules="stem")
    assert torch.equal(outputs(model), expected)
    full = alone(convlora.set_scale(copy.deepcopy(model), "b", 1), "b")
    stem = {
        key: value if not key.startswith("stem") else (value + base.state_dict()[key]) / 2
        for key, value in full.items()
    }
    near(outputs(convlora.set_adapter(model, "b")), dense(base, [(1, stem)], full))


def test_a_combination_counts_each_adapter_at_its_scale():
    base, model = two("lora", "lora")
    convlora.set_scale(model, "b", 0.5)
    convlora.combine_adapters(model, {"a": 1.0, "b": 2.0}, "sum")
    a, b = alone(model, "a"), alone(convlora.set_scale(copy.deepcopy(model), "b", 1), "b")
    convlora.set_adapter(model, "sum")
    near(outputs(model), dense(base, [(1, a), (1, b)], plain(model)))


def test_merged_inside_a_block_the_network_keeps_the_strength_and_unmerged_later_it_has_its_own():
    _, model = two()
    expected = outputs(model)
    with convlora.scaled(model, 0.3):
        weaker = outputs(model)
        convlora.merge(model)
    assert torch.equal(outputs(model), weaker)
    assert torch.equal(outputs(convlora.unmerge(model)), expected)


# ---- the situations of peft's own tests of rescale_adapter_scale that are not above


def test_ranks_and_alphas_by_pattern_scale_alike():
    base = base_net()
    model = convlora.inject(
        copy.deepcopy(base), 4, adapter_name="a", rank_pattern={"stem": 2}, alpha_pattern={"block.*": 5}, **LAYERS
    )
    full, expected = alone(moved(model, 1).eval(), "a"), outputs(model)
    with convlora.scaled(model, 0.5):
        near(outputs(model), dense(base, [(0.5, full)], full))
    assert torch.equal(outputs(model), expected)


def test_two_models_are_scaled_each_in_its_block():
    (_, one), (_, other) = two(), two("dense")
    expected = outputs(one), outputs(other)
    with convlora.scaled(one, 0.5), convlora.scaled(other, 0.5):
        assert not torch.equal(outputs(one), expected[0]) and not torch.equal(outputs(other), expected[1])
    assert torch.equal(outputs(one), expected[0]) and torch.equal(outputs(other), expected[1])


def test_a_model_without_adapters_cannot_be_scaled():
    with pytest.raises(StateError, match="carries no adapter"), convlora.scaled(base_net(), 0.5):
        pass


def test_merged_and_taken_out_inside_a_block_the_plain_network_keeps_the_strength():
    _, model = two()
    with convlora.scaled(model, 0.5):
        expected = outputs(model)
        model = convlora.remove(convlora.merge(model))
    assert torch.equal(outputs(model), expected) and type(model.stem) is nn.Conv2d


# ---- several at once


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "lora"), ("lora", "oft"), ("lora, DoRA", "hra"), ("ssf", "lokr")]
)
def test_several_are_the_base_and_the_sum_of_their_weighted_changes(first, second):
    base, model = two(first, second)
    a, b = alone(model, "a"), alone(model, "b")
    convlora.set_adapter(model, {"a": 1.0, "b": 0.5}, owner="b")
    found = outputs(model)
    near(found, dense(base, [(1, a), (0.5, b)], b))
    assert torch.equal(outputs(convlora.merge(model)), found)
    assert torch.equal(outputs(convlora.unmerge(model)), found)
    for again in ({"b": 0.5, "a": 1.0}, {"a": 1, "b": 0.5}):
        assert torch.equal(outputs(convlora.set_adapter(model, again, owner="b")), found)


def test_a_weight_of_1_alone_is_that_adapter_and_a_list_means_1_for_each():
    _, model = two()
    before = snapshot(model)
    assert snapshot(convlora.set_adapter(model, {"a": 1.0})) == before
    assert snapshot(convlora.set_adapter(model, ["a"])) == before
    found = outputs(convlora.set_adapter(model, ["b", "a"]))
    assert torch.equal(found, outputs(convlora.set_adapter(model, {"a": 1.0, "b": 1.0})))
    assert not torch.equal(found, outputs(convlora.set_adapter(model, "a")))
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_and_its_copy_with_the_opposite_weight_cancel(kind, tmp_path):
    """As peft's test of subtraction by weights."""
    base, model = two(kind)
    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(model, tmp_path, "copy")
    near(
        outputs(convlora.set_adapter(model, {"a": 1.5, "copy": -1.5}, owner="a")), outputs_with(base, alone(model, "a"))
    )


def outputs_with(base, state):
    """What the base's layers predict under another head and other statistics."""
    layers = tuple(f"{name}." for name, m in base.named_modules() if isinstance(m, nn.Conv2d))
    start, net = base.state_dict(), copy.deepcopy(base)
    net.load_state_dict({key: start[key] if key.startswith(layers) else state[key] for key in start})
    return outputs(net)


def test_five_at_once_of_different_ranks():
    base, model = two("lora", "lora")
    for number, name in enumerate("cde"):
        convlora.add_adapter(model, name, 1 + number, norm="track", **LAYERS)
        moved(convlora.set_adapter(model, name), 5 + number)
    weights = {"e": 0.1, "a": 0.2, "d": -0.3, "b": 0.4, "c": 0.5}
    each = [(weight, alone(model, name)) for name, weight in weights.items()]
    convlora.set_adapter(model.eval(), weights, owner="c")
    near(outputs(model), dense(base, each, each[-1][1]))


def test_without_an_owner_the_rest_is_what_a_combination_has():
    _, model = two("lora", "lora")
    convlora.combine_adapters(model, {"a": 0.7, "b": 0.3}, "both")
    near(outputs(convlora.set_adapter(model, {"a": 0.7, "b": 0.3})), outputs(convlora.set_adapter(model, "both")))


@pytest.mark.parametrize("second", ["lora", "loha", "lora, DoRA"])
def test_training_goes_to_those_named_and_its_gradients_are_autograd_s(second):
    base, model = two("lora", second, base_net().double())
    convlora.set_adapter(model.train(), {"a": 1.0, "b": 0.5}, owner="a", trained=["b"])
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert named and all(".convlora.b." in name for name in named if ".convlora." in name)
    images = IMAGES.double()
    loss = model(images).square().mean()
    loss.backward()

    weights = {name: {} for name in "ab"}
    changes = {name: m.convlora for name, m in model.named_modules() if "convlora" in m._modules}
    for layer, adapters in changes.items():
        for name in "ab":
            weights[name][layer] = adapters[name].effective_weight(base.get_submodule(layer).weight.detach())
    state = {key: p.detach() for key, p in model.state_dict().items() if ".convlora." not in key}
    for layer in changes:
        start = base.get_submodule(layer).weight.detach()
        both = (weights["a"][layer] - start) + 0.5 * (weights["b"][layer] - start)
        state[f"{layer}.weight"] = start + both
    expected = functional_call(base.eval(), state, images).square().mean()
    torch.testing.assert_close(loss, expected)
    factors = [p for name, p in model.named_parameters() if ".convlora.b." in name]
    for factor, gradient in zip(factors, torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(factor.grad, gradient)


def test_the_owner_s_head_is_trained_with_it_and_a_mixture_is_not():
    _, model = two()
    convlora.set_adapter(model, ["a", "b"], owner="b")
    assert model.fc.weight.requires_grad
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    head = model.fc.weight.clone()
    convlora.set_adapter(model, ["a", "b"])
    assert not model.fc.weight.requires_grad
    assert torch.equal(convlora.set_adapter(model, "b").fc.weight, head) and model.fc.weight.requires_grad
    assert convlora.check(convlora.set_adapter(model, ["a", "b"])) == []


def test_each_change_s_dropout_is_its_own(monkeypatch):
    base = base_net()
    model = convlora.inject(copy.deepcopy(base), 2, adapter_name="a", dropout=0.5, **LAYERS)
    convlora.add_adapter(model, "b", 2, dropout=0.25, use_dora=True, **LAYERS)
    for seed, name in enumerate("ab"):
        moved(convlora.set_adapter(model, name), seed)
    convlora.set_adapter(model.eval(), {"a": 2.0, "b": 0.5}, owner="a")
    expected, rates = outputs(model), set()
    monkeypatch.setattr("convlora._layer.adapted.F.dropout", lambda x, p: rates.add(p) or x)
    near(model.train()(IMAGES).detach(), expected)
    assert rates == {0.5, 0.25}


def test_a_batch_whose_samples_have_weights_is_each_sample_alone():
    _, model = two("lora", "ssf")
    asked = ["a", {"a": 1.0, "b": 0.5}, None, {"b": 0.5, "a": 1.0}]
    with convlora.use_adapters(model, asked):
        together = outputs(model)
    for row, each in enumerate(asked):
        if each is None:
            with convlora.disable_adapter(model):
                expected = outputs(model)
        else:
            expected = outputs(convlora.set_adapter(model, each))
        near(together[row], expected[row])


@pytest.mark.parametrize("methods", [("lora", "ssf"), ("ssf", "lora"), ("ssf", "ssf")])
def test_samples_that_weigh_the_same_adapters_otherwise_have_mixtures_of_their_own(methods):
    _, model = two(*methods)
    convlora.set_scale(model, "a", 0.5)
    asked = [{"a": 1.0, "b": 0.5}, {"a": 0.25, "b": 0.75}, {"a": 2.0}, {"b": -0.5}]
    with convlora.use_adapters(model, asked):
        together = outputs(model)
    for row, each in enumerate(asked):
        near(together[row], outputs(convlora.set_adapter(model, each))[row])


def test_a_routed_batch_counts_each_adapter_at_its_scale():
    _, model = two("ssf", "lora")
    convlora.set_scale(model, "a", 0.5)
    expected = outputs(model)
    convlora.set_scale(model, "b", 2.0)
    with convlora.use_adapters(model, ["a", "b", "a", "b"]):
        together = outputs(model)
    near(together[[0, 2]], expected[[0, 2]])
    near(together[[1, 3]], outputs(convlora.set_adapter(model, "b"))[[1, 3]])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_what_the_model_does(way):
    _, model = two()
    convlora.set_scale(model, "b", 0.4)
    convlora.set_adapter(model, {"a": 0.5, "b": 1.0})
    assert torch.equal(outputs(way(model)), outputs(model))
    before = snapshot(model)
    with convlora.disable_adapter(model):
        pass
    assert snapshot(model).keys() == before.keys()
    assert torch.equal(outputs(way(model)), outputs(model))


@pytest.mark.parametrize("interpolate", [False, True])
def test_a_copy_made_inside_a_block_keeps_its_strength_until_an_adapter_is_set(interpolate):
    _, model = two()
    expected = outputs(model)
    with convlora.scaled(model, 0.5, interpolate=interpolate):
        inside, copied = outputs(model), copy.deepcopy(model)
        assert torch.equal(outputs(copied), inside)
    assert torch.equal(outputs(copied), inside) and convlora.check(copied) == []
    assert torch.equal(outputs(convlora.merge(copied)), inside)
    assert torch.equal(outputs(convlora.set_adapter(convlora.unmerge(copied), "a")), expected)


def test_taken_out_the_base_is_as_it_was():
    base = base_net()
    model = copy.deepcopy(base)
    before = snapshot(model)
    convlora.inject(model, 2, adapter_name="a", norm="track", **LAYERS)
    convlora.add_adapter(model, "b", 2, **LAYERS)
    convlora.set_adapter(model, {"a": 0.5, "b": 2.0})
    assert snapshot(convlora.remove(model)) == before


def test_a_state_dict_says_which_weights_it_is_of():
    _, model = two()
    convlora.set_adapter(model, {"a": 0.5, "b": 1.0}, owner="a")
    state = model.state_dict()
    convlora.set_adapter(model, "a")
    with pytest.raises(StateError, match=r"convlora.set_adapter\(model, \{'a': 0.5, 'b': 1.0\}\)"):
        model.load_state_dict(state)


# ---- errors

WRONG = {
    "no number": (lambda m: convlora.set_adapter(m, {"a": float("nan")}), TargetError, "weight of a=nan"),
    "no name": (lambda m: convlora.set_adapter(m, []), TargetError, "names no adapter"),
    "strange name": (lambda m: convlora.set_adapter(m, {"c": 1.0}), StateError, "There is no adapter 'c'"),
    "strange owner": (lambda m: convlora.set_adapter(m, ["a"], owner="b"), TargetError, "owner='b' is not among"),
    "strange trained": (
        lambda m: convlora.set_adapter(m, ["a"], trained=["b"]),
        TargetError,
        "trained='b' is not among",
    ),
    "factor": (lambda m: convlora.scaled(m, "half").__enter__(), TargetError, "factor='half'"),
    "pattern": (lambda m: convlora.scaled(m, 1, target_modules="stom").__enter__(), TargetError, "Closest names: stem"),
    "both": (
        lambda m: convlora.scaled(m, 1, target_modules="stem", interpolate=True).__enter__(),
        TargetError,
        "interpolate=True is for all layers",
    ),
    "scaled name": (lambda m: convlora.scaled(m, 1, "c").__enter__(), StateError, "There is no adapter 'c'"),
    "scaled at rest": (lambda m: convlora.scaled(m, 1, "b").__enter__(), StateError, "'b' is not active"),
    "scale": (lambda m: convlora.set_scale(m, "a", float("inf")), TargetError, "scale=inf"),
    "scale of none": (lambda m: convlora.set_scale(m, "c", 1.0), StateError, "There is no adapter 'c'"),
    "merged": (lambda m: convlora.set_scale(convlora.merge(m), "a", 1.0), StateError, "convlora.unmerge"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_and_nothing_is_changed(case):
    wrong, error, words = WRONG[case]
    _, model = two()
    expected = outputs(model)
    with pytest.raises(error, match=words):
        wrong(model)
    assert torch.equal(outputs(model), expected)


def test_with_several_active_one_has_to_be_named():
    _, model = two()
    convlora.set_adapter(model, {"a": 1.0, "b": 0.5})
    for call in (convlora.summary, lambda m: convlora.save_adapter(m, "nowhere"), lambda m: convlora.shrink(m, 1)):
        with pytest.raises(StateError, match="give the name of one"):
            call(model)
    with pytest.raises(StateError, match="'b' is active"):
        convlora.delete_adapter(model, "b")


def test_what_one_trains_in_full_and_another_changes_does_not_go_together():
    model = convlora.inject(base_net(), 2, adapter_name="a", target_modules="fc", modules_to_save="hidden")
    convlora.add_adapter(model, "b", 2, target_modules="stem", modules_to_save="fc")
    with pytest.raises(StateError, match="fc is trained in full in 'b' and changed in 'a'"):
        convlora.set_adapter(model, ["a", "b"])


# ---- what was once wrong


def trained_ssf():
    torch.manual_seed(0)
    model = convlora.inject(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), method="ssf", modules_to_save=None)
    return moved(model, 1, 1.0)


def test_a_scaled_bias_is_mixed_in_the_loaded_adapter_too(tmp_path):
    model, images = trained_ssf(), torch.ones(1, 3, 3, 3)
    convlora.save_adapter(convlora.set_scale(model, "default", 0.5), tmp_path)
    torch.manual_seed(0)
    loaded = convlora.load_adapter(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), tmp_path)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(convlora.merge(loaded)(images), model(images))


def test_a_bias_that_is_mixed_is_told_not_to_train_and_one_of_weight_1_trains():
    model = trained_ssf()
    assert model[0].bias.requires_grad and convlora.check(model) == []
    with convlora.scaled(model, 0.5):
        assert [finding.name for finding in convlora.check(model)] == ["0.bias"]
        with pytest.warns(UserWarning, match=r"0.bias: the bias is a mixture"):
            convlora.trainable_parameters(model)
    convlora.add_adapter(model, "lora", 1, modules_to_save=None)
    own = convlora.set_adapter(model, "default")[0].bias
    convlora.set_adapter(model, {"default": 1.0, "lora": 0.5}, owner="lora")
    assert model[0].bias is own and own.requires_grad and convlora.check(model) == []


def test_no_state_dict_goes_into_a_mixture_or_out_of_one_and_strengths_are_compared():
    _, model = two()
    own, expected = model.state_dict(), outputs(model)
    with convlora.scaled(model, 0.5, interpolate=True):
        mixed = model.state_dict()
        with pytest.raises(StateError, match="The model has a head, statistics or biases that are a mixture"):
            model.load_state_dict(own)
    with pytest.raises(StateError, match="The state dict has a head"):
        model.load_state_dict(mixed)
    convlora.set_scale(model, "b", 0.5)
    with pytest.raises(StateError, match=r"the adapters' strengths 1, and the model has \{'b'"):
        model.load_state_dict(own)
    convlora.set_scale(model, "b", 1).load_state_dict(own)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("asked", [{"a": 1.0, "b": 1.0}, {"a": 0.5}])
def test_interpolated_at_1_the_owner_s_head_is_its_own(asked):
    _, model = two()
    expected = outputs(convlora.set_adapter(model, asked, owner="a"))
    kinds = [type(module) for module in model.modules()]
    with convlora.scaled(model, 1, interpolate=True):
        assert torch.equal(outputs(model), expected) and [type(m) for m in model.modules()] == kinds
    head = model.fc.weight.detach().clone()
    with convlora.disable_adapter(model):
        start = model.fc.weight.detach().clone()
    with convlora.scaled(model, 0.25, interpolate=True):
        near(model.fc.weight.detach(), start + 0.25 * (head - start))


NO_NAMES = {
    "a number for a name": lambda m: convlora.set_adapter(m, {1: 1.0}),
    "nothing": lambda m: convlora.set_adapter(m, None),
    "a number": lambda m: convlora.set_adapter(m, 1),
    "lists in a list": lambda m: convlora.set_adapter(m, [["a"]]),
    "owner": lambda m: convlora.set_adapter(m, ["a", "b"], owner=["a"]),
    "trained": lambda m: convlora.set_adapter(m, ["a", "b"], trained=5),
    "scaled": lambda m: convlora.scaled(m, 0.5, ["a"]).__enter__(),
    "a sample": lambda m: convlora.use_adapters(m, [{1: 1.0}] * 4).__enter__(),
    "samples": lambda m: convlora.use_adapters(m, None).__enter__(),
}


@pytest.mark.parametrize("case", NO_NAMES)
def test_what_is_no_name_is_refused_in_words(case):
    _, model = two()
    expected = outputs(model)
    with pytest.raises((TargetError, StateError), match=r"it must be|is not among"):
        NO_NAMES[case](model)
    assert torch.equal(outputs(model), expected)


def trained_now(model):
    return {name.split(".")[-2] for name, p in model.named_parameters() if ".convlora." in name and p.requires_grad}


def test_who_is_trained_may_come_as_any_iterable_or_one_name():
    _, model = two()
    for trained in (["b"], iter(["b"]), "b"):
        assert trained_now(convlora.set_adapter(model, iter(["a", "b"]), trained=trained)) == {"b"}
    assert trained_now(convlora.set_adapter(model, "a", trained=[])) == set()
    assert trained_now(convlora.set_adapter(model, "a")) == {"a"}


def test_buffers_of_different_lengths_are_those_of_the_largest_weight():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("seen", torch.zeros(4), persistent=False)

    model = convlora.inject(Grows(), 2, adapter_name="a", modules_to_save=None)
    model.seen = torch.arange(8.0)
    convlora.add_adapter(model, "b", 2, modules_to_save=None)
    assert len(convlora.set_adapter(model, {"a": 0.6, "b": 0.5}).seen) == 8
    assert len(convlora.set_adapter(model, {"a": 0.4, "b": 0.5}).seen) == 4


def test_a_weight_of_0_leaves_out_what_is_not_finite():
    base = base_net()
    model = convlora.inject(copy.deepcopy(base), method="dense", modules_to_save=None).eval()
    with torch.no_grad():
        for parameter in convlora.trainable_parameters(model):
            parameter.fill_(float("inf"))
    with convlora.scaled(model, 0):
        assert torch.equal(outputs(model), outputs(base))
        assert torch.equal(outputs(convlora.merge(model)), outputs(base))
