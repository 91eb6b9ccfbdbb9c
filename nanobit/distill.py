"""Learning from a teacher: the loss is how far the student's predictions are from the teacher's.

  1. `open_teacher` reads --teacher: by default the dense model that the student is made from.
  2. `WithTeacher` is what `train` gets in the place of the student.
  3. `divergence` is its loss: KL(teacher || student), with the logits of some tokens at a time.

The text's own loss also rewards a student for learning the text: a quantized model that trains on
it may end below the loss of its dense base, which has not read that text as often. The divergence
rewards only what makes the student more like its teacher. A dense student that starts equal to its
teacher has a divergence and a gradient of exactly zero: it has nothing to learn. So the dense
base needs no training to be its own control.
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
    """The frozen model that --teacher names, or None for `none`. Sets args.teacher where it was not
    given. Raises UsageError where the teacher does not predict the same tokens.

    model: the dense model that the student is made from, read from `path`. Where --teacher is that
    file, or not given, `model` itself is frozen and returned, not a copy.
    path: None where the weights are random. The default is then `none`.
    """
    args.teacher = args.teacher or path or "none"
    if args.teacher == "none":
        return None
    if path and os.path.realpath(args.teacher) == os.path.realpath(path):
        return model.requires_grad_(False)

    # Another model. dense=False, because what open_model would say of a packed one speaks of
    # --model; the line below speaks of --teacher.
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

    1. With gradients on, as in training, its loss is the divergence from the teacher, and the
       targets are not read. With gradients off, as in `evaluate`, it is the student's own loss on
       the text.
    2. The teacher is no submodule: it is not trained, not saved, and not sent to other ranks.
    """

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = [teacher]       # in a list, where nn.Module does not look for submodules
        self.config = student.config   # train and checkpoints ask a model for these two
        self.linears = student.linears

    @property
    def blocks(self):
        """Those of the student, for `distribute`. An attribute would be a second submodule."""
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
        """torch.compile the student, and of the teacher the blocks: `divergence` does not call the
        teacher's `predict`."""
        self.student.compile_parts()
        for block in self.teacher[0].blocks:
            block.compile()

LOGITS = 2**26                   # at most so many of each model are held at a time

def divergence(student, teacher, idx):
    """KL(teacher || student) after each of the ids (B, T), mean over tokens."""
    # What the two heads read: the last norm's output, for all tokens.
    with torch.no_grad():
        teacher_x = teacher.norm(teacher.trunk(idx)).flatten(0, 1)         # (B T, C of the teacher)
    x = student.norm(student.trunk(idx)).flatten(0, 1)                     # (B T, C)
    return divergence_of_heads(student, teacher, x, teacher_x)

def divergence_of_heads(student, teacher, x, teacher_x):
    """KL(teacher || student) where the student's head reads x (N, C) and the teacher's teacher_x
    (N, C of the teacher), mean over the N tokens.

    The heads compute the logits of n tokens at a time: LOGITS / vocab of them (268 MB in float32),
    at least 256, and of a lean student 256. If there are more than n tokens, the backward pass
    computes each part's logits once more, so that they are not kept.
    """
    def kl(x, teacher_x):
        """The divergence of n tokens, summed."""
        with torch.no_grad():
            wanted = teacher.head(teacher_x).float()                       # (n, vocab)
        found = student.head(x).float()                                    # (n, vocab)
        return kl_loss(wanted, found) * len(x)         # kl_loss is a mean

    # How many tokens at a time. A lean student saves memory.
    n = 256
    if not student.lean:
        n = max(n, LOGITS // student.config.vocab_size)

    # All at once, if they are few: then nothing is computed twice.
    if len(x) <= n:
        return kl(x, teacher_x) / len(x)

    # Part by part. rerun keeps a part's inputs, and computes its logits again for the gradient.
    total = 0
    for x_part, teacher_part in zip(x.split(n), teacher_x.split(n)):
        total = total + rerun(kl, x_part, teacher_part)
    return total / len(x)
