"""Every number of the READMEs from one list of runs: run what is missing, keep the logs, write the tables from them.

    python results/reproduce.py --list                  # the runs below and what there is of each
    python results/reproduce.py                         # run what is missing, in the order below, then the tables
    python results/reproduce.py --only 'textures/*-[0-2]' --jobs 2 --dry-run
    python results/reproduce.py --tables                # run nothing: tables and picture anew from the logs
    python results/reproduce.py --compare               # does today's code log what the code behind the logs did?
    python results/reproduce.py --check                 # exit 1, and say where, if one is not what its logs give

Each run has one thread and low priority; Ctrl-C stops, the next call goes on from there. What a run leaves in
runs/STUDY/RUN-SEED-CODE/ is evaluated by eval_linear.py; its config, log and evaluation, and run.json (command, code,
CPU seconds), come to results/STUDY/RUN-SEED/. CODE is a hash of the script and of what it imports, without comments and
docstrings; where a log's is not today's, its row of a table has a mark: ‡ earlier code, or † earlier code, same figures
where both codes logged the same digits in three epochs of that row's arguments on textures, a tree from the second on,
one thread: each run adds its code's digits to results/figures.json, --compare adds today's.

In the tables: mean ± standard deviation over the seeds. Differences are paired, seed by seed, to the plain method; from
three seeds on with the 95 % interval of Student's t, and "helps" or "hurts" only where that excludes 0.
"""

import argparse
import ast
import contextlib
import fnmatch
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tables import BLOCK, Log, Setting, cost_table, file_table, picture, rendered, study_table, unfounded, verdict

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]

# ---- what is run, most wanted first

