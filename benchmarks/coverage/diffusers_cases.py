"""diffusers: U-Nets, ControlNets and autoencoders for pictures, sound and film, as small as possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .cases import BATCH, Case, Sample, images, noise

Options = dict[str, Any]

WIDTHS: Options = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
TEXT: Options = {"cross_attention_dim": 16, "attention_head_dim": 2}
CROSS: Options = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
AUTO: Options = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}
FILM: Options = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
PATCHES: Options = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 16}


def text() -> torch.Tensor:
    """The encodings of two texts of five tokens."""
    return noise(BATCH, 5, 16)


def timed(*shape: int) -> Callable[[int], Sample]:
    """Samples of noise with their diffusion step."""
    return lambda size: Sample((noise(BATCH, *shape, size, size), torch.tensor([3, 7])))


def told(*shape: int) -> Callable[[int], Sample]:
    """Samples of noise with their diffusion step and a text."""
    return lambda size: Sample((noise(BATCH, *shape, size, size), torch.tensor([3, 7]), text()))


def controlled(size: int) -> Sample:
    """Noise with its diffusion step, a text and a control picture."""
    return Sample((noise(BATCH, 4, size, size), torch.tensor([3, 7]), text(), noise(BATCH, 3, 2 * size, 2 * size)))


def classed(size: int) -> Sample:
    """Noise with its diffusion step and its class."""
    return Sample((noise(BATCH, 4, size, size), torch.tensor([3, 7]), torch.tensor([0, 1])))


def frames(size: int) -> Sample:
    """Two films of three frames, and the number of frames."""
    return Sample((noise(2, 3, size, size),), {"num_frames": 2})


RECIPES: dict[str, tuple[Options, Callable[[int], Sample]]] = {
    "UNet2DModel": (
        {
            **WIDTHS,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        timed(3),
    ),
    "UNet2DConditionModel": ({**WIDTHS, **TEXT, **CROSS}, told(4)),
    "UNet3DConditionModel": ({**WIDTHS, **TEXT, **FILM}, told(4, 3)),
    "UNet1DModel": (
        {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "sample_size": 64, "extra_in_channels": 32},
        lambda size: Sample((noise(BATCH, 2, 64), torch.tensor([3, 7]))),
    ),
    "ControlNetModel": (
        {
            **WIDTHS,
            **TEXT,
            "down_block_types": CROSS["down_block_types"],
            "conditioning_embedding_out_channels": (8, 16),
        },
        controlled,
    ),
    "AutoencoderKL": ({**WIDTHS, **AUTO}, images(3)),
    "AsymmetricAutoencoderKL": (
        {"down_block_out_channels": (16, 32), "up_block_out_channels": (16, 32), "norm_num_groups": 8, **AUTO},
        images(3),
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 32), "layers_per_block": 1, "down_block_types": AUTO["down_block_types"]},
        frames,
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        images(3),
    ),
    "AutoencoderDC": (
        {
            "encoder_block_out_channels": (16, 32),
            "decoder_block_out_channels": (16, 32),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
            "latent_channels": 4,
        },
        images(3),
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 16,
            "downsampling_ratios": [2, 2],
            "decoder_channels": 16,
            "decoder_input_channels": 8,
            "channel_multiples": [1, 2],
        },
        lambda size: Sample((noise(BATCH, 2, 256),)),
    ),
    "VQModel": ({**WIDTHS, **AUTO, "num_vq_embeddings": 32}, images(3)),
    "T2IAdapter": ({"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 8}, images(3)),
    "Transformer2DModel": (
        {**PATCHES, "in_channels": 16, "norm_num_groups": 8, "cross_attention_dim": 16},
        lambda size: Sample((noise(BATCH, 16, size, size), text())),
    ),
    "DiTTransformer2DModel": ({**PATCHES, "num_embeds_ada_norm": 8}, classed),
}
"""Each network's options and sample."""


def cases() -> list[Case]:
    """All cases."""
    return [Case(f"diffusers/{name}", partial(build, name), RECIPES[name][1], (16, 32, 64)) for name in RECIPES]


def build(name: str, size: int) -> nn.Module:
    """Build the network with random weights."""
    import diffusers

    return getattr(diffusers, name)(**RECIPES[name][0])  # type: ignore[no-any-return]
