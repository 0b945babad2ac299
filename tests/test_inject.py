"""Injection as structure: what stays, what is refused, and that removal gives back everything."""

import copy
import pickle
import re

import pytest
import torch
from conftest import SmallNet, dense_delta, randomise, snapshot, through_torch_save
from torch import nn

import convlora
from convlora import StateError, TargetError, UnsupportedLayerError


def test_returns_the_same_object_and_only_factors_and_head_train(net):
    assert convlora.inject(net) is net
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {
        *(f"{layer}.convlora.default.lora_{f}" for layer in ("stem", "block.3") for f in "AB"),
        "block.0.convlora.default.diff",  # a depthwise layer, too small to factor
        *("fc.weight", "fc.bias"),
    }
    assert {id(p) for p in convlora.trainable_parameters(net)} == {
        id(p) for name, p in net.named_parameters() if name in trainable
    }
    assert len(list(convlora.adapter_parameters(net))) == 5


@pytest.mark.parametrize("mode", [True, False])
def test_fresh_adapter_changes_no_bit_with_tracked_norms(net, images, mode):
    base = copy.deepcopy(net).train(mode)
    convlora.inject(net, norm="track").train(mode)
    assert torch.equal(net(images), base(images))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in base.state_dict().items())


def test_base_state_dict_keys_keep_their_names_and_order(net):
    before = list(net.state_dict())
    convlora.inject(net)
    after = list(net.state_dict())
    assert [key for key in after if ".convlora." not in key] == before
    assert len(after) == len(before) + 5


def test_base_checkpoint_loads_strictly_and_leaves_the_factors(net, images):
    other = SmallNet()
    convlora.inject(net)
    randomise(net)
    factors = [p.clone() for p in convlora.adapter_parameters(net)]
    net.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(factors, convlora.adapter_parameters(net), strict=True))
    assert torch.equal(convlora.base_weight(net.stem), other.stem.weight)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        SmallNet().load_state_dict(net.state_dict())


def test_injected_checkpoint_with_half_of_the_factors_is_refused(net):
    convlora.inject(net)
    state = net.state_dict()
    del state["stem.convlora.default.lora_B"]
    with pytest.raises(RuntimeError, match=r"stem.convlora.default.lora_B"):
        net.load_state_dict(state)


def test_layer_still_is_and_answers_like_a_convolution(net):
    convlora.inject(net)
    layer = net.stem
    assert isinstance(layer, nn.Conv2d)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((3, 3), (2, 2), (1, 1), 1)
    assert layer.weight.shape == (16, 3, 3, 3)
    assert type(layer).__module__ == "torch.nn.modules.conv"


def test_code_that_reads_the_weight_sees_the_effective_one(net):
    convlora.inject(net)
    randomise(net)
    expected = convlora.base_weight(net.stem) + dense_delta(net.stem)
    torch.testing.assert_close(net.stem.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["freeze", "track"])
@pytest.mark.parametrize("mode", [True, False])
def test_remove_gives_back_the_base_bit_for_bit(net, images, train, norm, mode):
    net.train(mode)
    net.bn1.bias.requires_grad_(False)  # a flag of the user's own
    net.stem.register_forward_hook(lambda *_: None)
    before = snapshot(net)
    convlora.inject(net, norm=norm)
    train(net, images)
    assert snapshot(net) != before
    assert convlora.remove(net.train(mode)) is net
    assert snapshot(net) == before


def test_frozen_norms_take_the_mode_that_the_model_was_last_put_in(net):
    convlora.inject(net.eval())
    net.train()
    assert not net.bn1.training and not net.block[1].training and net.fc.training
    convlora.remove(net)
    assert net.bn1.training


def test_remove_after_merge_leaves_a_plain_model_that_predicts_alike(net, images, train):
    keys, flags = list(net.state_dict()), [p.requires_grad for p in net.parameters()]
    classes = [type(m) for m in net.modules()]
    convlora.inject(net)
    train(net, images)
    expected = net.eval()(images)
    convlora.remove(convlora.merge(net))
    assert torch.equal(net(images), expected)
    assert list(net.state_dict()) == keys
    assert [type(m) for m in net.modules()] == classes
    assert [p.requires_grad for p in net.parameters()] == flags
    with pytest.raises(StateError, match="carries no adapter"):
        convlora.summary(net)


def test_the_base_head_returns_after_the_head_was_trained(net, images, train):
    head = net.fc.weight
    bits = head.detach().clone()
    convlora.inject(net)
    train(net, images)
    assert not torch.equal(net.fc.weight, bits)
    convlora.remove(net)
    assert net.fc.weight is head and torch.equal(head, bits)


