"""What users of other libraries write by habit, and what they are told."""

import warnings

import pytest
import torch
from conftest import SmallNet, randomise, snapshot
from torch import nn

import convlora
from convlora import CheckpointError, StateError

IMAGES = torch.zeros(2, 3, 8, 8)


def injected(**options):
    return convlora.inject(SmallNet(), 2, **options)


WORDS = {
    "r": "Its name here is rank.",
    "lora_alpha": "Its name here is alpha.",
    "lora_dropout": "Its name here is dropout.",
    "init_lora_weights": "Its name here is init.",
    "bias": "Leave it out: biases are frozen",
    "task_type": "Leave it out.",
    "lr": "convlora.parameter_groups",
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    "call", [convlora.inject, convlora.plan, lambda net, **o: convlora.add_adapter(convlora.inject(net, 2), "b", **o)]
)
def test_another_library_s_argument_is_answered_with_the_name_here(call, word):
    with pytest.raises(TypeError, match=WORDS[word]):
        call(SmallNet(), **{word: 8})


def step(model, optimizer):
    model.train()(IMAGES).sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(each.message) for each in told]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_made_before_the_injection_is_told_at_its_first_step(make):
    net = SmallNet()
    optimizer = make(net.parameters(), lr=0.1)
    convlora.inject(net, 2)
    assert "made before convlora.inject" in step(net, optimizer)[0]
    assert step(net, optimizer) == []


def test_training_while_merged_is_told():
    net = convlora.merge(injected())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert "convlora.unmerge(model) before you train" in step(net, optimizer)[0]


@pytest.mark.parametrize(
    "parameters", [convlora.trainable_parameters, nn.Module.parameters, lambda m: m.fc.parameters()]
)
def test_an_optimizer_that_has_something_that_is_trained_is_not_told(parameters):
    net = injected()
    assert step(net, torch.optim.SGD(parameters(net), lr=0.1)) == []


def test_another_model_s_optimizer_is_not_told():
    other, kept = SmallNet(), injected()
    assert step(other, torch.optim.SGD(other.parameters(), lr=0.1)) == [] and kept is not None
    removed = convlora.remove(injected())
    assert step(removed, torch.optim.SGD(removed.parameters(), lr=0.1)) == []


def test_loading_beside_an_adapter_of_the_same_name_says_both_ways_out(tmp_path):
    net = injected()
    randomise(net)
    convlora.save_adapter(net, tmp_path)
    with pytest.raises(StateError, match=r"adapter_name=.*convlora.remove\(model\) gives"):
        convlora.load_adapter(net, tmp_path)


@pytest.mark.parametrize("norm", ["freeze", "track"])
def test_an_adapter_without_its_head_goes_on_with_another_number_of_classes(tmp_path, norm):
    torch.manual_seed(0)
    base, other = SmallNet(3), SmallNet(5)
    other.load_state_dict({**other.state_dict(), **{k: v for k, v in base.state_dict().items() if "fc" not in k}})
    trained, head = convlora.inject(base, 2, norm=norm).train(), other.fc.weight.clone()
    randomise(trained)
    trained(torch.randn(4, 3, 16, 16))
    with torch.no_grad():
        trained.fc.weight.add_(1.0)
    convlora.save_adapter(trained, tmp_path)
    before = snapshot(other)
    with pytest.raises(
        CheckpointError, match=r"fc.weight: \(3, 12\) in the file, \(5, 12\) in the model(.|\n)*head=False"
    ):
        convlora.load_adapter(other, tmp_path)
    assert snapshot(other) == before
    convlora.load_adapter(other, tmp_path, head=False)
    assert torch.equal(other.fc.weight, head) and other.fc.weight.requires_grad
    images, features = torch.randn(2, 3, 16, 16), []
    for net in (trained.eval(), other.eval()):
        hook = net.hidden.register_forward_hook(lambda module, args, y: features.append(y))
        net(images)
        hook.remove()
    assert torch.equal(*features)
    expected = convlora.plan(SmallNet(5), 2, norm=norm)
    assert (convlora.summary(other).saved_parameters, convlora.summary(other).base_parameters) == (
        expected.saved_parameters,
        expected.base_parameters,
    )
    assert convlora.summary(other).skipped == expected.skipped
    convlora.save_adapter(other, tmp_path / "five")
    assert torch.equal(convlora.load_adapter(convlora.remove(other), tmp_path / "five").fc.weight, head)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_file_s_name_is_no_directory_to_save_to(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"is a file's name.*x', say"):
        convlora.save_adapter(injected(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    net = injected()
    randomise(net)
    convlora.save_adapter(net, tmp_path / name)


def test_a_plan_shows_as_its_table_in_a_console_and_in_a_notebook():
    plan = convlora.plan(SmallNet(), 2)
    assert repr(plan) == str(plan)
    shown = plan._repr_html_()
    assert shown.count("<tr>") == len(plan.layers) + len(plan.skipped) + 1
    assert "<td>block.0</td>" in shown and "trained in full: fc" in shown
