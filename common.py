"""What is the same in every method: data and views, k-means and hierarchy, hierarchy losses, kNN.

Read a script first (hirl_moco.py), and come here when you want to know how a helper does it. Functions are pure where
they can be: tensors and numbers in, tensors out, randomness through a generator or an argument that is already drawn.
Below is ranks.py (several processes as one); above are networks.py (backbones, features) and plumbing.py (a run).

Letters: B batch, N images, b n this rank's share of them, D embedding, F backbone feature, L levels, K_l clusters at
level l, M negative paths, Q queue, V views, H W picture height and width, S side of a view. Rows are items, always.
Levels of the tree count from the finest (level 0) up; labels count from the coarsest (depth 0) down.
"""

import hashlib
import itertools
import math
import os
import pickle
import re
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision import datasets

import ranks
from ranks import all_gather_rows, all_reduce_sum, local_rows, processes, random_state, rank, rows_before
from textures import TEXTURE_NAMES, textures

BUILT_IN = ("textures", "cifar10", "cifar100", "stl10")  # what `load_data` knows by name
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class Stop(Exception):
    """Ends the script: one sentence on stderr, no traceback. code 2: mend command or data; 1: the run cannot go on."""

    def __init__(self, sentence, code=2):
        super().__init__(sentence)
        self.code = code


# ---- data: pictures, their names, and labels coarse to fine
@dataclass(eq=False)
class Images:
    """One split of a data set: N pictures with names and, for evaluation only, labels."""

    names: list
    labels: Tensor | None = None  # (N, depth) int64, coarse to fine
    class_names: list = ()  # per label depth, the names its integers stand for
    pixels: Tensor | None = None  # (N, 3, H, W) uint8 where all share one small size
    paths: list | None = None  # their files, decoded on demand where there are no pixels
    unreadable: dict = field(default_factory=dict)  # {i: why}; of all ranks after `agree`
    named: set = field(default_factory=set)  # names that the user has been told of; shared with parts
    test: "Images | None" = None  # the test split that came with this one
    partner: Tensor | None = None  # (N,) int64: the picture whose views follow those of i in a batch (csml.py)
    whole: int = 0  # of a part, the number of pictures it was taken from

    def __post_init__(self):
        self.index_of = torch.arange(len(self))  # (N,): i itself or, where it is unreadable, the next that is not

    def __len__(self):
        return len(self.names)

    def fingerprint(self):
        """A short hash of the pictures in order, both splits; of large ones sizes, the start of up to a thousand."""
        digest = hashlib.blake2b(digest_size=6)
        for images in (self, self.test) if self.test else (self,):
            digest.update(repr(images.names).encode())
            if images.pixels is not None:
                digest.update(images.pixels.cpu().numpy())
                continue
            files = [path for path in images.paths if os.path.isfile(path) and os.access(path, os.R_OK)]
            digest.update(repr([*map(os.path.getsize, files)]).encode())
            for path in files[::len(files) // 1000 + 1]:
                digest.update(np.fromfile(path, np.uint8, 2**18))
        return digest.hexdigest()

    def part(self, rows):
        """The pictures at `rows` (M,) int64 as Images of their own; itself when that is all of them."""
        if len(rows) == len(self):
            return self
        rows, shown = rows.tolist(), self.index_of[rows]
        labels = None if self.labels is None else self.labels[shown]
        pixels = None if self.pixels is None else self.pixels[shown.to(self.pixels.device)]
        paths = self.paths and [self.paths[i] for i in shown.tolist()]
        unreadable = {n: self.unreadable[i] for n, i in enumerate(rows) if i in self.unreadable}
        return Images([self.names[i] for i in rows], labels, self.class_names, pixels, paths, unreadable, self.named,
                      whole=max(self.whole, len(self)))

    def picture(self, i):
        """Picture i as PIL's, RGB; if it cannot be read, the next that can, and this is noted. Safe in any thread."""
        if self.pixels is not None:
            return TF.to_pil_image(self.pixels[i].cpu())
        while True:
            shown = int(self.index_of[i])
            try:
                return decode(self.paths[shown])
            except Exception as error:  # damaged files raise anything
                self.replace({shown: f"{type(error).__name__}: {error}"})

    def replace(self, found):
        """Note {i: why} as unreadable: the next takes its place, index and label too. Stop above 1 % of the whole."""
        for i, why in found.items():
            self.unreadable[i], shown = why, self.index_of == i
            self.index_of[shown] = self.index_of[(i + 1) % len(self)]
            if self.labels is not None:
                self.labels[shown] = self.labels[(i + 1) % len(self)].clone()
        if found and len(self.unreadable) > min(len(self) - 1, max(1, 0.01 * max(self.whole, len(self)))):
            bad, root = (self.names[i] for i in sorted(self.unreadable)[:20]), str(self.paths[0])
            raise Stop(f"{len(self.unreadable)} of {len(self)} pictures cannot be read, more than 1 % (the last one: "
                       f"{why}): mend or remove, in {root.removesuffix(self.names[0])}, {', '.join(bad)}")

    def agree(self):
        """All ranks together: what one could not read is noted by all, and each picture is named once."""
        tables = ranks.all_gather_objects(self.unreadable) if self.pixels is None else ()  # else all were read
        self.replace({i: why for table in tables for i, why in table.items() if i not in self.unreadable})
        for i in sorted(i for i in self.unreadable if self.names[i] not in self.named) if rank() == 0 else ():
            print(f"unreadable picture, using its neighbour: {self.names[i]} ({self.unreadable[i]})", file=sys.stderr)
        self.named.update(self.names[i] for i in self.unreadable)


def decode(path):
    """A picture file of any mode as PIL's, RGB: 16 bits and real numbers up to 1 are scaled, alpha is dropped."""
    if not os.path.isfile(path):
        raise ValueError("no regular file")  # a pipe would never end
    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):  # PIL would clip, not scale; a dark PNG is one of 16 bits
            values = np.nan_to_num(np.asarray(picture, np.float32))
            deep = picture.mode.startswith("I;") or picture.format == "PNG" or values.max() > 255
            values = values * 255 if picture.mode == "F" and values.max() <= 1 else values / 257 if deep else values
            picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return picture.convert("RGB")


