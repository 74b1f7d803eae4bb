"""What comes from strangers is data: nothing of it runs, leads elsewhere, or outgrows the machine."""

import ast
import json
import pickle
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from bad_input import at_most
from bad_models import Touch
from small_experiment import ROOT
from synthetic_run import write_synthetic_run
from tiny_models import save_tiny_model

from legato.common.errors import LegatoError, UsageError
from legato.common.files import sha256_json
from legato.common.safe_read import read_arrays, read_yaml
from legato.data.documents import load_documents
from legato.data.language_model import LanguageModel
from legato.interop.hub import from_pretrained
from legato.report.run_page import write_report
from legato.results.integrity import FORMAT, check_all
from legato.results.saved_run import SavedRun
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.formats.hub_download import download

UNPICKLES = {"distributed.py": "what the run's own ranks send each other, as torch.distributed does"}
SOURCES = sorted([*(ROOT / "legato").rglob("*.py"), ROOT / "experiment.py", ROOT / "plot.py"])


def calls(path: Path) -> list[tuple[str, dict[str, object], int]]:
    """(dotted name, constant keyword arguments, line) of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            found.append((ast.unparse(node.func), keywords, node.lineno))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_can_run(path):
    for name, keywords, line in calls(path):
        place = f"{path.name}:{line}: {name}"
        assert name not in ("eval", "exec", "os.system", "os.popen", "dill.load"), place
        assert name not in ("pickle.load", "pickle.loads") or path.name in UNPICKLES, place
        assert not keywords.get("shell"), place
        assert not keywords.get("allow_pickle"), place
        assert not keywords.get("trust_remote_code"), place
        assert name != "torch.load" or keywords.get("weights_only") is True, place
        assert name != "np.load" or keywords.get("allow_pickle") is False, place
        assert name not in ("yaml.full_load", "yaml.unsafe_load", "yaml.load_all"), place
        assert name != "yaml.load" or path.name == "safe_read.py", place


def test_a_configuration_holds_values_only(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"a: !!python/object/apply:builtins.open ['{tmp_path / 'ran'}', 'w']")
    with pytest.raises(LegatoError, match=r"config\.yaml is damaged"):
        read_yaml(path)
    path.write_text("a: [1, 2.5, true, null, 2026-11-22, text]")
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    assert not (tmp_path / "ran").exists()


def test_arrays_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([Touch(tmp_path / "ran")], dtype=object))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(LegatoError, match="is damaged"):
            read_arrays(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_the_code_that_a_model_brings_runs_only_where_it_is_asked_for(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "gpt2", pad_token_id=None)
    for name, kind in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps(content | {"auto_map": {kind: ["code.T", None][: 2 if "T" in kind else 1]}})
        )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    try:
        LanguageModel.load(str(folder))  # transformers' own class for the type does without it
    except UsageError as error:
        assert "cannot load the model" in str(error)  # noqa: PT017
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["..", "a/..", "../a", "a/../b", "a\\..\\b", ".hidden", "a/b/../../.."])
def test_names_of_the_hub_lead_nowhere_else(name, monkeypatch, tmp_path):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for load in (LanguageModel.load, SparseAutoencoder.load, lambda name: list(load_documents(name))):
        with pytest.raises(LegatoError):
            load(name)


@pytest.mark.parametrize("subfolder", ["..", "../../..", "a/../../b", "..\\.."])
def test_a_folder_of_a_repository_lies_in_it(subfolder):
    for load in (download, from_pretrained):
        with pytest.raises(UsageError, match="leads out of owner/name: name a folder in it"):
            load("owner/name", subfolder=subfolder)


@pytest.mark.parametrize("name", ["/dev/zero", "../../../../../../../dev/zero", "arrays/../../up"])
def test_checksums_of_what_is_not_in_the_run(tmp_path, name):
    def vouch_for(name):
        files = {name: "0" * 64}
        content = {"format": FORMAT, "sha256": sha256_json(files), "files": files}
        (tmp_path / "checksums.json").write_text(json.dumps(content))

    vouch_for(name)
    with at_most(5), pytest.raises(LegatoError, match="which is not in the run"):
        check_all(tmp_path)
    vouch_for("zero")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with at_most(5), pytest.raises(LegatoError, match="zero is missing"):
        check_all(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_text_that_outgrows_the_memory(tmp_path, monkeypatch, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "w3 w4 " * 1000
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [text] * 100}), tmp_path / name)  # 600 kB of text in a few
    elif name.endswith(".jsonl"):
        (tmp_path / name).write_text((json.dumps({"text": text}) + "\n") * 100)
    else:
        (tmp_path / name).write_text(text * 100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 500_000})())
    with pytest.raises(LegatoError, match=r"more text than fits into memory.*give a part"):
        list(load_documents(str(tmp_path / name)))


def test_arrays_and_tables_that_outgrow_the_memory(tmp_path, monkeypatch):
    run = write_synthetic_run(tmp_path / "run_1", named=(), latents=400)
    np.savez_compressed(run / "arrays" / "baseline.npz", position_matrix=np.zeros((1000, 1000)))
    opened = SavedRun.open(run)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 3_000})())
    for read in (lambda: opened.arrays("baseline"), lambda: opened.latent_column("baseline", "firing_rate")):
        with pytest.raises(LegatoError, match="open it on a larger machine"):
            read()


def test_a_page_shows_what_it_is_given_as_text(tmp_path):
    run = write_synthetic_run(tmp_path / "run_1", named=(), latents=20, context=8)
    hostile = "<img src=x onerror=alert(1)>"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["config"]["data"]["dataset"] = hostile
    config["environment"]["processor"] = f"</script>{hostile}"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics[hostile] = metrics["baseline"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(run).read_text()
    assert hostile not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_state_dict_is_read_without_running_it(tmp_path):
    torch.save({"W_enc": Touch(tmp_path / "ran")}, tmp_path / "ae.pt")
    with pytest.raises(LegatoError, match="holds more than tensors and was not opened"):
        SparseAutoencoder.load(tmp_path / "ae.pt")
    assert not (tmp_path / "ran").exists()
