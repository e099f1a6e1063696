"""results/: every table and number of the two READMEs is what the logs give, and the check of that can fail.

And what --validation, by which settings are chosen, evaluates on.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

ROOT = Path(__file__).resolve().parent.parent


def reproduce(root, *flags):
    done = subprocess.run([sys.executable, "results/reproduce.py", *flags], cwd=root, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture
def copy(tmp_path):
    """Code, logs and pages, the tables written anew so that the check of the copy starts green."""
    for path in [*ROOT.glob("*.py"), ROOT / "README.md"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    reproduce(tmp_path, "--tables")
    assert reproduce(tmp_path, "--check")[0] == 0
    return tmp_path


@pytest.fixture
def log(copy):
    """log.jsonl of a run in a page's table, passed off as made by today's code."""
    folder = next(path.parent for path in sorted(copy.glob("results/*/*/run.json")) if "health" in str(path))
    about = json.loads((folder / "run.json").read_text())
    script = about["arguments"].split()[0]
    ask = f"import sys; sys.path.insert(0, 'results'); import reproduce; print(reproduce.code_version('{script}'))"
    about["code"] = subprocess.check_output([sys.executable, "-c", ask], cwd=copy, text=True).strip()
    (folder / "run.json").write_text(json.dumps(about))
    reproduce(copy, "--tables")
    return folder / "log.jsonl"


def test_tables_and_numbers_are_what_the_logs_give():
    code, said = reproduce(ROOT, "--check")
    assert code == 0, said


def test_a_changed_number_of_a_table_is_found(copy):
    page = copy / "results" / "README.md"
    table = re.search(r"<!-- table: health -->.*?\| \d \| (\d+\.\d)", page.read_text(), re.S)
    edit(page, table[0], table[0].replace(table[1], f"{float(table[1]) + 0.1:.1f}"))
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table health is not what its logs give" in said


def test_a_changed_log_is_found(copy, log):
    *rows, last = log.read_text().splitlines()
    row = json.loads(last)
    row["knn"] = [value + 1 for value in row["knn"]]
    log.write_text("\n".join([*rows, json.dumps(row)]) + "\n")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table health" in said


def test_a_lost_log_is_found(copy, log):
    shutil.rmtree(log.parent)
    assert reproduce(copy, "--check")[0] == 1


def test_a_log_that_is_cut_off_is_found(copy, log):
    """Even where the tables are written anew from it."""
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-4]))
    reproduce(copy, "--tables")
    code, said = reproduce(copy, "--check")
    assert code == 1 and f"results/health/{log.parent.name} ends at epoch 8 of 12" in said


def test_a_log_of_another_command_is_found(copy, log):
    edit(log.parent / "config.json", "--seed 0", "--seed 1")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "was made by another command" in said


def test_a_lost_evaluation_is_found(copy):
    (copy / "results/textures/hcsc-clusters-810-270-27-0/eval.json").unlink()
    assert reproduce(copy, "--tables")[0] == 0
    code, said = reproduce(copy, "--check")
    assert code == 1 and "results/textures/hcsc-clusters-810-270-27-0 has no evaluation" in said


def test_a_table_on_no_page_is_found(copy):
    page = copy / "results" / "README.md"
    page.write_text(re.sub(r"<!-- table: bases -->.*?<!-- end -->", "", page.read_text(), flags=re.S))
    reproduce(copy, "--tables")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table bases is on no page" in said


def test_other_code_must_be_said(copy, log):
    """Red after a change of the code, until the table says "earlier code"; comments do not count."""
    edit(copy / "common.py", "import torch\n", "import torch  # the framework\n")
    assert reproduce(copy, "--check")[0] == 0
    before = (copy / "results" / "README.md").read_text().count("‡")
    edit(copy / "common.py", "def near_centroids(", "def now_otherwise():\n    pass\n\n\ndef near_centroids(")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table health" in said
    reproduce(copy, "--tables")
    assert reproduce(copy, "--check")[0] == 0
    page = (copy / "results" / "README.md").read_text()
    assert page.count("‡") > before


def test_other_arguments_are_another_run(copy, log):
    edit(copy / "results" / "reproduce.py", "--epochs 12 --eval-every 4", "--epochs 13 --eval-every 4")
    assert reproduce(copy, "--check")[0] == 1
    assert "missing" in reproduce(copy, "--list")[1]


def test_a_number_needs_a_log(copy):
    page, results = copy / "README.md", copy / "results"
    (results / "made_up.txt").write_text("it was 12.3456\n")
    edit(page, "## Results\n", "## Results\n\nIt was 12.35 %.\n")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "12.35 is in no log" in said
    edit(page, "It was 12.35 %.", "It was 12.35 % (`results/made_up.txt`).")
    assert reproduce(copy, "--check")[0] == 0
    edit(page, "12.35", "12.36")
    assert reproduce(copy, "--check")[0] == 1


def test_validation_has_pictures_of_its_own(tmp_path):
    """A folder's every tenth training picture; its test pictures are not read: here none could be."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "train" / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "test" / "class0").mkdir(parents=True)
    (tmp_path / "test" / "class0" / "0.png").write_text("no picture")
    train, held_out = common.load_data(str(tmp_path), validation=True)
    assert (len(train), len(held_out)) == (21, 3) and not {*train.names} & {*held_out.names}
    assert held_out.names == ["class0/00.png", "class0/20.png", "class1/17.png"]
    assert [int(label) for label in held_out.labels[:, 0]] == [0, 0, 1]


