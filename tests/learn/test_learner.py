"""The training step: the same for any number of workers and any way to save memory; what is frozen stays."""

import functools
import math
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipfh import UserError
from clipfh.config import presets
from clipfh.config.experiment import LOSS_TERMS, SMALL_MODEL, ModelSettings
from clipfh.data.sampler import ItemIndex, PKSampler, make_sampler, worker_slice
from clipfh.learn import learner, tally
from clipfh.learn.learner import ItemCaptions
from clipfh.learn.tally import StepTally
from clipfh.model import checkpoint
from clipfh.model.architecture import find as find_architecture
from clipfh.model.clip import get_architecture, load_initial_model, load_tokenizer
from clipfh.model.towers import Towers, embed_images, recompute_blocks
from clipfh.model.transfer import images_to_device

P, K, ITEMS = 4, 2, 7
STEPS = 10
IMAGES = np.random.default_rng(0).integers(0, 255, (ITEMS * 3, 64, 64, 3), dtype=np.uint8)
INDEX = ItemIndex(
    # item 6 has one view, so it repeats in a batch and stays out of the terms that need a positive
    item=np.array([i for i in range(ITEMS) for _ in range(3 if i < 6 else 1)], np.int32),
    category=np.zeros(ITEMS, np.int32),
    names=[f"item {i}" for i in range(ITEMS)],
    shard_ends=np.array([19]),
)
SETTINGS = {
    "model.name": SMALL_MODEL,
    "model.image_size": 64,
    "batch.items": P,
    "batch.views": K,
    "budget.images": P * K * STEPS,
    "optimizer.lr": 1e-3,
    "optimizer.warmup": 0.2,
    "augment.randaugment": 5.0,
    "augment.erase": 0.5,
    "loss.supcon": 0.0,
    "loss.triplet": 0.0,
    "loss.infonce": 0.0,
}
TERMS = {
    "ce": {"loss.ce": 1.0, "loss.ce_smoothing": 0.1},
    "triplet": {"loss.triplet": 1.0},
    "soft triplet": {"loss.triplet": 1.0, "loss.triplet_margin": -1.0},
    "pairs with a memory": {
        **{"loss.triplet": 1.0, "loss.multi_similarity": 1.0, "loss.smooth_ap": 1.0, "loss.supcon": 1.0},
        "loss.supcon_curvature": 0.1,
        "batch.memory": 11,  # full in the second step, no multiple of a batch
    },
    "supcon with neighbours": {"loss.supcon": 1.0, "batch.neighbours": 0.5},
    "arcface": {"loss.arcface": 1.0, "loss.arcface_centers": 2, "loss.arcface_dropout": 0.5},
    "center": {"loss.center": 1.0},
    "supcon": {"loss.supcon": 1.0},
    "supcon with captions": {"loss.supcon": 1.0, "loss.supcon_captions": True},
    "infonce": {"loss.infonce": 1.0},
    "sigmoid": {"loss.sigmoid": 1.0},
    "all": {f"loss.{term}": 0.5 for term in LOSS_TERMS},
}


def captions() -> ItemCaptions:
    """Items 0 and 1 share a caption, item 5 has none."""
    tokens = load_tokenizer(find_architecture(ModelSettings(name=SMALL_MODEL)))(
        [f"a garment of kind {i}" for i in range(5)]
    )
    return ItemCaptions(tokens.numpy().astype(np.int32), np.array([0, 0, 1, 2, 3, -1, 4], np.int32))


def learner_of(
    stage: str = "image", dtype: torch.dtype = torch.float64, siglip: bool = False, **settings
) -> learner.Learner:
    """A learner of the small model; with `siglip` it has scale and bias as SigLIP has."""
    experiment = presets.resolve(stage, "scratch", {**SETTINGS, **settings})
    clip = load_initial_model(experiment.model, 0).to(dtype)
    if siglip:
        clip.logit_scale.data.fill_(math.log(117))
        clip.logit_bias = torch.nn.Parameter(torch.tensor(-16.5, dtype=dtype))
    return learner.Learner(experiment, clip, INDEX, captions(), torch.device("cpu"))


