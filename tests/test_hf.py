"""Hugging Face folders, against transformers and tokenizers themselves.

Random-weight checkpoints of every form that is read, written by transformers, must give its logits;
an exported folder must load there and give the packed model's. Bad folders are one line. Skipped
where the packages safetensors, tokenizers and transformers are not installed.
"""
import copy
import errno
import json
import math
import os
import pathlib
import random
import shutil
import sys

import pytest
import torch

import nanobit.runs
import model
import nanobit.checkpoint
import nanobit.data
import nanobit.export
import nanobit.hf
import nanobit.hf_tokenizer
import nanobit.tokenizer
import normtweak
from conftest import TEXT, call, check_refused, close
import nanobit.generate
from model import LLaMA, UsageError
from nanobit import hf_tokenizer
from quantizers import QuantLinear, quest_fake_quant, rotate, rtn

transformers = pytest.importorskip("transformers", minversion="5")  # rope_parameters, dtype
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
SHAPE = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             eos_token_id=0, bos_token_id=1)
FORMS = {
    "llama 1": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6)),
    "llama 2": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama 3": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama 3.1": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama 3.2": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, head_dim": ("Mistral", dict(sliding_window=None, hidden_size=88, head_dim=20,
                                          num_attention_heads=6)),
    "mistral, window": ("Mistral", dict(sliding_window=64)),
    "tinyllama": ("Llama", dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=1)),
    "smollm2": ("Llama", dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3,
                              tie_word_embeddings=True,
                              rope_parameters=dict(rope_type="default", rope_theta=1e5))),
}

def reference(form, **changes):
    """A random-weight model of transformers; large weights, so that attention is not uniform."""
    kind, own = FORMS[form]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | own | changes)
    m = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, *((0, 0.2) if p.dim() == 2 else (1, 0.2)))
    return m

@pytest.fixture(scope="module")
def text():
    return TEXT.replace("\n", " # é\n")

