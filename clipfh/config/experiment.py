"""Every setting of an experiment: frozen dataclasses, dotted names, presets, strict load and save."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipfh import UserError

SMALL = "clipfh-small"
TERMS = ("ce", "triplet", "center", "supcon", "infonce")

Stage = Literal["image", "joint"]


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Raise UserError naming the setting unless ok."""
    if not ok:
        raise UserError(f"--{name} must be {rule}, not {value}")


@dataclass(frozen=True)
class Model:
    """The CLIP towers."""

    name: str = "ViT-B/16"
    """ViT-B/16, RN50 (OpenAI's weights), clipfh-small (64 pixels, random weights) or any open_clip name"""
    pretrained: str = ""
    """open_clip tag, local weights file, or 'none' for random weights; empty: the usual ones of the name"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it, else float32. Evaluation and embeddings: float32, as exports are"""
    freeze_patch: bool = True
    """keep the patch embedding (ViT) or the stem (ResNet) as it is"""
    freeze_blocks: int = 0
    """keep the first n blocks of the image tower as they are"""
    freeze_norm: bool = True
    """keep scale and shift of batch norms (ResNet) as they are; their statistics stay those of pretraining anyway"""
    checkpointing: bool = False
    """compute activations again in the backward pass, block by block: less memory, one more forward pass"""
    compile: bool = False
    """compile the training step's towers by torch.compile; the first step waits for the compiler"""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", "a name", "empty")
        require(self.freeze_blocks >= 0, "model.freeze_blocks", "0 or more", self.freeze_blocks)


@dataclass(frozen=True)
class Text:
    """The prompt of each item."""

    strategy: Literal["raw", "clean", "structured"] = "structured"
    """how a description becomes a prompt"""
    file: str = ""
    """item-to-prompt JSON, as `clipfh prompts --out` writes it; used in place of the strategy"""


@dataclass(frozen=True)
class Loss:
    """Weights of the terms (0 switches a term off) and their options."""

    ce: float = 0.0
    """weight of cross-entropy over the train items"""
    triplet: float = 0.0
    """weight of the batch-hard triplet term"""
    center: float = 0.0
    """weight of the distance to the item's center"""
    supcon: float = 0.0
    """weight of supervised contrast, image to image"""
    infonce: float = 0.0
    """weight of contrast between images and prompts"""
    ce_scale: float = 32.0
    """scale of the cosine classifier"""
    ce_margin: float = 0.25
    """margin taken from the right item's cosine"""
    ce_smoothing: float = 0.0
    """label smoothing"""
    triplet_margin: float = 0.15
    """margin on the Euclidean distance of embeddings; below 0: soft margin"""
    supcon_temperature: float = 0.07
    """temperature of supcon"""
    supcon_captions: bool = False
    """let the batch's prompts take part in supcon beside its images"""
    infonce_temperature: float = 0.0
    """temperature of infonce at the start; 0: the model's own (.01 for OpenAI's, .07 for random weights)"""
    learn_scale: bool = True
    """learn the logit scale of infonce (joint stage)"""

    def __post_init__(self) -> None:
        for term in TERMS:
            require(0 <= getattr(self, term) < math.inf, f"loss.{term}", "0 or more", getattr(self, term))
        require(
            any(getattr(self, term) for term in TERMS), "loss", "at least one term above 0 of " + ", ".join(TERMS), 0
        )
        if self.infonce_temperature:  # the logit scale is kept between 1 and 100
            require(
                0.01 <= self.infonce_temperature <= 1,
                "loss.infonce_temperature",
                "0, or from 0.01 to 1",
                self.infonce_temperature,
            )
        for name in ("ce_scale", "supcon_temperature"):
            require(getattr(self, name) > 0, f"loss.{name}", "above 0", getattr(self, name))
        require(0 <= self.ce_smoothing < 1, "loss.ce_smoothing", "from 0 to below 1", self.ce_smoothing)
        require(-1 <= self.ce_margin < 2, "loss.ce_margin", "from -1 to below 2", self.ce_margin)
        require(self.triplet_margin < 2, "loss.triplet_margin", "below 2, the largest distance", self.triplet_margin)

    @property
    def takes_text(self) -> bool:
        """Whether a term that is on learns from prompts."""
        return self.infonce > 0 or (self.supcon > 0 and self.supcon_captions)

    @property
    def takes_singles(self) -> bool:
        """Whether a term that is on learns from an item's only photo. Triplet, and supcon among images, do not."""
        return self.ce > 0 or self.center > 0 or self.takes_text


