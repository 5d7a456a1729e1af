"""Where a request to the admin listener came from: an address, a host, a page."""

from ipaddress import IPv4Address, IPv6Address, ip_address

from aiohttp import web

from oncegate.admin.roles import Refused
from oncegate.settings.addresses import split_authority

# What a proxy adds to a request that it passes on. Its own address says nothing of who asked then.
_PASSED_ON = ("cf-connecting-ip", "forwarded", "true-client-ip", "via", "x-client-ip", "x-real-ip")
_PASSED_ON_PREFIXES = ("x-envoy-", "x-forwarded-", "x-original-")
_FOREIGN = "Another page sent this request; load this page again, and use its own forms."


def peer(request: web.Request) -> IPv4Address | IPv6Address | None:
    """Return the address that a connection came from; a listener of both families sees IPv4 inside IPv6."""
    name = request.transport.get_extra_info("peername") if request.transport else None
    if not name:
        return None
    address = ip_address(name[0].partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def check_target(request: web.Request) -> None:
    """Raise Refused for a request that names no host, or one in its target. aiohttp refuses several."""
    if "Host" not in request.headers or not request.raw_path.startswith("/"):
        raise Refused(400, "The request must have one Host, and a target that is a path.")


def is_local(request: web.Request, hosts: tuple[str, ...]) -> bool:
    """Return whether this machine itself asked, under a name of its own or one of `hosts`.

    A web page can reach a loopback address under a name of its own that resolves to it (DNS rebinding).
    """
    names = [name.lower() for name in request.headers]
    if any(name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES) for name in names):
        return False
    address = peer(request)
    if address is None or not address.is_loopback:
        return False
    authority = request.headers["Host"].lower()
    try:
        host = split_authority(authority)[0]
    except ValueError:
        return False
    return _is_loopback(host.strip("[]")) or not {host, authority}.isdisjoint(hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_link(request: web.Request) -> bool:
    """Return whether a browser follows a link of another site."""
    headers = request.headers
    return (
        request.method in ("GET", "HEAD")
        and headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        and headers.get("Sec-Fetch-Mode") == "navigate"
        and headers.get("Sec-Fetch-Dest") == "document"
    )


def check_page(request: web.Request) -> None:
    """Raise Refused where a browser says that another page sent this request, or shows this one in a frame.

    `Sec-Fetch-Site` says it where the connection is trusted, `Origin` elsewhere (Fetch, sections 3.2 and 2.2.6). A
    link from another page may lead here.
    """
    headers = request.headers
    site, origins = headers.get("Sec-Fetch-Site"), headers.getall("Origin", [])
    is_read = request.method in ("GET", "HEAD")
    if headers.get("Sec-Fetch-Dest") in ("frame", "iframe", "embed", "object"):
        raise Refused(403, _FOREIGN)
    if site not in (None, "same-origin", "none") and not is_link(request):
        raise Refused(403, _FOREIGN)
    if site is None and origins and [origin.partition("://")[2] for origin in origins] != [headers["Host"]]:
        raise Refused(403, _FOREIGN)
    if not is_read and (len(origins) > 1 or "null" in origins):
        raise Refused(403, _FOREIGN)


def is_secure(request: web.Request) -> bool:
    """Return whether a browser came over TLS, to this listener or to a proxy in front."""
    return request.secure or request.headers.get("Origin", "").startswith("https://")
