"""spandrel: its networks for super-resolution and restoration, cut to one block of each kind."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from .cases import Case, images

WINDOWS: dict[str, Any] = {"depths": (2,), "num_heads": (2,), "embed_dim": 16, "window_size": 8, "img_size": 32}
UP: dict[str, Any] = {"upscale": 2, "upsampler": "pixelshuffle"}
DEEP: dict[str, Any] = {"nc": [8, 16, 16, 32], "nb": 1}
RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ATD": ("ATD.__arch.atd_arch", "ATD", {**WINDOWS, **UP, "category_size": 32, "num_tokens": 8}),
    "Compact": ("Compact.__arch.SRVGG", "SRVGGNetCompact", {"num_feat": 16, "num_conv": 2}),
    "CRAFT": ("CRAFT.__arch.CRAFT", "CRAFT", {"embed_dim": 16, "depths": [2], "num_heads": [2]}),
    "DAT": ("DAT.__arch.DAT", "DAT", {"embed_dim": 16, "depth": [2], "num_heads": [2], "split_size": [2, 4]}),
    "DITN": ("DITN.__arch.DITN_Real", "DITN_Real", {"dim": 16, "ITL_blocks": 1, "SAL_blocks": 1}),
    "DRCT": ("DRCT.__arch.drct_arch", "DRCT", {**WINDOWS, **UP, "gc": 8, "depths": (2,), "num_heads": (2,)}),
    "DRUNet": ("DRUNet.__arch.network_unet", "DRUNet", {**DEEP, "in_nc": 3, "out_nc": 3}),
    "DnCNN": ("DnCNN.__arch.network_dncnn", "DnCNN", {"in_nc": 3, "out_nc": 3, "nc": 16, "nb": 4}),
    "ESRGAN": ("ESRGAN.__arch.RRDB", "RRDBNet", {"num_filters": 16, "num_blocks": 1}),
    "FBCNN": ("FBCNN.__arch.FBCNN", "FBCNN", {"nb": 1}),
    "FDAT": ("FDAT.__arch.fdat", "FDAT", {"embed_dim": 16, "num_groups": 1, "depth_per_group": 1, "num_heads": 2}),
    "FFTformer": ("FFTformer.__arch.fftformer_arch", "FFTformer", {"dim": 8, "num_blocks": [1, 1, 1]}),
    "HAT": ("HAT.__arch.HAT", "HAT", {**WINDOWS, **UP}),
    "HVICIDNet": ("HVICIDNet.__arch.cidnet", "CIDNet", {"channels": [8, 8, 16, 16], "heads": [1, 2, 2, 2]}),
    "KBNet_s": (
        "KBNet.__arch.kbnet_s",
        "KBNet_s",
        {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    ),
    "MixDehazeNet": ("MixDehazeNet.__arch.MixDehazeNet", "MixDehazeNet", {"embed_dims": [8, 16, 16, 16, 8]}),
    "MoESR": ("MoESR.__arch.MoESR", "MoESR", {"dim": 16, "n_blocks": 1, "n_block": 1, "upsample_dim": 16}),
    "MoSR": ("MoSR.__arch.mosr_arch", "MoSR", {"dim": 16, "n_block": 2}),
    "NAFNet": ("NAFNet.__arch.NAFNet_arch", "NAFNet", {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}),
    "OmniSR": ("OmniSR.__arch.OmniSR", "OmniSR", {"num_feat": 16}),
    "PLKSR": ("PLKSR.__arch.PLKSR", "PLKSR", {"dim": 16, "n_blocks": 2}),
    "RealPLKSR": ("PLKSR.__arch.RealPLKSR", "RealPLKSR", {"dim": 16, "n_blocks": 2}),
    "RCAN": ("RCAN.__arch.rcan_arch", "RCAN", {"n_resgroups": 1, "n_resblocks": 1, "n_feats": 16}),
    "RGT": ("RGT.__arch.rgt", "RGT", {"embed_dim": 16, "depth": [2], "num_heads": [2]}),
    "RealCUGAN": ("RealCUGAN.__arch.upcunet_v3", "UpCunet2x", {}),
    "RetinexFormer": ("RetinexFormer.__arch.retinexformer_arch", "RetinexFormer", {"n_feat": 8, "stage": 1}),
    "SAFMN": ("SAFMN.__arch.safmn", "SAFMN", {"dim": 16, "n_blocks": 2}),
    "SCUNet": ("SCUNet.__arch.SCUNet", "SCUNet", {"config": [2] * 7, "dim": 16, "input_resolution": 64}),
    "SPAN": ("SPAN.__arch.span", "SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16}),
    "SeemoRe": ("SeemoRe.__arch.seemore_arch", "SeemoRe", {"num_layers": 2, "embedding_dim": 16, "num_experts": 3}),
    "SwiftSRGAN": ("SwiftSRGAN.__arch.SwiftSRGAN", "Generator", {"num_channels": 16, "num_blocks": 1}),
    "Swin2SR": ("Swin2SR.__arch.Swin2SR", "Swin2SR", {**WINDOWS, **UP}),
    "SwinIR": ("SwinIR.__arch.SwinIR", "SwinIR", {**WINDOWS, **UP}),
    "Uformer": ("Uformer.__arch.Uformer", "Uformer", {"embed_dim": 8, "depths": [1] * 9, "img_size": 128}),
}
"""The module of each network in spandrel, its class, and options that make it small."""


def cases() -> list[Case]:
    """All cases."""
    return [Case(f"spandrel/{n}", partial(build, n), images(3), (32, 64, 128)) for n in RECIPES]


def build(name: str, size: int) -> nn.Module:
    """Build the network with random weights."""
    module, kind, options = RECIPES[name]
    return getattr(import_module(f"spandrel.architectures.{module}"), kind)(**options)  # type: ignore[no-any-return]
