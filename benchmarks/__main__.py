"""The panel's command line: ``python -m benchmarks run``, then ``report``; and ``overview`` of several reported panels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from backmatch.checks import check_in
from benchmarks.execution import execute
from benchmarks.peers import PEERS
from benchmarks.plan import PROTOCOLS, cells_of, check_protocol, claim
from benchmarks.tasks import TASKS, Budget


@dataclass(frozen=True)
class RunConfig:
    """Make the runs that --out does not hold yet. The same command again goes on where a stopped one stood.

    On several machines: --shard 0/4 to 3/4, then copy their folders together and report on the whole.
    """

    data: Path
    """Folder of cifar10/, mnist/ and tinyshakespeare.txt."""
    out: Path = Path("runs/panel")
    """Folder of the run files."""
    budget: Budget = "small"
    """small: 20 minutes on two slow cores. full: days; to be stopped, continued and split at will."""
    tasks: tuple[str, ...] = ()
    """Default: all of the budget."""
    optimizers: tuple[str, ...] = tuple(PEERS)
    """Which peers."""
    shard: str = "0/1"
    """i/n: this machine's share, the i-th of n from 0 on."""
    jobs: int = 1
    """Runs side by side, each with one thread."""
    steps: int | None = None
    """Steps of every run, in place of the budget's."""
    tune_steps: int | None = None
    """Steps of the tuning runs, where fewer are to do."""
    seeds: tuple[int, ...] = ()
    """Seeds that are reported, in place of the budget's."""
    lr_factors: tuple[float, ...] = ()
    """Grid of every optimizer, times its own centre, in place of the budget's."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: a GPU, which several --jobs share."""


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html and summary.json from the run files in --out."""

    out: Path = Path("runs/panel")
    """Folder of the run files."""
    markdown: bool = False
    """Print the results as markdown tables too."""


@dataclass(frozen=True)
class OverviewConfig:
    """Print the tables of several reported panels as one, and draw their curves side by side."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that hold a summary.json, no two with the same task."""
    figure: Path = Path("runs/overview.svg")
    """The curves: an SVG or a PNG."""


def run(config: RunConfig) -> None:
    """Make the runs of a panel."""
    check_in("jobs", config.jobs, 1)
    protocol = replace(PROTOCOLS[config.budget], steps=config.steps, tune_steps=config.tune_steps, device=config.device)
    protocol = replace(protocol, seeds=config.seeds or protocol.seeds, lr_factors=config.lr_factors or protocol.lr_factors)
    check_protocol(protocol)
    tasks = config.tasks or tuple(task.name for task in TASKS.values() if config.budget in task.steps)
    cells = cells_of(protocol, tasks, config.optimizers, config.shard)
    for task, _ in cells:
        TASKS[task].check_data(config.data)
    claim(config.out, protocol)
    execute(protocol, cells, config.data, config.out, config.jobs)
    print(f"Done. Report: python -m benchmarks report --out {config.out}")


def report(config: ReportConfig) -> None:
    """Write the report of a panel."""
    # Imported here, so that machines that only run need no plotting libraries.
    from benchmarks.report import markdown_tables, write_report
    from benchmarks.summary import summarise

    summary = summarise(config.out)
    write_report(summary, config.out)
    if config.markdown:
        print(markdown_tables(summary))
    print(f"Report: {config.out / 'report.html'}", file=sys.stderr)


def overview(config: OverviewConfig) -> None:
    """Print and draw several panels as one."""
    from benchmarks.report import markdown_tables, overview_table, write_overview
    from benchmarks.summary import merge

    if not config.folders:
        raise ValueError("No folder given. Give those of reported panels, as runs/panel.")
    summary = merge(config.folders)
    print(f"{overview_table(summary)}\n\n{markdown_tables(summary)}")
    config.figure.parent.mkdir(parents=True, exist_ok=True)
    write_overview(summary, config.figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 after Ctrl-C."""
    commands: Any = (
        Annotated[RunConfig, tyro.conf.subcommand("run")]
        | Annotated[ReportConfig, tyro.conf.subcommand("report")]
        | Annotated[OverviewConfig, tyro.conf.subcommand("overview")]
    )
    config = tyro.cli(commands, prog="python -m benchmarks", args=argv, description=__doc__)
    try:
        if isinstance(config, RunConfig):
            run(config)
        elif isinstance(config, ReportConfig):
            report(config)
        else:
            overview(config)
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
