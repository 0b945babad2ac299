"""Whatever else touches an injected model: a table of situations, each with its right result.

A row is a function: its decorator says who does what to the model and what is right then, its body shows it. Either the
model predicts, trains and saves what it should, or the call is refused with the model whole.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import pytest
import torch
from conftest import SmallNet, dense_delta, need, randomise, snapshot, through_torch_save
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import convlora
from convlora import StateError, UnsupportedLayerError
from convlora._layer import kept
from convlora._layer.adapted import AdaptedLayer

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


@situation("Lightning's sync_batchnorm=True, which converts after its callbacks' setup", "refused", "lightning")
def _() -> None:
    from lightning.pytorch.plugins import TorchSyncBatchNorm

    for norm in ("freeze", "track"):
        net = injected(norm=norm)
        refused(net, lambda net=net: TorchSyncBatchNorm().apply(net), "convert before convlora.inject")


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
    refused(net, lambda: convlora.adopt(net, "stem"), "stem: no new module replaces")


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
    refused(
        net, lambda: convlora.trainable_parameters(net), "running_.* was removed, which a saved adapter cannot express"
    )


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


@situation("a layer's factors are deleted by hand", "one error names the layer, check lists it")
def _() -> None:
    def without_the_child(net: SmallNet) -> None:
        del net.stem._modules["convlora"]

    def without_the_adapter(net: SmallNet) -> None:
        del net.stem.convlora.default

    def without_a_factor(net: SmallNet) -> None:
        del net.stem.convlora.default.lora_B

    for damage in (without_the_child, without_the_adapter, without_a_factor):
        net = injected()
        damage(net)
        assert [finding.name for finding in convlora.check(net)] == ["stem"]
        calls: list[Callable[[nn.Module], object]] = [
            convlora.summary,
            convlora.merge,
            convlora.trainable_parameters,
            lambda net: list(convlora.adapter_parameters(net)),
            lambda net: convlora.save_adapter(net, "unwritten"),
        ]
        for call in calls:
            with pytest.raises(StateError, match="stem: the factors of adapter 'default' were deleted"):
                call(net)


@situation("save_adapter of a parametrized or pruned factor", "refused with the remedy, which serves; check lists it")
def _() -> None:
    def parametrized(lora: nn.Module) -> Callable[[], object]:
        parametrize.register_parametrization(lora, "lora_A", nn.Softplus())
        return lambda: parametrize.remove_parametrizations(lora, "lora_A")

    def pruned(lora: nn.Module) -> Callable[[], object]:
        prune.random_unstructured(lora, "lora_A", amount=0.5)
        return lambda: prune.remove(lora, "lora_A")

    for change in (parametrized, pruned):
        net = injected()
        remedy = change(net.stem.convlora.default)
        with tempfile.TemporaryDirectory() as directory:
            listed = [finding for finding in convlora.check(net) if finding.level == "unsaved"]
            assert [finding.name for finding in listed] == ["stem"]
            refused(net, lambda net=net: convlora.save_adapter(net, directory), "stem: .*remove_parametrizations")
            remedy()
            assert "stem" not in [finding.name for finding in convlora.check(net)]
            convlora.save_adapter(net, directory)
            torch.manual_seed(0)
            base = SmallNet()
            base.load_state_dict(convlora.remove(copy.deepcopy(net)).state_dict())
            assert torch.equal(predicts(convlora.load_adapter(base, directory)), predicts(net))


# --- 3. state dicts -----------------------------------------------------------------------------------------------


@situation("a merged model's state dict into the unmerged model, and the reverse", "refused, with the remedy")
def _() -> None:
    net = injected()
    unmerged, bare = net.state_dict(), {key: tensor.clone() for key, tensor in net.state_dict().items()}
    merged = convlora.merge(copy.deepcopy(net)).state_dict()
    buffer = io.BytesIO()
    torch.save(merged, buffer)
    buffer.seek(0)
    for state in (merged, torch.load(buffer, weights_only=True)):
        refused(net, lambda state=state: net.load_state_dict(state), "The state dict is of a merged model")
    wrapped = nn.Sequential(net)
    state = nn.Sequential(convlora.merge(copy.deepcopy(net))).state_dict()
    refused(net, lambda: wrapped.load_state_dict(state), "The state dict is of a merged model")
    convlora.merge(net)
    for state in (unmerged, bare):  # the latter without metadata, as from safetensors
        refused(net, lambda state=state: net.load_state_dict(state), "the state dict is of an unmerged one")
    before = predicts(net)
    net.load_state_dict(merged)
    assert torch.equal(predicts(net), before)
    plain = SmallNet()
    plain.load_state_dict(merged)
    assert torch.equal(predicts(plain), before)


@situation("a state dict of another active adapter, or of the base alone", "refused, with the remedy")
def _() -> None:
    net = injected()
    convlora.add_adapter(net, "other")
    state = copy.deepcopy(net.state_dict())
    with convlora.disable_adapter(net):
        of_base = copy.deepcopy(net.state_dict())
    refused(net, lambda: net.load_state_dict(of_base), "of 'the base', and the model has those of 'default'")
    convlora.set_adapter(net, "other")
    refused(net, lambda: net.load_state_dict(state), r"set_adapter\(model, 'default'\)")
    convlora.set_adapter(net, "default").load_state_dict(state)
    net.load_state_dict(SmallNet().state_dict())  # a base's, as ever


@situation("a merged model's file of safetensors into the unmerged model", "refused: W + ΔW is told from a base's W")
def _() -> None:
    for options in ({}, {"use_dora": True}):
        net = injected(**options)
        state = {key: tensor.clone() for key, tensor in convlora.merge(copy.deepcopy(net)).state_dict().items()}
        refused(net, lambda net=net, state=state: net.load_state_dict(state), "The state dict is of a merged model")
        wrapped, inside = nn.Sequential(net), {f"0.{key}": tensor for key, tensor in state.items()}
        refused(net, lambda net=wrapped, state=inside: net.load_state_dict(state), "The state dict is of a merged")
        with convlora.disable_adapter(net):
            net.load_state_dict(SmallNet().state_dict())
    net = convlora.inject(SmallNet(), 2)  # fresh: merged, it is the base
    net.load_state_dict({key: t.clone() for key, t in convlora.merge(copy.deepcopy(net)).state_dict().items()})


@situation(
    "a base's checkpoint loaded after injection", "all of the base is the checkpoint's, its head and statistics too"
)
def _() -> None:
    torch.manual_seed(3)
    other = SmallNet()
    other.train()(IMAGES - 2)
    for prefix, assign, disabled in (("", False, False), ("", True, False), ("0.", False, False), ("", False, True)):
        net = injected(norm="freeze")
        convlora.add_adapter(net, "tracks", norm="track")
        convlora.set_adapter(net, "tracks").train()(IMAGES + 1)
        tracked = net.bn1.running_mean.clone()
        convlora.set_adapter(net, "default").bn1.weight.requires_grad_(False)
        state = {f"{prefix}{key}": tensor.clone() for key, tensor in other.state_dict().items()}
        with torch.no_grad():
            net.fc.weight += 1  # trained
        head = {key: tensor for key, tensor in state.items() if "fc." in key}
        bits = bits_of(convlora.remove(copy.deepcopy(net)))
        (nn.Sequential(net) if prefix else net).load_state_dict(head, strict=False)  # the adapter's alone
        assert bits_of(convlora.remove(copy.deepcopy(net))) == bits
        with torch.no_grad():
            net.fc.weight += 1
        with convlora.disable_adapter(net) if disabled else contextlib.nullcontext():
            (nn.Sequential(net) if prefix else net).load_state_dict(state, assign=assign)
        assert torch.equal(net.bn1.running_mean, other.bn1.running_mean)
        assert torch.equal(net.fc.weight, other.fc.weight) is not disabled
        assert torch.equal(convlora.set_adapter(net, "tracks").bn1.running_mean, tracked)  # its own
        assert bits_of(convlora.remove(net)) == bits_of(other)


# --- 4. averages --------------------------------------------------------------------------------------------------


def _saved_average_is_read_on_its_base(average: nn.Module, update: Callable[[nn.Module], None]) -> None:
    """Train, average after each step, save the average: the file fits the base, and predicts like the average."""
    torch.manual_seed(0)
    base, images = SmallNet(), torch.randn(4, 3, 16, 16)
    model = average.net
    optimizer = torch.optim.SGD(convlora.trainable_parameters(model), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        update(model)
    copied = average.module
    assert not torch.equal(copied.hidden.weight, base.hidden.weight)  # rounded anew
    with tempfile.TemporaryDirectory() as folder:
        convlora.save_adapter(copied, folder)
        with pytest.warns(UserWarning, match="by rounding alone"):
            convlora.load_adapter(base, folder)
        torch.testing.assert_close(base.eval()(images), copied.eval()(images), rtol=1e-5, atol=1e-6)
        other = SmallNet()  # of other numbers
        with pytest.raises(convlora.CheckpointError, match="the base's weights differ"):
            convlora.load_adapter(other, folder)
        changed = SmallNet()
        changed.load_state_dict(convlora.remove(base).state_dict())
        with torch.no_grad():
            changed.stem.weight.copy_(changed.stem.weight.flip(1))  # BGR: the same numbers elsewhere
        with pytest.raises(convlora.CheckpointError, match=r"stem\.weight: the base's weights differ"):
            convlora.load_adapter(changed, folder)


def _averaging(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = convlora.inject(SmallNet(), 2).train()
    average = make(net)
    vars(average)["net"] = net
    return average


@situation("torch's AveragedModel as an EMA", "its file fits the base, rounding is told")
def _() -> None:
    swa = torch.optim.swa_utils
    average = _averaging(lambda net: swa.AveragedModel(net, avg_fn=swa.get_ema_avg_fn(0.9)))
    _saved_average_is_read_on_its_base(average, average.update_parameters)


@situation("timm's ModelEmaV2", "its file fits the base, rounding is told", "timm")
def _() -> None:
    import timm.utils

    average = _averaging(lambda net: timm.utils.ModelEmaV2(net, decay=0.9))
    _saved_average_is_read_on_its_base(average, average.update)


@situation("an EMA by hand over the parameters", "its file fits the base, rounding is told")
def _() -> None:
    average = _averaging(lambda net: nn.ModuleDict({"module": copy.deepcopy(net)}))

    def update(net: nn.Module) -> None:
        with torch.no_grad():
            for mean, now in zip(average.module.parameters(), net.parameters(), strict=True):
                mean.mul_(0.9).add_(now * (1 - 0.9))

    _saved_average_is_read_on_its_base(average, update)


def _fit_with(
    averaging: Callable[[], Any], ours_first: bool, folder: str, epochs: int, resume: str | None = None
) -> Any:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from convlora.lightning import AdapterCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = SmallNet()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(convlora.trainable_parameters(self), lr=0.05)

    images, labels = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 3
    module, callbacks = Module(), [AdapterCallback(2), averaging()]
    saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1, enable_version_counter=False)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[*(callbacks if ours_first else callbacks[::-1]), saver],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    trainer.fit(module, loader, ckpt_path=resume)
    return module.model


def _lightning_average(averaging: Callable[[], Any], ours_first: bool) -> None:
    images = torch.randn(4, 3, 16, 16)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = _fit_with(averaging, ours_first, folder, 4)
        convlora.save_adapter(trained, f"{folder}/adapter")
        torch.manual_seed(0)
        plain = convlora.load_adapter(SmallNet(), f"{folder}/adapter")
        torch.testing.assert_close(plain.eval()(images), trained.eval()(images), rtol=1e-5, atol=1e-6)
        _fit_with(averaging, ours_first, folder, 5, f"{folder}/last.ckpt")  # its checkpoint is read


for _first in (True, False):
    _order = "after" if _first else "before"

    @situation(f"Lightning's SWA {_order} AdapterCallback", "what is saved loads and predicts the same", "lightning")
    def _(first: bool = _first) -> None:
        from lightning.pytorch.callbacks import StochasticWeightAveraging

        _lightning_average(lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2), first)

    @situation(f"Lightning's EMA {_order} AdapterCallback", "what is saved loads and predicts the same", "lightning")
    def _(first: bool = _first) -> None:
        callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
        _lightning_average(lambda: callbacks.EMAWeightAveraging(decay=0.9), first)


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


class NormedHead(SmallNet):
    """A head of several layers, with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 3))


