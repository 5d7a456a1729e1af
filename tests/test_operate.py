"""The response that an operator gives for an unknown key, and the errors for one that makes no sense."""

import argparse

import pytest

from oncegate.commands.cli import main, parser
from oncegate.commands.operator_response import operator_response
from oncegate.commands.store_command import CommandError, KeysExit
from oncegate.store.record_name import parse_record_id, record_id, store_key


def options(*words: str) -> argparse.Namespace:
    return parser().parse_args(["keys", "resolve", "key", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--status", "99"], "status 99"),
        (["--status", "204", "--body-file", "body"], "has no body"),
        (["--status", "200", "--body-file", "none"], "No such file"),
        (["--status", "200", "--body-file", "large"], "at most 262144 bytes"),
        (["--status", "200", "-H", "no colon"], "not of the form"),
        (["--status", "200", "-H", "Bad Name: x"], "not of the form"),
        (["--status", "200", "-H", ": x"], "not of the form"),
        (["--status", "200", "-H", "X: a\r\nY: b"], "control character"),
        (["--status", "200", "-H", "Content-Length: 5"], "framing"),
        (["--status", "200", "-H", "Transfer-Encoding: chunked"], "framing"),
    ],
)
def test_an_answer_that_cannot_be_given(tmp_path, monkeypatch, words, said):
    """A response that makes no sense is refused before the store is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "body").write_bytes(b"x")
    (tmp_path / "large").write_bytes(bytes(262_145))
    with pytest.raises(CommandError, match=said) as refused:
        operator_response(options(*words))
    assert refused.value.code == KeysExit.USAGE_ERROR


def test_an_answer_by_hand(tmp_path):
    """The response has its status, its fields in their order, and its body, without the fields that no replay has."""
    (tmp_path / "body").write_bytes(b"abc")
    words = ["-H", "X-One: 1", "-H", "Set-Cookie: a=b", "-H", "X-Two:2"]
    answer, body = operator_response(options("--status", "201", "--body-file", str(tmp_path / "body"), *words))
    assert (answer.status, answer.reason, body) == (201, b"Created", b"abc")
    assert answer.block == b"X-One: 1\r\nX-Two: 2\r\n"
    assert (answer.chunks, answer.size, answer.body_stored) == (1, 3, True)
    empty, body = operator_response(options("--status", "204"))
    assert (empty.chunks, empty.size, empty.stated_length, body) == (0, 0, True, b"")


def test_ids_are_names():
    """The ids that lists and logs show identify the record; no other text does."""
    digest = bytes(range(24))
    assert parse_record_id(record_id(digest)) == parse_record_id(store_key(digest).decode()) == digest
    for other in ("", "x" * 31, "x" * 33, "once:{}", "once:epoch", "*" * 32):
        assert parse_record_id(other) is None


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_the_commands_and_the_settings_page(capsys, words):
    """Help goes to standard output with exit code 0, also without a command, and needs no settings."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 0
    shown, complaint = capsys.readouterr()
    assert complaint == ""
    assert "docs/reference/settings.md" in shown
    for command in ("serve", "check", "demo", "healthcheck", "keys"):
        assert f"\n    {command}" in shown
