"""A run folder with made-up results in the shape a real run saves, for the tests of what reads such folders."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from identities import identified

LAGS = (1, 2, 4, 8, 16, 32, 64)
RATE_BINS = ((1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1))
GRID = [(window, coefficient) for window in (2, 4, 8, 16, 32) for coefficient in (0.1, 0.3, 1.0)]


def write_synthetic_run(
    path: Path,
    *,
    named: tuple[str, ...] = ("window_variance", "contrastive"),
    grid: bool = False,
    sweep: bool = False,
    seeds: int = 1,
    latents: int = 400,
    context: int = 128,
) -> Path:
    """Write baseline, named arms and, where asked for, the window x coefficient grid, a k-sweep and further seeds."""
    arms = {"baseline": recipe("baseline", None, 0, 0, strength=0.0)}
    for number, name in enumerate(named):
        arms[name] = recipe("named", name, 8, 0.3, strength=0.35 + 0.3 * number)
    if sweep:
        for k in (16, 64):
            arms[f"baseline_k{k}"] = recipe("sweep", None, 0, 0, strength=0.0, k=k)
    if grid:
        for window, coefficient in GRID:
            strength = 0.8 * (coefficient**0.5) * (1 - 0.12 * abs(np.log2(window / 8)))
            name = f"window_variance_w{window}_c{coefficient:g}"
            arms[name] = recipe("grid", "window_variance", window, coefficient, strength=strength)
    for seed in range(1, seeds):
        for name in ("baseline", *named):
            arms[f"{name}_seed{seed}"] = arms[name] | {"seed": seed}

    path.mkdir(parents=True)
    for folder in ("arrays", "features"):
        (path / folder).mkdir()
    metrics, log = {}, []
    for number, (name, spec) in enumerate(arms.items()):
        rng = np.random.default_rng(number)
        metrics[name] = arm_metrics(spec, rng)
        log.append(training_log(name, metrics[name], rng))
        np.savez_compressed(path / "arrays" / f"{name}.npz", position_matrix=position_matrix(context, spec))
        pq.write_table(pa.table(latent_columns(spec, latents, rng)), path / "features" / f"{name}.parquet")
    (path / "metrics.json").write_text(json.dumps(identified(metrics)))
    lines = [json.dumps(record) for step in zip(*log, strict=True) for record in step]
    (path / "log.jsonl").write_text("\n".join(lines) + "\n")
    (path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "config": {
                    "preset": "demo",
                    "model": {"model": "demo", "layer": None, "site": "resid_post", "dtype": "auto"},
                    "data": {"dataset": "demo", "context_length": context},
                    "training": {"tokens": 2_400_000, "d_sae": latents, "k": 32, "seeds": list(range(seeds))},
                },
                "resolved": {"layer": 9, "d_in": 640},
                "environment": {"versions": {"legato-sae": "0.1.0"}, "commit": "0123456789ab", "processor": "a CPU"},
            }
        )
    )
    return path


def recipe(role, term, window, coefficient, *, strength, k=32, seed=0):
    return {
        "role": role,
        "term": term,
        "window": window or None,
        "coefficient": coefficient or None,
        "k": k,
        "seed": seed,
        "strength": strength,
    }


def decay(start, floor, half_life):
    return [round(float(floor + (start - floor) * 0.5 ** ((lag - 1) / half_life)), 5) for lag in LAGS]


def arm_metrics(spec, rng):
    s, k = spec["strength"], spec["k"]
    fvu = 0.21 * (32 / k) ** 0.35 + 0.03 * s**2 + rng.normal(0, 0.001)
    kappa, ac = decay(0.14 + 0.13 * s, 0.045, 3 + 4 * s), decay(0.17 + 0.1 * s, 0.05, 3 + 3 * s)
    within_kappa, within_ac = decay(0.055, 0.05, 60), decay(0.07, 0.06, 60)
    cross_kappa, cross_ac = decay(0.012, 0.008, 40), decay(0.015, 0.01, 40)

    def excess(real, null):
        return [round(a - b, 5) for a, b in zip(real, null, strict=True)]

    consistency = {
        "lags": list(LAGS),
        "ac": {"mean": ac, "within_null": within_ac, "cross_null": cross_ac},
        "kappa": {"mean": kappa, "within_null": within_kappa, "cross_null": cross_kappa},
        "ac_excess_within": excess(ac, within_ac),
        "ac_excess_cross": excess(ac, cross_ac),
        "kappa_excess_within": excess(kappa, within_kappa),
        "kappa_excess_cross": excess(kappa, cross_kappa),
        "ac1": ac[0],
        "kappa1": kappa[0],
        "ac1_excess_within": round(ac[0] - within_ac[0], 5),
        "ac1_excess_cross": round(ac[0] - cross_ac[0], 5),
        "kappa1_excess_within": round(kappa[0] - within_kappa[0], 5),
        "kappa1_excess_cross": round(kappa[0] - cross_kappa[0], 5),
        "kappa1_excess_within_weighted": round(1.3 * (kappa[0] - within_kappa[0]), 5),
        "ac1_excess_within_weighted": round(1.3 * (ac[0] - within_ac[0]), 5),
        "by_rate_bin": [
            {
                "bin": list(edges),
                "latents": n,
                "kappa1_excess_within": round(gain * (0.085 + 0.13 * s), 5),
                "ac1_excess_within": round(gain * (0.1 + 0.1 * s), 5),
            }
            for edges, n, gain in zip(RATE_BINS, (190, 180, 25), (0.7, 1.1, 1.9), strict=True)
        ],
        "half_life_median": 2.1 + 3 * s,
        "half_life_censored_share": 0.02 + 0.03 * s,
        "run_length_ratio": 1.1 + 0.4 * s,
        "switching_ratio": 0.9 - 0.2 * s,
        "jaccard": 0.16 + 0.1 * s,
        "jaccard_null": 0.03,
        "sequence_l0": 900 - 300 * s,
        "smoothness": 0.8 - 0.2 * s,
        "raw_stream": {"lags": list(LAGS), "ac": {"mean": decay(0.4, 0.1, 3), "excess_within": decay(0.25, 0.0, 3)}},
    }
    core = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_within_sequence": 0.95 - fvu,
        "l0": k * (1 + 0.01 * rng.normal()),
        "l1": 60.0,
        "cossim": 0.89,
        "l2_norm_in": 6000.0,
        "l2_norm_out": 5500.0,
        "l2_ratio": 0.92,
        "relative_reconstruction_bias": 1.0,
        "frac_alive": 0.99 - 0.06 * s,
        "alive_judged_on_tokens": 60000,
        "dense": 4,
        "density_histogram": {"log10_edges": [-5, -4, -3, -2, -1, 0], "counts": [2, 190, 180, 25, 3]},
        "ce_loss_without_sae": 3.1,
        "ce_loss_with_sae": 3.3 + 0.2 * fvu,
        "ce_loss_with_ablation": 11.0,
        "ce_loss_score": 0.97 - 0.2 * fvu,
        "kl_div_with_sae": 0.3,
        "kl_div_with_ablation": 8.0,
        "kl_div_score": 0.96,
        "tokens": 60000,
        "ce_tokens": 20000,
    }
    training = {
        "training_steps": 1200,
        "final_loss": fvu,
        "tokens": 2_400_000,
        "wall_seconds": 240.0,
        "recipe": {key: value for key, value in spec.items() if key != "strength" and value is not None},
    }
    return {
        "core": core,
        "consistency": consistency,
        "position": {"eta2_mean": 0.01, "mi_mean": 0.002},
        "training": training,
    }


def training_log(name, metrics, rng, records=120):
    final, steps = metrics["core"]["fvu"], metrics["training"]["training_steps"]
    for record in range(records):
        progress = (record + 1) / records
        fvu = final + (1 - final) * np.exp(-9 * progress) + 0.004 * rng.normal()
        yield {
            "arm": name,
            "step": int(progress * steps),
            "tokens": int(progress * metrics["training"]["tokens"]),
            "loss": float(fvu + 0.05),
            "loss_terms": {"reconstruction": float(fvu), "auxiliary": 0.05},
            "l0": float(metrics["core"]["l0"] * (1 + 0.5 * np.exp(-20 * progress)) + 0.1 * rng.normal()),
            "fvu": float(fvu),
            "dead": int(4096 * (1 - metrics["core"]["frac_alive"]) * min(1.0, 3 * progress)),
            "grad_norm": 0.3,
            "act_norm": 25.3,
            "lr": 3e-4,
            "tokens_per_second": 12000.0,
        }


def position_matrix(context, spec):
    position = np.arange(context)
    lag = np.abs(position[:, None] - position[None, :])
    matrix = 0.03 + (0.15 + 0.15 * spec["strength"]) * np.exp(-lag / (4 + 8 * spec["strength"]))
    early = np.exp(-position / 3)
    matrix += 0.2 * early[:, None] * early[None, :]
    np.fill_diagonal(matrix, 1.0)
    return matrix.astype(np.float32)


def latent_columns(spec, latents, rng):
    rate = 10 ** rng.normal(-2.7, 0.6, latents)
    return {
        "latent": np.arange(latents),
        "firing_rate": rate,
        "kappa1_excess_within": np.clip(rng.gamma(1.2 + 1.5 * spec["strength"], 0.07, latents) - 0.02, -0.1, 1),
    }