@dataclass(frozen=True)
class Optimizer:
    """AdamW with layer-wise rates, warm-up and cosine per step, and an average of the weights."""

    lr: float = 1e-5
    """learning rate of the image tower's last block"""
    text_lr: float = 0.1
    """rate of the text tower, as a multiple of lr (joint stage)"""
    head_lr: float = 10.0
    """rate of the heads, as a multiple of lr"""
    center_lr: float = 0.5
    """rate of the centers, which have an SGD of their own"""
    weight_decay: float = 1e-4
    """decoupled decay of matrices; norms and biases have none"""
    layer_decay: float = 0.75
    """factor on lr from a block to the one below it; 1: the same for all"""
    warmup: float = 0.05
    """share of the budget spent rising to lr; then cosine to 0"""
    clip: float = 1.0
    """largest gradient norm; 0: no clipping"""
    ema: float = 0.999
    """decay of the average of the weights that is evaluated and exported; 0: none"""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optimizer.lr", "above 0", self.lr)
        for name in ("text_lr", "head_lr", "center_lr", "weight_decay", "clip"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", "0 or more", getattr(self, name))
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay", "above 0 and at most 1", self.layer_decay)
        for name in ("warmup", "ema"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "from 0 to below 1", getattr(self, name))


@dataclass(frozen=True)
class Batch:
    """P x K: P distinct items, K views of each."""

    items: int = 64
    """P, over all workers"""
    views: int = 4
    """K"""
    categories: int = 0
    """about how many categories share a batch; 0: items are drawn from all"""
    chunk: int = 0
    """images that a worker takes through the towers at a time, with the gradient of the whole batch; 0: all of them.
    Less memory, one more forward pass"""

    def __post_init__(self) -> None:
        require(self.items >= 2, "batch.items", "2 or more", self.items)
        require(self.views >= 1, "batch.views", "1 or more", self.views)
        require(0 <= self.categories <= self.items, "batch.categories", "0 to batch.items", self.categories)
        require(self.chunk >= 0, "batch.chunk", "0 or more", self.chunk)

    @property
    def images(self) -> int:
        """Images in a batch, over all workers."""
        return self.items * self.views


@dataclass(frozen=True)
class Augment:
    """What training does to an image before the model sees it."""

    crop_min: float = 0.2
    """smallest share of the area that a random crop keeps"""
    flip: bool = True
    """mirror every other image"""
    randaugment: float = 0.0
    """strength of RandAugment, 0 to 10: two random changes of shape or colour an image; 0: none"""
    erase: float = 0.0
    """probability that a random rectangle of an image is erased"""

    def __post_init__(self) -> None:
        require(0 < self.crop_min <= 1, "augment.crop_min", "above 0 and at most 1", self.crop_min)
        require(0 <= self.randaugment <= 10, "augment.randaugment", "from 0 to 10", self.randaugment)
        require(0 <= self.erase <= 1, "augment.erase", "from 0 to 1", self.erase)


@dataclass(frozen=True)
class Budget:
    """How long to train. Images seen, not steps: it means the same for every P x K."""

    images: int = 2_000_000
    """images seen in all"""
    epochs: float = 0.0
    """the same in passes over the train images; used in place of images"""
    report_every: int = 0
    """images between two evaluations (and checkpoints); 0: a tenth of the budget"""
    patience: int = 0
    """stop after this many evaluations without a better val mAP; 0: never"""

    def __post_init__(self) -> None:
        for name in ("images", "epochs", "report_every", "patience"):
            require(0 <= getattr(self, name) < math.inf, f"budget.{name}", "0 or more", getattr(self, name))
        require(
            (self.images > 0) != (self.epochs > 0), "budget", "given in images or in epochs, one of them above 0", 0
        )


@dataclass(frozen=True)
class Experiment:
    """All that decides what a run computes. Where it runs is Placement's."""

    stage: Stage = "image"
    seed: int = 0
    """seeds batches, augmentation and new weights"""
    model: Model = field(default_factory=Model)
    text: Text = field(default_factory=Text)
    loss: Loss = field(default_factory=lambda: Loss(supcon=1.0))
    optimizer: Optimizer = field(default_factory=Optimizer)
    batch: Batch = field(default_factory=Batch)
    augment: Augment = field(default_factory=Augment)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "0 or more", self.seed)
        alone = {"triplet": self.loss.triplet, "supcon": self.loss.supcon and not self.loss.supcon_captions}
        needs_positives = [term for term, on in alone.items() if on]
        if self.batch.views == 1 and needs_positives:
            raise UserError(f"--batch.views 1 leaves loss.{needs_positives[0]} without positives: take 2 or more views")


