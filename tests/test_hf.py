"""Hugging Face folders, against transformers and tokenizers themselves.

Random-weight checkpoints of every form that is read, written by transformers, must give its logits;
an exported folder must load there and give the packed model's. Bad folders are one line. Skipped
where the packages safetensors, tokenizers and transformers are not installed.
"""
import copy
import json
import pathlib
import shutil
import sys

import pytest
import torch

import model
import normtweak
from conftest import TEXT, call, check_refused
from model import LLaMA, UsageError
from quantizers import QuantLinear, quest_fake_quant, rotate, rtn

transformers = pytest.importorskip("transformers")
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
def work(tmp_path, monkeypatch, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "HELD", {})
    pathlib.Path("text.txt").write_text(text)
    return tmp_path

@pytest.fixture
def folder(work, bpe):
    """The SmolLM2 form with its tokenizer, in bfloat16 like most published weights."""
    reference("smollm2").bfloat16().save_pretrained("hf")
    pathlib.Path("hf/tokenizer.json").write_text(bpe)
    return "hf"

def ids(m, *shape):
    return torch.randint(m.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))

def close(got, want, tolerance=1e-4):
    assert ((got - want).norm() / want.norm()).item() < tolerance
    assert ((got - want).abs().max() / want.abs().max()).item() < tolerance

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

def test_unneeded_rotary_tensors_and_a_tied_head_are_left_out(folder):
    from safetensors.torch import load_file, save_file
    state = load_file("hf/model.safetensors")
    want = LLaMA.from_pretrained("hf")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = torch.zeros(3)
    save_file(state, "hf/model.safetensors")
    m = LLaMA.from_pretrained("hf")
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), want.parameters()))

# ---- The tokenizer ----------------------------------------------------------------------------

def test_tokens_are_those_of_the_tokenizers_library(folder, bpe, text):
    spec = model.read_hf_tokenizer(folder)
    assert json.loads(json.dumps(spec)) == spec        # plain values
    enc, want = model.make_tokenizer(spec), tokenizers.Tokenizer.from_str(bpe)
    want.no_truncation()
    sample = text[:500]
    assert enc.encode_ordinary(sample) == want.encode(sample, add_special_tokens=False).ids
    assert enc.encode_ordinary_batch([sample, "a"]) == [enc.encode_ordinary(sample),
                                                        enc.encode_ordinary("a")]
    assert enc.decode_bytes(enc.encode_ordinary(sample)) == sample.encode()
    assert (enc.n_vocab, enc.eot_token, enc.start_token) == (300, 0, 1)

def test_special_tokens_in_a_text_stay_text(folder):
    enc = model.make_tokenizer(model.read_hf_tokenizer(folder))
    assert not {0, 1} & set(enc.encode_ordinary("a<|end|>b<s>"))
    assert enc.decode(enc.encode_ordinary("a<|end|>b<s>")) == "a<|end|>b<s>"

def test_data_has_the_end_token_after_every_document(folder, text):
    spec = model.read_hf_tokenizer(folder)
    for _ in range(2):                                 # tokenized, then from the cache
        data = model.load_data("text.txt", "1024", 16, spec=spec)
        assert data.spec == spec and data.val[-1] == 0 and (data.val[:-1] != 0).all()
        parts = [data.tokenizer.decode(part[:-1].tolist())
                 for part in (data.train, data.dev, data.val)]
        assert "".join(parts) == text

def test_several_end_tokens_take_the_first(folder):
    edit("hf/config.json", eos_token_id=[5, 0], bos_token_id=None)
    spec = model.read_hf_tokenizer("hf")
    assert (spec["end"], spec["start"]) == (5, 5)

# ---- Bad folders ------------------------------------------------------------------------------

