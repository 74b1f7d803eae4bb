"""Find the format of a saved SAE by its content, and read it.

SAELens folders (Legato's own are such), dictionary_learning and temporal-saes runs, sparsify folders, the published
SAEs of `published.py`, and single safetensors files of Legato. Each format is read by a module beside this one.
"""

import os
from collections.abc import Callable
from pathlib import Path

from legato.common.errors import UsageError
from legato.common.safe_read import read_state_dict
from legato.sae.formats import dictionary_learning, published, sparsify
from legato.sae.formats import saelens as saelens_folder
from legato.sae.formats import safetensors_file as one_file
from legato.sae.formats.weights import SAEWeights

# A folder is of the first format whose file lies in it.
FOLDERS: tuple[tuple[str, Callable[[Path], SAEWeights]], ...] = (
    (saelens_folder.WEIGHTS_FILENAME, saelens_folder.read_saelens_folder),
    (sparsify.WEIGHTS_FILENAME, sparsify.read_sparsify),
    (dictionary_learning.WEIGHTS_FILENAME, dictionary_learning.read_run),
    (published.GEMMA_SCOPE, lambda folder: published.read_gemma_scope(folder / published.GEMMA_SCOPE)),
    (published.GEMMA_SCOPE_2, lambda folder: published.read_gemma_scope_2(folder / published.GEMMA_SCOPE_2)),
    (published.LLAMA_SCOPE, published.read_llama_scope),
)

_LISTED = 6


def read_sae(path: str | Path) -> SAEWeights:
    """The SAE at a path: its folder, or a file in it.

    Raises UsageError where there is none or more than one (it then names them), LegatoError where it is damaged or
    cannot be reproduced here.
    """
    path = Path(path)
    if os.path.isdir(path):
        for filename, read in FOLDERS:
            if (path / filename).is_file():
                return read(path)
        raise UsageError(_nothing_in(path))
    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist")
    if published.QWEN_SCOPE.fullmatch(path.name):
        return published.read_qwen_scope(path)
    if path.suffix in (".pt", ".pth"):
        state = read_state_dict(path)
        if "encoder_linear.weight" in state:
            return published.read_goodfire(path, state)
        return dictionary_learning.read_dictionary_learning(path, state)
    if path.suffix == ".npz":
        return published.read_gemma_scope(path)
    if path.name == "final.safetensors" and (path.parent.parent / published.LLAMA_SCOPE).is_file():
        return published.read_llama_scope(path.parent.parent)
    if path.suffix == ".safetensors" and one_file.is_one_file(path):
        return one_file.read_one_file(path)
    for filename, read in FOLDERS:
        if path.name in (filename, saelens_folder.CFG_FILENAME) and (path.parent / filename).is_file():
            return read(path.parent)
    raise UsageError(f"{path} is no file of an SAE that can be read; {_CAN_BE_READ}")


_CAN_BE_READ = "can be read: " + ", ".join(
    [
        f"a SAELens folder ({saelens_folder.WEIGHTS_FILENAME})",
        f"a dictionary_learning or temporal-saes run ({dictionary_learning.WEIGHTS_FILENAME})",
        f"a sparsify folder ({sparsify.WEIGHTS_FILENAME})",
        f"Gemma Scope's {published.GEMMA_SCOPE} and {published.GEMMA_SCOPE_2}",
        f"Llama Scope's {published.LLAMA_SCOPE}, Qwen-Scope's layerN.sae.pt, Goodfire's .pt",
    ]
)


def _nothing_in(folder: Path) -> str:
    """Why no SAE was found in a folder: it holds several in its subfolders, or none."""
    filenames = [filename for filename, _ in FOLDERS]
    below = sorted({file.parent for name in filenames for file in folder.glob(f"*/{name}")})
    if not below:
        return f"{folder} holds no SAE; {_CAN_BE_READ}"
    names = ", ".join(str(found) for found in below[:_LISTED])
    more = f" and {len(below) - _LISTED} more" if len(below) > _LISTED else ""
    return f"{folder} holds {len(below)} SAE(s), name the one to open: {names}{more}"
