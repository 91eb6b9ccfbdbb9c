"""Time of a training step, dense against QuEST at 4 bits, taken in turns in one process.

    python tests/time_step.py                          # tiny preset on the CPU
    python tests/time_step.py 100M cuda 32000          # compiled, batch 32 x 512, vocabulary 32000
    python tests/time_step.py 5M cuda 1024             # no preset: 6 blocks of width 256

Random tokens; medians of 30 steps after 5 to warm up, with the optimizer and the gradient's clip.
"""
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import model as m
import nanobit.train
from quest import QuestLinear

def main():
    size, device, vocab = (sys.argv[1:] + ["tiny", "cpu", "1024"][len(sys.argv) - 1:])[:3]
    cuda, small = device == "cuda", m.Preset(6, 256, 4, 768, 0, 0, 32, 1, 512)
    p = small if size == "5M" else m.PRESETS[size]
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    ids = torch.randint(int(vocab), (32 if cuda else p.batch_size, p.seq_len), device=device)
    models, seconds = {}, {}
    for name in ("dense", "quest"):
        models[name] = m.LLaMA(p.config(int(vocab)), torch.bfloat16 if cuda else torch.float32)
        models[name].to(device)
        if name == "quest":
            models[name].replace_linears(lambda _, linear: QuestLinear(linear.weight, 4, 4))
        if cuda:
            models[name].compile_parts()
    optimizers = {name: nanobit.train.make_optimizer(model, 1e-4) for name, model in models.items()}
    for i in range(35):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids, ids)[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    dense, quest = (statistics.median(s[5:]) * 1e3 for s in seconds.values())
    first = ", ".join(f"{s[0]:.0f} s" for s in seconds.values())
    print(f"{size} on {device}, {ids.numel()} tokens a step, vocabulary {vocab}, torch "
          f"{torch.__version__} | dense {dense:.1f} ms ({ids.numel() / dense:.1f}k tok/s) | W4A4 "
          f"QuEST {quest:.1f} ms ({ids.numel() / quest:.1f}k tok/s) | ratio {quest / dense:.2f} | "
          f"first steps {first}")

if __name__ == "__main__":
    main()
