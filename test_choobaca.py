"""The tests of choobaca.py, in the order of its sections: python -m pytest -q

Every fast version is held against the literal definition, in float64 where that matters. Tests with
transformers are skipped where it is not installed. To time the loss: python test_choobaca.py bench
"""
import _thread
import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
import tokenize
import urllib.request
import zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch
from xml.etree import ElementTree

# One thread: as fast for such small models, and not 5 times slower beside another busy process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).resolve().parent / "data"))

import choobaca as c
import click
import download as load
import figures
import glue
import instruct
import make_tiny
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from pytest import approx, fixture, importorskip, mark, raises
from torch.utils._python_dispatch import TorchDispatchMode

HOME = Path(__file__).resolve().parent
TINY = HOME / "data/tiny"
RUN = "runs/tiny-rkl-1-seed0"
SMALL = dict(width=32, layers=2, heads=2, inner=48, positions=32, context=16, batch_size=8,
             objective="rkl", teachers=1)

def settings(**changes):
    return c.Settings(**{**SMALL, **changes})

def sharpened(m, factor):
    """A model with its matrices scaled, so that its logits are far from equal."""
    for parameter in m.parameters():
        parameter.data *= factor if parameter.dim() > 1 else 1
    return m

def model(V=50, seed=0, sharp=1.0, **changes):
    """A small model."""
    return sharpened(c.new_model(settings(**changes), V, seed), sharp)

def written_model(folder, vocabulary, **changes):
    """A small model, and its folder."""
    m = model(V=vocabulary.size, **changes).eval()
    c.save_model(Path(folder), m, vocabulary)
    return m

def keep(folder, suite, pairs, scores):
    """Scores as if the model in the folder had them."""
    with patch.multiple(c, encode_pairs=lambda _, pairs, *more: ({}, pairs),
                        score_pairs=lambda *_: (pairs, scores)):
        c.score_folder(Path(folder), "cpu", pairs, suite)

def parameters(s):
    return sum(x.numel() for x in c.empty_model(s, s.vocab_size).parameters())

def logits(m, ids):
    return m.hidden(ids) @ m.head.T

def encoded(vocabulary, text):
    """A text's ids, without special tokens."""
    return vocabulary.tokenizer.encode(text, add_special_tokens=False).ids

def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def edit(path, **changes):
    """Change values in a file of JSON."""
    c.write_json(path, c.read_json(path) | changes)

def invoke(command, code=0):
    """The result of a command of one of the programs, checked to end so and with no traceback."""
    words = shlex.split(command)
    script = {"glue": glue.cli, "instruct": instruct.cli}.get(words[0])
    programs = (c.cli, load.cli, figures.cli, benchmark)
    program = script or next(x for x in programs if words[0] in x.commands)
    result = CliRunner().invoke(program, words[1:] if script else words)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    return result

def error(command, code=1):
    """What a command says that ends with an error: one sentence, and it prints nothing."""
    result = invoke(command, code)
    assert result.stdout == "" and result.stderr.count("Error: ") == 1
    assert result.stderr.split("Error: ")[1].count("\n") == 1, result.stderr
    return result.stderr

def refused(command, cases):
    """Each of some flags ends a command with a sentence, which has the words beside it."""
    for flags, wanted in cases.items():
        assert wanted in error(f"{command} {flags}"), flags

def brief_config(folder, extra="", teachers=""):
    """A TOML file of a run of seconds, with two teachers, on a part of the text."""
    path, text = folder / "brief.toml", folder / "brief"
    text.mkdir(exist_ok=True)
    for name, size in (("train.txt", 80_000), ("dev.txt", 20_000)):
        (text / name).write_text((TINY / name).read_text()[:size])
    shape = "vocab_size=300 context=32 batch_size=8 width=32 layers=1 inner=32".split()
    course = "steps=6 warmup=2 lr=3e-3 sample=40 dev_tokens=2000".split()
    path.write_text("\n".join(shape + course) + f"""
        text = "{text}"
        pairs = "{TINY / "blimp"}"
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

@fixture(scope="module")
def vocabulary(tmp_path_factory):
    return c.read_corpus(settings(vocab_size=400), tmp_path_factory.mktemp("cache")).vocabulary

@fixture
def saved(tmp_path, monkeypatch, vocabulary):
    """A model's folder, in the test's, which is made the current one."""
    monkeypatch.chdir(tmp_path)
    written_model("model", vocabulary)
    return Path("model")

@fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """The README's first command, if a test asks for it: it runs beside those that come before."""
    folder, process = tmp_path_factory.mktemp("default"), None
    if any("default_run" in item.fixturenames for item in request.session.items):
        command = [sys.executable, HOME / "choobaca.py", "train", "--objective", "rkl"]
        with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
            process = subprocess.Popen([*command, "--teachers", "1"], cwd=folder, stdout=out,
                                       stderr=err)
    yield folder, process
    if process:
        process.kill()

@fixture(scope="session")
def default_run(begun):
    """The folder in which the README's first command was run, with its output in out.txt."""
    folder, process = begun
    assert process.wait(1800) == 0, (folder / "err.txt").read_text()[-2000:]
    return folder

# 1. The idea -----------------------------------------------------------------

LESSON = (HOME / "choobaca.py").read_text().split("Here the lesson ends")[0]

def numbers(text):
    return [float(x) if "." in x else int(x) for x in re.findall(r"-?\d*\.?\d+", text)]

def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()

def some_ids(*shape, V=50):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))

def alike(found, wanted, tolerance=1e-10):
    return all(torch.allclose(a, b, tolerance, tolerance) for a, b in zip(found, wanted))

def off(found, wanted, dim=None):
    """The relative error, as a norm."""
    return (found - wanted).norm(dim=dim) / wanted.norm(dim=dim)

def loss_inputs(dtype=torch.float64, N=23, C=8, C_=12, V=57):
    """hidden, head, targets, the teacher's hidden and head."""
    hidden, t_hidden, head, t_head = (randn(*shape, seed=seed).to(dtype) for seed, shape in
                                      enumerate([(N, C), (N, C_), (V, C), (V, C_)]))
    return [hidden.requires_grad_(), head.requires_grad_(), some_ids(N, V=V), t_hidden, t_head]

def fused(inputs, beta=1.0, chunk=8, **changes):
    """The loss, its gradients for hidden and head, and its two parts."""
    loss, parts = c.FusedLoss.apply(*inputs, settings(**changes, chunk=chunk), beta)
    return loss, *torch.autograd.grad(loss, inputs[:2]), parts

BATCH = some_ids(8, 16), some_ids(8, 16).roll(-1, 1)

def step_of(m, coach=None, *how, **changes):
    """A step of training, at beta = 1 if nothing else is said: loss, its parts, gradient's norm."""
    s = settings(**changes) if coach else settings(objective="ce")
    return c.train_step(m, c.make_optimizer(m, s), coach, *BATCH, s, *(how or [1.0]),
                        torch.float32, torch.amp.GradScaler("cpu", enabled=False))

@mark.parametrize("tau, alpha", [(2.0, 0.5), (1.0, 0.2), (4.0, 0.9), (2.0, 0.0), (2.0, 1.0)])
def test_the_lesson_in_five_lines_is_the_fused_loss(tau, alpha):
    """With its gradients; the one for the logits also as it is written out by hand."""
    hidden, head, targets, t_hidden, t_head = inputs = loss_inputs()
    z, w = hidden @ head.T, t_hidden @ t_head.T
    loss = c.plain_loss(z, w, targets, tau, alpha)
    slope, *wanted = torch.autograd.grad(loss, (z, hidden, head))
    assert alike(c.gradient_of_logits(z, w, targets, tau, alpha), slope)
    assert alike(fused(inputs, temperature=tau, alpha=alpha), [loss, *wanted])

def test_distil_in_short_trains_a_student_by_the_gradient_of_train_step():
    """However many rows it takes at once."""
    student, teacher, rows = model(), model(sharp=6, seed=5), []
    coach = c.Coach([teacher])
    c.distil_in_short(student, teacher, [BATCH])
    for micro_batch in (0, 2, 1):
        same = model()
        rows.append(step_of(same, coach, 1.0, clip=0.0, micro_batch=micro_batch))
        for p, q in zip(student.parameters(), same.parameters()):
            assert off(p.grad, q.grad) < 1e-4
    assert alike(rows, rows[:1] * 3, 1e-5)
    c.distil_in_short(student, teacher, [BATCH] * 60)
    assert step_of(student, coach)[0] < 0.6 * rows[0][0]

def test_what_is_only_read_is_not_learnt_from(monkeypatch):
    """An id stored as ~i has a target of -1: loss, gradient and held-out loss are of the others."""
    student, teacher, s = model(sharp=3), model(sharp=6, seed=5), settings(random_offset=False)
    ids = some_ids(129).numpy()
    inputs, targets = batch = c.batch_at(0, np.where(np.arange(129) % 16 < 9, ~ids, ids), s)
    assert torch.equal(inputs, c.batch_at(0, ids, s)[0])
    z, w = (logits(m, inputs)[targets >= 0] for m in (student, teacher))
    learnt = targets[targets >= 0]
    assert len(learnt) == 8 * 7 and targets.min() == -1
    wanted = c.plain_loss(z, w, learnt, 2.0, 0.5) / 56
    slopes = torch.autograd.grad(wanted, [*student.parameters()], retain_graph=True)
    monkeypatch.setattr(c, "windows", lambda *_: batch)
    assert c.held_out_loss(student, ids, s) == approx(F.cross_entropy(z, learnt).item(), rel=1e-5)
    monkeypatch.setattr(sys.modules[__name__], "BATCH", batch)
    assert step_of(student, c.Coach([teacher]), clip=0.0, micro_batch=2)[0] == approx(wanted.item())
    assert all(off(p.grad, slope) < 1e-4 for p, slope in zip(student.parameters(), slopes))

# 2. Text to ids to batches ---------------------------------------------------

def test_tokenizer_training_is_repeatable_and_any_text_survives(tmp_path):
    for name in "ab":
        c.save_tokenizer(tmp_path / name, c.train_tokenizer(c.read_text(TINY, r"train\.txt"), 500))
    tokenizer, prefix_id, files = loaded = c.load_vocabulary(tmp_path / "a")
    assert files == c.load_vocabulary(tmp_path / "b").files and loaded.size == 500
    ids = [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>")]
    assert ids == [0, prefix_id, 2] == [0, 1, 2]
    text = " Tom’s naïve 🐈 said: \t£5!"
    assert tokenizer.decode(encoded(loaded, text)) == text
    assert c.train_tokenizer(["ab cd"], 300).get_vocab_size() == 3 + 256    # each pair occurs once

@mark.parametrize("prefix", ["line", "none"])
def test_encoding_is_as_its_docstring_shows(vocabulary, prefix):
    """"none" is BabyLlama's, of the whole text at once; a special token in the text is text."""
    exact = tokenizers.Tokenizer.from_str(vocabulary.tokenizer.to_str())    # adds no space
    exact.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    exact.post_processor = tokenizers.processors.ByteLevel()
    example = re.search(rf"{prefix} +<?.*", c.encode.__doc__)[0].replace("<s>", '"<s>"')
    wanted = exact.encode("".join(map(ast.literal_eval, re.findall('".*?"', example)))).ids
    text = "A dog.\nIt ran, didn't it?\n«No!»\n"
    shown, odd, full = (c.encode(vocabulary, lines, prefix).tolist() for lines in
                        (["A dog.", "It ran."], ["a <s> b"], text.splitlines()))
    assert shown == wanted and odd.count(1) == (prefix == "line")
    assert (full == exact.encode(text).ids) == (prefix == "none")

def test_text_is_sorted_and_what_is_held_out_is_not_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe.train")
    for name in ("b.train", "a.txt", "dev.txt", "c.dev", "notes.md", "._a.train"):
        (tmp_path / name).write_text(f"\ufeff{name}\n\n  indented \r\n", encoding="utf-8")
    read = c.read_corpus(settings(text=str(tmp_path), vocab_size=300), tmp_path / "cache")
    texts = [read.vocabulary.tokenizer.decode(part.tolist()) for part in (read.train, read.dev)]
    assert texts == [" a.txt indented b.train indented", " c.dev indented dev.txt indented"]

@mark.parametrize("offset", [False, True])
def test_an_epoch_reads_every_row_once(offset):
    """And a batch depends on seed and step alone."""
    s, ids = settings(random_offset=offset), np.arange(16 * 51, dtype=np.uint16)
    inputs, targets = map(torch.cat, zip(*(c.batch_at(step, ids, s) for step in range(12))))
    starts = inputs[:, 0].view(2, 48).numpy()           # of two epochs
    orders = np.stack([c.row_starts(c.count_rows(len(ids), s), s, epoch) for epoch in (0, 1)])
    assert (starts == orders[:, :48]).all() and (orders[0] != orders[1]).any()
    assert len({*starts[0] // 16}) >= 0.6 * 48 and orders.max() + 17 <= len(ids)
    assert offset or sorted(orders[0]) == [*range(0, 800, 16)]
    assert torch.equal(inputs + 1, targets) and inputs.shape == (96, 16)
    for seed in (0, 1):
        again = c.batch_at(9, ids, dataclasses.replace(s, seed=seed))[0]
        assert torch.equal(again, inputs[72:80]) == (seed == 0)
    T, start, *shown = numbers(c.windows.__doc__.split("...,")[1].split(" An ")[0])
    assert torch.cat(c.windows(ids, np.array([start]), T), 1).tolist() == [shown]

# 3. Models -------------------------------------------------------------------

every_kind = mark.parametrize("kind", [
    dict(), dict(tied=True), dict(kv_heads=1, rope_theta=500.0), dict(model_type="gpt2"),
    dict(model_type="gpt2", tied=True)])

@every_kind
def test_a_position_sees_those_before_it_from_a_cache_or_not(kind):
    m, ids, cache = model(sharp=5, **kind), some_ids(3, 16, V=49), [[], []]
    before, after = m.hidden(ids), m.hidden(ids + (torch.arange(16) > 8))
    assert alike(before[:, :9], after[:, :9], 1e-6) and not alike(before[:, 9:], after[:, 9:], 1e-3)
    parts = []
    for start, end in itertools.pairwise((0, 5, 6, 8, *range(9, 17))):
        row = torch.arange(start, end)
        sees = torch.arange(end) <= row[:, None]
        tree = c.Tree(row[None], sees[None, None])
        parts.append(m.hidden(ids[:, row], cache, tree))
    assert alike(torch.cat(parts, 1), before, 1e-5)

def test_plain_attention_is_the_librarys():
    q, k, v = randn(3, 2, 4, 9, 8)
    for seen in (torch.ones(9, 9).tril() > 0, torch.eye(9).bool() | (randn(2, 1, 9, 9) > 0)):
        wanted = F.scaled_dot_product_attention(q, k, v, seen)
        assert alike(c.plain_attention(q, k, v, seen), wanted)

def test_rotary_products_depend_on_distance_alone():
    angles = c.rotary_angles(torch.arange(20), 8, 10_000.0)
    q, k = (c.rotate(x.expand(1, 1, 20, 8), *angles)[0, 0] for x in randn(2, 8).float())
    for distance in range(-5, 6):
        assert (q @ k.T).diagonal(distance).std() < 1e-5

def test_the_papers_sizes():
    """58M, 360M and 705M, as the paper counts them."""
    llama = dict(width=1024, layers=24, inner=3072)
    gpt2 = dict(model_type="gpt2", width=1536, layers=24, heads=16, inner=6144, tied=True)
    built = [parameters(c.Settings(**kind, vocab_size=16_000)) for kind in ({}, llama, gpt2)]
    assert built[0] == 58_343_936 and [round(x / 1e6) for x in built] == [58, 360, 705]

@every_kind
def test_initial_weights_by_role(kind):
    """A projection back into GPT-2's residual stream is smaller. A step changes every parameter."""
    before = torch.get_rng_state()
    m, again = (model(500, 7, width=128, inner=256, layers=3, **kind) for _ in "ab")
    assert torch.equal(torch.get_rng_state(), before), "the global stream was drawn on"
    assert all(map(torch.equal, m.parameters(), again.parameters()))
    step_of(again)
    for (name, x), stepped in zip(m.named_parameters(), again.parameters()):
        size = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
        mean = 0 if x.dim() > 1 or name.endswith("bias") else 1
        assert x.mean().item() == approx(mean, abs=1e-3), name
        assert x.std().item() == approx(size if x.dim() > 1 else 0, rel=0.05), name
        assert "c_attn.bias" in name or not torch.equal(x, stepped), name

def theirs_as_ours(folder, m):
    """The model that transformers reads in a folder, checked to be m."""
    read = importorskip("transformers").AutoModelForCausalLM.from_pretrained
    theirs, ids = read(folder).eval(), torch.arange(320).view(20, 16)
    assert (theirs(ids).logits - logits(m, ids)).abs().max() < 1e-5
    return theirs

@every_kind
def test_a_saved_model_comes_back_here_and_in_transformers(tmp_path, vocabulary, kind):
    """Which writes text that ends where our lines end."""
    m, ids = written_model(tmp_path, vocabulary, sharp=5, **kind), some_ids(25, 16)
    back, same = c.load_model(tmp_path, "cpu")
    assert torch.equal(logits(m, ids), logits(back, ids)) and back.config.positions == 32
    assert same.files == vocabulary.files
    theirs, text = theirs_as_ours(tmp_path, m), " The dogs ran."
    theirs.lm_head.weight.data[1] *= 10                 # the end is likely at some places
    torch.manual_seed(0)
    rows = theirs.generate(torch.ones(20, 1, dtype=torch.long), do_sample=True, max_length=16)
    ended = [row[1:] for row in rows.tolist() if 1 in row[1:]]
    assert ended and all({*row[row.index(1) + 1:]} <= {0} for row in ended)
    tokenizer = importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.encode(text) == [1, *encoded(vocabulary, text)]
    assert tokenizer.encode(text, add_special_tokens=False) == encoded(vocabulary, text)

# 4. Divergences --------------------------------------------------------------

def literal_kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)

def literal_both(log_q, log_p, weight):
    return weight * literal_kl(log_p, log_q) + (1 - weight) * literal_kl(log_q, log_p)

def literal_share(log_q, log_p, mu):
    """AKL paper, Eqs. 12 to 14: sort all, keep the fewest that reach mu."""
    p, order = log_p.detach().exp().sort(-1, descending=True)
    gap = (p - log_q.detach().exp().gather(1, order)).abs()
    likely = F.pad(p.cumsum(-1)[:, :-1] < mu, (1, 0), value=True)
    return (gap * likely).sum(-1) / gap.sum(-1)

def literal_mixture(log_q, log_p, share):
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()

def literal_jsd(q, p, _, s):
    m = literal_mixture(q, p, s.jsd_beta)
    return s.jsd_beta * literal_kl(p, m) + (1 - s.jsd_beta) * literal_kl(q, m)

def literal_drkl(log_q, log_p, targets, s):
    """The target and the rest as two classes, and the rest among themselves."""
    two, rest = [], []
    for x in (log_q, log_p):
        others = x[torch.ones_like(x).scatter(1, targets, 0).bool()].view(len(x), -1)
        two.append(torch.cat([x.gather(1, targets), others.logsumexp(-1, True)], 1))
        rest.append(others.log_softmax(-1))
    return literal_kl(*two) + s.gamma * literal_kl(*rest)

def literal_todi(q, p, *_):
    share = (p - q).detach().sigmoid()
    return (share * p.exp() * (p - q) + (1 - share) * q.exp() * (q - p)).sum(-1)

def literal_ab(q, p, _, s):
    a, b = s.ab_alpha, s.ab_beta
    mean = (a * ((a + b) * p).exp() + b * ((a + b) * q).exp()) / (a + b)
    return ((a * p + b * q).exp() - mean).sum(-1) / (-a * b)

LITERAL = {
    "fkl": lambda q, p, t, s: literal_kl(p, q), "rkl": lambda q, p, t, s: literal_kl(q, p),
    "fkl+rkl": lambda q, p, t, s: literal_both(q, p, s.fkl_weight),
    "alternate": lambda q, p, t, s: literal_both(q, p, s.fkl_weight),
    "akl": lambda q, p, t, s: literal_both(q, p, literal_share(q, p, s.mu)),
    "akl-r": lambda q, p, t, s: literal_both(q, p, 1 - literal_share(q, p, s.mu)),
    "skl": lambda q, p, t, s: literal_kl(p, literal_mixture(q, p, s.skew)),
    "srkl": lambda q, p, t, s: literal_kl(q, literal_mixture(q, p, 1 - s.skew)),
    "tvd": lambda q, p, t, s: 1 - torch.minimum(p.exp(), q.exp()).sum(-1),
    "jsd": literal_jsd, "drkl": literal_drkl, "todi": literal_todi, "ab": literal_ab,
}
CONSTANTS = dict(fkl_weight=0.3, mu=0.4, skew=0.2, jsd_beta=0.7, ab_alpha=0.2, gamma=0.8)
every_divergence = mark.parametrize("name", c.DIVERGENCES)

def divergence(name, u, v, targets, **changes):
    """Value and gradient, as FusedLoss gets them: u without its rows' maxima."""
    s = settings(objective=name, **changes)
    return c.divergence_(s, 1.0, u - u.amax(-1, True), v.clone(), targets)

def literal(name, u, v, targets, **changes):
    """Value and gradient by the definition and autograd, in float64."""
    u = u.detach().double().requires_grad_()
    logs = u.log_softmax(-1), v.double().log_softmax(-1)
    value = LITERAL[name](*logs, targets, settings(**changes))
    return value.detach()[:, None], *torch.autograd.grad(value.sum(), u)

def near(name, *args, **changes):
    value, slope = divergence(name, *args, **changes)
    wanted, right = literal(name, *args, **changes)
    return off(value.sum(), wanted.sum()) < 1e-5 and off(slope, right) < 1e-5

@every_divergence
@mark.parametrize("V, rows", [(3, 256), (57, 256), (16_000, 8)])
def test_divergences_and_their_gradients(name, V, rows):
    """Against the literal definition: 1e-10 in float64, 1e-5 in fp32."""
    targets = some_ids(rows, 1, V=V)
    for seed, (scale, tau) in enumerate(itertools.product((0.1, 1.0, 10.0), (1, 2, 4))):
        u, v = scale * randn(2, rows, V, seed=seed).float() / tau
        value, slope = divergence(name, u.double(), v.double(), targets, **CONSTANTS)
        assert value.shape == (rows, 1) and (value > 0).all()
        assert alike((value, slope), literal(name, u, v, targets, **CONSTANTS))
        if name.startswith("akl"):      # Eq. 12 jumps: leave out the rows where rounding may decide
            logs = u.double().log_softmax(-1), v.double().log_softmax(-1)
            low, high = (literal_share(*logs, CONSTANTS["mu"] + step) for step in (-2e-6, 2e-6))
            u, v = u[low == high], v[low == high]
        assert len(u) >= 0.6 * rows
        assert near(name, u, v, targets[:len(u)], **CONSTANTS), (scale, tau)

@every_divergence
def test_no_divergence_breaks_at_the_ends_of_fp32(name):
    """A teacher that rules tokens out, or is sure, a sure student, any label; in FusedLoss, too."""
    flat, ruled, sure, other, nearly = torch.zeros(5, 40)
    ruled[:30] = -math.inf
    sure[3] = other[7] = 200.0
    nearly[3] = math.log(40 * 1e7)                              # 1 - q is about 1e-7
    students = flat, sure, nearly, randn(40).float()
    teachers = flat, ruled, sure, other, nearly, randn(40, seed=1).float()
    cases = itertools.product(students, teachers, torch.tensor([0, 3, 7, 35]))
    a, b, t = map(torch.stack, zip(*cases))
    one, head = torch.eye(len(a)).requires_grad_(), a.T.contiguous().requires_grad_()
    found = (*divergence(name, a, b, t[:, None]),
             *fused((one, head, t, one, b.T.nan_to_num(neginf=-3e38)), objective=name))
    assert all(x.isfinite().all() for x in found) and (found[0] > -1e-6).all()

@every_divergence
def test_neither_level_nor_size_costs_a_digit(name):
    """GPT-2's logits lie near -100; a sure model and one that is not; equal models are at 0."""
    (z, w), targets = randn(2, 64, 57).float(), some_ids(64, 1, V=57)
    assert near(name, z + 100, w - 300, targets)
    for scale in (0.1, 100.0):
        assert all(x.abs().max() < 1e-6 for x in divergence(name, scale * z, scale * z, targets))
    z, w = randn(2, 8, 16_000).float()
    for scale in (0.01, 8.0):
        assert near(name, scale * z, 0.08 / scale * w, some_ids(8, 1, V=16_000))

def test_alternate_is_forward_then_reverse(here, monkeypatch):
    weights, plain = [], c.train_step
    monkeypatch.setattr(c, "train_step", lambda *a: weights.append(a[5].fkl_weight) or plain(*a))
    train("r/a", "--teachers 1 --steps 3 --objective alternate")
    assert weights[-3:] == [1, 0, 1]

@mark.parametrize("tau", [0.5, 30.0])
def test_no_temperature_breaks_the_loss(tau):
    """softmax(z / tau) to the power of tau has no number left for it at such sizes."""
    one, head = torch.eye(3).requires_grad_(), (0.3 * randn(20_000, 3).float()).requires_grad_()
    *found, parts = fused((one, head, torch.arange(3), one, 0.5 * head), temperature=tau)
    wanted = F.cross_entropy(head.T, torch.arange(3), reduction="sum")
    assert off(parts[0], wanted) < 1e-5 and all(x.isfinite().all() for x in found)

@every_divergence
@mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_a_student_that_is_sure_or_rules_the_target_out(name, dtype, tolerance):
    """1 - q from 1e-1 to 1e-7, which costs float64 7 of its 16 digits; and logits so low that q is
    0 in fp32 and, from -708 on, float64."""
    z, w = randn(2, 14, 57).to(dtype)
    w[:, 0] = w[:, 1:].logsumexp(-1) + 2
    z[:7, 0] = z[:7, 1:].logsumexp(-1) + torch.arange(1, 8) * math.log(10)
    z[7:, 0] = -torch.tensor([100, 200, 300, 500, 700, 708, 1000])
    inputs = z, w, torch.zeros(14, 1, dtype=torch.long)
    for found, wanted in zip(divergence(name, *inputs), literal(name, *inputs)):
        assert (off(found, wanted, -1) < tolerance).all()

def test_the_likely_tokens_are_the_fewest_that_reach_mu():
    """One at least; what ties with the last one is likely, too; of equal models, one half."""
    p, q = randn(2, 99, 5).softmax(-1)
    for mu in (0.0, 0.5, 1.0):
        assert alike(c.likely_share(q, p, mu)[:, 0], literal_share(q.log(), p.log(), mu)), mu
        assert (c.likely_share(p, p, mu) == 0.5).all()
    tied = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]])
    assert c.likely_share(tied.flip(1), tied, 0.5).flatten().tolist() == approx([1, 0.5])

