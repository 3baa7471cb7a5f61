"""LoRA: where it starts, what it may change, and PEFT's format read and written, against peft itself."""

import json
import shutil

import pytest
import torch
from conftest import hugging_face_model, our_model, tiny_config
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from common.files import write_directory
from fast.install import install
from llama.attention import Layout
from lora.adapter import load_adapter, save_adapter
from lora.inject import inject, lora_layers
from lora.merge import merge
from lora.optim import FlatParameter, make_optimiser
from pipeline.state import load_state, save_state

TOKENS, LAYOUT = torch.arange(5, 35), Layout.packed([30])


def train_a_little(model, steps=3, lr=1e-2, seed=0):
    torch.manual_seed(seed)
    factors = FlatParameter(lora_layers(model))
    optimiser = make_optimiser("adamw", factors.parameter, lr, 0.0)
    losses = [train_step(model, optimiser) for _ in range(steps)]
    return factors, optimiser, losses


def train_step(model, optimiser):
    loss = cross_entropy(model(TOKENS[:-1], Layout.packed([29])), TOKENS[1:])
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=False)
    return loss.item()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_starts_exactly_at_the_base_model(tiny, bits):
    model = our_model(tiny[1], bits)
    before = model(TOKENS, LAYOUT)
    inject(model, rank=4, alpha=8)
    assert torch.equal(model(TOKENS, LAYOUT), before)


def test_only_lora_learns_and_every_factor_does(tiny):
    model = our_model(tiny[1], 4)
    names = inject(model, rank=4, alpha=8)
    assert len(names) == 2 * 7
    frozen = {n: t.clone() for n, t in [*model.named_buffers(), *model.named_parameters()] if "lora_" not in n}
    factors = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    *_, losses = train_a_little(model, steps=8)
    assert losses[-1] < losses[0]
    now = dict([*model.named_buffers(), *model.named_parameters()])
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert all(not torch.equal(now[n], t) for n, t in factors.items())
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}


def test_whatever_could_learn_before_is_frozen(tiny):
    """Loaded weights are frozen already; here the embedding, the head and the norms are not."""
    model = our_model(tiny[1], 4).requires_grad_(True)
    assert any(p.requires_grad for p in model.parameters())
    names = inject(model, rank=4, alpha=8, targets="q_proj")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B")}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "attention", "q_proj,down_proj"])
