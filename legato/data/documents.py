"""Documents of a corpus: the packaged demo articles, local files and folders, hub data sets, which are streamed."""

import bz2
import gzip
import hashlib
import importlib.util
import json
import os
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import psutil

from legato.common.errors import LegatoError, UsageError
from legato.common.progress import log

if TYPE_CHECKING:
    import datasets

DEMO_ARTICLES = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
MIN_ARTICLE_CHARACTERS = 600  # disambiguation pages and stubs are shorter; the shortest real article has 720
TEXT_PART_CHARACTERS = 20_000  # a longer .txt becomes several documents, so that some can be held out
MAX_LINE_BYTES = 64 * 2**20  # of a .jsonl, one document; a small archive could unpack to more
MAX_MEMORY_SHARE = 0.5  # of what is free: text is held while it is tokenised
LISTED_COLUMNS = 8
PARQUET_ROWS = 64  # at once: equal texts are stored once, so a small file may unpack to many bytes

HUB_TIMEOUT_SECONDS = 10.0
STREAM_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")


@dataclass(frozen=True)
class Document:
    """One text and its source, such as "gensim-enwiki/Anarchism" or "brown.jsonl.gz:12"."""

    text: str
    source: str


def load_documents(
    dataset: str,
    *,
    max_documents: int | None = None,
    max_stream_characters: int | None = None,
    text_column: str = "text",
) -> Iterator[Document]:
    """Read the documents of a corpus, in its own order, without blank texts.

    dataset: "demo"; a .txt, .jsonl, .jsonl.gz or .parquet file; a folder of such files (searched in depth, sorted by
        path); or a hub data set id, "name" or "name:configuration", whose train split is streamed.
    max_documents: stop after so many documents.
    max_stream_characters: stop a hub stream here, since it may hold more text than fits in memory. A local corpus is
        read whole, so that a sample of it can come from all its files.
    text_column: the key or column that holds the text, for everything but "demo" and .txt.

    A .txt file is one document; one longer than 20,000 characters is cut at blank lines (or else at line ends).
    Raises UsageError, naming file and line, for what cannot be found or read, and for a corpus without any text;
    LegatoError for more text than fits into memory, and for a hub that cannot be reached.
    """
    most_characters = None
    if dataset == "demo":
        found = _demo_documents()
    elif os.path.exists(path := os.path.expanduser(dataset)):  # unlike Path's, False for a name that is too long
        found = _local_documents(Path(path), text_column)
    elif _looks_like_path(dataset):
        raise UsageError(f"no such file or folder: {dataset}")
    else:
        records = enumerate(hub_records(dataset), start=1)
        each = (_record_document(one, text_column, *[f"{dataset}:{number}"] * 2) for number, one in records)
        found, most_characters = chain.from_iterable(each), max_stream_characters
    return _checked(islice(found, max_documents), dataset, most_characters)


