"""What surrounds a run and says nothing about the methods: arguments, processes, folder, log, checkpoint, faults.

Nobody needs to read this to follow a script. It keeps four promises: a user's error is one sentence and exit code 2;
a run that was stopped and resumed equals the one that was not; G processes equal one; the last checkpoint survives.
"""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
import zipfile
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
from common import (
    Stop,
    all_gather_rows,
    all_reduce_sum,
    decode,
    differentiable_sum,
    local_rows,
    picture_files,
    processes,
    rank,
)

TIMEOUT = timedelta(minutes=30)  # a process that is silent for longer is lost

# ---- start and end


def launch(main, parse_args):
    """Run main(parse_args()) and end with the exit code and the sentence each failure deserves."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # any name can be printed in any locale
    try:
        main(parse_args())
        if processes() > 1:  # leave together: a process that ends while another still talks to it may abort
            all_reduce_sum(torch.zeros(1))
            dist.destroy_process_group()
        return
    except (Exception, KeyboardInterrupt) as error:
        known = explanation(error)
        if known is None:
            raise
    code, sentence = known
    if sentence and (code < 128 or rank() == 0):
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    if code == 141:  # nobody reads what is printed: nothing more is
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(code) if processes() > 1 else sys.exit(code)  # subtle: never wait for peers that are gone


def explanation(error):
    """(exit code, sentence) of an exception that a user can cause, None of one that is a fault of the program."""
    text, first = str(error), str(error).partition("\n")[0]
    lost = ("connection", "peer", "timed out", "gloo", "nccl", "watchdog", "abort") if processes() > 1 else ()
    if isinstance(error, Stop):
        return error.code, text
    for kind, words, code, sentence in (
            (KeyboardInterrupt, [""], 130, "interrupted: what was saved before is intact"),
            (BrokenPipeError, [""], 141, ""),  # as a tool that SIGPIPE ends
            (OSError, [""], 2, f"{first}: correct the path or its permissions"),
            (FloatingPointError, [""], 1, f"features = nan after the last step: {LOWER}"),
            (RuntimeError, ["out of memory", "alloc_failed"], 1,  # CUDA's words and its libraries'
             f"out of GPU memory at {peak_memory()} GiB: give a smaller --batch-size"),
            (RuntimeError, lost, 1, f"stopped because of another process ({first}): read what that one said, and "
                                    "continue with --resume"),
            (RuntimeError, ["kernel size", "too small"], 2,
             f"the pictures are too small for this network ({first}): give a larger --image-size, or another --stem"),
            ((RuntimeError, MemoryError), ["allocate memory", "not enough memory", "overflow"], 2,
             f"a size is too large for this machine ({first}): give smaller numbers")):
        if isinstance(error, kind) and any(word in text.lower() for word in words):
            return code, sentence


def set_up(args):
    """Device, processes, seed: everything before the data. Returns the torch.device."""
    keep_freed_memory()
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if several else device.index or 0)
            torch.cuda.set_device(device)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # Apple's GPUs have none such
    except (RuntimeError, AssertionError, TypeError) as error:
        raise Stop(f"--device {name} is not there, or lacks something ({str(error).splitlines()[0]}): use --device "
                   "cpu") from error
    if several and not dist.is_initialized():  # tensors on the CPU travel by gloo
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            raise Stop(f"WORLD_SIZE is set, but the processes do not meet ({str(error).splitlines()[0]}): start them "
                       "with torchrun, or unset WORLD_SIZE") from error
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


LARGEST = {int: 10**9, float: 1e30}  # what float32 and the machine bear


def positive(kind, zero=False, most=None):
    """An argparse type: int or float above 0 (or from 0 on), at most `most`."""
    def parse(text):
        value, limit = kind(text), LARGEST[kind] if most is None else most
        if not (0 <= value if zero else 0 < value) or not value <= limit:
            raise argparse.ArgumentTypeError(f"{text} must be {'at least' if zero else 'above'} 0 and at most {limit}")
        return value
    parse.__name__ = kind.__name__  # argparse's "invalid int value: 'x'"
    return parse


def preset_table(presets):
    """The presets side by side, for --help."""
    rows = {name: [p[name] for p in presets.values()] for name in next(iter(presets.values()))}
    rows = [["preset", *presets], *(["--" + name.replace("_", "-"), *values] for name, values in rows.items())]
    text = [["-".join(map(str, v)) if isinstance(v, list) else str(v) for v in row] for row in rows]
    return "\n".join(f"{name:23}" + "".join(f"{cell:17}" for cell in cells) for name, *cells in text)


def shared_arguments(description, presets):
    """A Parser with the arguments of every script. A script may declare one again where it means something else."""
    p = Parser(description=description, epilog=preset_table(presets), allow_abbrev=False,
               formatter_class=HelpFormatter, conflict_handler="resolve")
    add = p.add_argument
    add("--data", default="textures", help="textures, cifar10, cifar100, stl10 or a folder of pictures")
    add("--data-root", default="data", help="where torchvision's sets are kept")
    add("--validation", action="store_true", help="evaluate on pictures held out from training, not on the test's")
    add("--preset", default="auto", choices=["auto", *presets], help="which defaults marked 'preset'; auto: by --data")
    add("--out", help="run folder (default: runs/<script>-<data>-<seed>)")
    add("--resume", action="store_true", help="continue the run in --out where it stopped")
    add("--arch", help="tiny, a torchvision model that ends in fc, as resnet50, or a ViT, as vit_b_16 (preset)")
    add("--stem", choices=["3x3", "3x3s2", "7x7"],
        help="a ResNet's first layer: 3x3 without max-pool, at stride 1 or 2, or torchvision's (preset)")
    add("--image-size", type=positive(int, most=4096), help="side of the views, pixels (preset)")
    add("--dim", type=positive(int), default=128, help="width D of the embedding")
    add("--epochs", type=positive(int), help="passes over the data (preset)")
    add("--batch-size", type=positive(int), help="images a step, over all processes (preset)")
    add("--base-lr", type=positive(float), help="the learning rate's peak is base-lr * batch-size / 256 (preset)")
    add("--weight-decay", type=positive(float, zero=True), help="weight decay (preset)")
    add("--clusters", type=int, nargs="+", metavar="K", help="clusters a level, finest first; 0: no hierarchy (preset)")
    add("--warmup-epochs", type=positive(int, zero=True), help="epochs before the hierarchy (preset)")
    add("--seed", type=positive(int, zero=True), default=0, help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--workers", type=positive(int, zero=True), default=4,
        help="threads that decode pictures too large or too many to keep in memory")
    add("--amp", action="store_true", help="bfloat16 autocast in the networks; losses stay float32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--eval-every", type=positive(int), default=1, help="epochs between kNN evaluations")
    add("--tensorboard", action="store_true", help="also write the log for tensorboard, if it is installed")
    return p


MAY_DIFFER = ("resume", "out", "data", "device", "workers", "compile", "eval_every", "data_root", "tensorboard")


def resolve_arguments(parser, presets, argv=None):
    """Arguments from, in falling order of precedence, the command line, the resumed run, the preset.

    args.given lists what the command line named: an explicit request is obeyed or refused, whereas a
    preset's number is reduced, and said, where the data is too small for it.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    given = {str(word)[2:].split("=")[0].replace("-", "_") for word in argv if str(word).startswith("--")}
    given |= {name.removeprefix("no_") for name in given}
    data = Path(args.data).resolve().name if Path(args.data).is_dir() else args.data
    script = Path(parser.prog).stem
    folder = Path(args.out or f"runs/{script}-{data}-{args.seed}")
    if args.resume and (folder / "config.json").exists():
        defaults = saved_arguments(folder, script, parser)
        other = [f"--{name.replace('_', '-')} {defaults[name]}" for name in (given & {*defaults}) - {*MAY_DIFFER}
                 if getattr(args, name) not in (defaults[name], "auto")]
        if other:
            raise Stop(f"{folder} was started with {', '.join(other)}: resume with the same arguments, or choose "
                       "another --out")
        given |= {*defaults.pop("given")}  # asked for then: not a preset's number now
    else:
        preset = args.preset if args.preset != "auto" else preset_of(args.data)
        defaults = {**presets[preset], "preset": preset}
        if args.epochs:  # fewer or more epochs: the same share of them is warm-up
            defaults["warmup_epochs"] = round(defaults["warmup_epochs"] * args.epochs / defaults["epochs"])
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.out, args.given, args.script = str(folder), sorted(given & {*vars(args)}), script
    args.preset = defaults["preset"]  # also where the command line says auto
    return args


