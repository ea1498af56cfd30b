#!/usr/bin/env python3
"""Times the official PyTorch implementation of EDM2 on the machine that edm2k is measured on.

    git clone https://github.com/NVlabs/edm2        (licence: CC BY-NC-SA 4.0; nothing of it is in this project)
    python3 benches/peers/pytorch_edm2.py --edm2 edm2 [--json]
    edm2k bench --device cuda

The same work as `edm2k bench`: EDM2-XS conditioned on 1024 values, 64x88 latents; forward passes of batch 1, 2
and 8; a training step of two micro-batches of 40 images with forced weight normalisation and Adam. fp16,
channels_last; eagerly, through torch.compile, and (forward passes) as a CUDA graph. Times are medians of
repeated runs after three that warm up; a mode that fails is reported and left out. On a CPU: f32, batch 1 and 2,
training at batch 1, eagerly, and forward passes also with weights that are normalised once instead of each time
("prepared"), which is what edm2k does. Where diffusers is installed, one decode of the latent by an SD-VAE of the
published size too. Peak memory is the allocator's on a GPU, of the process up to then on a CPU."""

import argparse
import json
import resource
import statistics
import sys
import time


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edm2", required=True, help="checkout of the official code")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--size", default="64x88", help="width x height of the latent")
    parser.add_argument("--channels", type=int, default=128, help="model_channels; EDM2-XS has 128")
    parser.add_argument("--batch-gpu", type=int, default=40, help="images at a time in training")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def main():
    options = parse()
    sys.path.insert(0, options.edm2)
    import torch

    try:
        from training.networks_edm2 import Precond
    except ImportError as e:
        sys.exit(f"pytorch_edm2.py: {options.edm2}: not a checkout of the official code ({e})")

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    width, height = map(int, options.size.split("x"))
    torch.manual_seed(0)
    # What the official training script sets.
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def network():
        net = Precond(img_resolution=64, img_channels=4, label_dim=1024, use_fp16=on_gpu, sigma_data=0.5,
                      model_channels=options.channels)
        return net.to(device).to(memory_format=torch.channels_last)

    def inputs(n):
        x = torch.randn(n, 4, height, width, device=device).to(memory_format=torch.channels_last)
        return x, torch.ones(n, 1, 1, 1, device=device), torch.full((n, 1024), 0.03, device=device)

    def wait():
        if on_gpu:
            torch.cuda.synchronize(device)

    rows = []

    def measure(what, images, run):
        try:
            for _ in range(3):
                run()
            wait()
            times = []
            for _ in range(options.repeats):
                begun = time.perf_counter()
                run()
                wait()
                times.append(time.perf_counter() - begun)
        except Exception as e:  # noqa: BLE001  a mode that does not work on this machine is a result too
            rows.append({"what": what, "failed": f"{type(e).__name__}: {e}".splitlines()[0]})
            print(f"{what:<44} failed: {rows[-1]['failed'][:100]}", file=sys.stderr)
            return
        median = statistics.median(times)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        rows.append({"what": what, "median_s": median, "fastest_s": min(times), "images_per_s": images / median,
                     "peak_mib": peak})
        if not options.json:
            print(f"{what:<44} {median:9.5f} s  {images / median:9.2f} images/s  peak {peak:.0f} MiB", flush=True)

    def prepared(net):
        def layer(module):
            w = module.weight.detach().float()
            fan_in = w[0].numel()
            w = w / (1e-4 + w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1)) / fan_in**0.5) / fan_in**0.5
            if w.ndim == 2:
                return lambda x, gain=1: x @ (w * gain).t()
            w = w.to(memory_format=torch.channels_last)
            return lambda x, gain=1: torch.nn.functional.conv2d(x, w * gain, padding=w.shape[-1] // 2)

        for module in net.modules():
            if type(module).__name__ == "MPConv":
                module.forward = layer(module)
        return net

    modes = ["eager", "compile"] if on_gpu else ["eager"]
    for mode in modes if on_gpu else ["eager", "prepared"]:
        net = network().eval().requires_grad_(False)
        if mode == "prepared":
            x, sigma, labels = inputs(1)
            plain = net(x, sigma, labels)
            error = (prepared(net)(x, sigma, labels) - plain).norm() / plain.norm()
            assert error < 1e-5, f"prepared weights change the result by {error}"
        forward = torch.compile(net) if mode == "compile" else net
        for n in (1, 2, 8) if on_gpu else (1, 2):
            x, sigma, labels = inputs(n)
            with torch.inference_mode():
                measure(f"forward, batch {n}, {mode}", n, lambda: forward(x, sigma, labels))
        for n in (1, 2, 8) if on_gpu else ():
            x, sigma, labels = inputs(n)
            try:
                with torch.no_grad():
                    side = torch.cuda.Stream(device)
                    with torch.cuda.stream(side):
                        for _ in range(3):
                            forward(x, sigma, labels)
                    torch.cuda.current_stream(device).wait_stream(side)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        forward(x, sigma, labels)
                measure(f"forward, batch {n}, {mode}, CUDA graph", n, graph.replay)
            except Exception as e:  # noqa: BLE001
                print(f"forward, batch {n}, {mode}, CUDA graph: no capture ({str(e).splitlines()[0][:80]})", file=sys.stderr)
        del net, forward

    try:
        from diffusers import AutoencoderKL
    except ImportError:
        print("SD-VAE decode: diffusers is not installed", file=sys.stderr)
    else:
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        kind = torch.float16 if on_gpu else torch.float32
        vae = vae.eval().requires_grad_(False).to(device, kind, memory_format=torch.channels_last)
        latent = inputs(1)[0].to(kind)
        with torch.inference_mode():
            measure("SD-VAE decode, one image, eager", 1, lambda: vae.decode(latent).sample)
        del vae

    for mode in modes:
        net = network().train().requires_grad_(True)
        forward = torch.compile(net) if mode == "compile" else net
        adam = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
        n, rounds = (options.batch_gpu, 2) if on_gpu else (1, 1)
        x, sigma, labels = inputs(n)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)

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

        measure(f"training step, batch {n * rounds}, {mode}", n * rounds, step)
        del net, forward, adam

    if options.json:
        name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
        print(json.dumps({"torch": torch.__version__, "device": name, "width": width, "height": height, "rows": rows}, indent=2))


main()
