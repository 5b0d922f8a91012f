"""A dict in many parts does as a dict does, and is emptied part by part."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quotalimit.stores.sharded_dict import ShardedDict

KEYS = st.integers(-200, 200) | st.text(max_size=1)
FEW = st.sampled_from([-100, 0, 1, 64, 65, 200, "a", "b"])
STEPS = st.lists(st.tuples(st.sampled_from(["set", "default", "pop", "delete"]), FEW, st.integers(1, 9)), max_size=60)


@given(STEPS)
def test_it_does_as_a_dict_does(steps: list[tuple[str, Any, int]]) -> None:
    sharded: ShardedDict[Any, int] = ShardedDict()
    plain: dict[Any, int] = {}
    for step, key, value in steps:
        if step == "set":
            sharded[key] = plain[key] = value
        elif step == "default":
            assert sharded.setdefault(key, value) == plain.setdefault(key, value)
        elif step == "pop":
            assert sharded.pop(key, None) == plain.pop(key, None)
        elif key in plain:
            del sharded[key], plain[key]
        assert sharded.get(key) == plain.get(key)
        assert (len(sharded), bool(sharded)) == (len(plain), bool(plain))


@given(st.dictionaries(KEYS, st.integers(), max_size=300))
def test_it_is_emptied_by_its_parts(items: dict[Any, int]) -> None:
    sharded: ShardedDict[Any, int] = ShardedDict()
    for key, value in items.items():
        sharded[key] = value
    taken = []
    while sharded:
        part = sharded.some()
        taken.append(part.popitem())
    assert sorted(taken, key=repr) == sorted(items.items(), key=repr)
    assert not sharded.some()
