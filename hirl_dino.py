# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "tqdm"]
# ///
"""HIRL on DINO: hierarchical image representation learning (HIRL 2205.13159, DINO 2104.14294).

    1  two global crops and small local ones: the student sees all, the teacher the global ones; each
       ends in P logits                                                                    encode_crops
    2  DINO: from every crop the student predicts the teacher's target for each other global crop: the
       softmax, at a low temperature, of the teacher's logits minus a centre                  dino_loss
    3  once per epoch, after a warm-up: the teacher's raw projections of all images -> k-means -> k-means
       of its centres -> ..., a tree of prototypes c^l, level 0 (leaves) the finest hierarchical_kmeans
    4  one small head per level turns the student's raw projection of the first crop into z^l
    5  HIRL: the image scores high on its own path of the tree, S = prod_l (1 + z^l.c^l)/2, and low
       on random other paths                                                         semantic_path_loss
    6  the centre follows the teacher's logits; step on DINO + HIRL; the teacher follows the student

CPU demo, under 3 minutes   python hirl_dino.py
the same without hierarchy  python hirl_dino.py --clusters 0 --out runs/dino
one GPU                     python hirl_dino.py --data cifar100 --amp
paper scale, 8 GPUs         torchrun --nproc-per-node=8 hirl_dino.py --data /imagenet --amp

Symbols  V crops of b images, global first; s (V, b, P), t (2, b, P) logits of student, teacher; c centre; T temperature
         in the log, entropy: of the targets, entropy_of_mean: of their mean, both ln P if all is uniform, the second
         small if few outputs are used; prototypes_in_use: outputs largest in a target of an epoch's steps, on average

Changes relative to hirl_moco.py: student and teacher, three-layer projectors, learnt prototypes (not those of
the tree), local crops; cross entropy and a centre instead of InfoNCE and a queue; AdamW, more schedules.

Differs from paper (P), DINO's code (D), HIRL's release (H): number, who agrees, what this does; what the others do
  D1   PDH  the loss uses the old centre, which then moves by the raw logits of both global crops
  D2   D    the teacher moves after the step; H before the forward pass, one update ahead
  D2b  D    schedules are read at their step; H rounds the step down: 7 % of the steps get the previous value
  D3   D    gradients are clipped tensor by tensor; H all together, D4 a frozen last layer included
  D5   DH   weight decay on all but vectors: on positions, class token and last layer too
  D6   D    the teacher starts as a copy; H its head as another random network
  D7        the levels' heads decay like the rest; H by a constant 0.01, biases too
  D8   DH   interpolated positions of local crops are up to a tenth of a patch off, as the released weights expect
  D9   DH   the mean over pairs of crops; P the sum
  D10  D    all crops go through the projector together; H global and local apart: with batch norm there, not the same
  D11  P    T_t rises over a tenth of the epochs (30 of 300); D and H 50 of 400 for ViT-B
  D12       --amp or not for base and HIRL alike; H fp16 without, fp32 with hierarchy. Crops are resized bilinearly
  small     DEVIATION on textures: a centre that balances the batch (--centering sinkhorn, as in SwAV and DINOv2),
            batch norm in the projector, SGD; with the running mean few outputs stay in use (results/README.md).
            cifar: a ViT that starts as torchvision's (--init-std 0)
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
VIT = dict(stem="7x7", projector="mlp", hidden=2048, dim=256, optimizer="adamw", weight_decay=0.04,
           final_weight_decay=0.4, drop_path=0.1, centering="mean", teacher_temperature=[0.04, 0.07],
           ema_momentum=0.996, init_std=0.02)
SMALL = dict(VIT, local_crops=4, epochs=200, batch_size=256, base_lr=5e-4, final_lr=1e-6, lr_warmup=0.05, clip_grad=3.0,
             freeze_last_layer=1, clusters=[3000, 1000, 100], warmup_epochs=20, negative_paths=500)
PRESETS = {
    "textures": dict(arch="tiny", stem="3x3s2", projector="mlp-bn", hidden=256, dim=128, init_std=0.02, prototypes=512,
                     image_size=32, local_crops=0, local_size=16, epochs=14, batch_size=64, optimizer="sgd",
                     base_lr=0.6, final_lr=0.0, lr_warmup=0.0, weight_decay=5e-4, final_weight_decay=5e-4,
                     clip_grad=0.0, drop_path=0.0, freeze_last_layer=0, centering="sinkhorn",
                     teacher_temperature=[0.03, 0.03], ema_momentum=0.8, clusters=[810, 270, 27], warmup_epochs=7,
                     negative_paths=100),
    "cifar": dict(SMALL, arch="vit-4-192-9", stem="3x3", init_std=0.0, prototypes=4096, image_size=32, local_size=16),
    "photos": dict(SMALL, arch="vit-8-384-12", prototypes=8192, image_size=96, local_size=48),
    "imagenet": dict(VIT, arch="vit_b_16", prototypes=65536, image_size=224, local_crops=10, local_size=96, epochs=400,
                     batch_size=1024, base_lr=7.5e-4, final_lr=2e-6, lr_warmup=0.025, clip_grad=0.3,
                     freeze_last_layer=3, clusters=[30000, 10000, 5000], warmup_epochs=40, negative_paths=100),
}

# ---- [method] augmentation: DINO's, milder at 32 px; of the first crop, what the second and the small ones differ in
PHOTO = common.Augmentation(scale=(0.25, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2, blur_p=1.0)
AUGMENTATIONS = {"textures": common.Augmentation(scale=(0.4, 1.0), gray_p=0.5, shuffle_p=0.5),
                 "cifar": PHOTO._replace(blur_p=0.0), "photos": PHOTO, "imagenet": PHOTO}
SECOND = {"textures": dict(), "cifar": dict(solarize_p=0.2), "photos": dict(blur_p=0.1, solarize_p=0.2),
          "imagenet": dict(blur_p=0.1, solarize_p=0.2)}
LOCAL = {"textures": dict(scale=(0.15, 0.4)), "cifar": dict(scale=(0.08, 0.25)),
         "photos": dict(scale=(0.05, 0.25), blur_p=0.5), "imagenet": dict(scale=(0.05, 0.25), blur_p=0.5)}


# ---- [shared: dino] arguments
def dino_arguments():
    """The parser of what DINO and iBOT have in common."""
    p = plumbing.shared_arguments(__doc__, PRESETS)
    add, count, above = p.add_argument, plumbing.positive(int, zero=True), plumbing.positive(float)
    number, share = (plumbing.positive(float, zero=True, most=most) for most in (None, 1))
    add("--dim", type=plumbing.positive(int), help="width D of the embedding (preset)")
    add("--projector", choices=["mlp", "mlp-bn"], help="three linear layers, or with batch norm between (preset)")
    add("--hidden", type=plumbing.positive(int), help="width of the projector's hidden layers (preset)")
    add("--init-std", type=number, help="of initial matrices and tokens (DINO: 0.02), 0: torchvision's (preset)")
    add("--prototypes", type=plumbing.positive(int), help="outputs P of student and teacher (preset)")
    add("--free-last-layer", action="store_true", help="learn the prototypes' lengths too (DINO: in small ViTs)")
    add("--freeze-last-layer", type=count, help="first epochs that leave the prototypes as they are (preset)")
    add("--local-crops", type=plumbing.positive(int, zero=True, most=100), help="small crops beside the two global "
        "ones (preset)")
    add("--local-size", type=plumbing.positive(int, most=4096), help="side of the small crops, pixels (preset)")
    add("--temperature", type=above, default=0.1, help="T_s of the student (DINO)")
    add("--teacher-temperature", type=above, nargs=2, metavar="T", help="T_t of the teacher, start and end (preset)")
    add("--temperature-warmup", type=share, default=0.1, help="share of the epochs in which T_t moves (30 of 300)")
    add("--centering", choices=["mean", "sinkhorn"], help="a running mean, or what balances the batch (preset)")
    add("--center-momentum", type=share, default=0.9, help="of the running mean (DINO)")
    add("--ema-momentum", type=share, help="m, rising to 1 by cosine: theta_t <- m theta_t + (1-m) theta_s (preset)")
    add("--optimizer", choices=["adamw", "sgd"], help="AdamW, or SGD with momentum 0.9 (preset)")
    add("--lr-warmup", type=share, help="share of the run in which lr rises from 0 to its peak (preset)")
    add("--final-lr", type=number, help="lr at the end, not scaled by the batch (preset)")
    add("--final-weight-decay", type=number, help="weight decay at the end, by cosine (preset)")
    add("--clip-grad", type=number, help="largest norm of each tensor's gradient, 0: any (preset)")
    add("--drop-path", type=share, help="chance to skip each branch of the student's last block, of a ViT (preset)")
    add("--negative-paths", type=plumbing.positive(int), help="M random paths per image (HIRL; preset)")
    add("--path-weight", type=above, default=1.0, help="of the path loss (HIRL: 1)")
    return p


# ---- [method] arguments
def parse_args(argv=None):
    return plumbing.resolve_arguments(dino_arguments(), PRESETS, argv)


# ---- [shared: dino] encoder
class Encoder(nn.Module):
    """Backbone and projector: (B, 3, H, W) -> (B, D), raw; then P prototypes, whose lengths are 1 unless `free`."""

    def __init__(self, backbone, width, projector, hidden, dim, prototypes, free, init_std):
        super().__init__()
        layers = []
        for before, after in ((width, hidden), (hidden, hidden), (hidden, dim)):
            norm = nn.BatchNorm1d(after) if projector == "mlp-bn" else nn.Identity()
            layers += [nn.Linear(before, after), norm, nn.GELU()]
        self.backbone, self.projector = backbone, nn.Sequential(*layers[:-2])
        for name, p in self.named_parameters():  # DINO's initial values; convolutions keep torchvision's
            if init_std and p.ndim in (2, 3):
                nn.init.trunc_normal_(p, std=init_std)
            elif init_std and name.endswith("bias"):
                nn.init.zeros_(p)
        self.weight_v = nn.Parameter(nn.Linear(dim, prototypes, bias=False).weight.detach())  # (P, D)
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=free)

    def forward(self, x):
        return self.projector(self.backbone(x))

    def logits(self, raw, frozen=False):
        """(..., D) of any length -> (..., P): cosines to the prototypes, times their lengths."""
        prototypes = self.weight_g * F.normalize(self.weight_v, dim=1)
        return F.normalize(raw, dim=-1) @ (prototypes.detach() if frozen else prototypes).T


# ---- [shared: hirl] heads
def level_head(dim):
    """HIRL's head of one level, (B, D) -> (B, D); it reads the raw projection."""
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
                         nn.Linear(dim, dim))