def split_held_out(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split into (train, held-out) documents, each in the order given.

    Distinct texts are sorted by a hash and the first of them, up to `fraction` of all characters, are held out: the
    split needs no seed, and copies of a text (up to case and white space) are on one side. Both sides get at least
    one text; UsageError if there is only one.
    """
    assert 0 < fraction < 1, fraction
    documents = list(documents)
    hashes = [_text_hash(document.text) for document in documents]
    characters: dict[str, int] = {}
    for key, document in zip(hashes, documents, strict=True):
        characters[key] = characters.get(key, 0) + len(document.text)
    if len(characters) < 2:
        raise UsageError("the corpus holds a single distinct text: give at least two documents, one to be held out")
    budget = fraction * sum(characters.values())
    held_out: set[str] = set()
    for key in sorted(characters)[:-1]:
        if held_out and budget < characters[key] / 2:  # whichever side of the cut is nearer to the fraction
            break
        held_out.add(key)
        budget -= characters[key]
    pairs = list(zip(hashes, documents, strict=True))
    return [doc for key, doc in pairs if key not in held_out], [doc for key, doc in pairs if key in held_out]


def _text_hash(text: str) -> str:
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).hexdigest()


def _checked(documents: Iterator[Document], dataset: str, most_characters: int | None) -> Iterator[Document]:
    """Yield the documents up to so many characters. Raises UsageError where there are none, LegatoError once all
    together do not fit into memory."""
    room, used = MAX_MEMORY_SHARE * psutil.virtual_memory().available, 0
    for document in documents:
        used += len(document.text)
        if used > room:
            raise LegatoError(f"{dataset} holds more text than fits into memory ({room / 2**30:.1f} GiB): give a part")
        yield document
        if most_characters is not None and used >= most_characters:
            return
    if used == 0:
        raise UsageError(f"no text in {dataset}: every document is empty or there is none")


def _demo_documents() -> Iterator[Document]:
    from legato.data.wikitext import to_prose

    gensim = importlib.util.find_spec("gensim")  # found, not imported: importing it takes seconds
    locations = list(gensim.submodule_search_locations or []) if gensim else []
    archive = Path(locations[0], DEMO_ARTICLES) if locations else None
    if archive is None or not archive.is_file():
        raise UsageError('the demo corpus is not installed: pip install "legato-sae[demo]"')
    with bz2.open(archive) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            namespace = page.tag.removesuffix("page")
            if page.find(f"{namespace}redirect") is None and page.findtext(f"{namespace}ns") == "0":
                prose = to_prose(page.findtext(f"{namespace}revision/{namespace}text") or "")
                if len(prose) >= MIN_ARTICLE_CHARACTERS:
                    yield Document(prose, f"gensim-enwiki/{page.findtext(f'{namespace}title')}")
            page.clear()


def _local_documents(path: Path, text_column: str) -> Iterator[Document]:
    if path.is_file():
        yield from _reader(path)(path, path.name, text_column)
        return
    if not path.is_dir():
        raise UsageError(f"{path} is no regular file and no folder: a corpus must be one that can be read again")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if os.path.isfile(file)
        and _suffix(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UsageError(f"no .txt, .jsonl, .jsonl.gz or .parquet file in the folder {path}")
    for file in files:
        yield from _reader(file)(file, file.relative_to(path).as_posix(), text_column)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)


def _reader(path: Path) -> Callable[[Path, str, str], Iterator[Document]]:
    suffix = _suffix(path)
    if suffix is None:
        raise UsageError(f"cannot read {path}: a corpus is .txt, .jsonl, .jsonl.gz, .parquet or a folder of these")
    return _READERS[suffix]


def _read_txt(path: Path, name: str, text_column: str) -> Iterator[Document]:
    try:
        needed = path.stat().st_size
        if needed > MAX_MEMORY_SHARE * psutil.virtual_memory().available:
            raise LegatoError(f"{path} has {needed / 2**30:.1f} GiB, more text than fits into memory: give a part")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if "\0" in text:
        raise UsageError(f"{path} holds NUL bytes, so it is binary or UTF-16: convert it first")
    parts = [part for part in _cut(text) if part.strip()]
    for number, part in enumerate(parts, start=1):
        yield Document(part, name if len(parts) == 1 else f"{name}#{number}")


def _cut(text: str) -> Iterator[str]:
    """Cut the text into parts of at least TEXT_PART_CHARACTERS, after a blank line, else a line end, else a space."""
    start = 0
    while len(text) - start > 2 * TEXT_PART_CHARACTERS:
        least, most = start + TEXT_PART_CHARACTERS, start + 2 * TEXT_PART_CHARACTERS
        cut = next((at + len(end) for end in ("\n\n", "\n", " ") if (at := text.find(end, least, most)) >= 0), most)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _read_jsonl(path: Path, name: str, text_column: str) -> Iterator[Document]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            for number in count(1):
                line = lines.readline(MAX_LINE_BYTES + 1)
                if not line:
                    break
                if len(line) > MAX_LINE_BYTES:
                    raise UsageError(f"{path}:{number} is longer than {MAX_LINE_BYTES:,} bytes: cut it into documents")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise UsageError(f"{path}:{number} is not UTF-8 text") from error
                except RecursionError as error:
                    raise UsageError(f"{path}:{number} is not JSON of a corpus: it is nested too deeply") from error
                except ValueError as error:  # also a number of thousands of digits
                    raise UsageError(f"{path}:{number} is not JSON: {error}") from error
                yield from _record_document(record, text_column, f"{path}:{number}", f"{name}:{number}")
    except (EOFError, OSError, zlib.error) as error:  # a cut archive, no archive (BadGzipFile), a damaged one
        raise UsageError(f"cannot read {path}: {error}") from error


def _read_parquet(path: Path, name: str, text_column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                raise UsageError(_no_column(text_column, str(path), file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_column]):
                for record in batch.to_pylist():
                    number += 1
                    yield from _record_document(record, text_column, f"{path}:{number}", f"{name}:{number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _record_document(record: object, text_column: str, place: str, source: str) -> Iterator[Document]:
    if not isinstance(record, dict):
        raise UsageError(f"{place} is not an object with a {text_column!r} key")
    if text_column not in record:
        raise UsageError(_no_column(text_column, place, list(record)))
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{place}: {text_column!r} is not text but {type(text).__name__}")
    if text and text.strip():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{place} holds half of a surrogate pair, which is no text: write it anew") from error
        yield Document(text.replace("\r\n", "\n"), source)


def _no_column(text_column: str, place: str, names: list[str]) -> str:
    more = ["..."] if len(names) > LISTED_COLUMNS else []
    shown = ", ".join([*map(str, names[:LISTED_COLUMNS]), *more]) or "nothing"
    return f"{place} has no {text_column!r} (it has: {shown}): name the text column"


_READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _looks_like_path(dataset: str) -> bool:
    return (
        _suffix(Path(dataset)) is not None
        or dataset.startswith(("/", "./", "../", "~"))
        or dataset.endswith("/")
        or dataset.count("/") > 1
        or "\\" in dataset
    )


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
