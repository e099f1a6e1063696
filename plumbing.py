"""What surrounds a run and says nothing about the methods: arguments, processes, folder, log, checkpoint, faults.

Nobody needs to read this to follow a script. It keeps four promises: a user's error is one sentence and exit code 2;
a run that was stopped and resumed equals the one that was not; G processes equal one; the last checkpoint survives.
"""

import argparse
import csv
import ctypes
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
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import common
from common import PICTURES, Stop, all_gather_rows, all_reduce_sum, differentiable_sum, local_rows, processes, rank

# ---- start and end


def launch(main, parse_args):
    """Run main(parse_args()) and end with the exit code and the sentence each failure deserves."""
    try:
        main(parse_args())
        if processes() > 1:  # leave together: a process that ends while another still talks to it may abort
            all_reduce_sum(torch.zeros(1))
            dist.destroy_process_group()
        return
    except Stop as stop:
        code, sentence = stop.code, stop
    except KeyboardInterrupt:
        code, sentence = 130, "stopped before the first step: nothing was written"
    except torch.cuda.OutOfMemoryError:
        code, sentence = 1, (f"out of GPU memory at {peak_memory():.1f} GiB: halve --batch-size (the learning rate "
                             "follows by itself)")
    except FloatingPointError:  # the losses were finite, but the last step was not
        code, sentence = 1, ("features = nan after the last step: stopped, the last checkpoint is good; try a lower "
                             "--base-lr or leave out --amp, in another --out")
    except RuntimeError as error:
        lost = any(word in str(error).lower() for word in ("connection", "peer", "timed out", "gloo"))
        if processes() == 1 or not lost:
            raise
        code, sentence = 1, (f"stopped because of another process ({str(error).splitlines()[0]}): read what that "
                             "one said, and continue with --resume")
    if code < 128 or rank() == 0:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    os._exit(code) if processes() > 1 else sys.exit(code)  # subtle: never wait for peers that are gone


def set_up(args):
    """Device, processes, seed: everything before the data. Returns the torch.device."""
    keep_freed_memory()
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        device = torch.device(name)
        if device.type == "cuda" and several:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Stop(f"--device {name} is not there ({str(error).splitlines()[0]}): use --device cpu") from error
    if several and not dist.is_initialized():  # tensors on the CPU travel by gloo
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    torch.manual_seed(args.seed)
    return device


def keep_freed_memory():
    """Let glibc keep large freed blocks, not fault every page in anew: the augmentation is twice as fast on the CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # no glibc, no need


# ---- arguments


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, without usage text."""

    def error(self, message):
        raise Stop(f"{message}: see --help")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the docstring's lines and show every default there is."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


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


def preset_table(presets):
    """The presets side by side, for --help."""
    rows = {name: [p[name] for p in presets.values()] for name in next(iter(presets.values()))}
    rows = [["preset", *presets], *(["--" + name.replace("_", "-"), *values] for name, values in rows.items())]
    text = [["-".join(map(str, v)) if isinstance(v, list) else str(v) for v in row] for row in rows]
    return "\n".join("".join(f"{cell:17}" for cell in row) for row in text)


def shared_arguments(description, presets):
    """A Parser with the arguments of every script. A script may declare one again where it means something else."""
    p = Parser(description=description, epilog=preset_table(presets), allow_abbrev=False,
               formatter_class=HelpFormatter, conflict_handler="resolve")
    add = p.add_argument
    add("--data", default="textures", help="textures, cifar10, cifar100, stl10 or a folder of pictures")
    add("--data-root", default="data", help="where torchvision's sets are kept")
    add("--preset", default="auto", choices=["auto", *presets], help="which defaults marked 'preset'; auto: by --data")
    add("--out", help="run folder (default: runs/<script>-<data>-<seed>)")
    add("--resume", action="store_true", help="continue the run in --out where it stopped")
    add("--arch", help="tiny, a torchvision model that ends in fc, as resnet50, or a ViT, as vit_b_16 (preset)")
    add("--stem", choices=["3x3", "3x3s2", "7x7"],
        help="a ResNet's first layer: 3x3 without max-pool, at stride 1 or 2, or torchvision's (preset)")
    add("--image-size", type=positive(int), help="side of the views, pixels (preset)")
    add("--dim", type=positive(int), default=128, help="width D of the embedding")
    add("--epochs", type=positive(int), help="passes over the data (preset)")
    add("--batch-size", type=positive(int), help="images a step, over all processes (preset)")
    add("--base-lr", type=positive(float), help="the learning rate's peak is base-lr * batch-size / 256 (preset)")
    add("--weight-decay", type=positive(float, zero=True), help="weight decay (preset)")
    add("--clusters", type=int, nargs="+", metavar="K", help="clusters a level, finest first; 0: no hierarchy (preset)")
    add("--warmup-epochs", type=positive(int, zero=True), help="epochs before the hierarchy (preset)")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--workers", type=positive(int, zero=True), default=4,
        help="processes that decode pictures too large or too many to keep in memory")
    add("--amp", action="store_true", help="bfloat16 autocast in the networks; losses stay float32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--eval-every", type=positive(int), default=1, help="epochs between kNN evaluations")
    add("--tensorboard", action="store_true", help="also write the log for tensorboard, if it is installed")
    return p


