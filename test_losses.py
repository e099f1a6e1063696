"""What the losses, the k-means and the files promise, checked against loops one can read.

Each loss meets four kinds of test. An oracle: a `slow_` function beside it, explicit loops over the paper's
symbols in plain Python numbers. Values by hand: a few unit vectors whose angles one can draw. Properties: what
must hold for any numbers. Golden numbers: the authors' released code, run once on the CPU in double precision
(tests/golden/*.npz). The code under test is always imported, never written down a second time.

    pytest test_losses.py          or, without pytest,          python test_losses.py
"""

import ast
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch.testing import assert_close

import common
import csml
import hcsc
import hirl_moco
import hirl_simclr
import hirl_swav

HERE = Path(__file__).resolve().parent

# All sizes differ, so that a transposed or swapped dimension cannot go unnoticed.
B, L, D, M, N, Q = 5, 3, 7, 9, 23, 13  # batch, levels, embedding, negative paths, images, queue
K = (11, 6, 4)  # clusters a level, level 0 the finest
EXACT = dict(rtol=1e-9, atol=1e-9)  # float64 against the golden numbers and the loops
SINGLE = dict(rtol=1e-5, atol=1e-6)  # float32 against the same


def unit(*shape, seed=0, dtype=torch.float64):
    """Random unit rows."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def on_circle(*degrees):
    """Unit vectors of the plane at these angles: a dot product is the cosine of the difference."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def random_tree(sizes=K, dim=D, images=N, seed=0):
    """A Hierarchy of random prototypes, parents and concentrations (these play no part in HIRL)."""
    generator = torch.Generator().manual_seed(seed)
    parent = [torch.randint(up, (k,), generator=generator) for k, up in zip(sizes, sizes[1:])]
    assign = [torch.randint(sizes[0], (images,), generator=generator)]
    for up in parent:
        assign.append(up[assign[-1]])
    prototypes = [unit(k, dim, seed=seed + 10 + level) for level, k in enumerate(sizes)]
    phi = [torch.rand(k, generator=generator, dtype=torch.float64) * 0.4 + 0.1 for k in sizes]
    return common.Hierarchy(prototypes, assign, parent, phi)


def golden(name):
    """The arrays of one golden file; a bare number becomes a Python float or int."""
    arrays = np.load(HERE / "tests" / "golden" / f"{name}.npz")
    return {key: arrays[key].item() if arrays[key].ndim == 0 else torch.from_numpy(arrays[key])
            for key in arrays.files}


# ---- InfoNCE


def slow_info_nce(q, k, queue, tau):
    """mean over n of -log( exp(q_n.k_n/tau) / (exp(q_n.k_n/tau) + sum_j exp(q_n.u_j/tau)) )."""
    total = 0.0
    for q_n, k_n in zip(q.tolist(), k.tolist()):
        positive = math.exp(sum(a * b for a, b in zip(q_n, k_n)) / tau)
        negatives = sum(math.exp(sum(a * b for a, b in zip(q_n, u_j)) / tau) for u_j in queue.tolist())
        total += -math.log(positive / (positive + negatives))
    return total / len(q)


def check_info_nce(info_nce):
    q, k, queue = unit(B, D, seed=1), unit(B, D, seed=2), unit(Q, D, seed=3)
    for tau in (0.07, 0.2, 1.0):
        assert_close(info_nce(q, k, queue, tau).item(), slow_info_nce(q, k, queue, tau), **EXACT)
    single = info_nce(q.float(), k.float(), queue.float(), 0.2)
    assert single.dtype == torch.float32 and single.shape == ()
    assert_close(single.item(), slow_info_nce(q, k, queue, 0.2), **SINGLE)


def test_info_nce_equals_the_loops():  # MoCo Eq. 1
    check_info_nce(hirl_moco.info_nce)


def test_info_nce_by_hand():
    """The query at 0 degrees, its key at 60, two negatives at 90 and 180, temperature 1/2.

    Cosines 1/2, 0, -1; logits 1, 0, -2; loss = log(e^1 + e^0 + e^-2) - 1 = log(1 + e^-1 + e^-3).
    """
    loss = hirl_moco.info_nce(on_circle(0), on_circle(60), on_circle(90, 180), temperature=0.5)
    assert_close(loss.item(), math.log(1 + math.exp(-1) + math.exp(-3)))


def test_info_nce_of_equal_logits_is_log_of_one_plus_queue():
    """A network that tells nothing apart scores ln(1+Q): the chance level that a run prints."""
    same = unit(1, D)
    loss = hirl_moco.info_nce(unit(B, D, seed=1), same.expand(B, D), same.expand(Q, D), temperature=0.2)
    assert_close(loss.item(), math.log(1 + Q))


def test_info_nce_does_not_care_for_the_order_of_batch_or_queue():
    q, k, queue = unit(B, D, seed=1), unit(B, D, seed=2), unit(Q, D, seed=3)
    loss = hirl_moco.info_nce(q, k, queue, 0.2)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert_close(hirl_moco.info_nce(q[order], k[order], queue, 0.2), loss)
    assert_close(hirl_moco.info_nce(q, k, queue.flip(0), 0.2), loss)
    assert not torch.isclose(hirl_moco.info_nce(q[order], k, queue, 0.2), loss)  # pairs must stay together


def test_info_nce_gradient_reaches_the_query_alone():
    q, k, queue = (unit(n, D, seed=n).requires_grad_() for n in (B, B, Q))
    hirl_moco.info_nce(q, k, queue, 0.2).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None
    assert torch.autograd.gradcheck(lambda x: hirl_moco.info_nce(x, k.detach(), queue.detach(), 0.2), q)


def test_info_nce_survives_extreme_logits():
    """At temperature 0.001 exp(q.k/T) overflows float32 by far; the loss must not."""
    q = unit(B, D, dtype=torch.float32)
    assert_close(hirl_moco.info_nce(q, q, -q, 1e-3).item(), 0.0)
    assert_close(hirl_moco.info_nce(q, -q, q[:1], 1e-3).isfinite().item(), True)


# ---- MoCo: the slow encoder and the queue


def slow_enqueue(queue, start, keys):
    """One key after the other takes the oldest place."""
    queue, place = queue.clone(), start
    for key in keys:
        queue[place] = key
        place = (place + 1) % len(queue)
    return queue, place


def test_queue_takes_any_number_of_keys():
    """Fewer than fit, wrapping around the end, not dividing the queue, exactly the queue, more than twice it."""
    model = hirl_moco.MoCo(nn.Linear(2, D), D, Q)
    assert_close(model.queue.norm(dim=1), torch.ones(Q))  # random unit rows to begin with
    expected, place = model.queue.clone(), 0
    for step, count in enumerate((4, 4, 4, 4, 1, Q, Q + 1, 2 * Q + 3, 5, 0)):
        keys = unit(count, D, seed=step, dtype=torch.float32)
        expected, place = slow_enqueue(expected, place, keys)
        model.enqueue(keys)
        assert model.queue_ptr.item() == place, f"after {count} keys"
        assert torch.equal(model.queue, expected), f"after {count} keys"


def test_queue_holds_the_newest_keys_and_no_graph():
    model = hirl_moco.MoCo(nn.Linear(2, D), D, 4)
    for start in range(0, 9, 3):
        model.enqueue(torch.arange(start, start + 3.0)[:, None].expand(3, D).requires_grad_())
    assert sorted(model.queue[:, 0].tolist()) == [5, 6, 7, 8] and not model.queue.requires_grad


def test_momentum_update_moves_parameters_only():
    """m = 3/4: 4 <- 3/4 * 4 + 1/4 * 0 = 3. Batch-norm statistics are the key encoder's own."""
    model = hirl_moco.MoCo(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), D, Q)
    for p_q, p_k in zip(model.encoder_q.parameters(), model.encoder_k.parameters()):
        nn.init.zeros_(p_q), nn.init.constant_(p_k, 4.0)
    model.encoder_q[1].running_mean.fill_(9.0)
    model.update_key_encoder(0.75)
    assert all((p == 3).all() and not p.requires_grad for p in model.encoder_k.parameters())
    assert all((p == 0).all() and p.requires_grad for p in model.encoder_q.parameters())
    assert (model.encoder_k[1].running_mean == 0).all()


