"""Upload and download through the real hub client, against a small stand-in of the hub's HTTP interface."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from legato.cli import main
from legato.common.errors import LegatoError, UsageError
from legato.interop.hub import from_pretrained, model_card, push_to_hub
from legato.sae.architectures import Hysteresis
from legato.sae.autoencoder import SparseAutoencoder

COMMIT = "c" * 40
METRICS = {
    "core": {"fvu": 0.25, "l0": 31.96, "ce_loss_score": None, "tokens": 35484},
    "consistency": {"kappa1_excess_within": 0.1234, "position_shuffled": {"kappa1_excess_within": 0.01}},
}


def an_sae(**details):
    W_dec = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    return SparseAutoencoder(
        W_dec.T.clone(),
        torch.zeros(8),
        W_dec,
        torch.zeros(4),
        Hysteresis(release=0.5, threshold=torch.ones(8)),
        details,
    )


class Hub(BaseHTTPRequestHandler):
    """One repository, me/sae; every file is uploaded inside the commit."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_good":
            self._answer(401, {"error": "bad token"})
        elif self.path == "/api/repos/create":
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/sae", "name": "me/sae", "id": "me/sae"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._answer(
                200,
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]},
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/me/sae/commit/{COMMIT}"
            self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._answer(200, {})

    def do_GET(self):
        if "/me/sae/resolve/" in self.path:
            content = self.files.get(self.path.split("/", 5)[5])
            if content is None:
                self._answer(404, {"error": "absent"}, {"X-Error-Code": "EntryNotFound"})
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
        elif self.path.startswith("/api/models/me/sae/tree/"):
            self._answer(
                200, [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
            )
        elif self.path.startswith("/api/models/me/sae"):
            siblings = [{"rfilename": name} for name in self.files]
            self._answer(200, {"id": "me/sae", "sha": COMMIT, "siblings": siblings})
        else:
            self._answer(404, {"error": "absent"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status, content, headers=None):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The client's endpoint and cache are read when it is called, its proxies from the environment."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)  # where nothing is called as the repositories are
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def gone(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there


def one_line(error, call, *arguments, **named):
    with pytest.raises(error) as raised:
        call(*arguments, **named)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.usefixtures("hub")
def test_what_is_pushed_comes_back(tmp_path, monkeypatch):
    sae = an_sae(model="gpt2", layer=6)
    folder = sae.save(tmp_path / "run" / "saes" / "mine")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"mine": METRICS}))
    assert push_to_hub(folder, "me/sae", subfolder="a", token="hf_good").endswith(COMMIT)
    assert set(Hub.files) == {
        f"a/{name}" for name in ("README.md", "cfg.json", "legato.json", "metrics.json", "sae_weights.safetensors")
    }
    assert json.loads(Hub.files["a/metrics.json"]) == METRICS
    assert b"| Fraction of variance unexplained | 0.2500 |" in Hub.files["a/README.md"]
    assert "holds no b; name one of its folders: a" in one_line(UsageError, from_pretrained, "me/sae", subfolder="b")
    assert "holds no SAE at its top; name one of its folders: a" in one_line(UsageError, from_pretrained, "me/sae")

    back = from_pretrained("me/sae", subfolder="a")
    acts_BLD = torch.randn(2, 6, 4)
    assert torch.allclose(back.encode(acts_BLD), sae.encode(acts_BLD), atol=1e-6)  # other strides round otherwise
    assert back.details == sae.details
    # The hub is gone: what was downloaded still opens, anything else is one line.
    gone(monkeypatch)
    assert from_pretrained("me/sae", subfolder="a").d_sae == 8
    assert one_line(LegatoError, from_pretrained, "me/other").startswith("cannot download from me/other: ")


@pytest.mark.usefixtures("hub")
def test_a_place_on_the_hub_opens_where_a_path_does(tmp_path, capsys):
    """Only the files of the one SAE are fetched: those of the other cannot be had."""
    saved = {path.name: path.read_bytes() for path in an_sae().save(tmp_path / "sae").iterdir()}
    Hub.files = {f"x/one/{name}": content for name, content in saved.items()} | {"x/two/ae.pt": b"much"}
    assert main(["import", "me/sae/x/one", str(tmp_path / "mine")]) == 0, capsys.readouterr().err
    assert SparseAutoencoder.load(tmp_path / "mine").architecture.name == "hysteresis"
    assert not list((tmp_path / "cache").rglob("ae.pt"))
    load = SparseAutoencoder.load
    missing = one_line(UsageError, load, "me/sae/y")
    assert missing.startswith("me/sae/y does not exist here, and on the hub: me/sae holds no y; name one of its")
    assert "no repository nobody/nothing" in one_line(UsageError, load, "nobody/nothing")
    assert one_line(UsageError, load, "sae/absent") == "sae/absent does not exist"  # sae/ is a folder here


@pytest.mark.usefixtures("hub")
def test_mistakes(tmp_path):
    folder = an_sae().save(tmp_path / "sae")
    denied = one_line(UsageError, push_to_hub, folder, "me/sae", token="hf_bad")
    assert denied.startswith("you may not upload to me/sae")
    assert one_line(UsageError, from_pretrained, "nobody/nothing").startswith("no repository nobody/nothing")
    wrong = one_line(UsageError, push_to_hub, folder, "not a name", token="hf_good")
    assert wrong.startswith("no repository not a name")
    assert Hub.files == {}


def test_the_card_tells_what_was_measured_and_what_was_not():
    card = model_card(an_sae(model="gpt2", layer=6, dataset="corpus"), "me/sae", METRICS)
    assert card.startswith("---\nlibrary_name: legato-sae\n")
    assert "| Language model | gpt2 |" in card
    assert "| Active latents per token (L0) | 32.0 |" in card
    assert "| Held-out tokens these are measured on | 35484 |" in card
    assert "| The first kappa on position-shuffled activations | 0.0100 |" in card
    assert "CE loss" not in card  # not measured: no row
    assert 'from_pretrained("me/sae")' in card
    assert "Nothing was measured" in model_card(an_sae(), "me/sae")
    assert 'from_pretrained("me/sae", subfolder="a")' in model_card(an_sae(), "me/sae", subfolder="a")


def test_a_folder_without_an_sae_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(UsageError, match="nothing does not exist"):
        push_to_hub(tmp_path / "nothing", "me/sae")
