# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HIRL on SimCLR: hierarchical image representation learning without a queue or a slow encoder.

This project's own composition: HIRL (2205.13159) was published on MoCo v2, SwAV and others, never on SimCLR
(2002.05709). There is no paper's figure to reach and no released code to be faithful to.

    1  z1, z2 = normalise(encoder(view 0)), normalise(encoder(view 1)), all 2B views in one forward pass
    2  SimCLR: each view picks its partner out of the 2B-1 other views of the batch                nt_xent
    3  once per epoch, after a warm-up: features of all images -> k-means -> k-means of its centres
       -> ..., a tree of prototypes c^l, level 0 (leaves) the finest                   hierarchical_kmeans
    4  one small head per level turns view 0's raw projection into z^l
    5  HIRL: the image scores high on its own path of the tree, S = prod_l (1 + z^l.c^l)/2, and low
       on random other paths                                                            semantic_path_loss
    6  step on SimCLR + HIRL, with LARS at paper scale

CPU demo, under 3 minutes   python hirl_simclr.py
the same without hierarchy  python hirl_simclr.py --clusters 0 --out runs/simclr
one GPU                     python hirl_simclr.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 hirl_simclr.py --data /imagenet --amp

Symbols  z1, z2 both views' embeddings (B, D)            L levels, 0 the finest      K_l = --clusters
         z level embeddings (B, L, D)  c prototypes[l] (K_l, D)  assign[l] image -> cluster (released
         code: im2cluster)             parent[l] cluster -> cluster one level up (cluster2cluster)

Changes relative to hirl_moco.py
  base loss     NT-Xent over the batch's own views; gradients reach both views, of all processes
  model         one encoder: what is trained is also what is clustered; no slow copy, no queue
  optimizer     LARS at paper scale; the learning rate may warm up (--lr-warmup)
  batch norm    over both views of the whole batch, always (SimCLR's "global BN")

Differs from paper or released code
  path loss     on view 0 alone, as HIRL does with its base methods; path loss and phi: see hirl_moco.py
  LARS          decay joins the gradient after its norm is taken, as in LARC; SimCLR's release takes the norm of
                both together (at decay 1e-6 hardly a difference) and keeps the rate in the momentum buffer, so
                that old gradients keep their old rate
  projector     no batch norm on the output, which SimCLR's release has, so that HIRL's heads read what they
                read in hirl_moco.py
  small data    SGD, and milder crops and colours than SimCLR's
  lr            cosine per step
  lr warm-up    a share of the run (--lr-warmup), not epochs, so that it shrinks with --epochs: 10 of 200

In the log  simclr, at chance ln(2B - 1), chance_level_loss in config.json; path, with a tree, times --path-weight
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
    "textures": dict(arch="tiny", stem="3x3s2", projector="mlp-bn", image_size=32, epochs=16, batch_size=128,
                     base_lr=0.3, weight_decay=5e-4, optimizer="sgd", lr_warmup=0.0, temperature=0.2,
                     clusters=[810, 270, 27], warmup_epochs=8, negative_paths=100),
    "cifar": dict(arch="resnet18", stem="3x3", projector="mlp-bn", image_size=32, epochs=200, batch_size=512,
                  base_lr=0.06, weight_decay=5e-4, optimizer="sgd", lr_warmup=0.0, temperature=0.2,
                  clusters=[3000, 1000, 100], warmup_epochs=20, negative_paths=500),
    "photos": dict(arch="resnet18", stem="7x7", projector="mlp-bn", image_size=96, epochs=200, batch_size=256,
                   base_lr=0.06, weight_decay=5e-4, optimizer="sgd", lr_warmup=0.0, temperature=0.2,
                   clusters=[3000, 1000, 100], warmup_epochs=20, negative_paths=500),
    "imagenet": dict(arch="resnet50", stem="7x7", projector="mlp-bn", image_size=224, epochs=200, batch_size=4096,
                     base_lr=0.3, weight_decay=1e-6, optimizer="lars", lr_warmup=0.05, temperature=0.1,
                     clusters=[30000, 10000, 1000], warmup_epochs=20, negative_paths=1000),
}

# ---- [method] augmentation: SimCLR's, milder below ImageNet, no blur at 32 px
AUGMENTATIONS = {
    "textures": common.Augmentation(scale=(0.4, 1.0), gray_p=0.5, shuffle_p=0.5),
    "cifar": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2),
    "photos": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2, blur_p=0.5),
    "imagenet": common.Augmentation(scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), gray_p=0.2, blur_p=0.5),
}


