"""Ultralytics' own trainer with an adapter: what it builds, writes, resumes and exports; and each version's heads."""

import csv
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")
np = pytest.importorskip("numpy")

from PIL import Image
from ultralytics import RTDETR, YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import torch_load

import convlora
from convlora.ultralytics import STATE, AdapterTrainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    level, threads = LOGGER.level, torch.get_num_threads()
    LOGGER.setLevel("ERROR")
    torch.set_num_threads(1)
    yield
    LOGGER.setLevel(level)
    torch.set_num_threads(threads)


DETECT = ["cv2", "cv3"]
BOTH = [*DETECT, "one2one_cv2", "one2one_cv3"]
QUERIES = ["denoising_class_embed", "enc_score_head", "enc_bbox_head", "dec_score_head", "dec_bbox_head"]
HEADS = {
    "yolov3-tiny": (DETECT, 4),
    "yolov5n": (DETECT, 6),
    "yolov8n": (DETECT, 6),
    "yolov8n-p6": (DETECT, 8),
    "yolov9t": (DETECT, 6),
    "yolov10n": (BOTH, 12),
    "yolo11n": (DETECT, 6),
    "yolo12n": (DETECT, 6),
    "yolo26n": (BOTH, 12),
    "yolov8n-seg": ([*DETECT, "cv4"], 9),
    "yolo11n-seg": ([*DETECT, "cv4"], 9),
    "yolo26n-seg": ([*BOTH, "cv4", "one2one_cv4", "proto.semseg"], 19),
    "yolo11n-pose": ([*DETECT, "cv4"], 9),
    "yolo26n-pose": (BOTH + [f"{a}cv4_{b}" for a in ("", "one2one_") for b in ("kpts", "sigma")], 24),
    "yolo11n-obb": ([*DETECT, "cv4"], 9),
    "yolo26n-obb": ([*BOTH, "cv4", "one2one_cv4"], 18),
    "yolo11n-cls": (["linear"], 1),
    "yolo26n-sem": (["classifier", "aux_head"], 2),
    "rtdetr-l": (QUERIES, 15),
}
"""By network: where in its last module a person would name the heads, and how many they are."""


