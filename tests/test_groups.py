"""``parameter_groups``: what an optimizer gets of an injected model, at which rate, and what of it decays."""

import copy
from itertools import pairwise

import pytest
import torch
from conftest import SmallNet
from torch import nn
from torch.optim import lr_scheduler

import convlora
from convlora import StateError, TargetError
from convlora._methods.registry import METHODS

RATE, DECAY = 1e-3, 0.1

WAYS = {
    "lora": {},
    "gaussian": {"init": "gaussian"},
    "eva": {"init": "eva"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dense": {"method": "dense"},
    "loha": {"method": "loha"},
    "loha, cores": {"method": "loha", "method_options": {"tucker": True}},
    "lokr": {"method": "lokr"},
    "lokr, whole": {"method": "lokr", "method_options": {"full": True}},
    "lokr, both": {"method": "lokr", "method_options": {"decompose_both": True, "factor": 2}},
    "lokr, core": {"method": "lokr", "method_options": {"tucker": True, "factor": 2}},
    "hira": {"method": "hira"},
    "ia3": {"method": "ia3"},
    "ssf": {"method": "ssf"},
    "oft": {"method": "oft"},
    "boft": {"method": "boft"},
    "hra": {"method": "hra"},
    "one layer another": {"method_pattern": {"stem": "loha"}},
}
WITH_B = {"lora", "gaussian", "eva", "dora", "rslora", "hira", "one layer another"}


def injected(images, way, **options):
    """A network whose layers are all large enough to have factors, two norms trained in full beside the head."""
    torch.manual_seed(0)
    data = {"init_data": [images]} if way == "eva" else {}
    norms = {"modules_to_save": ["fc", "bn1"]}
    return convlora.inject(SmallNet(), 4, exclude_modules="block.0", **norms, **data, **WAYS[way], **options)


def named(groups, net):
    """The names of each group's parameters."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}


@pytest.mark.parametrize("way", WAYS)
def test_each_trained_parameter_is_in_one_group_and_B_is_what_A_waits_for(way, images):
    """The oracle is a fresh adapter's gradient, zero for what waits until B moves, and a shape without the fan-in."""
    net = injected(images, way)
    groups = named(convlora.parameter_groups(net, lr=RATE), net)
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(name for name, p in net.named_parameters() if p.requires_grad)
    assert groups["head"] == ["fc.weight"]
    biases = {"fc.bias", "bn1.weight", "bn1.bias"} | ({"block.3.bias"} if way == "ssf" else set())
    assert set(groups["biases"]) == biases
    net(images).square().sum().backward()
    fast = set()
    for layer in ("stem", "block.3"):
        own = {n: p for n, p in net.named_parameters() if n.startswith(f"{layer}.convlora.")}
        moving = {name for name, p in own.items() if p.grad is not None and p.grad.any()}
        if moving < own.keys():
            fast |= {name for name in moving if not own[name].any() and own[name].shape[:2] == (16, 4)}
    assert set(groups.get("B", ())) == fast
    assert bool(fast) is (way in WITH_B)


def test_optimizers_take_the_groups_and_each_learns_and_decays_at_its_own_rate(images):
    net = injected(images, "dora")
    groups = convlora.parameter_groups(net, lr=RATE, weight_decay=DECAY)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("A", RATE, 0.0),
        ("B", 16 * RATE, 0.0),
        ("head", RATE, DECAY),
        ("biases", RATE, 0.0),
    ]
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    before = {p: p.detach().clone() for g in groups for p in g["params"]}
    optimizer = torch.optim.SGD(groups, lr=7.0)
    for parameter in before:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in before.items():
        rate, decay = rates[id(parameter)]
        expected = old.double() - rate * (1 + decay * old.double())
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-8)  # fp32's rounding of one step
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam):
        kind(convlora.parameter_groups(net, lr=RATE)).step()


def test_without_a_decay_the_optimizers_own_holds_for_the_head_alone(images):
    groups = convlora.parameter_groups(injected(images, "lora"), lr=RATE)
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        **{"A": 0.0, "B": 0.0, "biases": 0.0},
        "head": DECAY,
    }


def test_one_rate_for_all_trains_the_same_bits_as_one_group(images):
    trained = []
    for grouped in (True, False):
        net = injected(images, "lora")
        given = convlora.parameter_groups(net, lr=RATE, lr_B=RATE, weight_decay=0.0)
        optimizer = torch.optim.AdamW(
            given if grouped else convlora.trainable_parameters(net), lr=RATE, weight_decay=0.0
        )
        for _ in range(3):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
        trained.append(list(convlora.trainable_parameters(net)))
    assert all(map(torch.equal, *trained))


