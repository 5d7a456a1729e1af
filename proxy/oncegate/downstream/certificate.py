"""The certificate of a listener, which is replaced while it listens."""

import os
import ssl

from oncegate.settings.settings import Settings


def server_context(cert_file: str | os.PathLike[str], key_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Return the TLS side of a listener for HTTP/1.1. Raises OSError for files that cannot be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(cert_file, key_file)
    return context


def listener_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS side of the public listener, None for plain HTTP. Raises OSError for unusable files."""
    if settings.tls_cert_file is None:
        return None
    return server_context(settings.tls_cert_file, settings.tls_key_file)


class Replaceable:
    """A TLS context for a listener that can be replaced: each handshake uses the newest, open connections stay.

    To load another certificate into the `first` context would not do. A context holds one certificate for each kind of
    key, so that clients could still get an old one of another kind; and a pair of which one file is new would leave it
    without a key. Therefore `first` begins each handshake, and the server name callback, which OpenSSL calls also for a
    client without a server name, hands it over. Tickets belong to `first`, so that sessions are resumed as before.
    """

    def __init__(self, first: ssl.SSLContext) -> None:
        self.first = self._newest = first
        first.sni_callback = self._hand_over

    def _hand_over(self, handshake: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _first: ssl.SSLContext) -> None:
        handshake.context = self._newest

    def replace(self, context: ssl.SSLContext) -> None:
        """Use this context for the handshakes from now on."""
        self._newest = context