STUDIES = {  # arguments of all runs of a study; those of their evaluation (None: the log is enough)
    "default": ("", None),
    "textures": ("--epochs 60 --eval-every 5", "--protocol linear knn hierarchy --lr 0.3 --clusters 27 9 3"),
    "validation": ("--epochs 60 --eval-every 20 --validation", None),  # the test pictures are never read
    "bases": ("--epochs 60 --eval-every 5", "--protocol linear knn hierarchy --lr 0.3 --clusters 27 9 3"),
    "cifar100": ("--data {cifar100} --preset cifar --arch tiny --stem 3x3s2 --batch-size 64 --base-lr 0.48 "
                 "--ema-momentum 0.99 --epochs 30 --eval-every 3",
                 "--protocol linear knn hierarchy --lr 0.3 --epochs 30 --clusters 100 20"),
    "cifar100-60": ("--data {cifar100} --preset cifar --arch tiny --stem 3x3s2 --batch-size 64 --base-lr 0.48 "
                    "--ema-momentum 0.99 --epochs 60 --eval-every 3",
                    "--protocol linear knn hierarchy --lr 0.3 --epochs 30 --clusters 100 20"),
    "cifar100-12": ("--data {cifar100} --preset cifar --arch tiny --stem 3x3s2 --batch-size 64 --base-lr 0.48 "
                    "--ema-momentum 0.99 --epochs 12 --warmup-epochs 3 --eval-every 3",
                    "--protocol linear knn hierarchy --lr 0.3 --epochs 30 --clusters 100 20"),
    "cifar100-validation": ("--data {cifar100} --preset cifar --arch tiny --stem 3x3s2 --batch-size 64 --base-lr 0.48 "
                            "--ema-momentum 0.99 --epochs 12 --warmup-epochs 3 --eval-every 3 --validation", None),
    "health": ("--data {cifar100} --preset textures --epochs 12 --eval-every 4", None),  # does a base collapse?
    "gpu": ("--data {cifar100} --device cuda --amp --compile --eval-every 10",
            "--protocol linear knn hierarchy --lr 0.3 --clusters 100 20"),
    "gpu-30": ("--data {cifar100} --device cuda --amp --compile --epochs 30 --eval-every 3",
               "--protocol linear knn hierarchy --lr 0.3 --epochs 30 --clusters 100 20"),
}
# study, seeds, script and its own arguments; the first line of a group is the plain method, the others' comparison
RUNS = """
default 1 hirl_moco.py
default 1 hcsc.py
default 1 csml.py
default 1 hirl_simclr.py
default 1 hirl_swav.py
default 1 hirl_simsiam.py
default 1 hirl_mocov3.py
default 1 hirl_dino.py
default 1 hirl_ibot.py

textures 5 hirl_moco.py --clusters 0
textures 5 hirl_moco.py --clusters 810 270 27
textures 5 hcsc.py --clusters 810 270 27
textures 5 hcsc.py --clusters 810 270 27 --prototype-weight 1
textures 5 hcsc.py --clusters 81 54 27 --prototype-weight 1
textures 5 hcsc.py --clusters 810 270 27 --release
textures 5 hirl_moco.py --clusters 108 27 9
textures 3 hcsc.py --clusters 810 270 27 --prototype-weight 0
textures 3 hcsc.py --clusters 810 270 27 9 3 --prototype-weight 1
textures 5 hirl_moco.py --clusters 810 270 27 9 3

validation 9 hirl_moco.py --clusters 0
validation 3 hirl_moco.py --clusters 810 270 27
validation 3 hcsc.py --clusters 810 270 27 --prototype-weight 1
validation 3 hcsc.py --clusters 810 270 27 --prototype-weight 0.3
validation 3 hcsc.py --clusters 810 270 27 --prototype-weight 0.1
validation 3 hcsc.py --clusters 810 270 27 --prototype-weight 0
validation 3 hcsc.py --clusters 81 54 27 --prototype-weight 1
validation 3 hcsc.py --clusters 81 54 27 --prototype-weight 0.1
validation 3 hcsc.py --clusters 81 54 27 --prototype-weight 0
validation 3 hirl_moco.py --clusters 405 135 14
validation 3 hirl_moco.py --clusters 270 90 9
validation 3 hirl_moco.py --clusters 1620 540 54
validation 3 hirl_moco.py --clusters 810 270 27 --path-weight 0.3
validation 3 hirl_moco.py --clusters 810 270 27 --path-weight 3
validation 9 hirl_moco.py --clusters 810 270 27 --warmup-epochs 6
validation 3 hirl_moco.py --clusters 810 270 27 --warmup-epochs 42

validation 3 hirl_simsiam.py --clusters 0
validation 3 hirl_simsiam.py --path-weight 1
validation 3 hirl_simsiam.py --path-weight 1 --warmup-epochs 45
validation 3 hirl_simsiam.py --path-weight 0.3
validation 3 hirl_simsiam.py --path-weight 0.1

bases 5 hirl_simclr.py --clusters 0
bases 5 hirl_simclr.py

bases 5 hirl_swav.py --clusters 0
bases 5 hirl_swav.py

bases 5 csml.py --neighbours 0
bases 5 csml.py
bases 5 csml.py --level-weights 0 0 0.5 1

bases 5 hirl_simsiam.py --clusters 0
bases 5 hirl_simsiam.py
bases 3 hirl_simsiam.py --path-weight 1

bases 5 hirl_mocov3.py --clusters 0
bases 5 hirl_mocov3.py

bases 5 hirl_dino.py --clusters 0
bases 5 hirl_dino.py

bases 5 hirl_ibot.py --clusters 0
bases 5 hirl_ibot.py

cifar100 3 hirl_moco.py --clusters 0
cifar100 3 hirl_moco.py
cifar100 3 hcsc.py
cifar100 3 hcsc.py --release
cifar100 3 csml.py

cifar100-60 3 hirl_moco.py --clusters 0

cifar100-12 3 hirl_moco.py --clusters 0
cifar100-12 3 hirl_moco.py
cifar100-12 3 hirl_moco.py --path-weight 1
cifar100-12 3 hcsc.py
cifar100-12 3 hcsc.py --prototype-weight 0.1
cifar100-12 3 hcsc.py --prototype-weight 1

cifar100-validation 3 hirl_moco.py --clusters 0
cifar100-validation 3 hirl_moco.py --path-weight 1
cifar100-validation 3 hirl_moco.py --path-weight 0.3
cifar100-validation 3 hirl_moco.py --path-weight 0.1
cifar100-validation 1 hcsc.py --prototype-weight 1
cifar100-validation 3 hcsc.py --prototype-weight 0.3
cifar100-validation 3 hcsc.py --prototype-weight 0.1
cifar100-validation 1 hcsc.py --prototype-weight 0.03
cifar100-validation 3 hcsc.py --prototype-weight 0

health 1 hirl_simsiam.py --clusters 0
health 1 hirl_simsiam.py
health 1 hirl_simsiam.py --path-weight 1

health 1 hirl_mocov3.py --clusters 0
health 1 hirl_mocov3.py

health 1 hirl_dino.py --clusters 0
health 1 hirl_dino.py
health 1 hirl_dino.py --clusters 0 --centering mean

health 1 hirl_ibot.py --clusters 0
health 1 hirl_ibot.py

gpu 1 hirl_moco.py --epochs 100 --clusters 0
gpu 1 hirl_moco.py --epochs 100
gpu 1 hcsc.py --epochs 100

gpu 1 hirl_moco.py --clusters 0
gpu 1 hirl_moco.py
gpu 1 hcsc.py

gpu-30 1 hirl_moco.py --clusters 0
gpu-30 1 hirl_moco.py --path-weight 1
gpu-30 1 hcsc.py --prototype-weight 1
"""

