"""Whatever else touches an injected model: a table of situations, each with its right result.

A row is a function: its decorator says who does what to the model and what is right then, its body shows it. Either the
model predicts, trains and saves what it should, or the call is refused with the model whole.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from conftest import SmallNet, need, randomise, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader

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


def found(net: nn.Module) -> list[str]:
    return [finding.name for finding in convlora.check(net)]


def saved_and_loaded(net: SmallNet, base: SmallNet) -> None:
    """What is saved of the model predicts the same on a base that is built as the model is now."""
    with tempfile.TemporaryDirectory() as folder:
        convlora.save_adapter(net, folder)
        assert torch.equal(predicts(convlora.load_adapter(base, folder)), predicts(net))


@situation("nothing", "check finds nothing, in every state")
def _() -> None:
    net = injected(norm="track")
    convlora.add_adapter(net, "other")
    assert not convlora.check(net)
    convlora.set_adapter(net.train(), "other")
    net(IMAGES)
    assert not convlora.check(net)
    with convlora.disable_adapter(net):
        assert not convlora.check(net)
    assert not convlora.check(copy.deepcopy(net)) and not convlora.check(convlora.merge(net))


@situation("a head is replaced", "told before training and saving; adopted, it trains, is saved, and is the base's")
def _() -> None:
    net = injected()
    net.fc = nn.Linear(12, 7)
    assert found(net) == ["fc"]
    for call in (
        lambda: convlora.trainable_parameters(net),
        lambda: convlora.merge(net),
        lambda: convlora.save_adapter(net, "x"),
    ):
        refused(net, call, r"fc.* was replaced after convlora\.inject.*convlora\.adopt")
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=0.1)  # made before
    first = copy.deepcopy(net.fc)
    assert convlora.adopt(net, "fc") is net and not convlora.check(net)
    assert convlora.summary(net).saved_parameters == 7 * 12 + 7
    predicts(net)
    net(IMAGES).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.fc.weight, first.weight)
    base = convlora.remove(copy.deepcopy(net))
    assert bits_of(base.fc) == bits_of(first) and base.fc.weight.requires_grad
    saved_and_loaded(net, base)


@situation("a head is wrapped in dropout", "adopted, it keeps the numbers that it was trained to")
def _() -> None:
    net = injected()
    with torch.no_grad():
        net.fc.weight += 1
    before = predicts(net)
    net.fc = nn.Sequential(nn.Dropout(), net.fc)
    convlora.adopt(net)
    assert not convlora.check(net) and torch.equal(predicts(net), before)
    saved_and_loaded(net, convlora.remove(copy.deepcopy(net)))


@situation("a head is taken away", "adopted, what is left is saved")
def _() -> None:
    net = injected()
    net.fc = nn.Identity()
    convlora.adopt(net)
    assert convlora.summary(net).modules_to_save == ()
    saved_and_loaded(net, convlora.remove(copy.deepcopy(net)))


@situation("an adapted layer is replaced", "told; adopt refuses it")
def _() -> None:
    net = injected()
    net.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
    assert found(net) == ["stem"]
    refused(net, lambda: convlora.trainable_parameters(net), "stem.* was replaced")
    refused(net, lambda: convlora.adopt(net, "stem"), "stem: there is no new module")


@situation("a norm is replaced", "told before the training")
def _() -> None:
    net = injected()
    net.bn1 = nn.SyncBatchNorm(16)
    refused(net, lambda: convlora.trainable_parameters(net), "bn1.* was replaced")


@situation("a layer's and a norm's class is set back by hand", "told before the training")
def _() -> None:
    net = injected()
    net.stem.__class__, net.bn1.__class__ = nn.Conv2d, nn.BatchNorm2d
    assert found(net) == ["stem", "bn1"]
    refused(net, lambda: convlora.trainable_parameters(net), "stem: its class is Conv2d")


@situation("requires_grad_(True) on everything", "told before the training; the base's are named")
def _() -> None:
    net = injected().requires_grad_(True)
    with pytest.warns(UserWarning, match="requires a gradient but belongs to the base"):
        convlora.trainable_parameters(net)
    assert "stem.weight" in found(net) and not {"fc.weight", "stem.convlora.default.lora_A"} & set(found(net))


@situation("train() freezes the first stages", "told before the training, and the summary counts what trains")
def _() -> None:
    net = injected()
    for parameter in net.stem.parameters():
        parameter.requires_grad_(False)
    assert found(net) == ["stem"]
    with pytest.warns(UserWarning, match="stem: its factors are frozen"):
        convlora.trainable_parameters(net)
    assert convlora.summary(net).trainable_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)


@situation("the head is frozen from outside", "told before the training")
def _() -> None:
    net = injected()
    net.fc.requires_grad_(False)
    assert found(net) == ["fc.weight", "fc.bias"]


@situation("timm.utils.freeze", "refused where it would replace norms; else told before the training", "timm")
def _() -> None:
    from timm.utils import freeze

    net = injected()
    with pytest.raises(convlora.StateError, match="Frozen norms are constant already"):
        freeze(net)
    net = injected()
    freeze(net, include_bn_running_stats=False)
    with pytest.warns(UserWarning, match="its factors are frozen"):
        convlora.trainable_parameters(net)


@situation("statistics of a frozen norm are written or taken away by hand", "saved and told; taken away, refused")
def _() -> None:
    net = injected()
    net.bn1.running_mean.zero_()
    assert found(net) == ["bn1.running_mean"]
    saved_and_loaded(net, convlora.remove(copy.deepcopy(net)))
    net.bn1.running_mean = None
    refused(net, lambda: convlora.trainable_parameters(net), "the statistics were taken away")


@situation("a buffer is registered after injection", "told before the training")
def _() -> None:
    net = injected()
    net.stem.register_buffer("mask", torch.ones(1))
    assert found(net) == ["stem.mask"]


@situation("BackboneFinetuning, before or after our callback", "told when its epochs begin", "lightning")
def _() -> None:
    import lightning
    from lightning.pytorch.callbacks import BackboneFinetuning

    from convlora.lightning import AdapterCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = SmallNet()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.backbone(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.backbone.fc.parameters(), lr=0.1)

    for ours_first in (True, False):
        callbacks = [AdapterCallback(2, attribute="backbone"), BackboneFinetuning(1)]
        trainer = lightning.Trainer(
            max_epochs=2,
            callbacks=callbacks if ours_first else callbacks[::-1],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with pytest.warns(UserWarning, match=r"stem.weight: it requires a gradient but belongs to the base"):
            trainer.fit(Module(), DataLoader(cast(Any, IMAGES), batch_size=4))


# --- 3. state dicts -----------------------------------------------------------------------------------------------


# --- 4. averages --------------------------------------------------------------------------------------------------


# --- 5. what is trained and what is saved -------------------------------------------------------------------------


@situation("save_adapter of a wrapper that trains a head of its own", "refused, with the head's name")
def _() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = injected()
            self.head = nn.Linear(3, 2)

    wrapper = Wrapper()
    refused(wrapper, lambda: convlora.save_adapter(wrapper, "x"), r"head\.weight, head\.bias: trained outside")
    wrapper.head.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        convlora.save_adapter(wrapper, folder)


@situation("save_adapter of a trained module that was added inside the injected model", "refused, with its name")
def _() -> None:
    net = injected()
    net.extra = nn.Linear(3, 2)
    refused(net, lambda: convlora.save_adapter(net, "x"), r"extra\.weight requires a gradient")


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
