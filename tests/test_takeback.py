"""What is taken back stays exact when things go wrong: interrupts, edits by the user, odd modules and dtypes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, randomise, snapshot, thorough
from torch import nn
from torch.nn.utils import parametrize, prune

import convlora
from convlora import StateError, UnsupportedLayerError

ROOM = str(Path(convlora.__file__).parent)


class Interrupt(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


def run_interrupted(call, at):
    """Raise at the `at`-th line run inside convlora; whether the call got that far."""
    count = 0

    def line(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                raise Interrupt
        return line

    sys.settrace(lambda frame, event, _: line if frame.f_code.co_filename.startswith(ROOM) else None)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def predicted(model, images):
    """Without gradients: with them a layer may take a way in training that rounds otherwise."""
    with torch.no_grad():
        return model(images)


def trained(norm="track"):
    torch.manual_seed(0)
    model = SmallNet().train()
    convlora.inject(model, 2, norm=norm)
    randomise(model)
    model(torch.randn(4, 3, 8, 8))  # moves the tracked statistics
    return model.eval()


@pytest.mark.parametrize("step", [0, *map(thorough, (1, 2, 3))])
def test_interrupted_at_any_line_the_model_is_in_one_state_and_can_go_on(step, tmp_path):
    """Inject, merge, unmerge and remove, each cut short at every fourth line of the library, from `step` on."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    base = SmallNet().eval()
    at = 1 + step
    while True:
        model = copy.deepcopy(base)
        before = snapshot(model)
        if not run_interrupted(lambda model=model: convlora.inject(model, 2), at):
            break
        if hasattr(model, "_convlora"):  # cut after the last change: injected whole
            convlora.remove(model)
        assert snapshot(model) == before
        at += 4
    injected = trained()
    expected, plain = predicted(injected, images), predicted(convlora.remove(copy.deepcopy(injected)), images)
    for call, prepare in ((convlora.merge, None), (convlora.unmerge, convlora.merge), (convlora.remove, None)):
        at = 1 + step
        while True:
            model = copy.deepcopy(injected)
            if prepare is not None:
                prepare(model)
            if not run_interrupted(lambda model=model, call=call: call(model), at):
                break
            if hasattr(model, "_convlora"):
                assert torch.equal(predicted(model, images), expected), (call, at)
                if convlora.summary(model).state == "merged":
                    convlora.unmerge(model)
                convlora.remove(model)
            assert torch.equal(predicted(model, images), plain), (call, at)
            assert {type(m) for m in model.modules()} == {type(m) for m in base.modules()}
            at += 4


def visit(model):
    with convlora.disable_adapter(model):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda model: convlora.set_adapter(model, "b"),
        thorough(lambda model: convlora.add_adapter(model, "c", 1)),
        lambda model: convlora.delete_adapter(model, "b"),
        visit,
    ],
)
def test_interrupted_switching_leaves_each_adapter_whole(call):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model = convlora.add_adapter(trained(), "b", 3, norm="track")
    convlora.set_adapter(model, "b")
    randomise(model, seed=2)
    model.train()(images)
    expected = {"b": model.eval()(images)}
    convlora.set_adapter(model, "default")
    expected["default"] = model(images)
    base = convlora.remove(copy.deepcopy(model))(images)
    start, at = copy.deepcopy(model), 1
    while True:
        model = copy.deepcopy(start)
        if not run_interrupted(lambda model=model: call(model), at):
            break
        assert torch.equal(model(images), expected[convlora.summary(model).adapter_name]), at
        for name in ("default", "b"):
            if name in model.stem.convlora:
                convlora.set_adapter(model, name)
                assert torch.equal(model(images), expected[name]), (name, at)
        if "c" in model.stem.convlora:
            convlora.delete_adapter(model, "c")
        assert not any(".c." in key for key in model.state_dict())
        assert torch.equal(convlora.remove(model)(images), base), at
        at += 5


