"""Speed of one training step: Legato, SAELens, dictionary_learning, and the encoder's matmul alone as the limit.

    python benchmarks/train_step.py --peer-python /path/to/python   (one that has sae-lens and dictionary-learning)

Everybody trains one SAE on the same stream of Gaussian noise. Legato's time includes normalising the activations. Also
measured: what the temporal terms cost, and how far the loss curve is from a dense autograd step's.

Shape legend: N flat tokens, D width, F latents.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from common import (
    Claim,
    Contender,
    Measurement,
    Turns,
    claims_table,
    parser,
    python_of_peers,
    rate_over,
    rates_table,
    serve,
    table,
    write_section,
)

CONTEXT = 128
LR = 3e-4
TERMS = ("window2", "window8", "window64", "contrastive")
PEERS = ("saelens", "saelens-autocast", "dictionary_learning")


def main() -> None:
    options = parser(__doc__)
    python_of_peers(options, "sae-lens and dictionary-learning")
    options.add_argument("--d-in", type=int, default=640)
    options.add_argument("--d-sae", type=int, default=10240)
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--batch", type=int, default=4096, help="tokens a step")
    options.add_argument(
        "--seconds", type=float, default=3.0, help="least length of a turn, which has two steps or more"
    )
    options.add_argument("--parts", default="batchtopk,topk,terms,loss", help="what to measure, comma-separated")
    options.add_argument("--loss-steps", type=int, default=60, help="steps of the loss curves")
    options.add_argument("--loss-d-sae", type=int, default=4096, help="latents of the SAEs of the loss curves")
    options.add_argument("--loss-batch", type=int, default=1024, help="tokens a step of the loss curves")
    chosen = options.parse_args()
    if chosen.serve:
        serve(lambda: contender(chosen))
        return

    parts = chosen.parts.split(",")
    dims = f"d_in {chosen.d_in}, d_sae {chosen.d_sae}, k {chosen.k}, batch {chosen.batch}"
    body, used = [], []
    for part in (part for part in ("batchtopk", "topk", "terms") if part in parts):
        turns = Turns.take(started(part, chosen), chosen.rounds)
        used += turns.versions.values()
        body.append(rates_table(turns, {"rate": "tokens/s", "ms": "ms/step", "peak_mib": "peak MiB"}))
        body.append(claims_table(claims(part, turns, is_wide=chosen.d_in > 2000)))
    if "loss" in parts:
        body.append(loss_table(chosen))
    write_section(chosen.results, f"Training step, {dims}", "\n\n".join(body), used)


def started(part: str, chosen: Namespace) -> Iterator[Contender]:
    arguments = [
        f"--{name}={getattr(chosen, name.replace('-', '_'))}" for name in ("d-in", "d-sae", "k", "batch", "seconds")
    ]
    if part == "terms":
        for term in ("", *TERMS):
            yield Contender(f"ours batchtopk {term}".strip(), arguments)
        return
    yield Contender(f"ours {part}", arguments)
    for peer in PEERS:
        yield Contender(f"{peer} {part}", arguments, chosen.peer_python)
    yield Contender("matmul", arguments)


def claims(part: str, turns: Turns, is_wide: bool) -> list[Claim]:
    if part == "terms":
        return [
            Claim(
                f"step with {term} / step without",
                turns.ratios(f"ours batchtopk {term}", "ours batchtopk", "ms"),
                1.15,
                False,
            )
            for term in TERMS
        ]
    ours = f"ours {part}"
    shown = [Claim(f"ours / {peer} {part}", turns.ratios(ours, f"{peer} {part}")) for peer in PEERS]
    if part == "batchtopk":
        shown[0] = Claim(shown[0].text, shown[0].values, 8 if is_wide else 15)
    else:
        fastest = turns.faster("saelens topk", "dictionary_learning topk")
        shown.append(Claim(f"ours / the faster of both without autocast ({fastest})", turns.ratios(ours, fastest), 8))
    shown.append(Claim("ours / encoder matmul alone", turns.ratios(ours, "matmul"), None if is_wide else 0.4))
    return shown


def contender(chosen: Namespace) -> Callable[[], Measurement]:
    """One warmed-up contender."""
    import torch

    torch.manual_seed(0)
    pool_4ND = torch.randn(4, chosen.batch, chosen.d_in)
    who, *rest = chosen.serve.split()
    build = {"ours": ours, "matmul": matmul, "dictionary_learning": dictionary_learning}.get(who, saelens)
    step = build(chosen, pool_4ND, *rest)
    for _ in range(3):
        step()
    return lambda: rate_over(chosen.seconds, chosen.batch, step)


def ours(chosen: Namespace, pool_4ND: Any, sparsity: str, term: str = "") -> Callable[[], object]:
    """From raw activations to updated weights."""
    import torch

    from legato.common.hardware import fast_matmul_dtype
    from legato.data.activations import ActivationBatch, Normaliser
    from legato.sae.architectures import BatchTopK, TopK
    from legato.training.config import SAEConfig, TrainConfig
    from legato.training.losses import Contrastive, WindowVariance
    from legato.training.step import TrainBatch, Workspace
    from legato.training.trainer import SAETrainer

    terms = {
        "": (),
        "contrastive": (Contrastive(coefficient=0.1),),
        **{f"window{w}": (WindowVariance(window=w, coefficient=0.3),) for w in (2, 8, 64)},
    }[term]
    arm = SAEConfig("bench", {"batchtopk": BatchTopK, "topk": TopK}[sparsity](chosen.k), chosen.d_sae, terms)
    trainer = SAETrainer(arm, TrainConfig(steps=10**6, lr=LR), chosen.d_in, Workspace())
    B = chosen.batch // CONTEXT
    mask_BL = torch.ones(B, CONTEXT, dtype=torch.bool)
    doc_BL = torch.arange(B, dtype=torch.int32)[:, None].expand(B, CONTEXT).contiguous()
    raw = [ActivationBatch(x_ND.view(B, CONTEXT, -1), mask_BL, doc_BL, doc_BL.long()) for x_ND in pool_4ND]
    normaliser, dtype, numbers = Normaliser(torch.zeros(chosen.d_in), 1.0), fast_matmul_dtype(), count()
    return lambda: trainer.step(TrainBatch.of(raw[next(numbers) % 4], normaliser, dtype))


def matmul(chosen: Namespace, pool_4ND: Any) -> Callable[[], object]:
    """The limit: x W_enc in the dtype that is fast on this machine."""
    import torch

    from legato.common.hardware import fast_matmul_dtype

    dtype = fast_matmul_dtype()
    x_ND, W_FD = pool_4ND[0].to(dtype), torch.randn(chosen.d_sae, chosen.d_in).to(dtype)
    out_NF = torch.empty(chosen.batch, chosen.d_sae, dtype=dtype)
    return lambda: torch.mm(x_ND, W_FD.T, out=out_NF)


def saelens(chosen: Namespace, pool_4ND: Any, sparsity: str) -> Callable[[], object]:
    os.environ["WANDB_MODE"] = "disabled"
    import sae_lens as sl
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {"d_in": chosen.d_in, "d_sae": chosen.d_sae, "k": chosen.k, "device": "cpu"}
    if sparsity == "batchtopk":
        sae = sl.BatchTopKTrainingSAE(sl.BatchTopKTrainingSAEConfig(**shape))
    else:
        sae = sl.TopKTrainingSAE(sl.TopKTrainingSAEConfig(**shape))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=chosen.batch,
        device="cpu",
        autocast=chosen.serve.startswith("saelens-autocast"),
        lr=LR,
        lr_end=LR / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        dead_feature_window=1000,
        feature_sampling_window=10**9,
        checkpoint_path=None,
        n_checkpoints=0,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    numbers = count()
    stream = (pool_4ND[i % 4] for i in count())
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=stream)
    return lambda: trainer.step(pool_4ND[next(numbers) % 4])


def dictionary_learning(chosen: Namespace, pool_4ND: Any, sparsity: str) -> Callable[[], object]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = {"batchtopk": BatchTopKTrainer, "topk": TopKTrainer}[sparsity](
        steps=10**6,
        activation_dim=chosen.d_in,
        dict_size=chosen.d_sae,
        k=chosen.k,
        layer=0,
        lm_name="none",
        device="cpu",
        lr=LR,
        seed=0,
    )
    numbers = count()

    def step() -> None:
        number = next(numbers)
        trainer.update(number, pool_4ND[number % 4])

    return step


def loss_table(chosen: Namespace) -> str:
    """Losses of Legato's step beside a dense float32 autograd step, same start, data and optimiser."""
    from legato.sae.architectures import BatchTopK, TopK
    from legato.training.losses import WindowVariance

    rows = []
    for name, sparsity, terms in (
        ("batchtopk", BatchTopK(chosen.k), ()),
        ("topk", TopK(chosen.k), ()),
        ("batchtopk, window_variance 8 x 0.3", BatchTopK(chosen.k), (WindowVariance(window=8, coefficient=0.3),)),
    ):
        sparse, dense = loss_curves(chosen, sparsity, terms)
        apart = [abs(a - b) / b for a, b in zip(sparse, dense, strict=True)]
        rows.append([name, f"{dense[0]:.4f}", f"{sparse[-1]:.6f}", f"{dense[-1]:.6f}", f"{max(apart):.1e}"])
    head = [
        f"loss curve, d_sae {chosen.loss_d_sae}, {chosen.loss_batch} tokens a step",
        "first loss",
        f"ours, step {chosen.loss_steps}",
        "dense",
        "largest relative difference",
    ]
    return table(head, rows)


