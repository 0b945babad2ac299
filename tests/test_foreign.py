"""Files of peft and of LoCon's writers, made by hand: what they say is computed, with neither library installed."""

import copy
import json

import pytest
import torch
from conftest import SmallNet
from safetensors.torch import save_file

import convlora


@pytest.fixture
def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of rank 2, for a convolution with stride and for a linear layer."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    return {"stem": (normal(2, 3, 3, 3), normal(16, 2, 1, 1)), "hidden": (normal(2, 16), normal(12, 2))}


def changed(base: SmallNet, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], scaling: float) -> SmallNet:
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, (A, B) in factors.items():
            model.get_submodule(name).weight += scaling * torch.einsum("or,r...->o...", B.flatten(1), A)
    return model


def check(base: SmallNet, file: object, expected: SmallNet, images: torch.Tensor) -> None:
    loaded = convlora.load_adapter(copy.deepcopy(base), file).eval()
    assert not torch.allclose(expected(images), base(images), atol=1e-3)
    torch.testing.assert_close(loaded(images), expected(images), rtol=1e-5, atol=1e-6)  # fp32, another order of sums
    assert torch.equal(convlora.remove(loaded)(images), base(images))


def test_a_file_as_peft_writes_it_predicts_what_it_says(net, images, factors, tmp_path):
    base = net.eval()
    prefix = "base_model.model."
    tensors = {
        f"{prefix}{name}.lora_{side}.weight": tensor
        for name, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(factors)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    check(base, tmp_path, changed(base, factors, 3.0), images)


def test_a_file_as_lycoris_writes_it_predicts_what_it_says(net, images, factors, tmp_path):
    base, tensors = net.eval(), {}
    for name, (A, B) in factors.items():
        tensors |= {
            f"lycoris_{name}.lora_down.weight": A,
            f"lycoris_{name}.lora_up.weight": B,
            f"lycoris_{name}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, tmp_path / "locon.safetensors")
    check(base, tmp_path / "locon.safetensors", changed(base, factors, 0.5), images)