def test_what_is_kept_aside_follows_the_model_to_another_dtype(net, images, train):
    base = copy.deepcopy(net).double().eval()
    convlora.inject(net, norm="track")
    train(net, images)
    net.double()
    convlora.merge(net)
    convlora.unmerge(net)
    convlora.remove(net).eval()
    assert torch.equal(net(images.double()), base(images.double()))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: through_torch_save(model),
    ],
)
def test_copies_work_on_their_own(net, images, train, duplicate, merged):
    base = copy.deepcopy(net).eval()
    convlora.inject(net, norm="track")
    train(net, images)
    net.eval()
    expected = net(images)
    if merged:
        convlora.merge(net)
    twin = duplicate(net)
    assert torch.equal(twin(images), net(images))
    if merged:
        convlora.unmerge(twin)
    assert torch.equal(twin(images), expected)
    convlora.remove(twin)
    assert torch.equal(twin(images), base(images))
    assert convlora.summary(net).layers  # the original still carries its adapter
    assert [type(m) for m in twin.modules()] == [type(m) for m in base.modules()]


def test_shared_convolution_is_adapted_once_and_stays_shared():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Conv2d(4, 8, 3)
            self.right = self.left

        def forward(self, x):
            return self.left(x) - self.right(x)

    model = Siamese()
    x = torch.randn(1, 4, 5, 5)
    convlora.inject(model, 2, target_modules="right")  # its second name counts too
    randomise(model)
    assert model.left is model.right
    assert len(convlora.summary(model).layers) == 1
    assert torch.equal(model(x), torch.zeros(1, 8, 3, 3))
    convlora.merge(model)
    assert torch.equal(model(x), torch.zeros(1, 8, 3, 3))


def test_two_layers_that_share_one_weight_get_changes_of_their_own():
    first, second = nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(4, 8, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ConvTranspose2d(8, 4, 3), second)
    x = torch.randn(1, 4, 6, 6)
    convlora.inject(model, 2, modules_to_save=None)
    randomise(model)
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(first.weight, second.weight)
        convlora.merge(model)
        assert torch.equal(model(x), expected)
    convlora.unmerge(model)
    convlora.remove(model)
    assert first.weight is second.weight


# ---- which layers


@pytest.mark.parametrize(
    "targets, expected",
    [
        (None, {"stem", "block.0", "block.3"}),
        (nn.Conv2d, {"stem", "block.0", "block.3"}),
        ((nn.Conv2d, nn.Linear), {"stem", "block.0", "block.3", "hidden"}),
        ("block.*", {"block.0", "block.3"}),
        ("*.0", {"block.0"}),
        (re.compile(r"stem|block\.\d"), {"stem", "block.0", "block.3"}),
        (lambda name, module: isinstance(module, nn.Conv2d) and module.groups > 1, {"block.0"}),
        (["stem", lambda name, module: name == "hidden"], {"stem", "hidden"}),
        ((), set()),
    ],
)
def test_targets_by_type_glob_regex_and_predicate(net, targets, expected):
    convlora.inject(net, 2, target_modules=targets)
    assert {layer.name for layer in convlora.summary(net).layers} == expected


def test_excluded_layers_are_listed_with_their_reason(net):
    plan = convlora.plan(net, 2, exclude_modules="block.*")
    assert {layer.name: layer.note for layer in plan.skipped} == {"block.0": "excluded", "block.3": "excluded"}


def test_rank_and_alpha_patterns(net):
    plan = convlora.plan(net, 4, rank_pattern={"block.3": 2, "*": 3}, alpha_pattern={re.compile("stem"): 30})
    assert {layer.name: layer.rank for layer in plan.layers} == {"stem": 3, "block.0": 3, "block.3": 2}
    assert {layer.name: layer.scaling for layer in plan.layers} == {"stem": 10.0, "block.0": 2.0, "block.3": 2.0}


def test_empty_targets_make_a_probe_of_the_head(net, images):
    base = copy.deepcopy(net).eval()
    convlora.inject(net, target_modules=())
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    assert torch.equal(net.train()(images), base(images))


# ---- refusals, each of which leaves the model untouched


