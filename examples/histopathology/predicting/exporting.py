"""Export a merged adapter to ONNX, and predict from the file.

The file holds the plain network, without adapters, and its metadata say how the input is made. It therefore predicts
without the backbone's weights and without convlora.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convlora

from ..augment.transforms import EvalTransform, Normalisation, Normalise
from ..data.dataset import HistoDataset
from ..errors import ExampleError
from ..files import replacing_file
from ..methods.method import Method, Predict
from ..runs.experiment import Transforms, load, open_backbone, read_card
from ..training.loading import make_loader
from ..training.prediction import balanced, ensembled
from ..training.recipe import Recipe
from .slidemap import Classifier

# Tolerance for another order of summation: fp32 rounding through some fifty layers, of logits of size 1 to 10.
TOLERANCE = 1e-3
_INSTALL = "pip install onnx onnxscript onnxruntime"
_META = "convlora.histopathology"


@dataclass(frozen=True)
class Exported:
    """The file that was written, and the largest difference of its logits from torch's on ``images`` patches."""

    path: Path
    size: int
    images: int
    difference: float


def export(adapter: Path, out: Path, recipe: Recipe, split: HistoDataset | None = None, images: int = 32) -> Exported:
    """Merge an adapter, write it as ONNX, and compare onnxruntime with torch before the file is renamed into place.

    Args:
        adapter: adapter folder that a run wrote.
        out: file to write.
        recipe: the adapter's recipe, perhaps with another path of the weights.
        split: patches to compare on; None for random ones.
        images: number of patches to compare on.

    Raises:
        ExampleError: packages are missing; the method normalises by centre or adapts statistics to its test images; the
            logits differ.
    """
    _, method = read_card(adapter)
    if method.normalise == "centre" or method.predict.adabn:
        raise ExampleError(
            f"{method.name} uses statistics of all its test images together, which a fixed network cannot; export a "
            "method that is not transductive, such as lora."
        )
    with _needed():
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    model = convlora.remove(convlora.merge(load(adapter, recipe, torch.device("cpu")))).eval()
    normalisation = open_backbone(recipe)[1]
    inputs = _patches(method, recipe, normalisation, split, images)
    with replacing_file(out) as partial:
        _write(model, inputs[:2], partial)
        stored = onnx.load(str(partial))
        meta = {"method": method.name, "image_size": recipe.image_size}
        meta |= {"mpp": recipe.mpp, "mean": list(normalisation.mean), "std": list(normalisation.std)}
        stored.metadata_props.add(key=_META, value=json.dumps(meta))
        onnx.save(stored, str(partial))
        with torch.inference_mode():
            expected = model(inputs).flatten()
        difference = float((_Session(partial).logits(inputs) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ExampleError(f"{out} was not written: onnxruntime's logits differ from torch's by {difference:.2g}.")
    return Exported(out, out.stat().st_size, len(inputs), difference)


def classifier_onnx(file: Path, how: Predict) -> tuple[Classifier, float | None]:
    """The file as a function of patches, see `slidemap.classifier`, and the microns per pixel of its training patches.

    Raises:
        ExampleError: as `predict_onnx`; AdaBN or the balanced threshold, which use all patches together.
    """
    if how.adabn or how.balanced:
        raise ExampleError("adabn and balanced use all images together; leave them out of --how for a slide.")
    session = _Session(file)
    meta = session.meta()
    plain = Normalisation("onnx", file.name, tuple(meta["mean"]), tuple(meta["std"]))
    transform = EvalTransform(int(meta["image_size"]), Normalise(plain), range(how.views))

    def logits(patches: Tensor) -> Tensor:
        each = [session.logits(view) for view in torch.split(transform(patches), len(patches))]
        return ensembled(torch.stack(each)) if len(each) > 1 else each[0]

    return logits, meta.get("mpp")


def predict_onnx(file: Path, split: HistoDataset, how: Predict, batch_size: int) -> Tensor:
    """Logits ``(N,)`` by a file that `export` wrote; above 0 means label 1.

    Raises:
        ExampleError: onnxruntime is missing; no such file, or one that `export` did not write; AdaBN, for which the
            file has no batch norms.
    """
    if how.adabn:
        raise ExampleError(
            "adabn: an ONNX file has no batch norms, since they are folded into its weights; give the adapter's folder."
        )
    session = _Session(file)
    meta = session.meta()
    plain = Normalisation("onnx", file.name, tuple(meta["mean"]), tuple(meta["std"]))
    transforms = Transforms(Method(str(meta["method"]), ""), Recipe(image_size=int(meta["image_size"])), plain)
    loader = make_loader(transforms.view(split, turns=range(how.views)), batch_size)
    batches = (torch.split(images, len(labels)) for images, labels, _ in loader)
    parts = [torch.stack([session.logits(view) for view in each]) for each in batches]
    views = torch.cat(parts, 1)
    logits = ensembled(views) if how.views > 1 else views[0]
    return balanced(logits) if how.balanced else logits


class _Session:
    """A file in onnxruntime, on the CPU."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise ExampleError(f"{file}: no such file; give the one that `export` wrote.")
        with _needed():
            import onnxruntime
        self.file = file
        try:
            self.session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as fault:  # onnxruntime has its own kinds of errors
            raise ExampleError(f"{file} cannot be read as ONNX ({str(fault).splitlines()[0]}).") from fault

    def meta(self) -> dict[str, Any]:
        """The file's metadata, which say how its input is made."""
        stored = self.session.get_modelmeta().custom_metadata_map.get(_META)
        if stored is None:
            raise ExampleError(f"{self.file} does not say how its input is made; write the file with `export`.")
        return dict(json.loads(stored))

    def logits(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B,)``."""
        name = self.session.get_inputs()[0].name
        return torch.from_numpy(self.session.run(None, {name: images.contiguous().numpy()})[0]).flatten()


def _write(model: nn.Module, images: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        torch.onnx.export(
            model,
            (images.contiguous(),),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


def _patches(
    method: Method, recipe: Recipe, normalisation: Normalisation, split: HistoDataset | None, images: int
) -> Tensor:
    if split is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(images, 3, recipe.image_size, recipe.image_size, generator=generator)
    view = Transforms(method, recipe, normalisation).view(split)
    return torch.stack([view[i][0] for i in range(min(images, len(split)))])


@contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as fault:
        raise ExampleError(f"ONNX needs a package that is not installed ({fault.name}): {_INSTALL}.") from fault
