# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""How good is a backbone? Linear probe, kNN, fine-tuning with few labels, clustering, the learnt tree.

a run                    python eval_linear.py --run runs/hirl_moco-textures-0
everything               python eval_linear.py --run runs/x --protocol linear knn finetune cluster hierarchy
papers' linear protocol  python eval_linear.py --run runs/x --protocol linear --linear augment
one per cent of labels   python eval_linear.py --run runs/x --protocol linear finetune --labels 0.01
somebody else's weights  python eval_linear.py --backbone FILE --arch resnet50 --data /imagenet --pixels imagenet
the baseline             python eval_linear.py --run runs/x --untrained --out untrained.json

  linear     softmax regression on the frozen backbone, one for every --lr, all trained at once
             --linear features: of the central crop, computed once; augment: of random crops and flips
  knn        each of the k most similar training pictures votes exp(cosine / temperature)
  finetune   the whole network (a copy) and a new linear layer, on random crops and flips; tested about 20 times
  cluster    k-means of the test pictures' unit features, with as many clusters as classes, against the labels
  hierarchy  the k-means tree of all training pictures' unit features, and the tree that the run left in
             clusters.csv (of what it clustered), against the labels: every level with every depth, and by tree distance

Labels have a depth, 0 the coarsest; clusters have a level, 0 the finest, as in the methods. Without
--validation the best epoch and the best --lr are chosen on the test pictures. Quote the last epoch; the best is an
upper bound. Without test pictures every tenth training picture is one. Every protocol leaves the backbone as it was,
byte for byte, which is checked. Error bars: repeat with --seed.

