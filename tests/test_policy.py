"""What a policy says where nobody chose anything."""

from oncegate.rules.policy import DEFAULT_STATUSES, Policy


def test_a_policy_has_the_defaults():
    """A policy without statuses and mode has the defaults, and executes at most once."""
    assert Policy.__dataclass_fields__["statuses"].default is DEFAULT_STATUSES
    assert Policy.__dataclass_fields__["mode"].default == b"hold"
