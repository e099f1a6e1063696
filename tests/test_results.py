"""results/: every table and number of the two READMEs is what the logs give, and the check of that can fail."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def reproduce(root, flag):
    done = subprocess.run([sys.executable, "results/reproduce.py", flag], cwd=root, capture_output=True, text=True)
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
    """log.jsonl of a run in the main README's tables, passed off as made by today's code."""
    folder = next(path.parent for path in sorted(copy.glob("results/*/*/run.json")) if "cifar100-12" in str(path))
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
    table = re.search(r"<!-- table: cifar100-12 -->.*?\| \d \| (\d+\.\d)", page.read_text(), re.S)
    edit(page, table[0], table[0].replace(table[1], f"{float(table[1]) + 0.1:.1f}"))
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table cifar100-12 is not what its logs give" in said


def test_a_changed_log_is_found(copy, log):
    *rows, last = log.read_text().splitlines()
    row = json.loads(last)
    row["knn"] = [value + 1 for value in row["knn"]]
    log.write_text("\n".join([*rows, json.dumps(row)]) + "\n")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table cifar100-12" in said


def test_a_lost_log_is_found(copy, log):
    shutil.rmtree(log.parent)
    assert reproduce(copy, "--check")[0] == 1


def test_other_code_must_be_said(copy, log):
    """Red after a change of the code, until the table says "earlier code"; comments do not count."""
    edit(copy / "common.py", "import torch\n", "import torch  # the framework\n")
    assert reproduce(copy, "--check")[0] == 0
    before = (copy / "results" / "README.md").read_text().count("(earlier code)")
    edit(copy / "common.py", "def near_centroids(", "def now_otherwise():\n    pass\n\n\ndef near_centroids(")
    code, said = reproduce(copy, "--check")
    assert code == 1 and "table cifar100-12" in said
    reproduce(copy, "--tables")
    assert reproduce(copy, "--check")[0] == 0
    page = (copy / "results" / "README.md").read_text()
    assert page.count("(earlier code)") > before


def test_other_arguments_are_another_run(copy, log):
    edit(copy / "results" / "reproduce.py", "--epochs 12", "--epochs 13")
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
