#!/usr/bin/env python3
"""Times the official PyTorch implementation of EDM2 on the machine that edm2k is measured on.

    git clone https://github.com/NVlabs/edm2        (licence: CC BY-NC-SA 4.0; nothing of it is in this project)
    python3 benches/peers/pytorch_edm2.py --edm2 edm2 [--json]
    edm2k bench --device cuda

The same work as `edm2k bench`: EDM2-XS conditioned on 1024 values, 64x88 latents; forward passes of batch 1, 2
and 8; a training step of two micro-batches of 40 images with forced weight normalisation and Adam. fp16,
channels_last. Modes:

    eager                forward passes as published; then the same as a CUDA graph
    prepared             with weights that are normalised once instead of each time, which is what edm2k does
    compile              through torch.compile; then as a CUDA graph
    compile-prepared     both
    decode               one decode of the latent by an SD-VAE of the published size, where diffusers is installed
    train                a training step as published
    train-blocks         with each block through torch.compile, one by one
    train-compile        with the whole network through it

    eager-bf16, prepared-bf16, decode-bf16    on a CPU, which otherwise computes in f32: the network as the official
                                              code runs it in fp16 on a GPU, but in bf16

On a CPU: batch 1 and 2, training at batch 1, no graphs, and by default nothing compiled. Times are medians of
repeated runs after three that warm up. Each mode is a process of its own, and each measurement, compilation
included, has a time limit; what fails or does not finish is reported and left out. Peak memory is the allocator's on
a GPU, of the process up to then on a CPU."""

import argparse
import json
import os
import queue
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time

# In order of what one wants to know first.
MODES = ["eager", "train", "compile-prepared", "train-blocks", "decode", "prepared", "compile", "train-compile"]
ON_CPU = ["eager", "prepared", "decode", "train"]
IN_BF16 = ["eager-bf16", "prepared-bf16", "decode-bf16"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edm2", required=True, help="checkout of the official code")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--only", help=f"modes, comma-separated, of {', '.join(MODES + IN_BF16)}")
    parser.add_argument("--size", default="64x88", help="width x height of the latent")
    parser.add_argument("--channels", type=int, default=128, help="model_channels; EDM2-XS has 128")
    parser.add_argument("--batch-gpu", type=int, default=40, help="images at a time in training")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120, help="seconds for each measurement (default: 120)")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.modes = options.only.split(",") if options.only else \
        MODES if on_gpu else [*ON_CPU, *IN_BF16]
    unknown = set(options.modes) - set(MODES if on_gpu else [*MODES, *IN_BF16])
    if unknown:
        parser.error(f"there is no mode {', '.join(sorted(unknown))}")
    return options


# ---- the process of one mode: says {"begin": what} and {"row": ...} in lines of JSON --------------------------------

def tell(**message):
    print(json.dumps(message), flush=True)


