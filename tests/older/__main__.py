"""Writes the fixture of the older build anew: `python -m tests.older`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import Valkey
from tests.older.build import unpack_older_build
from tests.parts import ROOT


def main() -> None:
    server = Valkey()
    try:
        with tempfile.TemporaryDirectory() as folder:
            sources = unpack_older_build(Path(folder))
            env = {**os.environ, "PYTHONPATH": f"{sources}:{ROOT}"}
            command = [sys.executable, "-m", "tests.older.fixture", server.url, server.socket]
            subprocess.run(command, cwd=folder, env=env, check=True)
    finally:
        server.close()


main()