def load_data(data, data_root="data", device="cpu", validation=False):
    """`textures`, `cifar10`, `cifar100`, `stl10` or a folder -> (train, test) Images; test may be None.

    validation: not the test pictures but a further sample of textures, or every tenth of train.
    Pictures that fit are one tensor on the device. A folder holds `train/` and `val/` (or `test/`), or just pictures;
    torchvision's sets are downloaded to `data_root` on first use. Raises Stop when there is nothing to read.
    """
    test, root = None, Path(data or "''")  # Path("") would be this folder
    if data == "textures":
        train, test = (Images([f"{i:05d}" for i in range(len(y))], y, TEXTURE_NAMES, pixels=x)
                       for x, y in (textures(200, seed=0), textures(40, seed=2 if validation else 1)))
    elif data in BUILT_IN:
        train, test = (torchvision_set(data, data_root, train) for train in (True, False))
    elif (root / "train").is_dir():
        train = folder(root / "train")
        parts = [root / part for part in ("val", "test") if (root / part).is_dir() and not validation]
        test = folder(parts[0], train.class_names) if parts else None
    elif root.is_dir():
        train = folder(root)
    else:
        what = "is a file, not a folder" if root.exists() else "does not exist, or may not be read"
        raise Stop(f"--data {root} {what}: give textures, cifar10, cifar100, stl10 or a folder of pictures")
    if validation and data != "textures":
        held_out = train.index_of % 10 == 0  # a stand-in goes where its original goes
        if train.labels is not None:
            held_out &= train.labels[:, 0] >= 0  # STL-10: most pictures carry no label
        train, test = (train.part(rows.nonzero()[:, 0]) for rows in (~held_out, held_out))
    for images in filter(None, (train, test)):
        images.pixels = images.pixels if images.pixels is None else images.pixels.to(device)
    train.test = test
    return train, test


def picture_files(root):
    """Yield every picture under `root`: each real folder once, however links loop, none that is hidden or a run's."""
    def refuse(error):
        raise Stop(f"cannot read the folder {error.filename} ({error.strerror}): check its permissions")

    seen, left = set(), {"config.json", "log.jsonl", "tree.png", "clusters.csv"}  # two of these are a run's
    for where, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(where) in seen or len(left & {*names}) > 1:
            folders.clear()  # go no deeper
            continue
        seen.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, n) for n in names if n.lower().endswith(PICTURES) and not n.startswith("."))


def folder(root, class_names=None):
    """Every picture under `root`; sub-folders are labels, coarse to fine, numbered in class_names, or their own."""
    paths = sorted(picture_files(root))
    if not paths:
        raise Stop(f"no pictures under {root}: it needs files that end in {' '.join(PICTURES)}")
    names = [re.sub(r"[\x00-\x1f]", "\ufffd", str(path.relative_to(root))) for path in paths]  # fit for one line
    parents = [Path(name).parts[:-1] for name in names]
    depth, stray = min(zip(map(len, parents), names))  # of the labels that every picture has
    if rank() == 0 and depth < max(map(len, parents)):
        print(f"labels have a depth of {depth}, for {stray} lies no deeper, as others do", file=sys.stderr)
    levels = [["/".join(parts[:d + 1]) for parts in parents] for d in range(depth)]
    class_names = [sorted(set(level)) for level in levels] if class_names is None else class_names
    strange = [c for level, known in zip(levels, class_names) for c in sorted({*level} - {*known})]
    if strange or len(class_names) > depth:
        bad = strange[0] if strange else "fewer levels"
        raise Stop(f"{root} has other classes than the training pictures ({bad}): give both the same sub-folders")
    labels = [torch.from_numpy(np.searchsorted(known, level)) for known, level in zip(class_names, levels)]
    images = Images(names, torch.stack(labels, 1) if labels else None, class_names, paths=paths)
    images.pixels = in_memory(images)
    images.agree()
    return images


def in_memory(images):
    """Pictures in files as (N, 3, H, W) uint8, or None where they are large, many, or of several sizes."""
    size, rows = images.picture(0).size, range(len(images))
    if max(size) > 128 or len(images) * 3 * math.prod(size) > 4 * 2**30:
        return None
    pixels = torch.empty(len(images), 3, *size[::-1], dtype=torch.uint8)
    blocks = ahead(lambda i: [*itertools.takewhile(lambda p: p.size == size, map(images.picture, rows[i:i + 64]))],
                   rows[::64])  # one thread: with more, small pictures take longer, those of 128 px as long
    for part, pictures in zip(pixels.split(64), blocks):
        if len(pictures) < len(part):
            return None
        torch.stack([*map(TF.pil_to_tensor, pictures)], out=part)
    return pixels


def torchvision_set(name, root, train):
    """CIFAR-10, CIFAR-100 (with its 20 superclasses) or STL-10 as Images, downloaded on first use."""
    split = train if name != "stl10" else "train+unlabeled" if train else "test"
    try:
        with ranks.first_rank_first():  # it downloads
            data = getattr(datasets, name.upper())(root, split, download=True)
    except (OSError, RuntimeError) as error:
        raise Stop(f"{name} could not be downloaded to {root} ({error}): put it there by hand, "
                   "or give --data a folder of pictures") from error
    pixels = torch.from_numpy(data.data if name == "stl10" else data.data.transpose(0, 3, 1, 2)).contiguous()
    labels, class_names = [data.labels if name == "stl10" else data.targets], [list(data.classes)]
    if name == "cifar100":  # torchvision leaves the superclasses, which are in the same files, unread
        coarse, meta = (pickle.loads(Path(root, data.base_folder, file).read_bytes(), encoding="latin1")
                        for file in ("train" if train else "test", "meta"))
        labels, class_names = [coarse["coarse_labels"], *labels], [meta["coarse_label_names"], *class_names]
    labels = torch.stack([torch.as_tensor(level).long() for level in labels], 1)
    return Images([f"{i:05d}" for i in range(len(pixels))], labels, class_names, pixels=pixels)


def ahead(function, items, threads=1):
    """Yield function(item) of every item, in order; `threads` threads work ahead, and end when the generator does."""
    if not threads:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # a core each
        coming = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def make_views(images, ids, planned, device, workers):
    """Pictures `ids` (b,) -> [view (b, 3, H, W)], one for each (augmentation, draws) of `planned`.

    Large pictures are decoded and cropped to bytes by `workers` threads; the rest is done on the device.
    """
    def crops(row):  # of one large picture, a crop for each view
        made, x = [], TF.pil_to_tensor(images.picture(int(ids[row])))  # (3, H, W) bytes
        for view, draws in planned:
            i, j, h, w = crop_boxes(draws["crop"][row:row + 1] if draws else None, *x.shape[1:], view)[0].tolist()
            made.append(F.interpolate(x[None, :, i:i + h, j:j + w], view.size, mode="bilinear", antialias=True)[0])
        return made

    if images.pixels is None:
        pictures = map(torch.stack, zip(*ahead(crops, range(len(ids)), workers)))
        planned = [(view, {name: value for name, value in draws.items() if name != "crop"}) for view, draws in planned]
    else:
        pictures = [images.pixels[ids.to(images.pixels.device, non_blocking=True)]] * len(planned)
    return [render_view(x.to(device, non_blocking=True), draws, view) for x, (view, draws) in zip(pictures, planned)]