@pytest.mark.parametrize(
    "name",
    [n if n in ("yolo11n", "yolo26n-pose") else pytest.param(n, marks=pytest.mark.thorough) for n in HEADS],
)
def test_the_output_layers_of_each_version_are_its_heads_and_its_constant_stays(name):
    where, count = HEADS[name]
    model = (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml").model
    plan = convlora.plan(model)
    last = f"model.{len(model.model) - 1}"
    assert len(plan.modules_to_save) == count
    names = {re.sub(r"(\.layers|\.\d+)+$", "", n.removeprefix(last + ".")) for n in plan.modules_to_save}
    assert names == set(where)
    ends = [model.get_submodule(n) for n in plan.modules_to_save]
    assert all(getattr(end, "bias", None) is not None for end in ends if not isinstance(end, torch.nn.Embedding))
    assert not [layer.name for layer in plan.layers if ".dfl." in layer.name]


# ---- a training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures of a red square on noise, and a network of 80 classes whose norms have seen data."""
    root = tmp_path_factory.mktemp("yolo")
    for part in ("images", "labels"):
        (root / part).mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        picture = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        x, y = rng.integers(4, 36, 2)
        picture[y : y + 24, x : x + 24] = [220, 40, 40]
        Image.fromarray(picture).save(root / "images" / f"{i}.png")
        box = (x + 12) / 64, (y + 12) / 64, 24 / 64, 24 / 64
        (root / "labels" / f"{i}.txt").write_text("0 " + " ".join(map(str, box)) + "\n")
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images\nval: images\nnames: [square]\n")
    torch.manual_seed(0)
    model = YOLO("yolo11n.yaml").model
    model.train()(torch.rand(4, 3, 64, 64))
    torch.save({"model": model, "train_args": {}, "epoch": -1}, root / "base.pt")
    return root


class SquareTrainer(AdapterTrainer, DetectionTrainer, rank=4):
    pass


def train(folder, name, trainer=SquareTrainer, callback=None, model="base.pt", **options):
    yolo = YOLO(folder / model)
    if callback:
        yolo.add_callback("on_train_epoch_start", callback)
    asked = {"epochs": 8, "imgsz": 64, "batch": 4, "nbs": 4, "optimizer": "Adam", "lr0": 5e-3, "warmup_epochs": 0}
    asked |= {"device": "cpu", "amp": False, "plots": False, "mosaic": 0, "verbose": False, "exist_ok": True}
    yolo.train(trainer=trainer, data=str(folder / "data.yaml"), project=str(folder), name=name, **asked | options)
    return yolo


@pytest.fixture(scope="module")
def trained(folder):
    return train(folder, "whole")


def losses(folder, name):
    with (folder / name / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [sum(float(row[f"train/{part}_loss"]) for part in ("box", "cls", "dfl")) for row in rows]


def detector(folder):
    """The network that the trainer builds: for one class, with the base's numbers where they fit."""
    model = DetectionModel("yolo11n.yaml", nc=1, verbose=False)
    model.load(YOLO(folder / "base.pt").model, verbose=False)
    return model.eval()


X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def predict(model):
    with torch.no_grad():
        return model.float().eval()(X)[0]


@pytest.mark.thorough
def test_its_loss_falls_and_no_bit_of_the_base_moves(folder, trained):
    found = losses(folder, "whole")
    assert found[-1] < 0.9 * found[0]
    model = trained.trainer.model
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = convlora.summary(model).modules_to_save
    assert len(heads) == 6 and all(".convlora." in n or n.rpartition(".")[0] in heads for n in trainable)
    base, theirs = convlora.remove(deepcopy(model)).state_dict(), YOLO(folder / "base.pt").model.state_dict()
    shared = [key for key in theirs if ".cv3." not in key or theirs[key].shape == base[key].shape]
    assert len(shared) > 480 and all(torch.equal(base[key], theirs[key]) for key in shared)


@pytest.mark.thorough
def test_the_best_adapter_is_the_average_and_is_loaded_on_the_base(folder, trained):
    average = trained.trainer.ema.ema
    loaded = convlora.load_adapter(detector(folder), folder / "whole/weights/last_adapter")
    assert torch.equal(predict(loaded), predict(average))
    assert not torch.equal(predict(loaded), predict(detector(folder)))
    assert (folder / "whole/weights/best_adapter/adapter_model.safetensors").is_file()


@pytest.mark.thorough
def test_the_checkpoint_is_the_merged_network_in_half_precision(folder, trained):
    stored = torch_load(folder / "whole/weights/last.pt")["model"]
    merged = convlora.load_adapter(detector(folder), folder / "whole/weights/last_adapter")
    merged = convlora.remove(convlora.merge(merged)).half()
    ours, theirs = merged.state_dict(), stored.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not hasattr(stored, STATE) and not any("convlora" in type(m).__module__ for m in stored.modules())


@pytest.mark.thorough
def test_what_was_trained_predicts_validates_fuses_and_goes_to_onnx(folder, trained):
    need_onnx = pytest.importorskip("onnxruntime")
    yolo = YOLO(folder / "whole/weights/best.pt")
    plain = predict(deepcopy(yolo.model))
    assert yolo.predict(str(folder / "images/0.png"), imgsz=64, verbose=False)[0].boxes is not None
    assert 0 <= yolo.val(data=str(folder / "data.yaml"), imgsz=64, plots=False, verbose=False).box.map50 <= 1
    torch.testing.assert_close(predict(YOLO(folder / "whole/weights/best.pt").model.fuse(verbose=False)), plain)
    file = Path(YOLO(folder / "whole/weights/best.pt").export(format="onnx", imgsz=64, batch=2, simplify=False))
    session = need_onnx.InferenceSession(file)
    output = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])
    # fused with its norms and in another library's order of sums; boxes are in pixels of 64
    torch.testing.assert_close(output, plain, rtol=1e-3, atol=1e-2)


