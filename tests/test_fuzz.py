"""What reads files, on real ones with pieces changed: one line for a person may come out, and nothing else.

The examples are drawn anew by no run (derandomised), so that a failure is the code's and not the day's.
"""

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from bad_input import random_sae
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from synthetic_run import write_synthetic_run

from legato.common.errors import LegatoError
from legato.common.safe_read import read_arrays, read_json, read_table, read_yaml
from legato.data.documents import load_documents, split_held_out
from legato.data.store_manifest import StoreManifest
from legato.results.integrity import check_all, write_checksums
from legato.results.run_dir import RunDir
from legato.results.saved_run import SavedRun, read_log
from legato.sae.autoencoder import SparseAutoencoder, export
from legato.sae.formats.detect import read_sae

pytest.importorskip("mwparserfromhell")
from legato.data.wikitext import to_prose

fuzz = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Cut, overwrite, insert or repeat something at a share of the file's length.
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "overwrite", "insert", "repeat", "drop"]),
        st.floats(0, 1, allow_subnormal=False),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)
TEXT = "".join(chr(c) for c in range(1, 128)) + "Überall ﷺ \u2028 \ufeff 日本語 "
# What stands where something else is expected.
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.just(10**400),
    st.floats(),
    st.text(TEXT, max_size=8),
    st.just("../../etc/passwd"),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(TEXT, max_size=5), inner, max_size=3)
)


def changed(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, piece in changes:
        at = int(share * len(content))
        if kind == "cut":
            content = content[:at]
        elif kind == "overwrite":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "repeat":
            content = content[:at] + content[at : at + 64] * 3 + content[at + 64 :]
        else:
            content = content[:at] + content[at + len(piece) :]
    return content


def replaced(tree: object, path: list[int], value: object) -> object:
    """The tree with one of its nodes replaced: the numbers choose the way down, round and round."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = replaced(tree[key], path[1:], value)
    return copy


PATHS = st.lists(st.integers(0, 20), max_size=6)


def tolerated(read: Callable[[], object]) -> bool:
    """Whether it was read; an error must be one of Legato's, in one line."""
    message = None
    try:
        read()
    except LegatoError as error:
        message = str(error)
    assert message is None or (message and message.isprintable())
    return message is None


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "run_1", named=("contrastive",), latents=20, context=8)


@pytest.fixture(scope="module")
def sae(tmp_path_factory) -> Path:
    folder = random_sae("topk", d_in=6, d_sae=8, k=2, details={"layer": 3, "model": "demo", "objective": {"k": 2}})
    return folder.save(tmp_path_factory.mktemp("saes") / "sae")


# SAEs


def open_sae(path: Path) -> None:
    opened = SparseAutoencoder.load(path)
    opened.place()
    opened.encode(torch.zeros(1, 2, opened.d_in))


def unseal(folder: Path) -> None:
    """As an earlier version saved it."""
    own = json.loads((folder / "legato.json").read_text())
    (folder / "legato.json").write_text(json.dumps({key: own[key] for key in own if key not in ("format", "sha256")}))