Differs from the papers: pictures are fed as (x - 0.5) / 0.25, unless --pixels imagenet; features are standardised by
the training pictures' mean and deviation (the probe stays linear), so that one short list of learning rates serves
every backbone (MoCo: raw features, lr 30); several rates where papers tune one; cosine decay unless --schedule step.
"""

import copy
import csv
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import transforms

import common
import networks
import plumbing
import ranks
from common import Stop
from ranks import say

NOTE = "best: the best epoch on the pictures tested on, an upper bound; --lr is chosen on them as well"
IMAGE_SIZES = {"textures": 32, "cifar": 32, "photos": 96, "imagenet": 224}  # by plumbing.preset_of(data)


# ---- arguments
def parse_args(argv=None):
    p = plumbing.Parser(description=__doc__)
    add, positive = p.add_argument, plumbing.positive
    add("--run", help="run folder: backbone.pt and, from config.json, data, arch, stem, image size, clusters")
    add("--backbone", metavar="FILE", help="weights: backbone.pt, checkpoint.pt, torchvision's, a state dict")
    add("--untrained", action="store_true", help="no weights: a freshly initialised backbone")
    add("--arch", help="tiny, or a torchvision ResNet or ViT, as resnet50, vit_b_16 (the run's)")
    add("--stem", choices=list(networks.STEMS), help="first layer of a ResNet (the run's; 7x7 is seen in the weights)")
    add("--image-size", type=positive(int, most=4096), help="side of the pictures, pixels (the run's, or by data)")
    add("--data", default="textures", help="textures, cifar10, cifar100, stl10 or a folder (the run's)")
    add("--pixels", choices=["half", "imagenet"], default="half", help="less 0.5, over 0.25; or ImageNet's mean, std")
    add("--data-root", default="data", help="where torchvision's sets are kept (the run's)")
    add("--validation", action="store_true", help="on pictures held out from training, not the test's (the run's)")
    add("--out", metavar="FILE", help="for the results (eval.json in the run folder, or here)")
    add("--protocol", nargs="+", choices=list(PROTOCOLS), default=["linear", "knn"], help="what to compute")
    add("--labels", type=positive(float, most=1), default=1.0, help="share of each class used, in linear and finetune")
    add("--depth", type=int, nargs="+", help="of the labels, 0 the coarsest (all; linear, finetune: the finest)")
    add("--linear", choices=["features", "augment"], default="features", help="cached features, or random crops")
    add("--epochs", type=positive(int), default=100, help="of the linear probe")
    add("--batch-size", type=positive(int), default=256, help="pictures a step (finetune: at most a 16th, or 16)")
    add("--lr", type=positive(float), nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
        help="of the linear probe, each times batch-size / 256")
    add("--schedule", choices=["cosine", "step"], default="cosine", help="step: a tenth at 60 and 80 %% of epochs")
    add("--weight-decay", type=positive(float, zero=True), default=0.0, help="linear and finetune")
    add("--finetune-epochs", type=positive(int), default=50, help="of fine-tuning")
    add("--lr-trunk", type=positive(float, zero=True), default=0.1, help="fine-tuning, times batch-size / 256")
    add("--lr-head", type=positive(float), default=5.0, help="fine-tuning, times batch-size / 256")
    add("--k", type=positive(int), help="neighbours of kNN (20, or all training pictures)")
    add("--temperature", type=positive(float), default=0.07, help="of kNN's votes")
    add("--clusters", type=positive(int), nargs="+", metavar="K",
        help="clusters per level of the tree, finest first (the run's, or one per class of every depth)")
    add("--pairs", type=positive(int, most=10**7), default=200_000, help="of pictures, to compare tree distances")
    add("--seed", type=positive(int, zero=True), default=0, help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--workers", type=positive(int, zero=True), default=4, help="threads that decode large pictures")
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
    """What config.json of a run says about its data and its backbone; texts, which argparse reads as it does flags."""
    path = folder / "config.json"
    if not path.is_file():
        raise Stop(f"{folder} is no run folder, it has no config.json: give the --out of a training run")
    given, derived = (plumbing.read(path)[part] for part in ("arguments", "derived"))
    try:
        told = {name: str(given[name]) for name in ("data", "data_root", "arch", "stem", "image_size")}
        networks.STEMS[told["stem"]]
        return dict(told, fingerprint=derived["fingerprint"], validation=bool(given.get("validation")),
                    clusters=[int(k) for k in derived.get("clusters") or []] or None)
    except (KeyError, TypeError, ValueError) as error:
        raise Stop(f"{path} is not of a training run ({error}): give another --run") from error


# ---- measures: clusters against labels
def agreement(clusters, labels):
    """How well two labelings (n,) of the same items, integers or strings, agree: {measure: value}, at most 1 each.

    With a_i, b_j, n_ij items in a cluster, a label, both; I = sum_ij n_ij/n log(n n_ij / (a_i b_j)) the mutual
    information, H(a) = -sum_i a_i/n log(a_i/n) the entropy, S(x) = sum x (x - 1) the ordered pairs that are together:
      nmi     I / mean(H(a), H(b)) in [0, 1]; grows with the number of clusters, even of random ones
      ami     (I - E) / (mean(H(a), H(b)) - E), E as below: 0 on average for random labelings     Vinh et al. 2010
      ari     (S(n_ij) - R) / (mean(S(a), S(b)) - R), R = S(a) S(b) / S(n): 0 on average          Hubert & Arabie 1985
      purity  share of the items that carry the commonest label of their cluster; 1 for singletons
    The same partition scores 1 throughout. Raises ValueError where the lengths differ or there is nothing.
    """
    n = len(clusters)
    if n != len(labels) or n == 0:
        raise ValueError(f"two labelings of the same items are needed, not of {n} and {len(labels)}")
    (row, a), (column, b) = (np.unique(np.asarray(v), return_inverse=True, return_counts=True)[1:]
                             for v in (clusters, labels))
    cell, both = np.unique(row.ravel() * len(b) + column.ravel(), return_counts=True)  # (Z,): no table (A, B)
    if len(a) == len(b) == len(both):  # the same partition; 0 / 0 if one cluster or singletons
        return dict(nmi=1.0, ami=1.0, ari=1.0, purity=1.0)
    row, column, commonest = cell // len(b), cell % len(b), np.zeros_like(a)
    np.maximum.at(commonest, row, both)
    mutual = (both / n * np.log(n * both / (a[row] * b[column]))).sum()
    mean = -sum((x / n * np.log(x / n)).sum() for x in (a, b)) / 2
    random = expected_information(a, b)
    pairs, pairs_a, pairs_b = (sum(x * (x - 1) for x in sizes.tolist()) for sizes in (both, a, b))  # exact for any n
    every, twice = n * (n - 1), 2 * pairs_a * pairs_b
    ari = (2 * pairs * every - twice) / ((pairs_a + pairs_b) * every - twice)
    return dict(nmi=float((mutual / mean).clip(0, 1)), ami=float((mutual - random) / max(mean - random, 2**-52)),
                ari=ari, purity=int(commonest.sum()) / n)


def expected_information(a_sizes, b_sizes):
    """E: mean mutual information, nats, of random labelings with clusters of these sizes (A,), (B,).

    E = sum_ij sum_m m/n log(n m / (a_i b_j)) p_ij(m), where p is hypergeometric:
    p = a_i! b_j! (n-a_i)! (n-b_j)! / (n! m! (a_i-m)! (b_j-m)! (n-a_i-b_j+m)!)     Vinh et al. 2010, Eq. 24a
    """
    n, total = int(a_sizes.sum()), 0.0
    log_f = np.fromiter(map(math.lgamma, range(1, n + 2)), np.float64)  # log_f[m] = log m!
    sizes = (zip(*(v.tolist() for v in np.unique(s, return_counts=True))) for s in (a_sizes, b_sizes))
    for (a, a_many), (b, b_many) in itertools.product(*sizes):  # a pair of sizes once, however many clusters have them
        m = np.arange(max(1, a + b - n), min(a, b) + 1)  # (M,) items in common
        log_p = (log_f[a] + log_f[b] + log_f[n - a] + log_f[n - b]
                 - log_f[n] - log_f[m] - log_f[a - m] - log_f[b - m] - log_f[n - a - b + m])
        total += a_many * b_many * float((m / n * np.log(n * m / (a * b)) * np.exp(log_p)).sum())
    return total


# ---- measures: two trees over the same items, by the distances in them
def random_pairs(n, count, generator):
    """Items i, j (count,) of n, i != j, uniform and with replacement."""
    i, step = torch.randint(n, (count,), generator=generator), torch.randint(1, n, (count,), generator=generator)
    return i.numpy(), ((i + step) % n).numpy()


def tree_distance(levels, i, j):
    """Nested clusters (L, N) -> (P,) levels up from items i, j (P,) to their common one, L where they have none."""
    return (levels[:, i] != levels[:, j]).sum(0)


def spearman(x, y):
    """Rank correlation of x and y (n,) in [-1, 1]: Pearson's of the ranks; None when one is constant."""
    def places(v):  # around 0; equal values share the mean of their ranks
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - counts / 2 - len(v) / 2)[inverse]

    x, y = places(x), places(y)
    return float(x @ y / math.sqrt((x @ x) * (y @ y))) if x.any() and y.any() else None


