"""Every file that Legato keeps, cut and with bits flipped: the damage is named, or it can be shown to change nothing.

What a checkpoint holds is tested in test_checkpoint.py, byte by byte.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from bad_input import random_sae
from small_experiment import RESULTS, SmallExperiment, small_experiment
from tiny_models import save_tiny_model, tiny_tokenizer

from legato.cli import main
from legato.common.checksummed import read_sealed
from legato.common.errors import LegatoError
from legato.common.files import cached_folder
from legato.data.documents import Document
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore
from legato.data.tokens import tokenise
from legato.results.integrity import DERIVED, EXEMPT, UNREAD, blame_unverified_files, check_all, write_checksums
from legato.results.saved_run import SavedRun
from legato.sae.autoencoder import SparseAutoencoder, export

FLIPS = 4
# Files that nothing vouches for, and why that is harmless.
HARMLESS = {
    "notes.txt": "for people, who may write into it; nothing reads it back",
    "tensorboard": "a copy of log.jsonl for TensorBoard, which has checksums of its own",
    ".lock": "empty; what is in it has no meaning",
}


def damages(content: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """The content cut at its end, in the middle and to nothing, and with one bit of it flipped here and there."""
    if not content:
        yield "grown", b"x"
        return
    for keep in {len(content) - 1, len(content) // 2, 0}:
        yield f"cut to {keep}", content[:keep]
    draw = random.Random(name)
    for place in (0, *(draw.randrange(len(content)) for _ in range(FLIPS)), len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield f"bit flipped in byte {place}", bytes(flipped)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def every_damage(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, what was done to it) with the folder in that state, each file whole again after its turn."""
    for name in files_of(folder):
        path = folder / name
        whole = path.read_bytes()
        for done, content in damages(whole, name):
            path.write_bytes(content)
            yield name, done
        path.write_bytes(whole)


