"""The commands. Each parses, builds and runs; what they run loads only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import errno
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clipfh import UserError, __version__, config

DESCRIPTION = "Tune CLIP to find the same item again in a catalogue of photos."

COMMANDS = {
    "prepare": "photos and texts to a catalogue",
    "prompts": "report on the texts, and write an item's prompt each",
    "evaluate": "measure a model, or the pretrained one (zero-shot)",
    "train": "fine-tune the image tower, or both",
    "sweep": "search settings with Ray Tune and Optuna, export the best trial",
    "export": "a run's or sweep's best model, for any open_clip user",
    "report": "an HTML page on an evaluation, a run, a sweep, or several",
    "demo": "all of it on a small drawn catalogue",
}


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and the nearest valid name for a misspelt one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="clipfh", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"clipfh {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    commands = {name: subparsers.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    _prepare_arguments(commands["prepare"])
    _prompts_arguments(commands["prompts"])
    _evaluate_arguments(commands["evaluate"])
    _train_arguments(commands["train"])
    _sweep_arguments(commands["sweep"])
    commands["export"].add_argument("path", help="a run, a checkpoint or a sweep")
    commands["export"].add_argument("--out", required=True, help="folder to write")
    commands["report"].add_argument("paths", nargs="+", metavar="DIR", help="evaluations, runs, sweeps")
    commands["report"].add_argument("--out", help="HTML file; default: report.html in the first DIR")
    commands["demo"].add_argument("--out", default="demo", help="folder to write (default: %(default)s)")
    return top


def _prepare_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--source", required=True, help="In-Shop as distributed, a CSV or Parquet file, a folder of item folders"
    )
    p.add_argument("--out", required=True, help="catalogue to write")
    p.add_argument(
        "--val-fraction", type=float, default=0.1, help="share of train items held out (default: %(default)s)"
    )
    p.add_argument("--image-size", type=int, default=256, help="short side kept, pixels (default: %(default)s)")
    p.add_argument(
        "--max-bad", type=_share, default=0.01, metavar="SHARE", help="unreadable images allowed (default: 1%%)"
    )
    p.add_argument("--seed", type=int, default=0)


def _share(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _prompts_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("catalogue")
    p.add_argument("--strategy", choices=("raw", "clean", "structured"), default="structured")
    p.add_argument("--out", help="JSON of item to prompt, to edit and train on (--text.file)")
    p.add_argument("--model", default="ViT-B/16", help="whose tokenizer counts (default: %(default)s)")


def _evaluate_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("catalogue")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--checkpoint", help="a run, checkpoint, export or weights file; default: zero-shot")
    p.add_argument("--split", choices=("test", "val"), default="test")
    p.add_argument("--random-splits", type=int, default=10, metavar="N")
    _cluster_arguments(p)
    _setting_arguments(p, ("model.", "text.", "seed"))


def _train_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("stage", choices=("image", "joint"))
    p.add_argument("catalogue")
    p.add_argument("--out", required=True, help="folder of the run")
    p.add_argument("--preset", help=f"settings to start from: {', '.join(config.PRESETS)}")
    p.add_argument("--warm-start", metavar="PATH", help="a run, checkpoint, export or weights file to start from")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--workers", default="1", help="training processes; divides batch.items (default: 1)")
    p.add_argument("--gpus-per-worker", default="auto", metavar="X")
    p.add_argument("--cpus-per-worker", default="auto", metavar="X")
    _cluster_arguments(p)
    _setting_arguments(p)


def _sweep_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE.yaml", help="sweep file; sweeps/ has some")
    p.add_argument("catalogue")
    p.add_argument("--out", required=True, help="folder of the sweep")
    p.add_argument("--trials", type=int, help="in place of the file's")
    p.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    p.add_argument("--dry-run", action="store_true", help="show what would be done")
    _cluster_arguments(p)
    _setting_arguments(p)


def _cluster_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--address", help="Ray cluster, HOST:6379 or auto; default: RAY_ADDRESS, else this machine alone")
    p.add_argument("--dashboard", action="store_true", help="Ray's dashboard, on this machine's loopback")


def _setting_arguments(p: argparse.ArgumentParser, groups: Sequence[str] = ("",)) -> None:
    group = p.add_argument_group("settings")
    for name, _, default, doc in config.fields():
        if name != "stage" and name.startswith(tuple(groups)):
            group.add_argument(
                f"--{name}", dest=name, metavar="X", help=f"{doc} (default: {default})".replace("%", "%%")
            )
    group.add_argument("--model", dest="model.name", metavar="NAME", help="the same as --model.name")
    if "" in groups:
        group.add_argument("--loss", metavar="A+B", help=f"terms to switch on: {', '.join(config.TERMS)}")
        group.add_argument("--prompt-json", dest="text.file", metavar="FILE", help="the same as --text.file")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, typed."""
    names = [name for name, *_ in config.fields()]
    given = {n: config.parse(n, v) for n, v in vars(args).items() if n in names and n != "stage" and v is not None}
    return {**(config.loss_terms(args.loss) if getattr(args, "loss", None) else {}), **given}