class Interrupted(Exception):
    pass


@pytest.mark.thorough
def test_an_interrupted_training_goes_on_from_the_numbers_that_it_had(folder):
    def interrupt(trainer):
        if trainer.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(folder, "cut", callback=interrupt)
    file = folder / "cut/weights/last.pt"
    stored = getattr(torch_load(file)["ema"], STATE)
    began = {}

    def begin(trainer):
        if not began:
            began["model"], began["average"] = deepcopy(trainer.model.state_dict()), trainer.ema.ema.state_dict()
            began["average"], began["epoch"] = deepcopy(began["average"]), trainer.epoch

    yolo = train(folder, "cut", callback=begin, model="cut/weights/last.pt", resume=True)
    assert began["epoch"] == 2 and len(losses(folder, "cut")) == 8
    for key, tensor in (stored["base"] | stored["adapter"]).items():
        assert torch.equal(began["model"][key], tensor) and torch.equal(began["average"][key], tensor)
    base = convlora.remove(deepcopy(yolo.trainer.model)).state_dict()
    assert all(torch.equal(base[key], tensor) for key, tensor in stored["base"].items())
    assert not hasattr(torch_load(file)["model"], STATE)


@pytest.mark.thorough
def test_a_training_resumes_with_its_own_options_and_file_alone(folder):
    class Wider(AdapterTrainer, DetectionTrainer, rank=5):
        pass

    def interrupt(trainer):
        if trainer.epoch == 1:
            raise Interrupted

    for name, first, then in (("narrow", SquareTrainer, Wider), ("plain", DetectionTrainer, SquareTrainer)):
        with pytest.raises(Interrupted):
            train(folder, name, trainer=first, callback=interrupt)
        with pytest.raises(convlora.CheckpointError, match=r"other options|no adapter to resume"):
            train(folder, name, trainer=then, model=f"{name}/weights/last.pt", resume=True)


@pytest.mark.thorough
def test_after_a_loss_of_nan_the_training_goes_on_from_the_last_checkpoint(folder):
    at = []

    def spoil(trainer):
        if trainer.epoch == 2 and not at:
            at.append(trainer.epoch)
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))

    yolo = train(folder, "spoilt", callback=spoil, epochs=4)
    assert at and len(losses(folder, "spoilt")) == 4
    assert all(p.isfinite().all() for p in yolo.trainer.model.parameters())
    assert all(p.isfinite().all() for p in yolo.trainer.ema.ema.parameters())


@pytest.mark.thorough
def test_layers_that_ultralytics_freezes_stay_frozen_and_are_told(folder):
    with pytest.warns(UserWarning, match=r"model\.0\.conv: its factors are frozen"):
        yolo = train(folder, "frozen", epochs=1, freeze=3)
    assert not any(p.requires_grad for p in yolo.trainer.model.model[:3].parameters())
    assert any(p.requires_grad for p in yolo.trainer.model.model[3].parameters())


def test_an_injection_that_the_trainer_would_lose_is_told(folder):
    yolo = YOLO(folder / "base.pt")
    with pytest.warns(UserWarning, match=r"train\(\) makes a new network") as told:
        convlora.inject(yolo.model, rank=4)
    assert told[0].filename == __file__
    with pytest.raises(convlora.StateError, match=r"convlora\.merge"):
        yolo.predict(str(folder / "images/0.png"), imgsz=64, verbose=False)
    assert not convlora.check(yolo.model)


def test_options_are_checked_where_the_class_is_made():
    with pytest.raises(convlora.TargetError, match="rank"):
        type("T", (AdapterTrainer, DetectionTrainer), {}, rank=0)
    with pytest.raises(TypeError, match="lora_alpha"):
        type("T", (AdapterTrainer, DetectionTrainer), {}, lora_alpha=2)
    assert type("T", (SquareTrainer,), {}).request == SquareTrainer.request
