"""ChooBaCa: knowledge distillation of a language model, in one file.

A big model (the teacher) learns from ten million words. A small one (the student) learns from the
same text and, at every token, from the teacher's whole distribution. This file trains both, under
a choice of divergences, and scores what was learnt on minimal pairs of sentences. It follows
"Choosy Babies Need One Coach: Inducing Mode-Seeking Behavior in Baby Llama with Reverse KL
Divergence" (Shi, Matusevych and Nissim, BabyLM 2024), called "the paper" below.

    python choobaca.py train --objective rkl --teachers 1     a teacher, then its student
    python choobaca.py train --objective ce                   the same student without a teacher
    python choobaca.py eval-blimp                             the newest run's grammar, pair by pair
    python choobaca.py compare RUN RUN                        is the second one better, or lucky?
    python choobaca.py report RUN RUN                         both on a page: curves and grammar
    python choobaca.py sample RUN --prompt "the dog"          what it writes
    python choobaca.py toy                                    what each divergence seeks, on a line
    python choobaca.py bench                                  the loss against its matrix products
    python choobaca.py configs, download NAME                 the paper's models, their text

Read it from the top: the order of the file is the order of the data.

    1. text -> ids on disk          5. the fused loss           9. minimal pairs
    2. ids -> a step's batch        6. schedules, optimizer    10. the command line
    3. the models                   7. run folders             11. commands beside it: download,
    4. the divergences              8. training                    report, bench, toy, sample

One legend for the axes, used everywhere:

    B batch   T time   N = B * T tokens   C width   H heads   D = C / H   V vocabulary
    n the tokens of a chunk: a part of N that is worked on at once

The paper's temperature is called tau, for T is time. "AKL paper" is Wu et al. 2024, "Rethinking
Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models". What differs from
the paper, or from BabyLlama whose code it builds on, is marked in its place with the number that it
has here:

    (1) every line of text begins with <s>, and its first word with a space: scoring asks for both
    (2) all 256 bytes are in the vocabulary from the start, so that no text is ever dropped
    (3) the divergence is a mean over tokens, as the cross-entropy is; BabyLlama's "batchmean", a
        setting here, sums it over the T tokens of a row, which makes it T times as heavy
    (4) the student's part of the mixed logits (Eq. 2) is held constant; a setting, too
    (5) the learning rate follows one cosine to the end, after a warmup
"""
import contextlib
import csv
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import http.client
import html
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# torch's threads wait for each other by spinning. With the default, long spinning, one other busy
# program makes a small model's step a hundred times slower; with this it costs nothing when alone.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # read when torch is loaded, so set before

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import (Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:         # Windows: no lock on a run's folder, and no word on peak memory
    fcntl = resource = None

HOME = Path(__file__).resolve().parent

def need(condition, message: str) -> None:
    """Stop with one sentence to the user unless the condition holds."""
    if not condition:
        raise click.ClickException(message)

def setting(default, help: str, choices: tuple = (), low=0, high=2**31 - 1, path: bool = False):
    """A field of a settings class: its default, its help and the values it takes.

    The settings classes below are the only place where a setting is written down: flags, help, the
    keys of a TOML file and all checks are made from them."""
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": choices, "low": low, "high": high, "path": path})

def checked(field: dataclasses.Field, value, source: str):
    """The value, if it fits the setting. Error: another type, out of range, no such choice."""
    rules, shown = field.metadata, f"{source} is {repr(value)[:60]}"
    need(type(value) is field.type or field.type is float and type(value) is int,
         f"{shown}: expected {field.type.__name__}.")
    if field.type is str:
        need("\0" not in value, f"{shown}: expected text without a NUL.")
        need(not rules["choices"] or value in rules["choices"],
             f"{shown}: expected one of {', '.join(rules['choices'])}.")
    elif field.type is not bool:
        need(rules["low"] <= value <= rules["high"],
             f"{shown}: expected {rules['low']} to {rules['high']}.")
    return field.type(value)

@contextlib.contextmanager
def naming(path: Path | str):
    """Let an OSError within name the file; that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise

@contextlib.contextmanager
def written_whole(path: Path):
    """A binary file to write to; `path` appears when it is complete and on the disk, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")       # each writer has its own
    try:
        with naming(path):
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

def write_json(path: Path, value) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())

def read_json(path: Path) -> dict:
    """The JSON object in a file. Error: not JSON, not an object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise click.ClickException(f"{path} is not JSON: {error}.")
    need(isinstance(value, dict), f"{path} holds a {type(value).__name__}: expected an object.")
    return value

def digest(*contents: bytes) -> str:
    """The SHA-256 of byte strings and of their boundaries, in hexadecimal."""
    total = hashlib.sha256()
    for content in contents:
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()

def file_digest(path: Path, kind: str = "sha256") -> str:
    """The SHA-256, or another digest, of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()

# -----------------------------------------------------------------------------
# 1. Text to tokens
#
# a folder of text files -> documents -> ids, once, in a flat file on disk

@dataclass(frozen=True)
class TextSettings:
    """What is read and how it becomes ids."""
    text: str = setting(f"{HOME}/data/tiny", "Folder of text: *.train, *.txt; UTF-8.", path=True)
    dev: str = setting("", "Folder of held-out text, *.dev, dev.txt; empty: the same.", path=True)
    tokenizer: str = setting("", "A tokenizer.json or its folder; empty: train one.", path=True)
    vocab_size: int = setting(16_000, "V of the tokenizer, when one is trained.", low=259,
                              high=2**24)
    clean: bool = setting(False, "Clean BabyLM's files, each by its name, as BabyLlama did.")
    prefix: str = setting("line", "Where the text gets the <s> that scoring begins with.",
                          choices=("line", "document", "none"))

class Vocabulary(NamedTuple):
    """A tokenizer, and all that a model's folder says of it."""
    tokenizer: Tokenizer
    prefix_id: int                  # the token that stands before a sentence when it is scored
    files: dict[str, bytes]         # tokenizer.json and the small files beside it, as they are

    @property
    def size(self) -> int:
        """V, one more than the last id."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def digest(self) -> str:
        """Of all that decides which ids a text becomes."""
        return digest(self.files["tokenizer.json"], str(self.prefix_id).encode())

class Corpus(NamedTuple):
    """All that is known of the text."""
    vocabulary: Vocabulary
    train: np.ndarray               # (tokens,)
    dev: np.ndarray                 # (tokens,), empty where no text is held out
    digests: dict[str, str]         # of the text and the tokenizer

SPACES = ((r"[ \t\xa0]+", " "), (r" ([.,;!?])", r"\1"))
CLEANING = {        # what is replaced in the files of BabyLM 2023 and 2024 (BabyLlama's notebook)
    "aochildes": SPACES, "childes": SPACES, "bnc_spoken": SPACES,
    "cbt": (*SPACES, (r"(\w) (['’]\w)", r"\1\2")),
    "open_subtitles": ((r"(?im)^.*subtitle.*$", ""),),              # "Subtitles by ..."
    "wikipedia": ((r"= = = (.+?) = = =\n", r"\1"),)}

def lower_capitals(line: str) -> str:
    """A line of QED's in capitals, where each I was read as l, as sentences; others as they are."""
    letters = re.sub(r"\(.*?\)|[.!?]", "", line)
    if 2 * sum(map(str.isupper, letters)) < max(1, len(letters)):
        return line
    return "".join(map(str.capitalize, re.split(r"([.!?]\s*)", line.replace("l", "I"))))

def clean_text(text: str, domain: str) -> str:
    """The text of the file named so in BabyLM, cleaned; the rest of them need it not."""
    for pattern, new in CLEANING.get(domain, ()):
        text = re.sub(pattern, new, text)
    return "\n".join(map(lower_capitals, text.split("\n"))) if domain == "qed" else text

class Source(NamedTuple):
    """A zip file on the net, and what is taken out of it."""
    url: str
    members: dict[str, str]     # our folder: how a member's path ends, its name there as the group
    digest: str = ""            # its SHA-256, or MD5 where only that is known; empty: neither is

OSF = "https://files.osf.io/v1/resources/ad7qg/providers/osfstorage/66358ec34664da20a0ed6acc/?zip="
SOURCES = {                     # what `download` knows: its folder in data/, and where it is from
    "babylm-2023": [Source("https://github.com/babylm/babylm.github.io/raw/main/babylm_data.zip",
                           {"train_10M": r"babylm_10M/(\w+\.train)",
                            "dev": r"babylm_dev/(\w+\.dev)"},
                           "1337771192c61fa38c7eca2ef535f568c19270789b114fe7c60fe23e4314ab57")],
    "babylm-2024": [Source("https://osf.io/download/5mk3x/", {"train_10M": r"(\w+\.train)"},
                           "dc67e5d2db96ed4f76cb072e2504a18c"),
                    Source("https://osf.io/download/m48ed/", {"dev": r"(\w+\.dev)"})],
    "blimp": [Source("https://github.com/alexwarstadt/blimp/raw/"
                     "3e56b06fcabca9b30822fc66435fca6b1aa40bb1/BLiMP.zip",
                     {"": r"data/(\w+\.jsonl)"},
                     "172a1a714d72e72a89e8384dd531483f3d0f8a9aee3d33dccaf7992d8cecbb73")],
    "blimp-filtered": [Source(OSF, {"": r"blimp_filtered/(\w+\.jsonl)"})],
    "supplement": [Source(OSF, {"": r"supplement_filtered/(\w+\.jsonl)"})],
}

def how_to_get(folder: Path) -> str:
    """What a message about a missing folder ends with: the command, if there is one for it."""
    for name in SOURCES:
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(HOME / "data" / name)):
            return f" To get it, run python choobaca.py download {name}."
    return ""

def read_lines(path: Path, clean: bool = False) -> list[str]:
    """A document: the lines of a UTF-8 file, stripped, without the empty ones.

    Error: nothing in it, or a byte that is not UTF-8 (which it names)."""
    try:
        text = path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{path} is not UTF-8: byte {error.start} is "
                                   f"0x{error.object[error.start]:02x}. Save the file as UTF-8.")
    text = clean_text(text, path.stem) if clean else text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    need(lines, f"{path} is empty: expected text. Fill the file or remove it.")
    return lines

def read_documents(folder: Path, names: str, clean: bool = False) -> list[list[str]]:
    """The documents of the files whose names match, in the order of their names."""
    need(folder.is_dir(), f"{folder} is not a folder: expected one that holds text files."
         + how_to_get(folder))
    return [read_lines(path, clean) for path in sorted(folder.iterdir())
            if re.fullmatch(names, path.name)]

def train_tokenizer(folder: Path, documents: list[list[str]], vocab_size: int) -> None:
    """Learn a byte-level BPE, as BabyLlama's, and write the files that AutoTokenizer loads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(specials.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),           # <- differs (2)
        show_progress=False)
    lines = list(itertools.chain.from_iterable(documents))
    tokenizer.train_from_iterator(tqdm(lines, "vocabulary", leave=False, unit=" lines"), trainer)
    write_json(folder / "special_tokens_map.json", specials)
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", facts | specials)
    with written_whole(folder / "tokenizer.json") as file:          # last: the folder is complete
        file.write(tokenizer.to_str(pretty=True).encode())

def load_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a tokenizer.json, or in a folder that has one.

    The prefix token is the bos_token that a file beside it names, else its eos_token, else <s>."""
    path = path / "tokenizer.json" if path.is_dir() else path
    files, roles = {"tokenizer.json": path.read_bytes()}, {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if path.with_name(name).exists():
            files[name] = path.with_name(name).read_bytes()
            beside = read_json(path.with_name(name))
            roles |= {role: token for role, token in beside.items() if token is not None}
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:                      # the library raises nothing more precise
        raise click.ClickException(f"{path} is not a tokenizer of the tokenizers library: {error}.")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True          # a "<s>" in a text is three letters, no token
    for token in (roles.get("bos_token"), roles.get("eos_token"), "<s>"):
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            return Vocabulary(tokenizer, tokenizer.token_to_id(token), files)
    raise click.ClickException(f"{path}: no token begins a text: expected a bos_token or eos_token "
                               "in the tokenizer_config.json beside it.")

def encode(vocabulary: Vocabulary, documents: list[list[str]], prefix: str, dtype) -> np.ndarray:
    """The ids of all documents, end to end: (tokens,).

    The text "A dog.\\nIt ran." becomes, by the prefix setting,

        line        <s> " A dog." <s> " It ran."
        document    <s> " A dog." "\\n" " It ran." "\\n"
        none        "A dog." "\\n" "It ran." "\\n"

    <- differs (1): BabyLlama's is "none": it has no <s> and no space before the first word of a
    line, so its scores, conditioned on <s> and that space, ask for what was never seen."""
    tokenizer, start = vocabulary.tokenizer, [vocabulary.prefix_id]
    space = "" if prefix == "none" else " "
    if prefix == "none":
        plain = '"add_prefix_space":false'
        tokenizer = Tokenizer.from_str(tokenizer.to_str().replace(plain[:-5] + "true", plain))
        tokenizer.encode_special_tokens = True
    before = start if prefix == "line" else []
    after = [] if prefix == "line" else tokenizer.encode("\n", add_special_tokens=False).ids[-1:]
    pieces = []
    with tqdm(total=sum(map(len, documents)), desc="encoding", unit=" lines", leave=False) as bar:
        for lines in documents:
            pieces.append(np.array(start if prefix == "document" else [], dtype))
            for i in range(0, len(lines), 10_000):
                some = [space + line for line in lines[i:i + 10_000]]
                encoded = tokenizer.encode_batch_fast(some, add_special_tokens=False)
                ids = itertools.chain.from_iterable(before + line.ids + after for line in encoded)
                pieces.append(np.fromiter(ids, dtype))
                bar.update(len(some))
    return np.concatenate(pieces)

HEADER = 512        # bytes before the ids: a line of JSON, filled up with spaces

def encode_once(path: Path, vocabulary: Vocabulary, documents: list[list[str]], prefix: str,
                digests: dict[str, str]) -> np.ndarray:
    """The documents' ids, kept in the file at `path`: uint16, or uint32 for V above 65,536.

    Its header names the text, the tokenizer and the ids' digest. Where the file is not there, or
    its header is not of these, the text is encoded: nothing is ever used that does not fit."""
    dtype = np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)

    def header(ids: bytes) -> bytes:
        facts = {"format": "choobaca ids 2", **digests, "prefix": prefix, "dtype": str(dtype),
                 "sha256": hashlib.sha256(ids).hexdigest()}
        return json.dumps(facts).ljust(HEADER).encode()

    whole = path.read_bytes() if path.exists() else b""
    if whole[:HEADER] != header(whole[HEADER:]):
        ids = encode(vocabulary, documents, prefix, dtype).tobytes()
        whole = header(ids) + ids
        with written_whole(path) as file:
            file.write(whole)
    return np.frombuffer(whole, dtype, offset=HEADER)

def read_corpus(settings: TextSettings, cache: Path) -> Corpus:
    """The corpus that the settings name. What is made of it, a tokenizer and ids, is kept in a
    folder under `cache` whose name is a digest of what they are made from."""
    train, dev = (read_documents(Path(folder), names, settings.clean) for folder, names in (
        (settings.text, r".*\.train|(?!dev\.txt$).*\.txt"),
        (settings.dev or settings.text, r".*\.dev|dev\.txt")))
    need(train, f"{settings.text} holds no *.train and no *.txt: expected training text.")
    need(dev or not settings.dev, f"{settings.dev} holds no *.dev and no dev.txt: expected text.")
    texts = [digest(*("\n".join(lines).encode() for lines in group)) for group in (train, dev)]
    given = load_vocabulary(Path(settings.tokenizer)) if settings.tokenizer else None
    origin = given.digest if given else f"{settings.vocab_size} tokens"
    facts = " ".join((texts[0], origin, settings.prefix)).encode()
    folder = cache / f"text-{digest(facts)[:12]}"
    if not given and not (folder / "tokenizer.json").exists():
        train_tokenizer(folder, train, settings.vocab_size)
    vocabulary = given or load_vocabulary(folder)
    ids = [encode_once(folder / f"{part}.ids", vocabulary, documents, settings.prefix,
                       {"text": text, "tokenizer": vocabulary.digest})
           if documents else np.zeros(0, np.uint16)
           for part, documents, text in zip(("train", "dev"), (train, dev), texts)]
    return Corpus(vocabulary, *ids, {"text": texts[0], "tokenizer": vocabulary.digest})

# -----------------------------------------------------------------------------
# 2. Tokens to batches
#
# ids, seed, step  ->  inputs (B, T) and targets (B, T), the inputs' next tokens

@dataclass(frozen=True)
class BatchSettings:
    """How a step's rows are cut out of the text."""
    context: int = setting(128, "T, the tokens of a row.", low=1)
    batch_size: int = setting(32, "B, the rows of an optimizer step.", low=1)
    random_offset: bool = setting(True, "Shift each row by 0 to T - 1 tokens, anew each epoch.")
    seed: int = setting(0, "Seed of the weights, the order of the rows and dropout.")

def count_rows(tokens: int, settings: BatchSettings) -> int:
    """The rows of an epoch. A row needs T + 1 ids, and T - 1 more where it may be shifted."""
    spare = settings.context - 1 if settings.random_offset else 0
    return max(0, tokens - 1 - spare) // settings.context

@functools.lru_cache(maxsize=2)
def row_starts(rows: int, settings: BatchSettings, epoch: int) -> np.ndarray:
    """Where the rows of an epoch start in the text, in the order of training: (rows,)."""
    draw = np.random.default_rng([settings.seed, epoch])
    starts = draw.permutation(rows) * settings.context
    return starts + draw.integers(0, settings.context, rows) * settings.random_offset

def batch_at(step: int, ids: np.ndarray, settings: BatchSettings) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, (B, T) int64 each: a pure function of seed and step.

    An epoch is one permutation of the rows, each once; what does not fill a batch is left out.
    There is no loader with a state, so nothing that happens between two steps can change them."""
    B, T = settings.batch_size, settings.context
    rows = count_rows(len(ids), settings)
    epoch, i = divmod(step, rows // B)
    starts = row_starts(rows, settings, epoch)[i * B:(i + 1) * B]
    window = torch.from_numpy(ids[starts[:, None] + np.arange(T + 1)].astype(np.int64))
    return window[:, :-1], window[:, 1:]

# -----------------------------------------------------------------------------
# 3. Models
#
# ids (B, T)  ->  hidden states (B, T, C), and a head (V, C) that makes logits of them
#
# Modules have Hugging Face's names, so that a state dict is what its files hold.

@dataclass(frozen=True)
class ModelSettings:
    """The shape of a model: the defaults are the paper's student of 58M parameters."""
    model_type: str = setting("llama", "Architecture.", choices=("llama", "gpt2"))
    width: int = setting(512, "C, the size of a hidden state.", low=1, high=2**20)
    layers: int = setting(16, "Blocks of attention and feed-forward network.", low=1, high=500)
    heads: int = setting(8, "H, the attention heads; each is D = C / H wide.", low=1)
    kv_heads: int = setting(0, "Heads of keys and values (LLaMA); 0: as many as heads.")
    inner: int = setting(1024, "Width inside the feed-forward network.", low=1, high=2**20)
    positions: int = setting(256, "Longest sequence the model takes, in tokens.", low=1, high=2**24)
    rope_theta: float = setting(10_000.0, "Base of the rotary wavelengths (LLaMA).", low=1)
    norm_eps: float = setting(1e-6, "Added to the variance in a norm.")
    tied: bool = setting(False, "Use the embedding as the head.")
    dropout: float = setting(0.0, "Share of values dropped in training (GPT-2).", high=1)

    def __post_init__(self):
        C, H, kv_heads = self.width, self.heads, self.kv_heads or self.heads
        need(C % H == 0, f"{H} heads do not divide the width {C}.")
        need(H % kv_heads == 0, f"{kv_heads} heads of keys and values do not divide {H} heads.")
        need(self.model_type != "llama" or C // H % 2 == 0, f"{H} heads in a width of {C} are "
             f"{C // H} wide each: rotary positions need an even number.")