def train(one: learner.Learner, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Train a rank on its part of each batch; returns the weights, with those of heads and average."""
    plan = PKSampler(INDEX.item, P, K)
    for step in range(steps):
        rows = plan.batch(step)
        one.train_step(rows, IMAGES[rows[worker_slice(len(rows), one.rank, one.world_size)]])
    heads = {f"heads.{name}": tensor for name, tensor in one.objective.state_dict().items()}
    average = {f"average.{name}": tensor for name, tensor in one.average.weights.items()}
    return {name: tensor.clone() for name, tensor in {**one.weights()[0], **heads, **average}.items()}


# Of three workers the last has none of them
FEW = learner.Validation(IMAGES[:4], np.array([0, 1, 0, 1]), np.arange(4), 2)


def outcome(one: learner.Learner) -> dict[str, torch.Tensor]:
    """A rank's weights after its steps, their score, and which items it takes for near."""
    plan = PKSampler(INDEX.item, P, K)
    drawn = ((step, plan.batch(step)) for step in range(one.steps_before))
    one.begin((step, rows, IMAGES[rows[worker_slice(P * K, one.rank, one.world_size)]]) for step, rows in drawn)
    found = {**train(one), "validation": torch.tensor(one.validate(FEW))}
    if one.covariance is not None:
        found["scatter"] = one.covariance.scatter
    if one.neighbours is None:
        return found
    one.neighbours.refresh()
    return {**found, "nearest": one.neighbours.nearest}


def gradients(one: learner.Learner, steps: int = 1) -> dict[str, torch.Tensor]:
    """Of the last of some steps, after clipping."""
    train(one, steps)
    return {name: p.grad for name, p in one.clip.named_parameters() if p.grad is not None}


def assert_equal(found: dict, expected: dict, atol: float, name: str = "") -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol, msg=lambda m, key=key: f"{name} {key}: {m}")


def learner_for(stage: str, term: str) -> learner.Learner:
    """A learner of a case of `alone`."""
    name, _, way = term.partition(", ")
    more = {"model.lora_rank": 4, "optimizer.head_first": 0.3} if way == "lora" else {}
    more |= {"loss.arcface_start": "mean"} if way == "mean" else {}
    return learner_of(stage, siglip=way == "siglip", **TERMS[name], **more)


