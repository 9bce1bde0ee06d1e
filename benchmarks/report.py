"""The panel for its readers: one self-contained HTML page, ``summary.json``, and markdown tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backmatch.cli.checkpoint import write_atomic
from backmatch.cli.plot import FORMATS, inline_svg, require_plotting, save_figure
from benchmarks.figures import OVERVIEW, PER_TASK, WIDTH, by_loss, draw_side_by_side, height_of

Summary = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]

_CAPTIONS = {
    "record": "Tasks that ours wins, ties and loses against every peer and both ablations. A win: fewer failures, or a lower final loss "
    "beyond the 95 % Welch interval.",
    "ranks": "Mean rank by final loss over tasks and seeds; bars are 95 % bootstrap intervals.",
    "profile": "Performance profile: the share of tasks on which the final loss is at most so many times the lowest. Higher and further "
    "left is better.",
    "cost": "What a step costs: bytes of state per parameter, and time against SGD's, a dot for each task.",
    "curves": "Test loss during training: mean over seeds, band of one standard deviation. Dotted: the best peer's final value.",
    "finals": "Final test loss, best first: a dot for each seed, a bar at the mean.",
    "targets": "Steps and seconds of training until the mean curve is at the best peer's final value.",
    "sensitivity": "Held-out loss at every learning rate of the grid (tuning runs), up to 30 times the lowest. A cross at the top "
    "is a run that failed.",
    "paces": "Why: the pace BackMatchSGD gives each layer's weights, early, later and at the end (seed {seed}). From input to output, with "
    "shapes.",
}


def write_report(summary: Summary, folder: Path) -> None:
    """Write ``summary.json`` and ``report.html`` to ``folder``: styles and figures inside, no scripts, every text escaped.

    Raises:
        ModuleNotFoundError: If matplotlib or jinja2 is not installed.
        OSError: If they cannot be written.
    """
    require_plotting("report")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        protocol=summary["protocol"],
        headline=headline(summary),
        notes=notes(summary),
        overview=_overview(summary),
        matrices=[(summary["optimizers"][ours]["title"], matrix(summary, ours)) for ours in summary["totals"]],
        tasks=[(task, _figures(task, summary["protocol"]["seeds"][0]), result_table(task)) for task in summary["tasks"]],
        rules=(Path(__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8"),
    )
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    write_atomic(folder / "report.html", page.encode())


def headline(summary: Summary) -> list[str]:
    """A sentence for each of ours: its record against peers and against ablations."""
    sentences = []
    for ours, counts in summary["totals"].items():
        parts = []
        for kind, label in (("peer", "peers"), ("ablation", "ablations")):
            chosen = [count for other, count in counts.items() if summary["optimizers"][other]["kind"] == kind]
            if chosen:
                won, tied, lost = (sum(count[verdict] for count in chosen) for verdict in ("win", "tie", "loss"))
                parts.append(f"wins {won}, ties {tied} and loses {lost} of {won + tied + lost} comparisons with {label}")
        sentences.append(f"{summary['optimizers'][ours]['title']} {'; '.join(parts)}.")
    return sentences


def notes(summary: Summary) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    if (steps := summary["protocol"]["steps"]) is not None:
        found.append(f"Every run that is reported had {steps} steps, in place of its budget's.")
    if (steps := summary["protocol"]["tune_steps"]) is not None:
        found.append(f"Tuning runs had {steps} steps.")
    if summary["missing"]:
        found.append(f"Not finished, so not shown: {', '.join(summary['missing'])}.")
    if len(summary["devices"]) > 1:
        found.append(f"Runs are from different machines, whose times do not compare: {'; '.join(summary['devices'])}.")
    if len(summary["protocol"]["seeds"]) < 3:
        found.append("Fewer than 3 seeds: the spread says little.")
    for task in summary["tasks"]:
        for edge in ("lowest", "highest"):
            if names := [entry["title"] for entry in task["entries"] if entry["lr_at_grid_edge"] == edge]:
                found.append(f"{task['title']}: best at the {edge} rate of its grid, so one further out may do better: {', '.join(names)}.")
        for entry in task["entries"]:
            for failure in entry["failures"]:
                found.append(f"{task['title']}: {entry['title']}, seed {failure['seed']}, failed: {failure['failure']}.")
    return found


def result_table(task: Mapping[str, Any]) -> Table:
    """Header and rows of one task, best first."""
    header = ["optimizer", "lr", "test loss", "accuracy", "steps to target", "s to target", "ms/step", "state B/param"]
    if all(entry["accuracy"]["mean"] is None for entry in task["entries"]):
        header.remove("accuracy")
    rows = []
    for entry in by_loss(task["entries"]):
        failed, count = len(entry["failures"]), len(entry["loss"]["values"])
        cells = {
            "optimizer": entry["title"],
            "lr": f"{entry['lr']:.3g}",
            "test loss": f"{failed} of {count} failed" if failed else _spread(entry["loss"]),
            "accuracy": _spread(entry["accuracy"]),
            "steps to target": _number(entry["steps_to_target"], "d"),
            "s to target": _number(entry["seconds_to_target"], ".1f"),
            "ms/step": _number(None if entry["seconds_per_step"] is None else 1000 * entry["seconds_per_step"], ".1f"),
            "state B/param": _number(entry["state_bytes_per_parameter"], ".1f"),
        }
        rows.append([cells[name] for name in header])
    return header, rows


def matrix(summary: Summary, ours: str) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """Tasks across, others down; a cell is its verdict and the relative difference of the mean final losses."""
    tasks = summary["tasks"]
    rows = []
    for other in summary["totals"][ours]:
        cells = []
        for task in tasks:
            comparison = task["verdicts"].get(ours, {}).get(other)
            relative = comparison and comparison["relative"]
            text = "" if comparison is None else comparison["verdict"] if relative is None else f"{100 * relative:+.1f} %"
            cells.append((comparison["verdict"] if comparison else "", text))
        rows.append((summary["optimizers"][other]["title"], cells))
    return [task["title"] for task in tasks], rows


def markdown_tables(summary: Summary) -> str:
    """The results as markdown: one table of all final losses, one of wins, ties and losses."""
    return "\n\n".join([finals_table(summary), *([record_table(summary)] if summary["totals"] else [])])


def finals_table(summary: Summary) -> str:
    """Final test losses as markdown, optimizers down and tasks across, the lowest mean of a task in bold; and mean ranks, if any."""
    ranks = summary["ranks"]
    rows = []
    for name in _present(summary):
        row = [summary["optimizers"][name]["title"]]
        for task in summary["tasks"]:
            entry = next((entry for entry in task["entries"] if entry["optimizer"] == name), None)
            best = min((e["loss"]["mean"] for e in task["entries"] if e["loss"]["mean"] is not None), default=None)
            text = "" if entry is None else f"{len(entry['failures'])} failed" if entry["failures"] else _spread(entry["loss"])
            row.append(f"**{text}**" if entry is not None and best is not None and entry["loss"]["mean"] == best else text)
        if ranks:
            rank = ranks.get(name)
            row.append("" if rank is None else f"{rank['mean']:.1f} ({rank['low']:.1f} to {rank['high']:.1f})")
        rows.append(row)
    header = ["optimizer", *(f"{task['title']}, {task['steps']} steps" for task in summary["tasks"]), *(["mean rank"] if ranks else [])]
    return _markdown(header, rows)


def record_table(summary: Summary) -> str:
    """Wins, ties and losses of ours as markdown, a row for each of the others."""
    totals = summary["totals"]
    rows = [
        [summary["optimizers"][other]["title"], *(_counts(totals[ours].get(other)) for ours in totals)]
        for other in _present(summary)
        if summary["optimizers"][other]["kind"] != "ours"
    ]
    return _markdown(["against", *(f"{summary['optimizers'][ours]['title']}, win / tie / loss" for ours in totals)], rows)


def overview_table(summary: Summary) -> str:
    """Final test loss, and accuracy, of ours, of SGD, AdamW and the best peer, as markdown; a row for each task."""
    names = ("backmatch", "backmatch-sgd", "sgd", "adamw")
    header = ["task", *(summary["optimizers"][name]["title"] for name in names), "best peer", "BackMatch against it"]
    rows = []
    for task in summary["tasks"]:
        entries = {entry["optimizer"]: entry for entry in task["entries"]}
        best = entries.get(task["target_of"])
        rows.append(
            [
                f"{task['title']}, {task['steps']} steps of {task['batch_size']}",
                *(_final(entries[name]) if name in entries else "" for name in names),
                "" if best is None else f"{best['title']} {_final(best)}",
                "" if best is None else task["verdicts"].get("backmatch", {}).get(best["optimizer"], {}).get("verdict", ""),
            ]
        )
    return _markdown(header, rows)


def write_overview(summary: Summary, path: Path) -> None:
    """Draw the curves of all tasks side by side.

    Args:
        summary: Of one panel or several.
        path: Of an SVG or PNG file.

    Raises:
        ValueError: If it is neither.
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If it cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"Invalid figure: {path}. Its name must end in {' or '.join(FORMATS)}.")
    require_plotting("overview")
    height = 0.6 + 2.1 * math.ceil(len(summary["tasks"]) / 4)
    save_figure(lambda figure: draw_side_by_side(figure, summary), (10.0, height), path)