# ---- what is shown, between <!-- table: NAME --> and <!-- end --> of the two READMEs

TEXTURES = {"kNN, 3 families": "knn 0", "9 kinds": "knn 1", "27 leaves": "knn 2"}
CIFAR = {"kNN, 20 classes": "knn 0", "100 classes": "knn 1"}
BEFORE = {"100 classes by kNN, untrained network": "first 1"}
HIRL = ["hirl_moco.py --clusters 810 270 27", "hirl_simclr.py", "hirl_swav.py", "hirl_simsiam.py", "hirl_mocov3.py",
        "hirl_dino.py", "hirl_ibot.py"]
TABLES = {  # a study or two and the columns, heading: measure; the rows, where not all; a row of pooled differences
    "summary": ("textures bases", {"27 leaves by kNN, the plain method": "plain knn 2", "with": "knn 2", "difference":
                                   "difference knn 2", "difference by the linear probe": "difference linear"},
                ["hcsc.py --clusters 810 270 27", "hcsc.py --clusters 81 54 27 --prototype-weight 1", "csml.py", *HIRL],
                ("mean of the seven of HIRL", HIRL)),
    "default": ("default", {**TEXTURES, "error, of before": "error", "CPU minutes": "cpu"}),
    "textures": ("textures", {**TEXTURES, "linear, 27 leaves": "linear", "difference, 27 leaves by kNN":
                              "difference knn 2", "difference, linear probe": "difference linear"}),
    "textures-trees": ("textures", {**{f"NMI, {k} clusters": f"nmi {k}" for k in (3, 9, 27)},
                                    "rank correlation": "rank", "difference, rank correlation": "difference rank",
                                    "difference, 9 kinds by kNN": "difference knn 1"}),
    "validation": ("validation", {**TEXTURES, "difference, 9 kinds": "difference knn 1",
                                  "difference, 27 leaves": "difference knn 2"}),
    "bases": ("bases", {**TEXTURES, "linear, 27 leaves": "linear", "difference, 9 kinds by kNN": "difference knn 1",
                        "difference, 27 leaves by kNN": "difference knn 2", "difference, linear probe":
                        "difference linear"}),
    **{study: (study, {**BEFORE, **CIFAR, "linear, 100 classes": "linear", "rank correlation": "rank",
                       "difference, 20 classes by kNN": "difference knn 0", "difference, 100 classes by kNN":
                       "difference knn 1", "difference, linear probe": "difference linear"})
       for study in ("cifar100", "cifar100-12")},
    "cifar100-60": ("cifar100-60", {**CIFAR, "linear, 100 classes": "linear", "difference, 20 classes by kNN":
                                    "difference knn 0", "difference, 100 classes by kNN": "difference knn 1",
                                    "difference, linear probe": "difference linear", "CPU minutes": "cpu"}),
    "cifar100-validation": ("cifar100-validation", {**CIFAR, "difference, 20 classes": "difference knn 0",
                                                    "difference, 100 classes": "difference knn 1"}),
    "health": ("health", {**BEFORE, **CIFAR, "spread of embeddings (1: all ways)": "last feature_std",
                          "entropy of targets": "last entropy", "of their mean": "last entropy_of_mean",
                          "outputs in use": "last prototypes_in_use"}),
    "gpu-30": ("gpu-30", {**CIFAR, "linear, 100 classes": "linear", "rank correlation": "rank",
                          "difference, 100 classes by kNN": "difference knn 1", "difference, linear probe":
                          "difference linear", "minutes, of three runs at once": "minutes"}),
    "gpu": ("gpu", {**CIFAR, "linear, 100 classes": "linear", "difference, 100 classes by kNN":
                    "difference knn 1", "difference, linear probe": "difference linear"}),
}
PICTURE = ("textures", {"hirl_moco.py --clusters 0": "#777777", "hirl_moco.py --clusters 810 270 27": "#0072b2",
                        "hcsc.py --clusters 810 270 27": "#d55e00"},
           {"9 kinds": 1, "27 leaves": 2})  # a study, the colours of its lines, a panel per label depth
