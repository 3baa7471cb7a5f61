"""Options are read without PyTorch, so what is chosen from is named twice: both lists are equal. And what
--explain-memory prints.

    python -m pytest tests/pipeline/test_options.py
"""

import re

import pytest

import lora.optim
import pipeline.hub
import pipeline.models
import quant.quantise
import train
from pipeline import options
from pipeline.options import evaluation_options, pricing_options, training_options
from pricing.distribution import decode, loss


def test_what_is_chosen_from_is_what_there_is():
    assert options.BITS == quant.quantise.BITS
    assert options.BASES == tuple(pipeline.hub.PACKAGED)
    assert options.DTYPES == tuple(pipeline.models.DTYPES)
    assert options.LOSSES == loss.LOSSES
    assert options.OPTIMISERS == tuple(lora.optim.OPTIMISERS)
    assert options.PICKS == decode.PICKS
    assert options.PRUNE == decode.PRUNE


def test_the_scripts_offer_these_lists(capsys):
    """Each is told what it may be, and refuses something else."""
    of_training = {"--bits": options.BITS, "--loss": options.LOSSES, "--optimiser": options.OPTIMISERS}
    of_training |= {"--dtype": options.DTYPES}
    for option, values in of_training.items():
        assert [getattr(training_options("", [option, str(v)]), option[2:]) for v in values] == list(values)
        with pytest.raises(SystemExit):
            training_options("", [option, "7"])
        assert all(str(value) in capsys.readouterr().err for value in values[:1])
    for pick in options.PICKS:
        assert evaluation_options("Doc.", ["--decode", pick]).decode == pick
    for share in options.RANGES:
        assert evaluation_options("Doc.", ["--interval", str(share)]).interval == share
        assert pricing_options("Doc.", ["a mug", "--interval", str(share)]).interval == share
    assert evaluation_options("Doc.", []).prune == options.PRUNE
    assert training_options("", []).model == options.BASES[0]


def test_explain_memory_prints_a_table_and_trains_nothing(tiny_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("a weight was read"))
    out = tmp_path / "out"
    command = ["--model", str(tiny_directory), "--data", "catalogue", "--size", "200", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        train.main(training_options("", [*command, "--explain-memory", "--batch-tokens", "512"]))
    assert not ended.value.code  # 0: nothing went wrong
    printed = capsys.readouterr().out
    assert "as planned, at the peak:" in printed and "trained  " not in printed and "now run" not in printed
    table = printed.split("as planned, at the peak:\n")[1].splitlines()
    rows = [re.fullmatch(r"  (.+?) +(\d+\.\d{3}) GiB", line) for line in table]
    assert all(rows) and len(rows) > 5 and rows[-1][1] == "total"
    sizes = [float(row[2]) for row in rows]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.001 * len(rows)) and sizes[-1] > 0
    assert {row[1] for row in rows} >= {"linears of the blocks, as stored", "embedding", "norms, float32"}
    assert not out.exists()
