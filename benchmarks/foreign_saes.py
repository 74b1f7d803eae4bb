"""SAEs by other tools, in their own code and formats: trained, saved, and what they compute. For docs/interop.md.

Runs where the tools are installed (`pip install sae-lens dictionary-learning`, or checkouts on PYTHONPATH), without
Legato; `interop.py` beside it gives the activations and judges what comes out.

    python foreign_saes.py ACTIVATIONS OUT MAKER [MAKER ...]     train and save OUT/<maker>/, what it computes beside it
    python foreign_saes.py ACTIVATIONS OUT --back                open what Legato exported, and compute again

Shape legend: N tokens, D width, F latents.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

F, K, STEPS, BATCH = 1024, 32, 200, 512
SAELENS = {
    "standard": {"l1_coefficient": 4.0},
    "topk": {"k": K},
    "batchtopk": {"k": float(K), "topk_threshold_lr": 0.1},
    "jumprelu": {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.05},
    "gated": {"l1_coefficient": 4.0},
    "matryoshka_batchtopk": {"k": float(K), "topk_threshold_lr": 0.1, "matryoshka_widths": [F // 8, F // 2, F]},
}
DICTIONARY_LEARNING = ("standard", "top_k", "batch_top_k", "jumprelu", "gdm", "matryoshka_batch_top_k")
MAKERS = (
    *(f"saelens_{name}" for name in SAELENS),
    *(f"dictionary_learning_{name}" for name in DICTIONARY_LEARNING),
    "temporal_saes",
    "sparsify",
    "gemma_scope",
)
PLACE = {"layer": 9, "lm_name": "demo", "submodule_name": "resid_post_layer_9"}


class Data:
    """Batches without end of the training tokens, in an order of its own."""

    config = {"ctx_len": 128}  # noqa: RUF012  what dictionary_learning saves of its buffer

    def __init__(self, acts_ND, batch=BATCH):
        self.acts_ND, self.batch = acts_ND, batch
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return self

    def __next__(self):
        rows = torch.randint(len(self.acts_ND), (self.batch,), generator=self.generator)
        return self.acts_ND[rows].clone()


def make_saelens(name, train_ND, folder):
    """A training save and an inference save of the same SAE."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = get_sae_training_class(name)
    config = config_class(
        d_in=train_ND.shape[1], d_sae=F, normalize_activations="expected_average_only_in", **SAELENS[name]
    )
    config.metadata.model_name, config.metadata.hook_name = "demo", "blocks.9.hook_resid_post"
    config.metadata.context_size, config.metadata.prepend_bos = 128, True
    sae = sae_class(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=2e-3,
            lr_end=2e-3,
            n_batches_for_norm_estimate=20,
        ),
        sae,
        Data(train_ND),
    )
    trained = trainer.fit()
    trained.save_model(folder / "training")
    trained.save_inference_model(folder / "inference")


def open_saelens(folder):
    from sae_lens import SAE

    return SAE.load_from_disk(folder / "inference" if (folder / "inference").is_dir() else folder)


def make_dictionary_learning(name, train_ND, folder):
    from importlib import import_module

    from dictionary_learning.training import trainSAE

    module = import_module(f"dictionary_learning.trainers.{name}")
    trainer, own = {
        "standard": ("StandardTrainer", {"l1_penalty": 0.06, "sparsity_warmup_steps": 20, "lr": 1e-3}),
        "top_k": ("TopKTrainer", {"k": K, "lr": 1e-3}),
        "batch_top_k": ("BatchTopKTrainer", {"k": K, "lr": 1e-3, "threshold_start_step": 20}),
        "jumprelu": ("JumpReluTrainer", {"sparsity_warmup_steps": 20, "lr": 1e-3, "target_l0": float(K)}),
        "gdm": ("GatedSAETrainer", {"l1_penalty": 0.06, "sparsity_warmup_steps": 20, "lr": 1e-3}),
        "matryoshka_batch_top_k": (
            "MatryoshkaBatchTopKTrainer",
            {"k": K, "lr": 1e-3, "group_fractions": [0.25, 0.75], "threshold_start_step": 20},
        ),
    }[name]
    config = {
        "trainer": getattr(module, trainer),
        "steps": STEPS,
        "activation_dim": train_ND.shape[1],
        "dict_size": F,
        "warmup_steps": 20,
        "seed": 0,
        "device": "cpu",
        **PLACE,
        **own,
    }
    data = Data(train_ND)
    trainSAE(data, [config], STEPS, save_dir=str(folder), normalize_activations=True, device="cpu")


def open_dictionary_learning(folder):
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder / "trainer_0"), device="cpu")[0]


