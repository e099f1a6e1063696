# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HIRL on MoCo v3: the batch's own keys instead of a queue, ResNet or ViT (HIRL 2205.13159, MoCo v3 2104.02057).

    1  q1, q2 = normalise(predictor(encoder_q(view))), k1, k2 = normalise(encoder_k(view)) of views 0 and 1
    2  MoCo v3: q1 picks k2 out of the keys of the whole batch, and q2 picks k1                contrast
    3  once per epoch, after a warm-up: key features of all images -> k-means -> k-means of its
       centres -> ..., a tree of prototypes c^l, level 0 (leaves) the finest        hierarchical_kmeans
    4  one small head per level turns view 0's query before the predictor into z^l
    5  HIRL: the image scores high on its own path of the tree, S = prod_l (1 + z^l.c^l)/2, and low
       on random other paths                                                        semantic_path_loss
    6  step on MoCo v3 + HIRL

CPU demo, under 3 minutes   python hirl_mocov3.py
the same without hierarchy  python hirl_mocov3.py --clusters 0 --out runs/mocov3
one GPU                     python hirl_mocov3.py --data cifar100 --amp
paper scale, ViT-B/16       torchrun --nproc-per-node=8 hirl_mocov3.py --data /imagenet --amp
MoCo v3's ResNet-50         ... --arch resnet50 --projector-layers 2 --optimizer lars --base-lr 0.3 --weight-decay 1e-6
                            --temperature 1 --epochs 300 --lr-warmup 0.033 (its crops: from 0.2 of a picture on)

Symbols  q, k query and key (B, D)     m the key encoder's rate  L levels, 0 the finest      K_l = --clusters
         z level embeddings (B, L, D)  c prototypes[l] (K_l, D)  assign[l] image -> cluster (released
         code: im2cluster)             parent[l] cluster -> cluster one level up (cluster2cluster)

Changes relative to hirl_moco.py
  base loss     both views are query and key; negatives are the keys of the batch, of all processes: no queue
  model         batch norm in and after the projector; a predictor for the query alone
  views         the second is blurred seldom and sometimes solarized
  optimizer     AdamW (ViT) or LARS (ResNet); its rate warms up; the key encoder slows down to rest (m -> 1)

Differs from paper or released code
  key encoder   is updated between queries and keys, as released; in the paper's algorithm, after the step: the same
                sequence, except that each update uses the next step's m and the last one is missing
  loss          2 T in front and a sum of two terms, as released: beside HIRL's path loss each weighs 2 T = 0.4
  schedules     where lr warms up, the first step's is 0, as released; m by cosine, as HIRL (an option in MoCo v3)
  weight decay  with AdamW on every trained tensor, norms, biases and class token too, as released
  LARS          divides by the norm of gradient and decay together, as in MoCo v3; hirl_simclr.py's LARS differs
  base lr       1.5e-4 with and without hierarchy; HIRL's release compares 1.5e-4 with 1e-4
  level heads   five linear layers at paper scale (--head-layers), as HIRL's MoCo v3 alone; two elsewhere
  ViT           patch projection frozen, as MoCo v3; HIRL trains it, its switch is never on (--no-freeze-patches).
                Positions row by row on any grid; the releases swap the axes, which a square grid cannot tell.
                Heads of 64 channels: a ViT-S has 6, as in HIRL; 12 in MoCo v3
  local crops   none; HIRL's loss for them weighs each by another power of their number, and no run used it
  phi           --temperature scales it, and HIRL's loss does not read it
  small data    ResNets. textures: SGD, a fast key encoder, narrow heads and hirl_moco.py's augmentation, alike in
                both views; cifar and photos: LARS, and milder crops

In the log  mocov3, at chance 4 T ln B, chance_level_loss in config.json; path, with a tree, times --path-weight
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
    "textures": dict(arch="tiny", stem="3x3s2", image_size=32, epochs=18, batch_size=64, base_lr=0.6,
                     lr_warmup=0.0, weight_decay=5e-4, optimizer="sgd", ema_momentum=0.9, temperature=0.2, dim=128,
                     projector_layers=2, head_width=256, head_layers=2, clusters=[810, 270, 27], warmup_epochs=9,
                     negative_paths=100),
    "cifar": dict(arch="resnet18", stem="3x3", image_size=32, epochs=200, batch_size=512, base_lr=0.3,
                  lr_warmup=0.05, weight_decay=1e-6, optimizer="lars", ema_momentum=0.99, temperature=0.2, dim=256,
                  projector_layers=2, head_width=4096, head_layers=2, clusters=[3000, 1000, 100], warmup_epochs=20,
                  negative_paths=500),
    "photos": dict(arch="resnet18", stem="7x7", image_size=96, epochs=200, batch_size=256, base_lr=0.3,
                   lr_warmup=0.05, weight_decay=1e-6, optimizer="lars", ema_momentum=0.99, temperature=0.2, dim=256,
                   projector_layers=2, head_width=4096, head_layers=2, clusters=[3000, 1000, 100], warmup_epochs=20,
                   negative_paths=500),
    "imagenet": dict(arch="vit_b_16", stem="7x7", image_size=224, epochs=400, batch_size=4096, base_lr=1.5e-4,
                     lr_warmup=0.1, weight_decay=0.1, optimizer="adamw", ema_momentum=0.99, temperature=0.2, dim=256,
                     projector_layers=3, head_width=4096, head_layers=5, clusters=[30000, 10000, 5000],
                     warmup_epochs=40, negative_paths=100),
}