HALVES = [(net, dtype) for net in (SmallNet, NormedHead) for dtype in (torch.bfloat16, torch.float16)]


def _half(net: type[SmallNet], dtype: torch.dtype, **options: Any) -> tuple[SmallNet, SmallNet]:
    """A base in half precision, and the same injected."""
    torch.manual_seed(0)
    base = net().to(dtype).eval()
    return base, convlora.inject(copy.deepcopy(base), 2, **({"modules_to_save": "fc"} | options))


@situation("a head trained on a half-precision base", "fp32, moves by small steps, begins at the base's bits")
def _() -> None:
    for build, dtype in HALVES:
        base, net = _half(build, dtype)
        x = IMAGES.to(dtype)
        with torch.no_grad():
            assert torch.equal(net(x), base(x))
        head = list(net.fc.parameters())
        assert {p.dtype for p in convlora.trainable_parameters(net)} == {torch.float32}
        assert {p.dtype for p in base.parameters()} == {dtype} and net.stem.weight.dtype == dtype
        before = [p.detach().clone() for p in head]
        optimizer = torch.optim.AdamW(head, lr=1e-5, weight_decay=0.0)
        net.train()
        for _ in range(4):
            optimizer.zero_grad()
            net(x).float().square().mean().backward()
            optimizer.step()
        moved = sum(int((p != q).sum()) for p, q in zip(head, before, strict=True))
        assert moved > 0.95 * sum(int((p.grad != 0).sum()) for p in head if p.grad is not None)


