"""The benchmarks of cost: their instruments on known cases, that every arm trains what it says, the pages' figures."""

import dataclasses
import json
import math
import multiprocessing
import sys

import pytest
import torch
from conftest import need, thorough
from torch import nn

need("timm")
need("peft")

from benchmarks import memory, paths, routing
from benchmarks.overhead import __main__ as overhead
from benchmarks.overhead import measuring
from benchmarks.overhead.apart import Apart
from benchmarks.overhead.arms import ALL_TRAINING, INFERENCE, TRAINING
from benchmarks.overhead.arms import METHODS as METHOD_ARMS
from benchmarks.overhead.bench import Bench
from benchmarks.overhead.report import markdown
from benchmarks.overhead.rounds import run
from benchmarks.overhead.runs import Run, Settings
from benchmarks.overhead.subjects import NotAvailable, head_names, make_base
from convlora._layer import paths as paths_room

CPU = torch.device("cpu")
NETWORK = "test_resnet"
TINY = Settings(model=NETWORK, batch=2, size=32, rank=4, rounds=2)
OPTIONS = ["--model", NETWORK, "--batch", "2", "--size", "32", "--rank", "4", "--rounds", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of every arm, by the program, read from its file; the file, and the picture."""
    folder = tmp_path_factory.mktemp("overhead")
    overhead.main([*OPTIONS, "--json", str(folder / "run.json"), "--plot", str(folder / "run.svg")])
    (found,) = overhead.read(folder / "run.json")
    return found, folder / "run.json", folder / "run.svg"


def bench_of(name, *, train=True, **settings):
    arm = (ALL_TRAINING if train else INFERENCE)[name]
    try:
        return Bench.of(Settings(**{**vars(TINY), **settings}), arm, train=train)
    except NotAvailable as reason:
        pytest.skip(f"{name}: {reason}")


# Instruments


def test_saved_bytes_count_each_storage_once_and_the_models_own_not_at_all():
    weight = nn.Parameter(torch.randn(100))
    x = torch.randn(2, 50)

    def forward():
        flat = x.view(100)  # a view: the storage of x
        return (flat * weight * weight * flat).sum()

    # Saved by the products: flat, flat * weight, weight, and flat again.
    assert measuring.saved_bytes(forward, [weight]) == 400 + 400
    assert measuring.saved_bytes(forward, []) == 400 + 400 + 400


def test_saved_bytes_of_a_dead_tensors_address_are_not_lost():
    weight = torch.randn(1000, requires_grad=True)

    def forward():
        total = weight.sum()
        for _ in range(5):  # each square is saved and let go by Python, its storage held by the graph alone
            total = total + (torch.randn(1000) * weight).sum()
        return total

    assert measuring.saved_bytes(forward, [weight]) == 5 * 4000


def test_peak_counts_what_is_there_at_once():
    def step():
        first = torch.empty(1_000_000)
        del first
        second, third = torch.empty(2_000_000), torch.empty(500_000)
        return second, third

    assert measuring.peak_bytes(step, CPU) == 10_000_000


def test_the_peak_of_a_step_is_the_same_each_time():
    bench = bench_of("convlora")
    bench.two_steps()
    peaks = []
    for _ in range(3):
        bench.optimizer.zero_grad()
        peaks.append(measuring.peak_bytes(bench.step, CPU))
    assert len(set(peaks)) == 1


@pytest.mark.parametrize("needed", [lambda n: 7 * n + 30, lambda n: 7 * n + 30 + n % 5])
@pytest.mark.parametrize("budget", [0, 40, 1000, 12345])
@pytest.mark.parametrize("first", [1, 4, 100])
def test_the_largest_batch_fits_and_one_more_does_not(needed, budget, first):
    found = memory.largest_batch(needed, budget, first)
    assert (needed(found) <= budget or not found) and needed(found + 1) > budget


def test_the_memory_benchmark_prints_each_arm_and_less_for_masks(capsys, tmp_path):
    options = ["--model", NETWORK, "--batch", "2", "--size", "32", "--rank", "4", "--budget", "0"]
    memory.main([*options, "--json", str(tmp_path / "memory.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "memory.json").read_text())["found"][NETWORK]
    assert [each["arm"] for each in found] == list(memory.ARMS) and all(f"| {arm} |" in printed for arm in memory.ARMS)
    full, plain, masks, _, lean, bits = found
    assert full["saved"] > plain["saved"] > masks["saved"] and full["peak"] > plain["peak"] >= masks["peak"]
    assert bits["saved"] <= lean["saved"] < 0.5 * masks["saved"]


def test_rounds_rotate_and_the_first_is_not_counted():
    called = []
    ways = {name: lambda name=name: called.append(name) or float(len(called)) for name in "abc"}
    found = measuring.interleave(ways, rounds=2)
    assert "".join(called) == "abcbcacab"
    assert found == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_quartiles_of_few_figures():
    assert measuring.Quartiles.of([3.0]) == measuring.Quartiles(3.0, 3.0, 3.0)
    assert measuring.Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == measuring.Quartiles(2.0, 3.0, 4.0)


# Arms


def trained_names(name, model):
    """Which parameters an arm should train, by its own rule."""
    head = tuple(f"{head}." for head in head_names(make_base(NETWORK)))
    kinds = {
        "full": lambda key, module: True,
        "probe": lambda key, module: key.startswith(head),
        "lower": lambda key, module: key.startswith(head),
        "norms": lambda key, module: key.startswith(head) or isinstance(module, nn.BatchNorm2d),
        "convlora": lambda key, module: key.startswith(head) or factors in key,
        "peft": lambda key, module: "modules_to_save.default" in key or ".lora_" in key,
        "loralib": lambda key, module: key.startswith(head) or ".lora_" in key,
        "lycoris": lambda key, module: key.startswith(head) or ".lora_" in key,
    }
    factors = ".lora_B" if "freeze-A" in name or "lean" in name else ".lora_"
    rule = kinds[name.partition("-")[0]]
    owners = {key: model.get_submodule(key.rpartition(".")[0]) for key, _ in model.named_parameters()}
    return {key for key, owner in owners.items() if rule(key, owner)}


@pytest.mark.parametrize("name", TRAINING)
def test_every_arm_trains_what_it_should_and_nothing_else(name):
    bench = bench_of(name)
    found = measuring.movement(bench.subject.model, bench.two_steps)
    assert found.stuck == () and found.strayed == ()
    assert set(found.moved) == trained_names(name, bench.subject.model)
    statistics = any("running_mean" in key for key in found.buffers)
    moving = ("full", "norms", "convlora-track", "lower-bound-track", "peft", "loralib", "lycoris")
    assert statistics == (name in moving)


@pytest.mark.parametrize("name", [name if name.startswith("convlora") else thorough(name) for name in METHOD_ARMS])
def test_an_arm_of_a_method_trains_that_and_nothing_else(name):
    bench = bench_of(name)
    found = measuring.movement(bench.subject.model, bench.two_steps)
    assert found.strayed == () and not any("running_mean" in key for key in found.buffers)
    head = head_names(make_base(NETWORK))
    assert len([key for key in found.moved if not any(each in key for each in head)]) >= bench.subject.adapted > 0


def test_an_arm_that_trains_what_it_should_not_is_refused():
    bench = bench_of("probe")
    frozen = next(p for p in bench.subject.model.parameters() if not p.requires_grad)
    step = bench.step

    def leak():
        step()
        frozen.data += 1

    bench.step = leak
    with pytest.raises(RuntimeError, match=r"probe: .*changed \['"):
        bench.sizes_in_training()


def test_inference_arms_of_one_library_predict_the_same():
    torch.manual_seed(0)
    merged, unmerged, not_kept, base = (
        bench_of(name, train=False) for name in ("merged", "unmerged", "not-kept", "base")
    )
    for bench in (unmerged, not_kept):  # merged was filled by the same seeds, from make_base on
        assert torch.equal(bench.predict(), merged.predict())
    assert not torch.equal(base.predict(), merged.predict())


def test_the_dropped_weight_is_computed_again():
    from convlora._layer.adapted import AdaptedLayer, held

    bench = bench_of("not-kept", train=False)
    bench.look()  # the first forward is watched for writes, and keeps nothing
    bench.look()
    layers = [module for module in bench.subject.model.modules() if isinstance(module, AdaptedLayer)]
    assert layers and all(held(layer).kept._entry is not None for layer in layers)
    bench.subject.before()
    assert all(held(layer).kept._entry is None for layer in layers)


@pytest.mark.parametrize("name", ["convlora", "full"])
def test_autocast_and_channels_last_train_too(name):
    bench = bench_of(name, amp=True, channels_last=True)
    assert bench.images.is_contiguous(memory_format=torch.channels_last)
    assert bench.predict().dtype == torch.bfloat16
    bench.two_steps()
    assert math.isfinite(bench.forward().item())


# The program


@pytest.mark.thorough
def test_every_arm_is_there_with_finite_ratios(measured):
    found, _, _ = measured
    assert [r.arm for r in found.training] == list(TRAINING)
    assert [r.arm for r in found.inference] == list(INFERENCE)
    for reference, results in (("full", found.training), ("base", found.inference)):
        for r in results:
            assert bool(r.unavailable) == (not r.seconds), r.arm
            assert len(r.seconds) == len(r.ratios) == (0 if r.unavailable else TINY.rounds)
            assert all(math.isfinite(x) and x > 0 for x in (*r.seconds, *r.ratios)), r.arm
        assert next(r for r in results if r.arm == reference).ratios == [1.0] * TINY.rounds
    assert all(r.other_ratios.keys() == {"full-freeze"} for r in found.training if not r.unavailable)


@pytest.mark.thorough
def test_sizes_are_in_the_order_that_the_methods_imply(measured):
    """Counted, not timed: so these hold on any machine."""
    r = {result.arm: result for result in measured[0].training}
    assert r["convlora"].saved < r["full-freeze"].saved <= r["full"].saved
    assert r["probe"].saved < r["convlora"].saved < r["convlora-track"].saved
    assert r["convlora"].optimizer < r["full"].optimizer and r["convlora"].file < r["full"].file
    assert r["full"].share == 1.0 and r["full"].trainable > r["convlora"].trainable > r["probe"].trainable > 0
    assert r["full"].optimizer >= 2 * 4 * r["full"].trainable  # AdamW's two moments in float32
    assert r["convlora"].adapted == r["convlora"].convolutions == 15
    assert r["peft"].adapted == 15 and r["full"].adapted == 0
    assert all(x.stuck == 0 for x in r.values())


@pytest.mark.thorough
def test_json_is_read_back_as_it_was_and_names_no_machine(measured):
    import platform

    found, path, picture = measured
    text = path.read_text(encoding="utf-8")
    assert Run.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert platform.node() not in text and str(path.parent) not in text
    assert found.environment["torch"] == torch.__version__ and "CPU" in found.environment["device"]
    assert picture.read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.thorough
def test_the_terminals_tables_fit_80_columns(measured):
    from benchmarks.overhead.tables import run_as_text

    assert max(map(len, run_as_text(measured[0]).splitlines())) <= 80


@pytest.mark.thorough
def test_apart_each_arm_has_a_process_of_its_own_and_the_same_sizes(measured, tmp_path, capsys):
    together, *_ = measured
    others = set(multiprocessing.active_children())  # of tests before
    with Apart(dataclasses.replace(TINY, apart=True), "convlora") as bench:
        assert bench.sizes() == bench_of("convlora").sizes() and bench.time() > 0
        (child,) = set(multiprocessing.active_children()) - others
    child.join(60)
    assert not child.is_alive()
    overhead.main([*OPTIONS, "--apart", "--arms", "convlora", "merged", "--json", str(tmp_path / "apart.json")])
    assert "apart" in capsys.readouterr().out and set(multiprocessing.active_children()) <= others
    (found,) = overhead.read(tmp_path / "apart.json")
    assert [r.arm for r in found.training + found.inference] == ["full", "convlora", "base", "merged"]
    same = {r.arm: (r.trainable, r.saved, r.peak, r.resting, r.file) for r in together.training + together.inference}
    for r in found.training + found.inference:
        assert (r.trainable, r.saved, r.peak, r.resting, r.file) == same[r.arm]
        assert len(r.ratios) == TINY.rounds and all(ratio > 0 for ratio in r.ratios)
    assert "--apart" in markdown([[found]]) and "rounds, apart" in markdown([[found]])


@pytest.mark.thorough
def test_an_arm_that_cannot_be_built_ends_its_process():
    others = set(multiprocessing.active_children())  # of tests before
    with pytest.raises(ValueError, match="rank"):
        Apart(dataclasses.replace(TINY, rank=-1), "convlora")
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.thorough
def test_a_peer_that_is_not_installed_is_named_and_the_others_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "loralib", None)
    found = run(TINY, ["loralib", "probe"], [])
    assert [r.arm for r in found.training] == ["full", "loralib", "probe"] and found.inference == []
    by_name = {r.arm: r for r in found.training}
    assert by_name["loralib"].unavailable == "not installed; pip install loralib"
    assert by_name["probe"].ratios and not by_name["probe"].unavailable


@pytest.mark.thorough
def test_the_page_is_made_of_the_files_figures(measured, tmp_path, capsys):
    found, path, _ = measured
    sweep = tmp_path / "sweep.json"
    arms = ["--arms", "convlora"]
    overhead.main([*OPTIONS, *arms, "--sweep", "rank", "1", "4", "--json", str(sweep)])
    capsys.readouterr()
    overhead.main(["--report", str(sweep), str(path), "--plot", str(tmp_path / "cost.svg")])
    page = capsys.readouterr().out
    assert "](cost.svg)" in page and (tmp_path / "cost.svg").read_text(encoding="utf-8").startswith("<svg")
    for r in found.training:
        assert f"- {r.arm}: {r.what}" in page
        assert (r.unavailable if r.unavailable else f"| {r.arm} | {r.ratio.median:.2f} |") in page
    assert "--rank 4 --rounds 2 --repeats 1 --device cpu --threads" in page
    assert "--sweep rank 1 4" in page
    for point in overhead.read(sweep):
        by_name = {r.arm: r for r in point.training}
        saved = by_name["convlora"].saved / by_name["full"].saved
        line = f"| {point.settings.rank} | {by_name['convlora'].ratio.median:.2f} / {saved:.2f} |"
        assert line in page


@pytest.mark.parametrize("options", [["colour", "1"], ["rank"], ["rank", "0"], ["rank", "x"]])
def test_a_sweep_of_nothing_is_refused(options, capsys):
    with pytest.raises(SystemExit):
        overhead.main([*OPTIONS, "--sweep", *options])
    assert "--sweep takes one of rank, batch, size" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_by_events():
    found = run(Settings(**{**vars(TINY), "device": "cuda", "repeats": 2}), ["convlora"], ["merged"])
    assert all(min(r.seconds) > 0 and r.peak > 0 for r in (*found.training, *found.inference))


# Paths


def layer(times, count=1, rank=4, size=8):
    """A timed 16 → 16 3 × 3 layer."""
    shapes = paths_room.LayerSizes(16, 16, 9, 1, rank, 2 * size**2, 2 * size**2, True)
    geometry = paths.Geometry((1, 1), (1, 1), (1, 1), 1)
    case = paths.Case((16, 16, 3, 3), geometry, (2, 16, size, size), shapes)
    return paths.Timed(case, count, dict(zip(paths.PATHS, times, strict=True)))


@pytest.mark.thorough
def test_the_program_times_every_plain_layer_by_each_path(tmp_path, capsys):
    file = tmp_path / "paths.json"
    options = ["--batch", "2", "--size", "32", "--rank", "4", "--rounds", "1", "--repeats", "1", "--estimates"]
    paths.main(["--model", NETWORK, *options, "--json", str(file)])
    text, data = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert sum(item["count"] for item in data["layers"]) == 15
    assert [item["case"]["sizes"]["input_grad"] for item in data["layers"]].count(False) == 1
    for item in data["layers"]:
        assert item["times"].keys() == item["estimate"].keys() == set(paths.PATHS)
        assert item["best"] == min(item["times"], key=item["times"].get)
        assert item["chosen"] == min(item["estimate"], key=item["estimate"].get)
        assert item["lost"] >= 0
    assert "Lost by the choices" in text and "BALANCE" in text and "in MFLOP" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_shapes_are_those_that_the_layers_choose_from(monkeypatch):
    """What the program finds is what a forward of the injected network asks ``choose`` for, and as often."""
    import convlora
    from convlora._layer import fast

    images = torch.zeros(2, 3, 32, 32)
    found, grouped = paths.find_cases("test_efficientnet", 4, images)
    asked = []
    monkeypatch.setattr(fast, "_sizes", lambda *sizes, make=fast._sizes: asked.append(make(*sizes)) or asked[-1])
    monkeypatch.setattr(fast, "choose_once", fast.choose)
    convlora.inject(make_base("test_efficientnet"), 4).train()(images)
    assert grouped == sum(shapes.groups > 1 for shapes in asked) > 0
    plain = [shapes for shapes in asked if shapes.groups == 1]
    assert sorted(map(repr, plain)) == sorted(repr(case.sizes) for case in found.elements())


def test_what_a_choice_loses():
    chosen = layer([1.0, 1.0, 1.0]).chosen
    times = dict.fromkeys(paths.PATHS, 1.0) | {chosen: 1.5}
    item = layer([times[path] for path in paths.PATHS], count=3)
    assert item.best != chosen and item.lost == 1.5 and item.share_lost == 0.5
    assert "wrong" in paths.table([item]) and "1 of 1 shapes" in paths.conclusion([item])


def test_the_suggestion_loses_no_more_than_the_present_constants_and_leaves_them():
    before = paths_room.BALANCE, paths_room.THIN
    times = [[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [1.0, 1.0, 5.0]]
    timed = [layer(t, count, size=size) for t, count, size in zip(times, (1, 2, 3, 4), (4, 8, 32, 128), strict=True)]
    found = paths.suggest(timed)
    assert found.lost <= sum(item.lost for item in timed)
    assert before == (paths_room.BALANCE, paths_room.THIN)
    with paths.constants(found.balance, found.thin):
        assert sum(item.lost for item in timed) == pytest.approx(found.lost)


def test_constants_stay_where_all_are_equal():
    found = paths.suggest([layer([1.0, 1.0, 1.0])])
    assert (found.balance, found.thin) == (paths_room.BALANCE, paths_room.THIN)


@pytest.mark.thorough
def test_the_routing_benchmark_compares_every_way_and_prints_the_machine(capsys):
    small = ["--model", NETWORK, "--batch", "4", "--size", "32", "--adapters", "2", "4", "--rank", "2", "--rounds", "2"]
    routing.main(small)
    text = capsys.readouterr().out
    for name in (routing.ROUTED, routing.TURNS, routing.PEFT, routing.BASE):
        assert len([line for line in text.splitlines() if name in line and " ms " in line]) == 2
    assert "threads" in text and torch.__version__ in text


def test_peft_adapter_names_and_routing_get_the_same_network(monkeypatch):
    """The same numbers in both: then both predict the same, so the times are of the same work."""
    base, images = make_base(NETWORK).eval(), torch.randn(4, 3, 32, 32)
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, std: tensor.data.fill_(0.01))
    found = routing.ways(base, 2, 2)
    with torch.inference_mode():
        mine, peft = (found[name](["a0", "a1", "a1", "a0"], images) for name in (routing.ROUTED, routing.PEFT))
        plain = base(images)
    torch.testing.assert_close(mine, peft, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(mine, plain, rtol=1e-3, atol=1e-5)
