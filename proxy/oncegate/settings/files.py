"""Files that settings name, and `.env`. They are regular files of a bounded size: another could hang us."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from io import StringIO

from dotenv.parser import Binding, parse_stream

# Of a secret, which is one line.
MAX_SECRET_BYTES = 65_536
# Of any other file. A path to the wrong file, such as a log, must not fill the memory.
MAX_FILE_BYTES = 4_194_304
# Of the SHA-256 that a log shows, in hexadecimal.
DIGEST_CHARACTERS = 12


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a regular file. Raises ValueError with the reason, which does not repeat the path."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_kind(os.fstat(descriptor).st_mode)
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise ValueError(f"is over {max_bytes} bytes")
    return content


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> str:
    """Return the content of a regular file as text, without a byte order mark. Raises ValueError as `read_file`."""
    try:
        # Editors on Windows write the mark, which is no part of the text.
        return read_file(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        # Without its cause: the decoder's error contains the bytes, which may be a secret.
        raise ValueError("cannot be read as UTF-8 text") from None


def digest_of(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Return a digest by which the versions of these files are told apart; empty where one cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            content = read_file(path)
            digest.update(b"%d:%b" % (len(content), content))
    except ValueError:
        return ""
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    # A pipe can be read only once, but every worker reads the settings again.
    if not stat.S_ISREG(mode):
        raise ValueError("is not a regular file")


# The file .env ...


def read_env_file(path: str, prefix: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the variables in the file, and its problems; nothing of either where there is no file.

    `prefix`: of the names that must have a value on one line. `${NAME}` in a value stays as it is, because a secret may
    contain it. A line that cannot be read is a problem: a secret that was dropped silently would name other keys. No
    problem repeats a line, which may be a secret.
    """
    if not os.path.lexists(path):
        return [], []
    try:
        bindings = list(parse_stream(StringIO(read_text(path))))
    except ValueError as error:
        return [], [f"{path}: {error}"]
    problems = [f"{path}:{_line(one)}: {reason}" for one in bindings for reason in _problems(one, prefix)]
    return [(one.key, one.value) for one in bindings if one.key and one.value is not None], problems


def _problems(binding: Binding, prefix: str) -> Iterator[str]:
    if binding.error:
        yield "is not NAME=value; a value with quotes in it needs other quotes around it, and every quote its end"
    elif binding.key is not None and binding.key.upper().startswith(prefix):
        if binding.value is None:
            yield "has a name without ="
        # No setting has several lines: a quote without its end takes the lines up to the next quote.
        elif len(binding.value.splitlines()) > 1:
            yield "has a value of several lines; the quote at its beginning needs its end"


def _line(binding: Binding) -> int:
    """Return the number of the line that has the name. Blank lines before it belong to the binding, too."""
    text = binding.original.string
    return binding.original.line + len(text[: len(text) - len(text.lstrip())].splitlines())