def rotary_angles(T: int, D: int, theta: float, device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of position t in plane d: two (T, D/2) tables."""
    speed = theta ** -(torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)    # (D/2,)
    angle = torch.outer(torch.arange(T, device=device, dtype=torch.float32), speed)      # (T, D/2)
    return angle.cos(), angle.sin()

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each vector by the angles of its position: (B, H, T, D) -> (B, H, T, D).

    Plane d is made of coordinates d and d + D/2. After the turn, the dot product of a query at t
    and a key at s depends on t - s alone, which is the point of rotary positions."""
    a, b = x.chunk(2, dim=-1)                                           # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

def remember(past: list | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the new positions (B, H, T, D) behind those in `past`, which keeps all."""
    if past is None:
        return k, v
    past[:] = (torch.cat(pair, 2) for pair in zip(past, (k, v))) if past else (k, v)
    return tuple(past)

def count_past(cache: list | None) -> int:
    """The positions that are in a cache."""
    return cache[0][0].shape[2] if cache and cache[0] else 0

class Tree(NamedTuple):
    """Where each id of a row stands, if not behind the one before it: texts that begin alike, as a
    tree of ids that branches where they part."""
    depth: Tensor                   # (B, T), the number of ids above each
    mask: Tensor                    # (B, 1, T, T), 0 where an id (row) sees another, else -inf

class LlamaAttention(nn.Module):
    """Each position looks back at itself and at those before it: (B, T, C) -> (B, T, C).

    With fewer heads of keys and values than of queries, neighbouring queries share one."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        C, self.heads = config.width, config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, C // self.heads * self.kv_heads, bias=False)
        self.v_proj = nn.Linear(C, C // self.heads * self.kv_heads, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list | None,
                mask: Tensor | None) -> Tensor:
        causal = not past and mask is None              # a later, single position may see them all
        q = rotate(split_heads(self.q_proj(x), self.heads), cos, sin)               # (B, H, T, D)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), cos, sin)
        k, v = remember(past, k, split_heads(self.v_proj(x), self.kv_heads))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal,
                                           enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(y.transpose(1, 2).flatten(2))                            # (B, T, C)

class LlamaMLP(nn.Module):
    """SwiGLU: one half of the inner values opens or shuts the other. (B, T, C) -> (B, T, C)"""

    def __init__(self, config: ModelSettings):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class LlamaBlock(nn.Module):
    """Attention, then the feed-forward network, each added to its input: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list | None,
                mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past, mask)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases."""

    prefix = "model."               # before the names of all but the head, on disk

    def __init__(self, config: ModelSettings, vocab_size: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, C): the logits are hidden states times its transpose."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: list | None = None, tree: Tree | None = None) -> Tensor:
        """(B, T) -> (B, T, C). A cache, a list a layer, makes ids go on from earlier calls; a tree
        says where each stands in place of the order in which they come."""
        (B, T), start, D = ids.shape, count_past(cache), self.config.width // self.config.heads
        cos, sin = rotary_angles(start + T, D, self.config.rope_theta, ids.device)
        place, x = tree.depth[:, None] if tree else slice(start, None), self.embed_tokens(ids)
        cos, sin = cos[place].to(x.dtype), sin[place].to(x.dtype)
        for layer, past in zip(self.layers, cache or [None] * self.config.layers):
            x = layer(x, cos, sin, past, tree and tree.mask)
        return self.norm(x)

    forward = hidden                # the way of training, which may be compiled

class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2's files have it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

class GPT2Attention(nn.Module):
    """As LlamaAttention, with biases, dropout and no rotation: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        C, self.heads, self.dropout = config.width, config.heads, config.dropout
        self.c_attn, self.c_proj = Conv1D(C, 3 * C), Conv1D(C, C)

    def forward(self, x: Tensor, past: list | None, mask: Tensor | None) -> Tensor:
        causal = not past and mask is None
        q, k, v = (split_heads(part, self.heads) for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, *remember(past, k, v), mask, is_causal=causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)

class GPT2MLP(nn.Module):
    """Widen, bend, narrow: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        C, inner, self.dropout = config.width, config.inner, config.dropout
        self.c_fc, self.c_proj = Conv1D(C, inner), Conv1D(inner, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)

class GPT2Block(nn.Module):
    """Attention, then the feed-forward network, each added to its input: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelSettings):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, config.norm_eps) for _ in range(2))
        self.attn, self.mlp = GPT2Attention(config), GPT2MLP(config)

    def forward(self, x: Tensor, past: list | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past, mask)
        return x + self.mlp(self.ln_2(x))

class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases everywhere."""

    prefix = "transformer."

    def __init__(self, config: ModelSettings, vocab_size: int):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.width)
        self.wpe = nn.Embedding(config.positions, config.width)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """(V, C): the logits are hidden states times its transpose."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: list | None = None, tree: Tree | None = None) -> Tensor:
        """(B, T) -> (B, T, C). Cache and tree are as Llama's."""
        start = count_past(cache)
        place = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.wte(ids) + self.wpe(tree.depth if tree else place)
        x = F.dropout(x, self.config.dropout, self.training)
        for block, past in zip(self.h, cache or [None] * self.config.layers):
            x = block(x, past, tree and tree.mask)
        return self.ln_f(x)

    forward = hidden

Model = Llama | GPT2
ARCHITECTURES = {"llama": Llama, "gpt2": GPT2}

def empty_model(config: ModelSettings, vocab_size: int) -> Model:
    """A model of shapes without values, which costs nothing: to be counted or filled."""
    with torch.device("meta"):
        return ARCHITECTURES[config.model_type](config, vocab_size)

def count_parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

def new_model(config: ModelSettings, vocab_size: int, seed: int) -> Model:
    """A model with Hugging Face's initial weights: N(0, 0.02) in matrices, 0 in biases, 1 in norms.

    GPT-2's projections back into the residual stream are divided by sqrt(2 * layers), so that the
    sum of all branches keeps its size. A generator of its own, on the CPU, draws the same weights
    for every device."""
    model = empty_model(config, vocab_size).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = math.sqrt(2 * config.layers) if name.endswith("c_proj.weight") else 1.0
                parameter.normal_(0.0, 0.02 / scale, generator=generator)
    return model

# -----------------------------------------------------------------------------
# 4. Divergences
#
# q, p (n, V): softmax(u) and softmax(v) of the student's logits / tau and of the teacher's;
# r = log q - log p; targets (n, 1): the observed tokens; a constant, if DIVERGENCES names one
#   ->  the divergence of each row (n, 1), and its gradient with respect to u (n, V)
#
# To add one: write such a function and name it in DIVERGENCES. It may use up p, and r, where the
# gradient may lie; q is needed afterwards (that some lift it to 1e-34 where it is less is no harm).
# By rounding, q and p do not quite sum to 1: each row of r is off by a constant, and so a KL is,
# and sum (q - p) is off by as much the other way. Hence that sum, 0 but for this, where one stands.

def to_probabilities(u: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """q, p and r (n, V) in the places of u, v and r; max u and the scale in
    q = scale exp(u - max u), (n, 1) each.

    Taking each row's top off first leaves r the digits that q and p have, whatever the level of
    the logits. u - v is then held at 87 (in fp32, where numbers end): a token that the teacher
    rules out, by -inf, costs reverse KL much, and not infinitely much."""
    top, most = u.amax(-1, True), -math.log(torch.finfo(u.dtype).tiny)
    torch.sub(u.sub_(top), v.sub_(v.amax(-1, True)), out=r).clamp_(max=most)
    scale, p_scale = (1 / x.exp_().sum(-1, True) for x in (u, v))
    r.add_((scale.double() / p_scale).log_().to(r.dtype))
    return u.mul_(scale), v.mul_(p_scale), r, top, scale

def dot(x: Tensor, y: Tensor) -> Tensor:
    """sum x y of each row: (n, V), (n, V) -> (n, 1)"""
    return (x * y).sum(-1, True)

def slope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """sum q k and, in the place of k, q (k - sum q k): with k = df/dq that is df/du, by the
    derivative of softmax, and a constant added to k changes nothing. (n, 1) and (n, V).

    The gradient sums to 0 but for rounding, which is most of it where the student is sure: so its
    sum is taken off."""
    gradient = k.mul_(q)
    mean = gradient.sum(-1, True)
    gradient.addcmul_(q, mean, value=-1)
    return mean, gradient.addcmul_(q, gradient.sum(-1, True), value=-1)

def forward_kl(q, p, r, targets, _):
    """KL(p || q) = sum p (log p - log q), with gradient q - p (AKL paper, Eq. 5).

    Mode-covering: the teacher's probabilities weigh the error, so the student must find likely
    all that the teacher finds likely."""
    forward = -r.mul_(p).sum(-1, True)
    error = torch.sub(q, p, out=r)                                              # in r's place
    return forward + error.sum(-1, True), error

def reverse_kl(q, p, r, targets, _):
    """KL(q || p) = sum q r, with gradient q (r - KL) (AKL paper, Eq. 6).

    Mode-seeking: the student's own probabilities weigh the error, so what it finds likely must be
    likely to the teacher, but it may leave out some of what the teacher says. The "single-step
    decomposition" of MiniLLM, E_q[r grad log q], is this gradient; it need not be sampled here."""
    value, gradient = slope(q, r)
    return value + p.sub_(q).sum(-1, True), gradient                            # p is used up

def forward_and_reverse_kl(q, p, r, targets, weight):
    """weight FKL + (1 - weight) RKL (AKL paper, section 4); weight is a number or (n, 1)."""
    forward = -dot(p, r)
    reverse, gradient = slope(q, r)
    error = torch.sub(q, p, out=p)
    slack = error.sum(-1, True)
    value = weight * (forward + slack) + (1 - weight) * (reverse - slack)
    return value, gradient.lerp_(error, weight)

def head_share(q: Tensor, p: Tensor, mu: float) -> Tensor:
    """The share of sum |p - q| that lies in the head, the fewest tokens with teacher mass mu.

    (AKL paper, Eqs. 12 to 14.) Tokens that tie with the head's last are in it, too. (n, 1), half
    where the models agree. Tokens under (1 - mu) / V have less than 1 - mu together, so none is in
    the head: made equal, they need no sorting. NumPy sorts ten times as fast as torch on a CPU."""
    rising = p.clamp(min=(1 - mu) / p.shape[1])
    if p.is_cuda:
        rising = rising.sort(-1)[0]
    else:
        rising.numpy().sort(-1)
    mass = rising.cumsum(-1)
    tail = torch.searchsorted(mass, mass[:, -1:] - mu, right=True)      # tokens outside the head
    edge, gap = rising.gather(1, tail.clamp_(max=p.shape[1] - 1)), torch.sub(p, q, out=mass).abs_()
    both, head = gap.sum(-1, True), gap.mul_(torch.ge(p, edge, out=rising)).sum(-1, True)
    return torch.where(both > 0, head / both, 0.5)

def adaptive_kl(q, p, r, targets, mu):
    """head_share FKL + (1 - head_share) RKL, the weight held constant (Eq. 15): forward KL where
    the models differ in the head, reverse KL where they differ in the tail."""
    return forward_and_reverse_kl(q, p, r, targets, head_share(q, p, mu))

def adaptive_kl_reversed(q, p, r, targets, mu):
    """AKL with its weights swapped, an ablation (Eq. 16)."""
    return forward_and_reverse_kl(q, p, r, targets, 1 - head_share(q, p, mu))

def skewed_kl(q, p, r, targets, skew):
    """KL(p || m), m = skew p + (1 - skew) q, with gradient q (k - sum q k), k = (skew - 1) p / m
    (DistiLLM, Ko et al. 2024). By m / p - 1 = (1 - skew) (q - p) / p, exact near p = q."""
    p.clamp_(min=torch.finfo(p.dtype).tiny)
    excess = torch.sub(q, p, out=r).div_(p).mul_(1 - skew)                      # m / p - 1
    forward = -dot(p, excess.log1p())
    _, gradient = slope(q, excess.add_(1).reciprocal_().mul_(skew - 1))
    return forward - (1 - skew) * p.sub_(q).sum(-1, True), gradient

def mixture(q: Tensor, p: Tensor, r: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """m / q = (1 + common) (1 + rest) of m = share p + (1 - share) q: (n, 1) and (n, V).

    ratio = exp(- sum q r) is a typical p / q of the row, 1 + common the m / q that it makes; rest,
    share (p - q ratio) / q / (1 + common), is where a token departs from that: small where the
    models agree, so that its digits are kept. Each q under 1e-34 becomes 1e-34, in its place."""
    ratio = dot(q, r).neg_().exp_()
    common = share * (ratio - 1)
    rest = torch.addcmul(p, q.clamp_(min=1e-34), ratio, value=-1).div_(q)
    return common, rest.mul_(share / (1 + common))

def skewed_reverse_kl(q, p, r, targets, skew):
    """KL(q || m), m = (1 - skew) p + skew q, with gradient q (k - sum q k) and
    k = log(q / m) - skew q / m (DistiLLM), of which constants are left out."""
    common, rest = mixture(q, p, r, 1 - skew)
    log_rest = torch.log1p(rest, out=r)
    value = -dot(q, log_rest) - common.log1p() + (1 - skew) * p.sub_(q).sum(-1, True)
    k = rest.div_(torch.add(rest, 1, out=p)).mul_(skew / (1 + common)).sub_(log_rest)
    return value, slope(q, k)[1]

def jensen_shannon(q, p, r, targets, share):
    """share KL(p || m) + (1 - share) KL(q || m), m = share p + (1 - share) q (GKD, Agarwal et al.
    2024), with gradient (1 - share) q (log(q / m) - KL(q || m))."""
    common, rest = mixture(q, p, r, share)
    k, log_common = rest.log1p_().neg_(), common.log1p_()       # k = log(q / m) + log_common
    log_m_p = r.sub_(k).add_(log_common).clamp_(min=math.log(share))    # where q was lifted, too
    forward, (mean, gradient) = -p.mul_(log_m_p).sum(-1, True), slope(q, k)
    value = share * forward + (1 - share) * (mean - log_common)
    return value, gradient.mul_(1 - share)

def diversity_aware_kl(q, p, r, targets, gamma):
    """B + gamma N: B of the target against the rest, N within the rest (arXiv 2604.00223, Eq. 9).

    With pi = q_t, rho = p_t and, without t, q' = q / (1 - pi), p' = p / (1 - rho):
    B = KL((pi, 1 - pi) || (rho, 1 - rho)), N = KL(q' || p'). Reverse KL is B + (1 - pi) N: a sure
    student no longer hears of the rest, and can lower N's part by raising pi alone. With
    d = logit pi - logit rho and k = log(q' / p') the gradient is pi (1 - pi) d at t and
    q' (gamma (k - N) - pi (1 - pi) d) off it.
    Read off an independent implementation: the paper's own text was not to be had."""
    pi, ratio = q.gather(1, targets).double(), r.gather(1, targets).double()
    tiny = torch.finfo(q.dtype).tiny
    q, p = q.scatter(1, targets, 0), p.scatter_(1, targets, 0)
    rest_q, rest_p = (x.sum(-1, True).clamp_(min=tiny) for x in (q, p))
    a = pi.clamp(min=tiny).log() - rest_q.double().log()                        # logit pi
    rest_ratio = (rest_q.double() / rest_p).log()
    b, log_sigmoid = a - (ratio - rest_ratio), F.logsigmoid                     # logit rho
    binary = a.sigmoid() * (log_sigmoid(a) - log_sigmoid(b)) + \
        (-a).sigmoid() * (log_sigmoid(-a) - log_sigmoid(-b))
    pull = (a.sigmoid() * (-a).sigmoid() * (a - b)).to(q.dtype)
    within, gradient = slope(q.div_(rest_q), r)
    within = within - rest_ratio + p.div_(rest_p).sub_(q).sum(-1, True)
    gradient.mul_(gamma).addcmul_(q, pull, value=-1).scatter_(1, targets, pull)
    return binary + gamma * within, gradient

DIVERGENCES = {                 # name: function, and the setting that is its constant
    "fkl": (forward_kl, None), "rkl": (reverse_kl, None),
    "fkl+rkl": (forward_and_reverse_kl, "fkl_weight"),
    "akl": (adaptive_kl, "mu"), "akl-r": (adaptive_kl_reversed, "mu"),
    "skl": (skewed_kl, "skew"), "srkl": (skewed_reverse_kl, "skew"),
    "jsd": (jensen_shannon, "jsd_beta"), "drkl": (diversity_aware_kl, "gamma")}
MIRRORED = {"fkl": "rkl", "rkl": "fkl", "skl": "srkl", "srkl": "skl"}   # D(q, p) = mirrored(p, q)

# -----------------------------------------------------------------------------
# 5. The fused loss
#
# student hidden (N, C), head (V, C), teacher hidden (N, C'), head (V, C'), targets (N,)
#   ->  loss, cross-entropy and tau^2 divergence, summed, without ever holding N rows of V logits
#
# A chunk is what one matrix product makes. A block is the rows of it that are turned into gradients
# at once: all of them on a GPU, on a CPU what fits in its caches.

@dataclass(frozen=True)
class LossSettings:
    """What the student is asked to do (the paper's Eqs. 1, 2, 3 and 9)."""
    objective: str = setting("ce", "Cross-entropy alone (seqkd: on the teacher's own text), or "
                             "with a divergence.", choices=("ce", "seqkd", *DIVERGENCES))
    temperature: float = setting(2.0, "tau, by which all logits are divided (Eqs. 6, 7).", low=0.5)
    alpha: float = setting(0.5, "Weight of cross-entropy; the rest is divergence (Eq. 9).", high=1)
    beta: float = setting(1.0, "Teacher's share of the mixed logits (Eq. 2); 1: no mixing.", high=1)
    progressive: bool = setting(False, "Lower beta from epoch to epoch (Eq. 3).")
    mixing: str = setting("constant", "The student's part of the mixed logits in the gradient.",
                          choices=("constant", "differentiated"))
    reduction: str = setting("token", "The divergence's mean: by token, or BabyLlama's, by row.",
                             choices=("token", "batchmean"))
    fkl_weight: float = setting(0.5, "Share of forward KL in fkl+rkl.", high=1)
    mu: float = setting(0.5, "Teacher's mass in the head (akl, akl-r).", high=1)
    skew: float = setting(0.1, "Share of p (skl) or q (srkl) mixed in.", low=1e-3, high=0.999)
    jsd_beta: float = setting(0.5, "Share of the teacher in jsd's mixture.", low=1e-3, high=0.999)
    gamma: float = setting(0.5, "Weight of the rest in drkl.", low=1e-3, high=1e3)

def loss_weights(settings) -> tuple[float, float]:
    """The weights of cross-entropy and of tau^2 times divergence: alpha and 1 - alpha (Eq. 9).

    "batchmean" weighs the divergence T times as much: BabyLlama divides its sum by B alone, while
    its cross-entropy is a mean over B * T tokens  <- differs (3)."""
    if settings.objective not in DIVERGENCES:
        return 1.0, 0.0
    by_row = settings.context if settings.reduction == "batchmean" else 1
    return settings.alpha, (1 - settings.alpha) * by_row

def turn_into_gradient(settings, beta: float, room: Tensor, u: Tensor, targets: Tensor,
                       v: Tensor | None = None) -> Tensor:
    """Put in the place of u the loss's gradient with respect to the student's logits, tau u.

    u, v (n, V), the student's and the teacher's logits / tau, a block of them; targets (n, 1);
    room, n rows or more of V to work in, as v is, of the dtype to work in. Returns (n, 3): max u,
    log sum exp(tau (u - max u)), D."""
    function, name = DIVERGENCES.get(settings.objective, (None, None))
    tau, (ce_weight, kl_weight) = settings.temperature if function else 1.0, loss_weights(settings)
    q = u.to(room.dtype)
    if function:
        p, constant = v.to(room.dtype), name and getattr(settings, name)
        if beta < 1:
            p.mul_(beta).add_(q, alpha=1 - beta)                                    # Eq. 2
        q, p, r, top, scale = to_probabilities(q, p, room[:len(q)])
        through = None
        if settings.mixing == "differentiated" and beta < 1:
            # By p's logits, in which there are (1 - beta) u: D as the function of p that it is.
            mirrored, _ = DIVERGENCES[MIRRORED[settings.objective]]
            _, through = mirrored(p, q.clone(), -r, targets, constant)
        value, gradient = function(q, p, r, targets, constant)
        if through is not None:
            gradient.add_(through, alpha=1 - beta)
        if kl_weight * tau != 1:                # tau^2, over the tau of d(z / tau)
            gradient.mul_(kl_weight * tau)
        # Cross-entropy is of temperature 1: exp(u - max u), had back from q, to the power of tau.
        soft = torch.mul(q, 1 / scale, out=p).pow_(tau)
    else:
        top = q.amax(-1, True)
        soft, value, gradient = q.sub_(top).exp_(), torch.zeros_like(top), q.new_zeros(())
    total = soft.sum(-1, True)
    soft.scatter_add_(1, targets, -total)           # over the total: softmax less the observed
    torch.addcmul(gradient, soft, ce_weight / total, out=u)
    return torch.cat([top, total.log_(), value], 1)

def padded(x: Tensor, n: int, value: int = 0) -> Tensor:
    """The rows of x and, behind them, rows of a value up to n, that all products have one shape."""
    return F.pad(x, (0, 0, 0, n - len(x)), value=value) if len(x) < n else x

CACHE = 2**17       # numbers of each array that a core works on at once, for they stay in its cache

class FusedLoss(torch.autograd.Function):
    """Cross-entropy and divergence of N tokens, with their gradients, a chunk of rows at a time.

    With z the student's logits, w the teacher's, as in the paper's Eqs. 1, 2 and 6 to 9,

        q = softmax(z / tau)     p = softmax((beta w + (1 - beta) z) / tau)
        loss = sum over tokens of  alpha CE(z, target) + (1 - alpha) tau^2 D(q, p)

    (with "batchmean" T times the second part: see `loss_weights`),

    where the z within p is held constant <- differs (4): log q - log p = beta (z - w) / tau up to a
    constant, so the gradient of the reverse KL is exactly beta times that of the unmixed one. Under
    RKL "mixing outputs" is a weight on the distillation, and Eq. 3 a schedule of that weight.
    ("differentiated" lets the gradient through: q (r - KL) - (1 - beta) (q - p) for RKL, with p
    and r of the mixture.)

    As the gradient with respect to z is known in closed form, each chunk is finished at once: its
    logits are made, turned into their own gradient, multiplied back, and forgotten. The sums of
    the chunks add up to the whole, whatever their length: the paper's "step-wise loss", segments
    of k = 5 tokens, is this very loss with another chunk."""

    @staticmethod
    def forward(ctx, hidden, head, targets, teacher_hidden, teacher_head, settings, beta, chunk):
        """Sums over the N tokens: the loss, and (2,) cross-entropy and tau^2 times divergence.

        hidden (N, C), head (V, C), targets (N,), teacher_hidden (N, C'), teacher_head (V, C'); the
        teacher's may be None where there is no divergence. A target below 0 is ignored. Products
        are in hidden's dtype, or autocast's (logits / tau must be in its range); all else is in
        fp32 or better, and nothing is divided by N before the products: fp16 would lose it."""
        N, V, kind, tau = len(hidden), len(head), hidden.device.type, 1.0
        exact, dtype = torch.promote_types(hidden.dtype, torch.float32), hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        n = max(1, math.ceil(N / max(1, math.ceil(N / chunk))))     # the chunks are of one length
        block = n if kind == "cuda" else max(1, CACHE * torch.get_num_threads() // V)
        room = hidden.new_empty(min(n, block), V, dtype=exact)
        u, v = hidden.new_empty(n, V, dtype=dtype), None
        parts = hidden.new_zeros(2, dtype=torch.float64)
        d_hidden, d_head = (torch.zeros_like(x, dtype=exact) if wanted else None
                            for x, wanted in zip((hidden, head), ctx.needs_input_grad))
        head = head.to(dtype)
        if settings.objective in DIVERGENCES:
            v, tau, teacher_head = torch.empty_like(u), settings.temperature, teacher_head.to(dtype)
        for i in range(0, N, n):
            h, target = padded(hidden[i:i + n], n).to(dtype), padded(targets[i:i + n, None], n, -1)
            keep, target = target >= 0, target.clamp(min=0)
            torch.addmm(u, h, head.T, beta=0, alpha=1 / tau, out=u)     # (addmm's alpha and beta)
            observed, blocks = u.gather(1, target), [u.split(block), target.split(block)]
            if v is not None:
                t = padded(teacher_hidden[i:i + n], n).to(dtype)
                torch.addmm(v, t, teacher_head.T, beta=0, alpha=1 / tau, out=v)
                blocks.append(v.split(block))
            rows = [turn_into_gradient(settings, beta, room, *each) for each in zip(*blocks)]
            top, above, value = torch.cat(rows).double().split(1, 1)
            ce = above + tau * (top - observed)
            parts += (torch.cat([ce, tau**2 * value], 1) * keep).sum(0)
            if d_hidden is not None:
                d_hidden[i:i + n] = (u @ head).mul_(keep)[:N - i]
            if d_head is not None and dtype == exact:
                d_head.addmm_(u.T, h * keep)
            elif d_head is not None:
                d_head += u.T @ (h * keep)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(parts)
        ce_weight, kl_weight = loss_weights(settings)
        return (ce_weight * parts[0] + kl_weight * parts[1]).to(exact), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        """The gradients were made on the way forward; what the sum is divided by comes in here."""
        assert not getattr(ctx, "spent", False), "the first backward pass has used the gradients up"
        ctx.spent = True
        return *(x if x is None else x.mul_(d_loss) for x in ctx.saved_tensors), *[None] * 6

@torch.no_grad()
def token_log_probabilities(hidden: Tensor, head: Tensor, rows: Tensor, targets: Tensor,
                            chunk: int) -> Tensor:
    """log softmax(hidden[row] head^T)[target] for each of E rows and targets, rows in rising order:
    (N, C), (V, C), (E,), (E,) -> (E,). A row may be asked for several targets, or none."""
    N, V, scores = len(hidden), len(head), torch.empty_like(targets, dtype=hidden.dtype)
    room = hidden.new_empty(min(N, chunk), V)
    block = chunk if hidden.is_cuda else max(1, CACHE * torch.get_num_threads() // V)
    edges = torch.searchsorted(rows, torch.arange(0, N + chunk, chunk, device=rows.device)).tolist()
    for i, (first, last) in zip(range(0, N, chunk), itertools.pairwise(edges)):
        logits = torch.mm(hidden[i:i + chunk], head.T, out=room[:min(chunk, N - i)])    # (n, V)
        level = torch.cat([some.logsumexp(-1) for some in logits.split(block)])
        here = rows[first:last] - i
        scores[first:last] = logits[here, targets[first:last]] - level[here]
    return scores

class Coach:
    """One or more teachers as one.

    BabyLlama averages its teachers' logits. The mean of K products is one product: hidden states
    side by side, times heads side by side divided by K. The teachers become ones of the dtype, for
    they are only read; of the heads, put together here, the loss makes what it works in."""

    def __init__(self, teachers: list[Model], dtype: torch.dtype | None = None):
        with torch.no_grad():
            self.head = torch.cat([t.head for t in teachers], dim=1) / len(teachers)    # (V, C')
        self.teachers = [teacher.to(dtype) for teacher in teachers]

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C'), C' the sum of the teachers' widths"""
        return torch.cat([teacher(ids) for teacher in self.teachers], dim=-1).to(self.head.dtype)

# -----------------------------------------------------------------------------
# 6. Schedules and the optimizer
#
# step -> learning rate, epoch -> beta: pure functions, no scheduler with a state

@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and how long it runs."""
    epochs: int = setting(6, "Passes over the text.", low=1)
    steps: int = setting(0, "Stop after this many optimizer steps; 0: when the epochs end.")
    lr: float = setting(2.5e-4, "Peak learning rate.")
    warmup: int = setting(200, "Steps in which the learning rate rises to its peak.")
    t_max: int = setting(0, "Then it falls along a cosine for so long, and rises again for as "
                         "long, and so on, as PyTorch's T_max has it; 0: falls to the end.")
    t_max_unit: str = setting("step", "What t_max counts.", choices=("step", "epoch"))
    weight_decay: float = setting(0.01, "Decay of matrices; vectors have none.")
    beta2: float = setting(0.999, "AdamW's memory of the squared gradient.", high=0.99999)
    clip: float = setting(1.0, "Longest gradient, as a norm over all weights; 0: any length.")

def lr_at(step: int, steps: int, per_epoch: int, settings: OptimizerSettings) -> float:
    """The learning rate of a step, of `steps` in all and `per_epoch` in each epoch.

    1) warmup: a line from 0 that would reach the peak at step `warmup`; 2) a cosine from the peak
    that would reach 0 at step `steps`  <- differs (5): the paper's has T_max = 500. By steps, as
    `t_max` then reads it, it swings between the peak and 0; by epochs, it hardly moves."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    done = (step - settings.warmup) / (settings.t_max or max(1, steps - settings.warmup))
    if settings.t_max and settings.t_max_unit == "epoch":
        done = step // per_epoch / settings.t_max
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))

def beta_at(epoch: int, epochs: int, settings: LossSettings) -> float:
    """The teacher's share of the mixed logits in an epoch counted from 0 (Eq. 3)."""
    lowered = max(min(0.1, settings.beta), settings.beta * (1 - epoch / epochs))
    return lowered if settings.progressive else settings.beta

def make_optimizer(model: Model, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all parameters, with weight decay for the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)

# -----------------------------------------------------------------------------
# 7. Run folders
#
# a model and its vocabulary  <->  a folder that Hugging Face's tools load as it is

HF_KEYS = {         # our setting: the key in config.json, and what holds where that is missing
    "llama": {"width": ("hidden_size", None), "layers": ("num_hidden_layers", None),
              "heads": ("num_attention_heads", None), "kv_heads": ("num_key_value_heads", 0),
              "inner": ("intermediate_size", None), "positions": ("max_position_embeddings", 2048),
              "rope_theta": ("rope_theta", 10_000.0), "norm_eps": ("rms_norm_eps", 1e-6),
              "tied": ("tie_word_embeddings", False)},
    "gpt2": {"width": ("n_embd", None), "layers": ("n_layer", None), "heads": ("n_head", None),
             "inner": ("n_inner", None), "positions": ("n_positions", 1024),
             "norm_eps": ("layer_norm_epsilon", 1e-5), "dropout": ("resid_pdrop", 0.1),
             "tied": ("tie_word_embeddings", True)}}
HF_FIXED = {        # what our models always do: written on saving, demanded on loading
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def to_hf_config(config: ModelSettings, vocabulary: Vocabulary) -> dict:
    """What config.json says of a model."""
    kind, end = config.model_type, vocabulary.tokenizer.token_to_id("</s>")
    config = replace(config, kv_heads=config.kv_heads or config.heads)
    sizes = {key: getattr(config, name) for name, (key, _) in HF_KEYS[kind].items()}
    if kind == "gpt2":
        sizes |= {"attn_pdrop": config.dropout, "embd_pdrop": config.dropout}
    return {"architectures": ["LlamaForCausalLM" if kind == "llama" else "GPT2LMHeadModel"],
            "model_type": kind, "vocab_size": vocabulary.size, **sizes, **HF_FIXED[kind],
            "bos_token_id": vocabulary.prefix_id,
            "eos_token_id": vocabulary.prefix_id if end is None else end,
            "initializer_range": 0.02, "dtype": "float32"}

def from_hf_config(path: Path) -> tuple[ModelSettings, int]:
    """Shape and V of the model that a config.json describes. Error: one that is not built here."""
    raw = read_json(path)
    kind = raw.get("model_type")
    need(kind in list(HF_KEYS), f"{path}: model_type is {kind!r}: expected {' or '.join(HF_KEYS)}.")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    need(isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default",
         f"{path}: rotary positions are scaled, by {rope}: expected plain ones.")
    raw = rope | {key: value for key, value in raw.items() if value is not None}
    for key, value in HF_FIXED[kind].items():
        found = raw.get(key, value)
        need(found == value, f"{path}: {key} is {found!r}: expected {value!r}.")
    if kind == "gpt2" and type(raw.get("n_embd")) is int:
        raw = {"n_inner": 4 * raw["n_embd"]} | raw
    values = {name: raw.get(key, missing) for name, (key, missing) in HF_KEYS[kind].items()}
    config = ModelSettings(model_type=kind, **{
        field.name: checked(field, values[field.name], f"{path}: {HF_KEYS[kind][field.name][0]}")
        for field in fields(ModelSettings) if field.name in values})
    V, D = raw.get("vocab_size"), config.width // config.heads
    need(type(V) is int and 0 < V < 2**24, f"{path}: vocab_size is {V!r}: expected a size.")
    need(raw.get("head_dim") in (None, D), f"{path}: head_dim is {raw.get('head_dim')}: expected "
         f"width / heads = {D}.")
    return config, V

def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file: its header's length in 8 bytes, the header in JSON, the raw values."""
    header, end, codes = {"__metadata__": {"format": "pt"}}, 0, {v: k for k, v in DTYPES.items()}
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                 # the values start at a multiple of 8 bytes
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped rather than read. Error: what does not add up."""
    need(path.exists(), f"{path} is missing: expected the weights as safetensors (pickles, such as "
         "pytorch_model.bin, are never opened).")
    broken = f"{path} is damaged or no safetensors file: "
    need(path.stat().st_size > 8, broken + "it has less than 9 bytes.")
    content = np.memmap(path, np.uint8, "c")
    length = int.from_bytes(content[:8].tobytes(), "little")
    need(8 + length <= len(content), broken + f"its header should have {length:,} bytes, the whole "
         f"file has {len(content):,}.")
    try:
        header = dict(json.loads(content[8:8 + length].tobytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise click.ClickException(broken + f"its header is not a JSON object ({error}).")
    values, tensors, taken = content[8 + length:], {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = (DTYPES[entry["dtype"]], entry["shape"],
                                          entry["data_offsets"])
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, end)) \
                and end - start == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            sound = False
        need(sound, broken + f"its entry for {name!r} is {str(entry)[:100]}.")
        need(end <= len(values), broken + f"{name!r} ends at byte {end:,} of {len(values):,}.")
        taken.append((start, end))
        raw = torch.from_numpy(values[start:end])
        tensors[name] = (raw.view(dtype) if len(raw) else torch.empty(0)).view(shape)
    need(all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(taken))), broken + "two of its "
         "tensors overlap.")
    return tensors

def save_model(folder: Path, model: Model, vocabulary: Vocabulary) -> None:
    """Write the model's folder, the weights last: a folder that has them is finished."""
    write_json(folder / "config.json", to_hf_config(model.config, vocabulary))
    for name, content in vocabulary.files.items():
        with written_whole(folder / name) as file:
            file.write(content)
    write_safetensors(folder / "model.safetensors", {
        (name if name.startswith("lm_head") else model.prefix + name): parameter
        for name, parameter in model.named_parameters()})

def load_model(folder: Path, device: str) -> tuple[Model, Vocabulary]:
    """The model, in fp32, and the vocabulary of a run or any Hugging Face LLaMA or GPT-2 folder.

    Shards that an index file names are read; so are older GPT-2 files, which hold causal masks and
    whose names lack "transformer.". Error: weights that are not those of config.json."""
    need(folder.is_dir(), f"{folder} is not a folder: expected one that holds a model.")
    need((folder / "config.json").exists(), f"{folder} holds no finished model: expected "
         "config.json, tokenizer.json and model.safetensors.")
    config, V = from_hf_config(folder / "config.json")
    vocabulary, index = load_vocabulary(folder), folder / "model.safetensors.index.json"
    need(vocabulary.size <= V, f"{folder}: tokenizer.json has {vocabulary.size:,} tokens, but "
         f"config.json a vocab_size of {V:,}: expected at least as many.")
    shards = {"": "model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        shards = read_json(index).get("weight_map")
        need(isinstance(shards, dict), f"{index}: weight_map is {shards!r}: expected an object.")
    model, found = empty_model(config, V), {}
    for shard in sorted({Path(str(name)).name for name in shards.values()}):
        found |= {name.removeprefix(model.prefix): tensor
                  for name, tensor in read_safetensors(folder / shard).items()
                  if not re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name)}
    if config.tied:
        found.pop("lm_head.weight", None)           # some files hold it twice
    wanted = dict(model.named_parameters())
    for name in sorted(wanted.keys() | found.keys()):
        want, have = (list(group[name].shape) if name in group else "none"
                      for group in (wanted, found))
        need(want == have, f"{folder}: the weights have {name!r} as {have}, config.json asks for "
             f"{want}: they are not of one model.")
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    return model.eval(), vocabulary

# -----------------------------------------------------------------------------
# 8. Training
#
# settings, corpus, teachers  ->  a trained model in its run folder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

@dataclass(frozen=True)
class Settings(OptimizerSettings, LossSettings, ModelSettings, BatchSettings, TextSettings):
    """All settings of a run. Those named here say how it is carried out, not what is learnt.

    The bases stand in reverse: a dataclass collects its fields from the last one to the first."""
    teachers: int = setting(0, "How many of the config's teachers to learn from.", high=2)
    device: str = setting("auto", "Where to compute.", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "Of a step's products; auto: fp32, and on a GPU bf16, or fp16 "
                             "where it has no bf16.", choices=("auto", *PRECISIONS))
    teacher_precision: str = setting("auto", "Of the teachers' weights and products; auto: the "
                                     "student's.", choices=("auto", *PRECISIONS))
    compile: bool = setting(True, "Compile the models on a GPU.")
    save_minutes: float = setting(10.0, "Minutes between checkpoints, from which --resume goes on.")
    micro_batch: int = setting(0, "Rows in memory at once, a divisor of the batch; 0: all.")
    activation_checkpointing: bool = setting(False, "Keep a block's input alone and make the rest "
                                             "again in the backward pass: less memory, more time.")
    chunk: int = setting(304, "Rows of logits that the loss holds at once.", low=1)
    eval_every: int = setting(0, "Steps between held-out losses; 0: only one, at the end.")
    dev_tokens: int = setting(0, "Read about this many held-out tokens, evenly spread; 0: all.")
    pairs: str = setting("", "Folder of minimal pairs; empty: data/blimp, or data/tiny/blimp.",
                         path=True)
    sample: int = setting(0, "Score about this many pairs, a seeded draw; 0: all.")

    def __post_init__(self):
        super().__post_init__()                     # the shape of the model
        need(not self.micro_batch or self.batch_size % self.micro_batch == 0, "--micro-batch "
             f"{self.micro_batch} does not divide --batch-size {self.batch_size}.")
        need(self.context <= self.positions, f"--context {self.context} is longer than what the "
             f"model takes, --positions {self.positions}.")
        need(self.objective == "ce" or self.teachers, f"--objective {self.objective} needs a "
             "teacher: add --teachers 1.")
        need(self.objective != "seqkd" or self.teachers == 1, "--objective seqkd learns from the "
             f"text of one teacher, not of {self.teachers}: name one, or add --teachers 1.")
        need(self.mixing == "constant" or self.objective in MIRRORED, "--mixing differentiated is "
             f"for {', '.join(MIRRORED)}, not for {self.objective}.")

    def learnt(self) -> dict:
        """The settings that decide what a model learns: none of this class's own, no paths."""
        names = {field.name for base in Settings.__bases__ for field in fields(base)
                 if not field.metadata["path"]}
        return {name: value for name, value in asdict(self).items() if name in names}

def count_steps(tokens: int, settings: Settings) -> tuple[int, int]:
    """Steps of the run, steps of an epoch. Error: less text than one batch."""
    per_epoch = count_rows(tokens, settings) // settings.batch_size
    need(per_epoch, f"{settings.text} has {tokens:,} tokens, less than a batch of "
         f"{settings.batch_size} rows of {settings.context}: add text, or lower --batch-size or "
         "--context.")
    return settings.steps or per_epoch * settings.epochs, per_epoch

def step_dtype(settings: Settings, device: str) -> torch.dtype:
    """The dtype of a step's products on a device."""
    half = torch.float16
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        half = torch.bfloat16
    return PRECISIONS.get(settings.precision, half if device == "cuda" else torch.float32)

def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many train this model together: torchrun starts several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def clock(seconds: float) -> str:
    """1:02:03"""
    return str(datetime.timedelta(seconds=round(seconds)))

def say(text: str, err: bool = True) -> None:
    """Print to stderr, or stdout, what concerns all processes: the first one says it."""
    if rank_and_size()[0] == 0:
        click.echo(text, err=err)

def sum_over_processes(tensors: list[Tensor]) -> None:
    """Put in the place of each tensor, all of one dtype, its sum over the processes.

    Error: another process is gone."""
    if rank_and_size()[1] == 1:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    try:
        dist.all_reduce(whole)
    except RuntimeError as error:
        raise click.ClickException("another process of this run has ended, or does not answer "
                                   f"({str(error).splitlines()[0]}): start them all again.")
    for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))

