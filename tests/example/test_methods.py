import copy
import dataclasses
import math

from conftest import need_extra, thorough

need_extra("histopathology")

import pytest
import timm
import torch
from layouts import write_pcam
from safetensors.torch import save_file
from toy_patches import write_toy
from typer.testing import CliRunner

import convlora
from examples.histopathology.__main__ import app
from examples.histopathology.augment.draws import Draws
from examples.histopathology.augment.hed import from_hed, stain_jittered, to_hed
from examples.histopathology.augment.transforms import VIEWS, Normalisation, Normalise, TrainTransform, dihedral
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.errors import ExampleError
from examples.histopathology.methods import catalogue
from examples.histopathology.methods.ablation import RANKS, variants
from examples.histopathology.methods.catalogue import find_method, find_methods, method_from, read_method
from examples.histopathology.methods.method import Adapt, Augment
from examples.histopathology.report.outputs import HEADER, Report, as_data
from examples.histopathology.runs import experiment
from examples.histopathology.runs.comparison import TABLE, Sweep, reported
from examples.histopathology.runs.rates import parse_rates
from examples.histopathology.training.features import linear_head
from examples.histopathology.training.loading import make_loader
from examples.histopathology.training.prediction import adapted_to, balanced, ensembled
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe, fit, place, predict

RECIPE = Recipe(image_size=32, epochs=2, batch_size=16)
PLAIN = Normalisation("none", "none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def lite0():
    return experiment.open_backbone(RECIPE)[0]


@pytest.mark.parametrize("name", [name for name in catalogue.names() if name != "lora-linear"])
def test_every_file_is_a_method_that_a_network_takes(name, lite0):
    method = find_method(name)
    assert method.name == name
    assert method_from(catalogue.as_plain(method), name, catalogue.FOLDER / "card") == dataclasses.replace(
        method, training=name
    )
    model = method.prepare(copy.deepcopy(lite0))
    shares = {"head": 0.001, "norms": 0.02, "lora": 0.1, "full": 1.0}
    trained = sum(p.numel() for p in convlora.trainable_parameters(model))
    assert 0 < trained / sum(p.numel() for p in model.parameters()) <= shares[method.adapt.trains]


def test_lora_of_linear_layers_adapts_all_of_a_vision_transformer_and_none_of_a_cnn(lite0):
    method = find_method("lora-linear")
    dinov2 = method.prepare(timm.create_model("vit_small_patch14_dinov2", num_classes=1, img_size=28))
    linear = {name for name, module in dinov2.named_modules() if isinstance(module, torch.nn.Linear)} - {"head"}
    assert {layer.name for layer in convlora.summary(dinov2).layers} == linear
    assert len(linear) == 4 * 12  # qkv, proj and two of the MLP, in each of 12 blocks
    with pytest.raises(convlora.ConvLoraError, match="No layer of EfficientNet would be adapted"):
        method.prepare(copy.deepcopy(lite0))


@pytest.mark.parametrize("name", [thorough("probe"), "lora-linear"])
def test_dinov2_trains_is_saved_and_proven_like_any_backbone(name, toy, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28).state_dict()
    save_file(state, tmp_path / "dinov2.safetensors")
    backbone = {"backbone": "vit_small_patch14_dinov2", "weights": tmp_path / "dinov2.safetensors"}
    recipe = Recipe(image_size=28, epochs=1, batch_size=16, **backbone)
    result = experiment.run_method(find_method(name), open_splits(toy), recipe, Job(tmp_path / "out"))
    assert result.proofs.held
    assert result.trainable < 0.03 * result.parameters


def test_lora_lean_keeps_what_the_images_chose_and_masks(toy, tmp_path, lite0):
    method = find_method("lora-lean")
    result = experiment.run_method(method, open_splits(toy), dataclasses.replace(RECIPE, epochs=1), Job(tmp_path))
    assert result.proofs.held
    trained = experiment.load(result.adapter, RECIPE, torch.device("cpu"))
    assert convlora.summary(trained).init == "eva" and convlora.summary(trained).freeze_A
    images = make_loader(experiment.make_views(open_splits(toy), RECIPE, method)["train"], 16, seed=RECIPE.seed)
    fresh = method.prepare(place(copy.deepcopy(lite0), torch.device("cpu")), images=images)
    trains = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert not any("lora_A" in name for name in trains) and any("lora_B" in name for name in trains)
    for name, tensor in fresh.state_dict().items():
        if "lora_A" in name:  # read from the same images, and left so by the training
            assert torch.equal(tensor, trained.state_dict()[name]), name
    drawn = method.prepare(copy.deepcopy(lite0))  # without images: as for counting its memory
    assert convlora.summary(drawn).init == "kaiming" and convlora.summary(drawn).freeze_A


def test_methods_compose_by_name():
    method = find_method("lora+centre+ensemble+balanced")
    assert method.normalise == "centre"
    assert (method.predict.views, method.predict.balanced) == (8, True)
    assert method.training == "lora+centre"
    assert method.transductive
    assert find_method("lora+ensemble").training == find_method("lora-ensemble").training == "lora"
    assert not find_method("lora+ensemble+stain").transductive


@pytest.mark.parametrize("word", ["centre", "adabn", "balanced"])
def test_what_looks_at_the_test_set_is_marked(word):
    assert find_method(f"lora+{word}").title == f"lora+{word} (transductive)"


@pytest.mark.parametrize(
    ("losses", "best", "beyond"),
    [
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7}, 3e-4, 9e-5),
        ({3e-4: 0.7, 1e-3: 0.6, 3e-3: 0.5}, 3e-3, 9e-3),
        ({3e-4: 0.7, 1e-3: 0.5, 3e-3: 0.6}, 1e-3, None),
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7, 9e-5: 0.4, 2.7e-5: 0.6}, 9e-5, None),
        ({1e-3: 0.5}, 1e-3, None),
        ({1e-3: 0.6, 1.0001e-3: 0.5}, 1.0001e-3, 1.00020001e-3),  # beyond, however near
        ({1e-3: math.inf, 1e-2: math.inf}, 1e-3, 1e-4),
    ],
)
def test_a_sweep_goes_on_at_the_end_that_does_best(losses, best, beyond):
    sweep = Sweep("lora", losses)
    assert sweep.best == best
    assert sweep.beyond == beyond
    assert ("the end of the sweep" in str(sweep)) == (beyond is not None)


