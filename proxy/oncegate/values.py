"""What values are made of that each request makes a dozen of, such as a claim and a report."""

from dataclasses import make_dataclass

from msgspec import Struct


class Value(Struct):
    """What `@dataclass(slots=True)` makes, but made in C: an instance costs a third (Python 3.11, counted).

    `dataclasses.replace` takes it, too. A class derived from it has all of its fields itself.
    """

    def __init_subclass__(cls) -> None:
        # Of another class: this one is not whole yet, and must not be looked at.
        fields = make_dataclass(cls.__name__, cls.__annotations__.items(), namespace={"__doc__": "fields"})
        setattr(cls, "__dataclass_fields__", getattr(fields, "__dataclass_fields__"))  # noqa: B009, B010  # for mypy


class Opaque(Value, eq=False):
    """A Value that equals itself alone. As text it shows nothing of what a client sent: that could get into a log."""

    __repr__ = object.__repr__