# ---- [method] arguments
def parse_args(argv=None):
    p = plumbing.shared_arguments(__doc__, PRESETS)
    add = p.add_argument
    add("--projector", choices=["mlp", "mlp-bn"], help="two linear layers, or with batch norm between (preset)")
    add("--temperature", type=plumbing.positive(float), help="of NT-Xent (SimCLR; preset)")
    add("--optimizer", choices=["sgd", "lars"], help="momentum SGD, or LARS for large batches (SimCLR; preset)")
    add("--lr-warmup", type=plumbing.positive(float, zero=True, most=1),
        help="share of the run over which the learning rate rises from 0 (SimCLR; preset)")
    add("--negative-paths", type=plumbing.positive(int), help="M random paths per image (HIRL; preset)")
    add("--path-weight", type=plumbing.positive(float), default=1.0, help="of the path loss (HIRL: 1)")
    return plumbing.resolve_arguments(p, PRESETS, argv)


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


# ---- [shared: hirl] heads
def level_head(dim):
    """HIRL's head of one level, (B, D) -> (B, D); it reads the raw projection."""
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
                         nn.Linear(dim, dim))


# ---- [method] loss
def nt_xent(z1, z2, temperature):
    """Each view picks its partner among all others: -log exp(z_i.z_p(i)/T) / sum_{j != i} exp(z_i.z_j/T).

    z1, z2 (B, D) unit rows, row n of each a view of image n; i and j run over all 2B views, p(i) is the
    other view of i's image; the gradient goes to both. Returns a scalar, the mean over the 2B views; a
    network that tells nothing apart scores ln(2B-1). Source: SimCLR (2002.05709) Eq. 1.
    """
    z = torch.cat([z1, z2])  # (2B, D)
    i = torch.arange(len(z), device=z.device)
    logits = (z @ z.T / temperature).masked_fill(i[:, None] == i, -math.inf)  # (2B, 2B), j != i
    return F.cross_entropy(logits, i.roll(len(z1)))  # SimCLR Eq. 1


# ---- [method] optimizer LARS
class LARS(torch.optim.Optimizer):
    """Momentum SGD that moves each weight tensor w by lr * trust of its own norm (1708.03888).

    g <- trust |w| / (|g| + beta |w| + eps) (g + beta w), beta the weight decay; where w or g is all zero, g
    stays, without decay. Parameters of one dimension, biases and batch norm, take g as it is (SimCLR). Then
    v <- momentum v + g and w <- w - lr v. A parameter without gradient stays where it is.
    """

    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0, trust=0.001, eps=1e-8):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta = group["weight_decay"]
            for w in (w for w in group["params"] if w.grad is not None):
                g = w.grad
                if w.ndim > 1:
                    w_norm, g_norm = w.norm(), g.norm()
                    ratio = group["trust"] * w_norm / (g_norm + beta * w_norm + group["eps"])
                    g = torch.where((w_norm > 0) & (g_norm > 0), ratio * (g + beta * w), g)  # no wait for the GPU
                if "v" not in self.state[w]:
                    self.state[w]["v"] = torch.zeros_like(w)
                self.state[w]["v"].mul_(group["momentum"]).add_(g)
                w.sub_(group["lr"] * self.state[w]["v"])


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
    model = nn.Module()
    model.encoder = Encoder(args.arch, args.stem, args.projector, args.dim, args.image_size)
    model.heads = nn.ModuleList(level_head(args.dim) for _ in clusters)  # last, so that the rest starts as without
    ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    encode = torch.compile(model.encoder) if args.compile else model.encoder
    chance = {"simclr": math.log(2 * batch_size - 1)}
    exported = clustered = model.encoder  # backbone.pt and the tree both come from it
    views = [augmentation] * 2  # of each image

    # ---- [method] optimizer
    make = dict(sgd=torch.optim.SGD, lars=LARS)[args.optimizer]
    optimizer = make(model.parameters(), peak_lr, momentum=0.9, weight_decay=args.weight_decay)

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

            # ---- [method] learning rate
            warm = args.lr_warmup  # share of the run
            factor = done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))
            plumbing.set_lr(optimizer, peak_lr * factor)

            # ---- [method] both views
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                raw, raw2 = encode(torch.cat(crops)).float().chunk(2)  # (B, D) each; batch norm sees 2B views
            z1, z2 = F.normalize(raw, dim=1), F.normalize(raw2, dim=1)

            # ---- [method] base loss
            everyone = [ranks.all_gather_rows(z, equal=True) for z in (z1, z2)]  # of all processes
            losses = {"simclr": nt_xent(*everyone, args.temperature)}
            watched = {"feature_std": plumbing.feature_std(z1)}

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
