"""Three models that differ in their weights alone: one whole, and two whose embeddings have few dimensions left."""

from pathlib import Path

import torch

from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model.clip import load_initial_model

RANKS = {"blind": 1, "dim": 16, "sharp": 512}
"""Name of each weights file to the dimensions that its embeddings have, the worst first."""
LABELS = [f"{SMALL_MODEL} {name}.pt" for name in RANKS]


def write_weights(folder: Path) -> list[dict[str, str]]:
    """Write the weights files; returns entries of a sweep file's `models`."""
    state = load_initial_model(ModelSettings(SMALL_MODEL), 0).state_dict()
    projection = state["visual.proj"]
    directions = torch.linalg.qr(torch.randn(len(projection.T), len(projection.T), generator=torch.manual_seed(0)))[0]
    for name, rank in RANKS.items():
        left = directions[:, :rank]
        torch.save({**state, "visual.proj": projection @ left @ left.T}, folder / f"{name}.pt")
    return [{"name": SMALL_MODEL, "pretrained": str(folder / f"{name}.pt")} for name in RANKS]
