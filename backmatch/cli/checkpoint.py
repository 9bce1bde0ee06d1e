"""A run's state in one file that is either the old one or the new one, whatever happens; and Ctrl-C between two steps only."""

from __future__ import annotations

import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` by a file with ``content``.

    The bytes reach the disk under another name in the same folder before they take the name over, so a reader, or a run killed
    at any moment, finds the old file or the new one in full.

    Raises:
        OSError: If the folder cannot be written or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and has no need to
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, dicts, lists) together with the settings that it belongs to.

    Raises:
        OSError: As :func:`write_atomic`.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT_VERSION, "settings": settings, "state": state}, buffer)
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote; tensors on the CPU. Executes nothing found in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, has another format, or was written under settings other than ``settings``.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"Checkpoint {path} is damaged or not a checkpoint. Restore it, or choose another --out.") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"Checkpoint {path} has format {version}; this version of backmatch reads format {FORMAT_VERSION}. "
            "Continue with the version that wrote it, or start again in another folder."
        )
    stored = content["settings"]
    differing = [key for key in sorted({*stored, *settings}) if stored.get(key) != settings.get(key)]
    if differing:
        seen = ", ".join(f"{key} is {stored.get(key)!r} there and {settings.get(key)!r} here" for key in differing)
        raise ValueError(f"Checkpoint {path} belongs to another run: {seen}. Resume with its settings, or choose another --out.")
    return content["state"]


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C takes effect between two steps, where the state is whole; a second one takes effect at once.

    Gives a function that says whether Ctrl-C was seen.
    """
    # Handlers may be set in the main thread only; a background job of a shell ignores Ctrl-C and must go on doing so.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield lambda: False
        return
    seen = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        seen.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
