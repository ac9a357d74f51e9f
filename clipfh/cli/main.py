"""The commands. Each parses, builds and runs; what they run loads only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from clipfh import LOST, UserError, __version__, causes, mendable
from clipfh.config import presets, schema
from clipfh.config.experiment import LOSS_TERMS, Experiment, ModelSettings, Placement, require

DESCRIPTION = """Tune CLIP to find the same item again in a catalogue of photos.

In order: prepare, evaluate (zero-shot), train or sweep, export, report. The demo shows them all.
To look for a photo or words of your own: embed, search."""

# Name -> (what follows it in the usage line, what it does)
COMMANDS = {
    "prepare": ("--source PATH --out CATALOGUE [options]", "make a catalogue of photos and their texts"),
    "prompts": ("CATALOGUE [options]", "report on the texts, and write a prompt for each item"),
    "evaluate": ("CATALOGUE --out DIR [options] [settings]", "measure a model, or the pretrained one (zero-shot)"),
    "train": ("image|joint CATALOGUE --out DIR [options] [settings]", "fine-tune the image tower, or both towers"),
    "sweep": (
        "FILE.yaml CATALOGUE --out DIR [options] [settings]",
        "search settings with Ray Tune and Optuna, and export the best model",
    ),
    "status": ("DIR", "tell how a run or a sweep stands, without touching it"),
    "export": ("RUN_OR_SWEEP --out DIR [--onnx]", "write a run's or sweep's best model for any open_clip user"),
    "embed": (
        "CATALOGUE --out FILE.parquet [options] [settings]",
        "embed all images of a catalogue, to search in them",
    ),
    "search": ("--embeddings FILE.parquet (--image FILE | --text WORDS) [options]", "find a photo or words in them"),
    "submit": (
        "--address http://HEAD:8265 [--working-dir DIR] -- COMMAND ...",
        "run a command on a Ray cluster, as a job, from anywhere",
    ),
    "report": ("DIR [DIR ...] [--out FILE.html]", "write an HTML page on evaluations, runs and sweeps"),
    "demo": ("[--out DIR]", "do all of it on a small drawn catalogue"),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Names and their meaning in two columns, as wide as most names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one plain line, and which takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        plain = message.replace("invalid int value", "not a whole number").replace("invalid float value", "no number")
        raise UserError(f"{plain} (see {self.prog} --help)")


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The command line, and its commands by name."""
    top = _Parser(prog="clipfh", usage="clipfh COMMAND ...", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"clipfh {__version__}")
    group = top.add_subparsers(
        prog="clipfh",
        title="commands",
        description="clipfh COMMAND --help tells more.",
        dest="command",
        metavar="COMMAND",
        required=True,
    )
    commands = {
        name: group.add_parser(name, usage=f"clipfh {name} {usage}", help=text, description=text[0].upper() + text[1:])
        for name, (usage, text) in COMMANDS.items()
    }
    _prepare_arguments(commands["prepare"])
    _prompts_arguments(commands["prompts"])
    _evaluate_arguments(commands["evaluate"])
    _train_arguments(commands["train"])
    _sweep_arguments(commands["sweep"])
    commands["status"].add_argument("path", metavar="DIR", help="the --out of clipfh train or clipfh sweep")
    commands["export"].add_argument("path", metavar="RUN_OR_SWEEP", help="a run, a checkpoint or a sweep")
    commands["export"].add_argument("--out", required=True, metavar="DIR", help="folder to write")
    commands["export"].add_argument("--onnx", action="store_true", help="also both towers as ONNX")
    _embed_arguments(commands["embed"])
    _search_arguments(commands["search"])
    _submit_arguments(commands["submit"])
    commands["report"].add_argument("paths", nargs="+", metavar="DIR", help="evaluations, runs, sweeps")
    commands["report"].add_argument("--out", metavar="FILE", help="HTML file (default: report.html in the first DIR)")
    commands["demo"].add_argument("--out", default="demo", metavar="DIR", help="folder to write (default: demo)")
    return top, commands


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its arguments.

    argparse alone would tell of what is missing before it tells of what is misspelt, and takes `-1e-3` for an option.

    Raises:
        UserError: anything that does not fit.
    """
    top, commands = parsers()
    words = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    command = next((word for word in words if not word.startswith("-")), None)
    if command and command not in commands:
        raise UserError(f"unknown command {command}{schema.nearest(command, list(commands))} (see clipfh --help)")
    asked = commands[command] if command else top
    options = [name[2:] for name in asked._option_string_actions if name.startswith("--")]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:] not in options:
            near = schema.nearest(name[2:], options).replace("mean ", "mean --")
            raise UserError(f"{asked.prog} has no option {name}{near} (see {asked.prog} --help)")
    if command != "submit":
        return top.parse_args(_joined(argv))
    args = top.parse_args(words)
    args.words = list(argv[len(words) + 1 :])
    return args


def _joined(argv: Sequence[str]) -> list[str]:
    """The words, with a setting and its value as one where the value begins with a dash."""
    settings = {f"--{name}" for name, *_ in schema.fields()}
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] in settings and word.startswith("-") and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _prepare_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--source",
        required=True,
        metavar="PATH",
        help="In-Shop as distributed, a CSV or Parquet file, or a folder of item folders; a URI will do",
    )
    p.add_argument("--out", required=True, metavar="CATALOGUE", help="folder to write")
    p.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="share of the train items held out for validation (default: %(default)s)",
    )
    p.add_argument(
        "--image-size", type=int, default=256, metavar="N", help="pixels of the short side kept (default: %(default)s)"
    )
    p.add_argument(
        "--max-bad", type=_share, default=0.01, metavar="X%", help="share of unreadable images allowed (default: 1%%)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="draws the validation items (default: %(default)s)")


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 1% or 0.01") from None


def _prompts_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("catalogue", metavar="CATALOGUE")
    p.add_argument(
        "--strategy",
        choices=("raw", "clean", "structured"),
        default="structured",
        help="how a description becomes a prompt (default: %(default)s)",
    )
    p.add_argument("--out", metavar="FILE", help="JSON of item to prompt, to edit and train on (--text.file)")
    p.add_argument("--report", metavar="FILE", help="JSON of what was found, with all items named")
    p.add_argument("--model", default="ViT-B/16", metavar="NAME", help="whose tokenizer counts (default: %(default)s)")


def _evaluate_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("catalogue", metavar="CATALOGUE")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    p.add_argument("--checkpoint", metavar="PATH", help="a run, checkpoint, export or weights file; without: zero-shot")
    p.add_argument("--split", choices=("test", "val"), default="test", help="what to measure on (default: %(default)s)")
    p.add_argument(
        "--random-splits",
        type=int,
        default=10,
        metavar="N",
        help="how often a random image of each item is drawn as its query (default: %(default)s)",
    )
    p.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking of the gallery for each query")
    p.add_argument(
        "--skip-unmatched",
        action="store_true",
        help="leave out, and count, queries without another image of their item in the gallery; else an error",
    )
    _cluster_arguments(p)
    _setting_arguments(p, ("", "model", "text"))


def _embed_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("catalogue", metavar="CATALOGUE")
    p.add_argument("--out", required=True, metavar="FILE.parquet", help="file to write")
    p.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a run, sweep, checkpoint, export or weights file; without: the pretrained model",
    )
    _cluster_arguments(p)
    _setting_arguments(p, ("", "model", "text"))


def _search_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--embeddings", required=True, metavar="FILE.parquet", help="what clipfh embed wrote")
    query = p.add_mutually_exclusive_group(required=True)
    query.add_argument("--image", metavar="FILE", help="photo to look for")
    query.add_argument("--text", metavar="WORDS", help="words to look for, in quotes")
    p.add_argument("--top", type=int, default=10, metavar="N", help="how many finds (default: %(default)s)")
    p.add_argument("--html", metavar="FILE", help="a page with pictures of the finds")
    p.add_argument("--checkpoint", metavar="PATH", help="where the model lies, if no longer where it was")


def _train_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("stage", choices=("image", "joint"), help="train the image tower, or both")
    p.add_argument("catalogue", metavar="CATALOGUE")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    p.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(presets.PRESETS)}")
    p.add_argument("--warm-start", metavar="PATH", help="a run, checkpoint, export or weights file to start from")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    _track_argument(p)
    for name, hint, default, doc in schema.fields(Placement):
        if name not in ("concurrent", "keep_weights"):  # a sweep's
            p.add_argument(f"--{_dashed(name)}", metavar=_metavar(hint), help=f"{doc} (default: {default})")
    _cluster_arguments(p)
    _setting_arguments(p)


def _sweep_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE.yaml", help="sweep file; sweeps/ has some")
    p.add_argument("catalogue", metavar="CATALOGUE")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the sweep")
    p.add_argument("--trials", type=int, metavar="N", help="in place of the file's")
    p.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    p.add_argument("--retry-failed", action="store_true", help="with --resume: train the failed trials again too")
    p.add_argument("--dry-run", action="store_true", help="show what would be done")
    _track_argument(p)
    _cluster_arguments(p)
    _setting_arguments(p)


def _track_argument(p: argparse.ArgumentParser) -> None:
    p.add_argument("--track", choices=("mlflow", "wandb"), help="also send the reports to MLflow or Weights & Biases")


def _submit_arguments(p: argparse.ArgumentParser) -> None:
    p.epilog = "Behind -- stands a command with its arguments: sweep, train, evaluate, prepare, ..."
    p.add_argument("--address", required=True, metavar="URL", help="the cluster's dashboard, http://HEAD:8265")
    p.add_argument(
        "--working-dir",
        default=".",
        metavar="DIR",
        help="folder to send along, in a copy of which the command runs (default: this one)",
    )


def _cluster_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--address", help="Ray cluster, HOST:6379 or auto (default: RAY_ADDRESS, else this machine alone)")
    p.add_argument("--dashboard", action="store_true", help="Ray's dashboard, on this machine's loopback")


def _setting_arguments(p: argparse.ArgumentParser, shown: Sequence[str] = ()) -> None:
    """An option for each setting, by groups; all of them, or those of the groups shown."""
    image, joint = (schema.flatten(presets.resolve(stage)) for stage in ("image", "joint"))
    groups: dict[str, Any] = {}
    for name, hint, _, doc in schema.fields():
        of = name.rpartition(".")[0]
        if name == "stage" or (shown and of not in shown):
            continue
        if of not in groups:
            groups[of] = p.add_argument_group(*_group(of))
        groups[of].add_argument(
            f"--{name}", metavar=_metavar(hint), help=(doc + _default(image[name], joint[name])).replace("%", "%%")
        )
    groups["model"].add_argument("--model", dest="model.name", metavar="NAME", help="the same as --model.name")
    groups["text"].add_argument("--prompt-json", dest="text.file", metavar="FILE", help="the same as --text.file")
    if "loss" in groups:
        terms = "+".join(LOSS_TERMS)
        groups["loss"].add_argument("--loss", metavar="A+B", help=f"switch on these terms alone, of {terms}")


def _group(name: str) -> tuple[str, str]:
    """Title and text of a group of settings."""
    if not name:
        return "settings", "Defaults are those of the preset 'recommended'; clipfh-small takes 'scratch'."
    return f"{name} settings", str(typing.get_type_hints(Experiment)[name].__doc__)


def _metavar(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(choices)
    return {bool: "true|false", int: "N", str: "TEXT"}.get(hint, "X" if not choices else "X|auto")


def _default(image: Any, joint: Any) -> str:
    if image != joint:
        return f" (default: {image}; joint stage: {joint})"
    text = str(image).lower() if isinstance(image, bool) else str(image)
    return f" (default: {text})" if text else ""


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, typed."""
    names = [name for name, *_ in schema.fields() if name != "stage"]
    given = {n: schema.parse(n, vars(args)[n]) for n in names if vars(args).get(n) is not None}
    shorthand = getattr(args, "loss", None)
    return {**({} if shorthand is None else presets.loss_terms(shorthand)), **schema.with_absolute_paths(given)}