def _present(summary: Summary) -> list[str]:
    ran = {entry["optimizer"] for task in summary["tasks"] for entry in task["entries"]}
    return [name for name in summary["optimizers"] if name in ran]


def _final(entry: Mapping[str, Any]) -> str:
    accuracy = entry["accuracy"]["mean"]
    if entry["failures"]:
        return f"{len(entry['failures'])} of {len(entry['loss']['values'])} failed"
    return _spread(entry["loss"]) + ("" if accuracy is None else f", {accuracy:.1%}")


def _counts(counts: Mapping[str, int] | None) -> str:
    return "" if counts is None else f"{counts['win']} / {counts['tie']} / {counts['loss']}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _overview(summary: Summary) -> list[tuple[Any, str]]:
    rows = {"record": len(summary["optimizers"]), "ranks": len(summary["ranks"]), "cost": len(summary["optimizers"]), "profile": 12}
    shown = [
        name for name in OVERVIEW if (name != "record" or summary["totals"]) and (name not in ("ranks", "profile") or summary["ranks"])
    ]
    return [_figure(OVERVIEW[name], summary, rows[name], _CAPTIONS[name]) for name in shown]


def _figures(task: Mapping[str, Any], seed: int) -> list[tuple[Any, str]]:
    count = len(task["entries"])
    paced: list[Any] = next((entry["paces"] for entry in task["entries"] if entry["optimizer"] == "backmatch-sgd"), [])
    rows = {"curves": 13, "finals": count, "targets": count, "sensitivity": 13, "paces": 2 + len(paced[-1]["paces"]) if paced else 0}
    shown = [name for name in PER_TASK if rows[name] and (name != "targets" or task["target"] is not None)]
    return [_figure(PER_TASK[name], task, rows[name], _CAPTIONS[name].format(seed=seed)) for name in shown]


def _figure(draw: Any, subject: Mapping[str, Any], rows: int, caption: str) -> tuple[Any, str]:
    from markupsafe import Markup

    # Markup already: matplotlib escapes the text it draws.
    return Markup(inline_svg(lambda figure: draw(figure, subject), (WIDTH, height_of(rows)))), caption


def _spread(statistic: Mapping[str, Any]) -> str:
    mean, std = statistic["mean"], statistic["std"]
    return _number(mean, ".4g" if mean is not None and mean >= 10 else ".4f") + ("" if std is None else f" ± {std:.2g}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
