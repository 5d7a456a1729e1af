"""The Debian packages that the bench needs: installed if possible, otherwise named."""

import os
import shutil
import subprocess
from pathlib import Path

from loadtest.peers.nginx import MODULES

PACKAGES = {"wrk": "wrk", "nginx": "nginx", "redis-server": "redis-server"}  # program: package
LUA = {MODULES / "ngx_http_lua_module.so": "libnginx-mod-http-lua"}


def missing() -> list[str]:
    """Return the packages of the tools that are not installed."""
    programs = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return programs + [package for file, package in LUA.items() if not Path(file).exists()]


def obtain() -> None:
    """Install missing packages, as root on Debian. Raises SystemExit with their names otherwise."""
    packages = missing()
    if not packages:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing", *packages, flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *command], env=environment, stdout=subprocess.DEVNULL, check=False)
    if packages := missing():
        raise SystemExit(f"the benchmark needs these packages (Debian's names): {' '.join(packages)}")
