"""Ranks that torchrun starts: they train as one process, outlive a killed one, and do not wait for ever for one that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.testing import assert_close

pytest.importorskip("sklearn")

from backmatch.cli.checkpoint import read_checkpoint
from backmatch.cli.train import TrainConfig, train
from tests.cli.test_train import assert_same_run, read_log
from tests.distributed.ranks import needs_gloo
from tests.faults.runs import files

pytestmark = [needs_gloo, pytest.mark.timeout(180), pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")]

EPOCHS, RANKS = 10, 2
RUN = ("--data", "digits", "--model", "mlp", "--threads", "1", "--checkpoint-every", "5", "--batch-size", "127")
"""Batches that two ranks cannot halve."""
# Without the last, torchrun's restart after a SIGKILL is flaky (pytorch issue 135712).
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@contextmanager
def torchrun(out: Path, *flags: str, optimizer: str = "backmatch", epochs: int = EPOCHS) -> Iterator[subprocess.Popen[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=3"]
    command = ["-m", "backmatch.cli.main", "train", *RUN, "--optimizer", optimizer, "--epochs", str(epochs), "--out", str(out), *flags]
    with subprocess.Popen(
        [*launcher, *command],
        env=os.environ | SURROUNDINGS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            ended = process.poll() is not None
            for worker in workers(process.pid).values():  # in sessions of their own
                os.kill(worker, signal.SIGKILL)
            if not ended:
                process.kill()


def workers(launcher: int) -> dict[int, int]:
    """Rank → process, of those that a launcher started and that run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == launcher and state != "Z":
                variables = dict(entry.partition("=")[::2] for entry in (path / "environ").read_text().split("\0"))
                found[int(variables["RANK"])] = int(path.name)
        except (KeyError, FileNotFoundError, ProcessLookupError):  # no rank; or it ended meanwhile
            continue
    return found


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def finish(process: subprocess.Popen[str], seconds: float = 100.0) -> str:
    output, _ = process.communicate(timeout=seconds)
    return output


def step_of(out: Path) -> int:
    """Of the last checkpoint."""
    path = out / "checkpoint.pt"
    return read_checkpoint(path)["state"]["progress"]["step"] if path.exists() else 0


def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    for optimizer, epochs in (("backmatch-sgd", 2), ("backmatch", 1)):
        alone, ranks = tmp_path / f"{optimizer} alone", tmp_path / f"{optimizer} ranks"
        train(
            TrainConfig(
                data="digits", model="mlp", optimizer=optimizer, epochs=epochs, threads=1, checkpoint_every=5, batch_size=127, out=alone
            )
        )
        with torchrun(ranks, optimizer=optimizer, epochs=epochs) as process:
            output = finish(process)
        assert process.returncode == 0, output
        one, many = (read_checkpoint(out / "checkpoint.pt")["state"]["model"] for out in (alone, ranks))
        # float32, sums in another order; steps as long as lr says, however small the gradient, make more of that than SGD's would. Over
        # more steps some unit comes to lie on the other side of its ReLU for some image: what began as a rounding error ends as 5e-3.
        assert_close(many, one, rtol=1e-3, atol=1e-4)
        for a, b in zip(read_log(alone), read_log(ranks), strict=True):
            assert a["event"] == b["event"]
            if a["event"] == "evaluation":
                assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
                assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
        assert list(files(ranks)) == ["checkpoint.pt", "log.jsonl"]


def test_a_killed_rank_is_started_again_and_changes_nothing(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with torchrun(whole) as process:
        output = finish(process)
    assert process.returncode == 0, output
    with torchrun(killed) as process:
        wait_for(lambda: step_of(killed) >= 10)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        output = finish(process)
    assert process.returncode == 0, output
    assert "Resuming" in output
    assert_same_run(whole, killed)
    assert list(files(killed)) == ["checkpoint.pt", "log.jsonl"]


def test_a_rank_that_hangs_ends_the_run_in_an_error(tmp_path: Path) -> None:
    with torchrun(tmp_path / "run", "--rank-timeout", "5", epochs=1000) as process:
        wait_for(lambda: step_of(tmp_path / "run") >= 5)
        first, hung = (workers(process.pid)[rank] for rank in range(RANKS))
        os.kill(hung, signal.SIGSTOP)
        started = time.monotonic()
        wait_for(lambda: first not in workers(process.pid).values())  # it gave up; torchrun then tries to start all anew
        assert time.monotonic() - started >= 4.0
        os.killpg(process.pid, signal.SIGKILL)
        for worker in {*workers(process.pid).values(), hung}:
            os.kill(worker, signal.SIGKILL)
        output = finish(process, 20.0)
    assert "lost the others" in output
    assert "Start the run again" in output
    assert step_of(tmp_path / "run") >= 5
