"""Every family against transformers on tiny random configs: float32, CPU, no download.

    python -m pytest tests/llama/test_families.py

Built to fail: fewer kv heads than heads, a q_proj that is not square, random norm weights, soft caps that bind, windows
shorter than the sequences, sequences longer than the original context. `SWITCHES` turns each switch off once and asks
that the numbers then differ: a parity test that nothing can break would prove nothing.
"""

import dataclasses
import json

import pytest
import torch
from conftest import LLAMA31_ROPE, our_model, tiny_config
from kernel_helpers import DEVICE, kernels
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fast.install import install
from llama.attention import Layout
from llama.config import LinearRope
from llama.families import config_from_directory
from llama.generate import extend, prefill, read_prefix
from llama.model import Llama
from llama.weights import Checkpoint, load_weights
from lora.adapter import load_adapter, save_adapter
from lora.inject import inject, lora_layers
from quant.quantise import quantise_linear

SHARED = {k: v for k, v in tiny_config().items() if k not in ("model_type", "architectures", "hidden_act", "mlp_bias")}
GEMMA = SHARED | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,  # not head_dim
    "sliding_window": 11,
    "tie_word_embeddings": True,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [1.5 + 0.7 * i for i in range(6)],
}
PHI = {k: v for k, v in SHARED.items() if k != "head_dim"} | {"hidden_act": "silu", "pad_token_id": 0}  # C / H = 12
ALTERNATING = ["full_attention", "sliding_attention", "sliding_attention"]
GEMMA3 = GEMMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,  # the sixth alone sees everything
    "rope_theta": 1e6,
    "rope_local_base_freq": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},  # as from 4B on
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
FAMILIES = {
    "llama 3.1": tiny_config(rope_scaling=LLAMA31_ROPE, attention_bias=True, mlp_bias=True),
    "smollm2, llama 3.2": tiny_config(tie_word_embeddings=True, rope_theta=1e5),
    "mistral": SHARED | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 13},
    "mistral 0.3": SHARED | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": None},
    "qwen2": PHI | {"model_type": "qwen2", "rope_theta": 1e6, "head_dim": 32},
    "qwen2, late windows": PHI
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": SHARED | {"model_type": "qwen3", "hidden_act": "silu", "rope_theta": 1e6},
    "gemma2": GEMMA
    | {"model_type": "gemma2", "num_hidden_layers": 3, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3": GEMMA3,
    "gemma3, 270M and 1B": GEMMA3 | {"num_key_value_heads": 1, "rope_scaling": None},
    "phi3, 4k": PHI | {"model_type": "phi3", "sliding_window": 15, "head_dim": 16},
    "phi3, 128k": PHI
    | {
        "model_type": "phi3",
        "sliding_window": 200,
        "rope_scaling": LONG,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 512,
    },
}
NAMES = list(FAMILIES)
ALL = torch.arange(300)
LENGTHS = (90, 5, 40)  # beyond every window, and one beyond the original contexts of 64


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance)


