"""The memory plan: units, the order of its levers, the floor; on a GPU, the estimate against what PyTorch counts."""

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config

from benchmarks.shapes import SHAPES
from fast.plan import GIB, Estimate, Plan, choose, free_memory, parse_bytes
from llama.families import config_from_dict, config_from_directory
from pricing.data.batch import Shape
from quant.int8 import LinearInt8

SHAPE = Shape(2304, 21, 182, 84)


def estimate(shape="8b", sizes=SHAPE, targets="attention", bits=4):
    config = config_from_dict(SHAPES[shape])
    return Estimate(config, sizes.tokens, sizes.answers, bits=bits, dtype=torch.bfloat16, rank=32, targets=targets)


def test_amounts_of_memory():
    assert parse_bytes("6GiB") == 6 * GIB and parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("512MiB") == GIB // 2 and parse_bytes("1e9") == 10**9
    for wrong in ("6 apples", "", "GiB", "-3GiB"):
        with pytest.raises(ValueError, match="is no amount of memory"):
            parse_bytes(wrong)


def test_less_memory_pulls_one_lever_after_the_other():
    levers = []
    for budget in (80, 20, 14, 9, 6, 5.6, 5.2):
        plan, reasons = choose(estimate(), int(budget * GIB))
        assert estimate().total(plan) <= budget * GIB and (reasons or plan == Plan())
        levers.append(plan)
    assert levers[0].keep == 32 and 0 < levers[1].keep < 32
    assert levers[2].keep == 0 and levers[2].host_embed and not levers[2].offload
    assert 0 < levers[3].recompute < 32 and not levers[3].head8
    assert "32 of 32 blocks are recomputed" in " ".join(reasons) and "lm_head is stored in 8 bits" in reasons
    assert levers[-1].head8 and levers[-1].optimiser == "adamw8bit" and levers[-1].recompute == 32
    recompute = [plan.recompute for plan in levers]
    assert recompute == sorted(recompute)


def test_the_price_head_is_counted_with_what_is_trained():
    """A number, its gradient, two of AdamW, and twice two bytes for copies in the compute dtype"""
    config, options = config_from_dict(SHAPES["8b"]), dict(bits=4, dtype=torch.bfloat16, rank=32)
    with_head = Estimate(config, SHAPE.tokens, SHAPE.answers, targets="attention", head_numbers=10**6, **options)
    assert with_head.total(Plan()) - estimate().total(Plan()) == pytest.approx(20e6)


def test_8_bits_lie_between_4_and_16_and_count_what_is_stored(tmp_path):
    sizes = [estimate(bits=bits).total(Plan()) for bits in (4, 8, 16)]
    assert sizes[0] + 3 * GIB < sizes[1] < sizes[2] - 5 * GIB
    hugging_face_model(tiny_config(), tmp_path)
    stored = sum(m.stored_bytes() for m in our_model(tmp_path, bits=8).modules() if isinstance(m, LinearInt8))
    config = config_from_directory(tmp_path)
    options = dict(dtype=torch.bfloat16, rank=4, targets="attention")
    assert Estimate(config, SHAPE.tokens, SHAPE.answers, bits=8, **options).weights == stored
    plan, reasons = choose(estimate(bits=8), int(9 * GIB))
    assert plan.keep == 0 and plan.recompute and "are recomputed" in " ".join(reasons)
    assert choose(estimate(bits=8), 80 * GIB)[0].keep == 32  # for backward
    with pytest.raises(ValueError, match="below the floor"):
        choose(estimate(bits=8), 7 * GIB)


def test_below_the_floor_is_refused_and_the_floor_named():
    with pytest.raises(ValueError, match=r"budget of 3.00 GiB is below the floor of 5\.\d\d GiB .* lower --batch"):
        choose(estimate(), 3 * GIB)


def test_an_optimiser_that_was_asked_for_is_kept():
    plan, _ = choose(estimate(), int(5.3 * GIB), "lion8bit")
    assert plan.optimiser == "lion8bit"


def test_the_numerics_of_a_run_are_neither_given_up_nor_added():
    """A resumed run finds other memory free, but its optimiser's state and its head are what they are."""
    tight, roomy = {"optimiser": "adamw8bit", "head8": True}, {"optimiser": "adamw", "head8": False}
    plan, _ = choose(estimate(), 80 * GIB, numerics=tight)
    assert plan.numerics == tight and plan.keep == 32
    with pytest.raises(ValueError, match="below the floor"):
        choose(estimate(), int(5.2 * GIB), numerics=roomy)
    assert choose(estimate(), int(5.2 * GIB))[0].numerics == tight


def test_a_tied_head_is_neither_moved_nor_rounded():
    floor = estimate("3b").total(Plan(recompute=28, offload=True, optimiser="adamw8bit"))
    plan, _ = choose(estimate("3b"), int(floor) + 1)
    assert not plan.host_embed and not plan.head8


def test_without_a_gpu_nothing_is_moved_to_the_host():
    plan, _ = choose(estimate(), int(8 * GIB), gpu=False)
    assert plan.recompute and not plan.host_embed and not plan.offload


def test_free_memory_is_part_of_the_machine():
    assert 0 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("other", [["--readable"], ["--dropout", "0.1"]])
def test_a_budget_that_nothing_would_keep_is_refused(other, capsys):
    from pipeline.options import training_options

    with pytest.raises(SystemExit) as stopped:
        training_options("", ["--memory-budget", "6GiB", *other])
    assert stopped.value.code == 2 and "leave out --readable and --dropout" in capsys.readouterr().err


def test_the_terms_of_the_estimate_are_named_and_sum_to_it():
    terms = estimate().terms(plan := Plan(recompute=3, optimiser="sgd"))
    assert sum(terms.values()) == estimate().total(plan)
    table = estimate().explain(plan)
    assert "inputs of 3 recomputed blocks" in table and "sgd's state" in table and "offload" not in table
    assert table.splitlines()[-1].split() == ["total", f"{estimate().total(plan) / GIB:.3f}", "GiB"]
