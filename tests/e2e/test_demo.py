"""`oncegate demo` shows its scenes and exits by itself."""

import subprocess
import sys


def test_the_demo_keeps_its_word():
    """Three tries, ten duplicates and a broken stream: each executed once, exit code 0."""
    run = subprocess.run([sys.executable, "-m", "oncegate", "demo"], capture_output=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout.decode() + run.stderr.decode()
    assert run.stdout.count(b"ok ") == 5
    assert b"Every job was done, and none of them twice." in run.stdout