def sequences(lengths=LENGTHS):
    return [torch.randint(1, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def write_family(name, directory, seed=0, **changes):
    """transformers' model of a family with random weights; our config.json is the raw one, as on the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads(json.dumps(FAMILIES[name] | changes))  # transformers writes into the dicts that it is given
    torch.manual_seed(seed)
    kinds = {k: v for k, v in raw.items() if k != "architectures"}
    # Not sdpa: it has no soft cap.
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kinds), attn_implementation="eager").eval()
    gemma = raw["model_type"].startswith("gemma")
    with torch.no_grad():
        for key, p in hf.named_parameters():
            if p.ndim == 1:
                p.copy_((0 if gemma else 1) + 0.3 * torch.randn_like(p) if "norm" in key else torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    hf.save_pretrained(directory)
    return hf


@pytest.fixture(params=NAMES)
def family(request, tmp_path):
    """(name, transformers' model, directory whose config.json is as the hub's files have it)"""
    directory = tmp_path / "model"
    hf = write_family(request.param, directory)
    (directory / "config.json").write_text(json.dumps(FAMILIES[request.param]))
    return request.param, hf, directory


def logits_of(hf, token_lists):
    return torch.cat([hf(tokens[None]).logits[0] for tokens in token_lists])


def test_both_spellings_of_config_are_one(family, tmp_path):
    """The hub's keys and those that transformers 5 writes"""
    name, hf, directory = family
    hf.config.save_pretrained(tmp_path / "new")
    assert config_from_directory(tmp_path / "new") == config_from_directory(directory)


@pytest.mark.parametrize("fast", [False, True])
def test_packed_logits_and_embedding_gradients(family, fast):
    name, hf, directory = family
    model, given = our_model(directory), sequences()
    if fast:
        install(model)
    model.embed_tokens.weight.requires_grad_()
    logits, expected = model(torch.cat(given), Layout.packed(LENGTHS)), logits_of(hf, given)
    close(logits, expected)
    assert expected.std() > 0.3
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * probe).sum().backward()
    ours = model.embed_tokens.weight.grad
    hf.zero_grad()
    if model.config.tie_word_embeddings:  # transformers adds the head's gradient; ours is frozen and gives none
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
        expected = logits_of(hf, given)
    (expected * probe).sum().backward()
    theirs = hf.model.embed_tokens.weight.grad
    assert (ours - theirs).norm() / theirs.norm() < 2e-5


def test_right_padded_batch(family):
    """Rows of one length, as transformers pads them: what stands after a text changes nothing before it."""
    name, hf, directory = family
    lengths = [50, 4, 23]  # within the original context: transformers switches its factors by the padded length
    tokens = torch.zeros(3, 50, dtype=torch.long)
    for row, part in enumerate(sequences(lengths)):
        tokens[row, : len(part)] = part
    mask = (torch.arange(50) < torch.tensor(lengths)[:, None]).long()
    expected = hf(tokens, attention_mask=mask).logits
    padded = our_model(directory)(tokens.view(-1), Layout.packed([50] * 3)).view(3, 50, -1)
    for row, n in enumerate(lengths):
        close(padded[row, :n], expected[row, :n])


@pytest.mark.parametrize("shared", [0, 20, 70])  # 70: the prefix alone is beyond the original context
def test_cached_decoding(family, shared):
    """Token by token after prompts of different lengths, with and without a shared prefix, across the window's edge."""
    name, hf, directory = family
    model = our_model(directory)
    prefix = sequences([shared])[0].tolist()
    prompts = [prefix + s.tolist() for s in sequences([70, 5, 11])]
    steps = torch.randint(1, 300, (3, 4), generator=torch.Generator().manual_seed(9))
    log_probs, top, cache = prefill(
        model, [p[shared:] for p in prompts], ALL, read_prefix(model, prefix) if shared else None
    )
    got = [log_probs]
    for i in range(4):
        log_probs, top = extend(model, cache, steps[:, i : i + 1], torch.full((3, 1), i), ALL)
        got.append(log_probs[:, 0])
    for row, prompt in enumerate(prompts):
        logits = hf(torch.tensor([prompt + steps[row].tolist()])).logits[0, len(prompt) - 1 :]
        close(torch.stack([g[row] for g in got]), logits.log_softmax(-1))
        assert top[row, 0] == logits[-1].argmax()


def test_tree_decoding(family):
    """Branches see the prompt, their ancestors and themselves; a window counts positions, not slots of the cache."""
    name, hf, directory = family
    model, prompts = our_model(directory), [s.tolist() for s in sequences([12, 30])]
    _, _, cache = prefill(model, prompts, ALL)
    extend(model, cache, torch.tensor([[11, 12, 13]] * 2), torch.zeros(2, 3, dtype=torch.long), ALL)
    second, _ = extend(model, cache, torch.tensor([[21, 22, 23]] * 2), torch.tensor([[2, 1, 3]] * 2), ALL)
    for row, prompt in enumerate(prompts):
        for node, path in enumerate([[12, 21], [11, 22], [13, 23]]):
            close(second[row, node], hf(torch.tensor([prompt + path])).logits[0, -1].log_softmax(-1))


def off(**changes):
    return lambda config: dataclasses.replace(config, **changes)


def rope_off(**changes):
    return lambda config: dataclasses.replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, **changes))


def windows(change):
    return lambda config: dataclasses.replace(config, windows=tuple(change(config.windows)))


def wider(given):
    return [w and w + 1 for w in given]


def shifted(given):
    return given[1:] + given[:1]


