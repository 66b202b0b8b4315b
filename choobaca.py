"""ChooBaCa: distil a small language model from a bigger one, in one file.

A teacher is trained on text. A student learns from the same text and, at every token, from the
teacher's whole distribution over the next token, under reverse KL or another divergence.
Both are scored on minimal pairs: is "The dogs run." likelier than "The dogs runs."? The paper is
"Choosy Babies Need One Coach" (Shi et al. 2024), the AKL paper Wu et al. 2024 (arXiv 2404.02657).

    python choobaca.py train --objective rkl --teachers 1     train a teacher, then its student
    python choobaca.py eval-blimp                             score the newest run

Part one is the lesson: plain versions, then fast ones, which tests hold equal up to rounding.

    1 the idea   2 text to batches   3 LLaMA   4 divergences   5 the fused loss
    6 schedules and one step   7 minimal pairs

Read this first: 1, 4, 5, `train_step` in 6, the trie in 7; `Settings` in 8 explains each setting.
Part two makes a tool of it, and needs no reading: 8 files and settings, 9 the corpus, 10 GPT-2,
11 run folders, 12 training, 13 sampling, 14 tables, 15 the command line. Shapes have these letters:

    B batch   T time   N = B * T tokens   C width (C' teacher)   H heads   D = C / H   V vocabulary
    n rows (tokens) of a chunk or block   S keys, cached and new   head (V, C): the output matrix

The paper's temperature is called tau, since T is time. Where we differ from the paper or from
BabyLlama, whose code it builds on, the place is marked with its number in this list:

    (1) every line of text begins with <s>, and its first word with a space: scoring asks for both
    (2) all 256 bytes are in the vocabulary from the start, so no text is ever dropped
    (3) the divergence is a mean over tokens; BabyLlama's "batchmean" weighs it T times as much
    (4) student logits that are mixed into the teacher's (Eq. 2) are constant there: see 5
    (5) the learning rate follows one cosine to the end, after a warmup
"""
import sys

if sys.version_info < (3, 11):
    sys.exit("choobaca.py needs Python 3.11 or newer.")

import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import time
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")    # torch's waiting threads hinder others less

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn         # else torch imports it later, and a process group stays alive
import torch.nn.functional as F
from click import ClickException, IntRange, echo, option
from tokenizers import (Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)
from torch import Tensor, nn
from tqdm import tqdm

HOME = Path(__file__).resolve().parent
TINY = HOME / "data/tiny"           # a small artificial English, and minimal pairs of it

def need(condition, message):
    """Stop with one sentence to the user unless the condition holds."""
    if not condition:
        raise ClickException(message)

def setting(default, help, choices=(), low=0, high=2**31 - 1, path=False):
    """Declare a field of Settings (section 8): flags, help, TOML keys and checks come from it."""
    return field(default=default, metadata={
        "help": help, "choices": choices, "low": low, "high": high, "path": path})

# 1. The idea -----------------------------------------------------------------
#
# A language model gives each next token a probability. The text says only which token came: "dog",
# so 1 for dog and 0 for the others. A teacher says more: dog .50, cat .40, car .09, of .01. "Cat"
# is nearly as good as "dog", "of" next to impossible: the text does not say that, the teacher does.
# Distillation trains the student on these numbers, so the two must share a vocabulary. We have to
# choose a divergence: a measure of how far the student's distribution q is from the teacher's p.
#
#     forward KL  sum p log(p / q)   weighs by the teacher: do not miss what the teacher says
#     reverse KL  sum q log(q / p)   weighs by the student: do not say what the teacher does not
#
# A student that is too small to copy the teacher has to give something up. Under forward KL it
# covers all that the teacher finds likely, even if unlikely tokens gain by it, too. Under
# reverse KL it can keep to a part (a "mode") that it gets right. The paper asks which is better.
#
# Temperature: we divide both models' logits by tau = 2 before the softmax. In the flatter q and
# p unlikely tokens count for more. That also divides gradients by tau (the chain rule) and, if tau
# is high, by tau once more, because flat q and p differ less: so the loss has the factor tau^2.

def plain_loss(z, w, targets, tau, alpha):
    """Return the loss that is the whole lesson, summed over N tokens (the paper's Eq. 9).

    z, w (N, V) are the student's and the teacher's logits, targets (N,) the tokens that came. The
    loss is alpha times cross-entropy on these plus (1 - alpha) tau^2 times the divergence.

    We cannot afford it: up to 8 arrays (N, V) at once. FusedLoss in section 5 does without them."""
    ce = F.cross_entropy(z, targets, reduction="sum")           # forward KL, from p = 1 at target
    log_q = F.log_softmax(z / tau, -1)                          # what the student expects
    log_p = F.log_softmax(w / tau, -1)                          # what the teacher expects
    divergence = (log_q.exp() * (log_q - log_p)).sum()          # reverse KL, over V and over N
    return alpha * ce + (1 - alpha) * tau**2 * divergence

def distil_in_short(student, teacher, batches, tau=2.0, alpha=0.5, lr=4e-3):
    """Distil in ten lines; what follows is faster. Batches are inputs and next tokens, (B, T)."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    for inputs, targets in batches:
        z = student.hidden(inputs) @ student.head.T             # (B, T, V), the student's logits
        with torch.no_grad():
            w = teacher.hidden(inputs) @ teacher.head.T         # (B, T, V), the teacher's
        loss = plain_loss(z.flatten(0, 1), w.flatten(0, 1), targets.flatten(), tau, alpha)
        optimizer.zero_grad()
        (loss / targets.numel()).backward()
        optimizer.step()

# 2. Text to ids to batches ---------------------------------------------------
#
# lines of text  ->  ids (tokens,)  ->  inputs (B, T) and targets (B, T) of a step
#
# A model predicts each token from those before it; so each line begins with a prefix token, <s>.
# Joined lines are cut into rows of T ids: most begin in mid-line, and attention crosses lines.

class Vocabulary(NamedTuple):
    tokenizer: Tokenizer
    prefix_id: int                  # the token that stands before a sentence
    files: dict                     # names and bytes: tokenizer.json and the small files beside it

    @property
    def size(self):
        """V: one more than the largest id of the BPE's own tokens, added words, the prefix."""
        ids = [*self.tokenizer.get_vocab(with_added_tokens=False).values(), self.prefix_id]
        added = self.tokenizer.get_added_tokens_decoder()
        return max(ids + [i for i, token in added.items() if not token.special]) + 1