def test_the_comparison_names_methods_that_there_are():
    methods = find_methods(TABLE.split(","))
    assert {m.adapt.trains for m in methods} == {"head", "norms", "full", "lora"}
    ranks = {m.adapt.rank for m in variants() if m.adapt.trains == "lora"}
    assert ranks == set(RANKS)


def test_unknown_and_repeated_methods_are_refused():
    assert [m.name for m in find_methods(["lora", "probe"])] == ["lora", "probe"]
    with pytest.raises(ExampleError, match=r"unknown method dora; known: .*lora.* or a \.yaml file"):
        find_methods(["lora", "dora"])
    with pytest.raises(ExampleError, match="twice"):
        find_methods(["lora", "lora"])
    with pytest.raises(ExampleError, match=r"lora\+magic: unknown modifier 'magic'; known: ensemble, balanced"):
        find_methods(["lora+magic"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapt: {trains: lora}", "about: is missing"),
        ("about: x\nadpt: {}", "adpt: unknown key; did you mean adapt"),
        ("about: x\nadapt: {rnk: 8}", "adapt.rnk: unknown key; did you mean rank"),
        ("about: x\nadapt: {rank: eight}", "adapt.rank: 'eight' is not allowed; write a whole number"),
        ("about: x\nadapt: {rank: true}", "adapt.rank: True is not allowed; write a whole number"),
        ("about: x\nadapt: {rank: 0}", "adapt.rank: 0 is too small"),
        ("about: x\nadapt: {trains: lora, lr_ratio: 0}", "adapt.lr_ratio: 0 is too small"),
        ("about: x\nadapt: {trains: norms, lr_ratio: 4}", "adapt.lr_ratio: trains: norms has no factors"),
        ("about: x\nadapt: {alpha: no}", "adapt.alpha: False is not allowed; write a number or null"),
        ("about: x\nadapt: {trains: all}", "adapt.trains: 'all' is not allowed; write 'head' or 'lora'"),
        ("about: x\npredict: {views: 4}", "predict.views: 4 is not allowed; write 1 or 8"),
        ("about: x\naugment: {stain_jitter: .inf}", "augment.stain_jitter: inf is too small or not a number"),
        ("about: x\nnormalise: slide", "normalise: 'slide' is not allowed; write 'backbone' or 'centre'"),
        ("about: x\nadapt: lora", "adapt: holds 'lora'; write keys below it: trains, rank"),
        ("about: x\nbase: dora", "base: there is no method 'dora'; known: "),
        ("about: x\nbase: mine", "base: names the file itself"),
        ("- about", "holds .* write keys such as"),
        ("about: [x", "cannot be read as YAML"),
    ],
)
def test_a_fault_in_a_file_names_file_key_and_remedy(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ExampleError, match=message) as caught:
        read_method(path)
    assert str(path) in str(caught.value)


