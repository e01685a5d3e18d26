"""Time hftl against the scripts that experts write with transformers and peft, in pairs.

    python benchmarks/speed.py                      # all jobs, five pairs; can be stopped
    python benchmarks/speed.py --only lora full --pairs 3
    python benchmarks/speed.py --only lora --rows 64 --pairs 1 --into /tmp/speed.json
    python benchmarks/speed.py --sweep epochs blocks padding rows
    python benchmarks/speed.py --quick              # no clock: counts, and bounds on them; for CI

The jobs and their peers are those of `speed_jobs.py`. Every contender is a process of its own, on
the same rows in the same precision; pairs change their order (ABAB), and a figure is the median of
the pairs' ratios, peer / hftl: above 1 hftl is faster, or takes less memory. `train` is the
training alone, with its evaluations on validation, `whole` the command from its start to the
written weights and predictions, `CPU` its processor's seconds, `memory` the anonymous one, sampled,
`resident` the largest resident set. hftl predicts in fp32, its peers in the precision that they
train in. Before a clock counts, both train 50 steps on the same batches, and their losses must
agree within 1e-4.

A job's pairs are stored as they end; the same command again measures only what is missing. Pairs of
other code, versions, rows or threads are measured anew. Results: benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from speed_figures import RESULT, Environment, JobFigures, SpeedResults, Sweep
from speed_flops import Peak, count_training
from speed_hftl import build_command, read_train_seconds
from speed_inputs import write_inputs
from speed_jobs import GATE_TOLERANCE, JOBS, PHASES_FILE, Inputs, Job
from speed_outputs import compare_outputs
from speed_process import Usage, run_process

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "peft", "accelerate", "scikit-learn")
SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {
    "epochs": ("top-2", (1, 3, 10, 20)),
    "blocks": ("top-2", (1, 2, 4, 6)),
    "padding": ("full", (0.0, 0.3, 0.6, 0.8)),
    "rows": ("full", (250, 1000, 4000, 16000)),
}
"""The job of each sweep and the values along its axis."""


class Session:
    """Measure jobs, each pair stored as it ends.

    Args:
        results: what is stored so far.
        into: where.
        pairs: of every job.
        peak: of the machine, measured in this session.
        threads: of every contender, unless its job sets them.
    """

    def __init__(
        self, results: SpeedResults, into: Path, pairs: int, peak: Peak, threads: int
    ) -> None:
        self.results, self.into, self.pairs, self.peak = results, into, pairs, peak
        self.environment = describe_environment(peak.device, threads)

    def measure_job(self, name: str, job: Job) -> None:
        """Measure what a job lacks."""
        stored = self.results.jobs.get(name)
        for figures in self.measure(name, job, stored):
            self.results.jobs[name] = figures
            self.results.write(self.into)

    def measure_sweep(self, axis: str, rows: int | None) -> None:
        """Measure what a sweep lacks, value after value."""
        name, values = SWEEPS[axis]
        values = values if rows is None else tuple(v for v in values if axis != "rows" or v <= rows)
        sweep = self.results.sweeps.get(axis)
        stored = {} if sweep is None else dict(zip(sweep.values, sweep.figures, strict=True))
        for value in values:
            job = vary_job(JOBS[name].scale(rows), axis, value)
            for figures in self.measure(f"{axis} {value:g}", job, stored.get(value)):
                stored[value] = figures
                known = {v: stored[v] for v in values if v in stored}
                self.results.sweeps[axis] = Sweep(values=list(known), figures=list(known.values()))
                self.results.write(self.into)

    def measure(self, name: str, job: Job, stored: JobFigures | None) -> Iterator[JobFigures]:
        """Yield a job's figures after every pair that it lacked."""
        same = stored is not None and (stored.environment, stored.rows) == (
            self.environment, job.rows
        )  # fmt: skip
        pairs = stored.pairs if stored is not None and same else []
        if len(pairs) >= self.pairs:
            print(f"{name}: {len(pairs)} pairs are stored", flush=True)
            return
        with tempfile.TemporaryDirectory() as place:
            inputs = write_inputs(job, Path(place), self.peak.trains_bf16)
            difference = stored.difference if stored is not None and same else None
            if difference is None and job.has_gate:
                difference = check_difference(name, inputs)
            figures = JobFigures(
                environment=self.environment, peak=self.peak, rows=job.rows,
                precision=inputs.precision, flops=count_training(inputs), difference=difference,
                pairs=pairs,
            )  # fmt: skip
            for number in range(len(pairs), self.pairs):
                figures.pairs.append(run_pair(name, inputs, number))
                if figures.difference is None:
                    figures.difference = check_outputs(name, inputs)
                yield figures


def vary_job(job: Job, axis: str, value: float) -> Job:
    """Return the job at a place on an axis, against the tuned peer alone."""
    job = replace(job, peers=tuple(peer for peer in job.peers if peer.name == "tuned"))
    if axis == "rows":
        return replace(job.scale(int(value)), epochs=1, validation=100, test=100)
    if axis == "blocks":
        return replace(job, blocks=int(value))
    return replace(job, **{axis: value})


def run_pair(name: str, inputs: Inputs, number: int) -> dict[str, Usage]:
    """Return what every contender took, in an order that changes from pair to pair."""
    contenders = ["hftl"] + [
        peer.name for peer in inputs.job.peers if peer.pairs is None or number < peer.pairs
    ]
    taken = {}
    # The peer of gradual unfreezing reads how many phases hftl ran, which a session that goes on
    # where another stopped has not seen.
    hftl_first = number % 2 == 0 or (
        inputs.job.strategy == "gradual" and not (inputs.folder / PHASES_FILE).exists()
    )
    for contender in contenders if hftl_first else reversed(contenders):
        taken[contender] = usage = run_contender(inputs, contender)
        train = "" if usage.train is None else f"train {usage.train:.1f} s, "
        print(
            f"  {name} {number + 1} {contender}: {train}whole {usage.whole:.1f} s, "
            f"CPU {usage.cpu:.1f} s, {usage.anonymous:.0f} MiB", flush=True,
        )  # fmt: skip
    return taken


