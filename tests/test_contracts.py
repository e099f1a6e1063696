"""What keeps the files comparable, liftable and honest: shared blocks, flags, imports, sizes, what README promises."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torchvision

import common
from test_losses import unit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
METHODS = sorted(p for p in ROOT.glob("*.py") if re.fullmatch(r"(hirl_\w+|hcsc|csml)\.py", p.name))
SCRIPTS = [*METHODS, ROOT / "eval_linear.py"]
HOUSE = [ROOT / f"{name}.py" for name in ("textures", "ranks", "common", "networks", "plumbing")]  # in this order
PACKAGES = {"torch", "torchvision", "numpy", "tqdm"}  # at run time
BANNER = re.compile(r"^ *# ---- (.*)$", re.MULTILINE)


def tree_of(path):
    return ast.parse(path.read_text())


def blocks(path):
    """{title: text up to the next banner} of a file, at the top level and inside functions alike."""
    text = path.read_text()
    starts = [*BANNER.finditer(text)]
    titles = [match[1] for match in starts]
    assert len(set(titles)) == len(titles), f"{path.name} repeats a banner"
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {match[1]: text[match.end():end].rstrip() for match, end in zip(starts, ends)}


# ---- scripts that one can compare


def test_shared_blocks_are_byte_identical():
    """`# ---- [shared] title` means the same bytes in every script that has the title."""
    seen = {}
    for path in METHODS:
        for title, text in blocks(path).items():
            assert re.match(r"\[(shared(: [\w, ]+)?|method)\] \S", title), f"{path.name}: banner '{title}'"
            if title.startswith("[shared"):
                first, expected = seen.setdefault(title, (path.name, text))
                assert text == expected, f"'{title}' differs between {first} and {path.name}"


def test_every_script_has_every_shared_block():
    reading_first = [title for title in blocks(ROOT / "hirl_moco.py") if title.startswith("[shared] ")]
    assert len(reading_first) >= 7
    for path in METHODS:
        missing = [title for title in reading_first if title not in blocks(path)]
        assert not missing, f"{path.name} lacks {missing}"


def test_sizes():
    """Lines of a file; of a script's main and of the loop over its batches."""
    most = {"textures.py": 140, "common.py": 950, "networks.py": 180, "ranks.py": 150, "plumbing.py": 600,
            "test_losses.py": 900, "eval_linear.py": 600, "hirl_moco.py": 290, "hirl_simclr.py": 290, "hcsc.py": 345,
            "csml.py": 380, "hirl_swav.py": 380, "hirl_dino.py": 400, "hirl_ibot.py": 455}
    for path in [*HOUSE, *SCRIPTS, ROOT / "test_losses.py"]:
        lines = len(path.read_text().splitlines())
        assert lines <= most.get(path.name, 400), f"{path.name}: {lines} lines"
    for path in METHODS:
        main, = (node for node in tree_of(path).body if getattr(node, "name", "") == "main")
        inner, = (node for node in ast.walk(main) if isinstance(node, ast.For) and "timed" in ast.unparse(node.iter))
        longer = {"hirl_dino.py": 10, "hirl_ibot.py": 15}.get(path.name, 0)  # two networks, two kinds of output
        for what, node, limit in (("main", main, 120 + longer), ("the loop over batches", inner, 40 + longer)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limit, f"{path.name}: {what} has {lines} lines"


# ---- arguments


def flags(tree):
    """The calls that declare a command-line flag."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("add", "add_argument")
            and isinstance(node.args[0], ast.Constant) and str(node.args[0].value).startswith("--")]


def declared(tree):
    return {node.args[0].value.strip("-").replace("-", "_") for node in flags(tree)}


def read(tree):
    """The names x of every args.x, and of every fit("x", args, ...), which reads them by name."""
    by_name = {node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args
               and getattr(node.func, "attr", getattr(node.func, "id", "")) == "fit"
               and isinstance(node.args[0], ast.Constant)}
    return by_name | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                      and ast.unparse(node.value) in ("args", "self.args", "run.args")}


def test_every_declared_flag_is_read_and_every_one_read_is_declared():
    plumbing = tree_of(ROOT / "plumbing.py")
    shared, read_there = declared(plumbing), read(plumbing)
    added = {"out", "argv", "script", "fingerprint"}  # by resolve_arguments, and from a run by eval_linear.py
    for path in SCRIPTS:
        tree = tree_of(path)
        its = declared(tree) | (shared if path in METHODS else set())
        assert len(its) >= 15
        unread = its - read(tree) - read_there
        assert not unread, f"{path.name} never reads {sorted(unread)}"
        unknown = read(tree) - its - added
        assert not unknown, f"{path.name} reads what it does not declare: {sorted(unknown)}"


def test_every_flag_has_help():
    for path in [*SCRIPTS, ROOT / "plumbing.py"]:
        for node in flags(tree_of(path)):
            assert any(word.arg == "help" for word in node.keywords), f"{path.name}: {node.args[0].value}"


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_help_shows_the_docstring_and_every_preset(script, capsys):
    module = import_module(script)
    with pytest.raises(SystemExit) as end:
        module.parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in text and "--data-root" in text
    for preset in getattr(module, "PRESETS", {}):
        assert preset in text
    table = text[text.rfind("\npreset "):]
    for name in next(iter(getattr(module, "PRESETS", {"": {}}).values())):
        assert "--" + name.replace("_", "-") + " " in table


def commands(text):
    """[(script, its arguments)] of the command lines of a text; `runs/x` and the like stand for a reader's own."""
    found = re.findall(r"(?:python|torchrun [^\n]*?|uv run) (\w+\.py)((?: [^\s#`·|()]+)*)", text)
    return [(name.removesuffix(".py"), shlex.split(words)) for name, words in found]


@pytest.mark.parametrize("path", [*METHODS, ROOT / "README.md"], ids=lambda path: path.name)
def test_commands_that_are_shown_are_accepted(path):
    """Those of the docstrings and of README; nothing is run. eval_linear.py asks for a run that is there."""
    shown = [(name, argv) for name, argv in commands(path.read_text()) if (ROOT / f"{name}.py") in METHODS]
    assert len(shown) >= 2
    for name, argv in shown:
        try:
            import_module(name).parse_args(argv)
        except common.Stop as stop:
            raise AssertionError(f"{path.name}: {name}.py {' '.join(argv)}: {stop}") from None


# ---- imports


def imported(path):
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield node.module.split(".")[0]


def test_imports_go_one_way_and_to_few_packages():
    """Scripts -> plumbing -> networks -> common -> ranks, textures; no script another's; PIL comes with torchvision."""
    house = [path.stem for path in HOUSE]
    for path in [*HOUSE, *SCRIPTS]:
        below = house[:house.index(path.stem)] if path in HOUSE else house[1:]
        for name in imported(path):
            assert name in {*below, *PACKAGES, "PIL"} or name in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_requirements_are_the_packages_that_are_imported():
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert {re.match(r"\w+", line)[0] for line in requirements} == PACKAGES
    for path in SCRIPTS:  # the header that `uv run` reads
        header = re.search(r"^# dependencies = (\[.*\])$", path.read_text(), re.MULTILINE)
        assert sorted(ast.literal_eval(header[1])) == sorted(requirements), path.name


def test_files_import_without_side_effects():
    """Nothing printed, no file written, no argument read, no signal handler, no draw from the global generator."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--no-such-flag']\n"
            "import signal, torch; before = torch.get_rng_state(), torch.get_num_threads()\n"
            + "".join(f"import {path.stem}\n" for path in [*HOUSE, *SCRIPTS]) +
            "assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]\n"
            f"assert signal.getsignal(signal.SIGTERM) == {int(signal.SIG_DFL)}\n")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.listdir(folder) == []


def test_benchmarks_find_what_they_measure():
    """They import names of the files above, which move; profile_step.py lists functions, each of some script."""
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n" + "".join(
        f"runpy.run_path({str(path)!r}, run_name='bench')\n" for path in sorted((ROOT / "bench").glob("*.py")))
    code += ("import importlib, profile_step as p\n"
             f"scripts = [importlib.import_module(name) for name in {[path.stem for path in METHODS]}]\n"
             "found = {(part, name) for script in scripts for _, name, part in p.functions(script)}\n"
             "lost = {(part, name.split('.')[-1]) for part, names in p.PARTS.items() for name in names} - found\n"
             "assert not lost, lost")
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what a reader takes away


def test_public_functions_and_classes_have_docstrings():
    """All but `main` and the argument parser, whose every line carries its own help."""
    for path in [*HOUSE, *SCRIPTS]:
        for node in tree_of(path).body:
            if (isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                    and node.name not in ("main", "parse_args")):
                assert ast.get_docstring(node), f"{path.name}:{node.lineno}: {node.name} has no docstring"


LIFTED = {  # function of common.py: the sections, of it and of ranks.py, that have to be pasted with it
    "kmeans": ["ranks and rows", "k-means and hierarchy"],
    "hierarchical_kmeans": ["ranks and rows", "k-means and hierarchy"],
    "nearest_neighbours": ["ranks and rows", "k-means and hierarchy", "kNN and neighbours"],
}
SECTIONS = {**blocks(ROOT / "ranks.py"), **blocks(ROOT / "common.py")}
PASTE_IMPORTS = "\n".join(
    ast.unparse(node) for path in (ROOT / "ranks.py", ROOT / "common.py") for node in tree_of(path).body
    if isinstance(node, ast.Import | ast.ImportFrom) and "ranks" not in ast.unparse(node)
    and "textures" not in ast.unparse(node))  # what README says to put above the pasted sections


def sections_needed(name):
    """Titles, without what follows a colon, of the sections that a function reaches by its calls."""
    home, uses = {}, {}
    for title, text in SECTIONS.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                home[node.name] = title.split(":")[0]
                uses[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    reached, todo = set(), {name}
    while todo:
        reached |= todo
        todo = {other for one in todo for other in uses[one] if other in home} - reached
    return [title for title in dict.fromkeys(home.values()) if any(home[one] == title for one in reached)]


@pytest.mark.parametrize("name", LIFTED)
def test_kmeans_and_neighbours_are_lifted_with_the_sections_that_readme_names(name):
    """No more and no less: pasted into an empty file they give what common.py gives, bit for bit."""
    assert sections_needed(name) == LIFTED[name]
    piece = re.search(r"^## Take a piece\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    assert name in piece and all(f'"{title}"' in piece for title in LIFTED[name])
    namespace = {"__name__": "pasted"}
    exec(PASTE_IMPORTS, namespace)
    for title, source in SECTIONS.items():
        if title.split(":")[0] in LIFTED[name]:
            exec(source, namespace)
    x = unit(200, 4, dtype=torch.float32)
    how = {"kmeans": (x, 9), "hierarchical_kmeans": (x, [9, 3]), "nearest_neighbours": (x, 5)}[name]
    also = dict(temperature=0.2) if name == "hierarchical_kmeans" else {}
    ours, theirs = (source(*how, **also) for source in (namespace[name], getattr(common, name)))
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(a, b)


def flat(found):
    """The tensors of a tensor, or of tuples and lists of them."""
    return [found] if torch.is_tensor(found) else [tensor for part in found for tensor in flat(part)]


def test_the_piece_of_readme_runs(tmp_path, monkeypatch):
    """README's lines as they stand, on random unit rows; its backbone.pt is ResNet-18's weights without fc."""
    piece = re.search(r"^## Take a piece\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    code = "\n".join(line[4:] for line in piece.splitlines() if line.startswith("    "))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    weights = torchvision.models.resnet18().state_dict()
    torch.save({name: w for name, w in weights.items() if not name.startswith("fc.")}, "runs/x/backbone.pt")
    namespace = dict(features=unit(1200, 16, dtype=torch.float32), index=torch.arange(7), q=unit(7, 16), k=unit(7, 16),
                     z=unit(7, 3, 16, dtype=torch.float32), queue=unit(40, 16))
    exec(code, namespace)
    assert namespace["loss"].isfinite() and namespace["losses"].isfinite().all()
    assert namespace["neighbours"].shape == (1200, 5)
    assert torch.equal(namespace["network"].conv1.weight, weights["conv1.weight"])


def test_readme_names_the_command_that_the_checks_run_and_it_installs_what_the_tests_import():
    """`.ci/run` takes its command out of README: there is one, and it brings every package that a test imports."""
    section = re.search(r"^## Tests\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    command, = re.findall(r"^    (pip install .*)$", section, re.MULTILINE)
    assert "requirements.txt" in command and command.endswith("python -m pytest")
    assert "README.md" in (ROOT / ".ci/run").read_text()
    installed = PACKAGES | {"PIL"} | {dict([("scikit-learn", "sklearn")]).get(word, word) for word in command.split()}
    for path in [ROOT / "test_losses.py", *(ROOT / "tests").glob("*.py")]:
        local = {other.stem for folder in (ROOT, ROOT / "tests", ROOT / "bench", ROOT / "results")
                 for other in folder.glob("*.py")}
        for name in imported(path):
            assert name in installed | local or name in sys.stdlib_module_names, f"{path.name} imports {name}"