def test_adapter_loads_in_peft_with_equal_logits(tiny, tmp_path, targets, rslora):
    from peft import PeftModel

    hf, directory = tiny
    model = our_model(directory)
    inject(model, rank=4, alpha=7, targets=targets, rslora=rslora)
    train_a_little(model)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base_model=str(directory))
    base = hf(TOKENS[None]).logits[0]
    peft = PeftModel.from_pretrained(hf, tmp_path / "adapter")
    logits = model(TOKENS, LAYOUT)
    assert (logits - base).abs().max() > 0.1  # training moved it: equality below is not the base's
    torch.testing.assert_close(logits, peft(TOKENS[None]).logits[0], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_adapter_of_peft_loads_here_with_equal_logits_and_gradients(tiny, tmp_path, fast):
    from peft import LoraConfig, get_peft_model

    hf, directory = tiny
    peft = get_peft_model(
        hf, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    peft.save_pretrained(tmp_path / "adapter")
    model = our_model(directory)
    load_adapter(model, tmp_path / "adapter")
    if fast:
        install(model)
    ours, theirs = model(TOKENS, LAYOUT), peft(TOKENS[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)
    cross_entropy(ours[:-1], TOKENS[1:]).backward()
    cross_entropy(theirs[:-1], TOKENS[1:]).backward()
    gradients = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
    compared = 0
    for name, layer in lora_layers(model).items():
        for factor in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.model.{name}.{factor}.default.weight"]
            torch.testing.assert_close(getattr(layer, factor).grad, expected, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == len(gradients) == 12


def test_round_trip_is_exact(tiny, tmp_path):
    model = our_model(tiny[1], 4)
    inject(model, rank=4, alpha=8, dropout=0.1)
    train_a_little(model)
    save_adapter(model, tmp_path, base_model="x")
    again = our_model(tiny[1], 4)
    load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(TOKENS, LAYOUT), model.eval()(TOKENS, LAYOUT))


def test_delta_is_what_the_layer_adds(tiny):
    model = our_model(tiny[1], 4)
    inject(model, rank=4, alpha=8)
    train_a_little(model)
    layer = lora_layers(model)["layers.1.mlp.down_proj"]
    x = torch.randn(5, layer.base.in_features)
    merged = layer.base.dequantise(torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ merged.T, rtol=1e-5, atol=1e-5)


def test_dropout_touches_only_the_lora_branch(tiny):
    model = our_model(tiny[1], 4).train()
    inject(model, rank=4, alpha=8, dropout=0.5)
    layer = lora_layers(model)["layers.0.self_attn.q_proj"]
    x = torch.randn(6, layer.base.in_features)
    assert torch.equal(layer(x), layer.base(x))  # B = 0: whatever dropout does to the branch is multiplied away
    with torch.no_grad():
        layer.lora_B.normal_()
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_resume_goes_on_as_if_never_stopped(tiny, tmp_path):
    """Bit for bit, dropout's random numbers included."""
    unbroken = our_model(tiny[1], 4)
    torch.manual_seed(5)
    inject(unbroken, rank=4, alpha=8, dropout=0.2)
    *_, expected = train_a_little(unbroken, steps=6)

    first = our_model(tiny[1], 4)
    torch.manual_seed(5)
    inject(first, rank=4, alpha=8, dropout=0.2)
    factors, optimiser, losses = train_a_little(first, steps=3)
    with write_directory(tmp_path / "run") as part:
        save_adapter(first, part, "x")
        save_state(part / "state", factors, optimiser, {"step": 3, "seconds": 1.5})

    torch.manual_seed(99)
    second = our_model(tiny[1], 4)
    load_adapter(second, tmp_path / "run")
    factors = FlatParameter(lora_layers(second))
    optimiser = make_optimiser("adamw", factors.parameter, 1e-2, 0.0)
    assert load_state(tmp_path / "run" / "state", factors, optimiser) == {"step": 3, "seconds": 1.5}
    losses += [train_step(second, optimiser) for _ in range(3)]
    assert losses == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"targets": "q_proj,qproj"}, "targets qproj name no layer; the model has"),
        ({"rank": 0}, "rank >= 1"),
        ({"alpha": 0}, "alpha > 0"),
        ({"dropout": 1.0}, "dropout < 1"),
    ],
)
def test_senseless_options_are_refused(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        inject(our_model(tiny[1]), **{"rank": 4, "alpha": 8, **options})


def test_damaged_adapters_are_refused_by_name(tmp_path):
    directory = tmp_path / "base"
    hugging_face_model(tiny_config(), directory)
    model = our_model(directory)
    inject(model, rank=4, alpha=8, targets="q_proj")
    good = tmp_path / "good"
    good.mkdir()
    save_adapter(model, good, "x")
    config, tensors = (
        json.loads((good / "adapter_config.json").read_text()),
        load_file(good / "adapter_model.safetensors"),
    )
    key = next(k for k in tensors if k.endswith("lora_A.weight"))
    stray = key.replace("q_proj", "z_proj")
    cases = [
        (config, {k: v for k, v in tensors.items() if k != key}, f"lacks {key}"),
        (config, tensors | {stray: tensors[key].clone()}, f"{stray} matches no layer"),
        (config, tensors | {key: tensors[key][:, :5].contiguous()}, "the model needs"),
        (config | {"use_dora": True}, tensors, "use_dora=True is not supported"),
        (config | {"peft_type": "IA3"}, tensors, "'IA3' is not supported"),
    ]
    for number, (c, t, words) in enumerate(cases):
        bad = tmp_path / str(number)
        bad.mkdir()
        (bad / "adapter_config.json").write_text(json.dumps(c))
        save_file(t, bad / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=words):
            load_adapter(our_model(directory), bad)
    (good / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_adapter(our_model(directory), good)


def test_merging_names_what_does_not_fit_and_leaves_nothing(tiny, tmp_path):
    model, base = our_model(tiny[1]), tmp_path / "base"
    inject(model, rank=4, alpha=8, targets="q_proj")
    ckpt, out = tmp_path / "out", tmp_path / "merged"
    ckpt.mkdir()
    with pytest.raises(ValueError, match=f"{ckpt} is no whole checkpoint of train.py: "):
        merge(ckpt, tiny[1], out)
    save_adapter(model, ckpt, base_model="x")
    (ckpt / "run.json").write_text(json.dumps({"options": {"bits": 16, "blocksize": 64, "double_quant": True}}))
    with pytest.raises(ValueError, match=f"{ckpt} exists; choose another name"):
        merge(ckpt, tiny[1], ckpt)
    with pytest.raises(ValueError, match=f"{base} holds neither model.safetensors nor"):
        merge(ckpt, base, out)
    shutil.copytree(tiny[1], base)
    rewritten = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = rewritten.pop(name)
    save_file(rewritten, base / "model.safetensors")
    with pytest.raises(ValueError, match=f"{base} lacks the weight that .*layers.1.self_attn.q_proj.* belongs to"):
        merge(ckpt, base, out)
    save_file(rewritten | {name: weight[:5].contiguous()}, base / "model.safetensors")
    with pytest.raises(ValueError, match="a weight of the base is .*: another base model"):
        merge(ckpt, base, out)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{base / 'model.safetensors'} is truncated or damaged") as error:
        merge(ckpt, base, out)
    assert "\n" not in str(error.value) and {p.name for p in tmp_path.iterdir()} >= {"base", "out"}
    assert not out.exists() and not list(tmp_path.glob(".merged*"))


def test_what_is_fused_is_named_alike_where_it_is_read_and_where_it_is_written():
    """lora may not import llama, so the names stand twice."""
    from llama import weights
    from lora import phi3

    assert weights.FUSED == phi3.FUSED
