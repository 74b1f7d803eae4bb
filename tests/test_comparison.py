"""The matched comparison, with numbers that can be followed by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from identities import identified
from synthetic_run import write_synthetic_run

from legato.common.errors import UsageError
from legato.report.text.matched_tables import at_fvu, at_l0, by_group, legend, tables, targets
from legato.report.text.notes import notes
from legato.results.matched.compare import match_methods, matched_seeds, widest, write_matched
from legato.results.matched.points import ALL, Method, Point, Sweep, along, mixed, point_of
from legato.results.matched.statistics import absent, between, ratio_interval
from legato.results.saved_run import SavedRun, arms_of

KAPPA = f"{ALL}/kappa1_excess_within"


def point(l0, fvu, kappa=0.1, **values):
    return Point({"l0": l0, "fvu": fvu, KAPPA: kappa, **values})


# Interpolation


def test_interpolation_along_a_sweep():
    sweep = [point(40, 0.10, 0.3), point(20, 0.20, 0.1), point(30, 0.14, 0.2)]
    # L0 25 lies half-way between 20 and 30: FVU (.20 + .14) / 2, kappa (.1 + .2) / 2
    found = along(sweep, "l0", 25)
    assert found.values == pytest.approx({"l0": 25, "fvu": 0.17, KAPPA: 0.15})
    # FVU .11 lies a quarter of the way from .10 (L0 40) to .14 (L0 30): L0 37.5, kappa .3 - .25 * .1
    found = along(sweep, "fvu", 0.11)
    assert found.values == pytest.approx({"l0": 37.5, "fvu": 0.11, KAPPA: 0.275})
    assert along(sweep, "l0", 20).values[KAPPA] == 0.1  # the ends belong to it
    assert along(sweep, "l0", 40).values[KAPPA] == 0.3


def test_nothing_is_extrapolated():
    sweep = [point(20, 0.2), point(30, 0.1)]
    assert along(sweep, "l0", 19.99) is None
    assert along(sweep, "l0", 30.01) is None
    assert along(sweep[:1], "l0", 20) is None  # one point is no sweep
    assert along([], "l0", 20) is None
    twice = along([point(20, 0.2, 0.1), point(20, 0.2, 0.3)], "l0", 20)  # two of equal L0 do not divide by zero
    assert twice.values[KAPPA] == 0.1


def test_a_mix_keeps_what_both_have_and_weighs_the_replicates_alike():
    low = Point({"l0": 10, "a": 1.0}, {"m": np.array([1.0, 3.0]), "n": np.zeros(2)})
    high = Point({"l0": 20, "b": 1.0}, {"m": np.array([5.0, 7.0]), "n": np.zeros(3)})
    found = mixed(low, high, 0.25)
    assert found.values == {"l0": 12.5}
    assert {name: values.tolist() for name, values in found.replicates.items()} == {"m": [2.0, 4.0]}


# How a method is matched


def methods(ours, theirs):
    """Methods of one seed: the first point of each is at the run's own budget."""
    return (
        Method("ours", "named", (), {0: Sweep(ours[0], tuple(ours[1:]))}),
        Method("baseline", "baseline", (), {0: Sweep(theirs[0], tuple(theirs[1:]))}),
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "axis", "how", "l0"),
    [
        # L0 32.6 against 32 is 1.9 % more: compared as they are, even with a sweep at hand
        ([point(32.6, 0.2), point(20, 0.3)], [point(32, 0.1)], "l0", "equal", (32.6, 32)),
        ([point(40, 0.2), point(30, 0.3)], [point(32, 0.1)], "l0", "method", (32, 32)),
        ([point(40, 0.2)], [point(32, 0.1), point(48, 0.05)], "l0", "baseline", (40, 40)),
        # FVU is an outcome: the sweep goes first. From FVU .1 to .3 is L0 40 to 30, so FVU .101 is L0 39.95
        ([point(40, 0.1), point(30, 0.3)], [point(32, 0.101)], "fvu", "method", (39.95, 32)),
        ([point(32, 0.15)], [point(32, 0.1), point(24, 0.2)], "fvu", "baseline", (32, 28)),
        ([point(32, 0.101)], [point(32, 0.1)], "fvu", "equal", (32, 32)),
    ],
)
def test_the_way_of_matching(ours, theirs, axis, how, l0):
    found, matches, reasons = matched_seeds(*methods(ours, theirs), axis)
    assert (found, reasons) == (how, {})
    assert [side.values["l0"] for side in matches[0]] == pytest.approx(list(l0))


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ([point(198, 0.5)], [point(32, 0.1)], "L0 198.0 against 32.0, and neither was swept over k"),
        ([point(198, 0.5), point(90, 0.6)], [point(32, 0.1)], "which no sweep reaches; nothing is extrapolated"),
        ([Point({"fvu": 0.1})], [point(32, 0.1)], "l0 was not saved"),
    ],
)
def test_what_is_not_matched_says_why(ours, theirs, reason):
    _, matches, reasons = matched_seeds(*methods(ours, theirs), "l0")
    assert matches == {}
    assert reason in reasons["0"]


