"""One batch, several adapters: every sample gets what it gets alone, in this context and in no other."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from conftest import SmallNet, convolutions, need, randomise, thorough
from laws import assume, given, st
from safetensors import safe_open
from torch import nn

import convlora
from convlora import StateError

CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # fp32 rounding: W∗x + B(A∗x) here, (W + BA)∗x alone


def fill(model, images, names, size=0.1):
    """Numbers of its own for all that each adapter owns: factors, head, and statistics moved by a batch."""
    for seed, name in enumerate(names):
        convlora.set_adapter(model, name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in convlora.trainable_parameters(model):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        model.train()(images + seed)
    return model.eval()


def alone(model, images, names, forward=None):
    """The oracle: each sample by itself, its adapter active."""
    outputs = []
    with torch.no_grad():
        for name, image in zip(names, images.split(1), strict=True):
            if name is None:
                with convlora.disable_adapter(model):
                    outputs.append((forward or model)(image))
            else:
                convlora.set_adapter(model, name)
                outputs.append((forward or model)(image))
    return torch.cat(outputs)


def routed(model, images, names):
    with convlora.use_adapters(model, names), torch.no_grad():
        return model(images)


@pytest.fixture
def three(net, images):
    """Adapters that differ in rank, targets, norm policy and in what they train in full."""
    convlora.inject(net, 4, adapter_name="a", norm="track")
    convlora.add_adapter(net, "b", 2, target_modules=["block.*", "hidden"])
    convlora.add_adapter(net, "c", 3, target_modules="stem", modules_to_save=["block.3", "hidden"], norm="track")
    return fill(net, images, "abc")


NAMES = ["b", None, "a", "c", "a", "b", "c", None]
BOTH, HALF = {"a": -0.5, "b": 0.75}, {"b": 0.5}
"""What a sample may ask for besides a name: several adapters by weight, and one at a strength."""


@pytest.fixture
def batch():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(6))


def test_each_sample_gets_what_it_gets_alone(three, batch):
    expected = alone(three, batch, NAMES)
    assert (
        len({tuple(row) for row in alone(three, batch[:1].expand(4, -1, -1, -1), ["a", "b", "c", None]).tolist()}) == 4
    )
    for active in "abc":
        convlora.set_adapter(three, active)
        torch.testing.assert_close(routed(three, batch, NAMES), expected, **CLOSE)


@pytest.mark.parametrize(
    "names", [["a"] * 8, [None] * 8, ["b"] * 4 + [None] * 4, ["c", *["a"] * 7], [BOTH] * 8, [HALF, BOTH, None, "b"] * 2]
)
def test_any_mixture_of_names(three, batch, names):
    expected = alone(three, batch, names)
    convlora.set_adapter(three, "b")
    torch.testing.assert_close(routed(three, batch, names), expected, **CLOSE)


@given(
    geometry=convolutions(),
    names=st.lists(st.sampled_from(["a", "b", None, BOTH, HALF]), min_size=2, max_size=5),
    wins=st.booleans(),
)
def test_a_convolution_of_any_geometry(geometry, names, wins):
    """In fp64, so that a wrong number cannot hide behind rounding; both ways of a plain convolution."""
    conv, x = geometry.build(torch.float64)
    try:
        conv(x)
    except RuntimeError:
        assume(False)
    x = torch.randn(len(names), *x.shape[1:], dtype=torch.float64)
    net = nn.Sequential(conv)
    try:
        convlora.inject(net, 2, adapter_name="a", modules_to_save=None)
    except convlora.TargetError:  # even rank 1 would outweigh it
        assume(False)
    convlora.add_adapter(net, "b", 3, modules_to_save=None)
    for seed, name in enumerate("ab"):
        convlora.set_adapter(net, name)
        randomise(net, seed=seed)
    net.eval()
    expected = alone(net, x, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convlora._layer.routed.branch_wins", lambda *_: wins)
        torch.testing.assert_close(routed(net, x, names), expected, rtol=1e-12, atol=1e-12)


DEFAULT = [("mobilenetv3_small_050", None), ("test_vit", True), ("test_convnext", False), ("test_convnext", None)]
NETWORKS = ["resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "nf_resnet26", "test_vit", "test_convnext"]


@pytest.mark.parametrize(
    ("network", "wins"),
    [
        (network, wins) if (network, wins) in DEFAULT else thorough(network, wins)
        for network in NETWORKS
        for wins in (None, True, False)
        if wins is None or network != "nf_resnet26"
    ],
)
def test_real_networks(network, wins, monkeypatch):
    """Tracked BatchNorm, depthwise, StdConv, LayerNorm, own heads.

    Each way of a plain convolution in fp64, where nothing wrong hides behind rounding; as chosen in fp32, within 1e-6.
    """
    timm = need("timm")
    torch.manual_seed(0)
    dtype = torch.float32 if wins is None else torch.float64
    model = timm.create_model(network, num_classes=3).to(dtype)
    size = model.default_cfg["input_size"][-1] if network.startswith("test_") else 32 if wins is not None else 64
    images = torch.randn(6, 3, size, size, dtype=dtype)
    targets = {"test_vit": (nn.Conv2d, nn.Linear), "test_convnext": (nn.Conv2d, nn.Linear)}.get(network)
    convlora.inject(model, 4, adapter_name="a", norm="track", target_modules=targets)
    convlora.add_adapter(model, "b", 2)
    fill(model, images, "ab", size=0.02)
    names = ["a", "b", None, BOTH, HALF, {"a": 0.25, "b": 0.5}]
    expected = alone(model, images, names)
    assert not torch.allclose(expected, alone(model, images, ["a"] * 6), **CLOSE)
    if wins is not None:
        monkeypatch.setattr("convlora._layer.routed.branch_wins", lambda *_: wins)
    close = 1e-6 if wins is None else 1e-12
    scale = expected.abs().max().clamp(min=1)  # 1e-6 of outputs of size 1
    torch.testing.assert_close(routed(model, images, names) / scale, expected / scale, rtol=close, atol=close)


def test_channels_last_and_autocast(three, batch):
    expected = alone(three, batch, NAMES)
    last = three.to(memory_format=torch.channels_last)
    torch.testing.assert_close(routed(last, batch.to(memory_format=torch.channels_last), NAMES), expected, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = alone(last, batch, NAMES), routed(last, batch, NAMES)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)  # bf16 keeps 8 bits, some layers in a row


def test_half_precision_base(three, batch):
    three.bfloat16()
    batch = batch.bfloat16()
    expected = alone(three, batch, NAMES)
    torch.testing.assert_close(routed(three, batch, NAMES), expected, rtol=0.05, atol=0.02)  # as above


def test_gradients_are_those_of_each_sample_alone(three, batch):
    names = ["a", None, "a", "b", "c", "b", "a", None]
    convlora.set_adapter(three, "a")
    factors = list(convlora.adapter_parameters(three))
    x = batch.clone().requires_grad_()
    with convlora.use_adapters(three, names):
        three(x).sum().backward()
    got, of_factors = x.grad, [factor.grad.clone() for factor in factors]
    for factor in factors:
        factor.grad = None
    mine = [row for row, name in enumerate(names) if name == "a"]
    y = batch[mine].clone().requires_grad_()
    three(y).sum().backward()
    torch.testing.assert_close(got[mine], y.grad, rtol=1e-4, atol=1e-5)
    for one, factor in zip(of_factors, factors, strict=True):  # sums over positions, in another order
        torch.testing.assert_close(one, factor.grad, rtol=1e-4, atol=1e-4)


def test_another_thread_goes_its_own_way(three, batch):
    """Inside the block, outside of it and in a block of its own, all at once."""
    expected = {names: alone(three, batch, list(names)) for names in (("a",) * 8, tuple(NAMES), tuple(NAMES[::-1]))}
    convlora.set_adapter(three, "a")
    wrong, start = [], threading.Barrier(3)

    def work(names, block):
        start.wait()
        for _ in range(30):
            with torch.no_grad():
                if block:
                    with convlora.use_adapters(three, names):
                        y = three(batch)
                else:
                    y = three(batch)
            if not torch.allclose(y, expected[tuple(names)], **CLOSE):
                wrong.append(names)

    jobs = [(["a"] * 8, False), (NAMES, True), (NAMES[::-1], True)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [type(m) for m in three.modules() if type(m).__name__.startswith("Routed")] == []


def test_tasks_of_one_thread_go_their_own_ways(three, batch):
    expected = {name: alone(three, batch, [name] * 8) for name in "ab"}

    async def serve(name):
        with convlora.use_adapters(three, [name] * 8):
            await asyncio.sleep(0)
            with torch.no_grad():  # torch's own mode is the thread's, not the task's: nothing may be awaited in it
                y = three(batch)
            await asyncio.sleep(0)
        return name, y

    async def both():
        return await asyncio.gather(serve("a"), serve("b"), serve("a"))

    for name, y in asyncio.run(both()):
        torch.testing.assert_close(y, expected[name], **CLOSE)


def test_of_nested_blocks_the_inner_holds(three, batch):
    outer, inner = alone(three, batch, NAMES), alone(three, batch, NAMES[::-1])
    convlora.set_adapter(three, "c")
    plain = three.eval()(batch)
    with torch.no_grad(), convlora.use_adapters(three, NAMES):
        torch.testing.assert_close(three(batch), outer, **CLOSE)
        with convlora.use_adapters(three, NAMES[::-1]):
            torch.testing.assert_close(three(batch), inner, **CLOSE)
        torch.testing.assert_close(three(batch), outer, **CLOSE)
    assert torch.equal(three(batch), plain)


def test_a_block_of_one_model_leaves_another_alone(three, batch):
    twin = copy.deepcopy(three)
    expected = alone(three, batch, NAMES)
    convlora.set_adapter(twin, "b")
    with torch.no_grad(), convlora.use_adapters(three, NAMES):
        of_twin = twin(batch)
        with convlora.use_adapters(twin, ["c"] * 8):
            torch.testing.assert_close(three(batch), expected, **CLOSE)
        torch.testing.assert_close(of_twin, alone(twin, batch, ["b"] * 8), **CLOSE)


def test_the_active_adapter_may_change_inside(three, batch):
    expected = alone(three, batch, NAMES)
    with convlora.use_adapters(three, NAMES):
        for name in "abc":
            convlora.set_adapter(three, name)
            with torch.no_grad():
                torch.testing.assert_close(three(batch), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(three(batch), alone(three, batch, ["c"] * 8), **CLOSE)


def test_nothing_is_left_behind_also_after_an_error(three, batch):
    classes, attributes = [type(m) for m in three.modules()], [sorted(vars(m)) for m in three.modules()]
    state = {key: tensor.clone() for key, tensor in three.state_dict().items()}
    with pytest.raises(ZeroDivisionError), convlora.use_adapters(three, NAMES):
        three(batch)
        raise ZeroDivisionError
    assert [type(m) for m in three.modules()] == classes
    assert [sorted(vars(m)) for m in three.modules()] == attributes
    assert all(torch.equal(tensor, state[key]) for key, tensor in three.state_dict().items())


def test_copies_made_inside_are_outside(three, batch):
    convlora.set_adapter(three, "b")
    expected = three(batch)
    with convlora.use_adapters(three, NAMES):
        twins = [copy.deepcopy(three), pickle.loads(pickle.dumps(three))]
    for twin in twins:
        assert [type(m) for m in twin.modules()] == [type(m) for m in three.modules()]
        assert torch.equal(twin(batch), expected)
        convlora.remove(convlora.merge(twin))


def test_saving_inside_writes_what_is_written_outside(three, tmp_path):
    convlora.save_adapter(three, tmp_path / "outside", "a")
    with convlora.use_adapters(three, NAMES):
        convlora.save_adapter(three, tmp_path / "inside", "a")
    headers = []
    for side in ("outside", "inside"):  # the manifest in it has a digest of every tensor
        with safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]


# What is refused


def test_names_are_checked_at_the_door(three):
    with pytest.raises(StateError, match="There is no adapter 'z'; there is 'a', 'b', 'c'"):
        convlora.use_adapters(three, ["a", "z"]).__enter__()
    for wrong in ([], ["a", 3], ["a", ""], "abc"):
        with pytest.raises(StateError, match=r"name,? or None"):
            convlora.use_adapters(three, wrong).__enter__()
    with pytest.raises(StateError, match="There is no adapter 'z'"):
        convlora.use_adapters(three, ["a", {"a": 0.5, "z": 0.5}]).__enter__()
    for weights, message in (({}, "names no adapter"), ({"a": float("nan")}, "weight of a=nan; it must be a finite")):
        with pytest.raises(convlora.TargetError, match=message):
            convlora.use_adapters(three, [weights]).__enter__()
    with pytest.raises(StateError, match=r"block\.3 is trained in full in 'c' and changed in 'a'"):
        convlora.use_adapters(three, [{"a": 0.5, "c": 0.5}]).__enter__()
    with pytest.raises(StateError, match="carries no adapter"):
        convlora.use_adapters(SmallNet(), ["a"]).__enter__()
    with pytest.raises(convlora.UnsupportedLayerError, match="DataParallel"):
        convlora.use_adapters(nn.DataParallel(three), ["a"]).__enter__()


def test_merged_and_disabled_models_are_refused(three):
    with convlora.disable_adapter(three), pytest.raises(StateError, match="Adapters are disabled"):
        convlora.use_adapters(three, NAMES).__enter__()
    convlora.merge(three)
    with pytest.raises(StateError, match=r"merged; call convlora\.unmerge"):
        convlora.use_adapters(three, NAMES).__enter__()


def test_what_would_pull_the_ground_away_waits_for_the_end(three, batch, tmp_path):
    convlora.save_adapter(three, tmp_path, "a")
    expected = alone(three, batch, NAMES)
    calls = [
        lambda: convlora.merge(three),
        lambda: convlora.remove(three),
        lambda: convlora.delete_adapter(three, "a"),
        lambda: convlora.add_adapter(three, "d"),
        lambda: convlora.load_adapter(three, tmp_path, "d"),
        lambda: convlora.disable_adapter(three).__enter__(),
    ]
    with convlora.use_adapters(three, NAMES):
        for call in calls:
            with pytest.raises(StateError, match="A use_adapters block is open"):
                call()
        with torch.no_grad():
            torch.testing.assert_close(three(batch), expected, **CLOSE)
    for call in calls[2:5]:
        call() if call is not calls[3] else None


def test_a_batch_of_another_size_names_both_numbers(three, batch):
    for names in (NAMES, ["a"] * 8):
        with (
            convlora.use_adapters(three, names),
            pytest.raises(StateError, match="the model got 5 samples, and use_adapters has 8 names"),
        ):
            three(batch[:5])
    with (
        convlora.use_adapters(three, NAMES),
        pytest.raises(StateError, match="stem got 3 samples, and use_adapters has 8 names"),
    ):
        three.stem(batch[:3])


def test_train_mode_is_refused(three, batch):
    statistics = three.bn1.running_mean.clone()
    with convlora.use_adapters(three, NAMES):
        with pytest.raises(StateError, match=r"the model is in train mode.*call model\.eval\(\)"):
            three.train()(batch)
        three.eval().bn1.train()
        with pytest.raises(StateError, match="bn1 is in train mode"):
            three(batch)
    assert torch.equal(three.bn1.running_mean, statistics)


class Folds(nn.Module):
    """Layers that cannot be routed, each in a way of its own."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        if self.how == "windows":
            x = x.unflatten(2, (2, -1)).movedim(2, 1).flatten(0, 1)
            return self.fc(self.conv(x).mean((2, 3))).unflatten(0, (-1, 2))
        if self.how == "conv":
            return self.fc(nn.functional.conv2d(x, self.conv.weight).mean((2, 3)))
        return nn.functional.linear(self.conv(x).mean((2, 3)), self.fc.weight)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("windows", "conv got 8 samples, and use_adapters has 4 names"),
        ("conv", "conv: its weight is read outside its own forward"),
        ("head", "fc: its weight is read outside its own forward"),
    ],
)
def test_what_cannot_be_routed_is_named(how, message, images):
    net = convlora.inject(Folds(how), 2, adapter_name="a")
    convlora.add_adapter(net, "b", 2)
    fill(net, images, "ab")
    with convlora.use_adapters(net, ["a", "b", "a", None]), pytest.raises(StateError, match=message):
        net(images)
    torch.testing.assert_close(  # where all go one way there is nothing to route
        routed(net, images, ["a"] * 4), alone(net, images, ["a"] * 4), **CLOSE
    )


