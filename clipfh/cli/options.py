"""The one table of commands, with the arguments, settings and function of each; and how the command line is read."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from clipfh import UserError, __version__
from clipfh.cli import commands
from clipfh.config import presets, schema
from clipfh.config.experiment import LOSS_TERMS, Experiment, Placement

DESCRIPTION = """Tune CLIP to find the same item again in a catalogue of photos.

In order: prepare, evaluate (zero-shot), train or sweep, export, report. `clipfh demo` does it on drawn photos.
To look for a photo or words of your own: embed, search."""


class Argument:
    """An argument of a command: its names, and the keywords that argparse takes for it."""

    def __init__(self, *names: str, **keywords: Any) -> None:
        self.names, self.keywords = names, keywords


@dataclass(frozen=True)
class Command:
    """What the command line knows of a command."""

    function: Callable[[argparse.Namespace], int | None]
    usage: str
    """what follows the command's name in the usage line"""
    help: str
    arguments: Sequence[Argument | tuple[Argument, ...]]
    """a tuple holds arguments of which exactly one must be given"""
    settings: Sequence[str] = ()
    """groups of settings that it takes as options"""
    epilog: str = ""


CATALOGUE = Argument("catalogue", metavar="CATALOGUE")
CLUSTER = (
    Argument("--address", help="Ray cluster, HOST:6379 or auto (default: RAY_ADDRESS, else this machine alone)"),
    Argument("--dashboard", action="store_true", help="Ray's dashboard, on this machine's loopback"),
)
TRACK = Argument("--track", choices=("mlflow", "wandb"), help="also send the reports to MLflow or Weights & Biases")
EVERY_GROUP = tuple(dict.fromkeys(name.rpartition(".")[0] for name, *_ in schema.fields()))
EMBEDDING_GROUPS = ("", "model", "text")
RUN_PLACEMENT = tuple(name for name, *_ in schema.fields(Placement) if name not in ("concurrent", "keep_weights"))
"""Fields of Placement that a single run takes; the others are a sweep's."""


