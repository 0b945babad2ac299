"""Which layers are trained in full as heads: network by network, those that a person would name."""

import warnings

import pytest
import torch
from conftest import need, snapshot, thorough
from torch import nn
from torch.nn import functional as F

import convlora

X = torch.zeros(2, 3, 32, 32)


def conv(inputs, outputs, kernel=3):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """A small U-Net, its output layer under a name of choice and registered first, in the middle or last."""

    def __init__(self, output="outc", at="last", channels=1, width=8):
        super().__init__()
        self.last = output
        if at == "first":
            self.add_module(output, nn.Conv2d(width, channels, 1))
        self.down = conv(3, width)
        self.deep = conv(width, 2 * width)
        if at == "middle":
            self.add_module(output, nn.Conv2d(width, channels, 1))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join = conv(2 * width, width)
        if at == "last":
            self.add_module(output, nn.Conv2d(width, channels, 1))

    def forward(self, x):
        near = self.down(x)
        x = self.up(self.deep(F.max_pool2d(near, 2)))
        return getattr(self, self.last)(self.join(torch.cat([near, x], 1)))


class Instances(nn.Module):
    """As MONAI's MILModel: the classifier is registered before the network that it reads."""

    def __init__(self, name="vote"):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(16, 1))
        self.attention = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))
        self.net = nn.Sequential(conv(3, 8), conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        features = self.net(x)
        weight = torch.softmax(self.attention(features), 0)
        return getattr(self, self.name)((weight * features).sum(0, keepdim=True))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Clip(nn.Module):
    """As open_clip's CLIP: two towers, the last registered layer an MLP's of the text tower."""

    def __init__(self, norm_last=False):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2))
        self.visual_norm = nn.LayerNorm(8)
        self.visual_proj = nn.Parameter(torch.randn(8, 8))
        if not norm_last:
            self.ln_final = nn.LayerNorm(8)
        self.token_embedding = nn.Embedding(10, 8)
        self.resblocks = nn.Sequential(*(Block(8) for _ in range(3)))
        if norm_last:
            self.ln_final = nn.LayerNorm(8)
        self.logit_scale = nn.Parameter(torch.ones([]))

    def forward(self, image, text):
        seen = self.visual_norm(self.visual(image).transpose(1, 2).mean(1)) @ self.visual_proj
        read = self.ln_final(self.resblocks(self.token_embedding(text))).mean(1)
        return F.normalize(seen, dim=1), F.normalize(read, dim=1), self.logit_scale.exp()


class Integral(nn.Module):
    """As the DFL of a YOLO: a constant convolution that holds 0, 1, 2, …"""

    def __init__(self, bins=4):
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    def forward(self, x):
        b, _, n = x.shape
        return self.conv(x.view(b, 4, -1, n).transpose(2, 1).softmax(1)).view(b, 4, n)


class Detect(nn.Module):
    """As the head of a YOLO: boxes and classes at each of three levels, and the constant last."""

    def __init__(self, widths=(8, 16, 32), classes=3):
        super().__init__()
        self.cv2 = nn.ModuleList(nn.Sequential(conv(w, 16), nn.Conv2d(16, 16, 1)) for w in widths)
        self.cv3 = nn.ModuleList(nn.Sequential(conv(w, 8), nn.Conv2d(8, classes, 1)) for w in widths)
        self.dfl = Integral()

    def forward(self, levels):
        levels = [torch.cat([self.cv2[i](x), self.cv3[i](x)], 1) for i, x in enumerate(levels)]
        flat = torch.cat([x.flatten(2) for x in levels], 2)
        return torch.cat([self.dfl(flat[:, :16]), flat[:, 16:].sigmoid()], 1), levels


