"""The report: every text escaped, every task there, nothing loaded from elsewhere, and readable on a phone."""

from __future__ import annotations

import copy
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from benchmarks.__main__ import main
from benchmarks.report import headline, markdown_tables, notes, write_report
from benchmarks.summary import summarise

HOSTILE = "<script>alert('$x_1$')</script>&\"$"


class Page(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def summary(panel: Path) -> dict[str, Any]:
    return summarise(panel)


def test_the_command_writes_report_summary_and_tables(panel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(panel, tmp_path / "panel")
    assert main(["report", "--out", str(tmp_path / "panel"), "--markdown"]) == 0
    assert {"report.html", "summary.json"} <= {path.name for path in (tmp_path / "panel").iterdir()}
    table = capsys.readouterr().out
    assert "| optimizer | CNN, digits, 4 steps | MLP, regression (Friedman 1), 4 steps | mean rank |" in table
    assert "| BackMatchSGD |" in table
    assert all(line.count("|") in (0, 5, 3) for line in table.splitlines())


def test_every_task_optimizer_and_figure_is_there(summary: dict[str, Any], tmp_path: Path) -> None:
    write_report(summary, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    for task in summary["tasks"]:
        assert ("h2", {"id": task["name"]}) in page.tags
        assert task["title"] in page.text
    for entry in summary["tasks"][0]["entries"]:
        assert entry["title"] in page.text
    figures = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(figures) == 4 + 2 * 5
    assert all(figures)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_texts_are_escaped_and_nothing_is_loaded(summary: dict[str, Any], tmp_path: Path) -> None:
    hostile = copy.deepcopy(summary)
    hostile["tasks"][0] |= {"title": HOSTILE, "unit": HOSTILE}
    hostile["tasks"][0]["entries"][0]["title"] = HOSTILE
    hostile["tasks"][0]["entries"][0]["failures"] = [{"seed": 0, "failure": HOSTILE}]
    hostile["optimizers"]["sgd"]["title"] = HOSTILE
    hostile["devices"] = [HOSTILE]
    write_report(hostile, tmp_path)
    markup = (tmp_path / "report.html").read_text()
    page = Page(markup)
    assert HOSTILE in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src", "xlink:href") and value]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)", markup)


def test_what_needs_attention_is_told(summary: dict[str, Any]) -> None:
    told = copy.deepcopy(summary)
    told["missing"] = ["adamw on friedman"]
    told["devices"] = ["one", "other"]
    told["tasks"][0]["entries"][0] |= {
        "failures": [{"seed": 1, "failure": "the training loss is nan at step 3"}],
        "lr_at_grid_edge": "highest",
    }
    text = "\n".join(notes(told))
    for part in (
        "in place of its budget's",
        "adamw on friedman",
        "one; other",
        "Fewer than 3 seeds",
        "seed 1, failed: the training loss is nan",
    ):
        assert part in text
    assert "best at the highest rate" in text
    (sentence,) = headline(told)
    assert re.fullmatch(r"BackMatchSGD wins \d, ties \d and loses \d of 4 comparisons with peers\.", sentence)


def test_a_failed_optimizer_is_drawn_and_stands_last(summary: dict[str, Any], tmp_path: Path) -> None:
    failed = copy.deepcopy(summary)
    entry = failed["tasks"][0]["entries"][1]
    entry |= {"failures": [{"seed": 0, "failure": "nan"}], "steps_to_target": None, "seconds_to_target": None, "seconds_per_step": None}
    entry["loss"] = {"mean": None, "std": None, "values": [None, 1.0]}
    entry["curve"]["mean"] = [None, None]
    for point in entry["sensitivity"]:
        point["loss"] = None
    write_report(failed, tmp_path)
    assert "1 of 2 failed" in Page((tmp_path / "report.html").read_text()).text
    assert "| 1 failed |" in markdown_tables(failed)


@pytest.fixture(scope="module")
def wide_report(summary: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with tables wider than a phone."""
    wide = copy.deepcopy(summary)
    for task in wide["tasks"]:
        task["title"] = f"{task['title']} {'Donaudampfschifffahrt' * 3}"
    folder = tmp_path_factory.mktemp("wide")
    write_report(wide, folder)
    return folder / "report.html"


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_page_fits_the_screen(width: int, wide_report: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="the screenshot test needs playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("the screenshot test needs a Chromium on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto(wide_report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        sizes = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight])")
        texts = page.evaluate("[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)")
        shot = page.screenshot()
        browser.close()
    assert len(sizes) == 4 + 2 * 5
    assert all(0.6 * min(width, 500) <= w <= width and h > 100 for w, h in sizes)
    assert min(texts) > 7  # pixels
    assert shot.startswith(b"\x89PNG")
