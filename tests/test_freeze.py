"""``freeze_A``: lora_B alone is trained, whatever else is asked for and whoever runs the training."""

import copy

import pytest
import torch
from conftest import SmallNet, need, randomise, through_torch_save
from torch import nn
from torch.utils.checkpoint import checkpoint

import convlora


def injected(seed=0, **options):
    torch.manual_seed(seed)
    return convlora.inject(SmallNet(), 4, freeze_A=True, **options)


def factors(net, which, adapter_name="default"):
    """Copies of one factor of every layer, by name."""
    return {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith(f".{adapter_name}.{which}")}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def gradients(net, images, forward=None):
    """Of everything that is trained, of one loss."""
    net.zero_grad()
    (net if forward is None else forward)(images).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


VARIANTS = {
    "plain": {},
    "dora": {"use_dora": True},
    "dropout": {"dropout": 0.5},
    "rslora": {"use_rslora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva"},
    "tracked": {"norm": "track"},
    "linear": {"target_modules": ["stem", "block.*", "hidden"]},
    "budget": {"budget": 300},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_moves_B_and_the_head_alone_and_the_file_gives_it_back(name, images, train, tmp_path):
    options = VARIANTS[name] | ({"init_data": [images]} if name == "eva" else {})
    torch.manual_seed(0)
    base = SmallNet()
    net = convlora.inject(copy.deepcopy(base), 4, freeze_A=True, **options)
    assert torch.equal(net.eval()(images), base.eval()(images))
    plan, A, B = convlora.summary(net), factors(net, "lora_A"), factors(net, "lora_B")
    given = {id(p) for p in convlora.trainable_parameters(net)}
    own = {id(p) for p in convlora.adapter_parameters(net)}
    for each, p in net.named_parameters():
        assert not each.endswith("lora_A") or (id(p) not in given | own and not p.requires_grad)
        assert not each.endswith("lora_B") or id(p) in given & own
    assert plan.freeze_A and {layer.method for layer in plan.layers} == {"lora"}
    assert plan.trainable_parameters == plan.trained_now
    assert plan.adapter_parameters == sum(p.numel() for each, p in net.named_parameters() if "convlora" in each)
    train(net, images)
    assert equal(A, factors(net, "lora_A")) and not any(map(torch.equal, B.values(), factors(net, "lora_B").values()))
    convlora.save_adapter(net, tmp_path)
    again = convlora.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again.eval()(images), net.eval()(images))
    assert equal(A, factors(again, "lora_A"))
    loaded = convlora.summary(again)
    assert loaded.freeze_A and loaded.trained_now == plan.trained_now
    merged = convlora.merge(net)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), again(images), rtol=1e-5, atol=1e-5)
    assert equal(dict(convlora.remove(convlora.unmerge(net)).state_dict()), dict(base.state_dict()))


def test_adapters_that_differ_in_it_keep_their_own_factors_trainable(images, train):
    net = injected()
    convlora.add_adapter(net, "both", 4)

    def trained():
        return {n.rpartition("convlora.")[2] for n, p in net.named_parameters() if p.requires_grad and "convlora" in n}

    assert trained() == {"default.lora_B"}
    convlora.set_adapter(net, "both")
    assert trained() == {"both.lora_A", "both.lora_B"}
    with convlora.disable_adapter(net):
        net(images)
    train(net, images)
    convlora.set_adapter(net, "default")
    assert trained() == {"default.lora_B"}
    convlora.unmerge(convlora.merge(net))
    assert trained() == {"default.lora_B"}
    other = copy.deepcopy(net)
    assert through_torch_save(net).stem.convlora["default"].lora_A.requires_grad is False
    before = factors(other, "lora_A")
    train(other, images)
    assert equal(before, factors(other, "lora_A"))


@pytest.mark.parametrize(
    "options", [{}, {"training_path": "fused"}, {"training_path": "branch"}, {"use_dora": True}], ids=str
)
def test_gradients_are_those_that_B_has_beside_a_trained_A(options, images):
    constant, both = injected(**options), convlora.inject(SmallNet(), 4, **options)
    both.load_state_dict(constant.state_dict())
    for net in (constant, both):
        randomise(net, 0.1)
    both.load_state_dict(constant.state_dict())
    mine, theirs = gradients(constant, images), gradients(both, images)
    assert theirs.keys() - mine.keys() == {name for name in theirs if name.endswith("lora_A")}
    for name, grad in mine.items():  # other sums where a path computes two gradients in one product
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-5)


def test_checkpointed_compiled_and_distributed_training_have_the_same_gradients(images, tmp_path):
    net = injected()
    randomise(net)
    expected = gradients(net, images)
    again = gradients(net, images, lambda x: checkpoint(net, x, use_reentrant=False))
    assert equal(expected, again)
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        compiled = gradients(net, images, torch.compile(net, backend=backend, fullgraph=True))
        for name, grad in expected.items():
            torch.testing.assert_close(compiled[name], grad, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    if not torch.distributed.is_available():
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert equal(expected, gradients(net, images, nn.parallel.DistributedDataParallel(net)))
    finally:
        torch.distributed.destroy_process_group()


def test_one_batch_for_an_adapter_with_a_constant_A_and_another(images):
    net = injected()
    convlora.add_adapter(net, "both", 2)
    for name in ("both", "default"):
        convlora.set_adapter(net, name)
        randomise(net)
    net.eval()
    with torch.no_grad(), convlora.use_adapters(net, ["default", "both"] * 2):
        y = net(images)
    with torch.no_grad():
        torch.testing.assert_close(y[::2], net(images)[::2], rtol=1e-4, atol=1e-5)


def test_stock_peft_reads_what_it_saves(images, train, tmp_path):
    peft = need("peft")
    torch.manual_seed(0)
    base = SmallNet()
    net = convlora.inject(copy.deepcopy(base), 4, freeze_A=True, init="pissa", exclude_modules="block.0")
    train(net, images, lr=0.01)
    convlora.save_adapter(net, tmp_path)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()(images)
        torch.testing.assert_close(theirs, net.eval()(images), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_mean_is_refused():
    with pytest.raises(convlora.TargetError, match="freeze_A='A'; it must be true or false"):
        convlora.inject(SmallNet(), freeze_A="A")
    with pytest.raises(convlora.TargetError, match="freeze_A=True; method='dense' has no lora_A"):
        convlora.inject(SmallNet(), freeze_A=True, method="dense")