FILES = {  # in reading order
    "hirl_moco.py": "MoCo v2 + HIRL, the method from arguments to last line: read it first",
    "common.py": "data and views, k-means and hierarchy, hierarchy losses, kNN and neighbours",
    "hcsc.py": "MoCo v2 + HCSC: the tree chooses negatives, and leaves out what seems to be the image's own kind",
    "csml.py": "MoCo v2 + CsMl: no tree; a nearest neighbour, and a CutMix of both, are positives too",
    "hirl_simclr.py": "SimCLR + HIRL, this project's own composition: NT-Xent within the batch, no queue",
    "hirl_swav.py": "SwAV + HIRL: learnt prototypes, Sinkhorn, swapped prediction over several crops",
    "hirl_simsiam.py": "SimSiam + HIRL: one view predicts the other; no negatives, no slow encoder",
    "hirl_mocov3.py": "MoCo v3 + HIRL: the batch's keys instead of a queue, a predictor; ResNet or ViT",
    "hirl_dino.py": "DINO + HIRL: the student predicts a centred, sharpened teacher; ResNet or ViT",
    "hirl_ibot.py": "iBOT + HIRL: DINO, and masked patches to predict; always a ViT",
    "eval_linear.py": "linear probe, kNN, fine-tuning with few labels, clusters and trees against labels",
    "test_losses.py": "losses of the first five methods, against loops one can read, by hand, by law, lifted; "
                      "the rest is in `tests/`",
}
COSTS = [  # log in results/, numbers in it, what they are, how they are said
    ("bench_losses.txt", r"ratio +(\S+) x faster, (\S+) of the memory",
     "path loss, forward and backward, B 256, D 128, K 30000-10000-1000, M 1000, against gathered prototypes",
     "{}x faster, {} of the memory"),
    ("bench_hcsc.txt", r"ratio +(\S+) x faster, (\S+) x with all anew; (\S+) % of",
     "HCSC's selection and both losses, B 256, Q 16384, K 3000-2000-1000, against loops with Python sets, memberships "
     "kept from step to step or, as in the loops, anew; share of a ResNet-18 step, kept", "{}x, {}x faster; {} %"),
    ("bench_neighbours.txt", r"ours +\S+ +(\S+)", "`nearest_neighbours`, 50,000 x 512, k 5: time over faiss-cpu's",
     "{}"),
    ("bench_pipeline_textures.txt", r"on a fixed batch +(\S+)(?s:.*)with / without hierarchy +(\S+)",
     "the default's step on the real pipeline, over a step on a fixed batch; its epoch with hierarchy, over without",
     "{}; {}"),
    ("bench_pipeline_cifar.txt", r"on a fixed batch +(\S+)(?s:.*)with / without hierarchy +(\S+)",
     "the same for ResNet-18 on CIFAR-100", "{}; {}"),
    ("bench_peers.txt", r"(?s:tiny 3x3s2:.*?torchvision +\S+ +\S+ +\S+ +(\S+) x.*?lightly +\S+ +\S+ +\S+ +(\S+) x.*?"
     r"resnet18 7x7:.*?torchvision +\S+ +\S+ +\S+ +(\S+) x.*?lightly +\S+ +\S+ +\S+ +(\S+) x)",
     "MoCo v2's images/s on CIFAR-100's files, B 128, the same network, pictures and views: over a plain loop of "
     "torchvision and a DataLoader, and over lightly; the small network, then ResNet-18 with the 7x7 stem",
     "{}x, {}x; {}x, {}x"),
    ("bench_peers.txt", r"(?s:bare step +\S+ +\S+ +\S+ +(\S+) x.*resnet18 7x7:.*bare step +\S+ +\S+ +\S+ +(\S+) x)",
     "the same over the bare step, without any work on pictures", "{}x; {}x"),
    ("bench_peers.txt", r"PIL recipe +\S+ +(\S+) x",
     "views of 224 px from JPEGs a CPU second, decoded and rendered on the CPU, over the PIL recipe", "{}x"),
    ("bench_kmeans_cpu.txt", r"(?s:tree 1000-100-10.*?ours +\S+ +(\S+).*tree 3000-2000-1000.*?ours +\S+ +(\S+))",
     "trees 1000-100-10 and 3000-2000-1000 of 50,000 x 128: time over faiss's (niter 20, nredo 5)", "{}; {}"),
]