def naming(name: str, read: Callable[[], object]) -> None:
    """`read` must fail with one line that names the file."""
    with pytest.raises(LegatoError) as raised:
        read()
    assert Path(name).name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request) -> Iterator[SmallExperiment]:
    """A finished run, and the cache with its activations."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGATO_CACHE", str(folder / "cache"))
        capture = type("Capture", (), {"readouterr": lambda self: None})()
        small = small_experiment(folder, capture)
        assert small.run("--temporal=hysteresis", "--controls=ema") == 0
        yield small


def test_a_finished_run_is_vouched_for(finished):
    files = set(files_of(finished.out_dir))
    vouched = set(json.loads((finished.out_dir / "checksums.json").read_text())["files"])
    assert {name.partition("/")[0] for name in vouched} >= set(RESULTS) - {"notes.txt"}
    assert {name.partition("/")[0] for name in files - vouched} - {"checksums.json"} <= HARMLESS.keys()
    assert set(HARMLESS) | {"checksums.json"} <= {*EXEMPT, ".lock"}
    assert main(["check", str(finished.out_dir)]) == 0


def test_every_file_of_a_run(finished, tmp_path):
    run = shutil.copytree(finished.out_dir, tmp_path / "run_1")
    sound = SavedRun.open(run)
    for name, done in every_damage(run):
        place = name.partition("/")[0]
        if place in HARMLESS:
            check_all(run)
            assert SavedRun.open(run).arms == sound.arms, done
            continue
        naming(name, lambda: check_all(run))
        if name.endswith("legato.json") and _same_json(run / name, finished.out_dir / name):
            continue
        if place in UNREAD:
            sae = run / "/".join(name.split("/")[:2])
            naming(name, lambda sae=sae: SparseAutoencoder.load(sae))
        elif name == "matched.json":
            naming(name, lambda: SavedRun.open(run).matched)
        elif place not in DERIVED:
            naming(name, lambda: SavedRun.open(run))
    check_all(run)


def test_what_is_built_from_the_others_is_built_again(finished, tmp_path, capsys):
    run = shutil.copytree(finished.out_dir, tmp_path / "run_1")
    numbers = {name: (run / name).read_bytes() for name in ("matched.json", "final_info.json", "ablation.csv")}
    for name in numbers:
        (run / name).write_bytes(b"rubbish")
    assert main(["report", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in numbers} == numbers
    assert check_all(run)
    (run / "matched.json").write_bytes(b"rubbish")
    assert main(["compare", str(run)]) == 0
    assert check_all(run)


@pytest.mark.parametrize("command", ["report", "compare", "check"])
def test_damage_is_one_line_and_nothing_is_written(finished, tmp_path, capsys, command):
    run = shutil.copytree(finished.out_dir, tmp_path / "run_1")
    content = bytearray((run / "metrics.json").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "metrics.json").write_bytes(content)
    before = {name: (run / name).read_bytes() for name in files_of(run)}
    assert main([command, str(run)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {run / 'metrics.json'} is damaged or was changed after the run: restore it")
    assert shown.count("\n") == 1
    assert {name: (run / name).read_bytes() for name in files_of(run)} == before


def test_a_file_of_another_run_is_named(finished, tmp_path):
    run = shutil.copytree(finished.out_dir, tmp_path / "run_1")
    shutil.copy(run / "arrays" / "hysteresis.npz", run / "arrays" / "baseline.npz")
    naming("baseline.npz", lambda: SavedRun.open(run))
    shutil.copy(finished.out_dir / "arrays" / "baseline.npz", run / "arrays")
    shutil.copy(run / "arrays" / "baseline.npz", run / "arrays" / "tsae.npz")
    naming("tsae.npz", lambda: SavedRun.open(run))


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_every_file_of_an_sae(tmp_path, architecture):
    numbers = {"k": 4} if architecture == "topk" else {}
    folder = random_sae(architecture, details={"layer": 9, "loss": 1.5, "model": "demo"}, **numbers).save(
        tmp_path / "sae"
    )
    whole = Path(shutil.copy(folder / "legato.json", tmp_path))
    for name, _ in every_damage(folder):
        if name == "legato.json" and _same_json(folder / name, whole):
            continue
        naming(name, lambda: SparseAutoencoder.load(folder))
    SparseAutoencoder.load(folder)


def _same_json(path: Path, whole: Path) -> bool:
    """Whether only the line end after the last brace is lost."""
    return path.read_bytes() == whole.read_bytes()[:-1]


def test_every_byte_of_what_an_sae_says_of_itself(tmp_path):
    folder = random_sae(details={"layer": 9, "loss": 1.5e-07, "model": "demo"}).save(tmp_path / "sae")
    path = folder / "legato.json"
    whole, details = path.read_bytes(), SparseAutoencoder.load(folder).details
    unnoticed = []
    for place in range(len(whole)):
        for bit in {5, place % 8}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with suppress(LegatoError):
                assert SparseAutoencoder.load(folder).details == details
                unnoticed.append(chr(flipped[place]))
    assert unnoticed == ["E"]  # 1.5E-07 is 1.5e-07


def test_an_sae_in_one_file(tmp_path):
    path = export(random_sae(details={"layer": 9}), tmp_path / "one.safetensors", "safetensors")
    whole = path.read_bytes()
    for place in [*range(0, 700, 3), *range(700, len(whole), 997)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        naming("one.safetensors", lambda: SparseAutoencoder.load(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return LanguageModel.load(str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", pad_token_id=None)))


@pytest.fixture(scope="module")
def tokens():
    words = [Document(" ".join(f"w{3 + (7 * n + m) % 90}" for m in range(30)), str(n)) for n in range(12)]
    return tokenise(words, tiny_tokenizer(), context_length=16)


def test_every_file_of_an_activation_store(model, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("legato.data.store_manifest.SHARD_BYTES", 8 * 16 * (48 * 2 + 9))
    store = harvest(model, tokens, layer=1, path=tmp_path / "store")
    sound = store.read_rows(range(len(store)))
    assert len(files_of(store.path)) >= 4
    for name, done in every_damage(store.path):
        if name == ".lock":
            continue
        naming(name, lambda: ActivationStore.open(store.path))
        capsys.readouterr()
        if name == "manifest.json":
            naming(name, lambda: harvest(model, tokens, layer=1, path=store.path))
            continue
        again = harvest(model, tokens, layer=1, path=store.path)
        assert f"{store.path / name} is missing or damaged: it is harvested again" in capsys.readouterr().err, done
        found = again.read_rows(range(len(again)))
        assert torch.equal(found.acts_BLD, sound.acts_BLD)
        assert torch.equal(found.mask_BL, sound.mask_BL)


def test_a_store_of_another_version_or_of_other_activations(model, tokens, tmp_path):
    store = harvest(model, tokens, layer=1, path=tmp_path / "store")
    with pytest.raises(LegatoError, match=r"holds activations of .*layer|h\.1.*choose another folder"):
        harvest(model, tokens, layer=2, path=store.path)
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").write_text(json.dumps(manifest | {"format": "legato-activations-9"}))
    with pytest.raises(LegatoError, match="was written by another version of legato: delete it"):
        ActivationStore.open(store.path)


def test_every_file_of_a_converted_model(tmp_path):
    filled = []

    def fill(folder: Path) -> None:
        filled.append(folder)
        (folder / "config.json").write_text('{"hidden_size": 640}')
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)

    folder = cached_folder(tmp_path / "model", fill)
    whole = {name: (folder / name).read_bytes() for name in files_of(folder)}
    for number, (name, done) in enumerate(every_damage(folder), start=2):
        cached_folder(folder, fill)
        assert len(filled) == number, (name, done)
        assert {name: (folder / name).read_bytes() for name in files_of(folder)} == whole


def test_what_cannot_be_made_sense_of_is_the_files_fault_unless_the_run_is_sealed(tmp_path):
    def read(root: Path) -> None:
        with blame_unverified_files([root]):
            json.loads((root / "metrics.json").read_text())["baseline"]["core"].lower()

    (tmp_path / "metrics.json").write_text('{"baseline": {"core": {}}}')
    with pytest.raises(LegatoError, match=r"holds results that no run writes \(AttributeError: .*run it again"):
        read(tmp_path)
    write_checksums(tmp_path)
    with pytest.raises(AttributeError):
        read(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "3", '{"sha256": 7}', '{"a": ' * 10**5, b"\xff\xfe"])
def test_a_sealed_file_that_says_nothing(tmp_path, content):
    path = tmp_path / "progress.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    naming("progress.json", lambda: read_sealed(path, kind="any"))


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "null", "3", '{"config.json": 7}', '{"a": ' * 10**5])
def test_a_converted_model_whose_manifest_says_nothing(tmp_path, manifest):
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    folder = cached_folder(tmp_path / "model", fill)
    (folder / "checksums.json").write_text(manifest)
    (folder / "config.json").write_text("other")
    assert (cached_folder(folder, fill) / "config.json").read_text() == "{}"


def test_a_stranger_in_a_converted_model(tmp_path):
    folder = cached_folder(tmp_path / "model", lambda folder: (folder / "config.json").write_text("{}") and None)
    (folder / "adapter_config.json").write_text("{}")
    cached_folder(folder, lambda folder: (folder / "config.json").write_text("{}") and None)
    assert files_of(folder) == ["checksums.json", "config.json"]
