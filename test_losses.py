"""What the losses promise, checked against loops one can read.

Each loss here meets five kinds of test. An oracle: a `slow_` function above its test, explicit loops over the paper's
symbols in plain Python numbers. Values by hand: a few unit vectors whose angles one can draw. Edges: no negative, one
image, rounding. Laws: one table of these losses, and what must hold for any numbers. Lift: the source of the loss
alone, pasted into an empty file, passes its oracle again. The code under test is always imported, never written twice.
The losses of SimSiam, MoCo v3, DINO and iBOT are in tests/test_bases1.py and tests/test_bases2.py, figures of the
authors' own code in tests/test_golden.py, whole steps of the scripts in tests/test_methods.py.

    pytest test_losses.py          or, without pytest,          python test_losses.py
"""

import inspect
import math
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.testing import assert_close

import common
import csml
import hirl_moco
import hirl_simclr
import hirl_swav

# All sizes differ, so that a transposed or swapped dimension cannot go unnoticed.
B, L, D, M, N, Q = 5, 3, 7, 9, 23, 13  # batch, levels, embedding, negative paths, images, queue
K = (11, 6, 4)  # clusters per level, level 0 the finest
EXACT = dict(rtol=1e-9, atol=1e-9)  # float64 against the loops
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


def test_path_loss_of_a_prototype_at_the_origin_is_neutral():
    """Images that cancel out leave a centroid of length 0. It is like nothing: cosine 0, factor 1/2, never NaN."""
    z, hierarchy, index, leaves = path_batch()
    hierarchy.prototypes[0][leaves[0]] = hierarchy.prototypes[2][0] = 0
    z.requires_grad_()
    loss = common.semantic_path_loss(z, hierarchy, index, leaves)
    loss.backward()
    assert_close(loss.item(), slow_semantic_path_loss(z.detach(), hierarchy, index, leaves), **EXACT)
    assert z.grad.isfinite().all()


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


# ---- HCSC: selection and the two losses


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


def check_hcsc_selections(instance_selection, prototype_selection):
    for sizes in (K, (8,), (12, 10, 6, 4)):
        _, _, queue, tree, index, _, _ = hcsc_batch(sizes, seed=len(sizes))
        tree.concentration[0][2] = 1e-5  # under the floor
        for ours, slow in zip(instance_selection(queue, tree, index), slow_instance_selection(queue, tree, index),
                              strict=True):
            assert_close(ours, slow, **EXACT)
        tree.concentration[0][2] = 0.3
        for ours, slow in zip(prototype_selection(tree, index), slow_prototype_selection(tree, index), strict=True):
            assert_close(ours, slow, **EXACT)


def test_hcsc_selections_equal_the_loops():  # HCSC, selection of instances and of prototypes
    check_hcsc_selections(common.hcsc_instance_selection, common.hcsc_prototype_selection)


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
        except KeyError as error:
            assert str(error) in ("'drop'", "'all'")
        else:
            raise AssertionError("accepted")


# ---- SimCLR: NT-Xent


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


def test_nt_xent_of_one_image_is_zero_and_of_exchanged_views_the_same():
    """An image alone has nobody to be confused with; neither view is the first."""
    one, other = unit(1, D).requires_grad_(), unit(1, D, seed=1)
    loss = hirl_simclr.nt_xent(one, other, 0.2)
    loss.backward()
    assert_close(loss.item(), 0.0)
    assert_close(one.grad, torch.zeros_like(one))
    z1, z2 = unit(B, D, seed=1), unit(B, D, seed=2)
    assert_close(hirl_simclr.nt_xent(z2, z1, 0.2), hirl_simclr.nt_xent(z1, z2, 0.2))


# ---- CsMl: six InfoNCE losses in one


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


def test_csml_loss_in_the_warm_up_is_info_nce_of_either_picture_and_the_mix():
    q, k, queue = unit(3, B, D, seed=1), unit(2, B, D, seed=2), unit(Q, D, seed=3)
    image, other, mix = csml.csml_loss(q, k, queue, 1.0, (1, 0), 0.2)
    for term, query, key in ((image, q[0], k[0]), (other, q[1], k[1]), (mix, q[2], k[0])):  # lam 1: nothing mixed in
        assert_close(3 * term, csml.info_nce(query, key, queue, 0.2))