def test_single_step_is_reverse_kl_and_mixing_a_weight():
    """MiniLLM's gradient: the mean over y ~ q of grad log q(y) (log q(y) - log p(y)). And Eq. 2."""
    u, v = randn(2, 1, 11)
    log_q = u.requires_grad_().log_softmax(-1)
    wanted = torch.autograd.grad(log_q, u, log_q.exp() * (log_q - v.log_softmax(-1)))
    assert alike(divergence("rkl", u.detach(), v, None)[1:], wanted, 1e-12)
    unmixed, mixed = (fused(loss_inputs(), beta, alpha=0.0)[1:3] for beta in (1.0, 0.3))
    assert alike([0.3 * x for x in unmixed], mixed)

def test_the_worked_example_is_right_to_its_printed_digits():
    shown = re.split('Four tokens;|# Forward KL', LESSON)[1].splitlines()
    p, q, r, (forward, *raised), (reverse, *lowered) = map(numbers, shown[3:8])
    u, v = torch.tensor([[q], [p]]).double().log()
    found = torch.cat([u - v, *divergence("fkl", u, v, None), *divergence("rkl", u, v, None)], 1)
    assert found[0].tolist() == approx([*r, forward, *raised, reverse, *lowered], abs=5.01e-4)
    assert min(raised) == raised[1] and max(lowered) == lowered[3]      # "raise cat", "lower of"

# 5. The fused loss -----------------------------------------------------------

def whole(inputs, beta=1.0, **changes):
    """What fused returns, by the paper's Eqs. 1, 2 and 9 with all logits at once."""
    s = settings(**changes)
    hidden, head, targets, t_hidden, t_head = inputs
    kept = targets >= 0
    z, w = hidden[kept] @ head.T, t_hidden[kept] @ t_head.T
    loss = ce = F.cross_entropy(z, targets[kept], reduction="sum")
    kl = 0 * ce
    if s.objective != "ce":
        mixed = beta * w + (1 - beta) * z.detach()
        log_q, log_p = ((x / s.temperature).log_softmax(-1) for x in (z, mixed))
        kl = s.temperature**2 * LITERAL[s.objective](log_q, log_p, targets[kept, None], s).sum()
        loss = s.alpha * ce + (1 - s.alpha) * (s.context if s.reduction == "batchmean" else 1) * kl
    return loss, *torch.autograd.grad(loss, inputs[:2]), torch.stack([ce, kl])

@mark.parametrize("changes", [
    *(dict(objective=name) for name in ("ce", *LITERAL)),
    dict(alpha=0.0, reduction="batchmean"), dict(objective="fkl", temperature=4.0, alpha=0.9)])
@mark.parametrize("beta", [1.0, 0.7, 0.1])
def test_fused_loss_is_the_whole_loss(changes, beta, monkeypatch):
    """Whatever the chunk, and the rows that a core works on at once; the paper's k = 5 is one."""
    inputs, changes = loss_inputs(), changes | CONSTANTS
    inputs[2][4:6] = -100                                       # ignored
    wanted = whole(inputs, beta, **changes)
    for chunk, cache in ((5, 57), (23, 100), (100, 2**17)):
        monkeypatch.setattr(c, "BLOCK", cache)
        assert alike(fused(inputs, beta, chunk, **changes), wanted)

def test_batchmean_is_pytorchs_and_babyllamas():
    """KLDivLoss(batchmean) on (B, T, V) logits: T times the mean over tokens."""
    hidden, head, _, t_hidden, t_head = inputs = loss_inputs(N=3 * 16)
    loss, *_ = fused(inputs, objective="fkl", alpha=0.0, reduction="batchmean")
    z, w = (x.view(3, 16, -1) / 2 for x in (hidden @ head.T, t_hidden @ t_head.T))
    wanted = F.kl_div(z.log_softmax(-1), w.softmax(-1), reduction="batchmean")
    assert alike([loss / (3 * 16)], [4 * wanted])

def test_what_gets_a_gradient():
    """Only what asks for one; a tied head both of its own; and nothing where all is ignored."""
    hidden, head, targets, *teacher = inputs = loss_inputs()
    _, *both, _ = fused(inputs)
    for i, pair in enumerate([(hidden, head.detach()), (hidden.detach(), head)]):
        alone, _ = c.FusedLoss.apply(*pair, targets, *teacher, settings(chunk=8), 1.0)
        assert torch.equal(torch.autograd.grad(alone, pair[i])[0], both[i])
    tied = head[:23], head, targets, *teacher
    assert alike(fused(tied)[2:], whole(tied)[2:])
    assert not any(x.any() for x in fused((hidden, head, targets * 0 - 100, *teacher)))

@mark.parametrize("dtype, error", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
@mark.parametrize("autocast", [True, False])
def test_half_precision(dtype, error, autocast):
    """The mean over many tokens: dividing before the matmuls would leave nothing of it in fp16."""
    kind = torch.float32 if autocast else dtype
    exact, inputs = (loss_inputs(dtype, N=4000, V=300) for dtype in (torch.float32, kind))
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss, _ = c.FusedLoss.apply(*inputs, settings(chunk=512), 1.0)
    scale = (2.0**16 if dtype == torch.float16 and autocast else 1.0) / 4000
    for x, wanted in zip(torch.autograd.grad(loss * scale, inputs[:2]), fused(exact)[1:3]):
        assert x.dtype == kind and off(x.float() / scale, wanted) < error

class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = filter(torch.is_tensor, out if isinstance(out, (tuple, list)) else [out])
        self.elements = max([self.elements, *(tensor.numel() for tensor in made)])
        return out

@mark.parametrize("objective", ["ce", *LITERAL])
def test_no_array_of_all_logits_is_ever_held(objective):
    V, chunk, sizes = 500, 10, []
    for N in (400, 2000):
        with Largest() as largest:
            fused(loss_inputs(torch.float32, N=N, V=V), 0.7, chunk, objective=objective)
        sizes.append(largest.elements)
    assert chunk * V <= sizes[0] <= 4 * chunk * V and sizes[1] <= max(sizes[0], 2000 * 12)

def test_two_teachers_are_the_mean_of_their_logits():
    teachers = [model(sharp=5, seed=1), model(sharp=5, seed=2, model_type="gpt2", width=48)]
    ids, coach = some_ids(2, 16), c.Coach(teachers)
    wanted = sum(logits(teacher, ids) for teacher in teachers) / 2
    assert alike(coach.hidden(ids) @ coach.head.T, wanted, 1e-4)
    assert not coach.hidden(ids).requires_grad

# 6. Schedules and one step ---------------------------------------------------

def test_learning_rate_beta_and_pytorchs_t_max():
    """Eq. 3 by epoch; TAID's share of the teacher, from 0.4 to 1, by step."""
    s = settings(beta=0.7, beta_end=0.0)
    betas = [c.beta_at(step, 60, 10, s) for step in range(60)]
    assert betas[::10] == betas[9::10] == [0.7 * (1 - epoch / 6) for epoch in range(6)]
    assert c.beta_at(99, 100, 1, s) == 0.1 and c.beta_at(5, 6, 1, settings(beta=0.7)) == 0.7
    s = settings(beta=0.4, beta_end=1.0, beta_by="step")
    betas = [c.beta_at(step, 987, 10, s) for step in range(987)]
    assert betas == approx(np.linspace(0.4, 1, 988)[:-1])
    for warmup, t_max in ((10, 0), (0, 30)):
        s = settings(lr=0.5, warmup=warmup, t_max=t_max)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=t_max or 100)
        rates = [c.lr_at(step, 100 + warmup, s) for step in range(100 + warmup)]
        assert rates[:warmup] == approx(np.arange(1, warmup + 1) / 22)
        for rate in rates[warmup:]:
            assert [rate] == approx(theirs.get_last_lr(), abs=1e-12)
            optimizer.step(), theirs.step()

# 7. Minimal pairs ------------------------------------------------------------

def sentences(*texts, context=""):
    return [c.Pair((context, " " + good), (context, " " + bad), "one", "all", i)
            for i, (good, bad) in enumerate(zip(texts[::2], texts[1::2]), 1)]