@contextlib.contextmanager
def first_process_first():
    """What the first process makes within, the others find there when they come to it."""
    rank, size = rank_and_size()
    flag = torch.zeros(1, device="cuda" if size > 1 and dist.get_backend() == "nccl" else "cpu")
    if rank:
        sum_over_processes([flag])
        flag.item()                     # for it a GPU's host waits, and not for the sum
    yield
    if not rank:
        sum_over_processes([flag])

def first_says(value: float, device: str) -> float:
    """A number as the first process has it, in all processes."""
    told = torch.tensor([0.0 if rank_and_size()[0] else value], dtype=torch.float64, device=device)
    sum_over_processes([told])
    return told.item()

@contextlib.contextmanager
def tf32():
    """A GPU's fp32 products by its faster, shorter TF32 within, and as they were afterwards."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before

def train_step(model: Model, optimizer: torch.optim.Optimizer, coach: Coach | None, inputs: Tensor,
               targets: Tensor, settings: Settings, beta: float,
               scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """One optimizer step on inputs and targets (B, T), or this process's share of their rows: (4,)
    loss, cross-entropy, tau^2 divergence, norm of the gradient. Nothing waits for a GPU in it.

    Each micro-batch is divided by the tokens of the whole step, so that without dropout neither
    accumulating nor sharing changes anything but the rounding. In fp16 a scaler keeps gradients
    in its range, and leaves out the steps where it failed to."""
    device, (_, size) = inputs.device.type, rank_and_size()
    at_once, tokens = settings.micro_batch or len(inputs), targets.numel() * size
    dtype, losses = step_dtype(settings, device), inputs.new_zeros(3, dtype=torch.float64)
    scaler = scaler or torch.amp.GradScaler(device, enabled=False)
    optimizer.zero_grad()
    with tf32():
        for ids, target in zip(inputs.split(at_once), targets.split(at_once)):
            coached = coach.hidden(ids).flatten(0, 1) if coach else None            # (N, C')
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss, parts = FusedLoss.apply(
                    model(ids).flatten(0, 1), model.head, target.flatten(), coached,
                    coach and coach.head, settings, beta, settings.chunk)
            scaler.scale(loss / tokens).backward()
            losses += torch.cat([loss.detach().double()[None], parts]) / tokens
    sum_over_processes([parameter.grad for parameter in model.parameters()])
    sum_over_processes([losses])
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([losses, norm.double()[None]])

def checkpoint_activations(model: Model) -> None:
    """Keep of each block what goes in and nothing else; the backward pass makes the rest of it
    again, dropout as it was (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    One forward pass more, and no value changes."""
    for block in model.layers if isinstance(model, Llama) else model.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

@torch.no_grad()
def held_out_loss(model: Model, ids: np.ndarray, settings: Settings) -> float | None:
    """Cross-entropy of the held-out text in nats per token; None if there is less than a row.

    The rows of T tokens are fixed: all of them, or every k-th where `dev_tokens` asks for fewer."""
    T, was_training, total = settings.context, model.training, 0.0
    every = max(1, round(len(ids) / settings.dev_tokens)) if settings.dev_tokens else 1
    starts = np.arange(0, len(ids) - T, T)[::every]
    model.eval()
    for i in range(0, len(starts), settings.batch_size):
        window = ids[starts[i:i + settings.batch_size, None] + np.arange(T + 1)].astype(np.int64)
        window = torch.from_numpy(window).to(model.head.device)
        hidden, targets = model.hidden(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()
        rows = torch.arange(len(hidden), device=hidden.device)
        scores = token_log_probabilities(hidden, model.head, rows, targets, settings.chunk)
        total -= scores.sum(dtype=torch.float64).item()
    model.train(was_training)
    return total / (len(starts) * T) if len(starts) else None

@dataclass
class Run:
    """A model of this session: to be trained by its settings, or, without any, there already."""
    name: str
    out: Path
    settings: Settings | None = None
    teachers: tuple["Run", ...] = ()

    @property
    def finished(self) -> bool:
        return self.settings is None or (self.out / "model.safetensors").exists()

    @property
    def shape(self) -> ModelSettings:
        return self.settings or from_hf_config(self.out / "config.json")[0]

    @property
    def coaches(self) -> tuple["Run", ...]:
        """The teachers whose states every step asks for."""
        return self.teachers if self.settings.objective in DIVERGENCES else ()

def describe_run(run: Run, corpus: Corpus, device: str) -> dict:
    """What run.json says: all that it takes to know, and to repeat, what was done."""
    weights = [file_digest(path) for teacher in run.teachers
               for path in sorted(teacher.out.glob("*.safetensors"))]
    vocabulary = corpus.vocabulary
    return {"argv": sys.argv[1:], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": asdict(run.settings),
            "teachers": [str(teacher.out) for teacher in run.teachers],
            "digests": {**corpus.digests, "choobaca.py": file_digest(Path(__file__)),
                        "teachers": weights},
            "prefix_token": vocabulary.tokenizer.id_to_token(vocabulary.prefix_id),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}, "machine": platform.platform(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "processes": rank_and_size()[1], "threads": torch.get_num_threads()}

@contextlib.contextmanager
def locked(folder: Path):
    """Keep other processes from training in a run's folder within. A crash ends the lock, too."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a") as file:
        try:
            if fcntl and rank_and_size()[0] == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(f"{folder}: another process is training this run: wait for "
                                       "it, or choose another --out.")
        yield

@contextlib.contextmanager
def signals_kept():
    """A list that takes up Ctrl-C's and SIGTERM's signal instead of ending the program at once.

    A second one ends it, without a checkpoint of this moment; but not one of several processes,
    for there it comes from torchrun, as soon as one of them has ended."""
    came, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def keep(number, _):
        came.append(number)
        if rank_and_size()[1] == 1:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, keep) for number in numbers}
    try:
        yield came
    finally:
        for number in numbers:
            signal.signal(number, before[number])