def worker(rank: int, world_size: int, store: str, expected: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for case, weights in torch.load(expected).items():
        # AdamW divides by the gradient's size: where that is nearly 0, rounding shows. A wrong part moves by 1e-3
        assert_equal(outcome(learner_for(*case)), weights, 1e-5, f"{case}:")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    """A file with what one worker's ten steps give, by stage and term."""
    ways = ("sigmoid, siglip", "all, lora")
    image = ("soft triplet", "pairs with a memory", "arcface, mean", "all")
    stages = {"image": image, "joint": ("supcon with captions", "all", *ways)}
    found = {(stage, name): outcome(learner_for(stage, name)) for stage in stages for name in stages[stage]}
    start = load_initial_model(ModelSettings(name=SMALL_MODEL, image_size=64), 0).double().state_dict()
    for (stage, _), weights in found.items():
        moved = {name for name in start if not torch.equal(weights[name], start[name])}
        assert any(name.startswith("visual.") for name in moved)
        assert any(name.startswith("transformer.") for name in moved) == (stage == "joint")
    file = tmp_path_factory.mktemp("alone") / "weights.pt"
    torch.save(found, file)
    return str(file)


def test_ten_steps_of_three_workers_are_those_of_one(alone: str, tmp_path: Path):
    mp.get_context("forkserver").set_forkserver_preload(["torch", "open_clip"])
    mp.start_processes(worker, (3, str(tmp_path / "store"), alone), nprocs=3, start_method="forkserver")


@pytest.mark.parametrize("more", [{}, {"optimizer.ema": 0.0}, {"model.lora_rank": 4}], ids=["average", "raw", "lora"])
def test_the_last_report_whitens_what_is_exported_by_the_batches_of_the_last_steps(more: dict):
    one = learner_of(**TERMS["supcon"], **{"optimizer.whitening": 0.3, **more})
    train(one, STEPS - 3)
    assert not one.covariance.scatter.any()
    since = StepTally()
    for step in range(STEPS - 3, STEPS):
        rows = PKSampler(INDEX.item, P, K).batch(step)
        since.add(P * K, 0.0, one.train_step(rows, IMAGES[rows]))
    before = {**one.weights()[0], **one.weights()[1]}
    other = learner_of(**TERMS["supcon"], **{"optimizer.whitening": 0.3, **more})
    other.restore(*one.weights(), one.state())
    torch.testing.assert_close(other.covariance.scatter, one.covariance.scatter)
    one.report(since, None, start_val_mAP=0.0)
    embedded = []
    for weights in (before, {**one.weights()[0], **one.weights()[1]}):
        clip = load_initial_model(one.experiment.model, 0).double()
        clip.load_state_dict(weights)
        embedded.append(embed_images(Towers(clip), IMAGES, torch.float32).double())
    expected = F.normalize(embedded[0] @ one.covariance.whitening())
    torch.testing.assert_close(embedded[1], expected, rtol=0, atol=1e-6)
    assert (embedded[1] - embedded[0]).abs().max() > 1e-4


@pytest.mark.parametrize(("plain", "whitened"), [(0.5, 0.6), (0.5, 0.4)])
def test_embeddings_are_whitened_where_validation_gains_by_it(monkeypatch, plain: float, whitened: float):
    one = learner_of(**TERMS["supcon"], **{"optimizer.whitening": 0.3})
    train(one, STEPS - 1)
    since = StepTally()
    since.add(P * K, 0.0, one.train_step(np.arange(P * K), IMAGES[: P * K]))
    monkeypatch.setattr(learner, "_rank", mock.Mock(side_effect=[plain, whitened]))
    report = one.report(since, FEW, start_val_mAP=0.0)
    assert (report["val_mAP"], report["val_mAP_whitened"]) == (max(plain, whitened), whitened)
    assert (one.whitening is not None) == (whitened > plain)


@pytest.mark.parametrize("stage", ["image", "joint"])
@pytest.mark.parametrize(
    "saving",
    [{"batch.chunk": 3}, {"model.checkpointing": True}, {"batch.chunk": 3, "model.checkpointing": True}],
    ids=["cached", "checkpointed", "both"],
)
def test_saving_memory_changes_no_gradient(stage: str, saving: dict):
    """Of the third step, so that the cross-batch memory takes part."""
    plain, saved = (learner_of(stage, **TERMS["all"], **{"batch.memory": 11}, **more) for more in ({}, saving))
    passes = []
    saved.clip.visual.conv1.register_forward_hook(lambda *_: passes.append(1))
    assert_equal(gradients(saved, steps=3), gradients(plain, steps=3), 1e-12)
    assert len(passes) == 3 * (6 if "batch.chunk" in saving else 1), "chunks of 3 of 8 images, each computed twice"


def test_a_resnet_is_checkpointed_though_open_clip_does_not():
    settings = ModelSettings(name="RN50", pretrained="none", checkpointing=True)
    found = []
    for checkpointed in (False, True):
        clip = load_initial_model(settings, 0)
        if checkpointed:
            recompute_blocks(clip, "RN50")
        passes = []
        clip.visual.layer2[0].conv1.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        towers = Towers(clip).train()
        towers(
            torch.from_numpy(IMAGES[:1])
            .permute(0, 3, 1, 2)
            .repeat_interleave(4, 2)
            .repeat_interleave(4, 3)[:, :, :224, :224]
        )[0].square().sum().backward()
        found.append({name: p.grad for name, p in clip.visual.named_parameters()})
        assert len(passes) == 1 + checkpointed
    assert_equal(found[1], found[0], 1e-6)


def test_compiled_towers_train_as_plain_ones():
    plain, compiled = (learner_of(dtype=torch.float32, **TERMS["all"], **m) for m in ({}, {"model.compile": True}))
    assert_equal(gradients(compiled), gradients(plain), 1e-4)


def test_what_cannot_be_compiled_is_refused_with_the_reason(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_compiler))
    with pytest.raises(UserError, match=r"--model.compile: .*No working C\+\+ compiler found.*leave it out"):
        train(learner_of(**TERMS["supcon"], **{"model.compile": True}), steps=1)