# ---- [shared: dino] model
class DINO(nn.Module):
    """A student, its slow copy as teacher, the centre of the teacher's logits."""

    def __init__(self, encoder):
        super().__init__()
        self.student, self.teacher = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("center", torch.zeros(len(encoder.weight_v)))  # (P,)
        self.register_buffer("chosen", torch.full((len(encoder.weight_v),), -2**40))  # last step an output was largest

    @torch.no_grad()
    def update_teacher(self, ema_momentum):
        """theta_t <- m theta_t + (1-m) theta_s: parameters only; the copy has its own batch-norm statistics."""
        teacher, student = [*self.teacher.parameters()], [*self.student.parameters()]
        torch.optim.swa_utils.get_ema_multi_avg_fn(ema_momentum)(teacher, student, None)  # in one kernel

    @torch.no_grad()
    def in_use(self, p, now, steps):
        """For the log: mean entropy of the targets p (2, b, P), entropy of their mean, and how many outputs were the
        largest of some target in the last `steps` steps. Entropies in nats, over all processes: both near ln P, all
        is uniform; that of the mean small, few outputs are in use.
        """
        p = p.flatten(0, -2)
        mean = ranks.all_reduce_sum(p.mean(dim=0)) / ranks.processes()  # (P,)
        self.chosen.index_fill_(0, ranks.all_gather_rows(p.argmax(dim=1), equal=True), now)
        return {"entropy": torch.special.entr(p).sum(dim=1).mean(), "entropy_of_mean": torch.special.entr(mean).sum(),
                "prototypes_in_use": (self.chosen > now - steps).sum().float()}


