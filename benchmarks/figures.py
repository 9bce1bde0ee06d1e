"""The panel's figures: a summary, or one task of it, onto a matplotlib figure narrow enough for a phone.

Ours are in blue and orange and the ablations dashed and dotted, in every figure; of the peers, the best three of a task are in colours of
their own and the others grey, so that fifteen curves stay readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backmatch.cli.plot import COLOURS, INK, MARKERS
from benchmarks.peers import PEERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
Task = Mapping[str, Any]
Entry = Mapping[str, Any]

WIDTH = 4.2
"""Inches: text of 9 points is then some 11 pixels high on a phone."""
_OURS = {"backmatch-sgd": 0, "backmatch": 1}
_PEER_COLOURS = (*COLOURS[2:], "#7a9a3a", "#c75d7a", "#4fa3a0", "#9c7a5a", "#6d83b8")
_GREY, _WARN = "#a3abb3", "#b4581f"
_VERDICTS = {"win": "#2c9a6e", "tie": "#c3c8cd", "loss": "#d5672d"}
_SHADES = (0.3, 0.6, 1.0)
_USUAL = ("sgd", "adamw", "muon", "soap")
"""Peers with colours of their own where several tasks stand side by side."""
_HIGHEST = 30.0
"""Held-out loss that is shown, times the lowest."""


def _styles() -> dict[str, dict[str, Any]]:
    """Optimizer → the style of its line, in every figure that has it in a colour of its own."""
    peers = [name for name, peer in PEERS.items() if peer.kind == "peer"]
    ablations = [name for name, peer in PEERS.items() if peer.kind == "ablation"]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": _PEER_COLOURS[index % len(_PEER_COLOURS)], "marker": MARKERS[2 + index % (len(MARKERS) - 2)]}
        for index, name in enumerate(peers)
    }
    styles |= {name: {"color": INK, "linestyle": dashes} for name, dashes in zip(ablations, ("--", ":"), strict=True)}
    return styles | {name: {"color": COLOURS[index], "marker": MARKERS[index], "linewidth": 2.2} for name, index in _OURS.items()}


_STYLES = _styles()


def draw_curves(figure: Figure, task: Task) -> None:
    """Loss against steps, mean over seeds and a band of one standard deviation."""
    axes = figure.subplots()
    tops = []
    for entry, style in _styled(task):
        curve, highlighted = entry["curve"], style["color"] != _GREY
        mean, spread = _numbers(curve["mean"]), _numbers(curve["std"])
        axes.plot(curve["steps"], mean, **style)
        if highlighted:
            axes.fill_between(curve["steps"], mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
            tops += [value for value in mean[:2] if math.isfinite(value)]
    if task["target"] is not None:
        axes.axhline(task["target"], color=INK, linewidth=0.8, linestyle=":")
    _plain_log(axes, "y")
    if tops:
        axes.set_ylim(top=1.15 * max(tops))  # what blows up leaves the picture, not its scale to the others
    axes.set(xlabel="steps", ylabel=task["unit"])
    _legend(axes)


def draw_side_by_side(figure: Figure, summary: Summary) -> None:
    """Loss against steps on every task, four in a row: ours, the ablations and the usual peers in their styles, all others grey."""
    tasks = summary["tasks"]
    panels = figure.subplots(math.ceil(len(tasks) / 4), 4, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        bounds = []
        for entry, style in _styled_entries(task["entries"], _USUAL):
            mean = _numbers(entry["curve"]["mean"])
            (line,) = axes.plot(entry["curve"]["steps"], mean, **{**style, "marker": None})
            if style["label"] is not None:
                lines[style["label"]] = line
            if style["color"] != _GREY:
                bounds += [mean[-1], *(mean[:1] if entry["kind"] == "ours" else [])]
        known = [bound for bound in bounds if math.isfinite(bound)]
        if known:
            axes.set_ylim(0.93 * min(known), 1.1 * max(known))
        _plain_log(axes, "y")
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(task["title"], fontsize=9)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    panels[0].set(xlabel="steps", ylabel="test loss")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5)


def draw_finals(figure: Figure, task: Task) -> None:
    """Final loss of every optimizer, best first: a dot for each seed, a bar at the mean; failures in words."""
    entries = by_loss(task["entries"])
    axes = figure.subplots()
    for row, entry in enumerate(entries):
        known = [value for value in entry["loss"]["values"] if value is not None]
        colour = _colour_of(entry)
        axes.plot(known, [row] * len(known), "o", color=colour, alpha=0.55, markersize=4)
        if entry["loss"]["mean"] is not None:
            axes.plot([entry["loss"]["mean"]], [row], "|", color=colour, markersize=11, markeredgewidth=2)
        if entry["failures"]:
            _remark(axes, row, f"{len(entry['failures'])} of {len(entry['loss']['values'])} failed")
    _plain_log(axes, "x")
    _rows(axes, entries)
    axes.set(xlabel=task["unit"])


def draw_targets(figure: Figure, task: Task) -> None:
    """Steps, and seconds of training, until the mean curve is at the best peer's final value."""
    entries = sorted(by_loss(task["entries"]), key=lambda entry: math.inf if entry["steps_to_target"] is None else entry["steps_to_target"])
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("steps_to_target", "seconds_to_target"), ("steps", "seconds"), strict=True):
        for row, entry in enumerate(entries):
            if entry[key] is None and axes is panels[0]:
                _remark(axes, row, "not reached", _GREY)
            if entry[key] is not None:
                axes.hlines(row, 0, entry[key], color=_colour_of(entry), alpha=0.35, linewidth=3)
                axes.plot([entry[key]], [row], "o", color=_colour_of(entry))
        axes.set(xlabel=label)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4)
    _rows(panels[0], entries)


