"""Where papers, releases and scripts meet: what docstrings claim about them, checked."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import csml
import hcsc
import hirl_moco
import hirl_swav
import ranks

DIM = 8


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))), dim=-1)


def random_tree(n, sizes, dim=DIM):
    """A Hierarchy of n images: clusters of near equal size, random prototypes and parents."""
    generator = torch.Generator().manual_seed(n)
    parent = [torch.arange(k) % above for k, above in zip(sizes, sizes[1:])]
    assign = [torch.randperm(n, generator=generator) % sizes[0]]
    for up in parent:
        assign.append(up[assign[-1]])
    return common.Hierarchy([unit(k, dim) for k in sizes], assign, parent, [torch.full((k,), 0.2) for k in sizes])


def test_lambda_of_csml_is_beta_2_2(monkeypatch):
    """Mean 1/2, variance 1/20 and P(lam < 1/4) = 3/16 - 2/64 = 5/32 of Beta(2, 2); uniform: 1/12 and 1/4."""
    drawn = []
    monkeypatch.setattr(csml, "cutmix_box", lambda height, width, lam, center: drawn.append(lam) or (0, 0, 0, 0, lam))
    picture = torch.zeros(1, 1, 2, 2)
    for step in range(4000):
        csml.cutmix(picture, picture, ranks.random_state(0, 0, step, "cutmix"))
    lam = torch.tensor(drawn)
    assert abs(lam.mean() - 0.5) < 0.015 and abs(lam.var() - 0.05) < 0.004  # 4 standard deviations
    assert abs((lam < 0.25).float().mean() - 5 / 32) < 0.023
    again = csml.cutmix(picture, picture, ranks.random_state(0, 0, 0, "cutmix"))[1]
    assert again == drawn[0]  # from the step's generator: the same on every rank and after a resume


@pytest.mark.parametrize("batch_size, clusters, left", [(32, 3000, 2967), (64, 108, 59), (64, 27, 2.3), (64, 9, 0),
                                                        (512, 200, 15), (512, 40, 0)])
def test_negatives_left_by_the_released_exclusion(batch_size, clusters, left):  # H3, H4
    """(K - 1) (1 - 1/K)^B, as the docstring of hcsc.Reading says; where none is left the loss is exactly 0."""
    assert left == pytest.approx((clusters - 1) * (1 - 1 / clusters) ** batch_size, rel=0.03, abs=0.01)
    tree, found, empty = random_tree(12 * clusters, [clusters]), [], []
    for draw in range(400):
        index = torch.randint(12 * clusters, (batch_size,), generator=torch.Generator().manual_seed(draw))
        found.append(clusters - len(torch.cat([tree.assign[0][index], torch.tensor([clusters - 1])]).unique()))
        if draw < 2:
            q = unit(batch_size, DIM)
            loss = common.hcsc_prototype_loss(q, tree, index, [torch.ones(batch_size, clusters)], exclude="batch")
            empty.append((loss.item() == 0) == (found[-1] == 0))
    assert sum(found) / len(found) == pytest.approx(left, rel=0.1, abs=0.1) and all(empty)


def test_dropped_shares_count_no_own_prototype():
    """By hand: of 5 prototypes an image has 4 others; the first keeps 3 of them, the second 1: half is left out."""
    masks = [torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool(), torch.ones(2, 3).bool()]
    shares = hcsc.dropped([torch.tensor([[1, 1, 0, 0]]).bool()], masks)
    assert {name: float(share) for name, share in shares.items()} == {"dropped_0": 0.5, "dropped_prototypes_0": 0.5}
    assert "dropped_0" not in hcsc.dropped(None, masks)


def test_memberships_that_are_kept_give_the_chances_taken_anew():
    """After every change of rows; a row that changed but is not named keeps its old chances."""
    tree, index, queue, member = random_tree(60, [12, 4]), torch.arange(20), unit(30, DIM).clone(), []
    for start in (0, 7, 25):  # the last wraps around
        changed = torch.arange(start, start + 7) % 30
        if member:
            queue[changed] = unit(7, DIM).roll(start, 0)
        kept = common.hcsc_instance_selection(queue, tree, index, member=member, changed=changed)
        for one, other in zip(kept, common.hcsc_instance_selection(queue, tree, index)):
            torch.testing.assert_close(one, other)
    softmax = []
    for images in (index, index + 20):  # of prototypes, filled by the first call and used by the second
        for one, other in zip(common.hcsc_prototype_selection(tree, images, member=softmax),
                              common.hcsc_prototype_selection(tree, images)):
            assert torch.equal(one, other)
    assert [tuple(m.shape) for m in softmax] == [(4, 12)]
    queue[0] = unit(2, DIM)[0]
    unnamed, = common.hcsc_instance_selection(queue, tree, index, member=member, changed=torch.tensor([1, 2]))[:1]
    anew, = common.hcsc_instance_selection(queue, tree, index)[:1]
    torch.testing.assert_close(unnamed, kept[0])
    assert (unnamed - anew)[:, 0].abs().max() > 0.01 and (unnamed - anew)[:, 1:].abs().max() < 1e-6


def test_the_own_prototype_is_never_drawn():
    tree, index = random_tree(60, [12, 4]), torch.arange(20)
    for reading in (hcsc.PAPER, hcsc.RELEASE):
        _, chances = hcsc.select(unit(30, DIM), tree, index, 0.2, reading)
        for chance, assign in zip(chances, tree.assign):
            assert (chance.gather(1, assign[index, None]) == 0).all()


def test_prototype_weight_scales_the_prototype_terms_alone():
    tree, index, q, k, queue = random_tree(60, [12, 4]), torch.arange(20), unit(20, DIM), unit(20, DIM), unit(30, DIM)
    masks = [torch.ones(20, 30)] * 2, [[torch.ones(20, 12), torch.ones(20, 4)]] * 2
    once, third = (hcsc.hcsc_terms([q, -q], k, queue, tree, index, *masks, 0.2, hcsc.Reading(prototype_weight=weight))
                   for weight in (1.0, 0.3))
    for name, term in once.items():
        assert third[name].item() == pytest.approx(term.item() * (0.3 if "prototype" in name else 1), rel=1e-6)
    for flags, weight in {"": 0.3, "--preset cifar": 0, "--preset photos": 0.1, "--preset imagenet": 1, "--release": 1,
                          "--prototype-weight 0 --release": 0}.items():
        assert hcsc.parse_args(flags.split()).prototype_weight == weight


def test_instance_term_of_equal_logits_follows_from_the_share_dropped():
    """What hcsc.py says instance scores at chance: the mean over the levels of ln(1 + Q (1 - dropped_l))."""
    one, queue = unit(1, DIM).expand(6, DIM), unit(1, DIM).expand(40, DIM)
    masks = [torch.arange(40).expand(6, 40) < 30, torch.arange(40).expand(6, 40) < 10]
    dropped = hcsc.dropped(masks, [])
    loss = common.hcsc_instance_loss(one, queue[:6], queue, masks, 0.2).mean().item()
    assert loss == pytest.approx(sum(math.log(1 + 40 * (1 - float(d))) for d in dropped.values()) / 2, rel=1e-6)


def test_small_crops_leave_the_others_out_of_their_own_assignment():
    """swapped_prediction: the assignment of crop i is predicted by the C - 1 other crops."""
    scores = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    assigned = scores[:2].softmax(dim=2)
    pairs = [(i, v) for i in (0, 1) for v in range(4) if v != i]
    expected = sum(F.cross_entropy(scores[v] / 0.1, assigned[i]) for i, v in pairs) / 6
    assert hirl_swav.swapped_prediction(scores, assigned, 0.1).item() == pytest.approx(expected.item(), rel=1e-6)


def test_presets_of_csml_are_not_those_of_hirl_moco():
    """--neighbours 0 equals hirl_moco.py --clusters 0 only where all settings are alike, as the docstring says."""
    one, other = csml.parse_args([]), hirl_moco.parse_args([])
    assert (one.epochs, one.batch_size, one.base_lr) != (other.epochs, other.batch_size, other.base_lr)