def train_tokenizer(lines, vocab_size):
    """Learn a byte-level BPE, as BabyLlama's: merge the commonest neighbours up to V tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()                   # one spelling for each character
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2,                 # a pair seen once is not merged
        special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))           # <- differs (2)
    tokenizer.train_from_iterator(tqdm(lines, "vocabulary", leave=False, unit=" lines"), trainer)
    prefix = [("<s>", tokenizer.token_to_id("<s>"))]        # other tools get it before a text
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", prefix)
    return tokenizer

def encode(vocabulary, lines, prefix):
    """Encode lines and join their ids end to end: (tokens,). By the prefix setting, the lines
    "A dog." and "It ran." become

        line    <s> " A dog." <s> " It ran."
        none    "A dog." "\\n" "It ran." "\\n"

    <- differs (1): BabyLlama's is "none". It trains without <s> and without a space before a line's
    first word, but scores sentences after <s> and a space, which the model has never seen."""
    tokenizer = vocabulary.tokenizer
    space, before, after = " ", [vocabulary.prefix_id], []      # a space: some tokenizers add none
    if prefix == "none":            # [-1:]: without the space token that some put before "\n"
        space, before, after = "", [], tokenizer.encode("\n", add_special_tokens=False).ids[-1:]
        text = tokenizer.to_str().replace('"add_prefix_space":true', '"add_prefix_space":false')
        tokenizer = Tokenizer.from_str(text)        # a copy that adds no space to a text
        tokenizer.encode_special_tokens = True      # a "<s>" in a text is three characters
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    pieces = [np.zeros(0, dtype)]
    for i in tqdm(range(0, len(lines), 10_000), "encoding", unit=" x 10,000 lines", leave=False):
        part = [space + line for line in lines[i:i + 10_000]]
        encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        ids = itertools.chain.from_iterable(before + line.ids + after for line in encoded)
        pieces.append(np.fromiter(ids, dtype))
    return np.concatenate(pieces)

def count_rows(tokens, settings):
    """Count the rows of an epoch: T ids each, and one more for the last target."""
    spare = settings.context - 1 if settings.random_offset else 0       # a row may be shifted
    return max(0, tokens - 1 - spare) // settings.context

@functools.lru_cache
def row_starts(rows, settings, epoch):
    """Return where the rows of an epoch start in the text, in the order of training: (rows,)."""
    draw = np.random.default_rng([settings.seed, epoch])                # from these two alone
    starts = draw.permutation(rows) * settings.context
    return starts + draw.integers(0, settings.context, rows) * settings.random_offset

def windows(ids, starts, T):
    """Cut inputs and targets, (rows, T) int64 each: for ids 0, 1, 2, ..., T = 4 and a start of 8,
    8 9 10 11 and 9 10 11 12. An id i to read, not to predict (a prompt's), is stored as -1 - i."""
    rows = ids[starts[:, None] + np.arange(T + 1)]                      # (rows, T + 1)
    rows = torch.from_numpy(rows.astype(np.int64))
    inputs = torch.where(rows < 0, ~rows, rows)[:, :-1]         # ~ of ~i is i (data/instruct.py)
    targets = rows[:, 1:].clamp(min=-1)                         # -1: no target
    return inputs, targets

def batch_at(step, ids, settings):
    """Return inputs and targets of a step, (B, T) each: a pure function of step, ids, settings."""
    B = settings.batch_size
    rows = count_rows(len(ids), settings)               # an epoch permutes and shifts them
    epoch, i = divmod(step, rows // B)                  # what does not fill a batch is left out
    starts = row_starts(rows, settings, epoch)[i * B:(i + 1) * B]
    return windows(ids, starts, settings.context)

# 3. LLaMA --------------------------------------------------------------------
#
# ids (B, T)  ->  hidden states (B, T, C): what the model knows at each position, as C numbers
#
# Logits are hidden states times the head's transpose, (B, T, C) @ (C, V): section 5 makes them, a
# few rows at a time; a model returns hidden states. Modules have Hugging Face's names. Training
# passes no `past`, `cache`, `mask` or `tree`: read on as if they were not there.

class Tree(NamedTuple):
    """Positions and mask of rows that are not one text from the left: tries (7), padding."""
    depth: Tensor                   # (B, T), the position of each id in its own text
    sees: Tensor                    # (B, 1, T, S), True where query t may look at key s

def plain_attention(q, k, v, sees):
    """Let queries q (B, H, T, D) look at keys and values k, v (B, H, S, D): -> (B, H, T, D).
    sees (T, S) is True where a query may look. The models call scaled_dot_product_attention, which
    can do it without keeping the (T, S) table: the trick that section 5 plays on the logits."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])   # how well key s answers query t
    scores = scores.masked_fill(~sees, -math.inf)               # no looking ahead
    return scores.softmax(-1) @ v                               # the mean of v by these weights

def rotary_angles(positions, D, theta):
    """Return cos and sin, two (..., 1, T, D): of a position's D/2 angles negated, then plain."""
    speed = theta ** -(torch.arange(0, D, 2, device=positions.device) / D)              # (D/2,)
    angle = positions[..., None, :, None] * speed               # the same for all heads
    angle = torch.cat([-angle, angle], -1)                      # cos is the same, sin is not
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Turn each vector by the angles of its position: (B, H, T, D) -> (B, H, T, D).
    Plane d has a at d and b at d + D/2, which become a cos - b sin and b cos + a sin. So the dot
    product of a query at t and a key at s depends on t - s alone: the point of the rotation."""
    swapped = x.roll(x.shape[-1] // 2, -1)                              # b at d, a at d + D/2
    return torch.addcmul(x * cos, swapped, sin)                         # sin has its minus at d

def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)         # (B, T, H D) -> (B, H, T, D)

def extend_cache(past, k, v):
    """Append keys and values (B, H, T, D) to a layer's cache, [] at first; None keeps nothing."""
    if past:                                            # (B, H, earlier + T, D)
        k = torch.cat([past[0], k], 2)
        v = torch.cat([past[1], v], 2)
    if past is not None:
        past[:] = [k, v]
    return k, v

class LlamaAttention(nn.Module):
    """Let each position look at itself and at those before it: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        narrow = C // self.heads * self.kv_heads
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, narrow, bias=False)
        self.v_proj = nn.Linear(C, narrow, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, cos, sin, past, mask):
        q = rotate(split_heads(self.q_proj(x), self.heads), cos, sin)               # what t asks
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), cos, sin)            # what s offers
        k, v = extend_cache(past, k, split_heads(self.v_proj(x), self.kv_heads))
        grouped = self.kv_heads != self.heads                           # query heads share keys
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                           enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))                            # (B, T, C)

class LlamaMLP(nn.Module):
    """SwiGLU at each position: a gate scales the inner values one by one. (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class LlamaBlock(nn.Module):
    """Add attention and feed-forward network, each after a norm, to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin, past, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past, mask)   # between positions
        return x + self.mlp(self.post_attention_layernorm(x))                   # at each position

class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases."""

    prefix = "model."               # before the names of all but the head, on disk

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)

    @property
    def head(self):
        return (self.lm_head or self.embed_tokens).weight               # (V, C)

    def hidden(self, ids, cache=None, tree=None):
        """(B, T) -> (B, T, C). `tree` replaces positions 0, 1, ... and the causal mask. With a
        `cache` (a list per layer) that earlier calls have filled, a `tree` is needed, too."""
        positions = tree.depth if tree else torch.arange(ids.shape[1], device=ids.device)
        D = self.config.width // self.config.heads
        angles = rotary_angles(positions, D, self.config.rope_theta)
        x = self.embed_tokens(ids)                                          # (B, T, C)
        cos, sin = (angle.to(x.dtype) for angle in angles)
        for layer, past in zip(self.layers, cache or [None] * len(self.layers)):
            x = layer(x, cos, sin, past, tree.sees if tree else None)
        return self.norm(x)

    forward = hidden                # model(ids), as torch's modules are called

# 4. Divergences --------------------------------------------------------------
#
# u, v (n, V)  ->  the divergence f of each row, and its gradient with respect to u (n, V)
#
#     z, w   logits of student and teacher          q, p   softmax(u) and softmax(v)
#     u, v   z / tau and w / tau                    r      log q - log p            k   df/dq
#
# Every gradient comes from one line, for any f(q). (Here q, k, v are not those of attention.)
#
#     df/du_j = sum_i k_i dq_i/du_j = sum_i k_i q_i ([i = j] - q_j) = q_j (k_j - sum_i q_i k_i)
#
# In words: a token's q times (its k minus the q-weighted mean of k). So a constant added to k
# changes nothing. [i = j] is 1 if i is j, else 0.
#
#     reverse KL   f = sum q (log q - log p)   k = r + 1    gradient q (r - KL)
#     forward KL   f = sum p (log p - log q)   k = -p / q   gradient q - p, since sum q k = -1
#
# A step goes against the gradient. Four tokens; tau is 1, the student lacks "cat", invents "of":
#
#                                     dog     cat     car      of
#     teacher p                      .500    .400    .090    .010
#     student q                      .880    .010    .010    .100
#     r = log q - log p              .565  -3.689  -2.197   2.303
#     forward KL 1.368, q - p        .380   -.390   -.080    .090    most: raise "cat", lower "dog"
#     reverse KL  .669, q (r - KL)  -.091   -.044   -.029    .163    most: lower "of"
#
# Forward KL repairs what the student misses, reverse KL what it invents. ("dog" is too likely, but
# its r is below the KL, so it rises.) In time both reach q = p if they can; but the factor q keeps
# reverse KL from reviving what the student has dropped (-.001 at p .4, q .0001; forward KL -.4).

def kl(log_a, log_b):
    """KL(a || b) = sum a log(a / b) of each row: (n, V), (n, V) -> (n,)"""
    return (log_a.exp() * (log_a - log_b)).sum(-1)

def mixture(log_a, log_b, share):
    """log(share a + (1 - share) b): (n, V), (n, V) -> (n, V)"""
    return (share * log_a.exp() + (1 - share) * log_b.exp()).log()

def likely_share(q, p, mu):
    """Return the share of sum |p - q| that falls on the teacher's likely tokens: (n, 1).

    The likely tokens, one at least, are the fewest whose p sums to mu, as in top-p sampling; what
    ties with the last is likely, too. The AKL paper calls them its "head" (Eqs. 11 to 14); in its
    released code the token with which the sum reaches mu is left out, unless it is the first."""
    # Sort, rising. Tokens under (1 - mu) / V are not likely: in all they hold under 1 - mu, so the
    # others reach mu. So we raise them to that bound: equals sort fast. On a CPU NumPy is faster.
    V = p.shape[1]
    rising = p.clamp(min=(1 - mu) / V)
    if p.is_cuda:
        rising = rising.sort(-1)[0]
    else:
        rising.numpy().sort(-1)                 # in place: it is the tensor's own memory
    mass = rising.cumsum(-1)
    unlikely = torch.searchsorted(mass, mass[:, -1:] - mu, right=True)  # the others hold >= mu
    least = rising.gather(1, unlikely.clamp_(max=V - 1))                # p of the last likely one
    gap = (p - q).abs()
    total = gap.sum(-1, True)
    mask = torch.ge(p, least, out=rising)                               # faster than a bool mask
    likely = gap.mul_(mask).sum(-1, True)
    return torch.where(total > 0, likely / total, 0.5)                  # equal models: one half

def both_ways(log_q, log_p, _, weight):
    """weight KL(p || q) + (1 - weight) KL(q || p); weight is a number or (n,)."""
    return weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)

def adaptive(log_q, log_p, targets, mu, swapped=False):
    """Weigh forward KL by likely_share, held constant, and reverse KL by the rest (AKL paper, Eq.
    15; swapped, Eq. 16): they say forward KL fits likely tokens first, reverse KL the others."""
    q = log_q.detach().exp()
    p = log_p.exp()
    share = likely_share(q, p, mu)[:, 0]
    return both_ways(log_q, log_p, targets, 1 - share if swapped else share)

def jensen_shannon(log_q, log_p, _, share):
    """share KL(p || m) + (1 - share) KL(q || m), m = share p + (1 - share) q (GKD, Agarwal et al.
    2024). It goes to 0 as the share goes to 0 or 1; other programs use a plain KL there."""
    m = mixture(log_p, log_q, share)
    return share * kl(log_p, m) + (1 - share) * kl(log_q, m)

def target_apart(log_q, log_p, targets, gamma):
    """Reverse KL of (target, rest), plus gamma times that within the rest (arXiv 2604.00223).
    In plain reverse KL gamma is 1 - q_target: nearly 0 for a student that is sure of the target."""
    def split(log_x):
        rest = log_x.scatter(1, targets, -1e9)                          # the target has no part
        log_total = rest.logsumexp(-1, True)
        return torch.cat([log_x.gather(1, targets), log_total], 1), rest - log_total
    two_q, rest_q = split(log_q)
    two_p, rest_p = split(log_p)
    return kl(two_q, two_p) + gamma * kl(rest_q, rest_p)

def token_wise(log_q, log_p, _):
    """sum s p log(p / q) + (1 - s) q log(q / p), s = p / (p + q) fixed (ToDi, Jung et al. 2025)"""
    gap = log_p - log_q
    share = gap.detach().sigmoid()              # constant: the value is fkl + rkl, its gradient not
    return (gap * (share * log_p.exp() - (1 - share) * log_q.exp())).sum(-1)

def alpha_beta(log_q, log_p, _, a, b):
    """((a sum p^(a+b) + b sum q^(a+b)) / (a+b) - sum p^a q^b) / (a b) (ABKD, Wang et al. 2025).
    Forward KL for a = 1, b -> 0, reverse KL for a -> 0, b = 1, 4 Hellinger^2 for a = b = 1/2."""
    powers = a * ((a + b) * log_p).exp() + b * ((a + b) * log_q).exp()
    return (powers / (a + b) - (a * log_p + b * log_q).exp()).sum(-1) / (a * b)

# Every divergence by its definition, a function of log q, log p (n, V), targets (n, 1), constants
# -> (n,), and the settings that are its constants. To add one, add a line.
DIVERGENCES = {
    "fkl": [lambda log_q, log_p, _: kl(log_p, log_q)],
    "rkl": [lambda log_q, log_p, _: kl(log_q, log_p)],
    "fkl+rkl": [both_ways, "fkl_weight"],
    "alternate": [both_ways, "fkl_weight"],         # training sets it to 1, 0, 1, ... by step
    "akl": [adaptive, "mu"],
    "akl-r": [functools.partial(adaptive, swapped=True), "mu"],
    "skl": [lambda log_q, log_p, _, skew: kl(log_p, mixture(log_p, log_q, skew)), "skew"],
    "srkl": [lambda log_q, log_p, _, skew: kl(log_q, mixture(log_q, log_p, skew)), "skew"],
    "jsd": [jensen_shannon, "jsd_beta"],
    "drkl": [target_apart, "gamma"],
    "tvd": [lambda log_q, log_p, _: (log_p.exp() - log_q.exp()).relu().sum(-1)],   # half of |p - q|
    "todi": [token_wise],
    "ab": [alpha_beta, "ab_alpha", "ab_beta"],
}

def by_autograd(definition, u, v, targets, *constants):
    """Return value (n, 1) and gradient with respect to u (n, V) of a definition, by autograd."""
    with torch.enable_grad():
        u = u.detach().double().requires_grad_()        # float64: errors near 1e-15
        log_q = u.log_softmax(-1)
        log_p = v.double().log_softmax(-1).clamp(min=-700)      # exp(-700) > 0
        value = definition(log_q, log_p, targets, *constants)
        gradient, = torch.autograd.grad(value.sum(), u)
    return value.detach()[:, None], gradient

# Now the fast way: five of them with their gradients written out, in place and in fp32.

def to_probabilities(u, v):
    """Return q, p, r (n, V) and c (n, 1): from here on, log q - log p is r + c, not r alone. v is
    overwritten; rows of u and v must have 0 as maximum. r is at most 87 (exp(-87) is near fp32's
    least normal number): what the teacher rules out costs reverse KL much, not infinitely much."""
    r = (u - v).clamp_(max=-math.log(torch.finfo(u.dtype).tiny))
    q = u.exp()
    q_scale = 1 / q.sum(-1, True)
    p_scale = 1 / v.exp_().sum(-1, True)
    # log q - log p = u - v + log(sum exp v / sum exp u): no gradient needs the last term, c
    c = (q_scale.double() / p_scale).log_()
    return q.mul_(q_scale), v.mul_(p_scale), r, c

def softmax_backward_(q, k):
    """Overwrite k = df/dq with df/du = q (k - sum q k); return sum q k (n, 1) and df/du (n, V)."""
    gradient = k.mul_(q)
    mean = gradient.sum(-1, True)
    gradient.addcmul_(q, mean, value=-1)                # q k - q mean
    # An exact gradient sums to 0. Where the student is nearly sure and the teacher is not, it is so
    # small that rounding dominates: subtracting q times the sum repairs that.
    return mean, gradient.addcmul_(q, gradient.sum(-1, True), value=-1)

# A closed form may overwrite q, p and r. In fp32 the rows of q and p do not sum to 1 exactly, and a
# KL is off by as much. So we compute the generalised KL(a || b) = sum a log(a / b) - sum a + sum b,
# whose last two terms cancel but for that error: they are the sums of q - p and p - q below.

def forward_kl(q, p, r, c):
    """KL(p || q) = sum p (log p - log q), with gradient q - p (AKL paper, Eq. 5)."""
    value = -r.mul_(p).sum(-1, True)
    gradient = torch.sub(q, p, out=r)                   # in r's memory
    return value - c + gradient.sum(-1, True), gradient

def reverse_kl(q, p, r, c):
    """KL(q || p) = sum q (r + c), with gradient q (r + c - KL) (AKL paper, Eq. 6). On given text
    MiniLLM's and the paper's "single-step decomposition", E_q[r grad log q], is the same."""
    value, gradient = softmax_backward_(q, r)
    return value + c + p.sub_(q).sum(-1, True), gradient

def forward_and_reverse_kl(q, p, r, c, weight):
    """weight FKL + (1 - weight) RKL (AKL paper, appendix C); weight is a number or (n, 1)."""
    forward = -(p * r).sum(-1, True)
    reverse, gradient = softmax_backward_(q, r)
    slope = torch.sub(q, p, out=p)                      # forward KL's gradient
    c = c - slope.sum(-1, True)                         # a sum of 0, but for rounding
    value = weight * (forward - c) + (1 - weight) * (reverse + c)
    return value, gradient.lerp_(slope, weight)         # (1 - weight) gradient + weight slope

def adaptive_kl(q, p, r, c, mu):
    """likely_share FKL + (1 - likely_share) RKL, row by row (AKL paper, Eq. 15)."""
    return forward_and_reverse_kl(q, p, r, c, likely_share(q, p, mu))

CLOSED_FORMS = {"fkl": forward_kl, "rkl": reverse_kl, "fkl+rkl": forward_and_reverse_kl,
                "alternate": forward_and_reverse_kl, "akl": adaptive_kl}

# 5. The fused loss -----------------------------------------------------------
#
# student hidden (N, C), head (V, C), teacher hidden (N, C'), head (V, C'), targets (N,)
#   ->  loss, cross-entropy and tau^2 divergence, summed over the N tokens
#
# Forward makes both models' logits for n rows at a time; the student's become d_z, the loss's
# gradient with respect to z, which is multiplied back at once: only d_hidden and d_head are kept.
#
#   hidden (N, C)         head (V, C)       plain_loss, 4,096 x 16,000: 8 arrays of 262 MB at once
#      | n rows              |              FusedLoss (rkl), 14 chunks of 293 rows: 2 or 3 of 19 MB
#      v                     v
#   h (n, C) --- @ head.T / tau --> u (n, V) --- with v, and targets ------------> d_z, same memory
#                                                                                   |           |
#          d_hidden's n rows (n, C) <--- d_z @ head --------------------------------+           |
#          d_head (V, C) += d_z.T @ h <---------------------------------------------------------+
#
# A row's softmax needs no other row, and a sum's gradient is the sum of the gradients: so chunks
# change only the rounding. The paper's "step-wise loss", if a sum, is a chunk of 5 rows.

def loss_weights(settings):
    """Return the weights of cross-entropy and of tau^2 times divergence (Eq. 9)."""
    if settings.objective not in DIVERGENCES:
        return 1.0, 0.0
    # <- differs (3): BabyLlama divides the divergence by B, and cross-entropy by B * T.
    times = settings.context if settings.reduction == "batchmean" else 1
    return settings.alpha, (1 - settings.alpha) * times

def gradient_of_logits(z, w, targets, tau, alpha):
    """Differentiate plain_loss by hand, with respect to z: (N, V).
    Below, divergence_ and logits_to_gradient_ do this, in place, and with the other objectives."""
    log_q = (z / tau).log_softmax(-1)
    r = log_q - (w / tau).log_softmax(-1)
    q = log_q.exp()
    value = (q * r).sum(-1, keepdim=True)
    d_ce = z.softmax(-1) - F.one_hot(targets, z.shape[1])
    d_kl = tau * q * (r - value)            # tau^2 dKL/du du/dz, and du/dz = 1 / tau
    return alpha * d_ce + (1 - alpha) * d_kl

def divergence_(settings, beta, u, v, targets):
    """Return the objective's divergence (n, 1) and its gradient with respect to u (n, V).

    u's rows must have maximum 0; v is overwritten. "Mixing outputs" (Eq. 2) replaces v by beta v +
    (1 - beta) u. <- differs (4): this u gets no gradient. Now r is beta (z - w) / tau + a number
    that drops out, so reverse KL's gradient q (r - KL) is beta times the unmixed one: beta only
    weighs it, by epoch in Eq. 3. Its value, quadratic in r near q = p, is about beta^2 times: don't
    compare `kl` of mixed and unmixed runs. For forward KL both hold only near q = p."""
    definition, *names = DIVERGENCES[settings.objective]
    constants = [getattr(settings, name) for name in names]
    if beta < 1:
        v.mul_(beta).add_(u, alpha=1 - beta)                                        # Eq. 2
    v.sub_(v.amax(-1, True))                    # both now have 0 as maximum
    if settings.objective not in CLOSED_FORMS:
        value, gradient = by_autograd(definition, u, v, targets, *constants)
        return value, gradient.to(u.dtype)
    return CLOSED_FORMS[settings.objective](*to_probabilities(u, v), *constants)

def logits_to_gradient_(settings, beta, u, v, targets):
    """Overwrite u = z / tau (n, V) with the loss's gradient with respect to z, and return (n, 2):
    cross-entropy, tau^2 divergence. v is w / tau or None; it may be overwritten. targets (n, 1)."""
    ce_weight, kl_weight = loss_weights(settings)
    tau = 1.0 if v is None else settings.temperature
    exact = torch.promote_types(u.dtype, torch.float32)
    at_target = u.gather(1, targets)
    logits = u.to(exact)                                # a copy if u is in half, else u
    top = logits.amax(-1, True)
    logits.sub_(top)                                    # a constant changes no softmax
    value = torch.zeros_like(top)
    gradient = value.expand_as(logits)                  # zeros, without memory
    if v is not None:
        value, gradient = divergence_(settings, beta, logits, v.to(exact), targets)
        if kl_weight * tau != 1:                        # 1 by default: a pass saved
            gradient.mul_(kl_weight * tau)              # tau^2 dDiv/du du/dz, as above
    # Cross-entropy has no temperature: softmax(z) - onehot = (exp_z - total onehot) / total.
    exp_z = logits.mul_(tau).exp_()
    total = exp_z.sum(-1, True)
    if u.is_cuda:                                       # compiled, a mask costs no pass
        exp_z = exp_z - total * (torch.arange(u.shape[1], device=u.device) == targets)
    else:
        exp_z.scatter_add_(1, targets, -total)
    torch.addcmul(gradient, exp_z, ce_weight / total, out=u)
    ce = total.log_().double() + tau * (top.double() - at_target)       # log sum exp z - z_target
    return torch.cat([ce, tau**2 * value.double()], 1)

BLOCK = 2**17       # logits that a core does at once, so that they fit its cache (a GPU: 64 times)
CHUNK = {"cpu": 304, "cuda": 2048}      # rows of logits at once: more cost memory and save little

@functools.cache
def compiled(function):
    """Compile a function: its elementwise operations are fused into one or two passes."""
    torch._dynamo.config.recompile_limit = 99   # anew for each beta: so not if each step has one
    # let each pass compute its exponentials anew: writing and reading them took longer
    anew = {"realize_reads_threshold": 999, "realize_opcount_threshold": 999}
    return torch.compile(function, dynamic=False, options={"online_softmax": False, **anew})

def chunk_to_gradient_(settings, beta, u, v, targets):
    """Do as logits_to_gradient_, by blocks for a core's cache; closed forms on a GPU compiled."""
    closed = v is None or settings.objective in CLOSED_FORMS
    if closed and u.is_cuda and settings.compile and settings.beta_by == "epoch":
        return compiled(logits_to_gradient_)(settings, beta, u, v, targets)
    size = u.shape[1] * (1 if closed else 2)                            # by_autograd has float64
    block = max(1, BLOCK * (64 if u.is_cuda else torch.get_num_threads()) // size)
    v_blocks = itertools.repeat(None) if v is None else v.split(block)
    blocks = zip(u.split(block), v_blocks, targets.split(block))
    return torch.cat([logits_to_gradient_(settings, beta, *each) for each in blocks])

def logits_into(memory, hidden, head, tau):
    """Return hidden @ head.T / tau, (n, V), in memory that is used again and again."""
    logits = memory[:len(hidden)]
    return torch.addmm(logits, hidden, head.T, beta=0, alpha=1 / tau, out=logits)

class FusedLoss(torch.autograd.Function):
    """Cross-entropy and divergence of N tokens; forward makes the gradients too, by chunks of rows.

    With logits z of the student (held constant in p) and w of the teacher (Eqs. 1, 2 and 6 to 9),

        q = softmax(z / tau)     p = softmax((beta w + (1 - beta) z) / tau)
        loss = sum over tokens of  alpha CE(z, target) + (1 - alpha) tau^2 Div(q, p)"""

    @staticmethod
    def forward(ctx, hidden, head, targets, teacher_hidden, teacher_head, settings, beta):
        """Return sums over the N tokens: the loss, and (2,) cross-entropy and tau^2 divergence.
        Without a divergence the teacher may be None. A target below 0 leaves its row out. Matmuls
        are in hidden's dtype, or autocast's; softmaxes and sums are in fp32 or better."""
        N, V, kind = len(hidden), len(head), hidden.device.type
        exact = torch.promote_types(hidden.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        chunks = math.ceil(N / (settings.chunk or CHUNK[kind])) or 1
        n = math.ceil(N / chunks) or 1                          # equal chunks, the last shorter
        distilled = settings.objective in DIVERGENCES
        u_memory = hidden.new_empty(n, V, dtype=dtype)
        tau = settings.temperature if distilled else 1.0
        if distilled:
            v_memory = torch.empty_like(u_memory)
            teacher_head = teacher_head.to(dtype)
        parts = hidden.new_zeros(2, dtype=torch.float64)
        d_hidden = torch.zeros_like(hidden, dtype=exact)
        d_head = torch.zeros_like(head, dtype=exact)
        head = head.to(dtype)
        for i in range(0, N, n):
            rows = slice(i, i + n)                              # 1. make this chunk's logits / tau
            h = hidden[rows].to(dtype)
            target = targets[rows, None]
            keep = target >= 0
            target = target.clamp(min=0)
            u = logits_into(u_memory, h, head, tau)
            v = None
            if distilled:
                v = logits_into(v_memory, teacher_hidden[rows].to(dtype), teacher_head, tau)
            values = chunk_to_gradient_(settings, beta, u, v, target)           # 2. u is now d_z
            parts += (values * keep).sum(0)
            d_hidden[rows] = (u @ head).mul_(keep)              # 3. multiply it back
            if dtype == exact:
                d_head.addmm_(u.T, h * keep)
            else:                                               # products in half, added in fp32
                d_head += u.T @ (h * keep)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(parts)
        ce_weight, kl_weight = loss_weights(settings)           # not divided by N: see backward
        return (ce_weight * parts[0] + kl_weight * parts[1]).to(exact), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        """Multiply the gradients by d_loss, the caller's 1 / tokens (and fp16's scale).
        If 1 / tokens came before the matmuls, most unscaled fp16 gradients would round to 0."""
        gradients = [each * d_loss for each in ctx.saved_tensors]
        return *gradients, *[None] * 5

class Coach:
    """Join one or more teachers. BabyLlama averages their logits, so p is the geometric mean of
    theirs, normalised. With hidden states and heads side by side, one product is the mean, too:
    [h1 h2] @ [head1 head2].T / 2 = (h1 @ head1.T + h2 @ head2.T) / 2."""

    def __init__(self, teachers, dtype=None, V=None):
        with torch.no_grad():       # the first V rows: some vocabularies are padded behind them
            joined = torch.cat([teacher.head[:V] for teacher in teachers], dim=1)       # (V, C')
            self.head = joined / len(teachers)
        self.teachers = [teacher.to(dtype) for teacher in teachers]     # not trained

    @torch.no_grad()
    def hidden(self, ids):
        """(B, T) -> (B, T, C'), C' the sum of the teachers' widths"""
        return torch.cat([teacher(ids) for teacher in self.teachers], dim=-1)

# 6. Schedules and one step ---------------------------------------------------

def lr_at(step, steps, settings):
    """Return the learning rate of a step, of `steps` in all. <- differs (5): the paper's cosine has
    T_max = 500: if that counts steps, it goes down and up again every 1,000 steps."""
    if step < settings.warmup:                                  # a line up to the peak
        return settings.lr * (step + 1) / (settings.warmup + 1)
    half = settings.t_max or max(1, steps - settings.warmup)    # then a cosine down to 0
    done = (step - settings.warmup) / half
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))

def beta_at(step, steps, per_epoch, settings):
    """Return the teacher's share of the mixed logits, moving from beta towards beta_end (Eq. 3)."""
    if settings.beta_end < 0:                                   # it stays
        return settings.beta
    length = per_epoch if settings.beta_by == "epoch" else 1
    done = (step // length) / math.ceil(steps / length)         # from 0, so always below 1
    moved = (1 - done) * settings.beta + done * settings.beta_end
    return max(0.1, moved)                                      # the paper's bound

def make_optimizer(model, settings):
    """Make AdamW over all parameters, with weight decay for the matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.lr, (0.9, settings.beta2), fused=True,
                             weight_decay=settings.weight_decay, capturable=model.head.is_cuda)

def train_step(model, optimizer, coach, inputs, targets, settings, beta, dtype, scaler):
    """Take one optimizer step on inputs and targets (B, T), or on this process's share of the rows.
    Returns (4,): loss, cross-entropy, tau^2 divergence, norm of the gradient. Each micro-batch's
    loss is divided by the targets of the whole step, so a split changes only rounding and dropout.
    In fp16 the scaler keeps gradients in range, and skips a step where one overflowed."""
    device = inputs.device.type
    rows = settings.micro_batch or len(inputs)
    shared = dist.is_initialized()              # torchrun started several processes
    tokens = (targets >= 0).sum()
    if shared:
        dist.all_reduce(tokens)
    losses = inputs.new_zeros(3, dtype=torch.float64)
    optimizer.zero_grad()
    for ids, target in zip(inputs.split(rows), targets.split(rows)):
        teacher_hidden = coach.hidden(ids).flatten(0, 1) if coach else None     # (N, C'), own dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            hidden = model(ids).flatten(0, 1)                                       # (N, C)
            loss, parts = FusedLoss.apply(
                hidden, model.head, target.flatten(), teacher_hidden,
                coach.head if coach else None, settings, beta)
        scaler.scale(loss / tokens).backward()
        losses += torch.cat([loss.detach().double()[None], parts]) / tokens
    if shared:                                  # the sum over processes, gradients as one vector
        gradients = [parameter.grad for parameter in model.parameters()]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        dist.all_reduce(losses)
        nn.utils.vector_to_parameters(flat, gradients)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    return torch.cat([losses, norm.double()[None]])

# 7. Minimal pairs ------------------------------------------------------------
#
# two sentences that differ in one point of grammar: does the model find the good one likelier?
#
# The rule is that of the BabyLM 2024 pipeline and of lm-evaluation-harness. A text's score is the
# sum of its tokens' log-probabilities, each given all before it, from <s> on (EWoK: from a context,
# no <s>). A sentence has a leading space. A tie counts for the good one. A pair, by one tiny run:
#
#     The donkey with the pigs jumps.   -22.60 nats      right, by 2.79 nats,
#     The donkey with the pigs jump.    -25.39 nats      though "pigs" is next to the verb

class Pair(NamedTuple):
    good: tuple                     # what is given, and what is scored after it
    bad: tuple
    paradigm: str
    phenomenon: str
    line: int                       # in its file

def encode_pairs(vocabulary, pairs, positions, rule="2024"):
    """Return a dict of each text's ids and how many are given, and the pairs that can be scored."""
    # As in the harness, context and target are encoded as one text; spaces that end the context are
    # scored. By the rule of 2026 special tokens are added, and a text's first token is not scored.
    texts = dict.fromkeys(text for pair in pairs for text in (pair.good, pair.bad))     # distinct
    given = [text[0].rstrip() for text in texts]
    whole = ["".join(text) for text in texts]
    encode_batch = vocabulary.tokenizer.encode_batch_fast
    encoded = zip(texts, encode_batch(whole, add_special_tokens=rule == "2026"),
                  encode_batch(given, add_special_tokens=False))
    lines = {}
    for text, line, start in encoded:
        ids, known = line.ids, len(start.ids)
        if not text[0]:             # no context but <s>, or 2026's first token
            known = 1
            ids = [vocabulary.prefix_id, *ids] if rule == "2024" else ids
        if 0 < known < len(ids) <= positions + 1:   # the last token is only predicted
            lines[text] = ids, known
    kept = [pair for pair in pairs if pair.good in lines and pair.bad in lines]
    if kept != pairs:
        echo(f"{len(pairs) - len(kept):,} of {len(pairs):,} pairs are left out: a text has more "
             f"tokens than the model's {positions} positions, or none to score.", err=True)
    return lines, kept

class Trie:
    """Texts as one tree of ids, a row for the model: what neighbours begin alike is there once.

    A node sees itself and what is above it, so its hidden state is that of its text alone. Nodes
    are in the order in which the sorted texts reach them: the descendants of node i are the nodes
    i + 1, ..., end[i] - 1. A text's last id is only predicted, so it needs no node. Three texts,
    "<s> A cat ran", "<s> A dog barked" and "<s> A dog ran":

        node      0    1    2    3           sees   <s>  A   cat  dog
        id       <s>   A   cat  dog          <s>     x   .    .    .
        depth     0    1    2    2           A       x   x    .    .
        end       4    4    3    4           cat     x   x    x    .
                                             dog     x   x    .    x

    A text's score is the sum of its edges, each the log-probability of an id after a node: the
    first scores (0, A) + (1, cat) + (2, ran), the second (0, A) + (1, dog) + (3, barked). Four ids
    go through the model in place of nine, and six edges are asked for in place of nine."""

    def __init__(self):
        self.ids, self.depth, self.end = [], [], []
        self.path = []                          # the nodes from the root to the newest one
        self.edges = {}                         # (node, next id): the edge's number
        self.sequences = {}                     # a text: the numbers of its edges

    def common_prefix(self, ids):
        """Count the ids that a text has in common with the newest path."""
        count = 0
        for node, i in zip(self.path, ids[:-1]):
            if self.ids[node] != i:
                break
            count += 1
        return count

    def add(self, key, ids, known):
        """Add a text, of which the first `known` ids are given and not scored."""
        start = self.common_prefix(ids)
        del self.path[start:]
        for depth in range(start, len(ids) - 1):        # the ids that are new here
            self.path.append(len(self.ids))
            self.ids.append(ids[depth])
            self.depth.append(depth)
            self.end.append(0)
        for node in self.path:                          # these, and all above them, now end here
            self.end[node] = len(self.ids)
        edges = zip(self.path[known - 1:], ids[known:])     # the last given id predicts the next
        self.sequences[key] = [self.edges.setdefault(edge, len(self.edges)) for edge in edges]

NODES = 128         # in a row: longer ones share more, but their attention costs more (measured)

def build_tries(lines):
    """Pack the texts of encode_pairs into tries of up to NODES nodes, or of one longer text."""
    tries = [Trie()]
    for text, (ids, known) in sorted(lines.items(), key=lambda line: line[1]):
        new = len(ids) - 1 - tries[-1].common_prefix(ids)
        if len(tries[-1].ids) + new > NODES and tries[-1].ids:          # full: begin another
            tries.append(Trie())
        tries[-1].add(text, ids, known)
    return tries

@torch.no_grad()
def token_log_probabilities(hidden, head, rows, targets):
    """Return log softmax(hidden[row] @ head.T)[target] of E rows, targets: (N, C), (E,) -> (E,)"""
    chunk = CHUNK[hidden.device.type]
    scores = torch.empty_like(targets, dtype=torch.float64)         # for exact sums
    for i in range(0, len(hidden), chunk):
        logits = hidden[i:i + chunk] @ head.T                                       # (n, V)
        log_total = logits.logsumexp(-1)
        here = (i <= rows) & (rows < i + chunk)                 # which of the E are in this chunk
        row = rows[here] - i
        scores[here] = (logits[row, targets[here]] - log_total[row]).double()
    return scores

def score_tries(model, tries):
    """Return the log-probability of each edge of each trie; all go through at once, a row each."""
    device = model.head.device
    pad = nn.utils.rnn.pad_sequence
    # Pad the tries. Node i sees node j if it is node j or a descendant of node j.
    ids, depth, end = (pad([torch.tensor(getattr(trie, name)) for trie in tries], True)
                       for name in ("ids", "depth", "end"))                             # (B, T)
    _, T = ids.shape
    j = torch.arange(T)
    i = j[:, None]
    below = (j <= i) & (i < end[:, None])                                               # (B, T, T)
    sees = below | torch.eye(T, dtype=torch.bool)       # padding sees itself: no softmax is empty
    tree = Tree(depth.to(device), sees[:, None].to(device))
    hidden = model.hidden(ids.to(device), tree=tree).flatten(0, 1)                      # (B * T, C)
    edges = [(b * T + i, target) for b, trie in enumerate(tries) for i, target in trie.edges]
    rows, targets = torch.tensor(edges, device=device).T
    scores = token_log_probabilities(hidden, model.head, rows, targets).cpu()
    sizes = [len(trie.edges) for trie in tries]
    return [each.numpy() for each in scores.split(sizes)]

@torch.inference_mode()
def score_pairs(model, vocabulary, pairs, name, rule="2024"):
    """Return the pairs that can be scored, and their good and bad log-probabilities: (pairs, 2)."""
    lines, pairs = encode_pairs(vocabulary, pairs, model.config.positions, rule)
    need(pairs, f"{name}: expected pairs that the model can score.")
    tries = sorted(build_tries(lines), key=lambda trie: len(trie.ids))
    nodes = 2**15 if model.head.is_cuda else 1024           # more falls out of a CPU's cache
    totals = {}                                             # equal texts are scored once: they tie
    with tqdm(total=len(lines), desc=name, unit=" texts", leave=False) as bar:
        while tries:                                                            # the longest first
            rows = max(1, nodes // len(tries[-1].ids))
            batch, tries = tries[-rows:], tries[:-rows]
            for trie, scores in zip(batch, score_tries(model, batch)):
                for text, edges in trie.sequences.items():
                    totals[text] = scores[edges].sum()
                bar.update(len(trie.sequences))
    scores = np.array([[totals[text] for text in pair[:2]] for pair in pairs])
    need(np.isfinite(scores).all(), f"{name}: scores are not finite: was --lr too high?")
    return pairs, scores

# Here the lesson ends. What follows makes a tool of it, and needs no reading.

# 8. Files and settings -------------------------------------------------------

@contextlib.contextmanager
def reading(path):
    """Turn whatever a damaged file raises inside into one sentence that names the file."""
    try:
        yield
    except (MemoryError, ClickException):
        raise
    except Exception as error:                      # a damaged file fails in a hundred ways
        if getattr(error, "filename", None):
            raise                                   # it cannot be opened at all
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise ClickException(f"{path} is damaged: {reason or 'it ends too early'}: "
                             "correct it, or remove it.")

@contextlib.contextmanager
def written_whole(path):
    """Open a binary file to write; `path` appears complete and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".choobaca-{os.getpid()}-{path.name}")    # each writer has its own
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

def write_file(path, content):
    with written_whole(path) as file:
        file.write(content)

def write_json(path, value):
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())

def read_json(path):
    with reading(path):
        value = json.loads(path.read_bytes())
        need(isinstance(value, dict), f"{path} holds a {type(value).__name__}: expected an object.")
        return value

def digest(*contents):
    """Return the SHA-256 of byte strings and of their lengths: ("ab", "c") is not ("a", "bc")."""
    total = hashlib.sha256()
    for content in contents:
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()

def file_digest(path, kind="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()

def weights_digests(folder):
    names = ("config.json", "*token*.json", "*.safetensors*")
    return {path.name: file_digest(path) for name in names for path in sorted(folder.glob(name))}

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

@dataclass(frozen=True)
class Settings:
    """All settings of a run. By default the model is the paper's student of 58M parameters."""
    text: str = setting(f"{TINY}", "File or folder of text: *.train, *.txt; UTF-8.", path=True)
    dev: str = setting("", "Held-out file or folder of *.dev, dev.txt; empty: --text's.", path=True)
    tokenizer: str = setting("", "A tokenizer.json or its folder; empty: train one.", path=True)
    vocab_size: int = setting(16_000, "V of a tokenizer that is trained.", low=259, high=2**24)
    prefix: str = setting("line", "Before a line: <s> and a space, or nothing.", ("line", "none"))
    context: int = setting(128, "T, the tokens of a row.", low=1)
    batch_size: int = setting(32, "B, the rows of an optimizer step.", low=1)
    random_offset: bool = setting(True, "Shift each row by 0 to T - 1 tokens, anew each epoch.")
    seed: int = setting(0, "Seed of the weights, the order of the rows and dropout.")
    init: str = setting("", "Begin with the weights and shape of a run or HF folder.", path=True)
    model_type: str = setting("llama", "Architecture.", ("llama", "gpt2"))
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
    epochs: int = setting(6, "Passes over the text.", low=1)
    steps: int = setting(0, "Optimizer steps (a teacher's own come first); 0: as epochs say.")
    lr: float = setting(2.5e-4, "Peak learning rate.")
    warmup: int = setting(200, "Steps in which the learning rate rises to its peak.")
    t_max: int = setting(0, "PyTorch's T_max, half a period of the cosine; 0: down to the end.")
    weight_decay: float = setting(0.01, "Decay of matrices; vectors have none.")
    beta2: float = setting(0.999, "AdamW's memory of the squared gradient.", high=0.99999)
    clip: float = setting(1.0, "Longest gradient, as a norm over all weights; 0: any length.")
    keep: str = setting("last", "Weights of the last step, or of least dev loss.", ("last", "best"))
    # what the student is asked to do (the paper's Eqs. 1, 2, 3 and 9)
    objective: str = setting("ce", "Cross-entropy, or with a divergence.", ("ce", *DIVERGENCES))
    temperature: float = setting(2.0, "tau, which divides logits (Eqs. 6, 7).", low=0.5, high=1000)
    alpha: float = setting(0.5, "Weight of cross-entropy; the rest is divergence (Eq. 9).", high=1)
    beta: float = setting(1.0, "Teacher's share of the mixed logits (Eq. 2); 1: no mixing.", high=1)
    beta_end: float = setting(-1.0, "Beta's goal, kept >= 0.1; -1: it stays.", low=-1, high=1)
    beta_by: str = setting("epoch", "Move it each epoch (Eq. 3), or each step.", ("epoch", "step"))
    reduction: str = setting("token", "Divergence: mean, or sum of a row.", ("token", "batchmean"))
    fkl_weight: float = setting(0.5, "Share of forward KL in fkl+rkl.", high=1)
    mu: float = setting(0.5, "Teacher's mass in akl's and akl-r's likely tokens.", high=0.999)
    skew: float = setting(0.1, "Share of p (skl) or q (srkl) mixed in.", low=1e-3, high=0.999)
    jsd_beta: float = setting(0.5, "Share of the teacher in jsd's mixture.", low=1e-3, high=0.999)
    ab_alpha: float = setting(0.5, "ab's a, the power of p.", low=1e-6)
    ab_beta: float = setting(0.5, "ab's b, the power of q.", low=1e-6)
    gamma: float = setting(0.5, "Weight of the rest in drkl.", low=1e-3, high=1e3)
    # how a run is carried out, which changes little but the rounding
    teachers: int = setting(0, "How many of the config's teachers to learn from.", high=2)
    teacher_steps: int = setting(0, "Steps of each teacher; 0: as its [[teacher]] says.")
    device: str = setting("auto", "Where to compute.", ("auto", "cpu", "cuda"))
    threads: int = setting(0, "Processor threads; 0: one if small, else torch's choice.", high=1024)
    precision: str = setting("auto", "Matmuls; auto: fp32, a GPU bf16/fp16.", ("auto", *PRECISIONS))
    teacher_precision: str = setting("auto", "As --precision, for teachers.", ("auto", *PRECISIONS))
    compile: bool = setting(True, "Compile the models on a GPU.")
    micro_batch: int = setting(0, "Rows in memory at once, a divisor of the batch; 0: all.")
    chunk: int = setting(0, "Rows of logits that the loss holds at once; 0: 304, 2,048 on a GPU.")
    eval_every: int = setting(0, "Steps between held-out losses; 0: at most ten in all.")
    dev_tokens: int = setting(0, "Read about this many held-out tokens, evenly spread; 0: all.")
    checkpoints: str = setting("", "Save at so many words: 500k,1M; babylm: as BabyLM asks.")
    pairs: str = setting("", "Minimal pairs, or none; empty: those in data/.", path=True)
    sample: int = setting(0, "Score about this many pairs, evenly spread; 0: all.")
    save_minutes: float = setting(10.0, "Minutes between checkpoints.")

    def __post_init__(self):
        kv_heads = self.kv_heads or self.heads
        D = self.width // self.heads
        need(self.width % self.heads == 0, f"{self.heads} heads do not divide width {self.width}.")
        need(self.heads % kv_heads == 0, f"{kv_heads} kv_heads do not divide {self.heads} heads.")
        need(self.model_type != "llama" or D % 2 == 0, f"{self.heads} heads in a width of "
             f"{self.width} are {D} wide each: rotary positions need an even number.")
        need(self.batch_size % (self.micro_batch or 1) == 0,
             f"--micro-batch {self.micro_batch} does not divide --batch-size {self.batch_size}.")
        need(self.context <= self.positions,
             f"--context {self.context} is longer than what the model takes, {self.positions}.")
        need(self.objective == "ce" or self.teachers,
             f"--objective {self.objective} needs a teacher: add --teachers 1.")
        need(re.fullmatch(r"babylm|([1-9]\d{0,11}[kM]?(,(?=.)|$))*", self.checkpoints),
             f"--checkpoints {self.checkpoints!r}: expected babylm, or counts such as 500k,1M.")

KNOWN = {field.name: field for field in fields(Settings)}
PATHS = {name for name, field in KNOWN.items() if field.metadata["path"]}

def settings_between(first, last):
    names = list(KNOWN)
    names = names[names.index(first):names.index(last) + 1]
    return [name for name in names if name not in PATHS]

def checked(field, value, source):
    rules = field.metadata
    shown = f"{source} is {repr(value)[:60]}"
    need(type(value) is field.type or (field.type is float and type(value) is int),
         f"{shown}: expected {field.type.__name__}.")
    if field.type is str:
        need("\0" not in value, f"{shown}: expected text without a NUL.")
        need(not rules["choices"] or value in rules["choices"],
             f"{shown}: expected one of {', '.join(rules['choices'])}.")
    elif field.type is not bool:
        need(rules["low"] <= value <= rules["high"],
             f"{shown}: expected {rules['low']} to {rules['high']}.")
    return field.type(value)

# 9. The corpus ---------------------------------------------------------------

def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

class Corpus(NamedTuple):
    vocabulary: Vocabulary
    train: np.ndarray               # (tokens,)
    dev: np.ndarray                 # (tokens,), empty where no text is held out
    words: int                      # of the training text, between spaces: BabyLM's unit
    digests: dict                   # of the text and the tokenizer

def read_text(folder, names):
    need(folder.exists(), f"{folder} does not exist: expected text (see data/download.py).")
    lines = []
    for path in [folder] if folder.is_file() else sorted(folder.glob("[!.]*")):
        if re.fullmatch(names, path.name) and path.is_file():
            with reading(path):                     # a byte that is not UTF-8 is named
                text = path.read_bytes().decode("utf-8-sig")
            need(text.strip(), f"{path} is empty: expected text.")
            lines += filter(None, map(str.strip, text.split("\n")))
    return lines

def save_tokenizer(folder, tokenizer):
    """Write the files that AutoTokenizer loads; tokenizer.json last, so the folder is complete."""
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "special_tokens_map.json", specials)
    write_json(folder / "tokenizer_config.json", facts | specials)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())

@functools.cache
def say_once(text):
    echo(text, err=True)

def refuse_words(path, tokenizer, roles):
    """Refuse words that files beside tokenizer.json name as tokens: transformers splits there."""
    named = [value for key, value in roles.items() if re.search("_token(s|s_decoder)?$", key)]
    old = path.with_name("added_tokens.json")
    named += read_json(old) if old.exists() else []         # its keys
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"(:?)', json.dumps(named, ensure_ascii=False))
    word = r"(?!AddedToken)[^\W_Ġ▁][^<[|{_\\]*"             # as text may hold it
    added = tokenizer.get_added_tokens_decoder().values()
    special = [each.content for each in added if each.special and re.fullmatch(word, each.content)]
    if special:
        say_once(f"{path}: transformers splits a text at {special[0]!r}; it is plain text here.")
    words = {text for text, colon in strings if not colon and re.fullmatch(word, text)} - {
        each.content for each in added}
    need(not words, f"{path}: a file beside it names {min(words, default='')!r} as a token, which "
         "a text may hold and tokenizer.json does not add: expected one like <pad>.")

def load_vocabulary(path):
    """Load a tokenizer; find the token that begins a text, as transformers 5 would."""
    path = path / "tokenizer.json" if path.is_dir() else path
    files = {"tokenizer.json": path.read_bytes()}
    with reading(path):
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        tokenizer.encode("\U0010ffff")          # fails where unknown text has no token
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True          # a "<s>" in a text is three characters
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None              # else a text has other ids each time
    roles = {}                  # of the prefix token, as transformers 5 would choose it
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = path.with_name(name)
        if beside.exists():
            files[name] = beside.read_bytes()
            roles = roles if "added_tokens_decoder" in roles else roles | read_json(beside)
    config = path.with_name("config.json")
    facts = read_json(config) if config.exists() else {}
    named = [token.content for key in ("bos_token_id", "eos_token_id")
             for i, token in tokenizer.get_added_tokens_decoder().items()
             if token.special and i == facts.get(key)]
    refuse_words(path, tokenizer, roles)
    kind = str(roles.get("tokenizer_class") or facts.get("tokenizer_class")
               or facts.get("model_type") or "")
    missing = "<|endoftext|>" if re.match("gpt", kind, re.I) else None      # the class's own
    if kind.startswith("Llama") and b"ByteLevel" not in files["tokenizer.json"]:
        missing = "<s>"
    need("bos_token" in roles or re.match("PreTrained|Tokenizers|GPT|Llama|$", kind, re.I),
         f"{path}: {kind} may have a prefix token of its own: expected a "
         "bos_token in the tokenizer_config.json beside it.")
    if not re.match("PreTrained|Tokenizers|llama|$", kind):     # llama: the model, of no class
        say_once(f"{path}: transformers 5 builds it anew, as {kind}'s, and may split otherwise.")
    tokens = [roles.get(key, missing) for key in ("bos_token", "eos_token")]
    tokens += [*named, "<|endoftext|>", "<s>"]
    with reading(path):
        limit = float(facts.get("vocab_size", "inf"))
        for i, token in enumerate(tokens):
            token = token.get("content") if isinstance(token, dict) else token
            prefix_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
            if prefix_id is not None and prefix_id < limit:
                if "bos_token" not in roles:        # other tools ask for one
                    files["special_tokens_map.json"] = json.dumps({"bos_token": token}).encode()
                return Vocabulary(tokenizer, prefix_id, files)
            fails = tokenizer.get_vocab_size() >= limit     # transformers, which adds this token
            need(i > 1 or token is None or token == missing and fails, f"{path} has no token "
                 f"{token!r}, with which the files beside it, or their class, begin a text.")
    raise ClickException(f"{path}: no token begins a text: expected a bos_token or eos_token "
                         "in the tokenizer_config.json beside it.")

def fingerprint(vocabulary):
    """Hash all that decides which ids a text becomes."""
    parts = json.loads(vocabulary.tokenizer.to_str())
    parts = [parts[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return digest(json.dumps([parts, vocabulary.prefix_id]).encode())

def read_corpus(settings, cache):
    """Read and encode the corpus; keep a tokenizer in a folder named by a hash of its source."""
    train = read_text(Path(settings.text), r".*\.train|(?!dev\.txt$).*\.txt")
    names = ".*" if Path(settings.dev).is_file() else r".*\.dev|dev\.txt"
    dev = read_text(Path(settings.dev or settings.text), names)
    need(train, f"{settings.text} holds no *.train and no *.txt: expected text.")
    need(dev or not settings.dev, f"{settings.dev} holds no *.dev and no dev.txt: expected text.")
    texts = [train, dev] if settings.keep == "best" else [train]    # what decides what is learnt
    text = digest(*("\n".join(lines).encode() for lines in texts))
    folder = Path(settings.tokenizer)
    if not settings.tokenizer:
        source = digest(f"{text} {settings.vocab_size}".encode())
        folder = cache / f"tokenizer-{source[:12]}"
        if rank_and_size()[0] == 0 and not (folder / "tokenizer.json").exists():
            long = re.search(r"(?<!\S)\S{1001}", "\n".join(train))
            if long:
                echo(f"{settings.text}: the tokenizer is trained on the first 1,000 characters of "
                     f"a word, for longer ones are slow: {long[0][:40]}...", err=True)
            short = [re.sub(r"(\S{1000})\S+", r"\1", line) for line in train]
            save_tokenizer(folder, train_tokenizer(short, settings.vocab_size))
        if dist.is_initialized():
            dist.barrier()                          # the other ranks wait for it
    vocabulary = load_vocabulary(folder)
    ids = [encode(vocabulary, lines, settings.prefix) for lines in (train, dev)]
    words = sum(len(line.split()) for line in train)
    return Corpus(vocabulary, *ids, words, {"text": text, "tokenizer": fingerprint(vocabulary)})

# 10. GPT-2, the second coach -------------------------------------------------

class GPT2Block(nn.Module):
    """As LlamaBlock, with biases, dropout, GELU, no rotation (Radford et al. 2019): (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.ln_1 = nn.LayerNorm(C, config.norm_eps)
        self.ln_2 = nn.LayerNorm(C, config.norm_eps)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, config.inner),
                                  "c_proj": nn.Linear(config.inner, C)})

    def forward(self, x, past, mask):
        qkv = split_heads(self.attn["c_attn"](self.ln_1(x)), 3 * self.heads)    # (B, 3 H, T, D)
        q, k, v = qkv.chunk(3, dim=1)
        k, v = extend_cache(past, k, v)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                           dropout_p=self.dropout.p if self.training else 0.0)
        y = self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        x = x + self.dropout(y)
        y = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.dropout(self.mlp["c_proj"](y))

class GPT2(nn.Module):
    prefix = "transformer."
    layers = property(lambda self: self.h)

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(vocab_size, config.width)
        self.wpe = nn.Embedding(config.positions, config.width)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)

    head = property(lambda self: (self.lm_head or self.wte).weight)

    def hidden(self, ids, cache=None, tree=None):                   # cache and tree: as in Llama
        positions = tree.depth if tree else torch.arange(ids.shape[1], device=ids.device)
        x = F.dropout(self.wte(ids) + self.wpe(positions), self.config.dropout, self.training)
        for block, past in zip(self.h, cache or [None] * len(self.h)):
            x = block(x, past, tree.sees if tree else None)
        return self.ln_f(x)

    forward = hidden

def empty_model(config, vocab_size):
    """Make a model of shapes without values, which costs nothing: to be counted or filled."""
    with torch.device("meta"):
        return (Llama if config.model_type == "llama" else GPT2)(config, vocab_size)

def new_model(config, vocab_size, seed):
    """Make a model with Hugging Face's initial weights: N(0, 0.02), 0 in biases, 1 in norms."""
    model = empty_model(config, vocab_size).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)         # the same weights for every device
    for name, weight in model.state_dict().items():
        # GPT-2 shrinks what returns into the residual stream, so that the sum keeps its size.
        scale = math.sqrt(2 * config.layers) if name.endswith("c_proj.weight") else 1.0
        if weight.dim() == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(0.0, 0.02 / scale, generator=generator)
    return model

# 11. Run folders -------------------------------------------------------------

HF_KEYS = {         # our setting: the key in config.json
    "llama": {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
              "kv_heads": "num_key_value_heads", "inner": "intermediate_size",
              "positions": "max_position_embeddings", "rope_theta": "rope_theta",
              "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings"},
    "gpt2": {"width": "n_embd", "layers": "n_layer", "heads": "n_head", "inner": "n_inner",
             "positions": "n_positions", "norm_eps": "layer_norm_epsilon",
             "dropout": "resid_pdrop", "tied": "tie_word_embeddings"}}
HF_MISSING = {      # what holds where a key is missing
    "llama": {"kv_heads": 0, "positions": 2048, "rope_theta": 10_000.0, "norm_eps": 1e-6,
              "tied": False},
    "gpt2": {"positions": 1024, "norm_eps": 1e-5, "dropout": 0.1, "tied": True}}
HF_FIXED = {        # what our models always do: written on saving, demanded on loading
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def to_hf_config(config, vocabulary):
    kind = config.model_type
    config = replace(config, kv_heads=config.kv_heads or config.heads)
    sizes = {key: getattr(config, name) for name, key in HF_KEYS[kind].items()}
    if kind == "gpt2":
        sizes |= {"attn_pdrop": config.dropout, "embd_pdrop": config.dropout}
    # A text ends where the next one begins, and so does what transformers generates.
    newline = vocabulary.tokenizer.encode("\n", add_special_tokens=False).ids[-1:]
    end = newline[0] if config.prefix == "none" and newline else vocabulary.prefix_id
    pad = vocabulary.tokenizer.token_to_id("<pad>")
    return {"architectures": ["LlamaForCausalLM" if kind == "llama" else "GPT2LMHeadModel"],
            "model_type": kind, "vocab_size": vocabulary.size, **sizes, **HF_FIXED[kind],
            "bos_token_id": vocabulary.prefix_id, "eos_token_id": end,
            "pad_token_id": end if pad is None else pad, "dtype": "float32"}

def from_hf_config(path):
    need(path.exists(), f"{path.parent} holds no finished model: expected config.json, "
         "tokenizer.json and model.safetensors.")
    raw = read_json(path)
    kind = raw.get("model_type")
    need(kind in list(HF_KEYS), f"{path}: model_type is {kind!r}: expected {' or '.join(HF_KEYS)}.")
    with reading(path):
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    need(all(rope.get(key) in (None, "default") for key in ("rope_type", "type")),
         f"{path}: rotary positions are scaled, by {rope}: expected plain ones.")
    raw = {key: value for key, value in (raw | rope).items() if value is not None}
    for key, value in HF_FIXED[kind].items():
        found = raw.get(key, value)
        need(found == value, f"{path}: {key} is {found!r}: expected {value!r}.")
    values = {"model_type": kind, "context": 1}
    for name, key in HF_KEYS[kind].items():
        missing = 4 * values["width"] if key == "n_inner" else HF_MISSING[kind].get(name)
        other = HF_KEYS["llama"][name] if key.startswith("n_") and key != "n_inner" else key
        found = raw.get(key, raw.get(other, missing))       # GPT-2 in transformers has both names
        need(raw.get(other, found) == found, f"{path}: {key} is {found!r}, {other} is not.")
        values[name] = checked(KNOWN[name], found, f"{path}: {key}")
    config = Settings(**values)
    V, D = raw.get("vocab_size"), config.width // config.heads
    need(type(V) is int and 0 < V < 2**24, f"{path}: vocab_size is {V!r}: expected a size.")
    need(raw.get("head_dim", D) == D, f"{path}: head_dim is {raw.get('head_dim')}: expected "
         f"width / heads = {D}.")
    return config, V

def write_safetensors(path, tensors):
    """Write a safetensors file: its header's length in 8 bytes, the header in JSON, the values."""
    header = {"__metadata__": {"format": "pt"}}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                 # the values start at a multiple of 8 bytes
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())

def read_safetensors(path):
    need(path.exists(), f"{path} is missing: expected safetensors (pickled models are not read).")
    tensors, last = {}, 0
    with reading(path):
        content = np.memmap(path, np.uint8, "c")
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            need(last <= begin <= end <= len(content) - start,
                 f"{path} is damaged: {name!r} overlaps another tensor or the end of the file.")
            last = end
            if re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name):
                continue                            # older versions saved masks and angles
            need(entry["dtype"] in DTYPES,
                 f"{path}: {name!r} has dtype {entry['dtype']!r}: expected {', '.join(DTYPES)}.")
            raw = torch.tensor(content[start + begin:start + end])
            tensors[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors

def stored(name, tensor):
    """Turn a weight to a file's layout, or back: GPT-2's blocks have theirs (in, out) there."""
    return tensor.transpose(0, -1).contiguous() if re.search(r"\.c_\w+\.w", name) else tensor

def save_model(folder, model, vocabulary):
    """Write the model's folder, the weights last: a folder that has them is finished."""
    facts = to_hf_config(model.config, vocabulary)
    write_json(folder / "config.json", facts)
    ids = {key: facts[key] for key in facts if key.endswith("token_id")}
    write_json(folder / "generation_config.json", ids)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)             # an earlier run's
    for name, content in vocabulary.files.items():
        write_file(folder / name, content)
    weights = {name if name.startswith("lm_head") else model.prefix + name: stored(name, parameter)
               for name, parameter in model.named_parameters()}
    write_safetensors(folder / "model.safetensors", weights)

def load_model(folder, device):
    """Load the model, in fp32, and the vocabulary of a run or any Hugging Face LLaMA or GPT-2."""
    config, V = from_hf_config(folder / "config.json")
    vocabulary = load_vocabulary(folder)
    need(vocabulary.size <= V, f"{folder}: tokenizer.json has {vocabulary.size:,} tokens, but "
         f"config.json a vocab_size of {V:,}: expected at least as many.")
    shards = {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        with reading(index):
            shards = {Path(name).name for name in read_json(index)["weight_map"].values()}
    model = empty_model(config, V)
    found = {name.removeprefix(model.prefix): stored(name, tensor).float()
             for shard in sorted(shards)
             for name, tensor in read_safetensors(folder / shard).items()}
    head = found.pop("lm_head.weight", None) if config.tied else None
    if head is not None:                            # some hold it twice, some by this name alone
        found.setdefault(next(iter(model.state_dict())), head)
    with reading(f"{folder} (config.json, or the weights)"):
        missing, extra = model.load_state_dict(found, strict=False, assign=True)
        need(not missing, f"{folder}: no weights for {', '.join(missing)[:99]}, which config.json "
             "asks for.")
    if extra:                                       # transformers passes over them, too
        say_once(f"{folder}: weights without a place in the model: {', '.join(extra)[:99]}")
    need(head is None or head.equal(model.head), f"{folder}: config.json ties head and embedding, "
         "but the weights hold two different ones.")
    return model.to(device).eval(), vocabulary

# 12. Training ----------------------------------------------------------------

def count_steps(tokens, settings):
    per_epoch = count_rows(tokens, settings) // settings.batch_size
    need(per_epoch, f"{settings.text} has {tokens:,} tokens, less than a batch of --batch-size "
         f"{settings.batch_size} rows of --context {settings.context}.")
    return settings.steps or per_epoch * settings.epochs, per_epoch

def words_read(step, corpus, settings):
    tokens = step * settings.batch_size * settings.context
    return tokens * corpus.words / len(corpus.train)

def checkpoint_steps(corpus, settings):
    counts = re.findall(r"\w+", settings.checkpoints)
    if counts == ["babylm"]:                # at 1M to 10M words, then by 10M, then by 100M
        counts = [f"{power * i}M" for power in (1, 10, 100) for i in range(1, 11)]
    found = {}
    steps, _ = count_steps(len(corpus.train), settings)
    for count in counts:
        words = float(count.replace("k", "e3").replace("M", "e6"))
        found[f"chck_{count}"] = math.ceil(words / words_read(1, corpus, settings))
    return {name: step for name, step in found.items() if step <= steps}

def step_dtype(settings, device):
    name = settings.precision
    if name == "auto" and device == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return PRECISIONS.get(name, torch.float32)

@torch.no_grad()
def held_out_loss(model, ids, settings, dtype=torch.float32):
    """Return held-out cross-entropy, nats a token; None for less than a row. Matmuls in dtype."""
    T = settings.context            # the rows are fixed: all, or every k-th for fewer tokens
    every = max(1, round(len(ids) / settings.dev_tokens)) if settings.dev_tokens else 1
    starts = np.arange(0, len(ids) - T, T)[::every]
    was_training = model.training
    model.eval()
    total = 0.0
    count = 0
    for i in range(0, len(starts), settings.batch_size):
        batch = windows(ids, starts[i:i + settings.batch_size], T)
        inputs, targets = (rows.to(model.head.device) for rows in batch)
        half = torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32)
        with half, torch.compiler.set_stance("force_eager"):    # too few calls to compile for
            hidden = model.hidden(inputs).flatten(0, 1)
        targets = targets.flatten()
        rows = torch.where(targets >= 0)[0]
        count += len(rows)
        total -= token_log_probabilities(hidden.float(), model.head, rows, targets[rows]).sum()
    model.train(was_training)
    return float(total) / count if count else None

@dataclass
class Run:
    name: str
    out: Path
    settings: Settings              # or, of a given model, its shape
    teachers: tuple = ()            # of Run
    given: bool = False             # by --teacher: not ours to train

    @property
    def finished(self):
        return self.given or (self.out / "model.safetensors").exists()

def describe_run(run, corpus, device):
    given = [*(str(each.out) for each in run.teachers), run.settings.init]
    weights = [weights_digests(Path(folder)) for folder in given if folder]
    return {"argv": sys.argv[1:], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": asdict(run.settings), "teachers": given[:-1],
            "digests": {**corpus.digests, "dev": digest(corpus.dev.tobytes()),
                        "weights": weights, "code": file_digest(__file__)},
            "words": corpus.words, "checkpoints": checkpoint_steps(corpus, run.settings),
            "machine": {"device": device, "processes": rank_and_size()[1],
                        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
                        "threads": torch.get_num_threads(),
                        "torch": torch.__version__, "python": sys.version}}

RECIPE = settings_between("vocab_size", "gamma")        # the settings that decide what is learnt

def need_same(run, record, resumed):
    """Refuse a run that was begun with another recipe or data, or to resume, in another way."""
    path = run.out / "run.json"
    before = read_json(path)
    checks = [("settings", RECIPE), ("digests", ["text", "tokenizer", "weights"])]
    if resumed:
        checks += [("settings", settings_between("teachers", "checkpoints")),
                   ("machine", ["device", "processes"]), ("digests", ["dev"])]
    for group, names in checks:
        for name in names:
            with reading(path):
                old, new = before[group].get(name), record[group][name]
                shown = old if group != "digests" else before["settings"].get(name, "given ones")
            need(old == new, f"{name.replace('_', '-')} has changed since {run.out} was begun "
                 f"({str(shown) or 'none'}): go back to it, or to an --out in another folder.")

def describe_loss(settings):
    if settings.objective not in DIVERGENCES:
        return settings.objective
    ce, weight = loss_weights(settings)
    tau = settings.temperature
    text = f"loss {ce:g} ce + {weight * tau**2:g} {settings.objective} at temperature {tau:g}"
    if settings.beta < 1 or settings.beta_end >= 0:
        text += f", beta {settings.beta:g}{f' to {settings.beta_end:g}' * (settings.beta_end >= 0)}"
    return text

def describe_plan(run, corpus):
    settings = run.settings
    steps, per_epoch = count_steps(len(corpus.train), settings)
    model = empty_model(settings, corpus.vocabulary.size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = words_read(steps, corpus, settings)
    much = words > 1e8 and corpus.words < 1.1e7
    limit = ", of which BabyLM's strict-small track allows 100 million" if much else ""
    kept = ", ".join(checkpoint_steps(corpus, settings)) or "none: too few words"
    halves = "fp16|bf16" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "fp16"
    slow = re.search(halves, settings.precision + settings.teacher_precision * bool(run.teachers))
    size = settings.batch_size * settings.context
    return (f"{settings.model_type}, {parameters:,} parameters, {describe_loss(settings)}, "
            f"{steps:,} step{'s'[:steps - 1]} of {size:,} tokens, {steps / per_epoch:.2g} epochs, "
            f"about {words:,.0f} words{limit}{f', enough for {kept}' * bool(settings.checkpoints)}"
            f"{f', in {slow[0]}: slow here without a GPU' if slow else ''}")

def write_card(run, corpus, found):
    settings = {name: value for name, value in asdict(run.settings).items()
                if value != KNOWN[name].default and name not in PATHS}
    teachers = ", ".join(teacher.out.resolve().name for teacher in run.teachers)
    begun = Path(run.settings.init or "scratch").resolve().name
    text = (f"---\nlibrary_name: transformers\n---\n# {run.out.resolve().name}\n\nA language model "
            f"trained with ChooBaCa from {begun}: {describe_plan(run, corpus)}{found}.\n\n"
            f"- Text: {Path(run.settings.text).name}, {corpus.words:,} words\n- Teachers: "
            f"{teachers or 'none'}\n- Settings that are not the defaults: {json.dumps(settings)}\n")
    write_file(run.out / "README.md", text.encode(errors="replace"))

@contextlib.contextmanager
def signals_kept():
    received = []
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda number, _: received.append(number))
            stack.callback(signal.signal, number, before)
        yield received

def stop_signal(received, device):
    number = max(received, default=0)
    if dist.is_initialized():
        flag = torch.tensor(number, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = flag.item()
    return number

def save_state(path, progress, parts):
    states = {name: part.state_dict() for name, part in parts.items()}
    with written_whole(path) as file:
        torch.save(progress | states | {"run": file_digest(path.with_name("run.json"))}, file)

def load_state(path, progress, parts):
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        need(state["run"] == file_digest(path.with_name("run.json")), f"{path} is of another run "
             "than the run.json beside it: begin again with --overwrite.")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for weight, moments in parts["optimizer"].state.items():
            need(moments["exp_avg"].shape == moments["exp_avg_sq"].shape == weight.shape,
                 f"{path} is damaged: its parts do not fit each other.")
        progress |= {name: type(value)(state[name]) for name, value in progress.items()}

def begin_run(run, record, steps, log, resume, parts):
    """Clear a run's folder of an earlier run, or load its checkpoint. Return the progress."""
    progress = {"step": 0, "seconds": 0.0, "log": "", "least": math.inf}
    state = run.out / "state.pt"
    if resume and (state.exists() or [*run.out.glob("chck_*")]):
        need_same(run, record, resumed=True)
    if resume and state.exists():
        load_state(state, progress, parts)
        need(0 < progress["step"] < steps,
             f"{state} is damaged: it is of step {progress['step']} of {steps}.")
    if rank_and_size()[0]:
        return progress
    log.truncate(0)
    log.write(progress["log"])              # as it was then, whatever became of the file
    for path in run.out.rglob(".choobaca-[0-9]*-*"):        # of a killed process
        path.unlink()
    if not progress["step"]:
        old = [path for path in run.out.glob("chck_*/model.safetensors")
               if not path.parent.is_symlink()]             # of an earlier run
        names = ("model.safetensors", "config.json", "README.md", "state.pt")
        for path in [*old, *(run.out / name for name in names)]:
            path.unlink(missing_ok=True)
        write_json(run.out / "run.json", record)
    return progress

@contextlib.contextmanager
def locked_log(folder, wait, begun):    # begun: there was a run when this command started
    """Open a run's log, and keep other processes from training there; a crash ends the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, size = rank_and_size()
    path = os.devnull if rank else folder / "log.jsonl"             # rank 0 writes
    with open(path, "a+", encoding="utf-8", errors="replace") as log:
        try:
            if os.name == "posix" and not rank:     # Windows has no such lock
                import fcntl
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            need(wait and size == 1, f"{folder}: another process is training this run.")
            echo(f"{folder}: waiting, since another process is training it.", err=True)
            fcntl.flock(log, fcntl.LOCK_EX)
        need(wait or rank or begun or not (folder / "run.json").exists(),
             f"{folder}: another process has begun a run there since this one started.")
        yield log

class RecordedStep:
    """Record train_step as a CUDA graph: one launch, not a thousand, which would take longer."""

    calls = 0
    last = None                     # settings and beta of the last step

    def __call__(self, model, optimizer, coach, inputs, targets, settings, beta, *rest):
        groups = optimizer.param_groups
        batch, lr = torch.stack([inputs, targets]), groups[0]["lr"]
        self.calls = self.calls + 1 if (settings, beta) == self.last else 1
        self.last = settings, beta
        if self.calls < 3:                      # the first ones compile, and set up the optimizer
            return train_step(model, optimizer, coach, *batch, settings, beta, *rest)
        if self.calls == 3:                     # what a graph reads and writes stays in its place
            self.batch, self.lr = batch.clone(), torch.zeros((), device=batch.device)
            for group in groups:
                group["lr"] = self.lr
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.row = train_step(model, optimizer, coach, *self.batch, settings, beta, *rest)
        self.batch.copy_(batch)
        self.lr.fill_(lr)
        self.graph.replay()
        return self.row.clone()

def write_step(run, line, row, scaler, log, bar):
    loss, ce, kl, norm = row.tolist()
    sound = math.isfinite(loss) and (scaler.is_enabled() or math.isfinite(norm))  # fp16 skips some
    need(sound and scaler.get_scale() > 1e-6, f"{run.out}: step {line['step']} has a loss of "
         f"{loss:.4g}, a gradient of {norm:.4g}: take a lower --lr, or a sound teacher.")
    line |= {"loss": loss, "ce": ce, "norm": norm} | ({"kl": kl} if "beta" in line else {})
    log.write(json.dumps(line) + "\n")
    log.flush()
    bar.set_postfix_str(f"loss {loss:.3g}, lr {line['lr']:.2g}", False)
    bar.update()

def fit(run, corpus, device, log, resume):
    """Train a run: a log line a step and, at the end, the weights, to the same bytes if resumed."""
    settings = run.settings
    if device == "cuda" and settings.compile and not importlib.util.find_spec("triton"):
        say_once("Triton is not installed: nothing is compiled, so steps take longer.")
        settings = replace(settings, compile=False)
    rank, size = rank_and_size()
    dtype = step_dtype(settings, device)
    steps, per_epoch = count_steps(len(corpus.train), settings)
    V = corpus.vocabulary.size
    model = (load_model(Path(settings.init), device)[0] if settings.init
             else new_model(settings, V, settings.seed).to(device)).train()
    model.config = settings
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if settings.keep == "best":
        parts["best"] = copy.deepcopy(model)
    teachers = [load_model(teacher.out, device)[0] for teacher in run.teachers]
    teacher_dtype = PRECISIONS.get(settings.teacher_precision, dtype)
    coach = Coach(teachers, teacher_dtype, V) if teachers else None
    step_by = train_step
    if settings.compile and device == "cuda":
        for block in itertools.chain(*(each.layers for each in [model, *teachers])):
            block.compile(dynamic=False)                # alike, so compiled once
        if size == 1 and not scaler.is_enabled():       # the scaler looks at every gradient
            step_by = RecordedStep()
    progress = begin_run(run, describe_run(run, corpus, device), steps, log, resume, parts)
    bar = tqdm(None, run.name, steps, unit=" steps", disable=rank > 0, initial=progress["step"])
    started = time.perf_counter() - progress["seconds"]
    saved = time.monotonic()
    look_every = settings.eval_every or math.ceil(steps / 10)           # ten looks, or fewer
    times = []                                          # when each step began
    late = []                                           # steps that are not in the log yet
    folders = checkpoint_steps(corpus, settings)
    with bar, signals_kept() as received:
        for step in range(progress["step"], steps):     # each needs number, weights, optimizer
            times.append(time.perf_counter())
            if len(times) in range(41, steps, 20):
                gaps = np.diff(times)           # their medians: a look at held-out text is no step
                if np.median(gaps[-20:]) > 5 * np.median(gaps[:20]):
                    say_once(f"\n{run.name}: steps take five times as long as at first.")
            taken = step + 1                    # steps, with this one
            last = taken == steps
            lr = lr_at(step, steps, settings)
            beta = beta_at(step, steps, per_epoch, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = [ids.tensor_split(size)[rank] for ids in batch_at(step, corpus.train, settings)]
            if device == "cuda":                # from pinned memory: the GPU works on meanwhile
                batch = [ids.pin_memory().to(device, non_blocking=True) for ids in batch]
            seed = (settings.seed * 2**32 + step) * size + rank                         # dropout
            torch.manual_seed(seed % 2**63)
            if settings.objective == "alternate":       # forward KL, reverse KL, forward KL, ...
                settings = replace(settings, fkl_weight=1.0 - step % 2)
            row = step_by(model, optimizer, coach, *batch, settings, beta, dtype, scaler)
            row = row.to("cpu", non_blocking=True)      # asked for, not waited for
            copied = torch.cuda.current_stream().record_event() if device == "cuda" else None
            line = {"step": taken, "epoch": taken / per_epoch,
                    "words": round(words_read(taken, corpus, settings)), "lr": lr}
            line |= {"beta": beta} if coach else {}
            late.append((line, row, copied))
            stop = stop_signal(received, device)                # a signal's number, or 0
            due = stop or time.monotonic() - saved > 60 * settings.save_minutes
            look = last or taken % look_every == 0      # at held-out text; changes nothing
            now = device == "cpu" or look or due or taken in folders.values()
            while len(late) > (0 if now else 1):        # a GPU is read when its next step has begun
                old_line, old_row, copied = late.pop(0)
                if copied:
                    copied.synchronize()
                seconds = time.perf_counter() - started
                write_step(run, old_line | {"seconds": seconds}, old_row, scaler, log, bar)
            dev_loss = held_out_loss(model, corpus.dev, settings, dtype) if look else None
            if dev_loss is not None:
                need(math.isfinite(dev_loss),
                     f"{run.out}: the held-out loss is {dev_loss}: take a lower --lr.")
                log.write(json.dumps({"step": taken, "dev_loss": dev_loss}) + "\n")
                if settings.keep == "best" and dev_loss < progress["least"]:
                    progress["least"] = dev_loss
                    parts["best"].load_state_dict(model.state_dict())
            for name, at in folders.items():
                if rank == 0 and at == taken:
                    save_model(run.out / name, model, corpus.vocabulary)
            if due and not last and rank == 0:      # every few minutes, and before we obey a signal
                log.seek(0)                         # what is written goes to the end all the same
                progress |= {"step": taken, "seconds": seconds, "log": log.read()}
                save_state(run.out / "state.pt", progress, parts)
                saved = time.monotonic()
            if stop:
                break
        if rank == 0 and last:
            save_model(run.out, parts.get("best", model), corpus.vocabulary)
            (run.out / "state.pt").unlink(missing_ok=True)
        stop = stop_signal(received, device) or stop            # all wait until rank 0 has written
    if stop and rank == 0:
        echo(f"{run.name}: stopped after step {taken:,} of {steps:,}, which is kept. To "
             "go on: the same command with --resume.", err=True)
    if stop:
        sys.exit(128 + stop)

# 13. Sampling ----------------------------------------------------------------

@torch.no_grad()
def write_on(model, rows, ends, length, generator, temperature):
    """Continue lists of ids until they draw one of `ends`, or by `length` tokens: a list each."""
    device = model.head.device
    T = max(map(len, rows))                                 # shorter rows are padded on the left
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)     # (R, T)
    padding = torch.tensor([[T - len(row)] for row in rows], device=device)             # (R, 1)
    drawn = [[] for _ in rows]
    going = torch.arange(len(rows), device=device)
    cache = [[] for _ in range(model.config.layers)]        # no id goes through the model twice
    for width in range(T, T + length):
        column = torch.arange(width, device=device)
        row = column[-ids.shape[1]:, None]                  # no id sees padding, but itself
        sees = (column <= row) & (column >= padding[:, :, None]) | (column == row)
        tree = Tree((row.T - padding).clamp(min=0), sees[:, None])
        logits = model.hidden(ids, cache, tree)[:, -1] @ model.head.T                   # (R, V)
        need(logits.isfinite().all(), "the model's logits are not finite: was --lr too high?")
        ids = logits.argmax(-1, True)
        if temperature:
            p = (logits / temperature).softmax(-1)
            ids = torch.multinomial(p, 1, generator=generator)
        keep = ~torch.isin(ids[:, 0], torch.tensor(ends, device=device))
        going = going[keep]                                 # the others leave batch and cache
        padding = padding[keep]
        ids = ids[keep]
        if not len(ids):
            break
        cache = [[past[keep] for past in layer] for layer in cache]
        for row, new in zip(going.tolist(), ids.tolist()):
            drawn[row] += new
    return drawn

# 14. Tables: reading pairs, summing up scores, comparing models --------------

SUITES = ("blimp", "supplement", "ewok")

def group_by(items, key):
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

def read_pair(line, path, number, rule="2024", names=None):
    """Read a line, JSON or of a table with these `names`: two sentences, or EWoK's four texts."""
    try:
        if names is None:
            item = json.loads(line)
        else:                                               # what is surplus has the name None
            rows = [row.decode("utf-8-sig") for row in (names, line)]
            tabs = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            item = next(csv.DictReader(rows, strict=True, **tabs))
        keys = ("sentence_good", "sentence_bad")
        if "Target1" in item:
            keys = ("Target1", "Target2", "Context1", "Context2")
        good, bad, *contexts = texts = [item[key] for key in keys]
        need(all(text.strip() for text in texts) and None not in item, "no text, or too many")
        paradigm = str(item.get("UID") or item.get("Domain") or path.stem)
        term = str(item.get("linguistics_term", paradigm))
        "".join([*texts, paradigm, term]).encode()  # fails on what is no string, or half of one
    except Exception:                   # of a dozen kinds, and EWoK's text is not to be spread
        raise ClickException(
            f"{path}, line {number}: expected strings sentence_good and sentence_bad, or Context1, "
            "Context2, Target1 and Target2: keys of a JSON object, or names of columns.")
    term = term.replace("s-selection", "argument_structure")        # as BLiMP's paper counts them
    given = contexts[0] if contexts else ""
    if rule == "2026" and contexts:                 # one target after two contexts, all scored
        given = ""
        good, bad = [f"{context} {good}" for context in contexts]
    space = " " if rule == "2024" else ""
    return Pair((given, space + good), (given, space + bad), paradigm, term, number)

def read_pairs(folder, sample=0, rule="2024"):
    paths = [folder] if folder.is_file() else sorted(folder.glob("[!.]*"))
    paths = [p for p in paths if p.suffix in (".jsonl", ".tsv", ".csv") and p.is_file()]
    pairs = []
    for path in paths:
        lines = path.read_bytes().splitlines()
        names = lines.pop(0) if path.suffix != ".jsonl" and lines else None
        pairs += [read_pair(line, path, number, rule, names)
                  for number, line in enumerate(lines, 1 if names is None else 2) if line.strip()]
    need(pairs, f"{folder} has no minimal pairs: *.jsonl or, below a line of names, *.tsv, *.csv "
         "(see data/download.py); to train without any: --pairs none.")
    return pairs[::max(1, round(len(pairs) / sample)) if sample else 1]

def mean_row(rows):
    return {"accuracy": np.mean([row["accuracy"] for row in rows]),     # as BabyLM averages
            "stderr": math.hypot(*(row["stderr"] for row in rows)) / len(rows),
            **{key: sum(row[key] for row in rows) for key in ("n", "ties")}}

def summarise(pairs, scores):
    paradigms = {}
    for uid, members in group_by(range(len(pairs)), lambda i: pairs[i].paradigm).items():
        good, bad = scores[members].T
        right = good >= bad                                         # a tie counts
        n = len(members)
        paradigms[uid] = {"phenomenon": pairs[members[0]].phenomenon,
                          "accuracy": right.mean(), "n": n,
                          "stderr": right.std() / math.sqrt(n - 1) if n > 1 else 0.5,
                          "ties": int(np.sum(good == bad))}
    terms = sorted(group_by(paradigms.values(), lambda row: row["phenomenon"]).items())
    return {**mean_row(paradigms.values()), "paradigms": paradigms,
            "phenomena": {term: mean_row(rows) for term, rows in terms}}

def score_folder(folder, device, pairs, suite, rule="2024", keep=True):
    """Return the pairs that a folder's model can score, and their scores, which it then keeps."""
    weights = weights_digests(folder)           # before: who writes it anew meanwhile is noticed
    model, vocabulary = load_model(folder, device)
    _, pairs = encode_pairs(vocabulary, pairs, model.config.positions, rule)
    named = digest(json.dumps(pairs).encode())              # a sample does not replace the whole
    path = folder / f"{suite}-{named[:8]}.jsonl"
    facts = {"pairs": len(pairs), "weights": weights, "code": file_digest(__file__)}
    head, _, lines = (path.read_bytes() if path.is_file() else b"").partition(b"\n")
    if head == json.dumps(facts | {"lines": digest(lines)}).encode():
        echo(f"{path}: scored before, so not again.", err=True)
        rows = map(json.loads, lines.splitlines())
        return pairs, np.array([[row["good"], row["bad"]] for row in rows])
    pairs, scores = score_pairs(model, vocabulary, pairs, f"scoring {folder}", rule)
    rows = [{"phenomenon": pair.phenomenon, "paradigm": pair.paradigm, "line": pair.line,
             "good": good, "bad": bad} for pair, (good, bad) in zip(pairs, scores.tolist())]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        if keep:
            facts["lines"] = digest(lines)
            write_file(path, json.dumps(facts).encode() + b"\n" + lines)
    except OSError as error:                                # it may be read-only
        echo(f"{path}: not kept for compare: {error.strerror}.", err=True)
    return pairs, scores

def pairs_table(results, paradigms):
    columns = list(results.values())
    rows = {}
    for term in columns[0]["phenomena"]:
        rows[term] = [column["phenomena"][term] for column in columns]
        for uid, row in columns[0]["paradigms"].items():
            if paradigms and row["phenomenon"] == term != uid:
                rows["  " + uid] = [column["paradigms"][uid] for column in columns]
    count = len(columns[0]["paradigms"])
    rows[f"mean of {count:,} paradigm{'s' if count > 1 else ''}"] = columns
    width = max(34, *map(len, rows))
    lines = [f"{'accuracy and standard error, in %':<{width}} {'n':>7}"
             + "".join(f"{name:>16}" for name in results)]
    for label, row in rows.items():
        cells = "".join(f"{100 * x['accuracy']:9.1f} ± {100 * x['stderr']:4.1f}" for x in row)
        lines.append(f"{label:<{width}} {row[0]['n']:>7,}{cells}")
    ties = "".join(f"{column['ties']:>16,}" for column in columns)
    return "\n".join([*lines, f"{'ties, given to the good sentence':<{width + 8}}{ties}"])

def common_scores(folders, suite):
    names = [{path.name for path in folder.glob("*.jsonl") if path.name.startswith(suite)}
             for folder in folders]
    common = sorted(set.intersection(*names))
    need(common, f"{', '.join(map(str, folders))} have no scores of the same {suite} items, or do "
         "not exist: score each in the same way (eval-blimp or a script in data/, --sample, ...).")
    return max(common, key=lambda name: (folders[0] / name).stat().st_size)

def read_scores(path):
    with reading(path):
        facts, *lines = map(json.loads, path.read_bytes().splitlines())
        names = [(str(line["phenomenon"]), str(line["paradigm"]), line["line"]) for line in lines]
        scores = [float(line["score"] if "score" in line else line["good"] >= line["bad"])
                  for line in lines]
        need(len(names) == facts["pairs"] > 0 and facts["weights"] == weights_digests(path.parent),
             f"{path} is cut off, or of another model than the one beside it: score it again.")
    return names, np.array(scores)

def confidence_interval(differences):
    """Return a 95 % interval for the mean over paradigms of the mean difference within each."""
    # Pairs of a paradigm are alike: Student's t over paradigms' means; of one or two, over pairs.
    means = np.array([difference.mean() for difference in differences])
    sample = means if len(means) > 2 else np.concatenate(differences)
    # Student's t: sqrt(df) tan(angle) times std / sqrt(df), the angle of density cos^(df - 1).
    df = len(sample) - 1
    angle = np.linspace(0, math.pi / 2, 20_000)
    mass = np.cumsum(np.cos(angle) ** (df - 1))
    quantile = angle[np.searchsorted(mass, 0.95 * mass[-1])]
    reach = sample.std() * math.tan(quantile) if df else 2.0
    return (means.mean() + np.array([-reach, reach])).clip(-1, 1).tolist()

def compare_scores(names, first, other):
    everything = range(len(names))
    terms = sorted(group_by(everything, lambda i: names[i][0]).items())
    rows = []
    for term, chosen in [*terms, ("all", everything)]:
        groups = group_by(chosen, lambda i: names[i][:2]).values()
        gaps = [other[group] - first[group] for group in groups]
        low, high = confidence_interval(gaps)
        # Up to five pairs that differ fall on one side by chance once in 16 times, or more often.
        verdict = "not distinguishable"
        if np.count_nonzero(np.concatenate(gaps)) > 5 and not low <= 0 <= high:
            verdict = "better" if low > 0 else "worse"
        if len(groups) < 3:
            verdict += " on these pairs"
        before, after = (np.mean([right[group].mean() for group in groups])
                         for right in (first, other))
        rows.append({"phenomenon": term, "n": len(chosen),
                     "first": before, "other": after, "difference": after - before,
                     "low": low, "high": high, "verdict": verdict})
    return rows

# 15. The command line --------------------------------------------------------

def settings_flags(command):
    for field in reversed(KNOWN.values()):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            flag += f"/--no-{flag[2:]}"
        choices = field.metadata["choices"]
        kind = click.Choice(choices) if choices else field.type
        default = str(field.default).removeprefix(f"{HOME}/") or "empty"
        text = f"{field.metadata['help']}  [default: {default}]"
        command = option(flag, field.name, default=None, type=kind, help=text)(command)
    return command

ELSEWHERE = {"learning_rate": "lr", "hidden_size": "width", "block_size": "context"}

def check_keys(table, allowed, source, folder):
    values = {}
    for key, value in table.items():
        near = difflib.get_close_matches(ELSEWHERE.get(key, key), allowed, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        need(key in allowed, f"{source}{key!r} is no key here (see train --help).{hint}")
        shown = key.replace("_", "-") if source == "--" else key
        values[key] = checked(KNOWN[key], value, source + shown)
        if key in PATHS and value not in ("", "none"):
            values[key] = os.path.normpath(folder / os.path.expanduser(value))
    return values

def read_config(path):
    with reading(path):
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
        need(isinstance(raw.get("teacher", []), list), f"{path}: expected [[teacher]].")
        tables = [dict(table) for table in raw.pop("teacher", [])]
        base = raw.pop("base", None)
        values, teachers = read_config(path.parent / base) if base else ({}, [])
    values |= check_keys(raw, KNOWN, f"{path}: ", path.parent)
    own = settings_between("context", "clip") + ["micro_batch"]
    tables = [check_keys(table, own, f"{path}, teacher {i}: ", path.parent)
              for i, table in enumerate(tables, 1)]
    places = itertools.zip_longest(teachers, tables, fillvalue={})
    return values, [below | table for below, table in places]

def read_settings(config, flags, teachers):
    """Return a run's settings, flags over config over base, and those of each teacher to train."""
    values, tables = read_config(config)
    given = {name: value for name, value in flags.items() if value is not None}
    values |= check_keys(given, KNOWN, "--", Path())
    if values.get("objective", "ce") == "ce":
        need(not teachers and not flags["teachers"], "--objective ce has no teacher: leave out "
             "--teachers and --teacher, or choose another objective.")
        values["teachers"] = 0
    if teachers:
        count = len({folder.resolve() for folder in teachers})
        need(count == len(teachers) <= 2 and flags["teachers"] in (None, count), "--teacher: "
             "expected one folder or two different ones, and --teachers to be their number.")
        values["teachers"] = count
        values["tokenizer"] = values.get("tokenizer") or str(teachers[0])
    shape = {}
    if values.get("init"):
        folder = Path(values["init"])
        given, V = from_hf_config(folder / "config.json")
        shape = {name: getattr(given, name) for name in settings_between("model_type", "dropout")}
        values["tokenizer"] = str(folder)                   # whose ids the weights know
        need(load_vocabulary(folder).size == V, f"--init: {folder} has {V:,} logits, which is "
             "more than a text can have tokens: expected as many.")
    settings = Settings(**values | shape)
    need(teachers or settings.teachers <= len(tables), f"--teachers {settings.teachers}: {config} "
         f"has {len(tables)} of [[teacher]]: add one, or name a folder with --teacher.")
    # a teacher is as the student, but for its own table and for how the student learns
    own = [*settings_between("objective", "teacher_steps"), "init", "checkpoints"]
    plain = {name: KNOWN[name].default for name in own}
    tables = [] if teachers else tables[:settings.teachers]
    steps = {"steps": settings.teacher_steps} if settings.teacher_steps else {}
    return settings, [Settings(**values | plain | table | steps) for table in tables]

def plan_runs(out, folders, settings, described, corpus):
    """Return the runs, the student last; a hash of what a teacher learns names its folder."""
    beside = Path(os.path.relpath(out.resolve().parent))
    runs = [Run("", folder, from_hf_config(folder / "config.json")[0], given=True)
            for folder in folders]
    for own in described:
        names = settings_between("vocab_size", "keep")
        names += ["eval_every", "dev_tokens"] * (own.keep == "best")
        facts = [[getattr(own, name) for name in names], corpus.digests]
        name = f"teacher-{own.model_type}-{digest(json.dumps(facts).encode())[:8]}"
        runs.append(Run("", beside / name, own))
    for i, run in enumerate(runs, 1):
        run.name = f"teacher {i}" if len(runs) > 1 else "teacher"
        if run.finished:
            model, vocabulary = load_model(run.out, "cpu")
            if len(model.head) > vocabulary.size:
                echo(f"{run.out}: those of its logits that have no token teach nothing.", err=True)
            need(fingerprint(vocabulary) == fingerprint(corpus.vocabulary), f"{run.out} has "
                 "another vocabulary than the student: both must share one tokenizer.")
    runs.append(Run("student" if runs else "model", out, settings, tuple(runs)))
    need(len({run.out.resolve() for run in runs}) == len(runs), "two models would be in one "
         "folder: expected teachers of different settings, and --out to be neither.")
    for path in [*folders, Path(settings.init or "/")]:
        need(not path.resolve().is_relative_to(out.resolve()),
             f"{path} would be in --out, which is written anew: choose another.")
    size = rank_and_size()[1]
    for run in runs:
        need(settings.context <= run.settings.positions, f"{run.name}: --context "
             f"{settings.context} is longer than what it takes, {run.settings.positions}.")
        need(run.settings.keep == "last" or len(corpus.dev) > run.settings.context,
             f"{run.name}: --keep best needs held-out text: name some with --dev.")
        rows = run.settings.batch_size
        need(run.given or rows % size == 0, f"{run.name}: {size} processes cannot share "
             f"--batch-size {rows} evenly: take another number of either.")
    return runs

def idle_flags(settings, flags, described):
    constants = (DIVERGENCES | {"alternate": []}).get(settings.objective, [])[1:]
    idle = settings_between("temperature" if settings.objective == "ce" else "fkl_weight", "gamma")
    idle += ["vocab_size"] * bool(settings.tokenizer) + ["teacher_steps"] * (not described)
    idle += ["tokenizer", *settings_between("model_type", "dropout")] if settings.init else []
    idle += ["beta_by"] * (settings.beta_end < 0)
    return ["--" + name.replace("_", "-") for name in dict.fromkeys(idle)
            if name not in constants and flags[name] is not None]

def print_results(runs, corpus, pairs, device):
    results, lines = {}, []
    for run in runs:
        loss = held_out_loss(load_model(run.out, device)[0], corpus.dev, runs[-1].settings)
        found = "" if loss is None else f", held-out loss {loss:.4f} nats a token"
        lines.append(f"{run.name:<9} {run.out}{found}")
        if pairs:
            scored = score_folder(run.out, device, pairs, "blimp", keep=not run.given)
            results[run.name] = summarise(*scored)
            found += f", {results[run.name]['accuracy']:.1%} of minimal pairs right"
        if not run.given:
            write_card(run, corpus, found)
    if pairs:
        echo(pairs_table(results, paradigms=False) + "\n")
    echo("\n".join(lines))

def choose_device(name):
    """Return cpu or cuda, set up for speed that costs no digit of a normal number."""
    found = torch.cuda.is_available()
    need(name != "cuda" or found, "--device cuda: this machine, or this build of torch, has none.")
    device = ("cuda" if found else "cpu") if name == "auto" else name
    torch.set_flush_denormal(True)              # numbers under 1e-38 are a hundred times slower
    # On AMD with AVX-512, oneDNN doubles MKL's speed, but slows "flash" attention by 2 to 5 times.
    cpu = Path("/proc/cpuinfo")
    if device == "cpu" and cpu.exists() and re.search("(?s)AMD.*avx512", cpu.read_text()):
        torch.backends.cuda.enable_flash_sdp(False)             # a CPU obeys this flag, too
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"    # allows it; below: is it used?
        a, b = torch.rand(2, 512, 512)
        exact = a.double() @ b.double()
        if (a @ b - exact).norm() > 1e-6 * exact.norm():
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    return device

class Cli(click.Group):
    """The commands. Wherever a file cannot be read or memory runs out, that is one sentence."""
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            echo("Stopped: what was finished is kept.", err=True)
            sys.exit(130)
        except OSError as error:
            raise ClickException(f"{error.filename or 'Writing failed'}: {error.strerror}.")
        except (MemoryError, RuntimeError) as error:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error.__context__, OSError):  # torch.save's own error hides the disk's
                raise ClickException(f"Writing failed: {error.__context__.strerror}.")
            need(not re.search("MemoryError|DefaultCPUAllocator", text), "out of memory: in "
                 "training, give a smaller --micro-batch (rows at once; 0 is all), which does the "
                 "job of activation checkpointing, or --chunk; else a smaller model or sample.")
            need(not re.search("gloo|nccl|device ordinal", text, re.I), "another process of this "
                 f"run has ended, or has no GPU ({text.splitlines()[0]}): start all of them again.")
            raise

def location(text):
    return Path(os.path.expanduser(text))       # a shell leaves the ~ of --out=~/run

device_option = option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
                       help="Where to compute.")
json_option = option("--json", "as_json", is_flag=True, help="Print JSON, not tables.")

@click.version_option("1.0", prog_name="ChooBaCa")
@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"],
                                        "show_default": True})
