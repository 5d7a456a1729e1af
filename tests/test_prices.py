"""What an LLM's tokens cost, as a rule has it."""

import pytest

from oncegate.rules.prices import parse_prices, price_of


def test_a_price_is_that_of_a_million_tokens():
    """Each kind has its own price; one without a price costs nothing."""
    prices = parse_prices({"output": 10, "input": 2.5})
    assert prices == (("input", 2.5), ("output", 10.0))
    assert price_of({"input": 2_000_000.0, "cached": 5_000_000.0, "output": 100_000.0}, prices) == 6.0
    assert price_of({}, prices) == price_of({"input": 1.0}, ()) == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "must be a table"),
        ({}, "must be a table"),
        ({"inputs": 1}, "no kind of tokens"),
        ({"input": "3"}, "a number from 0 to 100000 for input"),
        ({"input": True}, "a number"),
        ({"output": -1}, "a number"),
        ({"output": float("nan")}, "a number"),
        ({"output": 2_500_000}, "a number"),
    ],
)
def test_what_is_no_price(value, said):
    """It is refused with what it must be; a price in the wrong unit is, too."""
    with pytest.raises(ValueError, match=said):
        parse_prices(value)
