"""Hook names of other tools as Legato's layer and site."""

import re

from legato.common.errors import UsageError

# TransformerLens: blocks.9.hook_resid_post. Module paths: model.layers.9, transformer.h.9.mlp; sparsify: layers.9.
_HOOK = re.compile(r"^(?:.*\.)?(?:blocks|layers|h|block)\.(?P<layer>\d+)(?:\.(?P<rest>.+))?$")
# dictionary_learning's submodule_name: resid_post_layer_9
_SUBMODULE = re.compile(r"^(?P<rest>[a-z_]+?)_(?:out_)?layer_?(?P<layer>\d+)$")
_SITES = {
    "resid_post": ("hook_resid_post", "resid_post", "resid"),
    "mlp_out": ("hook_mlp_out", "mlp", "mlp_out", "feed_forward", "ffn", "post_feedforward_layernorm"),
    "attn_out": ("hook_attn_out", "attn", "attn_out", "self_attn", "attention", "post_attention_layernorm"),
}


def layer_and_site(hook_name: str) -> tuple[int, str]:
    """(layer, site) of a TransformerLens hook, a module path or a submodule name of dictionary_learning.

    What enters a layer is what left the one before: `blocks.9.hook_resid_pre` is layer 8's resid_post. Raises
    UsageError for any other place.
    """
    found = _HOOK.match(hook_name) or _SUBMODULE.match(hook_name)
    if found is not None:
        layer, rest = int(found["layer"]), found["rest"]
        if rest in ("hook_resid_pre", "resid_pre") and layer > 0:
            return layer - 1, "resid_post"
        for site, names in _SITES.items():
            if rest in names or (rest is None and site == "resid_post"):
                return layer, site
    raise UsageError(f"the SAE reads {hook_name}, which is not the output of a layer, its MLP or its attention")
