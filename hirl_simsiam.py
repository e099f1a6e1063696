# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HIRL on SimSiam: no negatives, no queue, no slow encoder (HIRL 2205.13159, SimSiam 2011.10566).

    1  projection z = projector(backbone(view)), prediction p = predictor(z), one forward pass per view
    2  SimSiam: p of one view points where z of the other does, and no gradient reaches that z; the
       predictor and this stop-gradient alone keep z from collapsing to one point        simsiam_loss
    3  once per epoch, after a warm-up: z of all images, in evaluation mode -> k-means -> k-means of
       its centres -> ..., a tree of prototypes c^l, level 0 (leaves) the finest  hierarchical_kmeans
    4  one small head per level turns z of view 0, with its gradient, into level embeddings z^l
    5  HIRL: the image scores high on its own path of the tree, S = prod_l (1 + z^l.c^l)/2, and low
       on random other paths                                                       semantic_path_loss
    6  step on SimSiam + HIRL; the predictor keeps its learning rate, the rest follows the cosine

CPU demo, under 3 minutes   python hirl_simsiam.py
the same without hierarchy  python hirl_simsiam.py --clusters 0 --out runs/simsiam
one GPU                     python hirl_simsiam.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 hirl_simsiam.py --data /imagenet --amp

Symbols  p, z predictions, projections (V, B, D), V = 2 views   L levels, 0 the finest   K_l = --clusters
         z^l level embeddings (B, L, D)  c prototypes[l] (K_l, D)  assign[l] image -> cluster (released
         code: im2cluster)             parent[l] cluster -> cluster one level up (cluster2cluster)

Is it learning?  The loss falls from about 0 (nothing in common) towards -1. A fall to -1 at once, with feature_std
near 0, is the collapse: all images on one point. Healthy: feature_std near 1.

Changes relative to hirl_moco.py
  base loss     the two views predict each other; no negatives, so no temperature
  model         one encoder, projector with batch norm at its output, predictor; no slow copy, no queue
  optimizer     two groups: the predictor's learning rate stays at its peak

Differs from paper or released code
  heads, tree   on z. HIRL's release reads attributes that nothing sets, and crashes at its first clustering
  passes        one per view; HIRL's release encodes each view twice: same loss and gradient, twice the time
  optimizer     SGD, as SimSiam and HIRL's code; HIRL's configuration says LARS, which nothing reads
  predictor lr  constant (HIRL; an option in SimSiam); --no-fix-predictor-lr: it follows the cosine too
  weight decay  on every tensor, batch norm and biases too, as released
  lr            cosine per step; both releases floor the epoch
  views         two; HIRL's loss takes more (and so does simsiam_loss), its configuration does not
  projector     its last layer has no bias; SimSiam's has a frozen one, which the batch norm after it removes
  small data    D 256, as k-means in 2048 dimensions is slow; no --zero-init; --path-weight 0.1, as with HIRL's 1 the
                tree hurts (results/README.md); cifar: two projector layers; textures: narrow layers, and a predictor
                with 15 times the learning rate of the rest: it must keep up with z, and in so few steps that decides

