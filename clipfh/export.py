"""A checkpoint as a folder that any open_clip user can load, checked against the checkpoint before it is done."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from clipfh import UserError, __version__, checkpoint, config, model

TOLERANCE = 1e-5


def export(
    clip: nn.Module, experiment: config.Experiment, out: str | Path, metrics: dict[str, Any] | None = None
) -> Path:
    """Write the model as `open_clip.create_model_and_transforms("local-dir:OUT")` takes it.

    Args:
        clip: weights to export.
        experiment: that made them.
        out: folder to write; must not exist, or be empty.
        metrics: for the model card: `test` and `zero_shot`, as a sweep's summary has them.

    Raises:
        UserError: something is there already.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: remove it, or name another folder")
    with _whole_or_not_at_all(out) as folder:
        settings = experiment.model
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.state_dict().items()}
        save_file(weights, folder / checkpoint.EXPORTED)
        (folder / model.CONFIG_FILE).write_text(model.open_clip_config(settings, model.preprocess_of(clip)))
        (folder / checkpoint.EXPERIMENT).write_text(config.to_json(experiment))
        (folder / "README.md").write_text(_card(experiment, metrics or {}))
        _check_parity(clip, folder)
    return out


@contextlib.contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place only when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        folder = Path(made) / "export"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)


@torch.no_grad()
def _check_parity(clip: nn.Module, folder: Path) -> None:
    """Embeddings of the written folder equal the model's."""
    loaded, _, _ = model.library().create_model_and_transforms(f"local-dir:{folder}")
    side = model.preprocess_of(clip).size
    pixels = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    both: list[Any] = [clip, loaded]
    ours, theirs = (m.eval().cpu().encode_image(pixels, normalize=True) for m in both)
    worst = (ours - theirs).abs().max().item()
    assert worst <= TOLERANCE, f"the export's embeddings differ from the checkpoint's by {worst:g}"


def _card(experiment: config.Experiment, metrics: dict[str, Any]) -> str:
    """The model card."""
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in config.flat(experiment).items())
    return f"""# {experiment.model.name}, tuned for item retrieval

Tuned by clipfh {__version__}, {experiment.stage} stage.

```python
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH_OF_THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:PATH_OF_THIS_FOLDER")
model.eval()
embedding = model.encode_image(preprocess(photo).unsqueeze(0), normalize=True)
```

{_figures(metrics)}
## Settings

| setting | value |
|---|---|
{settings}

## Limits and licences

The figures hold for the catalogue that the model was tuned on; measure it on your own. The weights it started from and
the photos keep their own licences.
"""


def _figures(metrics: dict[str, Any]) -> str:
    if not metrics:
        return ""
    lines = [f"| {key} | {_shown(metrics['zero_shot'], key)} | {_shown(metrics['test'], key)} |" for key in _SHOWN]
    return "\n".join(["## Test split, 95% intervals\n", "| | zero-shot | this model |", "|---|---|---|", *lines, ""])


_SHOWN = ("mAP", "rank1", "rank5", "rank10")


def _shown(figures: dict[str, Any], key: str) -> str:
    low, high = figures["intervals"][key]
    return f"{figures[key]:.3f} [{low:.3f}, {high:.3f}]"
