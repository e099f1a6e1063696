"""Whole scripts, one process: what a run leaves, how it is stopped and resumed, faults of data, disk and user.

    pytest tests/test_runs.py
"""

import csv
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    BATCH,
    EPOCHS,
    IMAGES,
    MODES,
    ROOT,
    SCRIPTS,
    STEPS,
    TIMINGS,
    Play,
    arguments,
    compare_runs,
    load,
    log,
    losses,
    make_pictures,
    painted,
    refused,
    run,
    same,
    save_in_mode,
    truncate,
)
from PIL import Image

import common
import hirl_moco
import networks
import plumbing

QUEUED = [name for name in SCRIPTS if "--queue-size" in (ROOT / f"{name}.py").read_text()]


# ---- a run and what it leaves


CHANCE = {  # of the settings in conftest.py: 32 queued keys, batches of 16, 24 prototypes
    "hirl_moco": dict(moco=math.log(33)), "hcsc": dict(moco=math.log(33)), "hirl_simsiam": dict(simsiam=0),
    "csml": dict.fromkeys(("image", "neighbour", "mix"), math.log(33) / 3), "hirl_simclr": dict(simclr=math.log(31)),
    "hirl_mocov3": dict(mocov3=4 * math.log(16)), "hirl_swav": dict(swav=math.log(24)),
    "hirl_dino": dict(dino=math.log(24)), "hirl_ibot": dict(dino=math.log(24), patch=math.log(24) / 2),
}


def test_a_run_leaves_its_files(whole):
    script, folder, printed = whole
    assert sorted(p.name for p in folder.iterdir()) == [
        "backbone.pt", "checkpoint.pt", "clusters.csv", "config.json", "log.jsonl", "tree.png"]
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["batch_size"] == BATCH and config["derived"]["steps_per_epoch"] == STEPS
    assert config["derived"]["pictures"] == IMAGES and config["versions"]["torch"] == torch.__version__
    assert f"{script}.py --data" in config["command"]
    assert config["derived"]["chance_level_loss"] == pytest.approx(CHANCE[script], abs=1e-4)
    for name, value in config["derived"].items():  # every derived value is said at the start
        assert f"  {name:20} {value}" in printed


def test_the_log_has_a_row_an_epoch(whole):
    script, folder, printed = whole
    rows = log(folder)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS + 1))  # 0: before training
    assert len(rows[0]["knn"]) == len(rows[0]["knn_pixels"]) == 2  # superclass and class
    for row in rows[1:]:
        used = "neighbours_same_label" if script == "csml" else "clusters_in_use"
        assert {"lr", "feature_std", used, "unreadable", "knn", *TIMINGS} <= row.keys()
        assert losses(row) and all(np.isfinite(value) and (value > 0 or name == "simsiam")  # minus a cosine
                                   for name, value in losses(row).items())
        assert 0 <= row["data_wait"] <= 1 and row["unreadable"] == 0 and row["images_per_s"] > 0
        assert all(0 <= value <= 100 for value in row["knn"])
    if script.startswith("hirl"):
        assert ["path" in row for row in rows[1:]] == [False, True, True]  # after the warm-up
        assert rows[1]["clusters_in_use"] is None
        moved = script == "hirl_swav"  # its images change clusters within the epoch, and may leave one empty
        assert all(0 < used <= k and (used == k or moved) for used, k in zip(rows[2]["clusters_in_use"], (12, 4, 2)))
    assert rows[1]["lr"] > rows[2]["lr"] > rows[3]["lr"] > 0


def test_the_last_lines_say_what_was_reached_and_what_is_next(whole):
    _, folder, printed = whole
    *python, script, flag, out = printed.splitlines()[-1].split()
    assert (python, flag, out) == (["next", "python"], "--run", str(folder))
    assert (folder.parent / script).resolve() == ROOT / "eval_linear.py"  # from where the run was started
    trained = next(line for line in printed.splitlines() if line.startswith("trained network"))
    assert [float(x) for x in trained.split()[2:]] == [round(v, 1) for v in log(folder)[-1]["knn"]]


def test_clusters_csv_names_every_picture_and_follows_one_tree(whole, pictures):
    _, folder, _ = whole
    with open(folder / "clusters.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["image", "level0", "level1", "level2"]
    assert [row[0] for row in rows] == sorted(
        str(p.relative_to(pictures / "train")) for p in (pictures / "train").rglob("*.png"))
    for lower, upper, clusters in ((1, 2, 12), (2, 3, 4)):
        assert len({row[lower] for row in rows}) == clusters == len({(row[lower], row[upper]) for row in rows})
    picture = Image.open(folder / "tree.png")
    picture.load()
    assert picture.mode == "RGB" and picture.width > 400 and np.asarray(picture).std() > 10


def test_the_backbone_loads_strictly(whole):
    script, folder, _ = whole
    network, width = networks.backbone("vit-4-32-2" if script == "hirl_ibot" else "tiny", "3x3", 16)
    network.load_state_dict(load(folder / "backbone.pt"))
    assert network.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, width)


@pytest.mark.parametrize("script", SCRIPTS)
def test_plain_base_method_and_a_torchvision_backbone(script, pictures, tmp_path):
    """--clusters 0 runs without a tree; ResNet-18's or a ViT's weights load strictly into torchvision's but for fc."""
    vit = script == "hirl_ibot"
    argv = arguments(script, pictures, "run", plain=True, epochs=1, arch="vit-8-64-1" if vit else "resnet18",
                     stem="7x7", eval_every=5)
    run(tmp_path, script, argv)
    assert not (tmp_path / "run/tree.png").exists() and not (tmp_path / "run/clusters.csv").exists()
    assert "path" not in log(tmp_path / "run")[-1] and log(tmp_path / "run")[-1]["knn"]  # the last epoch always
    network = torchvision.models.VisionTransformer(16, 8, 1, 1, 64, 256) if vit else torchvision.models.resnet18()
    missing, unexpected = network.load_state_dict(load(tmp_path / "run/backbone.pt"), strict=False)
    head = "heads.head" if vit else "fc"
    assert sorted(missing) == [f"{head}.bias", f"{head}.weight"] and not unexpected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_preset(script, tmp_path):
    text = run(tmp_path, script, ["--help"]).out
    assert all(word in text for word in ("--clusters", "textures", "imagenet", "--epochs", "python " + script))


