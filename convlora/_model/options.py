"""The options of ``inject``: each with its default, and the checks that need no model.

Patterns that match no layer, and layers that an option does not suit, are found when the model is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypedDict, TypeVar

import torch

from .._layer.adapted import LayerAdapters
from .._layer.change import Option
from .._layer.masked import Masks
from .._layer.paths import PATHS, TrainingPath
from .._methods.lora import LoRA
from .._methods.registry import METHODS, check_options, method_for, named_methods
from .._plan import INITS, NORM_POLICIES, Init, NormPolicy
from ..errors import TargetError
from .targets import Targets

Pattern = str | re.Pattern[str]
Budget = str | float
P = ParamSpec("P")
R = TypeVar("R")
DEFAULT_RANK = 8
MORE_THAN_ANY = 2**31
LARGEST_ALPHA = torch.finfo(torch.float32).max


class Options(TypedDict, total=False):
    """The optional arguments of :func:`convlora.inject`, which explains them; for type checkers."""

    alpha: float | None
    target_modules: Targets
    exclude_modules: Targets
    rank_pattern: Mapping[Pattern, int] | None
    alpha_pattern: Mapping[Pattern, float] | None
    modules_to_save: Targets
    norm: NormPolicy
    dropout: float
    use_rslora: bool
    use_dora: bool
    freeze_A: bool
    method: str
    method_pattern: Mapping[Pattern, str] | None
    method_options: Mapping[str, Option] | None
    init: Init | None
    init_data: Iterable[Any] | None
    budget: Budget | None
    importance: Mapping[str, float] | None
    example: Any
    training_path: TrainingPath
    mask_activations: Masks


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`convlora.inject`, which explains them, for one adapter.

    Raises:
        TargetError: an option is out of range.
    """

    rank: int | None = None
    alpha: float | None = None
    target_modules: Targets = None
    exclude_modules: Targets = None
    rank_pattern: Mapping[Pattern, int] | None = None
    alpha_pattern: Mapping[Pattern, float] | None = None
    modules_to_save: Targets = "auto"
    norm: NormPolicy = "freeze"
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    freeze_A: bool = False
    method: str = "lora"
    method_pattern: Mapping[Pattern, str] | None = None
    method_options: Mapping[str, Option] | None = None
    init: Init | None = None
    init_data: Iterable[Any] | None = None
    budget: Budget | None = None
    importance: Mapping[str, float] | None = None
    example: Any = None
    training_path: TrainingPath = "auto"
    mask_activations: Masks = False
    adapter_name: str = "default"

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """Return a request from the ``locals()`` of a function that has these arguments, or from a plan's fields."""
        return cls(**{each.name: arguments[each.name] for each in fields(cls) if each.name in arguments})

    @classmethod
    def named(cls, function: str, **options: Any) -> Request:
        """Return a request from a function's keyword arguments; an unknown one raises that function's TypeError."""
        unknown = [name for name in options if name not in cls.__dataclass_fields__]
        if unknown:
            raise TypeError(_unknown(function, unknown[0]))
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "method_pattern", "method_options", "importance"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise TargetError(f"{name}={value!r}; it must be a dict. Nothing was changed.")
        if self.rank is not None:
            checked_rank(self.rank, "rank")
        if self.alpha is not None:
            check_alpha(self.alpha, "alpha")
        check_among(NORM_POLICIES, self.norm, "norm")
        check_among(PATHS, self.training_path, "training_path")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise TargetError(f"dropout={self.dropout!r}; it must be at least 0 and below 1.")
        check_name(self.adapter_name)
        check_among(INITS, self.beginning, "init")
        if self.init_data is not None and not hasattr(self.init_data, "__iter__"):
            raise TargetError(
                f"init_data={self.init_data!r}; it must be batches: a DataLoader or a list. Nothing was changed."
            )
        if option := NO_METHODS.get(str(self.method)):
            raise TargetError(f"method={self.method!r} has another name here: write {option}. Nothing was changed.")
        check_among(named_methods(), self.method, "method")
        method_for(self.method, self.beginning)
        check_options(self.method, self.method_options or {})
        for name in ("use_rslora", "use_dora", "freeze_A"):
            if not isinstance(getattr(self, name), bool):
                raise TargetError(f"{name}={getattr(self, name)!r}; it must be true or false.")
        if not isinstance(self.mask_activations, bool) and self.mask_activations != "bits":
            raise TargetError(f"mask_activations={self.mask_activations!r}; it must be true, false or 'bits'.")
        if self.freeze_A and not issubclass(METHODS[self.method], LoRA):
            raise TargetError(
                f"freeze_A=True; method={self.method!r} has no lora_A. Use method='lora', or leave freeze_A out. "
                "Nothing was changed."
            )
        if self.budget is not None:
            numbers_in(self.budget, 1)
        elif self.importance is not None:
            raise TargetError("importance needs a budget to distribute; give budget='1%' too. Nothing was changed.")

    @property
    def beginning(self) -> Init:
        """The initialisation: ``init``; or else ``"eva"`` with ``init_data`` and ``"kaiming"`` without."""
        return self.init if self.init is not None else "kaiming" if self.init_data is None else "eva"

    @property
    def largest_rank(self) -> int:
        """The rank of layers that no pattern names; with a budget, their largest rank."""
        if self.rank is not None:
            return int(self.rank)
        return DEFAULT_RANK if self.budget is None else MORE_THAN_ANY

    def alpha_at(self, rank: int) -> float:
        """Return alpha at this rank; by default twice the rank, so that all ranks have the same scaling."""
        return float(2 * rank if self.alpha is None else self.alpha)


