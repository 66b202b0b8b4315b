"""The tests of choobaca.py, in the order of its sections: python -m pytest -q

Every fast version is held against the literal definition, in float64 where that matters. Tests that
compare with Hugging Face's transformers are skipped where it is not installed.
"""

import _thread
import ast
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import html
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import urllib.request
import warnings
import weakref
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import choobaca as c
import click
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

HOME = Path(__file__).resolve().parent
TINY = HOME / "data/tiny"
SMALL = dict(width=32, layers=2, heads=2, inner=48, positions=32, context=16, batch_size=8)
# A run of seconds: small models, few steps, few pairs.
BRIEF = ["--width", "32", "--layers", "1", "--inner", "32", "--steps", "6", "--sample", "40"]


def settings(**changes) -> c.Settings:
    return c.Settings(**{**SMALL, **changes})


def model(V: int = 50, seed: int = 0, sharp: float = 1.0, **changes):
    """A small model; `sharp` scales its matrices, so that its logits are far from equal."""
    made = c.new_model(settings(**changes), V, seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(sharp if parameter.dim() > 1 else 1.0)
    return made


def invoke(*args: str, code: int = 0):
    """The result of a command, checked to have ended with the exit code and no traceback."""
    result = CliRunner().invoke(c.cli, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def brief_config(folder: Path, extra: str = "", teachers: str = "") -> Path:
    """A TOML file of a run of seconds, with two teachers."""
    path = folder / "brief.toml"
    path.write_text(f"""
        text = "{TINY}"
        pairs = "{TINY / "blimp"}"
        vocab_size = 300
        context = 32
        positions = 128
        batch_size = 8
        width = 32
        layers = 1
        heads = 2
        inner = 32
        steps = 6
        warmup = 2
        lr = 3e-3
        sample = 40
        dev_tokens = 2000
        {extra}
        [[teacher]]
        width = 48
        {teachers}
        [[teacher]]
        model_type = "gpt2"
        width = 48
        dropout = 0.1
        tied = true
        {teachers}
        """)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> c.Corpus:
    return c.read_corpus(settings(vocab_size=400), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def vocabulary(corpus) -> c.Vocabulary:
    return corpus.vocabulary


@pytest.fixture(scope="session")
def default_run(tmp_path_factory) -> Path:
    """The folder in which the README's first command was run, with its output in out.txt."""
    folder = tmp_path_factory.mktemp("default")
    done = subprocess.run(
        [sys.executable, HOME / "choobaca.py", "train", "--objective", "rkl", "--teachers", "1"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "out.txt").write_text(done.stdout)
    return folder


# -----------------------------------------------------------------------------
# 1. Text to tokens


def test_any_text_survives_the_tokenizer(vocabulary):
    text = " Tom’s naïve 🐈 said: \t£5!"
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    assert vocabulary.tokenizer.decode(ids) == text


def test_tokenizer_training_is_repeatable(tmp_path):
    documents = c.read_documents(TINY, r"train\.txt")
    for name in ("a", "b"):
        c.train_tokenizer(tmp_path / name, documents, 500)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    loaded = c.load_vocabulary(tmp_path / "a")
    assert loaded.size == 500 and loaded.prefix_id == 1 == loaded.tokenizer.token_to_id("<s>")
    assert [loaded.tokenizer.token_to_id(token) for token in ("<pad>", "</s>")] == [0, 2]


@pytest.mark.parametrize(
    "prefix, expected",
    [
        ("line", ["<s>", " A dog.", "<s>", " It ran."]),
        ("document", ["<s>", " A dog.", "\n", " It ran.", "\n"]),
    ],
)
def test_prefix_setting(vocabulary, prefix, expected):
    ids, tokenizer = (
        c.encode(vocabulary, [["A dog.", "It ran."]], prefix, np.uint16),
        vocabulary.tokenizer,
    )
    pieces = [
        [1]
        if text == "<s>"
        else tokenizer.encode("\n").ids[-1:]
        if text == "\n"
        else tokenizer.encode(text).ids
        for text in expected
    ]
    assert ids.tolist() == [i for piece in pieces for i in piece]


def test_without_a_prefix_the_ids_are_babyllamas(vocabulary):
    """Those of the whole text at once, in which no line but the first begins with a space."""
    text = "A dog.\nIt ran, didn't it?\n«No!»\n"
    whole = tokenizers.Tokenizer.from_str(vocabulary.tokenizer.to_str())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = c.encode(vocabulary, [text.splitlines()], "none", np.uint16)
    assert ids.tolist() == whole.encode(text, add_special_tokens=False).ids
    assert ids.tolist() != vocabulary.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("childes.train", "*MOT:\tthere  it is .", "*MOT: there it is."),
        ("aochildes.dev", "well\xa0, no !", "well, no!"),
        ("cbt.train", "the dog 's bone ; he did n't", "the dog's bone; he did n't"),
        ("open_subtitles.train", "Run!\nSUBTITLES by x\nGo.", "Run!\nGo."),
        ("wikipedia.train", "= = = A town = = =\nIt is .", "A townIt is ."),
        ("qed.train", "MY DOG lS HERE. (HE) RUNS!", "My dog is here. (he) runs!"),
        ("qed.train", "(Tom) All's well.", "(Tom) All's well."),
        ("qed.train", "(...)", "(...)"),
        ("gutenberg.train", "a  b ,", "a  b ,"),
    ],
)
def test_cleaning_by_domain(tmp_path, name, before, after):
    (tmp_path / name).write_text(before + "\n")
    assert c.read_lines(tmp_path / name) == before.split("\n")
    assert c.read_lines(tmp_path / name, clean=True) == after.split("\n")
    documents = c.read_documents(tmp_path, ".*", clean=True)
    assert documents == [after.split("\n")]


def test_a_special_token_in_the_text_is_text(vocabulary):
    assert 1 not in vocabulary.tokenizer.encode("a <s> b", add_special_tokens=False).ids


def test_another_prefix_token_makes_other_ids(tmp_path, vocabulary):
    text, folder = tmp_path / "text", tmp_path / "tokenizer"
    text.mkdir(), folder.mkdir()
    (text / "a.txt").write_text("A dog.")
    (folder / "tokenizer.json").write_bytes(vocabulary.files["tokenizer.json"])
    for token, first in (("<s>", 1), ("</s>", 2)):
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
        read = c.read_corpus(settings(text=str(text), tokenizer=str(folder)), tmp_path / "cache")
        assert read.train[0] == first


def test_documents_are_sorted_and_the_held_out_text_is_not_read_twice(tmp_path):
    for name in ("b.train", "a.txt", "dev.txt", "c.dev", "notes.md"):
        (tmp_path / name).write_text(f"{name}\n\n  indented \r\n")
    read = c.read_corpus(settings(text=str(tmp_path), vocab_size=300), tmp_path / "cache")
    texts = [read.vocabulary.tokenizer.decode(part.tolist()) for part in (read.train, read.dev)]
    assert texts == [" a.txt indented b.train indented", " c.dev indented dev.txt indented"]


def test_ids_are_made_again_when_anything_changed(tmp_path, vocabulary):
    def ids(text, facts, path=tmp_path / "x.ids"):
        return c.encode_once(path, vocabulary, [[text]], "line", facts)

    first = ids("A dog.", {"text": "1"})
    assert first.dtype == np.uint16
    before = (tmp_path / "x.ids").stat().st_mtime_ns
    assert ids("not looked at", {"text": "1"}).tolist() == first.tolist()
    assert (tmp_path / "x.ids").stat().st_mtime_ns == before
    assert ids("Two dogs.", {"text": "2"}).tolist() != first.tolist()
    whole = (tmp_path / "x.ids").read_bytes()
    for damaged in (whole[:-2], whole[:-1], whole[:100], b"", whole + b"ab", b"x" * len(whole)):
        (tmp_path / "x.ids").write_bytes(damaged)
        ids("Two dogs.", {"text": "2"})
        assert (tmp_path / "x.ids").read_bytes() == whole
    flipped = bytes([*whole[:-1], whole[-1] ^ 1])
    (tmp_path / "x.ids").write_bytes(flipped)
    ids("Two dogs.", {"text": "2"})
    assert (tmp_path / "x.ids").read_bytes() == whole
    assert json.loads(whole[: c.HEADER])["text"] == "2"


# -----------------------------------------------------------------------------
# 2. Tokens to batches


@pytest.mark.parametrize("offset", [False, True])
def test_an_epoch_reads_every_row_once(offset):
    s, ids = settings(random_offset=offset), np.arange(16 * 50 + 5, dtype=np.uint16)
    rows = c.count_rows(len(ids), s)
    starts = np.concatenate([c.batch_at(step, ids, s)[0][:, 0] for step in range(rows // 8)])
    assert len(set(starts // 16)) >= len(starts) * (0.6 if offset else 1)
    order = c.row_starts(rows, s, 0)
    assert (
        sorted(order // 16 * 16) == sorted(order) if not offset else (order + 17 <= len(ids)).all()
    )
    assert (c.row_starts(rows, s, 1) != order).any()


def test_a_batch_depends_on_seed_and_step_alone():
    ids, s = np.arange(5000, dtype=np.uint16), settings()
    wanted = c.batch_at(70, ids, s)
    for step in (3, 70, 0):
        inputs, targets = c.batch_at(step, ids, s)
    assert all(torch.equal(a, b) for a, b in zip(c.batch_at(70, ids, s), wanted))
    assert torch.equal(inputs + 1, targets) and inputs.shape == (8, 16)
    assert not torch.equal(c.batch_at(70, ids, settings(seed=1))[0], wanted[0])


# -----------------------------------------------------------------------------
# 3. Models

KINDS = [
    dict(),
    dict(tied=True),
    dict(kv_heads=1, rope_theta=500.0),
    dict(model_type="gpt2"),
    dict(model_type="gpt2", tied=True),
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_what_comes_later(kind):
    m, ids = model(sharp=5, **kind).eval(), torch.randint(0, 50, (2, 16))
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    before, after = m.hidden(ids), m.hidden(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing(kind):
    """Hidden states token by token, each after what is kept of those before, are those at once."""
    m, ids = model(sharp=5, **kind).eval(), torch.randint(0, 50, (3, 16))
    cache = [[] for _ in range(m.config.layers)]
    parts = [m.hidden(part, cache) for part in (ids[:, :5], *ids[:, 5:].split(1, 1))]
    assert torch.allclose(torch.cat(parts, 1), m.hidden(ids), atol=1e-5)


def test_rotary_products_depend_on_distance_alone():
    cos, sin = c.rotary_angles(20, 8, 10_000.0, "cpu")
    q, k = (c.rotate(torch.randn(8).expand(1, 1, 20, 8), cos, sin)[0, 0] for _ in range(2))
    products = q @ k.T
    for distance in range(-5, 6):
        line = products.diagonal(distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-5)


def test_the_papers_sizes():
    """58M, 360M and 705M, to the digit, by formula and as built."""
    V, C, L, I = 16_000, 512, 16, 1024
    student = c.empty_model(c.ModelSettings(), V)
    assert (
        c.count_parameters(student)
        == 2 * V * C + L * (4 * C * C + 3 * C * I + 2 * C) + C
        == 58_343_936
    )
    llama = c.ModelSettings(width=1024, layers=24, heads=8, inner=3072)
    gpt2 = c.ModelSettings(
        model_type="gpt2", width=1536, layers=24, heads=16, inner=6144, tied=True
    )
    assert round(c.count_parameters(c.empty_model(llama, V)) / 1e6) == 360
    assert round(c.count_parameters(c.empty_model(gpt2, V)) / 1e6) == 705


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_by_role(kind):
    """Every matrix by its own role: a projection back into GPT-2's residual stream is smaller."""
    before = torch.get_rng_state()
    m = c.new_model(settings(width=128, inner=256, layers=3, **kind), 500, 7)
    assert torch.equal(torch.get_rng_state(), before), "the global stream was drawn on"
    for name, parameter in m.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            wanted = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert (
                abs(parameter.std().item() / wanted - 1) < 0.05 and abs(parameter.mean()) < 1e-3
            ), name
    again = c.new_model(settings(width=128, inner=256, layers=3, **kind), 500, 7)
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), again.parameters()))


def logits(m, ids):
    return m.hidden(ids) @ m.head.T


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_our_folders(tmp_path, vocabulary, kind):
    transformers = pytest.importorskip("transformers")
    m, ids = model(V=vocabulary.size, sharp=5, **kind).eval(), torch.randint(0, 300, (2, 16))
    c.save_model(tmp_path, m, vocabulary)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - logits(m, ids)).abs().max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>"
    assert (
        tokenizer.encode(" The dogs ran.", add_special_tokens=False)
        == vocabulary.tokenizer.encode(" The dogs ran.", add_special_tokens=False).ids
    )


@pytest.mark.parametrize(
    "family, changes, shard",
    [
        ("Llama", dict(tie_word_embeddings=False), "1GB"),
        ("Llama", dict(tie_word_embeddings=True), "1GB"),
        (
            "Llama",
            dict(
                num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
            ),
            "1GB",
        ),
        ("Llama", dict(num_key_value_heads=2), "20KB"),
        ("GPT2", dict(), "1GB"),
        ("GPT2", dict(n_inner=40), "20KB"),
    ],
)
def test_we_read_the_folders_of_transformers(tmp_path, vocabulary, family, changes, shard):
    transformers = pytest.importorskip("transformers")
    sizes = (
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        if family == "Llama"
        else dict(n_embd=32, n_layer=2, n_head=4)
    )
    config = getattr(transformers, family + "Config")(
        vocab_size=vocabulary.size, bos_token_id=1, eos_token_id=2, **sizes, **changes
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.files["tokenizer.json"])
    ours, _ = c.load_model(tmp_path, "cpu")
    ids = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        assert (theirs(ids).logits - logits(ours, ids)).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# 4. Divergences


def literal_kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def literal_both(log_q, log_p, weight):
    return weight * literal_kl(log_p, log_q) + (1 - weight) * literal_kl(log_q, log_p)


def literal_head(log_q, log_p, mu):
    """AKL paper, Eqs. 12 to 14: sort all, keep the fewest that reach mu, one row at a time."""
    shares = []
    for q, p in zip(log_q.detach().exp(), log_p.exp()):
        order = p.argsort(descending=True)
        head = order[: int((p[order].cumsum(0) < mu).sum()) + 1]
        gap = (p - q).abs()
        shares.append(gap[head].sum() / gap.sum())
    return torch.stack(shares)


def literal_mixture(log_q, log_p, share):
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


def literal_drkl(log_q, log_p, targets, gamma):
    """The target and the rest as two classes, and the rest among themselves."""
    rest = torch.ones_like(log_q, dtype=torch.bool).scatter(1, targets, False)
    (t_q, r_q), (t_p, r_p) = (
        (x.gather(1, targets), x[rest].view(len(x), -1)) for x in (log_q, log_p)
    )
    binary = literal_kl(
        *(torch.cat([t, r.logsumexp(-1, True)], 1) for t, r in ((t_q, r_q), (t_p, r_p)))
    )
    return binary + gamma * literal_kl(r_q.log_softmax(-1), r_p.log_softmax(-1))


LITERAL = {
    "fkl": lambda q, p, t, s: literal_kl(p, q),
    "rkl": lambda q, p, t, s: literal_kl(q, p),
    "fkl+rkl": lambda q, p, t, s: literal_both(q, p, s.fkl_weight),
    "akl": lambda q, p, t, s: literal_both(q, p, literal_head(q, p, s.mu)),
    "akl-r": lambda q, p, t, s: literal_both(q, p, 1 - literal_head(q, p, s.mu)),
    "skl": lambda q, p, t, s: literal_kl(p, literal_mixture(q, p, s.skew)),
    "srkl": lambda q, p, t, s: literal_kl(q, literal_mixture(q, p, 1 - s.skew)),
    "jsd": lambda q, p, t, s: (
        s.jsd_beta * literal_kl(p, literal_mixture(q, p, s.jsd_beta))
        + (1 - s.jsd_beta) * literal_kl(q, literal_mixture(q, p, s.jsd_beta))
    ),
    "drkl": lambda q, p, t, s: literal_drkl(q, p, t, s.gamma),
}


def divergence(name, a, b, targets, s):
    """What FusedLoss hands to a divergence, from logits / tau."""
    q, p, r, *_ = c.to_probabilities(a.clone(), b.clone(), torch.empty_like(a))
    function, constant = c.DIVERGENCES[name]
    return function(q, p, r, targets, constant and getattr(s, constant))


@pytest.mark.parametrize("name", c.DIVERGENCES)
@pytest.mark.parametrize("V", [3, 57, 16000])
def test_divergences_and_their_gradients(name, V):
    """Against autograd of the literal definition in float64: 1e-10 there, 1e-5 in fp32, of what a
    batch sums up to. The constants are not the defaults, so that each is seen to be read."""
    s = settings(fkl_weight=0.3, mu=0.4, skew=0.2, jsd_beta=0.7, gamma=0.8)
    rows, draw = 256 if V < 100 else 8, torch.Generator().manual_seed(V)
    targets = torch.randint(V, (rows, 1), generator=draw)
    for scale in (0.1, 1.0, 10.0):
        for tau in (1, 2, 4):
            z, w = (scale * torch.randn(rows, V, generator=draw) for _ in range(2))
            a = (z.double() / tau).requires_grad_()
            log_q, log_p = a.log_softmax(-1), (w.double() / tau).log_softmax(-1)
            wanted = LITERAL[name](log_q, log_p, targets, s)
            (slope,) = torch.autograd.grad(wanted.sum(), a)
            value, found = divergence(name, a.detach(), w.double() / tau, targets, s)
            assert value.shape == (rows, 1) and (value > 0).all()
            assert torch.allclose(value[:, 0], wanted, rtol=1e-10, atol=1e-10), (scale, tau)
            assert torch.allclose(found, slope, rtol=1e-10, atol=1e-10), (scale, tau)
            if name.startswith("akl"):  # Eq. 12 jumps: leave out the rows where rounding may decide
                near = [literal_head(log_q, log_p, s.mu + step) for step in (-2e-6, 2e-6)]
                z, w, wanted, slope = (x[near[0] == near[1]] for x in (z, w, wanted, slope))
                assert len(z) >= 0.7 * rows
            value, found = divergence(name, z / tau, w / tau, targets, s)
            assert abs(value.double().sum() / wanted.sum() - 1) < 1e-5, (scale, tau)
            assert (found - slope).norm() < 1e-5 * slope.norm(), (scale, tau)


@pytest.mark.parametrize("name", c.DIVERGENCES)
@pytest.mark.parametrize("scale", [0.1, 5.0, 100.0])
def test_a_divergence_is_zero_where_the_models_agree(name, scale):
    z, targets = scale * torch.randn(20, 57), torch.randint(57, (20, 1))
    value, gradient = divergence(name, z, z.clone(), targets, settings())
    assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", c.DIVERGENCES)
def test_no_divergence_breaks_at_the_ends_of_fp32(name):
    """Teachers that rule tokens out, one that is certain, a student that is, and both, agreeing or
    not; the label likely, ruled out, or all there is. FusedLoss sees the same."""
    V = 40
    flat, ruled, sure, other = (torch.zeros(V) for _ in range(4))
    ruled[:30], sure[3], other[7] = -math.inf, 200.0, 200.0
    nearly = torch.full((V,), -math.log(V * 1e7))  # 1 - pi is about 1e-7
    nearly[3] = 0.0
    students = [flat, sure, nearly, torch.randn(V)]
    teachers = [flat, ruled, sure, other, nearly, torch.randn(V)]
    a, b, t = zip(*itertools.product(students, teachers, [0, 3, 7, 35]))
    a, b, t = torch.stack(a), torch.stack(b), torch.tensor(t)[:, None]
    value, gradient = divergence(name, a, b, t, settings())
    assert value.isfinite().all() and gradient.isfinite().all() and (value > -1e-6).all()
    s = settings(teachers=1, objective=name)
    hidden, one = torch.eye(len(a)).requires_grad_(), torch.eye(len(a))
    loss, _ = c.FusedLoss.apply(
        hidden, a.T.contiguous(), t[:, 0], one, b.T.nan_to_num(neginf=-3e38), s, 1.0, 7
    )
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("name", c.DIVERGENCES)
def test_the_level_of_the_logits_costs_no_digit(name):
    """A softmax knows no level, and models differ in theirs: GPT-2's logits lie near -100."""
    draw = torch.Generator().manual_seed(0)
    z, w = (torch.randn(64, 57, generator=draw) + level for level in (100, -300))
    targets = torch.randint(57, (64, 1), generator=draw)
    wanted, slope = divergence(name, z.double(), w.double(), targets, settings())
    value, found = divergence(name, z, w, targets, settings())
    assert abs(value.double().sum() / wanted.sum() - 1) < 1e-5
    assert (found - slope).norm() < 1e-5 * slope.norm()


@pytest.mark.parametrize("tau", [0.5, 9.0, 30.0])
def test_no_temperature_breaks_the_loss(tau):
    """softmax(z / tau) to the power of tau has no number left for it at such sizes."""
    hidden, head = torch.eye(3).requires_grad_(), 0.3 * torch.randn(20_000, 3)
    s = settings(teachers=1, objective="rkl", temperature=tau)
    targets = torch.tensor([0, 1, 2])
    loss, parts = c.FusedLoss.apply(hidden, head, targets, torch.eye(3), 0.5 * head, s, 1.0, 2)
    loss.backward()
    assert math.isclose(parts[0], F.cross_entropy(head.T, targets, reduction="sum"), rel_tol=1e-5)
    assert loss.isfinite() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("name", c.DIVERGENCES)
@pytest.mark.parametrize("sharp", [(0.01, 8.0), (8.0, 0.01)])
def test_one_model_sure_the_other_not(name, sharp):
    """Where one softmax is scaled by 1 and the other by 1 / V, which their ratio must survive."""
    draw = torch.Generator().manual_seed(0)
    z, w = (scale * torch.randn(8, 16_000, generator=draw) for scale in sharp)
    targets = torch.randint(16_000, (8, 1), generator=draw)
    wanted, slope = divergence(name, z.double(), w.double(), targets, settings())
    value, found = divergence(name, z, w, targets, settings())
    assert abs(value.double().sum() / wanted.sum() - 1) < 1e-5
    assert (found - slope).norm() < 1e-5 * slope.norm()


def test_skewed_divergences_become_the_plain_ones():
    z, w = (2 * torch.randn(9, 30, dtype=torch.float64) for _ in range(2))
    for skewed, plain in (("skl", "fkl"), ("srkl", "rkl")):
        for found, wanted in zip(
            divergence(skewed, z, w, None, settings(skew=1e-10)),
            divergence(plain, z, w, None, settings()),
        ):
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_drkl_is_exact_for_a_sure_student():
    """1 - pi from 1e-1 to 1e-7, where (RKL - B) / (1 - pi) would have lost every digit."""
    s, targets = settings(), torch.zeros(7, 1, dtype=torch.long)
    z, w = torch.randn(7, 57), torch.randn(7, 57)
    z[:, 0] = z[:, 1:].logsumexp(-1) + torch.arange(1, 8) * math.log(10)
    w[:, 0] = w[:, 1:].logsumexp(-1) + 2
    a = z.double().requires_grad_()
    wanted = literal_drkl(a.log_softmax(-1), w.double().log_softmax(-1), targets, s.gamma)
    (slope,) = torch.autograd.grad(wanted.sum(), a)
    value, found = divergence("drkl", z, w, targets, s)
    assert ((found - slope).norm(dim=-1) < 1e-5 * slope.norm(dim=-1)).all()
    assert torch.allclose(value[:, 0], wanted, rtol=1e-5)


def test_the_head_is_the_smallest_that_reaches_mu():
    """Eq. 12 by trying every set of tokens; tokens that tie with the last one are in it."""
    p = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    for mu in (0.1, 0.5, 0.65, 0.75, 1.0):
        for row in range(3):
            reach = [
                m
                for m in itertools.product((0, 1), repeat=4)
                if sum(x * y for x, y in zip(m, p[row].tolist())) >= mu - 1e-7
            ]
            fewest = min(map(sum, reach))
            best = max(
                (m for m in reach if sum(m) == fewest),
                key=lambda m: sum(x * y for x, y in zip(m, p[row].tolist())),
            )
            edge = min(y for x, y in zip(best, p[row].tolist()) if x)
            gap, head = (p[row] - q[row]).abs(), p[row] >= edge
            wanted = gap[head].sum() / gap.sum()
            found = c.head_share(q[row : row + 1], p[row : row + 1], mu)
            assert torch.isclose(found[0, 0], wanted, atol=1e-6), (mu, row)


def test_single_step_is_reverse_kl():
    """MiniLLM's single-step gradient, the expectation over the next token y ~ q of
    grad log q(y) (log q(y) - log p(y)), summed over all y: it is the token-level reverse KL's."""
    a, b = (torch.randn(11, dtype=torch.float64) for _ in range(2))
    a.requires_grad_()
    log_q, log_p = a.log_softmax(-1), b.log_softmax(-1)
    wanted = sum(
        log_q[y].exp().detach()
        * (log_q[y] - log_p[y]).detach()
        * torch.autograd.grad(log_q[y], a, retain_graph=True)[0]
        for y in range(11)
    )
    _, found = divergence("rkl", a.detach()[None], b[None], None, settings())
    assert torch.allclose(found[0], wanted, atol=1e-12)


# -----------------------------------------------------------------------------
# 5. The fused loss


def loss_inputs(dtype, N=23, C=8, C_=12, V=57):
    draw = torch.Generator().manual_seed(3)
    shapes = ((N, C), (V, C), (N, C_), (V, C_))
    hidden, head, t_hidden, t_head = (
        torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes
    )
    return (
        hidden.requires_grad_(),
        head.requires_grad_(),
        torch.randint(0, V, (N,), generator=draw),
        t_hidden,
        t_head,
    )


def plain_loss(hidden, head, targets, t_hidden, t_head, s, beta):
    """The paper's Eqs. 1, 2 and 9 with all logits at once; the sum over the tokens not ignored."""
    kept = targets >= 0
    hidden, t_hidden, targets = hidden[kept], t_hidden[kept], targets[kept]
    z, w, tau = hidden @ head.T, t_hidden @ t_head.T, s.temperature
    ce = F.cross_entropy(z, targets, reduction="sum")
    if s.objective not in LITERAL:
        return ce
    mixed = beta * w + (1 - beta) * (z.detach() if s.mixing == "constant" else z)
    kl = LITERAL[s.objective](
        (z / tau).log_softmax(-1), (mixed / tau).log_softmax(-1), targets[:, None], s
    ).sum()
    weight = s.context if s.reduction == "batchmean" else 1
    return s.alpha * ce + (1 - s.alpha) * weight * tau**2 * kl


OBJECTIVES = [
    dict(objective="ce"),
    *(dict(objective=name) for name in c.DIVERGENCES),
    dict(objective="rkl", temperature=1.0, alpha=0.2),
    dict(objective="rkl", alpha=0.0, reduction="batchmean"),
    dict(objective="fkl", temperature=4.0, alpha=0.9),
    *(dict(objective=name, mixing="differentiated") for name in c.MIRRORED),
]


@pytest.mark.parametrize("changes", OBJECTIVES)
@pytest.mark.parametrize("beta", [1.0, 0.7, 0.1])
def test_fused_loss_is_the_plain_loss(changes, beta, monkeypatch):
    """Whatever the chunk, and the rows that a core works on at once; the paper's k = 5 is one."""
    s, inputs = settings(teachers=1, **changes), loss_inputs(torch.float64)
    inputs[2][4:6] = -100  # ignored
    wanted = plain_loss(*inputs, s, beta) / 23
    gradients = torch.autograd.grad(wanted, inputs[:2])
    for chunk, cache in ((1, 57), (5, 57), (7, 2**17), (23, 100), (100, 2**17)):
        monkeypatch.setattr(c, "CACHE", cache)
        loss, parts = c.FusedLoss.apply(*inputs, s, beta, chunk)
        found = torch.autograd.grad(loss / 23, inputs[:2])
        assert torch.allclose(loss / 23, wanted, rtol=1e-10, atol=1e-10)
        for a, b in zip(found, gradients):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
        ce, kl = c.loss_weights(s)
        assert torch.isclose(ce * parts[0] + kl * parts[1], loss)


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_the_chunk_cannot_be_seen_in_fp32(changes):
    s, inputs = settings(teachers=1, **changes), loss_inputs(torch.float32, N=100, V=300)
    results = []
    for chunk in (1, 7, 64, 100):
        loss, _ = c.FusedLoss.apply(*inputs, s, 0.7, chunk)
        results.append([loss, *torch.autograd.grad(loss, inputs[:2])])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a - b).norm() <= 2e-6 * a.norm()


def test_the_step_wise_loss_is_the_whole_loss():
    """Segments of k = 5 tokens, each with a loss of its own: they add up, gradients too."""
    s, inputs = settings(teachers=1, objective="rkl"), loss_inputs(torch.float64)
    hidden, head, targets, t_hidden, t_head = inputs
    whole, _ = c.FusedLoss.apply(*inputs, s, 0.7, 100)
    steps = [
        c.FusedLoss.apply(
            hidden[i : i + 5], head, targets[i : i + 5], t_hidden[i : i + 5], t_head, s, 0.7, 100
        )[0]
        for i in range(0, 23, 5)
    ]
    assert torch.isclose(sum(steps), whole, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, inputs[:2]) for x in (sum(steps), whole))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_mixing_is_a_weight_under_reverse_kl():
    """Eq. 2, the student's part constant: the gradient is exactly beta times the unmixed one."""
    s, inputs = settings(teachers=1, objective="rkl", alpha=0.0), loss_inputs(torch.float64)
    unmixed, mixed = (
        torch.autograd.grad(c.FusedLoss.apply(*inputs, s, beta, 8)[0], inputs[:2])
        for beta in (1.0, 0.3)
    )
    for a, b in zip(unmixed, mixed):
        assert torch.allclose(0.3 * a, b, rtol=1e-10, atol=1e-10)


def test_batchmean_is_pytorchs_and_babyllamas():
    """KLDivLoss(batchmean) on (B, T, V) logits: T times the mean over tokens."""
    B, T, V = 3, 16, 57
    hidden, head, targets, t_hidden, t_head = loss_inputs(torch.float64, N=B * T)
    s = settings(teachers=1, objective="fkl", alpha=0.0, reduction="batchmean", context=T)
    loss, _ = c.FusedLoss.apply(hidden, head, targets, t_hidden, t_head, s, 1.0, 10)
    log_q, log_p = (
        (x / 2).log_softmax(-1).view(B, T, V) for x in (hidden @ head.T, t_hidden @ t_head.T)
    )
    wanted = 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert torch.isclose(loss / (B * T), wanted, rtol=1e-12)


def test_only_what_is_asked_for_gets_a_gradient():
    s = settings(teachers=1, objective="rkl")
    hidden, head, *rest = loss_inputs(torch.float64)
    both = torch.autograd.grad(c.FusedLoss.apply(hidden, head, *rest, s, 1.0, 8)[0], (hidden, head))
    for i in range(2):
        pair = [x.detach().requires_grad_(i == j) for j, x in enumerate((hidden, head))]
        loss, _ = c.FusedLoss.apply(*pair, *rest, s, 1.0, 8)
        loss.backward()
        assert torch.equal(pair[i].grad, both[i]) and pair[1 - i].grad is None
    with torch.no_grad():
        assert torch.equal(c.FusedLoss.apply(hidden, head, *rest, s, 1.0, 8)[0], loss)


def test_a_tied_head_gets_both_gradients():
    s, (_, head, targets, t_hidden, t_head) = (
        settings(teachers=1, objective="rkl"),
        loss_inputs(torch.float64),
    )
    ids = torch.arange(23)
    losses = [
        c.FusedLoss.apply(head[ids], head, targets, t_hidden, t_head, s, 1.0, 8)[0],
        plain_loss(head[ids], head, targets, t_hidden, t_head, s, 1.0),
    ]
    a, b = (torch.autograd.grad(loss, head)[0] for loss in losses)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_nothing_left_to_learn_is_zero_and_no_nan():
    s, inputs = settings(teachers=1, objective="rkl"), loss_inputs(torch.float32)
    loss, parts = c.FusedLoss.apply(*inputs[:2], torch.full((23,), -100), *inputs[3:], s, 1.0, 8)
    loss.backward()
    assert loss == 0 and (parts == 0).all()
    assert (inputs[0].grad == 0).all() and (inputs[1].grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "all"])
def test_half_precision(dtype, how):
    """Gradients within the rounding of the products, in fp16 with a loss scaler's factor, too; in
    the mean over many tokens, where dividing before the products would leave fp16 nothing."""
    s, exact = settings(teachers=1, objective="rkl"), loss_inputs(torch.float32, N=4000, V=300)
    wanted = torch.autograd.grad(c.FusedLoss.apply(*exact, s, 1.0, 512)[0] / 4000, exact[:2])
    inputs = [x.detach().to(dtype) if how == "all" and x.is_floating_point() else x for x in exact]
    inputs[:2] = [x.detach().requires_grad_() for x in inputs[:2]]
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        loss, _ = c.FusedLoss.apply(*inputs, s, 1.0, 512)
    scale = 2.0**16 if dtype == torch.float16 and how == "autocast" else 1.0
    (loss / 4000 * scale).backward()
    for x, y in zip(inputs, wanted):
        assert x.grad.dtype == x.dtype
        error = (x.grad.float() / scale - y).norm() / y.norm()
        assert error < (0.02 if dtype == torch.bfloat16 else 0.005), error


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("objective", ["ce", *c.DIVERGENCES])
def test_no_array_of_all_logits_is_ever_held(objective):
    V, chunk, s = 500, 10, settings(teachers=1, objective=objective)
    sizes = []
    for N in (400, 2000):
        with Largest() as largest:
            inputs = loss_inputs(torch.float32, N=N, V=V)
            c.FusedLoss.apply(*inputs, s, 0.7, chunk)[0].backward()
        sizes.append(largest.elements)
    assert chunk * V <= sizes[0] <= 4 * chunk * V and sizes[1] <= max(sizes[0], 2000 * 12)


def test_token_scores_are_the_log_softmax():
    hidden, head, targets, *_ = loss_inputs(torch.float64)
    wanted = (hidden @ head.T).log_softmax(-1)[torch.arange(23), targets]
    for chunk in (1, 7, 30):
        found = c.token_log_probabilities(hidden, head, torch.arange(23), targets, chunk)
        assert torch.allclose(found, wanted, atol=1e-12)
    rows = torch.tensor([0, 0, 0, 5, 22, 22])  # several targets of a row, or none
    targets = torch.tensor([3, 1, 3, 0, 56, 55])
    wanted = (hidden @ head.T).log_softmax(-1)[rows, targets]
    for chunk in (1, 7, 30):
        found = c.token_log_probabilities(hidden, head, rows, targets, chunk)
        assert torch.allclose(found, wanted, atol=1e-12)


def test_two_teachers_are_the_mean_of_their_logits():
    teachers = [
        model(sharp=5, seed=1).eval(),
        model(sharp=5, seed=2, model_type="gpt2", width=48).eval(),
    ]
    ids, coach = torch.randint(0, 50, (2, 16)), c.Coach(teachers)
    wanted = sum(logits(teacher, ids) for teacher in teachers) / 2
    assert torch.allclose(coach.hidden(ids) @ coach.head.T, wanted, atol=1e-4)
    assert not coach.head.requires_grad and not coach.hidden(ids).requires_grad


# -----------------------------------------------------------------------------
# 6. Schedules and the optimizer


def test_learning_rate_at_its_ends():
    s = settings(lr=1.0, warmup=10)
    rates = [c.lr_at(step, 110, 10, s) for step in range(110)]
    assert rates[0] == 1 / 11 and rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert math.isclose(rates[60], 0.5) and 0 < rates[-1] < 1e-3


def test_the_papers_t_max_by_both_readings():
    """PyTorch's own CosineAnnealingLR, stepped each step or each epoch."""
    for unit, every in (("step", 1), ("epoch", 20)):
        s = settings(lr=0.5, warmup=0, t_max=30, t_max_unit=unit)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        for step in range(100):
            rate = optimizer.param_groups[0]["lr"]
            assert math.isclose(c.lr_at(step, 100, 20, s), rate, abs_tol=1e-12)
            optimizer.step()
            if (step + 1) % every == 0:
                theirs.step()


def test_beta_is_equation_3():
    s = settings(beta=0.7, progressive=True)
    assert [round(c.beta_at(e, 6, s), 3) for e in range(6)] == [
        0.7,
        0.583,
        0.467,
        0.35,
        0.233,
        0.117,
    ]
    assert c.beta_at(99, 100, s) == 0.1
    assert c.beta_at(1, 2, settings(beta=0.05, progressive=True)) == 0.05
    assert c.beta_at(5, 6, settings(beta=0.7)) == 0.7


def test_every_parameter_is_in_one_group_and_gets_a_gradient():
    for kind in KINDS:
        m, s = model(**kind), settings(**kind)
        optimizer, ids = c.make_optimizer(m, s), torch.randint(0, 50, (8, 16))
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == set(m.parameters())
        before = {name: p.clone() for name, p in m.named_parameters()}
        c.train_step(m, optimizer, None, ids, ids.roll(-1, 1), s, 1.0)
        assert all(
            not torch.equal(p, before[name])
            for name, p in m.named_parameters()
            if "c_attn.bias" not in name
        )


# -----------------------------------------------------------------------------
# 7. Run folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back(tmp_path, vocabulary, kind):
    m = model(V=vocabulary.size, **kind)
    c.save_model(tmp_path, m, vocabulary)
    back, same = c.load_model(tmp_path, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), back.parameters()))
    assert (
        same.tokenizer.get_vocab() == vocabulary.tokenizer.get_vocab()
        and same.prefix_id == vocabulary.prefix_id
    )
    assert dataclasses.replace(back.config, kv_heads=0) == dataclasses.replace(
        c.ModelSettings(
            **{f.name: getattr(m.config, f.name) for f in dataclasses.fields(c.ModelSettings)}
        ),
        kv_heads=0,
    )
    assert not list(tmp_path.glob("*.partial"))


def test_older_gpt2_files_and_other_dtypes_are_read(tmp_path, vocabulary):
    m = model(V=vocabulary.size, model_type="gpt2", tied=True)
    c.save_model(tmp_path, m, vocabulary)
    old = {name: p.detach().bfloat16() for name, p in m.named_parameters()} | {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4)
    }
    c.write_safetensors(tmp_path / "model.safetensors", old)
    back, _ = c.load_model(tmp_path, "cpu")
    assert torch.equal(back.wte.weight, m.wte.weight.bfloat16().float())


