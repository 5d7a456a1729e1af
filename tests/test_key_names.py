"""Which names of header fields look like that of a key."""

import pytest

from oncegate.keys.key_names import has_key_name


@pytest.mark.parametrize(
    "name",
    [b"idempotency-key", b"x-idempotency-key", b"cko-idempotency-key", b"x-idempotency-token", b"paypal-request-id"],
)
def test_the_names_that_apis_have(name):
    """Whatever stands before or after the word, and the one that does not say it."""
    assert has_key_name([b"host", name, b"accept"])


@pytest.mark.parametrize("name", [b"x-request-id", b"idempotent-replayed", b"key", b"x-key-id", b"traceparent"])
def test_other_names(name):
    """Ids that are new for each try, and what a response said."""
    assert not has_key_name([b"host", name, b"accept"])
