"""Where a training step's milliseconds go: a script's own loop on textures, its parts timed, one column per script.

    python bench/profile_step.py                             # on the CPU, under two minutes
    python bench/profile_step.py hcsc --arguments --clusters 0

Each script runs as always, its tree there from the first epoch, and is stopped after --steps steps. A part's time is
without the parts that it calls, the median over the steps. Where a core is free (OMP_NUM_THREADS=1), batches are made
in a thread beside the step: what the step waits for them is one row, what that thread is busy per step another, which
the sum does not count. Else the step waits while they are made.
"""

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch
from losses import cpu_name

sys.path.insert(0, str(Path(__file__).parent.parent))
import plumbing

WARM_UP, BESIDE = 10, "batches, in their thread"
PARTS = {  # row: functions, of the script where no module is named; an encoder without gradient is the keys'
    "wait for the batch": [],
    "encoder": ["Encoder.forward", "encode_crops"],
    "key encoder": [],
    "update of the key encoder": ["MoCo.update_key_encoder"],
    "base loss": ["info_nce", "csml_loss", "SwAV.scores", "swapped_prediction"],
    "assignments": ["SwAV.assignments", "SwAV.in_use", "SwAV.enqueue"],
    "hierarchy loss": ["common.semantic_path_loss", "hcsc_terms", "reassign"],
    "selection": ["select", "draw", "dropped"],
    "cutmix": ["cutmix"],
    "backward": ["torch.Tensor.backward"],
    "optimizer": ["torch.optim.SGD.step", "torch.optim.SGD.zero_grad", "plumbing.set_lr", "larc",
                  "ranks.average"],
    "queue": ["MoCo.enqueue"],
    "log": ["plumbing.Run.end_step", "plumbing.feature_std"],
    BESIDE: ["common.draw_view", "common.render_view"],
    "rest": [],
}


class Clock:
    """Seconds of each part, without those of the parts it calls; a list per part, one entry per step."""

    def __init__(self):
        self.steps, self.running = [], ["rest"]
        self.start()

    def start(self):
        self.now, self.since = {}, time.perf_counter()

    def charge(self):
        now = time.perf_counter()
        self.now[self.running[-1]] = self.now.get(self.running[-1], 0) + now - self.since
        self.since = now

    def run(self, part, function, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            begun = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.now[BESIDE] = self.now.get(BESIDE, 0) + time.thread_time() - begun
        part = "wait for the batch" if part == BESIDE else part  # no thread beside makes it
        self.charge()
        self.running.append("key encoder" if part == "encoder" and not torch.is_grad_enabled() else part)
        try:
            return function(*args, **kwargs)
        finally:
            self.charge()
            self.running.pop()

    def step(self):
        self.charge()
        self.steps.append(self.now)
        self.now = {}


class Enough(Exception):
    """The steps that were asked for are done."""


def functions(script):
    """Yield (owner, name, part) of every function in PARTS that the script has."""
    for part, names in PARTS.items():
        for name in names:
            owner, (*path, last) = script, name.split(".")
            if path and path[0] in ("torch", "common", "plumbing", "ranks"):
                owner = importlib.import_module(path.pop(0))
            for attribute in path:
                owner = getattr(owner, attribute, None)
            if hasattr(owner, last):
                yield owner, last, part


def profile(name, steps, arguments):
    """{part: median seconds per step} of a script, which is run as always and stopped after some steps."""
    clock, script = Clock(), importlib.import_module(name)

    def around(function, part):
        return lambda *args, **kwargs: clock.run(part, function, *args, **kwargs)

    def timed(run, batches, epoch, count):
        run.waited, run.here, batches = 0.0, 0, iter(batches)
        clock.start()
        for _ in range(WARM_UP + steps):
            yield clock.run("wait for the batch", next, batches)
            clock.step()
        raise Enough

    with contextlib.ExitStack() as patched, tempfile.TemporaryDirectory() as folder:
        for owner, last, part in functions(script):
            patched.enter_context(mock.patch.object(owner, last, around(getattr(owner, last), part)))
        patched.enter_context(mock.patch.object(plumbing.Run, "timed", timed))
        patched.enter_context(contextlib.redirect_stdout(io.StringIO()))
        patched.enter_context(contextlib.suppress(Enough))
        script.main(script.parse_args(["--device", "cpu", "--warmup-epochs", "0", "--out", f"{folder}/run",
                                       *arguments]))
    return {part: statistics.median(step.get(part, 0) for step in clock.steps[WARM_UP:]) for part in PARTS}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("scripts", nargs="*", default=["hirl_moco", "hcsc", "hirl_swav", "csml"])
    p.add_argument("--steps", type=int, default=60, help=f"at most 70; {WARM_UP} more come first")
    p.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="all that follows goes to the scripts")
    args = p.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}  python {' '.join(sys.argv)}\ntorch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {cpu_name()}; textures, ms per step, median of {args.steps}", flush=True)
    found = {}
    for name in args.scripts:
        found[name] = profile(name, args.steps, args.arguments)
        print(f"  {name} is done", file=sys.stderr, flush=True)
    print(f"{'':28}" + "".join(f"{name:>12}" for name in found))
    for part in PARTS:
        if any(parts[part] > 5e-6 for parts in found.values()):
            print(f"{part:28}" + "".join(f"{1000 * parts[part]:12.2f}" for parts in found.values()))
    sums = (sum(seconds for part, seconds in parts.items() if part != BESIDE) for parts in found.values())
    print(f"{'sum':28}" + "".join(f"{1000 * seconds:12.2f}" for seconds in sums))


if __name__ == "__main__":
    main()
