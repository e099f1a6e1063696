"""What is the same in every method: data, augmentation, k-means, hierarchy losses, kNN, run plumbing.

Read a script first (hirl_moco.py), and come here when you want to know how a helper does it. Functions are
pure where they can be: tensors and numbers in, tensors out, randomness through a generator or an argument
that is already drawn. Each loss and the k-means can be pasted alone into an empty file that imports torch.

Letters: B batch, D embedding, F backbone feature, N images, L levels (0 the finest), K_l clusters at level l,
M negative paths, V views, H W picture height and width. Rows are items, always.
"""

import argparse
import csv
import ctypes
import errno
import hashlib
import io
import itertools
import json
import math
import os
import platform
import resource
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
IN_MEMORY_BYTES = 4 * 2**30  # small pictures of one size up to this much live on the device as one tensor

# ---- collectives: nothing happens at world size 1


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_wire(tensor):
    """The tensor where the process group can send it: nccl moves CUDA tensors only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def all_reduce_sum(tensor):
    """Sum over ranks, in place; the same on every rank."""
    if world()[1] > 1:
        total = on_wire(tensor)
        dist.all_reduce(total)
        tensor.copy_(total)
    return tensor


def max_over_ranks(number):
    """The largest of one integer a rank."""
    if world()[1] == 1:
        return number
    largest = on_wire(torch.tensor(number))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_gather_rows(tensor):
    """Rows of all ranks in rank order; ranks may hold different numbers of them."""
    size = world()[1]
    if size == 1:
        return tensor
    counts = on_wire(torch.tensor([len(tensor)]))
    rows = [torch.empty_like(counts) for _ in range(size)]
    dist.all_gather(rows, counts)
    rows = [int(r) for r in rows]
    padded = on_wire(tensor.new_zeros(max(rows), *tensor.shape[1:]))
    padded[:len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:n] for part, n in zip(gathered, rows)]).to(tensor.device)


class gathered_rows_(torch.autograd.Function):
    """The gradient of a row is the sum over ranks of its gradients: every rank's loss has seen it."""

    @staticmethod
    def forward(ctx, x):
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx, grad):
        rank, size = world()
        return all_reduce_sum(grad.clone(memory_format=torch.contiguous_format)).chunk(size)[rank]


def all_gather_rows_with_grad(tensor):
    """Rows of all ranks in rank order, as many from each; gradients flow back to the rank that holds the row.

    A loss of all rows, computed alike on every rank, comes back as `size` times its gradient: what
    `average_gradients` divides by `size` again, so that G ranks train as one process would.
    """
    return gathered_rows_.apply(tensor) if world()[1] > 1 else tensor


def barrier():
    """Wait for every rank."""
    if world()[1] > 1:
        dist.barrier()


# ---- textures: the embedded data set
# Three families of patterns, three kinds of each, three profiles of each kind: 27 leaves. A picture
# is a height in [0,1] over the plane, passed through its profile and painted in two random colours.
# Colour, rotation, position, scale and which side is the lighter say nothing about the class.

FAMILIES = {
    "stripes": ("straight", "wavy", "zigzag"),
    "spots": ("square", "hexagonal", "scattered"),
    "swirls": ("rings", "spiral", "rays"),
}
PROFILES = ("smooth", "half", "thin")
KINDS = [f"{family}/{kind}" for family, kinds in FAMILIES.items() for kind in kinds]
TEXTURE_NAMES = [
    list(FAMILIES),
    KINDS,
    [f"{kind}/{profile}" for kind in KINDS for profile in PROFILES],
]


def triangle_wave(phase: Tensor) -> Tensor:
    """Period 1; 1 at whole numbers, 0 half way between, straight lines in between."""
    return (2 * (phase - phase.floor()) - 1).abs()


def lattice_height(u: Tensor, v: Tensor, lean: float, pitch: float, shift: Tensor) -> Tensor:
    """1 at the nearest lattice point, falling to 0 half a spacing away: u, v (n,H,W) in spacings.

    Rows lie `pitch` apart and every second one is moved by `lean`; shift (n,8,8,2) moves the
    points.
    """
    n = len(u)
    each = torch.arange(n)[:, None, None]
    squared = torch.full_like(u, 9.0)
    row0 = (v / pitch).floor()
    for row in (row0 - 1, row0, row0 + 1):
        start = lean * torch.remainder(row, 2)
        column0 = (u - start).floor()
        for column in (column0 - 1, column0, column0 + 1):
            moved = shift[each, row.long() % 8, column.long() % 8]  # (n, H, W, 2)
            du = u - (column + 0.5 + start + moved[..., 0])
            dv = v - ((row + 0.5) * pitch + moved[..., 1])
            squared = torch.minimum(squared, du * du + dv * dv)
    return (1 - 2 * squared.sqrt()).clamp(min=0)


def texture_height(kind: str, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Height in [0,1] of one kind over rotated coordinates x, y (n,H,W); unit: the image's side."""
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    family, shape = kind.split("/")
    frequency = uniform(0.85, 1.15)
    if family == "stripes":
        x, y = (
            4.2 * frequency * x + uniform(0, 1),
            4.2 * frequency * y + uniform(0, 1),
        )  # in stripes
        if shape == "wavy":
            x = x + 0.55 * torch.sin(2 * math.pi * 0.42 * y)
        if shape == "zigzag":
            x = x + 1.1 * triangle_wave(0.62 * y)
        return triangle_wave(x)
    if family == "spots":
        u, v = (
            3.7 * frequency * x + uniform(0, 1),
            3.7 * frequency * y + uniform(0, 1),
        )  # in spacings
        wander = 0.36 if shape == "scattered" else 0.0
        shift = wander * (2 * torch.rand(n, 8, 8, 2, generator=generator) - 1)
        lean, pitch = (0.5, 3**0.5 / 2) if shape == "hexagonal" else (0.0, 1.0)
        return lattice_height(u, v, lean, pitch, shift)
    x, y = x - uniform(-0.12, 0.12), y - uniform(-0.12, 0.12)  # swirls: around a centre
    radius, turn = (x * x + y * y).sqrt(), torch.atan2(y, x) / (2 * math.pi)
    hand = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    phase = {
        "rings": 4.6 * frequency * radius,
        "spiral": 3.6 * frequency * radius + 2 * hand * turn,
        "rays": (8 + (3 * uniform(0, 1)).floor()) * turn,
    }[shape]
    return triangle_wave(phase + uniform(0, 1))


def texture_profile(height: Tensor, family: str, profile: str) -> Tensor:
    """Height -> share of the ink in [0,1]: slope, edge at the middle, or edge near the top."""
    if profile == "smooth":
        return 0.5 - 0.5 * torch.cos(math.pi * height)
    middle, top = (0.28, 0.62) if family == "spots" else (0.5, 0.76)
    edge = middle if profile == "half" else top
    return ((height - edge) * 40 + 0.5).clamp(0, 1)


def two_colours(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ink and paper, each (n,3,1,1): any hues, brightness 0.35 to 0.75 apart, either lighter."""
    luma = torch.tensor([0.2989, 0.587, 0.114])
    colours = torch.rand(n, 2, 3, generator=generator)
    apart = 0.35 + 0.4 * torch.rand(n, generator=generator)
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    # Move both along the gray axis until their brightnesses lie `apart`, centred in the range.
    bright = (colours * luma).sum(2)
    middle = apart / 2 + (1 - apart) * torch.rand(n, generator=generator)
    want = torch.stack([middle + sign * apart / 2, middle - sign * apart / 2], 1)
    colours = (colours + (want - bright)[..., None]).clamp(0, 1)
    ink, paper = colours[..., None, None].unbind(1)
    return ink, paper


def textures(n_per_leaf: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Seeded pictures: images (27 * n_per_leaf, 3, size, size) uint8, labels (N, 3) int64.

    Labels are family (3), kind (9) and leaf (27), coarse to fine; names in TEXTURE_NAMES. Rows come
    leaf by leaf. Another seed gives another sample of the same classes: a test split.
    """
    generator = torch.Generator().manual_seed(seed)
    fine = 2 * size  # drawn at twice the size and averaged: smooth edges
    axis = (torch.arange(fine) + 0.5) / fine - 0.5
    pictures = []
    for name in TEXTURE_NAMES[-1]:
        family, shape, profile = name.split("/")
        angle = 2 * math.pi * torch.rand(n_per_leaf, 1, 1, generator=generator)
        x = angle.cos() * axis - angle.sin() * axis[:, None]  # (n, fine, fine)
        y = angle.sin() * axis + angle.cos() * axis[:, None]
        height = texture_height(f"{family}/{shape}", x, y, generator)
        share = texture_profile(height, family, profile)[:, None]
        share = F.avg_pool2d(share, 2)  # (n, 1, size, size)
        ink, paper = two_colours(n_per_leaf, generator)
        noise = 0.05 * torch.randn(n_per_leaf, 3, size, size, generator=generator)
        pictures.append(torch.lerp(paper, ink, share) + noise)
    images = (torch.cat(pictures).clamp_(0, 1) * 255).round().byte()
    leaf = torch.arange(27).repeat_interleave(n_per_leaf)
    return images, torch.stack([leaf // 9, leaf // 3, leaf], dim=1)


# ---- data: pictures, their names, and labels coarse to fine

CIFAR100_SUPERCLASSES = (
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
    "household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes "
    "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees "
    "vehicles_1 vehicles_2").split()
CIFAR100_COARSE = torch.tensor([  # class, in torchvision's order -> superclass
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1,
    10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12,
    12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0,
    17, 8, 14, 13])


class Images:
    """One split of a data set: N pictures with names and, for evaluation only, labels.

    labels       (N, depth) int64, coarse to fine, or None when the pictures carry none
    class_names  per label level, the names its integers stand for
    pixels       (N, 3, H, W) uint8 when all pictures share one small size, else None: then `paths`
                 are decoded on demand by worker processes
    index_of     (N,) int64: i itself, or the neighbour that stands in for an unreadable picture i
    partner      None, or a function (epoch, step, index (B,)) -> (B,) of the pictures whose views follow
                 those of a batch (csml.py)
    """

    def __init__(self, names, labels=None, class_names=(), pixels=None, paths=None):
        self.names, self.labels, self.class_names = names, labels, class_names
        self.pixels, self.paths = pixels, paths
        self.index_of, self.partner = torch.arange(len(names)), None
        self.unreadable = {}  # index -> reason

    def __len__(self):
        return len(self.names)

    def __getstate__(self):  # to workers, who may have to be sent it: all but the function
        return {**vars(self), "partner": None}

    def fingerprint(self):
        """A short hash of what the pictures are, so that a run is not resumed on others."""
        content = [*self.names, int(self.pixels.sum()) if self.pixels is not None else ""]
        return hashlib.blake2b(repr(content).encode(), digest_size=6).hexdigest()

    def picture(self, i):
        """Picture i as (3, H, W) uint8."""
        return self.pixels[i] if self.pixels is not None else decode(self.paths[self.index_of[i]])

    def replace(self, i, stand_in, reason):
        """Note that picture i cannot be read and `stand_in` takes its place, index included."""
        if i in self.unreadable:
            return
        self.unreadable[i], self.index_of[i] = reason, stand_in
        print(f"unreadable picture, using its neighbour: {self.names[i]} ({reason})", file=sys.stderr)
        if len(self.unreadable) > max(1, 0.01 * len(self)):
            bad = ", ".join(self.names[j] for j in list(self.unreadable)[:20])
            raise UserError(f"{len(self.unreadable)} of {len(self)} pictures cannot be read, more than "
                            f"1 %: mend or remove them ({bad})")


def decode(path):
    """A picture file of any mode as (3, H, W) uint8 RGB: 16-bit is scaled, alpha is dropped."""
    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):  # 16 bits or real numbers a pixel: PIL would clip, not scale
            values = np.asarray(picture, np.float32)
            values = values * 255 if picture.mode == "F" and values.max() <= 1 else values / 257
            picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)


def readable(images, i):
    """(index, picture) of i or, when it cannot be read, of the next picture that can; and why."""
    reason = None
    for j in range(i, i + len(images)):
        try:
            return j % len(images), decode(images.paths[j % len(images)]), reason
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = reason or f"{type(error).__name__}: {error}"
    raise UserError(f"no picture can be read, the first is {images.paths[0]} ({reason})")


def folder(root, class_names=None):
    """Every picture under `root`; its sub-folders, nested or not, are its labels coarse to fine.

    class_names: those of the training split, so that both number the classes alike.
    """
    def refuse(error):
        raise UserError(f"cannot read the folder {error.filename} ({error.strerror}): check its permissions")

    paths = sorted(Path(where) / name for where, _, names in os.walk(root, onerror=refuse, followlinks=True)
                   for name in names if name.lower().endswith(PICTURES) and not name.startswith("."))
    if not paths:
        raise UserError(f"no pictures under {root}: it needs files that end in {' '.join(PICTURES)}")
    parents = [path.relative_to(root).parts[:-1] for path in paths]
    depth = min(len(parts) for parts in parents)  # levels that every picture has
    levels = [["/".join(parts[:level + 1]) for parts in parents] for level in range(depth)]
    class_names = [sorted(set(level)) for level in levels] if class_names is None else class_names
    if len(class_names) > depth or any(set(level) - set(names) for level, names in zip(levels, class_names)):
        raise UserError(f"{root} has other classes than the training pictures: give both the same sub-folders")
    ids = [{name: i for i, name in enumerate(names)} for names in class_names]
    labels = torch.tensor([[i[name] for i, name in zip(ids, row)] for row in zip(*levels)]) if ids else None
    images = Images([str(path.relative_to(root)) for path in paths], labels, class_names, paths=paths)
    first = readable(images, 0)[1]
    if max(first.shape[1:]) > 128 or first.numel() * len(paths) > IN_MEMORY_BYTES:
        return images
    pixels = torch.zeros(len(paths), *first.shape, dtype=torch.uint8)
    with ThreadPoolExecutor(8) as pool:
        for i, (j, picture, reason) in enumerate(pool.map(lambda i: readable(images, i), range(len(paths)))):
            if picture.shape != first.shape:  # mixed sizes: decode on demand
                pool.shutdown(cancel_futures=True)
                return images
            pixels[i] = picture
            if reason:
                images.replace(i, j, reason)
    images.pixels = pixels
    return images


def load_data(data, data_root="data", device="cpu"):
    """`textures`, `cifar10`, `cifar100`, `stl10` or a folder -> (train, test) Images; test may be None.

    Pictures that fit are one tensor on the device.
    A folder holds `train/` and `val/` (or `test/`), or just pictures; torchvision's sets are downloaded
    to `data_root` on first use. Raises UserError with what to do when there is nothing to read.
    """
    splits = find_data(data, data_root)
    for images in splits:
        if images is not None and images.pixels is not None:
            images.pixels = images.pixels.to(device)
    return splits


def find_data(data, data_root):
    """load_data, with the pixels still on the CPU."""
    if data == "textures":
        return tuple(Images([f"{i:05d}" for i in range(len(y))], y, TEXTURE_NAMES, pixels=x)
                     for x, y in (textures(200, seed=0), textures(40, seed=1)))
    if data in ("cifar10", "cifar100", "stl10"):
        return tuple(torchvision_set(data, data_root, train) for train in (True, False))
    root = Path(data)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"--data {data} {what}: give textures, cifar10, cifar100, stl10 or a folder of pictures")
    if not (root / "train").is_dir():
        return folder(root), None
    train = folder(root / "train")
    names = train.class_names
    return train, next((folder(root / name, names) for name in ("val", "test") if (root / name).is_dir()), None)


def torchvision_set(name, root, train):
    """CIFAR-10, CIFAR-100 (with its 20 superclasses) or STL-10 as Images, downloaded on first use."""
    from torchvision import datasets

    try:
        if name == "stl10":
            data = datasets.STL10(root, "train+unlabeled" if train else "test", download=True)
            pixels, fine = torch.from_numpy(data.data), torch.from_numpy(data.labels).long()
        else:
            data = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](root, train, download=True)
            pixels, fine = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} could not be downloaded to {root} ({error}): put it there by hand, "
                        "or give --data a folder of pictures") from error
    labels, class_names = fine[:, None], [list(data.classes)]
    if name == "cifar100":
        labels, class_names = torch.stack([CIFAR100_COARSE[fine], fine], 1), [CIFAR100_SUPERCLASSES, *class_names]
    return Images([f"{i:05d}" for i in range(len(pixels))], labels, class_names, pixels=pixels)


