#!/usr/bin/env python3
"""Makes golden numbers with the official implementation of EDM2, for `edm2k verify DIRECTORY`.

    git clone https://github.com/NVlabs/edm2        (licence: CC BY-NC-SA 4.0; nothing of it is in this project)
    python3 scripts/golden.py --edm2 edm2 --preset 1girl-xs --out golden-xs
    edm2k verify golden-xs --device cuda --precision bf16

A directory of the layout that tests/golden/README.md describes: a network with random parameters whose rows are not
normalised, evaluations of it (tiny_forward), a training pass (tiny_grads), training steps and the first of them in
two micro-batches (tiny_train_*). All of that is the official code's float32.

Beside each number, in tolerances.json, stands what rounding does to the official code on the same draw: `rel_l2`, how
far its float32 run is from the same in float64, and `f16` and `bf16`, how far its 16-bit runs are from float32, as
|difference| / |float32| in the L2 norm. One run is one draw of the rounding, which says little of a sum with
cancellation. So the 16-bit runs are repeated (`official.draws`) with an input that is rounded up or down at random
instead of to the nearest, which makes all that follow another draw, and the root mean square is stored. The official
code has no bf16; it is run as its fp16 is. Gradients of activations are those of the sum of the loss, as if its
option --ls were the batch: with less, fp16 loses gradients below its smallest number and the bounds would be loose.
The weights and averages of training steps have no 16-bit entry: Adam's first steps are the signs of gradients, and
rounding decides those near zero.

`--again DIRECTORY` computes tolerances.json anew for a directory that exists, from the inputs in it; what it does not
compute stays as it is. Needs PyTorch, safetensors and what the official code imports; runs on a GPU or, where the
network is small, on a CPU."""

import argparse
import contextlib
import json
import math
import pathlib
import sys

