"""The names of --temporal: what each arm is, how names combine, which arms are swept."""

import pytest

from legato.common.errors import UsageError
from legato.experiment.arms import planned_arms, recipe
from legato.experiment.config import ExperimentConfig
from legato.experiment.recipes import LEGATO_TERM, MATRYOSHKA, RECIPES, names_of
from legato.sae.architectures import BatchTopK, Hysteresis, TopK
from legato.training.losses import Contrastive, WindowVariance


def planned(temporal, **options):
    config = ExperimentConfig.from_options(
        "smoke", {"temporal": temporal, "ablation": False, "release": 0.5, **options}
    )
    return planned_arms(config, d_in=48)


def bank(temporal, **options):
    return {one.sae.name: one.sae for one in planned(temporal, **options)}


def test_every_name_is_an_arm_of_its_own_that_differs_from_the_baseline():
    made = bank(tuple(RECIPES))
    assert len(made) == 1 + len(tuple(RECIPES))
    baseline = {key: value for key, value in recipe(made.pop("baseline")).items() if key != "seed"}
    for arm in made.values():
        assert {key: value for key, value in recipe(arm).items() if key != "seed"} != baseline


def test_names_combine():
    made = bank(("hysteresis+contrastive", "hysteresis+shuffled", "matryoshka+topk+window_variance+slowness"))
    assert list(made) == [
        "baseline",
        "hysteresis_contrastive",
        "hysteresis_shuffled",
        "matryoshka_topk_window_variance_slowness",
    ]
    both = made["hysteresis_contrastive"]
    assert both.architecture == Hysteresis(16, release=0.5)
    assert [type(term) for term in both.terms] == [Contrastive]
    assert not both.shuffle_positions
    shuffled = made["hysteresis_shuffled"]
    assert (shuffled.architecture, shuffled.terms, shuffled.shuffle_positions) == (both.architecture, (), True)
    many = made["matryoshka_topk_window_variance_slowness"]
    assert (many.architecture, many.groups) == (TopK(16), MATRYOSHKA)
    assert [term.name for term in many.terms] == ["window_variance", "slowness"]
    assert isinstance(many.terms[0], WindowVariance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal": ("hysteresis+slow",)}, "hysteresis.slow is unknown: choose one of"),
        ({"temporal": ("hysteresis+topk",)}, "asks for hysteresis and topk at once: choose one"),
        ({"temporal": ("tsae+matryoshka",)}, "asks for tsae and matryoshka at once"),
        ({"temporal": ("slowness+slowness",)}, "names a part twice"),
        ({"temporal": ("topk",), "sweep_k": (8,), "sweep_arms": ("hysteresis",)}, "choose of --temporal topk"),
        ({"temporal": ("topk",), "sweep_arms": ("topk",)}, "add --sweep_k"),
        ({"temporal": ("relu",), "sweep_k": (8,), "sweep_arms": ("relu",)}, "relu: it has no k to sweep"),
        ({"controls": ("ema", "nothing")}, "--controls nothing is unknown"),
        ({"l1": 0.0}, "--l1 0.0 must be greater than 0"),
        ({"term_warmup": 1.5}, "--term_warmup 1.5 must be less than or equal to 1"),
        ({"slow_fraction": 0.0}, "--slow_fraction 0.0 must be greater than 0"),
        ({"lags": (1, 1)}, "--lags 1,1 must be different values"),
        ({"lags": (0,)}, "--lags 0 must be greater than or equal to 1"),
        ({"temperature": 0.0}, "--temperature 0.0 must be greater than 0"),
    ],
)
def test_names_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        bank(**{"temporal": (), **options})


def test_sweeps_of_the_baseline_and_of_named_arms_for_every_seed():
    made = bank(("hysteresis", "topk"), sweep_k=(8, 24), sweep_arms=("hysteresis",), seeds=(0, 7))
    names = [
        *("baseline", "baseline_k8", "baseline_k24"),
        *("hysteresis", "hysteresis_k8", "hysteresis_k24", "topk"),
    ]
    assert list(made) == [*names, *(f"{name}_seed7" for name in names)]
    assert made["baseline_k8"].architecture == BatchTopK(8)
    assert made["hysteresis_k24_seed7"].architecture == Hysteresis(24, release=0.5)
    assert {arm.seed for name, arm in made.items() if name.endswith("_seed7")} == {7}