BLOCKS = {"disable": convlora.disable_adapter, "use": lambda model: convlora.use_adapters(model, ["b", None])}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_left_also_where_an_interrupt_comes_at_its_end(block):
    """At each of the first lines, which come before anything is taken back, and at every seventh from there."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    start = convlora.add_adapter(trained(), "b", 3, norm="track")
    expected, at = start(images), 1
    classes = [type(module) for module in start.modules()]
    while True:
        model = copy.deepcopy(start)
        opened = BLOCKS[block](model)
        opened.__enter__()
        interrupted = run_interrupted(lambda opened=opened: opened.__exit__(None, None, None), at)
        assert [type(module) for module in model.modules()] == classes, at
        assert torch.equal(model(images), expected), at
        convlora.set_adapter(convlora.unmerge(convlora.merge(model)), "b")
        if not interrupted:
            break
        at += 1 if at < 12 else 7
    assert at > 12


def test_pruned_after_merging_can_be_removed_and_unmerge_is_refused(net, images):
    convlora.inject(net.eval())
    randomise(net)
    convlora.merge(net)
    prune.l1_unstructured(net.stem, "weight", amount=0.5)
    expected = net(images)
    with pytest.raises(StateError, match=r"stem: its merged weight is no plain parameter any more"):
        convlora.unmerge(net)
    assert torch.equal(net(images), expected)
    convlora.remove(net)
    assert torch.equal(net(images), expected) and type(net.block[3]) is nn.Conv2d


@pytest.mark.parametrize(
    "edit", [lambda net: setattr(net.fc, "bias", None), lambda net: setattr(net.bn1, "weight", None)]
)
def test_parameters_that_the_user_dropped_do_not_stop_removal(net, edit):
    convlora.inject(net)
    edit(net)
    convlora.remove(net)
    assert all(p.requires_grad for p in net.parameters())


class Counter(nn.Module):
    """Buffers that move in train mode, at the root and inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.inner = Scale()
        self.fc = nn.Linear(8, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running_scale", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.running_scale *= 0.9
        return self.fc(self.inner(self.conv(x)).mean((2, 3)) * self.running_scale) + self.steps


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.register_buffer("running_scale", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.running_scale *= 0.5
        return self.conv(x) * self.running_scale


@pytest.mark.parametrize("norm", ["freeze", "track"])
@pytest.mark.parametrize("spectral", [False, True])
def test_every_buffer_that_moves_belongs_to_the_adapter(images, train, tmp_path, norm, spectral):
    torch.manual_seed(0)
    model = Counter()
    if spectral:
        nn.utils.parametrizations.spectral_norm(model.fc)
    base = copy.deepcopy(model)
    before = snapshot(model)
    convlora.inject(model, 2, norm=norm, modules_to_save=None)
    train(model, images)
    convlora.save_adapter(model, tmp_path)
    reloaded = convlora.load_adapter(base, tmp_path)
    assert torch.equal(reloaded.eval()(images), model.eval()(images))
    assert model.steps == 3
    assert model.inner.running_scale == 0.125  # blocks that count are no norms: frozen or not, they hear train()
    convlora.remove(model.train())
    assert snapshot(model) == before


def test_reset_statistics_of_frozen_norms_come_back(net):
    with torch.no_grad():
        net.bn1.running_mean += 0.5
    before = snapshot(net)
    convlora.inject(net)
    net.bn1.reset_running_stats()
    convlora.remove(net)
    assert snapshot(net) == before


def test_injecting_into_a_part_of_an_injected_model_is_refused(net):
    whole = nn.Sequential(net, SmallNet())
    convlora.inject(whole, modules_to_save=None)
    with pytest.raises(StateError, match=r"stem belongs to a model that carries an adapter already"):
        convlora.inject(whole[1])


def test_parts_injected_one_inside_the_other_are_removed_inner_first(images, train):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))  # buffers that move, and no norm
            self.a, self.b = SmallNet(), nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

        def forward(self, x):
            return self.a(x) + self.b(x)

    pair = Pair()
    before = snapshot(pair)
    convlora.inject(pair, target_modules="a.*", norm="track", modules_to_save=["a.fc", "b.3"])
    train(pair, images)
    with pytest.raises(StateError, match="belongs to a model that carries an adapter already"):
        convlora.inject(pair.a.block)
    convlora.inject(pair.b, norm="track")
    train(pair, images)
    convlora.remove(pair)
    assert snapshot(pair) == before


