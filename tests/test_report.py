"""The summary, the terminal table and the page, on small run folders made here."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy.stats import binomtest

from verideq.certify.summary import REJECTED, interval95, summarise
from verideq.errors import DataError
from verideq.report.html import write_report
from verideq.report.run import read_runs
from verideq.report.table import duration, eps_text, percent, table

META: dict[str, Any] = {
    "command": "verideq certify",
    "model": "small",
    "data": "digits",
    "version": "0.1.0",
    "attack": "pgd",
    "input_shape": [1, 4, 4],
    "clip": [0, 1],
    "indices": list(range(50)),
}
VOID = {"meta", "br", "img"}
NO_WITNESS = {"steps": 9, "seconds": 0.5, "witness": None, "certificate": None}


def line(index: int, status: str, eps: float = 0.1, **changes: Any) -> dict[str, Any]:
    """One line of results.jsonl, of a sample with label 3."""
    right = status != "MISCLASSIFIED"
    record = {"index": index, "label": 3, "prediction": 3 if right else 5, "eps": eps, "norm": "linf"}
    record |= {"status": status, "margin": 0.5 if status == "CERTIFIED" else None, "method": "interval"}
    record |= {"checked": False, "attacked": status in ("CERTIFIED", "UNKNOWN"), "reason": None} | NO_WITNESS
    return record | changes


RECORDS = [
    line(0, "CERTIFIED", margin=0.25),
    line(1, "CERTIFIED", margin=0.125),
    line(2, "FALSIFIED", margin=-1.5, witness="witnesses/2.npy"),
    line(3, "MISCLASSIFIED"),
    line(4, "UNKNOWN", margin=-0.5, reason="bound -0.5 is not positive"),
    line(5, "UNKNOWN", margin=-0.75, reason="bound -7.5e-1 is not positive"),
    line(6, "TIMEOUT", reason="10 s were not enough"),
    line(7, "ERROR", reason="<b>broken</b> & more", prediction=None, attacked=None, steps=None),
    line(0, "CERTIFIED", eps=8 / 255, method="exact"),
    line(1, "UNKNOWN", eps=8 / 255, reason=REJECTED + " it: digest"),
]


def write_run(
    folder: Path, records: list[dict[str, Any]] = RECORDS, *, tail: str = "", summary: bool = True, **meta: Any
) -> Path:
    (folder / "witnesses").mkdir(parents=True)
    np.save(folder / "witnesses" / "2.npy", pixels(folder, [2])[0] + 0.1)
    (folder / "run.json").write_text(json.dumps(META | meta))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summarise(records, META | meta)))
    return folder


def pixels(folder: Path, indices: list[int]) -> np.ndarray[Any, Any]:
    return np.stack([np.linspace(0, 0.8, 16).reshape(1, 4, 4) * (1 + i) / 8 for i in indices])


class Page(HTMLParser):
    """Checks that elements nest and ids are unique; gathers the text, the tags and the pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "

    def pictures(self) -> list[np.ndarray[Any, Any]]:
        found = [link for link in self.links if link.startswith("data:")]
        return [imread(BytesIO(base64.b64decode(link.split(",")[1])), format="png")[..., :3] for link in found]


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (315, 360), (1, 1), (9999, 10000)])
def test_interval_is_clopper_pearson(k: int, n: int) -> None:
    exact = binomtest(k, n).proportion_ci(0.95, method="exact")
    assert interval95(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_interval_at_the_ends() -> None:
    assert interval95(0, 0) == (0.0, 1.0)
    assert interval95(0, 5)[0] == 0.0
    assert interval95(5, 5)[1] == 1.0
    for k, n in [(6, 5), (-1, 5)]:
        with pytest.raises(ValueError, match=f"{k} successes of {n}"):
            interval95(k, n)


def test_summary_counts_every_verdict() -> None:
    summary = summarise(RECORDS[::-1], META)
    assert {key: summary[key] for key in ("model", "data", "version")} == {
        "model": "small",
        "data": "digits",
        "version": "0.1.0",
    }
    small, large = summary["results"]
    assert (small["eps"], large["eps"]) == (8 / 255, 0.1)
    counts = {"certified": 2, "falsified": 1, "misclassified": 1, "unknown": 2, "timeout": 1, "error": 1}
    assert {name: large[name] for name in counts} == counts
    assert sum(counts.values()) == large["n"] == 8
    assert (large["clean"], large["attacked"], large["rejected"], large["seconds"]) == (6, 4, 0, 4.0)
    assert (small["rejected"], small["by_method"]) == (1, {"exact": 1})
    assert large["by_method"] == {"interval": 2}
    assert large["certified_interval"] == list(interval95(2, 8))
    assert large["clean_interval"] == list(interval95(6, 8))
    assert large["attacked_interval"] == list(interval95(4, 8))
    assert json.loads(json.dumps(summary)) == summary


def test_summary_without_attack_and_with_checks() -> None:
    (result,) = summarise([line(0, "CERTIFIED", checked=True, attacked=None)], META | {"attack": "none"})["results"]
    assert (result["attacked"], result["attacked_interval"], result["checked"]) == (None, None, True)
    half = [line(0, "CERTIFIED", checked=True), line(1, "CERTIFIED")]
    assert summarise(half, META)["results"][0]["checked"] is False
    assert summarise([line(0, "UNKNOWN", checked=True)], META)["results"][0]["checked"] is False
    with pytest.raises(ValueError, match="PROVED"):
        summarise([line(0, "PROVED")], META)


def printed(records: list[dict[str, Any]], width: int = 120, **meta: Any) -> str:
    out = StringIO()
    Console(file=out, width=width).print(table(summarise(records, META | meta)))
    return out.getvalue()


def test_table_says_unchecked_and_counts_errors() -> None:
    text = printed(RECORDS)
    assert "25.0 % [3.2, 65.1] unchecked (1 error)" in text
    row = next(part for part in text.splitlines() if part.split()[:1] == ["8/255"])
    assert "50.0 % [1.3, 98.7] unchecked" in row and "error" not in row
    assert "timeouts" in text and "refused" in text
    assert "small on digits" in text


def test_table_without_anything_unusual() -> None:
    text = printed([line(0, "CERTIFIED", checked=True)], attack="none", model="[red]x[/red]")
    assert not any(word in text for word in ("unchecked", "(", "timeouts", "refused"))
    assert "[red]x[/red]" in text
    assert text.splitlines()[-2].split()[:4] == ["0.1", "1", "100.0", "%"]
    assert " - " in text


def test_table_on_a_narrow_terminal_cuts_nothing() -> None:
    text = printed(RECORDS[:8], width=80)
    assert "…" not in text and "unchecked" in text and "[3.2," in text


def test_words() -> None:
    assert [eps_text(e) for e in (0.1, 8 / 255, 0.0, 2 / 3, 0.123456789)] == ["0.1", "8/255", "0", "2/3", "0.123457"]
    assert [duration(s) for s in (0.04, 59.94, 59.96, 3599.6, 7260)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "1 h 00 min",
        "2 h 01 min",
    ]
    assert [percent(*kn) for kn in ((9999, 10000), (1, 10000), (0, 3), (3, 3), (1, 3), (None, 3), (0, 0))] == [
        "99.9 %",
        "0.1 %",
        "0.0 %",
        "100.0 %",
        "33.3 %",
        "-",
        "-",
    ]


def test_page_is_whole_self_contained_and_repeatable(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = write_report([folder], pixels)
    assert path == folder / "report.html"
    page = Page(path)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)
    assert "#fe00" not in page.source
    assert not list(folder.glob("*.part"))
    assert {"accuracy in %", "solver steps", "proved margin (right of the line: certified)"} <= set(
        re.findall(r">([^<>]+)</text>", page.source)
    )
    first = path.read_bytes()
    assert write_report([folder], pixels).read_bytes() == first


def test_page_says_what_was_verified(tmp_path: Path) -> None:
    text = Page(write_report([write_run(tmp_path / "run")])).text
    assert "1 of 2 samples are certified at eps 8/255, 50.0 % [1.3, 98.7] unchecked" in text
    assert "2 of 8 at eps 0.1, 25.0 % [3.2, 65.1] unchecked (1 error)" in text
    assert "no change of any pixel by eps or less" in text
    assert "between certified and attacked" in text
    assert "verdicts that are ERROR: 1" in text
    assert "has not finished" not in text and "neither may be believed" not in text
    assert "50 values: 0, 1, 2, ..., 49" in text


def test_reasons_that_differ_in_numbers_are_one(tmp_path: Path) -> None:
    page = Page(write_report([write_run(tmp_path / "run")]))
    assert re.search(r"2 +UNKNOWN +bound -0\.5 is not positive", page.text)
    assert "-7.5e-1" not in page.text
    assert "<b>broken</b> & more" in page.text and "<b>broken</b>" not in page.source


def test_every_string_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    records = [line(0, "CERTIFIED", label=evil, norm=evil), line(1, "UNKNOWN", norm=evil, reason=evil)]
    folder = write_run(tmp_path / "<i>run", records, model=evil, data=evil, command=evil, **{evil: evil})
    for images in (None, pixels):
        page = Page(write_report([folder], images))
        assert "script" not in page.tags and "i" not in page.tags
        assert page.text.count(evil) >= 6


def test_pictures_are_the_hardest_samples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    asked: list[list[int]] = []

    def images(where: Path, indices: list[int]) -> np.ndarray[Any, Any]:
        assert where == folder
        asked.append(indices)
        return pixels(where, indices)

    page = Page(write_report([folder], images))
    assert asked == [[0, 1, 2]]
    found = page.pictures()
    # Sample 1 has the smaller margin; then 0; then 2: clean, witness, difference.
    assert len(found) == 5
    for picture, index in zip(found, (1, 0, 2), strict=False):
        np.testing.assert_allclose(picture, np.repeat(pixels(folder, [index])[0, 0][..., None], 3, 2), atol=1 / 255)
    np.testing.assert_allclose(found[3] - found[2], 0.1, atol=2 / 255)
    assert np.ptp(found[4], axis=(0, 1)).max() == 0
    red, _, blue = found[4][0, 0]
    assert red > blue
    assert "largest change 0.1" in page.text and "margin 0.125" in page.text


def test_colour_pictures_in_another_pixel_range(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(0, "CERTIFIED")], clip=[0, 255])
    colour = np.arange(48.0).reshape(1, 3, 4, 4) * 5
    (picture,) = Page(write_report([folder], lambda _, __: colour)).pictures()
    np.testing.assert_allclose(picture, colour[0].transpose(1, 2, 0) / 255, atol=1e-6)


