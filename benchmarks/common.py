"""What the benchmarks share: contenders that take turns in processes of their own, their ratios, the page of results.

A script names its contenders, starts each as `python script.py --serve NAME ...` and asks them for one measurement
after the other (A B C A B C ...), so that a slow minute of the machine hits all of them. A peer may run under another
interpreter: this file imports nothing but the standard library, and the scripts import a library where it is used.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "numpy", "numba", "sae-lens", "dictionary-learning", "sae-bench")
Measurement = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--rounds", type=int, default=5, help="turns of every contender")
    options.add_argument("--results", type=Path, default=RESULTS, help="page whose section is replaced")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    return options


def python_of_peers(options: argparse.ArgumentParser, packages: str) -> None:
    options.add_argument("--peer-python", default=sys.executable, help=f"interpreter that has {packages}")


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rate_over(seconds: float, tokens_per_step: int, step: Callable[[], object]) -> Measurement:
    """Tokens a second and milliseconds a step over about that many seconds, two steps at least."""
    steps, start = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    taken = time.perf_counter() - start
    return {"rate": steps * tokens_per_step / taken, "ms": 1e3 * taken / steps, "peak_mib": peak_mib()}


def serve(build: Callable[[], Callable[[], Measurement]]) -> None:
    """The contender's side: build it, then one measurement for each line on standard input."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    measure = build()
    replies.write(json.dumps({"versions": versions()}) + "\n")
    for _ in sys.stdin:
        replies.write(json.dumps(measure()) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Contender:
    """A process that measures itself when asked; use as a context manager."""

    def __init__(self, name: str, arguments: Sequence[str] = (), python: str = sys.executable) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, sys.argv[0], "--serve", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> "Contender":
        self.versions = self._reply()["versions"]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def measure(self) -> Measurement:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"{self.name} failed:\n{self._log.read()[-3000:]}")
        return json.loads(line)


@dataclass(frozen=True)
class Turns:
    """measurements[name][round]; versions[name] of the packages each contender ran with."""

    measurements: dict[str, list[Measurement]]
    versions: dict[str, dict[str, str]]

    @classmethod
    def take(cls, contenders: Iterable[Contender], rounds: int) -> "Turns":
        """Starts the contenders one by one, then lets them take turns."""
        contenders, started = list(contenders), []
        measurements: dict[str, list[Measurement]] = {one.name: [] for one in contenders}
        try:
            for contender in contenders:
                started.append(contender.__enter__())
            for number in range(rounds):
                for contender in contenders:
                    measurements[contender.name].append(contender.measure())
                    shown = {key: _short(value) for key, value in measurements[contender.name][-1].items()}
                    print(f"round {number + 1}/{rounds}  {contender.name:34s} {shown}", flush=True)
        finally:
            for contender in started:
                contender.__exit__()
        return cls(measurements, {one.name: one.versions for one in contenders})

    def of(self, name: str, key: str = "rate") -> list[float]:
        return [measurement[key] for measurement in self.measurements[name]]

    def ratios(self, name: str, other: str, key: str = "rate") -> list[float]:
        """name / other, round by round."""
        return [a / b for a, b in zip(self.of(name, key), self.of(other, key), strict=True)]

    def faster(self, *names: str) -> str:
        return max(names, key=lambda name: statistics.median(self.of(name)))


@dataclass(frozen=True)
class Claim:
    """A ratio with the target it must reach (`at_least`) or stay under; None: only shown."""

    text: str
    values: list[float]
    target: float | None = None
    at_least: bool = True

    def row(self) -> list[str]:
        middle = statistics.median(self.values)
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"
        met = "" if self.target is None else ("yes" if (middle >= self.target) == self.at_least else "**no**")
        return [self.text, *(f"{value:.3g}" for value in (min(self.values), middle, max(self.values))), target, met]


def claims_table(claims: Iterable[Claim]) -> str:
    return table(["ratio", "min", "median", "max", "target", "met"], [claim.row() for claim in claims])


def rates_table(turns: Turns, keys: Mapping[str, str]) -> str:
    """keys: measurement -> heading; medians, with the range where it is wider than 1 %."""

    def cell(name: str, key: str) -> str:
        values = [m[key] for m in turns.measurements[name] if key in m]
        return span(values) if values else ""

    return table(["", *keys.values()], [[name, *(cell(name, key) for key in keys)] for name in turns.measurements])


def span(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    wide = max(values) - min(values) > 0.01 * abs(middle)
    return _short(middle) + (f" ({_short(min(values))} to {_short(max(values))})" if wide else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_section(page: Path, title: str, body: str, used: Iterable[Mapping[str, str]] = ()) -> None:
    """Replace (or append) the section of that title; `used`: versions of all processes that were measured."""
    section = f"## {title}\n\n{_circumstances(used)}\n\n{body.strip()}\n"
    print(f"\n{section}")
    text = page.read_text() if page.exists() else "# Benchmark results\n"
    opening, *sections = text.split("\n## ")
    kept = [one.rstrip() for one in sections if one.split("\n", 1)[0] != title]
    sections = sorted([*kept, section.removeprefix("## ").rstrip()])
    page.write_text("\n\n## ".join([opening.rstrip(), *sections]) + "\n")


def _circumstances(used: Iterable[Mapping[str, str]]) -> str:
    merged: dict[str, set[str]] = {}
    for one in used or [versions()]:
        for package, number in one.items():
            merged.setdefault(package, set()).add(number)
    packages = ", ".join(f"{package} {' / '.join(sorted(numbers))}" for package, numbers in merged.items())
    command = " ".join(["python", *(_tilde(argument) for argument in sys.argv)])
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{today}, {machine()}; {packages}; commit {_commit()}; `{command}`."


def machine() -> str:
    """Processor, cores, memory and how busy the machine is."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    features = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags][:2]
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    name = names[0] if names else platform.processor()
    return f"{name} ({', '.join(features)}), {cores} cores, {gibibytes:.0f} GiB, load average {os.getloadavg()[1]:.1f}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _tilde(argument: str) -> str:
    return argument.replace(str(Path.home()), "~")
