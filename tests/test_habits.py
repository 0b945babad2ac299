"""What users of other libraries write by habit, and what they are told."""

import copy
import re
import warnings
from html import escape
from pathlib import Path

import pytest
import torch
from conftest import SmallNet, randomise, snapshot
from habits import HABITS, WARNS, WORKS, page
from torch import nn

import convlora
from convlora import CheckpointError, StateError, TargetError

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


class Stages(nn.Module):
    """As in a ResNet, several layers end in one name, and the head is no ``head``."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        block = {"conv1": nn.Conv2d(8, 8, 3), "conv2": nn.Conv2d(8, 8, 3)}
        self.stage = nn.Sequential(nn.ModuleDict(block), nn.ModuleDict(copy.deepcopy(block)))
        self.fc = nn.Linear(8, 2)


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_name_that_other_layers_end_in_is_noted_in_plan_summary_and_file(argument, tmp_path):
    given = {"conv1": 2} if argument == "rank_pattern" else ["conv1"]
    net = convlora.inject(Stages(), 2, **{argument: given})
    note = f"note: {argument}='conv1' names one layer; add '*.conv1' for 2 more whose names end in it"
    assert (
        str(convlora.summary(net)).endswith(note)
        and escape(note) in convlora.plan(Stages(), **{argument: given})._repr_html_()
    )
    randomise(net)
    convlora.save_adapter(net, tmp_path)
    assert note in str(convlora.summary(convlora.load_adapter(convlora.remove(net), tmp_path)))
    both = {**given, "*.conv1": 2} if argument == "rank_pattern" else ["conv1", "*.conv1"]
    assert convlora.plan(Stages(), **{argument: both}).notes == ()


@pytest.mark.parametrize("targets", ["conv2", ["conv1", "conv2"]])
def test_the_end_of_a_name_is_answered_with_the_pattern_for_it(targets):
    with pytest.raises(TargetError, match=r"for all that end in 'conv2' \(2\) write '\*\.conv2'"):
        convlora.plan(Stages(), target_modules=targets)


def test_a_head_of_another_name_is_named():
    with pytest.raises(TargetError, match=r"'head' matches no .* The head is 'fc'\.\n"):
        convlora.plan(Stages(), modules_to_save=["head"])
    with pytest.raises(TargetError, match=r"The head is 'fc'\. Closest names: stage"):
        convlora.plan(Stages(), modules_to_save=["stag"])


def test_a_transformer_whose_linear_layers_stay_frozen_is_told():
    blocks = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)]
    transformer = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), *blocks, nn.Linear(8, 2))
    with pytest.warns(
        UserWarning, match=r"1 here, and 4 linear layers with 512 .*target_modules=\[nn.Conv2d, nn.Linear"
    ):
        convlora.plan(transformer, modules_to_save="4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convlora.plan(transformer, modules_to_save="4", target_modules=nn.Conv2d)
        convlora.plan(transformer, modules_to_save="4", target_modules=[nn.Conv2d, nn.Linear])
        convlora.plan(transformer, modules_to_save="4", exclude_modules=["2.*", "3.*"])


@pytest.mark.parametrize("name", convlora.THEIRS)
def test_another_library_s_name_is_answered_with_the_call_here(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'. Write "):
        getattr(convlora, name)
    calls = re.findall(r"convlora\.(\w+)", convlora.THEIRS[name])
    assert set(calls) <= set(convlora.__all__)


def test_every_public_name_is_given_and_no_other():
    assert set(convlora.__all__) <= set(dir(convlora)) and all(hasattr(convlora, name) for name in convlora.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'\.$"):
        _ = convlora.nothing


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
    with pytest.raises(CheckpointError, match=r"is a file's name.*such as '.*x'"):
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


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """The network that the table's calls are made on."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3)))

    def reset_classifier(self, classes):
        self.fc = nn.Linear(8, classes)


def run(code, names):
    """Run one row's code in these variables; give back the name of what happened, and what was said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            exec(code, names)
        except Exception as error:
            return type(error).__name__, str(error)
    ours = [str(each.message) for each in told]
    return (WARNS, "\n".join(ours)) if ours else (WORKS, "")


@pytest.fixture
def variables(tmp_path, monkeypatch):
    """Makes the variables that the page's head names, each time anew, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(code):
        torch.manual_seed(0)
        net = Net()
        model = convlora.inject(copy.deepcopy(net), 2)
        randomise(model)
        if '"adapter"' in code:
            convlora.save_adapter(model, "adapter")
        names = {"convlora": convlora, "torch": torch, "nn": nn, "copy": copy, "re": re, "Net": Net}
        return {**names, "net": net, "model": model, "images": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}

    return make


ROWS = [habit for habits in HABITS.values() for habit in habits]


@pytest.mark.parametrize("habit", ROWS, ids=[habit.call for habit in ROWS])
def test_a_call_by_habit_does_and_says_what_the_table_has(habit, variables):
    names = variables(habit.call)
    happened, said = run(habit.call, names)
    assert happened == habit.happens, said
    if happened == WORKS:
        assert eval(habit.says, names) is True
    else:
        assert habit.says in said
    assert run(habit.write, variables(habit.write)) == (WORKS, "")


def test_the_table_s_calls_differ_and_the_page_of_habits_is_the_table():
    assert len({habit.call for habit in ROWS}) == len(ROWS) >= 100
    written = Path(convlora.__file__).parent.parent / "docs" / "habits.md"
    assert written.read_text(encoding="utf-8") == page(), "write it anew: python tests/habits.py > docs/habits.md"
