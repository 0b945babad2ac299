"""What torch does to a model keeps working, injected and merged: one process, no compiler. docs/torch.md lists it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import timm
import torch
from conftest import SmallNet, randomise, snapshot, through_torch_save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convlora
from convlora import StateError, TargetError, UnsupportedLayerError

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # fp32, the same sums in another order
pytestmark = pytest.mark.usefixtures("one_thread")


def injected(norm: str = "freeze", **arguments) -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet()
    convlora.inject(net, 4, norm=norm, **arguments)
    randomise(net)
    return net


def real(name: str, norm: str = "freeze", **arguments) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3)
    with torch.no_grad():
        for key, buffer in net.named_buffers():  # as if trained: a norm that does nothing hides mistakes
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    convlora.inject(net, 4, norm=norm, **arguments)
    randomise(net, 0.02)
    return net


def merged_if(state: str, model: nn.Module) -> nn.Module:
    return convlora.merge(model) if state == "merged" else model


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.fixture
def photos() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(6))


STATES = pytest.mark.parametrize("state", ["injected", "merged"])
NORMS = pytest.mark.parametrize("norm", ["freeze", "track"])


# ---- copies and state dicts


@STATES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_copies_of_a_real_network_predict_the_same_bits(photos, state, duplicate):
    net = merged_if(state, real("resnet18", "track").eval())
    twin = duplicate(net)
    assert torch.equal(twin(photos), net(photos))
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in net.parameters()}


@STATES
def test_a_shallow_copy_shares_the_layers_as_of_any_module(images, state):
    net = merged_if(state, injected().eval())
    twin = copy.copy(net)
    assert torch.equal(twin(images), net(images)) and twin.stem is net.stem
    layer = copy.copy(net.stem)
    assert type(layer) is type(net.stem) and torch.equal(layer(images), net.stem(images))


@pytest.mark.parametrize("assign", [False, True])
def test_injected_state_loads_into_another_injected_model(images, assign):
    net, buffer = injected("track").train(), io.BytesIO()
    net(images)  # statistics move
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = convlora.inject(SmallNet(), 4, norm="track")
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert torch.equal(other.eval()(images), net.eval()(images))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_base_checkpoint_of_a_real_network_loads_strictly_into_the_injected(photos, name):
    torch.manual_seed(1)
    base = timm.create_model(name, num_classes=3).eval()
    net = real(name).eval()
    net.load_state_dict(base.state_dict())
    with torch.no_grad():
        for factor in convlora.adapter_parameters(net):
            factor.zero_()
    assert torch.equal(net(photos), base(photos))


def test_merged_state_loads_into_a_plain_network(images):
    net = convlora.merge(injected().eval())
    plain = SmallNet().eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(images), net(images))


# ---- dtype, layout, device


@STATES
def test_double_after_injection_computes_the_same_in_double(images, state):
    net = injected().eval()
    expected = net(images)
    merged_if(state, net).double()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    torch.testing.assert_close(net(images.double()), expected.double(), **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_trains_fp32_factors_and_merges_to_the_same_bits(images, dtype):
    torch.manual_seed(0)
    net = convlora.inject(SmallNet().to(dtype), 4)
    randomise(net)
    loss_of(net.train(), images.to(dtype)).backward()
    grads = [p.grad for p in convlora.adapter_parameters(net)]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)
    unmerged = net.eval()(images.to(dtype))
    assert torch.equal(convlora.merge(net)(images.to(dtype)), unmerged)


@STATES
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_channels_last_is_a_layout_and_no_other_result(photos, state, name):
    net = real(name).eval()
    expected = net(photos)
    net.to(memory_format=torch.channels_last)
    photos = photos.to(memory_format=torch.channels_last)
    got = merged_if(state, net)(photos)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # other kernels, twenty layers and more
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last) for m in net.modules() if isinstance(m, nn.Conv2d)
    )


@pytest.mark.parametrize("norm", ["freeze", "track"])
def test_autocast_trains_and_merging_changes_no_bit_of_it(images, norm):
    net = injected(norm).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(net, images).backward()
        grads = gradients(net)
        unmerged = net.eval()(images)
        assert unmerged.dtype == torch.bfloat16
    full = copy.deepcopy(net)
    convlora.merge(net)  # outside autocast: the weight is that of fp32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images), unmerged)
    assert len(grads) == 8 and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    torch.testing.assert_close(unmerged.float(), full(images), rtol=0.05, atol=0.02)  # eight bits of mantissa


def test_a_forward_without_gradients_before_does_not_cut_the_gradient_under_autocast(images):
    """Autocast keeps its casts of weights: one made without a gradient must not serve the training step."""
    net = injected().train()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            net(images)
        loss_of(net, images).backward()
    assert all(p.grad.any() for p in convlora.adapter_parameters(net))  # of the head torch 2.4 itself loses it


@contextmanager
def future(flag: str):
    before = getattr(torch.__future__, f"get_{flag}")()
    getattr(torch.__future__, f"set_{flag}")(True)
    try:
        yield
    finally:
        getattr(torch.__future__, f"set_{flag}")(before)


@pytest.mark.parametrize("flag", ["swap_module_params_on_conversion", "overwrite_module_params_on_conversion"])
def test_the_other_ways_in_which_torch_converts_parameters(images, flag):
    torch.manual_seed(0)
    net = SmallNet().eval()
    with torch.no_grad(), future(flag):
        base = net(images)
        convlora.inject(net, 4)
        randomise(net)
        single = net(images)
        net.double()
        double = net(images.double())
        torch.testing.assert_close(double, single.double(), **ROUNDING)
        assert torch.equal(convlora.merge(net)(images.double()), double)
        convlora.unmerge(net.float())
        assert torch.equal(net(images), single)
        assert torch.equal(convlora.remove(net)(images), base)


def test_on_meta_the_injected_model_still_tells_shapes(images):
    net = injected().to("meta")
    assert net(images.to("meta")).shape == (4, 3)


@STATES
def test_from_meta_to_empty_and_a_state_dict_bring_it_back(images, state):
    source = merged_if(state, injected().eval())
    net = merged_if(state, injected().eval()).to("meta").to_empty(device="cpu")
    net.load_state_dict(source.state_dict())
    assert torch.equal(net(images), source(images))


@pytest.mark.parametrize("call", ["merge", "save_adapter", "remove"])
def test_on_meta_there_is_nothing_to_merge_save_or_remove_and_one_error_says_so(tmp_path, call):
    net = injected().to("meta")
    arguments = (tmp_path,) if call == "save_adapter" else ()
    with pytest.raises(StateError, match="meta"):
        getattr(convlora, call)(net, *arguments)


# ---- gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(images, reentrant):
    net = injected().train()
    twin = copy.deepcopy(net)
    loss_of(net, images).backward()
    again = checkpoint(twin, images.clone().requires_grad_(), use_reentrant=reentrant)
    again.square().mean().backward()
    assert gradients(net).keys() == trainable(net).keys() and equal(gradients(net), gradients(twin))


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("name, late", [("resnet18", "layer4.*"), ("tf_efficientnet_lite0", "blocks.6.*")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_timm_gradient_checkpointing_gives_the_same_gradients(photos, name, late, everywhere):
    net = real(name, target_modules=nn.Conv2d if everywhere else late).train()
    twin = copy.deepcopy(net)
    photos.requires_grad_(not everywhere)  # older timm checkpoints reentrantly: what enters must need a gradient
    twin.set_grad_checkpointing()
    for model in (net, twin):
        torch.manual_seed(2)  # dropout in the head
        loss_of(model, photos).backward()
    assert gradients(net).keys() == trainable(net).keys()
    for name, found in gradients(twin).items():  # reentrant: the first forward rounds otherwise
        expected = gradients(net)[name]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_tracked_statistics_move_once_a_step_under_gradient_checkpointing(images, reentrant):
    net = injected("track").train()
    twin = copy.deepcopy(net)
    loss_of(net, images).backward()
    checkpoint(twin, images.clone().requires_grad_(), use_reentrant=reentrant).square().mean().backward()
    assert equal(gradients(net), gradients(twin))
    assert int(net.bn1.num_batches_tracked) == 1
    assert equal(buffers(net), buffers(twin))


# ---- averages of models


@NORMS
@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_an_averaged_copy_averages_the_factors_and_is_an_injected_model(images, tmp_path, kind, norm):
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    net = injected(norm).train()
    before = [p.detach().clone() for p in convlora.adapter_parameters(net)]
    if kind == "timm":
        average, update = ModelEmaV3(net, decay=0.5), "update"
    else:
        average, update = AveragedModel(net), "update_parameters"
        average.update_parameters(net)  # its first update copies, its second makes the mean
    randomise(net, seed=2)
    getattr(average, update)(net)
    for old, new, mean in zip(
        before, convlora.adapter_parameters(net), convlora.adapter_parameters(average.module), strict=True
    ):
        torch.testing.assert_close(mean, (old + new) / 2, rtol=1e-6, atol=1e-7)  # lerp rounds otherwise
    convlora.save_adapter(average.module, tmp_path)
    expected = average.module.eval()(images)
    torch.manual_seed(0)
    assert torch.equal(convlora.load_adapter(SmallNet(), tmp_path).eval()(images), expected)
    assert torch.equal(convlora.merge(average.module)(images), expected)
    assert convlora.summary(net).state == "injected"


# ---- networks that rewrite their own convolutions


@pytest.mark.parametrize("state", ["injected", "merged", "removed"])
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
@torch.no_grad()  # in inference merged and unmerged are one weight to the bit
def test_reparameterized_networks_predict_the_same(photos, name, state):
    from timm.utils.model import reparameterize_model

    net = real(name).eval()
    expected = net(photos)
    if state == "removed":
        convlora.remove(convlora.merge(net))
    small = reparameterize_model(merged_if(state, net))
    assert sum(isinstance(m, nn.Conv2d) for m in small.modules()) < sum(isinstance(m, nn.Conv2d) for m in net.modules())
    # fp32 sums of branches that were fused into one kernel, through tens of layers
    torch.testing.assert_close(small(photos), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(net(photos), expected)
    if state != "removed":  # the branches are gone; what is left of the adapter must not pass for the whole
        for call in (convlora.merge, convlora.unmerge):
            with pytest.raises(StateError):
                call(small)
        assert not list(_lora(convlora.remove(small)))


def _lora(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".convlora." in f".{name}"]


# ---- torch.func, higher derivatives


def test_per_sample_gradients_of_the_factors(images):
    from torch.func import functional_call, grad, vmap

    net = injected().eval()
    parameters = {name: p.detach() for name, p in trainable(net).items()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(net, values, (image[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for index in range(len(images)):
        net.zero_grad()
        loss_of(net, images[index : index + 1]).backward()
        one = {name: g[index] for name, g in found.items()}
        torch.testing.assert_close(one, gradients(net), rtol=1e-4, atol=1e-6)  # batched kernels, fp32


def test_forward_and_reverse_derivatives_agree(images):
    from torch.func import functional_call, jacrev, jvp

    net, key = injected().double().eval(), "stem.convlora.default.lora_A"
    value = net.get_parameter(key).detach()

    def outputs(value: Tensor) -> Tensor:
        return functional_call(net, {key: value}, (images.double(),))

    direction = torch.randn_like(value)
    _, forward = jvp(outputs, (value,), (direction,))
    reverse = torch.einsum("ncriyx,riyx->nc", jacrev(outputs)(value), direction)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-12)  # double


def test_second_derivatives_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(2, 3, 2, dtype=torch.double))
    convlora.inject(layer, 1, modules_to_save=None)
    randomise(layer)
    keys = ["0.convlora.default.lora_A", "0.convlora.default.lora_B"]
    x = torch.randn(1, 2, 3, 3, dtype=torch.double, requires_grad=True)

    def outputs(x: Tensor, *factors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(keys, factors, strict=True)), (x,)).pow(3)

    assert torch.autograd.gradgradcheck(outputs, (x, *convlora.adapter_parameters(layer)))


# ---- hooks, and what goes over all parameters


@pytest.mark.parametrize("state", ["injected", "merged", "removed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire_once_each_whenever_they_were_set(images, state, when):
    torch.manual_seed(0)
    net, fired = SmallNet(), []

    def register() -> None:
        net.stem.register_forward_pre_hook(lambda *_: fired.append("pre"))
        net.stem.register_forward_hook(lambda *_: fired.append("forward"))
        net.stem.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
        net.stem.register_full_backward_hook(lambda *_: fired.append("backward"))

    if when == "before":
        register()
    convlora.inject(net, 4)
    randomise(net)
    if when == "after":
        register()
    if state != "injected":
        convlora.merge(net)
    if state == "removed":
        convlora.remove(net)
    loss_of(net, images.requires_grad_()).backward()
    assert fired == ["pre", "forward", "backward pre", "backward"]


def test_a_forward_hook_may_change_the_output_and_a_tensor_hook_the_gradient(images):
    net = injected().eval()
    plain = net(images)
    loss_of(net, images).backward()
    gradient = net.stem.convlora.default.lora_A.grad.clone()
    net.zero_grad()
    net.stem.convlora.default.lora_A.register_hook(lambda g: 2 * g)
    loss_of(net, images).backward()
    assert torch.equal(net.stem.convlora.default.lora_A.grad, 2 * gradient)
    net.fc.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(net(images), plain + 1)


@STATES
def test_apply_visits_every_module_of_the_base_in_its_order(state):
    visited, expected = [], []
    SmallNet().apply(lambda m: expected.append(type(m)))
    merged_if(state, injected()).apply(visited.append)
    of_the_base = [m for m in visited if not type(m).__module__.startswith("convlora")]
    assert all(isinstance(m, kind) for m, kind in zip(of_the_base, expected, strict=True))


def test_requires_grad_can_be_toggled_and_zero_grad_reaches_the_factors(images):
    net = injected().train()
    loss_of(net, images).backward()
    assert gradients(net).keys() == trainable(net).keys()
    net.zero_grad()
    assert not gradients(net)
    wanted = trainable(net).keys()
    net.requires_grad_(False)
    assert not net(images).requires_grad
    for factor in convlora.adapter_parameters(net):
        factor.requires_grad_(True)
    loss_of(net, images).backward()
    assert gradients(net).keys() == {name for name in wanted if "lora_" in name}


def test_factors_as_one_vector_and_back(images):
    net = injected().eval()
    expected, factors = net(images), list(convlora.adapter_parameters(net))
    vector = torch.nn.utils.parameters_to_vector(factors)
    assert vector.numel() == convlora.summary(net).adapter_parameters
    torch.nn.utils.vector_to_parameters(0 * vector, factors)
    assert not torch.equal(net(images), expected)
    torch.nn.utils.vector_to_parameters(vector, factors)
    assert torch.equal(net(images), expected)


def test_clipping_scaling_and_parameter_groups_train_as_by_hand(images):
    net = injected().train()
    twin = copy.deepcopy(net)
    groups = [{"params": convlora.adapter_parameters(net), "lr": 0.1}, {"params": net.fc.parameters(), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: the bits of the gradient stay
    scaler.scale(loss_of(net, images)).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(list(convlora.trainable_parameters(net)), 0.01)
    scaler.step(optimizer)
    scaler.update()
    loss_of(twin, images).backward()
    grads = gradients(twin)
    total = torch.stack([g.norm() for g in grads.values()]).norm()
    torch.testing.assert_close(norm, total, rtol=1e-5, atol=0)  # fp32 sums in another order
    assert total > 0.01
    stepped = dict(net.named_parameters())
    for name, parameter in twin.named_parameters():
        if name in grads:
            step = (0.1 if "lora_" in name else 0.01) * grads[name] * 0.01 / total
            torch.testing.assert_close(stepped[name], parameter - step, **ROUNDING)
        else:
            assert torch.equal(stepped[name], parameter)


@STATES
def test_get_parameter_names_every_parameter_but_an_effective_weight(state):
    net = merged_if(state, injected())
    for name, parameter in net.named_parameters():
        layer = net.get_submodule(name.rpartition(".")[0])
        if state == "injected" and name.endswith("weight") and hasattr(layer, "convlora"):
            with pytest.raises(AttributeError, match=r"`weight` is not an nn\.Parameter"):
                net.get_parameter(name)
            assert convlora.base_weight(layer) is parameter
        else:
            assert net.get_parameter(name) is parameter


def test_fusing_by_torch_after_merging_a_real_network(photos):
    net = real("resnet18").eval()
    expected = net(photos)
    convlora.remove(convlora.merge(net))
    for block in (net, *net.layer1, *net.layer2, *net.layer3, *net.layer4):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(block, conv):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                setattr(block, conv, fused)
                setattr(block, norm, nn.Identity())
    # fp32, the norm's factor rounded into the weights, twenty layers
    torch.testing.assert_close(net(photos), expected, rtol=1e-4, atol=1e-5)


@STATES
def test_the_flop_counter_sees_the_base_and_unmerged_the_product_of_the_factors(state):
    from torch.utils.flop_counter import FlopCounterMode

    def count(model: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.randn(4, 3, 16, 16))
        return int(counter.get_total_flops())

    products = sum(2 * p.rank * p.base_parameters for p in convlora.summary(injected()).layers)
    extra = products if state == "injected" else 0
    assert count(merged_if(state, injected().eval())) == count(SmallNet().eval()) + extra


# ---- norm layers


def _timm_norm(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(timm.layers, name)(6)


WITH_STATISTICS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), 2),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), 2),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), 3),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(6)), 2),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), 2),
    "BatchNormAct2d": (_timm_norm("BatchNormAct2d"), 2),
    "SyncBatchNormAct": (lambda: timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(6)), 2),
    "EvoNorm2dB0": (_timm_norm("EvoNorm2dB0"), 2),
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _normed(norm: nn.Module, dimensions: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(CONVOLUTIONS[dimensions - 1](3, 6, 1), norm, nn.Flatten(2))


@NORMS
@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_statistics_move_where_they_are_tracked_and_are_saved_to_the_bit(tmp_path, kind, norm):
    build, dimensions = WITH_STATISTICS[kind]
    model, x = _normed(build(), dimensions), torch.randn(4, 3, *[5] * dimensions)
    fresh = copy.deepcopy(model)
    oracle = copy.deepcopy(model).train(norm == "track")
    convlora.inject(model, 2, target_modules="0", modules_to_save=None, norm=norm)
    model.train()
    assert torch.equal(model(x), oracle(x))  # a fresh adapter is the base, in the mode that the policy means
    assert equal(buffers(model), buffers(oracle))
    assert equal(buffers(model), buffers(fresh)) is (norm == "freeze")
    randomise(model)
    model(x)
    convlora.save_adapter(model, tmp_path)
    loaded = convlora.load_adapter(copy.deepcopy(fresh), tmp_path)
    assert equal(buffers(loaded), buffers(model))
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert equal(buffers(convlora.remove(loaded)), buffers(fresh))


@NORMS
@pytest.mark.parametrize("build", [lambda: nn.GroupNorm(2, 6), lambda: nn.LayerNorm([6, 5, 5])])
def test_norms_without_statistics_train_through_modules_to_save(tmp_path, norm, build, train):
    model, x = _normed(build(), 2), torch.randn(4, 3, 5, 5)
    fresh = copy.deepcopy(model)
    convlora.inject(model, 2, modules_to_save="1", norm=norm)
    randomise(model)
    train(model, x)
    assert not torch.equal(model[1].weight, fresh[1].weight) and not torch.equal(model[1].bias, fresh[1].bias)
    convlora.save_adapter(model, tmp_path)
    assert torch.equal(convlora.load_adapter(copy.deepcopy(fresh), tmp_path).eval()(x), model.eval()(x))
    assert torch.equal(convlora.remove(model)(x), fresh(x))


# ---- quantization

ao = pytest.importorskip("torch.ao.quantization")
QUANTIZED = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no quantized kernels on this processor"
)
DEPRECATED = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


class Quantizable(nn.Module):
    """A network written for torch.ao's eager quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.fc(self.relu(self.conv(self.quant(x))).mean((2, 3))))


