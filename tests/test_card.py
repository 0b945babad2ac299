"""The model card: read back by huggingface_hub and by hand, the same each time, never written over an edited one."""

import copy
import re

import pytest
import torch
from conftest import SmallNet, need, randomise
from torch import nn

import convlora
from convlora import CheckpointError, TargetError
from convlora._checkpoint.digests import fingerprint
from convlora._checkpoint.files import opened
from convlora._checkpoint.manifest import read_manifest

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def written(model, directory, **arguments):
    """The card's text, of an adapter that is not empty."""
    randomise(model)
    convlora.save_adapter(model, directory, **arguments)
    return (directory / CARD).read_text(encoding="utf-8")


def tables(text):
    """Every table of the card as rows of cells, by a reader that knows Markdown's escape of bars alone."""
    found, now = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            now.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif now:
            found, now = [*found, now[:1] + now[2:]], []
    return found


def numbers(column):
    return [int(cell.replace(",", "")) for cell in column]


def test_the_hub_reads_metrics_and_base_model(net, tmp_path):
    hub = need("huggingface_hub")
    metrics = {
        "accuracy": 0.95,
        "auroc": 1,
        "loss": 1e-7,
        "a: b # c": 1e30,
        "0.5": -2.5,
        "größe 🙂": torch.tensor(0.25),
    }
    text = written(convlora.inject(net), tmp_path, metrics=metrics, base_model="timm/resnet50.a1_in1k")
    card = hub.ModelCard(text)
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == metrics
    assert card.data.base_model == "timm/resnet50.a1_in1k" and card.data.library_name == "convlora"
    assert card.data.tags == ["convlora", "lora"]
    assert tables(text)[0][1:3] == [["accuracy", "0.95"], ["auroc", "1"]]


def test_without_metrics_there_is_no_model_index(net, tmp_path):
    text = written(convlora.inject(net), tmp_path)
    assert "model-index" not in text and "base_model" not in text and "## Metrics" not in text


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "nf_resnet26"])
def test_layers_and_totals_are_those_of_the_model(tmp_path, name):
    model = need("timm").create_model(name, num_classes=3)
    sizes = {layer: m.weight.numel() for layer, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    total = sum(p.numel() for p in model.parameters())
    convlora.inject(model, 3, rank_pattern={next(iter(sizes)): 2})
    text = written(model, tmp_path)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    rows = {line.split()[0]: line.split() for line in lines}
    assert {layer: numbers([rows[layer][4]])[0] for layer in sizes} == sizes
    factors = sum(p.numel() for p in convlora.adapter_parameters(model))
    assert sum(numbers(rows[layer][5] for layer in sizes)) == factors
    trained = next(line for line in lines if line.startswith("trainable:"))
    assert f"of {total + factors:,} parameters" in trained and f"{factors:,} of them in factors" in trained


def test_what_is_trained_besides_is_named(net, tmp_path):
    text = written(convlora.inject(net, norm="track"), tmp_path)
    assert "- Trained in full: `fc` (`weight` 3×12, `bias` 3)." in text
    assert "- Norm layers with statistics: 2, statistics, scales and shifts moved" in text
    assert "Buffers that moved" not in text
    assert '`norm="freeze"`' in written(convlora.inject(SmallNet()), tmp_path)


def test_buffers_that_moved_are_named(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("seen", torch.zeros(()))

    model = convlora.inject(Counts(), 2, modules_to_save=None)
    model.seen += 1
    assert "- Buffers that moved: `seen`." in written(model, tmp_path)


@pytest.mark.parametrize("base", [nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))])
def test_smallest_adapters_have_a_card(tmp_path, base):
    """A model that is itself the layer; a probe of the head alone."""
    options = {"target_modules": ()} if isinstance(base, nn.Sequential) else {"modules_to_save": None}
    text = written(convlora.inject(base, 2, **options), tmp_path)
    assert ("\n    (the model itself)  " in text) is isinstance(base, nn.Conv2d)
    assert ("## Layers" in text) is isinstance(base, nn.Conv2d)


def test_same_adapter_same_text(net, tmp_path):
    base, metrics = copy.deepcopy(net), {"accuracy": 0.5}
    first = written(convlora.inject(net, 3, norm="track"), tmp_path / "one", metrics=metrics)
    assert written(net, tmp_path / "two", metrics=metrics) == first
    convlora.load_adapter(base, tmp_path / "one")
    assert written(base, tmp_path / "three", metrics=metrics) == first


def test_fingerprint_is_of_the_base_alone(net, tmp_path):
    def shown(model, directory):
        return re.search(r"Fingerprint of the base: `([0-9a-f]{16})`, over", written(model, directory))[1]

    other = copy.deepcopy(net)
    first = shown(convlora.inject(net, 3), tmp_path / "one")
    with opened(tmp_path / "one" / TENSORS) as file:
        manifest = read_manifest(file)
    assert fingerprint(manifest.base) == fingerprint(dict(reversed(manifest.base.items()))) == first
    assert shown(convlora.inject(copy.deepcopy(other), 5, alpha=1), tmp_path / "two") == first
    with torch.no_grad():
        other.hidden.bias[0] += 1
    assert shown(convlora.inject(other, 3), tmp_path / "three") != first


