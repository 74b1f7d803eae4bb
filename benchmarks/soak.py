"""Does memory stay flat over a long run? Half an hour of experiment.py that computes its activations as it trains.

    python benchmarks/soak.py --minutes 30

Starts the experiment with --no-store and more tokens than it can see in that time, reads the memory, threads and open
files of its process every second, ends it with SIGTERM, as a job scheduler does, and checks that it left a checkpoint.
What is not an option of this script goes to experiment.py.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from common import RESULTS, table, write_section

EXPERIMENT = Path(__file__).parent.parent / "experiment.py"
DEFAULTS = ["--no-store", "--no-ablation", "--temporal=legato,tsae", "--tokens=1_000_000_000"]
SETTLED = 1 / 6  # of the training time, after which memory counts: by then every buffer and dead latent has been seen
MARKS = 6
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Sample:
    """minutes: since the first step; tokens: trained on so far, by each SAE."""

    minutes: float
    rss_mib: float
    threads: int
    files: int
    tokens: int


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=30, help="of training")
    options.add_argument("--results", type=Path, default=RESULTS, help="page whose section is replaced")
    chosen, others = options.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        samples = soak(run, [*DEFAULTS, *others], 60 * chosen.minutes)
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        checkpoints = sorted(path.parent.name for path in run.glob("checkpoint/step_*/state.json"))
    if not checkpoints:
        sys.exit("no checkpoint was left")
    write_section(chosen.results, "Soak", report(samples, records, [*DEFAULTS, *others], checkpoints[-1]))


def soak(run: Path, arguments: list[str], seconds: float) -> list[Sample]:
    """One sample a second from the first step on, until the time is over and the run has been ended."""
    command = [sys.executable, str(EXPERIMENT), f"--out_dir={run}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            watched, samples, log = psutil.Process(process.pid), list[Sample](), run / "log.jsonl"
            while not log.exists() or not log.stat().st_size:
                if process.poll() is not None:
                    sys.exit(f"experiment.py ended before its first step: {process.returncode}")
                time.sleep(1)
            start = time.monotonic()
            while (passed := time.monotonic() - start) < seconds:
                if process.poll() is not None:
                    sys.exit(f"experiment.py ended after {passed / 60:.1f} minutes: {process.returncode}")
                with watched.oneshot():
                    rss = watched.memory_info().rss / 2**20
                    samples.append(Sample(passed / 60, rss, watched.num_threads(), watched.num_fds(), trained(log)))
                time.sleep(1)
            process.send_signal(signal.SIGTERM)
            if process.wait() != TERMINATED:
                sys.exit(f"experiment.py answered SIGTERM with {process.returncode}")
        finally:
            process.kill()
    return samples


def trained(log: Path) -> int:
    """Tokens of the last whole record of a log."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().split(b"\n")[1:-1]
    return json.loads(lines[-1])["tokens"] if lines else 0


def report(samples: list[Sample], records: list[dict], arguments: list[str], checkpoint: str) -> str:
    settled = [sample for sample in samples if sample.minutes >= SETTLED * samples[-1].minutes]
    minutes, rss = (np.array([getattr(one, name) for one in settled]) for name in ("minutes", "rss_mib"))
    slope = float(np.polyfit(minutes, rss, 1)[0])
    first, last = (np.median(part) for part in np.array_split(rss, 5)[::4])
    at = np.searchsorted([one.minutes for one in samples], np.linspace(0, samples[-1].minutes, MARKS + 1)[1:])
    rows = [
        [f"{one.minutes:.1f}", f"{one.tokens:,}", f"{one.rss_mib:,.0f}", str(one.threads), str(one.files)]
        for one in (samples[min(i, len(samples) - 1)] for i in at)
    ]
    arms = {record["arm"]: record for record in records}
    ends = "; ".join(f"{name} FVU {one['fvu']:.3f}, {one['skipped']} steps skipped" for name, one in arms.items())
    return "\n\n".join(
        [
            f"`experiment.py {' '.join(arguments)}`, ended by SIGTERM after {samples[-1].minutes:.1f} minutes of "
            f"training, checkpoint left: {checkpoint}. At the end: {ends}.",
            table(["minutes", "tokens an SAE", "resident MiB", "threads", "open files"], rows),
            f"After the first {SETTLED:.0%} of the time: resident memory {rss.min():,.0f} to {rss.max():,.0f} MiB; "
            f"median of the last fifth over that of the first: {last / first:.4f}; slope of a straight line: "
            f"{slope:+.2f} MiB a minute.",
        ]
    )


if __name__ == "__main__":
    main()