def test_csml_terms_reach_their_own_query_alone():
    """What is learnt from the image tells nothing to its neighbour or to the mixed picture."""
    q, k, queue = unit(3, B, D, seed=1).requires_grad_(), unit(2, B, D, seed=2), unit(Q, D, seed=3)
    for i in range(3):
        gradient, = torch.autograd.grad(csml.csml_loss(q, k, queue, 0.3, (0.6, 0.4), 0.2)[i], q)
        assert (gradient.abs().sum(dim=(1, 2)) > 0).tolist() == [j == i for j in range(3)]


# ---- SwAV: assignments and swapped prediction

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


def test_swapped_prediction_judges_a_global_crop_by_the_other_one_alone():
    """Crop 0 never sees its own assignment: another one changes nothing for it, and something for all others.

    Local crops are judged by both and may change places; the global ones only with their assignments.
    """
    scores, assignments = swav_batch()
    scores.requires_grad_()
    other = assignments.clone()
    other[0] = other[0].flip(1)
    before, after = (torch.autograd.grad(hirl_swav.swapped_prediction(scores, a, 0.5), scores)[0]
                     for a in (assignments, other))  # (C, B, P)
    assert torch.equal(before[0], after[0]) and not torch.isclose(before[1:], after[1:]).all(dim=2).any()
    loss = hirl_swav.swapped_prediction(scores, assignments, 0.1)
    assert_close(hirl_swav.swapped_prediction(scores[[0, 1, 3, 2]], assignments, 0.1), loss)
    assert_close(hirl_swav.swapped_prediction(scores[[1, 0, 2, 3]], assignments.flip(0), 0.1), loss)
    assert not torch.isclose(hirl_swav.swapped_prediction(scores[[1, 0, 2, 3]], assignments, 0.1), loss)


# ---- laws: what holds for every loss, whatever the numbers


class Law(NamedTuple):
    """A loss and what is known about its arguments."""

    loss: Callable  # loss(*tensors, temperature=...) -> a scalar
    tensors: tuple
    images: tuple  # the dimension of each tensor that counts images; None: it holds none
    trained: int  # this many tensors, from the first on, are trained
    sets: tuple = ()  # {tensor: dimension} whose order, in all of them alike, means nothing: a queue, paths, prototypes
    chance: float | None = None  # what a network that tells nothing apart scores


def laws():
    """The tree that some of the losses read, and {name: Law}. The tree asks for gradients, and must get none."""
    tree, index = random_tree(), torch.arange(B) * 3
    for tensor in (*tree.prototypes, *tree.concentration):
        tensor.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    leaves = torch.randint(K[0], (B, M), generator=generator)
    mask, *masks = (torch.rand(B, n, generator=generator) < 0.6 for n in (Q, *K))
    q, k, queue = unit(B, D, seed=1), unit(B, D, seed=2), unit(Q, D, seed=3)

    def path(z, index, leaves, temperature=None):  # it has none
        return common.semantic_path_loss(z, tree, index, leaves)

    def instances(q, k, queue, mask, temperature=0.2):
        return common.hcsc_instance_loss(q, k, queue, [mask], temperature)[0]

    def prototypes(q, index, *masks, temperature=0.2):  # phi of about this size
        its = tree._replace(concentration=[phi * temperature / 0.2 for phi in tree.concentration])
        return common.hcsc_prototype_loss(q, its, index, masks, exclude="batch").sum()

    def all_of_csml(q, k, queue, temperature=0.2):
        return csml.csml_loss(q, k, queue, 0.3, (0.6, 0.4), temperature).sum()

    def nce(q, k, queue, temperature=0.2):
        return hirl_moco.info_nce(q, k, queue, temperature)

    def simclr(z1, z2, temperature=0.2):
        return hirl_simclr.nt_xent(z1, z2, temperature)

    def swav(scores, assignments, temperature=0.1):
        return hirl_swav.swapped_prediction(scores, assignments, temperature)

    return tree, {
        "InfoNCE": Law(nce, (q, k, queue), (0, 0, None), 1, {2: 0}, math.log(1 + Q)),
        "HIRL's paths": Law(path, (unit(B, L, D), index, leaves), (0, 0, 0), 1, {2: 1}),
        "HCSC's instances": Law(instances, (q, k, queue, mask), (0, 0, None, 0), 1, {2: 0, 3: 1}),
        "HCSC's prototypes": Law(prototypes, (q, index, *masks), (0, 0, 0, 0, 0), 1),
        "NT-Xent": Law(simclr, (q, k), (0, 0), 2, {}, math.log(2 * B - 1)),
        "CsMl": Law(all_of_csml, (unit(3, B, D), unit(2, B, D, seed=1), queue), (1, 1, None), 1, {2: 0},
                    math.log(1 + Q)),
        "SwAV": Law(swav, swav_batch(), (1, 1), 1, {0: 2, 1: 2}, math.log(P)),
    }


