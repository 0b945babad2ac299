"""LoRA adapters for the convolutions of any PyTorch network: inject, train, merge, save."""

from ._adapters import add_adapter, delete_adapter, disable_adapter, set_adapter
from ._algebra import Approximation, extract, shrink
from ._budget import sensitivity
from ._checkpoint import load_adapter, save_adapter
from ._combine import combine_adapters
from ._inject import adapter_parameters, inject, remove, summary, trainable_parameters
from ._layer import base_weight
from ._merge import merge, unmerge
from ._plan import LayerPlan, Plan
from ._planner import plan
from ._push import push_to_hub
from ._use import use_adapters
from ._version import __version__ as __version__
from .errors import CheckpointError, ConvLoraError, StateError, TargetError, UnsupportedLayerError

__all__ = [
    "Approximation",
    "CheckpointError",
    "ConvLoraError",
    "LayerPlan",
    "Plan",
    "StateError",
    "TargetError",
    "UnsupportedLayerError",
    "adapter_parameters",
    "add_adapter",
    "base_weight",
    "combine_adapters",
    "delete_adapter",
    "disable_adapter",
    "extract",
    "inject",
    "load_adapter",
    "merge",
    "plan",
    "push_to_hub",
    "remove",
    "save_adapter",
    "sensitivity",
    "set_adapter",
    "shrink",
    "summary",
    "trainable_parameters",
    "unmerge",
    "use_adapters",
]
