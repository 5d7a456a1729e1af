"""The rules as they are, and with one safeguard less: who takes part, and which promise breaks then."""

from typing import NamedTuple

from tests.model.rules import HOLD, RESEND, RETRY
from tests.model.world import Setting

SETTINGS = {
    "hold": Setting((HOLD, HOLD), streams=True, lost_claims=True, late_settles=True, hangs=True),
    "hold, three": Setting((HOLD, HOLD, HOLD), late_settles=True),
    "hold, operator": Setting((HOLD, HOLD), operator=True, lost_claims=True),
    "hold, operator, streams": Setting((HOLD, HOLD), operator=True, streams=True, late_settles=True),
    "hold, operator, three": Setting((HOLD, HOLD, HOLD), operator=True),
    "retry": Setting((RETRY, RETRY), lost_claims=True, late_settles=True),
    "retry, streams": Setting((RETRY, RETRY), streams=True, late_settles=True, hangs=True),
    "retry, three": Setting((RETRY, RETRY, RETRY)),
    "retry, operator": Setting((RETRY, RETRY), operator=True, streams=True),
    "hold, cancels": Setting((HOLD, HOLD), streams=True, late_settles=True, cancels=True),
    "retry, cancels": Setting((RETRY, RETRY), streams=True, late_settles=True, cancels=True),
    "retry, operator, cancels": Setting((RETRY, RETRY), operator=True, cancels=True),
    "hold, joins": Setting((HOLD, HOLD), streams=True, late_settles=True, joins=True),
    "retry, joins": Setting((RETRY, RETRY), streams=True, late_settles=True, joins=True),
    "retry, operator, joins": Setting((RETRY, RETRY), operator=True, streams=True, joins=True),
    "retry, cancels, joins": Setting((RETRY, RETRY), streams=True, cancels=True, joins=True),
    "hold, asks": Setting((HOLD, HOLD), streams=True, lost_claims=True, late_settles=True, asks=True),
    "hold, operator, asks": Setting((HOLD, HOLD), operator=True, late_settles=True, asks=True),
    "retry, cancels, asks": Setting((RETRY, RETRY), late_settles=True, cancels=True, asks=True),
    "hold, lands late": Setting((HOLD, HOLD), lost_claims=True, lands_late=True),
    "retry, lands late": Setting((RETRY, RETRY), lost_claims=True, lands_late=True),
    "hold, then retry": Setting((HOLD, RETRY), streams=True, late_settles=True),
    "retry, then hold": Setting((RETRY, HOLD), streams=True, late_settles=True),
    "resend": Setting((RESEND, RESEND), lost_claims=True, asks=True, api=True, forgets=True),
    "resend, late settles": Setting((RESEND, RESEND), late_settles=True, operator=True, api=True),
    "resend, cancels": Setting((RESEND, RESEND), cancels=True, api=True),
    # The third one is another request, or the API recognizes no keys for it.
    "resend, then hold": Setting((RESEND, RESEND, HOLD), api=True),
    "hold, then resend": Setting((HOLD, RESEND), lost_claims=True, api=True),
    "hold, reconciles": Setting((HOLD, HOLD), api=True, forgets=True, reconciles=True),
    "hold, cancels, reconciles": Setting((HOLD, HOLD), cancels=True, api=True, reconciles=True),
    "resend, reconciles": Setting((RESEND, RESEND), api=True, reconciles=True),
}


class Variant(NamedTuple):
    """`cut`: the safeguards that are left out; `breaks`: the promise that this breaks, "" for none."""

    setting: str
    cut: tuple[str, ...]
    breaks: str