@pytest.fixture(scope="module")
def bpe(text):
    """A byte-level BPE of 290 tokens with two special ones, as tokenizer.json's text."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>", "<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    t.enable_truncation(7)                             # of no use here: text is cut by no one
    return t.to_str()

@pytest.fixture(autouse=True)
def work(own_folder, monkeypatch, text):
    monkeypatch.setattr(nanobit.runs, "HELD", {})
    pathlib.Path("text.txt").write_text(text)
    return own_folder

@pytest.fixture
def folder(work, bpe):
    """The SmolLM2 form with its tokenizer, in bfloat16 like most published weights."""
    reference("smollm2").bfloat16().save_pretrained("hf")
    pathlib.Path("hf/tokenizer.json").write_text(bpe)
    return "hf"

def ids(m, *shape):
    return torch.randint(m.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))

def edit(path, **changes):
    """Change entries of a JSON file; None takes one away."""
    content = json.loads(pathlib.Path(path).read_text()) | changes
    pathlib.Path(path).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

# ---- Reading ----------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_logits_equal_those_of_transformers(form, shards):
    want = reference(form)
    want.save_pretrained("hf", max_shard_size="30KB" if shards == "shards" else "1GB")
    assert (len(list(pathlib.Path("hf").glob("*.safetensors"))) > 1) == (shards == "shards")
    m = LLaMA.from_pretrained("hf")
    x = ids(m, 2, m.config.seq_len if form == "mistral, window" else 96)
    close(m(x)[0], want(x).logits)
    assert m.config.seq_len == (64 if form == "mistral, window" else 128)
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in want.parameters())

@torch.no_grad()
def test_the_older_form_of_the_config_reads_the_same():
    """rope_theta and rope_scaling at the top, no head_dim, no number of key/value heads."""
    want = reference("llama 3.1", num_key_value_heads=4)
    want.save_pretrained("hf")
    rope = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit("hf/config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=rope, head_dim=None,
         num_key_value_heads=None)
    m = LLaMA.from_pretrained("hf")
    close(m(ids(m, 2, 96))[0], want(ids(m, 2, 96)).logits)

@torch.no_grad()
def test_llama3_rope_matters_at_these_lengths():
    m = LLaMA.from_pretrained(saved(reference("llama 3.1")))
    x = ids(m, 1, 96)
    logits = m(x)[0]
    m.config.rope_scaling = ()
    assert (m(x)[0] - logits).abs().max() > 0.01

def saved(m, path="hf"):
    m.save_pretrained(path)
    return path

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_float32_copies_or_stay_as_stored(dtype):
    """A step on the copies must not reach the file; as_stored maps it and takes no memory."""
    saved(reference("smollm2").to(dtype))
    before = pathlib.Path("hf/model.safetensors").read_bytes()
    copies, mapped = (LLaMA.from_pretrained("hf", as_stored=s) for s in (False, True))
    assert {p.dtype for p in copies.parameters()} == {torch.float32}
    assert {p.dtype for p in mapped.parameters()} == {dtype}
    for (name, a), b in zip(copies.named_parameters(), mapped.parameters()):
        assert torch.equal(a, b.float()), name
    x = ids(copies, 2, 16)
    close(copies(x)[0], mapped(x)[0], 1e-5)            # other places in memory, other sums
    for m in (copies, mapped):
        assert m.head.weight is m.embed.weight
    with torch.no_grad():
        for p in copies.parameters():
            p.zero_()
    assert pathlib.Path("hf/model.safetensors").read_bytes() == before

def store(**changes):
    """Write model.safetensors again with other tensors; None takes one away."""
    from safetensors.torch import load_file, save_file
    state = load_file("hf/model.safetensors") | changes
    save_file({k: v for k, v in state.items() if v is not None}, "hf/model.safetensors",
              metadata={"format": "pt"})

def stored(name):
    from safetensors.torch import load_file
    return load_file("hf/model.safetensors")[name]

def config(**changes):
    """edit, where None is stored as null and ... takes a name away."""
    content = json.loads(pathlib.Path("hf/config.json").read_text()) | changes
    content = {k: v for k, v in content.items() if v is not ...}
    pathlib.Path("hf/config.json").write_text(json.dumps(content))

def swap_head():
    store(**{EMBED: None, "lm_head.weight": stored(EMBED)})

def stale_index():
    """Beside the one file, shards that are not there."""
    pathlib.Path("hf/model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {EMBED: "model-00001-of-00002.safetensors"}}))

EMBED = "model.embed_tokens.weight"
NEARLY = {  # a form, its own settings, and what is done to its folder
    "a tied head stored too": ("smollm2", {}, lambda: store(**{"lm_head.weight": stored(EMBED)})),
    "another tied head": ("smollm2", {}, lambda: store(**{
        "lm_head.weight": stored(EMBED).flip(0)})),
    "a tied head alone": ("smollm2", {}, swap_head),
    "tie_word_embeddings missing": ("llama 2", {}, lambda: config(tie_word_embeddings=...)),
    "rotary buffers": ("llama 2", {}, lambda: store(**{
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})),
    "an index beside the one file": ("llama 2", {}, stale_index),
    "theta at the top": ("llama 2", {}, lambda: config(rope_parameters=..., rope_theta=777.0)),
    "theta in both places": ("llama 2", {}, lambda: config(
        rope_theta=9.0, rope_parameters=dict(rope_type="default", rope_theta=777.0))),
    "no rotary settings": ("llama 2", {}, lambda: config(rope_parameters=None, rope_scaling=None)),
    "older and newer rotary settings": ("llama 3.1", {}, lambda: config(
        rope_scaling=LLAMA3 | dict(factor=2.0), rope_parameters=dict(rope_theta=1e4))),
    "llama3's first length is the longest": ("llama 3.1", {}, lambda: config(
        rope_parameters={k: v for k, v in LLAMA3.items() if not k.startswith("orig")})),
    "llama3's first length at the top": ("llama 3.1", {}, lambda: config(
        original_max_position_embeddings=16)),
    "head_dim null": ("llama 2", {}, lambda: config(head_dim=None)),
    "key heads missing": ("llama 1", {}, lambda: config(num_key_value_heads=...)),
    "key heads null": ("llama 1", {}, lambda: config(num_key_value_heads=None)),
    "mistral's key heads missing": ("mistral", dict(
        hidden_size=64, num_attention_heads=16, num_key_value_heads=8),
        lambda: config(num_key_value_heads=...)),
    "eps missing": ("llama 2", {}, lambda: config(rms_norm_eps=...)),
    "longest window missing": ("llama 2", {}, lambda: config(max_position_embeddings=...)),
    "dtype": ("llama 2", {}, lambda: config(dtype=..., torch_dtype="float16")),
    "pretraining_tp": ("llama 2", {}, lambda: config(pretraining_tp=2)),
    "a window that llama ignores": ("llama 2", {}, lambda: config(sliding_window=8)),
    "swish": ("llama 2", {}, lambda: config(hidden_act="swish")),
    "names of no use": ("llama 2", {}, lambda: config(use_cache=False, factor=8.0,
                                                      rope_type="linear", type="yarn")),
}

@torch.no_grad()
@pytest.mark.parametrize("what", NEARLY)
def test_a_folder_of_an_unusual_form_gives_transformers_logits_also_after_an_export(what):
    form, own, change = NEARLY[what]
    saved(reference(form, **own))
    change()
    auto = transformers.AutoModelForCausalLM.from_pretrained
    m, want = LLaMA.from_pretrained("hf"), auto("hf", dtype=torch.float32)
    x = ids(m, 2, 96)
    logits = want(x).logits
    close(m(x)[0], logits)
    nanobit.export.write_hf("new", m, {"tokenizer": [chr(i) for i in range(256)], "method": "test"},
                          nanobit.export.dense_weights)
    again = LLaMA.from_pretrained("new")
    close(again(x)[0], logits, 0.1)                    # weights in bfloat16
    close(auto("new", dtype=torch.float32)(x).logits, again(x)[0])
    assert again.config.tied == (m.head.weight is m.embed.weight) == m.config.tied

def test_another_head_than_the_tied_one_is_said(capsys):
    saved(reference("smollm2"))
    store(**{"lm_head.weight": stored(EMBED) * 2})
    assert not LLaMA.from_pretrained("hf").config.tied
    assert "lm_head.weight differs" in capsys.readouterr().out

@pytest.mark.parametrize("window, longest", [(8, 8), (None, 128), (..., 128)])
def test_a_window_of_mistral_limits_the_length(window, longest):
    """Missing means 4096 there, null means none; the model's 128 positions are less."""
    saved(reference("mistral"))
    config(sliding_window=window)
    assert nanobit.hf.read_hf_config("hf").seq_len == longest
    config(sliding_window=window, max_position_embeddings=...)
    assert nanobit.hf.read_hf_config("hf").seq_len == {8: 8, None: 2**17, ...: 4096}[window]

# ---- The tokenizer ----------------------------------------------------------------------------

def test_tokens_are_those_of_the_tokenizers_library(folder, bpe, text):
    spec = nanobit.hf_tokenizer.read_hf_tokenizer(folder)
    assert json.loads(json.dumps(spec)) == spec        # plain values
    enc, want = nanobit.tokenizer.make_tokenizer(spec), tokenizers.Tokenizer.from_str(bpe)
    want.no_truncation()
    sample = text[:500]
    assert enc.encode_ordinary(sample) == want.encode(sample, add_special_tokens=False).ids
    assert enc.encode_ordinary_batch([sample, "a"]) == [enc.encode_ordinary(sample),
                                                        enc.encode_ordinary("a")]
    assert enc.decode_bytes(enc.encode_ordinary(sample)) == sample.encode()
    assert (enc.n_vocab, enc.eot_token, enc.start_token) == (300, 0, 1)

def test_special_tokens_in_a_text_stay_text(folder):
    enc = nanobit.tokenizer.make_tokenizer(nanobit.hf_tokenizer.read_hf_tokenizer(folder))
    assert not {0, 1} & set(enc.encode_ordinary("a<|end|>b<s>"))
    assert enc.decode(enc.encode_ordinary("a<|end|>b<s>")) == "a<|end|>b<s>"

def test_data_has_the_end_token_after_every_document(folder, text):
    spec = nanobit.hf_tokenizer.read_hf_tokenizer(folder)
    for _ in range(2):                                 # tokenized, then from the cache
        data = nanobit.data.load_data("text.txt", "1024", 16, spec=spec)
        assert data.spec == spec and data.val[-1] == 0 and (data.val[:-1] != 0).all()
        parts = [data.tokenizer.decode(part[:-1].tolist())
                 for part in (data.train, data.dev, data.val)]
        assert "".join(parts) == text

