"""Where numbers are odd: dtypes, scales, sizes, losses that overflow; and where they must repeat to the bit."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import SmallNet, dense_delta, randomise
from torch import nn

import convlora
from convlora import StateError, TargetError

HALF = [torch.float16, torch.bfloat16]


def trained(net, norm="freeze", **options):
    convlora.inject(net, 2, norm=norm, **options)
    randomise(net)
    return net.eval()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_precision_merges_to_the_bits_that_it_computes_with_and_comes_back(net, images, dtype, memory_format):
    net = trained(net.to(dtype).to(memory_format=memory_format))
    before, expected = net.stem.convlora["default"].lora_A.dtype, net(images.to(dtype))
    weight = convlora.base_weight(net.stem).clone()
    assert before == torch.float32
    assert torch.equal(convlora.merge(net)(images.to(dtype)), expected)
    assert torch.equal(convlora.base_weight(convlora.unmerge(net).stem), weight)


@pytest.mark.parametrize("alpha", [1e-30, 1e-8, 1e8, 1e30])
def test_scales_of_any_size_are_exact_or_infinite_as_fp32_is(alpha):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    oracle = copy.deepcopy(net)
    convlora.inject(net, 2, alpha=alpha, modules_to_save=None)
    randomise(net)
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        oracle[0].weight += dense_delta(net[0])
        torch.testing.assert_close(net(x), oracle(x), rtol=1e-5, atol=1e-6)
    weight = convlora.base_weight(net[0]).clone()
    assert torch.equal(
        convlora.unmerge(convlora.merge(net))[0].convlora["default"].lora_A, net[0].convlora["default"].lora_A
    )
    assert torch.equal(convlora.base_weight(net[0]), weight)


@pytest.mark.parametrize("alpha", [0, 0.0, -1, float("nan"), float("inf"), 1e39])
def test_an_alpha_that_trains_nothing_or_that_fp32_does_not_hold_is_refused(net, alpha):
    with pytest.raises(TargetError, match=r"alpha=.*; it must be a finite number above 0"):
        convlora.inject(net, alpha=alpha)


def test_a_rank_beyond_the_weights_own_is_lowered_and_full_rank_reaches_any_change(net):
    layer = nn.Conv2d(8, 8, 3)
    model = convlora.inject(nn.Sequential(layer), 10**6, modules_to_save=None)
    rank = convlora.summary(model).layers[0].rank
    assert rank <= 8 and convlora.summary(model).adapter_parameters <= layer.weight.numel()
    base = nn.Sequential(nn.Linear(6, 40, bias=False))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += torch.randn(40, 6)
    report = convlora.extract(base, tuned, 5, target_modules=nn.Linear, modules_to_save=None)
    assert report.layers[0].rank == 5 and 0 < report.error < 1


ODD = {
    "no samples": (SmallNet, (0, 3, 16, 16)),
    "one pixel": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1)), (2, 3, 1, 1)),
    "no output": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2)), (2, 3, 1, 0)),
    "groups = channels": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3, groups=8)), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("path", ["fused", "weight", "branch"])
def test_inputs_of_odd_sizes_do_in_the_adapted_model_what_they_do_in_the_dense_one(case, path):
    build, shape = ODD[case]
    torch.manual_seed(0)
    base = build().eval()
    model = convlora.inject(copy.deepcopy(base), 1, training_path=path, modules_to_save=None)
    randomise(model)
    oracle = copy.deepcopy(base)
    with torch.no_grad():
        names = {layer.name for layer in convlora.summary(model).layers}
        for name in names:
            oracle.get_submodule(name).weight += dense_delta(model.get_submodule(name))
    x = torch.randn(shape, requires_grad=True)
    try:
        expected = oracle(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            model(x)
        return
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    if y.numel():
        (gradient,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(convlora.merge(model)(x), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_not_contiguous_is_adapted_and_comes_back_as_it_lay():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, (3, 5), padding=1)
    strange = torch.randn(5, 3, 6, 8).permute(3, 2, 1, 0)
    conv.weight = nn.Parameter(strange)
    net, x = nn.Sequential(conv), torch.randn(2, 6, 7, 7)
    oracle = copy.deepcopy(net)
    convlora.inject(net, 2, modules_to_save=None)
    randomise(net)
    with torch.no_grad():
        oracle[0].weight += dense_delta(net[0])
        torch.testing.assert_close(net(x), oracle(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(convlora.merge(net)(x), oracle(x), rtol=1e-5, atol=1e-5)
    convlora.remove(convlora.unmerge(net))
    assert net[0].weight.stride() == strange.stride() and torch.equal(net[0].weight, strange)


def test_flags_that_are_toggled_outside_are_minded_and_the_bases_come_back(net, images):
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    convlora.inject(net, 2)
    randomise(net)
    convlora.base_weight(net.stem).requires_grad_(True)
    net.stem.convlora["default"].lora_B.requires_grad_(False)
    net(images).sum().backward()
    assert convlora.base_weight(net.stem).grad is not None
    assert net.stem.convlora["default"].lora_B.grad is None and net.stem.convlora["default"].lora_A.grad is not None
    convlora.remove(net)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_reaches_what_trains_and_never_the_base(net, images, optimizer):
    base = {k: v.clone() for k, v in net.state_dict().items()}
    convlora.inject(net, 2)
    randomise(net)
    sizes = [p.detach().norm() for p in convlora.adapter_parameters(net)]
    stepper = optimizer(net.parameters(), lr=0.01, weight_decay=5.0)  # all of them: what is frozen has no gradient
    for _ in range(5):
        stepper.zero_grad()
        (0 * net(images).sum()).backward()
        stepper.step()
    assert all(p.detach().norm() < size for p, size in zip(convlora.adapter_parameters(net), sizes, strict=True))
    convlora.remove(net)
    assert all(torch.equal(tensor, base[key]) for key, tensor in net.state_dict().items())


def test_a_moving_average_of_the_factors_predicts_with_them_at_once(net, images):
    trained(net)
    shadow = [p.detach().clone() for p in convlora.adapter_parameters(net)]
    net(images)  # the effective weight is kept from here
    with torch.no_grad():
        for parameter, average in zip(convlora.adapter_parameters(net), shadow, strict=True):
            average.mul_(0.5).add_(parameter, alpha=0.25)
            parameter.data.copy_(average)
        expected = copy.deepcopy(net)(images)  # a copy keeps nothing
        assert torch.equal(net(images), expected)


def test_a_step_with_gradients_that_overflow_is_skipped_and_the_next_one_taken(net, images):
    convlora.inject(net, 2)
    randomise(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(convlora.trainable_parameters(net), lr=0.01)
    before = [p.detach().clone() for p in convlora.trainable_parameters(net)]
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((net(images) * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        now = [p.detach() for p in convlora.trainable_parameters(net)]
        assert all(p.isfinite().all() for p in now)
        assert all(map(torch.equal, before, now)) is not moves
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    "call",
    [
        lambda m: convlora.shrink(m, 1),
        lambda m: convlora.combine_adapters(m, {"default": 1.0}, "c"),
        lambda m: convlora.combine_adapters(m, {"default": 1.0}, "c", method="svd", rank=1),
        lambda m: convlora.combine_adapters(m, {"default": 1.0}, "c", method="ties"),
        lambda m: convlora.combine_adapters(m, {"default": 1.0}, "c", method="dare"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_one_error_that_names_the_layer(net, call, value):
    trained(net)
    with torch.no_grad():
        net.block[3].convlora["default"].lora_A[0, 0] = value
    keys = list(net.state_dict())
    with pytest.raises(
        StateError, match=r"block\.3: lora_A of adapter 'default' holds NaN or Inf.*Nothing was changed"
    ):
        call(net)
    assert list(net.state_dict()) == keys


def test_a_sum_that_overflows_names_its_layer(net):
    trained(net)
    with pytest.raises(StateError, match=r"stem: its change cannot be decomposed"):
        convlora.combine_adapters(net, {"default": 1e308}, "c", method="svd")


def test_extracting_nan_names_the_layer_and_leaves_the_base(net):
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        tuned.stem.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TargetError, match=r"stem\.weight: tuned and base differ by NaN or Inf"):
        convlora.extract(net, tuned, 2)
    assert not hasattr(net, "_convlora")


@pytest.mark.parametrize("dropouts, expected", [((0.3, 0.3), 0.3), ((0.3, 0.1), 0.0), ((0.0, 0.3), 0.0)])
def test_a_combination_has_the_dropout_that_all_agree_on(dropouts, expected):
    torch.manual_seed(0)
    net = SmallNet()
    convlora.inject(net, 2, dropout=dropouts[0], adapter_name="a")
    convlora.add_adapter(net, "b", 2, dropout=dropouts[1])
    convlora.combine_adapters(net, {"a": 0.5, "b": 0.5}, "both")
    assert convlora.summary(net, "both").dropout == expected
    assert net.stem.convlora["both"].dropout == expected


# ---- the same seed, the same adapter

PROGRAM = """
import sys, torch, convlora
sys.path.insert(0, "tests")
from conftest import SmallNet
torch.set_num_threads(1)
torch.manual_seed(3)
net = SmallNet()
convlora.inject(net, 2, norm="track", init={init!r}, use_dora={dora})
images = torch.randn(8, 3, 16, 16)
optimizer = torch.optim.AdamW(convlora.trainable_parameters(net), lr=1e-2)
for _ in range(3):
    optimizer.zero_grad(); net(images).square().sum().backward(); optimizer.step()
convlora.save_adapter(net, sys.argv[1])
"""


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path):
    program = PROGRAM.format(init="pissa", dora=True)
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path / name)], check=True)
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    tensors = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert tensors[0] == tensors[1]


def test_saved_loaded_and_saved_again_is_the_same_file(net, tmp_path):
    base = copy.deepcopy(net)
    convlora.save_adapter(trained(net), tmp_path / "one")
    convlora.save_adapter(convlora.load_adapter(base, tmp_path / "one"), tmp_path / "two")
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