def score_of(m, ids, given=1):
    """The log-probability of all ids but the first ones, all logits at once, in float64."""
    log_p = logits(m, torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return log_p.gather(1, torch.tensor(ids[1:])[:, None])[given - 1:].sum().item()

def plain_score(m, vocabulary, text):
    """A text alone, by lm-evaluation-harness's rule."""
    ids = encoded(vocabulary, "".join(text))
    if not text[0]:
        return score_of(m, [vocabulary.prefix_id, *ids])
    return score_of(m, ids, len(encoded(vocabulary, text[0].rstrip())))

@every_kind
@mark.parametrize("nodes", [1, 7, 128])
def test_tries_score_as_one_text_at_a_time_does(vocabulary, kind, nodes, monkeypatch):
    """Beginnings of others, equal texts, one token, odd text, contexts, rows cut anywhere."""
    monkeypatch.setattr(c, "NODES", nodes)
    texts = ["The dog ran.", "The dog ran", "A", "A", "The", "The dogs that the cat likes ran by.",
             "1", "The dog ran.", "\xe9\u2028\U0001f600 x", "No.", "  two  spaces ", "A: b\nC: d"]
    draw, words = random.Random(0), "The A dog dogs cat ran runs by the tree .".split()
    texts += [" ".join(draw.choices(words, k=draw.randrange(1, 12))) for _ in range(200)]
    line = '{"Context1": "A.", "Context2": "x", "Target1": "B", "Target2": "C"}'   # BabyLM's rule
    assert c.read_pair(line, Path("x"), 1)[:2] == sentences("B", "C", context="A.")[0][:2]
    pairs = sentences(*texts)
    for context in ("The dog.", "The dog  "):
        pairs += sentences("A cat saw it.", "A cat ate it.", "ran by.", "runs.", context=context)
    m = model(V=vocabulary.size, sharp=5, **kind)
    empty = pairs[0]._replace(bad=("A", ""))            # is left out
    scored, found = c.score_pairs(m, vocabulary, [empty, *pairs], "")
    wanted = [[plain_score(m, vocabulary, text) for text in pair[:2]] for pair in pairs]
    assert scored == pairs and np.allclose(found, wanted, 0, 1e-4)
    assert found[1, 0] == found[1, 1] and found[0, 0] == found[3, 1]    # equal to the last bit

def test_the_rule_of_2026(saved, vocabulary):
    """Special tokens if the tokenizer adds any, no first token scored, two contexts compared."""
    line = '{"Context1": "A cat.", "Context2": "A dog.", "Target1": "It ran", "Target2": "It run"}'
    pair = c.read_pair(line, Path("x"), 1, "2026")
    assert pair[:2] == (("", "A cat. It ran"), ("", "A dog. It ran"))
    bare = tokenizers.Tokenizer.from_str(vocabulary.tokenizer.to_str())
    bare.post_processor = tokenizers.processors.ByteLevel()
    m = model(V=vocabulary.size, sharp=5)
    for each, begins in ((vocabulary, True), (vocabulary._replace(tokenizer=bare), False)):
        ids = each.tokenizer.encode("A cat. It ran").ids
        found = c.score_pairs(m, each, [pair], "", "2026")[1][0, 0]
        assert found == approx(score_of(m, ids), abs=1e-5)
        assert (ids[0] == vocabulary.prefix_id) == begins
    write_pairs("p/a.jsonl", *AB * 9)
    for rule, name in (("2024", "blimp"), ("2026", "2026-blimp")):
        invoke(f"eval-blimp -m model -d p --rule {rule}")
        assert "all " in invoke(f"compare model model --suite {name}").stdout
    assert len([*saved.glob("*blimp-*")]) == 2

def test_scores_are_kept_and_used_again(saved, monkeypatch):
    """While model, pairs and program are the same; where they can't be kept, they are printed."""
    write_pairs("p/a.jsonl", *AB * 9)
    first, again = (invoke("eval-blimp -m model -d p") for _ in "ab")
    assert again.stdout == first.stdout and "scored before" in again.stderr
    path, = saved.glob("blimp-*")
    whole = path.read_bytes()
    for change in (b'"good": -', b'"code": "'):
        path.write_bytes(whole.replace(change, change[:8]))
        assert invoke("eval-blimp -m model -d p").stdout == first.stdout
        assert path.read_bytes() == whole
    path.unlink()
    monkeypatch.setattr(c, "write_file", Mock(side_effect=OSError(28, "No space left")))
    told = invoke("eval-blimp -m model -d p")
    assert told.stdout == first.stdout and "not kept for compare: No space left." in told.stderr

def test_the_trie_of_its_docstring():
    shown, trie, m = " ".join(c.Trie.__doc__.split()), c.Trie(), model()
    words = "<s> A cat dog barked ran".split()
    for text in re.findall('"(<s> .*?)"', shown):
        trie.add(text, [words.index(word) for word in text.split()], 1)
    m.hidden = Mock(return_value=torch.zeros(1, 4, 32))
    c.score_tries(m, [trie])
    sees = m.hidden.call_args.kwargs["tree"].sees[0, 0].tolist()
    rows = [[word, *(".x"[seen] for seen in row)] for word, row in zip(words, sees)]
    ids = [words[i] for i in trie.ids]
    for row in [["id", *ids], ["depth", *trie.depth], ["end", *trie.end], *rows]:
        assert " ".join(map(str, row)) in shown
    edges = [f"({node}, {words[i]})" for node, i in trie.edges]
    first, *_ = (" + ".join(edges[i] for i in row) for row in trie.sequences.values())
    assert f"first scores {first}, the second" in shown and len(edges) == 6

def test_no_array_of_all_logits_is_held_in_scoring():
    texts = map(tuple, some_ids(240, 9, V=5000).tolist())
    tries, m = c.build_tries({text: (text, 1) for text in texts}), model(V=5000)
    with torch.inference_mode(), Largest() as largest:
        c.score_tries(m, tries)
    assert largest.elements <= 304 * 5000 < sum(len(trie.ids) for trie in tries) * 5000

# 8 to 12. Files, run folders, training ---------------------------------------

NO_FLAGS, AB = dict.fromkeys(c.KNOWN), [("A.", "B.")]
RKL = 'objective = "rkl"\nteachers = 1'
KEYS = "sentence_good sentence_bad", "Domain Context1 Context2 Target1 Target2"

@fixture
def here(tmp_path, monkeypatch):
    """The test's folder, with a brief.toml, made the current one."""
    monkeypatch.chdir(brief_config(tmp_path).parent)
    return tmp_path

def train(out, flags="", code=0):
    """The result of a training by brief.toml."""
    return invoke(f"train -c brief.toml -o {out} {flags}", code)

def untrained(out, flags=""):
    """What a training by brief.toml says that ends with an error."""
    return error(f"train -c brief.toml -o {out} {flags}")

def weights(run):
    return Path(run, "model.safetensors").read_bytes()

def history(run):
    """The log, as if nothing took any time."""
    return [line | {"seconds": 0} for line in lines_of(Path(run, "log.jsonl"))]

def steps_of(run):
    return [line for line in history(run) if "ce" in line]

def same_runs(one, other):
    assert weights(one) == weights(other) and history(one) == history(other)

def stopped(monkeypatch, after, number=signal.SIGINT, where="train_step"):
    """Let a signal come in the `after`-th step from now, or call of another function."""
    def step(*rest, count=itertools.count(1), function=getattr(c, where)):
        if next(count) == after:
            os.kill(os.getpid(), number)
        return function(*rest)

    monkeypatch.setattr(c, where, step)

def write_pairs(path, *rows, **more):
    """A file of pairs: two texts as BLiMP's lines have, or five as EWoK's, but none of EWoK's."""
    items = [dict(zip(KEYS[len(row) > 2].split(), row)) | more for row in rows]
    instruct.write_lines(Path(path), items)

def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """And what two processes write at once does not mix."""
    path = tmp_path / "x"
    path.write_text("old")
    with raises(ZeroDivisionError), c.written_whole(path) as file:
        file.write(b"new" * (1 // 0))
    with c.written_whole(path) as file:
        file.write(b"AAA")
        assert path.read_text() == "old"
        monkeypatch.setattr(os, "getpid", lambda: 0)
        with c.written_whole(path) as other:
            other.write(b"BBBB")
        assert path.read_text() == "BBBB"
        file.write(b"AAA")
    assert path.read_text() == "AAAAAA" and list(tmp_path.iterdir()) == [path]

def test_what_other_programs_write_is_read(tmp_path, vocabulary, capsys):
    """GPT-2 as on the hub, and in shards: bf16, old names, masks of any dtype, a special token
    behind V; and the prefix token as one of two files names it, or the class, or none."""
    m = written_model(tmp_path, vocabulary, model_type="gpt2", tied=True)
    for name, roles, wanted in (("special_tokens_map", "{}", 1), ("tokenizer_config", "{}", 1),
                                ("tokenizer_config", '{"tokenizer_class": "LlamaTokenizer", '
                                 '"eos_token": {"content": "</s>"}}', 2),
                                ("special_tokens_map", '{"bos_token": "<pad>"}', 0)):
        Path(tmp_path, f"{name}.json").write_text(roles)
        assert c.load_vocabulary(tmp_path).prefix_id == wanted
    assert capsys.readouterr().err.count("anew, as LlamaTokenizer's") == 1
    for name, roles in (("added_tokens", '{"dog": 700}'), (
            "special_tokens_map",
            '{"pad_token": "", "a_token_id": "cat", "x_tokens": {"1": ["_PAD_", "<x>", "dog"]}}')):
        path = tmp_path / f"{name}.json"
        path.write_text(roles)
        with raises(click.ClickException, match="names 'dog' as a token"):
            c.load_vocabulary(tmp_path)
        os.remove(path)
    for name, wanted in (("Qwen2", "Qwen2Tokenizer may have a"), ("GPT2", "no token '<.end"),
                         ("Llama", "")):
        c.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": f"{name}Tokenizer"})
        edit(tmp_path / "config.json", vocab_size=999 if wanted else vocabulary.size)
        with raises(click.ClickException, match=wanted) if wanted else contextlib.nullcontext():
            c.load_vocabulary(tmp_path)
    edit(tmp_path / "tokenizer.json", pre_tokenizer=None, decoder=None)     # no ByteLevel
    assert c.load_vocabulary(tmp_path).prefix_id == 1
    os.remove(tmp_path / "model.safetensors")
    old = {name: c.stored(name, x) for name, x in m.bfloat16().named_parameters()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4).half(), "lm_head.weight": old.pop("wte.weight"),
            "score.weight": torch.ones(2)}
    for i, shard in enumerate("ab"):
        path, part = tmp_path / shard, dict([*old.items()][i::2])
        c.write_safetensors(path, part)
        path.write_bytes(path.read_bytes().replace(b'"F16"', b'"U8" '))
    c.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"x": "a", "y": "b"}})
    tokenizer = c.Tokenizer.from_str(vocabulary.tokenizer.to_str())
    tokenizer.add_special_tokens(["<|endoftext|>", "dog"])
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for facts in ({"model_max_length": 1024}, {"bos_token": "<|endoftext|>"}):
        c.write_json(tmp_path / "tokenizer_config.json", facts)
        back, known = c.load_model(tmp_path, "cpu")
        assert (known.prefix_id, known.size) == (1, vocabulary.size)
        assert known.tokenizer.model.dropout is None
        assert "bos_token" in facts or b"<s>" in known.files["special_tokens_map.json"]
        assert all(map(torch.equal, back.parameters(), m.float().parameters()))
    told = capsys.readouterr().err
    assert "a text at 'dog'" in told and "place in the model: score.w" in told
    assert "model.safetensors.index.json" in c.weights_digests(tmp_path)
    c.write_safetensors(path, part | {"wte.weight": torch.ones_like(m.head)})
    with raises(click.ClickException, match="ties head and embedding"):
        c.load_model(tmp_path, "cpu")
    edit(tmp_path / "config.json", num_attention_heads=7)       # transformers' name for n_head
    with raises(click.ClickException, match="n_head is 2, num_attention_heads is not"):
        c.load_model(tmp_path, "cpu")
    c.save_model(tmp_path, m, vocabulary._replace(files={}))
    assert not [*tmp_path.glob("*token*_*")]            # which would be read with the new ones

