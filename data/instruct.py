"""Train on prompts and responses, let a model respond, score it by Rouge-L, as the AKL paper does.

    python data/instruct.py train -c configs/akl-small.toml --objective ce --init RUN
    python data/instruct.py -m RUN -d FILE.jsonl            five seeds: mean and deviation
    python choobaca.py compare RUN RUN --suite rouge        two models on the same examples
    python data/instruct.py -m TEACHER -d dolly.train.jsonl --seeds 10 --out text/seqkd.train.jsonl

The first is choobaca.py's train, on lines with prompt and output (or response; or a list of them),
or with instruction, input and output, which get Alpaca's template. A row of a batch is an example;
only the response and its end are learnt from. The last writes a text for sequence-level
distillation (train --objective ce --text text): all examples, also where the teacher said nothing.
Training ends every response; "ended" is false where the teacher did not.
"""
import functools
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import choobaca as c        # before torch, whose threads it sets up

import click
import numpy as np
import torch
from tqdm import tqdm

TASK = "Below is an instruction that describes a task"
ASK = " Write a response that appropriately completes the request.\n\n### Instruction:\n"
MORE = ", paired with an input that provides further context."
DEV = r"(.*\.)?(dev|valid|validation)\.jsonl"          # names of held-out files

def read_example(line: str, place: str) -> list[str]:
    """Return the prompt and the response, or responses, of a line."""
    try:
        item = json.loads(line)
        prompt = item.get("prompt")
        if prompt is None:                          # Alpaca's template
            given = f"### Input:\n{item['input'] + ''}\n\n" if item.get("input") else ""
            prompt = f"{TASK}{MORE if given else '.'}{ASK}{item['instruction'] + ''}\n\n{given}"
            prompt += "### Response:\n"
        output = item.get("output", item.get("response"))
        texts = [prompt, *output] if type(output) is list else [prompt, output]
        "".join([texts[1], *texts]).encode()        # fails on what is no string, or half of one
    except Exception:                               # of a dozen kinds
        raise click.ClickException(f"{place}: expected a JSON object of strings prompt (or "
                                   "instruction and input) and output (or response).")
    return texts

def read_examples(path: Path, names: str) -> list[list[str]]:
    """Read the examples in a file, or in those of a folder, whose names match."""
    c.need(path.exists(), f"{path} does not exist: expected lines of prompts and responses.")
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.jsonl"))
    return [read_example(line, f"{file}, example {i}") for file in files
            for i, line in enumerate(c.read_text(file, names), 1)]

