"""nanobit/distill.py: learning from a teacher by KL divergence, in parts of tokens; --teacher.

Oracles: torch's own kl_div on the logits of all tokens, with autograd's gradients; the student
alone, where the wrapper must change nothing.
"""
import json
import types

import pytest
import torch
import torch.nn.functional as F

import nanobit.checkpoint
import nanobit.data
import nanobit.train
from conftest import TEXT, call, check_refused, random_base
from model import LLaMA, LlamaConfig
from nanobit.distill import WithTeacher, divergence, frozen_copy, open_teacher

def llama(seed, vocab=61, n_embd=32, dtype=torch.float32, tied=False):
    torch.manual_seed(seed)
    return LLaMA(LlamaConfig(vocab, 2, n_embd, 4, 2, 48, 300, tied=tied), dtype)

def ids(b=2, t=300, vocab=61):
    return torch.randint(vocab, (b, t), generator=torch.Generator().manual_seed(1))

# ---- The loss -----------------------------------------------------------------------------------

@pytest.mark.parametrize("lean", [False, True])
def test_the_loss_in_parts_is_torchs_of_whole_logits_forward_and_backward(lean):
    """600 tokens: two parts of 256 and one of 88. The teacher is wider, and gets no gradient."""
    student, teacher = llama(0), llama(1, n_embd=64).requires_grad_(False)
    student.lean = lean
    loss = divergence(student, teacher, ids())
    loss.backward()
    got = {name: p.grad for name, p in student.named_parameters()}

    student.zero_grad()
    want = F.kl_div(student(ids())[0].double().flatten(0, 1).log_softmax(-1),
                    teacher(ids())[0].double().flatten(0, 1).log_softmax(-1),
                    reduction="batchmean", log_target=True)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4) and want.item() > 0.01
    for name, p in student.named_parameters():
        assert (got[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name
    assert all(p.grad is None for p in teacher.parameters())

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_equal_models_is_exactly_zero(dtype):
    """Also for a teacher whose matrices are stored in bfloat16."""
    student = llama(0, dtype=dtype)
    loss = divergence(student, frozen_copy(student), ids())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    for name, p in student.named_parameters():
        assert p.grad is not None and not p.grad.any(), name

def test_no_tensor_of_all_tokens_logits_waits_for_the_backward_pass():
    """What autograd keeps for 600 tokens of a vocabulary of 5000 is smaller than their logits."""
    student, teacher = llama(0, 5000), llama(1, 5000)
    student.lean = True
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t,
                                                  lambda t: t):
        divergence(student, teacher, ids(vocab=5000))
    assert max(sizes) <= max(5000 * 32, 600 * 48) < 600 * 5000

# ---- The student with its teacher, and the teacher's copy ---------------------------------------

def test_with_its_teacher_a_student_is_evaluated_saved_and_trained_as_itself():
    student, teacher = llama(0), llama(1)
    both = WithTeacher(student, teacher)
    tokens = ids(1, 200)[0].numpy()
    assert nanobit.train.evaluate(both, tokens, 32) == nanobit.train.evaluate(student, tokens, 32)
    assert not student.lean
    names = {name.removeprefix("student.") for name in both.state_dict()}
    assert names == set(student.state_dict())
    assert {id(p) for p in both.parameters()} == {id(p) for p in student.parameters()}
    assert [name for name, _ in both.linears()] == [name for name, _ in student.linears()]

    # With gradients it learns from the teacher, whatever the targets are.
    want = divergence(student, teacher, ids())
    assert torch.equal(both(ids(), ids())[1], want)
    with torch.no_grad():
        assert torch.equal(both(ids(), ids())[1], student(ids(), ids())[1])

@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_copy_predicts_the_same_from_half_of_the_bytes(tied):
    model = llama(0, vocab=900, dtype=torch.bfloat16, tied=tied)
    copy = frozen_copy(model)
    assert torch.equal(copy(ids())[0], model(ids())[0])
    sizes = [nanobit.checkpoint.tensor_bytes(m.parameters()) for m in (model, copy)]
    norms = 5 * 32 * 4
    assert sizes[0] - norms == 2 * (sizes[1] - norms)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())

