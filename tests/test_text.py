"""Corpora of every kind, what goes wrong with them, and the held-out split."""

import gzip
import http.server
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legato.common.errors import LegatoError, UsageError
from legato.data.documents import TEXT_PART_CHARACTERS, Document, load_documents, split_held_out


def _write_jsonl(path: Path, texts: list[object], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffFirst line.\r\n\r\nCafé.".encode())
    assert list(load_documents(str(file))) == [Document("First line.\n\nCafé.", "a.txt")]


def test_long_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 200 for number in range(200))
    file = tmp_path / "book.txt"
    file.write_text(text)
    parts = list(load_documents(str(file)))
    assert "".join(part.text for part in parts) == text
    assert all(TEXT_PART_CHARACTERS <= len(part.text) <= 2 * TEXT_PART_CHARACTERS for part in parts[:-1])
    assert all(part.text.startswith("Paragraph ") for part in parts)
    assert [part.source for part in parts[:2]] == ["book.txt#1", "book.txt#2"]


@pytest.mark.parametrize("separator", ["", " ", "\n"])
def test_long_text_without_blank_lines_is_cut_all_the_same(tmp_path: Path, separator: str) -> None:
    text = separator.join(["x" * 99] * 1000)
    (tmp_path / "a.txt").write_text(text)
    parts = [part.text for part in load_documents(str(tmp_path / "a.txt"))]
    assert len(parts) >= 3
    assert "".join(parts) == text


def test_jsonl_names_the_line(tmp_path: Path) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", ["One.", "", "  ", None, "Two.\r\nThree."])
    assert list(load_documents(str(file))) == [Document("One.", "a.jsonl:1"), Document("Two.\nThree.", "a.jsonl:5")]


def test_compressed_jsonl_and_another_column(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"body": "One."}\n\n{"body": "Two."}\n')
    found = list(load_documents(str(tmp_path / "a.jsonl.gz"), text_column="body"))
    assert found == [Document("One.", "a.jsonl.gz:1"), Document("Two.", "a.jsonl.gz:3")]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["One.", None, "Two."], "other": [1, 2, 3]}), tmp_path / "a.parquet")
    found = list(load_documents(str(tmp_path / "a.parquet")))
    assert found == [Document("One.", "a.parquet:1"), Document("Two.", "a.parquet:3")]


def test_folder_is_read_in_depth_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", ".git/d.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    _write_jsonl(tmp_path / "a" / "a.jsonl", ["One.", "Two."])
    sources = [document.source for document in load_documents(str(tmp_path))]
    assert sources == ["a/a.jsonl:1", "a/a.jsonl:2", "a/c.txt", "b.txt"]
    assert len(list(load_documents(str(tmp_path), max_documents=3))) == 3


def test_shared_corpora(corpora: Path) -> None:
    documents = list(load_documents(str(corpora)))
    assert len(documents) == 5143  # as its README counts: 1674 + 500 + 59 + 65 + 1999 + 8 + 838
    assert documents[0].source == "abc_news.jsonl.gz:1"


