"""CONTRIBUTING.md and the Makefile know every room, every module and where its tests are."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.parts import ROOT

SOURCES = ROOT / "proxy/oncegate"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
MODULES = [str(path.relative_to(SOURCES)) for path in sorted(SOURCES.rglob("*.py")) if path.name != "__init__.py"]
ROWS = dict(re.findall(r"^\| `([\w/.]+)` \| (`tests/.*`) \|$", PAGE, re.MULTILINE))
ROOMS = dict(re.findall(r"^PART_(\w+) := (.*)$", MAKEFILE.replace("\\\n", " "), re.MULTILINE))


def own_tests(module: str) -> list[Path]:
    """Return the test files that have a module's name and use it, or run the program."""
    name, dotted = Path(module).stem, f"oncegate.{module[:-3].replace('/', '.')}"
    direct, e2e = ROOT / f"tests/test_{name}.py", ROOT / f"tests/e2e/test_{name}.py"
    used = (dotted, "oncegate.commands.cli") if module.startswith("commands/") else (dotted,)
    uses = direct.exists() and any(each in direct.read_text() for each in used)
    return [direct] * uses + [e2e] * e2e.exists()


@pytest.mark.parametrize("module", MODULES)
def test_every_module_s_tests_can_be_found(module: str) -> None:
    """A module has a test file of its name, or a line of the page says where its tests are, or where its room's are."""
    rooms = [f"{parent}/" for parent in Path(module).parents]
    assert own_tests(module) or any(name in ROWS for name in (module, *rooms)), "add a line to CONTRIBUTING.md"


@pytest.mark.parametrize("name", ROWS)
def test_every_line_is_about_what_exists(name: str) -> None:
    """The module or room of a line exists, and so do its test files."""
    assert (SOURCES / name).exists()
    tests = re.findall(r"`([^`]+)`", ROWS[name])
    assert [test for test in tests if not (ROOT / test).is_file()] == []


def test_every_room_is_on_the_page() -> None:
    """The table of rooms has each package and top module, and nothing else."""
    table = PAGE.partition("| room |")[2].partition("\n\n")[0]
    named = set(re.findall(r"^\| `([\w.]+)/?` \|", table, re.MULTILINE))
    there = {path.name for path in SOURCES.iterdir() if path.name != "__pycache__" and not path.name.startswith("__")}
    assert named == there


def test_every_room_has_its_part() -> None:
    """`make quick PART=room` knows every room, and its test files exist."""
    rooms = {path.removesuffix(".py").split("/")[0] for path in MODULES} - {"__main__"}
    assert rooms <= ROOMS.keys()
    files = {f"tests/{name}.py" for names in ROOMS.values() for name in names.split() if name != "\\"}
    assert [name for name in files if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("room", [room for room in ROOMS if (SOURCES / room).exists()])
def test_a_part_has_the_tests_of_its_modules(room: str) -> None:
    """The part of a room has each test file of a name of one of its modules."""
    own = {path for module in MODULES if module.startswith(f"{room}/") for path in own_tests(module)}
    names = {str(path.relative_to(ROOT / "tests").with_suffix("")) for path in own}
    assert names <= set(ROOMS[room].split())


def test_help_has_every_target() -> None:
    """`make help` lists each target that a person calls, with what it does."""
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^make ([a-z-]+) +\S", done.stdout, re.MULTILINE))
    phony = set(" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)).split())
    assert listed == phony
