"""What a table of bad inputs needs: the case, the world it happens in, and what must be true of every one of them."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from small_experiment import RESULTS, experiment_main, script_main, write_corpus
from synthetic_run import write_synthetic_run
from tiny_models import save_tiny_model

from legato.sae.architectures import architecture_named
from legato.sae.autoencoder import SparseAutoencoder

SECONDS = 30  # most cases take 0.1 s; this many is a hang
NOTICE = "converting GGUF weights"  # what may be said before the line
D = 48  # width of the tiny models


@dataclass(frozen=True)
class World:
    """Sound inputs, shared and never written to, and a folder of the case's own."""

    model: Path
    corpus: Path
    sae: Path
    run: Path
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def file(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@dataclass(frozen=True)
class Case:
    """arguments: a command line, or what prepares the input and returns one. says: what the one line must contain."""

    name: str
    command: str
    arguments: Callable[[World], list[object]]
    says: tuple[str, ...]
    code: int = 2


def flags(command: str, table: list[tuple[str, str, str]]) -> list[Case]:
    """Cases that are only flags: (flags, what the line says is wrong, what it says to do)."""
    return [Case(given, command, lambda world, given=given: given.split(" "), says) for given, *says in table]


def legato_main() -> Callable[[list[str]], int]:
    from legato.cli import main

    return main


@cache
def plot_main() -> Callable[[list[str]], int]:
    return script_main("plot")


def experiment(world: World, given: list[object]) -> int:
    options = {
        "model": world.model,
        "dataset": world.corpus,
        "out_dir": world.out,
        "context_length": 16,
        "held_out": 0.3,
        "tokens": 1000,
        "batch_rows": 4,
        "d_sae": 64,
        "k": 4,
        "eval_rows": 8,
        "ce_rows": 0,
        "temporal": "",
        "controls": "",
    }
    return experiment_main()([*(f"--{key}={value}" for key, value in options.items()), "--no-ablation", *texts(given)])


def evaluate(world: World, given: list[object]) -> int:
    """`legato evaluate` of the SAEs and options given, on the tiny model."""
    options = {"model": world.model, "dataset": world.corpus, "layer": 1, "out": world.out, "rows": 4, "ce_rows": 0}
    return legato_main()(
        ["evaluate", *(f"--{key}={value}" for key, value in options.items()), "--context_length=16", *texts(given)]
    )


COMMANDS: dict[str, Callable[[World, list[object]], int]] = {
    "experiment": experiment,
    "evaluate": evaluate,
    "legato": lambda world, given: legato_main()(texts(given)),
    "plot": lambda world, given: plot_main()([f"--out={world.out}", *texts(given)]),
}


def texts(given: list[object]) -> list[str]:
    return [str(part) for part in given]


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("sound")
    model = save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    corpus = write_corpus(folder / "corpus", 12)
    sae = random_sae().save(folder / "sae")
    run = write_synthetic_run(folder / "run_1", named=("contrastive",), latents=40, context=16)
    return World(model, corpus, sae, run, folder)


def random_sae(
    architecture: str = "jumprelu",
    *,
    d_in: int = D,
    d_sae: int = 64,
    details: dict[str, object] | None = None,
    **numbers: object,
) -> SparseAutoencoder:
    draw = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=draw), dim=1)
    kind = architecture_named(architecture).of(numbers, {"threshold": torch.full((d_sae,), 0.1)})
    return SparseAutoencoder(
        W_dec.T.contiguous(), torch.zeros(d_sae), W_dec, torch.zeros(d_in), kind, {} if details is None else details
    )


class Hang(BaseException):
    """Nothing that handles errors may take it for one."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises Hang where the block runs longer; time in which the whole process is suspended does not count."""
    ticks = 0

    def tick(*_: object) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == seconds:
            raise Hang(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(case: Case, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr that says what is wrong and what to do, the exit code, nothing that looks like a result."""
    given = case.arguments(world)
    capsys.readouterr()
    with at_most(SECONDS):
        code = COMMANDS[case.command](world, given)
    said = capsys.readouterr().err
    shown = "".join(line for line in said.splitlines(keepends=True) if not line.startswith(NOTICE))
    assert shown.startswith("error: "), shown
    assert shown.count("\n") == 1, shown
    assert len(shown) < 1000, shown
    assert "Traceback" not in shown
    for says in case.says:
        assert says in shown
    assert code == case.code, shown
    left = [name for name in RESULTS if (world.out / name).exists()]
    assert not left, left
    assert not (world.folder / "ran").exists()
    assert code == 1 or not world.out.exists()
