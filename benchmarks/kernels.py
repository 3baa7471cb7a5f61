"""What the GPU can do, and what the kernels reach: NF4 dequantisation against copy speed, products against the peak,
LLM.int8() against the 16-bit product.

    python -m benchmarks.kernels --json kernels.json

Each row is the median of several replays of a CUDA graph of calls on one buffer: the GPU's time, without launches.
Copy speed counts bytes read plus bytes written.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from fast.int8 import JoinedInt8
from fast.nf4 import JoinedNF4
from pricing.evaluation.console import table
from quant.int8 import integer_product
from quant.linear import LinearNF4
from quant.quantise import quantise_linear

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}  # of an 8B


def microseconds(call, calls: int = 20, repeats: int = 5) -> float:
    """Of one call, on the GPU"""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(), call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2304, help="rows of the activations")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark measures CUDA kernels; it needs a GPU")
    big, other = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in "ab")
    copy = 2 * big.nbytes / microseconds(lambda: other.copy_(big), 5) / 1e6  # TB/s
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    peak = 2 * 8192**3 / microseconds(lambda: a @ b, 5) / 1e6  # TFLOP/s
    figures = {"gpu": torch.cuda.get_device_name(), "copy_tb_s": copy, "matmul_tflop_s": peak, "tokens": args.tokens}
    rows, rows8 = [], []
    for name, (out_features, in_features) in SHAPES.items():
        linear = LinearNF4(torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02)
        packed = JoinedNF4([linear])
        weight = torch.empty(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        x, g = (torch.randn(args.tokens, n, device="cuda", dtype=torch.bfloat16) for n in (in_features, out_features))
        moved = linear.stored_bytes() + weight.nbytes
        ours, theirs = (
            microseconds(call)
            for call in (lambda: packed.dequantise_into(weight), lambda: linear.dequantise(torch.bfloat16))
        )
        forward, backward = microseconds(lambda: x @ weight.T), microseconds(lambda: g @ weight)
        work = 2 * args.tokens * out_features * in_features
        figures[name] = {
            "dequantise_us": ours, "bitsandbytes_us": theirs, "forward_us": forward, "backward_us": backward
        }  # fmt: skip
        rows.append([
            f"{name} {out_features} x {in_features}",
            f"{ours:.1f}", f"{moved / ours / 1e6 / copy:.0%}",
            f"{theirs:.1f}", f"{moved / theirs / 1e6 / copy:.0%}",
            f"{forward:.0f}", f"{work / forward / 1e6 / peak:.0%}",
            f"{backward:.0f}", f"{work / backward / 1e6 / peak:.0%}",
        ])  # fmt: skip
        int8 = JoinedInt8([quantise_linear(weight.normal_(std=0.02), bits=8)], True)
        codes = torch.ones(args.tokens, in_features, dtype=torch.int8, device="cuda")
        calls = (lambda: int8.dequantise_into(weight), lambda: integer_product(codes, int8.weight))
        times = [microseconds(call) for call in calls]
        for share in (0, 0.001, 0.05, 0.3):  # of columns that are outliers, evenly spread
            x.normal_().clamp_(-4, 4)
            if share:
                x[0, :: round(1 / share)] = 10
            times.append(microseconds(lambda: int8.multiply(x)))
        figures[name]["int8_us"] = times
        rows8.append([rows[-1][0], *(f"{time:.0f}" for time in times), f"{forward:.0f}"])
    print(f"{figures['gpu']}: copies at {copy:.2f} TB/s, 8192 x 8192 x 8192 in bfloat16 at {peak:.0f} TFLOP/s")
    header = ["weight", "dequantise us", "of copy", "bitsandbytes us", "of copy"]
    header += ["x W^T us", "of peak", "g W us", "of peak"]
    print(table(header, rows))
    header = ["int8 weight", "dequantise us", "product us", "LLM.int8() us", "0.1 % outliers", "5 %", "30 %", "16 bits"]
    print(table(header, rows8))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
