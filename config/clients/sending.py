"""Sends one request until its outcome is known: one key for every try, few tries, growing and random pauses.

The key has to be made and stored before the first try: see `jobs.py`. Standard library alone; nothing in here
follows a redirect or repeats a request by itself.
"""

import email.utils
import http.client
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

TRY_AGAIN = frozenset((408, 409, 425, 429))  # and whatever is 500 or more


class Outcome(Enum):
    """What is known in the end."""

    ANSWERED = "answered"  # the API answered, now or at an earlier try; what it said is final for this key
    REFUSED = "refused"  # nothing was done, and the same request will be refused again
    UNKNOWN = "unknown"  # it was sent, and nobody knows what became of it: look there before you use another key
    OPEN = "open"  # the tries are used up: keep the key, and try again later with it


@dataclass(frozen=True)
class Patience:
    """How long to try. `timeout_s` is the longest silence of one try."""

    tries: int = 6
    timeout_s: float = 10.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 8.0
    longest_retry_after_s: float = 60.0


@dataclass(frozen=True)
class Answer:
    """A whole answer; the names of its headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after_s(self) -> float:
        """What Retry-After asks for: a number of seconds, or a date."""
        value = self.headers.get("retry-after", "0")
        if value.isdecimal():
            return float(value)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0


@dataclass(frozen=True)
class Result:
    """What became of the request, after how many tries; `answer`: the last that came whole."""

    outcome: Outcome
    answer: Answer | None
    tries: int


# Answers about an earlier try, which was executed.
OF_KEYS = {
    "response-not-kept": Outcome.ANSWERED,
    "key-expired": Outcome.ANSWERED,
    "record-corrupt": Outcome.UNKNOWN,
}


def judge(answer: Answer) -> Outcome | None:
    """Return what an answer settles; None: nothing yet, so the same request may go out again with the same key."""
    if answer.status < 200:  # `http.client` takes an interim answer (103) for the last
        return None
    again = answer.headers.get("x-should-retry") == "true"
    transient = answer.status in TRY_AGAIN or answer.status >= 500
    # A parameter, such as the reason of `unguarded`, says more of the word.
    match answer.headers.get("oncegate-status", "").partition(";")[0]:
        case "executed" | "replayed" | "joined" | "resumed" | "unguarded":
            return Outcome.ANSWERED
        case "released":  # the API declined, and the key is free again
            return None if transient else Outcome.REFUSED
        case "refused":  # by oncegate
            return None if again else OF_KEYS.get(_slug(answer), Outcome.REFUSED)
        case "unknown":
            return None if again else Outcome.UNKNOWN
        case _:  # something on the way answered, or the request is not guarded
            return None if answer.status in (429, 502, 503, 504) else Outcome.ANSWERED


def _slug(answer: Answer) -> str:
    said = json.loads(answer.body)
    # An answer to a JSON-RPC request has the problem as the data of its error.
    problem = said if "type" in said else said["error"]["data"]
    return str(problem["type"]).rpartition(":")[2]


Read = Callable[[http.client.HTTPResponse], bytes]


def attempt(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float, read: Read) -> Answer:
    """Send it once. OSError or HTTPException where no whole answer came."""
    place = urlsplit(url)
    scheme = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = scheme(place.hostname or "", place.port, timeout=timeout_s)
    try:
        connection.request("POST", place.path + (f"?{place.query}" if place.query else ""), body, dict(headers))
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        # A whole read says so where the end is missing; a read of pieces does not.
        return Answer(response.status, fields, read(response) if response.status < 300 else response.read())
    finally:
        connection.close()


def send(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    patience: Patience = Patience(),
    read: Read = http.client.HTTPResponse.read,
) -> Result:
    """Send it until its outcome is known or the tries are used up. The key is in `headers`, or in what is sent."""
    answer = None
    for number in range(1, patience.tries + 1):
        wait_s = 0.0
        try:
            answer = attempt(url, body, headers, patience.timeout_s, read)
        except (OSError, http.client.HTTPException):
            pass  # timed out, refused, cut off: nobody knows, so ask again with the same key
        else:
            if outcome := judge(answer):
                return Result(outcome, answer, number)
            wait_s = answer.retry_after_s
        if number == patience.tries or wait_s > patience.longest_retry_after_s:
            break
        longest_s = min(patience.longest_pause_s, patience.first_pause_s * 2 ** (number - 1))
        time.sleep(wait_s + random.uniform(0, longest_s))  # full jitter, so that clients do not come in waves
    return Result(Outcome.OPEN, answer, number)