def test_seeds_are_matched_one_by_one():
    ours, theirs = methods([point(32, 0.1)], [point(32, 0.1)])
    ours = replace(ours, sweeps={0: Sweep(point(32, 0.1)), 1: Sweep(point(60, 0.1)), 5: Sweep(point(32, 0.1))})
    theirs = replace(theirs, sweeps={0: Sweep(point(32, 0.1)), 1: Sweep(point(32, 0.1))})
    how, matches, reasons = matched_seeds(ours, theirs, "l0")
    assert (how, list(matches)) == ("equal", [0])
    assert reasons == {"5": "the baseline has no such seed", "1": "L0 60.0 against 32.0, and neither was swept over k"}


# Ratios and their intervals


def test_the_interval_of_a_ratio_over_seeds():
    # ours 4, 5, 6 over theirs 1: R = 5, residuals -1, 0, 1 of sd 1; t(.975, 2) = 4.3027, half-width 4.3027 / sqrt(3)
    low, high = ratio_interval(np.array([4.0, 5, 6]), np.ones(3))
    assert (low, high) == pytest.approx((5 - 2.4842, 5 + 2.4842), abs=1e-4)
    # where ours is always twice theirs nothing is left to vary, however much both do
    assert ratio_interval(np.array([2.0, 4, 9]), np.array([1.0, 2, 4.5])) == pytest.approx([2, 2])
    assert ratio_interval(np.array([2.0]), np.array([1.0])) is None


def test_a_number_beside_the_baselines():
    ours, theirs = [point(32, 0.1, 0.4), point(32, 0.1, 0.6)], [point(32, 0.1, 0.1), point(32, 0.1, 0.1)]
    found = between(ours, theirs, KAPPA, KAPPA)
    # mean .5, sd .1414, over sqrt(2): .1; ratio .5 / .1
    assert (found["value"], found["stderr"], found["ratio"]) == pytest.approx((0.5, 0.1, 5.0))
    assert found["baseline_stderr"] == 0
    assert found["interval95_documents"] is None  # no replicates
    single = between(ours[:1], theirs[:1], KAPPA, KAPPA)
    assert (single["stderr"], single["interval95_seeds"], widest(single)) == (None, None, None)
    assert between(ours, [Point({})] * 2, KAPPA, KAPPA) is None
    below = between(ours, [point(32, 0.1, -0.1)] * 2, KAPPA, KAPPA)
    assert (below["ratio"], below["interval95_seeds"]) == (None, None)


