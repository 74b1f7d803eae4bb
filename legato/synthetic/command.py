"""`legato synthetic`: recovery of planted sources, and how metrics rank them, into one folder."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from legato.common.errors import UsageError
from legato.common.files import write_atomically
from legato.common.hardware import keep_freed_memory
from legato.common.progress import log, progress_bar
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


@dataclass(frozen=True)
class Point:
    """A bed of the sweep: noise in units of --noise, the persistence of all sources, and that of the noise."""

    noise: float
    persistence: float
    noise_persistence: float


SWEEP = (
    Point(0.5, 0.0, 0.0),
    Point(0.5, 0.9, 0.0),
    Point(1.0, 0.0, 0.0),
    Point(1.0, 0.5, 0.0),
    Point(1.0, 0.9, 0.0),
    Point(1.0, 0.9, 0.9),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `legato synthetic`."""
    bed, training = BedConfig(), StudyConfig()
    parser.description = "Train SAEs on sources that are known, and report what they recover and what metrics rank."
    parser.add_argument("--out_dir", required=True, help="new folder for synthetic.json, .txt and .png")
    parser.add_argument(
        "--arms",
        default="hysteresis,topk,hysteresis_topk,hysteresis:shuffled,hysteresis_topk:shuffled",
        help="arms beside the baseline, as in experiment.py --temporal; NAME:shuffled trains NAME on shuffled tokens",
    )
    parser.add_argument(
        "--sources", default="mixed:256", help=f"FAMILY[:COUNT],... of {', '.join(FAMILIES)} (default: mixed:256)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="beds, each with an SAE per arm (default: 3)")
    parser.add_argument("--d_in", type=int, default=bed.d_in, help=f"width of the activations (default: {bed.d_in})")
    parser.add_argument("--d_sae", type=int, help="latents per SAE (default: as many as there are sources)")
    parser.add_argument("--k", type=int, help="active latents per token (default: the sources' own L0)")
    parser.add_argument(
        "--noise",
        type=float,
        default=bed.noise,
        help=f"dense noise by direction, in units of a source's magnitude (default: {bed.noise}: a detector that knows "
        "the true directions finds half of the firings)",
    )
    parser.add_argument("--noise_persistence", type=float, default=0.0, help="its lag-1 correlation (default: 0)")
    parser.add_argument("--rows", type=int, default=bed.rows, help=f"rows to train on (default: {bed.rows})")
    parser.add_argument("--steps", type=int, default=training.steps, help=f"steps (default: {training.steps})")
    parser.add_argument("--lr", type=float, default=training.lr, help=f"learning rate (default: {training.lr})")
    parser.add_argument("--release", type=float, default=0.5, help="of hysteresis, as in experiment.py (default: 0.5)")
    parser.add_argument(
        "--sweep",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also beds of sources that are all alike, over noise and persistence",
    )


def main(args: argparse.Namespace) -> None:
    """Run the study, write synthetic.json, synthetic.txt and synthetic.png. Raises UsageError for bad options."""
    out_dir = Path(args.out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"--out_dir {out_dir} is not an empty folder: choose a new one")
    if args.seeds < 1:
        raise UsageError(f"--seeds {args.seeds} leaves nothing to do: use 1 or more")
    families = read_sources(args.sources)
    bed = BedConfig(
        families=families,
        d_in=args.d_in,
        noise=args.noise,
        noise_persistence=args.noise_persistence,
        rows=args.rows,
    )
    n_sources = sum(count for _, count in families)
    training = StudyConfig(tuple(range(args.seeds)), steps=args.steps, lr=args.lr)
    arms = read_arms(args.arms, n_sources if args.d_sae is None else args.d_sae, args.k, bed, args.release)
    keep_freed_memory()
    points = SWEEP if args.sweep else ()
    with progress_bar("synthetic", args.seeds * (1 + len(points))) as progress:
        done = 0

        def one_more() -> None:
            nonlocal done
            done += 1
            progress(done)

        results = study(bed, arms, training, release=args.release, progress=one_more)
        in_order = [arm for arm in arms if not arm.shuffle_positions]
        results["sweep"] = []
        for point in points:
            family = replace(FAMILIES["iid"], persistence=(point.persistence, point.persistence))
            alike = replace(
                bed,
                families=((family, n_sources),),
                noise=point.noise * bed.noise,
                noise_persistence=point.noise_persistence,
                **SWEEP_ROWS,
            )
            found = study(alike, in_order, training, release=args.release, progress=one_more)
            results["sweep"].append({"persistence": point.persistence, **_summary(found)})
    results["options"] = {key: value for key, value in vars(args).items() if _is_plain(value)}
    results["environment"] = environment()
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(out_dir / "synthetic.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    text = tables(results)
    write_atomically(out_dir / "synthetic.txt", text.encode())
    draw(results, out_dir / "synthetic.png")
    log(text)
    log(f"results: {out_dir}/")


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
    chosen: list[SAEConfig] = [baseline]
    for name in dict.fromkeys(names):
        arm = by_name[name.removesuffix(SHUFFLED)]
        if name.endswith(SHUFFLED):
            arm = replace(arm, name=f"{arm.name} shuffled", shuffle_positions=True)
        chosen.append(arm)
    return chosen


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """What the sweep keeps of a study."""
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


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))
