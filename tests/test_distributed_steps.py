"""SAEs that several ranks train together are those that one process trains, to the last bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from killing import path_for_children
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint import BANK, SHORT
from test_train import InMemory, planted_batches

from legato.common import distributed
from legato.common.hardware import settle_matmul_dtype
from legato.data.activations import Normaliser
from legato.sae.partition import Partition
from legato.training.bank import BankState, train_on

STEPS = 16
CONFIG = dataclasses.replace(SHORT, steps=STEPS, dead_after_tokens=300)


def train(dtype: str, path: Path) -> None:
    """Train the bank and save all that its next step depends on."""
    settle_matmul_dtype(dtype)
    with distributed.process_group():
        partition = Partition(distributed.rank(), distributed.world_size())
        bank = BankState.new(BANK, CONFIG, 32, partition=partition)
        result = train_on(
            bank,
            planted_batches(STEPS),
            Normaliser.fit(InMemory()),
            CONFIG,
            log=lambda record: None,
            after_step=lambda state: None,
        )
        assert [trainer.arm.name for trainer, _ in result.failed] == ["explodes"]
        state = {}
        for trainer in result.finished:
            assert trainer.partition == partition
            numbers = {**trainer.numbers(), "seconds": 0.0, "at_start": 0.0, "guard": trainer.guard.typical_norm}
            state |= {f"{trainer.arm.name}.{name}": tensor for name, tensor in trainer.tensors().items()}
            values = [float(number) for number in numbers.values()]
            state[f"{trainer.arm.name}.numbers"] = torch.tensor(values, dtype=torch.float64)
        dead = {trainer.arm.name: int(trainer.dead_F.sum()) for trainer in result.finished}
        assert max(dead.values()) > 0, dead  # the auxiliary loss takes part
        save_file(state, f"{path}_{partition.rank}")


@pytest.mark.parametrize(("dtype", "n_ranks"), [("bfloat16", 2), ("float32", 3)])
def test_every_kind_of_sae_trained_together(dtype, n_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_for_children())
    run_ranks(1, train, dtype, tmp_path / "one", folder=tmp_path)
    run_ranks(n_ranks, train, dtype, tmp_path / "many", folder=tmp_path)
    one = load_file(tmp_path / "one_0")
    for rank in range(n_ranks):
        many = load_file(tmp_path / f"many_{rank}")
        assert many.keys() == one.keys()
        assert {name for name in one if not torch.equal(many[name], one[name])} == set()