def test_the_interval_over_documents_pairs_the_replicates():
    # Documents move both alike: replicate by replicate ours is 2 to 2.2 times theirs, mean 2.1. Recentred on the
    # ratio of the estimates, .42 / .2 = 2.1, it stays; unpaired it would be several times as wide.
    theirs_R = np.linspace(0.1, 0.5, 101)
    ours_R = theirs_R * np.tile([2.0, 2.2], 51)[:101]
    ours = [Point({KAPPA: 0.42}, {KAPPA: ours_R})]
    theirs = [Point({KAPPA: 0.2}, {KAPPA: theirs_R})]
    mean = float((ours_R / theirs_R).mean())
    interval = between(ours, theirs, KAPPA, KAPPA)["interval95_documents"]
    assert interval == pytest.approx([2.0 * 2.1 / mean, 2.2 * 2.1 / mean])
    # The same of a group against all of the baseline's latents, and of a bin: whatever has replicates on both sides.
    group, binned = "latents 0 to 4/kappa1_excess_within", f"{ALL}/0.01-0.1/kappa1_excess_within"
    slow = [Point({group: 0.42}, {group: ours_R})]
    assert between(slow, theirs, group, KAPPA)["interval95_documents"] == pytest.approx(interval)
    sides = [[Point({binned: value}, {binned: values_R})] for value, values_R in ((0.42, ours_R), (0.2, theirs_R))]
    assert between(*sides, binned, binned)["interval95_documents"] == pytest.approx(interval)
    assert between(slow, theirs, group, binned) is None
    other_rows = [Point({KAPPA: 0.2}, {KAPPA: theirs_R[:50]})]
    assert between(ours, other_rows, KAPPA, KAPPA)["interval95_documents"] is None
    both = between(ours * 2, theirs * 2, KAPPA, KAPPA)
    assert widest(both) == pytest.approx(interval)  # the seeds do not vary


def test_the_share_of_a_gain_that_shuffling_takes_away():
    # gain .5 - .1 = .4, on shuffled tokens .15 - .05 = .1: three quarters are gone
    ours, theirs = [Point({KAPPA: 0.5, "s": 0.15})], [Point({KAPPA: 0.1, "s": 0.05})]
    found = absent(ours, theirs, KAPPA, "s")
    assert found["absent"] == pytest.approx(0.75)
    assert found["interval95_seeds"] is None
    # of a gain below a tenth of the baseline's value no share is given
    assert absent([Point({KAPPA: 0.109, "s": 0.0})], theirs, KAPPA, "s")["absent"] is None
    assert absent([Point({KAPPA: 0.5})], theirs, KAPPA, "s") is None


# Whole runs


def metrics_of(*, l0=32.0, fvu=0.1, kappa=0.05, ac=0.06, shuffled=0.0, alive=0.9, bins=(50, 50), **recipe):
    rows = [
        {"bin": edges, "latents": n, "kappa1_excess_within": kappa, "ac1_excess_within": ac}
        for edges, n in zip(([1e-4, 1e-3], [1e-3, 1e-2]), bins, strict=True)
    ]
    both = {"kappa1_excess_within": kappa, "ac1_excess_within": ac}
    return {
        "core": {"l0": l0, "fvu": fvu, "ce_loss_score": 0.93, "frac_alive": alive},
        "consistency": {
            **both,
            "latents": sum(bins),
            "by_rate_bin": rows,
            "position_shuffled": dict.fromkeys(both, shuffled),
        },
        "training": {"recipe": recipe},
    }


def run_of(name="run_1", config=None, **arms) -> SavedRun:
    return SavedRun(Path(name), arms_of(identified(arms)), config or {})


def test_a_method_that_reaches_every_target_and_one_that_reaches_none():
    run = run_of(
        baseline=metrics_of(),
        good=metrics_of(fvu=0.102, kappa=0.21, ac=0.19, shuffled=0.02, alive=0.91),
        bad=metrics_of(fvu=0.103, kappa=0.06, ac=0.05, shuffled=0.01, alive=0.8),
    )
    matched = match_methods([run])
    found = {name: {row["criterion"]: row for row in m["verdict"]} for name, m in matched["methods"].items()}
    assert [row["met"] for row in found["good"].values()] == [True] * 7
    assert found["good"]["kappa"]["value"] == pytest.approx(4.2)
    assert found["good"]["FVU"]["value"] == pytest.approx(0.02)
    # kappa: 1 - .02 / .16 = .875 gone, AC: 1 - .02 / .13 = .846, the smaller counts
    assert found["good"]["absent"]["value"] == pytest.approx(1 - 0.02 / 0.13)
    assert [found["bad"][name]["met"] for name in ("kappa", "AC", "FVU", "alive", "bins")] == [False] * 5
    assert found["bad"]["CE"]["met"] is True
    assert found["bad"]["absent"]["met"] is None  # AC gains nothing
    [good, bad] = targets(matched).rows
    assert good == ["good", *["yes"] * 7]
    assert bad == ["bad", "no", "no", "no", "yes", "no", "no", "?"]


