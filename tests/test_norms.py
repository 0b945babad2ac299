"""Norm layers: frozen in place, or tracked and then part of the adapter."""

import copy

import pytest
import torch
from conftest import need, randomise
from injected import NORMS, buffers, equal
from torch import nn
from torch.utils.checkpoint import checkpoint

import convlora
from convlora._model.norms import set_policy


def statistics(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}


def test_frozen_norms_behave_as_in_eval_and_do_not_move(net, images, train):
    convlora.inject(net, norm="freeze")
    before = statistics(net)
    net.eval()
    expected = net(images)
    net.train()
    assert torch.equal(net(images), expected)
    train(net, images)
    assert equal(statistics(net), before)


def test_tracked_statistics_move_and_the_base_statistics_return(net, images, train):
    before = statistics(net)
    convlora.inject(net, norm="track")
    train(net, images)
    assert not equal(statistics(net), before)
    convlora.remove(net)
    assert equal(statistics(net), before)


def test_tracked_training_moves_statistics_as_the_base_would(net, images):
    base = copy.deepcopy(net)
    convlora.inject(net, norm="track")
    for model in (base, net):
        model.train()(images)
    assert equal(statistics(net), statistics(base))


@pytest.mark.parametrize(
    "norm, x",
    [
        (nn.BatchNorm1d(6), torch.randn(4, 6, 5)),
        (nn.BatchNorm2d(6), torch.randn(4, 6, 5, 5)),
        (nn.BatchNorm3d(6), torch.randn(4, 6, 3, 3, 3)),
        (nn.InstanceNorm2d(6, track_running_stats=True), torch.randn(4, 6, 5, 5)),
    ],
)
def test_every_norm_with_statistics_can_be_frozen(norm, x):
    model = nn.Sequential(nn.Conv2d(6, 6, 1), norm)
    convlora.inject(model, 2, modules_to_save=None)
    assert convlora.summary(model).norms == ("1",)
    assert isinstance(norm, type(copy.deepcopy(norm)).__mro__[2])
    before = statistics(model)
    model.train()
    norm(x)
    assert equal(statistics(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d"])
def test_frozen_batch_norm_saves_no_input_and_has_the_same_bits_and_gradients(kind, dtype):
    layers = need("timm.layers") if kind.endswith("Act2d") else nn
    torch.manual_seed(0)
    norm = getattr(layers, kind)(6).eval()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    shape = (3, 6, 5, 4, 3)[: {"1d": 3, "2d": 4, "3d": 5}[kind[-2:]]]
    model, base = nn.Sequential(nn.Conv2d(6, 6, 1), norm), copy.deepcopy(norm).requires_grad_(False).to(dtype)
    convlora.inject(model.to(dtype), 2, modules_to_save=None)
    x = torch.randn(shape, dtype=dtype)
    mine, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    inner = mine * 1  # an input that is no leaf, as inside a network
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model[1](inner)
    expected = base(theirs)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    y.backward(g), expected.backward(g)
    # the same product, in another order
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    own = {tensor.data_ptr() for tensor in (*norm.parameters(), *norm.buffers())}
    rest = sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in own)
    assert rest == (x.numel() if kind.endswith("Act2d") else 0)  # timm's norm keeps its activation's output


def test_frozen_batch_norm_has_second_derivatives_and_trains_its_scale_where_asked():
    norm = nn.BatchNorm2d(3, dtype=torch.float64)
    model = convlora.inject(nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), norm), 1, modules_to_save=None)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(model.train(), (x,))
    norm.weight.requires_grad_(True)
    model(x).square().sum().backward()
    assert norm.weight.grad is not None
    with pytest.raises((RuntimeError, ValueError)):  # torch's own error
        norm(torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True) * 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_batch_norm_in_half_precision_has_the_gradient_that_torch_has(dtype):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64, eps=1e-9)  # which is 0 in half precision
    norm.running_var.uniform_(0.01, 3), norm.weight.data.uniform_(0.5, 2)
    norm.running_var[0] = 0
    base = copy.deepcopy(norm).to(dtype).eval().requires_grad_(False)
    model = convlora.inject(nn.Sequential(nn.Conv2d(64, 64, 1), norm).to(dtype), modules_to_save=None)
    x, g = torch.randn(2, 4, 64, 8, 8).to(dtype)
    mine, theirs = (x.clone().requires_grad_(True) for _ in range(2))
    model[1](mine * 1).backward(g), base(theirs).backward(g)
    difference = (mine.grad.double() / theirs.grad.double() - 1).mean((0, 2, 3))  # a bias, not a rounding
    assert difference[1:].abs().max() < 1e-3
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-2, atol=1e-2)


