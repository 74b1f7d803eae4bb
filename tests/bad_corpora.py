"""Corpora that cannot be trained on: files, their encodings, archives, columns, and folders of them."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bad_input import Case, World

WORDS = " ".join(f"w{3 + n % 90}" for n in range(200))


def line(**record: object) -> str:
    return json.dumps(record) + "\n"


def parquet(**columns: list[object]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def damaged(content: bytes, start: int) -> bytes:
    """With 8 bytes changed."""
    start %= len(content)
    return content[:start] + bytes(byte ^ 0x5A for byte in content[start : start + 8]) + content[start + 8 :]


JSONL = (line(text=WORDS) * 3).encode()
GZ = gzip.compress(JSONL)
PARQUET = parquet(text=[WORDS, WORDS + " w5"])

# File, content, what the line must say beside the file's name.
_FILES: list[tuple[str, bytes | str, str, str]] = [
    ("corpus.txt", "", "no text in", ""),
    ("corpus.txt", " \n\t\n", "no text in", ""),
    ("corpus.txt", WORDS, "single distinct text", "give at least two documents"),
    ("corpus.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "is not UTF-8 text (byte 0)", "convert it first"),
    ("corpus.txt", "Überall".encode("latin-1"), "is not UTF-8 text (byte 0)", "convert it first"),
    ("corpus.txt", WORDS.encode("utf-16"), "is not UTF-8 text (byte 0)", "convert it first"),
    ("corpus.txt", WORDS.encode("utf-16-le"), "holds NUL bytes", "convert it first"),
    ("corpus.txt", b"\x00" * 1000, "holds NUL bytes", "convert it first"),
    ("corpus.txt", WORDS.encode() + b"\xff" + WORDS.encode(), "is not UTF-8 text (byte", "convert it first"),
    ("corpus.csv", "text\nw3 w4\n", "a corpus is .txt, .jsonl, .jsonl.gz, .parquet", "folder"),
    ("corpus.json", line(text=WORDS), "a corpus is .txt, .jsonl, .jsonl.gz, .parquet", "folder"),
    ("corpus.txt.gz", gzip.compress(WORDS.encode()), "a corpus is .txt, .jsonl, .jsonl.gz, .parquet", "folder"),
    ("corpus", WORDS, "a corpus is .txt, .jsonl, .jsonl.gz, .parquet", "folder"),
    ("corpus.jsonl", "", "no text in", ""),
    ("corpus.jsonl", "\n\n", "no text in", ""),
    ("corpus.jsonl", "w3 w4\n", ":1 is not JSON", "Expecting value"),
    ("corpus.jsonl", line(text=WORDS) + '{"text": "w3', ":2 is not JSON", "Unterminated string"),
    ("corpus.jsonl", b'{"text": "\xff"}\n', ":1 is not UTF-8 text", ""),
    ("corpus.jsonl", b"\x00\x01\x02\n", ":1 is not JSON", ""),
    ("corpus.jsonl", WORDS.encode("utf-16"), ":1 is not UTF-8 text", ""),
    ("corpus.jsonl", '["w3 w4"]\n', ":1 is not an object with a 'text' key", ""),
    ("corpus.jsonl", '"w3 w4"\n', ":1 is not an object with a 'text' key", ""),
    ("corpus.jsonl", "null\n", ":1 is not an object with a 'text' key", ""),
    ("corpus.jsonl", "17\n", ":1 is not an object with a 'text' key", ""),
    ("corpus.jsonl", line(body=WORDS), "has no 'text' (it has: body)", "name the text column"),
    ("corpus.jsonl", "{}\n", "has no 'text' (it has: nothing)", "name the text column"),
    ("corpus.jsonl", line(text=["w3", "w4"]), "'text' is not text but list", ""),
    ("corpus.jsonl", line(text={"en": WORDS}), "'text' is not text but dict", ""),
    ("corpus.jsonl", line(text=3), "'text' is not text but int", ""),
    ("corpus.jsonl", line(text=True), "'text' is not text but bool", ""),
    ("corpus.jsonl", line(text=None) * 3, "no text in", ""),
    ("corpus.jsonl", line(text=""), "no text in", ""),
    ("corpus.jsonl", '{"text": "\\ud800 w3"}\n' * 2, ":1", "half of a surrogate pair"),
    ("corpus.jsonl", '{"text": ' + "[" * 100_000 + "\n", ":1 is not JSON", "nested too deeply"),
    ("corpus.jsonl", '{"text": ' + "9" * 5000 + "}\n", ":1 is not JSON", ""),
    ("corpus.jsonl", line(**{f"column{n}": 0 for n in range(5000)}), "has no 'text'", "name the text column"),
    ("corpus.jsonl.gz", b"", "no text in", ""),
    ("corpus.jsonl.gz", JSONL, "cannot read", "Not a gzipped file"),
    ("corpus.jsonl.gz", GZ[: len(GZ) // 2], "cannot read", "ended before the end-of-stream marker"),
    ("corpus.jsonl.gz", damaged(GZ, len(GZ) // 2), "cannot read", ""),
    ("corpus.jsonl.gz", GZ[:-8] + b"\x00" * 8, "cannot read", "CRC check failed"),
    ("corpus.jsonl.gz", GZ + b"trailing rubbish", "cannot read", "Not a gzipped file"),
    ("corpus.parquet", b"", "cannot read", ""),
    ("corpus.parquet", b"PAR1", "cannot read", ""),
    ("corpus.parquet", JSONL, "cannot read", ""),
    ("corpus.parquet", PARQUET[:-20], "cannot read", ""),
    ("corpus.parquet", damaged(PARQUET, 4), "cannot read", ""),
    ("corpus.parquet", damaged(PARQUET, -16), "cannot read", ""),
    ("corpus.parquet", parquet(body=[WORDS]), "has no 'text' (it has: body)", "name the text column"),
    ("corpus.parquet", parquet(text=[3, 4]), "'text' is not text but int", ""),
    ("corpus.parquet", parquet(text=[b"\xff"]), "'text' is not text but bytes", ""),
    ("corpus.parquet", parquet(text=[[WORDS]]), "'text' is not text but list", ""),
    ("corpus.parquet", parquet(text=pa.array([], pa.string())), "no text in", ""),
    ("corpus.parquet", parquet(text=[None, None]), "no text in", ""),
    ("corpus.parquet", parquet(text=["QQQQ w3"]).replace(b"QQQQ", b"\xff\xff\xff\xff"), "cannot read", "utf-8"),
]


def _file_case(number: int, name: str, content: bytes | str, what: str, to_do: str) -> Case:
    return Case(
        f"{name} {number}: {what}",
        "experiment",
        lambda world: [f"--dataset={world.file(name, content)}"],
        ("corpus", what, to_do),
    )


def _folder(*files: tuple[str, bytes | str]) -> Callable[[World], list[object]]:
    def prepared(world: World) -> list[object]:
        folder = world.folder / "corpus"
        folder.mkdir()
        for name, content in files:
            world.file(f"corpus/{name}", content)
        return [f"--dataset={folder}"]

    return prepared


def _prepared(make: Callable[[Path], object], name: str = "corpus.jsonl") -> Callable[[World], list[object]]:
    def prepared(world: World) -> list[object]:
        make(world.folder / name)
        return [f"--dataset={world.folder / name}"]

    return prepared


def _fifo_in_folder(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "a.txt")


def _bomb(path: Path) -> None:
    """One line of 100 MB in 100 kB."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"w3 w4 w5 w6 w7 w8 w9 w10 " * 40_000)


