"""What the oracles of whole loops take from the code as it is: seeds, views, networks as built, switches, schedules."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import BATCH, IMAGES, STEPS
from PIL import Image
from test_methods import run, saved
from torch.testing import assert_close

import common
import csml
import hcsc
import hirl_dino
import hirl_ibot
import hirl_moco
import hirl_mocov3
import hirl_simclr
import hirl_simsiam
import hirl_swav
import networks
import plumbing
import ranks
from test_losses import on_circle, unit
from textures import PROFILES, texture_profile


def built(script, folder, pictures, monkeypatch, *switches, **other):
    """A script's model as main makes it, untrained."""
    models = []
    monkeypatch.setattr(plumbing.Run, "resume", lambda run, device, model, optimizer: models.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(script, folder, pictures, *switches, **other)
    return models[0]


# ---- chance


def test_each_view_step_epoch_and_seed_draws_anew(pictures):
    """Of pictures that are all the same no two views are; no two orders of the pictures either."""
    train, _ = common.load_data(str(pictures))
    train.pixels = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8).expand(IMAGES, 3, 16, 16)
    orders, views = set(), []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        found = [*common.batches(train, BATCH, [common.Augmentation(size=16)] * 2, seed=seed, epoch=epoch)]
        orders.add(tuple(torch.cat([index for _, index, _ in found]).tolist()))
        views += [view[0] for _, _, pair in found for view in pair]
    assert len(orders) == 3 and len(torch.stack(views).flatten(1).unique(dim=0)) == len(views) == 3 * STEPS * 2


def test_everything_random_follows_the_seed(pictures, tmp_path, monkeypatch):
    seen = []

    def note(module, name, seed):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **how: seen.append(seed(args, how)) or real(*args, **how))

    note(common, "batches", lambda args, how: how["seed"])
    note(common, "hierarchical_kmeans", lambda args, how: how["seed"])  # + epoch, which is 0
    note(ranks, "random_state", lambda args, how: args[0])
    run(hirl_moco, tmp_path / "run", pictures, epochs=1, warmup_epochs=0, seed=3)
    assert {*seen} == {3} and torch.initial_seed() == 3


# ---- data


