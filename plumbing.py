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
import json
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
import networks
from common import Stop
from ranks import SyncBatchNorm, all_gather_rows, all_reduce_sum, average, local_rows, processes, rank, say

TIMEOUT = timedelta(minutes=30)  # a process that is silent for longer is lost
LARGEST = {int: 10**9, float: 1e30}  # what float32 and the machine bear
CLAIMED = set()  # run folders that this process has
MAY_DIFFER = {"resume", "out", "argv", "data", "data_root", "device", "workers", "compile", "eval_every", "tensorboard",
              "processes", "threads", "torch"}  # between a run and what resumes it
TORN = {f"{name}.tmp" for name in (  # what a crash may leave in a run folder
    "config.json", "log.jsonl", "checkpoint.pt", "backbone.pt", "tree.png", "clusters.csv", "eval.json")}
LOWER = "stopped, any checkpoint is good; try a lower --base-lr, other numbers or no --amp, in another --out"


# ---- start and end
def launch(main, parse_args):
    """Run main(parse_args()) and end with the exit code and the sentence each failure deserves."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):  # a notebook's
            getattr(sys, name).reconfigure(errors="backslashreplace")  # any name can be printed in any locale
    warnings.filterwarnings("ignore", module="PIL|torchvision|torch.nn")  # of odd pictures and networks
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"  # the others without a line of code
    code = 0
    try:
        main(parse_args())
        all_reduce_sum(torch.zeros(1))  # leave together: who ends while another still talks to it may abort that
    except (Exception, KeyboardInterrupt) as error:
        code, sentence = explanation(error)
        if code == 141:  # nobody reads what is printed: nothing more is
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif code < 128 or rank() == 0:
            print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    if processes() > 1:  # subtle: never wait for peers that are gone, as destroy_process_group may do in torch 2.4
        os._exit(code)
    if code:
        sys.exit(code)


def explanation(error):
    """(exit code, sentence) of an exception that a user can cause; a fault of the program is raised again."""
    first, *rest = str(error).splitlines() or [""]
    cause = rest[0] if rest and first.endswith("raised:") else first  # as torch.compile says it
    lost = "connection|peer|timed out|gloo|nccl|watchdog|abort" if processes() > 1 else "(?!)"  # matches nothing
    for kind, words, code, sentence in (
            (Stop, "", getattr(error, "code", 1), str(error)),
            (KeyboardInterrupt, "", 130, "interrupted: what was saved before is intact"),
            (BrokenPipeError, "", 141, "as a tool that SIGPIPE ends"),
            (OSError, "", 2, f"{first}: correct the path or its permissions"),
            (FloatingPointError, "", 1, f"features = nan after the last step: {LOWER}"),
            (Exception, "cxxcompiler|inductor", 2,
             f"--compile fails here ({cause}): install g++ if that is it, or go on with --resume --no-compile"),
            (RuntimeError, "out of memory|alloc_failed", 1,  # CUDA's words, its libraries'
             f"out of GPU memory at {peak_memory()} GiB: give a smaller --batch-size"),
            (RuntimeError, lost, 1, f"another process stopped this one ({first}): read its sentence, then --resume"),
            (RuntimeError, "kernel size|too small", 2, f"too small views ({first}): give a larger --image-size"),
            (RuntimeError, "new thread", 1, f"{first}: raise the limit of processes and threads"),
            (RuntimeError, "(allocate|enough) memory|overflow", 2, f"too large ({first}): give less"),
            (MemoryError, "", 2, f"too large ({first or 'out of memory'}): give less")):
        if isinstance(error, kind) and re.search(words, str(error).lower()):
            return code, sentence
    raise error


def set_up(args):
    """Device, processes, seed: everything before the data. Returns the torch.device."""
    with contextlib.suppress(OSError, AttributeError):  # glibc: keep large freed blocks, not fault every page in anew,
        libc = ctypes.CDLL("libc.so.6")  # which makes the augmentation twice as fast on the CPU
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes
    several = os.environ.get("WORLD_SIZE", "") not in ("", "1")
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if several else device.index or 0)
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True  # runs equal bit for bit are promised on the CPU alone
            if vars(args).get("compile") and not several:  # a network becomes one launch, not hundreds
                importlib.import_module("torch._inductor.config").triton.cudagraphs = True
        torch.zeros(1, dtype=torch.float64, device=device).item()  # Apple's GPUs have none such
    except (RuntimeError, AssertionError, TypeError) as error:
        raise Stop(f"--device {name} cannot be used ({str(error).splitlines()[0]}): use --device cpu") from error
    if several and not dist.is_initialized():  # tensors on the CPU travel by gloo
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            raise Stop(f"WORLD_SIZE is set, but no processes meet ({error!s:.60}): start with torchrun") from error
    torch.manual_seed(args.seed)
    return device


# ---- arguments
class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the docstring's lines and show every default there is."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, without usage text."""

    def __init__(self, **how):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **how)

    def error(self, message):
        raise Stop(f"{message}: see --help")


