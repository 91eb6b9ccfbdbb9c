"""Generation with a cache of keys and values against LLaMA.generate, which computes the whole
window for each token; sampling against torch.multinomial; and what the timing script says of
its bytes.
"""
import pathlib

import pytest
import torch
import torch.nn.functional as F

import nanobit.checkpoint
import nanobit.generate
import time_decode
from conftest import double
from model import LLaMA, LlamaConfig
from nanobit.generate import generate
from quantizers import QuantLinear, rtn

ROOT = pathlib.Path(__file__).parent.parent
KINDS = {  # what differs from a dense model whose query heads share keys in pairs. At the first
    # position such a pair returns the same value twice, which the rotation turns into exact zeros:
    # a border of QuEST's even grids, where the sign of the last digit decides. These share none.
    "dense": {}, "all heads": dict(n_kv_head=4), "tied": dict(tied=True),
    "scaled rotary": dict(rope_theta=500.0, rope_scaling=(8.0, 1.0, 4.0, 6)),
    "wide heads": dict(head_dim=12), "activations": dict(a_bits=8, kv_bits=6),
    "packed head": {}, "tied packed head": dict(tied=True), "affine": {},
    "quest": dict(n_kv_head=4), "sparse": dict(n_kv_head=4), "fp4": {}, "joined": {},
    "joined affine": {}, "joined quest": dict(n_kv_head=4)}
ROUNDED = ("activations", "quest", "sparse", "fp4", "joined quest")    # kinds with such activations

def make(kind):
    torch.manual_seed(3)
    m = LLaMA(LlamaConfig(**dict(vocab_size=61, n_layer=2, n_embd=32, n_head=4, n_kv_head=2,
                                 n_hidden=40, seq_len=12) | KINDS[kind])).eval()
    for p in m.parameters():                           # attention that is far from uniform
        torch.nn.init.normal_(p, *((0, 0.3) if p.dim() == 2 else (1, 0.2)))
    if "packed head" in kind:
        nanobit.checkpoint.pack_embedding(m, 8)
    if "affine" in kind:
        m.replace_linears(lambda _, l: QuantLinear.affine(*rtn(l.weight.detach(), 3, 8), 3, 8))
    elif kind.split()[-1] in ("quest", "sparse", "fp4"):
        grid = kind if kind in ("sparse", "fp4") else "uniform"
        m.replace_linears(lambda _, l: QuantLinear.quest(l.weight.detach(), 4, 4, grid))
    return nanobit.generate.prepare(m) if kind.startswith("joined") else m

def prompt(n, batch=2):
    return torch.randint(61, (batch, n), generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 11, 12, 13, 20])
def test_greedy_text_is_the_same_with_and_without_the_cache(kind, length, in_float64):
    """From prompts shorter and longer than the window of 12, across its end."""
    m, x = double(make(kind)), prompt(length)
    want = m.generate(x, 10, temperature=0)
    got = generate(m, x, 10, temperature=0)
    assert torch.equal(got, want)
    assert "tied" in kind or len(want[:, length:].unique()) > 3               # not one loop

def cached_logits(m, x):
    """Logits (B, 8, vocab) of 8 steps with the cache, and of the same tokens all at once."""
    seen = []
    def choose(logits):
        seen.append(logits)
        return logits.argmax(-1, keepdim=True)
    choose.draw = lambda: None
    tokens = [t.clone() for t in nanobit.generate.decode(m, x, 8, choose)]
    return torch.stack(seen, 1), m(torch.cat([x, *tokens[:-1]], 1))[0][:, x.size(1) - 1:]

@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ROUNDED])
def test_cached_logits_are_those_of_the_whole_sequence(kind):
    """In float32, where nothing is rounded to a grid."""
    got, want = cached_logits(make(kind), prompt(4))
    assert got.dtype == torch.float32 and torch.allclose(got, want, atol=1e-5 * want.abs().max())

@torch.no_grad()
@pytest.mark.parametrize("kind", ROUNDED)
def test_cached_logits_of_rounded_activations_are_those_of_the_whole_sequence(kind, in_float64):
    got, want = cached_logits(double(make(kind)), prompt(4))
    assert got.dtype == torch.float64 and torch.allclose(got, want, atol=1e-10)

