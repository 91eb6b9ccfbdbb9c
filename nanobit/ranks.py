"""What all processes of a run agree on, and what rank 0 alone says.

torchrun starts one process for each GPU, a rank. All ranks run the whole script and stay equal;
rank 0 alone prints and writes. They share the windows of a training step, and with --fsdp also the
weights. Without torchrun there is one rank, 0, and nothing here does anything, except that the
last section prints.
"""
import contextlib
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

from model import UsageError

def rank():
    return int(os.environ.get("RANK", 0))

def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))

def take_gpu(args):
    """From here on "cuda" means the GPU of this process's number. Raises UsageError."""
    if "size" not in args:                             # a command that does not train
        raise UsageError("torchrun is for training; start this command with plain python")
    if args.device.startswith("cuda:"):
        raise UsageError(f"--device {args.device}: torchrun gives each process a GPU of its own; "
                         "leave --device out")
    if args.device == "cuda":
        local = int(os.environ["LOCAL_RANK"])          # on this machine
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UsageError(f"torchrun's {os.environ['LOCAL_WORLD_SIZE']} processes here are more "
                             f"than the {gpus} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(local)

def join_ranks(args):
    """Meet the other processes. Raises UsageError where they cannot share the work."""
    if args.fsdp and world_size() == 1:
        raise UsageError("--fsdp shares the weights among processes and there is only one; start "
                         "more by torchrun --standalone --nproc_per_node=2")
    if args.batch_size % world_size():
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of torchrun's "
                         f"{world_size()} processes")
    if world_size() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        patience = datetime.timedelta(hours=4)         # while rank 0 tokenizes
        dist.init_process_group(backend, timeout=patience)

def agree(*flags):
    """Each flag, true if it is true on any rank. Also a barrier: none returns before all called."""
    if world_size() == 1:
        return flags
    # A tensor on the CPU goes through gloo, so that no GPU waits. The 0 is there for a call without
    # flags.
    found = torch.tensor([0, *map(bool, flags)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()[1:]

@contextlib.contextmanager
def first_rank_first():
    """The first rank of each machine runs the block before the others, which find its files."""
    late = int(os.environ.get("LOCAL_RANK", 0)) > 0
    if late:
        agree()
    yield
    if not late:
        agree()

def from_rank_0(tensors):
    """Overwrite the tensors with rank 0's, on all ranks."""
    if world_size() == 1:
        return
    for t in tensors:
        dist.broadcast(t.detach(), 0)

def distribute(model, args):
    """All ranks begin with the same weights: rank 0's are sent to the others. With --fsdp the same
    seed or file made them, and each rank keeps a share; a block's are whole only while it computes.
    """
    if world_size() == 1:
        return
    if not args.fsdp:
        from_rank_0([*model.parameters(), *model.buffers()])
        return

    # Each block by itself, then what is left: embedding, last norm and head.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(torch.device(args.device).type, (world_size(),))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh)

def sync_gradients(model, is_last_part):
    """--fsdp: the gradients are summed over the ranks in the last micro-batch alone. Until then a
    rank keeps whole ones."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(is_last_part)

def average_gradients(parameters):
    """Every gradient becomes its mean over the ranks. With --fsdp it is that already."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]

    # All sums are begun before the first one is waited for. A sum is divided here: gloo, on a CPU,
    # cannot average.
    begun = [dist.all_reduce(grad, async_op=True) for grad in grads]
    for work in begun:
        work.wait()
    for grad in grads:
        grad.div_(world_size())

def is_sharded(t):
    """Is it a DTensor, of which each rank holds a share?"""
    return hasattr(t, "placements")

def whole(t):
    """The tensor, no longer sharded if it was; all ranks must call."""
    return t.full_tensor() if is_sharded(t) else t

def gather(x):
    """x with every sharded tensor in it whole, in rank 0's main memory, and None elsewhere."""
    if isinstance(x, dict):
        return {k: gather(v) for k, v in x.items()}    # whole on the GPU one at a time
    if not is_sharded(x):
        return x
    x = whole(x)
    return None if rank() else x.cpu()

def placed_like(t, p):
    """The whole tensor t, sharded as p is. Where p is not, t itself: whoever loads it moves it."""
    if not is_sharded(p):
        return t
    return dist.tensor.distribute_tensor(t.to(p.device), p.device_mesh, p.placements)

# ---- Output -------------------------------------------------------------------------------------

def say(text):
    """Print a line, once for all ranks."""
    if rank() == 0:
        put(sys.stdout, text + "\n")

def put(stream, text):
    """Write the text and flush. No run ends because its output cannot be written: what a stream
    cannot take any more, a closed pipe or a log on a full disk, is dropped from then on."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as e:
        # What is still in the buffer goes to the null device, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(e, BrokenPipeError) and stream is not sys.stderr:
            put(sys.stderr, f"note: the output cannot be written ({e.strerror}); the run goes on\n")

def show_every_letter():
    """What a terminal or a log cannot show becomes an escape such as \\u03a9, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):             # None where there is no terminal
            stream.reconfigure(errors="backslashreplace")

class Progress:
    """Every 10 s says how much of n things is done, and how long the others will take."""

    def __init__(self, n, label):
        self.n = n
        self.label = label
        self.done = 0
        self.start = self.last = time.perf_counter()

    def add(self, count):
        """So many more are done."""
        self.done += count
        now = time.perf_counter()
        if self.done < self.n and now - self.last > 10:
            self.last = now
            eta = (now - self.start) / self.done * (self.n - self.done)
            say(f"{self.label} {self.done}/{self.n} | eta {eta:.0f}s")

def progress(items, label):
    """Yield the items; every 10 s say how far it is and how long it will take."""
    todo = Progress(len(items), label)
    for item in items:
        yield item
        todo.add(1)