@dataclass(frozen=True)
class Placement:
    """Where a run is computed. It changes the speed, not the result."""

    workers: int = 1
    """training processes a run; divides batch.items"""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 where there is a GPU, else 0; .5 puts two one-worker trials on a GPU"""
    cpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 beside a GPU, else what the machine has to spare"""
    concurrent: int | Literal["auto"] = "auto"
    """trials at once in a sweep, if there is room; auto: what the cluster holds, data pipelines counted in"""
    keep_gib: float = 0.0
    """GiB of decoded images to keep in the cluster's object store, as far as they go: decoding is then spared"""
    keep_weights: Literal["best", "leaders", "all"] = "leaders"
    """whose weights a sweep leaves on disk: of the best trial, of those that `final` trains again, or of all with
    optimizer state"""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", "1 or more", self.workers)
        gpus = self.gpus_per_worker
        if gpus != "auto":
            one = "0 to 1 (a worker computes on one GPU: --workers N takes N of them)"
            require(0 <= gpus <= 1, "gpus-per-worker", one, gpus)
            require(gpus in (0, 1) or self.workers == 1, "gpus-per-worker", "0 or 1 with several workers", gpus)
        cpus = self.cpus_per_worker
        require(cpus == "auto" or cpus > 0, "cpus-per-worker", "above 0", cpus)
        require(self.concurrent == "auto" or self.concurrent >= 1, "concurrent", "1 or more", self.concurrent)
        require(self.keep_gib >= 0, "keep-gib", "0 or more", self.keep_gib)


# Term weights that `--loss a+b` switches on.
USUAL_WEIGHT = {"ce": 0.25, "triplet": 1.0, "center": 5e-4, "supcon": 1.0, "infonce": 1.0}

# Shared by both stages of a preset: what pretrained CLIP wants, and what random weights want.
_PRETRAINED: dict[str, Any] = {"loss.supcon": 1.0, "loss.supcon_temperature": 0.07, "batch.items": 64, "batch.views": 4}
_SCRATCH: dict[str, Any] = {
    "loss.supcon": 1.0,
    "loss.triplet": 1.0,
    "optimizer.lr": 1e-3,
    "optimizer.text_lr": 1.0,
    "optimizer.head_lr": 1.0,
    "optimizer.weight_decay": 0.05,
    "optimizer.layer_decay": 1.0,
    "optimizer.warmup": 0.1,
    "optimizer.ema": 0.99,
    "model.freeze_patch": False,
    "model.freeze_norm": False,
    "batch.items": 32,
    "batch.views": 4,
    "augment.crop_min": 0.4,
    "budget.images": 60_000,
}
_ORIGINAL: dict[str, Any] = {
    "optimizer.lr": 5e-5,
    "optimizer.text_lr": 1.0,
    "optimizer.head_lr": 1.0,
    "optimizer.layer_decay": 1.0,
    "optimizer.ema": 0.0,
    "model.freeze_patch": False,
    "batch.items": 16,
    "batch.views": 2,
    "augment.crop_min": 1.0,
    "augment.flip": False,
    "text.strategy": "clean",
}