def run_contender(inputs: Inputs, contender: str) -> Usage:
    """Return what one contender took, in a process of its own."""
    job = inputs.job
    threads = {} if job.threads is None else set_threads(job.threads)
    if contender in ("hftl", "one-process"):
        return run_hftl(inputs, contender, threads)
    if contender == "copies":
        return divide_train(run_copies(inputs, threads), job, contender)
    script = "speed_steps.py" if job.kind == "steps" else "speed_peers.py"
    if job.kind in ("predict", "heads") or contender in ("frozen", "sklearn"):
        script = "speed_solved.py"
    command = [*launch(job), str(HERE / script), str(inputs.folder), contender]
    usage, lines = run_process(command, threads)
    usage.train = json.loads(lines[-1][1])["train"]
    return divide_train(usage, job, contender)


def run_hftl(inputs: Inputs, contender: str, environment: dict[str, str]) -> Usage:
    """Return what a command of hftl took; `contender` names its run folder."""
    usage, lines = run_process(build_command(inputs, contender), environment)
    usage.train = read_train_seconds(inputs, contender, lines)
    return usage


def run_copies(inputs: Inputs, environment: dict[str, str]) -> Usage:
    """Return what as many copies of the job took as it has processes, all at once, none in step.

    Cores share memory and sometimes more: no exchange can be faster than that.
    """
    names = [f"copy-{number}" for number in range(inputs.job.processes)]
    with ThreadPoolExecutor(len(names)) as pool:
        taken = list(pool.map(lambda name: run_hftl(inputs, name, environment), names))
    return Usage(
        train=max(usage.train or 0.0 for usage in taken),
        whole=max(usage.whole for usage in taken),
        cpu=sum(usage.cpu for usage in taken),
        anonymous=sum(usage.anonymous or 0.0 for usage in taken),
        resident=max(usage.resident for usage in taken),
    )


def divide_train(usage: Usage, job: Job, contender: str) -> Usage:
    """Return what a peer took, its training's seconds for the job's repetitions."""
    share = next(peer.share for peer in job.peers if peer.name == contender)
    usage.train = None if usage.train is None else usage.train / share
    return usage


def launch(job: Job) -> list[str]:
    """Return the words that start a peer's script, in as many processes as the job has."""
    if job.processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(job.processes)]


def check_difference(name: str, inputs: Inputs) -> float:
    """Return the difference between hftl and its peer on the same batches.

    Raises:
        SystemExit: if it is too large for a clock to count.
    """
    _, lines = run_process([sys.executable, str(HERE / "speed_gate.py"), str(inputs.folder)], {})
    return refuse_difference(name, json.loads(lines[-1][1])["difference"])


def check_outputs(name: str, inputs: Inputs) -> float | None:
    """Return the difference of what the contenders wrote; None where it differs by chance."""
    difference = compare_outputs(inputs)
    return None if difference is None else refuse_difference(name, difference)


def refuse_difference(name: str, difference: float) -> float:
    """Return a difference that is small enough; see `check_difference`."""
    print(f"{name}: hftl and its peer differ by {difference:.1e}", flush=True)
    if not difference <= GATE_TOLERANCE:
        raise SystemExit(f"{name}: they may differ by {GATE_TOLERANCE:g}; no time counts")
    return difference


def describe_environment(device: str, threads: int) -> Environment:
    """Return the machine, the versions and the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    digest = hashlib.sha256()
    for path in sorted([*(HERE.parent / "hftl").rglob("*.py"), *HERE.glob("speed*.py")]):
        digest.update(path.read_bytes())
    return Environment(
        cpu=names[0] if names else platform.machine(), cores=os.cpu_count() or 1, threads=threads,
        device=device, code=digest.hexdigest()[:16],
        versions={name: version(name) for name in PACKAGES},
    )  # fmt: skip


def set_threads(count: int) -> dict[str, str]:
    """Return the environment of a process with so many threads."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def read_peak() -> Peak:
    """Return the peak of this machine, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "speed_flops.py")], check=True, capture_output=True, text=True
    )
    return Peak.model_validate_json(done.stdout)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--pairs", type=int, default=5, help="of every job; default: 5")
    parser.add_argument("--rows", type=int, help="training rows; the other splits in proportion")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, help="these sweeps instead of jobs")
    parser.add_argument("--quick", action="store_true", help="count instead of timing")
    parser.add_argument("--into", type=Path, default=RESULT, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Measure the jobs or sweeps that are named, all jobs by default, and print the table."""
    options = parse_arguments()
    if options.quick:
        from speed_quick import check_counts

        print("\n".join(check_counts(options.only)))
        return
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ |= {**set_threads(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    peak, results = read_peak(), SpeedResults.read(options.into)
    session = Session(results, options.into, options.pairs, peak, threads)
    print(f"{session.environment.model_dump()} {peak.model_dump()}", flush=True)
    for axis in options.sweep or ():
        session.measure_sweep(axis, options.rows)
    for name in () if options.sweep else options.only or JOBS:
        if JOBS[name].needs_gpu and peak.device != "cuda":
            print(f"{name}: there is no GPU", flush=True)
            continue
        session.measure_job(name, JOBS[name].scale(options.rows))
    print("\n".join(results.table))


if __name__ == "__main__":
    main()