def test_validation_of_textures_is_neither_training_nor_test():
    train, test = common.load_data("textures")
    again, held_out = common.load_data("textures", validation=True)
    assert torch.equal(train.pixels, again.pixels) and torch.equal(test.labels, held_out.labels)
    seen = {bytes(picture.numpy()) for picture in torch.cat([train.pixels, test.pixels])}
    assert not any(bytes(picture.numpy()) in seen for picture in held_out.pixels)


SCRIPT = """import json, os, pathlib, sys
out, seed = (pathlib.Path(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--out", "--seed"))
if "--resume" not in sys.argv:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(dict(command=sys.argv, data="/somewhere/cifar100", gpus=os.environ[
        "CUDA_VISIBLE_DEVICES"])))
    if seed.name == "1":
        sys.exit(143)
rows = [dict(epoch=0, knn=[1, 2, 3], knn_pixels=[1, 2, 3]), dict(epoch=1, knn=[50, 60 + int(seed.name), 70])]
(out / "log.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""
EVALUATION = """import json, pathlib, sys
results = dict(linear=[dict(last=80.0)])
(pathlib.Path(sys.argv[sys.argv.index("--run") + 1]) / "eval.json").write_text(json.dumps(dict(results=results)))
"""


def test_a_folder_named_cifar100_is_the_folder(copy):
    """Not torchvision's set of that name, which would be fetched."""
    (copy / "cifar100").mkdir()
    code, said = reproduce(copy, "--dry-run", "--only", "gpu/*", "--cifar100", "cifar100")
    assert code == 0 and said.count(f"--data {(copy / 'cifar100').resolve()} ") == len(said.splitlines()) > 0