class Crops(torch.utils.data.Dataset):
    """What a worker does for pictures that are decoded on demand: read, cut one uint8 crop a view."""

    def __init__(self, images, augmentations):
        self.images, self.augmentations = images, augmentations

    def __getitem__(self, request):
        wanted, crop_draws = request
        index, picture, reason = readable(self.images, wanted)
        height, width = picture.shape[1:]
        crops = []
        for view, u in zip(self.augmentations, crop_draws):
            box = (centre_box(height, width, view.size) if u is None else
                   crop_boxes(u[None], height, width, view.scale, view.ratio)[0].tolist())
            crops.append(TF.resized_crop(picture, *map(int, box), [view.size] * 2, antialias=True))
        return wanted, index, reason or "", crops


def centre_box(height, width, size):
    """(row, col, height, width) of the central square; from 96 px on its middle 7/8, as 224 of 256."""
    side = round(min(height, width) * (0.875 if size >= 96 else 1))
    return (height - side) // 2, (width - side) // 2, side, side


def decoded(images, requests, augmentations, workers):
    """Yield (index (b,), [crops (b, 3, S, S) uint8 a view]) for each batch of `requests`."""
    loader = torch.utils.data.DataLoader(Crops(images, augmentations), batch_sampler=requests, num_workers=workers)
    for wanted, index, reasons, crops in loader:
        for i, j, reason in zip(wanted.tolist(), index.tolist(), reasons):
            if reason:
                images.replace(i, j, reason)
        yield index, crops


