# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""CsMl on MoCo v2: views seeded from other images, at several layers (Seed the Views 2012.02733, MoCo v2 2003.04297).

    1  every few epochs: the key encoder's backbone features of all images -> K nearest ones  common.nearest_neighbours
    2  each image comes with one of its neighbours, drawn anew each epoch; queries: q of the image, n of the neighbour,
       m of the image with a box pasted in from the neighbour, lam the share of the image left          cutmix_box
    3  keys k of the image and k_n of the neighbour; each query must tell its keys from a queue of past keys
    4  CsMl: q picks k, n picks k_n; after a warm-up each picks both; m picks both, by their areas       csml_loss
    5  step; enqueue k

CPU demo, under 3 minutes   python csml.py
the same, plain MoCo v2     python csml.py --neighbours 0 --out runs/csml-plain
several layers              python csml.py --level-weights 0 0 0.5 1 --out runs/csml-layers
one GPU                     python csml.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 csml.py --data /imagenet --amp

Symbols  q, n, m queries; k, k_n keys (B, D)    queue u (Q, D)    S stages in use, the last one alone as released
         table (N, K) image -> its neighbours, nearest first      a, b weights of own and other key

Changes relative to hirl_moco.py (--neighbours 0 is bit for bit its --clusters 0 with all settings the same)
  hierarchy     none: neighbours instead of a tree. --clusters is for tree.png and clusters.csv after training only,
                --warmup-epochs are those in which q and n pick their own key alone
  a step        queries q, n, m pass the encoder as one batch, keys k, k_n as another (release: five, each alone)
  loss          csml_loss instead of info_nce + path loss

Differs from paper or released code
  multi-level   (--level-weights) a RECONSTRUCTION. Known: the abstract pulls similar images together at different
                layers; the release has the last one alone, the default here. Inferred, and without reference numbers:
                which stages, pooling + MLP, a queue and the same loss for each, the weights, one table for all
  neighbours    an image is excluded from its own neighbours by its index. The release drops the nearest hit: if an
                exact duplicate exists, that may be the one dropped, and the image stays its own neighbour
  warm-up       the release writes "epoch > 10" into the code; here --warmup-epochs, 11 for ImageNet. CutMix mixes
                the neighbour in from the first epoch, as released, though the table is then an untrained network's
  lr, presets   cosine per step (release: per epoch); cifar, photos as in hirl_moco.py; textures: a table every epoch

