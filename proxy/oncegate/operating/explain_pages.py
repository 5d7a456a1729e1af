"""What `oncegate check --explain` says about pages of other origins. Pure."""

from oncegate.adaptation.cors import Cors, DecidedBy
from oncegate.adaptation.origins import origin_of
from oncegate.adaptation.preflight import Preflight
from oncegate.messages.fields import Fields


def page_right(cors: Cors, fields: Fields) -> str:
    """Return what a page may read of the response to its request."""
    origin = origin_of(fields)
    if not origin:
        return "no Origin, so that no page of another origin sent it"
    if origin not in cors.origins:
        return f"{origin.decode('latin-1')} may not read oncegate's own answers: cors_origins does not have it"
    own = f"{origin.decode()} may read oncegate's own answers and replays"
    return own + (
        ", and what the API grants" if cors.decided_by is DecidedBy.API else ", and what the API does not refuse"
    )


def preflight_result(preflight: Preflight | None) -> str:
    """Return who answers a preflight; None: its origin is not listed."""
    if preflight is None:
        return "preflight passed on: a rule that the request may match does not list its origin"
    if preflight.is_decided_by_api:
        return "preflight passed on: the API decides (cors_by = api)"
    if not preflight.asks_api:
        return "preflight granted by oncegate: the API is not asked (cors_by = oncegate)"
    return "preflight passed on, and granted by oncegate if the API has no CORS code (cors_by = auto)"