def saved_arguments(folder, script, parser):
    """The arguments of the run in `folder`, each one such as this script could have written; and `given`."""
    saved = read_json(folder / "config.json")["arguments"]
    if saved.get("script") != script:
        raise Stop(f"{folder}/config.json is of a run of {saved.get('script')}.py: resume it with that, or choose "
                   "another --out")

    def possible(action, value):  # what the parser makes of it is what it is
        values = value if action.nargs else [value]
        try:
            return (type(value) is bool if action.nargs == 0 else value in (action.choices or [value]) and
                    values == [(action.type or str)(str(v)) for v in values])
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            return False

    own = {action.dest: action for action in parser._actions if action.dest not in ("help", "resume", "out")}
    bad = [name for name, action in own.items() if not possible(action, saved.get(name))]
    given = saved.get("given")
    if bad or not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise Stop(f"{folder}/config.json is of no run of this program, see its {[*bad, 'given'][0]}: restore it, or "
                   "choose another --out")
    return {**{name: saved[name] for name in own}, "given": given}


def preset_of(data):
    """textures, cifar (pictures up to 64 px), photos (fewer than 100,000) or imagenet."""
    if data == "textures" or not Path(data).is_dir():
        return {"textures": "textures", "stl10": "photos"}.get(data, "cifar")
    many = list(itertools.islice(picture_files(data), 100_000))
    try:
        small = max(decode(many[0]).shape[1:]) <= 64
    except Exception:  # no picture, or a damaged one: load_data will say so
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
    if clusters != sorted({*clusters}, reverse=True) or min(clusters, default=2) < 2:  # one cluster tells nothing apart
        raise Stop(f"--clusters {' '.join(map(str, clusters))} must be at least 2 and fall from level to level, finest "
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


def average(tensors):
    """Mean over ranks of tensors, in place and in one collective; nothing at world size 1."""
    if processes() > 1 and tensors:
        flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors])) / processes()
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def average_gradients(parameters):
    """Mean over ranks of every gradient."""
    average([p.grad for p in parameters if p.grad is not None])


