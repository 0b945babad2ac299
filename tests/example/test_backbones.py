import logging
import urllib.error

from conftest import need_extra

need_extra("histopathology")

import pytest
import timm
import torch
from safetensors.torch import save_file

from examples.histopathology.errors import ExampleError
from examples.histopathology.training.backbones import (
    PATHOLOGY,
    check_backbone,
    check_input,
    lite0_state,
    load_backbone,
    native_size,
)


def test_every_packaged_tensor_maps_onto_timms_lite0():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    state = lite0_state()
    assert len(state) == 296
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert str(model.load_state_dict(state, strict=True)) == "<All keys matched successfully>"


def test_lite0_with_imagenets_classes_keeps_the_packaged_head():
    model, _ = load_backbone("lite0", num_classes=1000)
    for key, value in lite0_state().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_only_the_head_differs_from_the_packaged_weights():
    model, normalisation = load_backbone()
    packaged, loaded = lite0_state(), model.state_dict()
    differing = [key for key in loaded if not torch.equal(loaded[key], packaged[key])]
    assert differing == ["classifier.weight", "classifier.bias"]
    assert normalisation.mean == normalisation.std == (0.5, 0.5, 0.5)
    assert model.drop_rate == 0.5


def test_head_follows_torchs_seed():
    heads = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        heads.append(load_backbone()[0].classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    # torch's bound for a linear layer of 1280 inputs; timm's own for one output would be 1
    assert heads[0].abs().max() <= 1280**-0.5


def test_unknown_name_is_answered_with_near_ones():
    with pytest.raises(ExampleError, match=r"unknown backbone 'resnet51'.*resnet50"):
        check_backbone("resnet51")
    with pytest.raises(ExampleError, match="lite0"):
        load_backbone("lite-0")


@pytest.mark.parametrize("fault", [OSError("no route to host"), urllib.error.URLError("no name")])
def test_without_a_network_the_message_names_the_way_out(monkeypatch, fault):
    def offline(*args, **kwargs):
        raise fault

    level = logging.getLogger("huggingface_hub").level
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ExampleError, match=r"resnet18: .*fetched.*--backbone lite0.*--weights FILE") as caught:
        load_backbone("resnet18")
    assert "\n" not in str(caught.value)
    assert logging.getLogger("huggingface_hub").level == level


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_weights_load_with_another_head(tmp_path, suffix):
    torch.manual_seed(1)
    state = timm.create_model("resnet18", num_classes=10).state_dict()
    path = tmp_path / f"resnet18.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model, normalisation = load_backbone("resnet18", weights=path)
    assert model.fc.out_features == 1
    assert torch.equal(model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert normalisation.source == f"file resnet18.{suffix}"


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    path = tmp_path / "lite0.pth"
    torch.save(lite0_state(), path)
    with pytest.raises(ExampleError, match=r"do not fit ResNet: missing .* of another shape bn1"):
        load_backbone("resnet18", weights=path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("not a checkpoint")
    with pytest.raises(ExampleError, match=r"notes\.pth cannot be read"):
        load_backbone("lite0", weights=path)
    with pytest.raises(ExampleError, match="no weights file"):
        load_backbone("lite0", weights=tmp_path / "absent.pth")


def test_a_size_the_network_cannot_take_is_said_before_training():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 64), torch.nn.Flatten())
    with pytest.raises(ExampleError, match="toy cannot take 32-pixel images"):
        check_input(model, "toy", 32)


@pytest.mark.parametrize(
    ("kernel", "step", "padding", "size", "unseen", "sizes"),
    [
        (14, 14, 0, 96, "12 rows and columns", "98 or 84"),
        (14, 14, 0, 98, "", ""),
        (4, 4, 0, 98, "2 rows and columns", "100 or 96"),
        (16, 16, 0, 100, "4 rows and columns", "112 or 96"),
        (3, 2, 0, 96, "row and column", "97 or 95"),
        (3, 2, 1, 96, "", ""),
        (7, 2, 3, 33, "", ""),
    ],
)
def test_a_size_of_which_the_last_rows_would_not_count_is_refused(kernel, step, padding, size, unseen, sizes):
    model = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.Conv2d(3, 4, kernel, step, padding), torch.nn.AdaptiveAvgPool2d(1)
    )
    a = torch.zeros(1, 3, size, size)
    b = a.clone()
    count = int(unseen.split()[0]) if unseen[:1].isdigit() else 1
    b[..., size - count :] = 1  # what is said of these columns, by changing them
    with torch.no_grad():
        assert torch.equal(model(a), model(b)) == bool(unseen)
    if not unseen:
        check_input(model, "toy", size)
        return
    what = f"toy ignores the last {unseen} of {size}-pixel images.* give --image-size {sizes}\\."
    with pytest.raises(ExampleError, match=what):
        check_input(model, "toy", size)
    for better in sizes.split(" or "):
        check_input(model, "toy", int(better))