def tensors(**changes):
    """Write model.safetensors again with other tensors; None takes one away."""
    from safetensors.torch import load_file, save_file
    state = load_file("hf/model.safetensors") | changes
    save_file({k: v for k, v in state.items() if v is not None}, "hf/model.safetensors")

Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda: pathlib.Path("hf/config.json").unlink(), "config.json"),
    "no tokenizer": (lambda: pathlib.Path("hf/tokenizer.json").unlink(), "tokenizer.json"),
    "no weights": (lambda: pathlib.Path("hf/model.safetensors").unlink(), "model.safetensors"),
    "no shard": (lambda: pathlib.Path("hf/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {Q: "model-00001-of-00002.safetensors"}})),
        "model-00001-of-00002.safetensors"),
    "config is no JSON": (lambda: pathlib.Path("hf/config.json").write_text("{"), "config.json"),
    "config is a list": (lambda: pathlib.Path("hf/config.json").write_text("[]"), "config.json"),
    "tokenizer is no JSON": (lambda: pathlib.Path("hf/tokenizer.json").write_text("x"),
                             "tokenizer.json"),
    "tokenizer is another": (lambda: pathlib.Path("hf/tokenizer.json").write_text("{}"),
                             "tokenizer.json"),
    "cut weights": (lambda: pathlib.Path("hf/model.safetensors").write_bytes(
        pathlib.Path("hf/model.safetensors").read_bytes()[:-9]), "model.safetensors is damaged"),
    "missing tensor": (lambda: tensors(**{Q: None}), Q),
    "bias": (lambda: tensors(**{Q.replace("weight", "bias"): torch.zeros(72)}), "q_proj.bias"),
    "wrong shape": (lambda: tensors(**{Q: torch.zeros(72, 71)}), Q),
    "integers": (lambda: tensors(**{Q: torch.zeros(72, 72, dtype=torch.int32)}), Q),
    "bytes": (lambda: tensors(**{Q: torch.zeros(72, 72, dtype=torch.float8_e4m3fn)}), Q),
    "width": (lambda: edit("hf/config.json", hidden_size=73, head_dim=None), "73"),
    "no width": (lambda: edit("hf/config.json", hidden_size=None), "hidden_size"),
    "text for a width": (lambda: edit("hf/config.json", hidden_size="72"), "hidden_size"),
    "no end token": (lambda: edit("hf/config.json", eos_token_id=None), "eos_token_id"),
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
    data = model.load_data("text.txt", "1024", 16, spec=model.read_hf_tokenizer("hf"))
    want = transformers.AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)
    nll, tokens = 0.0, torch.from_numpy(data.val.astype("int64"))
    for i in range(0, len(tokens) - 1, 16):
        x, y = tokens[i:i + 16][:len(tokens) - 1 - i], tokens[i + 1:i + 17]
        nll += torch.nn.functional.cross_entropy(want(x[None]).logits[0], y, reduction="sum").item()
    assert float(out.split("loss ")[-1]) == pytest.approx(nll / (len(tokens) - 1), abs=2e-5)

def test_a_sample_starts_with_the_start_token(folder, capsys, monkeypatch):
    seen, generate = [], LLaMA.generate
    monkeypatch.setattr(LLaMA, "generate",
                        lambda self, x, *rest: seen.append(x) or generate(self, x, *rest))
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
                        "--host rtn")[0] == 0
    status, out, err = call(capsys, "normtweak.py --model out/rtn-w3.pt --teacher hf "
                                    f"--data text.txt {RUNS['normtweak.py']}")
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
    saves, save = [], normtweak.save_result
    def look(path, m, *rest):
        saves.append({(type(b).__name__, p.dtype) for n, b in m.named_modules()
                      for p in b._parameters.values() if p is not None})
        assert m.embed.weight is teachers[0][0].embed.weight               # shared, not copied
        return save(path, m, *rest)
    monkeypatch.setattr(normtweak, "save_result", look)
    status, out, err = call(capsys, f"normtweak.py --model hf --data text.txt "
                                    f"{RUNS['normtweak.py']}")
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
    m, content = model.load_checkpoint("hf")
    m = pack(m, kind)
    model.save_checkpoint("m.pt", m, tokenizer=content["tokenizer"], method="test")
    pathlib.Path("new/dir").mkdir(parents=True)        # there, and empty
    status, out, err = call(capsys, "model.py export m.pt new/dir")
    assert status == 0 and "note" not in out and err == ""
    x, (again, spec) = ids(m, 2, 96), model.load_checkpoint("new/dir")
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
            == model.make_tokenizer(spec["tokenizer"]).encode_ordinary(sample))
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
    model.save_checkpoint("m.pt", m, tokenizer=spec, method="quest")
    status, out, _ = call(capsys, "model.py export m.pt dir")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert status == 0 and len(notes) == 2
    assert "4 bits" in notes[0] and "tokenizer.json" in notes[1]
    assert not pathlib.Path("dir/tokenizer.json").exists()
    assert LLaMA.from_pretrained("dir").config == m.config

def test_an_export_is_all_or_nothing(folder, capsys, monkeypatch):
    """A folder that holds something is not touched; a full disk leaves none."""
    before = sorted(pathlib.Path(".").rglob("*"))
    def refused(target):
        check_refused(call(capsys, f"model.py export hf {target}"), target)
        assert sorted(pathlib.Path(".").rglob("*")) == before
    refused("hf")
    refused("text.txt")
    refused("text.txt/below")
    import safetensors.torch
    def full(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    refused("new")

def test_checkpoints_from_before_the_new_fields_load_and_unknown_fields_do_not():
    m = LLaMA(model.LlamaConfig(257, 1, 64, 2, 2, 128, 16))
    model.save_checkpoint("m.pt", m, tokenizer=["a"])
    content = torch.load("m.pt", weights_only=True)
    for name in ("head_dim", "rope_scaling"):
        del content["config"][name]
    torch.save(content, "old.pt")
    assert model.load_checkpoint("old.pt")[0].config == m.config
    content["config"]["new_field"] = 1
    torch.save(content, "newer.pt")
    with pytest.raises(UsageError, match="newer.pt"):
        model.load_checkpoint("newer.pt")
