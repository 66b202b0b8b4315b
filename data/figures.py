"""Draw figures: a page that compares runs, and the toy experiment of the AKL paper.

    python data/figures.py report RUN [RUN ...]     settings, accuracies and curves on one HTML page
    python data/figures.py held-out RUN [RUN ...]   how good and how sure runs are, mean over seeds
    python data/figures.py macro RUN [RUN ...]      the macro-average of the paper's Table 3
    python data/figures.py toy                      what each divergence makes of a small teacher
    python data/figures.py paper                    what follows from the paper's own Table 2

"AKL paper" is Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
Large Language Models". We write the SVG by hand, so no plotting package is needed.
"""
import csv
import html
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parent.parent))
import choobaca as c        # before torch, whose threads it sets up

import click
import numpy as np
import torch
from torch import Tensor

# Colours of eight curves on a light and on a dark page; colour-blind eyes can tell them apart.
LIGHT = "#373bb3 #ed7a0b #00a570 #882a6f #755d1c #7c85ff #1d2228 #a591ba".split()
DARK = "#7f7cff #e0621c #2ee69a #b2659c #fdcc3c #a7d3ff #fffdf4 #838c6a".split()
STYLE = """:root { color-scheme: light dark } body, svg { font: 13px/1.4 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem } main { columns: 26rem 2; gap: 2rem }
h1 { font-size: 20px } table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: 6px 12px 6px 0; text-align: left; vertical-align: top; min-width: 2rem;
border-bottom: 1px solid #8886 } small, th { opacity: 0.7 } td:nth-child(1) { min-width: 10rem }
td:last-child { white-space: nowrap }
figure { margin: 0 0 1.5rem; break-inside: avoid } figure svg { max-width: 100%; height: auto }
text { fill: currentColor; font-size: 12px } .soft { opacity: 0.7 } .end { text-anchor: end }
.middle { text-anchor: middle } .title { font-size: 15px; font-weight: 600 }
path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round }
.axis, .chance { stroke: #8886; stroke-width: 1 } .chance { stroke: #888; stroke-dasharray: 4 3 }
circle { fill: currentColor }
"""
STYLE += "".join(f".run{i} {{ color: {colour} }}\n" for i, colour in enumerate(LIGHT))
STYLE += "@media (prefers-color-scheme: dark) {\n"
STYLE += "".join(f".run{i} {{ color: {colour} }}\n" for i, colour in enumerate(DARK)) + "}"
CURVES = {                  # the numbers of a log that the report draws
    "ce": "Cross-entropy on training text",
    "dev_loss": "Held-out loss",
    "kl": "Divergence from the teachers, × τ²",
    "loss": "Loss, by each run's own objective",
    "lr": "Learning rate",
    "beta": "Beta, the teachers' share of the mixed logits"}
LAST = {                    # the numbers of its last lines that the report's table shows
    "loss": ",.3f", "ce": ",.3f", "kl": ",.3f", "dev_loss": ",.3f", "seconds": ",.0f"}
COLUMNS = ["run", "parameters", "objective", "teachers", "steps", *LAST]
COLUMNS += [f"{suite}, %" for suite in c.SUITES]


# -----------------------------------------------------------------------------
# Charts: numbers -> the text of an SVG, whose looks are in STYLE