# ---- [method] crops
def encode_crops(backbone, projector, crops, branches=None):
    """Crops [(b, 3, H, W)], those of a size side by side -> raw projections (V, b, D).

    Crops of one size pass the backbone together, all pass the projector together; branches: see networks.drop_path.
    """
    first = [v for v in range(len(crops)) if v == 0 or crops[v].shape != crops[v - 1].shape]
    features = []
    for a, b in zip(first, first[1:] + [len(crops)]):
        how = {} if branches is None else dict(branches=branches[:, a:b].flatten(1))
        features.append(backbone(torch.cat(crops[a:b]), **how))
    return projector(torch.cat(features)).unflatten(0, (len(crops), -1))


# ---- [shared: dino] loss
def dino_loss(student, teacher, center, student_temperature, teacher_temperature):
    """From every crop, the student predicts the teacher's output for each global crop other than that one:

    mean over i < 2, v != i of mean_n H(softmax((t_i - c) / T_t), softmax(s_v / T_s)),  H(a, b) = -sum_p a_p log b_p

    student (V, B, P) logits s, the global crops first; teacher (2, B, P) logits t of the global crops; center c (P,);
    the gradient goes to the student alone. Returns a scalar; a student that tells nothing apart scores ln P.
    Source: DINO (2104.14294) Eq. 3, averaged over pairs as in the released code, where the paper sums.
    """
    targets = F.softmax((teacher - center) / teacher_temperature, dim=-1).detach()  # (2, B, P)
    log_p = F.log_softmax(student / student_temperature, dim=-1)  # (V, B, P)
    pairs = [(i, v) for i in range(len(teacher)) for v in range(len(student)) if v != i]
    return sum(-(targets[i] * log_p[v]).sum(dim=-1).mean() for i, v in pairs) / len(pairs)  # DINO Eq. 3


