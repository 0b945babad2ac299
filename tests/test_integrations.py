"""The callbacks for Lightning and Hugging Face's Trainer, in those trainers themselves."""

import copy
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import SmallNet, need
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import convlora
from convlora import CheckpointError, TargetError

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(12) % 3


def state_of(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Lightning


@pytest.fixture
def lightning():
    package = need("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield package


def a_module(lightning, net, name="model"):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            setattr(self, name, copy.deepcopy(net))

        def training_step(self, batch, _):
            return cross_entropy(getattr(self, name)(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("loss", cross_entropy(getattr(self, name)(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.AdamW(convlora.trainable_parameters(self), lr=0.01)

    return Module()


def fit(lightning, module, epochs, folder, ckpt_path=None, save_weights_only=False, **options):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from convlora.lightning import AdapterCallback

    saver = ModelCheckpoint(
        folder, save_last=True, every_n_epochs=1, enable_version_counter=False, save_weights_only=save_weights_only
    )
    torch.manual_seed(0)  # of the factors that the callback makes
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[AdapterCallback(2, **options), saver],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, loader


def test_lightning_trains_the_adapter_and_leaves_the_base(lightning, net, tmp_path):
    module = a_module(lightning, net)
    fit(lightning, module, 2, tmp_path)
    assert all(parameter.abs().sum() > 0 for parameter in convlora.adapter_parameters(module))
    assert same(state_of(convlora.remove(module.model)), state_of(net))


@pytest.mark.parametrize("norm", ["freeze", "track"])
def test_a_lightning_checkpoint_holds_what_is_trained_and_resumes_bit_for_bit(lightning, net, tmp_path, norm):
    whole = a_module(lightning, net)
    fit(lightning, whole, 3, tmp_path / "whole", norm=norm)
    fit(lightning, a_module(lightning, net), 2, tmp_path / "part", norm=norm)

    last = tmp_path / "part" / "last.ckpt"
    stored = torch.load(last, weights_only=False)["state_dict"]
    trained = {key for key, p in whole.named_parameters() if p.requires_grad} | {k for k, _ in whole.named_buffers()}
    assert stored.keys() == trained

    resumed = a_module(lightning, net)
    fit(lightning, resumed, 3, tmp_path / "part", last, norm=norm)
    assert same(state_of(resumed), state_of(whole))


def test_a_lightning_checkpoint_is_loaded_for_validation_too(lightning, net, tmp_path):
    module = a_module(lightning, net)
    trainer, loader = fit(lightning, module, 2, tmp_path)
    expected = trainer.validate(module, loader, verbose=False)
    fresh = a_module(lightning, net)
    trainer, loader = fit(lightning, fresh, 0, tmp_path / "other")
    assert trainer.validate(fresh, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
    assert same(state_of(fresh), state_of(module))


def test_a_lightning_checkpoint_of_another_base_is_refused_by_name(lightning, net, tmp_path):
    fit(lightning, a_module(lightning, net), 1, tmp_path)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.hidden.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"model\.hidden\.weight: other values than at training"):
        fit(lightning, a_module(lightning, other), 2, tmp_path, tmp_path / "last.ckpt")


def test_a_lightning_checkpoint_of_another_adapter_is_refused_by_name(lightning, net, tmp_path):
    fit(lightning, a_module(lightning, net), 1, tmp_path, exclude_modules="stem")
    with pytest.raises(CheckpointError, match=r"model\.stem\.convlora\.default\.lora_A: not in the checkpoint"):
        fit(lightning, a_module(lightning, net), 2, tmp_path, tmp_path / "last.ckpt")


def test_a_lightning_checkpoint_of_full_fine_tuning_is_refused(lightning, net, tmp_path):
    fit(lightning, a_module(lightning, net), 1, tmp_path)
    whole = torch.load(tmp_path / "last.ckpt", weights_only=False)
    del whole["convlora_base"]
    whole["state_dict"] = {f"model.{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save(whole, tmp_path / "full.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.stem\.convlora\.default\.lora_A: not in the checkpoint"):
        fit(lightning, a_module(lightning, net), 2, tmp_path, tmp_path / "full.ckpt")


def test_a_lightning_checkpoint_of_weights_alone_is_checked_as_well(lightning, net, tmp_path):
    """Lightning shows it to no callback; it has the base in it."""
    module = a_module(lightning, net)
    trainer, loader = fit(lightning, module, 1, tmp_path, save_weights_only=True)
    file, fresh = tmp_path / "last.ckpt", a_module(lightning, net)
    trainer.validate(fresh, loader, ckpt_path=file, verbose=False)
    assert same(state_of(fresh), state_of(module))

    other = a_module(lightning, net)
    trainer, loader = fit(lightning, other, 1, tmp_path / "other", exclude_modules="stem")
    before = state_of(other)
    empty = tmp_path / "empty.ckpt"
    torch.save({**torch.load(file, weights_only=False), "state_dict": {}}, empty)
    for unlike, fault in ((file, "lora_A: not in the model"), (empty, "lora_A: not in the checkpoint")):
        with pytest.raises(CheckpointError, match=fault):
            trainer.validate(other, loader, ckpt_path=unlike, verbose=False)
        assert same(state_of(other), before)  # refused before a number was copied
    other.load_state_dict({}, strict=False)  # the check was Lightning's alone


def test_lightning_callback_leaves_a_part_alone_that_is_injected_already(lightning, net, tmp_path):
    module = a_module(lightning, net)
    convlora.inject(module.model, 1, target_modules="stem")
    fit(lightning, module, 1, tmp_path)
    assert [layer.name for layer in convlora.summary(module.model).layers] == ["stem"]


def test_lightning_callback_names_the_attributes_that_there_are(lightning, net, tmp_path):
    module = a_module(lightning, net, name="backbone")
    with pytest.raises(TargetError, match=r"attribute='model': Module has no such module; it has backbone"):
        fit(lightning, module, 1, tmp_path)
    fit(lightning, module, 1, tmp_path, attribute="backbone")
    assert convlora.summary(module.backbone).layers


# Hugging Face Trainer


class WithLoss(nn.Module):
    """What the Trainer wants of a model: a loss first, for a batch by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()

    def forward(self, images, labels=None):
        logits = self.net(images)
        return cross_entropy(logits, labels), logits


def trainer_for(model, folder, epochs, *callbacks):
    transformers = need("transformers")
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="epoch",
        eval_strategy="epoch",
        disable_tqdm=True,
    )
    data = [{"images": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[*callbacks])


def test_trainer_writes_the_adapter_beside_each_checkpoint(tmp_path):
    need("transformers")
    from convlora.transformers import AdapterCallback

    model = convlora.inject(WithLoss(), 2)
    trainer_for(model, tmp_path, 2, AdapterCallback()).train()
    adapters = sorted(path.parent.parent.name for path in tmp_path.rglob("adapter_model.safetensors"))
    assert adapters == ["checkpoint-3", "checkpoint-6"]

    last = tmp_path / "checkpoint-6" / "adapter"
    loaded = convlora.load_adapter(WithLoss(), last).eval()
    assert torch.equal(loaded.net(IMAGES), model.eval().net(IMAGES))
    card = (last / "README.md").read_text(encoding="utf-8")
    assert "eval_loss" in card and "runtime" not in card
    assert same(state_of(convlora.remove(model)), state_of(WithLoss()))


@pytest.mark.filterwarnings("ignore:every lora_B is zero")
def test_the_card_gets_the_finite_numbers_of_the_last_evaluation_of_any_set(tmp_path):
    transformers = need("transformers")
    from convlora.transformers import AdapterCallback

    model = convlora.inject(WithLoss(), 2)
    last = {"eval_test_loss": float("nan"), "eval_test_accuracy": 0.5, "eval_test_best": True, "eval_test_runtime": 1.0}
    state = transformers.TrainerState(log_history=[{"eval_loss": 2.0}, last, {"loss": 0.1}], global_step=3)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    AdapterCallback().on_save(arguments, state, transformers.TrainerControl(), model=model)
    card = (tmp_path / "checkpoint-3" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "eval_test_accuracy" in card and not any(name in card for name in ("_loss", "_best", "runtime"))


def test_trainer_resumes_an_injected_model_bit_for_bit(tmp_path):
    whole = convlora.inject(WithLoss(), 2)
    trainer_for(whole, tmp_path / "whole", 3).train()
    trainer_for(convlora.inject(WithLoss(), 2), tmp_path / "part", 2).train()
    resumed = convlora.inject(WithLoss(), 2)
    trainer_for(resumed, tmp_path / "part", 3).train(resume_from_checkpoint=True)
    assert same(state_of(resumed), state_of(whole))


# Without the packages


def test_a_missing_package_is_one_error_that_names_the_extra():
    script = """
import importlib, sys
for name in ("lightning", "transformers"):
    sys.modules[name] = None
    try:
        importlib.import_module(f"convlora.{name}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name, line in zip(("lightning", "transformers"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"convlora.{name} needs ") and line.endswith(f"pip install 'convlora[{name}]'.")