def _statically_quantized(model: nn.Module, images: Tensor) -> nn.Module:
    model.qconfig = ao.get_default_qconfig("fbgemm")
    prepared = ao.prepare(model)
    prepared(images)
    return ao.convert(prepared)


@DEPRECATED
def test_a_convolution_that_fakes_quantization_is_adapted_before_the_faking(images):
    """W + ΔW is quantized, as after merging: the QAT layer's own forward reads `weight`."""
    qat = pytest.importorskip("torch.ao.nn.qat")
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    conv.qconfig = ao.get_default_qat_qconfig("fbgemm")
    model = nn.Sequential(qat.Conv2d.from_float(conv))
    oracle = copy.deepcopy(model)
    convlora.inject(model, 2, modules_to_save=None)
    randomise(model)
    with torch.no_grad():
        oracle[0].weight.copy_(model[0].weight)
    expected = oracle(images)
    assert not torch.equal(expected, nn.functional.conv2d(images, oracle[0].weight, oracle[0].bias))  # it does quantize
    assert torch.equal(model(images), expected)
    loss_of(model, images).backward()
    assert all(p.grad.any() for p in convlora.adapter_parameters(model))
    model.eval()
    unmerged = model(images)
    assert torch.equal(convlora.merge(model)(images), unmerged)
    assert type(convlora.remove(model)[0]) is qat.Conv2d


