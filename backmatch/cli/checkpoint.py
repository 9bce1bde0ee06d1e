"""What lets a run be stopped at any moment: files that are the old one or the new one, one writer to a folder, Ctrl-C between steps."""

from __future__ import annotations

import io
import os
import signal
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
LOCK = ".lock"
"""Name of the file that :func:`sole_writer` holds."""


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Replace ``path`` by a file with ``content``.

    The bytes reach the disk under another name in the same folder before they take the name over, so a reader, or a run killed
    at any moment, finds the old file or the new one in full.

    Raises:
        OSError: If the folder cannot be written or the disk is full; the old file is untouched.
    """
    temporary = temporary_of(path)
    with _named(path):
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


def append_line(path: Path, line: str) -> None:
    """Add ``line``, which ends in a newline, to ``path``; it is on the disk on return. Only a last line may ever be cut off.

    Raises:
        OSError: If the file cannot be written or the disk is full.
    """
    with _named(path), open(path, "ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def crc32_of(*tensors: torch.Tensor) -> int:
    """CRC-32 over all values of tensors, one after the other, wherever they are."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.cpu().contiguous().numpy().data, crc)
    return crc


def temporary_of(path: Path) -> Path:
    """Where the new content of ``path`` is until it is whole; a killed process leaves it behind."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make ``folder``, and keep it from every other run meanwhile.

    The lock belongs to the kernel, which lets go of it when the process ends, however it ends: a killed run locks nobody out. Where
    there is no such lock (Windows, some network file systems) nothing is kept.

    Raises:
        BlockingIOError: If another run, or another thread of this process, holds the folder.
        OSError: If the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except BlockingIOError:
        raise BlockingIOError(f"Another run is writing to {folder}. Wait until it ends or stop it, or choose another --out.") from None
    except OSError as error:
        raise OSError(f"Cannot write to {folder}: {error.strerror}. Choose another --out.") from error
    try:
        yield
    finally:
        if fcntl is not None:
            path.unlink(missing_ok=True)  # while it is held: afterwards it may be another run's
        os.close(lock)


def _lock(path: Path) -> int:
    """The file at ``path``, opened and locked; closing it unlocks.

    Raises:
        BlockingIOError: If it is locked already.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the name in between, and a third may have made it anew.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            return file
        os.close(file)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the operating system, some of which name no file, say which one could not be written and how to go on."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}. Make room there, or allow writing; then 'train' goes on with --resume, "
            "any other command by itself."
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, dicts, lists) together with the settings that it belongs to.

    Raises:
        OSError: As :func:`write_atomic`.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT_VERSION, "settings": settings, "state": state}, buffer)
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote; tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :func:`read_checkpoint`; or if it was written under settings other than ``settings``.
        OSError: If it cannot be read.
    """
    content = read_checkpoint(path)
    stored = content["settings"]
    differing = [key for key in sorted({*stored, *settings}) if stored.get(key) != settings.get(key)]
    if differing:
        seen = ", ".join(f"{key} is {stored.get(key)!r} there and {settings.get(key)!r} here" for key in differing)
        raise ValueError(f"Checkpoint {path} belongs to another run: {seen}. Resume with its settings, or choose another --out.")
    return content["state"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """``settings`` and ``state`` as :func:`save_checkpoint` wrote them, every byte of the state. Executes nothing found in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or has another format.
        OSError: If it cannot be read.
    """
    try:
        file = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"Cannot read checkpoint {path}: {error.strerror}. Allow reading it, or choose another --out.") from error
    try:
        # torch.load passes over the checksums that the file holds, and would go on with weights of which a bit has flipped.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged!r} does not fit it")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage raises whatever its reader stumbles over: KeyError, NotImplementedError, struct.error, ...
        raise ValueError(f"Checkpoint {path} is damaged or not a checkpoint. Restore it, or choose another --out.") from error
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise ValueError(
            f"Checkpoint {path} has format {version if isinstance(version, int) else None}; this version of backmatch reads format "
            f"{FORMAT_VERSION}. Continue with the version that wrote it, or start again in another folder."
        )
    if not all(isinstance(content.get(part), dict) for part in ("settings", "state")):
        raise ValueError(f"Checkpoint {path} lacks its settings or its state. Restore it, or choose another --out.")
    return content


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