def cli():
    """Train a small language model, distil it from teachers, and score its grammar."""
    sys.stdout.reconfigure(errors="backslashreplace")       # a path may be no UTF-8

def join_processes(device):
    if "LOCAL_RANK" not in os.environ:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    click.get_current_context().call_on_close(dist.destroy_process_group)

@cli.command("train", short_help="Train a model, alone or from teachers.")
@option("-c", "--config", type=location, default=HOME / "configs/tiny.toml",
        show_default="configs/tiny.toml", help="TOML file of settings.")
@option("-o", "--out", type=location, help="The run's folder; its teachers are beside it.  "
        "[default: in runs/, named by config, objective, teachers and seed]")
@option("--teacher", "folders", type=location, multiple=True, help="A trained teacher, any "
        "Hugging Face LLaMA or GPT-2, in place of the config's; twice for two.")
@option("--resume", is_flag=True, help="Go on with interrupted runs from their checkpoints.")
@option("--overwrite", is_flag=True, help="Replace a run; the old one is gone at once.")
@option("--dry-run", is_flag=True, help="Train a tokenizer at most; say what would follow.")
@settings_flags
def train_command(config, out, folders, resume, overwrite, dry_run, **flags):
    """Train a model, alone or from teachers, which are trained first if they are not there yet.
    Example: python choobaca.py train --objective rkl --teachers 1"""
    overwrite = overwrite or dry_run            # which plans as if there were no run yet
    resume = resume and not overwrite           # to replace a run is to begin it again
    settings, described = read_settings(config, flags, folders)
    device = choose_device(settings.device)
    threads = 1 if settings.width < 128 else torch.get_num_threads()    # see data/results.md
    torch.set_num_threads(settings.threads or threads)
    for flag in idle_flags(settings, flags, described):
        echo(f"{flag} has no effect here.", err=True)
    name = f"{config.stem}-{settings.objective}-{settings.teachers}-seed{settings.seed}"
    out = out or Path("runs", name)
    names = {path.name for path in out.glob("*")}
    filled = [path for path in out.glob("[!.]*") if path.is_dir() or path.stat().st_size]
    need("run.json" in names and names & {"log.jsonl", "state.pt"} or not (filled or out.is_file()),
         f"{out} already holds files that are no run: choose another --out.")
    need(overwrite or resume or not names & {"model.safetensors", "run.json"}, f"{out} already "
         "holds a run: choose another --out, or --resume to go on, or add --overwrite.")
    small = Path(settings.text).resolve() == TINY       # any other text gets BLiMP, if it is there
    folder = Path(settings.pairs or (TINY / "blimp" if small else HOME / "data/blimp"))
    none = settings.pairs == "none" or not settings.pairs and not folder.exists()
    pairs = [] if none else read_pairs(folder, settings.sample)
    join_processes(device)
    corpus = read_corpus(settings, out.resolve().parent)
    runs = plan_runs(out, folders, settings, described, corpus)
    _, pairs = encode_pairs(corpus.vocabulary, pairs, min(run.settings.positions for run in runs))
    todo = [run for run in runs if not run.finished or overwrite and run is runs[-1]]
    plan = [f"text      {settings.text}: {corpus.words:,} words, {len(corpus.train):,} tokens, "
            f"{len(corpus.dev):,} held out, vocabulary {corpus.vocabulary.size:,}",
            f"pairs     {len(pairs):,} from {folder}" if pairs else "pairs     none: see --pairs"]
    for run in runs:
        what = describe_plan(run, corpus) if run in todo else "found, reusing it"
        plan.append(f"{run.name:<9} {run.out}: {what}")
        if run not in todo and not run.given:
            need_same(run, describe_run(run, corpus, device), resumed=False)
    if rank_and_size()[0] == 0:
        echo("\n".join(plan), err=not dry_run)
    if dry_run:
        return
    for run in todo:
        is_teacher = run is not runs[-1]            # it always goes on where it was stopped
        with locked_log(run.out, is_teacher, "run.json" in names) as log:
            if not run.finished or overwrite and not is_teacher:
                fit(run, corpus, device, log, resume or is_teacher)
    if rank_and_size()[0] == 0:
        print_results(runs, corpus, pairs, device)

