"""What earlier versions wrote opens and is vouched for: every file here is laid out by hand as they laid it out."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import random_sae
from safetensors.torch import load_file, save_file
from test_activations import CountingModel, token_set

from legato.common.checksummed import read_sealed, verify_checksummed
from legato.common.errors import LegatoError
from legato.common.files import cached_folder
from legato.data import store_manifest
from legato.data.activations import ActivationStream
from legato.data.harvest import harvest
from legato.data.store import ActivationStore
from legato.results.integrity import check_all
from legato.sae.autoencoder import SparseAutoencoder, export

ROWS_PER_SHARD, LENGTH, WIDTH = 5, 4, 6


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard_of(tensors: dict[str, torch.Tensor]) -> bytes:
    """tokens, doc, acts, mask one after the other behind a header that ends at a multiple of 64 bytes."""
    names = {torch.int32: "I32", torch.float32: "F32", torch.bool: "BOOL"}
    entries, body = {}, b""
    for name in ("tokens", "doc", "acts", "mask"):
        tensor = tensors[name]
        start, body = len(body), body + tensor.numpy().tobytes()
        entries[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, len(body)],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % 64)
    return len(header).to_bytes(8, "little") + header + body


@pytest.fixture
def earlier_store(tmp_path, monkeypatch) -> Path:
    """23 rows in 5 shards, as `harvest` wrote them before shards were safetensors' own."""
    monkeypatch.setattr(store_manifest, "SHARD_BYTES", ROWS_PER_SHARD * LENGTH * (4 * WIDTH + 9) + 1)
    stream = ActivationStream(CountingModel(), token_set(), layer=3)
    folder = tmp_path / "store"
    folder.mkdir()
    shards = {}
    for number, first in enumerate(range(0, 23, ROWS_PER_SHARD)):
        batch, _ = stream.compute(torch.arange(first, min(first + ROWS_PER_SHARD, 23)).numpy())
        tensors = {"tokens": batch.tokens_BL.int(), "doc": batch.doc_BL, "acts": batch.acts_BLD, "mask": batch.mask_BL}
        content = shard_of(tensors)
        (folder / f"shard_0000{number}.safetensors").write_bytes(content)
        counts = {"n_valid": int(batch.mask_BL.sum()), "n_outliers": 0}
        shards[f"shard_0000{number}.safetensors"] = {"sha256": sha256(content), **counts}
    manifest = {
        "format": "legato-activations-1",
        "key": stream.key(),
        "n_rows": 23,
        "context_length": LENGTH,
        "d_in": WIDTH,
        "dtype": "F32",
        "rows_per_shard": ROWS_PER_SHARD,
        "provenance": stream.provenance(),
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": sha256_of(manifest)}, indent=1))
    return folder


def assert_reads_as_computed(store: ActivationStore) -> None:
    rows = torch.randperm(23, generator=torch.Generator().manual_seed(0)).numpy()
    found, (computed, _) = store.read_rows(rows), ActivationStream(CountingModel(), token_set(), layer=3).compute(rows)
    for name in ("acts_BLD", "mask_BL", "doc_BL", "tokens_BL"):
        assert torch.equal(getattr(found, name), getattr(computed, name)), name
    assert torch.equal(store.first_tokens(12), token_set().tokens_BL[:12].long())


def test_a_store_opens_and_is_used_again(earlier_store):
    assert_reads_as_computed(ActivationStore.open(earlier_store))
    model = CountingModel()
    harvest(model, token_set(), layer=3, path=earlier_store)
    assert model.rows == 0
    flip_a_bit(earlier_store / "shard_00001.safetensors")
    with pytest.raises(LegatoError, match=r"shard_00001\.safetensors is missing or damaged"):
        ActivationStore.open(earlier_store)


def test_a_store_that_was_cut_off_is_gone_on_with(earlier_store):
    """The shard made anew has its tensors in another order than those beside it."""
    (earlier_store / "shard_00003.safetensors").rename(earlier_store / "shard_00003.partial")
    kept = {path: path.read_bytes() for path in earlier_store.glob("*.safetensors")}
    assert len(kept) == 4
    assert_reads_as_computed(harvest(CountingModel(), token_set(), layer=3, path=earlier_store))
    assert {path: path.read_bytes() for path in kept} == kept
    assert_reads_as_computed(ActivationStore.open(earlier_store))
    assert not list(earlier_store.glob("*.partial"))


def test_a_checkpoint_opens(tmp_path):
    (tmp_path / "baseline").mkdir()
    tensors = {"baseline/whole": {"w": torch.arange(3.0), "a": torch.ones(2)}, "rows": {"/x": torch.zeros(1)}}
    files = {}
    for name, named in tensors.items():
        save_file(named, tmp_path / f"{name}.safetensors")
        digest = sha256((tmp_path / f"{name}.safetensors").read_bytes())
        files[name] = {"sha256": digest, "tensors": list(named)}
    del files["baseline/whole"]["tensors"]  # as it was noted of files in folders
    body = {"kind": "legato-checkpoint-2", "files": files, "content": {"step": 3}}
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"sha256": sha256_of(body), **body}))
    assert verify_checksummed(path, kind="legato-checkpoint-2") == {"step": 3}
    content, read = read_sealed(path, kind="legato-checkpoint-2")
    assert content == {"step": 3}
    for name, named in tensors.items():
        assert read[name].keys() == named.keys()
        assert all(torch.equal(read[name][key], tensor) for key, tensor in named.items())
    flip_a_bit(tmp_path / "baseline" / "whole.safetensors")
    with pytest.raises(LegatoError, match=r"whole\.safetensors is missing or damaged"):
        verify_checksummed(path, kind="legato-checkpoint-2")