REFUSALS = [
    (
        {"target_modules": "layer9.*"},
        TargetError,
        r"target_modules='layer9.\*' matches no layer that could be adapted of SmallNet",
    ),
    ({"target_modules": ["stem", "stemm"]}, TargetError, r"'stemm' matches no layer.*Closest names: stem"),
    ({"target_modules": ["steem", "blok.0"]}, TargetError, r"(?s)'steem'.*'blok.0'.*Closest names: block\.0"),
    ({"target_modules": "block"}, TargetError, r"For the 2 modules inside 'block' write 'block\.\*'"),
    ({"target_modules": "(stem|fc)"}, TargetError, r"give re\.compile"),
    ({"target_modules": "bn1"}, TargetError, r"matches no layer that could be adapted of SmallNet"),
    ({"target_modules": nn.ConvTranspose2d}, TargetError, r"target_modules=ConvTranspose2d matches no layer"),
    ({"target_modules": [3]}, TargetError, r"3 is not a valid target; give a type"),
    ({"exclude_modules": "nothing"}, TargetError, r"exclude_modules='nothing' matches no layer"),
    ({"exclude_modules": "*"}, TargetError, r"No layer of SmallNet would be adapted.*stem: excluded"),
    ({"rank_pattern": {"stme": 4}}, TargetError, r"rank_pattern='stme' matches no layer.*stem"),
    ({"rank_pattern": {"stem": 0}}, TargetError, r"rank_pattern for stem=0; a rank is a whole number of at least 1"),
    ({"alpha_pattern": {"stem": float("nan")}}, TargetError, r"alpha_pattern for stem=nan; it must be a finite"),
    *(
        ({name: value}, TargetError, f"{name}={re.escape(repr(value))}; it must be a dict")
        for name in ("rank_pattern", "alpha_pattern", "method_pattern", "method_options", "importance")
        for value in ("stem", ["stem"], 3, False)
    ),
    ({"method_pattern": {"stem": "anchored"}}, TargetError, r"for stem='anchored'; it must be one of 'lora', 'dense'"),
    ({"method": "anchored", "init": "pissa"}, TargetError, r"method='anchored'; it must be one of 'lora', 'dense'"),
    ({"method": "hira", "freeze_A": True}, TargetError, r"method='hira' has no lora_A. Use method='lora', or leave"),
    (
        {"method": "oft", "init": "olora"},
        TargetError,
        "init='olora' is not an init of method='oft', which has kaiming",
    ),
    ({"method": "hra", "init_data": torch.ones(1)}, TargetError, r"init='eva'.* init_data mean init='eva'. Leave it"),
    ({"modules_to_save": "head"}, TargetError, r"modules_to_save='head' matches no module with parameters"),
    ({"rank": 0}, TargetError, r"rank=0; a rank is a whole number of at least 1"),
    ({"rank": -3}, TargetError, r"rank=-3"),
    ({"rank": 2.5}, TargetError, r"rank=2\.5"),
    ({"rank": True}, TargetError, r"rank=True"),
    ({"alpha": float("inf")}, TargetError, r"alpha=inf; it must be a finite number"),
    ({"norm": "eval"}, TargetError, r"norm='eval'; it must be 'freeze' or 'track'"),
    ({"dropout": 1.0}, TargetError, r"dropout=1\.0; it must be at least 0 and below 1"),
    ({"adapter_name": "a.b"}, TargetError, r"adapter_name='a\.b'; it must be a name without a dot"),
    ({"adapter_name": "keys"}, TargetError, r"adapter_name='keys' is an attribute"),
    ({"target_modules": 5}, TargetError, r"5 is not a valid target; give a type"),
    ({"target_modules": nn.Conv2d(1, 1, 1)}, TargetError, r"Conv2d\(.*is not a valid target; give a type"),
    ({"target_modules": (), "modules_to_save": None}, TargetError, r"nothing would train"),
    ({"dropout": "x"}, TargetError, r"dropout='x'"),
    ({"alpha": True}, TargetError, r"alpha=True"),
    ({"alpha": 0}, TargetError, r"alpha=0; it must be a finite number above 0"),
    (
        {"target_modules": lambda name, module: module.kernel_size == (1, 1)},
        TargetError,
        r"The predicate failed at hidden \(Linear\): AttributeError.*begin with isinstance\(module, nn\.Conv2d\)",
    ),
]


@pytest.mark.parametrize(
    "arguments, kind, message", REFUSALS, ids=[f"{next(iter(r[0]))}-{i}" for i, r in enumerate(REFUSALS)]
)
def test_refused_arguments_leave_the_model_untouched(net, arguments, kind, message):
    before = snapshot(net)
    with pytest.raises(kind, match=message):
        convlora.inject(net, **arguments)
    with pytest.raises(kind, match=message):
        convlora.plan(net, **arguments)
    assert snapshot(net) == before


def test_model_without_convolutions_is_refused_with_the_remedy():
    with pytest.raises(TargetError, match=r"Sequential has no convolution.*target_modules=nn\.Linear"):
        convlora.inject(nn.Sequential(nn.Linear(3, 3)))


def test_second_injection_is_refused(net):
    convlora.inject(net)
    before = snapshot(net)
    for again in (net, nn.Sequential(net)):
        with pytest.raises(StateError, match=r"carries the adapter 'default' already; call convlora\.add_adapter"):
            convlora.inject(again)
    assert snapshot(net) == before


