"""Predict a large split in parts, which processes share and which stay on disk until all are done.

A part is some thousand patches in order, so neither the number of processes nor an interruption changes the batches.
Each part is written whole or not at all; repeating the same command continues an interrupted run.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.dataset import HistoDataset
from ..data.indexing import stamp
from ..files import replacing_file, write_text
from ..methods.method import Predict
from ..training.loading import Loader
from ..training.prediction import adapted_to, balanced, ensembled, plain_copy
from ..training.processes import Job
from ..training.recipe import predict_each
from .content import digest_of

SIZE = 4096
"""Patches of a part, rounded up to a multiple of the batch size."""
IDENTITY = "identity.json"


def predict_in_shards(
    how: Predict, model: nn.Module, loader: Callable[[int], Loader], folder: Path, identity: Mapping[str, Any], job: Job
) -> Tensor:
    """Predict as `prediction.predict_by` does, and return the logits ``(N,)`` in every process.

    Args:
        how, model, loader: see `prediction.predict_by`.
        folder: folder of the parts; parts of another identity are deleted. Delete it when the result is saved.
        identity: all that the predictions depend on, as plain values.
        job: the job, whose processes share the parts.
    """
    job.first_decides(lambda: _begin(folder, identity))
    if how.adabn:
        model = _adapted(model, loader(1), folder / "statistics.safetensors", job)
    whole = loader(how.views)
    size, batch = whole.batch_sampler.size, whole.batch_sampler.batch_size
    step = -(-SIZE // batch) * batch
    parts = [(start, folder / f"{start:09}.safetensors") for start in range(0, size, step)]
    for start, path in parts[int(job.accelerator.process_index) :: job.processes]:
        if not path.is_file():
            (logits,), _ = predict_each([model], whole.between(start, min(start + step, size)))
            _write(path, {"logits": ensembled(logits) if how.views > 1 else logits})
    job.wait()
    logits = torch.cat([load_file(path)["logits"] for _, path in parts])
    job.wait()  # the first process to finish may delete the parts
    return balanced(logits) if how.balanced else logits


def identity_of(adapter: Path, split: HistoDataset, how: Predict, batch_size: int) -> dict[str, Any]:
    """All that predictions with an adapter folder depend on; a file of patches is identified by its size and times."""
    digest = hashlib.sha256()
    for path in sorted(adapter.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    is_one_file = split.path.suffix.lower() in (".h5", ".hdf5")
    data = stamp(split.path) if is_one_file else digest_of(split)
    return {"adapter": digest.hexdigest(), "data": data, "how": vars(how), "batch": batch_size, "patches": len(split)}


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Keep the parts of this prediction and delete others."""
    text = json.dumps(dict(identity), sort_keys=True)
    kept = folder / IDENTITY
    if kept.is_file() and kept.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_text(kept, text)


def _adapted(model: nn.Module, loader: Loader, path: Path, job: Job) -> nn.Module:
    """The model with AdaBN's statistics, which the first process computes from all patches."""

    def found() -> None:
        if not path.is_file():
            _write(path, dict(adapted_to(loader, model).named_buffers()))

    job.first_decides(found)
    plain, buffers = plain_copy(model), load_file(path)
    for name, buffer in plain.named_buffers():
        buffer.copy_(buffers[name])
    return plain


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing_file(path) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
