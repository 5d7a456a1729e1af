"""Loads the rules file: an ordered list of routes with their policies. The first rule that matches a request decides.

A rule's fields override those of its preset, which override the settings. Loading checks everything and reports
all problems at once; while requests run, only `Rules.choose` is used.
"""

from oncegate.rules.file import FileError, read_tables
from oncegate.rules.model import Rules
from oncegate.rules.reading import RulesReader
from oncegate.rules.resolution import default_rule
from oncegate.settings.errors import SettingsError
from oncegate.settings.settings import Settings


def load_rules(settings: Settings) -> Rules:
    """Return the rules in effect. Raises SettingsError with all problems of the file."""
    default = default_rule(settings)
    if settings.rules_file is None:
        return Rules((), default)
    try:
        tables = read_tables(settings.rules_file)
    except FileError as error:
        raise SettingsError(error.errors) from None
    reading = RulesReader(settings, settings.rules_file, default)
    rules = reading.rules(tables)
    if reading.complaints:
        raise SettingsError(reading.complaints)
    return Rules(tuple(rules), default)
