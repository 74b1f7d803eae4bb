"""Harvest, store, stream and normaliser on a model whose activations can be worked out by hand, and on real ones."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_network, tiny_tokenizer

from legato.common.errors import LegatoError, UsageError
from legato.data import store as activation_store
from legato.data import store_manifest
from legato.data.activations import ActivationBatch, ActivationStream, Normaliser
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.sites import Site
from legato.data.store import ActivationStore
from legato.data.tokens import TokenSet

WIDTH = 6


class CountingModel:
    """acts[d] = token + d at every layer: a model that can be read in the head. Counts the rows it was asked for."""

    name = "counting"
    dtype = torch.float32

    def __init__(self) -> None:
        self.rows = 0

    def site(self, layer: int, site: str) -> Site:
        return Site(f"layers.{layer}.{site}", layer, width=WIDTH, dtype=self.dtype)

    def fingerprint(self) -> str:
        return "0" * 64

    def activations(self, tokens_BL: torch.Tensor, layer: int, site: str) -> torch.Tensor:
        self.rows += len(tokens_BL)
        return tokens_BL[..., None] + torch.arange(WIDTH, dtype=self.dtype)


def token_set(rows: int = 23, length: int = 4) -> TokenSet:
    """Row r holds BOS (0) and three tokens that are r + 1000 p at position p; rows 2r and 2r + 1 are one document."""
    row = torch.arange(rows, dtype=torch.int32)[:, None]
    tokens_BL = 1000 * torch.arange(length, dtype=torch.int32) + row
    tokens_BL[:, 0] = 0
    mask_BL = torch.ones(rows, length, dtype=torch.bool)
    mask_BL[:, 0] = False
    return TokenSet(tokens_BL, mask_BL, (row // 2).repeat(1, length).int(), bos=True)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a shard, so 23 rows are four full shards and one of three."""
    monkeypatch.setattr(store_manifest, "SHARD_BYTES", 5 * 4 * (4 * WIDTH + 9) + 1)


@pytest.fixture
def model() -> Any:
    return CountingModel()