def test_the_prefix_token_is_what_the_folder_says(tmp_path, vocabulary):
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.files["tokenizer.json"])
    assert c.load_vocabulary(tmp_path).prefix_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert c.load_vocabulary(tmp_path).prefix_id == 2
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<pad>"}')
    assert c.load_vocabulary(tmp_path).prefix_id == 0


def test_a_full_disk_is_one_sentence(tmp_path):
    """A limit on the size of files stands for the disk: nothing half written is left."""
    command = [sys.executable, HOME / "choobaca.py", "train", "-c", brief_config(tmp_path)]
    limited = "ulimit -f 100; exec " + shlex.join(map(str, [*command, "-o", tmp_path / "full/run"]))
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"Error: \S+\.ids: File too large", done.stderr), done.stderr[-500:]
    assert not list(tmp_path.rglob("*.ids*")) and not (tmp_path / "full/run").exists()


def test_a_theta_said_twice_and_a_null(tmp_path, vocabulary):
    c.save_model(tmp_path, model(V=vocabulary.size, rope_theta=777.0), vocabulary)
    config = json.loads((tmp_path / "config.json").read_text())
    for theta in (
        {"rope_theta": 777.0},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 777.0}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **theta}))
        assert c.load_model(tmp_path, "cpu")[0].config.rope_theta == 777.0


def test_a_file_that_fails_half_way_leaves_nothing(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), c.written_whole(tmp_path / "x") as file:
        file.write(b"new")
        1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (
        tmp_path / "x"
    ).read_text() == "old"


# -----------------------------------------------------------------------------
# 8. Training


