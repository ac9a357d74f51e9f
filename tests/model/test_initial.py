"""Weights that the small model starts from."""

import torch
from torch.testing import assert_close

from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model.clip import load_initial_model
from clipfh.model.initial import PATCH_GAIN, VALUE_GAIN, cosine_filters


def test_filters_of_patches_are_at_right_angles_and_the_first_is_the_mean_brightness():
    filters = cosine_filters(160, 8)
    assert filters.shape == (160, 3, 8, 8)
    assert_close(filters.flatten(1) @ filters.flatten(1).T, torch.eye(160), atol=1e-5, rtol=0)
    assert_close(filters[0], torch.full((3, 8, 8), 192**-0.5))


def test_more_filters_than_a_patch_has_frequencies_are_random():
    filters = cosine_filters(50, 4)
    assert filters.shape == (50, 3, 4, 4)
    assert_close(filters[:48].flatten(1) @ filters[:48].flatten(1).T, torch.eye(48), atol=1e-5, rtol=0)
    assert filters[48:].flatten(1).norm(dim=1).mean() > 0.5


def test_the_small_model_begins_with_attention_to_what_is_alike():
    visual = load_initial_model(ModelSettings(SMALL_MODEL), 0).visual
    assert_close(visual.conv1.weight, PATCH_GAIN * cosine_filters(160, 8))
    for block in visual.transformer.resblocks:
        query, key, value = block.attn.in_proj_weight.detach().chunk(3)
        assert_close(query.T @ key, torch.eye(160), atol=1e-5, rtol=0)
        assert_close(block.attn.out_proj.weight.detach() @ value, -VALUE_GAIN * torch.eye(160), atol=1e-5, rtol=0)


def test_other_towers_begin_as_open_clip_makes_them():
    settings = ModelSettings("ViT-B/32", pretrained="none")
    clip = load_initial_model(settings, 3)
    query, key, _ = clip.visual.transformer.resblocks[0].attn.in_proj_weight.chunk(3)
    assert not torch.equal(query, key)
