"""What users of other libraries write by habit: the call, what happens, what is said, and what to write.

``test_habits.py`` runs each row on a small network. ``docs/habits.md`` is made of them::

    python tests/habits.py > docs/habits.md
"""

from __future__ import annotations

import sys
from typing import NamedTuple

WORKS, WARNS = "works", "warns"


class Habit(NamedTuple):
    """A call by habit, in the variables that the page's head names."""

    call: str
    happens: str
    """``WORKS``, ``WARNS``, or the error's name."""
    says: str
    """Words of the error or the warning; where the call works, an expression that is true afterwards."""
    write: str = ""
    """What to write for it, which runs; empty where the call is right or there is nothing to write."""


def missing(call: str, write: str = "", of: str = "'Net' object") -> Habit:
    """A method or attribute that the user's own network does not have: torch's error."""
    name = call.partition(".")[2].partition("(")[0]
    return Habit(call, "AttributeError", f"{of} has no attribute '{name}'", write)


OPTIMIZER = "torch.optim.AdamW(convlora.trainable_parameters(model), lr=2e-3)"
NO_NAME = "TypeError"
HABITS: dict[str, list[Habit]] = {
    "peft: the options": [
        Habit("convlora.inject(net, r=8)", NO_NAME, "Its name here is rank.", "convlora.inject(net, rank=8)"),
        Habit("convlora.inject(net, 8, 16)", NO_NAME, "positional arguments", "convlora.inject(net, 8, alpha=16)"),
        Habit(
            "convlora.inject(net, lora_alpha=16)", NO_NAME, "Its name here is alpha.", "convlora.inject(net, alpha=16)"
        ),
        Habit(
            "convlora.inject(net, lora_dropout=0.1)",
            NO_NAME,
            "Its name here is dropout.",
            "convlora.inject(net, dropout=0.1)",
        ),
        Habit('convlora.inject(net, bias="none")', NO_NAME, "Leave it out: biases are frozen", "convlora.inject(net)"),
        Habit(
            'convlora.inject(net, init_lora_weights="pissa")',
            NO_NAME,
            "Its name here is init.",
            'convlora.inject(net, init="pissa")',
        ),
        Habit('convlora.inject(net, task_type="FEATURE_EXTRACTION")', NO_NAME, "Leave it out.", "convlora.inject(net)"),
        Habit(
            'convlora.inject(net, config={"r": 8})', NO_NAME, "Give the options themselves", "convlora.inject(net, 8)"
        ),
        Habit(
            "convlora.inject(net, layers_to_transform=[0])",
            NO_NAME,
            "Write target_modules=['layer1.0.*'], say.",
            'convlora.inject(net, target_modules=["layer1.0.*"])',
        ),
        Habit(
            'convlora.inject(net, rank="8")',
            "TargetError",
            "rank='8'; a rank is a whole number",
            "convlora.inject(net, 8)",
        ),
        Habit(
            "convlora.inject(net, 8.0)", "TargetError", "rank=8.0; a rank is a whole number", "convlora.inject(net, 8)"
        ),
        Habit(
            "convlora.inject(net, 0)",
            "TargetError",
            "to train only the head, target_modules=()",
            "convlora.inject(net, target_modules=())",
        ),
        Habit("convlora.inject(net, 512)", WORKS, "max(p.rank for p in convlora.summary(net).layers) < 64"),
        Habit(
            'convlora.inject(net, alpha="16")',
            "TargetError",
            "it must be a finite number",
            "convlora.inject(net, alpha=16)",
        ),
        Habit(
            "convlora.inject(net, dropout=10)",
            "TargetError",
            "it must be at least 0 and below 1",
            "convlora.inject(net, dropout=0.1)",
        ),
        Habit("convlora.inject(net, init=True)", "TargetError", "it must be one of 'kaiming'", "convlora.inject(net)"),
        Habit("convlora.inject(net, 2, use_rslora=True, use_dora=True)", WORKS, "convlora.summary(net).use_dora"),
        Habit(
            'convlora.inject(net, method="dora")',
            "TargetError",
            "has another name here: write use_dora=True",
            "convlora.inject(net, use_dora=True)",
        ),
    ],
    "peft: which layers": [
        Habit(
            'convlora.inject(net, target_modules=["conv1"])',
            WORKS,
            "\"add '*.conv1' for 2 more whose names end in it\" in str(convlora.summary(net))",
            'convlora.inject(net, target_modules=["conv1", "*.conv1"])',
        ),
        Habit(
            'convlora.inject(net, target_modules=["conv2"])',
            "TargetError",
            "for all that end in 'conv2' (2) write '*.conv2'",
            'convlora.inject(net, target_modules="*.conv2")',
        ),
        Habit(
            'convlora.inject(net, target_modules=r".*conv\\d")',
            "TargetError",
            "for a regular expression give re.compile(...)",
            'convlora.inject(net, target_modules=re.compile(r".*conv\\d"))',
        ),
        Habit(
            'convlora.inject(net, target_modules="all-linear")',
            "TargetError",
            "matches no layer that could be adapted",
            "convlora.inject(net, target_modules=[nn.Conv2d, nn.Linear])",
        ),
        Habit(
            'convlora.inject(net, target_modules=["q_proj", "v_proj"])',
            "TargetError",
            "`print(convlora.plan(model))` lists every layer",
            "print(convlora.plan(net))",
        ),
        Habit(
            'convlora.inject(net, target_modules="Conv2d")',
            "TargetError",
            "matches no layer that could be adapted",
            "convlora.inject(net, target_modules=nn.Conv2d)",
        ),
        Habit(
            'convlora.inject(net, target_modules=["layer1"])',
            "TargetError",
            "For the 4 modules inside 'layer1' write 'layer1.*'",
            'convlora.inject(net, target_modules=["layer1.*"])',
        ),
        Habit(
            "convlora.inject(net, target_modules=[net.conv1])",
            "TargetError",
            "give a type such as nn.Conv2d, a glob such as 'layer4.*'",
            'convlora.inject(net, target_modules="conv1")',
        ),
        Habit(
            "convlora.inject(net, target_modules=nn.Linear)",
            "TargetError",
            "No layer of Net would be adapted (fc: trained in full)",
            "convlora.inject(net, target_modules=[nn.Conv2d, nn.Linear])",
        ),
        Habit(
            'convlora.inject(net, exclude_modules=["bn1"])',
            "TargetError",
            "matches no layer that could be adapted",
            "convlora.inject(net)",
        ),
        Habit(
            'convlora.inject(net, modules_to_save=["classifier"])',
            "TargetError",
            "The head is 'fc'.",
            'convlora.inject(net, modules_to_save=["fc"])',
        ),
        Habit(
            'convlora.inject(net, rank_pattern={"conv2": 4})',
            "TargetError",
            "write '*.conv2'",
            'convlora.inject(net, rank_pattern={"*.conv2": 4})',
        ),
    ],
    "peft: the model": [
        Habit(
            "from convlora import get_peft_model",
            "ImportError",
            "cannot import name 'get_peft_model'",
            "convlora.inject(net)",
        ),
        Habit(
            "convlora.get_peft_model(net, None)",
            "AttributeError",
            "Write convlora.inject(model, rank=8)",
            "convlora.inject(net, rank=8)",
        ),
        Habit(
            "convlora.LoraConfig(r=8)",
            "AttributeError",
            "Write the arguments of convlora.inject",
            "convlora.inject(net, 8)",
        ),
        Habit(
            'convlora.PeftModel.from_pretrained(net, "adapter")',
            "AttributeError",
            "nothing wraps it",
            'convlora.load_adapter(net, "adapter")',
        ),
        Habit("convlora.inject(model)", "StateError", "call convlora.add_adapter", 'convlora.add_adapter(model, "b")'),
        missing("model.print_trainable_parameters()", "print(convlora.summary(model))"),
        missing("model.merge_and_unload()", "plain = convlora.remove(convlora.merge(model))"),
        missing("model.merge_adapter()", "convlora.merge(model)"),
        missing("model.unload()", "convlora.remove(model)"),
        missing("model.get_base_model()", "convlora.remove(model)"),
        missing('model.save_pretrained("x")', 'convlora.save_adapter(model, "x")'),
        missing('model.add_adapter("b")', 'convlora.add_adapter(model, "b")'),
        missing('model.set_adapter("default")', 'convlora.set_adapter(model, "default")'),
        missing('model.delete_adapter("default")', "convlora.remove(model)"),
        missing("model.peft_config", "convlora.summary(model).to_json()"),
        Habit(
            'convlora.merge(model, "default")',
            "TargetError",
            "convlora.set_adapter(model, name)",
            "convlora.merge(model)",
        ),
        Habit("convlora.merge(model, safe_merge=True)", "TypeError", "unexpected keyword", "convlora.merge(model)"),
        Habit("convlora.merge(convlora.merge(model))", "StateError", "convlora.unmerge(model) takes it back"),
        Habit("convlora.merge(net)", "StateError", "Call convlora.inject(model) first", "convlora.merge(model)"),
        Habit(
            "convlora.disable_adapter(model)",
            WORKS,
            "not torch.equal(model(images), net(images))",
            "with convlora.disable_adapter(model): model(images)",
        ),
        Habit(
            'convlora.combine_adapters(model, ["default"], "b")',
            "TargetError",
            "it must be a dict of names and weights",
            'convlora.combine_adapters(model, {"default": 1.0}, "b")',
        ),
        Habit(
            'convlora.delete_adapter(model, "default")',
            "StateError",
            "convlora.remove(model) to get the base",
            "convlora.remove(model)",
        ),
    ],
    "peft: files": [
        Habit('convlora.load_adapter(net, "adapter")', WORKS, "torch.equal(net.eval()(images), model.eval()(images))"),
        Habit(
            'convlora.load_adapter("adapter", net)',
            "TargetError",
            "model is of type str; it must be a torch.nn.Module",
            'convlora.load_adapter(net, "adapter")',
        ),
        Habit(
            'convlora.load_adapter(net, "adapter", is_trainable=True)',
            "TypeError",
            "'is_trainable'. Leave it out.",
            'convlora.load_adapter(net, "adapter")',
        ),
        Habit(
            'convlora.load_adapter(model, "adapter")',
            "StateError",
            "or load it into the plain model, which convlora.remove(model) gives",
            'convlora.load_adapter(convlora.remove(model), "adapter")',
        ),
        Habit(
            'convlora.load_adapter(net, "nothing")',
            "CheckpointError",
            "give the directory that convlora.save_adapter wrote",
        ),
        Habit(
            'convlora.load_adapter(Net(), "adapter")',
            "CheckpointError",
            "Load the same pretrained weights first",
            'convlora.load_adapter(net, "adapter")',
        ),
        Habit(
            'convlora.save_adapter(model, "x.safetensors")',
            "CheckpointError",
            "is a file's name, and an adapter is saved as a directory",
            'convlora.save_adapter(model, "x")',
        ),
        Habit(
            'convlora.save_adapter(model.state_dict(), "x")',
            "TargetError",
            "not its name, class, parameters or state dict",
            'convlora.save_adapter(model, "x")',
        ),
        Habit(
            'convlora.save_adapter(model, "x", safe_serialization=True)',
            "TypeError",
            "unexpected keyword argument 'safe_serialization'",
            'convlora.save_adapter(model, "x")',
        ),
        Habit(
            'convlora.save_adapter(net, "x")',
            "StateError",
            "Net carries no adapter",
            'convlora.save_adapter(model, "x")',
        ),
    ],
    "LyCORIS and kohya's scripts": [
        Habit(
            "convlora.create_lycoris(net, 1.0)",
            "AttributeError",
            "Write convlora.inject",
            "convlora.inject(net, rank=8)",
        ),
        Habit("convlora.inject(net, network_dim=8)", NO_NAME, "Its name here is rank.", "convlora.inject(net, rank=8)"),
        Habit("convlora.inject(net, conv_dim=8)", NO_NAME, "Its name here is rank.", "convlora.inject(net, rank=8)"),
        Habit(
            "convlora.inject(net, network_alpha=4)", NO_NAME, "Its name here is alpha.", "convlora.inject(net, alpha=4)"
        ),
        Habit(
            'convlora.inject(net, algo="loha")',
            NO_NAME,
            "Its name here is method.",
            'convlora.inject(net, method="loha")',
        ),
        Habit('convlora.inject(net, method="locon")', "TargetError", "write method='lora'", "convlora.inject(net)"),
        Habit(
            "convlora.inject(net, multiplier=0.5)",
            NO_NAME,
            "Write convlora.set_scale(model, name, scale) afterwards.",
            'convlora.set_scale(model, "default", 0.5)',
        ),
        Habit(
            'convlora.inject(net, preset="full")', NO_NAME, "Its name here is target_modules.", "convlora.inject(net)"
        ),
        Habit(
            'convlora.inject(net, method="lokr", factor=4)',
            NO_NAME,
            "Options of a method go into method_options={...}.",
            'convlora.inject(net, method="lokr")',
        ),
        Habit(
            'convlora.export_adapter(model, "x.safetensors", "kohya")',
            "TargetError",
            "it must be 'diffusers' or 'lycoris'",
            "model = convlora.inject(net, 2, modules_to_save=None); model(images).sum().backward(); "
            "torch.optim.SGD(convlora.trainable_parameters(model), 0.1).step(); "
            'convlora.export_adapter(model, "x.safetensors", "lycoris")',
        ),
    ],
    "timm": [
        Habit(
            'convlora.inject("resnet18")',
            "TargetError",
            "the network itself, built and with its weights loaded, not its name",
            "convlora.inject(net)",
        ),
        Habit(
            "convlora.inject(net, num_classes=5)",
            NO_NAME,
            "Build the network with it, then inject.",
            "convlora.inject(net)",
        ),
        Habit(
            "net.reset_classifier(5); convlora.inject(net)", WORKS, "convlora.summary(net).modules_to_save == ('fc',)"
        ),
        Habit(
            'model.reset_classifier(5); convlora.save_adapter(model, "x")',
            "StateError",
            "For a new head, call convlora.adopt(model)",
            'model.reset_classifier(5); convlora.adopt(model); convlora.save_adapter(model, "x")',
        ),
        Habit(
            "convlora.inject(net, freeze_bn=True)",
            NO_NAME,
            "Write norm='freeze' or norm='track'.",
            "convlora.inject(net)",
        ),
        Habit("ema = copy.deepcopy(model)", WORKS, "torch.equal(ema(images), model(images))"),
    ],
    "torchvision": [
        Habit(
            "convlora.inject(Net)",
            "TargetError",
            "model is the class Net; it must be a torch.nn.Module",
            "convlora.inject(Net())",
        ),
        Habit(
            "net.fc = nn.Linear(8, 5); convlora.inject(net)", WORKS, "convlora.summary(net).modules_to_save == ('fc',)"
        ),
        Habit(
            'model.fc = nn.Linear(8, 5); convlora.save_adapter(model, "x")',
            "StateError",
            "fc of Net was replaced after convlora.inject",
            "net.fc = nn.Linear(8, 5); convlora.inject(net)",
        ),
        Habit("net.requires_grad_(False); convlora.inject(net)", WORKS, "net.fc.weight.requires_grad"),
        Habit(
            "convlora.inject(net); torch.optim.SGD(net.fc.parameters(), lr=0.1)", WORKS, "net.fc.weight.requires_grad"
        ),
        Habit("isinstance(model.conv1, nn.Conv2d)", WORKS, "isinstance(model.conv1, nn.Conv2d)"),
    ],
    "torch": [
        Habit(
            "convlora.inject(nn.DataParallel(net))",
            "UnsupportedLayerError",
            "inject first, then wrap",
            "nn.DataParallel(convlora.inject(net))",
        ),
        Habit(
            "convlora.inject(torch.compile(net))",
            "UnsupportedLayerError",
            "inject first, then torch.compile",
            "torch.compile(convlora.inject(net))",
        ),
        Habit("convlora.inject(net.parameters())", "TargetError", "the network itself", "convlora.inject(net)"),
        Habit(
            "convlora.inject(nn.Sequential(nn.LazyConv2d(8, 3)))",
            "UnsupportedLayerError",
            "run one batch through the model",
        ),
        Habit(
            "convlora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))",
            "TargetError",
            "has no convolution. For linear layers name their type",
            "convlora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), target_modules=nn.Linear)",
        ),
        Habit("convlora.inject(net, device='cpu')", NO_NAME, "Leave it out", "convlora.inject(net).to('cpu')"),
        Habit(
            "optimizer = torch.optim.SGD(net.parameters(), lr=0.1); convlora.inject(net)\n"
            "net(images).sum().backward(); optimizer.step()",
            WARNS,
            "made before convlora.inject",
            OPTIMIZER,
        ),
        Habit(
            "torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])",
            WORKS,
            "model.fc.weight.requires_grad",
        ),
        Habit(
            "torch.optim.AdamW(convlora.trainable_parameters(net))",
            "StateError",
            "Net carries no adapter",
            OPTIMIZER,
        ),
        Habit(
            'model.requires_grad_(True); convlora.save_adapter(model, "x")',
            "StateError",
            "conv1.weight requires a gradient but belongs to the base",
            'convlora.inject(net, modules_to_save=["conv1", "fc"])',
        ),
        Habit(
            "model.requires_grad_(False); convlora.trainable_parameters(model)",
            WARNS,
            "its factors are frozen. Its requires_grad is False",
            OPTIMIZER,
        ),
        Habit("model.train()", WORKS, "not model.bn1.training", 'convlora.inject(net, norm="track")'),
        Habit(
            "convlora.merge(model); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
            "model(images).sum().backward(); optimizer.step()",
            WARNS,
            "convlora.unmerge(model) before you train",
            "convlora.unmerge(convlora.merge(model))",
        ),
        Habit("model.load_state_dict(model.state_dict())", WORKS, "torch.equal(model(images), model(images))"),
        Habit("model.load_state_dict(net.state_dict())", WORKS, "torch.equal(model.fc.weight, net.fc.weight)"),
        Habit(
            "net.load_state_dict(model.state_dict())",
            "RuntimeError",
            "Unexpected key(s) in state_dict",
            "net.load_state_dict(convlora.remove(convlora.merge(model)).state_dict())",
        ),
        Habit(
            'torch.save(model.state_dict(), "m.pt"); convlora.load_adapter(net, "m.pt")',
            "CheckpointError",
            "m.pt is a pickle",
            'convlora.save_adapter(model, "m"); convlora.load_adapter(net, "m")',
        ),
        Habit(
            'convlora.load_adapter(net, "adapter", map_location="cpu")',
            "TypeError",
            "Leave it out: factors go where their layers are",
            'convlora.load_adapter(net, "adapter").to("cpu")',
        ),
        Habit(
            'convlora.load_adapter(net, "adapter", strict=False)',
            "TypeError",
            "Leave it out: every tensor must fit; head=False leaves the head out",
            'convlora.load_adapter(net, "adapter", head=False)',
        ),
    ],
    "Lightning": [
        missing("model.freeze()", "convlora.inject(net)"),
        missing("model.unfreeze()", 'convlora.inject(net, modules_to_save=["layer1.*", "fc"])'),
        missing('model.load_from_checkpoint("x.ckpt")', 'convlora.load_adapter(net, "adapter")'),
        Habit(
            "torch.optim.AdamW(model.parameters(), lr=2e-3)",
            WORKS,
            "model.fc.weight.requires_grad and not model.bn1.weight.requires_grad",
        ),
    ],
    "Transformers": [
        missing('model.load_adapter("adapter")', 'convlora.load_adapter(net, "adapter")'),
        missing("model.enable_adapters()", 'convlora.set_adapter(model, "default")'),
        missing("model.disable_adapters()", "with convlora.disable_adapter(model): model(images)"),
        missing("model.active_adapters()", "convlora.summary(model).adapter_name"),
        missing("model.num_parameters(only_trainable=True)", "convlora.summary(model).trainable_parameters"),
        missing('model.push_to_hub("user/name")'),
    ],
    "fastai": [
        missing("model.freeze_to(-1)", 'convlora.inject(net, exclude_modules=["conv1"])'),
        Habit(
            "convlora.unfreeze(model)",
            "AttributeError",
            "Write modules_to_save=['layer4.*'] in convlora.inject",
            'convlora.inject(net, modules_to_save=["layer1.*", "fc"])',
        ),
        Habit(
            "convlora.inject(net, lr=1e-3)",
            NO_NAME,
            "convlora.parameter_groups(model, lr=...)",
            "torch.optim.AdamW(convlora.parameter_groups(model, lr=1e-3))",
        ),
        Habit(
            "convlora.parameter_groups(model, 1e-3)",
            "TypeError",
            "positional argument",
            "convlora.parameter_groups(model, lr=1e-3)",
        ),
        missing('model.export("x.pkl")', 'torch.save(convlora.remove(convlora.merge(model)).state_dict(), "x.pt")'),
    ],
    "Keras": [
        missing("model.summary()", "print(convlora.summary(model))"),
        missing("model.fit(images, labels)", OPTIMIZER),
        missing("model.predict(images)", "model.eval()(images)"),
        missing('model.save("x.keras")', 'convlora.save_adapter(model, "x")'),
        missing('model.load_weights("adapter")', 'convlora.load_adapter(net, "adapter")'),
        missing("model.trainable_weights", "list(convlora.trainable_parameters(model))"),
        missing("model.count_params()", "convlora.summary(model).trainable_parameters"),
        Habit("model.trainable = False", WORKS, "model.fc.weight.requires_grad", "model.requires_grad_(False)"),
        Habit("convlora.fit(model)", "AttributeError", "Write your own loop", OPTIMIZER),
    ],
}