def _loop(path: Path) -> None:
    path.symlink_to(path)


_NONE = "no .txt, .jsonl, .jsonl.gz or .parquet file in the folder"
_OTHERS = [
    Case("an empty folder", "experiment", _folder(), (_NONE,)),
    Case("a folder of other files", "experiment", _folder(("a.csv", "w3"), ("b.json", "{}")), (_NONE,)),
    Case("a folder of hidden files", "experiment", _folder((".a.txt", WORDS), (".git/b.txt", WORDS)), (_NONE,)),
    Case("a folder, one file damaged", "experiment", _folder(("a.txt", WORDS), ("b.jsonl", "{")), ("b.jsonl:1",)),
    Case("a folder of copies", "experiment", _folder(*((f"{n}.txt", WORDS) for n in range(9))), ("single distinct",)),
    Case("a folder that is called a file", "experiment", _prepared(lambda path: path.mkdir()), (_NONE,)),
    Case("a FIFO", "experiment", _prepared(os.mkfifo), ("corpus.jsonl is no regular file",)),
    Case("a FIFO in a folder", "experiment", _prepared(_fifo_in_folder, "corpus"), (_NONE,)),
    Case(
        "a broken symlink", "experiment", _prepared(lambda path: path.symlink_to("gone")), ("no such file or folder",)
    ),
    Case("a symlink to itself", "experiment", _prepared(_loop), ("no such file or folder",)),
    Case("a bomb", "experiment", _prepared(_bomb, "corpus.jsonl.gz"), (":1 is longer than 67,108,864 bytes", "cut it")),
    Case("a device", "experiment", lambda world: ["--dataset=/dev/zero"], ("/dev/zero is no regular file",)),
    Case(
        "a text column that the folder's files lack",
        "experiment",
        lambda world: [*_folder(("a.jsonl", line(text=WORDS)))(world), "--text_column=body"],
        ("has no 'body' (it has: text)", "name the text column"),
    ),
]

CASES = [*(_file_case(number, *entry) for number, entry in enumerate(_FILES)), *_OTHERS]
