"""The rules file: an ordered list of routes and what is done for their requests. The first that matches decides.

A rule's fields override its preset's, and those the environment's. What is wrong is found when the file
is read, all of it at once; nothing here is asked again while a request runs but `Rules.choose`.
"""

from oncegate.rules.file import FileError, read
from oncegate.rules.model import Rules
from oncegate.rules.reading import Reading, default_rule
from oncegate.settings.settings import Settings, SettingsError


def load(settings: Settings) -> Rules:
    """Return the rules in effect. Raises SettingsError with every problem of the file."""
    default = default_rule(settings)
    if settings.rules_file is None:
        return Rules((), default)
    try:
        tables = read(settings.rules_file)
    except FileError as error:
        raise SettingsError(error.errors) from None
    reading = Reading(settings, settings.rules_file, default)
    rules = reading.rules(tables)
    if reading.complaints:
        raise SettingsError(reading.complaints)
    return Rules(tuple(rules), default)
