"""Generation with a cache of keys and values against generation without one, which computes the
whole window for each token; sampling against torch.multinomial; the decoding kernels, in Triton's
interpreter, against the model's own operations; and `model.py sample` without a checkpoint.
"""
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model
from conftest import Launch, double
from model import LLaMA, LlamaConfig, UsageError
from quantizers import QuantLinear, rtn

ROOT = pathlib.Path(__file__).parent.parent
KINDS = {  # what differs from a dense model whose query heads share keys in pairs. At the first
    # position such a pair returns the same value twice, which the rotation turns into exact zeros:
    # a border of QuEST's even grids, where the sign of the last digit decides. These share none.
    "dense": {}, "all heads": dict(n_kv_head=4), "tied": dict(tied=True),
    "scaled rotary": dict(rope_theta=500.0, rope_scaling=(8.0, 1.0, 4.0, 6)),
    "wide heads": dict(head_dim=12), "activations": dict(a_bits=8, kv_bits=6),
    "affine": {}, "quest": dict(n_kv_head=4), "sparse": dict(n_kv_head=4), "fp4": {}, "joined": {},
    "joined affine": {}, "joined quest": dict(n_kv_head=4)}
ROUNDED = ("activations", "quest", "sparse", "fp4", "joined quest")    # kinds with such activations

def make(kind):
    torch.manual_seed(3)
    m = LLaMA(LlamaConfig(**dict(vocab_size=61, n_layer=2, n_embd=32, n_head=4, n_kv_head=2,
                                 n_hidden=40, seq_len=12) | KINDS[kind])).eval()
    for p in m.parameters():                           # attention that is far from uniform
        torch.nn.init.normal_(p, *((0, 0.3) if p.dim() == 2 else (1, 0.2)))
    if "affine" in kind:
        m.replace_linears(lambda _, l: QuantLinear.affine(*rtn(l.weight.detach(), 3, 8), 3, 8))
    elif kind.split()[-1] in ("quest", "sparse", "fp4"):
        grid = kind if kind in ("sparse", "fp4") else "uniform"
        m.replace_linears(lambda _, l: QuantLinear.quest(l.weight.detach(), 4, 4, grid))
    return m.for_decoding() if kind.startswith("joined") else m

def prompt(n, batch=2):
    return torch.randint(61, (batch, n), generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 11, 12, 13, 20])
def test_greedy_text_is_the_same_with_and_without_the_cache(kind, length, in_float64):
    """From prompts shorter and longer than the window of 12, across its end."""
    m, x = double(make(kind)), prompt(length)
    want = m.generate(x, 10, temperature=0, cached=False)
    got = m.generate(x, 10, temperature=0)
    assert torch.equal(got, want)
    assert kind == "tied" or len(want[:, length:].unique()) > 3               # not one loop

def cached_logits(m, x):
    """Logits (B, 8, vocab) of 8 steps with the cache, and of the same tokens all at once."""
    seen = []
    def choose(logits):
        seen.append(logits)
        return logits.argmax(-1, keepdim=True)
    choose.draw = lambda: None
    tokens = [t.clone() for t in model.decode(m, x, 8, choose)]
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
    want, sdpa = m.generate(x, 6, temperature=0), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (
        sdpa(*a, **k).transpose(1, 2).contiguous().transpose(1, 2)))
    assert torch.equal(m.generate(x, 6, temperature=0), want)

def test_a_joined_model_computes_what_its_linears_did(in_float64):
    for kind in ("dense", "affine", "quest"):
        m, x = double(make(kind)), prompt(9)
        want = m(x)[0].detach()
        names = m.for_decoding().state_dict()
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
    assert torch.allclose(m.for_decoding()(x)[0], want, atol=1e-10)
    assert isinstance(m.blocks[1].attn.wq, model.Joined)
    assert m.blocks[0].attn.wk.spec["bits"] == 4 and m.blocks[1].mlp.w_up.spec["bits"] == 4

@pytest.mark.parametrize("top_k", [None, 5])
def test_a_seed_gives_the_same_text_with_and_without_the_cache(top_k, in_float64):
    m, x = double(make("dense")), prompt(3)
    def draw(seed, cached):
        generator = torch.Generator().manual_seed(seed)
        return m.generate(x, 15, 1.5, top_k, generator, cached), generator.get_state()
    (a, state), (b, other) = draw(1, True), draw(1, False)
    assert torch.equal(a, b) and torch.equal(state, other)
    assert not torch.equal(a, draw(2, True)[0])

