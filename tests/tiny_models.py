"""Small random language models of real architectures, with a tokenizer, as transformers would save them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"activation_function": "gelu_new"}),
    "gpt_neox": ("GPTNeoX", {"rope_parameters": _ROTARY | {"partial_rotary_factor": 0.5}}),
    "gpt_neox_serial": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "opt": ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "bloom": ("Bloom", {"n_layer": 4, "n_head": 4}),  # its layers return tuples
    "llama": ("Llama", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", _GROUPED),
    "gemma": ("Gemma", _GROUPED | {"head_dim": 20}),
    "gemma2": ("Gemma2", _GROUPED | {"sliding_window": 7, "query_pre_attn_scalar": 20, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", _GROUPED | {"sliding_window": 7, "query_pre_attn_scalar": 20, "layer_types": _LAYER_TYPES}),
}
FUSED = ("gpt2", "gpt_neox", "gpt_neox_serial", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def tiny_network(architecture: str, **overrides: Any) -> Any:
    """A network with random weights, norms and biases included."""
    name, options = ARCHITECTURES[architecture]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config_class(**_SIZES | options | overrides)).eval()
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return network


# Set where a configuration has the attribute, whatever its architecture.
_SMALL = _SIZES | {
    **{"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "rotary_dim": 8},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "ffn_dim": 80, "word_embed_proj_dim": 48},
    **{"state_size": 8, "n_inner": 80, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    **{"num_kv_shared_layers": 0, "laurel_rank": 8, "n_embd": 48, "n_head": 4, "n_layer": 4, "n_positions": 64},
}
_SMALL_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


def small_network(model_type: str, **overrides: Any) -> Any:
    """A network of any architecture of transformers, with random weights, as small as its configuration allows.

    Of a multimodal one the encoder of images has as many layers as the decoder of text.
    """
    config_class = transformers.CONFIG_MAPPING[model_type]
    whole = config_class()
    text = whole.get_text_config(decoder=True)

    def small(config: Any, sizes: dict[str, Any], **more: Any) -> Any:
        known = {name: size for name, size in sizes.items() if hasattr(config, name) and not _is_group(config, name)}
        return type(config)(**known | more)

    config = small(text, _SMALL, **overrides)
    if text is not whole:
        parts = {name: part for name, part in vars(whole).items() if isinstance(part, transformers.PreTrainedConfig)}
        vision = {name: small(part, _SMALL_VISION) for name, part in parts.items() if part is not text}
        config = config_class(**vision | {name: config for name, part in parts.items() if part is text})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return network


def _is_group(config: Any, name: str) -> bool:
    return isinstance(getattr(config, name), (list, tuple, dict))


def tiny_tokenizer() -> Any:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny_model(folder: Path, architecture: str = "gemma3", **overrides: Any) -> Path:
    tiny_network(architecture, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokens(rows: int = 5, length: int = 24) -> torch.Tensor:
    """Rows that start with BOS."""
    tokens_BL = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    tokens_BL[:, 0] = 1
    return tokens_BL
