# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HIRL on SwAV: hierarchical image representation learning (HIRL 2205.13159, SwAV 2006.09882).

    1  two global crops and V small local ones, e = normalise(encoder(crop))              encode_crops
    2  SwAV: the scores e.c of a global crop against P learnt prototypes c become assignments
       that use all prototypes equally                                                        sinkhorn
    3  every other crop predicts that assignment                                    swapped_prediction
    4  once per epoch, after a warm-up: features of all images -> k-means -> k-means of its
       centres -> ..., a tree, level 0 (leaves) the finest                         hierarchical_kmeans
    5  at every step the batch's images move to the leaf nearest their second global crop     reassign
    6  one small head per level turns the first global crop's raw projection into z^l
    7  HIRL: the image scores high on its own path of the tree, S = prod_l (1 + z^l.c^l)/2, and low
       on random other paths                                                        semantic_path_loss
    8  step on SwAV + HIRL; the queue takes both global crops' e

CPU demo, under 3 minutes   python hirl_swav.py
the same without hierarchy  python hirl_swav.py --clusters 0 --out runs/swav
one GPU                     python hirl_swav.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 hirl_swav.py --data /imagenet --amp

Symbols  C = 2 + V crops     b of the B images on this process (B in shared blocks)  e embeddings (C, b, D), unit rows
         swav_prototypes c (P, D), learnt; prototypes[l] (K_l, D) of the tree are k-means centres, as
         assign and parent in hirl_moco.py     scores (C, b, P)     assignments (2, b, P), rows sum to 1
         queue (2, Q, D), past e of the global crops     in the log, prototypes_in_use: how many of the P
         were the nearest of a global crop within the last epoch's worth of steps, mean over the epoch

Changes relative to hirl_moco.py
  model         one encoder, whose own features are clustered, and prototypes; no momentum encoder
  views         two global crops and V small ones
  base loss     swapped prediction instead of InfoNCE; the queue's past embeddings only balance the assignments
  path loss     the batch's rows of hierarchy.assign follow the network at every step (--no-reassign: not)
  optimizer     LARC at paper scale; lr rises from --start-lr to its peak, and ends at --final-lr

Differs from paper or released code
  re-assignment by the train-mode e of the second crop that the loss has computed anyway; HIRL's release encodes
                that crop once more, also in train mode: one more forward pass and batch-norm update per step
  multi-crop    crops of one size pass the backbone together, all pass the projector together, as in
                SwAV; HIRL's release encodes one after the other: other batch-norm statistics
  crops' mean   the loss averages over crops, as both releases do; SwAV's Eq. 6 sums, which scales the lr
  queue         used once it has been filled anew since --queue-epoch, as in SwAV; HIRL's release: once full
  sinkhorn      in logarithms: same numbers, but no prototype's mass can underflow to 0 / 0
  warm-up       of the lr, a share of the run (--lr-warmup) in place of 10 epochs: it shrinks with --epochs
  small data    presets below ImageNet train by SGD without LARC; textures without local crops. At 32 px epsilon is
                0.02: at few steps and small batches softer assignments hardly tell images apart
  path loss, phi as in hirl_moco.py; lr: per step, as in SwAV

In the log  swav, at chance ln P, chance_level_loss in config.json; path, with a tree, times --path-weight
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
    "textures": dict(arch="tiny", stem="3x3s2", projector="mlp-bn", image_size=32, epochs=16, batch_size=64,
                     base_lr=0.6, start_lr=0.0, final_lr=0.0, weight_decay=5e-4, optimizer="sgd", prototypes=300,
                     epsilon=0.02, freeze_prototypes=20, local_crops=0, local_size=16, queue_size=0, queue_epoch=0,
                     clusters=[810, 270, 27], warmup_epochs=8, negative_paths=100),
    "cifar": dict(arch="resnet18", stem="3x3", projector="mlp-bn", image_size=32, epochs=200, batch_size=512,
                  base_lr=0.06, start_lr=0.0, final_lr=0.0, weight_decay=5e-4, optimizer="sgd", prototypes=1000,
                  epsilon=0.02, freeze_prototypes=100, local_crops=4, local_size=16, queue_size=0, queue_epoch=0,
                  clusters=[3000, 1000, 100], warmup_epochs=20, negative_paths=500),
    "photos": dict(arch="resnet18", stem="7x7", projector="mlp-bn", image_size=96, epochs=200, batch_size=256,
                   base_lr=0.06, start_lr=0.0, final_lr=0.0, weight_decay=5e-4, optimizer="sgd", prototypes=1000,
                   epsilon=0.05, freeze_prototypes=400, local_crops=4, local_size=48, queue_size=2048, queue_epoch=10,
                   clusters=[3000, 1000, 100], warmup_epochs=20, negative_paths=500),
    "imagenet": dict(arch="resnet50", stem="7x7", projector="mlp-bn", image_size=224, epochs=200, batch_size=4096,
                     base_lr=0.3, start_lr=0.01875, final_lr=0.0003, weight_decay=1e-6, optimizer="larc",
                     prototypes=3000, epsilon=0.05, freeze_prototypes=313, local_crops=6, local_size=96, queue_size=0,
                     queue_epoch=15, clusters=[30000, 10000, 1000], warmup_epochs=20, negative_paths=1000),
}

