"""Every setting of an experiment, as frozen dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from clipfh import UserError

SMALL_MODEL = "clipfh-small"
LOSS_TERMS = (
    *("ce", "arcface", "proxy_anchor"),
    *("triplet", "multi_similarity", "smooth_ap", "center", "supcon"),
    *("infonce", "sigmoid"),
)

MODEL_IDENTITY = ("name", "pretrained", "image_size")
"""The settings within `model` on which weights, prompts and preprocessing depend."""

Stage = Literal["image", "joint"]


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Raise UserError naming the setting unless ok."""
    if not ok:
        raise UserError(f"--{name} must be {rule}, not {value}")


@dataclass(frozen=True)
class ModelSettings:
    """The CLIP towers."""

    name: str = "ViT-B/16"
    """ViT-B/16, RN50 (OpenAI's weights), clipfh-small (96 pixels, random weights), any open_clip name, hf-hub:ORG/NAME
    (with @REVISION for another than the newest) or local-dir:FOLDER"""
    pretrained: str = ""
    """open_clip tag, local weights file, or 'none' for random weights; empty: the usual ones of the name"""
    image_size: int = 0
    """side of the model's images, pixels; position embeddings are interpolated; 0: the model's own"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs that have it, else float32. Evaluation and embeddings: float32, as exports are"""
    freeze_patch: bool = True
    """keep the patch embedding (ViT) or the stem (ResNet) as it is"""
    freeze_blocks: int = 0
    """keep the first n blocks of the image tower as they are"""
    freeze_norm: bool = True
    """keep scale and shift of batch norms (ResNet) as they are; their statistics stay those of pretraining anyway"""
    lora_rank: int = 0
    """train low-rank updates of the weights in place of the weights (LoRA), of this rank; 0: the weights themselves"""
    lora_targets: Literal["attention", "mlp", "all"] = "all"
    """weights that LoRA updates: of attention, of the MLPs, or both and what follows the blocks"""
    checkpointing: bool = False
    """compute activations again in the backward pass, block by block: less memory, one more forward pass"""
    compile: bool = False
    """compile the training step's towers by torch.compile; the first step waits for the compiler"""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", "a name", "empty")
        for name in ("image_size", "freeze_blocks", "lora_rank"):
            require(getattr(self, name) >= 0, f"model.{name}", "0 or more", getattr(self, name))


@dataclass(frozen=True)
class TextSettings:
    """The prompt of each item."""

    strategy: Literal["raw", "clean", "structured"] = "structured"
    """how a description becomes a prompt"""
    file: str = ""
    """item-to-prompt JSON, as `clipfh prompts --out` writes it; used in place of the strategy"""