def test_names_with_markup_stay_names(tmp_path):
    hub = need("huggingface_hub")
    name = 'a|b`c "d": <b> --- # e'
    model = nn.Sequential()
    model.add_module("x|y`", nn.Conv2d(3, 8, 3))
    model = type("N|_*", (nn.Sequential,), {})(model)
    convlora.inject(model, 2, modules_to_save=None, adapter_name=name)
    text = written(model, tmp_path, metrics={"a|b": 1.0, "---": 2.0})
    (metrics,) = tables(text)
    assert [row[0] for row in metrics[1:]] == [r"a\|b", "---"] and "\n    0.x|y`  " in text
    card = hub.ModelCard(text)
    assert " ".join(name.split()) in " ".join(card.data.model_name.split())
    assert len(re.findall("^# ", card.text, re.MULTILINE)) == 1


# ---- whose card it is


def test_own_card_is_replaced(net, tmp_path):
    first = written(convlora.inject(net), tmp_path)
    assert written(net, tmp_path, metrics={"accuracy": 0.5}) != first


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("## Use", "## How we use it"),
        lambda text: text + "\nOur own words.\n",
        lambda text: "Our own words.\n" + text,
        lambda text: text.replace("<!-- convlora", "<!-- "),
        lambda text: "# A project that has nothing to do with it\n",
        lambda text: "",
        lambda text: text.encode("utf-16"),
    ],
)
def test_an_edited_or_foreign_card_is_left_with_a_warning(net, images, tmp_path, edit):
    base, model = copy.deepcopy(net), convlora.inject(net)
    edited = edit(written(model, tmp_path))
    edited = edited if isinstance(edited, bytes) else edited.encode()
    (tmp_path / CARD).write_bytes(edited)
    randomise(model, seed=2)
    with pytest.warns(UserWarning, match=r"README\.md was edited, or not written by convlora.*Delete it") as caught:
        convlora.save_adapter(model, tmp_path)
    assert caught[0].filename == __file__
    assert (tmp_path / CARD).read_bytes() == edited
    assert torch.equal(convlora.load_adapter(base, tmp_path).eval()(images), model.eval()(images))  # the adapter is new


@pytest.mark.parametrize("change", [lambda b: b.replace(b"\n", b"\r\n"), bytes.rstrip, lambda b: b + b"\n\n"])
def test_line_ends_that_git_or_an_editor_changes_are_no_edit(net, tmp_path, change):
    first = written(convlora.inject(net), tmp_path)
    (tmp_path / CARD).write_bytes(change((tmp_path / CARD).read_bytes()))
    assert written(net, tmp_path) == first


def test_failed_save_keeps_the_old_card(net, tmp_path, monkeypatch):
    import convlora._checkpoint.saving as room

    first = written(convlora.inject(net), tmp_path)

    def fails(tensors, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "save", fails)
    with pytest.raises(CheckpointError, match="still there"):
        convlora.save_adapter(net, tmp_path, metrics={"accuracy": 0.5})
    assert (tmp_path / CARD).read_text(encoding="utf-8") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, CONFIG, TENSORS]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"metrics": {"accuracy": "0.9"}}, r"metrics\['accuracy'\]='0\.9'; a metric is one finite number"),
        ({"metrics": {"accuracy": float("inf")}}, r"metrics\['accuracy'\]=inf"),
        ({"metrics": {"accuracy": True}}, r"metrics\['accuracy'\]=True"),
        ({"metrics": {"accuracy": None}}, r"metrics\['accuracy'\]=None"),
        ({"metrics": {"accuracy": torch.ones(2)}}, r"metrics\['accuracy'\]=tensor"),
        ({"metrics": {"": 0.9}}, r"metrics: '' is not a name"),
        ({"metrics": {3: 0.9}}, r"metrics: 3 is not a name"),
        ({"metrics": {"a\nb": 0.9}}, r"metrics: 'a\\nb' is not a name"),
        ({"base_model": "resnet 50"}, r"base_model='resnet 50'; it must be a name on the Hugging Face Hub"),
        ({"base_model": "a/b/c"}, r"base_model='a/b/c'"),
        ({"base_model": "a\n"}, r"base_model='a\\n'"),
        ({"base_model": nn.Identity}, r"base_model=<class"),
    ],
)
def test_what_fits_no_card_is_refused_and_nothing_is_written(net, tmp_path, arguments, message):
    convlora.inject(net)
    with pytest.raises(TargetError, match=message + r"(?s:.*)Nothing was written\.$"):
        convlora.save_adapter(net, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "computes with W + alpha / rank · B A;"),
        (
            {"use_dora": True},
            "computes with m · W' / ‖W'‖ for each output channel (DoRA), W' = W + alpha / rank · B A;",
        ),
        ({"init": "pissa"}, "computes with W + alpha / rank · (B A − B₀ A₀), A₀ and B₀ as they began (pissa);"),
    ],
)
def test_the_card_says_what_the_layers_compute_with(net, tmp_path, options, words):
    convlora.inject(net, 2, **options)
    randomise(net)
    convlora.save_adapter(net, tmp_path)
    assert words in (tmp_path / "README.md").read_text(encoding="utf-8")