def test_several_end_tokens_take_the_first(folder):
    pathlib.Path("hf/generation_config.json").unlink()
    edit("hf/config.json", eos_token_id=[5, 0], bos_token_id=None)
    spec = nanobit.hf_tokenizer.read_hf_tokenizer("hf")
    assert (spec["end"], spec["start"], spec["ends"]) == (5, 5, [5, 0])

@pytest.mark.parametrize("config, generation, tokenizer, ends, start", [
    (dict(eos_token_id=7), dict(eos_token_id=[8, 9], bos_token_id=6), {}, [7], 6),
    (dict(eos_token_id=[]), dict(eos_token_id=[8, 9]), {"bos_token": "a"}, [8, 9], "a"),
    ({}, {}, {"eos_token": "<s>", "bos_token": {"content": "<|end|>"}}, [1], 0),
    ({}, {}, {"eos_token": "<s>", "bos_token": None}, [1], 1),
    (dict(bos_token_id=3), {}, {"eos_token": {"content": "<|end|>", "lstrip": False}}, [0], 3)])
def test_special_tokens_come_from_the_first_file_that_names_them(folder, bpe, config, generation,
                                                                 tokenizer, ends, start):
    edit("hf/config.json", **dict(eos_token_id=None, bos_token_id=None) | config)
    pathlib.Path("hf/generation_config.json").write_text(json.dumps(generation))
    pathlib.Path("hf/tokenizer_config.json").write_text(json.dumps(tokenizer))
    spec = nanobit.hf_tokenizer.read_hf_tokenizer("hf")
    if isinstance(start, str):
        start = tokenizers.Tokenizer.from_str(bpe).token_to_id(start)
    assert (spec["ends"], spec["end"], spec["start"]) == (ends, ends[0], start)

def test_special_tokens_beyond_the_vocabulary_are_no_trouble(folder, bpe):
    """A pad token that was added and has no row: no text ever has its id. A plain one has."""
    t = tokenizers.Tokenizer.from_str(bpe)
    t.add_tokens([f"added{i}" for i in range(300 - t.get_vocab_size())])
    t.add_special_tokens(["[PAD]"])
    assert t.token_to_id("[PAD]") == 300
    pathlib.Path("hf/tokenizer.json").write_text(t.to_str())
    enc = nanobit.tokenizer.make_tokenizer(nanobit.hf_tokenizer.read_hf_tokenizer("hf"))
    assert max(enc.encode_ordinary("a [PAD] added0")) < 300
    t.add_tokens(["one more"])
    pathlib.Path("hf/tokenizer.json").write_text(t.to_str())
    with pytest.raises(UsageError, match="id 301"):
        nanobit.hf_tokenizer.read_hf_tokenizer("hf")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NAMES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|end|>",
         "pad_token": "<s>", "model_max_length": 99}
CHATS = {  # where a folder may keep its chat template, and how transformers then calls it
    "in the settings": ({"tokenizer_config.json": NAMES | {"chat_template": TEMPLATE}}, None),
    "in a file": ({"tokenizer_config.json": NAMES, "chat_template.jinja": TEMPLATE}, None),
    "two": ({"tokenizer_config.json": NAMES, "chat_template.jinja": "no",
             "additional_chat_templates/tool_use.jinja": TEMPLATE}, "tool_use")}

@pytest.mark.parametrize("where", CHATS)
@pytest.mark.parametrize("ends", [0, [0, 5, 7]])
def test_an_export_keeps_end_tokens_and_the_chat_template(folder, capsys, where, ends):
    files, name = CHATS[where]
    edit("hf/config.json", eos_token_id=ends)
    edit("hf/generation_config.json", eos_token_id=ends, temperature=0.6, do_sample=True)
    for path, content in files.items():
        path = pathlib.Path("hf", path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=content["tokenizer"], method="test")
    status, out, err = call(capsys, "model.py export m.pt new")
    assert status == 0, err
    tokenizer, model_ = (cls.from_pretrained("new") for cls in (
        transformers.AutoTokenizer, transformers.AutoModelForCausalLM))
    chat = [{"role": "user", "content": "self"}, {"role": "bot", "content": "value"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template=name) == (
        "user: self\nbot: value\n")
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<s>", 99)
    assert model_.generation_config.eos_token_id == model_.config.eos_token_id == ends
    assert model_.generation_config.temperature == 0.6

def test_a_spec_of_before_the_end_tokens_is_exported(folder, capsys):
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    old = {k: v for k, v in content["tokenizer"].items() if k not in ("ends", "texts")}
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=old, method="test")
    assert call(capsys, "model.py export m.pt new")[0] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained("new")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)
    assert nanobit.checkpoint.load_checkpoint("new")[1]["tokenizer"]["ends"] == [0]

# ---- Bad folders ------------------------------------------------------------------------------

def shard(*names):
    """An index that names these files, and no single file."""
    pathlib.Path("hf/model.safetensors").rename("hf/whole.safetensors")
    index({f"{Q}{i}": name for i, name in enumerate(names)})

def index(weight_map):
    pathlib.Path("hf/model.safetensors").unlink(missing_ok=True)
    write("model.safetensors.index.json", {"weight_map": weight_map})

def write(name, content):
    pathlib.Path("hf", name).write_text(content if isinstance(content, str) else
                                        json.dumps(content))

