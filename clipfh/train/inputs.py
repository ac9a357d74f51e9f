"""What a run begins with: its folder, its model, and what its workers read, put into the object store once for all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from torch import nn

from clipfh import UserError
from clipfh.config import schema
from clipfh.config.experiment import Experiment, LossSettings
from clipfh.config.schedule import make_schedule
from clipfh.data.audit import picture_codes, read_copies
from clipfh.data.catalogue import Catalogue
from clipfh.data.decoding import Feed, fetch
from clipfh.data.prompts import note_fit
from clipfh.data.sampler import ItemIndex, make_sampler
from clipfh.learn.learner import ItemCaptions, count_trained
from clipfh.model import architecture as architectures
from clipfh.model import checkpoint
from clipfh.model.architecture import Architecture
from clipfh.model.clip import (
    build,
    get_architecture,
    get_preprocess,
    load_initial_model,
    load_tokenizer,
    load_weights,
    make_token_counter,
    resize,
)
from clipfh.model.prompts import load_prompts_for
from clipfh.storage import layout, run_folder, store
from clipfh.storage.store import Folder
from clipfh.train import provenance
from clipfh.train.run_inputs import Inputs


def open_run(
    out: str | Path | Folder,
    experiment: Experiment | None,
    catalogue: Catalogue,
    warm_start: str | None = None,
    resume: bool = False,
) -> tuple[nn.Module, Experiment]:
    """Make the run's folder, or open it to go on; returns the model that it starts from, and its experiment.

    Args:
        out: the run's folder.
        experiment: what to compute; None takes what the folder has.
        catalogue: to train on.
        warm_start: weights to start from.
        resume: go on with what the folder holds.

    Raises:
        UserError: a folder in use, nothing to resume, or weights that do not fit; to resume, other settings, another
            catalogue or a changed file.
    """
    folder = Folder(out)
    file = folder / layout.EXPERIMENT
    if resume and not folder.exists(layout.RUN):
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
    if not resume and not folder.is_empty():
        raise UserError(f"--out {folder} is not empty: --resume goes on with its run, or name another folder")
    catalogue.require("train", "val_query", "val_gallery")
    warm_start = store.absolute(warm_start) if warm_start else None
    if resume and warm_start and warm_start != (start := folder.read_json(layout.RUN)["warm_start"]):
        raise UserError(f"--resume: {folder} was started from {start or 'no other run'}: leave --warm-start out")
    fresh = {"hash": catalogue.manifest["hash"], "warm_start": warm_start, "window": None}
    record = folder.read_json(layout.RUN) if resume else fresh
    if record["hash"] != catalogue.manifest["hash"]:
        raise UserError(f"--resume: {folder} was trained on another catalogue than {catalogue.path}: give that one")
    if resume and experiment is not None and experiment != schema.load_experiment(file):
        raise UserError(f"--resume: the settings differ from those in {file}: leave them out, or name another --out")
    experiment = experiment or schema.load_experiment(file)
    has_weights = resume and run_folder.latest_step(folder) > 0
    contents = provenance.contents(experiment, record["warm_start"], has_weights)
    provenance.require_same(record.setdefault("contents", contents), contents, folder)
    clip = _build_again(folder, experiment) if has_weights else load_start(experiment, record["warm_start"])
    folder.make()
    folder.write(layout.EXPERIMENT, schema.to_json(experiment))
    folder.write(layout.ARCHITECTURE, get_architecture(clip).to_json())
    folder.write(layout.RUN, json.dumps({"catalogue": str(catalogue.path), **record}, indent=2) + "\n")
    return clip, experiment


def is_warm_started(out: str | Path | Folder) -> bool:
    """Whether a run was begun with the weights of another."""
    return bool(Folder(out).read_json(layout.RUN)["warm_start"])


def notes_on_singles(inputs: Inputs, loss: LossSettings) -> list[str]:
    """Notes for people on items and prompts that a loss does not use in full."""
    fate = "left out of terms that need a second one" if loss.takes_singles else "not trained on"
    counts = {
        f"train items have one photo and are {fate}": inputs.num_single,
        "prompts of train items are longer than the model reads: their ends are cut off": inputs.num_cut,
        "train items have no prompt: terms that learn from prompts leave them out": inputs.num_untold,
    }
    return [f"note: {count:,} {what}" for what, count in counts.items() if count]


def read_window(out: str | Path | Folder, name: str) -> int | None:
    """Number of images in a window of a run or a sweep, 0 for all in one window; None where it is not chosen yet.

    Args:
        out: folder of the run or the sweep.
        name: the folder's file that has the number. Files of a version without windows have none, which means 0.
    """
    window: int | None = Folder(out).read_json(name).get("window", 0)
    return window


def write_window(out: str | Path | Folder, name: str, window: int | None) -> None:
    """Store the number of images in a window with a run or a sweep, so that a resumed one has the same batches."""
    folder = Folder(out)
    folder.write(name, json.dumps({**folder.read_json(name), "window": window}, indent=2) + "\n")


def notes_on_windows(inputs: Inputs, catalogue: Catalogue) -> list[str]:
    """Notes for people on windows, where there are any."""
    window, (images, size) = inputs.images.window, catalogue.size("train")
    if not window:
        return []
    gib = size / 2**30
    return [
        f"the train images, {gib:,.1f} GiB, are read in {math.ceil(images / window):,} windows a pass, each of about "
        f"{window:,} images ({gib * window / images:,.1f} GiB; two are in memory): --batch.window sets it"
    ]


def note_on_size(clip: nn.Module, experiment: Experiment) -> str:
    """A note for people on how much is trained. It freezes the other parameters of the model.

    Raises:
        UserError: the settings leave nothing to train.
    """
    num_trained, total = count_trained(clip, experiment), sum(p.numel() for p in clip.parameters())
    rank, targets = experiment.model.lora_rank, experiment.model.lora_targets
    how = f" (LoRA of rank {rank}, targets {targets})" if rank else ""
    return f"trains {num_trained / 1e6:,.2f} M of {total / 1e6:,.2f} M parameters{how}"


def load_start(experiment: Experiment, warm_start: str | None = None) -> nn.Module:
    """The model as training finds it: pretrained or random, then the weights to warm-start from."""
    if not warm_start:
        return load_initial_model(experiment.model, experiment.seed)
    weights = checkpoint.load(warm_start)
    settings = weights.experiment.model if weights.experiment else experiment.model
    own_name, name = settings.name if weights.experiment else weights.model_name, experiment.model.name
    if own_name and not _may_be(own_name, name):
        raise UserError(f"--warm-start {warm_start} holds {own_name}, not {name}: give --model {own_name}")
    own, target = weights.architecture(settings), architectures.find(experiment.model)
    if not target.takes_weights_of(own):
        raise UserError(
            f"--warm-start {warm_start} holds {settings.name} with {own.activation}, which differs from {name} with "
            f"{target.activation}: give --model {settings.name}"
        )
    if own.preprocess_cfg != target.preprocess_cfg:
        tag = architectures.weights_name(settings) or "none"
        raise UserError(
            f"--warm-start {warm_start} was trained on images prepared as for the weights '{tag}', which differs from "
            f"'{architectures.weights_name(experiment.model) or 'none'}': give --model.pretrained {tag}"
        )
    return resize(load_weights(own, weights.state, warm_start), experiment.model)


def _may_be(own_name: str, name: str) -> bool:
    """Whether two names of open_clip's list may mean one model: ViT-B/16, ViT-B-16 and ViT-B-16-quickgelu may."""
    plain = [each.replace("/", "-").removesuffix("-quickgelu") for each in (own_name, name)]
    return plain[0] == plain[1] or any(":" in each for each in plain)


