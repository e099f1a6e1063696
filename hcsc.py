# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HCSC on MoCo v2: hierarchical contrastive selective coding (HCSC 2202.00455, MoCo v2 2003.04297).

    1  q = normalise(encoder_q(view 0)), k = normalise(encoder_k(view 1)), theta_k is an EMA of theta_q
    2  once per epoch, after a warm-up: key features of all images -> k-means -> k-means of its
       centres -> ..., a tree of prototypes c^l, level 0 (leaves) the finest        hierarchical_kmeans
    3  at every level, draws decide which queue entries stay negatives of an image: one that seems
       to belong to the image's own cluster is likely to go                     hcsc_instance_selection
    4  MoCo: q must tell k from the entries that stay, at every level                hcsc_instance_loss
    5  a prototype that seems to belong to the parent of the image's own is likely
       to go too; at the top level all stay                                    hcsc_prototype_selection
    6  q must tell its own prototype from those that stay, at every level           hcsc_prototype_loss
    7  step on 4 + --prototype-weight x 6, each averaged over the levels; enqueue k

CPU demo, under 3 minutes   python hcsc.py
as the authors' code        python hcsc.py --release --out runs/hcsc-release
the same without hierarchy  python hcsc.py --clusters 0 --out runs/hcsc-plain
one GPU                     python hcsc.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 hcsc.py --data /imagenet --amp --multi-crop

Symbols  q, k query and key (B, D)     queue u (Q, D)       L levels, 0 the finest      K_l = --clusters
         c prototypes[l] (K_l, D)      y_l(n) assign[l] image -> cluster     pa parent[l] cluster -> cluster
         phi concentration[l] (K_l,), a prototype's own temperature (released code: density)

Changes relative to hirl_moco.py: no level heads, no paths; the tree chooses negatives, and q picks its prototypes.

Differs from paper or released code
  --release     the released code differs from the paper in H1 to H6: see class Reading; its --prototype-weight is 1
  small crops   (--multi-crop) as released: losses are summed over crops, which share a draw of instances and have one
                each of prototypes. They select no instances unless --local-selection, which is off as in the release
  prototype     as released: an image's own are its k-means cluster and that one's ancestors, not the most similar at
                each level; phi above level 0 is taken over child prototypes, not images; clip and scale are PCL's
  lr, presets   cosine per step (release: per epoch); below ImageNet finer trees, --prototype-weight 0 to 0.3 (README)

In the log  moco, by chance chance_level_loss of config.json; with a tree instance, by chance the mean over l of
            ln(1 + Q (1 - dropped_l)), --release L ln(1 + Q), and prototype, weighted; of small crops _local, instance
            by chance ln(1 + Q) each; dropped_: shares left out
