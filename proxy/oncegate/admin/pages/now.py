"""The first page: whether anything needs a person, and how it goes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aiohttp import web

from oncegate.admin import formats
from oncegate.admin.pages.frame import show
from oncegate.admin.parts import AdminParts
from oncegate.admin.roles import Role, Route, Visitor
from oncegate.admin.templates import part
from oncegate.admin.watching.history import TOKENS, History, Name
from oncegate.admin.watching.overview import Look, Overview
from oncegate.observe.outcome import SUPPRESSED, Outcome
from oncegate.rules.prices import Prices, price_of
from oncegate.settings.names import TOKEN_KINDS
from oncegate.settings.postgres_url import is_postgres
from oncegate.settings.settings import Settings
from oncegate.settings.store_url import masked

REQUESTS, SUPPRESSIONS = "oncegate_requests_total", "oncegate_duplicates_suppressed_total"
# How many replicas are named.
MOST_REPLICAS = 12
_EXECUTED = (Outcome.EXECUTED, Outcome.RELEASED, Outcome.UNKNOWN)
# Of another request's execution.
_READ = (Outcome.REPLAYED, Outcome.JOINED, Outcome.RESUMED)
_TOLD = (Outcome.PREFLIGHT, Outcome.ACCEPTED, Outcome.ASKED, Outcome.KEY_ABSENT, Outcome.KEY_RELEASED, Outcome.STOPPED)
_PASSED_ON = (Outcome.PASSTHROUGH, Outcome.UNGUARDED, *_EXECUTED, *_READ, *_TOLD)


class Tile(NamedTuple):
    """One number of the page. `line`: how it went; `highest`: of that line."""

    label: str
    value: str
    unit: str = ""
    note: str = ""
    line: str = ""
    highest: str = ""
    is_warning: bool = False


class OutcomeRow(NamedTuple):
    """How many requests had an outcome."""

    name: str
    minute: float
    total: float


def now_routes(parts: AdminParts, overview: Overview) -> list[Route]:
    """Return the route of the page."""

    async def now(_: web.Request, visitor: Visitor) -> web.Response:
        await overview.look()
        return show(overview, visitor, "now", **now_values(parts.settings, overview))

    return [Route("GET", "/", Role.VIEW, now)]


def now_values(settings: Settings, overview: Overview) -> dict[str, Any]:
    """Return what the page shows, beside the look."""
    look, history = overview.last, overview.history
    return {
        "verdict": verdict(look),
        "open_tiles": open_tiles(look, history),
        "rate_tiles": list(rate_tiles(history)),
        "saved_tiles": list(saved_tiles(history, overview.prices)),
        "outcomes": outcomes(history),
        "facts": list(store_facts(settings, look, history)),
    }


def now_part(settings: Settings, overview: Overview) -> str:
    """Return the changing part of the page, as HTML."""
    return part("now_part.html", look=overview.last, **now_values(settings, overview))


def verdict(look: Look) -> dict[str, Any]:
    """Return the first line of the page: the worst there is, in a word and a sentence."""
    reasons = [*look.reasons, *look.notices]
    if look.store_error:
        if look.store_error not in reasons:
            reasons.append(f"the store says nothing to this page: {look.store_error}")
        reasons.append("the numbers of the store are its last ones" if look.open else "the store gave no numbers yet")
    if look.reasons:
        return {"kind": "bad", "word": "not ready", "text": "oncegate should get no traffic now.", "reasons": reasons}
    if look.store_error:
        return {"kind": "bad", "word": "store", "text": "The store does not answer.", "reasons": reasons}
    if look.undecided:
        text = f"The oldest key waits for {formats.age(look.oldest_ms)}."
        return {"kind": "unknown", "word": "ready, with unknown keys", "text": text, "reasons": reasons}
    if reasons:
        return {"kind": "unknown", "word": "ready", "text": "Look at this:", "reasons": reasons}
    return {"kind": "complete", "word": "ready", "text": "Nothing waits for you.", "reasons": []}


def open_tiles(look: Look, history: History) -> list[Tile]:
    """Return what the store says of all replicas, and what this one has in hand."""
    lapsed = f"{formats.count(look.lapsed)} of them: the owner is silent" if look.lapsed else "of all replicas"

    def stored(number: int) -> str:
        return formats.count(number) if look.open else "not known"

    here = history.newest.get("oncegate_in_flight")
    waiting = history.newest.get("oncegate_waiting")
    return [
        Tile("unknown, to decide", stored(look.undecided), "", lapsed, is_warning=look.undecided > 0),
        Tile("unknown, left to a retry", stored(look.waived), "", "nobody has to decide"),
        Tile("in flight, all replicas", stored(look.in_flight)),
        _gauge_tile(history, "in flight here", here, "oncegate_in_flight"),
        _gauge_tile(history, "duplicates waiting here", waiting, "oncegate_waiting"),
    ]


def _gauge_tile(history: History, label: str, value: float, gauge: str) -> Tile:
    values = history.gauges(gauge)
    return Tile(label, formats.count(value), "", "", formats.line(values), formats.count(max(values, default=0)))


def rate_tiles(history: History) -> Iterator[Tile]:
    """Yield how many requests come, and what becomes of them."""
    refused = [one for one in Outcome if one not in _PASSED_ON]
    yield _rate_tile(history, "requests", list(Outcome))
    yield _rate_tile(history, "executed", _EXECUTED)
    yield _rate_tile(history, "replayed or joined", _READ)
    yield _rate_tile(history, "refused or lost", refused)
    for label, histogram in (("time in the proxy", "overhead"), ("time of the API", "upstream")):
        middle, high = (history.quantile(share, f"oncegate_{histogram}_seconds") for share in (0.5, 0.99))
        value = "none" if middle is None else f"≤ {formats.duration(middle)}"
        yield Tile(label, value, "", "" if high is None else f"99 %: ≤ {formats.duration(high)}")


def _rate_tile(history: History, label: str, of: Sequence[Outcome]) -> Tile:
    names: list[Name] = [(REQUESTS, one.label) for one in of]
    values = history.rates(*names)
    highest = formats.decimal(max(values, default=0))
    return Tile(label, formats.decimal(history.rate(*names)), "a second", "", formats.line(values), highest)


def saved_tiles(history: History, prices: Mapping[str, Prices]) -> Iterator[Tile]:
    """Yield what duplicates would have cost. `prices`: of tokens, by rule."""
    newest = history.newest
    saved_s = newest.get("oncegate_upstream_seconds_saved_total")
    yield Tile("executions", formats.count(sum(newest.get(SUPPRESSIONS, one.label) for one in SUPPRESSED)))
    yield Tile("time of the API", formats.age(saved_s * 1000) if saved_s >= 60 else f"{formats.decimal(saved_s)} s")
    yield Tile("sent from the store", formats.size(newest.get("oncegate_replayed_bytes_total")))
    tokens = {kind: newest.get(TOKENS, kind) for kind in TOKEN_KINDS}
    if any(tokens.values()):
        parts = ", ".join(f"{formats.count(number)} {kind}" for kind, number in tokens.items() if number)
        yield Tile("LLM tokens", formats.count(sum(tokens.values())), "", parts)
    if any(prices.values()):
        money = sum(price_of(newest.tokens_by_rule.get(rule, {}), its) for rule, its in prices.items())
        yield Tile("money", formats.money(money), "", "by the token_prices of the rules")


def outcomes(history: History) -> list[OutcomeRow]:
    """Return the outcomes that there were, the most frequent first."""
    totals = history.newest.by_label(REQUESTS)
    rows = [OutcomeRow(name, history.growth((REQUESTS, name)), total) for name, total in totals.items() if total]
    return sorted(rows, key=lambda row: (-row.minute, -row.total, row.name))


def store_facts(settings: Settings, look: Look, history: History) -> Iterator[tuple[str, str]]:
    """Yield where the store is and what a claim has to reach, and how busy it is."""
    newest, url = history.newest, settings.store_url.get_secret_value()
    kind = "PostgreSQL" if is_postgres(url) else "embedded" if url == "embedded" else "Redis"
    yield "store", kind if url == "embedded" else f"{kind}, {masked(url)}"
    yield "store says", look.store_error or "it answers"
    yield "a claim counts once in", settings.durability
    middle, high = (history.quantile(share, "oncegate_store_seconds", "claim") for share in (0.5, 0.99))
    if middle is not None and high is not None:
        yield "time of a claim", f"half ≤ {formats.duration(middle)}, 99 % ≤ {formats.duration(high)}"
    if ratio := newest.get("oncegate_store_memory_ratio"):
        yield "memory of the store", f"{ratio:.0%} of its limit"
    if quarantine_s := newest.get("oncegate_quarantine_seconds"):
        yield "quarantine", f"first-time keys are refused for {formats.age(quarantine_s * 1000)}"
    if look.proxies:
        yield "replicas on this store", replicas(look.proxies)
    yield "workers here", formats.count(newest.get("oncegate_workers"))
    yield "restarts of workers", formats.count(newest.get("oncegate_worker_restarts_total"))
    yield "bodies in memory", formats.size(newest.get("oncegate_buffered_bytes"))


def replicas(proxies: Sequence[str]) -> str:
    """Return how many replicas serve, and each by its host with its workers. `proxies`: names, `HOST pid NUMBER`."""
    workers = Counter(name.partition(" ")[0] for name in proxies)
    named = [f"{host} ({number} {'worker' if number == 1 else 'workers'})" for host, number in sorted(workers.items())]
    more = [f"and {len(named) - MOST_REPLICAS} more"] if len(named) > MOST_REPLICAS else []
    return f"{len(named)}: {', '.join(named[:MOST_REPLICAS] + more)}"
