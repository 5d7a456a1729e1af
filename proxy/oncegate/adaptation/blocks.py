"""Header fields between the block that is stored or sent and the lines that are adapted."""

from collections.abc import Collection, Iterable

# (name, value) in order and spelling.
Lines = list[tuple[bytes, bytes]]


def read_block(block: bytes) -> Lines:
    """Return the fields of a block, in which each line is ended."""
    pairs = (line.partition(b":") for line in block.split(b"\r\n") if line)
    return [(name, value.strip(b" \t")) for name, _, value in pairs]


def write_block(lines: Lines) -> bytes:
    """Return the block of fields."""
    return b"".join([b"%s: %s\r\n" % line for line in lines])


def values(lines: Lines, name: bytes) -> list[bytes]:
    """Return the values of a field; `name` is lower-case."""
    return [value for field, value in lines if field.lower() == name]


def without(lines: Lines, names: Collection[bytes]) -> Lines:
    """Return the lines of other fields; `names` are lower-case."""
    return [line for line in lines if line[0].lower() not in names]


def members(lines: Lines, name: bytes) -> list[bytes]:
    """Return the members of a comma list in lower case, of all lines of the field `name` (lower case)."""
    return [member for value in values(lines, name) for member in map(bytes.strip, value.lower().split(b",")) if member]


def with_members(lines: Lines, name: bytes, added: Iterable[bytes]) -> Lines:
    """Return the lines with members added to a comma list, those that it has not; `name` in its usual spelling."""
    have = members(lines, name.lower())
    missing = [member for member in added if member.lower() not in have]
    if not missing:
        return lines
    for index, (field, value) in enumerate(lines):
        if field.lower() == name.lower() and value:
            return [*lines[:index], (field, b", ".join((value, *missing))), *lines[index + 1 :]]
    return [*lines, (name, b", ".join(missing))]
