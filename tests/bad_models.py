"""Folders and files that are no causal language model, or one that must not be opened."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bad_input import Case, World
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model


class Touch:
    """Unpickled, it would leave a file called `ran` behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def _model(change: Callable[[Path], object]) -> Callable[[World], list[object]]:
    """A copy of the sound model, changed."""

    def prepared(world: World) -> list[object]:
        folder = shutil.copytree(world.model, world.folder / "model")
        change(folder)
        return [f"--model={folder}"]

    return prepared


def _config(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(**changes: object) -> Callable[[Path], object]:
    """changes: tensors by the end of their names, None to leave them out."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for end, tensor in changes.items():
            name = next(name for name in tensors if name.endswith(end.replace("__", ".")))
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, path, {"format": "pt"})

    return change


def _cut(name: str, share: float = 0.5) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


def _remote_code(folder: Path) -> None:
    _config(model_type="stranger", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})(folder)
    (folder / "code.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": torch.rand(96, 48), "more": Touch(folder.parent / "ran")}, folder / "pytorch_model.bin")


def _old_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(folder.parent / "ran")))


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _small_vocabulary(folder: Path) -> None:
    shutil.rmtree(folder)
    save_tiny_model(folder, "gpt2", vocab_size=50, pad_token_id=None)


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


_CANNOT = "cannot load the model"
_FOLDERS: list[tuple[str, Callable[[Path], object], tuple[str, ...], int]] = [
    ("without config.json", _remove("config.json"), ("holds no config.json", "give the folder"), 2),
    ("config.json damaged", _write("config.json", "{"), (_CANNOT, "config.json"), 2),
    ("config.json empty", _write("config.json", ""), (_CANNOT, "config.json"), 2),
    ("config.json a list", _write("config.json", "[]"), (_CANNOT,), 2),
    ("config.json of nothing", _write("config.json", "{}"), (_CANNOT, "model_type"), 2),
    ("config.json nested", _write("config.json", '{"a":' * 100_000), (_CANNOT,), 2),
    ("of an unknown type", _config(model_type="perceptron"), (_CANNOT, "perceptron"), 2),
    ("of a masked model", _config(model_type="distilbert", architectures=["DistilBertModel"]), (_CANNOT,), 2),
    ("of another width", _config(n_embd=64), (_CANNOT,), 2),
    ("of a width that does not divide", _config(n_embd=50), (_CANNOT,), 2),
    ("of more layers than weights", _config(n_layer=6), ("the weights of", "are incomplete", "missing"), 2),
    ("of no layers", _config(n_layer=0), ("has no list of 0 decoder layers", "not supported"), 2),
    ("of a width of words", _config(n_embd="wide"), (_CANNOT,), 2),
    ("of another vocabulary", _config(vocab_size=7), (_CANNOT,), 2),
    ("without weights", _remove("model.safetensors"), (_CANNOT,), 2),
    ("weights cut", _cut("model.safetensors"), (_CANNOT,), 2),
    ("weights empty", _cut("model.safetensors", 0), (_CANNOT,), 2),
    ("weights missing one", _weights(**{"h__1__mlp__c_fc__bias": None}), ("are incomplete: 1 missing",), 2),
    ("weights of another shape", _weights(**{"h__1__mlp__c_fc__bias": torch.zeros(3)}), (_CANNOT,), 2),
    ("weights not a number", _weights(**{"h__1__mlp__c_fc__bias": torch.full((192,), torch.nan)}), ("not finite",), 1),
    ("weights infinite", _weights(**{"wpe__weight": torch.full((64, 48), torch.inf)}), ("not finite",), 1),
    ("without a tokenizer", _without_tokenizer, ("has no tokenizer", "put its files"), 2),
    ("with another's tokenizer", _small_vocabulary, ("knows 50 tokens, its tokenizer gives", "belongs to"), 2),
    ("tokenizer damaged", _write("tokenizer.json", "{"), (_CANNOT,), 2),
    ("tokenizer cut", _cut("tokenizer.json"), (_CANNOT,), 2),
    ("tokenizer config a list", _write("tokenizer_config.json", "[]"), (_CANNOT,), 2),
    ("that brings code", _remote_code, (_CANNOT, "code"), 2),
    ("pickled with code in it", _pickled, (_CANNOT,), 2),
    ("pickled as before 2020", _old_pickle, (_CANNOT,), 2),
]
_FILES: list[tuple[str, bytes, str]] = [
    ("model.bin", b"weights", "is not a model: give its folder, a .gguf file or a hub id"),
    ("model.gguf", b"", "cannot read model.gguf as a GGUF model"),
    ("model.gguf", b"GGUF", "cannot read model.gguf as a GGUF model"),
    ("model.gguf", b"GGUF" + bytes(60), "cannot read model.gguf as a GGUF model"),
    ("model.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "cannot read model.gguf as a GGUF model"),
    ("model.gguf", b"a text, not a model", "cannot read model.gguf as a GGUF model"),
]


def _file_case(number: int, name: str, content: bytes, says: str) -> Case:
    return Case(f"{name} {number}", "experiment", lambda world: [f"--model={world.file(name, content)}"], (says,))


CASES = [
    *(Case(f"a model {name}", "experiment", _model(change), says, code) for name, change, says, code in _FOLDERS),
    *(_file_case(number, *entry) for number, entry in enumerate(_FILES)),
    Case("a model that is a corpus", "experiment", lambda world: [f"--model={world.corpus}"], ("no config.json",)),
    Case("a model that is an SAE", "experiment", lambda world: [f"--model={world.sae}"], ("no config.json",)),
]