@situation("GradScaler on a base in fp16", "steps")
def _() -> None:
    _, net = _half(SmallNet, torch.float16)
    parameters = list(convlora.trainable_parameters(net))
    optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in net.fc.parameters()]
    scaler.scale(net.train()(IMAGES.half()).float().square().mean()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(net.fc.parameters(), before, strict=True))


@situation(
    "a half-precision base whose head was trained in fp32",
    "saved, loaded, copied, switched, routed, disabled, merged and removed to the bit",
)
def _() -> None:
    for build, dtype in HALVES:
        base, net = _half(build, dtype)
        x = IMAGES.to(dtype)

        def shift(model: nn.Module, by: float) -> None:
            with torch.no_grad():
                for p in convlora.trainable_parameters(model):
                    p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))

        shift(net, 0.05)
        net.eval()
        with torch.no_grad():
            right, plain = net(x), base(x)
            assert not torch.equal(right, plain)
            with tempfile.TemporaryDirectory() as directory:
                convlora.save_adapter(net, directory)
                again = convlora.load_adapter(copy.deepcopy(base), directory).eval()
            assert torch.equal(again(x), right)
            assert all(torch.equal(p, q) for p, q in zip(again.fc.parameters(), net.fc.parameters(), strict=True))
            for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
                assert torch.equal(twin(x), right) and next(twin.fc.parameters()).dtype == torch.float32
            with convlora.disable_adapter(net):
                assert torch.equal(net(x), plain)
            convlora.add_adapter(net, "b", 2, modules_to_save="fc")
            convlora.set_adapter(net, "b")
            assert torch.equal(net.eval()(x), plain)
            shift(net, 0.07)
            other = net(x)
            convlora.set_adapter(net, "default")
            assert torch.equal(net.eval()(x), right)
            with convlora.use_adapters(net, ["default", "b", None, "b"]):
                routed = net(x)
            wanted = torch.stack([right[0], other[1], plain[2], other[3]])
            torch.testing.assert_close(routed, wanted, rtol=0.02, atol=0.02)  # sizes of batches round otherwise
            assert torch.equal(convlora.merge(net)(x), right)
            assert torch.equal(convlora.unmerge(net)(x), right)
            merged = convlora.remove(convlora.merge(copy.deepcopy(net)))
            assert torch.equal(merged(x), right) and {p.dtype for p in merged.parameters()} == {dtype}
            assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
            convlora.remove(net)
        assert [type(m) for m in net.modules()] == [type(m) for m in base.modules()]
        for key, tensor in base.state_dict().items():
            assert torch.equal(net.state_dict()[key], tensor) and net.state_dict()[key].dtype == tensor.dtype


@situation("a half-precision base cast to fp32 or fp64 while injected, and removed", "all of it in that dtype")
def _() -> None:
    for dtype in (torch.float32, torch.float64):
        base, net = _half(SmallNet, torch.bfloat16)
        net.to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(net(IMAGES.to(dtype)), copy.deepcopy(base).to(dtype)(IMAGES.to(dtype)))
        assert {p.dtype for p in convlora.remove(net).parameters()} == {dtype}
        assert torch.equal(net.fc.weight, base.fc.weight.to(dtype))


@situation("a layer of a half-precision base: a head for one adapter, adapted by another", "each computes and trains")
def _() -> None:
    x = IMAGES.bfloat16()
    in_full, adapted = {"modules_to_save": "fc"}, {"target_modules": "fc", "modules_to_save": None}
    for first, second in ((in_full, adapted), (adapted, in_full)):
        base, net = _half(SmallNet, torch.bfloat16, **first)
        with (
            pytest.warns(UserWarning, match="AdaptedLinear.*stays bfloat16")
            if first is adapted
            else contextlib.nullcontext()
        ):
            convlora.add_adapter(net, "b", 2, **second)
        for name in ("b", "default", "b"):
            convlora.set_adapter(net, name)
            assert torch.equal(net.eval()(x), base(x))
            net(x).float().sum().backward()
        convlora.add_adapter(net, "c", 2, **adapted)  # planned on what the two have made of it
        convlora.set_adapter(net, "c")
        randomise(net)
        with tempfile.TemporaryDirectory() as directory:
            convlora.save_adapter(net, directory)
            loaded = convlora.load_adapter(copy.deepcopy(base), directory)
        for twin in (loaded, through_torch_save(net)):
            assert torch.equal(twin.eval()(x), net(x)) and not torch.equal(net(x), base(x))
            assert convlora.summary(twin).layers[-1].kind == "Linear"
        convlora.remove(net)
        assert type(net.fc) is nn.Linear and torch.equal(net.fc.weight, base.fc.weight)


@situation("tied weights in a head on a half-precision base", "fp32, tied still, and the base's again after remove")
def _() -> None:
    base = SmallNet()
    base.fc = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    base.fc[2].weight = base.fc[0].weight
    base.to(torch.bfloat16).eval()
    net, x = convlora.inject(copy.deepcopy(base), 2, modules_to_save="fc"), IMAGES.bfloat16()
    weights = [net.fc[at]._parameters["weight"] for at in (0, 2)]
    assert weights[0] is weights[1] and weights[0].dtype == torch.float32
    net(x).float().sum().backward()
    assert weights[0].grad is not None and torch.equal(net(x), base(x))
    merged = convlora.remove(convlora.merge(copy.deepcopy(net)))
    for model in (merged, convlora.remove(net)):
        assert model.fc[0].weight is model.fc[2].weight and model.fc[0].weight.dtype == torch.bfloat16


@situation(
    "a file with a head in half precision, as older releases wrote", "loads into the same base, its head in fp32"
)
def _() -> None:
    base, net = _half(SmallNet, torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        convlora._layer.masters.restore_dtypes(net.fc, {})
        convlora.save_adapter(net, directory)
        again = convlora.load_adapter(copy.deepcopy(base), directory).eval()
    assert again.fc._parameters["weight"].dtype == torch.float32
    assert torch.equal(again(IMAGES.bfloat16()), base(IMAGES.bfloat16()))


@situation("torch.compile(fullgraph=True) of a half-precision base with a trained head", "one graph, eager's numbers")
def _() -> None:
    _, net = _half(SmallNet, torch.bfloat16)
    x = IMAGES.bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).float().sum().backward()
    assert net.fc.weight.dtype == torch.bfloat16 and net.fc._parameters["weight"].grad is not None


