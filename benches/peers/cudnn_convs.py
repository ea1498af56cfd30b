#!/usr/bin/env python3
"""Times cuDNN, through PyTorch, on the convolutions that `edm2k bench --device cuda --kernels` times.

    python3 benches/peers/cudnn_convs.py [--json]

The 3x3 and 1x1 convolutions of EDM2-XS at 64x88 latents: at batch 40 forward and both gradients, at batch 1 and 2
forward. fp16, channels_last, the algorithm that cuDNN finds fastest. Each time is the median of runs with a cold
cache: before each, memory larger than the card's L2 is written. The dearest shapes come first. What edm2k's kernels
do beside the product (mp_silu, mp_sum, clip, the halves of a concatenation) is not in these times. On a CPU, f32: to
try the script."""

import argparse
import json
import statistics
import sys
import time
from collections import Counter


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--size", default="64x88", help="width x height of the latent")
    parser.add_argument("--channels", type=int, default=128, help="model_channels; EDM2-XS has 128")
    parser.add_argument("--batch", type=int, default=40, help="images at a time in training")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no other shape is begun")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def convolutions(channels, width, height):
    """How often the network has each (height, width, cin, cout, side of the kernel)."""
    levels = [(channels * (i + 1), height >> i, width >> i) for i in range(4)]
    blocks, attention, found = 3, (2, 3), Counter()

    def block(level, cin, cout, decoder, attends):
        _, h, w = levels[level]
        found[h, w, cin if decoder else cout, cout, 3] += 1
        found[h, w, cout, cout, 3] += 1
        if cin != cout:
            found[h, w, cin, cout, 1] += 1
        if attends:
            found[h, w, cout, 3 * cout, 1] += 1
            found[h, w, cout, cout, 1] += 1
        return cout

    _, h, w = levels[0]
    found[h, w, 5, channels, 3] += 1
    c, skips = channels, [channels]
    for level, (cout, _, _) in enumerate(levels):
        if level > 0:
            skips.append(block(level, c, c, False, False))
        for _ in range(blocks):
            c = block(level, c, cout, False, level in attention)
            skips.append(c)
    for level, (cout, _, _) in reversed(list(enumerate(levels))):
        if level == len(levels) - 1:
            block(level, c, c, True, True)
        block(level, c, c, True, False)
        for _ in range(blocks + 1):
            c = block(level, c + skips.pop(), cout, True, level in attention)
    found[h, w, c, 4, 3] += 1
    return found


def main():
    options = parse()
    try:
        import torch
    except ImportError as e:
        sys.exit(f"cudnn_convs.py: {e}")
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("cudnn_convs.py: PyTorch finds no GPU (--device cpu tries the script)")
    begun = time.perf_counter()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    kind = torch.float16 if on_gpu else torch.float32
    width, height = map(int, options.size.split("x"))
    large = torch.empty((128 if on_gpu else 1) << 20, dtype=torch.uint8, device=device)

    def seconds(run):
        for _ in range(3):
            run()
        times = []
        for _ in range(options.repeats):
            large.zero_()
            if on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e-3)
            else:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=kind).to(memory_format=torch.channels_last)

    def row(n, shape, count, directions):
        h, w, cin, cout, side = shape
        x, y = random(n, cin, h, w), random(n, cout, h, w)
        weight = random(cout, cin, side, side) / (cin * side * side) ** 0.5
        pad = [side // 2] * 2

        def backward(*which):
            return torch.ops.aten.convolution_backward(y, x, weight, None, [1, 1], pad, [1, 1], False, [0, 0], 1, which)

        runs = {"fprop": lambda: torch.nn.functional.conv2d(x, weight, padding=pad),
                "dgrad": lambda: backward(True, False, False), "wgrad": lambda: backward(False, True, False)}
        work = 2.0 * n * h * w * cin * cout * side * side
        times = {name: seconds(runs[name]) for name in directions}
        return {"batch": n, "height": h, "width": w, "cin": cin, "cout": cout, "kernel": side, "count": count,
                **{f"{name}_s": t for name, t in times.items()},
                **{f"{name}_tflop_per_s": work / t * 1e-12 for name, t in times.items()}}

    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    cudnn = torch.backends.cudnn.version() if on_gpu else None
    rows, left_out = [], 0
    if not options.json:
        print(f"PyTorch {torch.__version__}, cuDNN {cudnn}, {name}, {options.size}")
        columns = "".join(f"{d + ' us':>10} TFLOP/s" for d in ("fprop", "dgrad", "wgrad"))
        print(f"{'':4} batch {'result':>10} {'channels':>12} count  {columns}")
    found = convolutions(options.channels, width, height)
    dearest = sorted(found, key=lambda s: -found[s] * s[0] * s[1] * s[2] * s[3] * s[4] ** 2)
    for n, directions in ((options.batch, ("fprop", "dgrad", "wgrad")), (1, ("fprop",)), (2, ("fprop",))):
        for shape in dearest:
            if time.perf_counter() - begun > options.limit:
                left_out += 1
                continue
            # Nothing asks for the gradient of the first convolution's input.
            wanted = [d for d in directions if not (d == "dgrad" and shape[2] == 5)]
            r = row(n, shape, found[shape], wanted)
            rows.append(r)
            if not options.json:
                timed = "".join(f"{r[d + '_s'] * 1e6:10.1f} {r[d + '_tflop_per_s']:7.1f}" if d in wanted else " " * 18
                                for d in ("fprop", "dgrad", "wgrad"))
                size, channels = f"{r['width']}x{r['height']}", f"{r['cin']}->{r['cout']}"
                print(f"{r['kernel']}x{r['kernel']:<2} {n:5} {size:>10} {channels:>12} {r['count']:5}  {timed}", flush=True)
    side = 8192 if on_gpu else 64
    m = torch.randn(side, side, device=device, dtype=kind)
    product = 2.0 * side**3 / seconds(lambda: m @ m) * 1e-12
    if options.json:
        print(json.dumps({"torch": torch.__version__, "cudnn": cudnn, "device": name, "width": width,
                          "height": height, "rows": rows, "matmul_tflop_per_s": product, "left_out": left_out}, indent=2))
    else:
        print(f"product of {side} x {side}: {product:.1f} TFLOP/s")
        if left_out:
            print(f"{left_out} shapes left out: no time")


main()
