"""Ranks under a budget: what the factors hold together, how it is shared out, and what a loss says about layers."""

import itertools
import math

import pytest
import torch
from conftest import SmallNet, convolutions, need, snapshot, thorough
from laws import given, st
from torch import nn
from torch.nn import functional as F

import convlora

IMPORTANCE = st.dictionaries(st.sampled_from("01"), st.floats(0, 1e6), min_size=2, max_size=2)


def two_layers(geometry):
    conv, _ = geometry.build()
    return nn.Sequential(conv, nn.Conv2d(24, 32, 3))


def most(layer, use_dora):
    """The largest rank at which factors and magnitudes hold no more than the weight: by counting."""
    rows, columns = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
    besides = rows if use_dora else 0
    return max(r for r in range(min(rows, columns) + 1) if r * (rows + columns) + besides * (r > 0) <= rows * columns)


@given(
    geometry=convolutions(),
    budget=st.integers(280, 8000),
    use_dora=st.booleans(),
    importance=st.none() | IMPORTANCE,
    rank=st.none() | st.integers(1, 20),
)
def test_the_budget_is_kept_and_no_rank_more_fits(geometry, budget, use_dora, importance, rank):
    model = two_layers(geometry)
    options = {"budget": budget, "importance": importance, "use_dora": use_dora, "modules_to_save": None}
    plan = convlora.plan(model, rank, **options)
    held = 0
    for layer in plan.layers:
        rows, columns = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
        held += layer.rank * (rows + columns) + (rows if use_dora else 0)
    assert held == plan.adapter_parameters <= budget
    for layer in (*plan.layers, *plan.skipped):
        cap = min(most(layer, use_dora), rank or math.inf)
        rows, columns = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
        one_more = rows + columns + (rows if use_dora and not layer.rank else 0)
        assert layer.rank == cap or (layer.rank < cap and held + one_more > budget)
    assert convlora.plan(model, rank, **options) == plan


@given(geometry=convolutions(), budget=st.integers(280, 8000))
def test_inject_holds_what_the_plan_says(geometry, budget):
    model = two_layers(geometry)
    plan = convlora.plan(model, budget=budget, modules_to_save=None)
    convlora.inject(model, budget=budget, modules_to_save=None)
    assert sum(p.numel() for p in convlora.adapter_parameters(model)) == plan.adapter_parameters <= budget
    assert all(layer.scaling == pytest.approx(2.0) for layer in plan.layers)  # a step is a step at every rank


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "nf_resnet26"])
@pytest.mark.parametrize("share", [*map(thorough, (0.002, 0.1)), 0.01])
def test_real_networks_come_as_near_as_the_ranks_allow(name, share):
    timm = need("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2)
    plan = convlora.plan(model, budget=share)
    budget = int(share * sum(p.numel() for p in model.parameters()))
    step = min(p.weight_shape[0] + math.prod(p.weight_shape[1:]) for p in plan.layers if p.rank < most(p, False))
    assert budget - step < plan.adapter_parameters <= budget  # the cheapest layer still had room
    assert plan == convlora.plan(model, budget=f"{100 * share:g}%")
    # From sizes alone all layers have the same rank, but for what caps them and for the last ones handed out.
    free = [p.rank for p in plan.layers if p.rank < most(p, False)]
    typical = sorted(free)[len(free) // 2]
    assert sum(abs(rank - typical) <= 1 for rank in free) >= 0.7 * len(free)


def test_ranks_are_in_proportion_to_the_scores():
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(3)))
    scores = {"0": 4.0, "1": 2.0, "2": 1.0}
    plan = convlora.plan(model, budget=35 * 640, importance=scores, modules_to_save=None)
    assert [layer.rank for layer in plan.layers] == [20, 10, 5]


def test_a_larger_budget_lowers_no_rank_of_layers_that_cost_the_same():
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(4)))
    scores = {"0": 3.0, "1": 2.5, "2": 1.0, "3": 0.0}
    before = [0] * 4
    for units in range(1, 60):
        plan = convlora.plan(model, budget=units * 320, importance=scores, modules_to_save=None)
        ranks = {layer.name: layer.rank for layer in (*plan.layers, *plan.skipped)}
        assert all(ranks[str(i)] >= before[i] for i in range(4)) and sum(ranks.values()) == units
        before = [ranks[str(i)] for i in range(4)]


def test_rank_and_patterns_are_upper_limits_and_the_table_says_what_is_left_out():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3)))
    plan = convlora.plan(model, 5, budget=100_000, rank_pattern={"1": 2}, modules_to_save=None)
    assert [layer.rank for layer in plan.layers] == [5, 2, 5] and plan.rank == 5
    plan = convlora.plan(model, budget=2 * 160, modules_to_save=None)
    assert [(layer.name, layer.note) for layer in plan.skipped] == [("2", "the budget leaves it no rank")]
    assert "the budget leaves it no rank" in str(plan)