LLAMA = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
@mark.parametrize("sizes", [
    LLAMA, LLAMA | {"tie_word_embeddings": True}, LLAMA | {
        "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    dict(n_embd=32, n_layer=2, n_head=4, n_inner=40)])
def test_we_read_the_folders_of_transformers(tmp_path, vocabulary, sizes):
    """Whole, and in shards."""
    transformers = importorskip("transformers")
    kind = transformers.LlamaConfig if "hidden_size" in sizes else transformers.GPT2Config
    config = kind(vocab_size=vocabulary.size, **sizes)
    theirs = sharpened(transformers.AutoModelForCausalLM.from_config(config), 5)
    for shard in ("1GB", "20KB"):
        theirs.save_pretrained(tmp_path / shard, max_shard_size=shard)
        (tmp_path / shard / "tokenizer.json").write_bytes(vocabulary.files["tokenizer.json"])
        theirs_as_ours(tmp_path / shard, c.load_model(tmp_path / shard, "cpu")[0])

def test_folders_edited_by_hand(tmp_path, vocabulary):
    """Where two places disagree, we read the one that transformers reads, or refuse."""
    transformers = importorskip("transformers")
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    for i, (name, changed, refusal) in enumerate((
            ("config", {"rope_theta": 9.0} | theta, ""), ("config", theta | scaled, "are scaled"),
            ("config", {"rope_theta": None} | theta, ""),
            ("config", theta | {"rope_scaling": {"rope_type": "default"}, "rope_theta": 9.0}, ""),
            ("tokenizer_config", {"bos_token": "</s>"}, ""),
            ("special_tokens_map", {"bos_token": "</s>"}, ""),
            ("special_tokens_map", {"bos_token": None}, ""),
            ("special_tokens_map", {"bos_token": "<z>"}, "has no token '<z>'"),
            ("tokenizer_config", {"bos_token": "</s>", "added_tokens_decoder": {}}, ""))):
        folder = tmp_path / str(i)
        written_model(folder, vocabulary, sharp=5)
        edit(folder / f"{name}.json", **changed)
        if refusal:
            with raises(click.ClickException, match=refusal):
                c.load_model(folder, "cpu")
            continue
        ours, known = c.load_model(folder, "cpu")
        theirs_as_ours(folder, ours)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        wanted = theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
        assert known.prefix_id == wanted

def test_logits_without_a_token_teach_nothing(here, saved, vocabulary):
    """A teacher whose vocabulary is padded is the teacher without its padding."""
    teacher, padded = c.load_model(saved, "cpu")[0], model(V=vocabulary.size + 28)
    for name, weight in teacher.named_parameters():
        padded.get_parameter(name).data[:len(weight)] = weight
    c.save_model(Path("padded"), padded, vocabulary)
    edit(Path("padded/config.json"), vocab_size=vocabulary.size + 28)
    for name in ("model", "padded"):
        told = train(f"{name[0]}/x", f"--objective rkl --teacher {name} --context 16 --pairs none")
        assert ("have no token teach nothing" in told.stderr) == (name == "padded")
    assert weights("m/x") == weights("p/x")

def test_a_run_is_repeatable_and_looking_changes_nothing(here):
    """The same weights of student and teachers, to the byte, and the same log; with dropout."""
    for name, flags in (("a", ""), ("b", "--eval-every 4")):
        train(f"{name}/run", f"--objective rkl --teachers 2 {flags}")
    runs = [path.parent.name for path in here.glob("a/*/log.jsonl")]
    assert len(runs) == 3 and all(weights(f"a/{run}") == weights(f"b/{run}") for run in runs)
    one, looked = history("a/run"), history("b/run")
    assert [line for line in one if line in looked] == looked
    assert [len(one), len(looked), one[-1] == looked[-1]] == [12, 8, True]

def test_a_run_says_what_it_is(here, monkeypatch):
    """And a dry run, how its loss is weighed in effect, and which flags change nothing."""
    flags = "--dry-run --teachers 2 --objective rkl --alpha 0.25 --reduction batchmean --beta 0.7"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    told = train("a", flags + " --skew 0.2 --beta-end 0 --teacher-precision bf16")
    assert re.fullmatch(
        "text .*\npairs .*\nteacher 1 .*\nteacher 2 .*\nstudent .*, loss 0.25 ce [+] 96 rkl at "
        "temperature 2, beta 0.7 to 0, 6 steps of 256 tokens, 0.029 epochs, about 4.. words, "
        "in bf16: slow here without a GPU\n", told.stdout)
    assert re.match("--skew has no effect here.\n[^-]*$", told.stderr)      # 96 = 0.75 * 32 * 2^2
    assert "+ 216 rkl at temperature 3," in train("a", flags + " --temperature 3").stdout
    assert not os.path.exists("a")
    told, record = train("a", "--prefix none"), c.read_json(Path("a/run.json"))
    assert re.search("held out.*\npairs.*\n.* parameters.* steps .* words\n", told.stderr)
    assert re.search("mean of 20 paradigms(.*\n)*model +a, held-out", told.stdout)
    assert record["settings"]["prefix"] == "none" and record["machine"]["processes"] == 1
    assert record["digests"].keys() == {*"text dev tokenizer weights code".split()}
    assert [line["step"] for line in history("a") if "dev_loss" in line] == [*range(1, 7)]
    first, *_, last = steps_of("a")
    assert last["words"] == approx(6 * first["words"], abs=3) and last["epoch"] > 5 * first["epoch"]
    card = Path("a/README.md").read_text()
    assert re.search(r"from scratch: llama, .* 6 steps of 256 .* loss 5.*, \d+.\d% of mini", card)
    assert "Text: brief, 14,270 words\n- Teachers: none" in card and str(here) not in card
    told = train("b", "--pairs none").stdout
    assert re.match("model +b, held-out loss", told) and not list(here.glob("b/blimp-*"))
    for flags in ("--beta-by step --objective rkl --teacher a", "--beta 0.7 --objective ce",
                  "--width 32 --init a", "--tokenizer a --init a", "--teacher-steps 3",
                  "--teacher-steps 3 --objective rkl --teacher a"):
        told = train("x", f"--dry-run {flags}").stderr
        assert f"{flags.split()[0]} has no effect here.\n" in told

def test_models_are_kept_by_words_read_or_held_out_loss(here, monkeypatch):
    """As folders that are scored like any other. A count that is not reached has none."""
    train("a", "--checkpoints 100,1k,9M --steps 30")
    steps = c.read_json(Path("a/run.json"))["checkpoints"]
    assert steps == {"chck_100": 2, "chck_1k": 15}
    assert steps.keys() == {path.name for path in here.glob("a/chck_*")}
    invoke("eval-blimp -m a/chck_1k --sample 40")
    losses = 3.0, 2.0, 1.0, 2.0, 1.5, 9.0, 9.0          # the least one after 15 steps
    monkeypatch.setattr(c, "held_out_loss", Mock(side_effect=losses))
    train("best", "--keep best --steps 30 --eval-every 5")
    assert weights("best") == weights("a/chck_1k") != weights("a")
    ids, s = np.zeros(10**6), settings(steps=10**8, checkpoints="babylm")
    steps = c.checkpoint_steps(c.Corpus(None, ids, ids, 10**6, {}), s)
    assert [*steps][:19:9] == ["chck_1M", "chck_10M", "chck_100M"] and len(steps) == 28
    assert steps["chck_1000M"] == 10**9 / 128

def test_a_run_begins_with_given_weights(here, saved, vocabulary):
    """By name alone: shape and tokenizer come with them. At a learning rate of 0 they stay."""
    train("a", "--tied --heads 1")
    train("b", "--init a --lr 0")
    train("c", "--init a --lr 0 --objective rkl --teacher a")
    assert weights("a") == weights("b") == weights("c") and history("c")[0]["kl"] < 1e-6
    train("d", "--init model --context 16 --pairs none")
    written_model(saved, vocabulary, seed=1)
    assert "weights has" in untrained("d", "--init model --context 16 --pairs none --resume")
    for flags in ("--init d", "--init d/chck_x", "--objective rkl --teacher d/chck_x"):
        shutil.copytree("model", "d/chck_x", dirs_exist_ok=True)
        told = untrained("d", f"{flags} --context 16 --pairs none --overwrite")
        assert "would be in --out" in told and os.path.exists("d/chck_x/model.safetensors")
    edit(saved / "config.json", vocab_size=404)
    assert "has 404 logits, which is more" in untrained("x", "--init model --context 16")

def test_any_text_trains_and_own_pairs_are_scored(here):
    """German, Chinese, emoji, by the default config: without the pairs of another language."""
    Path("a.txt").write_text("Die Hunde laufen über die Straße.\n狗在跑。🐕🐕\n" * 2000
                             + "long" * 250_000)
    write_pairs("long/a.jsonl", *AB, ("A " * 99, "B"))      # too long for 64 positions
    write_pairs("longer/a.jsonl", ("A " * 99, "B"))
    told = invoke("train --text a.txt --vocab-size 400 --steps 2 --pairs long -o 0")
    assert "1 of 2 pairs are left out" in told.stderr and "mean of 1" in told.stdout
    assert "slow: longlong" in told.stderr              # the word that was cut
    assert "expected pairs that the model can" in error("eval-blimp -m 0 -d longer")
    assert "\npairs     none" in invoke("train --text a.txt --dry-run").stdout
    Path("own.tsv").write_text("sentence_bad\tsentence_good\nHunde läuft.\tHunde laufen.\n"
                               '"Nein\t"Nein", sagt er.\n')
    for name in ("own.tsv", "."):
        told = invoke(f"eval-blimp -m 0 -d {name}").stdout
        assert re.search("own(.*\n)*mean of 1 paradigm +2 ", told)
    Path("own.csv").write_text('sentence_good,sentence_bad\n"Nein, ""Hunde""",Nein\n')
    assert c.read_pairs(Path("own.csv"))[0].good[1] == ' Nein, "Hunde"'
    for row in ("Hunde", "Hunde\tHund\tmehr"):
        Path("own.tsv").write_text(f"sentence_good\tsentence_bad\n\nA\tB\n{row}\n")
        assert "own.tsv, line 4: expected" in error("eval-blimp -m 0 -d own.tsv")

def test_what_is_finished_is_used_again_if_it_is_the_same(here, monkeypatch):
    """Teachers; a run, at --resume; what another command trains, or has trained meanwhile."""
    brief_config(here, RKL, "lr = 3e-3")
    with c.locked_log(Path("r/1"), False, False):
        assert "another process is training this run" in untrained("r/1")
    train("r/1")
    teacher, = here.glob("r/teacher-*")
    with raises(click.ClickException, match="has begun"), c.locked_log(Path("r/1"), False, False):
        pass                                            # by another command, meanwhile
    stopped(monkeypatch, 3)
    train("a/1", code=130)
    shutil.copytree(f"a/{teacher.name}", "half")
    train("a/1")                                        # its teacher goes on where it stopped
    same_runs("r/1", "a/1")
    before = os.path.getmtime(teacher / "model.safetensors")
    told = train("r/2", "--lr 1e-3 --objective fkl --alpha 0.3").stderr
    assert f"{teacher.name}: found, reusing it" in told
    Path("a.txt").write_text((TINY / "train.txt").read_text()[:400_000])
    refused("train -c brief.toml -o r/1 --resume", {
        "--text .": "text has", "--lr 0.5": "lr has changed since"})
    os.remove("r/1/README.md")                          # as if it had ended before it was scored
    assert "found, reusing it" in train("r/1", "--resume").stderr
    assert "of minimal pairs" in Path("r/1/README.md").read_text()
    assert before == os.path.getmtime(teacher / "model.safetensors")
    train("r/2", f"--teacher {teacher} --overwrite")
    record, before = c.read_json(Path("r/2/run.json")), c.read_json(teacher / "run.json")
    assert record["teachers"] == [str(teacher)] == [record["settings"]["tokenizer"]]

    def late(folder, wait, begun, locked=c.locked_log):
        held = contextlib.ExitStack()
        if wait:
            held.enter_context(locked(folder, wait, begun))
            held.callback(shutil.copytree, source, folder, dirs_exist_ok=True)
            threading.Timer(1, held.close).start()
        return locked(folder, wait, begun)

    monkeypatch.setattr(c, "locked_log", late)
    for source in ("half", teacher):                    # what the other process leaves
        assert "waiting, since another process" in train(f"{source}-b/1").stderr
        same_runs("r/1", f"{source}-b/1")
    assert lines_of(teacher / "log.jsonl") == lines_of(f"{teacher}-b/{teacher.name}/log.jsonl")
    edit(teacher / "run.json", settings=before["settings"] | {"seed": 7})   # not as it is named
    assert f"seed has changed since r/{teacher.name} was begun (7)" in untrained("r/4")

def test_held_out_loss_does_not_depend_on_the_batch():
    """Nor is anything dropped out in it."""
    m = model(sharp=3, model_type="gpt2", dropout=0.5)
    ids = some_ids(16 * 62 + 1).numpy()
    losses = [c.held_out_loss(m, ids, settings(batch_size=size)) for size in (1, 7, 62)]
    assert m.training and not c.held_out_loss(m, ids[:16], settings())
    inputs, targets = c.windows(ids, np.arange(62) * 16, 16)
    wanted = F.cross_entropy(logits(m.eval(), inputs).flatten(0, 1), targets.flatten()).item()
    assert losses == approx([wanted] * 3)

def test_runs_in_half_precision(here, monkeypatch):
    """A teacher does not see how it coaches. fp16 skips steps until its scale is low enough."""
    losses = []
    for i, flag in enumerate(("teacher-precision fp32", "teacher-precision fp16",
                              "teacher-precision bf16", "precision fp16", "precision bf16")):
        train(f"{i}/run", f"--objective rkl --teachers 1 --{flag}")
        losses.append(history(f"{i}/run")[-1]["dev_loss"])
        assert b'"F32"' in weights(f"{i}/run") and not re.search(b'"B?F16"', weights(f"{i}/run"))
    assert len({*map(weights, here.glob("[012]/teacher-*"))}) == 1
    assert len({*losses}) == 5 and np.ptp(losses[:3]) < 1e-3 and np.ptp(losses) < 0.01
    large = functools.partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    train("whole", "--precision fp16 --steps 12")
    stopped(monkeypatch, 5)
    train("part", "--precision fp16 --steps 12", 130)
    train("part", "--precision fp16 --steps 12 --resume")
    same_runs("whole", "part")
    assert {math.isfinite(line["norm"]) for line in steps_of("part")} == {True, False}

def free_port():
    with socketserver.TCPServer(("127.0.0.1", 0), None) as server:
        return server.server_address[1]

def in_two(out, flags="", codes=(0, 0), number=0):
    """What two processes say that train one model; the second is sent a signal after a step."""
    port, started = str(free_port()), []
    command = f"train -c brief.toml -o {out} {flags}".split()
    for rank in "01":
        own = os.environ | dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank,
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with open(rank, "w") as said:
            started.append(subprocess.Popen([sys.executable, HOME / "choobaca.py", *command],
                                            stdout=said, stderr=said, env=own))
    while number and not (os.path.exists(f"{out}/log.jsonl") and history(out)):
        assert started[0].poll() is None
        time.sleep(0.05)
    started[1].send_signal(number)                      # 0 is none
    assert tuple(process.wait(300) for process in started) == codes, Path("0").read_text()
    return [Path(rank).read_text() for rank in "01"]

def test_two_processes_train_the_model_of_one(here):
    """To 1e-6, the teacher and micro-batches and all; only the first writes."""
    brief_config(here, 'objective = "rkl"\nmicro_batch = 2', "micro_batch = 4")
    train("one/run", "--teachers 1")
    assert ["mean of" in text for text in in_two("two/run", "--teachers 1")] == [True, False]
    for path in here.glob("one/*/model.safetensors"):
        one, two = map(c.read_safetensors, (path, Path("two", *path.parts[-2:])))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    for one, two in zip(history("one/run"), history("two/run"), strict=True):
        assert one == approx(two, rel=1e-4)
    said = in_two("x", "--objective ce --batch-size 9 --micro-batch 3", (1, 1))
    assert "2 processes cannot share --batch-size 9" in said[0]

def test_two_processes_stop_and_go_on_as_one(here):
    """One signal ends both after the same step; where one is killed, the other says so and ends."""
    in_two("whole", "--steps 300")
    in_two("part", "--steps 300", (143, 143), signal.SIGTERM)
    assert 0 < len(history("part")) < 300
    assert "processes has changed since" in untrained("part", "--steps 300 --resume")
    in_two("part", "--steps 300 --resume")
    same_runs("whole", "part")
    said = in_two("x", "--steps 100000", (1, -9), signal.SIGKILL)
    assert "another process of this run has ended" in said[0] and "Traceback" not in said[0]

# Trains, is killed at a random moment, goes on, 25 times; files are written slowly.
KILLER = """
import glob, os, random, signal, sys, time, torch, choobaca as c
fsync, draw, kills, writing, status = os.fsync, random.Random(1), 0, 0, 0
os.fsync = lambda file: (time.sleep(0.03 * (kills < 25)), fsync(file))
torch.optim.AdamW([torch.zeros(1)])                 # imports what every child would
while kills == 0 or os.WIFSIGNALED(status):
    begin, pid = time.time(), os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        c.cli([*sys.argv[1:], "-okilled/run", "--resume", f"--save-minutes={9 * (kills == 25)}"])
    if kills < 25:
        while not any(os.path.getmtime(log) > begin for log in glob.glob("killed/*/log.jsonl")):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        kills += 1
    status = os.waitpid(pid, 0)[1]
    writing += bool(glob.glob("killed/*/.choobaca-*-state.pt"))
print(status, kills, writing)"""

@mark.parametrize("extra, steps", [
    ('micro_batch = 2\nkeep = "best"', 200), ('objective = "rkl"\nteachers = 2', 80)])
def test_killed_at_any_moment_a_run_ends_as_it_would_have(here, monkeypatch, extra, steps):
    """25 times; the same weights and log. With accumulation, or two teachers, one with dropout."""
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    brief_config(here, extra)
    command = f"train -c brief.toml --eval-every 7 --steps {steps} --checkpoints 100,1k,2k,5k"
    invoke(f"{command} -o whole/run")
    text, = here.glob("whole/tokenizer-*")
    shutil.copytree(text, here / "killed" / text.name)
    done = subprocess.run([sys.executable, "-c", KILLER, *command.split()], capture_output=True,
                          text=True, timeout=300)
    status, kills, writing = map(int, done.stdout.split())
    assert (status, kills) == (0, 25) and writing >= 3, (done.stdout, done.stderr)
    whole, killed = (files_in(here / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name in {*os.listdir("whole")} - {text.name}:
        same_runs(f"whole/{name}", f"killed/{name}")
    kept = [name for name in whole if "chck_" in name]
    assert len(kept) >= 18 and all(whole[name] == killed[name] for name in kept)

def test_a_signal_ends_a_run_after_the_step_and_resume_goes_on(here, monkeypatch):
    """130 for Ctrl-C, 143 for SIGTERM; also from a run that was killed at its very beginning."""
    brief_config(here, RKL)
    for number, after, flags in ((signal.SIGINT, 6, ""), (signal.SIGTERM, 2, "--resume")):
        stopped(monkeypatch, after, number)
        told = train("part/x", flags, 128 + number)
        assert re.search(f"stopped after step {after} of 6.*--resume", told.stderr)
        assert told.stdout == "" and list(here.glob("part/teacher-*/model.safetensors"))
        Path("part/x").mkdir(exist_ok=after == 2)
        for name in ("log.jsonl", ".choobaca-123-run.json"):
            Path("part/x", name).touch()
    assert "or --resume to go on" in untrained("part/x")
    assert len(steps_of("part/x")) == 2
    os.remove("part/x/log.jsonl")                           # the checkpoint has the lines
    assert "mean of 20" in train("part/x", "--resume").stdout
    train("whole/x")
    same_runs("whole/x", "part/x")
    assert {*os.listdir("whole/x")} == {*os.listdir("part/x")}

def test_a_signal_while_the_model_is_written(here, monkeypatch):
    """The model is whole, and the command goes no further; --resume does."""
    stopped(monkeypatch, 1, where="save_model")
    assert train("x/run", "--objective rkl --teachers 1", 130).stdout == ""
    (teacher,), run = here.glob("x/teacher-*"), here / "x/run"
    assert (teacher / "model.safetensors").exists() and not run.exists()
    assert "found, reusing it" in train("x/run", "--objective rkl --teachers 1 --resume").stderr

class Mischief:
    """What makes a folder when it is unpickled, if anything is."""

    def __reduce__(self):
        return os.mkdir, ("done",)

def test_what_is_no_checkpoint_of_this_run_is_refused(here, monkeypatch):
    """Nor does a pickle in it run code; nor is a step believed that none is left after."""
    for out, flags in (("y", "--seed 1"), ("x", "")):
        stopped(monkeypatch, 2)
        train(out, f"--precision fp32 {flags}", 130)
    path, bad, again = Path("x/state.pt"), Mischief(), "--precision fp32 --resume "
    whole, state = path.read_bytes(), torch.load(path)
    assert "dev has changed since x" in untrained("x", f"{again} --dev {TINY}/train.txt")
    shutil.copy("y/state.pt", path)
    assert "of another run" in untrained("x", again)
    for harm in (bad, *(state | {key: bad} for key in ("seconds", "model")), state | {"step": 6},
                 whole[:-999], whole[:5000], b"", pickle.dumps(bad)):
        path.write_bytes(harm) if isinstance(harm, bytes) else torch.save(harm, path)
        assert "damaged" in untrained("x", again) and not os.path.exists("done")
    pickle.loads(harm)
    assert os.path.exists("done")                       # and this is what it would have done
    path.write_bytes(whole)
    machine = c.read_json(Path("x/run.json"))["machine"]
    edit(Path("x/run.json"), machine=machine | {"device": "H200"})
    assert "device has changed" in untrained("x", again)

def test_a_full_disk_leaves_the_last_checkpoint(here, monkeypatch):
    """A tokenizer, a checkpoint, a log find no room: a sentence each, and what was there stays."""
    def fails(size, name):              # a limit on files' size stands for a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
        try:
            told = untrained("r/x", "--resume --save-minutes 0")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert re.search(rf"Error: (\S+{name}|Writing failed): File too large[.]", told), told
        assert not list(here.rglob(".choobaca-*"))

    fails(4_000, "tokenizer[.]json")
    assert not list(here.rglob("tokenizer.json"))
    train("r/whole")
    stopped(monkeypatch, 1)
    train("r/x", code=130)
    before = Path("r/x/state.pt").read_bytes()
    fails(100_000, "state[.]pt")
    fails(200, "log[.]jsonl")
    assert Path("r/x/state.pt").read_bytes() == before
    train("r/x", "--resume")
    same_runs("r/whole", "r/x")

def test_what_goes_wrong_in_a_run_is_said(here, saved, vocabulary, monkeypatch):
    """Ruined weights, of which no model is kept; memory that runs out. But a fault of ours is none
    of the user's."""
    for flags in ("--checkpoints 100,150 --steps 3 --eval-every 3", "--steps 1 --warmup 0"):
        told = untrained("nan", f"--lr 1e9 --clip 0 --model-type gpt2 --overwrite {flags}")
        assert "take a lower --lr" in told and not os.path.exists("nan/model.safetensors")
        for path in here.glob("nan/chck_*/model.safetensors"):
            assert all(x.isfinite().all() for x in c.read_safetensors(path).values())
    broken = model(V=vocabulary.size)
    broken.norm.weight.data.fill_(math.nan)
    c.save_model(saved, broken, vocabulary)
    write_pairs("model/pairs.jsonl", *AB)
    assert "scores are not finite" in error("eval-blimp -m model -d model")
    flags = "--objective rkl --teacher model --context 16 --pairs none"
    assert "take a lower --lr, or a sound teacher" in untrained("r/a", flags)
    assert not list(here.glob("r/*/*.safetensors"))
    faults = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2"),
              RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't"),
              KeyError("a fault of ours")]
    monkeypatch.setattr(c, "train_step", Mock(side_effect=faults))
    for _ in faults[:3]:
        assert "out of memory: in training, give a smaller --m" in untrained("r/a", "--overwrite")
    with raises(AssertionError, match="a fault of ours"):
        train("r/a", "--overwrite")

class Played(str):
    """A device that is "cuda" to whoever asks, and "cpu" to torch."""
    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "cuda"

def test_a_run_as_on_a_gpu_without_triton(here, monkeypatch):
    """Played on a CPU: a word says that nothing is compiled; steps are read late, none is lost."""
    flags = "--objective alternate --teachers 1 --precision fp32"
    train("cpu/run", flags)
    monkeypatch.setattr(c, "choose_device", lambda name: Played("cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda ids: ids)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "played")
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train("gpu/run", flags).stderr.count("Triton is not installed") == 1
    assert history("gpu/run") == history("cpu/run")

def test_steps_that_get_slow_are_said_once(here, monkeypatch):
    plain, taken = c.train_step, itertools.count()
    monkeypatch.setattr(c, "train_step", lambda *given: time.sleep(next(taken) // 45 / 3)
                        or plain(*given))
    assert "steps take five times as long as at first" in train("x", "--steps 62").stderr

# 13 to 15. Sampling, pairs and their tables, the command line ----------------

@every_kind
def test_writing_on_reads_no_id_twice_and_lets_rows_go_that_end(kind):
    """Each id is drawn by its probability; the likeliest are those of the whole row, read again.
    Padding on the left is not seen: rows of several lengths get what each gets alone."""
    m, draw = model(V=6, sharp=8, **kind), torch.Generator().manual_seed(0)
    ids = some_ids(6, 9, V=6)
    for tau in (0.7, 2.0):
        drawn = torch.tensor(c.write_on(m, ids[:1].tolist() * 4000, [9], 1, draw, tau)).flatten()
        p = (logits(m, ids[:1])[0, -1] / tau).softmax(-1)
        assert torch.allclose(drawn.bincount(minlength=6) / 4000, p, atol=0.032)    # 4 errors
    given, rows = [row[i:] for i, row in enumerate(ids.tolist())], []
    for start in given:
        row = [*start]
        for _ in range(20):
            row.append(logits(m, torch.tensor([row]))[0, -1].argmax().item())
        rows.append(row[len(start):])
    m.hidden, end = Mock(wraps=m.hidden), rows[0][7]
    found = c.write_on(m, given, [end], 20, None, 0)
    assert found == [row[:(row + [end]).index(end)] for row in rows]
    _, *read = (call.args[0].shape for call in m.hidden.call_args_list)
    assert {T for _, T in read} <= {1} and sum(B for B, _ in read) <= sum(map(len, found))

def test_sample(saved, vocabulary):
    """Seeded; a line each; the prompt has a leading space, even where the tokenizer adds none."""
    plain = vocabulary.files["tokenizer.json"].replace(b'_space": true', b'_space": false')
    Path("model/tokenizer.json").write_bytes(plain)
    command = "sample model --prompt 'the dog' --tokens 9 "
    one, three, same, other, greedy = (invoke(command + more).stdout for more in (
        "", "--count 3", "--count 3", "--seed 1", "--temperature 1e-3 --count 2"))
    assert re.fullmatch("the dog.*\n", one) and one != other and three == same
    start = [1, *encoded(vocabulary, " the dog")]
    drawn, = c.write_on(c.load_model(saved, "cpu")[0], [start], [], 9, None, 0)
    assert greedy == (" ".join(vocabulary.tokenizer.decode(start + drawn).split()) + "\n") * 2
    assert invoke("sample model --prompt caf\udce9 --tokens 3").stdout
    assert "32 positions" in error(f"sample model --prompt '{'a ' * 40}'")

DAMAGED = {                     # what config.json says: the sentence
    '"rope_parameters": {"rope_type": ["x"]}': "are scaled",
    '"model_type": ["llama"]': "is ['llama']",
    '"model_type": "mamba"': "model_type is 'mamba': expected llama or gpt2",
    '"hidden_act": "gelu"': "hidden_act is 'gelu': expected",
    '"rope_scaling": {"rope_type": "llama3", "factor": 8.0}': "rotary positions are scaled",
    '"num_attention_heads": "two"': "num_attention_heads is 'two': expected int",
    '"num_attention_heads": 3': "3 heads do not divide", '"hidden_size": null': "is None: expec",
    '"hidden_size": 64': "size mismatch", '"head_dim": 64': "head_dim is 64: ",
    '"vocab_size": 10': "at least as many", f'"vocab_size": 1{"0" * 30}': "is 1000"}

def test_a_sample_ends_with_its_line(saved, vocabulary, monkeypatch):
    """At the prefix token, a line break, or any eos_token_id that is one."""
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([[drawn.pop(0)]]))
    edit(saved / "config.json", eos_token_id=[2, 7, None, "x", 10**9, -10**30])
    line_break = encoded(vocabulary, "\n")[-1]
    for text, end in ((" the dog ran.", 1), (" a", 2), (" A🐈", line_break), (" a", 7)):
        drawn = [*encoded(vocabulary, text), end, 9, 9]
        told = invoke(f"sample model --prompt '{'Oh,'[:end]}' --tokens 20").stdout
        assert told == "Oh,"[:end] + text + "\n" and drawn == [9, 9]

def test_a_student_learns_from_what_its_teacher_wrote(here, saved, vocabulary, monkeypatch):
    """Seeded draws, whole lines, as many tokens as asked for, a text folder like any other."""
    command, texts = "sample model --tokens 3000 --out ", []
    for out in ("a", "b", "c --seed 7"):
        invoke(command + out)
        texts.append(Path(out[0], "sampled.train").read_text())
    assert texts[0] == texts[1] != texts[2]
    train("run", f"--text a --dev {TINY} --tokenizer model")
    said = [encoded(vocabulary, text) for text in (" the dog sees it.", "", " a cat.")]
    monkeypatch.setattr(c, "write_on", lambda *_: said)
    invoke(command + "d")
    text = Path("d/sampled.train").read_text()
    assert re.fullmatch("(the dog sees it.\na cat.\n)*", text)
    assert 3000 <= len(c.encode(vocabulary, text.splitlines(), "line")) < 3020
    said = [[], []]
    assert "nothing but empty lines" in error(command + "e")

def test_ties_means_and_groups(saved):
    """A mean is that of paradigms, in a report, too; a tie counts."""
    for uid, term, count in (("1", "s-selection", 2), ("2", "argument_structure", 6), ("3", "", 1)):
        write_pairs(f"p/{uid}.jsonl", *AB * count, UID=uid, linguistics_term=term)
    write_pairs("p/._1.jsonl", *AB)                     # a Mac's, which is passed over
    pairs = c.read_pairs(Path("p"))
    scores = np.loadtxt("-3 -3, -1 -2, -1 -2, -2 -1, -1 -2, -2 -1, -1 -2, -2 -1, -3 -3".split(","))
    result = c.summarise(pairs, scores)
    rows = [*result["paradigms"].values(), result["phenomena"]["argument_structure"], result]
    found = [f"{row['accuracy']:.4f} {row['stderr']:.4f} {row['n']} {row['ties']}" for row in rows]
    assert found == ["1.0000 0.0000 2 1", "0.5000 0.2236 6 0", "1.0000 0.5000 1 1",
                     "0.7500 0.1118 8 1", "0.8333 0.1826 9 2"]
    keep(saved, "x", pairs, scores)
    drawn = figures.accuracies([*saved.glob("x-*.jsonl")])
    assert drawn["mean of 3 paradigms"] == [approx((83.33, 18.26), abs=0.01)]
    table = c.pairs_table({"a": result, "b": result}, paradigms=True)
    assert re.search("argument_structure +8 +75.0 .* 75.0.*\n  1 ", table)

@mark.parametrize("P, spread", [*itertools.product((67, 20, 5, 3), (0, 0.08)), (2, 0), (1, 0)])
def test_an_interval_covers_what_is_true_as_often_as_it_says(P, spread):
    """95 %, within the error of 300 trials, where paradigms are better by 0.03, give or take."""
    draw, covered = np.random.default_rng(1), 0
    for _ in range(300):
        effects = 0.03 + spread * draw.standard_normal(P)
        chances = np.stack([0.2 + effects, 0.2 - effects, np.full(P, 1.6)], 1).clip(0)
        counts = [draw.multinomial(300, chance / chance.sum()) for chance in chances]
        low, high = c.confidence_interval([np.repeat([1, -1, 0.0], n) for n in counts])
        covered += low <= 0.03 <= high
    assert 0.91 < covered / 300 < 0.985

def test_compare(saved):
    """A model against one that guesses, against its like, against itself; and what cannot be."""
    pairs = [c.Pair(("", f" {i}"), ("", f" {i}b"), f"p{i % 10}", f"term{i % 2}", i)
             for i in range(2000)]
    for seed, name in enumerate(("guess", "good", "same")):
        shutil.copytree("model", name)
        wrong = np.random.default_rng(seed).random(2000) > (0.8 if seed else 0.5)
        keep(name, "blimp", pairs, np.stack([-1.0 - 2 * wrong, wrong - 2.0], 1))
    rows = "(.*\n){3}term0 .* better\nterm1 .* better\nall .* better\n\n"
    told = invoke("compare guess good same").stdout
    assert re.match(f"good against guess{rows}same against guess{rows}Better or worse", told)
    for other, wanted in (("guess", "all .* worse"), ("same", "all .*not distinguishable"),
                          ("good", r"(.*\+0.00% \(  \+0.00% to   \+0.00%\).*\n){3}")):
        assert re.search(wanted, invoke(f"compare good {other}").stdout)
    assert "(items: 2,000, paradigms: 10)\n" in told
    whole = json.loads(invoke("compare guess good --json").stdout)[0]["rows"][-1]
    assert whole["low"] < 0.3 < whole["high"]
    path, = Path("same").glob("blimp-*.jsonl")
    keep("same", "blimp", pairs[:3], np.zeros((3, 2)))   # a sample replaces nothing
    head, *lines = path.read_text().splitlines()
    for damaged, wanted in ((lines[1:], "cut off"), (lines[::-1], "other pairs"),
                            (["[]"] * 2000, "is damaged")):
        path.write_text("\n".join([head, *damaged]))
        assert wanted in error("compare good same")
    Path("good/tokenizer_config.json").write_text("{}")
    assert "of another model" in error("compare good guess")

def test_defaults_then_base_then_toml_then_flags(here):
    """Teachers are merged one by one, by place; a path is taken from its own file's folder."""
    base, child = brief_config(here, 'clip = 3.0\nalpha = 0.25\ndev = "mine"'), here / "s/x"
    child.parent.mkdir()
    child.write_text('\ufeffbase = "../brief.toml"\nalpha = 0.75\nobjective = "rkl"\nteachers = 2\n'
                     "[[teacher]]\nclip = 0.5\n[[teacher]]\nwidth = 64\n[[teacher]]\nwidth = 16")
    s, teachers = c.read_settings(child, NO_FLAGS | {"seed": 3, "teacher_steps": 9}, [])
    assert f"{s.clip} {s.alpha} {s.beta2} {s.seed} {s.steps}" == "3.0 0.75 0.999 3 6"
    own = [f"{t.width} {t.clip} {t.tied} {t.alpha} {t.objective} {t.teachers} {t.steps} {t.dev}"
           for t in teachers]
    assert own == [f"{first} 0.5 ce 0 9 {here}/mine" for first in ("48 0.5 False", "64 3.0 True")]
    assert [table["width"] for table in c.read_config(child)[1]] == [48, 64, 16]
    base.write_text('base = "s/x"')
    with raises(click.ClickException, match="recursion"):
        c.read_settings(child, NO_FLAGS, [])

def test_the_shipped_configs():
    """Row by row, what the paper's Table 1 says of the twelve models. Teachers are larger."""
    rows = ("fw-2-23 fw-1-23 fw-2-24 fw-1-24 rv-2-23 rv-1-23 rv-2-24 rv-1-24 "
            "rv-2-23-plus rv-1-23-plus rv-2-24-plus rv-1-24-plus").split()
    files = {path.stem: path for path in (HOME / "configs").iterdir()}
    for size, context in ("dolly", 512), ("small", 256):
        s, _ = c.read_settings(files.pop(f"akl-{size}"), NO_FLAGS, [HOME])
        assert (s.objective, s.temperature, s.alpha, s.context) == ("akl", 1.0, 0.5, context)
    found = {name: c.read_settings(path, NO_FLAGS, []) for name, path in files.items()}
    assert found.keys() == {*rows, "paper", "small", "tiny"}
    for s, teachers in found.values():
        assert parameters(s) < parameters(teachers[0])
    for row, name in enumerate(rows, 1):
        (s, teachers), (kind, n, year, *plus) = found[name], name.split("-")
        text, dev = (f"{HOME}/data/babylm-20{year}/{part}-clean" for part in ("train_10M", "dev"))
        assert s == dataclasses.replace(
            found["paper"][0], objective={"fw": "fkl", "rv": "rkl"}[kind], teachers=int(n),
            beta=1.0 if kind == "fw" else 0.7, beta_end=0.0 if plus else -1.0, text=text, dev=dev)
        own = [f"{t.model_type} {t.objective} {t.batch_size} {t.epochs} {t.text}" for t in teachers]
        assert own == [f"{kind} ce 128 4 {text}" for kind in ("llama", "gpt2")][:int(n)]
        assert files[name].read_text().startswith(f"# Table 1, row {row}: ")

BAD = {                         # the command and its exit code: what the user did, what is said
    ("train -o out -c bad.toml", 1): {
        "betta = 1": "help). Did you mean beta?", "learning_rate = 1": "mean lr?",
        "lr =": "bad.toml",
        "layers = true": "layers is True: exp", "lr = nan": "lr is nan",
        'base = "no"': "no: No such file", 'base = "bad.toml"': "recursion",
        "[[teacher]]\ntext = ''": "teacher 1: 'text' is no", f"lr = 1{'0' * 400}": "lr is 10",
        'text = "a\\u0000b"': "without a NUL",
        "[teacher]\nwidth = 3": "expected [[teacher", 'base = "\\u0000"': "null byte",
        'text = "~no/x"': "~no/x does not ex"},
    ("train -o out -c bad.toml --objective rkl --teachers 2", 1): {
        'base = "brief.toml"\n[[teacher]]\npositions = 16\ncontext = 16':
            "teacher 1: --context 32 is longer than what it takes, 16",
        'base = "brief.toml"\n[[teacher]]\nmodel_type = "gpt2"\ndropout = 0.1\ntied = true':
            "teachers of different settings"},
    ("train -o out -c brief.toml --text text", 1): {
        "": "a.txt is empty", "good \udcff bad": "0xff in position 5", "short": "less than a batc"},
    ("train -o out -c brief.toml --tokenizer bad.toml", 1): {
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}': "bad.toml is da"},
    ("train -o out -c brief.toml {}", 1): {
        "--text no": "no does not exist", "--text .": "no *.train", "--dev .": "holds no *.dev",
        "--tokenizer no": "no: No such file", "--tokenizer brief.toml": "brief.toml is damaged",
        "--seed 18446744073709551616": "is 18446744073709551616: expec", "--pairs .": "no minimal",
        "--batch-size 0": "--batch-size is 0: expected 1", "--objective rkl": "needs a teacher",
        "--objective rkl --teacher a --teacher a": "two different ones", "--device cuda": "--devic",
        "--objective ce --teachers 1": "has no teacher", "--heads 5": "5 heads do not divide",
        "--kv-heads 3": "3 kv_heads do not divide", "--heads 32": "1 wide each: rotary positions",
        "--micro-batch 3": "does not divide --batch-size 8", "--context 500": "--context 500 is ",
        "--text text --keep best": "--keep best needs held-out"},
    ("train -o out {}", 2): {
        "--lr fast": "'fast' is not a valid", "--objective magic": "'magic' is not one of 'ce', "},
    ("{}", 1): {
        "train -o bad.toml": "files that are no run",
        "eval-blimp": "no finished run in runs/", "eval-blimp -m no": "no holds no finished",
        "eval-blimp -d no -m x": "no has no minimal", "compare a b": "no scores of the same",
        "sample a --temperature nan": "expected 0, or", "sample a --out text": "already there",
        "instruct -d five": "expected -m RUN and -d"}}

@mark.parametrize("command, code", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_left(here, monkeypatch, command, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    os.mkdir("text")
    for given, wanted in BAD[command, code].items():
        for path in ("bad.toml", "text/a.txt"):
            Path(path).write_text(given, errors="surrogateescape")
        assert wanted in error(command.format(given), code) and not os.path.exists("out"), given

def test_a_run_folder_is_never_overwritten_unasked(here):
    """Nor is a file that is not ours, what a link in it leads to, or a teacher by its student."""
    train("run")
    before = weights("run")
    refused("train -c brief.toml -o run", {
        "--seed 1": "or --resume to go on, or add --overwrite",
        "--teacher run --objective rkl --overwrite": "would be in one folder"})
    assert weights("run") == before
    os.remove("run/model.safetensors")                  # as an interrupted run leaves it
    train("run", "--seed 1 --resume --checkpoints 100")
    shutil.copytree("run", "run/chck_notes/a")
    os.symlink("chck_notes/a", "run/chck_link")
    train("run", "--overwrite")
    assert weights("run") == before != weights("run/chck_link")
    assert not os.path.exists("run/chck_100/model.safetensors")
    for name in ("thesis.partial", "thesis.txt", "config.json", "tokenizer.json", "run.json"):
        path = Path(f"mine-{name}/{name}")
        c.write_json(path, {})
        assert "files that are no run" in untrained(path.parent, "--overwrite")
        assert c.read_json(path) == {}

def test_teachers_that_cannot_teach(here, saved):
    """Of another tokenizer, be it by its normalizer or prefix token alone."""
    whole, other = c.read_json(saved / "tokenizer.json"), c.train_tokenizer(["a dog"] * 9, 300)
    flags = "--objective rkl --teacher model --tokenizer tokenizer --context 16 --pairs none"
    for tokenizer, prefix, code in (
            (whole, "</s>", 1), (whole | {"normalizer": {"type": "NFC"}}, "<s>", 1),
            (json.loads(other.to_str()), "<s>", 1), (whole, "<s>", 0)):
        c.write_json(here / "tokenizer/tokenizer.json", tokenizer)
        c.write_json(here / "tokenizer/tokenizer_config.json", {"bos_token": prefix})
        assert ("has another vocabulary" in train("out/run", flags, code).stderr) == code

def test_a_damaged_or_unknown_model_is_one_sentence(saved):
    config, path = c.read_json(saved / "config.json"), saved / "model.safetensors"
    for change, wanted in DAMAGED.items():
        c.write_json(saved / "config.json", config | json.loads(f"{{{change}}}"))
        assert wanted in error("eval-blimp -m model"), change
    c.write_json(saved / "config.json", config)
    whole = path.read_bytes()
    for old, new, wanted in (                           # in the JSON of the weights' file
            (b'"F32"', b'"I8"', "has dtype 'I8': expected F64"), (b"{", b"[", "is damaged"),
            (b"[0, 51200]", b"[0,999999]", "end of the file"), (b"[400, 32]", b"[1]", "is damaged"),
            (b"[51200,", b"[51100,", "overlaps anoth"), (b"lm_head", b"lm_haed", "no weights"),
            (b"[400, 32]", b"[-400,32]", "is damaged")):
        path.write_bytes(whole.replace(old, new.ljust(len(old)), 1))
        assert wanted in error("eval-blimp -m model"), new
    for cut, wanted in ((-100, "end of the file"), (60, "is damaged"), (0, "is damaged")):
        path.write_bytes(whole[:cut])
        assert wanted in error("eval-blimp -m model"), cut
    path.unlink()
    assert "model.safetensors is missing" in error("eval-blimp -m model")
    c.write_json(saved / "special_tokens_map.json", {"bos_token": {"content": "\ud800"}})
    assert "tokenizer.json is damaged" in error("eval-blimp -m model")

def test_a_home_is_found_in_every_path(here, saved, monkeypatch):
    """A shell leaves the ~ of --out=~/x to us."""
    monkeypatch.setenv("HOME", str(saved.parent))
    write_pairs("p/a.jsonl", *AB * 4)
    invoke("eval-blimp --model '~/model' --data '~/p'")
    invoke("sample '~/model' --tokens 9 --out '~/text'")
    train("~/run", "--objective rkl --teacher '~/model' --context 16 --text '~/text' "
          f"--dev {TINY} --pairs '~/p' --steps 1 --batch-size 1 --micro-batch 0 --no-random-offset")
    assert not os.path.exists("~")

def test_bad_pairs_name_file_and_line(saved):
    """And do not show the line: EWoK's text is not to be spread."""
    ewok = [("x", "secret", "secret b", "secret c", "secret d")]
    write_pairs("e/a.jsonl", *ewok)
    os.mkfifo("e/b.jsonl")                              # which is passed over
    told, (kept,) = invoke("eval-blimp -m model --suite ewok -d e").output, saved.glob("ewok-*")
    assert "secret" not in told + kept.read_text()
    for good, bad in (*((AB, ("secret", *bad)) for bad in ([], [3], ["\ud83d"], [" "])),
                      (ewok, ("x", " ", "b", "secret", "c")), (ewok, ("\ud83d", *"abcd"))):
        write_pairs("p/b.jsonl", *good, bad)
        told = error("eval-blimp -m model -d p")
        assert "p/b.jsonl, line 2: expected strings" in told and "secret" not in told

NUMBERS = "0 -1 1 3 64 257 65536 2147483647 2147483648 100000000000000000000 1e400 -1e-400 NaN 0.5 "
NUMBERS = (NUMBERS + 'true null "x" [] {} ' + "[" * 2000).encode().split()
PIECES = [b"\0", b"\xff", b"\n", b'"', b"{", b"}", b",", b"\\u0000", b"\\ud800", b"../", b"x" * 999]

def mutated(content, draw):
    """Changed in one to three places, most often where the file is text: bytes, numbers, pieces."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        text = content[:3300]                               # so long is the JSON before the weights
        start = draw.randrange(len(text if draw.random() < 0.8 else content))
        end = start + draw.choice([0, 1, 1, 2, 8, 100])
        new = draw.choice([b"", draw.randbytes(1), draw.choice(PIECES), 2 * content[start:end]])
        if draw.random() < 0.2 and (some := [*re.finditer(rb"-?\d+(\.\d+)?", text)]):
            (start, end), new = draw.choice(some).span(), draw.choice(NUMBERS)
        content = content[:start] + new + content[end:draw.choice([None] * 19 + [end])] or b" "
    return content

def test_no_mutated_file_gets_through_or_brings_it_down(here, saved, vocabulary):
    """20,000 files: each is read, or refused in one sentence, in a second and little memory."""
    write_pairs("p/a.jsonl", *((f"Dog {i} runs.", f"Dog {i} run.") for i in range(4)))
    m, draw = written_model("model", vocabulary, layers=1), random.Random(0)
    keep(saved, "blimp", c.read_pairs(Path("p")), np.full((4, 2), -1.5))
    step_of(m)
    parts = {"model": m, "optimizer": c.make_optimizer(m, settings())}
    c.write_json(here / "run.json", {})
    c.save_state(here / "state.pt", {"step": 3, "seconds": 1.0, "log": "x", "least": 2.0}, parts)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count, name, read in (
            (5000, "model/model.safetensors", None), (4000, "model/config.json", None),
            (2000, "model/tokenizer.json", None), (1000, "model/tokenizer_config.json", None),
            (3000, "p/a.jsonl", lambda path: c.read_pairs(path.parent)),
            (1500, "model/blimp-*.jsonl", c.read_scores),
            (3000, "brief.toml", lambda path: c.read_settings(path, NO_FLAGS, [])),
            (200, "state.pt", lambda path: c.load_state(path, {"step": 0, "least": 0.0}, parts))):
        path, = here.glob(name)
        read = read or (lambda _: c.load_model(saved, "cpu"))
        whole, refused = path.read_bytes(), 0
        for _ in range(count):
            content, begin = mutated(whole, draw), time.process_time()
            path.write_bytes(content)
            try:
                read(path)
            except (click.ClickException, OSError) as error:
                refused += 1
                assert "\n" not in getattr(error, "message", ""), content[:999]
            assert time.process_time() - begin < 1, content[:999]
        path.write_bytes(whole)
        read(path)
        assert 0 < refused < count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000

# The data, the file, the README ----------------------------------------------

def test_the_data_is_what_the_grammar_writes(tmp_path):
    """No scored sentence was ever heard, and counting neighbours does not solve the pairs."""
    make_tiny.write(tmp_path)
    assert files_in(tmp_path) == files_in(TINY)
    pairs, scores = c.read_pairs(TINY / "blimp"), make_tiny.bigram_scores()
    heard = ((TINY / "train.txt").read_text() + (TINY / "dev.txt").read_text()).split("\n")
    assert not {*heard} & {text.strip() for pair in pairs for _, text in pair[:2]}
    assert all(pair.good != pair.bad for pair in pairs) and np.mean([*scores.values()]) < 0.65
    far = re.compile("npi_scope|wh_vs_that_with_|.*(_prepositional|_two_phrases|_subject_relative)")
    assert max(scores[name] for name in scores if far.match(name)) < 0.5

SOURCE, README, TESTS = (Path(HOME, name).read_text() for name in (
    "choobaca.py", "README.md", __file__))

def measured(text):
    """A file's tokens (names, operators, numbers), lines of code, and the lines of docstrings."""
    count, code, docs = 0, set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        rows = range(token.start[0], token.end[0] + 1)
        if token.line.lstrip()[:3] == '"""':
            docs.update(rows)
        elif token.string.strip() and token.type != tokenize.COMMENT:
            code.update(rows)
            count += token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    return count, len(code), docs

def test_the_files_bars():
    """Nothing is used before it is defined or runs at import; each setting is read somewhere."""
    lines, tree, (tokens, code, docs) = SOURCE.splitlines(), ast.parse(SOURCE), measured(SOURCE)
    for text, most in ((SOURCE, 2350), (LESSON, 1050), (README, 280), (TESTS, 2600)):
        assert len(text.splitlines()) <= most and max(map(len, text.splitlines())) <= 100
    if sys.version_info < (3, 12):                      # later ones count within f-strings, too
        assert tokens <= 20_500 and tokens / code <= 11.05 and measured(TESTS)[0] <= 28_000
    assert re.findall(r"^# (\d+)\. ", SOURCE, re.M) == [str(i) for i in range(1, 16)]
    assert not re.search("TODO|FIXME|XXX", SOURCE)
    nodes = [*ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    *_, second, longest = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    assert second <= 50 and longest <= 100
    body = {i for f in functions for i in range(f.body[0].lineno, f.end_lineno + 1)} - docs
    for part, least in ((SOURCE, 0.12), (LESSON, 0.20)):
        rows = [lines[i - 1] for i in body if i <= part.count("\n")]
        assert np.mean([not row.strip() or "# " in row for row in rows]) >= least
    sides = [(type(node.targets[0]), type(node.value)) for node in nodes
             if isinstance(node, ast.Assign)]
    assert sides.count((ast.Tuple, ast.Tuple)) <= 30
    defined = {node.name: node for node in tree.body if hasattr(node, "name")}
    assert not [(name, x.id) for name, node in defined.items() for x in ast.walk(node)
                if isinstance(x, ast.Name) and defined.get(x.id, node).lineno > node.end_lineno]
    constants = sum(c.DIVERGENCES.values(), [])
    assert c.KNOWN.keys() <= {*re.findall(r"(?<=\w)\.(\w+)", SOURCE), *constants}
    quiet = "Import ImportFrom Assign FunctionDef ClassDef".split()
    rest = [ast.unparse(node)[:14] for node in tree.body[1:] if type(node).__name__ not in quiet]
    assert rest == ["if sys.version", "os.environ.set", "if __name__ =="]
    imports = re.findall(r"^(?:import|from) (\w+)(?:$|\.| as| import)", SOURCE, re.M)
    assert {*imports} - sys.stdlib_module_names == {*"click numpy torch tokenizers tqdm".split()}

def test_the_readmes_commands_run(default_run, here):
    """One after the other, but for names in capitals, and made small where it would take long."""
    shutil.copytree(default_run / "runs", "runs")
    teacher, = Path("runs").glob("t*-llama-*")
    names = dict(pair.split("=") for pair in f"""
        TRAIN_DIR={TINY} DEV_DIR={TINY} BLIMP_DIR={TINY}/blimp TEACHER={teacher} 400000=30000
        runs/TEACHER={teacher} runs/OTHER={teacher} DIR={RUN} data/tiny={TINY}
        data/blimp-filtered={TINY}/blimp configs/small.toml={HOME}/configs/tiny.toml
        data/tiny/blimp={TINY}/blimp
        configs/rv-1-24.toml={HOME}/configs/tiny.toml""".split())
    small = {"train": "--steps 2 --warmup 1 --sample 20", "bench": "--rows 32 --vocab-size 64"}
    commands = re.findall(r"^ {4}((?:python|torchrun) .*)", re.sub(r"\\\n *", "", README), re.M)
    assert len(commands) > 12
    for i, command in enumerate(commands):
        words = [names.get(word, word) for word in shlex.split(command, comments=True)]
        start = 1 if words[0] == "python" else 3
        program, verb, *args = [*words[start:], *small.get(words[start + 1], "").split()]
        args += ["-o", f"runs/{i}"] * (verb == "train" and not {"-o", "--out"} & {*words})
        if program == "choobaca.py" and start == 1:
            assert invoke(shlex.join([verb, *args])).stdout, command
        elif program.startswith("data/"):
            script = program[5:-3]
            assert script in ("download", "figures", "glue", "instruct")
            assert invoke(f"{verb if script in ('download', 'figures') else script} --help").stdout
        else:
            run = [sys.executable, *["-m", "torch.distributed.run", *words[1:3]] * (start > 1)]
            assert subprocess.run([*run, HOME / program, verb, *args]).returncode == 0, command

def test_the_readmes_divergence_is_one(here, monkeypatch):
    """The line, put where the README says: its value, and a training of two steps."""
    block, start = README[README.index("## Add a div"):], "DIVERGENCES = {\n"
    name, entry = re.search(r'^ {4}"(\w+)": (\[.*\]),$', block, re.M).groups()
    words = re.search(rf'^ {{4}}"{name}": (lambda.*),$', block, re.M)[1]
    Path("other.py").write_text(SOURCE.replace(start, f'{start}"{name}": {entry},\n'))
    monkeypatch.syspath_prepend(here)
    import other
    logs = randn(2, 5, 40).log_softmax(-1)
    value = other.DIVERGENCES[name][0](*logs, None)
    assert alike(value, eval(words)(*logs, None, None))
    for a, b, wanted in ((0.5, 0.5, 4 * value), (1, 1e-6, c.kl(*logs[[1, 0]])),
                         (1e-6, 1, c.kl(*logs))):
        assert alike(c.alpha_beta(*logs, None, a, b), wanted, 1e-5)
    monkeypatch.setattr(c, "cli", other.cli)
    train("r/x", f"--teachers 1 --steps 2 --objective {name}")

def test_the_readmes_transformers_block_runs(default_run, monkeypatch):
    transformers, names = importorskip("transformers"), {}
    monkeypatch.chdir(default_run)
    block = re.findall(r"^ {4}((?:from transformers|model =|tokenizer =).*)", README, re.M)
    exec("\n".join(block), names)
    assert isinstance(names["model"], transformers.PreTrainedModel)
    assert names["tokenizer"](" the dog").input_ids and names["tokenizer"].bos_token_id == 1

def test_the_readme_is_of_this_program(default_run, monkeypatch):
    """Two commands' output, accuracies, objectives, keys of the log; section 7's pair to 3 nats."""
    def first_cells(head):
        cells = re.findall(r"^\| (`.*?) \|", README.split(head)[1].split("\n\n")[0], re.M)
        return {*re.findall("`(.*?)`", " ".join(cells))}

    monkeypatch.chdir(default_run)
    keys = {key for line in lines_of(f"{RUN}/log.jsonl") for key in line}
    assert first_cells("| key in `log.jsonl` |") == keys
    assert first_cells("| `--objective` | D |") == {*c.KNOWN["objective"].metadata["choices"]}
    command, said = f"eval-blimp -d {TINY}/blimp", Path("out.txt").read_text()
    teacher, student = map(float, re.findall(r"([\d.]+) ±", re.search("mean of 20 .*", said)[0]))
    result, said = json.loads(invoke(command + " --json").stdout), said + invoke(command).stdout
    assert teacher >= 90 and 85 <= student <= 98 and student == round(100 * result["accuracy"], 1)
    assert f"{result['model']} {result['n']}" == f"{RUN} 2000"
    shown = README.split("English, and prints\n")[1].split("**Status.**")[0]
    for line in re.findall("^ {4}(?!python)(.*[a-z].*)", shown, re.M):
        assert re.sub(r"[\d.\s]+", " ", line).strip() in re.sub(r"[\d.\s]+", " ", said), line
    lines = LESSON.split("A pair, by one tiny run:")[1].splitlines()[2:4]
    pair = sentences(*(line[6:].split("  ")[0] for line in lines))
    scores, = c.score_pairs(*c.load_model(Path(RUN), "cpu"), pair, "test")[1]
    assert scores == approx([numbers(line)[0] for line in lines], abs=3) and scores[0] > scores[1]

# data/download.py ------------------------------------------------------------

def files_in(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

def zipped(files, packed=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in files.items():             # of 1980, so that the bytes stay the same
            made.writestr(zipfile.ZipInfo(name), content, packed)
    return buffer.getvalue()

PAIRS = {"": r"data/(\w+\.jsonl)"}
NOISE = {f"{name}.jsonl": np.random.default_rng(i).bytes(90_000) for i, name in enumerate("abc")}
GOOD = zipped({f"data/{name}": content for name, content in NOISE.items()})
SHA256, MD5 = hashlib.sha256(GOOD).hexdigest(), hashlib.md5(GOOD).hexdigest()

class Site(socketserver.StreamRequestHandler):
    """An address on this machine that gives the server's body in the way that its path says."""

    def handle(self):
        request = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
        way, body, half = request.split()[1][1:], self.server.body, len(self.server.body) // 2
        start = int(re.search(r"(?:Range: bytes=(\d+)-|$)", request)[1] or 0)
        self.server.asked.append(start)
        sized = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%b"
        whole, part = sized % (b"200 OK", len(body), body), sized % (b"416 None", 0, b"")
        if start < len(body):
            part = sized % (b"206 Part", len(body) - start, body[start:])
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
            len(body), body)
        moved = b"HTTP/1.1 302 Found\r\nLocation: /%s\r\n\r\n"
        first, later = {
            "whole": (whole, part), "deaf": (whole[:-half], whole), "silent": (b"", b""),
            "unsized": (chunked, b""), "unsized-broken": (chunked[:half], chunked),
            "moved": (moved % b"broken", moved % b"broken"), "loop": (moved % b"loop", b""),
            "missing": (b"HTTP/1.1 404 Not Found\r\n\r\n", b""), "babble": (b"SSH-2.0\r\n", b"")
            }.get(way, (whole[:-half], part))               # broken, interrupted, stalled
        self.wfile.write(later if start else first)
        if way in ("silent", "stalled") and not start:
            self.server.over.wait(5)
        while way == "interrupted" and not start and not self.server.over.wait(0.01):
            if self.server.half.exists() and self.server.half.stat().st_size >= load.PIECE:
                return _thread.interrupt_main()             # as Ctrl-C does

@fixture
def site(tmp_path, monkeypatch):
    """A server, whose `run` runs the command on it: nothing or everything is then there."""
    real = urllib.request.urlopen                           # it has to be told how long to wait
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: real(url, timeout=1))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)

    def run(way="whole", digest="", code=0):
        url = way if "://" in way else server.url + way
        monkeypatch.setitem(load.SOURCES, "supplement", [load.Source(url, PAIRS, digest)])
        message = invoke("supplement -o pairs", code).output
        there = files_in(tmp_path)
        if not code:
            assert there == {f"pairs/{key}": NOISE[key] for key in NOISE}
            assert os.listdir() == ["pairs"]
            return message
        assert {*there} <= {"pairs.partial/1.zip", "pairs.partial/1.zip.partial"}
        message = message.split("Error: ")[-1].strip()
        assert "Stopped: " in message or "\n" not in message and re.search(f"{url}|1.zip", message)
        return message

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Site) as server:
        server.run, server.url = run, f"http://127.0.0.1:{server.server_address[1]}/"
        server.body, server.asked, server.over = GOOD, [], threading.Event()
        server.half = tmp_path / "pairs.partial/1.zip.partial"
        server.handle_error = lambda *_: None               # that a client went away
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.over.set()
        server.shutdown()

@mark.parametrize("digest", ["", SHA256, MD5])
@mark.parametrize("way", ["whole", "unsized"])
def test_a_download_happens_once(site, way, digest):
    assert "pairs: 3 files, 270,000 bytes" in site.run(way, digest)
    assert "is there already" in site.run(way, digest) and site.asked == [0]

@mark.parametrize("digest", ["", SHA256])
@mark.parametrize("way", "broken moved interrupted stalled deaf unsized-broken".split())
def test_a_broken_download_goes_on(site, way, digest):
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background ignores it
    message = site.run(way, digest, code=130 if way == "interrupted" else 1)
    assert ("Stopped: " if way == "interrupted" else " could not be downloaded: ") in message
    got = site.half.read_bytes()
    assert load.PIECE <= len(got) < len(GOOD) and GOOD.startswith(got)
    assert way != "broken" or f"after {len(got):,} of {len(GOOD):,} bytes. Run this" in message
    site.run(way, digest)
    assert site.asked == ([0, 0, len(got), len(got)] if way == "moved" else [0, len(got)])

def test_what_an_earlier_download_left_is_never_trusted(site):
    """Whole, too long, of another file, by hand: what comes out is the file, or a sentence."""
    by_hand = site.half.with_name("1.zip")
    for left in (GOOD, GOOD + b"more", b"x" * 1_000, b""):
        site.half.parent.mkdir()
        site.half.write_bytes(left)
        if left:
            message = site.run(digest=SHA256, code=1)
            assert ("HTTP Error 416" if left.startswith(GOOD) else f"expected {SHA256}") in message
            assert files_in(site.half.parent) == {}
        assert f"the md5 {MD5}: expected {'0' * 32}. Run this" in site.run(digest="0" * 32, code=1)
        by_hand.write_bytes(b"by hand")
        assert hashlib.sha256(b"by hand").hexdigest() in site.run(digest=SHA256, code=1)
        assert files_in(site.half.parent) == {"1.zip": b"by hand"}
        by_hand.write_bytes(GOOD)
        site.run("missing", SHA256)
        shutil.rmtree("pairs")

def test_a_download_that_cannot_be_is_one_sentence(site):
    closed = f"http://127.0.0.1:{free_port()}/x.zip"
    wanted = r" could not be downloaded: .*{}.*put the file there by hand: \S+partial/1\.zip\.$"
    for way, reason in {"missing": "404: Not Found", "loop": "infinite loop", "babble": "SSH-2.0",
                        "silent": "timed out", closed: "refused"}.items():
        assert re.search(wanted.format(reason), site.run(way, code=1)), way

def test_a_hostile_archive_is_one_sentence(site, monkeypatch):
    monkeypatch.setattr(load, "ROOM", 30_000)
    plain = zipped({"data/b.jsonl": b"good", "data/a.jsonl": b"text " * 4_000}, zipfile.ZIP_STORED)
    zeros = zipped({"data/a.jsonl": b"\0" * 50_000})
    two = zipped({f"data/{i}.jsonl": b"\0" * 20_000 for i in (1, 2)})
    for content, wanted in (
            (GOOD[:len(GOOD) // 2], "not a zip file"), (plain[9_000:], "cannot be unpacked"),
            (plain.replace(b"\x14\0\0\0", b"\x14\0\1\0"), "encrypted"),
            (zipped({"readme": b"", "data/": b"", "data/a.txt": b"A"}), "expected data/"),
            (zeros, "1 wanted files of 50,000 bytes, expected"), (two, "30,000 bytes at most"),
            (zeros.replace((50_000).to_bytes(4, "little"), b"\x09\0\0\0"), "Bad CRC-32")):
        site.body = content
        message = site.run(code=1)
        assert wanted in message and message.endswith("delete it, and run this again."), wanted
        assert files_in(site.half.parent) == {"1.zip": content}
        shutil.rmtree("pairs.partial")

def test_no_path_leads_out_of_the_folder_and_every_pattern_matches(tmp_path):
    """Only what a pattern's group holds becomes a name: no slash, no dot to begin with."""
    taken = ["../../data/a.jsonl", "/data/b.jsonl", "C:/x/data/c.jsonl", "data/d.jsonl"]
    left = ["data/../../e.jsonl", "data//f.jsonl", "data/..jsonl", "..\\data\\h.jsonl",
            "data/i.jsonl/", "data/x/j.jsonl", "notdata/k.jsonl", "__MACOSX/data/._d.jsonl"]
    (tmp_path / "x.zip").write_bytes(zipped({name: name for name in taken + left}))
    load.unpack(tmp_path / "x.zip", load.SOURCES["blimp"][0].members, tmp_path / "deep/er/folder")
    with raises(click.ClickException, match="4 wanted files of .* expected data.* and dev"):
        load.unpack(tmp_path / "x.zip", {**PAIRS, "dev": "dev/(.*)"}, tmp_path / "out")
    (tmp_path / "x.zip").unlink()
    assert files_in(tmp_path) == {f"deep/er/folder/{name[-7:]}": name.encode() for name in taken}

LISTINGS = {        # what the archives of a source may hold; "=" and what it becomes, if anything
    "babylm-2023": ["babylm_data/babylm_10M/aochildes.train=train_10M/aochildes.train README.md "
                    "babylm_data/babylm_dev/qed.dev=dev/qed.dev babylm_data/babylm_100M/cbt.train "
                    "babylm_data/babylm_test/cbt.test babylm_data/babylm_10M/ "
                    "__MACOSX/babylm_data/babylm_10M/._aochildes.train"],
    "babylm-2024": ["train_10M/ train_10M/childes.train=train_10M/childes.train .DS_Store "
                    "train_10M/gutenberg.train=train_10M/gutenberg.train",
                    "dev/simple_wiki.dev=dev/simple_wiki.dev bnc_spoken.dev=dev/bnc_spoken.dev"],
    "blimp": ["data/ data/principle_A_case_1.jsonl=principle_A_case_1.jsonl raw/x.jsonl"],
    "supplement": ["blimp_filtered/x.jsonl supplement_filtered/qa_easy.jsonl=qa_easy.jsonl"]}

@mark.parametrize("name", load.SOURCES)
def test_a_source_is_unpacked_then_cleaned_or_filtered(tmp_path, monkeypatch, name):
    """All archives, if none is missing, become data/NAME; what is made of it is made once more."""
    monkeypatch.setattr(c, "HOME", tmp_path)
    monkeypatch.setattr(load, "receive", Mock(side_effect=click.ClickException("offline")))
    data, raw, made, known = tmp_path / "data", {}, {}, load.SOURCES[name]
    monkeypatch.setitem(load.SOURCES, name, [source._replace(digest="") for source in known])
    work = data / f"{name}.partial"
    kept, rare = (b'{"sentence_good":  "%b", "sentence_bad": ""}\n' % x for x in (b"A", b"Dims"))
    for i, listing in enumerate(LISTINGS[name], 1):
        assert "offline" in error(name)
        entries = [entry.partition("=") for entry in listing.split()]
        (work / f"{i}.zip").write_bytes(zipped({member: kept + rare for member, *_ in entries}))
        for path in [path for *_, path in entries if path]:
            raw[f"{name}/{path}"] = kept + rare
            if name == "blimp":
                made[f"blimp-filtered/{path}"] = kept
            if "babylm" in name:
                spaces = b" " if re.search("childes|bnc", path) else b"  "
                path = path.replace("/", "-clean/")
                made[f"{name}/{path}"] = (kept + rare).replace(b"  ", spaces)
    for said in (f"{len(raw)} files", "is there already"):
        assert said in invoke(name).stdout and not work.exists()
        assert files_in(data) == raw | made
        for path in [*made][:1]:
            shutil.rmtree((data / path).parent)
    for url, _, digest in known:
        assert re.fullmatch("https://.* (|[0-9a-f]{32}|[0-9a-f]{64})", f"{url} {digest}")

CLEANED = {"childes.train": ("*MOT:\tthere  it is .", "*MOT: there it is."),
           "aochildes.dev": ("\ufeffwell\xa0, no ? !", "well, no?!"),
           "cbt.train": ("the dog 's bone ; he did n't\r\n", "the dog's bone; he did n't\r\n"),
           "open_subtitles.train": ("Run!\nSUBTITLES by x\nGo.\n", "Run!\n\nGo.\n"),
           "wikipedia.txt": ("= = = A town = = =\nIt is .", "A townIt is ."),
           "qed.train": ("MY DOG lS HERE. (HE) RUNS!\n\n(Tom) All's well.\n(All ...)",
                         "My dog is here. (he) runs!\n\n(Tom) All's well.\n(All ...)"),
           "gutenberg.train": ("\ufeffa  b ,", "\ufeffa  b ,"),
           "._qed.train": ("MY", ""), "cbt.test": ("a  b", ""), "notes.md": ("a  b", "")}

def test_cleaning_by_domain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("old")
    for name, (before, _) in CLEANED.items():
        Path("old", name).write_bytes(before.encode())
    assert "7 files" in invoke("clean old deep/new").stdout
    cleaned = {name: after.encode() for name, (_, after) in CLEANED.items() if after}
    assert files_in(Path("deep/new")) == cleaned
    Path("old/qed.dev").write_bytes(b"ab\xff")
    refused("clean", {"old deep/new": "is there already", "x old": "no .train or .dev or",
                      "old deep/er": "qed.dev is not UTF-8: "})
    assert os.listdir("deep") == ["new"]

def test_filtering_by_words(tmp_path, monkeypatch):
    """A pair goes if either sentence has one of the rare words, whatever its case, as a whole."""
    monkeypatch.chdir(tmp_path)
    assert len({*(HOME / "data/blimp_rare_words.txt").read_text().split()}) == 102
    path, other = Path("old/a.jsonl"), Path("old/b.jsonl")
    write_pairs(path, ("Scorch it.", "Karl ran."), ("Ex-husbands left.", "It left."),
                ("The warp ran.", "A husband left."), ("The dog ran.", "Karla's dog ran."), x=1)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b" \n".join([first, *rest]))
    path.with_name("._a.jsonl").write_bytes(b"\0")
    assert "1 files, 2 lines" in invoke("filter old new").stdout
    assert files_in(Path("new")) == {"a.jsonl": first + rest[1]}
    for line in (b"[]", b"\xff", b"[" * 100_000, b'{"sentence_good": 1, "sentence_bad": 2}'):
        other.write_bytes(first + line)
        said = error("filter old x")
        assert "b.jsonl, line 2: expected a JSON object with strings sentence_good" in said, line
        assert {*os.listdir()} == {"old", "new"}

SHARED = HOME.parent / "shared/data/blimp.tar.xz"

@mark.skipif(not SHARED.exists(), reason="needs the real BLiMP")
def test_filtered_blimp_has_babylms_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.unpack_archive(SHARED, filter="data")
    assert "67 files, 59,875" in invoke("filter blimp x").stdout

# data/figures.py -------------------------------------------------------------

def table_of(page):
    """The rows of a report's table; the page is well-formed XML, without a script."""
    table = ElementTree.fromstring(page.read_text()).find("body/table")
    assert not re.search("<script|<link|src=|@import|url\\(", page.read_text())
    heads, *rows = [["".join(cell.itertext()) for cell in row] for row in table]
    return [dict(zip(heads, row)) for row in rows]

def test_a_report_shows_what_the_runs_are(default_run, tmp_path):
    student, (teacher,) = default_run / RUN, default_run.glob("runs/teacher-*")
    assert invoke(f"report {student} {teacher}").stdout == f"{student}/report.html\n"
    rows = table_of(student / "report.html")
    for run, row in zip((student, teacher), rows):
        *log, last = history(run)
        mean = 100 * c.read_scores(*run.glob("blimp-*"))[1].mean()   # paradigms are alike long
        assert numbers(row["blimp, %"])[0] == approx(mean, abs=0.051)
        assert row["loss"] == f"{np.mean([line['loss'] for line in log[-20:]]):.3f}"
        assert row["dev loss"] == f"{last['dev_loss']:.3f}"
    shown = [f"{row['run']}; {row['objective']}; {row['teachers']}; {row['steps']}" for row in rows]
    assert shown == [
        f"● {student.name}{student}; 0.5 ce + 2 rkl at temperature 2; {teacher.name}; 999",
        f"● {teacher.name}{teacher}; ce; none; 999"]

def test_a_report_of_a_killed_run_and_of_hostile_names(default_run, tmp_path):
    bad = "<script>alert('&\"')<-script>"
    run = shutil.copytree(default_run / RUN, tmp_path / bad)
    for path in (run / "model.safetensors", *run.glob("blimp-*")):
        path.unlink()
    (run / "log.jsonl").write_text('{"step": 40, "loss": 0.5}\n{"step": 41, "loss": 0.')
    facts = c.read_json(run / "run.json") | {"teachers": [bad, 3, "\ud800"]}
    facts["settings"] |= {"objective": "drkl", "gamma": 2}
    del facts["settings"]["beta_by"]                    # as an older version would
    c.write_json(run / "run.json", facts)
    told = invoke(shlex.join(["report", str(run), "-o", f"{tmp_path}/a.html"])).stderr
    row, = table_of(tmp_path / "a.html")
    assert "No accuracies" in told and row["objective"].endswith("temperature 2, gamma 2")
    assert row["teachers"] == f"{bad}, 3, ?" and row["steps"] == "40, unfinished"

def test_how_sure_a_model_is_and_how_often_right(here):
    """By definition, from all logits at once. Runs that differ in their seed alone are one row."""
    for seed, flags in itertools.product("012", ("ce", "rkl --teachers 1")):
        train(f"r/{flags[:3].strip()}-s{seed}", f"--seed {seed} --objective {flags}")
    command = f"held-out {' '.join(map(str, sorted(here.glob('r/*-s?'))))}"
    facts = json.loads(invoke(f"{command} --json").stdout)["rkl"][2]
    folders = Path("r/rkl-s2"), *map(Path, c.read_json(Path("r/rkl-s2/run.json"))["teachers"])
    (m, known), (teacher, _) = (c.load_model(folder, "cpu") for folder in folders)
    ids = c.encode(known, c.read_text(Path("brief/dev.txt"), ".*"), "line")
    inputs, targets = c.windows(ids, np.arange(0, len(ids) - 32, 32), 32)
    log_q, log_p = (logits(x, inputs).flatten(0, 1).double().log_softmax(-1) for x in (m, teacher))
    (sure, guess), targets = log_q.exp().max(-1), targets.flatten()
    right, bins = (guess == targets).double(), (15 * sure).ceil()
    gaps = [(right - sure)[bins == i].sum().abs() for i in range(16)]
    wanted = [-log_q.gather(1, targets[:, None]), right, -(log_q.exp() * log_q).sum(-1), sure,
              literal_kl(log_p, log_q), literal_kl(log_q, log_p), sum(gaps) / len(right)]
    assert [*facts.values()][:8] == approx([2, *(x.mean().item() for x in wanted)], rel=1e-4)
    wanted = r"ce +3 .* none .*\+0.00% \(.*\nrkl +3 .*% to .*%\)\n\nloss "
    assert re.search(wanted, invoke(command).stdout)

def test_what_the_papers_tables_say():
    """As computed by hand from the same file: means, rankings, a claim that margins may fit."""
    told = invoke("paper").stdout
    assert "for 12 of 14 models; not for Baby Llama 66.1 (63.3), LTG-BERT 68.3 (60.3)\n" in told
    assert re.search("printed: FW-1-23 62.8, .*\n.*: RV-1-24.? 61.2, FW-1-23 61.1, ", told)
    assert told.count("no margin gives that") == 4 and "(8, 1, 8); within 8.7 to 10.0" in told

def test_toy_shows_where_modes_are_sought(tmp_path):
    """Only by a student that is one Gaussian, and only where the modes are narrow."""
    told = invoke(f"toy --json --svg {tmp_path}/toy.svg").stdout
    fits, x = {}, np.arange(50) / 5                     # mean and width of each Gaussian student
    for teacher, result in json.loads(told).items():
        for name, row in result["objectives"].items():
            gap, q = np.abs(np.subtract(row["q"], result["p"])).sum(), np.array(row["gaussian_q"])
            assert row["head"][250] + row["tail"][-1] == approx(gap)
            fits[teacher, name] = q @ x, (q @ x**2 - (q @ x)**2)**0.5
    assert fits["two narrow modes", "fkl"] == approx((6, 2.4), abs=0.5)
    assert fits["two narrow modes", "rkl"] == approx((7.5, 0.5), abs=0.01)
    assert min(fits["two modes", name][1] for name in ("fkl", "rkl", "akl")) > 2
    mine, readmes = ([x.text for x in ElementTree.parse(folder / "toy.svg").iter()
                      if x.get("class") == "title"] for folder in (tmp_path, HOME / "data"))
    assert mine == readmes
    told = invoke("toy --objective ab --epochs 6").stdout
    assert re.fullmatch("(.*\n){2}((.* [▁-█]{25}\n){2}){4}\n.*\n", told)

# data/glue.py ----------------------------------------------------------------

def write_items(name, n, classes=2, bad=""):
    """A task's file of n items, whose class the last word gives away, and a line that is bad."""
    with open(f"{name}.jsonl", "w") as file:
        for i in range(n):
            text, label = "the dogs " * (i * 7 % 5) + "cat", i % 5 % classes
            longer = f"{text} {'abc'[label]}"
            item = {"premise": text, "hypothesis": longer, "sentence": longer, "label": label}
            print(json.dumps(item), file=file)
        file.write(bad)

@every_kind
def test_a_classifier_is_that_of_transformers(saved, vocabulary, kind):
    """The ids of pairs, some too long, logits of padded batches, three steps of training."""
    transformers = importorskip("transformers")
    m = written_model(saved, vocabulary, sharp=3, **kind)
    write_items("mnli", 40, 3)
    tokenizer = c.load_vocabulary(saved).tokenizer
    tokenizer.enable_truncation(12)
    rows, labels = items = glue.read_items(Path("mnli.jsonl"), "mnli", tokenizer)
    pairs = [(x["premise"], x["hypothesis"]) for x in lines_of("mnli.jsonl")]
    batch = transformers.AutoTokenizer.from_pretrained(saved)(
        pairs, truncation=True, max_length=12, padding=True, return_tensors="pt")
    masked = zip(batch["input_ids"], batch["attention_mask"])
    assert [ids[mask > 0].tolist() for ids, mask in masked] == rows != [row[:11] for row in rows]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    torch.manual_seed(1)                                    # as fine_tune begins the head
    theirs.score = torch.nn.Linear(32, 3, bias=False)
    torch.nn.init.normal_(theirs.score.weight, 0, 0.02)
    with torch.no_grad():
        found = glue.class_logits(m, theirs.score, rows)
        assert alike(found, theirs.eval()(**batch).logits, 1e-5)
    how = {"batch_size": 40, "epochs": 3, "patience": 3, "lr": 1e-3}
    glue.fine_tune(m, "mnli", *items, {"mnli": items}, 1, how)
    optimizer = torch.optim.AdamW(theirs.train().parameters(), weight_decay=0)
    for optimizer.param_groups[0]["lr"] in (1e-3, 2e-3 / 3, 1e-3 / 3):
        theirs(**batch, labels=torch.from_numpy(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, x in m.named_parameters():        # bias of keys: its gradient is 0, and noise
        if "lm_head" not in name and "c_attn.bias" not in name:
            x = x.data - c.stored(name, theirs.get_parameter(m.prefix + name))
            assert x.abs().max() < 1e-5, name

def test_f1_and_mcc_by_definition():
    for i in range(1000):
        labels, guesses = np.random.default_rng(i).integers(0, 2, (2, 1 + i % 9))
        tn, fp, fn, tp = np.bincount(2 * labels + guesses, minlength=4).tolist()
        f1 = tp / (tp + (fp + fn) / 2) if tp else 0
        chance = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert glue.figure("qqp", labels, guesses) == approx(f1)
        assert glue.figure("cola", labels, guesses) == approx((tp * tn - fp * fn) / (chance or 1))

def test_glue_learns_keeps_what_it_found_and_goes_on(saved, vocabulary, monkeypatch):
    """Nothing is done twice, unless by other weights or in another way, which has another name."""
    for part in ("sst2.train", "sst2.valid", "mnli.train", "mnli.valid", "mnli-mm.valid"):
        write_items(part, 64 if "train" in part else 40, classes=2 + ("m" in part))
    shutil.copytree(saved, "other")
    command = "glue -d . --lr 0.01 --batch-size 8 --seeds 1,2 --epochs 4 -m "
    tune = Mock(wraps=glue.fine_tune, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(glue, "fine_tune", tune)
    assert "Stopped: " in invoke(command + "model", 130).stderr
    tune.side_effect = None
    found = json.loads(invoke(command + "model --json").stdout)
    assert [call.args[1] for call in tune.mock_calls] == ["sst2"] * 2 + ["mnli"] * 3
    assert found["missing"] == "boolq, cola, mrpc, multirc, qnli, qqp, rte, wsc"
    assert [row["task"] for row in found["rows"]] == ["sst2", "mnli", "mnli-mm"]
    for row in found["rows"]:
        assert np.mean(row["values"]) == row["figure"] > row["majority"] + 0.1
    assert re.search("mnli-mm .*\nmean .*, missing tasks: boolq", invoke(command + "model").stdout)
    assert tune.call_count == 5
    path, = saved.glob("glue-sst2-????????.jsonl")
    facts, *lines = lines_of(path)
    assert facts["pairs"] == len(lines) == 40
    for i, line in enumerate(lines):
        score = np.mean(np.equal(line["predictions"], i % 5 % 2))
        assert [*line.values()][:4] == ["sst2", "sst2", i + 1, score]
    invoke(command + "other --task sst2")
    assert Path("other", path.name).read_bytes() == path.read_bytes()
    assert "all " in invoke("compare model other --suite glue").stdout
    written_model("other", vocabulary, seed=1)
    for suite in c.SUITES:
        keep(saved, suite, c.read_pairs(TINY / "blimp", 40), np.zeros((40, 2)))
    wanted = r"model +1\S+ +1\S+ +1\S+ +(\S+) +unknown +boolq.*\nother( +none){3} "
    assert re.search(wanted, invoke("macro model other").stdout)
    for flags in ("", "--tokens 9"):
        invoke(f"{command} other --task sst2 {flags}")
    assert tune.call_count == 11 and len([*Path("other").glob("glue-*")]) == 2

def test_glue_of_bad_input_is_one_sentence(saved):
    command = "glue -m model -d . "
    assert "no TASK.train.jsonl with its" in error(command)
    write_items("cola.train", 2)
    for bad in ("[]", '{"sentence": null, "label": 1}', '{"sentence": "\\ud800", "label": 1}',
                '{"sentence": "a", "label": 2}', '{"sentence": "a", "label": true}'):
        write_items("cola.valid", 2, bad=f"{bad}\n")
        assert "cola.valid.jsonl, line 3: expected a JSON obj" in error(command)
    write_items("cola.valid", 0)
    assert "cola.valid.jsonl is empty" in error(command)
    write_items("cola.valid", 2)
    refused(command, {"--lr nan": "not finite: take a lower", "--seeds 1,x": "expected as 1,2,3"})
    assert not [*saved.glob("glue-*")]

# data/instruct.py: instructions and responses --------------------------------

def literal_common(a, b):
    pairs = literal_common(a[1:], b[1:]) + (a[0] == b[0]) if a and b else 0
    return max(pairs, literal_common(a[1:], b), literal_common(a, b[1:])) if a and b else 0

def test_rouge_is_the_literal_and_googles_with_stems_or_without(monkeypatch):
    draw, words = random.Random(0), "The old dogs, dog-like! Runs running naïve 3rd (3) İ\0".split()
    pairs = [[" ".join(draw.choices(words, k=draw.choice((0, 1, 5, 20)))) for _ in "ab"]
             for _ in range(1000)]
    split, (stems, told) = instruct.split_words, instruct.choose_splitter()
    for pair in pairs[:200]:
        a, b = (split(text)[:6] for text in pair)
        assert instruct.rouge_l(a, b) == 2 * literal_common(a, b) / max(1, len(a) + len(b))
    theirs = importorskip("rouge_score.rouge_scorer").RougeScorer
    for own, stemmed in ((split, False), (stems, True)):
        wanted = [theirs(["rougeL"], stemmed).score(*pair)["rougeL"].fmeasure for pair in pairs]
        assert [instruct.rouge_l(*map(own, pair)) for pair in pairs] == approx(wanted, abs=1e-12)
    monkeypatch.setitem(sys.modules, "rouge_score.tokenizers", None)
    assert "stemmed by rouge_score" in told and instruct.choose_splitter()[0] is split

@every_kind
def test_greedy_responses_are_those_of_transformers(saved, vocabulary, kind):
    """Prompts of several lengths at once, two cut on the left; responses that end or do not."""
    m = written_model(saved, vocabulary, sharp=6, **kind)
    prompts = ["Say it.", "The dogs ran.\n", "a b c d e " * 9, " a" * 15, " a" * 16]
    instruct.write_lines(Path("x.jsonl"), [{"prompt": x, "output": ""} for x in prompts])
    rows = [[1, *encoded(vocabulary, prompt)[-15:]] for prompt in prompts]
    end = c.write_on(m, rows[:1], [], 16, None, 0)[0][5]
    edit(saved / "config.json", eos_token_id=[-10**30, end, None, 10**9])
    assert instruct.end_ids(saved, vocabulary, vocabulary.size) == [1, end]
    told = invoke("instruct -m model -d x.jsonl --temperature 0 --batch-size 3 --out y").stderr
    found = lines_of("y")
    assert "2 of 5 prompts are cut to 16 tokens" in told and found[0]["ended"]
    edit(saved / "config.json", eos_token_id=end)
    theirs = importorskip("transformers").AutoModelForCausalLM.from_pretrained(saved)
    for row, line in zip(rows, found):
        ids = theirs.generate(torch.tensor([row]), max_new_tokens=16, do_sample=False,
                              eos_token_id=[1, end], pad_token_id=0)[0, len(row):].tolist()
        ids = ids[:-1] if ids[-1] in (1, end) else ids
        text = vocabulary.tokenizer.decode(ids).strip()
        assert (text, len(ids), len(ids) < 16) == (line["output"], line["tokens"], line["ended"])

def test_responses_are_scored_kept_compared_and_trained_on(saved, vocabulary, monkeypatch):
    """Repeatable by seed; the best of several references; what cannot be is one sentence."""
    items = [{"prompt": f"Say {i}.", "output": ["A cat.", f"The dog {i}."]} for i in range(9)]
    items.append({"instruction": "Go.", "output": "yes"})
    instruct.write_lines(Path("a.test.jsonl"), items)
    command = "instruct -d a.test.jsonl --length 24 -m "
    found = json.loads(invoke(command + "model --seeds 5,3,5 --json --out text/x.jsonl").stdout)
    kept, = saved.glob("rouge-a.test-*.jsonl")
    lines = lines_of("text/x.jsonl")
    rouge = np.array([line["rouge_l"] for line in lines]).reshape(2, 10)            # by seed
    assert c.read_scores(kept)[1] == approx(rouge.mean(0) / 100)
    found, means = found["rouge_l"], rouge.mean(1)
    assert [*found["by_seed"], found["deviation"]] == approx([*means, means.std(ddof=1)])
    assert len(instruct.read_examples(Path("text"), ".*")) == 20
    assert len({line["output"] for line in lines}) > 10                 # seeds differ
    told = invoke(command + "model --seeds 3 --out alone").stdout
    assert re.search(r"10, seeds \[3\](.*\n)+rouge_l ", told) and lines_of("alone") == lines[:10]
    invoke(command + "model --seeds 3 --sample 5 --out five")
    assert [line["prompt"] for line in lines_of("five")] == [f"Say {i}." for i in range(0, 9, 2)]
    shutil.copytree("model", "other")
    ids = encoded(vocabulary, "the DOG 3,\n")
    monkeypatch.setattr(c, "write_on", lambda m, rows, *_: [ids] * len(rows))
    assert " ± " in invoke(command + "other --seeds 3,5 --out same").stdout
    found = [(line["output"], line["rouge_l"]) for line in lines_of("same")[2:4]]
    assert found == [("the DOG 3,", approx(200 / 3)), ("the DOG 3,", 100)]
    told = invoke("compare model other --suite rouge").stdout
    assert re.search("a.test +10 .* 63.3% .* better on these", told)
    instruct.write_lines(Path("five"), lines[:5] + [{"prompt": "x", "output": []}])
    refused(command + "model", {
        f"--out {kept}": "already there", "-d .": ". is no file", "--seeds 1,x": "expected whole",
        "-d five": "five, example 6: expected a JSON"})

def test_only_responses_are_learnt_from(saved, vocabulary, monkeypatch):
    """A row an example, whose prompt may lose its left; resumed to the byte; Alpaca's template."""
    examples = [["Say it.", "A cat."], [" a" * 30 + " dog", "the dogs"], ["Say.", " a" * 30]]
    ids = instruct.encode_examples(vocabulary, examples, 16)
    wanted = []
    for prompt, response in examples[:2]:               # there is no room for the third
        given = [1, *encoded(vocabulary, prompt)[-7:]]
        row = [~i for i in given] + encoded(vocabulary, response) + [1]
        wanted += row + [~1] * (16 - len(row))
    assert ids.tolist() == wanted + [~1] and wanted[-1] == ~1
    items = [{"instruction": "Go.", "input": "now" * (i % 2), "output": f"{i}"} for i in range(12)]
    instruct.write_lines(Path("t/a.train.jsonl"), items)
    instruct.write_lines(Path("t/a.dev.jsonl"), items[:5])
    told = instruct.read_examples(Path("t"), ".*dev.jsonl")[1][0]
    assert "task, paired with an " in told and told.endswith("t:\nnow\n\n### Response:\n")
    command = "instruct train --teacher model --init model --text t --pairs none --context 24 "
    command += "--batch-size 4 --warmup 2 --steps 7 --out "
    monkeypatch.setattr(c, "read_corpus", c.read_corpus)                # which train replaces
    assert "held-out loss" in invoke(command + "whole").stdout
    stopped(monkeypatch, 5)
    invoke(command + "part", 130)
    invoke(command + "part --resume")
    assert weights("part") == weights("whole")
    assert not c.read_json(Path("part/run.json"))["settings"]["random_offset"]
    refused(command + "x", {
        "--dev t/a.train.jsonl": "no *.dev.jsonl", "--context 3": "expected a longer --context",
        "--prefix none": "are for plain text"})

# On a GPU --------------------------------------------------------------------

DEVICE = "cuda"
on_cuda = mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HALF = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}

def there(inputs, dtype=torch.float32):
    """Inputs of the loss on the GPU."""
    return [x.detach().to(DEVICE, dtype if x.is_floating_point() else None)
            .requires_grad_(x.requires_grad) for x in inputs]

@on_cuda
@mark.parametrize("objective", ["ce", *c.DIVERGENCES])
def test_cuda_fused_loss_is_the_whole_loss(objective):
    """Compiled in bf16, where it is written out."""
    inputs = loss_inputs(N=96, C=16, V=300)
    inputs[2][4:6] = -100                                       # ignored
    for beta, (dtype, tolerance) in zip((0.3, 0.7, 1.0), HALF.items()):
        rounded = [x.detach().to(dtype).double().requires_grad_(x.requires_grad)
                   if x.is_floating_point() else x for x in inputs]
        wanted = whole(rounded, beta, objective=objective, **CONSTANTS)
        found = fused(there(rounded, dtype), beta, 32, objective=objective, **CONSTANTS,
                      compile=dtype == torch.bfloat16)
        assert all(off(x.cpu().double(), y) < tolerance for x, y in zip(found, wanted)), dtype

@on_cuda
def test_cuda_chunks_and_compiling_change_only_the_rounding():
    """A last chunk that is shorter, against all at once and not compiled."""
    inputs = there(loss_inputs(N=100, V=300))
    wanted = fused(inputs, 0.7, 100, compile=False)
    assert all(off(x, y) < 1e-5 for x, y in zip(fused(inputs, 0.7, 33), wanted))

@on_cuda
def test_cuda_no_array_of_all_logits_is_held():
    """The most bytes held beyond what was there, against N * V numbers of half precision."""
    for objective in ("rkl", "jsd"):
        inputs = there(loss_inputs(torch.float32, 65_536, 64, 64, 8_000), torch.bfloat16)
        fused(inputs, chunk=0, objective=objective)                     # compiles
        before = peak(torch.device(DEVICE), anew=True)
        fused(inputs, chunk=0, objective=objective)
        assert 0 < peak(torch.device(DEVICE)) - before < 2 * 65_536 * 8_000, objective

@on_cuda
def test_cuda_a_compiled_model_is_the_model():
    """Its blocks, with grouped queries; GPT-2's are compiled in the run below."""
    ids, slopes = some_ids(4, 16), []
    for how in ("cpu", "eager", "compiled"):
        m = model(sharp=5, kv_heads=1).to("cpu" if how == "cpu" else DEVICE).eval()
        for block in m.layers if how == "compiled" else []:
            block.compile(dynamic=False)
        hidden = m(ids.to(m.head.device))
        (hidden * hidden.detach().roll(1, 0)).sum().backward()
        slopes.append([hidden.detach().cpu(), *(p.grad.cpu() for p in m.parameters()
                                                if p.grad is not None)])
    for found in slopes[1:]:
        assert len(found) == len(slopes[0])
        assert all(off(x, y) < 1e-4 for x, y in zip(found, slopes[0]) if y.norm() > 1e-6)

@on_cuda
def test_cuda_scores_choose_as_the_cpus(saved, vocabulary):
    m, pairs = model(V=vocabulary.size, sharp=5, positions=64), c.read_pairs(TINY / "blimp", 200)
    here, gpu = (c.score_pairs(m.to(each), vocabulary, pairs, "")[1] for each in ("cpu", DEVICE))
    clear = np.abs(here[:, 0] - here[:, 1]) > 1e-3
    assert np.allclose(here, gpu, 0, 1e-3) and clear.sum() > 150
    assert ((here[:, 0] > here[:, 1]) == (gpu[:, 0] > gpu[:, 1]))[clear].all()

@on_cuda
def test_cuda_a_run_goes_on_from_its_checkpoint(here, monkeypatch):
    """Two teachers, a tied head, compiled, bf16: equal but for rounding, which may not repeat."""
    flags = f"--objective rkl --teachers 2 --beta 0.7 --tied --device {DEVICE} --micro-batch 4"
    train("r/whole", flags)
    stopped(monkeypatch, 3)
    train("r/part", flags, 130)
    assert len(steps_of("r/part")) == 3
    assert "mean of 20" in train("r/part", flags + " --resume").stdout
    whole, part = (np.array([line["loss"] for line in steps_of(f"r/{run}")])
                   for run in ("whole", "part"))
    assert len(whole) == 6 and np.allclose(whole, part, 1e-3)
    train("cpu/whole", flags.replace(DEVICE, "cpu"))
    assert np.allclose(whole, [line["loss"] for line in steps_of("cpu/whole")], 0.01)

def steps_by(step, device):
    """What 40 steps return, while learning rate, beta, rows and dropout change."""
    rows, teacher = [], model(sharp=6, seed=5).to(device)
    m = model(model_type="gpt2", dropout=0.3).to(device).train()
    optimizer = c.make_optimizer(m, settings())
    for i, inputs in enumerate(some_ids(40, 8, 16).to(device)):
        torch.manual_seed(i)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (i % 5)
        scaler = torch.amp.GradScaler(device, enabled=False)
        rows.append(step(m, optimizer, c.Coach([teacher]), inputs, inputs.roll(-1, 1),
                         settings(micro_batch=4), 1 - i // 20 / 2, torch.float32, scaler))
    return torch.stack(rows).cpu()

@on_cuda
def test_cuda_a_recorded_step_is_the_step():
    plain, recorded = (steps_by(how, DEVICE) for how in (c.train_step, c.RecordedStep()))
    assert (off(plain, recorded, 1) < 1e-4).all()

def test_a_recorded_step_runs_on_what_lies_in_its_place(monkeypatch):
    """A CUDA graph, played on a CPU: recording runs nothing, a replay all with the same tensors."""
    class Graph:
        def record(self, model, optimizer, *rest):
            self.args, self.groups = (model, optimizer, *rest), optimizer.param_groups
            self.row, self.lr = torch.zeros(4).double(), self.groups[0]["lr"]
            return self.row

        def replay(self):
            replayed.append(self)
            for group in self.groups:
                group["lr"] = self.lr.item()
            self.row.copy_(c.train_step(*self.args))

    replayed, plain = [], steps_by(c.train_step, "cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda to: patch.object(c, "train_step", to.record))
    assert (off(plain, steps_by(c.RecordedStep(), "cpu"), 1) < 1e-5).all()
    assert len(replayed) == 36 and len({*replayed}) == 2        # two of 20 steps compile, twice

@on_cuda
def test_cuda_fp16_leaves_out_a_step_that_overflows(here, monkeypatch):
    large = functools.partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    train("x", f"--precision fp16 --steps 12 --device {DEVICE} --no-compile")
    finite = [math.isfinite(line["norm"]) for line in steps_of("x")]
    assert not finite[0] and finite[-1] and all(math.isfinite(x["loss"]) for x in steps_of("x"))

# The benchmark of the loss: python test_choobaca.py bench --help -------------

def peak(device, anew=False):
    """The most bytes that this process has held, ever or since it was asked for `anew`, or 0."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if anew and status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s*(\d+)|$", status.read_text() if status.exists() else "")
    return 1024 * int(found[1] or 0)

def measure(step, leaves):
    """Seconds of a step, and the bytes that it holds at its peak beyond inputs and gradients."""
    for leaf in leaves:
        leaf.grad = None
    device = leaves[0].device
    before, begin = peak(device, anew=True), time.perf_counter()
    step()
    most = peak(device)                                         # a GPU has then finished
    seconds = time.perf_counter() - begin
    return seconds, max(0, most - before - sum(leaf.nbytes for leaf in leaves))

def record(step, leaves):
    """A step as a CUDA graph, as it is in training, without launches; and its peak of bytes."""
    for _ in range(3):                                          # compiles
        most = measure(step, leaves)[1]
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, most

def contestants(objectives, rows, width, teacher_width, vocab_size, chunk, dtype, device):
    """What is compared, and where its gradients go. "products" is a loss's four matmuls and nothing
    else: no loss is faster. "plain" is plain_loss by autograd, "compiled" (on a GPU) compiled."""
    made = loss_inputs(getattr(torch, dtype), rows, width, teacher_width, vocab_size)
    hidden, head, targets, t_hidden, t_head = inputs = [x.detach().to(device) for x in made]
    hidden *= 2 * width**-0.5                                   # logits are N(0, 2^2)
    t_hidden *= 2 * teacher_width**-0.5
    leaves = hidden.requires_grad_(), head.requires_grad_()
    chunks = math.ceil(rows / (chunk or c.CHUNK[hidden.device.type]))

    @torch.no_grad()
    def products():
        z, w = hidden.new_empty(2, math.ceil(rows / chunks), vocab_size)
        head.grad, hidden.grad = torch.zeros_like(head), torch.empty_like(hidden)
        for h, t, d_h in zip(*(x.chunk(chunks) for x in (hidden, t_hidden, hidden.grad))):
            d_z = torch.mm(h, head.T, out=z[:len(h)])
            torch.mm(t, t_head.T, out=w[:len(h)])
            torch.mm(d_z, head, out=d_h)
            head.grad.addmm_(d_z.T, h)

    def loss(hidden, head):
        z, w = (hidden @ head.T).float(), (t_hidden @ t_head.T).float()
        return c.plain_loss(z, w, targets, tau=2.0, alpha=0.5)

    steps = {("products", "rkl"): products,
             ("plain", "rkl"): lambda: loss(hidden, head).backward()}
    if hidden.is_cuda:
        quick = torch.compile(loss, dynamic=False)
        steps["compiled", "rkl"] = lambda: quick(hidden, head).backward()
    for name in objectives:
        steps["fused", name] = functools.partial(fused, inputs, 1.0, chunk, objective=name)
    return steps, leaves

def weigh(name, sizes):
    """The peak memory of one contestant, in a process of its own."""
    steps, leaves = contestants(**sizes)
    steps["products", "rkl"]()          # the library's own work space is taken, and stays
    return measure(steps[name], leaves)[1]

benchmark = click.Group(help="The benchmark of the loss. The tests are run by pytest.")

@benchmark.command("bench", params=[
    click.Option([f"--{name}"], default=size, show_default=True, type=click.IntRange(0, 2**20))
    for name, size in {"rows": 4096, "width": 512, "teacher-width": 1024, "vocab-size": 16_000,
                       "chunk": c.Settings.chunk, "repeats": 5}.items()])
@click.option("--objective", "objectives", multiple=True, default=["rkl"], show_default=True,
              type=click.Choice(["ce", *c.DIVERGENCES]), help="What to compare; may be repeated.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list in place of the table.")
def bench_command(repeats, as_json, **sizes):
    """Time and weigh the loss, forward and backward, against its bare matrix products."""
    sizes["device"] = c.choose_device(sizes["device"])
    steps, leaves = contestants(**sizes)
    if sizes["device"] == "cuda":
        recorded = [record(step, leaves) for step in steps.values()]
        steps, peaks = dict(zip(steps, [step for step, _ in recorded])), [x for _, x in recorded]
    rounds = [[measure(step, leaves)[0] for step in steps.values()] for _ in range(repeats + 1)]
    seconds = np.array(rounds[1:])                              # the first one does not count
    if sizes["device"] == "cpu":        # glibc then gives back what is freed, up to 30 MB
        with (patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="131072"),
              multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool):
            peaks = pool.starmap(weigh, [(name, sizes) for name in steps], chunksize=1)
    rows, lines = [], [f"{'':<9} {'objective':<9} seconds, median (range)  x products  peak, MB"]
    for (name, objective), times, most in zip(steps, seconds.T, peaks):
        median, ratio = float(np.median(times)), float(np.median(times / seconds[:, 0]))
        rows.append({"name": name, "objective": objective, "seconds": median,
                     "seconds_all": times.tolist(), "peak_bytes": most, "ratio": ratio})
        lines.append(f"{name:<9} {objective:<9} {median:7.3f} ({min(times):.3f} to "
                     f"{max(times):.3f}) {ratio:11.2f} {most / 1e6:9,.0f}")
    print(json.dumps(rows, indent=2) if as_json else "\n".join(lines))

def test_bench_compares_and_weighs():
    command = "bench --rows 2000 --vocab-size 4000 --width 16 --teacher-width 16 --chunk 100 "
    rows = json.loads(invoke(command + "--objective rkl --objective ce --json").stdout)
    names = [f"{row['name']} {row['objective']}" for row in rows]
    assert names == ["products rkl", "plain rkl", "fused rkl", "fused ce"]
    for row in rows:
        fastest, _, _, _, slowest = sorted(row["seconds_all"])
        assert 0 < fastest <= row["seconds"] <= slowest and row["ratio"] > 0
    plain, fused = (row["peak_bytes"] for row in rows[1:3])
    assert not plain or plain > 3 * max(4 * 2000 * 4000, fused)
    table = invoke(command + "--repeats 1").stdout
    assert re.fullmatch(r".*\nproducts +rkl .*\nplain +rkl .*\nfused +rkl .*\n", table)

if __name__ == "__main__":
    benchmark()
