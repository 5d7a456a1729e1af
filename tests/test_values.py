"""What a Value has of a dataclass with slots."""

import copy
import pickle
import sys
from dataclasses import Field, fields, replace

import pytest

from oncegate.downstream.body import Body, BufferedBody
from oncegate.downstream.request import Request
from oncegate.downstream.response import ResponseWriter
from oncegate.gateway.handler import Gateway
from oncegate.values import Opaque, Value


class Point(Value):
    x: int
    y: int = 0
    seen: tuple[str, ...] = ()


class Place(Value, eq=False):
    x: int


def test_values_are_made_compared_and_shown_as_those_of_a_dataclass():
    """By position or by name, with defaults."""
    assert Point(1, 2) == Point(1, y=2) != Point(1)
    assert repr(Point(1)) == "Point(x=1, y=0, seen=())"
    assert Place(1) != Place(1)
    with pytest.raises(TypeError):
        Point()
    with pytest.raises(TypeError):
        Point(1, z=1)


def test_a_value_has_no_other_attributes():
    """A name that is misspelled is an error."""
    point = Point(1)
    point.y = 3
    assert point.y == 3
    with pytest.raises(AttributeError):
        point.z = 3  # type: ignore[attr-defined]


def test_a_changed_copy_is_another_value():
    """Of `dataclasses.replace`, which knows its fields."""
    point = Point(1, 2)
    assert (replace(point, y=5), point) == (Point(1, 5), Point(1, 2))
    assert [field.name for field in fields(Point)] == ["x", "y", "seen"]
    with pytest.raises(TypeError):
        replace(point, z=1)
    assert copy.copy(point) == point == pickle.loads(pickle.dumps(point))


def test_a_value_is_matched_by_its_class_and_its_fields():
    """Never by position."""
    match Point(1, 2):
        case Place() | Point(x=3):
            raise AssertionError
        case Point(x=1, y=two):
            assert two == 2


class Secret(Opaque):
    text: str


def test_what_is_opaque_shows_nothing_and_equals_itself_alone():
    """Requests and their bodies are: what a client sent must not get into a log by way of an object's text."""
    one, other = Secret("sesame"), Secret("sesame")
    assert "sesame" not in f"{one} {one!r} {[one]}"
    assert one == one != other
    assert len({one, other}) == 2
    assert replace(one, text="x").text == "x"
    assert all(issubclass(kind, Opaque) for kind in (Body, BufferedBody, Request, ResponseWriter))


def test_no_default_is_a_field_of_a_dataclass():
    """It would be the value itself."""
    assert Gateway.__module__ in sys.modules  # with all that it imports
    kinds, values = [Value], []
    while kinds:
        kinds += (kind := kinds.pop()).__subclasses__()
        values += kind.__struct_defaults__
    assert values
    assert not [value for value in values if isinstance(value, Field)]