@situation("autocast on a CPU, padding not zeros", "the dtype of torch's own layer, in training as in inference")
def _() -> None:
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for cls, dims in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)):
            if (mode, cls) == ("reflect", nn.Conv3d):
                continue  # torch pads no bf16 there
            layer, x = cls(4, 8, 3, padding=1, padding_mode=mode), torch.randn(2, 4, *[5] * dims)
            with torch.autocast("cpu", torch.bfloat16):
                own = layer(x).detach()
            convlora.inject(layer, 2, target_modules=cls, modules_to_save=None)
            for path in ("auto", "fused", "weight", "branch"):
                layer.convlora["default"].path = path
                with torch.autocast("cpu", torch.bfloat16):
                    y = layer(x)
                    with torch.no_grad():
                        assert torch.equal(layer(x), own)
                assert y.requires_grad and y.dtype == own.dtype == torch.bfloat16 and torch.equal(y, own)


@situation(
    "injecting into a base in float8", "refused, with the layer's name, its dtype and what to do; nothing changes"
)
def _() -> None:
    net = SmallNet()
    net.stem.to(torch.float8_e4m3fn)
    classes = [type(module) for module in net.modules()]
    with pytest.raises(UnsupportedLayerError, match=r"stem.*float8_e4m3fn.*exclude_modules.*Nothing was changed"):
        convlora.inject(net, 2)
    assert [type(module) for module in net.modules()] == classes
    convlora.inject(net, 2, exclude_modules="stem")


# --- 7. several processes -----------------------------------------------------------------------------------------


@situation(
    "set_adapter on a DDP-wrapped model", "refused with the remedy; on the model inside and wrapped again it trains"
)
def _() -> None:
    from torch import distributed

    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    net = convlora.inject(SmallNet(), 2)
    convlora.add_adapter(net, "b", 2)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(net)
        before = snapshot(net)
        with pytest.raises(convlora.UnsupportedLayerError, match="wrap it again"):
            convlora.set_adapter(ddp, "b")
        assert snapshot(net) == before
        with pytest.warns(UserWarning, match="Wrap the model again before you train"):
            convlora.set_adapter(ddp.module, "b")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convlora.set_adapter(ddp.module, "b")  # is active already
            other = convlora.inject(SmallNet(), 2)
            convlora.add_adapter(other, "b", 2)
            convlora.set_adapter(other, "b")  # no DDP holds this one
        ddp = nn.parallel.DistributedDataParallel(net)
        ddp(torch.randn(4, 3, 16, 16)).sum().backward()
        assert all(p.grad is not None for p in convlora.trainable_parameters(net))
    finally:
        distributed.destroy_process_group()


@situation("FSDP1 takes parameters out and puts views in", "trains; merging, saving and removing are refused")
def _() -> None:
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    alone, net = injected(), injected()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process does not shard, of which torch warns
            wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        for model in (alone, wrapped):
            model(IMAGES).square().mean().backward()
        grads = {name.replace("_fsdp_wrapped_module.", ""): p.grad for name, p in wrapped.named_parameters()}
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(wrapped(IMAGES), alone(IMAGES))
        for call in (convlora.merge, convlora.remove, lambda model: convlora.save_adapter(model, "never")):
            with pytest.raises(StateError, match="sharded over processes"):
                call(net)
            with pytest.raises(StateError, match="sharded over processes"):
                call(wrapped)
    finally:
        distributed.destroy_process_group()


@situation("FSDP1 without the original parameters over a frozen base", "torch refuses; the model is whole after it")
def _() -> None:
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    net = injected()
    before, bits = predicts(net), bits_of(net)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings(), pytest.raises(ValueError, match="uniform `requires_grad`"):
            warnings.simplefilter("ignore")
            FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    finally:
        distributed.destroy_process_group()
    assert torch.equal(predicts(net), before)
    assert bits_of(net) == bits
    convlora.unmerge(convlora.merge(net))
    assert torch.equal(predicts(net), before)


def _offloaded(how: str, net: nn.Module, directory: str) -> nn.Module:
    import accelerate

    cpu = torch.device("cpu")
    if how == "cpu_offload":
        return cast(nn.Module, accelerate.cpu_offload(net, cpu))
    if how == "disk_offload":
        return cast(nn.Module, accelerate.disk_offload(net, directory, cpu))
    parts = {name: "disk" if name == "stem" else "cpu" for name, _ in net.named_children()}
    return cast(nn.Module, accelerate.dispatch_model(net, parts, main_device="cpu", offload_dir=directory))


@situation(
    "accelerate offloads the factors to memory or disk",
    "predicts; merging, saving and switching say so; whole without the hooks",
    "accelerate",
)
def _() -> None:
    from accelerate.hooks import remove_hook_from_submodules

    net = injected()
    convlora.add_adapter(net, "b", 2)
    before = predicts(net)
    for how in ("cpu_offload", "disk_offload", "dispatch_model"):
        net.eval()
        with tempfile.TemporaryDirectory() as directory:
            offloaded = _offloaded(how, net, directory)
            for _ in range(2):
                assert torch.equal(predicts(offloaded), before), how
                assert net.stem.convlora.default.lora_A.is_meta and net.stem.weight.is_meta
            for call in (
                convlora.merge,
                lambda model: convlora.save_adapter(model, "never"),
                lambda model: convlora.set_adapter(model, "b"),
            ):
                with pytest.raises(StateError, match="on the meta device"):
                    call(net)
            remove_hook_from_submodules(net)
        assert torch.equal(predicts(net), before)
    convlora.unmerge(convlora.merge(net))
    assert torch.equal(predicts(net), before)


# --- 8. forwards on the instance ----------------------------------------------------------------------------------


def plain_of(net: SmallNet) -> SmallNet:
    """A network without adapters whose weights are what the adapted ones are by definition."""
    plain = SmallNet().eval()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if ".convlora." not in key})
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, AdaptedLayer):
                plain.get_submodule(name).weight += dense_delta(layer)
    return plain


def is_right(net: SmallNet) -> bool:
    """Whether the model predicts with W + ΔW, the first time and again."""
    expected = predicts(plain_of(net))
    return all(torch.allclose(predicts(net), expected, rtol=1e-4, atol=1e-4) for _ in range(2))


def wrapped(layer: nn.Module) -> None:
    """As a user does it."""
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]


