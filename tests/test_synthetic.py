"""The synthetic bed: what is planted is there, recovery by hand, ranks, and a small study from end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from legato import LegatoError, SparseAutoencoder, UsageError, evaluate
from legato.common.command import Interrupts
from legato.sae.architectures import BatchTopK, JumpReLU, ReLU
from legato.sae.codes import SparseCodes
from legato.synthetic import (
    FAMILIES,
    Bed,
    BedConfig,
    Family,
    Judgement,
    Match,
    Sources,
    StudyConfig,
    Synthetic,
    code_correlation,
    decoder_cosine,
    study,
)
from legato.synthetic.command import read_arms, read_sources
from legato.synthetic.ranking import METRICS, rank_correlations
from legato.synthetic.recovery import bootstrap, chance_mcc, encode, found_by_true_directions
from legato.synthetic.sources import PROFILES, fire
from legato.training.config import SAEConfig

L = 64


def one_source(**properties):
    """Sources with one member: rate .1, everything else off, unless given."""
    plain = {
        "rate": 0.1,
        "persistence": 0.0,
        "position": 0.0,
        "topic": 1.0,
        "magnitude": 1.0,
        "spread": 0.0,
        "magnitude_persistence": 0.0,
    }
    columns = {f"{name}_F": np.array([value]) for name, value in {**plain, **properties}.items() if name != "profile"}
    return Sources(**columns, profile_F=np.array([PROFILES.index(properties.get("profile", "ramp"))]))


def codes_of(sources, rows=2000, starts=(), seed=0):
    """[rows, L] codes of one source; documents begin at `starts` too."""
    starts_BL = np.zeros((rows, L), bool)
    starts_BL[:, list(starts)] = True
    return fire(sources, starts_BL, np.random.default_rng(seed))[:, :, 0]


def within_four_errors(values_B, expected):
    """Rows are independent: their mean lies within four standard errors of what is expected."""
    error = values_B.std() / math.sqrt(len(values_B))
    assert abs(values_B.mean() - expected) < 4 * error, (values_B.mean(), expected, error)


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_rate_and_persistence_are_the_planted_ones(rho):
    # a Markov chain with P(on) = p: E on_t on_{t+lag} = p^2 + p (1 - p) rho^lag
    on_BL = codes_of(one_source(persistence=rho)) > 0
    within_four_errors(on_BL.mean(1), 0.1)
    for lag in (1, 2, 5):
        both_B = (on_BL[:, lag:] & on_BL[:, :-lag]).mean(1)
        within_four_errors(both_B, 0.01 + 0.09 * rho**lag)


def test_nothing_is_carried_over_the_start_of_a_document():
    on_BL = codes_of(one_source(persistence=0.9, rate=0.3), starts=(20,)) > 0
    within_four_errors((on_BL[:, 19] & on_BL[:, 20]).astype(float), 0.3**2)
    within_four_errors((on_BL[:, 20] & on_BL[:, 21]).astype(float), 0.09 + 0.21 * 0.9)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_the_rate_follows_the_profile_exactly_even_where_it_is_persistent(rho):
    # swing .8: from .1 * .2 at the first to .1 * 1.8 at the last position; a step for first_half
    ramp_BL = codes_of(one_source(position=0.8, persistence=rho), rows=6000) > 0
    half_BL = codes_of(one_source(position=0.8, persistence=rho, profile="first_half"), rows=6000) > 0
    for at, expected in ((0, 0.02), (L - 1, 0.18)):
        within_four_errors(ramp_BL[:, at].astype(float), expected)
    for at, expected in ((0, 0.18), (L // 2 - 1, 0.18), (L // 2, 0.02)):
        within_four_errors(half_BL[:, at].astype(float), expected)


def test_profiles_keep_the_mean_rate_and_planted_values_say_how_much_they_vary():
    sources = one_source(position=0.5, profile="second_half")
    assert sources.rate_LF(L).mean() == pytest.approx(0.1)
    # rates .05 and .15: standard deviation .05 over a mean of .1
    assert sources.planted(L)["position"] == pytest.approx([0.5])
    assert sources.planted(L)["topic"] == pytest.approx([0])


def test_a_topic_source_fires_in_its_share_of_the_documents_only():
    on_BL = codes_of(one_source(topic=0.25, rate=0.2)) > 0  # inside a topic document with .2 / .25 = .8
    within_four_errors(on_BL.any(1).astype(float), 0.25)
    within_four_errors(on_BL[on_BL.any(1)].mean(1), 0.8)


def test_magnitudes_have_the_planted_mean_spread_and_persistence():
    code_BL = codes_of(one_source(rate=0.6, magnitude=2.0, spread=0.3, magnitude_persistence=0.8))
    on_BL = code_BL > 0
    within_four_errors(code_BL.sum(1) / on_BL.sum(1), 2.0)
    # log codes are normal with mean log 2 - .3^2 / 2 and standard deviation .3
    z_BL = np.where(on_BL, (np.log(np.where(on_BL, code_BL, 1)) - (math.log(2) - 0.045)) / 0.3, 0)
    within_four_errors((z_BL**2).sum(1) / on_BL.sum(1), 1.0)
    for lag in (1, 3):
        pairs_BL = on_BL[:, lag:] & on_BL[:, :-lag]
        within_four_errors((z_BL[:, lag:] * z_BL[:, :-lag]).sum(1) / pairs_BL.sum(1), 0.8**lag)


def test_drawn_sources_spread_over_their_ranges_and_are_independent():
    sources = Sources.draw(((FAMILIES["mixed"], 200), (FAMILIES["iid"], 56)), np.random.default_rng(0))
    assert sources.count == 256
    assert (sources.persistence_F[200:] == 0).all()
    # 200 values in the middle of 200 equal steps from 0 to .9
    assert np.sort(sources.persistence_F[:200]) == pytest.approx((np.arange(200) + 0.5) * 0.9 / 200)
    assert np.exp(np.log(sources.rate_F[:200]).mean()) == pytest.approx(math.sqrt(0.01 * 0.05))
    planted = np.stack([values[:200] for values in sources.planted(L).values()])
    off_diagonal = np.corrcoef(planted)[~np.eye(len(planted), dtype=bool)]
    assert np.abs(off_diagonal).max() < 4 / math.sqrt(200)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ({"rate": (0.0, 0.1)}, "rate 0.0 to 0.1 must be"),
        ({"persistence": (0.5, 0.2)}, "persistence"),
        ({"rate": (0.3, 0.3), "topic": (0.2, 0.2)}, "needs a probability of 1.5"),
        ({"rate": (0.6, 0.6), "position": (1.0, 1.0)}, "needs a probability of 1.2"),
    ],
)
def test_impossible_families_are_refused(ranges, said):
    with pytest.raises(UsageError, match=said):
        Family(**ranges)


# --- the bed ----------------------------------------------------------------------------------------------------------

SMALL = BedConfig(
    families=((FAMILIES["mixed"], 48),), d_in=24, rows=70, held_out_rows=40, length=32, document_length=40
)


def test_a_bed_is_the_same_each_time_and_another_with_another_seed():
    one, again, other = Bed.build(SMALL), Bed.build(SMALL), Bed.build(replace(SMALL, seed=1))
    assert torch.equal(one.train.acts_RLD, again.train.acts_RLD)
    assert torch.equal(one.held_out.codes.value_P, again.held_out.codes.value_P)
    assert not torch.equal(one.directions_FD, other.directions_FD)
    assert not torch.equal(one.train.acts_RLD[:40], one.held_out.acts_RLD)


def test_activations_are_the_codes_in_superposition_plus_noise():
    quiet = Bed.build(replace(SMALL, noise=0.0))
    expected = quiet.train.codes.dense() @ quiet.directions_FD
    torch.testing.assert_close(quiet.train.acts_RLD[:, 1:], expected[:, 1:])
    assert quiet.directions_FD.norm(dim=1) == pytest.approx(torch.ones(48))
    loud = Bed.build(replace(SMALL, noise=0.5, noise_persistence=0.7))
    noise = (loud.train.acts_RLD - loud.train.codes.dense() @ loud.directions_FD)[:, 1:].double()
    assert noise.std().item() == pytest.approx(0.5, rel=0.03)
    lagged = (noise[:, 1:] * noise[:, :-1]).mean() / noise.square().mean()
    assert lagged.item() == pytest.approx(0.7, abs=0.02)


def test_the_first_position_is_masked_and_documents_are_marked():
    bed = Bed.build(SMALL)
    assert not bed.train.mask_RL[:, 0].any()
    assert bed.train.mask_RL[:, 1:].all()
    norms = bed.train.acts_RLD.norm(dim=-1)
    assert norms[:, 0].min() > 8 * norms[:, 1:].median()
    assert (bed.train.codes.token_P % 32 > 0).all()
    doc_RL = bed.train.doc_RL
    assert (doc_RL[1:, 0] > doc_RL[:-1, -1]).all()  # a row begins a new document
    cuts = (doc_RL[:, 1:] != doc_RL[:, :-1]).double().mean(1).numpy()
    within_four_errors(cuts, 1 / 40)


def test_a_side_gives_batches_as_a_store_does():
    rows = Bed.build(SMALL).train
    batches = list(rows.batches(32, seed=None))
    assert [len(batch.mask_BL) for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat([batch.acts_BLD for batch in batches]), rows.acts_RLD)
    drawn = list(rows.batches(32, seed=3, epochs=2, drop_last=True, start_batch=1))
    assert [len(batch.mask_BL) for batch in drawn] == [32] * 3
    assert torch.equal(rows.first_codes(5).dense(), rows.codes.dense()[:5])


@pytest.mark.parametrize(
    "options", [{"d_in": 1}, {"families": ()}, {"noise": -1.0}, {"noise_persistence": 1.0}, {"length": 2}]
)
def test_impossible_beds_are_refused(options):
    with pytest.raises(UsageError, match=f"^--{next(iter(options))} .* must"):
        replace(SMALL, **options)


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_the_match_is_the_best_assignment_not_the_greedy_one():
    # greedy would take .9 first and be left with .1, a mean of .5; the best is .8 and .8
    match = Match.best(np.array([[0.9, 0.8], [0.8, 0.1]]))
    assert match.latent_F.tolist() == [1, 0]
    assert match.mcc == pytest.approx(0.8)


def test_sources_without_a_latent_score_zero():
    match = Match.best(np.array([[0.4], [0.7]]))
    assert match.latent_F.tolist() == [-1, 0]
    assert match.mcc == pytest.approx(0.35)
    assert Match.best(np.array([[0.4, 0.7]])).mcc == pytest.approx(0.7)


def test_mcc_of_identical_permuted_and_rotated_dictionaries():
    directions_FD = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    permuted = Match.best(decoder_cosine(directions_FD, -3 * directions_FD[order]))  # sign and length do not count
    assert permuted.mcc == pytest.approx(1)
    assert order[permuted.latent_F].tolist() == list(range(20))
    # e1, e2 turned by 30 degrees: cosines cos 30 with the near one, sin 30 with the other
    cos, sin = math.cos(math.pi / 6), 0.5
    turned = decoder_cosine(torch.eye(2), torch.tensor([[cos, sin], [-sin, cos]]))
    assert turned == pytest.approx(np.array([[cos, sin], [sin, cos]]))
    assert Match.best(turned).mcc == pytest.approx(math.sqrt(3) / 2)


def test_the_mcc_of_a_random_dictionary():
    # one direction and one random row in three dimensions: |cosine| is uniform on 0..1, mean 1/2, deviation 1/sqrt(12)
    bed = Bed.build(BedConfig(families=((FAMILIES["iid"], 1),), d_in=3, rows=1, held_out_rows=1))
    within_four_errors(np.array([chance_mcc(bed, 1, seed=seed) for seed in range(400)]), 0.5)


def sparse(*columns):
    return SparseCodes.from_dense(torch.tensor(columns).T[None])


def test_code_correlation_by_hand():
    # f = 1 0 3 0 . with the last token masked; 2 f correlates 1. g = 0 1 0 1: f has mean 1, deviations 0 -1 2 -1 and
    # variance 6/4; g has mean 1/2, deviations -.5 .5 -.5 .5 and variance 1/4; covariance (-.5 - 1 - .5) / 4 = -1/2:
    # -1/2 / sqrt(6/16). A latent that never fires has none.
    mask_BL = torch.tensor([[True, True, True, True, False]])
    planted = sparse([1.0, 0, 3, 0, 9])
    learned = sparse([2.0, 0, 6, 0, 0], [0.0, 1, 0, 1, 5], [0.0, 0, 0, 0, 7])
    expected = [1, -0.5 / math.sqrt(6 / 16), 0]
    assert code_correlation(planted, learned, mask_BL)[0] == pytest.approx(expected)


def true_sae(bed, threshold):
    F = bed.sources.count
    return SparseAutoencoder(
        bed.directions_FD.T.contiguous(),
        torch.zeros(F),
        bed.directions_FD.clone(),
        torch.zeros(bed.config.d_in),
        JumpReLU(threshold=torch.full((F,), threshold)),
    )


def test_the_true_dictionary_recovers_everything_where_nothing_hides_it():
    bed = Bed.build(
        BedConfig(families=((Family(spread=(0.1, 0.1)), 20),), d_in=400, noise=0.02, rows=2, held_out_rows=100)
    )
    judged = Judgement.of(true_sae(bed, 0.5), bed)
    assert judged.decoder.mcc == pytest.approx(1)
    assert judged.code.mcc > 0.98
    assert judged.core["l0"] == pytest.approx(len(bed.held_out.codes) / (100 * 127), rel=0.02)
    assert found_by_true_directions(bed, 1, 0.5)["single_token"] > 0.9
    codes = encode(true_sae(bed, 0.5), bed.held_out)
    whole = true_sae(bed, 0.5).encode_sparse(bed.held_out.take(slice(0, 100)))
    assert torch.equal(codes.token_P, whole.token_P)
    assert torch.equal(codes.latent_P, whole.latent_P)


def test_memory_along_the_sequence_finds_more_of_persistent_sources_and_no_more_of_others():
    def found(rho):
        family = Family(rate=(0.03, 0.03), persistence=(rho, rho))
        bed = Bed.build(BedConfig(families=((family, 100),), d_in=100, noise=0.35, rows=1, held_out_rows=48))
        return found_by_true_directions(bed, 3, 0.5)

    persistent, independent = found(0.9), found(0.0)
    assert persistent["held"] > persistent["single_token"] + 0.05
    assert independent["held"] <= independent["single_token"]


def test_an_sae_of_another_width_is_refused():
    bed = Bed.build(SMALL)
    with pytest.raises(LegatoError, match="width 9, the bed 24"):
        Judgement.of(SparseAutoencoder(torch.ones(9, 4), torch.zeros(4), torch.ones(4, 9), torch.zeros(9), ReLU()), bed)


def test_the_bootstrap_draws_seeds_and_sources():
    assert bootstrap([np.full(5, 0.3), np.full(7, 0.3)]) == (pytest.approx(0.3), pytest.approx([0.3, 0.3]))
    # two seeds that disagree fully: both draws hit the same one half of the time, so the interval is all of 0..1
    assert bootstrap([np.zeros(5), np.ones(5)]) == (pytest.approx(0.5), pytest.approx([0, 1]))
    # one seed: the standard error of a mean of 400 fair coins is .025
    mean, (low, high) = bootstrap([np.repeat([0.0, 1.0], 200)])
    assert mean == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_by_hand_and_what_is_shared_by_chance_is_taken_out():
    # rate goes with persistence (ranks 1 0 3 2 against 0 1 2 3, four times over), so a metric that is persistence
    # correlates with it, but its weight is 0. Constant properties are left out.
    persistence = np.arange(12.0)
    rate = persistence.reshape(3, 4)[:, [1, 0, 3, 2]].ravel()
    planted = {name: np.ones(12) for name in ("magnitude", "magnitude_persistence", "position", "topic")}
    planted |= {"persistence": persistence, "rate": rate}
    columns = {name: persistence**3 for name in METRICS} | {"mi": -rate, "eta2": np.full(12, 0.5)}
    found = rank_correlations([columns], [planted])
    # sum of squared rank differences 12: 1 - 6 * 12 / (12 * 143)
    assert found["spearman"]["kappa1"] == pytest.approx({"persistence": 1, "rate": 1 - 72 / 1716})
    assert found["weight"]["kappa1"] == pytest.approx({"persistence": 1, "rate": 0})
    assert found["weight"]["mi"] == pytest.approx({"persistence": 0, "rate": -1})
    assert "eta2" not in found["spearman"]
    assert found["sources"] == 12
    few = [{name: values[:9] for name, values in side.items()} for side in (columns, planted)]
    assert rank_correlations([few[0]], [few[1]])["spearman"] == {}


# --- studies ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_study():
    bed = BedConfig(families=((FAMILIES["mixed"], 64),), d_in=48, noise=0.2, rows=96, held_out_rows=384)
    arms = read_arms("hysteresis,hysteresis:shuffled", 64, None, bed, release=0.5)
    return study(bed, arms, StudyConfig(seeds=(0, 1), steps=120))


def test_metrics_rank_the_planted_values_as_they_should(small_study):
    spearman, weight = small_study["true_codes"]["spearman"], small_study["true_codes"]["weight"]
    assert spearman["kappa1_excess_within"]["persistence"] >= 0.95
    assert spearman["ac1_excess_within"]["persistence"] >= 0.95
    assert spearman["eta2"]["position"] > 0.8
    # S is a scale, raw switching a rate, raw kappa also a topic; over the within-document null none of that is left
    assert weight["smoothness"]["magnitude"] > 0.7 > abs(weight["smoothness"]["persistence"])
    assert weight["switching_rate"]["rate"] > 0.4 > abs(weight["switching_ratio"]["rate"])
    assert weight["kappa1"]["topic"] > weight["kappa1_excess_within"]["topic"]
    low, high = small_study["true_codes"]["interval95"]["kappa1"]["persistence"]
    assert low < spearman["kappa1"]["persistence"] < high + 0.01


def test_arms_are_trained_at_one_l0_and_recover_more_than_chance(small_study):
    arms = small_study["arms"]
    assert list(arms) == ["baseline", "hysteresis", "hysteresis shuffled"]
    for arm in arms.values():
        assert arm["core"]["l0"] == pytest.approx(arms["baseline"]["core"]["l0"], rel=0.05)
        assert arm["mcc"]["all"]["mean"] > small_study["difficulty"]["chance_mcc"] + 0.1
        assert arm["mcc"]["all"]["sources"] == 64
    assert arms["baseline"]["advantage"]["decoder"]["all"]["mean"] == 0
    gain = arms["hysteresis"]["advantage"]["decoder"]["persistent"]
    mine, baseline = (arms[name]["mcc"]["persistent"]["per_seed"] for name in ("hysteresis", "baseline"))
    assert gain["mean"] == pytest.approx(np.mean(mine) - np.mean(baseline))
    assert gain["interval95"][0] <= gain["mean"] <= gain["interval95"][1]


def test_evaluate_takes_a_bed_as_it_is():
    bed = Bed.build(replace(SMALL, noise=0.1))
    result = evaluate(true_sae(bed, 0.6), bed.held_out)
    assert result["core"]["tokens"] == 40 * 31
    assert 0 < result["core"]["l0"] < 10


def test_the_command_writes_everything_and_repeats_itself(tmp_path, capsys):
    def run(name):
        options = {"arms": "baseline,topk", "sources": "mixed:12,iid:8", "seeds": 1, "d_in": 16, "rows": 16, "steps": 4}
        Synthetic(out_dir=tmp_path / name, sweep=False, **options).run(Interrupts())
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "synthetic.json",
            "synthetic.png",
            "synthetic.txt",
        ]
        return json.loads((tmp_path / name / "synthetic.json").read_text())

    first, second = run("a"), run("b")
    assert "Recovery: MCC" in capsys.readouterr().out
    assert first["bed"]["sources"] == 20
    assert list(first["arms"]) == ["baseline", "topk"]
    assert {**first, "options": None} == {**second, "options": None}
    with pytest.raises(UsageError, match="not an empty folder"):
        run("a")


@pytest.mark.parametrize("text", ["", "unknown", "iid:0", "iid:many", "iid:-3"])
def test_bad_sources_are_refused(text):
    with pytest.raises(UsageError, match="--sources"):
        read_sources(text)


def test_bad_arms_and_studies_are_refused():
    with pytest.raises(UsageError, match="unknown"):
        read_arms("nonsense", 8, 2, SMALL, 0.5)
    baseline = SAEConfig("baseline", BatchTopK(2), 8)
    with pytest.raises(UsageError, match="one of them 'baseline'"):
        study(SMALL, [replace(baseline, name="mine")], StudyConfig())
    with pytest.raises(UsageError, match="fewer than one batch"):
        study(replace(SMALL, rows=4), [baseline], StudyConfig())
    with pytest.raises(UsageError, match="seeds"):
        StudyConfig(seeds=(1, 1))