# ---- [method] augmentation: MoCo v3's, milder below ImageNet; of the first view, and what differs in the second
AUGMENTATIONS = {
    "textures": common.Augmentation(scale=(0.4, 1.0), gray_p=0.5, shuffle_p=0.5),
    "cifar": common.Augmentation(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2),
    "photos": common.Augmentation(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2, blur_p=1.0),
    "imagenet": common.Augmentation(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2, blur_p=1.0),
}
SECOND_VIEW = {"textures": dict(), "cifar": dict(solarize_p=0.2), "photos": dict(blur_p=0.1, solarize_p=0.2),
               "imagenet": dict(blur_p=0.1, solarize_p=0.2)}


# ---- [method] arguments
def parse_args(argv=None):
    p = plumbing.shared_arguments(__doc__, PRESETS)
    add = p.add_argument
    add("--dim", type=plumbing.positive(int), help="width D of the embedding (preset)")
    add("--temperature", type=plumbing.positive(float), help="of the contrast (MoCo v3; preset)")
    add("--ema-momentum", type=plumbing.positive(float, zero=True, most=1),
        help="m at the start, then by cosine to 1: theta_k <- m theta_k + (1-m) theta_q (MoCo v3; preset)")
    add("--projector-layers", type=plumbing.positive(int), help="linear layers: 3 for a ViT, 2 for a ResNet (preset)")
    add("--head-width", type=plumbing.positive(int), help="between the layers of projector and predictor (preset)")
    add("--head-layers", type=plumbing.positive(int), help="linear layers of a level's head (HIRL; preset)")
    add("--freeze-patches", action=plumbing.argparse.BooleanOptionalAction, default=True,
        help="a ViT's patch projection stays random (MoCo v3 section 4.2)")
    add("--optimizer", choices=["adamw", "lars", "sgd"], help="AdamW, LARS or momentum SGD (preset)")
    add("--lr-warmup", type=plumbing.positive(float, zero=True, most=1),
        help="share of the run over which the learning rate rises from 0 (MoCo v3; preset)")
    add("--negative-paths", type=plumbing.positive(int), help="M random paths per image (HIRL; preset)")
    add("--path-weight", type=plumbing.positive(float), default=1.0, help="of the path loss (HIRL: 1)")
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


# ---- [method] ViT
def sincos_positions(rows, columns, width):
    """MoCo v3's fixed positions (1, 1 + rows * columns, width): 0 for the class token, then row by row.

    A quarter of the width each: sin and cos of the row, sin and cos of the column, frequencies 1 to about 1/10000. The
    release mixes the two axes up, which only a grid that is no square can tell.
    """
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (row, column)]  # (rows * columns, width / 4) each
    grid = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width), grid.float()])[None]


@torch.no_grad()
def prepare_vit(vit, image_size, freeze_patches):
    """MoCo v3's start: Xavier uniform weights, biases 0, sin-cos positions that stay (section 5), a small class token;
    freeze_patches: the random patch projection stays too, which keeps training stable (section 4.2).
    """
    for layer in vit.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.MultiheadAttention):
            for part in layer.in_proj_weight.chunk(3):  # of queries, keys and values
                nn.init.xavier_uniform_(part)
    limit = math.sqrt(6 / (vit.conv_proj.weight[0].numel() + vit.hidden_dim))
    nn.init.uniform_(vit.conv_proj.weight, -limit, limit)
    nn.init.zeros_(vit.conv_proj.bias)
    vit.conv_proj.requires_grad_(not freeze_patches)
    nn.init.normal_(vit.class_token, std=1e-6)
    side = image_size // vit.patch_size
    vit.encoder.pos_embedding.copy_(sincos_positions(side, side, vit.hidden_dim)).requires_grad_(False)


# ---- [method] heads
def level_head(dim, layers):
    """HIRL's head of one level, (B, D) -> (B, D), of `layers` linear ones; it reads the raw projection."""
    return nn.Sequential(*mlp(*[dim] * (layers + 1), last_norm=False)[:-1], nn.Linear(dim, dim))


