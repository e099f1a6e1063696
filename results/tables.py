"""Tables, picture and checks of reproduce.py: logs in, text out. Nothing here knows which runs there are.

A *setting* is one row of a table: its label, what is to be said of the age of its logs' code, the logs of the plain
method it is compared with, and its own, both as seed -> Log.
"""

import re
import statistics
import subprocess
from typing import NamedTuple


class Log(NamedTuple):
    """What is kept of a run."""

    run: dict  # run.json: arguments, code, seconds, cpu_seconds
    rows: list  # of log.jsonl, an epoch each; row 0 precedes training
    results: dict  # of eval.json, a list of rows per protocol

    def measure(self, what):
        """A number by the name that the list of tables gives it; None where it was not evaluated."""
        name, _, place = what.partition(" ")
        if name in ("knn", "first"):  # percent, a label depth; of the trained, of the untrained network
            return self.rows[-1 if name == "knn" else 0]["knn"][int(place)]
        if name == "last":  # a figure of the last epoch's row
            return self.rows[-1].get(place)
        if name in ("cpu", "minutes"):
            seconds = self.run.get("cpu_seconds" if name == "cpu" else "seconds")
            return seconds and seconds / 60
        if name == "linear":  # percent, the finest label depth
            return next((row["last"] for row in self.results.get("linear", ())), None)
        if name == "rank":  # correlation of distances in the tree of the features and in the true tree
            return next((row["rank_correlation"] for row in self.results.get("tree", ())), None)
        return next((row["nmi"] for row in self.results.get("hierarchy", ())  # as many clusters as classes
                     if row["tree"] == "features" and row["clusters"] == row["classes"] == int(place)), None)

    def errors(self):
        """What is left of the error of the better of raw pixels and untrained network, a label depth."""
        before = [max(pair) for pair in zip(self.rows[0]["knn"], self.rows[0]["knn_pixels"])]
        return [(100 - now) / max(100 - was, 1e-9) for now, was in zip(self.rows[-1]["knn"], before)]


class Setting(NamedTuple):
    """A row of a table."""

    label: str
    age: str
    plain: dict
    logs: dict


# ---- cells

DIGITS = {"nmi": 3, "rank": 3, "last": 2, "last prototypes_in_use": 0}  # of a measure, by name or first word; else 1
T95 = 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145  # by df, from 2


def digits_of(what):
    return DIGITS.get(what, DIGITS.get(what.split()[0], 1))


def signed(value, digits):
    """With a sign, unless it rounds to 0."""
    return f"{value:+.{digits}f}" if float(f"{value:.{digits}f}") else f"{0:.{digits}f}"


def mean_std(values, digits):
    """Values, None among them, as text: mean ± standard deviation."""
    values = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def interval(differences):
    """Mean and half width of the 95 % interval of Student's t; None for the width of fewer than three values."""
    mean, n = statistics.mean(differences), len(differences)
    return mean, T95[min(n - 3, len(T95) - 1)] * statistics.stdev(differences) / n ** 0.5 if n > 2 else None


def differences(logs, plain, what):
    """seed -> difference, of the seeds that both have."""
    pairs = {seed: (log.measure(what), plain[seed].measure(what)) for seed, log in logs.items() if seed in plain}
    return {seed: own - other for seed, (own, other) in pairs.items() if None not in (own, other)}


def said(differences, digits, of="seed"):
    """Mean of paired differences, its interval, and the word that follows from it."""
    if not differences:
        return ""
    mean, half = interval(differences)
    if half is None:
        return f"{signed(mean, digits)}, {(f'one {of}', f'two {of}s')[len(differences) - 1]}"
    low, high = mean - half, mean + half
    word = "helps " if low > 0 else "hurts " if high < 0 else ""
    finer = digits + any(bound and not float(f"{bound:.{digits}f}") for bound in (low, high))  # shows its side of 0
    return f"{word}{signed(mean, digits)} [{signed(low, finer)}, {signed(high, finer)}]"