def test_the_frozen_text_tower_runs_once(monkeypatch):
    one = learner_of("image", **TERMS["all"])
    runs = []
    monkeypatch.setattr(one.clip, "encode_text", lambda t, f=one.clip.encode_text: runs.append(len(t)) or f(t))
    train(one, steps=3)
    assert runs == [5], "all captions, once"


def test_the_frozen_text_tower_computes_in_the_runs_precision(monkeypatch):
    settings = {"loss.infonce": 1.0, "model.precision": "bfloat16"}
    one = learner_of("image", torch.float32, **settings)
    types = []
    encode = one.clip.encode_text
    monkeypatch.setattr(one.clip, "encode_text", lambda t: types.append(torch.is_autocast_enabled("cpu")) or encode(t))
    train(one, steps=1)
    assert types == [True] and one.caption_features.dtype == torch.float32


def test_the_text_tower_never_runs_without_a_term_for_it(monkeypatch):
    for stage in ("image", "joint"):
        one = learner_of(stage, **TERMS["triplet"])
        monkeypatch.setattr(one.clip, "encode_text", lambda *_: pytest.fail("nothing learns from text"))
        train(one, steps=1)


@pytest.mark.parametrize("learn", [True, False])
def test_the_logit_scale_is_clamped_and_learned_where_asked(learn: bool):
    settings = {"loss.infonce": 1.0, "loss.infonce_temperature": 0.01, "loss.learn_scale": learn}
    one = learner_of("joint", **settings)
    assert one.clip.logit_scale.exp().item() == pytest.approx(100)
    train(one, steps=3)
    scale = one.clip.logit_scale.exp().item()
    assert scale <= 100.001 and (scale < 99.99) == learn


@pytest.mark.parametrize("term,moves", [("supcon", 0), ("infonce", 1), ("sigmoid", 2), ("all", 2)])
def test_the_scale_of_siglip_is_no_clips_and_its_bias_moves_where_a_term_takes_it(term: str, moves: int):
    one = learner_of("joint", siglip=True, **TERMS[term])
    before = one.clip.logit_scale.item(), one.clip.logit_bias.item()
    assert before == (math.log(117), -16.5)
    train(one, steps=3)
    after = one.clip.logit_scale.item(), one.clip.logit_bias.item()
    assert [x != y for x, y in zip(before, after, strict=True)] == [moves > 0, moves > 1]
    assert after[0] > math.log(110), "above CLIP's limit"
    assert all(p.grad is not None for p in one.clip.parameters() if p.requires_grad)


def test_a_model_without_a_bias_keeps_its_scale_while_sigmoid_has_its_own():
    one = learner_of("joint", **TERMS["sigmoid"])
    before = one.clip.logit_scale.item()
    heads = train(one, steps=3)
    assert one.clip.logit_scale.item() == before
    assert heads["heads.heads.sigmoid.bias"] != -10 and heads["heads.heads.sigmoid.log_scale"] != math.log(10)