def test_a_file_of_ones_own_starts_from_a_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: mine\nbase: lora\nadapt: {rank: 3, layers: 1x1}\npredict: {views: 8}\n")
    method = find_method(f"{path}+balanced")
    assert method.adapt == Adapt("lora", 3, layers="1x1")
    assert method.name == "mine+balanced"
    assert method.training == "mine"


def test_layers_are_chosen_by_place_and_kernel(lite0):
    def adapted(layers):
        method = dataclasses.replace(find_method("lora"), adapt=Adapt("lora", 2, layers=layers))
        return {layer.name for layer in convlora.summary(method.prepare(copy.deepcopy(lite0))).layers}

    everything = adapted("all")
    assert adapted("stem") == {"conv_stem"}
    assert adapted("stages") == everything - {"conv_stem"}
    assert adapted("1x1") | adapted("kxk") == everything
    assert not adapted("1x1") & adapted("kxk")


def test_cached_features_train_the_same_head_as_the_network(toy, tmp_path, monkeypatch):
    method = find_method("probe-dihedral")
    cached = experiment.run_method(method, open_splits(toy), RECIPE, Job(tmp_path / "a"))
    monkeypatch.setattr(experiment, "linear_head", lambda model: None)
    whole = experiment.run_method(method, open_splits(toy), RECIPE, Job(tmp_path / "b"))
    # the same arithmetic on features that were computed in batches of other patches: fp32 rounding
    for a, b in zip(cached.history, whole.history, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, abs=1e-5)
        assert a.val_loss == pytest.approx(b.val_loss, abs=1e-5)
    torch.testing.assert_close(cached.test_logits, whole.test_logits, atol=1e-4, rtol=0)
    assert cached.proofs.reload_bit_equal


@pytest.mark.thorough
def test_features_serve_every_seed(toy, tmp_path, monkeypatch):
    job, method = Job(tmp_path), find_method("probe")
    experiment.run_method(method, open_splits(toy), RECIPE, job, suffix="-0")
    files = sorted((tmp_path / "features").iterdir())
    experiment.run_method(method, open_splits(toy), dataclasses.replace(RECIPE, seed=1), job, suffix="-1")
    assert sorted((tmp_path / "features").iterdir()) == files
    assert len(files) == 2


def test_only_a_head_that_trains_alone_is_cached(lite0):
    assert linear_head(find_method("probe").prepare(copy.deepcopy(lite0))) is not None
    assert linear_head(find_method("norms").prepare(copy.deepcopy(lite0))) is None


def test_dihedral_views_are_the_eight_of_the_square():
    image = torch.arange(9.0).reshape(1, 3, 3)
    views = [dihedral(image, view) for view in range(VIEWS)]
    assert torch.equal(views[0], image)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


def test_every_policy_gives_the_size():
    for policy in ("none", "dihedral", "crop", "affine"):
        transform = TrainTransform(64, Normalise(PLAIN), Augment(policy, 0.05))
        images = transform(torch.full((5, 3, 96, 96), 0.7), Draws(0, 0, range(5)))
        assert images.shape == (5, 3, 64, 64)
        assert images.min() > 0.3  # no black corner


def test_hed_and_back_is_the_image():
    images = torch.rand(2, 3, 5, 7) * 0.9 + 0.1
    torch.testing.assert_close(from_hed(to_hed(images)), images, atol=1e-5, rtol=0)


