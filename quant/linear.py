"""The quantised linear of QLoRA, by hand: y = x W^T + b + scaling (x_lora A^T) B^T, with W frozen and stored in 4 bits.

    python -m pytest tests/test_linear.py      # against the dequantised linear in float64, forward and backward

N is all tokens of a batch laid end to end, O and I are what goes out and in, R the rank of LoRA.

What is stored.   W (O, I) lies in memory as NF4 (quant/nf4.py): half a byte a weight plus one absmax for each 64.
                  It is never trained, so it has no gradient and no optimiser state. A (R, I) and B (O, R) are the
                  LoRA factors (lora/layer.py), float32, and the only things that learn.

What is computed. No arithmetic happens in 4 bits. Each time the layer runs, W is dequantised into a scratch matrix
                  in the dtype of x (bfloat16), multiplied, and dropped:

                      W = dequantise(packed)                        (O, I)
                      y = x W^T + b                                 (N, O)   the frozen model
                        + scaling * (x_lora A^T) B^T                (N, O)   what is learnt, rank R << I

                  x_lora is x itself, or x after dropout: only the LoRA branch sees dropout. They are two arguments of
                  one origin, and autograd adds their two gradients. W is frozen, yet dL/dx is needed: the LoRA
                  factors of earlier layers learn from it.

What backward needs. With g = dL/dy (N, O) the chain rule gives

                      dL/dx      = g W                              needs W: dequantised again, not kept
                      dL/dx_lora = scaling * (g B) A
                      dL/dB      = scaling * g^T (x_lora A^T)       (O, R)
                      dL/dA      = scaling * (g B)^T x_lora         (R, I)
                      dL/dW                                         not needed: W is frozen

                  A plain `F.linear(x, dequantise(packed))` would let autograd keep the 16-bit W of every layer until
                  backward: the whole model in 16 bits, and the memory that 4 bits saved is gone. So the function below
                  saves x_lora, z = x_lora A^T (N, R) and the small factors, and keeps a reference to the layer, whose
                  packed W it dequantises a second time: that is the price. For W's sake x need not be saved at all;
                  only the LoRA branch asks for it. W is no argument of the function but a buffer reached through the
                  layer, so autograd cannot even try to form dL/dW.

With `--bits 8` W is stored as int8, and y = x W^T is LLM.int8(): see quant/int8.py, and `LinearInt8` below. x becomes
int8 too, its outlier columns apart. Rounding has no derivative, so backward is that of the 16-bit product, dL/dx = g W
with the dequantised W, as in bitsandbytes.

In bitsandbytes the same is `bnb.nn.Linear4bit` and `MatMul4Bit` in autograd/_functions.py; there, quantising is a side
effect of `.to(device)`. Here it is an explicit call, `quantise_linear`, and `.to()` only moves.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# On CPUs with avx512_bf16, bitsandbytes logs that an optional kernel package is missing, at import; it is not
# used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes.functional as bnb  # noqa: E402

from quant import int8  # noqa: E402

BITS = (4, 8, 16)  # what `quantise_linear` and `train.py --bits` take


class FrozenLinearFunction(torch.autograd.Function):
    """y = x W^T + b + scaling (x_lora A^T) B^T; see the top of this file for each line of backward.

    x, x_lora (N, I) in the compute dtype; A (R, I), B (O, R) or both None -> y (N, O).
    """

    @staticmethod
    def forward(ctx, x, x_lora, lora_A, lora_B, scaling, linear):
        y = linear.multiply(x)  # (N, O)
        ctx.linear, ctx.scaling = linear, scaling
        if lora_A is not None:
            lora_A, lora_B = (
                lora_A.to(x.dtype),
                lora_B.to(x.dtype),
            )  # float32 parameters, multiplied in the compute dtype
            z = x_lora @ lora_A.T  # (N, R)
            y.addmm_(z, lora_B.T, alpha=scaling)
            ctx.save_for_backward(x_lora, z, lora_A, lora_B)
        return y

    @staticmethod
    def backward(ctx, g):
        grad_x = grad_x_lora = grad_A = grad_B = None
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second reading is an error
        if ctx.needs_input_grad[0]:
            grad_x = g @ ctx.linear.dequantise(g.dtype)  # (N, I)
        if saved:  # LoRA was given
            x_lora, z, lora_A, lora_B = saved
            grad_z = ctx.scaling * (g @ lora_B)  # (N, R)
            grad_B = ctx.scaling * (g.T @ z)  # (O, R)
            grad_A = grad_z.T @ x_lora  # (R, I)
            if ctx.needs_input_grad[1]:
                grad_x_lora = grad_z @ lora_A  # (N, I)
            grad_A, grad_B = grad_A.float(), grad_B.float()
        return grad_x, grad_x_lora, grad_A, grad_B, None, None


class FrozenLinear(nn.Module):
    """A linear layer whose weight (O, I) never learns. Subclasses say how it is stored; `dequantise` gives it back."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", bias)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`  # (O, I)"""
        raise NotImplementedError(f"{type(self).__name__} does not say how its weight is stored")

    def stored_bytes(self) -> int:
        """Bytes held for the weight and the bias, absmax and code included."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its weight is stored")

    def multiply(self, x: Tensor) -> Tensor:
        """The frozen part, y = x W^T + b, in the dtype of x.  (N, I) -> (N, O)"""
        return torch.nn.functional.linear(x, self.dequantise(x.dtype), self.bias_in(x.dtype))

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor, x_lora=None, lora_A=None, lora_B=None, scaling: float = 0.0) -> Tensor:
        """(N, I) -> (N, O); with the LoRA arguments, the low-rank product is added."""
        return FrozenLinearFunction.apply(x, x_lora, lora_A, lora_B, scaling, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Linear16(FrozenLinear):
    """The unquantised sibling (`--bits 16`): the weight as it was given, bfloat16 or float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(*weight.shape, bias)
        self.register_buffer("weight", weight)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)  # no copy where the dtype is already right

    def stored_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers())


class LinearNF4(FrozenLinear):
    """The 4-bit linear: `packed` (ceil(O * I / 2), 1) uint8, and the rest in bitsandbytes' QuantState.

    quant/nf4.py's names in QuantState: NF4_CODE is `code`, absmax and offset keep theirs, absmax_absmax is
    `state2.absmax`, dynamic_map() is `state2.code`, and `nested` means double quantisation. None of it is ever saved:
    a base model is quantised again from its files.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, blocksize: int = 64, double_quant: bool = True):
        super().__init__(*weight.shape, bias)
        packed, self.state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
        )
        self.register_buffer("packed", packed)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        self.state.dtype = dtype  # the dtype of the result; code * absmax is float32 inside
        return bnb.dequantize_4bit(self.packed, self.state)  # (O, I)

    def stored_bytes(self) -> int:
        state, tensors = self.state, list(self.buffers()) + [self.state.absmax]
        if state.nested:
            tensors += [state.offset, state.state2.absmax]
        return sum(t.nbytes for t in tensors)  # the two code tables are shared by every layer

    def _apply(self, fn, recurse=True):
        # `.to(device)` must take the QuantState along; it is no module, so nn.Module does not know it.
        super()._apply(fn, recurse)
        self.state.to(self.packed.device)
        return self


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes weight^T in int32, exact.  (N, I) int8, (O, I) int8 -> (N, O) int32"""
    outputs, odd_o, odd_i = len(weight), -len(weight) % 4, -weight.shape[1] % 4
    if weight.is_cuda and (odd_o or odd_i):  # cuBLASLt multiplies int8 in fours
        codes = pad(codes, (0, odd_i))
        weight = pad(weight, (0, odd_i, 0, odd_o))
    return bnb.int8_linear_matmul(codes, weight)[:, :outputs]


class LinearInt8(FrozenLinear):
    """The 8-bit linear, LLM.int8(): `weight` (O, I) int8 codes, `scale` (O,) float32, both from quant.int8.quantise.

    Columns of x with any |x| >= `threshold` are multiplied in the dtype of x; 0 for none.
    Raises ValueError for other dtypes, here or of x, and for a threshold below 0.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None, threshold: float = 6.0):
        super().__init__(*weight.shape, bias)
        if (weight.dtype, scale.dtype) != (torch.int8, torch.float32):
            raise ValueError(f"an int8 linear needs int8 codes and a float32 scale, got {weight.dtype}, {scale.dtype}")
        if not threshold >= 0:
            raise ValueError(f"the outlier threshold must be 0 (none) or greater, got {threshold}")
        self.threshold = threshold or float("inf")
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def check(self, x: Tensor) -> None:
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"an int8 linear computes in bfloat16 or float32, got {x.dtype}")

    def multiply(self, x: Tensor) -> Tensor:
        self.check(x)
        codes, scale, outliers = int8.quantise(x, self.threshold)  # (N, I), (N,), (K,)
        y = integer_product(codes, self.weight)  # (N, O) int32
        y = (y * scale[:, None]).mul_(self.scale)  # float32
        if self.bias is not None:
            y += self.bias_in(x.dtype)
        y = y.to(x.dtype)
        if k := len(outliers):
            weight = int8.dequantise(self.weight[:, outliers], self.scale, x.dtype)  # (O, K)
            # oneDNN keeps a kernel of about a MiB for every K that it meets, a thousand of them: zeros make few of many
            rest = (0, (1 << (k - 1).bit_length()) - k)
            y.addmm_(pad(x[:, outliers], rest), pad(weight, rest).T)
        return y

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return int8.dequantise(self.weight, self.scale, dtype)  # (O, I)

    def stored_bytes(self) -> int:
        return sum(b.nbytes for b in self.buffers())

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)  # `.to(torch.bfloat16)` must not round it
        return self


def quantise_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    double_quant: bool = True,
    outlier_threshold: float = 6.0,
) -> FrozenLinear:
    """The one place where a linear is quantised: (O, I) float -> a FrozenLinear on the same device.

    `bits` 4: NF4 of the weight as given; 8: int8, a scale a row; 16: no quantisation, kept in `dtype`. `blocksize` and
    `double_quant` are for 4 bits, `outlier_threshold` for 8.
    Raises ValueError for other `bits` and for a weight with NaN or infinity.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    if bits == 8:
        return LinearInt8(*int8.quantise_weight(weight, weight.device), bias, outlier_threshold)
    return Linear16(weight.to(dtype), bias) if bits == 16 else LinearNF4(weight, bias, blocksize, double_quant)