In the log  simsiam, 0 at chance, at best -1; path, with a tree, times --path-weight
"""

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
    "textures": dict(arch="tiny", stem="3x3s2", image_size=32, epochs=20, batch_size=64, base_lr=0.6, predictor_lr=15.0,
                     weight_decay=5e-4, dim=256, projector_layers=3, projector_width=256, predictor_width=64,
                     zero_init=False, clusters=[810, 270, 27], warmup_epochs=10, negative_paths=100, path_weight=0.1),
    "cifar": dict(arch="resnet18", stem="3x3", image_size=32, epochs=200, batch_size=512, base_lr=0.03,
                  predictor_lr=1.0, weight_decay=5e-4, dim=256, projector_layers=2, projector_width=2048,
                  predictor_width=64, zero_init=False, clusters=[3000, 1000, 100], warmup_epochs=20,
                  negative_paths=500, path_weight=0.1),
    "photos": dict(arch="resnet18", stem="7x7", image_size=96, epochs=200, batch_size=256, base_lr=0.05,
                   predictor_lr=1.0, weight_decay=5e-4, dim=256, projector_layers=3, projector_width=2048,
                   predictor_width=64, zero_init=False, clusters=[3000, 1000, 100], warmup_epochs=20,
                   negative_paths=500, path_weight=0.1),
    "imagenet": dict(arch="resnet50", stem="7x7", image_size=224, epochs=200, batch_size=512, base_lr=0.05,
                     predictor_lr=1.0, weight_decay=1e-4, dim=2048, projector_layers=3, projector_width=2048,
                     predictor_width=512, zero_init=True, clusters=[30000, 10000, 1000], warmup_epochs=20,
                     negative_paths=1000, path_weight=1.0),
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
    add("--dim", type=plumbing.positive(int), help="width D of the embedding (preset)")
    add("--projector-layers", type=plumbing.positive(int), help="linear layers of the projector (SimSiam: 3; preset)")
    add("--projector-width", type=plumbing.positive(int), help="width between them (SimSiam: as the output; preset)")
    add("--predictor-width", type=plumbing.positive(int), help="hidden units of the predictor (SimSiam: D/4; preset)")
    add("--predictor-lr", type=plumbing.positive(float), help="its learning rate, as a multiple of peak-lr (preset)")
    add("--fix-predictor-lr", action=plumbing.argparse.BooleanOptionalAction, default=True,
        help="it stays at that, or follows the cosine (SimSiam Table 1)")
    add("--zero-init", action=plumbing.argparse.BooleanOptionalAction,
        help="residual blocks start as the identity: 0 in their last batch norm (SimSiam; preset)")
    add("--temperature", type=plumbing.positive(float), default=0.2, help="mean of phi, which the loss does not read")
    add("--negative-paths", type=plumbing.positive(int), help="M random paths per image (HIRL; preset)")
    add("--path-weight", type=plumbing.positive(float), help="of the path loss (HIRL: 1; preset)")
    return plumbing.resolve_arguments(p, PRESETS, argv)


# ---- [shared: simsiam, mocov3] encoder
def mlp(*widths, last_norm):
    """(B, widths[0]) -> (B, widths[-1]): linear layers without bias, batch norm and ReLU between them.

    last_norm: a batch norm without scale and shift at the end.
    """
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2], *([nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []))


class Encoder(nn.Module):
    """Backbone and projector: (B, 3, H, W) -> (B, D), raw: not yet on the unit sphere."""

    def __init__(self, backbone, projector):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, x):
        return self.projector(self.backbone(x))


# ---- [shared: hirl] heads
def level_head(dim):
    """HIRL's head of one level, (B, D) -> (B, D); it reads the raw projection."""
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
                         nn.Linear(dim, dim))


# ---- [method] networks
class SimSiam(nn.Module):
    """An encoder whose projector ends in a batch norm, and a predictor with a bottleneck, D -> width -> D."""

    def __init__(self, encoder, dim, predictor_width):
        super().__init__()
        self.encoder = encoder
        self.predictor = nn.Sequential(nn.Linear(dim, predictor_width, bias=False), nn.BatchNorm1d(predictor_width),
                                       nn.ReLU(inplace=True), nn.Linear(predictor_width, dim))


