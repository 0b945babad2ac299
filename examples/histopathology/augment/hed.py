"""Stain jitter: scale and shift the amounts of haematoxylin, eosin and a residual at random, per image.

Idea: D. Tellez et al. Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train
distilled stain-invariant convolutional networks. IEEE Transactions on Medical Imaging 37(9), 2018 (arXiv 1808.05896).
The stains are the fixed vectors of Ruifrok & Johnston 2001, see `stain`.
"""

import numpy as np
import torch
from torch import Tensor

from ..data.stain import DAB, EOSIN, HAEMATOXYLIN, unit_rows
from .draws import Draws

_STAINS = torch.tensor(unit_rows([HAEMATOXYLIN, EOSIN, DAB]), dtype=torch.float32)
_TO_AMOUNTS = torch.linalg.inv(_STAINS.double()).float()
_DARKEST = 0.5 / 255  # as in `stain`


def to_hed(images: Tensor) -> Tensor:
    """The amounts of the three stains, as optical density, in RGB images ``(..., 3, H, W)`` in [0, 1]."""
    density = -torch.log10(images.clamp(min=_DARKEST))
    return torch.einsum("...chw,cs->...shw", density, _TO_AMOUNTS.to(images))


def from_hed(amounts: Tensor) -> Tensor:
    """RGB intensities from amounts of stain, the inverse of `to_hed`; they may leave [0, 1]."""
    return torch.pow(10.0, -torch.einsum("...shw,sc->...chw", amounts, _STAINS.to(amounts)))


def stain_jittered(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Multiply each stain's amount by 1 + a and add b; a and b are uniform in ±strength, drawn for each image.

    Args:
        images: ``(n, 3, H, W)`` in [0, 1].
        draws: random numbers of these patches.
        strength: at least 0; b is in units of optical density.

    Returns:
        The same shape, in [0, 1].
    """
    drawn = np.stack([draws.uniform(-strength, strength) for _ in range(6)], 1).reshape(-1, 2, 3, 1, 1)
    scale, shift = torch.from_numpy(drawn).to(images).unbind(1)
    return from_hed(to_hed(images) * (1 + scale) + shift).clamp(0, 1)
