"""Files that stock Hugging Face peft reads, where it predicts the same, and refuses, where it would not."""

import copy

import pytest
import torch
from conftest import randomise
from torch import nn

import convlora

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own


@pytest.mark.parametrize("norm", ["freeze", "track"])
def test_stock_peft_loads_and_predicts_the_same(tmp_path, train, norm):
    torch.manual_seed(0)
    base = timm.create_model("resnet18", num_classes=2)
    images = torch.randn(4, 3, 64, 64)
    model = convlora.inject(copy.deepcopy(base), 4, norm=norm, rank_pattern={"layer4.*": 6}, alpha_pattern={"conv1": 3})
    train(model, images, steps=2, lr=0.01)
    convlora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = model.eval()(images)
    assert (theirs(images) - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        type("Own", (nn.Conv2d,), {})(8, 8, 3),
    ],
)
def test_stock_peft_refuses_what_it_would_mispredict(tmp_path, conv):
    base = nn.Sequential(conv, nn.Flatten())
    model = convlora.inject(copy.deepcopy(base), 2, modules_to_save=None)
    randomise(model)
    convlora.save_adapter(model, tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(base, tmp_path)
