"""Step times: what is put down, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from benchmarks import step_time
from benchmarks.step_time import Config, main
from benchmarks.tasks import TASKS


def test_every_optimizer_has_ratios_and_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "WORKLOADS", {"mlp": TASKS["friedman"]})
    monkeypatch.setattr(step_time, "INTERVAL", 2)
    monkeypatch.setattr(step_time, "SETTLED", 1)
    monkeypatch.setattr(step_time, "peak_memory", lambda *words: 7)
    out = tmp_path / "new" / "times.json"
    main(Config(tmp_path, out, ("mlp",), ("sgd", "adamw", "backmatch-sgd"), rounds=3))
    found = {entry["optimizer"]: entry for entry in json.loads(out.read_text())["results"]}
    assert list(found) == ["sgd", "adamw", "backmatch-sgd"]
    for name, entry in found.items():
        assert len(entry["seconds_per_step"]) == 3
        assert entry["median_ratio_to"][name] == 1.0
        assert entry["peak_memory_bytes"] == 7
        ratios = sorted(own / other for own, other in zip(entry["seconds_per_step"], found["sgd"]["seconds_per_step"], strict=True))
        assert entry["median_ratio_to"]["sgd"] == pytest.approx(ratios[1])
    assert found["sgd"]["state_bytes_per_parameter"] == 4.0
    assert found["adamw"]["state_bytes_per_parameter"] == pytest.approx(8.0, abs=0.01)


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    class Ended:
        stdout = "123\n"

    monkeypatch.setattr(step_time.subprocess, "run", lambda words, **_: ran.append(words) or Ended())
    assert step_time.peak_memory("vit", "sgd", tmp_path, {"device": "cpu", "precision": "bf16", "batch_size": 7}) == 123
    compile(ran[0][2], "the child's code", "exec")
    assert "Loop('vit', 'sgd'" in ran[0][2]
    assert "**{'device': 'cpu', 'precision': 'bf16', 'batch_size': 7}" in ran[0][2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"workloads": ("vgg",)}, "Unknown workload 'vgg'. Known: gpt-mini,"),
        ({"optimizers": ("adma",)}, "Unknown optimizer 'adma'. Known: sgd,"),
        ({"rounds": 0}, "Invalid rounds: 0."),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(change: dict[str, object], text: str, tmp_path: Path) -> None:
    config = replace(Config(tmp_path, tmp_path / "out" / "times.json"), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=text):
        main(config)
    assert not (tmp_path / "out").exists()
