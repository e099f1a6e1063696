"""What a script owns beside its losses: queues, encoders, optimizers, CutMix, the tree's table; then its whole loop.

The loops run on a few tiny pictures, here in this process: torch is imported once. tests/test_runs.py starts the
scripts as a user does.
"""

import math
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import EPOCHS, IMAGES, STEPS, TIMINGS, arguments, load, log
from test_golden import gradients
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import common
import csml
import hcsc
import hirl_moco
import hirl_simclr
import hirl_swav
import networks
import plumbing
import ranks
from test_losses import (
    EXACT,
    B,
    D,
    L,
    N,
    P,
    Q,
    hcsc_batch,
    lifted,
    on_circle,
    random_tree,
    slow_instance_loss,
    slow_path,
    slow_prototype_loss,
    unit,
)

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


# ---- HCSC: readings and draws


def test_hcsc_released_prototype_loss_vanishes_where_the_batch_meets_all_clusters():  # H3
    """40 clusters at the top, the CIFAR preset's 512 images: nobody has a negative left in the released reading."""
    clusters, batch_size = [1000, 200, 40], hcsc.PRESETS["cifar"]["batch_size"]
    tree = random_tree(clusters, images=50_000)
    index, q = torch.arange(batch_size), unit(batch_size, D, seed=1).requires_grad_()
    masks = [torch.ones(len(index), k) for k in clusters]
    released = common.hcsc_prototype_loss(q, tree, index, masks, unselected="zero", exclude="batch")
    assert len(tree.assign[2][index].unique()) == 40
    assert released[2] == 0 and gradients(released, q)[2].abs().max() == 0
    assert common.hcsc_prototype_loss(q, tree, index, masks)[2] > 1


def test_hcsc_terms_are_means_over_levels_by_default():  # H2
    """The paper's reading against the loops; without instance selection the instance term is InfoNCE."""
    q, k, queue, tree, index, instance, prototype = hcsc_batch()
    terms = hcsc.hcsc_terms([q], k, queue, tree, index, instance, [prototype], 0.2)
    assert_close(terms["instance"].item(), sum(slow_instance_loss(q, k, queue, instance, 0.2)) / L, **EXACT)
    assert_close(terms["prototype"].item(), sum(slow_prototype_loss(q, tree, index, prototype)) / L, **EXACT)
    for reading in (hcsc.PAPER, hcsc.RELEASE):
        terms = hcsc.hcsc_terms([q], k, queue, tree, index, None, [prototype], 0.2, reading)
        assert_close(terms["instance"].item(), hcsc.info_nce(q, k, queue, 0.2).item())


def test_hcsc_draws_follow_the_chances():
    """0 never, 1 always, between them in proportion."""
    chance = torch.tensor([[0.0, 1.0, 0.25]]).expand(40_000, 3)
    drawn, = hcsc.draw([chance], 40_000, ranks.random_state(0, "selection"))
    share = drawn.float().mean(dim=0)
    assert share[0] == 0 and share[1] == 1 and abs(share[2] - 0.25) < 0.01  # 4 standard deviations


def test_hcsc_counts_what_draws_leave_out():
    """3 of 8 queue entries; of the two other clusters of either image 1 of 4; at the top, where all stay, nothing."""
    entries = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    clusters, top = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool), torch.tensor([[0, 1], [1, 0]]) > 0
    found = {name: share.item() for name, share in hcsc.dropped([entries], [clusters, top]).items()}
    assert found == {"dropped_0": 3 / 8, "dropped_prototypes_0": 1 / 4}


# ---- SimCLR: LARS


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


# ---- CsMl: CutMix, neighbours, stages


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
    drawn = torch.cat([csml.draw_neighbours(table, torch.Generator().manual_seed(seed)) for seed in range(100)])
    place = drawn[:, None] == table.repeat(100, 1)  # (100 N, 4)
    assert (place.sum(dim=1) == 1).all()
    assert_close(place.double().mean(dim=0), torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=0.05)


