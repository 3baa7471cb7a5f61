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
from lora.inject import ATTENTION, target_names
from lora.optim import OPTIMISERS
from pricing.data.batch import Shape

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
    def settled(self) -> dict:
        """What decides the numbers, not their place: the same for all of a run, its resumptions and its members"""
        return {"optimiser": self.optimiser, "head8": self.head8}


def parse_bytes(text: str) -> int:
    """`6GiB`, `6144MiB`, `6e9` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(GiB|MiB|GB|MB|)", text.strip())
    if not match:
        raise ValueError(f"{text!r} is no amount of memory; write 6GiB or 6144MiB")
    size = float(match[1]) * {"GiB": GIB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6, "": 1}[match[2]]
    if size < 1 << 20:
        raise ValueError(f"{text!r} is {size:,.0f} bytes; write 6GiB or 6144MiB")
    return int(size)


class Estimate:
    """Bytes of a training run on the fast path, by shapes: N tokens a batch, M supervised, C hidden, F feed-forward"""

    def __init__(
        self, config: LlamaConfig, shape: Shape, *, bits: int, dtype: torch.dtype, rank: int, targets: str,
        blocksize: int = 64, double_quant: bool = True, head_numbers: int = 0,
    ):  # fmt: skip
        c, f = config.hidden_size, config.intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        wide = dtype.itemsize
        linears = {
            "q_proj": (q, c), "k_proj": (kv, c), "v_proj": (kv, c), "o_proj": (c, q),
            "gate_proj": (f, c), "up_proj": (f, c), "down_proj": (c, f),
        }  # fmt: skip
        chosen = [name for name in linears if name in target_names(targets)]
        block = sum(o * i for o, i in linears.values())
        absmax = (1 + 4 / 256 if double_quant else 4) / blocksize
        self.layers = config.num_hidden_layers
        scales = 4 * sum(o for o, _ in linears.values())  # of int8 weights
        biases = config.attention_bias * (q + 2 * kv) + config.output_bias * c + config.mlp_bias * (2 * f + c)
        self.weights = self.layers * {4: block * (0.5 + absmax), 8: block + scales, 16: block * wide}[bits]
        self.weights += self.layers * 2 * biases  # as in the file: 16 bits
        norms = (4 if config.post_norms else 2) * c + 2 * config.head_dim * config.qk_norm
        self.norms = 4 * (self.layers * norms + c)
        self.kept_block = block * wide if bits < 16 else 0
        self.scratch = max((q + 2 * kv) * c, c * q, 2 * f * c, c * f) * wide if bits < 16 else 0
        table = config.vocab_size * c * wide
        self.tied = config.tie_word_embeddings
        self.embedding, self.head = table, 0 if self.tied else table
        self.head8 = config.vocab_size * (c + 4)
        # float32 value and gradient, and one piece in the compute dtype for each pass
        self.trained = sum(rank * sum(linears[name]) for name in chosen) * self.layers + head_numbers
        n, m = shape.tokens, shape.answers
        self.residual = 4 * c * n  # x, float32
        saved = 8 * c + (q + 2 * kv) * wide + q * wide + 4 * config.num_attention_heads + 2 * f * wide
        saved += c * wide * any(name in chosen for name in ATTENTION[:3])
        saved += c * wide * any(name in chosen for name in ("gate_proj", "up_proj"))
        saved += f * wide * ("down_proj" in chosen)
        saved += 2 * c * wide if config.post_norms else 0  # what the sub-layers give, before their second norm
        saved += (q + kv) * (wide + 4 / config.head_dim) if config.qk_norm else 0
        self.block_saved = saved * n
        # gradients: of the residual (float32, and rounded), of the MLP's inside
        self.passing = n * (4 * c + c * wide + 3 * f * wide)
        if bits == 8:  # forward holds sums of integers (in parts on a GPU: quant/fast_int8.py) and x as integers
            self.passing = max(self.passing, 4 * max(2 * f, q + 2 * kv) * min(n, ROWS) + n * max(f, c, q))
        rows = min(config.vocab_size, 16384)
        # logits, their gradient and softmax; the chunks of the head's three terms
        capped = 2 if config.final_logit_softcapping else 0  # tanh, which backward needs, and its product
        self.logits = (4 + capped) * 4 * m * config.vocab_size + 2 * 4 * 3 * m * rows
        self.logits += rows * c * (wide if wide == 4 else 0)

    def total(self, plan: Plan) -> float:
        """Peak bytes under a plan"""
        fixed = self.weights + self.norms + plan.keep * self.kept_block
        fixed += self.scratch if plan.keep < self.layers else 0
        fixed += 0 if plan.host_embed else self.embedding
        fixed += self.head8 if plan.head8 else self.head
        fixed += self.trained * (4 + 4 + OPTIMISERS[plan.optimiser][1] + 2 + 2)
        # The last block goes on with the supervised rows alone, so it keeps about a third of the others.
        whole = max(0, self.layers - plan.recompute - 0.6)
        inputs = 3 * self.residual if plan.offload else plan.recompute * self.residual
        again = self.block_saved - self.residual if plan.recompute else 0  # its input is there already
        return fixed + inputs + max(self.logits, again + self.passing) + whole * self.block_saved + WORKSPACE


def choose(
    estimate: Estimate, budget: int, optimiser: str = "adamw", gpu: bool = True, settled: dict | None = None
) -> tuple[Plan, list[str]]:
    """The fastest plan that fits `budget` bytes, and the reasons, a line each. Without a GPU nothing can be moved away.
    `settled`: what an earlier plan of the same run chose and none may change, `Plan.settled`.

    Raises ValueError that names the floor where nothing fits.
    """
    plan, reasons = Plan(**{"optimiser": optimiser} | (settled or {})), []

    def gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"

    def fits() -> bool:
        return estimate.total(plan) <= budget

    plain = estimate.total(plan)
    if fits():
        if estimate.kept_block:
            spare = budget - plain
            keep = min(estimate.layers, int(spare // estimate.kept_block))
            if estimate.total(replace(plan, keep=estimate.layers)) <= budget:
                keep = estimate.layers  # then no scratch is needed
            plan = replace(plan, keep=keep)
            if keep:
                blocks, size = f"{keep} of {estimate.layers} blocks", gib(keep * estimate.kept_block)
                reasons.append(f"{blocks} keep their dequantised weights ({size}): there is room")
        return plan, reasons
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
    if optimiser == "adamw" and not settled:
        levers.append(("optimiser", "adamw8bit", "AdamW keeps its state in 8 bits"))
    if not estimate.tied and not settled:
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
    reasons.insert(0, f"{gib(plain)} would be needed to keep everything, {gib(budget)} may be used")
    return plan, reasons


def plan_for(
    config, shape: Shape, device: torch.device, budget: str | None = None, optimiser: str = "adamw",
    settled: dict | None = None, **options,
) -> tuple[Plan, list[str]]:  # fmt: skip
    """`choose` for a budget such as "6GiB", or for what is free on the device. `options` are Estimate's."""
    size = parse_bytes(budget) if budget else free_memory(device)
    return choose(Estimate(config, shape, **options), size, optimiser, device.type == "cuda", settled)


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


