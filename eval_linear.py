# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""How good is a backbone? Linear probe, kNN, fine-tuning with few labels, clustering, the learnt tree.

a run                    python eval_linear.py --run runs/hirl_moco-textures-0
everything               python eval_linear.py --run runs/x --protocol linear knn finetune cluster hierarchy
papers' linear protocol  python eval_linear.py --run runs/x --protocol linear --linear augment
one per cent of labels   python eval_linear.py --run runs/x --protocol linear finetune --labels 0.01
somebody else's weights  python eval_linear.py --backbone FILE --arch resnet50 --data /imagenet
the baseline             python eval_linear.py --run runs/x --untrained --out untrained.json

  linear     softmax regression on the frozen backbone, one for every --lr, all trained at once. The features are
             standardised by the training pictures' mean and deviation: an affine map, the probe stays linear.
             --linear features: of the central crop, computed once; augment: of random crops and flips
  knn        each of the k most similar training pictures votes exp(cosine / temperature)
  finetune   the whole network (a copy) and a new linear layer, on random crops and flips; tested 20 times
  cluster    k-means of the unit features of the test pictures, one cluster a class, against the labels
  hierarchy  the tree of k-means of the unit features of all training pictures, and the tree that the run left
             in clusters.csv (of its projections), against the label tree: per level, by path, by distance

Label levels count from the coarsest, level 0; clusters are numbered as in the methods, level 0 the finest. There
is no validation split: the best epoch and the best --lr are chosen on the test pictures. Quote the last epoch; the
best is an upper bound. Every protocol leaves the backbone as it was, byte for byte, which is checked.

Not computed: detection, segmentation, transfer to other data (give --data), error bars (repeat with --seed).

Differs from the papers: features are standardised, so that one short list of learning rates serves every backbone
(MoCo: raw features, lr 30); several learning rates where papers tune one; cosine decay unless --schedule step.
"""

import argparse
import copy
import csv
import functools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import plumbing
from common import Stop
from plumbing import say

NOTE = "best: the best epoch on the test pictures, an upper bound; --lr is chosen on them as well"
IMAGE_SIZES = {"textures": 32, "cifar": 32, "photos": 96, "imagenet": 224}  # by plumbing.preset_of(data)


# ---- arguments
def fraction(text):
    """An argparse type: a number above 0, at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return float(text)


def parse_args(argv=None):
    p = plumbing.Parser(description=__doc__, allow_abbrev=False, formatter_class=plumbing.HelpFormatter)
    add, positive = p.add_argument, plumbing.positive
    add("--run", help="run folder: backbone.pt and, from config.json, data, arch, stem, image size, clusters")
    add("--backbone", metavar="FILE", help="weights: backbone.pt, checkpoint.pt, torchvision's, a state dict")
    add("--untrained", action="store_true", help="no weights: a freshly initialised backbone")
    add("--arch", help="tiny, or a torchvision ResNet, as resnet50 (the run's)")
    add("--stem", choices=list(common.STEMS), help="first layer (the run's, or as in the weights)")
    add("--image-size", type=positive(int), help="side of the pictures, pixels (the run's, or by data)")
    add("--data", default="textures", help="textures, cifar10, cifar100, stl10 or a folder (the run's)")
    add("--data-root", default="data", help="where torchvision's sets are kept (the run's)")
    add("--out", metavar="FILE", help="for the results (eval.json in the run folder, or here)")
    add("--protocol", nargs="+", choices=list(PROTOCOLS), default=["linear", "knn"], help="what to compute")
    add("--labels", type=fraction, default=1.0, help="of each class's training pictures, in linear and finetune")
    add("--level", type=int, nargs="+", help="label levels, 0 the coarsest (all; linear, finetune: the finest)")
    add("--linear", choices=["features", "augment"], default="features", help="cached features, or random crops")
    add("--epochs", type=positive(int), default=100, help="of the linear probe")
    add("--batch-size", type=positive(int), default=256,
        help="pictures a step, linear and finetune (there at most a 16th of the pictures)")
    add("--lr", type=positive(float), nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
        help="of the linear probe, each times batch-size / 256")
    add("--schedule", choices=["cosine", "step"], default="cosine", help="step: a tenth at 60 and 80 %% of epochs")
    add("--weight-decay", type=positive(float, zero=True), default=0.0, help="linear and finetune")
    add("--finetune-epochs", type=positive(int), default=50, help="of fine-tuning")
    add("--lr-trunk", type=positive(float, zero=True), default=0.1, help="fine-tuning, times batch-size / 256")
    add("--lr-head", type=positive(float), default=5.0, help="fine-tuning, times batch-size / 256")
    add("--k", type=positive(int), default=20, help="neighbours of kNN")
    add("--temperature", type=positive(float), default=0.07, help="of kNN's votes")
    add("--clusters", type=positive(int), nargs="+", metavar="K",
        help="clusters a level of the tree, finest first (the run's, or one a class of every label level)")
    add("--pairs", type=positive(int), default=200_000, help="pairs of pictures whose tree distances are compared")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--workers", type=positive(int, zero=True), default=4, help="processes that decode large pictures")
    p.set_defaults(fingerprint=None)  # of the run's training pictures
    args = p.parse_args(argv)
    if args.run:
        p.set_defaults(**run_defaults(Path(args.run)))
        args = p.parse_args(argv)
    elif not (args.arch and (args.backbone or args.untrained)):
        raise Stop("nothing to evaluate: give --run FOLDER, or --arch with --backbone FILE or --untrained")
    if args.backbone and args.untrained:
        raise Stop("--backbone and --untrained exclude each other: leave one out")
    p.set_defaults(out=str(Path(args.run or ".") / "eval.json"),
                   image_size=args.image_size or IMAGE_SIZES[plumbing.preset_of(args.data)])
    return p.parse_args(argv)