class FixtureEncoder(nn.Module):
    """The two-layer network of the golden MoCo run, under its names."""

    def __init__(self, inputs, hidden, dim):
        super().__init__()
        self.fc1, self.fc = nn.Linear(inputs, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc(self.fc1(x).relu())


def golden_moco(dtype, tolerance):
    """Five steps of the official MoCo: logits, loss, gradients, both encoders, queue and pointer."""
    g = golden("moco")
    steps, batch, inputs = g["x_q"].shape
    queue_size, dim = g["queue_init_kd"].shape
    model = hirl_moco.MoCo(FixtureEncoder(inputs, 8, dim), dim, queue_size).to(dtype)
    model.queue.copy_(g["queue_init_kd"])
    model.encoder_q.load_state_dict({n: g[f"q_init.{n}"] for n, _ in model.encoder_q.named_parameters()})
    model.encoder_k.load_state_dict({n: g[f"k_init.{n}"] for n, _ in model.encoder_k.named_parameters()})
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), g["lr"], momentum=g["momentum"],
                                weight_decay=g["weight_decay"])
    for t in range(steps):
        q = F.normalize(model.encoder_q(g["x_q"][t].to(dtype)), dim=1)
        model.update_key_encoder(g["m"])
        with torch.no_grad():
            k = F.normalize(model.encoder_k(g["x_k"][t].to(dtype)), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ model.queue.T], dim=1) / g["T"]
        loss = hirl_moco.info_nce(q, k, model.queue, g["T"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(k)
        found = {"logits": logits.detach(), "loss": loss.detach(), "keys": k, "queue_dk": model.queue.T,
                 "queue_ptr": model.queue_ptr}
        for name, p in model.encoder_q.named_parameters():
            found |= {f"grad_q.{name}": p.grad, f"q_after.{name}": p.detach()}
        for name, p in model.encoder_k.named_parameters():
            found[f"k_after.{name}"] = p
        for name, value in found.items():
            assert_close(value.to(g[name].dtype), g[name][t], **tolerance, msg=lambda m: f"{name}, step {t}: {m}")


def test_moco_golden():
    golden_moco(torch.float64, EXACT)


def test_moco_golden_in_single_precision():
    golden_moco(torch.float32, dict(rtol=1e-4, atol=2e-5))


# ---- HIRL: the semantic path loss


def slow_path_score(z_n, prototypes, path):
    """S(path) = prod_l (1 + z^l . c^l(path)) / 2."""
    score = 1.0
    for level, cluster in enumerate(path):
        cosine = sum(a * b for a, b in zip(z_n[level].tolist(), prototypes[level][cluster].tolist()))
        score *= (1 + cosine) / 2
    return score


def slow_path(leaf, parent):
    """The clusters from a leaf to the root, finest first."""
    path = [int(leaf)]
    for up in parent:
        path.append(int(up[path[-1]]))
    return path


def slow_semantic_path_loss(z, hierarchy, index, negative_leaves, eps=1e-6):
    """Mean over n of 1/2 [ -log(S(own) + eps) + sum_m w_m (-log(1 - S(m) + eps)) / (sum_m w_m + eps) ]."""
    total = 0.0
    for n in range(len(z)):
        own = [int(assign[index[n]]) for assign in hierarchy.assign]
        positive = -math.log(slow_path_score(z[n], hierarchy.prototypes, own) + eps)
        weight = negative = 0.0
        for leaf in negative_leaves[n]:
            path = slow_path(leaf, hierarchy.parent)
            if path == own:
                continue  # not a negative: w = 0
            weight += 1
            negative += -math.log(1 - slow_path_score(z[n], hierarchy.prototypes, path) + eps)
        total += (positive + negative / (weight + eps)) / 2
    return total / len(z)


def path_batch(sizes=K, negatives=M, batch=B, seed=0):
    """(z, hierarchy, index, negative_leaves) with random entries; some leaves drawn are the images' own."""
    hierarchy = random_tree(sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    index = torch.randint(N, (batch,), generator=generator)
    leaves = torch.randint(sizes[0], (batch, negatives), generator=generator)
    leaves[:2, 0] = hierarchy.assign[0][index[:2]]
    return unit(batch, len(sizes), D, seed=seed + 2), hierarchy, index, leaves


def check_semantic_path_loss(semantic_path_loss):
    for sizes in (K, (8,), (9, 2), (12, 10, 6, 4)):  # one to four levels
        for negatives in (1, M):
            batch = path_batch(sizes, negatives, seed=len(sizes))
            assert_close(semantic_path_loss(*batch).item(), slow_semantic_path_loss(*batch), **EXACT)
    z, *rest = path_batch()
    single = semantic_path_loss(z.float(), *rest)
    assert single.dtype == torch.float32 and single.shape == ()
    assert_close(single.item(), slow_semantic_path_loss(z, *rest), **SINGLE)


def test_path_loss_equals_the_loops():  # HIRL, path score and loss
    check_semantic_path_loss(common.semantic_path_loss)


def test_path_loss_by_hand():
    """Two leaves at 0 and 180 degrees under one root at 0 degrees; the image belongs to leaf 0.

    Level 0: z at 60 degrees, so (1 + cos 60)/2 = 3/4 for leaf 0 and (1 + cos 120)/2 = 1/4 for leaf 1.
    Level 1: z at 90 degrees, so 1/2 for the root. S(own path) = 3/8, S(other path) = 1/8.
    Loss = 1/2 [ -log 3/8 - log(1 - 1/8) ]. The leaf alone would give -log 3/4 for either half.
    """
    hierarchy = common.Hierarchy([on_circle(0, 180), on_circle(0)], [torch.tensor([0]), torch.tensor([0])],
                                 [torch.tensor([0, 0])], [])
    z = torch.stack([on_circle(60), on_circle(90)], dim=1)  # (1, L, D)
    image, other_leaf = torch.tensor([0]), torch.tensor([[1]])
    loss = common.semantic_path_loss(z, hierarchy, image, other_leaf, eps=0.0)
    assert_close(loss.item(), (-math.log(3 / 8) - math.log(7 / 8)) / 2)
    flat = common.Hierarchy(hierarchy.prototypes[:1], hierarchy.assign[:1], [], [])
    assert_close(common.semantic_path_loss(z[:, :1], flat, image, other_leaf, eps=0.0).item(), -math.log(3 / 4))


def test_path_score_lies_between_0_and_1():
    """With no true negative the loss is -log(S + eps) / 2, so S = exp(-2 loss) - eps can be read off."""
    hierarchy = random_tree()

    def score(z, image):
        own = hierarchy.assign[0][image].view(1, 1)
        return math.exp(-2 * common.semantic_path_loss(z, hierarchy, torch.tensor([image]), own).item()) - 1e-6

    for image in range(N):
        path = slow_path(hierarchy.assign[0][image], hierarchy.parent)
        on_path = torch.stack([c[j] for c, j in zip(hierarchy.prototypes, path)])[None]
        z = unit(1, L, D, seed=image)
        assert 0 < score(z, image) < 1
        assert_close(score(z, image), slow_path_score(z[0], hierarchy.prototypes, path), rtol=1e-7, atol=1e-9)
        assert_close([score(on_path, image), score(-on_path, image)], [1.0, 0.0], rtol=0, atol=1e-9)
        one_level_off = on_path.clone()
        one_level_off[:, image % L] *= -1
        assert_close(score(one_level_off, image), 0.0, rtol=0, atol=1e-9)  # a product: one wrong level is enough


def test_path_loss_does_not_care_for_the_order_of_batch_or_negatives():
    z, hierarchy, index, leaves = path_batch()
    loss = common.semantic_path_loss(z, hierarchy, index, leaves)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert_close(common.semantic_path_loss(z[order], hierarchy, index[order], leaves[order]), loss)
    assert_close(common.semantic_path_loss(z, hierarchy, index, leaves.flip(1)), loss)
    singles = [common.semantic_path_loss(z[n:n + 1], hierarchy, index[n:n + 1], leaves[n:n + 1]) for n in range(B)]
    assert_close(torch.stack(singles).mean(), loss)


def test_path_loss_gradient_reaches_the_level_embeddings_alone():
    z, hierarchy, index, leaves = path_batch()
    prototypes = [c.requires_grad_() for c in hierarchy.prototypes]
    assert common.semantic_path_loss(z, hierarchy, index, leaves).requires_grad is False
    z.requires_grad_()
    common.semantic_path_loss(z, hierarchy, index, leaves).backward()
    assert (z.grad.abs().sum(dim=2) > 0).all() and all(c.grad is None for c in prototypes)
    assert torch.autograd.gradcheck(lambda x: common.semantic_path_loss(x, hierarchy, index, leaves), z)


def test_path_loss_pulls_onto_the_own_path():
    """A small step against the gradient raises the own path's score and lowers the loss."""
    z, hierarchy, index, leaves = path_batch()
    z.requires_grad_()
    before = common.semantic_path_loss(z, hierarchy, index, leaves)
    before.backward()
    stepped = F.normalize(z.detach() - 0.1 * z.grad, dim=2)
    assert common.semantic_path_loss(stepped, hierarchy, index, leaves) < before


def test_path_loss_without_true_negatives_is_the_positive_half():
    z, hierarchy, index, _ = path_batch()
    own = hierarchy.assign[0][index, None]  # (B, 1)
    z.requires_grad_()
    loss = common.semantic_path_loss(z, hierarchy, index, own.expand(B, M))
    scores = [slow_path_score(z[n].detach(), hierarchy.prototypes, slow_path(own[n], hierarchy.parent))
              for n in range(B)]
    assert_close(loss.item(), sum(-math.log(s + 1e-6) for s in scores) / B / 2, **EXACT)
    loss.backward()
    assert z.grad.isfinite().all()


def test_path_loss_averages_over_true_negatives_alone():
    """Drawing the own leaf once more changes nothing; drawing all negatives twice changes nothing either."""
    z, hierarchy, index, leaves = path_batch()
    loss = common.semantic_path_loss(z, hierarchy, index, leaves, eps=1e-12)
    own = hierarchy.assign[0][index, None]
    assert_close(common.semantic_path_loss(z, hierarchy, index, torch.cat([leaves, own], 1), eps=1e-12), loss)
    assert_close(common.semantic_path_loss(z, hierarchy, index, torch.cat([leaves, leaves], 1), eps=1e-12), loss)


def test_path_loss_of_a_sibling_leaf_counts_in_full():
    """A path that shares every ancestor but not the leaf is a whole negative."""
    hierarchy = common.Hierarchy([unit(2, D), unit(1, D)], [torch.tensor([0]), torch.tensor([0])],
                                 [torch.tensor([0, 0])], [])
    batch = unit(1, 2, D, seed=5), hierarchy, torch.tensor([0]), torch.tensor([[1]])
    own, sibling = (slow_path_score(batch[0][0], hierarchy.prototypes, [leaf, 0]) for leaf in (0, 1))
    assert_close(common.semantic_path_loss(*batch, eps=0.0).item(), (-math.log(own) - math.log(1 - sibling)) / 2)


def test_path_loss_on_the_path_is_finite_in_single_precision():
    """z.c may exceed 1 by rounding, and 1 - S fall below 0: eps must carry it, in value and gradient.

    The leaf drawn differs from the own one but sits in the same place, so that its score is 1 as well.
    """
    for seed in range(20):
        hierarchy = random_tree((40, 20, 10), dim=128, seed=seed)
        for level, c in enumerate(hierarchy.prototypes):
            c.copy_(F.normalize(c.float(), dim=1))
            c[1::2] = c[::2]  # pairs of equal prototypes
            if level < 2:
                hierarchy.parent[level][1::2] = hierarchy.parent[level][::2]
        path = [hierarchy.assign[0]]
        for up in hierarchy.parent:
            path.append(up[path[-1]])
        hierarchy = hierarchy._replace(prototypes=[c.float() for c in hierarchy.prototypes], assign=path)
        z = torch.stack([c[j] for c, j in zip(hierarchy.prototypes, path)], dim=1).requires_grad_()  # (N, L, D)
        leaves = torch.stack([path[0], path[0] ^ 1], dim=1)  # the own leaf and its double
        loss = common.semantic_path_loss(z, hierarchy, torch.arange(N), leaves)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def fixture_tree(g, parents):
    return common.Hierarchy([g[f"centroids_{level}"] for level in range(3)],
                            [g[f"im2cluster_{level}"] for level in range(3)], parents, [])


def test_path_loss_golden():
    """HIRL's released loss, its terms sample by sample and its gradient, also where the edges are."""
    g = golden("hirl_spd")
    hierarchy = fixture_tree(g, [g["cluster2cluster_0"], g["cluster2cluster_1"]])
    for case in ("", "edge_"):
        paths, index = g[case + "neg_im2cluster"], g["index"]  # (B, M, L), (B,)
        leaves = paths[..., 0]
        for level, up in enumerate(hierarchy.parent):
            assert torch.equal(up[paths[..., level]], paths[..., level + 1])  # they follow the tree
        for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
            raw = g[case + "semantic_embs"].to(dtype).requires_grad_()
            z = F.normalize(raw.view(len(raw), 3, -1), dim=2)  # (B, L, D)
            loss = common.semantic_path_loss(z, hierarchy, index, leaves)
            loss.backward()
            each = torch.stack([common.semantic_path_loss(z[n:n + 1], hierarchy, index[n:n + 1], leaves[n:n + 1])
                                for n in range(len(z))]).detach()
            assert_close(loss.item(), g[case + "loss"], **tolerance)
            assert_close(each.double(), g[case + "loss_per_sample"], **tolerance)
            assert_close(raw.grad.double(), g[case + "grad_semantic_embs"], **tolerance)


def test_level_heads_golden():
    """HIRL's heads: outputs, path loss, gradients of inputs and parameters, and running statistics."""
    g = golden("hirl_head")
    parents = []
    for level in (0, 1):  # the tree, read off the drawn paths and the images'
        up = torch.zeros(len(g[f"centroids_{level}"]), dtype=torch.int64)
        paths = g["neg_im2cluster"]
        up[paths[..., level].flatten()] = paths[..., level + 1].flatten()
        up[g[f"im2cluster_{level}"]] = g[f"im2cluster_{level + 1}"]
        parents.append(up)
    renamed = {"0.weight": "layers.0.weight", "1.weight": "batch_norms.0.weight", "1.bias": "batch_norms.0.bias",
               "3.weight": "layers.1.weight", "3.bias": "layers.1.bias"}
    x = g["inst_emb"].double().requires_grad_()
    heads = [hirl_moco.level_head(x.shape[1]).double() for _ in range(3)]
    for level, head in enumerate(heads):
        assert sorted(n for n, _ in head.named_parameters()) == sorted(renamed)
        with torch.no_grad():
            for name, p in head.named_parameters():
                p.copy_(g[f"param.projections.{level}.{renamed[name]}"])
    z = F.normalize(torch.stack([head(x) for head in heads], dim=1), dim=2)  # (B, L, D)
    path = common.semantic_path_loss(z, fixture_tree(g, parents), g["index"], g["neg_im2cluster"][:, :, 0])
    total = x.square().mean() + path
    total.backward()
    assert_close(z.detach().flatten(1), g["semantic_embs"], **EXACT)
    assert_close([path.item(), total.item()], [g["semantic_loss"], g["loss_total"]], **EXACT)
    assert_close(x.grad, g["grad_inst_emb"], **EXACT)
    for level, head in enumerate(heads):
        for name, p in head.named_parameters():
            assert_close(p.grad, g[f"grad.projections.{level}.{renamed[name]}"], **EXACT)
        for name in ("running_mean", "running_var"):
            assert_close(getattr(head[1], name), g[f"after.projections.{level}.batch_norms.0.{name}"], **EXACT)


# ---- HCSC: selection and the two losses
# Oracles read one image, one negative, one cluster at a time, in plain numbers.


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist()))


def slow_member(x, prototypes, phi, cluster):
    """softmax_i(x . c_i / phi_i)[cluster]."""
    weights = [math.exp(dot(x, c) / p) for c, p in zip(prototypes, phi.tolist())]
    return weights[cluster] / sum(weights)


def slow_instance_selection(queue, tree, index):
    return [torch.tensor([[1 - slow_member(u, tree.prototypes[level], tree.concentration[level].clamp(min=1e-3),
                                           int(tree.assign[level][n])) for u in queue] for n in index],
                         dtype=torch.float64) for level in range(len(tree.prototypes))]


def slow_prototype_selection(tree, index):
    keep = []
    for level, prototypes in enumerate(tree.prototypes):
        table = torch.ones(len(index), len(prototypes), dtype=torch.float64)
        for row, n in enumerate(index):
            own = int(tree.assign[level][n])
            for j, c in enumerate(prototypes):
                if j == own:
                    table[row, j] = 0
                elif level + 1 < len(tree.prototypes):
                    parent = int(tree.parent[level][own])
                    table[row, j] = 1 - slow_member(c, tree.prototypes[level + 1], tree.concentration[level + 1],
                                                    parent)
        keep.append(table)
    return keep


def slow_contrast(positive, negatives, kept, unselected):
    """log(sum exp) - positive over the positive and the negatives; those not kept: nothing, or exp(0)."""
    total = math.exp(positive)
    for negative, keep in zip(negatives, kept):
        total += math.exp(negative) if keep else 1.0 if unselected == "zero" else 0.0
    return math.log(total) - positive


def slow_instance_loss(q, k, queue, masks, temperature, *, unselected="remove"):
    return [sum(slow_contrast(dot(q[n], k[n]) / temperature, [dot(q[n], u) / temperature for u in queue],
                              mask[n].tolist(), unselected) for n in range(len(q))) / len(q) for mask in masks]


def slow_prototype_loss(q, tree, index, masks, *, unselected="remove", exclude="own"):
    losses = []
    for prototypes, assign, phi, mask in zip(tree.prototypes, tree.assign, tree.concentration, masks):
        positives = [int(assign[n]) for n in index]
        total = 0.0
        for row, own in enumerate(positives):
            logits = [dot(q[row], c) / p for c, p in zip(prototypes, phi.tolist())]
            if exclude == "own":
                others = [j for j in range(len(prototypes)) if j != own]
            else:
                others = [j for j in range(int(assign.max())) if j not in positives]
            total += slow_contrast(logits[own], [logits[j] for j in others], [mask[row, j] for j in others],
                                   unselected)
        losses.append(total / len(q))
    return losses


def hcsc_batch(sizes=K, batch=B, seed=0):
    """(q, k, queue, tree, index, instance masks, prototype masks) with random entries."""
    generator = torch.Generator().manual_seed(seed)
    tree, index = random_tree(sizes, seed=seed), torch.randint(N, (batch,), generator=generator)
    instance = [torch.rand(batch, Q, generator=generator) < 0.6 for _ in sizes]
    prototype = [torch.rand(batch, k, generator=generator) < 0.6 for k in sizes]
    return (unit(batch, D, seed=seed + 1), unit(batch, D, seed=seed + 2), unit(Q, D, seed=seed + 3), tree, index,
            instance, prototype)


def check_hcsc_losses(instance_loss, prototype_loss):
    for sizes in (K, (8,), (12, 10, 6, 4)):
        q, k, queue, tree, index, instance, prototype = hcsc_batch(sizes, seed=len(sizes))
        for unselected in ("remove", "zero"):
            how = dict(unselected=unselected)
            assert_close(instance_loss(q, k, queue, instance, 0.2, **how).tolist(),
                         slow_instance_loss(q, k, queue, instance, 0.2, **how), **EXACT)
            for exclude in ("own", "batch"):
                assert_close(prototype_loss(q, tree, index, prototype, exclude=exclude, **how).tolist(),
                             slow_prototype_loss(q, tree, index, prototype, exclude=exclude, **how), **EXACT)
    single = prototype_loss(q.float(), tree, index, prototype)
    assert single.dtype == torch.float32 and single.shape == (4,)
    assert_close(single.tolist(), slow_prototype_loss(q, tree, index, prototype), **SINGLE)
    assert instance_loss(q.float(), k.float(), queue.float(), instance, 0.2).dtype == torch.float32


def test_hcsc_losses_equal_the_loops():  # HCSC, instance-wise and prototypical loss
    check_hcsc_losses(common.hcsc_instance_loss, common.hcsc_prototype_loss)


def test_hcsc_selections_equal_the_loops():  # HCSC, selection of instances and of prototypes
    for sizes in (K, (8,), (12, 10, 6, 4)):
        _, _, queue, tree, index, _, _ = hcsc_batch(sizes, seed=len(sizes))
        tree.concentration[0][2] = 1e-5  # under the floor
        for ours, slow in zip(common.hcsc_instance_selection(queue, tree, index),
                              slow_instance_selection(queue, tree, index), strict=True):
            assert_close(ours, slow, **EXACT)
        tree.concentration[0][2] = 0.3
        for ours, slow in zip(common.hcsc_prototype_selection(tree, index), slow_prototype_selection(tree, index),
                              strict=True):
            assert_close(ours, slow, **EXACT)


def two_clusters():
    """Level 0: clusters at 0, 90, 180 degrees; level 1: one at 0 (parent of the first two), one at 180; phi 1/2."""
    half = torch.full((3,), 0.5, dtype=torch.float64)
    return common.Hierarchy([on_circle(0, 90, 180), on_circle(0, 180)], [torch.tensor([0]), torch.tensor([0])],
                            [torch.tensor([0, 0, 1])], [half, half[:2]])


def test_hcsc_selection_by_hand():
    """An entry at 0 degrees against clusters at 0, 90, 180 with phi 1/2: logits 2, 0, -2, so the image's own
    cluster (at 0) has the share e^2 / (e^2 + 1 + e^-2), and the entry stays with one minus that.

    The prototype at 90 degrees lies between both parents, logits 0 and 0: it stays with chance 1/2. That at 180
    has logits -2 and 2: it stays with 1 - e^-2 / (e^2 + e^-2). At the top all stay.
    """
    tree, image, e2 = two_clusters(), torch.tensor([0]), math.exp(2)
    level_0, level_1 = common.hcsc_instance_selection(on_circle(0), tree, image)
    assert_close(level_0.item(), 1 - e2 / (e2 + 1 + 1 / e2))
    assert_close(level_1.item(), 1 - e2 / (e2 + 1 / e2))
    below, top = common.hcsc_prototype_selection(tree, image)
    assert_close(below.tolist(), [[0.0, 0.5, 1 - (1 / e2) / (e2 + 1 / e2)]])
    assert top.tolist() == [[0.0, 1.0]]


def test_hcsc_losses_by_hand():
    """q and k at 0 degrees, entries at 90 (left out) and 60 (stays), T = 1/2: logits 2 | 0, 1.

    Removed: log(e^2 + e) - 2. Kept at zero: log(e^2 + 1 + e) - 2. Prototypes at 0 (own), 90, 180, phi 1/2, all
    stay: log(e^2 + 1 + e^-2) - 2, one image alone: the released list drops number 2, the last in use or above.
    """
    q, queue = on_circle(0), on_circle(90, 60)
    masks = [torch.tensor([[False, True]])]
    for unselected, rest in (("remove", 0.0), ("zero", 1.0)):
        loss = common.hcsc_instance_loss(q, q, queue, masks, 0.5, unselected=unselected)
        assert_close(loss.tolist(), [math.log(math.exp(2) + rest + math.e) - 2])
    tree = two_clusters()
    tree.assign[0] = torch.tensor([0, 2])
    flat = common.Hierarchy(tree.prototypes[:1], tree.assign[:1], [], tree.concentration[:1])
    everything = [torch.ones(1, 3)]
    for exclude, rest in (("own", 1 + math.exp(-2)), ("batch", 1)):
        loss = common.hcsc_prototype_loss(q, flat, torch.tensor([0]), everything, exclude=exclude)
        assert_close(loss.tolist(), [math.log(math.exp(2) + rest) - 2])


def test_hcsc_keeping_everything_is_info_nce():
    """All masks 1: the instance loss of every level is MoCo's; at equal logits log(1 + Q)."""
    q, k, queue, *_ = hcsc_batch()
    ones = [torch.ones(B, Q)] * L
    for unselected in ("remove", "zero"):
        loss = common.hcsc_instance_loss(q, k, queue, ones, 0.2, unselected=unselected)
        assert_close(loss.tolist(), [hirl_moco.info_nce(q, k, queue, 0.2).item()] * L, **EXACT)
    same_way = unit(1, D).expand(B, D)
    loss = common.hcsc_instance_loss(same_way, same_way, same_way[:1].expand(Q, D), ones, 0.2)
    assert_close(loss.tolist(), [math.log(1 + Q)] * L)


def test_hcsc_losses_do_not_care_for_order():
    q, k, queue, tree, index, instance, prototype = hcsc_batch()
    row, entry = torch.randperm(B), torch.randperm(Q)
    assert_close(common.hcsc_instance_loss(q[row], k[row], queue[entry], [m[row][:, entry] for m in instance], 0.2),
                 common.hcsc_instance_loss(q, k, queue, instance, 0.2))
    assert_close(common.hcsc_prototype_loss(q[row], tree, index[row], [m[row] for m in prototype], exclude="batch"),
                 common.hcsc_prototype_loss(q, tree, index, prototype, exclude="batch"))


def test_hcsc_gradient_reaches_the_query_alone():
    q, k, queue, tree, index, instance, prototype = hcsc_batch()
    for tensor in (q, k, queue, *tree.prototypes, *tree.concentration):
        tensor.requires_grad_()
    keep = common.hcsc_instance_selection(queue, tree, index) + common.hcsc_prototype_selection(tree, index)
    assert not any(chance.requires_grad for chance in keep)
    loss = common.hcsc_instance_loss(q, k, queue, instance, 0.2)
    (loss.sum() + common.hcsc_prototype_loss(q, tree, index, prototype).sum()).backward()
    assert q.grad.norm() > 0
    assert all(tensor.grad is None for tensor in (k, queue, *tree.prototypes, *tree.concentration))
    assert torch.autograd.gradcheck(lambda q: common.hcsc_instance_loss(q, k, queue, instance, 0.2), q)
    assert torch.autograd.gradcheck(lambda q: common.hcsc_prototype_loss(q, tree, index, prototype), q)


def test_hcsc_without_negatives_costs_nothing():
    """Nothing selected: removed leaves the positive alone, loss and gradient 0; kept at zero it is not 0."""
    q, k, queue, tree, index, *_ = hcsc_batch()
    q.requires_grad_()
    loss = common.hcsc_instance_loss(q, k, queue, [torch.zeros(B, Q)], 0.2)
    loss = loss + common.hcsc_prototype_loss(q, tree, index, [torch.zeros(B, k_l) for k_l in K])
    assert_close(loss.tolist(), [0.0] * L, rtol=0, atol=1e-12)
    assert torch.autograd.grad(loss.sum(), q)[0].abs().max() < 1e-12
    assert common.hcsc_instance_loss(q, k, queue, [torch.zeros(B, Q)], 0.2, unselected="zero").item() > 0.1


def test_hcsc_refuses_unknown_readings():
    q, k, queue, tree, index, instance, prototype = hcsc_batch()
    for call in (lambda: common.hcsc_instance_loss(q, k, queue, instance, 0.2, unselected="drop"),
                 lambda: common.hcsc_prototype_loss(q, tree, index, prototype, exclude="all")):
        try:
            call()
        except ValueError as error:
            assert "remove" in str(error)
        else:
            raise AssertionError("accepted")


def golden_tree(g, prefix=""):
    """The tree of a golden file; `prefix` names other temperatures where the file has them."""
    levels = range(sum(key.startswith("centroids_") for key in g))
    phi = [g.get(f"{prefix}density_{level}", g[f"density_{level}"]).double() for level in levels]
    assign = [g[f"im2cluster_{level}"] for level in levels]
    parent = [torch.zeros(len(phi[level]), dtype=torch.long).scatter(0, assign[level], assign[level + 1])
              for level in levels[:-1]]
    return common.Hierarchy([g[f"centroids_{level}"].double() for level in levels], assign, parent, phi)


def gradients(losses, q):
    """One gradient wrt q for each of the losses (L,): (L, B, D)."""
    return torch.stack([torch.autograd.grad(loss, q, retain_graph=True)[0] for loss in losses])


def test_hcsc_instance_golden():
    """Chances, losses in both readings and gradients; temperatures under the floor, nothing or all selected."""
    g = golden("hcsc_instance")
    q, k, queue = g["q"].double().requires_grad_(), g["k"].double(), g["queue_kd"].double()
    for prefix in ("", "edge_"):
        tree = golden_tree(g, prefix)
        keep = common.hcsc_instance_selection(queue, tree, g["index"])
        clipped, _ = hcsc.released_selection(tree, g["index"], queue, g["T"])
        masks = [g[f"{prefix}mask_{level}"] for level in range(3)]
        for level in range(3):
            assert_close(keep[level], g[f"{prefix}p_select_{level}"], **EXACT)
            assert_close(clipped[level], g[f"{prefix}p_bernoulli_{level}"], **EXACT)
        for unselected, name in (("zero", "upstream_masked_to_zero"), ("remove", "paper_removed")):
            loss = common.hcsc_instance_loss(q, k, queue, masks, g["T"], unselected=unselected)
            assert_close(loss.detach(), g[f"{prefix}loss_{name}"], **EXACT)
            assert_close(gradients(loss, q), g[f"{prefix}grad_q_{name}"], **EXACT)
    plain = hcsc.info_nce(q, k, queue, g["T"])
    assert_close(plain.item(), g["loss_no_selection"], **EXACT)
    assert_close(gradients([plain], q)[0], g["grad_q_no_selection"], **EXACT)


def on_all(g, name, level, shape, absent):
    """A golden mask on the released list of candidates as one on all prototypes, `absent` elsewhere."""
    mask = torch.full(shape, absent)
    mask[:, g[f"neg_id_upstream_{level}"]] = g[f"{name}_{level}"].to(mask.dtype)
    return mask


def test_hcsc_prototype_golden():
    """Chances and losses of all four readings, with gradients; 0 or 1 where the release has no candidate."""
    g = golden("hcsc_proto")
    q, index = g["q"].double().requires_grad_(), g["index"]
    tree = golden_tree(g)
    keep = common.hcsc_prototype_selection(tree, index)
    for level in range(2):
        assert_close(keep[level], g[f"p_select_paper_{level}"], rtol=0, atol=5e-6)  # by way of float32 cosines
    assert_close(keep[2], g["mask_paper_2"].double())
    strict = [g[f"mask_paper_{level}"] for level in range(3)]
    for absent in (0, 1):  # what a mask says of prototypes that are no candidates must not matter
        released = [on_all(g, "mask_upstream", level, strict[level].shape, absent) for level in range(3)]
        ones = [torch.ones_like(mask) for mask in released]
        for name, masks, unselected, exclude in (
                ("upstream_masked_to_zero", released, "zero", "batch"),
                ("upstream_negs_removed", released, "remove", "batch"),
                ("paper_negs_masked_to_zero", strict, "zero", "own"),
                ("paper_removed", strict, "remove", "own"),
                ("upstream_negs_no_selection", ones, "remove", "batch")):
            loss = common.hcsc_prototype_loss(q, tree, index, masks, unselected=unselected, exclude=exclude)
            assert_close(loss.detach(), g[f"loss_{name}"], **EXACT)
            assert_close(gradients(loss, q), g[f"grad_q_{name}"], **EXACT)


def test_hcsc_released_selection_golden():
    """H5 and H6: chances clipped, phi of the parents rescaled to mean T, which its `edge_` phi is far from."""
    g = golden("hcsc_proto")
    for prefix in ("", "edge_"):
        tree = golden_tree(g, prefix)
        _, keep = hcsc.released_selection(tree, g["index"], unit(Q, 16), g["T"])
        for level in range(2):
            assert_close(keep[level][:, g[f"neg_id_upstream_{level}"]], g[f"{prefix}p_bernoulli_upstream_{level}"],
                         rtol=0, atol=5e-6)
        assert keep[2].max() == 1  # the top level is not clipped
    masks = [on_all(g, "edge_mask_upstream", level, keep[level].shape, 0) for level in range(3)]
    loss = common.hcsc_prototype_loss(g["q"].double(), tree, g["index"], masks, unselected="zero", exclude="batch")
    assert_close(loss, g["edge_loss_upstream_masked_to_zero"], **EXACT)


def test_hcsc_released_prototype_loss_vanishes_in_a_large_batch():  # H3
    """As many images as clusters or more: the released loss and its gradient are exactly 0, the paper's are not."""
    g = golden("hcsc_proto")
    q, tree = g["bigbatch_q"].double().requires_grad_(), golden_tree(g)
    masks = [torch.zeros(len(q), len(prototypes)) for prototypes in tree.prototypes]
    for level in (0, 1):
        left = [j for j in range(int(tree.assign[level].max())) if j not in tree.assign[level][g["bigbatch_index"]]]
        assert len(left) == g["bigbatch_n_neg_upstream"][level]
        masks[level][:, left] = g[f"bigbatch_mask_upstream_{level}"].float()
    loss = common.hcsc_prototype_loss(q, tree, g["bigbatch_index"], masks, unselected="zero", exclude="batch")
    assert_close(loss.detach(), g["bigbatch_loss_upstream_masked_to_zero"], **EXACT)
    assert_close(gradients(loss, q).flatten(1).norm(dim=1), g["bigbatch_grad_norm_upstream"], **EXACT)
    assert loss[2] == 0 and gradients(loss, q)[2].abs().max() == 0
    ones = [torch.ones_like(mask) for mask in masks]
    loss = common.hcsc_prototype_loss(q, tree, g["bigbatch_index"], ones)
    assert_close(loss.detach(), g["bigbatch_loss_own_excluded_no_selection"], **EXACT)
    assert_close(gradients(loss, q).flatten(1).norm(dim=1), g["bigbatch_grad_norm_own_excluded_no_selection"],
                 **EXACT)


def test_hcsc_released_prototype_loss_vanishes_at_the_presets_scale():  # H3
    """The CIFAR preset's 40 clusters at the top, 512 images: nobody has a negative left in the released reading."""
    preset = hcsc.PRESETS["cifar"]
    tree = random_tree(preset["clusters"], images=50_000)
    index, q = torch.arange(preset["batch_size"]), unit(preset["batch_size"], D, seed=1).requires_grad_()
    masks = [torch.ones(len(index), k) for k in preset["clusters"]]
    released = common.hcsc_prototype_loss(q, tree, index, masks, unselected="zero", exclude="batch")
    assert released[2] == 0 and gradients(released, q)[2].abs().max() == 0
    assert common.hcsc_prototype_loss(q, tree, index, masks)[2] > 1


def test_hcsc_total_golden():
    """The released composition: one crop, small crops with and without selection, and before the first tree."""
    g = golden("hcsc_total")
    tree, index, queue = golden_tree(g), g["index"], g["queue_kd"].double()
    candidates = {level: [j for j in range(int(tree.assign[level].max())) if j not in tree.assign[level][index]]
                  for level in range(3)}

    def prototype_masks(name):
        masks = [torch.zeros(len(index), len(prototypes)) for prototypes in tree.prototypes]
        for level in (0, 1):
            masks[level][:, candidates[level]] = g[f"{name}_{level}"].float()
        masks[2][:] = 1  # at the top level all stay
        return masks

    for case in ("single", "multi", "multi_nolocalsel"):
        q, k = g["q"].double().requires_grad_(), g["k"].double()
        small = [crop.double().requires_grad_() for crop in g["local_views"]] if case != "single" else []
        instance = [g[f"{case}_inst_mask_{level}"] for level in range(3)]
        prototype = [prototype_masks(f"{case}_proto_mask")]
        prototype += [prototype_masks(f"{case}_local{v}_proto_mask") for v in range(len(small))]
        terms = hcsc.hcsc_terms([q, *small], k, queue, tree, index, instance, prototype, g["T"], release=True,
                                local_selection=case == "multi")
        total = sum(terms.values())
        total.backward()
        assert_close(total.item(), g[f"{case}_loss_total"], **EXACT)
        assert_close(q.grad, g[f"{case}_grad_q"], **EXACT)
        assert_close(terms["instance"].item(), g[f"{case}_inst_losses"].sum().item(), **EXACT)
        if small:
            assert_close(torch.stack([crop.grad for crop in small]), g[f"{case}_grad_local"], **EXACT)
            assert_close(terms["instance_local"].item(), g[f"{case}_local_inst_losses"].sum().item(), **EXACT)
    q = g["q"].double().requires_grad_()
    plain = hcsc.info_nce(q, g["k"].double(), queue, g["T"])
    assert_close(plain.item(), g["warmup_loss_total"], **EXACT)
    assert_close(gradients([plain], q)[0], g["warmup_grad_q"], **EXACT)


def test_hcsc_terms_are_means_over_levels_by_default():  # H2
    """The paper's reading against the loops; without instance selection the instance term is InfoNCE."""
    q, k, queue, tree, index, instance, prototype = hcsc_batch()
    terms = hcsc.hcsc_terms([q], k, queue, tree, index, instance, [prototype], 0.2)
    assert_close(terms["instance"].item(), sum(slow_instance_loss(q, k, queue, instance, 0.2)) / L, **EXACT)
    assert_close(terms["prototype"].item(), sum(slow_prototype_loss(q, tree, index, prototype)) / L, **EXACT)
    for release in (False, True):
        terms = hcsc.hcsc_terms([q], k, queue, tree, index, None, [prototype], 0.2, release=release)
        assert_close(terms["instance"].item(), hcsc.info_nce(q, k, queue, 0.2).item())


def test_hcsc_draws_follow_the_chances():
    """0 never, 1 always, between them in proportion; a rank's rows are a slice of the whole batch's draw."""
    chance = torch.tensor([[0.0, 1.0, 0.25]]).expand(40_000, 3)
    drawn, = hcsc.draw([chance], 40_000, common.random_state(0, "selection"))
    share = drawn.float().mean(dim=0)
    assert share[0] == 0 and share[1] == 1 and abs(share[2] - 0.25) < 0.01  # 4 standard deviations


# ---- SimCLR: NT-Xent and LARS


def slow_nt_xent(z1, z2, tau):
    """mean over all 2B views i of -log( exp(z_i.z_p/tau) / sum_{j != i} exp(z_i.z_j/tau) ), p the partner of i."""
    views = z1.tolist() + z2.tolist()
    partner = {**{n: n + len(z1) for n in range(len(z1))}, **{n + len(z1): n for n in range(len(z1))}}
    total = 0.0
    for i, z_i in enumerate(views):
        score = {j: math.exp(sum(a * b for a, b in zip(z_i, z_j)) / tau) for j, z_j in enumerate(views) if j != i}
        total += -math.log(score[partner[i]] / sum(score.values()))
    return total / len(views)


def check_nt_xent(nt_xent):
    z1, z2 = unit(B, D, seed=1), unit(B, D, seed=2)
    for tau in (0.07, 0.2, 1.0):
        assert_close(nt_xent(z1, z2, tau).item(), slow_nt_xent(z1, z2, tau), **EXACT)
    single = nt_xent(z1.float(), z2.float(), 0.2)
    assert single.dtype == torch.float32 and single.shape == ()
    assert_close(single.item(), slow_nt_xent(z1, z2, 0.2), **SINGLE)


def test_nt_xent_equals_the_loops():  # SimCLR Eq. 1
    check_nt_xent(hirl_simclr.nt_xent)


def test_nt_xent_by_hand():
    """Two images, their views at 0 and 60 degrees and at 180 and 240, temperature 1/2.

    Every view has its partner at 60 degrees and the others at 120 and 180: logits 1, -1, -2,
    loss = log(e^1 + e^-1 + e^-2) - 1 = log(1 + e^-2 + e^-3).
    """
    loss = hirl_simclr.nt_xent(on_circle(0, 180), on_circle(60, 240), temperature=0.5)
    assert_close(loss.item(), math.log(1 + math.exp(-2) + math.exp(-3)))


def test_nt_xent_of_equal_embeddings_is_log_of_the_other_views():
    """ln(2B-1), the chance level that a run prints; an image alone has nobody to be confused with."""
    same = unit(1, D)
    assert_close(hirl_simclr.nt_xent(same.expand(B, D), same.expand(B, D), 0.2).item(), math.log(2 * B - 1))
    one, other = unit(1, D).requires_grad_(), unit(1, D, seed=1)
    loss = hirl_simclr.nt_xent(one, other, 0.2)
    loss.backward()
    assert_close(loss.item(), 0.0)
    assert_close(one.grad, torch.zeros_like(one))


def test_nt_xent_does_not_care_for_the_order_of_images_or_views():
    z1, z2 = unit(B, D, seed=1), unit(B, D, seed=2)
    loss = hirl_simclr.nt_xent(z1, z2, 0.2)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert_close(hirl_simclr.nt_xent(z1[order], z2[order], 0.2), loss)
    assert_close(hirl_simclr.nt_xent(z2, z1, 0.2), loss)
    assert not torch.isclose(hirl_simclr.nt_xent(z1[order], z2, 0.2), loss)  # pairs must stay together


def test_nt_xent_gradient_reaches_both_views():
    z1, z2 = (unit(B, D, seed=seed).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda a, b: hirl_simclr.nt_xent(a, b, 0.2), (z1, z2))
    hirl_simclr.nt_xent(z1, z2, 0.2).backward()
    assert all((z.grad.abs().sum(dim=1) > 0).all() for z in (z1, z2))


def test_nt_xent_survives_extreme_logits():
    """At temperature 0.001 exp(z.z/T) overflows float32 by far; loss and gradient must not."""
    z = unit(B, D, dtype=torch.float32).requires_grad_()
    assert_close(hirl_simclr.nt_xent(z, z, 1e-3).item(), 0.0)
    loss = hirl_simclr.nt_xent(z, -z, 1e-3)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_nt_xent_golden():
    """Loss and gradients with respect to the projections before normalisation."""
    g = golden("ntxent")
    for name, tau in (("T0p1", 0.1), ("T0p5", 0.5)):
        for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
            out = [g[f"out{view}"].to(dtype, copy=True).requires_grad_() for view in (0, 1)]
            loss = hirl_simclr.nt_xent(*(F.normalize(x, dim=1) for x in out), tau)
            loss.backward()
            assert_close(loss.item(), g[f"loss_{name}"], **tolerance)
            for view in (0, 1):
                assert_close(out[view].grad.double(), g[f"grad_out{view}_{name}"], **tolerance)


def test_lars_by_hand():
    """w = (3, 4) of norm 5, g = (0, 2), decay 1/2, trust 9/10: ratio 0.9 * 5 / (2 + 5/2) = 1 exactly.

    First step v = g + w/2 = (1.5, 4), lr 0.1, w = (2.85, 3.6). Second step without gradient: nothing moves.
    Third step, all-zero gradient, no decay: v = v/2 = (0.75, 2), lr 0.2, w = (2.7, 3.2). The same numbers
    as a vector: raw gradients alone, v = (0, 2) then (0, 1), w = (3, 3.8) then (3, 3.6).
    """
    matrix, vector = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in ([[3.0, 4.0]], [3.0, 4.0]))
    optimizer = hirl_simclr.LARS([matrix, vector], 0.1, momentum=0.5, weight_decay=0.5, trust=0.9, eps=0.0)
    after = []
    for gradient, lr in (([0.0, 2.0], 0.1), (None, 0.1), ([0.0, 0.0], 0.2)):
        optimizer.param_groups[0]["lr"] = lr
        for w in (matrix, vector):
            w.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float64).view_as(w)
        optimizer.step()
        after.append([w.detach().clone() for w in (matrix.flatten(), vector)])
    for found, expected in zip(after, ([[2.85, 3.6], [3, 3.8]], [[2.85, 3.6], [3, 3.8]], [[2.7, 3.2], [3, 3.6]])):
        assert_close(torch.stack(found), torch.tensor(expected, dtype=torch.float64))


