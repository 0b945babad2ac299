"""Several adapters on one base: switching brings all that is the adapter's, and leaves all others' bits alone."""

import copy
import pickle

import pytest
import torch
from conftest import SmallNet, need, randomise, snapshot
from laws import given, st
from torch import nn

import convlora
from convlora import StateError


def bits(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".convlora." not in f".{key}"}


def outputs(model, images):
    """What the model predicts in eval mode, the mode kept."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(images)
    model.train(training)
    return y


@pytest.fixture(params=["freeze", "track"])
def norm(request):
    return request.param


@pytest.fixture
def two(net, images, train, norm):
    """A base with two trained adapters of different rank, targets, head and norms, and what each predicts."""
    base = copy.deepcopy(net)
    convlora.inject(net, norm=norm, adapter_name="a")
    convlora.add_adapter(net, "b", 2, target_modules="block.*", modules_to_save=["fc", "hidden"], norm="track")
    train(net, images)
    first = outputs(net, images)
    convlora.set_adapter(net, "b")
    train(net, images)
    return net, base, {"a": first, "b": outputs(net, images)}


@pytest.mark.thorough
def test_resnet18_reload_disable_and_a_second_adapter(tmp_path, train):
    """Trained in train mode with moving statistics, as the report did; every comparison is of bits."""
    timm = need("timm")
    torch.manual_seed(0)
    base, images = timm.create_model("resnet18", num_classes=2), torch.randn(8, 3, 64, 64)
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    convlora.inject(model, norm="track")
    train(model, images, steps=5, lr=1e-3)
    expected, of_base = outputs(model, images), outputs(base, images)
    assert not torch.equal(expected, of_base)

    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(fresh, tmp_path)
    assert torch.equal(outputs(fresh, images), expected)
    with convlora.disable_adapter(model):
        assert torch.equal(outputs(model, images), of_base)
        model.train()(images)  # not even training-mode forwards move the base
        assert torch.equal(outputs(model, images), of_base)
    assert torch.equal(outputs(model, images), expected)

    convlora.add_adapter(model, "second", 4, norm="track")
    convlora.set_adapter(model, "second")
    assert torch.equal(outputs(model, images), of_base)
    train(model, images, steps=5, lr=1e-3)
    assert not torch.equal(outputs(model, images), of_base)
    convlora.set_adapter(model, "default")
    assert torch.equal(outputs(model, images), expected)
    convlora.remove(model)
    assert torch.equal(outputs(model, images), of_base)


def test_each_adapter_predicts_the_same_whenever_it_is_active(two, images):
    net, base, expected = two
    for name in ("a", "b", "b", "a"):
        convlora.set_adapter(net, name)
        assert torch.equal(outputs(net, images), expected[name])
        with convlora.disable_adapter(net):
            assert torch.equal(outputs(net, images), outputs(base, images))
            with convlora.disable_adapter(net):
                pass
            assert torch.equal(outputs(net, images), outputs(base, images))
        assert torch.equal(outputs(net, images), expected[name])


def test_training_one_leaves_the_others_and_the_base_as_they_were(two, images, train):
    net, base, expected = two
    train(net, images)
    net.train()(images)
    assert not torch.equal(outputs(net, images), expected["b"])
    convlora.set_adapter(net, "a")
    assert torch.equal(outputs(net, images), expected["a"])
    with convlora.disable_adapter(net):
        net.train()(images)
        assert torch.equal(outputs(net, images), outputs(base, images))


def test_remove_gives_the_base_back(two, images):
    net, base, _ = two
    convlora.remove(net)
    assert {k: t.tolist() for k, t in bits(net).items()} == {k: t.tolist() for k, t in bits(base).items()}
    assert all(p.requires_grad for p in net.parameters())
    assert [type(m) for m in net.modules()] == [type(m) for m in base.modules()]


def test_remove_gives_back_every_object_from_any_state(net, images, train, norm):
    before = snapshot(net)
    for last in ("a", "b", "disabled", "merged and back"):
        convlora.inject(net, norm=norm, adapter_name="a")
        convlora.add_adapter(net, "b", 2, norm="track", modules_to_save="hidden")
        train(net, images)
        convlora.set_adapter(net, "b" if last == "b" else "a")
        if last == "merged and back":
            convlora.unmerge(convlora.merge(net))
        with convlora.disable_adapter(net):
            if last == "disabled":
                convlora.remove(net)
        if last != "disabled":
            convlora.remove(net)
        assert snapshot(net.train()) == before


def test_only_the_active_adapter_is_trainable(two):
    net, _, _ = two
    for name, count in (("a", None), ("b", None)):
        convlora.set_adapter(net, name)
        plan = convlora.summary(net)
        assert plan.adapter_name == name
        count = sum(p.numel() for p in convlora.trainable_parameters(net))
        assert count == plan.trainable_parameters
        assert sum(p.numel() for p in convlora.adapter_parameters(net)) == plan.adapter_parameters
    assert convlora.summary(net, "a").adapter_name == "a"


def test_a_frozen_factor_stays_frozen_over_a_switch(two):
    net, _, _ = two
    factor = next(convlora.adapter_parameters(net))
    factor.requires_grad_(False)
    convlora.set_adapter(convlora.set_adapter(net, "a"), "b")
    assert next(convlora.adapter_parameters(net)) is factor and not factor.requires_grad


def test_each_is_saved_and_loads_alone_or_beside_the_other(two, images, tmp_path):
    net, base, expected = two
    for name in ("a", "b"):  # b is active
        convlora.save_adapter(net, tmp_path / name, name)
    assert torch.equal(outputs(net, images), expected["b"])
    for name in ("a", "b"):
        alone = convlora.load_adapter(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(outputs(alone, images), expected[name])
    both = convlora.load_adapter(copy.deepcopy(base), tmp_path / "b")
    randomise(both)
    both.train()(images)  # the first moves on; the second is loaded onto the base all the same
    convlora.load_adapter(both, tmp_path / "a")
    assert convlora.summary(both).adapter_name == "b"
    convlora.set_adapter(both, "a")
    assert torch.equal(outputs(both, images), expected["a"])
    convlora.load_adapter(both, tmp_path / "a", adapter_name="a again")
    convlora.set_adapter(both, "a again")
    assert torch.equal(outputs(both, images), expected["a"])


def test_a_load_that_fails_leaves_the_adapters_there_are(two, images, tmp_path):
    net, _, expected = two
    other = convlora.inject(SmallNet(num_classes=7), adapter_name="c")
    randomise(other)
    convlora.save_adapter(other, tmp_path)
    with pytest.raises(convlora.CheckpointError, match="made for another base"):
        convlora.load_adapter(net, tmp_path)
    with pytest.raises(StateError, match="There is no adapter 'c'; there is 'a', 'b'"):
        convlora.set_adapter(net, "c")
    assert torch.equal(outputs(net, images), expected["b"])


def test_merge_folds_the_active_adapter(two, images):
    net, _, expected = two
    for name in ("a", "b"):
        convlora.set_adapter(net, name)
        convlora.merge(net)
        torch.testing.assert_close(outputs(net, images), expected[name], rtol=1e-5, atol=1e-6)
        assert type(net.stem) is type(net.block[0]) is nn.Conv2d
        convlora.unmerge(net)
    convlora.set_adapter(net, "a")
    assert torch.equal(outputs(net, images), expected["a"])


def test_switching_is_refused_while_merged_or_disabled(two, images):
    net, _, expected = two
    convlora.merge(net)
    for call in (
        lambda: convlora.set_adapter(net, "a"),
        lambda: convlora.add_adapter(net, "c"),
        lambda: convlora.delete_adapter(net, "a"),
        lambda: convlora.disable_adapter(net).__enter__(),
    ):
        with pytest.raises(StateError, match=r"merged; call convlora\.unmerge\(model\) first"):
            call()
    convlora.unmerge(net)
    with convlora.disable_adapter(net):
        for call in (lambda: convlora.set_adapter(net, "a"), lambda: convlora.merge(net)):
            with pytest.raises(StateError, match="disabled"):
                call()
    assert torch.equal(outputs(net, images), expected["b"])


def test_an_adapter_that_comes_inside_a_disabled_block_waits_for_its_end(two, images, tmp_path):
    net, base, expected = two
    convlora.save_adapter(net, tmp_path)
    of_base = outputs(base, images)
    with convlora.disable_adapter(net):
        convlora.add_adapter(net, "c", 2, norm="track")
        assert torch.equal(outputs(net, images), of_base)
        convlora.load_adapter(net, tmp_path, "d")
        net.train()(images)
        assert torch.equal(outputs(net, images), of_base)
    assert torch.equal(outputs(net, images), expected["b"])
    for name, predicted in (("c", of_base), ("d", expected["b"]), ("a", expected["a"])):
        convlora.set_adapter(net, name)
        assert torch.equal(outputs(net, images), predicted)
    assert torch.equal(outputs(convlora.remove(net), images), of_base)


def test_blocks_that_overlap_disable_until_the_last_is_left(two, images):
    net, base, expected = two
    first, second = convlora.disable_adapter(net), convlora.disable_adapter(net)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(outputs(net, images), outputs(base, images))
    second.__exit__(None, None, None)
    assert torch.equal(outputs(net, images), expected["b"])


def test_a_copy_made_inside_a_disabled_block_can_be_enabled(two, images):
    net, base, expected = two
    with convlora.disable_adapter(net):
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for twin in twins:
        assert torch.equal(outputs(twin, images), outputs(base, images))
        with convlora.disable_adapter(twin):
            pass
        assert torch.equal(outputs(twin, images), outputs(base, images))
        with pytest.raises(StateError, match=r"copy was made inside .*convlora\.set_adapter\(model, 'b'\)"):
            convlora.merge(twin)
        convlora.set_adapter(twin, "b")
        assert torch.equal(outputs(twin, images), expected["b"])


class Tied(nn.Module):
    """Two heads of one weight, and two norms of one buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(8, 2)
        self.second.weight = self.fc.weight
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.norms[1].running_mean = self.norms[0].running_mean

    def forward(self, x):
        x = self.conv(x)
        x = (self.norms[0](x) + self.norms[1](x)).mean((2, 3))
        return self.fc(x) + self.second(x)


