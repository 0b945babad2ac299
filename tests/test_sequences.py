"""Random sequences of everything that can be done to adapters: what each of them predicts, and the base, stays.

One machine of hypothesis' draws the steps. It remembers each adapter's outputs as they were when it was last trained,
and asks for them again after every step.
"""

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from conftest import SmallNet, need
from laws import at_most, st

need("hypothesis")

from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

import convlora

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
OPTIONS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 4),
        "norm": st.sampled_from(["freeze", "track"]),
        "target_modules": st.sampled_from([None, "block.*", ("stem", "hidden"), ()]),
        "modules_to_save": st.sampled_from(["auto", ("block.3", "fc")]),
        "use_rslora": st.booleans(),
    }
)
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""fp32: a merged layer may take another kernel than an unmerged one, and routed samples W∗x + B(A∗x)."""


def outputs(model):
    """In eval mode, the modes kept."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        y = model.eval()(IMAGES)
    for module, mode in modes:
        module.training = mode
    return y


class Adapters(RuleBasedStateMachine):
    saved = Bundle("saved")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.count = 0

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(options=OPTIONS, seed=st.integers(0, 3))
    def inject(self, options, seed):
        torch.manual_seed(seed)
        self.base = SmallNet().eval()
        self.of_base = outputs(self.base)
        self.bits = {key: tensor.clone() for key, tensor in self.base.state_dict().items()}
        self.model = copy.deepcopy(self.base)
        name = self.new_name()
        convlora.inject(self.model, adapter_name=name, **options)
        self.expected = {name: self.of_base}
        self.active, self.merged = name, False

    def new_name(self):
        self.count += 1
        return f"a{self.count}"

    def chosen(self, index):
        return list(self.expected)[index % len(self.expected)]

    @precondition(lambda self: not self.merged and len(self.expected) < 4)
    @rule(options=OPTIONS)
    def add(self, options):
        name = self.new_name()
        convlora.add_adapter(self.model, name, **options)
        self.expected[name] = self.of_base

    @precondition(lambda self: not self.merged)
    @rule(index=st.integers(0, 3))
    def set(self, index):
        self.active = self.chosen(index)
        convlora.set_adapter(self.model, self.active)

    @precondition(lambda self: not self.merged)
    @rule(steps=st.integers(1, 2), momentum=st.sampled_from([0.0, 0.9]))
    def train(self, steps, momentum):
        self.model.train()
        optimizer = torch.optim.SGD(convlora.trainable_parameters(self.model), lr=0.02, momentum=momentum)
        for _ in range(steps):
            optimizer.zero_grad()
            (self.model(IMAGES) - 1).square().mean().backward()
            optimizer.step()
        before, self.expected[self.active] = self.expected[self.active], outputs(self.model)
        assert not torch.equal(before, self.expected[self.active])

    @precondition(lambda self: not self.merged)
    @rule()
    def forward_in_train_mode(self):
        """Moves the active adapter's statistics where it tracks them, and nothing else."""
        self.model.train()(IMAGES)
        self.expected[self.active] = outputs(self.model)

    @precondition(lambda self: not self.merged)
    @rule()
    def merge(self):
        convlora.merge(self.model)
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        convlora.unmerge(self.model)
        self.merged = False

    @precondition(lambda self: not self.merged)
    @rule(nested=st.booleans())
    def disable(self, nested):
        with convlora.disable_adapter(self.model):
            assert torch.equal(outputs(self.model), self.of_base)
            self.model.train()(IMAGES)
            if nested:
                with convlora.disable_adapter(self.model):
                    assert torch.equal(outputs(self.model), self.of_base)
            assert torch.equal(outputs(self.model), self.of_base)

    @precondition(lambda self: not self.merged)
    @rule(weights=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=4, max_size=4), owned=st.booleans())
    def several(self, weights, owned):
        """Several for a while, merged as unmerged, the order of no matter."""
        named = dict(zip(self.expected, weights, strict=False))
        owner = self.active if owned else None
        convlora.set_adapter(self.model, named, owner=owner)
        now = outputs(self.model)
        assert torch.equal(outputs(convlora.merge(self.model)), now)
        convlora.set_adapter(convlora.unmerge(self.model), dict(reversed(named.items())), owner=owner)
        assert torch.equal(outputs(self.model), now)
        convlora.set_adapter(self.model, self.active)

    @precondition(lambda self: not self.merged)
    @rule(interpolate=st.booleans())
    def scaled(self, interpolate):
        with convlora.scaled(self.model, 1), convlora.scaled(self.model, 0, interpolate=interpolate):
            assert not interpolate or torch.equal(outputs(self.model), self.of_base)

    @precondition(lambda self: not self.merged)
    @rule(index=st.integers(0, 3), scale=st.sampled_from([-0.5, 0.0, 2.0]))
    def set_scale(self, index, scale):
        name = self.chosen(index)
        convlora.set_scale(self.model, name, scale)
        convlora.set_scale(self.model, name, 1)

    @precondition(lambda self: not self.merged and len(self.expected) > 1)
    @rule(index=st.integers(0, 3))
    def delete(self, index):
        name = self.chosen(index)
        if name != self.active:
            convlora.delete_adapter(self.model, name)
            del self.expected[name]

    @rule(target=saved, index=st.integers(0, 3))
    def save(self, index):
        name = self.chosen(index)
        folder = self.folder / str(len(list(self.folder.iterdir())))
        if any(lora.lora_B.any() for lora in self.model._convlora.adapters[name].changes):
            convlora.save_adapter(self.model, folder, name)
            return folder, self.expected[name]
        return None, None  # nothing was trained, which the library warns of

    @rule(saved=saved)
    def load_into_a_fresh_base(self, saved):
        folder, expected = saved
        if folder:
            fresh = convlora.load_adapter(copy.deepcopy(self.base), folder)
            assert torch.equal(outputs(fresh), expected)
            assert torch.equal(outputs(convlora.remove(fresh)), self.of_base)

    @precondition(lambda self: not self.merged and len(self.expected) < 4)
    @rule(saved=consumes(saved))
    def load_beside(self, saved):
        folder, expected = saved
        if folder:
            name = self.new_name()
            convlora.load_adapter(self.model, folder, name)
            self.expected[name] = expected

    @precondition(lambda self: not self.merged)
    @rule(indices=st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=4, max_size=4), inner=st.booleans())
    def use(self, indices, inner):
        names = [None if index is None else self.chosen(index) for index in indices]
        expected = torch.stack([(self.expected | {None: self.of_base})[name][row] for row, name in enumerate(names)])
        with convlora.use_adapters(self.model, names):
            torch.testing.assert_close(outputs(self.model), expected, **ROUNDING)
            if inner:
                with convlora.use_adapters(self.model, [None] * 4):
                    torch.testing.assert_close(outputs(self.model), self.of_base, **ROUNDING)

    @rule(forget=st.booleans())
    def copied(self, forget):
        """The copy goes on in the model's place, or is taken apart to no effect on it."""
        twin = copy.deepcopy(self.model)
        if forget:
            convlora.remove(convlora.unmerge(twin) if self.merged else twin)
            assert torch.equal(outputs(twin), self.of_base)
        else:
            self.model = twin

    @invariant()
    def the_active_adapter_predicts_what_it_did(self):
        now = outputs(self.model)
        if self.merged:
            torch.testing.assert_close(now, self.expected[self.active], **ROUNDING)
        else:
            assert torch.equal(now, self.expected[self.active])

    @invariant()
    def every_adapter_and_the_base_are_what_they_were(self):
        """Asked of a copy, so that asking does not switch what the steps go on with."""
        twin = copy.deepcopy(self.model)
        if self.merged:
            convlora.unmerge(twin)
        for name, expected in self.expected.items():
            convlora.set_adapter(twin, name)
            assert torch.equal(outputs(twin), expected), name
        convlora.remove(twin)
        state = twin.state_dict()
        assert state.keys() == self.bits.keys()
        assert all(torch.equal(state[key], bits) for key, bits in self.bits.items())
        assert [type(module) for module in twin.modules()] == [type(module) for module in self.base.modules()]


TestAdapters = Adapters.TestCase
TestAdapters.settings = at_most(25, stateful_step_count=20)