def history(folder: Path) -> list[dict]:
    """The log without its timings."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def test_accumulation_changes_nothing():
    results = []
    for micro_batch in (0, 2, 1):
        s = settings(micro_batch=micro_batch, objective="rkl", teachers=1)
        m, ids = (
            model(sharp=5),
            torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0)),
        )
        coach = c.Coach([model(sharp=5, seed=5).eval()])
        losses = c.train_step(m, c.make_optimizer(m, s), coach, ids, ids.roll(-1, 1), s, 0.7)
        results.append((losses, m.head.grad.clone()))
    for losses, gradient in results[1:]:
        assert torch.allclose(losses, results[0][0], rtol=1e-5)
        assert torch.allclose(gradient, results[0][1], atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [dict(), dict(model_type="gpt2", dropout=0.5)])
def test_activation_checkpointing_changes_nothing_but_what_is_kept(kind, precision):
    """The same losses and gradients to the bit; of a block, its input alone is kept."""
    shape = dict(width=32, heads=2, layers=3, precision=precision, **kind)
    ids, results = torch.randint(0, 50, (8, 16)), []
    for recomputed in (False, True):
        s, m, kept = settings(micro_batch=4, **shape), model(sharp=5, **shape).train(), []
        if recomputed:
            c.checkpoint_activations(m)
        optimizer = c.make_optimizer(m, s)
        torch.manual_seed(0)
        losses = c.train_step(m, optimizer, None, ids, ids.roll(-1, 1), s, 1.0)
        gradients = [parameter.grad.clone() for parameter in m.parameters()]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            m(ids)
        sizes = {x.untyped_storage().data_ptr(): x.numel() for x in kept if x.dim() == 3}
        results.append((losses, gradients, sum(sizes.values())))
    (losses, gradients, kept), (losses_too, gradients_too, kept_too) = results
    assert torch.equal(losses, losses_too)
    assert all(map(torch.equal, gradients, gradients_too))
    assert kept_too < kept / 3


def test_a_finished_run_is_not_shown_as_one_of_another_text_or_teacher(tmp_path):
    """--resume of it is an error then, and its scores stay."""
    config, out = brief_config(tmp_path), tmp_path / "runs/x"
    other = tmp_path / "text"
    shutil.copytree(TINY, other, ignore=shutil.ignore_patterns("blimp"))
    text = (other / "train.txt").read_text()
    (other / "train.txt").write_text(text[: len(text) // 2])
    invoke("train", "-c", config, "-o", out)
    scores = {path: path.read_bytes() for path in out.glob("blimp-*")}
    told = invoke("train", "-c", config, "-o", out, "--resume", "--text", other, code=1).stderr
    assert "the digest of text" in told
    invoke("train", "-c", config, "-o", out, "--resume")
    assert scores and all(path.read_bytes() == kept for path, kept in scores.items())
    args = ["train", "-c", config, "--objective", "rkl", "-o", tmp_path / "runs/y"]
    a, b = tmp_path / "runs/a", tmp_path / "runs/b"
    for seed, folder in enumerate((a, b)):
        invoke("train", "-c", config, "--seed", seed, "-o", folder)
    invoke(*args, "--teacher", a)
    told = invoke(*args, "--teacher", b, "--resume", code=1).stderr
    assert "the digest of teachers" in told
    invoke(*args, "--teacher", a, "--resume")


def test_a_checkpointed_teacher_is_not_kept_in_memory(tmp_path, monkeypatch):
    made, new = [], c.new_model

    def watched(*rest):
        left.append([block for block in made if block() is not None])
        model = new(*rest)
        made.extend(weakref.ref(block) for block in model.layers)
        return model

    left = []
    monkeypatch.setattr(c, "new_model", watched)
    args = ["--objective", "rkl", "--teachers", "1", "--activation-checkpointing"]
    invoke("train", "-c", brief_config(tmp_path), "-o", tmp_path / "run", *args)
    assert len(made) >= 2 and left == [[], []]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """A process that writes what another one is writing leaves one of the two, whole."""
    path, code = tmp_path / "file", "import sys, choobaca, pathlib\n"
    code += "with choobaca.written_whole(pathlib.Path(sys.argv[1])) as f: f.write(b'B' * 9)"
    with c.written_whole(path) as file:
        file.write(b"A" * 5)
        file.flush()
        subprocess.run([sys.executable, "-c", code, path], cwd=HOME, check=True)
        assert path.read_bytes() == b"B" * 9
        file.write(b"A" * 5)
    assert path.read_bytes() == b"A" * 10 and list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_with_activation_checkpointing(tmp_path):
    """What memory ran out of is had again: the same weights, the same log."""
    args = ["train", "-c", brief_config(tmp_path), "--eval-every", "3", "--save-minutes", "0"]
    invoke(*args, "-o", tmp_path / "whole/run")
    save = c.Journal.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c.Journal, "save", lambda *rest: (save(*rest), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            CliRunner().invoke(
                c.cli, [*map(str, args), "-o", str(tmp_path / "run/run")], catch_exceptions=False
            )
    done = invoke(*args, "-o", tmp_path / "run/run", "--resume", "--activation-checkpointing")
    assert "5 steps in" in done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole/run" / name).read_bytes() == (
            tmp_path / "run/run" / name
        ).read_bytes()
    assert history(tmp_path / "whole/run") == history(tmp_path / "run/run")


def test_the_student_learns_from_its_teacher_and_the_teacher_stays():
    s = settings(objective="rkl", teachers=1, alpha=0.0, lr=3e-3, beta=1.0)
    m, teacher = model(), model(sharp=6, seed=5).eval()
    coach, ids = c.Coach([teacher]), torch.randint(0, 50, (8, 16))
    before = [p.clone() for p in teacher.parameters()]
    optimizer = c.make_optimizer(m, s)
    losses = [c.train_step(m, optimizer, coach, ids, ids, s, 1.0)[2] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(teacher.parameters(), before))


def test_held_out_loss_does_not_depend_on_the_batch(corpus):
    m = model(V=corpus.vocabulary.size, sharp=3)
    ids = np.asarray(corpus.dev[:1000])
    losses = [c.held_out_loss(m, ids, settings(batch_size=size)) for size in (1, 7, 62)]
    assert max(losses) - min(losses) < 1e-6
    rows = torch.from_numpy(ids[: 16 * 62].astype(np.int64)).view(62, 16)
    targets = torch.from_numpy(ids[1 : 16 * 62 + 1].astype(np.int64))
    assert math.isclose(
        losses[0], F.cross_entropy(logits(m, rows).flatten(0, 1), targets).item(), rel_tol=1e-5
    )
    assert c.held_out_loss(m, ids[:16], settings()) is None


@pytest.mark.parametrize("teachers", [1, 2])
def test_a_run_is_repeatable_and_looking_changes_nothing(tmp_path, teachers):
    """The same command twice, in two folders, and once with a look at the held-out text each step:
    the same weights of student and teachers, to the byte, and the same log. GPT-2 has dropout."""
    config = brief_config(tmp_path, 'objective = "rkl"')
    for name, extra in (("a", []), ("b", []), ("c", ["--eval-every", "1"])):
        invoke("train", "-c", config, "-o", tmp_path / name / "run", "--teachers", teachers, *extra)
    folders = {name: sorted((tmp_path / name).glob("*/model.safetensors")) for name in "abc"}
    assert len(folders["a"]) == teachers + 1
    for name in "bc":
        for one, other in zip(folders["a"], folders[name]):
            assert one.relative_to(tmp_path / "a") == other.relative_to(tmp_path / name)
            assert one.read_bytes() == other.read_bytes(), (name, one)
    assert history(tmp_path / "a/run") == history(tmp_path / "b/run")
    looked = [
        line for line in history(tmp_path / "c/run") if "dev_loss" not in line or line["step"] == 6
    ]
    assert looked == history(tmp_path / "a/run") and len(history(tmp_path / "c/run")) == 12


def test_a_finished_teacher_is_used_again_and_a_changed_one_is_not(tmp_path):
    config = brief_config(tmp_path, 'objective = "rkl"\nteachers = 1', teachers="lr = 3e-3")
    out = tmp_path / "runs/one"
    invoke("train", "-c", config, "-o", out)
    (teacher,) = (tmp_path / "runs").glob("teacher-*")
    before = (teacher / "model.safetensors").stat().st_mtime_ns
    result = invoke(
        "train",
        "-c",
        config,
        "-o",
        tmp_path / "runs/two",
        "--lr",
        "1e-3",
        "--objective",
        "fkl",
        "--alpha",
        "0.3",
    )
    assert (
        "there already" in result.stderr
        and (teacher / "model.safetensors").stat().st_mtime_ns == before
    )
    invoke("train", "-c", config, "-o", tmp_path / "runs/three", "--context", "16")
    assert len(list((tmp_path / "runs").glob("teacher-*"))) == 2
    invoke("train", "-c", config, "-o", out, "--teacher", teacher, "--overwrite")
    record = json.loads((out / "run.json").read_text())
    assert record["teachers"] == [str(teacher)] and record["settings"]["tokenizer"] == str(teacher)


def test_sampled_lines_follow_the_softmax():
    """Frequencies of first tokens and of what follows each, within four standard errors; no line
    holds the token that ends it, or more tokens than allowed."""
    m, draw = model(V=6, sharp=8).eval(), torch.Generator().manual_seed(0)
    lines = c.sample_lines(m, 1, 4000, 5, draw)
    assert len(lines) == 4000 and max(map(len, lines)) == 5 and not any(1 in line for line in lines)
    for prefix in ([], [0], [4, 2]):
        drawn = [
            (line + [1])[len(prefix)]
            for line in lines
            if line[: len(prefix)] == prefix and len(line) < 5
        ]
        with torch.no_grad():
            p = logits(m, torch.tensor([[1, *prefix]]))[0, -1].softmax(-1)
        longest = [line for line in lines if line[: len(prefix)] == prefix and len(line) == 5]
        drawn += [line[len(prefix)] for line in longest]
        found = np.bincount(drawn, minlength=6) / len(drawn)
        assert (np.abs(found - p.numpy()) < 4 * np.sqrt(0.25 / len(drawn))).all(), prefix


@pytest.mark.parametrize("prefix", ["line", "document"])
def test_seqkd_learns_from_its_teachers_text(tmp_path, prefix):
    """Sampled once, whatever is trained on it; as long as the text; a text folder like any other."""
    config = brief_config(tmp_path, f'objective = "seqkd"\nteachers = 1\nprefix = "{prefix}"')
    text = tmp_path / "text"
    text.mkdir()
    lines = (TINY / "train.txt").read_text().splitlines()[:1500]
    (text / "a.train").write_text("\n".join(lines))
    (text / "dev.txt").write_text("\n".join(lines[:100]))
    invoke("train", "-c", config, "--text", text, "-o", tmp_path / "runs/one")
    (sampled,) = (tmp_path / "runs").glob("seqkd-*/sampled.train")
    before, written = sampled.read_bytes(), sampled.stat().st_mtime_ns
    args = ["train", "-c", config, "--text", text]
    invoke(*args, "-o", tmp_path / "runs/two")
    assert sampled.stat().st_mtime_ns == written
    weights = [
        (tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("one", "two")
    ]
    assert weights[0] == weights[1]
    invoke(*args, "-o", tmp_path / "again/one")
    (again,) = (tmp_path / "again").glob("seqkd-*/sampled.train")
    assert again.read_bytes() == before
    for folder in (tmp_path / "runs", tmp_path / "again"):
        (original,) = folder.glob("text-*/train.ids")
        ids = sampled.with_suffix(".ids").stat().st_size / original.stat().st_size
        assert 0.98 < ids < 1.3  # a batch of lines more, which is cut off
    invoke(*args, "-o", tmp_path / "seed/one", "--seed", "7")
    (other,) = (tmp_path / "seed").glob("seqkd-*/sampled.train")
    assert other.read_bytes() != before
    record = json.loads((tmp_path / "runs/one/run.json").read_text())
    assert record["digests"]["text"] == c.file_digest(sampled) and record["digests"]["teachers"]
    assert not any("kl" in line for line in history(tmp_path / "runs/one"))
    invoke(*args[:-2], "--text", sampled.parent, "-o", tmp_path / "other/one", "--objective", "ce")


@pytest.mark.parametrize("prefix", ["line", "document", "none"])
def test_the_sampled_text_is_the_teachers(tmp_path, corpus, monkeypatch, prefix):
    """What sample_lines draws, from the token that begins a line in the text, is what is learnt;
    a teacher that has nothing to say, and one that is ruined, are one sentence each."""
    vocabulary, s = corpus.vocabulary, settings(objective="seqkd", teachers=1, prefix=prefix)
    said = c.encode(vocabulary, [["the dog sees it."]], prefix, np.uint16).tolist()
    said = {"line": said[1:], "document": said[1:-1], "none": said[:-1]}[prefix]
    starts, drawn = [], [said, []]
    monkeypatch.setattr(
        c, "sample_lines", lambda m, start, *rest: starts.append(start) or list(drawn)
    )
    c.save_model(tmp_path / "t", model(V=vocabulary.size), vocabulary)
    teacher = c.Run("teacher", tmp_path / "t")
    small = corpus._replace(train=corpus.train[:100])
    found = c.sampled_corpus(teacher, small, s, tmp_path, "cpu")
    newline = vocabulary.tokenizer.encode("\n", add_special_tokens=False).ids[-1]
    assert set(starts) == {vocabulary.prefix_id if prefix == "line" else newline}
    line = [vocabulary.prefix_id, *said] if prefix == "line" else [*said, newline]
    first = [vocabulary.prefix_id] * (prefix == "document")
    assert found.train.tolist() == (first + line * 100)[:100]
    assert found.digests["text"] != corpus.digests["text"] and found.dev is corpus.dev
    drawn[:] = [[], []]
    with pytest.raises(c.click.ClickException, match="nothing but empty lines"):
        c.sampled_corpus(teacher, small._replace(train=corpus.train[:50]), s, tmp_path, "cpu")
    ruined = model(V=vocabulary.size)
    with torch.no_grad():
        ruined.head[0, 0] = math.nan
    c.save_model(tmp_path / "t", ruined, vocabulary)
    with pytest.raises(c.click.ClickException, match="not all finite"):
        c.check_teacher(teacher, corpus)


@pytest.mark.parametrize("objective", c.DIVERGENCES)
def test_every_divergence_trains(objective):
    """A student that sees nothing but the divergence comes closer to its teacher."""
    s = settings(objective=objective, teachers=1, alpha=0.0, lr=3e-3, beta=1.0)
    m, coach = model(), c.Coach([model(sharp=6, seed=5).eval()])
    ids, optimizer = torch.randint(0, 50, (8, 16)), c.make_optimizer(m, s)
    losses = [c.train_step(m, optimizer, coach, ids, ids, s, 1.0)[2] for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_plan_gives_the_weights_and_names_what_is_idle(tmp_path):
    """The loss as it is weighed in effect; a flag that the objective does not read is named."""
    args = ["train", "-c", brief_config(tmp_path), "--dry-run", "-o", tmp_path / "runs/x"]
    args += ["--teachers", "1", "--objective", "rkl", "--alpha", "0.25", "--reduction", "batchmean"]
    result = invoke(
        *args, "--skew", "0.2", "--beta", "0.7", "--progressive", "--mixing", "constant"
    )
    loss = "loss 0.25 ce + 96 rkl at temperature 2, beta 0.7 falling,"  # 0.75 * 32 * 2^2
    assert loss in result.stdout
    assert result.stderr.count("no part") == 1
    assert "--skew has no part in --objective rkl" in result.stderr
    result = invoke(*args, "--temperature", "3", "--mixing", "differentiated")
    assert "loss 0.25 ce + 216 rkl at temperature 3," in result.stdout
    assert "--mixing has no part" in result.stderr
    for objective in ("ce", "seqkd"):
        given = ["--objective", objective, "--beta", "0.3"]
        result = invoke(*args[:6], *given, *["--teachers", "1"] * (objective == "seqkd"))
        assert f"--beta has no part in --objective {objective}" in result.stderr


def test_a_run_says_what_it_is(tmp_path):
    result = invoke(
        "train", "-c", brief_config(tmp_path), "-o", tmp_path / "run", "--prefix", "document"
    )
    assert (
        "parameters" in result.stderr and "to go" in result.stderr and "held out" in result.stderr
    )
    assert "mean of 20 paradigms" in result.stdout and str(tmp_path / "run") in result.stdout
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["settings"]["prefix"] == "document" and record["prefix_token"] == "<s>"
    assert {"text", "tokenizer", "choobaca.py", "teachers"} == record["digests"].keys()
    lines = history(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6] and "dev_loss" in lines[-1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision(precision):
    """Near the step in fp32; weights and gradients stay fp32; fp16's scaled gradients come back."""
    found = {}
    for name in ("fp32", precision):
        s = settings(objective="rkl", teachers=1, precision=name, lr=1e-3)
        m, draw = model(sharp=3), torch.Generator().manual_seed(0)
        ids = torch.randint(0, 50, (8, 16), generator=draw)
        scaler = torch.amp.GradScaler("cpu", enabled=name == "fp16")
        coach = c.Coach([model(sharp=3, seed=5).eval()], c.step_dtype(s, "cpu"))
        row = c.train_step(m, c.make_optimizer(m, s), coach, ids, ids.roll(-1, 1), s, 1.0, scaler)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in m.parameters())
        found[name] = row, torch.cat([p.grad.flatten() for p in m.parameters()])
    (row, gradient), (half_row, half_gradient) = found["fp32"], found[precision]
    assert torch.allclose(row, half_row, rtol=0.02) and not torch.equal(row, half_row)
    assert F.cosine_similarity(gradient, half_gradient, dim=0) > 0.999


def test_fp16_leaves_out_a_step_whose_gradient_is_too_large():
    s, m = settings(precision="fp16"), model()
    ids = torch.randint(0, 50, (8, 16))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = m.head.clone()
    row = c.train_step(m, c.make_optimizer(m, s), None, ids, ids, s, 1.0, scaler)
    assert row[0].isfinite() and not row[3].isfinite()
    assert torch.equal(m.head, before) and scaler.get_scale() == 2.0**119


def test_a_run_in_half_precision_with_half_precise_teachers(tmp_path):
    config = brief_config(tmp_path, 'objective = "rkl"\nteachers = 1')
    losses = {}
    for name in ("fp32", "fp16", "bf16"):
        out = tmp_path / name / "run"
        invoke("train", "-c", config, "-o", out, "--teacher-precision", name)
        assert all(line["loss"] > 0 for line in history(out)[:-1])
        losses[name] = history(out)[-1]["dev_loss"]
        # The teacher's own training, and how it is scored, do not depend on how it coaches.
        (teacher,) = (tmp_path / name).glob("teacher-*/model.safetensors")
        assert teacher.read_bytes() == next(tmp_path.glob("fp32/t*/model.safetensors")).read_bytes()
    assert len(set(losses.values())) == 3 and max(losses.values()) - min(losses.values()) < 1e-3
    invoke("train", "-c", config, "-o", tmp_path / "half/run", "--precision", "fp16")
    assert abs(history(tmp_path / "half/run")[-1]["dev_loss"] - losses["fp32"]) < 0.01


def processes(folder: Path, *args, size: int = 2) -> list[subprocess.Popen]:
    """A training in several processes, as torchrun starts them, each with its output in a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(size):
        own = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with open(folder / f"rank{rank}.txt", "w") as output:
            command = [sys.executable, HOME / "choobaca.py", "train", *map(str, args)]
            started.append(subprocess.Popen(
                command, env=os.environ | address | own, stdout=output, stderr=output, cwd=folder))
    return started


def test_two_processes_train_the_model_of_one(tmp_path):
    """To 1e-6, teachers and micro-batches and all; only the first writes."""
    config = brief_config(tmp_path, 'objective = "rkl"\nmicro_batch = 2', "micro_batch = 4")
    config.write_text(config.read_text().replace("dropout = 0.1", ""))
    args = ["-c", config, "--teachers", "2"]
    invoke("train", *args, "-o", tmp_path / "one/run")
    for process in processes(tmp_path, *args, "-o", tmp_path / "two/run"):
        assert process.wait(300) == 0, (tmp_path / "rank0.txt").read_text()[-2000:]
    for one in sorted((tmp_path / "one").glob("*/model.safetensors")):
        two = tmp_path / "two" / one.relative_to(tmp_path / "one")
        for name, weight in c.read_safetensors(one).items():
            gap = (weight - c.read_safetensors(two)[name]).abs()
            if name.endswith("c_attn.bias"):  # softmax does not see a bias of all keys: AdamW moves
                gap.chunk(3)[1].zero_()  # it by what rounding leaves of a gradient of 0
            assert gap.max() < 1e-6, name
    logs = [history(tmp_path / name / "run") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 7
    for one, two in zip(*logs):
        assert all(math.isclose(one[key], two[key], rel_tol=1e-4) for key in one), (one, two)
    assert "mean of" in (tmp_path / "rank0.txt").read_text()
    assert "mean of" not in (tmp_path / "rank1.txt").read_text()
    odd = ["--objective", "ce", "--batch-size", "9", "--micro-batch", "3"]
    for process in processes(tmp_path, "-c", config, *odd, "-o", tmp_path / "x/r"):
        assert process.wait(60) == 1
    assert "2 processes cannot share --batch-size 9" in (tmp_path / "rank0.txt").read_text()


def test_a_process_that_dies_ends_the_others(tmp_path):
    args = ["-c", brief_config(tmp_path), "--steps", "100000", "-o", tmp_path / "run"]
    first, second = processes(tmp_path, *args)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/log.jsonl").exists() or not history(tmp_path / "run"):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    second.kill()
    assert first.wait(60) == 1
    text = (tmp_path / "rank0.txt").read_text()
    assert "another process of this run has ended" in text and "Traceback" not in text


# Trains, is killed at a random moment, goes on, 25 times; files are written slowly. Children are
# forked, for to import torch takes longer than all the rest.
KILLER = """
import glob, os, random, signal, sys, time
import choobaca as c