class Run(NamedTuple):
    """One training run."""

    study: str
    command: str  # script and its own arguments
    plain: str  # the command it is compared with
    seed: int

    @property
    def id(self):
        return f"{self.study}/{re.sub('[ -]+', '-', self.command.replace('.py', ''))}-{self.seed}"

    @property
    def arguments(self):
        return " ".join(filter(None, [self.command, STUDIES[self.study][0], f"--seed {self.seed}"]))


def all_runs():
    """The list, study by study, and in a study seed by seed: the first seeds of everything come first."""
    runs = []
    for group in RUNS.strip().split("\n\n"):
        lines = [line.split(maxsplit=2) for line in group.splitlines()]
        runs += [Run(study, command, lines[0][2], seed) for study, seeds, command in lines
                 for seed in range(int(seeds))]
    return sorted(runs, key=lambda run: (list(STUDIES).index(run.study), run.seed))


# ---- code and logs


@functools.cache
def bare(name):
    """A Python file without comments, docstrings and blank lines."""
    source = (ROOT / name).read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_version(script):
    """Eight digits that change when the code behind a log does."""
    files = (script, "common.py", "networks.py", "plumbing.py", "ranks.py", "textures.py")
    return hashlib.blake2b("\n".join(map(bare, files)).encode(), digest_size=4).hexdigest()


def read(run):
    """The Log of a run; None where there is none, or one of other arguments than the list's."""
    folder = ROOT / "results" / run.id
    about = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
    if about.get("arguments") != run.arguments:
        return None
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    path = folder / "eval.json"
    return Log(about, rows, json.loads(path.read_text())["results"] if path.exists() else {})


SHORT = "--epochs 3 --warmup-epochs 1 --eval-every 3"
AGES = "earlier code", "earlier code, same figures"  # the worse first
TIMINGS = {"images_per_s", "data_wait", "peak_memory_gib"}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
CPU = {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}  # all but the studies named gpu, also where there is one


def known_figures():
    """{study and command: {code: digest of what SHORT logs}}."""
    path = ROOT / "results" / "figures.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_figures(run):
    """Run today's code on SHORT and keep the digest of its log's figures, unless it is known."""
    command, code = f"{run.study} {run.command}", code_version(run.command.split()[0])
    if code in known_figures().get(command, {}):
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = run._replace(seed=0).arguments.format(cifar100="textures --preset cifar").split()
        subprocess.run([sys.executable, *arguments, *SHORT.split(), "--out", f"{folder}/run"], cwd=ROOT, check=True,
                       capture_output=True, env=CPU)
        rows = [json.loads(line) for line in Path(folder, "run/log.jsonl").read_text().splitlines()]
    figures = repr([{name: row[name] for name in sorted(row.keys() - TIMINGS)} for row in rows])
    with writing:
        known = known_figures()
        known.setdefault(command, {})[code] = hashlib.blake2b(figures.encode(), digest_size=4).hexdigest()
        (ROOT / "results" / "figures.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def age(run, log):
    """What a table says of a log's code: nothing of today's."""
    code, figures = code_version(run.command.split()[0]), known_figures().get(f"{run.study} {run.command}", {})
    if log.run["code"] == code:
        return ""
    return AGES[code in figures and figures[code] == figures.get(log.run["code"])]


# ---- running

running = set()  # processes
writing = threading.Lock()  # of results/figures.json


def execute(command, folder, environment):
    """Run a script, its output to FOLDER.out; its time, and that of its earlier tries, is added up in FOLDER.time.

    Returns (seconds, CPU seconds). Raises CalledProcessError.
    """
    begun, path = time.perf_counter(), folder.with_name(folder.name + ".time")
    with open(folder.with_name(folder.name + ".out"), "a") as out:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out, env=environment)
        running.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        running.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    before = json.loads(path.read_text()) if path.exists() else [0, 0]
    spent = [before[0] + time.perf_counter() - begun, before[1] + usage.ru_utime + usage.ru_stime]
    path.write_text(json.dumps(spent))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return spent


