"""The whole way on real networks: inject, train in train mode, save, load, merge, unmerge, remove."""

import copy

import pytest
import torch
from conftest import snapshot

import convlora

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

NETWORKS = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=2),
    "tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=2),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=2),
    "convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=2),
    "regnetx_002": lambda: timm.create_model("regnetx_002", num_classes=2),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=2),
    "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=2),
    "shufflenet_v2": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=2),
}
HEADS = {
    "resnet18": "fc",
    "tf_efficientnet_lite0": "classifier",
    "mobilenetv3_small_050": "classifier",
    "convnext_atto": "head.fc",
    "regnetx_002": "head.fc",
    "densenet121": "classifier",
    "squeezenet1_1": "classifier.1",
    "shufflenet_v2": "fc",
}


@pytest.mark.parametrize(
    "build, head",
    [
        (lambda: torchvision.models.vit_b_16(), ("heads.head",)),
        (lambda: torchvision.models.resnet50(), ("fc",)),
        (lambda: torchvision.models.mobilenet_v3_small(), ("classifier.3",)),
        (lambda: timm.create_model("resnet18", num_classes=0), ()),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), ("head", "head_dist")),
    ],
)
def test_head_of_other_families(build, head):
    assert convlora.plan(build()).modules_to_save == head


@pytest.mark.parametrize("norm", ["freeze", "track"])
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_way(name, norm, tmp_path, train):
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    base, images = copy.deepcopy(model), torch.randn(3, 3, 64, 64)
    before = snapshot(model)

    convlora.inject(model, norm=norm)
    assert torch.equal(model.eval()(images), base.eval()(images))
    assert convlora.summary(model).modules_to_save == (HEADS[name],)
    train(model, images, steps=2, lr=1e-3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in convlora.trainable_parameters(model))

    unmerged = model.eval()(images)
    convlora.save_adapter(model, tmp_path)
    convlora.load_adapter(base, tmp_path).eval()
    assert torch.equal(base(images), unmerged)

    merged = convlora.merge(model)(images)
    assert (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    convlora.unmerge(model)
    assert torch.equal(model(images), unmerged)
    convlora.remove(model.train())
    assert snapshot(model) == before
