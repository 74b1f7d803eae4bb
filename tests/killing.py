"""experiment.py as a process of its own that a test watches and kills. It forks from a server that has imported
everything, so that a start costs a fraction of a second."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from small_experiment import ROOT, experiment_main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

POLL_SECONDS = 0.002
PATIENCE_SECONDS = 300.0
PRELOADED = ["legato.experiment.run"]
TIMES = ("wall_seconds", "tokens_per_second")
MEMBERS = "--temporal=hysteresis,tsae,gated,shuffled"
OPTIONS = {
    "context_length": 16,
    "held_out": 0.3,
    "batch_rows": 4,
    "d_sae": 64,
    "k": 4,
    "eval_rows": 16,
    "ce_rows": 2,
    "controls": "ema",
    "checkpoint_minutes": 0,
}

Moment = Callable[["Attempt"], bool]


def _child(arguments: list[str], cache: str, output: str) -> None:
    """The command as a shell would start it, but for stores of many small shards, and a conversion of model.gguf that
    only copies the folder `model` beside it, slowly, and for the number of figures."""
    from legato.data import gguf as demo_model
    from legato.data import store_manifest
    from legato.report import registry as figures

    def convert(gguf: Path, folder: Path) -> None:
        for path in sorted((gguf.parent / "model").iterdir()):
            shutil.copy(path, folder)
            time.sleep(0.05)

    os.environ["LEGATO_CACHE"] = cache
    vars(store_manifest)["SHARD_BYTES"] = 20_000
    vars(demo_model)["_convert_gguf"] = convert
    vars(figures)["FIGURES"] = dict(list(figures.FIGURES.items())[:4])
    with open(output, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.exit(experiment_main()(arguments))


@dataclass
class Attempt:
    """A running experiment; `folder` is its out_dir, `cache` its cache, `output` what it prints."""

    folder: Path
    cache: Path
    output: Path
    process: BaseProcess
    started: float = field(default_factory=time.monotonic)

    def until(self, moment: Moment) -> bool:
        """Wait for a moment; False where the run ended before it."""
        while time.monotonic() - self.started < PATIENCE_SECONDS:
            if moment(self):
                return True
            if not self.process.is_alive():
                return False
            time.sleep(POLL_SECONDS)
        self.process.kill()
        raise AssertionError(f"neither came to the moment nor to its end: {self.output.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stage(self) -> str:
        """How far the run has come, from what lies there."""
        if any(not (step / "state.json").exists() for step in self.folder.glob("checkpoint/step_*")):
            return "checkpoint"
        signs = {
            "report": "metrics.json",
            "evaluation": "checkpoint/evaluation/judged.json",
            "saved": "saes/*",
            "training": "checkpoint/step_*",
            "beginning of training": "config.yaml",
        }
        for name, pattern in signs.items():
            if any(self.folder.glob(pattern)):
                return name
        return "harvest" if any(self.cache.glob("activations/*")) else "conversion"

    def end(self) -> int:
        self.until(lambda _: False)
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


@dataclass
class Killable:
    """One experiment that is started as often as it takes."""

    folder: Path
    cache: Path
    flags: list[str]

    def start(self, *flags: str) -> Attempt:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        output = self.folder.with_suffix(".output")
        output.touch()
        arguments = [*self.flags, f"--out_dir={self.folder}", *flags]
        process = context.Process(target=_child, args=(arguments, str(self.cache), str(output)))
        process.start()
        return Attempt(self.folder, self.cache, output, process)

    def anew(self, name: str) -> "Killable":
        """The same experiment elsewhere; out_dir keeps its name, which is in the results."""
        home = self.folder.parent.with_name(name)
        home.mkdir()
        return Killable(home / self.folder.name, home / self.cache.name, self.flags)


def results(folder: Path) -> dict[str, Any]:
    """All that a finished run is worth, times left out: files by their bytes, JSON by its content."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in ("saes/*/*.safetensors", "features/*", "redundancy/*.parquet", "strips/*")
        for path in sorted(folder.glob(pattern))
    }
    found["metrics"] = _timeless(json.loads((folder / "metrics.json").read_text()))
    found["matched"] = json.loads((folder / "matched.json").read_text())
    found["log"] = [_timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
    found["tensorboard"] = {path.name: _scalars(path) for path in sorted((folder / "tensorboard").iterdir())}
    return found


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in TIMES]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two trees of results are not the same."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, pair in pairs for found in differences(*pair, f"{path}/{place}")]
    return [] if one == other else [f"{path}: {str(one)[:80]} instead of {str(other)[:80]}"]


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _timeless(entry) for key, entry in tree.items() if key not in TIMES}
    return [_timeless(entry) for entry in tree] if isinstance(tree, list) else tree


def flags_of(model: Path, dataset: Path, *, tokens: int) -> list[str]:
    """A short experiment without the ablation; the arms are up to the test."""
    options = {"model": model, "dataset": dataset, "tokens": tokens, **OPTIONS}
    return [*(f"--{name}={value}" for name, value in options.items()), "--no-ablation"]


def path_for_children() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "tests")])