def hooked(layer: nn.Module) -> None:
    """As accelerate does it."""
    hooks = need("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def bound(layer: nn.Module) -> None:
    """As patches do it that begin from the class."""
    layer.forward = MethodType(nn.Conv2d.forward, layer)  # type: ignore[method-assign]


def drops(net: SmallNet) -> bool:
    """Whether dropout moves what the convolution called stem computes in training."""
    net.train()
    torch.manual_seed(0)
    return not torch.equal(net.stem(IMAGES), net.stem(IMAGES))


@situation("a forward on the instance before injection", "right without dropout; with dropout refused, nothing changes")
def _() -> None:
    for put in (wrapped, hooked, bound):
        net = SmallNet()
        put(net.stem)
        before = snapshot(net)
        with pytest.raises(UnsupportedLayerError, match=r"stem: dropout would not be applied.*Nothing was changed"):
            convlora.inject(net, 2, dropout=0.5)
        assert snapshot(net) == before
        convlora.inject(net, 2, dropout=0.5, exclude_modules="stem")
        convlora.remove(net)
        convlora.inject(net, 2)
        randomise(net)
        assert is_right(net)
        net.stem(IMAGES).sum().backward()
        lora = net.stem.convlora["default"]
        grads = lora.lora_A.grad, lora.lora_B.grad
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
        convlora.merge(net)
        assert is_right(convlora.unmerge(net))


@situation("a forward on the instance of a linear layer before injection with dropout", "refused, nothing changes")
def _() -> None:
    net = SmallNet()
    wrapped(net.hidden)
    before = snapshot(net)
    with pytest.raises(UnsupportedLayerError, match="hidden: dropout"):
        convlora.inject(net, 2, target_modules=nn.Linear, dropout=0.5, modules_to_save=None)
    assert snapshot(net) == before


@situation("a wrapped forward after injection, then merge, unmerge, remove", "right in each state, dropout applied")
def _() -> None:
    for put in (wrapped, hooked):
        net = injected(dropout=0.5)
        put(net.stem)
        assert is_right(net) and drops(net)
        expected = predicts(net)
        convlora.merge(net)
        assert torch.equal(predicts(net), expected) and torch.equal(predicts(copy.deepcopy(net)), expected)
        assert not drops(net)  # one weight, no branch
        convlora.unmerge(net)
        assert torch.equal(predicts(net), expected) and drops(net)
        convlora.remove(net)
        assert torch.equal(predicts(net), predicts(plain_of(net)))


@situation("accelerate's hook put on injected and taken off merged or removed", "right", "accelerate")
def _() -> None:
    from accelerate.hooks import remove_hook_from_module

    for leave in (convlora.merge, convlora.remove):
        net = injected()
        hooked(net.stem)
        expected = predicts(leave(injected()))
        assert torch.equal(predicts(leave(net)), expected)
        remove_hook_from_module(net.stem)
        assert torch.equal(predicts(net), expected)


@situation(
    "a forward that calls the plain class's, put there merged or injected", "right; dropout in training: refused"
)
def _() -> None:
    for put, merged in ((wrapped, True), (hooked, True), (bound, True), (bound, False)):
        net = injected(dropout=0.5)
        if merged:
            convlora.merge(net)
        put(net.stem)
        if merged:
            convlora.unmerge(net)
        assert is_right(net)
        with pytest.raises(StateError, match=r"calls Conv2d\.forward.*dropout=0\.5 would not be applied"):
            net.train()(IMAGES)
        _ = net.stem.weight  # anyone else may read it
        net.stem.convlora["default"].dropout = 0.0
        net.train()(IMAGES).sum().backward()


@situation("the class's forward called by hand on an adapted layer", "right; with dropout in training: refused")
def _() -> None:
    net = injected(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(nn.Conv2d.forward(net.eval().stem, IMAGES), net.stem(IMAGES))
    with pytest.raises(StateError, match="dropout"):
        nn.Conv2d.forward(net.train().stem, IMAGES)


@situation("_conv_forward replaced on the instance, as patches for seamless tiling do", "its convolution with W + ΔW")
def _() -> None:
    def tiled(layer: Any, x: Any, weight: Any, bias: Any) -> Any:
        x = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(x, weight, bias, layer.stride)

    net = injected()
    plain = plain_of(net)
    for each in (net, plain):
        each.stem._conv_forward = MethodType(tiled, each.stem)  # type: ignore[method-assign]
    torch.testing.assert_close(predicts(net), predicts(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.train().stem(IMAGES), plain.stem(IMAGES), rtol=1e-4, atol=1e-4)


# --- 9. the kept weight -------------------------------------------------------------------------------------------


def adapted_conv(base: type[nn.Conv2d] = nn.Conv2d) -> Any:
    """A layer whose effective weight is kept by now."""
    torch.manual_seed(0)
    layer = convlora.inject(base(3, 8, 3), 2, modules_to_save=None)
    randomise(layer, 0.3)
    with torch.no_grad():
        layer(IMAGES)
    return layer


def follows(layer: Any) -> None:
    """The layer computes with what its tensors are now, the first time and again."""
    with torch.no_grad():
        weight = convlora.base_weight(layer) + dense_delta(layer)
        expected = nn.functional.conv2d(IMAGES, weight, layer.bias)
        for _ in range(2):
            torch.testing.assert_close(layer(IMAGES), expected, rtol=1e-4, atol=1e-4)


class Blind(kept._Seen):
    """A tensor in a memory that Python cannot read, as on an accelerator."""

    def __init__(self, tensor: torch.Tensor, is_probed: bool) -> None:
        super().__init__(tensor, is_probed)
        self._copy = None


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@situation("a parametrized factor, written between forwards", "followed")
def _() -> None:
    layer = adapted_conv()
    lora = layer.convlora["default"]
    nn.utils.parametrize.register_parametrization(lora, "lora_A", Doubled())
    follows(layer)
    for write in (lambda t: t.add_(1), lambda t: t.data.mul_(0.5), lambda t: t.numpy().__imul__(3)):
        with torch.no_grad():
            write(lora.parametrizations.lora_A.original)
        follows(layer)


@situation("a pruned factor, trained", "followed, and trained through its mask")
def _() -> None:
    layer = adapted_conv()
    lora = layer.convlora["default"]
    prune.l1_unstructured(lora, "lora_A", 0.5)
    optimizer = torch.optim.SGD([lora.lora_A_orig, lora.lora_B], lr=0.1)
    for _ in range(2):
        layer(IMAGES).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            y, A = layer(IMAGES), lora.lora_A_orig * lora.lora_A_mask
            weight = convlora.base_weight(layer) + lora.scaling * (lora.lora_B @ A.flatten(1)).view(8, 3, 3, 3)
        torch.testing.assert_close(y, nn.functional.conv2d(IMAGES, weight, layer.bias), rtol=1e-4, atol=1e-4)


@situation("a base trained by hand, the factors frozen", "followed, also where no number can be compared")
def _() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "_Seen", Blind)
        layer = adapted_conv()
        layer.convlora.requires_grad_(False)
        weight = convlora.base_weight(layer).requires_grad_(True)
        for _ in range(2):
            layer(IMAGES).square().mean().backward()
            weight.data.sub_(weight.grad, alpha=0.5)
            follows(layer)


@situation("a base averaged, rounded or loaded past torch's counters, without training", "followed on a CPU")
def _() -> None:
    layer = adapted_conv()
    weight = convlora.base_weight(layer)
    for write in (
        lambda: weight.data.mul_(0.9),
        lambda: weight.data.copy_(weight.detach().bfloat16()),
        lambda: weight.detach().numpy().__iadd__(0.5),
        lambda: weight.data.copy_(torch.randn_like(weight)),
    ):
        write()
        follows(layer)
    small = weight.data[3]  # 8 · 27 numbers: each channel has a probed one
    small.zero_()
    follows(layer)


@situation("a forward under FakeTensorMode", "fake, and nothing of it stays")
def _() -> None:
    for entered_first in (True, False):
        layer = adapted_conv()
        if entered_first:
            convlora.base_weight(layer).data.mul_(1)
            layer.convlora.kept.clear()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            assert isinstance(layer(mode.from_tensor(IMAGES)), FakeTensor)
        follows(layer)


@situation("a forward under a mode of torch's dispatcher (a FLOP counter, a logger)", "right, and nothing of it stays")
def _() -> None:
    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return torch.zeros_like(result) if func is torch.ops.aten.addmm.default else result

    layer = adapted_conv()
    layer.convlora.kept.clear()
    with torch.no_grad(), Zeros():
        zeros = layer(IMAGES)
    assert torch.equal(zeros, zeros[:1, :, :1, :1].expand_as(zeros) * 0 + layer.bias.view(-1, 1, 1))
    follows(layer)


@situation("make_fx of a forward, the factors written afterwards", "the graph computes W + ΔW of its own and follows")
def _() -> None:
    layer = adapted_conv()
    with torch.no_grad():
        traced = make_fx(layer)(IMAGES)
        for _ in range(2):
            torch.testing.assert_close(traced(IMAGES), layer(IMAGES), rtol=1e-4, atol=1e-4)
            layer.convlora["default"].lora_B.mul_(2)
    follows(layer)


@situation(
    "another thread writes into layer.weight while the layer's forward is under way", "its own copy; nobody's else"
)
def _() -> None:
    started, go_on, paused = threading.Event(), threading.Event(), [False]

    class Slow(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if paused[0]:
                started.set()
                go_on.wait(10)
            return nn.functional.conv2d(x, self.weight, self.bias)

    def forward() -> None:
        with torch.no_grad():
            layer(IMAGES)

    layer = adapted_conv(Slow)
    paused[0] = True
    thread = threading.Thread(target=forward)
    thread.start()
    started.wait(10)
    layer.weight.data.zero_()
    go_on.set()
    thread.join()
    paused[0] = False
    follows(layer)


@situation("a scaling that is a tensor, written in place", "followed")
def _() -> None:
    layer = adapted_conv()
    lora = layer.convlora["default"]
    lora.scaling = torch.tensor(lora.scaling)
    for _ in range(2):
        follows(layer)
        lora.scaling.mul_(2)


@situation("torch.utils.swap_tensors on a factor", "followed")
def _() -> None:
    layer = adapted_conv()
    lora = layer.convlora["default"]
    layer.convlora.kept.clear()
    torch.utils.swap_tensors(lora.lora_B, nn.Parameter(torch.randn_like(lora.lora_B)))
    follows(layer)
    layer.convlora.kept.clear()
    torch.utils.swap_tensors(lora.lora_B, nn.Parameter(torch.randn_like(lora.lora_B)))
    follows(layer)


@situation(
    "peft's hotswap_adapter on registered layers",
    "the new adapter, whatever scalings are and memory can be read",
    "peft",
)
def _() -> None:
    import peft
    from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

    import convlora.peft

    def made(alpha: int, seed: int) -> Any:
        torch.manual_seed(0)
        net = SmallNet().eval()
        config = convlora.peft.register(peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["stem"]))
        model = peft.get_peft_model(net, config).eval()
        layer = model.base_model.model.stem
        torch.manual_seed(seed)
        with torch.no_grad():
            for factor in (layer.lora_A, layer.lora_B):
                nn.init.normal_(factor["default"].weight)
        return model

    for seen in (kept._Seen, Blind):
        for alphas in ((4, 4), (4, 8)):
            for as_tensors in (False, True):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(kept, "_Seen", seen)
                    model, other = made(alphas[0], 1), made(alphas[1], 2)
                    if as_tensors:
                        prepare_model_for_compiled_hotswap(model, config=model.peft_config)
                        prepare = model.base_model.model.stem.scaling["default"]
                        assert isinstance(prepare, torch.Tensor)
                    before = predicts(model)
                    assert torch.equal(predicts(model), before)
                    weights = {key: value for key, value in other.state_dict().items() if "lora_" in key}
                    hotswap_adapter_from_state_dict(model, weights, "default", other.peft_config["default"])
                    for _ in range(2):
                        torch.testing.assert_close(predicts(model), predicts(other), rtol=1e-4, atol=1e-4)
                    assert not torch.allclose(predicts(model), before, rtol=1e-2)


# --- 10. autograd and tracing -------------------------------------------------------------------------------------


GEOMETRIES = [(3, 1, 1), (3, 2, 1), (1, 1, 1), (1, 2, 1), (5, 1, 16), (3, 1, 4)]
"""Kernel, stride, groups."""


@situation("autograd.grad(is_grads_batched=True) over an adapted convolution", "as one after another, on every path")
def _() -> None:
    for (kernel, stride, groups), last in itertools.product(GEOMETRIES, (False, True)):
        torch.manual_seed(0)
        layer: Any = nn.Conv2d(16, 16, kernel, stride, kernel // 2, groups=groups, dtype=torch.float64)
        convlora.inject(layer, 2, modules_to_save=None)
        randomise(layer)
        x = torch.randn(2, 16, 18, 18, dtype=torch.float64)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        lora = layer.convlora["default"]
        wanted = [x.requires_grad_(), lora.lora_A, lora.lora_B]
        for path in ("fused", "weight", "branch"):
            lora.path = path
            y = layer(x)
            many = torch.randn(3, *y.shape, dtype=torch.float64)
            together = torch.autograd.grad(y, wanted, many, retain_graph=True, is_grads_batched=True)
            each = [torch.autograd.grad(y, wanted, one, retain_graph=True) for one in many]
            for got, expected in zip(together, zip(*each, strict=True), strict=True):
                torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-10)


@situation("jacobian(vectorize=True) of a network, dropout, DoRA and linear layers too", "as without vectorize")
def _() -> None:
    for options in ({}, {"use_dora": True}, {"target_modules": (nn.Linear, nn.Conv2d)}, {"dropout": 0.5}):
        net = injected(**options).double().train()

        def run(x: torch.Tensor, net: Any = net) -> Any:
            torch.manual_seed(0)
            return net(x)

        x = IMAGES[:2, :, :8, :8].double()
        slow = torch.autograd.functional.jacobian(run, x)
        fast = torch.autograd.functional.jacobian(run, x, vectorize=True)
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@situation("torch.func: jacrev, vmap, jvp and a gradient by functional_call", "as plain autograd")
def _() -> None:
    net = injected().double().eval()
    x = IMAGES[:2, :, :8, :8].double()
    own = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def loss(tensors: Any) -> Any:
        return torch.func.functional_call(net, tensors, (x,)).square().sum()

    net(x).square().sum().backward()
    for name, grad in torch.func.grad(loss)(own).items():
        torch.testing.assert_close(grad, net.get_parameter(name).grad, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(net, x)
    torch.testing.assert_close(torch.func.jacrev(net)(x), jacobian, rtol=1e-9, atol=1e-9)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, tangent))
        forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(forward, (jacobian * tangent).sum((2, 3, 4, 5)), rtol=1e-9, atol=1e-9)
    singly = torch.func.vmap(lambda one: net(one[None])[0])(x)
    torch.testing.assert_close(singly, net(x), rtol=1e-9, atol=1e-9)


def gradients_of(net: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    net.zero_grad()
    run().square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@situation("save_on_cpu, checkpoint, anomaly mode, deterministic algorithms, retain_graph", "the same gradients")
def _() -> None:
    for path in ("fused", "weight", "branch"):
        net = injected(training_path=path).train()

        def run(net: Any = net) -> torch.Tensor:
            return net(IMAGES)

        expected = gradients_of(net, run)
        assert len(expected) > 6
        with torch.autograd.graph.save_on_cpu():
            saved = gradients_of(net, run)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
            packed = gradients_of(net, run)
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            checked = gradients_of(net, run)
        again = gradients_of(net, lambda: checkpoint(run, use_reentrant=False))
        torch.use_deterministic_algorithms(True)
        try:
            determined = gradients_of(net, run)
        finally:
            torch.use_deterministic_algorithms(False)
        net.zero_grad()
        loss = net(IMAGES).square().mean()
        loss.backward(retain_graph=True)
        net.zero_grad()
        loss.backward()
        twice = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        for each in (saved, packed, checked, again, determined, twice):
            assert each.keys() == expected.keys()
            assert all(torch.equal(each[name], expected[name]) for name in expected)


class Reader(nn.Module):
    """A network whose code reads its convolutions' weights: their dtype, as timm's do, and one as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Conv2d(3, 8, 3)
        self.read = nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x.to(self.called.weight.dtype))
        x = nn.functional.conv2d(x, self.read.weight * 1.0) + self.read.weight.mean()
        return cast(torch.Tensor, self.fc(x.mean((2, 3))))


@situation("torch.fx.symbolic_trace of a network that reads weights", "the graph reads W + ΔW, now and later; trains")
def _() -> None:
    torch.manual_seed(0)
    net = convlora.inject(Reader(), 2)
    randomise(net)
    traced = torch.fx.symbolic_trace(net)
    for state in ("injected", "written", "merged", "unmerged"):
        if state == "written":
            randomise(net, seed=2)
        elif state == "merged":
            convlora.merge(net)
        elif state == "unmerged":
            convlora.unmerge(net)
        assert torch.equal(traced(IMAGES), net(IMAGES))
    expected = gradients_of(net, lambda: net(IMAGES))
    got = gradients_of(net, lambda: traced(IMAGES))
    assert len(expected) == 6 and all(torch.equal(got[name], expected[name]) for name in expected)
    for plain in (convlora.merge(net), convlora.remove(net)):
        assert torch.equal(torch.fx.symbolic_trace(plain)(IMAGES), plain(IMAGES))


@situation("torch.fx.symbolic_trace of timm's networks that read weights", "traced, predicts the same", "timm")
def _() -> None:
    import timm

    net = convlora.inject(timm.create_model("edgenext_xx_small", num_classes=2).eval(), 2, target_modules="stages.1.*")
    randomise(net)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x), rtol=1e-5, atol=1e-5)


@situation("torch.compile(fullgraph=True) of a network that reads weights", "one graph, the same gradients")
def _() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = convlora.inject(Reader(), 2)
    randomise(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    expected = gradients_of(net, lambda: net(IMAGES))
    got = gradients_of(net, lambda: compiled(IMAGES))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@situation("second derivatives of a network (a gradient penalty)", "as finite differences say")
def _() -> None:
    for path in ("fused", "weight", "branch"):
        layer: Any = nn.Conv2d(3, 4, 3, 2, dtype=torch.float64)
        convlora.inject(layer, 1, training_path=path, modules_to_save=None)
        randomise(layer)
        lora, x = layer.convlora["default"], torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)

        def run(x: Any, A: Any, B: Any, layer: Any = layer) -> Any:
            names = ("convlora.default.lora_A", "convlora.default.lora_B")
            return torch.func.functional_call(layer, dict(zip(names, (A, B), strict=True)), (x,))

        assert torch.autograd.gradgradcheck(run, (x, lora.lora_A, lora.lora_B))


# --- 11. smaller ones ---------------------------------------------------------------------------------------------


@situation("copy.copy, and then remove of the copy", "both are the base, and can be injected again")
def _() -> None:
    net = injected()
    twin = convlora.remove(copy.copy(net))
    for model in (net, twin):
        assert not any("convlora" in key for key in model.state_dict())
        with pytest.raises(convlora.StateError, match="carries no adapter"):
            convlora.merge(model)
    convlora.remove(convlora.inject(net))


@situation("convert_conv2d_weight_memory_format and reset_parameters", "they write into the base's weight")
def _() -> None:
    for train in (True, False):
        net = injected().train(train)
        before = predicts(net)
        nn.utils.convert_conv2d_weight_memory_format(net, torch.channels_last)
        assert net.block[3].weight.is_contiguous(memory_format=torch.channels_last)
        assert convlora.base_weight(net.stem).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(predicts(net), before)
        torch.manual_seed(7)
        net.stem.reset_parameters()
        torch.manual_seed(7)
        expected = nn.Conv2d(3, 16, 3, 2, 1, bias=False).weight
        assert torch.equal(convlora.base_weight(net.stem), expected)
        delta = dense_delta(net.stem)
        torch.testing.assert_close(net.stem.weight, expected + delta)
        assert torch.equal(convlora.remove(net).stem.weight, expected)


@situation("merge or remove of a copy of a part", "refused, with the way that works; that gives a plain part")
def _() -> None:
    net = injected()
    before = predicts(net)
    for whole in (net, convlora.merge(copy.deepcopy(net))):
        for part in (copy.deepcopy(whole.block), whole.block, copy.deepcopy(whole.bn1) if whole is net else whole.stem):
            for call in (convlora.merge, convlora.unmerge, convlora.remove, convlora.summary):
                refused(part, lambda call=call, part=part: call(part), "a copy of a part.* Call this on the whole")
    plain = convlora.remove(convlora.merge(copy.deepcopy(net)))
    part = copy.deepcopy(plain.block)
    assert not any("convlora" in key for key in part.state_dict()) and type(part[0]) is nn.Conv2d
    net.block = part
    assert torch.equal(predicts(net), before)


@situation("a feature extractor of torchvision or torch.fx", "follows merge and remove of the whole", "torchvision")
def _() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    net = injected()
    net.eval()  # a trace keeps the mode
    for extract in (lambda net: create_feature_extractor(net, ["block", "fc"]), torch.fx.symbolic_trace):
        whole = copy.deepcopy(net)
        extractor, before = extract(whole), predicts(whole)

        def features(extractor: Any = extractor) -> Any:
            with torch.no_grad():
                out = extractor(IMAGES)
            return out if isinstance(out, Tensor) else out["fc"]

        refused(extractor, lambda extractor=extractor: convlora.merge(extractor), "a feature extractor, say")
        assert torch.equal(features(), before)
        convlora.merge(whole)
        assert torch.equal(features(), before) and type(extractor.stem) is nn.Conv2d
        convlora.remove(whole)
        assert torch.equal(features(), before) and not any("convlora" in key for key in extractor.state_dict())


def _counted(model: nn.Module) -> dict[str, int]:
    """Multiplications by layer, counted as thop, ptflops and torchinfo do: hooks on leaves, chosen by exact type."""
    counts: dict[str, int] = {}

    def count(name: str, module: Any, y: Tensor) -> None:
        counts[name] = y.numel() * module.weight[0].numel()

    leaves = [(name, m) for name, m in model.named_modules() if not list(m.children())]
    hooks = [
        module.register_forward_hook(lambda module, _, y, name=name: count(name, module, y))
        for name, module in leaves
        if type(module) in (nn.Conv2d, nn.Linear)
    ]
    predicts(model)
    for hook in hooks:
        hook.remove()
    return counts


@situation("FLOP counters that hook leaves by their exact type", "all of a merged model's, and the plain model's tree")
def _() -> None:
    plain, net = SmallNet(), injected()
    expected, names = _counted(plain), [name for name, _ in plain.named_modules()]
    parameters = [name for name, _ in plain.named_parameters()]
    assert set(_counted(net)) == {"hidden", "fc"}  # docs/torch.md says so
    bits = [factor.clone() for factor in convlora.adapter_parameters(net)]
    convlora.merge(net)
    for model in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert _counted(model) == expected and [name for name, _ in model.named_modules()] == names
        assert [name for name, _ in model.named_parameters()] == parameters
        assert all(map(torch.equal, convlora.adapter_parameters(convlora.unmerge(model)), bits))


@situation("a merged model of a half-precision base, cast and unmerged", "factors stay fp32, or are cast with it")
def _() -> None:
    net = convlora.inject(SmallNet().to(torch.bfloat16), 2)
    randomise(net)
    bits = [factor.clone() for factor in convlora.adapter_parameters(net)]
    convlora.unmerge(convlora.merge(net).to("cpu"))
    assert all(map(torch.equal, convlora.adapter_parameters(net), bits))
    convlora.unmerge(convlora.merge(net).double())
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert all(torch.equal(p, bit.double()) for p, bit in zip(convlora.adapter_parameters(net), bits, strict=True))


class TokensFirst(nn.Module):
    """A convolution, then a linear layer that sees (tokens, batch, features), or (batch, tokens, features)."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.conv, self.mix, self.first, self.calls = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), first, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        tokens = self.conv(x).flatten(2)
        order = (2, 0, 1) if self.first else (0, 2, 1)
        return self.mix(tokens.permute(order)).relu().mean(0 if self.first else 1)


@situation("use_adapters where samples are not first and other sizes agree", "refused; where they are first, routed")
def _() -> None:
    owners, images = ["a", "b", None, "a"], IMAGES[:, :, :8, :8]  # four samples of four tokens
    for kind, use_dora in ((nn.Linear, False), (nn.Linear, True), (nn.Identity, False)):
        for first in (True, False):
            torch.manual_seed(0)
            net = TokensFirst(first).eval()
            for name, add in (("a", convlora.inject), ("b", convlora.add_adapter)):
                targets = (nn.Conv2d, kind) if kind is nn.Linear else nn.Conv2d
                saved = None if kind is nn.Linear else "mix"  # trained in full: a module that is routed by the batch
                add(net, rank=2, adapter_name=name, target_modules=targets, modules_to_save=saved, use_dora=use_dora)
                convlora.set_adapter(net, name)
                randomise(net, seed=len(name) + ord(name[0]))
            with torch.no_grad(), convlora.use_adapters(net, owners):
                if first:
                    with pytest.raises(StateError, match=r"mix: two dimensions .* mix got 4 samples, .* 5 names"):
                        net(images)
                    continue
                with pytest.raises(StateError, match="mix got an input of which two dimensions"):
                    net.mix(torch.zeros(4, 4, 8))
                y, calls = net(images), net.calls
                assert torch.equal(net(images), y) and (calls, net.calls) == (3, 4)  # it was asked once
                net.mix(torch.zeros(4, 4, 8))
            for row, name in enumerate(owners):
                with torch.no_grad():
                    if name is None:
                        with convlora.disable_adapter(net):
                            alone = net(images[row : row + 1])
                    else:
                        alone = convlora.set_adapter(net, name)(images[row : row + 1])
                torch.testing.assert_close(y[row : row + 1], alone)


@situation("merge of factors with NaN or Inf", "refused, with the layer's name")
def _() -> None:
    for value in (float("nan"), float("inf")):
        net = injected()
        with torch.no_grad():
            next(convlora.adapter_parameters(net))[0] = value
        refused(net, lambda net=net: convlora.merge(net), r"stem\.weight: NaN or Inf with adapter")


@situation("merge of a base that holds NaN itself", "merged")
def _() -> None:
    net = injected()
    with torch.no_grad():
        convlora.base_weight(net.stem)[0] = float("nan")
    assert convlora.merge(net).stem.weight[0].isnan().all()


@situation("inject into a model of peft's", "refused, and the model is as it was", "peft")
def _() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(SmallNet(), LoraConfig(r=2, target_modules=["stem"]))
    before = snapshot(model)
    for part in (model, model.base_model.model):
        with pytest.raises(convlora.UnsupportedLayerError, match="carries an adapter of peft"):
            convlora.inject(part)
    assert snapshot(model) == before


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_situation(row: Row) -> None:
    row()
