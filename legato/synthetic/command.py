"""`legato synthetic`: recovery of planted sources, and how metrics rank them, into one folder."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from legato.common.command import Interrupts
from legato.common.command_line import Task
from legato.common.errors import UsageError
from legato.common.files import write_atomically
from legato.common.hardware import keep_freed_memory
from legato.common.progress import log, progress_bar
from legato.common.record import option, record
from legato.experiment.arms import planned_arms
from legato.experiment.config import ExperimentConfig
from legato.results.run_dir import environment
from legato.synthetic.bed import BedConfig
from legato.synthetic.report import draw, tables
from legato.synthetic.sources import FAMILIES, Family
from legato.synthetic.study import BASELINE, StudyConfig, study
from legato.training.config import SAEConfig

SHUFFLED = ":shuffled"
SWEEP_ROWS = {"rows": 768, "held_out_rows": 128}


# Beds of the sweep: noise in units of --noise, the persistence of all sources, and that of the noise.
SWEEP = ((0.5, 0.0, 0.0), (0.5, 0.9, 0.0), (1.0, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.9, 0.0), (1.0, 0.9, 0.9))
_BED, _STUDY = BedConfig(), StudyConfig()


@record
class Synthetic(Task):
    """Train and judge SAEs where the truth is known."""

    out_dir: Path = option(..., "new folder for synthetic.json, .txt and .png")
    arms: str = option(
        "hysteresis,topk,hysteresis_topk,hysteresis:shuffled,hysteresis_topk:shuffled",
        "arms beside the baseline, as in experiment.py --temporal; NAME:shuffled trains NAME on shuffled tokens",
    )
    sources: str = option("mixed:256", f"FAMILY[:COUNT],... of {', '.join(FAMILIES)}")
    seeds: int = option(3, "beds, each with an SAE per arm", ge=1)
    d_in: int = option(_BED.d_in, "width of the activations")
    d_sae: int | None = option(None, "latents per SAE (default: as many as there are sources)")
    k: int | None = option(None, "active latents per token (default: the sources' own L0)")
    noise: float = option(
        _BED.noise,
        "dense noise by direction, in units of a source's magnitude; at the default a detector that knows the true "
        "directions finds half of the firings",
    )
    noise_persistence: float = option(0.0, "the noise's lag-1 correlation")
    rows: int = option(_BED.rows, "rows to train on")
    steps: int = option(_STUDY.steps, "training steps")
    lr: float = option(_STUDY.lr, "learning rate")
    release: float = option(0.5, "of hysteresis, as in experiment.py")
    sweep: bool = option(True, "also beds of sources that are all alike, over noise and persistence")

    def run(self, interrupts: Interrupts) -> None:
        """Write synthetic.json, synthetic.txt and synthetic.png. Raises UsageError for bad options."""
        out = self.out_dir
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out_dir {out} is not an empty folder: choose a new one")
        results = self._studied()
        results["options"] = to_jsonable_python(asdict(self))
        results["environment"] = environment()
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "synthetic.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
        text = tables(results)
        write_atomically(out / "synthetic.txt", text.encode())
        draw(results, out / "synthetic.png")
        log(text)
        log(f"results: {out}/")

    def _studied(self) -> dict[str, Any]:
        """The study of the bed that was asked for, and what is kept of those of the sweep."""
        families = read_sources(self.sources)
        options = {name: getattr(self, name) for name in ("d_in", "noise", "noise_persistence", "rows")}
        bed = BedConfig(families=families, **options)
        n_sources = sum(count for _, count in families)
        training = StudyConfig(tuple(range(self.seeds)), steps=self.steps, lr=self.lr)
        arms = read_arms(self.arms, n_sources if self.d_sae is None else self.d_sae, self.k, bed, self.release)
        keep_freed_memory()
        points = SWEEP if self.sweep else ()
        with progress_bar("synthetic", self.seeds * (1 + len(points))) as progress:
            done = itertools.count(1)

            def studied(bed: BedConfig, arms: list[SAEConfig]) -> dict[str, Any]:
                return study(bed, arms, training, release=self.release, progress=lambda: progress(next(done)))

            results = studied(bed, arms)
            in_order = [arm for arm in arms if not arm.shuffle_positions]
            results["sweep"] = []
            for noise, persistence, noise_persistence in points:
                family = replace(FAMILIES["iid"], persistence=(persistence, persistence))
                alike: dict[str, Any] = {"families": ((family, n_sources),), "noise": noise * bed.noise, **SWEEP_ROWS}
                found = studied(replace(bed, noise_persistence=noise_persistence, **alike), in_order)
                results["sweep"].append({"persistence": persistence, **_summary(found)})
        return results


def read_sources(text: str) -> tuple[tuple[Family, int], ...]:
    """(family, count) of FAMILY[:COUNT],...; 256 sources where no count is given. Raises UsageError."""
    found = []
    for part in filter(None, text.split(",")):
        name, _, count = part.strip().partition(":")
        if name not in FAMILIES or (count and not count.isdecimal()) or count == "0":
            raise UsageError(f"--sources {part!r} is not FAMILY[:COUNT] with a family of {', '.join(FAMILIES)}")
        found.append((FAMILIES[name], int(count or 256)))
    if not found:
        raise UsageError(f"--sources names no family: choose of {', '.join(FAMILIES)}")
    return tuple(found)


def read_arms(text: str, d_sae: int, k: int | None, bed: BedConfig, release: float) -> list[SAEConfig]:
    """The baseline and the arms of --arms, made by the recipes of experiment.py. Raises UsageError."""
    names = [name.strip() for name in text.split(",") if name.strip() and name.strip() != BASELINE]
    plain = list(dict.fromkeys(name.removesuffix(SHUFFLED) for name in names))
    options = {
        "temporal": tuple(plain),
        "ablation": False,
        "d_sae": d_sae,
        "k": max(1, round(bed.l0)) if k is None else k,
        "release": release,
    }
    config = ExperimentConfig.from_options("demo", options)
    baseline, *made = (planned.sae for planned in planned_arms(config, bed.d_in))
    by_name = dict(zip(plain, made, strict=True))
    for name in names:
        if name.endswith(SHUFFLED):
            arm = by_name[name.removesuffix(SHUFFLED)]
            by_name[name] = replace(arm, name=f"{arm.name} shuffled", shuffle_positions=True)
    return [baseline, *(by_name[name] for name in dict.fromkeys(names))]


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Keep a study's numbers for the sweep."""
    return {
        "noise": found["bed"]["noise"],
        "noise_persistence": found["bed"]["noise_persistence"],
        "difficulty": found["difficulty"],
        "arms": {
            name: {
                "mcc": arm["mcc"]["all"],
                "code_mcc": arm["code_mcc"]["all"],
                "advantage": {key: scores["all"] for key, scores in arm["advantage"].items()},
                "core": arm["core"],
            }
            for name, arm in found["arms"].items()
        },
    }
