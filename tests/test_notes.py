import json
import math
from pathlib import Path

import pytest
from identities import identified
from synthetic_run import write_synthetic_run

from legato.common.errors import LegatoError, UsageError
from legato.report.text.notes import notes, scope, warnings, write_notes
from legato.report.text.summary import answers
from legato.report.text.verdict import compare, headline
from legato.results.final_info import final_info, write_final_info
from legato.results.saved_run import SavedRun, arms_of


def metrics_of(*, fvu=0.21, l0=32.0, excess=0.08, alive=0.99, ce=0.9, tokens=2_400_000, **recipe):
    return {
        "core": {"fvu": fvu, "l0": l0, "frac_alive": alive, "ce_loss_score": ce, "dense": 3, "tokens": 60_000},
        "consistency": {"kappa1_excess_within": excess, "kappa1_excess_cross": 0.12, "by_rate_bin": []},
        "training": {"tokens": tokens, "training_steps": 100, "recipe": recipe},
    }


def run_of(**arms) -> SavedRun:
    return SavedRun(Path("run_1"), arms_of(identified(arms)))


def test_a_gain_at_the_same_cost_is_called_one():
    run = run_of(baseline=metrics_of(), contrastive=metrics_of(excess=0.12, fvu=0.213))
    [found] = compare(run)
    assert (found.arm, found.outcome, found.matched) == ("contrastive", "higher", True)
    assert "0.120 against 0.080 (+0.040, 1.5 times" in found.details[0]
    assert (
        headline(run)
        == "contrastive: 1.5 times the baseline's kappa excess at lag 1 (0.120 against 0.080), at matched "
        "sparsity and reconstruction."
    )


def shuffled(metrics, left):
    metrics["consistency"]["position_shuffled"] = {"kappa1_excess_within": left}
    return metrics


def test_a_gain_that_remains_on_shuffled_text_is_called_mechanism():
    # Gain 0.12; of it 0.09 - 0.01 remains for a, two thirds, and 0.03 - 0.01 for b, a sixth.
    run = run_of(
        baseline=shuffled(metrics_of(), 0.01),
        a=shuffled(metrics_of(excess=0.20), 0.09),
        b=shuffled(metrics_of(excess=0.20), 0.03),
        c=metrics_of(excess=0.20),
    )
    a, b, c = compare(run)
    assert (a.mechanism, b.mechanism) == (pytest.approx(2 / 3), pytest.approx(1 / 6))
    assert c.mechanism is None
    assert "67% of the gain remains on shuffled text" in a.headline
    assert "shuffled" not in b.headline
    assert "17% of the gain is made by its mechanism" in b.details[-1]
    assert "the control on shuffled text was not run" in c.details[-1]
    first, second = headline(run).split(". ")
    assert first.startswith("a: a higher kappa excess at lag 1 than the baseline (0.200 against 0.080), at matched")
    assert "but 67% of that gain is made by the mechanism" in first
    assert second.startswith("Above the baseline's kappa excess at lag 1 (0.080), at matched")
    assert second.endswith("b 0.200 (2.5 times) and c 0.200 (2.5 times).")
    limits = "\n".join(scope(run))
    assert "is for a 0.090 of 0.200 and b 0.030 of 0.200." in limits
    assert "gain of c may be made by the mechanism: the shuffled control was not run" in limits


def test_the_first_questions_are_answered_with_the_costs_named():
    # Of the gain of 0.08, 0.06 remains on shuffled text: three quarters.
    base, arm = shuffled(metrics_of(), 0.0), shuffled(metrics_of(excess=0.16, fvu=0.2058, alive=0.9405), 0.06)
    kinds = {"token": 0.2, "phrase": 0.7, "dense": 0.1, "passage": 0.0}
    arm["specialisation"] = {"by_latent": {k: {"latents": v, "share_of_latents": v} for k, v in kinds.items()}}
    train, cost, hold, like = answers(run_of(baseline=base, contrastive=arm))
    assert train[0] == "Did it train?"
    assert "all 2 SAEs" in train[1]
    assert "leaves 21.0% of the variance unexplained, recovers 90.0%" in train[1]
    assert cost[0] == "Is contrastive as good as the baseline?"
    assert cost[1].startswith("Not in alive latents: FVU -2.0%, CE score +0.0%, alive latents -5.0%")
    assert hold == (
        "Do its features hold?",
        "More than the baseline's, but mostly by its mechanism: kappa excess at lag 1 0.160 against 0.080, 2.0 times. "
        "On shuffled text it keeps 0.060, so its mechanism makes 75% of the gain by itself, the order of the text the "
        "rest.",
    )
    assert "contrastive 70% phrase, 20% token, 10% dense." in like[1]

    same = dict(answers(run_of(baseline=base, contrastive=metrics_of())))
    assert (
        same["Do its features hold?"] == "About as much as the baseline's: kappa excess at lag 1 0.080 against 0.080."
    )
    assert same["Is contrastive as good as the baseline?"].startswith("Yes: FVU +0.0%")
    assert [question for question, _ in answers(run_of(only=metrics_of()))] == ["Did it train?"]


