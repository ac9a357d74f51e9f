"""Exports the model of a run or a sweep, with the metrics that the folders around it hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipfh import UserError
from clipfh.model import checkpoint
from clipfh.model.export import sample_photos, write_export
from clipfh.report import artifacts
from clipfh.storage.store import Folder


@dataclass(frozen=True)
class Export:
    """A folder that `export` wrote."""

    out: Folder
    catalogue: Folder | None
    """the catalogue whose photos the embeddings were compared on; None where it is gone, and noise was taken"""
    num_photos: int


def export(path: str | Path, out: str | Path, *, onnx: bool = False) -> Export:
    """Write a run's or a sweep's best model for any open_clip user, as `clipfh export` does.

    Args:
        path: a run, a checkpoint or a sweep.
        out: folder to write; must not exist, or be empty.
        onnx: also write both towers as ONNX, into `out/onnx`.

    Raises:
        UserError: no model to export, something is there already, or a library for ONNX is missing.
    """
    weights = checkpoint.load(path)
    if weights.experiment is None:
        raise UserError(f"{path} is a bare weights file: open_clip loads it as it is; export takes a run or a sweep")
    clip = checkpoint.build(weights, weights.experiment.model)
    evidence = artifacts.read_evidence(weights.path, weights.metrics)
    catalogue = artifacts.open_catalogue_again(evidence.get("catalogue") or {})
    photos = sample_photos(catalogue) if catalogue else []
    folder = write_export(clip, weights.experiment, out, evidence, photos, with_onnx=onnx)
    return Export(folder, catalogue.path if catalogue else None, len(photos))
