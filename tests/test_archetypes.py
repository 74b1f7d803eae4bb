"""Six processes with known persistence, judged by `evaluate` on the activations of a synthetic bed's sources.

The SAE is the identity, so each latent's codes are the process itself. Beside them: the closed-form nulls of these
processes against 1,000 real shuffles, and what rescaling a latent may change.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from legato import SparseAutoencoder, evaluate, metrics
from legato.data.activations import ActivationBatch
from legato.sae.architectures import ReLU
from legato.synthetic.sources import Sources, fire

ROWS, L = 600, 128
NAMES = ("iid sparse", "iid dense", "markov", "topic", "always on in its document", "position ramp")
MARKOV = NAMES.index("markov")
RHO = 0.9


def archetypes(magnitude=1.0, spread=0.0):
    """One source of each; a topic or an always-on source lives in a tenth of the documents."""
    ones = np.ones(len(NAMES))
    return Sources(
        rate_F=np.array([0.02, 0.5, 0.05, 0.05, 0.1, 0.2]),
        persistence_F=np.array([0, 0, RHO, 0, 0, 0.0]),
        position_F=np.array([0, 0, 0, 0, 0, 1.0]),
        topic_F=np.array([1, 1, 1, 0.1, 0.1, 1]),
        magnitude_F=magnitude * ones,
        spread_F=spread * ones,
        magnitude_persistence_F=0 * ones,
        profile_F=np.zeros(len(NAMES), int),  # a ramp upwards
    )


def batch_of(codes_BLF, doc_BL=None):
    B, length, _ = codes_BLF.shape
    doc_BL = torch.arange(B)[:, None].expand(B, length) if doc_BL is None else doc_BL
    mask_BL = torch.ones(B, length, dtype=torch.bool)
    return ActivationBatch(codes_BLF, mask_BL, doc_BL.int(), torch.zeros(B, length, dtype=torch.int64))


def identity_sae(scale_F=None, decoder_scale_F=None):
    ones = torch.ones(len(NAMES))
    scale_F = ones if scale_F is None else scale_F
    decoder_scale_F = ones if decoder_scale_F is None else decoder_scale_F
    zeros = torch.zeros(len(NAMES))
    return SparseAutoencoder(torch.diag(scale_F), zeros, torch.diag(decoder_scale_F), zeros, ReLU())


def mean_correlation_of_a_shuffled_chain(n, rho):
    """Mean of rho^|s - t| over the pairs of n positions: what the order of a chain leaves when it is shuffled."""
    lags = np.arange(1, n)
    return float((2 * (n - lags) * rho**lags).sum() / (n * (n - 1)))


@pytest.fixture(scope="module")
def judged():
    """The result of `evaluate` on rows that are one document each."""
    starts_BL = np.zeros((ROWS, L), bool)
    codes_BLF = torch.from_numpy(fire(archetypes(magnitude=3.0), starts_BL, np.random.default_rng(11)))
    return evaluate(identity_sae(), [batch_of(codes_BLF[:300]), batch_of(codes_BLF[300:])])


# (correlation at lag 1, its within-document null, its cross-document null); codes are constant where a source is on, so
# AC and kappa are the same number.
# topic: on with q = 1/2 in a share s = 1/10 of documents: (s q^2 - (s q)^2) / (s q (1 - s q)) = .0225 / .0475 = 9/19 at
# every lag and in every order. ramp: p_t from 0 to .4, variance between positions .4^2 / 12 over p (1 - p) = .16: 1/12,
# which a shuffle across documents keeps.
THEORY = {
    "iid sparse": (0, 0, 0),
    "iid dense": (0, 0, 0),
    "markov": (RHO, mean_correlation_of_a_shuffled_chain(L, RHO), 0),
    "topic": (9 / 19, 9 / 19, 0),
    "always on in its document": (1, 1, 0),
    "position ramp": (1 / 12, 0, 1 / 12),
}
TOLERANCE = 0.03


def test_the_shuffled_chain_by_hand():
    # n = 3: pairs at distance 1 (two of three) and 2 (one of three): (2 * .9 + .81) / 3 = .87
    assert mean_correlation_of_a_shuffled_chain(3, 0.9) == pytest.approx(0.87)
    # near .1 for a context of 128 tokens: 2 / (128 * 127) * (128 * 9 - .9 / .01) = 2 * 1062 / 16256
    assert mean_correlation_of_a_shuffled_chain(128, 0.9) == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.parametrize("signal", ["ac", "kappa"])
@pytest.mark.parametrize("name", NAMES)
def test_known_processes_come_out_of_evaluate_as_theory_says(judged, name, signal):
    real, within, cross = THEORY[name]
    columns, i = judged["features"], NAMES.index(name)
    for suffix, expected in (
        ("", real),
        ("_within_null", within),
        ("_cross_null", cross),
        ("_excess_within", real - within),
        ("_excess_cross", real - cross),
    ):
        assert columns[f"{signal}1{suffix}"][i] == pytest.approx(expected, abs=TOLERANCE), suffix


def test_persistence_fades_with_the_lag_only_in_the_chain(judged):
    columns = judged["features"]
    for lag in (2, 4, 8, 16, 32, 64):
        kappa_F = columns[f"kappa{lag}"]
        assert kappa_F[MARKOV] == pytest.approx(RHO**lag, abs=0.04)
        assert kappa_F[NAMES.index("topic")] == pytest.approx(9 / 19, abs=TOLERANCE)
        assert kappa_F[NAMES.index("always on in its document")] == pytest.approx(1)
        assert np.abs(kappa_F[:2]).max() < 0.02
    # rho^h = 1/2 at h = 6.58; between the lags 4 (.656) and 8 (.430) the line passes 1/2 at 6.76
    assert columns["half_life"][MARKOV] == pytest.approx(4 + 4 * (RHO**4 - 0.5) / (RHO**4 - RHO**8), abs=0.5)
    assert columns["half_life_censored"].tolist() == [False, False, False, False, True, False]


def test_runs_switches_documents_and_positions(judged):
    columns = judged["features"]
    # A row holds L p on tokens and p + (L - 1) p (1 - p) (1 - rho) first tokens of a run; the ratio is that mean length
    # times 1 - p
    expected = 1 / (1 / L + (1 - 1 / L) * (1 - RHO) * 0.95) * 0.95
    assert columns["run_length_ratio"][MARKOV] == pytest.approx(expected, rel=0.06)
    assert columns["switching_ratio"][MARKOV] == pytest.approx(1 - RHO, abs=0.015)
    assert columns["switching_ratio"][:2] == pytest.approx([1, 1], abs=0.03)
    assert columns["run_length_ratio"][:2] == pytest.approx([1, 1], abs=0.03)
    assert columns["switching_ratio"][NAMES.index("always on in its document")] == 0
    # between documents: all of the variance of one that is always on, 9/19 of a topic's
    documents = columns["document_eta2"]
    assert documents[NAMES.index("always on in its document")] == pytest.approx(1)
    assert documents[NAMES.index("topic")] == pytest.approx(9 / 19, abs=TOLERANCE)
    assert np.abs(documents[[0, 1, 5]]).max() < 0.01
    # position: 1/12 of the ramp's variance, nothing elsewhere. Information for p_t = .4 u: H(.2) - mean H(p_t)
    eta2 = columns["eta2"]
    assert eta2[-1] == pytest.approx(1 / 12, abs=0.01)
    assert np.abs(eta2[:-1]).max() < 0.01
    u = (np.arange(100_000) + 0.5) / 100_000
    information = entropy(0.2) - entropy(0.4 * u).mean()
    assert columns["mi"][-1] == pytest.approx(information, abs=0.004)
    assert np.abs(columns["mi"][:2]).max() < 0.001


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_the_null_of_a_chain_follows_the_length_of_the_document():
    # Documents of 32 tokens, four to a row: the shuffle only mixes 32 positions, so the null is .41 instead of .13.
    # In closed form 2 / (n (n - 1)) * (n rho / (1 - rho) - rho (1 - rho^n) / (1 - rho)^2) = 2 / 992 * (288 - 86.9)
    starts_BL = np.broadcast_to(np.arange(L) % 32 == 0, (ROWS, L))
    codes_BLF = torch.from_numpy(fire(archetypes(), starts_BL, np.random.default_rng(5)))
    doc_BL = torch.from_numpy(np.cumsum(starts_BL.ravel()).reshape(ROWS, L))
    measured = metrics.kappa(codes_BLF, torch.ones(ROWS, L, dtype=torch.bool), doc_BL, lags=(1,))
    expected = mean_correlation_of_a_shuffled_chain(32, RHO)
    assert expected == pytest.approx(0.4054, abs=1e-4)
    assert measured.within_null[MARKOV, 0].item() == pytest.approx(expected, abs=TOLERANCE)
    assert measured.real[MARKOV, 0].item() == pytest.approx(RHO, abs=TOLERANCE)


# --- nulls against real shuffles --------------------------------------------------------------------------------------


def shuffled_within_documents(codes_BLF, doc_BL, generator):
    order_BL = np.argsort(doc_BL + generator.random(doc_BL.shape) * 0.5, axis=1)  # documents stay in their places
    return np.take_along_axis(codes_BLF, order_BL[..., None], 1)


def shuffled_across_rows(codes_BLF, doc_BL, generator):
    order_BL = np.argsort(generator.random(doc_BL.shape), axis=0)
    return np.take_along_axis(codes_BLF, order_BL[..., None], 0)


@pytest.mark.parametrize(
    ("null", "shuffle"), [("within_null", shuffled_within_documents), ("cross_null", shuffled_across_rows)]
)
@pytest.mark.parametrize("metric", [metrics.autocorrelation, metrics.kappa])
def test_nulls_of_the_archetypes_are_the_mean_of_a_thousand_shuffles(metric, null, shuffle):
    B, length = 20, 16
    starts_BL = np.broadcast_to((np.arange(length) == 0) | (np.arange(length) == 9), (B, length))
    sources = replace(archetypes(spread=0.5), topic_F=np.array([1, 1, 1, 0.4, 0.4, 1]), rate_F=np.full(6, 0.2))
    codes_BLF = fire(sources, starts_BL, np.random.default_rng(1))
    doc_BL = np.cumsum(starts_BL.ravel()).reshape(B, length)
    mask, doc = torch.ones(B, length, dtype=torch.bool), torch.from_numpy(doc_BL)
    expected_FK = getattr(metric(torch.from_numpy(codes_BLF), mask, doc, lags=(1, 3)), null).numpy()
    generator = np.random.default_rng(2)
    draws = np.stack(
        [
            metric(torch.from_numpy(shuffle(codes_BLF, doc_BL, generator)), mask, doc, lags=(1, 3)).real.numpy()
            for _ in range(1000)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - expected_FK) < 3.5 * standard_error + 1e-12).all()


# --- rescaling --------------------------------------------------------------------------------------------------------

SCALES = torch.tensor([0.25, 8.0, 64.0, 0.5, 2.0, 16.0])  # powers of two: no rounding


def rescaled_pair(**scales):
    """Results before and after rescaling latents."""
    starts_BL = np.zeros((40, 32), bool)
    codes_BLF = torch.from_numpy(fire(archetypes(spread=0.5), starts_BL, np.random.default_rng(4)))
    return [
        evaluate(sae, [batch_of(codes_BLF)], lags=(1, 4), bootstrap=8)
        for sae in (identity_sae(), identity_sae(**scales))
    ]


def test_rescaling_a_latent_changes_no_consistency_or_position_metric_but_smoothness():
    before, after = rescaled_pair(scale_F=SCALES)
    assert before["consistency"].pop("smoothness") != after["consistency"].pop("smoothness")
    assert before["consistency"] == after["consistency"]
    assert before["position"] == after["position"]
    for name, values in before["arrays"].items():
        np.testing.assert_array_equal(values, after["arrays"][name], err_msg=name)
    prefixes = ("ac", "kappa", "half_life", "run_length", "switching", "document_eta2", "eta2", "mi", "rate_position")
    names = [name for name in before["features"] if name.startswith(prefixes)]
    assert len(names) == 2 * 5 * 2 + 9
    for name in names:
        np.testing.assert_array_equal(before["features"][name], after["features"][name], err_msg=name)


def test_moving_scale_from_encoder_to_decoder_changes_nothing():
    before, after = rescaled_pair(scale_F=SCALES, decoder_scale_F=1 / SCALES)
    assert before["consistency"] == after["consistency"]  # smoothness too
    assert before["position"] == after["position"]
    np.testing.assert_array_equal(before["features"]["mean_activation"], after["features"]["mean_activation"])