fsync, draw, out = os.fsync, random.Random(int(sys.argv[1])), sys.argv[2]
os.fsync = lambda file: (time.sleep(0.03 * (kills < 25)), fsync(file))
files = os.path.dirname(out) + "/*/*"
kills = writing = status = 0
while True:
    begin, pid = time.time(), os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        c.cli(sys.argv[3:] + ["--out", out, "--resume"])
    if kills < 25:
        while not any(os.path.getmtime(log) > begin for log in glob.glob(files + "log.jsonl")):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        kills += 1
    status = os.waitpid(pid, 0)[1]
    writing += os.WIFSIGNALED(status) and bool(glob.glob(files + "state.pt.*partial"))
    if not os.WIFSIGNALED(status):
        break
print(status, kills, writing)
"""


@pytest.mark.parametrize("teachers", [0, 2])
def test_killed_at_any_moment_a_run_ends_as_it_would_have(tmp_path, teachers):
    """25 times, some of them while a checkpoint is written: the same weights, to the byte, and the
    same log. Without teachers, with accumulation; with two, of which one has dropout."""
    extra = 'objective = "rkl"' if teachers else "micro_batch = 2"
    config = brief_config(tmp_path, extra)
    args = ["train", "-c", str(config), "--steps", "100", "--eval-every=7", "--save-minutes=0"]
    args += ["--teachers", "2"] if teachers else ["--objective", "ce", "--steps", "300"]
    run = dict(
        cwd=HOME, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    whole = [sys.executable, "choobaca.py", *args, "--out", tmp_path / "whole/run"]
    assert subprocess.run(whole, **run).returncode == 0
    (text,) = (tmp_path / "whole").glob("text-*")
    shutil.copytree(text, tmp_path / "killed" / text.name)
    killed = [sys.executable, "-c", KILLER, "1", str(tmp_path / "killed/run"), *args]
    done = subprocess.run(killed, **run, timeout=300)
    status, kills, writing = map(int, done.stdout.split())
    assert (status, kills) == (0, 25) and writing >= 3, (done.stdout, done.stderr)
    for folder in sorted((tmp_path / "whole").iterdir()):
        other = tmp_path / "killed" / folder.name
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in other.iterdir())
        if not folder.name.startswith("text"):
            for name in ("model.safetensors", "config.json", "tokenizer.json"):
                assert (folder / name).read_bytes() == (other / name).read_bytes()
            assert history(folder) == history(other)


def test_a_signal_ends_a_run_after_the_step_and_resume_goes_on(tmp_path, monkeypatch):
    """130 for Ctrl-C, 143 for SIGTERM; what was learnt is kept, a changed flag is named."""
    config, out = brief_config(tmp_path), tmp_path / "runs/x"
    invoke("train", "-c", config, "-o", tmp_path / "whole/x")
    args, step = ["train", "-c", config, "-o", out], c.train_step
    for number, after, code in ((signal.SIGINT, 2, 130), (signal.SIGTERM, 2, 143)):
        taken = []

        def signalled(*rest):
            taken.append(step(*rest))
            if len(taken) == after:
                os.kill(os.getpid(), number)
            return taken[-1]

        monkeypatch.setattr(c, "train_step", signalled)
        result = invoke(*args, *["--resume"] * (number == signal.SIGTERM), code=code)
        done = after * (1 + (number == signal.SIGTERM))
        assert f"stopped after step {done} of 6" in result.stderr and "--resume" in result.stderr
        assert len(taken) == after and (out / "state.pt").exists() and len(history(out)) == done
        assert signal.getsignal(number) not in (signalled, None)
    monkeypatch.setattr(c, "train_step", step)
    assert "holds an interrupted run: add --resume" in invoke(*args, code=1).stderr
    changed = invoke(*args, "--resume", "--lr", "0.5", code=1).stderr
    assert f"--lr is 0.5, but {out} was begun with 0.003" in changed
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    (other / "train.txt").write_text((TINY / "train.txt").read_text() + "a dog\n")
    assert "the digest of text" in invoke(*args, "--resume", "--text", other, code=1).stderr
    before = (out / "state.pt").read_bytes()
    (out / "state.pt").write_bytes(before[: len(before) // 2])
    assert "state.pt is damaged" in invoke(*args, "--resume", code=1).stderr
    (out / "state.pt").write_bytes(before)
    result = invoke(*args, "--resume")
    assert "mean of 20" in result.stdout and not (out / "state.pt").exists()
    one, other = (f / "model.safetensors" for f in (out, tmp_path / "whole/x"))
    assert one.read_bytes() == other.read_bytes() and history(out) == history(tmp_path / "whole/x")
    assert "there already" in invoke(*args, "--resume").stderr
    assert "add --overwrite" in invoke(*args, code=1).stderr
    assert "--lr is 0.5" in invoke(*args, "--resume", "--lr", "0.5", code=1).stderr


def test_a_signal_in_the_last_step_ends_the_command_too(tmp_path, monkeypatch):
    """The teacher is whole, and the student is what --resume goes on with; so is what a run that
    was killed at its very beginning has left."""
    config, step = brief_config(tmp_path), c.train_step
    args = ["train", "-c", config, "--objective", "rkl", "--teachers", "1"]
    invoke(*args, "-o", tmp_path / "whole/x")
    taken = []

    def signalled(*rest):
        taken.append(step(*rest))
        if len(taken) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(c, "train_step", signalled)
    result = invoke(*args, "-o", tmp_path / "part/x", code=130)
    assert "stopped after step 6 of 6" in result.stderr and result.stdout == ""
    (teacher,) = tmp_path.glob("part/teacher-*")
    assert (teacher / "model.safetensors").exists() and not (tmp_path / "part/x").exists()
    (tmp_path / "part/x").mkdir()
    (tmp_path / "part/x/log.jsonl").touch()
    (tmp_path / "part/x/run.json.partial").touch()
    invoke(*args, "-o", tmp_path / "part/x", "--resume")
    one, other = (tmp_path / name / "x/model.safetensors" for name in ("whole", "part"))
    assert one.read_bytes() == other.read_bytes() and len(taken) == 12


def test_resume_wants_the_device_and_the_processes_of_the_begin(tmp_path, monkeypatch):
    config, out, step = brief_config(tmp_path), tmp_path / "x", c.train_step

    def stopped(*rest):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*rest)

    monkeypatch.setattr(c, "train_step", stopped)
    invoke("train", "-c", config, "-o", out, code=130)
    facts = json.loads((out / "run.json").read_text())
    for changed in ({"processes": 2}, {"device": "NVIDIA H200"}):
        (out / "run.json").write_text(json.dumps(facts | changed))
        said = invoke("train", "-c", config, "-o", out, "--resume", code=1).stderr
        assert "go on as it was begun" in said and (out / "state.pt").exists()


def test_what_another_command_has_trained_meanwhile_is_kept(tmp_path, monkeypatch):
    """Of two commands with one teacher, the second to come to it finds it whole."""
    config, locked = brief_config(tmp_path), c.locked
    args = ["train", "-c", config, "--objective", "rkl", "--teachers", "1", "-o"]
    invoke(*args, tmp_path / "a/x")
    (teacher,) = tmp_path.glob("a/teacher-*")

    @contextlib.contextmanager
    def late(folder):
        if folder.name == teacher.name:
            shutil.copytree(teacher, folder)
            os.utime(folder / "model.safetensors", (1, 1))
        with locked(folder):
            yield

    monkeypatch.setattr(c, "locked", late)
    invoke(*args, tmp_path / "b/x")
    kept = tmp_path / "b" / teacher.name / "model.safetensors"
    assert kept.stat().st_mtime == 1 and (tmp_path / "b/x/model.safetensors").exists()


def test_fp16_goes_on_with_its_loss_scale(tmp_path, monkeypatch):
    """Its checkpoint holds the scale, too: from 2^20 it falls, and not in the same place twice."""
    scaler = torch.amp.GradScaler
    large = functools.partial(scaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    config, step = brief_config(tmp_path), c.train_step
    args = ["train", "-c", config, "--precision", "fp16", "--steps", "12"]
    invoke(*args, "-o", tmp_path / "whole")
    taken = []

    def stopped(*rest):
        taken.append(step(*rest))
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(c, "train_step", stopped)
    invoke(*args, "-o", tmp_path / "part", code=130)
    invoke(*args, "-o", tmp_path / "part", "--resume")
    assert not all(math.isfinite(line.get("norm", 0)) for line in history(tmp_path / "whole"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()


def test_two_processes_stop_and_go_on_as_one(tmp_path):
    """SIGTERM to one of them ends both after the same step, and what they learn is the same."""
    args = ["-c", brief_config(tmp_path), "--steps", "400"]
    for process in processes(tmp_path, *args, "-o", tmp_path / "whole"):
        assert process.wait(300) == 0
    first, second = processes(tmp_path, *args, "-o", tmp_path / "part")
    while not (tmp_path / "part/log.jsonl").exists() or not history(tmp_path / "part"):
        time.sleep(0.05)
    second.send_signal(signal.SIGTERM)
    assert (first.wait(60), second.wait(60)) == (143, 143), (tmp_path / "rank0.txt").read_text()
    assert 0 < len(history(tmp_path / "part")) < 400
    for process in processes(tmp_path, *args, "-o", tmp_path / "part", "--resume"):
        assert process.wait(300) == 0, (tmp_path / "rank0.txt").read_text()
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "part"))
    assert one.read_bytes() == other.read_bytes()
    assert history(tmp_path / "whole") == history(tmp_path / "part")


def test_a_signal_that_comes_while_the_others_are_asked_waits(monkeypatch):
    """Else one process would stop, and the others go on without it."""
    signals = []
    monkeypatch.setattr(c, "rank_and_size", lambda: (1, 2))
    monkeypatch.setattr(c, "sum_over_processes", lambda tensors: signals.append(signal.SIGINT))
    assert c.stop_signal(signals, "cpu", 3) == 0
    assert c.stop_signal(signals, "cpu", 4) == signal.SIGINT and len(signals) == 2


@pytest.mark.skipif(c.fcntl is None, reason="no locks here")
def test_a_second_process_in_a_run_is_refused(tmp_path):
    config, out = brief_config(tmp_path), tmp_path / "run"
    with c.locked(out):
        (out / "run.json").write_text("{}")
        code = f"import choobaca as c; c.cli(['train', '-c', {str(config)!r}, '-o', {str(out)!r}])"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
        assert done.returncode == 1 and "another process is training this run" in done.stderr
    invoke("train", "-c", config, "-o", out)


def limited(args: list, limit: int, folder: Path) -> subprocess.CompletedProcess:
    """A command whose files may not grow beyond `limit` bytes, as on a disk that is full."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    code += "; import choobaca as c, sys; c.cli(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(c.resource is None, reason="no limits here")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Checkpoints that are too large for it, then a log; what was there stays, and goes on."""
    config, out, step = brief_config(tmp_path), tmp_path / "run", c.train_step
    args = ["train", "-c", config, "-o", out, "--save-minutes", "0"]
    invoke(*args[:-2], "-o", tmp_path / "whole")

    def stopped(*rest):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*rest)

    monkeypatch.setattr(c, "train_step", stopped)
    invoke(*args, code=130)
    monkeypatch.setattr(c, "train_step", step)
    before = (out / "state.pt").read_bytes()
    for limit, name in ((len(before) // 2, "state.pt"), (200, "log.jsonl")):
        done = limited([*args, "--resume"], limit, out)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert name in done.stderr and "room on the disk" in done.stderr, done.stderr
        assert (out / "state.pt").read_bytes() == before
        assert not list(out.glob("*.partial"))
    invoke(*args, "--resume")
    assert history(out) == history(tmp_path / "whole")
    names = (out / "model.safetensors", tmp_path / "whole/model.safetensors")
    assert names[0].read_bytes() == names[1].read_bytes()


def test_memory_that_runs_out_names_the_flag(tmp_path, monkeypatch):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"),
    ):
        monkeypatch.setattr(c, "train_step", lambda *_, error=error: (_ for _ in ()).throw(error))
        args = ["train", "-c", brief_config(tmp_path), "-o", tmp_path / "run", "--overwrite"]
        told = invoke(*args, code=1).stderr
        assert "--micro-batch" in told and "--activation-checkpointing" in told
    monkeypatch.setattr(c, "train_step", lambda *_: {}["a fault of ours"])
    with pytest.raises(KeyError):
        CliRunner().invoke(c.cli, [str(a) for a in args], catch_exceptions=False)


# -----------------------------------------------------------------------------
# 9. Minimal pairs


def sentences(*texts: str, contexts: tuple = ("", "")) -> list[c.Pair]:
    """Pairs of neighbours."""
    return [
        c.Pair((contexts[0], " " + good), (contexts[1], " " + bad), "one", "all", f"file, line {i}")
        for i, (good, bad) in enumerate(zip(texts[::2], texts[1::2]), 1)
    ]


def plain_score(m, vocabulary, text: tuple[str, str]) -> float:
    """A text alone, by lm-evaluation-harness's rule, all logits at once, in float64."""
    given, scored = text
    if not given:
        ids, known = vocabulary.tokenizer.encode(scored, add_special_tokens=False).ids, 1
        ids = [vocabulary.prefix_id, *ids]
    else:
        spaces = len(given) - len(given.rstrip())
        given, scored = given.rstrip(), given[len(given) - spaces :] + scored
        ids = vocabulary.tokenizer.encode(given + scored, add_special_tokens=False).ids
        known = len(vocabulary.tokenizer.encode(given, add_special_tokens=False).ids)
    log_p = logits(m, torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][known - 1 :].sum().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 7, 128])
def test_tries_score_as_one_text_at_a_time_does(vocabulary, kind, nodes, monkeypatch):
    """Beginnings of others, equal ones, one token, odd text, many that share, rows cut anywhere."""
    monkeypatch.setattr(c, "NODES", nodes)
    m = model(V=vocabulary.size, sharp=5, **kind).eval()
    texts = ["The dog ran.", "The dog ran", "A", "A", "The", "The dogs that the cat likes ran by."]
    texts += ["The dog ran.", "\u00e9\u2028\U0001f600 x", "No cat.", "  two  spaces ", "A: b\nC: d", "1"]
    draw = np.random.default_rng(0)
    words = "The A dog dogs cat ran runs by the tree .".split()
    texts += [" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(200)]
    pairs = sentences(*texts)
    pairs += sentences("ran by.", "runs.", "ran.", "A.", contexts=("The dog  ", "The cat"))
    found = c.score_pairs(m, vocabulary, pairs, "test")
    for pair, scores in zip(pairs, found):
        for text, score in zip(pair[:2], scores):
            assert abs(score - plain_score(m, vocabulary, text)) < 1e-4, text
    assert found[1, 0] == found[1, 1] and found[0, 0] == found[3, 0]


def test_a_trie_holds_no_beginning_twice():
    """The docstring's example, with numbers for words."""
    trie = c.Trie()
    for i, ids in enumerate([[0, 1, 2, 4], [0, 1, 2, 5], [0, 1, 3, 4]]):
        trie.add(i, ids, 1)
    assert (trie.ids, trie.depth, trie.end) == ([0, 1, 2, 3], [0, 1, 2, 2], [4, 4, 3, 4])
    assert list(trie.edges) == [(0, 1), (1, 2), (2, 4), (2, 5), (1, 3), (3, 4)]
    assert trie.sequences == {0: [0, 1, 2], 1: [0, 1, 3], 2: [0, 4, 5]}


def test_no_array_of_all_logits_is_held_in_scoring(vocabulary):
    m, tries = model(V=5000).eval(), []
    draw = np.random.default_rng(0)
    for _ in range(8):
        tries.append(c.Trie())
        for i in range(30):
            tries[-1].add(i, [1, *draw.integers(0, 5000, 9).tolist()], 1)
    with torch.inference_mode(), Largest() as largest:
        c.score_tries(m, tries)
    assert largest.elements <= 256 * 5000 < sum(len(trie.ids) for trie in tries) * 5000


def write_pairs(folder: Path, name: str, pairs: list, **keys) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"sentence_good": good, "sentence_bad": bad, **keys}) for good, bad in pairs
    ]
    (folder / name).write_text("\n".join(lines) + "\n")


def test_ties_means_and_groups(tmp_path, vocabulary):
    write_pairs(
        tmp_path,
        "one.jsonl",
        [("A dog.", "A dog."), ("A cat.", "A cat.")],
        UID="one",
        linguistics_term="s-selection",
    )
    write_pairs(
        tmp_path,
        "two.jsonl",
        [("The dog ran.", "The dog ran by."), ("The dog ran by.", "The dog ran.")] * 3,
        UID="two",
        linguistics_term="argument_structure",
    )
    write_pairs(tmp_path, "three.jsonl", [("The cat sat.", "The cat sat.")])
    pairs = c.read_pairs(tmp_path)
    result, scores = c.evaluate(
        model(V=vocabulary.size, sharp=5).eval(), vocabulary, pairs, "test"
    )
    assert scores.shape == (9, 2)
    rows = result["paradigms"]
    assert [rows[uid]["accuracy"] for uid in ("one", "two", "three")] == [1.0, 0.5, 1.0]
    assert (rows["one"]["ties"], rows["two"]["ties"], result["ties"], result["n"]) == (2, 0, 3, 9)
    assert math.isclose(rows["two"]["stderr"], np.std([1, 0] * 3, ddof=1) / math.sqrt(6))
    assert math.isclose(result["accuracy"], 2.5 / 3)
    assert set(result["phenomena"]) == {"argument_structure", "three"}
    assert result["phenomena"]["argument_structure"]["accuracy"] == 0.75
    table = c.pairs_table({"a": result, "b": result}, paradigms=True)
    assert "  two" in table and "  two" not in c.pairs_table({"a": result}, paradigms=False)
    assert "argument_structure" in table and "mean of 3 paradigms" in table and "75.0" in table


def test_filtered_blimp():
    """A pair goes if either sentence has one of the rare words, whatever its case, as a whole."""
    rare = set((HOME / "data/blimp_rare_words.txt").read_text().split())
    assert len(rare) == 102
    kept = ["The warp ran.", "A husband left."], ["Scorch it.", "Karl ran."]
    gone = ["The dog ran.", "Karla's dog ran."], ["Ex-husbands left.", "It left."]
    found = [c.is_filtered_out(pair, rare) for two in (*kept, *gone) for pair in sentences(*two)]
    assert found == [False, False, True, True]


SHARED = HOME.parent / "shared/data/blimp.tar.xz"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real BLiMP")
def test_filtered_blimp_has_babylms_pairs(tmp_path):
    with tarfile.open(SHARED) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = {path.parent for path in tmp_path.rglob("*.jsonl")}
    pairs = c.read_pairs(folder, filtered=True)
    sizes = {uid: len(group) for uid, group in c.group_by(pairs, lambda p: p.paradigm).items()}
    assert len(pairs) == 59_875 and len(sizes) == 67
    assert (sizes["passive_1"], sizes["causative"], sizes["wh_island"]) == (840, 818, 960)
    assert len({pair.phenomenon for pair in pairs}) == 12
    assert sum(pair.good == pair.bad for pair in c.read_pairs(folder)) == 7
    assert 6_600 <= len(c.read_pairs(folder, 6_700)) <= 6_800