# ---- weights
def find_backbone(state, source):
    """What torch.load gave -> (its tensors by name, the prefix of the backbone's names).

    `state` is a state dict, or holds one under "state_dict", "model" or "teacher". Any prefix will do; of several
    networks the teacher is taken, or else the query encoder. Raises Stop, naming `source`, when there is none.
    """
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: x for name, x in state.items() if torch.is_tensor(x)} if isinstance(state, dict) else {}
    marks = "layer1.0.conv1.weight", "conv_proj.weight"
    prefixes = [name.removesuffix(mark) for name in tensors for mark in marks if name.endswith(mark)]
    if not prefixes:
        raise Stop(f"{source} holds no weights of a ResNet or ViT (no {' or '.join(marks)}): give another file")
    return tensors, min(prefixes, key=lambda prefix: ("teacher" not in prefix, "encoder_k" in prefix))


def fit_backbone(network, tensors, prefix, source):
    """Load what has the prefix and the network's first names, strictly and finite; returns what was left out, by name.

    Raises Stop, naming `source` and what does not fit. Only the counters of batches may be missing, as in old files.
    """
    parts = {name.split(".")[0] for name in network.state_dict()}
    own = {name: name.removeprefix(prefix) for name in tensors
           if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] in parts}
    try:
        network.load_state_dict({short: tensors[name] for name, short in own.items()})
    except RuntimeError as error:
        what = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise Stop(f"{source} does not fit ({what[:150]}): correct --arch, --stem, --image-size or the file") from error
    if bad := [name for name, x in network.state_dict().items() if not x.isfinite().all()]:
        raise Stop(f"{source} holds NaN or infinity ({bad[0]} and {len(bad) - 1} more tensors): give another file")
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in tensors if name not in own))


