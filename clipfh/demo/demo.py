"""The demonstration: from drawn garments to the exported model of a small sweep."""

from collections.abc import Callable
from pathlib import Path

from clipfh import UserError
from clipfh.demo.source import write_source

SWEEP = Path(__file__).resolve().parents[2] / "sweeps" / "demo.yaml"
ITEMS, PHOTO_SIZE, SEED = 400, 96, 0


def run(out: Path, log: Callable[[str], None] = print) -> None:
    """Draw garments, prepare their catalogue, sweep the small model's settings, export the best model, all to `out`.

    Raises:
        UserError: `out` is not empty, or the sweep file, which only a clone of the project has, is missing.
    """
    from clipfh.cluster.connect import connected
    from clipfh.config import sweep_file
    from clipfh.data.prepare import prepare
    from clipfh.sweep import sweep

    if not SWEEP.is_file():
        raise UserError(f"{SWEEP} is missing: the demo runs from a clone of the project")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty: remove it, or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    log(f"1. drawing {ITEMS} garments: {out}/photos")
    write_source(out / "photos", items=ITEMS, seed=SEED, size=PHOTO_SIZE)
    log(f"2. clipfh prepare --source {out}/photos --out {out}/catalogue --image-size {PHOTO_SIZE}")
    catalogue = prepare(str(out / "photos"), out / "catalogue", image_size=PHOTO_SIZE, seed=SEED)
    log(
        "   "
        + ", ".join(f"{split} {count['images']:,}" for split, count in catalogue.manifest["counts"].items())
        + " images"
    )
    log(f"3. clipfh sweep sweeps/demo.yaml {out}/catalogue --out {out}/sweep")
    file = sweep_file.load(SWEEP)
    with connected(placement=file.placement):
        summary = sweep.run(file, catalogue, out / "sweep", log=lambda line: log("   " + line))
    log("\n" + sweep.outcome(summary, out / "sweep"))
