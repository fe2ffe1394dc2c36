"""Damaged certificates: a sample of what benchmarks/mutations.py does at scale, and that it would notice a fault."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from verideq import checker
from verideq.checker import Checker, files
from verideq.checker.arithmetic import Float

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "mutations.py"


def harness() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("mutations", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


mutations = harness()
SMALL = [folder for folder in mutations.folders(kinds=[name for name in mutations.KINDS if name != "digits"])]


def test_no_damaged_record_is_believed() -> None:
    figures = mutations.run(SMALL, 1000, seed=1)
    assert figures["sound"] and figures["wrong"] == []
    assert figures["old_digest"] == {"mutations": 1000, "accepted": 0}
    assert figures["frame"]["accepted"] == 0 and figures["frame"]["mutations"] >= 90
    assert figures["new_digest"]["accepted"] > 50 and figures["new_digest"]["refused"] > 500
    assert figures["gauges"]["accepted"] > 5 and figures["gauges"]["refused"] > 30
    fields = set(mutations.unpack(SMALL[0].records[0])[0])
    arrays = {"input", "box", "state", "case", "C", "rhs", "weights"}
    assert set(figures["by_region"]) == {"size", "header", *arrays, *fields}
    assert set(figures["by_model"]) == {folder.name for folder in SMALL}


def test_the_figures_depend_on_the_seed_alone() -> None:
    first, again, other = (mutations.run(SMALL, 60, seed=seed) for seed in (3, 3, 4))
    for figures in (first, again, other):
        del figures["seconds"], figures["seed"]
    assert first == again != other


def test_a_mutation_is_none_of_the_records() -> None:
    for number in range(200):
        made = mutations.mutation(SMALL[0], f"0/{number}", SMALL[0].records)
        assert made.payload not in SMALL[0].records[made.record : made.record + 1]


def test_a_folder_of_a_run_takes_part(tmp_path: Path) -> None:
    folder = SMALL[0]
    (tmp_path / "model.safetensors").write_bytes(folder.model)
    (tmp_path / "gauges.safetensors").write_bytes(folder.gauges)
    (tmp_path / "records.bin").write_bytes(b"".join(map(mutations.framed, folder.records)))
    (read,) = mutations.folders(tmp_path)
    assert (read.model, read.gauges, read.records) == (folder.model, folder.gauges, folder.records)
    assert mutations.run([read], 40, seed=0)["sound"]
    (tmp_path / "records.bin").write_bytes(mutations.framed(folder.records[0][:-1]))
    with pytest.raises(SystemExit, match="before it is damaged"):
        mutations.folders(tmp_path)


# Each of these checkers is broken, and the harness has to say so.


def test_a_checker_that_believes_everything_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Checker.decide

    def believing(self: Checker, payloads: list[bytes]) -> list[tuple[bool, str, float | None]]:
        return [(True, "", 1.0)] * len(payloads) if isinstance(self.arithmetic, Float) else honest(self, payloads)

    monkeypatch.setattr(Checker, "decide", believing)
    figures = mutations.run(SMALL[:1], 100, seed=0)
    assert not figures["sound"] and figures["new_digest"]["wrong"] > 60 and figures["new_digest"]["refused"] == 0


def test_a_checker_that_forgets_the_claimed_margin_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # In rational arithmetic too, so that only the model itself can tell.
    head, arrays = mutations.unpack(SMALL[0].records[0])
    forged = [mutations.pack({**head, "margin": margin}, arrays) for margin in ("0", "1000")]
    made = [mutations.Mutation("margin", "field", 0, payload) for payload in forged]
    assert mutations.under_new_digest(SMALL[0], made) == ["accepted", "refused"]
    honest = checker.read_claim
    monkeypatch.setattr(checker, "read_claim", lambda *arguments: replace(honest(*arguments), margin=Fraction(0)))
    assert mutations.under_new_digest(SMALL[0], made) == ["accepted", "wrong"]


def test_a_reader_without_the_digest_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(path: Path) -> list[bytes]:
        data = path.read_bytes()
        return [data[8 : 8 + int.from_bytes(data[:8], "little")]]

    monkeypatch.setattr(files, "records", trusting)
    figures = mutations.run(SMALL[:1], 50, seed=0)
    assert not figures["sound"] and figures["old_digest"]["accepted"] == 50


def test_a_checker_that_does_not_answer_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Checker.decide

    def failing(self: Checker, payloads: list[bytes]) -> list[tuple[bool, str, float | None]]:
        if any(len(payload) % 2 for payload in payloads):
            raise RuntimeError("an odd record")
        return honest(self, payloads)

    monkeypatch.setattr(Checker, "decide", failing)
    figures = mutations.run(SMALL[:1], 60, seed=0)
    assert not figures["sound"] and 0 < figures["new_digest"]["crashed"] < 60
