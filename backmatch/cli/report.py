"""What a comparison found, in words and tables: plain text for the terminal, one self-contained HTML file to keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backmatch.cli.checkpoint import write_atomic
from backmatch.cli.plot import PANELS, inline_panel

Summary = Mapping[str, Any]

_CAPTIONS = {
    "accuracy": "Test accuracy over the epochs: mean over the seeds; the band is one standard deviation each way.",
    "losses": "Losses over the epochs: test loss (solid) and mean training loss since the last evaluation (dashed).",
    "sensitivity": "Final accuracy at every learning rate of the grid, relative to the grid's centre. A cross is a run that diverged.",
}


def text_table(summary: Summary) -> str:
    """The results as aligned plain text, with a line for everything that needs attention."""
    header, rows = result_table(summary)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
    return "\n".join([*lines, *notes(summary)])


def write_report(summary: Summary, path: Path) -> None:
    """Write the comparison to ``path`` as one HTML file: styles and figures inside, no scripts, every text escaped.

    Raises:
        OSError: If it cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The figures are markup already: matplotlib escapes the text it draws.
    panels = [(Markup(inline_panel(name, summary)), _CAPTIONS[name]) for name in PANELS if name != "sensitivity" or _has_grid(summary)]
    page = environment.get_template("report.html.j2").render(
        protocol=summary["protocol"],
        command=summary["command"],
        versions=summary["versions"],
        device=summary["device"],
        results=result_table(summary),
        tuning=tuning_table(summary),
        chosen=[row["chosen"] for row in summary["tuning"]],
        diverged=[row["diverged"] for row in summary["tuning"]],
        panels=panels,
        notes=notes(summary),
        rates=[rates_in_words(summary, name) for name in summary["protocol"]["optimizers"]],
    )
    write_atomic(path, page.encode())


def result_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final results, a row per entry."""
    target = summary["protocol"]["target"]
    header = ["optimizer", "lr", "weight decay", "n", "test accuracy", "test loss", "train loss"]
    header += [f"epochs to {'target' if target is None else f'{target:.4g}'}", "ms/step", "time / sgd", "state B/param"]
    rows = []
    for entry in summary["entries"]:
        final, milliseconds = entry["final"], _scaled(entry["seconds_per_step"], 1000)
        rows.append(
            [
                entry["optimizer"],
                f"{entry['lr']:g}",
                f"{entry['weight_decay']:g}",
                str(entry["n"]),
                *(_spread(final[name]) for name in ("accuracy", "test_loss", "train_loss")),
                _spread(entry["epochs_to_target"], ".2f"),
                _number(milliseconds, ".1f"),
                _number(entry["seconds_per_step_ratio_to_sgd"], ".2f"),
                _number(entry["optimizer_state_bytes_per_parameter"], ".2f"),
            ]
        )
    return header, rows


def tuning_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all tuning runs, those that diverged included."""
    by_target = summary["protocol"]["tune_for"] == "target"
    header = ["optimizer", "lr", "weight decay", "validation accuracy", "validation loss", "train loss", "epochs to target", ""]
    if not by_target:
        header.remove("epochs to target")
    rows = [
        [
            run["optimizer"],
            f"{run['lr']:g}",
            f"{run['weight_decay']:g}",
            *(_number(run[name], ".4f") for name in ("accuracy", "loss", "train_loss")),
            *([_number(run["epochs_to_target"], ".2f")] if by_target else []),
            "diverged" if run["diverged"] else "best" if run["chosen"] else "",
        ]
        for run in summary["tuning"]
    ]
    return header, rows


def notes(summary: Summary) -> list[str]:
    """Sentences on what a reader must know before trusting the table."""
    found = []
    for entry in summary["entries"]:
        label = f"{entry['optimizer']} at lr {entry['lr']:g}"
        if entry["lr_at_grid_edge"]:
            found.append(f"{label} stands at the {entry['lr_at_grid_edge']} rate of its grid: one further out may do better.")
        if entry["diverged"]:
            found.append(f"{entry['diverged']} of {entry['n']} runs of {label} diverged, so it has no mean.")
    if summary["protocol"]["jobs"] > 1:
        found.append(f"{summary['protocol']['jobs']} runs at a time shared the machine: steps took longer than in a run alone.")
    if len(summary["protocol"]["seeds"]) < 3:
        found.append("Fewer than 3 seeds: the spread says little.")
    return found


def rates_in_words(summary: Summary, optimizer: str) -> str:
    """The learning rates that one optimizer was given."""
    protocol = summary["protocol"]
    centre = protocol["centre_lr"][optimizer]
    return f"{optimizer}: {', '.join(f'{centre * factor:g}' for factor in sorted(protocol['lr_factors']))}"


def _has_grid(summary: Summary) -> bool:
    return len(summary["protocol"]["lr_factors"]) > 1


def _spread(statistic: Mapping[str, Any], form: str = ".4f") -> str:
    mean, std = statistic["mean"], statistic["std"]
    return _number(mean, form) + ("" if std is None else f" ± {std:{form}}")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
