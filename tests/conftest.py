"""What the tests of whole scripts share: a made folder of pictures, and scripts that run as separate processes.

Importing torch takes longer than most of these runs, so a fork server imports it once and each run is a fork of it
that executes the script as `__main__`, in an empty folder.
"""

import itertools
import json
import math
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import plumbing

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem.startswith("hirl_") or p.stem in ("hcsc", "csml"))

IMAGES, BATCH, STEPS, EPOCHS = 96, 16, 6, 3  # 6 steps an epoch; the hierarchy joins after the first epoch
TINY = (f"--arch tiny --image-size 16 --epochs {EPOCHS} --batch-size {BATCH} --warmup-epochs 1 --device cpu "
        "--workers 0 --base-lr 0.02")
OWN = {  # small numbers for the arguments that a script has for itself
    "hirl_moco": "--clusters 12 4 2 --queue-size 32 --negative-paths 20",
    "hcsc": "--clusters 12 4 2 --queue-size 32 --prototype-weight 0.1",
    "hirl_simclr": "--clusters 12 4 2 --negative-paths 20 --temperature 1",  # low ones magnify rounding
    "csml": "--clusters 12 4 2 --queue-size 32 --neighbours 4 --refresh-every 2 --base-lr 0.005",
    "hirl_swav": "--clusters 12 4 2 --queue-size 32 --queue-epoch 0 --negative-paths 20 --prototypes 24 "
                 "--freeze-prototypes 3 --local-crops 2 --local-size 8 --lr-warmup 0.2 --epsilon 0.05",
    "hirl_dino": "--clusters 12 4 2 --hidden 32 --dim 32 --prototypes 24 --local-crops 2 --local-size 8 "
                 "--negative-paths 20 --optimizer sgd --base-lr 0.005",  # AdamW magnifies rounding
    "hirl_ibot": "--clusters 12 4 2 --hidden 32 --dim 32 --prototypes 24 --local-crops 2 --local-size 8 "
                 "--negative-paths 20 --arch vit-4-32-2 --drop-path 0.2",
    "hirl_simsiam": "--clusters 12 4 2 --negative-paths 20 --dim 32 --projector-width 32 --predictor-width 8 "
                    "--base-lr 0.005",
    "hirl_mocov3": "--clusters 12 4 2 --negative-paths 20 --dim 32 --head-width 32 --optimizer sgd --temperature 1 "
                   "--base-lr 0.005",
}
PLAIN = {"csml": "--neighbours 0 --clusters 0"}  # how a script is told to leave out its hierarchy; else --clusters 0
TIMINGS = ("images_per_s", "data_wait", "peak_memory_gib")  # what may differ between equal runs

os.environ["OMP_NUM_THREADS"] = "1"  # inherited by every process: the same sums, and no fight for the cores
torch.set_num_threads(1)  # and the oracles here sum as the scripts do
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["torch", "torchvision", "numpy", "pytest", "tqdm", "PIL.Image", "torch.distributed"])


def arguments(script, data, out, **other):
    """A tiny run's command line; other: epochs="1" replaces --epochs, plain=True leaves the hierarchy out."""
    line = f"--data {data} --out {out} {TINY} {OWN.get(script, '--clusters 12 4 2')}".split()
    if other.pop("plain", False):
        line += PLAIN.get(script, "--clusters 0").split()
    for name, value in other.items():
        line += ["--" + name.replace("_", "-"), *str(value).split()]
    return line  # of a flag given twice the later one counts


def play(script, argv, folder, label, environment, stop_at, file_limit, poison, timeout):
    """In the child: run the script as `__main__`. stop_at: (step, signal) that it sends to itself; poison: the step
    whose gradient is not finite; file_limit: the disk is full from this file size on; timeout: of ranks, seconds.
    """
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{label}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    plumbing.TIMEOUT = timedelta(seconds=timeout)
    steps, end_step = itertools.count(1), plumbing.Run.end_step
    if poison:
        def poisoned(optimizer, *_):
            if next(steps) == poison:
                next(p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None).fill_(math.nan)

        register_optimizer_step_pre_hook(poisoned)
    if stop_at:

        def stopped(run, *how):
            if next(steps) == stop_at[0]:
                os.kill(os.getpid(), stop_at[1])
            end_step(run, *how)

        plumbing.Run.end_step = stopped
    sys.argv, path = [f"{script}.py", *map(str, argv)], str(ROOT / f"{script}.py")
    sys.path.insert(0, str(ROOT))
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()


class Play:
    """A script that is running: `finish()` gives its exit code and sets `out` and `err`, the text it printed."""

    def __init__(self, folder, script, argv, *, environment=None, stop_at=None, file_limit=None, poison=None,
                 timeout=60):
        self.label = Path(folder) / f".{time.monotonic_ns()}"
        what = script, argv, folder, self.label, environment or {}, stop_at, file_limit, poison, timeout
        self.process = fork.Process(target=play, args=what)
        self.process.start()

    def wait_for(self, path, text=""):
        """Until the file is there and holds the text."""
        while not path.exists() or text not in path.read_text(errors="replace"):
            assert self.process.is_alive(), self.finish()
            time.sleep(0.01)

    def finish(self, timeout=120):
        self.process.join(timeout)
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        for name in ("out", "err"):
            path = Path(f"{self.label}.{name}")
            setattr(self, name, path.read_text() if path.exists() else "")
            path.unlink(missing_ok=True)
        assert not hung, f"did not end: {self.out}\n{self.err}"
        return self.process.exitcode