def run_defaults(folder):
    """What config.json of a run says about its data and its backbone."""
    path = folder / "config.json"
    if not path.is_file():
        raise Stop(f"{folder} is no run folder, it has no config.json: give the --out of a training run")
    config = plumbing.read_json(path)
    names = ("data", "data_root", "arch", "stem", "image_size")
    try:
        return dict(clusters=config["derived"]["clusters"] or None, fingerprint=config["derived"]["fingerprint"],
                    **{name: config["arguments"][name] for name in names})
    except (KeyError, TypeError) as error:
        raise Stop(f"{path} is not of a training run ({error} is missing): give another --run") from error


# ---- measures: two labelings of the same n items, any integers or strings, compared
def contingency(a, b):
    """Labelings a, b (n,) -> sizes (A,) and (B,), and the non-empty cells (Z,): row, column, count.

    Raises ValueError where the lengths differ or there is nothing. The (A, B) table is never made.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"two labelings of the same items are needed, not of {len(a)} and {len(b)}")
    (row, a_sizes), (column, b_sizes) = (
        np.unique(np.asarray(v), return_inverse=True, return_counts=True)[1:] for v in (a, b))
    cell, count = np.unique(row.ravel() * len(b_sizes) + column.ravel(), return_counts=True)
    return a_sizes, b_sizes, cell // len(b_sizes), cell % len(b_sizes), count


def information(a_sizes, b_sizes, row, column, count):
    """A `contingency` -> mutual information I and mean entropy (H(a) + H(b)) / 2, nats.

    I = sum_ij n_ij/n log(n n_ij / (a_i b_j)),  H(a) = -sum_i a_i/n log(a_i/n)
    """
    n = a_sizes.sum()
    mutual = (count / n * np.log(n * count / (a_sizes[row] * b_sizes[column]))).sum()
    return float(mutual), float(-sum((sizes / n * np.log(sizes / n)).sum() for sizes in (a_sizes, b_sizes)) / 2)


def expected_information(a_sizes, b_sizes, block=2**19):
    """Mean mutual information, nats, of random labelings with these cluster sizes (A,), (B,).

    E = sum_ij sum_m m/n log(n m / (a_i b_j)) p_ij(m), where p is hypergeometric:
    p = a_i! b_j! (n-a_i)! (n-b_j)! / (n! m! (a_i-m)! (b_j-m)! (n-a_i-b_j+m)!)     Vinh et al. 2010, Eq. 24a
    A pair of sizes is computed once however many clusters have them; memory is bounded by `block` numbers.
    """
    n = int(a_sizes.sum())
    log_f = np.fromiter(map(math.lgamma, range(1, n + 2)), np.float64)  # log_f[m] = log m!
    (a, a_many), (b, b_many) = sorted((np.unique(s, return_counts=True) for s in (a_sizes, b_sizes)),
                                      key=lambda sizes: len(sizes[0]))
    total = 0.0
    for size, many in zip(a.tolist(), a_many.tolist()):
        m = np.arange(1, min(size, int(b[-1])) + 1)  # items in common
        step = max(1, block // len(m))
        for start in range(0, len(b), step):
            other = b[start:start + step, None]  # (U, 1), against m (M,)
            possible = (m <= other) & (m >= size + other - n)
            left_b, left = np.maximum(other - m, 0), np.maximum(n - size - other + m, 0)
            log_p = (log_f[size] + log_f[other] + log_f[n - size] + log_f[n - other]
                     - log_f[n] - log_f[m] - log_f[size - m] - log_f[left_b] - log_f[left])
            p = np.exp(np.where(possible, log_p, -np.inf))  # (U, M)
            terms = (p * m / n * np.log(n * (m / (size * other)))).sum(axis=1)
            total += many * float(terms @ b_many[start:start + step])
    return total


def nmi(a, b):
    """Normalised mutual information I / mean(H(a), H(b)) in [0, 1]; 1 for the same partition.

    Both one cluster: 1; one of them: 0. It grows with the number of clusters even for random ones: see ami.
    """
    table = contingency(a, b)
    if len(table[0]) == len(table[1]) == 1:
        return 1.0
    mutual, mean = information(*table)
    return min(1.0, max(0.0, mutual / mean))


def ami(a, b):
    """Adjusted mutual information (I - E) / (mean(H(a), H(b)) - E), E the mean I of random labelings.

    At most 1, which the same partition scores; 0 on average for random ones, so it may be slightly below.
    One of them one cluster: 0.
    """
    a_sizes, b_sizes, *cells = contingency(a, b)
    if len(a_sizes) == len(b_sizes) == len(cells[0]):  # the same partition; 0 / 0 if one cluster or singletons
        return 1.0
    mutual, mean = information(a_sizes, b_sizes, *cells)
    expected = expected_information(a_sizes, b_sizes)
    return (mutual - expected) / max(mean - expected, 2**-52)


def ari(a, b):
    """Adjusted Rand index (S - E) / (M - E) over pairs of items, at most 1, 0 on average for random labelings.

    S = sum_ij C(n_ij, 2) pairs together in both, E = sum_i C(a_i, 2) sum_j C(b_j, 2) / C(n, 2), M the mean of
    the two sums. The same partition scores 1, n = 1 included. Whole numbers: exact for any n.
    """
    a_sizes, b_sizes, _, _, count = contingency(a, b)
    together, in_a, in_b = (sum(int(c) * (int(c) - 1) for c in sizes) for sizes in (count, a_sizes, b_sizes))
    if together == in_a == in_b:
        return 1.0
    n = int(a_sizes.sum())
    pairs = n * (n - 1)
    return (together * pairs - in_a * in_b) / ((in_a + in_b) * pairs / 2 - in_a * in_b)


def commonest_shares(clusters, labels):
    """Share in (0, 1] of each cluster's items that carry its commonest label (A,), and its size (A,)."""
    sizes, _, row, _, count = contingency(clusters, labels)
    commonest = np.zeros(len(sizes), np.int64)
    np.maximum.at(commonest, row, count)
    return commonest / sizes, sizes