def test_lars_step_does_not_depend_on_the_scale_of_the_gradient():
    """Without decay: of length lr * trust * |w|, from large gradients to those that eps, 1e-8, halves."""
    for scale, share in ((1e6, 1.0), (1.0, 1.0), (1e-3, 1.0), (1e-8, 0.5)):
        w = torch.tensor([[3.0], [4.0]], dtype=torch.float64, requires_grad=True)
        w.grad = scale * on_circle(20).view(2, 1)
        hirl_simclr.LARS([w], lr=0.5, trust=0.01).step()
        moved = torch.tensor([[3.0], [4.0]], dtype=torch.float64) - w.detach()
        assert_close(moved, share * 0.5 * 0.01 * 5 * on_circle(20).view(2, 1), rtol=1e-4, atol=0)


def golden_lars(case, shaped, dtype, tolerance):
    """Three steps over the fixture's tensors; `shaped` gives each its number of dimensions."""
    g = golden("larc_step")
    names = ("w", "b", "bn_w", "bn_b", "proto", "zg")
    for decay in ("small", "large"):
        parameters = {name: shaped(g[f"init.{name}"]).to(dtype, copy=True).requires_grad_() for name in names}
        optimizer = hirl_simclr.LARS(parameters.values(), 1.0, momentum=g["momentum"], eps=g["eps"],
                                     weight_decay=g[f"wd_{decay}"], trust=g["trust_coefficient"])
        for t, lr in enumerate(g["lr"].tolist()):
            optimizer.param_groups[0]["lr"] = lr
            for name, p in parameters.items():
                p.grad = g[f"grads.{name}"][t].to(dtype).view_as(p) if g[f"has_grad.{name}"][t] else None
            optimizer.step()
            for name, p in parameters.items():
                want = g[f"lars_{case}_wd{decay}.{name}"][t]
                assert_close(p.detach().double().view_as(want), want, **tolerance, msg=lambda m: f"{name}, {t}: {m}")


