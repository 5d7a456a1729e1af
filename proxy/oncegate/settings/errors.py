"""How settings fail: with every error at once."""

from collections.abc import Iterable


class SettingsError(Exception):
    """The settings cannot be used. Each of `errors` begins with the name of its variable."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))