NO_METHODS = {"dora": "use_dora=True", "rslora": "use_rslora=True", "pissa": "init='pissa'", "locon": "method='lora'"}
"""Names that are methods elsewhere, and what to write for them here."""

THEIRS = {
    **dict.fromkeys(
        ("r", "lora_r", "lora_rank", "lora_dim", "network_dim", "dim", "conv_dim"), "Its name here is rank."
    ),
    **dict.fromkeys(("lora_alpha", "network_alpha", "conv_alpha"), "Its name here is alpha."),
    **dict.fromkeys(("lora_dropout", "network_dropout"), "Its name here is dropout."),
    **dict.fromkeys(("init_lora_weights", "init_weights"), "Its name here is init."),
    **dict.fromkeys(("target_layers", "target_names", "preset"), "Its name here is target_modules."),
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), "Write target_modules=['layer1.0.*'], say."),
    **dict.fromkeys(("config", "peft_config"), "Give the options themselves: rank=8, say."),
    **dict.fromkeys(("block_size", "factor"), "Options of a method go into method_options={...}."),
    **dict.fromkeys(("freeze_bn", "train_bn"), "Write norm='freeze' or norm='track'."),
    **dict.fromkeys(
        ("device", "dtype", "map_location", "torch_device"),
        "Leave it out: factors go where their layers are; move the model.",
    ),
    **dict.fromkeys(("num_classes", "pretrained"), "Build the network with it, then inject."),
    "multiplier": "Write convlora.set_scale(model, name, scale) afterwards.",
    **dict.fromkeys(("peft_type", "algo"), "Its name here is method."),
    **dict.fromkeys(("task_type", "inference_mode", "fan_in_fan_out", "is_trainable"), "Leave it out."),
    "strict": "Leave it out: every tensor must fit; head=False leaves the head out.",
    "bias": "Leave it out: biases are frozen, as with peft's bias='none', but for those of modules_to_save.",
    "lr": "A learning rate belongs to the optimizer: convlora.parameter_groups(model, lr=...).",
}
"""The remedy for each argument that peft, LyCORIS or kohya's scripts have and convlora does not."""


def in_our_words(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with an error that says what to write for another library's argument."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if wrong := next((name for name in kwargs if name in THEIRS), None):
            raise TypeError(_unknown(function.__name__, wrong))
        return function(*args, **kwargs)

    return called


def _unknown(function: str, name: str) -> str:
    return f"{function}() got an unexpected keyword argument {name!r}. {THEIRS.get(name, '')}".removesuffix(". ")


def check_among(known: tuple[str, ...], value: object, argument: str) -> None:
    """Raise TargetError unless the value is one of the known values."""
    if value not in known:
        listed = ", ".join(map(repr, known))
        wanted = f"one of {listed}" if len(known) > 2 else listed.replace(", ", " or ")
        raise TargetError(f"{argument}={value!r}; it must be {wanted}.")


def checked_rank(rank: int, argument: str) -> int:
    """Return the rank; raise TargetError unless it is a whole number of at least 1."""
    if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1:
        raise TargetError(
            f"{argument}={rank!r}; a rank is a whole number of at least 1. To skip a layer, use exclude_modules; to "
            "train only the head, target_modules=()."
        )
    return int(rank)


def check_alpha(alpha: float, argument: str) -> None:
    """Raise TargetError unless this is a number above 0 that is finite in fp32: torch refuses to multiply by others."""
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 < alpha <= LARGEST_ALPHA:
        raise TargetError(f"{argument}={alpha!r}; it must be a finite number above 0.")


def check_number(number: float, argument: str) -> None:
    """Raise TargetError unless this is a number that is finite in fp32."""
    if not isinstance(number, Real) or isinstance(number, bool) or not -LARGEST_ALPHA <= number <= LARGEST_ALPHA:
        raise TargetError(f"{argument}={number!r}; it must be a finite number. Nothing was changed.")


def check_name(adapter_name: str) -> None:
    """Raise TargetError unless this is a printable name that a state dict and torch's ModuleDict can hold."""
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise TargetError(f"adapter_name={adapter_name!r}; it must be a name without a dot.")
    if not adapter_name.isprintable():
        raise TargetError(f"adapter_name={adapter_name!r} holds characters that cannot be printed; choose another.")
    if hasattr(LayerAdapters(), adapter_name):
        raise TargetError(f"adapter_name={adapter_name!r} is an attribute of torch's ModuleDict; choose another.")


def numbers_in(budget: Budget, base_parameters: int) -> int:
    """Return how many trainable parameters a budget allows.

    >>> numbers_in("1%", 1_000_000), numbers_in(0.01, 1_000_000), numbers_in(10_000, 1_000_000)
    (10000, 10000, 10000)

    Args:
        budget: a share of ``base_parameters``, ``"1%"`` or 0.01, or a number of parameters.
        base_parameters: the number of the base's parameters.

    Raises:
        TargetError: the budget is neither a share nor a number.
    """
    share: float | None = None
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", budget)
        share = float(found[1]) / 100 if found else None
    elif isinstance(budget, Integral) and not isinstance(budget, bool):
        if budget >= 1:
            return int(budget)
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        share = float(budget)
    if share is None or not 0 < share <= 1:
        raise TargetError(
            f"budget={budget!r}; it must be a share of the base's parameters ('1%', or 0.01) or a whole number of "
            "parameters. Nothing was changed."
        )
    return int(share * base_parameters)