class Progress(NamedTuple):
    """All that training changes, but for the log."""
    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

def length_until(log: Path, step: int) -> int:
    """The bytes of a log's lines up to a step; those of later steps, or cut off, do not count."""
    total = 0
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        total += len(line)
    return total

class Journal:
    """The log of a run and its progress bar, of the first process alone.

    Lines are written when their numbers are there: at once on a CPU, and every 20 steps on a GPU,
    for which one would have to wait."""

    def __init__(self, run: Run, scaler: torch.amp.GradScaler, first: int, steps: int,
                 spent: float):
        """From step `first` on, `spent` seconds after the run's begin; lines of later steps go."""
        self.run, self.scaler, self.first, self.steps, self.spent = run, scaler, first, steps, spent
        self.waiting, self.begin, self.log = [], time.perf_counter(), None
        if rank_and_size()[0] == 0:
            os.truncate(run.out / "log.jsonl", length_until(run.out / "log.jsonl", first))
            self.log = open(run.out / "log.jsonl", "a")
        self.bar = tqdm(total=steps, initial=first, desc=run.name, unit=" steps",
                        dynamic_ncols=True, disable=self.log is None)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.log:
            with naming(self.log.name):
                self.log.close()

    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self.begin

    def write(self, line: dict) -> None:
        if self.log:
            with naming(self.log.name):
                self.log.write(json.dumps(line) + "\n")
                self.log.flush()

    def add(self, step: int, row: Tensor, rates: dict) -> None:
        """Note what train_step returned for a step, counted from 1."""
        self.waiting.append((step, row, rates))
        if len(self.waiting) == (20 if row.is_cuda else 1):
            self.settle()
        if step == self.first + 5:
            left = (self.seconds() - self.spent) / 5 * (self.steps - step)
            say(f"\r{self.run.name}: about {clock(left)} to go")

    def settle(self) -> None:
        """Write what waits. Error: a loss or a gradient that is no finite number."""
        half = self.scaler.is_enabled()             # fp16 skips a step whose gradient was too large
        tokens = self.run.settings.batch_size * self.run.settings.context
        for step, row, rates in self.waiting:
            loss, ce, kl, norm = row.tolist()
            need(math.isfinite(loss) and (half or math.isfinite(norm))
                 and self.scaler.get_scale() > 1e-6, f"{self.run.out}: step {step} has a loss of "
                 f"{loss} and a gradient of {norm}: begin again with a lower --lr. What lies there "
                 "is the last good checkpoint, if one was due.")
            line = {"loss": loss, "ce": ce, **({"kl": kl} if "beta" in rates else {}),
                    "norm": norm, **rates}
            speed = (step - self.first) * tokens / (self.seconds() - self.spent)
            self.write({"step": step, **line, "seconds": self.seconds(),
                        "tokens_per_second": speed})
            shown = " ".join(f"{key} {value:.3g}" for key, value in line.items())
            self.bar.set_postfix_str(f"{shown}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update()
        self.waiting.clear()

    def save(self, step: int, progress: Progress) -> None:
        """A checkpoint after a step: whole on the disk before it takes the last one's place."""
        self.settle()
        if self.log:
            os.fsync(self.log.fileno())
            parts = {name: part.state_dict() for name, part in progress._asdict().items()}
            with written_whole(self.run.out / "state.pt") as file:
                try:
                    torch.save({"step": step, "seconds": self.seconds(), **parts}, file)
                except RuntimeError as error:       # torch's own, over the disk's
                    raise error.__context__ if isinstance(error.__context__, OSError) else error

def load_state(path: Path, steps: int, progress: Progress) -> tuple[int, float]:
    """The step and the seconds of a checkpoint, which it puts into progress. Error: damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in progress._asdict().items():
            part.load_state_dict(state[name])
        step, seconds = state["step"], float(state["seconds"])
        moments = progress.optimizer.state
        sound = type(step) is int and 0 < step < steps and math.isfinite(seconds) and all(
            moments[weight][name].shape == weight.shape and moments[weight][name].isfinite().all()
            for weight in progress.model.parameters() for name in ("exp_avg", "exp_avg_sq"))
        problem = "its parts do not fit each other"
    except OSError:
        raise
    except Exception as error:                      # a damaged file fails in a hundred ways
        sound, problem = False, str(error).split("\n")[0]
    need(sound, f"{path} is damaged ({problem}): begin again with --overwrite.")
    return step, seconds

def need_same(run: Run, record: dict) -> None:
    """Error: a run was begun otherwise than run.json would have it now."""
    before, free = read_json(run.out / "run.json"), {"save_minutes", "activation_checkpointing"} | {
        field.name for field in fields(Settings) if field.metadata["path"]}
    for group, what, free in (("settings", "--{}", free),
                              ("digests", "the digest of {}", {"choobaca.py"})):
        old = before.get(group)
        need(isinstance(old, dict), f"{run.out}/run.json has no {group}: begin again, with "
             "--overwrite.")
        for name, value in record[group].items():
            shown = what.format(name.replace("_", "-"))
            need(name in free or old.get(name) == value, f"{shown} is {value}, but {run.out} was "
                 f"begun with {old.get(name)}: go on with that, or choose another --out.")
    old, new = ((facts.get("processes", 1), "a CPU" if facts.get("device") == "cpu" else "a GPU")
                for facts in (before, record))
    need(old == new, f"{run.out} was begun by {old[0]} process(es) on {old[1]}, and these are "
         f"{new[0]} on {new[1]}: go on as it was begun, or choose another --out.")

def need_same_as_shown(run: Run, corpus: Corpus, device: str) -> None:
    """Error: a finished run was of other settings, text or teachers than it would be shown as."""
    digests = describe_run(run, corpus, device)["digests"]
    if run.settings.objective == "seqkd":
        del digests["text"]                                 # which was drawn from its teacher
    need_same(run, read_json(run.out / "run.json") | {"settings": asdict(run.settings),
                                                      "digests": digests})

def share_of_rows(batch: tuple[Tensor, Tensor], device: str) -> list[Tensor]:
    """Inputs and targets (B, T) of this process, on its device."""
    rank, size = rank_and_size()
    mine = [rows.tensor_split(size)[rank] for rows in batch]
    return [rows.contiguous().pin_memory().to(device, non_blocking=True) for rows in mine] \
        if device == "cuda" else mine

def stop_signal(signals: list[int], device: str, step: int) -> int:
    """The signal that this process was sent, SIGTERM if another was, or 0: all stop after the same
    step. As GPUs have to be waited for to ask the others, they are asked every 20 steps."""
    if rank_and_size()[1] == 1:
        return max(signals, default=0)
    if device == "cuda" and step % 20:
        return 0
    flag = torch.tensor([float(len(signals))], device=device)
    sum_over_processes([flag])
    return max(signals, default=signal.SIGTERM) if flag else 0      # one that came since: next time

def starting_point(run: Run, record: dict, resume: bool, steps: int,
                   progress: Progress) -> tuple[int, float]:
    """The step and the seconds to go on from: a checkpoint's, or 0 in a folder made ready."""
    state = run.out / "state.pt"
    if resume and (run.out / "run.json").exists():
        need_same(run, record)
    found = load_state(state, steps, progress) if resume and state.exists() else (0, 0.0)
    need(first_says(found[0], progress.model.head.device) == found[0], f"{run.out} is another "
         "folder for some of the processes: expected one that they share.")
    if rank_and_size()[0] == 0:
        for left in run.out.glob("*.partial"):              # by a process that was killed
            left.unlink()
    if found[0] == rank_and_size()[0] == 0:
        state.unlink(missing_ok=True)
        (run.out / "model.safetensors").unlink(missing_ok=True)
        write_json(run.out / "run.json", record)
    return found

def finish(run: Run, model: Model, vocabulary: Vocabulary) -> None:
    """Save the weights, and remove the checkpoint."""
    save_model(run.out, model, vocabulary)
    (run.out / "state.pt").unlink(missing_ok=True)

def prepare(model: Model, coach: Coach | None, settings: Settings, device: str) -> None:
    """How passes are carried out; on a GPU compiled, for a step is bound by its many launches."""
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.compile and device == "cuda":
        for each in (model, *(coach.teachers if coach else ())):
            each.compile()

def fit(run: Run, corpus: Corpus, device: str, resume: bool = False) -> tuple[int, float]:
    """Train a run; its folder has the log from the first step, and the weights at the end. Returns
    the steps that were left to do and their seconds.

    Nothing beside `train_step` has a part in what is learnt, looking at held-out text least of all:
    the batch, the rates and dropout's stream are functions of the step. So a run that goes on from
    a checkpoint ends where it would have ended."""
    settings, (rank, size), dtype = run.settings, rank_and_size(), step_dtype(run.settings, device)
    steps, per_epoch = count_steps(len(corpus.train), settings)
    gc.collect()            # a checkpointed teacher's blocks refer to themselves, and would stay
    model = new_model(settings, corpus.vocabulary.size, settings.seed).to(device).train()
    progress = Progress(model, make_optimizer(model, settings),
                        torch.amp.GradScaler(device, enabled=dtype == torch.float16))
    coach = Coach([load_model(each.out, device)[0] for each in run.coaches],
                  PRECISIONS.get(settings.teacher_precision, dtype)) if run.coaches else None
    prepare(model, coach, settings, device)
    first, spent = starting_point(run, describe_run(run, corpus, device), resume, steps, progress)
    with signals_kept() as signals, Journal(run, progress.scaler, first, steps, spent) as journal:
        saved, number = time.monotonic(), 0
        for step in range(first, steps):
            inputs, targets = share_of_rows(batch_at(step, corpus.train, settings), device)
            beta = beta_at(step // per_epoch, math.ceil(steps / per_epoch), settings)
            rates = ({"beta": beta} if coach else {}) | {
                "lr": lr_at(step, steps, per_epoch, settings)}
            for group in progress.optimizer.param_groups:
                group["lr"] = rates["lr"]
            torch.manual_seed(((settings.seed * 2**32 + step) * size + rank) % 2**63)   # of dropout
            row = train_step(model, progress.optimizer, coach, inputs, targets, settings, beta,
                             progress.scaler)
            journal.add(step + 1, row, rates)
            last = step + 1 == steps
            if last or settings.eval_every and (step + 1) % settings.eval_every == 0:
                journal.settle()
                loss = held_out_loss(model, corpus.dev, settings)
                journal.write({"step": step + 1, "dev_loss": loss})
            number = stop_signal(signals, device, step)
            if not last and (number or time.monotonic() - saved > 60 * settings.save_minutes):
                journal.save(step + 1, progress)
                saved = time.monotonic()
            if number:
                break
        with first_process_first():             # none ends while the first still writes
            if rank == 0 and last:
                finish(run, model, corpus.vocabulary)
        if number:
            say(f"{run.name}: stopped after step {step + 1:,} of {steps:,}, which is kept. To go "
                "on: the same command with --resume.")
            sys.exit(128 + number)
    return steps - first, journal.seconds() - spent

def likeliest(p: Tensor, mass: float) -> Tensor:
    """p of the fewest tokens that have this mass together, 0 for the others: (n, V) -> (n, V)
    (Holtzman et al. 2020, "top-p")."""
    falling, order = p.sort(-1, descending=True)
    before = falling.cumsum(-1, dtype=torch.float64) - falling
    return torch.zeros_like(p).scatter_(-1, order, falling.masked_fill_(before >= mass, 0))

def draw_next(logits: Tensor, temperature: float, top_p: float,
              generator: torch.Generator | None) -> Tensor:
    """An id for each row, drawn from the likeliest of softmax(logits / temperature), or at
    temperature 0 the very likeliest: (n, V) -> (n, 1). Error: logits that are no numbers."""
    need(logits.isfinite().all(), "the model's scores are not finite numbers: its weights are "
         "ruined, perhaps by too high a learning rate.")
    if temperature == 0:
        return logits.argmax(-1, True)
    p = (logits / temperature).softmax(-1)
    return torch.multinomial(likeliest(p, top_p) if top_p < 1 else p, 1, generator=generator)

@torch.no_grad()
def write_on(model: Model, ids: Tensor, ends: list[int], length: int,
             generator: torch.Generator | None, temperature: float = 1.0, top_p: float = 1.0):
    """Continue rows of ids (B, T) until they draw one of `ends`, or by `length` tokens.

    Yields at each step which rows go on, (R,), and what they drew, (R,). No id goes through the
    model twice, for it keeps the keys and values of those before."""
    order, stop = torch.arange(len(ids), device=ids.device), torch.tensor(ends, device=ids.device)
    cache = [[] for _ in range(model.config.layers)]
    for _ in range(length):
        logits = model.hidden(ids, cache)[:, -1] @ model.head.T
        ids = draw_next(logits, temperature, top_p, generator)
        going = ~torch.isin(ids[:, 0], stop)
        ids, order = ids[going], order[going]
        if not len(ids):
            return
        if not going.all():
            cache = [[kept[going] for kept in layer] for layer in cache]
        yield order, ids[:, 0]

def sample_lines(model: Model, start: int, rows: int, length: int,
                 generator: torch.Generator) -> list[list[int]]:
    """Lines that the model writes after the token `start`, which also ends them, or after `length`
    tokens: ids drawn from its softmax, without `start`."""
    lines, begin = [[] for _ in range(rows)], torch.full((rows, 1), start, device=model.head.device)
    for order, drawn in write_on(model, begin, [start], length, generator):
        for row, i in zip(order.tolist(), drawn.tolist()):
            lines[row].append(i)
    return lines

def sampled_corpus(teacher: Run, corpus: Corpus, settings: Settings, runs: Path,
                   device: str) -> Corpus:
    """The corpus with the teacher's own text in place of what it learnt from, for seqkd.

    As many tokens as that has, sampled once, line by line, into a folder of `runs` that any --text
    may name; the same seed and teacher find it there again. What is held out stays."""
    (tokenizer, prefix_id, _), wanted, tokens, lines = corpus.vocabulary, len(corpus.train), 0, []
    facts = [[file_digest(path) for path in sorted(teacher.out.glob("*.safetensors"))], wanted,
             corpus.vocabulary.digest, settings.seed, settings.prefix, settings.context]
    path = runs / f"seqkd-{digest(json.dumps(facts).encode())[:8]}" / "sampled.train"
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[-1:]
    start = newline[0] if newline and settings.prefix != "line" else prefix_id
    generator = torch.Generator(device).manual_seed(settings.seed)
    if not path.exists():
        model, _ = load_model(teacher.out, device)
        with tqdm(total=wanted, desc="sampling", unit=" tokens") as bar:
            while tokens < wanted:
                drawn = sample_lines(model, start, 256, settings.context - 1, generator)
                some = [" ".join(line.split()) for line in tokenizer.decode_batch(drawn)]
                some = [line for line in some if line]
                need(some, f"{teacher.out} writes nothing but empty lines: train it for longer, or "
                     "raise --context.")
                lines += some
                coded = tokenizer.encode_batch_fast([" " + line for line in some],
                                                    add_special_tokens=False)
                tokens += sum(len(line.ids) + 1 for line in coded)
                bar.update(tokens - bar.n)
        with written_whole(path) as file:
            file.write("\n".join(lines).encode())
    text, digests = [read_lines(path)], {**corpus.digests, "text": file_digest(path)}
    ids = encode_once(path.with_suffix(".ids"), corpus.vocabulary, text, settings.prefix, digests)
    return corpus._replace(train=ids[:wanted], digests=digests)

# -----------------------------------------------------------------------------
# 9. Minimal pairs
#
# two sentences that differ in one point of grammar: is the good one the likelier?
#
# The rule is the BabyLM 2024 pipeline's and lm-evaluation-harness's: the score of a text is the sum
# of the log-probabilities of its tokens given what stands before, the prefix token if nothing does;
# a sentence has a leading space; a tie counts for the good sentence.

class Pair(NamedTuple):
    """One line of a file of minimal pairs."""
    good: tuple[str, str]           # what is given, and what is scored after it
    bad: tuple[str, str]
    paradigm: str
    phenomenon: str
    place: str                      # the file and the line

SUITES = ("blimp", "supplement", "ewok")

def default_pairs(suite: str = "blimp") -> Path:
    """Where a suite is if it has been put there; for BLiMP else the small set of this project."""
    folder = HOME / "data" / suite
    return folder if any(folder.glob("*.jsonl")) or suite != "blimp" else HOME / "data/tiny/blimp"

def group_by(items, key) -> dict[str, list]:
    """Items by key, in the order of first appearance."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

def read_pair(line: bytes, path: Path, number: int, contexts: bool) -> Pair:
    """A line of BLiMP's kind (two sentences) or of EWoK's (two contexts, two targets).

    EWoK's second target is the bad text, or, with `contexts`, its second context is what the bad
    one is given. Error: neither kind; the line is not shown, for EWoK's is not to be spread."""
    place = f"{path}, line {number}"
    try:
        item = json.loads(line)
        if "Target1" in item:
            given, other, *targets = (item[key] for key in
                                      ("Context1", "Context2", "Target1", "Target2"))
            good = (given, " " + targets[0])
            bad = (other, good[1]) if contexts else (given, " " + targets[1])
            paradigm = term = str(item.get("Domain", path.stem))
        else:
            good, bad = (("", " " + item[key]) for key in ("sentence_good", "sentence_bad"))
            given = other = "nothing"
            paradigm = str(item.get("UID", path.stem))
            term = str(item.get("linguistics_term", paradigm))
        "".join(good + bad).encode()            # fails where one is no string, or half of one
        if not all(text.strip() for text in (given, other, good[1], bad[1])):
            raise ValueError("a text is empty")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise click.ClickException(
            f"{place}: expected a JSON object with strings sentence_good and sentence_bad, or "
            "Context1, Context2, Target1 and Target2, none of them empty.")
    # BLiMP's paper counts its two s-selection paradigms under argument structure.
    return Pair(good, bad, paradigm, term.replace("s-selection", "argument_structure"), place)

def is_filtered_out(pair: Pair, rare: set[str]) -> bool:
    """Whether BabyLM's filtered BLiMP lacks the pair, for a word that its text hardly has."""
    text = (pair.good[1] + " " + pair.bad[1]).lower()
    return not rare.isdisjoint(re.findall(r"[a-z]+(?:-[a-z]+)*", text))

def read_pairs(folder: Path, sample: int = 0, filtered: bool = False,
               contexts: bool = False) -> list[Pair]:
    """The pairs in a folder's *.jsonl, or about `sample` of them, the same share of each paradigm
    and one at least. Error: no such folder or file, a line that is no pair, two kinds of pairs."""
    need(folder.is_dir(), f"{folder} is not a folder: expected one of minimal pairs, *.jsonl: put "
         "them there, or name another." + how_to_get(folder))
    paths = sorted(folder.glob("*.jsonl"))
    need(paths, f"{folder} holds no *.jsonl: expected a folder of minimal pairs.")
    pairs = [read_pair(line, path, number, contexts) for path in paths
             for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    need(len({bool(pair.good[0]) for pair in pairs}) < 2, f"{folder} holds sentences and targets "
         "after contexts: expected pairs of one kind.")
    if filtered:
        rare = set((HOME / "data/blimp_rare_words.txt").read_text().split())
        pairs = [pair for pair in pairs if not is_filtered_out(pair, rare)]
    need(pairs, f"{folder}: no pair is left of its *.jsonl: expected minimal pairs.")
    share = min(1.0, sample / len(pairs)) if sample else 1.0
    groups, draw = group_by(pairs, lambda pair: pair.paradigm), np.random.default_rng(0)
    return [group[i] for group in groups.values()
            for i in sorted(draw.permutation(len(group))[:max(1, round(share * len(group)))])]

def encode_pairs(vocabulary: Vocabulary, pairs: list[Pair],
                 positions: int) -> dict[tuple[str, str], tuple[list[int], int]]:
    """For each distinct text of the pairs its ids and the number of them that are given.

    Spaces at the end of what is given go to what is scored, and both are encoded as one, as
    lm-evaluation-harness does it. Error: a text with no token, or too long for the model."""
    texts = {text: pair.place for pair in reversed(pairs) for text in pair[:2]}
    split = [(given.rstrip(), given[len(given.rstrip()):] + scored) for given, scored in texts]
    encoded = [[line.ids for line in vocabulary.tokenizer.encode_batch_fast(
        some, add_special_tokens=False)] for some in ([a + b for a, b in split],
                                                      [a for a, _ in split])]
    lines = {}
    for (text, place), ids, given in zip(texts.items(), *encoded):
        ids, known = (ids, len(given)) if text[0] else ([vocabulary.prefix_id, *ids], 1)
        need(0 < known < len(ids), f"{place}: nothing is left of a text when it is encoded: "
             "expected at least one token to score, and one before it.")
        need(len(ids) - 1 <= positions, f"{place}: a text has {len(ids) - 1} tokens: expected at "
             f"most the model's {positions} positions (--positions, or other pairs).")
        lines[text] = ids, known
    return lines

class Trie:
    """Sequences of ids that begin alike, as one tree: a row for the model, with no id twice.

    Nodes are in the order in which a sorted list of the sequences reaches them, so what hangs under
    node i is i + 1 to end[i] - 1. The last id of a sequence is only ever predicted: no node.

        <s> A dog  ran           node   <s> A dog cat          a sequence's edges, (node, next id):
        <s> A dog  barked        depth   0  1  2   3           (<s>, A) (A, dog) (dog, ran) ...
        <s> A cat  ran           end     4  4  3   4"""

    def __init__(self):
        self.ids, self.depth, self.end, self.path = [], [], [], []      # path: to the newest node
        self.edges, self.sequences = {}, {}     # edge: its number; a sequence's key: its edges

    def shared(self, ids: list[int]) -> int:
        """How many ids a sequence has in common with the newest path."""
        pairs = zip(ids[:-1], self.path)
        return next((i for i, (a, node) in enumerate(pairs) if a != self.ids[node]),
                    min(len(ids) - 1, len(self.path)))

    def add(self, key, ids: list[int], known: int) -> None:
        """Hang in a sequence, of which the first `known` ids are given and not scored."""
        start = self.shared(ids)
        del self.path[start:]
        for depth in range(start, len(ids) - 1):
            self.path.append(len(self.ids))
            self.ids.append(ids[depth])
            self.depth.append(depth)
            self.end.append(0)
        for node in self.path:
            self.end[node] = len(self.ids)
        edges = zip(self.path[known - 1:], ids[known:])
        self.sequences[key] = [self.edges.setdefault(edge, len(self.edges)) for edge in edges]

NODES = 128         # in a row: a longer one shares more beginnings, but its attention costs more

def plant(lines: dict) -> list[Trie]:
    """The sequences of encode_pairs as tries of NODES or, where one text has more, of that one."""
    tries = [Trie()]
    for text, (ids, known) in sorted(lines.items(), key=lambda line: line[1]):
        new = len(ids) - 1 - tries[-1].shared(ids)
        if len(tries[-1].ids) + new > NODES and tries[-1].ids:
            tries.append(Trie())
        tries[-1].add(text, ids, known)
    return tries

def score_tries(model: Model, tries: list[Trie]) -> list[np.ndarray]:
    """The log-probability of each edge of each trie: all tries at once, a row each."""
    device, counts = model.head.device, [len(trie.ids) for trie in tries]
    T = max(counts)
    ids, depth, end = (torch.tensor([part + list(fill)[len(part):] for part in parts])
                       for parts, fill in (([trie.ids for trie in tries], [0] * T),
                                           ([trie.depth for trie in tries], [0] * T),
                                           ([trie.end for trie in tries], range(1, T + 1))))
    node = torch.arange(T)
    sees = (node <= node[:, None]) & (node[:, None] < end[:, None])                     # (B, T, T)
    mask = torch.zeros(sees.shape).masked_fill_(~sees, -math.inf)[:, None]
    tree = Tree(depth.to(device), mask.to(device, model.head.dtype))
    real = torch.cat([i * T + torch.arange(count) for i, count in enumerate(counts)])
    hidden = model.hidden(ids.to(device), tree=tree).flatten(0, 1)[real.to(device)]     # (N, C)
    first = [0, *itertools.accumulate(counts)]
    rows = torch.tensor([first[i] + row for i, trie in enumerate(tries) for row, _ in trie.edges])
    targets = torch.tensor([target for trie in tries for _, target in trie.edges])
    rows, order = rows.sort(stable=True)
    scores = np.empty(len(rows))
    scores[order.numpy()] = token_log_probabilities(
        hidden, model.head, rows.to(device), targets[order].to(device), 256).double().cpu().numpy()
    return np.split(scores, np.cumsum([len(trie.edges) for trie in tries])[:-1])

@torch.inference_mode()
def score_pairs(model: Model, vocabulary: Vocabulary, pairs: list[Pair], name: str) -> np.ndarray:
    """The log-probabilities of the good and the bad texts in nats: (pairs, 2), summed in float64.

    Equal texts are scored once, so that they tie, and so are all beginnings that texts share."""
    lines, totals = encode_pairs(vocabulary, pairs, model.config.positions), {}
    tries = sorted(plant(lines), key=lambda trie: len(trie.ids))
    at_once = 2**15 if model.head.is_cuda else 1024     # more falls out of a processor's cache
    with tqdm(total=len(lines), desc=name, unit=" texts", leave=False) as bar:
        while tries:                                                    # the longest first
            rows = max(1, at_once // len(tries[-1].ids))
            batch, tries = tries[-rows:], tries[:-rows]
            for trie, scores in zip(batch, score_tries(model, batch)):
                for text, edges in trie.sequences.items():
                    totals[text] = scores[edges].sum()
                bar.update(len(trie.sequences))
    return np.array([[totals[pair.good], totals[pair.bad]] for pair in pairs])

def judge(scores: np.ndarray, tie: float = 1.0) -> np.ndarray:
    """What each pair counts: 1 if the good text is the likelier one, `tie` if both are alike, else,
    or if a score is no finite number, 0. (pairs, 2) -> (pairs,)"""
    good, bad = scores.T
    return np.where(good == bad, tie, good > bad) * np.isfinite(scores).all(1)

def mean_row(rows: list[dict]) -> dict:
    """The unweighted mean of accuracies, with its standard error: the errors' root sum of squares
    over their number."""
    return {"accuracy": float(np.mean([row["accuracy"] for row in rows])),
            "stderr": math.hypot(*(row["stderr"] for row in rows)) / len(rows),
            **{key: sum(row[key] for row in rows) for key in ("n", "ties", "not_finite")}}

def summarise(pairs: list[Pair], scores: np.ndarray, tie: float = 1.0) -> dict:
    """Accuracy overall, by phenomenon and by paradigm, with standard error, n, ties, not_finite.

    "accuracy" is the unweighted mean of the paradigms, as in BabyLM and lm-evaluation-harness; a
    phenomenon is the mean of its paradigms. A paradigm's standard error divides by n - 1."""
    right, paradigms = judge(scores, tie), {}
    for uid, members in group_by(range(len(pairs)), lambda i: pairs[i].paradigm).items():
        n, accuracy, own = len(members), float(np.mean(right[members])), scores[members]
        paradigms[uid] = {"phenomenon": pairs[members[0]].phenomenon, "accuracy": accuracy, "n": n,
                          "stderr": float(np.std(right[members]) / math.sqrt(max(1, n - 1))),
                          "ties": int(np.sum(own[:, 0] == own[:, 1])),
                          "not_finite": int(np.sum(~np.isfinite(own).all(1)))}
    phenomena = group_by(paradigms.values(), lambda row: row["phenomenon"])
    return {**mean_row(list(paradigms.values())), "tie": tie, "paradigms": paradigms,
            "phenomena": {term: mean_row(rows) for term, rows in sorted(phenomena.items())}}

def evaluate(model: Model, vocabulary: Vocabulary, pairs: list[Pair], name: str,
             tie: float = 1.0) -> tuple[dict, np.ndarray]:
    """The summary of a model's scores on pairs, and the scores. Many ties, and any score that is no
    number, are said on stderr. Error: no pair has two that are."""
    scores = score_pairs(model, vocabulary, pairs, name)
    result = summarise(pairs, scores, tie)
    need(result["not_finite"] < result["n"], "the model's scores are not finite numbers: its "
         "weights are ruined, perhaps by too high a learning rate.")
    for count, few, what in ((result["ties"], 0.01 * result["n"], "have two equal scores"),
                             (result["not_finite"], 0, "have a score that is no finite number")):
        if count > few:
            click.echo(f"Warning: {count:,} of {result['n']:,} pairs {what}: has this model been "
                       "trained, and was nothing ruined?", err=True)
    return result, scores

def keep_scores(folder: Path, suite: str, pairs: list[Pair], scores: np.ndarray,
                tie: float = 1.0) -> None:
    """Write a model's scores to its folder: a line that says of what, then a line a pair.

    The file is named by the suite and a digest of the pairs, so that a sample does not replace the
    whole. No text is in it, for EWoK's is not to be spread."""
    text = json.dumps([tie, [[*pair.good, *pair.bad, *pair[2:4]] for pair in pairs]])
    weights = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    lines = [{"pairs": len(pairs), "tie": tie, "weights": weights}] + [
        {"phenomenon": pair.phenomenon, "paradigm": pair.paradigm,
         "line": int(pair.place.split()[-1]), "good": good, "bad": bad}
        for pair, (good, bad) in zip(pairs, scores.tolist())]
    with written_whole(folder / f"{suite}-{digest(text.encode())[:8]}.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

def read_published(suite: str) -> dict[str, dict[str, str]]:
    """The paper's Tables 2 and 3 for a suite, in percent: by row, "mean" among them, by model."""
    with open(HOME / "data/paper.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("suite") == suite]
    return {row.pop("row"): row for row in rows}

def pairs_table(results: dict[str, dict], paradigms: bool, published: dict | None = None) -> str:
    """The scores of models on the same pairs, side by side, in percent, with the paper's behind."""
    columns, published = list(results.values()), published or {}
    first, models = columns[0], list(published.get("mean", ()))
    lines = [("accuracy and standard error, in %", "n", [
        *(f"{name:>14}" for name in results), *(f"{model:>10}" for model in models)])]

    def add(label: str, rows: list[dict], theirs: str = "") -> None:
        cells = [f"{100 * row['accuracy']:7.1f} ± {100 * row['stderr']:4.1f}" for row in rows]
        cells += [f"{published.get(theirs, {}).get(model, ''):>10}" for model in models]
        lines.append((label, f"{rows[0]['n']:,}", cells))

    for term in first["phenomena"]:
        add(term, [column["phenomena"][term] for column in columns], term)
        members = [uid for uid, row in first["paradigms"].items() if row["phenomenon"] == term]
        for uid in members if paradigms and members != [term] else []:
            add("  " + uid, [column["paradigms"][uid] for column in columns])
    add(f"mean of {len(first['paradigms'])} paradigms", columns, "mean")
    label = "given to the good sentence" if first["tie"] == 1 else "half a point each"
    lines.append((f"ties, {label}", "", [f"{column['ties']:>14,}" for column in columns]))
    width = max(len(label) for label, _, _ in lines)
    return "\n".join(f"{label:<{width}} {n:>7}  {'  '.join(cells)}".rstrip()
                     for label, n, cells in lines)

class Judged(NamedTuple):
    """Pairs as a model did on them."""
    names: list[tuple[str, str, int]]       # phenomenon, paradigm and line of each pair
    right: np.ndarray                       # (pairs,), what each counts

def common_scores(folders: list[Path], suite: str) -> str:
    """The name of the longest file of a suite's scores that is in all folders. Error: none is."""
    for folder in folders:
        need(folder.is_dir(), f"{folder} is not a folder: expected one that holds a model.")
    sizes = [{path.name: path.stat().st_size for path in folder.glob(f"{suite}-*.jsonl")}
             for folder in folders]
    common = set.intersection(*map(set, sizes))
    need(common, f"{', '.join(map(str, folders))}: no same pairs of {suite} were scored for all: "
         f"run eval-blimp --suite {suite} --model ... for each, with the same --data, --sample, "
         "--filtered and --ewok-contexts.")
    return max(common, key=lambda name: (sizes[0][name], name))

def read_scores(path: Path) -> Judged:
    """What keep_scores wrote. Error: damaged, or of other weights than lie beside it."""
    again = "score the model again with eval-blimp."
    try:
        facts, *lines = map(json.loads, path.read_bytes().splitlines())
        names = [(str(line["phenomenon"]), str(line["paradigm"]), line["line"]) for line in lines]
        scores = np.array([[line["good"], line["bad"]] for line in lines], np.float64)
        right, weights = judge(scores.reshape(-1, 2), float(facts["tie"])), facts["weights"]
        sound = len(names) == facts["pairs"] > 0
    except (ValueError, TypeError, KeyError, RecursionError):
        sound = False
    need(sound, f"{path} is damaged: expected one JSON object a line, and all of them: {again}")
    found = [file_digest(shard) for shard in sorted(path.parent.glob("*.safetensors"))]
    need(found == weights, f"{path} is of other weights than lie beside it: {again}")
    return Judged(names, right)

def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided McNemar test: how often a fair coin splits the pairs that only one model
    gets right at least as unevenly (McNemar 1947)."""
    coin = torch.distributions.Binomial(gained + lost, torch.tensor(0.5, dtype=torch.float64))
    tail = coin.log_prob(torch.arange(min(gained, lost) + 1, dtype=torch.float64)).logsumexp(0)
    return min(1.0, 2 * tail.exp().item())

@functools.lru_cache
def student_t(df: int) -> float:
    """The t between whose negative and itself 95 % of Student's distribution lie, of a million."""
    return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(df, 10**6)), 0.95))

def confidence_interval(differences: list[np.ndarray], resamples: int,
                        seed: int) -> tuple[float, float]:
    """A 95 % interval for the mean over paradigms of the mean difference within each.

    Pairs of one paradigm are alike, so what was seen might have been otherwise in two ways: other
    paradigms (drawn again, with replacement), and other pairs within each (drawn again, too). The
    paradigms' spread holds that of their pairs already, which is taken out of it; and few paradigms
    vary less than what they came from, so it is stretched as Student's t has it, by
    sqrt(P / (P - 1)) t / 1.96. Of a single paradigm, only the pairs can vary."""
    P, draw = len(differences), np.random.default_rng(seed)
    seen, chosen = np.array([*map(np.mean, differences)]), draw.integers(P, size=(resamples, P))
    chance = np.empty((resamples, P))               # what other pairs add to a paradigm's mean
    for i, difference in enumerate(differences):
        values, counts = np.unique(difference, return_counts=True)
        n, here = len(difference), chosen == i
        chance[here] = draw.multinomial(n, counts / n, here.sum()) @ values / n - seen[i]
    stretch = 0.0
    if P > 1 and seen.var() > 0:
        within = np.mean([each.var() / max(1, len(each) - 1) for each in differences])
        between = max(0, 1 - within / seen.var(ddof=1))
        stretch = math.sqrt(between * P / (P - 1)) * student_t(P - 1) / 1.96
    means = seen.mean() + stretch * (seen[chosen].mean(1) - seen.mean()) + chance.mean(1)
    return tuple(np.clip(np.quantile(means, (0.025, 0.975)), -1, 1).tolist())

def compare_scores(first: Judged, other: Judged, resamples: int, seed: int) -> list[dict]:
    """How the second model differs from the first, by phenomenon and over all, on the same pairs.

    The rule: "better" or "worse" if the 95 % interval of the difference leaves 0 out and McNemar's
    p is under 0.05, else "not distinguishable". McNemar's test takes pairs for independent, which
    they are not, so it decides where there are few pairs, and the interval where there are many."""
    rows, members = [], group_by(range(len(first.names)), lambda i: first.names[i][0])
    for term, chosen in [*sorted(members.items()), ("all", range(len(first.names)))]:
        groups = list(group_by(chosen, lambda i: first.names[i][:2]).values())
        gaps = [other.right[group] - first.right[group] for group in groups]
        low, high = confidence_interval(gaps, resamples, seed)
        gap = np.concatenate(gaps)
        p = mcnemar(int(np.sum(gap > 0)), int(np.sum(gap < 0)))
        better, worse = low > 0 and p < 0.05, high < 0 and p < 0.05
        rows.append({
            "phenomenon": term, "paradigms": len(groups), "n": len(gap),
            **{name: float(np.mean([np.mean(each.right[group]) for group in groups]))
               for name, each in (("first", first), ("other", other))},
            "difference": float(np.mean([np.mean(each) for each in gaps])),
            "low": low, "high": high, "p": p,
            "verdict": ("better" if better else "worse" if worse else "not distinguishable")
            + " on these pairs" * (len(groups) == 1)})
    return rows

# -----------------------------------------------------------------------------
# 10. The command line
#
# defaults < the config's TOML < flags  ->  settings  ->  train, eval-blimp, compare, configs

KNOWN = {field.name: field for field in fields(Settings)}

def settings_flags(command):
    """The command with a flag for every setting, None where it is not given."""
    for field in reversed(KNOWN.values()):
        flag = "--" + field.name.replace("_", "-")
        kind = click.Choice(field.metadata["choices"]) if field.metadata["choices"] else field.type
        default = str(field.default).removeprefix(f"{HOME}/") or "none"
        command = click.option(
            flag + f"/--no-{flag[2:]}" * (kind is bool), field.name, default=None, type=kind,
            help=f"{field.metadata['help']}  [default: {default}]")(command)
    return command

TEACHERS_OWN = [field.name for group in (ModelSettings, BatchSettings, OptimizerSettings)
                for field in fields(group)] + ["micro_batch"]

def check_keys(table: dict, allowed, source: str, folder: Path) -> dict:
    """The settings in a table of a TOML file, checked; paths are taken from the file's folder."""
    values = {}
    for key, value in table.items():
        if key not in allowed:
            near, = difflib.get_close_matches(key, allowed, 1, 0.0)
            raise click.ClickException(f"{source}: unknown key {key!r}; did you mean {near!r}?")
        value = checked(KNOWN[key], value, f"{source}: {key}")
        is_path = KNOWN[key].metadata["path"] and value
        values[key] = os.path.normpath(folder / value) if is_path else value
    return values

def read_config(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict, list[dict]]:
    """The student's settings and each teacher's, from a TOML file.

    What it does not say itself is as in the file that it names as its `base`, teachers and all."""
    need(path.resolve() not in above, f"{path} is its own base: expected another file.")
    try:
        raw = tomllib.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise click.ClickException(f"{path} is not TOML: {error}.")
    tables, base = raw.pop("teacher", []), raw.pop("base", "")
    need(isinstance(tables, list) and all(isinstance(table, dict) for table in tables),
         f"{path}: teacher is not a list of tables: expected each under [[teacher]].")
    need(isinstance(base, str), f"{path}: base is {base!r}: expected the name of a TOML file.")
    values, teachers = {}, []
    if base:
        values, teachers = read_config(Path(os.path.normpath(path.parent / base)),
                                       (*above, path.resolve()))
    return values | check_keys(raw, KNOWN, str(path), path.parent), [
        check_keys(table, TEACHERS_OWN, f"{path}, teacher {i}", path.parent)
        for i, table in enumerate(tables, 1)] or teachers

def read_settings(config: Path, flags: dict,
                  teachers: list[Path]) -> tuple[Settings, list[Settings]]:
    """The run's settings, and those of the teachers that the config describes for it.

    A teacher's settings are the run's own, but for its table and for what makes a distillation.
    Error: settings that are unknown or do not fit, more teachers than the config describes."""
    values, tables = read_config(config)
    for name, value in flags.items():
        if value is not None:
            values[name] = checked(KNOWN[name], value, "--" + name.replace("_", "-"))
    if values.get("objective", "ce") == "ce":
        need(not teachers and not flags["teachers"], "--objective ce has no teacher: leave out "
             "--teachers and --teacher, or choose another objective.")
        values["teachers"] = 0
    if teachers:
        count = len(set(teachers))
        need(count == len(teachers) <= 2 and flags["teachers"] in (None, count), "--teacher names "
             f"{', '.join(map(str, teachers))}: expected one folder or two different ones, and "
             "--teachers, if given, to be their number.")
        tables, values["teachers"] = [], len(teachers)
        values["tokenizer"] = values.get("tokenizer") or str(teachers[0])
    settings = Settings(**values)
    need(teachers or settings.teachers <= len(tables), f"--teachers {settings.teachers}: {config} "
         f"describes {len(tables)}: add a table [[teacher]], or name a folder with --teacher.")
    plain = {field.name: field.default for field in fields(LossSettings)} | {"teachers": 0}
    tables = tables[:settings.teachers]
    return settings, [replace(settings, **{**plain, **table}) for table in tables]

def teacher_folder(settings: Settings, corpus: Corpus, runs: Path) -> Path:
    """Where a teacher of these settings and this text lies: the name has their digest, so what is
    found there was trained for just that (by which version of this file, its run.json says)."""
    facts = json.dumps([settings.learnt(), corpus.digests]).encode()
    return runs / f"teacher-{settings.model_type}-{digest(facts)[:8]}"

def check_teacher(run: Run, corpus: Corpus) -> None:
    """Error: a trained teacher's vocabulary is not the student's, or its weights are ruined."""
    teacher, vocabulary = load_model(run.out, "cpu")
    own, ours = (json.loads(each.tokenizer.to_str())["model"]
                 for each in (vocabulary, corpus.vocabulary))
    need(own == ours and len(teacher.head) == corpus.vocabulary.size, f"{run.out} has another "
         f"vocabulary ({vocabulary.size:,} tokens, {len(teacher.head):,} rows of embeddings) than "
         f"the student ({corpus.vocabulary.size:,} tokens): expected the very same one.")
    need(all(weight.isfinite().all() for weight in teacher.parameters()), f"{run.out}: its weights "
         "are not all finite numbers: train it again, perhaps with a lower --lr.")

def need_free(run: Run, unless: bool) -> None:
    """Error: a run was interrupted, and --resume or --overwrite does not say what to do with it."""
    need(unless or not (run.out / "state.pt").exists(), f"{run.out} holds an interrupted run: add "
         "--resume to go on with it, or --overwrite to begin again.")

def lay_out(out: Path, folders: list[Path], settings: Settings, described: list[Settings],
            corpus: Corpus) -> list[Run]:
    """A command's runs: the teachers, in these folders or as they are described, and the student.

    Error: a teacher that cannot teach it, two models in one folder."""
    runs = [Run("", folder) for folder in folders]
    runs += [Run("", teacher_folder(own, corpus, out.parent), own) for own in described]
    for i, run in enumerate(runs, 1):
        run.name = f"teacher {i}" if len(runs) > 1 else "teacher"
        if run.finished:
            check_teacher(run, corpus)
    runs.append(Run("student" if runs else "model", out, settings, tuple(runs)))
    need(len({run.out.resolve() for run in runs}) == len(runs), "two models would lie in one "
         "folder: expected teachers of different settings, and --out to be neither.")
    return runs

def check_run(run: Run, context: int, trained_here: bool) -> int:
    """The positions that a run's model takes. Error: they, or the rows of its batch, do not do."""
    positions, (_, size) = run.shape.positions, rank_and_size()
    need(context <= positions, f"{run.name}: --context {context} is longer than what it takes, "
         f"{positions}.")
    rows = run.settings.batch_size if trained_here else size
    need(rows % size == 0, f"{run.name}: {size} processes cannot share --batch-size {rows} evenly: "
         "take another number of either.")
    return positions

def describe_loss(settings: Settings) -> str:
    """The loss as it is weighed in effect."""
    ce, kl = loss_weights(settings)
    if settings.objective not in DIVERGENCES:
        return settings.objective
    tau, name = settings.temperature, settings.objective
    mixed = f", beta {settings.beta:g}" * (settings.beta < 1 or settings.progressive)
    return f"loss {ce:g} ce + {kl * tau**2:g} {name} at temperature {tau:g}{mixed}" + \
        " falling" * settings.progressive

def idle_flags(settings: Settings, flags: dict) -> list[str]:
    """The flags given that have no part in the objective."""
    constants = {name for _, name in DIVERGENCES.values() if name}
    own = {DIVERGENCES.get(settings.objective, (None, None))[1]}
    if settings.beta == 1 and not settings.progressive:
        constants.add("mixing")
    if settings.objective not in DIVERGENCES:
        constants |= {"temperature", "alpha", "beta", "progressive", "mixing", "reduction"}
    return ["--" + name.replace("_", "-") for name in sorted(constants - own)
            if flags[name] is not None]

def memory_of_a_run(run: Run, V: int, device: str) -> int:
    """Bytes, roughly, at the peak of training: 4 for weight, gradient and each of two moments; the
    teachers' weights; what the backward pass needs of each token; the loss's chunks."""
    settings, dtype = run.settings, step_dtype(run.settings, device)
    size = PRECISIONS.get(settings.teacher_precision, dtype).itemsize
    tokens = (settings.micro_batch or settings.batch_size) * settings.context
    inner = settings.inner * (4 if settings.model_type == "llama" else 3)
    weights = 16 * count_parameters(empty_model(settings, V)) + 4 * V * settings.width
    weights += sum(size * count_parameters(empty_model(each.shape, V)) + 4 * V * each.shape.width
                   for each in run.coaches)
    chunks = min(settings.chunk, tokens) * V * (4 + 2 * dtype.itemsize)
    kept = settings.layers * (13 * settings.width + inner) * dtype.itemsize
    if settings.activation_checkpointing:       # all inputs, one block whole with its gradients
        kept = 2 * kept // settings.layers + settings.layers * settings.width * dtype.itemsize
    return int(1.15 * (weights + tokens * kept + chunks + 3 * 10**8))     # with gaps, and torch

def describe_plan(run: Run, corpus: Corpus, device: str) -> str:
    """What will be trained: size, loss, steps, tokens and memory."""
    settings, (steps, per_epoch) = run.settings, count_steps(len(corpus.train), run.settings)
    V = corpus.vocabulary.size
    size = count_parameters(empty_model(settings, V))
    return (f"{run.name:<9} {run.out}: {settings.model_type}, {size:,} parameters, "
            f"{describe_loss(settings)}, {steps:,} steps of "
            f"{settings.batch_size * settings.context:,} tokens, {steps / per_epoch:.1f} epochs; "
            f"about {memory_of_a_run(run, V, device) / 1e9:.1f} GB")

def describe_cost(run: Run, steps: int, seconds: float, device: str) -> str:
    """What training a run has cost: time, speed, memory."""
    tokens = run.settings.batch_size * run.settings.context
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource and 1024 ** (
        sys.platform != "darwin") * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (f"{run.name}: {steps:,} steps in {clock(seconds)}, "
            f"{steps * tokens / seconds:,.0f} tokens/s"
            + f", {(peak or 0) / 1e9:.2f} GB at the peak" * bool(peak))

def print_results(runs: list[Run], corpus: Corpus, pairs: list[Pair], device: str) -> None:
    """Print what the models have learnt, side by side, and where they lie."""
    results, losses = {}, []
    for run in runs:
        model, _ = load_model(run.out, device)
        results[run.name], scores = evaluate(model, corpus.vocabulary, pairs,
                                             f"scoring the {run.name}")
        if run.settings:
            keep_scores(run.out, "blimp", pairs, scores)
        losses.append(held_out_loss(model, corpus.dev, runs[-1].settings))
    click.echo(pairs_table(results, paradigms=False) + "\n")
    for run, loss in zip(runs, losses):
        shown = "" if loss is None else f", held-out loss {loss:.4f} nats a token"
        click.echo(f"{run.name:<9} {run.out}{shown}")

def products_error() -> float:
    """The largest relative error of the three kinds of product in a layer, against float64."""
    draw = torch.Generator().manual_seed(0)
    x, w, d = (torch.randn(shape, generator=draw) for shape in ((96, 512), (640, 512), (96, 640)))
    pairs = ((x, w.T), (d, w), (d.T, x))
    exact = [a.double() @ b.double() for a, b in pairs]
    return max(((a @ b - c).norm() / c.norm()).item() for (a, b), c in zip(pairs, exact))

def choose_device(name: str) -> str:
    """cpu or cuda, set up for speed that costs no digit. Error: cuda where there is none.

    On AMD's processors MKL, torch's choice, multiplies fp32 at half the speed of oneDNN. The way to
    oneDNN is to allow it bf16, of which it makes use only where there are tiles for it (AMX): that
    is measured, and taken back. Numbers under 1e-38 take a hundred times as long, and become 0."""
    there = torch.cuda.is_available()
    need(name != "cuda" or there, "--device cuda: this machine, or this build of torch, has none: "
         "use --device cpu.")
    torch.set_flush_denormal(True)
    cpu = Path("/proc/cpuinfo")
    maker = cpu.read_text() if cpu.exists() else platform.processor()
    if "AuthenticAMD" in maker:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        if products_error() > 1e-6:
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    return name if name != "auto" else "cuda" if there else "cpu"

class Cli(click.Group):
    """The commands. What any of them may meet, a file that cannot be read or written and memory
    that runs out, is one sentence."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except OSError as error:
            need(isinstance(error, BrokenPipeError), f"{error.filename or 'A file'}: "
                 f"{error.strerror}. Check the path, the permissions and the room on the disk.")
            raise
        except (MemoryError, RuntimeError) as error:
            need(not isinstance(error, (MemoryError, torch.OutOfMemoryError))
                 and "DefaultCPUAllocator" not in str(error), "out of memory: in training, add "
                 "--activation-checkpointing (and --resume), then give a smaller --micro-batch "
                 "(rows at once; 0 is all) or --chunk; else take a smaller model or sample.")
            raise

@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"],
                                        "max_content_width": 100})
def cli() -> None:
    """Train a small language model, distil it from teachers, and score its grammar."""

def join_processes(device: str) -> None:
    """Join the processes that torchrun started, if it did: together they train one model."""
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        if device == "cuda":
            number, have = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            need(number < have, f"this is process {number + 1} of this machine, which has {have} "
                 "GPUs: expected one each. Lower torchrun's --nproc-per-node.")
            torch.cuda.set_device(number)
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=1))
        click.get_current_context().call_on_close(dist.destroy_process_group)

@cli.command("train")
@click.option("-c", "--config", type=click.Path(path_type=Path), default=HOME / "configs/tiny.toml",
              show_default="configs/tiny.toml", help="TOML file of settings.")
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="The run's folder; its teachers lie beside it.  [default: in runs/, a name made "
                   "of config, objective, teachers and seed]")
@click.option("--teacher", "folders", type=click.Path(path_type=Path), multiple=True,
              help="A trained teacher, any Hugging Face folder of a LLaMA or GPT-2, in place of "
                   "the config's; twice for two.")
@click.option("--resume", is_flag=True, help="Go on with interrupted runs from their checkpoints.")
@click.option("--overwrite", is_flag=True, help="Replace a run; the old one is gone at once.")
@click.option("--dry-run", is_flag=True, help="Only say what would be trained; encodes the text.")
@settings_flags
def train_command(config: Path, out: Path | None, folders: tuple[Path, ...], resume: bool,
                  overwrite: bool, dry_run: bool, **flags) -> None:
    """Train a model on text: alone, or as the student of one or two teachers.

    A teacher that the config describes is trained first, unless its folder holds it already.

    \b
    Example: python choobaca.py train --objective rkl --teachers 1"""
    settings, described = read_settings(config, flags, list(folders))
    device, pairs = choose_device(settings.device), Path(settings.pairs or default_pairs())
    for flag in idle_flags(settings, flags):
        say(f"{flag} has no part in --objective {settings.objective}.")
    name = f"{config.stem}-{settings.objective}-{settings.teachers}-seed{settings.seed}"
    out = out or Path("runs", name)
    own = re.compile(r"log\.jsonl|.*\.partial")     # all there is of a run that was killed early
    need(not out.exists() or (out / "run.json").exists()
         or all(own.fullmatch(path.name) for path in out.iterdir()),
         f"{out} already holds files that are no run: choose another --out.")
    need(overwrite or resume or dry_run or not (out / "model.safetensors").exists(), f"{out} "
         "already holds a run: choose another --out, or add --overwrite to replace it.")
    pairs = read_pairs(pairs, settings.sample)
    join_processes(device)
    with first_process_first():
        corpus = read_corpus(settings, out.parent)
    runs = lay_out(out, list(folders), settings, described, corpus)
    todo = [run for run in runs if not run.finished or overwrite and run is runs[-1]]
    for run in runs:
        encode_pairs(corpus.vocabulary, pairs, check_run(run, settings.context, run in todo))
        need_free(run, resume or overwrite or dry_run or run not in todo)
    if resume and runs[-1] not in todo:
        need_same_as_shown(runs[-1], corpus, device)
    say("\n".join([
        f"text      {settings.text}: {len(corpus.train):,} tokens, {len(corpus.dev):,} held out, "
        f"vocabulary {corpus.vocabulary.size:,}",
        *(describe_plan(run, corpus, device) if run in todo else
          f"{run.name:<9} {run.out}: there already, used as it is" for run in runs)]),
        err=not dry_run)
    for run in todo if not dry_run else []:
        if run.teachers and settings.objective == "seqkd":
            with first_process_first():
                corpus = sampled_corpus(runs[0], corpus, settings, out.parent, device)
        with locked(run.out):
            need_free(run, resume or overwrite)
            done = run.finished and not (overwrite and run is runs[-1])
            if first_says(done, device):                # by another command, meanwhile
                continue
            steps, seconds = fit(run, corpus, device, resume)
        say(describe_cost(run, steps, seconds, device))
    if not dry_run and rank_and_size()[0] == 0:
        print_results(runs, corpus, pairs, device)

@cli.command("eval-blimp")
@click.option("-m", "--model", "folder", type=click.Path(path_type=Path),
              help="A run, or any Hugging Face folder of a LLaMA or GPT-2.  [default: the newest "
                   "finished run in runs/]")
@click.option("-d", "--data", type=click.Path(path_type=Path),
              help="Folder of minimal pairs, *.jsonl as BLiMP's or EWoK's; for all suites, the "
                   "folder that has one for each.  [default: in data/ by the suite's name; for "
                   "BLiMP else data/tiny/blimp]")
@click.option("--suite", type=click.Choice((*SUITES, "all")), default="blimp", show_default=True,
              help="Which minimal pairs.")
@click.option("--filtered", is_flag=True, help="Of BLiMP, the 59,875 pairs that BabyLM scores.")
@click.option("--ewok-contexts", "contexts", is_flag=True,
              help="Of EWoK, one target in two contexts, as its authors do; else BabyLM's rule.")
@click.option("--sample", type=click.IntRange(0), default=0,
              help="Score about this many pairs of each suite, a seeded draw, one at least of each "
                   "paradigm; 0: all.")
@click.option("--paper", is_flag=True, help="Show what the paper's models have beside it.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
              show_default=True, help="Where to compute.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object in place of the table.")
def eval_blimp_command(folder: Path | None, data: Path | None, suite: str, filtered: bool,
                       contexts: bool, sample: int, paper: bool, device: str,
                       as_json: bool) -> None:
    """Score a model on minimal pairs: how often is the good sentence the likelier one?

    The scores of single pairs are kept in the model's folder, for `compare`.

    \b
    Example: python choobaca.py eval-blimp --model runs/tiny-rkl-1-seed0"""
    if folder is None:
        finished = list(Path("runs").glob("*/model.safetensors"))
        need(finished, "no finished run in runs/: name a model with --model, or run train first.")
        folder = max(finished, key=lambda path: path.stat().st_mtime_ns).parent
    several = suite == "all"
    folders = {name: data / name if data and several else data or default_pairs(name)
               for name in (SUITES if several else [suite])}
    need(not data or data.is_dir(), f"{data} is not a folder: expected one of minimal pairs."
         + how_to_get(data or HOME))
    for name in [name for name in folders if several and not any(folders[name].glob("*.jsonl"))]:
        click.echo(f"{folders.pop(name)} holds no *.jsonl: {name} is left out.", err=True)
    need(folders, f"{data} holds none of {', '.join(SUITES)}: expected folders of minimal pairs.")
    pairs = {name: read_pairs(folders[name], sample, filtered and name == "blimp", contexts)
             for name in folders}
    paradigms = {pair.paradigm for pair in pairs.get("blimp", ())}
    if (paper or filtered) and len(paradigms) != 67:
        click.echo(f"--paper and --filtered are about BLiMP's 67 paradigms: these are "
                   f"{len(paradigms)}, of other pairs.", err=True)
    model, vocabulary = load_model(folder, choose_device(device))
    results, tables = {}, []
    for name in folders:
        given = pairs[name][0].good[0]
        tie = 0.5 if contexts and given else 1.0                # as EWoK's authors have it
        shown = str(folders[name]).removeprefix(f"{HOME}/")
        result, scores = evaluate(model, vocabulary, pairs[name], f"scoring {name}", tie)
        published = read_published(name) if paper else {}
        results[name] = {"model": str(folder), "data": shown, "suite": name, **result,
                         "prefix_token": None if given else
                         vocabulary.tokenizer.id_to_token(vocabulary.prefix_id)}
        table = pairs_table({"accuracy": result}, not several and not paper, published)
        tables.append(f"{folder} on {shown}\n\n{table}")
        try:
            keep_scores(folder, name, pairs[name], scores, tie)
        except OSError as error:
            click.echo(f"The scores of single pairs are not kept: {error.filename}: "
                       f"{error.strerror}.", err=True)
    if as_json:
        both = {"model": str(folder), "suites": results}
        return click.echo(json.dumps(both if several else results[suite], indent=2))
    click.echo("\n\n".join(tables) + "\nThe paper's rows and means come from different runs: no "
               "mean of its BLiMP rows gives the one it prints." * paper)

@cli.command("compare")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("others", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--suite", type=click.Choice(SUITES), default="blimp", show_default=True,
              help="By which scores.")
@click.option("--resamples", type=click.IntRange(100, 10**6), default=10_000, show_default=True,
              help="Draws for an interval.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list in place of the tables.")
def compare_command(first: Path, others: tuple[Path, ...], suite: str, resamples: int, seed: int,
                    as_json: bool) -> None:
    """Say whether other models are better than the first on the pairs that eval-blimp scored.

    \b
    Example: python choobaca.py compare runs/tiny-ce-0-seed0 runs/tiny-rkl-1-seed0"""
    name, found, tables = common_scores([first, *others], suite), [], []
    base = read_scores(first / name)
    for folder in others:
        judged = read_scores(folder / name)
        need(judged.names == base.names, f"{folder / name} and {first / name} name other pairs: "
             "one of them is damaged: score the models again with eval-blimp.")
        rows = compare_scores(base, judged, resamples, seed)
        found.append({"first": str(first), "other": str(folder), "scores": name, "rows": rows})
        lines = [f"{folder} against {first}\n", f"{'accuracy in %':<27} {'n':>6}  first  other  "
                 "difference, 95 % interval    McNemar's p  verdict"]
        lines += [f"{row['phenomenon']:<27} {row['n']:>6,} {100 * row['first']:6.1f} "
                  f"{100 * row['other']:6.1f} {100 * row['difference']:+6.2f} ("
                  f"{100 * row['low']:+7.2f} to {100 * row['high']:+7.2f}) {row['p']:14.2g}  "
                  f"{row['verdict']}" for row in rows]
        tables.append("\n".join(lines))
    rule = ("Better or worse: the 95 % interval, of paradigms and pairs drawn anew, leaves 0 out,\n"
            "and McNemar's p is under 0.05. Where there is no difference, up to one row in twenty "
            "says there is.")
    click.echo(json.dumps(found, indent=2) if as_json else "\n\n".join([*tables, rule]))

@cli.command("configs")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object in place of the table.")
def configs_command(as_json: bool) -> None:
    """List the settings files that come along: what each is, in its own first words.

    \b
    Example: python choobaca.py configs"""
    found = {str(path.relative_to(HOME)): path.read_text().split("\n")[0].removeprefix("# ")
             for path in sorted((HOME / "configs").glob("*.toml"))}
    table = "\n".join(f"{name:<26} {words}" for name, words in found.items())
    click.echo(json.dumps(found, indent=2) if as_json else table)

# -----------------------------------------------------------------------------
# 11. Commands beside it
#
# what nothing above needs: an address -> data; runs -> a page; the loss -> seconds and bytes;
# a divergence -> what it does to a distribution on a line; a run -> text

PIECE, ROOM = 2**16, 4 * 10**9      # bytes: held at once, and unpacked at most from an archive

def receive(url: str, path: Path) -> None:
    """Load what lies at an address into a file, after what it holds of it if the server can do so.

    Error: it does not answer in 30 seconds, refuses, or sends less than it said it would."""
    request = urllib.request.Request(url, headers={"User-Agent": "choobaca"})
    if path.exists():
        request.add_header("Range", f"bytes={path.stat().st_size}-")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply, \
                open(path, "ab" if reply.status == 206 else "wb") as file:
            have, size = file.tell(), reply.length
            total = size if size is None else have + size
            with tqdm(desc=url.split("/")[2], initial=have, total=total, unit="B",
                      unit_scale=True, leave=False) as bar:
                while piece := reply.read(PIECE):
                    bar.update(file.write(piece))
            if total not in (None, file.tell()):
                raise ConnectionError(f"it broke off after {file.tell():,} of {total:,} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "code", 0) == 416:                # there is no more of it than we have
            path.unlink()
        reason = " ".join(str(error).strip("<>").split())
        raise click.ClickException(f"{url} is not loaded: {reason}. Run this again to go on, or "
                                   f"put the file there by hand: {path.with_suffix('')}.")

def fetch(source: Source, path: Path) -> None:
    """Load an archive, or what an earlier call left to be loaded; one put there by hand is taken.

    Error: those of `receive`, after which a next call goes on; another digest than the source's."""
    partial = path.with_name(path.name + ".partial")
    if not path.exists():
        receive(source.url, partial)
    file, kind = path if path.exists() else partial, "sha256" if source.digest[32:] else "md5"
    if source.digest and file_digest(file, kind) != source.digest:
        partial.unlink(missing_ok=True)
        raise click.ClickException(f"{file} of {source.url} has another {kind} than expected, "
                                   f"{source.digest}. What was loaded is removed: run this again, "
                                   f"with the right file or none as {path}.")
    file.replace(path)

def unpack(path: Path, members: dict[str, str], folder: Path) -> None:
    """Write what is wanted of a zip file into a folder, under the names of the patterns' groups,
    which lead nowhere else. Error: damaged, more than ROOM bytes, nothing for a pattern."""
    try:
        with zipfile.ZipFile(path) as archive:
            wanted = {Path(below, match[1]): (below, info)
                      for info in archive.infolist() for below, pattern in members.items()
                      if (match := re.fullmatch("(?:.*/)?" + pattern, info.filename))}
            need({below for below, _ in wanted.values()} == set(members)
                 and sum(info.file_size for _, info in wanted.values()) <= ROOM,
                 f"{path}: expected {', '.join(members.values())}, of {ROOM:,} bytes at most. "
                 "Delete it and run this again.")
            for name, (_, info) in wanted.items():
                with archive.open(info) as member, written_whole(folder / name) as file:
                    file.writelines(iter(lambda: member.read(PIECE), b""))
    except click.ClickException:
        raise
    except Exception as error:                      # a damaged archive raises a dozen kinds
        raise click.ClickException(f"{path} cannot be unpacked: {str(error) or 'it is cut off'}. "
                                   "Make room if the disk is full, else delete it, and run this "
                                   "again.")

@cli.command("download")
@click.argument("name", type=click.Choice(list(SOURCES)))
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="The folder to make.  [default: data/NAME]")
def download_command(name: str, out: Path | None) -> None:
    """Fetch the text or the minimal pairs of that name from where they are published.

    Interrupted, it goes on from there when it is run again. What is loaded and unpacked lies in a
    folder beside, *.partial, until all is there.

    \b
    Example: python choobaca.py download babylm-2024"""
    out = Path(os.path.realpath(out or HOME / "data" / name))
    if out.is_file() or any(out.glob("*")):
        return click.echo(f"{out} is there already: nothing to do. To load it anew, remove it.")
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    archives = {work / f"{i}.zip": source for i, source in enumerate(SOURCES[name], 1)}
    for path, source in archives.items():
        fetch(source, path)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for path, source in archives.items():
            unpack(path, source.members, Path(folder, name))
        Path(folder, name).replace(out)
    shutil.rmtree(work)
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    click.echo(f"{out}: {len(sizes)} files, {sum(sizes):,} bytes")

COLOURS = (         # of eight curves, on light and on dark: apart for colour-blind eyes, too
    ("#373bb3", "#ed7a0b", "#00a570", "#882a6f", "#755d1c", "#7c85ff", "#1d2228", "#a591ba"),
    ("#7f7cff", "#e0621c", "#2ee69a", "#b2659c", "#fdcc3c", "#a7d3ff", "#fffdf4", "#838c6a"))
STYLE = """:root { color-scheme: light dark } body, svg { font: 13px/1.4 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem } main { columns: 26rem 2; gap: 2rem }
h1 { font-size: 20px } table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: 6px 12px 6px 0; text-align: left; vertical-align: top; min-width: 2rem;
border-bottom: 1px solid #8886 } small, th { opacity: 0.7 } td:nth-child(1) { min-width: 10rem }
td:last-child { white-space: nowrap }
figure { margin: 0 0 1.5rem; break-inside: avoid } figure svg { max-width: 100%%; height: auto }
text { fill: currentColor; font-size: 12px } .soft { opacity: 0.7 } .end { text-anchor: end }
.middle { text-anchor: middle } .title { font-size: 15px; font-weight: 600 }
path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round }
.axis, .chance { stroke: #8886; stroke-width: 1 } .chance { stroke: #888; stroke-dasharray: 4 3 }
circle { fill: currentColor } %s @media (prefers-color-scheme: dark) { %s }""" % tuple(
    "\n".join(f".run{i} {{ color: {colour} }}" for i, colour in enumerate(colours))
    for colours in COLOURS)
CURVES = {          # the numbers of a log that a report draws
    "ce": "Cross-entropy on training text", "dev_loss": "Held-out loss",
    "kl": "Divergence from the teachers, × τ²", "loss": "Loss, by each run's own objective",
    "lr": "Learning rate", "beta": "Beta, the teachers' share of the mixed logits"}

def ticks(low: float, high: float) -> list[float]:
    """The round numbers from low to high, six or fewer: multiples of 1, 2 or 5 times a power of
    ten. low < high."""
    size = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(size * k for k in (1, 2, 5, 10, 20) if size * k * 5 >= high - low)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

def text_at(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(words)}</text>'

def drawing(title: str, names: list[str], width: int, height: int, parts: list[str]) -> str:
    """An SVG: the title, a legend of the names in their colours, and below them the parts, which
    are `height` high. Its looks are in STYLE."""
    names = [name if len(name) < 25 else f"{name[:9]}…{name[-14:]}" for name in names]
    room, legend = 30 + 7 * max(map(len, names)), [text_at(0, 15, title, "title")]
    for i, name in enumerate(names):
        y, x = divmod(i, width // room)
        legend += [f'<circle class="run{i % 8}" cx="{x * room + 5}" cy="{34 + 18 * y}" r="4"/>',
                   text_at(x * room + 14, 38 + 18 * y, name)]
    top = 52 + 18 * y
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + height}" '
            f'viewBox="0 0 {width} {top + height}">{"".join(legend)}'
            f'<g transform="translate(0 {top})">{"".join(parts)}</g></svg>')

def line_chart(series: dict[str, list[tuple[float, float]]], title: str, x_label: str,
               width: int = 460) -> str:
    """An SVG of curves through points (x, y), some of which may have none, but not all."""
    ranges = []
    for values in zip(*itertools.chain(*series.values())):
        low, high = min(values), max(values)
        flat = high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-30
        margin = flat * (0.1 * abs(low) or 1)
        ranges.append((low - margin, high + margin))
    (x0, x1), (y0, y1) = ranges

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + (width - 80) * (x - x0) / (x1 - x0), 166 - 160 * (y - y0) / (y1 - y0)

    parts = [f'<path class="axis" d="M60,166h{width - 80}"/>',
             text_at(width - 20, 202, x_label, "soft end")]
    parts += [text_at(place(x, y0)[0], 184, f"{x:,.6g}", "soft middle") for x in ticks(x0, x1)]
    for y in ticks(y0, y1):
        parts += ['<path class="axis" d="M%.1f,%.1fh%d"/>' % (*place(x0, y), width - 80),
                  text_at(54, place(x0, y)[1] + 4, f"{y:,.6g}", "soft end")]
    for i, points in enumerate(series.values()):
        path = " ".join("%.1f,%.1f" % place(*point) for point in points)
        parts += [f'<path class="run{i % 8}" d="M{path}"/>'] * bool(points)
    return drawing(title, list(series), width, 210, parts)

def dot_chart(rows: dict[str, list[tuple[float, float]]], names: list[str], title: str) -> str:
    """An SVG of percentages and their standard errors: a row for each label, in it a dot for each
    name, and a dashed line at the 50 % of chance."""
    least = min(value - error for row in rows.values() for value, error in row)
    low, step, parts = max(0, min(40, 10 * int(least / 10))), 12 + 9 * len(names), []
    bottom = step * len(rows)

    def across(percent: float) -> float:
        return 180 + 260 * (percent - low) / (100 - low)

    for percent in range(low, 101, 10):
        kind = "chance" if percent == 50 else "axis"
        parts += [f'<path class="{kind}" d="M{across(percent):.1f},0V{bottom}"/>',
                  text_at(across(percent), bottom + 18, str(percent), "soft middle")]
    for k, (words, row) in enumerate(rows.items()):
        parts.append(text_at(170, step * (k + 0.5) + 4, words[:26], "end"))
        for i, (value, error) in enumerate(row):
            y, begin, end = step * k + 10.5 + 9 * i, across(value - error), across(value + error)
            parts.append(f'<g class="run{i}"><path d="M{begin:.1f},{y}H{end:.1f}"/>'
                         f'<circle cx="{across(value):.1f}" cy="{y}" r="3.2"/></g>')
    return drawing(title, names, 460, bottom + 26, parts)

def sheet(charts: list[str], columns: int) -> str:
    """One SVG, 1,000 pixels wide, of others in rows from left to right."""
    parts, top = [], 10
    for i in range(0, len(charts), columns):
        row = charts[i:i + columns]
        parts += [f'<g transform="translate({10 + 990 * j // columns} {top})">{chart}</g>'
                  for j, chart in enumerate(row)]
        top += 16 + max(int(re.search(r' height="(\d+)"', chart)[1]) for chart in row)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="{top}">'
            f'<style>{STYLE}</style>{"".join(parts)}</svg>\n')