# ---- --teacher ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base.pt, another dense model of its tokens, and three models that cannot teach."""
    path = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(path / "cache"))
        random_base(path, 1)
        base, content = nanobit.checkpoint.load_checkpoint(str(path / "base.pt"))
        keep = {k: content[k] for k in ("method", "settings", "tokenizer", "data")}

        def save(name, model, **more):
            nanobit.checkpoint.save_checkpoint(str(path / name), model, **keep | more)

        # Of the same shape and with predictions that rounding changes.
        for p in base.parameters():
            if p.dim() == 2:
                p.data *= 5
        save("base.pt", base)
        vocab = base.config.vocab_size
        save("wider.pt", llama(1, vocab, 64))
        save("vocab.pt", llama(1, vocab + 1))
        (path / "other.txt").write_text(TEXT.replace("return", "yield"))
        other = nanobit.data.load_data(str(path / "other.txt"), "300", 32)
        save("tokenizer.pt", base, tokenizer=other.spec)
    return path

@pytest.fixture
def folder(made, monkeypatch, tmp_path):
    """Where the script's flags find those files; the results go to a folder of the test's own."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "cache"))
    return tmp_path / "out"

LRQAT = ("lrqat.py --bits 3 --rank 4 --steps 3 --batch-size 4 --accumulate 2 --seq-len 32 "
         "--device cpu --model base.pt")

def run(capsys, command):
    """A command that succeeds -> its row and all that it printed."""
    status, out, err = call(capsys, command)
    assert status == 0, err
    return json.loads(out.splitlines()[-1]), out

@pytest.mark.parametrize("teacher, longer", [
    ("", False), ("--teacher none", True), ("--teacher wider.pt", True)])
def test_the_base_is_its_own_control_where_it_is_the_teacher(teacher, longer, folder, capsys):
    """Elsewhere the control is the base, trained as long by the same loss."""
    row, out = run(capsys, f"{LRQAT} {teacher} --out {folder}")
    assert ("dense, longer" in row["arms"]) == longer
    assert f"teacher={row['teacher']}" in out
    table = {line.split("|")[0].strip(): line.split("|")[5].strip()
             for line in out.split("recovered | seconds")[1].split("merged")[0].splitlines()[1:]
             if line.count("|") > 5}                   # not a line of progress
    control = "dense, longer" if longer else "dense"
    assert table[control] == "100.0%" and float(table["RTN"].rstrip("%")) == 0

@pytest.mark.parametrize("teacher, shares", [("", 3), ("--teacher none", 0)])
def test_one_arm_alone_claims_a_share_only_of_a_control_that_is_there(teacher, shares, folder,
                                                                      capsys):
    row, out = run(capsys, f"{LRQAT} --arm scales {teacher} --out {folder}")
    assert len(row["arms"]) == 3
    assert out.split("recovered | seconds")[1].split("merged")[0].count("% | ") == 2 + shares

def test_by_kl_the_arms_come_nearer_to_the_base_than_rtn_and_go_on_after_a_stop(folder, capsys):
    command = f"{LRQAT} --bits 2 --arm full --steps 20 --lr 0.1 --out {folder}"
    first, _ = run(capsys, command)
    assert first["arms"]["full QAT (LSQ)"]["kl"] < 0.9 * first["arms"]["RTN"]["kl"]
    again, out = run(capsys, f"{command} --resume")
    assert "resumed" in out
    assert again["arms"]["full QAT (LSQ)"]["kl"] == first["arms"]["full QAT (LSQ)"]["kl"]

    # The state is of a run with this teacher, by whatever name, and of no other.
    check_refused(call(capsys, f"{command} --resume --teacher none"), "--teacher is none")
    assert call(capsys, f"{command} --resume --teacher ./base.pt")[0] == 0

QUEST = "--bits 4 --seq-len 32 --device cpu --vocab 300 --data text.txt --batch-size 4"

@pytest.fixture
def tiny_preset(monkeypatch):
    """base.pt's shape as quest.py's --size."""
    import model
    monkeypatch.setitem(model.PRESETS, "tiny", model.Preset(1, 32, 4, 48, 2e-3, 3, 4, 1, 32))

@pytest.mark.parametrize("flags, teacher", [
    ("--model base.pt", "base.pt"), ("--model base.pt --teacher none", "none"), ("", "none"),
    ("--teacher wider.pt", "wider.pt"), ("--model base.pt --bits 16", "none")])
def test_quest_learns_from_its_model_by_default_and_else_from_the_text(
        flags, teacher, folder, tiny_preset, capsys):
    row, _ = run(capsys, f"quest.py {QUEST} {flags} --out {folder}")
    assert row["teacher"] == teacher
    assert (row["kl"] is not None) == ("--model" in flags)
    if "--model" in flags:
        base, content = nanobit.checkpoint.load_checkpoint("base.pt")
        data = nanobit.data.load_data("text.txt", "300", 32)
        loss = nanobit.train.evaluate(base, data.val, 32)["loss"]
        assert row["base_val_loss"] == pytest.approx(loss, abs=1e-6)

def test_quest_by_kl_ends_nearer_to_its_model_than_it_began_and_resumes(folder, tiny_preset,
                                                                        capsys):
    command = f"quest.py {QUEST} --bits 2 --model base.pt --out {folder} --steps"
    near = [run(capsys, f"{command} {steps} --lr 3e-3")[0]["kl"] for steps in (1, 30)]
    assert near[1] < 0.8 * near[0]
    again, out = run(capsys, f"{command} 30 --lr 3e-3 --resume")
    assert "resumed" in out and again["kl"] == near[1]

def test_a_state_from_before_this_flag_learned_from_the_text_and_goes_on_so(folder, tiny_preset,
                                                                          capsys):
    command = f"quest.py {QUEST} --out {folder}"
    before, _ = run(capsys, command)
    path = folder / "quest-w4a4.pt.state"
    content = torch.load(path)
    assert content["settings"].pop("teacher") == "none"
    torch.save(content, path)
    again, out = run(capsys, f"{command} --resume")
    assert "resumed" in out and again["val_loss"] == before["val_loss"]
    check_refused(call(capsys, f"{command} --resume --teacher wider.pt"), "wider.pt", "none")

def test_a_teacher_is_the_named_model_and_does_not_learn(folder):
    base, _ = nanobit.checkpoint.load_checkpoint("base.pt")
    other, _ = nanobit.checkpoint.load_checkpoint("wider.pt")
    data = nanobit.data.load_data("text.txt", "300", 32)
    for named, wanted in ((None, base), ("./base.pt", base), ("wider.pt", other)):
        args = types.SimpleNamespace(teacher=named, device="cpu", dtype="float32", seq_len=32)
        base.requires_grad_(True)
        teacher = open_teacher(args, base, "base.pt", data)
        assert (teacher is base) == (wanted is base)
        assert torch.equal(teacher.embed.weight, wanted.embed.weight)
        assert not any(p.requires_grad for p in teacher.parameters())

@pytest.mark.parametrize("script", ["lrqat.py --rank 4", f"quest.py {QUEST}"])
@pytest.mark.parametrize("teacher, names", [
    ("vocab.pt", ["--teacher vocab.pt", "301", "300", "--teacher none"]),
    ("tokenizer.pt", ["--teacher tokenizer.pt", "another tokenizer", "--teacher none"]),
    ("nowhere.pt", ["nowhere.pt"]), ("packed.pt", ["--teacher packed.pt is packed"])])
def test_what_cannot_teach_is_refused(script, teacher, names, folder, tiny_preset, capsys):
    if teacher == "packed.pt":
        run(capsys, f"{LRQAT} --arm scales --out {folder}")
        (folder / "lrqat-w3-scales.pt").rename("packed.pt")
    command = f"{script} --model base.pt --device cpu --teacher {teacher} --out {folder}/none"
    check_refused(call(capsys, command), *names)
    assert not (folder / "none").exists()
