"""Heads of real networks, and the whole way where norm statistics move: train, save, load, merge, unmerge, remove."""

import copy

import pytest
import torch
from conftest import need, randomise, snapshot, thorough

import convlora

timm = need("timm")
torchvision = need("torchvision")

HEADS = {
    "resnet18": "fc",
    "tf_efficientnet_lite0": "classifier",
    "mobilenetv3_small_050": "classifier",
    "convnext_atto": "head.fc",
    "regnetx_002": "head.fc",
    "nf_regnet_b0": "head.fc",
    "resnetv2_50": "head.fc",
    "tf_mixnet_s": "classifier",
    "repvgg_a0": "head.fc",
    "hrnet_w18_small": "classifier",
    "densenet121": "classifier",
}
TORCHVISION = {"densenet121": "classifier", "squeezenet1_1": "classifier.1", "shufflenet_v2_x0_5": "fc"}


@pytest.mark.parametrize("name", HEADS)
def test_head_of_timm(name):
    with torch.device("meta"):
        assert convlora.plan(timm.create_model(name)).modules_to_save == (HEADS[name],)


@pytest.mark.parametrize("name", TORCHVISION)
def test_head_of_torchvision(name):
    with torch.device("meta"):
        assert convlora.plan(torchvision.models.get_model(name)).modules_to_save == (TORCHVISION[name],)


@pytest.mark.parametrize(
    "make, head",
    [
        (lambda: torchvision.models.vit_b_16(), ("heads.head",)),
        (lambda: torchvision.models.resnet50(), ("fc",)),
        (lambda: torchvision.models.mobilenet_v3_small(), ("classifier.3",)),
        (lambda: timm.create_model("resnet18", num_classes=0), ()),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), ("head", "head_dist")),
    ],
)
def test_head_of_other_families(make, head):
    assert convlora.plan(make()).modules_to_save == head


@pytest.mark.parametrize(
    "name", ["repvgg_a0", *map(thorough, ("tf_efficientnet_lite0", "hrnet_w18_small", "tf_mixnet_s"))]
)
def test_whole_way_with_moving_statistics(name, tmp_path, train):
    """Frozen norms, and many more networks: tests/test_coverage.py."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2).train()
    base, images = copy.deepcopy(model), torch.randn(3, 3, 64, 64)
    before = snapshot(model)

    convlora.inject(model, norm="track")
    assert torch.equal(model.eval()(images), base.eval()(images))
    train(model, images, steps=2, lr=1e-6)  # small: untrained networks explode without their statistics
    assert all(p.grad is not None and p.grad.isfinite().all() for p in convlora.trainable_parameters(model))

    randomise(model, size=0.01)
    unmerged = model.eval()(images)
    assert unmerged.isfinite().all() and not torch.equal(unmerged, base(images))
    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(base, tmp_path).eval()
    assert torch.equal(base(images), unmerged)

    merged = convlora.merge(model)(images)
    assert (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    convlora.unmerge(model)
    assert torch.equal(model(images), unmerged)
    convlora.remove(model.train())
    assert snapshot(model) == before