@pytest.mark.parametrize("given,expected", [(0.0, 0.07), (0.02, 0.02)])
def test_the_temperature_of_infonce_is_where_training_starts(given: float, expected: float):
    one = learner_of(**{"loss.infonce": 1.0, "loss.infonce_temperature": given})
    assert one.clip.logit_scale.exp().item() == pytest.approx(1 / expected, rel=1e-4)


def test_labels_name_every_caption_once():
    one = learner_of(**TERMS["supcon"])
    rows = np.arange(0, 19, 2)
    labels, _ = one._labels(rows)
    caption = captions().of_item[INDEX.item[rows]]
    np.testing.assert_array_equal(labels.captions[labels.caption].numpy(), caption[caption >= 0])
    assert len(labels.captions.unique()) == len(labels.captions)


def test_no_image_is_trained_on_in_vain():
    one = learner_of(**{"loss.supcon": 1.0, "loss.triplet": 1.0})
    plan = make_sampler(INDEX, one.experiment.batch, 0, one.experiment.loss.takes_singles)
    for step in range(STEPS):
        rows = plan.batch(step)
        labels, tokens = one._labels(rows)
        features, text, scale = one._features(images_to_device(IMAGES[rows], one.device), tokens, labels)
        features.retain_grad()
        one.objective(features, text, scale, labels)[0].backward()
        assert features.grad.abs().sum(1).all()


class Reads(TorchDispatchMode):
    """Counts the operations that must know a value of the device: on a GPU each waits for all that was asked of it."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], (list, tuple)) else ()
        masks = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if masks or any(name == each or name.startswith(f"_{each}") for each in self.NAMES):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["image", "joint"])
@pytest.mark.parametrize("randaugment", [0.0, 9.0])
def test_a_step_reads_one_value_of_the_device(stage: str, randaugment: float):
    one = learner_of(stage, torch.float32, **TERMS["all"], **{"augment.randaugment": randaugment})
    train(one, steps=1)
    with Reads() as reads:
        one.train_step(np.arange(8), IMAGES[:8])
    assert sum(reads.found.values()) <= 1, reads.found


def test_a_step_goes_through_no_list_of_all_images(monkeypatch):
    """Of ten million it would take 40 ms."""
    one = learner_of(**TERMS["all"])
    train(one, steps=1)
    monkeypatch.setattr(np, "bincount", lambda *_, **__: pytest.fail("counted again"))
    one.train_step(np.arange(8), IMAGES[:8])


class Moves(TorchDispatchMode):
    """Notes what goes from one device to another, and whether it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if isinstance(out, torch.Tensor) and set(before) - {out.device.type}:
            self.found.append((out.device.type, "copy" in str(func) and bool((kwargs or {}).get("non_blocking"))))
        return out


@pytest.mark.parametrize("stage", ["image", "joint"])
def test_a_gpu_is_sent_all_without_waiting(stage: str, monkeypatch):
    """On a GPU made up of shapes alone, where whatever needs a value fails; it has no backward pass."""

    def no_update(_: object, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return total.detach(), (~torch.isfinite(total.detach())).float()

    monkeypatch.setattr(learner.Learner, "_update", no_update)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: mock.MagicMock())
    settings = {**SETTINGS, "loss.supcon": 1.0, "loss.triplet": 1.0, "loss.center": 1.0, "loss.infonce": 1.0}
    experiment = presets.resolve(stage, "scratch", {**settings, "augment.randaugment": 9.0})
    clip, texts = load_initial_model(experiment.model, 0), captions()
    with FakeTensorMode(allow_non_fake_inputs=True):
        one = learner.Learner(experiment, clip, INDEX, texts, torch.device("cuda", 0))
        for _ in range(2):
            one.unchecked = None  # its value is what the next step would read
            with Moves() as moves:
                one.train_step(np.arange(8), IMAGES[:8])
    assert all(unawaited for _, unawaited in moves.found), moves.found
    assert [to for to, _ in moves.found].count("cpu") == 1 and len(moves.found) == 6