def draw_sensitivity(figure: Figure, task: Task) -> None:
    """Held-out loss at the end of the tuning runs against the learning rate, up to 30 times the lowest; a cross is a run that failed."""
    axes = figure.subplots()
    lost = 0
    for entry, style in _styled(task):
        points = sorted(entry["sensitivity"], key=lambda point: point["lr_factor"])
        factors = [point["lr_factor"] for point in points]
        axes.plot(factors, _numbers([point["loss"] for point in points]), **style)
        failed = [point["lr_factor"] for point in points if point["loss"] is None]
        if failed:
            # Slightly apart, so that optimizers that fail at the same rate are all seen.
            height = [0.97 - 0.04 * lost] * len(failed)
            axes.plot(failed, height, "x", color=style["color"], markersize=6, transform=axes.get_xaxis_transform())
            lost += 1
    known = [point["loss"] for entry in task["entries"] for point in entry["sensitivity"] if point["loss"] is not None]
    if known and max(known) > _HIGHEST * min(known):
        axes.set_ylim(0.9 * min(known), _HIGHEST * min(known))  # what blew up leaves at the top, and does not flatten all else
    _plain_log(axes, "y")
    axes.set_xscale("log")
    ticks = sorted({point["lr_factor"] for entry in task["entries"] for point in entry["sensitivity"]})
    axes.set_xticks(ticks, [f"{factor:.3g}" for factor in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="learning rate / centre of the optimizer's grid", ylabel=f"held-out {task['unit']}")
    _legend(axes)


def draw_paces(figure: Figure, task: Task) -> None:
    """Pace of every weight over the geometric mean of all: a layer right of 1 moves faster than under one rate for all."""
    entry = next(entry for entry in task["entries"] if entry["optimizer"] == "backmatch-sgd")
    moments, shapes = entry["paces"], entry["shapes"]
    names = list(moments[-1]["paces"])
    axes = figure.subplots()
    rows = np.arange(len(names))
    relative = []
    for moment in moments:
        logs = np.log([moment["paces"][name] for name in names])
        relative.append(np.exp(logs - logs.mean()))
    axes.hlines(rows, np.min(relative, axis=0), np.max(relative, axis=0), color=COLOURS[0], alpha=0.25, linewidth=3)
    for moment, values, shade in zip(moments, relative, _SHADES[-len(moments) :], strict=True):
        axes.plot(values, rows, "o", color=COLOURS[0], alpha=shade, label=f"step {moment['step']}")
    axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(rows, [f"{name.removesuffix('.weight')}  {'×'.join(map(str, shapes[name]))}" for name in names])
    axes.invert_yaxis()
    _plain_log(axes, "x")
    axes.set(xlabel="pace / geometric mean of all   (slower ← 1 → faster)")
    _legend(axes, columns=3)


def draw_record(figure: Figure, summary: Summary) -> None:
    """Wins, ties and losses of ours against every other, a bar each."""
    totals = summary["totals"]
    others = list(dict.fromkeys(other for counts in totals.values() for other in counts))
    panels = np.atleast_1d(figure.subplots(1, len(totals), sharey=True))
    for axes, (ours, counts) in zip(panels, totals.items(), strict=True):
        for row, other in enumerate(others):
            left = 0
            for verdict, colour in _VERDICTS.items():
                number = counts.get(other, {}).get(verdict, 0)
                axes.barh(row, number, left=left, color=colour, height=0.72)
                if number:
                    axes.text(left + number / 2, row, str(number), ha="center", va="center", fontsize=8, color="#16191d")
                left += number
        axes.set(title=summary["optimizers"][ours]["title"], xlabel="tasks")
        axes.grid(False)
        axes.set_xticks([])
    panels[0].set_yticks(range(len(others)), [summary["optimizers"][other]["title"] for other in others])
    panels[0].invert_yaxis()
    handles = [panels[0].barh(0, 0, color=colour, label=verdict) for verdict, colour in _VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def draw_profile(figure: Figure, summary: Summary) -> None:
    """Share of the tasks on which an optimizer's final loss is at most so many times the lowest one."""
    axes = figure.subplots()
    ratios = {name: [math.inf if ratio is None else ratio for ratio in values] for name, values in summary["ratios"].items()}
    finite = [ratio for values in ratios.values() for ratio in values if math.isfinite(ratio)]
    right = min(max(finite, default=1.0), 10.0) * 1.05
    entries = [{"optimizer": name, **summary["optimizers"][name]} for name in ratios]
    best = sorted((e["optimizer"] for e in entries if e["kind"] == "peer"), key=lambda n: sum(math.log(min(r, right)) for r in ratios[n]))[
        :3
    ]
    for entry, style in _styled_entries(entries, best):
        values = ratios[entry["optimizer"]]
        x = [1.0, *values, right]
        y = [sum(value <= at for value in values) / len(values) for at in x]
        axes.step(x, y, where="post", **{**style, "marker": None})
    axes.set_xlim(1.0, right)
    axes.set_ylim(0, 1.03)
    _plain_log(axes, "x")
    axes.set(xlabel="final loss / lowest final loss of the task", ylabel="share of tasks")
    _legend(axes)


def draw_ranks(figure: Figure, summary: Summary) -> None:
    """Mean rank over tasks and seeds with its 95 % bootstrap interval."""
    ranks = summary["ranks"]
    entries = [{"optimizer": name, **summary["optimizers"][name]} for name in sorted(ranks, key=lambda name: ranks[name]["mean"])]
    axes = figure.subplots()
    for row, entry in enumerate(entries):
        rank = ranks[entry["optimizer"]]
        axes.hlines(row, rank["low"], rank["high"], color=_colour_of(entry), alpha=0.45, linewidth=3)
        axes.plot([rank["mean"]], [row], "o", color=_colour_of(entry))
    _rows(axes, entries)
    axes.set(xlabel=f"mean rank of {len(entries)} (1 is best)")


def draw_cost(figure: Figure, summary: Summary) -> None:
    """Bytes of state per parameter, and time of a step over SGD's, a dot for each task."""
    names = [
        name for name in summary["optimizers"] if any(entry["optimizer"] == name for task in summary["tasks"] for entry in task["entries"])
    ]
    entries = [{"optimizer": name, **summary["optimizers"][name]} for name in names]
    keys = (("state_bytes_per_parameter", "bytes / parameter"), ("time_ratio_to_sgd", "step time / SGD"))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, label) in zip(panels, keys, strict=True):
        for row, entry in enumerate(entries):
            found = [e[key] for task in summary["tasks"] for e in task["entries"] if e["optimizer"] == entry["optimizer"]]
            known = [value for value in found if value is not None]
            axes.plot(known, [row] * len(known), "o", color=_colour_of(entry), alpha=0.6)
        _plain_log(axes, "x")
        axes.set(xlabel=label)
    _rows(panels[0], entries)


def by_loss(entries: Sequence[Entry]) -> list[Entry]:
    """Lowest final loss first, failed ones last."""
    return sorted(entries, key=lambda entry: math.inf if entry["loss"]["mean"] is None else entry["loss"]["mean"])


def height_of(rows: int) -> float:
    """Inches for a figure with a line of text for each of so many rows."""
    return 0.75 + 0.215 * rows


def _best_peers(task: Task) -> list[str]:
    """Names of the three peers with the lowest final losses."""
    return [entry["optimizer"] for entry in by_loss(task["entries"]) if entry["kind"] == "peer"][:3]


def _styled(task: Task) -> list[tuple[Entry, dict[str, Any]]]:
    return _styled_entries(task["entries"], _best_peers(task))


def _styled_entries(entries: Sequence[Entry], best: Sequence[str]) -> list[tuple[Entry, dict[str, Any]]]:
    """Every entry with its line's style, those in grey first so that they lie below."""
    styled: list[tuple[Entry, dict[str, Any]]] = []
    told = False
    for entry in entries:
        name = entry["optimizer"]
        if name in best or entry["kind"] != "peer":
            style: dict[str, Any] = {**_STYLES[name], "label": entry["title"]}
            styled.append((entry, style))
        else:
            styled.insert(0, (entry, {"color": _GREY, "linewidth": 0.9, "label": None if told else "other peers"}))
            told = True
    return styled


def _colour_of(entry: Entry) -> str:
    """In figures that name every row: ours in their colours, ablations and peers in two greys."""
    return COLOURS[_OURS[entry["optimizer"]]] if entry["kind"] == "ours" else INK if entry["kind"] == "ablation" else "#7d868f"


def _rows(axes: Axes, entries: Sequence[Entry]) -> None:
    axes.set_yticks(range(len(entries)), [entry["title"] for entry in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    for label, entry in zip(axes.get_yticklabels(), entries, strict=True):
        label.set_fontweight("bold" if entry["kind"] == "ours" else "normal")


def _remark(axes: Axes, row: int, text: str, colour: str = _WARN) -> None:
    axes.text(0.98, row, text, ha="right", va="center", fontsize=8, color=colour, transform=axes.get_yaxis_transform())


def _plain_log(axes: Axes, which: str) -> None:
    """A log axis with plain numbers, at 1, 2 and 5 where it spans little."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    span = math.log10(high / low) if low > 0 else 1.0
    if span < 0.6:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 2.2 else (1.0,)))
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, columns: int = 2) -> None:
    axes.figure.legend(loc="outside lower center", ncols=columns)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


OVERVIEW: Mapping[str, Callable[[Figure, Summary], None]] = {
    "record": draw_record,
    "ranks": draw_ranks,
    "profile": draw_profile,
    "cost": draw_cost,
}
PER_TASK: Mapping[str, Callable[[Figure, Task], None]] = {
    "curves": draw_curves,
    "finals": draw_finals,
    "targets": draw_targets,
    "sensitivity": draw_sensitivity,
    "paces": draw_paces,
}
