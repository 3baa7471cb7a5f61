"""The quantised linear of QLoRA, by hand: y = x W^T + b + scaling (x_lora A^T) B^T, with W frozen and stored in 4 bits.

    python -m pytest tests/quant/test_linear.py      # against the dequantised linear in float64, forward and backward

N is all tokens of a batch laid end to end, O and I are what goes out and in, R the rank of LoRA.

What is stored.   W (O, I) lies in memory as NF4 (quant/nf4.py): half a byte a weight plus one absmax for each 64.
                  It is never trained, so it has no gradient and no optimiser state. A (R, I) and B (O, R) are the
                  LoRA factors (lora/layer.py), float32, and the only things that learn.

What is computed. No arithmetic happens in 4 bits. Each time the layer runs, W is dequantised into a scratch matrix
                  in the dtype of x (bfloat16 or float32), multiplied, and dropped:

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

With `--bits 8` W is stored as int8, and y = x W^T is LLM.int8(): see quant/int8.py. x becomes int8 too, its outlier
columns apart. Rounding has no derivative, so backward is that of the 16-bit product, dL/dx = g W with the dequantised
W, as in bitsandbytes.

In bitsandbytes the same is `bnb.nn.Linear4bit` and `MatMul4Bit` in autograd/_functions.py; there, quantising is a side
effect of `.to(device)`. Here it is an explicit call, quant/quantise.py, and `.to()` only moves.
"""

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn


class FrozenLinearFunction(torch.autograd.Function):
    """y = x W^T + b + scaling (x_lora A^T) B^T; see the top of this file for each line of backward.

    x, x_lora (N, I) in the compute dtype; A (R, I), B (O, R) or both None -> y (N, O).
    """

    @staticmethod
    def forward(ctx, x, x_lora, lora_A, lora_B, scaling, linear):
        y = linear.multiply(x)  # (N, O)
        ctx.linear, ctx.scaling = linear, scaling
        if lora_A is not None:
            # float32 parameters, multiplied in the compute dtype
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
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