# ---- [shared: dino] centre
@torch.no_grad()
def moved_center(center, teacher, momentum):
    """c <- m c + (1-m) mean of the teacher's logits (..., P) over all dimensions but P and all processes."""
    mean = ranks.all_reduce_sum(teacher.flatten(0, -2).mean(dim=0)) / ranks.processes()  # (P,)
    return momentum * center + (1 - momentum) * mean  # DINO Eq. 4


@torch.no_grad()
def balancing_center(teacher, temperature, iterations=3):
    """The centre c (P,) with which softmax((t - c) / T) of the logits t (..., P) uses all P outputs about equally.

    Sinkhorn's scaling over all processes, as in SwAV and DINOv2 but rows first. DEVIATION (DINO, iBOT): for small data.
    """
    logits = teacher.flatten(0, -2) / temperature  # (n, P)
    center = logits.new_zeros(logits.shape[1])
    for _ in range(iterations):
        mass = F.log_softmax(logits - center, dim=1).logsumexp(dim=0, keepdim=True)  # (1, P), -inf of no rows
        center = center + ranks.all_gather_rows(mass, equal=True).logsumexp(dim=0).nan_to_num(neginf=0.0)  # (P,)
    return center * temperature


# ---- [shared: dino] schedules
def step_schedule(start, end, steps, warmup=0):
    """One value per step: `warmup` steps in a line from 0 to `start` (a single one at 0), then a cosine from `start` on
    that stops one step short of `end`. Source: DINO's released code.
    """
    rise = [start * t / max(1, warmup - 1) for t in range(warmup)]
    half = [(1 + math.cos(math.pi * t / (steps - warmup))) / 2 for t in range(steps - warmup)]
    return rise + [end + (start - end) * h for h in half]