def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log.jsonl. A killed run's last line may be cut: it is passed over. Error:
    another line is no object of numbers with a step, or none is there."""
    rows, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_int=float).items()
            row = {key: float(value) for key, value in row if value is not None}
            sound = 0 < row["step"] < 2**53
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            sound = False
        need(sound or 1 < number == len(lines), f"{path}, line {number} is damaged: expected a "
             "JSON object of numbers, with a step. Leave the run out.")
        rows += [row] * sound
    need(rows, f"{path} is empty: expected a line for each step. Leave the run out.")
    return rows

def curve(log: list[dict], key: str) -> list[tuple[float, float]]:
    """What a log says under a key: (step, value) of each line that has a finite number there."""
    return [(row["step"], row[key]) for row in log if abs(row.get(key, math.inf)) < 1e30]

def read_run(folder: Path) -> tuple[dict[str, str], list[dict]]:
    """A run's cells in the report's table, by heading, and its log; of any other model's folder the
    parameters alone, and no log. Error: a file that is missing or damaged."""
    log, path, cells = folder / "log.jsonl", folder / "run.json", {}
    if not path.exists() or (folder / "config.json").exists():
        model = empty_model(*from_hf_config(folder / "config.json"))
        cells["parameters"] = f"{count_parameters(model):,}"
    if not log.exists() and not path.exists():
        return cells, []
    log, facts = read_log(log), read_json(path)
    raw, teachers = facts.get("settings"), facts.get("teachers")
    need(isinstance(raw, dict) and isinstance(teachers, list),
         f"{path} is damaged: expected settings and a list of teachers. Leave the run out.")
    settings = SimpleNamespace(**{name: checked(field, raw.get(name, field.default), f"{path}: "
                                                f"{name}") for name, field in KNOWN.items()})
    constant = DIVERGENCES.get(settings.objective, (None, None))[1]
    cells["objective"] = describe_loss(settings).removeprefix("loss ") + (
        f", {constant} {getattr(settings, constant):g}" if constant else "")
    cells["teachers"] = ", ".join(Path(str(teacher)).name for teacher in teachers) or "none"
    cells["steps"] = f"{log[-1]['step']:,.0f}" + ", unfinished" * (
        not (folder / "model.safetensors").exists())
    for key in ("loss", "ce", "kl", "dev_loss", "tokens_per_second"):
        values = [value for _, value in curve(log, key)[-1 if key == "dev_loss" else -20:]]
        if values:
            cells[key] = f"{np.mean(values):,.{0 if key == 'tokens_per_second' else 3}f}"
    return cells, log

def curves(logs: list[list[dict]], names: list[str]) -> list[str]:
    """A chart of each quantity that a log has twice or more.

    A curve has up to 100 points, the means of stretches of it, which smooths lightly. Of a loss the
    first eighth is left out: it begins so high that nothing else could be told apart."""
    charts = []
    for key, title in CURVES.items():
        series = {}
        for name, points in zip(names, (curve(log, key) for log in logs)):
            points = points if key in ("lr", "beta") else points[len(points) // 8:]
            parts = np.array_split(np.array(points), min(100, len(points))) if points else []
            series[name] = [tuple(part.mean(0)) for part in parts]
        if max(map(len, series.values())) > 1:
            charts.append(line_chart(series, title, "steps"))
    return charts

def accuracies(paths: list[Path]) -> dict[str, list[tuple[float, float]]]:
    """From models' scores of the same pairs, in percent: for the mean and for each phenomenon, each
    model's accuracy and its standard error. Error: they are not of the same pairs."""
    judged = [read_scores(path) for path in paths]
    need(all(each.names == judged[0].names for each in judged), f"{', '.join(map(str, paths))} "
         "name other pairs: one of them is damaged: score the models again with eval-blimp.")
    pairs = [Pair(("", ""), ("", ""), paradigm, term, "") for term, paradigm, _ in judged[0].names]
    results = [summarise(pairs, np.stack([each.right, 1 - each.right], 1), 0.5) for each in judged]
    rows = {f"mean of {len(results[0]['paradigms'])} paradigms": results} | {
        term.replace("_", " "): [result["phenomena"][term] for result in results]
        for term in results[0]["phenomena"]}
    return {words: [(100 * each["accuracy"], 100 * each["stderr"]) for each in row]
            for words, row in rows.items()}

