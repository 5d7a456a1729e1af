"""`oncegate init` writes both files of a case, or nothing. (Used as a person does: tests/test_wheel.py.)"""

from pathlib import Path

import pytest

from oncegate.commands.cli import main
from oncegate.commands.init import CASES, FILES, GENERAL, example
from oncegate.settings.settings import Settings


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", [None, *CASES])
def test_it_writes_both_files(case: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The current folder has the example's very bytes, and the next command is printed."""
    assert main(["init"] if case is None else ["init", case]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: example(case or GENERAL, name) for name in FILES
    }
    assert "\n  oncegate check && oncegate serve\n" in capsys.readouterr().out


@pytest.mark.parametrize("case", [GENERAL, *CASES])
def test_no_example_draws_a_warning(case: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """The rules of each example pass the check without a word on standard error."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONCEGATE_{name.upper()}", raising=False)
    monkeypatch.setenv("ONCEGATE_UPSTREAM", "http://127.0.0.1:9000")
    monkeypatch.setenv("ONCEGATE_RULES_FILE", "rules.toml")
    Path("rules.toml").write_bytes(example(case, "rules.toml"))
    assert main(["check"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_it_overwrites_nothing(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever has one of the names stays, the other file is not left behind, and the exit code is 2."""
    match kind:
        case "file":
            Path(name).touch()
        case "folder":
            Path(name).mkdir()
        case _:
            Path(name).symlink_to("elsewhere")
    assert main(["init", "llm"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert capsys.readouterr() == ("", f"{name} exists already; oncegate init overwrites nothing and wrote nothing\n")


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the file and the reason."""
    (tmp_path / "gone").mkdir()
    with pytest.MonkeyPatch.context() as inside:
        inside.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert main(["init"]) == 2
    assert capsys.readouterr().err == "rules.toml cannot be written: No such file or directory\n"


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the cases."""
    with pytest.raises(SystemExit, match="2"):
        main(["init", "coffee"])
    assert "payments" in capsys.readouterr().err