def write_ewok(folder: Path, rows: list[tuple]) -> None:
    """Lines of EWoK's kind; no line of EWoK."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("Domain", "Context1", "Context2", "Target1", "Target2")
    lines = [json.dumps(dict(zip(keys, row))) for row in rows]
    (folder / "made-up.jsonl").write_text("\n".join(lines) + "\n")


def test_ewok_by_both_rules(tmp_path, vocabulary):
    """BabyLM's: one context, two targets, no prefix token. Its authors': two contexts, one target,
    and half a point for a tie."""
    row = ("dogs", "The dog ran.", "The dog sat. ", "A cat saw it.", "A cat ate it.")
    write_ewok(tmp_path, [row, ("dogs", "Same.", "Same.", "It ran.", "It sat.")])
    m = model(V=vocabulary.size, sharp=5).eval()
    pairs = c.read_pairs(tmp_path)
    assert pairs[0].good == ("The dog ran.", " A cat saw it.")
    assert pairs[0].bad == ("The dog ran.", " A cat ate it.")
    for one, scores in zip(pairs, c.score_pairs(m, vocabulary, pairs, "test")):
        wanted = [plain_score(m, vocabulary, text) for text in one[:2]]
        assert np.allclose(scores, wanted, atol=1e-4) and one.phenomenon == "dogs"
    pairs = c.read_pairs(tmp_path, contexts=True)
    assert pairs[0].bad == ("The dog sat. ", " A cat saw it.")
    result, scores = c.evaluate(m, vocabulary, pairs, "test", 0.5)
    assert scores[1, 0] == scores[1, 1] and result["ties"] == 1
    assert result["accuracy"] == (float(scores[0, 0] > scores[0, 1]) + 0.5) / 2
    assert "half a point each" in c.pairs_table({"a": result}, paradigms=True)


def test_every_suite_at_once_and_the_papers_values(tmp_path, saved):
    write_pairs(tmp_path / "blimp", "a.jsonl", [("A dog ran.", "A dog run."), ("A", "B")])
    write_pairs(tmp_path / "supplement", "hypernym.jsonl", [("It is a dog.", "It is a dogs.")])
    write_ewok(tmp_path / "ewok", [("made-up", "Hush.", "Hush!", "Unspeakable one.", "Hidden.")])
    args = ["eval-blimp", "-m", saved, "-d", tmp_path, "--suite", "all"]
    result = invoke(*args, "--paper")
    for shown in ("hypernym", "made-up", "RV-1-24+", "48.9", "come from different runs"):
        assert shown in result.stdout, shown
    found = json.loads(invoke(*args, "--json").stdout)
    assert list(found["suites"]) == ["blimp", "supplement", "ewok"]
    assert found["suites"]["supplement"]["paradigms"]["hypernym"]["n"] == 1
    assert [found["suites"][name]["prefix_token"] for name in c.SUITES] == ["<s>", "<s>", None]
    kept = [path.read_text() for suite in c.SUITES for path in saved.glob(f"{suite}-*.jsonl")]
    assert len(kept) == 3
    kept = "".join(kept)
    assert "Unspeakable" not in kept + result.output and "dog" not in kept
    (tmp_path / "ewok/made-up.jsonl").unlink()
    assert "ewok is left out" in invoke(*args).stderr
    args[4] = tmp_path / "ewok"
    assert "holds none of blimp, supplement, ewok" in invoke(*args, code=1).stderr
    assert [len(c.read_published(suite)) for suite in c.SUITES] == [13, 6, 12]
    assert c.read_published("blimp")["mean"]["RV-1-24"] == "69.0"


def test_ties_and_lost_scores_are_counted_and_said(capsys):
    scores = np.array([[-1.0, -2.0], [-3.0, -3.0], [math.nan, -1.0], [-2.0, -1.0], [-math.inf] * 2])
    result = c.summarise(sentences(*"ABCDEFGHIJ"), scores)
    assert (result["accuracy"], result["ties"], result["not_finite"]) == (0.4, 2, 2)
    pairs = sentences("A", "A", "A.", "B.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "score_pairs", lambda *_: np.array([[-1.0, -1.0], [math.nan, -1.0]]))
        c.evaluate(None, None, pairs, "test")
    said = capsys.readouterr().err
    assert "1 of 2 pairs have two equal scores" in said and "no finite number" in said


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (9, 3), (40, 61), (5000, 4800)])
def test_mcnemar_is_a_fair_coin(gained, lost):
    n, k = gained + lost, min(gained, lost)
    wanted = min(1, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert math.isclose(c.mcnemar(gained, lost), wanted, rel_tol=1e-9)


@pytest.mark.parametrize("P", [67, 20, 5, 2])
@pytest.mark.parametrize("spread", [0.0, 0.08])
def test_an_interval_covers_what_is_true_as_often_as_it_says(P, spread):
    """Paradigms differ by `spread` in how much better the second model is there, and the mean of
    all that might have been drawn is known here. 95 % within the error of 300 trials; of two
    paradigms it may be less."""
    draw, covered = np.random.default_rng(1), 0
    for trial in range(300):
        effects = 0.03 + spread * draw.standard_normal(P)
        better, worse = (0.2 + effects) / 2, (0.2 - effects) / 2
        chances = np.clip(np.stack([better, worse, 1 - better - worse], 1), 0, 1)
        counts = [draw.multinomial(300, chance / chance.sum()) for chance in chances]
        gaps = [np.repeat([1.0, -1.0, 0.0], count) for count in counts]
        low, high = c.confidence_interval(gaps, 200, trial)
        covered += low <= 0.03 <= high
    assert (0.91 if P > 2 else 0.8) < covered / 300 < 0.985, covered / 300


def test_compare(tmp_path, vocabulary):
    """A model against one that guesses, against its like, against itself; and what cannot be."""
    pairs = [
        c.Pair(("", f" {i}"), ("", f" {i}b"), f"p{i % 10}", f"term{i % 2}", f"a.jsonl, line {i}")
        for i in range(2000)
    ]
    draw = np.random.default_rng(0)
    for name, sure in (("guess", 0.5), ("good", 0.8), ("same", 0.8)):
        c.save_model(tmp_path / name, model(V=vocabulary.size), vocabulary)
        right = draw.random(2000) < sure
        c.keep_scores(
            tmp_path / name, "blimp", pairs, np.where(right[:, None], [-1.0, -2.0], [-2.0, -1.0])
        )
    guess, good, same = (str(tmp_path / name) for name in ("guess", "good", "same"))
    rows = json.loads(invoke("compare", guess, good, same, "--json").stdout)
    assert [each["other"] for each in rows] == [good, same]
    assert [row["phenomenon"] for row in rows[0]["rows"]] == ["term0", "term1", "all"]
    assert all(row["verdict"] == "better" and row["p"] < 1e-9 for row in rows[0]["rows"])
    one = c.Judged([("term", "p", 1)], np.ones(1)), c.Judged([("term", "p", 1)], np.zeros(1))
    assert {row["verdict"] for row in c.compare_scores(*one, 100, 0)} == {
        "not distinguishable on these pairs"
    }
    whole = rows[0]["rows"][-1]
    assert math.isclose(whole["difference"], whole["other"] - whole["first"])
    assert whole["low"] < 0.3 < whole["high"] and whole["n"] == 2000 and whole["paradigms"] == 10
    assert "worse" in invoke("compare", good, guess).stdout
    assert invoke("compare", good, good).stdout.count("+0.00 (  +0.00 to   +0.00)") == 3
    for other in (same, good):
        whole = invoke("compare", good, other).stdout.splitlines()[-4]
        assert whole.startswith("all") and whole.endswith("not distinguishable")
    assert invoke("compare", guess, good).stdout == invoke("compare", guess, good).stdout
    c.keep_scores(Path(same), "blimp", pairs[:3], np.zeros((3, 2)))  # a sample replaces nothing
    (file,) = (path.name for path in Path(good).glob("blimp-*.jsonl"))
    assert len(list(Path(same).glob("blimp-*.jsonl"))) == 2
    assert invoke("compare", guess, same, "--json").exit_code == 0
    lines = (Path(same) / file).read_text().splitlines()
    turned, empty = [lines[0], *lines[:0:-1]], [lines[0].replace('"pairs"', '"x"'), *lines[1:]]
    for damage, wanted in (
        (lines[:-1], "is damaged"),
        (["[]"], "is damaged"),
        (empty, "is damaged"),
        (turned, "name other pairs"),
    ):
        (Path(same) / file).write_text("\n".join(damage))
        assert wanted in invoke("compare", good, same, code=1).stderr
    (Path(same) / file).unlink()
    assert "no same pairs of blimp" in invoke("compare", good, same, code=1).stderr
    c.save_model(Path(good), model(V=vocabulary.size, seed=1), vocabulary)
    assert "other weights" in invoke("compare", good, guess, code=1).stderr
    assert "not a folder" in invoke("compare", good + "x", guess, code=1).stderr


def test_a_sample_has_the_same_share_of_each_paradigm():
    pairs, some = c.read_pairs(TINY / "blimp"), c.read_pairs(TINY / "blimp", 200)
    assert len(pairs) == 2000 and len(some) == 200 and set(some) <= set(pairs)
    assert {len(group) for group in c.group_by(some, lambda pair: pair.paradigm).values()} == {10}
    assert (
        some == c.read_pairs(TINY / "blimp", 200) and c.read_pairs(TINY / "blimp", 10**6) == pairs
    )


def test_the_default_run_and_its_scores(default_run):
    """The README's two commands: teacher at least 90 % and student at least 85 % of the pairs."""
    overall = re.search(
        r"mean of 20 paradigms +2,000 +([\d.]+) ± +[\d.]+ +([\d.]+)",
        (default_run / "out.txt").read_text(),
    )
    teacher, student = map(float, overall.groups())
    assert teacher >= 90 and 85 <= student <= 98
    done = subprocess.run(
        [sys.executable, HOME / "choobaca.py", "eval-blimp", "--json", "-d", TINY / "blimp"],
        cwd=default_run,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert (
        result["model"] == "runs/tiny-rkl-1-seed0" and round(100 * result["accuracy"], 1) == student
    )
    assert result["n"] == 2000 and set(result["paradigms"]["npi_scope"]) == {
        "accuracy",
        "n",
        "stderr",
        "ties",
        "phenomenon",
        "not_finite",
    }


# -----------------------------------------------------------------------------
# 10. The command line


def test_defaults_then_toml_then_flags(tmp_path):
    config = brief_config(tmp_path, "clip = 0.5\nalpha = 0.25", teachers="clip = 0.75")
    flags = {field.name: None for field in dataclasses.fields(c.Settings)}
    one, _ = c.read_settings(config, flags, [])
    assert (one.clip, one.alpha, one.beta2, one.objective) == (0.5, 0.25, 0.999, "ce")
    two, teachers = c.read_settings(
        config, flags | {"clip": 2.0, "objective": "rkl", "teachers": 2, "seed": 3}, []
    )
    assert (two.clip, two.alpha, two.seed) == (2.0, 0.25, 3)
    assert [(t.clip, t.alpha, t.objective, t.teachers, t.seed, t.width) for t in teachers] == [
        (0.75, 0.5, "ce", 0, 3, 48)
    ] * 2


NO_FLAGS = {field.name: None for field in dataclasses.fields(c.Settings)}


def test_every_shipped_config_is_read():
    listed = json.loads(invoke("configs", "--json").stdout)
    assert sorted(listed) == [f"configs/{p.name}" for p in sorted((HOME / "configs").iterdir())]
    for path in sorted((HOME / "configs").glob("*.toml")):
        assert listed[f"configs/{path.name}"].endswith(".")
        assert f"{listed[f'configs/{path.name}']}\n" in invoke("configs").stdout
        flags = NO_FLAGS | {"teachers": 1, "objective": "rkl"}
        student, teachers = c.read_settings(path, flags, [])
        V = student.vocab_size
        assert c.count_parameters(c.empty_model(teachers[0], V)) > c.count_parameters(
            c.empty_model(student, V)
        )


def test_the_twelve_models_of_table_1():
    """Row by row, what the paper's Table 1 says of each: objective, teachers, data, techniques."""
    names = [f"{kind}-{n}-{year}" for kind in ("fw", "rv") for year in (23, 24) for n in (2, 1)]
    names += [f"rv-{n}-{year}-plus" for year in (23, 24) for n in (2, 1)]
    for row, name in enumerate(names, 1):
        path, (kind, n, year, *plus) = HOME / f"configs/{name}.toml", name.split("-")
        assert path.read_text().startswith(f"# Table 1, row {row}: ")
        s, teachers = c.read_settings(path, NO_FLAGS, [])
        assert s.objective == {"fw": "fkl", "rv": "rkl"}[kind] and s.teachers == int(n)
        assert f"babylm-20{year}/" in s.text and f"babylm-20{year}/" in s.dev
        assert s.beta == (1.0 if kind == "fw" else 0.7) and s.progressive == bool(plus)
        assert [t.model_type for t in teachers] == ["llama", "gpt2"][: int(n)]
        for t in teachers:
            assert (t.objective, t.batch_size, t.epochs, t.text) == ("ce", 128, 4, s.text)
        shared = c.read_settings(HOME / "configs/paper.toml", NO_FLAGS, [])[0]
        own = ("objective", "teachers", "beta", "progressive", "text", "dev")
        assert dataclasses.replace(s, **{key: getattr(shared, key) for key in own}) == shared


def test_a_config_stands_on_another(tmp_path):
    base = brief_config(tmp_path, "temperature = 3.0\nalpha = 0.25")
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub/child.toml"
    child.write_text('base = "../brief.toml"\nalpha = 0.75\nobjective = "rkl"\nteachers = 2')
    s, teachers = c.read_settings(child, NO_FLAGS, [])
    assert (s.temperature, s.alpha, len(teachers), teachers[0].width) == (3, 0.75, 2, 48)
    child.write_text(
        'base = "../brief.toml"\nteachers = 1\nobjective = "rkl"\n[[teacher]]\nwidth = 64'
    )
    assert [t.width for t in c.read_settings(child, NO_FLAGS, [])[1]] == [64]
    base.write_text('base = "sub/child.toml"')
    with pytest.raises(click.ClickException, match="is its own base"):
        c.read_settings(child, NO_FLAGS, [])


def test_every_flag_has_help_and_stands_once():
    for name, command in c.cli.commands.items():
        flags = [flag for option in command.params for flag in option.opts + option.secondary_opts]
        assert len(flags) == len(set(flags))
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert all(option.help and "." in option.help for option in options)
        assert "Example:" in invoke(name, "--help").output


def bad_inputs(folder: Path):
    """Each: what the user did, the command, what the one sentence must name."""
    train = ["train", "-c", brief_config(folder), "-o", folder / "out"]
    text = folder / "text"
    text.mkdir()

    def holds(name, content):
        (text / name).write_bytes(content)
        return [*train, "--text", text]

    def toml(content):
        path = folder / "bad.toml"
        path.write_text(content)
        return ["train", "-c", path, "-o", folder / "out"]

    yield [*train, "--text", folder / "nowhere"], "nowhere is not a folder"
    yield [*train, "--text", text], "holds no *.train"
    yield holds("a.txt", b""), "a.txt is empty"
    yield holds("a.txt", b"good \xff bad"), "byte 5 is 0xff"
    yield holds("a.txt", b"too short\n"), "less than a batch"
    yield toml("betta = 1"), "unknown key 'betta'; did you mean 'beta'?"
    yield toml("lr = 'fast'"), "lr is 'fast': expected float"
    yield toml("layers = 2.5"), "layers is 2.5: expected int"
    yield toml("layers = true"), "layers is True: expected int"
    yield toml("lr = nan"), "lr is nan"
    yield toml("lr = "), "is not TOML"
    yield toml("teacher = 3"), "under [[teacher]]"
    yield toml("base = 3"), "base is 3: expected the name"
    yield toml('base = "bad.toml"'), "is its own base"
    yield toml('base = "nowhere.toml"'), "nowhere.toml: No such file"
    yield toml("[[teacher]]\ntext = 'x'"), "teacher 1: unknown key 'text'"
    yield toml(f"lr = 1{'0' * 400}"), "lr is 1000"
    yield toml('text = "a\\u0000b"'), "without a NUL"
    yield (
        [*train, "--seed", "18446744073709551616"],
        "--seed is 18446744073709551616: expected 0 to",
    )
    yield [*train, "--objective", "rkl", "--teacher", "a", "--teacher", "a"], "two different ones"
    yield [*train, "--objective", "rkl", "--teacher", "a", "--teachers", "2"], "to be their number"
    yield toml("[[teacher]]\nwidht = 3"), "teacher 1: unknown key 'widht'; did you mean 'width'?"
    yield ["train", "-c", folder / "none.toml"], "none.toml: No such file"
    yield [*train, "--objective", "magic"], "'magic' is not one of 'ce', 'seqkd', 'fkl'"
    yield [*train, "--objective", "rkl", "--teachers", "3"], "--teachers is 3: expected 0 to 2"
    yield [*train, "--objective", "rkl"], "needs a teacher"
    yield [*train, "--objective", "seqkd"], "needs a teacher"
    yield [*train, "--objective", "seqkd", "--teachers", "2"], "one teacher, not of 2"
    yield (
        [*train, "--objective", "akl", "--teachers", "1", "--mixing", "differentiated"],
        "for fkl, rkl, skl, srkl, not for akl",
    )
    yield (
        [*train, "--objective", "skl", "--teachers", "1", "--skew", "1"],
        "--skew is 1.0: expected",
    )
    yield ["bench", "--objective", "seqkd"], "'seqkd' is not one of"
    yield ["bench", "--vocab-size", "1000000000000000"], "is not in the range 3<=x<="
    yield [*train, "--objective", "ce", "--teachers", "1"], "has no teacher"
    yield [*train, "--heads", "5"], "5 heads do not divide the width 32"
    yield [*train, "--micro-batch", "3"], "--micro-batch 3 does not divide --batch-size 8"
    yield [*train, "--lr", "-1"], "--lr is -1.0: expected 0"
    yield [*train, "--lr", "fast"], "'fast' is not a valid float"
    yield [*train, "--dropout", "nan"], "--dropout is nan"
    yield [*train, "--tokenizer", folder / "nowhere"], "nowhere: No such file"
    yield [*train, "--pairs", folder], "holds no *.jsonl"
    yield ["eval-blimp", "-m", folder / "nowhere"], "nowhere is not a folder"
    yield ["eval-blimp"], "no finished run in runs/"


def test_bad_input_is_one_sentence_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, wanted in bad_inputs(tmp_path):
        result = CliRunner().invoke(c.cli, [str(arg) for arg in args])
        assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), (
            args,
            result.exception,
        )
        assert wanted in result.stderr and result.stdout == "", (args, result.stderr)
        assert len(result.stderr.split("Error: ")[1].strip().splitlines()) == 1, result.stderr
        assert not (tmp_path / "out").exists(), args


