"""Compiled, exported and traced, injected and merged: the same as in eager mode. docs/torch.md lists it."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, need, randomise
from torch import Tensor, nn

import convlora

timm = need("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
STATES = pytest.mark.parametrize("state", ["injected", "merged", "removed"])


def every(names: tuple[str, ...], others: tuple[str, ...]) -> list[object]:
    """Every pair; by default those of the small network: the real ones take seconds each."""
    return [
        pytest.param(name, other, marks=() if name == "small" else pytest.mark.thorough)
        for name in names
        for other in others
    ]


NETWORKS = ("small", "resnet18", "tf_efficientnet_lite0")
IN_STATES = pytest.mark.parametrize("name, state", every(NETWORKS, ("injected", "merged", "removed")))
# Compilers fuse and reorder fp32 sums; twenty layers and more with norms between them.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

OLD = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 5)


def build(name: str, norm: str = "freeze") -> tuple[nn.Module, Tensor]:
    """An injected network with random factors and norms that do something, and images."""
    torch.manual_seed(0)
    net = SmallNet() if name == "small" else timm.create_model(name, num_classes=3)
    with torch.no_grad():
        for key, buffer in net.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    convlora.inject(net, 4, norm=norm)
    randomise(net, 0.1 if name == "small" else 0.02)
    size = 16 if name == "small" else 64
    return net, torch.randn(4 if name == "small" else 2, 3, size, size, generator=torch.Generator().manual_seed(5))


def in_state(state: str, net: nn.Module) -> nn.Module:
    if state != "injected":
        convlora.merge(net)
    return convlora.remove(net) if state == "removed" else net


def steps(model: nn.Module, net: nn.Module, images: Tensor, count: int = 3) -> None:
    optimizer = torch.optim.SGD(convlora.trainable_parameters(net), lr=1e-6)  # gradients are large here
    for _ in range(count):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


# ---- torch.compile


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that `recording` was given since, one a compilation."""
    torch._dynamo.reset()
    recorded: list[torch.fx.GraphModule] = []
    yield recorded
    torch._dynamo.reset()


def compiled(net: nn.Module, graphs: list[torch.fx.GraphModule], backend: str) -> nn.Module:
    """In one graph or not at all; every compilation is counted."""
    run = torch._dynamo.lookup_backend(backend)

    def recording(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return run(graph, inputs)

    return torch.compile(net, backend=recording, fullgraph=True)


@IN_STATES
def test_compiled_without_a_break_it_predicts_the_same_and_compiles_once(name, state, graphs):
    net, images = build(name)
    expected = net.eval()(images)
    run = compiled(in_state(state, net), graphs, "aot_eager")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(images), expected, **CLOSE)
    assert len(graphs) == 1


