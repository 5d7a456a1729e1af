"""What is installed is what pyproject.toml asks for, pinned and hashed."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"(?P<pin>[a-z0-9-]+==[^\s;]+( ; [^\\]+)?)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)")

RUNTIME = PYPROJECT["project"]["dependencies"]
EMBEDDED = PYPROJECT["project"]["optional-dependencies"]["embedded"]
POSTGRES = PYPROJECT["project"]["optional-dependencies"]["postgres"]
OTEL = PYPROJECT["project"]["optional-dependencies"]["otel"]
GROUPS = PYPROJECT["dependency-groups"]
DEV = [one for one in GROUPS["dev"] if isinstance(one, str)] + GROUPS["postgres-server"]
ASKED_FOR = {
    "requirements-build.lock": GROUPS["build"],
    "requirements-image.lock": RUNTIME + OTEL + POSTGRES,
    "requirements.lock": RUNTIME + EMBEDDED + OTEL + POSTGRES,
    "requirements-postgres-server.lock": GROUPS["postgres-server"],
    "requirements-dev.lock": RUNTIME + EMBEDDED + OTEL + POSTGRES + DEV,
    "requirements-clients.lock": GROUPS["clients"],
    "requirements-clients-mcp1.lock": GROUPS["clients-mcp1"],
}


def lines(lock: str) -> list[str]:
    text = re.sub(r" \\\n\s+", " ", (ROOT / lock).read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(lock: str) -> dict[str, Requirement]:
    found = [Requirement(line.split(" --hash", 1)[0]) for line in lines(lock)]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


@pytest.mark.parametrize("lock", ASKED_FOR)
def test_only_pins(lock: str) -> None:
    """A lock file holds exact versions with their hashes, and neither an address nor an option."""
    assert [line for line in lines(lock) if not PIN.fullmatch(line)] == []
    assert "://" not in (ROOT / lock).read_text()


@pytest.mark.parametrize("lock", ASKED_FOR)
def test_agrees_with_pyproject(lock: str) -> None:
    """Everything that pyproject.toml asks for is locked, at a version in its range."""
    locked = pins(lock)
    for asked in map(Requirement, ASKED_FOR[lock]):
        pin = locked.get(canonicalize_name(asked.name))
        assert pin is not None, f"{asked.name} is not in {lock}: make lock"
        assert asked.specifier.contains(version(pin)), f"{lock} has {pin}, asked for is {asked}: make lock"


@pytest.mark.parametrize("lock", ["requirements-image.lock", "requirements.lock", "requirements-postgres-server.lock"])
def test_tests_run_what_is_shipped(lock: str) -> None:
    """The image and the demo have the very versions that the tests run with."""
    tested = pins("requirements-dev.lock")
    assert {name: str(pin) for name, pin in pins(lock).items()} == {name: str(tested[name]) for name in pins(lock)}


def test_image_has_no_embedded_store() -> None:
    """The image carries no store of its own: there the store must be named."""
    embedded = {canonicalize_name(Requirement(asked).name) for asked in EMBEDDED}
    assert embedded.isdisjoint(pins("requirements-image.lock"))
    assert embedded <= pins("requirements.lock").keys()


def test_packages_of_npm_are_pinned() -> None:
    """Each package of npm has one version and its hash, and no address of a registry."""
    folder = ROOT / "tests/real/node"
    asked_for = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in asked_for} == asked_for
    packages = [package for path, package in locked.items() if path]
    assert [one for one in packages if "resolved" in one or not one["integrity"].startswith("sha512-")] == []


def test_build_requirements_are_locked() -> None:
    """What [build-system] asks for is what the build group locks."""
    assert PYPROJECT["build-system"]["requires"] == GROUPS["build"]