def test_a_failed_arm_and_saes_that_were_not_trained_here_are_told_so(tmp_path):
    arms = {"baseline": metrics_of(), "contrastive": metrics_of()}
    (tmp_path / "failed" / "slowness").mkdir(parents=True)
    [(_, told), *_] = answers(SavedRun(tmp_path, arms_of(identified(arms))))
    assert told.startswith("Not all of it: slowness failed")
    for metrics in arms.values():
        del metrics["training"]
    [(question, told), *_] = answers(run_of(**arms))
    assert (question, told[:13]) == ("What was judged?", "2 saved SAEs,")


@pytest.mark.parametrize(
    ("change", "outcome", "matched"),
    [
        ({"excess": 0.0879}, "same", True),  # 9.9 % above with one seed: within what is called no difference
        ({"excess": 0.0881}, "higher", True),
        ({"excess": 0.05}, "lower", True),
        ({"excess": 0.12, "fvu": 0.2164}, "higher", False),  # 3.05 % above the baseline's FVU
        ({"excess": 0.12, "fvu": 0.15}, "higher", True),  # a better reconstruction is no cost
        ({"excess": 0.12, "l0": 33.7}, "higher", False),  # 5.3 % more latents per token
        ({"excess": 0.9, "l0": 6.0}, "collapsed", False),
        ({"excess": 0.9, "alive": 0.4}, "collapsed", False),
        ({"excess": None}, "unknown", False),
        ({"excess": 0.12, "fvu": math.nan}, "higher", False),
    ],
)
def test_outcome_and_fairness(change, outcome, matched):
    [found] = compare(run_of(baseline=metrics_of(), contrastive=metrics_of(**change)))
    assert (found.outcome, found.matched) == (outcome, matched)


def test_several_seeds_are_judged_by_their_standard_error():
    # sd 0.0141 over 2 seeds: standard error 0.01 each, 0.0141 of the difference; 0.02 is within two of them, 0.04 not.
    def seeds(name, *values):
        return {f"{name}{f'_seed{i}' * (i > 0)}": metrics_of(excess=v) for i, v in enumerate(values)}

    base = seeds("baseline", 0.07, 0.09)
    near, far = seeds("near", 0.09, 0.11), seeds("far", 0.11, 0.13)
    found = {c.arm: c for c in compare(run_of(**base, **near, **far))}
    assert {arm: c.outcome for arm, c in found.items()} == {"near": "same", "far": "higher"}
    assert "2 and 2 seeds, standard error of the difference 0.014" in found["far"].details[0]


def test_firing_rate_bins_are_counted():
    def bins(*rows):
        return [{"bin": [10**e, 10 ** (e + 1)], "latents": n, "kappa1_excess_within": x} for e, n, x in rows]

    base, arm = metrics_of(), metrics_of(excess=0.2)
    base["consistency"]["by_rate_bin"] = bins((-4, 100, 0.05), (-3, 100, 0.10), (-2, 19, 0.1))
    arm["consistency"]["by_rate_bin"] = bins((-4, 100, 0.04), (-3, 100, 0.11), (-2, 50, 0.3))
    [found] = compare(run_of(baseline=base, contrastive=arm))
    assert "It is ahead in 1 of 2 firing-rate bins with at least 20 latents." in found.details


def test_what_an_arm_is_stands_in_its_recipe():
    recipe = {"role": "sweep", "method": "b", "group": "b_k16", "k": 16, "seed": 1}
    [arm] = arms_of({"a_k8_seed0": metrics_of(**recipe)})
    assert (arm.role, arm.method, arm.group, arm.k, arm.seed, arm.in_grid) == ("sweep", "b", "b_k16", 16, 1, False)
    [both] = arms_of({"x": metrics_of(**recipe | {"role": "named", "in_grid": True})})
    assert (both.role, both.in_grid) == ("named", True)


def test_older_runs_are_told_by_what_their_recipes_share():
    def of(type, term=None, window=None, coefficient=None, k=32, seed=0):
        sparsity = {"type": type, "k": k}
        return metrics_of(sparsity=sparsity, term=term, window=window, coefficient=coefficient, k=k, seed=seed)

    metrics = {
        "baseline": of("BatchTopK"),
        "baseline_seed1": of("BatchTopK", seed=1),
        "baseline_k16": of("BatchTopK", k=16),
        "topk": of("TopK"),
        "topk_k16_seed1": of("TopK", k=16, seed=1),
        "window_variance_w8_c0.1": of("BatchTopK", "window_variance", 8, 0.1),
    }
    assert [(a.role, a.method, a.group) for a in arms_of(metrics)] == [
        ("baseline", "baseline", "baseline"),
        ("baseline", "baseline", "baseline"),
        ("sweep", "baseline", "baseline_k16"),
        ("named", "topk", "topk"),
        ("sweep", "topk", "topk_k16_seed1"),
        ("named", "window_variance_w8_c0.1", "window_variance_w8_c0.1"),
    ]
    points = [(w, c) for w in (2, 4) for c in (0.1, 0.3)]
    grid = {f"window_variance_w{w}_c{c}": of("BatchTopK", "window_variance", w, c) for w, c in points}
    found = arms_of({"baseline": of("BatchTopK"), **grid})
    assert [(a.role, a.in_grid, a.window, a.coefficient) for a in found[1:]] == [("grid", True, *p) for p in points]
    assert [(a.role, a.group) for a in arms_of({"baseline": {}, "x": {}})] == [("baseline",) * 2, ("named", "x")]


