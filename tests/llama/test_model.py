"""The network against transformers on tiny random configs: float32, CPU, no download."""

import json

import pytest
import torch
from conftest import LLAMA31_ROPE, hugging_face_model, our_model, tiny_config

from llama.attention import Layout
from llama.families import config_from_dict, config_from_directory
from llama.generate import extend, prefill, read_prefix
from llama.rope import inverse_frequencies

CONFIGS = {
    "llama 2, plain": tiny_config(num_key_value_heads=6, head_dim=16),
    "llama 3, grouped queries": tiny_config(rope_theta=500000.0),
    "llama 3.1, scaled rope": tiny_config(rope_scaling=LLAMA31_ROPE),
    "smollm2, llama 3.2, tied": tiny_config(tie_word_embeddings=True),
    "biases": tiny_config(attention_bias=True, mlp_bias=True),
}
ALL = torch.arange(300)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients(config, tmp_path):
    """Two packed sequences; 200 positions, well beyond the scaled rope's original 64."""
    hf, model = hugging_face_model(config, tmp_path), our_model(tmp_path)
    sequences = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (200, 7)]
    model.embed_tokens.weight.requires_grad_()
    logits = model(torch.cat(sequences), Layout.packed([200, 7]))
    expected = torch.cat([hf(s[None]).logits[0] for s in sequences])
    close(logits, expected)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    expected_gradient = hf.model.embed_tokens.weight.grad
    if config["tie_word_embeddings"]:  # transformers adds the head's gradient; our head is frozen and gives none
        with torch.no_grad():
            hidden = torch.cat([hf.model(s[None]).last_hidden_state[0] for s in sequences])
        expected_gradient = expected_gradient - probe.T @ hidden
    torch.testing.assert_close(model.embed_tokens.weight.grad, expected_gradient, rtol=1e-4, atol=1e-4)


def test_right_padded_batch(tiny):
    hf, directory = tiny
    tokens = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    lengths = [11, 4, 8]
    mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    expected = hf(tokens, attention_mask=mask).logits
    padded = our_model(directory)(tokens.view(-1), Layout.packed([11] * 3)).view(3, 11, -1)
    for row, n in enumerate(lengths):
        close(padded[row, :n], expected[row, :n])


def test_logits_only_where_asked(tiny):
    model = our_model(tiny[1])
    tokens, layout = torch.arange(20), Layout.packed([12, 8])
    close(model(tokens, layout, torch.tensor([3, 19])), model(tokens, layout)[[3, 19]])


def test_a_poisoned_neighbour_changes_nothing(tiny):
    """Packing must not leak: other tokens in the second sequence leave the first bitwise as it was, gradients too."""
    model = our_model(tiny[1])
    results = []
    for poison in (5, 250):
        model.zero_grad()
        x = torch.cat([torch.arange(9), torch.full((6,), poison)])
        model.embed_tokens.weight.requires_grad_()
        logits = model(x, Layout.packed([9, 6]))[:9]
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.embed_tokens.weight)
        results.append((logits.detach(), gradient[:9]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_tree_decoding(tiny):
    """Branches see the prompt, their ancestors and themselves, never each other."""
    hf, directory = tiny
    model = our_model(directory)
    prompts = [list(range(10)), list(range(50, 57))]
    _, _, cache = prefill(model, prompts, ALL)
    first, _ = extend(model, cache, torch.tensor([[11, 12], [13, 14]]), torch.zeros(2, 2, dtype=torch.long), ALL)
    second, _ = extend(
        model, cache, torch.tensor([[21, 22, 23], [24, 25, 26]]), torch.tensor([[2, 1, 2], [1, 1, 2]]), ALL
    )
    paths = [[[12, 21], [11, 22], [12, 23]], [[13, 24], [13, 25], [14, 26]]]
    for row, prompt in enumerate(prompts):
        for node, path in enumerate(paths[row]):
            logits = hf(torch.tensor([prompt + path])).logits[0]
            close(second[row, node], logits[-1].log_softmax(-1))
    close(first[0, 1], hf(torch.tensor([prompts[0] + [12]])).logits[0, -1].log_softmax(-1))


def test_a_shared_prefix_is_read_once_and_changes_nothing(tiny):
    model = our_model(tiny[1])
    question, texts = list(range(40, 52)), [[3], [7, 8, 9, 10], [5, 6]]
    tokens, parents = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.zeros(3, 2, dtype=torch.long)
    log_probs, top, cache = prefill(model, [question + text for text in texts], ALL)
    grown = extend(model, cache, tokens, parents, ALL)
    shared_log_probs, shared_top, cache = prefill(model, texts, ALL, read_prefix(model, question))
    close(shared_log_probs, log_probs)
    assert torch.equal(shared_top, top)
    close(extend(model, cache, tokens, parents, ALL)[0], grown[0])


def test_scaled_rope_against_transformers_at_real_sizes():
    from transformers import LlamaConfig as HFConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LLAMA31_ROPE | {"original_max_position_embeddings": 8192}
    config = tiny_config(head_dim=128, rope_theta=500000.0, rope_scaling=rope, max_position_embeddings=131072)
    ours = inverse_frequencies(config_from_dict(config))
    hf = LlamaRotaryEmbedding(HFConfig(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")}))
    torch.testing.assert_close(ours, hf.inv_freq, rtol=1e-6, atol=0)
    assert not torch.allclose(ours, inverse_frequencies(config_from_dict(config | {"rope_scaling": None})))


def test_bfloat16_stays_near_float32(tiny):
    tokens, layout = torch.arange(40), Layout.packed([40])
    exact, rounded = our_model(tiny[1])(tokens, layout), our_model(tiny[1], dtype=torch.bfloat16)(tokens, layout)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.02


def test_both_spellings_of_rope_in_config():
    old = config_from_dict(tiny_config(rope_theta=5e5, rope_scaling=LLAMA31_ROPE))
    config = tiny_config()
    del config["rope_theta"]
    assert config_from_dict(config | {"rope_parameters": LLAMA31_ROPE | {"rope_theta": 5e5}}) == old


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "already quantised"),
        ({"num_key_value_heads": 4}, "cannot share"),
    ],
)
def test_unsupported_switches_are_refused_by_name(change, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**change)))
    with pytest.raises(ValueError, match=words) as error:
        config_from_directory(tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)