def test_lars_golden():
    """1-D tensors excluded; and, seen as columns, included: one of them starts with norm zero."""
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        golden_lars("excl1d", lambda x: x, dtype, tolerance)
        golden_lars("onegroup", lambda x: x.view(len(x), -1), dtype, tolerance)


# ---- CsMl: neighbours, CutMix, loss


def slow_nearest_neighbours(x, k):
    """Every product of two rows in float64; the k largest with other rows, the lower id first where they are equal."""
    table = []
    for i, row in enumerate(x.double().tolist()):
        products = [(-sum(a * b for a, b in zip(row, other)), j) for j, other in enumerate(x.double().tolist())]
        table.append([j for _, j in sorted(products) if j != i][:k])
    return torch.tensor(table)


def test_nearest_neighbours_equal_the_loops():
    for n, dim, k in ((2, 3, 1), (N, D, 1), (N, D, 6), (N, D, N - 1), (150, 3, 20), (151, 3, 150)):
        for dtype in (torch.float64, torch.float32, torch.float16):
            x = unit(n, dim, seed=n).to(dtype)
            found = common.nearest_neighbours(x, k)
            assert found.dtype == torch.int64 and torch.equal(found, slow_nearest_neighbours(x, k)), (n, k, dtype)


def test_nearest_neighbours_by_hand():
    """Rows at 0, 10, 25, 180 and 181 degrees; nearest first, and no row its own."""
    found = common.nearest_neighbours(on_circle(0, 10, 25, 180, 181), 2)
    assert found.tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]


