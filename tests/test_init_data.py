"""Factors that begin from data: the directions, how they are found in bounded memory, when reading stops, any batch."""

import collections
import copy
import itertools
import math

import pytest
import torch
from conftest import convolutions, need, randomise, snapshot
from laws import given
from torch import nn
from torch.nn import functional as F

import convlora
from convlora._model import init as init_room
from convlora._model import init_data as room

OTHERS = {
    "linear": lambda: (nn.Linear(12, 10), torch.randn(3, 12)),
    "1d": lambda: (nn.Conv1d(6, 8, 3), torch.randn(2, 6, 9)),
    "3d": lambda: (nn.Conv3d(4, 8, 2), torch.randn(2, 4, 4, 4, 4)),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adapt(layer, rank=2, **options):
    factored = {"method_pattern": {"*": "lora"}}  # also where the layer is so small that it would be taken whole
    return convlora.inject(layer, rank, modules_to_save=None, target_modules=type(layer), **factored, **options)


# ---- which directions


def patches_by_unfold(layer, x):
    """What the kernels meet, by torch's own unfold, the groups one below the other; in fp64."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    columns = F.unfold(x.double(), layer.kernel_size, layer.dilation, 0, layer.stride)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return rows.view(len(rows), layer.groups, -1).flatten(0, 1)


@given(geometry=convolutions())
def test_eva_has_the_leading_directions_of_what_the_kernels_meet(geometry):
    layer, x = geometry.build()
    base = copy.deepcopy(layer)
    try:
        adapt(layer, init="eva", init_data=x.split(1))
    except convlora.TargetError:
        return  # so small that even rank 1 would outweigh it
    lora = layer.convlora["default"]
    rows, A = patches_by_unfold(base, x), lora.lora_A.detach().flatten(1).double()
    torch.testing.assert_close(A @ A.T, torch.eye(len(A), dtype=A.dtype), rtol=1e-5, atol=1e-5)
    best = torch.linalg.svdvals(rows)[: len(A)].square().sum()
    assert (rows @ A.T).square().sum().item() == pytest.approx(best.item(), rel=1e-5)  # no rank r projection keeps more
    assert torch.equal(layer(x), base(x))


def test_eva_of_one_and_three_dimensions_and_linear_layers():
    for kind in ("1d", "3d", "linear"):
        layer, x = OTHERS[kind]()
        met = copy.deepcopy(layer)
        if kind != "linear":  # an identity kernel for each weight shows what it meets
            met.bias = None
            met.weight = nn.Parameter(torch.eye(layer.weight[0].numel()).view(-1, *layer.weight.shape[1:]))
            rows = met._conv_forward(x, met.weight, None).movedim(1, -1).flatten(0, -2).double()
        else:
            rows = x.double()
        A = adapt(layer, init="eva", init_data=[x]).convlora["default"].lora_A.detach().flatten(1).double()
        best = torch.linalg.svdvals(rows)[: len(A)].square().sum().item()
        assert (rows @ A.T).square().sum().item() == pytest.approx(best, rel=1e-5)


def test_eva_sees_what_a_forward_that_pads_by_itself_shows_its_kernels():
    layers = need("timm.layers")
    conv, x = layers.create_conv2d(3, 8, 3, stride=2, padding="same"), torch.randn(2, 3, 10, 11)
    assert type(conv).__name__ == "Conv2dSame"
    net = convlora.inject(nn.Sequential(conv), 2, modules_to_save=None, init="eva", init_data=[x])
    # 10 = 2·4 + 2 needs one zero in all, at the end; 11 = 2·5 + 1 one on each side.
    rows = F.unfold(F.pad(x, (1, 1, 0, 1)), 3, stride=2).transpose(1, 2).flatten(0, 1).double()
    A = net[0].convlora["default"].lora_A.detach().flatten(1).double()
    best = torch.linalg.svdvals(rows)[:2].square().sum().item()
    assert (rows @ A.T).square().sum().item() == pytest.approx(best, rel=1e-5)


# ---- what is left as it was


class Stateful(nn.Module):
    """Counts its forwards, draws random numbers, and has a hook: all that a look must leave as it was."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
        self.register_buffer("count", torch.zeros(()))
        self.bn.eval()
        self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x):
        self.count += 1
        return self.fc(self.bn(self.conv(x + torch.randn(()))).mean((2, 3)))


