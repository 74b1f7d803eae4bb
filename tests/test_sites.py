"""Every site of many architectures: what blocks add makes up the residual stream, and splicing is what hooks do."""

import math
from typing import Any

import pytest
import torch
import transformers
from tiny_models import small_network, tiny_tokenizer, tiny_tokens

from legato.common.errors import UsageError
from legato.data.language_model import LanguageModel
from legato.evaluation.core.splice import splice_losses
from legato.sae.formats.hook_names import layer_and_site

SEQUENTIAL = (
    "gpt2 gpt_bigcode gpt-sw3 opt biogpt bloom mpt ctrl starcoder2 phi3 llama mistral ministral mixtral qwen2 "
    "qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text vaultgemma olmo olmo2 olmo3 olmoe flex_olmo glm glm4 "
    "glm4_moe exaone4 granite granitemoe granitemoeshared minicpm3 smollm3 seed_oss nemotron persimmon "
    "deepseek_v2 dots1 ernie4_5_moe gpt_oss lfm2 llama4_text phimoe arcee apertus helium nanochat hunyuan_v1_moe "
    "jetmoe "
)
PARALLEL = "gptj gpt_neox codegen phi cohere cohere2"
MULTIMODAL = "llama4 gemma3"
ALL = f"{SEQUENTIAL} {PARALLEL} {MULTIMODAL}".split()
OPTIONS: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": {"residual_multiplier": 0.22, "logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "helium": {"head_dim": 12},
}
TOKENS_BL = tiny_tokens(2, 12)


def loaded(name: str, **options: Any) -> LanguageModel:
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return LanguageModel(small_network(name, **OPTIONS.get(name, {}) | options), tiny_tokenizer(), name)


@torch.no_grad()
def plain_pass(lm: LanguageModel, layer: int, replacement: torch.Tensor | None = None) -> tuple[Any, Any, Any]:
    """Input and output of a decoder layer, and the logits, by ordinary hooks on the whole model."""
    seen: dict[str, torch.Tensor] = {}

    def hook(_module: object, args: Any, kwargs: Any, output: Any) -> Any:
        seen["in"] = (args[0] if args else kwargs["hidden_states"]).clone()
        seen["out"] = (output[0] if isinstance(output, (tuple, list)) else output).clone()
        if replacement is None:
            return None
        return type(output)((replacement, *output[1:])) if isinstance(output, (tuple, list)) else replacement

    handle = lm._layers[layer].register_forward_hook(hook, with_kwargs=True)
    logits = lm.model(input_ids=TOKENS_BL, use_cache=False).logits
    handle.remove()
    return seen["in"], seen["out"], logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)  # logits of nothing may be zeros
    assert error.max() <= tolerance, float(error.max())


@pytest.mark.parametrize("name", ALL)
def test_blocks_make_up_the_stream_and_the_stream_can_be_spliced(name: str) -> None:
    lm = loaded(name)
    for layer in (1, lm.n_layers - 1):
        before, after, logits = plain_pass(lm, layer)
        acts_BLD = lm.activations(TOKENS_BL, layer)
        assert_near(acts_BLD, after)
        assert_near(lm.activations(TOKENS_BL, layer, "resid_pre"), before)
        blocks = [lm.activations(TOKENS_BL, layer, site) for site in ("attn_out", "mlp_out")]
        assert min(float(block.norm() / after.norm()) for block in blocks) > 1e-4
        assert_near(before + sum(blocks), after)
        if name in PARALLEL.split():
            with pytest.raises(UsageError, match=f"{name}: no module of layer {layer} holds its resid_mid"):
                lm.activations(TOKENS_BL, layer, "resid_mid")
        else:
            assert_near(lm.activations(TOKENS_BL, layer, "resid_mid"), before + blocks[0])
        for replaced in (acts_BLD, torch.zeros_like(acts_BLD), acts_BLD.flip(1)):
            expected = plain_pass(lm, layer, replaced)[2]
            hidden = lm.resume(replaced, TOKENS_BL, layer).flatten(0, 1)
            assert_near(lm.unembed(hidden), expected.flatten(0, 1), 1e-4)
        for site, block in zip(("attn_out", "mlp_out"), blocks, strict=True):
            own = lm.unembed(lm.resume(block, TOKENS_BL, layer, site).flatten(0, 1))
            assert_near(own, logits.flatten(0, 1), 1e-4)
        # Without its MLP a sequential layer gives the stream between the two.
        without = lm.resume(torch.zeros_like(blocks[1]), TOKENS_BL, layer, "mlp_out")
        assert_near(without, lm.resume(after - blocks[1], TOKENS_BL, layer), 1e-4)


