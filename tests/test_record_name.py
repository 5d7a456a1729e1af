"""The names of records in the store."""

from oncegate.store import record_name
from oncegate.store.record_name import parse_record_id, record_id, store_key


def test_names_are_remembered_for_a_while_and_always_the_same(monkeypatch):
    """Also once more are asked for than are kept."""
    monkeypatch.setattr(record_name, "_names", {})
    digests = [number.to_bytes(24) for number in range(2500)]
    first = [store_key(digest) for digest in digests]
    assert len(record_name._names) <= record_name._MOST_NAMES
    assert [store_key(digest) for digest in digests] == first
    assert len(set(first)) == 2500


def test_a_record_is_found_by_its_id_and_by_its_name():
    """Any other text is none."""
    digest = bytes(range(200, 224))
    assert parse_record_id(record_id(digest)) == parse_record_id(store_key(digest).decode()) == digest
    assert parse_record_id("once:{}") is None
