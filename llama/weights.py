"""Fill a Llama from safetensors, one tensor at a time, strictly.

The model is built on the `meta` device (shapes without memory). Each linear of a block is read from its shard, moved,
handed to `make_linear` (which may quantise it) and dropped before the next one is read: the peak is the quantised
model plus one matrix, so an 8B model is never whole in 16 bits. Before anything is read, names and shapes are
compared with what the model needs.
"""

from pathlib import Path
from typing import Callable, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.shards import weight_map
from llama.model import Llama

MakeLinear = Callable[[Tensor, Tensor | None], nn.Module]  # (O, I) weight, (O,) bias or None -> a layer
# Phi-3's files hold one matrix where we have several: q, k, v one below the other, and gate above up. They are split,
# so that LoRA's names are the field's; lora/phi3.py joins them again for PEFT.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FLOATS = {"F32", "F16", "BF16"}


class Checkpoint:
    """The tensors of a directory by our own names, whichever shard each lies in.

    Raises ValueError, in one line that names the file, where the index or a shard is missing or damaged.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.shards = {}  # file name -> open shard
        self.files: dict[str, str] = {}  # our name -> file name
        self.keys: dict[str, str] = {}  # our name -> name in the file
        self.rows: dict[str, tuple[int, int, int]] = {}  # our name -> its rows of a fused matrix, first, end, of all
        for key, file in weight_map(directory).items():
            name = key.removeprefix("model.")
            if name.endswith("rotary_emb.inv_freq"):
                continue  # old Llama 2 files carry the rope table; rope.py computes it
            self.files[name], self.keys[name] = file, key

    def _open(self, file: str):
        if file not in self.shards:
            path = self.directory / file
            if not path.is_file():
                raise ValueError(f"shard {path} is missing, though the index lists it; download it again")
            try:
                self.shards[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"shard {path} is truncated or damaged ({error}); download it again") from None
        return self.shards[file]

    def _slice(self, name: str):
        try:
            return self._open(self.files[name]).get_slice(self.keys[name])
        except SafetensorError:
            raise ValueError(
                f"{self.directory / self.files[name]} lacks {self.keys[name]}, though the index lists it"
            ) from None

    def split_fused(self, expected: dict[str, torch.Size]) -> None:
        """Let the names of the parts stand for rows of Phi-3's fused matrices."""
        for fused in list(self.files):
            parent, _, kind = fused.removesuffix(".weight").rpartition(".")
            parts = [f"{parent}.{part}.weight" for part in FUSED.get(kind, ())]
            if not parts or not all(part in expected for part in parts):
                continue  # `check` names what belongs to nothing
            file, key, start = self.files.pop(fused), self.keys.pop(fused), 0
            for part in parts:
                stop = start + expected[part][0]
                self.files[part], self.keys[part] = file, key
                self.rows[part] = start, stop, sum(expected[p][0] for p in parts)
                start = stop

    def check(self, expected: dict[str, torch.Size], tied: bool) -> None:
        """Raises ValueError unless all expected tensors are there, in their shapes and a float dtype, and no others."""
        missing = [name for name in expected if name not in self.files]
        unexpected = [name for name in self.files if name not in expected and not (tied and name == "lm_head.weight")]
        for names, what in ((missing, "lacks"), (unexpected, "holds the unknown tensor")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(
                    f"{self.directory} {what} {names[0]}{more}: weights and config.json do not belong together"
                )
        for name, shape in expected.items():
            part = self._slice(name)
            if name in self.rows:
                shape = (self.rows[name][2], *shape[1:])
            if tuple(part.get_shape()) != tuple(shape):
                named = self.keys[name].removeprefix("model.")
                raise ValueError(
                    f"{self.directory}: {named} is {tuple(part.get_shape())}, config.json asks for {tuple(shape)}"
                )
            if part.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{self.directory}: {name} has dtype {part.get_dtype()}, expected one of {sorted(FLOATS)}"
                )
        if tied and "lm_head.weight" in self.files:
            head, embedding = (self.read(name, "cpu") for name in ("lm_head.weight", "embed_tokens.weight"))
            if head.dtype != embedding.dtype or not torch.equal(head, embedding):
                raise ValueError(
                    f"{self.directory}: lm_head.weight differs from embed_tokens.weight, which config.json ties "
                    "(tie_word_embeddings)"
                )

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One tensor on the device, in the file's dtype. Raises ValueError that names a tensor with NaN or infinity."""
        if name in self.rows:
            start, stop, _ = self.rows[name]
            tensor = self._slice(name)[start:stop].to(device)
        else:
            tensor = self._open(self.files[name]).get_tensor(self.keys[name]).to(device)
        # In parts: the masks of a whole Llama 3 head would take 2 GiB, more than anything else while loading.
        if not all(torch.isfinite(part).all() for part in tensor.view(-1).split(1 << 24)):
            raise ValueError(f"{self.directory / self.files[name]}: {name} holds NaN or infinity")
        return tensor


def load_weights(
    model: Llama,
    directory: str | Path,
    device: torch.device | str,
    make_linear: MakeLinear,
    on_host: Sequence[str] = (),
    progress: Callable = lambda names: names,
) -> None:
    """Fill `model` (on `meta`) from `directory`. Embedding and head in the compute dtype, norms in float32.

    Every linear inside the blocks is replaced by `make_linear(weight, bias)`, the weight in the file's dtype. Tensors
    named in `on_host` stay on the CPU. `progress` wraps the list of linears, for a bar. Raises ValueError that names
    the tensor or the file.
    """
    checkpoint = Checkpoint(directory)
    expected = {name: p.shape for name, p in model.named_parameters()}
    if model.config.fused_projections:
        checkpoint.split_fused(expected)
    checkpoint.check(expected, model.config.tie_word_embeddings)
    linears = [name for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)]
    for name in progress(linears):
        parent, _, child = f"layers.{name}".rpartition(".")
        old = model.get_submodule(f"layers.{name}")
        weight = checkpoint.read(f"layers.{name}.weight", device)  # (O, I)
        bias = None if old.bias is None else checkpoint.read(f"layers.{name}.bias", device)
        setattr(model.get_submodule(parent), child, make_linear(weight, bias))
    for name, parameter in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        dtype = torch.float32 if parameter.ndim == 1 else model.compute_dtype  # norms are vectors
        tensor = checkpoint.read(name, "cpu" if name in on_host else device).to(dtype)
        if model.config.norm_offset and parameter.ndim == 1:
            tensor = tensor + 1  # in float32: bfloat16 would lose a small weight beside the 1
        if tensor.device.type == "cpu":
            tensor = tensor.clone()  # safetensors' tensors are views of the mapped file: one kept view keeps all of it
        setattr(model.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=False))
    model.frequency = model.frequency.to(device)