def test_the_head_is_not_counted_and_alpha_is_kept(net):
    plan = convlora.plan(net, budget=400, alpha=6, use_rslora=True)
    assert plan.adapter_parameters <= 400 < plan.adapter_parameters + plan.saved_parameters
    assert all(layer.scaling == 6 / math.sqrt(layer.rank) for layer in plan.layers)


def test_adapters_added_later_have_budgets_of_their_own(net, images):
    convlora.inject(net, 2)
    convlora.add_adapter(net, "small", budget=200, modules_to_save=None)
    assert 0 < convlora.summary(net, "small").adapter_parameters <= 200
    assert convlora.summary(net, "small").base_parameters == sum(p.numel() for p in SmallNet().parameters())
    convlora.set_adapter(net, "small")
    net(images).sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": "1"}, "budget='1'; it must be a share"),
        ({"budget": "0%"}, "budget='0%'"),
        ({"budget": 0}, "budget=0"),
        ({"budget": -0.1}, "budget=-0.1"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": True}, "budget=True"),
        ({"budget": math.nan}, "budget=nan"),
        ({"budget": 20}, r"A budget of 20 parameters is less than rank 1 of any layer, which takes at least 25"),
        ({"budget": 400, "importance": {"stem": 1.0}}, r"importance has no score for block\.0, block\.3"),
        (
            {"budget": 400, "importance": {"stem": 1.0, "block.0": -1, "block.3": 1}},
            r"importance of block\.0 is -1; it must be a number of at least 0",
        ),
        ({"importance": {"stem": 1.0}}, "importance needs a budget to distribute"),
    ],
)
def test_what_is_no_budget_is_refused(net, options, message):
    before = snapshot(net)
    with pytest.raises(convlora.TargetError, match=message):
        convlora.inject(net, **options)
    assert snapshot(net) == before


# ---- what a loss says


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4) % 3) for _ in range(count)]


def test_sensitivity_is_the_mean_of_weight_times_gradient(net):
    found = convlora.sensitivity(net, iter(batches()), loss)
    net.eval()
    sum(loss(net, batch) for batch in batches()).backward()
    expected = {n: (m.weight * m.weight.grad).abs().mean().item() for n, m in net.named_modules() if n in found}
    assert found == pytest.approx(expected, rel=1e-5)
    assert found.keys() == {"stem", "block.0", "block.3", "hidden", "fc"}
    plan = convlora.plan(net, budget=700, importance=found)
    assert plan.adapter_parameters <= 700


@pytest.mark.parametrize("injected", [False, True])
def test_sensitivity_leaves_the_model_as_it_was(net, injected):
    net.stem.weight.requires_grad_(False)
    alone = convlora.sensitivity(net, batches(), loss)
    if injected:
        convlora.inject(net, 2, norm="track")
        convlora.add_adapter(net, "other", 2, init="pissa")
    before, random = snapshot(net.train()), torch.random.get_rng_state()
    grads = [p.grad for p in net.parameters()]
    assert convlora.sensitivity(net, batches(), loss) == pytest.approx(alone, rel=1e-6)  # the base's, in eval mode
    assert snapshot(net) == before and torch.equal(torch.random.get_rng_state(), random)
    assert grads == [p.grad for p in net.parameters()] == [None] * len(grads)


def test_sensitivity_of_a_layer_without_influence_is_zero():
    net = SmallNet()
    with torch.no_grad():
        net.block[3].weight.zero_()
    found = convlora.sensitivity(net, batches(), loss)
    assert found["block.3"] == 0.0 == found["block.0"] and found["stem"] > 0


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_sensitivity_of_a_computed_weight_is_that_of_what_it_comes_from(wrap):
    net = SmallNet()
    wrap(net.stem)
    found = convlora.sensitivity(net, batches(1), loss)
    assert found.keys() == {"stem", "block.0", "block.3", "hidden", "fc"} and all(v >= 0 for v in found.values())


@pytest.mark.parametrize(
    "data, criterion, message",
    [
        ([], loss, "batches holds no batch"),
        (batches(1), lambda m, b: 1.0, "loss must return a scalar tensor"),
        (batches(1), lambda m, b: m(b[0]), "loss must return a scalar tensor"),
        (batches(1), lambda m, b: torch.zeros(()), "loss must return a scalar tensor"),
    ],
)
def test_what_gives_no_gradient_is_refused(net, data, criterion, message):
    before = snapshot(net)
    with pytest.raises(convlora.TargetError, match=message):
        convlora.sensitivity(net, data, criterion)
    assert snapshot(net) == before


def test_scores_of_a_real_network_share_out_a_budget():
    timm = need("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    scores = convlora.sensitivity(model, itertools.islice(batches(), 1), loss)
    plan = convlora.plan(model, budget="2%", importance=scores)
    assert plan.adapter_parameters <= 0.02 * plan.base_parameters
    free = sorted((p for p in plan.layers if p.rank < most(p, False)), key=lambda p: scores[p.name])
    assert len(free) > 20
    for low, high in itertools.pairwise(free):
        assert low.rank <= high.rank + 1  # but for the last ranks handed out, a higher score has no lower rank