def ticks(low: float, high: float) -> list[float]:
    """Choose the ticks of an axis: at most six multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * k for k in (1, 2, 5, 10, 20) if power * k * 5 >= high - low)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def span(values: list[float]) -> tuple[float, float]:
    """Return the least and the greatest value, moved apart where they are too close."""
    low = min(values)
    high = max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)) + 1e-30:
        return low, high
    margin = 0.1 * abs(low) or 1.0
    return low - margin, high + margin


def text_at(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(words)}</text>'


def drawing(title: str, names: list[str], width: int, height: int, parts: list[str]) -> str:
    """Put a title and a legend above the parts of a chart, which are `height` pixels high."""
    # the legend has as many columns as the longest name allows
    names = [name if len(name) < 25 else f"{name[:9]}…{name[-14:]}" for name in names]
    column = 30 + 7 * max(len(name) for name in names)
    columns = width // column
    head = [text_at(0, 15, title, "title")]
    for i, name in enumerate(names):
        x = column * (i % columns)
        y = 34 + 18 * (i // columns)
        head.append(f'<circle class="run{i % 8}" cx="{x + 5}" cy="{y}" r="4"/>')
        head.append(text_at(x + 14, y + 4, name))

    top = y + 18
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height}" '
            f'viewBox="0 0 {width} {top + height}">{"".join(head)}'
            f'<g transform="translate(0 {top})">{"".join(parts)}</g></svg>')


def line_chart(series: dict[str, list[tuple[float, float]]], title: str, x_label: str,
               width: int = 460) -> str:
    """Draw a curve through each name's points (x, y). Some names may have none."""
    x_low, x_high = span([x for points in series.values() for x, _ in points])
    y_low, y_high = span([y for points in series.values() for _, y in points])

    def across(x: float) -> float:
        return 60 + (width - 80) * (x - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        return 166 - 160 * (y - y_low) / (y_high - y_low)

    # the axes
    parts = [f'<path class="axis" d="M60,166h{width - 80}"/>',
             text_at(width - 20, 202, x_label, "soft end")]
    for x in ticks(x_low, x_high):
        parts.append(text_at(across(x), 184, f"{x:,.6g}", "soft middle"))
    for y in ticks(y_low, y_high):
        parts.append(f'<path class="axis" d="M60.0,{down(y):.1f}h{width - 80}"/>')
        parts.append(text_at(54, down(y) + 4, f"{y:,.6g}", "soft end"))

    # the curves: a name without points still has its colour
    for i, points in enumerate(series.values()):
        if points:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
            parts.append(f'<path class="run{i % 8}" d="M{path}"/>')
    return drawing(title, list(series), width, 210, parts)


def dot_chart(rows: dict[str, list[tuple[float, float]]], names: list[str], title: str) -> str:
    """Draw percentages and their standard errors: a row for each label, a dot for each name."""
    least = min(value - error for row in rows.values() for value, error in row)
    low = max(0, min(40, 10 * int(least / 10)))
    row_height = 12 + 9 * len(names)
    bottom = row_height * len(rows)

    def across(percent: float) -> float:
        return 180 + 260 * (percent - low) / (100 - low)

    # a vertical line every 10 %, dashed where chance is
    parts = []
    for percent in range(low, 101, 10):
        kind = "chance" if percent == 50 else "axis"
        parts.append(f'<path class="{kind}" d="M{across(percent):.1f},0V{bottom}"/>')
        parts.append(text_at(across(percent), bottom + 18, str(percent), "soft middle"))

    # the rows
    for k, (label, row) in enumerate(rows.items()):
        top = row_height * k
        parts.append(text_at(170, top + row_height / 2 + 4, label[:26], "end"))
        for i, (value, error) in enumerate(row):
            y = top + 10.5 + 9 * i
            parts.append(f'<g class="run{i}"><path d="M{across(value - error):.1f},{y}'
                         f'H{across(value + error):.1f}"/>'
                         f'<circle cx="{across(value):.1f}" cy="{y}" r="3.2"/></g>')
    return drawing(title, names, 460, bottom + 26, parts)


def sheet(charts: list[str], columns: int) -> str:
    """Arrange charts from left to right, row by row, on one SVG 1,000 pixels wide."""
    parts = []
    top = 10
    for i in range(0, len(charts), columns):
        row = charts[i:i + columns]
        for j, chart in enumerate(row):
            parts.append(f'<g transform="translate({10 + 990 * j // columns} {top})">{chart}</g>')
        top += 16 + max(int(re.search(r' height="(\d+)"', chart)[1]) for chart in row)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="{top}">'
            f'<style>{STYLE}</style>{"".join(parts)}</svg>\n')


# -----------------------------------------------------------------------------
# The report: run folders -> a table, accuracies and curves

def read_log(path: Path) -> list[dict[str, float]]:
    """Read the lines of a log.jsonl, but not what a killed run left behind the last newline."""
    with c.reading(path):
        *lines, _ = path.read_bytes().split(b"\n")
        rows = [json.loads(line, parse_int=float) for line in lines]
        rows = [{key: float(row[key]) for key in row if row[key] is not None} for row in rows]
    c.need(rows and all(0 < row.get("step", 0) < 2**53 for row in rows),
           f"{path} is damaged: expected a step's number in every line. Leave the run out.")
    return rows