def _build_again(out: Folder, experiment: Experiment) -> nn.Module:
    """The model of a run that has checkpoints; its weights are loaded later."""
    return build(checkpoint.read_architecture(out) or architectures.find(experiment.model))


VALIDATION = ("val_query", "val_gallery")


def prepare_inputs(
    catalogue: Catalogue,
    experiment: Experiment,
    clip: nn.Module,
    feed: Feed,
    keep_gib: float | Literal["auto"] = 0.0,
    with_validation: bool = False,
    warm: bool = False,
    window: int | None = None,
) -> Inputs:
    """Put what runs with this model and these prompts share into the feed.

    Args:
        catalogue: to train on.
        experiment: only its model, its prompts and its P x K count; the latter is the largest of all runs.
        clip: weights to start from.
        feed: holds the inputs, and gives the workers their batches.
        keep_gib: GiB of decoded images to keep for all runs; "auto" for what the feed can spare, where a run reads
            images more than once.
        with_validation: train on the validation items too; their score then means nothing, and there is none.
        warm: the weights are another run's. Without it, each run draws random weights by its own seed.
        window: number of images in a window, 0 for all in one; None for what the experiment says.

    Raises:
        UserError: prompts or a P x K that do not fit the catalogue, or windows where decoded images are to be kept.
    """
    splits = ("train", *VALIDATION) if with_validation else ("train",)
    images = feed.share(catalogue, *splits, window=experiment.batch.window if window is None else window)
    if keep_gib not in (0, "auto") and images.window:
        raise UserError(
            "--keep-gib keeps decoded images of a catalogue that memory holds whole, and this one is read in windows "
            f"of {images.window:,} images: leave it out, or give --batch.window 0"
        )
    index: ItemIndex = fetch(images.index)
    make_sampler(index, experiment.batch, experiment.seed, experiment.loss.takes_singles, images.window)
    preprocess = get_preprocess(clip)
    if keep_gib == "auto":
        keep_gib = feed.spare_gib() if not images.window and _reads_again(experiment, index) else 0
    if keep_gib:
        images = feed.cache_decoded(images, keep_gib, preprocess.size, experiment.augment.crop_min)
    captions, num_cut = tokenize_captions(catalogue, index.names, experiment, get_architecture(clip), *splits)
    num_untold = int((captions.of_item < 0).sum()) if experiment.loss.takes_text else 0
    if num_untold == len(index.names):
        raise UserError(
            f"no train item has a prompt by text.strategy {experiment.text.strategy}, and a term learns from prompts: "
            "give texts to prepare, take --text.strategy structured, or switch loss.infonce, loss.sigmoid and "
            "loss.supcon_captions off"
        )
    weights = {name: tensor.numpy() for name, tensor in clip.state_dict().items()}
    return Inputs(
        architecture=get_architecture(clip),
        images=images,
        captions=feed.put(captions),
        weights=feed.put(weights) if warm or architectures.weights_name(experiment.model) else None,
        validation=None if with_validation else feed.decode_for_evaluation(catalogue, VALIDATION, preprocess),
        items=feed.put(validation_codes(catalogue)),
        size=preprocess.size,
        num_images=len(index.item),
        num_single=index.num_single,
        num_cut=num_cut,
        num_untold=num_untold,
    )