SCHEDULES = {
    "lambda": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 3, 1.0)),
    "steps": lambda o, _: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 8),
    "linear": lambda o, _: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "plateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "one cycle": lambda o, groups: lr_scheduler.OneCycleLR(o, [g["lr"] for g in groups], total_steps=8),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_schedule_changes_the_rates_and_keeps_their_ratio(name, images):
    groups = convlora.parameter_groups(injected(images, "lora"), lr=RATE)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = SCHEDULES[name](optimizer, groups)
    seen = []
    for _ in range(5):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["B"] == pytest.approx(16 * rates["A"], rel=1e-12)
        assert rates["A"] == rates["head"] == rates["biases"]
        seen.append(rates["A"])
        schedule.step(*([1.0] if name == "plateau" else []))
    assert any(first != second for first, second in pairwise(seen))


def test_a_training_goes_on_from_the_optimizers_state_with_the_same_rates(images):
    net = injected(images, "lora")
    optimizer = torch.optim.AdamW(convlora.parameter_groups(net, lr=RATE, lr_B=5 * RATE))
    state = copy.deepcopy(optimizer.state_dict())
    again = torch.optim.AdamW(convlora.parameter_groups(net, lr=1.0))
    again.load_state_dict(state)
    assert [(g["name"], g["lr"]) for g in again.param_groups][:2] == [("A", RATE), ("B", 5 * RATE)]


def test_a_constant_A_a_frozen_head_and_the_other_adapters_are_in_no_group(images):
    net = injected(images, "lora", freeze_A=True)
    net.fc.requires_grad_(False)
    convlora.add_adapter(net, "other", 2)
    convlora.set_adapter(net, "default")
    with pytest.warns(UserWarning, match=r"fc\.weight: its module is trained in full, but it is frozen"):
        groups = named(convlora.parameter_groups(net, lr=RATE), net)
    assert groups["B"] == [f"{layer}.convlora.default.lora_B" for layer in ("stem", "block.3")]
    assert "A" not in groups and not any("other" in name for names in groups.values() for name in names)


def test_a_method_of_ones_own_says_which_of_its_tensors_are_fast(monkeypatch):
    class Pair(convlora.Change):
        method, formula, fast = "pair", "W + a b", ("late",)

        @classmethod
        def shapes(cls, weight, rank, **options):
            return {"early": (1, *weight[1:]), "late": (weight[0], *[1] * (len(weight) - 1))}

        def begin(self):
            nn.init.ones_(self.early)

        def is_fresh(self):
            return not self.late.any()

        def changed(self, weight):
            return weight + self.late * self.early

    monkeypatch.delitem(METHODS, "pair", raising=False)
    convlora.register_method(Pair)
    net = convlora.inject(SmallNet(), method="pair")
    groups = named(convlora.parameter_groups(net, lr=RATE), net)
    assert {name.rpartition(".")[2] for name in groups["B"]} == {"late"}
    assert {name.rpartition(".")[2] for name in groups["A"]} == {"early"}


def test_scale_and_shift_of_any_norm_and_shape_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 6))
    convlora.inject(net, 2, target_modules="0", modules_to_save=["1", "2", "3"])
    groups = named(convlora.parameter_groups(net, lr=RATE), net)
    assert groups["head"] == ["3.weight"]
    assert groups["biases"] == ["1.weight", "1.bias", "2.weight", "2.bias", "3.bias"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lr": -1.0}, r"lr=-1\.0; it must be a finite number of at least 0"),
        ({"lr": "1e-3"}, r"lr='1e-3'; it must be"),
        ({"lr": RATE, "lr_B": float("nan")}, r"lr_B=nan; it must be"),
        ({"lr": RATE, "weight_decay": float("inf")}, r"weight_decay=inf; it must be"),
    ],
)
def test_a_rate_that_is_none_is_refused(given, message, images):
    with pytest.raises(TargetError, match=message):
        convlora.parameter_groups(injected(images, "lora"), **given)


def test_a_model_without_adapter_is_refused(net):
    with pytest.raises(StateError, match="carries no adapter"):
        convlora.parameter_groups(net, lr=RATE)


def test_pruned_and_parametrized_factors_are_in_the_group_of_what_they_are():
    from torch.nn.utils import parametrize, prune

    model = convlora.inject(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)), 2, modules_to_save=None)
    prune.l1_unstructured(model[0].convlora["default"], "lora_B", 0.2)
    parametrize.register_parametrization(model[1].convlora["default"], "lora_B", nn.Identity())
    groups = convlora.parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups] == [
        ("A", 2, 0),
        ("B", 2, 0),
    ]


def test_a_rate_whose_multiple_is_not_finite_is_refused():
    model = convlora.inject(nn.Sequential(nn.Conv2d(16, 16, 3)), 2, modules_to_save=None)
    with pytest.raises(TargetError, match="16 times it, for B, is no finite number"):
        convlora.parameter_groups(model, lr=1e308)