def _metavar(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(choices)
    return {bool: "true|false", int: "N", str: "TEXT"}.get(hint, "X" if not choices else "X|auto")


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 1% or 0.01") from None


COMMANDS = {
    "prepare": Command(
        commands.prepare,
        "--source PATH --out CATALOGUE [options]",
        "make a catalogue of photos and their texts",
        (
            Argument(
                "--source",
                required=True,
                metavar="PATH",
                help="folder of item folders, CSV, JSON Lines or Parquet table, tar shards, or In-Shop; a URI will do",
            ),
            Argument("--out", required=True, metavar="CATALOGUE", help="folder to write"),
            Argument(
                "--val-fraction",
                type=float,
                default=0.1,
                metavar="X",
                help="share of the train items held out for validation (default: %(default)s)",
            ),
            Argument(
                "--image-size",
                type=int,
                default=256,
                metavar="N",
                help="pixels of the short side kept (default: %(default)s)",
            ),
            Argument(
                "--max-bad",
                type=_share,
                default=0.01,
                metavar="X%",
                help="share of the images that may be missing or unreadable (default: 1%%)",
            ),
            Argument(
                "--seed",
                type=int,
                default=0,
                metavar="N",
                help="draws the held-out items and the queries (default: %(default)s)",
            ),
            Argument(
                "--follow-links", action="store_true", help="take photos that links outside of the source lead to"
            ),
            Argument(
                "--skip-bad-lines", action="store_true", help="leave out, and count, lines of a table that are bad"
            ),
            Argument("--encoding", default="", metavar="NAME", help="of a CSV, such as cp1252 (default: found out)"),
            Argument("--inshop-boxes", action="store_true", help="cut In-Shop's photos to list_bbox_inshop.txt"),
            Argument(
                "--without", metavar="FILE", help="photos to leave out, a path a line, as clipfh audit lists them"
            ),
        ),
    ),
    "audit": Command(
        commands.audit,
        "CATALOGUE [--checkpoint PATH] [options] [settings]",
        "show copies, leaks and, with a model, views that look like another item's",
        (
            CATALOGUE,
            Argument(
                "--checkpoint",
                metavar="PATH",
                help="a run, sweep, checkpoint, export or weights file; or give --model for a pretrained one",
            ),
            *CLUSTER,
        ),
        ("model",),
    ),
    "prompts": Command(
        commands.prompts,
        "CATALOGUE [options]",
        "report on the texts, and write a prompt for each item",
        (
            CATALOGUE,
            Argument(
                "--strategy",
                choices=("raw", "clean", "structured"),
                default="structured",
                help="how a description becomes a prompt (default: %(default)s)",
            ),
            Argument("--out", metavar="FILE", help="JSON of item to prompt, to edit and train on (--text.file)"),
            Argument("--report", metavar="FILE", help="JSON of what was found, with all items named"),
            Argument(
                "--model", default="ViT-B/16", metavar="NAME", help="whose tokenizer counts (default: %(default)s)"
            ),
        ),
    ),
    "evaluate": Command(
        commands.evaluate,
        "CATALOGUE --out DIR [options] [settings]",
        "measure a model, or the pretrained one (zero-shot)",
        (
            CATALOGUE,
            Argument("--out", required=True, metavar="DIR", help="folder to write"),
            Argument(
                "--checkpoint",
                metavar="PATH",
                help="a run, sweep, checkpoint, export or weights file; without: zero-shot",
            ),
            Argument(
                "--split", choices=("test", "val"), default="test", help="what to measure on (default: %(default)s)"
            ),
            Argument(
                "--random-splits",
                type=int,
                default=10,
                metavar="N",
                help="how often a random image of each item is drawn as its query (default: %(default)s)",
            ),
            Argument("--rerank", action="store_true", help="k-reciprocal re-ranking of the gallery for each query"),
            Argument(
                "--skip-unmatched",
                action="store_true",
                help="leave out, and count, queries without another image of their item in the gallery; else an error",
            ),
            Argument(
                "--beside",
                action="append",
                default=[],
                metavar="CATALOGUE",
                help="another catalogue: with --checkpoint, its metrics before and after tuning; may be given again",
            ),
            *CLUSTER,
        ),
        EMBEDDING_GROUPS,
    ),
    "train": Command(
        commands.train,
        "image|joint CATALOGUE --out DIR [options] [settings]",
        "fine-tune the image tower, or both towers",
        (
            Argument("stage", choices=("image", "joint"), help="train the image tower, or both"),
            CATALOGUE,
            Argument("--out", required=True, metavar="DIR", help="folder of the run"),
            Argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(presets.PRESETS)}"),
            Argument(
                "--warm-start", metavar="PATH", help="a run, sweep, checkpoint, export or weights file to start from"
            ),
            Argument("--resume", action="store_true", help="go on with the run in --out"),
            TRACK,
            *(
                Argument(f"--{name.replace('_', '-')}", metavar=_metavar(hint), help=f"{doc} (default: {default})")
                for name, hint, default, doc in schema.fields(Placement)
                if name in RUN_PLACEMENT
            ),
            *CLUSTER,
        ),
        EVERY_GROUP,
    ),
    "sweep": Command(
        commands.sweep,
        "FILE.yaml CATALOGUE --out DIR [options] [settings]",
        "search settings with Ray Tune and Optuna, and export the best model",
        (
            Argument("file", metavar="FILE.yaml", help="sweep file; sweeps/ has some"),
            CATALOGUE,
            Argument("--out", required=True, metavar="DIR", help="folder of the sweep"),
            Argument("--trials", type=int, metavar="N", help="in place of the file's"),
            Argument("--resume", action="store_true", help="go on with the sweep in --out"),
            Argument("--retry-failed", action="store_true", help="with --resume: train the failed trials again too"),
            Argument(
                "--dry-run",
                action="store_true",
                help="show the file with its defaults and, from a few real steps, what the sweep will take",
            ),
            TRACK,
            *CLUSTER,
        ),
        EVERY_GROUP,
    ),
    "status": Command(
        commands.status,
        "DIR",
        "tell how a run or a sweep stands, without touching it",
        (Argument("path", metavar="DIR", help="the --out of clipfh train or clipfh sweep"),),
    ),
    "export": Command(
        commands.export,
        "RUN_OR_SWEEP --out DIR [--onnx]",
        "write a run's or sweep's best model for any open_clip user",
        (
            Argument("path", metavar="RUN_OR_SWEEP", help="a run, a checkpoint or a sweep"),
            Argument("--out", required=True, metavar="DIR", help="folder to write"),
            Argument("--onnx", action="store_true", help="also both towers as ONNX"),
        ),
    ),
    "embed": Command(
        commands.embed,
        "CATALOGUE --out FILE.parquet [options] [settings]",
        "embed all images of a catalogue, to search in them",
        (
            CATALOGUE,
            Argument("--out", required=True, metavar="FILE.parquet", help="file to write"),
            Argument(
                "--checkpoint",
                metavar="PATH",
                help="a run, sweep, checkpoint, export or weights file; without: the pretrained model",
            ),
            *CLUSTER,
        ),
        EMBEDDING_GROUPS,
    ),
    "search": Command(
        commands.search,
        "--embeddings FILE.parquet (--image FILE | --text WORDS) [options]",
        "find a photo or words in them",
        (
            Argument("--embeddings", required=True, metavar="FILE.parquet", help="what clipfh embed wrote"),
            (
                Argument("--image", metavar="FILE", help="photo to look for"),
                Argument("--text", metavar="WORDS", help="words to look for, in quotes"),
            ),
            Argument("--top", type=int, default=10, metavar="N", help="how many images (default: %(default)s)"),
            Argument("--html", metavar="FILE", help="a page with their pictures"),
            Argument("--checkpoint", metavar="PATH", help="where the model lies, if no longer where it was"),
        ),
    ),
    "submit": Command(
        commands.submit,
        "--address http://HEAD:8265 [--working-dir DIR] -- COMMAND ...",
        "run a command on a Ray cluster, as a job, from anywhere",
        (
            Argument("--address", required=True, metavar="URL", help="the cluster's dashboard, http://HEAD:8265"),
            Argument(
                "--working-dir",
                default=".",
                metavar="DIR",
                help="folder to send along, in a copy of which the command runs (default: this one)",
            ),
        ),
        epilog="Behind -- stands a command with its arguments: sweep, train, evaluate, prepare, ...",
    ),
    "report": Command(
        commands.report,
        "DIR [DIR ...] [--out FILE.html]",
        "write an HTML page on evaluations, runs and sweeps",
        (
            Argument("paths", nargs="+", metavar="DIR", help="evaluations, runs, sweeps"),
            Argument("--out", metavar="FILE", help="HTML file (default: report.html in the first DIR)"),
        ),
    ),
    "demo": Command(
        commands.demo,
        "[--out DIR]",
        "do all of it on a small drawn catalogue",
        (Argument("--out", default="demo", metavar="DIR", help="folder to write (default: demo)"),),
    ),
}