@pytest.mark.parametrize("name", ["bloom", "granite", "gemma2", "cohere", "phimoe", "lfm2"])
def test_losses_are_those_of_transformers(name: str) -> None:
    """Clean, with another stream in its place, and ablated: next-token losses as the model's own logits give them."""
    lm = loaded(name)
    acts_BLD = lm.activations(TOKENS_BL, 1)
    spliced = {"other": acts_BLD.flip(1), "ablated": torch.zeros_like(acts_BLD)}
    counted_BL = torch.ones_like(TOKENS_BL, dtype=torch.bool)
    counted_BL[:, -1] = False
    clean, losses = splice_losses(lm, acts_BLD, TOKENS_BL, spliced, counted_BL, layer=1, site="resid_post")
    for measured, replacement in ((clean, None), *((losses[key], value) for key, value in spliced.items())):
        logits = plain_pass(lm, 1, replacement)[2][:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS_BL[:, 1:].flatten())
        assert measured.ce_N.mean() == pytest.approx(float(expected), rel=1e-4)


def test_a_block_that_adds_the_stream_itself_is_read_without_it() -> None:
    lm = loaded("bloom")
    assert str(lm.site(1, "mlp_out")) == "transformer.h.1.mlp.dense_4h_to_h"
    _before, after, _ = plain_pass(lm, 1)
    raw = lm.activations(TOKENS_BL, 1, "mlp")  # the module itself hands out the whole stream
    assert_near(raw, after)


def test_a_factor_outside_the_module_is_part_of_what_it_adds() -> None:
    lm = loaded("granite")
    assert str(lm.site(1, "attn_out")) == "model.layers.1.self_attn * 0.22"
    assert str(lm.site(1, "resid_mid")) == "model.layers.1.self_attn * 0.22 + model.layers.1:input"
    assert_near(
        lm.activations(TOKENS_BL, 1, "attn_out"), 0.22 * lm.activations(TOKENS_BL, 1, "self_attn"), tolerance=1e-4
    )