# ---- [method] loss
def simsiam_loss(p, z):
    """Each view's prediction points where another view's projection does: mean over i != j of -cos(p_i, z_j).

    p, z (V, B, D) raw rows, [i, n] of view i of image n; the gradient goes to p alone. Returns a scalar, the
    mean over images and the V(V-1) ordered pairs of views, between -1 and 1; 0 for directions that have
    nothing in common. Source: SimSiam (2011.10566) Eq. 1-4, V = 2; more views as in HIRL's release.
    """
    p, z = F.normalize(p, dim=2), F.normalize(z.detach(), dim=2)  # no gradient to z
    cosine = torch.einsum("ind, jnd -> ij", p, z) / p.shape[1]  # (V, V), means over the batch
    return -(cosine.sum() - cosine.diagonal().sum()) / (len(p) * (len(p) - 1))  # Eq. 4; trace() would wait for a GPU


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
    backbone, width = networks.backbone(args.arch, args.stem, args.image_size)
    hidden = [args.projector_width] * (args.projector_layers - 1)
    encoder = Encoder(backbone, mlp(width, *hidden, args.dim, last_norm=True))
    model = SimSiam(encoder, args.dim, args.predictor_width)
    for block in backbone.modules():
        if args.zero_init and hasattr(block, "conv2"):  # a residual block of two or three convolutions
            nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)
    model.heads = nn.ModuleList(level_head(args.dim) for _ in clusters)  # last, so that the rest starts as without
    ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    encode = torch.compile(model.encoder) if args.compile else model.encoder
    chance = {"simsiam": 0.0}
    exported = clustered = model.encoder  # backbone.pt and the tree both come from it
    views = [augmentation] * 2  # of each image

    # ---- [method] optimizer
    optimizer = torch.optim.SGD([dict(params=[*model.encoder.parameters(), *model.heads.parameters()]),
                                 dict(params=model.predictor.parameters())], peak_lr,
                                momentum=0.9, weight_decay=args.weight_decay)

    # ---- [shared: tree] start, or resume
    run.start(train, device, clusters=clusters, batch_size=batch_size, steps_per_epoch=steps_per_epoch,
              peak_lr=peak_lr, chance_level_loss={name: round(loss, 4) for name, loss in chance.items()})
    start_epoch, start_step, hierarchy = run.resume(device, model=model, optimizer=optimizer)

    # ---- [shared] features(network, images), central crops in evaluation mode; knn(), accuracies; the tree
    features, knn = plumbing.evaluation(args, device, train, test, exported.backbone)

    def grow_tree(x, seed):  # features, rows of this process's pictures -> the Hierarchy of all N
        return common.hierarchical_kmeans(x, clusters, temperature=args.temperature, seed=seed)  # temperature: of phi

    # ---- [shared] epochs
    if start_epoch == start_step == 0:
        run.write(dict(epoch=0, knn=knn(), knn_pixels=networks.knn_of_pixels(train, test, args.image_size, device)))
    for epoch in range(start_epoch, args.epochs):

        # ---- [shared: tree] tree of the epoch; one resumed half-way (start_step > 0) has it from the checkpoint
        if clusters and epoch >= args.warmup_epochs and start_step == 0:
            hierarchy = grow_tree(F.normalize(features(clustered, train), dim=1), seed=args.seed + epoch)

        # ---- [shared] batches: index (B,), places in the data set; crops, a list of views (B, 3, H, W)
        batches = common.batches(train, batch_size, views, seed=args.seed, epoch=epoch, start=start_step, device=device,
                                 workers=args.workers)
        for step, index, crops in run.timed(batches, epoch, steps_per_epoch - start_step):
            done = (epoch + step / steps_per_epoch) / args.epochs  # share of the run
            place = (args.seed, epoch, step)  # seeds every random draw of this step

            # ---- [shared: cosine] learning rate
            plumbing.set_lr(optimizer, 0.5 * peak_lr * (1 + math.cos(math.pi * done)))

            # ---- [method] the predictor's learning rate
            lr = peak_lr if args.fix_predictor_lr else optimizer.param_groups[0]["lr"]
            optimizer.param_groups[1]["lr"] = args.predictor_lr * lr

            # ---- [method] projections and predictions
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                projections = torch.stack([encode(view) for view in crops])  # (V, B, D); a view is a batch of its own
                predictions = torch.stack([model.predictor(z) for z in projections]).float()  # (V, B, D)
            raw = projections[0].float()  # (B, D), with its gradient

            # ---- [method] base loss
            losses = {"simsiam": simsiam_loss(predictions, projections.float())}
            watched = {"feature_std": plumbing.feature_std(F.normalize(raw, dim=1))}

            # ---- [shared: hirl] path loss; leaves are drawn for the whole batch, a process takes its rows
            if hierarchy:
                z = F.normalize(torch.stack([head(raw) for head in model.heads], dim=1), dim=2)  # (B, L, D)
                leaves = torch.randint(len(hierarchy.prototypes[0]), (batch_size, args.negative_paths), device=device,
                                       generator=ranks.random_state(*place, "negative paths", device=device))
                leaves = leaves[ranks.local_rows(batch_size)]  # (B, M) paths, by leaf
                losses["path"] = args.path_weight * common.semantic_path_loss(z, hierarchy, index, leaves)

            # ---- [shared] step
            optimizer.zero_grad()
            sum(losses.values()).backward()
            ranks.average(p.grad for p in model.parameters())  # over processes
            optimizer.step()

            # ---- [shared: tree] log; after Ctrl-C or SIGTERM the run, with its tree, is saved here and stops
            run.end_step(epoch, step, {**losses, **watched}, hierarchy)
        run.end_epoch(epoch, hierarchy, knn, clusters_in_use=hierarchy and [len(a.unique()) for a in hierarchy.assign])
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