@dataclass(frozen=True)
class LossSettings:
    """Weights of the terms (0 switches a term off) and their options."""

    ce: float = 0.0
    """weight of cross-entropy over the train items"""
    arcface: float = 0.0
    """weight of cross-entropy over the train items with a margin on the angle"""
    proxy_anchor: float = 0.0
    """weight of proxy-anchor: a learned vector for each train item, which pulls its images and pushes all others"""
    triplet: float = 0.0
    """weight of the batch-hard triplet term"""
    multi_similarity: float = 0.0
    """weight of multi-similarity: soft maxima over an image's hard positives and hard negatives"""
    smooth_ap: float = 0.0
    """weight of 1 - average precision of each image among the batch's others, with smooth ranks"""
    center: float = 0.0
    """weight of the distance to the item's center"""
    supcon: float = 0.0
    """weight of supervised contrast, image to image"""
    infonce: float = 0.0
    """weight of contrast between images and prompts, by softmax as CLIP was trained"""
    sigmoid: float = 0.0
    """weight of contrast between images and prompts, pair by pair as SigLIP was trained. A model without a logit bias
    is given a scale of 10 and a bias of -10 while it trains"""
    ce_scale: float = 32.0
    """scale of the cosine classifier"""
    ce_margin: float = 0.25
    """margin taken from the right item's cosine"""
    ce_smoothing: float = 0.0
    """label smoothing"""
    arcface_scale: float = 32.0
    """scale of the cosine classifier"""
    arcface_margin: float = 0.25
    """margin added to the angle to the right item, radians"""
    arcface_centers: int = 1
    """weights of an item (sub-centers), of which the nearest counts: for items that look different from view to view"""
    arcface_dropout: float = 0.0
    """share of the features, drawn anew for each step, that the classifier does not see"""
    arcface_start: Literal["random", "mean"] = "random"
    """where the classifier begins: at random, or at the mean embedding of K views of each item under the weights that
    training starts from, for one pass over the items"""
    proxy_anchor_scale: float = 32.0
    """scale of both soft maxima"""
    proxy_anchor_margin: float = 0.1
    """cosine that positives should exceed, and negatives stay below the negative of"""
    triplet_margin: float = 0.15
    """margin on the Euclidean distance of embeddings; below 0: soft margin"""
    multi_similarity_positive_scale: float = 2.0
    """scale of the soft maximum over positives"""
    multi_similarity_negative_scale: float = 50.0
    """scale of the soft maximum over negatives"""
    multi_similarity_base: float = 0.5
    """cosine that positives should exceed, and negatives stay below"""
    multi_similarity_margin: float = 0.1
    """how much nearer than the farthest positive a negative may be left out, and the other way round; larger: more
    pairs count"""
    smooth_ap_temperature: float = 0.01
    """temperature of the sigmoid by which an image counts as above another, in units of cosine"""
    supcon_temperature: float = 0.07
    """temperature of supcon"""
    supcon_curvature: float = 0.0
    """compare embeddings in supcon by their distance in a hyperbolic space of curvature minus this; 0: by cosine. An
    image's order of the others is the same by both, so search stays by cosine"""
    supcon_captions: bool = False
    """let the batch's prompts take part in supcon beside its images"""
    infonce_temperature: float = 0.0
    """temperature of infonce at the start; 0: the model's own (.01 for OpenAI's, .07 for random weights). A model
    with a logit bias has one temperature for infonce and sigmoid"""
    learn_scale: bool = True
    """learn the logit scale of infonce, and scale and bias of sigmoid (the model's own in the joint stage alone)"""

    def __post_init__(self) -> None:
        for term in LOSS_TERMS:
            require(0 <= getattr(self, term) < math.inf, f"loss.{term}", "0 or more", getattr(self, term))
        require(
            any(getattr(self, term) for term in LOSS_TERMS),
            "loss",
            "at least one term above 0 of " + ", ".join(LOSS_TERMS),
            0,
        )
        if self.infonce_temperature:  # CLIP's logit scale is kept between 1 and 100
            require(
                0.01 <= self.infonce_temperature <= 1,
                "loss.infonce_temperature",
                "0, or from 0.01 to 1",
                self.infonce_temperature,
            )
        for name in (
            *("ce_scale", "arcface_scale", "proxy_anchor_scale"),
            *("multi_similarity_positive_scale", "multi_similarity_negative_scale"),
            *("smooth_ap_temperature", "supcon_temperature"),
        ):
            require(getattr(self, name) > 0, f"loss.{name}", "above 0", getattr(self, name))
        require(0 <= self.arcface_margin < 1.57, "loss.arcface_margin", "from 0 to 1.57 radians", self.arcface_margin)
        require(self.arcface_centers >= 1, "loss.arcface_centers", "1 or more", self.arcface_centers)
        require(0 <= self.arcface_dropout < 1, "loss.arcface_dropout", "from 0 to below 1", self.arcface_dropout)
        for name in ("proxy_anchor_margin", "multi_similarity_base"):
            require(-1 < getattr(self, name) < 1, f"loss.{name}", "between -1 and 1", getattr(self, name))
        margin = self.multi_similarity_margin
        require(margin >= 0, "loss.multi_similarity_margin", "0 or more", margin)
        require(0 <= self.ce_smoothing < 1, "loss.ce_smoothing", "from 0 to below 1", self.ce_smoothing)
        require(-1 <= self.ce_margin < 2, "loss.ce_margin", "from -1 to below 2", self.ce_margin)
        curvature = self.supcon_curvature  # in what is all but flat, distances are lost to rounding
        require(not curvature or 0.001 <= curvature <= 1, "loss.supcon_curvature", "0, or from 0.001 to 1", curvature)
        require(self.triplet_margin < 2, "loss.triplet_margin", "below 2, the largest distance", self.triplet_margin)

    @property
    def takes_text(self) -> bool:
        """Whether a term that is on learns from prompts."""
        return self.infonce > 0 or self.sigmoid > 0 or (self.supcon > 0 and self.supcon_captions)

    @property
    def takes_singles(self) -> bool:
        """Whether a term that is on learns from an item's only photo. Terms that compare images in pairs do not."""
        return self.has_classifier or self.center > 0 or self.takes_text

    @property
    def has_classifier(self) -> bool:
        """Whether a term that is on has weights of its own for each train item."""
        return self.ce > 0 or self.arcface > 0 or self.proxy_anchor > 0

    @property
    def pair_terms(self) -> list[str]:
        """Terms that are on and compare images in pairs."""
        names = ("triplet", "multi_similarity", "smooth_ap", *(() if self.supcon_captions else ("supcon",)))
        return [name for name in names if getattr(self, name)]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with layer-wise rates, warm-up and cosine per step, and an average of the weights."""

    lr: float = 1e-5
    """learning rate of what follows the image tower's last block"""
    text_lr: float = 0.1
    """rate of the text tower, as a multiple of lr (joint stage)"""
    head_lr: float = 10.0
    """rate of the heads, as a multiple of lr"""
    lora_lr: float = 10.0
    """rate of LoRA's updates, as a multiple of the rate that their weights would have"""
    center_lr: float = 0.5
    """rate of the centers, which have an SGD of their own"""
    weight_decay: float = 1e-4
    """decoupled decay of matrices; norms and biases have none"""
    layer_decay: float = 0.75
    """factor on lr from a block to the one below it; 1: the same for all"""
    warmup: float = 0.05
    """share of the budget spent rising to lr; then cosine to 0"""
    head_first: float = 0.0
    """share of the budget in which the heads alone learn: the classifier of ce, arcface or proxy_anchor, and what
    follows the image tower's last block (its projection). All else then has its own warm-up and cosine"""
    clip: float = 1.0
    """largest gradient norm; 0: no clipping"""
    ema: float = 0.999
    """decay of the average of the weights that is evaluated and exported; 0: none"""
    whitening: float = 0.0
    """share of the budget, at its end, over whose batches it is summed how views of one item differ. With the last
    report the image tower's projection lets that count less, if validation is the better for it; 0: not"""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optimizer.lr", "above 0", self.lr)
        for name in ("text_lr", "head_lr", "lora_lr", "center_lr", "weight_decay", "clip"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", "0 or more", getattr(self, name))
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay", "above 0 and at most 1", self.layer_decay)
        for name in ("warmup", "head_first", "ema", "whitening"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "from 0 to below 1", getattr(self, name))


@dataclass(frozen=True)
class BatchSettings:
    """P x K: P distinct items, K views of each."""

    items: int = 64
    """P, over all workers"""
    views: int = 4
    """K"""
    categories: int = 0
    """about how many categories share a batch; 0: items are drawn from all"""
    window: int | Literal["auto"] = "auto"
    """images in a window, whose shards lie in memory and are shuffled together; 0: all images are one window. auto: 0
    where memory holds them, else what it has room for. A run keeps what it began with"""
    chunk: int = 0
    """images that a worker takes through the towers at a time, with the gradient of the whole batch; 0: all of them.
    Less memory, one more forward pass"""
    memory: int = 0
    """images of past steps that supcon, triplet and multi_similarity compare a batch's images with, beside each other
    (cross-batch memory); their features stay as they were; 0: none"""
    neighbours: float = 0.0
    """share of P that is filled with items which at the last report looked like the others of the batch, as hard
    negatives. Needs all images in memory; 0: none"""

    def __post_init__(self) -> None:
        require(self.items >= 2, "batch.items", "2 or more", self.items)
        require(self.views >= 1, "batch.views", "1 or more", self.views)
        require(0 <= self.categories <= self.items, "batch.categories", "0 to batch.items", self.categories)
        require(self.window == "auto" or self.window >= 0, "batch.window", "0 or more, or auto", self.window)
        require(self.chunk >= 0, "batch.chunk", "0 or more", self.chunk)
        require(self.memory >= 0, "batch.memory", "0 or more", self.memory)
        require(0 <= self.neighbours < 1, "batch.neighbours", "from 0 to below 1", self.neighbours)

    @property
    def num_neighbours(self) -> int:
        """Number of the P items that are there as neighbours of the others."""
        return min(round(self.items * self.neighbours), self.items - 1)

    @property
    def images(self) -> int:
        """Images in a batch, over all workers."""
        return self.items * self.views


@dataclass(frozen=True)
class AugmentSettings:
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
    model: ModelSettings = field(default_factory=ModelSettings)
    text: TextSettings = field(default_factory=TextSettings)
    loss: LossSettings = field(default_factory=lambda: LossSettings(supcon=1.0))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "0 or more", self.seed)
        pair_terms = self.loss.pair_terms
        if self.batch.views == 1 and pair_terms:
            raise UserError(f"--batch.views 1 leaves loss.{pair_terms[0]} without positives: take 2 or more views")
        if self.batch.memory and not set(pair_terms) - {"smooth_ap"}:
            raise UserError(
                f"--batch.memory {self.batch.memory}: no term that is on compares images of several steps: switch on "
                "loss.supcon (without loss.supcon_captions), loss.triplet or loss.multi_similarity, or leave it out"
            )
        if self.optimizer.whitening and self.stage == "joint":
            raise UserError(
                f"--optimizer.whitening {self.optimizer.whitening}: it turns images away from their prompts: take 0 in "
                "the joint stage"
            )
        if self.optimizer.whitening and self.batch.views == 1:
            raise UserError(
                f"--optimizer.whitening {self.optimizer.whitening}: it needs two views of an item in a batch, and "
                "batch.views is 1: take 2 or more, or no whitening"
            )
        targets = self.model.lora_targets if self.model.lora_rank else "all"
        if self.optimizer.head_first and targets != "all" and not self.loss.has_classifier:
            raise UserError(
                f"--optimizer.head_first: with model.lora_targets {targets} no head learns: take model.lora_targets "
                "all, or switch loss.ce, loss.arcface or loss.proxy_anchor on"
            )


@dataclass(frozen=True)
class Placement:
    """Where a run is computed. It changes the speed, not the result."""

    workers: int = 1
    """training processes a run. `clipfh train` takes 2-8, say, for as many as the cluster has room for"""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 where there is a GPU, else 0; .5 puts two one-worker trials on a GPU"""
    cpus_per_worker: float | Literal["auto"] = "auto"
    """auto: 1 beside a GPU, else what the machine has to spare"""
    concurrent: int | Literal["auto"] = "auto"
    """trials at once in a sweep, if there is room; auto: what the cluster holds, data pipelines counted in"""
    keep_gib: float | Literal["auto"] = "auto"
    """GiB of decoded images to keep in the cluster's object store, as far as they go: decoding is then spared. auto:
    none there; where a run trains in its own process, an eighth of memory, if it reads each image twice or more"""
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
        require(self.keep_gib == "auto" or self.keep_gib >= 0, "keep-gib", "0 or more, or auto", self.keep_gib)
