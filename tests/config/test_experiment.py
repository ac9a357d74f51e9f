"""Settings: strict, typed, named; presets and files that round-trip."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfh import UserError
from clipfh.config import presets, schema
from clipfh.config.experiment import LOSS_TERMS, SMALL_MODEL, Budget, Experiment, LossSettings, Placement

STAGES_AND_PRESETS = [(stage, preset) for preset, stages in presets.PRESETS.items() for stage in stages]


@pytest.mark.parametrize("stage,preset", STAGES_AND_PRESETS)
def test_every_preset_resolves_and_survives_its_file(stage, preset, tmp_path):
    experiment = presets.resolve(stage, preset)
    (tmp_path / "experiment.json").write_text(schema.to_json(experiment))
    assert schema.load_experiment(tmp_path / "experiment.json") == experiment


def test_every_setting_is_documented():
    assert [name for name, _, _, doc in schema.fields() if not doc and name != "stage"] == []


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"loss.tripet": 1.0}, "unknown setting loss.tripet, did you mean loss.triplet?"),
        ({"lr": 1.0}, "unknown setting lr, did you mean optimizer.lr?"),
        ({"optimizer.lr": "1e-5"}, "optimizer.lr must be a number, not '1e-5' (in YAML write 1.0e-5, not 1e-5)"),
        ({"batch.items": 1.5}, "batch.items must be a whole number, not 1.5"),
        ({"batch.items": True}, "batch.items must be a whole number, not True"),
        ({"augment.flip": 1}, "augment.flip must be true or false, not 1"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr must be a finite number, not nan"),
        ({"text.strategy": "neat"}, "text.strategy must be one of raw, clean, structured, not 'neat'"),
        ({"optimizer.lr": -1.0}, "--optimizer.lr must be above 0, not -1.0"),
        ({"batch.views": 1}, "--batch.views 1 leaves loss.supcon without positives: take 2 or more views"),
        (
            {"batch.views": 1, "loss.supcon": 0.0, "loss.ce": 1.0, "optimizer.whitening": 0.2},
            "--optimizer.whitening 0.2",
        ),
        ({"loss.supcon": 0.0}, "at least one term above 0"),
        ({"loss.supcon": 0.0, "loss.ce": 1.0, "batch.memory": 9}, "--batch.memory 9: no term that is on compares"),
        ({"loss.supcon": 0.0, "loss.smooth_ap": 1.0, "batch.memory": 9}, "--batch.memory 9: no term that is on"),
        ({"loss.arcface": 1.0, "loss.arcface_margin": 2.0}, "--loss.arcface_margin must be from 0 to 1.57 radians"),
        ({"loss.supcon_curvature": 1e-9}, "--loss.supcon_curvature must be 0, or from 0.001 to 1, not 1e-09"),
        ({"budget.images": 5, "budget.epochs": 1.0}, "give --budget.images or --budget.epochs, not both"),
    ],
)
def test_a_bad_setting_is_one_clear_line(settings, message):
    with pytest.raises(UserError) as error:
        presets.resolve("image", None, settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_stage_preset_and_a_preset_of_the_other_stage():
    for stage, preset, message in [
        ("text", None, "stage must be one of"),
        ("image", "best", "unknown preset 'best': the presets are recommended"),
        (
            "image",
            "joint-v2",
            "preset joint-v2 is not for the image stage: its presets are recommended, siglip, convnext, scratch, image",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            presets.resolve(stage, preset)


def test_small_model_takes_scratch_unless_a_preset_is_named():
    small = {"model.name": SMALL_MODEL}
    assert presets.resolve("image", None, small) == presets.resolve("image", "scratch", small)
    assert presets.resolve("image", "recommended", small).optimizer.lr == 1e-5


def test_epochs_and_images_replace_each_other():
    assert presets.resolve("image", None, {"budget.epochs": 2.0}).budget.images == 0
    assert presets.resolve("joint", "joint-v4", {"budget.images": 9}).budget == Budget(images=9)


def test_loss_shorthand():
    usual = {f"loss.{term}": 0.0 for term in LOSS_TERMS} | {"loss.triplet": 1.0, "loss.center": 5e-4}
    assert presets.loss_terms("triplet+center") == usual
    with pytest.raises(UserError, match="unknown loss 'tripet'"):
        presets.loss_terms("tripet+center")


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("budget.images", "2e6", 2_000_000),
        ("optimizer.lr", "1e-5", 1e-5),
        ("augment.flip", "off", False),
        ("seed", "3", 3),
    ],
)
def test_command_line_texts(name, text, value):
    assert schema.parse(name, text) == value and type(schema.parse(name, text)) is type(value)


def test_placement_texts():
    assert schema.parse("gpus_per_worker", "auto", Placement) == "auto"
    assert schema.parse("gpus_per_worker", ".5", Placement) == 0.5
    with pytest.raises(UserError, match="gpus-per-worker must be 0 or 1 with several workers"):
        Placement(workers=2, gpus_per_worker=0.5)


@pytest.mark.parametrize("gpus", [4.0, 1.5, -1.0])
def test_a_worker_takes_no_more_than_the_gpu_it_computes_on(gpus):
    with pytest.raises(UserError, match=f"gpus-per-worker must be 0 to 1 .*--workers N.*, not {gpus}"):
        Placement(gpus_per_worker=gpus)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow])  # on a busy machine
@given(
    st.dictionaries(
        st.sampled_from(["optimizer.lr", "batch.items", "budget.images"]), st.integers(2, 10**6), max_size=3
    )
)
def test_replace_changes_what_is_named_and_nothing_else(settings):
    before = schema.flatten(Experiment())
    after = schema.flatten(schema.replace(Experiment(), settings))
    assert after == {**before, **settings}


def test_a_file_of_another_version_is_refused(tmp_path):
    tree = dataclasses.asdict(Experiment())
    tree["loss"]["focal"] = 1.0
    with pytest.raises(UserError, match=r"unknown setting loss.focal; it is from another version"):
        schema.from_json(json.dumps(tree))
    with pytest.raises(UserError, match="not an experiment of this version"):
        schema.from_json("{}")


def test_a_single_view_will_do_where_captions_are_the_positives():
    settings = {"batch.views": 1, "loss.supcon": 1.0}
    with pytest.raises(UserError, match="leaves loss.supcon without positives"):
        presets.resolve("joint", None, settings)
    assert presets.resolve("joint", None, {**settings, "loss.supcon_captions": True}).batch.views == 1


@pytest.mark.parametrize("given", [0.005, 1.5])
def test_a_temperature_that_the_logit_scale_does_not_reach_is_refused(given):
    with pytest.raises(UserError, match=r"loss.infonce_temperature must be 0, or from 0.01 to 1, not"):
        LossSettings(infonce=1.0, infonce_temperature=given)
    assert LossSettings(infonce=1.0, infonce_temperature=1.0)


@pytest.mark.parametrize(
    "model,preset",
    [
        ("ViT-B/16", "recommended"),
        ("clipfh-small", "scratch"),
        ("ViT-B-16-SigLIP2", "siglip"),
        ("hf-hub:Marqo/marqo-fashionSigLIP", "siglip"),
        ("convnext_base_w", "convnext"),
        ("local-dir:/siglip/convnext/export", "recommended"),
        ("local-dir:/data/my-SigLIP", "siglip"),
    ],
)
def test_a_family_has_its_own_usual_preset(model, preset):
    settings = {"model.name": model}
    for stage in ("image", "joint"):
        assert presets.resolve(stage, None, settings) == presets.resolve(stage, preset, settings)
