"""The architecture of a model, without its weights: from open_clip's list, a hub's repository or a folder."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipfh import UserError
from clipfh.config import schema
from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import hub
from clipfh.storage import layout
from clipfh.storage.store import Folder

LOCAL = "local-dir:"
"""Begins the name of a model that lies in a folder, as open_clip writes it"""
PIXELS = ("mean", "std", "interpolation", "resize_mode")
"""What open_clip does to an image's pixels besides its size, which the image tower decides"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")


@functools.cache
def load_open_clip() -> Any:
    """open_clip, with `clipfh-small` added. It takes seconds to import, and most processes need none of it."""
    # timm would load wandb and never use it: half a second, and two folders left in /tmp. transformers takes as long to
    # load as torch, and only text towers of Hugging Face's need it.
    with _absent("wandb"), _absent("transformers"):
        import open_clip

    open_clip.add_model_config(Path(__file__).parent / f"{SMALL_MODEL}.json")
    return open_clip


@functools.cache
def load_text_towers() -> None:
    """Let open_clip build text towers of Hugging Face's, where transformers is installed."""
    open_clip = load_open_clip()
    if open_clip.hf_model.transformers is None:
        open_clip.model.HFTextEncoder = importlib.reload(open_clip.hf_model).HFTextEncoder


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Let an import of a module fail, as where it isn't installed, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@dataclass(frozen=True)
class Architecture:
    """All that a model is built from, apart from its weights. As JSON it is `open_clip_config.json`."""

    model_cfg: dict[str, Any]
    """open_clip's account of the towers, activation and context length among it"""
    preprocess_cfg: dict[str, Any]
    """the values of PIXELS"""
    tokenizer_folder: str = ""
    """folder of the files of the tokenizer that `model_cfg` names; empty if they are the hub's, or for CLIP's own"""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_open_clip(self) -> str:
        """The JSON that open_clip reads in a folder which also has the tokenizer's files, so without their place."""
        return json.dumps({"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}, indent=2)

    @property
    def size(self) -> int:
        """Side of the images that the model takes, pixels."""
        size = self.model_cfg["vision_cfg"].get("image_size", 224)
        return int(size if isinstance(size, int) else size[0])

    @property
    def embed_dim(self) -> int:
        """D, the dimensions of an embedding."""
        return int(self.model_cfg["embed_dim"])

    @property
    def tokenizer_name(self) -> str:
        """Folder or name of Hugging Face's tokenizer; empty for CLIP's own."""
        name, folder = self.model_cfg["text_cfg"].get("hf_tokenizer_name") or "", self.tokenizer_folder
        return folder if name and folder and Path(folder).is_dir() else name

    @property
    def activation(self) -> str:
        return "QuickGELU" if self.model_cfg.get("quick_gelu") else "GELU"

    def takes_weights_of(self, other: Architecture) -> bool:
        """Whether weights of the other architecture fit this one and mean the same, except for the size of images."""
        return _without_size(self.model_cfg) == _without_size(other.model_cfg)


def _without_size(model_cfg: dict[str, Any]) -> dict[str, Any]:
    vision = {key: value for key, value in model_cfg["vision_cfg"].items() if key != "image_size"}
    if name := vision.get("timm_model_name"):
        vision["timm_model_name"] = _without_number(name)
    return {"quick_gelu": False, **model_cfg, "vision_cfg": vision}


def _without_number(timm_name: str) -> str:
    """timm's name of a tower without the size of images at its end, if it has one."""
    return re.sub(r"_\d{3}$", "", timm_name)


def parse(text: str, where: str | Path) -> Architecture:
    """Read an `open_clip_config.json`.

    Raises:
        UserError: the text is no such file's.
    """
    try:
        tree = json.loads(text)
        cfg, pixels = tree["model_cfg"], tree.get("preprocess_cfg") or {}
        if not cfg["embed_dim"] or not isinstance(cfg["vision_cfg"], dict) or not isinstance(cfg["text_cfg"], dict):
            raise ValueError("empty parts")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} describes no model of open_clip: it has no whole model_cfg ({error!r})") from error
    return Architecture(cfg, _pixels(pixels), tree.get("tokenizer_folder", ""))


def _pixels(cfg: dict[str, Any]) -> dict[str, Any]:
    """The values of PIXELS from `cfg`, else open_clip's defaults."""
    transform = load_open_clip().transform
    merged = transform.merge_preprocess_dict(transform.PreprocessCfg(), cfg)
    return {key: tuple(value) if isinstance(value := merged[key], list) else value for key in PIXELS}


def find(settings: ModelSettings) -> Architecture:
    """The architecture that the settings name, for images of `image_size`.

    Raises:
        UserError: there is no such model, it can't be had, or its image tower is not made for that size.
    """
    folder = find_folder(settings)
    native = read_folder(folder) if folder else _listed(settings)
    return resized(native, settings.image_size, settings.name) if settings.image_size else native


def find_folder(settings: ModelSettings, with_weights: bool = False) -> Path | None:
    """The folder of a model that is named by a folder or a hub's repository; None for a name of open_clip's list.

    Raises:
        UserError: there is no such folder, or the hub has or gives no such model.
    """
    if settings.name.startswith(hub.PREFIX):
        return hub.download(settings.name, with_weights)
    if not settings.name.startswith(LOCAL):
        return None
    folder = Path(settings.name.removeprefix(LOCAL))
    if not (folder / layout.OPEN_CLIP_CONFIG).is_file():
        raise UserError(
            f"--model.name {settings.name}: {folder} holds no {layout.OPEN_CLIP_CONFIG}: give a folder that has one, "
            "such as an export of clipfh or a download of a model for open_clip"
        )
    return folder


def read_folder(path: str | Path | Folder) -> Architecture:
    """The architecture of a folder that has an `open_clip_config.json`, and its tokenizer's files if they lie there."""
    folder = Folder(path)
    architecture = parse(folder.read_text(layout.OPEN_CLIP_CONFIG), f"{folder}/{layout.OPEN_CLIP_CONFIG}")
    has_files = any(folder.exists(name) for name in TOKENIZER_FILES)
    return replace(architecture, tokenizer_folder=str(folder.local_path().absolute())) if has_files else architecture


def _listed(settings: ModelSettings) -> Architecture:
    """The architecture of a name of open_clip's list, with the preprocessing of the settings' weights.

    A file's preprocessing is not known: a file of weights, like random weights, has the architecture's.
    """
    name = architecture_name(settings)
    tag = load_open_clip().get_pretrained_cfg(name, weights_name(settings))
    return Architecture(load_open_clip().get_model_config(name), _pixels(tag))


def architecture_name(settings: ModelSettings) -> str:
    """open_clip's name of an architecture of its list.

    OpenAI's weights want QuickGELU, which open_clip keeps in architectures of their own: the names that people
    write (ViT-B/16, RN50) mean those, unless the weights are a tag trained without it.

    Raises:
        UserError: open_clip has no such model.
    """
    name, tag = settings.name.replace("/", "-"), settings.pretrained
    models = load_open_clip().list_models()
    if name not in models:
        hint = schema.nearest(name, models)
        if not hint and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", settings.name):
            hint = f"; a repository of the Hugging Face hub is written {hub.PREFIX}{settings.name}"
        raise UserError(f"--model.name {settings.name}: no such model{hint}")
    cfg = load_open_clip().get_pretrained_cfg(name, tag) if tag else {}
    quick = cfg.get("quick_gelu", False) if cfg else is_openai_name(settings.name)
    return f"{name}-quickgelu" if quick and f"{name}-quickgelu" in models else name


def twin_name(settings: ModelSettings) -> str:
    """Name of the architecture of open_clip's list that differs by its activation alone; '' where there is none."""
    if settings.name.startswith((hub.PREFIX, LOCAL)):
        return ""
    name = architecture_name(settings)
    plain = name.removesuffix("-quickgelu")
    twin = f"{plain}-quickgelu" if name == plain else plain
    return twin if twin in load_open_clip().list_models() else ""


def is_openai_name(name: str) -> bool:
    """Whether the name is one that OpenAI gave: ViT-B/16 and its like, RN50 and its like."""
    return re.fullmatch(r"ViT-\w/\d+(@\d+px)?|RN\d+(x\d+)?", name) is not None


def weights_name(settings: ModelSettings) -> str:
    """The open_clip tag, the file, or the folder or repository of the weights to start from; '' for random ones."""
    if settings.name.startswith((hub.PREFIX, LOCAL)):
        usual = settings.name
    else:
        usual = "openai" if is_openai_name(settings.name) else ""
    return "" if settings.pretrained == "none" else settings.pretrained or usual


# --- Other sizes of images -------------------------------------------------------------------------------------------


def resized(architecture: Architecture, size: int, name: str) -> Architecture:
    """The architecture for images of another size, in pixels, as open_clip can build it from its JSON alone.

    Raises:
        UserError: the image tower is not made for that size.
    """
    if size == architecture.size:
        return architecture
    cfg = deepcopy(architecture.model_cfg)
    vision = cfg["vision_cfg"]
    refused = f"--model.image_size {size}: the image tower of {name} "
    if timm_name := vision.get("timm_model_name"):
        vision["timm_model_name"] = _timm_name(timm_name, size, refused)
    elif isinstance(vision["layers"], list):
        raise UserError(f"{refused}takes {architecture.size} alone: leave it out, or take a ViT")
    elif size % (patch := vision["patch_size"]):
        raise UserError(f"{refused}cuts images into patches of {patch} pixels: take {_multiples(size, patch)}")
    vision["image_size"] = size
    return replace(architecture, model_cfg=cfg)


def _multiples(size: int, step: int) -> str:
    below = size // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _timm_name(name: str, size: int, refused: str) -> str:
    """timm's name of a tower for images of another size. Towers of convolutions take any, under the same name."""
    import timm

    stem = _without_number(name)
    if stem == name and not size % 32:
        return name
    if stem == name:
        raise UserError(f"{refused}halves images five times: take {_multiples(size, 32)}")
    if timm.is_model(f"{stem}_{size}"):
        return f"{stem}_{size}"
    sizes = sorted({int(other[-3:]) for other in timm.list_models(f"{stem}_*") if _without_number(other) == stem})
    raise UserError(f"{refused}is there for {', '.join(map(str, sizes))} alone: take one of these")
