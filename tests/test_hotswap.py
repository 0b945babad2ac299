"""Hot swaps: another adapter's numbers under a model that is compiled, exported, or computing in other threads."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SmallNet, need, randomise, snapshot, thorough
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora
from convlora import CheckpointError, StateError, TargetError, UnsupportedLayerError
from convlora._layer import gate

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums in another order
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def base() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().eval()


KINDS: dict[str, dict[str, Any]] = {
    "rank 2": {"rank": 2},
    "rank 3 with another alpha": {"rank": 3, "alpha": 4.0},
    "rank 16, whole differences among them": {"rank": 16},
    "at another strength": {"rank": 4, "strength": 0.7},
    "one layer alone": {"rank": 5, "target_modules": "block.3"},
    "two ranks": {"rank": 4, "rank_pattern": {"stem": 1}},
    "rsLoRA": {"rank": 4, "use_rslora": True},
    "factors that began elsewhere": {"rank": 4, "init": "olora"},
    "tracked norms": {"rank": 4, "norm": "track"},
    "nothing but a head": {"target_modules": ()},
}


def trained(seed: int, strength: float = 1.0, **asked: Any) -> SmallNet:
    """An adapter with numbers of its own, its head and, where they are tracked, its statistics, too."""
    net = base()
    convlora.inject(net, **asked)
    randomise(net, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (net.fc.weight, net.fc.bias):
            tensor.add_(torch.randn(tensor.shape, generator=generator))
        if asked.get("norm") == "track":
            net.bn1.running_mean.add_(torch.rand(16, generator=generator))
            net.bn1.weight.add_(torch.rand(16, generator=generator))
    return convlora.set_scale(net, "default", strength) if strength != 1 else net


def by_hand(directory: Path) -> SmallNet:
    """The base with what a file holds added by einsum, as its manifest says; shares nothing with the library."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        plan = json.loads(file.metadata()["convlora"])["plan"]
        tensors = {key.removeprefix("base_model.model."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    net = base()
    with torch.no_grad():
        for layer in plan["layers"]:
            A, B = (tensors.pop(f"{layer['name']}.lora_{factor}.weight") for factor in "AB")
            delta = torch.einsum("or,r...->o...", B.flatten(1).double(), A.double())
            net.get_submodule(layer["name"]).weight += layer["scaling"] * layer["strength"] * delta
    assert not net.load_state_dict(tensors, strict=False).unexpected_keys
    return net


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind."""
    made = {}
    for seed, (kind, asked) in enumerate(KINDS.items()):
        made[kind] = tmp_path_factory.mktemp("adapter")
        convlora.save_adapter(trained(seed, **asked), made[kind])
    return made


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {kind: by_hand(file)(IMAGES) for kind, file in files.items()}


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def prepared(files: dict[str, Path], kind: str = "tracked norms", max_rank: int = 16) -> SmallNet:
    """A model with one adapter; with tracked norms it has room for what those of all kinds have."""
    return convlora.prepare_for_hotswap(convlora.load_adapter(base(), files[kind]), max_rank)


def predicts(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that `compiled` was given since, one a compilation."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(net: nn.Module, graphs: list[Any], backend: str = "eager", fullgraph: bool = True) -> nn.Module:
    """In one graph or not at all; every compilation is counted."""
    run = torch._dynamo.lookup_backend(backend)

    def recording(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return run(graph, inputs)

    return torch.compile(net, backend=recording, fullgraph=fullgraph)


# ---- compiled


@pytest.mark.parametrize("backend", ["eager", thorough("aot_eager"), thorough("inductor")])
def test_fifty_swaps_under_a_compiled_model_are_one_compilation(files, expected, graphs, backend):
    net = prepared(files)
    run, kinds = compiled(net, graphs, backend), [kind for kind in KINDS if kind != "tracked norms"]
    for index in range(50):
        kind = kinds[index % len(kinds)]
        convlora.hotswap_adapter(run, files[kind])
        torch.testing.assert_close(predicts(run), expected[kind], **CLOSE)
        torch.testing.assert_close(predicts(net), expected[kind], **CLOSE)
    assert len(graphs) == 1


def test_a_swap_between_norm_policies_is_one_compilation_more(files, expected, graphs):
    run = compiled(prepared(files), graphs)
    for kind in ("tracked norms", "rank 2", "tracked norms", "rank 16, whole differences among them", "tracked norms"):
        convlora.hotswap_adapter(run, files[kind])
        torch.testing.assert_close(predicts(run), expected[kind], **CLOSE)
    assert len(graphs) == 2


@pytest.mark.parametrize("backend", ["eager", thorough("aot_eager"), thorough("inductor")])
def test_fifty_adapters_of_a_compiled_model_are_set_with_one_compilation(files, expected, graphs, backend):
    kinds = [kind for kind in KINDS if kind != "tracked norms"]
    net = base()
    for index in range(50):
        convlora.load_adapter(net, files[kinds[index % len(kinds)]], f"a{index}", check_base=False)
    run = compiled(convlora.prepare_for_hotswap(net), graphs, backend)
    for index in range(50):
        convlora.set_adapter(net, f"a{index}")
        torch.testing.assert_close(predicts(run), expected[kinds[index % len(kinds)]], **CLOSE)
        torch.testing.assert_close(predicts(net), expected[kinds[index % len(kinds)]], **CLOSE)
    assert len(graphs) == 1


def test_compiled_with_gradients_on_it_is_swapped_as_well(files, expected, graphs):
    run = compiled(prepared(files), graphs)
    for kind in ("rank 2", "at another strength", "one layer alone"):
        convlora.hotswap_adapter(run, files[kind])
        torch.testing.assert_close(run(IMAGES).detach(), expected[kind], **CLOSE)
    assert len(graphs) == 1


def test_an_adapter_that_comes_later_is_prepared_by_a_second_call_and_compiles_nothing(files, expected, graphs):
    net = prepared(files, "rank 2")
    run = compiled(net, graphs)
    predicts(run)
    convlora.prepare_for_hotswap(convlora.load_adapter(net, files["at another strength"], "later"))
    for name, kind in (("later", "at another strength"), ("default", "rank 2")):
        convlora.set_adapter(net, name)
        torch.testing.assert_close(predicts(run), expected[kind], **CLOSE)
    assert len(graphs) == 1


def test_blocks_at_another_strength_and_weights_of_one_adapter_compile_nothing(files, graphs):
    net = prepared(files, "rank 2")
    run, twin = compiled(net, graphs), convlora.load_adapter(base(), files["rank 2"])
    predicts(run)
    for factor in (0.5, 0.0, -1.0):
        with convlora.scaled(net, factor), convlora.scaled(twin, factor):
            torch.testing.assert_close(predicts(run), predicts(twin), **CLOSE)
    for model in (net, twin):
        convlora.set_adapter(model, {"default": 0.3})
    torch.testing.assert_close(predicts(run), predicts(twin), **CLOSE)
    assert len(graphs) == 1


def test_the_base_alone_is_one_compilation_more(files, expected, graphs):
    net = prepared(files, "rank 2")
    run = compiled(net, graphs)
    for _ in range(3):
        torch.testing.assert_close(predicts(run), expected["rank 2"], **CLOSE)
        with convlora.disable_adapter(net):
            torch.testing.assert_close(predicts(run), predicts(base()), **CLOSE)
    assert len(graphs) == 2


# ---- in place, and exported


def test_a_swap_writes_into_the_tensors_that_are_there(files):
    """What a CUDA graph has captured are addresses."""
    net = prepared(files, "rank 2")
    before = {key: (id(tensor), tensor.data_ptr()) for key, tensor in net.state_dict(keep_vars=True).items()}
    numbers = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    convlora.hotswap_adapter(net, files["at another strength"])
    after = net.state_dict(keep_vars=True)
    assert {key: (id(tensor), tensor.data_ptr()) for key, tensor in after.items()} == before
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, numbers[key])}
    assert {"stem.convlora.default.lora_A", "stem.convlora.default.gain", "fc.weight", "fc.bias"} <= moved
    assert not {"stem.weight", "bn1.weight", "bn1.running_mean"} & moved


@pytest.mark.parametrize("strict", [thorough(True), False])
def test_an_exported_program_takes_other_numbers_without_another_export(files, expected, strict, tmp_path):
    net = prepared(files, "rank 2")
    program = torch.export.export(net, (IMAGES,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    for kind in ("rank 16, whole differences among them", "one layer alone", "rank 2"):
        convlora.hotswap_adapter(net, files[kind])
        for exported in (program.module(), torch.export.load(tmp_path / "program.pt2").module()):
            assert not exported.load_state_dict(net.state_dict(), strict=False).missing_keys
            torch.testing.assert_close(predicts(exported), expected[kind], **CLOSE)


@pytest.mark.thorough
def test_an_onnx_file_takes_other_numbers_without_another_export(files, expected, tmp_path):
    onnx, onnxruntime, numpy_helper = need("onnx"), need("onnxruntime"), need("onnx.numpy_helper")
    need("onnxscript")
    net = prepared(files, "rank 2")
    # Not optimized: that would make one constant of the base's weight and the factors.
    torch.onnx.export(net, (IMAGES,), dynamo=True, verbose=False, optimize=False).save(tmp_path / "model.onnx")
    for kind in ("rank 16, whole differences among them", "one layer alone", "rank 2"):
        convlora.hotswap_adapter(net, files[kind])
        model, state = onnx.load(tmp_path / "model.onnx"), net.state_dict()
        there = [each for each in model.graph.initializer if each.name in state]
        assert {"stem.convlora.default.lora_A", "stem.convlora.default.gain"} <= {each.name for each in there}
        for each in there:
            each.CopyFrom(numpy_helper.from_array(state[each.name].numpy(), each.name))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[kind], **CLOSE)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_and_torch_fx_follow_a_swap(files, expected):
    net = prepared(files, "rank 2")
    with torch.no_grad():
        traced = torch.jit.trace(net, IMAGES)
    symbolic = torch.fx.symbolic_trace(net)
    convlora.hotswap_adapter(net, files["at another strength"])
    for run in (traced, symbolic):
        torch.testing.assert_close(predicts(run), expected["at another strength"], **CLOSE)


# ---- threads


class Slow:
    """A hook that waits in the middle of a forward, uncompiled."""

    def __init__(self) -> None:
        self.is_inside, self.may_go = threading.Event(), threading.Event()

    @torch.compiler.disable
    def __call__(self, *_: object) -> None:
        self.is_inside.set()
        assert self.may_go.wait(60)


def started(call: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """A thread that makes a call, and where its result will be."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("call", ["hotswap_adapter", "set_adapter"])
def test_a_swap_waits_for_a_forward_that_is_under_way_and_a_later_forward_for_the_swap(
    files, expected, graphs, call, is_compiled
):
    net, slow = base(), Slow()
    for name, kind in (("default", "rank 2"), ("other", "at another strength")):
        convlora.load_adapter(net, files[kind], name)
    convlora.prepare_for_hotswap(net)
    run: Any = net
    if is_compiled:
        run = torch.compile(net, backend="eager")
    net.hidden.register_forward_pre_hook(slow)
    first, old = started(lambda: predicts(run))
    assert slow.is_inside.wait(60)
    if call == "hotswap_adapter":
        second, _ = started(lambda: convlora.hotswap_adapter(run, files["at another strength"]))
    else:
        second, _ = started(lambda: convlora.set_adapter(net, "other"))
    while not vars(net)[gate.GATE]._waiting:
        second.join(0.01)
    third, new = started(lambda: predicts(run))
    second.join(0.1)
    assert second.is_alive() and not new
    slow.may_go.set()
    for thread in (first, second, third):
        thread.join(60)
    torch.testing.assert_close(old[0], expected["rank 2"], **CLOSE)
    torch.testing.assert_close(new[0], expected["at another strength"], **CLOSE)


@pytest.mark.parametrize("swaps, is_compiled", [(60, False), (60, True), thorough(1000, False), thorough(1000, True)])
def test_threads_that_predict_while_another_swaps_see_one_adapter_or_the_other(files, graphs, swaps, is_compiled):
    net = prepared(files, "rank 2")
    # fullgraph=True: torch 2.14 counts frames for all threads together, and raises now and then on a plain network, too
    run = compiled(net, graphs, fullgraph=False) if is_compiled else net
    kinds = ("rank 2", "at another strength")
    with torch.no_grad():
        known = [predicts(convlora.hotswap_adapter(run, files[kind])) for kind in kinds]
    is_over, strange, counts = threading.Event(), list[Exception](), [[0, 0], [0, 0]]

    def predict(count: list[int]) -> None:
        try:
            while not is_over.is_set():
                found = predicts(run)
                count[next(index for index, one in enumerate(known) if torch.equal(one, found))] += 1
        except Exception as error:
            strange.append(error)

    threads = [threading.Thread(target=predict, args=(count,)) for count in counts]
    for thread in threads:
        thread.start()
    try:
        for index in range(swaps):
            convlora.hotswap_adapter(run, files[kinds[index % 2]], check_base=False)
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)
    assert strange == [] and len(graphs) == int(is_compiled)
    assert all(sum(count) for count in counts) and all(map(sum, zip(*counts, strict=True)))


def test_a_forward_inside_a_forward_of_the_same_thread_does_not_wait_for_itself(files):
    net = prepared(files, "rank 2")
    once = iter([True])
    net.fc.register_forward_hook(lambda *_: predicts(net).sum().isnan() and None if next(once, False) else None)
    writer = threading.Thread(target=lambda: convlora.hotswap_adapter(net, files["at another strength"]))
    thread, found = started(lambda: (predicts(net), writer.start(), predicts(net)))
    thread.join(60), writer.join(60)
    assert found and not thread.is_alive() and not writer.is_alive()


def test_a_forward_that_fails_leaves_the_gate_open(files, expected):
    net = prepared(files, "rank 2")
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 5, 8, 8))
    thread, _ = started(lambda: convlora.hotswap_adapter(net, files["at another strength"]))
    thread.join(60)
    torch.testing.assert_close(predicts(net), expected["at another strength"], **CLOSE)