# --- Settings as options ---------------------------------------------------------------------------------------------


def _setting_groups(groups: Sequence[str]) -> dict[str, list[Argument]]:
    """An option for each setting of some groups, by group."""
    image, joint = (schema.flatten(presets.resolve(stage)) for stage in ("image", "joint"))
    options: dict[str, list[Argument]] = {}
    for name, hint, _, doc in schema.fields():
        if name != "stage" and (group := name.rpartition(".")[0]) in groups:
            text = (doc + _default(image[name], joint[name])).replace("%", "%%")
            options.setdefault(group, []).append(Argument(f"--{name}", metavar=_metavar(hint), help=text))
    for group, alias in _ALIASES.items():
        if group in options:
            options[group].append(alias)
    return options


_ALIASES = {
    "model": Argument("--model", dest="model.name", metavar="NAME", help="the same as --model.name"),
    "text": Argument("--prompt-json", dest="text.file", metavar="FILE", help="the same as --text.file"),
    "loss": Argument(
        "--loss",
        metavar="A+B",
        help=f"switch on these terms alone, each with its usual weight, of {'+'.join(LOSS_TERMS)}",
    ),
}


def _default(image: Any, joint: Any) -> str:
    if image != joint:
        return f" (default: {image}; joint stage: {joint})"
    text = str(image).lower() if isinstance(image, bool) else str(image)
    return f" (default: {text})" if text else ""


