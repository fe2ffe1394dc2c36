"""The promises of the package as a whole: its names, its floors, its weight, and the files around it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import verideq

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "verideq"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FLOORS = (
    {"region", "box", "clock", "errors", "memory", "status", "distributed"},
    {"equilibrium"},
    {"parametrizations"},
    {"graph"},
    {"models", "data"},
    {"attacks"},
    {"certify"},
    {"training"},
    {"report"},
    {"cli"},
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def part_of(path: Path) -> str:
    """``region`` for verideq/region.py, ``graph`` for anything in verideq/graph."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of verideq that a file imports, anywhere in it; a lazy top-level name counts as its home."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "verideq":
            modules = [verideq._HOME.get(alias.name, f"verideq.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            modules = [node.module or ""]
        else:
            continue
        parts |= {name.split(".")[1] for name in modules if name.startswith("verideq.")}
    return parts - {"__version__"}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if part_of(path) not in {"__init__", "__main__"}]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_the_floors_below(path: Path) -> None:
    part = part_of(path)
    others = imported_parts(path) - {part}
    if part == "testing":
        return
    if part == "checker":
        assert not others, "the checker shares no code with the prover"
        return
    assert part in FLOOR_OF, f"verideq/{part} has no floor: add it to docs/architecture.md and to this test"
    allowed = {name for name, floor in FLOOR_OF.items() if floor < FLOOR_OF[part]}
    if FLOOR_OF[part] in (FLOOR_OF["region"], FLOOR_OF["data"]):
        allowed |= FLOORS[FLOOR_OF[part]]
    if part in {"certify", "cli"}:
        allowed.add("checker")
    assert others <= allowed, f"verideq/{part} stands below {sorted(others - allowed)}"


@pytest.mark.parametrize("name", verideq.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(verideq, name) is not None
    assert name in dir(verideq)


def code_of(page: Path) -> str:
    """The code blocks and the `inline code` of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`]+)`", rest))


def test_every_public_name_is_documented() -> None:
    code = "\n".join(code_of(page) for page in PAGES)
    missing = [name for name in verideq.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", code)]
    assert not missing, f"neither the README nor a page of docs/ shows {missing}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'certificate'"):
        _ = verideq.certificate


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, verideq; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_file_that_names_the_version_names_the_same() -> None:
    version = re.escape(verideq.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = [name for name in re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE) if name != "Unreleased"]
    assert released[0] == verideq.__version__
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


@pytest.mark.parametrize("name", ["certify", "parametrizations"])
def test_the_root_links_are_relative_signposts(name: str) -> None:
    link = ROOT / name
    if not link.is_symlink():
        assert not link.exists(), f"{name} at the top must be a link into the package"
        pytest.skip("an sdist holds no root links")
    assert str(link.readlink()) == f"verideq/{name}"
    assert (link / "__init__.py").is_file()


def test_bundled_models_and_committed_results_stay_under_five_megabytes() -> None:
    models = list(PACKAGE.rglob("*.safetensors"))
    results = [path for path in (ROOT / "benchmarks").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert models, "no bundled model"
    assert sum(path.stat().st_size for path in models + results) < 5_000_000
