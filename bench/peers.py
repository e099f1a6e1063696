"""MoCo v2 here and as one would otherwise run it: images/s of the same training, side by side.

    python bench/peers.py --data cifar100/train           # a folder of pictures; some minutes on two cores
    python bench/peers.py --data cifar100/train --network "resnet18 3x3" --pictures 512   # hardly anything but the step

lightly takes part where it is installed (a folder of its own in PYTHONPATH will do). Same network, pictures and views:
    here         hirl_moco.py's step, without hierarchy, on common.batches
    torchvision  the same step on ImageFolder, torchvision's transforms and a DataLoader
    lightly      its loss, memory bank, data set and transform, as in its MoCo example, and a DataLoader
    bare step    the first two's step on one fixed batch, without any work on pictures
An epoch of each in turn, from asking for the first batch to the end of the last step. Pictures that fit are read once a
run here (the seconds are shown), once per epoch by the others; processes start once. Ratios: medians over the rounds.
Then views of 224 px from files of 500 x 375 px by one thread, here and by the recipe of MoCo v2's release.
"""

import argparse
import copy
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from losses import cpu_name
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import hirl_moco
import networks
import plumbing

try:
    import lightly
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
except ImportError as error:
    lightly, missing = None, error

NETWORKS = ["tiny 3x3s2", "resnet18 7x7", "resnet18 3x3"]  # architecture and stem
BATCH, DIM, QUEUE, TEMPERATURE, MOMENTUM, SIZE = 128, 128, 4096, 0.2, 0.99, 32


def our_step(arch, stem, device):
    """hirl_moco.py's step with --clusters 0, as a function of two views (B, 3, S, S)."""
    model = hirl_moco.MoCo(hirl_moco.Encoder(arch, stem, "mlp", DIM, SIZE), DIM, QUEUE)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)

    def step(view_q, view_k):
        q = F.normalize(model.encoder_q(view_q), dim=1)
        with torch.no_grad():
            model.update_key_encoder(MOMENTUM)
            k = F.normalize(model.encoder_k(view_k), dim=1)
        optimizer.zero_grad()
        hirl_moco.info_nce(q, k, model.queue, TEMPERATURE).backward()
        optimizer.step()
        model.enqueue(k)

    return step


def lightly_step(arch, stem, device):
    """The same of lightly's parts, in the order of its MoCo example."""
    backbone, width = networks.backbone(arch, stem, SIZE)
    query = torch.nn.Sequential(backbone, MoCoProjectionHead(width, width, DIM)).to(device)
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    criterion = NTXentLoss(TEMPERATURE, memory_bank_size=(QUEUE, DIM)).to(device)
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)

    def step(view_q, view_k):
        update_momentum(query, key, MOMENTUM)
        q, k = query(view_q.to(device)), key(view_k.to(device)).detach()
        criterion(q, k).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def pil_recipe(size, blur):
    """MoCo v2's transform, as released: a picture of PIL's -> two views (3, S, S) float32."""
    gaussian = T.Lambda(lambda picture: picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))
    once = T.Compose([T.RandomResizedCrop(size, (0.2, 1)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                      T.RandomGrayscale(0.2), T.RandomApply([gaussian], 0.5 if blur else 0),
                      T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)])
    return lambda picture: [once(picture), once(picture)]


