"""The tokens of people and tools, from a file of lines `ROLE NAME TOKEN`. Their text is not kept."""

import hmac
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from oncegate.admin.roles import Role
from oncegate.settings.errors import SettingsError
from oncegate.settings.files import MAX_SECRET_BYTES, read_text

SETTING = "ONCEGATE_ADMIN_TOKENS_FILE"
MIN_TOKEN_CHARACTERS = 16
# What a header can carry as a bearer token (RFC 6750, section 2.1).
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_NAME = re.compile(r"[A-Za-z0-9._@+-]{1,64}")
# Names of visitors without a token.
_TAKEN = ("loopback", "nobody")


@dataclass(frozen=True, slots=True)
class Token:
    """One token: whose it is, its digest, and the key that signs the sessions that began with it."""

    name: str
    role: Role
    digest: bytes
    session_key: bytes

    @property
    def id(self) -> str:
        """What a session calls this token."""
        return sha256(self.session_key).hexdigest()[:16]


class Tokens:
    """All tokens of a file."""

    def __init__(self, tokens: Iterable[Token] = ()) -> None:
        self._tokens = tuple(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def find(self, text: str) -> Token | None:
        """Return the token of this text. The time does not depend on how much of it is right."""
        digest = _digest(text)
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    def with_id(self, name: str) -> Token | None:
        """Return the token that a session names, if it still exists."""
        return next((token for token in self._tokens if token.id == name), None)


def load_tokens(path: Path | None) -> Tokens:
    """Return the tokens of a file, none without a file. Raises SettingsError with all mistakes; none has a token."""
    if path is None:
        return Tokens()
    try:
        lines = _private_text(path).splitlines()
    except ValueError as error:
        raise SettingsError([f"{SETTING}: {error}"]) from None
    entries = {number: words for number, line in enumerate(lines, 1) if (words := line.partition("#")[0].split())}
    problems = [f"{SETTING}: line {number} {reason}" for number, reason in _problems(entries)]
    if not entries:
        problems = [f"{SETTING}: the file has no token; write a line such as: operate ana TOKEN"]
    if problems:
        raise SettingsError(problems)
    return Tokens(_token(*words) for words in entries.values())


def _private_text(path: Path) -> str:
    """Return the content of a file that not everybody can read. Raises ValueError."""
    text = read_text(path, MAX_SECRET_BYTES)
    if os.stat(path).st_mode & stat.S_IROTH:
        raise ValueError("everybody on this machine can read the file; chmod o-r")
    return text


def _problems(entries: dict[int, list[str]]) -> Iterator[tuple[int, str]]:
    """Yield the mistakes of lines by their number."""
    first: dict[str, int] = {}
    for number, words in entries.items():
        if len(words) != 3 or words[0] not in ("view", "operate"):
            yield number, "is not ROLE NAME TOKEN, where ROLE is view or operate"
            continue
        _, name, token = words
        if _NAME.fullmatch(name) is None or name in _TAKEN:
            yield number, "has a name that is not 1 to 64 letters, digits or ._@+-, or that oncegate itself uses"
        if len(token) < MIN_TOKEN_CHARACTERS:
            yield number, f"has a token of under {MIN_TOKEN_CHARACTERS} characters; write one of: openssl rand -hex 32"
        elif _TOKEN.fullmatch(token) is None:
            yield number, "has a token with characters that no bearer token has; write one of: openssl rand -hex 32"
        if token in first:
            yield number, f"has the token of line {first[token]}; each role and name needs a token of its own"
        first.setdefault(token, number)


def _token(role: str, name: str, token: str) -> Token:
    session_key = hmac.digest(_digest(token), b"sessions of the admin pages", sha256)
    return Token(name, Role[role.upper()], _digest(token), session_key)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogateescape")).digest()