In the log  image, neighbour, mix (or moco), of earlier stages with _layer1 to _layer3; neighbours_same_label, percent
"""

# ---- [method] import
import copy

# ---- [shared] imports
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import networks
import plumbing
import ranks

# ---- [method] presets: one per data scale, chosen by --data; side by side in --help, printed at start
PRESETS = {
    "textures": dict(arch="tiny", stem="3x3s2", projector="mlp-bn", image_size=32, epochs=12, batch_size=32,
                     base_lr=0.8, weight_decay=5e-4, ema_momentum=0.75, queue_size=256, clusters=[810, 270, 27],
                     warmup_epochs=7, neighbours=5, refresh_every=1, bn="sync"),
    "cifar": dict(arch="resnet18", stem="3x3", projector="mlp-bn", image_size=32, epochs=200, batch_size=512,
                  base_lr=0.06, weight_decay=5e-4, ema_momentum=0.99, queue_size=4096, clusters=[3000, 1000, 100],
                  warmup_epochs=20, neighbours=5, refresh_every=5, bn="sync"),
    "photos": dict(arch="resnet18", stem="7x7", projector="mlp-bn", image_size=96, epochs=200, batch_size=256,
                   base_lr=0.06, weight_decay=5e-4, ema_momentum=0.99, queue_size=4096, clusters=[3000, 1000, 100],
                   warmup_epochs=20, neighbours=5, refresh_every=5, bn="sync"),
    "imagenet": dict(arch="resnet50", stem="7x7", projector="mlp", image_size=224, epochs=200, batch_size=256,
                     base_lr=0.03, weight_decay=1e-4, ema_momentum=0.999, queue_size=65536,
                     clusters=[30000, 10000, 1000], warmup_epochs=11, neighbours=5, refresh_every=5, bn="shuffle"),
}

# ---- [shared: moco] augmentation: MoCo v2's; no blur at 32 px; on textures larger crops, more gray, channels shuffled
AUGMENTATIONS = {
    "textures": common.Augmentation(scale=(0.4, 1.0), gray_p=0.5, shuffle_p=0.5),
    "cifar": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2),
    "photos": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2, blur_p=0.5),
    "imagenet": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2, blur_p=0.5),
}


# ---- [method] arguments
def parse_args(argv=None):
    p = plumbing.shared_arguments(__doc__, PRESETS)
    add = p.add_argument
    add("--clusters", type=int, nargs="+", metavar="K", help="clusters per level, finest first, of the tree drawn "
        "after training; 0: none (preset)")
    add("--warmup-epochs", type=plumbing.positive(int, zero=True),
        help="epochs in which image and neighbour pick their own key alone (CsMl: 11; preset)")
    add("--projector", choices=["mlp", "mlp-bn"], help="two linear layers, or with batch norm between (preset)")
    add("--temperature", type=plumbing.positive(float), default=0.2, help="of InfoNCE (MoCo v2)")
    add("--queue-size", type=plumbing.positive(int), help="negatives Q kept (MoCo; preset)")
    add("--ema-momentum", type=plumbing.positive(float, zero=True, most=1),
        help="m: theta_k <- m theta_k + (1-m) theta_q (MoCo Eq. 2; preset)")
    add("--bn", choices=["sync", "shuffle"], help="batch norm under torchrun: over all, or MoCo's own (preset)")
    add("--neighbours", type=plumbing.positive(int, zero=True), help="nearest images to draw from; 0: MoCo v2 (preset)")
    add("--refresh-every", type=plumbing.positive(int), help="epochs between searches for them (CsMl: 5; preset)")
    add("--neighbour-weight", type=plumbing.positive(float, zero=True, most=1), default=0.5,
        help="b, after the warm-up, of the other picture's key; a = 1 - b (CsMl: 0.5)")
    add("--level-weights", type=plumbing.positive(float, zero=True), nargs=4, metavar="W", default=[0.0, 0.0, 0.0, 1.0],
        help="of the loss at a ResNet's four stages, 0: stage unused; our reconstruction, see above")
    args = plumbing.resolve_arguments(p, PRESETS, argv)
    if args.level_weights[-1] == 0:
        raise common.Stop("--level-weights must end above 0: the last stage is the one that is kept")
    if any(args.level_weights[:-1]) and args.arch.startswith("vit"):
        raise common.Stop(f"--level-weights needs stages, which --arch {args.arch} has not: give a ResNet")
    return args


# ---- [shared: mlp] encoder
class Encoder(nn.Module):
    """Backbone and MLP projector: (B, 3, H, W) -> (B, D), raw: not yet on the unit sphere."""

    def __init__(self, arch, stem, projector, dim, image_size=224):
        super().__init__()
        self.backbone, width = networks.backbone(arch, stem, image_size)
        norm = [nn.BatchNorm1d(width)] if projector == "mlp-bn" else []
        self.projector = nn.Sequential(nn.Linear(width, width), *norm, nn.ReLU(inplace=True), nn.Linear(width, dim))

    def forward(self, x):
        return self.projector(self.backbone(x))


# ---- [shared: moco] model
class MoCo(nn.Module):
    """Query encoder, its slow copy for the keys, a queue of past keys."""

    def __init__(self, encoder, dim, queue_size):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))  # (Q, D)
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64))  # the row of the oldest

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum):
        """theta_k <- m theta_k + (1-m) theta_q: parameters only; the copy has its own batch-norm statistics."""
        keys, queries = [*self.encoder_k.parameters()], [*self.encoder_q.parameters()]
        torch.optim.swa_utils.get_ema_multi_avg_fn(ema_momentum)(keys, queries, None)  # MoCo Eq. 2: changes keys

    @torch.no_grad()
    def enqueue(self, keys):
        """The newest keys replace the oldest; any number of them, the queue wraps around."""
        size = len(self.queue)
        row = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % size
        self.queue[row[-size:]] = keys[-size:].to(self.queue.dtype)  # of more keys than rows, the last
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)


# ---- [method] CutMix
def cutmix_box(height, width, lam, center):
    """The box that CutMix (1905.04899) cuts out: sides sqrt(1 - lam) of the picture's, clipped at its edge.

    height, width pixels; lam in [0, 1], the share of the picture to keep; center (row, column) of the box.
    Returns (row0, col0, row1, col1, lam), half open, lam now 1 - area of the box / area of the picture.
    As released: a side of odd length loses a pixel, for half sides are whole.
    """
    half = [int(side * math.sqrt(1 - lam)) // 2 for side in (height, width)]
    row0, col0 = (max(0, c - h) for c, h in zip(center, half))
    row1, col1 = (min(side, c + h) for side, c, h in zip((height, width), center, half))
    return row0, col0, row1, col1, 1 - (row1 - row0) * (col1 - col0) / (height * width)


def paste_box(images, others, row0, col0, row1, col1):
    """The images (B, C, H, W) with a box taken from the others."""
    mixed = images.clone()
    mixed[:, :, row0:row1, col0:col1] = others[:, :, row0:row1, col0:col1]
    return mixed


def cutmix(images, others, generator):
    """One box of all images (B, C, H, W) from the others -> mixed images, share of the image that is left in them."""
    height, width = images.shape[2:]
    lam = torch.rand(3, generator=generator).median().item()  # the middle of three uniform numbers: Beta(2, 2)
    center = [int(torch.randint(side, (), generator=generator)) for side in (height, width)]
    *box, lam = cutmix_box(height, width, lam, center)
    return paste_box(images, others, *box), lam


# ---- [method] neighbours
def draw_neighbours(table, generator):
    """One of the neighbours (N, K) of each image, a table on any device -> (N,) on the CPU."""
    return table.cpu().gather(1, torch.randint(table.shape[1], (len(table), 1), generator=generator))[:, 0]


def same_label(labels, table):
    """Percent of the neighbours (N, K) that have their image's label, a label depth; -1 is unknown. None for none."""
    if labels is None or table is None:
        return None
    own, others = labels[:, None], labels[table.cpu()]  # (N, 1, depth), (N, K, depth)
    known = (own >= 0) & (others >= 0)
    share = ((own == others) & known).sum((0, 1)) / known.sum((0, 1)).clamp(min=1)
    return [round(100 * value, 2) for value in share.tolist()]


