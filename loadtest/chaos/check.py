"""The judge: `python -m loadtest.chaos.check FOLDER` reads the logs of a run and tells whether the promise held.

It shares no code with the programs of the run. It believes the logs of the clients and of the upstream, and the
timeline of faults. Of the proxies it reads only their reports of claims that the store lost, to check their honesty.
Exit code 0: the promise held; 1: it did not; 2: the run is void.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loadtest.chaos.history import Act, Attempt, Case, Fault, History

DEFINITE_SHARE = 0.99
SLACK_S = 1.0  # what the promise adds to a lease
LATE_S = 0.2  # how late the API may see what was sent, while nothing is broken
FULL_TAIL_S = 5.0  # after which the proxies know that a store is no longer full
SHOWN = 20

NOT_SENT = frozenset(("store-unavailable", "upstream-unreachable", "overloaded"))
# Answers that say nothing of the key: whoever gets one comes again.
TRANSIENT = frozenset(("store-unavailable", "overloaded"))
NO_ANSWER = frozenset(("none", "timeout", "refused", "left", "cut"))
FINAL = frozenset(("outcome-unknown", "cancelled", "response-not-kept", "key-reused"))
UNKNOWN = frozenset(("outcome-unknown", "cancelled"))
NO_OWNER = frozenset(("in-flight", "key-reused", "response-not-kept"))
# Answers of the upstream after which nobody can know.
BAD = frozenset(("cut-length", "cut-chunks", "cut-head", "garbage", "silent", "gateway", "made-up", "part"))
# Answers that somebody between the proxy and the API makes up, though the API ran.
MADE_UP = frozenset(("gateway", "made-up"))
# Faults that make no outcome unknown, by contract: a client that leaves, a slow wire, a store without its scripts.
HARMLESS = ("client-link", "script-flush", "upstream-link-slow", "store-full")
# Faults that may end a connection cleanly in the middle of an answer that is ended by closing.
CLEAN_ENDS = ("upstream-kill", "upstream-link-end", "upstream-link-cut-after", "client-link-cut-after")

# What a store's loss may lead to. An answer lost leaves its claim, so that nothing is executed again.
EXCUSES = {"claims": ("I1", "I2", "I6", "I7", "I9", "I10", "I11", "I12"), "answers": ("I2", "I10", "I12")}
# A store that promises to lose claims alone says nothing of an answer that was on one server: its key becomes unknown.
TO_UNKNOWN = "answers to unknown"
FORGOTTEN = frozenset(("in-flight", *UNKNOWN))  # until its lease is over, and from then on


class Found(NamedTuple):
    """A violation of an invariant. `since`, `until`: when it happened."""

    invariant: str
    text: str
    since: float = 0.0
    until: float = 0.0
    is_forgotten: bool = False  # an answer has become unknown


Rule = Callable[[Case, History], Iterator[Found]]


# At most once ...


def at_most_once(case: Case, _: History) -> Iterator[Found]:
    """I1: a key is executed once. Executions that the upstream declined do not count."""
    counted = case.counted
    for one in counted[1:]:
        first = counted[0]
        yield Found("I1", f"executed again: {first.id} ({first.kind}), then {one.id}", first.begun, one.begun)


def one_executor(case: Case, _: History) -> Iterator[Found]:
    """I1: at most one client is told that its request was executed just now."""
    told = [a for a in case.attempts if a.whole and a.word == "executed"]
    for one in told[1:]:
        yield Found("I1", f"executed twice, as clients were told at {told[0].ended:.3f} and {one.ended:.3f}",
                    told[0].begun, one.ended)  # fmt: skip


def nothing_behind_a_refusal(case: Case, _: History) -> Iterator[Found]:
    """I9: no execution belongs to a client that was told that nothing was sent."""
    for one in case.executions:
        if not any(a.replica == one.replica and a.begun <= one.begun and _may_own(a) for a in case.attempts):
            yield Found("I9", f"{one.id} was executed for nobody, or for one who was told that nothing was sent",
                        one.begun, one.begun)  # fmt: skip


def _may_own(attempt: Attempt) -> bool:
    return _may_have_claimed(attempt) and attempt.slug not in NOT_SENT


# One truth ...


def one_truth(case: Case, history: History) -> Iterator[Found]:
    """I2: all stored responses of a key are the same."""
    stored = [a for a in case.attempts if a.stored]
    for one in stored[1:]:
        if one.digest != stored[0].digest and not _ended_by_closing(case, history):
            yield Found("I2", f"two answers: {_brief(stored[0])} and {_brief(one)}", stored[0].begun, one.ended)


def kept(case: Case, history: History) -> Iterator[Found]:
    """I2, I3: once a client has a stored response, every later client gets the same one."""
    first = min((a for a in case.attempts if a.stored), key=lambda a: a.ended, default=None)
    if first is None:
        return
    bare = _kept_bare(case, first.ended, history)
    for a in case.attempts:
        if a.begun <= first.ended or a.how in NO_ANSWER or a.slug in TRANSIENT:
            continue
        good = a.slug == "key-reused" if a.variant != first.variant else a.replayed and a.stored
        if not good and not (bare and a.slug == "response-not-kept"):
            text = f"answered by {_brief(first)}, later by {_brief(a)}"
            yield Found("I2", text, first.ended, a.ended, a.slug in FORGOTTEN)


def _kept_bare(case: Case, until: float, history: History) -> bool:
    """Return whether the response may be stored without its body: too large, or the store was full."""
    if any(one.kind == "oversize" for one in case.executions):
        return True
    full = [fault for fault in history.faults if fault.kind == "store-full"]
    return any(fault.touches(one.begun, until, FULL_TAIL_S) for fault in full for one in case.executions)


def faithful(case: Case, history: History) -> Iterator[Found]:
    """I6, I4: a response that a client got complete is one that the upstream sent complete, for this request."""
    for a in case.attempts:
        if a.how == "garbage":
            yield Found("I6", "bytes that are no answer", a.begun, a.ended)
        if not a.whole or a.slug or _is_made_up(a, case):
            continue
        one = history.executions.get(a.execution)
        if one is None:
            yield Found("I6", f"an answer that the upstream never gave: {_brief(a)}", a.begun, a.ended)
        elif (one.tenant, one.key) != case.name:
            yield Found("I4", f"an answer that belongs to {one.tenant}/{one.key}", a.begun, a.ended)
        elif a.word != "reconciled" and one.digest != a.digest and not _ended_by_closing(case, history):
            what = "differs from" if one.how in ("whole", "declined") else f"({one.how}) is told as complete:"
            yield Found("I6", f"the upstream's answer {one.id} {what} {_brief(a)}", a.begun, a.ended)


def _is_made_up(a: Attempt, case: Case) -> bool:
    """Return whether a client got the answer of a gateway, and was told that the outcome is unknown."""
    return not a.execution and a.word == "unknown" and any(one.kind in MADE_UP for one in case.executions)


def _ended_by_closing(case: Case, history: History) -> bool:
    """Return whether a clean end inside a close-delimited response was possible: its framing cannot show it."""
    if not any(one.kind == "eof" for one in case.executions):
        return False
    since, until = case.attempts[0].begun, max(attempt.ended for attempt in case.attempts)
    return any(fault.kind.startswith(CLEAN_ENDS) for fault in history.touching(since, until))


# Tenants and requests apart ...


def true_verdict(case: Case, history: History) -> Iterator[Found]:
    """I13: what the API says later of an unknown key is true: it names an execution that was there, and that counts."""
    for a in case.attempts:
        if a.word != "reconciled" or not a.whole or a.slug:
            continue
        one = history.executions.get(a.execution)
        if one is None or one.how == "declined" or one.begun > a.ended:
            yield Found("I13", f"settled by a verdict that is not true: {_brief(a)}", a.begun, a.ended)


def own_answer(case: Case, _: History) -> Iterator[Found]:
    """I4, I7: a response echoes the tenant, the key and the variant of the request that got it."""
    for a in case.attempts:
        if not a.whole or not a.echo or a.echo == f"{a.tenant} {a.key} {a.variant}":
            continue
        tenant, key, _variant = a.echo.split(" ")
        invariant = "I7" if (tenant, key) == case.name else "I4"
        yield Found(invariant, f"variant {a.variant} got the answer to {a.echo!r}", a.begun, a.ended)


def one_request(case: Case, _: History) -> Iterator[Found]:
    """I7: a different request under a used key is refused, and only such a request is refused."""
    variants = sorted({one.variant for one in case.counted} - {"?"})
    if len(variants) > 1:
        yield Found("I7", f"executed as variants {variants}", case.counted[0].begun, case.counted[-1].begun)
    holder = next((one for one in case.counted if one.variant != "?"), None)
    for a in case.attempts:
        if a.slug == "key-reused" and not any(b.variant != a.variant and b.begun < a.ended for b in case.attempts):
            yield Found("I7", "refused as another request, though there was no other", a.begun, a.ended)
        if holder and a.variant != holder.variant and a.begun > holder.begun and not _refused_rightly(a):
            yield Found("I7", f"variant {a.variant} of a request that was executed as {holder.variant} got {_brief(a)}",
                        holder.begun, a.ended)  # fmt: skip


def _refused_rightly(a: Attempt) -> bool:
    return a.slug == "key-reused" or a.slug in TRANSIENT or a.how in NO_ANSWER


# Nobody hangs ...


def in_flight_no_longer(case: Case, history: History) -> Iterator[Found]:
    """I10: a key is in flight only while a client may be executing it, plus a lease and a second."""
    for a in case.attempts:
        if a.slug != "in-flight":
            continue
        others = [b for b in case.attempts if b is not a and b.begun < a.ended]
        owners = [b for b in others if _may_have_claimed(b) or _is_claiming(b, a.ended, history)]
        if not owners:
            yield Found("I10", "in flight, though nobody can have claimed it", a.begun, a.ended)
        elif a.begun > owners[-1].ended + SLACK_S and a.begun > (latest := _latest(case, owners, a.begun, history)):
            yield Found("I10", f"still in flight at {a.begun:.3f}, {a.begun - latest:.3f} s too long", latest, a.begun)


def _may_have_claimed(attempt: Attempt) -> bool:
    # An owner that a verdict has fenced gets what the API said.
    got_another_s = attempt.word == "joined" or (attempt.replayed and attempt.word != "reconciled")
    return not (attempt.slug in NO_OWNER or got_another_s or attempt.how == "refused")


def _is_claiming(attempt: Attempt, at: float, history: History) -> bool:
    """Return whether its claim may have been in the store at a time, unconfirmed, whatever it was told in the end."""
    faults = history.touching(attempt.begun, attempt.ended)
    return attempt.ended > at and any(fault.place.startswith("store") for fault in faults)


def _latest(case: Case, owners: list[Attempt], at: float, history: History) -> float:
    """Return until when a key that one of these attempts claimed may be called in flight."""
    ends = [b.ended for b in owners] + [one.ended for one in case.executions if one.begun <= at]
    grace_s = history.facts["lease_s"] + SLACK_S
    replicas = {b.replica for b in owners}
    for fault in history.touching(owners[0].begun, at):
        if fault.replica is None or fault.replica in replicas:
            late_s = history.facts["upstream_timeout_s"] if fault.kind.startswith("upstream") else 0.0
            ends.append(fault.ended + late_s)
    return float(max(ends) + grace_s)


def answered(case: Case, history: History) -> Iterator[Found]:
    """I10: no client times out while nothing is broken."""
    for a in case.attempts:
        if a.how == "timeout" and not _explained(history.touching(a.begun, a.ended), {a.replica}, harmless=()):
            yield Found("I10", "no answer, and nothing was broken", a.begun, a.ended)


# What somebody stopped ...


def stays_stopped(case: Case, history: History) -> Iterator[Found]:
    """I11: once a client was told that a request was stopped, nothing is executed, and nobody gets its response.

    What was sent before may arrive afterwards, on a slow wire or at an API that the machine stalls.
    """
    told = min((a for a in case.attempts if a.slug == "cancelled"), key=lambda a: a.ended, default=None)
    if told is None:
        return
    for one in case.executions:
        late = one.begun > told.ended + LATE_S
        if late and not _explained(history.touching(told.begun, one.begun), {one.replica}, harmless=()):
            yield Found("I11", f"{one.id} was executed after it was stopped", told.ended, one.begun)
    for a in case.attempts:
        if a.begun > told.ended and a.stored:
            yield Found("I11", f"told as stopped at {told.ended:.3f}, later {_brief(a)}", told.ended, a.ended)


def somebody_stopped_it(case: Case, _: History) -> Iterator[Found]:
    """I11: a request is stopped by somebody: a client that left, or one that was at its address."""
    causes: list[Attempt | Act] = [*case.attempts, *case.acts]
    for told in case.attempts:
        if told.slug == "cancelled" and not any(_may_stop(one) and one.begun < told.ended for one in causes):
            yield Found("I11", "told as stopped, though nobody left and nobody stopped it", told.begun, told.ended)


def _may_stop(one: Attempt | Act) -> bool:
    return one.act == "stop" if isinstance(one, Act) else one.how != "whole"


def asked_in_vain(case: Case, _: History) -> Iterator[Found]:
    """I12: what somebody is told of a key is true: nothing of one that was executed before, no more after a while."""
    for one in case.acts:
        if one.act != "ask" or one.status not in (200, 404):
            continue
        before = [a for a in case.attempts if a.stored and a.ended < one.begun and a.variant == "0"]
        if before and one.said != "complete":
            yield Found("I12", f"{one.said or one.status}, though it had been answered by {_brief(before[0])}",
                        before[0].ended, one.ended, one.said in ("in_flight", "unknown"))  # fmt: skip


def unknown_has_a_reason(case: Case, history: History) -> Iterator[Found]:
    """Every unknown outcome has a fault in its time window, on the path of the key, that can cause it."""
    told = next((a for a in case.attempts if a.slug in UNKNOWN), None)
    # Of one that was stopped `somebody_stopped_it` asks; it may be told as unknown alone, where its owner died.
    if told is None or told.slug == "cancelled" or any(one.kind in BAD for one in case.executions):
        return
    before = [a for a in case.attempts if a.begun < told.ended]
    # An API that closes behind its early answer resets a slow wire with the answer still on it.
    is_early = any(one.kind == "early" for one in case.executions)
    harmless = tuple(kind for kind in HARMLESS if not (is_early and kind == "upstream-link-slow"))
    if not _explained(history.touching(before[0].begun, told.ended), {a.replica for a in before}, harmless):
        yield Found("unknown", "unknown, and nothing was broken that could make it so", before[0].begun, told.ended)


def _explained(faults: Iterable[Fault], replicas: set[int], harmless: tuple[str, ...] = HARMLESS) -> bool:
    return any(
        (fault.replica is None or fault.replica in replicas) and not (harmless and fault.kind.startswith(harmless))
        for fault in faults
    )


def _brief(a: Attempt) -> str:
    what = a.slug or f"{a.execution} {a.digest}"
    return f"{a.how} {a.status} {a.word} {what} at {a.ended:.3f}"


RULES: tuple[Rule, ...] = (
    at_most_once,
    one_executor,
    nothing_behind_a_refusal,
    one_truth,
    kept,
    faithful,
    true_verdict,
    own_answer,
    one_request,
    in_flight_no_longer,
    answered,
    stays_stopped,
    somebody_stopped_it,
    asked_in_vain,
    unknown_has_a_reason,
)


# The whole ...


def is_definite(case: Case) -> bool:
    """Return whether a client of this key knows its outcome."""
    return any(a.whole and (a.stored or a.slug in FINAL) for a in case.attempts)


def excused(found: Found, history: History) -> bool:
    """Return whether a loss of the store explains it, and the proxies reported that loss afterwards if they must."""
    losses = [fault for fault in history.faults if fault.loses and fault.touches(found.since, found.until)]
    if found.is_forgotten and any(fault.loses == TO_UNKNOWN for fault in losses):
        return True
    told = [fault for fault in losses if found.invariant in EXCUSES.get(fault.loses, ())]
    return any(at >= loss.begun for loss in told for at in history.reports)


def judge(history: History) -> dict[str, Any]:
    """Return the verdict on a run."""
    found: list[tuple[str, Found]] = [("", Found("I4", f"two requests in one: {what}")) for what in history.mixed]
    forgiven = 0
    for case in history.cases.values():
        if not case.attempts:
            if case.name[1] != "?":
                found.append(("/".join(case.name), Found("I4", "executed, though nobody asked for it")))
            continue
        for rule in RULES:
            for one in rule(case, history):
                if excused(one, history):
                    forgiven += 1
                else:
                    found.append(("/".join(case.name), one))
    if history.reports and not any(fault.loses in EXCUSES for fault in history.faults):
        found.append(("", Found("I1'", f"{len(history.reports)} claims reported as lost, and the store lost nothing")))
    asked = [case for case in history.cases.values() if case.attempts]
    definite = sum(map(is_definite, asked))
    if definite < DEFINITE_SHARE * len(asked):
        found.append(("", Found("I10", f"only {definite} of {len(asked)} keys reached a definite outcome")))
    return {
        "violations": [{"key": key, **one._asdict()} for key, one in sorted(found, key=lambda one: one[1].until)],
        "excused": forgiven,
        "figures": figures(history, asked, definite),
        "void": void(history),
    }


def void(history: History) -> list[str]:
    """Return the reasons why a run proves nothing; empty if it proves something."""
    reasons = [f"a fault failed: {what}" for what in history.facts["failed_faults"]]
    if not history.facts["finished"]:
        reasons.append("a client did not finish")
    if not history.faults:
        reasons.append("there were no faults")
    if not history.executions:
        reasons.append("there were no executions")
    return reasons


def figures(history: History, asked: list[Case], definite: int) -> dict[str, Any]:
    """Return the figures of the report."""
    attempts = [a for case in asked for a in case.attempts]
    unknown = [case for case in asked if any(a.slug in UNKNOWN for a in case.attempts)]
    acts = [one for case in asked for one in case.acts]
    return {
        "requests": len(attempts),
        "seconds": round(history.facts["calm"] - history.facts["begun"], 1),
        "keys": len(asked),
        "definite": definite,
        "answered": sum(any(a.stored for a in case.attempts) for case in asked),
        "executions": len(history.executions),
        "declined": sum(one.how == "declined" for one in history.executions.values()),
        "replays": sum(a.replayed and a.whole for a in attempts),
        "raced keys": sum(_raced(case) for case in asked),
        "keys asked for as two requests": sum(len({a.variant for a in case.attempts}) > 1 for case in asked),
        "joined": sum(a.word == "joined" and a.whole for a in attempts),
        "keys unknown": len(unknown),
        "of them by the upstream's answer": sum(any(one.kind in BAD for one in case.executions) for case in unknown),
        "keys settled by what the API said": sum(any(a.word == "reconciled" for a in case.attempts) for case in asked),
        "of them stopped": sum(any(a.slug == "cancelled" for a in case.attempts) for case in unknown),
        "asked to stop, with the answers": dict(Counter(str(one.status) for one in acts if one.act == "stop")),
        "questions, with the answers": dict(Counter(one.said or str(one.status) for one in acts if one.act == "ask")),
        "faults": len(history.faults),
        "faults by kind": dict(sorted(Counter(fault.kind for fault in history.faults).items())),
        "answers": dict(Counter(_outcome(a) for a in attempts).most_common()),
        "loss reports": len(history.reports),
        "share of the time in which the machine stalled a process": round(covered(history, history.stalls), 2),
        "share of the time in which a fault could make an outcome unknown": round(covered(history, history.faults), 2),
    }


def _raced(case: Case) -> bool:
    return any(b.begun < a.ended for a, b in zip(case.attempts, case.attempts[1:], strict=False))


def _outcome(a: Attempt) -> str:
    return a.slug or f"{a.word} {a.status}" if a.whole else a.how


def covered(history: History, faults: list[Fault]) -> float:
    """Return the share of the run in which one of these faults could make an outcome unknown."""
    begun, calm = history.facts["begun"], history.facts["calm"]
    reached = begun
    total = 0.0
    for fault in faults:
        if not fault.kind.startswith(HARMLESS):
            total += max(0.0, min(fault.ended, calm) - max(fault.begun, reached))
            reached = max(reached, fault.ended)
    return float(total / max(calm - begun, 0.001))


def say(verdict: dict[str, Any]) -> None:
    """Print a verdict for people."""
    for name, value in verdict["figures"].items():
        text = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {text}")
    violations = verdict["violations"]
    if verdict["excused"]:
        print(f"excused, because the store lost data and it was reported: {verdict['excused']}")
    for one in violations[:SHOWN]:
        print(f"VIOLATION {one['invariant']} {one['key']}: {one['text']}")
    if len(violations) > SHOWN:
        print(f"... and {len(violations) - SHOWN} more")
    for reason in verdict["void"]:
        print(f"VOID: {reason}")
    print("the promise held" if not violations and not verdict["void"] else f"{len(violations)} violations")


def main(folder: Path) -> int:
    verdict = judge(History(folder))
    (folder / "verdict.json").write_text(json.dumps(verdict, indent=1))
    say(verdict)
    return 1 if verdict["violations"] else 2 if verdict["void"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