def test_module_paths_are_raw_outputs_and_inputs() -> None:
    lm = loaded("gemma2")
    seen = {}
    layer = lm._layers[2]
    handles = [
        module.register_forward_hook(
            lambda _m, args, out, name=name: seen.update({name: out, f"{name}:input": args[0]})
        )
        for name, module in (("mlp", layer.mlp), ("post_feedforward_layernorm", layer.post_feedforward_layernorm))
    ]
    with torch.no_grad():
        lm.model(input_ids=TOKENS_BL, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, expected in seen.items():
        assert_near(lm.activations(TOKENS_BL, 2, name), expected)
        assert torch.equal(lm.activations(TOKENS_BL, 2, f"model.layers.2.{name}"), lm.activations(TOKENS_BL, 2, name))
    assert torch.equal(
        lm.activations(TOKENS_BL, 2, "attn_out"), lm.activations(TOKENS_BL, 2, "post_attention_layernorm")
    )
    down = lm.activations(TOKENS_BL, 2, "mlp.down_proj:input")
    assert down.shape[-1] == 80
    hidden = lm.resume(down, TOKENS_BL, 2, "mlp.down_proj:input")
    assert_near(lm.unembed(hidden.flatten(0, 1)), plain_pass(lm, 2)[2].flatten(0, 1), 1e-4)
    embedded = lm.activations(TOKENS_BL, 0, "model.embed_tokens")
    assert embedded.shape == (*TOKENS_BL.shape, lm.d_model)
    assert_near(
        lm.unembed(lm.resume(embedded, TOKENS_BL, 0, "model.embed_tokens").flatten(0, 1)),
        plain_pass(lm, 2)[2].flatten(0, 1),
        1e-4,
    )


def test_heads_before_they_are_mixed() -> None:
    lm = loaded("gemma2")
    z_BLH = lm.activations(TOKENS_BL, 1, "attn_z")
    assert z_BLH.shape[-1] == 4 * 16
    mixed = lm._layers[1].self_attn.o_proj(z_BLH)
    assert_near(mixed, lm.activations(TOKENS_BL, 1, "self_attn"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_normalised_is_before_gain_and_bias(name: str) -> None:
    lm = loaded(name)
    for norm, site in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
        x = lm.activations(TOKENS_BL, 1, site)
        if name == "gpt2":
            x = x - x.mean(-1, keepdim=True)
        value = lm.activations(TOKENS_BL, 1, f"{norm}.hook_normalized")
        assert_near(value, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), 1e-4)
        assert value.square().mean(-1).allclose(torch.ones(()), atol=1e-3)
    with pytest.raises(UsageError, match="--ce_rows 0"):
        lm.check(1, "ln1.hook_normalized", splice=True)
    lm.check(1, "ln1.hook_normalized", splice=False)


def test_centred_is_less_the_mean_where_the_norms_subtract_it() -> None:
    for name, is_centred in (("gpt2", True), ("llama", False)):
        lm = loaded(name)
        plain, centred = (lm.activations(TOKENS_BL, 1, site) for site in ("resid_post", "resid_post:centred"))
        assert torch.allclose(centred, plain - plain.mean(-1, keepdim=True) if is_centred else plain, atol=1e-6)
        whole = f"{lm.module_path(1)}:centred"  # a path in the model is the same place, centred too
        assert torch.equal(lm.activations(TOKENS_BL, 1, whole), centred)
        own = lm.unembed(lm.resume(centred, TOKENS_BL, 1, "resid_post:centred").flatten(0, 1))
        assert_near(own, plain_pass(lm, 1)[2].flatten(0, 1), 1e-4)  # no norm after it sees the mean


def test_what_cannot_be_read_or_spliced_is_refused_in_one_line() -> None:
    streams = loaded("gemma3n_text")  # four streams of hidden states
    with pytest.raises(UsageError, match=r"gemma3n_text: .* hands out \[4, 1, 8, 48\], not one vector a token"):
        streams.site(1, "resid_post")
    with pytest.raises(UsageError, match="no module of layer 1 holds its attn_out"):
        loaded("minimax").site(1, "attn_out")  # scales the stream itself as well
    mamba = loaded("mamba")
    with pytest.raises(UsageError, match=r"mamba: no module of layer 1 holds its attn_out \(norm, mixer\)"):
        mamba.site(1, "attn_out")
    with pytest.raises(
        UsageError, match=r"unknown site 'resid_pots': give resid_post, .* or the path of a module \(norm"
    ):
        mamba.site(1, "resid_pots")
    assert mamba.site(1, "mixer").width == 48
    head = loaded("modernbert-decoder")  # more than one matrix makes its logits
    with pytest.raises(UsageError, match=r"cannot be spliced at model.layers.1.*; --ce_rows 0 leaves"):
        head.check(1, "resid_post", splice=True)
    normed = loaded("bert")  # its norms come after the sum
    with pytest.raises(UsageError, match="holds its mlp_out"):
        normed.site(1, "mlp_out")


def test_the_dtype_is_that_of_what_is_read() -> None:
    lm = LanguageModel(small_network("mamba", residual_in_fp32=True).bfloat16(), tiny_tokenizer(), "mamba")
    at = lm.site(1, "resid_post")
    assert (at.dtype, lm.activations(TOKENS_BL, 1).dtype) == (torch.float32, torch.float32)
    assert lm.resume(lm.activations(TOKENS_BL, 1), TOKENS_BL, 1).dtype in (torch.float32, torch.bfloat16)
    assert math.isfinite(float(lm.activations(TOKENS_BL, 1).sum()))


@pytest.mark.parametrize(
    ("hook_name", "place"),
    [
        ("blocks.9.hook_resid_post", (9, "resid_post")),
        ("blocks.9.hook_resid_pre", (8, "resid_post")),
        ("blocks.0.hook_resid_pre", (0, "resid_pre")),
        ("blocks.9.hook_resid_mid", (9, "resid_mid")),
        ("blocks.9.hook_mlp_out", (9, "mlp_out")),
        ("blocks.9.hook_attn_out", (9, "attn_out")),
        ("blocks.9.attn.hook_z", (9, "attn_z")),
        ("blocks.9.ln2.hook_normalized", (9, "ln2.hook_normalized")),
        ("model.layers.9", (9, "resid_post")),
        ("layers.9.mlp", (9, "mlp")),
        ("model.layers.9.self_attn", (9, "self_attn")),
        ("model.layers.9.post_attention_layernorm", (9, "post_attention_layernorm")),
        ("transformer.h.3.attn", (3, "attn")),
        ("resid_post_layer_9", (9, "resid_post")),
        ("mlp_out_layer_9", (9, "mlp_out")),
    ],
)
def test_names_of_other_tools(hook_name: str, place: tuple[int, str]) -> None:
    assert layer_and_site(hook_name) == place


@pytest.mark.parametrize("hook_name", ["blocks.9.attn.hook_q", "hook_embed", "blocks.9.mlp.hook_post", "nonsense"])
def test_other_names_are_refused(hook_name: str) -> None:
    with pytest.raises(UsageError, match=f"the SAE reads {hook_name}, which is none of blocks.N.hook_resid_pre, "):
        layer_and_site(hook_name)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_sandwich_and_plain_norms_are_not_taken_for_each_other(name: str) -> None:
    """The raw outputs of the modules are not what Gemma 2's blocks add; Llama's norm of that name is before the MLP."""
    lm = loaded(name)
    raw, added = (lm.activations(TOKENS_BL, *place) for place in (layer_and_site("layers.1.mlp"), (1, "mlp_out")))
    assert torch.equal(raw, added) == (name == "llama")
    normed = lm.activations(TOKENS_BL, *layer_and_site("layers.1.post_attention_layernorm"))
    attention = lm.activations(TOKENS_BL, 1, "attn_out")
    assert torch.equal(normed, attention) == (name == "gemma2")
    if name == "llama":
        expected = lm._layers[1].post_attention_layernorm(lm.activations(TOKENS_BL, 1, "resid_mid"))
        assert_near(normed, expected)