@cli.command("eval-blimp")
@option("-m", "--model", "folder", type=location, help="A run, or any Hugging Face folder of "
        "a LLaMA or GPT-2.  [default: the newest finished run in runs/]")
@option("-d", "--data", type=location, help="Folder of minimal pairs, *.jsonl as BLiMP's or "
        "EWoK's, *.tsv or *.csv.  [default: in data/]")
@option("--suite", type=click.Choice(SUITES), default="blimp", help="Which pairs.")
@option("--rule", type=click.Choice(("2024", "2026")), default="2024", help="BabyLM's scoring.")
@option("--sample", type=IntRange(0), default=0, help="About so many pairs, evenly spread; 0: all.")
@device_option
@json_option
def eval_blimp_command(folder, data, suite, rule, sample, device, as_json):
    """Score a model on minimal pairs, for `compare` as well.
    Example: python choobaca.py eval-blimp --model runs/tiny-rkl-1-seed0"""
    if folder is None:
        finished = sorted(Path("runs").glob("*/model.safetensors"), key=os.path.getmtime)
        need(finished, "no finished run in runs/: name a model with --model, or run train first.")
        folder = finished[-1].parent
    kept = HOME / "data" / suite
    data = data or (kept if kept.exists() or suite != "blimp" else TINY / suite)
    pairs = read_pairs(data, sample, rule)
    suite = suite if rule == "2024" else f"{rule}-{suite}"
    result = summarise(*score_folder(folder, choose_device(device), pairs, suite, rule))
    found = {"model": str(folder), "data": str(data).removeprefix(f"{HOME}/"), **result}
    table = f"{folder} on {found['data']}, rule {rule}\n\n{pairs_table({'accuracy': result}, True)}"
    echo(json.dumps(found, indent=2) if as_json else table)