def test_what_was_stopped_goes_on_and_its_log_is_kept(tmp_path, monkeypatch):
    """With scripts of a few lines: seed 0 ends at once, seed 1 is stopped and goes on with the second call."""
    monkeypatch.syspath_prepend(ROOT / "results")
    import reproduce as r

    for name, text in {"hirl_moco.py": SCRIPT, "eval_linear.py": EVALUATION}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "results").mkdir()
    for name in ("common.py", "networks.py", "plumbing.py", "ranks.py", "textures.py"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(r, "ROOT", tmp_path)
    r.bare.cache_clear()
    first, second = (r.Run("textures", "hirl_moco.py --clusters 0", "", seed) for seed in (0, 1))
    args = argparse.Namespace(cifar100="/somewhere/cifar100")
    assert r.perform(first, args) and not r.perform(second, args)
    assert r.read(first).measure("knn 1") == 60 and r.read(second) is None
    assert r.perform(second, args)
    log = r.read(second)
    assert log.measure("knn 1") == 61 and log.measure("linear") == 80 and not r.age(second, log)
    assert log.run["cpu_seconds"] >= 0
    assert json.loads((tmp_path / "results" / second.id / "config.json").read_text())["gpus"] == ""  # none seen
    (tmp_path / "common.py").write_text("other = True")
    r.bare.cache_clear()
    assert r.age(second, log) == "earlier code"
    r.add_figures(second)
    assert r.age(second, log) == "earlier code, same figures"
    assert "/somewhere" not in (tmp_path / "results" / second.id / "config.json").read_text()
    (tmp_path / "hirl_moco.py").write_text(SCRIPT.replace("70", "71"))
    r.bare.cache_clear()
    r.add_figures(second)
    assert r.age(second, log) == "earlier code"


@pytest.mark.parametrize(("values", "text"), [
    ([2.0, 2.0, 2.0], "helps +2.0 [+2.0, +2.0]"),
    ([1.0, 2.0, 3.0], "+2.0 [-0.5, +4.5]"),  # 2 ± 4.303 * 1 / sqrt(3)
    ([-1.0, -2.0, -1.0, -2.0, -1.5], "hurts -1.5 [-2.1, -0.9]"),  # 1.5 ± 2.776 * 0.5 / sqrt(5)
    ([-1.0, -1.2, -0.2], "-0.8 [-2.1, +0.5]"),
    ([-1.0, -1.2, -0.76], "hurts -1.0 [-1.5, -0.4]"),
    ([-0.7, -0.97, -0.43], "hurts -0.7 [-1.37, -0.03]"),  # 0.7 ± 4.303 * 0.27 / sqrt(3): one sees that it is below 0
    ([-0.01, 0.01, -0.02], "0.0 [-0.04, +0.03]"),
    ([0.5], "+0.5, one seed"),
    ([0.3, 0.3], "+0.3, two seeds"),  # too few to say how far they spread
    ([], "")])
def test_a_word_needs_an_interval_without_0(values, text, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    import tables

    assert tables.said(values, 1) == text


def test_differences_are_over_the_seeds_that_both_rows_have(monkeypatch):
    """Those that were evaluated; and a pooled row is the mean over settings of their means."""
    monkeypatch.syspath_prepend(ROOT / "results")
    import tables

    def logs(values):
        return {seed: tables.Log({}, [dict(knn=[value])], dict(linear=[dict(last=value)] if value < 50 else []))
                for seed, value in values.items()}

    a = tables.Setting("`a`", "", logs({0: 10.0, 1: 20.0, 2: 30.0, 3: 40.0}),
                       logs({0: 11.0, 2: 33.0, 3: 42.0, 5: 99.0}))
    b = tables.Setting("`b`", "", logs({0: 10.0}), logs({0: 60.0}))
    assert tables.differences(a.logs, a.plain, "knn 0") == {0: 1.0, 2: 3.0, 3: 2.0}
    assert tables.differences(b.logs, b.plain, "linear") == {}
    assert tables.seeds(a.logs) == "4 (0, 2, 3, 5)" and tables.seeds(a.plain) == "4"
    assert tables.pooled([a, b], "knn 0") == "+26.0, two bases"
    assert tables.pooled([a, b, a], "knn 0") == "+18.0 [-50.8, +86.8]"  # 18 ± 4.303 * 27.71 / sqrt(3)
    assert tables.pooled([a, b], "linear") == "+2.0, one base"
    table = tables.study_table([a, b], {"kNN": "knn 0", "difference": "difference knn 0"}, ("both", ["a", "b"]))
    assert table.splitlines()[-1] == "| both |  |  | +26.0, two bases |"
    assert tables.intervals([table]).startswith("The tables of this page hold 1 intervals. 0 exclude 0; 0 would")


def test_an_empty_log_is_found(copy, log):
    log.write_text("")
    code, said = reproduce(copy, "--check")
    assert code == 1 and f"results/health/{log.parent.name} has an empty log" in said


def test_every_table_shows_the_accuracies_that_its_differences_are_of(monkeypatch):
    """And no heading stands for two measures."""
    monkeypatch.syspath_prepend(ROOT / "results")
    import reproduce as r

    for name, (_, columns, *_) in r.TABLES.items():
        differences = {what for what in columns.values() if what.startswith("difference")}
        assert {what for heading, what in columns.items() if heading.startswith("difference")} == differences
        elsewhere = {"textures-trees": {"knn 1"}, "summary": {"linear"}}.get(name, set())  # in a table beside it
        assert {what.removeprefix("difference ") for what in differences} - elsewhere <= {*columns.values()}, name
