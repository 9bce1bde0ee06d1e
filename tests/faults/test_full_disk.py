"""A disk that fills up during a run: one clear error, the last checkpoint whole, nothing half written; with room again it goes on."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("resource")

import resource

from backmatch.cli.checkpoint import read_checkpoint
from backmatch.cli.train import TrainConfig, train
from tests.cli.test_train import assert_same_run
from tests.faults.runs import before_step, config, end_of, files, start

pytestmark = pytest.mark.timeout(120)

NEWNS, NEWUSER, PRIVATE = 0x20000, 0x10000000, 0x44000
NO_MOUNTS = 77


def mount_small_disk(folder: Path, size: str) -> None:
    """A disk of its own at ``folder``, which this process alone sees and which goes with it; needs no privileges where users may do so."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    try:
        if libc.unshare(NEWNS) != 0 and libc.unshare(NEWNS | NEWUSER) == 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        private = libc.mount(None, b"/", None, PRIVATE, None) == 0
    except (AttributeError, OSError):  # no such call on this system; no such right
        os._exit(NO_MOUNTS)
    if not private or libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
        os._exit(NO_MOUNTS)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def limit_files(size: int) -> None:
    """No file may grow beyond ``size``: writing says so as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def run_out_of_space(settings: TrainConfig, kept: Path, number: int, use_up: Callable[[], None], free: Callable[[], None]) -> None:
    """Train on a disk that is full from the ``number``-th step on, and again when there is room; both states are copied to ``kept``."""
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, number, use_up)
        try:
            train(settings)
            error = ""
        except OSError as caught:
            error = str(caught)
    free()
    shutil.copytree(settings.out, kept / "full")
    (kept / "error.json").write_text(json.dumps(error))
    train(TrainConfig(**vars(settings) | {"resume": True}))
    shutil.copytree(settings.out, kept / "resumed")


def on_a_small_disk(disk: Path, kept: Path, number: int) -> None:
    mount_small_disk(disk, "1m")
    ballast = disk / "ballast"
    run_out_of_space(config(disk / "run"), kept, number, lambda: fill(ballast), ballast.unlink)


def under_a_limit(out: Path, kept: Path, number: int, what: str) -> None:
    def full() -> None:
        limit_files((out / "log.jsonl").stat().st_size + 10 if what == "log.jsonl" else 5000)

    run_out_of_space(config(out), kept, number, full, lambda: limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert end_of(start(train, config(out))) == 0
    return out


def assert_survived(whole: Path, kept: Path, *, what: str, reason: str, checkpoint: int) -> None:
    error = json.loads((kept / "error.json").read_text())
    assert error.startswith("Cannot write ")
    assert f"{what}: {reason}. Make room there" in error
    assert "--resume" in error
    assert read_checkpoint(kept / "full" / "checkpoint.pt")["state"]["progress"]["step"] == checkpoint
    for folder in ("full", "resumed"):
        assert list(files(kept / folder)) == ["checkpoint.pt", "log.jsonl"]
    assert_same_run(whole, kept / "resumed")


def test_a_disk_that_is_full(tmp_path: Path, whole: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    code = end_of(start(on_a_small_disk, disk, tmp_path, 20))
    if code == NO_MOUNTS:
        pytest.skip("no right to mount a disk here")
    assert code == 0
    assert_survived(whole, tmp_path, what="checkpoint.pt", reason="No space left on device", checkpoint=18)


# Evaluations come after steps 6, 11, 17, 22, ...: the log is written at 17, before the checkpoint at 18.
@pytest.mark.parametrize(("number", "what", "checkpoint"), [(16, "checkpoint.pt", 15), (16, "log.jsonl", 15)])
def test_a_file_that_cannot_grow(tmp_path: Path, whole: Path, number: int, what: str, checkpoint: int) -> None:
    assert end_of(start(under_a_limit, tmp_path / "run", tmp_path, number, what)) == 0
    assert_survived(whole, tmp_path, what=what, reason="File too large", checkpoint=checkpoint)


def refused_at_the_start(out: Path) -> None:
    limit_files(0)
    with pytest.raises(OSError, match=r"Cannot write .*log.jsonl: File too large"):
        train(config(out, epochs=1))
    assert files(out) == {}
    limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert train(config(out, epochs=1)).steps == 22


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    assert end_of(start(refused_at_the_start, tmp_path / "run")) == 0