# ---- [method] augmentation: SwAV's, milder below ImageNet; of the global crops and of the local ones
AUGMENTATIONS = {
    "textures": common.Augmentation(scale=(0.4, 1.0), gray_p=0.5, shuffle_p=0.5),
    "cifar": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2),
    "photos": common.Augmentation(scale=(0.2, 1.0), gray_p=0.2, blur_p=0.5),
    "imagenet": common.Augmentation(scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), gray_p=0.2, blur_p=0.5),
}
LOCAL_SCALE = {"textures": (0.15, 0.4), "cifar": (0.08, 0.2), "photos": (0.05, 0.2), "imagenet": (0.05, 0.14)}


# ---- [method] arguments
def parse_args(argv=None):
    p = plumbing.shared_arguments(__doc__, PRESETS)
    add = p.add_argument
    add("--projector", choices=["mlp", "mlp-bn"], help="two linear layers, or with batch norm between (preset)")
    add("--temperature", type=plumbing.positive(float), default=0.1, help="of the predictions (SwAV)")
    add("--epsilon", type=plumbing.positive(float), help="of Sinkhorn, larger: softer assignments (SwAV: 0.05; preset)")
    add("--sinkhorn-iterations", type=plumbing.positive(int), default=3, help="of Sinkhorn (SwAV)")
    add("--prototypes", type=plumbing.positive(int), help="learnt prototypes P (SwAV; preset)")
    add("--freeze-prototypes", type=plumbing.positive(int, zero=True), help="steps before they move (SwAV; preset)")
    add("--local-crops", type=plumbing.positive(int, zero=True, most=100), help="small crops V beside two global ones "
        "(preset)")
    add("--local-size", type=plumbing.positive(int, most=4096), help="side of the small crops, pixels (preset)")
    add("--queue-size", type=plumbing.positive(int, zero=True),
        help="past images Q that take part in Sinkhorn, 0: none (SwAV; preset)")
    add("--queue-epoch", type=plumbing.positive(int, zero=True), help="epoch from which it counts (SwAV; preset)")
    add("--optimizer", choices=["larc", "sgd"], help="SGD, or SGD with LARC's own rate for each tensor (preset)")
    add("--start-lr", type=plumbing.positive(float, zero=True), help="lr at the start, scaled as --base-lr (preset)")
    add("--final-lr", type=plumbing.positive(float, zero=True), help="lr at the end, scaled as --base-lr (preset)")
    add("--lr-warmup", type=plumbing.positive(float, zero=True, most=1), default=0.05,
        help="share of the run in which lr rises to its peak (SwAV: 10 epochs)")
    add("--negative-paths", type=plumbing.positive(int), help="M random paths per image (HIRL; preset)")
    add("--path-weight", type=plumbing.positive(float), default=1.0, help="of the path loss (HIRL: 1)")
    add("--no-reassign", action="store_true", help="leave a step's images in the leaves that k-means gave them")
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


