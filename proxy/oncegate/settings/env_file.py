"""The file `.env`. A line that cannot be read is an error: a secret that was dropped silently would name other keys."""

import os
from collections.abc import Iterator
from io import StringIO

from dotenv.parser import Binding, parse_stream

from oncegate.settings.files import read_text


def read_env_file(path: str, prefix: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the variables in the file, and its problems; nothing of either where there is no file.

    `prefix`: of the names that must have a value on one line. `${NAME}` in a value stays as it is, because a secret may
    contain it. No problem repeats a line, which may be a secret.
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