@pytest.mark.parametrize("make_batch", [lambda x: x, lambda x: (x, 1), lambda x: {"x": x}])
def test_eva_leaves_the_model_as_it_was(make_batch):
    model = Stateful().train()
    before, random = snapshot(model), torch.random.get_rng_state()
    batches = (make_batch(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(i))) for i in range(3))
    plan = convlora.plan(model, 2, init="eva")
    factors = init_room.first_factors(plan, model, batches)
    assert factors.keys() == {"conv"}
    assert snapshot(model) == before and torch.equal(torch.random.get_rng_state(), random)
    convlora.inject(model, 2, init="eva", init_data=[make_batch(torch.randn(2, 3, 6, 6))])
    assert snapshot(convlora.remove(model)) == before


def test_eva_beside_an_adapter_looks_at_the_base(net, images):
    alone = convlora.inject(copy.deepcopy(net), 2, init="eva", init_data=[images])
    convlora.inject(net, 2, init="olora")
    randomise(net)
    expected = net(images)
    convlora.add_adapter(net, "second", 2, init="eva", init_data=iter([images]))
    assert torch.equal(net(images), expected)
    for name in ("stem", "block.0", "block.3"):
        mine, theirs = net.get_submodule(name).convlora["second"], alone.get_submodule(name).convlora["default"]
        assert torch.equal(mine.lora_A, theirs.lora_A)


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.used(x).mean((2, 3)))


# ---- in bounded memory


