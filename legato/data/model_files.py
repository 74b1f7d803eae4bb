"""Find a language model by its name, and choose the device and dtype to load it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from legato.common.errors import UsageError, one_line
from legato.common.hardware import fast_matmul_dtype
from legato.data.gguf import demo_model_folder, gguf_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_TIMEOUT_SECONDS = 5


# Models that TransformerLens and SAELens call by shorter names: the beginning of a name, and whose it is on the hub.
_OWNERS = {
    "pythia-": "EleutherAI",
    "gpt-neo-": "EleutherAI",
    "gpt-j-": "EleutherAI",
    "gemma-": "google",
    "opt-": "facebook",
    "llama-3": "meta-llama",
    "qwen": "Qwen",
    "phi-": "microsoft",
    "mistral-": "mistralai",
    "olmo-": "allenai",
}
_ALIASES = {"gpt2-small": "gpt2", "gemma-3-270m": "google/gemma-3-270m"}


def hub_name(model: str) -> str:
    """Return the hub id of a name in the words of TransformerLens, such as pythia-70m; any other name as it is.

    >>> hub_name("gpt2-small"), hub_name("pythia-70m"), hub_name("gemma-2-2b"), hub_name("mine/model")
    ('gpt2', 'EleutherAI/pythia-70m', 'google/gemma-2-2b', 'mine/model')
    """
    owner = next((owner for start, owner in _OWNERS.items() if model.lower().startswith(start)), None)
    return _ALIASES.get(model, model if owner is None or "/" in model else f"{owner}/{model}")


def check_name(model: str) -> None:
    """Raise UsageError for a name that can be no model, without the network and at once."""
    path = Path(os.path.expanduser(model))
    if os.path.isfile(path):  # unlike Path's, False for a name that is too long
        if path.suffix != ".gguf":
            raise UsageError(f"{model} is not a model: give its folder, a .gguf file or a hub id")
    elif os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise UsageError(f"the folder {model} holds no config.json: give the folder that a model was saved in")
    elif not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", model) or model.startswith("."):
        raise UsageError(f"there is no folder or file {model}: give a folder, a .gguf file or a hub id such as gpt2")


def located(model: str) -> tuple[str, bool]:
    """Return the source that transformers loads for this name, and True if it must do so without the network."""
    if model == "demo":
        return str(demo_model_folder()), True
    check_name(model)
    path = Path(os.path.expanduser(model))
    if os.path.isfile(path):
        return str(gguf_model_folder(path.resolve())), True
    if os.path.isdir(path):
        return str(path), True
    hub_id = hub_name(model)
    return hub_id, _must_stay_offline(hub_id)


def _must_stay_offline(hub_id: str) -> bool:
    """Tell whether the hub is out of reach but the model in the local cache; one quick request, no retries."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"no model {hub_id} on the hub or this disk: give another with --model, "
            'or log in ("hf auth login") if it is private'
        ) from error
    except Exception as error:  # the HTTP library under the hub client, and so the errors, differ between versions
        if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            return True
        raise UsageError(
            f"no folder {hub_id} here, and the model hub cannot be reached to download it ({one_line(error)}): "
            "connect to the network, or give a local folder with --model"
        ) from error
    return False


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"cannot use the device {name!r}: {one_line(error)}") from error
    return device


def usable_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return fast_matmul_dtype() if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(f"unknown dtype {name!r}: choose one of auto, {', '.join(known)}")
    return known[name]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the loading bars of transformers, and its warnings of what we report as errors."""
    from transformers.utils import logging as transformers_logging

    was_enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_enabled:
            transformers_logging.enable_progress_bar()


def sha256_of_model(model: "PreTrainedModel") -> str:
    """Compute the SHA-256 over configuration and every weight."""
    config = model.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())

    def content(weight: Tensor) -> bytes:
        raw: Any = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.sha256(raw).digest()

    names, weights = zip(*model.named_parameters(), strict=True)
    with ThreadPoolExecutor() as pool:
        for name, weight, weight_digest in zip(names, weights, pool.map(content, weights), strict=True):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode() + weight_digest)
    return digest.hexdigest()