def save_and_restore_modes(model, call):
    """As trainers do around a validation: every module's own mode is read, and written back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    call()
    for module, mode in modes.items():
        module.training = mode


def test_a_mode_that_is_saved_and_restored_from_outside_is_not_lost(net, images):
    convlora.inject(net.train(), norm="freeze", adapter_name="frozen")
    convlora.add_adapter(net, "tracked", norm="track")
    save_and_restore_modes(net, lambda: net(images))
    net.bn1.train(False)
    convlora.set_adapter(net, "tracked")
    before = statistics(net)
    net(images)
    assert net.bn1.training and not equal(statistics(net), before)
    with convlora.disable_adapter(net):
        save_and_restore_modes(net, lambda: net(images))
        assert not net.bn1.training
    assert net.bn1.training
    convlora.set_adapter(net, "frozen")
    save_and_restore_modes(net, lambda: net(images))
    assert not net.bn1.training
    assert all(module.training for module in convlora.remove(net).modules())


def test_a_norm_that_the_user_keeps_in_eval_stays_in_eval(net, images):
    net.train().bn1.eval()
    convlora.inject(net, norm="freeze", adapter_name="frozen")
    convlora.add_adapter(net, "tracked", norm="track")
    convlora.set_adapter(net, "tracked")
    assert not net.bn1.training and net.block[1].training
    convlora.set_adapter(net, "frozen")
    net.eval()
    convlora.remove(net)
    assert not any(module.training for module in net.modules())


def test_norms_without_statistics_are_not_touched():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6))
    convlora.inject(model, 2, modules_to_save=None)
    assert convlora.summary(model).norms == ()
    assert type(model[1]) is nn.GroupNorm and type(model[2]) is nn.InstanceNorm2d


def test_children_of_a_frozen_norm_follow_the_mode():
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.Conv2d(6, 6, 1), BatchNormAct2d(6, drop_layer=nn.Dropout))
    convlora.inject(model, 2, modules_to_save=None)
    model.train()
    assert not model[1].training and model[1].drop.training
    model.eval()
    assert not model[1].drop.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_move_once_under_gradient_checkpointing(net, images, reentrant):
    """The forward runs twice, the second time inside the backward."""
    convlora.inject(net, norm="track", modules_to_save=["fc", "block.1"])  # tracked, and trained in full
    randomise(net)
    plain = copy.deepcopy(net)
    forward = net.block.forward
    net.block.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    for model in (net, plain):
        for _ in range(2):
            model.train()(images).square().sum().backward()
    assert net.bn1.num_batches_tracked == net.block[1].num_batches_tracked == 2
    assert equal(statistics(net), statistics(plain))
    for a, b in zip(convlora.trainable_parameters(net), convlora.trainable_parameters(plain), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_an_interrupt_between_two_steps_does_not_lose_the_mode_of_a_norm(monkeypatch):
    norm, plain = nn.BatchNorm2d(2), nn.Module.__setattr__
    set_policy(norm, "freeze", None)

    def interrupted(self, name, value):
        if name == "training":
            raise KeyboardInterrupt
        plain(self, name, value)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(nn.Module, "__setattr__", interrupted)
        set_policy(norm, None, None)
    set_policy(norm, None, None)
    assert norm.training


def _timm_norm(name: str) -> nn.Module:
    return getattr(need("timm.layers"), name)(6)


def _sync(norm: nn.Module) -> nn.Module:
    return need("timm.layers").convert_sync_batchnorm(norm)


WITH_STATISTICS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), 2),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), 2),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), 3),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(6)), 2),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), 2),
    "BatchNormAct2d": (lambda: _timm_norm("BatchNormAct2d"), 2),
    "SyncBatchNormAct": (lambda: _sync(_timm_norm("BatchNormAct2d")), 2),
    "EvoNorm2dB0": (lambda: _timm_norm("EvoNorm2dB0"), 2),
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