@pytest.mark.parametrize("top_k", [None, 61, 7])
def test_choices_are_those_of_multinomial(top_k):
    """The largest p / noise, of the same noise; a tie to five digits may go either way."""
    m, logits, g = make("dense"), torch.randn(500, 61), torch.Generator()
    choose = model.Chooser(m, 500, 0.7, top_k, g.manual_seed(4))
    choose.draw()
    kept = logits.masked_fill(logits < logits.topk(top_k or 61).values[:, -1:], -torch.inf)
    p = (kept / 0.7).softmax(-1)
    ratio = p.double() / torch.empty_like(p).exponential_(generator=g.manual_seed(4))
    for chosen in (torch.multinomial(p, 1, generator=g.manual_seed(4)), choose(logits)):
        assert (ratio.gather(1, chosen) >= (1 - 1e-5) * ratio.amax(1, keepdim=True)).all()

def test_top_k_keeps_so_many_also_of_equal_logits():
    choose = model.Chooser(make("dense"), 400, 1.0, 3, torch.Generator().manual_seed(4))
    choose.draw()
    assert len(choose(torch.zeros(400, 61)).unique()) == 3

KERNELS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.nn.functional as F
import model, test_decode
from kernels import add_norm, matvec, rope_attention, silu_mul
torch.manual_seed(0)
for N, C in ((61, 256), (7, 1376), (2, 5000)):         # inputs in one part, padded, in two parts
    x, w = torch.randn(1, C).half(), torch.randn(N, C).half()
    want = x.double() @ w.double().t()
    assert (matvec(x, w) - want).norm() < 1e-3 * want.norm(), (N, C)
for H, KV, D, S, dtype, tol in (
        (4, 2, 32, 200, torch.float32, 1e-5), (3, 3, 64, 300, torch.float32, 1e-5),
        (4, 1, 32, 300, torch.float16, 4e-3)):         # one program a head, and four
    c, B = model.LlamaConfig(61, 1, H * D, H, KV, 200, S), 2
    m = model.LLaMA(c, dtype)
    x, delta = torch.randn(2, B, H * D).to(dtype)
    norm = torch.nn.init.normal_(m.norm.weight, 1, 0.2) is not None and m.norm
    for d in (None, delta):
        total, h = add_norm(x, d, norm)
        want = x if d is None else x + d
        assert torch.equal(total, want) and torch.allclose(h, norm(want), atol=tol)
    y = torch.randn(B, 2 * 200).to(dtype)
    assert torch.allclose(silu_mul(y), F.silu(y[:, :200]) * y[:, 200:], atol=tol)
    cos, sin = model.rope_tables(S, D, 1e4, "cpu")
    for at in (0, 1, 64, 127, 128, S - 1):
        a, b = (model.Cache(m, B, S) for _ in "ab")
        a.keys.normal_(), a.values.normal_()
        b.keys.copy_(a.keys), b.values.copy_(a.values)
        a.at = b.at = torch.tensor([at])
        b.mask = torch.arange(S) <= b.at.unsqueeze(1)
        qkv = torch.randn(B, (H + 2 * KV) * D).to(dtype)
        q, k, v = (t.view(B, 1, -1, D).transpose(1, 2)
                   for t in qkv.split([H * D, KV * D, KV * D], 1))
        q, k = (model.apply_rope(t, cos[b.at], sin[b.at]) for t in (q, k))
        want = b.attend(q, k, v).transpose(1, 2).reshape(B, -1)
        got = rope_attention(qkv, cos, sin, a)
        assert torch.allclose(got, want, atol=tol), (H, KV, at, (got - want).abs().max())
        assert torch.allclose(a.keys, b.keys, atol=tol) and torch.equal(a.values, b.values)
        assert not a.tickets.any()
m, x, logits = test_decode.make("joined"), test_decode.prompt(3), []
def choose(y):                                         # the first run's tokens, also in the second
    logits.append(y)
    return logits[(len(logits) - 1) % 6].argmax(-1, keepdim=True)
