"""Names in strings exist: no type checker sees them, and a renamed module leaves them behind."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.parts import parsed, tracked

ROOT = Path(__file__).parent.parent
TEXTS = (".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".env", ".lua", ".pml", ".js", ".mjs", ".sh", "")
FILES = [name for name in tracked() if Path(name).suffix in TEXTS and Path(name).name != "LICENSE"]
OWN = str(Path(__file__).relative_to(ROOT))

# A package of another project has this name. Ours had it once: a left-over import would be no error but find the
# folder of the sources as a namespace package.
OLD = "proxy"
OLD_IMPORTS = re.compile(rf"\bimport {OLD}\b(?!\.py\b)|\bfrom {OLD}(\.\w+)*\s+import\b|-m {OLD}\b")
OLD_PATH = re.compile(rf"""["'`]{OLD}(?:\.(?!py\b)[A-Za-z_{{]|:[A-Za-z_])""")

DOTTED = re.compile(r"(?<![\w./@-])oncegate(?:\.[A-Za-z_]\w*)+(?::\w+(?:\.\w+)*)?(?![\w/-])")
IMPORT = re.compile(r"\bfrom (oncegate(?:\.\w+)*) import \(?([\w, ]+)")
# What is a file or a host, and no module.
OTHERWISE = {
    *("conf", "db", "env", "json", "log", "sock", "socket", "timer", "toml", "yaml", "yml"),
    *("com", "example", "internal", "local", "svc", "test"),
    # Of spans.
    *("claim", "fence", "key_id", "outcome", "request_id", "rule", "settle", "settlement", "wait"),
}


def resolves(path: str) -> bool:
    """Return whether `package.module.Class.attribute` or `package.module:Class.attribute` exists."""
    first, *rest = path.replace(":", ".").split(".")
    found = import_module(first)
    for name in rest:
        if not hasattr(found, name):
            try:
                import_module(f"{found.__name__}.{name}")
            except (ImportError, AttributeError):
                return False
        found = getattr(found, name)
    return True


def strings(file: Path) -> Iterator[str]:
    """Yield the strings of a module, or the whole text of another file."""
    if file.suffix != ".py":
        yield file.read_text()
        return
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named(text: str) -> set[str]:
    """Return the dotted names in a text, also of the imports in a program that is a string."""
    names = {match[0] for match in DOTTED.finditer(text)}
    for module, imported in IMPORT.findall(text):
        names |= {f"{module}.{name.split()[0]}" for name in imported.split(",") if name.strip()}
    return {name for name in names if name.split(".")[1] not in OTHERWISE}


def test_nothing_has_the_old_name() -> None:
    """No file imports, runs or names a module of the old package."""
    texts = {name: (ROOT / name).read_text() for name in FILES}
    lines = [(name, line) for name, text in texts.items() for line in text.splitlines()]
    assert [(name, line) for name, line in lines if OLD_IMPORTS.search(line) or OLD_PATH.search(line)] == []


def test_dotted_names_resolve() -> None:
    """Each `oncegate.module:Class.method` in a string, a page or a setting of a tool exists."""
    names = {(name, each) for name in FILES if name != OWN for text in strings(ROOT / name) for each in named(text)}
    assert sorted((name, each) for name, each in names if not resolves(each)) == []


@pytest.mark.parametrize(
    "text",
    [
        f"import {OLD}",
        f"from {OLD}.store import Store",
        f"from {OLD} import app",
        f"python -m {OLD} serve",
        f'"{OLD}.store.node.HEALTH_S"',
        f"f'{OLD}.{{name}}.'",
        f'"{OLD}:main"',
    ],
)
def test_the_old_name_is_found(text: str) -> None:
    assert OLD_IMPORTS.search(text) or OLD_PATH.search(text)


@pytest.mark.parametrize(
    "text", [f"the {OLD}. It", f"{OLD}.port", f'"{OLD}.py>=2.4"', f"from {OLD} to API", f'"{OLD}"']
)
def test_the_word_itself_is_free(text: str) -> None:
    assert not OLD_IMPORTS.search(text)
    assert not OLD_PATH.search(text)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("oncegate.nothing", {"oncegate.nothing"}),
        ("see oncegate.keys.digests.", set()),
        ("`oncegate.keys.digests.Nobody.at`", {"oncegate.keys.digests.Nobody.at"}),
        ("oncegate.commands.cli:main", set()),
        ("oncegate.commands.cli:man", {"oncegate.commands.cli:man"}),
        ("from oncegate.commands.cli import main, man", {"oncegate.commands.cli.man"}),
        ("oncegate.env, oncegate.example.com, /etc/oncegate.d/x", set()),
    ],
)
def test_missing_names_are_found(text: str, missing: set[str]) -> None:
    assert {name for name in named(text) if not resolves(name)} == missing