def batches(images, batch_size, augmentations, *, seed, epoch, start=0, device="cpu", workers=0):
    """Yield (step, index (b,), [view (b, 3, H, W)]) of an epoch, this rank's b rows of every batch.

    Everything random is drawn on the CPU for the global batch from (seed, epoch, step), and a rank uses its slice: an
    epoch can start at any step, and G ranks see exactly what one process would. With images.partner, as many views of
    each image's partner follow; the images' own stay the same. A thread makes the next batch if a core is free.
    """
    order, mine = torch.randperm(len(images), generator=random_state(seed, epoch)), local_rows(batch_size)

    def batch(step):
        generator, ids = random_state(seed, epoch, step), order[step * batch_size:(step + 1) * batch_size]
        views = []
        for own in [ids] if images.partner is None else [ids, images.partner[ids]]:
            planned = [(view, {name: value[mine] for name, value in draw_view(batch_size, view, generator).items()})
                       for view in augmentations]
            views += make_views(images, own[mine], planned, device, workers)
        return step, images.index_of[ids[mine]].to(device, non_blocking=True), views  # reading may have changed it

    spare = images.pixels is None or torch.device(device).type != "cpu" or torch.get_num_threads() < os.cpu_count()
    yield from ahead(batch, range(start, len(images) // batch_size), threads=int(spare))
    images.agree()


# ---- views: `draw_view` draws every random number, on the CPU; `render_view` makes the views, on the device
# torch.lerp with weights of 0 and 1 stands for torch.where: as exact, and several times faster on the CPU.


class Augmentation(NamedTuple):
    """What a view may look like. Probabilities are per sample (jitter's order per batch), 0 leaves an operation out."""

    size: int = 32  # side of the view, pixels
    scale: tuple = (0.2, 1.0)  # area of the crop, as a share of the image
    ratio: tuple = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # strength: brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0  # 0.5 for large images; at 32 px a blur removes what is to be learnt
    blur_sigma: tuple = (0.1, 2.0)  # range of the standard deviation, pixels; kernels reach to three of the highest
    solarize_p: float = 0.0
    shuffle_p: float = 0.0  # probability of a random order of the colour channels


def draw_view(n, augmentation, generator):
    """Every random number of `n` views, on the CPU: {operation: (n, ...)}, without those that are switched off. Nothing
    depends on a device, a rank or a picture's size: a rank takes its rows of the global batch's.
    """
    a = augmentation

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def chosen(p):
        return uniform(0, 1) < p

    draws = {"crop": uniform(0, 1, 10, 4)}  # for `crop_boxes`
    if a.flip > 0:
        draws["flip"] = chosen(a.flip)
    if a.jitter_p > 0 and max(a.jitter) > 0:
        jittered = chosen(a.jitter_p)
        for name, s in zip(("brightness", "contrast", "saturation"), a.jitter):  # factors, 1 changes nothing
            draws[name] = torch.where(jittered, uniform(max(0.0, 1 - s), 1 + s), 1.0)
        draws["hue"] = torch.where(jittered, uniform(-a.jitter[3], a.jitter[3]), 0.0)  # a shift, in turns
        draws["order"] = torch.randperm(4, generator=generator).repeat(n, 1)  # of the four: one a call, not a sample
    if a.gray_p > 0:
        draws["gray"] = chosen(a.gray_p)
    if a.blur_p > 0:
        draws["blur"] = torch.where(chosen(a.blur_p), uniform(*a.blur_sigma), 0.0)  # sigma in pixels, 0 for none
    if a.solarize_p > 0:
        draws["solarize"] = torch.where(chosen(a.solarize_p), 0.5, 2.0)  # the threshold, 2 for none
    if a.shuffle_p > 0:
        shuffled = uniform(0, 1, 3).argsort(1)  # (n, 3) channels
        draws["shuffle"] = torch.where(chosen(a.shuffle_p)[:, None], shuffled, torch.arange(3))
    return draws


def crop_boxes(u, height, width, augmentation):
    """Random resized crop: u (n,10,4) in [0,1) -> boxes (n,4) int64, (row, column, height, width).

    Each of ten tries takes four numbers: area, aspect (uniform in its logarithm), row and column. The first try that
    fits is the box; if none does, the largest central box within the range of aspects. u None, for evaluation:
    (1,4), the central square; for views from 96 px on its middle 7/8, as 224 of 256.
    """
    scale, ratio = augmentation.scale, augmentation.ratio
    if u is None:
        side = round(min(height, width) * (0.875 if augmentation.size >= 96 else 1))
        return torch.tensor([[(height - side) // 2, (width - side) // 2, side, side]])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])  # (n, 10)
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[..., 1]
    h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (h > 0) & (w > 0) & (h <= height) & (w <= width)
    row = (u[..., 2] * (height - h + 1)).floor().minimum(height - h)  # minimum: u may round up to 1
    column = (u[..., 3] * (width - w + 1)).floor().minimum(width - w)
    tries = torch.stack([row, column, h, w], dim=-1).long()  # (n, 10, 4)
    first = tries[torch.arange(len(u)), fits.int().argmax(1)]  # (n, 4)
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    central = torch.tensor([(height - h) // 2, (width - w) // 2, h, w])
    return torch.where(fits.any(1, keepdim=True), first, central)


def resize_weights(start, length, total, size):
    """Matrices (..., size, total) that resample [start, start + length), each (...), of `total` pixels to `size`.

    Bilinear with antialias: each row is a triangle around an output pixel's centre, one input pixel wide on either
    side, or one output pixel where the image shrinks; cut at the crop's edge, sum 1.
    """
    start, length = start[..., None, None], length[..., None, None]
    stretch = length / size  # input pixels for one output pixel
    source = torch.arange(total, device=start.device) + 0.5 - start
    target = torch.arange(size, device=start.device)[:, None] + 0.5
    weights = 1 - (source - target * stretch).abs_().div_(stretch.clamp(min=1)).clamp_(max=1)
    weights.mul_((source > 0) & (source < length))
    return weights.div_(weights.sum(-1, keepdim=True))


def resized_crop(images, boxes, size):
    """Crop each image (n,C,H,W) to its box (n,4), resize: (n,C,size,size). Equals torchvision's, with antialias."""
    n, channels, height, width = images.shape
    start, length = boxes.to(images.dtype).T.reshape(2, 2, n)  # (rows and columns, n)
    down, across = resize_weights(start, length, max(height, width), size)  # (n, size, H or W, whichever is more)
    images = torch.bmm(images.reshape(n, channels * height, width), across[..., :width].mT)  # (n, C*H, size)
    return down[:, None, :, :height] @ images.view(n, channels, height, size)


def blend(images, gray, factor):
    """factor * images + (1 - factor) * gray, clipped to [0,1]; factor (n,), 1 keeps the images."""
    gray = gray.expand(len(images), 1, *images.shape[2:]).contiguous()  # lerp is slow where a row is one number
    return torch.lerp(gray, images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_hue(images, shift):
    """Turn the hue by `shift` (n,), in turns of the colour circle; value and saturation stay."""
    r, g, b = images.unbind(1)  # each (n, H, W)
    value, smallest = images.amax(1), images.amin(1)
    chroma = value - smallest
    red, green = (torch.eq(value, x, out=torch.empty_like(value)) for x in (r, g))  # 1 where it is the largest, or 0
    # The hue in sixths of a turn: 0 at red, 2 at green, 4 at blue. Gray has none, any will do.
    hue = torch.lerp((r - g).add_(chroma, alpha=4), (b - r).add_(chroma, alpha=2), green).lerp_(g - b, red)
    turn = hue.div_(chroma.clamp(min=1e-12)).div_(6).add_(shift.view(-1, 1, 1))
    # Back: a channel stands at `value` up to a sixth of a turn from its own hue, at `smallest` from two sixths on.
    # 2.5 makes the numbers positive, and half a turn puts distance 0 at frac = 0.5.
    own = torch.arange(3, dtype=images.dtype, device=images.device).view(1, 3, 1, 1) / 3
    distance = (turn[:, None] + (2.5 - own)).frac_().sub_(0.5).abs_()  # (n, 3, H, W), turns
    share = distance.mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(smallest[:, None], chroma[:, None], share)


GRAY = TF.rgb_to_grayscale  # (n,3,H,W) -> (n,1,H,W)
JITTER = {  # each takes factors or shifts (n,); the order of the names is the meaning of draws["order"]
    "brightness": lambda images, factor: blend(images, images.new_zeros(1), factor),
    "contrast": lambda images, factor: blend(images, GRAY(images).mean((1, 2, 3), keepdim=True), factor),
    "saturation": lambda images, factor: blend(images, GRAY(images), factor),
    "hue": adjust_hue,
}


def gaussian_blur(images, sigma, kernel_size):
    """Separable Gaussian of `kernel_size` (odd) taps with reflected edges; sigma (n,), pixels."""
    n, channels, height, width = images.shape
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (taps / sigma[:, None]) ** 2).softmax(1)  # (n, kernel_size), exp and sum 1
    kernel = kernel.repeat_interleave(channels, 0, output_size=n * channels)[:, None]
    x = F.pad(images, (reach,) * 4, mode="reflect").view(1, n * channels, height + 2 * reach, -1)
    x = F.conv2d(x, kernel[:, :, None, :], groups=n * channels)  # rows, then columns
    return F.conv2d(x, kernel[:, :, :, None], groups=n * channels).view_as(images)


def normalize_pixels(images):
    """float images in [0,1] -> what networks are fed, by one rule for every data set and channel: gray stays gray."""
    return (images - 0.5).div_(0.25).contiguous(memory_format=torch.channels_last)


def render_view(images, draws, augmentation):
    """images (n,3,H,W) uint8, draws on the CPU -> (n,3,size,size) float32, normalised. Without a key "crop" images of
    size x size are taken as cropped already, others are cropped to their centre.
    """
    size, most = augmentation.size, max(1, 2**22 // max(1, 12 * augmentation.size**2))
    if images.device.type == "cpu" and len(images) > most:  # 4 MB at a time, which caches hold
        parts = zip(images.split(most), *(v.split(most) for v in draws.values()))
        return torch.cat([render_view(part, dict(zip(draws, own)), augmentation) for part, *own in parts])
    d = {name: v.float() for name, v in draws.items() if v.ndim == 1}  # a number an image: to the device in one piece
    d = dict(zip(d, torch.stack([*d.values()]).to(images.device, non_blocking=True))) if d else d
    if "shuffle" in draws:  # of all planes, the three of the first image, of the second, ...
        planes = (3 * torch.arange(len(images))[:, None] + draws["shuffle"]).to(images.device, non_blocking=True)
        images = images.flatten(0, 1).index_select(0, planes.flatten()).view_as(images)
    x = images.float().div_(255)
    if "crop" in draws or x.shape[2:] != (size, size):
        boxes = crop_boxes(draws.get("crop"), *images.shape[2:], augmentation).expand(len(x), 4)
        x = resized_crop(x, boxes.to(x.device, non_blocking=True), size)
    if "flip" in d:
        x = torch.lerp(x, x.flip(3), d["flip"].view(-1, 1, 1, 1))
    for name in [[*JITTER][place] for place in draws["order"][0].tolist()] if "order" in draws else ():
        x = JITTER[name](x, d[name])
    if "gray" in d:
        x = torch.lerp(x, GRAY(x), d["gray"].view(-1, 1, 1, 1))
    if "blur" in d and draws["blur"].any():
        rows = draws["blur"].nonzero().squeeze(1).to(x.device, non_blocking=True)  # found on the CPU
        reach = math.ceil(min(3 * augmentation.blur_sigma[1], size - 1))
        x[rows] = gaussian_blur(x[rows], d["blur"][rows], 2 * reach + 1)
    if "solarize" in d:
        x = torch.lerp(x, 1 - x, (x >= d["solarize"].view(-1, 1, 1, 1)).float())
    return normalize_pixels(x)


# ---- k-means and hierarchy
class Hierarchy(NamedTuple):
    """Tree of prototypes over N images, level 0 the finest; assign[l+1] == parent[l][assign[l]]."""

    prototypes: list[Tensor]  # L x (K_l, D) float32, unit rows
    assign: list[Tensor]  # L x (N,) int64  image -> cluster at level l  (released: im2cluster)
    parent: list[Tensor]  # L-1 x (K_l,) int64  cluster at l -> cluster at l+1  (released: cluster2cluster)
    concentration: list[Tensor]  # L x (K_l,) float32  phi of PCL (2005.04966), a temperature each


def near_centroids(x, centroids, top=1, half=False):
    """Rows (n, D), centroids (K, D) -> (n, top) ids: the nearest, then the best of each next best block of them.

    The nearest has the highest score (x-m).(c-m) - |c-m|^2/2, m the mean centroid: one addmm per chunk of rows.
    half=True: float16 scores, unless a few rows are far longer than the rest. float16 needs m subtracted: without
    that, rows get wrong labels when all features are nearly equal.
    """
    k, mean, scale = len(centroids), centroids.mean(0), 1.0
    # argmax over K scores costs half as much as the product itself (CPU). So: scores as S strips of W columns, the
    # maximum over strips, argmax over columns, argmax inside. Column j holds ids j*S ... j*S+S-1: ties go to the
    # lowest. From K = 256 on W is 32, 64, ... (others are slower by far), below S is 1.
    width = -(-k // 8) * 8 if k < 256 else 32 * math.ceil(k**0.5 / 32)
    strips = -(-k // width)
    ids = torch.arange(width * strips, device=x.device).view(width, strips).T.flatten().clamp(max=k - 1)
    c = (centroids - mean)[ids]  # (S*W, D); the last centroid fills up
    if half:
        length = torch.cat([(y.float() - mean).norm(dim=1) for y in (*x.split(2**16), centroids)])
        half = bool(length.max() < 1000 * length.median())  # else most rows drown in float16's coarse small numbers
        scale = 100 / length.max() if half else 1.0  # scores up to 1.5e4 do not overflow
    c, kind = c * scale, torch.float16 if half else torch.float32
    bias = -0.5 * c.square().sum(1) - (0 if half else c @ mean)  # float32: the same scores from rows as they are
    bias, c = bias.to(kind), c.T.to(kind)
    step = max((2**27 if x.is_cuda else 2**19) // len(ids), min(1024, 2**27 // len(ids)), 1)
    scores, found = c.new_empty(min(step, len(x)), len(ids)), []  # the memory of every chunk
    for y in x.split(step):
        y = ((y.float() - mean) * scale).half() if half else y.float()
        score = torch.addmm(bias, y, c, out=scores[:len(y)]).view(-1, strips, width)
        best, blocks = score.amax(1) if strips > 1 else score[:, 0], []  # (n, W)
        for _ in range(min(top, width)):
            blocks.append(best.max(1, keepdim=True).indices)  # the lowest of equal ones, which topk does not promise
            best.scatter_(1, blocks[-1], -math.inf)
        block = torch.cat(blocks, 1)  # (n, top)
        found.append(block * strips + score.gather(2, block[:, None].expand(-1, strips, -1)).argmax(1))
    return torch.cat(found).clamp_(max=k - 1)


def nearest_listed(x, centroids, listed):
    """(n, D) rows, (n, T) ids -> (n,) the nearest of each row's list, by true differences; (n,) its distance^2, 0
    below a millionth of the centroid's length: that is rounding.
    """
    found, step = [], max(1, (2**25 if x.is_cuda else 2**18) // x.shape[1])
    for y, ids in zip(x.split(step), listed.sort(1).values.split(step)):  # sorted: ties to the lowest id
        y = y.float()
        d2 = torch.stack([(y - centroids.index_select(0, column)).square_().sum(1) for column in ids.T], 1)  # (n, T)
        least, place = d2.min(1)
        found.append((ids.gather(1, place[:, None])[:, 0], least))
    label, least = map(torch.cat, zip(*found))
    return label, least.where(least > 1e-12 * centroids.square().sum(1)[label], 0)


def cluster_sums(x, label, k):
    """(n, D) rows, (n,) ids -> (k, D) sums, (k,) counts; the same on every run, unlike index_add_ on CUDA."""
    sums, counts, step = 0, 0, max(1, 2**25 // x.shape[1])  # 128 MiB at a time
    for y, own in zip(x.split(step), label.split(step)):
        own, order = own.sort(stable=True)
        start = torch.searchsorted(own, torch.arange(k + 1, device=own.device))
        # bags of at most 256 rows, then bags of these: parallel for few large clusters, and less rounding
        cut = torch.cat([start[:-1], torch.arange(0, len(own), 256, device=own.device)]).sort().values
        part = F.embedding_bag(order, y.float(), cut, mode="sum")
        bags = torch.arange(len(cut), device=own.device)
        sums = sums + F.embedding_bag(bags, part, torch.searchsorted(cut, start[:-1]), mode="sum")
        counts = counts + start.diff()
    return sums, counts


def draw(weight, count, generator):
    """(N,) -> ids of `count` rows, none twice, chance proportional to weight >= 0; fewer if most weights are 0."""
    key = torch.empty(len(weight)).exponential_(generator=generator).clamp_(min=1e-30)  # Efraimidis & Spirakis, 2006
    key, ids = (weight / key.to(weight.device)).topk(min(count, len(weight)))
    return ids[key > 0]


def take(x, ids):
    """Global ids (M,) -> their rows (M, D) on every rank; which of the M are this rank's, and their places in x."""
    place = ids - rows_before(x)
    own = ((place >= 0) & (place < len(x))).nonzero()[:, 0]
    rows = x[place[own]]
    if processes() > 1:
        rows = all_reduce_sum(rows.new_zeros(len(ids), x.shape[1]).index_copy_(0, own, rows))
    return rows, own, place[own]


def checked(x, task):
    """Rows (n, D), a tensor or memory map of any float type -> the tensor, the number of rows of all ranks; ValueError
    with the name of the task unless all are finite.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory maps that cannot be written; nobody writes here
        x = torch.as_tensor(x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{task}: rows must be of shape (N, D), not {tuple(x.shape)}")
    bad = sum(int((~y.float().norm(dim=1).isfinite()).sum()) for y in x.split(2**16))
    bad, total = all_reduce_sum(torch.tensor([bad, len(x)])).tolist()
    if bad:
        raise ValueError(f"{task}: {bad} of {total} rows hold NaN, infinity or too large numbers")
    return x, total


def greedy_seeds(x, weight, k, generator):
    """Batched greedy k-means++ of this rank's rows (n, D) with weights (n,) -> (k, D), of the rows of all ranks.

    Of a sample, twelve rows per seed. A round finds an eighth of the seeds: it draws three times as many rows, chance
    proportional to weight times squared distance to the nearest seed, sends every row to the nearest drawn one, and
    keeps those that lower the distances most. When no row has weight and distance left, the other seeds are the mean.
    """
    weight = all_gather_rows(weight.to(x.device, torch.float32))  # (N,)
    size = max(2 * k, min(12 * k, 2**27 // x.shape[1]))  # twelve rows per seed are enough
    sample = torch.randperm(len(weight), generator=generator)[:size].sort().values.to(x.device)
    x, weight = take(x, sample)[0].float(), weight[sample]
    mean, each = x.mean(0), -(-k // 8)
    seeds, d2 = x[:0], (x - mean).square().sum(1)
    while len(seeds) < k:
        drawn = x[draw(weight * d2, 3 * each, generator)]
        if len(drawn) == 0:
            return torch.cat([seeds, mean.expand(k - len(seeds), -1)])
        near = near_centroids(x, drawn, half=x.is_cuda)
        gain = weight * (d2 - nearest_listed(x, drawn, near)[1]).clamp(min=0)
        gain = cluster_sums(gain[:, None], near[:, 0], len(drawn))[0][:, 0]
        kept = drawn[gain.topk(min(each, len(drawn), k - len(seeds))).indices]
        d2 = torch.minimum(d2, nearest_listed(x, kept, near_centroids(x, kept, half=x.is_cuda))[1])
        seeds = torch.cat([seeds, kept])
    return seeds


@torch.no_grad()
def kmeans(x, k, *, iterations=20, seed=0, init=None, exact=False):
    """Lloyd's k-means on squared Euclidean distance -> centroids (k, D) float32, assign (N,) int64: the nearest one.

    x (N, D) of any float type, a tensor or numpy memory map, read in blocks; under a process group x, and assign, are
    this rank's share. init (k, D) is the start, else greedy seeds. It ends when no row moves, or after `iterations`.
    From k = 1000 on, unless exact=True, only every sixth pass searches all centroids, the others four candidates a row;
    a thousandth may still move at the end; with init there are a fifth more passes. No cluster is empty, unless x has
    fewer distinct rows than k (a warning says so); rows closer than a millionth of their length count as equal.
    ValueError: k < 1, k > N, no rows, rows with NaN, infinity or too large numbers, init of another shape.
    """
    x, total = checked(x, "k-means")
    if not 1 <= k <= total:
        raise ValueError(f"k-means: cannot make {k} clusters of {total} rows")
    generator, half, quick = torch.Generator().manual_seed(seed), x.is_cuda, k >= 1000 and not exact
    far = quick and init is not None  # a given start may be farther from the end than greedy seeds
    passes = iterations * 6 // 5 if far else iterations
    if init is None:
        init = greedy_seeds(x, torch.ones(len(x)), k, generator)
    centroids = torch.as_tensor(init).to(x.device, torch.float32, copy=True)
    if centroids.shape != (k, x.shape[1]) or not centroids.isfinite().all():
        raise ValueError(f"k-means: init is (K, D), of finite numbers: not {tuple(centroids.shape)}")
    label, refilled = torch.zeros(len(x), dtype=torch.long, device=x.device), False
    for step in itertools.count():  # assign, then move the centroids; the last pass only assigns
        last = step >= passes
        scan = last or refilled or not quick or step % 6 == 0 or far and step == 1  # all centroids, not the listed
        careful = half or refilled  # scores may err, and cannot tell very close centroids apart
        if scan:
            listed = near_centroids(x, centroids, 4 if quick or careful else 1, half)
        if scan and careful:  # true differences decide, and the label so far stays in the race
            listed = torch.cat([listed, label[:, None]], 1)
        new = listed[:, 0] if scan and not careful else nearest_listed(x, centroids, listed)[0]
        moved, label = all_reduce_sum((new != label).sum()), new
        sums, counts = map(all_reduce_sum, cluster_sums(x, label, k))
        if not last:
            centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        empty = (counts == 0).nonzero()[:, 0]
        refilled = len(empty) > 0
        if refilled:  # put them on rows drawn by squared distance
            ids = draw(all_gather_rows(nearest_listed(x, centroids, label[:, None])[1]), len(empty), generator)
            if last and len(ids) == 0:
                warnings.warn(f"k-means: only {k - len(empty)} distinct rows (to six digits) for {k} clusters")
                break
            rows, own, place = take(x, ids)
            centroids[empty[:len(ids)]], label[place] = rows.float(), empty[own]
        elif last:
            break
        elif step and scan and moved <= quick * total // 1000:
            passes = step  # none moved (quick: a thousandth): only the last assignment is left
    return centroids, label


def concentration(distance, counts, temperature):
    """PCL's phi: (K,) summed distance and (K,) size -> (K,) per-prototype temperatures, mean = temperature.

    phi = mean distance / log(size + 10); sizes 0 and 1 get the largest; clipped to the 10th-90th percentile, and from
    below at a hundredth of the mean (this project's guard: equal items have distance 0, and q.c/phi must stay finite).
    """
    phi = distance / counts.clamp(min=1) / (counts + 10.0).log()
    phi = torch.where(counts > 1, phi, phi.where(counts > 1, 0).max())
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    phi = torch.maximum(phi, 0.01 * phi.mean())
    return temperature * (phi / phi.mean() if phi.any() else torch.ones_like(phi))


@torch.no_grad()
def hierarchy_from_centroids(x, raw_centroids, temperature, *, labels=None):
    """x (N, D), L x (K_l, D) centroids as k-means left them -> Hierarchy.

    The items of level 0 are the rows of x, those of level l+1 the normalised centroids of level l. Each goes to the
    nearest raw centroid, unless `labels` (a tensor a level) says where. Under a process group x is this rank's share;
    the Hierarchy is that of all rows, on every rank. A centroid at the origin stays 0.
    """
    prototypes, assign, parent, phi, items = [], [], [], [], checked(x, "hierarchy")[0]
    for level, raw in enumerate(raw_centroids):
        raw = torch.as_tensor(raw).to(items.device, torch.float32)
        listed = near_centroids(items, raw, 4) if labels is None else labels[level][:, None]
        near, d2 = nearest_listed(items, raw, listed)
        distance, counts = map(all_reduce_sum, cluster_sums(d2.sqrt()[:, None], near, len(raw)))
        phi.append(concentration(distance[:, 0], counts, temperature))
        near = all_gather_rows(near)
        assign.append(near[assign[-1]] if level else near)
        prototypes.append(F.normalize(raw, dim=1))
        parent.append(near)
        items = prototypes[-1][local_rows(len(raw))]
    return Hierarchy(prototypes, assign, parent[1:], phi)


@torch.no_grad()
def hierarchical_kmeans(x, clusters, *, temperature, iterations=20, seed=0):
    """Unit features x (N, D), clusters (K_0, K_1, ...) fine to coarse -> Hierarchy: k-means of x, then of its unit
    centroids, and so on; temperature: mean of phi. Under a process group x is this rank's share, the tree of all rows.
    """
    raw, labels, items, images, init = [], [], x, None, None
    for k in clusters:
        if raw:
            # An upper level clusters centroids, some of them of few images. Unweighted seeding spends seeds on those
            # (images lie farther from their group's mean); weighting by their number of images fits the
            # centroids worse than a random start. The square root of it beats a random start at both.
            init = greedy_seeds(items, images.sqrt(), k, torch.Generator().manual_seed(seed))
        centroids, label = kmeans(items, k, iterations=iterations, seed=seed, init=init)  # (k, D); one per item
        raw, labels = [*raw, centroids], [*labels, label]
        images = all_reduce_sum(label.bincount(images, minlength=k).double())[local_rows(k)]  # (k,) under each centroid
        items = F.normalize(centroids, dim=1)[local_rows(k)]  # (k, D), of which the next level makes clusters
    return hierarchy_from_centroids(x, raw, temperature, labels=labels)


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
        cos = sim.gather(1, node) / prototypes.norm(dim=1).clamp(min=1e-12)[node]  # true length: 1, nearly, or 0
        score = score * (1 + cos) / 2  # (B, 1+M), HIRL path score
    true_negative = (negative_leaves != own_leaf).to(z.dtype)  # (B, M); in a tree the leaf names the path
    positive = -torch.log(score[:, 0] + eps)  # (B,)
    negative = -torch.log(1 - score[:, 1:] + eps) * true_negative  # (B, M)
    negative = negative.sum(dim=1) / (true_negative.sum(dim=1) + eps)  # (B,)
    return (positive + negative).mean() / 2  # HIRL loss


@torch.no_grad()
def hcsc_instance_selection(queue, hierarchy, index, *, member=None, changed=None):
    """HCSC: how likely each queue entry is a true negative of each image, one matrix per level.

    keep(n, j) = 1 - softmax_i(u_j . c_i^l / phi_i^l)[y_l(n)]: an entry of the image's own cluster is likely to
    show the same thing, a false negative, and is likely to be left out.

    queue (Q, D) unit rows u_j; hierarchy: Hierarchy of L levels; index (B,) int64, the images' places in the
    data set, y_l(n) = assign[l][index[n]]. Returns L x (B, Q), the parameters of Bernoulli draws. phi is floored
    at 1e-3, as in the release. Source: HCSC (2202.00455), selection of instances.
    member: a list the caller keeps, empty at a new tree: it is filled with the softmax, L x (K_l, Q). Later calls
    need the queue's rows `changed` (M,) since, and take anew only these, which saves most of the work.
    """
    size = 1024 if changed is None else len(changed)  # rows of a product: of one size, so of the same bits
    member, entries = [] if member is None else member, queue[changed] if member else queue
    for level, (prototypes, phi) in enumerate(zip(hierarchy.prototypes, hierarchy.concentration)):
        scaled = (prototypes / phi.clamp(min=1e-3)[:, None]).to(queue.dtype)  # (K_l, D)
        new = torch.cat([torch.softmax(rows @ scaled.T, dim=1) for rows in entries.split(size)]).T  # (K_l, M)
        if level < len(member):
            member[level][:, changed] = new
        else:
            member.append(new)
    return [1 - of_level[assign[index]] for of_level, assign in zip(member, hierarchy.assign)]  # L x (B, Q)


@torch.no_grad()
def hcsc_prototype_selection(hierarchy, index, *, member=None):
    """HCSC: how likely each prototype is a true negative of each image, one matrix per level.

    keep(n, j) = 1 - softmax_i(c_j^l . c_i^{l+1} / phi_i^{l+1})[pa(y_l(n))]: a prototype under the same parent as
    the image's own is likely to be left out; at the top level all stay. The own prototype's column is 0.

    Arguments as above; member: likewise, for the softmax (K_l+1, K_l) of all levels but the top. Returns L x (B, K_l).
    Source: HCSC (2202.00455), selection of prototypes.
    """
    keep, member = [], [] if member is None else member
    for level, (prototypes, assign) in enumerate(zip(hierarchy.prototypes, hierarchy.assign)):
        own = assign[index]  # (B,)
        if level + 1 < len(hierarchy.prototypes):
            if level == len(member):
                above, phi = hierarchy.prototypes[level + 1], hierarchy.concentration[level + 1]
                member.append(torch.softmax(prototypes @ (above / phi[:, None]).T, dim=1).T)  # (K_l+1, K_l)
            chance = 1 - member[level][hierarchy.parent[level][own]]  # (B, K_l)
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
    rest = {"remove": -torch.inf, "zero": 0.0}[unselected]
    pos = (q * k.detach()).sum(dim=1, keepdim=True) / temperature  # (B, 1)
    neg = q @ queue.detach().T / temperature  # (B, Q)
    logits = (torch.cat([pos, neg.masked_fill(mask == 0, rest)], dim=1) for mask in masks)  # L x (B, 1+Q)
    return torch.stack([(level.logsumexp(dim=1) - pos[:, 0]).mean() for level in logits])


def hcsc_prototype_loss(q, hierarchy, index, masks, *, unselected="remove", exclude="own"):
    """HCSC's prototypical contrast: the own prototype against the selected ones of its level.

    loss^l = mean_n [ log(sum_{j = y_l(n) or mask^l_nj = 1} exp(q.c_j/phi_j)) - q.c_{y_l(n)}/phi_{y_l(n)} ]

    q (B, D) unit rows, the gradient goes here alone; hierarchy, index as above; masks L x (B, K_l), 1 = stays
    a negative. Returns (L,). Source: HCSC (2202.00455), prototypical loss.
    DEVIATION (released code): unselected="zero" as above; exclude="batch" takes the positives of *all* images of
    the batch, and the largest cluster number in use, off everybody's negatives: when a batch meets every
    cluster of a level none is left, and loss and gradient are exactly 0.
    """
    rest, batch = {"remove": -torch.inf, "zero": 0.0}[unselected], {"own": False, "batch": True}[exclude]
    losses = []
    for prototypes, assign, phi, mask in zip(hierarchy.prototypes, hierarchy.assign, hierarchy.concentration, masks):
        own = assign[index][:, None]  # (B, 1)
        logits = q @ (prototypes / phi[:, None]).detach().to(q.dtype).T  # (B, K_l)
        kept = logits.masked_fill(mask == 0, rest)
        if batch:
            absent = torch.arange(len(prototypes), device=q.device) >= assign.max()  # off by one: never the last
            absent.index_fill_(0, own[:, 0], True)
            kept = kept.masked_fill(absent, -torch.inf)
        pos = logits.gather(1, own)  # (B, 1)
        losses.append((kept.scatter(1, own, pos).logsumexp(dim=1) - pos[:, 0]).mean())
    return torch.stack(losses)


# ---- kNN and neighbours
def largest_products(x, test, k):
    """For each test row (B, D), the k rows of all ranks with the largest inner products: products and ids, (B, k) each;
    x (n, D) is this rank's share of the rows, test is the same on every rank. In chunks of 2^26 products.
    """
    found = [(part @ x.T).topk(min(k, len(x)), dim=1) for part in test.split(max(1, 2**26 // max(1, len(x))))]
    value, row = map(torch.cat, zip(*found))
    value, row = (all_gather_rows(part.T.contiguous()).T for part in (value, row + rows_before(x)))
    value, best = value.topk(k, dim=1)
    return value, row.gather(1, best)


def keep_largest(value, near, score, first):
    """Merge score (n, C), products with the rows first, first + 1, ..., into the T best so far: value, near (n, T)."""
    hit = (score.amax(1) > value[:, -1]).nonzero()[:, 0]  # few rows, and fewer as the search goes on
    best, place = torch.cat([value[hit], score[hit]], dim=1).topk(value.shape[1])
    before = near[hit].gather(1, place.clamp(max=value.shape[1] - 1))
    value[hit], near[hit] = best, torch.where(place < value.shape[1], before, place - value.shape[1] + first)


@torch.no_grad()
def nearest_neighbours(x, k):
    """Ids (n, k) int64 of the k other rows with the largest inner product, nearest first: exact, on any device.

    x (n, D) of any float type; unit rows make the product a cosine. A row is never its own neighbour; its exact double
    can be. Under a process group x holds this rank's rows, any number of them, ids are global, and the rows of all
    ranks pass by in blocks. The best k + 4 are sorted again in float64, ties by id. ValueError: k not in 1..N-1, NaN.
    """
    x, total = checked(x, "nearest neighbours")
    if not 1 <= k < total:
        raise ValueError(f"nearest neighbours: k = {k} of {total} rows, but k must be in 1..N-1")
    x = x if x.dtype == torch.float64 else x.float()
    start, top, side = rows_before(x), min(k + 4, total - 1), 8192 if x.is_cuda else 1024
    value, near = x.new_full((len(x), top), -math.inf), torch.zeros(len(x), top, dtype=torch.long, device=x.device)
    blocks = zip(x.split(side), value.split(side), near.split(side))
    own = dict(zip(range(start, start + len(x), side), blocks))  # this rank's, each by the id of its first row
    firsts = all_gather_rows(torch.tensor([*own], dtype=torch.long)).tolist()
    for a, b in zip(firsts, firsts[1:] + [total]):
        others = take(x, torch.arange(a, b, device=x.device))[0]  # the same on every rank
        for c, (rows, *best) in own.items():
            if a in own and a < c:
                continue  # these two met already: a product serves the rows of both
            score = rows @ others.T
            if a == c:
                score.fill_diagonal_(-math.inf)
            elif a in own:
                keep_largest(*own[a][1:], score.T, c)
            keep_largest(*best, score, a)
    table = []
    for ids in torch.arange(total, device=x.device).split(max(1, 2**22 // (top * x.shape[1]))):
        found, rows = take(near, ids)[0].sort(dim=1).values, take(x, ids)[0].double()
        exact = (take(x, found.flatten())[0].view(*found.shape, -1).double() @ rows[:, :, None])[:, :, 0]
        table.append(found.gather(1, exact.argsort(dim=1, descending=True, stable=True)[:, :k]))
    return torch.cat(table)[start:start + len(x)]


def knn_votes(sim, labels, classes, temperature=0.07):
    """Votes (B, classes): each of k neighbours gives exp(sim / temperature) to its label (B, k)."""
    sim = sim - (sim.amax(1, keepdim=True) - 60 * temperature).clamp(min=0)  # by one factor, not to overflow
    return sim.new_zeros(len(sim), classes).scatter_add_(1, labels, (sim / temperature).exp())


def knn_classify(train_x, train_y, test_x, classes, *, k=20, temperature=0.07):
    """Weighted k-nearest-neighbour classifier: votes (B, classes); their arg max is the prediction.

    train_x (N, F) and test_x (B, F) features of any length (normalised here), train_y (N,) int64. The k most similar
    training rows vote exp(cosine / temperature) (Wu et al. 2018, 1805.01978), on train_y's device. Under a process
    group train_x is this rank's share, the others are of all. Raises ValueError when k is not in 1..N.
    """
    if not 1 <= k <= len(train_y):
        raise ValueError(f"k = {k} neighbours of {len(train_y)} training rows: k must be in 1..N")
    sim, row = largest_products(F.normalize(train_x, dim=1), F.normalize(test_x, dim=1), k)
    return knn_votes(sim.to(train_y.device), train_y[row.to(train_y.device)], classes, temperature)


@torch.no_grad()
def knn_accuracy(train, test, features, *, k=20, temperature=0.07):
    """Accuracy in percent per label depth, coarse to fine; `features(images)` -> this rank's rows.

    Without a test split every tenth training picture is the test. None when there are no labels.
    """
    if train.labels is None:
        return None
    x, y, mine = features(train), train.labels, local_rows(len(train))
    use = y[:, 0] >= 0  # STL-10: most pictures carry no label
    if test is not None:
        test_x, test_y = features(test), test.labels
    else:
        held_out = torch.arange(len(y)) % 10 == 0
        test_x, test_y, use = x[held_out[mine]], y[held_out], use & ~held_out
    x, y, test_x = x[use[mine]], y[use], all_gather_rows(test_x)
    sim, row = largest_products(F.normalize(x, dim=1), F.normalize(test_x, dim=1), min(k, len(y)))
    sim, nearest = sim.cpu(), y[row.cpu()]  # (B, k), (B, k, depth)
    predicted = [knn_votes(sim, nearest[..., depth], len(names), temperature).argmax(1)
                 for depth, names in enumerate(train.class_names)]
    return [round(100 * hit.double().mean().item(), 2) for hit in torch.stack(predicted) == test_y.T]