MAY_DIFFER = ("resume", "out", "device", "workers", "compile", "eval_every", "data_root", "tensorboard")


def resolve_arguments(parser, presets, argv=None):
    """Arguments from, in falling order of precedence, the command line, the resumed run, the preset.

    args.given lists what the command line named: an explicit request is obeyed or refused, whereas a
    preset's number is reduced, and said, where the data is too small for it.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    given = {str(word)[2:].split("=")[0].replace("-", "_") for word in argv if str(word).startswith("--")}
    given |= {name.removeprefix("no_") for name in given}
    preset = args.preset if args.preset != "auto" else preset_of(args.data)
    defaults = {**presets[preset], "preset": preset}
    if args.epochs:  # fewer or more epochs: the same share of them is warm-up
        defaults["warmup_epochs"] = round(defaults["warmup_epochs"] * args.epochs / defaults["epochs"])
    data = Path(args.data).resolve().name if Path(args.data).is_dir() else args.data
    script = Path(parser.prog).stem
    folder = Path(args.out or f"runs/{script}-{data}-{args.seed}")
    if args.resume and (folder / "config.json").exists():
        saved = read_json(folder / "config.json")["arguments"]
        if saved["script"] != script:
            raise Stop(f"{folder} is a run of {saved['script']}.py: resume it with that, or choose another --out")
        other = [f"--{name.replace('_', '-')} {saved[name]}" for name in (given & {*saved}) - {*MAY_DIFFER}
                 if getattr(args, name) != saved[name]]
        if other:
            raise Stop(f"{folder} was started with {', '.join(other)}: resume with the same arguments, or choose "
                       "another --out")
        defaults = {name: value for name, value in saved.items() if name not in MAY_DIFFER}
        given |= {*saved["given"]}  # asked for then: not a preset's number now
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.out, args.given, args.script = str(folder), sorted(given & {*vars(args)}), script
    return args


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


def fit(name, args, at_most, what="pictures"):
    """The argument `name`, or, where a preset asked for more than the data allows, `at_most` and a line saying so."""
    wanted, flag = getattr(args, name), "--" + name.replace("_", "-")
    if wanted <= at_most:
        return wanted
    if name in args.given:
        raise Stop(f"{flag} {wanted} is above the {at_most} {what} of {args.data}: give at most {at_most}")
    say(f"{flag} reduced from the preset's {wanted} to {at_most}, the {what} there are")
    return at_most


def fit_clusters(args, pictures):
    """--clusters as a strictly falling list, [] for none; a preset shrinks to 20 pictures a cluster."""
    clusters = [] if args.clusters == [0] else list(args.clusters)
    if clusters != sorted({*clusters}, reverse=True) or min(clusters, default=1) < 1:
        raise Stop(f"--clusters {' '.join(map(str, clusters))} must be positive and fall from level to level, finest "
                   "first (or be 0 for none)")
    if clusters and args.warmup_epochs >= args.epochs:
        say(f"--warmup-epochs {args.warmup_epochs} of {args.epochs}: the run ends before the warm-up does")
    finest = max(clusters, default=0)
    if "clusters" in args.given and finest > pictures:
        raise Stop(f"--clusters {finest} is above the {pictures} pictures of {args.data}: give at most {pictures}")
    if "clusters" in args.given or finest <= pictures / 20:
        return clusters
    fitted = sorted({max(2, round(k / finest * pictures / 20)) for k in clusters}, reverse=True)
    if fitted[0] > pictures:
        raise Stop(f"{pictures} pictures are too few for a tree of clusters: add some, or give --clusters 0")
    say(f"--clusters reduced from the preset's {clusters} to {fitted}, 20 pictures a cluster")
    return fitted


def fit_batch(args, pictures):
    """--batch-size, or fewer where a preset asks for more than there are pictures; a multiple of the ranks."""
    size = processes()
    batch_size = fit("batch_size", args, at_most=pictures) // size * size
    if batch_size != args.batch_size and "batch_size" in args.given:
        raise Stop(f"--batch-size {args.batch_size} cannot be shared by {size} processes: make it a multiple")
    if batch_size < 2 * size:
        raise Stop(f"a batch of {batch_size} images for {size} processes is too small for batch norm: --batch-size "
                   f"must be at least {2 * size}, and so must the number of pictures")
    return batch_size


def evaluation(args, device, train, test, backbone):
    """Two functions: features(network, images) -> (n, F) of this process's pictures, by the network in evaluation mode;
    knn() -> accuracy of the backbone's features in percent, a label depth, or None without labels.
    """
    def features(network, images):
        return common.extract_features(network, images, args.image_size, device=device, workers=args.workers,
                                       amp=args.amp)

    return features, lambda: common.knn_accuracy(train, test, lambda images: features(backbone, images))


# ---- several processes


def set_lr(optimizer, lr):
    """The learning rate of every parameter, from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def average_gradients(parameters):
    """Mean over ranks of every gradient, in one collective; nothing at world size 1."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if processes() > 1:
        flat = all_reduce_sum(torch.cat([g.flatten() for g in gradients])) / processes()
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the rows of all ranks, on any device (torch's own needs a GPU)."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or processes() == 1:
            return super().forward(x)
        over = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() / x.shape[1] * processes()  # equal slices of the batch on every rank
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


def sync_batch_norm(module):
    """Under several ranks, turn every batch norm into a SyncBatchNorm, in place: nothing else about it changes."""
    for child in module.modules():
        if processes() > 1 and isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = SyncBatchNorm
    return module


def keys(encode, view, bn, generator):
    """encode(view), keys (b, D) of the views (b, 3, S, S); bn "shuffle": in batches mixed across processes (MoCo's
    shuffled BN), so that a batch's statistics do not tell which key belongs to which query.
    """
    if bn == "sync" or processes() == 1:  # one process has nobody to mix with
        return encode(view)
    everyone = all_gather_rows(view)  # (B, 3, S, S) of all processes
    order, mine = torch.randperm(len(everyone), generator=generator), local_rows(len(everyone))
    shuffled = all_gather_rows(encode(everyone[order[mine]]))  # (B, D)
    return shuffled[order.argsort()[mine].to(shuffled.device)]


# ---- the run folder


class Run:
    """A run's folder and what it remembers: config.json, log.jsonl, checkpoint.pt, backbone.pt.

    Every rank calls every method in the same order; rank 0 writes. `keep` stands for what the epoch's features gave,
    a Hierarchy or a table of neighbours: a tensor, a tuple of lists of tensors, or None.
    """

    def __init__(self, args):
        self.args, self.folder, self.signal, self.board = args, Path(args.out), 0, None
        self.checkpoint_path, self.log, self.parts = self.folder / "checkpoint.pt", [], {}
        self.sums, self.steps, self.last = {}, 0, None  # of the epoch so far: sums of its losses, steps, last losses
        if not args.resume and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise Stop(f"{self.folder} exists and is not overwritten: continue it with --resume, or choose another "
                       "--out")
        if args.resume and not (self.folder / "config.json").exists():
            raise Stop(f"{self.folder} holds no run to resume: leave out --resume, or correct --out")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise Stop("--tensorboard needs the package tensorboard: install it, or leave that out") from error
            self.board = SummaryWriter  # opened with the first row
        all_reduce_sum(torch.zeros(1))  # every rank has looked before rank 0 writes
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)

    def start(self, train, device, **derived):
        """Say what the run will do; create the folder and config.json, or check that what is resumed had the same data.

        train: Images; derived: numbers that follow from arguments and data.
        """
        self.train, self.batch_size, path = train, derived["batch_size"], self.folder / "config.json"
        derived = dict(pictures=len(train), fingerprint=train.fingerprint(), processes=processes(), device=str(device),
                       **derived)
        shown = {**{name: value for name, value in vars(self.args).items() if name != "given"}, **derived}
        say(f"{self.folder}, preset {self.args.preset}")
        for name, value in shown.items():
            say(f"  {name:20} {value}")
        if path.exists():
            saved = read_json(path)["derived"]
            changed = [name for name in saved if saved[name] != derived.get(name)]
            if differs := [f"{n} {saved[n]}" for n in changed if n in ("pictures", "fingerprint", "clusters")]:
                raise Stop(f"{self.folder} ran on other data ({', '.join(differs)}): give the same --data, or choose "
                           "another --out")
            if changed:
                say("resumed with another " + ", ".join(f"{name} ({saved[name]} before)" for name in changed))
        elif rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Stop(f"cannot create {self.folder} ({error.strerror}): choose another --out") from error
            write_json(path, dict(arguments=vars(self.args), derived=derived, **circumstances()))

    def resume(self, device, **parts):
        """Load the checkpoint, if there is one, into `parts` (model, optimizer) -> (epoch, step) to go on at, keep."""
        self.parts = parts
        if not self.checkpoint_path.exists():
            return 0, 0, None
        state = load_file(self.checkpoint_path, device)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            epoch, step, self.sums, self.steps, keep = (state[n] for n in ("epoch", "step", "sums", "steps", "keep"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Stop(f"{self.checkpoint_path} is no checkpoint of this network: restore it from a copy, or start "
                       "again with another --out") from error
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self.log = [row for row in map(json.loads, lines) if row["epoch"] <= epoch]  # a later one will be redone
        return epoch, step, keep

    def note_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    def save(self, epoch, step, keep):
        """checkpoint.pt: the one before it stays intact until this one is complete."""
        self.check()
        keep = tuple(keep) if isinstance(keep, tuple) else keep  # a Hierarchy as plain containers
        write_atomically(self.checkpoint_path, file_of(dict(
            {name: part.state_dict() for name, part in self.parts.items()}, epoch=epoch, step=step, keep=keep,
            sums=self.sums, steps=self.steps)))

    def timed(self, batches, epoch, steps):
        """The same batches, with a progress bar on a terminal; time between asking and getting counts as waiting."""
        bar = tqdm(batches, f"epoch {epoch + 1}", steps, disable=rank() > 0 or None, leave=False, unit="step")
        iterator, self.begun, self.waited, self.here = iter(bar), time.perf_counter(), 0.0, 0
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def end_step(self, epoch, step, values, keep):
        """Add a dict of scalars to the epoch's means; after a signal on any rank save and stop.

        subtle: a value that is not finite stops the run one step late, so that a GPU need not be waited for; what is
        saved is checked first.
        """
        self.check()
        self.last = step, {name: value.detach().double() for name, value in values.items()}
        self.sums = {name: self.sums.get(name, 0) + value for name, value in self.last[1].items()}
        self.steps, self.here = self.steps + 1, self.here + 1
        number = int(all_gather_rows(torch.tensor([self.signal])).max())
        if number:
            self.save(epoch, step + 1, keep)
            raise Stop(f"stopped, the state is in {self.checkpoint_path}: continue with --resume", 128 + number)

    def check(self):
        """Stop if the last step's values were not finite."""
        if self.last is None:
            return
        step, values = self.last
        values = dict(zip(values, torch.stack([*values.values()]).tolist()))
        if bad := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise Stop(f"{', '.join(bad)} at step {step}: stopped, the last checkpoint is good; try a lower --base-lr "
                       "or leave out --amp, in another --out", code=1)

    def end_epoch(self, epoch, keep, knn, **notes):
        """Write the epoch's row: means, speed, knn() where it is due, notes; then save the state."""
        self.check()
        means = {name: (all_reduce_sum(total.clone()) / self.steps / processes()).item()
                 for name, total in self.sums.items()}
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        due = epoch + 1 == self.args.epochs or (epoch + 1) % self.args.eval_every == 0
        self.write(dict(epoch=epoch + 1, **means, lr=self.parts["optimizer"].param_groups[0]["lr"],
                        images_per_s=round(self.batch_size * self.here / seconds, 1),
                        data_wait=round(self.waited / seconds, 4), peak_memory_gib=round(peak_memory(), 3),
                        knn=knn() if due else None, **notes, unreadable=len(self.train.unreadable)))
        self.sums, self.steps, self.last = {}, 0, None
        self.save(epoch + 1, 0, keep)

    def write(self, row):
        """Append one object to log.jsonl and print it as one line."""
        self.log.append(row)
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.log).encode())
        if self.board and rank() == 0:
            with self.board(self.folder) as board:
                for name, value in row.items():
                    for place, number in enumerate(value if isinstance(value, list) else [value]):
                        if number is not None:
                            board.add_scalar(f"{name}/{place}", number, row["epoch"])
        say("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                      f"{name} {'/'.join(map(str, value)) if isinstance(value, list) else value}"
                      for name, value in row.items() if value is not None))

    def save_backbone(self, backbone):
        """backbone.pt: torchvision's key names, without fc."""
        weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
        write_atomically(self.folder / "backbone.pt", file_of(weights))

    def verdict(self):
        """The last lines of a run: what was reached against pixels and chance, and what to run next."""
        first, last = self.log[0], self.log[-1]
        if last["knn"] is None:
            say(f"no labels, so no accuracy: look at {self.folder}/tree.png")
        else:
            say("\n" + f"{'kNN accuracy (%)':20}" + "".join(f"{len(c):>7} classes" for c in self.train.class_names))
            before = {"raw pixels": first["knn_pixels"], "untrained network": first["knn"]}
            for name, values in {**before, "trained network": last["knn"]}.items():
                if values:
                    say(f"{name:20}" + "".join(f"{value:15.1f}" for value in values))
            best = [max(v) for v in zip(*filter(None, before.values()))]
            say(f"{'error, of before':20}" + "".join(f"{(100 - now) / max(100 - was, 1e-9):14.2f}x"
                                                    for now, was in zip(last["knn"], best)))
        if (self.folder / "tree.png").exists():
            say(f"\nthe learnt tree  {self.folder}/tree.png, and every picture's clusters in clusters.csv")
        say(f"the backbone     {self.folder}/backbone.pt\nnext             python eval_linear.py --run {self.folder}")


