"""Several panels as one, and the README's tables, which are exactly what the command beside them prints of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from benchmarks.__main__ import main
from benchmarks.report import finals_table, markdown_tables, overview_table, record_table
from benchmarks.summary import merge, summarise

ROOT = Path(__file__).parents[2]
PUBLISHED = ("full", "mlp15", "autoencoder", "vgg13-bn", "vgg13", "resnet20", "vit", "3c3d", "gpt")
"""Panels of the README's figure and tables."""


@pytest.fixture(scope="module")
def summary(panel: Path) -> dict[str, Any]:
    return summarise(panel)


@pytest.fixture
def halves(summary: dict[str, Any], tmp_path: Path) -> list[Path]:
    """A folder for each of the panel's two tasks, the second task first."""
    folders = []
    for task in reversed(summary["tasks"]):
        folders.append(tmp_path / task["name"])
        folders[-1].mkdir()
        (folders[-1] / "summary.json").write_text(json.dumps(summary | {"tasks": [task]}))
    return folders


def test_parts_make_the_whole(summary: dict[str, Any], halves: list[Path]) -> None:
    whole = merge(halves)
    assert whole["tasks"] == json.loads(json.dumps(summary["tasks"]))
    assert whole["totals"] == summary["totals"]
    assert record_table(whole) == record_table(summary)
    assert "mean rank" in finals_table(summary)
    assert "mean rank" not in finals_table(whole)


def test_the_command_prints_and_draws(halves: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overview", *map(str, halves), "--figure", str(tmp_path / "new" / "figure.svg")]) == 0
    whole = merge(halves)
    assert capsys.readouterr().out == f"{overview_table(whole)}\n\n{markdown_tables(whole)}\n"
    drawn = (tmp_path / "new" / "figure.svg").read_text()
    assert all(task["title"] in drawn for task in whole["tasks"])


def test_a_row_names_the_best_peer_and_what_ours_did_against_it(summary: dict[str, Any]) -> None:
    task = summary["tasks"][0]
    best = min((entry for entry in task["entries"] if entry["kind"] == "peer"), key=lambda entry: entry["loss"]["mean"])
    row = overview_table(summary).splitlines()[2].strip("| ").split(" | ")
    assert row[0] == "CNN, digits, 4 steps of 64"
    assert row[5].startswith(f"{best['title']} {best['loss']['mean']:.4f} ± ")
    assert row[5].endswith(f", {best['accuracy']['mean']:.1%}")
    assert len(overview_table(summary).splitlines()) == 2 + len(summary["tasks"])


def test_what_cannot_be_merged_is_told(halves: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "summary.json").write_text('{"tasks": [')
    for folders, figure, said in (
        ([halves[0], halves[0]], "a.svg", "has friedman, as a folder before it has"),
        ([halves[0], tmp_path / "none"], "a.svg", "none/summary.json is missing. Write it with: python -m benchmarks report --out"),
        ([tmp_path / "damaged"], "a.svg", "is no summary of a panel"),
        ([halves[0]], "a.jpg", "Its name must end in .svg or .png"),
        ([], "a.svg", "No folder given"),
    ):
        assert main(["overview", *map(str, folders), "--figure", str(tmp_path / figure)]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / figure).exists()


def test_published_tables_are_those_of_the_committed_results() -> None:
    whole = merge([ROOT / "benchmarks" / "results" / f"panel-{name}" for name in PUBLISHED])
    readme, results = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/results.md"))
    assert overview_table(whole) in readme
    assert record_table(whole) in readme
    assert finals_table(whole) in results
