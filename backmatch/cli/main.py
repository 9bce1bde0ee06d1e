"""The command ``backmatch``: each subcommand is a settings class, each field of it a flag."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import tyro

from backmatch import __version__

# Command: module, settings class, function, summary. Imported when called, so `train` does not wait for plotting libraries.
COMMANDS = {
    "train": ("backmatch.cli.train", "TrainConfig", "train", "train one model, with log and checkpoints"),
    "compare": ("backmatch.cli.compare", "CompareConfig", "compare", "compare optimizers over seeds, with a report"),
    "inspect": ("backmatch.cli.inspect", "InspectConfig", "inspect", "show gain, scale and pace of every layer"),
}


_OUT_OF_MEMORY = ("allocate memory", "out of memory", "size calculation overflowed")
"""What torch says on a CPU, on a GPU, and of sizes that no machine has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = "\n".join(f"  {name:10}{summary}" for name, (*_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "backmatch",
        description="Layer-wise adaptive rates by back-matching propagation.",
        epilog=f"commands:\n{commands}\n\n'backmatch COMMAND --help' lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="backmatch COMMAND [flags]",
    )
    parser.add_argument("--version", action="version", version=f"backmatch {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    name = parser.parse_args(argv[:1]).command
    module_name, config_name, function_name, _ = COMMANDS[name]
    try:
        module = import_module(module_name)
        config = tyro.cli(getattr(module, config_name), prog=f"backmatch {name}", args=argv[1:])
        getattr(module, function_name)(config)
    except KeyboardInterrupt:
        return 130
    except ConnectionError as error:
        print(f"backmatch: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # threads that wait for a lost rank would hold up any other way out
    # What this package raises for a user's mistake; anything else is a defect and keeps its traceback.
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        print(f"backmatch: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"backmatch: error: Not enough memory: {first} Lower --width or --batch-size, or --limit the data.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