choose.draw = lambda: None
list(model.decode(m, x, 6, choose))
model.has_kernels = lambda m: True                     # the whole step through fast_step
list(model.decode(m, x, 6, choose))
assert torch.allclose(torch.stack(logits[6:]), torch.stack(logits[:6]), atol=2e-5)
"""

def test_decoding_kernels_equal_the_operations_they_replace():
    pytest.importorskip("triton", "3.5")
    code = KERNELS.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton 3.6's interpreter cannot loop up to a loaded value with this NumPy")
    assert done.returncode == 0, done.stderr[-2000:]

def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

def attend(kernels, S):
    """Attention of 32 query and 8 key heads to S positions."""
    cache = SimpleNamespace(keys=half(1, 8, S, 128), values=half(1, 8, S, 128), at=torch.zeros(1),
                            tickets=torch.zeros(32))
    kernels.rope_attention(half(1, 48 * 128), torch.zeros(S, 128), torch.zeros(S, 128), cache)

CALLS = {  # what launches each kernel, for one token of a layer of 4096 channels
    "_add_norm": lambda k: k.add_norm(half(1, 4096), half(1, 4096), model.RMSNorm(4096, 1e-5)),
    "_silu_mul": lambda k: k.silu_mul(half(1, 2 * 11008)),
    "_matvec": lambda k: k.matvec(half(1, 4096), half(4096, 4096)),
    "_matvec, wide": lambda k: k.matvec(half(1, 11008), half(4096, 11008)),
    "_rope_attention": lambda k: attend(k, 256), "_rope_attention, long": lambda k: attend(k, 257)}
DECODED = {"_decode": (2, 14336, 4096), "_decode, wide": (4, 4096, 11008)}     # bits, shape

@pytest.mark.parametrize("case", [*CALLS, *DECODED])
@pytest.mark.parametrize("overlap", [False, True])
def test_decoding_kernels_compile_for_an_h100_without_spilling(case, overlap, tmp_path,
                                                               monkeypatch):
    """And, where kernels overlap, each starts the next, then reads ahead, waits, reads the rest."""
    triton = pytest.importorskip("triton", "3.5")
    import kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    name = case.split(",")[0]
    kernel = getattr(kernels, name)
    for switch in ("ASM", "HOPPER"):
        monkeypatch.setattr(kernels, switch, True)
    monkeypatch.setattr(kernels, "PDL", overlap)
    if case in DECODED:
        bits, O, C = DECODED[case]
        w = kernels.LowBit(range(O // 16), None, None, bits, 128, (O, C))
        planned, _, sizes, options = kernels.plan(1, w)
        assert planned is kernel
        options.pop("launch_pdl", None)
    else:
        launch = Launch(kernel)
        monkeypatch.setattr(kernels, name, launch)
        CALLS[case](kernels)
        sizes, options = launch.constants, launch.options
    kinds = (dict.fromkeys(("C", "F", "M", "MASK", "N", "O", "S"), "i32")
             | dict.fromkeys(("grid", "high", "tickets", "words"), "*i32")
             | dict.fromkeys(("cos", "parts", "sin", "weight"), "*fp32")
             | dict(at="*i64", eps="fp32", scale="fp32") | dict.fromkeys(sizes, "constexpr"))
    signature = {n: kinds.get(n, "*bf16") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (n, kind) in enumerate(signature.items())
               if kind[0] == "*" or kind == "i32" and n != "M"}
    code = triton.compile(ASTSource(kernel, signature, sizes, aligned),
                          target=GPUTarget("cuda", 90, 32), options=options)
    (tmp_path / "cubin").write_bytes(code.asm["cubin"])
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    use = subprocess.run([tool, "--dump-resource-usage", tmp_path / "cubin"], text=True, check=True,
                         capture_output=True).stdout
    assert "LOCAL:0" in use and "STACK:0" in use
    order = re.findall(r"griddepcontrol\.\w+|ld\.global", code.asm["ptx"])
    start, wait = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
    assert (order.count(start), order.count(wait)) == (overlap, overlap)
    if overlap and name != "_silu_mul":
        assert order.index("ld.global") < order.index(wait) > order.index(start)

@pytest.mark.parametrize("bits", [16, 4, 2])
def test_speed_of_random_weights_says_its_bytes(capsys, bits):
    model.sample_checkpoint(["--size", "tiny", "--bits", str(bits), "--tokens", "5", "--device",
                             "cpu", "--dtype", "float32"])
    out = capsys.readouterr().out
    weights = 3 * (4 * 256 * 256 + 3 * 256 * 768)
    size = weights * 4 if bits == 16 else weights * bits / 8 + weights // 128 * 5
    size += 4 * 32000 * 256 + 4 * 7 * 256 + 4 * 2 * 3 * 256 * (8 + 8 + 2)   # head, norms, cache
    assert f"{size / 1e9:.3f} GB a token" in out and "tokens/s" in out

@pytest.mark.parametrize("flags", [[], ["base.pt", "--size", "tiny"]])
def test_sample_takes_a_checkpoint_or_a_size(flags):
    with pytest.raises(UsageError, match="sample needs a checkpoint, or else --size"):
        model.sample_checkpoint([*flags, "--device", "cpu"])