def test_the_order_of_the_images_does_not_matter_but_what_belongs_together_does():
    order = torch.tensor([3, 0, 4, 1, 2])
    for name, law in laws()[1].items():
        shuffled = [t if dim is None else t.index_select(dim, order) for t, dim in zip(law.tensors, law.images)]
        assert_close(law.loss(*shuffled), law.loss(*law.tensors), msg=lambda m: f"{name}: {m}")
        assert not torch.isclose(law.loss(shuffled[0], *law.tensors[1:]), law.loss(*law.tensors)), name


def test_the_order_of_negatives_does_not_matter():
    for name, law in laws()[1].items():
        flipped = [t.flip(law.sets[i]) if i in law.sets else t for i, t in enumerate(law.tensors)]
        assert_close(law.loss(*flipped), law.loss(*law.tensors), msg=lambda m: f"{name}: {m}")


def test_the_gradient_reaches_what_is_trained_and_nothing_else():
    """And it is that of the value: gradcheck compares with differences of the loss."""
    tree, losses = laws()
    for name, law in losses.items():
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in law.tensors]
        law.loss(*leaves).backward()
        reached = [i for i, t in enumerate(leaves) if t.grad is not None and t.grad.norm() > 0]
        assert reached == list(range(law.trained)), name
        assert all(t.grad is None for t in (*tree.prototypes, *tree.concentration)), name
        rest = law.tensors[law.trained:]
        assert torch.autograd.gradcheck(lambda *trained: law.loss(*trained, *rest), leaves[:law.trained]), name
    queue, index = unit(Q, D).requires_grad_(), torch.arange(B)
    for chances in (common.hcsc_instance_selection(queue, tree, index), common.hcsc_prototype_selection(tree, index)):
        assert not any(chance.requires_grad for chance in chances)


def test_a_network_that_tells_nothing_apart_scores_the_chance_level():
    for name, law in laws()[1].items():
        if law.chance:  # all embeddings the same; of SwAV all scores, whatever was assigned
            same = [unit(1, t.shape[-1]).expand_as(t) for t in law.tensors]
            same = same if name != "SwAV" else [torch.full_like(law.tensors[0], 0.4), law.tensors[1]]
            assert_close(law.loss(*same).item(), law.chance, msg=lambda m: f"{name}: {m}")


def test_low_temperatures_in_single_precision():
    """At temperature 0.001 exp(q.k/T) overflows float32 by far; neither a loss nor its gradient may."""
    for name, law in laws()[1].items():
        single = [t.float() if t.is_floating_point() else t for t in law.tensors]
        single[0].requires_grad_()
        loss = law.loss(*single, temperature=1e-3)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and single[0].grad.isfinite().all(), name
    q = unit(B, D, dtype=torch.float32)  # found at once, and missed by as much as can be
    three, two = q.expand(3, B, D), q.expand(2, B, D)
    for best, worst in ((hirl_moco.info_nce(q, q, -q, 1e-3), hirl_moco.info_nce(q, -q, q, 1e-3)),
                        (hirl_simclr.nt_xent(q, q, 1e-3), hirl_simclr.nt_xent(q, -q, 1e-3)),
                        (csml.csml_loss(three, two, -q, 0.5, (1, 0), 1e-3),
                         csml.csml_loss(three, -two, q, 0.5, (1, 0), 1e-3))):
        assert_close(best.sum().item(), 0.0)
        assert 1000 < worst.sum() <= 2000.1


# ---- lift: each loss alone in an empty file


def lifted(function):
    """The function compiled from its source alone, as if pasted into an empty file."""
    namespace = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(function), namespace)
    return namespace[function.__name__]


def test_losses_can_be_lifted():
    check_semantic_path_loss(lifted(common.semantic_path_loss))
    check_info_nce(lifted(hirl_moco.info_nce))
    check_hcsc_losses(lifted(common.hcsc_instance_loss), lifted(common.hcsc_prototype_loss))
    check_hcsc_selections(lifted(common.hcsc_instance_selection), lifted(common.hcsc_prototype_selection))
    check_nt_xent(lifted(hirl_simclr.nt_xent))
    check_csml_loss(lifted(csml.csml_loss))
    check_sinkhorn(lifted(hirl_swav.sinkhorn))
    check_swapped_prediction(lifted(hirl_swav.swapped_prediction))


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
