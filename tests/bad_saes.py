"""SAEs that cannot be opened, or not for this model: folders and files of every format."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_input import Case, D, World, random_sae
from safetensors.torch import load_file, save_file

F = 64
WEIGHTS = "sae_weights.safetensors"
Prepare = Callable[[World], list[object]]


def _folder(change: Callable[[Path], object], *, architecture: str = "jumprelu", **parts: object) -> Prepare:
    """A saved SAE without its checksums, as another tool or an earlier version leaves it, changed."""

    def prepared(world: World) -> list[object]:
        folder = random_sae(architecture, **parts).save(world.folder / "sae")
        (folder / "legato.json").unlink()
        change(folder)
        return [folder]

    return prepared


def _cfg(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensors(**changes: torch.Tensor | None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS) | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)

    return change


def _write(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, keep)


def _header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def _fifo(folder: Path) -> None:
    (folder / "cfg.json").unlink()
    os.mkfifo(folder / "cfg.json")


def _huge(folder: Path) -> None:
    os.truncate(folder / "cfg.json", 65 * 2**20)


def _of_another(folder: Path) -> None:
    """A legato.json with its checksums, and the weights of another SAE beside it."""
    other = random_sae(d_sae=F)
    shutil.copy(other.save(folder.parent / "other") / "legato.json", folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"b_enc": tensors["b_enc"] + 1}, folder / WEIGHTS)


def _edited(folder: Path) -> None:
    path = random_sae().save(folder.parent / "other") / "legato.json"
    details = json.loads(path.read_text())
    (folder / "legato.json").write_text(json.dumps(details | {"layer": 2}))


nan, inf = torch.nan, torch.inf
_SAELENS: list[tuple[str, Prepare, tuple[str, ...], int]] = [
    ("no cfg.json", _folder(lambda f: (f / "cfg.json").unlink()), ("it has no cfg.json",), 2),
    ("no weights", _folder(lambda f: (f / WEIGHTS).unlink()), ("holds no SAE", "can be read:"), 2),
    ("an empty folder", _folder(lambda f: [p.unlink() for p in f.iterdir()]), ("holds no SAE", "can be read:"), 2),
    ("cfg.json empty", _folder(_write("cfg.json", "")), ("cfg.json is damaged",), 1),
    ("cfg.json cut", _folder(_cut("cfg.json", 40)), ("cfg.json is damaged",), 1),
    ("cfg.json a list", _folder(_write("cfg.json", "[]")), ("cfg.json is damaged: expected an object",), 1),
    ("cfg.json binary", _folder(_write("cfg.json", b"\xff\xfe\x00")), ("cfg.json is damaged",), 1),
    ("cfg.json nested", _folder(_write("cfg.json", '{"a":' * 10**5)), ("cfg.json is damaged",), 1),
    ("cfg.json of 65 MB", _folder(_huge), ("cfg.json has 68,157,440 bytes",), 1),
    ("cfg.json a FIFO", _folder(_fifo), ("it has no cfg.json",), 2),
    ("cfg.json of nothing", _folder(_write("cfg.json", "{}")), ("layout before version 6", "save it once with"), 1),
    ("an old layout", _folder(_cfg(metadata={"sae_lens_version": "5.1"})), ("layout before version 6",), 1),
    ("a version of words", _folder(_cfg(metadata={"sae_lens_version": "new"})), ("layout before version 6",), 1),
    ("an unknown architecture", _folder(_cfg(architecture="crystal")), ("'crystal'", "can be read:"), 1),
    ("an architecture of numbers", _folder(_cfg(architecture=7)), ("holds architecture '7'", "can be read:"), 1),
    ("no architecture", _folder(_cfg(architecture=None)), ("holds architecture 'None'",), 1),
    ("another architecture", _folder(_cfg(architecture="gated")), ("not those of a gated SAE", "missing b_gate"), 1),
    ("heads", _folder(_cfg(reshape_activations="heads")), ("asks for reshape_activations='heads'",), 1),
    ("a normaliser", _folder(_cfg(normalize_activations="layer_norm")), ("layer_norm",), 1),
    ("topk without k", _folder(_cfg(k=None), architecture="topk", k=4), ("without a usable k (None)",), 1),
    ("topk with k of 0", _folder(_cfg(k=0), architecture="topk", k=4), ("without a usable k (0)",), 1),
    ("topk with k past the width", _folder(_cfg(k=65), architecture="topk", k=4), ("without a usable k (65)",), 1),
    ("topk with k of words", _folder(_cfg(k="all"), architecture="topk", k=4), ("without a usable k ('all')",), 1),
    ("topk with k true", _folder(_cfg(k=True), architecture="topk", k=4), ("without a usable k (True)",), 1),
    ("no threshold", _folder(_tensors(threshold=None)), ("missing threshold",), 1),
    ("no decoder", _folder(_tensors(W_dec=None)), ("missing W_dec",), 1),
    ("a tensor more", _folder(_tensors(W_skip=torch.rand(3))), ("unexpected W_skip",), 1),
    ("a decoder transposed", _folder(_tensors(W_dec=torch.rand(D, F))), ("W_dec has shape (48, 64), expected",), 1),
    ("an encoder of one axis", _folder(_tensors(W_enc=torch.rand(D))), ("W_enc has shape (48,), expected",), 1),
    ("an encoder of three axes", _folder(_tensors(W_enc=torch.rand(D, F, 1))), ("W_enc has shape (48, 64, 1)",), 1),
    ("a threshold too long", _folder(_tensors(threshold=torch.rand(F + 1))), ("threshold has shape (65,)",), 1),
    ("one threshold", _folder(_tensors(threshold=torch.tensor(0.1))), ("threshold has shape ()",), 1),
    ("no latents", _folder(_tensors(W_enc=torch.rand(D, 0), b_enc=torch.rand(0), W_dec=torch.rand(0, D),
                                    threshold=torch.rand(0))), ("has no latents", "0"), 1),
    ("weights not a number", _folder(_tensors(b_enc=torch.full((F,), nan))), ("b_enc holds values that are not",), 1),
    ("weights infinite", _folder(_tensors(b_dec=torch.full((D,), -inf))), ("b_dec holds values that are not",), 1),
    ("thresholds infinite", _folder(_tensors(threshold=torch.full((F,), inf))), ("threshold holds values",), 1),
    ("weights of zeros", _folder(_tensors(W_dec=torch.zeros(F, D))), ("never trained",), 1),
    ("weights past float16", _folder(_tensors(b_enc=torch.full((F,), inf).half())), ("b_enc holds values",), 1),
    ("whole numbers", _folder(_tensors(W_enc=torch.ones(D, F, dtype=torch.int64))), ("W_enc", "not numbers with"), 1),
    ("truth values", _folder(_tensors(b_enc=torch.ones(F, dtype=torch.bool))), ("b_enc", "not numbers with"), 1),
    ("complex weights", _folder(_tensors(b_enc=torch.ones(F, dtype=torch.complex64))), ("b_enc is not a dense",), 1),
    ("weights empty", _folder(_write(WEIGHTS, b"")), ("is damaged",), 1),
    ("weights of rubbish", _folder(_write(WEIGHTS, b"rubbish" * 99)), ("is damaged",), 1),
    ("weights cut", _folder(_cut(WEIGHTS, 9000)), ("is damaged",), 1),
    ("a header of nothing", _folder(_write(WEIGHTS, _header({}))), ("the tensors are not those of a jumprelu",), 1),
    ("a header longer than the file", _folder(_write(WEIGHTS, (2**40).to_bytes(8, "little"))), ("is damaged",), 1),
    ("a header past its bytes", _folder(_write(WEIGHTS, _header(
        {"W_enc": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}))), ("is damaged",), 1),
    ("a header that is nested", _folder(_write(WEIGHTS, (10**5).to_bytes(8, "little") + b"[" * 10**5)),
     ("is damaged",), 1),
    ("legato.json damaged", _folder(_write("legato.json", "{")), ("legato.json is damaged",), 1),
    ("legato.json a list", _folder(_write("legato.json", "[]")), ("legato.json is damaged: expected an object",), 1),
    ("legato.json of another SAE", _folder(_of_another), (f"{WEIGHTS} is damaged, or not what was saved",), 1),
    ("legato.json edited", _folder(_edited), ("legato.json is damaged, or not what was saved",), 1),
    ("legato.json of wrong types", _folder(_write("legato.json", '{"layer": "deep", "objective": 3}')),
     ("its details say layer = 'deep'",), 1),
    ("another model's width", _folder(lambda f: None, d_in=32), ("activations of width 32", "--model"), 2),
]  # fmt: skip


def _npz(**changes: Any) -> bytes:
    arrays = {name: tensor.numpy() for name, tensor in random_sae().stored().weights.items()} | changes
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_npy", ".npy"), content)
    return buffer.getvalue()


def _bomb() -> bytes:
    """A petabyte, by its own account."""
    buffer = io.BytesIO()
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (250000000000000,), }".ljust(117) + "\n"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    return buffer.getvalue()


def _pt(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


_FILES: list[tuple[str, bytes, tuple[str, ...], int]] = [
    ("params.npz", b"", ("is damaged",), 1),
    ("params.npz", b"PK\x03\x04 not a zip", ("is damaged",), 1),
    ("params.npz", _npz()[:5000], ("is damaged",), 1),
    ("params.npz", _npz(threshold=None), ("missing threshold",), 1),
    ("params.npz", _npz(threshold=np.array(["a"] * F)), ("is damaged",), 1),
    ("params.npz", _npz(threshold=np.array([{}] * F, dtype=object)), ("is damaged: Object arrays cannot",), 1),
    ("params.npz", _npz(scaling_factor=np.full(F, 2.0)), ("scales its codes",), 1),
    ("params.npz", _zip(W_enc=b"text"), ("is damaged: W_enc is no array",), 1),
    ("params.npz", _zip(W_enc_npy=b"\x93NUMPY"), ("is damaged",), 1),
    ("params.npz", _bomb(), ("is damaged",), 1),
    ("ae.pt", b"", ("not in torch.save's zip format", "save the state dict again"), 1),
    ("ae.pt", _pt([1, 2]), ("is not a state dict of tensors",), 1),
    ("ae.pt", _pt({}), ("is no SAE of dictionary_learning",), 1),
    ("ae.pt", _pt({"W_enc": "text"}), ("is not a state dict of tensors",), 1),
    ("ae.pt", _pt({"lm_head.weight": torch.rand(2, 2)}), ("is no SAE of dictionary_learning",), 1),
    ("ae.pt", _pt({"W_enc": torch.rand(2, 2)})[:300], ("not in torch.save's zip format",), 1),
    ("sae.safetensors", b"", ("is damaged",), 1),
    ("sae.safetensors", _header({"__metadata__": {"legato": "{"}}), ("its header does not say what SAE it is",), 1),
    ("sae.safetensors", _header({"__metadata__": {"legato": "[" * 10**5}}), ("its header does not say",), 1),
    ("sae.safetensors", _header({"__metadata__": {"legato": '{"architecture": [], "details": {}}'}}),
     ("holds architecture []", "can be read:"), 1),
    ("sae.bin", b"weights", ("is no file of an SAE that can be read", "can be read:"), 2),
    ("notes.txt", b"an SAE", ("is no file of an SAE that can be read", "can be read:"), 2),
]  # fmt: skip


def _file_case(number: int, name: str, content: bytes, says: tuple[str, ...], code: int) -> Case:
    return Case(f"{name} {number}", "evaluate", lambda world: [world.file(name, content)], says, code)


def _given(name: str, says: tuple[str, ...], *given: str, code: int = 2) -> Case:
    return Case(name, "evaluate", lambda world: [g.replace("SAE", str(world.sae)) for g in given], says, code)


CASES = [
    *(Case(f"an SAE with {name}", "evaluate", prepare, says, code) for name, prepare, says, code in _SAELENS),
    *(_file_case(number, *entry) for number, entry in enumerate(_FILES)),
    _given("a missing SAE", ("nowhere/sae does not exist",), "./nowhere/sae"),
    _given("an SAE with a long name", ("does not exist",), f"./{'long' * 100}"),
    _given("an SAE of nobody's home", ("~no-such-user/sae does not exist",), "~no-such-user/sae"),
    _given("no name at all", ("'' names no SAE", "give its folder or file"), ""),
    _given("an SAE named like a path", ("'../up' cannot name an SAE", "use letters"), "../up=SAE"),
    _given("an SAE named ..", ("'..' cannot name an SAE", "use letters"), "..=SAE"),
    _given("two SAEs of one name", ("two SAEs have the same name", "name them"), "a=SAE", "a=SAE"),
    _given("--layer of another model", ("has no layer 9", "choose 0 to 3"), "SAE", "--layer=9"),
    _given("--layer below 0", ("--layer -1 must be greater than or equal to 0",), "SAE", "--layer=-1"),
    _given("--site of nothing", ("unknown site 'middle'", "give resid_post"), "SAE", "--site=middle"),
    _given("--rows of 0", ("--rows 0 must be greater than or equal to 2",), "SAE", "--rows=0"),
    _given("--ce_rows below 0", ("--ce_rows -1 must be greater than or equal to 0",), "SAE", "--ce_rows=-1"),
    _given("--held_out of 2", ("--held_out 2 must be less than 1",), "SAE", "--held_out=2"),
    _given("--context_length of 2", ("--context_length 2 must be greater than",), "SAE", "--context_length=2"),
    _given("--context_length of 0", ("--context_length 0 must be greater than",), "SAE", "--context_length=0"),
    _given("--dtype of words", ("--dtype double is unknown",), "SAE", "--dtype=double"),
    _given("--model that is none", ("there is no folder or file ./none",), "SAE", "--model=./none"),
    _given("--dataset that is none", ("no such file or folder: ./none",), "SAE", "--dataset=./none"),
    _given("--layer of nothing", ("--layer '' must be a valid integer",), "SAE", "--layer="),
]
