"""Quantization beside adapted convolutions, before injecting and after merging: torch.ao and torchao."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import SmallNet, need, randomise
from injected import STATES, injected, loss_of, merged_if
from torch import Tensor, nn

import convlora
from convlora import StateError, TargetError, UnsupportedLayerError

pytestmark = pytest.mark.usefixtures("one_thread")


ao = need("torch.ao.quantization")
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
    qat = need("torch.ao.nn.qat")
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
    with pytest.raises(TargetError, match=r"Quantizable has no convolution"):
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
    need("torchao")
    quantization = need("torchao.quantization")
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