class Yolo(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(conv(3, 8), conv(8, 16), conv(16, 32), Detect())

    def forward(self, x):
        levels = []
        for layer in self.model[:3]:
            x = layer(x)
            levels.append(x)
        return self.model[3](levels)


YOLO = [f"model.3.{part}.{i}.1" for part in ("cv2", "cv3") for i in range(3)]


class DeepSupervision(nn.Module):
    """As nnU-Net's decoder: an output layer at each of three levels, in a list beside those of stages."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stages = nn.Sequential(conv(3, 8), conv(8, 16), conv(16, 32))
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList([conv(32, 16), conv(16, 8), conv(8, 4)])
        self.decoder.transpconvs = nn.ModuleList([nn.ConvTranspose2d(w, w, 2, 2) for w in (16, 8, 4)])
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(w, 2, 1) for w in (16, 8, 4)])

    def forward(self, x):
        x, seen = self.encoder.stages(x), []
        for stage, up, layer in zip(
            self.decoder.stages, self.decoder.transpconvs, self.decoder.seg_layers, strict=True
        ):
            x = up(stage(x))
            seen.append(layer(x))
        return seen[::-1]


class Smp(nn.Module):
    """As segmentation-models-pytorch: encoder, decoder, segmentation head, and a classification head."""

    def __init__(self, classify=False):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(conv(3, 8), conv(8, 16)), nn.Sequential(conv(16, 8))
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, 1, 3, padding=1), nn.Identity(), nn.Sigmoid())
        self.classification_head = None
        if classify:
            layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 2), nn.Identity()
            self.classification_head = nn.Sequential(*layers)

    def forward(self, x):
        x = self.encoder(x)
        mask = self.segmentation_head(self.decoder(x))
        return mask if self.classification_head is None else (mask, self.classification_head(x))


class Pytorchcv(nn.Module):
    """As pytorchcv: ``features`` and ``output``; here a network whose output is a convolution and a pooling."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), conv(8, 16))
        self.output = nn.Sequential()
        self.output.add_module("final_conv", nn.Conv2d(16, 5, 1))
        self.output.add_module("final_activ", nn.ReLU(inplace=True))
        self.output.add_module("final_pool", nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.output(self.features(x)).flatten(1)


class Residual(nn.Module):
    """Blocks whose sum is the output, no norm after it: features."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(conv(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class SideOutputs(nn.Module):
    """As U²-Net: side outputs, each of which is an output, and their fusion."""

    def __init__(self):
        super().__init__()
        self.stage1, self.stage2 = conv(3, 8), conv(8, 8)
        self.side1, self.side2 = nn.Conv2d(8, 1, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.fuse = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        x = self.stage1(x)
        sides = self.side1(x), self.side2(self.stage2(x))
        return {"fused": self.fuse(torch.cat(sides, 1)).sigmoid(), "sides": [side.sigmoid() for side in sides]}


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def forward(self, x):
        return self.model(x)


def monai_unet(dimensions=3):
    """As MONAI's UNet: one Sequential, whose last part is a convolution alone."""
    Conv, Norm, Up = {
        2: (nn.Conv2d, nn.InstanceNorm2d, nn.ConvTranspose2d),
        3: (nn.Conv3d, nn.InstanceNorm3d, nn.ConvTranspose3d),
    }[dimensions]

    def unit(layer, outputs):
        return nn.Sequential(layer, Norm(outputs), nn.PReLU())

    net = nn.Module()
    net.model = nn.Sequential(
        unit(Conv(1, 8, 3, 2, 1), 8),
        unit(Conv(8, 8, 3, 1, 1), 8),
        nn.Sequential(unit(Up(8, 4, 2, 2), 4), Conv(4, 1, 3, 1, 1)),
    )
    net.forward = net.model.forward
    return net


def super_resolution():
    net = nn.Module()
    net.head, net.body, net.tail = (
        nn.Conv2d(3, 8, 3),
        conv(8, 8),
        nn.Sequential(nn.Conv2d(8, 12, 3), nn.PixelShuffle(2)),
    )
    net.forward = lambda x: net.tail(net.body(net.head(x)))
    return net


def faces():
    """As facenet's MTCNN: two outputs beside each other, told apart by a number."""
    net = nn.Module()
    net.trunk = conv(3, 8)
    net.conv4_1, net.conv4_2 = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)
    net.forward = lambda x: (net.conv4_2(net.trunk(x)), net.conv4_1(net.trunk(x)).softmax(1))
    return net


def levels_in_a_sequential():
    """As YuNet: a Sequential that is used as a list, each part for one level."""
    net = nn.Module()
    net.stem = nn.ModuleList([conv(3, 8), conv(8, 8)])
    net.head = nn.Sequential(*(nn.Sequential(conv(8, 8), nn.Conv2d(8, 5, 1)) for _ in range(2)))
    net.forward = lambda x: [net.head[0](net.stem[0](x)), net.head[1](net.stem[1](net.stem[0](x)))]
    return net


def autoencoder():
    """As an AutoencoderKL: the convolutions around the latent are registered after the decoder."""
    net = nn.Module()
    net.encoder = nn.Sequential(conv(3, 8), nn.Conv2d(8, 8, 1))
    net.decoder = nn.Module()
    net.decoder.blocks, net.decoder.conv_out = conv(4, 8), nn.Conv2d(8, 3, 1)
    net.quant_conv, net.post_quant_conv = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
    net.forward = lambda x: net.decoder.conv_out(
        net.decoder.blocks(net.post_quant_conv(net.quant_conv(net.encoder(x))))
    )
    return net


def descriptor():
    """As HardNet: a norm without parameters follows the last convolution."""
    return nn.Sequential(conv(3, 8), nn.Conv2d(8, 16, 8), nn.BatchNorm2d(16, affine=False))


def shuffled():
    """As RCAN: each layer of the tail reads as many channels as the next, since pixels are shuffled between them."""
    net = nn.Module()
    net.head = nn.Conv2d(3, 8, 3)
    net.tail = nn.Sequential(nn.Sequential(nn.Conv2d(8, 32, 3), nn.PixelShuffle(2)), nn.Conv2d(8, 3, 3))
    net.forward = lambda x: net.tail(net.head(x))
    return net


def restoration():
    """As DRUNet: a first and a last layer named m_head and m_tail."""
    net = nn.Module()
    net.m_head, net.m_tail = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)
    net.m_body = conv(8, 8)
    net.forward = lambda x: net.m_tail(net.m_body(net.m_head(x)))
    return net


