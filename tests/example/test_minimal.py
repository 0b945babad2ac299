"""The example in one file of sixty lines at most: it learns, and what it saves predicts what it trained."""

from pathlib import Path

from conftest import need_extra

need_extra("histopathology")

import pytest
import torch
from toy_patches import write_toy

import convlora
from examples.histopathology import minimal
from examples.histopathology.training.backbones import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_read_in_a_minute():
    assert len(Path(minimal.__file__).read_text(encoding="utf-8").splitlines()) <= 60


def test_the_saved_adapter_predicts_what_was_trained_and_tested(tmp_path, capsys, monkeypatch):
    used = []
    own = minimal.accuracy
    monkeypatch.setattr(minimal, "accuracy", lambda model, split: used.append(model) or own(model, split))
    folder = write_toy(tmp_path / "data", {"train": 32, "val": 2, "test": 2})
    found = minimal.main(folder, tmp_path / "out", epochs=1)
    assert f"test accuracy {found:.3f}, by the adapter in {tmp_path / 'out' / 'adapter'}" in capsys.readouterr().out
    trained, tested = used
    again = convlora.load_adapter(load_backbone("lite0")[0], tmp_path / "out" / "adapter").eval()
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(again(images), trained.eval()(images))
        assert torch.equal(again(images), tested(images))


@pytest.mark.thorough
def test_it_learns_what_anyone_can_see(tmp_path):
    assert minimal.main(write_toy(tmp_path / "data", {"train": 96, "val": 12, "test": 12}), tmp_path / "out", 2) > 0.7
