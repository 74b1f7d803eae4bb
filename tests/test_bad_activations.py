"""Bad stores and batches of activations, each where a person would open it: one line that names what is wrong, or the
bad shard made anew; no hang, no result."""

import shutil
from pathlib import Path

import pytest
import torch
from bad_activations import BATCHES, STORES, BadStore, set_number, sound_batch
from bad_input import at_most, random_sae
from tiny_models import save_tiny_model, tiny_tokenizer

import legato
from legato.common.errors import LegatoError
from legato.data.activations import ActivationBatch
from legato.data.documents import Document
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore
from legato.data.tokens import TokenSet, tokenise

SECONDS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", pad_token_id=None)
    return LanguageModel.load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    words = [Document(" ".join(f"w{3 + (7 * n + m) % 90}" for m in range(30)), str(n)) for n in range(10)]
    return tokenise(words, tiny_tokenizer(), context_length=16)


@pytest.fixture(scope="module")
def sound(model, tokens, tmp_path_factory) -> Path:
    """A store of 3 shards, the last one shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("legato.data.store_manifest.SHARD_BYTES", 8 * 16 * (48 * 4 + 9))
        store = harvest(model, tokens, layer=1, path=tmp_path_factory.mktemp("sound") / "store")
    assert len(list(store.path.glob("shard_*"))) == 3
    return store.path


def one_line(act) -> str:
    with at_most(SECONDS), pytest.raises(LegatoError) as raised:
        act()
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < 600
    return said


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in STORES])
def test_bad_store(case: BadStore, sound, model, tokens, tmp_path, capsys):
    store = shutil.copytree(sound, tmp_path / "store")
    case.change(store)
    if case.opened:
        said = one_line(lambda: ActivationStore.open(store))
        assert case.opened in said
        assert str(store) in said
    if case.harvested is None:
        with at_most(SECONDS):
            again, whole = harvest(model, tokens, layer=1, path=store), ActivationStore.open(sound)
        rows = range(len(whole))
        assert torch.equal(again.read_rows(rows).acts_BLD, whole.read_rows(rows).acts_BLD)
        assert ActivationStore.open(store)
    else:
        said = one_line(lambda: harvest(model, tokens, layer=1, path=store))
        assert case.harvested in said
        assert str(store) in said
        assert not list(store.glob(".*.tmp"))


def test_a_store_that_is_no_folder(tmp_path, model, tokens):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop", "gone", "file/within"):
        assert name in one_line(lambda name=name: ActivationStore.open(tmp_path / name))
    for name in ("file", "loop", "file/within"):
        assert name in one_line(lambda name=name: harvest(model, tokens, layer=1, path=tmp_path / name))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://{folder}/gone", "holds no activations"),
        ("nowhere://bucket/store", "cannot be used"),
        ("memory://", "holds no activations"),
        ("http://127.0.0.1:9/store", "cannot be"),
    ],
)
def test_a_store_at_a_bad_url(tmp_path, monkeypatch, url, says):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    assert says in one_line(lambda: ActivationStore.open(url.format(folder=tmp_path)))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in STORES if case.opened])
def test_a_bad_store_at_a_url(case: BadStore, sound, tmp_path, monkeypatch):
    """What comes from elsewhere is looked at before it is brought here, and nothing of it lands outside its folder."""
    if any(word in case.name for word in ("FIFO", "folder", "link", "1 GiB")):
        return
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "a" / "b" / "cache"))
    store = shutil.copytree(sound, tmp_path / "store")
    case.change(store)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    one_line(lambda: ActivationStore.open(f"file://{store}"))
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(tmp_path / "a" / "b" / "cache" / "activations") for path in new)


def test_a_manifest_at_a_url_that_names_no_key(tmp_path, model, tokens):
    for content in ("", "[]", "{}", '{"a":' * 10**5, "7"):
        (tmp_path / "manifest.json").write_text(content)
        said = one_line(lambda: harvest(model, tokens, layer=1, path=f"file://{tmp_path}"))
        assert "manifest.json is damaged: delete it and harvest again" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_in_a_store(sound, tmp_path, value):
    store = shutil.copytree(sound, tmp_path / "store")
    set_number(store, value, row=2)
    said = one_line(lambda: legato.evaluate(random_sae(), ActivationStore.open(store)))
    assert "activations hold values that are not finite; harvest them again" in said


@pytest.mark.parametrize("name", BATCHES)
def test_bad_batch(name):
    change, says = BATCHES[name]
    assert legato.evaluate(random_sae(), [sound_batch()])["core"]["tokens"] == 24
    assert says in one_line(lambda: legato.evaluate(random_sae(), [change(sound_batch())]))


def test_no_batch_at_all():
    assert "no activations to evaluate on" in one_line(lambda: legato.evaluate(random_sae(), []))


def test_batches_that_differ():
    assert "width 24 follow some of 48" in one_line(
        lambda: legato.evaluate(random_sae(), [sound_batch(), sound_batch(24)])
    )
    longer = [torch.cat([part, part], 1) for part in vars(sound_batch()).values()]
    said = one_line(lambda: legato.evaluate(random_sae(), [sound_batch(), ActivationBatch(*longer)]))
    assert "16 positions follow some of 8" in said


def test_there_are_many_and_each_is_another():
    assert len({case.name for case in STORES}) == len(STORES)
    assert len(STORES) + len(BATCHES) >= 50
