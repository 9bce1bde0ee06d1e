"""Reports: every text is escaped, nothing is loaded from elsewhere, and the tables show what the summary holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from backmatch.cli.plot import PANELS, inline_panel, save_curves
from backmatch.cli.report import notes, result_table, text_table, tuning_table, write_report

HOSTILE = "<script>alert('$x_1$')</script>&\"$"


def statistic(*values: float | None) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if len(known) == len(values) else None
    return {"mean": mean, "std": None if mean is None else 0.01, "values": list(values)}


def entry(optimizer: str, **changes: Any) -> dict[str, Any]:
    return {
        "optimizer": optimizer,
        "lr": 0.1,
        "lr_factor": 1.0,
        "weight_decay": 5e-4,
        "chosen": True,
        "lr_at_grid_edge": None,
        "seeds": [0, 1, 2],
        "n": 3,
        "diverged": 0,
        "epochs": [1.0, 2.0],
        **{f"{name}_mean": [0.4, 0.6] for name in ("accuracy", "test_loss", "train_loss")},
        **{f"{name}_std": [0.1, 0.1] for name in ("accuracy", "test_loss", "train_loss")},
        "final": {name: statistic(0.5, 0.6, 0.7) for name in ("accuracy", "test_loss", "train_loss")},
        "epochs_to_target": statistic(1.0, 2.0, 2.0),
        "steps_to_target": statistic(4, 8, 8),
        "seconds_per_step": 0.0123,
        "seconds_per_step_ratio_to_sgd": 1.5,
        "epochs_to_target_ratio_to_sgd": 0.5,
        "optimizer_state_bytes_per_parameter": 4.0,
        "peak_memory_bytes": 2**28,
        "folders": [],
    } | changes


def tuning(optimizer: str, factor: float, accuracy: float | None, chosen: bool) -> dict[str, Any]:
    return {
        "optimizer": optimizer,
        "lr": 0.1 * factor,
        "lr_factor": factor,
        "weight_decay": 5e-4,
        "seed": 1000,
        "diverged": accuracy is None,
        "chosen": chosen,
        "accuracy": accuracy,
        "loss": None if accuracy is None else 1.0,
        "train_loss": None if accuracy is None else 1.0,
        "epochs_to_target": None if accuracy is None else 1.5,
        "folder": "runs/tuning/x",
    }


def summary(*optimizers: str, **protocol: Any) -> dict[str, Any]:
    shared = {"data": "digits", "model": "mlp", "width": 1.0, "epochs": 2, "batch_size": 64, "schedule": "cosine", "warmup": 0.0}
    shared |= {"augment": "none", "precision": "fp32", "options": {}, "optimizers": list(optimizers), "baseline": optimizers[0]}
    shared |= {
        "lr_factors": [1.0, 4.0],
        "centre_lr": dict.fromkeys(optimizers, 0.1),
        "weight_decays": [1.0],
        "tune_epochs": 2,
        "steps": None,
    }
    shared |= {
        "tune_for": "accuracy",
        "tune_seed": 1000,
        "seeds": [0, 1, 2],
        "sweep": False,
        "target": 0.5,
        "target_given": False,
        "jobs": 1,
        "threads": 1,
    }
    shared |= {"train_samples": 256, "test_samples": 360, "unit": "images", "class_names": ["0", "1"]}
    return {
        "command": "backmatch compare",
        "versions": {"torch": "2.6"},
        "device": "cpu",
        "protocol": shared | protocol,
        "tuning": [tuning(name, factor, accuracy, factor == 1.0) for name in optimizers for factor, accuracy in ((1.0, 0.5), (4.0, None))],
        "entries": [entry(name) for name in optimizers],
    }


class Page(HTMLParser):
    """Elements with their attributes, and the text of each."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    hostile = summary("sgd", HOSTILE, data=HOSTILE, class_names=[HOSTILE], options={"estimator": HOSTILE})
    hostile["command"] = hostile["device"] = hostile["versions"]["torch"] = HOSTILE
    write_report(hostile, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_hostile_names_are_text(page: Page) -> None:
    assert "script" not in {tag for tag, _ in page.elements}
    cells = [text for text in page.text if HOSTILE in text]
    assert len(cells) >= 8  # title, heading, tables, protocol, command, versions and every figure


def test_report_loads_nothing(page: Page) -> None:
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "script", "iframe", "img", "object"})
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


def test_figures_are_well_formed_and_take_the_ink_of_the_page() -> None:
    for name in PANELS:
        markup = inline_panel(name, summary("sgd", HOSTILE))
        assert HOSTILE in "".join(ElementTree.fromstring(markup).itertext())
        assert "currentColor" in markup
        assert markup == inline_panel(name, summary("sgd", HOSTILE))


def test_saved_curves(tmp_path: Path) -> None:
    save_curves(summary("sgd", "adam"), tmp_path / "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(tmp_path / "curves.svg")


def test_results_show_mean_spread_and_what_is_unknown() -> None:
    lost = entry("adam", diverged=1, final={name: statistic(0.5, 0.6, None) for name in ("accuracy", "test_loss", "train_loss")})
    lost |= {"epochs_to_target": statistic(1.0, None, None), "seconds_per_step_ratio_to_sgd": None}
    both = summary("sgd", "adam") | {"entries": [entry("sgd"), lost]}
    header, rows = result_table(both)
    good, bad = (dict(zip(header, row, strict=True)) for row in rows)
    assert good["test accuracy"] == "0.6000 ± 0.0100"
    assert good["epochs to 0.5"] == "1.67 ± 0.01"
    assert good["ms/step"] == "12.3"
    assert (bad["test accuracy"], bad["epochs to 0.5"], bad["time / sgd"]) == ("–", "–", "–")
    assert text_table(both).splitlines()[1].split()[0] == "sgd"


def test_tuning_shows_runs_that_diverged() -> None:
    header, rows = tuning_table(summary("sgd"))
    assert header[0] == "optimizer"
    assert [row[-1] for row in rows] == ["best", "diverged"]
    assert rows[1][3:6] == ["–", "–", "–"]


def test_tuning_for_a_target_shows_the_epochs_to_it() -> None:
    header, rows = tuning_table(summary("sgd", tune_for="target"))
    column = header.index("epochs to target")
    assert [row[column] for row in rows] == ["1.50", "–"]


def test_notes() -> None:
    assert notes(summary("sgd")) == []
    found = summary("sgd", jobs=2, seeds=[0]) | {"entries": [entry("sgd", lr_at_grid_edge="highest", diverged=2)]}
    assert notes(found) == [
        "sgd at lr 0.1 stands at the highest rate of its grid: one further out may do better.",
        "2 of 3 runs of sgd at lr 0.1 diverged, so it has no mean.",
        "2 runs at a time shared the machine: steps took longer than in a run alone.",
        "Fewer than 3 seeds: the spread says little.",
    ]


@pytest.mark.parametrize("changes", [{"tuning": []}, {"entries": [entry("sgd", accuracy_mean=[0.1, None], accuracy_std=[None, None])]}])
def test_report_of_less(tmp_path: Path, changes: dict[str, Any]) -> None:
    factors = [1.0] if "tuning" in changes else [1.0, 4.0]
    write_report(summary("sgd", lr_factors=factors, target=None) | changes, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("All tuning runs" in text) == ("tuning" not in changes)


def test_sweep_draws_spread_over_seeds() -> None:
    swept = summary("sgd", sweep=True) | {"entries": [entry("sgd"), entry("sgd", lr_factor=4.0, chosen=False)]}
    assert "Final test accuracy" in inline_panel("sensitivity", swept)
