"""A user's program as mypy sees it; never run. The last lines must be errors."""

from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import convlora

net = nn.Sequential(nn.Conv2d(3, 8, 3))
assert_type(convlora.inject(net, rank=4, norm="track", init="orthogonal", budget="1%"), nn.Sequential)
assert_type(convlora.plan(net, target_modules=["0", nn.Conv2d], rank_pattern={"0": 2}), convlora.Plan)
assert_type(convlora.plan(net).layers[0].weight_shape, tuple[int, ...])
assert_type(convlora.summary(net).trainable_share, float)
assert_type(list(convlora.trainable_parameters(net)), list[nn.Parameter])
assert_type(convlora.merge(net), nn.Sequential)
assert_type(convlora.remove(convlora.unmerge(net)), nn.Sequential)
assert_type(convlora.load_adapter(net, Path("tumour")), nn.Sequential)
assert_type(convlora.save_adapter(net, "tumour", metrics={"accuracy": 0.9}), Path)
assert_type(convlora.shrink(net, energy=0.9).error, float)
assert_type(convlora.base_weight(net[0]), nn.Parameter)
with convlora.disable_adapter(net), convlora.use_adapters(net, ["a", None]), torch.no_grad():
    pass
try:
    convlora.set_adapter(net, "a")
except convlora.StateError as error:
    assert_type(str(error), str)

convlora.inject(net, rank="4")  # type: ignore[arg-type]
convlora.inject(net, norm="melt")  # type: ignore[arg-type]
convlora.inject(net, ranks=4)  # type: ignore[call-arg]
convlora.inject("resnet50")  # type: ignore[type-var]