def no_end():
    edit("hf/config.json", eos_token_id=None)
    edit("hf/generation_config.json", eos_token_id=None)

Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda: pathlib.Path("hf/config.json").unlink(), "config.json"),
    "no tokenizer": (lambda: pathlib.Path("hf/tokenizer.json").unlink(), "tokenizer.json"),
    "no weights": (lambda: pathlib.Path("hf/model.safetensors").unlink(), "model.safetensors"),
    "no shard": (lambda: shard("whole.safetensors", "model-00001-of-00002.safetensors"),
                 "model-00001-of-00002.safetensors"),
    "a shard elsewhere": (lambda: shard("whole.safetensors", "../hf/whole.safetensors"),
                          "../hf/whole.safetensors, outside"),
    "a shard from the root": (lambda: shard("/etc/passwd"), "/etc/passwd, outside"),
    "a shard of two lines": (lambda: shard("a\nb"), r"a\nb"),
    "a list of shards": (lambda: index(["whole.safetensors"]), "weight_map"),
    "no weight_map": (lambda: index(None), "weight_map"),
    "numbers for shards": (lambda: index({Q: 1}), "weight_map"),
    "the index is a list": (lambda: (index({}), write("model.safetensors.index.json", [])),
                            "model.safetensors.index.json"),
    "an empty index": (lambda: index({}), "num_hidden_layers"),
    "config is no JSON": (lambda: pathlib.Path("hf/config.json").write_text("{"), "config.json"),
    "config is a list": (lambda: pathlib.Path("hf/config.json").write_text("[]"), "config.json"),
    "tokenizer is no JSON": (lambda: pathlib.Path("hf/tokenizer.json").write_text("x"),
                             "tokenizer.json"),
    "tokenizer is another": (lambda: pathlib.Path("hf/tokenizer.json").write_text("{}"),
                             "tokenizer.json"),
    "cut weights": (lambda: pathlib.Path("hf/model.safetensors").write_bytes(
        pathlib.Path("hf/model.safetensors").read_bytes()[:-9]), "model.safetensors is damaged"),
    "missing tensor": (lambda: store(**{Q: None}), Q),
    "bias": (lambda: store(**{Q.replace("weight", "bias"): torch.zeros(72)}), "q_proj.bias"),
    "wrong shape": (lambda: store(**{Q: torch.zeros(72, 71)}), Q),
    "integers": (lambda: store(**{Q: torch.zeros(72, 72, dtype=torch.int32)}), Q),
    "bytes": (lambda: store(**{Q: torch.zeros(72, 72, dtype=torch.float8_e4m3fn)}), Q),
    "width": (lambda: edit("hf/config.json", hidden_size=73, head_dim=None), "73"),
    "no width": (lambda: edit("hf/config.json", hidden_size=None), "hidden_size"),
    "text for a width": (lambda: edit("hf/config.json", hidden_size="72"), "hidden_size"),
    "no end token": (no_end, "eos_token_id"),
    "nested without end": (lambda: write("config.json", "[" * 10**5), "config.json is damaged"),
    "a tokenizer of a list": (lambda: write("tokenizer.json", []), "tokenizer.json"),
    "a tokenizer of bytes": (lambda: pathlib.Path("hf/tokenizer.json").write_bytes(b"\xff{"),
                             "tokenizer.json"),
    "a tokenizer without a model": (lambda: edit("hf/tokenizer.json", model=5), "tokenizer.json"),
    "settings of a list": (lambda: write("tokenizer_config.json", []), "tokenizer_config.json"),
    "half of the generation's settings": (lambda: write("generation_config.json", "{"),
                                          "generation_config.json"),
    "a template of bytes": (lambda: pathlib.Path("hf/chat_template.jinja").write_bytes(b"\xff"),
                            "chat_template.jinja"),
    "10^9 blocks": (lambda: edit("hf/config.json", num_hidden_layers=10**9), "1000000000"),
    "10^6 blocks": (lambda: edit("hf/config.json", num_hidden_layers=10**6), "1000000"),
    "many heads": (lambda: edit("hf/config.json", num_attention_heads=3 * 10**5),
                   "(2400000, 72)"),
    "odd heads": (lambda: edit("hf/config.json", head_dim=7), "7 channels"),
    "low above high": (lambda: edit("hf/config.json", rope_parameters=LLAMA3 | {
        "low_freq_factor": 4.0}), "low_freq_factor"),
    "rope of each layer type": (lambda: edit("hf/config.json", rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1e4}}), "full_attention"),
    "another head of another shape": (lambda: store(**{"lm_head.weight": torch.zeros(3)}),
                                      "lm_head.weight"),
    "short vocabulary": (lambda: edit("hf/config.json", vocab_size=280), "vocab_size"),
    "architecture": (lambda: edit("hf/config.json", model_type="qwen2"), "model_type qwen2"),
    "experts": (lambda: edit("hf/config.json", model_type="mixtral"), "mixtral"),
    "attention bias": (lambda: edit("hf/config.json", attention_bias=True), "attention_bias"),
    "bias in the MLP": (lambda: edit("hf/config.json", mlp_bias=True), "mlp_bias"),
    "activation": (lambda: edit("hf/config.json", hidden_act="gelu"), "hidden_act gelu"),
    "rope": (lambda: edit("hf/config.json", rope_parameters=dict(rope_type="yarn")), "yarn"),
    "older rope": (lambda: edit("hf/config.json", rope_scaling=dict(type="linear", factor=2),
                                rope_parameters=None), "linear"),
    "half of llama3's rope": (lambda: edit("hf/config.json", rope_parameters=dict(
        rope_type="llama3", factor=8)), "low_freq_factor"),
    "quantized": (lambda: edit("hf/config.json", quantization_config={"bits": 4}),
                  "quantization_config"),
}

@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_one_line_that_names_it(folder, capsys, what):
    spoil, name = BAD[what]
    spoil()
    result = call(capsys, "model.py eval hf --data text.txt --seq-len 16")
    check_refused(result, name, "" if what == "width" else "hf")

WRONG = {  # values that are none for these settings
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "vocab_size max_position_embeddings head_dim":
        ["8", 8.0, True, False, [], [8], {}, 0, -8, 1e999, math.nan, 10**30],
    "rms_norm_eps rope_theta": ["1e-05", True, False, [], {}, 0, -1.0, math.inf, math.nan],
    "rope_scaling rope_parameters": ["default", False, 0, [], [1], 3.0],
    "tie_word_embeddings": ["false", 0, 1, []],
    "eos_token_id": ["0", -1, 300, True, 0.0, [0, "1"], [[0]], {}, 10**30, math.nan],
    "bos_token_id": ["0", -1, 300, False, [1], {}],
    "model_type hidden_act": [3, [], {}, False, "a\nb"],
    "attention_bias mlp_bias": ["false", [], {}, "no"],
    "quantization_config": [{}, [], "", 0]}