@pytest.mark.parametrize("name", ["cfg.json", "legato.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("sealed", [True, False])
@fuzz
@given(changes=CHANGES)
def test_bytes_of_an_sae_folder(sae, tmp_path, name, sealed, changes):
    folder = shutil.copytree(sae, tmp_path / "sae", dirs_exist_ok=True)
    if not sealed:
        own = json.loads((folder / "legato.json").read_text())
        (folder / "legato.json").write_text(
            json.dumps({key: own[key] for key in own if key not in ("format", "sha256")})
        )
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(changed(content, changes))
    tolerated(lambda: open_sae(folder))


@pytest.mark.parametrize("name", ["cfg.json", "legato.json"])
@fuzz
@given(path=PATHS, value=VALUES)
def test_values_of_an_sae_folder(sae, tmp_path, name, path, value):
    folder = shutil.copytree(sae, tmp_path / "sae", dirs_exist_ok=True)
    unseal(folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(replaced(content, path, value)))
    tolerated(lambda: open_sae(folder))


@fuzz
@given(path=PATHS, value=VALUES)
def test_the_header_of_safetensors(sae, tmp_path, path, value):
    content = (sae / "sae_weights.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(replaced(json.loads(content[8 : 8 + length]), path, value)).encode()
    folder = shutil.copytree(sae, tmp_path / "sae", dirs_exist_ok=True)
    (folder / "legato.json").unlink()
    new = len(header).to_bytes(8, "little") + header + content[8 + length :]
    (folder / "sae_weights.safetensors").write_bytes(new)
    tolerated(lambda: open_sae(folder))


@pytest.mark.parametrize("name", ["one.safetensors", "ae.pt", "params.npz", "sparsify/sae.safetensors"])
@fuzz
@given(changes=CHANGES)
def test_bytes_of_other_formats(sae, tmp_path, name, changes):
    path = tmp_path / "whole" / name
    if not path.exists():
        opened = SparseAutoencoder.load(sae)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "one.safetensors":
            export(opened, path, "safetensors")
        elif name == "ae.pt":
            export(opened, path.parent / "dl", "dictionary_learning")
            shutil.copy(path.parent / "dl" / "ae.pt", path)
        elif name == "params.npz":
            weights = random_sae(d_in=6, d_sae=8).stored().weights
            np.savez(path, **{key: tensor.numpy() for key, tensor in weights.items()})
        else:
            export(opened, path.parent, "sparsify")
    new = tmp_path / Path(name).name
    new.write_bytes(changed(path.read_bytes(), changes))
    tolerated(lambda: read_sae(new))


# Runs


def read_everything(folder: Path) -> None:
    opened = SavedRun.open(folder)
    opened.setting("training", "k")
    assert all(isinstance(column, np.ndarray) for columns in opened.log.values() for column in columns.values())
    for arm in opened.arms:
        arm.value("core.fvu")
        arm.series("consistency.lags")
        opened.arrays(arm.name)
        opened.latent_column(arm.name, "kappa1_excess_within")
    assert opened.highlighted
    assert opened.background is not None


RUN_FILES = ["metrics.json", "config.yaml", "log.jsonl", "arrays/baseline.npz", "features/baseline.parquet"]


@pytest.mark.parametrize("name", RUN_FILES)
@fuzz
@given(changes=CHANGES)
def test_bytes_of_a_run(run, tmp_path, name, changes):
    folder = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    content = changed((run / name).read_bytes(), changes)
    (folder / name).write_bytes(content)
    tolerated(lambda: read_everything(folder))


@fuzz
@given(changes=CHANGES, which=st.integers(0, len(RUN_FILES)))
def test_bytes_of_a_sealed_run_never_pass_for_the_run(run, tmp_path, changes, which):
    folder = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    write_checksums(folder)
    path = folder / [*RUN_FILES, "checksums.json"][which]
    whole = path.read_bytes()
    path.write_bytes(changed(whole, changes))
    untouched = path.read_bytes() == whole or (path.name == "checksums.json" and _same_json(path, whole))
    assert tolerated(lambda: check_all(folder)) == untouched
    assert tolerated(lambda: read_everything(folder)) == untouched


def _same_json(path: Path, whole: bytes) -> bool:
    """An entry twice is the entry."""
    try:
        return json.loads(path.read_bytes()) == json.loads(whole)
    except ValueError:
        return False


@fuzz
@given(path=PATHS, value=VALUES)
@example(path=[0, 0, 0], value=10**400)
def test_values_of_metrics(run, tmp_path, path, value):
    folder = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    metrics = json.loads((run / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(replaced(metrics, path, value)))
    tolerated(lambda: read_everything(folder))


@fuzz
@given(path=PATHS, value=VALUES)
def test_values_of_config(run, tmp_path, path, value):
    folder = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(replaced(config, path, value)))  # JSON is YAML
    tolerated(lambda: read_everything(folder))

    class Other:
        def to_dict(self) -> dict[str, object]:
            return {"preset": "other"}

    tolerated(lambda: RunDir.claim(folder, Other()))


@fuzz
@given(lines=st.lists(VALUES.map(json.dumps) | st.text(TEXT, max_size=20), max_size=6))
def test_lines_of_a_log(tmp_path, lines):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(['{"arm": "a", "step": 1, "loss": 0.5, "loss_terms": {"b": 1}}', *lines]))
    read_log(path)


@fuzz
@given(path=PATHS, value=VALUES)
def test_values_of_a_store(tmp_path, path, value):
    manifest = StoreManifest.new(
        "0" * 64, n_rows=4, context_length=8, d_in=4, dtype=torch.float32, provenance={"model": "m"}
    )
    manifest.write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    new = replaced(content, path, value)
    (tmp_path / "manifest.json").write_text(json.dumps(new))
    assert tolerated(lambda: StoreManifest.read(tmp_path)) in (False, _is_unsealed(new) or new == content)


def _is_unsealed(manifest: object) -> bool:
    """As an earlier version wrote it."""
    return not isinstance(manifest, dict) or manifest.get("sha256") is None


# The readers below them


@fuzz
@given(changes=CHANGES)
def test_bytes_of_json_and_yaml(run, tmp_path, changes):
    for read, name in ((read_json, "metrics.json"), (read_yaml, "config.yaml")):
        (tmp_path / name).write_bytes(changed((run / name).read_bytes(), changes))
        tolerated(lambda read=read, name=name: read(tmp_path / name))


@fuzz
@given(content=st.binary(max_size=200))
def test_rubbish(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (read_json, read_yaml, read_arrays, read_table, read_log):
        tolerated(lambda read=read: read(path))


# Text


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["w3 w4", "w5 w6", None], "n": [1, 2, 3]}), buffer)
    return buffer.getvalue()


_LINES = b"".join(json.dumps({"text": f"w{n} w{n + 1}", "n": n}).encode() + b"\n" for n in range(9))
CORPORA = {
    "a.jsonl": _LINES,
    "a.jsonl.gz": gzip.compress(_LINES, mtime=0),
    "a.parquet": _parquet(),
    "a.txt": b"w3 w4\n\nw5 \xc3\x9c\n",
}


@pytest.mark.parametrize("name", CORPORA)
@fuzz
@given(changes=CHANGES)
def test_bytes_of_a_corpus(tmp_path, name, changes):
    path = tmp_path / name
    path.write_bytes(changed(CORPORA[name], changes))
    tolerated(lambda: split_held_out(load_documents(str(path)), 0.3))


_MARKUP = [
    *("{{", "}}", "[[", "]]", "|", "<ref>", "</ref>", "<!--", "'''", "==", "{|", "|}", "<math>", "&nbsp;", "\n\n"),
    *("{{convert|20|-|25|cm|in}}", "[[File:a.png|thumb|b]]", "{{as of|2009|13}}", "{{frac|1|2|3}}", "{{chem|H|2|O}}"),
    *("* item", "A sentence that is long enough to be kept, with words in it. ", "(; , )", "http://a.b", "é"),
]


@settings(fuzz, max_examples=400)
@given(parts=st.lists(st.sampled_from(_MARKUP) | st.text(TEXT, max_size=6), max_size=25))
def test_wikitext(parts):
    prose = to_prose("".join(parts))
    assert isinstance(prose, str)
    assert "{{" not in prose
