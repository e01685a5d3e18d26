"""Hold the figures of the benchmark of speed, and print the tables of the READMEs from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel
from speed_flops import Peak
from speed_jobs import JOBS, Peer
from speed_process import Usage

RESULT = Path(__file__).parent / "results" / "speed.json"
COLUMNS = ("job", "against", "train", "goal", "whole", "goal", "CPU", "memory", "resident", "U")


class Environment(BaseModel):
    """Describe the machine, the versions and the code that figures depend on."""

    cpu: str
    cores: int
    threads: int
    device: str
    code: str
    """Digest of hftl's files and the benchmark's."""
    versions: dict[str, str]


class JobFigures(BaseModel):
    """Hold the pairs of one job.

    `pairs` are by contender; one that took part in fewer pairs is missing in the others.
    `difference` is what the gate measured, before a clock counted. `flops` are those that hftl's
    training needs.
    """

    environment: Environment
    peak: Peak | None
    rows: dict[str, int]
    precision: str
    flops: float | None
    difference: float | None
    pairs: list[dict[str, Usage]]

    def list_ratios(self, peer: Peer, part: str) -> list[float]:
        """Return the ratios peer / hftl of a part in every pair of both."""
        ratios = []
        for pair in self.pairs:
            if peer.name not in pair:
                continue
            ours, other = getattr(pair["hftl"], part), getattr(pair[peer.name], part)
            if ours and other:
                ratios.append(other / ours)
        return ratios if peer.share == 1 or part == "train" else []

    @property
    def utilisation(self) -> float | None:
        """Return the median share of the peak that hftl's training ran at."""
        seconds = [pair["hftl"].train for pair in self.pairs]
        if self.flops is None or self.peak is None or None in seconds or not seconds:
            return None
        speed = self.flops / statistics.median(filter(None, seconds)) / 1e9
        return speed / getattr(self.peak, self.precision)


class Sweep(BaseModel):
    """Hold the figures of one job along an axis."""

    values: list[float]
    figures: list[JobFigures]

    def compute_slope(self) -> float:
        """Return the slope of hftl's training seconds over the axis, both in logarithms."""
        seconds = [
            statistics.median(filter(None, (pair["hftl"].train for pair in figures.pairs)))
            for figures in self.figures
        ]
        points = [(math.log(v), math.log(s)) for v, s in zip(self.values, seconds, strict=True)]
        return statistics.linear_regression(*zip(*points, strict=True)).slope


class SpeedResults(BaseModel):
    """Hold the figures of all jobs and sweeps, and the lines of the READMEs' tables."""

    jobs: dict[str, JobFigures] = {}
    sweeps: dict[str, Sweep] = {}
    table: list[str] = []
    short_table: list[str] = []

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the stored results, none where there is no file."""
        return cls.model_validate_json(path.read_text("utf-8")) if path.exists() else cls()

    def write(self, path: Path) -> None:
        """Write the results with their tables, whole or not at all."""
        self.table, self.short_table = format_table(self), format_short_table(self)
        aside = path.with_suffix(".new")
        aside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        aside.rename(path)


def format_table(results: SpeedResults) -> list[str]:
    """Return the lines of the long table: every job against every peer, and the sweeps."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, job in JOBS.items():
        figures = results.jobs.get(name)
        for number, peer in enumerate(job.peers):
            used = "" if figures is None or number else format_share(figures.utilisation)
            rows.append((
                name if number == 0 else "", peer.name, *format_parts(figures, peer),
                *(format_median(figures, peer, part) for part in ("cpu", "anonymous", "resident")),
                used,
            ))  # fmt: skip
    lines = align_columns(rows)
    for axis, sweep in results.sweeps.items():
        lines += ["", *format_sweep(axis, sweep)]
    return lines


def format_short_table(results: SpeedResults) -> list[str]:
    """Return the lines of the short table: medians against the expert's script, jobs as columns."""
    columns: list[tuple[str, ...]] = [("", "training", "whole command")]
    for name, job in JOBS.items():
        peer, figures = job.peers[0], results.jobs.get(name)
        if figures is not None and peer.name in ("tuned", "frozen") and peer.share == 1:
            medians = (format_median(figures, peer, part) for part in ("train", "whole"))
            columns.append((name, *medians))
    return [line for line in align_columns(list(zip(*columns, strict=True))) if line[2] != "-"]


def format_parts(figures: JobFigures | None, peer: Peer) -> tuple[str, str, str, str]:
    """Return the ratios of training and whole command, each with its goal."""
    return (
        format_ratio(figures, peer, "train"), format_goal(peer.train),
        format_ratio(figures, peer, "whole"), format_goal(peer.whole),
    )  # fmt: skip


def format_ratio(figures: JobFigures | None, peer: Peer, part: str) -> str:
    """Return median and range of a ratio; nothing where it was not measured."""
    ratios = [] if figures is None else figures.list_ratios(peer, part)
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def format_median(figures: JobFigures | None, peer: Peer, part: str) -> str:
    """Return the median of a ratio alone."""
    return format_ratio(figures, peer, part).split()[0]


def format_goal(goal: float | None) -> str:
    """Return a goal, or nothing."""
    return "" if goal is None else f"{goal:g}"


def format_share(share: float | None) -> str:
    """Return a share with two digits, or nothing."""
    return "" if share is None else f"{share:.2f}"


def format_sweep(axis: str, sweep: Sweep) -> list[str]:
    """Return the lines of a sweep: the ratio along its axis and, over rows, the slope."""
    peer = Peer("tuned")
    rows: list[tuple[str, ...]] = [(axis, "train", "whole")]
    for value, figures in zip(sweep.values, sweep.figures, strict=True):
        rows.append(
            (f"{value:g}", *(format_ratio(figures, peer, part) for part in ("train", "whole")))
        )
    lines = align_columns(rows)
    if axis == "rows" and len(sweep.values) > 1:
        lines.append(f"  slope of hftl's training seconds over rows: {sweep.compute_slope():.2f}")
    return lines


def align_columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines of aligned columns, a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad: Callable[[tuple[str, ...]], str] = lambda row: "  ".join(  # noqa: E731
        cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    lines = [f"  {pad(row)}" for row in rows]
    lines.insert(1, "  " + "-" * (max(map(len, lines)) - 2))
    return lines
