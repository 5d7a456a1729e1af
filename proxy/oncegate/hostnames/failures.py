"""What broke a connection, in words for operators and clients. Pure."""

import os


def failure_words(error: BaseException | None) -> str:
    """Return what an error means: nothing of it names a class of ours, an address or a host. None: it was closed."""
    if error is None:
        return "closed"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, EOFError | ConnectionError):
        return "the connection was closed"
    return "the connection failed"