def test_cifar100_as_torchvision_reads_it(tmp_path, monkeypatch):
    """Labels coarse to fine, pixels (N, 3, H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)

    class CIFAR100:
        base_folder, classes, data = ".", ["apple", "ray", "shark"], pixels.transpose(0, 2, 3, 1)

        def __init__(self, root, train, download):
            self.targets = [0, 1, 2, 0] if train else [1, 2, 0, 0]

    for name, content in dict(train=dict(coarse_labels=[1, 0, 0, 1]), test=dict(coarse_labels=[0, 0, 1, 1]),
                              meta=dict(coarse_label_names=["fish", "fruit"])).items():
        (tmp_path / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", CIFAR100)
    train, test = common.load_data("cifar100", str(tmp_path))
    assert train.labels.tolist() == [[1, 0], [0, 1], [0, 2], [1, 0]] and test.labels[:, 0].tolist() == [0, 0, 1, 1]
    assert train.class_names == [["fish", "fruit"], CIFAR100.classes] and (train.pixels.numpy() == pixels).all()


def test_profiles_of_textures_by_hand():
    """Where a wave of height 0 to 1 is dark: below the middle; narrow parts and wide ones are different classes."""
    height = torch.linspace(0, 1, 101)
    for family, edges in (("stripes", (0.5, 0.5, 0.76)), ("spots", (0.5, 0.28, 0.62)), ("swirls", (0.5, 0.5, 0.76))):
        for profile, edge in zip(PROFILES, edges):
            assert abs((texture_profile(height, family, profile) < 0.5).float().mean() - edge) < 0.015


def test_knn_accuracy_is_the_classifiers_at_every_depth():
    x, y = torch.randn(60, 5, generator=torch.manual_seed(0)), torch.randint(3, (60, 2))
    train, test = (common.Images([""] * len(part), part, [[*"abc"]] * 2) for part in (y[:50], y[50:]))
    found = common.knn_accuracy(train, test, lambda images: x[:50] if images is train else x[50:])
    votes = [common.knn_classify(x[:50], y[:50, d], x[50:], 3, k=20, temperature=0.07).argmax(1) for d in (0, 1)]
    assert found == pytest.approx([100 * (v == y[50:, d]).double().mean().item() for d, v in enumerate(votes)])


# ---- networks as built


def test_heads_are_built_as_described(pictures, tmp_path, monkeypatch):
    for script in (hirl_moco, hcsc, csml, hirl_simclr, hirl_swav):
        for projector, kinds in (("mlp", "Linear ReLU Linear"), ("mlp-bn", "Linear BatchNorm1d ReLU Linear")):
            layers = script.Encoder("tiny", "3x3", projector, 8).projector
            assert " ".join(type(layer).__name__ for layer in layers) == kinds
    for layers, last in ((2, nn.Linear), (3, nn.BatchNorm1d)):  # hirl_mocov3.py: a norm at the end of three layers
        model = built(hirl_mocov3, tmp_path / f"{layers}", pictures, monkeypatch, projector_layers=layers)
        assert isinstance(model.predictor[-1], last)


def test_the_tokens_of_all_crops_share_one_batch_norm():
    backbone = networks.backbone("vit-4-32-1", "7x7", 8)
    encoder, calls = hirl_ibot.Encoder(*backbone, "mlp-bn", 24, 16, 20, False, 0.1), []
    encoder.projector.register_forward_pre_hook(lambda _, x: calls.append(len(x[0])))
    hirl_ibot.encode_crops(encoder, [torch.rand(3, 3, 8, 8) for _ in range(4)])
    assert calls == [4 * 3 + 2 * 3 * 4]  # a class token a crop, four patches of the global ones


def test_the_teacher_of_dino_sees_both_global_crops_at_once(pictures, tmp_path, monkeypatch):
    sizes, forward = [], hirl_dino.Encoder.forward  # in training mode the teacher alone comes through here
    monkeypatch.setattr(hirl_dino.Encoder, "forward",
                        lambda self, x: self.training and sizes.append(len(x)) or forward(self, x))
    run(hirl_dino, tmp_path / "run", pictures, plain=True, epochs=1)
    assert sizes == [2 * BATCH] * STEPS


def test_zero_init_is_of_each_blocks_last_norm(pictures, tmp_path, monkeypatch):
    model = built(hirl_simsiam, tmp_path / "run", pictures, monkeypatch, "--zero-init", arch="resnet50")
    assert all(not block.bn3.weight.any() and block.bn2.weight.all() for block in model.encoder.backbone.layer2)


@pytest.mark.parametrize("script", (hirl_dino, hirl_ibot))
def test_the_last_layer_may_be_free(script, pictures, tmp_path, monkeypatch):
    model = built(script, tmp_path / "run", pictures, monkeypatch, "--free-last-layer")
    assert model.student.weight_g.requires_grad and not model.teacher.weight_g.requires_grad


# ---- learning rates


def test_the_predictors_rate_may_follow_the_schedule(pictures, tmp_path):
    run(hirl_simsiam, tmp_path / "run", pictures, "--no-fix-predictor-lr", plain=True, epochs=1, predictor_lr=3)
    trunk, predictor = saved(tmp_path / "run")["optimizer"]["param_groups"]
    assert predictor["lr"] == pytest.approx(3 * trunk["lr"]) and trunk["lr"] > 0


def test_larc_alone_decays_and_all_rates_scale_with_the_batch(pictures, tmp_path, monkeypatch):
    seen, learning_rate = set(), hirl_swav.learning_rate
    monkeypatch.setattr(hirl_swav, "learning_rate", lambda *args: seen.add(args[1:4]) or learning_rate(*args))
    rates = dict(start_lr=1, base_lr=2, final_lr=3)
    run(hirl_swav, tmp_path / "run", pictures, plain=True, epochs=1, optimizer="larc", **rates)
    group, = saved(tmp_path / "run")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0
    assert {*map(float, *seen)} == {BATCH / 256, 2 * BATCH / 256, 3 * BATCH / 256}


# ---- switches of a step


def test_swavs_queue_counts_once_it_is_filled_anew(pictures, tmp_path, monkeypatch):
    """From --queue-epoch on it fills, 24 places by 16 of a step; two steps later it counts."""
    used, real = [], hirl_swav.SwAV.assignments
    monkeypatch.setattr(hirl_swav.SwAV, "assignments",
                        lambda model, scores, use, *how: used.append(use) or real(model, scores, use, *how))
    run(hirl_swav, tmp_path / "run", pictures, plain=True, epochs=2, queue_epoch=1, queue_size=24)
    assert used == [False] * (STEPS + 2) + [True] * (STEPS - 2)


def test_prototypes_in_use_by_hand():
    """Those that were nearest within the last two steps."""
    model = hirl_swav.SwAV(nn.Linear(2, 2), 3, 4, 0)
    for now, nearest, in_use in ((5, (1, 2), 2), (6, (2, 2), 2), (7, (3, 3), 2), (8, (0, 1), 3), (9, (0, 0), 2)):
        scores = F.one_hot(torch.tensor(nearest), 4)[:, None].float()  # (2, 1, P)
        assert model.in_use(scores, torch.tensor(now), 2) == in_use


def test_small_crops_are_smaller_parts_with_draws_of_their_own(pictures, tmp_path, monkeypatch):
    """hcsc.py --multi-crop: four of them, queries all, the key's view none."""
    views, seen, batches, terms = [], [], common.batches, hcsc.hcsc_terms
    monkeypatch.setattr(common, "batches", lambda i, n, a, **how: views.extend(a) or batches(i, n, a, **how))
    monkeypatch.setattr(hcsc, "hcsc_terms", lambda q, *how: seen.append((len(q), how[5])) or terms(q, *how))
    _, rows = run(hcsc, tmp_path / "run", pictures, "--multi-crop", epochs=2)
    assert [view.size for view in views[2:6]] == [14, 11, 9, 7]
    assert [view.scale[0] / views[0].scale[0] for view in views[2:6]] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7])
    assert seen and all(n == 5 and not torch.equal(masks[1][0], masks[2][0]) for n, masks in seen)
    assert rows[1]["moco"] > 2 * math.log(33)  # a sum over the five


