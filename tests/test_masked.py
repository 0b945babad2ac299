"""Activations that keep a mask and pooling that keeps places: torch's bits, fewer bytes, and all of it taken back."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import SmallNet, need, randomise, snapshot, through_torch_save
from injected import gradients
from test_takeback import run_interrupted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import convlora
from convlora import StateError
from convlora._layer.masked import Masked, Masks, mixin_for, pack, set_masked, unpack

SPECIAL = (-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 6.0, 1.0, -1.0, 1e-45, -1e-45, 3.0)
"""Bounds of the activations and what else a comparison could take wrongly."""
AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = {"small": (3, 5, 7, 9), "large": (4, 17, 23, 25)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)


class OwnReLU(nn.ReLU):
    """A subclass with the plain forward."""


class Doubled(nn.ReLU):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


ACTIVATIONS: dict[str, Callable[[bool], nn.Module]] = {
    "ReLU": lambda inplace: nn.ReLU(inplace),
    "a subclass": lambda inplace: OwnReLU(inplace),
    "ReLU6": lambda inplace: nn.ReLU6(inplace),
    "Hardtanh": lambda inplace: nn.Hardtanh(-1.0, 3.0, inplace),
    "LeakyReLU": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "LeakyReLU, flat": lambda inplace: nn.LeakyReLU(0.0, inplace),
}
POOLS: dict[str, Callable[[], nn.Module]] = {
    "3, 2, 1": lambda: nn.MaxPool2d(3, 2, 1),
    "2": lambda: nn.MaxPool2d(2),
    "ceiling": lambda: nn.MaxPool2d(2, 2, ceil_mode=True),
    "dilated": lambda: nn.MaxPool2d(3, 1, 1, 2),
    "two sizes": lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
    "average": lambda: nn.AvgPool2d(2),
    "average, padded": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average, divided by another number": lambda: nn.AvgPool2d((3, 2), (2, 1), divisor_override=5),
}


def masked(module: nn.Module, masks: Masks = True) -> nn.Module:
    set_masked(module, masks)
    assert isinstance(module, Masked)
    return module


def bits(tensor: Tensor) -> Tensor:
    """So that -0.0 differs from 0.0, and NaN equals NaN."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(AS_INTEGERS[tensor.element_size()])


@dataclass
class Run:
    """What a module did with an input and a gradient."""

    tensors: tuple[Tensor, ...]
    """Output, gradient, and the input afterwards."""
    strides: tuple[tuple[int, ...], ...]
    kept: list[Tensor]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Run)
        return self.strides == other.strides and all(
            torch.equal(bits(a), bits(b)) for a, b in zip(self.tensors, other.tensors, strict=True)
        )

    @property
    def bytes_kept(self) -> int:
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.kept}.values())