"""

# ---- [method] import
import copy
import dataclasses

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
    "textures": dict(arch="tiny", stem="3x3s2", projector="mlp-bn", image_size=32, epochs=20, batch_size=64,
                     base_lr=0.6, weight_decay=5e-4, ema_momentum=0.6, queue_size=256, clusters=[810, 270, 27],
                     warmup_epochs=8, bn="sync", prototype_weight=0.3),
    "cifar": dict(arch="resnet18", stem="3x3", projector="mlp-bn", image_size=32, epochs=200, batch_size=512,
                  base_lr=0.06, weight_decay=5e-4, ema_momentum=0.99, queue_size=4096, clusters=[3000, 1000, 100],
                  warmup_epochs=20, bn="sync", prototype_weight=0.0),
    "photos": dict(arch="resnet18", stem="7x7", projector="mlp-bn", image_size=96, epochs=200, batch_size=256,
                   base_lr=0.06, weight_decay=5e-4, ema_momentum=0.99, queue_size=4096, clusters=[3000, 1000, 100],
                   warmup_epochs=20, bn="sync", prototype_weight=0.1),
    "imagenet": dict(arch="resnet50", stem="7x7", projector="mlp", image_size=224, epochs=200, batch_size=256,
                     base_lr=0.03, weight_decay=1e-4, ema_momentum=0.999, queue_size=16384,
                     clusters=[3000, 2000, 1000], warmup_epochs=20, bn="shuffle", prototype_weight=1.0),
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
    add("--prototype-weight", type=plumbing.positive(float, zero=True), help="of prototype terms (--release 1; preset)")
    add("--release", action="store_true", help="the authors' code instead of the paper (H1 to H6, class Reading)")
    add("--multi-crop", action="store_true", help="four smaller crops as further queries (HCSC: 192 to 96 px)")
    add("--no-instance-selection", action="store_true", help="keep all of the queue as negatives (ablation)")
    add("--no-prototype-selection", action="store_true", help="keep all prototypes as negatives (ablation)")
    add("--local-selection", action="store_true", help="instance selection for small crops too (release: off)")
    args = plumbing.resolve_arguments(p, PRESETS, argv)
    args.prototype_weight = 1.0 if args.release and "--prototype-weight" not in args.argv else args.prototype_weight
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


# ---- [method] the paper's reading and the release's
@dataclasses.dataclass(frozen=True)
class Reading:
    """How HCSC's equations are read. The defaults are the paper's; RELEASE holds all that --release changes."""
    # H1  Entries left out (16 % at 8 clusters, 0.03 % at 3000) leave the sum. Release: logit 0, each still adds exp(0).
    unselected: str = "remove"
    # H2  Instance terms are averaged over levels, as prototype terms are. Release: summed, so L times the weight.
    over_levels: object = torch.mean
    # H3  An image's own prototype is never its negative. Release: nor are those of all others in the process's batch.
    #     About K_l (1 - 1/K_l)^B are left: for B = 64, 60 of 108, 2 of 27, none of 9: then loss and gradient are 0.
    # H4  Release: the last cluster in use is never a negative either, an off-by-one error. It hardly matters.
    exclude: str = "own"
    # H5  Release: chances of staying are clipped; with K_l in the thousands this drops more than the selection does.
    instance_clip: tuple = (0, 1)
    prototype_clip: tuple = (0, 1)
    # H6  Release: the parents' phi is rescaled to mean T before the selection. No effect: the tree's phi has that mean.
    rescale_phi: bool = False
    prototype_weight: float = 1.0  # of the prototype terms, --prototype-weight; 1 in paper and release


PAPER, RELEASE = Reading(), Reading("zero", torch.sum, "batch", (0, 0.999), (1e-4, 0.999), rescale_phi=True)


# ---- [method] selection and loss
def select(queue, hierarchy, index, temperature, reading=PAPER, kept=(None, None), changed=None):
    """Probability to stay a negative of images `index` (B,): queue entries L x (B, Q), prototypes L x (B, K_l).
    kept: two lists, empty at a new tree, and changed: rows of the queue, as `member` and `changed` in common.py."""
    instance_chances = common.hcsc_instance_selection(queue, hierarchy, index, member=kept[0], changed=changed)
    phi = [temperature * phi / phi.mean() if reading.rescale_phi else phi for phi in hierarchy.concentration]
    *below, top = common.hcsc_prototype_selection(hierarchy._replace(concentration=phi), index, member=kept[1])
    below = [chance.clamp(*reading.prototype_clip).scatter(1, assign[index, None], 0)  # never the own one
             for chance, assign in zip(below, hierarchy.assign)]
    return [chance.clamp(*reading.instance_clip) for chance in instance_chances], [*below, top]


def draw(chances, batch_size, generator):
    """Bernoulli draws: L x (b, n) chances of this process's rows -> L x (b, n) bool, drawn for the whole batch."""
    drawn = (torch.rand(batch_size, chance.shape[1], generator=generator, device=chance.device) for chance in chances)
    return [u[ranks.local_rows(batch_size)] < chance for u, chance in zip(drawn, chances)]


