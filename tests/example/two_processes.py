"""Run by torchrun in each process: one training; the first process writes its history."""

import json
import sys
from pathlib import Path

import torch

from examples.histopathology.data.dataset import open_splits
from examples.histopathology.methods.catalogue import find_method
from examples.histopathology.runs import experiment
from examples.histopathology.training.processes import Job
from examples.histopathology.training.recipe import Recipe, fit


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # Without dropout: its draws are each process's own.
    recipe = Recipe(image_size=32, epochs=2, batch_size=16, dropout=0.0)
    job = Job(out)
    model, _ = experiment.open_backbone(recipe)
    method = find_method("lora")
    method.prepare(model, 4)
    result = fit(model, experiment.make_views(open_splits(data), recipe, method), recipe, job=job, name="lora")
    if job.is_first:
        epochs = [(epoch.train_loss, epoch.val_loss) for epoch in result.history]
        (out / "history.json").write_text(json.dumps({"processes": job.processes, "epochs": epochs}))
    job.wait()


if __name__ == "__main__":
    main()