# ---- [method] loss
def csml_loss(q, k, queue, lam, weights, temperature):
    """Image, neighbour and mixed picture must each tell the keys of image and neighbour from the queue.

    l(x, y) = mean_n -log exp(x_n.y_n/T) / (exp(x_n.y_n/T) + sum_j exp(x_n.u_j/T)), each key with a softmax of its own
    image      1/3 [ a l(q, k) + b l(q, k_n) ]
    neighbour  1/3 [ b l(n, k) + a l(n, k_n) ]
    mix        1/3 [ lam l(m, k) + (1 - lam) l(m, k_n) ]                                            # CsMl

    q        (3, B, D) unit queries q, n, m of image, neighbour and mixed picture; the gradient goes here alone
    k        (2, B, D) unit keys k, k_n of image and neighbour
    queue    (Q, D) unit rows u_j
    lam      share of the image in the mixed picture
    weights  (a, b): (1, 0) in the warm-up, (1/2, 1/2) after it; a + b = 1
    Returns the three terms, (3,); their sum is the loss. A network that tells nothing apart scores ln(1+Q)/3 in each.
    """
    a, b = weights
    share = torch.tensor([[a, b], [b, a], [lam, 1 - lam]], dtype=q.dtype).to(q.device, non_blocking=True)  # (3, 2)
    pos = (q[:, None] * k.detach()).sum(dim=3) / temperature  # (3, 2, B)
    neg = (q @ queue.detach().T / temperature).logsumexp(dim=2)  # (3, B)
    nce = (torch.logaddexp(pos, neg[:, None]) - pos).mean(dim=2)  # (3, 2), the six l(., .)
    return (share * nce).sum(dim=1) / 3  # CsMl


