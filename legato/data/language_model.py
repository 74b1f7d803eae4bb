"""Any Hugging Face causal language model, frozen: read it at one layer, splice back into it, unembed.

Shape legend: B rows (contexts), L positions, D model width, N flat tokens, V vocabulary.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from legato.common.errors import LegatoError, UsageError, one_line
from legato.common.hardware import fast_float32
from legato.data.fast_layers import MAX_CONTEXT as FUSED_MAX_CONTEXT
from legato.data.fast_layers import FusedDecoder
from legato.data.find_site import LayerTrace, find_layers, find_site, trace_layer
from legato.data.model_files import located, quiet_loading, sha256_of_model, usable_device, usable_dtype
from legato.data.sites import Site, check_finite, given_to, hidden_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Positions = Literal["absolute", "relative", "fixed"]
CHECK_TOKENS = 8
# What configurations call the number that the logits are multiplied by, and the number that they are divided by.
LOGIT_SCALES, LOGIT_DIVISOR = ("logit_scale", "lm_head_multiplier"), "logits_scaling"


class LanguageModel:
    """A frozen causal language model in evaluation mode; build it with `load`.

    name: as given to `load`. d_model: width of the residual stream. n_layers: decoder layers, numbered from 0.
    max_context: most positions a row may have. vocab_size: rows of the unembedding.
    bos_token_id: None where the tokenizer has none. special_token_ids: ids that are not text.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        text_config = model.config.get_text_config(decoder=True)
        self.d_model: int = text_config.hidden_size
        self.n_layers: int = text_config.num_hidden_layers
        self.vocab_size: int = text_config.vocab_size
        self.max_context: int = getattr(text_config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.special_token_ids: set[int] = set(tokenizer.all_special_ids)
        self._text_config = text_config
        self._logit_softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        scales = [getattr(text_config, key, None) or 1.0 for key in LOGIT_SCALES]
        self._logit_scale = math.prod(scales) / (getattr(text_config, LOGIT_DIVISOR, None) or 1.0)
        self._layers_path, self._layers, self._decoder = find_layers(model, self.n_layers, name)
        self._sites: dict[tuple[int, str], Site] = {}
        self._checked_restarts: set[tuple[int, str]] = set()

    @classmethod
    def load(
        cls, model: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
    ) -> "LanguageModel":
        """Load a model by name.

        model: "demo" (the packaged Gemma 3 270M), a local folder, a .gguf file or a hub id such as "gpt2".
        dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 where its matmul is measured fast, else float32.
        Raises UsageError, in one line, for a model that cannot be found or loaded.
        """
        torch_device = usable_device(device)
        torch_dtype = usable_dtype(dtype, torch_device)
        source, is_offline = located(model)
        from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds, which a mistyped name need not cost

        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": is_offline}
        with quiet_loading():
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source, dtype=torch_dtype, output_loading_info=True, **options
                )
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
            except Exception as error:  # transformers raises a dozen kinds for a wrong model
                raise UsageError(f"cannot load the model {model}: {one_line(error)}") from error
        network, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise UsageError(f"the weights of {model} are incomplete: {len(missing)} missing, such as {missing[0]}")
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one for a folder without
            raise UsageError(f"the model {model} has no tokenizer: put its files, such as tokenizer.json, beside it")
        return cls(network.to(torch_device), tokenizer, model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def module_path(self, layer: int, site: str = "resid_post") -> str:
        """Return the path of the module that is read, as in `model.get_submodule`, e.g. "model.layers.9"; `:input` at
        its end tells that the module's input is read."""
        return str(self.site(layer, site))

    def site(self, layer: int, site: str = "resid_post") -> Site:
        """Find a place by its name (`find_site` lists them), checked on a few tokens once.

        Raises UsageError for a layer or site that the model does not have, or where no module holds what the name says.
        The check of `attn_out` and `mlp_out` is that what the blocks add makes up the residual stream.
        """
        if not 0 <= layer < self.n_layers:
            raise UsageError(f"{self.name} has no layer {layer}: choose 0 to {self.n_layers - 1}")
        if (layer, site) not in self._sites:
            tokens_BL = self._check_tokens
            try:
                found = find_site(
                    site, layer, f"{self._layers_path}.{layer}", self.model, lambda: self._trace(layer, tokens_BL)
                )
                value = self._read(found, tokens_BL)
            except UsageError as error:
                raise UsageError(f"{self.name}: {error}") from None
            if value.shape[:-1] != tokens_BL.shape:
                raise UsageError(
                    f"{self.name}: {found} hands out {[*value.shape]}, not one vector a token, and is not read"
                )
            check_finite(value)
            self._sites[layer, site] = replace(found, width=value.shape[-1], dtype=value.dtype)
        return self._sites[layer, site]

    @property
    def _check_tokens(self) -> Tensor:
        return torch.arange(CHECK_TOKENS)[None] % self.vocab_size

    @cached_property
    def can_unembed(self) -> bool:
        """Tell whether outputs of the last layer can be turned into logits here, as they are in the model itself."""
        try:
            self.check(self.n_layers - 1, "resid_post", splice=True)
        except UsageError:
            return False
        return True

    def check(self, layer: int, site: str, *, splice: bool) -> None:
        """Try all that an experiment does at a place on a few tokens: read it, and with splice also put it back.

        Raises UsageError, with what to do, for what this model cannot do.
        """
        self.site(layer, site)
        if splice:
            try:
                self._check_restart(self._check_tokens, layer, site)
            except LegatoError as error:
                raise UsageError(f"{error}; --ce_rows 0 leaves the language model's loss out") from None

    def fingerprint(self) -> str:
        """Return the SHA-256 over configuration and every weight: the same model gives the same activations."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return sha256_of_model(self.model)

    @torch.no_grad()
    @fast_float32()
    def activations(
        self, tokens_BL: Tensor, layer: int, site: str = "resid_post", *, first_position: int = 0
    ) -> Tensor:
        """Compute acts_BLD: what `site` names at `layer`, in the dtype that the model has there.

        tokens_BL: input ids of full rows, attended causally from the first. Nothing after the site is computed.
        first_position: the position id of the rows' first token; `positions` tells its effect.
        Raises UsageError for a layer or site that the model does not have, for rows longer than its context, and for
        another first position where the model has no position ids.
        """
        at = self.site(layer, site)
        with self._numbered_from(first_position, tokens_BL.shape[1]):
            if site == "resid_post" and (fused := self._fused_for(tokens_BL)):
                return fused.run(self._embedded(tokens_BL), 0, layer, first_position=first_position)
            with self._prefix_done(tokens_BL, at.layer or 0, first_position):
                return self._read(at, tokens_BL)

    @cached_property
    def positions(self) -> Positions:
        """Kind of positions: "absolute" if the embedding depends on them (GPT-2's learned positions); "relative" if
        only attention does, by distances, so that a shift of all position ids changes nothing (rotary); "fixed" if
        there are no position ids to shift (ALiBi)."""
        if "position_ids" not in signature(self._decoder.forward).parameters:
            return "fixed"
        tokens_BL = torch.ones(1, 2, dtype=torch.long)
        with torch.no_grad():
            own = self._embedded(tokens_BL)
            with self._numbered_from(1, 2):
                return "relative" if torch.equal(self._embedded(tokens_BL), own) else "absolute"

    @torch.no_grad()
    @fast_float32()
    def resume(self, acts_BLD: Tensor, tokens_BL: Tensor, layer: int, site: str = "resid_post") -> Tensor:
        """Compute hidden_BLD, the input of the unembedding, with acts_BLD as the output of the site.

        For resid_post the layers up to `layer` are not run again; for the others they are.
        tokens_BL: the tokens that acts_BLD stands for. Errors as in `activations`; LegatoError if the architecture
        carries something past the layer other than the residual stream, so that splicing would be wrong.
        """
        if (layer, site) not in self._checked_restarts:
            self._check_restart(tokens_BL[:1, :CHECK_TOKENS], layer, site)
        return self._resume(acts_BLD, tokens_BL, layer, site)

    @torch.no_grad()
    @fast_float32()
    def unembed(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute logits_NV in the model's dtype; V may be 262,144, so give few tokens at a time. out: written to."""
        head = self.model.get_output_embeddings()
        hidden_ND = hidden_ND.to(self.device, self.dtype)
        if type(head) is nn.Linear and head.bias is None:
            logits_NV = torch.mm(hidden_ND, head.weight.T, out=out)
        else:
            logits_NV = head(hidden_ND)
        if self._logit_scale != 1:
            logits_NV *= self._logit_scale
        if self._logit_softcap is not None:
            logits_NV = torch.tanh(logits_NV / self._logit_softcap) * self._logit_softcap
        return logits_NV

    @cached_property
    def _layers_return_tuple(self) -> bool:
        """True where a layer returns (hidden, ...), False where it returns hidden alone, as newer architectures do."""
        return isinstance(self._output_of(self._layers[0], torch.zeros(1, 1, dtype=torch.long)), tuple)

    @cached_property
    def _fused(self) -> FusedDecoder | None:
        """The fast layers, if they know this architecture and give the same result as transformers."""
        fused = FusedDecoder.of(self._decoder, self._layers, self._text_config)
        if fused is None:
            return None
        tokens_BL = self._check_tokens
        own = hidden_of(self._output_of(self._layers[-1], tokens_BL)).float()
        error = (fused.run(self._embedded(tokens_BL), 0, self.n_layers - 1).float() - own).norm() / own.norm()
        if not error > (1e-4 if self.dtype == torch.float32 else 0.1):  # weights that are not finite are found later
            return fused
        warnings.warn(
            f"the fast layers differ from transformers {version('transformers')}'s by {error:.1%} on {self.name}: "
            "using the latter, which take about twice the time",
            stacklevel=2,
        )
        return None

    def _fused_for(self, tokens_BL: Tensor) -> FusedDecoder | None:
        return self._fused if tokens_BL.shape[1] <= FUSED_MAX_CONTEXT else None

    def _embedded(self, tokens_BL: Tensor) -> Tensor:
        """Compute hidden_BLD, the input of the first layer."""
        return given_to(*self._input_of(self._layers[0], tokens_BL))

    def _trace(self, layer: int, tokens_BL: Tensor) -> LayerTrace:
        return trace_layer(self._layers[layer], *self._input_of(self._layers[layer], tokens_BL))

    def _input_of(self, module: nn.Module, tokens_BL: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Compute the module's arguments on these tokens; it does not run."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached((args, kwargs))

        return self._run_until(module.register_forward_pre_hook(stop, with_kwargs=True), tokens_BL)

    @torch.no_grad()
    def _read(self, at: Site, tokens_BL: Tensor) -> Tensor:
        """Compute the value of a site; nothing after it runs."""

        def stop(value: Tensor) -> None:
            raise _Reached(value)

        value = self._run_until(at.reading(self.model, stop), tokens_BL)
        return value.unflatten(0, tokens_BL.shape) if value.shape[0] == tokens_BL.numel() != 1 else value

    def _output_of(self, module: nn.Module, tokens_BL: Tensor) -> Any:
        """Compute the module's output on these tokens; nothing after it runs."""

        def stop(_module: nn.Module, _args: object, output: Any) -> None:
            raise _Reached(output)

        return self._run_until(module.register_forward_hook(stop), tokens_BL)

    def _run_until(self, stopping_hook: AbstractContextManager[Any], tokens_BL: Tensor) -> Any:
        try:
            with stopping_hook:
                self._run_decoder(tokens_BL)
        except _Reached as reached:
            return reached.value
        raise AssertionError(f"{self.name}: the forward pass never reached the module that was asked for")

    @contextmanager
    def _numbered_from(self, first_position: int, length: int) -> Iterator[None]:
        """Make the decoder's position ids start at first_position."""
        if first_position == 0:
            yield
            return
        if "position_ids" not in signature(self._decoder.forward).parameters:
            raise UsageError(f"{self.name} has no position ids: its positions cannot be shifted")
        end = first_position + length
        if end > self.max_context:
            raise UsageError(f"{self.name} has {self.max_context} positions, not {end}: use a shorter context or shift")

        def number(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            ids_L = first_position + torch.arange(kwargs["input_ids"].shape[1], device=self.device)
            return args, kwargs | {"position_ids": ids_L[None]}

        handle = self._decoder.register_forward_pre_hook(number, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _prefix_done(self, tokens_BL: Tensor, layer: int, first_position: int = 0) -> Iterator[None]:
        """Compute the layers before `layer` now; inside the block the decoder skips them."""
        fused = self._fused_for(tokens_BL)
        if fused is None or layer == 0:
            yield
            return
        acts_BLD = fused.run(self._embedded(tokens_BL), 0, layer - 1, first_position=first_position)
        with self._replaced_layers(layer, acts_BLD):
            yield

    @contextmanager
    def _replaced_layers(self, n_layers: int, acts_BLD: Tensor) -> Iterator[None]:
        """Make the first n_layers return acts_BLD without computing."""
        output = (acts_BLD,) if self._layers_return_tuple else acts_BLD

        def constant(*_args: object, **_kwargs: object) -> Any:
            return output

        layers = list(self._layers)[:n_layers]
        for layer in layers:
            layer.forward = constant
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _run_decoder(self, tokens_BL: Tensor) -> Tensor:
        """Compute the final normed hidden states."""
        if tokens_BL.shape[1] > self.max_context:
            raise UsageError(
                f"{self.name} takes contexts of at most {self.max_context} tokens, not {tokens_BL.shape[1]}"
            )
        n_known = self.model.get_input_embeddings().weight.shape[0]
        if tokens_BL.numel() and int(tokens_BL.max()) >= n_known:
            raise UsageError(
                f"{self.name} knows {n_known} tokens, its tokenizer gives number {int(tokens_BL.max())}: "
                "use the tokenizer that belongs to the model"
            )
        return self._decoder(input_ids=tokens_BL.to(self.device).long(), use_cache=False).last_hidden_state

    def _resume(self, acts_BLD: Tensor, tokens_BL: Tensor, layer: int, site: str) -> Tensor:
        at = self.site(layer, site)
        acts_BLD = acts_BLD.to(self.device, at.dtype)
        if at.layer is None:
            with at.splicing(self.model, acts_BLD):
                return self._run_decoder(tokens_BL)
        layer = at.layer
        if site.startswith("resid_post"):
            residual_BLD = acts_BLD
        else:
            with at.splicing(self.model, acts_BLD), self._prefix_done(tokens_BL, layer):
                residual_BLD = hidden_of(self._output_of(self._layers[layer], tokens_BL))
        n_done = layer + 1
        if fused := self._fused_for(tokens_BL):
            # The fused layers read only the residual stream: equal rows, as under ablation, stay equal.
            alike = bool((residual_BLD == residual_BLD[:1]).all())
            rows_BLD = fused.run(residual_BLD[:1] if alike else residual_BLD, n_done, self.n_layers - 1)
            residual_BLD, n_done = rows_BLD.expand_as(residual_BLD), self.n_layers
        with self._replaced_layers(n_done, residual_BLD):
            return self._run_decoder(tokens_BL)

    def _check_restart(self, tokens_BL: Tensor, layer: int, site: str) -> None:
        """Check that splicing the site's own activations back gives the model's own logits."""
        hidden_BLD = self._resume(self.activations(tokens_BL, layer, site), tokens_BL, layer, site)
        spliced = self.unembed(hidden_BLD.flatten(0, 1)).float().view(*tokens_BL.shape, -1)
        own = self.model(input_ids=tokens_BL.to(self.device).long(), use_cache=False).logits.float()
        scale = (own - own.mean(-1, keepdim=True)).norm(dim=-1)
        error = float(((spliced - own).norm(dim=-1) / scale).median())
        # Two ways of rounding to 16 bits lie 0.02 apart on text and 0.15 on random tokens, another network 1.
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.3
        if not error <= tolerance:
            raise LegatoError(
                f"{self.name} cannot be spliced at {self.module_path(layer, site)}: its own activations give other "
                f"logits there (off by {error:.1%}), so its architecture needs support of its own"
            )
        self._checked_restarts.add((layer, site))


class _Reached(Exception):
    """Stops the forward pass and carries the value that was asked for."""

    def __init__(self, value: Any) -> None:
        self.value = value