def _title(group: str) -> tuple[str, str]:
    """Title and text of a group of settings."""
    if not group:
        own = "clipfh-small has 'scratch', SigLIP 'siglip', ConvNeXt 'convnext'; a sweep takes its file's base"
        return "settings", f"Defaults are those of the preset 'recommended' ({own})."
    return f"{group} settings", str(typing.get_type_hints(Experiment)[group].__doc__)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, typed."""
    texts = {name: vars(args).get(name) for name, *_ in schema.fields() if name != "stage"}
    terms = presets.loss_terms(args.loss) if vars(args).get("loss") is not None else {}
    return {**terms, **{name: schema.parse(name, text) for name, text in texts.items() if text is not None}}


def _placement(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Placement given on the command line, typed."""
    texts = {name: text for name in RUN_PLACEMENT if (text := vars(args).get(name)) is not None}
    elastic = re.fullmatch(r"(\d+)-(\d+)", texts.get("workers", ""))
    if elastic:
        del texts["workers"]
    typed = {name: schema.parse(name, text, Placement) for name, text in texts.items()}
    return {**typed, "workers": (int(elastic[1]), int(elastic[2]))} if elastic else typed


# --- Reading the command line ----------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Names and their meaning in two columns, as wide as most names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one plain line, and which takes no abbreviations."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, allow_abbrev=False, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        plain = message.replace("invalid int value", "not a whole number").replace("invalid float value", "no number")
        raise UserError(f"{plain} (see {self.prog} --help)")


def _parser(command: str | None) -> _Parser:
    """The parser of the command line, with the arguments of one command."""
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
    for name, each in COMMANDS.items():
        description = each.help[0].upper() + each.help[1:]
        parser = group.add_parser(
            name, usage=f"clipfh {name} {each.usage}", help=each.help, description=description, epilog=each.epilog
        )
        if name == command:
            _add_arguments(parser, each)
    return top


def _add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    for each in command.arguments:
        if isinstance(each, tuple):
            either = parser.add_mutually_exclusive_group(required=True)
            for argument in each:
                either.add_argument(*argument.names, **argument.keywords)
        else:
            parser.add_argument(*each.names, **each.keywords)
    for name, arguments in _setting_groups(command.settings).items():
        group = parser.add_argument_group(*_title(name))
        for argument in arguments:
            group.add_argument(*argument.names, **argument.keywords)
    parser.set_defaults(function=command.function)


def _names(command: Command) -> Iterator[str]:
    """Names of all arguments of a command."""
    groups = _setting_groups(command.settings).values() if command.settings else ()
    for each in (*command.arguments, *(argument for group in groups for argument in group)):
        for argument in each if isinstance(each, tuple) else (each,):
            yield from argument.names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and its arguments, with `settings` and `placement` typed; of submit also the `inner` command.

    argparse alone would name what is missing before it names what is misspelt, and takes `-1e-3` for an option.

    Raises:
        UserError: anything that does not fit.
    """
    words = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    command = next((word for word in words if not word.startswith("-")), None)
    if command and command not in COMMANDS:
        raise UserError(f"unknown command {command}{schema.nearest(command, list(COMMANDS))} (see clipfh --help)")
    _check_options(words, command)
    args = _parser(command).parse_args(words if command == "submit" else _join_negative_values(argv))
    args.settings, args.placement = _settings(args), _placement(args)
    if command == "submit":
        args.words = list(argv[len(words) + 1 :])
        args.inner = parse(args.words) if args.words else None
    return args


def _check_options(words: Sequence[str], command: str | None) -> None:
    """Raise UserError for the first word that looks like an option and is none."""
    names = ["help", *(name[2:] for name in (_names(COMMANDS[command]) if command else ("--version",)))]
    prog = f"clipfh {command}" if command else "clipfh"
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:] not in names:
            near = schema.nearest(name[2:], names).replace("mean ", "mean --")
            raise UserError(f"{prog} has no option {name}{near} (see {prog} --help)")


def _join_negative_values(argv: Sequence[str]) -> list[str]:
    """The words, with a setting and its value as one word where the value begins with a dash."""
    settings = {f"--{name}" for name, *_ in schema.fields()}
    words: list[str] = []
    for word in argv:
        if words and words[-1] in settings and word.startswith("-") and not word.startswith("--"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words