def average_statistics(network):
    """Mean over ranks of the running statistics of batch norms that see one rank's rows: one network on all ranks."""
    average([statistic for norm in network.modules()
             if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, SyncBatchNorm)
             for statistic in (norm.running_mean, norm.running_var) if statistic is not None])


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
        scale = (var + self.eps).rsqrt() * (self.weight if self.affine else 1)
        y = centred * scale.view(shape)
        return (y + self.bias.view(shape) if self.affine else y).to(x.dtype)


def sync_batch_norm(module):
    """Under several ranks, turn every batch norm into a SyncBatchNorm, in place: nothing else about it changes."""
    for child in module.modules():
        if processes() > 1 and isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = SyncBatchNorm
    return module


def make_keys(encode, view, bn, generator):
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
        self.args, self.folder, self.board = args, Path(args.out), None
        self.signal, self.saving, self.parent = 0, False, os.getppid()
        self.checkpoint_path, self.log, self.parts = self.folder / "checkpoint.pt", [], {}
        self.sums, self.steps, self.last = {}, 0, None  # of the epoch so far: sums of its losses, steps, last losses
        if args.resume and not (self.folder / "config.json").exists():
            raise Stop(f"{self.folder} holds no run to resume: leave out --resume, or correct --out")
        if not args.resume:
            refuse_existing(self.folder)
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise Stop("--tensorboard needs the package tensorboard: install it, or leave that out")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)

    def start(self, train, device, **derived):
        """Say what the run will do; take the folder; write config.json, or check that a resumed run had the same data.

        train: Images; derived: numbers that follow from arguments and data.
        """
        self.train, self.batch_size, path = train, derived["batch_size"], self.folder / "config.json"
        derived = dict(pictures=len(train), fingerprint=train.fingerprint(), processes=processes(), device=str(device),
                       **derived)
        shown = {**{name: value for name, value in vars(self.args).items() if name != "given"}, **derived}
        say(f"{self.folder}, preset {self.args.preset}")
        for name, value in shown.items():
            say(f"  {name:20} {value}")
        if rank() == 0:
            claim(self.folder, new=not self.args.resume)
        all_reduce_sum(torch.zeros(1))  # nobody goes on before
        if not self.args.resume:
            write_json(path, dict(arguments=vars(self.args), derived=derived, **circumstances()))
            return
        saved = read_json(path)["derived"]
        changed = [name for name in saved if saved[name] != derived.get(name)]
        if differs := [f"{n} {saved[n]}" for n in changed if n in ("pictures", "fingerprint", "clusters")]:
            raise Stop(f"{self.folder} ran on other data ({', '.join(differs)}): give the same --data, or choose "
                       "another --out")
        if changed:
            say("resumed with another " + ", ".join(f"{name} ({saved[name]} before)" for name in changed))

    def resume(self, device, **parts):
        """Load the checkpoint, if there is one, into `parts` (model, optimizer) -> (epoch, step) to go on at, keep.

        It is read on the CPU; a Hierarchy goes to the device, a table and what Adam counts stay there.
        """
        self.parts = parts
        if not self.checkpoint_path.exists():
            return 0, 0, None
        state = load_file(self.checkpoint_path)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            epoch, step, self.steps = (state[name] for name in ("epoch", "step", "steps"))
            if {type(epoch), type(step), type(self.steps)} != {int} or min(epoch, step) < 0 or epoch > self.args.epochs:
                raise ValueError("no count")
            self.sums, keep = {name: float(total) for name, total in state["sums"].items()}, state["keep"]
            if not (keep is None or torch.is_tensor(keep) or [*map(type, keep)] == [list] * 4):
                raise ValueError("no Hierarchy")
            if isinstance(keep, tuple | list):
                keep = tuple([level.to(device) for level in levels] for levels in keep)
        except Exception as error:  # torch raises many types for what it does not expect
            raise Stop(f"{self.checkpoint_path} is no checkpoint of this run ({type(error).__name__}): restore it from "
                       "a copy, or start again with another --out") from error
        self.log = rows_of_log(self.folder / "log.jsonl", epoch)
        return epoch, step, keep

    def note_signal(self, number, frame):
        """The step is finished and saved first. A second Ctrl-C stops one process at once, but never while it saves."""
        if self.signal == number == signal.SIGINT and processes() == 1 and not self.saving:
            raise KeyboardInterrupt
        self.signal = number

    def asked_to_stop(self):
        """The signal that any rank got, or 0; the same on all ranks. Whoever has lost torchrun got one too."""
        if processes() > 1 and os.getppid() != self.parent:
            self.signal = signal.SIGTERM
        return int(all_gather_rows(torch.tensor([self.signal])).max())

    def state(self, epoch, step, keep):
        """What a checkpoint holds, the same on all ranks; refused where it is not finite."""
        self.check()
        keep = tuple(keep) if isinstance(keep, tuple) else keep  # a Hierarchy as plain containers
        state = dict({name: part.state_dict() for name, part in self.parts.items()}, epoch=epoch, step=step, keep=keep,
                     sums={name: float(total) for name, total in self.sums.items()}, steps=self.steps)
        refuse_not_finite(state)
        return state

    def save(self, state):
        """checkpoint.pt: the one before it stays intact until this one is complete. After a signal Stop, all ranks."""
        self.saving = True
        write_atomically(self.checkpoint_path, state)
        self.saving = False
        if number := self.asked_to_stop():  # every rank waits here for the one that saves
            raise Stop(f"stopped, the state is in {self.checkpoint_path}: continue with --resume", 128 + number)

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
        """Add a dict of scalars, means over this rank's rows, to the epoch's; after a signal on any rank save and stop.

        subtle: a value that is not finite stops the run one step late, so that a GPU need not be waited for; what is
        saved is checked first.
        """
        self.check()
        average_statistics(self.parts["model"])
        means = all_reduce_sum(torch.stack([value.detach().double() for value in values.values()])) / processes()
        self.last = step, dict(zip(values, means))
        self.sums = {name: self.sums.get(name, 0) + value for name, value in self.last[1].items()}
        self.steps, self.here = self.steps + 1, self.here + 1
        if self.asked_to_stop():
            self.save(self.state(epoch, step + 1, keep))

    def check(self):
        """Stop if the last step's values were not finite."""
        if self.last is None:
            return
        step, values = self.last
        values = dict(zip(values, torch.stack([*values.values()]).tolist()))
        if bad := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
            raise Stop(f"{', '.join(bad)} at step {step}: {LOWER}", code=1)

    def end_epoch(self, epoch, keep, knn, **notes):
        """Write the epoch's row: means, speed, knn() where it is due, notes; then save the state."""
        self.check()
        means = {name: float(total) / self.steps for name, total in self.sums.items()}
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        self.sums, self.steps, self.last = {}, 0, None
        state = self.state(epoch + 1, 0, keep)  # first of all: the row, too, is that of a good network
        due = epoch + 1 == self.args.epochs or (epoch + 1) % self.args.eval_every == 0
        self.write(dict(epoch=epoch + 1, **means, lr=self.parts["optimizer"].param_groups[0]["lr"],
                        images_per_s=round(self.batch_size * self.here / seconds, 1),
                        data_wait=round(self.waited / seconds, 4), peak_memory_gib=peak_memory(),
                        knn=knn() if due else None, **notes, unreadable=len(self.train.unreadable)))
        self.save(state)

    def write(self, row):
        """Append one object to log.jsonl and print it as one line."""
        self.log.append(row)
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.log).encode())
        if self.args.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = self.board or SummaryWriter(self.folder)
            for name, value in row.items():
                for place, number in enumerate(value if isinstance(value, list) else [value]):
                    if number is not None:
                        self.board.add_scalar(f"{name}/{place}", number, row["epoch"])
            self.board.flush()
        say("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else
                      f"{name} {'/'.join(map(str, value)) if isinstance(value, list) else value}"
                      for name, value in row.items() if value is not None))

    def save_backbone(self, backbone):
        """backbone.pt: torchvision's key names, without fc."""
        weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
        refuse_not_finite(weights)
        write_atomically(self.folder / "backbone.pt", weights)

    def verdict(self):
        """The last lines of a run: what was reached against pixels and chance, and what to run next."""
        last = self.log[-1]["knn"] if self.log else None  # rows may be lost
        if last is None:
            say("no labels, so no accuracy")
        else:
            say("\n" + f"{'kNN accuracy (%)':20}" + "".join(f"{len(c):>7} classes" for c in self.train.class_names))
            first = self.log[0] if self.log[0]["epoch"] == 0 else {}
            before = {"raw pixels": first.get("knn_pixels"), "untrained network": first.get("knn")}
            before = {name: values for name, values in before.items() if values}
            for name, values in {**before, "trained network": last}.items():
                say(f"{name:20}" + "".join(f"{value:15.1f}" for value in values))
            if before:
                errors = [(100 - now) / max(100 - max(was), 1e-9) for now, *was in zip(last, *before.values())]
                say(f"{'error, of before':20}" + "".join(f"{error:14.2f}x" for error in errors))
        if (self.folder / "tree.png").exists():
            say(f"\nthe learnt tree  {self.folder}/tree.png, and every picture's clusters in clusters.csv")
        more = " --data a/folder/with/labels" if self.train.labels is None else ""
        say(f"the backbone     {self.folder}/backbone.pt\n"
            f"next             python eval_linear.py --run {self.folder}{more}")