def rows_of(spectrum, count, columns):
    """Rows whose singular values fall as asked; ``drifting`` shows one direction after another."""
    if spectrum == "drifting":
        return torch.eye(columns)[torch.arange(count) * columns // count] + 0.01 * torch.randn(count, columns)
    if spectrum == "few":
        return torch.randn(3, columns)
    if spectrum == "zero":
        return torch.zeros(count, columns)
    scale = {"flat": torch.ones(columns), "falling": 0.97 ** torch.arange(columns), "step": torch.ones(columns)}[
        spectrum
    ]
    if spectrum == "step":
        scale[4:] = 0.2
    turned = torch.linalg.qr(torch.randn(columns, columns)).Q
    return (torch.randn(count, columns) * scale) @ turned


@pytest.mark.parametrize("spectrum", ["flat", "falling", "step", "drifting", "few", "zero"])
@pytest.mark.parametrize("part", [1000, 37])
def test_a_sketch_misses_no_more_than_frequent_directions_may(spectrum, part, monkeypatch):
    monkeypatch.setattr(room, "WHOLE_UP_TO", 0)
    rank, columns = 4, 160
    rows = rows_of(spectrum, 1000, columns)
    sketch = room._Sum(columns, rank, torch.empty(0))
    for each in rows.split(part):
        sketch.add(each)
    assert not sketch.is_whole and sketch.numbers.shape == (2 * sketch.half, columns) and sketch.half == 40
    exact = rows.double()
    energies = torch.linalg.svdvals(exact).square()
    missed = torch.linalg.eigvalsh(exact.T @ exact - sketch.numbers.double().T @ sketch.numbers.double())
    most = min(energies[k:].sum().item() / (sketch.half + 1 - k) for k in range(sketch.half + 1))
    rounding = 1e-5 * energies.sum().item() + 1e-12
    assert missed[0] >= -rounding and missed[-1] <= most + rounding
    A = sketch.leading(rank).double()
    torch.testing.assert_close(A @ A.T, torch.eye(rank, dtype=A.dtype), rtol=0, atol=1e-5)
    kept = (exact @ A.T).square().sum().item()
    assert kept >= energies[:rank].sum().item() - rank * most - rounding
    assert sketch.kept(A.float()) == pytest.approx(kept, abs=rank * most + rounding)


@pytest.mark.parametrize("layer", [nn.Conv2d(20, 8, 3, padding=1), nn.Linear(160, 8)])
def test_a_wide_layer_gets_nearly_the_best_directions_from_a_sketch(layer, monkeypatch):
    monkeypatch.setattr(room, "WHOLE_UP_TO", 0)
    wide = isinstance(layer, nn.Linear)
    mixed = torch.randn(3, 20) * torch.tensor([[3.0], [2.0], [1.0]])  # images of three colours, and a little noise
    x = torch.einsum("nchw,cd->ndhw", torch.randn(12, 3, 8, 8), mixed) + 0.1 * torch.randn(12, 20, 8, 8)
    x = x.flatten(2).reshape(-1, 160) if wide else x
    layer = copy.deepcopy(layer)
    rows = patches_by_unfold(layer, x)
    A = adapt(layer, 2, init_data=x.split(4)).convlora["default"].lora_A.detach().flatten(1).double()
    best = torch.linalg.svdvals(rows)[:2].square().sum().item()
    assert (rows @ A.T).square().sum().item() == pytest.approx(best, rel=5e-3)  # what the sketch may miss is more


def test_patches_are_laid_out_in_small_parts_and_give_the_same_directions(monkeypatch):
    layer, x = nn.Conv2d(4, 8, 3, padding=1), torch.randn(3, 4, 10, 10)
    whole = adapt(copy.deepcopy(layer), init_data=[x]).convlora["default"].lora_A.detach().flatten(1)
    sizes, add = [], room._Sum.add
    monkeypatch.setattr(room._Sum, "add", lambda self, rows: (sizes.append(rows.numel()), add(self, rows)))
    for at_once in (2**21, 3000, 400, 36):  # all images; parts of an image; of a line; one position
        sizes.clear()
        monkeypatch.setattr(room, "AT_ONCE", at_once)
        A = adapt(copy.deepcopy(layer), init_data=[x]).convlora["default"].lora_A.detach().flatten(1)
        assert max(sizes) <= at_once and sum(sizes) == 3 * 100 * 36
        torch.testing.assert_close(A.T @ A, whole.T @ whole, rtol=1e-4, atol=1e-5)  # sums in another order


def test_memory_grows_with_columns_and_not_with_their_square():
    half = room._Sum(9216, 8, torch.empty(0)).half
    assert half == 48 and room._Sum(512, 8, torch.empty(0)).numbers.numel() == 512**2
    for columns in (513, 4608, 9216):
        assert room._Sum(columns, 8, torch.empty(0)).numbers.numel() == 2 * half * columns
    timm = need("timm")
    with torch.device("meta"):
        plan = convlora.plan(timm.create_model("resnet50"), 8)
    columns = [math.prod(layer.weight_shape[1:]) for layer in plan.layers]
    held = sum(room._Sum(each, 8, torch.empty(0, device="meta")).numbers.numel() for each in columns)
    assert held < 0.11 * sum(each**2 for each in columns)  # of what covariances of all layers would hold


# ---- when reading stops


class Loader:
    """Batches made as they are asked for, and how many were."""

    def __init__(self, make, count=None):
        self.make, self.count, self.read = make, count, 0

    def __iter__(self):
        for i in itertools.count() if self.count is None else range(self.count):
            self.read += 1
            yield self.make(i)


def drawn(i, channels=3, images=8):
    """A batch of smooth images whose channels vary together."""
    generator = torch.Generator().manual_seed(i)
    mixed = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    blots = F.interpolate(torch.randn(images, channels, 3, 3, generator=generator), size=(8, 8), mode="bilinear")
    return torch.einsum("nchw,cd->ndhw", blots, mixed)


def network():
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))