CASES = [(name, value) for names, values in WRONG.items() for name in names.split()
         for value in values]

def test_a_setting_of_the_wrong_kind_is_one_line_that_names_it(folder):
    base = json.loads(pathlib.Path("hf/config.json").read_text())
    for name, value in CASES:
        own = {name: value}
        if name == "rope_theta":
            own["rope_parameters"] = None
        write("config.json", base | own)
        with pytest.raises(UsageError) as e:
            nanobit.checkpoint.load_checkpoint("hf")
        assert name in str(e.value) and "\n" not in str(e.value), (name, value)
    for name in ("factor", "low_freq_factor", "high_freq_factor", "rope_theta",
                 "original_max_position_embeddings"):
        for value in ("8", True, [], 0, -1.0, math.nan, {}):
            write("config.json", base | {"rope_parameters": LLAMA3 | {name: value}})
            with pytest.raises(UsageError, match=name):
                nanobit.checkpoint.load_checkpoint("hf")
    for value in ("64", 0, -1, 1.5, True, [], {}):
        write("config.json", base | {"model_type": "mistral", "sliding_window": value})
        with pytest.raises(UsageError, match="sliding_window"):
            nanobit.checkpoint.load_checkpoint("hf")

# ---- Weights that are no numbers --------------------------------------------------------------

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_stored", [False, True])
def test_a_weight_that_is_no_number_is_refused_by_its_name(folder, value, dtype, as_stored):
    from safetensors.torch import load_file
    good = load_file("hf/model.safetensors")
    for name in (EMBED, Q, "model.norm.weight"):
        spoiled = good[name].to(dtype).clone()
        spoiled.view(-1)[-1] = value
        store(**good | {name: spoiled})
        with pytest.raises(UsageError, match=f"hf: the weight {name} is not finite"):
            LLaMA.from_pretrained("hf", as_stored=as_stored)

@pytest.mark.parametrize("command", [
    "model.py eval hf", "model.py sample hf --tokens 2", "model.py export hf new",
    "model.py --model hf", "quest.py --model hf --bits 4", "lrqat.py --model hf --rank 4",
    "normtweak.py --model hf --host rtn", "normtweak.py --model hf --host gptq --calib data",
    "pvtune.py --model hf --scheme affine", "normtweak.py --model out.pt --teacher hf"])
def test_every_script_refuses_a_weight_that_is_no_number(folder, capsys, command):
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    nanobit.checkpoint.save_checkpoint("out.pt", pack(m, "affine"), method="rtn",
                                       settings={"data": "text.txt"},
                                       tokenizer=content["tokenizer"], data=None)
    up = "model.layers.0.mlp.up_proj.weight"
    store(**{up: stored(up).index_fill(0, torch.tensor([3]), math.nan)})
    flags = "--data text.txt --seq-len 16" * (" sample" not in command and " export" not in command)
    check_refused(call(capsys, f"{command} {flags}"), up, "weight", "not finite")
    assert not pathlib.Path("new").exists() and not list(pathlib.Path(".").rglob("results.jsonl"))

def test_a_mapped_file_is_checked_in_little_memory(work):
    """Twice as much as the check may take lies in one tensor; it reads all of it, and finds it."""
    tensor = torch.zeros(2**26, dtype=torch.bfloat16)
    tensor[-1] = math.inf
    from safetensors import safe_open
    from safetensors.torch import save_file
    save_file({"t": tensor}, "t.safetensors")
    mapped = safe_open("t.safetensors", framework="pt").get_tensor("t")
    sizes, isfinite = [], torch.Tensor.isfinite
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match="t is not finite"):
        patch.setattr(torch.Tensor, "isfinite", lambda t: sizes.append(t.numel()) or isfinite(t))
        nanobit.checkpoint.check_weights([("t", mapped)], "t.safetensors")
    assert sum(sizes) == 2**26 and max(sizes) <= 2**24

@pytest.mark.parametrize("command", [
    "model.py eval hf --data text.txt --seq-len 200",
    "normtweak.py --model hf --data text.txt --seq-len 200",
    "quest.py --model hf --data text.txt --seq-len 200"])
def test_windows_longer_than_the_model_takes_are_refused(folder, capsys, command):
    check_refused(call(capsys, command), "--seq-len 200", "128")

@pytest.mark.parametrize("missing", ["safetensors", "tokenizers"])
def test_a_missing_package_is_named_with_the_command(folder, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)    # then importing it fails
    check_refused(call(capsys, "model.py eval hf --data text.txt --seq-len 16"),
                  "pip install safetensors tokenizers")

# ---- The scripts ------------------------------------------------------------------------------

def test_eval_scores_what_transformers_scores(folder, capsys):
    status, out, err = call(capsys, "model.py eval hf --data text.txt --seq-len 16")
    assert status == 0, err
    spec = nanobit.hf_tokenizer.read_hf_tokenizer("hf")
    data = nanobit.data.load_data("text.txt", "1024", 16, spec=spec)
    want = transformers.AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)
    nll, tokens = 0.0, torch.from_numpy(data.val.astype("int64"))
    for i in range(0, len(tokens) - 1, 16):
        x, y = tokens[i:i + 16][:len(tokens) - 1 - i], tokens[i + 1:i + 17]
        nll += torch.nn.functional.cross_entropy(want(x[None]).logits[0], y, reduction="sum").item()
    assert float(out.split("loss ")[-1]) == pytest.approx(nll / (len(tokens) - 1), abs=2e-5)

def test_a_sample_starts_with_the_start_token(folder, capsys, monkeypatch):
    seen, generate = [], nanobit.generate.generate
    monkeypatch.setattr(nanobit.generate, "generate",
                        lambda m, x, *rest: seen.append(x) or generate(m, x, *rest))
    status, out, err = call(capsys, "model.py sample hf --prompt 'def f' --tokens 5")
    assert status == 0 and out.startswith("def f") and seen[0][0, 0] == 1, err

RUNS = {"normtweak.py": "--bits 3 --group-size 8 --steps 2 --seq-len 16 --calib data",
        "lrqat.py": "--bits 4 --group-size 8 --rank 4 --steps 2 --seq-len 16 --batch-size 2",
        "quest.py": "--bits 4 --steps 2 --seq-len 16 --batch-size 2",
        "model.py": "--steps 2 --seq-len 16 --batch-size 2"}

