"""The command line: what it prints is what the library says, its errors and exit codes, its files in stock peft."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
import convlora.command
from convlora._checkpoint.digests import fingerprint
from convlora._methods.registry import METHODS, named_methods

typer = need("typer")
timm, torchvision = need("timm"), need("torchvision")

from typer.testing import CliRunner

from convlora.command.answers import in_options
from convlora.command.app import app
from convlora.command.files import read_saved

NETWORK = "test_resnet"
COMMANDS = [each.name for each in app.registered_commands]
CLASSES = ["--num-classes", "3"]


def run(*arguments, code=0):
    answer = CliRunner().invoke(app, [str(each) for each in arguments])
    assert answer.exit_code == code, (answer.output, answer.exception)
    return answer


def as_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def program(*arguments, cwd=None, **variables):
    """The real program, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "convlora.command", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **variables},
    )


def network(folder=None):
    model = timm.create_model(NETWORK, num_classes=3).eval()
    if folder is not None:
        model.load_state_dict(load_file(folder / "base.safetensors"))
    return model


def images(channels=3):
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def predictions(model):
    with torch.no_grad():
        return model.eval()(images())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a base, and two adapters of it, the second with one layer fewer and one factor moved."""
    folder = tmp_path_factory.mktemp("command")
    torch.manual_seed(0)
    base = network()
    save_file(base.state_dict(), folder / "base.safetensors")
    for name, seed, options in (("a", 1, {}), ("b", 2, {"exclude_modules": "conv1.0"})):
        model = convlora.inject(network(folder), 4, **options)
        randomise(model, seed=seed)
        convlora.save_adapter(model, folder / name, metrics={"accuracy": 0.9}, base_model="timm/test_resnet.r160_in1k")
    return folder


@pytest.fixture
def with_weights(folder):
    return [*CLASSES, "--weights", folder / "base.safetensors"]


# plan


def test_plan_prints_the_librarys_plan():
    assert run("plan", NETWORK, *CLASSES, "--rank", 4).stdout.strip() == str(convlora.plan(network(), 4)).strip()


def test_plan_as_json_is_the_librarys_plan_and_its_totals():
    found = as_json("plan", NETWORK, *CLASSES, "-r", 4)
    expected = convlora.plan(network(), 4)
    assert found["trainable_parameters"] == expected.trainable_parameters
    assert convlora.Plan.from_json({key: found[key] for key in expected.to_json()}) == expected


def test_every_option_of_plan_reaches_the_library():
    options = ["--alpha", 3, "--target", "layer*", "--target", "type:Linear", "--exclude", r"re:.*\.0\.conv2"]
    options += ["--rank-pattern", "*.conv1=2", "--alpha-pattern", "re:.*conv3=5.5", "--save", "fc", "--norm", "track"]
    options += ["--rslora", "--dora", "--init", "orthogonal", "--training-path", "branch", "--rank", 6]
    found = as_json("plan", NETWORK, *CLASSES, *options)
    expected = convlora.plan(
        network(),
        6,
        alpha=3.0,
        target_modules=["layer*", nn.Linear],
        exclude_modules=re.compile(r".*\.0\.conv2"),
        rank_pattern={"*.conv1": 2},
        alpha_pattern={re.compile(".*conv3"): 5.5},
        modules_to_save="fc",
        norm="track",
        use_rslora=True,
        use_dora=True,
        init="orthogonal",
        training_path="branch",
    )
    assert {key: found[key] for key in expected.to_json()} == json.loads(json.dumps(expected.to_json()))


METHOD_OPTIONS = {"loha": {"tucker": True}, "lokr": {"factor": 4}, "oft": {"neumann": 5}, "boft": {"factors": 3}}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "anchored"])
def test_every_method_is_planned_with_its_options_and_another_one_for_some_layers(method):
    options = METHOD_OPTIONS.get(method, {})
    other = "ia3" if method == "lora" else "lora"
    given = [each for name, value in options.items() for each in ("--method-option", f"{name}={json.dumps(value)}")]
    found = as_json(
        "plan", NETWORK, *CLASSES, "-r", 4, "--method", method, *given, "--method-pattern", f"*.conv2={other}"
    )
    expected = convlora.plan(network(), 4, method=method, method_options=options, method_pattern={"*.conv2": other})
    assert {key: found[key] for key in expected.to_json()} == json.loads(json.dumps(expected.to_json()))
    methods = {layer["name"]: layer["method"] for layer in found["layers"]}
    assert set(methods.values()) - {"dense"} == {method, other} - {"dense"}  # which layers too small for it are given
    assert {name for name, each in methods.items() if each == other} == {
        name for name in methods if name.endswith("conv2")
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "nope"], "--method nope; it must be one of 'lora'"),
        (["--method-pattern", "*.conv2=nope"], "--method-pattern for layer1.0.conv2='nope'"),
        (["--method-pattern", "layer9=dense"], "--method-pattern layer9 matches no layer"),
        (
            ["--method", "lokr", "--method-option", "factor=much"],
            "factor='much' of --method lokr; it must be of type int",
        ),
        (["--method-option", "factor=2"], "--method-option names 'factor'; --method lora has none"),
        (["--method", "loha", "--init", "pissa"], "--init pissa is not an init of --method loha"),
    ],
)
def test_a_method_that_is_none_or_has_no_such_option_is_refused(options, message):
    assert message in as_json("plan", NETWORK, *CLASSES, *options, code=1)["message"]


@pytest.mark.parametrize("method", ["loha", "ssf", "boft"])
def test_an_adapter_of_any_method_is_inspected_and_merged(folder, tmp_path, with_weights, method):
    model = convlora.inject(network(folder), 4, method=method)
    randomise(model)
    convlora.save_adapter(model, tmp_path / "adapter")
    shown = run("inspect", tmp_path / "adapter").stdout
    assert method in shown and str(convlora.summary(model).adapter_parameters) in shown.replace(",", "")
    run("merge", NETWORK, tmp_path / "adapter", tmp_path / "merged.safetensors", *with_weights)
    plain = network()
    plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert torch.equal(predictions(plain), predictions(convlora.merge(model)))


@pytest.mark.parametrize(("given", "meant"), [("2%", "2%"), ("0.02", 0.02), ("20000", 20000), ("2e4", 20000)])
def test_a_budget_is_a_share_or_a_number(given, meant):
    found = as_json("plan", NETWORK, "--budget", given)
    expected = convlora.plan(timm.create_model(NETWORK), budget=meant)
    assert [layer["rank"] for layer in found["layers"]] == [layer.rank for layer in expected.layers]


def test_no_head_and_dropout():
    found = as_json("plan", NETWORK, "--save", "none", "--dropout", 0.25)
    assert found["modules_to_save"] == [] and found["dropout"] == 0.25


# Which model


def test_models_are_found_in_timm_then_torchvision_then_as_functions(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nprint('noise')\n"
        "def make(width=4, num_classes=2):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.Conv2d(width, 8, 3),\n"
        "        torch.nn.Flatten(), torch.nn.LazyLinear(num_classes) if width is None else torch.nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    names = {"test_resnet": "ResNet", "timm:test_vit": "VisionTransformer", "alexnet": "AlexNet"}
    names |= {"torchvision:resnet18": "ResNet", "mine:make": "Sequential"}
    for name, kind in names.items():
        assert as_json("plan", name)["model"] == kind
    assert as_json("plan", "mine:make", "--arg", "width=6")["layers"][0]["weight_shape"] == [6, 3, 3, 3]
    assert as_json("plan", NETWORK, "--arg", "in_chans=1")["layers"][0]["weight_shape"][1] == 1


def test_a_detector_is_built_without_fetching_its_backbone():
    expected = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    found = as_json("plan", "torchvision:ssdlite320_mobilenet_v3_large", "-r", 2)
    assert found["adapter_parameters"] == convlora.plan(expected, 2).adapter_parameters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", "Closest names: resnet50"),
        ("resnt18", "Closest names: resnet18, resnet18d"),  # each once, though timm and torchvision both have it
        ("timm:resnt18", "timm has no model resnt18. Closest names: resnet18, resnet18d"),
        ("torchvision:resnet5", "torchvision has no model resnet5. Closest names: resnet50"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("math:nothing", "has no attribute 'nothing'"),
        ("math:sqrt", "takes exactly one argument"),
        ("time:time", "not a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_error(name, message):
    answer = run("plan", name, code=1)
    assert message in answer.stderr and "Nothing was changed." in answer.stderr and answer.stdout == ""


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm cannot be imported: pip install it" in run("plan", "convnext_atto", code=1).stderr
    assert "pip install timm" in run("plan", "timm:resnet18", code=1).stderr
    assert as_json("plan", "resnet18")["model"] == "ResNet"  # torchvision's


@pytest.mark.thorough
def test_pretrained_weights_offline_are_an_error_that_says_what_to_download(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    answer = program("plan", "resnet18", "--pretrained", **offline)
    assert answer.returncode == 1 and answer.stdout == ""
    assert "hf download timm/resnet18" in answer.stderr and "--weights FILE" in answer.stderr
    assert "Traceback" not in answer.stderr


# Weights


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_weights_of_torch_save_are_read_also_from_within_a_checkpoint_and_of_ddp(folder, tmp_path, wrap):
    state = load_file(folder / "base.safetensors")
    torch.save(wrap({f"module.{key}": tensor for key, tensor in state.items()}), tmp_path / "weights.pth")
    out = tmp_path / "merged.safetensors"
    run("merge", NETWORK, folder / "a", out, *CLASSES, "--weights", tmp_path / "weights.pth")
    assert out.is_file()


def test_a_head_of_other_classes_is_left_as_built_and_said(folder):
    answer = run("plan", NETWORK, "--num-classes", 7, "--weights", folder / "base.safetensors")
    assert "fc.bias has the shape (3,) of another head" in answer.stderr


def test_weights_that_do_not_fit_are_one_error_that_names_them(folder, tmp_path):
    state = load_file(folder / "base.safetensors")
    wrong = {"conv1.0.weight": torch.zeros(1), **{key: t for key, t in state.items() if key != "conv1.0.weight"}}
    for broken, message in (
        (wrong, "conv1.0.weight: (1,) in the file, (16, 3, 3, 3) in the model"),
        ({key: t for key, t in state.items() if key != "bn1.weight"}, "bn1.weight: not in the file"),
        (state | {"more": torch.zeros(1)}, "more: not in the model"),
    ):
        save_file(broken, tmp_path / "broken.safetensors")
        assert message in run("plan", NETWORK, *CLASSES, "--weights", tmp_path / "broken.safetensors", code=1).stderr


def test_weights_without_a_head_do_not_leave_a_random_one_silently(folder, tmp_path):
    state = load_file(folder / "base.safetensors")
    save_file({key: t for key, t in state.items() if not key.startswith("fc.")}, tmp_path / "headless.safetensors")
    answer = run("plan", NETWORK, *CLASSES, "--weights", tmp_path / "headless.safetensors", code=1)
    assert "fc.weight: not in the file" in answer.stderr


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_that_could_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    answer = run("plan", NETWORK, "--weights", tmp_path / "bomb.pth", code=1)
    assert answer.stderr.count("Nothing was changed.") == 1
    assert "could run any code" in answer.stderr and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "missing.pth", "damaged.safetensors", "damaged.pth", "list.pth"]
)
def test_a_weights_file_that_cannot_be_read_is_one_error(tmp_path, name):
    for damaged in ("damaged.safetensors", "damaged.pth"):
        (tmp_path / damaged).write_bytes(b"\x01\x02\x03")
    torch.save([1, 2], tmp_path / "list.pth")
    answer = run("plan", NETWORK, "--weights", tmp_path / name, code=1)
    assert name in answer.stderr and "Nothing was changed." in answer.stderr


@pytest.mark.parametrize("text", ["hello\n", "this is text\n", '{"a": 1}', ""])
def test_what_is_no_pickle_is_damaged_and_said_once(tmp_path, text):
    (tmp_path / "junk.pth").write_text(text)
    answer = run("plan", NETWORK, "--weights", tmp_path / "junk.pth", code=1)
    assert "is damaged" in answer.stderr and answer.stderr.count("Nothing was changed.") == 1


# inspect


def test_inspect_says_what_the_file_says_without_a_model(folder):
    found, manifest = as_json("inspect", folder / "a"), read_saved(folder / "a").manifest
    assert found["metrics"] == {"accuracy": 0.9} and found["format"] == "convlora" and found["peft_type"] == "LORA"
    assert found["base"]["fingerprint"] == fingerprint(manifest.base)
    assert found["base"]["name"] == "timm/test_resnet.r160_in1k"
    assert found["bytes"] == (folder / "a" / "adapter_model.safetensors").stat().st_size
    assert {key: tuple(shape) for key, shape in found["tensors"].items()} == {
        key: form.shape for key, form in manifest.forms.items()
    }
    assert found["plan"]["adapter_parameters"] == manifest.plan.adapter_parameters
    text = run("inspect", folder / "a").stdout
    assert "accuracy: 0.9" in text and "layer4.0.conv2" in text and fingerprint(manifest.base) in text


def test_inspect_of_the_file_alone_reads_the_config_beside_it(folder):
    assert as_json("inspect", folder / "a" / "adapter_model.safetensors") == as_json("inspect", folder / "a")


def test_inspect_finds_a_changed_tensor(folder, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    data = bytearray((folder / "a" / file.name).read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    answer = run("inspect", tmp_path, "--json", code=1)
    assert json.loads(answer.stdout)["error"] == "CheckpointError" and "is damaged" in answer.stderr


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_an_adapter_that_is_not_there_is_one_error(tmp_path, command):
    both = [tmp_path / "x"] * (2 if command == "diff" else 1)
    assert "does not exist" in run(command, *both, code=1).stderr


# diff


def test_an_adapter_does_not_differ_from_itself(folder):
    found = as_json("diff", folder / "a", folder / "a", "--exit-code")
    assert found["same"] and not any(layer["difference"] for layer in found["layers"])


def test_differences_are_those_of_the_dense_changes(folder):
    found = as_json("diff", folder / "a", folder / "b", "--exit-code", code=3)
    assert not found["same"] and found["only_first"] == ["conv1.0"] and found["base"]["same"]
    models = [convlora.load_adapter(network(folder), folder / name) for name in "ab"]
    for each in found["layers"]:
        one, other = (model.get_submodule(each["name"]).weight for model in models)
        base = convlora.base_weight(models[0].get_submodule(each["name"]))
        sizes = [(weight - base).norm() for weight in (one, other)]
        expected = float(((one - other).norm() / max(sizes)).detach())
        assert each["difference"] == pytest.approx(expected, rel=1e-4)  # the oracle sums in fp32


def test_the_same_change_in_other_factors_does_not_differ(folder, tmp_path):
    model = convlora.load_adapter(network(folder), folder / "a")
    with torch.no_grad():
        for layer in convlora.summary(model).layers:
            lora = model.get_submodule(layer.name).convlora["default"]
            lora.lora_A.mul_(4.0)
            lora.lora_B.div_(4.0)
    convlora.save_adapter(model, tmp_path / "scaled")
    found = as_json("diff", folder / "a", tmp_path / "scaled")
    assert max(layer["difference"] for layer in found["layers"]) < 1e-12  # double precision


def test_adapters_of_a_method_without_factors_differ_by_their_numbers(folder, tmp_path):
    for name, seed in (("one", 1), ("other", 2)):
        model = convlora.inject(network(folder), 2, method="loha", method_pattern={"*": "loha"})
        randomise(model, seed=seed)
        convlora.save_adapter(model, tmp_path / name)
    assert as_json("diff", tmp_path / "one", tmp_path / "one")["same"]
    found = as_json("diff", tmp_path / "one", tmp_path / "other")
    assert all(0.5 < layer["difference"] < 2.5 for layer in found["layers"]) and found["settings"] == {}
    found = as_json("diff", folder / "a", tmp_path / "one")
    assert found["settings"]["method"] == ["lora", "loha"] and all(layer["difference"] for layer in found["layers"])


def test_settings_and_other_bases_are_differences(folder, tmp_path):
    torch.manual_seed(7)
    model = convlora.inject(network(), 4, norm="track")
    randomise(model, seed=1)
    convlora.save_adapter(model, tmp_path / "other")
    found = as_json("diff", folder / "a", tmp_path / "other")
    assert found["settings"] == {"norm": ["freeze", "track"]} and found["base"]["same"] is False
    assert "bn1.running_mean" not in found["only_first"] and any("running_mean" in key for key in found["only_second"])


@pytest.mark.filterwarnings("ignore:.*the training has diverged")
def test_what_is_not_finite_is_null_and_the_same_file_is_still_the_same(folder, tmp_path):
    for name, number in (("nan", torch.nan), ("inf", torch.inf)):
        model = convlora.load_adapter(network(folder), folder / "a")
        with torch.no_grad():
            model.get_submodule("layer1.0.conv1").convlora["default"].lora_A[0] = number
            model.fc.bias[0] = number
        convlora.save_adapter(model, tmp_path / name)
    assert as_json("diff", tmp_path / "nan", tmp_path / "nan")["same"]
    for other in (folder / "a", tmp_path / "inf"):
        found = as_json("diff", tmp_path / "nan", other, "--exit-code", code=3)
        apart = {each.get("name", each.get("key")): each["difference"] for each in found["layers"] + found["tensors"]}
        assert [name for name, each in apart.items() if each is None] == ["layer1.0.conv1", "fc.bias"]
    assert run("diff", tmp_path / "nan", folder / "a").stdout.count("not finite") == 2
    assert run("diff", NETWORK, tmp_path / "nan", folder / "a", *CLASSES).stdout.count("not finite") == 2


# merge, convert, extract, shrink


def test_merged_weights_predict_as_the_adapter_does(folder, tmp_path, with_weights):
    out = tmp_path / "new" / "merged.safetensors"
    found = as_json("merge", NETWORK, folder / "a", out, *with_weights)
    assert found["tensors"] == len(network().state_dict()) and found["bytes"] == out.stat().st_size
    plain = network()
    plain.load_state_dict(load_file(out))
    expected = predictions(convlora.merge(convlora.load_adapter(network(folder), folder / "a")))
    assert torch.equal(predictions(plain), expected)


def test_merge_onto_random_weights_is_refused_unless_asked_for(folder, tmp_path):
    out = tmp_path / "merged.safetensors"
    answer = run("merge", NETWORK, folder / "a", out, *CLASSES, code=1)
    assert "has random weights" in answer.stderr and not list(tmp_path.iterdir())
    run("merge", NETWORK, folder / "a", out, *CLASSES, "--any-base")
    assert out.is_file()


@pytest.mark.parametrize("interpolate", [False, True])
def test_merged_at_a_strength_the_weights_go_so_far_from_the_base(folder, tmp_path, with_weights, interpolate):
    found = {}
    for scale in (0, 0.25, 1):
        out = tmp_path / f"{scale}.safetensors"
        options = [*with_weights, "--scale", scale, *(["--interpolate"] if interpolate else [])]
        assert as_json("merge", NETWORK, folder / "a", out, *options)["scale"] == scale
        found[scale] = load_file(out)
    whole = convlora.remove(convlora.merge(convlora.load_adapter(network(folder), folder / "a"))).state_dict()
    base, head = load_file(folder / "base.safetensors"), ("fc.weight", "fc.bias")
    for name, start in base.items():
        moves = interpolate or name not in head
        assert torch.equal(found[0][name], start if moves else whole[name]), name
        assert torch.equal(found[1][name], whole[name]), name
        if start.is_floating_point():
            part = 0.75 * start.double() + 0.25 * whole[name].double() if moves else whole[name].double()
            torch.testing.assert_close(found[0.25][name].double(), part, rtol=1e-5, atol=1e-6)  # fp32 rounds


def test_a_strength_that_is_no_number_is_refused(folder, tmp_path, with_weights):
    answer = run("merge", NETWORK, folder / "a", tmp_path / "m.safetensors", *with_weights, "--scale", "nan", code=1)
    assert "--scale nan; it must be a finite number" in answer.stderr and not (tmp_path / "m.safetensors").exists()


def test_merged_weights_that_are_not_finite_are_not_written(folder, tmp_path, with_weights):
    model = convlora.inject(network(folder), 4)
    randomise(model, 1e30)  # the factors are finite, and their product is not
    convlora.save_adapter(model, tmp_path / "a")
    answer = run("merge", NETWORK, tmp_path / "a", tmp_path / "m.safetensors", *with_weights, code=1)
    assert "conv1.0.weight" in answer.stderr and "NaN or Inf with adapter 'default'" in answer.stderr
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("any_base", [[], ["--any-base"]])
def test_merge_of_another_librarys_file_onto_random_weights_is_refused(tmp_path, any_base):
    keys = {"lora_down.weight": torch.randn(2, 96, 3, 3), "lora_up.weight": torch.randn(96, 2, 1, 1)}
    save_file({f"lycoris_layer4_0_conv2.{key}": tensor for key, tensor in keys.items()}, tmp_path / "style.safetensors")
    out = tmp_path / "merged.safetensors"
    answer = run("merge", NETWORK, tmp_path / "style.safetensors", out, *CLASSES, *any_base, code=1)
    assert "random weights" in answer.stderr and not out.exists()


def test_what_is_there_is_written_over_only_by_force(folder, tmp_path, with_weights):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "note.txt").write_text("mine")
    (tmp_path / "here.safetensors").write_text("mine")
    shrink = ["shrink", NETWORK, folder / "a", tmp_path / "here", *with_weights, "--rank", 2]
    merge = ["merge", NETWORK, folder / "a", tmp_path / "here.safetensors", *with_weights]
    for command in (shrink, merge):
        assert "--force" in run(*command, code=1).stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["note.txt"]
    for command in (shrink, merge):
        run(*command, "--force")
    assert (tmp_path / "here" / "note.txt").read_text() == "mine"
    assert (tmp_path / "here" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("always:.*README.md was edited")
def test_force_leaves_an_edited_card_and_says_so(folder, tmp_path, with_weights):
    shrink = ["shrink", NETWORK, folder / "a", tmp_path / "small", *with_weights, "--force", "--rank"]
    run(*shrink, 2)
    card = tmp_path / "small" / "README.md"
    assert "README.md" not in run(*shrink, 3).stderr and "rank 3, " in card.read_text()
    card.write_text("mine")
    assert "README.md was edited" in run(*shrink, 1).stderr and card.read_text() == "mine"
    assert as_json("inspect", tmp_path / "small")["plan"]["rank"] == 1


def test_merge_writes_safetensors_alone(folder, tmp_path):
    assert "must be a .safetensors file" in run("merge", NETWORK, folder / "a", tmp_path / "m.pth", code=1).stderr


def test_what_cannot_be_written_is_a_refusal(folder, tmp_path, with_weights):
    (tmp_path / "file").write_text("no folder")
    for out in (
        tmp_path / "file" / "m.safetensors",
        tmp_path / f"{'m' * 240}.safetensors",
    ):  # too long
        answer = run("merge", NETWORK, folder / "a", out, *with_weights, code=1)
        assert "cannot be written" in answer.stderr and "Traceback" not in answer.stderr


def test_converted_files_load_in_stock_peft_and_predict_the_same(folder, tmp_path, with_weights):
    peft = need("peft")
    run("convert", NETWORK, folder / "a", tmp_path / "theirs", *with_weights, "--to", "peft")
    model = peft.PeftModel.from_pretrained(network(folder), tmp_path / "theirs")
    expected = predictions(convlora.load_adapter(network(folder), folder / "a"))
    torch.testing.assert_close(predictions(model), expected, rtol=1e-4, atol=1e-5)  # a branch of fp32, ten layers deep


def test_there_and_back_is_the_same_adapter(folder, tmp_path, with_weights):
    need("peft")
    run("convert", NETWORK, folder / "a", tmp_path / "theirs", *with_weights, "--to", "peft")
    assert as_json("inspect", tmp_path / "theirs")["format"] == "peft"
    run("convert", NETWORK, tmp_path / "theirs", tmp_path / "ours", *with_weights)
    assert as_json("diff", folder / "a", tmp_path / "ours")["same"]
    assert as_json("diff", NETWORK, folder / "a", tmp_path / "theirs", *with_weights)["same"]
    assert "`convlora diff MODEL FIRST SECOND`" in run("diff", folder / "a", tmp_path / "theirs", code=1).stderr


def test_locon_files_are_converted(folder, tmp_path, with_weights):
    A, B = torch.randn(2, 96, 3, 3), torch.randn(96, 2, 1, 1)
    keys = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(4.0)}
    save_file({f"lycoris_layer4_0_conv2.{key}": tensor for key, tensor in keys.items()}, tmp_path / "style.safetensors")
    found = as_json("inspect", tmp_path / "style.safetensors")
    assert found["format"] == "lycoris" and found["layers"][0]["rank"] == 2
    run("convert", NETWORK, tmp_path / "style.safetensors", tmp_path / "ours", *with_weights)
    model = convlora.load_adapter(network(folder), tmp_path / "ours")
    layer = model.get_submodule("layer4.0.conv2")
    change = 4.0 / 2 * torch.einsum("or,riyx->oiyx", B.flatten(1), A)
    torch.testing.assert_close(layer.weight, convlora.base_weight(layer) + change)


def test_files_of_other_methods_are_inspected_and_converted(folder, tmp_path, with_weights):
    A, B = torch.randn(96, 2), torch.randn(2, 96 * 9)
    keys = {"hada_w1_a": A, "hada_w1_b": B, "hada_w2_a": A.clone(), "hada_w2_b": B.clone(), "alpha": torch.tensor(2.0)}
    save_file({f"lycoris_layer4_0_conv2.{key}": tensor for key, tensor in keys.items()}, tmp_path / "style.safetensors")
    layer = as_json("inspect", tmp_path / "style.safetensors")["layers"][0]
    assert (layer["method"], layer["rank"]) == ("LoHa", 2) and len(layer["tensors"]) == 5
    run("convert", NETWORK, tmp_path / "style.safetensors", tmp_path / "ours", *with_weights)
    assert as_json("inspect", tmp_path / "ours")["plan"]["layers"][0]["method"] == "loha"
    model = convlora.load_adapter(network(folder), tmp_path / "ours").get_submodule("layer4.0.conv2")
    torch.testing.assert_close(model.weight, convlora.base_weight(model) + ((A @ B) ** 2).view_as(model.weight))
    need("peft")
    run("convert", NETWORK, tmp_path / "ours", tmp_path / "theirs", *with_weights, "--to", "peft")
    found = as_json("inspect", tmp_path / "theirs")
    assert found["config"]["peft_type"] == "LOHA" and found["layers"][0]["rank"] == 2 and not found["others"]


def test_conversion_onto_random_weights_is_refused(folder, tmp_path, with_weights):
    need("peft")
    run("convert", NETWORK, folder / "a", tmp_path / "theirs", *with_weights, "--to", "peft")
    answer = run("convert", NETWORK, tmp_path / "theirs", tmp_path / "ours", *CLASSES, code=1)
    assert "random weights" in answer.stderr and not (tmp_path / "ours").exists()


def test_what_stock_peft_would_mispredict_is_not_converted(tmp_path, monkeypatch):
    need("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reflecting.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1, padding_mode='reflect'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reflecting = importlib.import_module("reflecting")
    with pytest.warns(UserWarning, match="lora_B is zero"):
        convlora.save_adapter(convlora.inject(reflecting.make(), 2), tmp_path / "a")
    answer = run("convert", "reflecting:make", "a", "theirs", "--to", "peft", code=1)
    assert "padding_mode 'reflect'" in answer.stderr and not (tmp_path / "theirs").exists()


def test_peft_that_is_not_installed_is_named(folder, tmp_path, with_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "convlora.peft", None)
    answer = run("convert", NETWORK, folder / "a", tmp_path / "theirs", *with_weights, "--to", "peft", code=1)
    assert "convlora.peft" in answer.stderr and not list(tmp_path.iterdir())


def test_ours_is_not_converted_to_ours(folder, tmp_path):
    assert "is convlora's already" in run("convert", NETWORK, folder / "a", tmp_path / "x", code=1).stderr


def test_extract_and_shrink_report_what_the_library_does(folder, tmp_path, with_weights):
    tuned = network(folder)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    found = as_json("extract", NETWORK, tmp_path / "tuned.safetensors", tmp_path / "ex", *with_weights, "--rank", 4)
    base = network(folder)
    expected = convlora.extract(base, tuned, 4)
    assert found["error"] == expected.error and [each["rank"] for each in found["layers"]] == [
        layer.rank for layer in expected.layers
    ]
    loaded = convlora.load_adapter(network(folder), tmp_path / "ex")
    assert torch.equal(predictions(loaded), predictions(base))
    found = as_json("shrink", NETWORK, tmp_path / "ex", tmp_path / "small", *with_weights, "--rank", 2)
    assert found["error"] == convlora.shrink(base, 2).error
    assert torch.equal(predictions(convlora.load_adapter(network(folder), tmp_path / "small")), predictions(base))


def test_extract_needs_the_weights_before(folder, tmp_path):
    answer = run("extract", NETWORK, folder / "base.safetensors", tmp_path / "ex", *CLASSES, "--rank", 2, code=1)
    assert "random weights" in answer.stderr


def test_the_librarys_own_refusals_come_through(folder, tmp_path, with_weights):
    answer = run("shrink", NETWORK, folder / "a", tmp_path / "s", *with_weights, "--rank", 2, "--energy", 0.5, code=1)
    assert "TargetError: Give one of --rank 2, --energy 0.5, --tolerance." in answer.stderr and not list(
        tmp_path.iterdir()
    )
    assert "Closest names" in run("plan", NETWORK, "--target", "layer9.*", code=1).stderr


@pytest.mark.filterwarnings("ignore:.*the training has diverged")
def test_errors_name_options_that_there_are(folder, tmp_path, with_weights):
    out = tmp_path / "out.safetensors"
    save_file(network().state_dict(), tmp_path / "other.safetensors")
    others = [*CLASSES, "--weights", tmp_path / "other.safetensors"]
    assert "or pass --any-base to load it" in run("merge", NETWORK, folder / "a", out, *others, code=1).stderr
    answer = run("shrink", NETWORK, folder / "a", out, *others, "--rank", 2, code=1)  # has no such option
    assert "or pass check_base=False in Python to load it" in answer.stderr
    model = convlora.load_adapter(network(folder), folder / "a")
    with torch.no_grad():
        model.fc.bias[0] = torch.nan
    convlora.save_adapter(model, tmp_path / "nan")
    answer = run("merge", NETWORK, tmp_path / "nan", out, *with_weights, code=1)
    assert "or pass check_finite=False in Python." in answer.stderr


# The library's words in options

IN_OPTIONS = [
    ("Adapt both with target_modules=[nn.Conv2d, nn.Linear], or", "--target type:Conv2d --target type:Linear, or"),
    ("target_modules=nn.Conv2d if this is intended.", "--target type:Conv2d if this is intended."),
    ("target_modules='layer9.*' matches no layer", "--target 'layer9.*' matches no layer"),
    ("target_modules='.*\\\\d' matches no layer", "--target '.*\\d' matches no layer"),
    ("to train only the head, target_modules=().", "to train only the head, target_modules=() in Python."),
    ("for a regular expression give re.compile(...).", "for a regular expression write re:EXPRESSION."),
    (
        "modules_to_save=['fc'], or give an input of the model, example=x.",
        "--save fc, or give an input of the model, example=x in Python.",
    ),
    ("If no layer is new, write modules_to_save=None.", "If no layer is new, write --save none."),
    ("Use dropout=0 or exclude_modules.", "Use --dropout 0 or --exclude."),
    ("Use use_dora=False or exclude_modules.", "Use no --dora or --exclude."),
    ("freeze_A=True; method='loha' has no lora_A.", "--freeze-a; --method loha has no lora_A."),
    ("add init_data=loader, or choose init='gaussian'", "add init_data=loader in Python, or choose --init gaussian"),
    ('norm="track" also updates them', "--norm track also updates them"),
    ("give budget='1%' too", "give --budget 1% too"),
    ("was built as it was trained (num_classes=1?)", "(--num-classes 1?)"),
    ("`print(convlora.plan(model))` lists every layer.", "`convlora plan MODEL` lists every layer."),
    ("a rank of the method, the path and the model", "a rank of the method, the path and the model"),
]


@pytest.mark.parametrize(("says", "shown"), IN_OPTIONS)
def test_what_the_library_says_of_arguments_is_said_of_options(says, shown):
    options = {option.name: max(option.opts, key=len) for option in typer.main.get_command(app).commands["plan"].params}
    assert shown in in_options(says, options)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["timm:test_vit"], "warning: VisionTransformer: by default only convolutions are adapted"),
        (["timm:test_vit"], "Adapt both with --target type:Conv2d --target type:Linear, or write --target type:Conv2d"),
        ([NETWORK, "--budget", "0"], "--budget 0; it must be a share of"),
        ([NETWORK, "--rank", 0], "--rank 0; a rank is a whole number of at least 1"),
        ([NETWORK, "--save", "nothing"], "--save nothing matches no module"),
    ],
)
def test_errors_and_warnings_of_the_command_line_name_its_options(arguments, shown):
    assert shown in CliRunner().invoke(app, ["plan", *map(str, arguments)]).stderr


def test_a_note_below_a_plan_names_the_option():
    assert "note: --target conv1 names one layer" in run("plan", "resnet18", "--target", "conv1").stdout


# bench


def test_bench_measures_ratios_to_full_fine_tuning_and_to_the_base():
    found = as_json("bench", NETWORK, "--size", 32, "--batch", 2, "--rounds", 2, "-r", 2)
    assert found["training"]["full fine-tuning"]["ratio"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert found["training"]["adapter"]["ratio"]["median"] > 0
    assert found["saved_bytes"]["adapter"] < found["saved_bytes"]["full fine-tuning"]  # frozen norms keep no input
    assert found["machine"]["torch"] == torch.__version__ and found["batch"] == [2, 3, 32, 32]


def test_bench_refuses_what_cannot_run():
    assert "cannot take a batch" in run("bench", NETWORK, "--channels", 4, "--size", 32, code=1).stderr
    assert "--device nowhere" in run("bench", NETWORK, "--device", "nowhere", code=1).stderr


# The program as a whole


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["plan"],
        ["plan", NETWORK, "--rank", "many"],
        ["plan", NETWORK, "--norm", "melt"],
        ["plan", NETWORK, "--rank-pattern", "nothing"],
        ["plan", NETWORK, "--rank-pattern", "a=b"],
        ["plan", NETWORK, "--pretrained", "--weights", "x"],
        ["plan", "mine:make", "--pretrained"],
        ["diff", "one"],
    ],
)
def test_a_wrong_call_ends_with_2_and_leaves_stdout_empty(arguments):
    answer = run(*arguments, code=2)
    assert answer.stdout == "" and "Usage:" in answer.stderr


def test_an_error_of_our_own_is_told_from_a_refusal(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("convlora.command.planning.make_plan", broken)
    answer = run("plan", NETWORK, code=70)
    assert "a mistake of ours" in answer.stderr and answer.stdout == ""


def test_errors_are_json_where_json_was_asked_for():
    found = as_json("plan", "nosuch", code=1)
    assert found["error"] == "CommandError" and found["message"].startswith("nosuch is not a model")


def test_stdout_is_the_answers_alone_whatever_a_model_prints_and_a_terminal_may_lack_our_characters(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import torch, warnings\nprint('hello')\n"
        "def make():\n    warnings.warn('careful')\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))\n"
    )
    source = str(Path(convlora.__file__).parents[1])
    answer = program("plan", "loud:make", cwd=tmp_path, PYTHONPATH=source, PYTHONIOENCODING="ascii")
    assert answer.returncode == 0 and answer.stdout.startswith("Sequential: adapter") and "8?3?3?3" in answer.stdout
    assert "hello" in answer.stderr and "warning: careful" in answer.stderr


def test_without_typer_the_program_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "convlora.command.app")
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'convlora\[cli\]'"):
        convlora.command.main()


@pytest.mark.parametrize("command", ["merge", "shrink"])
def test_an_adapter_for_a_network_of_random_weights_is_refused_as_that(folder, tmp_path, command):
    out = tmp_path / "out.safetensors"
    answer = run(command, NETWORK, folder / "a", out, *CLASSES, *(["-r", 2] if command == "shrink" else []), code=1)
    assert f"{NETWORK} has random weights" in answer.stderr and "Give --weights FILE or --pretrained" in answer.stderr
    assert not out.exists()


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_no_torch(command):
    script = f"import sys, convlora.command; sys.argv = ['convlora', *{[command] if command else []}, '--help']\n"
    script += "try:\n    convlora.command.main()\nfinally:\n    assert 'torch' not in sys.modules"
    source = str(Path(convlora.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_is_completed(command):
    shown = run(command, "--help").stdout
    assert shown.startswith("Usage: ") and "--json" in shown
    summary, example = shown.splitlines()[2], next(line for line in shown.splitlines() if "Example: " in line)
    assert summary.strip() in run("--help").stdout  # the list has the whole summary
    assert example.startswith(f"  Example: convlora {command} ")
    options = [word for word in example.split() if word.startswith("-")]
    assert all(re.search(rf"^  .*{word}\b", shown.partition("Options:")[2], re.M) for word in options)
    variables = {"_CONVLORA_COMPLETE": "complete_bash", "COMP_WORDS": f"convlora {command} --js", "COMP_CWORD": "2"}
    answer = CliRunner().invoke(app, [], prog_name="convlora", env=variables)
    assert "--json" in answer.output


def test_help_names_every_method():
    shown = re.split(r"\W+", run("plan", "--help").stdout)
    assert {*named_methods()} <= {*shown}


def test_completion_is_offered_and_versions_are_told():
    assert run("--version").stdout.strip() == convlora.__version__
    assert "--install-completion" in run("--help").stdout