@DEPRECATED
@QUANTIZED
def test_static_quantization_after_merge_and_remove(images):
    torch.manual_seed(0)
    base = Quantizable().eval()
    model, oracle = copy.deepcopy(base), copy.deepcopy(base)
    convlora.inject(model, 2)
    randomise(model)
    with torch.no_grad():
        oracle.conv.weight.copy_(model.conv.weight)
    quantized = _statically_quantized(convlora.remove(convlora.merge(model)), images)
    assert type(quantized.conv).__module__.startswith("torch.ao.nn.quantized")
    assert torch.equal(quantized(images), _statically_quantized(oracle, images)(images))
    assert not torch.equal(quantized(images), _statically_quantized(base, images)(images))


@DEPRECATED
@QUANTIZED
def test_preparing_an_injected_network_passes_by_what_is_adapted_and_changes_nothing(images):
    """torch.ao asks for exact types; docs/torch.md says to merge and remove first."""
    model = convlora.inject(Quantizable().eval(), 2)
    randomise(model)
    expected = model(images)
    model.qconfig = ao.get_default_qconfig("fbgemm")
    prepared = ao.prepare(model)
    assert hasattr(prepared.fc, "activation_post_process") and not hasattr(prepared.conv, "activation_post_process")
    assert torch.equal(prepared(images), expected)


