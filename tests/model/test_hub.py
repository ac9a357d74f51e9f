"""Models of a hub, served on loopback: from zero-shot to search, offline the second time, other revisions, errors."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from loopback_hub import CLIP_SHAPED, INCEPTION, SIGLIP_SHAPED, serve, write_model, write_tokenizer

from clipfh.storage import layout

# What each name goes through, as a user's script would; the second time, without a hub, the cache must do
USE = """
import json, sys
import clipfh

name, catalogue, out, photo = sys.argv[1:]
settings = {"model.name": name, "batch.items": 4, "batch.views": 2, "budget.images": 16, "loss.infonce": 0.5}
zero_shot = clipfh.evaluate(catalogue, f"{out}/zero", settings={"model.name": name}, random_splits=0)
run = clipfh.train("joint", catalogue, f"{out}/run", settings=settings, log=lambda line: None)
tuned = clipfh.evaluate(catalogue, f"{out}/tuned", checkpoint=f"{out}/run", random_splits=0)
clipfh.export(f"{out}/run", f"{out}/export")
exported = clipfh.evaluate(catalogue, f"{out}/exported", checkpoint=f"{out}/export", random_splits=0)
clipfh.embed(catalogue, f"{out}/embeddings.parquet", checkpoint=f"{out}/export")
hits = clipfh.search(f"{out}/embeddings.parquet", text="a red dress", top=3)
print(json.dumps([zero_shot.metrics["mAP"], tuned.metrics["mAP"], exported.metrics["mAP"], len(hits)]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_model(root / "shop" / "clip", CLIP_SHAPED, {})
    write_model(root / "shop" / "clip@v2", CLIP_SHAPED, {}, seed=1)
    write_model(root / "shop" / "siglip", SIGLIP_SHAPED, INCEPTION)
    write_tokenizer(root / "shop" / "words")
    (root / "shop" / "transformers").mkdir()
    (root / "shop" / "transformers" / "config.json").write_text("{}")
    return root


def run(script: str, *arguments: object, endpoint: str, home: Path, proxy: str = "") -> subprocess.CompletedProcess:
    """Run a script with a hub at the address, and its cache below `home`."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HOME": str(home)}
    environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
    environment |= {"HTTPS_PROXY": proxy} if proxy else {}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=home)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-hub:shop/clip", "hf-hub:shop/siglip"])
def test_a_model_of_a_hub_goes_from_zero_shot_to_search_and_then_without_the_hub(hub, small_catalogue, tmp_path, name):
    with serve(hub) as (endpoint, requests):
        arguments = (name, small_catalogue.path, tmp_path / "first", "")
        first = run(USE, *arguments, endpoint=endpoint, home=tmp_path)
        assert first.returncode == 0, first.stderr
    figures = json.loads(first.stdout.splitlines()[-1])
    assert figures[3] == 3 and figures[1] == figures[2], "the export embeds as the checkpoint"
    assert any("resolve" in request for request in requests)
    again = run(USE, name, small_catalogue.path, tmp_path / "second", "", endpoint=endpoint, home=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == figures


LOAD = """
import sys, torch
from clipfh import UserError
from clipfh.config.experiment import ModelSettings
from clipfh.model.clip import load_initial_model, load_tokenizer, get_architecture

for name in sys.argv[1:]:
    try:
        clip = load_initial_model(ModelSettings(name=name), 0)
        load_tokenizer(get_architecture(clip))
        print(f"{sum(p.double().sum().item() for p in clip.parameters()):.6f}")
    except UserError as error:
        print(error)
"""


def test_revisions_are_told_apart_and_what_can_not_be_had_is_one_line(hub, tmp_path):
    names = ["shop/clip", "shop/clip@v2", "shop/clip@v3", "shop/none", "shop/transformers", "no"]
    with serve(hub) as (endpoint, _):
        told = run(LOAD, *(f"hf-hub:{name}" for name in names), endpoint=endpoint, home=tmp_path)
        assert told.returncode == 0, told.stderr
        lines = told.stdout.splitlines()
        # a tag names the same commit as its hash does
    assert len(lines) == len(names)
    assert float(lines[0]) != float(lines[1])
    assert "hf-hub:shop/clip@v3: can't be had from the hub" in lines[2]
    assert "hf-hub:shop/none: can't be had from the hub" in lines[3]
    assert f"hf-hub:shop/transformers: the repository has no {layout.OPEN_CLIP_CONFIG}" in lines[4]
    assert "hf-hub:no" in lines[5]
    offline = run(LOAD, "hf-hub:shop/clip", "hf-hub:shop/siglip", endpoint=endpoint, home=tmp_path)
    lines = offline.stdout.splitlines()
    assert lines[0] == told.stdout.splitlines()[0], "from the cache"
    assert "hf-hub:shop/siglip: the hub can't be reached, and its cache does not have the model" in lines[1]


class Refusing(BaseHTTPRequestHandler):
    """A proxy that lets nobody out."""

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        self.send_error(403)

    def log_message(self, *args):
        pass


def test_a_proxy_that_refuses_is_one_line(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as proxy:
        proxy.asked = []
        Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_port}"
        names = ("hf-hub:shop/clip", "RN50")
        told = run(LOAD, *names, endpoint="https://hub.invalid", home=tmp_path, proxy=address)
        proxy.shutdown()
    assert told.returncode == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert "the hub can't be reached, and its cache does not have the model: check the network, HTTPS_PROXY" in first
    assert "weights 'openai' of RN50 can't be downloaded" in second
    assert {"hub.invalid:443"} <= {*proxy.asked}, "the client's way is the proxy"
