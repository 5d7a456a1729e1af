"""The rules about one key keep every promise in every order of events, and each safeguard is needed for one.

Searched by two programs that share nothing but the variants: explore.py, and spin where it is installed.
"""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.model.explore import PROMISES, Found, explore
from tests.model.rules import RETRY
from tests.model.variants import SETTINGS, VARIANTS, WITHOUT

KEY = Path(__file__).with_name("key.pml")
SPIN, CC = shutil.which("spin"), shutil.which("cc")


def each_variant() -> list[Any]:
    """Return the variants; what two tests search is searched once, in one process."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"model: {name}")) for name in VARIANTS]


@cache
def searched(name: str) -> Found:
    setting, cut, breaks = VARIANTS[name]
    return explore(SETTINGS[setting], frozenset(cut), {breaks} if breaks else None)


@pytest.mark.parametrize("name", each_variant())
def test_a_verdict(name):
    """The rules as they are hold; without a safeguard the promise breaks that it is there for."""
    found = searched(name)
    assert found.broken == VARIANTS[name].breaks, found.story


@pytest.mark.skipif(not (SPIN and CC), reason="needs spin and a C compiler")
@pytest.mark.parametrize("name", each_variant())
def test_a_verdict_of_spin(name, tmp_path):
    """The same verdict, and where nothing breaks the same number of states."""
    said = spin(name, tmp_path)
    assert "max search depth too small" not in said
    errors, states = (int(re.search(wanted, said)[1]) for wanted in (r"errors: (\d+)", r"(\d+) states, stored"))
    if VARIANTS[name].breaks:
        assert errors == 1
        assert "assertion violated" in said
    else:
        assert (errors, states) == (0, searched(name).worlds)


def spin(name: str, folder: Path) -> str:
    """Return what spin's verifier says of a variant."""
    at, cut, breaks = VARIANTS[name]
    setting = SETTINGS[at]
    given = {
        "OWNERS": len(setting.modes),
        "RETRIERS": sum(1 << who for who, mode in enumerate(setting.modes, 1) if mode == RETRY),
        "OPERATORS": int(setting.operator),
        "STREAMS": int(setting.streams),
        "LOST_CLAIMS": int(setting.lost_claims),
        "LATE_SETTLES": int(setting.late_settles),
        "HANGS": int(setting.hangs),
        **dict(zip(("WITHOUT", "AND_WITHOUT"), cut, strict=False)),
        **({"ONLY": "P_" + breaks.upper().replace(" ", "_")} if breaks else {}),
    }
    options = [f"-D{name}={value}" for name, value in given.items()]
    # Optimized, the compiler would take longer than the search; without reduction, states can be compared.
    for command in (
        [SPIN, "-a", *options, KEY],
        [CC, "-O0", "-w", "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c"],
        ["./pan", "-w18", "-m20000"],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def test_what_is_searched():
    """Each promise is broken by some variant, so none is empty; the two programs know the same safeguards."""
    assert {variant.breaks for variant in VARIANTS.values()} == {*PROMISES, ""}
    text = KEY.read_text()
    assert set(re.findall(r"HAS\(([A-Z_]+)\)", text)) == set(WITHOUT)
    assert set(re.findall(r"KEEPS\((P_[A-Z_]+)", text)) == {"P_" + name.upper().replace(" ", "_") for name in PROMISES}
    assert len(WITHOUT) >= 10