@pytest.mark.parametrize("name, norm", every(NETWORKS, ("freeze", "track")))
def test_compiled_training_is_that_of_eager_mode_and_compiles_once(name, norm, graphs):
    net, images = build(name, norm)
    net.train()
    eager = copy.deepcopy(net)
    steps(compiled(net, graphs, "aot_eager"), net, images)
    assert len(graphs) == 1  # no step compiles again
    steps(eager, eager, images)
    for key, expected in eager.state_dict().items():  # of the largest number: sums in another order
        assert (net.state_dict()[key] - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-5, key


def test_a_compiled_model_follows_merge_and_unmerge(graphs):
    net, images = build("small")
    run = compiled(net.eval(), graphs, "eager")
    expected = net(images)
    for change in (convlora.merge, convlora.unmerge, convlora.merge):
        torch.testing.assert_close(run(images), expected, **CLOSE)
        change(net)
    randomised = convlora.unmerge(net)
    randomise(randomised, seed=3)
    torch.testing.assert_close(run(images), net(images), **CLOSE)
    assert not torch.allclose(run(images), expected)


class Doubled(nn.Conv2d):
    """A user's own convolution; compilers and torch.fx go into the forward of such a class."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize("way", ["compile", "export, strict", "export"])
def test_a_convolution_of_the_users_own_class_is_not_compiled_without_its_adapter(way, graphs):
    torch.manual_seed(0)
    net, x = nn.Sequential(Doubled(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
    convlora.inject(net, 2, modules_to_save=None)
    randomise(net)
    if way == "compile":
        run = compiled(net.eval(), graphs, "eager")
    else:
        run = torch.export.export(net.eval(), (x,), strict=way == "export, strict").module()
    torch.testing.assert_close(run(x), net(x), **CLOSE)


def test_explain_finds_one_graph_and_no_break():
    net, images = build("small")
    torch._dynamo.reset()
    found = torch._dynamo.explain(net.train())(images)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def _needs_inductor() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    if sys.platform == "win32":
        pytest.skip("inductor on Windows needs a shell of its own")


def _inductor(name: str, norm: str, graphs: list[torch.fx.GraphModule]) -> None:
    _needs_inductor()
    net, images = build(name, norm)
    eager = copy.deepcopy(net)
    steps(compiled(net.train(), graphs, "inductor"), net, images)
    steps(eager.train(), eager, images)
    torch.testing.assert_close(dict(net.state_dict()), dict(eager.state_dict()), **CLOSE)
    expected = net.eval()(images)
    for state in ("injected", "merged"):
        torch._dynamo.reset()
        run = compiled(in_state(state, net), graphs, "inductor")
        with torch.no_grad():
            torch.testing.assert_close(run(images), expected, **CLOSE)
    assert len(graphs) == 3


@pytest.mark.thorough
def test_inductor_trains_and_predicts_like_eager_mode(graphs):
    _inductor("small", "track", graphs)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["freeze", "track"])
def test_inductor_trains_and_predicts_like_eager_mode_on_a_real_network(graphs, norm):
    _inductor("resnet18", norm, graphs)


# ---- torch.export and ONNX


@pytest.mark.parametrize("strict", [True, False])
@IN_STATES
def test_an_exported_program_predicts_the_same(name, strict, state):
    net, images = build(name)
    expected = net.eval()(images)
    program = torch.export.export(in_state(state, net), (images,), strict=strict)
    torch.testing.assert_close(program.module()(images), expected, **CLOSE)
    assert any("lora_A" in key for key in program.state_dict) is (state == "injected")


@pytest.mark.parametrize("state", ["injected", "removed"])
def test_an_exported_program_takes_other_batch_sizes_and_survives_its_file(state, tmp_path):
    net, images = build("small")
    net = in_state(state, net.eval())
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    more = torch.cat([images, images.flip(0), images[:1]])
    torch.testing.assert_close(loaded(more), net(more), **CLOSE)


@IN_STATES
def test_onnx_by_the_exporter_of_dynamo_predicts_the_same(name, state, tmp_path):
    if OLD:
        pytest.skip("before torch 2.5 dynamo=True was another exporter, an experiment")
    onnxruntime = need("onnxruntime")
    need("onnxscript")
    net, images = build(name)
    expected = net.eval()(images).detach()
    program = torch.onnx.export(in_state(state, net), (images,), dynamo=True, verbose=False)
    found = _by_onnxruntime(onnxruntime, program, tmp_path, images)
    torch.testing.assert_close(found, expected, **CLOSE)


def _by_onnxruntime(onnxruntime, program, directory: Path, images: Tensor) -> Tensor:
    program.save(directory / "model.onnx")
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(found)


# ---- torch.jit.trace and torch.fx


JIT = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")


@JIT
@IN_STATES
@torch.no_grad()  # in inference merged and unmerged are one weight to the bit
def test_traced_frozen_and_saved_it_predicts_the_same(name, state, tmp_path):
    net, images = build(name)
    expected = net.eval()(images)
    traced = torch.jit.trace(in_state(state, net), images)
    torch.testing.assert_close(traced(images), expected, **CLOSE)
    torch.jit.save(torch.jit.freeze(traced), tmp_path / "frozen.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "frozen.pt")(images), expected, **CLOSE)


@JIT
def test_a_trace_follows_the_factors_and_gives_their_gradients():
    net, images = build("small")
    traced = torch.jit.trace(net.train(), images)
    randomise(net, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(traced(images), net(images), **CLOSE)
    expected = torch.autograd.grad(net(images).square().mean(), list(convlora.adapter_parameters(net)))
    found = torch.autograd.grad(traced(images).square().mean(), list(convlora.adapter_parameters(net)))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracing_raises_no_warning_of_ours():
    net, images = build("small")
    torch.jit.trace(net.eval(), images)


@JIT
def test_script_compiles_python_and_so_wants_the_plain_model():
    net, images = build("small")
    expected = net.eval()(images)
    with pytest.raises((RuntimeError, ValueError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(net)
    scripted = torch.jit.script(in_state("removed", net))
    torch.testing.assert_close(scripted(images), expected, **CLOSE)


@STATES
@pytest.mark.parametrize("name", ["small", "resnet18"])
@torch.no_grad()  # in inference merged and unmerged are one weight to the bit
def test_symbolic_trace_keeps_each_convolution_a_call_of_its_module(name, state):
    net, images = build(name)
    expected = net.eval()(images)
    names = [layer.name for layer in convlora.summary(net).layers]
    traced = torch.fx.symbolic_trace(in_state(state, net))
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert [target for target in called if target in names] == names
    assert torch.equal(traced(images), expected)
    assert torch.equal(copy.deepcopy(traced)(images), expected)
    if name != "small":  # torch 2.4 cannot pickle a traced mean over two axes
        assert torch.equal(pickle.loads(pickle.dumps(traced))(images), expected)


def test_symbolic_trace_goes_into_a_convolution_of_the_users_own_class():
    torch.manual_seed(0)
    net, x = nn.Sequential(Doubled(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    convlora.inject(net, 2, modules_to_save=None)
    randomise(net)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_a_network_that_torch_fx_traced_can_be_injected():
    torch.manual_seed(0)
    plain = SmallNet().eval()
    traced, images = torch.fx.symbolic_trace(copy.deepcopy(plain)), torch.randn(2, 3, 16, 16)
    for model in (plain, traced):
        convlora.inject(model, 4)
        randomise(model)
    assert torch.equal(traced(images), plain(images))
    assert torch.equal(convlora.merge(traced)(images), plain(images))


@STATES
@pytest.mark.parametrize("name, node", [("resnet18", "layer2"), ("tf_efficientnet_lite0", "blocks.2")])
def test_features_that_timm_extracts_by_fx_are_those_of_the_model(name, node, state):
    """timm lists the layers that torch.fx shall not enter (its padding Conv2dSame), by class."""
    features = need("timm.models._features_fx")
    net, images = build(name)
    in_state(state, net.eval())
    seen = []
    net.get_submodule(node).register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(images)
    extractor = features.create_feature_extractor(net, {node: "features"}).eval()
    assert torch.equal(extractor(images)["features"], seen[0])
