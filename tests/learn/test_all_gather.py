"""Real processes: what W workers compute from slices equals what one computes from the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from clipfh.data.sampler import worker_slice
from clipfh.learn import losses, pairs, proxies
from clipfh.learn.all_gather import all_gather_with_gradient

P, K, D = 8, 2, 5
ITEM_B = torch.arange(P).repeat_interleave(K)
CAPTION_B = ITEM_B // 2  # items share captions, so that captions meet across workers
NUM_ITEMS = P + 3
TERMS = {
    "supcon": lambda out: losses.supcon(out["image"], ITEM_B, 0.1),
    "joint": lambda out: losses.supcon_with_captions(out["image"], ITEM_B, out["caption"], CAPTION_B, 0.1),
    "infonce": lambda out: losses.infonce(out["image"], ITEM_B, out["caption"], CAPTION_B, out["logit_scale"]),
    "sigmoid": lambda out: losses.sigmoid(
        out["image"], ITEM_B, out["caption"], CAPTION_B, out["logit_scale"], out["logit_bias"]
    ),
    "triplet": lambda out: pairs.triplet(out["image"], ITEM_B, 0.3),
    "soft triplet": lambda out: pairs.triplet(out["image"], ITEM_B, None),
    "multi-similarity": lambda out: pairs.multi_similarity(out["image"], ITEM_B, 2.0, 50.0, 0.5, 0.1),
    "smooth AP": lambda out: pairs.smooth_ap(out["image"], ITEM_B, K, 0.05),
    "arcface": lambda out: proxies.arcface(out["cosine"], ITEM_B, 32.0, 0.3),
    "proxy-anchor": lambda out: proxies.proxy_anchor(out["cosine"], ITEM_B, 32.0, 0.1),
    "center": lambda out: proxies.center(out["feature"], ITEM_B, out["centers"]),
    "cross entropy": lambda out: proxies.cross_entropy(out["cosine"], ITEM_B, 32.0, 0.25, 0.1),
}


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, D))
        self.text = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, D))

    def forward(self, image, text):
        return self.visual(image), self.text(text)


class Heads(nn.Module):
    """What follows the gather: batch norm over the global batch, classifier, logit scale, centers."""

    def __init__(self):
        super().__init__()
        self.neck = nn.BatchNorm1d(D)
        self.classifier = nn.Linear(D, NUM_ITEMS, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("centers", torch.randn(NUM_ITEMS, D))

    def forward(self, feature_BD, text_PD):
        first_C = torch.arange(0, P, 2)  # the row of each caption's first item: identical captions count once
        return {
            "feature": feature_BD,
            "image": F.normalize(feature_BD, dim=1),
            "caption": F.normalize(text_PD[first_C], dim=1),
            "logit_scale": self.log_scale.exp(),
            "logit_bias": self.logit_bias,
            "centers": self.centers,
            "cosine": F.normalize(self.neck(feature_BD), dim=1) @ F.normalize(self.classifier.weight, dim=1).T,
        }


def gradients(towers, heads, image, text):
    """Loss and gradients of each term, by name; `towers` may be wrapped."""
    found = {}
    for name, term in TERMS.items():
        towers.zero_grad()
        heads.zero_grad()
        features = map(all_gather_with_gradient, towers(image, text), (P * K, P))
        loss = term(heads(*features))
        loss.backward()
        parameters = [*towers.parameters(), *heads.parameters()]
        found[name] = [loss.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    return found


def worker(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    towers, heads, image, text = Towers(), Heads(), torch.randn(P * K, 7), torch.randn(P, 4)
    alone = gradients(towers, heads, image, text)

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    wrapped = nn.parallel.DistributedDataParallel(towers, find_unused_parameters=True)
    own_image, own_text = (rows[worker_slice(len(rows), rank, world_size)] for rows in (image, text))
    together = gradients(wrapped, heads, own_image, own_text)
    for name in TERMS:
        assert alone[name][1].abs().max() > 1e-3, f"{name}: nothing to compare"
        for got, wanted in zip(together[name], alone[name], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")

    for dtype in (torch.int64, torch.int32, torch.float32, torch.bfloat16):
        for total in (2 * world_size, 2 * world_size + 1, world_size - 1):
            rows = torch.arange(3 * total).reshape(-1, 3).to(dtype)
            own = rows[worker_slice(total, rank, world_size)]
            assert torch.equal(all_gather_with_gradient(own, total), rows), (dtype, total)
    by_columns = torch.arange(6.0).reshape(3, 2).T + 6 * rank  # not contiguous
    assert torch.equal(all_gather_with_gradient(by_columns, 2 * world_size)[2 * rank : 2 * rank + 2], by_columns)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_give_what_one_worker_gives_with_the_whole_batch(world_size: int, tmp_path: Path):
    mp.get_context("forkserver").set_forkserver_preload(["torch"])  # imported once, not by every process
    mp.start_processes(worker, (world_size, str(tmp_path / "store")), nprocs=world_size, start_method="forkserver")


def test_a_process_alone_keeps_its_rows(tmp_path: Path):
    rows = torch.randn(3, 2, requires_grad=True)
    assert all_gather_with_gradient(rows, 3) is rows
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert all_gather_with_gradient(rows, 3) is rows
    finally:
        dist.destroy_process_group()
