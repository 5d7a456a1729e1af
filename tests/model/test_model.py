"""The rules about one key keep every promise in every order of events, and each safeguard is needed for one."""

import pytest

from tests.model.explore import PROMISES, explore
from tests.model.variants import SETTINGS, VARIANTS, WITHOUT


@pytest.mark.parametrize("name", VARIANTS)
def test_a_verdict(name):
    """The rules as they are hold; without a safeguard the promise breaks that it is there for."""
    setting, cut, breaks = VARIANTS[name]
    found = explore(SETTINGS[setting], frozenset(cut), {breaks} if breaks else None)
    assert found.broken == breaks, found.story


def test_what_is_searched():
    """Each promise is broken by some variant, so none is empty."""
    assert {variant.breaks for variant in VARIANTS.values()} == {*PROMISES, ""}
    assert len(WITHOUT) >= 10