def loss_curves(chosen: Namespace, sparsity: Any, terms: Any) -> tuple[list[float], list[float]]:
    import torch

    from legato.common.hardware import fast_matmul_dtype
    from legato.data.activations import ActivationBatch, Normaliser
    from legato.training.config import SAEConfig, TrainConfig
    from legato.training.step import Parameters, TrainBatch, Workspace
    from legato.training.trainer import SAETrainer

    config = TrainConfig(steps=chosen.loss_steps, lr=1e-3)
    trainer = SAETrainer(SAEConfig("bench", sparsity, chosen.loss_d_sae, terms), config, chosen.d_in, Workspace())
    weights = [w.requires_grad_() for _, w in Parameters.initial(chosen.d_in, chosen.loss_d_sae, 0).items()]
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = weights
    adam = torch.optim.Adam(weights, betas=(0.9, 0.999), eps=1e-8)
    normaliser = Normaliser(torch.zeros(chosen.d_in), 1.0)
    sparse, dense = [], []
    for step, raw in enumerate(planted(chosen, ActivationBatch)):
        batch = TrainBatch.of(raw, normaliser, fast_matmul_dtype())
        sparse.append(trainer.step(batch)["loss"])

        pre_NF = (batch.x_ND @ W_enc_FD.T + b_enc_F).relu()
        if type(sparsity).__name__ == "BatchTopK":
            cut = pre_NF.detach().flatten().topk(chosen.k * batch.n_valid).values[-1]
        else:
            cut = pre_NF.detach().topk(chosen.k, dim=-1).values[:, -1:]
        codes_NF = pre_NF * (pre_NF >= cut)
        loss = (codes_NF @ W_dec_FD + b_dec_D - batch.x_ND).square().sum(-1).mean() / chosen.d_in
        for term in terms:
            codes_BLF = codes_NF.unflatten(0, raw.mask_BL.shape)
            scale = term.coefficient * trainer.arm.term_scale_at(step, config.steps)
            loss = loss + scale * term.loss(codes_BLF, raw.mask_BL, raw.doc_BL, step)
        dense.append(loss.item())
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec_FD.grad -= (W_dec_FD.grad * W_dec_FD).sum(-1, keepdim=True) * W_dec_FD
            torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
            adam.param_groups[0]["lr"] = config.lr_at(step)
            adam.step()
            W_dec_FD /= W_dec_FD.norm(dim=-1, keepdim=True)
    return sparse, dense