def positive(kind, zero=False, most=None):
    """An argparse type: int or float above 0 (or from 0 on), at most `most`."""
    def number(text):
        value, limit = kind(text), LARGEST[kind] if most is None else most
        if not (0 <= value if zero else 0 < value) or not value <= limit:
            raise argparse.ArgumentTypeError(f"{text} must be {'at least' if zero else 'above'} 0 and at most {limit}")
        return value
    number.__name__ = kind.__name__  # argparse's "invalid int value: 'x'"
    return number


def preset_table(presets):
    """The presets side by side, for --help."""
    rows = [["preset", *presets], *(["--" + name.replace("_", "-"), *(p[name] for p in presets.values())]
                                    for name in next(iter(presets.values())))]
    return "\n".join("".join(f"{' '.join(map(str, v)) if isinstance(v, list) else v!s:{17 if column else 23}}"
                             for column, v in enumerate(row)) for row in rows)


def shared_arguments(description, presets):
    """A Parser with the arguments of every script. A script may declare one again where it means something else."""
    p = Parser(description=description, epilog=preset_table(presets), conflict_handler="resolve")
    add = p.add_argument
    add("--data", default="textures", help="textures, cifar10, cifar100, stl10 or a folder of pictures")
    add("--data-root", default="data", help="where torchvision's sets are kept")
    add("--validation", action="store_true", help="evaluate on pictures held out from training, not on the test's")
    add("--preset", default="auto", choices=["auto", *presets], help="which defaults marked 'preset'; auto: by --data")
    add("--out", help="run folder (default: runs/<script>-<data>-<seed>)")
    add("--resume", action="store_true", help="continue the run in --out where it stopped")
    add("--arch", help="tiny, a torchvision model that ends in fc, as resnet50, or a ViT, as vit_b_16 (preset)")
    add("--stem", choices=["3x3", "3x3s2", "7x7"], help="a ResNet's first layer; 7x7: torchvision's, max-pool (preset)")
    add("--image-size", type=positive(int, most=4096), help="side of the views, pixels (preset)")
    add("--dim", type=positive(int), default=128, help="width D of the embedding")
    add("--epochs", type=positive(int), help="passes over the data (preset)")
    add("--batch-size", type=positive(int), help="images per step, over all processes (preset)")
    add("--base-lr", type=positive(float), help="the learning rate's peak is base-lr * batch-size / 256 (preset)")
    add("--weight-decay", type=positive(float, zero=True), help="weight decay (preset)")
    add("--clusters", type=int, nargs="+", metavar="K", help="clusters per level, finest first; 0: no tree (preset)")
    add("--warmup-epochs", type=positive(int, zero=True), help="epochs before the hierarchy (preset: a share of all)")
    add("--seed", type=positive(int, zero=True), default=0, help="of everything random")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--workers", type=positive(int, zero=True), default=4, help="threads that decode pictures not kept in memory")
    add("--amp", action="store_true", help="bfloat16 autocast in the networks; losses stay float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    add("--eval-every", type=positive(int), default=1, help="epochs between kNN evaluations")
    add("--tensorboard", action="store_true", help="also write the log for tensorboard, if it is installed")
    return p


def resolve_arguments(parser, presets, argv=None):
    """Arguments from, in falling order of precedence, the command line, that of the run to resume, the preset.

    args.argv are the words of both command lines: a number that the data do not allow is refused if it is among them,
    and reduced if it is the preset's. A flag of a part that is switched off does nothing. A preset's warm-up keeps its
    share of --epochs, one epoch at least: the tree of an untrained network tells nothing.
    """
    argv = [part for word in map(str, sys.argv[1:] if argv is None else argv)
            for part in (word.split("=", 1) if re.match(r"--[\w-]+=(?!-)", word) else [word])]
    args, script = parser.parse_args(argv), Path(parser.prog).stem
    data = args.data if args.data in common.BUILT_IN else Path(args.data).resolve().name or "data"
    folder = Path(args.out or f"runs/{script}-{data}-{args.seed}")
    if args.resume and (folder / "config.json").exists():
        saved = read(folder / "config.json")["arguments"]
        if saved.get("script") != script or not isinstance(saved.get("argv"), list):
            raise Stop(f"{folder}/config.json is of {saved.get('script')}.py: resume with it, or give another --out")
        argv = [*map(str, saved["argv"]), *argv]  # of a flag given twice the later one counts
        args = parser.parse_args(argv)
    preset = args.preset if args.preset != "auto" else preset_of(args.data)
    chosen, argv = presets[preset], [*argv, "--preset", preset, f"--out={folder}"]
    warmup = max(1, round(chosen["warmup_epochs"] * (args.epochs or chosen["epochs"]) / chosen["epochs"]))
    parser.set_defaults(**{**chosen, "warmup_epochs": warmup})
    return parser.parse_args(argv, argparse.Namespace(script=script, argv=argv))


def preset_of(data):
    """textures, cifar (pictures up to 64 px), photos (fewer than 100,000) or imagenet."""
    if data in common.BUILT_IN or not (data and Path(data).is_dir()):
        return {"textures": "textures", "stl10": "photos"}.get(data, "cifar")
    many = [path for _, path in zip(range(100_000), common.picture_files(data))]
    small = False  # of no picture, or a damaged one: load_data will say so
    with contextlib.suppress(Exception):
        small = max(common.decode(many[0]).size) <= 64
    return "cifar" if small else "photos" if len(many) < 100_000 else "imagenet"


def fit(name, args, at_most, what="pictures"):
    """The argument `name`, or, where a preset asked for more than the data allows, `at_most` and a line saying so."""
    wanted, flag = getattr(args, name), "--" + name.replace("_", "-")
    if wanted <= at_most:
        return wanted
    if flag in args.argv:
        raise Stop(f"{flag} {wanted} is above the {at_most} {what} of {args.data}: give at most {at_most}")
    say(f"{flag} reduced from the preset's {wanted} to {at_most}, the {what} there are")
    return at_most


def fit_clusters(args, pictures):
    """--clusters as a strictly falling list, [] for none; a preset shrinks to 6 pictures a cluster."""
    clusters = [] if args.clusters == [0] else args.clusters
    finest, asked = max(clusters, default=0), "--clusters" in args.argv
    if clusters != sorted({*clusters}, reverse=True) or min(clusters, default=2) < 2:  # one cluster tells nothing apart
        raise Stop(f"--clusters {clusters} must be at least 2 and fall from level to level, finest first, or be 0")
    if asked and finest > pictures:
        raise Stop(f"--clusters {finest} is above the {pictures} pictures of {args.data}: give at most {pictures}")
    if not asked and finest > pictures / 6:
        clusters = sorted({max(2, round(k / finest * pictures / 6)) for k in clusters}, reverse=True)
        say(f"--clusters reduced from the preset's {args.clusters} to {clusters}, for {pictures} pictures")
    return clusters


def fit_batch(args, pictures):
    """--batch-size, or fewer where a preset asks for more than there are pictures; a multiple of the processes."""
    if pictures < 2 * processes():
        raise Stop(f"{args.data} has {pictures} pictures to train on: give two or more per process ({processes()})")
    batch_size = fit("batch_size", args, at_most=pictures) // processes() * processes()
    if batch_size < 2 * processes() or batch_size != args.batch_size and "--batch-size" in args.argv:
        raise Stop(f"--batch-size {args.batch_size} of {pictures} pictures must be a multiple of the {processes()} "
                   f"processes, and at least {2 * processes()}")
    return batch_size


def evaluation(args, device, train, test, backbone):
    """features(network, images) -> (n, width), own rows; knn() -> the backbone's accuracies in percent, or None."""
    features = partial(networks.extract_features, size=args.image_size, device=device, workers=args.workers,
                       amp=args.amp)
    return features, lambda: common.knn_accuracy(train, test, lambda images: features(backbone, images))


def set_lr(optimizer, lr):
    """The learning rate of every parameter, from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- the run folder
class Run:
    """A run's folder and what it remembers. Every rank calls every method in the same order; rank 0 writes.

    `keep` is what the epoch's features gave: a Hierarchy (on the device), a table of neighbours, or None.
    """

    def __init__(self, args):
        self.args, self.folder, self.log, self.board = args, Path(args.out), [], None
        self.sums, self.steps, self.last = {}, 0, None  # of the epoch so far: sums of its losses, steps, last losses
        self.signal, self.told, self.parent = 0, False, os.getppid()  # told: some rank got a signal, as all ranks know
        check_folder(self.folder, args.resume)
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise Stop("--tensorboard needs the package tensorboard: install it, or leave that out")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)

    def start(self, train, device, **derived):
        """Say what the run will do; take the folder; write config.json, or to resume compare arguments and pictures."""
        self.train, self.batch_size, path = train, derived["batch_size"], self.folder / "config.json"
        networks.check_views(self.args, device)
        derived = dict(pictures=len(train), fingerprint=train.fingerprint(), processes=processes(), device=str(device),
                       threads=torch.get_num_threads(), torch=torch.__version__) | derived
        now = {**vars(self.args), **derived}
        say("\n  ".join([str(self.folder), *(f"{name:20} {value}" for name, value in now.items() if name != "argv")]))
        if rank() == 0:
            claim(self.folder, self.args.resume)
        all_reduce_sum(torch.zeros(1))  # nobody goes on before
        if not self.args.resume:
            config = dict(arguments=vars(self.args), derived=derived, **circumstances())
            return write_atomically(path, json.dumps(config, indent=1).encode())
        saved = {name: value for part in read(path).values() for name, value in part.items()}
        changed = {name for name in now if saved.get(name) != now[name]} - {"argv", "resume"} - (MAY_DIFFER - {*saved})
        said = ", ".join(f"{name} ({saved.get(name)} before)" for name in sorted(changed - MAY_DIFFER or changed))
        if changed - MAY_DIFFER:
            raise Stop(f"{self.folder} ran with other arguments or data ({said}): give the same, or another --out")
        say(f"resumed with another {said}" if said else "resumed")

    def resume(self, device, **parts):
        """Load the checkpoint, if there is one, into `parts` (model, optimizer) -> (epoch, step) to go on at, keep."""
        self.parts, path = parts, self.folder / "checkpoint.pt"
        norms = [part for part in parts["model"].modules() if type(part) is not SyncBatchNorm]  # which see own rows
        self.statistics = [getattr(norm, name, None) for norm in norms for name in ("running_mean", "running_var")]
        if not path.exists():
            if path.is_symlink() or any(log.read_bytes().count(b"\n") > 2 for log in self.folder.glob("log.jsonl")):
                raise Stop(f"{path} of a trained network is gone: restore it, or start again with another --out")
            return 0, 0, None
        state = read(path)
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            epoch, step, self.steps, keep = (state[name] for name in ("epoch", "step", "steps", "keep"))
            if {type(epoch), type(step), type(self.steps)} != {int} or min(epoch, step) < 0 or epoch > self.args.epochs:
                raise ValueError("no count")
            self.sums = {name: float(total) for name, total in state["sums"].items()}
            self.log = [dict(row) for row in state["log"]]
            self.train.replace(dict(state.get("unreadable", {})))  # as found before
            if keep is not None and not torch.is_tensor(keep):
                keep = common.Hierarchy(*([level.to(device) for level in levels] for levels in keep))
        except Exception as error:  # torch raises many types for what it does not expect
            raise Stop(f"{path} is no checkpoint of this run ({type(error).__name__}): restore it, or start again with "
                       "another --out") from error
        return epoch, step, keep

    def note_signal(self, number, frame):
        """The step is finished and saved first. A second Ctrl-C ends a process that is alone at once."""
        if self.signal == number == signal.SIGINT and processes() == 1:
            raise KeyboardInterrupt
        self.signal = number

    def asked_to_stop(self):
        """The signal that this process got, or 0. Who has lost torchrun got one too."""
        if processes() > 1 and os.getppid() != self.parent:
            self.signal = signal.SIGTERM
        return self.signal

    def save(self, epoch, step, keep, row=None):
        """checkpoint.pt, of a finite network only; row() ends an epoch. After a signal Stop, on all ranks."""
        self.check()
        keep = tuple(keep) if isinstance(keep, tuple) else keep  # a Hierarchy as plain containers
        state = dict({name: part.state_dict() for name, part in self.parts.items()}, epoch=epoch, step=step, keep=keep,
                     sums=self.sums, steps=self.steps, log=self.log, unreadable=dict(self.train.unreadable))
        refuse_not_finite(state, "after the last step")
        path, late = self.folder / "checkpoint.pt", []  # late: printed last, for its reader may have left
        if row:
            try:
                self.write(row(), late.append)
            except (Stop, OSError, KeyboardInterrupt):  # an evaluation that fails costs no step
                write_atomically(path, state)
                raise
            self.sums, self.steps = {}, 0
            state |= dict(epoch=epoch + 1, step=0, sums={}, steps=0)
        write_atomically(path, state)
        if number := int(all_gather_rows(torch.tensor([self.asked_to_stop()]), equal=True).max()):  # all wait for it
            raise Stop(f"stopped, the state is in {path}: continue with --resume", 128 + number)
        for line in late:
            say(line)

    def timed(self, batches, epoch, steps):
        """The same batches, with a progress bar on a terminal; time between asking and getting counts as waiting."""
        self.begun, self.waited, self.here = (asked := time.perf_counter()), 0.0, 0
        for batch in tqdm(batches, f"epoch {epoch + 1}", steps, disable=rank() > 0 or None, leave=False, unit="step"):
            self.waited += time.perf_counter() - asked
            if self.args.compile:  # what compiled networks gave in the last step may be written over
                torch.compiler.cudagraph_mark_step_begin()
            yield batch
            asked = time.perf_counter()

    def end_step(self, epoch, step, values, keep):
        """Add a dict of scalars, means over this rank's rows, to the epoch's; after a signal on any rank save and stop.

        subtle: they, and with them the news of a signal, are read at the end of the next step: nobody waits for a GPU.
        """
        self.check()
        average(self.statistics)
        mine = torch.stack([value.detach().double() for value in values.values()])
        means = all_reduce_sum(torch.cat([mine, mine.new_full((1,), self.asked_to_stop())])) / processes()
        arrived = torch.cuda.Event() if means.is_cuda else None
        self.last = step, [*values], means.to("cpu", non_blocking=means.is_cuda), arrived  # in pinned memory
        if arrived:
            arrived.record()
        self.steps, self.here = self.steps + 1, self.here + 1
        if self.told or self.signal and processes() == 1:
            self.save(epoch, step + 1, keep)

    def check(self):
        """Add the last step's values to the epoch's sums; Stop if they are not finite."""
        if self.last:
            (step, names, means, arrived), self.last = self.last, None
            if arrived:
                arrived.synchronize()
            refuse_not_finite(dict(zip(names, means)), f"at step {step}")
            *means, signals = means.tolist()
            self.sums.update({name: self.sums.get(name, 0.0) + value for name, value in zip(names, means)})
            self.told = signals > 0

    def end_epoch(self, epoch, keep, knn, **notes):
        """Write the epoch's row: means, speed, knn() where it is due, notes; save the state."""
        self.check()
        means = {name: total / self.steps for name, total in self.sums.items()}
        seconds = time.perf_counter() - self.begun
        due = epoch + 1 == self.args.epochs or (epoch + 1) % self.args.eval_every == 0
        self.save(epoch, self.steps, keep, lambda: dict(
            epoch=epoch + 1, **means, lr=self.parts["optimizer"].param_groups[0]["lr"],
            images_per_s=round(self.batch_size * self.here / seconds, 1), data_wait=round(self.waited / seconds, 4),
            peak_memory_gib=peak_memory(), knn=knn() if due else None, **notes, unreadable=len(self.train.unreadable)))

    def write(self, row, show=say):
        """Append one object to log.jsonl and print it as one line."""
        write_atomically(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in [*self.log, row]).encode())
        cells = {name: v if isinstance(v, list) else [v] for name, v in row.items() if v is not None}
        if self.args.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = self.board or SummaryWriter(self.folder)
            for tag, v in ((f"{name}/{place}", v) for name in cells for place, v in enumerate(cells[name])):
                self.board.add_scalar(tag, v, row["epoch"])
            self.board.flush()
        self.log.append(row)
        show("  ".join(f"{name} {'/'.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in values)}"
                       for name, values in cells.items()))

    def save_backbone(self, net):
        """backbone.pt: torchvision's key names, without fc (a ViT: without heads)."""
        write_atomically(self.folder / "backbone.pt", {k: v.cpu().contiguous() for k, v in net.state_dict().items()})

    def verdict(self):
        """The last lines of a run: what was reached against pixels and the untrained network, and what to run next."""
        knn = {"raw pixels": self.log[0].get("knn_pixels"), "untrained network": self.log[0]["knn"],
               "trained network": self.log[-1]["knn"]}
        if knn["trained network"]:
            knn = {name: values for name, values in knn.items() if values}  # no raw pixels where that takes minutes
            say("\n" + f"{'kNN accuracy (%)':20}" + "".join(f"{len(c):>7} classes" for c in self.train.class_names))
            for name, values in knn.items():
                say(f"{name:20}" + "".join(f"{value:15.1f}" for value in values))
            shares = [(100 - now) / (100 - max(was)) if max(was) < 100 else None for *was, now in zip(*knn.values())]
            say(f"{'error, of before':20}" + "".join(f"{'-':>15}" if s is None else f"{s:14.2f}x" for s in shares))
        else:
            say("no labels, so no accuracy")
        if (self.folder / "tree.png").exists():
            say(f"\nthe learnt tree  {self.folder}/tree.png, and every picture's clusters in clusters.csv")
        more = " --data a/folder/with/labels" if self.train.labels is None else ""
        words = str(Path(sys.argv[0]).with_name("eval_linear.py")), "--run", str(self.folder)
        line = " ".join(f'"{word}"' if re.search(r"[^\w./\\:+,=@%~-]", word) else word for word in words)
        say(f"the backbone     {self.folder}/backbone.pt\nnext             python {line}{more}")