# ---- stopped and resumed

LARS = dict(optimizer="lars", lr_warmup=0.25, base_lr=10)


def test_stopped_at_any_step_and_resumed_is_the_same_run(whole, pictures, tmp_path):
    """SIGTERM at step 2 of the warm-up, at the last step of an epoch and under the hierarchy, Ctrl-C at the end.

    One run is stopped four times and resumed four times; between the third and the fourth the disk is full.
    """
    script, undisturbed, _ = whole
    folder, argv = tmp_path / "run", arguments(script, pictures, tmp_path / "run")
    done = 0
    for stop, number in ((2, signal.SIGTERM), (STEPS, signal.SIGTERM), (STEPS + 4, signal.SIGTERM),
                         (3 * STEPS, signal.SIGINT)):
        again = ["--resume"] if done else []
        stopped = run(tmp_path, script, argv + again, code=128 + number, stop_at=(stop - done, number))
        assert "continue with --resume" in stopped.err and stopped.err.count("\n") == 1
        state = load(folder / "checkpoint.pt")
        assert state["epoch"] * STEPS + state["step"] == stop
        done = stop
        if stop == STEPS + 4:
            before = (folder / "checkpoint.pt").read_bytes()
            full = run(tmp_path, script, argv + ["--resume"], code=1, file_limit=100_000)
            assert "cannot write" in full.err and full.err.count("\n") == 1
            assert (folder / "checkpoint.pt").read_bytes() == before and not [*folder.glob("*.tmp")]
    run(tmp_path, script, ["--out", folder, "--resume"])  # nothing but the folder needs to be said
    compare_runs(folder, undisturbed)
    run(tmp_path, script, argv + ["--resume"])  # a finished run may be resumed too
    compare_runs(folder, undisturbed)


def test_what_cannot_be_read_is_known_to_the_resumed_run(tmp_path):
    """Found in the first epoch, counted in the second, after a stop within it."""
    make_pictures(tmp_path / "data", IMAGES, seed=0)
    first, second, *_ = sorted((tmp_path / "data").rglob("*.png"))
    Image.new("RGB", (20, 20)).save(first)  # no one size: decoded on demand
    truncate(second)
    argv = arguments("hirl_moco", tmp_path / "data", "run", epochs=2)
    run(tmp_path, "hirl_moco", argv, code=143, stop_at=(STEPS + 2, signal.SIGTERM))
    run(tmp_path, "hirl_moco", argv + ["--resume"])
    assert [row.get("unreadable") for row in log(tmp_path / "run")] == [None, 1, 1]


@pytest.mark.parametrize("error, ended, kept", (
    ("common.Stop('the test pictures are gone')", 2, (1, STEPS, STEPS)),
    ("FloatingPointError", 1, (1, 0, 0)),  # a network that explodes never takes the place of a good one
))
def test_an_evaluation_that_fails_costs_no_step(error, ended, kept, pictures, tmp_path):
    """At the end of the second epoch: its steps are saved, and the same command with --resume goes on behind them."""
    argv = arguments("hirl_moco", pictures, "run")
    code = f"""if True:
        import sys, common, hirl_moco, plumbing
        real, calls = common.knn_accuracy, []
        def failing(*args):
            calls.append(args)
            if len(calls) == 3:  # after those of the untrained network and of the first epoch
                raise {error}
            return real(*args)
        common.knn_accuracy, sys.argv[0] = failing, "hirl_moco.py"
        plumbing.launch(hirl_moco.main, hirl_moco.parse_args)"""
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == ended and done.stderr.count("\n") == 1, done.stderr
    state = load(tmp_path / "run/checkpoint.pt")
    assert tuple(state[name] for name in ("epoch", "step", "steps")) == kept and len(log(tmp_path / "run")) == 2
    run(tmp_path, "hirl_moco", argv + ["--resume"])
    run(tmp_path, "hirl_moco", [*argv, "--out", "undisturbed"])
    compare_runs(tmp_path / "run", tmp_path / "undisturbed")


def test_a_run_whose_checkpoint_is_gone_does_not_begin_anew(stopped, tmp_path):
    """Two epochs in its log, or a link to nothing: there was one."""
    for name in ("trained", "linked"):
        shutil.copytree(stopped, tmp_path / name)
        (tmp_path / name / "checkpoint.pt").unlink()
    with open(tmp_path / "trained/log.jsonl", "a") as f:
        f.write('{"epoch": 2}\n')
    (tmp_path / "linked/checkpoint.pt").symlink_to(tmp_path / "purged.pt")
    for name in ("trained", "linked"):
        before = (tmp_path / name / "log.jsonl").read_bytes()
        refused(tmp_path, "hirl_moco", ["--resume", "--out", name], f"{name}/checkpoint.pt gone restore")
        assert (tmp_path / name / "log.jsonl").read_bytes() == before


def test_lars_stopped_and_resumed_is_the_same_run(pictures, tmp_path):
    """Its momentum is in the checkpoint, and the learning rate goes on warming up where it was."""
    for out, stops in (("whole", ()), ("parts", (2, STEPS + 1))):
        argv, done = arguments("hirl_simclr", pictures, tmp_path / out, epochs=2, **LARS), 0
        for stop in stops:
            again = ["--resume"] if done else []
            run(tmp_path, "hirl_simclr", argv + again, code=143, stop_at=(stop - done, signal.SIGTERM))
            done = stop
        run(tmp_path, "hirl_simclr", argv + (["--resume"] if done else []))
    compare_runs(tmp_path / "parts", tmp_path / "whole")