def planted(chosen: Namespace, record: Any) -> Iterator[Any]:
    """Batches with something to learn: each token is a sum of k / 2 of 2048 fixed directions, and a little noise."""
    import torch

    generator = torch.Generator().manual_seed(1)
    directions_SD = torch.nn.functional.normalize(torch.randn(2048, chosen.d_in, generator=generator), dim=-1)
    B = chosen.loss_batch // CONTEXT
    mask_BL = torch.ones(B, CONTEXT, dtype=torch.bool)
    doc_BL = torch.arange(B, dtype=torch.int32)[:, None].expand(B, CONTEXT).contiguous()
    for _ in range(chosen.loss_steps):
        active_NS = torch.rand(chosen.loss_batch, 2048, generator=generator) < chosen.k / 2 / 2048
        sizes_NS = active_NS * -torch.rand(chosen.loss_batch, 2048, generator=generator).clamp_min(1e-9).log()
        x_ND = sizes_NS @ directions_SD + 0.01 * torch.randn(chosen.loss_batch, chosen.d_in, generator=generator)
        x_ND *= (chosen.d_in / x_ND.square().sum(-1).mean()).sqrt()
        yield record(x_ND.view(B, CONTEXT, -1), mask_BL, doc_BL, doc_BL.long())


if __name__ == "__main__":
    main()