def report_page(names: list[str], table: list[dict[str, str]], figures: list[str]) -> str:
    """The report, whole: HTML that needs no other file."""
    heads = list(dict.fromkeys(itertools.chain(*sorted(table, key=len, reverse=True))))
    rows = ["<th>".join(["", *heads]).replace("_", " ")]
    for i, (name, row) in enumerate(zip(names, table)):
        cells = [html.escape(row.get(head, "")) for head in heads[1:]]
        rows.append("<td>".join(["", f'<span class="run{i}">●</span> <b>{html.escape(name)}</b>'
                                 f"<br><small>{html.escape(row['run'])}</small>", *cells]))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>ChooBaCa</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style>
<h1>{html.escape(", ".join(names))}</h1><table><tr>{"<tr>".join(rows)}</table>
<p>Losses are in nats a token; loss, ce (cross-entropy) and kl (τ² × divergence) are means of the
last 20 steps. Each objective has a loss of its own: compare ce, or dev loss, which is held out.
Curves of losses begin after an eighth of the steps. ± is one standard error, dashed is chance;
whether a difference is more than luck, choobaca.py compare says.</p>
<main><figure>{"</figure><figure>".join(figures)}</figure></main></html>
"""

@cli.command("report")
@click.argument("folders", metavar="RUN [RUN ...]", type=click.Path(path_type=Path), nargs=-1,
                required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path),
              help="The page to write, *.html, or *.svg with the figures alone.  [default: "
                   "report.html in the first run's folder]")
def report_command(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write a page on up to eight runs: what they are, their curves and their grammar.

    It is one HTML file that needs no other. Accuracies are of pairs that train or eval-blimp has
    scored for all of the runs.

    \b
    Example: python choobaca.py report runs/tiny-ce-0-seed0 runs/tiny-rkl-1-seed0"""
    out, places = out or folders[0] / "report.html", {folder.resolve() for folder in folders}
    need(len(places) == len(folders) <= 8 and out.suffix in (".html", ".svg"),
         f"{len(folders)} runs, --out {out}: expected 1 to 8 different ones, and a name in .html "
         "or .svg.")
    found, figures = [read_run(folder) for folder in folders], []
    table = [{"run": str(folder), **cells} for folder, (cells, _) in zip(folders, found)]
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [*map(str, folders)]
    for suite in SUITES:
        try:
            scores = common_scores(list(folders), suite)
        except click.ClickException as error:
            figures += [f"<p>{html.escape(error.message)}</p>"] * (suite == "blimp")
            continue
        rows = accuracies([folder / scores for folder in folders])
        figures.append(dot_chart(rows, names, f"Accuracy on {suite}, %"))
        for row, (accuracy, error) in zip(table, next(iter(rows.values()))):
            row[f"{suite}, %"] = f"{accuracy:.1f} ± {error:.1f}"
    figures += curves([log for _, log in found], names)
    page = report_page(names, table, figures) if out.suffix == ".html" else \
        sheet([figure for figure in figures if figure.startswith("<svg")], 2)
    with written_whole(out) as file:
        file.write(page.encode(errors="replace"))
    click.echo(out)