def test_a_target_met_within_the_noise_is_marked():
    arms = {"baseline": metrics_of(), "baseline_seed1": metrics_of(seed=1)}
    arms |= {"x": metrics_of(kappa=0.19), "x_seed1": metrics_of(kappa=0.23, seed=1)}  # 4.2 times, one seed 3.8 times
    matched = match_methods([run_of(**arms)])
    [row] = targets(matched).rows
    assert row[1] == "yes*"


def test_bins_with_few_latents_do_not_count():
    run = run_of(baseline=metrics_of(bins=(50, 19)), x=metrics_of(kappa=0.1, ac=0.1))
    assert at_l0(match_methods([run])).rows[1][9] == "1/1"


def test_a_run_with_sweeps_controls_and_groups_in_tables_and_notes(tmp_path):
    groups = {"groups": [[0.25, 0.2], [1.0, 0.8]], "d_sae": 8}
    arms = {
        "baseline": metrics_of(k=32),
        "baseline_k24": metrics_of(l0=24, fvu=0.12, kappa=0.04, k=24),
        "matryoshka": metrics_of(fvu=0.11, kappa=0.06, k=32, **groups),
        "hysteresis": metrics_of(fvu=0.11, kappa=0.2, k=32),
        "hysteresis_k40": metrics_of(l0=40, fvu=0.09, kappa=0.24, k=40),
        "window_variance_w2_c0.1": metrics_of(),
        "baseline_ema": metrics_of(l0=190, fvu=0.5, kappa=0.4, role="control", k=32),
    }
    (tmp_path / "features").mkdir()
    # Latents 0 and 1 are the leading group; latent 2 is silent, and 1 and 3 are of one firing-rate bin.
    density = [0.05, 0.002, 0.0, 0.003, 0.0002, 0.2, 0.0004, 0.1]
    kappa = [0.3, 0.1, math.nan, 0.5, 0.1, 0.2, 0.3, 0.4]
    table = pa.table({"density": density, "kappa1_excess_within": kappa, "ac1_excess_within": kappa})
    pq.write_table(table, tmp_path / "features" / "matryoshka.parquet")
    (tmp_path / "metrics.json").write_text(json.dumps(identified(arms)))

    matched = json.loads(write_matched(tmp_path).read_text())
    assert list(matched["methods"]) == ["matryoshka", "hysteresis", "window_variance_w2_c0.1", "baseline_ema"]
    hysteresis = matched["methods"]["hysteresis"]
    assert (hysteresis["at_l0"]["along"], hysteresis["at_fvu"]["along"]) == ("equal", "method")
    # FVU .10 is half-way between hysteresis at k 32 (.11) and k 40 (.09): L0 36, kappa .22 against .05
    at = hysteresis["at_fvu"]
    assert at["l0"]["value"] == pytest.approx(36)
    assert at["populations"][ALL]["kappa1_excess_within"]["ratio"] == pytest.approx(4.4)
    # matryoshka was not swept: the baseline's FVU is .11 half-way to k 24, kappa .045 there
    at = matched["methods"]["matryoshka"]["at_fvu"]
    assert at["along"] == "baseline"
    assert at["populations"][ALL]["kappa1_excess_within"]["baseline"] == pytest.approx(0.045)
    ema = matched["methods"]["baseline_ema"]
    assert (ema["at_l0"]["matched"], ema["at_fvu"]["matched"], ema["verdict"]) == (False, False, None)

    leading = matched["methods"]["matryoshka"]["at_l0"]["populations"]["latents 0 to 1"]
    assert leading["kappa1_excess_within"]["value"] == pytest.approx(0.2)  # (.3 + .1) / 2
    assert leading["latents"]["value"] == 2
    assert [row["bin"] for row in leading["by_rate_bin"]] == [[1e-3, 1e-2]]  # the baseline saved two bins of four
    rest = matched["methods"]["matryoshka"]["at_l0"]["populations"]["latents 2 to 7"]
    assert rest["kappa1_excess_within"]["value"] == pytest.approx((0.5 + 0.1 + 0.2 + 0.3 + 0.4) / 5)

    assert [row[0] for row in by_group(matched).rows] == ["matryoshka, latents 0 to 1", "matryoshka, latents 2 to 7"]
    rows = {row[0]: row for row in at_l0(matched).rows}
    assert rows["baseline_ema"][1:7] == ["190.0", "0.500", "0.930", "90.0%", "0.400", "not matched"]
    assert rows["hysteresis"][1:3] == ["32.0", "+10.0%"]
    assert [row[-1] for row in at_fvu(matched).rows][-1] == "not matched"
    text = "\n".join(legend(matched))
    assert (
        "L0 not matched (L0 190.0 against 32.0, which no sweep reaches; nothing is extrapolated): baseline_ema." in text
    )
    assert "FVU along the method's sweep: hysteresis." in text
    assert all(len(set(map(len, table.text().splitlines()))) == 1 for table in tables(matched))
    written = notes(SavedRun.open(tmp_path))
    assert "At the baseline's sparsity and reconstruction" in written
    assert "baseline_ema" in written


