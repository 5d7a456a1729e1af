"""Names that move, against a real name server: in namespaces of their own, as resolv.conf can name no port."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parts import ROOT

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount")
SET_UP = """
set -e
ip link set lo up
mount --bind "$1" /etc/resolv.conf
shift
exec "$@"
"""


def may_unshare() -> bool:
    """Whether namespaces can be made here."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.full
@pytest.mark.skipif(not may_unshare(), reason="no namespaces here")
def test_names_that_move_and_fall_silent(tmp_path: Path) -> None:
    """A moved name is followed within its time under steady traffic, 300 requests at once are all answered and spread
    over both addresses, and a silent name server stalls neither other upstreams nor the store."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    command = [*UNSHARE, "sh", "-c", SET_UP, "sh", tmp_path / "resolv.conf", sys.executable]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/proxy", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        [*command, "-m", "tests.moving_names", tmp_path], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["first"] == [200, "127.0.0.2"]
    assert found["followed_after_s"] < 1.3
    assert found["at_once"] == {"200": 300}
    assert min(found["spread"]) >= 100
    assert found["slowest_beside_silence_s"] < 0.5
    assert found["refused"] == [[502, True]]
    assert found["older"] == [200]
    assert found["slowest_with_older_s"] < 0.5
    assert found["threads"] < 20
    assert (found["stopped"], found["stopped_after_s"] < 5) == (0, True)
    assert found["log"] == ["moving.test.", "silent.test"]
