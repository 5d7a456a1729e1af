"""What a review shows, signed, so that a decision is about exactly that and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import Any

from itsdangerous import BadSignature, URLSafeTimedSerializer

from oncegate.operating.decisions import DONE, RESOLVE
from oncegate.operating.errors import OperatorError
from oncegate.operating.worklist import Seen
from oncegate.store.record_name import parse_record_id, record_id

# How long somebody may read a review before they decide.
LASTS_S = 900
TOO_OLD = "This review is too old, or not yours. Nothing was changed; look at the keys again"


@dataclass(frozen=True, slots=True)
class Answer:
    """The response that somebody wrote for keys: its status, its header fields one a line, its body."""

    status: str = ""
    headers: str = ""
    body: str = ""
    # Whether `body` is written in it.
    base64: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """A decision that is not made yet. `answer`: what somebody wrote to resolve the keys."""

    action: str
    seen: tuple[Seen, ...]
    answer: Answer | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it can be carried out."""
        return bool(self.seen) and (self.answer is not None) is (self.action == RESOLVE)

    def of(self, seen: Iterable[Seen]) -> "Draft":
        return replace(self, seen=tuple(seen))

    def with_answer(self, answer: Answer) -> "Draft":
        return replace(self, answer=answer)


def write_seen(seen: Seen) -> str:
    """Return a key as a form has it."""
    return f"{record_id(seen.key)}.{seen.token.hex()}.{seen.state}"


def read_seen(text: str) -> Seen:
    """Return the key in a form. Raises OperatorError for any other text."""
    name, _, rest = text.partition(".")
    token, _, state = rest.partition(".")
    key = parse_record_id(name)
    try:
        return Seen(key or b"", bytes.fromhex(token if key else "-"), state)
    except ValueError:
        raise OperatorError("This form is not of a page of oncegate") from None


class Signer:
    """Signs drafts, each for one visitor: with the secret that replicas share, or as long as this process lives."""

    def __init__(self, secret: str = "") -> None:
        # The name of the use keeps these signatures apart from all others by the same secret.
        self._serializer = URLSafeTimedSerializer(secret.encode() or token_bytes(32), "oncegate draft")

    def sign(self, draft: Draft, visitor: str) -> str:
        """Return a draft as a form carries it."""
        answer = draft.answer
        given = [answer.status, answer.headers, answer.body, answer.base64] if answer is not None else None
        return str(self._serializer.dumps([visitor, draft.action, [write_seen(one) for one in draft.seen], given]))

    def read(self, text: str, visitor: str) -> Draft:
        """Return the draft that a form carries. Raises OperatorError for one that this visitor was not shown."""
        try:
            whose, action, seen, given = self._load(text)
        except BadSignature:
            raise OperatorError(TOO_OLD) from None
        if whose != visitor or action not in DONE:
            raise OperatorError(TOO_OLD)
        return Draft(action, tuple(map(read_seen, seen)), Answer(*given) if given is not None else None)

    def _load(self, text: str) -> Any:
        return self._serializer.loads(text, max_age=LASTS_S)