@pytest.mark.parametrize("queue_size, kept", ((32, True), (24, False)))
def test_memberships_are_kept_where_the_queue_is_a_multiple_of_the_batch(queue_size, kept, pictures, tmp_path,
                                                                         monkeypatch):
    """One list a tree. Else none: uneven blocks may round otherwise, and a resumed run would not be equal."""
    seen, select = [], hcsc.select
    monkeypatch.setattr(hcsc, "select", lambda *how: seen.append(how[5][0]) or select(*how))
    args, _ = run(hcsc, tmp_path / "run", pictures, epochs=2, queue_size=queue_size)
    assert args.batch_size == 16 and len(seen) > 1 and all(member is seen[0] for member in seen)
    assert (seen[0] is not None) == kept


def test_amp_is_of_the_networks_and_losses_are_in_single_precision(pictures, tmp_path, monkeypatch):
    seen, raw, nce, forward = set(), set(), hirl_moco.info_nce, hirl_moco.Encoder.forward

    def noted(encoder, x):
        y = forward(encoder, x)
        raw.add(y.dtype)
        return y

    monkeypatch.setattr(hirl_moco, "info_nce", lambda *x: seen.update(part.dtype for part in x[:3]) or nce(*x))
    monkeypatch.setattr(hirl_moco.Encoder, "forward", noted)
    run(hirl_moco, tmp_path / "run", pictures, "--amp", plain=True, epochs=1, image_size=32)
    assert (seen, raw) == ({torch.float32}, {torch.bfloat16})


def test_knn_comes_when_it_is_due(pictures, tmp_path):
    _, rows = run(hirl_moco, tmp_path / "run", pictures, plain=True, epochs=3, eval_every=2)
    assert [row["knn"] is not None for row in rows] == [True, False, True, True]  # always before and after


@pytest.mark.parametrize("aspect, height, width", ((0.0, 2, 7), (0.5, 4, 4), (0.999, 7, 2)))
def test_a_block_of_ibots_mask_by_hand(aspect, height, width):
    """Area 16 of 14 x 14 patches; height / width from 0.3 to 1 / 0.3."""
    mask, = hirl_ibot.block_masks(torch.tensor([[[0.0, aspect, 0.0, 0.0]]]), torch.tensor([0.5]), 14)
    assert (int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())) == (height, width)


# ---- what a run leaves


def test_the_last_tree_is_of_the_key_encoder(pictures, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(plumbing, "write_tree", lambda folder, images, x, tree: left.append((images, x)))
    args, _ = run(hirl_moco, tmp_path / "run", pictures, epochs=2)
    encoder = hirl_moco.Encoder("tiny", args.stem, args.projector, args.dim)
    encoder.load_state_dict({name.removeprefix("encoder_k."): value for name, value in saved(tmp_path / "run")[
        "model"].items() if name.startswith("encoder_k.")})
    (images, x), = left
    assert_close(x, F.normalize(networks.extract_features(encoder, images, 16), dim=1))


def test_a_tree_shows_the_nearest_first(tmp_path):
    """Two groups on a circle; of the fuller one's leaf, then of the other's, by distance to the prototype."""
    images, shown = common.Images([*"abcde"], torch.zeros(5, 1, dtype=torch.int64), [["a"]]), []
    images.picture = lambda i: shown.append(i) or Image.new("RGB", (8, 8))
    x = on_circle(30, 0, 50, 180, 170).float()
    tree = common.hierarchy_from_centroids(x, [on_circle(10, 180).float()], 0.2)
    plumbing.write_tree(tmp_path, images, x, tree)
    assert shown == [1, 0, 2, 3, 4]


def test_spread_of_embeddings():
    spread = unit(4000, 16)
    assert abs(plumbing.feature_std(spread) - 1) < 0.02 and plumbing.feature_std(spread[:1].expand(9, 16)) < 1e-6
