"""Methods as configurations: what trains, how images are augmented and normalised, how predictions are made.

Each is a small YAML file in ``methods/``, or one of your own; ``name+modifier`` composes: ``lora+ensemble+balanced``.
A method is transductive if its prediction uses the unlabelled test images together. Its figures are not comparable
with those of methods that see one image at a time, and every table marks it.

Methods that differ in prediction alone share one training (`Method.training`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import convlora

Trains = Literal["head", "lora", "norms", "full"]
Layers = Literal["all", "stem", "stages", "1x1", "kxk", "linear"]
Policy = Literal["none", "dihedral", "crop", "affine"]


@dataclass(frozen=True)
class Adapt:
    """What training changes; the fresh head always trains.

    Attributes:
        trains: "head" alone, "lora" factors, "norms" (scale and shift of norm layers), or the "full" network.
        rank: rank of the factors.
        alpha: their scaling is alpha / rank; None for twice the rank.
        layers: which convolutions get factors: all, the stem (the network's first), the stages (all but the stem),
            those with 1×1 kernels, those with larger ones; or every linear layer instead, as in a vision transformer.
        norm: whether running statistics "freeze" or "track" in training.
        train_norms: whether the norm layers' scale and shift train beside the factors.
        lean: lean training, which needs less memory: each factor A is chosen from the training images and frozen, and
            activations keep masks.
        lr_ratio: learning rate of the factors B over that of all other parameters: 16 in LoRA+ (Hayou et al. 2024,
            arXiv 2402.12354). If it is not 1, factors have no weight decay.
    """

    trains: Trains = "head"
    rank: int = 8
    alpha: float | None = None
    layers: Layers = "all"
    norm: Literal["freeze", "track"] = "freeze"
    train_norms: bool = False
    lean: bool = False
    lr_ratio: float = 1.0


@dataclass(frozen=True)
class Augment:
    """How training images are augmented.

    Attributes:
        policy: "none"; "dihedral" (one of the 8 exact rotations and flips); "crop" (the challenge report's first:
            colour jitter, random resized crop, flips); "affine" (its second: flips, rotations, affine).
        stain_jitter: strength of the jitter in HED space, see `hed`; 0 for none.
    """

    policy: Policy = "crop"
    stain_jitter: float = 0.0


@dataclass(frozen=True)
class Predict:
    """How test images become predictions.

    Attributes:
        views: 1, or 8 for the mean probability over the exact rotations and flips.
        adabn: batch-norm statistics recomputed on the unlabelled test images (Li et al. 2016, arXiv 1603.04779).
        balanced: the threshold that calls half of the test images positive.
    """

    views: Literal[1, 8] = 1
    adabn: bool = False
    balanced: bool = False


@dataclass(frozen=True)
class Method:
    """A method: one row of the table.

    Attributes:
        normalise: "backbone" for its mean and deviation, "centre" for those of each centre's own images.
        training: name of the training that it uses; methods with the same training differ in prediction alone.
    """

    name: str
    about: str
    adapt: Adapt = Adapt()
    augment: Augment = Augment()
    normalise: Literal["backbone", "centre"] = "backbone"
    predict: Predict = Predict()
    training: str = ""

    @property
    def transductive(self) -> bool:
        """Whether a prediction uses the unlabelled test images together."""
        return self.normalise == "centre" or self.predict.adabn or self.predict.balanced

    @property
    def title(self) -> str:
        """The name in tables."""
        return f"{self.name} (transductive)" if self.transductive else self.name

    @property
    def frozen_backbone(self) -> bool:
        """Whether an image's features are the same in each epoch."""
        return self.adapt.trains == "head" and self.adapt.norm == "freeze"

    def training_parts(self) -> dict[str, Any]:
        """All settings that affect the training, as plain values."""
        return {
            "adapt": dataclasses.asdict(self.adapt),
            "augment": dataclasses.asdict(self.augment),
            "normalise": self.normalise,
        }

    def prepare(self, model: nn.Module, rank: int | None = None, images: Iterable[Any] | None = None) -> nn.Module:
        """Inject this method's adapter into a backbone, in place.

        A lean method reads a few batches of ``images``; without them its A is drawn at random, at the same cost. Full
        fine-tuning and norm-only training are adapters of modules trained in full, so that saving, loading and checking
        are the same for every method. Parameters of the model itself, such as a ViT's tokens, stay frozen.
        """
        adapt = self.adapt
        head = convlora.plan(model, target_modules=()).modules_to_save
        choices: dict[str, list[Any]] = {
            "head": [*head],
            "lora": [*head, *([_is_norm] if adapt.train_norms else [])],
            "norms": [*head, _is_norm],
            "full": [_is_top_level],
        }
        targets = _SELECT[adapt.layers] if adapt.trains == "lora" else ()
        if adapt.layers in ("stem", "stages") and adapt.trains == "lora":
            targets = _by_place(model, adapt.layers)
        lean: dict[str, Any] = {"init_data": images, "freeze_A": True, "mask_activations": True} if adapt.lean else {}
        return convlora.inject(
            model,
            rank or adapt.rank,
            alpha=adapt.alpha,
            target_modules=targets,
            modules_to_save=choices[adapt.trains],
            norm=adapt.norm,
            **lean,
        )

    def to_train_mode(self, model: nn.Module) -> None:
        """Call ``train()``, but keep the running statistics of batch norms if the method freezes them."""
        model.train()
        if self.adapt.norm == "freeze":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


MODIFIERS: dict[str, tuple[str, Callable[[Method], Method]]] = {
    "ensemble": (
        "8-view ensemble",
        lambda m: dataclasses.replace(m, predict=dataclasses.replace(m.predict, views=8)),
    ),
    "balanced": (
        "balanced threshold",
        lambda m: dataclasses.replace(m, predict=dataclasses.replace(m.predict, balanced=True)),
    ),
    "adabn": (
        "AdaBN at test time",
        lambda m: dataclasses.replace(m, predict=dataclasses.replace(m.predict, adabn=True)),
    ),
    "centre": ("centre normalisation", lambda m: dataclasses.replace(m, normalise="centre")),
    "stain": (
        "stain jitter",
        lambda m: dataclasses.replace(m, augment=dataclasses.replace(m.augment, stain_jitter=0.05)),
    ),
}


def modified(method: Method, modifiers: Sequence[str]) -> Method:
    """A method with modifiers applied, named and described by them."""
    result, training = method, method.training
    for modifier in modifiers:
        words, change = MODIFIERS[modifier]
        changed = change(result)
        if changed.training_parts() != result.training_parts():
            training = f"{training}+{modifier}"
        result = dataclasses.replace(
            changed, name=f"{result.name}+{modifier}", about=f"{result.about}; {words}", training=training
        )
    return result


def _is_norm(name: str, module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm))


def _is_top_level(name: str, module: nn.Module) -> bool:
    return bool(name) and "." not in name


def _kernel_is(one: bool) -> Callable[[str, nn.Module], bool]:
    def matches(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and (set(module.kernel_size) == {1}) == one

    return matches


_SELECT: dict[str, Any] = {
    "all": None,
    "1x1": _kernel_is(True),
    "kxk": _kernel_is(False),
    "linear": [nn.Linear],
    "stem": (),
    "stages": (),
}


def _by_place(model: nn.Module, layers: str) -> Callable[[str, nn.Module], bool]:
    """Matches the stem, the module with the network's first convolution, or the stages, all other modules."""
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)).split(".")[0]

    def matches(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and (name.split(".")[0] == first) == (layers == "stem")

    return matches
