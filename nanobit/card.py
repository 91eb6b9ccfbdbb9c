"""The model card of an exported folder, README.md: what the model is and does, how to load it.

A run saves a checkpoint and then scores what it saved, so the file does not know its own loss. Its
row in the results.jsonl beside it does: `result_row` finds it.
"""
import contextlib
import os
import shlex

from model import UsageError
from nanobit.runs import read_rows
from quantizers import PackedVQ, QuantLinear, bits_per_weight

def result_row(path, content):
    """What the results.jsonl beside a checkpoint says of it; {} where that says nothing.

    content: what load_checkpoint returned. A row is the file's if it has the command that wrote the
    file. Where the command wrote several files, the row has an arm for the method of each.
    """
    command = content.get("command")
    method = content.get("method")
    file = os.path.join(os.path.dirname(path), "results.jsonl")
    found = {}
    if command is None or not os.path.isfile(file):
        return found

    # The last row that fits. Where the file cannot be read, a card without losses is better than
    # none.
    with contextlib.suppress(UsageError):
        for row in read_rows(file):
            if row.get("command") != command:
                continue
            arms = row.get("arms")
            if row.get("method") == method:
                found = row
            elif isinstance(arms, dict) and method in arms:
                found = {"base_val_loss": row.get("base_val_loss")} | arms[method]

    # A card quotes both losses or none.
    return found if {"val_loss", "bits_per_byte"} <= set(found) else {}

def facts(model, content):
    """What is known of a checkpoint before it is converted: {name: text}. Older checkpoints have no
    command, some have no settings."""
    settings = content.get("settings", {})
    base = settings.get("model")
    if base is None and "size" in settings:
        base = f"nanobit's own of --size {settings['size']}"
    bpw, packed = bits_per_weight(model)
    params = packed + sum(p.numel() for p in model.parameters())
    known = {"base": base, "method": content.get("method"),
             "parameters": f"{params:,}, of which {packed:,} are quantized"}

    # Bits: of a code, of the whole, and of what is multiplied with it.
    linears = [m for _, m in model.linears() if isinstance(m, QuantLinear)]
    if linears:
        codes = " and ".join(str(bits) for bits in sorted({code_bits(m) for m in linears}))
        inputs = min(m.a_bits for m in linears)
        inputs = min(inputs, model.config.a_bits, model.config.kv_bits)
        known["bits"] = (f"{codes} per weight for the codes, {bpw:.3f} with all that the "
                         f"checkpoint has; activations {inputs}")

    # What its run measured, and on which text.
    row = content.get("row")
    if row:
        known |= losses(row)
    if row and "data" in settings:
        known["text"] = settings["data"] or "the sources of Python's library"
    known["made by"] = content.get("command")
    return known

def losses(row):
    """What `result_row` found, in words: {name: text}."""
    text = f"{row['val_loss']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte"
    if row.get("base_val_loss") is not None:
        text += f" (base: {row['base_val_loss']:.4f} nats)"
    known = {"validation loss": text}
    if row.get("kl") is not None:
        known["distance from the base"] = (f"KL {row['kl']:.4f} nats per token, the same top token "
                                           f"for {row['same_top']:.2f} %")
    return known

def code_bits(linear):
    """Bits of a packed linear's codes per weight."""
    if isinstance(linear, PackedVQ):
        M, _, g = linear.codebooks.shape
        return linear.bits * M / g
    return linear.bits

def model_card(folder, known, weights, has_tokenizer):
    """README.md of a folder. known: its `facts`; weights: export.py's Weights, which say what the
    linears have become and what loading them takes."""
    # What it is. The lines between --- are settings that Hugging Face's site reads.
    name = os.path.basename(os.path.abspath(folder))
    lines = ["---", "library_name: transformers", "---", f"# {name}", "",
             "A LLaMA, written by nanobit.", ""]
    for fact, value in (known | {"stored here": weights.text}).items():
        if value is not None:
            lines.append(f"- {fact}: {value}")

    # How to load it: with llama.cpp where it is a GGUF file, and with transformers.
    source = repr(name)
    if weights.file:
        path = shlex.quote(f"{name}/{weights.file}")
        lines += ["", "```", f"llama-cli -m {path}", "```"]
        source += f", gguf_file={weights.file!r}"
    packages = shlex.join(["transformers>=5", *weights.packages])
    classes = ["AutoModelForCausalLM"]
    loads = [f"model = AutoModelForCausalLM.from_pretrained({source})"]
    if has_tokenizer:
        classes.append("AutoTokenizer")
        loads.append(f"tokenizer = AutoTokenizer.from_pretrained({name!r})")
    lines += ["", "```", f"pip install {packages}", "```", "", "```python",
              *weights.before, f"from transformers import {', '.join(classes)}", *loads,
              *(line.format(name=name) for line in weights.after), "```"]
    if weights.settings.get("torch_dtype") == "float32":
        lines += ["", "It has float32 numbers, as trained. `dtype=torch.bfloat16` rounds them by "
                      "up to 0.4 %."]

    # Python reads the bytes of a file name that are no UTF-8 as characters that cannot be written.
    text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()