def curve(log: list[dict], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of each line of a log that has a finite number under the key."""
    return [(row["step"], row[key]) for row in log if abs(row.get(key, math.inf)) < 1e30]


def read_run(folder: Path) -> tuple[dict[str, str], list[dict]]:
    """Return what the table says of a run, by column, and its log.

    A folder without run.json holds another program's model, of which we know the size alone. An
    unfinished run has no config.json, so its size is not shown."""
    record = folder / "run.json"
    cells = {"run": str(folder)}
    if (folder / "config.json").exists() or not record.exists():
        model = c.empty_model(*c.from_hf_config(folder / "config.json"))
        cells["parameters"] = f"{sum(each.numel() for each in model.parameters()):,}"
    if not record.exists():
        return cells, []

    # what it was asked to do; a run of an older version lacks the newest settings
    with c.reading(record):
        run = c.read_json(record)
        settings = {**vars(c.Settings()), **run["settings"]}
        constants = c.DIVERGENCES.get(settings["objective"], [])[1:]
        constants = constants if settings["objective"] != "alternate" else []
        cells["objective"] = c.describe_loss(SimpleNamespace(**settings)).removeprefix("loss ")
        cells["objective"] += "".join(f", {name} {settings[name]:g}" for name in constants)
        teachers = [Path(str(teacher)).name for teacher in run["teachers"]]
        cells["teachers"] = ", ".join(teachers) or "none"

    # how far it came
    log = read_log(folder / "log.jsonl")
    cells["steps"] = f"{log[-1]['step']:,.0f}"
    if not (folder / "model.safetensors").exists():
        cells["steps"] += ", unfinished"
    for key, form in LAST.items():
        lines = 1 if key in ("dev_loss", "seconds") else 20
        values = [value for _, value in curve(log, key)[-lines:]]
        if values:
            cells[key] = format(np.mean(values), form)
    return cells, log


def curves(logs: list[list[dict]], names: list[str]) -> list[str]:
    """Draw each quantity that some log has twice or more, as the means of up to 100 stretches.

    We leave out the first eighth of a loss: it is so high that it would flatten the rest."""
    charts = []
    for key, title in CURVES.items():
        series = {}
        for name, log in zip(names, logs):
            points = np.array(curve(log, key)).reshape(-1, 2)
            start = 0 if key in ("lr", "beta") else len(points) // 8
            stretches = np.array_split(points[start:], 100)
            series[name] = [tuple(stretch.mean(0)) for stretch in stretches if len(stretch)]
        if max(len(points) for points in series.values()) > 1:
            charts.append(line_chart(series, title, "steps"))
    return charts


def accuracies(paths: list[Path]) -> dict[str, list[tuple[float, float]]]:
    """Return each model's accuracy and standard error, for the mean and for each phenomenon.

    All are in percent. As in eval-blimp, paradigms count alike, whatever their number of pairs."""
    scores = [c.read_scores(path) for path in paths]
    names = scores[0][0]
    c.need(all(each == names for each, _ in scores), f"{', '.join(map(str, paths))} are of "
           "different pairs, so one is damaged: score the models again with eval-blimp.")

    def mean_and_error(right: np.ndarray, groups: list[list[int]]) -> tuple[float, float]:
        means = [right[group].mean() for group in groups]
        errors = [right[group].std() / math.sqrt(len(group) - 1) if len(group) > 1 else 0.5
                  for group in groups]
        return 100 * float(np.mean(means)), 100 * math.hypot(*errors) / len(groups)

    # a paradigm is a group of pairs, a phenomenon a group of paradigms
    paradigms = {}
    for i, (phenomenon, paradigm, _) in enumerate(names):
        paradigms.setdefault((phenomenon, paradigm), []).append(i)
    rows = {f"mean of {len(paradigms)} paradigms": list(paradigms.values())}
    for (phenomenon, _), pairs in sorted(paradigms.items()):
        rows.setdefault(phenomenon.replace("_", " "), []).append(pairs)
    return {label: [mean_and_error(right, groups) for _, right in scores]
            for label, groups in rows.items()}


def report_page(names: list[str], table: list[dict[str, str]], figures: list[str]) -> str:
    """Put the table and the figures on an HTML page that needs no other file."""
    columns = [column for column in COLUMNS if any(column in row for row in table)]
    rows = ["".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns)]
    for i, (name, row) in enumerate(zip(names, table)):
        cells = [html.escape(row.get(column, "")) for column in columns]
        cells[0] = (f'<span class="run{i}">●</span> <b>{html.escape(name)}</b><br/>'
                    f"<small>{cells[0]}</small>")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/><title>ChooBaCa</title>
<meta name="viewport" content="width=device-width"/>
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'"/><style>{STYLE}</style></head><body>
<h1>{html.escape(", ".join(names))}</h1><table>{body}</table>
<p>Losses are in nats a token; loss, ce (cross-entropy) and kl (τ² × divergence) are means of the
last 20 steps. Each objective has its own loss: compare ce, or dev loss, which is held out. Curves
of losses begin after an eighth of the steps. ± is one standard error, dashed is chance.
python choobaca.py compare says whether a difference is more than luck.</p>
<main><figure>{"</figure><figure>".join(figures)}</figure></main></body></html>
"""


@click.group(cls=c.Cli, context_settings={"help_option_names": ["-h", "--help"],
                                          "max_content_width": 100})
def cli() -> None:
    """Draw a page that compares runs, or the toy experiment of the AKL paper."""


@cli.command("report")
@click.argument("folders", metavar="RUN [RUN ...]", type=click.Path(path_type=Path), nargs=-1,
                required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="The page to write, *.html, or *.svg with the figures alone.  [default: "
                   "report.html in the first run's folder]")
def report_command(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write a page on up to eight runs: their settings, their accuracies and their curves.

    Accuracies are of the pairs that train or eval-blimp has scored for all of the runs.

    \b
    Example: python data/figures.py report runs/tiny-ce-0-seed0 runs/tiny-rkl-1-seed0"""
    out = out or folders[0] / "report.html"
    different = {folder.resolve() for folder in folders}
    c.need(len(different) == len(folders) <= 8 and out.suffix in (".html", ".svg"),
           f"{len(folders)} runs, --out {out}: expected 1 to 8 different ones, and a name in .html "
           "or .svg.")
    table, logs = zip(*(read_run(folder) for folder in folders))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]

    # accuracies, of each suite that all runs have scores of
    figures = []
    for suite in c.SUITES:
        files = [{path.name for path in folder.glob(f"{suite}-*.jsonl")} for folder in folders]
        if not set.intersection(*files):
            continue
        file = c.common_scores(list(folders), suite)
        rows = accuracies([folder / file for folder in folders])
        figures.append(dot_chart(rows, names, f"Accuracy on {suite}, %"))
        for cells, (accuracy, error) in zip(table, next(iter(rows.values()))):
            cells[f"{suite}, %"] = f"{accuracy:.1f} ± {error:.1f}"
    if not figures:
        click.echo("No accuracies: these runs have no scored pairs in common. Run eval-blimp "
                   "--model RUN for each.", err=True)
    figures += curves(logs, names)

    page = report_page(names, table, figures) if out.suffix == ".html" else sheet(figures, 2)
    with c.written_whole(out) as file:
        file.write(page.encode(errors="replace"))
    click.echo(out)


# -----------------------------------------------------------------------------
# Held-out text: what became of a student, beyond its loss

GLUE = set("cola sst2 mrpc qqp mnli mnli-mm qnli rte boolq multirc wsc".split())
FACTS = {                   # of each token, then their mean; "ece" is of all tokens at once
    "loss": "cross-entropy, nats a token", "right": "share of tokens whose likeliest guess is right",
    "entropy": "of the model's distribution, nats", "sure": "mean probability of its likeliest token",
    "ece": "expected calibration error, 15 bins: the mean distance of `sure` from `right`",
    "fkl": "KL(p, q) from the mean of its teachers, nats", "rkl": "KL(q, p), nats"}


def expected_calibration_error(sure: Tensor, right: Tensor) -> float:
    """Return the gap between how sure a model is and how often it is right (Guo et al. 2017).

    Tokens are put into 15 bins by `sure` (n,). A bin's gap is that of its means, and weighs by the
    bin's share of the tokens: |mean of right - mean of sure| n_bin / n, which is |sum of both| / n.
    """
    gaps = torch.zeros(15, dtype=torch.float64)
    gaps.index_add_(0, (sure * 15).long().clamp(max=14), (right - sure).double())
    return float(gaps.abs().sum()) / len(sure)


@torch.no_grad()
def held_out(model, coach, ids: np.ndarray, T: int) -> dict[str, float]:
    """Return the FACTS of a model on held-out ids, in the rows of T tokens of its held-out loss."""
    starts = np.arange(0, len(ids) - T, T)
    c.need(len(starts), "the held-out text is shorter than a row: name some with --dev, in train.")
    parts = []
    for begin in range(0, len(starts), 16):
        inputs, targets = c.windows(ids, starts[begin:begin + 16], T)
        inputs = inputs.to(model.head.device)
        hidden, targets = model.hidden(inputs).flatten(0, 1), targets.to(inputs.device).flatten()
        from_teacher = coach.hidden(inputs).flatten(0, 1) if coach else None
        for i in range(0, len(targets), 256):           # no array of all logits
            rows = slice(i, i + 256)
            log_q = (hidden[rows] @ model.head.T).log_softmax(-1)
            top, guess = log_q.max(-1)
            facts = [-log_q.gather(1, targets[rows, None])[:, 0], guess == targets[rows],
                     -(log_q.exp() * log_q).sum(-1), top.exp()]
            if coach:
                log_p = (from_teacher[rows] @ coach.head.T).log_softmax(-1)
                facts += [c.kl(log_p, log_q), c.kl(log_q, log_p)]
            parts.append(torch.stack([fact.double() for fact in facts], 1))
    tokens = torch.cat(parts).cpu()                                             # (tokens, 4 or 6)
    names = [name for name in FACTS if name != "ece"]
    found = dict(zip(names, tokens.mean(0).tolist()))
    return found | {"ece": expected_calibration_error(tokens[:, 3], tokens[:, 1])}


def paradigm_mean(path: Path) -> float:
    """Return a model's mean over paradigms by a file of its scores."""
    names, right = c.read_scores(path)
    groups = c.group_by(range(len(names)), lambda i: names[i][:2]).values()
    return float(np.mean([right[group].mean() for group in groups]))


def teacher_folders(folder: Path, record: dict) -> list[Path]:
    """Return where the teachers of a run are: a run and its teachers may have moved."""
    teachers = [Path(teacher) for teacher in record["teachers"]]
    return [teacher if teacher.exists() else folder.resolve().parent / teacher.name
            for teacher in teachers]


def run_facts(folder: Path, scores: str | None, device: str) -> dict[str, float]:
    """Return a run's FACTS, its seed, and its accuracy by a file of scores, if there is one."""
    record = c.read_json(folder / "run.json")
    with c.reading(folder / "run.json"):
        settings = record["settings"]
        text = Path(settings["dev"] or settings["text"])
        seed, T, prefix = (c.checked(c.KNOWN[key], settings[key], f"{folder}/run.json: {key}")
                           for key in ("seed", "context", "prefix"))
        teachers = teacher_folders(folder, record)
        known = record["digests"]["weights"][:len(teachers)]
    c.need(known == [c.weights_digests(teacher) for teacher in teachers],
           f"{folder} learnt from {' and '.join(map(str, teachers))}: there are other weights now, "
           "or none, or an older version made the run.")
    model, vocabulary = c.load_model(folder, device)
    c.need(T <= model.config.positions, f"{folder}: run.json has a context of {T}: expected at "
           f"most the model's {model.config.positions} positions.")
    names = ".*" if Path(settings["dev"]).is_file() else r".*\.dev|dev\.txt"         # as training
    lines = c.read_text(text, names)
    c.need(lines and text.suffix != ".jsonl", f"{folder}: {text} holds no plain held-out text: "
           "expected *.dev or dev.txt (runs of data/instruct.py are not measured here).")
    ids = c.encode(vocabulary, lines, prefix)
    loaded = [c.load_model(teacher, device)[0] for teacher in teachers]
    coach = c.Coach(loaded, V=vocabulary.size) if teachers else None
    found = {"seed": seed, **held_out(model, coach, ids, T)}
    return found | ({"pairs": paradigm_mean(folder / scores)} if scores else {})


def recipe(folder: Path) -> str:
    """Return all that decides what a run learnt and is measured on, but the seeds."""
    record = c.read_json(folder / "run.json")
    with c.reading(folder / "run.json"):
        names = [*c.RECIPE, "dev", "eval_every", "keep"]
        facts = {name: record["settings"].get(name) for name in names if name != "seed"}
        sources = [record["digests"]["text"], record["digests"]["tokenizer"]]
        begun = record["digests"]["weights"][len(record["teachers"]):]      # by --init
        teachers = [recipe(each) if (each / "run.json").exists() else c.weights_digests(each)
                    for each in teacher_folders(folder, record)]
        return json.dumps([facts, sources, begun, teachers])


@cli.command("held-out")
@click.argument("folders", metavar="RUN [RUN ...]", type=c.location, nargs=-1, required=True)
@c.device_option
@c.json_option
def held_out_command(folders: tuple[Path, ...], device: str, as_json: bool) -> None:
    """Say how good and how sure runs are on held-out text, and on the minimal pairs scored for all.

    Runs that differ in their or their teachers' seed alone are one row: means and standard
    deviations over the seeds. The last column is the difference in pairs from the first row, seed
    by seed, with Student's t's 95 % interval over the seeds.

    \b
    Example: python data/figures.py held-out runs/tiny-ce-0-seed? runs/tiny-rkl-1-seed?"""
    groups = c.group_by(folders, recipe)
    if len({json.loads(key)[1][1] for key in groups}) > 1:
        click.echo("Runs of several vocabularies: their nats a token do not compare.", err=True)
    kept = [{path.name for path in folder.glob("blimp-*.jsonl")} for folder in folders]
    scores = c.common_scores(list(folders), "blimp") if set.intersection(*kept) else None
    device, found = c.choose_device(device), {}
    for members in groups.values():
        name = members[0].resolve().name
        if len(members) > 1:                            # without what seeds are named by
            name = re.sub(r"-?(seed|s)?\d+$", "", name) or name
        name = str(members[0]) if name in found else name
        found[name] = [run_facts(folder, scores, device) for folder in members]
        seeds = {facts["seed"] for facts in found[name]}
        c.need(len(seeds) == len(members), f"{', '.join(map(str, members))}: two runs have one "
               "seed and recipe: expected different ones.")
    if as_json:
        return click.echo(json.dumps(found, indent=2))
    width = max(map(len, found))
    first = {facts["seed"]: facts.get("pairs") for facts in next(iter(found.values()))}
    columns = [*FACTS, "pairs"]
    click.echo(f"{'':<{width}} {'n':>2}" + "".join(f"{name:>16}" for name in columns) + "   against first")
    for name, runs in found.items():
        cells = []
        for key in columns:
            values = [facts[key] for facts in runs if key in facts]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}" if values else "none")
        gaps = [np.array([facts["pairs"] - first[facts["seed"]]]) for facts in runs
                if scores and facts["seed"] in first]
        low, high = c.confidence_interval(gaps) if len(gaps) > 2 else (math.nan, math.nan)
        against = f"{np.mean(gaps):+.2%} ({low:+.2%} to {high:+.2%})" if len(gaps) > 2 else "unknown"
        click.echo(f"{name:<{width}} {len(runs):>2}" + "".join(f"{cell:>16}" for cell in cells)
                   + f"   {against}")
    click.echo("\n" + "\n".join(f"{name:<8} {what}" for name, what in FACTS.items()))


def kept_mean(folder: Path, suite: str) -> float | None:
    """Return a model's mean by its longest file of a suite's scores, if there is one."""
    files = sorted(folder.glob(f"{suite}-*.jsonl"), key=lambda path: path.stat().st_size)
    return paradigm_mean(files[-1]) if files else None


@cli.command("macro")
@click.argument("folders", metavar="RUN [RUN ...]", type=c.location, nargs=-1, required=True)
def macro_command(folders: tuple[Path, ...]) -> None:
    """Average BLiMP, the supplement, EWoK and GLUE, as the paper's Table 3 does.

    It takes what eval-blimp and data/glue.py have left in the models' folders: of several files of
    a suite the longest, of a GLUE task what was printed last. GLUE is the mean of its tasks'
    figures; the average is unknown while one of the four or a task is missing.

    \b
    Example: python data/figures.py macro runs/tiny-rkl-1-seed0"""
    width = max(len(str(folder)) for folder in folders)
    click.echo(f"{'':<{width}}" + "".join(f"{name:>11}" for name in (*c.SUITES, "glue", "macro"))
               + "  missing tasks")
    for folder in folders:
        c.need(folder.is_dir(), f"{folder} does not exist: expected a model's folder.")
        means = [kept_mean(folder, suite) for suite in c.SUITES]
        weights, tasks = c.weights_digests(folder), {}
        for path in sorted(folder.glob("glue-*.jsonl"), key=lambda path: path.stat().st_mtime):
            with c.reading(path):
                facts = json.loads(path.read_bytes().splitlines()[0])
                rows = facts["rows"] if facts["weights"] == weights else []     # of other weights
                tasks |= {row["task"]: float(row["figure"]) for row in rows}
        means.append(float(np.mean([*tasks.values()])) if tasks else None)
        missing = sorted(GLUE - tasks.keys())
        whole = None not in means and not missing
        cells = ["none" if mean is None else f"{mean:.1%}" for mean in means]
        cells.append(f"{np.mean(means):.1%}" if whole else "unknown")
        click.echo(f"{str(folder):<{width}}" + "".join(f"{cell:>11}" for cell in cells)
                   + f"  {', '.join(missing) or 'none'}")


# -----------------------------------------------------------------------------
# The toy experiment: a distribution over V points -> students that we fit to it

def toy_teachers(x: Tensor) -> dict[str, Tensor]:
    """Return the teachers: by name, a distribution over the points x, from 0 to 10. (V,) each.

    The AKL paper gives no shapes. We took these, the 50 points and the student's first logits from
    its authors' notebooks (github.com/wutaiqiang/LLM_KD_AKL, toy_examples), where x is ten times as
    long. The narrow modes are ours."""
    shapes = {                      # weight, mean and width of each peak
        "one mode": [(1, 5, 1.5)],
        "two modes": [(0.3, 2.5, 1), (0.5, 7.5, 1)],
        "two narrow modes": [(0.3, 2.5, 0.5), (0.5, 7.5, 0.5)],
        "long tail": [(1, 0, 1.6)]}
    teachers = {}
    for name, peaks in shapes.items():
        density = sum(weight * (-((x - mean) / width)**2 / 2).exp()
                      for weight, mean, width in peaks)
        teachers[name] = density / density.sum()
    return teachers


def fit_distribution(p: Tensor, objective: str, start: Tensor, to_logits, epochs: int,
                     optimizer: str) -> tuple[Tensor, Tensor]:
    """Fit n students to p (n, V), by a divergence of training with its default constant.

    A row of `start` holds a student's parameters; to_logits makes logits (n, V) of them. drkl's
    observed token is the likeliest. Returns the students' q before each epoch and at the end,
    (epochs + 1, n, V), and their last divergences (n, 1)."""
    definition, *names = c.DIVERGENCES[objective]
    constants = [getattr(c.Settings(), name) for name in names]
    targets = p.argmax(-1, keepdim=True)
    theta = start.clone().requires_grad_()
    if optimizer == "adam":
        stepper = torch.optim.Adam([theta], lr=0.1)
    else:
        stepper = torch.optim.SGD([theta], lr=1.0)

    path = []
    for epoch in range(epochs + 1):
        if objective == "alternate":
            constants = [1.0 - epoch % 2]
        # by_autograd goes from the divergence to the logits, backward from there to theta
        u = to_logits(theta)
        path.append(u.detach().softmax(-1))
        value, gradient = c.by_autograd(definition, u.detach(), p.log(), targets, *constants)
        stepper.zero_grad()
        u.backward(gradient)
        stepper.step()
    return torch.stack(path), value


def toy_results(objectives: tuple[str, ...], **how) -> dict[str, dict]:
    """Return what `toy --json` prints: by teacher p and, by objective, what two students did.

    The first has a logit for each point. "head" and "tail" are its sums of |p - q| in the head and
    in the tail of p (AKL paper, Eqs. 12 to 14) by epoch, and "far" is the sum where p < 0.001;
    "largest" is max |p - q| at the end, and "q" the end itself. The second is one Gaussian, whose
    mean and width we fit. It has several minima: "gaussian_q" is the best end of ten starts."""
    x = torch.arange(50, dtype=torch.float64) / 5
    teachers = toy_teachers(x)
    p = torch.stack(list(teachers.values()))                            # (4, V)
    free = torch.rand(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = torch.arange(0.5, 10, dtype=torch.float64)
    gaussians = torch.stack([means, torch.zeros_like(means)], 1)        # mean and log width

    def gaussian(theta: Tensor) -> Tensor:
        mean, log_width = theta.split(1, 1)
        return -((x - mean) / log_width.clamp(-3, 9).exp())**2 / 2

    # fit the students of all teachers at once: a row does not influence another
    results = {name: {"p": row.tolist(), "objectives": {}} for name, row in zip(teachers, p)}
    for objective in objectives:
        path, _ = fit_distribution(p, objective, free.repeat(4, 1), lambda z: z, **how)
        ends, value = fit_distribution(p.repeat_interleave(10, 0), objective,
                                       gaussians.repeat(4, 1), gaussian, **how)
        best = value.view(4, 10).argmin(1)
        for i, result in enumerate(results.values()):
            q = path[:, i]
            gap = (p[i] - q).abs()
            head = c.likely_share(q, p[i].expand_as(q), c.Settings().mu)[:, 0]
            result["objectives"][objective] = {
                "head": (head * gap.sum(-1)).tolist(),
                "tail": ((1 - head) * gap.sum(-1)).tolist(),
                "far": gap[:, p[i] < 1e-3].sum(-1).tolist(),
                "largest": gap[-1].max().item(),
                "q": q[-1].tolist(),
                "gaussian_q": ends[-1, 10 * i + best[i]].tolist()}
    return results


def toy_figure(results: dict[str, dict]) -> str:
    """Draw, for each teacher, errors in head and far tail by epoch, and the Gaussian students."""
    charts = []
    for teacher, result in results.items():
        for key, title, x_label, x in (("head", "head's error", "epochs", range(51)),
                                       ("far", "far tail's error", "epochs", range(51)),
                                       ("gaussian_q", "one Gaussian", "x", np.arange(50) / 5)):
            # the teacher is in every legend, so that an objective keeps its colour
            series = {"teacher": list(zip(x, result["p"])) if key == "gaussian_q" else []}
            for name, row in result["objectives"].items():
                series[name] = list(zip(x, row[key]))
            charts.append(line_chart(series, f"{teacher}: {title}", x_label, 320))
    return sheet(charts, 3)


def toy_table(results: dict[str, dict], epochs: int) -> str:
    """Return a line for each teacher and for each objective, distributions drawn as blocks."""
    # two lines of headings: the errors are shown at epochs 5 and 20
    shown = [epoch for epoch in (5, 20) if epoch <= epochs]
    wide = 6 * len(shown)
    after = "".join(f"{epoch:>6}" for epoch in shown)
    lines = [f"{'sum of |p - q| by epoch':<26}{'head':>{wide}}  {'tail':>{wide}}  "
             f"{'p < 0.001':>{wide}}  largest at  one Gaussian,",
             f"{'teacher':<17}{'objective':<9}{after}  {after}  {after}     the end  "
             "the best of ten"]

    # the teacher, then a line for each objective; the highest block is the group's largest value
    for teacher, result in results.items():
        rows = result["objectives"]
        top = max(result["p"] + [value for row in rows.values() for value in row["gaussian_q"]])

        def blocks(p: list[float], top: float = top) -> str:
            return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in p[::2])

        lines.append(f"{teacher:<{30 + 3 * wide}} the teacher  {blocks(result['p'])}")
        for name, row in rows.items():
            errors = ["".join(f"{row[part][epoch]:6.3f}" for epoch in shown)
                      for part in ("head", "tail", "far")]
            lines.append(f"{'':<17}{name:<9}{'  '.join(errors)}  {row['largest']:10.1e}  "
                         f"{blocks(row['gaussian_q'])}")
    return "\n".join([*lines, "", "head: the fewest tokens of half the mass; tail: the others."])


@cli.command("toy")
@click.option("--objective", "objectives", multiple=True, default=["fkl", "rkl", "akl"],
              show_default=True, type=click.Choice(list(c.DIVERGENCES)),
              help="What to compare; may be repeated.")
@click.option("--epochs", default=250, show_default=True, type=click.IntRange(1, 2000),
              help="Steps of the optimizer.")
@click.option("--optimizer", type=click.Choice(("adam", "sgd")), default="adam", show_default=True,
              help="Adam, as in the paper, or plain gradient descent.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path),
              help="Also draw all this into a file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object in place of the table.")
def toy_command(objectives: tuple[str, ...], svg: Path | None, as_json: bool, **how) -> None:
    """Fit students to fixed distributions, as in the AKL paper (section 3.2, Figures 2 and 3).

    A student with a logit for each token finds the teacher under every objective: it seeks no
    modes. Only a student that cannot be the teacher (one Gaussian, two narrow modes) shows what
    its objective seeks.

    Early on, forward KL leads in the head, and reverse KL far out in the tail, where the teacher
    has almost nothing (p < 0.001): each weighs errors by the probabilities in its sum. In the tail
    as a whole forward KL leads under Adam, reverse KL under --optimizer sgd.

    \b
    Example: python data/figures.py toy --svg toy.svg"""
    c.need(not svg or svg.suffix == ".svg" and (svg.is_file() or not svg.exists()),
           f"--svg {svg}: expected the name of a file *.svg.")
    results = toy_results(objectives, **how)
    if svg:
        with c.written_whole(svg.resolve()) as file:
            file.write(toy_figure(results).encode())
    click.echo(json.dumps(results, indent=2) if as_json else toy_table(results, how["epochs"]))


# What the paper's section 3 says of two models: in how many tasks of these suites the first is
# better, as good, worse. "BLiMP (17 tasks)" is BLiMP's 12 phenomena and the supplement's 5 tasks.
CLAIMS = [("RV-1-24", "RV-2-24", "glue", (3, 8, 0)), ("RV-1-24", "RV-2-24", "ewok", (0, 11, 0)),
          ("RV-1-24", "RV-2-24", "blimp supplement", (0, 17, 0)),
          ("RV-1-23", "RV-2-23", "glue ewok", (12, 7, 3)),
          ("RV-1-23", "RV-2-23", "blimp supplement", (8, 2, 7)),
          ("RV-1-24", "FW-2-24", "glue ewok", (3, 18, 1))]
SCORES_NOT_ACCURACIES = ("cola", "mrpc", "qqp")         # Matthews' correlation, and F1
ITEMS = {"wsc": 52, "qa_congruence_easy": 64, "rte": 139, "mrpc": 204, "turn_taking": 280,
         "a BLiMP paradigm": 1000, "boolq": 1635, "multirc": 2424, "subject_aux_inversion": 3867,
         "mnli": 4908, "qqp": 20_215}                   # in BabyLM's files; not known for all


def paper_means(rows: list[dict[str, str]], suite: str, without: tuple[str, ...] = ()) -> str:
    """Say for which models the mean of a suite's rows in Table 2 is what Table 3 prints."""
    tasks = [row for row in rows if row["suite"] == suite and row["row"] not in ("mean", *without)]
    printed, = (row for row in rows if row["suite"] == suite and row["row"] == "mean")
    off = {}
    for model in list(printed)[2:]:
        mean = sum(float(row[model]) for row in tasks) / len(tasks)
        if abs(mean - float(printed[model])) > 0.1:             # both are rounded, by 0.05 each
            off[model] = f"{model} {mean:.1f} ({printed[model]})"
    left_out = f" without {', '.join(without)}" if without else ""
    agree = len(printed) - 2 - len(off)
    names = f"; not for {', '.join(off.values())}" if 0 < len(off) < 8 else ""
    return (f"{suite}{left_out}: the mean of {len(tasks)} rows is the one printed for {agree} of "
            f"{len(printed) - 2} models{names}")


def paper_claim(rows: list[dict[str, str]], better: str, other: str, suites: str,
                claim: tuple[int, int, int]) -> str:
    """Count in how many tasks one model's figure in Table 2 is higher, equal, lower.

    "Match" is not defined: we try all margins up to 10 points within which two figures may."""
    gaps = [round(float(row[better]) - float(row[other]), 1) for row in rows
            if row["suite"] in suites.split() and row["row"] != "mean"]

    def count(margin: float) -> tuple[int, int, int]:
        wins = sum(gap > margin for gap in gaps)
        losses = sum(gap < -margin for gap in gaps)
        return wins, len(gaps) - wins - losses, losses

    margins = [step / 10 for step in range(101) if count(step / 10) == claim]
    how = f"within {margins[0]} to {margins[-1]} points" if margins else "no margin gives that"
    return (f"{better} against {other}, {suites.replace(' ', ' and ')}: said to be better, as "
            f"good, worse in {claim}; Table 2 has {count(0)}; {how}")


def ranked(figures: dict[str, float]) -> str:
    """List models and their figures, the highest first."""
    order = sorted(figures, key=figures.get, reverse=True)
    return ", ".join(f"{model} {figures[model]:.1f}" for model in order)


@cli.command("paper")
def paper_command() -> None:
    """Say what follows from the paper's Tables 2 and 3 (data/paper.csv), and what does not.

    \b
    Example: python data/figures.py paper"""
    rows = list(csv.DictReader((c.HOME / "data/paper.csv").read_text().splitlines()))
    click.echo("Means of Table 3, in parentheses where they differ from those of Table 2's rows:")
    for suite in ("blimp", "supplement", "ewok", "glue"):
        click.echo("- " + paper_means(rows, suite))
    click.echo("- " + paper_means(rows, "glue", SCORES_NOT_ACCURACIES))
    macro = {model: float(rows[-1][model]) for model in list(rows[-1])[2:]}
    click.echo(f"- Macro-averages as printed: {ranked(macro)}")
    # the same with the mean of all (Super)GLUE tasks for each model, as the two baselines have it
    for model in macro:
        printed = [float(row[model]) for row in rows if row["row"] == "mean"][:3]
        tasks = [float(row[model]) for row in rows if row["suite"] == "glue"][:-1]
        macro[model] = (sum(printed) + sum(tasks) / len(tasks)) / 4
    click.echo(f"- With all 11 (Super)GLUE tasks for all: {ranked(macro)}")
    click.echo("\nWhat section 3 counts:")
    for claim in CLAIMS:
        click.echo("- " + paper_claim(rows, *claim))
    click.echo("\nTwo models whose answers differ on a fifth of n items can be told apart (95 %) "
               "from this\nmany points on, 196 sqrt(0.2 / n):")
    for name, n in ITEMS.items():
        click.echo(f"  {name:<22} {n:>6,}  {196 * math.sqrt(0.2 / n):5.1f}")


if __name__ == "__main__":
    cli()