def load_backbone(args):
    """The network in evaluation mode, nothing trainable, with the weights that the arguments name."""
    path = None if args.untrained else Path(args.backbone or Path(args.run) / "backbone.pt")
    stem, left_out = args.stem or ("3x3" if args.untrained and args.image_size <= 64 else "7x7"), ""
    if path and not path.is_file():
        raise Stop(f"{path} does not exist: " + ("correct --backbone" if args.backbone else
                   f"let the run finish, or add --backbone {path.with_name('checkpoint.pt')}"))
    tensors, prefix = find_backbone(plumbing.read(path), path) if path else ({}, "")
    if not args.stem and getattr(tensors.get(prefix + "conv1.weight"), "shape", ())[-1:] == (3,):
        raise Stop(f"the first layer in {path} is 3x3, but weights do not tell its stride: give --stem 3x3 or 3x3s2, "
                   "as in training")
    network, width = networks.backbone(args.arch, stem, args.image_size)
    if path:
        left_out = "; left out: " + (", ".join(fit_backbone(network, tensors, prefix, path)) or "nothing")
    weights = f"{path}{prefix and ', ' + prefix[:-1]}{left_out}" if path else "untrained"
    say(f"{args.arch}, {width} features, {args.image_size} px, {weights}")
    if args.pixels == "imagenet":  # from (x - 0.5) / 0.25
        network = nn.Sequential(transforms.Normalize((-0.06, -0.176, -0.376), (0.916, 0.896, 0.9)), network)
    return network.eval().requires_grad_(False)


# ---- what is evaluated on what
def stratified(labels, fraction, seed):
    """Labels (N,) -> sorted rows: round(fraction * n_c) of each class c, one at least.

    Drawn by the seed; the rows of a smaller fraction are among those of a larger one.
    """
    order = torch.randperm(len(labels), generator=ranks.random_state(seed, "labels"))
    members = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([rows[:max(1, round(fraction * len(rows)))] for rows in members]).sort().values


