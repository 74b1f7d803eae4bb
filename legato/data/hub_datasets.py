"""Stream data sets of a hub record by record; reconnect where the connection breaks."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from legato.common.errors import LegatoError, UsageError
from legato.common.progress import log

if TYPE_CHECKING:
    import datasets

HUB_TIMEOUT_SECONDS = 10.0
STREAM_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")


def hub_records(dataset: str) -> Iterator[object]:
    """Stream the records of the train split, in its order.

    dataset: "name" or "name:configuration". Raises UsageError where there is no such data set, configuration or split,
    LegatoError where the hub cannot be reached, at first or after the connection broke.
    """
    name, _, configuration = dataset.partition(":")
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f'no local file {dataset}; to read a hub data set: pip install "legato-sae[hub]"')
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    # Asked before `datasets`, which would try an unreachable hub six times over 23 s.
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"no local file and no hub data set {name!r} (private ones need `hf auth login`)") from error
    except Exception as error:  # the HTTP library behind the hub client, and so its errors, differ by version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LegatoError(f"no local file {name!r}, and the hub cannot be asked for it: {reason}") from error
    import datasets

    def opened() -> "datasets.IterableDataset":
        return datasets.load_dataset(name, configuration or None, split="train", streaming=True)

    try:
        yield from _resumed(opened, dataset)
    except ValueError as error:  # a configuration to choose, a split that is missing
        raise UsageError(f"hub data set {dataset}: {' '.join(str(error).split())}") from error


def _resumed(opened: "Callable[[], datasets.IterableDataset]", dataset: str) -> Iterator[object]:
    """Yield the records of a stream; where the connection breaks, open it again at the next record.

    Raises LegatoError after the last of STREAM_RETRY_SECONDS without a record in between.
    """
    place: dict[str, object] | None = None
    failures = 0
    while True:
        try:
            stream = opened()
            if place is not None:
                stream.load_state_dict(place)
            for record in stream:
                place, failures = stream.state_dict(), 0
                yield record
            return
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            # Timeouts and broken connections, by the errors of the HTTP libraries of hub clients.
            of_http = any(base.__module__.partition(".")[0] in _HTTP_LIBRARIES for base in type(error).__mro__)
            if not of_http and (
                not isinstance(error, OSError) or isinstance(error, FileNotFoundError | PermissionError)
            ):
                raise
            if failures == len(STREAM_RETRY_SECONDS):
                raise LegatoError(f"hub data set {dataset} stopped: {reason}") from error
            seconds = STREAM_RETRY_SECONDS[failures]
            log(f"hub data set {dataset} stopped ({reason}): going on there in {seconds:g} s")
            time.sleep(seconds)
            failures += 1