@DEPRECATED
@QUANTIZED
def test_statically_quantized_networks_are_refused(images):
    quantized = _statically_quantized(Quantizable().eval(), images)
    with pytest.raises(TargetError, match=r"Quantizable has no nn\.Conv2d"):
        convlora.inject(quantized)
    with pytest.raises(TargetError, match=r"target_modules='conv' matches no layer"):
        convlora.inject(quantized, target_modules="conv")


@DEPRECATED
@QUANTIZED
def test_dynamically_quantized_linear_layers_stay_as_they_are_beside_adapted_convolutions(images, tmp_path):
    torch.manual_seed(0)
    base = ao.quantize_dynamic(SmallNet().eval(), {nn.Linear})
    model = copy.deepcopy(base)
    convlora.inject(model, 2)
    assert torch.equal(model(images), base(images))
    randomise(model)
    expected = model(images)
    convlora.save_adapter(model, tmp_path)
    assert torch.equal(convlora.load_adapter(copy.deepcopy(base), tmp_path)(images), expected)
    assert torch.equal(convlora.merge(model)(images), expected)


def _torchao():
    pytest.importorskip("torchao")
    quantization = pytest.importorskip("torchao.quantization")
    if not hasattr(quantization, "Int8WeightOnlyConfig"):
        pytest.skip("torchao without Int8WeightOnlyConfig")
    return quantization.quantize_, quantization.Int8WeightOnlyConfig()