class Task:
    """Pictures, depths and the frozen network; what does not go together is refused before anything long begins.

    every, train, few, test  Images: all (for the tree); the labelled; those that linear and finetune use; the test's
    depths, finest           of the labels: those compared, those of linear and finetune
    clusters                 of the tree, finest first
    """

    def __init__(self, args, device, network):
        self.args, self.device, self.network, self.cache = args, device, network, {}
        self.every, self.test = common.load_data(args.data, args.data_root, device, args.validation)
        if self.every.labels is None:
            raise Stop(f"{args.data} carries no labels, so there is nothing to compare with: sort the pictures into "
                       "one sub-folder per class")
        known = (self.every.labels[:, 0] >= 0).nonzero()[:, 0]  # STL-10: most pictures carry no label
        if self.test is None:
            say("no test pictures: every tenth training picture is the test")
            held_out = torch.arange(len(known)) % 10 == 0
            self.test, known = self.every.part(known[held_out]), known[~held_out]
        self.train = self.every.part(known)
        self.few = self.train.part(stratified(self.train.labels[:, -1], args.labels, args.seed))
        self.classes = [len(names) for names in self.train.class_names]  # a depth
        chosen = args.depth or range(len(self.classes))
        if bad := [depth for depth in chosen if depth not in range(len(self.classes))]:
            raise Stop(f"--depth {bad[0]} is not there: the labels have depths 0 to {len(self.classes) - 1}")
        self.depths = [depth for depth in chosen if self.classes[depth] > 1]
        if not self.depths or args.depth and len(self.depths) < len(chosen):
            raise Stop(f"{args.data} has one class only, nothing is to be told apart: give another --depth or --data")
        self.finest = self.depths if args.depth else self.depths[-1:]
        self.clusters = args.clusters or sorted({self.classes[depth] for depth in self.depths}, reverse=True)
        self.check_numbers()
        say(f"{args.data}: {len(self.train)} labelled training pictures, {len(self.few)} for linear and finetune, "
            f"{len(self.test)} test pictures, labels of {', '.join(map(str, self.classes))} classes")

    def check_numbers(self):
        args, most = self.args, max(self.classes[depth] for depth in self.depths)
        args.k = args.k or min(20, len(self.train))
        if "knn" in args.protocol and args.k > len(self.train):
            raise Stop(f"--k {args.k} is above the {len(self.train)} labelled training pictures: give a smaller one")
        if "cluster" in args.protocol and most > len(self.test):
            raise Stop(f"--protocol cluster makes a cluster a class, but {args.data} has {len(self.test)} test "
                       f"pictures of {most} classes: leave it out, or give a coarser --depth")
        if "finetune" in args.protocol and min(args.batch_size, len(self.few)) < 2:
            raise Stop("finetune needs two pictures per step: give a larger --batch-size or more --labels")
        falling = self.clusters == sorted({*self.clusters}, reverse=True)
        if "hierarchy" in args.protocol and (self.clusters[0] > len(self.every) or not falling):
            raise Stop(f"--clusters {' '.join(map(str, self.clusters))} must fall from level to level, finest first, "
                       f"and not be above the {len(self.every)} pictures of {args.data}")

    def features(self, images):
        """(N, F) of the central crops, computed once."""
        if images not in self.cache:
            x = self.cache[images] = networks.extract_features(self.network, images, self.args.image_size,
                                                             device=self.device, workers=self.args.workers)
            if not x.norm().isfinite():
                raise FloatingPointError("features too large to compare")
        return self.cache[images]


# ---- protocols: a Task in, rows out (flat dicts, a line each in the table at the end)
def percent(predicted, truth):
    """Share of equal entries, in percent, two decimals."""
    return round(100 * int((predicted == truth).sum()) / len(predicted), 2)


def decay(done, schedule):
    """Share of the peak learning rate when `done` of the training is over."""
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 0.1 ** ((done >= 0.6) + (done >= 0.8))


def last_and_best(accuracy):
    """{epoch: percent of the test pictures} -> the last, the best and its epoch."""
    best = max(accuracy, key=accuracy.get)
    return dict(last=accuracy[max(accuracy)], best=accuracy[best], best_epoch=best)


def random_crops(task, images, batch_size, epoch):
    """Yield (pictures (b, 3, H, W), index (b,)): random resized crops and flips.

    Crops take 8 % of the area or more, the papers' habit; 30 % of pictures up to 64 px, where 8 % is too little.
    """
    args = task.args
    view = common.Augmentation(size=args.image_size, scale=(0.3 if args.image_size <= 64 else 0.08, 1.0),
                               jitter_p=0, gray_p=0)
    for _, index, (pictures,) in common.batches(images, batch_size, [view], seed=args.seed, epoch=epoch,
                                                device=task.device, workers=args.workers):
        yield pictures, index


