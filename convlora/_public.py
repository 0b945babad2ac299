"""The public names. ``convlora`` imports them at the first use of one, so that the command's help needs no torch."""

from ._algebra.approximation import Approximation
from ._algebra.combine import combine_adapters
from ._algebra.extract import extract
from ._algebra.shrink import shrink
from ._checkpoint.exporting import export_adapter
from ._checkpoint.loading import load_adapter
from ._checkpoint.push import push_to_hub
from ._checkpoint.saving import save_adapter
from ._checkpoint.swapping import hotswap_adapter
from ._layer.adapted import base_weight
from ._layer.change import Change
from ._methods.registry import register_method
from ._model.adapters import add_adapter, delete_adapter, disable_adapter, scaled, set_adapter, set_scale
from ._model.budget import sensitivity
from ._model.hotswap import prepare_for_hotswap
from ._model.inject import inject
from ._model.integrity import Finding, adopt, check
from ._model.memory import KeptBytes, SavedBytes, saved_bytes
from ._model.merge import merge, unmerge
from ._model.planner import plan
from ._model.remove import remove
from ._model.summary import adapter_parameters, parameter_groups, summary, trainable_parameters
from ._model.use import use_adapters
from ._plan import LayerPlan, Plan
from .errors import CheckpointError, ConvLoraError, StateError, TargetError, UnsupportedLayerError

__all__ = [
    "Approximation",
    "Change",
    "CheckpointError",
    "ConvLoraError",
    "Finding",
    "KeptBytes",
    "LayerPlan",
    "Plan",
    "SavedBytes",
    "StateError",
    "TargetError",
    "UnsupportedLayerError",
    "adapter_parameters",
    "add_adapter",
    "adopt",
    "base_weight",
    "check",
    "combine_adapters",
    "delete_adapter",
    "disable_adapter",
    "export_adapter",
    "extract",
    "hotswap_adapter",
    "inject",
    "load_adapter",
    "merge",
    "parameter_groups",
    "plan",
    "prepare_for_hotswap",
    "push_to_hub",
    "register_method",
    "remove",
    "save_adapter",
    "saved_bytes",
    "scaled",
    "sensitivity",
    "set_adapter",
    "set_scale",
    "shrink",
    "summary",
    "trainable_parameters",
    "unmerge",
    "use_adapters",
]
