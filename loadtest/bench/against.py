"""An earlier commit's package, for the rows that compare with it: its wheel, in a folder outside the checkout.

It borrows the other packages from the environment that runs the bench.
"""

import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from loadtest.bench.machine import ROOT


def package_of(commit: str) -> Path:
    """Build the commit's wheel and return a new folder with the package in it. Raises SystemExit for no such commit."""
    whole = full_id(commit)
    if not whole:
        raise SystemExit(f"no such commit: {commit}")
    folder = Path(tempfile.mkdtemp(prefix="oncegate-bench-against-"))
    tree, wheels, package = (folder / name for name in ("tree", "wheels", "package"))
    tree.mkdir()
    files = subprocess.run(["git", "archive", whole], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x"], cwd=tree, input=files.stdout, check=True)
    _pip("wheel", "--no-build-isolation", "--wheel-dir", wheels, tree)
    _pip("install", "--target", package, *wheels.glob("*.whl"))
    return package


def full_id(commit: str) -> str:
    """Return the whole id of a commit, "" where git does not know it."""
    return _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")


def checkout_name() -> str:
    """Return the short id of this checkout's commit, with `-dirty` where its files differ from it."""
    return _git("describe", "--always", "--dirty", "--exclude", "*") or "an unknown commit"


def _git(*words: str) -> str:
    """Return what git says, "" where it fails or is not there."""
    with suppress(FileNotFoundError):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def _pip(command: str, *words: object) -> None:
    options = ["--disable-pip-version-check", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *map(str, words)], check=True)