def test_reading_stops_once_the_directions_stand_still_and_repeats():
    model, endless = network(), Loader(drawn)
    found = convlora.inject(copy.deepcopy(model), 2, init_data=endless)
    assert 2 <= endless.read <= 20
    again = Loader(drawn, 500)
    same = convlora.inject(copy.deepcopy(model), 2, init_data=again)
    assert again.read == endless.read
    for mine, theirs in zip(found.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    first, layer = model[0], found[0]
    rows = patches_by_unfold(first, torch.cat([drawn(1000 + i) for i in range(20)]))  # images that it has not read
    A = layer.convlora["default"].lora_A.detach().flatten(1).double()
    best = torch.linalg.svdvals(rows)[: len(A)].square().sum().item()
    assert (rows @ A.T).square().sum().item() >= 0.98 * best


def test_reading_goes_on_while_batches_show_something_new():
    """Each batch lights another input channel, so the directions before it miss all of that batch."""
    convolution = nn.Conv2d(16, 16, 1)

    def one_channel(i):
        x = torch.zeros(2, 16, 4, 4)
        x[:, i % 16] = 1.0 + i  # more each time: it belongs to the leading ones
        return x

    loader = Loader(one_channel, 16)
    adapt(convolution, 4, init_data=loader)
    assert loader.read == 16


def test_the_criterion_lays_what_is_missed_to_the_last_batch(monkeypatch):
    layer, x = nn.Linear(6, 6), torch.eye(6)
    plan = convlora.plan(nn.Sequential(layer), 1, target_modules=nn.Linear, modules_to_save=None)
    for second, still in (((10.0, 0.9), True), ((10.0, 1.1), False)):
        met = room._Met(layer, plan.layers[0])
        layer(10 * x[:1])  # all energy in the first direction
        assert met.has_converged() is False
        assert met.has_converged() is False  # no batch since
        layer(torch.stack([second[0] * x[0], second[1] * x[0] + 0 * x[1]]))
        turned = 10 * x[0] + (1.0 if still else 30.0) * x[1]
        layer(turned[None])
        rows = torch.stack([10 * x[0], second[0] * x[0], second[1] * x[0], turned]).double()
        energy, best = rows.square().sum(), torch.linalg.svdvals(rows)[0].square()
        missed = best - rows[:, 0].square().sum()
        assert bool(missed <= room.CONVERGED * (energy - 100) / energy * best) is still
        assert met.has_converged() is still
        met.hook.remove()


def test_a_layer_that_no_batch_reaches_does_not_make_it_read_for_ever():
    endless = Loader(drawn)
    with pytest.raises(convlora.TargetError, match="init_data does not reach unused"):
        convlora.inject(TwoWays(), 2, init_data=endless)
    assert endless.read <= 20


# ---- any batch


Pair = collections.namedtuple("Pair", "image label")
FORMS = {
    "tensor": lambda x: x,
    "pair": lambda x: (x, torch.tensor([0, 1])),
    "list": lambda x: [x, ["a", "b"]],
    "named tuple": lambda x: Pair(x, 1),
    "three": lambda x: (x, torch.zeros(2, 4), {"id": 3}),
    "named as forward has it": lambda x: {"x": x},
    "with what forward does not take": lambda x: {"label": torch.tensor([0, 1]), "x": x, "weight": torch.ones(2)},
    "named otherwise": lambda x: {"label": torch.tensor([0, 1]), "image": x, "path": ["a", "b"]},
    "a mapping that is no dict": lambda x: collections.UserDict(image=x),
    "a dict in a pair": lambda x: ({"image": x}, torch.tensor([0, 1])),
    "in double precision": lambda x: x.double(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_form_shows_the_same(form):
    x, model = torch.randn(2, 3, 6, 6), TwoWays()
    plain = convlora.inject(copy.deepcopy(model), 2, exclude_modules="unused", init_data=[x])
    other = convlora.inject(copy.deepcopy(model), 2, exclude_modules="unused", init_data=[FORMS[form](x)])
    assert torch.equal(plain.used.convlora["default"].lora_A, other.used.convlora["default"].lora_A)


def test_one_batch_alone_is_read_as_one():
    x, model = torch.randn(2, 3, 6, 6), TwoWays()
    plain = convlora.inject(copy.deepcopy(model), 2, exclude_modules="unused", init_data=[x])
    for alone in (x, {"x": x}):
        other = convlora.inject(copy.deepcopy(model), 2, exclude_modules="unused", init_data=alone)
        assert torch.equal(plain.used.convlora["default"].lora_A, other.used.convlora["default"].lora_A)


class Detector(TwoWays):
    """Takes a list of images of any sizes, as torchvision's detectors do."""

    def forward(self, images, targets=None):
        assert isinstance(images, list) and targets is None
        return [self.used(image) for image in images]


def test_a_detectors_batch_is_a_list_of_images():
    images = [torch.randn(3, 6, 6), torch.randn(3, 9, 7)]
    model = Detector()
    rows = torch.cat([patches_by_unfold(model.used, image[None]) for image in images])
    options = {"exclude_modules": "unused", "init_data": [(images, [{"boxes": 1}, {}])]}
    A = convlora.inject(model, 2, **options).used.convlora["default"].lora_A.detach().flatten(1).double()
    best = torch.linalg.svdvals(rows)[:2].square().sum().item()
    assert (rows @ A.T).square().sum().item() == pytest.approx(best, rel=1e-5)


class Keywords(TwoWays):
    def forward(self, **given):
        assert given.keys() == {"pixels", "label"}
        return super().forward(given["pixels"])


def test_a_forward_of_any_keywords_gets_all():
    batch = {"pixels": torch.randn(2, 3, 6, 6), "label": torch.tensor([0, 1])}
    convlora.inject(Keywords(), 2, exclude_modules="unused", init_data=[batch])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_brought_to_the_models_dtype(dtype):
    model, x = TwoWays().to(dtype), torch.randn(2, 3, 6, 6)
    A = convlora.inject(model, 2, exclude_modules="unused", init_data=[(x, 1)]).used.convlora["default"].lora_A
    assert A.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)


# ---- data mean EVA


def test_data_mean_eva_and_an_explicit_other_beginning_is_refused():
    x, model = torch.randn(2, 3, 6, 6), TwoWays()
    options = {"exclude_modules": "unused", "init_data": [x]}
    assert convlora.plan(model, 2, **options).init == "eva" and convlora.plan(model, 2).init == "kaiming"
    implied = convlora.inject(copy.deepcopy(model), 2, **options)
    asked = convlora.inject(copy.deepcopy(model), 2, init="eva", **options)
    assert convlora.summary(implied).init == "eva"
    assert torch.equal(implied.used.convlora["default"].lora_A, asked.used.convlora["default"].lora_A)
    for init in ("kaiming", "gaussian"):
        with pytest.raises(convlora.TargetError, match=f"init='{init}' reads no data"):
            convlora.inject(model, 2, init=init, **options)
    with pytest.raises(convlora.TargetError, match="init=''; it must be one of"):
        convlora.inject(model, 2, init="")


# ---- what is refused


class Pictures(torch.utils.data.Dataset):
    """One image at a time, and no loader round it."""

    def __getitem__(self, index):
        return torch.randn(3, 5, 5), 0

    def __repr__(self):
        return "some pictures"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": "eva"}, r"init='eva' reads images, and none were given: add init_data=loader, or .*'gaussian'"),
        ({"init": "eva", "init_data": []}, "init_data holds no batch"),
        ({"init": "eva", "init_data": [torch.randn(1, 3, 5, 5)]}, "init_data does not reach unused"),
        (
            {"init": "eva", "init_data": [torch.full((1, 3, 5, 5), math.nan)], "exclude_modules": "unused"},
            "init_data is not finite in used",
        ),
        ({"init": "pissa", "init_data": [1]}, "init='pissa' reads no data"),
        ({"init": "kaiming", "init_data": [1]}, "init='kaiming' reads no data: leave out init_data, or leave out init"),
        ({"init_data": 3}, "init_data=3; it must be batches"),
        ({"init_data": Pictures()}, "init_data=some pictures; it must be batches: a DataLoader"),
    ],
)
def test_data_that_do_not_serve_are_refused(options, message):
    model = TwoWays()
    before = snapshot(model)
    with pytest.raises(convlora.TargetError, match=f"{message}.*Nothing was changed"):
        convlora.inject(model, 2, **options)
    assert snapshot(model) == before


def test_an_error_of_the_model_leaves_it_as_it_was():
    model = TwoWays()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        convlora.inject(model, 2, init="eva", init_data=[torch.randn(1, 5, 5, 5)])
    assert snapshot(model) == before


def test_eva_refuses_a_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3))
    with pytest.raises(convlora.UnsupportedLayerError, match=r"0: init='eva' .* this is a ConvTranspose2d"):
        convlora.inject(model, 2, target_modules="0", modules_to_save=None, init="eva", init_data=[1])


def test_eva_in_real_networks():
    timm = need("timm")
    torch.manual_seed(0)
    for name in ("tf_efficientnet_lite0", "nf_resnet26"):
        model = timm.create_model(name, num_classes=2).eval()
        images = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            expected = model(images)
            convlora.inject(model, 2, init="eva", init_data=[images])
            assert torch.equal(model(images), expected)