_WITH_CAPTIONS: dict[str, Any] = {"loss.supcon": 1.0, "loss.supcon_captions": True}

# Preset name -> stage -> settings that differ from the defaults. joint-v1 to joint-v4 keep the intent of the
# pipeline that clipfh replaces (losses, prompts, P x K) without its faults.
PRESETS: dict[str, dict[Stage, dict[str, Any]]] = {
    "recommended": {"image": _PRETRAINED, "joint": {**_PRETRAINED, "loss.infonce": 0.5}},
    "scratch": {"image": _SCRATCH, "joint": {**_SCRATCH, "loss.infonce": 0.1}},
    "image": {"image": {"loss.triplet": 1.0, "loss.ce": 0.25, "loss.center": 5e-4, "loss.supcon": 0.0}},
    "joint-v1": {
        "joint": {**_ORIGINAL, "loss.infonce": 1.0, "loss.supcon": 0.0, "text.strategy": "raw", "batch.views": 1}
    },
    "joint-v2": {"joint": {**_ORIGINAL, **_WITH_CAPTIONS}},
    "joint-v3": {"joint": {**_ORIGINAL, **_WITH_CAPTIONS, "optimizer.lr": 1e-4}},
    "joint-v4": {
        "joint": {**_ORIGINAL, **_WITH_CAPTIONS, "text.strategy": "structured", "budget.epochs": 50.0},
    },
}


@functools.cache
def fields(cls: type = Experiment) -> tuple[tuple[str, Any, Any, str], ...]:
    """Dotted name, type, default and help of every setting, in order."""
    return tuple(_fields(cls, ""))


def _fields(cls: type, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hint, f.default, docs.get(f.name, "")


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field, read from the source (dataclasses do not keep it)."""
    import ast
    import inspect

    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    pairs = zip(body, body[1:], strict=False)
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
        if isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)
    }


def nearest(name: str, valid: list[str]) -> str:
    """', did you mean X?' for a misspelt name, or nothing."""
    tails = {v.split(".")[-1]: v for v in valid}
    close = difflib.get_close_matches(name, valid, 1) or [
        tails[t] for t in difflib.get_close_matches(name.split(".")[-1], list(tails), 1)
    ]
    return f", did you mean {close[0]}?" if close else ""


def check(name: str, value: Any, cls: type = Experiment) -> Any:
    """The value as the setting's type.

    Raises:
        UserError: no such setting, or a value of another type.
    """
    types_by_name = {n: hint for n, hint, _, _ in fields(cls)}
    if name not in types_by_name:
        raise UserError(f"unknown setting {name}{nearest(name, list(types_by_name))}")
    return _typed(name, value, types_by_name[name])


def _typed(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        number, literal = typing.get_args(hint)
        if value in typing.get_args(literal):
            return value
        if type(value) not in (int, float):
            raise UserError(f"{name} must be {_TYPE_NAMES[number]} or {typing.get_args(literal)[0]}, not {value!r}")
        return _typed(name, value, number)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        remedy = " (in YAML write 1.0e-5, not 1e-5)" if hint is float and _is_number(value) else ""
        raise UserError(f"{name} must be {_TYPE_NAMES[hint]}, not {value!r}{remedy}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, not {value}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def parse(name: str, text: str, cls: type = Experiment) -> Any:
    """A command-line text as the setting's value; same errors as `check`."""
    hint = {n: h for n, h, _, _ in fields(cls)}.get(name, str)
    numeric = hint in (int, float) or isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    value: Any = text
    if hint is bool:
        value = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}.get(text.lower(), text)
    elif numeric and _is_number(text):
        number = float(text)
        whole = math.isfinite(number) and number == int(number)
        value = int(number) if whole else number
    return check(name, value, cls)