def measure(step, leaves: tuple[Tensor, ...]) -> tuple[float, int | None]:
    """Seconds of a step, by the clock or CUDA's events, and the bytes that it holds at its peak
    beyond inputs and gradients: of use in a process where little ran before, on Linux or CUDA."""
    gradients, status = sum(leaf.nbytes for leaf in leaves), Path("/proc/self/status")
    for leaf in leaves:
        leaf.grad = None
    if leaves[0].is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin.record(), step(), end.record(), torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before - gradients
    linux = status.exists() and "VmHWM" in status.read_text()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")           # the peak is now what is held now
    before, begin = status.read_text() if linux else "", time.perf_counter()
    step()
    seconds, after = time.perf_counter() - begin, status.read_text() if linux else ""
    peaks = [1024 * int(kib) for kib in re.findall(r"VmHWM:\s*(\d+)", before + after)]
    return seconds, max(0, peaks[1] - peaks[0] - gradients) if linux else None

def contestants(objectives: tuple[str, ...], rows: int, width: int, teacher_width: int,
                vocab_size: int, chunk: int, dtype: str, device: str) -> dict:
    """What bench compares, by name: functions of nothing, forward and backward each.

    "products" is the four products of a loss and nothing else, in its chunks: no loss is faster.
    "plain" is cross-entropy and reverse KL as one writes them, all logits at once, by autograd."""
    torch.manual_seed(0)
    kind = dict(device=device, dtype=getattr(torch, dtype))
    hidden, t_hidden = (torch.randn(rows, C, **kind) for C in (width, teacher_width))
    head, t_head = (torch.randn(vocab_size, C, **kind).mul_(2 * C**-0.5)        # logits N(0, 2^2)
                    for C in (width, teacher_width))
    targets = torch.randint(vocab_size, (rows,), device=device)
    n = math.ceil(rows / math.ceil(rows / chunk))

    @torch.no_grad()
    def products() -> None:
        z, w = hidden.new_empty(2, n, vocab_size)
        head.grad, hidden.grad = torch.zeros_like(head), torch.empty_like(hidden)
        for some in (slice(i, i + n) for i in range(0, rows, n)):
            d_z = torch.mm(hidden[some], head.T, out=z[:len(hidden[some])])
            torch.mm(t_hidden[some], t_head.T, out=w[:len(hidden[some])])
            torch.mm(d_z, head, out=hidden.grad[some])
            head.grad.addmm_(d_z.T, hidden[some])

    def plain() -> None:
        z, w, tau = (hidden @ head.T).float(), (t_hidden @ t_head.T).float(), 2.0
        log_q, log_p = ((logits / tau).log_softmax(-1) for logits in (z, w))
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        (0.5 * F.cross_entropy(z, targets) + 0.5 * tau**2 * kl).backward()

    def fused(objective: str) -> None:
        settings = Settings(objective=objective, teachers=int(objective != "ce"))
        loss, _ = FusedLoss.apply(hidden, head, targets, t_hidden, t_head, settings, 1.0, chunk)
        (loss / rows).backward()

    steps = {"products": products, "plain": plain}
    steps |= {name: functools.partial(fused, name) for name in objectives}
    hidden.requires_grad_(), head.requires_grad_()
    return {name: functools.partial(measure, step, (hidden, head)) for name, step in steps.items()}

