"""Training and evaluation: one recipe for the dense model and for every method.

  1. `train_step` is one step: batch, loss, gradient, clipping, optimizer.
  2. `train` is the loop around it: progress, looks at the dev split, a state every minute,
     and --resume, which goes on from that state.
  3. `evaluate` is the one loss that is reported anywhere; `dev_loss` is the one to choose by.
Read them in this order. The optimizer and its rate stand after them, --resume last.
"""
import contextlib
import copy
import math
import os
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from model import UsageError
from nanobit.checkpoint import load_weights, read_checkpoint, save_checkpoint
from nanobit.data import batch
from nanobit.ranks import (agree, average_gradients, distribute, placed_like, progress, rank, say,
                           sync_gradients, whole, world_size)

# ---- A step, and the loop around it -------------------------------------------------------------

def train_step(model, optimizer, data, args, step):
    """One optimizer step over args.batch_size windows -> its loss and its gradient's norm."""
    # A method's own optimizer may have a schedule, and a peak rate for each group of parameters.
    schedule = getattr(optimizer, "schedule", learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = schedule(step, args.steps, group.get("peak", args.lr))

    # All ranks draw the same batch, and each takes its share of it.
    inputs, targets = batch(data.train, step, args.batch_size, args.seq_len, args.seed,
                            args.device)
    x = inputs.chunk(world_size())[rank()]                                 # (b, T)
    y = targets.chunk(world_size())[rank()]                                # (b, T)

    # The share goes through the model in parts, whose gradients add up to that of the whole. A
    # part is never larger than on one rank; where W divides accumulate, each of W ranks has
    # accumulate / W of them.
    size = args.batch_size // args.accumulate
    total = 0.0
    for i in range(0, len(x), size):
        sync_gradients(model, is_last_part=i + size >= len(x))
        x_part = x[i:i + size]
        y_part = y[i:i + size]
        loss = model(x_part, y_part)[1]                # a name would keep the logits in memory
        loss = loss * (len(x_part) / len(x))
        loss.backward()
        total = total + loss.detach()

    # Average over the ranks, cut a gradient that is longer than 1, and move.
    learn = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(learn)
    gnorm = nn.utils.clip_grad_norm_(learn, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size(), whole(gnorm)

STOP = []  # not empty once Ctrl-C was pressed

@contextlib.contextmanager
def finish_step_on_ctrl_c():
    """Inside, Ctrl-C only fills STOP: the step that runs is finished and the state saved."""
    STOP.clear()
    handler = signal.signal(signal.SIGINT, lambda *_: STOP.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)

@finish_step_on_ctrl_c()
def train(model, data, args, path, status=lambda: "", optimizer=None):
    """Train in place up to args.steps. The state goes to `path` every minute, at each look at the
    dev split, on Ctrl-C and at the end; --resume goes on from it, on a CPU bit for bit.

    status() gives the method's own number for the progress line. Returns {"seconds", "tokens",
    "losses": one float a step}. A loss that is not finite raises UsageError and saves nothing.
    """
    # Begin, or go on where the state was saved. With --fsdp `distribute` replaces the parameters:
    # the scripts that have this flag pass no optimizer in.
    distribute(model, args)
    optimizer = optimizer or make_optimizer(model, args.lr)
    losses = []
    seconds_before = 0.0
    if args.resume:
        losses, seconds_before = resume(model, optimizer, args, data, path)
    if args.compile:
        model.compile_parts()

    # perf_counter, unlike time.time, has fine steps everywhere and is never set back.
    start = last_line = last_save = time.perf_counter()
    line_step = saved = len(losses)                    # the steps of the last line and state
    pending = []                                       # losses that are still on the device
    for done in range(len(losses) + 1, args.steps + 1):
        # A step. Its loss is not read yet, since that would wait for the GPU.
        loss, gnorm = train_step(model, optimizer, data, args, done - 1)
        pending.append(loss + 0 * gnorm)               # NaN where the gradient is not finite

        # What is due? The clocks of ranks differ, and Ctrl-C may reach one of them first. A save is
        # also a line, since `losses` must then hold every step.
        now = time.perf_counter()
        look = args.eval_every and done % args.eval_every == 0
        save = look or STOP or done == args.steps or now - last_save > 60
        line = save or done == 1 or now - last_line > 10
        save, line = agree(save, line)

        # The progress line, for which the losses are read at last.
        if line:
            losses += check_finite(torch.stack(pending).tolist(), len(losses), saved, path)
            pending = []
            ms = (time.perf_counter() - last_line) / (done - line_step) * 1e3
            rate = optimizer.param_groups[0]["lr"]
            say(f"step {done:>4}/{args.steps} | loss {losses[-1]:.4f} | lr {rate:.1e} | "
                f"gnorm {gnorm:.2f} |{status()} {speed(args, done, max(ms, 1e-6))}")
            last_line = time.perf_counter()
            line_step = done

        if look:
            look_at_dev(model, data, args, done)

        # The state, from which --resume goes on. What it took is not the next steps' time.
        if save:
            seconds = seconds_before + time.perf_counter() - start
            save_checkpoint(path, model, settings=settings(args), data=data.digest, losses=losses,
                            optimizer=optimizer.state_dict(), seconds=seconds)
            saved = done
            last_line = last_save = time.perf_counter()

        # `save` may have been due for another reason, and all ranks have to stop together.
        if save and agree(STOP)[0]:
            say(f"interrupted: {path} holds step {done}; go on with the same command and --resume")
            raise SystemExit(130)

    return {"seconds": seconds_before + time.perf_counter() - start, "losses": losses,
            "tokens": args.steps * args.batch_size * args.seq_len}

def speed(args, done, ms):
    """The end of a progress line: how long a step takes, and the steps that are left."""
    thousands = args.batch_size * args.seq_len / ms    # of tokens per second
    eta = (args.steps - done) * ms / 1e3
    return f"{ms:.0f} ms | {thousands:.1f}k tok/s | eta {eta:.0f}s"

def look_at_dev(model, data, args, done):
    dev = dev_loss(model, data, args.seq_len)
    tokens = min(DEV_WINDOWS * args.seq_len, len(data.dev) - 1)
    say(f"step {done:>4}/{args.steps} | dev loss {dev:.4f} nats/token on {tokens} tokens")

def train_arm(model, data, args, path, status, optimizer):
    """train, for one of the runs that a command compares: --resume begins those not yet begun."""
    own = copy.copy(args)
    own.resume = args.resume and os.path.exists(path)
    return train(model, data, own, path, status, optimizer)

def check_finite(losses, first, saved, path):
    """The losses of the steps after `first`. Raises UsageError for one that is not finite."""
    for step, loss in enumerate(losses, first + 1):
        if not math.isfinite(loss):
            kept = f"{path} holds step {saved}" if saved else "nothing was saved before"
            raise UsageError(f"the loss or its gradient is not finite at step {step}; {kept}; "
                             "try a lower --lr")
    return losses

# ---- The losses ---------------------------------------------------------------------------------

KEPT = 2**30             # bytes of a model's outputs that `evaluate` keeps where it is asked to

@torch.no_grad()
@torch.compiler.set_stance("force_eager")              # no compiling for these shapes
def evaluate(model, tokens, seq_len, tokenizer=None, batch_size=None, keep=None):
    """Mean loss over non-overlapping windows; every token but the first is scored once.

    tokens: ids (n,) -> {"loss": nats per token, "ppl": its exponential} and, with a tokenizer,
    "bits_per_byte" of the text that was tokenized, the only one to compare across tokenizers.
    batch_size: windows at a time, see ValWindows. nanobit/compare.py does the same for two models.
    keep: a list that gets the LLaMA's last block's outputs, for `compare`, if they are few.
    """
    windows = ValWindows(model, tokens, seq_len, batch_size)

    # What is kept stays on the device: of large models too much.
    if keep is not None and len(tokens) * model.config.n_embd * model.dtype.itemsize > KEPT:
        keep = None

    # Add up their losses. A lean model never holds the logits of all tokens.
    was_lean = model.lean
    model.lean = True
    total = 0.0
    for part in progress(windows.parts, "evaluating"):
        x, y = windows.batch(part)
        if keep is None:
            loss = model(x, y)[1]
        else:
            keep.append(model.trunk(x))                                    # (windows, tokens, C)
            loss = model.predict(keep[-1], y)[1]
        total += loss.item() * y.numel()
    model.lean = was_lean
    return scores_of(total, tokens, tokenizer)

class ValWindows:
    """The windows of `evaluate`, several at a time, and a shorter one for what is left at the end.

    batch_size: so many at a time. By default, on a CPU, 2^13 tokens, for which packed weights are
    unpacked once; on a GPU as many as have 2^26 numbers in each of the SwiGLU's tensors, some
    1 GB in all, so that it never waits for the CPU.
    """

    def __init__(self, model, tokens, seq_len, batch_size=None):
        self.ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
        self.device = next(model.parameters()).device
        if not batch_size:
            cuda = self.device.type == "cuda"
            together = 2**26 // model.config.n_hidden if cuda else 2**13   # tokens
            batch_size = max(1, together // seq_len)

        n = len(tokens) - 1                            # each token has the one after it as target
        full = n // seq_len
        self.parts = []                                # (first token, windows, tokens of each)
        for i in range(0, full, batch_size):
            self.parts.append((i * seq_len, min(batch_size, full - i), seq_len))
        if n % seq_len:
            self.parts.append((full * seq_len, 1, n % seq_len))

    def batch(self, part):
        """Ids and targets (windows, tokens) of one of the parts, on the model's device."""
        i, b, t = part
        x = self.ids[i:i + b * t].view(b, t).to(self.device)
        y = self.ids[i + 1:i + 1 + b * t].view(b, t).to(self.device)
        return x, y

def scores_of(total, tokens, tokenizer=None):
    """What `evaluate` returns, from the summed loss of all tokens but the first."""
    # The first token is context: its bytes are not scored.
    loss = total / (len(tokens) - 1)
    scores = {"loss": loss, "ppl": math.exp(min(loss, 700))}               # exp(710) overflows
    if tokenizer:
        n_bytes = tokenizer.count_bytes(tokens) - tokenizer.count_bytes(tokens[:1])
        scores["bits_per_byte"] = total / math.log(2) / max(1, n_bytes)
    return scores

DEV_WINDOWS = 64

def dev_loss(model, data, seq_len):
    """Nats per token on the first windows of the dev split: settings are chosen by this one."""
    return evaluate(model, data.dev[:DEV_WINDOWS * seq_len + 1], seq_len)["loss"]

def kl_loss(teacher, student):
    """KL(teacher || student) of logits (..., vocab), mean over tokens. The gradient of equal
    logits is exactly zero, so that Adam does not blow noise up."""
    # p sums to 1, so the student's logsumexp can stand outside of the sum. Its gradient is
    # exp(student - logsumexp), computed just like p: of equal logits the two cancel exactly.
    log_p = teacher - teacher.logsumexp(-1, keepdim=True)                  # (..., vocab)
    apart = (log_p.exp() * (log_p - student)).sum(-1)                      # (...)
    return (student.logsumexp(-1) + apart).mean()

# ---- The recipe ---------------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """Cosine up from peak/100 over the first tenth of the steps, then cosine down to peak/10."""
    warm = max(1, round(0.1 * steps))
    if step < warm:
        low = peak / 100
        t = 1 - step / warm                            # 1 ... 0: how far from the peak
    else:
        low = peak / 10
        t = (step - warm) / max(1, steps - 1 - warm)   # 0 ... 1
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * t))

def make_optimizer(model, lr):
    """AdamW; weight decay for what the blocks' linears own (with LSQ, as in the QuEST authors'
    runs, also its step sizes), not for embedding, head and norms."""
    owned = {id(p) for _, linear in model.linears() for p in linear.parameters()}
    decayed = [p for p in model.parameters() if id(p) in owned]
    others = [p for p in model.parameters() if id(p) not in owned]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

# ---- --resume -----------------------------------------------------------------------------------

def settings(args):
    """What a checkpoint keeps of the command line: plain values."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "out")}

# Settings that a resumed run may change.
FREE = {"eval_every", "compile", "fsdp", "data", "embed_bits"}

def resume(model, optimizer, args, data, path):
    """Load model and optimizer from `path` -> (losses so far, seconds so far)."""
    content = read_checkpoint(path)
    if "optimizer" not in content:
        raise UsageError(f"{path} holds no training state to resume")

    # The text is compared by its content, wherever it lies now, and so is not a setting.
    if content["data"] != data.digest:
        raise UsageError(f"--data {data.name} is not the text that {path} was trained on")

    # The settings have to be those of the state. The names of both sides are compared, so that the
    # state of another method, which has other names, is refused.
    free = set(FREE)
    if args.model:
        free |= {"size", "vocab"}                      # the model's own
    old = dict(content["settings"])
    new = settings(args)
    if "teacher" in new:
        old.setdefault("teacher", "none")              # before this flag, all learned from the text
    for name in old | new:
        if name not in free and not same_setting(name, old.get(name), new.get(name)):
            raise UsageError(f"--{name.replace('_', '-')} is {new.get(name)} here and "
                             f"{old.get(name)} in {path}; give the same settings, or leave "
                             "--resume out")

    # The weights, then the optimizer's moments, each sharded as its parameter is. AdamW's count of
    # steps has no dimension and is never sharded.
    load_weights(model, content["model"], path)
    learn = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in content["optimizer"]["state"].items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim():
                state[name] = placed_like(value, learn[i])
    optimizer.load_state_dict(content["optimizer"])
    say(f"resumed {path} at step {len(content['losses'])}/{args.steps}")
    return content["losses"], content["seconds"]

def same_setting(name, a, b):
    """Are the values equal? Two paths are where they lead to one file, however they are spelled."""
    if name in ("model", "teacher") and a and b:
        return os.path.realpath(a) == os.path.realpath(b)
    return a == b
