"""What an LLM's tokens cost, by their kind, as a rule has it. Pure."""

from collections.abc import Mapping
from typing import Any

from oncegate.settings.names import TOKEN_KINDS

PER_TOKENS = 1_000_000
# Far above any price there is: a mistake in the unit is one of a factor of a million.
MOST = 100_000.0

# Of a million tokens of each kind, in the currency of whoever wrote the rule.
Prices = tuple[tuple[str, float], ...]


def parse_prices(value: Any) -> Prices:
    """Return the prices in a table. Raises ValueError with what it must be."""
    if not isinstance(value, dict) or not value:
        raise ValueError("must be a table such as { input = 2.5, output = 10 }, of prices per million tokens")
    if unknown := [kind for kind in value if kind not in TOKEN_KINDS]:
        raise ValueError(f"has {unknown[0]!r}, which is no kind of tokens; these are: {', '.join(TOKEN_KINDS)}")
    for kind, price in value.items():
        # In Python True is a number, and comparisons with a NaN are false.
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price <= MOST:
            raise ValueError(f"must have a number from 0 to {MOST:g} for {kind}")
    return tuple((kind, float(value[kind])) for kind in TOKEN_KINDS if kind in value)


def price_of(tokens: Mapping[str, float], prices: Prices) -> float:
    """Return what tokens cost. `tokens`: how many of each kind."""
    return sum(tokens.get(kind, 0.0) * price for kind, price in prices) / PER_TOKENS
