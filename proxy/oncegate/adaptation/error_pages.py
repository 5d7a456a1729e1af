"""Oncegate's own answers as pages: what a person reads whose browser navigated to one. Pure."""

from collections.abc import Mapping
from email.utils import formatdate
from functools import cache, partial
from importlib.resources import files
from typing import NamedTuple

from oncegate.adaptation.page_template import PageTemplate
from oncegate.keys.automatic import is_automatic
from oncegate.messages.fields import Fields
from oncegate.messages.problems import PROBLEM_KINDS, Problem, Render, Rendering
from oncegate.messages.request_head import RequestHead

# The name of the template for every problem that has none of its own, which is named by the slug.
COMMON = "page"
TEMPLATES = (COMMON, *PROBLEM_KINDS)
# Of a method that asks for nothing to be done (RFC 9110, section 9.2.1), nothing can have gone through.
_SAFE = ("GET", "HEAD", "OPTIONS")


class Words(NamedTuple):
    """What a page says. `kind` is for its style: running, done, unknown or refused."""

    kind: str
    title: str
    message: str
    advice: str


_RELOAD = "Reload this page in a moment. Your browser may ask whether to send the form again: here that is safe."
_ONLY_RELOAD = "Reload this page in a moment."
_LOOK = "Wait a moment. Then look at your orders or your account, and do not send it again before you have looked."
_NEW_FORM = "Open the page with the form anew, and fill it in there. Do not go back to the old one."
_ASK = "Start again from the first page of the site, or ask the people who run it."

_MAYBE = Words(
    "unknown",
    "This may have gone through",
    "Your order may have gone through, or your payment, or your message. We passed on what you sent, and do not know "
    "what became of it. We did not send it a second time.",
    "Before you try again, check whether it arrived: look at your orders or your account, or for a message from the "
    "site. If you cannot tell, ask the people who run it.",
)
_LATER = Words("refused", "Please try again in a moment", "Nothing was passed on, and nothing was done.", _RELOAD)
_OUTDATED = Words(
    "refused", "This form cannot be used", "It is out of date or incomplete. Nothing was passed on.", _NEW_FORM
)
_REFUSED = Words("refused", "This request cannot be handled", "Nothing was passed on, and nothing was done.", _ASK)
_NO_ANSWER = Words("refused", "The site did not answer", "It got your request, but sent no whole answer.", _ONLY_RELOAD)

_WORDS: Mapping[str, Words] = {
    "key-missing": _OUTDATED,
    "key-invalid": _OUTDATED,
    "scope-unstable": _REFUSED,
    "key-reused": Words(
        "refused",
        "This form was sent before",
        "It was sent before with other content, and can be used only once. What you sent now was not passed on.",
        f"What you sent first may have gone through: check that before you send it again. {_NEW_FORM}",
    ),
    "in-flight": Words(
        "running",
        "Still working on it",
        "The first request is still running. It was not started a second time.",
        _RELOAD,
    ),
    "outcome-unknown": _MAYBE,
    "response-not-kept": Words(
        "done",
        "This is done already",
        "What you sent was carried out before. Its answer was too large to keep, so we cannot show it again.",
        "Do not send it again. Look at your orders or your account for the result.",
    ),
    "key-expired": Words(
        "done",
        "This is done already",
        "What you sent was carried out before. That was too long ago to show its answer again.",
        "Do not send it again. Look at your orders or your account for the result.",
    ),
    "stream-gone": Words(
        "refused",
        "This cannot go on",
        "What was shown here before cannot be continued. Nothing was done anew.",
        "Open the page anew to see it from its beginning, if it is still kept.",
    ),
    "body-too-large": _REFUSED._replace(
        title="This is too large",
        message="It is larger than this site accepts. Nothing was passed on.",
        advice="Go back, and send less.",
    ),
    "store-unavailable": _LATER,
    "overloaded": _LATER,
    "upstream-unreachable": _LATER._replace(title="The site cannot be reached now"),
    "upstream-lost": _MAYBE,
    "upstream-timeout": _MAYBE,
    "record-corrupt": _MAYBE,
    "answer-not-stored": Words(
        "done",
        "This is done, and its answer is not here yet",
        "What you sent was carried out. We could not keep its answer in time.",
        _RELOAD,
    ),
}
# Of refusals, which have no slug.
_BY_STATUS: Mapping[int, Words] = {
    408: _LATER._replace(title="This took too long", message="It did not arrive whole. Nothing was passed on."),
    500: _MAYBE._replace(title="Something went wrong here"),
    503: _LATER,
}


def words_for(problem: Problem, method: str, *, reload_is_safe: bool) -> Words:
    """Return what a page says about a problem with a request of this method.

    `reload_is_safe`: the same request, however late, is still known to be the same.
    """
    words = _WORDS.get(problem.slug) or _BY_STATUS.get(problem.status, _REFUSED)
    if words.kind == "unknown":
        if method in _SAFE:
            return _NO_ANSWER
        # Under `on_unknown = "retry"` the same request is sent again.
        again = f"{_ONLY_RELOAD} It is sent once more then, though the first time may have gone through as well."
        return words._replace(advice=again) if problem.kind.retryable else words
    if words.advice is not _RELOAD or (reload_is_safe and method not in _SAFE):
        return words
    # Past its window, an equal form is a new one.
    return words._replace(advice=_ONLY_RELOAD if words.kind == "refused" else _LOOK)


@cache
def _built_in() -> PageTemplate:
    return PageTemplate(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))


def wants_page(choice: bool | None, fields: Fields) -> bool:
    """Return whether the client of a request reads pages. `choice` is its rule's: always, never, or None for neither.

    `Sec-Fetch-Mode` is a browser's word alone (Fetch Metadata, section 2.2). `Accept` does not tell: Java's
    HttpURLConnection asks for text/html first.
    """
    if choice is False:
        return False
    # A browser that does not navigate runs a script, which reads problems, also under a rule for people: browsers send
    # this field to https and localhost only.
    mode = fields.get(b"sec-fetch-mode")
    return bool(choice) if mode is None else mode == [b"navigate"]


class ErrorPages:
    """The pages of a proxy. A problem has the template of its slug, else the common one."""

    def __init__(self, templates: Mapping[str, PageTemplate] | None = None) -> None:
        """`templates`: the operator's, by the names of TEMPLATES."""
        self._templates = templates or {}
        self._common = self._templates.get(COMMON) or _built_in()

    def renderer(self, head: RequestHead, *, reload_is_safe: bool) -> Render:
        """Return what writes the answers to one request."""
        return partial(self._render, head, reload_is_safe)

    def _render(self, head: RequestHead, reload_is_safe: bool, problem: Problem, _docs_url: str) -> Rendering:
        template = self._templates.get(problem.slug, self._common)
        words = words_for(problem, head.method, reload_is_safe=reload_is_safe)
        time, key = formatdate(usegmt=True), str(problem.members.get("key", ""))
        # A browser's own says nothing to a person.
        key = "" if is_automatic(head.fields) else key
        reference = [f"{problem.code} ({problem.status})", time, *([f"key {key}"] if key else [])]
        values = {
            **words._asdict(),
            "reference": ", ".join(reference),
            "key": key,
            "time": time,
            "code": problem.code,
            "status": str(problem.status),
        }
        fields = problem.head_fields(b"text/html; charset=utf-8")
        fields += b"Content-Security-Policy: %s\r\nX-Content-Type-Options: nosniff\r\n" % template.policy.encode()
        return Rendering(problem.status, fields, template.fill(values), is_page=True)
