"""Commands that exchange SAEs with other tools: `legato import`, `legato export`, `legato saebench`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from legato.common.command import Interrupts
from legato.common.command_line import Task
from legato.common.errors import UsageError
from legato.common.progress import log
from legato.common.record import one_of, option, record, words
from legato.experiment.config import DataConfig, DType, EvaluationConfig, ModelConfig
from legato.experiment.evaluate_saved import SAID, EvaluateConfig, Place, harvest_rows, named, read_rows
from legato.experiment.inputs import load_model
from legato.interop.saebench_evals import EVALS, start
from legato.sae.autoencoder import EXPORT_FORMATS, SparseAutoencoder, export

_SAE = "a saved SAE of any format that legato reads: a folder or file, or on the hub owner/name[/folder]"


@record
class SAEBench(Task):
    """Run sae-bench itself on a saved SAE."""

    sae: str = words("a saved SAE of any format that legato reads", "[NAME=]SAE")
    eval: Annotated[str, one_of("core", *EVALS)] = option(
        "core", f"core takes any model and text, the others their own: {', '.join(EVALS)}"
    )
    model: str | None = option(None, f"core: hub id, folder or 'demo'; others: TransformerLens' name {SAID}")
    layer: int | None = option(None, f"decoder layer, from 0 {SAID}", ge=0)
    dataset: str | None = option(None, "core: 'demo', a file, a folder or a hub id (default: the SAE's, or demo)")
    text_column: str = option("text", "core: column that holds the text")
    context_length: int = option(128, "core: tokens per context", ge=8)
    rows: int = option(64, "core: contexts, in batches of 16", ge=2)
    held_out: float | None = option(
        None, "core: judge on the documents that this share holds out (default: all)", gt=0, lt=1
    )
    dtype: DType = option("float32", "core: dtype of the model")
    out: Path = option(Path("eval_results"), "folder for sae-bench's file")

    def run(self, interrupts: Interrupts) -> None:
        if find_spec("sae_bench") is None:
            raise UsageError(
                "sae-bench is not installed here, and pins older versions of other packages: make an environment with "
                "`pip install legato-sae sae-bench` and run this there"
            )
        from legato.interop.saebench_wrapper import LegatoSAE, run_core

        ((name, (source, _)),) = named([self.sae]).items()
        sae = SparseAutoencoder.load(source)
        model_name, place = self.model or sae.details.get("model"), sae.place() if self.layer is None else None
        layer, site = (self.layer, sae.details.get("site") or "resid_post") if place is None else place
        if model_name is None or layer is None:
            what = "model" if model_name is None else "layer"
            raise UsageError(f"{name} does not say which {what} it reads: add --{what}")
        if self.eval != "core":
            if site != "resid_post":
                raise UsageError(f"sae-bench's {self.eval} reads resid_post, {name} reads {site}")
            start(self.eval, LegatoSAE(sae, model_name, layer), name, model_name, self.out)
            log(f"results: {self.out}/")
            return
        dataset = self.dataset or sae.details.get("dataset") or "demo"
        config = EvaluateConfig(
            {name: source},
            ModelConfig(model_name, layer, site, self.dtype),
            DataConfig(dataset, self.text_column, self.context_length),
            self.held_out,
            EvaluationConfig(self.rows, controls=()),
        )
        model = load_model(config.model, config.data.context_length, splice=True)
        tokens = read_rows(config, {name: sae}, model)
        path = run_core(
            sae, model, tokens, layer=layer, site=site, out=self.out, release="legato", name=name, dataset=dataset
        )
        log(f"results: {path}")


@record
class Import(Task):
    """Save another tool's SAE, or one of the hub, as Legato's."""

    sae: str = words(_SAE, "SAE")
    out: Path = words("where to save it, as a SAELens folder", "FOLDER")

    def run(self, interrupts: Interrupts) -> None:
        sae = SparseAutoencoder.load(self.sae)
        log(f"{_described(sae)}\nsaved: {sae.save(self.out)}")


@record
class Export(Place, Task):
    """Write an SAE in another tool's format."""

    sae: str = words(_SAE, "SAE")
    to: Annotated[str, one_of(*EXPORT_FORMATS)] = option(
        ..., f"the tool whose format to write: {', '.join(EXPORT_FORMATS)}"
    )
    out: Path = option(..., "the folder to write, or the file for safetensors")
    stateless: bool = option(
        False,
        "write a topk or jumprelu approximation of an SAE with state along the sequence, with the same L0, and say by "
        "how much it differs; the options of the model and the text say on which activations",
    )

    def run(self, interrupts: Interrupts) -> None:
        sae = self._stateless() if self.stateless else SparseAutoencoder.load(self.sae)
        path = export(sae, self.out, self.to)
        log(f"{_described(sae)}\nsaved as {self.to}: {path}")

    def _stateless(self) -> SparseAutoencoder:
        saes, config = self.opened([self.sae])
        (sae,) = saes.values()
        model = load_model(config.model, config.data.context_length, splice=False)
        activations = harvest_rows(config, model, read_rows(config, saes, model)).held_out
        plain = sae.stateless(activations.read_rows(range(activations.n_rows)))
        differs = plain.details["stateless"]
        log(
            f"without its state, on {differs['tokens']:,} tokens: FVU {differs['fvu']:.4f} "
            f"({differs['fvu_with_state']:.4f} with it), L0 {differs['l0']:.1f} for both, "
            f"{differs['same_pairs']:.0%} of the active pairs in common"
        )
        return plain


def _described(sae: SparseAutoencoder) -> str:
    known = {"source": "of", "model": "on", "layer": "layer", "module_path": "at"}
    details = {**sae.details, "source": (sae.details.get("source") or {}).get("format")}
    said = [f"{word} {details[key]}" for key, word in known.items() if details.get(key) is not None]
    return ", ".join([f"{sae.architecture.name} SAE, width {sae.d_in}, {sae.d_sae:,} latents", *said])