def test_a_pure_stain_has_one_amount():
    from examples.histopathology.data.stain import HAEMATOXYLIN, unit_rows

    density = 0.5 * torch.tensor(unit_rows([HAEMATOXYLIN])[0], dtype=torch.float32)
    amounts = to_hed(10 ** -density.reshape(3, 1, 1)).flatten()
    torch.testing.assert_close(amounts, torch.tensor([0.5, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_stain_jitter_draws_for_each_image_and_stays_in_range():
    images, draws = torch.full((4, 3, 6, 6), 0.6), Draws(0, 0, range(4))
    changed = stain_jittered(images, draws, 0.1)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert len({float(image.sum()) for image in changed}) == 4
    torch.testing.assert_close(stain_jittered(images, draws, 0.0), images, atol=1e-6, rtol=0)


def test_centre_statistics_are_those_of_the_pixels(toy):
    split = HistoDataset(toy / "train.h5")
    split.centres[:10] = 5
    found = experiment.centre_statistics(split)
    assert set(found) == {0, 5}
    pixels = torch.from_numpy(split.read(range(10)))
    torch.testing.assert_close(torch.tensor(found[5].mean), pixels.mean((0, 2, 3)), atol=1e-5, rtol=0)
    expected = pixels.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(torch.tensor(found[5].std), expected, atol=1e-4, rtol=0)


def test_balanced_calls_half_positive_and_keeps_the_order():
    for size in (1, 2, 7, 50):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) + 3
        shifted = balanced(logits)
        assert int((shifted > 0).sum()) == size // 2
        assert torch.equal(shifted.argsort(), logits.argsort())


@pytest.mark.parametrize(
    "logits",
    [
        [3.0] * 9,
        [-2.5] * 10,
        [0.0] * 4,
        [5.0, 1.0, 1.0, 1.0, 1.0, -4.0],
        [1.0, 1.0, 1.0, 2.0],
        [0.0, -1.0, -1.0, -1.0],
        [1.0, 1.0 + 2**-23],  # whose middle is no number of fp32
        [300.0, 300.0, -300.0, -300.0, -300.0],
        [],
    ],
)
def test_balanced_calls_half_positive_whatever_is_equal(logits):
    logits = torch.tensor(logits)
    shifted = balanced(logits)
    assert int((shifted > 0).sum()) == len(logits) // 2
    assert torch.equal(shifted, balanced(logits))
    higher = logits[:, None] > logits[None]
    assert (shifted[:, None] >= shifted[None])[higher].all()


def test_which_of_equal_logits_are_positive_does_not_follow_the_files_order():
    labels = torch.arange(1000) >= 500  # as in a file that is sorted by label
    right = ((balanced(torch.ones(1000)) > 0) == labels).double().mean()
    assert abs(float(right) - 0.5) < 0.05  # three standard deviations of a draw


def test_what_predicts_otherwise_has_its_own_validation_loss_and_may_be_submitted(toy, tmp_path):
    splits = open_splits(toy)
    names = ["probe", "probe+ensemble", "probe+balanced", "probe+adabn"]
    results = {
        name: experiment.run_method(find_method(name), splits, RECIPE, Job(tmp_path, resume=True)) for name in names * 2
    }  # the second time from what the first one left
    for name, result in results.items():
        truth = splits["val"].labels.double()
        logits = result.val_logits.double()
        # both classes are as frequent in this training set, so that neither weighs more
        loss = (truth * (-logits).exp().log1p() + (1 - truth) * logits.exp().log1p()).mean()
        assert result.val_loss == pytest.approx(float(loss), abs=1e-6), name
        assert result.val_accuracy == pytest.approx(float(((logits > 0) == truth.bool()).double().mean())), name
    assert len({result.val_loss for result in results.values()}) == 4
    assert results["probe"].val_loss == results["probe"].best.val_loss
    least = min(results.values(), key=lambda result: result.val_loss)
    whole = Report([*results.values()], [], {})
    assert whole.best is least
    assert [row[HEADER.index("val loss")] for row in whole.rows()] == [f"{r.val_loss:.3f}" for r in results.values()]
    assert [each["val_loss"] for each in as_data(whole)["results"]] == [r.val_loss for r in results.values()]


def test_the_weight_of_the_classes_is_that_of_the_training_set(toy, tmp_path):
    splits = open_splits(toy)
    splits["train"].labels[:8] = 0
    ones = int(splits["train"].labels.sum())
    result = experiment.run_method(find_method("probe+ensemble"), splits, RECIPE, Job(tmp_path))
    truth, logits = splits["val"].labels.double(), result.val_logits.double()
    weight = (len(splits["train"]) - ones) / ones
    loss = (weight * truth * (-logits).exp().log1p() + (1 - truth) * logits.exp().log1p()).mean()
    assert weight > 1.3 and result.val_loss == pytest.approx(float(loss), abs=1e-6)


def test_ensemble_is_the_mean_probability():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(ensembled(logits).sigmoid(), logits.sigmoid().mean(0))
    assert not ensembled(torch.full((8, 2), 200.0)).isinf().any()


def test_adabn_of_single_images_is_refused_where_it_left_every_statistic_at_nothing(toy, lite0):
    view = experiment.make_views(open_splits(toy), RECIPE, find_method("lora"))["test"]
    model = find_method("lora").prepare(copy.deepcopy(lite0))
    with pytest.raises(ExampleError, match="statistics need several images; give two or more, and --batch-size 2"):
        adapted_to(make_loader(view, 1), model)


def test_what_a_method_will_ask_for_is_looked_for_before_anything_is_trained(toy):
    splits = open_splits(toy)
    experiment.check_methods(find_methods(["lora-centre", "lora-adabn", "lora"]), splits, RECIPE)
    with pytest.raises(ExampleError, match="--batch-size 2"):
        experiment.check_methods(find_methods(["lora-adabn"]), splits, dataclasses.replace(RECIPE, batch_size=1))
    splits["test"].centres[3] = -1
    experiment.check_methods(find_methods(["lora"]), splits, RECIPE)
    with pytest.raises(ExampleError, match=r"lora-centre: centre normalisation needs .*test\.h5.* for 1 of 24 images"):
        experiment.check_methods(find_methods(["lora-centre"]), splits, RECIPE)
    with pytest.raises(ExampleError, match="centre normalisation needs each image's hospital"):
        experiment.centre_statistics(splits["test"])


def test_a_run_of_centre_normalisation_without_centres_writes_nothing(tmp_path):
    data = write_pcam(tmp_path / "data", {"train": 24, "val": 8, "test": 8})
    command = ["train", "--method", "lora-centre", "--data", data, "--image-size", "32", "--out", tmp_path / "out"]
    outcome = CliRunner().invoke(app, [str(each) for each in command])
    assert outcome.exit_code == 1 and "names none for 24 of 24 images" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_adabn_takes_the_statistics_of_the_images_it_is_given(toy, tmp_path, lite0):
    model = find_method("lora").prepare(copy.deepcopy(lite0))
    view = experiment.make_views(open_splits(toy), RECIPE, find_method("lora"))["test"]
    loader = make_loader(view, 24)  # one batch: its statistics are what train mode computes
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapted_to(loader, model)
    images = next(iter(loader))[0]
    features = convlora.remove(convlora.merge(copy.deepcopy(model))).conv_stem(images)
    torch.testing.assert_close(adapted.bn1.running_mean, features.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(predict(adapted, loader)[0], predict(model, loader)[0])
    with pytest.raises(ExampleError, match="no batch norm"):
        adapted_to(loader, convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), 1, modules_to_save=None))


def test_reported_figures_stand_beside_the_challenges_own_data_alone(toy):
    assert reported(["lora-track"], open_splits(toy)) == []


def test_rates_are_different_positive_numbers():
    assert parse_rates("1e-4,3e-4") == [1e-4, 3e-4]
    for text in ("", "1e-3,1e-3", "0", "nan", "a"):
        with pytest.raises(ExampleError, match="--lrs"):
            parse_rates(text)


def test_full_and_norms_train_what_they_say(toy, tmp_path, lite0):
    for name, moves in (("full", {"conv_stem.weight", "bn1.weight"}), ("norms", {"bn1.weight"})):
        method = find_method(name)
        model = method.prepare(copy.deepcopy(lite0))
        before = {n: p.clone() for n, p in model.named_parameters()}
        views = experiment.make_views(open_splits(toy), RECIPE, method)
        recipe = dataclasses.replace(RECIPE, epochs=1)
        history = fit(model, views, recipe, job=Job(tmp_path / name), to_train_mode=method.to_train_mode).history
        assert math.isfinite(history[0].val_loss)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert {n for n in ("conv_stem.weight", "bn1.weight") if n in changed} == moves