def make_temporal_saes(train_ND, folder):
    """The fork's trainer on pairs of neighbouring tokens, saved as its training loop does."""
    from dictionary_learning.trainers.temporal_sequence_top_k import TemporalMatryoshkaBatchTopKTrainer

    torch.manual_seed(0)
    trainer = TemporalMatryoshkaBatchTopKTrainer(
        steps=STEPS,
        activation_dim=train_ND.shape[1],
        dict_size=F,
        k=K,
        temporal=True,
        contrastive=True,
        group_fractions=[0.2, 0.8],
        group_weights=[0.2, 0.8],
        lr=1e-3,
        warmup_steps=20,
        threshold_start_step=20,
        device="cpu",
        **PLACE,
    )
    factor = float(train_ND.square().sum(1).mean().sqrt())
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        row = torch.randint(len(train_ND) - 1, (BATCH // 2,), generator=generator)
        trainer.update(step, torch.stack([train_ND[row], train_ND[row + 1]], 1) / factor)
    trainer.ae.scale_biases(factor)
    (folder / "trainer_0").mkdir(parents=True)
    (folder / "trainer_0" / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": Data.config}))
    torch.save(trainer.ae.state_dict(), folder / "trainer_0" / "ae.pt")


def open_temporal_saes(folder):
    from dictionary_learning.trainers.temporal_sequence_top_k import TemporalMatryoshkaBatchTopKSAE

    return TemporalMatryoshkaBatchTopKSAE.from_pretrained(str(folder / "trainer_0" / "ae.pt"), device="cpu")


def make_sparsify(train_ND, folder):
    """Its coder and its loss (the fraction of variance unexplained), in a loop of our own: its trainer wants a hub."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    torch.manual_seed(0)
    coder = SparseCoder(train_ND.shape[1], SparseCoderConfig(num_latents=F, k=K))
    coder.b_dec.data = train_ND.mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
    data = Data(train_ND)
    for _ in range(STEPS):
        coder.set_decoder_norm_to_unit_norm()
        coder(next(data)).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    coder.set_decoder_norm_to_unit_norm()
    coder.save_to_disk(folder / "layers.9")
    (folder / "config.json").write_text(json.dumps({"model": "demo", "ctx_len": 128}))


class OpenSparsify:
    def __init__(self, folder):
        from sparsify.sparse_coder import SparseCoder

        self.coder = SparseCoder.load_from_disk(folder / "layers.9")

    def encode(self, acts_ND):
        top = self.coder.encode(acts_ND)
        return torch.zeros(len(acts_ND), self.coder.num_latents).scatter_(1, top.top_indices, top.top_acts)

    def decode(self, codes_NF):
        top = codes_NF.topk(self.coder.cfg.k)
        return self.coder.decode(top.values, top.indices)


def make_gemma_scope(train_ND, folder):
    """A JumpReLU SAE of dictionary_learning under the names of the published files."""
    make_dictionary_learning("jumprelu", train_ND, folder / "made")
    state = torch.load(folder / "made" / "trainer_0" / "ae.pt", weights_only=True)
    place = folder / "layer_9" / "width_1k" / "average_l0_32"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **{name: tensor.numpy() for name, tensor in state.items()})


def open_gemma_scope(folder):
    """By SAELens' loader of Gemma Scope, pointed at the file."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    loaders.hf_hub_download = lambda repo_id, filename, subfolder, force_download: str(folder / subfolder / filename)
    place = "layer_9/width_1k/average_l0_32"
    _, state, _ = loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", place)
    D, n_latents = state["W_enc"].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=n_latents, apply_b_dec_to_input=False))
    sae.load_state_dict(state)
    return sae


def opened(maker, folder):
    if maker.startswith("saelens_"):
        return open_saelens(folder)
    if maker.startswith("dictionary_learning_"):
        return open_dictionary_learning(folder)
    if maker == "temporal_saes":
        return open_temporal_saes(folder)
    return OpenSparsify(folder) if maker.startswith("sparsify") else open_gemma_scope(folder)


def make(maker, train_ND, folder):
    if maker.startswith("saelens_"):
        make_saelens(maker.removeprefix("saelens_"), train_ND, folder)
    elif maker.startswith("dictionary_learning_"):
        make_dictionary_learning(maker.removeprefix("dictionary_learning_"), train_ND, folder)
    else:
        {"temporal_saes": make_temporal_saes, "sparsify": make_sparsify, "gemma_scope": make_gemma_scope}[maker](
            train_ND, folder
        )


@torch.no_grad()
def computed(sae, acts):
    """Codes and reconstructions of the random and the real activations."""
    found = {}
    for name in ("random", "real"):
        codes_NF = sae.encode(acts[name])
        codes_NF = codes_NF.to_dense() if codes_NF.is_sparse else codes_NF
        found |= {f"{name}_codes": codes_NF.contiguous(), f"{name}_recon": sae.decode(codes_NF).contiguous()}
    return found


def main(activations, out, *makers):
    acts, out = load_file(activations), Path(out)
    if makers == ("--back",):
        for folder in sorted((out / "exported").iterdir()):
            maker, tool = folder.name.rsplit(".", 1)
            sae = open_saelens(folder) if tool == "saelens" else opened(tool_opener(maker, tool), folder)
            save_file(computed(sae, acts), out / "back" / f"{folder.name}.safetensors")
            print("opened", folder.name, flush=True)
        return
    for maker in makers:
        torch.manual_seed(0)
        folder = out / maker
        make(maker, acts["train"], folder)
        save_file(computed(opened(maker, folder), acts), out / f"{maker}.safetensors")
        print("made", maker, flush=True)


def tool_opener(maker, tool):
    return maker if maker.startswith(tool) else f"{tool}_"


if __name__ == "__main__":
    main(*sys.argv[1:])