@pytest.mark.parametrize(
    "replace, name",
    [
        (lambda net: setattr(net, "fc", nn.Linear(12, 7)), "fc"),
        (lambda net: setattr(net, "stem", nn.Conv2d(3, 16, 3, 2, 1, bias=False)), "stem"),
        (lambda net: setattr(net, "bn1", nn.SyncBatchNorm(16)), "bn1"),
        (lambda net: delattr(net, "fc"), "fc"),
    ],
)
def test_replaced_modules_are_named_when_saving_or_merging(net, tmp_path, replace, name):
    convlora.inject(net)
    replace(net)
    for call in (lambda: convlora.save_adapter(net, tmp_path / "x"), lambda: convlora.merge(net)):
        with pytest.raises(StateError, match=rf"{name}.* was replaced after convlora\.inject"):
            call()
    assert not (tmp_path / "x").exists()
    convlora.remove(net)
    assert type(net.block[0]) is nn.Conv2d


def test_base_parameters_that_train_are_not_lost_in_silence(net, tmp_path):
    convlora.inject(net)
    net.hidden.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"hidden\.weight requires a gradient but belongs to the base"):
        convlora.save_adapter(net, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_parts_in_different_states_are_merged_and_unmerged_together(images):
    pair = nn.ModuleDict({"a": SmallNet(), "b": SmallNet()}).eval()
    convlora.merge(convlora.inject(pair["a"]))
    convlora.inject(pair["b"])
    convlora.merge(pair)
    assert type(pair["b"].stem) is nn.Conv2d
    convlora.unmerge(pair)
    assert type(pair["a"].stem) is type(pair["b"].stem) is not nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_cast_after_injection_reloads_bit_equal(net, images, tmp_path, dtype):
    base = copy.deepcopy(net).to(dtype)
    convlora.inject(net)
    randomise(net)
    net.to(dtype).eval()
    convlora.save_adapter(net, tmp_path)
    convlora.load_adapter(base, tmp_path).eval()
    assert torch.equal(base(images.to(dtype)), net(images.to(dtype)))


def test_meta_models_can_be_planned_and_not_injected(tmp_path):
    with torch.device("meta"):
        model = SmallNet()
    assert len(convlora.plan(model).layers) == 3
    with pytest.raises(UnsupportedLayerError, match=r"stem\.weight is on the meta device"):
        convlora.inject(model)


def test_flags_of_tied_parameters_return_after_merge_and_remove():
    first, second, table, head = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Embedding(3, 8), nn.Linear(8, 3)
    second.weight, head.weight = first.weight, table.weight
    model = nn.ModuleList([first, second, table, head])
    convlora.inject(model, 1, modules_to_save="3")
    convlora.remove(convlora.merge(model))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:every lora_B is zero")
def test_injected_and_loaded_under_inference_mode_can_be_trained(net, images, train, tmp_path):
    other = copy.deepcopy(net)
    with torch.inference_mode():
        convlora.inject(net, norm="track")
        convlora.save_adapter(net, tmp_path)
        convlora.load_adapter(other, tmp_path)
    train(net, images)
    train(other, images)
    with torch.inference_mode():
        convlora.remove(net)
    assert not any(t.is_inference() for t in net.state_dict().values())


@pytest.mark.filterwarnings("ignore:every lora_B is zero")
def test_extra_state_that_is_no_tensor_is_left_alone(tmp_path, images):
    class WithExtra(SmallNet):
        def get_extra_state(self):
            return {"note": "anything"}

        def set_extra_state(self, state):
            pass

    model, base = WithExtra(), WithExtra()
    base.load_state_dict(model.state_dict())
    convlora.save_adapter(convlora.inject(model), tmp_path)
    convlora.load_adapter(base, tmp_path)


def test_class_that_parametrize_put_on_top_is_named(net):
    convlora.inject(net)
    with pytest.raises((KeyError, StateError)):  # torch takes the weight away first
        parametrize.register_parametrization(net.stem, "weight", nn.Identity())
    with pytest.raises(StateError, match=r"ParametrizedAdaptedConv2d"):
        convlora.remove(net)