def test_nearest_neighbours_of_many_rows():
    """Several squares of scores, the last ones ragged; rows sorted, clumped and longer than 1; k up to 300."""
    generator = torch.Generator().manual_seed(0)
    for n, dim, k in ((2500, 8, 5), (1025, 4, 300)):
        x = torch.randn(n, dim, generator=generator)
        clumped = F.normalize(x + 9 * x[torch.arange(n) // 40], dim=1)
        for rows in (x, x[x[:, 0].argsort()], clumped):
            product = rows.double() @ rows.double().T
            product.fill_diagonal_(-math.inf)
            expected = product.sort(dim=1, descending=True, stable=True).indices[:, :k]
            assert torch.equal(common.nearest_neighbours(rows, k), expected)


def test_nearest_neighbours_are_other_rows_also_among_doubles():
    """Three copies of every row: the two others come first, by id. All rows equal: any, but no row its own."""
    x = F.normalize(unit(400, D, dtype=torch.float32).repeat(3, 1), dim=1)
    found, row = common.nearest_neighbours(x, 4), torch.arange(1200)
    copies = torch.stack([torch.stack([c for c in (i % 400, i % 400 + 400, i % 400 + 800) if c != i]) for i in row])
    assert torch.equal(found[:, :2], copies)
    for same in (torch.ones(1100, 2), torch.zeros(1100, 2)):
        found = common.nearest_neighbours(same, 3)
        assert (found != torch.arange(1100)[:, None]).all() and all(len(set(ids)) == 3 for ids in found.tolist())
        assert 0 <= found.min() and found.max() < 1100


def test_nearest_neighbours_close_to_a_tie():
    """Cosines that float32 cannot tell apart, 1 - 1e-9 and less: float64 puts them in order."""
    angle = torch.tensor([0.0, 3e-5, -2e-5, 1e-5, 2.0], dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert common.nearest_neighbours(x, 3).tolist() == slow_nearest_neighbours(x, 3).tolist()
    assert common.nearest_neighbours(x, 3)[0].tolist() == [3, 2, 1]


def test_nearest_neighbours_with_products_near_zero():
    """Six rows all but orthogonal to the first: only float64 tells their products apart."""
    x = unit(20, 64).float().double()
    across = F.normalize(x[1:] - (x[1:] @ x[0])[:, None] * x[0], dim=1)
    lean = torch.full((19,), -0.1, dtype=torch.double)
    lean[:6] = 3e-9 * torch.arange(6)
    x = torch.cat([x[:1], across + lean[:, None] * x[0]]).float()
    products = (x.double() @ x.double().T).fill_diagonal_(-math.inf)
    assert torch.equal(common.nearest_neighbours(x, 3), products.topk(3).indices)


def test_nearest_neighbours_golden():
    g = golden("csml")
    assert torch.equal(common.nearest_neighbours(g["knn_features"], g["knn_k"]), g["knn_index"])
    x, released = g["knn_dup_features"], g["knn_dup_index_upstream"]
    found, row = common.nearest_neighbours(x, g["knn_k"]), torch.arange(len(x))[:, None]
    assert (released == row).any() and not (found == row).any()  # DEVIATION: never a neighbour of its own
    assert torch.equal(found, slow_nearest_neighbours(x, g["knn_k"]))
    for ours, theirs, i in zip(found.tolist(), released.tolist(), range(len(x))):
        if i not in theirs:  # then the release left out the row itself, and only ties may differ
            assert_close((x[ours] @ x[i]).double(), (x[theirs] @ x[i]).double(), rtol=0, atol=1e-6)


def test_nearest_neighbours_refuse_bad_input():
    x = unit(N, D)
    for rows, k, words in ((x, 0, "k = 0 of 23"), (x, N, "k = 23 of 23"), (x[:1], 1, "k = 1 of 1"),
                           (x.where(x < x.max(), math.nan), 2, "1 of 23"), (x / 0.0, 2, "23 of 23"),
                           (x[0], 1, "(N, D)")):
        try:
            common.nearest_neighbours(rows, k)
        except ValueError as error:
            assert words in str(error)
        else:
            raise AssertionError(words)


def test_share_of_neighbours_with_the_same_label():
    """Three of the eight pairs share the coarse label and one the fine; a picture without label counts in no pair."""
    labels = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2]])
    neighbours = torch.tensor([[1, 3], [3, 2], [3, 0], [0, 1]])
    assert common.same_label(labels, neighbours) == [37.5, 12.5]
    labels[3] = -1  # five pairs are left out, of three both labels are known
    assert common.same_label(labels, neighbours) == [100.0, 33.33]
    assert common.same_label(labels * 0 - 1, neighbours) == [0.0, 0.0]


def slow_cutmix_box(height, width, lam, center):
    """The pixels less than half a side, rounded down, from the centre: count them."""
    half = [math.floor(math.floor(side * math.sqrt(1 - lam)) / 2) for side in (height, width)]
    inside = [[r for r in range(side) if c - h <= r < c + h] for side, c, h in zip((height, width), center, half)]
    return inside, 1 - len(inside[0]) * len(inside[1]) / (height * width)


def check_cutmix_box(cutmix_box):
    for height, width in ((12, 16), (7, 5), (32, 32)):
        for lam in (0.0, 0.1, 0.37, 0.5, 0.93, 1.0):
            for center in ((0, 0), (3, 4), (height - 1, width - 1)):
                row0, col0, row1, col1, adjusted = cutmix_box(height, width, lam, center)
                (rows, columns), expected = slow_cutmix_box(height, width, lam, center)
                assert [*range(row0, row1)] == rows and [*range(col0, col1)] == columns
                assert_close(adjusted, expected)


def test_cutmix_box_equals_counting_pixels():  # CutMix
    check_cutmix_box(csml.cutmix_box)


def test_cutmix_box_by_hand():
    """lam 3/4: half of each side. 12 x 16 around (6, 8): rows 3 to 8, columns 4 to 11, a quarter. At the corner
    (0, 15) rows 0 to 2, columns 11 to 15: 15 of 192 pixels. Sides of 7 lose a pixel: 3 becomes 2.
    """
    assert csml.cutmix_box(12, 16, 0.75, (6, 8)) == (3, 4, 9, 12, 0.75)
    assert csml.cutmix_box(12, 16, 0.75, (0, 15)) == (0, 11, 3, 16, 1 - 15 / 192)
    assert csml.cutmix_box(7, 7, 0.75, (3, 3)) == (2, 2, 4, 4, 1 - 4 / 49)
    assert csml.cutmix_box(12, 16, 1.0, (6, 8)) == (6, 8, 6, 8, 1.0)  # nothing is mixed in
    assert csml.cutmix_box(12, 16, 0.0, (6, 8)) == (0, 0, 12, 16, 0.0)  # all is


def test_cutmix_golden():
    """The released boxes, adjusted lambdas and mixed pictures."""
    g = golden("csml")
    for lam, center, box, adjusted, mixed in zip(g["cutmix_lam_drawn"].tolist(), g["cutmix_center"].tolist(),
                                                 g["cutmix_box"].tolist(), g["cutmix_lam_adjusted"].tolist(),
                                                 g["cutmix_mixed"]):
        found = csml.cutmix_box(12, 16, lam, center)
        assert [*found[:4]] == box
        assert_close(found[4], adjusted, **EXACT)
        assert torch.equal(csml.paste_box(g["cutmix_img"], g["cutmix_near"], *found[:4]), mixed)


def test_cutmix_draws_a_box_a_batch_and_counts_it():
    """Pictures of zeros, others of ones: the mean is the share mixed in, equal in every picture; the input stays."""
    zeros, shares = torch.zeros(B, 3, 12, 16), []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        mixed, lam = csml.cutmix(zeros, zeros + 1, generator)
        assert_close(mixed.mean(dim=(1, 2, 3)), torch.full((B,), 1 - lam))
        assert (mixed == mixed[:1, :1]).all() and zeros.sum() == 0
        shares.append(lam)
    assert min(shares) < 0.35 and max(shares) > 0.95 and 0.55 < np.mean(shares) < 0.75  # the edge makes boxes smaller


def test_a_neighbour_drawn_is_a_neighbour_and_each_is_drawn():
    table = common.nearest_neighbours(unit(N, D), 4)
    index = torch.arange(N).flip(0).repeat(100)
    drawn = csml.draw_neighbours(table, index, torch.Generator().manual_seed(0))
    place = drawn[:, None] == table[index]  # (100 N, 4)
    assert (place.sum(dim=1) == 1).all()
    assert_close(place.double().mean(dim=0), torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=0.05)


def slow_csml_loss(q, k, queue, lam, weights, tau):
    """Six InfoNCE losses by the loops above: image, neighbour and mixed query against either key, by their weights."""
    a, b = weights
    (q_image, q_other, q_mix), (k_image, k_other) = q, k
    terms = [a * slow_info_nce(q_image, k_image, queue, tau) + b * slow_info_nce(q_image, k_other, queue, tau),
             b * slow_info_nce(q_other, k_image, queue, tau) + a * slow_info_nce(q_other, k_other, queue, tau),
             lam * slow_info_nce(q_mix, k_image, queue, tau) + (1 - lam) * slow_info_nce(q_mix, k_other, queue, tau)]
    return torch.tensor(terms, dtype=torch.float64) / 3


def check_csml_loss(csml_loss):
    q, k, queue = unit(3, B, D, seed=1), unit(2, B, D, seed=2), unit(Q, D, seed=3)
    for lam, weights, tau in ((0.3, (1, 0), 0.2), (0.9, (0.5, 0.5), 0.07), (0.0, (0.6, 0.4), 1.0)):
        assert_close(csml_loss(q, k, queue, lam, weights, tau), slow_csml_loss(q, k, queue, lam, weights, tau), **EXACT)
    single = csml_loss(q.float(), k.float(), queue.float(), 0.3, (0.6, 0.4), 0.2)
    assert single.dtype == torch.float32 and single.shape == (3,)
    assert_close(single.double(), slow_csml_loss(q, k, queue, 0.3, (0.6, 0.4), 0.2), **SINGLE)


