"""One model, several threads, processes and a long life. ``docs/adapters.md`` says which calls may meet."""

import copy
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import pytest
import reliability
import torch
from conftest import SmallNet, randomise, thorough
from torch.utils.data import DataLoader, Dataset

import convlora
from convlora import StateError


@pytest.fixture
def two():
    torch.manual_seed(0)
    model = convlora.inject(SmallNet().eval(), 3, adapter_name="a", norm="track")
    randomise(model)
    convlora.add_adapter(model, "b", 2)
    convlora.set_adapter(model, "b")
    randomise(model, seed=2)
    return convlora.set_adapter(model, "a")


def test_threads_infer_in_blocks_of_their_own_while_another_switches():
    tally = reliability.threads_that_route(seconds=2, threads=3)
    assert tally.tried and not tally.losses, str(tally)


def test_a_switch_never_passes_through_the_plain_class_of_a_norm(two, monkeypatch):
    """A routed forward of another thread would miss the norm, and a block opened there would put its class on top."""
    seen = set()
    plain = torch.nn.Module.__setattr__

    def watch(self, name, value):
        if name == "__class__":
            seen.add(value)
        plain(self, name, value)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "__setattr__", watch, raising=False)
    for name in ("b", "a", "b"):
        convlora.set_adapter(two, name)
    assert seen and torch.nn.BatchNorm2d not in seen


def test_a_save_and_loads_of_one_directory_at_the_same_time(two, tmp_path, images):
    base = convlora.remove(copy.deepcopy(two))
    expected = two(images)
    convlora.save_adapter(two, tmp_path)
    end = threading.Event()

    def save():
        while not end.is_set():
            convlora.save_adapter(two, tmp_path)

    saver = threading.Thread(target=save)
    saver.start()
    try:
        loaded = [convlora.load_adapter(copy.deepcopy(base), tmp_path).eval() for _ in range(10)]
    finally:
        end.set()
        saver.join()
    assert all(torch.equal(each(images), expected) for each in loaded)


class Predicted(Dataset):
    """Images as the model sees them, computed in the worker."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            alone = self.model(self.images[index : index + 1])[0]
            with convlora.use_adapters(self.model, ["b"]):
                other = self.model(self.images[index : index + 1])[0]
        return alone, other


@pytest.mark.parametrize("start", ["fork", thorough("spawn")])
def test_workers_of_a_loader_compute_with_an_injected_model(two, images, start):
    with torch.no_grad():
        expected = two(images)
        with convlora.use_adapters(two, ["b"] * len(images)):
            other = two(images)
    loader = DataLoader(Predicted(two, images), batch_size=4, num_workers=1, multiprocessing_context=start)
    alone, routed = next(iter(loader))
    # Workers take the images one by one: fp32 rounding.
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routed, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(two(images), expected)


@pytest.mark.thorough
def test_memory_is_flat_and_every_bit_comes_back_over_300_cycles():
    """10,000: `python -m tests.reliability cycles`."""
    spawn = multiprocessing.get_context("spawn")  # where no other test's rubbish is collected meanwhile
    with ProcessPoolExecutor(1, spawn) as alone:
        tally, ((_, first, _), (_, last, _)) = alone.submit(reliability.cycles, 300, after=100).result()
    assert tally.tried == 301 and not tally.losses, str(tally)
    assert abs(last - first) < 100  # a leak of one object a cycle would be 200


def test_nothing_that_was_removed_is_kept_alive(two):
    import gc
    import weakref

    adapters = weakref.ref(two.stem.convlora)
    factor = weakref.ref(two.stem.convlora["a"].lora_A)
    two(torch.zeros(1, 3, 8, 8))
    convlora.remove(two)
    gc.collect()
    assert adapters() is None and factor() is None


IN_BLOCK = {
    "disable_adapter": lambda m: convlora.disable_adapter(m),
    "use_adapters": lambda m: convlora.use_adapters(m, ["a", "b"]),
}
CALLS = {
    "set_adapter": lambda m, d: convlora.set_adapter(m, "b"),
    "add_adapter": lambda m, d: convlora.add_adapter(m, "c", 1),
    "load_adapter": lambda m, d: convlora.load_adapter(m, d, adapter_name="c"),
    "delete_adapter": lambda m, d: convlora.delete_adapter(m, "b"),
    "combine_adapters": lambda m, d: convlora.combine_adapters(m, {"a": 1, "b": 1}, "c"),
    "shrink": lambda m, d: convlora.shrink(m, 1),
    "extract": lambda m, d: convlora.extract(m, tuned(), 1, adapter_name="c"),
    "prepare_for_hotswap": lambda m, d: convlora.prepare_for_hotswap(m),
    "hotswap_adapter": lambda m, d: convlora.hotswap_adapter(m, d),
    "merge": lambda m, d: convlora.merge(m),
    "remove": lambda m, d: convlora.remove(m),
    "save_adapter": lambda m, d: convlora.save_adapter(m, d),
    "disable_adapter": lambda m, d: convlora.disable_adapter(m).__enter__(),
    "use_adapters": lambda m, d: convlora.use_adapters(m, ["a"]).__enter__(),
    "scaled": lambda m, d: convlora.scaled(m, 0.5).__enter__(),
    "set_scale": lambda m, d: convlora.set_scale(m, "a", 0.5),
}
ALLOWED = {
    "disable_adapter": {
        "add_adapter",
        "load_adapter",
        "extract",
        "remove",
        "save_adapter",
        "disable_adapter",
        "set_scale",
    },
    "use_adapters": {"set_adapter", "save_adapter", "use_adapters", "scaled"},
}


def tuned():
    torch.manual_seed(0)
    net = SmallNet().eval()
    with torch.no_grad():
        net.stem.weight += 1
    return net


@pytest.mark.parametrize("block", IN_BLOCK)
@pytest.mark.parametrize("call", CALLS)
def test_which_calls_are_refused_in_which_block_is_as_the_docs_say(two, tmp_path, images, block, call):
    convlora.save_adapter(two, tmp_path)
    expected = two(images)
    with IN_BLOCK[block](two):
        if call in ALLOWED[block]:
            CALLS[call](two, tmp_path)
        else:
            with pytest.raises(StateError, match=r"Nothing was changed|disabled"):
                CALLS[call](two, tmp_path)
    if call not in ALLOWED[block]:
        assert torch.equal(two(images), expected)


def test_a_block_that_opens_while_another_thread_merges_is_right_or_refused(two):
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        expected = convlora.set_adapter(two, "b")(x)
    convlora.set_adapter(two, "a")
    is_over = threading.Event()

    def merge_on():
        while not is_over.is_set():
            with suppress(StateError):  # a block is open
                convlora.unmerge(convlora.merge(two))

    thread, served = threading.Thread(target=merge_on), 0
    thread.start()
    try:
        for _ in range(4000):  # merging takes most of the time
            try:
                with torch.no_grad(), convlora.use_adapters(two, ["b"]):
                    y = two(x)
            except StateError:  # merged just now: all tries would fit into this one moment
                time.sleep(1e-3)
                continue
            served += 1
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)  # routed: another order of sums
            if served == 50:
                break
    finally:
        is_over.set()
        thread.join()
    assert served > 20
