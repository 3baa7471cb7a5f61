"""Reading prompts and growing continuations on them: functions of a model, none of which keeps a gradient.

    log_probs, top, cache = prefill(model, prompts, choices)         what may follow each prompt
    log_probs, top = extend(model, cache, tokens, parents, choices)  what may follow each of several continuations

A price is asked for as a tree of tokens ("1", "12", "123", ...): the prompt is read once, then each level of the tree
is one forward pass over its nodes (llama/cache.py). Ordinary decoding, token by token, is the tree without branches.
"""

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.model import Llama
from llama.rope import changes_with_length


@torch.no_grad()
def next_token(model: Llama, x: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (M, C) -> natural log-probabilities of the tokens `choices` (M, k), and the likeliest of all (M,).

    The softmax runs over the whole vocabulary, a few rows at a time, so that (M, V) never exists.
    """
    log_probs, top = [], []
    for rows in x.split(max(1, 2**26 // model.config.vocab_size)):  # 256 MiB of float32 logits
        logits = model.head(rows)
        log_probs.append(logits[:, choices] - logits.logsumexp(dim=-1, keepdim=True))
        top.append(logits.argmax(dim=-1))
    return torch.cat(log_probs), torch.cat(top)


@torch.no_grad()
def read_prefix(model: Llama, tokens: list[int]) -> KVCache:
    """The cache of what many prompts begin with, to be read once and given to `prefill`."""
    cache = KVCache([len(tokens)], len(model.layers), model.device)
    model.hidden_states(torch.tensor(tokens, device=model.device), cache.layout, cache, cache.layout.last)
    cache.tokens = tokens
    return cache


@torch.no_grad()
def prefill(
    model: Llama, prompts: list[list[int]], choices: Tensor, prefix: KVCache | None = None
) -> tuple[Tensor, Tensor, KVCache]:
    """Read B prompts (after `prefix`, where given). What comes next, as in `next_token`: (B, k) and (B,), and the
    cache to go on from; its `states` (B, C) are what the head reads at the prompts' ends."""
    longest = max(map(len, prompts))
    if prefix and changes_with_length(model.config, len(prefix.tokens), len(prefix.tokens) + longest):
        prompts, prefix = [prefix.tokens + p for p in prompts], None  # its keys would be turned otherwise
    cache = KVCache([len(p) for p in prompts], len(model.layers), model.device, prefix)
    tokens = torch.tensor([t for p in prompts for t in p], device=model.device)  # (N,)
    x = cache.states = model.hidden_states(tokens, cache.layout, cache, cache.layout.last)  # (B, C)
    return *next_token(model, x, choices), cache


@torch.no_grad()
def extend(
    model: Llama, cache: KVCache, tokens: Tensor, parents: Tensor, choices: Tensor
) -> tuple[Tensor, Tensor]:
    """Add n tree nodes to each row: tokens (B, n), parents (B, n) as in KVCache.grow. What follows each of them, as in
    `next_token`: (B, n, k) and (B, n)."""
    cache.grow(parents)
    x = model.hidden_states(tokens.reshape(-1), cache.layout, cache)  # (B * n, C)
    log_probs, top = next_token(model, x, choices)
    return log_probs.view(*tokens.shape, -1), top.view(tokens.shape)
