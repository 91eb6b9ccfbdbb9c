"""Training and evaluation: one recipe for the dense model and for every method.

`train_step` is the step: batch, loss, gradient, clipping, optimizer. `train` is the loop around it:
progress, looks at the dev split, a state every minute, and --resume. `evaluate` is the one loss
that is reported anywhere.
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
                           share_gradients_of_last, whole, world_size)

def settings(args):
    """What a checkpoint keeps of the command line: plain values."""
    return {k: v for k, v in vars(args).items() if k not in ("resume", "out")}

@torch.no_grad()
@torch.compiler.set_stance("force_eager")              # no compiling for these shapes
def evaluate(model, tokens, seq_len, tokenizer=None, batch_size=None):
    """Mean loss over non-overlapping windows; every token but the first is scored once.

    tokens: ids (n,) -> {"loss": nats per token, "ppl": its exponential} and, with a tokenizer,
    "bits_per_byte" of the text that was tokenized, the only one to compare across tokenizers.
    batch_size: windows at a time. By default, on a CPU, 2^13 tokens, for which packed weights are
    unpacked once; on a GPU as many as take some 1 GB, so that it never waits for the CPU.
    """
    device, n = next(model.parameters()).device, len(tokens) - 1
    together = 2**26 // model.config.n_hidden if device.type == "cuda" else 2**13  # tokens
    batch_size = batch_size or max(1, together // seq_len)
    lean, model.lean = getattr(model, "lean", False), True                 # few logits at a time
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    full, total = n // seq_len, 0.0
    windows = [(i * seq_len, min(batch_size, full - i), seq_len)
               for i in range(0, full, batch_size)]
    if n % seq_len:
        windows.append((full * seq_len, 1, n % seq_len))                   # the short last one
    for i, b, t in progress(windows, "evaluating"):
        x, y = (ids[j:j + b * t].view(b, t).to(device) for j in (i, i + 1))
        total += model(x, y)[1].item() * (b * t)
    loss, model.lean = total / n, lean
    scores = {"loss": loss, "ppl": math.exp(min(loss, 700))}
    if tokenizer:                                      # the first token is context, not scored
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
    log_p = teacher - teacher.logsumexp(-1, keepdim=True)
    return (student.logsumexp(-1) + (log_p.exp() * (log_p - student)).sum(-1)).mean()

def learning_rate(step, steps, peak):
    """Cosine up from peak/100 over the first tenth of the steps, then cosine down to peak/10."""
    warm = max(1, round(0.1 * steps))
    if step < warm:
        low, t = peak / 100, 1 - step / warm
    else:
        low, t = peak / 10, (step - warm) / max(1, steps - 1 - warm)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * t))

def make_optimizer(model, lr):
    """AdamW; weight decay for what the blocks' linears own (with LSQ, as in the QuEST authors'
    runs, also its step sizes), not for embedding, head and norms."""
    decay = {id(p) for _, m in model.linears() for p in m.parameters()}
    groups = [{"params": [p for p in model.parameters() if (id(p) in decay) == d],
               "weight_decay": 0.1 * d} for d in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

STOP = []  # not empty once Ctrl-C was pressed

@contextlib.contextmanager
def finish_step_on_ctrl_c():
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
    A method's own optimizer may have a `schedule`, and groups with a "peak" rate, not args.lr.
    """
    distribute(model, args)
    optimizer, losses, before = optimizer or make_optimizer(model, args.lr), [], 0.0
    if args.resume:
        losses, before = resume(model, optimizer, args, data, path)
    if args.compile:
        model.compile_parts()
    # perf_counter, unlike time.time, has fine steps everywhere and is never set back.
    start = last_line = last_save = time.perf_counter()
    pending, line_step, saved = [], len(losses), len(losses)   # pending: still on the device
    for done in range(len(losses) + 1, args.steps + 1):
        loss, gnorm = train_step(model, optimizer, data, args, done - 1)
        pending.append(loss + 0 * gnorm)               # NaN if the gradient is not finite
        look = args.eval_every and done % args.eval_every == 0
        save = look or STOP or done == args.steps or time.perf_counter() - last_save > 60
        save, line = agree(save, save or done == 1 or time.perf_counter() - last_line > 10)
        if line:
            losses += check_finite(torch.stack(pending).tolist(), len(losses), saved, path)
            ms = (time.perf_counter() - last_line) / (done - line_step) * 1e3
            pending, ms = [], max(ms, 1e-6)            # a coarse clock may not have moved
            speed, eta = args.batch_size * args.seq_len / ms, (args.steps - done) * ms / 1e3
            say(f"step {done:>4}/{args.steps} | loss {losses[-1]:.4f} | "
                f"lr {optimizer.param_groups[0]['lr']:.1e} | gnorm {gnorm:.2f} |{status()} "
                f"{ms:.0f} ms | {speed:.1f}k tok/s | eta {eta:.0f}s")
            last_line, line_step = time.perf_counter(), done
        if look:
            dev = dev_loss(model, data, args.seq_len)
            tokens = min(DEV_WINDOWS * args.seq_len, len(data.dev) - 1)
            say(f"step {done:>4}/{args.steps} | dev loss {dev:.4f} nats/token on {tokens} tokens")
        if save:
            seconds = before + time.perf_counter() - start
            save_checkpoint(path, model, settings=settings(args), data=data.digest, losses=losses,
                            optimizer=optimizer.state_dict(), seconds=seconds)
            saved, last_line, last_save = done, time.perf_counter(), time.perf_counter()
        if save and agree(STOP)[0]:
            say(f"interrupted: {path} holds step {done}; go on with the same command and --resume")
            raise SystemExit(130)
    return {"seconds": before + time.perf_counter() - start, "losses": losses,
            "tokens": args.steps * args.batch_size * args.seq_len}