def _placement(args: argparse.Namespace) -> Placement:
    given = {name: getattr(args, name) for name in ("workers", "gpus_per_worker", "cpus_per_worker", "keep_gib")}
    return Placement(**{n: schema.parse(n, text, Placement) for n, text in given.items() if text is not None})


# --- The commands ----------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    from clipfh.data.prepare import prepare

    pass

    with _progress("images") as tell:
        made = prepare(
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
    from clipfh.data import catalogue
    from clipfh.data.prompts import build_prompts, item_texts, save_prompts
    from clipfh.data.splits import SPLITS
    from clipfh.data.text_report import examine_texts, format_findings, save_findings

    pass

    opened = catalogue.open_catalogue(args.catalogue)
    pass
    from clipfh.model.clip import load_tokenizer, make_token_counter

    settings = ModelSettings(name=args.model)
    counter, limit = make_token_counter(settings), load_tokenizer(settings).context_length
    items = item_texts(row for split in SPLITS for row in opened.rows(split).to_pylist())
    found = examine_texts(items, counter, limit)
    print(format_findings(found))
    if args.report:
        save_findings(args.report, found)
    if args.out:
        made = build_prompts(args.strategy, items, counter, limit)
        save_prompts(args.out, made)
        print(f"{len(made):,} prompts: {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    from clipfh.data import catalogue
    from clipfh.retrieval import evaluate
    from clipfh.storage import layout
    from clipfh.storage.store import Folder

    pass

    settings, out = _settings(args), Path(args.out)
    require(args.random_splits >= 0, "random-splits", "0 or more", args.random_splits)
    opened = catalogue.open_catalogue(args.catalogue)
    if _in_use(out) and not any((out / file).exists() for file in ("predictions.parquet", "embeddings.parquet")):
        raise UserError(f"--out {out} is not empty, and holds no evaluation to replace: name another folder")
    pass
    from clipfh.train.inputs import load_prompts_for

    splits = evaluate.splits_of(args.split)
    opened.require(*splits)
    clip, experiment, _ = _model(args, settings)
    texts = load_prompts_for(opened, experiment, *splits)
    mark = evaluate.fingerprint(opened, splits, clip, experiment.model, texts)
    embedded = evaluate.kept(out, mark, opened, splits, texts)
    if embedded:
        print(f"embeddings of the same model, images and prompts are in {out}: used again")
    else:
        with _all_or_nothing(out, "embeddings.parquet"), _to_embed(args), _progress("images embedded") as tell:
            embedded = evaluate.embed_splits(opened, splits, clip, experiment.model, texts, tell)
            evaluate.keep(out, mark, embedded)
    found = evaluate.measure(out, embedded, args.random_splits, args.skip_unmatched, args.rerank)
    of = {"path": str(opened.path), "hash": opened.manifest["hash"]}
    told = {"catalogue": of, "split": args.split, "model": experiment.model.name, "checkpoint": args.checkpoint}
    Folder(out).write(layout.EVALUATION, json.dumps(told, indent=2) + "\n")
    print(_figures(found))
    top = evaluate.TOP
    print(f"all figures: {out}/metrics.json; the first {top} finds of each query: {out}/predictions.parquet")


def _model(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[Any, Experiment, str]:
    """The model at --checkpoint or else the pretrained one, its experiment, and the path of its weights."""
    from clipfh.model import checkpoint
    from clipfh.model.clip import load_weights
    from clipfh.train.inputs import load_start

    weights = checkpoint.load(args.checkpoint) if args.checkpoint else None
    experiment = (weights.experiment if weights else None) or presets.resolve("image", None, settings)
    exact = {"model.precision": "float32"} if settings.get("model.precision") != "bfloat16" else {}  # as exports are
    experiment = schema.replace(experiment, {**settings, **exact})
    if weights is None:
        return load_start(experiment), experiment, ""
    return load_weights(experiment.model, weights.state, args.checkpoint), experiment, weights.path


def train(args: argparse.Namespace) -> None:
    from clipfh.data import catalogue

    pass

    placement, settings, out = _placement(args), _settings(args), Path(args.out)
    as_it_was = args.resume and not settings and not args.preset
    given = None if as_it_was else presets.resolve(args.stage, args.preset, settings)
    opened = catalogue.open_catalogue(args.catalogue)
    from clipfh.config.schedule import make_schedule
    from clipfh.storage import run_folder
    from clipfh.train import in_process, track
    from clipfh.train.inputs import is_warm_started, notes_on_singles, open_run, prepare_inputs

    track.require(args.track)
    alone = in_process.wanted(placement, args.address, args.out)
    with _all_or_nothing(out, "checkpoints/checkpoint_*"):
        clip, experiment = open_run(out, given, opened, args.warm_start, args.resume)
        if experiment.stage != args.stage:
            raise UserError(
                f"--resume: {out} is of the {experiment.stage} stage: write clipfh train {experiment.stage}"
            )
        with contextlib.nullcontext() if alone else _connected(args, placement):
            run = _run_here(placement) if alone else _run_over_a_cluster(placement)
            images = opened.num_images("train")
            print(f"{experiment.stage} stage of {experiment.model.name} on {images:,} images: {run.where}", flush=True)
            if experiment.stage == "joint" and not experiment.loss.takes_text:
                print("note: no term learns from prompts, so the text tower stays as it is: see --loss.infonce")
            inputs = prepare_inputs(opened, experiment, clip, run.feed, placement.keep_gib, warm=is_warm_started(out))
            for note in notes_on_singles(inputs, experiment.loss):
                print(note)
            schedule = make_schedule(experiment, inputs.num_images, inputs.num_single)
            with track.following(args.track, out):
                run.fit(
                    experiment, inputs, out, functools.partial(_tell_report, schedule.num_steps * schedule.batch_images)
                )
    last = run_folder.read_metrics(out)[-1]
    if "diverged" in last:
        raise UserError(last["diverged"])
    print(f"best val mAP {last['best_val_mAP']:.4f}: clipfh export {out} --out FOLDER makes a model of it")


def sweep(args: argparse.Namespace) -> None:
    from clipfh.config import sweep_file
    from clipfh.data import catalogue
    from clipfh.sweep import sweep

    pass

    if args.retry_failed and not args.resume:
        raise UserError("--retry-failed trains failed trials of a sweep that is there: it goes with --resume")
    loaded = sweep_file.load(args.file, _settings(args), args.trials)
    opened, out = catalogue.open_catalogue(args.catalogue), Path(args.out)
    if args.dry_run:
        print(sweep_file.to_yaml(loaded), flush=True)
        print(_estimate(args, loaded, opened))
        return
    from clipfh.cluster import resources as cluster

    pass
    from clipfh.train import track

    track.require(args.track)
    with _all_or_nothing(out, "trials/*/metrics.json"), _connected(args, loaded.placement):
        print(f"Ray's logs: {cluster.logs()}", flush=True)
        with track.following(args.track, out), _live(out) as (tell, alone):
            how = {"resume": args.resume, "retry_failed": args.retry_failed}
            summary = sweep.run(loaded, opened, out, **how, tell=tell, each_report=alone)
        print(sweep.outcome(summary, out))


def _estimate(args: argparse.Namespace, loaded: Any, opened: Any) -> str:
    """What the sweep will take, measured on a worker of the cluster where there is one, else here."""
    from clipfh.sweep import estimate

    epoch = estimate.epoch(opened, loaded.experiment(loaded.first))
    if not (args.address or os.environ.get("RAY_ADDRESS")):
        asked = loaded.placement.gpus_per_worker
        how = {"gpus": None if asked == "auto" else asked, "workers": loaded.placement.workers}
        measured = estimate.measure(opened, loaded.experiment(loaded.first), **how)
        return estimate.told(loaded, measured, epoch)
    import ray

    from clipfh.cluster import resources as cluster

    with _connected(args, loaded.placement):
        resources = cluster.place(loaded.placement, alone=False)
        task: Any = ray.remote(estimate.measure).options(num_cpus=resources.cpus, num_gpus=resources.gpus)
        given = resources.threads, resources.gpus, resources.workers
        measured = ray.get(task.remote(opened, loaded.experiment(loaded.first), *given))
        at_once = cluster.at_once(loaded.placement, resources)
    return estimate.told(loaded, measured, epoch, at_once)


def status(args: argparse.Namespace) -> None:
    from clipfh.report import status

    pass

    print(status.describe(args.path))


def submit(args: argparse.Namespace) -> int:
    folder = Path(args.working_dir)
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: no such folder")
    _check_submission(args.words, folder)
    from clipfh.cluster import jobs

    return jobs.run(args.address, folder, args.words)


def _check_submission(words: Sequence[str], folder: Path) -> None:
    """Find here what the command would fail of on the cluster.

    Raises:
        UserError: no command, one that doesn't parse, or paths that mean nothing there.
    """
    if not words:
        raise UserError("clipfh submit needs a command: clipfh submit --address URL -- sweep FILE.yaml CATALOGUE ...")
    inner = parse(words)
    if inner.command in ("submit", "demo"):
        raise UserError(f"clipfh {inner.command} is for this machine, not for a job")
    settings = _settings(inner)
    for name in ("catalogue", "source", "path", "paths", "checkpoint", "warm_start", "out"):
        given = vars(inner).get(name) or []
        for path in [given] if isinstance(given, str) else given:
            if "://" not in path and not Path(path).is_absolute():
                raise UserError(
                    f"{path}: a job runs in a folder of its own, gone afterwards: "
                    "give a path from / on, which all nodes of the cluster see"
                )
    if inner.command == "sweep" and not Path(inner.file).is_absolute():
        from clipfh.config import sweep_file

        sweep_file.load(folder / inner.file, settings, inner.trials)


def export(args: argparse.Namespace) -> None:
    from clipfh.model import checkpoint, export
    from clipfh.model.clip import load_weights
    from clipfh.report import artifacts
    from clipfh.storage import layout

    weights = checkpoint.load(args.path)
    if weights.experiment is None:
        raise UserError(
            f"{args.path} is a bare weights file: open_clip loads it as it is; export takes a run or a sweep"
        )
    clip = load_weights(weights.experiment.model, weights.state, args.path)
    evidence = artifacts.read_evidence(weights.path, weights.metrics)
    catalogue = artifacts.open_catalogue_again(evidence.get("catalogue") or {})
    photos = export.sample_photos(catalogue) if catalogue else []
    export.export(clip, weights.experiment, args.out, evidence, photos, args.onnx)
    checked = f"{len(photos)} photos of {catalogue.path}" if catalogue else "noise, as its catalogue is not there"
    print(f"checked with {checked}: embeddings equal the checkpoint's")
    if args.onnx:
        print(f"ONNX towers: {args.out}/{layout.ONNX}")
    print(f'open_clip.create_model_and_transforms("local-dir:{args.out}") loads it; {args.out}/README.md tells more')


def embed(args: argparse.Namespace) -> None:
    from clipfh.data import catalogue
    from clipfh.data.splits import SPLITS
    from clipfh.retrieval import evaluate

    pass

    settings, out = _settings(args), Path(args.out)
    opened = catalogue.open_catalogue(args.catalogue)
    from clipfh.retrieval import embedding_file

    pass
    from clipfh.retrieval import lookup
    from clipfh.train.inputs import load_prompts_for

    if out.is_dir() or (out.exists() and embedding_file.mark_of(out) is None):
        raise UserError(f"--out {out} is there, and holds no embeddings to replace: name another file")
    clip, experiment, weights = _model(args, settings)
    splits = [split for split in SPLITS if opened.num_images(split)]
    prompts = load_prompts_for(opened, experiment, *splits)
    with _to_embed(args), _progress("images embedded") as tell:
        embedding = evaluate.choose_encoder(clip, experiment.model).images(opened, splits, tell)
    rows = evaluate.prompted(opened, splits, prompts)
    embedding_file.write(out, rows, embedding, lookup.mark(clip, experiment, weights, opened))
    print(f"{len(embedding):,} embeddings of {embedding.shape[1]} numbers: {out}")
    print(f"clipfh search --embeddings {out} --image PHOTO finds the nearest; --text WORDS looks for words")


def search(args: argparse.Namespace) -> None:
    from clipfh.retrieval import lookup

    require(args.top >= 1, "top", "1 or more", args.top)
    index = lookup.load(args.embeddings)
    clip, settings = lookup.model_of(index, args.checkpoint)
    photo = Path(args.image) if args.image else None
    query = lookup.embed_photo(index, clip, settings, photo) if photo else lookup.embed_words(clip, settings, args.text)
    found = lookup.nearest(index, query, args.top)
    rows = [[str(i), f"{find.similarity:.4f}", find.item_id, find.path] for i, find in enumerate(found, 1)]
    print(_table(["", "similarity", "item", "path"], rows))
    if args.html:
        lookup.write_page(args.html, index, photo.name if photo else args.text, photo, found)
        print(f"page {args.html}")


def report(args: argparse.Namespace) -> None:
    from clipfh.report import page

    print(f"report {page.write(args.paths, Path(args.out) if args.out else None)}")


def demo(args: argparse.Namespace) -> None:
    from clipfh.demo import demo

    pass

    demo.run(Path(args.out), functools.partial(print, flush=True))


@contextlib.contextmanager
def _connected(args: argparse.Namespace, placement: Placement | None = None) -> Iterator[None]:
    """Connected to the cluster at --address, or to one of our own that ends with the block."""
    from clipfh.cluster import resources as cluster

    cluster.connect(args.address, placement, args.dashboard)
    try:
        yield
    finally:
        cluster.disconnect()


def _to_embed(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Connected to a cluster to embed over, where there is one to gain from."""
    from clipfh.retrieval import embed

    pass

    return _connected(args) if embed.wants_cluster(args.address) else contextlib.nullcontext()


@contextlib.contextmanager
def _all_or_nothing(out: Path, worth: str) -> Iterator[None]:
    """Where the block fails before `out` holds anything worth keeping (a glob), leave it as it was: empty or not there.

    A command that was mended can then simply be given again.
    """
    was_there, ours = out.exists(), not _in_use(out)
    try:
        yield
    except BaseException:
        if ours and out.is_dir() and not any(out.glob(worth)):
            for made in out.iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            if not was_there:
                out.rmdir()
        raise


def _in_use(out: Path) -> bool:
    """Whether something is there. A file is: nothing can be put into it."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


# --- What people see -------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    # Elsewhere than in a terminal a row is a line, however long. Brackets in names are no markup
    console = Console(markup=False, width=None if sys.stdout.isatty() else 1000)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def _figures(found: dict[str, Any]) -> str:
    """The figures of an evaluation, and how each way of asking does."""
    keys = ("mAP", "rank1", "rank5", "rank10", "rank20", "rank50", "mAP_at_R", "mINP")
    lines = [_table(["", "value", "95% interval"], [[key, _value(found[key]), _interval(found, key)] for key in keys])]
    names = {"same variant": found["variant"]["same"], "cross variant": found["variant"]["cross"]}
    names |= {"text to image": found["text_to_image"], "image to text": found["image_to_text"]}
    rows = [[n, _value(f["mAP"]), _value(f["rank1"]), f["num_query"]] for n, f in names.items() if f]
    if splits := found["random_splits"]:
        spread = [f"{_value(splits[key]['mean'])} ± {_value(splits[key]['std'])}" for key in ("mAP", "rank1")]
        rows.append([f"{len(splits['mAP']['values'])} random splits", *spread, ""])
    lines += ["", _table(["", "mAP", "rank1", "queries"], rows), ""]
    if found["rerank"]:
        lines.append("re-ranked (k-reciprocal), but for text and random splits")
    unmatched = f", {found['num_unmatched']:,} queries left out: no other image of their item"
    left_out = unmatched if found["num_unmatched"] else ""
    lines.append(f"{found['num_query']:,} queries, {found['num_gallery']:,} gallery images{left_out}")
    return "\n".join(lines)


def _value(figure: float | None) -> str:
    return "none" if figure is None else f"{figure:.4f}"


def _interval(found: dict[str, Any], key: str) -> str:
    ends = found["intervals"][key]
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else "none"


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


@contextlib.contextmanager
def _live(out: Path) -> Iterator[tuple[Callable[[str], None], bool]]:
    """A table of the sweep's trials below what is told, in a terminal; elsewhere lines alone, also for each report."""
    from clipfh.report import status

    if not sys.stdout.isatty():
        yield functools.partial(print, flush=True), True
        return
    from rich.console import Console
    from rich.live import Live

    pass

    console = Console(highlight=False)
    with Live(get_renderable=lambda: status.table(out, console.height - 4), console=console, refresh_per_second=1):
        yield functools.partial(console.print, markup=False), False


class _Tenths:
    def __init__(self, unit: str) -> None:
        self.unit, self.told = unit, 0

    def __call__(self, done: int, total: int) -> None:
        if done * 10 // max(1, total) > self.told:
            self.told = done * 10 // total
            print(f"{done:,} of {total:,} {self.unit}", flush=True)


@dataclass(frozen=True)
class _Run:
    """How and where a run of `train` is computed."""

    where: str
    feed: Any
    """decoding.Feed"""
    fit: Callable[[Experiment, Any, Path, Callable[[dict[str, Any]], None]], None]
    """Trains an experiment, of inputs, in a folder, and tells each report."""


def _run_here(placement: Placement) -> _Run:
    """In this process, in its main thread, where Ctrl-C reaches it."""
    from clipfh.train import in_process

    placed = in_process.placed(placement)
    where = f"in this process on CPU, {placed['threads']} thread{'s' * (placed['threads'] > 1)}"
    return _Run(where, in_process.Feed(), functools.partial(in_process.fit, placement))


def _run_over_a_cluster(placement: Placement) -> _Run:
    from clipfh.cluster import resources as cluster
    from clipfh.data import stream
    from clipfh.train import driver

    resources = cluster.place(placement)

    def train(experiment: Experiment, inputs: Any, out: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        _followed(lambda: driver.fit(experiment, inputs, out, resources, retries=3), out, tell)

    return _Run(str(resources), stream, train)


def _followed(work: Callable[[], None], out: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Do the work in a thread, and tell each report of the run meanwhile.

    Here in the main thread Ctrl-C reaches us; Ray Train would take it for itself.
    """
    from clipfh.storage import run_folder

    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    told, over = len(run_folder.read_metrics(out)), False
    thread.start()
    while not over:
        thread.join(0.5)
        over = not thread.is_alive()
        lines = run_folder.read_metrics(out)
        for line in lines[told:]:
            tell(line)
        told = max(told, len(lines))
    if errors:
        raise errors[0]


def _tell_report(images: int, line: dict[str, Any]) -> None:
    """A line for a report of a run of so many images, and its warnings."""
    print(_report_line(line, images), flush=True)
    for warning in line.get("warnings", []):
        print(f"warning: {warning}", flush=True)


def _report_line(line: dict[str, Any], images: int) -> str:
    if "diverged" in line:
        return str(line["diverged"])
    return (
        f"{line['images']:,} of {images:,} images: loss {line['loss']:.3f}, val mAP {line['val_mAP']:.4f} "
        f"(best {line['best_val_mAP']:.4f}), {line['images_per_second']:.0f} images/s, "
        f"{line['data_wait']:.0%} of the time waiting for data"
    )


# --- Errors ----------------------------------------------------------------------------------------------------------

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def _mendable(error: BaseException, args: argparse.Namespace | None) -> str | None:
    """The one line for an error that the user can mend, wherever it stands in the chain of causes."""
    if line := mendable(error):
        return line
    for each in causes(error):
        if getattr(each, "errno", None) in NO_ROOM or any(os.strerror(code) in str(each) for code in NO_ROOM):
            where = getattr(each, "filename", None) or getattr(args, "out", None) or "what is written"
            return f"no room on disk for {where}: free some; {_going_on(args)}"
        if isinstance(each, WRONG_PATH) and each.filename and each.strerror:
            return f"{each.filename}: {each.strerror.lower()}: check the path"
    lost = next((each for each in causes(error) if type(each).__name__ in LOST), None)
    return f"Ray lost a process or a node ({' '.join(str(lost).split())[:160]}): {_going_on(args)}" if lost else None


def _going_on(args: argparse.Namespace | None) -> str:
    """How to go on after a stop."""
    out = Path(getattr(args, "out", None) or "")
    if any((out / file).exists() for file in ("run.json", "sweep.yaml")):
        return "the same command with --resume goes on from the last checkpoint"
    return "give the same command again"


def _stop(*_: object) -> None:
    """Ctrl-C: all is brought to an end; given again meanwhile, it ends at once."""
    signal.signal(signal.SIGINT, _stop_at_once)
    raise KeyboardInterrupt


def _told_to_end(number: int, *_: object) -> NoReturn:
    """SIGTERM, by which Slurm and Kubernetes announce the end. Ray takes it the same way where it runs."""
    raise SystemExit(number)


def _stop_at_once(*_: object) -> NoReturn:
    os.write(sys.stderr.fileno(), b"\nclipfh: stopped at once\n")
    os._exit(130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on what the user can mend, 1 on our bugs; that of the job with submit."""
    args = None
    try:
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _told_to_end)
        args = parse(sys.argv[1:] if argv is None else argv)
        code = globals()[args.command](args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"clipfh: stopped; {_going_on(args)}", file=sys.stderr)
        return 130
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:
            print(f"clipfh: told to end; {_going_on(args)}", file=sys.stderr)
            return 128 + signal.SIGTERM
        raise
    except Exception as error:
        line = _mendable(error, args)
        if line is None:
            raise
        print(f"clipfh: {' '.join(line.split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