def test_the_cache_takes_attention_in_any_memory_order(monkeypatch, in_float64):
    """A GPU's kernels return (B, nh, T, hs) with the heads inside: no view splits these."""
    m, x = double(make("dense")), prompt(5)
    want, sdpa = generate(m, x, 6, temperature=0), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (
        sdpa(*a, **k).transpose(1, 2).contiguous().transpose(1, 2)))
    assert torch.equal(generate(m, x, 6, temperature=0), want)

def test_a_joined_model_computes_what_its_linears_did(in_float64):
    for kind in ("dense", "affine", "quest"):
        m, x = double(make(kind)), prompt(9)
        want = m(x)[0].detach()
        names = nanobit.generate.prepare(m).state_dict()
        assert torch.allclose(m(x)[0], want, atol=1e-10)
        assert any(".wq.linear." in n for n in names) and not any(".wk." in n for n in names)

def test_unlike_linears_are_not_joined(in_float64):
    m = double(make("dense"))
    w = m.blocks[0].attn.wk.weight.detach()
    m.blocks[0].attn.wk = QuantLinear.affine(*rtn(w, 4), 4)
    m.blocks[1].mlp.w_up = QuantLinear.quest(m.blocks[1].mlp.w_up.weight.detach(), 4, 4)
    m.blocks[1].mlp.w_gate = QuantLinear.quest(m.blocks[1].mlp.w_gate.weight.detach(), 3, 4)
    x = prompt(5)
    want = m(x)[0].detach()
    assert torch.allclose(nanobit.generate.prepare(m)(x)[0], want, atol=1e-10)
    assert isinstance(m.blocks[1].attn.wq, nanobit.generate.Joined)
    assert m.blocks[0].attn.wk.spec["bits"] == 4 and m.blocks[1].mlp.w_up.spec["bits"] == 4

@pytest.mark.parametrize("top_k", [None, 5])
def test_a_seed_gives_the_same_text_with_and_without_the_cache(top_k, in_float64):
    m, x = double(make("dense")), prompt(3)
    def draw(seed, cached):
        generator = torch.Generator().manual_seed(seed)
        write = generate if cached else LLaMA.generate
        return write(m, x, 15, 1.5, top_k, generator), generator.get_state()
    (a, state), (b, other) = draw(1, True), draw(1, False)
    assert torch.equal(a, b) and torch.equal(state, other)
    assert not torch.equal(a, draw(2, True)[0])

@pytest.mark.parametrize("top_k", [None, 61, 7])
def test_choices_are_those_of_multinomial(top_k):
    """The largest p / noise, of the same noise; a tie to five digits may go either way."""
    m, logits, g = make("dense"), torch.randn(500, 61), torch.Generator()
    choose = nanobit.generate.Chooser(m, 500, 0.7, top_k, g.manual_seed(4))
    choose.draw()
    kept = logits.masked_fill(logits < logits.topk(top_k or 61).values[:, -1:], -torch.inf)
    p = (kept / 0.7).softmax(-1)
    ratio = p.double() / torch.empty_like(p).exponential_(generator=g.manual_seed(4))
    for chosen in (torch.multinomial(p, 1, generator=g.manual_seed(4)), choose(logits)):
        assert (ratio.gather(1, chosen) >= (1 - 1e-5) * ratio.amax(1, keepdim=True)).all()

def test_top_k_keeps_so_many_also_of_equal_logits():
    choose = nanobit.generate.Chooser(make("dense"), 400, 1.0, 3, torch.Generator().manual_seed(4))
    choose.draw()
    assert len(choose(torch.zeros(400, 61)).unique()) == 3

@pytest.mark.parametrize("bits", [16, 4, 2])
def test_the_bytes_of_a_step_are_those_of_weights_head_norms_and_cache(bits):
    m = time_decode.random_weights("tiny", bits, 5, "cpu", torch.float32)
    assert time_decode.measure(nanobit.generate.prepare(m), 5, "cpu") > 0
    weights = 3 * (4 * 256 * 256 + 3 * 256 * 768)
    group = 2 + bits / 8                               # a scale and a zero point
    size = weights * 4 if bits == 16 else weights * bits / 8 + weights // 128 * group
    size += 4 * 32000 * 256 + 4 * 7 * 256 + 4 * 2 * 3 * 256 * 18
    assert time_decode.bytes_of_a_step(m, 18) == size