def test_the_features_of_a_group_are_binned_as_all_latents_are(tmp_path):
    recipe = {"groups": [[0.5, 0.2], [1.0, 0.8]], "d_sae": 10}
    density = [1e-4, 9e-4, 1e-3, 0.1, 0.11, 0.0, 9e-5, 1e-2, 0.05, 1.0]
    (tmp_path / "features").mkdir()
    pq.write_table(pa.table({"density": density}), tmp_path / "features" / "matryoshka.parquet")
    run = run_of(str(tmp_path), matryoshka=metrics_of(**recipe))
    values = point_of(run, run.arms[0]).values
    # an edge belongs to the bin above it, but p = .1 is not dense; below 1e-4 is in no bin
    assert [values[f"latents 0 to 4/{b}/latents"] for b in ("0.0001-0.001", "0.001-0.01", "0.01-0.1", "0.1-1")] == [
        2, 1, 1, 1
    ]  # fmt: skip
    assert [values[f"latents 5 to 9/{b}/latents"] for b in ("0.0001-0.001", "0.001-0.01", "0.01-0.1", "0.1-1")] == [
        0, 0, 2, 1
    ]  # fmt: skip
    assert values["latents 5 to 9/latents"] == 4


def test_several_runs_are_one_comparison_if_they_were_made_alike():
    config = {"config": {"training": {"k": 32, "seeds": [0]}, "evaluation": {"ce_rows": 24}}}
    first = run_of("run_1", config, baseline=metrics_of(seed=0), x=metrics_of(kappa=0.1, seed=0))
    more = {"config": {"training": {"k": 32, "seeds": [0, 1]}, "evaluation": {"ce_rows": 64}}}
    second = run_of(
        "run_2",
        more,
        baseline=metrics_of(seed=0, kappa=0.9),
        baseline_seed1=metrics_of(seed=1, kappa=0.07),
        x=metrics_of(kappa=0.3, seed=0, coefficient=2.0),
        x_seed1=metrics_of(kappa=0.3, seed=1, coefficient=2.0),
    )
    matched = match_methods([first, second])
    # seed 0 of the baseline counts once, as the first run has it
    assert matched["baseline"]["as_trained"]["kappa1_excess_within"]["mean"] == pytest.approx(0.06)
    assert list(matched["methods"]) == ["x", "x (run_2)"]  # another coefficient is another method
    assert matched["methods"]["x (run_2)"]["seeds"] == [0, 1]
    assert at_l0(matched).rows[1][0] == "x, 1 seed"
    assert matched["left_out"] == ["CE loss score: the runs measured it on different contexts"]
    assert "ce_loss_score" not in matched["methods"]["x"]["at_l0"]

    other = run_of("run_3", {"config": {"training": {"k": 16}}}, baseline=metrics_of())
    with pytest.raises(UsageError, match=r"run_3 differs from run_1 \(training\.k 16 instead of 32\): compare them"):
        match_methods([first, other])


def test_without_a_baseline_or_anything_beside_it(tmp_path):
    with pytest.raises(UsageError, match="run_1: no baseline to compare with"):
        match_methods([run_of(x=metrics_of())])
    run = write_synthetic_run(tmp_path / "run_1", named=())
    assert write_matched(run) is None
    assert not (run / "matched.json").exists()