def perform(run, args):
    """Train, evaluate, keep; says how it ended, and returns whether it did."""
    script, *arguments = run.arguments.format(cifar100=args.cifar100).split()
    code, evaluation = code_version(script), STUDIES[run.study][1]
    environment = ONE_THREAD if run.study.startswith("gpu") else CPU
    folder = ROOT / "runs" / f"{run.id}-{code}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    out, begun = str(folder.relative_to(ROOT)), (folder / "config.json").exists()
    print(f"{run.id}: {'goes on' if begun else 'begins'}, see {out}.out", flush=True)
    try:
        seconds, cpu_seconds = execute([script, *arguments, "--out", out, *["--resume"] * begun], folder, environment)
        if evaluation:
            (folder / "eval.json").unlink(missing_ok=True)
            execute(["eval_linear.py", "--run", out, *evaluation.split()], folder.with_name(folder.name + "-eval"),
                    environment)
        if not run.study.startswith("gpu"):
            add_figures(run)
    except subprocess.CalledProcessError as error:
        print(f"{run.id}: ended with code {error.returncode}, the last lines of {out}*.out say why", flush=True)
        return False
    kept = ROOT / "results" / run.id
    kept.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in ("config.json", "log.jsonl", "eval.json")):
        if path.exists():
            (kept / path.name).write_text(path.read_text().replace(args.cifar100, "cifar100"))
    (kept / "run.json").write_text(json.dumps(dict(
        arguments=run.arguments, code=code, seconds=round(seconds), cpu_seconds=round(cpu_seconds)), indent=1) + "\n")
    if run.id == "default/hirl_moco-0":  # the one that README shows
        shutil.copy(folder / "tree.png", kept)
    print(f"{run.id}: done, {cpu_seconds / 60:.1f} CPU minutes", flush=True)
    return True


def perform_all(runs, args):
    """All of them, args.jobs at a time; returns whether all ended well."""
    os.nice(15)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(args.jobs)
    try:
        return all([*pool.map(perform, runs, [args] * len(runs))])
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            with contextlib.suppress(ProcessLookupError):  # it got the signal too, and has ended
                os.kill(process.pid, signal.SIGTERM)  # it finishes its step, saves and ends
        pool.shutdown()
        sys.exit("stopped: the same command goes on from here")


# ---- tables and picture


def settings(study):
    """command -> Setting of a study."""
    logs, found = {}, {}
    for run in all_runs():
        if run.study == study:
            log = read(run)
            logs.setdefault(run.command, {}).update({run.seed: log} if log else {})
            found[run.command] = run
    ages = {command: {age(run, log) for log in logs[command].values()} for command, run in found.items()}
    return {command: Setting(f"`{command}`", next((said for said in AGES if said in ages[command]), ""),
                             {} if run.plain == command else logs[run.plain], logs[command])
            for command, run in found.items()}


def chosen_settings(of, studies, _, commands=(), *__):
    """The rows of a table, in the order of the commands where these are given."""
    found = {command: setting for study in studies.split() for command, setting in of[study].items()}
    return [found[command] for command in commands or found]


def made_of_logs():
    """(name -> text of a table, the picture's text)."""
    of = {study: settings(study) for study in STUDIES}
    longer, csml = of["cifar100-60"], of["cifar100"]["csml.py"]  # a step of CsMl's takes twice the time
    longer["csml.py"] = csml._replace(label=f"{csml.label}, 30 epochs", plain=[*longer.values()][0].logs)
    study, colours, panels = PICTURE
    curves = {command: (colour, [*of[study][command].logs.values()]) for command, colour in colours.items()}
    return {"verdict": verdict(of["default"]["hirl_moco.py"]), "cost": cost_table(COSTS, ROOT / "results"),
            "files": file_table(FILES, ROOT),
            **{name: study_table(chosen_settings(of, *table), table[1], *table[3:]) for name, table in TABLES.items()},
            }, picture(curves, panels)


