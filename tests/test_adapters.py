"""Several adapters on one base: switching brings all that is the adapter's, and leaves all others' bits alone."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from conftest import SmallNet, randomise, snapshot
from hypothesis import given
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


def test_resnet18_reload_disable_and_a_second_adapter(tmp_path, train):
    """Trained in train mode with moving statistics, as the report did; every comparison is of bits."""
    timm = pytest.importorskip("timm")
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


def test_deleted_adapters_leave_no_trace(two, images, norm):
    net, base, expected = two
    with pytest.raises(StateError, match="'b' is the active adapter; set_adapter another first"):
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
    convlora.set_adapter(net.double(), "a")
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
