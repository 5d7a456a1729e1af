"""The one part of the build that pyproject.toml cannot say. Everything else about the package is there."""

import shutil

from setuptools import setup
from setuptools.command.build import build


class CleanBuild(build):
    """A build that starts empty. setuptools packs whatever an earlier build left in build/lib into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build": CleanBuild})