FORWARD, GRADS, ACCUM = "tiny_forward.safetensors", "tiny_grads.safetensors", "tiny_train_accum.safetensors"
MODEL, INIT, TRAIN = "tiny_model.safetensors", "tiny_train_init.safetensors", "tiny_train.json"
WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edm2", required=True, type=pathlib.Path, help="checkout of the official code")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=["1girl-xs", *(f"edm2-img512-{size}" for size in WIDTHS)])
    what.add_argument("--config", type=pathlib.Path, help="JSON file of a network's settings, by their official names")
    what.add_argument("--again", type=pathlib.Path, metavar="DIRECTORY", help="add deviations to this directory")
    parser.add_argument("--out", type=pathlib.Path, help="directory to make; it must not exist")
    parser.add_argument("--size", help="width x height of the images or latents (default: the preset's, or square)")
    parser.add_argument("--batch", type=int, default=4, help="images of a training pass (default: 4)")
    parser.add_argument("--steps", type=int, default=2, help="training steps (default: 2)")
    parser.add_argument("--most", type=int, default=20000, help="values of a gradient that are stored; of larger ones "
                        "come the first rows and the norm (default: 20000)")
    parser.add_argument("--draws", type=int, default=16, help="16-bit runs (default: 16)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    options = parser.parse_args()
    if (options.again is None) != (options.out is not None):
        parser.error("--out goes with --preset and --config, and --again without it")
    return options


options = parse()
sys.path.insert(0, str(options.edm2))
try:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from training import networks_edm2 as official
except ImportError as e:
    sys.exit(f"golden.py: {e}; needed are PyTorch, safetensors, and in {options.edm2} a checkout of the official code")

torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
DEVICE = torch.device(options.device)
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


# ---- the official network in one arithmetic -----------------------------------------------------------------------

class Wider:
    """PyTorch, but what asks for float32 gets float64."""

    def __getattr__(self, name):
        return getattr(torch, "float64" if name == "float32" else name)


@contextlib.contextmanager
def arithmetic(precision):
    if precision == "f64":
        official.torch = Wider()
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        official.torch = torch
        torch.set_default_dtype(torch.float32)


def rounded(x, precision, at_random):
    """x in 16 bits: the nearest, or one of the two neighbours, as likely as it is near."""
    if at_random:
        bits = 13 if precision == "f16" else 16  # of a float32's significand are dropped
        word = x.contiguous().view(torch.int32)
        word = word + torch.randint(0, 1 << bits, word.shape, device=x.device, dtype=torch.int32)
        x = (word >> bits << bits).view(torch.float32)
    return x.to(HALVES[precision])


def network(config, state, precision, draw=0):
    net = official.Precond(**config, use_fp16=False)
    net.load_state_dict(state)
    net.to(DEVICE, torch.float64 if precision == "f64" else torch.float32)
    if precision in HALVES:
        # Where the official code begins to compute in 16 bits on a GPU; all that follows has the type of its input.
        net.unet.register_forward_pre_hook(lambda _, given: (rounded(given[0], precision, draw > 0), *given[1:]))
    return net


def loss(net, given):
    """EDM2's loss (eq. 14, 15 and 21) of each element, with the denoised images and log-variances."""
    images, noise, sigma, labels = given
    clean = images.to(next(net.parameters()).dtype)
    sigma = sigma.reshape(-1, 1, 1, 1).to(clean.dtype)
    denoised, logvar = net(clean + sigma * noise.to(clean.dtype), sigma, labels, return_logvar=True)
    data = net.sigma_data
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return weight / logvar.exp() * (denoised - clean) ** 2 + logvar, denoised, logvar


def batch(tensors, prefix):
    names = ("images", "noise_unit", "sigma", "labels")
    return [tensors[prefix + name].to(DEVICE) if prefix + name in tensors else None for name in names]


# ---- what the files hold, computed --------------------------------------------------------------------------------

def forward(net, tensors):
    """Activations, raw output, output and log-variance of each set of inputs."""
    results = {}
    for case in sorted({name.split(".")[0] for name in tensors}):
        x, sigma, labels = (tensors.get(f"{case}.{name}") for name in ("x", "sigma", "class_labels"))

        def keep(name):
            return lambda _module, _given, made: results.__setitem__(f"{case}.{name}", made.detach().clone())

        blocks = [(f"act.{part}.{name}", block) for part in ("enc", "dec") for name, block in getattr(net.unet, part).items()]
        hooks = [block.register_forward_hook(keep(name)) for name, block in [*blocks, ("F_x", net.unet)]]
        with torch.no_grad():
            labels = None if labels is None else labels.to(DEVICE)
            denoised, logvar = net.eval()(x.to(DEVICE), sigma.to(DEVICE), labels, return_logvar=True)
        for hook in hooks:
            hook.remove()
        results |= {f"{case}.D_x": denoised, f"{case}.logvar": logvar}
    return results


def accumulated(net, parts, total):
    """Losses of each part of a batch; the gradients of their sum over the batch are left in the network."""
    net.train().requires_grad_(True)
    net.zero_grad(set_to_none=True)
    losses = []
    for part in parts:
        elements, denoised, logvar = loss(net, part)
        elements.sum().backward()
        losses.append([x.detach() for x in (elements, denoised, logvar)])
    for p in net.parameters():
        if p.grad is not None:
            p.grad.div_(total).nan_to_num_(nan=0, posinf=0, neginf=0)  # not finite is 0, as officially
    return losses


def of_parameters(prefix, net, value):
    return {f"{prefix}.{name}": value(p).detach().clone() for name, p in net.named_parameters() if p.grad is not None}


def gradients(net, tensors):
    given = batch(tensors, "")
    [(elements, _, _)] = accumulated(net, [given], len(given[0]))
    return {"loss_elem": elements, "loss_scalar": elements.sum() / len(given[0])} | of_parameters("grad", net, lambda p: p.grad)


def optimizer(net, settings):
    return torch.optim.Adam(net.parameters(), betas=settings["adam"]["betas"], eps=settings["adam"]["eps"])


def take(adam, lr):
    adam.param_groups[0]["lr"] = lr
    adam.step()


def training(net, settings, batches):
    """One step after the other, with Adam and moving averages."""
    adam = optimizer(net, settings)
    averages = [{name: p.detach().clone() for name, p in net.named_parameters()} for _ in settings["ema_stds"]]
    for step, tensors in zip(settings["steps"], batches):
        given = batch(tensors, "data.")
        [(elements, denoised, logvar)] = accumulated(net, [given], len(given[0]))
        results = {"loss_elem": elements, "denoised": denoised, "logvar": logvar, "loss_mean": elements.mean(),
                   "loss_scalar": elements.sum() / len(given[0]), "loss_per_sample": elements.flatten(1).sum(1)}
        results |= of_parameters("grad", net, lambda p: p.grad) | of_parameters("wnorm", net, lambda p: p)
        take(adam, step["lr"])
        results |= of_parameters("weight", net, lambda p: p)
        results |= of_parameters("adam_m", net, lambda p: adam.state[p]["exp_avg"])
        results |= of_parameters("adam_v", net, lambda p: adam.state[p]["exp_avg_sq"])
        for average, std, beta in zip(averages, settings["ema_stds"], step["ema_betas"]):
            for name, p in net.named_parameters():
                average[name].lerp_(p.detach(), 1 - beta)
                results[f"ema{round(std * 1000):03}.{name}"] = average[name].clone()
        yield results


def accumulation(net, settings, tensors, lr):
    """The first step in micro-batches."""
    rounds = len({name for name in tensors if name.endswith(".images")})
    parts = [batch(tensors, f"data{i}.") for i in range(rounds)]
    total = sum(len(part[0]) for part in parts)
    losses = accumulated(net, parts, total)
    results = of_parameters("grad", net, lambda p: p.grad)
    take(optimizer(net, settings), lr)
    results |= of_parameters("weight", net, lambda p: p)
    for i, (elements, _, _) in enumerate(losses):
        results |= {f"loss_elem{i}": elements, f"loss_scalar{i}": elements.sum() / total}
    return results


# ---- files --------------------------------------------------------------------------------------------------------

def stored(name, results):
    """The tensor of this name in a file: a result, or rows or the norm of one; none if it is an input."""
    kind, _, rest = name.partition(".")
    if kind in ("grad_rows", "gradnorm"):
        whole = results.get(f"grad.{rest}")
        return whole if whole is None or kind == "grad_rows" else whole.norm()
    return results.get(name.removesuffix(".f64"))


def read(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), metadata


def write(directory, name, tensors, config, **metadata):
    tensors = {key: value.to("cpu", torch.float32 if value.is_floating_point() else None).contiguous().clone()
               for key, value in tensors.items()}
    if name in (MODEL, INIT):
        tensors = {key: value.half() for key, value in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(tensors, directory / name, metadata={"config": json.dumps(config), **metadata})


def chosen(results, most):
    """What is stored of results: large gradients by their first rows and norm, other large parameters not at all."""
    kept = {}
    for key, value in results.items():
        kind, _, name = key.partition(".")
        if value.numel() <= most or kind in ("a", "b", "loss_elem", "loss_elem0", "loss_elem1", "denoised"):
            kept[key] = value
        elif kind == "grad":
            kept |= {f"grad_rows.{name}": value[: max(1, most // value[0].numel())], f"gradnorm.{name}": value.norm()}
    return kept


def make(directory, config, size, seed):
    torch.manual_seed(seed)
    width, height = size
    n, channels = options.batch, config["img_channels"]
    state = official.Precond(**config, use_fp16=False).state_dict()
    for name, value in state.items():
        if name.endswith("gain"):
            value.uniform_(0.3, 1.2)
        elif name.endswith("weight"):
            value.mul_(torch.exp(torch.randn(len(value), *[1] * (value.ndim - 1)) * 0.5))
        value.copy_(value.half())
    directory.mkdir(parents=True)
    write(directory, MODEL, state, config)
    write(directory, INIT, state, config)

    def labels(images):
        if config["label_dim"] == 0:
            return {}
        return {"labels": torch.nn.functional.normalize(torch.randn(images, config["label_dim"]), dim=1)}

    def images(prefix, count):
        normal = torch.randn(count, 1, 1, 1)
        made = {"images": torch.randn(count, channels, height, width) * 0.5, "rnd_normal": normal,
                "sigma": (normal - 0.4).exp(), "noise_unit": torch.randn(count, channels, height, width), **labels(count)}
        return {prefix + name: value for name, value in made.items()}

    inputs = {}
    for case, sigmas in (("a", [0.3, 2.5]), ("b", [0.002, 1.0, 80.0])):
        sigma = torch.tensor(sigmas)
        x = torch.randn(len(sigmas), channels, height, width) * (sigma.reshape(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
        inputs |= {f"{case}.x": x, f"{case}.sigma": sigma}
        inputs |= {f"{case}.class_{name}": value for name, value in labels(len(sigmas)).items()}
    results = forward(network(config, state, "f32"), inputs)
    write(directory, FORWARD, inputs | {name: x for name, x in results.items() if not name.startswith("b.act")}, config)

    inputs = images("", n)
    write(directory, GRADS, inputs | chosen(gradients(network(config, state, "f32"), inputs), options.most), config)

    settings = {"adam": {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}, "P_mean": -0.4, "P_std": 1.0,
                "sigma_data": config["sigma_data"], "ema_stds": [0.05, 0.1], "lrs": [0.01, 0.006],
                "steps": [{"lr": (0.01, 0.006)[i % 2], "ema_betas": [0.84, 0.92]} for i in range(options.steps)]}
    batches = [images("data.", n) for _ in range(options.steps)]
    for i, results in enumerate(training(network(config, state, "f32"), settings, batches)):
        write(directory, f"tiny_train_step{i + 1}.safetensors", batches[i] | chosen(results, options.most), config)
    (directory / TRAIN).write_text(json.dumps(settings, indent=1) + "\n")
    inputs = {f"data{i}." + name: value for i in range(2) for name, value in images("", (n + 1) // 2).items()}
    results = accumulation(network(config, state, "f32"), settings, inputs, 0.01)
    kept = {key: value for key, value in chosen(results, options.most).items() if not key.startswith("grad_rows")}
    write(directory, ACCUM, inputs | kept, config, lr=0.01)


def replay(directory, precision, draw):
    """File, its tensors, the results of the official code for its inputs."""
    def state_of(name):
        tensors, metadata = read(directory / name)
        return {key: value.float() for key, value in tensors.items()}, json.loads(metadata.get("config", "{}"))

    def model(name):
        state, config = state_of(name)
        configs = directory / "configs.json"
        if not config and configs.exists():
            config = json.loads(configs.read_text())["model" if name == MODEL else "train"]
        return network(config, state, precision, draw)

    for name, compute in ((FORWARD, forward), (GRADS, gradients)):
        if (directory / name).exists():
            tensors, _ = read(directory / name)
            yield name, tensors, compute(model(MODEL), tensors)
    if not (directory / TRAIN).exists():
        return
    settings = json.loads((directory / TRAIN).read_text())
    steps = [directory / f"tiny_train_step{i + 1}.safetensors" for i in range(len(settings["steps"]))]
    steps = [step for step in steps if step.exists()]
    batches = [read(step)[0] for step in steps]
    for step, tensors, results in zip(steps, batches, training(model(INIT), settings, batches)):
        yield step.name, tensors, results
    if (directory / ACCUM).exists():
        tensors, metadata = read(directory / ACCUM)
        yield ACCUM, tensors, accumulation(model(INIT), settings, tensors, float(metadata.get("lr", settings["lrs"][0])))


def deviations(directory, draws):
    path = directory / "tolerances.json"
    tolerances = json.loads(path.read_text()) if path.exists() else {}
    for precision in ("f64", *HALVES):
        squares = {}
        for draw in range(1 if precision == "f64" else draws):
            torch.manual_seed(draw)
            with arithmetic(precision):
                for file, tensors, results in replay(directory, precision, draw):
                    for name, expected in tensors.items():
                        got = stored(name, results)
                        if got is None:
                            continue
                        if name.startswith(("weight.", "ema", "wnorm.")) and precision != "f64":
                            continue
                        expected, got = expected.double(), got.double().cpu()
                        got = got[: len(expected)] if expected.ndim else got
                        norm = (got if precision == "f64" else expected).norm()
                        error = (got - expected).norm() / norm
                        squares.setdefault((file, name), []).append(error.item() ** 2)
            print(f"{directory}: {precision}, run {draw + 1}", file=sys.stderr)
        for (file, name), all in squares.items():
            error = math.sqrt(sum(all) / len(all))
            if math.isfinite(error):
                entry = tolerances.setdefault(file, {}).setdefault(name, {})
                key = "rel_l2" if precision == "f64" else precision
                entry[key] = float(f"{error:.3e}") if key != "rel_l2" or key not in entry else entry[key]
    device = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "a CPU"
    tolerances["official"] = {"draws": draws, "made": f"PyTorch {torch.__version__.split('+')[0]} on {device}"}
    # A line for each tensor.
    files = (f'"{file}": {{\n' + ",\n".join(f' "{name}": {json.dumps(entry)}' for name, entry in of_file.items()) + "\n}"
             for file, of_file in tolerances.items())
    path.write_text("{\n" + ",\n".join(files) + "\n}\n")


def main():
    if options.again:
        return deviations(options.again, options.draws)
    if options.config:
        config = json.loads(options.config.read_text())
        size = [config["img_resolution"]] * 2
    else:
        labels, width = (1024, WIDTHS["xs"]) if options.preset == "1girl-xs" else (1000, WIDTHS[options.preset.split("-")[-1]])
        config = {"img_resolution": 64, "img_channels": 4, "label_dim": labels, "model_channels": width}
        size = (64, 88) if options.preset == "1girl-xs" else (64, 64)
    config.setdefault("sigma_data", 0.5)
    if options.size:
        size = tuple(int(side) for side in options.size.split("x"))
    if options.out.exists():
        sys.exit(f"golden.py: {options.out} exists")
    make(options.out, config, size, options.seed)
    deviations(options.out, options.draws)


main()