@pytest.mark.parametrize("script", RUNS)
def test_every_script_starts_from_a_folder(folder, capsys, script):
    """72 channels: the Hadamard block is 8. What is saved evaluates without the folder."""
    before = {p: p.read_bytes() for p in pathlib.Path("hf").iterdir()}
    status, out, err = call(capsys, f"{script} --model hf --data text.txt {RUNS[script]}"
                                    f"{' --accumulate 1' * (script != 'normtweak.py')}")
    assert status == 0, err
    row = json.loads(out.splitlines()[-1])
    assert before == {p: p.read_bytes() for p in pathlib.Path("hf").iterdir()}
    shutil.rmtree("hf")
    name = {"normtweak.py": "gptq-tweak-w3", "lrqat.py": "lrqat-w4", "quest.py": "quest-w4a4",
            "model.py": "base"}[script]
    status, out, err = call(capsys, f"model.py eval out/{name}.pt --seq-len 16")
    assert status == 0 and float(out.split("loss ")[-1]) == pytest.approx(row["val_loss"], abs=1e-4)

def test_a_packed_model_is_tweaked_against_the_folder_it_came_from(folder, capsys):
    assert call(capsys, f"normtweak.py --model hf --data text.txt {RUNS['normtweak.py']} "
                        "--host rtn --embed-bits 16")[0] == 0
    status, out, err = call(capsys, "normtweak.py --model out/rtn-w3.pt --teacher hf "
                                    f"--data text.txt {RUNS['normtweak.py']} --embed-bits 16")
    assert status == 0, err
    row, again = (json.loads(line)["arms"]
                  for line in pathlib.Path("out/results.jsonl").read_text().splitlines())
    assert list(row) == ["dense", "rtn", "rtn-tweak"]  # --host: no other
    assert [arm["val_loss"] for arm in again.values()] == pytest.approx(
        [arm["val_loss"] for arm in row.values()], abs=1e-5)

@pytest.mark.parametrize("script", ["normtweak.py", "lrqat.py"])
def test_a_group_that_does_not_divide_the_width_is_refused(folder, capsys, script):
    command = f"{script} --model hf --data text.txt --seq-len 16 --group-size 128"
    check_refused(call(capsys, command), "128", "72")

def test_norm_tweaking_keeps_one_block_at_a_time_in_float(folder, capsys, monkeypatch):
    """While a block is compressed, the others are the file's bfloat16 or packed codes."""
    seen, quantize = [], normtweak.quantize_block
    def spy(block, *rest):
        seen.append(block)
        return quantize(block, *rest)
    monkeypatch.setattr(normtweak, "quantize_block", spy)
    load, teachers = normtweak.load_base, []
    monkeypatch.setattr(normtweak, "load_base", lambda *a, **k: teachers.append(load(*a, **k)) or
                        teachers[0])
    saves, save = [], nanobit.runs.save_result
    def look(path, m, *rest):
        saves.append({(type(b).__name__, p.dtype) for n, b in m.named_modules()
                      for p in b._parameters.values() if p is not None})
        assert m.embed.weight is teachers[0][0].embed.weight               # shared, not copied
        return save(path, m, *rest)
    monkeypatch.setattr(nanobit.runs, "save_result", look)
    status, out, err = call(capsys, f"normtweak.py --model hf --data text.txt "
                                    f"{RUNS['normtweak.py']} --embed-bits 16")
    assert status == 0 and len(saves) == 4, err
    teacher = teachers[0][0]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not any(b is t for b in seen for t in teacher.blocks)
    for kinds in saves:
        assert ("Linear", torch.float32) not in kinds and ("RMSNorm", torch.float32) in kinds

# ---- Writing ----------------------------------------------------------------------------------

def spelled_out(m, dtype):
    """A copy of the model with dense weights, rounded to dtype."""
    def dense(_, packed):
        linear = model.Linear(packed.spec["in_features"], len(packed.packed))
        linear.weight.data = packed.weight()
        return linear
    m = copy.deepcopy(m)
    if isinstance(m.blocks[0].attn.wq, QuantLinear):
        m.replace_linears(dense)
    for p in m.parameters():
        p.data = p.data.to(dtype).float()
    return m

def pack(m, kind):
    if kind == "affine":
        return m.replace_linears(lambda n, w: QuantLinear.affine(*rtn(w.weight, 3, 8), 3, 8))
    if kind == "dense":
        return m
    bits, grid = {"quest": (4, "uniform"), "fp4": (4, "fp4"), "sparse": (2, "sparse"),
                  "ternary": (1.58, "uniform")}[kind]
    return m.replace_linears(lambda n, w: QuantLinear.quest(w.weight.detach(), bits, 16, grid))

@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "affine", "quest", "fp4", "sparse", "ternary"])
@pytest.mark.parametrize("form", ["smollm2", "llama 3.1", "mistral, head_dim"])
def test_an_exported_model_gives_the_same_logits_in_transformers(bpe, capsys, kind, form):
    saved(reference(form))
    pathlib.Path("hf/tokenizer.json").write_text(bpe)
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    m = pack(m, kind)
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=content["tokenizer"], method="test")
    pathlib.Path("new/dir").mkdir(parents=True)        # there, and empty
    status, out, err = call(capsys, "model.py export m.pt new/dir --format dense")
    assert status == 0 and "note" not in out and err == ""
    x, (again, spec) = ids(m, 2, 96), nanobit.checkpoint.load_checkpoint("new/dir")
    close(spelled_out(m, torch.float32)(x)[0], m(x)[0])
    ours = spelled_out(m, torch.bfloat16)(x)[0]
    close(again(x)[0], ours, 1e-5)
    assert spec["tokenizer"] == content["tokenizer"]
    auto = transformers.AutoModelForCausalLM.from_pretrained
    close(auto("new/dir", dtype=torch.float32)(x).logits, ours)
    assert auto("new/dir").dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained("new/dir")
    sample = "def f7(x): return self"
    assert (tokenizer(sample, add_special_tokens=False)["input_ids"]
            == nanobit.tokenizer.make_tokenizer(spec["tokenizer"]).encode_ordinary(sample))
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)