# ---- [method] prototypes and queue
class SwAV(nn.Module):
    """Encoder, learnt prototypes, and a queue of past embeddings of each of the two global crops."""

    def __init__(self, encoder, dim, prototypes, queue_size):
        super().__init__()
        self.encoder = encoder
        self.swav_prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, dim), dim=1))  # (P, D)
        self.register_buffer("queue", torch.zeros(2, queue_size, dim))  # newest first
        self.register_buffer("chosen", torch.full((prototypes,), -2**40))  # the step that last chose a prototype

    def scores(self, embeddings, frozen):
        """Cosines (..., P) of (..., D) to the prototypes, first brought to length 1; frozen: no gradient to them."""
        with torch.no_grad():
            self.swav_prototypes.copy_(F.normalize(self.swav_prototypes, dim=1))
        return embeddings @ (self.swav_prototypes.detach() if frozen else self.swav_prototypes).T

    @torch.no_grad()
    def assignments(self, scores, use_queue, epsilon, iterations):
        """Sinkhorn of both global crops' scores (2, b, P), the queue's beside them -> (2, b, P), no gradient."""
        past = self.queue[:, ranks.local_rows(self.queue.shape[1] if use_queue else 0)]  # (2, q, D), our share
        rows = torch.cat([past @ self.swav_prototypes.T, scores], dim=1)  # (2, q + b, P)
        return torch.stack([sinkhorn(crop, epsilon, iterations)[-scores.shape[1]:] for crop in rows])

    @torch.no_grad()
    def in_use(self, scores, now, steps):
        """How many prototypes were the nearest of a global crop, of any process, in the last `steps` steps."""
        self.chosen.index_fill_(0, ranks.all_gather_rows(scores.argmax(dim=2).T, equal=True).flatten(), now)
        return (self.chosen > now - steps).sum().float()

    @torch.no_grad()
    def enqueue(self, embeddings):
        """Put (2, B, D) in front; the oldest fall off the end."""
        self.queue.copy_(torch.cat([embeddings, self.queue], dim=1)[:, :self.queue.shape[1]])


def encode_crops(backbone, projector, crops):
    """Crops [(b, 3, H, W)], those of a size side by side -> raw projections (C, b, D).

    Adjacent crops of one size pass the backbone together, and all crops pass the projector together, so that batch
    norm there sees every crop, as in SwAV. DEVIATION (HIRL's released code): one forward pass per crop.
    """
    first = [c for c in range(len(crops)) if c == 0 or crops[c].shape != crops[c - 1].shape]
    features = [backbone(torch.cat(crops[a:b])) for a, b in zip(first, first[1:] + [len(crops)])]
    return projector(torch.cat(features)).unflatten(0, (len(crops), -1))


