"""Figures: curves of a comparison with their spread, its sensitivity to the learning rate, and the layers of a network."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backmatch.cli.checkpoint import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from backmatch.inspection import LayerRecord

# Readable on white and on dark grey, and told apart by people who see few colours (markers differ as well).
COLOURS = ("#3f7fbf", "#d5672d", "#2c9a6e", "#b0609f", "#bf9420", "#5d9fb5", "#8a7fd0", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#24292e"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "backmatch",  # the same figure is the same file
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 3,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color"), INK)

FORMATS: Mapping[str, Mapping[str, Any]] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": 150}}
"""Suffix → options, of the files that a figure can be written to."""

Summary = Mapping[str, Any]


def draw_accuracy(axes: Axes, summary: Summary) -> None:
    """Test accuracy against epochs, mean over seeds, band of one standard deviation."""
    for index, entry in enumerate(_chosen(summary)):
        _band(axes, entry["epochs"], entry["accuracy_mean"], entry["accuracy_std"], index, entry["optimizer"])
    target = summary["protocol"]["target"]
    if target is not None:
        axes.axhline(target, color=INK, linewidth=0.8, linestyle=":", label=f"target {target:.3g}")
    axes.set(xlabel="epochs", ylabel="accuracy", title="Test accuracy")
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def draw_losses(axes: Axes, summary: Summary) -> None:
    """Test loss (solid) and training loss (dashed) against epochs, mean over seeds, band of one standard deviation."""
    for index, entry in enumerate(_chosen(summary)):
        for part, label, linestyle in (("test_loss", "test", "-"), ("train_loss", "training", "--")):
            _band(axes, entry["epochs"], entry[f"{part}_mean"], entry[f"{part}_std"], index, f"{entry['optimizer']}, {label}", linestyle)
    axes.set(xlabel="epochs", ylabel="loss", title="Losses")
    axes.locator_params(axis="x", integer=True)
    axes.legend()


def draw_sensitivity(axes: Axes, summary: Summary) -> None:
    """Final accuracy against the learning rate relative to each optimizer's centre; a run that diverged is a cross at the bottom.

    Tuning runs give validation accuracy of one seed each; a sweep gives test accuracy, mean and deviation over the seeds.
    """
    sweep = summary["protocol"]["sweep"]
    for index, optimizer in enumerate(summary["protocol"]["optimizers"]):
        points: dict[float, list[tuple[float | None, float | None]]] = {}
        if sweep:
            for entry in (entry for entry in summary["entries"] if entry["optimizer"] == optimizer):
                points.setdefault(entry["lr_factor"], []).append((entry["final"]["accuracy"]["mean"], entry["final"]["accuracy"]["std"]))
        else:
            for run in (run for run in summary["tuning"] if run["optimizer"] == optimizer):
                points.setdefault(run["lr_factor"], []).append((None if run["diverged"] else run["accuracy"], None))
        factors = sorted(points)
        # Of several weight decays, the best at each learning rate.
        best = [max(points[factor], key=lambda point: -np.inf if point[0] is None else point[0]) for factor in factors]
        label = f"{optimizer} (1 = lr {summary['protocol']['centre_lr'][optimizer]:g})"
        _band(axes, factors, [mean for mean, _ in best], [std for _, std in best], index, label)
        lost = [factor for factor, (mean, _) in zip(factors, best, strict=True) if mean is None]
        # Slightly apart, so that optimizers that diverge at the same rate are all seen.
        height = 0.02 + 0.04 * index
        axes.plot(lost, [height] * len(lost), "x", color=_colour(index), markersize=7, transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    ticks = sorted(summary["protocol"]["lr_factors"])
    axes.set_xticks(ticks, [f"{factor:g}" for factor in ticks])
    axes.set_xticks([], minor=True)
    which = "Final test accuracy" if sweep else "Final validation accuracy, tuning"
    axes.set(xlabel="learning rate / centre of its grid", ylabel="accuracy", title=f"{which} (x: diverged)")
    axes.legend()


PANELS: Mapping[str, Callable[[Axes, Summary], None]] = {"accuracy": draw_accuracy, "losses": draw_losses, "sensitivity": draw_sensitivity}


def require_plotting(command: str) -> None:
    """Ask for the plotting libraries before a command spends hours on what it would then not be able to draw.

    Raises:
        ModuleNotFoundError: If one of them is not installed.
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"'{command}' draws with {' and '.join(missing)}. Install backmatch[plot].")


