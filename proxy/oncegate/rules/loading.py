"""Loads the rules file: an ordered list of routes with their policies. The first rule that matches a request decides.

A rule's fields override those of its preset, which override the settings. Loading checks everything and reports
all problems at once; while requests run, only `Rules.choose` is used.
"""

from dataclasses import replace
from pathlib import Path

from oncegate.adaptation.error_pages import TEMPLATES, ErrorPages
from oncegate.adaptation.page_template import MAX_PAGE_BYTES, BadTemplate, PageTemplate
from oncegate.rules.file import FileError, read_tables
from oncegate.rules.model import Rule, Rules
from oncegate.rules.reading import RulesReader
from oncegate.rules.resolution import default_rule
from oncegate.settings.errors import SettingsError
from oncegate.settings.files import digest_of, read_text
from oncegate.settings.settings import Settings


def load_rules(settings: Settings) -> Rules:
    """Return the rules in effect, and the pages. Raises SettingsError with all problems of their files."""
    pages, complaints = _error_pages(settings.pages_dir)
    try:
        rules, default = _rules(settings)
    except SettingsError as error:
        complaints = [*error.errors, *complaints]
    if complaints:
        raise SettingsError(complaints)
    return Rules(tuple(map(_with_certificates, rules)), _with_certificates(default), pages)


def _with_certificates(rule: Rule) -> Rule:
    """Return the rule with what its upstream's certificates are now."""
    upstream = rule.upstream
    files = [path for path in (upstream.ca_file, upstream.cert_file, upstream.key_file) if path is not None]
    return replace(rule, upstream=replace(upstream, certificates=digest_of(files))) if files else rule


def _rules(settings: Settings) -> tuple[tuple[Rule, ...], Rule]:
    default = default_rule(settings)
    if settings.rules_file is None:
        return (), default
    try:
        tables = read_tables(settings.rules_file)
    except FileError as error:
        raise SettingsError(error.errors) from None
    reading = RulesReader(settings, settings.rules_file, default)
    rules = reading.rules(tables)
    if reading.complaints:
        raise SettingsError(reading.complaints)
    return tuple(rules), default


def _error_pages(folder: Path | None) -> tuple[ErrorPages, list[str]]:
    """Return the pages with the templates of a folder, and what is wrong with those."""
    if folder is None:
        return ErrorPages(), []
    templates, complaints = {}, []
    try:
        names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".html")
    except OSError as error:
        return ErrorPages(), [f"{folder}: cannot be read: {error.strerror}"]
    # A mount may have failed.
    if not names:
        complaints.append(f"{folder}: has no template; the names of templates are {_names()}")
    for name in names:
        try:
            templates[name] = _template(folder / f"{name}.html")
        except ValueError as error:
            complaints.append(str(error))
    return ErrorPages(templates), complaints


def _template(file: Path) -> PageTemplate:
    """Return the template in a file. Raises ValueError with the place and the reason."""
    if file.stem not in TEMPLATES:
        raise ValueError(f"{file}: no page has this name; the names of templates are {_names()}")
    try:
        return PageTemplate(read_text(file, MAX_PAGE_BYTES))
    except BadTemplate as error:
        raise ValueError(f"{file}:{error.line}: {error.reason}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _names() -> str:
    return ", ".join(f"{name}.html" for name in TEMPLATES)