def softmax_regression(batches, steps, x, y, classes, lrs, *, epochs, schedule, weight_decay):
    """SGD with momentum 0.9 from zero, one model per learning rate, all at once -> R x {epoch: accuracy}.

    batches(epoch) yields `steps` times (features (B, F+1), labels (B,)), the last feature 1 for the bias;
    x (N, F+1), y (N,) the test; lrs (R,) the peaks. The gradient of the mean cross-entropy is written out.
    """
    peak = torch.tensor(lrs, device=x.device)[:, None, None]
    weight = x.new_zeros(len(lrs), x.shape[1], classes)  # (R, F+1, C)
    velocity, accuracy = torch.zeros_like(weight), [{} for _ in lrs]
    for epoch in range(epochs):
        for step, (rows, target) in enumerate(batches(epoch)):
            error = (rows @ weight).softmax(dim=2)  # (R, B, C)
            error[:, torch.arange(len(rows), device=rows.device), target] -= 1
            gradient = rows.T @ error / len(rows) + weight_decay * weight  # (R, F+1, C)
            velocity = 0.9 * velocity + gradient
            weight -= peak * decay((epoch + step / steps) / epochs, schedule) * velocity
        if not weight.isfinite().all():
            raise Stop(f"the linear probe diverged in epoch {epoch + 1}: give a lower --lr or --weight-decay", code=1)
        for found, w in zip(accuracy, weight):
            found[epoch + 1] = percent((x @ w).argmax(dim=1), y)
    return accuracy


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
        order = torch.randperm(len(x), generator=ranks.random_state(args.seed, "linear", epoch)).to(x.device)
        for part in order.split(batch_size)[:len(x) // batch_size]:
            yield standard(x[part]), y[part]

    test_x = standard(task.features(task.test))  # before its labels: a damaged picture gets another one's
    for depth in task.finest:
        y, test_y = (split.labels[:, depth].to(x.device) for split in (images, task.test))
        accuracy = softmax_regression(batches, len(images) // batch_size, test_x, test_y, task.classes[depth], lrs,
                                      epochs=args.epochs, schedule=args.schedule, weight_decay=args.weight_decay)
        rates = [dict(lr=round(lr, 6), **last_and_best(a)) for lr, a in zip(lrs, accuracy)]
        rows.append(dict(depth=depth, classes=task.classes[depth], pictures=len(images),
                         **max(rates, key=lambda rate: rate["last"]), rates=rates))
    return {"linear": rows}


def vote_accuracy(votes, truth):
    """Votes (B, C), labels (B,) -> percent with the label first, and among the first 5 (None when C <= 5)."""
    ranked = votes.topk(min(5, votes.shape[1]), dim=1).indices  # (B, 5)
    hit = (ranked == truth[:, None]) & (votes.gather(1, ranked) > 0)  # a label without a vote is wrong
    return percent(hit[:, 0], True), percent(hit.any(dim=1), True) if votes.shape[1] > 5 else None


def knn(task):
    """kNN: the rule of common.knn_classify, the neighbours looked up once for all depths."""
    args, rows = task.args, []
    sim, neighbours = common.largest_products(F.normalize(task.features(task.train), dim=1),
                                              F.normalize(task.features(task.test), dim=1), args.k)
    sim, neighbours, y, test_y = sim.cpu().double(), neighbours.cpu(), task.train.labels, task.test.labels
    for depth in task.depths:
        votes = common.knn_votes(sim, y[neighbours, depth], task.classes[depth], args.temperature)
        top1, top5 = vote_accuracy(votes, test_y[:, depth])
        rows.append(dict(depth=depth, classes=task.classes[depth], pictures=len(y), k=args.k, top1=top1, top5=top5))
    return {"knn": rows}


def finetune(task):
    """The whole network, a copy of it, and a new linear layer on the labelled part of the training pictures."""
    args, device, images, rows = task.args, task.device, task.few, []
    width = task.features(task.test).shape[1]  # they are finite: only fine-tuning can spoil them
    batch_size = min(args.batch_size, max(16, len(images) // 16), len(images))
    steps, peaks = len(images) // batch_size, [lr * batch_size / 256 for lr in (args.lr_trunk, args.lr_head)]
    for depth in task.finest:
        y, test_y = (split.labels[:, depth].to(device) for split in (images, task.test))
        torch.manual_seed(args.seed)
        trunk, head = copy.deepcopy(task.network).requires_grad_(True), nn.Linear(width, task.classes[depth]).to(device)
        model, accuracy = nn.Sequential(trunk, head).train(), {}
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
            due = epoch + 1 == args.finetune_epochs or (epoch + 1) % math.ceil(args.finetune_epochs / 20) == 0
            try:
                if not all(p.isfinite().all() for p in model.parameters()):
                    raise FloatingPointError
                if due:
                    logits = networks.extract_features(model, task.test, args.image_size, device=device,
                                                       workers=args.workers)
                    accuracy[epoch + 1] = percent(logits.argmax(dim=1), test_y)
            except FloatingPointError as error:
                raise Stop(f"fine-tuning diverged in epoch {epoch + 1}: lower --lr-trunk or --lr-head", 1) from error
        rows.append(dict(depth=depth, classes=task.classes[depth], pictures=len(images), **last_and_best(accuracy)))
    return {"finetune": rows}


def cluster(task):
    """k-means of the unit features, as many clusters as classes."""
    x, y, rows = F.normalize(task.features(task.test), dim=1), task.test.labels.numpy(), []
    for depth in task.depths:
        assign = common.kmeans(x, task.classes[depth], seed=task.args.seed)[1].cpu().numpy()
        rows.append(dict(depth=depth, classes=task.classes[depth], pictures=len(x), **agreement(assign, y[:, depth])))
    return {"cluster": rows}


def tree_of_run(path, pictures):
    """clusters.csv of a run on the same pictures -> (L, N) clusters; the names may hold any bytes."""
    try:
        with open(path, newline="", encoding="latin-1") as f:
            _, *rows = csv.reader(f)
        levels = np.array([row[1:] for row in rows], dtype=np.int64)  # ValueError where lengths differ
        if levels.ndim < 2 or len(levels) != pictures or not levels.size:
            raise ValueError(f"{len(rows)} rows for {pictures} pictures")
        return levels.T
    except ValueError as error:
        raise Stop(f"{path} does not hold the tree of the run ({error}): restore it, or delete it") from error


def hierarchy(task):
    """Each level of a learnt tree against each depth of the labels; the distances of pictures in both trees."""
    args, own = task.args, task.args.run and not task.args.backbone and not task.args.untrained
    x, labels = F.normalize(task.features(task.every), dim=1), task.every.labels.numpy().T  # (depth, N)
    known, labels = labels[0] >= 0, labels[:, labels[0] >= 0]
    tree = common.hierarchical_kmeans(x, task.clusters, temperature=1.0, seed=args.seed)
    trees = {"features": torch.stack(tree.assign).cpu().numpy()}  # (L, N)
    if own:  # the backbone that the run left
        folder, left = Path(args.out).with_name(f"{Path(args.out).stem}_tree"), Path(args.run) / "clusters.csv"
        folder.mkdir(exist_ok=True)
        in_turn(folder / "tree.png", lambda: plumbing.write_tree(folder, task.every, x, tree))
        say(f"the tree of the features: {folder}/tree.png")
        if args.fingerprint != task.every.fingerprint():
            say("these are not the training pictures of the run; its clusters.csv is left out")
        elif left.is_file():
            trees["clusters.csv"] = tree_of_run(left, len(x))
    i, j = random_pairs(labels.shape[1], args.pairs, ranks.random_state(args.seed, "pairs"))
    rows, whole = [], []
    for name, levels in trees.items():
        levels = levels[:, known]
        rows += [dict(tree=name, level=level, clusters=len({*ids}), depth=depth, classes=task.classes[depth],
                      **agreement(ids, labels[depth])) for level, ids in enumerate(levels) for depth in task.depths]
        whole.append(dict(tree=name, rank_correlation=spearman(*(tree_distance(t, i, j) for t in (levels, labels)))))
    return {"hierarchy": rows, "tree": whole}


PROTOCOLS = dict(linear=linear, knn=knn, finetune=finetune, cluster=cluster, hierarchy=hierarchy)


# ---- results
def table(title, rows):
    """Print rows (flat dicts of the same keys) under their names; what is a list is left out."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    cells = [names, *([f"{round(v, 4):g}" if isinstance(v, float) else "-" if v is None else str(v)
                       for v in map(row.get, names)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    say(f"\n{title}\n" + "\n".join("  " + "  ".join(map(str.rjust, line, widths)) for line in cells))


def earlier_results(path):
    """The evaluations that --out holds already, the last one last; Stop if it is no such file, or can be none."""
    if not path.parent.is_dir() or path.exists() and not path.is_file() or not os.access(path.parent, os.W_OK):
        raise Stop(f"--out {path} cannot be written: give a file in a folder that is there")
    try:
        last = json.loads(path.read_text())
        return [*last.pop("earlier"), last]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Stop(f"{path} is no result of this script, it is not overwritten: choose another --out") from error


def in_turn(path, write):
    """write() while no other process does so for this path; who has had its turn for ten seconds is dead."""
    turn, given_up = path.with_name(path.name + ".turn"), time.monotonic() + 10
    while time.monotonic() < given_up:
        try:
            turn.touch(exist_ok=False)
            break
        except FileExistsError:
            time.sleep(0.01)
    try:
        write()
    finally:
        turn.unlink(missing_ok=True)


def add_result(path, result):
    """Write it with the earlier ones in the same file, so that none is lost."""
    in_turn(path, lambda: plumbing.write_atomically(path, json.dumps(
        dict(result, earlier=earlier_results(path)), indent=1, allow_nan=False).encode()))


def assert_unchanged(network, frozen):
    """Byte for byte: every parameter and buffer as it was, and the network in evaluation mode."""
    changed = [name for name, now in network.state_dict().items() if not torch.equal(
        now.contiguous().flatten().view(torch.uint8), frozen[name].contiguous().flatten().view(torch.uint8))]
    if changed or any(module.training for module in network.modules()):
        raise AssertionError(f"the backbone must not change while it is evaluated: {changed or 'training mode'}")


# ---- main
def evaluate(args):
    """Every protocol asked for on one frozen network; tables on stdout, the same in --out."""
    device, out = plumbing.set_up(args), Path(args.out)
    earlier_results(out)  # refuses what cannot be written
    network, results, seconds = load_backbone(args).to(device, memory_format=torch.channels_last), {}, {}
    frozen, task = copy.deepcopy(network.state_dict()), Task(args, device, network)
    pictures = dict(train=len(task.train), labelled=len(task.few), test=len(task.test))
    try:
        for protocol in dict.fromkeys(args.protocol):
            begun = time.perf_counter()
            found = PROTOCOLS[protocol](task)
            assert_unchanged(network, frozen)
            results.update(found)
            seconds[protocol] = round(time.perf_counter() - begun, 1)
            say(f"{protocol}: {seconds[protocol]} s")
            for title, rows in found.items():
                table(title, rows)
    finally:  # one that fails, or cannot be printed, leaves the results so far
        if results:
            add_result(out, dict(plumbing.circumstances(), arguments=vars(args), note=NOTE, pictures=pictures,
                                 results=results, seconds=seconds))
    say(f"\n{NOTE}\nresults  {out}")


def main(args):
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise Stop("one process evaluates: start it with python, not with torchrun")
    try:
        evaluate(args)
    except FloatingPointError as error:
        raise Stop(f"features of {args.backbone or args.run} not finite, or too large: give another network") from error


# ---- entry
if __name__ == "__main__":
    plumbing.launch(main, parse_args)
