"""The files of one SAE in a hub repository, brought into the hub client's cache.

`<owner>/<name>` is a repository with one SAE, `<owner>/<name>/<folder>` one SAE of a repository with several, such as
google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from legato.common.errors import LegatoError, UsageError, one_line
from legato.sae.formats.detect import FOLDERS

SAE_FILES = tuple(filename for filename, _ in FOLDERS)  # a folder with one of them is an SAE
HUB_TIMEOUT_SECONDS = 10.0
_LISTED = 6


def local_copy(path: str | Path) -> Path:
    """The path itself, or the files of the SAE on the hub that it names where nothing of it exists here.

    Raises as `download`.
    """
    text, path = str(path), Path(path)
    parts = PurePosixPath(text).parts
    is_local = text.startswith((".", "/", "~")) or "\\" in text or len(parts) < 2
    if is_local or os.path.exists(path) or os.path.exists(parts[0]):  # unlike Path's, False for names that are too long
        return Path(os.path.expanduser(path))
    try:
        return download("/".join(parts[:2]), subfolder="/".join(parts[2:]))
    except LegatoError as error:
        raise type(error)(f"{text} does not exist here, and on the hub: {error}") from error


def download(
    repo_id: str, *, subfolder: str | None = None, revision: str | None = None, token: str | None = None
) -> Path:
    """The local folder (or file) of an SAE on the hub; from the cache where the hub cannot be reached.

    Only the SAE's own files are fetched: those in its folder, and a config.json above it.
    Raises UsageError where there is no such repository, revision or SAE in it, naming those there are; LegatoError
    where the hub cannot be reached and the cache does not have it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    where = (subfolder or "").strip("/")
    if ".." in PurePosixPath(where).parts or "\\" in where:
        raise UsageError(f"{subfolder} leads out of {repo_id}: name a folder in it")
    with hub_errors(repo_id, "download from"):
        try:
            found = HfApi(token=token).model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
            files: list[str] | None = [sibling.rfilename for sibling in found.siblings or ()]
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception:  # no connection, in the words of whatever HTTP library the client uses: look into the cache
            files = None
        if files is None:
            snapshot = snapshot_download(repo_id, revision=revision, local_files_only=True)
        else:
            wanted = _of_one_sae(files, where, repo_id)
            snapshot = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted)
    path = Path(snapshot, where)
    if not path.exists():
        raise UsageError(f"{repo_id} holds no {where}: see which folders it has on the hub")
    return path


def _of_one_sae(files: Sequence[str], where: str, repo_id: str) -> list[str]:
    """The files of the SAE at `where`, a folder or one file of it."""
    is_file = where in files
    folder = PurePosixPath(where).parent if is_file else PurePosixPath(where)
    inside = [name for name in files if PurePosixPath(name).parent == folder]
    inside += [name for name in files if name == str(folder / "checkpoints/final.safetensors")]  # Llama Scope's
    if not is_file and not any(PurePosixPath(name).name in SAE_FILES for name in inside):
        others = sorted({str(PurePosixPath(n).parent) for n in files if PurePosixPath(n).name in SAE_FILES})
        below = [other for other in others if where in ("", ".") or other.startswith(f"{where}/")] or others
        if not below:
            raise UsageError(f"{repo_id} holds no SAE that can be read: none of {', '.join(SAE_FILES)}")
        more = f" and {len(below) - _LISTED} more" if len(below) > _LISTED else ""
        named = ", ".join(below[:_LISTED])
        raise UsageError(f"{repo_id} holds no {where or 'SAE at its top'}; name one of its folders: {named}{more}")
    if is_file:
        inside = [name for name in inside if name == where or name.endswith(".json")]
    return [*inside, *(str(above / "config.json") for above in folder.parents if folder != above)]


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """The hub client's errors in one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except RevisionNotFoundError as error:
        raise UsageError(f"{repo_id} has no such revision: give one of its branches, tags or commits") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UsageError(f"no repository {repo_id} that you may use: check its name, or `hf auth login`") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UsageError(f"you may not {doing} {repo_id}: `hf auth login` with a token that may") from error
        raise LegatoError(f"cannot {doing} {repo_id}: {one_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:  # no connection, and nothing in the cache
        raise LegatoError(f"cannot {doing} {repo_id}: {one_line(error)}") from error
