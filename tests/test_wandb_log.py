"""Weights & Biases in its offline mode, through its own client: what --wandb leaves in the run's folder."""

import importlib.util
import json
import struct

import pytest

from legato.common.errors import LegatoError, UsageError
from legato.experiment.run_log import WandbLog

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the track extra")


def records(file):
    """The client's file: 7 bytes of header, then LevelDB's log format: blocks of 32 KiB, records with 7 bytes of
    header (checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last part)."""
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def history(root):
    """Every logged row of the run's offline file, as `wandb sync` would read it."""
    from wandb.proto import wandb_internal_pb2

    (file,) = root.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records(file):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


@needs_wandb
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore:Attempting to set")
@pytest.mark.usefixtures("no_pages")
def test_a_run_s_steps_reach_the_client(small, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert small.run("--temporal=slowness", "--wandb=demo") == 0
    logged = [json.loads(line) for line in (small.out_dir / "log.jsonl").read_text().splitlines()]
    rows = history(small.out_dir)
    assert len(rows) == len(logged)
    assert {record["arm"] for record in logged} == {"baseline", "slowness"}
    for record, row in zip(logged, rows, strict=True):
        arm = record["arm"]
        assert row[f"{arm}/step"] == record["step"]
        assert row[f"{arm}/loss"] == pytest.approx(record["loss"])
        assert row[f"{arm}/loss/slowness"] == record["loss_terms"]["slowness"] if arm == "slowness" else True


def test_without_its_client_the_flag_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("legato.experiment.run_log.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"legato-sae\[track\]"):
        WandbLog("demo", tmp_path)


@needs_wandb
def test_a_refusal_of_the_client_is_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("no API key\nconfigured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(LegatoError, match=r"^Weights & Biases: no API key configured \(or set WANDB_MODE=offline\)$"):
        WandbLog("demo", tmp_path)