@STATES
def test_torchao_quantizes_linear_layers_beside_adapted_convolutions(images, state):
    quantize_, config = _torchao()
    net = injected().eval()
    twin = copy.deepcopy(net)
    quantize_(merged_if(state, net), config)
    assert type(net.fc.weight.data) is not Tensor  # it did something
    # int8 weights of two layers: half of one step of 127
    torch.testing.assert_close(net(images), twin(images), rtol=0, atol=1e-2 * twin(images).abs().max().item())
    quantize_(twin, config)
    assert torch.equal(convlora.remove(merged_if("merged", twin))(images), net(images))


def test_torchao_before_injecting_into_the_convolutions(images):
    quantize_, config = _torchao()
    torch.manual_seed(0)
    base = SmallNet().eval()
    quantize_(base, config)
    net = copy.deepcopy(base)
    convlora.inject(net, 4, modules_to_save=None)
    assert torch.equal(net(images), base(images))
    randomise(net)
    loss_of(net, images).backward()
    assert all(p.grad.any() for p in convlora.adapter_parameters(net))
    unmerged = net(images)
    assert torch.equal(convlora.merge(net)(images), unmerged)
    convlora.unmerge(net)
    assert torch.equal(convlora.remove(net)(images), base(images))


@torch.no_grad()  # in inference merged and unmerged are one weight to the bit
def test_torchao_on_an_adapted_linear_layer_is_refused(images):
    quantize_, config = _torchao()
    net = injected(target_modules=[nn.Conv2d, "hidden"]).eval()
    expected = net(images)
    with pytest.raises(StateError, match=r"Call convlora\.merge\(model\) first"):
        quantize_(net, config)
    assert torch.equal(net.hidden(torch.ones(1, 16)), convlora.merge(net).hidden(torch.ones(1, 16)))
    assert net(images).shape == expected.shape