HEAD = """\
# Calls by habit

What users of other libraries write by habit, what happens then, and what to write here. `net` is a plain network with
layers `conv1`, `bn1`, `layer1` (two blocks, each with `conv1` and `conv2`) and `fc`. `model` is such a network after
`convlora.inject(net, rank=2)` and some training; the directory `adapter` holds its adapter, made on the base `net`. The
tests run every row, and what it says to write. Where a call works, an expression follows that is true afterwards.

Nothing wraps your network, so it has no methods of ours. Where nothing follows a call, it ends in torch's own
AttributeError, and what you look for is a function, `convlora.…(model)`.
"""


def page() -> str:
    """The text of ``docs/habits.md``."""

    def code(text: str) -> str:
        return "<br>".join(f"`{line}`".replace("|", "\\|") for line in text.splitlines())

    def done(habit: Habit) -> str:
        says = code(habit.says) if habit.happens == WORKS else habit.says.replace("`", "").replace("*", "\\*")
        torchs = habit.says.startswith("'Net' object has no attribute")
        return code(habit.call) + ("" if torchs else f"<br>{habit.happens}: {says}")

    parts = [HEAD]
    for title, habits in HABITS.items():
        rows = "\n".join(f"| {done(habit)} | {code(habit.write)} |" for habit in habits)
        parts.append(f"## {title}\n\n| by habit, and what it says | write |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