def test_csml_loss_equals_the_loops():  # CsMl
    check_csml_loss(csml.csml_loss)


def test_csml_loss_by_hand():
    """Keys at 60 and 300 degrees, one negative at 180, temperature 1/2; all queries at 0, where both keys look alike.

    Cosines 1/2, 1/2, -1: each of the six losses is log(1 + e^-3), and so three times each term, whatever the weights.
    A query at 60 instead meets cosines 1, -1/2, -1/2: log(1 + e^-3) for its own key, log 2 for the other.
    """
    keys, negative, alike = on_circle(60, 300).view(2, 1, 2), on_circle(180), math.log(1 + math.exp(-3))
    queries = on_circle(0, 0, 0).view(3, 1, 2)
    for weights in ((1, 0), (0.25, 0.75)):
        terms = csml.csml_loss(queries, keys, negative, 0.3, weights, 0.5)
        assert_close(terms.tolist(), [alike / 3] * 3)
    queries = on_circle(60, 60, 60).view(3, 1, 2)
    terms = csml.csml_loss(queries, keys, negative, 0.3, (0.25, 0.75), 0.5)
    assert_close((3 * terms).tolist(), [0.25 * alike + 0.75 * math.log(2), 0.75 * alike + 0.25 * math.log(2),
                                        0.3 * alike + 0.7 * math.log(2)])


def test_csml_loss_of_equal_logits_is_a_third_of_log_of_one_plus_queue_in_each_term():
    same = unit(1, D)
    terms = csml.csml_loss(unit(3, B, D), same.expand(2, B, D), same.expand(Q, D), 0.4, (0.5, 0.5), 0.2)
    assert_close(terms.tolist(), [math.log(1 + Q) / 3] * 3)


def test_csml_loss_in_the_warm_up_is_info_nce_of_either_picture_and_the_mix():
    q, k, queue = unit(3, B, D, seed=1), unit(2, B, D, seed=2), unit(Q, D, seed=3)
    image, other, mix = csml.csml_loss(q, k, queue, 1.0, (1, 0), 0.2)
    for term, query, key in ((image, q[0], k[0]), (other, q[1], k[1]), (mix, q[2], k[0])):  # lam 1: nothing mixed in
        assert_close(3 * term, csml.info_nce(query, key, queue, 0.2))


def test_csml_loss_does_not_care_for_the_order_of_batch_or_queue():
    q, k, queue = unit(3, B, D, seed=1), unit(2, B, D, seed=2), unit(Q, D, seed=3)
    terms, order = csml.csml_loss(q, k, queue, 0.3, (0.6, 0.4), 0.2), torch.tensor([3, 0, 4, 1, 2])
    assert_close(csml.csml_loss(q[:, order], k[:, order], queue.flip(0), 0.3, (0.6, 0.4), 0.2), terms)
    assert not torch.isclose(csml.csml_loss(q, k[:, order], queue, 0.3, (0.6, 0.4), 0.2), terms).any()


def test_csml_loss_gradient_reaches_the_queries_alone():
    """And each term its own query: that of the image tells nothing to neighbour or mixed picture."""
    q, k, queue = (unit(*shape, seed=1).requires_grad_() for shape in ((3, B, D), (2, B, D), (Q, D)))
    for i in range(3):
        gradient, = torch.autograd.grad(csml.csml_loss(q, k, queue, 0.3, (0.6, 0.4), 0.2)[i], q)
        assert (gradient.abs().sum(dim=(1, 2)) > 0).tolist() == [j == i for j in range(3)]
    csml.csml_loss(q, k, queue, 0.3, (0.6, 0.4), 0.2).sum().backward()
    assert k.grad is None and queue.grad is None
    assert torch.autograd.gradcheck(lambda x: csml.csml_loss(x, k, queue, 0.3, (0.6, 0.4), 0.2), q)


def test_csml_loss_survives_extreme_logits():
    q = unit(3, B, D, dtype=torch.float32)
    assert_close(csml.csml_loss(q, q[:2], -q[0], 0.5, (1, 0), 1e-3)[:2].tolist(), [0.0, 0.0])
    assert csml.csml_loss(q, -q[:2], q[0], 0.5, (0.5, 0.5), 1e-3).isfinite().all()


def test_csml_golden():
    """The six released cross-entropies; at epochs 0, 10 (warm-up) and 11 the loss, its mixed part, the gradients."""
    g = golden("csml")
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        q = torch.stack([g["emb_q"], g["emb_q_add"], g["emb_q_mix"]]).to(dtype).requires_grad_()
        k, queue = torch.stack([g["emb_k"], g["emb_k_add"]]).to(dtype), g["queue_kd"].to(dtype)

        def terms(lam, weights):
            return csml.csml_loss(q, k, queue, lam, weights, g["T"])

        own, other = 3 * terms(1, (1, 0)).detach(), 3 * terms(0, (0, 1)).detach()
        six = torch.stack([own[0], other[0], other[1], own[1], own[2], other[2]]).view(3, 2)
        assert_close(six.double(), g["ce_matrix"], **tolerance)
        for name, logits in zip(("q", "q_add", "mix"), q.detach()):
            all_keys = torch.cat([(logits[:, None] * k.transpose(0, 1)).sum(2, keepdim=True),
                                  (logits @ queue.T)[:, None].expand(-1, 2, -1)], dim=2) / g["T"]
            assert_close(all_keys.double(), g[f"logits_{name}"], **tolerance)
        for epoch in (0, 10, 11):
            found = terms(g["mix_lam"], (1, 0) if epoch < 11 else g["lam"].tolist())
            gradient, = torch.autograd.grad(found.sum(), q)
            assert_close(found.sum().item(), g[f"epoch{epoch}_loss"], **tolerance)
            assert_close(3 * found[2].item(), g[f"epoch{epoch}_loss_mix"], **tolerance)
            for name, value in zip(("q", "q_add", "q_mix"), gradient):
                assert_close(value.double(), g[f"epoch{epoch}_grad_{name}"], **tolerance)


def test_stage_encoder_reads_the_stages_of_its_trunk():
    """Embeddings as hooks read them off the trunk; stage 4 alone is the Encoder, bit for bit; names stay."""
    for arch in ("tiny", "resnet50"):
        torch.manual_seed(0)
        plain = csml.Encoder(arch, "3x3s2", "mlp-bn", D)
        names, x, seen = [*plain.backbone.state_dict()], torch.randn(2, 3, 32, 32), {}
        alone = csml.StageEncoder(plain, [4], "mlp-bn", D)
        assert torch.equal(alone(x)[:, 0], plain(x))
        several = csml.StageEncoder(plain, [1, 3, 4], "mlp-bn", D)
        assert [*several.backbone.state_dict()] == names
        for stage in (1, 3, 4):
            getattr(plain.backbone, f"layer{stage}").register_forward_hook(
                lambda _, __, out, stage=stage: seen.update({stage: out.mean(dim=(2, 3))}))
        found = several(x)
        assert found.shape == (2, 3, D)
        for place, stage in enumerate((1, 3, 4)):
            assert_close(found[:, place], several.projectors[str(stage)](seen[stage]))


# ---- SwAV: assignments, swapped prediction, LARC, re-assignment

P, V = 17, 2  # learnt prototypes, local crops: C = 4


def slow_sinkhorn(scores, epsilon, iterations):
    """SwAV's notation: Q (P, B) = exp(scores^T / epsilon), rows scaled to 1/P, then columns to 1/B, at last times B."""
    table = [[math.exp(s / epsilon) for s in column] for column in scores.double().T.tolist()]
    samples = len(scores)
    for _ in range(iterations):
        for row in table:
            total = sum(row)
            row[:] = [q / total / len(table) for q in row]
        for b in range(samples):
            total = sum(row[b] for row in table)
            for row in table:
                row[b] /= total * samples
    return samples * torch.tensor(table, dtype=torch.float64).T


def check_sinkhorn(sinkhorn):
    for b, p in ((B, P), (P, B), (1, P), (B, 1), (2, 40)):
        scores = unit(b, D, seed=1) @ unit(p, D, seed=2).T
        for epsilon, iterations in ((0.05, 3), (0.3, 1), (1.0, 7)):
            found = sinkhorn(scores, epsilon, iterations)
            assert_close(found, slow_sinkhorn(scores, epsilon, iterations), **EXACT)
            single = sinkhorn(scores.float(), epsilon, iterations)
            assert single.dtype == torch.float32
            assert_close(single.double(), found, rtol=1e-4, atol=1e-6)
    assert_close(sinkhorn(scores), slow_sinkhorn(scores, 0.05, 3), **EXACT)  # SwAV's defaults


def test_sinkhorn_equals_the_loops():  # SwAV Eq. 5
    check_sinkhorn(hirl_swav.sinkhorn)


def test_sinkhorn_by_hand():
    """Masses [[1, 3], [1, 1]]; prototypes first: [[1/2, 3/4], [1/2, 1/4]]; then images: [[2/5, 3/5], [2/3, 1/3]]."""
    scores = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    expected = torch.tensor([[2 / 5, 3 / 5], [2 / 3, 1 / 3]], dtype=torch.float64)
    assert_close(hirl_swav.sinkhorn(scores, epsilon=1.0, iterations=1), expected)


def test_sinkhorn_uses_all_prototypes_equally_in_the_end():
    """Images sum to 1 after any number of rounds; prototypes to B/P only after many, and then both hold."""
    scores = unit(B, D, seed=1) @ unit(P, D, seed=2).T
    for iterations in (1, 3, 200):
        assert_close(hirl_swav.sinkhorn(scores, 0.2, iterations).sum(1), torch.ones(B, dtype=torch.float64))
    assert_close(hirl_swav.sinkhorn(scores, 0.2, 200).sum(0), torch.full((P,), B / P, dtype=torch.float64))
    favourite = scores + 3.0 * (torch.arange(P) == 4)  # liked by all: no reason to get more
    assert_close(hirl_swav.sinkhorn(favourite, 0.2), hirl_swav.sinkhorn(scores, 0.2))
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    assert_close(hirl_swav.sinkhorn(scores[order].flip(1)), hirl_swav.sinkhorn(scores)[order].flip(1))


def test_sinkhorn_survives_small_epsilon():
    """exp(1/epsilon) overflows float32 from epsilon 0.011 on, and a prototype's whole mass may underflow."""
    scores = (unit(B, D, seed=1) @ unit(P, D, seed=2).T).float()
    scores[:, 3] = -1.0
    for epsilon in (1e-2, 1e-3, 1e-5):
        found = hirl_swav.sinkhorn(scores, epsilon)
        assert found.isfinite().all() and (found >= 0).all()
        assert_close(found.sum(1), torch.ones(B), rtol=0, atol=1e-5)
    assert_close(hirl_swav.sinkhorn(scores, 1e-2).double(), slow_sinkhorn(scores, 1e-2, 3), rtol=0, atol=1e-4)
    assert hirl_swav.sinkhorn(scores.bfloat16(), 1e-2).dtype == torch.float32
    assert_close(hirl_swav.sinkhorn(torch.ones(B, P)), torch.full((B, P), 1 / P))  # all the same: all equal


def slow_swapped_prediction(scores, assignments, tau):
    """1/2 sum_i 1/(C-1) sum_{v != i} 1/B sum_b - sum_p A_i[b,p] log( exp(s_p/tau) / sum_j exp(s_j/tau) )."""
    crops, batch, _ = scores.shape
    total = 0.0
    for i in (0, 1):
        for v in range(crops):
            if v == i:
                continue
            for b in range(batch):
                masses = [math.exp(s / tau) for s in scores[v, b].tolist()]
                for a, mass in zip(assignments[i, b].tolist(), masses):
                    total += -a * math.log(mass / sum(masses)) / batch / (crops - 1) / 2
    return total


def swav_batch(local=V, seed=0):
    """Cosines (C, B, P) of C = 2 + local crops, and assignments (2, B, P) of any kind."""
    scores = unit(2 + local, B, D, seed=seed) @ unit(P, D, seed=seed + 1).T
    return scores, unit(2, B, P, seed=seed + 2).abs().softmax(dim=2)


def check_swapped_prediction(swapped_prediction):
    for local in (0, 1, V, 4):
        scores, assignments = swav_batch(local)
        for tau in (0.1, 1.0):
            expected = slow_swapped_prediction(scores, assignments, tau)
            assert_close(swapped_prediction(scores, assignments, tau).item(), expected, **EXACT)
            single = swapped_prediction(scores.float(), assignments.float(), tau)
            assert single.dtype == torch.float32 and single.shape == ()
            assert_close(single.item(), expected, **SINGLE)


def test_swapped_prediction_equals_the_loops():  # SwAV Eq. 2 and 6
    check_swapped_prediction(hirl_swav.swapped_prediction)