def train_arm(model, data, args, path, status, optimizer):
    """train, for one of the runs that a command compares: --resume begins those not yet begun."""
    own = copy.copy(args)
    own.resume = args.resume and os.path.exists(path)
    return train(model, data, own, path, status, optimizer)

def train_step(model, optimizer, data, args, step):
    """One optimizer step over args.batch_size windows -> its loss and its gradient's norm."""
    schedule = getattr(optimizer, "schedule", learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = schedule(step, args.steps, group.get("peak", args.lr))
    x, y = (ids.chunk(world_size())[rank()] for ids in batch(
        data.train, step, args.batch_size, args.seq_len, args.seed, args.device))
    # Windows at a time on a rank. The parts of a batch are shared out too: W ranks take
    # accumulate / W of them each.
    size, total = args.batch_size // args.accumulate, 0.0
    for i in range(0, len(x), size):
        share_gradients_of_last(model, i + size >= len(x))
        xs, ys = x[i:i + size], y[i:i + size]
        loss = model(xs, ys)[1] * (len(xs) / len(x))
        loss.backward()
        total = total + loss.detach()
    learn = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(learn)
    gnorm = nn.utils.clip_grad_norm_(learn, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size(), whole(gnorm)

def check_finite(losses, first, saved, path):
    for i, loss in enumerate(losses, first + 1):
        if not math.isfinite(loss):
            kept = f"{path} holds step {saved}" if saved else "nothing was saved before"
            raise UsageError(f"the loss or its gradient is not finite at step {i}; {kept}; "
                             "try a lower --lr")
    return losses

def resume(model, optimizer, args, data, path):
    """Load model and optimizer from `path` -> (losses so far, seconds so far)."""
    content = read_checkpoint(path)
    if "optimizer" not in content:
        raise UsageError(f"{path} holds no training state to resume")
    if content["data"] != data.digest:                 # the text itself, wherever it lies now
        raise UsageError(f"--data {data.name} is not the text that {path} was trained on")
    free = {"eval_every", "compile", "fsdp", "data"}
    if os.path.isdir(args.model or ""):
        free.add("size")                               # here it is the folder's name
    old, new = content["settings"], settings(args)
    for name in old | new:                             # another method's settings have other names
        if name not in free and not same_setting(name, old.get(name), new.get(name)):
            raise UsageError(f"--{name.replace('_', '-')} is {new.get(name)} here and "
                             f"{old.get(name)} in {path}; give the same settings, or leave "
                             "--resume out")
    load_weights(model, content["model"], path)
    learn = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in content["optimizer"]["state"].items():
        state.update({k: placed_like(t, learn[i]) for k, t in state.items()
                      if torch.is_tensor(t) and t.dim()})
    optimizer.load_state_dict(content["optimizer"])
    say(f"resumed {path} at step {len(content['losses'])}/{args.steps}")
    return content["losses"], content["seconds"]

def same_setting(name, a, b):
    """Are the values equal? Two paths are where they lead to one file, however they are spelled."""
    if name in ("model", "teacher") and a and b:
        return os.path.realpath(a) == os.path.realpath(b)
    return a == b
