"""A small model hub on loopback, which serves repositories as the Hugging Face hub does, and small models for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import torch

from clipfh.model.architecture import parse
from clipfh.model.clip import build
from clipfh.storage import layout

WORDS = "a an the of in for with men women shirt dress coat jeans skirt red blue green black white item clothing photo"

CLIP_SHAPED = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SIGLIP_SHAPED = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 64,
        "hf_tokenizer_name": "shop/words",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}
INCEPTION = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}


def write_model(folder: Path, model_cfg: dict, preprocess_cfg: dict, seed: int = 0) -> Path:
    """A repository's files: configuration and random weights."""
    folder.mkdir(parents=True)
    config = folder / layout.OPEN_CLIP_CONFIG
    config.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}))
    torch.manual_seed(seed)
    torch.save(build(parse(config.read_text(), config)).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer's repository: one token a word, padded by 1 as SigLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="</s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories below a folder, `root/ORG/NAME`; gives the address and a list that requests are added to.

    A folder `root/ORG/NAME@REVISION` is another revision of it.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:  # noqa: N802 (the name that http.server calls)
            self.answer(with_body=False)

        def do_GET(self) -> None:  # noqa: N802
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            words = self.path.split("?")[0].strip("/").split("/")
            if words[:2] == ["api", "models"]:  # what transformers asks for: a folder that no repository here has
                self.refuse("EntryNotFound" if (root / "/".join(words[2:4])).is_dir() else "RepoNotFound")
                return
            org, name, resolve, revision, *rest = [*words, "", "", "", ""]
            folder = find(root / org / name, revision)
            if resolve != "resolve" or folder is None:
                self.refuse("RevisionNotFound" if (root / org / name).is_dir() else "RepoNotFound")
            elif (file := folder / "/".join(rest).strip("/")).is_file():
                self.send(folder, file.read_bytes(), with_body)
            else:
                self.refuse("EntryNotFound", folder)

        def send(self, folder: Path, body: bytes, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit(folder))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def refuse(self, code: str, folder: Path | None = None) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            if folder:  # by it the client's cache knows that there is no such file
                self.send_header("X-Repo-Commit", commit(folder))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """The list has the requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


def commit(folder: Path) -> str:
    """A commit's hash."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def find(folder: Path, revision: str) -> Path | None:
    """The folder of a repository's revision, by its name or its commit."""
    for each in (folder, *folder.parent.glob(f"{folder.name}@*")):
        if each.is_dir() and revision in (commit(each), each.name.partition("@")[2] or "main"):
            return each
    return None
