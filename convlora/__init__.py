"""LoRA adapters for the convolutions of any PyTorch network: inject, train, merge, save."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from ._public import *  # noqa: F403
    from ._public import __all__ as __all__

THEIRS = {
    "get_peft_model": "convlora.inject(model, rank=8), which changes the model itself and gives it back",
    **dict.fromkeys(("LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig"), "the arguments of convlora.inject"),
    **dict.fromkeys(
        ("create_lycoris", "LycorisNetwork", "inject_adapter_in_model", "Conv2d", "Linear"),
        "convlora.inject(model, rank=8)",
    ),
    "freeze": "convlora.inject(model, rank=8), which freezes the base",
    "unfreeze": "modules_to_save=['layer4.*'] in convlora.inject, to train modules in full",
    **dict.fromkeys(("fit", "train"), "your own loop, over convlora.trainable_parameters(model)"),
    "PeftModel": "your own model: nothing wraps it",
    **dict.fromkeys(
        ("from_pretrained", "load", "set_peft_model_state_dict"), "convlora.load_adapter(model, directory)"
    ),
    **dict.fromkeys(
        ("save_pretrained", "save", "lora_state_dict", "get_peft_model_state_dict"),
        "convlora.save_adapter(model, directory)",
    ),
    **dict.fromkeys(("print_trainable_parameters", "count_parameters"), "print(convlora.summary(model))"),
    "mark_only_lora_as_trainable": "convlora.inject(model, rank=8), which freezes the base",
    "merge_and_unload": "convlora.remove(convlora.merge(model))",
    **dict.fromkeys(("unload", "get_base_model"), "convlora.remove(model)"),
    "merge_adapter": "convlora.merge(model)",
}
"""What to write for a name that another library has, or that one tries by habit."""


def __getattr__(name: str) -> Any:
    """A public name, at the first of which torch is imported."""
    if name == "__all__" or not name.startswith("_"):
        public = import_module("._public", __name__)
        if name == "__all__" or name in public.__all__:
            globals().update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
            return globals()[name]
    remedy = f" Write {THEIRS[name]}." if name in THEIRS else ""
    raise AttributeError(f"module 'convlora' has no attribute {name!r}.{remedy}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("._public", __name__).__all__})
