"""Networks that rewrite their own convolutions, and torch's fusing of convolution and norm."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import thorough
from injected import merged_if, real
from torch import nn

import convlora
from convlora import StateError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("state", ["injected", "merged", "removed"])
@pytest.mark.parametrize("name", ["repvgg_a0", *map(thorough, ("mobileone_s0", "fastvit_t8"))])
@torch.no_grad()  # in inference merged and unmerged are one weight to the bit
def test_reparameterized_networks_predict_the_same(photos, name, state):
    net = real(name).eval()
    expected = net(photos)
    if state == "removed":
        convlora.remove(convlora.merge(net))
    small = importlib.import_module("timm.utils.model").reparameterize_model(merged_if(state, net))
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