# ---- [method] several layers: with --level-weights alone
class StageEncoder(nn.Module):
    """An Encoder that projects S stages of its ResNet (4 the last): (B, 3, H, W) -> (B, S D), raw, D columns each.

    Earlier stages are pooled and get a projector like the last one's: a reconstruction.
    """

    def __init__(self, encoder, stages, projector, dim):
        super().__init__()
        self.backbone, self.projectors = encoder.backbone, nn.ModuleDict()
        for stage in stages:
            width = encoder.projector[0].in_features >> 4 - stage  # each stage is half as wide as the next
            norm = [nn.BatchNorm1d(width)] if projector == "mlp-bn" else []
            self.projectors[str(stage)] = encoder.projector if stage == 4 else nn.Sequential(
                nn.Linear(width, width), *norm, nn.ReLU(inplace=True), nn.Linear(width, dim))

    def forward(self, x):
        trunk, raw = self.backbone, []
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        for stage in "1234":
            x = trunk.get_submodule("layer" + stage)(x)
            if stage in self.projectors:
                raw.append(self.projectors[stage](trunk.avgpool(x).flatten(1)))
        return torch.cat(raw, dim=1)


def unit_rows(x, dim):
    """Rows (n, S D) with each of their S embeddings brought to unit length."""
    return F.normalize(x.unflatten(1, (-1, dim)), dim=2).flatten(1)


# ---- [shared: moco] loss
def info_nce(q, k, queue, temperature):
    """The query must tell its own key from the queue: -log exp(q.k/T) / (exp(q.k/T) + sum_j exp(q.u_j/T)).

    q, k (B, D) unit rows, queue (Q, D) unit rows u_j; the gradient goes to q alone. Returns a scalar;
    a network that tells nothing apart scores ln(1 + Q). Source: MoCo (1911.05722) Eq. 1.
    """
    pos = (q * k.detach()).sum(dim=1, keepdim=True)  # (B, 1)
    neg = q @ queue.detach().T  # (B, Q)
    logits = torch.cat([pos, neg], dim=1) / temperature  # (B, 1+Q), the answer is column 0
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))  # MoCo Eq. 1


