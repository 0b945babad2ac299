"""Files of every method between convlora, Hugging Face peft and LyCORIS: the same predictions, or the reason why not.

A row of a table is a method with its options, or a layer; both libraries' own forwards are the oracles.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io

import pytest
import torch
from conftest import need
from torch import nn

import convlora
from convlora import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own

LAYERS = {
    "3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 6, 7)),
    "strided, dilated, not square": (lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 0), (1, 2)), (8, 6, 7)),
    "same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), (8, 6, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 6, 7)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1, bias=False), (8, 6, 7)),
    "1-d": (lambda: nn.Conv1d(8, 12, 3), (8, 7)),
    "3-d": (lambda: nn.Conv3d(8, 12, (1, 3, 2)), (8, 5, 5, 5)),
    "linear": (lambda: nn.Linear(8, 12), (8,)),
}
# Two orders of summation in fp32 (a branch beside the layer, or one weight): last bits, relative to the output.
ROUNDING = 1e-6


def case(name):
    """A network of the layer, and images for it."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return nn.Sequential(make()).eval(), torch.randn(2, *shape)


def randomised(model, names):
    """The model, every trained tensor of which has these words in its name drawn anew."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in names):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def distance(first, second, images):
    """The largest difference of two networks' outputs, relative to their size."""
    with torch.no_grad():
        expected, found = first(images), second(images)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def same(first, second, images):
    return distance(first, second, images) <= ROUNDING


# ---- peft

PEFT = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha tucker": ("LoHaConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 5}),
    "lokr full": ("LoKrConfig", {"r": 8, "alpha": 5}),
    "lokr tucker": ("LoKrConfig", {"r": 1, "alpha": 2, "use_effective_conv2d": True, "decompose_factor": 2}),
    "lokr both": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
    "hira": ("HiraConfig", {"r": 3}),
}
"""peft's configurations."""
WORDS = ("hada_", "lokr_", "hira_", "lora_")
NOT_IN_PEFT = {
    **{("hira", "grouped"): "refused"},
    **{(method, "3-d"): "refused" for method in PEFT if method != "hira"},
    **{(method, "1-d"): "scrambled" for method in ("lokr full",)},
    ("lokr tucker", "1-d"): "crashes",
}
"""What peft itself does on a layer where it does not compute the method."""


def in_peft(name, base):
    """A PeftModel with random numbers; skips where peft refuses the layer or crashes in it."""
    peft = need("peft")
    kind, options = PEFT[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this peft has no {kind}")
    with contextlib.redirect_stdout(io.StringIO()):
        return randomised(
            peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(target_modules=["0"], **options)), WORDS
        )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", PEFT)
def test_a_file_of_peft_predicts_the_same_here_and_goes_back(tmp_path, name, layer):
    peft = need("peft")
    base, images = case(layer)
    reason = NOT_IN_PEFT.get((name, layer))
    if reason == "refused":
        with pytest.raises((TypeError, NotImplementedError)):
            in_peft(name, base)
        return
    theirs = in_peft(name, base)
    theirs.save_pretrained(tmp_path / "theirs")
    if reason == "scrambled":
        with pytest.raises(CheckpointError, match=r"0: peft multiplies a Conv1d's lokr_w2 along other dimensions"):
            convlora.load_adapter(base, tmp_path / "theirs")
        return
    if reason == "crashes":
        with pytest.raises(RuntimeError):
            theirs(images)
        return
    ours = convlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert same(theirs, ours, images)
    assert distance(base, ours, images) > 1e-3
    convlora.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert same(theirs, back, images)
    assert same(ours, importlib.import_module("convlora.peft").from_peft(theirs).eval(), images)
