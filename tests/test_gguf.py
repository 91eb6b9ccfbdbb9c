"""GGUF files, against the package gguf and transformers.

gguf's own decoder has to give each packed weight exactly, in llama.cpp's order of rows, and
transformers has to give the packed model's logits in float32. Tokenizers are read back by
transformers too. Skipped where the packages are not installed.
"""
import json
import math
import os
import pathlib
import resource
import sys

import pytest
import torch

import nanobit.checkpoint
from conftest import TEXT, call, check_refused, save_model as save
from model import LLaMA, LlamaConfig
from nanobit.gguf_tokenizer import PRE, SAMPLE, cut_by, find_pre
from nanobit.tokenizer import PATTERN, make_tokenizer, train_bpe
from quantizers import QuantLinear, rtn

transformers = pytest.importorskip("transformers", minversion="5")
gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
import gguf.quants                                                     # noqa: E402

@pytest.fixture(autouse=True)
def work(own_folder):
    return own_folder

def tiny(width=64, tied=False, n_kv_head=2, **more):
    """One block of random weights."""
    m = LLaMA(LlamaConfig(257, 1, width, 2, n_kv_head, width + 32 if width == 64 else width, 32,
                          tied=tied, **more)).eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, *((0, 0.2) if p.dim() == 2 else (1, 0.2)))
    return m

def affine(bits, group_size=-1, symmetric=True, a_bits=16):
    """What packs a linear, with scales that float16 holds."""
    def quantize(_, linear):
        q, scale, zero_point = rtn(linear.weight.detach(), bits, group_size, symmetric, mse=False)
        scale = scale.half().float()
        return QuantLinear.affine(q, scale, zero_point, bits, group_size, a_bits)
    return quantize

def export(capsys, target="m.gguf"):
    """Export m.pt -> what is printed."""
    status, out, err = call(capsys, f"model.py export m.pt {target} --format gguf")
    assert status == 0 and err == "", err
    assert f"wrote {target} (--format gguf)" in out
    return out