def nested():
    """As U-Net++: an output at each depth, numbered, the trunk registered after them."""
    net = nn.Module()
    net.final_conv_0_1, net.final_conv_0_2 = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)
    net.trunk = conv(3, 8)
    net.forward = lambda x: [net.final_conv_0_1(net.trunk(x)), net.final_conv_0_2(net.trunk(x))]
    return net


def generator():
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()
    )


def perceptron():
    return nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def vgg_features():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())


def tasks():
    net = nn.Module()
    net.trunk = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.heads = nn.ModuleDict(
        {"age": nn.Linear(8, 1), "sex": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))}
    )
    net.forward = lambda x: {name: head(net.trunk(x)) for name, head in net.heads.items()}
    return net


def frozen_backbone():
    net = nn.Sequential(conv(3, 8), nn.Conv2d(8, 8, 1)).requires_grad_(False)
    return nn.Sequential(nn.Conv2d(8, 2, 1), net)  # the one that is trained runs last, say


OUTPUTS = (
    "final_conv outc out logits output segmentation_head decode_head conv_out last_layer final out_conv head conv_final"
)
NAMED = {
    f"UNet, {name} {at}": (lambda n=name, a=at: UNet(n, a), [name], X)
    for name in OUTPUTS.split()
    for at in ("first", "last")
}
TEXT = (X, torch.zeros(2, 4, dtype=torch.long))
BY_HAND = NAMED | {
    "UNet, any name last": (lambda: UNet("shown"), ["shown"], X),
    "classifier first, named": (lambda: Instances("myfc"), ["myfc"], X),
    "CLIP": (Clip, [], TEXT),
    "CLIP, norm last": (lambda: Clip(True), [], TEXT),
    "YOLO": (Yolo, YOLO, X),
    "deep supervision": (DeepSupervision, [f"decoder.seg_layers.{i}" for i in range(3)], X),
    "smp": (Smp, ["segmentation_head.0"], X),
    "smp, two heads": (lambda: Smp(True), ["segmentation_head.0", "classification_head.3"], X),
    "pytorchcv": (Pytorchcv, ["output.final_conv"], X),
    "wrapped pytorchcv": (lambda: Wrapper(Pytorchcv()), ["model.output.final_conv"], X),
    "twice wrapped": (lambda: Wrapper(Wrapper(Smp())), ["model.model.segmentation_head.0"], X),
    "2-D UNet of MONAI's form": (lambda: monai_unet(2), ["model.2.1"], torch.zeros(1, 1, 16, 16)),
    "3-D UNet of MONAI's form": (lambda: monai_unet(3), ["model.2.1"], torch.zeros(1, 1, 16, 16, 16)),
    "super-resolution": (super_resolution, ["tail.0"], X),
    "generator": (generator, ["3"], X),
    "perceptron": (perceptron, ["5"], X),
    "outputs told apart by a number": (faces, ["conv4_1", "conv4_2"], X),
    "levels in a Sequential": (levels_in_a_sequential, ["head.0.1", "head.1.1"], X),
    "autoencoder": (autoencoder, ["decoder.conv_out"], X),
    "descriptor": (descriptor, [], X),
    "shuffled tail": (shuffled, ["tail.1"], X),
    "restoration": (restoration, ["m_tail"], X),
    "nested outputs": (nested, ["final_conv_0_1", "final_conv_0_2"], X),
    "two tasks": (tasks, ["heads.age", "heads.sex.2"], X),
    "a network of residual blocks": (Residual, [], X),
}
"""Network, the heads that a person would name, and an example. All but those below are found with and without it."""
BY_EXAMPLE = {
    "classifier first": (Instances, ["vote"], X),
    "UNet, any name first": (lambda: UNet("shown", "first"), ["shown"], X),
    "UNet, any name in the middle": (lambda: UNet("shown", "middle"), ["shown"], X),
    "side outputs": (SideOutputs, ["side1", "side2", "fuse"], X),
}