@cli.command("bench")
@click.option("--objective", "objectives", multiple=True, default=["rkl"], show_default=True,
              type=click.Choice(["ce", *DIVERGENCES]), help="What to compare; may be repeated.")
@click.option("--rows", default=4096, show_default=True, type=click.IntRange(1, 2**20), help="N.")
@click.option("--width", default=512, show_default=True, type=click.IntRange(1, 2**16), help="C.")
@click.option("--teacher-width", default=1024, show_default=True, type=click.IntRange(1, 2**16),
              help="C', of all teachers.")
@click.option("--vocab-size", default=16_000, show_default=True, type=click.IntRange(3, 2**20),
              help="V.")
@click.option("--chunk", default=KNOWN["chunk"].default, show_default=True,
              type=click.IntRange(1), help=KNOWN["chunk"].metadata["help"])
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32",
              show_default=True, help="Of hidden states and heads.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1),
              help="Rounds after a first one that does not count; all run once in each.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
              show_default=True, help="Where to compute.")
@click.option("--plain/--no-plain", default=True, help="Also the loss with all logits at once.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list in place of the table.")
@click.option("--weigh", hidden=True, help="Print the peak memory of this one alone, in bytes.")
def bench_command(repeats: int, plain: bool, as_json: bool, weigh: str | None, **sizes) -> None:
    """Time and weigh the loss, forward and backward, against its bare matrix products.

    \b
    Example: python choobaca.py bench --objective rkl --objective akl"""
    sizes["device"] = choose_device(sizes["device"])
    steps = contestants(**sizes)
    if weigh in steps:
        steps["products"]()             # the library's own work space is taken, and stays
        return click.echo(json.dumps(steps[weigh]()[1]))
    names = [name for name in steps if name != "plain" or plain]
    same = [f"--{key.replace('_', '-')}={value}" for key, value in sizes.items()
            if key != "objectives"] + [f"--objective={name}" for name in sizes["objectives"]]
    seconds, peaks = {name: [] for name in names}, {}
    with tqdm(total=(repeats + 2) * len(names), desc="bench", leave=False) as bar:
        for name in names * (repeats + 1):
            seconds[name].append(steps[name]()[0])
            bar.update()
        for name in names:
            alone = [sys.executable, __file__, "bench", *same, f"--weigh={name}"]
            done = subprocess.run(alone, stdout=subprocess.PIPE)
            need(done.returncode == 0, f"{name}, run alone, ended with code {done.returncode}: "
                 "expected 0. If memory ran out, lower --rows or add --no-plain.")
            peaks[name] = json.loads(done.stdout)
            bar.update()
    rows = [{"name": "fused" if name in sizes["objectives"] else name,
             "objective": name if name in sizes["objectives"] else "rkl",
             "seconds": float(np.median(times[1:])), "seconds_all": times[1:],
             "peak_bytes": peaks[name],
             "ratio": float(np.median(np.divide(times[1:], seconds["products"][1:])))}
            for name, times in seconds.items()]
    lines = [f"{'':<9} {'objective':<9} seconds, median (range)  x products  peak, MB"] + [
        f"{row['name']:<9} {row['objective']:<9} {row['seconds']:7.3f} "
        f"({min(row['seconds_all']):.3f} to {max(row['seconds_all']):.3f}) {row['ratio']:11.2f} "
        f"{(row['peak_bytes'] or 0) / 1e6:9,.0f}" for row in rows]
    click.echo(json.dumps(rows, indent=2) if as_json else "\n".join(lines))

def toy_teachers(x: Tensor) -> dict[str, Tensor]:
    """What `toy` fits: by name, a distribution over the points x, which go from 0 to 10: (V,) each.

    The AKL paper's text names kinds and gives no shapes: those here, 50 points and the student's
    first logits, uniform in 0 to 1, are from its authors' notebooks (github.com/wutaiqiang/
    LLM_KD_AKL, toy_examples), where x is ten times as long. The narrow modes are ours."""
    peaks = {"one mode": [(1, 5, 1.5)], "two modes": [(0.3, 2.5, 1), (0.5, 7.5, 1)],
             "two narrow modes": [(0.3, 2.5, 0.5), (0.5, 7.5, 0.5)], "long tail": [(1, 0, 1.6)]}
    return {name: sum(weight * (-((x - mean) / width)**2 / 2).exp() for weight, mean, width in some)
            .log().softmax(-1) for name, some in peaks.items()}

def fit_distribution(p: Tensor, objective: str, start: Tensor, to_logits, epochs: int,
                     optimizer: str) -> tuple[Tensor, Tensor]:
    """n students on their way to p (V,): their q before each of the epochs and at the end,
    (epochs + 1, n, V), and their last divergences (n, 1).

    A row of `start` has a student's parameters; to_logits makes logits of them, (n, V). Divergence
    and gradient are those of training, constants at their defaults, and drkl's observed token is
    the likeliest. Autograd has what lies between parameters and logits, if anything."""
    function, name = DIVERGENCES[objective]
    constant, target = name and getattr(LossSettings(), name), p.argmax().expand(len(start), 1)
    theta, path = start.clone().requires_grad_(), []
    kind, lr = {"adam": (torch.optim.Adam, 0.1), "sgd": (torch.optim.SGD, 1.0)}[optimizer]
    stepper = kind([theta], lr=lr)
    for _ in range(epochs + 1):
        z = to_logits(theta)
        q, w, r, *_ = to_probabilities(z.detach().clone(), p.log().repeat(len(z), 1),
                                       torch.empty_like(z))
        path.append(q)
        value, gradient = function(q, w, r, target, constant)
        stepper.zero_grad()
        z.backward(gradient)
        stepper.step()
    return torch.stack(path), value

def toy_results(objectives: tuple[str, ...], **how) -> dict[str, dict]:
    """What `toy --json` prints, by teacher: p and, by objective, what became of two students.

    A student with a logit for each point: the sum of |p - q| in the head, in the tail (AKL paper,
    Eqs. 12 to 14) and where p < 0.001, by epoch; the largest |p - q| and q at the end. One that is
    a Gaussian, of a mean and a width (held in 0.05 to 8,000): the best of ten, which start at means
    from 0.5 to 9.5 with a width of 1, for the objective has several minima."""
    x, results, mu = torch.arange(50, dtype=torch.float64) / 5, {}, LossSettings().mu
    start = torch.rand(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bells = torch.stack([torch.arange(0.5, 10, dtype=torch.float64), torch.zeros(10).double()], 1)

    def bell(theta: Tensor) -> Tensor:
        mean, log_width = theta.split(1, 1)
        return -((x - mean) / log_width.clamp(-3, 9).exp())**2 / 2

    for teacher, p in tqdm(toy_teachers(x).items(), "toy", leave=False):
        results[teacher] = {"p": p.tolist(), "objectives": {}}
        for objective in objectives:
            path, _ = fit_distribution(p, objective, start, lambda z: z, **how)
            q, gap = path[:, 0], (path[:, 0] - p).abs()
            head, both = head_share(q, p.expand_as(q), mu)[:, 0], gap.sum(-1)
            bent, value = fit_distribution(p, objective, bells, bell, **how)
            results[teacher]["objectives"][objective] = {
                "head": (head * both).tolist(), "tail": ((1 - head) * both).tolist(),
                "far": gap[:, p < 1e-3].sum(-1).tolist(),
                "largest": gap[-1].max().item(), "q": q[-1].tolist(),
                "gaussian_q": bent[-1, value.argmin()].tolist()}
    return results

def toy_figure(results: dict[str, dict]) -> str:
    """An SVG 1,000 pixels wide, a row for each teacher: the error in the head and in the far tail,
    where p < 0.001, in the first 50 epochs, and the distributions of the Gaussian students."""
    charts = []
    for teacher, result in results.items():
        for key, title, x_label, x in (("head", "head's error", "epochs", range(51)),
                                       ("far", "far tail's error", "epochs", range(51)),
                                       ("gaussian_q", "one Gaussian", "x", np.arange(50) / 5)):
            series = {name: [*zip(x, row[key])] for name, row in result["objectives"].items()}
            teachers = {"teacher": [*zip(x, result["p"])] if key == "gaussian_q" else []}
            charts.append(line_chart(teachers | series, f"{teacher}: {title}", x_label, 320))
    return sheet(charts, 3)

def toy_table(results: dict[str, dict], epochs: int) -> str:
    """A line for each student and its teacher; distributions as blocks, every other point."""
    shown = [epoch for epoch in (5, 20) if epoch <= epochs]
    after, parts = "".join(f"{epoch:>6}" for epoch in shown), ("head", "tail", "far")
    lines = [f"{'sum of |p - q| by epoch':<26}" + "  ".join(
        f"{name:>{len(after)}}" for name in ("head", "tail", "p < 0.001")) + "  largest at  one "
        "Gaussian,", f"{'teacher':<17}{'objective':<9}{after}  {after}  {after}"
        "     the end  the best of ten"]
    for teacher, result in results.items():
        rows = result["objectives"]
        top = max(map(max, [result["p"], *(row["gaussian_q"] for row in rows.values())]))

        def blocks(p: list[float], top: float = top) -> str:
            return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * x / top))] for x in p[::2])

        lines.append(f"{teacher:<26}{' ' * (3 * len(after) + 4)} the teacher  "
                     f"{blocks(result['p'])}")
        for name, row in rows.items():
            errors = "  ".join("".join(f"{row[part][epoch]:6.3f}" for epoch in shown)
                               for part in parts)
            lines.append(f"{'':<17}{name:<9}{errors}  {row['largest']:10.1e}  "
                         f"{blocks(row['gaussian_q'])}")
    return "\n".join([*lines, "", "head: the fewest tokens of half the mass; tail: the others."])

@cli.command("toy")
@click.option("--objective", "objectives", multiple=True, default=["fkl", "rkl", "akl"],
              show_default=True, type=click.Choice(list(DIVERGENCES)),
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

    With a logit for each token every objective finds the teacher: no modes are sought. Only where
    the student cannot be the teacher (one Gaussian, two narrow modes) does it matter what it seeks.

    At the start forward KL's error falls first in the head, and reverse KL's far out in the tail,
    where the teacher has next to nothing (p < 0.001): what each has in its sum weighs there. In all
    of the tail together forward KL leads, under Adam; by plain descent (--optimizer sgd) reverse
    KL does.

    \b
    Example: python choobaca.py toy --svg toy.svg"""
    results = toy_results(objectives, **how)
    if svg:
        with written_whole(svg) as file:
            file.write(toy_figure(results).encode())
    click.echo(json.dumps(results, indent=2) if as_json else toy_table(results, how["epochs"]))

@cli.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="How the text begins.  [default: with nothing]")
@click.option("--tokens", default=100, show_default=True, type=click.IntRange(1),
              help="How many to add at most; fewer where the model has no more positions.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0, 100),
              help="By which logits are divided; 0: always the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True,
              type=click.FloatRange(0, 1, min_open=True),
              help="Draw from the fewest tokens that have this share of the probability.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="Samples.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True,
              help="Of the draws.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
              show_default=True, help="Where to compute.")
def sample_command(run: Path, prompt: str, tokens: int, temperature: float, top_p: float,
                   count: int, seed: int, device: str) -> None:
    """Let a run, or any Hugging Face LLaMA or GPT-2, write: a line a sample, shown as it comes.

    A sample ends with the line: at the prefix token, which begins the next, at the model's
    eos_token_id, or at a line break.

    \b
    Example: python choobaca.py sample runs/tiny-rkl-1-seed0 --prompt "the dog" --count 5"""
    need(temperature == 0 or temperature >= 1e-3, f"--temperature is {temperature}: expected 0, or "
         "0.001 and more.")
    model, (tokenizer, prefix_id, _) = load_model(run, choose_device(device))
    eos = read_json(run / "config.json").get("eos_token_id")
    ends = [prefix_id, *(i for i in (eos if isinstance(eos, list) else [eos])
                         if i in range(len(model.head)))]
    first = f" {prompt}" if prompt else ""
    first = [prefix_id, *tokenizer.encode(first, add_special_tokens=False).ids]
    room = model.config.positions - len(first) + 1      # the last to be drawn needs no position
    need(room > 0, f"--prompt has {len(first):,} tokens with the prefix: expected at most the "
         f"model's {model.config.positions:,} positions.")
    generator = torch.Generator(model.head.device).manual_seed(seed)
    for _ in range(count):
        stream, begun = decoders.DecodeStream(first, skip_special_tokens=True), bool(prompt)
        click.echo(prompt, nl=False)
        for _, new in write_on(model, torch.tensor([first], device=model.head.device), ends,
                               min(tokens, room), generator, temperature, top_p):
            text, *rest = (stream.step(tokenizer, new.item()) or "").split("\n")
            click.echo(text if begun else text.lstrip(), nl=False)
            begun = begun or bool(text.strip())
            if rest:
                break
        click.echo()

if __name__ == "__main__":
    cli()