def refuse_existing(folder):
    """Stop where there is a run, or anything else but the torn files of one that could not begin."""
    if folder.exists() and (not folder.is_dir() or any(path.suffix != ".tmp" for path in folder.iterdir())):
        raise Stop(f"{folder} exists and is not overwritten: continue it with --resume, or choose another --out")


CLAIMED = set()  # folders that this process has


def claim(folder, new):
    """Create the folder, take it for this process until it ends, however it ends; Stop where another one has it.

    The lock is the system's and on the folder itself: nothing is left behind. Windows has none such: no claim there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"cannot create {folder} ({error.strerror}): choose another --out") from error
    with contextlib.suppress(ImportError):
        import fcntl
        if folder.resolve() not in CLAIMED:
            CLAIMED.add(folder.resolve())
            handle = os.open(folder, os.O_RDONLY)
            os.register_at_fork(after_in_child=lambda: os.close(handle))  # a worker may outlive us
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Stop(f"{folder} is in use by another process: wait until that ends, or choose another "
                           "--out") from error
            except OSError:
                pass  # a file system without locks
    if new:
        refuse_existing(folder)  # a run that began, and perhaps ended, since we looked
    for torn in folder.glob("*.tmp"):
        torn.unlink()


LOWER = "stopped, the last checkpoint is good; try a lower --base-lr or leave out --amp, in another --out"


def refuse_not_finite(state):
    """Stop, naming them, if tensors in nested dicts, lists and tuples are not finite."""
    def walk(name, value):
        if isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(f"{name}.{key}", part)
        elif torch.is_tensor(value) and not value.isfinite().all():
            yield f"{name[1:]} = {value[~value.isfinite()][0].item()}"

    if bad := [*walk("", state)]:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise Stop(f"{bad[0]}{more} after the last step: {LOWER}", code=1)


def write_atomically(path, content):
    """Rank 0: bytes, or what torch.save makes of anything else, to a temporary file that is renamed over `path`."""
    if rank() > 0:
        return
    buffer = io.BytesIO(content if isinstance(content, bytes) else b"")
    if not isinstance(content, bytes):  # not to the file: on a full disk torch.save ends in an error that is no OSError
        torch.save(content, buffer)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Stop(f"cannot write {path} ({error.strerror}): what was there before is intact, make room and start it "
                   "again (a run with --resume)", code=1) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path, content):
    """An indented JSON file."""
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode())


def circumstances():
    """What is noted beside every result: command, date, versions."""
    return dict(command=" ".join([Path(sys.executable).name, *sys.argv]), date=time.strftime("%Y-%m-%d"),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))


def load_file(path):
    """A torch file, on the CPU; tensors and plain containers only: nothing is ever executed, every byte is checked."""
    if not path.is_file():
        raise Stop(f"{path} is not there, or no file: check the path")
    try:
        if zipfile.is_zipfile(path):  # torch's own reader ignores the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, damaged, foreign, malicious: torch raises many types
        raise Stop(f"{path} is not a readable checkpoint ({type(error).__name__}): restore it from a copy or give "
                   "another") from error


def read_json(path):
    """config.json of a run folder, its arguments and derived values."""
    try:
        config = json.loads(path.read_bytes())
        return {name: dict(config[name]) for name in ("arguments", "derived")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(f"{path} is not readable ({type(error).__name__}): give another --out or --run") from error


def rows_of_log(path, epoch):
    """The rows of log.jsonl up to `epoch`, for a later one will be redone; says which are lost."""
    rows = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a torn line
            row = json.loads(line)
            if type(row["epoch"]) is int and isinstance(row["knn"], list | None):
                rows[row["epoch"]] = row
    if lost := [str(e) for e in range(epoch + 1) if e not in rows]:
        say(f"{path} has lost what was logged of epoch {', '.join(lost)}: the run goes on without it")
    return [rows[e] for e in sorted(rows) if e <= epoch]


# ---- what an epoch's row of the log holds


def peak_memory():
    """GiB: the device's high-water mark on CUDA, else the process's; None where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    with contextlib.suppress(ImportError):  # Windows
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)