def epoch_schedule(start, end, epochs, warmup):
    """One value per epoch: `warmup` epochs in a line from `start` to `end` (a single one at `start`), then `end`."""
    return [start + (end - start) * e / max(1, warmup - 1) if e < warmup else end for e in range(epochs)]


# ---- [shared: dino] optimizer's parts
def decay_groups(model):
    """Parameter groups: matrices and tokens decay (prototypes, positions, class token too), vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in trained if (p.ndim > 1) == decayed], decayed=decayed) for decayed in (True, False)]


@torch.no_grad()
def clip_each(parameters, norm):
    """Shrink the gradient of each tensor, in place, to at most this norm; 0 leaves them as they are."""
    for p in parameters:
        if norm and p.grad is not None:
            p.grad.mul_((norm / (p.grad.norm() + 1e-6)).clamp(max=1))


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
    model = DINO(Encoder(backbone, width, args.projector, args.hidden, args.dim, args.prototypes, args.free_last_layer,
                         args.init_std))
    model.heads = nn.ModuleList(level_head(args.dim) for _ in clusters)  # last, so that the rest starts as without
    ranks.sync_batch_norm(model)  # under torchrun; one process has nothing to synchronise
    model.to(device, memory_format=torch.channels_last)
    backbone, projector, teacher = (torch.compile(part) if args.compile else part for part in (
        model.student.backbone, model.student.projector, model.teacher))
    chance = {"dino": math.log(args.prototypes)}
    exported = clustered = model.teacher  # backbone.pt and the tree both come from it
    local = augmentation._replace(size=args.local_size, **LOCAL[args.preset])
    views = [augmentation, augmentation._replace(**SECOND[args.preset]), *[local] * args.local_crops]

    # ---- [shared: dino] optimizer
    groups = decay_groups(model)
    optimizer = torch.optim.AdamW(groups) if args.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: clip_each(model.parameters(), args.clip_grad))
    steps = args.epochs * steps_per_epoch
    lrs = step_schedule(peak_lr, args.final_lr, steps, round(args.lr_warmup * steps))
    decays = step_schedule(args.weight_decay, args.final_weight_decay, steps)
    momenta = step_schedule(args.ema_momentum, 1.0, steps)
    temperatures = epoch_schedule(*args.teacher_temperature, args.epochs, round(args.temperature_warmup * args.epochs))

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

            # ---- [shared: dino] schedules' values
            now, temperature_t = round(done * steps), temperatures[epoch]
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lrs[now], decays[now] * group["decayed"]

            # ---- [method] logits of student and teacher
            branches = networks.drop_path(model.student.backbone, args.drop_path, len(views), batch_size,
                                        ranks.random_state(*place, "drop path"))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                raws = encode_crops(backbone, projector, crops, branches).float()  # (V, b, D)
                with torch.no_grad():  # no gradient to the teacher, which sees the global crops alone
                    raws_t = teacher(torch.cat(crops[:2])).float().unflatten(0, (2, -1))  # (2, b, D)
            raw = raws[0]
            s = model.student.logits(raws, frozen=epoch < args.freeze_last_layer)  # (V, b, P)
            t = model.teacher.logits(raws_t)  # (2, b, P)

            # ---- [method] base loss
            center = model.center if args.centering == "mean" else balancing_center(t, temperature_t)
            losses = {"dino": dino_loss(s, t, center, args.temperature, temperature_t)}
            watched = {"feature_std": plumbing.feature_std(F.normalize(raw, dim=1)),
                       **model.in_use(F.softmax((t - center) / temperature_t, dim=-1), now, steps_per_epoch)}
            model.center.copy_(moved_center(model.center, t, args.center_momentum))

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

            # ---- [shared: dino] teacher
            model.update_teacher(momenta[now])  # after the step; HIRL's release: before the forward pass

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
