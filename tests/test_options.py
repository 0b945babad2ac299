"""Each option of ``inject`` is spelled once: whoever takes it agrees with ``Request`` in name and default."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import need
from torch import nn

import convlora
from convlora._model.options import Options, Request

PROJECT = Path(convlora.__file__).parents[1]
DEFAULTS = {each.name: each.default for each in fields(Request)}
IN_PYTHON_ALONE = {
    "init_data": "batches",
    "importance": "scores",
    "example": "tensors",
    "adapter_name": "nothing is saved under it",
}
"""Options that the command line leaves out, and why."""


def network():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3))


@pytest.mark.parametrize("function", [convlora.inject, convlora.plan])
def test_signature_has_every_option_with_its_default(function):
    parameters = dict(inspect.signature(function).parameters)
    assert parameters.pop("model").default is inspect.Parameter.empty
    assert {name: each.default for name, each in parameters.items()} == DEFAULTS


@pytest.mark.parametrize("function", [convlora.inject, convlora.plan])
def test_signature_has_every_option_with_its_type(function):
    annotations = {name: each.annotation for name, each in inspect.signature(function).parameters.items()}
    del annotations["model"]
    assert annotations == {each.name: each.type for each in fields(Request)}


def test_typed_keywords_are_the_options_besides_rank_and_name():
    types = get_type_hints(Request)
    assert get_type_hints(Options) == {name: types[name] for name in DEFAULTS if name not in ("rank", "adapter_name")}


def test_command_line_has_every_option_with_its_default():
    need("typer")
    from convlora.command.options import Adapting

    names = [each.name for each in fields(Adapting)]
    assert sorted([*names, *IN_PYTHON_ALONE]) == sorted(DEFAULTS)
    assert Adapting().arguments() == {name: DEFAULTS[name] for name in names}
    for name in ("norm", "init", "training_path"):
        assert get_type_hints(Adapting)[name] == get_type_hints(Request)[name]


def test_docs_name_every_option():
    explained = re.findall(r"^        (\w+):", inspect.getdoc(convlora.inject).replace("\n    ", "\n        "), re.M)
    assert {*explained} - {"model", "TargetError", "UnsupportedLayerError", "StateError"} == {*DEFAULTS}
    page = (PROJECT / "docs" / "reference" / "index.md").read_text("utf-8")
    row = next(line for line in page.splitlines() if "| `inject(model, " in line)
    assert {*re.findall(r"`(\w+)`", row), "rank"} == {*DEFAULTS}


VALUES = {
    "rank": 2,
    "alpha": 3.0,
    "target_modules": "1",
    "exclude_modules": "1",
    "rank_pattern": {"0": 1},
    "alpha_pattern": {"0": 1.5},
    "modules_to_save": "1",
    "norm": "track",
    "dropout": 0.25,
    "use_rslora": True,
    "use_dora": True,
    "freeze_A": True,
    "method": "dense",
    "method_pattern": {"0": "dense"},
    "method_options": None,  # of methods that have some
    "init": "gaussian",
    "init_data": None,  # read by init="eva" alone
    "budget": 100,
    "importance": {"0": 2.0, "1": 1.0},
    "example": torch.zeros(1, 3, 8, 8),
    "training_path": "branch",
    "mask_activations": "bits",
    "adapter_name": "other",
}
"""A value of each option that is not its default."""


@pytest.mark.parametrize("option", DEFAULTS)
def test_option_does_the_same_whoever_takes_it(option):
    value = {option: VALUES[option]}
    if option == "importance":
        value["budget"] = 100
    plan = convlora.plan(network(), **value)
    injected = convlora.summary(convlora.inject(network(), **value))
    assert injected.trained_now == plan.trainable_parameters
    assert {**vars(injected), "state": "planned", "trained_now": None} == vars(plan)
    assert option in ("init_data", "method_options") or vars(plan) != vars(convlora.plan(network()))
    name = value.pop("adapter_name", "added")
    added = convlora.summary(convlora.add_adapter(convlora.inject(network()), name, **value), name)
    assert {**vars(added), "state": "planned", "adapter_name": plan.adapter_name} == vars(plan)


@pytest.mark.parametrize(
    "wrong", [{"use_rslora": 1}, {"mask_activations": "bit"}, {"use_dora": "no"}, {"norm": "melt"}, {"budget": -1}]
)
def test_wrong_value_is_refused_by_all_in_the_same_words(wrong):
    said = []
    plain, injected = network(), convlora.inject(network())
    for call in (convlora.inject, convlora.plan, lambda _, **options: convlora.add_adapter(injected, "b", **options)):
        with pytest.raises(convlora.TargetError, match=next(iter(wrong))) as error:
            call(plain, **wrong)
        said.append(str(error.value))
    assert len(set(said)) == 1


def test_unknown_name_is_pythons_own_error_of_that_function():
    injected = convlora.inject(network())
    for name, call in {
        "inject": lambda: convlora.inject(network(), ranks=4),
        "plan": lambda: convlora.plan(network(), ranks=4),
        "add_adapter": lambda: convlora.add_adapter(injected, "b", ranks=4),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'ranks'"):
            call()


def test_callback_refuses_options_where_it_is_made():
    need("lightning")
    from convlora.lightning import AdapterCallback

    with pytest.raises(TypeError, match=r"AdapterCallback\(\) got an unexpected keyword argument 'ranks'"):
        AdapterCallback(ranks=4)
    with pytest.raises(convlora.TargetError, match="norm='melt'"):
        AdapterCallback(norm="melt")