def contenders(network, folder, train, args):
    """{name: (epoch -> iterable of pairs of views, step)}."""
    how = dict(batch_size=BATCH, shuffle=True, drop_last=True, pin_memory=args.device != "cpu",
               **(dict(num_workers=args.workers, persistent_workers=True, multiprocessing_context="fork")
                  if args.workers else {}))
    plain = DataLoader(torchvision.datasets.ImageFolder(folder, pil_recipe(SIZE, blur=False)), **how)
    views, step = [hirl_moco.AUGMENTATIONS["cifar"]._replace(size=SIZE)] * 2, our_step(*network.split(), args.device)

    def ours(epoch):
        batches = common.batches(train, BATCH, views, seed=0, epoch=epoch, device=args.device, workers=args.workers)
        return (crops for _, _, crops in batches)

    def theirs(epoch):
        return ([v.to(args.device, memory_format=torch.channels_last, non_blocking=True) for v in pair]
                for pair, _ in plain)

    fixed = [next(ours(0))] * (len(train) // BATCH)
    found = {"here": (ours, step), "torchvision": (theirs, step), "bare step": (lambda epoch: fixed, step)}
    if lightly:
        transform = MoCoV2Transform(input_size=SIZE, gaussian_blur=0.0)
        loader = DataLoader(LightlyDataset(folder, transform=transform), **how)
        found["lightly"] = (lambda epoch: (batch[0] for batch in loader), lightly_step(*network.split(), args.device))
    return found


def ratio(a, b):  # the first round warms up
    return statistics.median(x / y for x, y in list(zip(a, b))[1:])


def train_side_by_side(network, folder, args):
    begun = time.perf_counter()
    train, _ = common.load_data(folder, device=args.device)
    print(f"\n{network}: {len(train)} pictures, read here in {time.perf_counter() - begun:.1f} s, "
          f"batch {BATCH}, {args.rounds} rounds", flush=True)
    found = contenders(network, folder, train, args)
    speed = {name: [] for name in found}
    for turn in range(args.rounds + 1):  # the first warms up
        for name in list(found)[:: 1 if turn % 2 else -1]:
            (batches, step), begun = found[name], time.perf_counter()
            steps = sum(step(*views) or 1 for views in batches(turn))
            if args.device != "cpu":
                torch.cuda.synchronize()
            speed[name].append(steps * BATCH / (time.perf_counter() - begun))
    print(f"{'':12}{'images/s':>10}{'from':>8}{'to':>8}{'here is faster':>16}{'of the bare step':>18}")
    for name, (_, *rounds) in speed.items():
        print(f"{name:12}{statistics.median(rounds):10.0f}{min(rounds):8.0f}{max(rounds):8.0f}"
              f"{ratio(speed['here'], speed[name]):14.2f} x{100 * ratio(speed[name], speed['bare step']):16.1f} %")


def large_views(args):
    """Views of 224 px from 500 x 375 JPEGs of low-frequency noise, per second of one core."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        noise = torch.rand(args.jpegs, 3, 12, 16, generator=torch.Generator().manual_seed(0))
        for i, picture in enumerate(map(T.ToPILImage(), noise)):
            picture.resize((500, 375), Image.BICUBIC).save(f"{folder}/{i:04}.jpg", quality=90)
        images, recipe = common.folder(folder), pil_recipe(224, blur=True)
        views = [hirl_moco.AUGMENTATIONS["imagenet"]._replace(size=224)] * 2
        kinds = {"here": lambda: list(common.batches(images, args.jpegs, views, seed=0, epoch=0)),
                 "PIL recipe": lambda: [recipe(Image.open(path).convert("RGB")) for path in images.paths]}
        speed = {name: [] for name in kinds}
        for _ in range(args.rounds + 1):
            for name, function in kinds.items():
                begun = time.process_time()
                function()
                speed[name].append(2 * args.jpegs / (time.process_time() - begun))
    print(f"\n224 px from {args.jpegs} JPEGs, two views each\n{'':12}{'views a CPU second':>20}{'here is faster':>16}")
    for name, rounds in speed.items():
        print(f"{name:12}{statistics.median(rounds[1:]):20.0f}{ratio(speed['here'], rounds):14.2f} x")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of pictures in sub-folders; without it, 224 px alone")
    p.add_argument("--pictures", type=int, default=2560, help="of them, drawn at random")
    p.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS[:2], help="architecture and stem")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of a DataLoader")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--jpegs", type=int, default=64, help="of 500 x 375 px, 0: none")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    plumbing.set_up(argparse.Namespace(device=args.device, seed=0))  # as a run does; its allocator serves all alike
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, Image, lightly) if m)
    print(f"{time.strftime('%Y-%m-%d')}  python {' '.join(sys.argv)}\n{versions}; {torch.get_num_threads()} threads, "
          f"{args.workers} workers; {cpu_name() if args.device == 'cpu' else torch.cuda.get_device_name()}")
    if args.data:
        print(end="" if lightly else f"lightly is left out, for it cannot be imported ({missing}): pip install it\n")
        with tempfile.TemporaryDirectory() as folder:
            paths = sorted(common.picture_files(args.data))
            for path in random.Random(0).sample(paths, min(args.pictures, len(paths))):
                link = Path(folder, path.relative_to(args.data))
                os.makedirs(link.parent, exist_ok=True)
                link.symlink_to(path.resolve())
            for network in args.network:
                train_side_by_side(network, folder, args)
    if args.jpegs:
        large_views(args)


if __name__ == "__main__":
    main()
