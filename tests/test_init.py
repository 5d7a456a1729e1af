"""`oncegate init` writes both files of a case, or nothing. (Used as a person does: tests/test_wheel.py.)"""

import re
import tomllib
from pathlib import Path

import pytest

from oncegate.commands.cli import main
from oncegate.commands.init import CASES, FILES, GENERAL, example
from oncegate.rules.presets import PRESETS
from oncegate.settings.settings import Settings
from tests.parts import ROOT


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
    monkeypatch.setenv("ONCEGATE_HOSTS", "localhost")
    Path("rules.toml").write_bytes(example(case, "rules.toml"))
    assert main(["check"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("case", CASES)
def test_duplicates_wait_in_every_example(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each rule of an example for SDKs, forms or senders lets duplicates wait, and what is printed says so."""
    rules = tomllib.loads(example(case, "rules.toml").decode())["rule"]
    assert {PRESETS[rule["preset"]].fields["on_duplicate"] for rule in rules} <= {"wait", "join"}
    assert not [rule for rule in rules if "on_duplicate" in rule]
    assert main(["init", case]) == 0
    assert "its duplicates wait for the response" in capsys.readouterr().out


def test_which_to_choose_is_said_in_the_same_two_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    """`oncegate init`, its general example and the start page say the same about `wait` and `reject`, and why."""
    assert main(["init"]) == 0
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "start.md").read_text()
    assert "its duplicates get 409 at once" in printed
    comments = example(GENERAL, "oncegate.env").decode().replace("\n# ", " ")
    for text in (printed, page, comments):
        words = " ".join(re.sub(r'[`"]|on_duplicate = ', "", text).split())
        assert re.search(
            r"Choose wait where an SDK.*most of them give up.*\. Choose reject, the default \(409 at", words
        )


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