def file_of(state):
    """What torch.save writes, as bytes: on a full disk torch.save itself ends in an error that is no OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_atomically(path, content):
    """Rank 0: bytes to a temporary file beside `path`, flushed to disk, renamed over `path`."""
    if rank() > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Stop(f"cannot write {path} ({error.strerror}): what was there before is intact, make room and continue "
                   "with --resume", code=1) from error


def write_json(path, content):
    """An indented JSON file."""
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode())


def circumstances():
    """What is noted beside every result: command, date, versions."""
    return dict(command=" ".join([Path(sys.executable).name, *sys.argv]), date=time.strftime("%Y-%m-%d"),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))


def load_file(path, device="cpu"):
    """A torch file, tensors and plain containers only: nothing in it is ever executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise Stop(f"{path} does not exist: check the path") from error
    except Exception as error:  # truncated, foreign, malicious: torch raises many types
        raise Stop(f"{path} is not a readable checkpoint ({type(error).__name__}): restore it from a copy or give "
                   "another") from error


def read_json(path):
    """config.json of a run folder, its arguments and derived values."""
    try:
        config = json.loads(path.read_text())
        return {name: dict(config[name]) for name in ("arguments", "derived")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(f"{path} is not readable ({type(error).__name__}): give another --out or --run") from error


# ---- what an epoch's row of the log holds


def peak_memory():
    """GiB: the device's high-water mark on CUDA, else the process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def feature_std(embedding):
    """Spread of the unit rows of (B, D): 1 where they point everywhere, 0 where all point one way."""
    return embedding.detach().std(dim=0).mean() * embedding.shape[1] ** 0.5


def say(line):
    """Print on rank 0, at once."""
    if rank() == 0:
        print(line, flush=True)


# ---- the tree one can look at

PALETTE = ("#dbe9f6", "#fde5cd", "#dcefdc", "#f6dada", "#e6def0", "#ebe3df", "#f8e1f1", "#eeeeee", "#f2f3d1", "#d5f1f4")
SIZE, GAP, CELL = 40, 4, 150  # of a picture, between pictures, of a cluster's caption; pixels


def write_tree(folder, images, features, hierarchy, rows=27, columns=10):
    """tree.png and clusters.csv of this rank's features (n, D) and the Hierarchy; rank 0 writes.

    Each row of the picture is a path of the learnt tree, coarse on the left: a cell a cluster with its size,
    its label purity (where labels exist) and the picture nearest to its prototype, then the pictures nearest
    to the leaf.
    """
    own = [(features * p[a[local_rows(len(images))]]).sum(1) for p, a in zip(hierarchy.prototypes, hierarchy.assign)]
    own = [all_gather_rows(similarity).cpu() for similarity in own]  # L x (N,), to the own prototype
    assign = torch.stack(hierarchy.assign).cpu()  # (L, N)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [["image", *(f"level{level}" for level in range(len(assign)))],
         *([name, *row] for name, row in zip(images.names, assign.T.tolist()))])
    write_atomically(folder / "clusters.csv", table.getvalue().encode(errors="surrogateescape"))

    paths, margin = some_paths(assign, rows), len(assign) * CELL + 2 * GAP
    canvas = Image.new("RGB", (margin + columns * (SIZE + GAP) + GAP, 28 + len(paths) * (SIZE + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    draw.text((margin, 8), "nearest to the leaf's prototype", "black", font)

    def paste(i, left, top):
        picture = TF.to_pil_image(images.picture(i)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        canvas.paste(picture, (left, top))

    for column, prototypes in enumerate(hierarchy.prototypes[::-1]):
        title = f"level {len(assign) - 1 - column}: {len(prototypes)} clusters"
        draw.text((GAP + column * CELL, 8), title, "black", font)
    for r, path in enumerate(paths):
        y = 28 + r * (SIZE + GAP)
        for column, level in enumerate(range(len(path) - 1, -1, -1)):
            if r and paths[r - 1][level:] == path[level:]:
                continue  # the cell above goes on
            left = GAP + column * CELL
            last = max(s for s in range(r, len(paths)) if paths[s][level:] == path[level:])
            draw.rectangle((left, y, left + CELL - GAP, y + (last - r + 1) * (SIZE + GAP) - GAP),
                           fill=PALETTE[path[-1] % len(PALETTE)])
            members = (assign[level] == path[level]).nonzero()[:, 0]
            paste(int(members[own[level][members].argmax()]), left, y)
            for i, line in enumerate([f"n = {len(members)}", *describe(images, members)]):
                draw.text((left + SIZE + GAP, y + 13 * i), line, "black", font)
        members = (assign[0] == path[0]).nonzero()[:, 0]
        for c, i in enumerate(members[own[0][members].argsort(descending=True)[:columns]].tolist()):
            paste(i, margin + c * (SIZE + GAP), y)
    picture = io.BytesIO()
    canvas.save(picture, "png", optimize=True)
    write_atomically(folder / "tree.png", picture.getvalue())


def describe(images, members, width=16):
    """The commonest label of these pictures and its share, at the finest level that half of them share."""
    best = []
    for level, names in enumerate(images.class_names if images.labels is not None else ()):
        counts = torch.bincount(images.labels[members, level].clamp(min=0), minlength=len(names))
        share = counts.max().item() / len(members)
        if not best or share >= 0.5:
            name = names[int(counts.argmax())].split("/")[-1]
            best = [name if len(name) <= width else name[:width - 1] + "…", f"{100 * share:.0f} %"]
    return best


def some_paths(assign, rows):
    """Clusters (L, N) -> about `rows` paths [finest, ..., coarsest]: of each coarse cluster, largest first, the largest
    leaves.
    """
    paths, sizes = assign.unique(dim=1, return_counts=True)
    paths = [path for _, path in sorted(zip(sizes.tolist(), paths.T.tolist()), reverse=True)]
    tops = assign[-1].bincount().argsort(descending=True, stable=True)[:rows].tolist()
    each = max(1, rows // len(tops))
    return [path for top in tops for path in sorted([path for path in paths if path[-1] == top][:each],
                                                    key=lambda path: path[::-1])]
