"""Files that settings name. They are regular files of a bounded size: any other could hang or fill the process."""

import errno
import os
import stat

# Of a secret, which is one line.
MAX_SECRET_BYTES = 65_536
# Of any other file. A path to the wrong file, such as a log, must not fill the memory.
MAX_FILE_BYTES = 4_194_304


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a regular file. Raises ValueError with the reason, which does not repeat the path."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_kind(os.fstat(descriptor).st_mode)
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise ValueError(f"is over {max_bytes} bytes")
    return content


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> str:
    """Return the content of a regular file as text, without a byte order mark. Raises ValueError as `read_file`."""
    try:
        # Editors on Windows write the mark, which is no part of the text.
        return read_file(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        # Without its cause: the decoder's error contains the bytes, which may be a secret.
        raise ValueError("cannot be read as UTF-8 text") from None


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    # A pipe can be read only once, but every worker reads the settings again.
    if not stat.S_ISREG(mode):
        raise ValueError("is not a regular file")