def test_warnings_name_what_is_wrong_and_with_which_arm():
    run = run_of(
        baseline=metrics_of(),
        b=metrics_of(alive=0.9),
        c=metrics_of(fvu=0.31, ce=0.7),
    )
    text = "\n".join(warnings(run))
    assert "Few training tokens: 2.4M" in text
    assert "never fire on held-out text: b." in text
    assert "FVU above 0.30 on held-out text: c." in text
    assert "CE loss score below 0.80: c." in text
    assert warnings(run_of(baseline=metrics_of(tokens=3e8))) == []


def test_notes_of_a_full_run_and_of_a_poor_one(tmp_path):
    run_dir = write_synthetic_run(tmp_path / "run_1", grid=True)
    text = write_notes(run_dir).read_text()
    for heading in ("What was run", "Results", "What the comparison says", "What the ablation says", "Warnings"):
        assert heading in text
    assert "read at layer 9 (resid_post)" in text
    assert "15 members over windows 2, 4, 8, 16, 32" in text
    assert all(len(line) <= 110 for line in text.splitlines())

    bare = notes(run_of(only=metrics_of()))
    assert "There is no baseline in this run" in bare
    assert "No configuration was saved with this run." in bare
    assert "position-shuffled" not in "\n".join(scope(run_of(baseline=metrics_of())))


def test_final_info_has_means_and_standard_errors_over_seeds(tmp_path):
    run = run_of(baseline=metrics_of(fvu=0.20), baseline_seed1=metrics_of(fvu=0.24), contrastive=metrics_of())
    info = final_info(run)
    assert list(info) == ["baseline", "contrastive"]
    assert info["baseline"]["means"]["core.fvu"] == pytest.approx(0.22)
    # sd of (0.20, 0.24) with n - 1 is 0.02828; over sqrt(2) that is 0.02
    assert info["baseline"]["stderrs"]["core.fvu"] == pytest.approx(0.02)
    assert info["baseline"]["final_info_dict"]["core.fvu"] == [0.20, 0.24]
    assert info["contrastive"]["stderrs"] == {}
    assert "one seed" in info["contrastive"]["note"]

    run_dir = write_synthetic_run(tmp_path / "run_1", seeds=2)
    saved = json.loads(write_final_info(run_dir).read_text())
    assert all("means" in entry for entry in saved.values())
    assert "training.training_steps" in saved["baseline"]["means"]
    assert not any("recipe" in key or "lags" in key for key in saved["baseline"]["means"])


def test_folders_that_hold_no_results_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no metrics\.json"):
        write_notes(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(LegatoError, match="damaged"):
        write_notes(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(LegatoError, match="holds no arm"):
        write_notes(tmp_path)


def test_a_torn_log_line_and_gaps_are_survived(tmp_path):
    run_dir = write_synthetic_run(tmp_path / "run_1")
    log = run_dir / "log.jsonl"
    log.write_text('{"arm": "a", "step": 1, "loss": 2.0}\n{"arm": "a", "step": 2, "loss": NaN}\n{"arm": "a", "st')
    columns = SavedRun.open(run_dir).log["a"]
    assert columns["step"].tolist() == [1.0, 2.0]
    assert columns["loss"][0] == 2.0
    assert math.isnan(columns["loss"][1])


def test_a_name_that_looks_like_a_template_is_told_as_it_is():
    name = "{{ 7 * 7 }} {% if %}\n\n<b>"
    base, arm = ({"role": role, "method": m, "group": m} for role, m in (("baseline", "baseline"), ("named", name)))
    run = SavedRun(Path("run_1"), arms_of({"baseline": metrics_of(**base), name: metrics_of(excess=0.12, **arm)}))
    assert headline(run).startswith("{{ 7 * 7 }} {% if %} <b>: 1.5 times the baseline's")
    assert "{{ 7 * 7 }} {% if %} <b>: 1.5 times" in notes(run)
    assert len(answers(run)) == 3


def test_sections_that_lack_a_number_are_refused():
    run = run_of(baseline=metrics_of() | {"specialisation": {"note": None, "by_name": {}, "by_latent": {}}})
    with pytest.raises(LookupError, match="latents"):
        notes(run)
