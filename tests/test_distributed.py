"""Two processes over gloo on the CPU: DistributedDataParallel, FSDP2 and FSDP1 of an injected model.

The workers run in processes of their own and hand back plain data; every assertion is made here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet, randomise
from torch import Tensor, distributed, nn

import convlora

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch was built without gloo"
)
CLOSE = {"rtol": 1e-5, "atol": 1e-7}  # fp32 sums of two halves instead of one whole: another order, some last bits


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What each worker returned on two ranks, by its name: one pair of processes serves them all."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_process, args=(directory,), nprocs=2)
    ranks = [torch.load(directory / f"result{rank}", weights_only=True) for rank in range(2)]

    def results(worker: str) -> list[Any]:
        if isinstance(ranks[0][worker], str):
            pytest.skip(ranks[0][worker])
        return [rank[worker] for rank in ranks]

    return results


def _process(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    where = (directory / "meeting").as_uri()  # a file, so that two runs never meet at one port
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    try:
        cannot = None
        results: dict[str, Any] = {}
        for worker in (_ddp, _ddp_tracked, _ddp_switched, _fsdp, _fsdp_merged, _fsdp_refuses, _fsdp1, _fsdp1_refuses):
            if worker is _fsdp:
                cannot = why_torch_cannot_shard()
            if worker is _fsdp1:
                cannot = why_torch_cannot_flatten()
            results[worker.__name__] = cannot or worker(rank, directory)
        torch.save(results, directory / f"result{rank}")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    # Torch's own threads can outlive the group, and one that asks for the interpreter's lock while Python 3.11 and
    # older shut down aborts the process; the result is on disk, so there is no shutting down to do.
    os._exit(0)


def injected(norm: str = "freeze") -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet()
    convlora.inject(net, 4, norm=norm)
    randomise(net)
    return net.train()


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 4, 3, 16, 16, generator=torch.Generator().manual_seed(5)))


def half(images: Tensor, rank: int) -> Tensor:
    return images[2 * rank : 2 * rank + 2]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(convlora.trainable_parameters(model), lr=0.05, momentum=0.9)


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- DistributedDataParallel


def _ddp(rank: int, directory: Path) -> dict[str, Any]:
    net = injected()
    before = statistics(net)
    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = sgd(net)
    first, second, third = batches()
    step(ddp, half(first, rank), optimizer)
    found = {"gradients": gradients(net)}
    step(ddp, half(second, rank), optimizer)
    convlora.merge(ddp.module)  # an evaluation in between
    convlora.unmerge(ddp.module)
    step(ddp, half(third, rank), optimizer)
    found |= {"trained": trained(net), "frozen": equal(before, statistics(net))}
    if rank == 0:
        found["adapter"] = str(convlora.save_adapter(ddp.module, directory / "adapter"))
    net.eval()
    found["outputs"] = ddp(first).detach()
    convlora.merge(ddp.module)
    found["merged"] = ddp(first).detach()
    return found


def test_ddp_trains_like_one_process_with_the_joined_batch_and_rank_0_saves_it(found):
    ranks = found("_ddp")
    alone = injected()
    optimizer = sgd(alone)
    for number, images in enumerate(batches()):
        step(alone, images, optimizer)
        if number == 0:
            expected = gradients(alone)
    factors = [name for name in expected if "lora_" in name]
    assert len(factors) == 6 and {"fc.weight", "fc.bias"} <= expected.keys()
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], expected, **CLOSE)
        torch.testing.assert_close(rank["trained"], trained(alone), **CLOSE)
        assert rank["frozen"]
        assert torch.equal(rank["merged"], rank["outputs"])
    assert equal(ranks[0]["trained"], ranks[1]["trained"])
    torch.manual_seed(0)
    plain = convlora.load_adapter(SmallNet(), ranks[0]["adapter"]).eval()
    torch.testing.assert_close(plain(batches()[0]), ranks[0]["outputs"], **CLOSE)  # other threads, other rounding


def _ddp_tracked(rank: int, directory: Path) -> dict[str, Tensor]:
    net = injected("track")
    ddp = nn.parallel.DistributedDataParallel(net)
    for images in batches(2):
        ddp(half(images, rank))
    return statistics(net)


def test_ddp_with_tracked_norms_keeps_the_statistics_of_rank_0(found):
    """Each forward starts from rank 0's statistics and adds the rank's own batch, as with any BatchNorm in DDP."""
    ranks = found("_ddp_tracked")
    first, second = batches(2)
    for rank, moved in enumerate(ranks):
        alone = injected("track")
        alone(half(first, 0))
        alone(half(second, rank))
        assert equal(moved, statistics(alone))
    assert not equal(ranks[0], ranks[1])


def _two_adapters() -> SmallNet:
    net = injected()
    convlora.add_adapter(net, "b", 2)
    return net


def _ddp_switched(rank: int, directory: Path) -> dict[str, Any]:
    net = _two_adapters()
    old = nn.parallel.DistributedDataParallel(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        convlora.set_adapter(old.module, "b")
    old(half(batches()[0], rank)).square().mean().backward()
    apart = gradients(net)
    net.zero_grad()
    new = nn.parallel.DistributedDataParallel(net)
    new(half(batches()[0], rank)).square().mean().backward()
    return {"told": [str(each.message) for each in told], "apart": apart, "together": gradients(net)}


def test_after_set_adapter_a_new_ddp_averages_and_the_old_one_is_warned_of(found):
    ranks = found("_ddp_switched")
    alone = convlora.set_adapter(_two_adapters(), "b")
    alone(batches()[0]).square().mean().backward()
    expected = gradients(alone)
    assert any("lora_B" in name and grad.any() for name, grad in expected.items())
    for rank in ranks:
        assert [text for text in rank["told"] if "Wrap the model again before you train" in text]
        torch.testing.assert_close(rank["together"], expected, **CLOSE)
    assert equal(ranks[0]["together"], ranks[1]["together"])
    assert not equal(ranks[0]["apart"], ranks[1]["apart"])  # what is warned of


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is of the CPU")
def test_sync_batch_norm_in_ddp_asks_for_a_gpu_as_without_an_adapter():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for prepare in (lambda net: net, convlora.inject):
            net = prepare(nn.SyncBatchNorm.convert_sync_batchnorm(SmallNet()))
            with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
                nn.parallel.DistributedDataParallel(net)
    finally:
        distributed.destroy_process_group()


# ---- FSDP2

SHARDED_PARTS = {"whole": (), "blocks": ("block",), "layers": ("stem", "block.0", "block.3")}


def shard(net: nn.Module, parts: tuple[str, ...] = ()) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for name in parts:
        fully_shard(net.get_submodule(name), mesh=mesh)
    return fully_shard(net, mesh=mesh)


def why_torch_cannot_shard() -> str | None:
    """A plain network tells whether this torch shards on the CPU at all; None where it does."""
    import torch.distributed.fsdp

    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        return "torch.distributed.fsdp.fully_shard came with torch 2.6"
    try:
        torch.manual_seed(0)
        shard(SmallNet())(batches()[0]).sum().backward()
    except Exception as cause:
        return f"torch {torch.__version__} cannot shard a plain network on the CPU: {cause!r}"
    return None


def full(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def _fsdp(rank: int, directory: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found = {}
    for how, parts in SHARDED_PARTS.items():
        net = shard(injected(), parts)
        optimizer = sgd(net)
        outputs = net(half(batches()[0], rank)).detach()
        step(net, half(batches()[0], rank), optimizer)
        found[how] = {
            "outputs": outputs,
            "gradients": full(gradients(net)),
            "state": get_model_state_dict(net, options=StateDictOptions(full_state_dict=True)),
        }
    return found


def test_fsdp2_trains_like_one_process_with_the_joined_batch_and_its_full_state_saves(found, tmp_path):
    ranks = found("_fsdp")
    images = batches()[0]
    alone = injected()
    outputs = alone(images).detach()
    step(alone, images, sgd(alone))
    for rank, hows in enumerate(ranks):
        for how in hows.values():
            torch.testing.assert_close(how["outputs"], half(outputs, rank), **CLOSE)
            torch.testing.assert_close(how["gradients"], gradients(alone), **CLOSE)
    for how in ranks[0].values():  # the full state is rank 0's alone
        torch.testing.assert_close(how["state"], dict(alone.state_dict()), **CLOSE)
        whole = injected()
        whole.load_state_dict(how["state"])
        convlora.save_adapter(whole, tmp_path / "adapter")
        torch.manual_seed(0)
        plain = convlora.load_adapter(SmallNet(), tmp_path / "adapter").eval()
        assert torch.equal(plain(images), whole.eval()(images))


def _fsdp_merged(rank: int, directory: Path) -> Tensor:
    net = convlora.merge(injected().eval())
    return shard(net, ("block",))(half(batches()[0], rank)).detach()


def test_fsdp2_of_a_merged_model_predicts_like_the_unsharded(found):
    ranks = found("_fsdp_merged")
    expected = injected().eval()(batches()[0])
    torch.testing.assert_close(torch.cat(ranks), expected, **CLOSE)


def _answer(call: Callable[[nn.Module], object], net: nn.Module) -> str:
    try:
        call(net)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _answers(net: nn.Module, how: str, directory: Path) -> dict[str, str]:
    calls = {
        "merge": convlora.merge,
        "save_adapter": lambda model: convlora.save_adapter(model, directory / f"adapter{how}"),
        "remove": convlora.remove,
    }
    return {f"{name}, {how}": _answer(call, net) for name, call in calls.items()}


def _fsdp_refuses(rank: int, directory: Path) -> dict[str, str]:
    answers: dict[str, str] = {}
    for how, parts in SHARDED_PARTS.items():
        answers |= _answers(shard(injected(), parts), how, directory)
    return answers


@pytest.mark.parametrize(("worker", "calls"), [("_fsdp_refuses", 9), ("_fsdp1_refuses", 12)])
def test_merging_saving_and_removing_while_sharded_is_one_clear_error(found, worker, calls):
    for answers in found(worker):
        assert len(answers) == calls
        for call, answer in answers.items():
            assert answer.startswith("StateError") and "shard" in answer, (call, answer)


# ---- FSDP1: the wrapper, which puts views of one flat parameter where the model had its parameters


def flatten(net: nn.Module, each: tuple[type[nn.Module], ...] = (), use_orig_params: bool = True) -> nn.Module:
    """Wrapped as a whole, or each module of these classes for itself first."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*requires_grad=True and False", UserWarning)  # as of any frozen base
        return FullyShardedDataParallel(
            net,
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy(set(each)) if each else None,
        )


