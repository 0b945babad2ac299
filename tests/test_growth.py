"""No public call costs more than in proportion to the model's adapters and layers, as calls of functions are counted.

The calls are those of ``benchmarks/growth.py``, which times them: every public function is among them, or says why not.
"""

import gc
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import need

from benchmarks import growth

need("peft")


def function_calls(case, subject):
    """How many functions a call calls, Python's and C's; the second time, since the first fills caches."""
    case.before(subject)
    case.call(subject)
    case.after(subject)
    case.before(subject)
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(note)
    try:
        case.call(subject)
    finally:
        sys.setprofile(None)
        gc.enable()
    case.after(subject)
    return count


@pytest.mark.parametrize("axis, sizes", [("adapters", (2, 4, 8)), ("layers", (3, 6, 12))])
def test_no_public_call_grows_faster_than_adapters_or_layers(axis, sizes):
    """Where a cost is a + b · n, twice the step adds twice as much: exactly, since nothing but calls is counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = growth.measured(axis, sizes, growth.CASES, function_calls)
    steps = {name: (second - first, third - second) for name, (first, second, third) in found.items()}
    # 5 %: numbers of more digits, and sorting
    assert {name: step for name, step in steps.items() if step[1] > 2.1 * max(step[0], 0) + 10} == {}


def test_every_public_function_is_timed_or_named():
    lines = Path(__file__).with_name("api.txt").read_text(encoding="utf-8").splitlines()
    heads = [line.split("(")[0].split(".")[-1] for line in lines if line.startswith("convlora.") and "(" in line]
    functions = {name for name in heads if name[0].islower()}
    assert len(functions) > 20
    named = {case.split(",")[0] for case in growth.CASES} | growth.ELSEWHERE.keys()
    assert functions - named == set()


def test_the_benchmark_prints_a_line_for_each_call(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests go on with theirs
    growth.main(["--only", "merge", "--adapters", "2", "4", "--layers", "2", "4", "--times", "1"])
    printed = capsys.readouterr().out
    assert printed.count("| merge |") == 2 and "Faster than layers grow:" in printed
