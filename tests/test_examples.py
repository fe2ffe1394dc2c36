"""The examples run, and every Python block of the README and the docs does too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.main import get_command

from verideq import load_model
from verideq.cli.main import app, run
from verideq.graph import model_hash
from verideq.models import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def output_of(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints; run as a user runs it, but with warnings as errors."""
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_certify_digits(tmp_path: Path) -> None:
    lines = output_of("certify_digits.py", cwd=tmp_path).splitlines()
    assert len(lines) == 21
    statuses = [line.split()[1] for line in lines[:20]]
    count = re.fullmatch(r"(\d+) of 20 certified, (\d+) survive the attack", lines[20])
    assert count is not None
    assert int(count[1]) == statuses.count("CERTIFIED") >= 15
    assert int(count[2]) >= int(count[1])


def test_own_model(tmp_path: Path) -> None:
    text = output_of("own_model.py", str(tmp_path), cwd=tmp_path)
    assert (tmp_path / "own.safetensors").is_file()
    assert "add                      add          reads relu, equilibrium" in text
    small, large = re.findall(r"(\d+) of 50 right, (\d+) certified", text)
    assert int(small[0]) >= int(small[1]) >= int(large[1]) > 0


def test_slow_equilibrium(tmp_path: Path) -> None:
    text = output_of("slow_equilibrium.py", cwd=tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in text.splitlines()[:2]:
        assert line.endswith(": certified")
        assert line in readme
    lower = [float(value) for value in re.findall(r"margin in \[([-+.\d]+),", text)]
    assert len(lower) == 4
    assert all(value <= -5 for value in lower)
    assert text.count("FALSIFIED") == 2


@pytest.mark.parametrize("attack", ["none", "pgd"])
def test_accuracy_curve(tmp_path: Path, attack: str) -> None:
    out = tmp_path / "run"
    options = f"certify --limit 2 --eps 0.01 --eps 0.02 --attack {attack} --threads 1 --json --out {out}"
    assert run(options.split()) == 0
    output_of("accuracy_curve.py", str(out), str(tmp_path / "curve.svg"), cwd=tmp_path)
    drawing = ElementTree.parse(tmp_path / "curve.svg").getroot()
    words = " ".join(text for text in drawing.itertext() if text.strip())
    assert "● certified" in words
    assert ("▲ attacked" in words) == (attack == "pgd")


def test_the_picture_of_the_readme_is_small_and_whole() -> None:
    picture = ROOT / "docs" / "certified.svg"
    assert picture.stat().st_size < 200_000
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def blocks(page: Path) -> str:
    """The Python blocks of a page as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


# That page needs auto_LiRPA, and runs in tests/test_lirpa.py.
RUNNING = [page for page in PAGES if blocks(page) and page.name != "auto-lirpa.md"]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "pasted"}
    exec(compile(blocks(page), page.name, "exec"), namespace)  # the project's own pages


def test_the_hash_of_the_docs_is_the_hash(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks(ROOT / "docs" / "model-file.md"), {})
    assert capsys.readouterr().out.split() == [model_hash(load_model(BUNDLED))]


def test_every_option_stands_on_the_page_of_the_command_line() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]  # a group
    for name, command in commands.items():
        (section,) = [text for text in sections if text.startswith(f"`verideq {name}")]
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        missing = [option for option in options if f"`{option}" not in section and option != "--help"]
        assert not missing, f"docs/command-line.md does not show {missing} of {name}"


def test_every_field_of_a_run_stands_on_its_page(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(f"certify --limit 1 --eps 0.01 --attack none --radius --threads 1 --json --out {out}".split()) == 0
    meta, summary = (json.loads((out / name).read_text()) for name in ("run.json", "summary.json"))
    line = json.loads((out / "results.jsonl").read_text())
    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    fields = {*meta, *meta["tolerances"], *summary, *summary["results"][0], *line}
    assert not [field for field in sorted(fields) if f"`{field}`" not in page]
