"""The rules about one key keep every promise in every order of events, and each safeguard is needed for one.

Searched by two programs that share nothing but the variants: explore.py, and spin where it is installed.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.model.explore import Found, explore, has_no_end
from tests.model.rules import RESEND, RETRY
from tests.model.table import TABLE
from tests.model.variants import SETTINGS, VARIANTS, WITHOUT, Variant
from tests.model.world import PROMISES

KEY = Path(__file__).with_name("key.pml")
SPIN, CC = shutil.which("spin"), shutil.which("cc")


def in_groups(names: Iterable[str]) -> list[Any]:
    """Return variants so that what several tests search is searched once, in one process."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"model: {name}")) for name in names]


def is_small(variant: Variant) -> bool:
    """Return whether these are the rules as they are, with no more owners than the table has."""
    return not variant.cut and len(SETTINGS[variant.setting].modes) == 2


@cache
def searched(name: str) -> Found:
    setting, cut, breaks = VARIANTS[name]
    return explore(SETTINGS[setting], frozenset(cut), {breaks} if breaks else None)


@pytest.mark.parametrize("name", in_groups(VARIANTS))
def test_a_verdict(name):
    """The rules as they are hold; without a safeguard the promise breaks that it is there for."""
    found = searched(name)
    assert found.broken == VARIANTS[name].breaks, found.story


@pytest.mark.parametrize("name", in_groups(name for name, one in VARIANTS.items() if is_small(one)))
def test_the_search_asks_nothing_else(name):
    """Every call that comes up stands in the table that the scripts are held to, with the same result."""
    made = searched(name).calls
    assert made.items() <= TABLE.items()
    assert {str(call[0]) for call in made} >= {"claim", "renew", "settle"}


@pytest.mark.parametrize("name", ["hold, operator, streams", "retry, streams"])
def test_time_comes_to_an_end(name):
    """What comes without any chance ends; that no key is in flight there is the promise "stuck"."""
    assert not has_no_end(SETTINGS[name])


needs_spin = pytest.mark.skipif(not (SPIN and CC), reason="needs spin and a C compiler")


@needs_spin
@pytest.mark.parametrize("name", in_groups(VARIANTS))
def test_a_verdict_of_spin(name, verifier):
    """The same verdict, and where nothing breaks the same number of states, with the one before all begins."""
    errors, states = verified(verifier, choices(name))
    if VARIANTS[name].breaks:
        assert errors == 1
    else:
        assert (errors, states) == (0, searched(name).worlds + 1)


@needs_spin
def test_spin_by_hand(tmp_path):
    """The model alone, as its first lines say: one safeguard less, and every promise looked at."""
    pan = compiled(tmp_path, "-DWITHOUT=NOT_AFTER", "-DLOST_CLAIMS=1")
    errors, _ = verified(pan, {})
    assert errors == 1


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verifier of all variants: compiling takes longer than any search."""
    return compiled(tmp_path_factory.mktemp("spin"), "-DCHOSEN_LATER")


def compiled(folder: Path, *options: str) -> Path:
    """Return the verifier that spin makes of the model. Without reduction, so that states can be compared."""
    for command in ([SPIN, "-a", *options, KEY], [CC, "-O0", "-w", "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c"]):
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return folder / "pan"


def verified(pan: Path, chosen: dict[str, int]) -> tuple[int, int]:
    """Return how many errors a verifier found, and how many states; what was chosen is told in its environment."""
    environment = {name: str(value) for name, value in chosen.items()}
    command = [pan, "-w18", "-m20000"]
    said = subprocess.run(command, cwd=pan.parent, env=environment, capture_output=True, text=True, check=True).stdout
    assert "max search depth too small" not in said
    errors, states = (int(re.search(wanted, said)[1]) for wanted in (r"errors: (\d+)", r"(\d+) states, stored"))
    assert bool(errors) == ("assertion violated" in said)
    return errors, states


def choices(name: str) -> dict[str, int]:
    """Return a variant in the numbers of the model."""
    at, cut, breaks = VARIANTS[name]
    setting = SETTINGS[at]
    numbers = {name: int(number) for name, number in re.findall(r"#define ([A-Z_]+) (\d+)", KEY.read_text())}
    return {
        "OWNERS": len(setting.modes),
        "RETRIERS": sum(1 << who for who, mode in enumerate(setting.modes, 1) if mode == RETRY),
        "RESENDERS": sum(1 << who for who, mode in enumerate(setting.modes, 1) if mode == RESEND),
        "API": setting.api + 0,
        "FORGETS": setting.forgets + 0,
        "RECONCILES": setting.reconciles + 0,
        "OPERATORS": setting.operator + 0,
        "STREAMS": setting.streams + 0,
        "LOST_CLAIMS": setting.lost_claims + 0,
        "LATE_SETTLES": setting.late_settles + 0,
        "HANGS": setting.hangs + 0,
        "CANCELS": setting.cancels + 0,
        "JOINS": setting.joins + 0,
        "ASKS": setting.asks + 0,
        "LANDS_LATE": setting.lands_late + 0,
        "ONLY": numbers[promise(breaks)] if breaks else 0,
        **{which: numbers[safeguard] for which, safeguard in zip(("WITHOUT", "AND_WITHOUT"), cut, strict=False)},
    }


def promise(name: str) -> str:
    """Return what the model calls a promise."""
    return "P_" + name.upper().replace(" ", "_")


def test_what_is_searched():
    """Each promise is broken by some variant, so none is empty; the two programs know the same safeguards."""
    assert {variant.breaks for variant in VARIANTS.values()} == {*PROMISES, ""}
    text = KEY.read_text()
    assert set(re.findall(r"HAS\(([A-Z_]+)\)", text)) == set(WITHOUT)
    assert set(re.findall(r"KEEPS\((P_[A-Z_]+)", text)) == {promise(name) for name in PROMISES}
    assert len(WITHOUT) >= 10