def flaw(run):
    """What is wrong with the log that is kept of a run, in words, or None."""
    log, folder = read(run), ROOT / "results" / run.id
    if not log:
        return None
    if not log.rows:
        return "has an empty log"
    config = json.loads((folder / "config.json").read_text())
    asked, epochs = log.run.get("made_as", run.arguments).split(",")[0], config["arguments"]["epochs"]
    if not f"{config['command'].partition(' ')[2]} ".startswith(f"{asked.format(cifar100='cifar100')} "):
        return f"was made by another command than its run.json says: {config['command']}"
    if log.rows[-1]["epoch"] != epochs:
        return f"ends at epoch {log.rows[-1]['epoch']} of {epochs}"
    return None if log.results or not STUDIES[run.study][1] else "has no evaluation"


def check():
    """What is wrong with the logs, the pages and the picture, a line each."""
    if wrong := [f"results/{run.id} {bad}" for run in all_runs() if (bad := flaw(run))]:
        return wrong
    made, drawn = made_of_logs()
    shown = {block[2] for page in PAGES for block in BLOCK.finditer(page.read_text())}
    wrong += [f"table {name} is on no page" for name in made if name not in shown]
    for page in PAGES:
        text, name = page.read_text(), page.relative_to(ROOT)
        for is_, ought in zip(BLOCK.finditer(text), BLOCK.finditer(rendered(text, made))):
            wrong += [f"{name}: table {is_[2]} is not what its logs give"] * (is_[0] != ought[0])
        wrong += [f"{name}: {number} is in no log that its paragraph names" for number in unfounded(text, ROOT)]
    path = ROOT / "results" / "knn.svg"
    return wrong + ["results/knn.svg is not what its logs give"] * (not path.exists() or path.read_text() != drawn)


def write():
    made, drawn = made_of_logs()
    for page in PAGES:
        page.write_text(rendered(page.read_text(), made))
    (ROOT / "results" / "knn.svg").write_text(drawn)


# ---- main


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="*", metavar="PATTERN", help="runs STUDY/RUN-SEED that match, as 'textures/*-0'")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--renew", action="store_true", help="also run anew what earlier code has made")
    p.add_argument("--cifar100", default="cifar100", help="--data of those runs: a folder, or torchvision's")
    for name, what in (("list", "the runs and their state"), ("dry-run", "the commands of what would be run"),
                       ("tables", "write tables and picture, run nothing"),
                       ("compare", "find out which logs of earlier code today's would repeat"),
                       ("check", "compare tables and logs, write nothing")):
        p.add_argument(f"--{name}", action="store_true", help=what)
    return p.parse_args()


def main():
    args = parse_args()
    if Path(args.cifar100).is_dir():  # else `cifar100` would be the name of torchvision's
        args.cifar100 = str(Path(args.cifar100).resolve())
    if args.check:
        wrong = check()
        print("\n".join(wrong) or "the tables are what the logs give, and decimal numbers in the text are in a log")
        sys.exit(bool(wrong))
    chosen = [(run, read(run)) for run in all_runs() if fnmatch.fnmatch(run.id, args.only)]
    missing = [run for run, log in chosen if not log or args.renew and age(run, log)]
    if args.list:
        for run, log in chosen:
            print(f"{age(run, log) or 'done' if log else 'missing':27} {run.id:35} {run.arguments}")
    elif args.dry_run:
        print("\n".join(f"python {run.arguments.format(cifar100=args.cifar100)}" for run in missing))
    else:
        if args.compare:
            with ThreadPoolExecutor(args.jobs) as pool:
                first = {(run.study, run.command): run for run, log in chosen
                         if log and age(run, log) and not run.study.startswith("gpu")}
                list(pool.map(add_figures, first.values()))
        well = args.tables or args.compare or perform_all(missing, args)
        write()
        sys.exit(not well)


if __name__ == "__main__":
    main()