def test_signals_from_outside_and_kill_9(whole, pictures, tmp_path):
    """Ctrl-C whenever it comes: 130. Then the hardest stop, as soon as an epoch is saved: still the same run."""
    script, undisturbed, _ = whole
    folder, argv = tmp_path / "run", arguments(script, pictures, tmp_path / "run")
    first = Play(tmp_path, script, argv)
    first.wait_for(folder / "log.jsonl")
    os.kill(first.process.pid, signal.SIGINT)
    assert first.finish() == 130 and (folder / "checkpoint.pt").exists()
    (folder / "checkpoint.pt").unlink()  # as if it had been killed before the first one
    second = Play(tmp_path, script, argv + ["--resume"])
    second.wait_for(folder / "checkpoint.pt")
    os.kill(second.process.pid, signal.SIGSTOP)  # or it may end meanwhile
    refused(tmp_path, script, argv + ["--resume"], "in use")  # alive
    second.process.kill()
    assert second.finish() == -signal.SIGKILL
    (folder / "checkpoint.pt.tmp").write_bytes(b"torn")  # it was saving
    run(tmp_path, script, argv + ["--resume"])
    compare_runs(folder, undisturbed)
    assert not [*folder.glob("*.tmp")]


@pytest.mark.parametrize("limit", (3000, 100_000))
def test_full_disk_before_the_first_checkpoint(limit, pictures, tmp_path):
    """One sentence, and nothing half-written remains."""
    script = SCRIPTS[0]
    full = run(tmp_path, script, arguments(script, pictures, "run"), code=1, file_limit=limit)
    assert "cannot" in full.err and full.err.count("\n") == 1, full.err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "log.jsonl"]


# ---- faults: one sentence, the right exit code, nothing written

FAULTS = {  # name: (arguments after the usual ones, words the sentence must hold)
    "missing folder": ("--data no/such", "no/such does not exist"),
    "no folder": ("--data=", "--data '' does not exist"),
    "empty folder": ("--data {tmp}/empty", "no pictures"),
    "file for a folder": ("--data {tmp}/file.png", "is a file"),
    "clusters above images": ("--clusters 97 4", "97 96 pictures"),
    "clusters not falling": ("--clusters 4 12", "4 12 fall"),
    "clusters equal": ("--clusters 4 4", "fall"),
    "clusters negative": ("--clusters -3", "-3 least"),
    "batch above images": ("--batch-size 97", "--batch-size 97 96"),
    "batch of one": ("--batch-size 1", "--batch-size 2"),
    "one cluster": ("--clusters 5 1", "5 1 least 2"),
    "seed": (f"--seed {2**64}", "--seed"),
    "meta": ("--device meta", "--device meta cpu"),
    "large pictures": (f"--image-size {10**9}", "--image-size at most"),
    "giant": ("--dim 1000000000", "too large"),
    "beyond giant": (f"--dim {10**20}", "--dim at most"),
    "weight decay": ("--weight-decay 1e308", "--weight-decay at most"),
    "long name": ("--out {tmp}/" + 300 * "x", "xxx"),
    "segmentation": ("--arch fcn_resnet50", "--arch fcn_resnet50"),
    "no GPU": ("--device cuda", "--device cuda cpu"),
    "no such device": ("--device abacus", "--device abacus cpu"),
    "unknown architecture": ("--arch resnet19", "--arch resnet19"),
    "architecture without fc": ("--arch vgg11", "--arch vgg11"),
    "ViT without width": ("--arch vit-4-0-2", "--arch vit-4-0-2"),
    "ViT without blocks": ("--arch vit-4-96-0", "--arch vit-4-96-0"),
    "unknown flag": ("--batchsize 16", "--batchsize"),
    "abbreviated flag": ("--epoch 16", "--epoch"),
    "no number": ("--epochs many", "--epochs many"),
    "zero epochs": ("--epochs 0", "--epochs 0"),
    "learning rate not finite": ("--base-lr nan", "--base-lr nan"),
    "nothing to resume": ("--resume", "no run"),
    "folder below a file": ("--out {tmp}/file.png/run", "file.png/run path"),
    "run folder is a file": ("--out {tmp}/file.png", "exists"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_command_line(fault, pictures, tmp_path):
    """What all scripts share is tried with one of them, in turn."""
    (extra, words), script = FAULTS[fault], SCRIPTS[[*FAULTS].index(fault) % len(SCRIPTS)]
    if fault == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"x")
    refused(tmp_path, script, arguments(script, pictures, "run") + extra.format(tmp=tmp_path).split(), words)


@pytest.mark.parametrize("script", QUEUED)
def test_queue_above_images(script, pictures, tmp_path):
    refused(tmp_path, script, arguments(script, pictures, "run", queue_size=97), "--queue-size 97 96")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(copied, tmp_path):
    root, paths = copied
    paths[0].parent.chmod(0)
    try:
        refused(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], root, "run"), f"{paths[0].parent.name} permission")
    finally:
        paths[0].parent.chmod(0o755)


@pytest.mark.parametrize("extra, words", (
    ("--neighbours 96", "--neighbours 96 95 other pictures"), ("--neighbours -1", "--neighbours -1"),
    ("--refresh-every 0", "--refresh-every"), ("--neighbour-weight 1.5", "--neighbour-weight 1.5 most"),
    ("--level-weights 0 0 1 0", "--level-weights last"), ("--level-weights 1 1", "--level-weights 4")))
def test_faults_of_csml(extra, words, pictures, tmp_path):
    refused(tmp_path, "csml", arguments("csml", pictures, "run") + extra.split(), words)


def test_a_preset_takes_fewer_neighbours_where_there_are_fewer_pictures(tmp_path):
    make_pictures(tmp_path / "few", 4, seed=0)
    argv = "--data few --out run --clusters 0 --device cpu --epochs 1 --arch tiny --image-size 16 --preset textures"
    played = run(tmp_path, "csml", argv.split())
    assert "--neighbours reduced from the preset's 5 to 3, the other pictures there are" in played.out
    assert load(tmp_path / "run/checkpoint.pt")["keep"].shape == (4, 3)


def test_an_existing_run_is_never_overwritten(whole, pictures):
    script, folder, _ = whole
    refused(folder.parent, script, arguments(script, pictures, folder), "exists --resume --out")


