"""Other dtypes, layouts and devices: the same numbers, injected and merged, or one error."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import SmallNet, randomise
from injected import NORMS, ROUNDING, STATES, gradients, injected, loss_of, merged_if, real
from torch import nn

import convlora
from convlora import StateError

pytestmark = pytest.mark.usefixtures("one_thread")


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


@NORMS
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