@torch.no_grad()
def test_a_rotated_weight_is_rotated_back():
    w, x = torch.randn(24, 48), torch.randn(5, 48)
    for grid, bits in (("uniform", 3), ("fp4", 4), ("uniform", 1)):
        packed = QuantLinear.quest(w, bits, 16, grid)
        torch.testing.assert_close(x @ packed.weight().t(), packed(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotate(QuantLinear.quest(w, 3, 16).weight()), quest_fake_quant(w, 3))
    flat = QuantLinear.quest(w, 3, 16, rotated=False)
    torch.testing.assert_close(x @ flat.weight().t(), flat(x), atol=1e-4, rtol=1e-4)

def test_what_a_folder_cannot_say_is_said(capsys):
    m = LLaMA(model.LlamaConfig(257, 1, 64, 2, 2, 128, 16)).eval()
    m.replace_linears(lambda n, w: QuantLinear.quest(w.weight.detach(), 4, 4))
    spec = [chr(i) for i in range(256)]
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=spec, method="quest")
    status, out, _ = call(capsys, "model.py export m.pt dir")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert status == 0 and len(notes) == 1
    assert "quantized to 4 bits, which no format can say" in notes[0]
    assert LLaMA.from_pretrained("dir").config == m.config

def small_checkpoint(path="m.pt"):
    m = LLaMA(model.LlamaConfig(257, 1, 32, 2, 2, 48, 16))
    spec = [chr(i) for i in range(256)]
    nanobit.checkpoint.save_checkpoint(path, m, tokenizer=spec, method="dense")

def files_below(path="."):
    return {p: p.read_bytes() if p.is_file() else None for p in pathlib.Path(path).rglob("*")}