@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda m: nn.DataParallel(m), r"DataParallel\. Unwrap it \(`model\.module`\): inject first, then wrap"),
        (
            lambda m: torch.compile(m),
            r"OptimizedModule\. Unwrap it \(`model\._orig_mod`\): inject first, then torch\.compile",
        ),
        (lambda m: torch.jit.trace(m.eval(), torch.randn(1, 3, 8, 8)), r"Inject into the Python module"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_wrapped_models_are_refused_with_the_remedy(net, wrap, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        convlora.inject(wrap(net))


def test_distributed_model_is_refused_with_the_remedy(net):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedLayerError, match=r"DistributedDataParallel\. Unwrap it"):
            convlora.inject(DistributedDataParallel(net))
        wrapped = DistributedDataParallel(convlora.inject(net))
        with pytest.raises(UnsupportedLayerError, match=r"DistributedDataParallel\. Unwrap it"):
            convlora.add_adapter(wrapped, "second")  # whose gradients it would not synchronise
        assert len(list(convlora.adapter_parameters(wrapped))) == 5
    finally:
        distributed.destroy_process_group()


def test_lazy_convolution_asks_to_be_initialised():
    model = nn.Sequential(nn.LazyConv2d(8, 3))
    with pytest.raises(UnsupportedLayerError, match=r"0: LazyConv2d has no shape yet; run one batch"):
        convlora.inject(model)


def test_attribute_of_our_name_is_refused(net):
    net.stem.convlora = "mine"
    with pytest.raises(UnsupportedLayerError, match=r"stem has an attribute named 'convlora' already"):
        convlora.inject(net)
    assert net.stem.convlora == "mine"


def test_not_a_module():
    with pytest.raises(TargetError, match=r"model is of type str; it must be a torch\.nn\.Module"):
        convlora.inject("resnet50")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", range(3))
def test_interrupted_injection_leaves_the_model_untouched(net, monkeypatch, error, step):
    import convlora._model.inject as room

    before, real, calls = snapshot(net), room.attach, []

    def attach(*arguments):
        calls.append(arguments)
        if len(calls) > step:
            raise error("cut short")
        real(*arguments)

    monkeypatch.setattr(room, "attach", attach)
    with pytest.raises(error, match="cut short"):
        convlora.inject(net, norm="freeze")
    assert snapshot(net) == before


@pytest.mark.parametrize(
    "call",
    [
        convlora.merge,
        convlora.unmerge,
        convlora.remove,
        convlora.summary,
        convlora.adapter_parameters,
        convlora.trainable_parameters,
    ],
)
def test_calls_on_a_plain_model_say_what_to_do(net, call):
    with pytest.raises(StateError, match=r"SmallNet carries no adapter\. Call convlora\.inject"):
        list(call(net))


def test_merge_twice_and_unmerge_of_the_unmerged_are_refused(net):
    convlora.inject(net)
    with pytest.raises(StateError, match="not merged"):
        convlora.unmerge(net)
    convlora.merge(net)
    with pytest.raises(StateError, match="merged already"):
        convlora.merge(net)


def test_an_adapter_in_a_part_is_found_from_the_whole(net, images):
    whole = nn.Sequential(net, nn.Softmax(1))
    convlora.inject(net)
    randomise(net)
    expected = whole.eval()(images)
    assert convlora.summary(whole).layers == convlora.summary(net).layers
    convlora.merge(whole)
    assert torch.equal(whole(images), expected)
    convlora.remove(whole)


# ---- the head


@pytest.mark.parametrize(
    "build, expected, how",
    [
        (lambda: SmallNet(), ("fc",), "attribute 'fc'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 5), nn.Linear(5, 2)), ("2",), "the last layer"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 4, 1)),
            (),
            "no head beside what was asked for",
        ),
    ],
)
def test_head_is_found_and_said(build, expected, how):
    plan = convlora.plan(build())
    assert (plan.modules_to_save, plan.head_found_by) == (expected, how)
    assert f"({how})" in str(plan)


def test_modules_to_save_by_name_are_trained_in_full_with_their_statistics(net, images, train):
    statistics = net.bn1.running_mean.clone()
    convlora.inject(net, modules_to_save=["fc", "bn1"])
    train(net, images)
    assert net.bn1.training and not torch.equal(net.bn1.running_mean, statistics)
    convlora.remove(net)
    assert torch.equal(net.bn1.running_mean, statistics)


def test_outermost_of_nested_modules_to_save_counts(net):
    plan = convlora.plan(net, target_modules="stem", modules_to_save=["block", "block.3", "fc"])
    assert plan.modules_to_save == ("block", "fc")
    assert {layer.name: layer.note for layer in plan.skipped} == {
        "block.0": "trained in full",
        "block.3": "trained in full",
    }
