"""What `oncegate check` says of the listeners although they can serve."""

from collections.abc import Iterator
from ipaddress import ip_address

from oncegate.rules.model import Rules
from oncegate.settings.settings import Settings

_REBINDING = (
    "ONCEGATE_HOSTS is empty, and oncegate writes its own Host: a web page can reach this API under a name of its own "
    "that resolves to the loopback address (DNS rebinding), and the API cannot see that; for local use set "
    "ONCEGATE_HOSTS=localhost,127.0.0.1,[::1]"
)
_READABLE_TOKENS = (
    "ONCEGATE_ADMIN_TLS_CERT_FILE is not set, and ONCEGATE_ADMIN_LISTEN is no loopback address: tokens and logins "
    "cross the network readable, unless a proxy in front has TLS"
)


def listener_warnings(settings: Settings, rules: Rules) -> Iterator[str]:
    """Yield a warning where the checks of Host that a local API makes are without effect, and where others read tokens
    on their way."""
    if _is_loopback(settings.listen.host) and not settings.hosts and not all(rule.policy.pass_host for rule in rules):
        yield _REBINDING
    if settings.admin_tokens_file and not settings.admin_tls_cert_file and not _is_loopback(settings.admin_listen.host):
        yield _READABLE_TOKENS


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"