def feature_std(embedding):
    """Spread of the unit rows of all ranks' (b, D): 1 where they point everywhere, 0 where all point one way."""
    return all_gather_rows(embedding.detach()).std(dim=0).mean() * embedding.shape[1] ** 0.5


@torch.no_grad()
def use_of_outputs(p, chosen, now, steps):
    """For the log: mean entropy of targets p (..., P), entropy of their mean, outputs that were one's largest lately.

    Natural logarithms, all ranks' targets. Both entropies near ln P: all is uniform; that of the mean small: few
    outputs are in use. chosen (P,) int64, the step each output last was the largest, is brought up to date to step
    `now`; the last `steps` steps count. Each rank holds as many targets.
    """
    p = p.flatten(0, -2)
    mean = all_reduce_sum(p.mean(dim=0)) / processes()  # (P,)
    chosen[all_gather_rows(p.argmax(dim=1))] = now
    return {"entropy": torch.special.entr(p).sum(dim=1).mean(), "entropy_of_mean": torch.special.entr(mean).sum(),
            "prototypes_in_use": (chosen > now - steps).sum().float()}


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
    if rank() > 0:
        return
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [["image", *(f"level{level}" for level in range(len(assign)))],
         *([name, *row] for name, row in zip(images.names, assign.T.tolist()))])
    write_atomically(folder / "clusters.csv", table.getvalue().encode(errors="surrogateescape"))
    picture = io.BytesIO()
    draw_tree(images, assign, own, some_paths(assign, rows), columns).save(picture, "png", optimize=True)
    write_atomically(folder / "tree.png", picture.getvalue())