def heads(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* linear layers with .* stay frozen")
        return list(convlora.plan(model, **options).modules_to_save)


@pytest.mark.parametrize("network", BY_HAND)
def test_heads_by_names_and_order(network):
    build, expected, _ = BY_HAND[network]
    assert sorted(convlora.plan(build()).modules_to_save) == sorted(expected)


@pytest.mark.parametrize("network", [*(n for n in BY_HAND if n not in NAMED or "final_conv" in n), *BY_EXAMPLE])
def test_heads_by_example_and_the_model_is_left_as_it_was(network):
    build, expected, example = (BY_HAND | BY_EXAMPLE)[network]
    model = build()
    before, random = snapshot(model), torch.get_rng_state()
    assert sorted(heads(model, example=example)) == sorted(expected)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), random)


def detector(name, **options):
    options = {"weights": None, "weights_backbone": None, "num_classes": 3} | options
    return lambda: getattr(need("torchvision").models.detection, name)(**options)


def segmenter(name):
    return lambda: getattr(need("torchvision").models.segmentation, name)(
        weights=None, weights_backbone=None, num_classes=2, **({} if "lraspp" in name else {"aux_loss": True})
    )


BOX = ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"]
RPN = ["rpn.head.cls_logits", "rpn.head.bbox_pred"]
ONE_STAGE = ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"]
SSD = [f"head.{part}_head.module_list.{i}.1" for part in ("classification", "regression") for i in range(6)]
TORCHVISION = {
    "LR-ASPP": (segmenter("lraspp_mobilenet_v3_large"), ["classifier.low_classifier", "classifier.high_classifier"]),
    "DeepLab": (segmenter("deeplabv3_mobilenet_v3_large"), ["classifier.4", "aux_classifier.4"]),
    "Faster R-CNN": (detector("fasterrcnn_mobilenet_v3_large_320_fpn"), RPN + BOX),
    "Mask R-CNN": (detector("maskrcnn_resnet50_fpn"), [*RPN, *BOX, "roi_heads.mask_predictor.mask_fcn_logits"]),
    "RetinaNet": (detector("retinanet_resnet50_fpn"), ONE_STAGE),
    "FCOS": (detector("fcos_resnet50_fpn"), [*ONE_STAGE, "head.regression_head.bbox_ctrness"]),
    "SSDlite": (detector("ssdlite320_mobilenet_v3_large"), SSD),
    "SSD": (detector("ssd300_vgg16"), [name.removesuffix(".1") for name in SSD]),
    "Keypoint R-CNN": (
        detector("keypointrcnn_resnet50_fpn", num_keypoints=4),
        [*RPN, *BOX, "roi_heads.keypoint_predictor.kps_score_lowres"],
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_heads_of_torchvision(name):
    need("torchvision")
    build, expected = TORCHVISION[name]
    with torch.device("meta"):
        assert sorted(heads(build())) == sorted(expected)


QUICK = ["LR-ASPP", "Faster R-CNN"]


@pytest.mark.parametrize("name", [*QUICK, *(thorough(name) for name in TORCHVISION if name not in QUICK)])
def test_heads_of_torchvision_by_example(name):
    need("torchvision")
    build, expected = TORCHVISION[name]
    model = build()
    if hasattr(model, "transform"):
        model.transform.min_size, model.transform.max_size = (64,), 64
    example = X if name in ("LR-ASPP", "DeepLab") else ([X[0]],)
    assert sorted(heads(model, example=example)) == sorted(expected)


# ---- what is new is told by its norm layers


def pretrained(module):
    """Its norms have seen data, and were trained."""
    for norm in module.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.uniform_(-1, 1)
        elif isinstance(norm, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    return module


def on_pretrained(encoder, decoder):
    net = nn.Module()
    net.encoder, net.decoder, net.head = pretrained(encoder), decoder, nn.Conv2d(8, 1, 1)
    net.forward = lambda x: net.head(net.decoder(net.encoder(x)))
    return net


def group_conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU())


def bare_norm():
    """A norm and its convolution that were put among pretrained ones."""
    net = nn.Sequential(*conv(3, 8), *conv(8, 8), *conv(8, 8))
    pretrained(net[:3]), pretrained(net[6:])
    return net


NEW = {
    "decoder": (lambda: on_pretrained(conv(3, 8), conv(8, 8)), ["decoder", "head"]),
    "decoder behind group norms": (lambda: on_pretrained(group_conv(3, 8), conv(8, 8)), ["decoder", "head"]),
    "decoder of group norms": (lambda: on_pretrained(group_conv(3, 8), group_conv(8, 8)), ["decoder", "head"]),
    "pretrained decoder": (lambda: on_pretrained(conv(3, 8), pretrained(conv(8, 8))), ["head"]),
    "decoder without norms": (lambda: on_pretrained(conv(3, 8), nn.Conv2d(8, 8, 3)), ["head"]),
    "all random": (lambda: nn.Sequential(conv(3, 8), group_conv(8, 8), nn.Conv2d(8, 1, 1)), ["2"]),
    "batch norms that saw data, group norms random": (
        lambda: nn.Sequential(pretrained(conv(3, 8)), group_conv(8, 8), nn.Conv2d(8, 1, 1)),
        ["2"],
    ),
    "a norm among others": (bare_norm, ["3", "4"]),
    "branches for another number of classes": (
        lambda: (net := Yolo(), pretrained(net.model[:3]), pretrained(net.model[3].cv2))[0],
        [*YOLO[:3], "model.3.cv3"],
    ),
}


@pytest.mark.parametrize("network", NEW)
def test_what_is_new_beside_what_was_trained_is_trained_in_full(network):
    build, expected = NEW[network]
    model = build()
    before = snapshot(model)
    assert sorted(convlora.plan(model).modules_to_save) == sorted(expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("options", [{"target_modules": "decoder.*"}, {"exclude_modules": "decoder.*"}])
def test_what_is_new_is_adapted_or_left_alone_where_the_user_says_so(options):
    build, _ = NEW["decoder"]
    assert convlora.plan(build(), **options).modules_to_save == ("head",)


@pytest.mark.parametrize("targets", ["*", "encoder.*", nn.Conv2d, ["encoder.*", "decoder.*"]])
def test_what_is_new_is_trained_in_full_where_targets_reach_beyond_it(targets):
    build, expected = NEW["decoder"]
    assert sorted(convlora.plan(build(), target_modules=targets).modules_to_save) == expected


@pytest.mark.parametrize("trainable", [True, False])
def test_the_constant_of_a_detector_stays_one(trainable):
    """Also where a file's weights came frozen, or all were made trainable."""
    net = Yolo().requires_grad_(trainable)
    before = net.model[3].dfl.conv.weight.clone()
    convlora.inject(net, rank=2, method="dense" if trainable else "lora")
    assert "model.3.dfl.conv" in {layer.name for layer in convlora.summary(net).skipped}
    assert not net.model[3].dfl.conv.weight.requires_grad and torch.equal(net.model[3].dfl.conv.weight, before)


# ---- what is new learns


def discs(generator, count=8, size=12):
    """Pictures of noise with a disc of another brightness, and the discs."""
    at = torch.rand(count, 2, 1, 1, generator=generator) * 6 + 3
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    masks = ((grid - at).square().sum(1, keepdim=True) < 10).float()
    return masks + 0.5 * torch.randn(count, 3, size, size, generator=generator), masks


def dice_after_training(seed, output, steps=40, **options):
    """Of a U-Net trained for another task, whose new output layer has one channel."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = UNet(output, channels=3)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(30):  # its task before: the picture without its noise
        images, masks = discs(generator)
        optimizer.zero_grad()
        F.mse_loss(net(images), F.avg_pool2d(images, 3, 1, 1)).backward()
        optimizer.step()
    setattr(net, output, nn.Conv2d(8, 1, 1))
    convlora.inject(net.train(), rank=2, **options)
    optimizer = torch.optim.Adam(convlora.trainable_parameters(net), 1e-2)
    for _ in range(steps):
        images, masks = discs(generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(images), masks).backward()
        optimizer.step()
    images, masks = discs(generator, 64)
    with torch.no_grad():
        found = (net.eval()(images) > 0).float()
    return float(2 * (found * masks).sum() / (found.sum() + masks.sum()))


@pytest.mark.parametrize(
    "output", ["final_conv", "shown", *map(thorough, ["outc", "out", "logits", "decode_head", "segmentation_head"])]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_new_output_of_one_channel_learns_with_every_seed(seed, output):
    assert dice_after_training(seed, output) > 0.8


# ---- what is not sure is said, and only that


def test_what_may_be_new_and_stays_frozen_is_named_with_the_line_to_write():
    with pytest.warns(UserWarning) as told:
        convlora.inject(Instances())
    (text,) = [str(each.message) for each in told]
    assert "vote, attention.2, attention.0" in text and "modules_to_save=['vote']" in text and "example=x" in text
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="no head was found"):
        convlora.plan(Instances())


def test_a_layer_of_one_output_that_a_budget_leaves_nothing_is_named():
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 64, 5), nn.BatchNorm2d(64))
    with pytest.warns(UserWarning, match="may be new: 0"):
        convlora.plan(net, budget=100, importance={"0": 0.0, "1": 1.0})


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": "vote"},
        {"modules_to_save": None},
        {"example": X},
        {"target_modules": (nn.Conv2d, nn.Linear)},
    ],
)
def test_no_warning_where_the_user_has_said_it_or_all_is_trained(options):
    heads(Instances(), **options)


def test_no_warning_for_features():
    def headless():
        net = Instances("fc")
        net.fc = nn.Identity()
        return net

    assert [heads(build()) for build in (Residual, vgg_features, Clip, headless)] == [[]] * 4


@pytest.mark.parametrize("options", [{"target_modules": "1"}, {"exclude_modules": "1"}])
def test_a_last_layer_that_the_user_targets_or_excludes_is_no_head(options):
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3))
    assert (heads(net), heads(net, **options)) == (["1"], [])
    assert convlora.plan(net[0]).modules_to_save == convlora.plan(nn.Sequential(net[0])).modules_to_save == ()


def test_users_word_is_stronger_than_an_example_and_a_loaders_too():
    assert heads(UNet("shown", "first"), modules_to_save="up", example=X) == ["up"]

    class Timm(UNet):
        def get_classifier(self):
            return self.down

    assert heads(Timm(), example=X) == ["down.0"]


def test_constants_stay_constant():
    net = Yolo()
    constant = net.model[3].dfl.conv.weight.clone()
    plan = convlora.plan(net, rank=2)
    assert "model.3.dfl.conv" in {layer.name for layer in plan.skipped}
    assert "model.3.dfl.conv" not in plan.modules_to_save
    convlora.inject(net, rank=2, example=X)
    net(X)[0].sum().backward()
    assert not net.model[3].dfl.conv.weight.requires_grad
    assert torch.equal(convlora.remove(net).model[3].dfl.conv.weight, constant)


def test_a_layer_trained_alone_is_the_head():
    """Of layers that the user has frozen none is new, whatever comes last."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 8, 1).requires_grad_(False))
    assert heads(net) == ["0"] == heads(net, example=X)


def test_all_frozen_is_as_none_frozen():
    assert heads(UNet().requires_grad_(False), example=X) == ["outc"]


@pytest.mark.parametrize(
    "example, output",
    [((X, X), lambda net, x, y: net(x) + y.sum()), ({"x": X, "y": X}, lambda net, x, y: {"a": (net(x), [y])})],
)
def test_example_of_several_arguments_and_any_output(example, output):
    net = UNet("shown", "first")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return output(self.net, x, y)

    assert heads(Both(), example=example) == ["net.shown"]


def test_writes_to_views_and_outputs_without_gradients_are_followed():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.features = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1), conv(3, 8)

        def forward(self, x):
            x = self.features(x)
            out = torch.zeros(len(x), 3, *x.shape[2:])
            out[:, :1].copy_(self.a(x))
            out[:, 1:] += self.b(x)
            return out.argmax(1)

    assert heads(Views(), example=X) == ["a", "b"]


def test_example_that_the_model_does_not_take_is_one_error_and_the_model_as_it_was():
    net = UNet()
    before = snapshot(net)
    with pytest.raises(convlora.TargetError, match=r"UNet does not take the example \(RuntimeError"):
        convlora.inject(net, example=torch.zeros(2, 4, 32, 32))
    assert snapshot(net) == before


def test_example_for_a_second_adapter_leaves_the_first_as_it_was():
    net = convlora.inject(UNet("shown", "first").train(), adapter_name="first", norm="track")
    before = snapshot(net)
    convlora.add_adapter(net, "second", example=X)
    assert convlora.summary(net, "second").modules_to_save == ("shown",)
    convlora.delete_adapter(net, "second")
    assert snapshot(net) == before


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", thorough("deit_tiny_distilled_patch16_224")])
def test_timm_says_its_classifier(name):
    timm = need("timm")
    net = timm.create_model(name, num_classes=1)
    expected = heads(net)
    assert expected and heads(Wrapper(net)) == [f"model.{each}" for each in expected]
    size = net.default_cfg["input_size"]
    net.get_classifier = None
    assert heads(net, example=torch.zeros(1, *size)) == expected
    assert heads(timm.create_model(name, num_classes=0)) == []