def none(given):
    return [None] * len(given)


SWITCHES = {
    "llama 3.1": {"rope scaling": off(rope_scaling=None), "theta": off(rope_theta=5e5)},
    "smollm2, llama 3.2": {"theta": off(rope_theta=1e4)},
    "mistral": {"no window": windows(none), "window + 1": windows(wider)},
    "qwen2": {"qkv bias": off(attention_bias=False)},
    "qwen2, late windows": {"no window": windows(none), "window + 1": windows(wider), "early": windows(shifted)},
    "qwen3": {"q and k norms": off(qk_norm=False), "theta": off(rope_theta=1e4)},
    "gemma2": {
        "activation": off(glu="swiglu"),
        "1 + weight": off(norm_offset=False),
        "post norms": off(post_norms=False),
        "scores' cap": off(attn_logit_softcapping=None),
        "logits' cap": off(final_logit_softcapping=None),
        "embedding": off(scaled_embedding=False),
        "scores' scale": off(query_pre_attn_scalar=32),
        "no window": windows(none),
        "window + 1": windows(wider),
        "the other layers": windows(shifted),
    },
    "gemma3": {
        "q and k norms": off(qk_norm=False),
        "local theta": off(local_rope_theta=None),
        "linear scaling": off(rope_scaling=None),
        "another factor": off(rope_scaling=LinearRope(2.0)),
        "scores' scale": off(query_pre_attn_scalar=32),
        "no window": windows(none),
        "window + 1": windows(wider),
        "pattern shifted": windows(shifted),
    },
    "phi3, 4k": {"no window": windows(none), "window + 1": windows(wider)},
    "phi3, 128k": {
        "no longrope": off(rope_scaling=None),
        "short factors": rope_off(short_factor=(1.0,) * 6),
        "long factors": rope_off(long_factor=tuple(LONG["short_factor"])),
        "never long": rope_off(original_max_position_embeddings=500),
        "always long": rope_off(original_max_position_embeddings=1),
        "attention factor": rope_off(attention_factor=1.0),
    },
}


@pytest.mark.parametrize("name, switch", [(n, s) for n, row in SWITCHES.items() for s in row])
def test_a_switch_turned_off_breaks_parity(name, switch, tmp_path, monkeypatch):
    hf, given = write_family(name, tmp_path), sequences()
    monkeypatch.setattr(Checkpoint, "check", lambda *_: None)  # else a norm left over would be refused, and no test
    right = config_from_directory(tmp_path)
    errors = []
    for config in (right, SWITCHES[name][switch](right)):
        with torch.device("meta"):
            model = Llama(config)
        load_weights(model, tmp_path, "cpu", lambda w, b: quantise_linear(w, b, bits=16, dtype=torch.float32))
        with torch.no_grad():
            errors.append((model(torch.cat(given), Layout.packed(LENGTHS)) - logits_of(hf, given)).abs().max())
    assert errors[0] < 5e-5 and errors[1] > 100 * errors[0] and errors[1] > 2e-3, errors


def test_longrope_goes_by_each_sequence_and_a_cache_by_its_prompt(tmp_path):
    """A neighbour beyond the original context changes nothing (in transformers it does), and tokens grown past it keep
    the prompt's short factors: the keys in the cache were turned by them."""
    hf = write_family("phi3, 128k", tmp_path)
    model, given = our_model(tmp_path), sequences()
    alone = torch.cat([model(s, Layout.packed([len(s)])) for s in given])
    close(model(torch.cat(given), Layout.packed(LENGTHS)), alone)
    batch = torch.zeros(2, 90, dtype=torch.long)
    batch[0], batch[1, :40] = given[0], given[2]
    mask = (torch.arange(90) < torch.tensor([[90], [40]])).long()
    assert (hf(batch, attention_mask=mask).logits[1, :40] - logits_of(hf, given[2:])).abs().max() > 1e-2
    prompt, steps = sequences([62])[0].tolist(), [7, 8, 9, 10]
    _, _, cache = prefill(model, [prompt], ALL)
    for i, token in enumerate(steps):
        log_probs, _ = extend(model, cache, torch.tensor([[token]]), torch.tensor([[i]]), ALL)
    (tmp_path / "short").mkdir()
    short = write_family("phi3, 128k", tmp_path / "short", rope_scaling=LONG | {"long_factor": LONG["short_factor"]})
    expected, long = (m(torch.tensor([prompt + steps])).logits[0, -1].log_softmax(-1) for m in (short, hf))
    close(log_probs[0, 0], expected)
    assert (expected - long).abs().max() > 1e-2


