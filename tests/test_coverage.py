"""Width: a sample of the coverage benchmark through its own checks, and that these checks can fail."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import need, thorough
from torch import nn

import convlora

need("timm")
need("torchvision")

from benchmarks.coverage import handmade, outcomes, plans, report, runner, timm_cases, torchvision_cases, zoo
from benchmarks.coverage.cases import Case, images, prepare, tensors_in
from benchmarks.coverage.checks import check
from benchmarks.coverage.heads import HEADS, named_by_hand
from benchmarks.coverage.libraries import Convlora, Peft

pytestmark = pytest.mark.usefixtures("one_thread")

# Plain, depthwise, standardised-weight, 'same'-padded, reparameterizable, mixed-kernel, parallel-branch, windowed,
# attention with convolutions, conditional and reused layers, computed weights, other dimensions, transposed.
TIMM_SMALL = """
resnet18 tf_efficientnet_lite0 mobilenetv3_small_050 convnext_atto regnetx_002 nf_regnet_b0 resnetv2_18 tf_mixnet_s
repvgg_a0 test_nfnet test_coatnet test_mambaout test_vit levit_128s ghostnet_050 starnet_s050 edgenext_xx_small
tf_efficientnet_cc_b0_4e
"""
TIMM = TIMM_SMALL.split()
TORCHVISION = ["squeezenet1_1", "shufflenet_v2_x0_5", "quantized_mobilenet_v2", "raft_small"]
BY_HAND = ["audio_conv1d", "dcgan_generator", "volume_unet"]
BY_HAND += [f"discriminator_{norm}{form}" for norm in ("weight_norm", "spectral_norm") for form in ("", "_old")]
EVERY = 36
"""Of the nearly 1,500 architecture names, every so many are planned here."""


def found(name):
    cases = {case.name: case for case in (*torchvision_cases.cases(), *handmade.cases())}
    return cases[name] if name in cases else timm_cases.case(name.removeprefix("timm/"))


pytestmark = pytest.mark.filterwarnings("ignore:.* linear layers with .* stay frozen")
DEFAULT = ["test_nfnet", "test_coatnet", "test_mambaout", "test_vit", "repvgg_a0", "starnet_s050"]
SAMPLE = [f"timm/{name}" if name in DEFAULT else thorough(f"timm/{name}") for name in TIMM]
SAMPLE += [thorough(f"torchvision/{name}") for name in TORCHVISION] + [f"handmade/{name}" for name in BY_HAND]
STEPS = ["inject", "forward", "identity", "gradient", "reload", "copy", "merge", "unmerge", "remove"]


@pytest.mark.parametrize("name", SAMPLE)
def test_the_whole_way(name):
    steps = check(prepare(found(name)), Convlora())
    assert {name: step.reason for name, step in steps.items() if not step.ok} == {}
    assert list(steps) == STEPS and steps["merge"].value == 0.0


FURTHER = ["nnunet/PlainConvUNet-3d", "diffusers/VQModel", "spandrel/PLKSR", "facenet/PNet", "open_clip/ViT"]
FURTHER += ["kornia/SmallSRNet", "monai/DynUNet-2d", "torchxrayvision/DenseNet", "pytorchcv/squeezenet_v1_1"]


@pytest.mark.filterwarnings("ignore:.*no head was found", "ignore:.*by default only convolutions")
@pytest.mark.parametrize("name", [*FURTHER, thorough("ultralytics/yolov8n")])
def test_networks_of_further_libraries_with_the_head_that_was_named_by_hand(name):
    need(zoo.PACKAGES[name.split("/")[0]])
    row = zoo.check_case(zoo.further_cases()[name], [Convlora()])
    assert {step: found["reason"] for step, found in row["convlora"].items() if not found["ok"]} == {}
    assert set(row["heads"]) == set(row["named"]) and row["adapted"]


def test_each_further_network_has_its_head_named_and_no_name_is_left_over():
    installed = {name for name in HEADS if importlib.util.find_spec(zoo.PACKAGES[name.split("/")[0]])}
    assert set(zoo.further_cases()) >= installed - {n for n in installed if n.startswith(("monai/", "nnunet/"))}
    assert set(zoo.further_cases()) <= set(HEADS)


def test_the_table_of_heads_finds_layers_by_patterns():
    conv = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Conv2d(1, 1, 1))
    net = nn.ModuleDict({"detect": nn.ModuleDict({"cv2": nn.ModuleList([conv])})})
    assert named_by_hand("ultralytics/yolov8n", net) == ["detect.cv2.0.2"]
    assert named_by_hand("kornia/HardNet", net) == [] and named_by_hand("timm/resnet18", net) is None


@pytest.mark.parametrize(
    "name", [name if n % 6 == 0 else thorough(name) for n, name in enumerate(plans.names()[::EVERY])]
)
def test_every_convolution_is_planned(name):
    row = plans.check_plan(name)
    assert row["problems"] == [] and (not row["convolutions"] or row["adapted"])


@pytest.mark.parametrize(
    "name", ["torchvision/regnet_x_400mf", "torchvision/r3d_18", "timm/naflexvit_base_patch16_gap"]
)
def test_plans_of_other_means_and_kinds(name):
    row = plans.check_plan(name)
    assert row["problems"] == []
    assert (row["means"], row["targets"]) == {
        "torchvision/regnet_x_400mf": ("parameters on the meta device", "Conv2d"),
        "torchvision/r3d_18": ("meta device", "Conv3DSimple, Conv3d"),
        "timm/naflexvit_base_patch16_gap": ("meta device", ""),
    }[name]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.last(self.norm(self.conv(x)).relu()).mean((2, 3)))


def small():
    return prepare(Case("test/small", lambda size: Small(), images(3), (16,)))


class Broken(Convlora):
    """The library with one step gone wrong."""

    def __init__(self, step):
        self.step = step

    def inject(self, model, case):
        super().inject(model, case)
        if self.step == "identity":
            convlora.base_weight(model.conv)[0, 0, 0, 0].add_(1e-3)
        if self.step == "gradient":  # a factor that training does not reach
            model.last.register_forward_pre_hook(lambda layer, inputs: (inputs[0].detach(),))
        if self.step == "slightly wrong gradient":
            model.last.convlora["default"].lora_A.register_hook(lambda grad: 1.01 * grad)
        return model

    def merge(self, adapted):
        super().merge(adapted)
        if self.step == "merge":
            adapted.conv.weight.data += 0.01

    def unmerge(self, adapted):
        super().unmerge(adapted)
        if self.step == "unmerge":
            weight = convlora.base_weight(adapted.conv).data
            weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))

    def load(self, model, folder):
        super().load(model, folder)
        if self.step == "reload":
            next(convlora.adapter_parameters(model)).data += 1e-3
        return model

    def remove(self, adapted):
        super().remove(adapted)
        if self.step == "remove":
            adapted.last.left_behind = 1


@pytest.mark.parametrize("step", ["identity", "gradient", "reload", "merge", "unmerge", "remove"])
def test_a_broken_step_is_found(step):
    with torch.no_grad():
        subject = small()
    assert all(step.ok for step in check(subject, Convlora()).values())
    assert not check(subject, Broken(step))[step].ok


def test_a_gradient_that_is_a_little_wrong_is_told_from_rounding():
    step = check(small(), Broken("slightly wrong gradient"))["gradient"]
    assert not step.ok and 0.005 < step.value < 0.02


def test_a_merge_that_is_broken_in_the_library_is_found(monkeypatch):
    monkeypatch.setattr(convlora, "merge", lambda model: model)  # claims to have merged
    assert check(small(), Convlora())["unmerge"].reason.startswith("StateError")
    monkeypatch.undo()
    merge = convlora.merge

    def half(model):
        merge(model)
        model.last.weight.data.mul_(0.5)
        return model

    monkeypatch.setattr(convlora, "merge", half)
    steps = check(small(), Convlora())
    assert not steps["merge"].ok and steps["merge"].value > 1e-2 and "remove" in steps


def test_a_network_with_a_convolution_that_no_plan_lists_is_found():
    class Own(nn.Module):
        kernel_size = 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3))

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Own())
    convolutions = {name: module for name, module in model.named_modules() if plans.looks_like_convolution(module)}
    assert list(convolutions) == ["0", "1"]
    missed = "convolution neither adapted nor skipped: 1 (Own)"
    assert missed in list(plans.problems_of(convlora.plan(model, target_modules="0"), model, convolutions))


def test_peft_on_the_same_way():
    need("peft")
    plain = {name: vars(step) for name, step in check(small(), Peft()).items()}
    outcome = outcomes.outcome(plain)
    assert outcome.works and not outcome.strict and outcome.label == "unmerge not exact"
    steps = {name: vars(step) for name, step in check(prepare(found("handmade/audio_conv1d")), Peft()).items()}
    assert steps["inject"]["ok"] and steps["identity"]["ok"]


@pytest.mark.parametrize(
    "failed, value, label, works",
    [
        ("merge", 1e-4, "merge inexact", True),
        ("merge", 0.1, "merge silently wrong", False),
        ("merge", None, "merge refused", False),
        ("unmerge", 1e-7, "unmerge not exact", True),
        ("identity", 1e-7, "identity off", False),
    ],
)
def test_outcomes(failed, value, label, works):
    steps = {name: {"ok": name != failed, "value": None, "reason": ""} for name in STEPS}
    steps[failed]["value"] = value
    outcome = outcomes.outcome(steps)
    assert (outcome.label, outcome.works, outcome.strict) == (label, works, False)


def test_limits_and_crashes_are_recorded(tmp_path):
    """A process past its time, one that dies, one that raises, and one that works."""
    tasks = [
        runner.Task("plan", "slow", lambda: time.sleep(60) or {}),
        runner.Task("plan", "dies", lambda: os._exit(3)),
        runner.Task("plan", "raises", lambda: 1 / 0),
        runner.Task("plan", "works", lambda: {"value": 1}),
    ]
    path = tmp_path / "results.jsonl"
    runner.run(tasks, 2, runner.Limits(3.0, 64.0), lambda row: runner.append(path, row))
    path.write_text(path.read_text() + '{"kind": "pl')  # cut short
    rows = {row["name"]: row for row in runner.read(path)}
    assert rows["slow"]["error"] == "not done within 3 s"
    assert rows["dies"]["error"] == "the process ended with exit code 3"
    assert rows["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert rows["works"]["value"] == 1


def test_the_page_counts_what_the_rows_say():
    good = {name: {"ok": True, "value": 0.0 if name == "merge" else None, "reason": ""} for name in STEPS}
    refused = {"inject": {"ok": False, "value": None, "reason": "ValueError: groups=16 and rank 8 | no"}}
    common = {"kind": "numeric", "input": "2×3×64×64", "adapted": 3, "skipped": 1, "parameters": 9, "seconds": 1.0}
    rows = [
        {**common, "name": "smp/a", "convlora": good, "peft": refused},
        {**common, "name": "smp/b", "convlora": refused, "peft": good},
        {"kind": "numeric", "name": "smp/c", "error": "not done within 3 s", "seconds": 3.0},
        {"kind": "plan", "name": "timm/d", "error": "no such", "seconds": 0.1},
    ]
    need("transformers")  # the page names its version
    need("segmentation_models_pytorch")
    rows = json.loads(json.dumps(rows))
    page, table = report.page(rows), list(csv.DictReader(report.table(rows).splitlines()))
    assert "Of 3 networks, 1 pass" in page and "| names | 1 | 0 |" in page and "exactly 0 in 1 of 1" in page
    assert "| segmentation-models-pytorch | 3 | 1 | b: inject fails; c: not run |" in page
    assert "| segmentation-models-pytorch | 3 | 1 | 1 |" in page
    assert (
        "/c**: not run: not done within 3 s" in page and "inject fails: ValueError: groups=16 and rank 8 | no" in page
    )
    assert [line["convlora"] for line in table] == ["passes", "inject fails", "not run"]
    assert [line["peft works"] for line in table] == ["no", "yes", ""]


def test_the_page_counts_what_its_table_says():
    docs = Path(__file__).parent.parent / "docs"
    table = list(csv.DictReader((docs / "assets" / "coverage.csv").read_text(encoding="utf-8").splitlines()))
    passed = sum(line["convlora"] == "passes" for line in table)
    page = (docs / "coverage.md").read_text(encoding="utf-8")
    assert f"Of {len(table)} networks, {passed} pass" in page
    assert all(f"/{line['network']}**" in page for line in table if line["convlora"] != "passes")


def test_tensors_are_found_in_any_output():
    x = torch.zeros(1)
    assert len(list(tensors_in([{"a": (x, [x])}, x, None, 3]))) == 3


@pytest.mark.slow
def test_the_whole_sweep(tmp_path):
    for package in ("peft", "transformers", "segmentation_models_pytorch"):
        need(package)
    results, page = tmp_path / "results.jsonl", tmp_path / "coverage.md"
    jobs = str(max(os.cpu_count() or 1, 1))
    command = [sys.executable, "-m", "benchmarks.coverage", "all", "--jobs", jobs, "--seconds", "3600"]
    subprocess.run([*command, "--results", str(results), "--page", str(page)], check=True)
    rows = [row for row in runner.read(results) if row["kind"] != "environment"]
    wrong = {row["name"]: row.get("error") or row.get("problems") for row in rows}
    wrong |= {row["name"]: outcomes.outcome(row["convlora"]).label for row in rows if "convlora" in row}
    assert {name: why for name, why in wrong.items() if why not in ([], "passes")} == {}