def test_neighbours_are_drawn_from_a_table_on_a_gpu():
    """Where a checkpoint's is after a resume; the fake mode checks devices and needs none."""
    with FakeTensorMode():
        table = torch.zeros(7, 3, dtype=torch.int64, device="cuda")
        assert csml.draw_neighbours(table, torch.Generator().manual_seed(0)).device.type == "cpu"


def test_stage_encoder_reads_the_stages_of_its_trunk():
    """Embeddings as hooks read them off the trunk; stage 4 alone is the Encoder, bit for bit; names stay."""
    for arch in ("tiny", "resnet50"):
        torch.manual_seed(0)
        plain = csml.Encoder(arch, "3x3s2", "mlp-bn", D)
        names, x, seen = [*plain.backbone.state_dict()], torch.randn(2, 3, 32, 32), {}
        alone = csml.StageEncoder(plain, [4], "mlp-bn", D)
        assert torch.equal(alone(x), plain(x))
        several = csml.StageEncoder(plain, [1, 3, 4], "mlp-bn", D)
        assert [*several.backbone.state_dict()] == names
        for stage in (1, 3, 4):
            getattr(plain.backbone, f"layer{stage}").register_forward_hook(
                lambda _, __, out, stage=stage: seen.update({stage: out.mean(dim=(2, 3))}))
        found = several(x).unflatten(1, (3, D))  # (2, 3 D), the last stage last
        for place, stage in enumerate((1, 3, 4)):
            assert_close(found[:, place], several.projectors[str(stage)](seen[stage]))


# ---- SwAV: queue, crops, re-assignment, LARC, learning rate


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