def test_fused_matrices_of_the_wrong_height_are_named(tmp_path):
    write_family("phi3, 4k", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {key: tensors[key][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1.self_attn.qkv_proj.weight is \(159, 72\), config.json asks for \(160"):
        our_model(tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks layers.1.self_attn.q_proj.weight"):
        our_model(tmp_path)


def without(name, *keys):
    return {k: v for k, v in FAMILIES[name].items() if k not in keys}


@pytest.mark.parametrize(
    "raw, words",
    [
        (SHARED | {"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: llama, mistral"),
        (FAMILIES["phi3, 4k"] | {"model_type": "phi3small"}, "model_type 'phi3small'"),
        (FAMILIES["phi3, 4k"] | {"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
        (FAMILIES["phi3, 128k"] | {"rope_scaling": LONG | {"type": "yarn"}}, "rope_type 'yarn'"),
        (FAMILIES["phi3, 128k"] | {"rope_scaling": LONG | {"long_factor": [1.0]}}, "long_factor has 1 numbers"),
        (FAMILIES["mistral"] | {"rope_scaling": LONG}, "rope_type 'longrope'"),
        (FAMILIES["mistral"] | {"layer_types": ALTERNATING}, "mixed layer_types"),
        (FAMILIES["mistral"] | {"attention_bias": True}, "attention_bias True .* mistral"),
        (without("mistral", "sliding_window"), "lacks 'sliding_window'"),
        (FAMILIES["llama 3.1"] | {"sliding_window": 7}, "sliding_window 7 .* llama"),
        (FAMILIES["gemma2"] | {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        (FAMILIES["gemma2"] | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (FAMILIES["gemma2"] | {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        (FAMILIES["gemma3"] | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        (without("gemma2", "attn_logit_softcapping"), "lacks 'attn_logit_softcapping'"),
        (without("gemma2", "query_pre_attn_scalar"), "lacks 'query_pre_attn_scalar'"),
        (without("gemma3", "rope_local_base_freq"), "lacks 'rope_local_base_freq'"),
        (without("qwen3", "head_dim"), "lacks 'head_dim'"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_what_is_not_computed_is_refused_by_name(raw, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=words) as error:
        config_from_directory(tmp_path)
    assert "\n" not in str(error.value)


def trained(directory, targets="all-linear", rslora=False, bits=16):
    """Our model with LoRA factors of which none is zero"""
    model = our_model(directory, bits)
    inject(model, rank=4, alpha=7, targets=targets, rslora=rslora)
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_A, std=0.1)
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    return model


def check_export(hf, model, directory, out):
    """PEFT's logits equal ours, and so do those of the adapter read back, factor for factor."""
    from peft import PeftModel

    given, layout = sequences()[0], Layout.packed(LENGTHS[:1])
    save_adapter(model, out, base_model="x")
    logits, base = model(given, layout), hf(given[None]).logits[0]
    assert (logits - base).abs().max() > 0.05
    close(PeftModel.from_pretrained(hf, out)(given[None]).logits[0], logits, 5e-5)
    again = our_model(directory)
    load_adapter(again, out)
    assert lora_layers(again).keys() == lora_layers(model).keys()
    for name, layer in lora_layers(again).items():
        assert torch.equal(layer.lora_A, lora_layers(model)[name].lora_A) and layer.scaling > 0
        assert torch.equal(layer.lora_B, lora_layers(model)[name].lora_B)
    assert torch.equal(again(given, layout), logits)


@pytest.mark.filterwarnings("error:.*missing adapter keys")
def test_peft_reads_our_adapter(family, tmp_path):
    name, hf, directory = family
    check_export(hf, trained(directory), directory, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "attention", "q_proj,v_proj", "up_proj,k_proj,down_proj", "o_proj"])
def test_phi3s_fused_modules_are_exact_as_blocks(tmp_path, targets, rslora):
    hf = write_family("phi3, 4k", tmp_path / "model")
    check_export(hf, trained(tmp_path / "model", targets, rslora), tmp_path / "model", tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("q_proj" in key or ".up_proj" in key for key in written)


@pytest.mark.parametrize("name", ["phi3, 4k", "gemma3"])
def test_an_adapter_of_peft_is_read(name, tmp_path):
    """PEFT has one A for all of qkv_proj; three equal ones compute the same."""
    from peft import LoraConfig, get_peft_model

    hf, given = write_family(name, tmp_path / "model"), sequences()[0]
    peft = get_peft_model(hf, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(4)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.1)
    peft.save_pretrained(tmp_path)
    model = our_model(tmp_path / "model")
    load_adapter(model, tmp_path)
    assert len(lora_layers(model)) == 7 * len(model.layers)
    close(model(given, Layout.packed(LENGTHS[:1])), peft(given[None]).logits[0], 5e-5)


def test_adapters_of_another_layout_are_refused(tmp_path):
    write_family("phi3, 4k", tmp_path / "phi")
    save_adapter(trained(tmp_path / "phi"), tmp_path, base_model="x")
    write_family("qwen2", tmp_path / "qwen")
    with pytest.raises(ValueError, match="was written for a model with qkv_proj, gate_up_proj: another base"):
        load_adapter(our_model(tmp_path / "qwen"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"qkv_proj": 7}}))
    with pytest.raises(ValueError, match="alpha_pattern does not fit the blocks"):
        load_adapter(our_model(tmp_path / "phi"), tmp_path)


def test_training_moves_every_factor_of_every_family(family):
    """Through merged linears, in 4 bits: a factor without gradient would be a layer outside of the graph."""
    name, hf, directory = family
    model, given = trained(directory, bits=4), sequences()
    install(model)
    cross_entropy(model(torch.cat(given), Layout.packed(LENGTHS), torch.tensor([88, 93, 133])), ALL[5:8]).backward()
    for layer in lora_layers(model).values():
        assert layer.lora_A.grad.norm() > 0 and layer.lora_B.grad.norm() > 0


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_merging_phi3_gives_the_trained_model(tmp_path, bits):
    """Merged into the fused matrices, quantised part by part as in training: transformers' reading gives our logits."""
    from transformers import AutoModelForCausalLM

    from lora.merge import merge

    write_family("phi3, 4k", tmp_path / "base")
    (tmp_path / "out").mkdir()
    model, given = trained(tmp_path / "base", bits=bits), sequences()[0]
    save_adapter(model, tmp_path / "out", base_model="x")
    options = {"bits": bits, "blocksize": 64, "double_quant": True}
    (tmp_path / "out" / "run.json").write_text(json.dumps({"options": options}))
    assert merge(tmp_path / "out", tmp_path / "base", tmp_path / "merged") == 2 * 4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    logits, expected = merged.eval()(given[None]).logits[0], model(given, Layout.packed(LENGTHS[:1]))
    # The merged weights are bfloat16; trained in 8 bits, the model rounded its inputs too.
    assert (logits - expected).norm() / expected.norm() < (0.05 if bits == 8 else 0.02)
    written = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.qkv_proj.weight"]
    parts = [model.get_submodule(f"layers.0.self_attn.{part}_proj") for part in "qkv"]
    parts = torch.cat([p.base.dequantise(torch.float32) + p.scaling * p.lora_B @ p.lora_A for p in parts])
    assert (written == parts.bfloat16()).float().mean() > 0.99  # quantised whole, absmax would differ


@kernels
def test_fused_pieces_equal_the_plain_ones(family):
    """Kernels with windows, soft caps, norms of heads and geglu, inside of the whole network, forward and backward"""
    from fast.layers import FastLayers
    from fast.norm_glu import FUSED

    name, hf, directory = family
    results = []
    for fused in (False, True):
        model = trained(directory).to(DEVICE)
        if fused:
            model.run_layers = FastLayers(model, FUSED, kernels=True)
        tokens, layout = torch.cat(sequences()).to(DEVICE), Layout.packed(LENGTHS, DEVICE)
        logits = model(tokens, layout, torch.tensor([40, 88, 93, 133], device=DEVICE))
        logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
        grads = torch.cat([layer.lora_A.grad.flatten() for layer in lora_layers(model).values()])
        results.append((logits.detach(), grads))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5
