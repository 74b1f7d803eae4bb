"""Legato's SAEs in sae-bench itself; skips where sae-bench is not installed."""

import json

import pytest
import torch
from small_experiment import write_corpus
from tiny_models import save_tiny_model, tiny_tokens

from legato.cli import main
from legato.common.errors import UsageError
from legato.interop import saebench_evals
from legato.sae.architectures import architecture_named
from legato.sae.autoencoder import SparseAutoencoder

# sae-bench and what it imports warn of their own deprecations and of small data sets.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

D, F = 48, 64


def an_sae(architecture="hysteresis", norm=0.5):
    generator = torch.Generator().manual_seed(0)
    W_dec = norm * torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=-1)
    kind = architecture_named(architecture).of({"release": 0.4}, {"threshold": torch.full((F,), 1.0)})
    return SparseAutoencoder(W_dec.T.clone(), torch.full((F,), 0.1), W_dec, torch.ones(D), kind)


def test_what_is_absent_is_named(monkeypatch, tmp_path):
    """Before anything is loaded: no sae-bench is needed for that."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)

    def lacking(name, model="gemma-2-2b", absent=lambda dataset: None):
        with pytest.raises(UsageError) as raised:
            saebench_evals.check_needs(name, model, absent)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "set OPENAI_API_KEY" in lacking("autointerp")
    assert "instruction-tuned" in lacking("unlearning")
    assert "bio-forget-corpus.jsonl" in lacking("unlearning", "gemma-2-2b-it")
    offline = {"codeparrot/github-code": "offline"}
    assert "codeparrot/github-code from the hub, which is not available (offline)" in lacking(
        "sparse_probing", absent=offline.get
    )
    saebench_evals.check_needs("absorption", "pythia-70m-deduped", offline.get)


def test_without_sae_bench_the_command_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("legato.experiment.exchange.find_spec", lambda name: None)
    assert main(["saebench", "anywhere"]) == 2
    assert "pip install legato-sae sae-bench" in capsys.readouterr().err


@pytest.fixture(scope="module")
def wrapper():
    pytest.importorskip("sae_bench", reason="needs sae-bench, which has an environment of its own")
    return pytest.importorskip("legato.interop.saebench_wrapper")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    write_corpus(folder / "corpus", documents=60)
    an_sae().save(folder / "held")  # decoder rows of norm 1/2
    return folder


@pytest.mark.parametrize("architecture", ["jumprelu", "hysteresis"])
def test_codes_and_reconstruction_are_the_sae_s(wrapper, architecture):
    sae = an_sae(architecture)
    wrapped = wrapper.LegatoSAE(sae, "local", 2)
    acts_BLD = torch.randn(3, 10, D, generator=torch.Generator().manual_seed(1)) * 3
    assert torch.allclose(wrapped(acts_BLD), sae(acts_BLD), atol=1e-5)
    assert torch.allclose(wrapped.encode(acts_BLD), sae.encode(acts_BLD) * 0.5, atol=1e-6)
    assert torch.allclose(wrapped.W_dec.norm(dim=-1), torch.ones(F))
    assert wrapped.check_decoder_norms()
    # Loose activations have no order: each is a sequence of its own.
    assert torch.equal(wrapped.encode(acts_BLD[:, 0]), wrapped.encode(acts_BLD[:, :1])[:, 0])
    assert wrapped.cfg.hook_name == "blocks.2.hook_resid_post"


def test_it_knows_where_documents_end_in_the_rows_of_the_model(wrapper):
    sae, model = an_sae(), torch.nn.Identity()
    wrapped = wrapper.LegatoSAE(sae, "local", 2)
    wrapped.follow(model, [1])
    acts_BLD = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1)) * 3
    tokens_BL = tiny_tokens(2, 8)
    tokens_BL[0, 4] = 1
    model(tokens_BL)
    special_BL = tokens_BL == 1
    expected = sae.encode(acts_BLD, ~special_BL, special_BL.int().cumsum(1))
    assert torch.allclose(wrapped.encode(acts_BLD), expected * 0.5, atol=1e-6)
    assert not torch.allclose(expected, sae.encode(acts_BLD))
    # Activations of other rows are taken as they are.
    assert torch.allclose(wrapped.encode(acts_BLD[:1]), sae.encode(acts_BLD[:1]) * 0.5, atol=1e-6)


def test_core_agrees_with_legato_s_own_file(wrapper, place, tmp_path, monkeypatch, capsys):
    """The same SAE with state, model, text and rows: sae-bench's numbers, and those `legato evaluate` writes."""
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    for writer in ("write_figures", "write_report"):
        monkeypatch.setattr(f"legato.report.build.{writer}", lambda *_: None)
    shared = [str(place / "held"), f"--model={place / 'model'}", "--layer=2", f"--dataset={place / 'corpus'}"]
    # 27 * 24 = 648 text tokens: ten documents of 60, each two rows of 23 and one of 14, and 48 of the next, which are
    # two rows and two tokens that fit beside 14 others: 32 rows, two whole batches.
    shared += ["--rows=27", "--context_length=24", "--dtype=float32"]
    assert main(["saebench", *shared, f"--out={tmp_path}"]) == 0, capsys.readouterr().err
    assert main(["evaluate", *shared, "--ce_rows=32", f"--out={tmp_path / 'judged'}"]) == 0, capsys.readouterr().err
    theirs = json.loads((tmp_path / "legato_held_eval_results.json").read_text())
    ours = json.loads(next((tmp_path / "judged" / "eval_results").iterdir()).read_text())
    assert theirs["eval_result_metrics"]["token_stats"]["total_tokens_eval_reconstruction"] == 32 * 24
    for category, values in theirs["eval_result_metrics"].items():
        for name, value in values.items():
            assert ours["eval_result_metrics"][category][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    for one, other in zip(ours["eval_result_details"], theirs["eval_result_details"], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_mistakes(wrapper, place, tmp_path, capsys):
    def error(*flags):
        assert main(["saebench", str(place / "held"), *map(str, flags), f"--out={tmp_path}"]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        return shown

    model = f"--model={place / 'model'}"
    assert "add --model" in error("--layer=2")
    assert "add --layer" in error(model)
    assert "TransformerLens' names" in error(model, "--layer=2", "--eval=absorption")
    assert "in batches of 16" in error(
        model, "--layer=2", f"--dataset={place / 'corpus'}", "--rows=4", "--context_length=24"
    )