@cli.command("compare", short_help="Say whether a model is better than another, or lucky.")
@click.argument("first", type=location)
@click.argument("others", type=location, nargs=-1, required=True)
@option("--suite", default="blimp", help="By which scores; 2026-blimp: of --rule 2026.")
@json_option
def compare_command(first, others, suite, as_json):
    """Say whether other models are better than the first on the pairs that eval-blimp scored."""
    name = common_scores([first, *others], suite)
    names, base = read_scores(first / name)
    found, tables = [], []
    for folder in others:
        found_names, right = read_scores(folder / name)
        need(found_names == names, f"{folder / name} and {first / name} name other pairs: "
             "one of them is damaged: score the models again with eval-blimp.")
        rows = compare_scores(names, base, right)
        found.append({"first": str(first), "other": str(folder), "scores": name, "rows": rows})
        lines = [f"{folder} against {first}, by {name} (items: {len(names):,}, paradigms: "
                 f"{len({key[:2] for key in names}):,})\n\n{'mean score':<27} {'n':>6}  "
                 "first  other  difference, 95 % interval     verdict"]
        lines += ["{phenomenon:<27} {n:>6,} {first:6.1%} {other:6.1%} {difference:+7.2%} "
                  "({low:+8.2%} to {high:+8.2%})  {verdict}".format(**row) for row in rows]
        tables.append("\n".join(lines))
    tables.append("Better or worse: the 95 % interval leaves out 0, and more than five pairs "
                  "differ.\nWhere nothing differs, up to one row in twenty says so.")
    echo(json.dumps(found, indent=2) if as_json else "\n\n".join(tables))