def test_tensors_that_are_tied_in_one_adapter_alone(images, train, tmp_path):
    torch.manual_seed(0)
    net = Tied()
    base = copy.deepcopy(net)
    convlora.inject(net, 2, modules_to_save=["fc", "second"], adapter_name="tied")
    convlora.add_adapter(net, "loose", 2, modules_to_save="fc")
    expected = {}
    for name in ("tied", "loose"):
        convlora.set_adapter(net, name)
        train(net, images)
        expected[name] = outputs(net, images)
    with convlora.disable_adapter(net):
        assert net.norms[0].running_mean is net.norms[1].running_mean
    for name in ("tied", "loose"):  # the first waits
        convlora.save_adapter(net, tmp_path / name, name)
        fresh = copy.deepcopy(base)
        convlora.load_adapter(fresh, tmp_path / name)
        assert torch.equal(outputs(fresh, images), expected[name])
    both = copy.deepcopy(base)
    for name in ("tied", "loose"):
        convlora.load_adapter(both, tmp_path / name)
    for name in ("loose", "tied"):
        convlora.set_adapter(both, name)
        assert torch.equal(outputs(both, images), expected[name])
    assert torch.equal(outputs(convlora.remove(both), images), outputs(base, images))


def test_one_adapter_trains_in_full_what_another_adapts(net, images, train, tmp_path):
    base = copy.deepcopy(net)
    convlora.inject(net, 2, target_modules=(nn.Conv2d, nn.Linear), modules_to_save=None, adapter_name="adapts")
    convlora.add_adapter(net, "trains", 2, target_modules="stem", modules_to_save=["block.3", "fc"])
    alone = convlora.plan(base, 2, target_modules="stem", modules_to_save=["block.3", "fc"])
    assert convlora.summary(net, "trains").saved_parameters == alone.saved_parameters
    expected = {}
    for name in ("adapts", "trains"):
        convlora.set_adapter(net, name)
        train(net, images)
        expected[name] = outputs(net, images)
    for name in expected:
        convlora.save_adapter(net, tmp_path / name, name)
        fresh = copy.deepcopy(base)
        convlora.load_adapter(fresh, tmp_path / name)
        assert torch.equal(outputs(fresh, images), expected[name])
    for order in (["adapts", "trains"], ["trains", "adapts"]):
        both = copy.deepcopy(base)
        for name in order:
            convlora.load_adapter(both, tmp_path / name)
        for name in order:
            convlora.set_adapter(both, name)
            assert torch.equal(outputs(both, images), expected[name])
        assert torch.equal(outputs(convlora.remove(both), images), outputs(base, images))