def some_run(folder: Path, vocabulary, right: float = 0.8, objective: str = "drkl") -> Path:
    """A finished run as the report finds it: 40 steps, two held-out losses, scores of 200 pairs."""
    c.save_model(folder, model(V=vocabulary.size), vocabulary)
    own = dataclasses.asdict(settings(objective=objective, teachers=int(objective != "ce")))
    teachers = [] if objective == "ce" else ["runs/coach"]
    c.write_json(folder / "run.json", {"settings": own, "teachers": teachers})
    lines = [{"step": 20, "dev_loss": 3.5}, {"step": 40, "dev_loss": 3.25}]
    for step in range(1, 41):
        line = {"step": step, "loss": 8 / step, "ce": 9 / step, "lr": 1e-3 / step}
        line |= {"kl": 2 / step, "beta": 1.0} if objective != "ce" else {}
        lines.insert(-1, line | {"tokens_per_second": 1234.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [
        c.Pair(("", f" {i}"), ("", f" {i}b"), f"p{i % 4}", f"term_{i % 2}", f"a.jsonl, line {i}")
        for i in range(200)
    ]
    sure = np.arange(200)[:, None] < 200 * right
    c.keep_scores(folder, "blimp", pairs, np.where(sure, [-1.0, -2.0], [-2.0, -1.0]))
    return folder


def table_of(page: str) -> list[list[str]]:
    """The texts in the cells of a report's table."""
    rows = page.split("</table>")[0].split("<tr>")[1:]
    texts = [re.findall(r"<t[dh][^>]*>(.*?)(?=<t[dh]|$)", row, re.S) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", text)) for text in row] for row in texts]


def test_a_report_shows_what_the_runs_are(tmp_path, vocabulary):
    alone = some_run(tmp_path / "x-ce-0", vocabulary, 0.5, "ce")
    drkl = some_run(tmp_path / "x-drkl-1", vocabulary)
    done = invoke("report", alone, drkl)
    assert done.stdout == f"{alone / 'report.html'}\n" and done.stderr == ""
    page = (alone / "report.html").read_text()
    size = f"{c.count_parameters(model(V=vocabulary.size)):,}"
    loss, ce, kl = (f"{np.mean([top / i for i in range(21, 41)]):.3f}" for top in (8, 9, 2))
    first = ["parameters", "objective", "teachers", "steps", "loss", "ce", "kl"]
    objective = "0.5 ce + 2 drkl at temperature 2, gamma 0.5"
    assert table_of(page) == [
        ["run", *first, "dev loss", "tokens per second", "blimp, %"],
        [f"● x-ce-0{alone}", size, "ce", "none", "40", loss, ce, ""]
        + ["3.250", "1,234", "50.0 ± 3.6"],
        [f"● x-drkl-1{drkl}", size, objective, "coach", "40", loss, ce, kl]
        + ["3.250", "1,234", "80.0 ± 2.9"],
    ]
    charts = re.findall("<figure>(<svg.*?)</figure>", page, re.S)
    drawn = {ElementTree.fromstring(chart)[0].text: chart for chart in charts}
    assert [re.match("[^, ]+", title)[0] for title in drawn] == (
        ["Accuracy", "Cross-entropy", "Held-out", "Divergence", "Loss", "Learning", "Beta"]
    )
    for title, chart in drawn.items():
        assert ">x-ce-0</text>" in chart and ">x-drkl-1</text>" in chart
        only_one = title.startswith(("Divergence", "Beta"))  # and the other keeps its colour
        if not title.startswith("Accuracy"):
            assert ('<path class="run0"' in chart) == (not only_one)
            assert '<path class="run1"' in chart
    assert ">1</text>" in drawn["Cross-entropy on training text"]
    assert ">8</text>" not in drawn["Cross-entropy on training text"]
    assert not re.search("<script|<link|src=|@import|url\\(", page)
    assert set(re.findall('https?:[^"]*', page)) == {"http://www.w3.org/2000/svg"}
    invoke("report", alone, drkl, "-o", tmp_path / "a.svg")
    figure = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert [g[0][0].text for g in figure[1:]] == list(drawn) and figure.get("width") == "1000"
    boxes = [(*map(int, re.findall(r"\d+", g.get("transform"))), *map(int, (g[0].get("width"),
             g[0].get("height")))) for g in figure[1:]]  # fmt: skip
    assert all(x + w <= 1000 and y + h <= int(figure.get("height")) for x, y, w, h in boxes)
    for (x, y, w, h), (x2, y2, *_) in itertools.pairwise(boxes):
        assert x2 >= x + w or y2 >= y + h
    invoke("report", alone, "-o", tmp_path / "one.html")
    page = (tmp_path / "one.html").read_text()
    assert "<h1>x-ce-0</h1>" in page


def test_a_report_of_a_killed_run_a_plain_model_and_a_long_run(tmp_path, vocabulary):
    long, killed = (some_run(tmp_path / name, vocabulary) for name in ("long", "killed"))
    steps = [{"step": i + 1, "loss": 2.0, "ce": 2 + math.sin(i), "lr": 0.0} for i in range(20_000)]
    (long / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    plain, out = tmp_path / "plain", tmp_path / "pages/a.html"
    c.save_model(plain, model(V=vocabulary.size, seed=1), vocabulary)
    assert invoke("report", plain, long, "-o", out).stdout == f"{out}\n"
    page = out.read_text()
    assert len(page) < 20_000 and page.count("<svg xmlns") == 3  # of ce, loss, lr
    assert "no same pairs of blimp were scored for all: run eval-blimp" in page
    assert table_of(page)[1][2:] == [""] * 5  # objective to ce; no column is all empty
    c.keep_scores(plain, "blimp", sentences("a", "b"), np.array([[-1.0, -2.0]]))
    invoke("report", plain, "-o", out)
    assert table_of(out.read_text())[0] == ["run", "parameters", "blimp, %"]
    (killed / "model.safetensors").unlink()
    for path in killed.glob("blimp-*.jsonl"):
        path.unlink()
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 41, "loss": 0.')
    invoke("report", killed, "-o", out)
    assert table_of(out.read_text())[1][4] == "40, unfinished"


def test_nothing_in_a_run_becomes_html(tmp_path, vocabulary):
    bad = "<script>alert('&\"')</script>"
    run = some_run(tmp_path / bad.replace("/", "-"), vocabulary)
    facts = json.loads((run / "run.json").read_text())
    facts["teachers"], facts["settings"]["text"] = [bad.replace("/", "-"), 3, "\ud800"], bad
    c.write_json(run / "run.json", facts)
    (scores,) = run.glob("blimp-*.jsonl")
    scores.write_text(scores.read_text().replace("term_1", bad.replace('"', '\\"')))
    invoke("report", run)
    page = (run / "report.html").read_text()
    assert "<script" not in page and table_of(page)[1][3].startswith(
        "<script>alert('&\"')<-script>"
    )
    assert html.escape(bad[:13]) in page.split("<main>")[1]  # as a phenomenon
    facts["settings"]["objective"] = bad
    c.write_json(run / "run.json", facts)
    assert "run.json: objective is" in invoke("report", run, code=1).stderr


def test_a_report_of_what_is_damaged_is_one_sentence(tmp_path, vocabulary):
    run, twin = (some_run(tmp_path / name, vocabulary) for name in ("run", "twin"))
    other, out, line = tmp_path / "other", tmp_path / "a.html", '{"step": 1, "loss": 2.0}'
    facts = json.loads((run / "run.json").read_text())

    def fails(wanted, name="", content="", runs=(run,)):
        kept = (run / name).read_bytes() if name else b""
        if name and content is None:
            (run / name).unlink()
        elif name:
            (run / name).write_text(content)
        result = invoke("report", *runs, "-o", out, code=1)
        assert wanted in result.stderr and result.stdout == "", result.stderr
        assert len(result.stderr.strip().splitlines()) == 1 and not out.exists()
        if name:
            (run / name).write_bytes(kept)

    fails("log.jsonl: No such file", "log.jsonl", None)
    fails("run.json: No such file", "run.json", None)
    fails("run.json is not JSON", "run.json", "{")
    fails("run.json is damaged", "run.json", "{}")
    facts["settings"]["lr"] = "x"
    fails("run.json: lr is 'x'", "run.json", json.dumps(facts))
    fails("log.jsonl is empty", "log.jsonl", "")
    fails("log.jsonl, line 1 is damaged", "log.jsonl", "hello")
    fails("log.jsonl, line 2 is damaged", "log.jsonl", f'{line}\n{{"step": 2, "lo\n{line}\n')
    for wrong in ("[]", '{"loss": 1}', '{"step": "a"}', '{"step": 1, "loss": []}'):
        fails("log.jsonl, line 1 is damaged", "log.jsonl", wrong)
    fails("config.json", "config.json", "[]")
    fails("expected 1 to 8 different ones", runs=(run, run))
    fails("expected 1 to 8 different ones", runs=[tmp_path / str(i) for i in range(9)])
    other.mkdir()
    fails("other/config.json: No such file", runs=(run, other))
    (scores,) = run.glob("blimp-*.jsonl")
    fails("is damaged: expected one JSON object a line", scores.name, "{")
    assert "a name in .html" in invoke("report", run, "-o", run / "log.jsonl", code=1).stderr
    (twin / scores.name).write_text(scores.read_text().replace("term_1", "term_2"))
    fails("name other pairs", runs=(run, twin))


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 1e-9), (2.28, 2.31), (7, 13_200), (1e20, 3e20)])
def test_ticks_are_few_and_round(low, high):
    found = c.ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= high * (1 + 1e-12)
    gaps = {f"{b - a:.6e}" for a, b in itertools.pairwise(c.ticks(low, high))}
    assert len(gaps) == 1 and re.match("[125]\\.000000e", *gaps)


def test_dots_lie_where_their_percentages_are():
    chart = c.dot_chart({"row": [(50.0, 0.0), (100.0, 0.0)]}, ["a", "b"], "")
    chance, ends = re.search(r'"chance" d="M([\d.]+)', chart)[1], re.findall(r"H([\d.]+)", chart)
    assert re.findall(r'<circle cx="([\d.]+)"', chart) == [chance, "440.0"] == ends


def test_a_line_chart_takes_any_numbers():
    """The legend stays within the width, long names too; no range of values is too small."""
    names = {f"{'long-' * 6}{i}": [(0.0, i), (1.0, 1.0)] for i in range(8)}
    drawn = ElementTree.fromstring(c.line_chart({**names, "none": []}, "<T>", "x & y"))
    dots = [(float(x.get("cx")), float(x.get("cy"))) for x in drawn.iter() if x.get("cx")]
    assert len(set(dots)) == 9 and max(x for x, _ in dots) < 300
    for ys in ((0, 0), (0, 5e-324), (2, 2 + 1e-15), (-1e29, 1e29), (1e-300, 0)):
        for x in (1, 2**53 - 1):
            chart = c.line_chart({"a": [(x, ys[0]), (x, ys[1])]}, "", "")
            assert "nan" not in chart and "inf" not in chart


def test_bench_compares_and_weighs():
    """On sizes where all logits, forward and backward, are far more than the chunks."""
    args = ["bench", "--rows", "2000", "--vocab-size", "4000", "--width", "16", "--repeats", "2"]
    args += ["--teacher-width", "16", "--chunk", "100", "--objective", "rkl", "--objective", "ce"]
    rows = json.loads(invoke(*args, "--json").stdout)
    assert [(row["name"], row["objective"]) for row in rows] == [
        ("products", "rkl"),
        ("plain", "rkl"),
        ("fused", "rkl"),
        ("fused", "ce"),
    ]
    for row in rows:
        assert len(row["seconds_all"]) == 2 and min(row["seconds_all"]) > 0 and row["ratio"] > 0
        assert min(row["seconds_all"]) <= row["seconds"] <= max(row["seconds_all"])
    if sys.platform == "linux":
        plain, fused = rows[1]["peak_bytes"], rows[2]["peak_bytes"]
        assert plain > 3 * 4 * 2000 * 4000 and fused < plain / 3
    table = invoke(*args[:-2], "--no-plain").stdout.splitlines()
    assert len(table) == 3 and "products" in table[1] and "rkl" in table[2]


def test_fast_products_lose_no_digit(monkeypatch):
    """Whatever this processor is, and if it were AMD's; one that rounds to bf16 is found out."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    real, product = Path.read_text, torch.Tensor.__matmul__
    try:
        c.choose_device("cpu")
        assert c.products_error() < 1e-6
        assert (torch.tensor([1e-30]) * 1e-10).item() == 0  # denormals cost, and count for nothing
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda path: "AuthenticAMD" if str(path) == "/proc/cpuinfo" else real(path),
        )
        c.choose_device("cpu")
        assert c.products_error() < 1e-6

        def rounded(a, b):
            fast = (
                torch.backends.mkldnn.matmul.fp32_precision == "bf16" and a.dtype == torch.float32
            )
            return product(a.bfloat16(), b.bfloat16()).float() if fast else product(a, b)

        monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert c.products_error() > 1e-3
        c.choose_device("cpu")
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee" and c.products_error() < 1e-6
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


POINTS = torch.arange(50, dtype=torch.float64) / 5


def ways(teacher: str, objective: str, starts: int, **how):
    """By epoch and start the errors in head, tail and far tail (p < 0.001), and the largest error
    at the end, of students with a logit for each point."""
    p, draw = c.toy_teachers(POINTS)[teacher], torch.Generator().manual_seed(0)
    start = torch.rand(starts, 50, generator=draw, dtype=torch.float64)
    q, _ = c.fit_distribution(p, objective, start, lambda z: z, **how)
    falling = p.sort(descending=True)[0]
    head = p >= falling[int((falling.cumsum(0) < 0.5).sum())] * (1 - 1e-9)
    gap = (q - p).abs()
    return *(gap[..., part].sum(-1) for part in (head, ~head, p < 1e-3)), gap[-1].max()


TOYS = ("one mode", "two modes", "two narrow modes", "long tail")


@pytest.mark.parametrize("teacher", TOYS)
def test_in_the_toy_all_find_the_teacher_and_each_fits_its_part_first(teacher):
    """AKL paper, Figures 2 and 3, at its setting, from 20 starts each: forward KL fits the head
    first, reverse KL the far tail. In the tail as a whole it is ahead without Adam alone."""
    adam, sgd = dict(epochs=200, optimizer="adam"), dict(epochs=50, optimizer="sgd")
    (head, tail, far, largest), (r_head, r_tail, r_far, r_largest), (*_, akl) = (
        ways(teacher, name, 20, **adam) for name in ("fkl", "rkl", "akl")
    )
    assert max(largest, r_largest, akl) < 1e-3
    assert (head[1:8] < r_head[1:8]).all()
    if teacher != "two modes":  # which has no far tail
        assert (r_far[1:11] < far[1:11]).all()
    assert (tail[1:5] < r_tail[1:5]).double().mean() > 0.95
    (_, tail, *_), (_, r_tail, *_) = (ways(teacher, name, 20, **sgd) for name in ("fkl", "rkl"))
    assert (r_tail[1:] < tail[1:]).all()


@pytest.mark.parametrize("name", c.DIVERGENCES)
def test_the_toy_descends_by_the_divergences_gradients(name):
    """A step of plain descent, in logits and in a Gaussian's two parameters, against autograd of
    the literal definition; with the default constants; the end is the teacher."""
    p, s = c.toy_teachers(POINTS)["two modes"], settings()
    targets = p.argmax().expand(3, 1)
    for start, to_logits in (
        (torch.randn(3, 50).double(), lambda z: z),
        (torch.rand(3, 2).double(), lambda t: -((POINTS - t[:, :1]) ** 2) / t[:, 1:].exp()),
    ):
        theta = start.clone().requires_grad_()
        log_q = to_logits(theta).log_softmax(-1)
        wanted = LITERAL[name](log_q, p.log().expand(3, -1), targets, s)
        (slope,) = torch.autograd.grad(wanted.sum(), theta)
        path, value = c.fit_distribution(p, name, start, to_logits, 1, "sgd")
        after = to_logits(start - slope).log_softmax(-1)
        assert torch.allclose(path[0], log_q.exp(), atol=1e-12)
        assert torch.allclose(path[1], after.exp(), atol=1e-10)
        assert torch.allclose(
            value[:, 0], LITERAL[name](after, p.log().expand(3, -1), targets, s), atol=1e-10
        )
    assert ways("long tail", name, 1, epochs=200, optimizer="adam")[-1] < 1e-3


def test_toy_shows_where_modes_are_sought(tmp_path):
    """Only by a student that is one Gaussian, and only where the modes are narrow."""
    results = json.loads(invoke("toy", "--json", "--svg", tmp_path / "toy.svg").stdout)
    assert tuple(results) == TOYS

    def moments(teacher, objective):
        q = torch.tensor(results[teacher]["objectives"][objective]["gaussian_q"]).double()
        mean = (q * POINTS).sum()
        return mean.item(), (q * (POINTS - mean) ** 2).sum().sqrt().item()

    mean, spread = moments("two narrow modes", "fkl")
    assert 5 < mean < 6.5 and spread > 2
    mean, spread = moments("two narrow modes", "rkl")
    assert abs(mean - 7.5) < 0.01 and abs(spread - 0.5) < 0.01
    assert min(moments("two modes", name)[1] for name in ("fkl", "rkl", "akl")) > 2
    for teacher in ("one mode", "long tail"):
        p = torch.tensor(results[teacher]["p"])
        for row in results[teacher]["objectives"].values():
            assert (torch.tensor(row["gaussian_q"]) - p).abs().max() < 1e-3
    p = torch.tensor(results["long tail"]["p"])
    row = results["long tail"]["objectives"]["rkl"]
    gap = (torch.tensor(row["q"]) - p).abs()
    assert math.isclose(row["head"][-1] + row["tail"][-1], gap.sum(), rel_tol=1e-4)
    assert len(row["head"]) == 251 and math.isclose(row["largest"], gap.max(), rel_tol=1e-4)
    figure = ElementTree.parse(tmp_path / "toy.svg").getroot()
    curves = [path for path in figure.iter() if (path.get("class") or "").startswith("run")]
    assert figure.get("width") == "1000" and len(curves) == 4 * (3 * 4 + 3 + 3 + 4)
    for path in figure.iter("{http://www.w3.org/2000/svg}path"):
        numbers = [float(x) for x in re.findall(r"[\d.]+", path.get("d"))]
        assert min(numbers) >= 0 and max(numbers) <= 320


def test_toy_as_a_table():
    args = ["toy", "--objective", "drkl", "--objective", "fkl", "--epochs", "6"]
    first = invoke(*args)
    lines = first.stdout.splitlines()
    assert len(lines) == 2 + 4 * 3 + 2 and max(map(len, lines)) <= 100
    assert lines[1].split()[:5] == ["teacher", "objective", "5", "5", "5"]
    drawn = [line.split()[-1] for line in lines[2:-2]]
    assert {len(line) for line in drawn} == {25} and set("".join(drawn)) <= set("▁▂▃▄▅▆▇█")
    assert all("█" in "".join(drawn[i : i + 3]) for i in range(0, 12, 3))
    assert invoke(*args).stdout == first.stdout != invoke(*args, "--optimizer", "sgd").stdout
    assert "'ce' is not one of" in invoke("toy", "--objective", "ce", code=2).stderr
    assert "is a directory" in invoke("toy", "--svg", "/", code=2).stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_keeps_the_fewest_tokens(dtype):
    """By trying every set of tokens; ties are cut, so that they are the fewest there, too."""
    p = torch.rand(20, 6, dtype=dtype).pow(2)
    p = torch.cat([p / p.sum(-1, True), torch.full((1, 6), 1 / 6, dtype=dtype)])
    for mass in (1e-6, 0.3, 0.5, 0.9, 0.999):
        found = c.likeliest(p, mass)
        for row, kept in zip(p.double(), found):
            sets = [torch.tensor(some).bool() for some in itertools.product((0, 1), repeat=6)]
            fewest = min(int(some.sum()) for some in sets if row[some].sum() >= mass)
            assert (kept > 0).sum() == fewest and kept.double().sum() >= mass
            assert row[kept > 0].min() >= row[kept == 0].max() if fewest < 6 else True
            assert (kept[kept > 0] == row[kept > 0].to(dtype)).all()


def test_a_draw_follows_the_temperature_and_top_p():
    """Frequencies within four standard errors; at temperature 0, and next to it, the likeliest."""
    logits, draw = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.0]]), torch.Generator().manual_seed(0)
    many = logits.expand(4000, -1)
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 0.7), (3.0, 0.8)):
        p = (logits / temperature).softmax(-1)
        p = c.likeliest(p, top_p) if top_p < 1 else p
        found = c.draw_next(many, temperature, top_p, draw).flatten().bincount(minlength=5) / 4000
        assert (found - p / p.sum()).abs().max() < 4 * math.sqrt(0.25 / 4000)
        assert (found[p[0] == 0] == 0).all()
    assert (c.draw_next(many, 0, 1.0, None) == 1).all()
    assert (c.draw_next(many, 1e-3, 1.0, draw) == 1).all()
    with pytest.raises(click.ClickException, match="not finite"):
        c.draw_next(many * math.nan, 0, 1.0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_on_is_greedy_search_and_reads_no_id_twice(kind, monkeypatch):
    """Against the argmax of the whole row, read again at each step; rows that end are let go."""
    m, ids = model(sharp=5, **kind).eval(), torch.randint(0, 50, (6, 9))
    rows, seen = [row[None] for row in ids], []
    with torch.no_grad():
        for _ in range(20):
            rows = [torch.cat([row, logits(m, row)[:, -1:].argmax(-1)], 1) for row in rows]
    wanted = [row[0, 9:].tolist() for row in rows]
    end = wanted[0][7]
    wanted = [row[: row.index(end)] if end in row else row for row in wanted]
    hidden = m.hidden
    monkeypatch.setattr(m, "hidden", lambda x, *rest: seen.append(x.shape) or hidden(x, *rest))
    found = [[] for _ in ids]
    for order, drawn in c.write_on(m, ids, [end], 20, None, 0):
        for row, i in zip(order.tolist(), drawn.tolist()):
            found[row].append(i)
    assert found == wanted
    assert seen[0] == (6, 9) and {T for _, T in seen[1:]} <= {1}
    assert sum(B for B, _ in seen[1:]) <= sum(map(len, wanted))


def test_sample(saved, vocabulary):
    """Seeded; a line a sample; the prompt first, encoded as scoring encodes it, with a leading
    space even where the tokenizer adds none."""
    plain = vocabulary.files["tokenizer.json"].replace(b'_space": true', b'_space": false')
    (saved / "tokenizer.json").write_bytes(plain)
    args = ["sample", saved, "--prompt", "the dog", "--tokens", "9"]
    one = invoke(*args).stdout
    assert one.startswith("the dog") and one.count("\n") == 1
    three = invoke(*args, "--count", "3").stdout
    assert three.startswith(one) and invoke(*args, "--count", "3").stdout == three
    assert len(set(three.splitlines())) == 3 and invoke(*args, "--seed", "1").stdout != one
    assert invoke(*args, "--top-p", "0.1").stdout != one
    m, _ = c.load_model(saved, "cpu")
    ids = [1, *vocabulary.tokenizer.encode(" the dog", add_special_tokens=False).ids]
    given = len(ids)
    with torch.no_grad():
        for _ in range(9):
            ids.append(logits(m, torch.tensor([ids]))[0, -1].argmax().item())
    text = vocabulary.tokenizer.decode(ids)
    greedy = invoke(*args, "--temperature", "0", "--count", "2").stdout
    assert greedy == (text[1:].split("\n")[0] + "\n") * 2 and 1 not in ids[1:] and 2 not in ids
    assert len(invoke(*args[:-1], "999").stdout) > len(one) and given < 32
    assert "32 positions" in invoke("sample", saved, "--prompt", "a " * 40, code=1).stderr
    assert "0.001 and more" in invoke(*args, "--temperature", "1e-40", code=1).stderr
    assert "not a folder" in invoke("sample", saved / "none", code=1).stderr
    with torch.no_grad():
        m.head[0, 0] = math.nan
    c.save_model(saved, m, vocabulary)
    ruined = invoke(*args, code=1)
    assert "not finite numbers" in ruined.stderr and ruined.stdout == "the dog"


def test_a_sample_ends_with_its_line(saved, vocabulary, monkeypatch):
    drawn = []

    def encode(text):
        return vocabulary.tokenizer.encode(text, add_special_tokens=False).ids

    def draw(logits, *_):
        return torch.tensor([[drawn.pop(0)]])

    monkeypatch.setattr(c, "draw_next", draw)
    for text, end, line in (
        (" the dog barked.", 1, "the dog barked."),
        (" the cat", 2, "the cat"),
        (" A🐈", encode("\n")[-1], "A🐈"),
        ("", 1, ""),
    ):
        drawn = [*encode(text), end, *encode(" never said")]
        assert invoke("sample", saved, "--tokens", "20").stdout == line + "\n"
        drawn = [*encode(text), end, *encode(" never said")]
        asked = invoke("sample", saved, "--prompt", "Oh,", "--tokens", "20").stdout
        assert asked == f"Oh,{text}\n" and drawn == encode(" never said")
    facts = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(facts | {"eos_token_id": [7, None, "x", 10**9]}))
    drawn = [*encode(" a"), 7]
    assert invoke("sample", saved, "--tokens", "20").stdout == "a\n"


def test_a_run_folder_is_never_overwritten_unasked(tmp_path):
    config, out = brief_config(tmp_path), tmp_path / "run"
    invoke("train", "-c", config, "-o", out)
    before = (out / "model.safetensors").read_bytes()
    assert (
        "already holds a run"
        in invoke("train", "-c", config, "-o", out, "--seed", "1", code=1).stderr
    )
    assert (out / "model.safetensors").read_bytes() == before
    invoke("train", "-c", config, "-o", out, "--seed", "1", "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    (out / "model.safetensors").unlink()  # as an interrupted run leaves it
    assert "holds no finished model" in invoke("eval-blimp", "-m", tmp_path, code=1).stderr
    invoke("train", "-c", config, "-o", out)
    assert (out / "model.safetensors").read_bytes() == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    assert (
        "files that are no run"
        in invoke("train", "-c", config, "-o", mine, "--overwrite", code=1).stderr
    )
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_dry_run_trains_nothing(tmp_path):
    result = invoke(
        "train",
        "-c",
        brief_config(tmp_path),
        "--objective",
        "rkl",
        "--teachers",
        "2",
        "-o",
        tmp_path / "x/run",
        "--dry-run",
    )
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "text",
        "teacher",
        "teacher",
        "student",
    ]
    assert "6 steps of 256 tokens" in result.stdout and not list(
        tmp_path.glob("x/*/model.safetensors")
    )


@pytest.fixture
def saved(tmp_path, vocabulary) -> Path:
    c.save_model(tmp_path / "model", model(V=vocabulary.size), vocabulary)
    return tmp_path / "model"


def rewrite_header(path: Path, change) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


WEIGHTS = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "ends at byte"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:60]), "header should have"),
    "empty": (lambda p: p.write_bytes(b""), "less than 9 bytes"),
    "no JSON": (
        lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{{{{" + bytes(9)),
        "not a JSON object",
    ),
    "past the end": (
        lambda p: rewrite_header(
            p, lambda h: h["lm_head.weight"].update(data_offsets=[10**12, 10**12 + 400 * 32 * 4])
        ),
        "ends at byte",
    ),
    "wrong size": (
        lambda p: rewrite_header(p, lambda h: h["lm_head.weight"].update(shape=[1, 1])),
        "its entry for",
    ),
    "unknown dtype": (
        lambda p: rewrite_header(p, lambda h: h["lm_head.weight"].update(dtype="I8")),
        "its entry for",
    ),
    "negative": (
        lambda p: rewrite_header(p, lambda h: h["lm_head.weight"].update(shape=[-400, -32])),
        "its entry for",
    ),
    "weight missing": (
        lambda p: rewrite_header(p, lambda h: h.pop("lm_head.weight")),
        "'lm_head.weight' as none",
    ),
    "weight unknown": (
        lambda p: rewrite_header(p, lambda h: h.update(extra=h.pop("lm_head.weight"))),
        "'extra' as [",
    ),
    "overlap": (
        lambda p: rewrite_header(p, lambda h: h.update(extra=h["lm_head.weight"])),
        "two of its tensors overlap",
    ),
    "missing": (lambda p: p.unlink(), "is missing"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_are_one_sentence(saved, name):
    damage, wanted = WEIGHTS[name]
    damage(saved / "model.safetensors")
    assert wanted in invoke("eval-blimp", "-m", saved, "-d", TINY / "blimp", code=1).stderr


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"model_type": "mamba"}, "model_type is 'mamba': expected llama or gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': expected 'silu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rotary positions are scaled"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two': expected int"),
        ({"hidden_size": None}, "hidden_size is None: expected int"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"vocab_size": 10**30}, "vocab_size is 1000"),
        ({"num_attention_heads": 3}, "3 heads do not divide the width 32"),
        ({"hidden_size": 64}, "config.json asks for"),
        ({"vocab_size": 10}, "expected at least as many"),
        ({"head_dim": 64}, "head_dim is 64: expected width / heads = 16"),
    ],
)
def test_a_config_that_we_do_not_build_is_one_sentence(saved, change, wanted):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    assert wanted in invoke("eval-blimp", "-m", saved, "-d", TINY / "blimp", code=1).stderr


NUMBERS = ["0", "-1", "1", "3", "64", "257", "65536", "2147483647", "2147483648", "1" + "0" * 20]
NUMBERS += ["1e400", "-1e-400", "NaN", "0.5", "true", "null", '"x"', "[]", "{}", "[" * 2000]
PIECES = [b"\0", b"\xff", b"\n", b'"', b"{", b"}", b",", b"\\u0000", b"\\ud800", b"../", b"x" * 999]


def mutated(content: bytes, draw: random.Random, text: range) -> bytes:
    """Changed in one to three places, most often where the file is text: bytes, numbers, pieces."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        place = draw.choice(text) if draw.random() < 0.8 else draw.randrange(len(content))
        kind, size = draw.randrange(6), draw.choice([1, 2, 8, 100])
        numbers = [m for m in re.finditer(rb"-?\d+(\.\d+)?", content[text.start : text.stop])]
        if kind == 0:
            content[place % max(1, len(content))] = draw.randrange(256)
        elif kind == 1:
            del content[place : place + size]
        elif kind == 2:
            content[place:place] = draw.choice(PIECES)
        elif kind == 3:
            content[place:place] = content[place : place + size]
        elif kind == 4 and numbers:
            m = draw.choice(numbers)
            start, end = (text.start + edge for edge in m.span())
            content[start:end] = draw.choice(NUMBERS).encode()
        elif kind == 5 and draw.random() < 0.3:
            del content[place:]
        content = content or bytearray(b" ")
    return bytes(content)


def test_no_mutated_file_gets_through_or_brings_it_down(tmp_path, saved, vocabulary, monkeypatch):
    """20,000 files: each is read as one that is sound, or refused in one sentence, within a second
    and without taking more memory than a small factor of its size."""
    config = brief_config(tmp_path)
    pairs = [(f"The dog number {i} runs.", f"The dog number {i} run.") for i in range(4)]
    write_pairs(tmp_path / "pairs", "a.jsonl", pairs)
    loaded, scores = c.read_pairs(tmp_path / "pairs"), np.array([[-1.5, -2.0]] * 4)
    c.keep_scores(saved, "blimp", loaded, scores)
    (kept,) = saved.glob("blimp-*.jsonl")
    ids, text = tmp_path / "x.ids", [["A dog."]]
    facts = {"text": "1", "tokenizer": "2"}
    first = c.encode_once(ids, vocabulary, text, "line", facts).tolist()
    m = model(V=60)
    progress = c.Progress(m, c.make_optimizer(m, settings()), torch.amp.GradScaler(enabled=False))
    c.train_step(m, progress.optimizer, None, *[torch.zeros(2, 8).long()] * 2, settings(), 1.0)
    parts = {name: part.state_dict() for name, part in progress._asdict().items()}
    torch.save({"step": 3, "seconds": 1.0, **parts}, tmp_path / "state.pt")

    def same_ids():
        assert c.encode_once(ids, vocabulary, text, "line", facts).tolist() == first

    weights = (saved / "model.safetensors").read_bytes()
    head = range(8, 8 + int.from_bytes(weights[:8], "little"))
    cases = [  # how many, the file, where it is text, what reads it
        (5000, saved / "model.safetensors", head, lambda: c.load_model(saved, "cpu")),
        (4000, saved / "config.json", None, lambda: c.load_model(saved, "cpu")),
        (2000, saved / "tokenizer.json", None, lambda: c.load_vocabulary(saved)),
        (1000, saved / "tokenizer_config.json", None, lambda: c.load_vocabulary(saved)),
        (3000, tmp_path / "pairs/a.jsonl", None, lambda: c.read_pairs(tmp_path / "pairs")),
        (1500, kept, None, lambda: c.read_scores(kept)),
        (3000, config, None, lambda: c.read_settings(config, NO_FLAGS, [])),
        (300, ids, range(c.HEADER), same_ids),
        (200, tmp_path / "state.pt", None, lambda: c.load_state(tmp_path / "state.pt", 9, progress)),
    ]
    draw, outcomes = random.Random(0), {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count, path, where, read in cases:
        whole = path.read_bytes()
        for _ in range(count):
            content = mutated(whole, draw, where or range(len(whole)))
            path.write_bytes(content)
            begin, outcome = time.perf_counter(), "read"
            try:
                read()
            except (click.ClickException, OSError) as error:
                outcome = "refused"
                message = getattr(error, "message", "one line")
                assert len(message.splitlines()) == 1, (path, message)
            except BaseException as error:
                (tmp_path / "culprit").write_bytes(content)
                raise AssertionError(f"{path.name}: {error!r}; see {tmp_path}/culprit") from error
            assert time.perf_counter() - begin < 1, (path, content[:2000])
            outcomes[path.name, outcome] = outcomes.get((path.name, outcome), 0) + 1
        path.write_bytes(whole)
        read()
    assert sum(outcomes.values()) == 20_000 and min(outcomes.values()) > 0, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, outcomes


class Mischief:
    """What runs a command when it is unpickled, if anything is."""

    def __reduce__(self):
        return os.mkdir, (os.environ["MISCHIEF"],)


def test_a_pickle_in_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    """In any part of it, or as the whole file; nor is a step believed that none is left after."""
    config, out, step = brief_config(tmp_path), tmp_path / "x", c.train_step
    monkeypatch.setenv("MISCHIEF", str(tmp_path / "done"))

    def stopped(*rest):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*rest)

    monkeypatch.setattr(c, "train_step", stopped)
    invoke("train", "-c", config, "-o", out, code=130)
    state = torch.load(out / "state.pt", weights_only=True)
    harms = [{**state, "seconds": Mischief()}, {**state, "model": Mischief()}, Mischief()]
    for harm in (*harms, {**state, "step": 6}):
        torch.save(harm, out / "state.pt")
        said = invoke("train", "-c", config, "-o", out, "--resume", code=1).stderr
        assert "state.pt is damaged" in said and not (tmp_path / "done").exists()
    (out / "state.pt").write_bytes(pickle.dumps(Mischief()))
    invoke("train", "-c", config, "-o", out, "--resume", code=1)
    assert not (tmp_path / "done").exists()
    pickle.loads((out / "state.pt").read_bytes())
    assert (tmp_path / "done").exists()  # and this is what it would have done


def test_bad_pairs_name_file_and_line(saved, tmp_path):
    pairs = tmp_path / "pairs"
    write_pairs(pairs, "a.jsonl", [("A.", "B.")])
    for line in (
        '{"sentence_good": "A."}',
        "not json",
        "[]",
        '{"sentence_good": "A.", "sentence_bad": 3}',
        r'{"sentence_good": "A.", "sentence_bad": "\ud83d"}',
        '{"Context1": "a", "Context2": "b", "Target1": "secret"}',
        '{"sentence_good": "A.", "sentence_bad": " "}',
        '{"Context1": " ", "Context2": "b", "Target1": "secret", "Target2": "c"}',
    ):
        (pairs / "b.jsonl").write_text(
            '{"sentence_good": "A.", "sentence_bad": "B."}\n' + line + "\n"
        )
        result = invoke("eval-blimp", "-m", saved, "-d", pairs, code=1)
        assert "b.jsonl, line 2: expected a JSON object" in result.stderr
        assert "secret" not in result.stderr  # EWoK's text is not to be spread
    nowhere = invoke("eval-blimp", "-m", saved, "-d", tmp_path / "nowhere", code=1)
    assert "nowhere is not a folder" in nowhere.stderr
    assert "holds no *.jsonl" in invoke("eval-blimp", "-m", saved, "-d", saved, code=1).stderr
    write_pairs(pairs, "b.jsonl", [("A.", "B.")])
    write_ewok(pairs, [("x", "A.", "B.", "C.", "D.")])
    mixed = invoke("eval-blimp", "-m", saved, "-d", pairs, code=1).stderr
    assert "expected pairs of one kind" in mixed
    (pairs / "made-up.jsonl").unlink()
    write_pairs(pairs, "b.jsonl", [("A.", "word " * 40)])
    result = invoke("eval-blimp", "-m", saved, "-d", pairs, code=1)
    assert "b.jsonl, line 1: a text has" in result.stderr and "positions" in result.stderr
    ours = c.load_vocabulary(saved)
    ours.tokenizer.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("[^A]"), "")
    ours.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(click.ClickException, match="line 2: nothing is left of a text"):
        c.encode_pairs(ours, sentences("A", "A", "b", "A"), 40)