def save_figure(draw: Callable[[Figure], None], size: tuple[float, float], *paths: Path) -> None:
    """Draw a figure of ``size`` inches and write it to every path, as SVG or PNG by its suffix."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for path in paths:
            content = io.BytesIO()
            figure.savefig(content, format=path.suffix[1:], **FORMATS[path.suffix])
            write_atomic(path, content.getvalue())


def save_curves(summary: Summary, stem: Path) -> None:
    """Write all panels side by side to ``stem.svg`` and ``stem.png``."""
    save_figure(lambda figure: _fill(figure, summary), (13.5, 3.8), stem.with_suffix(".svg"), stem.with_suffix(".png"))


def inline_panel(name: str, summary: Summary) -> str:
    """One panel as an ``<svg>`` element."""
    return inline_svg(lambda figure: PANELS[name](figure.subplots(), summary), (5.6, 3.5))


def inline_svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    """A figure of ``size`` inches as an ``<svg>`` element that takes its ink from the page, for light and dark alike."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    target = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = target.getvalue()
    return markup[markup.index("<svg") :].replace(INK, "currentColor")


def save_layers(records: Sequence[LayerRecord], stem: Path) -> None:
    """Per layer: scale, pace, and both Hessians' eigenvalues, a bar from lowest to highest (from the mean if the lowest is 0 or
    unknown) with a dot at the mean. Written to ``stem.svg`` and ``stem.png``.
    """
    size = (12.0, 1.6 + 0.28 * len(records))
    save_figure(lambda figure: _draw_layers(figure, records), size, stem.with_suffix(".svg"), stem.with_suffix(".png"))


def _draw_layers(figure: Figure, records: Sequence[LayerRecord]) -> None:
    from matplotlib.ticker import LogLocator

    rows = np.arange(len(records))
    panels = figure.subplots(1, 4, sharey=True)
    for axes, title in zip(panels, ("accumulated scale", "pace", "input Hessian, eigenvalues", "weight Hessian, eigenvalues"), strict=True):
        axes.set(title=title, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    scale, pace, *hessians = panels
    scale.set_yticks(rows, [f"{record.name} {record.kind}" for record in records])
    scale.plot(_positive([record.scale for record in records]), rows, "o-", color=_colour(0))
    pace.plot(_positive([record.pace for record in records]), rows, "o-", color=_colour(1))
    pace.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # its range is often less than a decade
    for axes, side in zip(hessians, ("input_hessian", "weight_hessian"), strict=True):
        spectra = [getattr(record, side) for record in records]
        low, mean, high = (_positive([getattr(spectrum, end, None) for spectrum in spectra]) for end in ("low", "mean", "high"))
        axes.hlines(rows, np.where(np.isnan(low), mean, low), high, color=_colour(2), alpha=0.45, linewidth=4)
        axes.plot(mean, rows, "o", color=_colour(2))
    scale.invert_yaxis()


def _fill(figure: Figure, summary: Summary) -> None:
    for axes, draw in zip(figure.subplots(1, len(PANELS)), PANELS.values(), strict=True):
        draw(axes, summary)


def _chosen(summary: Summary) -> list[Mapping[str, Any]]:
    return [entry for entry in summary["entries"] if entry["chosen"]]


def _band(
    axes: Axes,
    x: Sequence[float],
    mean: Sequence[float | None],
    std: Sequence[float | None],
    index: int,
    label: str,
    linestyle: str = "-",
) -> None:
    centre, spread = _numbers(mean), _numbers(std)
    marker = MARKERS[index % len(MARKERS)]
    axes.plot(x, centre, color=_colour(index), marker=marker, markevery=max(1, len(x) // 12), linestyle=linestyle, label=label)
    axes.fill_between(x, centre - spread, centre + spread, color=_colour(index), alpha=0.18, linewidth=0)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _positive(values: Sequence[float | None]) -> np.ndarray:
    numbers = _numbers(values)
    return np.where(numbers > 0, numbers, np.nan)  # a log axis has no place for an eigenvalue of 0
