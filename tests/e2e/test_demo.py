"""`oncegate demo` shows its scenes and exits by itself."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.parametrize("store", ["embedded", pytest.param("postgres", marks=pytest.mark.full)])
def test_the_demo_keeps_its_word(store: str) -> None:
    """Three tries, ten duplicates and a broken stream: each executed once, exit code 0, and nothing is left."""
    with tempfile.TemporaryDirectory() as folder:
        # PostgreSQL runs as another account where we are root.
        Path(folder).chmod(0o755)
        command = [sys.executable, "-m", "oncegate", "demo", "--store", store]
        env = os.environ | {"TMPDIR": folder}
        run = subprocess.run(command, capture_output=True, timeout=100, check=False, env=env)
        assert run.returncode == 0, run.stdout.decode() + run.stderr.decode()
        assert run.stdout.count(b"ok ") == 5
        assert b"Every job was done, and none of them twice." in run.stdout
        assert b'"level": "warning"' not in run.stdout + run.stderr
        assert list(Path(folder).iterdir()) == []
        assert (b"oncegate migrate" in run.stdout) == (store == "postgres")