def diverge(one: learner.Learner) -> dict[str, torch.Tensor]:
    """Train two steps, then one whose loss is not finite; returns the weights before that one."""
    train(one, steps=2)
    one.clip.visual.ln_post.register_forward_hook(lambda _, __, out: out * float("nan"))
    before = {name: tensor.clone() for name, tensor in weights(one).items()}
    one.train_step(np.arange(8), IMAGES[:8])
    return before


def weights(one: learner.Learner) -> dict[str, torch.Tensor]:
    """All that a step may change of what is evaluated."""
    moments = {f"{i}.{n}": t for i, s in one.optimizer.state_dict()["state"].items() for n, t in s.items()}
    return {**one.clip.state_dict(), **moments}


def test_divergence_is_noticed_a_step_late_with_the_step_and_the_images():
    one = learner_of(**TERMS["supcon"])
    before = diverge(one)
    with pytest.raises(tally.Diverged) as caught:
        one.train_step(np.arange(8, 16), IMAGES[8:16])
    assert caught.value.step == 2 and caught.value.rows.tolist() == list(range(8))
    assert list(caught.value.terms) == ["supcon"]
    assert_equal(weights(one), before, 0)


def test_no_report_is_made_of_a_step_that_was_not_finite():
    one = learner_of(**TERMS["supcon"])
    before = diverge(one)
    with pytest.raises(tally.Diverged, match="2"):
        one.report(StepTally(), validation(), start_val_mAP=0.0)
    assert_equal(weights(one), before, 0)
    assert_equal(one.average.weights, {n: t for n, t in one.average.weights.items() if t.isfinite().all()}, 0)


def test_the_speed_is_that_of_training_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    one, since = learner_of(**TERMS["supcon"]), StepTally()
    values = one.train_step(np.arange(8), IMAGES[:8])
    now[0] += 4.0
    since.add(8, 1.0, values)

    def slow(_: object) -> float:
        now[0] += 1000.0
        return 0.5

    monkeypatch.setattr(one, "validate", slow)
    report = one.report(since, validation(), start_val_mAP=0.0)
    assert (report["images_per_second"], report["data_wait"], report["val_mAP"]) == (2.0, 0.25, 0.5)


@functools.cache
def validation() -> learner.Validation:
    return learner.Validation(IMAGES[:12], np.array([0, 1, 2, 3] * 3), np.arange(12), 4)


def test_a_report_warns_of_a_collapse_only_after_the_warm_up():
    one = learner_of(dtype=torch.float32, **TERMS["supcon"], **{"optimizer.warmup": 0.2})
    with torch.no_grad():
        one.clip.visual.proj.zero_()[0].fill_(1)  # every image to the same direction
        one.clip.visual.ln_post.weight.zero_()
        one.clip.visual.ln_post.bias.fill_(1)
    one.clip.requires_grad_(False)
    one.clip.visual.class_embedding.requires_grad_(True)
    for steps, warned in ((1, 0), (STEPS, 1)):
        while one.step < steps:
            since = StepTally()
            since.add(8, 0.0, one.train_step(np.arange(8), IMAGES[:8]))
        report = one.report(since, validation(), start_val_mAP=0.0)
        assert len(report["warnings"]) == warned
    assert "supcon has collapsed: all embeddings alike" in report["warnings"][0]


@pytest.mark.parametrize(
    "term", ["all", "all, siglip", "all, lora", "pairs with a memory", "supcon with neighbours", "arcface"]
)
def test_a_restored_learner_goes_on_as_if_nothing_had_been(term: str, tmp_path: Path):
    one, other = learner_for("joint", term), learner_for("joint", term)
    train(one, steps=3)
    checkpoint.save(tmp_path, one.experiment, get_architecture(one.clip), *one.weights(), one.state(), {})
    raw, average, state, _ = checkpoint.load_training(tmp_path)
    other.restore(raw, average, state)
    for each in (one, other):
        for rows in (np.arange(8), np.arange(8, 16)):
            each.train_step(rows, IMAGES[rows])
    states = (
        [each.clip.state_dict(), *each.weights(), each.objective.state_dict(), each.state()["neighbours"]]
        for each in (one, other)
    )
    for mine, theirs in zip(*states, strict=True):
        assert_equal(dict(theirs), dict(mine), 0)