def batches(images, batch_size, augmentations, *, seed, epoch, start=0, device="cpu", workers=0):
    """Yield (step, index (b,), [view (b, 3, S, S)]) of an epoch, this rank's b rows of every batch.

    Everything random is drawn on the CPU for the global batch from (seed, epoch, step), and a rank uses
    its slice: an epoch can start at any step, and G ranks see exactly what one process would.
    With images.partner, as many views of each image's partner follow; the images' own stay the same.
    """
    order = torch.randperm(len(images), generator=random_state(seed, epoch))
    steps = range(start, len(images) // batch_size)
    mine = local_rows(batch_size)

    def plan(step):  # (b,) ids of the pictures, then of their partners; for each of the two, what its views draw
        generator = random_state(seed, epoch, step)
        index = order[step * batch_size:(step + 1) * batch_size]
        sources = [index, images.partner(epoch, step, index)] if images.partner else [index]
        draws = [[draw_view(batch_size, view, generator) for view in augmentations] for _ in sources]
        return [source[mine] for source in sources], [
            [{name: value[mine] for name, value in draw.items()} for draw in views] for views in draws]

    if images.pixels is None:
        requests = ([(i, [draw["crop"][b] for draw in views]) for source, views in zip(*planned)
                     for b, i in enumerate(source.tolist())] for planned in map(plan, steps))
        for step, (index, crops) in zip(steps, decoded(images, requests, augmentations, workers)):
            draws = [[{name: d for name, d in draw.items() if name != "crop"} for draw in views]
                     for views in plan(step)[1]]
            crops = zip(*(crop.chunk(len(draws)) for crop in crops))  # by source, then by view
            yield step, index.chunk(len(draws))[0].to(device), [
                channels_last(render_view(crop.to(device), draw, view)) for own, views in zip(crops, draws)
                for crop, draw, view in zip(own, views, augmentations)]
        return
    for step in steps:
        sources, draws = plan(step)
        pictures = [images.pixels[source.to(images.pixels.device)].to(device) for source in sources]  # uint8
        yield step, images.index_of[sources[0]].to(device), [
            channels_last(render_view(own, draw, view)) for own, views in zip(pictures, draws)
            for draw, view in zip(views, augmentations)]


@torch.no_grad()
def extract_features(network, images, size, *, device="cpu", workers=0, batch_size=512, amp=False):
    """The network's (n, F) float32 output for the central crop of every picture, this rank's n rows of N.

    In evaluation mode (and back); nothing is augmented and the order is kept.
    """
    training = network.training
    network.eval()
    rows = range(len(images))[local_rows(len(images))]
    chunks = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    if images.pixels is None:
        requests = [[(i, [None]) for i in chunk] for chunk in chunks]
        pictures = (crops[0] for _, crops in decoded(images, requests, [Augmentation(size=size)], workers))
    else:
        box = torch.tensor([centre_box(*images.pixels.shape[2:], size)])
        pictures = (images.pixels[chunk.start:chunk.stop] for chunk in chunks)
    features = []
    for batch in pictures:
        batch = batch.to(device).float() / 255
        if tuple(batch.shape[2:]) != (size, size):
            batch = resized_crop(batch, box.expand(len(batch), 4).to(device), size)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            features.append(network(channels_last(normalize_pixels(batch))).float())
    network.train(training)
    features = torch.cat(features)
    if not features.isfinite().all():  # the losses were finite, but the last step was not
        raise RunError("features = nan after the last step: stopped, the last checkpoint is good; try a lower "
                       "--base-lr or leave out --amp, in another --out")
    return features


def channels_last(images):
    """The memory layout in which convolutions are fast, on CPU and GPU alike."""
    return images.contiguous(memory_format=torch.channels_last)


# ---- augmentation: every view is made on the device
# A view is made in two steps. `draw_view` draws every random number on the CPU, for the global
# batch: a dict of tensors whose first dimension is the sample, so that a rank (or a worker) keeps
# its rows with {key: value[lo:hi]}. `render_view` turns uint8 images and these numbers into a
# normalised batch on the images' device; it draws nothing and reads no value back from the device.

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, the weights of torchvision and PIL
# One mean and one std for every data set and channel: nothing to measure or to keep with a
# checkpoint, gray stays gray, and the BatchNorm after the first convolution absorbs what is left.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


class Augmentation(NamedTuple):
    """What a view may look like. Probabilities are per sample; 0 leaves an operation out."""

    size: int = 32  # side of the view, pixels
    scale: tuple = (0.2, 1.0)  # area of the crop, as a share of the image
    ratio: tuple = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # strength: brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0  # 0.5 for large images; at 32 px a blur removes what is to be learnt
    blur_sigma: tuple = (0.1, 2.0)  # range of the standard deviation, pixels
    solarize_p: float = 0.0
    shuffle_p: float = 0.0  # probability of a random order of the colour channels


def draw_view(n: int, augmentation: Augmentation, generator: torch.Generator) -> dict[str, Tensor]:
    """Every random number of `n` views, drawn on the CPU: no device, rank or image size matters.

    Keys, each with first dimension n: crop (n,10,4) uniform numbers for `crop_boxes`; flip (n,)
    bool; brightness, contrast, saturation (n,) factors, 1 changes nothing; hue (n,) shift in turns;
    order (n,4), equal rows: the jitter operations are ordered anew for every call, not for every
    sample; gray (n,) bool; blur (n,) sigma in pixels, 0 for none; solarize (n,) threshold, 2 for
    none; shuffle (n,3) channels. An operation that is switched off has no key.
    """
    a = augmentation

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def chosen(p: float) -> Tensor:
        return uniform(0, 1) < p

    draws = {"crop": uniform(0, 1, 10, 4)}
    if a.flip > 0:
        draws["flip"] = chosen(a.flip)
    if a.jitter_p > 0 and max(a.jitter) > 0:
        jittered = chosen(a.jitter_p)
        for name, s in zip(("brightness", "contrast", "saturation"), a.jitter[:3], strict=True):
            draws[name] = torch.where(jittered, uniform(max(0.0, 1 - s), 1 + s), 1.0)
        draws["hue"] = torch.where(jittered, uniform(-a.jitter[3], a.jitter[3]), 0.0)
        draws["order"] = torch.randperm(4, generator=generator).repeat(n, 1)
    if a.gray_p > 0:
        draws["gray"] = chosen(a.gray_p)
    if a.blur_p > 0:
        draws["blur"] = torch.where(chosen(a.blur_p), uniform(*a.blur_sigma), 0.0)
    if a.solarize_p > 0:
        draws["solarize"] = torch.where(chosen(a.solarize_p), 0.5, 2.0)
    if a.shuffle_p > 0:
        shuffled = uniform(0, 1, 3).argsort(1)
        draws["shuffle"] = torch.where(chosen(a.shuffle_p)[:, None], shuffled, torch.arange(3))
    return draws


def crop_boxes(u: Tensor, height: int, width: int, scale: tuple, ratio: tuple) -> Tensor:
    """Random resized crop: u (n,10,4) in [0,1) -> boxes (n,4) int64, (row, column, height, width).

    Each of ten tries takes four numbers: area, aspect (uniform in its logarithm), row and column.
    The first try that fits is the box; if none does, the largest central box within the range of
    aspects.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])  # (n, 10)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * u[..., 1]).exp()
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (w > 0) & (h <= height) & (w <= width)
    row = (u[..., 2] * (height - h + 1)).floor().minimum(height - h)  # minimum: u may round up to 1
    column = (u[..., 3] * (width - w + 1)).floor().minimum(width - w)
    tries = torch.stack([row, column, h, w], dim=-1).long()  # (n, 10, 4)
    first = tries[torch.arange(len(u), device=u.device), fits.int().argmax(1)]  # (n, 4)

    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    central = torch.tensor([(height - h) // 2, (width - w) // 2, h, w], device=u.device)
    return torch.where(fits.any(1, keepdim=True), first, central)


def resize_weights(start: Tensor, length: Tensor, total: int, size: int) -> Tensor:
    """Matrices (n, size, total) that resample [start, start + length) of `total` pixels to `size`.

    Bilinear with antialias: each row is a triangle around an output pixel's centre, one input pixel
    wide on either side, or one output pixel where the image shrinks; cut at the crop's edge, sum 1.
    """
    stretch = (length / size).view(-1, 1, 1)  # input pixels for one output pixel
    start, end = start.view(-1, 1, 1), (start + length).view(-1, 1, 1)
    source = torch.arange(total, device=start.device) + 0.5
    target = torch.arange(size, device=start.device)[:, None] + 0.5
    weights = (1 - (source - start - target * stretch).abs() / stretch.clamp(min=1)).clamp(min=0)
    weights = weights * ((source > start) & (source < end))
    return weights / weights.sum(2, keepdim=True)


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop each image (n,C,H,W) to its own box (n,4) and resize: (n,C,size,size), two products.

    Equals torchvision's resized_crop(..., antialias=True) on float images.
    """
    n, channels, height, width = images.shape
    row, column, h, w = boxes.to(images.dtype).unbind(1)
    across = resize_weights(column, w, width, size).transpose(1, 2)  # (n, W, size)
    down = resize_weights(row, h, height, size)  # (n, size, H)
    images = torch.bmm(images.reshape(n, channels * height, width), across)  # (n, C*H, size)
    return down[:, None] @ images.view(n, channels, height, size)


def per_sample(x: Tensor) -> Tensor:
    """(n,) -> (n,1,1,1): one number a sample, ready to meet (n,C,H,W)."""
    return x.view(-1, 1, 1, 1)


def grayscale(images: Tensor) -> Tensor:
    """(n,3,H,W) -> (n,1,H,W): luma."""
    r, g, b = images.unbind(1)
    return (GRAY[0] * r + GRAY[1] * g + GRAY[2] * b)[:, None]


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, clipped to [0,1]; factor (n,), 1 keeps the images."""
    return torch.lerp(other, images, per_sample(factor)).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black (factor 0); factor (n,)."""
    return (images * per_sample(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean gray; factor (n,)."""
    return blend(images, grayscale(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grayscale image; factor (n,)."""
    return blend(images, grayscale(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (n,), in turns of the colour circle; value and saturation stay."""
    r, g, b = images.unbind(1)  # each (n, H, W)
    value, smallest = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - smallest
    # The hue in sixths of a turn: 0 at red, 2 at green, 4 at blue. Gray has none, any will do.
    hue = torch.where(value == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    hue = torch.where(value == r, g - b, hue) / chroma.clamp(min=1e-12)
    turn = hue / 6 + shift.view(-1, 1, 1)
    # Back: a channel stands at `value` up to a sixth of a turn from its own hue, at `smallest` from
    # two sixths on. 2.5 makes the numbers positive, and half a turn puts distance 0 at frac = 0.5.
    own = torch.arange(3, dtype=images.dtype, device=images.device).view(1, 3, 1, 1) / 3
    distance = (turn[:, None] + (2.5 - own)).frac_().sub_(0.5).abs_()  # (n, 3, H, W), turns
    share = distance.mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(smallest[:, None], chroma[:, None], share)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Separable Gaussian of `kernel_size` (odd) taps with reflected edges; sigma (n,), pixels."""
    n, channels, height, width = images.shape
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (taps / sigma[:, None]) ** 2).softmax(1)  # (n, kernel_size), exp and sum 1
    kernel = kernel.repeat_interleave(channels, 0, output_size=n * channels)[:, None]
    x = F.pad(images, (reach,) * 4, mode="reflect").view(1, n * channels, height + 2 * reach, -1)
    x = F.conv2d(x, kernel[:, :, None, :], groups=n * channels)  # rows, then columns
    return F.conv2d(x, kernel[:, :, :, None], groups=n * channels).view_as(images)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the pixels at or above `threshold` (n,); above 1 nothing changes."""
    return torch.where(images >= per_sample(threshold), 1 - images, images)


def normalize_pixels(images: Tensor) -> Tensor:
    """float images in [0,1] -> zero mean, about unit deviation: what every network here is fed."""
    return (images - PIXEL_MEAN) / PIXEL_STD


JITTER = {  # the order of these four names is the meaning of draws["order"]
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def render_view(images: Tensor, draws: dict[str, Tensor], augmentation: Augmentation) -> Tensor:
    """images (n,3,H,W) uint8, draws on the CPU -> (n,3,size,size) float32, normalised.

    Without a key "crop" the images are taken as cropped already (by a worker that decodes large
    pictures with the same `crop_boxes`) and must be size x size.
    """
    size = augmentation.size
    on_device = {key: v.to(images.device, non_blocking=True) for key, v in draws.items()}
    if "shuffle" in draws:
        images = images.gather(1, on_device["shuffle"][:, :, None, None].expand_as(images))
    x = images.float() / 255
    if "crop" in draws:
        boxes = crop_boxes(draws["crop"], *images.shape[2:], augmentation.scale, augmentation.ratio)
        x = resized_crop(x, boxes.to(x.device, non_blocking=True), size)
    elif x.shape[2:] != (size, size):
        raise ValueError(f"images of {tuple(x.shape[2:])} without crops, but views of {size}")
    if "flip" in draws:
        x = torch.where(per_sample(on_device["flip"]), x.flip(3), x)
    if "order" in draws:
        names = list(JITTER)
        for name in (names[i] for i in draws["order"][0].tolist()):
            x = JITTER[name](x, on_device[name])
    if "gray" in draws:
        x = torch.where(per_sample(on_device["gray"]), grayscale(x), x)
    if "blur" in draws:
        rows = draws["blur"].nonzero().squeeze(1)  # found on the CPU: the device is not waited for
        rows = rows.to(x.device, non_blocking=True)
        taps = 2 * (size // 20) + 1  # a tenth of the image, odd
        if len(rows):
            x[rows] = gaussian_blur(x[rows], on_device["blur"][rows], taps)
    if "solarize" in draws:
        x = solarize(x, on_device["solarize"])
    return normalize_pixels(x)


# ---- k-means and hierarchy


class Hierarchy(NamedTuple):
    """Tree of prototypes over N images, level 0 the finest; assign[l+1] == parent[l][assign[l]]."""

    prototypes: list[Tensor]  # L x (K_l, D) float32, unit rows
    assign: list[Tensor]  # L x (N,) int64  image -> cluster at level l  (released: im2cluster)
    parent: list[Tensor]  # L-1 x (K_l,) int64  cluster at l -> cluster at l+1  (released: cluster2cluster)
    concentration: list[Tensor]  # L x (K_l,) float32  PCL's phi, a temperature each  (released: density)


class Rows:
    """(N, D) rows: a tensor, numpy array or memory map of any float type, read as `dtype` on `device`, in blocks.

    With sharded=True each process of a group holds a share, of any size. Rows are known by their number in the whole
    data set and draws are made for all of it: the clusters do not depend on who holds what, up to rounding.
    """

    def __init__(self, x, device=None, sharded=True, dtype=torch.float32):
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"rows must be of shape (N, D), not {tuple(x.shape)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only memory maps; nothing is written here
            self.x, self.dtype = torch.as_tensor(x), dtype
        self.device = torch.device(device or self.x.device)
        self.reduce, self.gather = (all_reduce_sum, all_gather_rows) if sharded else (lambda tensor: tensor,) * 2
        sizes = self.gather(torch.tensor([len(x)], device=self.device)).tolist()
        self.first, self.total = sum(sizes[: world()[0] if sharded else 0]), sum(sizes)

    def read(self, index):
        """Local rows; index: slice or int64 ids. A view if x is of that dtype on the device already."""
        return self.x[index if isinstance(index, slice) else index.to(self.x.device)].to(self.device).to(self.dtype)

    def blocks(self):
        """Yield (slice, local rows), 128 MiB at a time."""
        step = max(1, 2**25 // max(64, self.x.shape[1]))
        for start in range(0, len(self.x), step):
            part = slice(start, start + step)
            yield part, self.read(part)

    def mean(self, task):
        """(D,) over all ranks. ValueError, with the name of the task, if a row's length is not finite."""
        mean, bad = torch.zeros(self.x.shape[1], device=self.device), torch.zeros(1, device=self.device)
        for _, block in self.blocks():
            mean += block.sum(0) / self.total
            bad += (~block.norm(dim=1).isfinite()).sum()
        if self.reduce(bad) > 0:
            raise ValueError(f"{task}: {int(bad)} of {self.total} rows hold NaN, infinity or too large numbers")
        return self.reduce(mean)

    def owned(self, ids):
        """Which of the global ids (M,) are rows of this rank."""
        return (ids >= self.first) & (ids < self.first + len(self.x))

    def take(self, ids):
        """Global ids (M,) -> their rows (M, D) on every rank: each fills in its own, the sum spreads them."""
        own = self.owned(ids)
        rows = torch.zeros(len(ids), self.x.shape[1], device=self.device, dtype=self.dtype)
        rows[own] = self.read(ids[own] - self.first)
        return self.reduce(rows)

    def of_all_ranks(self):
        """Yield (global ids, their rows) through the rows of all ranks, the same blocks on every rank."""
        for ids in torch.arange(self.total, device=self.device).split(max(1, min(2**13, 2**25 // self.x.shape[1]))):
            yield ids, self.take(ids)

    def draw(self, weight, count, generator):
        """Global ids of `count` rows, none twice, chance proportional to weight (n,); fewer if most are 0."""
        key = torch.empty(self.total).exponential_(generator=generator)  # Efraimidis & Spirakis, 2006
        key = weight / key[self.first : self.first + len(weight)].to(self.device).clamp_(min=1e-30)
        key, row = key.topk(min(count, len(key)))
        key, row = self.gather(key), self.gather(row + self.first)
        key, order = key.topk(min(count, len(key)))
        return row[order[key > 0]]


def near_centroids(rows, centroids, top=1, half=False):
    """(n, D) rows, (K, D) -> (n, top) ids: the nearest centroid; then, from the blocks of ids (below) with the next
    highest scores, the best of each.

    The nearest has the highest score (x-m).(c-m) - |c-m|^2/2, m the mean centroid: one addmm a chunk of rows.
    half=True: float16 scores, unless a few lengths exceed the others by far. They need the centring: without it 5 %
    of the rows get a wrong label when all features are nearly equal.
    """
    k, d = centroids.shape
    # argmax over K scores costs half as much as the product itself (CPU). So: maximum over strips of columns, argmax
    # over the blocks left, argmax inside. Block j: ids j*strips ... (j+1)*strips-1, column j of every strip, so ties
    # go to the lowest. Strips of 32, 64, ... columns: other widths are several times slower.
    width = -(-k // 8) * 8 if k < 256 else 32 * math.ceil(k**0.5 / 32)
    strips = -(-k // width)
    mean = centroids.mean(0)
    c = F.pad(centroids - mean, (0, 0, 0, strips * width - k))  # (S*W, D)
    if half:
        length = torch.cat([(y - mean).norm(dim=1) for y in rows.split(2**16)] + [c.norm(dim=1)])
        half = bool(length.max() < 1000 * length.median())  # else most rows drown in float16's coarse small numbers
    scale = 100 / length.max() if half else 1.0  # scores up to 1.5e4 do not overflow
    c = c * scale
    bias = -0.5 * c.square().sum(1)
    bias[k:] = -math.inf
    if half:
        c, bias = c.half(), bias.half()
    else:
        bias -= c @ mean  # the same scores from rows as they are
    c = c.view(width, strips, d).transpose(0, 1).reshape(-1, d).T  # (D, S*W)
    bias = bias.view(width, strips).T.reshape(-1)
    top, found = min(top, -(-k // strips)), []
    step = max((2**27 if rows.is_cuda else 2**19) // len(bias), min(1024, 2**27 // len(bias)), 1)
    scores = c.new_empty(min(step, len(rows)), len(bias))  # the memory of every chunk
    for y in rows.split(step):
        y = ((y - mean) * scale).half() if half else y
        score = torch.addmm(bias, y, c, out=scores[:len(y)]).view(-1, strips, width)  # (n, S, W)
        best = score.amax(1) if strips > 1 else score[:, 0]  # (n, W)
        block = [best.max(1, keepdim=True).indices]  # the lowest of equal ones, which topk does not promise
        while len(block) < top:
            block.append(best.scatter_(1, block[-1], -math.inf).max(1, keepdim=True).indices)
        block = torch.cat(block, 1)  # (n, top)
        if strips > 1:
            inside = score.gather(2, block[:, None].expand(-1, strips, -1))  # (n, S, top)
            block = block * strips + inside.argmax(1)
        found.append(block)
    return torch.cat(found)


def nearest_listed(rows, centroids, listed):
    """(n, D) rows, (n, T) ids -> (n,) the nearest of each row's list, by true differences; (n,) its distance^2."""
    label, least = [], []
    step = max(1, (2**25 if rows.is_cuda else 2**18) // rows.shape[1])
    for y, ids in zip(rows.split(step), listed.sort(1).values.split(step)):  # sorted: ties to the lowest id
        d2 = torch.stack([(y - centroids.index_select(0, column)).square_().sum(1) for column in ids.T], 1)  # (n, T)
        value, place = d2.min(1, keepdim=True)
        label.append(ids.gather(1, place)[:, 0])
        least.append(value[:, 0])
    return torch.cat(label), torch.cat(least)


def cluster_sums(rows, label, k):
    """(n, D) rows, (n,) ids -> (k, D) sums, (k,) counts; the same on every run, unlike index_add_ on CUDA."""
    label, order = label.sort(stable=True)
    start = torch.searchsorted(label, torch.arange(k + 1, device=label.device))
    # bags of at most 256 rows, then bags of these: parallel for few large clusters, and less rounding
    cut = torch.cat([start[:-1], torch.arange(0, len(label), 256, device=label.device)]).sort().values
    part = F.embedding_bag(order, rows, cut, mode="sum")
    bags = torch.arange(len(cut), device=label.device)
    return F.embedding_bag(bags, part, torch.searchsorted(cut, start[:-1]), mode="sum"), start.diff()


def own_distance(rows, centroids, label):
    """(n,) squared distance of each local row to its centroid; 0 below a millionth of the row's length, as rounding
    alone can cause that.
    """
    d2 = torch.empty(len(label), device=rows.device)
    for part, block in rows.blocks():
        own = nearest_listed(block, centroids, label[part, None])[1]
        d2[part] = own.where(own > 1e-12 * block.square().sum(1), 0)
    return d2


def greedy_seeds(rows, weight, k, generator):
    """Batched greedy k-means++ of centred rows with weights (n,) -> (k, D).

    Each of eight rounds draws three times as many rows as it needs, with chance proportional to weight times squared
    distance to the nearest seed, sends every row to the nearest drawn one, and keeps the drawn rows that lower the
    distances most. When no row has both weight and distance left, the other seeds are zero, the mean.
    """
    y, each = rows.x, -(-k // 8)
    d2, seeds = y.square().sum(1), y[:0]  # they start from the mean
    while len(seeds) < k:
        drawn = rows.take(rows.draw(weight * d2, 3 * each, generator))
        if len(drawn) == 0:
            return F.pad(seeds, (0, 0, 0, k - len(seeds)))
        near = near_centroids(y, drawn, half=y.is_cuda)
        gain = weight * (d2 - nearest_listed(y, drawn, near)[1]).clamp(min=0)
        gain = rows.reduce(cluster_sums(gain[:, None], near[:, 0], len(drawn))[0])[:, 0]
        kept = drawn[gain.topk(min(each, len(drawn), k - len(seeds))).indices]
        d2 = torch.minimum(d2, nearest_listed(y, kept, near_centroids(y, kept, half=y.is_cuda))[1])
        seeds = torch.cat([seeds, kept])
    return seeds


def refill(rows, centroids, label, empty, generator):
    """Put empty (k,) clusters on rows drawn with chance proportional to their squared distance, in place -> False if
    every row sits on its centroid.
    """
    ids = rows.draw(own_distance(rows, centroids, label), int(empty.sum()), generator)
    filled, own = empty.nonzero()[: len(ids), 0], rows.owned(ids)
    centroids[filled] = rows.take(ids)
    label[ids[own] - rows.first] = filled[own]
    return len(ids) > 0


def assign_all(rows, centroids, label, lists, top=1, *, scan=True, half=False, recheck=False):
    """Set label (n,) in place to the nearest centroid -> sums (K, D), counts (K,), how many moved (1,), of all ranks.

    scan=True searches all centroids and stores `top` candidates a row in the dictionary `lists`; scan=False chooses
    among those of the last scan. half or recheck: true differences decide between the candidates and the label so far,
    as scores cannot tell very close centroids apart. The label so far is always listed: the objective never rises.
    """
    k, recheck = len(centroids), half or recheck
    sums, counts = torch.zeros_like(centroids), torch.zeros(k, dtype=torch.long, device=rows.device)
    moved = counts.new_zeros(1)
    for part, block in rows.blocks():
        old = label[part].clone()
        if scan:
            near = near_centroids(block, centroids, top, half)
            lists[part.start] = torch.cat([near, old[:, None]], 1) if recheck else near
        if scan and not recheck:
            label[part] = near[:, 0]
        else:
            label[part] = nearest_listed(block, centroids, lists[part.start])[0]
        block_sums, block_counts = cluster_sums(block, label[part], k)
        sums += block_sums
        counts += block_counts
        moved += (label[part] != old).sum()
    return rows.reduce(sums), rows.reduce(counts), rows.reduce(moved)


@torch.no_grad()
def kmeans(x, k, *, iterations=20, seed=0, init=None, start_weight=None, exact=False, device=None, sharded=True):
    """Lloyd's k-means on squared Euclidean distance -> centroids (k, D) float32, assign (N,) int64.

    x (N, D) as for Rows, clustered on `device` (default: where x lies); under a process group this rank's share,
    unless sharded=False. init (k, D) is the start, else greedy seeding, in which row i counts start_weight[i] > 0.
    From k = 1000 on, unless exact=True, only every sixth pass searches all centroids, the others a row's four
    candidates; with init there are a fifth more passes; and it ends when less than a thousandth of the rows moves.
    `assign` is the nearest returned centroid. No cluster is empty, unless x has fewer distinct rows than k (a warning
    says so); rows closer than a millionth of their length count as equal. ValueError: k < 1, k > N, no rows, rows
    with NaN, infinity or too large numbers, init or start_weight of another shape.
    """
    rows, generator = Rows(x, device, sharded), torch.Generator().manual_seed(seed)
    if not 1 <= k <= rows.total:
        raise ValueError(f"k-means: cannot make {k} clusters of {rows.total} rows")
    mean = rows.mean("k-means")
    if init is None:  # twelve rows a seed are enough to choose it by
        size = min(rows.total, max(2 * k, min(12 * k, 2**27 // len(mean))))
        ids = torch.randperm(rows.total, generator=generator)[:size].sort().values.to(rows.device)
        own = ids[rows.owned(ids)] - rows.first
        weight = torch.ones(len(x)) if start_weight is None else torch.as_tensor(start_weight).float()
        if weight.shape != (len(x),):
            raise ValueError(f"k-means: start_weight must be of shape {(len(x),)}, not {tuple(weight.shape)}")
        sample = Rows(rows.read(own) - mean, sharded=sharded)
        centroids = greedy_seeds(sample, weight.to(rows.device)[own], k, generator) + mean
        del sample
    else:
        centroids = torch.as_tensor(init).to(rows.device, torch.float32, copy=True)
        if centroids.shape != (k, len(mean)) or not centroids.isfinite().all():
            raise ValueError(f"k-means: init must be {(k, len(mean))} finite numbers, but is {tuple(centroids.shape)}"
                             f"{'' if centroids.isfinite().all() else ' and holds NaN or infinity'}")

    quick, half, lists, scan = k >= 1000 and not exact, rows.device.type == "cuda", {}, True
    more = quick and init is not None  # it is farther from the end than greedy seeds
    label = torch.zeros(len(x), dtype=torch.long, device=rows.device)
    for step in range(iterations * 6 // 5 if more else iterations):
        scan = scan or not quick or step % 6 == 0 or more and step == 1
        top = 4 if quick or half else 1  # float16 may rank the nearest second
        sums, counts, moved = assign_all(rows, centroids, label, lists, top, scan=scan, half=half)
        empty = counts == 0
        refilled = empty.any() and refill(rows, centroids, label, empty, generator)
        centroids = torch.where(empty[:, None], centroids, sums / counts.clamp(min=1)[:, None])
        if step > 0 and scan and not refilled and moved <= quick * rows.total // 1000:
            break
        scan = refilled or moved == 0  # the lists are out of date, or have nothing more to give
    empty = assign_all(rows, centroids, label, lists)[1] == 0
    while empty.any():
        if not refill(rows, centroids, label, empty, generator):
            warnings.warn(f"k-means: only {k - int(empty.sum())} distinct rows (to six digits) for {k} clusters")
            break
        empty = assign_all(rows, centroids, label, lists, top=4, recheck=True)[1] == 0
    return centroids, label


def concentration(distance, counts, temperature):
    """PCL's phi: (K,) summed distance and (K,) size -> (K,) per-prototype temperatures, mean = temperature.

    phi = mean distance / log(size + 10); sizes 0 and 1 get the largest; clipped to the 10th-90th percentile, and
    from below at a hundredth of the mean (an own guard: a cluster of equal items has distance 0, and q.c/phi
    must stay finite).
    """
    phi = distance / counts.clamp(min=1) / (counts + 10.0).log()
    phi = torch.where(counts > 1, phi, phi.where(counts > 1, 0).max())
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    phi = torch.maximum(phi, 0.01 * phi.mean())
    return temperature * (phi / phi.mean() if phi.any() else torch.ones_like(phi))


@torch.no_grad()
def hierarchy_from_centroids(x, raw_centroids, temperature, *, labels=None, device=None):
    """x (N, D), L x (K_l, D) centroids as k-means left them -> Hierarchy.

    The items of level 0 are the rows of x, those of level l+1 the normalised centroids of level l. Each goes to the
    nearest raw centroid, unless `labels` (a tensor a level) says where. Under a process group x is this rank's share;
    all else is the same on every rank. A centroid at the origin stays 0.
    """
    prototypes, assign, phi, items = [], [], [], x
    for level, raw in enumerate(raw_centroids):
        rows = Rows(items, device, sharded=level == 0)
        raw = torch.as_tensor(raw).to(rows.device, torch.float32)
        label = labels[level] if labels else torch.zeros(len(items), dtype=torch.long, device=rows.device)
        if not labels:
            assign_all(rows, raw, label, {}, top=4, recheck=True)
        distance, counts = cluster_sums(own_distance(rows, raw, label).sqrt()[:, None], label, len(raw))
        phi.append(concentration(rows.reduce(distance)[:, 0], rows.reduce(counts), temperature))
        assign.append(label)
        items = F.normalize(raw, dim=1)
        prototypes.append(items)
    parent = assign[1:]
    for level, up in enumerate(parent):
        assign[level + 1] = up[assign[level]]
    return Hierarchy(prototypes, assign, parent, phi)


@torch.no_grad()
def hierarchical_kmeans(x, clusters, *, temperature, iterations=20, seed=0, device=None):
    """Unit features x (N, D), clusters (K_0, K_1, ...) fine to coarse -> Hierarchy: k-means of x, then of its
    normalised centroids, and so on. Under a process group x is this rank's share; upper levels run on every rank.
    """
    raw, labels, items, of_image, weight = [], [], x, None, None
    for level, k in enumerate(clusters):
        centroids, label = kmeans(items, k, iterations=iterations, seed=seed, start_weight=weight, device=device,
                                  sharded=level == 0)
        raw.append(centroids)
        labels.append(label)
        of_image = label if level == 0 else label[of_image]
        # An upper level clusters centroids, some of them of few images. Unweighted seeding spends seeds on those
        # (images lie up to 14 % farther from their group's mean); weights equal to the images fit the centroids worse
        # than a random start. The square root does better than a random start at both.
        items, weight = F.normalize(centroids, dim=1), all_reduce_sum(of_image.bincount(minlength=k)).sqrt()
    return hierarchy_from_centroids(x, raw, temperature, labels=labels, device=device)


# ---- hierarchy losses


def semantic_path_loss(z, hierarchy, index, negative_leaves, eps=1e-6):
    """HIRL's semantic path discrimination: an image belongs on its own path of the tree, on no other.

    S(path) = prod_l (1 + z^l . c^l(path)) / 2, a score in [0, 1]                             # HIRL, path score
    loss = mean_n 1/2 [ -log(S(own path) + eps) + sum_m w_nm (-log(1 - S(path m) + eps)) / (sum_m w_nm + eps) ]

    z                (B, L, D) unit level embeddings, level 0 the finest; the gradient goes here alone
    hierarchy        Hierarchy of L levels
    index            (B,) int64, the images' places in the data set
    negative_leaves  (B, M) int64, clusters of level 0 drawn uniformly; their ancestors follow by the tree
    Returns a scalar. w_nm = 0 where the drawn path is the image's own, else 1: a path that shares ancestors
    but not the leaf counts in full. Source: HIRL (2205.13159), with eps as in the released code.

    The release gathers (B, M, L, D) prototypes. Here a level's scores against all its prototypes are one
    matrix product, and a path picks scalars from it: same value and gradient, a fraction of the memory.
    """
    own_leaf = hierarchy.assign[0][index, None]  # (B, 1)
    node = torch.cat([own_leaf, negative_leaves], dim=1)  # (B, 1+M), the own path in column 0
    score = 1.0
    for level, prototypes in enumerate(hierarchy.prototypes):
        if level > 0:
            node = hierarchy.parent[level - 1][node]  # same path, one level up
        prototypes = prototypes.detach().to(z.dtype)
        sim = z[:, level] @ prototypes.T  # (B, K_l)
        cos = sim.gather(1, node) / prototypes.norm(dim=1)[node]  # float32 rows are unit up to 1e-7 only
        score = score * (1 + cos) / 2  # (B, 1+M), HIRL path score
    true_negative = (negative_leaves != own_leaf).to(z.dtype)  # (B, M); in a tree the leaf names the path
    positive = -torch.log(score[:, 0] + eps)  # (B,)
    negative = -torch.log(1 - score[:, 1:] + eps) * true_negative  # (B, M)
    negative = negative.sum(dim=1) / (true_negative.sum(dim=1) + eps)  # (B,)
    return (positive + negative).mean() / 2  # HIRL loss


@torch.no_grad()
def hcsc_instance_selection(queue, hierarchy, index):
    """HCSC: how likely each queue entry is a true negative of each image, one matrix a level.

    keep(n, j) = 1 - softmax_i(u_j . c_i^l / phi_i^l)[y_l(n)]: an entry that belongs to the image's own cluster
    is likely to mean the same thing, and is likely to be left out.

    queue (Q, D) unit rows u_j; hierarchy: Hierarchy of L levels; index (B,) int64, the images' places in the
    data set, y_l(n) = assign[l][index[n]]. Returns L x (B, Q), the parameters of Bernoulli draws. phi is floored
    at 1e-3, as in the release. Source: HCSC (2202.00455), selection of instances.
    """
    keep = []
    for prototypes, assign, phi in zip(hierarchy.prototypes, hierarchy.assign, hierarchy.concentration):
        scaled = (prototypes / phi.clamp(min=1e-3)[:, None]).to(queue.dtype)  # (K_l, D)
        own = assign[index]  # (B,)
        member = [torch.softmax(entries @ scaled.T, dim=1)[:, own].T for entries in queue.split(1024)]
        keep.append(1 - torch.cat(member, dim=1))  # (B, Q)
    return keep


@torch.no_grad()
def hcsc_prototype_selection(hierarchy, index):
    """HCSC: how likely each prototype is a true negative of each image, one matrix a level.

    keep(n, j) = 1 - softmax_i(c_j^l . c_i^{l+1} / phi_i^{l+1})[pa(y_l(n))]: a prototype under the same parent as
    the image's own is likely to be left out; at the top level all stay. The own prototype's column is 0.

    Arguments as above. Returns L x (B, K_l). Source: HCSC (2202.00455), selection of prototypes.
    """
    keep = []
    for level, (prototypes, assign) in enumerate(zip(hierarchy.prototypes, hierarchy.assign)):
        own = assign[index]  # (B,)
        if level + 1 < len(hierarchy.prototypes):
            above, phi = hierarchy.prototypes[level + 1], hierarchy.concentration[level + 1]
            member = torch.softmax(prototypes @ (above / phi[:, None]).T, dim=1)  # (K_l, K_l+1)
            chance = 1 - member.T[hierarchy.parent[level][own]]  # (B, K_l)
        else:
            chance = torch.ones(len(own), len(prototypes), dtype=prototypes.dtype, device=own.device)
        keep.append(chance.scatter(1, own[:, None], 0))
    return keep


def hcsc_instance_loss(q, k, queue, masks, temperature, *, unselected="remove"):
    """HCSC's instance-wise contrast: InfoNCE at each level, against the negatives selected there.

    loss^l = mean_n [ log(exp(q.k/T) + sum_{j: mask^l_nj = 1} exp(q.u_j/T)) - q.k/T ]

    q, k (B, D) and queue (Q, D) unit rows; masks L x (B, Q), 1 = stays a negative; the gradient goes to q alone.
    Returns (L,). Source: HCSC (2202.00455), instance-wise loss.
    DEVIATION (released code): unselected="zero" multiplies the logit by the mask instead, so that an entry that
    was left out still adds exp(0) = 1 to the sum.
    """
    if unselected not in ("remove", "zero"):
        raise ValueError(f"unselected is 'remove' or 'zero', not {unselected!r}")
    pos = (q * k.detach()).sum(dim=1, keepdim=True) / temperature  # (B, 1)
    neg = q @ queue.detach().T / temperature  # (B, Q)
    losses = []
    for mask in masks:
        kept = neg.masked_fill(mask == 0, -math.inf if unselected == "remove" else 0.0)
        losses.append((torch.cat([pos, kept], dim=1).logsumexp(dim=1) - pos[:, 0]).mean())
    return torch.stack(losses)


def hcsc_prototype_loss(q, hierarchy, index, masks, *, unselected="remove", exclude="own"):
    """HCSC's prototypical contrast: the own prototype against the selected ones of its level.

    loss^l = mean_n [ log(sum_{j = y_l(n) or mask^l_nj = 1} exp(q.c_j/phi_j)) - q.c_{y_l(n)}/phi_{y_l(n)} ]

    q (B, D) unit rows, the gradient goes here alone; hierarchy, index as above; masks L x (B, K_l), 1 = stays
    a negative. Returns (L,). Source: HCSC (2202.00455), prototypical loss.
    DEVIATION (released code): unselected="zero" as above; exclude="batch" takes the positives of *all* images of
    the batch, and the largest cluster number in use, off everybody's negatives: when a batch meets every
    cluster of a level none is left, and loss and gradient are exactly 0.
    """
    if unselected not in ("remove", "zero") or exclude not in ("own", "batch"):
        raise ValueError(f"unselected is 'remove' or 'zero', not {unselected!r}; "
                         f"exclude is 'own' or 'batch', not {exclude!r}")
    losses = []
    for prototypes, assign, phi, mask in zip(hierarchy.prototypes, hierarchy.assign, hierarchy.concentration, masks):
        own = assign[index][:, None]  # (B, 1)
        logits = q @ (prototypes / phi[:, None]).detach().to(q.dtype).T  # (B, K_l)
        kept = logits.masked_fill(mask == 0, -math.inf if unselected == "remove" else 0.0)
        if exclude == "batch":
            absent = torch.zeros(len(prototypes), dtype=torch.bool, device=q.device)
            absent[own] = True
            absent[assign.max():] = True  # off by one: the last cluster is never a negative
            kept = kept.masked_fill(absent, -math.inf)
        pos = logits.gather(1, own)  # (B, 1)
        losses.append((kept.scatter(1, own, pos).logsumexp(dim=1) - pos[:, 0]).mean())
    return torch.stack(losses)


# ---- kNN: is it learning?


def top_neighbours(train_x, test_x, k, chunk=1024):
    """Cosine similarity and global row number, each (B, k), of the k nearest training rows.

    Under several ranks `train_x` holds this rank's rows and `test_x` is the same everywhere.
    """
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    offset = local_rows(int(all_reduce_sum(torch.tensor(len(train_x))))).start
    found = [(part @ train_x.T).topk(min(k, len(train_x)), dim=1) for part in test_x.split(chunk)]
    sim = torch.cat([f.values for f in found])  # (B, k) of this rank
    row = torch.cat([f.indices for f in found]) + offset
    sim, row = all_gather_rows(sim.T.contiguous()).T, all_gather_rows(row.T.contiguous()).T  # (B, G k)
    best = sim.topk(k, dim=1)
    return best.values, row.gather(1, best.indices)


def keep_nearest(sim, near, score, ids):
    """Merge score (n, C), whose columns are the rows `ids` (C,), into the T best: sim, near (n, T), in place."""
    top, size = sim.shape[1], len(ids)
    # topk of a wide row costs a CPU more than its products. So: the maxima of short strips of columns, then all
    # entries of the T best strips, and only for rows where a maximum beats what they have.
    strips = next(s for s in (64, 32, 16, 8, 4, 2, 1) if s == 1 or s * s * top <= 4 * size)
    if size % strips:
        score, ids = F.pad(score, (0, -size % strips), value=-math.inf), F.pad(ids, (0, -size % strips))
    score, ids = score.unflatten(1, (strips, -1)), ids.view(strips, -1)  # (n, S, W) and (S, W): a strip is a column
    best = torch.amax(score, 1, out=torch.empty_like(score[:, 0]))  # (n, W), in the memory order of score
    hit = (best.amax(1) > sim[:, -1]).nonzero()[:, 0]
    strip = best[hit].topk(min(top, best.shape[1])).indices[:, None]  # (h, 1, T)
    each = torch.arange(strips, device=ids.device)[:, None]
    found = torch.cat([sim[hit], score[hit[:, None, None], each, strip].flatten(1)], dim=1)  # (h, T + S T)
    place = torch.cat([near[hit], ids[each, strip].flatten(1)], dim=1)
    sim[hit], order = found.topk(top)
    near[hit] = place.gather(1, order)


def by_true_products(rows, which, near):
    """Lists of ids (m, T) for the local rows `which` (m,), in falling order of float64 products; equal ones by id."""
    near = near.sort(dim=1).values
    exact = torch.zeros(near.shape, dtype=torch.float64, device=near.device)
    for ids, block in rows.of_all_ranks():
        for part in ((near >= ids[0]) & (near <= ids[-1])).nonzero().split(2**22 // block.shape[1] + 1):
            row, column = part.unbind(1)
            exact[row, column] = (rows.read(which[row]).double() * block[near[row, column] - ids[0]].double()).sum(1)
    return near.gather(1, exact.sort(dim=1, descending=True, stable=True).indices)


@torch.no_grad()
def nearest_neighbours(x, k):
    """Ids (n, k) int64 of the k other rows with the largest inner product, nearest first: exact, on any device.

    x (n, D) float16, 32 or 64, read as float32 or 64; unit rows make the product a cosine. A row is no neighbour
    of its own, by its id: its exact double is one. Under a process group x holds this rank's rows, any number of
    them, ids are global, and the other ranks' rows pass by in blocks. Never an (n, N) matrix. Where products are
    too close to call, float64 decides among four candidates more than k; of these, equal rows come by id.
    ValueError: k not in 1..N-1, NaN or infinity.
    """
    rows = Rows(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not 1 <= k < rows.total:
        raise ValueError(f"nearest neighbours: k = {k} of {rows.total} rows, but k must be in 1..N-1")
    rows.mean("nearest neighbours")  # only for its check
    top, side = min(k + 4, rows.total - 1), 8192 if x.is_cuda else 1024  # of a square of scores: 4 MiB on the CPU
    sim = torch.full((len(x), top), -math.inf, dtype=rows.dtype, device=rows.device)
    near = torch.zeros(sim.shape, dtype=torch.long, device=rows.device)
    own = torch.arange(len(x), device=rows.device) + rows.first  # (n,)
    parts = [slice(start, start + side) for start in range(0, len(x), side)]
    for i, a in enumerate(parts):  # this rank's rows among themselves: a product serves both of its rows
        for b in parts[i:]:
            score = rows.read(a) @ rows.read(b).T
            if a == b:
                score.fill_diagonal_(-math.inf)
            else:
                keep_nearest(sim[b], near[b], score.T, own[a])
            keep_nearest(sim[a], near[a], score, own[b])
    for ids, block in rows.of_all_ranks() if world()[1] > 1 else ():
        others = ~rows.owned(ids)
        ids, block = ids[others], block[others]
        for a in parts if len(ids) else ():
            keep_nearest(sim[a], near[a], rows.read(a) @ block.T, ids)
    length = torch.cat([sim.new_zeros(0), *(block.norm(dim=1) for _, block in rows.blocks())])
    close = sim[:, :-1] - sim[:, 1:] <= 1e-5 * rows.gather(length).max() * length[:, None]  # float32 errs by less
    close = close.any(1).nonzero()[:, 0]
    near[close] = by_true_products(rows, close, near[close])
    return near[:, :k]


def same_label(labels, neighbours):
    """Percent of the neighbours (N, k) that carry their row's label, a label level; labels (N, depth), -1: unknown."""
    own, others = labels[:, None], labels[neighbours.to(labels.device)]  # (N, 1, depth), (N, k, depth)
    known = (own >= 0) & (others >= 0)
    share = ((own == others) & known).sum((0, 1)) / known.sum((0, 1)).clamp(min=1)
    return [round(100 * value, 2) for value in share.tolist()]


def knn_votes(sim, labels, classes, temperature=0.07):
    """Votes (B, classes): each of the k neighbours gives exp(sim / temperature) to its label (B, k)."""
    votes = sim.new_zeros(len(sim), classes)
    return votes.scatter_add_(1, labels, (sim / temperature).exp())


def knn_classify(train_x, train_y, test_x, classes, *, k=20, temperature=0.07):
    """Weighted k-nearest-neighbour classifier: votes (B, classes); their arg max is the prediction.

    train_x (N, F) and test_x (B, F) features of any length (normalised here), train_y (N,) int64.
    The k most similar training rows vote exp(cosine / temperature) (Wu et al. 2018, 1805.01978).
    Raises ValueError when k is not in 1..N.
    """
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k = {k} neighbours of {len(train_x)} training rows: k must be in 1..N")
    sim, row = top_neighbours(train_x, test_x, k)
    return knn_votes(sim, train_y[row], classes, temperature)


@torch.no_grad()
def knn_accuracy(train, test, features, *, k=20, temperature=0.07):
    """Accuracy in percent per label level, coarse to fine; `features(images)` -> this rank's rows.

    Without a test split every tenth training picture is the test. None when there are no labels.
    """
    if train.labels is None:
        return None
    x, y = features(train), train.labels
    if test is not None:
        test_x, test_y = all_gather_rows(features(test)), test.labels
    else:
        x = all_gather_rows(x)
        test_x, test_y, x, y = x[::10], y[::10], *(t[torch.arange(len(x)) % 10 > 0] for t in (x.cpu(), y))
        x = x.to(test_x.device)[local_rows(len(x))]
    if y.min() < 0:  # STL-10: most pictures carry no label
        known = (y[:, 0] >= 0).nonzero()[:, 0]
        x, y = all_gather_rows(x)[known.to(x.device)], y[known]
        x = x[local_rows(len(x))]
    sim, row = top_neighbours(x, test_x, min(k, len(y)))
    y, test_y = y.to(row.device), test_y.to(row.device)
    return [round(100 * (knn_votes(sim, y[:, level][row], len(names), temperature).argmax(1)
                         == test_y[:, level]).double().mean().item(), 2)
            for level, names in enumerate(train.class_names)]


def knn_of_pixels(train, test, size, device):
    """kNN accuracy of the pictures themselves; None where that would take minutes on this device."""
    if train.pixels is None or (torch.device(device).type == "cpu" and len(train) * size**2 > 2e7):
        return None
    return knn_accuracy(train, test, lambda images: extract_features(nn.Flatten(), images, size, device=device))


# ---- backbone: torchvision's, by name


class TinyResNet(torchvision.models.ResNet):
    """A quarter-width ResNet of one block a stage, with torchvision's key names, for two CPU cores."""

    def __init__(self, widths=(16, 32, 64, 128)):
        block = torchvision.models.resnet.BasicBlock
        super().__init__(block, [1, 1, 1, 1])
        self.inplanes = widths[0]
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
        for stage, width in enumerate(widths):
            setattr(self, f"layer{stage + 1}", self._make_layer(block, width, 1, stride=1 if stage == 0 else 2))
        self.fc = nn.Linear(widths[-1], 1)


STEMS = {"3x3": 1, "3x3s2": 2, "7x7": None}  # stride of a 3x3 first convolution without max-pool; torchvision's own


def backbone(arch, stem):
    """(network (B, 3, H, W) -> (B, F), F): a torchvision model by name with its `fc` taken off.

    stem "7x7" is torchvision's own, for large pictures; "3x3" is a stride-1 convolution without max-pool, the
    usual change for pictures of 32 px; "3x3s2" the same at stride 2, a quarter of the work. Key names stay.
    """
    try:
        network = TinyResNet() if arch == "tiny" else torchvision.models.get_model(arch, weights=None)
        channels, width = network.conv1.out_channels, network.fc.in_features
    except (ValueError, AttributeError) as error:
        raise UserError(f"--arch {arch} is no torchvision model from `conv1` to `fc`: try resnet18, resnet50 or "
                        "tiny") from error
    if STEMS[stem]:
        network.conv1 = nn.Conv2d(3, channels, 3, stride=STEMS[stem], padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network, width


# ---- the tree one can look at


def write_tree(folder, images, features, hierarchy, rows=27, columns=10):
    """tree.png and clusters.csv of this rank's features (n, D) and the Hierarchy; rank 0 writes.

    Each row of the picture is a path of the learnt tree, coarse on the left: a cell a cluster with its size,
    its label purity (where labels exist) and the picture nearest to its prototype, then the pictures nearest
    to the leaf. With more leaves than rows, each coarse cluster shows its largest leaves; with many coarse
    clusters too, the picture shows the largest, the purest (where labels exist) and random paths.
    """
    own = [(features * p[a[local_rows(len(images))]]).sum(1) for p, a in zip(hierarchy.prototypes, hierarchy.assign)]
    own = [all_gather_rows(similarity).cpu() for similarity in own]  # L x (N,), to the own prototype
    if world()[0] > 0:
        return
    assign = [a.cpu() for a in hierarchy.assign]
    parent = [p.cpu() for p in hierarchy.parent]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [["image", *(f"level{level}" for level in range(len(assign)))],
         *([name, *row] for name, row in zip(images.names, torch.stack(assign, 1).tolist()))])
    write_atomically(folder / "clusters.csv", lambda f: f.write(table.getvalue().encode(errors="surrogateescape")))

    sections = leaf_paths(assign, parent, rows, images.labels)
    size, gap, cell, top = 40, 4, 150, len(assign) - 1
    height = sum(28 + len(paths) * (size + gap) for _, paths in sections)
    canvas = Image.new("RGB", (len(assign) * cell + columns * (size + gap) + 2 * gap + 8, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)

    def picture(i):
        return TF.to_pil_image(images.picture(i)).resize((size, size), Image.Resampling.BICUBIC)

    def fitted(line, width=cell - size - 3 * gap):  # its last part if it is too wide, then cut
        line = line if draw.textlength(line, font) <= width else line.split("/")[-1]
        return next(part for part in (line, *(line[:n] + "…" for n in range(len(line), -1, -1)))
                    if draw.textlength(part, font) <= width)

    y = 0
    for title, paths in sections:
        draw.text((len(assign) * cell + 2 * gap, y + 8), f"{title}nearest to the leaf's prototype", "black", font)
        y += 28
        for column, level in enumerate(range(top, -1, -1)):
            left = gap + column * cell
            draw.text((left, y - 20), f"level {level}: {len(hierarchy.prototypes[level])} clusters", "black", font)
            for r, path in enumerate(paths):
                if r and paths[r - 1][level:] == path[level:]:
                    continue
                last = max(s for s in range(r, len(paths)) if paths[s][level:] == path[level:])
                y0, y1 = y + r * (size + gap), y + (last + 1) * (size + gap) - gap
                draw.rectangle((left, y0, left + cell - gap, y1), fill=PALETTE[path[top] % len(PALETTE)])
                members = (assign[level] == path[level]).nonzero()[:, 0]
                canvas.paste(picture(int(members[own[level][members].argmax()])), (left, y0))
                for i, line in enumerate([f"n = {len(members)}", *describe(images, members)][:3]):
                    draw.text((left + size + gap, y0 + 13 * i), fitted(line), "black", font)
        for r, path in enumerate(paths):
            members = (assign[0] == path[0]).nonzero()[:, 0]
            for c, i in enumerate(members[own[0][members].argsort(descending=True)[:columns]].tolist()):
                canvas.paste(picture(i), (len(assign) * cell + 2 * gap + c * (size + gap), y + r * (size + gap)))
        y += len(paths) * (size + gap)
    canvas.save(folder / "tree.png", optimize=True)


PALETTE = ("#dbe9f6", "#fde5cd", "#dcefdc", "#f6dada", "#e6def0", "#ebe3df", "#f8e1f1", "#eeeeee", "#f2f3d1", "#d5f1f4")


def describe(images, members):
    """The commonest label of these pictures and its share, at the level that names the cluster best."""
    if images.labels is None or not len(members):
        return []
    best = []
    for level, names in enumerate(images.class_names):
        counts = torch.bincount(images.labels[members, level].clamp(min=0), minlength=len(names))
        share = counts.max().item() / len(members)
        if not best or share >= 0.5:  # the finest level that most of them share
            best = ["/".join(names[int(counts.argmax())].split("/")[-2:]), f"{100 * share:.0f} %"]
    return best


def leaf_paths(assign, parent, rows, labels=None):
    """[(title, paths)]: at most `rows` used paths, finest first, grouped by their coarser clusters.

    Few coarse clusters: an equal share of rows for each, sizes falling. Many: the largest leaves, those whose
    pictures share one label most (labels (N, depth), three pictures or more), and random ones.
    """
    counts = torch.bincount(assign[0])
    path_of = {}
    for leaf in counts.nonzero()[:, 0].tolist():
        path = [leaf]
        for up in parent:
            path.append(int(up[path[-1]]))
        path_of[leaf] = path
    tops = sorted({p[-1] for p in path_of.values()}, key=lambda t: -int((assign[-1] == t).sum()))
    if len(path_of) > rows and len(tops) > rows // 2:
        picks = {"the largest leaves: ": counts.argsort(descending=True, stable=True).tolist()}
        if labels is not None:
            pairs, times = torch.stack([assign[0], labels[:, -1]], dim=1).unique(dim=0, return_counts=True)
            share = torch.zeros(len(counts)).scatter_reduce(0, pairs[:, 0], times.float(), "amax")
            share = torch.where(counts >= 3, share / counts.clamp(min=1), 0) + 1e-6 * counts  # of equals the larger
            picks["the purest leaves: "] = share.argsort(descending=True, stable=True).tolist()
        used = counts.nonzero()[:, 0]
        picks["random leaves: "] = used[torch.randperm(len(used), generator=random_state(0))].tolist()
        return [(title, sorted((path_of[leaf] for leaf in leaves[:rows // len(picks)]), key=lambda p: p[::-1]))
                for title, leaves in picks.items()]
    chosen, tops = [], tops[:rows]
    for t in tops:  # each coarse cluster in turn gets an equal share of the rows left, for its largest leaves
        share = max(1, (rows - len(chosen)) // (len(tops) - tops.index(t)))
        largest = sorted((p for p in path_of.values() if p[-1] == t), key=lambda p: -int(counts[p[0]]))
        branches = [tuple(p[1:]) for p in largest]
        first = [branches.index(b) == i for i, b in enumerate(branches)]  # one leaf of every branch before a second
        chosen += [p for _, p in sorted(zip(first, largest), key=lambda f: not f[0])][:share]
    return [("", sorted(chosen, key=lambda p: (tops.index(p[-1]), p[::-1])))]


# ---- run plumbing: arguments, processes, randomness, folder, log, checkpoint


class UserError(Exception):
    """Something the user can mend: one sentence on stderr, exit code 2, no traceback."""


class RunError(Exception):
    """A run that cannot go on: one sentence on stderr, exit code 1, the last checkpoint stays."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C, after the state has been saved; args are the signal and a sentence."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one sentence, no usage text."""

    def error(self, message):
        raise UserError(f"{message}: see --help")


def launch(main, parse_args):
    """Run main(parse_args()) and end with the exit code and the sentence each failure deserves."""
    name = Path(sys.argv[0]).name
    try:
        main(parse_args())
        if world()[1] > 1:  # leave together: a process that ends while another still talks to it may abort
            barrier()
            dist.destroy_process_group()
        return
    except UserError as error:
        code, sentence = 2, error
    except Stopped as stopped:
        code, sentence = 128 + stopped.args[0], stopped.args[1]
    except KeyboardInterrupt:
        code, sentence = 130, "stopped before the first step: nothing was written"
    except RunError as error:
        code, sentence = 1, error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        code, sentence = 1, (f"cannot write to the run folder ({error.strerror}): make room and continue with "
                             "--resume")
    except torch.cuda.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / 2**30
        code, sentence = 1, (f"out of GPU memory at {peak:.1f} GiB: halve --batch-size (the learning rate "
                             "follows by itself)")
    except RuntimeError as error:
        lost = any(word in str(error).lower() for word in ("connection", "peer", "timed out", "gloo"))
        if world()[1] == 1 or not lost:
            raise
        code, sentence = 1, (f"stopped because of another process ({str(error).splitlines()[0]}): read what that "
                             "one said, and continue with --resume")
    if code < 128 or world()[0] == 0:
        print(f"{name}: {sentence}", file=sys.stderr, flush=True)
    os._exit(code) if world()[1] > 1 else sys.exit(code)  # subtle: never wait for peers that are gone


def resolve_arguments(parser, presets, argv=None):
    """Arguments from, in falling order of precedence, the command line, the resumed run, the preset.

    args.given lists what the command line named: an explicit request is obeyed or refused, whereas a
    preset's number is reduced, and said, where the data is too small for it.
    """
    every = vars(parser.parse_args([]))
    unset = object()
    given = {name: value for name, value in
             vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(every, unset)))).items()
             if value is not unset}
    args = argparse.Namespace(**{**every, **given})
    preset = args.preset if args.preset != "auto" else preset_of(args.data)
    warmup = presets[preset]["warmup_epochs"] * args.epochs / presets[preset]["epochs"] if args.epochs else None
    parser.set_defaults(**presets[preset], preset=preset)
    if warmup is not None:  # fewer or more epochs: the same share of them is warm-up
        parser.set_defaults(warmup_epochs=round(warmup))
    args = parser.parse_args(argv)
    folder = Path(args.out or default_folder(parser.prog, args))
    if args.resume and (folder / "config.json").exists():
        saved = read_json(folder / "config.json")["arguments"]
        if saved["script"] != Path(parser.prog).stem:
            raise UserError(f"{folder} is a run of {saved['script']}.py: resume it with that, or choose another --out")
        other = [name for name in given if name in saved and given[name] != saved[name] and name not in MAY_DIFFER]
        if other:
            raise UserError(f"{folder} was started with " +
                            ", ".join(f"--{name.replace('_', '-')} {saved[name]}" for name in other) +
                            ": resume with the same arguments, or choose another --out")
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in MAY_DIFFER})
        args = parser.parse_args(argv)
        given |= dict.fromkeys(saved["given"])  # asked for then: not a preset's number now
    args.out, args.given, args.script = str(folder), sorted(given), Path(parser.prog).stem
    return args


MAY_DIFFER = ("resume", "out", "device", "workers", "compile", "eval_every", "data_root", "tensorboard")


def default_folder(prog, args):
    """runs/<script>-<data>-<seed>."""
    data = Path(args.data).resolve().name if Path(args.data).is_dir() else args.data
    return f"runs/{Path(prog).stem}-{data}-{args.seed}"


def preset_of(data):
    """textures, cifar (pictures up to 64 px), photos (fewer than 100,000) or imagenet."""
    if data == "textures" or not Path(data).is_dir():
        return {"textures": "textures", "stl10": "photos"}.get(data, "cifar")
    names = (Path(where) / n for where, _, ns in os.walk(data) for n in ns if n.lower().endswith(PICTURES))
    many = list(itertools.islice(names, 100_000))
    try:
        with Image.open(many[0]) as picture:
            small = max(picture.size) <= 64
    except (OSError, IndexError):
        small = False
    return "cifar" if small else "photos" if len(many) < 100_000 else "imagenet"


def at_most(name, wanted, limit, args, what="pictures"):
    """`wanted`, or, where a preset asked for more than the data allows, `limit` and a line saying so."""
    if wanted <= limit:
        return wanted
    flag = "--" + name.replace("_", "-")
    if name in args.given:
        raise UserError(f"{flag} {wanted} is above the {limit} {what} of {args.data}: give at most {limit}")
    say(f"{flag} reduced from the preset's {wanted} to {limit}, the {what} there are")
    return limit


def fit_clusters(args, pictures):
    """--clusters as a strictly falling list, [] for none; a preset shrinks to 20 pictures a cluster."""
    clusters = [] if args.clusters == [0] else list(args.clusters)
    if any(k < 1 for k in clusters) or any(a <= b for a, b in zip(clusters, clusters[1:])):
        raise UserError(f"--clusters {' '.join(map(str, args.clusters))} must be positive and fall from level "
                        "to level, finest first (or be 0 for none)")
    if clusters and args.warmup_epochs >= args.epochs:
        say(f"--warmup-epochs {args.warmup_epochs} of {args.epochs} leave no epoch for the hierarchy's loss")
    if "clusters" in args.given and clusters and clusters[0] > pictures:
        raise UserError(f"--clusters {clusters[0]} is above the {pictures} pictures of {args.data}: "
                        f"give at most {pictures} at the finest level")
    if "clusters" in args.given or not clusters or clusters[0] <= pictures / 20:
        return clusters
    fitted = sorted({max(2, round(k / clusters[0] * pictures / 20)) for k in clusters}, reverse=True)
    if fitted[0] > pictures:
        raise UserError(f"{pictures} pictures are too few for a hierarchy: add some, or give --clusters 0")
    say(f"--clusters reduced from the preset's {clusters} to {fitted}, 20 pictures a cluster")
    return fitted


def fit_batch(args, pictures):
    """--batch-size, or fewer where a preset asks for more than there are pictures; a multiple of the ranks."""
    size = world()[1]
    batch_size = at_most("batch_size", args.batch_size, pictures, args) // size * size
    if batch_size != args.batch_size and "batch_size" in args.given:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {size} processes: make it a multiple")
    if batch_size < 2 * size:
        raise UserError(f"a batch of {batch_size} images for {size} processes is too small for batch norm: "
                        f"--batch-size must be at least {2 * size}, and so must the number of pictures")
    return batch_size


def positive(kind, zero=False, most=math.inf):
    """An argparse type: int or float above 0 (or from 0 on), finite, and at most `most`."""
    def parse(text):
        value = kind(text)
        if not (value >= 0 if zero else value > 0) or not math.isfinite(value) or value > most:
            raise argparse.ArgumentTypeError(f"{text} must be {'at least' if zero else 'above'} 0" +
                                             (f" and at most {most}" if most < math.inf else ""))
        return value
    parse.__name__ = kind.__name__  # argparse's "invalid int value: 'x'"
    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the docstring's lines and show every default there is."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def preset_table(presets):
    """The presets side by side, for --help."""
    def text(value):
        return "-".join(map(str, value)) if isinstance(value, list) else str(value)

    rows = [("preset", *presets)] + [("--" + name.replace("_", "-"), *(text(p[name]) for p in presets.values()))
                                     for name in next(iter(presets.values()))]
    return "\n".join("".join(f"{cell:17}" for cell in row) for row in rows)


def random_state(seed, *place, device="cpu"):
    """A generator that depends on the seed and the place (epoch, step, ...) alone; `device` for large draws."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def local_rows(n):
    """This rank's slice of n rows: contiguous, sizes differ by at most one."""
    rank, size = world()
    return slice(n * rank // size, n * (rank + 1) // size)


def average_gradients(parameters):
    """Mean over ranks of every gradient, in one collective; nothing at world size 1."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world()[1] > 1:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(
            (flat / world()[1]).split([g.numel() for g in gradients]), gradients)])


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks, on any device (torch's own needs a GPU)."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or world()[1] == 1:
            return super().forward(x)
        over = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() / x.shape[1] * world()[1]  # equal slices of the batch on every rank
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = differentiable_sum(wide.sum(over)) / count
        centred = wide - mean.view(shape)
        var = differentiable_sum(centred.pow(2).sum(over)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class differentiable_sum_(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum over ranks is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.clone())


differentiable_sum = differentiable_sum_.apply


def sync_batch_norm(module):
    """Under several ranks, turn every batch norm into a SyncBatchNorm, in place: nothing else about it changes."""
    for child in module.modules():
        if world()[1] > 1 and isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = SyncBatchNorm
    return module


class Run:
    """The run folder, its log and its checkpoint; rank 0 writes, every rank may ask.

    A checkpoint is written to a temporary file, flushed to disk and renamed over the last one, so that
    whatever happens one complete checkpoint remains.
    """

    def __init__(self, args):
        self.folder, self.rank, self.signal = Path(args.out), world()[0], 0
        self.checkpoint_path = self.folder / "checkpoint.pt"
        self.board = None
        if not args.resume and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists and is not overwritten: continue it with --resume, or choose "
                            "another --out")
        if args.resume and not (self.folder / "config.json").exists():
            raise UserError(f"{self.folder} holds no run to resume: leave out --resume, or correct --out")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs the package tensorboard: install it, or leave that out") from error
            self.board = SummaryWriter  # opened with the first row
        barrier()  # every rank has looked before rank 0 writes
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)

    def start(self, args, derived):
        """Create the folder and config.json, or check that what is resumed ran on the same data."""
        path = self.folder / "config.json"
        say(f"{self.folder}, preset {args.preset}")
        for name, value in {**{k: v for k, v in vars(args).items() if k not in ("given", *derived)}, **derived}.items():
            say(f"  {name:20} {value}")
        if path.exists():
            saved = read_json(path)["derived"]
            differs = [name for name in ("pictures", "fingerprint", "clusters") if saved.get(name) != derived.get(name)]
            if differs:
                raise UserError(f"{self.folder} ran on other data ({', '.join(f'{n} {saved.get(n)}' for n in differs)}"
                                "): give the same --data, or choose another --out")
            changed = [n for n in saved if saved[n] != derived.get(n)]
            if changed:
                say("resumed with another " + ", ".join(f"{n} ({saved[n]} before)" for n in changed))
            return
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot create {self.folder} ({error.strerror}): choose another --out") from error
            write_atomically(path, lambda f: f.write(json.dumps(dict(
                arguments=vars(args), derived=derived,
                command=" ".join([Path(sys.executable).name, *sys.argv]), date=time.strftime("%Y-%m-%d"),
                versions=dict(python=platform.python_version(), torch=torch.__version__,
                              numpy=np.__version__)), indent=1).encode()))

    def note_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    def stop_if_asked(self, save):
        """After a signal on any rank: save() and raise Stopped. Called once a step."""
        number = max_over_ranks(self.signal)
        if number:
            save()
            raise Stopped(number, f"stopped, the state is in {self.checkpoint_path}: continue with --resume")

    def save(self, **state):
        if self.rank == 0:
            try:
                write_atomically(self.checkpoint_path, lambda f: f.write(file_of(state)))
            except OSError as error:
                raise RunError(f"cannot save {self.checkpoint_path} ({error.strerror}): the checkpoint "
                               "before it is intact, make room and continue with --resume") from error

    def load(self, device, **parts):
        """The checkpoint's dict, its `parts` (model, optimizer) loaded; None when the run stopped before the first."""
        if not self.checkpoint_path.exists():
            return None
        state = load_file(self.checkpoint_path, device)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.checkpoint_path} is no checkpoint of this network: restore it from a copy, or "
                            "start again with another --out") from error
        return state

    def write(self, row):
        """Append one object to log.jsonl and print it as one line."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            if self.board:
                with self.board(self.folder) as board:
                    for name, value in row.items():
                        values = dict(enumerate(value)) if isinstance(value, list) else {"": value}
                        for key, number in values.items():
                            if number is not None:
                                board.add_scalar(f"{name}/{key}".rstrip("/"), number, row["epoch"])
        say("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                      f"{name} {'/'.join(map(str, value)) if isinstance(value, list) else value}"
                      for name, value in row.items() if value is not None))

    def save_backbone(self, backbone):
        """backbone.pt: torchvision's key names, without fc."""
        if self.rank == 0:
            weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
            write_atomically(self.folder / "backbone.pt", lambda f: f.write(file_of(weights)))

    def rows(self, before=math.inf):
        """The log so far; rows from epoch `before` on are dropped from the file (a resume redoes them)."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [row for row in rows if row["epoch"] < before]
        if self.rank == 0 and len(kept) < len(lines):
            write_atomically(path, lambda f: f.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
        return kept


def verdict(run, train):
    """The last lines of a run: what was reached against pixels and chance, and what to run next."""
    rows = run.rows()
    first, last = rows[0], rows[-1]
    if last["knn"] is None:
        say(f"no labels, so no accuracy: look at {run.folder}/tree.png")
    else:
        named = {"raw pixels": first["knn_pixels"], "untrained network": first["knn"], "trained network": last["knn"]}
        say("\n" + f"{'kNN accuracy (%)':20}" + "".join(f"{len(c):>7} classes" for c in train.class_names))
        for name, values in named.items():
            if values:
                say(f"{name:20}" + "".join(f"{value:15.1f}" for value in values))
        before = [max(v) for v in zip(*(v for v in (first["knn_pixels"], first["knn"]) if v))]
        say(f"{'error, of before':20}" + "".join(f"{(100 - now) / max(100 - was, 1e-9):14.2f}x"
                                                for now, was in zip(last["knn"], before)))
    if (run.folder / "tree.png").exists():
        say(f"\nthe learnt tree  {run.folder}/tree.png, and every picture's clusters in clusters.csv")
    say(f"the backbone     {run.folder}/backbone.pt\nnext             python eval_linear.py --run {run.folder}")


def file_of(state):
    """What torch.save writes, as bytes: on a full disk torch.save itself ends in an error that is no OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def load_file(path, device="cpu"):
    """A torch file, tensors and plain containers only: nothing in it is ever executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check the path") from error
    except Exception as error:  # truncated, foreign, malicious: torch raises many types
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}): restore it from a copy "
                        "or give another") from error


def read_json(path):
    """The content of a JSON file of a run folder; UserError when there is none."""
    try:
        config = json.loads(path.read_text())
        return {name: dict(config[name]) for name in ("arguments", "derived")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not readable ({type(error).__name__}): give another --out or --run") from error


def write_atomically(path, write):
    """write(file) to a temporary file beside `path`, flush it to disk, then rename it over `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Meter:
    """Running means of a step's losses over an epoch, and the share of time spent waiting for data."""

    def __init__(self, state=None):
        self.sums, self.steps = state or ({}, 0)
        self.pending, self.waited, self.begun, self.here = None, 0.0, 0.0, 0
        self.notes = {}  # what else the epoch's row shall hold

    def state(self):
        self.check()
        return self.sums, self.steps

    def add(self, step, losses):
        """Add a dict of scalars; raise RunError at the step after one that was not finite.

        subtle: one step late, so that a GPU need not be waited for; the epoch's end checks the last.
        """
        self.check()
        self.pending = step, {name: loss.detach() for name, loss in losses.items()}
        for name, loss in self.pending[1].items():
            self.sums[name] = self.sums.get(name, 0) + loss.double()
        self.steps, self.here = self.steps + 1, self.here + 1

    def check(self):
        if self.pending and not all(map(math.isfinite, torch.stack(list(self.pending[1].values())).tolist())):
            step, losses = self.pending
            bad = ", ".join(f"{name} = {loss.item()}" for name, loss in losses.items() if not loss.isfinite())
            raise RunError(f"{bad} at step {step}: stopped, the last checkpoint is good; try a lower --base-lr or "
                           "leave out --amp, in another --out")

    def means(self):
        self.check()
        means = {name: (all_reduce_sum(total.clone()) / self.steps / world()[1]).item()
                 for name, total in self.sums.items()}
        return {**means, **self.notes}

    def timed(self, iterable):
        """The same items; the time between asking and getting counts as waiting."""
        iterator, self.begun = iter(iterable), time.perf_counter()
        while True:
            asked = time.perf_counter()
            item = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    def speed(self, batch_size):
        """images/s over the global batch, and the share of time spent waiting for data."""
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        return dict(images_per_s=round(batch_size * self.here / seconds, 1), data_wait=round(self.waited / seconds, 4),
                    peak_memory_gib=round(peak_memory(), 3))


def feature_std(embedding):
    """Spread of the unit rows of (B, D): 1 where they point everywhere, 0 where all point one way."""
    return embedding.detach().std(dim=0).mean() * embedding.shape[1] ** 0.5


def peak_memory():
    """GiB: the device's high-water mark on CUDA, else the process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clusters_in_use(hierarchy):
    """How many clusters hold an image, per level."""
    return [int((torch.bincount(assign) > 0).sum()) for assign in hierarchy.assign]


def say(line):
    """Print on rank 0, at once."""
    if world()[0] == 0:
        print(line, flush=True)


def progress(iterable, total, epoch):
    """tqdm on a terminal, nothing in a log file."""
    quiet = world()[0] > 0 or not sys.stderr.isatty()
    return tqdm(iterable, f"epoch {epoch + 1}", total, disable=quiet, leave=False, unit="step")


def keep_freed_memory():
    """glibc hands large freed blocks back to the system and faults every page in anew: keep them instead.

    The augmentation, a chain of short-lived tensors, runs more than twice as fast on the CPU.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # no glibc, no need


def set_up(args):
    """Device, processes, seed: everything before the data. Returns the torch.device."""
    keep_freed_memory()
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not there ({str(error).splitlines()[0]}): use --device cpu") from error
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    torch.manual_seed(args.seed)
    return device