def test_what_an_arm_is_does_not_depend_on_its_name():
    """Two digits of a name used to make the named arm a member of the grid: window_variance_w2_c0.15 begins like
    window_variance_w2_c0.1."""
    options = {"window": 2, "ablation": True, "grid": "2,4x0.1,1", "seeds": (3, 0)}
    made = planned(("window_variance", "legato"), coefficient=0.15, sweep_k=(8,), sweep_arms=("legato",), **options)
    arms = {one.arm.name: one.arm for one in made}
    assert all(one.arm.name == one.sae.name and one.arm.seed == one.sae.seed for one in made)
    roles = {name: (arm.role, arm.in_grid) for name, arm in arms.items() if arm.seed == 3}
    assert roles == {
        "baseline": ("baseline", False),
        "baseline_k8": ("sweep", False),
        "window_variance_w2_c0.15": ("named", False),
        "legato": ("named", False),
        "legato_k8": ("sweep", False),
        **{f"window_variance_w{w}_c{c:g}": ("grid", True) for w in (2, 4) for c in (0.1, 1)},
    }
    swept = arms["legato_k8_seed0"]
    assert (swept.method, swept.group, swept.seed, swept.role) == ("legato", "legato_k8", 0, "sweep")
    assert swept.saved().items() >= {"method": "legato", "group": "legato_k8", "role": "sweep", "k": 8}.items()
    # One that is both: asked for by name, and a point of the grid.
    both = planned(("window_variance",), coefficient=0.1, **options)
    found = [one.arm for one in both if one.arm.group == "window_variance_w2_c0.1"]
    assert [(arm.role, arm.in_grid) for arm in found] == [("named", True)] * 2


def test_every_option_of_the_temporal_terms_reaches_them_and_is_saved():
    options = {
        **{"window": 16, "coefficient": 0.7, "term_warmup": 0.25, "slow_fraction": 0.2},
        **{"lags": (2, 5), "temperature": 0.3, "seeds": (0, 1)},
    }
    made = bank((*names_of("term"), "legato", "tsae"), ablation=True, grid="4x0.1", **options)
    for name, arm in made.items():
        saved = recipe(arm)
        assert saved["term_warmup"] == (0.25 if arm.terms else None), name
        for term, kept in zip(arm.terms, saved["terms"], strict=True):
            assert kept == vars(term)
    for suffix in ("", "_seed1"):
        own = {name: recipe(made[f"{name}{suffix}"])["terms"][0] for name in ("contrastive", "slowness", "fused_lasso")}
        shared = {"coefficient": 0.7, "slow_fraction": 0.2}
        assert shared.items() <= own["fused_lasso"].items()
        assert {**shared, "window": 16}.items() <= own["slowness"].items()
        assert {**shared, "lags": (2, 5), "temperature": 0.3}.items() <= own["contrastive"].items()
    assert recipe(made["window_variance_w4_c0.1"])["terms"][0]["slow_fraction"] == 0.2
    # What is fixed by name stays what it is: our own arm and the published objective.
    assert made["legato"].terms == (LEGATO_TERM,)
    assert made["tsae"].terms[0].slow_fraction == 0.2
    assert made["tsae"].terms[0].temperature == 48


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_coefficients_grow_over_their_warm_up(warmup):
    arm = bank(("slowness",), term_warmup=warmup)["slowness"]
    scales = [arm.term_scale_at(step, 8) for step in range(8)]
    # a linear rise over warmup * 8 steps, full from its last step on
    expected = {0.0: [1.0] * 8, 0.5: [0.25, 0.5, 0.75, *[1.0] * 5], 1.0: [n / 8 for n in range(1, 9)]}
    assert scales == pytest.approx(expected[warmup])
