import copy

from conftest import need_extra

need_extra("histopathology")

import pytest
import timm
import torch
from torch import nn

import convlora
from examples.histopathology.errors import ExampleError
from examples.histopathology.training import memory
from examples.histopathology.training.memory import LiveBytes, free_bytes, largest_batch, step_bytes


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return convlora.inject(timm.create_model("test_resnet.r160_in1k", num_classes=1), rank=2)


def test_live_bytes_are_those_of_the_tensors_that_are_alive_together():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        d = c.view(10, 100)  # no bytes of its own
        d += 1
        del b, c, d
    assert live.peak == 2 * 4000
    assert live.now == 0


def test_what_was_there_before_does_not_count():
    old = torch.zeros(1000)
    with LiveBytes() as live:
        old += 1
        old.view(-1)[:10].neg_()
        del old
    assert (live.peak, live.now) == (0, 0)


def test_what_the_backward_needs_is_alive_until_then():
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        weight.exp().sum().backward()
    # exp, kept; the sum; its gradient, a view of one number; the gradient to exp's input, which becomes the weight's
    assert 8000 <= live.peak <= 8000 + 64


def test_a_steps_bytes_lie_on_a_line(model):
    two, four, eight = (step_bytes(model, size, 64) for size in (2, 4, 8))
    # the smallest batches' activations are hidden below Adam's own states, if anything
    assert eight - four == pytest.approx(2 * (four - two), rel=0.05)


def test_weights_gradients_and_adams_states_are_in_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 1, bias=False))
    weight = 4 * 3 * 8 * 8
    found = step_bytes(model, 1, 8)
    # the weight, its gradient, two states of Adam, one image of the same size, two terms of Adam's step; numbers beside
    assert 5 * weight <= found <= 7.1 * weight


def test_training_all_takes_more_than_training_factors(model):
    everything = convlora.remove(copy.deepcopy(model)).requires_grad_(True)
    assert step_bytes(everything, 2, 64) > step_bytes(model, 2, 64)


def test_measuring_leaves_the_model_and_the_generator_alone(model):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    step_bytes(model, 2, 64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_the_batch_is_halved_until_it_fits(model):
    room = step_bytes(model, 16, 64)
    assert largest_batch(model, 64, 64, free=int(room * 1.2 / memory.SHARE)) == 16
    assert largest_batch(model, 8, 64, free=int(room * 1.2 / memory.SHARE)) == 8
    assert largest_batch(model, 24, 64, free=int(room * 1.2 / memory.SHARE)) == 12
    with pytest.raises(ExampleError, match=r"one 64-pixel image takes .* MB, and 0 MB may be used; give a smaller"):
        largest_batch(model, 64, 64, free=1000)


@pytest.mark.thorough
def test_where_too_much_is_an_error_the_batch_is_tried(model, monkeypatch):
    tried = []

    def step(model, batch_size, *rest):
        tried.append(batch_size)
        if batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(memory, "_step", step)
    assert memory._largest_tried(model, 64, 64, nn.Module.train) == 8
    assert tried == [64, 32, 16, 8]
    monkeypatch.setattr(memory, "_step", lambda model, size, *rest: step(model, 9))
    with pytest.raises(ExampleError, match="not even one 64-pixel image fits"):
        memory._largest_tried(model, 64, 64, nn.Module.train)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path if name == "/sys/fs/cgroup" else real(name))
    assert free_bytes() == 3000
    (tmp_path / "memory.stat").write_text("active_file 900\ninactive_file 700\n")  # files' cache is let go when wanted
    assert free_bytes() == 3700
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() > 3000