# ---- [method] networks
class MoCoV3(nn.Module):
    """Query encoder with a predictor, and the encoder's slow copy for the keys."""

    def __init__(self, encoder, predictor):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor

    @torch.no_grad()
    def update_key_encoder(self, ema_momentum):
        """theta_k <- m theta_k + (1-m) theta_q: parameters only; the copy has its own batch-norm statistics."""
        keys, queries = [*self.encoder_k.parameters()], [*self.encoder_q.parameters()]
        torch.optim.swa_utils.get_ema_multi_avg_fn(ema_momentum)(keys, queries, None)  # MoCo v3, Alg. 1, in one kernel


# ---- [method] loss
def contrast(q, k, temperature):
    """Each query picks its own image's key among the batch's: -log exp(q.k/T) / sum_j exp(q.k_j/T), times 2 T.

    q, k (B, D) unit rows, row n of each a view of image n, this process's; under torch.distributed the k_j are
    the keys of all processes. The gradient goes to q alone. Returns a scalar, the mean over this process's
    queries; a network that tells nothing apart scores 2 T ln B. Source: MoCo v3 (2104.02057) Eq. 1, Alg. 1.
    """
    k, first = k.detach(), 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        keys = [torch.empty_like(k) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(keys, k.contiguous())
        k, first = torch.cat(keys), torch.distributed.get_rank() * len(q)
    logits = q @ k.T / temperature  # (b, B)
    own = first + torch.arange(len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(logits, own)  # MoCo v3 Eq. 1


# ---- [method] schedule
def warmup_cosine(done, warmup):
    """Share of the peak after `done` of the run, both in [0, 1]: linear from 0 to 1 at `warmup`, then a cosine to 0."""
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


# ---- [method] optimizer LARS
class LARS(torch.optim.Optimizer):
    """Momentum SGD that moves each weight tensor w by lr * trust of its own norm, MoCo v3's way.

    g <- trust |w| / |g + beta w| (g + beta w), beta the weight decay; where either norm is 0, g + beta w stays.
    Parameters of one dimension take g as it is, without decay. Then v <- momentum v + g and w <- w - lr v. A
    parameter without gradient stays where it is. (hirl_simclr.py's has |g| + beta |w| below, SwAV's way.)
    """

    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in (w for w in group["params"] if w.grad is not None):
                g = w.grad
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    w_norm, g_norm = w.norm(), g.norm()
                    g = torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0) * g
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
    backbone, width = networks.backbone(args.arch, args.stem, args.image_size)
    if isinstance(backbone, networks.ViT):
        prepare_vit(backbone, args.image_size, args.freeze_patches)
    hidden = [args.head_width] * (args.projector_layers - 1)
    encoder = Encoder(backbone, mlp(width, *hidden, args.dim, last_norm=True))
    predictor = mlp(args.dim, args.head_width, args.dim, last_norm=args.projector_layers > 2)
    model = MoCoV3(encoder, predictor)
    model.heads = nn.ModuleList(level_head(args.dim, args.head_layers) for _ in clusters)  # last, as in hirl_moco.py
    ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    encode_q, encode_k = (torch.compile(encoder) if args.compile else encoder
                          for encoder in (model.encoder_q, model.encoder_k))
    chance = {"mocov3": 4 * args.temperature * math.log(batch_size)}  # of both terms
    exported, clustered = model.encoder_q, model.encoder_k  # backbone.pt comes from the first, the tree from the second
    views = [augmentation, augmentation._replace(**SECOND_VIEW[args.preset])]  # of each image

    # ---- [method] optimizer
    make = dict(adamw=torch.optim.AdamW, lars=LARS, sgd=torch.optim.SGD)[args.optimizer]
    optimizer = make([p for p in model.parameters() if p.requires_grad], peak_lr, weight_decay=args.weight_decay,
                     **(dict() if args.optimizer == "adamw" else dict(momentum=0.9)))

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

            # ---- [method] learning rate and the key encoder's
            plumbing.set_lr(optimizer, peak_lr * warmup_cosine(done, args.lr_warmup))
            ema_momentum = 1 - (1 - args.ema_momentum) * warmup_cosine(done, 0)

            # ---- [method] queries and keys
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                raw, raw2 = (encode_q(view).float() for view in crops)  # (B, D) each; batch norm sees one view
                q1, q2 = (F.normalize(model.predictor(x).float(), dim=1) for x in (raw, raw2))
                with torch.no_grad():  # no gradient to keys
                    model.update_key_encoder(ema_momentum)  # before encoding
                    k1, k2 = (F.normalize(encode_k(view).float(), dim=1) for view in crops)

            # ---- [method] base loss
            losses = {"mocov3": contrast(q1, k2, args.temperature) + contrast(q2, k1, args.temperature)}
            watched = {"feature_std": plumbing.feature_std(q1)}

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
