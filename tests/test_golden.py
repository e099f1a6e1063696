"""The authors' released code, run once on the CPU in double precision (golden/*.npz): losses, gradients, steps.

A file holds what went in and what came out under the names of that code; H1-H14, R1-R13, C1-C10 are known differences
between papers and releases. Float64 must agree to 1e-9, and float32 to what it can.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import common
import csml
import hcsc
import hirl_moco
import hirl_simclr
import hirl_swav
from test_losses import EXACT, SINGLE, Q, unit

GOLDEN = Path(__file__).resolve().parent / "golden"


def golden(name):
    """The arrays of one golden file; a bare number becomes a Python float or int."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    return {key: arrays[key].item() if arrays[key].ndim == 0 else torch.from_numpy(arrays[key])
            for key in arrays.files}


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
        clipped, _ = hcsc.select(queue, tree, g["index"], g["T"], hcsc.RELEASE)
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
        _, keep = hcsc.select(unit(Q, 16), tree, g["index"], g["T"], hcsc.RELEASE)
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
        terms = hcsc.hcsc_terms([q, *small], k, queue, tree, index, instance, prototype, g["T"], hcsc.RELEASE,
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


def test_nearest_neighbours_golden():
    """Its tables; among exact doubles the release may name a row as its own neighbour, which is a deviation here."""
    g = golden("csml")
    assert torch.equal(common.nearest_neighbours(g["knn_features"], g["knn_k"]), g["knn_index"])
    x, released = g["knn_dup_features"], g["knn_dup_index_upstream"]
    found, row = common.nearest_neighbours(x, g["knn_k"]), torch.arange(len(x))[:, None]
    assert (released == row).any() and not (found == row).any()  # DEVIATION: never a neighbour of its own
    for ours, theirs, i in zip(found.tolist(), released.tolist(), range(len(x))):
        if i not in theirs:  # then the release left out the row itself, and only ties may differ
            assert_close((x[ours] @ x[i]).double(), (x[theirs] @ x[i]).double(), rtol=0, atol=1e-6)


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


def test_reassignment_golden():
    """The released iteration-wise assignment: the batch's rows at every level, no other row."""
    g = golden("hirl_spd")
    tree = fixture_tree(g, [g["cluster2cluster_0"], g["cluster2cluster_1"]])
    hirl_swav.reassign(tree, g["index"], g["iter_key"])
    for level in range(3):
        assert torch.equal(tree.assign[level], g[f"iter_im2cluster_after_{level}"])


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


def test_hierarchy_from_centroids_golden():
    """The tree of given centroids: assignments, unit prototypes, parents and PCL's phi, also of tiny clusters."""
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
