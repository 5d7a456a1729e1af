"""`oncegate healthcheck`: asks the admin listener of the running proxy."""

import ssl
import sys
import urllib.error
import urllib.request

from oncegate.settings.settings import Settings

# As long as the HEALTHCHECK of the image gives the command.
TIMEOUT_S = 3.0
FAILED = 1


def probe(settings: Settings, path: str) -> int:
    """Print the admin listener's response to a request for `path`; return 0 for a response of status 200."""
    address = settings.admin_listen
    # A wildcard address is one to listen on, not to connect to.
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address.host, address.host)
    # The certificate names the host that others use, and this request stays on the own machine.
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    scheme = "https" if settings.admin_tls_cert_file else "http"
    # Without the proxies that the environment may name, for the same reason.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
    try:
        with opener.open(f"{scheme}://{host}:{address.port}{path}", timeout=TIMEOUT_S) as response:
            print(response.read().decode())
            return 0
    # urllib raises for the 503 of a proxy that is not ready.
    except urllib.error.HTTPError as error:
        print(error.read().decode(), file=sys.stderr)
    except OSError as error:
        print(f"no answer from {host}:{address.port}: {error}", file=sys.stderr)
    return FAILED
