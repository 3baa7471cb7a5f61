"""Which trades of speed for memory a run makes: planned from shapes alone, before anything is loaded, and printed.

    python train.py --memory-budget 6GiB

The levers, in the order in which they are pulled: cheapest first, and what changes no number before what does.

    keep        weights stay dequantised, as many blocks as fit      faster; with memory to spare
    host_embed  the embedding lies in the host's memory              the GPU reads a few rows of it in a step
    recompute   blocks keep only their input and run twice           + up to a third of a step (Chen et al. 2016)
    offload     those inputs wait in the host's memory               copied while other blocks compute
    optimiser   AdamW's state in 8 bits                              rounds the state
    head8       lm_head in 8 bits, one scale a row                   rounds the head

The estimate counts what PyTorch allocates; the CUDA context (about half a GiB) comes on top, as for every program.
"""

import re
from dataclasses import dataclass, replace

import torch

from fast.int8 import ROWS
from llama.config import LlamaConfig
from llama.logits import HEAD_CHUNK
from lora.inject import ATTENTION, target_names
from lora.optim import OPTIMISERS

GIB = 1 << 30
WORKSPACE = 0.2 * GIB  # cuBLAS on two streams, rotary tables, rounding up


@dataclass(frozen=True)
class Plan:
    keep: int = 0  # blocks, from the first, whose dequantised weights stay
    host_embed: bool = False
    recompute: int = 0  # blocks, from the first
    offload: bool = False
    optimiser: str = "adamw"
    head8: bool = False

    @property
    def numerics(self) -> dict:
        """What decides the numbers, not their place: the same for all of a run, its resumptions and its members"""
        return {"optimiser": self.optimiser, "head8": self.head8}


