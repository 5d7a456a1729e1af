"""How settings fail: with every error at once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SettingsError(Exception):
    """The settings cannot be used. Each of `errors` begins with the name of its variable."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra of the package that has what an import lacks. Raises SettingsError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SettingsError([f"{error.name} is not installed: pip install 'oncegate[{extra}]'"]) from error