def run(module: nn.Module, x: Tensor, like: Callable[[Tensor], Tensor] = lambda g: g) -> Run:
    """A forward and a backward; ``like`` gives the gradient another form."""
    leaf = x.clone().requires_grad_(True)
    inner = leaf * 1
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(inner)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    g[0, 0, 0, 0] = float("nan")
    (grad,) = torch.autograd.grad(y, leaf, like(torch.empty_like(y).copy_(g)))
    return Run((y.detach(), grad, inner.detach()), (y.stride(), grad.stride()), kept)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_has_the_bits_of_torchs_forward_and_gradient_and_keeps_a_mask(kind, inplace, dtype):
    build = ACTIVATIONS[kind]
    for shape in SHAPES.values():
        for memory_format in FORMATS:
            x = numbers(shape, dtype, memory_format)
            expected = run(build(inplace), x)
            for masks in (True, "bits"):
                mine = run(masked(build(inplace), masks), x)
                assert mine == expected, (shape, memory_format, masks)
                packs = masks == "bits" and shape == SHAPES["large"]
                assert mine.bytes_kept == (8 * -(-x.numel() // 64) if packs else x.numel())


OTHER_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "the other memory format": lambda g: g.contiguous(memory_format=torch.channels_last),
    "one number for all": lambda g: g[:1, :1, :1, :1].expand_as(g),
    "every second of a larger one": lambda g: g.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("kind", ["ReLU", "ReLU6", "LeakyReLU"])
def test_gradient_of_another_form_has_the_bits_and_form_that_torch_gives_it(kind, form):
    for shape in SHAPES.values():
        x = numbers(shape, torch.float32, torch.contiguous_format)
        if kind == "ReLU6":
            x = x.nan_to_num(2)  # torch's own Hardtanh takes NaN as inside or outside, by the gradient's strides
        like = OTHER_FORMS[form]
        expected = run(ACTIVATIONS[kind](False), x, like)
        assert all(run(masked(ACTIVATIONS[kind](False), masks), x, like) == expected for masks in (True, "bits"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", POOLS)
def test_pooling_has_the_bits_of_torchs_and_keeps_at_most_a_byte_or_two_an_output(kind, dtype):
    for width, each in ((17, 1), (300, 2)):
        for memory_format in FORMATS:
            x = numbers((2, 3, 17, width), dtype, memory_format).round()  # with ties
            x[0, 1], x[0, 2, :5, :5] = -float("inf"), float("nan")
            mine = run(masked(POOLS[kind]()), x)
            assert mine == run(POOLS[kind](), x), (width, memory_format)
            fits = 0 if "average" in kind else each if kind not in ("2", "ceiling") else 1 if width < 255 else 2
            assert mine.bytes_kept == mine.tensors[0].numel() * fits


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (3, 5, 7), (2, 8, 16)])
def test_bits_come_back_as_they_were_packed(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(mask.clone())
    assert packed.nbytes == 8 * -(-mask.numel() // 64)
    assert torch.equal(unpack(packed, mask.shape, mask.stride()) >= 0, mask)


@pytest.mark.parametrize("kind", [*ACTIVATIONS, *POOLS])
def test_second_derivatives_are_torchs(kind):
    """Of a product with what came before, so that the gradient depends on the input."""
    torch.manual_seed(0)
    build = POOLS.get(kind) or (lambda: ACTIVATIONS[kind](False))
    found = []
    for module in (build(), masked(build())):
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (first,) = torch.autograd.grad(module(x * x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
        assert torch.autograd.gradgradcheck(
            module, (torch.rand(1, 2, 4, 4, dtype=torch.float64) + 0.1).requires_grad_()
        )
    assert torch.equal(*found) and found[0].any()


def test_many_gradients_at_once_are_torchs():
    for build in (nn.ReLU, nn.ReLU6, lambda: nn.MaxPool2d(2)):
        found = []
        for module in (build(), masked(build())):
            x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
            y = module(x)
            g = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1))
            found.append(torch.autograd.grad(y, x, g, is_grads_batched=True)[0])
        assert torch.equal(*found)


def test_what_is_no_training_on_a_tensor_takes_torchs_own_way():
    relu, pool = masked(nn.ReLU(True)), masked(nn.MaxPool2d(2))
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    own = {"_ActivationBackward", "_MaxPoolBackward"}

    def node(y: Tensor) -> str:
        return type(y.grad_fn).__name__

    assert {node(relu(x * 1)), node(pool(x * 1))} == own
    with torch.no_grad():
        assert relu(x * 1).grad_fn is None
    assert relu(torch.ones(2)).grad_fn is None
    assert node(relu((x * 1)[0])) not in own  # in place on a view
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        relu(x)
    assert node(pool((x * 1)[0])) not in own  # no batch
    assert node(masked(nn.LeakyReLU(-1.0))(x * 1)) not in own
    assert isinstance(masked(nn.MaxPool2d(2, return_indices=True))(x * 1), tuple)
    assert relu(torch.empty(0, 2, requires_grad=True) * 1).shape == (0, 2)
    assert relu(input=x * 1).shape == x.shape
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for module in (masked(nn.ReLU()), pool):
        plain = copy.deepcopy(module)
        set_masked(plain, False)
        assert torch.equal(
            torch.func.grad(lambda x, m=module: m(x).sum())(x), torch.func.grad(lambda x, m=plain: m(x).sum())(x)
        )
        assert torch.equal(torch.func.jvp(module, (x,), (x,))[1], torch.func.jvp(plain, (x,), (x,))[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module, (x.requires_grad_(),))
        assert "Python" not in str(traced.graph) and torch.equal(traced(x), plain(x))


def test_modules_of_which_nothing_less_could_be_kept_are_left_alone():
    smooth = [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Mish(), nn.Hardsigmoid(), nn.ELU(), nn.PReLU(), nn.Sigmoid()]
    others = [Doubled(), nn.AdaptiveAvgPool2d(2), nn.MaxPool1d(2), nn.Dropout(), nn.Sequential(nn.ReLU())]
    assert not any(map(mixin_for, smooth + others))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["SiLU", "Hardswish", "Mish", "GELU", "Hardsigmoid"])
def test_smooth_activations_keep_their_input_once_and_no_output(kind, inplace):
    """So torch does by itself, in place too, where it copies the input: there is nothing to save."""
    module = getattr(nn, kind)(*(() if kind == "GELU" else (inplace,)))
    x = torch.randn(2, 3, 4, 4)
    assert run(module, x).bytes_kept == x.numel() * 4


# ---- whole networks


def network() -> nn.Sequential:
    """In place and not, on norms and on convolutions, packed and not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 1), nn.LeakyReLU(0.1, True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


LEAN = [type(module) for module in network().modules() if mixin_for(module)]


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(5))


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def lean(model: nn.Module) -> int:
    return sum(isinstance(module, Masked) for module in model.modules())


def trained(model: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of one step of an injected copy."""
    model = convlora.inject(copy.deepcopy(model), 2, **options)
    randomise(model)
    y = model.train()(x)
    y.float().square().sum().backward()
    return y.detach(), gradients(model)


def same(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> bool:
    equal = all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    return torch.equal(first[0], second[0]) and first[1].keys() == second[1].keys() and equal


@pytest.mark.parametrize("norm", ["freeze", "track"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_has_the_same_bits_with_masks(pictures, dtype, norm):
    model, x = network().to(dtype), pictures.to(dtype)
    for memory_format in FORMATS:
        model, x = model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        expected = trained(model, x, norm=norm)
        assert all(same(expected, trained(model, x, norm=norm, mask_activations=masks)) for masks in (True, "bits"))


def test_training_has_the_same_bits_under_autocast(pictures):
    with torch.autocast("cpu", torch.bfloat16):
        assert same(trained(network(), pictures), trained(network(), pictures, mask_activations=True))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_training_of_a_real_network_has_the_same_bits_and_keeps_fewer_bytes(name, photos):
    torch.manual_seed(0)
    model = need("timm").create_model(name, num_classes=3)
    for module in model.modules():
        if hasattr(module, "act") and name == "test_efficientnet":
            module.act = nn.ReLU6(inplace=True) if isinstance(module.act, nn.SiLU) else module.act
    assert same(trained(model, photos), trained(model, photos, mask_activations=True))
    counts = [
        convlora.saved_bytes(convlora.inject(copy.deepcopy(model), 2, mask_activations=masks), photos).total
        for masks in (False, True, "bits")
    ]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1]


def test_merge_and_remove_give_the_plain_classes_back_and_unmerge_the_masks(pictures):
    model = network()
    before, plain = snapshot(model), classes(model)
    convlora.inject(model, 2, mask_activations=True)
    injected = classes(model)
    assert lean(model) == len(LEAN) == 4
    randomise(model)
    expected = model.eval()(pictures)
    convlora.merge(model)
    assert (
        not any(isinstance(m, Masked) for m in model.modules()) and [m for m in LEAN if m not in classes(model)] == []
    )
    convlora.unmerge(model)
    assert classes(model) == injected and torch.equal(model(pictures), expected)
    merged = convlora.remove(convlora.merge(copy.deepcopy(model)))
    assert classes(merged) == plain
    convlora.remove(model.train())
    assert snapshot(model) == before


def test_adapters_that_differ_in_it_bring_their_own(pictures, tmp_path):
    model = convlora.inject(network(), 2, mask_activations="bits", adapter_name="lean")
    convlora.add_adapter(model, "plain", 2)
    convlora.add_adapter(model, "bytes", 2, mask_activations=True)
    assert lean(model) == 4
    names = []
    for name in ("bytes", "lean"):
        convlora.set_adapter(model, name)
        names.append([type(module).__name__ for module in model.modules() if isinstance(module, Masked)])
    pool = "MaskedMaxPool2d"
    assert names[0] == ["MaskedReLU", pool, "MaskedReLU6", "MaskedLeakyReLU"]
    assert names[1] == ["PackedReLU", pool, "PackedReLU6", "PackedLeakyReLU"]
    convlora.set_adapter(model, "plain")
    assert lean(model) == 0
    convlora.unmerge(convlora.merge(model))
    assert lean(model) == 0
    convlora.set_adapter(model, "lean")
    assert lean(model) == 4
    with convlora.disable_adapter(model):
        model(pictures)
    with convlora.use_adapters(model.eval(), ["lean", "plain", None, "lean"]), torch.no_grad():
        model(pictures)
    convlora.delete_adapter(model, "plain")
    assert lean(model) == 4
    randomise(model)
    convlora.save_adapter(model, tmp_path)
    loaded = convlora.load_adapter(network(), tmp_path)
    assert lean(loaded) == 4 and convlora.summary(loaded).mask_activations == "bits"
    assert torch.equal(loaded.eval()(pictures), model(pictures))
    convlora.remove(model)
    assert lean(model) == 0


@pytest.mark.parametrize("taken", [copy.deepcopy, through_torch_save])
def test_copies_keep_masks_and_can_be_taken_back(taken, pictures):
    model = convlora.inject(network(), 2, mask_activations="bits")
    copied = taken(model)
    assert lean(copied) == 4 and classes(copied) == classes(model)
    assert same(*((m.train()(pictures).detach(), {}) for m in (model, copied)))
    convlora.remove(copied)
    assert lean(copied) == 0 and lean(model) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_has_the_same_bits(pictures, reentrant):
    """In place inside a checkpointed block too: its input is not what is overwritten."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner[3](self.inner[2](self.inner[1](self.inner[0](x))))
            return self.inner[5:](checkpoint(self.inner[4], x, use_reentrant=reentrant))

    found = [
        trained(Checkpointed(), pictures, mask_activations=masks, modules_to_save="inner.7") for masks in (False, True)
    ]
    assert same(*found)


def test_compiled_training_breaks_no_graph_and_has_the_same_bits(pictures):
    found = []
    for masks in (False, True):
        model = convlora.inject(network(), 2, mask_activations=masks)
        randomise(model)
        torch.compiler.reset()  # of a class that other tests compile, too, torch compiles eight
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(pictures)
        y.square().sum().backward()
        found.append((y.detach(), gradients(model)))
    assert same(*found)


def test_in_distributed_data_parallel_the_gradients_are_the_same(pictures):
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for masks in (False, True):
            model = convlora.inject(network(), 2, mask_activations=masks)
            randomise(model)
            y = nn.parallel.DistributedDataParallel(model)(pictures)
            y.square().sum().backward()
            found.append((y.detach(), gradients(model)))
        assert same(*found)
    finally:
        distributed.destroy_process_group()


def test_interrupted_at_any_line_activations_are_plain_or_keep_masks_all_of_them(pictures):
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.ReLU6())
    plain = classes(small)
    start = convlora.inject(copy.deepcopy(small), 1, modules_to_save=None, mask_activations=True)
    calls = {
        convlora.inject: (small, lambda model: convlora.inject(model, 1, modules_to_save=None, mask_activations=True)),
        convlora.merge: (start, convlora.merge),
        convlora.unmerge: (convlora.merge(copy.deepcopy(start)), convlora.unmerge),
        convlora.remove: (start, convlora.remove),
    }
    for beginning, call in calls.values():
        at = 1
        while True:
            model = copy.deepcopy(beginning)
            interrupted = run_interrupted(lambda model=model, call=call: call(model), at)
            if hasattr(model, "_convlora"):
                assert lean(model) == (0 if convlora.summary(model).state == "merged" else 3), (call, at)
                convlora.remove(convlora.unmerge(model) if convlora.summary(model).state == "merged" else model)
            assert lean(model) == 0 and classes(model) == plain, (call, at)
            if not interrupted:
                break
            at += 5


def test_a_part_with_a_mask_belongs_to_the_model_around_it():
    model = convlora.inject(network(), 2, mask_activations=True)
    with pytest.raises(StateError, match="belongs to a model that carries an adapter already"):
        convlora.inject(nn.Sequential(nn.Conv2d(3, 3, 1), model[2]))
    replaced = copy.deepcopy(model)
    replaced[2] = nn.GELU()
    assert lean(convlora.remove(replaced)) == 0


def test_an_activation_that_another_library_has_changed_stops_merge_and_remove_before_anything_is_done():
    model = convlora.inject(network(), 2, mask_activations=True)
    model[2].__class__ = type("Theirs", (type(model[2]),), {})
    before = classes(model)
    for call in (convlora.merge, convlora.remove):
        with pytest.raises(StateError, match="Theirs"):
            call(model)
        assert classes(model) == before


# ---- what a step will keep


def test_saved_bytes_are_those_that_autograd_keeps_of_each_module_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU())
    x = torch.randn(2, 3, 8, 8)
    found = convlora.saved_bytes(model, x)
    numbers = 2 * 4 * 8 * 8
    assert {each.name: each.count for each in found.modules} == {"0": x.nbytes, "1": 4 * numbers, "3": 4 * numbers}
    assert found.total == x.nbytes + 8 * numbers  # the second convolution keeps what the ReLU kept
    assert [each.note for each in found.modules] == ["", "less with mask_activations=True", ""]
    lines = str(found).splitlines()
    assert len(lines) == 5 and f"{found.total:,}" in lines[-1] and "Conv2d" in lines[1]
    assert convlora.saved_bytes(model.requires_grad_(False), x).total == 0


def test_saved_bytes_name_the_module_whose_own_code_keeps_them():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.conv(x))

    model = nn.Sequential(Functional(), nn.ReLU())
    convlora.inject(model, 1, modules_to_save=None, mask_activations=True)
    kept = {each.name: each for each in convlora.saved_bytes(model, (torch.randn(2, 3, 8, 8), "label")).modules}
    assert kept["0"].kind == "Functional" and kept["0"].count == 2048 and "functional" in kept["0"].note
    assert kept["1"].kind == "ReLU" and kept["1"].count == 512 and kept["1"].note == ""
    # The input, and W + ΔW of a layer so small that torch's own autograd trains it.
    assert kept["0.conv"].kind == "Conv2d" and kept["0.conv"].count == 1536 + 48 and kept["0.conv"].note == ""


def test_saved_bytes_leave_model_and_random_numbers_as_they_were(images):
    model = nn.Sequential(SmallNet(), nn.Dropout())
    convlora.inject(model, 2, norm="track", mask_activations=True)
    model.eval()[0].block.train()
    model[0].fc.weight.grad = torch.ones_like(model[0].fc.weight)
    for each in (model, convlora.remove(copy.deepcopy(model))):
        before, state = snapshot(each), torch.get_rng_state()
        with torch.no_grad():
            assert convlora.saved_bytes(each, {"input": images}).total > 0
        assert snapshot(each) == before and torch.equal(torch.get_rng_state(), state)
    assert model[0].fc.weight.grad.eq(1).all()
    with pytest.raises(RuntimeError):
        convlora.saved_bytes(model, images[:, :1])
    assert not model.training and model[0].block.training and not any(m._forward_hooks for m in model.modules())