class Mode:
    def __init__(self, options):
        sys.path.insert(0, options.edm2)
        try:
            import torch
            from training.networks_edm2 import Precond
        except ImportError as e:
            tell(fatal=f"{e}; needed are PyTorch and, in {options.edm2}, a checkout of the official code")
            sys.exit(1)
        self.torch, self.precond, self.options = torch, Precond, options
        self.device = torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.kind = torch.float16 if self.on_gpu else torch.bfloat16 if "bf16" in options.child else torch.float32
        self.width, self.height = map(int, options.size.split("x"))
        torch.manual_seed(0)
        # What the official training script sets.
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        # Each batch size and each block is compiled for itself.
        torch._dynamo.config.automatic_dynamic_shapes = False
        for limit in ("cache_size_limit", "recompile_limit"):
            if hasattr(torch._dynamo.config, limit):
                setattr(torch._dynamo.config, limit, 256)
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        tell(torch=torch.__version__, device=name)

    def network(self):
        net = self.precond(img_resolution=64, img_channels=4, label_dim=1024, use_fp16=self.on_gpu, sigma_data=0.5,
                           model_channels=self.options.channels)
        return net.to(self.device).to(memory_format=self.torch.channels_last)

    def inputs(self, n):
        torch, device = self.torch, self.device
        x = torch.randn(n, 4, self.height, self.width, device=device).to(memory_format=torch.channels_last)
        return x, torch.ones(n, 1, 1, 1, device=device), torch.full((n, 1024), 0.03, device=device)

    def wait(self):
        if self.on_gpu:
            self.torch.cuda.synchronize(self.device)

    def measure(self, what, images, run):
        tell(begin=what)
        try:
            for _ in range(3):
                run()
            self.wait()
            tell(warm=what)
            times = []
            for _ in range(self.options.repeats):
                begun = time.perf_counter()
                run()
                self.wait()
                times.append(time.perf_counter() - begun)
        except Exception as e:  # noqa: BLE001  a mode that does not work on this machine is a result too
            tell(row={"what": what, "failed": f"{type(e).__name__}: {e}".splitlines()[0]})
            return
        median = statistics.median(times)
        peak = self.torch.cuda.max_memory_allocated(self.device) / 2**20 if self.on_gpu else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        tell(row={"what": what, "median_s": median, "fastest_s": min(times), "images_per_s": images / median,
                  "peak_mib": peak})

    def denoise(self, net, x, sigma, labels):
        """The official preconditioning around the U-Net in bf16, which the official code itself has not (EDM, eq. 7)."""
        if self.kind != self.torch.bfloat16:
            return net(x, sigma, labels)
        data, total = net.sigma_data, (sigma**2 + net.sigma_data**2).sqrt()
        f = net.unet((x / total).to(self.kind), sigma.flatten().log() / 4, labels)
        return (data / total) ** 2 * x + sigma * data / total * f.float()

    def prepared(self, net):
        """The network with weights normalised once, in the type that they are used in."""
        torch = self.torch

        def layer(module):
            w = module.weight.detach().float()
            fan_in = w[0].numel()
            w = w / (1e-4 + w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)) / fan_in**0.5) / fan_in**0.5
            if w.ndim == 2:  # the embedding, which the official code computes in f32
                return lambda x, gain=1: x @ (w if isinstance(gain, int) else w * gain).t()
            w = w.to(self.kind, memory_format=torch.channels_last)
            pad = w.shape[-1] // 2
            conv = torch.nn.functional.conv2d
            return lambda x, gain=1: conv(x, w if isinstance(gain, int) else w * gain, padding=pad)

        x, sigma, labels = self.inputs(1)
        plain = self.denoise(net, x, sigma, labels)
        for module in net.modules():
            if type(module).__name__ == "MPConv":
                module.forward = layer(module)
        error = ((self.denoise(net, x, sigma, labels) - plain).norm() / plain.norm()).item()
        if not error < (1e-5 if self.kind == torch.float32 else 1e-2):
            raise ValueError(f"prepared weights change the result by {error}")
        return net

    def forward(self, mode):
        torch = self.torch
        with torch.no_grad():
            net = self.network().eval().requires_grad_(False)
            # At zero, as they are before training, most weights would have no part in the result.
            for name, p in net.named_parameters():
                if name.endswith("gain"):
                    p.fill_(0.5)
            if "prepared" in mode:
                net = self.prepared(net)
            compiled = torch.compile(net) if "compile" in mode else net
            forward = lambda *inputs: self.denoise(compiled, *inputs)  # noqa: E731
            for n in (1, 2, 8) if self.on_gpu else (1, 2):
                x, sigma, labels = self.inputs(n)
                self.measure(f"forward, batch {n}, {mode}", n, lambda: forward(x, sigma, labels))
                if not self.on_gpu:
                    continue
                try:
                    side = torch.cuda.Stream(self.device)
                    side.wait_stream(torch.cuda.current_stream(self.device))
                    with torch.cuda.stream(side):
                        for _ in range(3):
                            forward(x, sigma, labels)
                    torch.cuda.current_stream(self.device).wait_stream(side)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        forward(x, sigma, labels)
                except Exception as e:  # noqa: BLE001
                    failed = f"no capture ({str(e).splitlines()[0][:80]})"
                    tell(row={"what": f"forward, batch {n}, {mode}, CUDA graph", "failed": failed})
                    continue
                self.measure(f"forward, batch {n}, {mode}, CUDA graph", n, graph.replay)

    def decode(self):
        torch, what = self.torch, f"SD-VAE decode, one image, eager, {self.kind}".replace("torch.", "")
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            tell(row={"what": what, "failed": "diffusers is not installed"})
            return
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        vae = vae.eval().requires_grad_(False).to(self.device, self.kind, memory_format=torch.channels_last)
        latent = self.inputs(1)[0].to(self.kind)
        with torch.no_grad():
            self.measure(what, 1, lambda: vae.decode(latent).sample)

    def train(self, mode):
        torch = self.torch
        net = self.network().train().requires_grad_(True)
        forward = net
        if mode == "train-compile":
            forward = torch.compile(net)
        elif mode == "train-blocks":
            for name, block in [*net.unet.enc.items(), *net.unet.dec.items()]:
                if "conv" not in name:
                    block.compile()
        adam = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
        n, rounds = (self.options.batch_gpu, 2) if self.on_gpu else (1, 1)
        x, sigma, labels = self.inputs(n)

        # EDM2's loss (eq. 14 and 15) at one noise level.
        def step():
            adam.zero_grad(set_to_none=True)
            for _ in range(rounds):
                denoised, logvar = forward(x, sigma, labels, return_logvar=True)
                weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
                loss = weight / logvar.exp() * (denoised - x) ** 2 + logvar
                loss.sum().mul(1 / (n * rounds)).backward()
            for p in net.parameters():
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
            adam.step()

        self.measure(f"training step, batch {n * rounds}, {mode}", n * rounds, step)

    def run(self, mode):
        if mode.startswith("decode"):
            self.decode()
        elif mode.startswith("train"):
            self.train(mode)
        else:
            self.forward(mode)


