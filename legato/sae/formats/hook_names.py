"""Names of places in the words of other tools, as Legato's layer and site.

TransformerLens' hooks and paths of modules are two vocabularies: `blocks.9.hook_mlp_out` is what the MLP adds to the
residual stream, `layers.9.mlp` is the raw output of the module, before a norm that may follow it.
"""

import re

from legato.common.errors import UsageError

_HOOK = re.compile(r"^blocks\.(?P<layer>\d+)\.(?P<rest>.*hook_.+)$")
# model.layers.9, transformer.h.9.mlp; sparsify leaves out what comes before the list of layers
_MODULE = re.compile(r"^(?:.*\.)?(?:blocks|layers|h|block|layer)\.(?P<layer>\d+)(?:\.(?P<rest>.+))?$")
# dictionary_learning's submodule_name: resid_post_layer_9, mlp_out_layer_9, attention_out_layer_9
_SUBMODULE = re.compile(r"^(?P<rest>[a-z_]+?)_(?:out_)?layer_?(?P<layer>\d+)$")
_HOOKS = {
    "hook_resid_post": "resid_post",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",  # SAELens joins its heads: [..., heads, d_head] to [..., heads * d_head]
    "ln1.hook_normalized": "ln1.hook_normalized",
    "ln2.hook_normalized": "ln2.hook_normalized",
}
_SUBMODULES = {
    **dict.fromkeys(("resid", "resid_post"), "resid_post"),
    **dict.fromkeys(("mlp", "mlp_out"), "mlp_out"),
    **dict.fromkeys(("attn", "attn_out", "attention"), "attn_out"),
}


def layer_and_site(hook_name: str) -> tuple[int, str]:
    """Return (layer, site) of a TransformerLens hook, the path of a module or a submodule name of dictionary_learning.

    What enters a layer is what left the one before: `blocks.9.hook_resid_pre` is layer 8's resid_post. The path of a
    module in a layer is a site itself, relative to the layer: `layers.9.mlp` is (9, "mlp").
    Raises UsageError for any other place.

    >>> layer_and_site("blocks.9.hook_resid_pre"), layer_and_site("model.layers.9"), layer_and_site("layers.9.mlp")
    ((8, 'resid_post'), (9, 'resid_post'), (9, 'mlp'))
    """
    if found := _HOOK.match(hook_name):
        layer, rest = int(found["layer"]), found["rest"]
        if rest == "hook_resid_pre":
            return (layer - 1, "resid_post") if layer > 0 else (0, "resid_pre")
        if rest in _HOOKS:
            return layer, _HOOKS[rest]
    elif found := _MODULE.match(hook_name):
        return int(found["layer"]), found["rest"] or "resid_post"
    elif (found := _SUBMODULE.match(hook_name)) and found["rest"] in _SUBMODULES:
        return int(found["layer"]), _SUBMODULES[found["rest"]]
    known = ", ".join(f"blocks.N.{hook}" for hook in ("hook_resid_pre", *_HOOKS))
    raise UsageError(
        f"the SAE reads {hook_name}, which is none of {known} and no path of a module: give --layer, --site"
    )
