"""The rooms hold: cycles planted in a copy are refused, and no package or module outgrows its limits."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.parts import ROOT, parsed

SOURCES = ROOT / "proxy/oncegate"
MODULES = sorted(SOURCES.rglob("*.py"))
PACKAGES = sorted(path.parent for path in SOURCES.rglob("__init__.py"))
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
LAYERS = [contract for contract in CONTRACTS if contract["type"] == "layers"]

MOST_MODULES = 14
MOST_LINES = 320


def path_of(module: str) -> Path:
    """Return a module's file, relative to the source root."""
    path = Path(*module.split("."))
    return path / "__init__.py" if (ROOT / "proxy" / path).is_dir() else path.with_suffix(".py")


@dataclass(frozen=True)
class Plant:
    """An import that a contract forbids."""

    importer: str
    imported: str
    contract: str
    for_types_alone: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}{' for types' if self.for_types_alone else ''}"

    def line(self) -> str:
        parent, _, name = self.imported.rpartition(".")
        line = f"from {parent} import {name}\n"
        return f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}" if self.for_types_alone else line

    def arrow(self) -> str:
        return rf"{re.escape(self.importer)} -> {re.escape(self.imported)}\b"


def by_contract() -> Iterator[Plant]:
    """Yield for each package an import from its lowest module to its highest, and for types to the layer above."""
    for contract in LAYERS:
        (container,) = contract["containers"]
        layers = [[f"{container}.{name.strip()}" for name in layer.split("|")] for layer in contract["layers"]]
        *_, lowest = layers
        if len(layers) > 1:
            yield Plant(lowest[0], layers[0][0], contract["name"], for_types_alone=False)
            yield Plant(lowest[-1], layers[-2][0], contract["name"], for_types_alone=True)
        elif len(lowest) > 1:
            yield Plant(lowest[0], lowest[1], contract["name"], for_types_alone=False)


# Cycles that passed unnoticed before every module had its place.
ONCE_UNNOTICED = [
    Plant("oncegate.rules.policy", "oncegate.rules.presets", "Inside oncegate.rules", for_types_alone=False),
    Plant("oncegate.rules.presets", "oncegate.rules.policy", "Inside oncegate.rules", for_types_alone=False),
    Plant("oncegate.store.record_view", "oncegate.store.redis.node", "Inside oncegate.store", for_types_alone=False),
    Plant("oncegate.downstream.response", "oncegate.downstream.listener", "Inside oncegate.downstream", True),
]
INSIDE = [plant for plant in by_contract() if plant.contract.startswith("Inside")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of its contracts."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(SOURCES, folder / "proxy/oncegate", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def lint(copy: Path) -> tuple[int, str]:
    """Return the exit code of lint-imports in the copy, and what it says."""
    command = [sys.executable, Path(sysconfig.get_path("scripts")) / "lint-imports", "--no-logo"]
    env = {"PYTHONPATH": str(copy / "proxy"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_as_it_is(copy: Path) -> None:
    """Unplanted, every contract is kept."""
    code, said = lint(copy)
    assert code == 0, said


# Planted together, and each in the words about its own contract. Between rooms alone: their cycles go through others.
TOGETHER = {
    "imports": [plant for plant in INSIDE if not plant.for_types_alone],
    "imports for types": [plant for plant in INSIDE if plant.for_types_alone],
    "once unnoticed": ONCE_UNNOTICED,
    **{f"between rooms: {plant}": [plant] for plant in by_contract() if plant not in INSIDE},
}


@pytest.mark.parametrize("plants", TOGETHER.values(), ids=TOGETHER)
def test_a_cycle_is_refused(copy: Path, plants: list[Plant]) -> None:
    """An import from a lower module to a higher one breaks the contract of its package, also for types alone."""
    texts = {file: file.read_text() for plant in plants if (file := copy / "proxy" / path_of(plant.importer))}
    try:
        for plant in plants:
            with (copy / "proxy" / path_of(plant.importer)).open("a") as file:
                file.write(f"\n{plant.line()}")
        code, said = lint(copy)
    finally:
        for path, text in texts.items():
            path.write_text(text)
    assert code != 0
    assert [plant for plant in plants if f"{plant.contract} BROKEN" not in said] == []
    # The words about a contract: its name, underlined, and all up to the next.
    about = dict(re.findall(r"^(.+)\n-+\n((?:(?!.+\n---).*\n)*)", said, re.MULTILINE))
    assert [plant for plant in plants if not re.search(plant.arrow(), about[plant.contract])] == [], said


def test_every_module_needs_a_place(copy: Path) -> None:
    """A new module that no contract names is refused, in every package that has modules."""
    containers = [contract["containers"][0] for contract in LAYERS]
    assert {path.relative_to(SOURCES.parent) for path in PACKAGES if len([*path.glob("*.py")]) > 1} == {
        Path(*container.split(".")) for container in containers
    }
    strays = [copy / "proxy" / Path(*container.split(".")) / "stray.py" for container in containers]
    try:
        for stray in strays:
            stray.touch()
        code, said = lint(copy)
    finally:
        for stray in strays:
            stray.unlink(missing_ok=True)
    assert code != 0
    assert [contract["name"] for contract in LAYERS if f"{contract['name']} BROKEN" not in said] == []


# The limits ...


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(SOURCES)))
def test_modules_in_a_package(package: Path) -> None:
    """A package is small enough to be read as a list."""
    modules = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, modules


def test_lines_of_a_module() -> None:
    """No module is too long to be read in one go."""
    lengths = {str(path.relative_to(SOURCES)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def surplus(path: Path) -> Iterator[str]:
    """Yield what an `__init__.py` holds besides its docstring, imports and `__all__` (at the root `__version__`)."""
    tree = parsed(path)
    free = {"__all__", "__version__"} if path.parent == SOURCES else {"__all__"}
    for number, node in enumerate(tree.body):
        match node:
            case ast.Expr(value=ast.Constant(value=str())) if number == 0:
                continue
            case ast.Import() | ast.ImportFrom():
                continue
            case ast.Assign(targets=[ast.Name(id=name)]) if name in free:
                continue
            case _:
                yield f"{path.relative_to(SOURCES)}:{node.lineno}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(SOURCES)))
def test_a_package_is_no_machine(package: Path) -> None:
    """Its `__init__.py` says what the room is for, and holds no code."""
    init = package / "__init__.py"
    assert ast.get_docstring(parsed(init))
    assert list(surplus(init)) == []


def test_names_are_not_the_standard_library_s() -> None:
    """No package or module has the name of one of Python's: nobody has to ask which one is meant."""
    names = {path.stem for path in MODULES} | {path.name for path in PACKAGES}
    assert names & sys.stdlib_module_names == set()
