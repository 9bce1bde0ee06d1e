"""The evidence: a panel of tasks and peers that anyone can rerun (``python -m benchmarks``), and single studies beside it."""
