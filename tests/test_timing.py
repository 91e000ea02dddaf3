"""The timer: what is called when, and what counts."""

import pytest

from neumeta_jax.evaluation import timing


def test_each_function_is_called_once_in_every_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.in_turns(calls, 20, warm_up=3)
    assert order[:9] == [*"aaabbbccc"]
    rounds = [order[n : n + 3] for n in range(9, 69, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2  # not always in the same order
    assert {name: len(found) for name, found in times.items()} == {"a": 20, "b": 20, "c": 20}


def test_rounds_go_on_until_they_have_taken_as_long_as_asked_for(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = {"a": lambda: None, "b": lambda: None}
    assert timing.in_turns(calls, 1, seconds=5) == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_function_counts_with_its_fewest_seconds(monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 21.0, 30.0, 35.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.fewest({"a": lambda: None}, 3) == {"a": 1.0}


def test_a_program_is_compiled_for_its_arguments():
    seconds, program = timing.compiled(lambda x: x + 1, 2.0)
    assert seconds > 0 and float(program(2.0)) == 3
    with pytest.raises(TypeError):
        program(2)
