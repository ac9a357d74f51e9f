"""Weights that the small model starts from."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from clipfh.config.experiment import SMALL_MODEL, ModelSettings
from clipfh.model import architecture, initial
from clipfh.model.clip import build, load_initial_model
from clipfh.model.initial import OFFSETS, PATCH_GAIN, VALUE_GAIN, cosine_filters, lowest_frequencies


def small_visual():
    return load_initial_model(ModelSettings(SMALL_MODEL), 0).visual


def test_the_start_is_the_same_for_any_number_of_threads():
    before, starts = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        starts.append(small_visual().state_dict())
    torch.set_num_threads(before)
    assert all(torch.equal(start[name], weight) for name, weight in starts[0].items() for start in starts)


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


def test_the_small_model_begins_with_attention_to_what_is_alike_at_each_heads_offset():
    visual = small_visual()
    assert_close(visual.conv1.weight, PATCH_GAIN * torch.cat([cosine_filters(88, 8), torch.zeros(72, 3, 8, 8)]))
    places = visual.positional_embedding[1:].detach().view(12, 12, 160)
    assert not places[:, :, :96].any()
    for block in visual.transformer.resblocks:
        query, key, _ = (part.detach() for part in block.attn.in_proj_weight.chunk(3))
        assert_close(key.T @ key, torch.eye(160), atol=1e-5, rtol=0)
        heads = zip(query.split(32), key.split(32), OFFSETS, strict=True)
        for query_of_head, key_of_head, (right, down) in heads:
            there = places[3 + down, 4 + right]
            assert_close(query_of_head @ places[3, 4], key_of_head @ there, atol=1e-4, rtol=0)


def test_attention_takes_from_patterns_and_leaves_mean_colors_energies_and_positions_as_they_are():
    takes = torch.zeros(160)
    takes[:88] = VALUE_GAIN
    takes[[k for k, (_, down, right) in enumerate(lowest_frequencies(88, 8).tolist()) if down == right == 0]] = 0.0
    assert (takes[:88] == 0).sum() == 3
    for block in small_visual().transformer.resblocks:
        value = block.attn.in_proj_weight.detach().chunk(3)[2]
        assert_close(block.attn.out_proj.weight.detach() @ value, -takes.diag(), atol=1e-5, rtol=0)


def test_the_first_block_adds_up_the_absolute_values_of_a_patchs_patterns_by_direction():
    mlp = small_visual().transformer.resblocks[0].mlp
    pairs = [k for k, (color, *waves) in enumerate(lowest_frequencies(88, 8).tolist()) if color == 0 and any(waves)]
    with torch.no_grad():
        mlp.c_proj.weight[:, 2 * len(pairs) :] = 0.0  # the other hidden units are random
        token = 2 * torch.randn(50, 160)
        energies = (mlp(token) - mlp.c_proj.bias)[:, 88:96]
    expected = torch.zeros(50, 8)
    for k in pairs:
        _, down, right = lowest_frequencies(88, 8)[k].tolist()
        angle = math.degrees(math.atan2(down, right))
        steps = [0, 45, 90] if down + right <= 3 else [0, 22.5, 45, 67.5, 90]
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - angle))
        expected[:, nearest + (0 if down + right <= 3 else 3)] += token[:, k].abs()
    assert_close(energies, expected, atol=0.3, rtol=0.02)


def test_each_head_of_the_pooler_looks_at_its_place_of_a_grid():
    visual = small_visual()
    pool, places = visual.attn_pool, visual.positional_embedding[1:].detach()
    query = pool.ln_q(pool.query) @ pool.attn.q_proj_weight.T
    logits = torch.einsum("hd,hdw,nw->hn", query.view(16, 16), pool.attn.k_proj_weight.view(16, 16, 160), places)
    for head, place in enumerate(logits.argmax(1).tolist()):
        row, column = divmod(head, 4)
        assert (place // 12, place % 12) == (3 * row + 1, 3 * column + 1)


def test_each_head_of_the_pooler_reads_the_lowest_frequencies_and_the_energies():
    token = torch.randn(160)
    expected = torch.cat([token[:8], token[88:96]]).repeat(16)
    assert_close(small_visual().attn_pool.attn.v_proj_weight.detach() @ token, expected)


def test_other_sizes_of_images_have_their_own_grid():
    visual = load_initial_model(ModelSettings(SMALL_MODEL, image_size=64), 0).visual
    assert visual.positional_embedding.shape == (65, 160)
    assert_close(visual.positional_embedding[1:9], small_visual().positional_embedding[1:9])


@pytest.mark.parametrize(
    "changed",
    [
        {"pos_embed_type": "learnable"},
        {"block_type": "custom", "qk_norm": True},
        {"attn_pooler_heads": 8},
        {"attn_pooler_heads": 64},
        {"attn_pooler_queries": 4},
        {"attentional_pool": False},
        {"width": 256, "head_width": 64},
    ],
)
def test_other_towers_stay_as_open_clip_makes_them(changed: dict):
    small = architecture.find(ModelSettings(SMALL_MODEL))
    vision = {**small.model_cfg["vision_cfg"], **changed}
    clip = build(replace(small, model_cfg={**small.model_cfg, "vision_cfg": vision}))
    before = {name: weight.clone() for name, weight in clip.state_dict().items()}
    initial.initialise(clip)
    assert_close(clip.state_dict(), before, rtol=0, atol=0)


def test_a_tower_with_a_name_of_open_clips_stays_random():
    clip = load_initial_model(ModelSettings("ViT-B/32", pretrained="none"), 3)
    query, key, _ = clip.visual.transformer.resblocks[0].attn.in_proj_weight.chunk(3)
    assert not torch.equal(query, key)