def test_an_export_is_all_or_nothing(folder, capsys, monkeypatch):
    """A folder that holds something is not touched; a full disk leaves none, and an empty one
    empty."""
    pathlib.Path("empty").mkdir()
    before = files_below()
    def refused(target):
        check_refused(call(capsys, f"model.py export hf {target}"), target)
        assert files_below() == before
    refused("hf")
    refused("text.txt")
    refused("text.txt/below")
    import safetensors.torch
    def full(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        for target in ("new", "new/below/it", "empty"):
            refused(target)
    replace = os.replace
    def last_one_fails(a, b):                          # what was moved before is taken back
        if os.path.basename(b) == "config.json":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        replace(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", last_one_fails)
        refused("empty")
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    for target in ("new/below", "empty"):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", interrupted)
            assert call(capsys, f"model.py export hf {target}")[0] == 130
        assert files_below() == before

EXPORTED = ["README.md", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json"]

@pytest.mark.parametrize("kind", ["new", "new/below", "empty", "a link", "the current one", "./"])
def test_an_export_goes_to_any_empty_folder(capsys, monkeypatch, work, kind):
    """It stays the folder that it is: whoever stands in it sees the files."""
    small_checkpoint()
    pathlib.Path("real").mkdir()
    pathlib.Path("link").symlink_to("real")
    inode = os.stat("real").st_ino
    target = {"empty": "real", "a link": "link", "the current one": "."}.get(kind, kind)
    if target in (".", "./"):
        monkeypatch.chdir("real")
    status, out, err = call(capsys, f"model.py export {work}/m.pt {target}")
    assert status == 0, err
    assert sorted(os.listdir(target)) == EXPORTED
    monkeypatch.chdir(work)
    assert os.stat("real").st_ino == inode and pathlib.Path("link").is_symlink()
    assert sorted(os.listdir(work)) == sorted({"m.pt", "real", "link", "text.txt"} | (
        {"new"} if kind.startswith("new") else set()))

def test_an_export_into_a_mount_needs_no_rename_of_it(capsys, monkeypatch):
    """A mount cannot be replaced (EBUSY), and nothing moves into it from outside (EXDEV)."""
    small_checkpoint()
    pathlib.Path("mount").mkdir()
    inside, replace = os.path.realpath("mount") + os.sep, os.replace
    def as_a_mount(a, b):
        a, b = os.path.realpath(a), os.path.realpath(b)
        if b + os.sep == inside:
            raise OSError(errno.EBUSY, "Device or resource busy")
        if a.startswith(inside) != b.startswith(inside):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(a, b)
    monkeypatch.setattr(os, "replace", as_a_mount)
    status, out, err = call(capsys, "model.py export m.pt mount")
    assert status == 0, err
    assert sorted(os.listdir("mount")) == EXPORTED

@pytest.mark.parametrize("name", ["../out", "/tmp/nanobit-out", "a/../../out"])
def test_a_checkpoint_cannot_write_beside_the_export(folder, capsys, name):
    m, content = nanobit.checkpoint.load_checkpoint("hf")
    content["tokenizer"]["texts"][name] = "mine"
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=content["tokenizer"], method="test")
    before = files_below()
    check_refused(call(capsys, "model.py export m.pt new"), name)
    assert files_below() == before

# ---- Our own tokenizer ------------------------------------------------------------------------

VARIED = ["Hello world", "  \n\n x\t\t y  ", "na\u00efve caf\u00e9",
          "\u5317\u4eac \u0661\u0662\u0663\u0664", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
          "a" * 700, " " * 500, " \n" * 300,
          "_x__ 1234567 don't -- [](){}", "\x00\x85\u2028", ""]

@pytest.fixture(scope="module")
def own_tokens():
    source = pathlib.Path(model.__file__).read_text()
    return [token.decode("latin-1") for token in nanobit.tokenizer.train_bpe([source], 700)]

def own_folder(tokens):
    m = LLaMA(model.LlamaConfig(len(tokens) + 1, 1, 32, 2, 2, 48, 64))
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=tokens, method="dense")

def test_our_own_tokenizer_gives_its_ids_in_transformers(own_tokens, capsys):
    own_folder(own_tokens)
    status, out, err = call(capsys, "model.py export m.pt dir")
    assert status == 0 and "note" not in out, err
    theirs = transformers.AutoTokenizer.from_pretrained("dir")
    ours = nanobit.tokenizer.make_tokenizer(own_tokens)
    draw = random.Random(0)
    source = pathlib.Path(model.__file__).read_text()
    texts = [source, *VARIED]
    for n in range(1, 300):
        texts.append("".join(draw.choices("ab _12\u00e9\u200d\n\t .,!()self", k=n)))
        texts.append("".join(map(chr, draw.choices(range(32, 0xd800), k=50))))
    for text in texts:
        ids = ours.encode_ordinary(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot_token

    # Read back, it is the one that the checkpoint has: the two can be compared.
    assert nanobit.checkpoint.load_checkpoint("dir")[1]["tokenizer"] == own_tokens
    status, out, err = call(capsys, "model.py eval dir --against m.pt --data text.txt --device cpu")
    assert status == 0 and "KL" in out, err

@pytest.mark.slow
def test_words_are_cut_alike_around_a_character():
    """Tokens of two bytes show whether a character is in one word with its neighbours: a letter, a
    digit, a sign and white space before and after it."""
    first = [chr(b) for b in (*range(128), *range(0xc2, 0xf5))]            # bytes of a character
    last = [chr(b) for b in range(0xc0)]
    pairs = [x + b for x in "a1!\t" for b in first] + [b + y for b in last for y in "b2! "]
    tokens = [chr(b) for b in range(256)] + list(dict.fromkeys(pairs))
    ours = nanobit.tokenizer.make_tokenizer(tokens)
    theirs = nanobit.tokenizer.make_tokenizer(
        {"tokenizer.json": hf_tokenizer.own_tokenizer_json(tokens), "end": len(tokens),
         "start": len(tokens), "n_vocab": len(tokens) + 1})
    some = (*range(0xd800), *range(0xe000, 0x20000), *range(0x20000, 0x110000, 101))
    texts = [f"a{c}b 1{c}2 !{c}! \t{c} b" for c in map(chr, some)]
    for start in range(0, len(texts), 2**14):
        part = texts[start:start + 2**14]
        assert ours.encode_ordinary_batch(part) == theirs.encode_ordinary_batch(part)

def test_another_file_is_no_tokenizer_of_ours(own_tokens):
    text = hf_tokenizer.own_tokenizer_json(own_tokens)
    assert hf_tokenizer.own_tokens(text) == own_tokens
    for other in (text + " ", text.replace("[\\\\r\\\\n]+", "[\\\\r\\\\n]"), "{}", "[]", "1",
                  '{"model": 1}',
                  json.dumps(json.loads(text) | {"normalizer": {"type": "NFC"}}),
                  json.dumps(json.loads(text) | {"model": {"vocab": {"a": 0}}})):
        assert hf_tokenizer.own_tokens(other) is None

# ---- The model card ---------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["normtweak.py", "lrqat.py"])
def test_a_card_has_the_numbers_of_the_runs_row(folder, capsys, script):
    status, _, err = call(capsys, f"{script} --model hf --data text.txt {RUNS[script]}")
    assert status == 0, err
    row = json.loads(pathlib.Path("out/results.jsonl").read_text().splitlines()[-1])
    for path in sorted(pathlib.Path("out").glob("*.pt")):
        _, content = nanobit.checkpoint.load_checkpoint(path)
        arm = row["arms"].get(content["method"], row)
        assert call(capsys, f"model.py export {path} {path.stem}")[0] == 0
        card = pathlib.Path(path.stem, "README.md").read_text()
        for fact in ("- base: hf", f"- method: {content['method']}",
                     f"{row['w_bits']} per weight for the codes, {arm['bpw']:.3f} with",
                     f"{arm['val_loss']:.4f} nats", f"{arm['bits_per_byte']:.4f} bits per byte",
                     f"(base: {row['base_val_loss']:.4f} nats)", f"KL {arm['kl']:.4f} nats",
                     f"{arm['same_top']:.2f} %", "- text: text.txt", row["command"]):
            assert fact in card, (fact, card)

def test_a_card_without_a_row_of_the_same_command_has_no_losses(capsys):
    small_checkpoint()
    for row in ('{"command": "python other.py", "method": "dense", "val_loss": 1}', "torn", "[]"):
        pathlib.Path("results.jsonl").write_text(row + "\n")
        assert call(capsys, "model.py export m.pt dir")[0] == 0
        assert "loss" not in pathlib.Path("dir/README.md").read_text()
        shutil.rmtree("dir")

# ---- Packages ---------------------------------------------------------------------------------

@pytest.mark.parametrize("package, version, old", [
    ("tokenizers", "0.15.0", True), ("tokenizers", "0.9.4", True), ("tokenizers", "0.15.1", False),
    ("tokenizers", "0.22.0rc1", False), ("safetensors", "0.4.1", True),
    ("safetensors", "0.4.2", False), ("safetensors", "1.0", False)])
def test_an_old_package_is_named_with_its_limit(folder, capsys, monkeypatch, package, version, old):
    """Before 0.15.1 tokenizers takes encode_special_tokens without a word and does nothing; before
    0.4.2 safetensors cannot tell that a tensor is float8. Both were tried."""
    monkeypatch.setattr(f"{package}.__version__", version)
    result = call(capsys, "model.py eval hf --data text.txt --seq-len 16")
    if old:
        check_refused(result, package, version, "pip install --upgrade")
    else:
        assert result[0] == 0, result[2]

def test_the_project_states_the_oldest_packages():
    tomllib = pytest.importorskip("tomllib")
    path = pathlib.Path(model.__file__).parent / "pyproject.toml"
    extras = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    needed = nanobit.hf.HF_PACKAGES
    assert extras["hf"] == [f"{name}>={version}" for name, version in needed.items()]

# ---- Older checkpoints ------------------------------------------------------------------------

def test_checkpoints_from_before_the_new_fields_load_and_unknown_fields_do_not():
    m = LLaMA(model.LlamaConfig(257, 1, 64, 2, 2, 128, 16))
    nanobit.checkpoint.save_checkpoint("m.pt", m, tokenizer=["a"])
    content = torch.load("m.pt", weights_only=True)
    for name in ("head_dim", "rope_scaling"):
        del content["config"][name]
    torch.save(content, "old.pt")
    assert nanobit.checkpoint.load_checkpoint("old.pt")[0].config == m.config
    content["config"]["new_field"] = 1
    torch.save(content, "newer.pt")
    with pytest.raises(UsageError, match="newer.pt"):
        nanobit.checkpoint.load_checkpoint("newer.pt")
