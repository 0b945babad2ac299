"""What convlora raises. Every kind is a :class:`ValueError`, names the layer and the value, and says the remedy."""


class ConvLoraError(ValueError):
    """The kind that all errors of convlora share."""


class TargetError(ConvLoraError):
    """A pattern, rank or other argument does not fit the model. Nothing was changed."""


class UnsupportedLayerError(ConvLoraError):
    """A layer or a wrapper cannot carry an adapter. Nothing was changed."""


class StateError(ConvLoraError):
    """The call does not fit the state of the model: injected or not, merged or not. Nothing was changed."""


class CheckpointError(ConvLoraError):
    """An adapter's file is missing, damaged, or made for another base model. Nothing was changed."""
