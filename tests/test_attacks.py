"""The attacks that ``tests/attacks.py`` measures get the answers that it says, and leave the model as it was."""

import attacks
import pytest
from conftest import snapshot

import convlora

LONG = {"peft: as many alphas as are parsed", "header of as many empty tensors as are parsed"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in attacks.ATTACKS]
)
def test_each_attack_gets_its_answer(tmp_path, name):
    attack, expected = attacks.ATTACKS[name]
    net, path = attacks.prepared(attack, tmp_path)
    before = snapshot(net)
    outcome, words = attacks.answer(net, path)
    assert outcome == expected, words
    if outcome == "read":
        convlora.remove(net)
    assert snapshot(net) == before