def test_ruined_weights_are_said_to_be_so(saved, vocabulary):
    broken, _ = c.load_model(saved, "cpu")
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    c.save_model(saved, broken, vocabulary)
    write_pairs(saved, "pairs.jsonl", [("A.", "B.")])
    result = invoke("eval-blimp", "-m", saved, "-d", saved, code=1)
    assert "not finite" in result.stderr
    learning = ["--lr", "1e9", "--clip", "0", "--steps", "40"]
    result = invoke(
        "train", "-c", brief_config(saved.parent), "-o", saved.parent / "r", *learning, code=1
    )
    assert "begin again with a lower --lr" in result.stderr
    assert not (saved.parent / "r/model.safetensors").exists()


def test_teachers_that_cannot_teach(tmp_path):
    config = brief_config(tmp_path, 'objective = "rkl"\nteachers = 2')
    text = config.read_text()
    config.write_text(text.replace("width = 48", "positions = 16\ncontext = 16\nwidth = 48"))
    result = invoke("train", "-c", config, "-o", tmp_path / "a/run", code=1)
    assert "teacher 1: --context 32 is longer than what it takes, 16" in result.stderr
    config.write_text(
        text.replace('model_type = "gpt2"', "")
        .replace("dropout = 0.1", "")
        .replace("tied = true", "")
    )
    result = invoke("train", "-c", config, "-o", tmp_path / "b/run", code=1)
    assert "teachers of different settings" in result.stderr


def test_a_teacher_is_not_overwritten_by_its_student(tmp_path):
    config, out = brief_config(tmp_path), tmp_path / "run"
    invoke("train", "-c", config, "-o", out)
    before = (out / "model.safetensors").read_bytes()
    again = [
        "train",
        "-c",
        config,
        "-o",
        out,
        "--teacher",
        out,
        "--objective",
        "rkl",
        "--overwrite",
    ]
    assert "would lie in one" in invoke(*again, code=1).stderr
    assert (out / "model.safetensors").read_bytes() == before


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, saved):
    config, text = brief_config(tmp_path), tmp_path / "text-300"
    c.train_tokenizer(text, c.read_documents(TINY, r"dev\.txt"), 300)
    result = invoke(
        "train",
        "-c",
        config,
        "-o",
        tmp_path / "out/run",
        "--objective",
        "rkl",
        "--teacher",
        saved,
        "--tokenizer",
        text,
        code=1,
    )
    assert "has another vocabulary" in result.stderr and not (tmp_path / "out/run").exists()


class Site(http.server.BaseHTTPRequestHandler):
    """An address on this machine with `body`, which it gives in the way that the path says."""

    body, asked, over, half = b"", [], threading.Event(), None

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        way, body, half = self.path.strip("/"), self.body, len(self.body) // 2
        self.asked.append(self.headers["Range"])
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if way == "missing":
            self.send_error(404)
        elif way in ("moved", "loop"):
            self.answer(302, Location="/broken" if way == "moved" else "/loop")
        elif way == "babble":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
        elif way == "silent":
            self.over.wait(5)
        elif way in ("unsized", "unsized-broken"):
            self.protocol_version = "HTTP/1.1"
            self.answer(200, b"%x\r\n%b\r\n" % (half, body[:half]), Transfer_Encoding="chunked")
            if way == "unsized" or start:
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) - half, body[half:]))
            self.close_connection = True
        elif start >= len(body) > 0:
            self.answer(416, Content_Range=f"bytes */{len(body)}")
        elif start and way != "deaf":
            place = f"bytes {start + (way == 'astray') * 9}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], Content_Range=place, Content_Length=len(body) - start)
        elif way == "whole" or way == "deaf" and start:
            self.answer(200, body, Content_Length=len(body))
        else:
            self.answer(200, body[:half], Content_Length=len(body))
            if way == "interrupted":
                while not self.half.exists() or self.half.stat().st_size < c.PIECE:
                    time.sleep(0.01)
                _thread.interrupt_main()  # as Ctrl-C does
            if way == "stalled":
                self.over.wait(5)
            for i in range(half, len(body), 5_000) if way in ("slow", "interrupted") else ():
                time.sleep(0.01)
                self.wfile.write(body[i : i + 5_000])


