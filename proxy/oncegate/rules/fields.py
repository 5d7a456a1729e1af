"""The fields of a [[rule]] and of an [[upstream]]: how each is written, and which values it refuses.

`reading.py` checks how fields fit together.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from oncegate.keys.documents import parse_pointer
from oncegate.keys.fingerprint_parts import BODY_JSON, fingerprint_source
from oncegate.keys.notes import parse_note
from oncegate.keys.sources import RECEIVER, Receiver, Source, parse_retry_mark, parse_scope_source, parse_source
from oncegate.probing.table import parse_table
from oncegate.rules.body_conditions import BodyConditions
from oncegate.rules.patterns import parse_host_pattern, parse_path, text_matcher
from oncegate.rules.presets import PRESETS
from oncegate.rules.prices import parse_prices
from oncegate.settings.addresses import Origin, parse_cors_origin, parse_host, parse_origin
from oncegate.settings.credentials import KNOWN, expanded, parse_scheme
from oncegate.settings.groups.browsers import BrowserSettings
from oncegate.settings.names import parse_header, parse_key_header, parse_namespace, parse_received_by
from oncegate.settings.settings import Settings
from oncegate.settings.statuses import parse_status
from oncegate.settings.wording import complaint

# The parts of a fingerprint.
PARTS = ("method", "host", "target", "type", "body")
# The statuses that a duplicate can get while its original is running.
# 409 is that of draft-ietf-httpapi-idempotency-key-header; many clients retry a 429 or a 503 by themselves.
IN_FLIGHT = (409, 429, 503)
# Settings that a rule or a preset can set for its requests, under the same name in lower case.
SHARED = (
    "pass_host",
    "retention_s",
    "tombstone_s",
    "on_duplicate",
    "wait_max_s",
    "on_unknown",
    "on_store_down",
    *("ask_keys", "pass_interim"),
    "upstream_timeout_s",
    "max_request_bytes",
    "max_stored_bytes",
    *BrowserSettings.model_fields,
)
# The fields of an [[upstream]] that are settings as well -> the name of the setting.
OF_UPSTREAMS = {
    "connect_timeout_s": "connect_timeout_s",
    "connect_retries": "connect_retries",
    "max_connections": "max_upstream_connections",
    "reuse_idle_s": "upstream_reuse_idle_s",
    "rest_s": "upstream_rest_s",
    "spare_connections": "upstream_spare_connections",
}
FILES = ("ca_file", "cert_file", "key_file")
# What only a rule can switch on.
SWITCHES = (
    *("upstream_idempotent", "pages", "replay_cookies"),
    *("resumable", "cancellable", "resume", "sse_ids", "resume_by_key", "respond_async"),
)

# Takes a value as TOML has it and returns it as a policy has it. Raises ValueError with what it must be.
Check = Callable[[Any], Any]


def _text(parse: Callable[[str], Any]) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("must be a text in quotes")
        return parse(value)

    return check


def _list_of(check: Check, members: str) -> Check:
    def check_all(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"must be a list of {members}, such as [...]")
        checked = tuple(map(check, value))
        if len(set(checked)) < len(checked):
            raise ValueError("has the same member twice")
        return checked

    return check_all


def _one_of(*choices: Any) -> Check:
    def check(value: Any) -> Any:
        # In Python 1 == True, but in a rules file they are two values.
        if value not in choices or isinstance(value, bool) is not isinstance(choices[0], bool):
            raise ValueError(f"must be {' or '.join(map(repr, choices))}")
        return value

    return check


def _seconds(least: float, most: float) -> Check:
    def check(value: Any) -> float:
        # In Python True is a number, and comparisons with a NaN are false.
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"must be a number of seconds from {least:g} to {most:g}")
        return float(value)

    return check


def _setting(name: str) -> Check:
    """Return the check of a field that is a setting as well, with the same limits and messages."""
    field = Settings.model_fields[name]
    annotation: Any = field.annotation
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[annotation, *field.metadata] if field.metadata else annotation)

    def check(value: Any) -> Any:
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            raise ValueError("must be a finite number")
        # Strict, because TOML has types: the text "5" is not the number 5.
        return _validated(adapter, value, strict=True)

    return check


def _validated(adapter: TypeAdapter[Any], value: Any, *, strict: bool = False) -> Any:
    try:
        return adapter.validate_python(value, strict=strict)
    except ValidationError as error:
        raise ValueError(complaint(error.errors(include_input=False)[0])) from None


def _file(value: Any) -> Any:
    """Return the path of a readable file, checked as for the setting `upstream_ca_file`."""
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")
    return _validated(TypeAdapter(Annotated[Any, *Settings.model_fields["upstream_ca_file"].metadata]), value)


def _name(text: str) -> str:
    # A name appears in log lines and messages, where a control character could forge a line.
    if not re.fullmatch(r"[!-~](?:[ -~]{0,62}[!-~])?", text):
        raise ValueError("must be 1 to 64 visible ASCII characters")
    return text


def _methods(value: Any) -> frozenset[str]:
    methods = _list_of(_text(_method), "methods")(value)
    if not methods:
        raise ValueError("is an empty list; leave it out for all methods")
    return frozenset(methods)


def _method(text: str) -> str:
    # CONNECT would open a tunnel to any host, and TRACE returns credentials (RFC 9110, sections 9.3.6 and 9.3.8).
    if not re.fullmatch(r"[A-Z]{1,32}", text.upper()) or text.upper() in ("CONNECT", "TRACE"):
        raise ValueError(f"{text!r} is not a method that oncegate serves")
    return text.upper()


def _headers(value: Any) -> tuple[tuple[bytes, str], ...]:
    if not isinstance(value, dict) or not all(isinstance(glob, str) for glob in value.values()):
        raise ValueError('must be a table of names and patterns, such as { "User-Agent" = "Stripe/*" }')
    # Field names are case-insensitive (RFC 9110, section 5.1), but keys of a TOML table are not.
    if len({name.lower() for name in value}) < len(value):
        raise ValueError("has the same header twice")
    return tuple((parse_header(name).lower().encode(), glob) for name, glob in value.items())


def _when(value: Any) -> BodyConditions | None:
    """Return the conditions on a body; None for an empty table, which takes away those of a preset."""
    if not isinstance(value, dict):
        raise ValueError('must be a table of body:/pointer and texts, such as { "body:/method" = "tools/call" }')
    globs = []
    for name, some in value.items():
        if not name.startswith("body:"):
            raise ValueError(f"{name!r} is no place in a body, such as body:/method; match heads by headers")
        texts = (some,) if isinstance(some, str) else _list_of(_text(str), "texts")(some)
        if not texts:
            raise ValueError(f"{name!r} has an empty list, which no body meets")
        pointer = name.removeprefix("body:")
        parse_pointer(pointer)
        globs.append((pointer, texts))
    return BodyConditions(globs) if globs else None


def _preset(text: str) -> str:
    if text not in PRESETS:
        raise ValueError(f"{text!r} is not a preset; the presets are {', '.join(PRESETS)}")
    return text


def _upstream(text: str) -> Origin | str:
    return parse_origin(text) if "://" in text else _name(text)


def _earlier_name(text: str) -> str:
    # The upstream of the settings has no name.
    return str(_upstream(text)) if text else ""


def _key(value: Any) -> tuple[tuple[Source, ...], ...]:
    """Return the alternatives of a key: one source, a list of sources to join, or a list of such lists."""
    if isinstance(value, str):
        value = [value]
    # A member of a list of lists is itself checked as a list.
    sources = _list_of(_text(parse_source), "sources")
    nested = isinstance(value, list) and any(isinstance(one, list) for one in value)
    alternatives = _list_of(sources, "lists of sources")(value) if nested else (sources(value),)
    if not all(alternatives) or not alternatives:
        raise ValueError("names no source")
    for sources_of_one in alternatives:
        _check_joined(sources_of_one)
    return alternatives


def _check_joined(alternative: tuple[Source, ...]) -> None:
    if len({source.name for source in alternative}) < len(alternative):
        raise ValueError("names one identity twice in one list")
    # All requests to one path would be one.
    if all(isinstance(source.kind, Receiver) for source in alternative):
        raise ValueError(f"has {RECEIVER} without a source beside it")


def _scope(value: Any) -> tuple[Source, ...]:
    """Return the sources of a scope, with the headers for which `known` stands in its place."""
    members = _list_of(_text(_scope_member), "sources")(value)
    return tuple(dict.fromkeys(source for sources in members for source in sources))


def _scope_member(text: str) -> tuple[Source, ...]:
    known = [f"header:{name}" for name in expanded([KNOWN])]
    return tuple(map(parse_scope_source, known if text == KNOWN else [text]))


def _part(text: str) -> str:
    kind, colon, name = text.partition(":")
    if kind == "header" and colon:
        # Header names are case-insensitive, and the spelling enters fingerprints.
        text = f"header:{parse_header(name).lower()}"
    if text not in PARTS and fingerprint_source(text) is None:
        parts = ", ".join((*PARTS, BODY_JSON, "header:Name", "body:/pointer"))
        raise ValueError(f"{text!r} is not a part of a fingerprint; the parts are {parts}")
    return text


def _fingerprint(value: Any) -> tuple[str, ...]:
    parts: tuple[str, ...] = _list_of(_text(_part), "parts")(value)
    whole = next((part for part in ("body", BODY_JSON) if part in parts), None)
    other = next((part for part in parts if part != whole and part.startswith("body")), None)
    # Whoever wrote the second part expects that the rest of the body does not count.
    if whole and other:
        raise ValueError(f"has {whole}, which has all of {other}")
    return parts


def _agents(value: Any) -> tuple[re.Pattern[bytes], ...]:
    agents = _list_of(_text(_agent), "patterns")(value)
    if not agents:
        raise ValueError("is an empty list; leave it out for clients that ask by themselves")
    return tuple(map(text_matcher, agents))


def _agent(text: str) -> str:
    if not text.strip("* ") or not text.isascii() or not text.isprintable():
        raise ValueError(f"{text!r} names no User-Agent; write one such as curl/*")
    return text


# The fields that choose a rule's requests, and the preset.
MATCHING: Mapping[str, Check] = {
    "name": _text(_name),
    "host": _text(parse_host_pattern),
    "path": _text(parse_path),
    "methods": _methods,
    "headers": _headers,
    "when": _when,
    "preset": _text(_preset),
}
# The fields that say what happens to those requests.
TREATING: Mapping[str, Check] = {
    "upstream": _text(_upstream),
    "set_host": _text(parse_host),
    "guard": _one_of("off", "optional", "required"),
    "protocol": _one_of("http", "json-rpc"),
    "key": _key,
    "retry_mark": _text(parse_retry_mark),
    "namespace": _text(parse_namespace),
    "scope": _scope,
    "stable_schemes": _list_of(_text(parse_scheme), "schemes"),
    "fingerprint": _fingerprint,
    "release_statuses": _list_of(_text(parse_status), "statuses"),
    "ambiguous_statuses": _list_of(_text(parse_status), "statuses"),
    "in_flight_status": _one_of(*IN_FLIGHT),
    "forward_key": _text(lambda text: parse_key_header(text) if text else ""),  # empty: the upstream gets no key
    "on_bad_key": _one_of("refuse", "pass"),
    "on_client_gone": _one_of("finish", "cancel"),
    "cancel_grace_s": _seconds(0, 86_400),
    "upstream_key_retention_s": _seconds(1, 31_536_000),
    "heartbeat_s": _seconds(0.1, 3600),
    "heartbeat_agents": _agents,
    "note": _text(parse_note),
    "reconcile": parse_table,
    "token_prices": parse_prices,
    **{name: _setting(name) for name in SHARED},
    "cors_origins": _list_of(_text(parse_cors_origin), "origins"),  # where the environment has a comma list
    **dict.fromkeys(SWITCHES, _one_of(True, False)),
}
RULE = {**MATCHING, **TREATING}
UPSTREAM: Mapping[str, Check] = {
    "name": _text(_name),
    "url": _text(parse_origin),
    "was": _list_of(_text(_earlier_name), "names"),
    "direct": _one_of(True, False),
    "via": _list_of(_text(parse_received_by), "names"),
    **dict.fromkeys(FILES, _file),
    **{name: _setting(setting) for name, setting in OF_UPSTREAMS.items()},
}
