"""Upload and download through the real hub client, against a small stand-in of the hub's HTTP interface."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from legato.errors import UsageError
from legato.interop.hub import model_card, push_to_hub
from legato.sae import SparseAutoencoder

COMMIT = "c" * 40
METRICS = {
    "core": {"fvu": 0.25, "l0": 31.96, "ce_loss_score": None, "tokens": 35484},
    "consistency": {"kappa1_excess_within": 0.1234, "position_shuffled": {"kappa1_excess_within": 0.01}},
}


def an_sae(**details):
    W_dec = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    return SparseAutoencoder(
        "hysteresis",
        W_dec.T.clone(),
        torch.zeros(8),
        W_dec,
        torch.zeros(4),
        torch.ones(8),
        release=0.5,
        details=details,
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
def hub():
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def client(endpoint, home, code):
    """A process of its own: the client reads its endpoint and cache when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    header = (
        "import torch; from legato.errors import LegatoError\nfrom legato.interop.hub import *\n"
        "def error(call, *a, **k):\n    try: call(*a, **k)\n    except LegatoError as e: print(type(e).__name__, e)\n"
    )
    done = subprocess.run([sys.executable, "-c", header + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_pushed_comes_back(hub, tmp_path):
    sae = an_sae(model="gpt2", layer=6)
    sae.save(tmp_path / "run" / "saes" / "mine")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"mine": METRICS}))
    folder = str(tmp_path / "run" / "saes" / "mine")
    url = client(hub, tmp_path / "home", f"print(push_to_hub({folder!r}, 'me/sae', subfolder='a', token='hf_good'))")
    assert url.strip().endswith(COMMIT)
    assert set(Hub.files) == {
        f"a/{name}" for name in ("README.md", "cfg.json", "legato.json", "metrics.json", "sae_weights.safetensors")
    }
    assert json.loads(Hub.files["a/metrics.json"]) == METRICS
    assert b"| Fraction of variance unexplained | 0.2500 |" in Hub.files["a/README.md"]

    load = "from_pretrained('me/sae', subfolder='a').save({!r}); error(from_pretrained, 'me/sae', subfolder='b')"
    shown = client(hub, tmp_path / "home", load.format(str(tmp_path / "back")))
    assert shown == "UsageError me/sae holds no b: see which folders it has on the hub\n"
    back = SparseAutoencoder.load(tmp_path / "back")
    acts_BLD = torch.randn(2, 6, 4)
    assert torch.allclose(back.encode(acts_BLD), sae.encode(acts_BLD), atol=1e-6)  # other strides round otherwise
    assert back.details == sae.details

    # The hub is gone: what was downloaded still opens, anything else is one line.
    offline = "print(from_pretrained('me/sae', subfolder='a').d_sae); error(from_pretrained, 'me/other')"
    first, second = client("http://127.0.0.1:9", tmp_path / "home", offline).splitlines()
    assert first == "8"
    assert second.startswith("LegatoError cannot download from me/other: ")


def test_mistakes(hub, tmp_path):
    an_sae().save(tmp_path / "sae")
    where = str(tmp_path / "sae")
    code = f"error(push_to_hub, {where!r}, 'me/sae', token='hf_bad')\nerror(from_pretrained, 'nobody/nothing')\n"
    code += f"error(push_to_hub, {where!r}, 'not a name', token='hf_good')\n"
    denied, absent, wrong = client(hub, tmp_path / "home", code).splitlines()
    assert denied.startswith("UsageError you may not upload to me/sae")
    assert absent.startswith("UsageError no repository nobody/nothing")
    assert wrong.startswith("UsageError no repository not a name")
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
