"""Learning from a teacher: the loss is how far the student's predictions are from the teacher's.

  1. `open_teacher` reads --teacher: by default the dense model that the student is made from.
  2. `WithTeacher` is what `train` gets in the place of the student.
  3. `divergence` is its loss: KL(teacher || student), never with the logits of all tokens.

The text's own loss rewards a student also for learning the text, which the dense model has not seen
as often: a quantized model that trains on it may end below its dense base. The divergence rewards
it for nothing but being like the teacher. Where the teacher is the dense base itself, that has
learned all there is: its divergence and its gradient are exactly zero, however long it is trained.
So the base is its own control.
"""
import copy
import os

import torch
import torch.nn as nn

from model import UsageError, rerun
from nanobit.compare import check_same_tokens
from nanobit.runs import open_model
from nanobit.train import kl_loss

# ---- The teacher --------------------------------------------------------------------------------

def add_teacher(p, default):
    """The flag --teacher of a script that trains."""
    p.add_argument("--teacher", metavar="MODEL", help="dense checkpoint or Hugging Face folder: "
                   "learn by KL divergence to its predictions; none: from the text alone "
                   f"(default: {default})")

def open_teacher(args, model, path, data):
    """The model that --teacher names, frozen; None for `none`. Raises UsageError where it does not
    predict the same tokens.

    model: what the student is made from, read from `path`; it is returned where --teacher is that
    file or is not given. path: None where the weights are random; then the default is `none`.
    """
    args.teacher = args.teacher or path or "none"
    if args.teacher == "none":
        return None
    if path and os.path.realpath(args.teacher) == os.path.realpath(path):
        return model.requires_grad_(False)

    # Another model.
    teacher, content = open_model(args, args.teacher, dense=False)
    fix = "it cannot teach that; give a dense model with the same tokenizer, or --teacher none"
    check_same_tokens(model, data.spec, path or "the new model", teacher, content["tokenizer"],
                      f"--teacher {args.teacher}", fix)
    if content["linears"]:
        raise UsageError(f"--teacher {args.teacher} is packed; give the dense model that it was "
                         "made from, or --teacher none")
    return frozen_copy(teacher)

def frozen_copy(model):
    """A copy that does not learn and predicts the same. It stores its matrices in the model's
    dtype, in which they are multiplied anyway: in bfloat16 that is half of the bytes."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    for p in model.parameters():
        if p.dim() == 2:                               # norms multiply in float32
            p.data = p.data.to(model.dtype)
    return model

# ---- The loss -----------------------------------------------------------------------------------

class WithTeacher(nn.Module):
    """A student that learns from its teacher, as `train` and `evaluate` need it.

    1. Its loss depends on whether gradients are on. While they are, it is the divergence from the
       teacher; while they are off, as in `evaluate`, the student's own loss on the text.
    2. The teacher is no submodule: it is not trained, not saved, and not sent to other ranks.
    """

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = [teacher]       # in a list, where nn.Module does not look for submodules
        self.config = student.config   # train and checkpoints ask a model for these three
        self.dtype = student.dtype
        self.linears = student.linears

    @property
    def blocks(self):
        """Those of the student, for `distribute`."""
        return self.student.blocks

    @property
    def lean(self):
        """Whether memory is saved, as `evaluate` asks for: the student's own setting."""
        return self.student.lean

    @lean.setter
    def lean(self, value):
        self.student.lean = value

    def forward(self, idx, targets=None):
        """Ids and targets (B, T) -> (logits or None, mean loss), as LLaMA.forward."""
        if targets is None or not torch.is_grad_enabled():
            return self.student(idx, targets)
        return None, divergence(self.student, self.teacher[0], idx)

    def compile_parts(self):
        """torch.compile the blocks of both."""
        self.student.compile_parts()
        for block in self.teacher[0].blocks:
            block.compile()

LOGITS = 2**26                   # of each model, that are held at a time

def divergence(student, teacher, idx):
    """KL(teacher || student) of what both predict after each of the ids (B, T), mean over tokens.

    Both heads compute the logits of n tokens at a time. Where that is not the whole batch, the
    backward pass computes them once more. n is what makes LOGITS, 268 MB in float32, and for a lean
    student 256 tokens.
    """
    with torch.no_grad():
        goals = teacher.norm(teacher.trunk(idx)).flatten(0, 1)             # (B T, C of the teacher)
    x = student.norm(student.trunk(idx)).flatten(0, 1)                     # (B T, C)

    def kl(x, goal):
        """Summed over the tokens of a part."""
        with torch.no_grad():
            wanted = teacher.head(goal).float()                            # (n, vocab)
        return kl_loss(wanted, student.head(x).float()) * len(x)

    n = 256
    if not student.lean:
        n = max(n, LOGITS // student.config.vocab_size)
    if len(x) <= n:
        return kl(x, goals) / len(x)
    total = 0
    for x_part, goal_part in zip(x.split(n), goals.split(n)):
        total = total + rerun(kl, x_part, goal_part)
    return total / len(x)