@pytest.mark.parametrize("name, value", (("base_lr", 0.07), ("clusters", "10 4 2"), ("seed", 1)))
def test_resume_with_other_arguments_is_refused(name, value, stopped, pictures):
    argv = arguments("hirl_moco", pictures, stopped, **{name: value}) + ["--resume"]
    refused(stopped.parent, "hirl_moco", argv, f"{name} before --out")


def test_resume_by_another_script_is_refused(whole):
    script, folder, _ = whole
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    refused(folder.parent, other, ["--out", folder, "--resume"], f"{script} --out")


@pytest.mark.parametrize("content", ("", "[]", '{"arguments": 1}', '{"derived": {}}'))
def test_resume_from_a_broken_config(content, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    refused(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], pictures, "run") + ["--resume"], "config.json --out")


def stopped_run(script, data, tmp_path):
    """A run that was stopped in its second step."""
    run(tmp_path, script, arguments(script, data, tmp_path / "run"), code=143, stop_at=(2, signal.SIGTERM))
    return tmp_path / "run" / "checkpoint.pt"


class Bomb:
    """Unpickling this creates the file `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_resume_from_what_is_no_checkpoint(script, copied, tmp_path):
    """Truncated, empty, malicious, foreign: one sentence, and nothing in the file is ever executed."""
    root, _ = copied
    path = stopped_run(script, root, tmp_path)
    good = path.read_bytes()
    again = arguments(script, root, tmp_path / "run") + ["--resume"]
    for bad in (good[:len(good) // 2], b"", pickle.dumps(Bomb()), pickle.dumps({"model": 1})):
        path.write_bytes(bad)
        refused(tmp_path, script, again, "checkpoint.pt")
        assert not (tmp_path / "executed").exists()
    torch.save({"model": Bomb()}, path)
    refused(tmp_path, script, again, "checkpoint.pt")
    assert not (tmp_path / "executed").exists()
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)  # a good file of somebody else
    refused(tmp_path, script, again, "checkpoint.pt")
    path.write_bytes(good)
    state = load(path)
    state["model"].popitem()
    torch.save(state, path)  # a checkpoint of another network
    refused(tmp_path, script, again, "checkpoint.pt")


@pytest.mark.parametrize("script", SCRIPTS[1:2])
def test_resume_on_other_data_is_refused(script, copied, tmp_path):
    root, paths = copied
    stopped_run(script, root, tmp_path)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(paths[5])  # same name, another picture
    again = arguments(script, root, tmp_path / "run") + ["--resume"]
    refused(tmp_path, script, again, "other data --out")
    paths[5].unlink()
    refused(tmp_path, script, again, "other data --out")


@pytest.mark.parametrize("script", SCRIPTS[::4])
def test_a_loss_that_is_not_finite_stops_the_run(script, pictures, tmp_path):
    argv = arguments(script, pictures, tmp_path / "run", base_lr=1e30)
    played = run(tmp_path, script, argv, code=1)
    assert re.search("= (nan|inf).* (at step|after the last step)", played.err), played.err
    assert played.err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gradient_that_is_not_finite_is_never_saved(script, pictures, tmp_path):
    """Of an epoch's last step, where nothing looks at the network: the checkpoint of the epoch before stays."""
    argv = arguments(script, pictures, tmp_path / "run", eval_every=5, warmup_epochs=3)
    played = run(tmp_path, script, argv, code=1, poison=2 * STEPS)
    assert re.search(r"model\.\S+ = nan after the last step", played.err), played.err
    assert played.err.count("\n") == 1 and [row["epoch"] for row in log(tmp_path / "run")] == [0, 1]
    state = load(tmp_path / "run/checkpoint.pt")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())
    if script == "hirl_swav":
        assert "model.swav_prototypes = nan" in played.err


def test_others_warnings_are_not_shown(copied, tmp_path):
    """Of how long GoogLeNet takes to initialise, of a palette with transparency in bytes."""
    root, paths = copied
    Image.open(paths[3]).convert("P").save(paths[3], transparency=bytes([0, 128, 255]))
    refused(tmp_path, "hirl_moco", arguments("hirl_moco", root, "run", arch="googlenet"), "googlenet")
    refused(tmp_path, "hirl_moco", arguments("hirl_moco", root, "run", arch="vit-4-0-2"), "vit-4-0-2")  # torch.nn's
    assert run(tmp_path, "hirl_moco", arguments("hirl_moco", root, "run", plain=True, epochs=1)).err == ""


def test_crops_too_small_for_the_network(pictures, tmp_path):
    argv = arguments("hcsc", pictures, "run", image_size=1, stem="7x7") + ["--multi-crop"]
    played = run(tmp_path, "hcsc", argv, code=2)
    assert "too small" in played.err and "--image-size" in played.err and played.err.count("\n") == 1, played.err


@pytest.mark.parametrize("script, extra, words", (
    ("hirl_swav", "--arch vit-8-32-1 --local-crops 2 --local-size 4", "4 vit-8-32-1 8 --local-size"),
    ("hcsc", "--arch vit-8-32-1 --multi-crop", "7 vit-8-32-1 8 --image-size"),
    ("hirl_ibot", "--local-crops 1 --local-size 1000000000", "--local-size at most 4096"),
    ("hirl_dino", "--local-crops 1000000000", "--local-crops at most 100"),
    ("hirl_swav", "--arch tiny --stem 3x3s2 --amp --local-crops 2 --local-size 8", "8 tiny --amp 9 --local-size"),
    ("hirl_moco", "--arch resnet18 --stem 7x7 --amp", "16 resnet18 --amp 17 --image-size")))
def test_views_that_the_network_cannot_take(script, extra, words, pictures, tmp_path):
    """Before there is a run folder: the same command with a larger view works. --amp: on the CPU, of one pixel."""
    refused(tmp_path, script, arguments(script, pictures, "run") + extra.split(), words)


def test_amp_is_blamed_only_where_it_is_given(pictures, tmp_path):
    played = run(tmp_path, "hcsc", arguments("hcsc", pictures, "run", image_size=1) + ["--multi-crop"], code=2)
    assert "a view of 0 px" in played.err and "--amp" not in played.err