def read(path="m.gguf"):
    """({name: (kind, floats)}, {key: value}) of a file, as the package gguf reads it."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for t in reader.tensors:
        tensors[t.name] = t.tensor_type.name, torch.tensor(gguf.quants.dequantize(t.data,
                                                                                  t.tensor_type))
    return tensors, {key: field.contents() for key, field in reader.fields.items()}

LINEARS = {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
           "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down"}

def pairs_side_by_side(w, heads):
    """The rows of a head in llama.cpp's order: 0, n/2, 1, n/2 + 1 ..."""
    n = len(w) // heads
    order = [h * n + i + half for h in range(heads) for i in range(n // 2) for half in (0, n // 2)]
    return w[order]

@torch.no_grad()
def check_file(m, kinds, tolerance=1e-4, same=True):
    """Are the linears of these kinds, and of just the packed weights? Are the logits the same?"""
    tensors, _ = read()
    found = set()
    for name, linear in m.linears():
        _, i, _, part = name.split(".")
        kind, w = tensors[f"blk.{i}.{LINEARS[part]}.weight"]
        want = linear.weight() if isinstance(linear, QuantLinear) else linear.weight
        if part in ("wq", "wk"):
            want = pairs_side_by_side(want, m.config.n_head if part == "wq" else m.config.n_kv_head)
        assert torch.equal(w, want) or not same
        found.add(kind)
    assert found == kinds
    assert ("output.weight" in tensors) == (not m.config.tied)

    auto = transformers.AutoModelForCausalLM.from_pretrained
    theirs = auto(".", gguf_file="m.gguf", dtype=torch.float32).eval()
    x = torch.randint(m.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    got, want = theirs(x).logits, m(x)[0]
    assert ((got - want).norm() / want.norm()).item() < tolerance

# ---- Every grid -------------------------------------------------------------------------------

# Symmetric integers of 4 bits are -8..7. Of 3 bits with zero points in 0..7 they are -7..7.
KINDS = {(bits, True): "Q4_0" if bits <= 4 else "Q8_0" for bits in range(1, 9)}
KINDS |= {(bits, False): "Q4_0" if bits <= 3 else "Q8_0" for bits in range(1, 8)}
KINDS[4, False] = "Q4_1"

@pytest.mark.parametrize("bits, symmetric", KINDS)
@pytest.mark.parametrize("group_size, tied, n_kv_head", [(-1, False, 2), (32, True, 1)])
def test_gguf_and_transformers_read_the_packed_model(capsys, bits, symmetric, group_size, tied,
                                                     n_kv_head):
    m = tiny(64, tied, n_kv_head)
    save(m.replace_linears(affine(bits, group_size, symmetric)))
    out = export(capsys)
    kind = KINDS[bits, symmetric]
    assert f"linears as {kind}, " in out
    rounded = kind == "Q4_1"                           # its 16-bit minimum
    assert ("Q4_1's minima are float16" in out) == rounded and "scales" not in out
    check_file(m, {kind}, 5e-3 if rounded else 1e-4, not rounded)

@pytest.mark.parametrize("group_size", [-1, 256])
def test_three_levels_are_tq2_0(capsys, group_size):
    m = tiny(256)
    def ternary(_, linear):
        q = torch.randint(-1, 2, linear.weight.shape)
        scale = linear.weight.detach().abs().amax(1, keepdim=True).half().float()
        return QuantLinear.affine(q, scale, None, 2, group_size)
    save(m.replace_linears(ternary))
    assert "TQ2_0, 2.062 bits per weight" in export(capsys)
    check_file(m, {"TQ2_0"})

@pytest.mark.parametrize("bits, grid, kind", [
    (1.58, "uniform", "TQ2_0"), (2, "uniform", "Q4_0"), (3, "uniform", "Q4_0"),
    (4, "uniform", "Q8_0"), (4, "fp4", "Q8_0"), (2, "sparse", "Q4_0")])
def test_quests_grids_without_the_rotation_are_integers_too(capsys, bits, grid, kind):
    """(q + 1/2) scale = (2q + 1) scale/2, so b bits need b + 1."""
    m = tiny(256)
    def quest(_, linear):
        packed = QuantLinear.quest(linear.weight.detach(), bits, 16, grid, rotated=False)
        packed.scale = packed.scale.half().float()
        return packed
    save(m.replace_linears(quest))
    export(capsys)
    check_file(m, {kind})

def test_each_layer_gets_the_kind_that_it_needs(capsys):
    m = tiny()
    save(m.replace_linears(lambda name, linear: affine(8 if "wo" in name else 4)(name, linear)))
    assert "linears as Q4_0 and Q8_0, " in export(capsys)
    check_file(m, {"Q4_0", "Q8_0"})

def test_a_dense_model_keeps_its_floats_in_as_few_bits_as_hold_them(capsys):
    m = tiny()
    m.embed.weight.data = m.embed.weight.data.bfloat16().float() * 2**-20      # below float16's
    m.blocks[0].mlp.w_up.weight.data = m.blocks[0].mlp.w_up.weight.data.half().float()
    save(m)
    assert "all weights as BF16 and F16 and F32" in export(capsys)
    check_file(m, {"F16", "F32"})
    tensors, _ = read()
    kind, w = tensors["token_embd.weight"]
    assert kind == "BF16" and torch.equal(w, m.embed.weight)
    assert tensors["blk.0.attn_norm.weight"][0] == "F32"

@pytest.mark.parametrize("bits, code, zero_point, kind", [
    (3, 0, 7, "Q4_0"), (8, 255, 128, "Q8_0"), (8, 0, 128, "Q8_0"), (9, -128, None, "Q8_0"),
    (4, 7, 15, "Q4_0"), (4, 6, 15, "Q4_1"), (4, 15, 8, "Q4_0"), (4, 15, 7, "Q4_1")])
def test_the_ends_of_the_ranges(capsys, bits, code, zero_point, kind):
    m = tiny()
    save(m.replace_linears(constant(bits, code, zero_point)))
    export(capsys)
    check_file(m, {kind})                              # these minima are float16

# ---- Embedding and head -----------------------------------------------------------------------

def table(data, kind):
    """(integers (V, C), scales (V, B)) of Q8_0's or Q4_0's bytes, by llama.cpp's layout."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = torch.tensor(data).view(len(data), -1, size)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    body = blocks[..., 2:]
    if kind == "Q4_0":
        return (torch.cat([body & 15, body >> 4], -1).int() - 8).flatten(1), scales
    return body.contiguous().view(torch.int8).int().flatten(1), scales

@pytest.mark.parametrize("bits, kind", [(8, "Q8_0"), (4, "Q4_0")])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_embedding_and_head_keep_their_integers_and_scales(capsys, bits, kind, tied):
    m = tiny(64, tied).replace_linears(affine(4))
    weights = {"token_embd.weight": m.embed.weight.detach(),
               "output.weight": m.head.weight.detach()}
    nanobit.checkpoint.pack_embedding(m, bits)
    save(m)
    out = export(capsys)
    assert f"embedding and head as {kind}; the rest as F32" in out and "scales" not in out
    assert "linears as Q4_0, 4.500 bits per weight" in out
    check_file(m, {"Q4_0"})

    # The rounding of each row, as pack_embedding makes it, is in the file untouched.
    found = {t.name: t for t in gguf.GGUFReader("m.gguf").tensors}
    assert ("output.weight" in found) == (not tied)
    for name, w in weights.items():
        if name in found:
            want = rtn(w, bits, symmetric=True)
            q, scales = table(found[name].data, kind)
            assert found[name].tensor_type.name == kind and torch.equal(q, want.q.int())
            assert torch.equal(scales, want.scale.half().expand(257, 2))

@pytest.mark.parametrize("part, kinds", [("embed", "F32 and Q8_0"), ("head", "Q8_0 and F32")])
def test_a_matrix_with_scales_that_are_no_float16_becomes_floats(capsys, part, kinds):
    m = tiny().replace_linears(affine(4))
    getattr(m, part).weight.data *= 1e-7               # scales of 1e-9, which float16 makes 0
    nanobit.checkpoint.pack_embedding(m, 8)
    save(m)
    assert f"embedding and head as {kinds}; the rest as F32" in export(capsys)
    check_file(m, {"Q4_0"})
    tensors, _ = read()
    assert torch.equal(tensors["token_embd.weight"][1], m.embed.weight())
    assert torch.equal(tensors["output.weight"][1], m.head.weight())

def test_rows_that_are_no_whole_blocks_become_floats(capsys):
    """Linears of 16 inputs would be refused; these are floats."""
    m = LLaMA(LlamaConfig(257, 1, 16, 2, 2, 32, 32)).eval()
    nanobit.checkpoint.pack_embedding(m, 8)
    save(m)
    assert "all weights as F32" in export(capsys)
    assert torch.equal(read()[0]["token_embd.weight"][1], m.embed.weight())

def test_the_card_counts_packed_embedding_and_head(capsys):
    m = tiny()
    count = sum(p.numel() for p in m.parameters())
    m.replace_linears(affine(4))
    nanobit.checkpoint.pack_embedding(m, 8)
    save(m)
    export(capsys, "new")
    assert f"parameters: {count:,}, of which" in pathlib.Path("new/README.md").read_text()

# ---- Shapes and scales ------------------------------------------------------------------------

def test_heads_that_do_not_divide_the_width(capsys):
    m = tiny(64, head_dim=48)
    save(m.replace_linears(affine(4)))
    export(capsys)
    check_file(m, {"Q4_0"})

def test_scales_that_are_no_float16_are_rounded_and_it_is_said(capsys):
    def quest(_, linear):                              # its scales stay float32
        return QuantLinear.quest(linear.weight.detach(), 2, 16, rotated=False)

    m = tiny()
    save(m.replace_linears(quest))
    out = export(capsys)
    assert "note: GGUF's scales are float16" in out
    percent = float(out.split("change by up to ")[1].split(" %")[0])
    scales = torch.cat([linear.scale.flatten() for _, linear in m.linears()])
    largest = ((scales.half().double() / scales.double()) - 1).abs().max().item()
    assert percent == pytest.approx(100 * largest, rel=0.06) and 0 < percent < 100 * 2**-11
    check_file(m, {"Q4_0"}, 1e-3, same=False)

def test_llama_3s_scaling_of_positions_divides_the_frequencies(capsys):
    """The divisors as llama.cpp's converter computes them."""
    factor, low, high, length = 8.0, 1.0, 4.0, 64.0
    m = tiny(256, rope_scaling=(factor, low, high, length), rope_theta=500.0)
    save(m)
    assert "transformers reads GGUF without rope_freqs" in export(capsys)
    want = []
    for i in range(0, 128, 2):
        wave = 2 * math.pi * 500.0 ** (i / 128)
        smooth = (length / wave - low) / (high - low)
        if wave < length / high:
            want.append(1.0)
        elif wave > length / low:
            want.append(factor)
        else:
            want.append(1 / ((1 - smooth) / factor + smooth))
    kind, got = read()[0]["rope_freqs.weight"]
    assert kind == "F32" and 1 < len(set(want)) and (got - torch.tensor(want)).abs().max() < 1e-5

def test_the_metadata_says_the_shape(capsys):
    m = tiny(64, n_kv_head=1, rope_theta=5000.0, norm_eps=1e-6)
    save(m.replace_linears(affine(4)))
    export(capsys)
    _, keys = read()
    want = {"context_length": 32, "embedding_length": 64, "block_count": 1, "vocab_size": 257,
            "feed_forward_length": 96, "attention.head_count": 2, "attention.head_count_kv": 1,
            "attention.key_length": 32, "rope.dimension_count": 32, "rope.freq_base": 5000.0,
            "attention.layer_norm_rms_epsilon": pytest.approx(1e-6)}
    assert {name: keys[f"llama.{name}"] for name in want} == want
    assert keys["general.architecture"] == "llama" and keys["general.name"] == "m"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0

# ---- What does not fit ------------------------------------------------------------------------

def vector(_, linear):
    w = linear.weight.detach()
    codes = torch.zeros(len(w), w.size(1) // 4, 1, dtype=torch.int64)
    return QuantLinear.vq(codes, torch.ones(1, 16, 4), torch.ones(len(w)))

def constant(bits, code, zero_point):
    def quantize(_, linear):
        q = torch.full(linear.weight.shape, code)
        zeros = None if zero_point is None else torch.full((len(q), 1), zero_point)
        return QuantLinear.affine(q, torch.ones(len(q), 1), zeros, bits)
    return quantize

def large(_, linear):
    q = torch.zeros(linear.weight.shape)
    return QuantLinear.affine(q, torch.full((len(q), 1), 7e4), None, 4)

def large_minima(_, linear):
    q = torch.zeros(linear.weight.shape)
    return QuantLinear.affine(q, torch.full((len(q), 1), 6e3), torch.full((len(q), 1), 15), 4)

OTHERS = {  # what packs each linear, what the line says, and what else holds the model
    "QuEST": (lambda _, linear: QuantLinear.quest(linear.weight.detach(), 4, 16),
              "blocks.0.attn.wq has QuEST's rotation", "--format compressed"),
    "codebooks": (vector, "blocks.0.attn.wq has codebooks", "--format aqlm"),
    "activations": (affine(4, a_bits=8), "inputs of blocks.0.attn.wq are quantized to 8 bits",
                    "--format dense"),
    "small groups": (affine(4, 16), "groups of 16 inputs", "--format compressed"),
    "wide integers": (constant(8, 0, 200), "integers -200 .. -200", "--format compressed"),
    "wide codes": (constant(16, 60000, 1), "integers 59999 .. 59999", "--format dense"),
    "large scales": (large, "7e+04", "--format compressed"),
    "large minima": (large_minima, "scales up to 6e+03 and zero points up to 15",
                     "--format compressed"),
}

@pytest.mark.parametrize("what", OTHERS)
def test_what_no_block_holds_is_refused_with_what_does(capsys, what):
    quantize, reason, other = OTHERS[what]
    save(tiny().replace_linears(quantize))
    check_refused(call(capsys, "model.py export m.pt new --format gguf"), "m.pt", reason,
                  "multiple of 32 inputs", other)
    assert os.listdir() == ["m.pt"]

def test_rounded_activations_of_the_whole_model_are_refused(capsys):
    m = tiny().replace_linears(affine(4))
    m.config.kv_bits = 6
    save(m)
    check_refused(call(capsys, "model.py export m.pt m.gguf --format gguf"),
                  "activations are quantized to 6 bits")

def test_without_the_package_the_line_says_how_to_get_it(capsys, monkeypatch):
    save(tiny())
    monkeypatch.setitem(sys.modules, "gguf", None)
    check_refused(call(capsys, "model.py export m.pt m.gguf --format gguf"), "pip install gguf")
    assert os.listdir() == ["m.pt"]

@pytest.mark.parametrize("target", ["below/m.gguf", "below/new"])
def test_a_file_is_whole_or_not_there(capsys, target):
    save(tiny().replace_linears(affine(4)))
    pathlib.Path("there.gguf").write_text("x")
    check_refused(call(capsys, "model.py export m.pt there.gguf --format gguf"), "there.gguf")
    assert pathlib.Path("there.gguf").read_text() == "x"

    # A file that may not grow above 40 kB, as on a disk that fills up.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        result = call(capsys, f"model.py export m.pt {target} --format gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_refused(result, f"cannot write {target}", "File too large")
    assert sorted(os.listdir()) == ["m.pt", "there.gguf"]

def test_a_folder_has_the_file_and_a_card(capsys):
    save(tiny().replace_linears(affine(4)), command="lrqat.py --bits 4")
    export(capsys, "new/small")
    export(capsys)
    assert sorted(os.listdir("new/small")) == ["README.md", "model.gguf"]
    card = pathlib.Path("new/small/README.md").read_text()
    assert "# small\n" in card and "made by: lrqat.py --bits 4" in card and "Q4_0" in card
    assert "from_pretrained('small', gguf_file='model.gguf')" in card
    assert "llama-cli -m small/model.gguf" in card
    (tensors, keys), (same, _) = read("new/small/model.gguf"), read()
    assert tensors.keys() == same.keys() and keys["general.name"] == "small"

# ---- Tokenizers -------------------------------------------------------------------------------

def theirs():
    return transformers.AutoTokenizer.from_pretrained(".", gguf_file="m.gguf")

def test_our_own_bpe_gives_the_same_tokens_for_a_word(capsys):
    import regex
    spec = [token.decode("latin-1") for token in train_bpe([TEXT], 320)]
    m = LLaMA(LlamaConfig(330, 1, 32, 2, 2, 32, 32))           # more rows than tokens
    save(m, tokenizer=spec)
    assert "the nearest" in export(capsys)
    _, keys = read()
    ours = make_tokenizer(spec)
    end = keys["tokenizer.ggml.eos_token_id"]
    assert end == keys["tokenizer.ggml.bos_token_id"] == ours.eot_token
    assert keys["tokenizer.ggml.tokens"][end] == "<|endoftext|>"
    assert keys["tokenizer.ggml.token_type"][end - 1:end + 2] == [1, 3, 5]
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert len(set(keys["tokenizer.ggml.tokens"])) == 330

    # GPT-2's rules, which transformers takes, cut no word of ours.
    tokenizer = theirs()
    for word in set(regex.findall(PATTERN, TEXT + " Größe\n 12 _ \u6211\U0001f999 ")):
        assert tokenizer.encode(word, add_special_tokens=False) == ours.encode_ordinary(word)

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def byte_level(*before, use_regex):
    last = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return tokenizers.pre_tokenizers.Sequence([*before, last])

def split(pattern):
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")

CUTS = {"gpt-2": lambda: byte_level(use_regex=True),
        "smollm": lambda: byte_level(tokenizers.pre_tokenizers.Digits(individual_digits=True),
                                     use_regex=True),
        "llama-bpe": lambda: byte_level(split(LLAMA3), use_regex=False),
        "qwen2": lambda: byte_level(split(LLAMA3.replace("{1,3}", "")), use_regex=False)}

def save_with(t, **settings):
    """m.pt, a model of a folder's tokenizer."""
    m = LLaMA(LlamaConfig(t.get_vocab_size() + 2, 1, 32, 2, 2, 32, 32))
    settings = {"eos_token": "<end>"} | settings
    save(m, tokenizer={"tokenizer.json": t.to_str(), "end": t.token_to_id("<end>"),
                       "start": t.token_to_id("<start>"), "n_vocab": m.config.vocab_size,
                       "texts": {"tokenizer_config.json": json.dumps(settings)}})

@pytest.mark.parametrize("name", CUTS)
def test_a_byte_level_tokenizer_gives_the_same_tokens(capsys, name):
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = CUTS[name]()
    t.decoder = tokenizers.decoders.ByteLevel()
    t.train_from_iterator([TEXT, SAMPLE] * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<start>", "<end>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    t.add_tokens(["<think>"])
    save_with(t, chat_template="{{ messages }}")
    assert "note" not in export(capsys)
    _, keys = read()
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert [keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")] == [0, 1]
    types = keys["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 1] and types[-3:] == [4, 5, 5]

    # transformers does not know "smollm", and takes GPT-2's rules for it.
    text = SAMPLE + TEXT[:500]
    if name == "smollm":
        text = "".join(letter for letter in text if not letter.isnumeric())
    assert theirs().encode(text, add_special_tokens=False) == t.encode(text).ids

def test_a_sentencepiece_tokenizer_gives_the_same_tokens(capsys):
    """The BPE of Llama 2's kind: spaces are letters, and bytes are tokens for what is unknown."""
    normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
    t = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    t.normalizer = normalizer
    data = [f"<0x{i:02X}>" for i in range(256)]
    t.train_from_iterator(TEXT.splitlines(), tokenizers.trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<unk>", "<start>", "<end>", *data], show_progress=False))
    settings = json.loads(t.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]            # bytes are no special tokens
    settings["post_processor"] = {"type": "TemplateProcessing", "pair": [], "single": [
        {"SpecialToken": {"id": "<start>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<start>": {"id": "<start>", "ids": [1], "tokens": ["<start>"]}}}
    t = tokenizers.Tokenizer.from_str(json.dumps(settings))
    save_with(t)
    assert "note" not in export(capsys)
    _, keys = read()
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_bos_token"] is keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.token_type"][:260] == [2, 3, 3] + [6] * 256 + [1]
    tokenizer = theirs()
    for text in ("def f(x): return 12", TEXT[:300].replace("\n", " "), "a\u6211b"):
        assert tokenizer.encode(text) == t.encode(text).ids
        assert t.encode(text).ids[0] == 1

def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(capsys):
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<start>": 0, "<end>": 1, "a": 2}, "a"))
    save_with(t)
    check_refused(call(capsys, "model.py export m.pt m.gguf --format gguf"), "WordLevel")
    assert os.listdir() == ["m.pt"]

def test_a_sentencepiece_tokenizer_without_all_bytes_is_refused(capsys):
    vocab = {"<start>": 0, "<end>": 1, "a": 2, "<0x00>": 3}
    save_with(tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True)))
    check_refused(call(capsys, "model.py export m.pt m.gguf --format gguf"), "no token <0x01>",
                  "--format dense")
    assert os.listdir() == ["m.pt"]

@pytest.mark.parametrize("name", PRE)
def test_a_way_to_cut_words_is_found_by_what_it_does(name):
    assert find_pre(lambda text: cut_by(PRE[name], text)) == (name, True)
    assert "".join(cut_by(PRE[name], SAMPLE)) == SAMPLE
