"""The order in which the addresses of a name are tried."""

from collections import Counter

import pytest

from oncegate.hostnames.system import AddressInfo
from oncegate.upstream.rotation import AVOID_S, Rotation
from tests.name_server import info


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def addresses(order: list[AddressInfo]) -> list[str]:
    return [one[4][0] for one in order]


FOUR = [info(f"192.0.2.{number}") for number in range(1, 5)]


def test_each_address_is_first_as_often(clock):
    """Turn by turn another one is first, and each order has all of them once."""
    rotation = Rotation(clock)
    orders = [addresses(rotation.order(FOUR)) for _ in range(12)]
    assert set(Counter(order[0] for order in orders).values()) == {3}
    assert all(sorted(order) == addresses(FOUR) for order in orders)


def test_the_preferred_family_is_first_and_the_other_next(clock):
    """New connections take turns within the family that the system prefers; the other one is close behind."""
    rotation = Rotation(clock)
    mixed = [info("2001:db8::1"), info("2001:db8::2"), *FOUR[:2]]
    firsts = set()
    for _ in range(4):
        order = addresses(rotation.order(mixed))
        assert [":" in one for one in order] == [True, False, True, False]
        firsts.add(order[0])
    assert firsts == {"2001:db8::1", "2001:db8::2"}


def test_what_failed_is_last_for_a_while_and_its_turn_goes_to_all(clock):
    """The others share what it would have got, and after a while it is one of them again."""
    rotation = Rotation(clock)
    rotation.note_failed("192.0.2.2")
    orders = [addresses(rotation.order(FOUR)) for _ in range(9)]
    assert {order[-1] for order in orders} == {"192.0.2.2"}
    assert Counter(order[0] for order in orders) == {"192.0.2.1": 3, "192.0.2.3": 3, "192.0.2.4": 3}
    clock.now_s += AVOID_S
    assert "192.0.2.2" in {addresses(rotation.order(FOUR))[0] for _ in range(4)}


def test_all_that_failed_are_still_tried(clock):
    """Without any other address those that failed are tried as the system has them."""
    rotation = Rotation(clock)
    for one in FOUR:
        rotation.note_failed(one[4][0])
    assert addresses(rotation.order(FOUR)) == addresses(FOUR)


def test_those_before_the_one_that_was_reached_have_failed(clock):
    """What was tried in vain, or was too slow, is avoided; what was reached is not, whatever it did before."""
    rotation = Rotation(clock)
    rotation.note_failed("192.0.2.3")
    rotation.note_reached(FOUR, "192.0.2.3")
    for _ in range(4):
        order = addresses(rotation.order(FOUR))
        assert order[0] in ("192.0.2.3", "192.0.2.4")
        assert order[2:] == ["192.0.2.1", "192.0.2.2"]


def test_one_address_is_all_there_is(clock):
    """A name with one address has one order."""
    assert Rotation(clock).order(FOUR[:1]) == FOUR[:1]