def test_learning_rate_warms_up_and_ends_above_zero():
    """From 1 to 9 over the first fifth, then down to 3: half way down, at 6, in the middle of the rest."""
    rates = [hirl_swav.learning_rate(done, 9.0, 1.0, 3.0, 0.2) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert_close(rates, [1.0, 5.0, 9.0, 6.0, 3.0])
    assert hirl_swav.learning_rate(0.0, 9.0, 1.0, 3.0, 0.0) == 9.0  # no warm-up


def test_cutmix_box_can_be_lifted():
    check_cutmix_box(lifted(csml.cutmix_box))


# ---- whole loops, in the plainest words
# The first epochs of a run once more: one network call a line, no helper. Order matters, and no test of a loss sees
# it: the queue of before the step, the key encoder moved before it encodes, the tree from features in evaluation
# mode, draws by seed, epoch and step, the schedule, one step on the sum of the terms.


def run(script, folder, pictures, *switches, **other):
    """A tiny run of a script (a module) in `folder` -> its args, its rows of the log; other: epochs=2 replaces 3."""
    args = script.parse_args([*arguments(script.__name__, pictures, folder, **other), *switches])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return args, log(folder)


def saved(folder, name="checkpoint.pt"):
    return load(folder / name)


def two_epochs_of_moco(script, args, rows, levels, loss_terms):
    """MoCo v2 in plain words, for the scripts built on it; the terms of the second epoch are loss_terms(...)'s."""
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    model = script.MoCo(script.Encoder("tiny", args.stem, args.projector, 128), 128, 32)
    heads = nn.ModuleList(hirl_moco.level_head(128) for _ in range(levels))
    model.to(memory_format=torch.channels_last)
    trained = [*model.encoder_q.parameters(), *heads.parameters()]
    speed, tree = [torch.zeros_like(p) for p in trained], None
    augmentation = script.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in (0, 1):
        sums = {}
        if epoch == 1:
            x = F.normalize(networks.extract_features(model.encoder_k, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.2, seed=1)
        for step, index, (a, b) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            lr = 0.02 * 16 / 256 * 0.5 * (1 + np.cos(np.pi * (6 * epoch + step) / 12))
            raw = model.encoder_q(a)
            for p_k, p_q in zip(model.encoder_k.parameters(), model.encoder_q.parameters()):
                p_k.data = args.ema_momentum * p_k.data + (1 - args.ema_momentum) * p_q.data
            q, k = F.normalize(raw, dim=1), F.normalize(model.encoder_k(b), dim=1)
            if epoch == 0:
                terms = {"moco": script.info_nce(q, k, model.queue, 0.2)}
            else:
                terms = loss_terms((0, epoch, step), index, q, k, model.queue, tree, [head(raw) for head in heads])
            found = torch.autograd.grad(sum(terms.values()), trained, allow_unused=True)
            for p, v, g in zip(trained, speed, found):
                if g is not None:  # SGD with momentum and weight decay
                    v.mul_(0.9).add_(g + args.weight_decay * p.data)
                    p.data -= lr * v
            model.queue[16 * (step % 2):][:16] = k.detach()  # the older half leaves; HCSC's draws go by place
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / STEPS
        for name, value in sums.items():
            assert_close(rows[epoch + 1][name], value, rtol=1e-4, atol=0)


def path_term(place, index, z, tree):
    """HIRL's loss of level embeddings, against 20 leaves drawn by (seed, epoch, step)."""
    leaves = torch.randint(12, (16, 20), generator=ranks.random_state(*place, "negative paths"))
    z = torch.stack([F.normalize(level, dim=1) for level in z], dim=1)
    return common.semantic_path_loss(z, tree, index, leaves)


def test_the_loop_of_hirl_moco_reads_as_the_papers_say(tmp_path, pictures):
    def terms(place, index, q, k, queue, tree, z):
        return {"moco": hirl_moco.info_nce(q, k, queue, 0.2), "path": 0.1 * path_term(place, index, z, tree)}

    args, rows = run(hirl_moco, tmp_path / "run", pictures, epochs=2, projector="mlp")  # cifar's path weight: 0.1
    two_epochs_of_moco(hirl_moco, args, rows, 3, terms)


@pytest.mark.parametrize("release", (False, True))
def test_the_loop_of_hcsc_reads_as_paper_and_release_say(release, tmp_path, pictures):
    """Chances from queue and tree as they are; instances drawn before prototypes; what --release changes, H1 to H6."""
    def terms(place, index, q, k, queue, tree, _):
        generator = ranks.random_state(*place, "selection")

        def draw(chances):
            return [torch.rand(chance.shape, generator=generator) < chance for chance in chances]

        stay = common.hcsc_instance_selection(queue, tree, index)
        if release:
            stay = [chance.clamp(0, 0.999) for chance in stay]
            scaled = tree._replace(concentration=[0.2 * phi / phi.mean() for phi in tree.concentration])
            *stay_c, top = common.hcsc_prototype_selection(scaled, index)
            stay_c = [chance.clamp(1e-4, 0.999) for chance in stay_c] + [top]
        else:
            stay_c = common.hcsc_prototype_selection(tree, index)
        rest = "zero" if release else "remove"
        instance = common.hcsc_instance_loss(q, k, queue, draw(stay), 0.2, unselected=rest)
        prototype = common.hcsc_prototype_loss(q, tree, index, draw(stay_c), unselected=rest,
                                               exclude="batch" if release else "own")
        weight = 1.0 if release else 0.3
        return {"instance": instance.sum() if release else instance.mean(), "prototype": weight * prototype.mean()}

    flags = ["--prototype-weight", "1", "--release"] if release else ["--prototype-weight", "0.3"]
    args, rows = run(hcsc, tmp_path / "run", pictures, *flags, epochs=2)
    two_epochs_of_moco(hcsc, args, rows, 0, terms)


def test_the_loop_of_simclr_reads_as_described(tmp_path, pictures):
    """LARS, a learning rate that warms up, both views through the encoder at once, the path loss of view 0."""
    args, rows = run(hirl_simclr, tmp_path / "run", pictures, epochs=2, temperature=0.3, weight_decay=0.1,
                     optimizer="lars", lr_warmup=0.25, base_lr=10)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    encoder = hirl_simclr.Encoder("tiny", args.stem, args.projector, 128).to(memory_format=torch.channels_last)
    heads = nn.ModuleList(hirl_simclr.level_head(128) for _ in range(3))
    optimizer = hirl_simclr.LARS([*encoder.parameters(), *heads.parameters()], 0.0, weight_decay=0.1)
    augmentation = hirl_simclr.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in (0, 1):
        sums = {"simclr": 0.0, "path": 0.0}
        if epoch == 1:
            x = F.normalize(networks.extract_features(encoder, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.3, seed=1)
        for step, index, (a, b) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            past = 6 * epoch + step  # of 12 steps, the first 3 warm up
            rate = past / 3 if past < 3 else 0.5 * (1 + np.cos(np.pi * (past - 3) / 9))
            optimizer.param_groups[0]["lr"] = 10 * 16 / 256 * rate
            raw = encoder(torch.cat([a, b]))
            z = F.normalize(raw, dim=1)
            terms = {"simclr": hirl_simclr.nt_xent(z[:16], z[16:], 0.3)}
            if epoch == 1:
                terms["path"] = path_term((0, epoch, step), index, [head(raw[:16]) for head in heads], tree)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] += value.item() / STEPS
        for name in terms:
            assert_close(rows[epoch + 1][name], sums[name], rtol=3e-3, atol=0)  # rounding, magnified step by step
    for name, weight in saved(tmp_path / "run", "backbone.pt").items():
        assert_close(weight, encoder.backbone.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_the_loop_of_csml_reads_as_the_paper_says(tmp_path, pictures):
    """Which view is whose, two layers, a table every second epoch, three epochs.

    Neighbours of the key trunk's features; queries of the image, the neighbour, the image with a box of the neighbour
    in it; the warm-up's weights; the image's key alone in a queue for each layer.
    """
    args, rows = run(csml, tmp_path / "run", pictures, level_weights="0 0 0.5 1", neighbour_weight=0.4,
                     base_lr=0.02)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    encoder = csml.Encoder("tiny", args.stem, args.projector, 128)
    model = csml.MoCo(csml.StageEncoder(encoder, [3, 4], args.projector, 128), 256, 32)
    model.to(memory_format=torch.channels_last)
    queue = {3: F.normalize(model.queue[:, :128], dim=1), 4: F.normalize(model.queue[:, 128:], dim=1)}
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 1.0, momentum=0.9, weight_decay=args.weight_decay)
    augmentation = csml.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in range(EPOCHS):
        sums = {}
        if epoch in (0, 2):
            x = F.normalize(networks.extract_features(model.encoder_k.backbone, train, 16), dim=1)
            table = (x @ x.T).fill_diagonal_(-2).topk(4).indices  # (N, 4)
            share = (100 * (train.labels[:, None] == train.labels[table]).double().mean(dim=(0, 1))).tolist()
        draw = torch.randint(4, (IMAGES, 1), generator=ranks.random_state(0, epoch, "neighbour"))
        train.partner = table.gather(1, draw)[:, 0]
        for step, _, (q, k, n, k_n) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            m, lam = csml.cutmix(q, n, ranks.random_state(0, epoch, step, "cutmix"))
            raw = model.encoder_q(torch.cat([q, n, m])).unflatten(1, (2, 128))  # (48, 2, 128)
            for p_k, p_q in zip(model.encoder_k.parameters(), model.encoder_q.parameters()):
                p_k.data = args.ema_momentum * p_k.data + (1 - args.ema_momentum) * p_q.data
            raw_k = model.encoder_k(torch.cat([k, k_n])).unflatten(1, (2, 128))
            a, b = (1, 0) if epoch == 0 else (0.6, 0.4)
            terms = {}
            for place, (layer, weight) in enumerate(((3, 0.5), (4, 1))):
                q, n, m = F.normalize(raw[:, place], dim=1).split(16)
                k, k_n = F.normalize(raw_k[:, place], dim=1).detach().split(16)

                def nce(query, key):
                    return weight / 3 * csml.info_nce(query, key, queue[layer], 0.2)

                name = "_layer3" if layer == 3 else ""
                terms["image" + name] = a * nce(q, k) + b * nce(q, k_n)
                terms["neighbour" + name] = b * nce(n, k) + a * nce(n, k_n)
                terms["mix" + name] = lam * nce(m, k) + (1 - lam) * nce(m, k_n)
                queue[layer] = torch.cat([queue[layer][16:], k])  # the oldest half leaves
            optimizer.param_groups[0]["lr"] = 0.02 * 16 / 256 * 0.5 * (1 + np.cos(np.pi * (6 * epoch + step) / 18))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / STEPS
        row = rows[epoch + 1]
        for name, value in sums.items():
            assert_close(row[name], value, rtol=1e-3, atol=0)
        assert_close(row["neighbours_same_label"], share, rtol=0, atol=1.0 if epoch else 0.01)


def test_the_loop_of_swav_reads_as_the_papers_say(tmp_path, pictures):
    """Prototypes renormalised before the scores and frozen for three steps, the queue of before the step and only when
    it is full, the schedule with its warm-up, the batch moved in the tree by its second crop before the path loss.
    """
    args, rows = run(hirl_swav, tmp_path / "run", pictures, epochs=2, base_lr=0.3, final_lr=0.02)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    model = hirl_swav.SwAV(hirl_swav.Encoder("tiny", args.stem, args.projector, 128), 128, 24, 32)
    model.heads = nn.ModuleList(hirl_swav.level_head(128) for _ in range(3))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=args.weight_decay)
    view = hirl_swav.AUGMENTATIONS["cifar"]._replace(size=16)
    small = view._replace(size=8, scale=hirl_swav.LOCAL_SCALE["cifar"])
    past = []  # z of both global crops, a step each
    for epoch in (0, 1):
        sums = {"swav": 0.0, "path": 0.0}
        if epoch == 1:
            x = F.normalize(networks.extract_features(model.encoder, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.1, seed=1)
        for step, index, crops in common.batches(train, 16, [view, view, small, small], seed=0, epoch=epoch):
            done = (6 * epoch + step) / 12
            rate = done / 0.2 * 0.3 if done < 0.2 else 0.02 + 0.14 * (1 + np.cos(np.pi * (done - 0.2) / 0.8))
            optimizer.param_groups[0]["lr"] = rate * 16 / 256
            trunk = model.encoder.backbone
            raw = model.encoder.projector(torch.cat([trunk(torch.cat(crops[:2])), trunk(torch.cat(crops[2:]))]))
            z = F.normalize(raw, dim=1).split(16)
            model.swav_prototypes.data = F.normalize(model.swav_prototypes.data, dim=1)
            c, assigned = model.swav_prototypes, []
            for crop in (0, 1):
                before = [zs[crop] for zs in past[-2:]] if len(past) >= 2 else []
                assigned.append(hirl_swav.sinkhorn(torch.cat([z[crop], *before]).detach() @ c.detach().T,
                                                   args.epsilon)[:16])
            pairs = [(i, v) for i in (0, 1) for v in range(4) if v != i]
            terms = {"swav": sum(F.cross_entropy(z[v] @ c.T / 0.1, assigned[i]) for i, v in pairs) / 6}
            if epoch == 1:
                leaf = (z[1] @ tree.prototypes[0].T).argmax(1)
                for level, node in enumerate((leaf, tree.parent[0][leaf], tree.parent[1][tree.parent[0][leaf]])):
                    tree.assign[level][index] = node
                terms["path"] = path_term((0, epoch, step), index, [head(raw[:16]) for head in model.heads], tree)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            if 6 * epoch + step < 3:
                model.swav_prototypes.grad = None
            optimizer.step()
            past.append([z[0].detach(), z[1].detach()])
            for name, value in terms.items():
                sums[name] += value.item() / STEPS
        row = rows[epoch + 1]
        assert row["lr"] == pytest.approx(rate * 16 / 256)
        for name in terms:
            assert_close(row[name], sums[name], rtol=3e-3, atol=0)  # rounding, magnified step by step
    state = saved(tmp_path / "run")
    assert all(map(torch.equal, state["keep"][1], tree.assign))  # the table as it was moved
    assert_close(state["model"]["queue"], torch.stack([torch.cat([past[-1][i], past[-2][i]]) for i in (0, 1)]),
                 rtol=0, atol=0.01)  # of entries of about 0.09: Sinkhorn magnifies rounding by 1 / epsilon


# ---- switches


@pytest.fixture(scope="session")
def plain_moco(pictures, tmp_path_factory):
    """hirl_moco.py --clusters 0, three epochs: its folder, its log without what a clock says."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, timeless(run(hirl_moco, folder, pictures, plain=True)[1])


def timeless(rows):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


@pytest.mark.parametrize("script, off", ((hcsc, {}), (csml, dict(base_lr=0.02))))
def test_without_its_hierarchy_a_script_on_mocos_blocks_is_moco_to_the_last_bit(script, off, plain_moco, pictures,
                                                                               tmp_path):
    """The same rows of the log, backbone and queue, with equal settings."""
    folder, rows = plain_moco
    its = timeless(run(script, tmp_path / "run", pictures, plain=True, **off)[1])
    assert len(rows) == len(its) == EPOCHS + 1 and all(row["moco"] > 0 for row in rows[1:])
    for row, expected in zip(its, rows):
        assert all(row[name] == value for name, value in expected.items() if value is not None)
    ours, theirs = saved(tmp_path / "run", "backbone.pt"), saved(folder, "backbone.pt")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(saved(tmp_path / "run")["model"]["queue"], saved(folder)["model"]["queue"])


def test_csml_resumes_with_the_table_it_had(pictures, tmp_path, monkeypatch):
    """Until the next search the checkpoint's neighbours stay, here others than a search would find."""
    steps, end_step = iter(range(1, 100)), plumbing.Run.end_step

    def stopped_at_the_second(run, *arguments):
        if next(steps) == 2:  # in the epoch that began with a search
            run.signal = signal.SIGTERM
        end_step(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(common.Stop) as stop:
        patch.setattr(plumbing.Run, "end_step", stopped_at_the_second)
        run(csml, tmp_path / "run", pictures, refresh_every=3)
    assert stop.value.code == 143
    state = saved(tmp_path / "run")
    table = state["keep"]
    assert table.shape == (IMAGES, 4) and not (table == torch.arange(IMAGES)[:, None]).any()
    assert all(len(set(row)) == 4 for row in table.tolist()) and 0 <= table.min() and table.max() < IMAGES
    state["keep"] = other = (table + 1) % IMAGES
    torch.save(state, tmp_path / "run/checkpoint.pt")
    run(csml, tmp_path / "run", pictures, "--resume", refresh_every=3)
    assert torch.equal(saved(tmp_path / "run")["keep"], other)


@pytest.mark.parametrize("switches", (
    "--release --multi-crop --local-selection", "--multi-crop --no-instance-selection",
    "--release --no-prototype-selection"))
def test_hcsc_switches(switches, pictures, tmp_path):
    """The terms that a switch brings or takes away, and what it leaves out."""
    before, after = run(hcsc, tmp_path / "run", pictures, *switches.split(), epochs=2)[1][1:]
    assert "moco" in before and "moco" not in after and {"instance", "prototype"} <= after.keys()
    assert ("instance_local" in after) == ("prototype_local" in after) == ("--multi-crop" in switches)
    dropped = [after.get(f"dropped_{level}") for level in range(3)]
    assert dropped == [None] * 3 if "no-instance" in switches else dropped[0] < dropped[1] < dropped[2] < 1
    dropped = [after.get(f"dropped_prototypes_{level}") for level in range(2)]
    assert dropped == [0, 0] if "no-prototype" in switches else 0 < dropped[0] < dropped[1] < 1


def test_warm_up_keeps_its_share_when_epochs_change():
    """A preset's warm-up shrinks with its epochs; what the command line asks for is never changed."""
    preset = hirl_moco.PRESETS["textures"]
    share = preset["warmup_epochs"] / preset["epochs"]
    assert hirl_moco.parse_args([]).warmup_epochs == preset["warmup_epochs"]
    assert hirl_moco.parse_args(["--epochs", "5"]).warmup_epochs == round(5 * share)
    assert hirl_moco.parse_args(["--epochs", "5", "--warmup-epochs", "4"]).warmup_epochs == 4
