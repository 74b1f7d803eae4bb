"""Speed of the harvest: Legato, a bare transformers forward pass, SAELens' ActivationsStore, the matrix products alone.

    python benchmarks/harvest.py --peer-python /path/to/python   (one that has sae-lens)

Everybody reads the same rows of tokens with the same model folder, layer and dtype. Legato's time is from tokens to a
finished store on the disk; the bare forward pass stops after the layer and keeps nothing, as SAELens does.

Shape legend: B rows, L positions, D width, N tokens of a batch.
"""

import argparse
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

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
    write_section,
)
from text import model_folder, token_array, token_set, write_tokens


def main() -> None:
    options = parser(__doc__)
    python_of_peers(options, "sae-lens")
    options.add_argument("--model", default="demo", help="demo, or a folder that transformers can load")
    options.add_argument("--layer", type=int, default=9)
    options.add_argument("--rows", type=int, default=256, help="contexts a turn")
    options.add_argument("--context", type=int, default=128, help="tokens a context")
    options.add_argument("--batch-rows", type=int, default=32, help="contexts a forward pass")
    options.add_argument("--dtype", default="auto", help="auto: what Legato chooses on this machine")
    options.add_argument("--tokens", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve:
        serve(lambda: contender(chosen))
        return

    from legato.data.language_model import LanguageModel

    folder = model_folder(chosen.model)
    model = LanguageModel.load(folder, dtype=chosen.dtype)
    dtype = str(model.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch, "tokens.npz")
        write_tokens(tokens, model.tokenizer, rows=chosen.rows, context=chosen.context)
        shared = ("layer", "batch-rows", "context")
        arguments = [f"--{name}={getattr(chosen, name.replace('-', '_'))}" for name in shared]
        arguments += [f"--model={folder}", f"--dtype={dtype}", f"--tokens={tokens}"]
        del model
        contenders = [
            *(Contender(name, arguments) for name in ("ours", "ours, not stored", "bare sdpa", "bare eager")),
            Contender("saelens", arguments, chosen.peer_python),
            Contender("matmuls", arguments),
        ]
        turns = Turns.take(contenders, chosen.rounds)
    bare = turns.faster("bare sdpa", "bare eager")
    shown = [
        Claim(
            f"ours / bare transformers ({bare.removeprefix('bare ')} attention, the faster)",
            turns.ratios("ours", bare),
            1.25,
        ),
        Claim("ours / SAELens' ActivationsStore", turns.ratios("ours", "saelens")),
        Claim("SAELens' ActivationsStore / bare transformers", turns.ratios("saelens", bare)),
        Claim("ours / the layers' matrix products alone", turns.ratios("ours", "matmuls")),
        Claim("bare transformers / the matrix products alone", turns.ratios(bare, "matmuls")),
    ]
    title = f"Harvest, {chosen.model if chosen.model == 'demo' else Path(chosen.model).name} layer {chosen.layer}"
    setting = f"{chosen.rows} contexts of {chosen.context} tokens a turn, {chosen.batch_rows} a forward pass, {dtype}."
    rates = rates_table(turns, {"rate": "tokens/s", "peak_mib": "peak MiB"})
    write_section(chosen.results, title, f"{setting}\n\n{rates}\n\n{claims_table(shown)}", turns.versions.values())


def contender(chosen: Namespace) -> Callable[[], Measurement]:
    build = {"ours": ours, "ours, not stored": stream, "saelens": saelens, "matmuls": matmuls}.get(chosen.serve, bare)
    read_all = build(chosen)
    n_tokens = token_array(chosen.tokens).size
    read_all()

    def measure() -> Measurement:
        start = time.perf_counter()
        read_all()
        return {"rate": n_tokens / (time.perf_counter() - start), "peak_mib": peak_mib()}

    return measure


def ours(chosen: Namespace) -> Callable[[], object]:
    from legato.data.harvest import harvest
    from legato.data.language_model import LanguageModel

    model, tokens = LanguageModel.load(chosen.model, dtype=chosen.dtype), token_set(chosen.tokens)
    model.fingerprint()  # once a process, whatever is harvested
    numbers, scratch = count(), Path(chosen.tokens).parent

    def read_all() -> None:
        path = scratch / f"store{next(numbers)}"
        harvest(model, tokens, layer=chosen.layer, path=path, batch_rows=chosen.batch_rows)
        shutil.rmtree(path)

    return read_all


def stream(chosen: Namespace) -> Callable[[], object]:
    from legato.data.activations import ActivationStream
    from legato.data.language_model import LanguageModel

    model, tokens = LanguageModel.load(chosen.model, dtype=chosen.dtype), token_set(chosen.tokens)

    def read_all() -> None:
        for _ in ActivationStream(model, tokens, layer=chosen.layer).batches(chosen.batch_rows, seed=None):
            pass

    return read_all


def bare(chosen: Namespace) -> Callable[[], object]:
    """transformers' own forward pass through the first layers, nothing else."""
    import torch
    from transformers import AutoModelForCausalLM

    attention = chosen.serve.removeprefix("bare ")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        chosen.model, dtype=getattr(torch, chosen.dtype), attn_implementation=attention
    )
    base = loaded.eval().base_model
    name = "layers" if hasattr(base, "layers") else "h"
    setattr(base, name, getattr(base, name)[: chosen.layer + 1])
    batches = torch.from_numpy(token_array(chosen.tokens)).split(chosen.batch_rows)

    @torch.no_grad()
    def read_all() -> None:
        for tokens_BL in batches:
            base(input_ids=tokens_BL, use_cache=False)

    return read_all


def matmuls(chosen: Namespace) -> Callable[[], object]:
    """Every linear map of the layers, on batches of the same size."""
    import torch

    from legato.data.language_model import LanguageModel

    model = LanguageModel.load(chosen.model, dtype=chosen.dtype)
    parts = [model.module_path(layer) for layer in range(chosen.layer + 1)]
    products: list[Callable[[], object]] = []
    rows = token_array(chosen.tokens).shape[0]
    N = chosen.batch_rows * chosen.context
    for module in (module for part in parts for module in model.model.get_submodule(part).modules()):
        if type(module).__name__ in ("Linear", "Conv1D"):
            weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
            x_ND, out = (
                torch.randn(N, weight.shape[0]).to(weight.dtype),
                torch.empty(N, weight.shape[1], dtype=weight.dtype),
            )
            products.append(partial(torch.mm, x_ND, weight, out=out))

    @torch.no_grad()
    def read_all() -> None:
        for _ in range(0, rows, chosen.batch_rows):
            for product in products:
                product()

    return read_all


def saelens(chosen: Namespace) -> Callable[[], object]:
    import torch
    from datasets import Dataset
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore

    dtype = getattr(torch, chosen.dtype)
    model = load_model("AutoModelForCausalLM", chosen.model, "cpu", {"dtype": dtype})
    rows = token_array(chosen.tokens)
    list_name = "model.layers" if hasattr(model.model.base_model, "layers") else "transformer.h"
    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"tokens": rows}),
        streaming=False,
        hook_name=f"{list_name}.{chosen.layer}",
        hook_head_index=None,
        context_size=chosen.context,
        d_in=model.model.config.hidden_size,
        n_batches_in_buffer=1,
        total_training_tokens=rows.size,
        store_batch_size_prompts=chosen.batch_rows,
        train_batch_size_tokens=4096,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=chosen.dtype,
    )

    def read_all() -> None:
        for _ in range(0, len(rows), chosen.batch_rows):
            store.get_raw_llm_batch()

    return read_all


if __name__ == "__main__":
    main()
