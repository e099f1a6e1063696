# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HIRL on MoCo v2: hierarchical image representation learning (HIRL 2205.13159, MoCo v2 2003.04297).

    1  q = normalise(encoder_q(view 0)), k = normalise(encoder_k(view 1)), theta_k is an EMA of theta_q
    2  MoCo: q must tell its own key k from a queue of past keys                               info_nce
    3  once per epoch, after a warm-up: key features of all images -> k-means -> k-means of its
       centres -> ..., a tree of prototypes c^l, level 0 (leaves) the finest        hierarchical_kmeans
    4  one small head per level turns the query's raw projection into a level embedding z^l
    5  HIRL: the image scores high on its own path of the tree, S = prod_l (1 + z^l.c^l)/2, and low
       on random other paths                                                        semantic_path_loss
    6  step on MoCo + HIRL; enqueue k

CPU demo, under 3 minutes   python hirl_moco.py
the same without hierarchy  python hirl_moco.py --clusters 0 --out runs/moco
one GPU                     python hirl_moco.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 hirl_moco.py --data /imagenet --amp

Symbols  B batch (under torchrun, this process's rows of it), N images, D = --dim, M = --negative-paths
         q, k query and key (B, D)     queue u (Q, D)       L levels, 0 the finest      K_l = --clusters
         z level embeddings (B, L, D)  c prototypes[l] (K_l, D)  assign[l] (N,) image -> cluster (released
         code: im2cluster)             parent[l] (K_l,) cluster -> cluster one level up (cluster2cluster)

Changes relative to: nothing, read this script first; the siblings say what they change relative to it.

Differs from paper or released code
  path loss     scores against all prototypes, then picks: same value and gradient, less time and memory
  phi           (a temperature per prototype, PCL's, 2005.04966) comes with the tree; HIRL's loss does not read it
  small data    presets below ImageNet: batch norm in the projector (mlp-bn) and a smaller ema_momentum: with few steps
                MoCo v2's head leaves all embeddings pointing one way for long; textures: warm-up 40 % (HIRL: 10 %)
  path weight   0.1 for cifar: HIRL's 1 costs kNN accuracy on CIFAR-100. Untried: photos, and the siblings, most at 1
  queue         any batch and queue size; in the release the batch size must divide the queue size
  batch norm    over the whole batch under torchrun (--bn sync), so G processes equal one; --bn shuffle, the imagenet
                preset, is MoCo's own. On one device shuffling permutes one batch, a no-op: left out
  lr            the cosine moves every step; in the release, every epoch

In the log  moco; at chance ln(1 + Q), chance_level_loss in config.json; it rises while real keys fill the queue
            path, with a tree, times --path-weight; without that 1.1 where z is at right angles to three levels' c
            feature_std of q: near 1 is healthy, near 0 all images are on one point. The rest: README, "A run"
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
# tiny: a small ResNet, a quarter as wide; stem, the first layer: 3x3s2 has stride 2 and no max-pool (networks.py)
PRESETS = {
    "textures": dict(arch="tiny", stem="3x3s2", projector="mlp-bn", image_size=32, epochs=20, batch_size=64,
                     base_lr=0.6, weight_decay=5e-4, ema_momentum=0.6, queue_size=256, clusters=[810, 270, 27],
                     warmup_epochs=8, negative_paths=100, path_weight=1.0, bn="sync"),
    "cifar": dict(arch="resnet18", stem="3x3", projector="mlp-bn", image_size=32, epochs=200, batch_size=512,
                  base_lr=0.06, weight_decay=5e-4, ema_momentum=0.99, queue_size=4096, clusters=[3000, 1000, 100],
                  warmup_epochs=20, negative_paths=500, path_weight=0.1, bn="sync"),
    "photos": dict(arch="resnet18", stem="7x7", projector="mlp-bn", image_size=96, epochs=200, batch_size=256,
                   base_lr=0.06, weight_decay=5e-4, ema_momentum=0.99, queue_size=4096, clusters=[3000, 1000, 100],
                   warmup_epochs=20, negative_paths=500, path_weight=0.1, bn="sync"),
    "imagenet": dict(arch="resnet50", stem="7x7", projector="mlp", image_size=224, epochs=200, batch_size=256,
                     base_lr=0.03, weight_decay=1e-4, ema_momentum=0.999, queue_size=16384,
                     clusters=[30000, 10000, 1000], warmup_epochs=20, negative_paths=1000, path_weight=1.0,
                     bn="shuffle"),
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
    add("--projector", choices=["mlp", "mlp-bn"], help="two linear layers, or with batch norm between (preset)")
    add("--temperature", type=plumbing.positive(float), default=0.2, help="of InfoNCE (MoCo v2)")
    add("--queue-size", type=plumbing.positive(int), help="negatives Q kept (MoCo; preset)")
    add("--ema-momentum", type=plumbing.positive(float, zero=True, most=1),
        help="m: theta_k <- m theta_k + (1-m) theta_q (MoCo Eq. 2; preset)")
    add("--bn", choices=["sync", "shuffle"], help="batch norm under torchrun: over all, or MoCo's own (preset)")
    add("--negative-paths", type=plumbing.positive(int), help="M random paths per image (HIRL; preset)")
    add("--path-weight", type=plumbing.positive(float), help="of the path loss (HIRL: 1; preset)")
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
    queue_size = plumbing.fit("queue_size", args, at_most=len(train))
    model = MoCo(Encoder(args.arch, args.stem, args.projector, args.dim, args.image_size), args.dim, queue_size)
    model.heads = nn.ModuleList(level_head(args.dim) for _ in clusters)  # last: all else starts as it does without
    if args.bn == "sync":
        ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    encode_q, encode_k = (torch.compile(encoder) if args.compile else encoder
                          for encoder in (model.encoder_q, model.encoder_k))
    chance = {"moco": math.log(1 + queue_size)}
    exported, clustered = model.encoder_q, model.encoder_k  # backbone.pt comes from the first, the tree from the second
    views = [augmentation] * 2  # of each image

    # ---- [method] optimizer
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], peak_lr,
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

            # ---- [shared: moco] queries and keys; make_keys: encode_k(view 1), in mixed batches for --bn shuffle
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                raw = encode_q(crops[0]).float()  # (B, D)
                with torch.no_grad():  # no gradient to keys
                    model.update_key_encoder(args.ema_momentum)  # before encoding
                    k = ranks.make_keys(encode_k, crops[1], args.bn, ranks.random_state(*place, "shuffle")).float()
            q, k = F.normalize(raw, dim=1), F.normalize(k, dim=1)

            # ---- [method] base loss
            losses = {"moco": info_nce(q, k, model.queue, args.temperature)}  # the queue as it was before this step
            watched = {"feature_std": plumbing.feature_std(q)}

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

            # ---- [shared: moco] queue
            model.enqueue(ranks.all_gather_rows(k, equal=True))  # of all processes, oldest out

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
