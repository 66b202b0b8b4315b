"""Fine-tune a model on (Super)GLUE's tasks and score it, by BabyLM's protocol of 2024. As there, an
epoch is chosen by the very file that is then reported, so that figures are a bit too good.

    python data/glue.py -m RUN -d DIR       DIR holds TASK.train.jsonl and TASK.valid.jsonl
"""
import copy
import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import choobaca as c        # before torch, whose threads it sets up

import numpy as np
import torch
from click import Choice, ClickException, FloatRange, IntRange, echo, group, option
from tqdm import tqdm

TEXTS = {                   # an item's text, or its two, as the pipeline makes them of its fields
    "cola": ["{sentence}"], "sst2": ["{sentence}"], "mrpc": ["{sentence1}", "{sentence2}"],
    "qqp": ["{question1}", "{question2}"], "mnli": ["{premise}", "{hypothesis}"],
    "mnli-mm": ["{premise}", "{hypothesis}"], "qnli": ["{question}", "{sentence}"],
    "rte": ["{sentence1}", "{sentence2}"], "boolq": ["{question}", "{passage}"],
    "multirc": ["{paragraph}", "Question: {question} Answer: {answer}"],
    "wsc": ["{text}", 'Does "{span2_text}" refer to "{span1_text}" in this passage?']}
METRICS = dict.fromkeys(TEXTS, "accuracy") | {"cola": "mcc", "mrpc": "f1", "qqp": "f1"}
ROW = ("{task:<8}{metric:>9} {figure:6.1%}, seeds ± {spread}, majority {majority:6.1%}, accuracy "
       "{accuracy:6.1%} ± {stderr:5.1%}, {train:,} train, {valid:,} valid")

def read_items(path, task, tokenizer):
    """Return the ids of each item in a file, special tokens added, and the labels (n,)."""
    keys = re.findall(r"\{(\w+)\}", "".join(TEXTS[task]))
    classes = 3 if task == "mnli" else 2
    rows, labels = [], []
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), 1):
        try:
            item = json.loads(line)
            fields = {key: item[key] + "" for key in keys}              # fails on what is no text
            rows.append(tokenizer.encode(*[text.format(**fields) for text in TEXTS[task]]).ids)
            labels.append(item["label"])
            c.need(rows[-1] and type(labels[-1]) is int and 0 <= labels[-1] < classes, "no class")
        except Exception:                                               # of a dozen kinds
            raise ClickException(f"{path}, line {number}: expected a JSON object with text in "
                                 f"{', '.join(keys)} and a label from 0 to {classes - 1}.")
    c.need(rows, f"{path} is empty: expected a JSON object in each line.")
    return rows, np.array(labels)

def figure(task, labels, guesses):
    """Return the task's metric: accuracy, F1 or Matthews' correlation (MCC), where 0 / 0 is 0."""
    if METRICS[task] == "f1":
        return 2 * np.sum(labels * guesses) / max(1, np.sum(labels + guesses))
    if METRICS[task] == "mcc":                          # Pearson's correlation of zeros and ones
        return np.cov(labels, guesses, ddof=0)[0, 1] / (labels.std() * guesses.std() or 1)
    return np.mean(labels == guesses)

def class_logits(model, head, rows):
    """Return what the head makes of the last token's hidden state in each row: (B, classes)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))        # alike ones: less padding,
    states = []                                         # which no row's last token sees: no mask
    model.train(torch.is_grad_enabled())                                # dropout, if we train
    for start in range(0, len(rows), 16):
        part = [torch.tensor(rows[i]) for i in order[start:start + 16]]
        hidden = model.hidden(torch.nn.utils.rnn.pad_sequence(part, True).to(head.weight.device))
        states.append(hidden[range(len(part)), [len(row) - 1 for row in part]])     # (16, C)
    logits = head(torch.cat(states))[np.argsort(order)]                 # in the rows' order again
    c.need(logits.isfinite().all(), "the logits are not finite: take a lower --lr.")
    return logits

def fine_tune(model, task, rows, labels, valid, seed, how):
    """Train all weights as transformers' Trainer does by default. Return best epoch and guesses."""
    torch.manual_seed(seed)                                             # also for dropout
    head = torch.nn.Linear(model.config.width, labels.max() + 1, False, model.head.device)
    torch.nn.init.normal_(head.weight, 0, 0.02)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], weight_decay=0)
    starts = range(how["batch_size"], len(rows), how["batch_size"])
    rates = np.linspace(how["lr"], 0, how["epochs"] * (1 + len(starts)), endpoint=False).tolist()
    values, guesses = [], []                                            # of each epoch
    with tqdm(desc=f"{task}, seed {seed}", total=len(rates), leave=False) as bar:
        for epoch in range(how["epochs"]):
            order = np.random.default_rng([seed, epoch]).permutation(len(rows))
            for batch in np.array_split(order, starts):
                optimizer.param_groups[0]["lr"] = rates.pop(0)
                logits = class_logits(model, head, [rows[i] for i in batch])
                targets = torch.from_numpy(labels[batch]).to(logits.device)
                torch.nn.functional.cross_entropy(logits, targets).backward()
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
            with torch.no_grad():                       # the best guesses are kept, not the weights
                guesses.append({name: class_logits(model, head, items).argmax(-1).cpu().numpy()
                                for name, (items, _) in valid.items()})
            values.append(figure(task, valid[task][1], guesses[-1][task]))
            best = int(np.argmax(values))               # the first of equals
            if epoch - best == how["patience"]:
                break
    return best + 1, guesses[best]