def assert_same(one: ActivationBatch, other: ActivationBatch) -> None:
    for name in ("acts_BLD", "mask_BL", "doc_BL", "tokens_BL"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def rows_of(batches: Iterable[ActivationBatch]) -> list[int]:
    """The row numbers, which token_set wrote into the tokens."""
    return [int(token) % 1000 for batch in batches for token in batch.tokens_BL[:, 1]]


def test_the_store_holds_what_the_model_gave(model: Any, tmp_path: Path) -> None:
    store = harvest(model, token_set(), layer=3, path=tmp_path, batch_rows=4)
    assert (store.n_rows, store.context_length, store.d_in, len(store)) == (23, 4, WIDTH, 23)
    assert (store.n_valid, store.n_outliers) == (23 * 3, 0)
    batch = store.read_rows([22, 0, 7])
    assert batch.acts_BLD[0, 2].tolist() == [2022, 2023, 2024, 2025, 2026, 2027]
    assert batch.acts_BLD[1, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.tokens_BL[2].tolist() == [0, 1007, 2007, 3007]
    assert batch.mask_BL[2].tolist() == [False, True, True, True]
    assert batch.doc_BL.tolist() == [[11] * 4, [0] * 4, [3] * 4]
    assert (batch.acts_BLD.dtype, batch.doc_BL.dtype, batch.tokens_BL.dtype) == (
        torch.float32,
        torch.int32,
        torch.int64,
    )
    assert store.read_rows(torch.tensor([], dtype=torch.long)).acts_BLD.shape == (0, 4, WIDTH)
    for bad in (-1, 23):
        with pytest.raises(IndexError, match="rows must lie in 0 to 22"):
            store.read_rows([bad])


def test_shards_are_ordinary_safetensors_files(model: Any, tmp_path: Path) -> None:
    store = harvest(model, token_set(), layer=3, path=tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"shard_0000{n}.safetensors" for n in range(5)]
    tensors = [load_file(tmp_path / name) for name in names]
    assert [len(part["acts"]) for part in tensors] == [5, 5, 5, 5, 3]
    whole = store.read_rows(range(23))
    assert torch.equal(torch.cat([part["acts"] for part in tensors]), whole.acts_BLD)
    assert torch.equal(torch.cat([part["tokens"] for part in tensors]).long(), whole.tokens_BL)
    assert torch.equal(torch.cat([part["mask"] for part in tensors]), whole.mask_BL)
    assert torch.equal(torch.cat([part["doc"] for part in tensors]), whole.doc_BL)


def test_provenance_says_where_the_activations_come_from(model: Any, tmp_path: Path) -> None:
    tokens = token_set()
    provenance = harvest(model, tokens, layer=3, site="mlp_out", path=tmp_path).provenance
    assert provenance["model"] == "counting"
    assert (provenance["layer"], provenance["site"], provenance["module_path"]) == (3, "mlp_out", "layers.3.mlp_out")
    assert provenance["tokens_sha256"] == tokens.fingerprint
    assert ActivationStore.open(tmp_path).provenance == provenance


def test_outliers_are_masked_and_counted(model: Any, tmp_path: Path) -> None:
    """Norms are about sqrt(6) times the token; the median text token is 2013, so 8 medians lie at 16122."""
    tokens = token_set()
    tokens.tokens_BL[4, 2] = 16_000
    tokens.tokens_BL[4, 3] = 16_200
    tokens.tokens_BL[9, 1] = 10**6
    tokens.tokens_BL[9, 0] = 10**6  # BOS is no text and so no outlier
    store = harvest(model, tokens, layer=3, path=tmp_path)
    median = (2013 + torch.arange(6.0)).norm().item()
    assert store.provenance["median_norm"] == pytest.approx(median)
    assert (store.n_valid, store.n_outliers) == (69 - 2, 2)
    batch = store.read_rows([4, 9])
    assert batch.mask_BL.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert batch.acts_BLD[0, 3, 0] == 16_200
    assert harvest(model, tokens, layer=3, path=tmp_path / "b", outlier_factor=7.9).n_outliers == 3


def test_a_second_harvest_uses_the_first(model: Any, tmp_path: Path) -> None:
    told: list[int] = []
    first = harvest(model, token_set(), layer=3, path=tmp_path, batch_rows=4, progress=told.append)
    assert told == [4, 5, 9, 10, 14, 15, 19, 20, 23]  # shards of 5 rows
    assert model.rows == 23
    second = harvest(model, token_set(), layer=3, path=tmp_path)
    assert model.rows == 23
    assert second.key == first.key
    assert_same(second.read_rows(range(23)), first.read_rows(range(23)))


def test_the_default_place_is_named_by_what_determines_the_activations(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path))
    stores = [
        harvest(model, token_set(), layer=3),
        harvest(model, token_set(), layer=3),
        harvest(model, token_set(), layer=4),
        harvest(model, token_set(), layer=3, site="mlp_out"),
        harvest(model, token_set(), layer=3, outlier_factor=9),
        harvest(model, token_set(22), layer=3),
    ]
    assert len({store.path for store in stores}) == 5
    assert stores[0].path == stores[1].path
    assert all(store.path.parent == tmp_path / "activations" for store in stores)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_named_and_only_it_is_made_anew(
    model: Any, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = harvest(model, token_set(), layer=3, path=tmp_path).read_rows(range(23))
    shard = tmp_path / "shard_00002.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "delete":
        shard.unlink()
    elif damage == "truncate":
        shard.write_bytes(content[:-3])
    else:
        content[-40] ^= 4
        shard.write_bytes(content)
    with pytest.raises(LegatoError, match=r"shard_00002\.safetensors is missing or damaged .* harvest again"):
        ActivationStore.open(tmp_path)
    if damage != "flip":  # a changed byte takes the SHA-256 to find
        with pytest.raises(LegatoError, match=r"shard_00002\.safetensors is missing or damaged"):
            ActivationStore.open(tmp_path, verify=False)
    told: list[int] = []
    store = harvest(model, token_set(), layer=3, path=tmp_path, batch_rows=4, progress=told.append)
    assert "shard_00002.safetensors is missing or damaged" in capsys.readouterr().err
    assert told == [22, 23]
    assert_same(store.read_rows(range(23)), expected)
    ActivationStore.open(tmp_path)


def test_goes_on_after_kill_9(model: Any, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        import test_activations as t
        t.store_manifest.SHARD_BYTES = 5 * 4 * (4 * t.WIDTH + 9) + 1

        def die_at(rows):
            if rows >= 16:
                while not Path(sys.argv[1], "shard_00002.safetensors").exists():
                    pass
                os.kill(os.getpid(), signal.SIGKILL)

        t.harvest(t.CountingModel(), t.token_set(), layer=3, path=sys.argv[1], batch_rows=2, progress=die_at)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with pytest.raises(LegatoError, match=r"is unfinished \([23] of 5 shards\): harvest again"):
        ActivationStore.open(tmp_path / "killed")
    told: list[int] = []
    store = harvest(model, token_set(), layer=3, path=tmp_path / "killed", batch_rows=1, progress=told.append)
    assert told[0] in (11, 16)
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    whole = harvest(model, token_set(), layer=3, path=tmp_path / "whole")
    assert_same(store.read_rows(range(23)), whole.read_rows(range(23)))
    for name in (path.name for path in (tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_with_something_else_is_left_alone(model: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="is not empty and holds no activations"):
        harvest(model, token_set(), layer=3, path=tmp_path / "notes")
    harvest(model, token_set(), layer=3, path=tmp_path / "store")
    with pytest.raises(UsageError, match=r"holds activations of counting layers\.3\.resid_post .* another folder"):
        harvest(model, token_set(), layer=4, path=tmp_path / "store")
    with pytest.raises(UsageError, match="holds no activations"):
        ActivationStore.open(tmp_path / "nowhere")
    (tmp_path / "store/manifest.json").write_text('{"format": "legato-activations-1", "key": ')
    with pytest.raises(LegatoError, match=r"manifest\.json cannot be read .* harvest again"):
        ActivationStore.open(tmp_path / "store")
    (tmp_path / "file").write_text("")
    with pytest.raises(LegatoError, match="cannot write activations"):
        harvest(model, token_set(), layer=3, path=tmp_path / "file")


def test_a_full_disk_is_an_error_and_leaves_an_unfinished_store(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(activation_store, "save_file", full)
        with pytest.raises(LegatoError, match=r"cannot write activations to .*: No space left on device"):
            harvest(model, token_set(), layer=3, path=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json"]
    assert harvest(model, token_set(), layer=3, path=tmp_path).n_rows == 23


def test_activations_that_are_not_finite_are_an_error(model: Any, tmp_path: Path) -> None:
    for bad, rows in itertools.product((torch.nan, torch.inf), (range(23), range(20, 23))):
        broken = CountingModel()
        numbers = torch.tensor(list(rows))

        def spoilt(tokens_BL: torch.Tensor, *_: object, bad: float = bad, numbers: torch.Tensor = numbers) -> Any:
            acts = CountingModel().activations(tokens_BL, 0, "")
            acts[torch.isin(tokens_BL[:, 1] - 1000, numbers), 2, 3] = bad
            return acts

        broken.activations = spoilt  # type: ignore[method-assign]
        path = tmp_path / f"{bad}{rows[0]}"
        with pytest.raises(LegatoError, match="not finite: load it in float32"):
            harvest(broken, token_set(), layer=3, path=path, batch_rows=4)
        with pytest.raises(LegatoError):
            ActivationStore.open(path)


def test_rows_without_text_and_zero_activations_are_errors(model: Any, tmp_path: Path) -> None:
    tokens = token_set()
    tokens.mask_BL[:] = False
    with pytest.raises(LegatoError, match="the rows hold no text"):
        harvest(model, tokens, layer=3, path=tmp_path / "a")
    model.activations = lambda tokens_BL, *_: torch.zeros(*tokens_BL.shape, WIDTH)
    with pytest.raises(LegatoError, match=r"layers\.3\.resid_post puts out nothing but zeros"):
        harvest(model, token_set(), layer=3, path=tmp_path / "b")


@pytest.fixture(params=["store", "stream"])
def source(request: pytest.FixtureRequest, model: Any, tmp_path: Path) -> Any:
    if request.param == "store":
        return harvest(model, token_set(), layer=3, path=tmp_path)
    return ActivationStream(model, token_set(), layer=3)


def test_batches_in_order(source: Any) -> None:
    assert (source.d_in, source.n_rows, source.context_length) == (WIDTH, 23, 4)
    batches = list(source.batches(8, seed=None))
    assert [len(batch.mask_BL) for batch in batches] == [8, 8, 7]
    assert rows_of(batches) == list(range(23))
    assert [len(batch.mask_BL) for batch in source.batches(8, seed=None, drop_last=True)] == [8, 8]
    assert rows_of(source.batches(8, seed=None, epochs=2)) == 2 * list(range(23))
    with pytest.raises(LegatoError, match="23 rows do not fill one batch of 24"):
        next(source.batches(24, seed=None, drop_last=True))


def test_batches_in_an_order_drawn_from_the_seed(source: Any) -> None:
    rows = rows_of(source.batches(5, seed=7, epochs=3))
    epochs = [rows[:23], rows[23:46], rows[46:]]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows == rows_of(source.batches(5, seed=7, epochs=3))
    assert rows == rows_of(itertools.islice(source.batches(5, seed=7, epochs=None), 15))
    assert rows[:23] != rows_of(source.batches(5, seed=8))


@pytest.mark.parametrize("start", [0, 3, 4, 5, 9, 12, 15])
def test_batches_can_go_on_where_they_stopped(source: Any, start: int) -> None:
    whole = list(source.batches(5, seed=7, epochs=3))
    rest = list(source.batches(5, seed=7, epochs=3, start_batch=start))
    assert len(rest) == 15 - start
    for one, other in zip(rest, whole[start:], strict=True):
        assert_same(one, other)


def test_a_stream_gives_what_a_store_holds(model: Any, tmp_path: Path) -> None:
    tokens = token_set()
    tokens.tokens_BL[4, 3] = 10**6
    store = harvest(model, tokens, layer=3, path=tmp_path)
    stream = ActivationStream(model, tokens, layer=3)
    assert stream.key() == store.key
    for one, other in zip(stream.batches(5, seed=1, epochs=2), store.batches(5, seed=1, epochs=2), strict=True):
        assert_same(one, other)


def test_normaliser_by_hand(model: Any) -> None:
    """Valid activations (0, 0), (2, 0), (1, 3), (1, 1): mean (1, 1), E||x - mean||^2 = (2 + 2 + 4 + 0) / 4 = 2."""
    acts = torch.tensor([[[0.0, 0], [2, 0], [9e9, 9e9]], [[9e9, -9e9], [1, 3], [1, 1]]])
    mask = torch.tensor([[True, True, False], [False, True, True]])

    class Source:
        d_in, n_rows = 2, 2

        def batches(self, *_: object, **__: object) -> Iterable[ActivationBatch]:
            yield ActivationBatch(acts[:1], mask[:1], torch.zeros(1, 3), torch.zeros(1, 3))
            yield ActivationBatch(acts[1:], mask[1:], torch.zeros(1, 3), torch.zeros(1, 3))

    normaliser = Normaliser.fit(Source())  # type: ignore[arg-type]
    assert normaliser.mean_D.tolist() == [1, 1]
    assert normaliser.scale == pytest.approx(1.0)  # sqrt(D / 2)
    assert normaliser.apply(torch.tensor([3.0, 1.0])).tolist() == [2, 0]
    assert normaliser.apply(acts).dtype == torch.float32


def test_normalised_activations_have_mean_0_and_power_d(source: Any) -> None:
    normaliser = Normaliser.fit(source)
    valid = torch.cat([batch.acts_BLD[batch.mask_BL] for batch in source.batches(8, seed=None)])
    normalised = normaliser.apply(valid)
    assert normalised.mean(0).abs().max() < 1e-5
    assert normalised.square().sum(1).mean().item() == pytest.approx(WIDTH, rel=1e-5)
    assert torch.allclose(normalised / normaliser.scale + normaliser.mean_D, valid)


def test_normaliser_of_nothing_is_an_error(model: Any) -> None:
    tokens = token_set()
    tokens.tokens_BL[:] = 5
    with pytest.raises(LegatoError, match="all activations are equal"):
        Normaliser.fit(ActivationStream(model, tokens, layer=3))


def test_a_real_model_through_the_store(tmp_path: Path) -> None:
    lm = LanguageModel(tiny_network("gemma3").bfloat16(), tiny_tokenizer(), "tiny")
    tokens_BL = torch.randint(3, 96, (9, 16), dtype=torch.int32)
    tokens_BL[:, 0] = 1
    tokens = TokenSet(tokens_BL, tokens_BL > 2, torch.arange(9, dtype=torch.int32)[:, None].repeat(1, 16), bos=True)
    store = harvest(lm, tokens, layer=1, path=tmp_path)
    batch = store.read_rows(np.array([5, 2]))
    assert batch.acts_BLD.dtype == torch.bfloat16
    assert torch.equal(batch.acts_BLD, lm.activations(tokens_BL[[5, 2]], 1))
    assert store.d_in == 48


def test_more_shards_than_open_files(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_store, "OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    store = harvest(model, token_set(), layer=3, path=tmp_path)
    assert rows_of(store.batches(3, seed=4)) == rows_of(
        ActivationStream(model, token_set(), layer=3).batches(3, seed=4)
    )
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        del store
        assert len(os.listdir("/proc/self/fd")) == before