def test_a_run_is_vouched_for(tmp_path):
    (tmp_path / "saes").mkdir()
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "saes" / "a.bin").write_bytes(b"abc")
    files = {"metrics.json": sha256(b"{}"), "saes/a.bin": sha256(b"abc")}
    content = {"format": "legato-run-1", "sha256": sha256_of(files), "files": files}
    (tmp_path / "checksums.json").write_text(json.dumps(content, indent=1))
    assert check_all(tmp_path) == 2
    flip_a_bit(tmp_path / "saes" / "a.bin")
    with pytest.raises(LegatoError, match=r"a\.bin is damaged or was changed after the run"):
        check_all(tmp_path)


def test_a_cached_model_is_found(tmp_path):
    (tmp_path / "m" / "tokenizer").mkdir(parents=True)
    (tmp_path / "m" / "tokenizer" / "t.json").write_text("{}")
    (tmp_path / "m" / "model.bin").write_bytes(b"abc")
    checksums = {"model.bin": sha256(b"abc"), "tokenizer/t.json": sha256(b"{}")}
    (tmp_path / "m" / "checksums.json").write_text(json.dumps(checksums, indent=1))
    assert cached_folder(tmp_path / "m", pytest.fail) == tmp_path / "m"


def test_an_sae_folder_and_an_sae_in_one_file_open(tmp_path):
    sae = random_sae(details={"layer": 9})
    folder = sae.save(tmp_path / "sae")
    legato = {key: value for key, value in _json(folder / "legato.json").items() if key not in ("format", "sha256")}
    sums = {"legato.json": sha256_of(legato)}
    sums |= {name: sha256((folder / name).read_bytes()) for name in ("cfg.json", "sae_weights.safetensors")}
    (folder / "legato.json").write_text(json.dumps({**legato, "format": "legato-sae-1", "sha256": sums}))
    assert SparseAutoencoder.load(folder).details == sae.details
    flip_a_bit(folder / "sae_weights.safetensors")
    with pytest.raises(LegatoError, match=r"sae_weights\.safetensors is damaged"):
        SparseAutoencoder.load(folder)

    file = export(sae, tmp_path / "one.safetensors", "safetensors")
    tensors = load_file(file)
    header = {"architecture": sae.architecture.name, "details": sae.details}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    metadata = {"legato": json.dumps({**header, "sha256": digest.hexdigest()})}
    save_file(tensors, tmp_path / "earlier.safetensors", metadata=metadata)
    assert SparseAutoencoder.load(tmp_path / "earlier.safetensors").details == sae.details


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