def test_a_weight_that_torchao_quantized_is_refused_at_injection():
    quantize_, config = _torchao()
    net = SmallNet().eval()
    quantize_(net, config, lambda module, name: name == "hidden")
    with pytest.raises(UnsupportedLayerError, match="hidden"):
        convlora.inject(net, 2, target_modules=[nn.Conv2d, "hidden"])


SAVE_BESIDE_QUANTIZED = """
import copy, sys, torch, convlora
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from conftest import SmallNet, randomise
base = SmallNet().eval()
quantize_(base, Int8WeightOnlyConfig(), lambda module, name: name == "hidden")
net = convlora.inject(copy.deepcopy(base), 2)
randomise(net)
images = torch.randn(2, 3, 16, 16)
expected = net(images)
convlora.save_adapter(net, sys.argv[1])
assert torch.equal(convlora.load_adapter(base, sys.argv[1])(images), expected)
"""


def test_an_adapter_on_a_base_with_torchao_weights_is_saved_and_loaded(tmp_path, request):
    _torchao()
    where = str(request.path.parent)  # a process of its own: today it dies
    command = [sys.executable, "-W", "ignore", "-c", SAVE_BESIDE_QUANTIZED, str(tmp_path)]
    run = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


# ---- the surface of the base


def test_nothing_of_the_bases_surface_changes_while_injected_or_merged():
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=3)
    net.conv1.register_forward_hook(lambda *_: None)
    before, attributes = snapshot(net), {name: set(vars(m)) for name, m in net.named_modules()}
    kinds = {name: type(m) for name, m in net.named_modules()}
    lines = repr(net).splitlines()
    convlora.inject(net, 4)
    for step in (lambda: None, lambda: convlora.merge(net), lambda: convlora.unmerge(net)):
        step()
        now = snapshot(net)
        names = [name for name, _ in now["objects"] if "convlora" not in name]
        assert names == [name for name, _ in before["objects"]]
        assert [pair for pair in now["objects"] if "convlora" not in pair[0]] == before["objects"]
        assert [pair for pair in now["hooks"] if "convlora" not in pair[0]] == before["hooks"]
        assert [key for key in now["keys"] if "convlora" not in key] == before["keys"]
        assert all(isinstance(net.get_submodule(name), kind) for name, kind in kinds.items())
        assert all(attributes[name] <= set(vars(net.get_submodule(name))) for name in kinds)
        text = [line.replace("Adapted", "").replace("Frozen", "") for line in repr(net).splitlines()]
        assert [line for line in lines if line not in text and not line.endswith(")")] == []
        assert "Conv2d(" in repr(net.conv1) and "3, 64, kernel_size=(7, 7), stride=(2, 2)" in repr(net.conv1)
    assert "AdaptedConv2d(" in repr(net.conv1) and "rank=4" in repr(net.conv1)
    convlora.remove(net)
    assert snapshot(net) == before and repr(net).splitlines() == lines


@NORMS
def test_after_any_sequence_a_real_network_is_the_base_again(photos, train, norm):
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    before = snapshot(net)
    for _ in range(2):
        convlora.inject(net, 4, norm=norm)
        train(net, photos, steps=1)
        convlora.merge(net.eval())(photos)
        convlora.unmerge(net)
        copy.deepcopy(net)
        train(net, photos, steps=1)
        convlora.merge(net)
        convlora.unmerge(net.train())
        assert snapshot(net) != before
        convlora.remove(net)
        assert snapshot(net) == before
