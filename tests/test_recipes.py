"""The names of --temporal: what each arm is, how names combine, which arms are swept."""

import pytest

from legato.config import NAMED_ARMS, ExperimentConfig
from legato.consistency_losses import Contrastive, WindowVariance
from legato.errors import UsageError
from legato.recipes import MATRYOSHKA, arms, recipe
from legato.sparsity import BatchTopK, Hysteresis, TopK


def bank(temporal, **options):
    config = ExperimentConfig.from_options(
        "smoke", {"temporal": temporal, "ablation": False, "release": 0.5, **options}
    )
    return {arm.name: arm for arm in arms(config, d_in=48)}


def test_every_name_is_an_arm_of_its_own_that_differs_from_the_baseline():
    made = bank(NAMED_ARMS)
    assert len(made) == 1 + len(NAMED_ARMS)
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
    assert both.sparsity == Hysteresis(16, release=0.5)
    assert [type(term) for term in both.terms] == [Contrastive]
    assert not both.shuffle_positions
    shuffled = made["hysteresis_shuffled"]
    assert (shuffled.sparsity, shuffled.terms, shuffled.shuffle_positions) == (both.sparsity, (), True)
    many = made["matryoshka_topk_window_variance_slowness"]
    assert (many.sparsity, many.groups) == (TopK(16), MATRYOSHKA)
    assert [term.name for term in many.terms] == ["window_variance", "slowness"]
    assert isinstance(many.terms[0], WindowVariance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal": ("hysteresis+slow",)}, "'slow' is unknown: choose one of"),
        ({"temporal": ("hysteresis+topk",)}, "asks for hysteresis and topk at once: choose one"),
        ({"temporal": ("tsae+matryoshka",)}, "asks for tsae and matryoshka at once"),
        ({"temporal": ("slowness+slowness",)}, "names a part twice"),
        ({"temporal": ("topk",), "sweep_k": (8,), "sweep_arms": ("hysteresis",)}, "choose one of topk"),
        ({"temporal": ("topk",), "sweep_arms": ("topk",)}, "add --sweep_k"),
        ({"temporal": ("relu",), "sweep_k": (8,), "sweep_arms": ("relu",)}, "relu: it has no k to sweep"),
        ({"controls": ("ema", "nothing")}, "--controls 'nothing' is unknown"),
        ({"l1": 0.0}, "makes nothing sparse"),
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
    assert made["baseline_k8"].sparsity == BatchTopK(8)
    assert made["hysteresis_k24_seed7"].sparsity == Hysteresis(24, release=0.5)
    assert {arm.seed for name, arm in made.items() if name.endswith("_seed7")} == {7}
