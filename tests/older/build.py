"""The last build that reads hashes alone, taken out of the history of this repository."""

import io
import subprocess
import zipfile
from pathlib import Path

from tests.parts import ROOT

# "A store that is down is bypassed alike on Redis and PostgreSQL": the last commit before records could be packed.
COMMIT = "d35248c211564e80686e36a5fcf6792b8a5ffab0"
NEEDS_HISTORY = (
    f"this test runs the build of commit {COMMIT[:7]}, which it takes out of the history of this repository. "
    "There is none, or it is cut off: clone the whole repository, or run `git fetch --unshallow`"
)


def unpack_older_build(folder: Path) -> Path:
    """Write the sources of the older build into a folder, and return the path to import it from."""
    command = ["git", "archive", "--format=zip", COMMIT, "proxy"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert archive.returncode == 0, NEEDS_HISTORY
    with zipfile.ZipFile(io.BytesIO(archive.stdout)) as files:
        files.extractall(folder)
    return folder / "proxy"