def _reads_again(experiment: Experiment, index: ItemIndex) -> bool:
    """Whether a run reads each image twice or more."""
    schedule = make_schedule(experiment, len(index.item), index.num_single)
    return schedule.num_steps * schedule.batch_images >= 2 * len(index.item)


def validation_codes(catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray, int]:
    """Item code and picture code of each validation image, (N,) each, and how many of them are queries."""
    rows = pa.concat_tables([catalogue.columns(split, ["item_id", "path"]) for split in VALIDATION])
    item = rows["item_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    picture = picture_codes(rows["path"].to_pylist(), read_copies(catalogue))
    return item, picture, catalogue.num_images(VALIDATION[0])


def tokenize_captions(
    catalogue: Catalogue, item_names: pa.Array, experiment: Experiment, architecture: Architecture, *splits: str
) -> tuple[ItemCaptions, int]:
    """The prompts of some splits' items, tokenized, and how many of them are longer than the model reads.

    Where no term learns from prompts there are none: those of half a million items take half an hour.
    """
    if not experiment.loss.takes_text:
        return ItemCaptions(np.zeros((0, 0), np.int32), np.full(len(item_names), -1, np.int32)), 0
    names = item_names.to_pylist()
    tokenizer = load_tokenizer(architecture)
    prompt_of = load_prompts_for(catalogue, experiment, tokenizer, *splits)
    if experiment.text.file:
        note_fit(prompt_of, names, f"--text.file {experiment.text.file}")
    distinct = {text: i for i, text in enumerate(sorted({prompt_of[n] for n in names if n in prompt_of}))}
    of_item = np.array([distinct[prompt_of[n]] if n in prompt_of else -1 for n in names], np.int32)
    tokens = tokenizer(list(distinct)).numpy().astype(np.int32)
    full, count = tokens[:, -1] != 0, make_token_counter(tokenizer)
    num_cut = sum(count(text) > tokens.shape[1] for text, i in distinct.items() if full[i])
    return ItemCaptions(tokens, of_item), num_cut