# --- The commands ----------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    from clipfh import catalogue

    with _progress("images") as tell:
        made = catalogue.prepare(
            args.source,
            args.out,
            val_fraction=args.val_fraction,
            image_size=args.image_size,
            max_bad=args.max_bad,
            seed=args.seed,
            progress=tell,
        )
    print(
        _table(["split", "images", "items"], [[s, c["images"], c["items"]] for s, c in made.manifest["counts"].items()])
    )
    for note in made.manifest["notes"]:
        print(f"note: {note}")
    print(f"catalogue {args.out}")


def prompts(args: argparse.Namespace) -> None:
    from clipfh import catalogue, model, prompts, train

    counter = model.token_counter(config.Model(name=args.model))
    items = train.item_texts(catalogue.open_catalogue(args.catalogue), *catalogue.SPLITS)
    print(prompts.format_report(prompts.report(items, counter)))
    if args.out:
        made = prompts.build(args.strategy, items, counter)
        prompts.save_prompts(args.out, made)
        print(f"{len(made):,} prompts: {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    from clipfh import catalogue, checkpoint, cluster, evaluate, model, train

    opened = catalogue.open_catalogue(args.catalogue)
    weights = checkpoint.load(args.checkpoint) if args.checkpoint else None
    experiment = (weights.experiment if weights else None) or config.resolve("image", None, _settings(args))
    experiment = config.replace(experiment, _settings(args))
    clip = (
        model.with_weights(experiment.model, weights.state, args.checkpoint) if weights else train.start_of(experiment)
    )
    _connect(args)
    splits = evaluate.splits_of(args.split)
    texts = train.prompts_of(opened, experiment, *splits)
    embedded = evaluate.embed(opened, splits, clip, experiment.model, texts)
    found = evaluate.figures(embedded, args.random_splits)
    evaluate.write(args.out, found, embedded)
    keys = ("mAP", "rank1", "rank5", "rank10", "mAP_at_R", "mINP")
    print(_table(["", "value", "95% interval"], [[k, f"{found[k]:.4f}", _interval(found, k)] for k in keys]))
    print(
        f"{found['num_query']:,} queries, {found['num_gallery']:,} gallery images; all figures: {args.out}/metrics.json"
    )
    cluster.disconnect()


def train(args: argparse.Namespace) -> None:
    from clipfh import catalogue, cluster, train

    placement = _placement(args)
    settings = _settings(args)
    opened, out = catalogue.open_catalogue(args.catalogue), Path(args.out)
    given = (
        None if args.resume and not settings and not args.preset else config.resolve(args.stage, args.preset, settings)
    )
    clip, experiment = train.begin(out, given, opened, args.warm_start, args.resume)
    _connect(args, placement)
    resources = cluster.place(placement)
    print(f"{experiment.stage} stage of {experiment.model.name} on {opened.num_images('train'):,} images: {resources}")
    inputs = train.inputs_of(opened, experiment, clip)
    if inputs.num_single:
        print(train.single_views(inputs.num_single))
    with _followed(out, train.budget_of(experiment, inputs.num_images).total * experiment.batch.images):
        train.fit(experiment, inputs, out, resources, retries=3)
    last = train.read_metrics(out)[-1]
    if "diverged" in last:
        raise UserError(last["diverged"])
    print(f"best val mAP {last['best_val_mAP']:.4f}: clipfh export {out} --out FOLDER makes a model of it")
    cluster.disconnect()


def sweep(args: argparse.Namespace) -> None:
    from clipfh import catalogue, space

    loaded = space.load(args.file, _settings(args), args.trials)
    opened = catalogue.open_catalogue(args.catalogue)
    if args.dry_run:
        print(space.resolved(loaded), end="")
        print(f"# {loaded.trials} trials of {loaded.experiment(loaded.first).budget.images:,} images at most")
        return
    from clipfh import cluster, sweep

    _connect(args, loaded.placement)
    print(f"Ray's logs: {cluster.logs()}")
    print(sweep.outcome(sweep.run(loaded, opened, args.out, resume=args.resume), args.out))
    cluster.disconnect()


def export(args: argparse.Namespace) -> None:
    from clipfh import checkpoint, export, model

    weights = checkpoint.load(args.path)
    if weights.experiment is None:
        raise UserError(
            f"{args.path} is a bare weights file: open_clip loads it as it is; export takes a run or a sweep"
        )
    clip = model.with_weights(weights.experiment.model, weights.state, args.path)
    export.export(clip, weights.experiment, args.out)
    print(f'open_clip.create_model_and_transforms("local-dir:{args.out}") loads it; embeddings equal the checkpoint\'s')


def report(args: argparse.Namespace) -> None:
    from clipfh import report

    print(f"report {report.write(args.paths, Path(args.out) if args.out else None)}")


def demo(args: argparse.Namespace) -> None:
    from clipfh import demo

    demo.run(Path(args.out))


def _placement(args: argparse.Namespace) -> config.Placement:
    names = ("workers", "gpus_per_worker", "cpus_per_worker")
    return config.Placement(**{n: config.parse(n, getattr(args, n), config.Placement) for n in names})


def _connect(args: argparse.Namespace, placement: config.Placement | None = None) -> None:
    from clipfh import cluster

    cluster.connect(args.address, placement, args.dashboard)


# --- What people see -------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console = Console()
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip()


def _interval(found: dict[str, Any], key: str) -> str:
    low, high = found["intervals"][key]
    return f"{low:.4f} to {high:.4f}"


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in a terminal, a line every tenth elsewhere."""
    if not sys.stdout.isatty():
        yield _Tenths(unit)
        return
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Tenths:
    def __init__(self, unit: str) -> None:
        self.unit, self.told = unit, 0

    def __call__(self, done: int, total: int) -> None:
        if done * 10 // max(1, total) > self.told:
            self.told = done * 10 // total
            print(f"{done:,} of {total:,} {self.unit}", flush=True)


@contextlib.contextmanager
def _followed(out: Path, images: int) -> Iterator[None]:
    """A line for each report of a run while it trains."""
    from clipfh import train

    over = threading.Event()
    told = len(train.read_metrics(out))

    def follow() -> None:
        nonlocal told
        ended = False
        while not ended:
            ended = over.wait(0.5)
            lines = train.read_metrics(out)
            for line in lines[told:]:
                print(_report_line(line, images), flush=True)
            told = max(told, len(lines))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _report_line(line: dict[str, Any], images: int) -> str:
    if "diverged" in line:
        return str(line["diverged"])
    return (
        f"{line['images']:,} of {images:,} images: loss {line['loss']:.3f}, val mAP {line['val_mAP']:.4f} "
        f"(best {line['best_val_mAP']:.4f}), {line['images_per_second']:.0f} images/s, "
        f"{line['data_wait']:.0%} of the time waiting for data"
    )


# --- Errors ----------------------------------------------------------------------------------------------------------


def _mendable(error: BaseException) -> str | None:
    """The one line for an error that the user can mend, wherever in the chain of causes it stands."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return str(seen)
        if "No space left on device" in str(seen) or getattr(seen, "errno", None) == errno.ENOSPC:
            where = getattr(seen, "filename", None) or "the output"
            return f"no room on disk for {where}: free some, then run the same again, a run or sweep with --resume"
        if isinstance(seen, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
            return f"{seen.filename}: {seen.strerror.lower()}: check the path" if seen.strerror else str(seen)
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on what the user can mend, 1 on our bugs."""
    try:
        args = parser().parse_args(argv)
        globals()[args.command](args)
        return 0
    except KeyboardInterrupt:
        print("clipfh: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        line = _mendable(error)
        if line is None:
            raise
        print(f"clipfh: {' '.join(line.split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
