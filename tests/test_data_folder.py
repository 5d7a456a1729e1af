"""Which server programs can read a data folder, and what is no data folder."""

from pathlib import Path

import pytest

from oncegate.server.data_folder import Program, can_read, note_writer, parse_program, program_at, writer_of


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=d81bff71cc150e2", "redis 7.0.15"),
        ("Valkey server v=9.1.2 sha=00000000:1 malloc=libc bits=64 build=1536df31c0395150", "valkey 9.1.2"),
        ("valkey 9.1.2\n", "valkey 9.1.2"),
        ("redis 8\n", "redis 8"),
        ("Memcached 1.6", None),
        ("redis", None),
        ("", None),
    ],
)
def test_a_program_says_what_it_is(text, program):
    """The name and the version come from what the program says of itself, or from what was noted of it."""
    found = parse_program(text)
    assert (str(found) if found else None) == program


@pytest.mark.parametrize(
    ("program", "writer", "is_read"),
    [
        ("valkey 9.1.2", "valkey 9.1.2", True),
        ("valkey 9.1.0", "valkey 9.1.2", True),
        ("valkey 9.2.0", "valkey 9.1.2", True),
        ("valkey 9.0.9", "valkey 9.1.2", False),
        ("redis 7.0.15", "redis 7.2.4", False),
        ("redis 7.2.4", "redis 7.0.15", True),
        ("redis 8.0.0", "valkey 7.2.0", False),
        ("redis 7.0.15", "valkey 9.1.2", False),
        ("valkey 9.1.2", "redis 7.0.15", True),
        ("valkey 9.1.2", "redis 7.2.9", True),
        ("valkey 9.1.2", "redis 7.4.0", False),
        ("valkey 10", "valkey 9.9", True),
    ],
)
def test_which_program_reads_what(program, writer, is_read):
    """The same program in the same or a later version reads it; Valkey reads Redis up to 7.2; Redis reads no Valkey."""
    assert can_read(parse_program(program), parse_program(writer)) is is_read


def test_the_writer_is_noted(tmp_path: Path):
    """The program that wrote last is known at the next start, and nothing else is left behind."""
    assert writer_of(tmp_path) is None
    for version in ((9, 1, 2), (9, 1, 2), (9, 2, 0)):
        note_writer(tmp_path, Program("valkey", version))
        assert writer_of(tmp_path) == Program("valkey", version)
    assert [path.name for path in tmp_path.iterdir()] == ["written-by"]


def test_a_program_that_cannot_be_run(tmp_path: Path):
    """A file that is no program is an error; one that says nothing is no server."""
    with pytest.raises(OSError, match="No such file"):
        program_at(tmp_path / "none")
    assert program_at("/bin/true") is None