class Recompute:
    """Runs a block; the first `blocks` keep their input alone and are run again in backward.

    With `offload` the inputs wait in pinned memory: each is copied out while the next block computes, and copied back
    one block ahead of its use. Takes the place of `Llama.run_block`.
    """

    def __init__(self, model, blocks: int, offload: bool, shape: tuple[int, int], device: torch.device):
        self.index = {block: i for i, block in enumerate(model.layers[:blocks])}
        self.shape, self.host = shape, []
        if offload:
            self.stream = torch.cuda.Stream(device)
            self.host = [torch.empty(shape, pin_memory=True) for _ in range(blocks)]
            self.left = [torch.cuda.Event() for _ in range(blocks)]
            self.flying: dict[int, torch.Tensor] = {}  # inputs whose copy may still be under way
            self.arriving: dict[int, tuple] = {}

    def __call__(self, block, x, delta, *rest):
        number = self.index.get(block)
        if number is None or not torch.is_grad_enabled():
            return block(x, delta, *rest)
        x = x if delta is None else x + delta

        def run():
            return torch.utils.checkpoint.checkpoint(
                block, x, None, *rest, use_reentrant=False, preserve_rng_state=False
            )

        if not self.host or x.shape != self.shape:
            return run()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: self.send(number, t), self.fetch):
            return run()

    def send(self, number: int, x: torch.Tensor):
        if x.shape != self.shape or x.dtype != torch.float32:
            return x
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            self.host[number].copy_(x, non_blocking=True)
            self.left[number].record()
        if number:  # its memory may be used again once the copy before has left
            main.wait_event(self.left[number - 1])
        self.flying = {number: x}
        return number

    def bring(self, number: int) -> None:
        if number >= 0 and number not in self.arriving:
            x = torch.empty(self.shape, device=self.stream.device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                x.copy_(self.host[number], non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
            self.arriving[number] = x, arrived

    def fetch(self, packed):
        if torch.is_tensor(packed):
            return packed
        self.flying.clear()
        self.bring(packed)
        x, arrived = self.arriving.pop(packed)
        self.bring(packed - 1)
        torch.cuda.current_stream().wait_event(arrived)
        return x
