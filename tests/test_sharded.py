"""SAEs whose latents are divided over ranks follow those of one process, and each rank holds its part only."""

import dataclasses
import json
from pathlib import Path

import pytest
from killing import path_for_children
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint import BANK, SHORT
from test_train import NESTED, InMemory, planted_batches

from legato.common import distributed
from legato.common.hardware import settle_matmul_dtype
from legato.data.activations import Normaliser
from legato.sae.architectures import BatchTopK, Gated, HysteresisTopK, Persistent, TopK, WindowTopK
from legato.sae.partition import SINGLE, Sharded
from legato.training.bank import BankState, train_on
from legato.training.config import SAEConfig
from legato.training.losses import Slowness

STEPS, D = 12, 32
CONFIG = dataclasses.replace(SHORT, steps=STEPS, lr=2e-3, dead_after_tokens=300, log_every=1)
ODD = 67
MORE = [
    SAEConfig("hysteresis_topk", HysteresisTopK(4, release=0.5), ODD, (Slowness(window=4, coefficient=0.05),)),
    SAEConfig("window_topk", WindowTopK(4, window=4), ODD),
    SAEConfig("persistent", Persistent(4), ODD),
    SAEConfig("gated_matryoshka", Gated(1.0, k=4), ODD, groups=NESTED),
    SAEConfig("frozen", TopK(4), ODD, freeze_decoder=True),
    SAEConfig("matryoshka", BatchTopK(4), ODD, groups=NESTED),
]
# With seed 0 the first gradient of a latent of "wide" is 1e-10, by cancellation, and Adam makes a whole step of it.
ARMS = [dataclasses.replace(arm, seed=1) if arm.name == "wide" else arm for arm in (*BANK, *MORE)]


def train(dtype: str, folder: Path) -> None:
    """Train the bank and save the losses of every step and the weights."""
    settle_matmul_dtype(dtype)
    with distributed.process_group():
        rank, size = distributed.rank(), distributed.world_size()
        partition = Sharded(rank, size) if size > 1 else SINGLE
        log = []
        result = train_on(
            BankState.new(ARMS, CONFIG, D, partition=partition),
            planted_batches(STEPS),
            Normaliser.fit(InMemory()),
            CONFIG,
            log=log.append,
            after_step=lambda state: None,
        )
        assert [trainer.arm.name for trainer, _ in result.failed] == ["explodes"]
        assert max(record.get("dead", 0) for record in log) > 0  # the auxiliary loss takes part
        weights = {}
        for trainer in result.finished:
            rows = -(-trainer.arm.d_sae // size)
            matrices = [tensor for _, tensor in trainer.first_moment.items() if tensor.ndim == 2]
            matrices += [trainer.parameters.W_enc_FD, trainer.parameters.W_dec_FD, trainer.low_W_enc_HD]
            assert max(tensor.shape[0] for tensor in matrices) <= rows
            whole = trainer.whole_parameters()
            weights |= {f"{trainer.arm.name}.{name}": tensor.contiguous() for name, tensor in whole.items()}
        widest = -(-2 * 64 // size)
        buffers = {name: buffer.numel() for name, buffer in result.finished[0]._workspace._buffers.items()}
        assert buffers["pre"] <= 8 * 16 * widest
        assert buffers["gW_enc_FD"] == buffers["gW_dec_FD"] <= widest * D
        folder.mkdir(exist_ok=True)
        (folder / f"log_{rank}.json").write_text(json.dumps([record for record in log if "loss" in record]))
        if rank == 0:
            save_file(weights, folder / "weights")


@pytest.mark.parametrize(("dtype", "rank_counts"), [("float32", (2, 4)), ("bfloat16", (3,))])
def test_every_kind_of_sae_takes_the_course_of_one_process(dtype, rank_counts, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_for_children())
    for n_ranks in (1, *rank_counts):
        run_ranks(n_ranks, train, dtype, tmp_path / str(n_ranks), folder=tmp_path)
    one = load_file(tmp_path / "1" / "weights")
    one_log = json.loads((tmp_path / "1" / "log_0.json").read_text())
    for n_ranks in rank_counts:
        many = load_file(tmp_path / str(n_ranks) / "weights")
        assert many.keys() == one.keys()
        for name, tensor in many.items():
            assert float((tensor - one[name]).norm()) <= 1e-5 * float(one[name].norm()), (n_ranks, name)
        for rank in range(n_ranks):
            log = json.loads((tmp_path / str(n_ranks) / f"log_{rank}.json").read_text())
            for record, expected in zip(log, one_log, strict=True):
                place = f"{record['arm']} at step {record['step']} by {n_ranks} ranks"
                assert record["arm"] == expected["arm"]
                assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5), place
                assert record["loss_terms"] == pytest.approx(expected["loss_terms"], rel=1e-4, abs=1e-6), place
                assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), place
                assert (record["l0"], record["dead"]) == (expected["l0"], expected["dead"]), place
