"""What one requester gets of a response."""

from oncegate.adaptation.adaptation import Adaptation
from oncegate.rules.policy import Policy


def test_nothing_is_adapted_by_default():
    """A policy adapts nothing unless somebody chose it, and then acts on no further field of a request."""
    assert Policy.__dataclass_fields__["adaptation"].default is None
    assert Adaptation().acted_on == frozenset()