def evaluate(folder, model, tokenizer, task, paths, how):
    """Train on a task's first file. Return the table's row of each other, kept in the folder."""
    contents = [json.dumps(how, sort_keys=True).encode(), *(path.read_bytes() for path in paths)]
    kept = folder / f"glue-{task}-{c.digest(*contents)[:8]}.jsonl"
    weights = c.weights_digests(folder)
    with c.reading(kept):
        facts, *known = map(json.loads, kept.read_bytes().splitlines()) if kept.exists() else [{}]
        if known and facts["weights"] == weights and len(known) == facts["pairs"]:
            kept.touch()                                # `figures.py macro` takes the last one
            return [row for row in facts["rows"] if ROW.format(**row)]
    train = read_items(paths[0], task, tokenizer)
    valid = {path.name.split(".")[0]: read_items(path, task, tokenizer) for path in paths[1:]}
    epochs, found = zip(*[fine_tune(copy.deepcopy(model), task, *train, valid, seed, how)
                          for seed in how["seeds"]])
    rows, lines = [], []
    for name, (_, labels) in valid.items():
        guesses = np.array([each[name] for each in found])              # (seeds, n)
        values = [figure(task, labels, each) for each in guesses]
        right = (guesses == labels).mean(0)                             # (n,)
        error = right.std() / (len(right) - 1)**0.5 if len(right) > 1 else 0.5
        rows.append({"task": name, "chosen": epochs, "train": len(train[1]), "valid": len(labels),
                     "metric": METRICS[task], "figure": np.mean(values), "values": values,
                     "spread": f"{np.std(values, ddof=1):.1%}" if len(values) > 1 else "unknown",
                     "majority": figure(task, labels, 0 * labels + np.bincount(train[1]).argmax()),
                     "accuracy": right.mean(), "stderr": error})
        lines += [{"phenomenon": name, "paradigm": name, "line": i + 1, "score": right[i],
                   "predictions": guesses[:, i].tolist()} for i in range(len(labels))]
    facts = {"pairs": len(lines), "weights": weights, "rows": rows, **how}
    with c.written_whole(kept) as file:
        file.write("".join(json.dumps(line) + "\n" for line in [facts, *lines]).encode())
    return rows

@group(cls=c.Cli, invoke_without_command=True, subcommand_metavar="",       # of no other command
       context_settings=c.cli.context_settings)
@option("-m", "--model", "folder", type=c.location, required=True, help="Run, or HF folder.")
@option("-d", "--data", type=c.location, required=True, help="Folder of TASK.*.jsonl.")
@option("--task", "tasks", multiple=True, type=Choice([*TEXTS]), help="Only this; repeatable.")
@option("--seeds", default="12", help="Of head, order and dropout, each its own run: 1,2,3.")
@option("--lr", default=5e-5, type=FloatRange(0, 1), help="Learning rate at first; falls to 0.")
@option("--batch-size", default=64, type=IntRange(1), help="Items of a step.")
@option("--epochs", default=10, type=IntRange(1), help="Passes over the training file at most.")
@option("--patience", default=3, type=IntRange(1), help="Stop so many epochs after the best.")
@option("--tokens", default=128, type=IntRange(8), help="Longest item, special tokens included.")
@c.device_option
@c.json_option
def cli(folder, data, tasks, device, as_json, **how):
    """Fine-tune on GLUE's tasks and score. Example: python data/glue.py -m RUN -d DIR"""
    c.need(re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", how["seeds"]), "--seeds: expected as 1,2,3.")
    how["seeds"] = sorted({int(seed) for seed in how["seeds"].split(",")})
    c.need(c.os.access(folder, c.os.W_OK), f"{folder} is missing, or cannot be written to.")
    model, (tokenizer, *_) = c.load_model(folder, c.choose_device(device))
    torch.set_num_threads(1 if model.config.width < 128 else torch.get_num_threads())   # as train
    c.need(model.config.positions >= 8, f"{folder} takes fewer than 8 positions: expected more.")
    tokenizer.enable_truncation(min(how["tokens"], model.config.positions))
    rows = []
    for task in dict.fromkeys(task.removesuffix("-mm") for task in tasks or TEXTS):     # mnli's
        paths = [data / f"{task}{part}.jsonl" for part in (".train", ".valid", "-mm.valid")]
        if paths[0].exists() and paths[1].exists():
            rows += evaluate(folder, model, tokenizer, task, paths[:2 + paths[2].exists()], how)
    c.need(rows, f"{data} has no TASK.train.jsonl with its TASK.valid.jsonl: see --help.")
    mean = np.mean([row["figure"] for row in rows])
    missing = ", ".join(sorted(TEXTS.keys() - {row["task"] for row in rows})) or "none"
    lines = [*(ROW.format(**row) for row in rows), f"mean {mean:.1%}, missing tasks: {missing}"]
    echo(json.dumps({"rows": rows, "missing": missing}) if as_json else "\n".join(lines))

if __name__ == "__main__":
    cli()