def test_a_convolution_that_pads_its_input_itself_or_has_another_beside_it_sees_the_whole_image():
    check_input(timm.create_model("tf_efficientnet_lite0", num_classes=1), "lite0", 95)

    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.skip, self.whole = torch.nn.Conv2d(3, 4, 1, 2), torch.nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x):
            return (self.skip(x) + self.whole(x)).mean((2, 3))

    check_input(Beside(), "toy", 96)


DINOV2 = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """DINOv2's architecture with random weights, as a file of its published size would hold them: 518 pixels a side."""
    torch.manual_seed(2)
    state = timm.create_model(DINOV2, num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("dinov2") / "dinov2.safetensors"
    save_file(state, path)
    return path, state


def test_dinov2_takes_another_image_size_and_keeps_all_its_weights(dinov2):
    path, state = dinov2
    model, _ = load_backbone(DINOV2, image_size=56, weights=path)
    loaded = model.state_dict()
    differing = {key for key in loaded if key not in state or not torch.equal(loaded[key], state[key])}
    assert differing == {"pos_embed", "head.weight", "head.bias"}
    # 37 × 37 patches of 14 pixels become 4 × 4; the class token's stays
    assert (state["pos_embed"].shape[1], loaded["pos_embed"].shape[1]) == (1 + 37 * 37, 1 + 4 * 4)
    assert torch.equal(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
    check_input(model, DINOV2, 56)
    model, _ = load_backbone(DINOV2, image_size=64, weights=path)
    with pytest.raises(
        ExampleError, match=r"the last 8 rows and columns of 64-pixel images.* give --image-size 70 or 56"
    ):
        check_input(model, DINOV2, 64)


@pytest.mark.parametrize(
    ("name", "size"), [("lite0", 224), ("resnet50", 224), (DINOV2, 518), ("tf_efficientnet_b3", 300)]
)
def test_size_and_normalisation_are_of_the_models_own_data_config(name, size, monkeypatch):
    if name != "lite0":
        real = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda n, **o: real(n, **{**o, "pretrained": False}))
    model, normalisation = load_backbone(name, image_size=56)
    config = timm.get_pretrained_cfg("tf_efficientnet_lite0" if name == "lite0" else name)
    assert (normalisation.mean, normalisation.std) == (config.mean, config.std)
    assert native_size(name) == size == config.input_size[-1]
    assert model.get_classifier().out_features == 1


@pytest.mark.parametrize("name", [*PATHOLOGY, "hf-hub:owner/name", "hf-hub:owner/name@v1.0"])
def test_networks_of_the_hub_are_taken_by_name_and_say_what_is_missing_offline(monkeypatch, name):
    asked = {}

    def offline(address, **options):
        asked.update(options, address=address)
        raise OSError("no route to host")

    check_backbone(name)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ExampleError, match=r"could not be fetched \(no route to host\).*HF_TOKEN.*--weights FILE"):
        load_backbone(name)
    assert asked["address"] == PATHOLOGY.get(name, (name,))[0]
    assert asked["pretrained"]


def test_a_file_cannot_say_how_a_network_of_the_hub_is_built(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "uni.safetensors")
    with pytest.raises(ExampleError, match=r"uni: its configuration is on the Hugging Face Hub.*vit_large_patch16_224"):
        load_backbone("uni", weights=tmp_path / "uni.safetensors")


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "timm/resnet18", "local-dir:/tmp"])
def test_other_addresses_are_refused(name):
    with pytest.raises(ExampleError, match="unknown backbone"):
        check_backbone(name)
