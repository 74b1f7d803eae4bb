"""`legato evaluate` on a small random model: the numbers of a run come out again, and every mistake in one line."""

import json
from dataclasses import replace

import pytest
import torch
from small_experiment import write_corpus
from tiny_models import save_tiny_model

from legato.cli import main
from legato.common.errors import UsageError
from legato.experiment.evaluate_saved import EvaluateConfig, judged_arms, named
from legato.results.saved_run import SavedRun
from legato.sae.architectures import Hysteresis, JumpReLU
from legato.sae.autoencoder import SparseAutoencoder

WIDTH, LATENTS = 48, 64


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a corpus, a jumprelu SAE and one with state, neither of which says where it comes from."""
    folder = tmp_path_factory.mktemp("judged")
    save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    write_corpus(folder / "corpus")
    sae = random_sae()
    sae.save(folder / "plain")
    held = Hysteresis(release=0.4, threshold=sae.architecture.threshold)
    replace(sae, architecture=held).save(folder / "held")
    return folder


def random_sae(width=WIDTH, **details):
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(LATENTS, width, generator=generator), dim=-1)
    above_2 = JumpReLU(threshold=torch.full((LATENTS,), 2.0))
    return SparseAutoencoder(W_dec.T.clone(), torch.zeros(LATENTS), W_dec, torch.zeros(width), above_2, details)


def silent():
    return replace(random_sae(), architecture=JumpReLU(threshold=torch.full((LATENTS,), 1e9)))


@pytest.fixture
def evaluate(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))

    def run(*saes, code=0, pages=False, **options):
        for writer in () if pages else ("write_figures", "write_report"):  # slow, and tested on their own
            monkeypatch.setattr(f"legato.report.build.{writer}", lambda *_: None)
        options = {
            "model": place / "model",
            "layer": 2,
            "dataset": place / "corpus",
            "rows": 8,
            "ce_rows": 2,
            "context_length": 16,
            "out": tmp_path / "judged",
        } | options
        flags = [f"--{key}={value}" for key, value in options.items() if value is not None]
        capsys.readouterr()
        assert main(["evaluate", *map(str, saes), *flags]) == code
        return capsys.readouterr()

    return run


def failure(evaluate, *saes, code=2, **options):
    shown = evaluate(*saes, code=code, **options).err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown


def test_two_saes_side_by_side(evaluate, place, tmp_path):
    shown = evaluate(place / "plain", f"with_state={place / 'held'}", pages=True).out
    assert "plain" in shown
    assert "with_state" in shown
    out = tmp_path / "judged"
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["plain", "with_state"]
    for one in metrics.values():
        assert set(one) >= {"core", "consistency", "position", "redundancy", "specialisation", "offset", "training"}
        assert "position_shuffled" in one["consistency"]
        assert 0 < one["core"]["l0"] < LATENTS
        assert one["core"]["ce_loss_score"] is not None
    # The state keeps latents on, so more of them fire, and for longer.
    plain, held = (metrics[name]["core"]["l0"] for name in metrics)
    assert held > plain
    for name in metrics:
        for file in (f"features/{name}.parquet", f"arrays/{name}.npz", f"saes/{name}/cfg.json"):
            assert (out / file).is_file()
    assert len(list((out / "eval_results").iterdir())) == 2
    for file in ("notes.txt", "report.html", "final_info.json", "matched.json"):
        assert (out / file).is_file()
    run = SavedRun.open(out)
    assert [arm.role for arm in run.arms] == ["baseline", "named"]
    assert "There is only the baseline" not in (out / "notes.txt").read_text()


def test_the_numbers_of_a_run_come_out_again(small, evaluate, tmp_path):
    """On the documents that the run held out, from what the saved SAE says of itself."""
    assert small.run() == 0
    run = json.loads((small.out_dir / "metrics.json").read_text())["baseline"]
    shown = evaluate(
        small.out_dir / "saes" / "baseline", model=None, layer=None, dataset=None, context_length=None, held_out=0.3
    )
    assert "the 30% that training holds out" in shown.out
    again = json.loads((tmp_path / "judged" / "metrics.json").read_text())["baseline"]
    for section in ("core", "consistency", "position", "redundancy", "specialisation", "offset"):
        assert again[section] == run[section], section
    assert again["training"]["recipe"]["sparsity"] == run["training"]["recipe"]["sparsity"]
    assert again["training"]["training_steps"] == run["training"]["training_steps"]


def test_compare_takes_such_folders(evaluate, place, tmp_path, capsys):
    evaluate(place / "plain", out=tmp_path / "a")
    evaluate(place / "held", out=tmp_path / "b")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "m.json")]) == 0
    matched = json.loads((tmp_path / "m.json").read_text())
    assert list(matched["methods"]) == ["held"]
    assert "neither was swept" in matched["methods"]["held"]["at_l0"]["reasons"]["0"]
    assert main(["compare", str(tmp_path / "a")]) == 2  # one SAE
    # Another layer is no comparison.
    evaluate(place / "held", out=tmp_path / "c", layer=1)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "c")]) == 2
    assert "layer 1 instead of 2" in capsys.readouterr().err
    # Two SAEs of one name are two methods.
    (tmp_path / "other").mkdir()
    (place / "held").rename(tmp_path / "other" / "plain")
    try:
        evaluate(tmp_path / "other" / "plain", out=tmp_path / "d")
    finally:
        (tmp_path / "other" / "plain").rename(place / "held")
    both = ["compare", str(tmp_path / "a"), str(tmp_path / "d"), "--out", str(tmp_path / "n.json")]
    assert main(both) == 0
    assert list(json.loads((tmp_path / "n.json").read_text())["methods"]) == ["plain (d)"]


def test_a_run_and_a_judged_sae_compare_on_the_same_tokens(small, evaluate, place, tmp_path):
    assert small.run() == 0
    options = {"model": small.model, "dataset": small.corpus, "held_out": 0.3}
    evaluate(place / "plain", out=tmp_path / "a", **options)
    assert main(["compare", str(small.out_dir), str(tmp_path / "a"), "--out", str(tmp_path / "m.json")]) == 0
    assert list(json.loads((tmp_path / "m.json").read_text())["methods"]) == ["plain"]


def judged(*specifications, **saes):
    found = named(specifications)
    sources = {name: source for name, (source, _) in found.items()}
    stated = {name: said for name, (_, said) in found.items() if said}
    opened = {name: saes.get(name, random_sae()) for name in found}
    return judged_arms(EvaluateConfig(sources, stated=stated), opened)


def test_the_command_line_says_what_is_swept():
    arms = judged("mine=/a", "mine:k16=/b", "mine:seed1=/c", "theirs:k8=/d", "odd_k16=/e")
    assert [(arm.name, arm.role, arm.method, arm.group, arm.recipe["k"], arm.seed) for arm in arms.values()] == [
        ("mine", "baseline", "mine", "mine", None, 0),
        ("mine_k16", "sweep", "mine", "mine_k16", 16.0, 0),
        ("mine_seed1", "baseline", "mine", "mine", None, 1),
        # there is no `theirs` that it would be a sweep of
        ("theirs_k8", "named", "theirs_k8", "theirs_k8", 8.0, 0),
        ("odd_k16", "named", "odd_k16", "odd_k16", None, 0),  # a name is only a name
    ]
    assert arms["mine"].recipe["sources"] == ["/a", "/b", "/c"]
    assert [arm.role for arm in judged("a=/a", "baseline=/b").values()] == ["named", "baseline"]
    with pytest.raises(UsageError, match="'mine:k' is not NAME, NAME:k16, NAME:seed1 or NAME:k16:seed1"):
        named(["mine:k=/a"])
    with pytest.raises(UsageError, match="mine:seed1="):
        named(["mine=/a", "mine=/b"])


def test_an_sae_of_a_run_says_what_it_is():
    def of_run(**objective):
        return replace(random_sae(), details={"objective": objective})

    swept = of_run(role="sweep", method="legato", group="legato_k8", k=8, seed=3)
    main = of_run(role="named", method="legato", group="legato", k=16, seed=3)
    arms = judged("/run/saes/a", "/run/saes/b", a=main, b=swept)
    assert [(arm.name, arm.role, arm.method, arm.group, arm.seed) for arm in arms.values()] == [
        ("a", "baseline", "legato", "legato", 3),
        ("b", "sweep", "legato", "legato_k8", 3),
    ]
    # Two that say the same are two methods.
    assert [arm.method for arm in judged("x=/a", "/run/y", "/run/z", y=main, z=main).values()] == ["x", "y", "z"]
    # Of runs from before an SAE said its method: one recipe is one method.
    old = {"sparsity": {"type": "BatchTopK", "k": 16}, "k": 16, "seed": 0}
    older = of_run(**{**old, "sparsity": {"type": "BatchTopK", "k": 8}, "k": 8})
    arms = judged("/run/plain", "/run/plainer", plain=of_run(**old), plainer=older)
    assert [(arm.role, arm.method) for arm in arms.values()] == [("baseline", "plain"), ("sweep", "plain")]


def test_names(tmp_path):
    for run in ("run_1", "run_2"):
        (tmp_path / run / "x").mkdir(parents=True)
    same = [str(tmp_path / run / "x") for run in ("run_1", "run_2")]
    assert list(named(same)) == ["run_1_x", "run_2_x"]
    assert list(named([f"a={same[0]}", same[1], "org/name"])) == ["a", "x", "name"]


def test_what_the_sae_says(evaluate, place, tmp_path):
    """A TransformerLens hook in SAELens' metadata gives the layer: what enters layer 3 left layer 2."""
    random_sae().save(tmp_path / "hooked")
    (tmp_path / "hooked" / "legato.json").unlink()  # as another tool would leave it
    cfg = json.loads((tmp_path / "hooked" / "cfg.json").read_text())
    cfg["metadata"] |= {"hook_name": "blocks.3.hook_resid_pre", "model_name": str(place / "model")}
    (tmp_path / "hooked" / "cfg.json").write_text(json.dumps(cfg))
    evaluate(tmp_path / "hooked", model=None, layer=None)
    resolved = SavedRun.open(tmp_path / "judged").config["resolved"]
    assert (resolved["layer"], resolved["site"], resolved["module_path"]) == (2, "resid_post", "transformer.h.2")
    shown = failure(evaluate, tmp_path / "hooked", place / "plain", layer=None, out=tmp_path / "both")
    assert "plain does not say which layer it reads" in shown