def why_torch_cannot_flatten() -> str | None:
    """A plain network tells whether this torch's FSDP1 computes on the CPU at all; None where it does."""
    try:
        torch.manual_seed(0)
        flatten(SmallNet())(batches()[0]).sum().backward()
    except Exception as cause:
        return f"torch {torch.__version__} cannot wrap a plain network in FSDP1 on the CPU: {cause!r}"
    return None


FLAT_PARTS = {"whole": (), "blocks": (nn.Sequential,), "layers": (nn.Conv2d,)}


def _fsdp1(rank: int, directory: Path) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    found = {}
    for how, each in FLAT_PARTS.items():
        net = flatten(injected(), each)
        optimizer = sgd(net)
        first, second, _ = batches()
        outputs = net(half(first, rank)).detach()
        for images in (first, second):
            step(net, half(images, rank), optimizer)
        with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
            state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
            grads = {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for name, p in net.named_parameters()
                if p.requires_grad and p.grad is not None
            }
        found[how] = {"outputs": outputs, "gradients": grads, "state": state}
    return found


def test_fsdp1_trains_like_one_process_with_the_joined_batch_and_its_full_state_saves(found, tmp_path):
    ranks = found("_fsdp1")
    first, second, _ = batches()
    alone = injected()
    outputs = alone(first).detach()
    optimizer = sgd(alone)
    for images in (first, second):
        step(alone, images, optimizer)
    for rank, hows in enumerate(ranks):
        assert hows.keys() == FLAT_PARTS.keys()
        for how in hows.values():
            torch.testing.assert_close(how["outputs"], half(outputs, rank), **CLOSE)
            torch.testing.assert_close(how["gradients"], gradients(alone), **CLOSE)
            torch.testing.assert_close(how["state"], dict(alone.state_dict()), **CLOSE)
            whole = injected()
            whole.load_state_dict(how["state"])
            convlora.save_adapter(whole, tmp_path / "adapter")
            torch.manual_seed(0)
            plain = convlora.load_adapter(SmallNet(), tmp_path / "adapter").eval()
            assert torch.equal(plain(first), whole.eval()(first))


def _fsdp1_refuses(rank: int, directory: Path) -> dict[str, str]:
    answers: dict[str, str] = {}
    for how, each in FLAT_PARTS.items():
        answers |= _answers(flatten(injected(), each), how, directory)
    net = injected().requires_grad_(True)  # FSDP1 without the original parameters takes one requires_grad for all
    return answers | _answers(flatten(net, use_orig_params=False), "flat", directory)