# ---- [method] loss
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Assignments of images to prototypes that use every prototype about equally.

    A ~ exp(scores / epsilon), a matrix that is scaled in turn: prototypes (columns) to equal sums, images
    (rows) to sum 1; the images come last, so that their sums are exact. SwAV (2006.09882) Eq. 5, transposed.

    scores (b, P) cosines of this process's images; under torch.distributed the sums are over all processes'.
    Returns (b, P), rows sum to 1; float32 from half precision, else of the dtype of the scores. In logarithms:
    a mass too small for exp() is still a finite number.
    """
    log_a = (scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores) / epsilon  # (b, P)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for _ in range(iterations):
        mass = log_a.logsumexp(dim=0)  # (P,) of this process's images
        if several:
            masses = [torch.empty_like(mass) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(masses, mass)
            mass = torch.stack(masses).logsumexp(dim=0)
        log_a = log_a - mass  # prototypes, SwAV Eq. 5
        log_a = log_a - log_a.logsumexp(dim=1, keepdim=True)  # images, SwAV Eq. 5
    return log_a.exp()


def swapped_prediction(scores, assignments, temperature):
    """Every crop predicts the assignments of the other crops, of the global ones alone:

    1/2 sum_i 1/(C-1) sum_{v != i} mean_b [ - sum_p A_i[b,p] log softmax_p(scores_v[b] / T) ],  i = 0, 1.

    scores (C, b, P) cosines to the prototypes of C = 2 + V crops, the global ones first; assignments A
    (2, b, P), rows sum to 1, no gradient. Returns a scalar; predictions that tell nothing apart score ln P.
    Source: SwAV (2006.09882) Eq. 2 and 6, averaged over crops as in the released code.
    """
    log_p = F.log_softmax(scores / temperature, dim=2)  # (C, b, P)
    loss = 0.0
    for i, assignment in enumerate(assignments.detach()):
        others = torch.cat([log_p[:i], log_p[i + 1:]])  # (C-1, b, P)
        loss = loss - (assignment * others).sum(dim=2).mean() / 2  # SwAV Eq. 6
    return loss


# ---- [method] the tree's table
@torch.no_grad()
def reassign(hierarchy, index, embeddings):
    """Move images `index` (B,) in hierarchy.assign to the leaf nearest to their embeddings (B, D), and its ancestors.

    Source: HIRL's released code for SwAV (iteration-wise assignment). Embeddings of any length.
    """
    node = (embeddings @ hierarchy.prototypes[0].T).argmax(dim=1)  # (B,)
    for level, assign in enumerate(hierarchy.assign):
        if level > 0:
            node = hierarchy.parent[level - 1][node]  # same path, one level up
        assign[index] = node


# ---- [method] LARC and learning rate
@torch.no_grad()
def larc(parameters, weight_decay, trust=0.001, eps=1e-8, lr=None):
    """Replace gradients by rescaled ones: SGD without decay then moves each tensor w by about lr * trust of its norm.

    g <- trust |w| / (|g| + beta |w| + eps) (g + beta w), beta the weight decay; where w or g is all zero, g
    stays, without decay. With lr: LARC's clipping mode, the factor divided by lr and at most 1. Biases and
    batch norm are tensors like others (SwAV). Source: LARC (1708.03888), constants as in SwAV.
    """
    for w in parameters:
        if w.grad is not None:
            w_norm, g_norm = w.norm(), w.grad.norm()
            rate = trust * w_norm / (g_norm + weight_decay * w_norm + eps)
            rate = rate if lr is None else (rate / lr).clamp(max=1)
            adapted = rate * (w.grad + weight_decay * w)
            w.grad = torch.where((w_norm > 0) & (g_norm > 0), adapted, w.grad)


def learning_rate(done, peak, start, final, warmup):
    """At the share `done` of the run: a line from start to peak over the first `warmup`, a cosine to final."""
    if done < warmup:
        return start + (peak - start) * done / warmup
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


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
    encoder = Encoder(args.arch, args.stem, args.projector, args.dim, args.image_size)
    model = SwAV(encoder, args.dim, args.prototypes, queue_size)
    model.heads = nn.ModuleList(level_head(args.dim) for _ in clusters)  # last, so that the rest starts as without
    ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    backbone, projector = (torch.compile(part, dynamic=False) if args.compile else part
                           for part in (model.encoder.backbone, model.encoder.projector))
    chance = {"swav": math.log(args.prototypes)}
    exported = clustered = model.encoder  # backbone.pt and the tree both come from it
    local = augmentation._replace(size=args.local_size, scale=LOCAL_SCALE[args.preset])
    views = [augmentation] * 2 + [local] * args.local_crops  # of each image

    # ---- [method] optimizer
    start_lr, final_lr = args.start_lr * batch_size / 256, args.final_lr * batch_size / 256
    queue_from = args.queue_epoch * steps_per_epoch + math.ceil(queue_size / batch_size)  # the first step that uses it
    use_larc = args.optimizer == "larc"
    optimizer = torch.optim.SGD(model.parameters(), peak_lr, momentum=0.9,
                                weight_decay=0 if use_larc else args.weight_decay)
    if use_larc:  # before each step of SGD
        optimizer.register_step_pre_hook(lambda *_: larc(model.parameters(), args.weight_decay))

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
            plumbing.set_lr(optimizer, learning_rate(done, peak_lr, start_lr, final_lr, args.lr_warmup))

            # ---- [method] embeddings of all crops, and the tree's table
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                raw_crops = encode_crops(backbone, projector, crops).float()  # (C, b, D)
            raw, embeddings = raw_crops[0], F.normalize(raw_crops, dim=2)
            whole_batch = ranks.all_gather_rows(embeddings[:2].detach().transpose(0, 1), equal=True)  # (B, 2, D)
            if hierarchy and not args.no_reassign:
                reassign(hierarchy, ranks.all_gather_rows(index, equal=True), whole_batch[:, 1])

            # ---- [method] base loss: the queue is that of before this step
            now = epoch * steps_per_epoch + step
            scores = model.scores(embeddings, frozen=now < args.freeze_prototypes)  # (C, b, P)
            assignments = model.assignments(scores[:2], now >= queue_from, args.epsilon, args.sinkhorn_iterations)
            losses = {"swav": swapped_prediction(scores, assignments, args.temperature)}
            watched = {"feature_std": plumbing.feature_std(embeddings[0]),
                       "prototypes_in_use": model.in_use(scores[:2], now, steps_per_epoch)}
            model.enqueue(whole_batch.transpose(0, 1))

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