def test_mistakes(evaluate, place, tmp_path):
    plain = place / "plain"
    assert "does not say which layer it reads: add --layer" in failure(evaluate, plain, layer=None)
    assert "does not say which model it reads: add --model" in failure(evaluate, plain, model=None)
    random_sae(width=20).save(tmp_path / "narrow")
    assert "takes activations of width 20, those of" in failure(evaluate, tmp_path / "narrow")
    assert "layer 9" in failure(evaluate, plain, layer=9)
    assert "--held_out 1.5" in failure(evaluate, plain, held_out=1.5)
    assert "unknown site 'nowhere': give resid_post" in failure(evaluate, plain, site="nowhere")
    assert "--context_length 100000 is longer" in failure(evaluate, plain, context_length=100_000)
    assert "no such file" in failure(evaluate, plain, dataset=tmp_path / "none.txt")
    assert "two SAEs have the same name" in failure(evaluate, f"a={plain}", f"a={place / 'held'}")
    assert "cannot name an SAE" in failure(evaluate, f"a b={plain}")
    random_sae(layer=1, model="one").save(tmp_path / "one")
    random_sae(layer=3, model="two").save(tmp_path / "two")
    both = tmp_path / "one", tmp_path / "two"
    assert "one reads layer 1 (resid_post), two layer 3 (resid_post)" in failure(evaluate, *both, layer=None)
    assert "one reads one, two two" in failure(evaluate, *both, model=None)
    assert not (tmp_path / "judged").exists()
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "other.txt").write_text("")
    assert "is not empty and holds no run" in failure(evaluate, plain)


