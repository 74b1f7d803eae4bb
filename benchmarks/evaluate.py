"""The core evaluation: Legato beside sae-bench, same SAE, model and tokens; seconds, peak memory, and every number.

    python benchmarks/evaluate.py --peer-python /path/to/python   (one that has sae-bench 0.6)

A small SAE is trained and saved as a SAELens folder, then judged by both. Legato's time is from tokens to metrics, its
consistency and position metrics included; sae-bench's is `run_evals` and its miscellaneous metrics. Loading the model
is left out on both sides, memory is the whole process's. sae-bench computes all logits of 16 contexts at once: 262,144
vocabulary entries in float32 take about 17 GiB at 128 tokens a context.

Shape legend: B rows, L positions, D width, F latents.
"""

import argparse
import json
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Claim,
    Contender,
    Measurement,
    Turns,
    claims_table,
    parser,
    peak_mib,
    python_of_peers,
    rates_table,
    serve,
    table,
    write_section,
)
from text import model_folder, token_array, token_set, write_tokens

BATCH_ROWS = 16  # sae-bench's default, which several of its numbers depend on
TOLERANCE = 1e-3
TRAINING_ROWS, TRAINING_STEPS = 512, 150


def main() -> None:
    options = parser(__doc__)
    python_of_peers(options, "sae-bench 0.6")
    options.add_argument("--model", default="demo", help="demo, or a folder that transformers can load")
    options.add_argument("--layer", type=int, default=9)
    options.add_argument("--rows", type=int, default=64, help=f"contexts, a multiple of {BATCH_ROWS}")
    options.add_argument("--context", type=int, default=128, help="tokens a context")
    options.add_argument("--d-sae", type=int, default=4096)
    options.add_argument("--dtype", default="float32", help="dtype of the model; sae-bench's default is float32")
    options.add_argument("--tokens", help=argparse.SUPPRESS)
    options.add_argument("--sae", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(lambda: contender(chosen))
        return

    folder = model_folder(chosen.model)
    with tempfile.TemporaryDirectory() as scratch:
        tokens, sae = Path(scratch, "tokens.npz"), Path(scratch, "sae")
        prepare(chosen, folder, tokens, sae)
        arguments = [f"--layer={chosen.layer}", f"--model={folder}", f"--dtype={chosen.dtype}"]
        arguments += [f"--tokens={tokens}", f"--sae={sae}"]
        contenders = [Contender("ours", arguments), Contender("sae-bench", arguments, chosen.peer_python)]
        turns = Turns.take(contenders, chosen.rounds)
        body = [
            f"{chosen.rows} contexts of {chosen.context} tokens, d_sae {chosen.d_sae}, {chosen.dtype}.",
            rates_table(turns, {"seconds": "seconds", "rate": "tokens/s", "peak_mib": "peak MiB"}),
            claims_table(
                [
                    Claim("ours / sae-bench, speed", turns.ratios("ours", "sae-bench"), 5),
                    Claim("ours / sae-bench, peak memory", turns.ratios("ours", "sae-bench", "peak_mib"), 1, False),
                ]
            ),
            numbers_table(tokens.parent),
        ]
    name = chosen.model if chosen.model == "demo" else Path(chosen.model).name
    title = f"Core evaluation, {name} layer {chosen.layer}, {chosen.dtype}"
    write_section(chosen.results, title, "\n\n".join(body), turns.versions.values())


def prepare(chosen: Namespace, folder: str, tokens: Path, sae: Path) -> None:
    """Write the tokens to judge on and a trained SAE."""
    from legato.common.hardware import fast_matmul_dtype
    from legato.data.activations import ActivationStream, Normaliser
    from legato.data.language_model import LanguageModel
    from legato.sae.architectures import BatchTopK
    from legato.training.bank import train_bank
    from legato.training.config import SAEConfig, TrainConfig
    from legato.training.step import TrainBatch

    model = LanguageModel.load(folder)
    write_tokens(tokens, model.tokenizer, rows=TRAINING_ROWS, context=chosen.context)
    source = ActivationStream(model, token_set(str(tokens)), layer=chosen.layer)
    batches = list(islice(source.batches(BATCH_ROWS, seed=0), TRAINING_STEPS))
    normaliser = Normaliser.fit(source, max_rows=128)

    def stream() -> Iterator[Any]:
        while True:
            yield from batches

    arm = SAEConfig("baseline", BatchTopK(32), chosen.d_sae)
    config = TrainConfig(steps=TRAINING_STEPS, lr=5e-3)
    trainer = train_bank([arm], stream(), normaliser, config, log=lambda record: None).finished[0]
    calibration = [TrainBatch.of(batch, normaliser, fast_matmul_dtype()) for batch in batches[:8]]
    trainer.finish(normaliser, calibration).save(sae)
    with np.load(tokens) as arrays:
        first = {name: array[: chosen.rows] for name, array in arrays.items()}
    np.savez(tokens, **first)


def contender(chosen: Namespace) -> Callable[[], Measurement]:
    judge = {"ours": ours, "sae-bench": sae_bench}[chosen.serve](chosen)
    rows_BL = token_array(chosen.tokens)
    judge(BATCH_ROWS)

    def measure() -> Measurement:
        start = time.perf_counter()
        metrics, features = judge(len(rows_BL))
        seconds = time.perf_counter() - start
        Path(chosen.tokens).with_name(f"{chosen.serve}.json").write_text(json.dumps([metrics, features]))
        return {"seconds": seconds, "rate": rows_BL.size / seconds, "peak_mib": peak_mib()}

    return measure


Numbers = tuple[dict[str, Any], dict[str, list[float]]]


def ours(chosen: Namespace) -> Callable[[int], Numbers]:
    from legato.data.activations import ActivationStream
    from legato.data.language_model import LanguageModel
    from legato.data.tokens import TokenSet
    from legato.evaluation.one_pass import evaluate
    from legato.sae.autoencoder import SparseAutoencoder

    model = LanguageModel.load(chosen.model, dtype=chosen.dtype)
    sae, tokens = SparseAutoencoder.load(chosen.sae), token_set(chosen.tokens)

    def judge(n_rows: int) -> Numbers:
        part = TokenSet(tokens.tokens_BL[:n_rows], tokens.mask_BL[:n_rows], tokens.doc_BL[:n_rows], tokens.bos)
        stream = ActivationStream(model, part, layer=chosen.layer)
        result = evaluate(sae, stream, language_model=model, layer=chosen.layer, ce_rows=n_rows)
        names = ("feature_density", "consistent_activation_heuristic", "encoder_bias", "encoder_norm")
        names += ("encoder_decoder_cosine_sim", "max_decoder_cosine_sim", "max_encoder_cosine_sim")
        return result["core"]["saebench"], {name: result["features"][name].tolist() for name in names}

    return judge


def sae_bench(chosen: Namespace) -> Callable[[int], Numbers]:
    os.environ["WANDB_MODE"] = "disabled"
    import torch
    from datasets import Dataset
    from sae_bench.custom_saes.base_sae import BaseSAE
    from sae_bench.evals.core import main as core
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore
    from safetensors.torch import load_file

    class Saved(BaseSAE):
        """The saved SAE, a jumprelu one."""

        def encode(self, x: Any) -> Any:
            pre = x @ self.W_enc + self.b_enc
            return torch.relu(pre) * (pre > self.threshold)

        def decode(self, feature_acts: Any) -> Any:
            return feature_acts @ self.W_dec + self.b_dec

        def forward(self, x: Any) -> Any:
            return self.decode(self.encode(x))

    dtype = getattr(torch, chosen.dtype)
    model = load_model("AutoModelForCausalLM", chosen.model, "cpu", {"dtype": dtype})
    hook = f"{'model.layers' if hasattr(model.model.base_model, 'layers') else 'transformer.h'}.{chosen.layer}"
    weights = load_file(Path(chosen.sae, "sae_weights.safetensors"))
    D, F = weights["W_enc"].shape
    sae = Saved(D, F, "local", chosen.layer, torch.device("cpu"), dtype, hook_name=hook)
    sae.cfg.architecture_str = "jumprelu"  # run_evals asks for it, BaseSAE lacks it
    sae.threshold = torch.nn.Parameter(weights.pop("threshold").to(dtype))
    for name, weight in weights.items():
        getattr(sae, name).data = weight.to(dtype)
    tokens = token_array(chosen.tokens)
    special = {model.tokenizer.pad_token_id, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id} - {None}

    def judge(n_rows: int) -> Numbers:
        store = ActivationsStore(
            model=model,
            dataset=Dataset.from_dict({"tokens": tokens[:n_rows]}),
            streaming=False,
            hook_name=hook,
            hook_head_index=None,
            context_size=tokens.shape[1],
            d_in=D,
            n_batches_in_buffer=1,
            total_training_tokens=n_rows,
            store_batch_size_prompts=BATCH_ROWS,
            train_batch_size_tokens=4096,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype=chosen.dtype,
        )
        config = core.CoreEvalConfig(
            model_name="local",
            batch_size_prompts=BATCH_ROWS,
            n_eval_reconstruction_batches=n_rows // BATCH_ROWS,
            n_eval_sparsity_variance_batches=n_rows // BATCH_ROWS,
            exclude_special_tokens_from_reconstruction=True,
            context_size=tokens.shape[1],
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            llm_dtype=chosen.dtype,
        )
        metrics, features = core.run_evals(sae, store, model, config, ignore_tokens=special)
        metrics["misc_metrics"] = core.calculate_misc_metrics(features)
        return core.replace_nans_with_negative_one(metrics), core.replace_nans_with_negative_one(features)

    return judge


def numbers_table(folder: Path) -> str:
    """Every scalar side by side; of the per-latent columns the share that agrees."""
    (own, own_columns), (theirs, their_columns) = (
        json.loads(Path(folder, f"{name}.json").read_text()) for name in ("ours", "sae-bench")
    )
    rows, agreeing = [], 0
    for category, values in theirs.items():
        for name, value in values.items():
            apart = abs(own[category][name] - value) / max(abs(value), 1e-12)
            agreeing += apart <= TOLERANCE
            rows.append([f"{category}.{name}", f"{own[category][name]:.6g}", f"{value:.6g}", f"{apart:.1e}"])
    summary = f"{agreeing} of {len(rows)} numbers agree to {TOLERANCE:g} relative."
    for name, column in their_columns.items():
        mine, other = np.asarray(own_columns[name]), np.asarray(column)
        close = np.isclose(mine, other, rtol=TOLERANCE, atol=1e-6)
        summary += f" `{name}`: {close.mean():.2%} of the latents."
    return f"{summary}\n\n{table(['number', 'ours', 'sae-bench', 'relative difference'], rows)}"


if __name__ == "__main__":
    main()