def no_pixels(folder: Path, indices: list[int]) -> None:
    return None


def rows(folder: Path, indices: list[int]) -> np.ndarray[Any, Any]:
    return np.zeros((len(indices), 16))


@pytest.mark.parametrize("images", [None, no_pixels, rows])
def test_samples_without_pictures_are_listed(tmp_path: Path, images: Callable[..., Any] | None) -> None:
    page = Page(write_report([write_run(tmp_path / "run")], images))
    assert "img" not in page.tags
    assert re.search(r"1 +3 +0\.1 +0\.125 +0 +3 +0\.1 +0\.25 ", page.text)
    assert re.search(r"2 +3 +0\.1 +-1\.5 ", page.text)


def test_falsified_samples_come_once_and_most_fragile_first(tmp_path: Path) -> None:
    records = [line(i, "FALSIFIED", eps=eps) for eps, i in [(0.3, 1), (0.3, 2), (0.3, 0), (0.2, 2), (0.1, 1)]]
    text = Page(write_report([write_run(tmp_path / "run", records)])).text
    assert re.search(r"margin +1 +3 +0\.1 +- +2 +3 +0\.2 +- +0 +3 +0\.3 +- ", text)


@pytest.mark.parametrize("witness", [None, "witnesses/gone.npy", "run.json", "witnesses/shape.npy", "../outside.npy"])
def test_a_witness_that_cannot_be_read_is_said(tmp_path: Path, witness: str | None) -> None:
    folder = write_run(tmp_path / "run", [line(2, "FALSIFIED", witness=witness)])
    np.save(folder / "witnesses" / "shape.npy", np.zeros(3))
    np.save(tmp_path / "outside.npy", np.zeros((1, 4, 4)))
    page = Page(write_report([folder], pixels))
    assert len(page.pictures()) == 1
    assert "witness file missing or unreadable" in page.text