class OnADevice(nn.Module):
    """Says that its tensors are on an accelerator."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("cuda", 1))


def test_on_an_accelerator_a_swap_waits_for_the_device_before_and_after(monkeypatch):
    root, order = OnADevice(), []
    vars(root)[gate.GATE] = gate.Gate()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", order.append)
    with gate.alone(root):
        order.append("written")
    assert order == [torch.device("cuda", 1), "written", torch.device("cuda", 1)]


# ---- what is left of the old, and what is saved


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_after_a_swap_is_the_file_that_was_swapped_in(files, kind, tmp_path):
    net = prepared(files)
    convlora.hotswap_adapter(net, files["rank 16, whole differences among them"])
    convlora.hotswap_adapter(net, files[kind])
    convlora.save_adapter(net, tmp_path)
    found, original = (load_file(each / "adapter_model.safetensors") for each in (tmp_path, files[kind]))
    assert found.keys() == original.keys() and all(torch.equal(found[key], original[key]) for key in found)
    torch.testing.assert_close(
        predicts(convlora.load_adapter(base(), tmp_path)),
        predicts(convlora.load_adapter(base(), files[kind])),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_of_a_prepared_model_is_as_without(files, kind, tmp_path):
    convlora.save_adapter(prepared(files, kind), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (
        files[kind] / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_changes_no_prediction(files, kind):
    twin = convlora.load_adapter(base(), files[kind])
    torch.testing.assert_close(predicts(prepared(files, kind)), predicts(twin), **ROUNDING)


def test_a_fresh_adapter_that_is_prepared_is_the_base_to_the_bit():
    net = convlora.prepare_for_hotswap(convlora.inject(base(), 16, norm="track"))
    assert torch.equal(predicts(net), predicts(base()))


def test_a_layer_that_only_the_old_adapter_had_is_the_base_s_to_the_bit(files):
    net = prepared(files)
    convlora.hotswap_adapter(net, files["nothing but a head"])
    assert torch.equal(predicts(net), predicts(by_hand(files["nothing but a head"])))


def test_merged_and_unmerged_are_one_weight_to_the_bit_and_the_base_comes_back(files):
    plain = base()
    before = snapshot(plain)
    convlora.load_adapter(plain, files["tracked norms"])
    convlora.prepare_for_hotswap(plain)
    for kind in ("rank 3 with another alpha", "one layer alone"):
        convlora.hotswap_adapter(plain, files[kind])
        unmerged = predicts(plain)
        assert torch.equal(predicts(convlora.merge(plain)), unmerged)
        with pytest.raises(StateError, match="unmerge"):
            convlora.hotswap_adapter(plain, files["rank 2"])
        assert torch.equal(predicts(convlora.unmerge(plain)), unmerged)
    assert convlora.check(plain) == []
    convlora.remove(plain)
    assert snapshot(plain) == before


def test_a_prepared_and_merged_model_is_removed_as_the_merged_plain_one(files):
    net = prepared(files)
    convlora.hotswap_adapter(net, files["one layer alone"])
    expected = predicts(net)
    assert torch.equal(predicts(convlora.remove(convlora.merge(net))), expected)
    assert type(net) is SmallNet and type(net.stem) is nn.Conv2d


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_swapped_by_itself(files, expected, way):
    net = prepared(files)
    other = way(net)
    convlora.hotswap_adapter(other, files["rank 2"])
    torch.testing.assert_close(predicts(other), expected["rank 2"], **CLOSE)
    torch.testing.assert_close(predicts(net), expected["tracked norms"], **CLOSE)
    assert vars(other)[gate.GATE] is not vars(net)[gate.GATE]


def test_a_replica_as_data_parallel_makes_it_computes_with_factors_of_its_own(files):
    adapters = prepared(files, "rank 2").stem.convlora
    replica = adapters._replicate_for_data_parallel()
    replica._modules["default"] = own = copy.deepcopy(adapters["default"])
    assert replica.current() is own and adapters.current() is not own


def test_a_state_dict_of_a_prepared_model_loads_into_another_of_the_same_strength(files):
    first, second = prepared(files, "rank 2"), prepared(files, "rank 2")
    convlora.set_scale(first, "default", 0.5)
    with pytest.raises(StateError, match=r"Call convlora\.set_scale first"):
        second.load_state_dict(first.state_dict())
    convlora.set_scale(second, "default", 0.5).load_state_dict(first.state_dict())
    assert torch.equal(predicts(second), predicts(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_another_dtype_it_is_swapped_as_well(files, dtype):
    net = prepared(files, "rank 2").to(dtype)
    twin = convlora.load_adapter(base(), files["at another strength"]).to(dtype)
    convlora.hotswap_adapter(net, files["at another strength"], check_base=False)
    with torch.no_grad():
        found, expected = (model(IMAGES.to(dtype)) for model in (net, twin))
    torch.testing.assert_close(found, expected, **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else CLOSE))


def test_an_adapter_that_is_not_active_is_swapped_and_waits(files, expected):
    net = convlora.load_adapter(base(), files["rank 2"])
    convlora.load_adapter(net, files["tracked norms"], "other")
    convlora.prepare_for_hotswap(net)
    convlora.hotswap_adapter(net, files["at another strength"], "other")
    torch.testing.assert_close(predicts(net), expected["rank 2"], **CLOSE)
    torch.testing.assert_close(predicts(convlora.set_adapter(net, "other")), expected["at another strength"], **CLOSE)
    assert convlora.summary(net).adapter_name == "other"
    convlora.delete_adapter(net, "default")
    torch.testing.assert_close(predicts(net), expected["at another strength"], **CLOSE)


def test_of_several_that_are_active_one_is_swapped_by_its_name(files):
    net, twin = convlora.load_adapter(base(), files["rank 2"], "a"), convlora.load_adapter(base(), files["rank 2"], "a")
    convlora.load_adapter(net, files["at another strength"], "b")
    convlora.load_adapter(twin, files["rank 3 with another alpha"], "b")
    convlora.prepare_for_hotswap(net)
    for model in (net, twin):
        convlora.set_adapter(model, {"a": 1.0, "b": 0.5})
    with pytest.raises(StateError, match="give the name of one"):
        convlora.hotswap_adapter(net, files["rank 3 with another alpha"])
    convlora.hotswap_adapter(net, files["rank 3 with another alpha"], "b")
    torch.testing.assert_close(predicts(net), predicts(twin), **CLOSE)


def test_a_scaling_that_is_written_by_hand_counts(files):
    net, twin = prepared(files, "rank 2"), convlora.load_adapter(base(), files["rank 2"])
    for model in (net, twin):
        model.stem.convlora["default"].scaling = 0.3
        model.stem.convlora["default"].strength = 2.0
    torch.testing.assert_close(predicts(net), predicts(twin), **ROUNDING)


def routed(net: nn.Module) -> Tensor:
    with torch.no_grad(), convlora.use_adapters(net, ["default", "other", None, {"default": 0.5, "other": 2.0}]):
        return net(IMAGES)


def dropped(net: nn.Module) -> Tensor:
    torch.manual_seed(3)
    return net.train()(IMAGES)


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "use_adapters": routed,
    "combine_adapters": lambda net: predicts(
        convlora.set_adapter(convlora.combine_adapters(net, {"default": 0.5, "other": 1}, "both") and net, "both")
    ),
    "shrink": lambda net: predicts(convlora.shrink(net, 1) and net),
    "add_adapter": lambda net: predicts(
        convlora.set_adapter(convlora.add_adapter(net, "new", 2), {"new": 1, "default": 1}, owner="default")
    ),
    "merge": lambda net: predicts(convlora.merge(net)),
    "disable_adapter": lambda net: predicts(disabled(net)),
    "a training forward": dropped,
}


@pytest.mark.parametrize("call", CALLS)
def test_other_calls_find_in_a_prepared_model_what_they_find_without(files, call):
    found = []
    for prepare in (True, False):
        net = convlora.load_adapter(base(), files["rank 16, whole differences among them"])
        convlora.load_adapter(net, files["one layer alone"], "other")
        found.append(CALLS[call](convlora.prepare_for_hotswap(net) if prepare else net))
    torch.testing.assert_close(*found, **CLOSE)


def test_zeros_beyond_the_rank_stay_zero_in_training_and_the_rest_trains_as_without():
    nets = [trained(1, rank=2), convlora.prepare_for_hotswap(trained(1, rank=2), 8)]
    for net in nets:
        optimizer = torch.optim.AdamW(convlora.trainable_parameters(net.train()), lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(IMAGES).square().mean().backward()
            optimizer.step()
    plain, padded = (net.stem.convlora["default"] for net in nets)
    assert not padded.lora_A[2:].any() and not padded.lora_B[:, 2:].any()
    for expected, found in zip(plain.factors(), padded.factors(), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "nf_resnet26"])
def test_adapters_of_real_networks_are_swapped_with_one_compilation(name, graphs, tmp_path):
    timm = need("timm")

    def made(rank: int) -> nn.Module:
        torch.manual_seed(0)
        net = convlora.inject(timm.create_model(name, num_classes=3), rank).eval()
        randomise(net, 0.02, seed=rank)
        return net

    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        nets = {rank: made(rank) for rank in (2, 8, 16)}
        expected = {rank: net(images) for rank, net in nets.items()}
        for rank, net in nets.items():
            convlora.save_adapter(net, tmp_path / str(rank))
        net = convlora.prepare_for_hotswap(nets[8])
        run = compiled(net, graphs)
        for rank in (8, 2, 16, 8):
            convlora.hotswap_adapter(run, tmp_path / str(rank))
            torch.testing.assert_close(run(images), expected[rank], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(net(images), expected[rank], rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1


def test_the_model_itself_may_be_the_adapted_layer(tmp_path):
    def made(seed: int) -> nn.Conv2d:
        torch.manual_seed(0)
        layer = convlora.inject(nn.Conv2d(3, 8, 3).eval(), 2, modules_to_save=None)
        randomise(layer, seed=seed)
        return layer

    net, other = made(1), made(2)
    convlora.save_adapter(other, tmp_path)
    convlora.prepare_for_hotswap(net)
    convlora.hotswap_adapter(net, tmp_path)
    torch.testing.assert_close(predicts(net), predicts(other), **ROUNDING)
    unmerged = predicts(net)
    assert torch.equal(predicts(convlora.merge(net)), unmerged)
    convlora.remove(convlora.unmerge(net))
    assert type(net) is nn.Conv2d and not [name for name in vars(net) if "convlora" in name]


# ---- peft's own situations, from its tests of hot swapping


class Linears(nn.Module):
    """Two linear layers, as in peft's tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