def purity(clusters, labels):
    """Share in (0, 1] of the items that carry the commonest label of their cluster; 1 for all singletons."""
    shares, sizes = commonest_shares(clusters, labels)
    return float(shares @ sizes / sizes.sum())


def best_matching(gain):
    """Gains (R, C), R <= C -> (R,) a column for each row, none twice, of the largest total gain.

    The Hungarian method by shortest augmenting paths (Kuhn 1955; Jonker & Volgenant 1987): O(R^2 C). Prices keep
    cost - row_price - column_price >= 0 everywhere and 0 on the matched; each row in turn finds the shortest way
    in these reduced costs to a free column, and the matches along the way are exchanged.
    """
    cost = gain.max() - np.asarray(gain, np.float64)
    rows, columns = cost.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot have a column each of {columns}: transpose the gains")
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of, column_of = np.full(columns, -1), np.full(rows, -1)
    for first in range(rows):
        distance, before = np.full(columns, np.inf), np.full(columns, -1)  # of the shortest way to a column
        done, row, reached = np.zeros(columns, bool), first, 0.0
        while True:
            way = reached + cost[row] - row_price[row] - column_price
            shorter = ~done & (way < distance)
            distance[shorter], before[shorter] = way[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            reached, row = distance[column], row_of[column]
            if row < 0:
                break
            done[column] = True
        row_price[first] += reached
        row_price[row_of[done]] += reached - distance[done]
        column_price[done] -= reached - distance[done]
        while row != first:  # exchange, from the free column back
            row = before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return column_of


def matching_accuracy(clusters, labels):
    """Accuracy in (0, 1] when every cluster is given at most one label and every label at most one cluster."""
    a_sizes, b_sizes, row, column, count = contingency(clusters, labels)
    table = np.zeros((len(a_sizes), len(b_sizes)), np.int64)
    table[row, column] = count
    table = table if table.shape[0] <= table.shape[1] else table.T
    return float(table[np.arange(len(table)), best_matching(table)].sum() / a_sizes.sum())


def tree_distance(levels, i, j):
    """Levels (L, N) of nested clusters, in any order -> (P,) levels up from items i, j (P,) to their common one.

    0 in the same finest cluster, L when even the coarsest differ.
    """
    return (levels[:, i] != levels[:, j]).sum(0)


def average_ranks(x):
    """(n,) -> (n,) ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation of x and y (n,) in [-1, 1]: Pearson's of the average ranks; None when one is constant."""
    x, y = (r - r.mean() for r in map(average_ranks, (x, y)))
    return float(x @ y / math.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else None


def path_purity(leaves, label_levels):
    """Mean over the leaves (n,) of the share of a leaf's items that have its commonest label path (depth, n)."""
    path = np.unique(label_levels, axis=1, return_inverse=True)[1].ravel()
    return float(commonest_shares(leaves, path)[0].mean())


# ---- pictures, labels, weights
def subset(images, rows):
    """The pictures at `rows` (M,) int64 as Images of their own; `images` itself when that is all of them."""
    if len(rows) == len(images):
        return images
    part = common.Images([images.names[i] for i in rows.tolist()], images.labels[images.index_of[rows]],
                         images.class_names)
    if images.pixels is not None:
        part.pixels = images.pixels[rows.to(images.pixels.device)]
    else:
        part.paths = [images.paths[i] for i in rows.tolist()]
    return part


def labels_of(images):
    """(N, depth) int64 on the CPU; an unreadable picture has the label of the neighbour that stands in for it."""
    return images.labels[images.index_of]


def stratified(labels, fraction, seed):
    """Labels (N,) -> sorted rows: round(fraction * n_c) of each class c, one at least.

    Drawn by the seed; the rows of a smaller fraction are among those of a larger one.
    """
    order = torch.randperm(len(labels), generator=common.random_state(seed, "labels"))
    members = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([rows[:max(1, round(fraction * len(rows)))] for rows in members]).sort().values


def splits(args, device):
    """Images: labelled for training, for test, all for the tree, and those that the cluster protocol takes."""
    every, test = common.load_data(args.data, args.data_root, device)
    if every.labels is None:
        raise Stop(f"{args.data} carries no labels, so there is nothing to compare with: sort the pictures "
                        "into one sub-folder a class")
    known = (every.labels[:, 0] >= 0).nonzero()[:, 0]  # STL-10: most pictures carry no label
    if test is not None and test.class_names == every.class_names:
        return subset(every, known), test, every, test
    say("no test pictures of the same classes: every tenth training picture is the test")
    held_out = torch.arange(len(known)) % 10 == 0
    return subset(every, known[~held_out]), subset(every, known[held_out]), every, subset(every, known)


def find_backbone(state, source):
    """What torch.load gave -> (tensors under the backbone's prefix, by their names without it; all other names).

    `state` is a state dict, or holds one under "state_dict" or "model". Any prefix will do; where a query and a
    key encoder are found, the query's is taken. Raises Stop, naming `source`, when there is no ResNet in it.
    """
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    mark = "layer1.0.conv1.weight"
    prefixes = [name[:-len(mark)] for name in names if name.endswith(mark)]
    if not prefixes:
        raise Stop(f"{source} holds no weights of a ResNet (no name ends in {mark}): give another file")
    prefix = min(prefixes, key=lambda p: "encoder_k" in p)
    return ({name.removeprefix(prefix): state[name] for name in names if name.startswith(prefix)},
            [name for name in names if not name.startswith(prefix)])


def fit_backbone(network, state, others, source):
    """Load the backbone's tensors strictly; returns a sentence about those left out and those missing.

    Every tensor of the network must be there, in its shape, finite, and no further one of its stages; only the
    counters of batches may be missing (old files have none). Raises Stop with the first misfit.
    """
    wanted = network.state_dict()
    stages = {name.split(".")[0] for name in wanted}
    found = {name: value for name, value in state.items() if name.split(".")[0] in stages}
    missing = [name for name in wanted if name not in found]
    wrong = [f"{name} is too many" for name in found if name not in wanted]
    wrong += [f"{name} is missing" for name in missing if not name.endswith("num_batches_tracked")]
    for name in set(found) & set(wanted):
        shape = list(found[name].shape) if torch.is_tensor(found[name]) else None
        if shape != list(wanted[name].shape):
            wrong.append(f"{name} has shape {shape}, not {list(wanted[name].shape)}")
        elif not found[name].isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        raise Stop(f"{source} does not fit, {len(wrong)} tensors differ ({min(wrong)}): correct --arch (and "
                        "--stem), or give another file")
    network.load_state_dict({**wanted, **found}, strict=True)
    left_out = dict.fromkeys(".".join(name.split(".")[:2]) for name in [*state, *others] if name not in found)
    return (f"{len(found)} tensors loaded, left out: {', '.join(left_out) or 'none'}, "
            f"missing: {', '.join(missing) or 'none'}")


def load_backbone(args):
    """The network in evaluation mode, nothing trainable, and its width F."""
    stem = args.stem or ("3x3" if args.image_size <= 64 else "7x7")
    path = None if args.untrained else Path(args.backbone or Path(args.run) / "backbone.pt")
    if path and not path.is_file():
        raise Stop(f"{path} does not exist: " + ("correct --backbone" if args.backbone else
                        f"let the run finish, or add --backbone {path.with_name('checkpoint.pt')}"))
    if path:
        state, others = find_backbone(plumbing.load_file(path), path)
        if not args.stem and torch.is_tensor(state.get("conv1.weight")):
            stem = "3x3" if state["conv1.weight"].shape[-1:] == (3,) else "7x7"
    network, width = common.backbone(args.arch, stem)
    say(f"{args.arch}, {stem} stem, {width} features, {args.image_size} px, {path or 'untrained'}")
    if path:
        say("  " + fit_backbone(network, state, others, path))
    return network.eval().requires_grad_(False), width


# ---- protocols: a Task in, rows out (flat dicts, a line each in the table at the end)
class Task(NamedTuple):
    """What is evaluated on what."""

    args: argparse.Namespace
    device: torch.device
    network: nn.Module  # frozen
    width: int  # F
    train: common.Images  # labelled
    few: common.Images  # the share of train that linear and finetune see
    test: common.Images
    every: common.Images  # all training pictures, for the tree
    clustered: common.Images  # test, or every labelled picture where there is no test split
    levels: list  # label levels compared
    finest: list  # those of linear and finetune
    clusters: list  # of the tree
    features: Callable  # Images -> (N, F) of the central crops, computed once


def percent(predicted, truth):
    """Share of equal entries, in percent, two decimals."""
    return round(100 * int((predicted == truth).sum()) / len(predicted), 2)


def decay(done, schedule):
    """Share of the peak learning rate when `done` of the training is over."""
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 0.1 ** ((done >= 0.6) + (done >= 0.8))


def last_and_best(accuracy):
    """Accuracies (epochs,) of the test pictures in percent -> the last, the best and its epoch from 1."""
    best = max(range(len(accuracy)), key=accuracy.__getitem__)
    return dict(last=accuracy[-1], best=accuracy[best], best_epoch=best + 1)


def random_crops(task, images, batch_size, epoch):
    """Yield (pictures (b, 3, S, S), index (b,)): random resized crops and flips.

    Crops take 8 % of the area or more, the papers' habit; 30 % of pictures up to 64 px, where 8 % is too little.
    """
    args = task.args
    view = common.Augmentation(size=args.image_size, scale=(0.3 if args.image_size <= 64 else 0.08, 1.0),
                               jitter_p=0, gray_p=0)
    for _, index, (pictures,) in common.batches(images, batch_size, [view], seed=args.seed, epoch=epoch,
                                                device=task.device, workers=args.workers):
        yield pictures, index


def softmax_regression(batches, steps, x, y, classes, lrs, *, epochs, schedule, weight_decay):
    """SGD with momentum 0.9 from zero, one model a learning rate, all at once -> R lists of accuracy an epoch.

    batches(epoch) yields `steps` times (features (B, F+1), labels (B,)), the last feature 1 for the bias;
    x (N, F+1), y (N,) the test; lrs (R,) the peaks. The gradient of the mean cross-entropy is written out.
    """
    peak = torch.tensor(lrs, device=x.device)[:, None, None]
    weight = x.new_zeros(len(lrs), x.shape[1], classes)  # (R, F+1, C)
    velocity, accuracy = torch.zeros_like(weight), []
    for epoch in range(epochs):
        for step, (rows, target) in enumerate(batches(epoch)):
            error = (rows @ weight).softmax(dim=2)  # (R, B, C)
            error[:, torch.arange(len(rows)), target] -= 1
            gradient = rows.T @ error / len(rows) + weight_decay * weight  # (R, F+1, C)
            velocity = 0.9 * velocity + gradient
            weight -= peak * decay((epoch + step / steps) / epochs, schedule) * velocity
        accuracy.append([percent((x @ w).argmax(dim=1), y) for w in weight])
    return [list(column) for column in zip(*accuracy)]


def linear(task):
    """Linear probe. A row holds the learning rate that was best in the last epoch; `rates` holds them all."""
    args, images, rows = task.args, task.few, []
    x = task.features(images)
    mean, std = x.mean(dim=0), x.std(dim=0, unbiased=False).clamp(min=1e-6)
    batch_size = min(args.batch_size, len(images))
    lrs = [lr * batch_size / 256 for lr in args.lr]

    def standard(features):  # (n, F) -> (n, F+1)
        return F.pad((features - mean) / std, (0, 1), value=1.0)

    def batches(epoch):
        if args.linear == "augment":
            for pictures, index in random_crops(task, images, batch_size, epoch):
                with torch.no_grad():  # the backbone is frozen
                    yield standard(task.network(pictures)), y[index]
            return
        order = torch.randperm(len(x), generator=common.random_state(args.seed, "linear", epoch)).to(x.device)
        for part in order.split(batch_size)[:len(x) // batch_size]:
            yield standard(x[part]), y[part]

    for level in task.finest:
        y, test_y = (labels_of(split)[:, level].to(x.device) for split in (images, task.test))
        classes = len(images.class_names[level])
        accuracy = softmax_regression(
            batches, len(images) // batch_size, standard(task.features(task.test)), test_y, classes, lrs,
            epochs=args.epochs, schedule=args.schedule, weight_decay=args.weight_decay)
        rates = [dict(lr=round(lr, 6), **last_and_best(a)) for lr, a in zip(lrs, accuracy)]
        for r in rates:
            say(f"linear, {classes} classes, lr {r['lr']}: last {r['last']}, best {r['best']} in epoch "
                f"{r['best_epoch']}")
        rows.append(dict(level=level, classes=classes, pictures=len(images),
                         **max(rates, key=lambda rate: rate["last"]), rates=rates))
    return {"linear": rows}


def vote_accuracy(votes, truth):
    """Votes (B, C), labels (B,) -> percent with the label first, and among the first 5 (None when C <= 5).

    A label without a vote is wrong, wherever it stands.
    """
    ranked = votes.topk(min(5, votes.shape[1]), dim=1).indices  # (B, 5)
    hit = (ranked == truth[:, None]) & (votes.gather(1, ranked) > 0)
    return percent(hit[:, 0], True), percent(hit.any(dim=1), True) if votes.shape[1] > 5 else None


def knn(task):
    """kNN: the rule of common.knn_classify, the neighbours looked up once for all label levels."""
    args, rows = task.args, []
    sim, neighbours = common.largest_products(F.normalize(task.features(task.train), dim=1),
                                              F.normalize(task.features(task.test), dim=1), args.k)
    sim, neighbours = sim.cpu().double(), neighbours.cpu()  # float64: no overflow at low temperatures
    y, test_y = labels_of(task.train), labels_of(task.test)
    for level in task.levels:
        classes = len(task.train.class_names[level])
        top1, top5 = vote_accuracy(common.knn_votes(sim, y[neighbours, level], classes, args.temperature),
                                   test_y[:, level])
        rows.append(dict(level=level, classes=classes, pictures=len(y), k=args.k, top1=top1, top5=top5))
    return {"knn": rows}


def finetune(task):
    """The whole network, a copy of it, and a new linear layer on the labelled part of the training pictures."""
    args, device, images, rows = task.args, task.device, task.few, []
    batch_size = min(args.batch_size, max(16, len(images) // 16), len(images))
    steps, peaks = len(images) // batch_size, [lr * batch_size / 256 for lr in (args.lr_trunk, args.lr_head)]
    for level in task.finest:
        y, test_y = (labels_of(split)[:, level].to(device) for split in (images, task.test))
        classes = len(images.class_names[level])
        torch.manual_seed(args.seed)
        trunk, head = copy.deepcopy(task.network).requires_grad_(True), nn.Linear(task.width, classes).to(device)
        model, accuracy, tested = nn.Sequential(trunk, head).train(), [], []
        optimizer = torch.optim.SGD([dict(params=part.parameters(), lr=lr) for part, lr in zip(model, peaks)],
                                    momentum=0.9, weight_decay=args.weight_decay)
        for epoch in range(args.finetune_epochs):
            for step, (pictures, index) in enumerate(random_crops(task, images, batch_size, epoch)):
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = peak * decay((epoch + step / steps) / args.finetune_epochs, args.schedule)
                loss = F.cross_entropy(model(pictures), y[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if not loss.isfinite():
                raise Stop(f"the loss of fine-tuning is {loss.item()} in epoch {epoch + 1}: try a lower --lr-trunk or "
                           "--lr-head", code=1)
            if epoch + 1 == args.finetune_epochs or (epoch + 1) % math.ceil(args.finetune_epochs / 20) == 0:
                logits = common.extract_features(model, task.test, args.image_size, device=device,
                                                 workers=args.workers)
                accuracy.append(percent(logits.argmax(dim=1), test_y))
                tested.append(epoch + 1)
        found = last_and_best(accuracy)
        rows.append(dict(level=level, classes=classes, pictures=len(images),
                         **{**found, "best_epoch": tested[found["best_epoch"] - 1]}))
    return {"finetune": rows}


def agreement(clusters, labels):
    """The four measures of two labelings (n,), by name."""
    return {measure.__name__: round(measure(clusters, labels), 4) for measure in (nmi, ami, ari, purity)}


def cluster(task):
    """k-means of the unit features, as many clusters as classes; accuracy: under the best one-to-one matching."""
    x, y, rows = F.normalize(task.features(task.clustered), dim=1), labels_of(task.clustered).numpy(), []
    for level in task.levels:
        classes = len(task.clustered.class_names[level])
        assign = common.kmeans(x, classes, seed=task.args.seed)[1].cpu().numpy()
        rows.append(dict(level=level, classes=classes, pictures=len(x), **agreement(assign, y[:, level]),
                         accuracy=round(100 * matching_accuracy(assign, y[:, level]), 2)))
    return {"cluster": rows}


def random_pairs(n, count, generator):
    """Items i, j (count,) of n, i != j, uniform and with replacement."""
    i, step = torch.randint(n, (count,), generator=generator), torch.randint(1, n, (count,), generator=generator)
    return i.numpy(), ((i + step) % n).numpy()


def tree_of_run(path, names):
    """clusters.csv of a run -> (L, N) clusters of the pictures of these names."""
    try:
        with open(path, newline="") as f:
            _, *rows = csv.reader(f)
        if [row[0] for row in rows] != names:
            raise ValueError("other pictures")
        return np.array([row[1:] for row in rows], dtype=np.int64).T
    except (ValueError, IndexError) as error:
        raise Stop(f"{path} does not hold the tree of the run ({error}): restore it, or delete it") from error


def hierarchy(task):
    """Each level of a learnt tree against each label level; a leaf's label path; distances in both trees."""
    args, folder = task.args, Path(task.args.out).parent / "eval_tree"
    own = args.run and not args.backbone and not args.untrained  # the backbone that the run left
    x, labels = F.normalize(task.features(task.every), dim=1), labels_of(task.every).numpy().T  # (depth, N)
    known, labels = labels[0] >= 0, labels[:, labels[0] >= 0]
    tree = common.hierarchical_kmeans(x, task.clusters, temperature=1.0, seed=args.seed)
    trees = {"features": torch.stack(tree.assign).cpu().numpy()}  # (L, N)
    if own:
        folder.mkdir(exist_ok=True)
        plumbing.write_tree(folder, task.every, x, tree)
        say(f"the tree of the features: {folder}/tree.png")
    left = Path(args.run or "") / "clusters.csv"
    if own and left.is_file() and args.fingerprint == task.every.fingerprint():
        trees["clusters.csv"] = tree_of_run(left, task.every.names)
    i, j = random_pairs(labels.shape[1], args.pairs, common.random_state(args.seed, "pairs"))
    rows, whole = [], []
    for name, levels in trees.items():
        levels = levels[:, known]
        rows += [dict(tree=name, cluster_level=depth, clusters=len(np.unique(assign)), level=level,
                      classes=len(task.every.class_names[level]), **agreement(assign, labels[level]))
                 for depth, assign in enumerate(levels) for level in task.levels]
        correlation = spearman(tree_distance(levels, i, j), tree_distance(labels, i, j))
        whole.append(dict(tree=name, path_purity=round(path_purity(levels[0], labels), 4),
                          rank_correlation=correlation and round(correlation, 4)))
    return {"hierarchy": rows, "tree": whole}


PROTOCOLS = dict(linear=linear, knn=knn, finetune=finetune, cluster=cluster, hierarchy=hierarchy)


# ---- main
def table(title, rows):
    """Print rows (flat dicts of the same keys) under their names; what is a list is left out."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [names] + [["-" if row[name] is None else str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    say(f"\n{title}\n" + "\n".join("  " + "  ".join(map(str.rjust, line, widths)) for line in cells))


def check(args, train, every):
    """What the arguments ask of the data -> label levels compared, those of linear, clusters of the tree."""
    names, chosen = train.class_names, args.level or range(len(train.class_names))
    if bad := [level for level in chosen if level not in range(len(names))]:
        raise Stop(f"--level {bad[0]} is not there: {args.data} has label levels 0 to {len(names) - 1}")
    levels = [level for level in chosen if len(names[level]) > 1]
    if not levels or (args.level and len(levels) < len(chosen)):
        raise Stop(f"{args.data} has one class only: give another --level or --data, nothing is to be "
                        "told apart here")
    if "knn" in args.protocol and args.k > len(train):
        raise Stop(f"--k {args.k} is above the {len(train)} labelled training pictures: give a smaller one")
    clusters = args.clusters or sorted({len(names[level]) for level in levels}, reverse=True)
    if "hierarchy" in args.protocol and (clusters[0] > len(every) or clusters != sorted(set(clusters))[::-1]):
        raise Stop(f"--clusters {' '.join(map(str, clusters))} must fall from level to level, finest first, and "
                        f"not be above the {len(every)} pictures of {args.data}")
    return levels, levels if args.level else levels[-1:], clusters


def earlier_results(path):
    """The evaluations that --out holds already: they are kept."""
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise Stop(f"--out {path} cannot be written: give a file in a folder that is there")
    if not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        return [*before.pop("earlier"), before]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Stop(f"{path} is no result of this script, it is not overwritten: choose another --out") from error


def main(args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise Stop("one process evaluates: start it with python, not with torchrun")
    device = plumbing.set_up(args)
    out = Path(args.out)
    earlier = earlier_results(out)
    network, width = load_backbone(args)
    network.to(device, memory_format=torch.channels_last)
    train, test, every, clustered = splits(args, device)
    if args.fingerprint not in (None, every.fingerprint()):
        say("these are not the training pictures of the run; its clusters.csv is left out")
    levels, finest, clusters = check(args, train, every)
    few = subset(train, stratified(labels_of(train)[:, -1], args.labels, args.seed))
    say(f"{args.data}: {len(train)} labelled training pictures, {len(few)} of them for linear and finetune, "
        f"{len(test)} test pictures, label levels of {', '.join(str(len(n)) for n in train.class_names)} classes")

    @functools.cache
    def features(images):
        x = common.extract_features(network, images, args.image_size, device=device, workers=args.workers)
        if not x.isfinite().all():
            raise Stop("the backbone's features are not finite: these weights do not suit this network")
        return x

    frozen = copy.deepcopy(network.state_dict())
    task = Task(args, device, network, width, train, few, test, every, clustered, levels, finest, clusters,
                features)
    results, seconds = {}, {}
    for protocol in dict.fromkeys(args.protocol):
        begun = time.perf_counter()
        results.update(PROTOCOLS[protocol](task))
        seconds[protocol] = round(time.perf_counter() - begun, 1)
        say(f"{protocol}: {seconds[protocol]} s")
        assert_unchanged(network, frozen)
    for title, rows in results.items():
        table(title, rows)
    say(f"\n{NOTE}")
    plumbing.write_json(out, dict(
        **plumbing.circumstances(), arguments=vars(args), note=NOTE,
        pictures=dict(train=len(train), labelled=len(few), test=len(test)),
        results=results, seconds=seconds, earlier=earlier))
    say(f"results  {out}")


def assert_unchanged(network, frozen):
    """Byte for byte: every parameter and buffer as it was, and the network in evaluation mode."""
    changed = [name for name, now in network.state_dict().items() if not torch.equal(
        now.contiguous().flatten().view(torch.uint8), frozen[name].contiguous().flatten().view(torch.uint8))]
    if changed or any(module.training for module in network.modules()):
        raise AssertionError(f"the backbone must not change while it is evaluated: {changed or 'training mode'}")


# ---- entry
if __name__ == "__main__":
    plumbing.launch(main, parse_args)