def test_swapped_prediction_by_hand():
    """One image, two prototypes, crops 0 and 1 and one local one, temperature 1/2.

    They predict (e^2, 1)/(1+e^2), (1/2, 1/2) and (1/4, 3/4). Crop 0 was assigned (1, 0): crop 1 loses log 2, the
    local one log 4. Crop 1 was assigned (1/2, 1/2): crop 0 loses log(1+e^2) - 1, the local one (log 4 + log 4/3)/2.
    """
    scores = torch.tensor([[[1.0, 0.0]], [[0.3, 0.3]], [[0.0, math.log(3) / 2]]], dtype=torch.float64)
    assignments = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]], dtype=torch.float64)
    first = (math.log(2) + math.log(4)) / 2
    second = (math.log(1 + math.e**2) - 1 + (math.log(4) + math.log(4 / 3)) / 2) / 2
    assert_close(hirl_swav.swapped_prediction(scores, assignments, 0.5).item(), (first + second) / 2)


def test_swapped_prediction_of_equal_scores_is_log_of_prototypes():
    """A network that tells nothing apart scores ln P, whatever was assigned: the chance level that a run prints."""
    _, assignments = swav_batch()
    loss = hirl_swav.swapped_prediction(torch.full((2 + V, B, P), 0.4, dtype=torch.float64), assignments, 0.1)
    assert_close(loss.item(), math.log(P))


def test_swapped_prediction_does_not_care_for_the_order_of_images_prototypes_or_local_crops():
    scores, assignments = swav_batch()
    loss = hirl_swav.swapped_prediction(scores, assignments, 0.1)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    for other in ((scores[:, order], assignments[:, order]), (scores.flip(2), assignments.flip(2)),
                  (scores[[0, 1, 3, 2]], assignments), (scores[[1, 0, 2, 3]], assignments.flip(0))):
        assert_close(hirl_swav.swapped_prediction(*other, 0.1), loss)
    for other in ((scores[:, order], assignments), (scores[[1, 0, 2, 3]], assignments)):  # what belongs together
        assert not torch.isclose(hirl_swav.swapped_prediction(*other, 0.1), loss)


def test_swapped_prediction_gradient_reaches_the_scores_alone():
    """And a crop's scores are judged by the other crop's assignment only: crop 0 never sees its own."""
    scores, assignments = (x.requires_grad_() for x in swav_batch())
    hirl_swav.swapped_prediction(scores, assignments, 0.5).backward()
    assert (scores.grad.abs().sum(dim=(1, 2)) > 0).all() and assignments.grad is None
    targets = assignments.detach().clone()
    targets[0] = targets[0].flip(1)
    own, = torch.autograd.grad(hirl_swav.swapped_prediction(scores, targets, 0.5), scores)
    assert torch.equal(own[0], scores.grad[0]) and not torch.isclose(own[1:], scores.grad[1:]).all(2).any()
    assert torch.autograd.gradcheck(lambda x: hirl_swav.swapped_prediction(x, targets, 0.5), scores)


def test_swav_golden():
    """The official SwAV: logits, assignments, loss and gradients; no queue, a full one, one not yet full."""
    g = golden("swav")
    for case, past in (("", 0), ("queue_", 16), ("queuepart_", 0)):
        for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, dict(rtol=1e-5, atol=2e-6))):
            z = g["z"].to(dtype, copy=True).requires_grad_()
            c = F.normalize(g["prototypes_raw"].to(dtype), dim=1).requires_grad_()
            scores = (z @ c.T).view(-1, g["B"], len(c))  # (C, B, P)
            scores.retain_grad()
            rows = scores[:2]
            if case:
                rows = torch.cat([g[case + "queue_before"][:, :past].to(dtype) @ c.T, rows], dim=1)
                assert rows.shape[1] == g[case + "sinkhorn_rows"]
            assignments = torch.stack([hirl_swav.sinkhorn(crop, g["epsilon"], g["sinkhorn_iterations"])[-g["B"]:]
                                       for crop in rows])
            loss = hirl_swav.swapped_prediction(scores, assignments, g["T"])
            loss.backward()
            found = {"loss": loss, "assign_0": assignments[0], "assign_1": assignments[1], "grad_z": z.grad,
                     "grad_logits": scores.grad.flatten(0, 1), "grad_prototypes": c.grad}
            for name, value in found.items():
                expected = torch.as_tensor(g[case + name], dtype=torch.float64)
                assert_close(value.detach().double(), expected, **tolerance, msg=lambda m: f"{case}{name}: {m}")
        if case:
            model = hirl_swav.SwAV(nn.Linear(2, 2), c.shape[1], len(c), 16)
            model.queue.copy_(g[case + "queue_before"])
            model.enqueue(g["z"].view(-1, g["B"], c.shape[1])[:2])
            assert torch.equal(model.queue, g[case + "queue_after"])
    for name in "ab":
        assert_close(hirl_swav.sinkhorn(g[f"sinkhorn_{name}_logits"].double()), g[f"sinkhorn_{name}_assign"], **EXACT)


def test_swav_queue_takes_any_number_in_front():
    """Batches that do not divide it, exactly fill it, twice overflow it, or are empty: the newest stand first."""
    model = hirl_swav.SwAV(nn.Linear(2, 2), D, P, 7)
    everything = torch.arange(1.0, 81).view(2, 40, 1).expand(2, 40, D).requires_grad_()
    start, expected = 0, [[0.0] * 7, [0.0] * 7]
    for count in (3, 3, 3, 7, 15, 0):
        new = everything[:, start:start + count]
        model.enqueue(new)
        start += count
        expected = [(rows.detach()[:, 0].tolist() + old)[:7] for rows, old in zip(new, expected)]
        assert model.queue[:, :, 0].tolist() == expected and not model.queue.requires_grad


def test_crops_are_encoded_by_size_and_come_back_in_order():
    """Four crops of two sizes, with and without local ones: two calls of the trunk, one of the projector."""
    calls = []

    def backbone(x):
        calls.append(tuple(x.shape))
        return x.mean(dim=(2, 3))

    crops = [torch.rand(B, 3, size, size, generator=torch.Generator().manual_seed(size + c))
             for c, size in enumerate((8, 8, 4, 4, 4))]
    for used, expected in ((5, [(2 * B, 3, 8, 8), (3 * B, 3, 4, 4), (5 * B, 3)]),
                           (2, [(2 * B, 3, 8, 8), (2 * B, 3)])):
        calls.clear()
        raw = hirl_swav.encode_crops(backbone, lambda x: calls.append(tuple(x.shape)) or 2 * x, crops[:used])
        assert calls == expected
        assert_close(raw, torch.stack([2 * crop.mean(dim=(2, 3)) for crop in crops[:used]]))  # (C, b, F)
    calls.clear()
    hirl_swav.encode_crops(backbone, lambda x: x, crops[:2] * 2)
    assert calls == [(4 * B, 3, 8, 8)]  # one size: all together


def test_reassignment_golden():
    """The released iteration-wise assignment: the batch's rows at every level, no other row."""
    g = golden("hirl_spd")
    tree = fixture_tree(g, [g["cluster2cluster_0"], g["cluster2cluster_1"]])
    hirl_swav.reassign(tree, g["index"], g["iter_key"])
    for level in range(3):
        assert torch.equal(tree.assign[level], g[f"iter_im2cluster_after_{level}"])


def test_reassignment_moves_images_to_the_nearest_leaf_and_its_ancestors():
    tree = random_tree()
    before = [assign.clone() for assign in tree.assign]
    index = torch.tensor([4, 0, 19])
    z = 3 * tree.prototypes[0][[2, 7, 7]]  # any length
    hirl_swav.reassign(tree, index, z)
    rest = torch.ones(N, dtype=torch.bool).index_fill(0, index, False)
    for level, assign in enumerate(tree.assign):
        assert [slow_path(leaf, tree.parent)[level] for leaf in (2, 7, 7)] == assign[index].tolist()
        assert torch.equal(assign[rest], before[level][rest])
    for level, up in enumerate(tree.parent):
        assert torch.equal(tree.assign[level + 1], up[tree.assign[level]])


def test_larc_by_hand():
    """|w| = 5 and |g| = 10: the rate is trust * 5 / (10 + 5 beta). Zero weight or gradient: g stays, no decay."""
    def adapted(w, g, **how):
        w, w.grad = torch.tensor(w, requires_grad=True), torch.tensor(g)
        hirl_swav.larc([w], **how)
        return w.grad.tolist()

    assert_close(adapted([3.0, 4.0], [0.0, 10.0], weight_decay=0.0, trust=0.2), [0.0, 1.0])
    assert_close(adapted([3.0, 4.0], [0.0, 10.0], weight_decay=2.0, trust=0.2), [0.3, 0.9])  # rate 1/20 of (6, 18)
    assert_close(adapted([3.0, 4.0], [0.0, 10.0], weight_decay=0.0, trust=0.2, lr=0.5), [0.0, 2.0])
    assert_close(adapted([3.0, 4.0], [0.0, 10.0], weight_decay=0.0, trust=0.2, lr=0.01), [0.0, 10.0])  # clipped
    assert adapted([0.0, 0.0], [0.0, 10.0], weight_decay=2.0) == [0.0, 10.0]
    assert adapted([3.0, 4.0], [0.0, 0.0], weight_decay=2.0) == [0.0, 0.0]
    frozen = torch.ones(2, requires_grad=True)
    hirl_swav.larc([frozen], 1.0)
    assert frozen.grad is None


def test_larc_golden():
    """Momentum SGD wrapped in LARC: three steps of six tensors, one of them without gradient in the second."""
    g = golden("larc_step")
    names = [name.removeprefix("init.") for name in g if name.startswith("init.")]
    for case, decay, clip in (("larc_wdsmall", g["wd_small"], False), ("larc_wdlarge", g["wd_large"], False),
                              ("larc_clip_wdlarge", g["wd_large"], True)):
        trust = g["larc_clip_trust_coefficient"] if clip else g["trust_coefficient"]
        tensors = {name: nn.Parameter(g["init." + name].double()) for name in names}
        optimizer = torch.optim.SGD(tensors.values(), lr=1.0, momentum=g["momentum"])
        for step, lr in enumerate(g["lr"].tolist()):
            optimizer.param_groups[0]["lr"] = lr
            for name, w in tensors.items():
                w.grad = g["grads." + name][step].double() if g["has_grad." + name][step] else None
            hirl_swav.larc(tensors.values(), decay, trust, g["eps"], lr=lr if clip else None)
            optimizer.step()
            for name, w in tensors.items():
                assert_close(w.detach(), g[f"{case}.{name}"][step], **EXACT, msg=lambda m: f"{case} {name} {step}: {m}")


def test_learning_rate_warms_up_and_ends_above_zero():
    """From 1 to 9 over the first fifth, then down to 3: half way down, at 6, in the middle of the rest."""
    rates = [hirl_swav.learning_rate(done, 9.0, 1.0, 3.0, 0.2) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert_close(rates, [1.0, 5.0, 9.0, 6.0, 3.0])
    assert hirl_swav.learning_rate(0.0, 9.0, 1.0, 3.0, 0.0) == 9.0  # no warm-up


# ---- the k-nearest-neighbour classifier


def slow_knn_votes(train_x, train_y, test_x, classes, k, tau):
    """Sort all training rows by cosine; the first k give exp(cosine / tau) to their class."""
    votes = []
    for t in test_x.tolist():
        cosines = []
        for x, y in zip(train_x.tolist(), train_y.tolist()):
            dot = sum(a * b for a, b in zip(t, x))
            cosines.append((dot / math.hypot(*t) / math.hypot(*x), y))
        row = [0.0] * classes
        for cosine, y in sorted(cosines, reverse=True)[:k]:
            row[y] += math.exp(cosine / tau)
        votes.append(row)
    return torch.tensor(votes, dtype=torch.float64)


def test_knn_votes_equal_the_loops():
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, B))
    train_y = torch.randint(4, (N,), generator=generator)
    for k in (1, 6, N):
        votes = common.knn_classify(train_x, train_y, test_x, 4, k=k, temperature=0.3)
        assert_close(votes, slow_knn_votes(train_x, train_y, test_x, 4, k, 0.3), **EXACT)
        assert_close(common.knn_classify(5 * train_x, train_y, test_x / 7, 4, k=k, temperature=0.3), votes)


def test_knn_by_hand():
    """Test at 0 degrees; class 0 at 60, class 1 at 90 and at -90, class 2 far away; temperature 1.

    One neighbour: e^(1/2) for class 0. Three: class 0 keeps e^(1/2) = 1.65, class 1 gets 1 + 1 and wins.
    """
    train_x, train_y = on_circle(60, 90, -90, 180), torch.tensor([0, 1, 1, 2])
    one = common.knn_classify(train_x, train_y, on_circle(0), 3, k=1, temperature=1.0)
    three = common.knn_classify(train_x, train_y, on_circle(0), 3, k=3, temperature=1.0)
    assert_close(one, torch.tensor([[math.exp(0.5), 0, 0]], dtype=torch.float64))
    assert_close(three, torch.tensor([[math.exp(0.5), 2, 0]], dtype=torch.float64))


