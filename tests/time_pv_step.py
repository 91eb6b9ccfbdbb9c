"""Time of a PV-Tuning step against a dense step with the same teacher, in turns in one process.

    python tests/time_pv_step.py                       # tiny preset on the CPU
    python tests/time_pv_step.py 100M cuda 32000       # batch 32 x 512, vocabulary 32000

Random tokens and codes (2x4g4); medians of 8 steps after 3 to warm up, with gradient clip.
"""
import copy
import os
import statistics
import sys
import time
import types

import torch
import torch.nn as nn

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import model as m
import nanobit.train
from pvtune import Codebooks, Distilled, PVLinear, PVOptimizer

class Dense(nn.Module):
    """A student without codes, for Distilled's loss."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher, self.linears = student, [teacher], student.linears

    forward = Distilled.forward

def quantized(_, linear):
    O, C = linear.weight.shape
    device = linear.weight.device
    codes = torch.randint(16, (1, O, C // 4, 2), device=device)
    codebooks = 0.02 * torch.randn(1, 2, 16, 4, device=device)
    scales = torch.ones(1, O, device=device)
    return PVLinear(Codebooks(codes, codebooks, scales))

def main():
    size, device, vocab = (sys.argv[1:] + ["tiny", "cpu", "1024"][len(sys.argv) - 1:])[:3]
    cuda, p = device == "cuda", m.PRESETS[size]
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    ids = torch.randint(int(vocab), (32 if cuda else p.batch_size, p.seq_len), device=device)
    teacher = m.LLaMA(p.config(int(vocab)), torch.bfloat16 if cuda else torch.float32).to(device)
    args = types.SimpleNamespace(lr=6e-3, code_lr=0.07, tau=0.01, rank="residual", trust=0.2,
                                 seed=0)
    runs, seconds = {}, {}
    for name in ("dense", "p", "pv", "ste"):
        student = copy.deepcopy(teacher)
        if name == "dense":
            student = Dense(student, teacher)
            runs[name] = student, nanobit.train.make_optimizer(student, 1e-4)
        else:
            student = Distilled(student.replace_linears(quantized), teacher)
            runs[name] = student, PVOptimizer(student, args, name)
        for group in runs[name][1].param_groups:
            group["lr"] = group.get("peak", 1e-4)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    for i in range(11):
        for name, (student, optimizer) in runs.items():
            start = time.perf_counter()
            student(ids, ids)[1].backward()
            nn.utils.clip_grad_norm_([x for g in optimizer.param_groups for x in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    ms = {name: statistics.median(s[3:]) * 1e3 for name, s in seconds.items()}
    print(f"{size} on {device}, {ids.numel()} tokens a step, vocabulary {vocab}, torch "
          f"{torch.__version__} | " + " | ".join(
              f"{name} {t:.1f} ms, {t / ms['dense']:.2f}" for name, t in ms.items()))

if __name__ == "__main__":
    main()