BAD_CORPORA = [
    ("a.jsonl", b'{"text": "One."}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
    ("b.jsonl", b'{"text": "One."}\n"Two."\n', r"b\.jsonl:2 is not an object"),
    ("c.jsonl", b'{"body": "One.", "id": 1}\n', r"c\.jsonl:1 has no 'text' \(it has: body, id\)"),
    ("d.jsonl", b'{"text": 3}\n', r"d\.jsonl:1: 'text' is not text but int"),
    ("e.jsonl", b'{"text": "caf\xe9"}\n', r"e\.jsonl:1 is not UTF-8"),
    ("f.jsonl", b'\n{"text": ""}\n', r"no text in .*f\.jsonl"),
    ("g.jsonl.gz", b'{"text": "One."}\n', r"cannot read .*g\.jsonl\.gz: Not a gzipped file"),
    ("h.jsonl.gz", gzip.compress(b'{"text": "One."}\n' * 99)[:-12], r"cannot read .*h\.jsonl\.gz"),
    ("i.txt", b"caf\xe9", r"i\.txt is not UTF-8 text \(byte 3\)"),
    ("j.txt", b" \n", r"no text in .*j\.txt"),
    ("k.parquet", b"PAR1 nonsense PAR1", r"cannot read .*k\.parquet"),
    ("l.docx", b"PK", r"cannot read .*l\.docx: a corpus is \.txt"),
    ("m/n.md", b"", r"no \.txt, .* in the folder .*m"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_CORPORA, ids=[name for name, _, _ in BAD_CORPORA])
def test_bad_corpus_is_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        list(load_documents(str(tmp_path / name.partition("/")[0])))
    assert "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["One."]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet has no 'text' \(it has: body\)"):
        list(load_documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("dataset", ["missing.txt", "./missing", "/missing", "~/missing", "a/b/c", "missing/"])
def test_missing_file_is_not_looked_for_on_the_hub(dataset: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        load_documents(dataset)


# --- hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine that knows the data set owner/known and no other."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.startswith("/api/datasets/owner/known")
            body = json.dumps({"id": "owner/known", "siblings": []} if known else {"error": "Repository not found"})
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def _use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    pytest.importorskip("datasets", reason="needs the hub extra")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("hub")
def test_hub_streams_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: object, **options: object) -> datasets.IterableDataset:
        asked.append((args, options))
        return datasets.IterableDataset.from_generator(lambda: ({"text": f"Text {n}."} for n in range(10**9)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(load_documents("owner/known:en", max_documents=2))
    assert found == [Document("Text 0.", "owner/known:en:1"), Document("Text 1.", "owner/known:en:2")]
    assert asked == [(("owner/known", "en"), {"split": "train", "streaming": True})]
    assert len(list(load_documents("owner/known", max_stream_characters=17))) == 3  # 7 characters each
    with pytest.raises(UsageError, match=r"owner/known:1 has no 'body' \(it has: text\)"):
        next(load_documents("owner/known", text_column="body"))


class _Breaking:
    """Shards of a stream: 0 and 1 have 2,000 texts each, and 1 breaks off in its middle the first `breaks` times."""

    def __init__(self, breaks: int, error: Exception) -> None:
        self.breaks, self.error = breaks, error

    def __call__(self, shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            for number in range(2000):
                if shard == 1 and number == 1234 and self.breaks:
                    self.breaks -= 1
                    raise self.error
                yield {"text": f"Text {2000 * shard + number}."}


@pytest.fixture
def pauses(hub: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def _stream(monkeypatch: pytest.MonkeyPatch, breaking: _Breaking) -> list[Document]:
    import datasets

    def load_dataset(*_: object, **__: object) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(breaking, gen_kwargs={"shards": [0, 1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return list(load_documents("owner/known"))


def test_a_stream_that_breaks_goes_on_at_the_next_document(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _stream(monkeypatch, _Breaking(3, ConnectionError("Server\nDisconnected")))
    assert found == [Document(f"Text {n}.", f"owner/known:{n + 1}") for n in range(4000)]
    assert pauses == [1.0, 2.0, 4.0]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "hub data set owner/known stopped (Server Disconnected): going on there in 1 s"


def test_a_stream_that_stays_broken_is_an_error(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    http = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")  # the hub client's
    with pytest.raises(LegatoError, match="hub data set owner/known stopped: no answer") as caught:
        _stream(monkeypatch, _Breaking(10**6, http.ReadTimeout("no answer")))
    assert "\n" not in str(caught.value)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def test_what_is_no_fault_of_the_connection_is_not_tried_again(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="hub data set owner/known: no such split"):
        _stream(monkeypatch, _Breaking(1, ValueError("no such split")))
    assert pauses == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("dataset", ["owner/unknown", "unknown", "not a name"])
def test_unknown_hub_data_set(dataset: str) -> None:
    with pytest.raises(UsageError, match=f"no local file and no hub data set '{dataset}'"):
        next(load_documents(dataset))


def test_unreachable_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_endpoint(monkeypatch, "http://127.0.0.1:9")  # the discard port: nothing listens
    start = time.monotonic()
    with pytest.raises(LegatoError, match="no local file 'owner/name', and the hub cannot be asked for it") as caught:
        next(load_documents("owner/name"))
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_offline_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LegatoError, match="the hub cannot be asked"):
        next(load_documents("owner/name"))


@pytest.mark.parametrize(("dataset", "extra"), [("demo", "demo"), ("owner/name", "hub")])
def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, dataset: str, extra: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in {"gensim", "datasets"} else find_spec(name)
    )
    with pytest.raises(UsageError, match=rf"legato-sae\[{extra}\]"):
        next(load_documents(dataset))


# --- held-out split ---


def _documents(texts: list[str]) -> list[Document]:
    return [Document(text, f"s:{number}") for number, text in enumerate(texts)]


@given(
    texts=st.lists(st.text("ab ", min_size=1, max_size=9), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
)
def test_split_is_a_partition_that_keeps_copies_together(texts: list[str], fraction: float) -> None:
    def key(document: Document) -> str:
        return " ".join(document.text.split())

    documents = _documents(texts)
    if len({key(document) for document in documents}) < 2:
        with pytest.raises(UsageError, match="single distinct text"):
            split_held_out(documents, fraction)
        return
    train, held_out = split_held_out(documents, fraction)
    assert train
    assert held_out
    assert sorted(train + held_out, key=documents.index) == documents
    assert train == sorted(train, key=documents.index)
    assert not {key(document) for document in train} & {key(document) for document in held_out}


def test_split_size_is_near_the_fraction() -> None:
    documents = _documents([f"{number} " + "x" * 1000 for number in range(100)])
    train, held_out = split_held_out(documents, 0.1)
    assert (len(train), len(held_out)) == (90, 10)


def test_split_ignores_order_case_and_white_space() -> None:
    documents = _documents([f"Text number {number}." for number in range(50)])
    _, held_out = split_held_out(documents, 0.2)
    _, of_reversed = split_held_out(documents[::-1], 0.2)
    assert of_reversed == held_out[::-1]
    copies = _documents([document.text.upper().replace(" ", " \n") for document in documents])
    _, of_copies = split_held_out(documents + copies, 0.2)
    texts = {document.text.lower().replace(" \n", " ") for document in of_copies}
    assert texts == {document.text.lower() for document in held_out}
    assert len(of_copies) == 2 * len(held_out)