def dropped(instance_masks, prototype_masks):
    """For the log: shares of the queue, and of the other clusters' prototypes, that the draws left out, by level."""
    of_queue = {f"dropped_{level}": 1 - mask.float().mean() for level, mask in enumerate(instance_masks or ())}
    return of_queue | {f"dropped_prototypes_{level}": 1 - mask.float().sum(dim=1).mean() / (mask.shape[1] - 1)
                       for level, mask in enumerate(prototype_masks[:-1])}  # at the top all stay


def hcsc_terms(queries, k, queue, hierarchy, index, instance_masks, prototype_masks, temperature, reading=PAPER,
               local_selection=False):
    """HCSC's loss by term, against the negatives that stay: of view 0, and summed over small crops, named _local.

    Means over levels (RELEASE sums the instance term), the prototype term weighted; queries, prototype_masks: one per
    crop. Masks L x (B, Q) and L x (B, K_l), 1 = stays; instance_masks None: all do, plain InfoNCE. Source: HCSC.
    """
    losses, how = {}, dict(unselected=reading.unselected)
    for crop, (q, masks) in enumerate(zip(queries, prototype_masks)):
        selected = instance_masks if crop == 0 or local_selection else None
        instance = (common.hcsc_instance_loss(q, k, queue, selected, temperature, **how) if selected
                    else info_nce(q, k, queue, temperature))  # (L,) or ()
        prototype = common.hcsc_prototype_loss(q, hierarchy, index, masks, exclude=reading.exclude, **how)  # (L,)
        for name, term in (("instance", reading.over_levels(instance)),
                           ("prototype", reading.prototype_weight * prototype.mean())):
            name = f"{name}_local" if crop else name
            losses[name] = losses.get(name, 0) + term
    return losses


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
    if args.bn == "sync":
        ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    encode_q, encode_k = (torch.compile(encoder) if args.compile else encoder
                          for encoder in (model.encoder_q, model.encoder_k))
    exported, clustered = model.encoder_q, model.encoder_k  # backbone.pt comes from the first, the tree from the second
    parts = (6 / 7, 5 / 7, 4 / 7, 3 / 7) if args.multi_crop else ()  # at ImageNet 192, 160, 128, 96 px
    views = [augmentation] * 2 + [  # of each image; the share of the picture shrinks as the side does
        augmentation._replace(size=round(args.image_size * part), scale=tuple(part * s for s in augmentation.scale))
        for part in parts]
    chance = {"moco": (1 + len(parts)) * math.log(1 + queue_size)}
    reading = dataclasses.replace(RELEASE if args.release else PAPER, prototype_weight=args.prototype_weight)
    if args.no_prototype_selection:
        reading = dataclasses.replace(reading, prototype_clip=(1, 1))  # all are certain to stay

    def embed(view):  # a small crop (B, 3, H, W) -> (B, D) unit rows
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            return F.normalize(encode_q(view).float(), dim=1)

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

        # ---- [method] memberships of queue, L x (K_l, Q), and prototypes: a step changes B of Q, so they are kept
        kept = None if queue_size % batch_size else [], []  # None: blocks uneven, a resumed run may round otherwise

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

            # ---- [method] losses, of view 0 and of small crops (--multi-crop): the queue is that of before this step
            queries, watched = [q, *map(embed, crops[2:])], {"feature_std": plumbing.feature_std(q)}
            if not hierarchy:
                losses = {"moco": sum(info_nce(query, k, model.queue, args.temperature) for query in queries)}
            else:
                generator = ranks.random_state(*place, "selection", device=device)
                changed = (model.queue_ptr - 1 - torch.arange(batch_size, device=device)) % queue_size  # newest (B,)
                chances = select(model.queue, hierarchy, index, args.temperature, reading, kept, changed)
                instance_masks = None if args.no_instance_selection else draw(chances[0], batch_size, generator)
                prototype_masks = [draw(chances[1], batch_size, generator) for _ in queries]  # anew for each
                losses = hcsc_terms(queries, k, model.queue, hierarchy, index, instance_masks, prototype_masks,
                                    args.temperature, reading, args.local_selection)
                watched |= dropped(instance_masks, prototype_masks[0])

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
