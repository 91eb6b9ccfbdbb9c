"""nanobit/defaults.py: what a script does where no flag says it, from the model it is given."""
from types import SimpleNamespace

import pytest
import torch

import lrqat
import nanobit.defaults
import normtweak
import pvtune
import quest
from model import LLaMA, LlamaConfig
from nanobit.defaults import LARGE, UNSET, group_of, suit, suit_calibration, window

def model(n_embd, n_layer=1):
    """Only the sizes of its weights are looked at."""
    with torch.device("meta"):
        return LLaMA(LlamaConfig(300, n_layer, n_embd, 4, 4, 4 * n_embd, 128))

def unset(**given):
    return SimpleNamespace(**{**UNSET, "accumulate": 1, "seq_len": 128, **given})

def test_a_small_and_a_large_model_get_their_own_steps_windows_and_rates():
    small, large = model(64), model(1024)
    weights = [sum(linear.weight.numel() for _, linear in m.linears()) for m in (small, large)]
    assert weights[0] < LARGE <= weights[1]
    for method in ("lrqat", "pvtune", "quest"):
        found = []
        for m, seq_len in ((small, 128), (large, 512)):
            args = unset(seq_len=seq_len)
            suit(args, m, method, 2)
            assert args.steps > 0 and args.lr > 0
            found.append((args.steps, args.batch_size * args.seq_len))
        assert found[0][0] < found[1][0] and found[0][1] == 2048 and found[1][1] == 4096

def test_the_rate_of_pv_halves_with_each_bit():
    rates = []
    for bits in (2, 3, 4):
        args = unset()
        suit(args, model(64), "pvtune", bits)
        rates.append(args.lr)
    assert rates == [6e-3, 3e-3, 1.5e-3]

@pytest.mark.parametrize("method, bits, width, rate", [
    ("pvtune", 2, 1024, 3e-3), ("pvtune", 4, 1024, 7.5e-4), ("lrqat", 2, 64, 1e-2),
    ("lrqat", 4, 1024, 1e-2), ("quest", 4, 64, 5e-4), ("quest", 5, 64, 1e-4),
    ("quest", 8, 1024, 1e-4)])
def test_rates_are_those_of_the_guides_table(method, bits, width, rate):
    args = unset()
    suit(args, model(width), method, bits)
    assert args.lr == rate

def test_norm_tweaking_has_one_rate_for_all():
    assert normtweak.parse_args(["--device", "cpu"]).lr == 5e-3

def test_a_batch_has_an_equal_part_for_every_rank(monkeypatch):
    monkeypatch.setattr(nanobit.defaults, "world_size", lambda: 3)
    args = unset(seq_len=512)                          # 4 windows on one rank
    suit(args, model(64), "lrqat", 2)
    assert args.batch_size == 6

def test_what_was_given_stays_as_it_was_given():
    args = unset(steps=7, batch_size=3, lr=0.5)
    suit(args, model(64), "pvtune", 2)
    assert (args.steps, args.batch_size, args.lr) == (7, 3, 0.5)

@pytest.mark.parametrize("accumulate, batch_size", [(1, 4), (3, 6), (4, 4), (8, 8)])
def test_a_batch_can_be_cut_into_equal_parts(accumulate, batch_size):
    args = unset(accumulate=accumulate, seq_len=512)
    suit(args, model(64), "lrqat", 2)
    assert args.batch_size == batch_size

def test_both_hosts_and_more_windows_where_that_is_quick():
    found = []
    for m in (model(64), model(1024)):
        for device in ("cpu", "cuda:0"):
            args = SimpleNamespace(host=None, steps=0, device=device, teacher=None)
            suit_calibration(args, m)
            found.append((args.host, args.steps))
    assert found == [("both", 64), ("both", 64), ("gptq", 32), ("both", 64)]
    args = SimpleNamespace(host="rtn", steps=5, device="cpu", teacher=None)
    suit_calibration(args, model(1024))
    assert (args.host, args.steps) == ("rtn", 5)
    args = SimpleNamespace(host=None, steps=0, device="cpu", teacher="base.pt")
    suit_calibration(args, model(1024))                # its codes exist already
    assert (args.host, args.steps) == (None, 32)

def test_groups_of_a_large_model_divide_the_inputs_of_all_linears():
    def wide(n_embd):
        with torch.device("meta"):
            return LLaMA(LlamaConfig(300, 1, n_embd, 4, 4, 4096, 128))
    widths = 1024, 1024 + 64, 1024 + 32, 1024 + 16
    assert [group_of(wide(width)) for width in widths] == [128, 64, 32, -1]
    assert group_of(model(64)) == -1

def test_windows_are_the_models_own_where_these_are_short():
    assert [window(n) for n in (64, 512, 8192)] == [64, 512, 512]

@pytest.mark.parametrize("script", [lrqat, pvtune, quest])
def test_flags_leave_to_the_rule_what_is_not_given(script):
    args = script.parse_args(["--model", "base.pt", "--out", "out"])
    assert (args.steps, args.batch_size, args.lr) == (0, 0, 0)
    args = script.parse_args(["--model", "base.pt", "--steps", "5", "--lr", "1e-4"])
    assert (args.steps, args.batch_size, args.lr) == (5, 0, 1e-4)

def test_quest_from_random_weights_takes_what_its_size_says():
    args = quest.parse_args([])
    assert (args.steps, args.batch_size, args.lr) == (400, 16, 2e-3)
