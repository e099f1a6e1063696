"""What a step of a script, and the rest of its epoch, cost on a GPU: is it the kernels, or whoever launches them?

    python bench/gpu_step.py --data cifar100 --kernels --arguments --amp --preset cifar
    python bench/gpu_step.py --script hcsc --variants run fixed --arguments ...   # any script; some variants

Each variant is the script's own first epoch with a tree, stopped after --warm-up and --steps steps:

    run       as it is: a thread makes the next batch while this one is used
    inline    no such thread
    fixed     one batch for all steps, no work on pictures
    compile   --compile, which on one GPU replays graphs; compile-fixed  the same with one batch

Printed: ms a step by the clock; CPU ms a step of the main thread and of the process (more than the clock says: threads
at once); seconds of what surrounds an epoch's steps, by the clock: features of all pictures, tree, checkpoint, kNN.
--kernels adds in the last round, by torch's profiler, ms of kernels and the number of launches a step; its clocks are
longer for that. Where the kernels take far less than the step, the host is the limit.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from losses import cpu_name
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import networks
import plumbing

VARIANTS = ("run", "inline", "fixed", "compile", "compile-fixed")
ahead, loop = common.ahead, plumbing.Run.timed


class Enough(Exception):
    """The steps are done."""


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def inline(function, items, threads=1):
    """Batches without a thread; pictures are decoded as ever."""
    return ahead(function, items, 0 if function.__name__ == "batch" else threads)


def one_for_all(function, items, threads=1):
    """A batch's step number is its own, the rest is the first's."""
    if function.__name__ != "batch":
        yield from ahead(function, items, threads)
        return
    first = None
    for item in items:
        first = first or function(item)
        yield item, *first[1:]


def timed(function, seconds, name):
    """The function, which leaves the seconds of its last call under its name; name() may be empty for a call."""
    def call(*args, **how):
        wait()
        begun = time.perf_counter()
        result = function(*args, **how)
        wait()
        if name(*args):
            seconds[name(*args)] = time.perf_counter() - begun
        return result
    return call


def measure(args, data, variant, kernels=False):
    """One run -> {what: number}."""
    script, found = importlib.import_module(args.script), {}

    def few(run, batches, epoch, steps):
        source, count = loop(run, batches, epoch, steps), min(args.steps, steps - args.warm_up)
        if count < 1:
            sys.exit(f"an epoch of {steps} steps ends before --warm-up {args.warm_up} does: give less")
        for _ in range(args.warm_up):
            yield next(source)
        wait()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][:1 + torch.cuda.is_available()]
        with profile(activities=activities) if kernels else contextlib.nullcontext() as seen:
            begun = [clock() for clock in (time.perf_counter, time.thread_time, time.process_time)]
            for _ in range(count):
                yield next(source)
            wait()
            now = [clock() for clock in (time.perf_counter, time.thread_time, time.process_time)]
        each = (1000 * (b - a) / count for a, b in zip(begun, now))
        found.update({f"{name}, profiled" if seen else name: ms
                      for name, ms in zip(("clock", "main thread", "process"), each)})
        if seen:
            events = seen.events()
            there = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
            found["kernels"] = sum(e.time_range.elapsed_us() for e in there) / 1000 / count
            found["launches"] = sum(e.name.startswith(("cudaLaunch", "cudaGraphLaunch")) for e in events) / count
        run.save(epoch, 0, None)
        raise Enough

    made_ahead = {"inline": inline, "fixed": one_for_all, "compile-fixed": one_for_all}.get(variant, ahead)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for owner, name, made in (
                (common, "load_data", lambda *_: data), (plumbing.Run, "timed", few), (common, "ahead", made_ahead),
                (networks, "knn_of_pixels", lambda *_: None),
                (networks, "extract_features", timed(networks.extract_features, found, lambda network, images, *_: (
                    "features" if len(images) == len(data[0]) else None))),
                (common, "hierarchical_kmeans", timed(common.hierarchical_kmeans, found, lambda *_: "tree")),
                (common, "knn_accuracy", timed(common.knn_accuracy, found, lambda *_: "all features and kNN")),
                (plumbing, "write_atomically", timed(plumbing.write_atomically, found, lambda *_: "checkpoint"))):
            stack.enter_context(mock.patch.object(owner, name, made))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.suppress(Enough))
        script.main(script.parse_args(["--data", args.data, "--warmup-epochs", "0", "--out", f"{folder}/run",
                                       *["--compile"] * variant.startswith("compile"), *args.arguments]))
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--script", default="hirl_moco")
    p.add_argument("--data", default="textures")
    p.add_argument("--data-root", default="data")
    p.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    p.add_argument("--warm-up", type=int, default=30, help="steps before the clock starts")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--kernels", action="store_true")
    p.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="all that follows is the script's")
    args = p.parse_args()
    data = common.load_data(args.data, args.data_root, "cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    print(f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {torch.get_num_threads()} threads  {name}")
    print(f"{args.script}.py on {len(data[0])} pictures", *args.arguments)
    for turn in range(args.rounds):
        for variant in args.variants:
            found = measure(args, data, variant, args.kernels and turn + 1 == args.rounds)
            print(f"{variant:14}", "  ".join(f"{what} {number:.3g}" for what, number in found.items()), flush=True)


if __name__ == "__main__":
    main()
