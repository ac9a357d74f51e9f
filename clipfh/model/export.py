"""A checkpoint as a folder that any open_clip user can load, checked against the checkpoint before it is done."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from clipfh import UserError, __version__
from clipfh.config import schema
from clipfh.config.experiment import Experiment
from clipfh.data import photo
from clipfh.data.catalogue import Catalogue
from clipfh.data.splits import SPLITS
from clipfh.model import onnx
from clipfh.model.architecture import load_open_clip, weights_name
from clipfh.model.clip import get_architecture, get_preprocess, load_tokenizer
from clipfh.storage import layout
from clipfh.storage.output import require_writable
from clipfh.storage.store import Folder

TOLERANCE = 1e-5
TEXTS = ("a red dress", "Women's blouse. Cotton, with a V-neck and long sleeves.", "jeans")
"""Words that the export and the checkpoint must embed alike."""

Evidence = Mapping[str, Any]
"""What a model card tells besides the settings, as far as it is there: `catalogue` (path, hash, counts), `test` and
`zero_shot` (metrics), `val_mAP` and `start_val_mAP`, `warm_start`, `refit` (on train and validation items together),
`blend` (a sweep's `runs` whose weights were averaged, and their `share`; the rest is the start's)."""


def write_export(
    clip: nn.Module,
    experiment: Experiment,
    out: str | Path | Folder,
    evidence: Evidence | None = None,
    photos: Sequence[bytes] = (),
    with_onnx: bool = False,
) -> Folder:
    """Write the model as `open_clip.create_model_and_transforms("local-dir:OUT")` takes it.

    Args:
        clip: weights to export.
        experiment: the experiment that made them.
        out: folder to write; must not exist, or be empty.
        evidence: facts for the model card, as the caller has read or measured them.
        photos: encoded images to check with, two or more; else noise is taken.
        with_onnx: also write both towers as ONNX, into `OUT/onnx`.

    Raises:
        UserError: something is there already, or a library for ONNX is missing.
    """
    require_writable(out)
    out, photos = Folder(out), photos if len(photos) > 1 else _noise()
    if not out.is_empty():
        raise UserError(f"--out {out} is not empty: remove it, or name another folder")
    if with_onnx:
        onnx.require_libraries()
    clip = clip.cpu().eval()
    with out.filling(last=layout.EXPORTED_WEIGHTS) as folder:
        architecture = get_architecture(clip)
        weights = {name: tensor.detach().contiguous() for name, tensor in clip.state_dict().items()}
        save_file(weights, folder / layout.EXPORTED_WEIGHTS)
        (folder / layout.OPEN_CLIP_CONFIG).write_text(architecture.to_open_clip())
        (folder / layout.EXPERIMENT).write_text(schema.to_json(experiment))
        start = {"warm_start": (evidence or {}).get("warm_start")}
        (folder / layout.START).write_text(json.dumps(start) + "\n")
        shutil.copyfile(photo.__file__, folder / layout.READ_PHOTO)
        (folder / layout.CARD).write_text(card(experiment, evidence or {}, clip, with_onnx))
        if hasattr(tokenizer := load_tokenizer(architecture), "save_pretrained"):
            tokenizer.save_pretrained(str(folder))
        shutil.copymode(folder / layout.CARD, folder / layout.EXPORTED_WEIGHTS)  # safetensors' files are private
        _check_parity(clip, folder, photos)
        if with_onnx:
            onnx.write_towers(clip, folder / layout.ONNX, photos, TEXTS)
    return out


def sample_photos(catalogue: Catalogue, count: int = 8) -> list[bytes]:
    """Some photos of a catalogue, encoded."""
    split = next(name for name in reversed(SPLITS) if catalogue.num_images(name))
    return list(catalogue.images_at(catalogue.rows(split)["path"][:count].to_pylist()).values())


def _noise(count: int = 4) -> list[bytes]:
    """Encoded images of noise."""
    encoded = []
    for pixels in np.random.default_rng(0).integers(0, 256, (count, 300, 200, 3), dtype=np.uint8):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        encoded.append(png.getvalue())
    return encoded


@torch.no_grad()
def _check_parity(clip: Any, folder: Path, photos: Sequence[bytes]) -> None:
    """Check that the written folder, with its own preprocessing and tokenizer, embeds as the model does."""
    name = f"local-dir:{folder}"
    fresh, _, preprocess = load_open_clip().create_model_and_transforms(name)
    fresh.eval()
    theirs = torch.stack([preprocess(Image.open(io.BytesIO(photo))) for photo in photos])
    ours = onnx.pixel_values(photos, get_preprocess(clip))
    tokens = load_open_clip().get_tokenizer(name)(list(TEXTS))
    pairs = (
        (clip.encode_image(ours, normalize=True), fresh.encode_image(theirs, normalize=True)),
        (clip.encode_text(tokens, normalize=True), fresh.encode_text(tokens, normalize=True)),
    )
    worst = max((one - other).abs().max().item() for one, other in pairs)
    if not worst <= TOLERANCE:  # NaN too
        raise RuntimeError(f"nothing was exported: its embeddings would differ from the checkpoint's by {worst:g}")


# --- The model card --------------------------------------------------------------------------------------------------


def card(experiment: Experiment, evidence: Evidence, clip: nn.Module, with_onnx: bool) -> str:
    """The model card, which is `card.md` filled in: the model, its data, settings, metrics, use and limits."""
    start = evidence.get("warm_start") or weights_name(experiment.model)
    reached = [evidence[key] for key in ("start_val_mAP", "val_mAP") if key in evidence]
    pages = Environment(loader=PackageLoader("clipfh.model", ""), undefined=StrictUndefined, keep_trailing_newline=True)
    pages.filters["plain"] = plain
    return pages.get_template("card.md").render(
        name=experiment.model.name,
        version=__version__,
        towers="image tower was" if experiment.stage == "image" else "image and text towers were",
        start=f"the weights {plain(start)}" if start else "random weights",
        is_untuned="test" in evidence and evidence["test"] == evidence["zero_shot"],
        size=get_preprocess(clip).size,
        context=load_tokenizer(get_architecture(clip)).context_length,
        onnx={tower.encode.removeprefix("encode_"): tower for tower in onnx.TOWERS} if with_onnx else None,
        catalogue=_data(evidence.get("catalogue") or {}),
        image_size=(evidence.get("catalogue") or {}).get("image_size", photo.IMAGE_SIZE),
        refit=evidence.get("refit", False),
        blend=_blend(evidence.get("blend") or {}),
        table=_metrics_table(evidence),
        val_mAP=[f"{value:.3f}" for value in reached],
        settings=schema.flatten(experiment).items(),
    )


def plain(value: object) -> str:
    """A value that Markdown and HTML show as it is, on one line, also in a table."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"[\\`*_\[\]{}|#~$]", r"\\\g<0>", text)


def _data(catalogue: Mapping[str, Any]) -> dict[str, str]:
    """The card's facts on the catalogue; empty where the evidence names none."""
    if not catalogue:
        return {}
    counts = {n: f"{c['images']:,} photos of {c['items']:,} items" for n, c in catalogue["counts"].items()}
    return {"name": Folder(catalogue["path"]).name, "hash": catalogue["hash"][:12], **counts}


def _blend(blend: Mapping[str, Any]) -> str:
    """Words on the runs that the weights are made of, if several; else empty."""
    if not blend or (len(blend["runs"]) == 1 and blend["share"] == 1):
        return ""
    number, share = len(blend["runs"]), blend["share"]
    runs = f"the average of those of {number} runs of one search" if number > 1 else "those of one run"
    return runs if share == 1 else f"{share:.0%} {runs}, and {1 - share:.0%} those that training started from"


def _metrics_table(evidence: Evidence) -> dict[str, Any]:
    """The table of the card; nothing where the test split was not measured."""
    if "test" not in evidence:
        return {}
    before, after = evidence["zero_shot"], evidence["test"]
    return {
        "counts": f"{after['num_query']:,} queries and {after['num_gallery']:,} gallery photos",
        "rows": [(label, _with_interval(before, key), _with_interval(after, key)) for key, label in TABLE],
    }


TABLE = (("mAP", "mAP"), ("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10"))


def _with_interval(metrics: Mapping[str, Any], key: str) -> str:
    low, high = metrics["intervals"][key]
    return f"{metrics[key]:.3f} [{low:.3f}, {high:.3f}]"