def cell(setting, what):
    logs = setting.logs.values()
    if what == "error":
        return ", ".join(f"{statistics.mean(share):.2f}x" for share in zip(*(log.errors() for log in logs)))
    if what.startswith("plain "):
        return cell(setting._replace(logs=setting.plain), what.removeprefix("plain ")) if setting.plain else ""
    if what.startswith("difference "):
        what = what.removeprefix("difference ")
        return said([*differences(setting.logs, setting.plain, what).values()], digits_of(what))
    return mean_std([log.measure(what) for log in logs], digits_of(what))


def pooled(settings, what):
    """The same over the means of several settings, for a method on several bases."""
    means = [statistics.mean(found) for s in settings if (found := differences(s.logs, s.plain, what).values())]
    return said(means, digits_of(what), "base")


def seeds(logs):
    """How many; which, where they are not the first."""
    return str(len(logs)) if {*logs} == {*range(len(logs))} else f"{len(logs)} ({', '.join(map(str, sorted(logs)))})"


# ---- tables

MARKS = {  # of a row by the age of its code, explained below the table
    "earlier code, same figures": "† trained by earlier code, which in three epochs on textures logs today's digits",
    "earlier code": "‡ trained by earlier code",
}


def markdown(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study_table(settings, columns, last=("", ())):
    """columns: heading -> measure; last: label and commands of a row of pooled differences.

    What has no log is "not run". Rows of earlier code have a mark, explained below.
    """
    lines = [["", "seeds", *columns], ["---"] * (len(columns) + 2)]
    for setting in settings:
        label = f"{setting.label} {MARKS.get(setting.age, '')[:1]}".strip()
        cells = [cell(setting, what) if setting.logs else "" for what in columns.values()]
        lines.append([label, seeds(setting.logs) if setting.logs else "not run", *cells])
    label, chosen = last[0], [setting for setting in settings if setting.label.strip("`") in last[1]]
    if chosen:
        lines.append([label, "", *(pooled(chosen, what.removeprefix("difference ")) if what.startswith("difference ")
                                   else "" for what in columns.values())])
    marks = [text for age, text in MARKS.items() if age in [setting.age for setting in settings]]
    return markdown(lines) + "\n\n" * bool(marks) + "; ".join(marks)


def verdict(setting):
    """The last lines of the first run on textures, as it prints them."""
    if not setting.logs:
        return "not run"
    log = setting.logs[0]
    values = {"raw pixels": log.rows[0]["knn_pixels"], "untrained network": log.rows[0]["knn"],
              "trained network": log.rows[-1]["knn"]}
    lines = [f"    {'kNN accuracy (%)':20}" + "".join(f"{n:>7} classes" for n in (3, 9, 27))]
    lines += [f"    {name:20}" + "".join(f"{value:15.1f}" for value in row) for name, row in values.items()]
    lines.append(f"    {'error, of before':20}" + "".join(f"{share:14.2f}x" for share in log.errors()))
    return "\n".join(lines + ["", f"({setting.age})"] * bool(setting.age))


def cost_table(costs, folder):
    """costs: (file, pattern with groups, what they say, text for the groups)."""
    lines = [["log", "what", "ratio"], ["---"] * 3]
    for file, pattern, what, text in costs:
        found = re.search(pattern, (folder / file).read_text()) if (folder / file).exists() else None
        lines.append([f"`{file}`", what, text.format(*found.groups()) if found else "not run"])
    return markdown(lines)


def file_table(files, root):
    """files: name -> what it is, in reading order. Lines of each, and of its `diff` to the script that it builds on."""
    lines = [["file", "lines", "diff", "what"], ["---"] * 4]
    for name, what in files.items():
        text, differ = (root / name).read_text(), ""
        if found := re.search(r"^Changes relative to (\w+\.py)", text, re.M):
            diff = subprocess.run(["diff", found[1], name], cwd=root, capture_output=True, text=True).stdout
            differ = f"{len(re.findall('^[<>]', diff, re.M))}{f' to `{found[1]}`' * (found[1] != 'hirl_moco.py')}"
        lines.append([f"`{name}`", str(len(text.splitlines())), differ, what])
    return markdown(lines)


# ---- picture


def picture(curves, panels):
    """kNN by epoch, mean and range over the seeds, as SVG text.

    curves: name -> (colour, [Log]); panels: title -> label level, two of them side by side.
    """
    knn = {name: [{row["epoch"]: row["knn"] for row in log.rows[1:] if row["knn"]} for log in logs]
           for name, (_, logs) in curves.items() if logs}
    last = max((max(run) for runs in knn.values() for run in runs), default=1)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 330" font-family="sans-serif" font-size="13">',
             '<rect width="780" height="330" fill="white"/>']
    left = 50
    for name, runs in knn.items():
        colour = curves[name][0]
        parts.append(f'<text x="{left:.0f}" y="316" font-size="12" fill="{colour}">{name} ({len(runs)})</text>')
        left += 44 + 6.5 * len(name)
    for left, (title, level) in zip((50, 440), panels.items()):
        values = [value[level] for runs in knn.values() for run in runs for value in run.values()] or [0, 100]
        low, high = min(values), max(values)

        def place(epoch, value, left=left, low=low, high=high):
            return f"{left + 300 * epoch / last:.1f},{250 - 220 * (value - low) / max(high - low, 1e-9):.1f}"

        parts.append(f'<text x="{left}" y="18">kNN, {title}, % by epoch, mean and range</text>')
        for tick in range(int(low // 10 + 1) * 10, int(high) + 1, 10):
            y = place(0, tick).split(",")[1]
            parts.append(f'<path d="M{left} {y}h300" stroke="#ddd"/><text x="{left - 24}" y="{y}">{tick}</text>')
        parts += [f'<text x="{left + 300 * e / last - 8:.0f}" y="272">{e}</text>' for e in range(0, last + 1, 10)]
        for name, runs in knn.items():
            epochs, colour = sorted(set.intersection(*map(set, runs))), curves[name][0]
            at = {epoch: [run[epoch][level] for run in runs] for epoch in epochs}
            band = [place(e, max(at[e])) for e in epochs] + [place(e, min(at[e])) for e in reversed(epochs)]
            mean = [place(e, statistics.mean(at[e])) for e in epochs]
            parts += [f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.2"/>',
                      f'<polyline points="{" ".join(mean)}" fill="none" stroke="{colour}" stroke-width="2"/>']
    return "\n".join([*parts, "</svg>"]) + "\n"


# ---- pages


def intervals(made):
    """How many intervals the rows of commands hold, and how many exclude 0."""
    cells = [cell for text in made for row in re.findall(r"^\| `.*$", text, re.M)
             for cell in re.findall(r"[^|]* \[[-+0-9.]+, [-+0-9.]+\]", row)]
    apart = sum("helps" in cell or "hurts" in cell for cell in cells)
    return (f"The tables of this page hold {len(cells)} intervals. {apart} exclude 0; {0.05 * len(cells):.0f} would by "
            "chance if nothing made a difference.")


BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def rendered(page, made):
    """A page with the text between its markers replaced by what is `made` (name -> text) of the logs."""
    made = made | {"intervals": intervals([made.get(block[2], "") for block in BLOCK.finditer(page)])}
    return BLOCK.sub(lambda block: f"{block[1]}\n{made.get(block[2], 'no such table')}\n\n{block[3]}", page)


def unfounded(page, root):
    """Numbers without a log: those with a decimal point or in percent, outside code and the tables between markers,
    that no .txt, .json or .jsonl of results/ named in their paragraph holds, as it stands or rounded. Words, other
    whole numbers and what stands in backticks are not looked at, nor which of a log's numbers it is.
    """
    bad = []
    for paragraph in re.sub(r"^    .*?$", "", BLOCK.sub("", page), flags=re.M).split("\n\n"):
        named = re.findall(r"(?:results/)?([\w./-]+\.(?:txt|jsonl?))", paragraph)
        texts = [(root / "results" / name).read_text() for name in named if (root / "results" / name).is_file()]
        known = [float(value) for text in texts for value in re.findall(r"\d+(?:\.\d+)?", text)]
        prose = re.sub(r"`[^`]*`|\]\(.*?\)|\d{4}\.\d{5}", "", paragraph)  # code, links, arXiv's numbers
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\d.])|(?<![\w.])\d+(?= ?%(?! interval))", prose):
            if not any(f"{value:.{len(number.partition('.')[2])}f}" == number for value in known):
                bad.append(number)
    return bad
