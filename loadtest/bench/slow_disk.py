"""A disk whose syncs take longer, for PostgreSQL: as disks over a network do, also where this machine's is fast."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
int fdatasync(int file) {
    int (*real)(int) = (int (*)(int)) dlsym(RTLD_NEXT, "fdatasync");
    usleep(%d);
    return real(file);
}
"""


@contextmanager
def slower_syncs(folder: Path, more_us: int) -> Iterator[None]:
    """Let each fdatasync of the programs that start meanwhile take so many microseconds more.

    `folder`: one that these programs may read. Raises CalledProcessError or FileNotFoundError without a C compiler.
    """
    library = folder / "slow_disk.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=(SOURCE % more_us).encode(), check=True)
    os.environ["LD_PRELOAD"] = str(library)
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"]