def test_the_last_stage_may_see_one_pixel_in_bfloat16():
    """Views of networks.SMALLEST do not send a single pixel into a strided convolution; those one smaller do."""
    for stem, size in networks.SMALLEST.items():
        network, seen = networks.backbone("tiny", stem)[0], []
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2) and module.kernel_size == (3, 3):
                module.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[2]))
        network(torch.zeros(2, 3, size, size))
        assert min(seen) > 1
        network(torch.zeros(2, 3, size - 1, size - 1))
        assert min(seen) == 1


# ---- faults of what a run left


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory):
    """A run of hirl_moco.py that was stopped in its second epoch, with settings of its own."""
    folder = tmp_path_factory.mktemp("stopped")
    argv = [*arguments("hirl_moco", pictures, folder / "run", eval_every=2), "--workers", "3"]
    run(folder, "hirl_moco", argv, code=143, stop_at=(STEPS + 2, signal.SIGTERM))
    return folder / "run"


def test_no_flipped_bit_is_loaded(stopped, tmp_path):
    """A hundred places of checkpoint.pt: a sentence, or (in the archive's unused bytes) the very same state."""
    content, generator = (stopped / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    good, told = load(stopped / "checkpoint.pt"), 0
    for bit in generator.integers(8 * len(content), size=100).tolist():
        bad = bytearray(content)
        bad[bit // 8] ^= 1 << bit % 8
        (tmp_path / "checkpoint.pt").write_bytes(bad)
        try:
            assert same(plumbing.read(tmp_path / "checkpoint.pt"), good)
        except common.Stop as stop:
            assert "is not readable" in str(stop)
            told += 1
    assert told > 90


def parse(monkeypatch, folder, *argv):
    monkeypatch.setattr("sys.argv", ["hirl_moco.py", "--out", str(folder), "--resume", *argv])
    return hirl_moco.parse_args()


def test_resume_alone_takes_the_runs_own_settings(stopped, monkeypatch):
    args = parse(monkeypatch, stopped)
    assert (args.eval_every, args.workers, args.device, args.epochs) == (2, 3, "cpu", EPOCHS)
    args = parse(monkeypatch, stopped, "--workers", "0", "--eval-every", "1", "--data", args.data + "/")
    assert (args.eval_every, args.workers) == (1, 0)  # unless said otherwise


WRONG = dict(epochs=("x", None, -1, 10**10, [3]), preset=("none", 1), stem=(3, [None]), amp=("no", None),
             base_lr=("0.1", 0, -1), argv=("seed", [1], None, {}, ["--epochs", "x"], ["--epochs"], ["--epochs", "4"]),
             bn=("other",), seed=(True, 0.5), script=(3, None, []), fingerprint=(None, 5), clusters=("12 4 2", [12]))


@pytest.mark.parametrize("name", WRONG)
def test_a_config_of_wrong_types_is_no_run(name, stopped, pictures, tmp_path, monkeypatch):
    """What it says is what the run's own command line says on its data, or it is refused."""
    config, train = json.loads((stopped / "config.json").read_text()), common.load_data(str(pictures))[0]
    derived = {k: v for k, v in config["derived"].items()
               if k not in ("pictures", "fingerprint", "processes", "device")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plumbing.Run(parse(monkeypatch, tmp_path)).start(train, "cpu", **derived)
    for value in WRONG[name]:
        part = config["derived" if name in config["derived"] else "arguments"]
        monkeypatch.setitem(part, name, value)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(common.Stop, match=f"config.json|{name}|other arguments|see --help"):
            plumbing.Run(parse(monkeypatch, tmp_path)).start(train, "cpu", **derived)


@pytest.mark.parametrize("name, value", (("epoch", "x"), ("epoch", 10**9), ("epoch", -1), ("step", None), ("step", 1.5),
                                         ("optimizer", None), ("model", 1), ("keep", 1), ("keep", ([],)), ("sums", 1),
                                         ("sums", {"moco": "x"}), ("steps", "1"), ("log", [1]), (None, [1, 2])))
def test_a_checkpoint_of_wrong_types_is_no_run(name, value, stopped, tmp_path):
    state = load(stopped / "checkpoint.pt")
    torch.save({**state, name: value} if name else value, tmp_path / "checkpoint.pt")
    model = torch.nn.Module()
    model.load_state_dict = dict
    optimizer = SimpleNamespace(load_state_dict=dict, state={})
    here = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(epochs=3), train=common.Images([]))
    with pytest.raises(common.Stop, match="no checkpoint of this run"):
        plumbing.Run.resume(here, "cpu", model=model, optimizer=optimizer)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert plumbing.Run.resume(here, "cpu", model=model, optimizer=optimizer)[:2] == (1, 2)


def test_a_resumed_state_goes_where_it_was(tmp_path):
    """On any device: neighbours are drawn, and Adam's steps are counted, on the CPU; the tree is on the device."""
    here = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(epochs=3), train=common.Images([]))
    model = torch.nn.Linear(2, 2)
    optimizer, table, tree = torch.optim.AdamW(model.parameters()), torch.arange(6).view(3, 2), ([torch.ones(2)],) * 4
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    for keep in (table, tree, None):
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=1, step=0, steps=0, sums={},
                        log=[], keep=keep), tmp_path / "checkpoint.pt")
        fresh = torch.optim.AdamW(model.parameters())
        *_, kept = plumbing.Run.resume(here, "meta", model=model, optimizer=fresh)
        assert {value.device.type for state in fresh.state.values() for value in state.values()} == {"cpu"}
        if keep is tree:
            assert [level.device.type for levels in kept for level in levels] == ["meta"] * 4
        else:
            assert same(kept, keep)


def test_preset_auto_may_be_said(stopped, monkeypatch):
    assert parse(monkeypatch, stopped, "--preset", "auto").preset == "cifar"
    assert hirl_moco.parse_args(["--preset", "auto"]).preset == "textures"


