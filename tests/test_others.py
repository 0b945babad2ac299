"""Whatever else touches an injected model: a table of situations, each with its right result.

A row is a function: its decorator says who does what to the model and what is right then, its body shows it. Either the
model predicts, trains and saves what it should, or the call is refused with the model whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from conftest import SmallNet, need, randomise, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import convlora

Row = Callable[[], None]
ROWS: list[object] = []


def situation(what: str, right: str, *needs: str, marks: tuple[pytest.MarkDecorator, ...] = ()) -> Callable[[Row], Row]:
    """A row of the table: ``what`` is done to an injected model, ``right`` is the result; ``needs`` names packages."""

    def add(row: Row) -> Row:
        def run() -> None:
            for package in needs:
                need(package)
            row()

        ROWS.append(pytest.param(run, id=f"{what}: {right}", marks=marks))
        return row

    return add


# --- 1. norms -----------------------------------------------------------------------------------------------------

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def injected(**options: Any) -> SmallNet:
    """A small network with statistics of its own and an adapter that changes something."""
    torch.manual_seed(0)
    net = SmallNet()
    with torch.no_grad():
        net.train()(3 * IMAGES + 1)  # statistics that no reset leaves
        convlora.inject(net, 2, **options)
    randomise(net)
    return net


def predicts(model: nn.Module) -> torch.Tensor:
    """In inference, whatever its mode is."""
    mode = model.training
    with torch.no_grad():
        y: torch.Tensor = model.eval()(IMAGES)
    model.train(mode)
    return y


def stays(what: Callable[[SmallNet], object], **options: Any) -> None:
    """The model predicts, and saves, as before ``what``."""
    net = injected(**options)
    before, bits = predicts(net), bits_of(net)
    what(net)
    with torch.no_grad():
        net.train()(IMAGES + 2)
    assert torch.equal(predicts(net), before)
    assert bits_of(net) == bits


def bits_of(model: nn.Module) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in model.state_dict().items()}


def refused(net: nn.Module, call: Callable[[], object], match: str) -> None:
    """The call says why, and the model is as it was."""
    before = snapshot(net)
    with pytest.raises(convlora.StateError, match=match):
        call()
    assert snapshot(net) == before


@situation("update_bn", "frozen norms stay")
def _() -> None:
    stays(lambda net: update_bn([IMAGES], net))


@situation("update_bn of a merged model", "frozen norms stay")
def _() -> None:
    net = convlora.merge(injected())
    before = predicts(net)
    update_bn([IMAGES], net)
    assert torch.equal(predicts(net), before)


@situation("update_bn with norm='track'", "the statistics are those of the data, and the adapter's")
def _() -> None:
    net = injected(norm="track")
    base = copy.deepcopy(net.bn1).train()
    update_bn([IMAGES], net)
    base.reset_running_stats()
    base.momentum = None
    base(net.stem(IMAGES))
    assert torch.equal(net.bn1.running_mean, base.running_mean)
    assert not torch.equal(convlora.remove(net).bn1.running_mean, base.running_mean)


@situation("update_bn of AveragedModel", "frozen norms stay")
def _() -> None:
    net = injected()
    average = AveragedModel(net)
    average.update_parameters(net)
    update_bn([IMAGES], average)
    assert torch.equal(predicts(average.module), predicts(net))


@situation("Lightning's weight averaging resets batch norms", "frozen norms stay", "lightning")
def _() -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    averaging = StochasticWeightAveraging(0.1)

    def reset(net: SmallNet) -> None:
        vars(net)["device"] = "cpu"  # as a LightningModule says it
        averaging.reset_batch_norm_and_save_state(cast(Any, net))
        averaging.reset_momenta()
        for norm in (net.bn1, cast(nn.BatchNorm2d, net.block[1])):  # it counts down in place
            assert norm.num_batches_tracked == 0
            norm.num_batches_tracked += 1

    stays(reset)


@situation("reset_running_stats and reset_parameters, as AdaBN", "frozen norms stay")
def _() -> None:
    stays(lambda net: (net.bn1.reset_running_stats(), net.bn1.reset_parameters()))


@situation("norm.training = True by hand", "frozen norms stay")
def _() -> None:
    stays(lambda net: setattr(net.bn1, "training", True))


@situation("nn.Module.train called past the norm's own", "frozen norms stay")
def _() -> None:
    stays(lambda net: [nn.Module.train(module) for module in net.modules()])


@situation("momentum, track_running_stats written by hand", "frozen norms stay")
def _() -> None:
    stays(lambda net: (setattr(net.bn1, "momentum", 1.0), setattr(net.bn1, "track_running_stats", False)))


@situation("update_bn inside disable_adapter", "the base's norms stay")
def _() -> None:
    net = injected(norm="track")
    base = convlora.remove(copy.deepcopy(net))
    with convlora.disable_adapter(net):
        update_bn([IMAGES], net)
    assert bits_of(convlora.remove(net)) == bits_of(base)


@situation("a frozen norm without statistics, with a gradient", "what torch computes")
def _() -> None:
    net = injected()
    norm = nn.BatchNorm2d(16).eval()
    for one in (net.bn1, norm):
        one.running_mean = one.running_var = None
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    assert torch.equal(net.bn1(x * 1), norm(x * 1))


@situation("SyncBatchNorm.convert_sync_batchnorm after injection", "refused, and the model is as it was")
def _() -> None:
    for norm in ("freeze", "track"):
        net = injected(norm=norm)
        refused(net, lambda net=net: nn.SyncBatchNorm.convert_sync_batchnorm(net), "convert before convlora.inject")
    refused(convlora.merge(net), lambda: nn.SyncBatchNorm.convert_sync_batchnorm(net), "convert before convlora.inject")
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(convlora.remove(net)).bn1, nn.SyncBatchNorm)


@situation("timm's convert_sync_batchnorm after injection", "refused, and the model is as it was", "timm")
def _() -> None:
    from timm.layers import convert_sync_batchnorm

    net = injected()
    refused(net, lambda: convert_sync_batchnorm(net), "convert before convlora.inject")


# --- 2. flags, heads and modules ----------------------------------------------------------------------------------


# --- 3. state dicts -----------------------------------------------------------------------------------------------


# --- 4. averages --------------------------------------------------------------------------------------------------


# --- 5. what is trained and what is saved -------------------------------------------------------------------------


# --- 6. precision -------------------------------------------------------------------------------------------------


# --- 7. several processes -----------------------------------------------------------------------------------------


# --- 8. forwards on the instance ----------------------------------------------------------------------------------


# --- 9. the kept weight -------------------------------------------------------------------------------------------


# --- 10. autograd and tracing -------------------------------------------------------------------------------------


# --- 11. smaller ones ---------------------------------------------------------------------------------------------


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_situation(row: Row) -> None:
    row()
