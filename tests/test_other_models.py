"""experiment.py on models whose layers, logits or dtypes are not those of the common ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from small_experiment import SmallExperiment, without_pages
from tiny_models import small_network, tiny_tokenizer


@pytest.fixture(autouse=True)
def only_numbers(monkeypatch):
    without_pages(monkeypatch)


def on(small: SmallExperiment, folder: Path, model_type: str, **overrides: object) -> SmallExperiment:
    small_network(model_type, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return replace(small, model=folder)


def metrics(small: SmallExperiment) -> dict:
    return json.loads((small.out_dir / "metrics.json").read_text())["baseline"]


def test_a_model_that_cannot_be_spliced_is_refused_before_the_harvest(small, tmp_path, capsys):
    other = on(small, tmp_path / "model", "modernbert-decoder")
    assert other.run() == 2
    shown = capsys.readouterr()
    assert "cannot be spliced" in shown.err
    assert "--ce_rows 0" in shown.err
    assert "harvest" not in shown.out
    assert other.run("--ce_rows=0") == 0
    found = metrics(other)
    assert 0 < found["core"]["fvu"] < 1.5
    assert "ce_loss_score" not in found["core"]


@pytest.mark.parametrize(
    ("model_type", "flags", "width"),
    [
        ("bloom", ["--site=mlp_out", "--layer=2"], 48),
        ("gemma2", ["--site=attn_z"], 64),
        ("llama", ["--site=mlp.down_proj:input"], 80),
    ],
)
def test_other_places_are_read_and_spliced(small, tmp_path, model_type, flags, width):
    other = on(small, tmp_path / "model", model_type)
    assert other.run(*flags) == 0
    found = metrics(other)
    assert 0 < found["core"]["fvu"] < 1.5
    assert "ce_loss_score" in found["core"]
    cfg = json.loads((other.out_dir / "saes/baseline/cfg.json").read_text())
    assert cfg["d_in"] == width


def test_a_store_holds_what_the_layer_puts_out(small, tmp_path, monkeypatch):
    """Mamba in bfloat16 keeps its residual stream in float32."""
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    other = on(small, tmp_path / "model", "mamba", residual_in_fp32=True)
    for out_dir in ("first", "second"):  # the second takes the store of the first
        assert replace(other, out_dir=tmp_path / out_dir).run("--dtype=bfloat16") == 0
    shards = [*(tmp_path / "cache/activations").rglob("*.safetensors")]
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.get_slice("acts").get_dtype() == "F32"
    assert (
        len(
            {
                json.dumps(json.loads((tmp_path / n / "metrics.json").read_text())["baseline"]["core"])
                for n in ("first", "second")
            }
        )
        == 1
    )