# ---- all modes ----------------------------------------------------------------------------------------------------

def messages(process):
    """What the process says, and None at its end."""
    said = queue.Queue()

    def read():
        for line in process.stdout:
            try:
                said.put(json.loads(line))
            except ValueError:
                print(line.rstrip(), file=sys.stderr)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    return said


def run_mode(mode, options, deadline, report):
    """Passes on what the process of a mode says; ends it when a measurement takes too long."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--child", mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    said, what, warm = messages(process), f"{mode}: start", True
    end = time.monotonic() + options.limit
    try:
        while True:
            left = min(end, deadline) - time.monotonic()
            try:
                message = said.get(timeout=max(left, 0))
            except queue.Empty:
                seconds = options.limit + min(0, deadline - end)
                doing = "" if warm or "compile" not in mode and mode != "train-blocks" else " compiling"
                report({"row": {"what": what, "failed": f"did not finish{doing} in {seconds:.0f} s"}})
                return
            if message is None:
                if process.wait() != 0:
                    report({"row": {"what": what, "failed": f"the process ended with {process.returncode}"}})
                return
            if "begin" in message:
                what, warm, end = message["begin"], False, time.monotonic() + options.limit
            elif "warm" in message:
                warm = True
            else:
                report(message)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main():
    options = parse()
    if options.child:
        mode = Mode(options)
        mode.run(options.child)
        return
    # Ended from outside, it ends its child too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("pytorch_edm2.py: ended"))
    deadline = time.monotonic() + options.total
    result, rows = {}, []

    def report(message):
        if "fatal" in message:
            sys.exit(f"pytorch_edm2.py: {message['fatal']}")
        if "row" not in message:
            if not result and not options.json:
                print(f"PyTorch {message['torch']}, {message['device']}, {options.size}")
            result.update(message)
            return
        row = message["row"]
        rows.append(row)
        if options.json:
            return
        if "failed" in row:
            print(f"{row['what']:<48} {row['failed'][:110]}", flush=True)
        else:
            print(f"{row['what']:<48} {row['median_s']:9.5f} s (fastest {row['fastest_s']:.5f}) "
                  f"{row['images_per_s']:9.2f} images/s  peak {row['peak_mib']:.0f} MiB", flush=True)

    for mode in options.modes:
        if time.monotonic() >= deadline:
            report({"row": {"what": mode, "failed": "not run: no time left"}})
        else:
            run_mode(mode, options, deadline, report)
    if options.json:
        width, height = map(int, options.size.split("x"))
        print(json.dumps({**result, "width": width, "height": height, "rows": rows}, indent=2))
    if all("failed" in row for row in rows):
        sys.exit("pytorch_edm2.py: nothing was measured")


main()
