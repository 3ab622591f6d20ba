"""Draws the pictures in benchmarks/results again from the files next to them, as `fp8kv bench --plot` would."""

from __future__ import annotations

from pathlib import Path

from fp8kv.bench import Report, plot

RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    for picture in sorted(RESULTS.glob("*.png")):
        plot(Report.read_json(picture.with_suffix(".json")), picture)