def test_knn_refuses_more_neighbours_than_rows():
    for k in (0, 5):
        try:
            common.knn_classify(on_circle(0, 90), torch.tensor([0, 1]), on_circle(0), 2, k=k)
        except ValueError as error:
            assert str(k) in str(error) and "2" in str(error)
        else:
            raise AssertionError(f"k = {k} of 2 rows was accepted")


def test_knn_golden():
    """The released classifier: votes, predictions, top-1 and top-5, and other numbers of neighbours."""
    g = golden("knn_eval")

    def votes(k):
        return common.knn_classify(g["train_features"].double(), g["train_labels"], g["test_features"].double(),
                                   g["num_classes"], k=k, temperature=g["T"])

    def top(v, n):  # percent of rows whose label is among the n classes with most votes
        return 100 * (v.topk(n).indices == g["test_labels"][:, None]).any(1).double().mean().item()

    v = votes(g["k"])
    assert_close(v, g["votes"], **EXACT)
    assert torch.equal(v.argmax(1), g["pred"])
    assert_close([top(v, 1), top(v, 5)], [g["top1"], g["top5"]])
    for k, top1 in zip(g["other_k"].tolist(), g["other_k_top1"].tolist()):
        assert_close(top(votes(k), 1), top1)


# ---- contracts: what keeps the files comparable, liftable and honest

METHODS = sorted(p for p in HERE.glob("*.py") if re.fullmatch(r"(hirl_\w+|hcsc|csml)\.py", p.name))
FILES = [HERE / "common.py", *METHODS, *HERE.glob("eval_linear.py")]
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "PIL"}  # PIL comes with torchvision
BANNER = re.compile(r"^ *# ---- (.*)$", re.MULTILINE)


def blocks(path):
    """{title: text up to the next banner} of a script, at the top level and inside functions alike."""
    text = path.read_text()
    starts = [*BANNER.finditer(text)]
    titles = [match[1] for match in starts]
    assert len(set(titles)) == len(titles), f"{path.name} repeats a banner"
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {match[1]: text[match.end():end].rstrip() for match, end in zip(starts, ends)}


def test_shared_blocks_are_byte_identical():
    """`# ---- [shared] title` means the same bytes in every script that has the title."""
    seen = {}
    for path in METHODS:
        for title, text in blocks(path).items():
            assert re.match(r"\[(shared(: [\w, ]+)?|method)\] \S", title), f"{path.name}: banner '{title}'"
            if title.startswith("[shared"):
                first, expected = seen.setdefault(title, (path.name, text))
                assert text == expected, f"'{title}' differs between {first} and {path.name}"


def test_every_script_has_every_shared_block():
    reading_first = [title for title in blocks(HERE / "hirl_moco.py") if title.startswith("[shared] ")]
    assert len(reading_first) >= 7
    for path in METHODS:
        missing = [title for title in reading_first if title not in blocks(path)]
        assert not missing, f"{path.name} lacks {missing}"


def flags(tree):
    """The calls that declare a command-line flag."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("add", "add_argument")
            and isinstance(node.args[0], ast.Constant) and str(node.args[0].value).startswith("--")]


def attributes_of_args(tree):
    return {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"}


def test_every_declared_flag_is_read_and_every_one_read_is_declared():
    shared = attributes_of_args(ast.parse((HERE / "common.py").read_text()))
    added = {"out", "given", "script", "fingerprint"}  # by resolve_arguments, and from a run by eval_linear.py
    for path in FILES[1:]:
        tree = ast.parse(path.read_text())
        declared = {node.args[0].value.strip("-").replace("-", "_") for node in flags(tree)}
        read = attributes_of_args(tree)
        assert len(declared) >= 5
        assert not declared - read - shared, f"{path.name} never reads {sorted(declared - read - shared)}"
        unknown = read - declared - added
        assert not unknown, f"{path.name} reads what it does not declare: {sorted(unknown)}"


def test_files_import_little_and_never_one_another():
    scripts = {path.stem for path in FILES[1:]} | {"test_losses"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} has a relative import"
                names = [node.module]
            else:
                continue
            for name in (name.split(".")[0] for name in names):
                assert name not in scripts, f"{path.name} imports {name}"
                allowed = name in PACKAGES or name in sys.stdlib_module_names or name == "common"
                assert allowed and not (path.stem == name == "common"), f"{path.name} imports {name}"


def test_files_import_without_side_effects():
    """Nothing printed, no file written, no argument read, no signal handler, no draw from the global generator."""
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.argv = ['x', '--no-such-flag']\n"
            "import signal, torch; before = torch.get_rng_state(), torch.get_num_threads()\n"
            + "".join(f"import {path.stem}\n" for path in FILES) +
            "assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]\n"
            f"assert signal.getsignal(signal.SIGTERM) == {int(signal.SIG_DFL)}\n")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.listdir(folder) == []


def test_public_functions_and_classes_have_docstrings():
    """All but `main` and the argument parser, whose every line carries its own help."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if (isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                    and node.name not in ("main", "parse_args", "shared_arguments")):
                assert ast.get_docstring(node), f"{path.name}:{node.lineno}: {node.name} has no docstring"


def test_every_flag_has_help():
    for path in FILES[1:]:
        for node in flags(ast.parse(path.read_text())):
            assert any(word.arg == "help" for word in node.keywords), f"{path.name}: {node.args[0].value}"


def test_warm_up_keeps_its_share_when_epochs_change():
    """A preset's 8 warm-up epochs of 20 become 2 of 5; what the command line asks for is never changed."""
    assert hirl_moco.parse_args([]).warmup_epochs == 8
    assert hirl_moco.parse_args(["--epochs", "5"]).warmup_epochs == 2
    assert hirl_moco.parse_args(["--epochs", "5", "--warmup-epochs", "4"]).warmup_epochs == 4


def lifted(function):
    """The function compiled from its source alone, as if pasted into an empty file."""
    namespace = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(function), namespace)
    return namespace[function.__name__]


def test_losses_can_be_lifted():
    check_semantic_path_loss(lifted(common.semantic_path_loss))
    check_info_nce(lifted(hirl_moco.info_nce))
    check_hcsc_losses(lifted(common.hcsc_instance_loss), lifted(common.hcsc_prototype_loss))
    check_nt_xent(lifted(hirl_simclr.nt_xent))
    check_csml_loss(lifted(csml.csml_loss))
    check_cutmix_box(lifted(csml.cutmix_box))
    check_sinkhorn(lifted(hirl_swav.sinkhorn))
    check_swapped_prediction(lifted(hirl_swav.swapped_prediction))


# ---- k-means and hierarchy


def slow_distances(x, c):
    """(N, K) squared distances, float64."""
    return np.array([[sum((xi - ci) ** 2) for ci in c] for xi in x])


def slow_lloyd(x, c, iterations):
    """Lloyd in explicit loops: assign to the nearest (lowest id on ties), then average; None if a cluster empties."""
    x, c = np.asarray(x, np.float64), np.asarray(c, np.float64)
    for _ in range(iterations):
        label = slow_distances(x, c).argmin(1)
        for j in range(len(c)):
            if not (label == j).any():
                return None
            c[j] = sum(x[i] for i in range(len(x)) if label[i] == j) / sum(label == j)
    return c, slow_distances(x, c).argmin(1)


def test_kmeans_equals_slow_lloyd_on_200_cases():
    rng, compared = np.random.default_rng(0), 0
    for _ in range(200):
        n, d, k, iterations = rng.integers(5, 40), rng.integers(2, 6), rng.integers(1, 6), rng.integers(0, 6)
        x = rng.normal(size=(n, d)).astype(np.float32)
        init = x[rng.permutation(n)[:k]]
        slow = slow_lloyd(x, init, iterations)
        if slow is None or len(set(slow[1])) < k:
            continue  # an emptied cluster is another test's business
        centroids, assign = common.kmeans(torch.from_numpy(x), k, iterations=int(iterations),
                                          init=torch.from_numpy(init))
        np.testing.assert_allclose(centroids.numpy(), slow[0], atol=1e-5)
        np.testing.assert_array_equal(assign.numpy(), slow[1])
        compared += 1
    assert compared > 150


def test_kmeans_by_hand():
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
    centroids, assign = common.kmeans(x, 2, init=x[[0, 2]])
    assert centroids.tolist() == [[0, 1], [10, 2]] and assign.tolist() == [0, 0, 1, 1]
    centroids, assign = common.kmeans(x, 2, iterations=0, init=x[[3, 0]])  # no update: the start, and who is nearest
    assert centroids.tolist() == [[10, 4], [0, 0]] and assign.tolist() == [1, 1, 0, 0]


def test_hierarchy_from_centroids_golden():
    g = golden("hkmeans_derived")
    for case in ("", "edge_"):
        raw = [g[f"{case}centroids_raw_{level}"] for level in range(3)]
        tree = common.hierarchy_from_centroids(g[case + "points"], raw, g["T"])
        for level in range(3):
            np.testing.assert_array_equal(tree.assign[level], g[f"{case}im2cluster_{level}"])
            np.testing.assert_allclose(tree.prototypes[level], g[f"{case}centroids_{level}"], atol=1e-6)
            np.testing.assert_allclose(tree.concentration[level], g[f"{case}density_{level}"], atol=1e-6)
        for level in range(2):
            np.testing.assert_array_equal(tree.parent[level], g[f"{case}cluster2cluster_{level}"])


def test_concentration_of_equal_items_is_above_zero():
    """Half of the clusters hold one picture many times, distance 0: phi stays positive, its mean the temperature."""
    distance = torch.tensor([0.0] * 5 + [3.0] * 5)
    phi = common.concentration(distance, torch.full((10,), 4), 0.2)
    assert phi.min() > 0.001 and phi[0] < phi[5] / 100
    assert_close(phi.mean().item(), 0.2)
    nothing = common.concentration(torch.zeros(3), torch.tensor([2, 1, 0]), 0.2)
    assert_close(nothing, torch.full((3,), 0.2))


def test_kmeans_can_be_lifted():
    """The collectives and the k-means block, pasted alone into a file that imports torch, give the same clusters."""
    text = blocks(HERE / "common.py")
    namespace = {"torch": torch, "F": F, "math": math, "warnings": warnings, "dist": torch.distributed,
                 "NamedTuple": typing.NamedTuple, "Tensor": torch.Tensor}
    for title in ("collectives: nothing happens at world size 1", "k-means and hierarchy"):
        exec(text[title], namespace)
    x = unit(200, 4).float()
    for ours, theirs in zip(namespace["kmeans"](x, 9), common.kmeans(x, 9)):
        assert torch.equal(ours, theirs)


# ---- augmentation: each operation equals torchvision's on one picture at a time


PIXEL = dict(rtol=1e-5, atol=1e-5)  # float32 pixels in [0, 1]


def six_pictures(height=20, width=28):
    """(6, 3, 20, 28) in [0, 1], with gray pixels, where hue is undefined, and ties between channels."""
    images = torch.rand(6, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[0, :, :4] = images[0, :1, :4]
    images[1, 1] = images[1, 0]
    return images


def test_colour_operations_equal_torchvision():
    images, factors = six_pictures(), [0.0, 0.4, 0.9, 1.0, 1.4, 2.0]
    for ours, theirs, values in (
            (common.adjust_brightness, TF.adjust_brightness, factors),
            (common.adjust_contrast, TF.adjust_contrast, factors),
            (common.adjust_saturation, TF.adjust_saturation, factors),
            (common.adjust_hue, TF.adjust_hue, [-0.5, -0.13, 0.0, 0.05, 0.3, 0.5]),
            (common.solarize, TF.solarize, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0])):
        want = torch.stack([theirs(image, value) for image, value in zip(images, values)])
        assert_close(ours(images, torch.tensor(values)), want, **PIXEL)
    assert_close(common.grayscale(images), TF.rgb_to_grayscale(images), **PIXEL)


def test_gaussian_blur_equals_torchvision():
    images, sigma = six_pictures(), [0.1, 0.5, 1.0, 1.5, 2.0, 5.0]
    for taps in (3, 7):
        want = torch.stack([TF.gaussian_blur(x, [taps, taps], [s, s]) for x, s in zip(images, sigma)])
        assert_close(common.gaussian_blur(images, torch.tensor(sigma), taps), want, **PIXEL)


def test_resized_crop_equals_torchvision():
    images = six_pictures()
    boxes = [[0, 0, 20, 28], [3, 5, 7, 13], [19, 27, 1, 1], [0, 9, 20, 3], [6, 0, 13, 28], [2, 2, 16, 16]]
    for size in (5, 16, 33):  # smaller and larger than the boxes
        want = torch.stack([TF.resized_crop(x, *box, [size, size], antialias=True) for x, box in zip(images, boxes)])
        assert_close(common.resized_crop(images, torch.tensor(boxes), size), want, **PIXEL)


# ---- without pytest

if __name__ == "__main__":
    passed = failed = 0
    for name, function in [(n, f) for n, f in globals().items() if n.startswith("test_")]:
        try:
            function()
            passed += 1
            print(f"pass  {name}")
        except Exception:
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)