def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with files named from the root on: they are kept, and read again from other working directories."""
    found = dict(settings)
    if file := found.get("text.file"):
        found["text.file"] = str(Path(file).absolute())
    if (file := found.get("model.pretrained")) and Path(file).is_file():
        found["model.pretrained"] = str(Path(file).absolute())
    return found


def loss_terms(shorthand: str) -> dict[str, float]:
    """'triplet+center' as weights: the usual ones for the terms named, 0 for the others."""
    names = shorthand.split("+")
    for name in names:
        if name not in TERMS:
            raise UserError(f"unknown loss {name!r} in --loss {shorthand}: the terms are {', '.join(TERMS)}")
    return {f"loss.{t}": USUAL_WEIGHT[t] if t in names else 0.0 for t in TERMS}


def resolve(stage: str, preset: str | None = None, settings: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a stage: defaults, then the preset's settings, then the ones given.

    Without a preset, clipfh-small takes `scratch` and every other model `recommended`.

    Raises:
        UserError: unknown stage, preset or setting, or a value that does not fit.
    """
    settings = dict(settings or {})
    check("stage", stage)
    small = settings.get("model.name") == SMALL
    preset = preset or ("scratch" if small else "recommended")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: the presets are {', '.join(PRESETS)}")
    if stage not in PRESETS[preset]:
        raise UserError(f"preset {preset} is not for the {stage} stage: its presets are {', '.join(presets_of(stage))}")
    base = PRESETS[preset][stage]
    return replace(Experiment(stage=stage), {**_one_budget(base), **_one_budget(settings)})


def presets_of(stage: str) -> list[str]:
    """Names of a stage's presets."""
    return [name for name, stages in PRESETS.items() if stage in stages]


def _one_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A budget in epochs replaces one in images and the other way round; both at once are an error."""
    given = {k for k in ("budget.images", "budget.epochs") if settings.get(k)}
    if len(given) == 2:
        raise UserError("give --budget.images or --budget.epochs, not both")
    other: dict[str, dict[str, Any]] = {"budget.images": {"budget.epochs": 0.0}, "budget.epochs": {"budget.images": 0}}
    return {**other[given.pop()], **settings} if given else dict(settings)


def replace(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with dotted settings changed; each is checked."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, leaf = name.rpartition(".")
        tree.setdefault(group, {})[leaf] = check(name, value)
    groups = {g: dataclasses.replace(getattr(experiment, g), **leaves) for g, leaves in tree.items() if g}
    return dataclasses.replace(experiment, **groups, **tree.get("", {}))


def flat(experiment: Experiment) -> dict[str, Any]:
    """Dotted name to value, for all settings."""
    tree = dataclasses.asdict(experiment)
    return {name: _walk(tree, name) for name, *_ in fields()}


def _walk(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def to_json(experiment: Experiment) -> str:
    """The experiment as `experiment.json` holds it."""
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str, where: str = "experiment.json") -> Experiment:
    """The experiment from `to_json`'s text.

    Raises:
        UserError: not such a text, or a setting that this version does not know.
    """
    try:
        tree = json.loads(text)
        settings = {n: _walk(tree, n) for n, *_ in fields()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not an experiment of this version of clipfh ({error})") from None
    unknown = set(_leaves(tree)) - set(settings)
    if unknown:
        raise UserError(f"{where}: unknown setting {sorted(unknown)[0]}; it is from another version of clipfh")
    return replace(Experiment(), settings)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def load(path: str | Path) -> Experiment:
    """Read `experiment.json`."""
    return from_json(Path(path).read_text(), str(path))
