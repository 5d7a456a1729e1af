"""The response that an operator gives for an unknown key, and the errors for one that makes no sense."""

import subprocess

import pytest

from oncegate.commands.cli import SHELLS, main
from oncegate.operating.decisions import operator_response
from oncegate.operating.errors import OperatorError
from oncegate.store.record_name import parse_record_id, record_id, store_key


@pytest.mark.parametrize(
    ("status", "headers", "body", "said"),
    [
        (99, [], b"", "status 99"),
        (204, [], b"x", "has no body"),
        (200, [], bytes(262_145), "at most 262144 bytes"),
        (200, ["no colon"], b"", "not of the form"),
        (200, ["Bad Name: x"], b"", "not of the form"),
        (200, [": x"], b"", "not of the form"),
        (200, ["X: a\r\nY: b"], b"", "control character"),
        (200, ["Content-Length: 5"], b"", "framing"),
        (200, ["Transfer-Encoding: chunked"], b"", "framing"),
    ],
)
def test_an_answer_that_cannot_be_given(status, headers, body, said):
    """A response that makes no sense is refused before the store is read."""
    with pytest.raises(OperatorError, match=said) as refused:
        operator_response(status, headers, body)
    assert refused.value.is_usage


def test_an_answer_by_hand():
    """The response has its status, its fields in their order, and its body, without the fields that no replay has."""
    answer, body = operator_response(201, ["X-One: 1", "Set-Cookie: a=b", "X-Two:2"], b"abc")
    assert (answer.status, answer.reason, body) == (201, b"Created", b"abc")
    assert answer.block == b"X-One: 1\r\nX-Two: 2\r\n"
    assert (answer.chunks, answer.size, answer.body_stored) == (1, 3, True)
    empty, body = operator_response(204, [], b"")
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


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_the_commands(capsys, tmp_path, shell):
    """The script knows every command and its options, and bash takes it. It needs no settings."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("healthcheck", "quarantine", "watch", "headers-file", "in_flight"):
        assert word in script
    if shell == "bash":
        (tmp_path / "completion.bash").write_text(script)
        asked = f"""
            . {tmp_path}/completion.bash
            COMP_WORDS=(oncegate keys wat) COMP_CWORD=2
            $(complete -p oncegate | sed "s/.*-F \\([^ ]*\\).*/\\1/") oncegate wat keys
            echo "${{COMPREPLY[@]}}"
        """
        told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        assert told.stdout.split() == ["watch"]