def check_folder(folder, resume):
    """Stop where there is no run to resume or, for a new one, more than the torn files of one that could not begin."""
    if resume and not (folder / "config.json").exists():
        raise Stop(f"{folder} holds no run to resume: leave out --resume, or correct --out")
    if not resume and folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= TORN):
        raise Stop(f"{folder} exists and is not overwritten: continue it with --resume, or choose another --out")


def claim(folder, resume):
    """Create the folder and take it for this process until it ends, however it ends; Stop where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ImportError, OSError):  # Windows has no such lock, nor have some file systems
        import fcntl
        try:
            if folder.resolve() not in CLAIMED:
                fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Stop(f"{folder} is in use by another process: let that end, or choose another --out") from error
        CLAIMED.add(folder.resolve())
    check_folder(folder, resume)  # again: a run may have begun, and ended, since we looked
    for name in TORN:
        (folder / name).unlink(missing_ok=True)


def refuse_not_finite(state, when, name=""):
    """Stop at the first tensor in nested dicts, lists and tuples that is not finite, and name it."""
    if isinstance(state, dict | list | tuple):
        for key, part in state.items() if isinstance(state, dict) else enumerate(state):
            refuse_not_finite(part, when, f"{name}.{key}".lstrip("."))
    elif torch.is_tensor(state) and not state.isfinite().all():
        raise Stop(f"{name} = {state[~state.isfinite()][0].item()} {when}: {LOWER}", code=1)


def write_atomically(path, content):
    """Rank 0: bytes, or what torch.save makes of anything else, to a temporary file that is renamed over `path`."""
    if rank() > 0:
        return
    if not isinstance(content, bytes):  # not to the file: on a full disk torch.save ends in an error that is no OSError
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getbuffer()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Stop(f"cannot write {path} ({error.strerror}): make room, or permit it, then --resume", 1) from error


def circumstances():
    """What is noted beside every result: command, date, versions."""
    return dict(command=" ".join([Path(sys.executable).name, *sys.argv]), date=time.strftime("%Y-%m-%d"),
                versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__))


def read(path):
    """What config.json or a torch file holds, tensors on the CPU; else Stop. Executes nothing, checks every byte."""
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError
        if path.name == "config.json":
            return {name: dict(json.loads(path.read_bytes())[name]) for name in ("arguments", "derived")}
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch ignores the checksums
            raise ValueError(damaged)
        with warnings.catch_warnings(record=True):  # not shown
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, damaged, foreign, malicious: torch raises many types
        raise Stop(f"{path} is not readable ({type(error).__name__}): restore it, or give another (--out)") from error


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
    return all_gather_rows(embedding.detach(), equal=True).std(dim=0).mean() * embedding.shape[1] ** 0.5


# ---- the tree one can look at
def write_tree(folder, images, features, hierarchy, rows=27, columns=10):
    """tree.png and clusters.csv of this rank's features (n, D) and the Hierarchy; rank 0 writes.

    Each row of the picture is one of the fullest paths of the learnt tree, coarse to fine: for each cluster, unless the
    row above shows it, a caption and the picture nearest to its prototype; for the leaf, more pictures.
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
    paths, sizes = assign.flip(0).unique(dim=1, return_counts=True)  # (L, K_0), coarse to fine, sorted; (K_0,)
    paths = paths.T[sizes.topk(min(rows, len(sizes))).indices.sort().values].tolist()
    size, caption, cell = 44, 96, 140  # of a picture and its margin, a caption, both; pixels
    canvas = Image.new("RGB", (len(assign) * cell + (columns - 1) * size, len(paths) * size), "white")
    draw = ImageDraw.Draw(canvas)
    for row, path in enumerate(paths):
        for column, level in enumerate(reversed(range(len(assign)))):
            if row and path[:column + 1] == paths[row - 1][:column + 1]:
                continue
            members = (assign[level] == path[column]).nonzero()[:, 0]
            draw.line((column * cell, row * size, canvas.width, row * size), "gray")
            draw.text((column * cell + 4, row * size + 4), describe(images, members), "black", spacing=1)
            nearest = members[own[level][members].argsort(descending=True)]
            for place, i in enumerate(nearest[:1 if level else columns].tolist()):
                picture = images.picture(i).resize((size - 4, size - 4), Image.Resampling.BICUBIC)
                canvas.paste(picture, (column * cell + caption + place * size, row * size + 2))
    canvas.save(picture := io.BytesIO(), "png", optimize=True)
    write_atomically(folder / "tree.png", picture.getvalue())


def describe(images, members):
    """How many pictures; their commonest label and its share, at the finest depth at which half of them have it."""
    shared = ""
    for names, labels in zip(images.class_names, images.labels[members].T) if images.labels is not None else ():
        known = labels[labels >= 0].tolist()  # STL-10: most pictures carry no label
        for label, count in Counter(known).most_common(1):
            if 2 * count >= len(known):
                name = "".join(c if c.isprintable() and c < "\u0100" else "?" for c in names[label].split("/")[-1][:16])
                shared = f"\n{name}\n{100 * count / len(known):.0f} %"
    return f"n = {len(members)}{shared}"
