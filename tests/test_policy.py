"""Which statuses release a key, which leave it unknown, and which are stored."""

import pytest

from oncegate.decision import Disposition
from oncegate.rules.policy import DEFAULT_STATUSES, Policy, Statuses

STORE, RELEASE, AMBIGUOUS = Disposition.STORE, Disposition.RELEASE, Disposition.AMBIGUOUS


@pytest.mark.parametrize("retry_after", [False, True])
def test_the_defaults(retry_after):
    """401, 425, 429 and 503 with Retry-After release, 502 and 504 are ambiguous, all else is stored."""
    expected = {401: RELEASE, 425: RELEASE, 429: RELEASE, 502: AMBIGUOUS, 504: AMBIGUOUS}
    if retry_after:
        expected[503] = RELEASE
    for status in range(200, 600):
        assert DEFAULT_STATUSES.disposition(status, retry_after) is expected.get(status, STORE), status


def test_a_policy_has_the_defaults():
    """A policy without statuses and mode has the defaults, and executes at most once."""
    assert Policy.__dataclass_fields__["statuses"].default is DEFAULT_STATUSES
    assert Policy.__dataclass_fields__["mode"].default == b"hold"


@pytest.mark.parametrize(
    ("release", "ambiguous", "status", "retry_after", "disposition"),
    [
        # a condition beats a code ...
        (["503+retry-after"], ["503"], 503, True, RELEASE),
        (["503+retry-after"], ["503"], 503, False, AMBIGUOUS),
        (["503"], ["503+retry-after"], 503, True, AMBIGUOUS),
        (["503"], ["503+retry-after"], 503, False, RELEASE),
        # ... and a class,
        (["503+retry-after"], ["5xx"], 503, True, RELEASE),
        (["503+retry-after"], ["5xx"], 503, False, AMBIGUOUS),
        (["503+retry-after"], ["5xx"], 500, True, AMBIGUOUS),
        (["5xx"], ["503+retry-after"], 503, True, AMBIGUOUS),
        # a code beats a class,
        (["429"], ["4xx"], 429, False, RELEASE),
        (["429"], ["4xx"], 429, True, RELEASE),
        (["429"], ["4xx"], 428, False, AMBIGUOUS),
        (["4xx"], ["429"], 429, False, AMBIGUOUS),
        (["4xx"], ["429"], 430, False, RELEASE),
        # a class is that class alone,
        (["5xx"], [], 500, False, RELEASE),
        (["5xx"], [], 599, True, RELEASE),
        (["5xx"], [], 499, False, STORE),
        (["2xx"], ["3xx"], 200, False, RELEASE),
        (["2xx"], ["3xx"], 399, False, AMBIGUOUS),
        (["2xx"], ["3xx"], 400, False, STORE),
        # a condition alone says nothing of answers without it,
        (["429+retry-after"], [], 429, False, STORE),
        (["429+retry-after"], [], 429, True, RELEASE),
        (["429+retry-after"], [], 503, True, STORE),
        # what is in neither is stored, and case does not count.
        ([], [], 401, False, STORE),
        ([], [], 502, True, STORE),
        ([], [], 503, True, STORE),
        (["503+Retry-After", "4XX"], [], 503, True, RELEASE),
        (["503+Retry-After", "4XX"], [], 404, False, RELEASE),
        (["429", "429"], [], 429, False, RELEASE),
    ],
)
def test_a_condition_beats_a_code_and_a_code_beats_a_class(release, ambiguous, status, retry_after, disposition):
    """The most specific entry of both lists decides. A status in neither list is stored."""
    assert Statuses(release, ambiguous).disposition(status, retry_after) is disposition


@pytest.mark.parametrize(
    ("release", "ambiguous"),
    [
        (["429"], ["429"]),
        (["5xx"], ["5xx"]),
        (["5XX"], ["5xx"]),
        (["503+retry-after"], ["503+Retry-After"]),
        (["401", "425", "503"], ["502", "503"]),
    ],
)
def test_the_same_entry_in_both_lists_is_an_error(release, ambiguous):
    """An entry in both lists is an error, and the message has the entry."""
    with pytest.raises(ValueError, match="is in both lists"):
        Statuses(release, ambiguous)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "entry",
    [
        *("", " ", "x", "4x", "xx", "xxx", "4xxx", "40x", "4", "42", "4290", "0429", "00429", "429 ", " 429", "+429"),
        *("-429", "429.0", "4_29", "0x1ad", "4e2", "four", "*", "429,503", "429-431", "9" * 5000),
        *("0", "000", "100", "101", "199", "600", "999", "0xx", "1xx", "6xx", "9xx"),
        *("+retry-after", "5xx+retry-after", "503+", "503 +retry-after", "503+retry-after ", "503+retryafter"),
        *("503+retry-after+retry-after", "503-retry-after", "retry-after", "503+date", "199+retry-after"),
        *("\u0664\u0662\u0669", "\uff14\uff12\uff19", "4\u00b29", "42\uff19"),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_malformed_entry_is_an_error(place, entry):
    """An entry of either list is a final status, a class of statuses, or a status with a condition."""
    lists: list[list[str]] = [["429"], ["502"]]
    lists[place].append(entry)
    with pytest.raises(ValueError, match="is not a status such as"):
        Statuses(*lists)
