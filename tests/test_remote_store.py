"""Activation stores at fsspec URLs: put there once, opened from another machine, damage noticed."""

import fsspec
import pytest
import torch
from tiny_models import save_tiny_model

from legato.common.errors import LegatoError, UsageError
from legato.data.documents import Document
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore
from legato.data.tokens import tokenise


@pytest.fixture
def model(tmp_path):
    return LanguageModel.load(str(save_tiny_model(tmp_path / "model", "gpt2", pad_token_id=None)))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that goes to another machine: a cache of its own."""

    def go_to(name):
        monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / name))

    go_to("first")
    monkeypatch.setattr("legato.data.store_manifest.SHARD_BYTES", 20_000)  # several shards
    yield go_to
    fsspec.filesystem("memory").store.clear()


def some_tokens(model, start=3):
    documents = [Document(" ".join(f"w{(start + n + m) % 90 + 3}" for m in range(60)), str(n)) for n in range(12)]
    return tokenise(documents, model.tokenizer, context_length=16)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return "memory://bucket/acts" if request.param == "memory" else f"file://{tmp_path}/bucket/acts"


def test_a_store_is_put_at_a_url_and_opened_elsewhere(model, machine, url, monkeypatch):
    tokens = some_tokens(model)
    store = harvest(model, tokens, layer=2, path=url)
    files, root = fsspec.core.url_to_fs(url)
    names = {path.rpartition("/")[2] for path in files.ls(root, detail=False)}
    assert "manifest.json" in names
    assert len(names) > 2

    machine("second")
    there = ActivationStore.open(url)
    rows = list(range(len(tokens)))
    assert torch.equal(there.read_rows(rows).acts_BLD, store.read_rows(rows).acts_BLD)
    # The same activations again: nothing is computed.
    monkeypatch.setattr(LanguageModel, "activations", None)
    assert harvest(model, tokens, layer=2, path=url).n_valid == store.n_valid


def test_what_is_here_already_is_not_brought_again(model, machine, url, monkeypatch):
    harvest(model, some_tokens(model), layer=2, path=url)
    machine("second")
    store = ActivationStore.open(url)
    (store.path / "shard_00001.safetensors").write_bytes(b"damaged")
    files, _ = fsspec.core.url_to_fs(url)
    brought = []
    get_file = type(files).get_file
    monkeypatch.setattr(type(files), "get_file", lambda *a, **k: brought.append(a[1]) or get_file(*a, **k))
    ActivationStore.open(url)
    assert [path.rpartition("/")[2] for path in brought] == ["manifest.json", "shard_00001.safetensors"]


def test_mistakes(model, machine, url):
    with pytest.raises(UsageError, match=r"holds no activations: there is no manifest\.json"):
        ActivationStore.open(url)
    with pytest.raises(UsageError, match="cannot be used: "):
        ActivationStore.open("nowhere://bucket/acts")
    harvest(model, some_tokens(model), layer=2, path=url)
    with pytest.raises(UsageError, match="holds other activations"):
        harvest(model, some_tokens(model, start=40), layer=2, path=url)
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/shard_00000.safetensors", b"damaged")
    machine("second")
    with pytest.raises(LegatoError, match=r"shard_00000\.safetensors is damaged: harvest again"):
        ActivationStore.open(url)
