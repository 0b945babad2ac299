"""From patches to a saved adapter and back; ``python -m examples.histopathology`` runs the whole example.

``python -m examples.histopathology.minimal`` draws synthetic patches; ``… minimal FOLDER`` reads the challenge's files.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Normalize  # type: ignore[import-untyped]

import convlora
from examples.histopathology.data.dataset import HistoDataset, open_splits
from examples.histopathology.making.synthetic import make_synthetic
from examples.histopathology.training.backbones import load_backbone


def main(data: Path | None = None, out: Path = Path("runs/minimal"), epochs: int = 3) -> float:
    """Train, save, load, test; returns the accuracy on the test patches."""
    # A network with ImageNet weights and a fresh head of one logit; LoRA in each of its convolutions.
    torch.manual_seed(0)
    model, colours = load_backbone("lite0")
    convlora.inject(model, rank=8)
    print(convlora.summary(model))

    # Patches (3, 96, 96) in [0, 1] with label 0 or 1, and their indices; test patches are from another hospital.
    if data is None:
        make_synthetic(data := out / "data", {"train": 960, "val": 320, "test": 320})
    normalise = Normalize(colours.mean, colours.std)
    train, val, test = open_splits(data, transforms=dict.fromkeys(("train", "val", "test"), normalise)).values()

    # Any loop trains it. The factors and the head train.
    optimizer = torch.optim.Adam(convlora.trainable_parameters(model), lr=1e-3)
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels, _ in DataLoader(train, batch_size=32, shuffle=True, drop_last=True):
            turned = torch.rot90(images, epoch, (2, 3))
            loss = binary_cross_entropy_with_logits(model(turned).squeeze(1), labels)
            optimizer.zero_grad(), loss.backward(), optimizer.step()  # type: ignore[no-untyped-call]
        print(f"epoch {epoch}: validation accuracy {accuracy(model, val):.3f}")

    # The adapter is a small file. On a fresh network it predicts the same; merged it adds no cost.
    convlora.save_adapter(model, out / "adapter")
    again = convlora.merge(convlora.load_adapter(load_backbone("lite0")[0], out / "adapter"))
    found = accuracy(again, test)
    print(f"test accuracy {found:.3f}, by the adapter in {out / 'adapter'}")
    return found


@torch.inference_mode()
def accuracy(model: torch.nn.Module, split: HistoDataset) -> float:
    """The share of patches on the right side of logit 0."""
    model.eval()
    return sum(int(((model(x).squeeze(1) > 0) == (y > 0)).sum()) for x, y, _ in DataLoader(split, 64)) / len(split)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
