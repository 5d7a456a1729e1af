"""Which targets are oncegate's own, and what logs have of them."""

import pytest

from oncegate.streams.own_path import NOWHERE, OwnPath, Place

OWN = OwnPath("/.oncegate")


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (b"/.oncegate/streams/abc", Place(b"streams", b"abc", b"")),
        (b"/.oncegate/streams/abc?offset=-1&live=sse", Place(b"streams", b"abc", b"offset=-1&live=sse")),
        (b"/.oncegate/streams/a/b", Place(b"streams", b"a/b", b"")),
        (b"/.oncegate/streams/", Place(b"streams", b"", b"")),
        (b"/.oncegate/streams", Place(b"streams", b"", b"")),
        (b"/.oncegate/keys", Place(b"keys", b"", b"")),
        (b"/.oncegate/", Place(b"", b"", b"")),
        (b"/.oncegate/streams%2Fabc", Place(b"streams%2Fabc", b"", b"")),
    ],
)
def test_what_a_target_names(target, place):
    assert OWN.place(target) == place


@pytest.mark.parametrize(
    "target",
    [
        b"/.oncegate",
        b"/.oncegate?x",
        b"//.oncegate/streams/abc",
        b"/./.oncegate/streams/abc",
        b"/x/../.oncegate/streams/abc",
        b"/x/%2e%2e/.oncegate/streams/abc",
        b"/%2Eoncegate/streams/abc",
        b"/.onc%65gate/streams/abc",
        b"/.oncegate%2Fstreams/abc",
        b"/%2f.oncegate/streams/abc",
        b"/.ONCEGATE/streams/abc",
        b"/.%4FNCEGATE/streams/abc",
        b"/\\.oncegate\\streams/abc",
        b"/%5c.oncegate/streams/abc",
        b"/.oncegate;x=1/streams/abc",
        b"/;/.oncegate/streams/abc",
        b"/x/..%3B/.oncegate/streams/abc",
    ],
)
def test_what_only_normalizes_to_it_is_nowhere(target):
    assert OWN.place(target) is NOWHERE


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/v1/x",
        b"/.oncegatex/streams",
        b"/oncegate/streams/abc",
        b"/x?/.oncegate/streams",
        b"/x%2F/",
        b"/x;/.oncegate",
    ],
)
def test_everything_else_is_the_apis(target):
    assert OWN.place(target) is None


def test_what_logs_have():
    for target in (b"/.oncegate/streams/abc", b"/%2Eoncegate/streams/abc", b"/.oncegate/streams?x=abc"):
        place = OWN.place(target)
        assert place is not None
        assert "abc" not in OWN.shown(place)
    assert OWN.address(b"abc") == b"/.oncegate/streams/abc"