def main(args):
    # ---- [shared] data
    device = plumbing.set_up(args)
    run = plumbing.Run(args)
    train, test = common.load_data(args.data, args.data_root, device, args.validation)
    batch_size = plumbing.fit_batch(args, len(train))  # fit: a preset's number, or less where images are few
    clusters = plumbing.fit_clusters(args, len(train))  # K_l, finest first; [] without hierarchy
    steps_per_epoch = len(train) // batch_size  # what is left over waits for another epoch's order
    peak_lr = args.base_lr * batch_size / 256
    augmentation = AUGMENTATIONS[args.preset]._replace(size=args.image_size)

    # ---- [method] model
    neighbours = plumbing.fit("neighbours", args, at_most=len(train) - 1, what="other pictures")
    queue_size = plumbing.fit("queue_size", args, at_most=len(train))
    encoder = Encoder(args.arch, args.stem, args.projector, args.dim, args.image_size)
    stages = [stage for stage, weight in enumerate(args.level_weights, 1) if weight > 0]  # as released: the last
    if len(stages) == 1:
        model = MoCo(encoder, args.dim, queue_size)
    else:  # D columns per stage, in the rows of the encoder and of the queue
        model = MoCo(StageEncoder(encoder, stages, args.projector, args.dim), len(stages) * args.dim, queue_size)
        model.queue = unit_rows(model.queue, args.dim)
    levels = [(f"_layer{stage}" if stage < 4 else "", args.level_weights[stage - 1],  # names' end in the log, weight
               slice(place * args.dim, (place + 1) * args.dim)) for place, stage in enumerate(stages)]  # columns
    if args.bn == "sync":
        ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    encode_q, encode_k = (torch.compile(encoder) if args.compile else encoder
                          for encoder in (model.encoder_q, model.encoder_k))
    names = ["image", "neighbour", "mix"] if neighbours else ["moco"]
    chance = {name + layer: w * math.log(1 + queue_size) / len(names) for layer, w, _ in levels for name in names}
    exported, clustered = model.encoder_q, model.encoder_k.backbone  # neighbours: by the key encoder's backbone
    views = [augmentation] * 2  # of each image, and of the neighbour that it comes with

    # ---- [method] optimizer
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], peak_lr,
                                momentum=0.9, weight_decay=args.weight_decay)

    # ---- [method] start, or resume
    run.start(train, device, clusters=clusters, batch_size=batch_size, steps_per_epoch=steps_per_epoch,
              peak_lr=peak_lr, chance_level_loss={name: round(loss, 4) for name, loss in chance.items()})
    start_epoch, start_step, table = run.resume(device, model=model, optimizer=optimizer)  # (N, K) neighbours

    # ---- [shared] features(network, images), central crops in evaluation mode; knn(), accuracies; the tree
    features, knn = plumbing.evaluation(args, device, train, test, exported.backbone)

    def grow_tree(x, seed):  # features, rows of this process's pictures -> the Hierarchy of all N
        return common.hierarchical_kmeans(x, clusters, temperature=args.temperature, seed=seed)  # temperature: of phi

    # ---- [shared] epochs
    if start_epoch == start_step == 0:
        run.write(dict(epoch=0, knn=knn(), knn_pixels=networks.knn_of_pixels(train, test, args.image_size, device)))
    for epoch in range(start_epoch, args.epochs):

        # ---- [method] neighbours of the epochs to come
        if neighbours and epoch % args.refresh_every == 0 and start_step == 0:
            x = F.normalize(features(clustered, train), dim=1)
            table = ranks.all_gather_rows(common.nearest_neighbours(x, neighbours))
        if neighbours:  # one drawn anew for each visit
            train.partner = draw_neighbours(table, ranks.random_state(args.seed, epoch, "neighbour"))

        # ---- [shared] batches: index (B,), places in the data set; crops, a list of views (B, 3, H, W)
        batches = common.batches(train, batch_size, views, seed=args.seed, epoch=epoch, start=start_step, device=device,
                                 workers=args.workers)
        for step, index, crops in run.timed(batches, epoch, steps_per_epoch - start_step):
            done = (epoch + step / steps_per_epoch) / args.epochs  # share of the run
            place = (args.seed, epoch, step)  # seeds every random draw of this step

            # ---- [shared: cosine] learning rate
            plumbing.set_lr(optimizer, 0.5 * peak_lr * (1 + math.cos(math.pi * done)))

            # ---- [method] queries and keys
            views_q, views_k = [*crops[0::2]], torch.cat(crops[1::2])  # of the image, then of its neighbour
            if neighbours:
                mixed, lam = cutmix(*views_q, ranks.random_state(*place, "cutmix"))
                views_q.append(mixed)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                raw = encode_q(torch.cat(views_q)).float()  # (3B, D)
                with torch.no_grad():  # no gradient to keys
                    model.update_key_encoder(args.ema_momentum)  # before encoding
                    raw_k = ranks.make_keys(encode_k, views_k, args.bn, ranks.random_state(*place, "shuffle"))
            qs, ks = (unit_rows(x.float(), args.dim).unflatten(0, (-1, len(index))) for x in (raw, raw_k))
            k = ks[0]  # of qs (3, B, D) and ks (2, B, D), the image's: the one that is queued

            # ---- [method] loss: the queue is that of before this step
            b, losses = args.neighbour_weight if epoch >= args.warmup_epochs else 0.0, {}
            for layer, weight, columns in levels:  # the last one alone, without --level-weights
                q, keys, queue = qs[..., columns], ks[..., columns], model.queue[:, columns]
                terms = (csml_loss(q, keys, queue, lam, (1 - b, b), args.temperature) if neighbours else
                         [info_nce(q[0], keys[0], queue, args.temperature)])
                losses |= {name + layer: weight * term for name, term in zip(names, terms)}
            watched = {"feature_std": plumbing.feature_std(q[0])}  # of the last stage

            # ---- [shared] step
            optimizer.zero_grad()
            sum(losses.values()).backward()
            ranks.average(p.grad for p in model.parameters())  # over processes
            optimizer.step()

            # ---- [shared: moco] queue
            model.enqueue(ranks.all_gather_rows(k, equal=True))  # of all processes, oldest out

            # ---- [method] log
            run.end_step(epoch, step, {**losses, **watched}, table)
        run.end_epoch(epoch, table, knn, neighbours_same_label=same_label(train.labels, table))
        start_step = 0

    # ---- [shared] what remains
    run.save_backbone(exported.backbone)
    if clusters:
        x = F.normalize(features(clustered, train), dim=1)
        plumbing.write_tree(run.folder, train, x, grow_tree(x, seed=args.seed))
    run.verdict()


# ---- [shared] entry
if __name__ == "__main__":
    plumbing.launch(main, parse_args)