def test_a_pickled_witness_is_not_loaded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(2, "FALSIFIED", witness="witnesses/p.npy")])
    np.save(folder / "witnesses" / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "missing or unreadable" in Page(write_report([folder], pixels)).text


@pytest.mark.parametrize("stale", [False, True])
def test_an_interrupted_run(tmp_path: Path, stale: bool) -> None:
    folder = write_run(tmp_path / "run", tail='{"index": 9, "lab', summary=False)
    if stale:
        (folder / "summary.json").write_text(json.dumps(summarise(RECORDS[:3], META)))
    (run,) = read_runs([folder])
    assert (len(run.records), run.finished) == (len(RECORDS), False)
    text = Page(write_report([folder])).text
    assert "has not finished" in text and "2 of 8 at eps 0.1" in text


def test_a_contradiction_is_shouted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(0, "CERTIFIED"), line(12, "CERTIFIED", attacked=False)])
    assert "neither may be believed: sample 12." in Page(write_report([folder])).text


def test_several_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", [line(0, "CERTIFIED", eps=0.3, checked=True), line(1, "UNKNOWN", eps=0.3)])
    monkeypatch.chdir(tmp_path)
    path = write_report([one, two])
    assert path.resolve() == tmp_path / "report.html"
    page = Page(path)
    assert re.search(r"eps +one +two ", page.text)
    assert re.search(r"0\.3 +linf +- +50\.0 % ", page.text)
    assert "one, certified" in page.text and "two, attacked" in page.text
    assert "var(--c1)" in page.source and "var(--c2)" in page.source
    assert "All numbers: two" in page.text
    assert write_report([one, two], out=tmp_path / "pair.html") == tmp_path / "pair.html"