def parse_bytes(text: str) -> int:
    """`6GiB`, `6144MiB`, `6e9` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(GiB|MiB|GB|MB|)", text.strip())
    if not match:
        raise ValueError(f"{text!r} is no amount of memory; write 6GiB or 6144MiB")
    size = float(match[1]) * {"GiB": GIB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6, "": 1}[match[2]]
    if size >= 1 << 60:
        raise ValueError(f"{text!r} is more memory than there is; write 6GiB or 6144MiB")
    if size < 1 << 20:
        raise ValueError(f"{text!r} is {size:,.0f} bytes; write 6GiB or 6144MiB")
    return int(size)


class Estimate:
    """Bytes of a training run on the fast path, from shapes alone: `terms` names each, `total` is their sum.

    N `tokens` in a batch, M `answers` (supervised positions) at most; C hidden, F feed-forward, V vocabulary. What is
    kept for backward is counted as fast/layers.py keeps it.
    """

    def __init__(
        self, config: LlamaConfig, tokens: int, answers: int, *, bits: int, dtype: torch.dtype, rank: int, targets: str,
        blocksize: int = 64, double_quant: bool = True, head_numbers: int = 0,
    ):  # fmt: skip
        self.config, self.tokens, self.answers, self.bits = config, tokens, answers, bits
        self.wide, self.layers = dtype.itemsize, config.num_hidden_layers
        self.tied = config.tie_word_embeddings
        c, f = config.hidden_size, config.intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q, self.kv = q, kv
        self.linears = {
            "q_proj": (q, c), "k_proj": (kv, c), "v_proj": (kv, c), "o_proj": (c, q),
            "gate_proj": (f, c), "up_proj": (f, c), "down_proj": (c, f),
        }  # fmt: skip
        self.targets = [name for name in self.linears if name in target_names(targets)]
        # numbers that learn: LoRA's factors, and a price head's
        self.trained = rank * sum(sum(self.linears[name]) for name in self.targets) * self.layers + head_numbers
        self.weights = self.layers * self._block_weights(blocksize, double_quant)
        matrix = sum(o * i for o, i in self.linears.values())
        self.kept_block = matrix * self.wide if bits < 16 else 0
        self.scratch = max((q + 2 * kv) * c, c * q, 2 * f * c, c * f) * self.wide if bits < 16 else 0
        self.residual = 4 * c * tokens  # the residual stream, float32
        self.block_saved, self.passing, self.logits = self._saved() * tokens, self._passing(), self._logits()

    def _block_weights(self, blocksize: int, double_quant: bool) -> float:
        """Bytes of a block's linears as stored, biases included"""
        c, f = self.config.hidden_size, self.config.intermediate_size
        matrix, outputs = sum(o * i for o, i in self.linears.values()), sum(o for o, _ in self.linears.values())
        absmax = (1 + 4 / 256 if double_quant else 4) / blocksize
        stored = {4: matrix * (0.5 + absmax), 8: matrix + 4 * outputs, 16: matrix * self.wide}[self.bits]
        config = self.config
        biases = config.attention_bias * (self.q + 2 * self.kv) + config.output_bias * c + config.mlp_bias * (2 * f + c)
        return stored + 2 * biases  # biases as in the file: 16 bits

    def _saved(self) -> float:
        """Bytes that a block keeps for backward, for each token"""
        config, wide, q, kv = self.config, self.wide, self.q, self.kv
        c, f = config.hidden_size, config.intermediate_size
        saved = 8 * c + (q + 2 * kv) * wide + q * wide + 4 * config.num_attention_heads + 2 * f * wide
        saved += c * wide * any(name in self.targets for name in ATTENTION[:3])
        saved += c * wide * any(name in self.targets for name in ("gate_proj", "up_proj"))
        saved += f * wide * ("down_proj" in self.targets)
        saved += 2 * c * wide if config.post_norms else 0  # what the sub-layers give, before their second norm
        saved += (q + kv) * (wide + 4 / config.head_dim) if config.qk_norm else 0
        return saved

    def _passing(self) -> float:
        """Bytes that exist while one block runs backward, or with 8 bits forward, and no longer"""
        c, f, n = self.config.hidden_size, self.config.intermediate_size, self.tokens
        passing = n * (4 * c + c * self.wide + 3 * f * self.wide)  # gradients: of the residual, of the MLP's inside
        if self.bits == 8:  # forward holds sums of integers (in parts on a GPU: fast/int8.py) and x as integers
            passing = max(passing, 4 * max(2 * f, self.q + 2 * self.kv) * min(n, ROWS) + n * max(f, c, self.q))
        return passing

    def _logits(self) -> float:
        """Logits, their gradient and softmax; the parts of the head's three bfloat16 terms (llama/logits.py)"""
        vocabulary, m = self.config.vocab_size, self.answers
        rows = min(vocabulary, HEAD_CHUNK)
        capped = 2 if self.config.final_logit_softcapping else 0  # tanh, which backward needs, and its product
        size = (4 + capped) * 4 * m * vocabulary + 2 * 4 * 3 * m * rows
        return size + rows * self.config.hidden_size * (self.wide if self.wide == 4 else 0)

    def terms(self, plan: Plan) -> dict[str, float]:
        """Bytes under a plan, by what they are for, at the moment of the peak"""
        config = self.config
        norms = (4 if config.post_norms else 2) * config.hidden_size + 2 * config.head_dim * config.qk_norm
        table = config.vocab_size * config.hidden_size * self.wide
        head = 0 if self.tied else config.vocab_size * (config.hidden_size + 4) if plan.head8 else table
        state = OPTIMISERS[plan.optimiser][1]
        # The last block goes on with the supervised rows alone, so it keeps about a third of the others.
        whole = max(0, self.layers - plan.recompute - 0.6)
        inputs = 3 * self.residual if plan.offload else plan.recompute * self.residual
        again = self.block_saved - self.residual if plan.recompute else 0  # its input is there already
        return {
            "linears of the blocks, as stored": self.weights,
            "norms, float32": 4 * (self.layers * norms + config.hidden_size),
            f"dequantised weights of {plan.keep} blocks, kept": plan.keep * self.kept_block,
            "scratch matrix for dequantised weights": self.scratch if plan.keep < self.layers else 0,
            "embedding": 0 if plan.host_embed else table,
            "lm_head, where it is not the embedding": head,
            # float32 value and gradient, and one piece in the compute dtype for each pass
            f"{self.trained:,} trained numbers: value, gradient, {plan.optimiser}'s state": self.trained
            * (4 + 4 + state + 2 + 2),
            f"inputs of {plan.recompute} recomputed blocks": inputs,
            "activations kept for backward": whole * self.block_saved,
            "logits, or one block's backward, whichever is more": max(self.logits, again + self.passing),
            "workspace of cuBLAS, rotary tables, rounding up": WORKSPACE,
        }

    def total(self, plan: Plan) -> float:
        """Peak bytes under a plan"""
        return sum(self.terms(plan).values())

    def stored(self) -> float:
        """Bytes of the quantised model alone: linears, norms, embedding, head"""
        terms = self.terms(Plan())
        names = ("norms, float32", "embedding", "lm_head, where it is not the embedding")
        return self.weights + sum(terms[name] for name in names)

    def explain(self, plan: Plan) -> str:
        """The terms as a table, in GiB"""
        rows = [*self.terms(plan).items(), ("total", self.total(plan))]
        return "\n".join(f"  {name:<64}{size / GIB:>10.3f} GiB" for name, size in rows if size)


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def keep_weights(estimate: Estimate, plan: Plan, budget: int) -> tuple[Plan, list[str]]:
    """The plan with as many dequantised blocks as there is room for"""
    if not estimate.kept_block:
        return plan, []
    keep = min(estimate.layers, int((budget - estimate.total(plan)) // estimate.kept_block))
    if estimate.total(replace(plan, keep=estimate.layers)) <= budget:
        keep = estimate.layers  # then no scratch is needed
    blocks, size = f"{keep} of {estimate.layers} blocks", gib(keep * estimate.kept_block)
    reasons = [f"{blocks} keep their dequantised weights ({size}): there is room"] if keep else []
    return replace(plan, keep=keep), reasons


def choose(
    estimate: Estimate, budget: int, optimiser: str = "adamw", gpu: bool = True, numerics: dict | None = None
) -> tuple[Plan, list[str]]:
    """The fastest plan that fits `budget` bytes, and the reasons, a line each. Without a GPU nothing can be moved away.
    `numerics`: what an earlier plan of the same run chose and none may change, `Plan.numerics`.

    Raises ValueError that names the floor where nothing fits.
    """
    plan, reasons = Plan(**{"optimiser": optimiser} | (numerics or {})), []

    def fits() -> bool:
        return estimate.total(plan) <= budget

    if fits():
        return keep_weights(estimate, plan, budget)
    reasons.append(f"{gib(estimate.total(plan))} would be needed to keep everything, {gib(budget)} may be used")
    if gpu and not estimate.tied:
        plan = replace(plan, host_embed=True)
        reasons.append("the embedding lies in the host's memory")
    for blocks in range(1, estimate.layers + 1):
        if fits():
            break
        plan = replace(plan, recompute=blocks)
    if plan.recompute:
        reasons.append(f"{plan.recompute} of {estimate.layers} blocks are recomputed in backward")
    levers = [("offload", True, "the inputs of recomputed blocks wait in the host's memory")] if gpu else []
    if optimiser == "adamw" and not numerics:
        levers.append(("optimiser", "adamw8bit", "AdamW keeps its state in 8 bits"))
    if not estimate.tied and not numerics:
        levers.append(("head8", True, "lm_head is stored in 8 bits"))
    for lever, value, what in levers:
        if fits():
            break
        plan = replace(plan, **{lever: value})
        reasons.append(what)
    if not fits():
        raise ValueError(
            f"a memory budget of {gib(budget)} is below the floor of {gib(estimate.total(plan))} for this model and "
            "--batch-tokens; give more (--memory-budget), lower --batch-tokens (with --accumulate), --rank or "
            "--targets, or take a smaller model"
        )
    return plan, reasons


def budget_bytes(budget: str | None, device: torch.device) -> int:
    """A budget such as "6GiB" in bytes; without one, what is free on the device"""
    return parse_bytes(budget) if budget else free_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a run may use: nine tenths of what is free on the GPU, or of the host's available memory"""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        available = 8 * GIB
    return int(0.9 * available)
