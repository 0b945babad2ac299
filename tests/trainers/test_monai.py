"""Volumes: MONAI's networks and engines, and nnU-Net's deep supervision, on synthetic scans.

``python tests/trainers/test_monai.py`` prints the table of Dice in ``docs/tutorials/volumes.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convlora

pytest.importorskip("monai")

from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import MILModel, SegResNet, UNet

pytestmark = pytest.mark.usefixtures("one_thread")


def unet(seed: int = 0, units: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": units, "norm": "batch"}
    return UNet(spatial_dims=3, in_channels=1, out_channels=1, **sizes)


def scans(number: int, draw: torch.Generator, size: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a bright ball and a bright cube in each: the volumes, the balls' masks, the cubes' masks."""
    at = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"))
    places = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(number)])  # two of four corners
    balls, cubes = torch.zeros(2, number, 1, size, size, size)
    for i, pair in enumerate(places):
        for place, masks in zip(pair, (balls, cubes), strict=True):
            centre = torch.tensor([place // 2, place % 2, place % 2]) * size // 2 + size // 4
            centre = centre + torch.randint(-1, 2, (3,), generator=draw)
            away = (at - centre[:, None, None, None]).abs()
            masks[i, 0] = (away.square().sum(0) <= 25) if masks is balls else (away.amax(0) <= 4)
    volumes = torch.randn(balls.shape, generator=draw) * 0.25 + 0.5 * balls + cubes
    return volumes, balls, cubes


def train(model: nn.Module, wanted: str, steps: int, seed: int, rate: float) -> list[float]:
    """Some steps of AdamW on new scans each time; the losses."""
    draw, loss_of = torch.Generator().manual_seed(seed), DiceLoss(sigmoid=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        volumes, balls, cubes = scans(4, draw)
        loss = loss_of(model(volumes), {"balls": balls, "cubes": cubes}[wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def output(model: nn.Module, volumes: Tensor) -> Tensor:
    return sliding_window_inference(volumes, roi_size=24, sw_batch_size=2, predictor=model.eval(), overlap=0.25)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_3d_unet_trains_by_default_and_predicts_by_sliding_windows_as_saved_and_as_merged(tmp_path: Path):
    model = convlora.inject(unet(), rank=8)
    assert convlora.summary(model).modules_to_save == ("model.2.1.conv.unit0.conv",)
    volume = torch.randn(1, 1, 32, 28, 24)
    assert torch.equal(output(model, volume), output(unet(), volume))
    losses = train(model, "cubes", 8, seed=0, rate=1e-2)
    assert sum(losses[-3:]) < sum(losses[:3])
    trained = output(model, volume)
    assert not torch.equal(trained, output(unet(), volume))
    convlora.save_adapter(model, tmp_path)
    assert torch.equal(output(convlora.load_adapter(unet(), tmp_path), volume), trained)
    assert torch.equal(output(convlora.merge(copy.deepcopy(model)), volume), trained)
    base = bits(convlora.remove(model))
    assert all(torch.equal(value, base[name]) for name, value in bits(unet()).items())


def test_every_convolution_of_a_unet_is_adapted_transposed_ones_too():
    base = unet()
    every = {n for n, m in base.named_modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)}
    plan = convlora.plan(base, rank=8)
    assert any(isinstance(m, nn.ConvTranspose3d) for m in base.modules())
    assert {layer.name for layer in plan.layers if layer.adapter_parameters} == every - set(plan.modules_to_save)


HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "SegResNet": (
        lambda: SegResNet(3, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
        "conv_final.2.conv",
    ),
    "MILModel": (lambda: MILModel(num_classes=2, pretrained=False, backbone="resnet18"), "myfc"),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_layer_that_gives_the_output(name: str):
    build, head = HEADS[name]
    assert convlora.plan(build(), rank=8).modules_to_save == (head,)


def test_every_output_of_deep_supervision_is_a_head_and_trains(tmp_path: Path):
    architectures = pytest.importorskip("dynamic_network_architectures.architectures.unet")

    def nnunet() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"n_stages": 3, "features_per_stage": (4, 8, 8), "strides": (1, 2, 2), "n_conv_per_stage": 1}
        norms = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
        options = {"conv_op": nn.Conv3d, "kernel_sizes": 3, "n_conv_per_stage_decoder": 1, "conv_bias": True}
        return architectures.PlainConvUNet(1, num_classes=2, deep_supervision=True, **sizes, **norms, **options)

    heads = ("decoder.seg_layers.0", "decoder.seg_layers.1")
    model = convlora.inject(nnunet(), rank=2)
    assert convlora.summary(model).modules_to_save == heads
    optimizer = torch.optim.SGD(convlora.trainable_parameters(model), lr=0.1)
    volumes = torch.randn(2, 1, 16, 16, 16)
    outputs = model.train()(volumes)
    assert [tuple(output.shape[2:]) for output in outputs] == [(16,) * 3, (8,) * 3]
    sum(output.square().mean() for output in outputs).backward()
    optimizer.step()
    for head in heads:
        assert not torch.equal(model.get_submodule(head).weight, nnunet().get_submodule(head).weight)
    convlora.save_adapter(model, tmp_path)
    loaded = convlora.load_adapter(nnunet(), tmp_path)
    with torch.no_grad():
        for one, other in zip(loaded.eval()(volumes), model.eval()(volumes), strict=True):
            assert torch.equal(one, other)
        loaded.decoder.deep_supervision = False
        assert torch.equal(loaded(volumes), model(volumes)[0])
    base = bits(convlora.remove(model))
    assert all(torch.equal(value, base[name]) for name, value in bits(nnunet()).items())


def test_an_engine_trains_the_adapter_and_its_checkpoint_resumes(tmp_path: Path):
    pytest.importorskip("ignite")
    from monai.data import DataLoader, Dataset
    from monai.engines import SupervisedTrainer
    from monai.handlers import CheckpointLoader, CheckpointSaver

    def trainer(epochs: int, **handlers: object) -> tuple[nn.Module, SupervisedTrainer]:
        model = convlora.inject(unet(), rank=4)
        optimizer = torch.optim.AdamW(convlora.trainable_parameters(model), lr=1e-2)
        volumes, _, cubes = scans(2, torch.Generator().manual_seed(0), size=16)
        cases = Dataset([{"image": volume, "label": mask} for volume, mask in zip(volumes, cubes, strict=True)])
        engine = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=DataLoader(cases, batch_size=2),
            network=model,
            optimizer=optimizer,
            loss_function=DiceLoss(sigmoid=True),
        )
        everything = {"network": model, "optimizer": optimizer, "trainer": engine}
        CheckpointSaver(str(tmp_path), everything, save_interval=1, n_saved=9).attach(engine)
        if "load" in handlers:
            CheckpointLoader(str(handlers["load"]), everything, strict_shape=True).attach(engine)
        return model, engine

    model, engine = trainer(3)
    engine.run()
    written = torch.load(tmp_path / "checkpoint_epoch=1.pt", weights_only=True)["network"]
    assert written.keys() == model.state_dict().keys() and unet().state_dict().keys() <= written.keys()
    (tmp_path / "checkpoint_epoch=1.pt").rename(tmp_path / "first.pt")
    resumed, engine = trainer(3, load=tmp_path / "first.pt")
    engine.run()
    assert engine.state.epoch == 3
    for (name, one), other in zip(resumed.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    base = bits(convlora.remove(resumed))
    assert all(torch.equal(value, base[name]) for name, value in bits(unet()).items())


def pretrained(seed: int) -> nn.Module:
    """A UNet that finds balls, whose output layer is then made anew."""
    model = unet(seed, units=0)  # no residual unit at its end, which would lead around a frozen output layer
    train(model, "balls", 150, seed, rate=1e-2)
    torch.manual_seed(seed + 100)
    model.model[2].conv.reset_parameters()
    return model


def dice(model: nn.Module, wanted: str) -> float:
    """Of unseen scans, all voxels together."""
    volumes, balls, cubes = scans(16, torch.Generator().manual_seed(999))
    found, mask = output(model, volumes) > 0, {"balls": balls, "cubes": cubes}[wanted] > 0
    return float(2 * (found & mask).sum() / (found.sum() + mask.sum()))


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_defaults_each_seed_learns_a_new_output_of_one_channel(seed: int):
    model = convlora.inject(pretrained(seed), rank=8)
    before = dice(model, "cubes")
    train(model, "cubes", 100, seed + 10, rate=1e-2)
    assert dice(model, "cubes") > max(0.93, before + 0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in range(3):
        base = pretrained(seed)
        row = {"before": dice(base, "cubes")}
        frozen = {"modules_to_save": None, "exclude_modules": "model.2.*"}
        for arm, options in {"defaults": {}, "output frozen": frozen, "all": None}.items():
            model = copy.deepcopy(base)
            if options is not None:
                convlora.inject(model, rank=8, **options)
            train(model, "cubes", 100, seed + 10, rate=1e-2)
            row[arm] = dice(model, "cubes")
        print(seed, {name: round(value, 3) for name, value in row.items()}, flush=True)