class Attends(nn.Module):
    """A head that reads another's weight, and a root with a buffer that training moves."""

    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 8, 3, 2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            self.mean += 0.1 * x.detach().mean((0, 2, 3))[:, None, None]
        x = (x - self.mean).flatten(2).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def test_modules_that_read_their_childrens_weights_and_buffers_of_any_kind(images):
    net = convlora.inject(Attends(), 2, adapter_name="a", modules_to_save="attention")
    convlora.add_adapter(net, "b", 2, modules_to_save="attention")
    fill(net, images, "ab")
    names = ["b", "a", None, "b"]
    assert not torch.equal(
        *(place.of("a") for place in net._convlora.places if place.name == "mean"), torch.zeros(8, 1, 1)
    )
    torch.testing.assert_close(routed(net, images, names), alone(net, images, names), **CLOSE)


def test_compiled_models_are_routed_too(three, batch):
    """By the inner model's block; the graph breaks where routes are looked up."""
    expected = alone(three, batch, NAMES)
    convlora.set_adapter(three, "a")
    compiled = torch.compile(three, backend="eager")
    with torch.no_grad():
        before = compiled(batch)
        with convlora.use_adapters(three, NAMES):
            torch.testing.assert_close(compiled(batch), expected, **CLOSE)
        torch.testing.assert_close(compiled(batch), before, **CLOSE)