def test_resuming_with_other_threads_is_said(stopped, tmp_path):
    """It goes on, but sums in another order: no longer bit for bit."""
    shutil.copytree(stopped, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    before = config["derived"]["threads"]
    config["derived"]["threads"] = before + 7
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    played = run(tmp_path, "hirl_moco", ["--out", "run", "--resume"])
    assert re.search(rf"resumed with another .*\bthreads \({before + 7} before\)", played.out)


def test_what_an_older_run_did_not_note_is_not_said_to_differ(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["derived"]["threads"], config["derived"]["torch"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    played = run(tmp_path, "hirl_moco", ["--out", "run", "--resume"])
    assert "resumed" in played.out and "None before" not in played.out


def test_names_that_no_font_has_are_drawn_as_question_marks():
    images = common.Images(list("ab"), torch.tensor([[0], [0]]), [["caf\u00e9 \u732b"]])
    assert plumbing.describe(images, torch.arange(2)) == "n = 2\ncaf\u00e9 ?\n100 %"


def test_pictures_without_a_label_name_no_cluster():
    images = common.Images(list("abcd"), torch.tensor([[-1], [-1], [1], [-1]]), [["airplane", "bird"]])
    assert plumbing.describe(images, torch.arange(4)) == "n = 4\nbird\n100 %"
    assert plumbing.describe(images, torch.tensor([0, 3])) == "n = 2"


@pytest.mark.parametrize("left", (b"", b'{"epoch": 0, "knn"\n{"epoch": "1"}\n[]\n'))
def test_a_lost_log_comes_back(left, stopped, tmp_path):
    """The checkpoint holds what was logged before, so that no row of the trained network stands in for the first."""
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run/log.jsonl").write_bytes(left) if left else (tmp_path / "run/log.jsonl").unlink()
    played = run(tmp_path, "hirl_moco", ["--out", "run", "--resume"])
    assert [row["epoch"] for row in log(tmp_path / "run")] == [0, 1, 2, 3] and "untrained network" in played.out
    assert log(tmp_path / "run")[:2] == log(stopped)


def test_two_at_once_do_not_share_a_folder(pictures, tmp_path):
    both = [Play(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run", plain=True, epochs=1)) for _ in "ab"]
    codes = sorted(played.finish() for played in both)
    assert codes == [0, 2] and [row["epoch"] for row in log(tmp_path / "run")] == [0, 1]
    assert re.search("in use|exists", both[0].err + both[1].err)


def test_a_users_own_files_are_not_taken_for_torn_ones(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/draft.tmp").write_text("precious")
    refused(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run"), "exists --out")
    (tmp_path / "run/draft.tmp").rename(tmp_path / "draft.tmp")
    argv = arguments("hirl_moco", pictures, "run", plain=True, epochs=1)
    run(tmp_path, "hirl_moco", argv)
    (tmp_path / "draft.tmp").rename(tmp_path / "run/draft.tmp")
    run(tmp_path, "hirl_moco", [*argv, "--resume"])
    assert (tmp_path / "run/draft.tmp").read_text() == "precious"


def test_a_torn_start_is_no_run(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.tmp").write_text("{")
    refused(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run") + ["--resume"], "leave out --resume")
    run(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run", plain=True, epochs=1))
    assert not [*(tmp_path / "run").glob("*.tmp")]


@pytest.mark.parametrize("fate", ("deleted", "renamed", "a file"))
def test_a_run_folder_that_goes_away(fate, pictures, tmp_path):
    folder = tmp_path / "run"
    played = Play(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, folder, plain=True, epochs=500))
    played.wait_for(folder / "checkpoint.pt")
    folder.rename(tmp_path / "elsewhere")
    if fate == "deleted":
        shutil.rmtree(tmp_path / "elsewhere")
    elif fate == "a file":
        folder.write_text("")
    assert played.finish() == 1 and "cannot write" in played.err and played.err.count("\n") == 1, played.err


# ---- other machines, other terminals


def shell(line, folder, **environment):
    """A line of bash in which $PYTHON runs a script of ours."""
    return subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHON": sys.executable, **environment})


def test_nobody_reads_or_hears_it(pictures, tmp_path):
    """Output into `head -1` ends as with any tool; a closed stderr changes nothing."""
    command = f"$PYTHON {ROOT}/hirl_moco.py " + " ".join(arguments("hirl_moco", pictures, "run", plain=True, epochs=1))
    done = shell(command + " | head -1; echo ${PIPESTATUS[0]}", tmp_path)
    assert done.stdout.splitlines()[1:] == ["141"] and done.stderr == "", done.stderr
    reader = " | sed /^epoch.0/q > /dev/null; echo ${PIPESTATUS[0]}"  # it leaves before the first epoch is printed
    done = shell(command.replace("--out run", "--out epoch") + reader, tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "") and load(tmp_path / "epoch/checkpoint.pt")["epoch"] == 1
    done = shell(command.replace("--out run", "--out other") + " 2>&-", tmp_path)
    assert done.returncode == 0 and (tmp_path / "other/backbone.pt").exists()


def test_any_name_in_any_locale(tmp_path):
    """Newlines and Latin-1 in names of classes, in an ASCII locale: drawn, kept byte for byte but for line breaks."""
    make_pictures(tmp_path / "odd", 40, seed=4)
    os.rename(tmp_path / "odd/across", os.fsencode(tmp_path / "odd") + b"/caf\xe9\nbar")
    argv = " ".join(arguments("hirl_moco", "odd", "run", epochs=1, clusters="4 2"))
    done = shell(f"$PYTHON {ROOT}/hirl_moco.py {argv}", tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "run/tree.png").exists(), done.stderr
    with open(tmp_path / "run/clusters.csv", encoding="utf-8", errors="surrogateescape", newline="") as f:
        names = [os.fsencode(row[0]) for row in csv.reader(f)]
    assert sum(name.startswith(b"caf\xe9\xef\xbf\xbdbar/") for name in names) == 21 and len(names) == 41


def test_a_machine_without_resource_and_fork(tmp_path):
    """As on Windows: no `resource`, no `fcntl`. Ctrl-C while threads decode pictures of several sizes: saved, 130."""
    (tmp_path / "flat").mkdir()
    for i in range(32):
        Image.fromarray(painted(np.random.default_rng(i), i % 6, size=17 + i % 5)).save(tmp_path / f"flat/{i}.png")
    argv = ["hirl_moco.py", *arguments("hirl_moco", "flat", "run", plain=True, epochs=500, workers=2, batch_size=8)]
    (tmp_path / "run.py").write_text(f"""
import runpy, sys
sys.modules["resource"] = sys.modules["fcntl"] = None
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {argv!r}
runpy.run_path({str(ROOT / "hirl_moco.py")!r}, run_name="__main__")
""")
    started = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "run/checkpoint.pt").exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    time.sleep(1.5)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130 and "continue with --resume" in err and err.count("\n") == 1, err
    assert log(tmp_path / "run")[-1]["peak_memory_gib"] is None


def test_a_preset_s_tree_shrinks_to_six_pictures_a_cluster(capsys):
    """Level by level alike, and said; what the command line asks for is obeyed, and refused above the pictures."""
    preset, asked = (hirl_moco.parse_args(argv) for argv in ([], ["--clusters", "810", "270", "27"]))
    assert plumbing.fit_clusters(preset, 5400) == [810, 270, 27] and not capsys.readouterr().out
    assert plumbing.fit_clusters(preset, 600) == [100, 33, 3] and "reduced" in capsys.readouterr().out
    assert plumbing.fit_clusters(asked, 810) == [810, 270, 27]
    with pytest.raises(common.Stop, match="give at most 809"):
        plumbing.fit_clusters(asked, 809)


def test_raw_pixels_of_many_pictures_are_not_classified_on_the_cpu():
    pixels = torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8)
    many = common.Images([""] * 20_000, torch.zeros(20_000, 1, dtype=torch.long), [["x"]], pixels)
    assert networks.knn_of_pixels(many, None, 32, "cpu") is None


def test_the_last_lines_without_an_accuracy_of_raw_pixels(tmp_path, monkeypatch, capsys):
    """They are left out where 50,000 pictures or more would take minutes."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    done = plumbing.Run(hirl_moco.parse_args(["--out", str(tmp_path / "run(1) of R&D")]))
    done.train = common.Images(["a"], torch.zeros(1, 1, dtype=torch.long), [["x"]])
    done.log = [dict(epoch=0, knn=[20.0], knn_pixels=None), dict(epoch=1, knn=[60.0])]
    done.verdict()
    printed = capsys.readouterr().out
    assert "raw pixels" not in printed and re.search(r"trained network +60\.0\nerror, of before +0\.50x\n", printed)
    assert printed.endswith(f'--run "{tmp_path}/run(1) of R&D"\n')  # fit to be pasted


@pytest.mark.parametrize("words", (["--out=-x"], ["--out", "./-x"], ["--out=./-x"]))
def test_a_folder_may_begin_with_a_dash(words):
    args = hirl_moco.parse_args(["--data=-pictures", *words, "--queue-size=64"])
    assert (args.out, args.data, args.queue_size) == ("-x", "-pictures", 64) and "--queue-size" in args.argv


def test_the_last_lines_where_no_error_was_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    done = plumbing.Run(hirl_moco.parse_args(["--out", str(tmp_path / "run")]))
    done.train = common.Images(["a"], torch.zeros(1, 2, dtype=torch.long), [["x"], ["x"]])
    done.log = [dict(epoch=0, knn=[100.0, 50.0], knn_pixels=[100.0, 50.0]), dict(epoch=1, knn=[99.0, 75.0])]
    done.verdict()
    assert re.search(r"\nerror, of before +- +0\.50x\n", capsys.readouterr().out)


def test_a_folder_named_like_a_data_set_changes_no_preset(tmp_path, monkeypatch):
    """The name goes first, as in load_data; with a path the folder is meant."""
    monkeypatch.chdir(tmp_path)
    for name in common.BUILT_IN:
        (tmp_path / name).mkdir()
    presets = [hirl_moco.parse_args(["--data", name]).preset for name in [*common.BUILT_IN, "./textures"]]
    assert presets == ["textures", "cifar", "cifar", "photos", "photos"]
    assert hirl_moco.parse_args(["--data", "textures"]).out.endswith("-textures-0")


def test_a_tree_is_never_of_an_untrained_network_unless_asked_for():
    some = [hirl_moco.parse_args(["--data", "cifar10", "--epochs", n]).warmup_epochs for n in ("1", "5", "100")]
    assert some == [1, 1, 10] and hirl_moco.parse_args(["--epochs", "5", "--warmup-epochs", "0"]).warmup_epochs == 0


def test_a_second_ctrl_c_ends_a_process_at_once(tmp_path, monkeypatch):
    """The first one, and any SIGTERM, waits for the end of a step; while data is read there is none."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    stopped = plumbing.Run(hirl_moco.parse_args(["--out", str(tmp_path / "run")]))
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        stopped.note_signal(number, None)
        assert stopped.asked_to_stop() == number
    with pytest.raises(KeyboardInterrupt):
        stopped.note_signal(signal.SIGINT, None)


def test_one_event_file_for_tensorboard(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run", plain=True, epochs=2) + ["--tensorboard"])
    assert len([*(tmp_path / "run").glob("events*")]) == 1


def test_the_device_that_is_named_is_the_current_one(monkeypatch):
    """Also by one process: what asks for the current device (memory, kernels) must mean this one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *how, **on: torch.ones(1))
    assert plumbing.set_up(SimpleNamespace(device="cuda:1", seed=0)) == torch.device("cuda:1")
    assert plumbing.set_up(SimpleNamespace(device="cuda", seed=0)) == torch.device("cuda:0")
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:0")]


class OnGPU:
    """A stand-in for a tensor on a GPU: what is done with it is noted."""

    is_cuda, device, noted = True, torch.device("cuda"), []

    def __init__(self, values):
        self.values = values

    def __truediv__(self, processes):
        return self

    def to(self, where, non_blocking):
        self.noted.append(f"copy to {where}" + ", and wait" * (not non_blocking))
        return self.values


def test_a_gpu_is_not_waited_for(monkeypatch):
    """A step's losses are copied behind an event; the end of the next step waits for that, and adds or refuses them."""
    noted = OnGPU.noted
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: noted.append("record"),
                                                                     synchronize=lambda: noted.append("wait")))
    monkeypatch.setattr(plumbing, "all_reduce_sum", OnGPU)
    here = object.__new__(plumbing.Run)
    here.last, here.sums, here.steps, here.here, here.statistics = None, {}, 0, 0, []
    here.signal, here.told = 0, False
    here.end_step(0, 0, {"moco": torch.tensor(2.0)}, None)
    assert noted == ["copy to cpu", "record"] and here.sums == {}
    here.end_step(0, 1, {"moco": torch.tensor(3.0), "path": torch.tensor(math.inf)}, None)
    assert noted[2:] == ["wait", "copy to cpu", "record"] and here.sums == {"moco": 2.0}
    with pytest.raises(common.Stop, match="path = inf at step 1: stopped"):
        here.check()


@pytest.mark.parametrize("words", ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory\nmore",
                                   "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
def test_no_room_on_the_gpu_in_the_words_of_cuda(words):
    code, sentence = plumbing.explanation(RuntimeError(words))
    assert code == 1 and "give a smaller --batch-size" in sentence


def test_no_compiler_for_torch_compile():
    class InductorError(RuntimeError):
        pass

    code, sentence = plumbing.explanation(InductorError("InvalidCxxCompiler: No working C++ compiler found\nmore"))
    assert code == 2 and "--no-compile" in sentence and "\n" not in sentence
    code, sentence = plumbing.explanation(InductorError("backend='inductor' raised:\nKeyError: 'uid not found'\nmore"))
    assert code == 2 and "(KeyError: 'uid not found')" in sentence and "\n" not in sentence  # torch 2.4


@pytest.mark.parametrize("error, code, words", (
    (MemoryError(), 2, "too large (out of memory): give less"),
    (MemoryError("Unable to allocate 9 TiB"), 2, "too large (Unable to allocate 9 TiB): give less"),
    (RuntimeError("can't start new thread"), 1, "can't start new thread: raise the limit")))
def test_what_python_says_when_there_is_no_room(error, code, words):
    said, sentence = plumbing.explanation(error)
    assert said == code and words in sentence


def test_streams_of_a_notebook(pictures, tmp_path):
    """They cannot be told how to print what they cannot print; a warning is a line without a place in the code."""
    code = """if True:
        import sys, hirl_moco, plumbing, warnings
        class Out:
            def write(self, text): sys.__stdout__.write(text)
            def flush(self): sys.__stdout__.flush()
        sys.stdout = sys.stderr = Out()
        def main(args):
            warnings.warn("a cluster is empty")
            print("went well")
        plumbing.launch(main, lambda: None)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a cluster is empty\nwent well\n", "")


def test_memory_is_counted_in_the_systems_units(monkeypatch):
    now = plumbing.peak_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert plumbing.peak_memory() == pytest.approx(now / 1024, abs=6e-4)  # of rounded figures


# ---- folders as people have them


@pytest.mark.parametrize("script", SCRIPTS[::3])
def test_a_flat_folder_of_mixed_sizes_and_modes(script, tmp_path):
    """No labels, no one size, eight modes, one file truncated: named once, and the tree is drawn."""
    generator = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for i in range(48):
        pixels = painted(generator, i % 6, size=17 + i % 5)[:, : 14 + i % 7]
        save_in_mode(np.ascontiguousarray(pixels), MODES[i % 8], tmp_path / "flat" / f"{i:02d}")
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    truncate(tmp_path / "flat" / "10.png")
    (tmp_path / "flat" / "12.png").rename(tmp_path / "flat" / '12 "so, so".png')
    argv = arguments(script, "flat", "run", epochs=1, warmup_epochs=0, clusters="6 2", workers=1, batch_size=8)
    played = run(tmp_path, script, argv)
    assert played.err.count("\n") == 1 and "10.png" in played.err and "neighbour" in played.err, played.err
    assert (tmp_path / "run/tree.png").exists() and "no labels" in played.out
    with open(tmp_path / "run/clusters.csv", newline="") as f:
        names = [row[0] for row in csv.reader(f)]
    assert len(names) == 49 and names[13] == '12 "so, so".png'
    assert [row["knn"] for row in log(tmp_path / "run")] == [None] * 2
    assert log(tmp_path / "run")[-1]["unreadable"] == 1


def test_one_unreadable_picture_is_replaced_by_its_neighbour(copied, tmp_path):
    """Named once, its index replaced as well as its pixels, counted in the log."""
    root, paths = copied
    truncate(paths[7])
    script = SCRIPTS[0]
    played = run(tmp_path, script, arguments(script, root, "run", epochs=1))
    assert played.err.count(paths[7].name) == 1 and played.err.count("\n") == 1
    assert log(tmp_path / "run")[-1]["unreadable"] == 1
    train, _ = common.load_data(str(root))
    assert train.index_of.tolist() == [*range(7), 8, *range(8, IMAGES)]
    assert torch.equal(train.pixels[7], train.pixels[8])
    seen = torch.cat([index for _, index, _ in common.batches(train, 16, [common.Augmentation(size=16)], seed=0,
                                                              epoch=0)])
    assert 7 not in seen and (seen == 8).sum() == 2


@pytest.mark.parametrize("script", SCRIPTS[2:3])
def test_many_unreadable_pictures_stop_the_run(script, copied, tmp_path):
    root, paths = copied
    for path in paths[3:90:30]:
        truncate(path)
    played = run(tmp_path, script, arguments(script, root, "run"), code=2)
    assert "Traceback" not in played.err and "1 %" in played.err.splitlines()[-1]
    assert paths[3].name in played.err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_nothing_but_unreadable_pictures(tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"not a picture")
    refused(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], "bad", "run"), "2 of 3 pictures cannot be read")


def test_a_picture_that_claims_to_be_huge(copied, tmp_path):
    """A decompression bomb is one more unreadable picture."""
    root, paths = copied
    data = paths[0].read_bytes()
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + data[24:29]
    paths[0].write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])
    played = run(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], root, "run", epochs=1))
    assert played.err.count("\n") == 1 and paths[0].name in played.err