def run(folder, script, argv, code=0, **how):
    """Play to the end and demand an exit code."""
    played = Play(folder, script, argv, **how)
    assert played.finish() == code, played.out + played.err
    return played


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(folder, script, argv, size=2, only=None, **how):
    """The same command in several gloo processes, as torchrun would start them; `how` is for rank `only`, if given."""
    shared = dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [Play(folder, script, argv, environment=dict(shared, RANK=str(r), LOCAL_RANK=str(r)),
                 **(how if only in (None, r) else {})) for r in range(size)]


def run_ranks(folder, script, argv, code=0, **how):
    """Several processes to the end; each must end with the exit code."""
    ranks = start_ranks(folder, script, argv, **how)
    codes = [played.finish() for played in ranks]
    assert codes == [code] * len(ranks), "\n".join(played.out + played.err for played in ranks)
    return ranks


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(row):
    """The entries of a log row that are losses: everything named in it but what is known not to be one."""
    other = {"epoch", "knn", "knn_pixels", "feature_std", "lr", "clusters_in_use", "prototypes_in_use", "unreadable",
             "neighbours_same_label", *TIMINGS}
    return {name: value for name, value in row.items() if name not in other}


def same(a, b):
    """Equal bit for bit, through dicts, lists and tensors."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


# ---- data


def painted(generator, kind, size=16):
    """A random picture (size, size, 3) uint8: stripes of a width and direction that name its class."""
    axis = np.arange(size) + generator.integers(size)
    stripes = (axis // (1 + kind % 3) % 2).astype(bool)
    mask = np.broadcast_to(stripes if kind < 3 else stripes[:, None], (size, size))
    ink, paper = generator.integers(0, 256, (2, 3))
    return np.where(mask[..., None], ink, paper).astype(np.uint8)


def make_pictures(root, images, seed):
    """Nested folders: 2 superclasses of 3 classes each; one name holds a comma."""
    generator = np.random.default_rng(seed)
    for i in range(images):
        kind = i % 6
        folder = root / ("across", "down, or so")[kind // 3] / f"{('across', 'down')[kind // 3]}{kind % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(painted(generator, kind)).save(folder / f"{i:03d}.png")


MODES = ("L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "1")


def save_in_mode(pixels, mode, path):
    """Write an RGB array under another mode; path without ending."""
    picture = Image.fromarray(pixels)
    if mode == "CMYK":
        picture.convert("CMYK").save(path.with_suffix(".jpeg"))
    elif mode == "I;16":
        gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        Image.fromarray(gray).save(path.with_suffix(".png"))
    elif mode == "P":
        picture.convert("P", palette=Image.Palette.ADAPTIVE).save(path.with_suffix(".png"))
    else:
        picture.convert(mode).save(path.with_suffix(".png"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root / "train", IMAGES, seed=0)
    make_pictures(root / "val", 30, seed=1)
    return root


@pytest.fixture
def copied(tmp_path):
    """The training pictures in a folder that a test may spoil, and their paths."""
    make_pictures(tmp_path / "copy", IMAGES, seed=0)
    return tmp_path / "copy", sorted((tmp_path / "copy").rglob("*.png"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.fixture(scope="session", params=SCRIPTS)
def whole(request, pictures, tmp_path_factory):
    """(script, folder of a run that nothing disturbed, what it printed), started as a user does."""
    folder = tmp_path_factory.mktemp("whole")
    argv = arguments(request.param, pictures, folder / "run")
    done = subprocess.run([sys.executable, ROOT / f"{request.param}.py", *argv], cwd=folder, capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return request.param, folder / "run", done.stdout


# ---- what runs leave


def compare_runs(folder, other):
    """Two run folders hold the same run, bit for bit, timings aside."""
    assert same(load(folder / "backbone.pt"), load(other / "backbone.pt"))
    states = [{k: v for k, v in load(f / "checkpoint.pt").items() if k != "log"} for f in (folder, other)]
    assert same(*states)
    rows = [[{k: v for k, v in row.items() if k not in TIMINGS} for row in log(f)] for f in (folder, other)]
    assert rows[0] == rows[1]
    if (folder / "clusters.csv").exists():
        assert (folder / "clusters.csv").read_text() == (other / "clusters.csv").read_text()


def refused(folder, script, argv, words, code=2):
    """The script ends with `code`, one line on stderr that holds the words, and writes nothing."""
    def there():  # but for what a live run is just saving
        return sorted(path for path in folder.rglob("*") if path.suffix != ".tmp")

    before = there()
    played = run(folder, script, argv, code=code)
    assert played.err.count("\n") == 1 and played.err.startswith(f"{script}.py: "), played.err
    for word in words.split():
        assert word in played.err, f"'{word}' is not in: {played.err}"
    assert there() == before, "something was written"