def test_runs_of_one_name_keep_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / part / "run") for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_meaning_follows_norm_data_and_attack(tmp_path: Path) -> None:
    records = [line(0, "CERTIFIED", norm="l2", attacked=None)]
    text = Page(write_report([write_run(tmp_path / "run", records, attack="none", input_shape=[13])])).text
    assert "no change of Euclidean length eps or less (times the feature's weight" in text
    assert "between certified and clean" in text
    assert "pixel" not in text and "attacked 9" not in text


@pytest.mark.parametrize(
    "records",
    [
        [line(0, "ERROR", reason="x", steps=None, prediction=None)],
        [line(0, "CERTIFIED", eps=0.0, margin=0.0)],
        [line(i, "UNKNOWN", margin=m) for i, m in enumerate([-np.inf, np.nan, -1e300, 5.0])],
        [line(i, "CERTIFIED", steps=10**i) for i in range(6)],
    ],
    ids=["nothing to draw", "eps zero", "margins without limit", "many steps"],
)
def test_odd_numbers_are_drawn(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    page = Page(write_report([write_run(tmp_path / "run", records)]))
    assert "accuracy in %" in page.text
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', page.source))


def test_a_plot_bar_counts_the_margins(tmp_path: Path) -> None:
    records = [line(i, "CERTIFIED", margin=0.5) for i in range(9)] + [line(9, "UNKNOWN", margin=-0.5)]
    source = write_report([write_run(tmp_path / "run", records)]).read_text()
    margins = source[source.index('aria-label="Histograms of the proved margins"') :]
    bars = re.findall(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) \2 \nL \3 ([\d.]+) ', margins)
    heights = [float(base) - float(top) for _, base, _, top in bars]
    tall = sorted(h for h in heights if h > 0)
    assert len(tall) == 2 and tall[1] / tall[0] == pytest.approx(9, rel=1e-3)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder was given"):
        write_report([])
    with pytest.raises(DataError, match=r"run\.json cannot be read"):
        write_report([tmp_path])
    folder = write_run(tmp_path / "run", [])
    with pytest.raises(DataError, match="holds no results yet"):
        write_report([folder])
    results = folder / "results.jsonl"
    for text, said in [
        ("{}\n", "line 1 is no result"),
        (json.dumps(RECORDS[0]) + "\n[]\n", "line 2 is no result"),
        ("torn\n" + json.dumps(RECORDS[0]) + "\n", "line 1 is not JSON"),
        (json.dumps(line(0, "PROVED")) + "\n", "PROVED"),
    ]:
        results.write_text(text)
        with pytest.raises(DataError, match=said):
            write_report([folder])
    results.unlink()
    with pytest.raises(DataError, match=r"results\.jsonl cannot be read"):
        write_report([folder])
    for text, said in [("[1]", "no JSON object"), ("{", "not JSON")]:
        (folder / "run.json").write_text(text)
        with pytest.raises(DataError, match=said):
            write_report([folder])