def test_an_sae_that_cannot_be_judged_leaves_the_others(evaluate, place, tmp_path):
    silent().save(tmp_path / "silent")
    assert "1 of 2 SAEs cannot be judged (silent: no latent fires" in failure(
        evaluate, place / "plain", tmp_path / "silent", code=1
    )
    assert list(json.loads((tmp_path / "judged" / "metrics.json").read_text())) == ["plain"]


def test_what_was_cut_off_goes_on(evaluate, place, tmp_path, monkeypatch):
    sae, whole = tmp_path / "sae", tmp_path / "whole"
    random_sae().save(sae)
    evaluate(sae, place / "held", out=whole)

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("legato.experiment.evaluate._offsets", cut)
        shown = evaluate(sae, place / "held", code=130).err
    assert shown == "error: interrupted; the same command goes on where it stopped\n"
    assert not (tmp_path / "judged" / "metrics.json").exists()
    # Another SAE at the same place is another run.
    random_sae(note="changed").save(sae)
    assert "holds a run with judged.sha256.sae" in failure(evaluate, sae, place / "held")
    random_sae().save(sae)
    with monkeypatch.context() as patch:
        patch.setattr("legato.experiment.evaluate.evaluate", lambda *_, **__: pytest.fail("judged again"))
        evaluate(sae, place / "held")
    for file in ("metrics.json", "final_info.json", "features/held.parquet"):
        assert (tmp_path / "judged" / file).read_bytes() == (whole / file).read_bytes()
    assert not (tmp_path / "judged" / "checkpoint").exists()
    assert "holds a finished run" in failure(evaluate, sae, place / "held")


def test_nothing_that_can_be_judged_is_said_again(evaluate, place, tmp_path):
    silent().save(tmp_path / "silent")
    for _ in range(2):
        shown = failure(evaluate, tmp_path / "silent", code=1)
        assert "no SAE could be judged: silent: no latent fires" in shown
    assert not (tmp_path / "judged" / "metrics.json").exists()