@pytest.mark.parametrize("wins", [True, False])
def test_variants_are_routed_like_plain_adapters(net, images, batch, wins, monkeypatch):
    """DoRA is no branch beside the base, and PiSSA's change has twice its factors' rank."""
    monkeypatch.setattr("convlora._layer.routed.branch_wins", lambda *_: wins)
    convlora.inject(net, 4, adapter_name="a", use_dora=True, target_modules=(nn.Conv2d, "hidden"))
    convlora.add_adapter(net, "b", 2, init="pissa", target_modules=(nn.Conv2d, "hidden"))
    convlora.add_adapter(net, "c", 3, norm="track")
    fill(net, images, "abc")
    for names in (NAMES, ["b", "c", None, "b", "b", "c", "c", None], [BOTH, "c", {"c": 0.5, "a": 0.5}, HALF] * 2):
        torch.testing.assert_close(routed(net, batch, names), alone(net, batch, names), **CLOSE)


def test_a_compiled_part_is_routed_too(three, batch):
    compiled = torch.compile(three.block, backend="eager")
    x = torch.randn(4, 16, 8, 8)
    names = ["a", "b", None, "c"]
    expected = alone(three, x, names, three.block)
    convlora.set_adapter(three, "a")
    with torch.no_grad():
        before = compiled(x)
        with convlora.use_adapters(three, names):
            torch.testing.assert_close(compiled(x), expected, **CLOSE)
        torch.testing.assert_close(compiled(x), before, **CLOSE)
