"""How an exchange with the upstream fails. Which of the two it is, is certain."""


class NotSent(Exception):
    """The upstream has read no byte of the request, so that it may be sent again.

    No byte left the process, or the upstream refused the TLS handshake, before which it can read nothing.
    """

    status = 0


class UpstreamLost(Exception):
    """The request was sent, at least in part, and no whole response came.

    `timeout`: it took too long. `body`: the request's own body broke off or stalled. `closed`: the upstream closed the
    connection. `status`: of the response, if that much of it came; 0 for none.
    """

    status = 0

    def __init__(self, detail: str, timeout: bool = False, body: bool = False, closed: bool = False) -> None:
        super().__init__(detail)
        self.timeout, self.body, self.closed = timeout, body, closed
