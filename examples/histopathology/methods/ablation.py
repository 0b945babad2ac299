"""The ablation of ``lora``: each variant changes its rank, its layers or its alpha, or trains norm layers too."""

import dataclasses

from .catalogue import find_method
from .method import Method

RANKS = (1, 2, 4, 8, 16, 32, 64)
ALPHAS = (4.0, 8.0, 32.0, 64.0)
LAYERS = ("stem", "stages", "1x1", "kxk")
# The methods with which the variants are compared.
AGAINST = ("probe-augmented", "norms", "full")


def variants() -> list[Method]:
    """The controls, then ``lora`` itself and its variants, by name."""
    lora = find_method("lora")
    found = [find_method(name) for name in AGAINST] + [lora]
    found += [_variant(lora, f"r{rank}", f"rank {rank}", rank=rank) for rank in RANKS if rank != lora.adapt.rank]
    found += [_variant(lora, layers, f"on {layers} alone", layers=layers) for layers in LAYERS]
    found += [_variant(lora, f"alpha{alpha:g}", f"alpha {alpha:g}", alpha=alpha) for alpha in ALPHAS]
    return [*found, _variant(lora, "norms", "norm layers' scale and shift trained too", train_norms=True)]


def _variant(lora: Method, word: str, about: str, **changes: object) -> Method:
    name = f"lora-{word}"
    adapt = dataclasses.replace(lora.adapt, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(lora, name=name, training=name, about=f"LoRA, {about}", adapt=adapt)