def zipped(files: list, packed: int = zipfile.ZIP_DEFLATED, mode: int = 0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = packed, mode << 16
            made.writestr(info, content)
    return buffer.getvalue()


NOISE = {f"{name}.jsonl": np.random.default_rng(i).bytes(90_000) for i, name in enumerate("abc")}
GOOD = zipped([(f"data/{name}", content) for name, content in NOISE.items()])
SHA256 = hashlib.sha256(GOOD).hexdigest()


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def download(tmp_path, monkeypatch):
    """A function that runs the command on the site: nothing or everything is then there."""
    monkeypatch.setenv("no_proxy", "*")
    fresh = {"body": GOOD, "asked": [], "over": threading.Event()}
    for name, value in {**fresh, "half": tmp_path / "pairs.partial/1.zip.partial"}.items():
        monkeypatch.setattr(Site, name, value)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *_: None  # that a client went away
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    (tmp_path / "mine").write_text("years")

    def run(way: str = "whole", digest: str = "", code: int = 0) -> str:
        url = way if "://" in way else f"http://127.0.0.1:{server.server_port}/{way}"
        monkeypatch.setitem(c.SOURCES, "blimp", [c.Source(url, {"": r"data/(\w+\.jsonl)"}, digest)])
        result = invoke("download", "blimp", "-o", tmp_path / "pairs", code=code)
        there = files_in(tmp_path)
        if not code:
            assert there == {"mine": b"years"} | {f"pairs/{key}": NOISE[key] for key in NOISE}
            assert not (tmp_path / "pairs.partial").exists()
            return result.stdout
        assert there.pop("mine") == b"years" and not (tmp_path / "pairs").exists()
        assert set(there) <= {"pairs.partial/1.zip", "pairs.partial/1.zip.partial"}
        assert result.stdout == ""
        message = result.stderr.split("Error: ")[-1].strip()
        assert url in message or "pairs.partial/1.zip" in message or "Aborted!" in message
        assert "\n" not in message.split("Aborted!")[0].split("\r")[-1].strip()
        return message

    yield run
    Site.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("digest", ["", SHA256, hashlib.md5(GOOD).hexdigest()])
@pytest.mark.parametrize("way", ["whole", "unsized", "slow"])
def test_a_download_is_loaded_once(download, way, digest):
    assert "pairs: 3 files, 270,000 bytes" in download(way, digest)
    assert "is there already" in download(way, digest)
    assert Site.asked == [None]


@pytest.mark.parametrize("digest", ["", SHA256])
@pytest.mark.parametrize(
    "way", ["broken", "moved", "interrupted", "stalled", "deaf", "unsized-broken"]
)
def test_a_broken_download_goes_on(download, way, digest, monkeypatch):
    real, half = urllib.request.urlopen, len(GOOD) // 2

    def impatient(request, timeout):
        assert timeout == 30
        return real(request, timeout=0.3)

    monkeypatch.setattr(urllib.request, "urlopen", impatient)
    message = download(way, digest, code=1)
    if way == "interrupted":
        assert "Aborted!" in message
    else:
        assert re.search(r" is not loaded: .*Run this again to go on, or put the file", message)
    got = Site.half.read_bytes()
    assert c.PIECE <= len(got) < len(GOOD) and GOOD.startswith(got)
    assert way != "broken" or f"after {half:,} of {len(GOOD):,} bytes" in message
    download(way, digest)
    assert set(Site.asked) == {None, f"bytes={len(got)}-"}
    assert len(Site.asked) == (4 if way == "moved" else 2)


def test_what_an_earlier_download_left_is_never_trusted(download):
    """Whole, too long, of another file, by hand: what comes out is the file, or a sentence."""
    for left in (GOOD, GOOD + b"more", b"x" * 1_000, b""):
        Site.half.parent.mkdir()
        Site.half.write_bytes(left)
        if left.startswith(GOOD):
            assert "HTTP Error 416" in download(code=1)
        if left == b"x" * 1_000:
            assert "has another sha256 than expected" in download(digest=SHA256, code=1)
            assert files_in(Site.half.parent) == {}
        download(digest=SHA256)
        shutil.rmtree(Site.half.parent.with_name("pairs"))
    Site.half.parent.mkdir()
    Site.half.with_name("1.zip").write_bytes(b"not it")
    assert "has another sha256" in download(digest=SHA256, code=1)
    asked = len(Site.asked)
    Site.half.with_name("1.zip").write_bytes(GOOD)
    download("missing", SHA256)
    assert len(Site.asked) == asked


def test_a_download_that_cannot_be_is_one_sentence(download, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/x.zip"
    by_hand = r" is not loaded: .*{}.*put the file there by hand: \S+pairs\.partial/1\.zip\.$"
    for way, reason in (
        ("missing", "HTTP Error 404: Not Found"),
        ("loop", "infinite loop"),
        ("babble", "SSH-2.0-OpenSSH"),
        (closed, "refused"),
    ):
        assert re.search(by_hand.format(reason), download(way, code=1)), way
    for digest in ("0" * 32, "0" * 64):
        message = download(digest=digest, code=1)
        assert f"expected, {digest}. What was loaded is removed" in message
        assert files_in(Site.half.parent) == {}
    real = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: real(url, None, 0.2))
    assert re.search(by_hand.format("timed out"), download("silent", code=1))

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert re.search(by_hand.format("not known"), download("http://osf.test/x", code=1))


def test_a_full_disk_keeps_what_was_loaded(download):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        message = download(code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in message
    download()
    assert Site.asked == [None, "bytes=100000-"]


def hostile_archives():
    """Each: an archive, and what the one sentence on it says."""
    one = [("data/a.jsonl", b"text " * 4_000)]
    plain = zipped([("data/b.jsonl", b"good"), *one], zipfile.ZIP_STORED)
    zeros = zipped([("data/a.jsonl", b"\0" * 50_000)])
    yield b"<html>", "not a zip file"
    yield b"", "not a zip file"
    yield GOOD[: len(GOOD) // 2], "not a zip file"
    yield plain[9_000:], "cannot be unpacked"
    yield plain.replace(b"text text", b"test text", 1), "Bad CRC-32 for file 'data/a.jsonl'"
    yield plain.replace(b"\x14\0\0\0", b"\x14\0\1\0"), "encrypted"
    yield zipped([("readme", b""), ("data/", b""), ("data/a.txt", b"A")]), "expected data/"
    yield zeros, "of 30,000 bytes at most"
    yield zipped([(f"data/{i}.jsonl", b"\0" * 20_000) for i in (1, 2)]), "30,000 bytes"
    yield zeros.replace((50_000).to_bytes(4, "little"), b"\x09\0\0\0"), "Bad CRC-32"


def test_a_hostile_archive_is_one_sentence(download, monkeypatch):
    monkeypatch.setattr(c, "ROOM", 30_000)
    for content, wanted in hostile_archives():
        Site.body = content
        message = download(code=1)
        assert wanted in message and re.search("[Dd]elete it,? and run this again.$", message), wanted
        assert files_in(Site.half.parent) == {"1.zip": content}
        Site.half.with_name("1.zip").unlink()


def test_no_bit_of_an_archive_can_be_wrong_unseen(tmp_path):
    """Any one of them: the text is what it was, or the error is a sentence."""
    files, draw, outcomes = [("data/a.jsonl", b"Some text. " * 30)], np.random.default_rng(0), []
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for _ in range(400):
            content = bytearray(zipped(files, packed))
            content[draw.integers(len(content))] ^= 1 << draw.integers(8)
            (tmp_path / "x.zip").write_bytes(content)
            try:
                c.unpack(tmp_path / "x.zip", {"": r"data/(\w+\.jsonl)"}, tmp_path / "out")
                assert files_in(tmp_path / "out") == {"a.jsonl": files[0][1]}
            except click.ClickException as error:
                outcomes.append(error.message)
    assert 400 < len(outcomes) < 800


def test_no_path_leads_out_of_the_folder(tmp_path):
    """Only what a pattern's group holds becomes a name: no slash, no dot to begin with."""
    names = ["../../data/a.jsonl", "/data/b.jsonl", "C:/x/data/c.jsonl", "data/d.jsonl"]
    left = ["data/../../e.jsonl", "data//f.jsonl", "data/..jsonl", "..\\data\\h.jsonl"]
    left += ["data/i.jsonl/", "data/x/j.jsonl", "notdata/k.jsonl", "__MACOSX/data/._d.jsonl"]
    folder = tmp_path / "deep/er/folder"
    (tmp_path / "x.zip").write_bytes(zipped([(name, name.encode()) for name in names + left]))
    c.unpack(tmp_path / "x.zip", c.SOURCES["blimp"][0].members, folder)
    (tmp_path / "x.zip").unlink()
    taken = {f"deep/er/folder/{name[-7:]}": name.encode() for name in names}
    assert files_in(tmp_path) == taken


LISTINGS = {  # what the archives of a source may hold, and which of it is taken, as what
    "babylm-2023": [
        (
            "babylm_data/babylm_10M/aochildes.train babylm_data/babylm_100M/aochildes.train "
            "babylm_data/babylm_dev/cbt.dev babylm_data/babylm_test/cbt.test babylm_data/README.md "
            "__MACOSX/babylm_data/babylm_10M/._aochildes.train babylm_data/babylm_10M/",
            {0: "train_10M/aochildes.train", 2: "dev/cbt.dev"},
        )
    ],
    "babylm-2024": [
        (
            "train_10M/ train_10M/bnc_spoken.train train_10M/childes.train .DS_Store",
            {1: "train_10M/bnc_spoken.train", 2: "train_10M/childes.train"},
        ),
        (
            "dev/simple_wiki.dev switchboard.dev",
            {0: "dev/simple_wiki.dev", 1: "dev/switchboard.dev"},
        ),
    ],
    "blimp": [
        (
            "data/ data/principle_A_case_1.jsonl data/wh_island.jsonl raw_results/x.jsonl",
            {1: "principle_A_case_1.jsonl", 2: "wh_island.jsonl"},
        )
    ],
    "blimp-filtered": [
        (
            "evaluation_data/blimp_filtered/causative.jsonl supplement_filtered/hypernym.jsonl",
            {0: "causative.jsonl"},
        )
    ],
    "supplement": [
        (
            "blimp_filtered/causative.jsonl supplement_filtered/qa_congruence_easy.jsonl",
            {1: "qa_congruence_easy.jsonl"},
        )
    ],
}


def test_every_source_is_taken_out_of_its_archives(tmp_path, monkeypatch):
    """Without `--out` it lies in data/, and all archives of a source become one folder."""
    monkeypatch.setattr(c, "HOME", tmp_path)
    assert set(LISTINGS) == set(c.SOURCES)
    for name, archives in LISTINGS.items():
        expected, work = {}, tmp_path / f"data/{name}.partial"
        work.mkdir(parents=True)
        for i, (listing, taken) in enumerate(archives):
            members = listing.split()
            (work / f"{i + 1}.zip").write_bytes(zipped([(each, each.encode()) for each in members]))
            expected |= {path: members[j].encode() for j, path in taken.items()}
        if any(source.digest for source in c.SOURCES[name]):  # which these are not
            assert "expected" in invoke("download", name, code=1).stderr
        known = [source._replace(digest="") for source in c.SOURCES[name]]
        monkeypatch.setitem(c.SOURCES, name, known)
        assert f"data/{name}: {len(expected)} files" in invoke("download", name).stdout
        assert files_in(tmp_path / "data" / name) == expected and not work.exists()


def test_an_archive_that_lacks_a_part_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped([("babylm_10M/qed.train", b"text")]))
    with pytest.raises(click.ClickException, match="expected .*babylm_dev"):
        c.unpack(tmp_path / "x.zip", c.SOURCES["babylm-2023"][0].members, tmp_path / "out")


def test_sources_are_well_formed():
    for source in itertools.chain.from_iterable(c.SOURCES.values()):
        assert source.url.startswith("https://")
        assert re.fullmatch("|[0-9a-f]{32}|[0-9a-f]{64}", source.digest)


def test_a_missing_folder_names_the_command(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(c, "HOME", tmp_path)
    for name in c.SOURCES:
        wanted = f" is not a folder: .* To get it, run python choobaca.py download {name}\\.$"
        config, folder = brief_config(tmp_path), tmp_path / "data" / name
        for args in (
            ["train", "-c", config, "--text", folder / "train_10M"],
            ["train", "-c", config, "--dev", folder],
            ["train", "-c", config, "--pairs", tmp_path / "x/../data" / name],
            ["eval-blimp", "-m", saved, "-d", folder],
            ["eval-blimp", "-m", saved, "-d", folder, "--suite", "all"],
        ):
            error = invoke(*args, *["-o", tmp_path / "out"] * (args[0] == "train"), code=1).stderr
            assert re.search(wanted, error.strip()), error
    error = invoke("eval-blimp", "-m", saved, "--suite", "supplement", code=1).stderr
    assert error.strip().endswith("run python choobaca.py download supplement.")
    error = invoke("eval-blimp", "-m", saved, "-d", tmp_path / "data/blimps", code=1).stderr
    assert "is not a folder" in error and "download" not in error


def test_every_archive_of_a_source_is_there_before_any_is_unpacked(download, monkeypatch, tmp_path):
    """One that fails leaves the others for the next call, and makes nothing."""
    download("missing", code=1)
    url = c.SOURCES["blimp"][0].url.removesuffix("missing")
    first = c.Source(url + "whole", {"": r"data/(\w+\.jsonl)"})
    second, out = c.Source(url + "missing", {"dev": r"(\w+\.dev)"}), tmp_path / "pairs"
    monkeypatch.setitem(c.SOURCES, "blimp", [first, second])
    assert "404" in invoke("download", "blimp", "-o", out, code=1).stderr
    assert set(files_in(tmp_path)) == {"mine", "pairs.partial/1.zip"}
    Site.half.with_name("2.zip").write_bytes(zipped([("dev/x.dev", b"text")]))
    asked = len(Site.asked)
    invoke("download", "blimp", "-o", out)
    assert files_in(out) == NOISE | {"dev/x.dev": b"text"} and len(Site.asked) == asked


# -----------------------------------------------------------------------------
# The embedded data


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_tiny", HOME / "data/make_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_data_is_what_the_grammar_writes(maker, tmp_path):
    maker.write(tmp_path)
    made = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    kept = {path.relative_to(TINY): path.read_bytes() for path in TINY.rglob("*") if path.is_file()}
    assert made == kept


def test_no_scored_sentence_was_ever_heard():
    heard = {
        line for name in ("train.txt", "dev.txt") for line in (TINY / name).read_text().splitlines()
    }
    pairs = c.read_pairs(TINY / "blimp")
    assert not heard & {text.strip() for pair in pairs for _, text in pair[:2]}
    assert (
        len({pair.paradigm for pair in pairs}) == 20
        and len({pair.phenomenon for pair in pairs}) == 10
    )
    assert all(pair.good != pair.bad for pair in pairs)


def test_a_bigram_model_fails_where_the_distance_is_long(maker):
    scores = maker.bigram_scores()
    for name in (
        "subject_verb_agreement_prepositional_phrase",
        "subject_verb_agreement_two_phrases",
        "subject_verb_agreement_subject_relative",
        "npi_scope",
        "wh_vs_that_with_gap",
    ):
        assert scores[name] < 0.5, name
    assert np.mean(list(scores.values())) < 0.65


# -----------------------------------------------------------------------------
# The file itself

SOURCE = (HOME / "choobaca.py").read_text()
TREE = ast.parse(SOURCE)


def test_nothing_is_used_before_it_is_defined():
    definitions = [n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    line = {n.name: n.lineno for n in definitions}
    loads = (
        (n, x)
        for n in definitions
        for x in ast.walk(n)
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)
    )
    assert {(n.name, x.id) for n, x in loads if line.get(x.id, 0) > n.end_lineno} == set()


def test_the_files_bars():
    lines = SOURCE.splitlines()
    assert len(lines) < 3300 and max(map(len, lines)) <= 100
    rulers = {line[2]: i for i, line in enumerate(lines) if re.match(r"# \d\. ", line)}
    assert list(rulers) == list("123456789") and rulers["7"] - rulers["1"] < 930
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    assert max(n.end_lineno - n.lineno + 1 for n in functions) <= 50
    assert not re.search("TODO|FIXME|XXX", SOURCE)
    top = {
        alias.name.split(".")[0]
        for n in ast.walk(TREE)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for alias in (n.names if isinstance(n, ast.Import) else [ast.alias(n.module)])
    }
    assert top - set(sys.stdlib_module_names) == {"click", "numpy", "torch", "tokenizers", "tqdm"}


def test_every_setting_is_read_somewhere():
    read = {
        n.attr
        for n in ast.walk(TREE)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
    }
    read |= {constant for _, constant in c.DIVERGENCES.values()}
    assert {field.name for field in dataclasses.fields(c.Settings)} - read == set()


def readme_settings() -> str:
    """The README's table of settings, as it has to be."""
    rows = ["| setting | what | default |", "|---|---|---|"]
    for field in dataclasses.fields(c.Settings):
        help, default = field.metadata["help"], str(field.default).removeprefix(f"{HOME}/")
        choices = f" One of {', '.join(field.metadata['choices'])}." * bool(
            field.metadata["choices"]
        )
        name = field.name.replace("_", "-")
        rows.append(f"| `--{name}` | {help}{choices} | {default and f'`{default}`'} |")
    return "\n".join(rows)


def readme_commands() -> list[list[str]]:
    """The arguments of each `python choobaca.py` and `torchrun` in the README's blocks."""
    readme = re.sub(r"\\\n *", "", (HOME / "README.md").read_text())
    lines = re.findall(r"^ {4,8}(?:\$ )?((?:python choobaca|torchrun).*)", readme, re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_the_readmes_commands_run(command, default_run, tmp_path, monkeypatch):
    """Each as it is printed, but for names in capitals, and made small where it would take long."""
    shutil.copytree(default_run / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    names = {"TRAIN_DIR": TINY, "DEV_DIR": TINY, "BLIMP_DIR": TINY / "blimp", "$seed": 5,
             "$objective": "srkl", "DIR": "runs/tiny-rkl-1-seed0",
             "TEACHER": "runs/tiny-rkl-1-seed0"}  # fmt: skip
    if command[2] == "compare":
        names |= {"runs/rkl-0": names["DIR"], "runs/fkl-1": next(Path("runs").glob("teacher-*"))}
    args = [str(names.get(arg, arg)) for arg in command[command[0] != "torchrun" :]]
    small = ["--steps", "2", "--warmup", "1", "--sample", "20"]
    if command[0] == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", *args[1:]]
        torchrun[torchrun.index("choobaca.py")] = HOME / "choobaca.py"
        done = subprocess.run([*torchrun, *small, "--out", "runs/two"], timeout=200)
        assert done.returncode == 0 and (tmp_path / "runs/two/model.safetensors").exists()
        return
    verb, *args = args[1:]
    if verb == "train" and "--config" in args:
        place = args.index("--config") + 1
        args[place] = HOME / args[place]
        args += ["--text", TINY, "--dev", TINY, "--pairs", TINY / "blimp", "--vocab-size", "300"]
        args += ["--context", "64"] * ("--teacher" in args)
        assert " GB" in invoke(verb, *args, "--dry-run").stdout
    elif verb == "train":
        assert "mean of 20" in invoke(verb, *args, *small, "--out", "runs/new").stdout
    elif verb == "download":
        assert "is there already" in invoke(verb, *args, "--out", tmp_path / "runs").stdout
    elif verb == "bench":
        sizes = ["--rows", "32", "--width", "8", "--teacher-width", "8", "--vocab-size", "64"]
        assert int(invoke(verb, *args, *sizes, "--weigh", "rkl").stdout) >= 0
    else:
        assert invoke(verb, *args).stdout


def test_the_readmes_figures_are_of_this_program(default_run, tmp_path):
    """Titles and names; the numbers of another machine may differ a little."""
    runs = [default_run / "runs/tiny-rkl-1-seed0", *default_run.glob("runs/teacher-*")]
    invoke("report", *runs, "-o", tmp_path / "report.svg")
    invoke("toy", "--svg", tmp_path / "toy.svg")
    for name in ("report.svg", "toy.svg"):
        made, shown = ((folder / name).read_text() for folder in (tmp_path, HOME / "data"))
        words = [re.findall(r">([^<>\d]*[a-z][^<>]*)</text>", text) for text in (made, shown)]
        assert words[0] == words[1] and len(words[0]) > 20
        assert made.count("<path") == pytest.approx(shown.count("<path"), abs=10)


def test_the_readmes_divergence_is_one(tmp_path, monkeypatch):
    """The ten lines, put where the README says: value and gradient, and a training of two steps."""
    readme = (HOME / "README.md").read_text()
    blocks = re.findall(r"(?:^ {4}.*\n|\n(?= {4}))+", readme[readme.index("## Add a div") :], re.M)
    function, literal = (textwrap.dedent(block).strip() for block in blocks[:2])
    function, entry = function.split("DIVERGENCES = {\n")
    assert len(blocks[0].split("\n")) <= 10
    head = "DIVERGENCES = {"
    source = SOURCE.replace(head, f"{function}\n{head}\n{entry}\n", 1)
    (tmp_path / "other.py").write_text(source)
    spec = importlib.util.spec_from_file_location("other", tmp_path / "other.py")
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "other", other)
    spec.loader.exec_module(other)
    wanted = eval(literal.split(": ", 1)[1].rstrip(","))
    z, w = (scale * torch.randn(5, 40, dtype=torch.float64) for scale in (1.0, 2.0))
    u = z.clone().requires_grad_()
    value = wanted(u.log_softmax(-1), w.log_softmax(-1), None, None)
    value.sum().backward()
    q, p, r, *_ = other.to_probabilities(z, w, torch.empty_like(z))
    found, gradient = other.DIVERGENCES["hellinger"][0](q, p, r, None, None)
    torch.testing.assert_close(found[:, 0], value.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, u.grad, rtol=0, atol=1e-10)
    args = ["train", "-c", str(brief_config(tmp_path)), "--teachers", "1", "--steps", "2"]
    args += ["--objective", "hellinger", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(other.cli, args)
    assert done.exit_code == 0, done.output


def test_the_readmes_transformers_block_runs(default_run, monkeypatch):
    transformers = pytest.importorskip("transformers")
    readme, names = (HOME / "README.md").read_text(), {}
    monkeypatch.chdir(default_run)
    lines = re.findall(r"^    ((?:from transformers|model =|tokenizer =).*)", readme, re.M)
    exec("\n".join(lines), names)
    assert isinstance(names["model"], transformers.PreTrainedModel)
    assert names["tokenizer"](" the dog").input_ids


def first_cells(readme: str, head: str) -> set[str]:
    """What stands first in the rows of the table that begins so."""
    table = readme[readme.index(head) :].split("\n\n")[0]
    return set(re.findall(r"^\| `([^`]+)`", table, re.M)) - {"--objective"}


def test_the_readme_is_of_this_program(default_run):
    """Its table of settings is the program's, its log keys are all there, its output is real."""
    readme = (HOME / "README.md").read_text()
    assert readme_settings() in readme, readme_settings()
    log = (default_run / "runs/tiny-rkl-1-seed0/log.jsonl").read_text().splitlines()
    keys = {key for line in log for key in json.loads(line)}
    assert first_cells(readme, "| key | what |") == keys
    objectives = {field.name: field for field in dataclasses.fields(c.Settings)}["objective"]
    named = first_cells(readme, "| `--objective` | D |") | {"akl-r"}
    assert named == set(objectives.metadata["choices"])
    assert f"about {round(len(SOURCE.splitlines()), -2):,} lines" in readme
    for line in (default_run / "out.txt").read_text().splitlines():
        shown = re.sub(r"[\d.\s]+", " ", line).strip()
        assert shown in re.sub(r"[\d.\s]+", " ", readme), line