def test_the_average_of_lora_is_that_of_its_factors_and_fits_a_plain_model():
    one = learner_for("joint", "all, lora")
    train(one, steps=4)
    raw, average = one.weights()
    plain = load_initial_model(one.experiment.model, 0).double()
    plain.load_state_dict({**raw, **average})
    with one.average.applied():
        expected = one.clip.encode_image(torch.ones(1, 3, 64, 64, dtype=torch.float64))
    torch.testing.assert_close(plain.encode_image(torch.ones(1, 3, 64, 64, dtype=torch.float64)), expected)
    assert average.keys() < raw.keys() and "visual.conv1.weight" not in average


def test_heads_learn_first_and_alone():
    """In the first of ten steps the classifier, and what follows the last block; then all."""
    one = learner_of("joint", **TERMS["all"], **{"optimizer.head_first": 0.3})
    before = {name: tensor.clone() for name, tensor in one.clip.state_dict().items()}
    pooler = {name for name in before if name.startswith("visual.attn_pool.")}
    head = {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj", *pooler}
    heads_before = {name: p.detach().clone() for name, p in one.objective.named_parameters()}
    for steps, rest in ((3, False), (1, True)):
        plan = PKSampler(INDEX.item, P, K)
        for step in range(one.step, one.step + steps):
            one.train_step(plan.batch(step), IMAGES[plan.batch(step)])
        moved = {name for name, tensor in one.clip.state_dict().items() if not torch.equal(tensor, before[name])}
        assert (moved > head) if rest else (moved == head)
        assert {n for n, p in one.objective.named_parameters() if not torch.equal(p, heads_before[n])} == {
            n for n, p in one.objective.named_parameters() if p.requires_grad
        }


def test_arcface_begins_at_the_mean_embedding_of_each_item():
    one = learner_of(**TERMS["arcface"], **{"loss.arcface_start": "mean"})
    plan, seen = PKSampler(INDEX.item, P, K), []
    batches = [(step, plan.batch(step), IMAGES[plan.batch(step)]) for step in range(one.steps_before)]
    before = one.objective.heads["arcface"].classifier.detach().clone()
    one.begin(iter(batches))
    start = (one.objective.heads["arcface"].classifier - before).unflatten(0, (ITEMS, 2)).detach()
    for item in range(ITEMS):
        rows = np.concatenate([rows[INDEX.item[rows] == item] for _, rows, _ in batches])
        mean = embed_images(one.towers, IMAGES[rows], one.precision).mean(0)
        torch.testing.assert_close(start[item].float(), F.normalize(mean, dim=0).expand(2, -1), atol=1e-5, rtol=0)
        seen.extend(rows)
    assert len(seen) >= ITEMS * K and not learner_of(**TERMS["arcface"]).steps_before


def test_a_report_tells_what_is_trained():
    one = learner_of("image", **TERMS["supcon"], **{"model.lora_rank": 4})
    total = sum(p.numel() for p in load_initial_model(one.experiment.model, 0).parameters())
    tally_ = StepTally()
    tally_.add(8, 0.0, one.train_step(np.arange(8), IMAGES[:8]))
    report = one.report(tally_, validation(), start_val_mAP=0.0)
    blocks = 4 * sum((3 * 160 + 160) + 2 * 160 + 2 * (160 + 640) for _ in range(2))
    trained = blocks + 4 * (2 * (256 + 256) + 2 * (256 + 160) + 256 + 256)  # the pooler, and the projection
    assert (report["trained_parameters"], report["parameters"]) == (trained, total)