class Convolution(nn.Module):
    """A convolution and a linear layer, likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv2d(3, 10, 3), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.conv(x).relu().mean((2, 3)))


BOTH = ["lin0", "lin1"]
FROM_PEFT: dict[str, tuple[type[nn.Module], list[dict[str, Any]]]] = {
    "ranks, alphas and fewer layers": (Linears, [{"r": 7, "lora_alpha": 7}, {"r": 13, "target_modules": ["lin0"]}]),
    "the other way": (Linears, [{"r": 13, "lora_alpha": 5}, {"r": 7, "lora_alpha": 7}]),
    "ranks of a convolution": (Convolution, [{"r": 7, "lora_alpha": 3}, {"r": 13}, {"r": 1}]),
    "patterns": (Linears, [{"r": 2}, {"rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 7}}]),
    "rsLoRA": (Linears, [{"r": 4, "use_rslora": True}, {"r": 4}]),
    "biases": (Linears, [{"r": 4, "bias": "lora_only"}, {"r": 2, "bias": "lora_only"}, {"r": 2}]),
    "a module in full": (Linears, [{"target_modules": ["lin0"], "modules_to_save": ["lin1"], "r": r} for r in (2, 3)]),
}


def by_peft(kind: type[nn.Module], config: dict[str, Any], seed: int, folder: Path) -> Tensor:
    """What peft predicts with an adapter of this configuration, which it has saved."""
    peft = need("peft")
    torch.manual_seed(0)
    net = kind().eval()
    targets = BOTH if kind is Linears else ["conv", "lin"]
    torch.manual_seed(seed)
    model = peft.get_peft_model(net, peft.LoraConfig(**{"target_modules": targets, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return predicted(model, kind)


def predicted(model: nn.Module, kind: type[nn.Module]) -> Tensor:
    torch.manual_seed(5)
    images = torch.randn(3, 10) if kind is Linears else torch.randn(3, 3, 10, 10)
    with torch.no_grad():
        return model(images)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("situation", FROM_PEFT)
def test_files_of_peft_are_swapped_as_peft_predicts_with_one_compilation(situation, graphs, tmp_path):
    kind, configs = FROM_PEFT[situation]
    torch.manual_seed(0)
    net, folders = kind().eval(), [tmp_path / str(index) for index in range(len(configs))]
    expected = [by_peft(kind, config, 1 + i, folders[i]) for i, config in enumerate(configs)]
    convlora.prepare_for_hotswap(convlora.load_adapter(net, folders[0]), 13)
    run = compiled(net, graphs)
    for index in (0, *range(len(configs)), 0):
        convlora.hotswap_adapter(run, folders[index])
        torch.testing.assert_close(predicted(run, kind), expected[index], **CLOSE)
        torch.testing.assert_close(predicted(net, kind), expected[index], **CLOSE)
    assert len(graphs) == 1


def test_a_file_of_peft_by_another_method_is_refused(tmp_path):
    peft = need("peft")
    by_peft(Linears, {"r": 2}, 1, tmp_path / "lora")
    other = peft.get_peft_model(Linears(), peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    other.save_pretrained(tmp_path / "ia3")
    torch.manual_seed(0)
    net = convlora.prepare_for_hotswap(convlora.load_adapter(Linears().eval(), tmp_path / "lora"))
    before = snapshot(net)
    with pytest.raises(CheckpointError, match=r"lin0.*ia3"):
        convlora.hotswap_adapter(net, tmp_path / "ia3")
    assert snapshot(net) == before


def test_a_file_of_kohya_s_scripts_is_swapped_in(files, tmp_path):
    tensors, delta = {}, {}
    torch.manual_seed(3)
    for name, rank in (("stem", 2), ("block.3", 5)):
        layer = base().get_submodule(name)
        A, B = torch.randn(rank, *layer.weight.shape[1:]), 0.1 * torch.randn(len(layer.weight), rank, 1, 1)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.alpha": torch.tensor(3.0)}
        delta[name] = 3 / rank * torch.einsum("or,riyx->oiyx", B.flatten(1), A)
    save_file(tensors, tmp_path / "style.safetensors")
    expected = base()
    with torch.no_grad():
        for name, each in delta.items():
            expected.get_submodule(name).weight += each
    net = convlora.hotswap_adapter(prepared(files), tmp_path / "style.safetensors")
    torch.testing.assert_close(predicts(net), predicts(expected), **CLOSE)


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2), (3, 1)])
def test_ranks_of_a_grouped_convolution_need_not_go_into_its_groups(ranks, tmp_path):
    nets = []
    for seed, rank in enumerate(ranks):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 16, 3, groups=2), nn.Flatten(), nn.Linear(64, 2)).eval()
        nets.append(convlora.inject(net, rank, modules_to_save=None, method_pattern={"*": "lora"}))
        randomise(net, seed=seed)
        convlora.save_adapter(net, tmp_path / str(seed))
    images = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = [net(images) for net in nets]
        run = convlora.prepare_for_hotswap(nets[0], 5)
        for index in (0, 1, 0):
            convlora.hotswap_adapter(run, tmp_path / str(index))
            torch.testing.assert_close(run(images), expected[index], **ROUNDING)


@pytest.mark.parametrize("max_rank", [5, 8, 13])
def test_padded_factors_are_as_wide_as_asked_or_as_the_layer_s_whole_difference(max_rank):
    net = convlora.prepare_for_hotswap(trained(0, rank=4, rank_pattern={"stem": 5}), max_rank)
    widths = {name: len(net.get_submodule(name).convlora["default"].lora_A) for name in ("stem", "block.0", "block.3")}
    full = {"stem": 16, "block.0": 9, "block.3": 16}
    assert widths == {name: max(max_rank, n) if n < 2 * max_rank else max_rank for name, n in full.items()}
    assert [convlora.summary(net).layers[0].rank, net.stem.convlora["default"].rank] == [5, 5]


def test_a_second_call_with_the_same_rank_changes_no_object_and_with_a_larger_one_gives_room(files, expected):
    net = prepared(files, "rank 2", max_rank=4)
    before = snapshot(net)
    assert snapshot(convlora.prepare_for_hotswap(net, 4)) == before
    with pytest.raises(CheckpointError, match="room"):
        convlora.hotswap_adapter(net, files["rank 16, whole differences among them"])
    convlora.hotswap_adapter(convlora.prepare_for_hotswap(net, 16), files["rank 16, whole differences among them"])
    torch.testing.assert_close(predicts(net), expected["rank 16, whole differences among them"], **CLOSE)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_trainable_stays_so(files, asked):
    net = convlora.load_adapter(base(), files["rank 2"])
    convlora.load_adapter(net, files["one layer alone"], "other")
    for parameter in convlora.adapter_parameters(net):
        parameter.requires_grad_(asked)
    before = {key: p.requires_grad for key, p in net.named_parameters() if "convlora" not in key}
    convlora.prepare_for_hotswap(net)
    convlora.hotswap_adapter(net, files["at another strength"])
    flags = {key: p.requires_grad for key, p in net.named_parameters()}
    assert {key: flags[key] for key in before} == before
    assert {flag for key, flag in flags.items() if ".default.lora" in key} == {asked}
    assert not any(flag for key, flag in flags.items() if ".other.lora" in key)
    convlora.set_adapter(net, "other")
    assert all(p.requires_grad for key, p in net.named_parameters() if ".other.lora" in key)


def test_a_base_that_was_written_since_the_last_swap_is_read_again(files):
    net = prepared(files, "rank 2")
    convlora.hotswap_adapter(net, files["rank 2"])
    with torch.no_grad():
        net.hidden.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"hidden\.weight"):
        convlora.hotswap_adapter(net, files["rank 2"])
    convlora.hotswap_adapter(net, files["rank 2"], check_base=False)


# ---- refused


def with_dora(net: nn.Module) -> nn.Module:
    return convlora.inject(net, 2, use_dora=True)


REFUSED_TO_PREPARE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no adapter": (base, StateError, "inject"),
    "a rank that is larger": (lambda: trained(0, rank=4), UnsupportedLayerError, "stem.*rank 4.*max_rank=4 has"),
    "DoRA": (lambda: with_dora(base()), UnsupportedLayerError, "DoRA"),
    "another method": (lambda: convlora.inject(base(), 2, method="loha"), UnsupportedLayerError, "stem.*loha"),
    "numbers for channels": (lambda: convlora.inject(base(), method="ia3"), UnsupportedLayerError, "stem.*ia3"),
    "merged": (lambda: convlora.merge(trained(0, rank=2)), StateError, "unmerge"),
    "compiled": (lambda: torch.compile(trained(0, rank=2)), UnsupportedLayerError, "then torch.compile"),
}


@pytest.mark.parametrize("what", REFUSED_TO_PREPARE)
def test_what_cannot_be_prepared_is_refused_with_its_reason_and_is_as_it_was(what):
    make, error, words = REFUSED_TO_PREPARE[what]
    net = make()
    before = snapshot(net)
    with pytest.raises(error, match=words):
        convlora.prepare_for_hotswap(net, 2)
    assert snapshot(net) == before


@pytest.mark.parametrize("max_rank", [0, -1, 1.5, True, "16"])
def test_a_largest_rank_that_is_no_rank_is_refused(max_rank):
    with pytest.raises(TargetError, match="max_rank"):
        convlora.prepare_for_hotswap(trained(0, rank=2), max_rank)


def nan_in(file: Path, folder: Path) -> Path:
    net = convlora.load_adapter(base(), file)
    with torch.no_grad():
        net.stem.convlora["default"].lora_B[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="diverged"):
        return convlora.save_adapter(net, folder)


def saved(net: nn.Module, folder: Path) -> Path:
    randomise(net)
    return convlora.save_adapter(net, folder)


def other_base(folder: Path) -> Path:
    torch.manual_seed(1)
    return saved(convlora.inject(SmallNet(), 2), folder)


REFUSED_FILES: dict[str, tuple[Callable[[Path, dict[str, Path]], Path], str]] = {
    "a layer more": (
        lambda folder, _: saved(convlora.inject(base(), 2, target_modules=["stem", "hidden"]), folder),
        "hidden: no adapter of the model has this layer",
    ),
    "a larger rank": (
        lambda folder, _: saved(convlora.inject(base(), 2, rank_pattern={"stem": 6}), folder),
        "stem: rank 6 in the file, room for 4.*max_rank=6",
    ),
    "DoRA": (lambda folder, _: saved(with_dora(base()), folder), "stem: DoRA"),
    "another method": (lambda folder, _: saved(convlora.inject(base(), 2, method="loha"), folder), "stem: loha"),
    "tracked norms": (lambda folder, files: files["tracked norms"], "bn1.weight"),
    "another module in full": (
        lambda folder, _: saved(convlora.inject(base(), 2, modules_to_save=["fc", "hidden"]), folder),
        "hidden.weight",
    ),
    "NaN": (lambda folder, files: nan_in(files["rank 2"], folder), "stem"),
    "another base": (lambda folder, _: other_base(folder), "another base"),
    "nothing there": (lambda folder, _: folder / "none", "none"),
}


@pytest.mark.parametrize("what", REFUSED_FILES)
def test_a_file_that_does_not_fit_is_refused_by_name_and_nothing_is_swapped(files, what, tmp_path):
    make, words = REFUSED_FILES[what]
    file = make(tmp_path, files)
    net = prepared(files, "rank 2", max_rank=4)
    before, plan = snapshot(net), convlora.summary(net)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        convlora.hotswap_adapter(net, file)
    assert snapshot(net) == before and convlora.summary(net) == plan


OPEN = ExitStack()
"""Blocks that a test has opened."""


@pytest.fixture(autouse=True)
def _blocks_are_left() -> Iterator[None]:
    yield
    OPEN.close()


def disabled(net: nn.Module) -> nn.Module:
    OPEN.enter_context(convlora.disable_adapter(net))
    return net


def in_a_block(net: nn.Module) -> nn.Module:
    OPEN.enter_context(convlora.use_adapters(net, ["default"]))
    return net


REFUSED_STATES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "not prepared": (lambda net: convlora.inject(base(), 2), "prepare_for_hotswap"),
    "a new adapter that is not prepared": (
        lambda net: convlora.set_adapter(convlora.add_adapter(net, "new", 2), "new"),
        "'new'.*prepare_for_hotswap",
    ),
    "no adapter": (convlora.remove, "inject"),
    "merged": (convlora.merge, "unmerge"),
    "disabled": (disabled, "disable_adapter"),
    "a block for several adapters": (in_a_block, "use_adapters"),
}


@pytest.mark.parametrize("what", REFUSED_STATES)
def test_a_model_whose_numbers_cannot_be_swapped_now_is_refused(files, what):
    make, words = REFUSED_STATES[what]
    net = make(prepared(files, "rank 2"))
    before = snapshot(net)
    with pytest.raises(StateError, match=words):
        convlora.hotswap_adapter(net, files["rank 2"])
    assert snapshot(net) == before


def test_a_name_that_no_adapter_has_is_refused(files):
    with pytest.raises(StateError, match="There is no adapter 'b'"):
        convlora.hotswap_adapter(prepared(files, "rank 2"), files["rank 2"], "b")


def test_an_interrupt_in_the_middle_of_the_numbers_leaves_the_new_adapter_whole(files, expected, monkeypatch):
    net = prepared(files, "rank 2")
    load, calls = convlora._methods.padded.PaddedLoRA.load_stored, []

    def interrupted(self: Any, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        load(self, *args)

    monkeypatch.setattr(convlora._methods.padded.PaddedLoRA, "load_stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convlora.hotswap_adapter(net, files["at another strength"])
    torch.testing.assert_close(predicts(net), expected["at another strength"], **CLOSE)


def test_an_interrupt_while_it_is_prepared_leaves_it_prepared(files, expected, monkeypatch):
    net = convlora.load_adapter(base(), files["rank 2"])
    attach, calls = convlora._model.hotswap.attach, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        attach(*args)

    monkeypatch.setattr(convlora._model.hotswap, "attach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convlora.prepare_for_hotswap(net)
    convlora.hotswap_adapter(net, files["at another strength"])
    torch.testing.assert_close(predicts(net), expected["at another strength"], **CLOSE)
    assert torch.equal(predicts(convlora.remove(net)), predicts(base()))