class Lazy(nn.Module):
    """A buffer that training makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", None)

    def forward(self, x):
        x = self.conv(x)
        if self.training:
            self.mean = x.detach().mean((0, 2, 3), keepdim=True)
        return x if self.mean is None else x - self.mean


def test_a_buffer_that_training_makes(images, train, tmp_path):
    net = Lazy()
    base = copy.deepcopy(net)
    convlora.inject(net, 2, modules_to_save=None)
    convlora.add_adapter(net, "other", 2, modules_to_save=None)
    train(net, images)
    expected = outputs(net, images)
    convlora.save_adapter(net, tmp_path)
    for fresh in (copy.deepcopy(base), convlora.inject(copy.deepcopy(base), modules_to_save=None, adapter_name="own")):
        convlora.load_adapter(fresh, tmp_path)
        convlora.set_adapter(fresh, "default")
        assert torch.equal(outputs(fresh, images), expected)
        assert convlora.remove(fresh).mean is None
    with convlora.disable_adapter(net):
        net.train()(images)
        assert torch.equal(outputs(net, images), base.conv(images) - net.mean)  # a mean of the block's own
    convlora.set_adapter(net, "other")
    assert net.mean is None and torch.equal(outputs(net, images), outputs(base, images))
    convlora.save_adapter(net, tmp_path / "waiting", "default")
    fresh = convlora.load_adapter(copy.deepcopy(base), tmp_path / "waiting")
    assert torch.equal(outputs(fresh, images), expected)
    assert convlora.remove(net).mean is None


def test_deleted_adapters_leave_no_trace(two, images, norm):
    net, base, expected = two
    with pytest.raises(StateError, match="'b' is active; call"):
        convlora.delete_adapter(net, "b")
    convlora.delete_adapter(net, "a")
    assert not any(".a." in key for key in net.state_dict()) and torch.equal(outputs(net, images), expected["b"])
    assert type(net.stem) is nn.Conv2d  # which b does not adapt
    convlora.add_adapter(net, "a", 3)
    convlora.set_adapter(net, "a")
    assert torch.equal(outputs(net, images), outputs(base, images))
    convlora.remove(net)
    assert torch.equal(outputs(net, images), outputs(base, images))


def test_a_second_adapter_of_one_name_is_refused_and_so_is_none_to_add_to(two):
    net, base, _ = two
    with pytest.raises(StateError, match="There is an adapter 'a' already"):
        convlora.add_adapter(net, "a")
    with pytest.raises(StateError, match=r"carries no adapter\. Call convlora\.inject"):
        convlora.add_adapter(base, "a")
    with pytest.raises(TypeError, match="ranc"):
        convlora.add_adapter(net, "c", ranc=3)


def test_an_adapter_that_cannot_be_added_changes_nothing(two, images):
    net, _, expected = two
    keys = list(net.state_dict())
    with pytest.raises(convlora.TargetError, match="layer9"):
        convlora.add_adapter(net, "c", target_modules="layer9.*")
    assert list(net.state_dict()) == keys and torch.equal(outputs(net, images), expected["b"])


def test_copies_and_pickles_switch_on_their_own(two, images):
    net, base, expected = two
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        convlora.set_adapter(twin, "a")
        assert torch.equal(outputs(twin, images), expected["a"])
        assert torch.equal(outputs(net, images), expected["b"])
        convlora.remove(twin)
        assert torch.equal(outputs(twin, images), outputs(base, images))


def test_what_waits_follows_the_model_to_another_dtype(two, images):
    net, base, expected = two
    convlora.set_adapter(net, "a")
    net.eval()(images).sum().backward()
    convlora.set_adapter(net, "b")
    convlora.set_adapter(net.double(), "a")
    assert all(p.grad.dtype == torch.float64 for p in net.fc.parameters())
    assert all(t.dtype in (torch.float64, torch.int64) for t in (*net.parameters(), *net.buffers()))
    torch.testing.assert_close(outputs(net, images.double()).float(), expected["a"], rtol=1e-4, atol=1e-5)
    with convlora.disable_adapter(net):
        torch.testing.assert_close(outputs(net, images.double()).float(), outputs(base, images), rtol=1e-4, atol=1e-5)


STEPS = ["train a", "train b", "set a", "set b", "merge", "disable", "move", "save", "delete and add b"]


@given(steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=8))
def test_any_walk_leaves_the_base_and_the_idle_adapters_alone(steps, tmp_path_factory):
    torch.manual_seed(0)
    net, images = SmallNet(), torch.randn(4, 3, 8, 8)
    of_base = outputs(net, images)
    convlora.inject(net, 2, norm="track", adapter_name="a")
    convlora.add_adapter(net, "b", 3, norm="freeze", modules_to_save=None)
    expected = {"a": of_base, "b": of_base}
    for step in steps:
        active = convlora.summary(net).adapter_name
        if step.startswith(("train", "set")):
            convlora.set_adapter(net, active := step[-1])
        if step.startswith("train"):
            randomise(net, seed=len(steps))
            net.train()(images)
            expected[active] = outputs(net, images)
        elif step == "merge":
            torch.testing.assert_close(outputs(convlora.merge(net), images), expected[active], rtol=1e-4, atol=1e-5)
            convlora.unmerge(net)
        elif step == "disable":
            with convlora.disable_adapter(net):
                net.train()(images)
                assert torch.equal(outputs(net, images), of_base)
        elif step == "move":
            net.double().float()
        elif step == "save" and active == "a":
            convlora.save_adapter(net, tmp_path_factory.mktemp("walk"), "a") if expected["a"] is not of_base else None
        elif step == "delete and add b" and active == "a":
            convlora.delete_adapter(net, "b")
            convlora.add_adapter(net, "b", 1, norm="track")
            expected["b"] = of_base
        assert torch.equal(outputs(net, images), expected[convlora.summary(net).adapter_name])
    for name in ("a", "b"):
        convlora.set_adapter(net, name)
        assert torch.equal(outputs(net, images), expected[name])
    assert torch.equal(outputs(convlora.remove(net), images), of_base)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init": "pissa"}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_scaling_written_by_hand_is_saved_as_the_layer_computes(net, images, tmp_path, options, rank):
    base = copy.deepcopy(net)
    convlora.inject(net, rank, **options)
    randomise(net)
    layer = convlora.summary(net).layers[0].name
    net.get_submodule(layer).convlora["default"].scaling = 0.3
    expected = outputs(net, images)
    loaded = convlora.load_adapter(base, convlora.save_adapter(net, tmp_path))
    assert torch.equal(outputs(loaded, images), expected)
    plan = convlora.summary(net)
    assert plan.layers[0].scaling == pytest.approx(0.3, rel=1e-15)
    assert plan.layers == convlora.summary(loaded).layers


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan")])
def test_a_scaling_that_no_file_holds_is_refused_before_anything_is_written(net, tmp_path, scaling):
    convlora.inject(net, 2)
    layer = convlora.summary(net).layers[0].name
    net.get_submodule(layer).convlora["default"].scaling = scaling
    with pytest.raises(convlora.TargetError, match=f"scaling of {layer} was changed"):
        convlora.save_adapter(net, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