# The safeguards, with what happens without them ...
WITHOUT = {
    # ... in the store:
    "ATOMIC": ("hold", "twice"),  # claim reads and writes in one step
    "KNOWN_AGAIN": ("hold", "itself"),  # a repeated claim is known by its token
    "NOT_AFTER": ("hold", "stray"),  # a claim does nothing after its deadline
    "UNKNOWN_STAYS": ("hold", "twice"),  # an unknown key is not free
    "LAPSED_IS_UNKNOWN": ("hold", "twice"),  # nor is one whose lease passed
    "RECORDS_OWN_MODE": ("hold, then retry", "twice"),  # the record's mode says whether it is open, not the newcomer's
    "AS_OF_NOW": ("retry, three", "robbed"),  # the script itself asks whether the record is open
    "AS_SEEN": ("retry, three", "unchecked"),  # and whether it is the one that the newcomer saw and checked
    "TOKEN_ON_APPEND": ("retry, streams", "zombie"),
    "TOKEN_ON_RENEW": ("retry, streams", "lapsed send"),
    "TOKEN_ON_STORE": ("retry, streams", "zombie"),
    "TOKEN_ON_RELEASE": ("hold, three", "twice"),
    "TOKEN_ON_UNKNOWN": ("retry", "zombie"),
    "CANCELLED_STAYS": ("retry, cancels", "twice"),  # a request that was cancelled is not executed by a retry
    "COUNTED": ("retry, streams", "torn"),  # a settle says how many pieces there have to be
    "FINAL": ("hold", "final"),  # a complete record stays what it is
    "OPERATOR_COMPARES": ("hold, operator, three", "twice"),  # an operator ends the claim that was looked at
    "OPERATOR_FENCES": ("hold, operator", "zombie"),  # and puts a token of its own
    "LEASE": ("hold", "stuck"),
    "FOLLOW_NAMES_CLAIM": (
        "retry, joins",
        "mixed",
    ),  # a reader goes on with the claim that it began with, or not at all
    # ... in the proxy:
    "WITHHELD": ("retry, streams", "differ"),  # the end of an answer waits for its settle
    "FENCED_IS_SILENT": ("retry, streams", "differ"),  # a fenced owner drops its own answer
    "CLAIMED_AGAIN": ("retry, streams", "lapsed send"),  # an old claim is asked for again before anything is sent
    "LOST_IS_UNKNOWN": ("hold", "twice"),  # what was sent and not answered is not released
    "WITHDRAWN_AT_ALL": ("hold", "stray"),  # a claim that was given up is released
    "WITHDRAWN_LATE": ("hold", "stray"),  # when it cannot arrive any more
    "COPIES_WITHDRAWN": ("hold", "stray"),  # also where its repeat was answered
    "ENDED_FIRST": ("hold, lands late", "stray"),  # and not before the server has ended it, where it may land late
    "RENEWED_ALIVE": ("hold", "stuck"),  # an exchange that hangs is not renewed
    "NOTE_NAMES_CLAIM": ("retry, cancels", "astray"),  # a cancel is for one claim, not for whoever has the key
    "OWNER_ENDS_IT": ("retry, cancels", "taken back"),  # who cancels tells the owner, and leaves the record alone
    "UNSENT_STAYS": ("retry, cancels", "twice"),  # what was stopped before it was sent is not free either
    "RESEND_OF_SAME": ("hold, then resend", "twice"),  # only what was sent with its key is sent on with it
    "RESEND_IN_TIME": ("resend", "twice"),  # and as long as the API recognizes the key
    "RESEND_KEEPS": ("resend, then hold", "twice"),  # what became of a resend frees no key
    "RESEND_STAYS": ("resend", "denied"),  # nor does a withdrawal of its claim
    "VERDICT_COMPARES": ("resend, reconciles", "overruled"),  # a verdict is about the claim that was looked at
    "VERDICT_SPARES": ("hold, reconciles", "overruled"),  # and not while its lease runs
    "VERDICT_AS_SEEN": ("hold, reconciles", "freed early"),  # nor if its owner was back meanwhile
    "VERDICT_LEAVES_STOPPED": ("hold, cancels, reconciles", "overruled"),  # and never about what somebody stopped
    "ABSENT_WAITS": ("hold, reconciles", "freed early"),  # "not found" counts when nothing can come any more
    "ABSENT_IN_TIME": ("hold, reconciles", "freed early"),  # and before the API forgets
    "ABSENT_AGREES": ("hold, reconciles", "freed early"),  # and if it was said more than once
    "OWN_REFERENCE": ("hold, reconciles", "made up"),  # an object that is another request's says nothing
    "STORED_FIRST": ("retry, joins", "unbacked"),  # a reader gets a clean end only where the store has the whole answer
}
VARIANTS = {
    **{f"the rules: {name}": Variant(name, (), "") for name in SETTINGS},
    **{f"without {safeguard}": Variant(at, (safeguard,), breaks) for safeguard, (at, breaks) in WITHOUT.items()},
    "without WITHHELD, under hold": Variant("hold", ("WITHHELD",), "unbacked"),
    "without OPERATOR_COMPARES, complete": Variant("hold, operator", ("OPERATOR_COMPARES",), "differ"),
    "without LOST_IS_UNKNOWN, asked": Variant("hold, asks", ("LOST_IS_UNKNOWN",), "denied"),
    "without ABSENT_WAITS, executed twice": Variant("hold, reconciles", ("ABSENT_WAITS",), "twice"),
    "without TOKEN_ON_STORE and FINAL": Variant("retry, streams", ("TOKEN_ON_STORE", "FINAL"), "differ"),
}