def draw_tree(images, assign, own, paths, columns):
    """The picture of write_tree: assign (L, N), own L x (N,) similarities, a row for each of the paths."""
    margin, levels = len(assign) * CELL + 2 * GAP, range(len(assign) - 1, -1, -1)  # the coarsest first
    canvas = Image.new("RGB", (margin + columns * (SIZE + GAP) + GAP, 28 + len(paths) * (SIZE + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    draw.text((margin, 8), "nearest to the leaf's prototype", "black", font)

    def paste(level, members, left, top, many):
        nearest = members[own[level][members].argsort(descending=True)[:many]]
        for place, i in enumerate(nearest.tolist()):
            picture = TF.to_pil_image(images.picture(i)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + place * (SIZE + GAP), top))

    for column, level in enumerate(levels):
        left = GAP + column * CELL
        draw.text((left, 8), f"level {level}: {len(assign[level].unique())} clusters", "black", font)
        for _, group in itertools.groupby(enumerate(paths), key=lambda row: row[1][level:]):
            (first, path), *others = group  # rows of one cell
            top, height = 28 + first * (SIZE + GAP), (1 + len(others)) * (SIZE + GAP) - GAP
            draw.rectangle((left, top, left + CELL - GAP, top + height), fill=PALETTE[path[-1] % len(PALETTE)])
            members = (assign[level] == path[level]).nonzero()[:, 0]
            paste(level, members, left, top, many=1)
            for line, text in enumerate([f"n = {len(members)}", *describe(images, members)]):
                draw.text((left + SIZE + GAP, top + 13 * line), text, "black", font)
    for row, path in enumerate(paths):
        paste(0, (assign[0] == path[0]).nonzero()[:, 0], margin, 28 + row * (SIZE + GAP), columns)
    return canvas


def describe(images, members, width=16):
    """The commonest label of these pictures and its share of the labels, at the finest level that half of them share.
    """
    best = []
    for level, names in enumerate(images.class_names if images.labels is not None else ()):
        known = images.labels[members, level]
        known = known[known >= 0]  # STL-10: most pictures carry no label
        if len(known) == 0:
            continue
        counts = torch.bincount(known, minlength=len(names))
        share = counts.max().item() / len(known)
        if not best or share >= 0.5:
            name = "".join(c if c.isprintable() else "?" for c in names[int(counts.argmax())].split("/")[-1])
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