@cli.command("sample")
@click.argument("run", type=location)
@option("--prompt", default="", show_default="nothing", help="How each text begins.")
@option("--tokens", default=100, type=IntRange(1),
        help="How many to add to a sample at most; with --out, in all or a batch more.")
@option("--temperature", default=1.0, type=click.FloatRange(0, 100),
        help="By which logits are divided; 0: always the most likely token.")
@option("--count", default=1, type=IntRange(1, 10_000), help="Samples.")
@option("--seed", default=0, type=IntRange(0, 2**63), help="Seed of the draws.")
@option("-o", "--out", type=location, help="Write --tokens tokens into a new folder of text.")
@device_option
def sample_command(run, prompt, tokens, temperature, count, seed, out, device):
    """Let a model write, a line a sample.
    With --out it writes a text to train on: sequence-level distillation (Kim and Rush 2016)."""
    if out:                             # if it cannot be, better now than after hours
        need(not [*out.glob("*")], f"{out} is already there: choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
    need(temperature == 0 or temperature >= 1e-3, "--temperature: expected 0, or 0.001 and more.")
    model, vocabulary = load_model(run, choose_device(device))
    eos = read_json(run / "config.json").get("eos_token_id")
    eos = eos if type(eos) is list else [eos]
    newline = vocabulary.tokenizer.encode("\n", add_special_tokens=False).ids[-1:]
    bare = bool(newline) and newline[0] in eos      # its text had no prefix, but line breaks
    start = newline if bare else [vocabulary.prefix_id]
    if prompt:
        prompt = prompt.encode(errors="replace").decode()
        ids = encode(vocabulary, [prompt], "none" if bare else "line")
        start = np.roll(ids, bare).tolist()         # a line break at its end goes to its front
    room = model.config.positions - len(start) + 1      # the last token drawn needs no position
    need(room > 0, f"--prompt has {len(start):,} tokens with the prefix: expected at most the "
         f"model's {model.config.positions:,} positions.")
    ends = [*newline, vocabulary.prefix_id]         # where a line ends: also at the model's eos
    ends += [i for i in eos if i in range(len(model.head))]
    rows = [start] * (256 if out else count)
    generator = torch.Generator(model.head.device).manual_seed(seed)
    lines = []
    with tqdm(total=tokens, desc="sampling", unit=" tokens", disable=not out) as bar:
        while bar.n < tokens:
            length = room if out else min(tokens, room)
            drawn = write_on(model, rows, ends, length, generator, temperature)
            texts = vocabulary.tokenizer.decode_batch([start + row for row in drawn])
            lines += [" ".join(text.split()) for text in texts]
            if not out:
                return echo("\n".join(lines))
            new = sum(len(row) + 1 for row in drawn if row)
            need(new, f"{run} writes nothing but empty lines: train it for longer.")
            bar.update(new)
    write_file(out / "sampled.train", "".join(line + "\n" for line in lines if line).encode())
    echo(f"{out / 'sampled.train'}: about {bar.n:,} tokens")

if __name__ == "__main__":
    cli()
