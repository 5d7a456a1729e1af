"""One question to an API, over a connection of its own: what is asked and what an answer means is in `probing/`.

It takes nothing from the environment and nothing from other questions: no proxies, no cookies, no credentials but the
plan's. A redirect is an answer like any other, because its target is whatever the API says.
"""

import asyncio
import ssl
from types import TracebackType
from typing import NamedTuple, Self

import aiohttp
from yarl import URL

from oncegate import __version__
from oncegate.hostnames.failures import failure_words
from oncegate.probing.plan import Plan, Question
from oncegate.probing.verdicts import MAX_ANSWER_BYTES, ProbeAnswer
from oncegate.rules.model import Upstream
from oncegate.upstream.connector import client_tls

# Of all questions of a process together.
MAX_CONNECTIONS = 32
_USER_AGENT = f"oncegate/{__version__}"


class NoAnswer(NamedTuple):
    """There is no answer. `why` is for people, and names neither the URL nor what was sent."""

    why: str


class Asking:
    """Asks questions, and reuses nothing but TLS contexts. An async context manager."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._contexts: dict[tuple[object, ...], ssl.SSLContext] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, plan: Plan, upstream: Upstream, question: Question) -> ProbeAnswer | NoAnswer:
        """Return the answer to a question, or why there is none within the plan's time.

        `upstream`: of the plan's rule. Its certificates are for its own origin alone.
        """
        try:
            async with asyncio.timeout(plan.timeout_s):
                return await self._ask(question, self._tls(upstream if plan.is_upstream else None))
        except TimeoutError:
            return NoAnswer(f"no answer within {plan.timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return NoAnswer(failure(error))

    async def _ask(self, question: Question, context: ssl.SSLContext) -> ProbeAnswer:
        # Encoded already: yarl would write some of it in another way.
        url, body = URL(question.url, encoded=True), question.body or None
        async with self._open().request(
            question.method, url, headers=question.headers, data=body, ssl=context, allow_redirects=False
        ) as response:
            data = bytearray()
            # One byte more says that it is too long, and the rest is not read.
            while len(data) <= MAX_ANSWER_BYTES and (piece := await response.content.readany()):
                data += piece
            if len(data) > MAX_ANSWER_BYTES:
                response.close()
            return ProbeAnswer(response.status, response.raw_headers, bytes(data[: MAX_ANSWER_BYTES + 1]))

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # A connection that is used again may be closed by then, and aiohttp would ask twice.
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"},
                skip_auto_headers=("Content-Type",),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    def _tls(self, upstream: Upstream | None) -> ssl.SSLContext:
        """Return the TLS side towards an upstream, or towards any other server."""
        files = () if upstream is None else (upstream.ca_file, upstream.cert_file, upstream.key_file)
        name = (*files, "" if upstream is None else upstream.certificates)
        if name not in self._contexts:
            paths = [str(path) if path else None for path in files] or [None] * 3
            self._contexts[name] = client_tls(*paths)
        return self._contexts[name]


def failure(error: Exception) -> str:
    """Return why there is no answer, in words without a name or a URL."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "the certificate was not accepted"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the host name was not found"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection: {failure_words(error.os_error)}"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "the connection broke off"
    if isinstance(error, OSError):
        return failure_words(error)
    return "the answer is no HTTP that can be read"
