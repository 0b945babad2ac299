"""Networks written here, for layers that no library's networks have: normalised weights, audio, generators, volumes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm
from torch.nn.utils.parametrizations import spectral_norm as new_spectral_norm
from torch.nn.utils.parametrizations import weight_norm as new_weight_norm

from .cases import BATCH, Case, Sample, images, noise

Norm = Callable[[nn.Module], nn.Module]


class Discriminator(nn.Module):
    """A GAN's discriminator, each convolution under a weight normalisation, with a plain one at the end."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            norm(nn.Conv2d(3, 32, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(32, 64, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(64, 64, 3, 1, 1, groups=2)),
            nn.LeakyReLU(0.2),
        )
        self.score = nn.Conv2d(64, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` to patch scores ``(N, 1, H / 4, W / 4)``."""
        return self.score(self.body(x))  # type: ignore[no-any-return]


def generator() -> nn.Module:
    """A DCGAN generator: noise ``(N, 32, 1, 1)`` to images ``(N, 3, 16, 16)``."""
    return nn.Sequential(
        nn.ConvTranspose2d(32, 64, 4, 1, 0, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, groups=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 3, 2, 1, output_padding=1),
        nn.Tanh(),
    )


class Audio(nn.Module):
    """Dilated gated 1-D convolutions as in WaveNet: ``(N, 1, T)`` to ``(N, 5)``."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 5, 2)
        self.blocks = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, 3, padding="same", dilation=2**i) for i in (0, 1, 2)
        )
        self.mix = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.norm = nn.BatchNorm1d(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Gated blocks with residuals, the mean over time, the head."""
        x = self.stem(x)
        for block, mix in zip(self.blocks, self.mix, strict=True):
            value, gate = block(x).chunk(2, 1)
            x = x + mix(value.tanh() * gate.sigmoid())
        return self.head(self.norm(x).mean(2))  # type: ignore[no-any-return]


class VolumeUNet(nn.Module):
    """A 3-D U-Net of two levels: ``(N, 1, D, H, W)`` to ``(N, 2, D, H, W)``."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(1, channels, 3, 1, 1), nn.InstanceNorm3d(channels, affine=True), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv3d(channels, 2 * channels, 3, 2, 1), nn.BatchNorm3d(2 * channels), nn.ReLU())
        self.up = nn.ConvTranspose3d(2 * channels, channels, 2, 2)
        self.out = nn.Conv3d(2 * channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Down, deep, up, joined, out."""
        import torch

        x = self.down(x)
        return self.out(torch.cat([x, self.up(self.deep(x))], 1))  # type: ignore[no-any-return]


def cases() -> list[Case]:
    """All cases."""
    norms: dict[str, Norm] = {
        "weight_norm": new_weight_norm,
        "spectral_norm": new_spectral_norm,
        "weight_norm_old": weight_norm,
        "spectral_norm_old": spectral_norm,
    }
    wave, volume = (lambda size: Sample((noise(BATCH, 1, 4 * size),))), images(1, 16)
    return [
        *(_case(f"discriminator_{name}", partial(Discriminator, norm), images(3)) for name, norm in norms.items()),
        _case("audio_conv1d", Audio, wave),
        _case("dcgan_generator", generator, lambda size: Sample((noise(BATCH, 32, 1, 1),))),
        _case("volume_unet", VolumeUNet, volume),
    ]


def _case(name: str, build: Callable[[], nn.Module], sample: Callable[[int], Sample]) -> Case:
    return Case(f"handmade/{name}", lambda size: build(), sample, (32,))
