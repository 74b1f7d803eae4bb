"""CONTRIBUTING.md: an architecture and a loss, each one file written from that page, go the whole way."""

import importlib.util
import re
import shlex
import signal
import sys

import pytest
from small_experiment import ROOT
from test_go_on import stop_after

from legato import SparseAutoencoder
from legato.cli import main
from legato.sae.architectures import base as architectures
from legato.training.losses import base as losses

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ARM = "shifted_topk_curvature"


def written(name: str) -> str:
    """The block that follows the name of its file."""
    return re.search(rf"`[\w/]*{name}\.py`.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]


def opened(name: str, folder) -> object:
    path = folder / f"{name}.py"
    path.write_text(written(name))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Both files, known for the length of a test."""
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))
    for name in ("shifted_topk", "curvature"):
        monkeypatch.setitem(sys.modules, name, None)
        opened(name, tmp_path)


def test_each_is_at_most_40_lines():
    for name in ("shifted_topk", "curvature"):
        assert len(written(name).splitlines()) <= 40


@pytest.mark.parametrize("name", ["shifted_topk", "curvature"])
def test_its_test_runs(page, tmp_path, name):
    module = opened(f"test_{name}", tmp_path)
    tests = [value for key, value in vars(module).items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_they_train_go_on_are_saved_opened_judged_and_shown(page, small, monkeypatch):
    train, judge = (shlex.split(line) for line in re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].splitlines())
    assert train[:2] == ["python", "experiment.py"]
    flags = [word for word in train[2:] if not word.startswith("--out_dir")]
    assert small.run(*flags) == 0
    whole, small.out_dir = small.out_dir, small.out_dir.with_name("cut")
    with monkeypatch.context() as patch:
        stop_after(7, patch, lambda: signal.raise_signal(signal.SIGTERM))
        small.error(*flags, code=143)
    assert small.run(*flags, "--resume") == 0
    tensors, cfg = (whole / "saes" / ARM / name for name in ("sae_weights.safetensors", "cfg.json"))
    for file in (tensors, cfg):
        assert file.read_bytes() == (small.out_dir / "saes" / ARM / file.name).read_bytes()
    sae = SparseAutoencoder.load(whole / "saes" / ARM)
    assert type(sae.architecture).__name__ == "ShiftedTopK"
    assert sae.architecture.k == 4
    assert sae.details["objective"]["sparsity"] == {"type": "ShiftedTopK", "k": 4}
    assert sae.details["objective"]["term"] == "curvature"
    assert ARM in (whole / "report.html").read_text()

    assert judge[:2] == ["legato", "evaluate"]
    arguments = [word.replace("run_1", str(whole)).replace("judged", str(whole / "judged")) for word in judge[1:]]
    monkeypatch.setattr("legato.report.build.write_figures", lambda run: None)  # slow
    assert main([*arguments, "--rows=8", "--ce_rows=2"]) == 0
    assert ARM in (whole / "judged" / "notes.txt").read_text()
    assert ARM in (whole / "judged" / "report.html").read_text()


@pytest.mark.filterwarnings("default")
def test_saelens_opens_it(page, tmp_path):
    """An architecture that has come after `import legato.interop.saelens` is registered by hand."""
    SAE = pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError).SAE
    import torch
    from sae_lens.registry import SAE_CLASS_REGISTRY

    import legato.interop.saelens as interop

    kind = architectures.architecture_named("shifted_topk")
    interop.register(kind)
    try:
        W = torch.nn.functional.normalize(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), dim=1)
        sae = SparseAutoencoder(W.T.contiguous(), torch.zeros(12), W, torch.zeros(6), kind(3))
        theirs = SAE.load_from_disk(sae.save(tmp_path / "sae"))
        acts = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(acts), sae.encode(acts))
    finally:
        del SAE_CLASS_REGISTRY["shifted_topk"]