def encode_prompt(vocabulary: c.Vocabulary, ids: list[int], T: int) -> list[int]:
    """Put the prefix token before a prompt's ids; of a long prompt keep the end, for T / 2 in all.
    So "### Response:" is there. MiniLLM keeps the beginning, and does not train on such prompts."""
    return [vocabulary.prefix_id, *ids[max(0, len(ids) - T // 2 + 1):]]

def encode_examples(vocabulary: c.Vocabulary, examples: list[list[str]], T: int) -> np.ndarray:
    """Encode examples as rows of T ids, end to end, and one id more: (rows * T + 1,).
    A row is the prefix token, prompt, first response, the prefix token as its end, padding. What is
    only read is stored as ~id (see choobaca.windows). What is too long is left out."""
    end = vocabulary.prefix_id
    texts = [text for example in examples for text in example[:2]]
    encoded = vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    rows = []
    for prompt, response in zip(encoded[::2], encoded[1::2]):
        given = encode_prompt(vocabulary, prompt.ids, T)
        row = [~i for i in given] + response.ids + [end]
        if len(row) <= T:
            rows.append(row + [~end] * (T - len(row)))
    if len(rows) < len(examples):
        click.echo(f"{len(examples) - len(rows):,} of {len(examples):,} examples are left out: "
                   f"prompt and response take more than --context {T}.", err=True)
    return np.array([*itertools.chain(*rows), ~end], np.int32)

def read_corpus(settings: c.Settings, _) -> c.Corpus:
    """Read examples where `choobaca.py train` reads plain text."""
    c.need(settings.tokenizer, "a tokenizer is missing: give --init, --teacher or --tokenizer.")
    plain = settings.random_offset or (settings.prefix, settings.reduction) != ("line", "token")
    c.need(not plain, "--random-offset, --prefix none, --reduction batchmean are for plain text.")
    vocabulary = c.load_vocabulary(Path(settings.tokenizer))
    train = read_examples(Path(settings.text), rf"(?!{DEV}|(.*\.)?test\.).*\.jsonl")
    dev = read_examples(Path(settings.dev or settings.text), DEV)
    c.need(train, f"{settings.text} holds no *.jsonl to train on (*.dev.jsonl and *.test.jsonl are "
           "not): expected lines of prompts and responses.")
    c.need(dev or not settings.dev, f"{settings.dev} holds no *.dev.jsonl and no *.valid.jsonl.")
    ids = [encode_examples(vocabulary, examples, settings.context) for examples in (train, dev)]
    c.need(len(ids[0]) > 1, f"no example in {settings.text} fits: expected a longer --context.")
    words = sum(len(text.split()) for example in train for text in example[:2])
    text = c.digest(json.dumps([train, dev if settings.keep == "best" else []]).encode())
    digests = {"text": text, "tokenizer": c.fingerprint(vocabulary)}
    return c.Corpus(vocabulary, *ids, words, digests)

def split_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())

def choose_splitter() -> tuple:
    """Return a function from a text to words for Rouge-L, stems as in the papers, and its name."""
    try:
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        return split_words, "whole words (rouge_score, which stems them, is not installed)"
    stem = functools.cache(DefaultTokenizer(use_stemmer=True).tokenize)     # [stem] of a word
    return lambda text: sum(map(stem, split_words(text)), []), "words stemmed by rouge_score"

def rouge_l(reference: list[str], response: list[str]) -> float:
    """Return the F-measure of the longest common subsequence of two lists of words.
    "the old dog ran" and "the dog sat" share "the dog": precision 2/3, recall 2/4, F 0.571."""
    words = np.array(reference, object)
    # shared[j]: the longest, of the first j words of the reference and the response so far
    shared = np.zeros(len(words) + 1, int)
    for word in response:
        longer = shared[:-1] + (words == word)
        shared[1:] = np.maximum.accumulate(np.maximum(shared[1:], longer))
    return 2 * int(shared[-1]) / max(1, len(reference) + len(response))     # 2 P R / (P + R)

def distinct(texts: list[str], n: int) -> float:
    """Return how many different n-grams of words the texts have together, as a share of all."""
    lists = map(split_words, texts)
    grams = [gram for words in lists for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))

def end_ids(folder: Path, vocabulary: c.Vocabulary, V: int) -> list[int]:
    """Return the ids that end a response: the prefix token, as in training, or the model's eos."""
    eos = c.read_json(folder / "config.json").get("eos_token_id")
    eos = eos if type(eos) is list else [eos]
    return [vocabulary.prefix_id, *(i for i in eos if type(i) is int and 0 <= i < V)]

def respond(model, vocabulary: c.Vocabulary, examples: list[tuple], rows: list[list[int]],
            ends: list[int], most: int, temperature: float, size: int, seed: int, split) -> list:
    """Return a line for each example: the response that a seed gives, and its score."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))       # alike ones side by side
    draw = torch.Generator(model.head.device).manual_seed(seed)
    lines = [{}] * len(rows)
    for start in tqdm(range(0, len(rows), size), f"seed {seed}", leave=False, unit=" batches"):
        batch = order[start:start + size]
        drawn = c.write_on(model, [rows[i] for i in batch], ends, most, draw, temperature)
        for i, ids in zip(batch, drawn):
            prompt, *known = examples[i]
            text = vocabulary.tokenizer.decode(ids).strip()
            rouge = max(rouge_l(split(reference), split(text)) for reference in known)
            lines[i] = {"prompt": prompt, "output": text, "reference": known, "seed": seed,
                        "rouge_l": 100 * rouge, "tokens": len(ids), "ended": len(ids) < most}
    return lines

def measure(passes: list[list[dict]]) -> dict[str, dict]:
    """Return mean and deviation over the seeds of all that we measure."""
    found = {key: [float(np.mean([line[key] for line in lines])) for lines in passes]
             for key in ("rouge_l", "tokens", "ended")}
    texts = [[line["output"] for line in lines] for lines in passes]
    found |= {f"distinct_{n}": [distinct(each, n) for each in texts] for n in (1, 2)}
    return {key: {"mean": float(np.mean(values)), "by_seed": values,
                  "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None}
            for key, values in found.items()}

def write_lines(path: Path, items: list[dict]) -> None:
    with c.written_whole(path) as file:
        file.write("".join(json.dumps(item) + "\n" for item in items).encode())

@click.group(cls=c.Cli, invoke_without_command=True,
             context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("-m", "--model", "folder", type=c.location, help="Run, or HF folder.")
@click.option("-d", "--data", type=c.location, help="A file of prompts and responses.")
@click.option("--seeds", default="10,20,30,40,50", help="Each answers all prompts.")
@click.option("--sample", default=0, type=click.IntRange(0), help="About so many examples; 0: all.")
@click.option("--length", default=512, type=click.IntRange(2), help="Tokens, half for the prompt.")
@click.option("--temperature", default=1.0, type=click.FloatRange(0, 100), help="0: the likeliest.")
@click.option("--batch-size", default=64, type=click.IntRange(1), help="Draws depend on it, too.")
@click.option("--out", type=c.location, help="Keep the texts: a new file, to train on.")
@c.device_option
@c.json_option
@click.pass_context
def cli(ctx, folder, data, seeds, sample, length, temperature, batch_size, out, device, as_json):
    """Let a model respond to prompts, and score it by Rouge-L; or train it to."""
    sys.stdout.reconfigure(errors="backslashreplace")       # a path may be no UTF-8
    if ctx.invoked_subcommand:      # train_command calls choobaca's read_corpus: from here on, ours
        c.read_corpus = read_corpus
        ctx.default_map = {"train": {"random_offset": False}}
        return
    c.need(folder and data, "expected -m RUN and -d FILE.jsonl, or train ...: see --help.")
    c.need(temperature == 0 or temperature >= 1e-3, "--temperature: expected 0, or 0.001 and more.")
    c.need(re.fullmatch(r"\d{1,18}(,\d{1,18})*", seeds, re.A),
           f"--seeds is {seeds!r}: expected whole numbers, as 10,20,30.")
    seeds = sorted({*map(int, seeds.split(","))}) if temperature else [0]     # which is not used
    c.need(data.is_file(), f"{data} is no file: expected lines of prompts and responses.")
    lines = list(enumerate(read_examples(data, ".*"), 1))
    lines = lines[::max(1, round(len(lines) / sample)) if sample else 1]
    examples = [example for _, example in lines]
    weights = c.weights_digests(folder)
    model, vocabulary = c.load_model(folder, c.choose_device(device))
    torch.set_num_threads(1 if model.config.width < 128 else torch.get_num_threads())   # as train
    # where nothing can be written, we say so now, and not after hours of work
    c.need(not out or not out.exists(), f"{out} is already there: choose another --out.")
    for place in [folder, *([next(x for x in out.parents if x.exists())] if out else [])]:
        tempfile.TemporaryFile(dir=place).close()

    T = min(length, model.config.positions)
    prompts = [prompt for prompt, *_ in examples]
    encoded = vocabulary.tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
    rows = [encode_prompt(vocabulary, line.ids, T) for line in encoded]
    most = max(1, T // 2)
    cut = sum(len(row) <= len(line.ids) for row, line in zip(rows, encoded))
    click.echo(f"{cut:,} of {len(rows):,} prompts are cut to {most:,} tokens.", err=True)
    ends = end_ids(folder, vocabulary, len(model.head))
    split, words = choose_splitter()
    passes = [respond(model, vocabulary, examples, rows, ends, most, temperature, batch_size, seed,
                      split) for seed in seeds]
    if out:
        write_lines(out, sum(passes, []))
    # all that decides a score, but the model, is in the name: compare takes files of one name
    facts = {"seeds": seeds, "length": length, "temperature": temperature, "words": words,
             "batch_size": batch_size}
    stem = data.stem.encode(errors="replace")[:100].decode(errors="ignore")     # in bytes
    name = f"{stem}-t{temperature:g}-{c.digest(repr((examples, facts)).encode())[:8]}"
    path = folder / f"rouge-{name}.jsonl"
    items = [{"pairs": len(lines), "weights": weights, **facts}]
    for (i, _), *scored in zip(lines, *passes):
        score = float(np.mean([line["rouge_l"] for line in scored])) / 100
        items.append({"phenomenon": data.stem, "paradigm": data.stem, "line": i, "score": score})
    write_lines(path, items)

    measured = measure(passes)
    facts |= {"model": str(folder), "data": str(data), "n": len(lines), "scores": str(path)}
    if as_json:
        return click.echo(json.dumps(facts | measured, indent=2))
    click.echo(f"{folder} on {data}: n {len(lines):,}, seeds {seeds}, temperature {temperature:g}, "
               f"at most {most} tokens\nrouge_l: x 100, of {words}\n")
    for key, row in measured.items():
        spread = f" ± {row['deviation']:.3f}" if len(seeds) > 1 else ""
        click.echo(f"{key:<12}{row['mean']:10.3f}{spread}")

cli.add_command(c.train_command, "train")

if __name__ == "__main__":
    cli()
