"""Settings: overriding them, and their JSON form."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from plait.config import from_json, override, to_json
from plait.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Named:
    name: str


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int = 10
    half: int = 5
    fast: bool = False
    kind: Literal["plain", "fancy"] = "plain"
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.half * 2 > self.steps:
            raise ConfigError("half is more than half of steps")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=1_000", Outer(steps=1000)),
        ("fast=true", Outer(fast=True)),
        ("kind=fancy", Outer(kind="fancy")),
        ("limit=7", Outer(limit=7)),
        ("inner.rate=3e-4", Outer(inner=Inner(rate=3e-4))),
        ("inner.rate=2", Outer(inner=Inner(rate=2.0))),
        ("inner.names=.py, .txt", Outer(inner=Inner(names=(".py", ".txt")))),
        ("inner.names=a=b", Outer(inner=Inner(names=("a=b",)))),
    ],
)
def test_an_assignment_sets_a_typed_field(assignment, expected):
    assert override(Outer(), [assignment]) == expected


def test_a_text_keeps_its_spaces():
    assert override(Named(name="x"), ["name= a b "]) == Named(name=" a b ")


def test_a_missing_required_key_is_named():
    with pytest.raises(ConfigError, match="Named lacks name"):
        from_json(Named, {})


def test_none_clears_an_optional_field():
    assert override(Outer(limit=3), ["limit=none"]) == Outer()


def test_assignments_are_checked_together_whatever_their_order():
    assert override(Outer(), ["half=20", "steps=40"]) == Outer(half=20, steps=40)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stesp=3", "the job has no 'stesp'. Did you mean 'steps'"),
        ("inner.rat=3", "inner has no 'rat'. Did you mean 'rate'"),
        ("steps=many", "steps='many' is not a whole number"),
        ("steps=1.5", "steps='1.5' is not a whole number"),
        ("fast=yes", "fast='yes' is not true or false"),
        ("kind=fanci", "Did you mean 'fancy'"),
        ("steps.x=1", "steps is a single value"),
        ("inner=3", "is a group of settings. Set one of its fields: inner.rate, inner.names"),
        ("steps", "is not of the form path.to.field=value"),
        ("inner.rate=nan", "inner.rate='nan' is not a finite number"),
        ("=3", "is not of the form path.to.field=value"),
        ("half=6", "half is more than half of steps"),
    ],
)
def test_a_wrong_assignment_is_refused_with_a_hint(assignment, message):
    with pytest.raises(ConfigError) as caught:
        override(Outer(), [assignment])
    assert message in str(caught.value)


def test_json_form_comes_back_unchanged():
    settings = Outer(steps=99, limit=1, inner=Inner(names=("a", "b")))
    assert from_json(Outer, to_json(settings)) == settings


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 1}, "unknown key 'stepz'. Did you mean 'steps'"),
        ({"steps": "1"}, "steps='1' is not a whole number"),
        ({"fast": 1}, "fast=1 is not true or false"),
        ({"inner": 1}, "inner=1 is a group of settings"),
        ({"inner": {"names": "a"}}, "inner.names='a' is not a list"),
        ({"kind": "odd"}, "Known: fancy, plain"),
    ],
)
def test_malformed_json_is_refused_naming_the_field(data, message):
    with pytest.raises(ConfigError) as caught:
        from_json(Outer, data)
    assert message in str(caught.value)


def test_a_group_that_may_be_absent_is_set_by_field_where_it_is_there():
    from plait.recipes.pretrain import find_pretrain_recipe

    job = override(find_pretrain_recipe("llama3_8b"), ["model.num_layers=4", "plan.tp=2"])
    assert (job.model.num_layers, job.plan.tp) == (4, 2)
    with pytest.raises(ConfigError, match="Did you mean"):
        override(job, ["plan.recompute=ful"])
