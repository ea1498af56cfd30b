#!/usr/bin/env python3
"""What real machines and real files do, done to edm2k on purpose, and counted.

  scripts/hard.py [EDM2K] [--minutes N] [--seed N] [--only PART,...] [--round N] [--jobs N]

Parts, each for its share of the time:
  kills     SIGKILL at random moments of every command that writes; then the same command again
  sizes     the same of prepare and train on pictures of several sizes
  signals   SIGTERM, SIGHUP, SIGINT, one or two, at random moments of training; then the same command again
  ranks     SIGKILL, or a stop and a kill, to one of several ranks that train together; then the same command again
  disks     a full disk at every stage (a small tmpfs as root, else a limit on the size of files)
  writers   two processes at one output
  damage    damaged files of every format that is read, under limits of time and memory
  options   odd values of every option of every subcommand
Round N of a part depends on the seed and N only: --only PART --round N does that one again. What must hold is in
docs/reliability.md. The status is 1 if anything did not; only the standard library is used.
"""

import argparse
import base64
import collections
import contextlib
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of one command on a damaged file: of processor time, since others may use the machine too; six times as long by the clock.
SECONDS, BYTES = 10, 2 << 30
SHARES = {"kills": 4, "sizes": 1, "signals": 1, "ranks": 1, "disks": 1, "writers": 1, "damage": 5, "options": 2}

# 16x16 pictures in the formats that Python does not write.
PICTURES = {
    "a.jpg": (
        "/9j/4AAQSkZJRgABAgAAAQABAAD/wAARCAAQABADAREAAhEBAxEB/9sAQwAIBgYHBgUIBwcHCQkICgwUDQwLCwwZEhMPFB0aHx4dGhwcICQu"
        "JyAiLCMcHCg3KSwwMTQ0NB8nOT04MjwuMzQy/9sAQwEJCQkMCwwYDQ0YMiEcITIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy"
        "MjIyMjIyMjIyMjIyMjIy/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEG"
        "E1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWG"
        "h4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEB"
        "AQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYk"
        "NOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0"
        "tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDzLT9Bzj5K8yVfmLy/HbanU6f4fzj5P0rC"
        "S5j7fL8ftqdLpmg5x8leZRr8x+L4HHbanY6Z4ezj5K9aiuY+ywOP21P/2Q=="
    ),
    "a.gif": (
        "R0lGODlhEAAQAIAAAAAAAAAAACH5BAgAAAAALAAAAAAQABAAhwAAAAAQAAAgAAAwAABAAABQAABgAABwAACAAACQAACgAACwAADAAADQAADg"
        "AADwABAAABAQARAgAhAwAxBABBBQBRBgBhBwBxCACBCQCRCgChCwCxDADBDQDRDgDhDwDyAAACAQAiAgBCAwBiBACCBQCiBgDCBwDiCAECCQ"
        "EiCgFCCwFiDAGCDQGiDgHCDwHjAAADAQAzAgBjAwCTBADDBQDzBgEjBwFTCAGDCQGzCgHjCwITDAJDDQJzDgKjDwLUAAAEAQBEAgCEAwDEBA"
        "EEBQFEBgGEBwHECAIECQJECgKECwLEDAMEDQNEDgOEDwPFAAAFAQBVAgClAwD1BAFFBQGVBgHlBwI1CAKFCQLVCgMlCwN1DAPFDQQVDgRlDw"
        "S2AAAGAQBmAgDGAwEmBAGGBQHmBgJGBwKmCAMGCQNmCgPGCwQmDASGDQTmDgVGDwWnAAAHAQB3AgDnAwFXBAHHBQI3BgKnBwMXCAOHCQP3Cg"
        "RnCwTXDAVHDQW3DgYnDwaYAAAIAQCIAgEIAwGIBAIIBQKIBgMIBwOICAQICQSICgUICwWIDAYIDQaIDgcIDweJAAAJAQCZAgEpAwG5BAJJBQ"
        "LZBgNpBwP5CASJCQUZCgWpCwY5DAbJDQdZDgfpDwh6AAAKAQCqAgFKAwHqBAKKBQMqBgPKBwRqCAUKCQWqCgZKCwbqDAeKDQgqDgjKDwlrAA"
        "ALAQC7AgFrAwIbBALLBQN7BgQrBwTbCAWLCQY7CgbrCwebDAhLDQj7DgmrDwpcAAAMAQDMAgGMAwJMBAMMBQPMBgSMBwVMCAYMCQbMCgeMCw"
        "hMDAkMDQnMDgqMDwtNAAANAQDdAgGtAwJ9BANNBQQdBgTtBwW9CAaNCQddCggtCwj9DAnNDQqdDgttDww+AAAOAQDuAgHOAwKuBAOOBQRuBg"
        "VOBwYuCAcOCQfuCgjOCwmuDAqODQtuDgxODw0vAAAPAQD/AgHvAwLfBAPPBQS/BgWvBwafCAePCQh/CglvCwpfDAtPDQw/Dg0vDw4Qj/AAFA"
        "AAEDCBQwcABBAgULGDRw8AJECBEjSJQwcQJFChUrWLRw8QRIECFDiBQxcgRJEiVLmDRx8gZMGDFjyJQxcwZNGjVr2LRx8whQIEGDCBUydAhR"
        "IkWLGDVy9ApUKFGjSJUydQpVKlWrWLVy9QxYMGHDiBUzdgxZMmXLmDVz9g5cOHHjyJUzdw5dOnXr2LVz9xBgQIEDCRY0eBBhQoULGTZ0+BJk"
        "SJEjSZY0eRJlSpUrWbZ0+RRoUKFDiRY1ehRpUqVLmTZ1+hZsWLFjyZY1exZtWrVr2bZ1+xhwYMGDCRc2fBhxYsWLGTd2/Bp0aNGjSZc2fRp1"
        "atWrWbd2/Rx4JHDhw4kXN34ceXLly5k3d/4efHjx48mXN38efXr169m3d/8EBAA7"
    ),
    "a.webp": (
        "UklGRlABAABXRUJQVlA4TEQBAAAvD8ADAM1VICICHogEAAAAAIABAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAADAHggEgAAAAAA"
        "5z8AYAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAA8EgAQAAADg/AcAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAHRVVVVF1ut3"
        "AB+EYATFcIKkaIblAD4IwQiK4QRJ0QzLAXwQghEUwwmSohmWA/ggBCMohhMkRTMsB/BBCEZQDCdIimZYDuCDEIygGE6QFM2wHMAHIRhBMZwg"
        "KZphOYAPQjCCYjhBUjTDcgAfhGAExXCCpGiG5QA+CMEIiuEESdEMywF8EIIRFMMJkqIZlgP4IAQjKIYTJEUzLAfwQQhGUAwnSIpmWA7ggxCM"
        "oBhOkBTNsBzAByEYQTGcICmaYTk="
    ),
}


# ---- running ------------------------------------------------------------------------------


Result = collections.namedtuple("Result", "code text seconds memory timed_out")


def run(command, cwd, limit=120.0, address_space=None, file_size=None, signals=(), processor=None):
    """Runs to the end, or kills at the limit; `signals`: pairs of seconds after the start and a signal; `processor`:
    seconds of its time."""
    command = [str(part) if isinstance(part, Path) else part for part in command]
    if file_size is not None:
        command = ["bash", "-c", f"trap '' XFSZ; ulimit -f {file_size >> 10}; exec \"$@\"", "bash"] + command
    with tempfile.TemporaryFile() as said:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        if address_space:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_AS, (address_space, address_space))
        if processor:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (processor, processor + 1))
        due = sorted(list(signals) + [(limit, "limit")], key=lambda pair: pair[0])
        over = threading.Event()
        timed_out = []

        def send():
            for at, what in due:
                if over.wait(max(0.0, begun + at - time.monotonic())):
                    return
                timed_out.extend([True] if what == "limit" else [])
                try:
                    os.kill(process.pid, signal.SIGKILL if what == "limit" else what)
                except ProcessLookupError:
                    return

        sender = threading.Thread(target=send)
        sender.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        over.set()
        sender.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read(1 << 20).decode("utf-8", "replace")
    timed_out = bool(timed_out) or process.returncode == -signal.SIGXCPU
    return Result(process.returncode, text, seconds, usage.ru_maxrss << 10, timed_out)


Complaint = collections.namedtuple("Complaint", "kind text")


def complaint(result):
    """What is wrong with how a command ended that was given something wrong, or None."""
    if result.timed_out:
        return Complaint("over 10 s", f"over {result.seconds:.0f} s")
    if result.code == 101 or "panicked at" in result.text:
        return Complaint("panics", "panic")
    if result.code not in (0, 1, 2):
        return Complaint("aborts", f"ended by {result.code}")
    if result.memory > BYTES:
        return Complaint("over 2 GB", f"{result.memory >> 20} MiB")
    errors = [line for line in result.text.splitlines() if "error" in line]
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.text):
        return Complaint("bad messages", "a control character")
    if result.code == 1 and "edm2k: error: " not in result.text:
        return Complaint("bad messages", "no reason was given")
    if any(len(line) > 300 for line in errors):
        return Complaint("bad messages", "a message of more than 300 characters")
    return None


# ---- files --------------------------------------------------------------------------------


def png(width, height, rgb):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + rgb[y * width * 3 : (y + 1) * width * 3] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width, height, rgb):
    head = struct.pack("<2sIHHI", b"BM", 54 + len(rgb), 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rgb), 2835, 2835, 0, 0) + rgb


def npy(descr, shape, data):
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (63 - (len(head) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data


def onnx(width):
    """A network that flattens an image and multiplies it with a matrix."""

    def field(number, value):
        def varint(n):
            return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        value = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(value)) + value

    def info(name, dims):
        shape = b"".join(field(1, field(1, dim)) for dim in dims)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    def node(kind, inputs, output):
        return field(
            1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(3, output) + field(4, kind)
        )

    data = struct.pack("<f", 0.01) * 192 * width
    weights = field(1, 192) + field(1, width) + field(2, 1) + field(8, "w") + field(9, data)
    graph = node("Flatten", ["x"], "f") + node("MatMul", ["f", "w"], "y") + field(2, "g") + field(5, weights)
    graph += field(11, info("x", [1, 8, 8, 3])) + field(12, info("y", [1, width]))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


def safetensors(path):
    """Header and tensors of a file, but what depends on the clock."""
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, info in head.items():
        if name not in ("__metadata__", "checksums"):
            begin, end = info["data_offsets"]
            tensors[name] = (
                info["dtype"],
                info["shape"],
                hashlib.sha256(data[8 + length + begin : 8 + length + end]).hexdigest(),
            )
    state = json.loads(head["__metadata__"].get("train", "{}"))
    state.pop("seconds", None)
    return tensors, state


def write_safetensors(path, tensors):
    """`tensors`: element type, shape and bytes by name."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def autoencoder(r, layers):
    """Random weights: `layers` are name, shape and whether there is a bias."""
    tensors = {}
    for name, shape, bias in layers:
        count, scale = math.prod(shape), 1 / math.sqrt(math.prod(shape[1:]))
        values = [1.0] * count if len(shape) == 1 else [r.uniform(-2, 2) * scale for _ in range(count)]
        tensors[f"{name}.weight"] = ("F32", shape, struct.pack(f"<{count}f", *values))
        if bias:
            tensors[f"{name}.bias"] = ("F32", shape[:1], bytes(4 * shape[0]))
    return tensors


def taesd(c):
    for side, (cin, cout), convs in ("encoder", (3, 4), (2, 6, 10)), ("decoder", (4, 3), (6, 11, 16)):
        last = 14 if side == "encoder" else 18
        yield f"{side}.layers.0", [c, cin, 3, 3], True
        yield f"{side}.layers.{last}", [cout, c, 3, 3], True
        for i in range(1, last):
            if i in convs:
                yield f"{side}.layers.{i}", [c, c, 3, 3], False
            elif side == "encoder" or i not in (1, 5, 10, 15):
                yield from ((f"{side}.layers.{i}.conv.{j}", [c, c, 3, 3], True) for j in (0, 2, 4))


def sd_vae(c):
    """Two levels of one block, all of `c` channels."""

    def block(name):
        for i in (1, 2):
            yield f"{name}.norm{i}", [c], True
            yield f"{name}.conv{i}", [c, c, 3, 3], True

    for side, cin, cout, blocks, resize in (
        ("encoder", 3, 8, "encoder.down_blocks", "downsamplers"),
        ("decoder", 4, 3, "decoder.up_blocks", "upsamplers"),
    ):
        yield f"{side}.conv_in", [c, cin, 3, 3], True
        for i in (0, 1):
            for j in range(1 if side == "encoder" else 2):
                yield from block(f"{blocks}.{i}.resnets.{j}")
            yield from block(f"{side}.mid_block.resnets.{i}")
        yield f"{blocks}.0.{resize}.0.conv", [c, c, 3, 3], True
        yield f"{side}.mid_block.attentions.0.group_norm", [c], True
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"{side}.mid_block.attentions.0.{part}", [c, c], True
        yield f"{side}.conv_norm_out", [c], True
        yield f"{side}.conv_out", [cout, c, 3, 3], True
    yield "quant_conv", [8, 8, 1, 1], True
    yield "post_quant_conv", [4, 4, 1, 1], True


def unfinished(path):
    return re.search(r"\.[0-9a-f]{16}\.tmp$", path.name) is not None or path.name == ".edm2k.lock"


def essence(directory):
    """What a command made: by name, without what depends on the clock."""
    made = {}
    for path in sorted(Path(directory).rglob("*")):
        if path.is_dir():
            continue
        name = str(path.relative_to(directory))
        if path.name.startswith("checkpoint-"):
            made[name] = safetensors(path)
        elif path.name == "stats.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            made[name] = [
                {k: v for k, v in line.items() if k not in ("seconds", "images_per_s", "peak_mib")} for line in lines
            ]
        elif path.name != "loss.svg":
            made[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            made[name] = path.read_bytes().endswith(b"</svg>\n")
    return made


CONFIG = """{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
    "channels_per_head": 8}"""
GOLDEN = "configs.json lr_schedule.json ops.safetensors phema.json phema.safetensors precond.json tolerances.json".split()
PREPARE = "prepare --size 8x8 --shard-size 8 --vocabulary 16 --validation-modulus 5 --max-crop 0.9 "
SIZES = PREPARE.replace("--size 8x8", "--sizes 8x8,16x8,8x16") + "--images shapes --metadata shapes.jsonl "
SAMPLE = "sample --model model.safetensors --device cpu "


def train(out, data="data"):
    intervals = "--grid 80 --validate 40 --snapshot 40 --checkpoint 16 --status 8"
    return f"train --data {data} --config config.json --device cpu --batch 8 --rampup 8 {intervals} --outdir {out}"


class Place:
    """A small dataset and what every command makes of it, once, undisturbed."""

    def __init__(self, edm2k, directory):
        self.edm2k, self.dir = edm2k, Path(directory)
        r = random.Random(1)
        (self.dir / "pics").mkdir()
        lines = []
        for i in range(48):
            (self.dir / f"pics/{i}.png").write_bytes(png(8, 8, r.randbytes(192)))
            tags = sorted({f"t{r.randrange(6)}" for _ in range(3)})
            lines.append(json.dumps({"id": i * 7 + 2, "file": f"{i}.png", "tags": tags}))
        (self.dir / "shapes").mkdir()
        shapes = []
        for i in range(40):
            width, height = ((8, 8), (16, 8), (8, 16), (9, 8))[r.choice((0, 0, 0, 1, 2, 3))]
            (self.dir / f"shapes/{i}.png").write_bytes(png(width, height, r.randbytes(3 * width * height)))
            shapes.append(json.dumps({"id": i * 7 + 2, "file": f"{i}.png", "tags": [f"t{i % 5}"]}))
        (self.dir / "shapes.jsonl").write_text("\n".join(shapes) + "\n")
        for name, text in PICTURES.items():
            (self.dir / name).write_bytes(base64.b64decode(text))
        (self.dir / "a.bmp").write_bytes(bmp(16, 16, r.randbytes(768)))
        (self.dir / "a.png").write_bytes(png(16, 16, r.randbytes(768)))
        (self.dir / "meta.jsonl").write_text("\n".join(lines) + "\n")
        with zipfile.ZipFile(self.dir / "edm2.zip", "w") as archive:
            names = [f"00000/img{i:08}.png" for i in range(24)]
            for i, name in enumerate(names):
                archive.write(self.dir / f"pics/{i}.png", name)
            archive.writestr("dataset.json", json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)]}))
        (self.dir / "config.json").write_text(CONFIG)
        values = [r.random() for _ in range(48 * 5)]
        (self.dir / "f.npy").write_bytes(npy("<f4", (48, 5), struct.pack("<240f", *values)))
        (self.dir / "ids.npy").write_bytes(npy("<i8", (48,), struct.pack("<48q", *(i * 7 + 2 for i in range(48)))))
        write_safetensors(
            self.dir / "f.safetensors",
            {
                "ids": ("I64", [48], struct.pack("<48q", *(i * 7 + 2 for i in range(48)))),
                "features": ("F32", [48, 5], struct.pack("<240f", *values)),
            },
        )
        write_safetensors(self.dir / "taesd.safetensors", autoencoder(r, taesd(4)))
        write_safetensors(self.dir / "sd.safetensors", autoencoder(r, sd_vae(32)))
        (self.dir / "golden").mkdir()
        for name in GOLDEN:
            shutil.copy(ROOT / "tests/golden" / name, self.dir / "golden")
        posts = []
        with tarfile.open(self.dir / "0000.tar", "w") as tar:
            for i in range(6):
                tar.add(self.dir / f"pics/{i}.png", f"{1000 * i + 1}.png")
                posts.append(
                    json.dumps(
                        {
                            "id": 1000 * i + 1,
                            "rating": "g",
                            "file_ext": "png",
                            "tag_string": "1girl solo red",
                            "image_width": 8,
                            "image_height": 8,
                            "is_deleted": False,
                            "is_banned": False,
                        }
                    )
                )
        (self.dir / "dan").mkdir()
        shutil.move(self.dir / "0000.tar", self.dir / "dan/0000.tar")
        (self.dir / "posts.json").write_text("\n".join(posts) + "\n")
        self.do((PREPARE + "--images pics --metadata meta.jsonl --out data").split())
        self.do((SIZES + "--out sizes").split())
        self.do(f"{train('run')} --duration 64".split())
        shutil.copy(next((self.dir / "run").glob("snapshot-*64-0.050*")), self.dir / "model.safetensors")
        shutil.copy(ROOT / "tests/golden/official_style_snapshot_nosrc.pkl", self.dir / "snapshot.pkl")
        (self.dir / "t.onnx").write_bytes(onnx(6))
        tagged = run(
            [self.edm2k, *f"{PREPARE} --images pics --metadata meta.jsonl --tagger t.onnx --out t".split()], self.dir
        )
        self.has_onnx = "without ONNX" not in tagged.text
        shutil.rmtree(self.dir / "t", ignore_errors=True)
        for command in (
            "verify golden --device cpu",
            PREPARE + "--images pics --metadata meta.jsonl --features f.safetensors --out t",
            PREPARE + "--images pics --metadata meta.jsonl --vae taesd.safetensors --out t2",
            PREPARE + "--images pics --metadata meta.jsonl --vae sd.safetensors --out t3",
        ):
            self.do(command.split())
        for name in ("t", "t2", "t3"):
            shutil.rmtree(self.dir / name)
        self.do("condition train --data data --epochs 2 --out vae.safetensors".split())
        self.do("condition sample --model vae.safetensors --count 4 --out c.safetensors".split())

    def do(self, arguments, cwd=None):
        result = run([self.edm2k, *arguments], cwd or self.dir)
        assert result.code == 0, f"{arguments}: {result.code} {result.text}"

    def writers(self):
        """Every command that writes: its arguments, where `out` is a folder of its own."""
        snapshot = ROOT / "tests/golden/official_style_snapshot_nosrc.pkl"
        commands = {
            "train": f"{train('out')} --duration 160",
            "prepare": PREPARE + "--images pics --metadata meta.jsonl --out out",
            "train on sizes": f"{train('out', 'sizes')} --duration 160",
            "prepare sizes": SIZES + "--out out",
            "sample": SAMPLE + "--outdir out --steps 4 --seeds 0-11 --batch 2 --overwrite",
            "export": "export model.safetensors --out out/x --overwrite",
            "import": f"import {snapshot} --out out/x --overwrite",
            "condition train": "condition train --data data --epochs 4 --out out/x --overwrite",
            "condition sample": "condition sample --model vae.safetensors --out out/x --overwrite",
            "ema": "ema run --std 0.05,0.07,0.1 --out out --overwrite",
            "eval": "eval --model model.safetensors --device cpu --data data --plot out/x --overwrite --images 4",
        }
        return {name: command.split() for name, command in commands.items()}

    def folder(self, parent):
        """A place of its own for one round: all but `out` is shared."""
        directory = Path(tempfile.mkdtemp(dir=parent))
        for path in self.dir.iterdir():
            os.symlink(path, directory / path.name)
        (directory / "out").mkdir()
        return directory


class Campaign:
    def __init__(self, place, seed, scratch):
        self.place, self.seed, self.scratch = place, seed, scratch
        self.count, self.failures, self.lock = collections.Counter(), [], threading.Lock()
        self.references, self.times = {}, {}

    def add(self, what, number=1):
        with self.lock:
            self.count[what] += number

    def fail(self, part, number, what, text=""):
        with self.lock:
            self.failures.append(what)
            print(
                f"FAIL --only {part} --round {number}: {what}", *text.strip().splitlines()[-3:], sep="\n  ", flush=True
            )

    def reference(self, name, arguments):
        with self.lock:
            if name not in self.references:
                directory = self.place.folder(self.scratch)
                begun = time.monotonic()
                self.place.do(arguments, directory)
                self.times[name] = time.monotonic() - begun
                self.references[name] = essence(directory / "out")
                shutil.rmtree(directory)
            return self.references[name], self.times[name]

    def finish(self, part, number, name, arguments, directory):
        """Runs a command that was disturbed once more: its end must be as if it had not been."""
        expected, _ = self.reference(name, arguments)
        result = run([self.place.edm2k, *arguments], directory)
        if result.code != 0 or "damaged" in result.text:
            self.add("lost")
            return self.fail(part, number, f"{name} does not go on", result.text)
        found = essence(directory / "out")
        # The grid of an earlier process, and its pictures, are those of the same seeds.
        if found != expected:
            self.add("different")
            differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            self.fail(part, number, f"{name} ends otherwise: {', '.join(differ)}", result.text)

    def half_files(self, part, number, name, arguments, directory):
        """What lies under a final name is whole at any moment."""
        expected, _ = self.reference(name, arguments)
        for path in (directory / "out").rglob("*"):
            key = str(path.relative_to(directory / "out"))
            if path.is_dir() or unfinished(path) or path.name == "stats.jsonl":
                continue
            if path.name.startswith("checkpoint-"):
                try:
                    safetensors(path)
                    continue
                except Exception as error:  # whatever is wrong with it
                    self.fail(part, number, f"{name}: half a file: {key}: {error}")
            elif path.name == "loss.svg":
                if not path.read_bytes().endswith(b"</svg>\n"):
                    self.fail(part, number, f"{name}: half a file: {key}")
            elif key in expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected[key]:
                self.add("half files")
                self.fail(part, number, f"{name}: half a file: {key}")

    # ---- parts

    def kills(self, number, r):
        # Half of all are training's.
        self.kill("kills", number, r, r.choice(list(self.place.writers()) + ["train"] * 7 + ["sample goes on"] * 2))

    def sizes(self, number, r):
        self.kill("sizes", number, r, r.choice(["train on sizes", "prepare sizes"]))

    def kill(self, part, number, r, name):
        arguments = list(self.place.writers()[name.removesuffix(" goes on")])
        goes_on = name.split()[0] in ("train", "prepare") or name.endswith(" goes on")
        if name.endswith(" goes on"):
            arguments.remove("--overwrite")
        _, seconds = self.reference(name, arguments)
        directory = self.place.folder(self.scratch)
        for _ in range(r.choice([1, 1, 2, 3, 6]) if goes_on else 1):
            at = r.uniform(0, 1.1 * seconds)
            result = run([self.place.edm2k, *arguments], directory, signals=[(at, signal.SIGKILL)])
            if result.code == 0:
                break
            if result.code != -9:
                self.fail(part, number, f"{name} ended by {result.code}", result.text)
            self.add("kills of train" if name.startswith("train") else "kills of others")
            self.half_files(part, number, name, arguments, directory)
        self.finish(part, number, name, arguments, directory)
        shutil.rmtree(directory)

    def signals(self, number, r):
        arguments = self.place.writers()["train"]
        _, seconds = self.reference("train", arguments)
        directory = self.place.folder(self.scratch)
        for _ in range(r.randrange(1, 4)):
            at = r.uniform(0, seconds)
            some = [r.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT]) for _ in range(r.randrange(1, 3))]
            result = run(
                [self.place.edm2k, *arguments], directory, signals=[(at + 0.001 * i, s) for i, s in enumerate(some)]
            )
            if result.code == 0:
                break
            self.add("signals", len(some))
            # Before it begins to train, a signal ends it as any other program.
            begun = "resuming from" in result.text or "images, loss" in result.text
            if result.code != 130 and (begun or -result.code not in some):
                self.fail("signals", number, f"ended by {result.code} at {some}", result.text)
            if (
                result.code == 130
                and "finishing" in result.text
                and some != [2, 2]
                and "stopped after" not in result.text
            ):
                self.fail("signals", number, f"{some}: did not save", result.text)
        expected, _ = self.reference("train", arguments)
        result = run([self.place.edm2k, *arguments], directory)
        found = essence(directory / "out")
        if result.code != 0 or found != expected:
            self.add("different")
            self.fail("signals", number, "the run ends otherwise", result.text)
        shutil.rmtree(directory)

    def together(self, size, arguments, directory, disturbed=None):
        """Runs a command on several ranks: the status and the text of each. `disturbed`: seconds, a rank, and what to do."""
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        processes = []
        for rank in range(size):
            said = tempfile.TemporaryFile()
            who = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, **{name: str(value) for name, value in who.items()}, "EDM2K_RANKS_TIMEOUT": "30"}
            command = [self.place.edm2k, *arguments]
            begun = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env)
            processes.append((begun, said))
        if disturbed:
            at, rank, what = disturbed
            time.sleep(at)
            for kind in what:
                processes[rank][0].send_signal(kind)
                time.sleep(0.2 if kind == signal.SIGSTOP else 0)
        end, results = time.monotonic() + 60, []
        for process, said in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                results.append((None, "not ended within a minute"))
                continue
            said.seek(0)
            results.append((process.returncode, said.read(1 << 20).decode("utf-8", "replace")))
            said.close()
        return results

    def ranks(self, number, r):
        size = r.choice([2, 3, 4])
        arguments = self.place.writers()["train"]
        name = f"train on {size}"
        with self.lock:
            if name not in self.references:
                directory, begun = self.place.folder(self.scratch), time.monotonic()
                results = self.together(size, arguments, directory)
                assert all(code == 0 for code, _ in results), results
                self.times[name] = time.monotonic() - begun
                self.references[name] = essence(directory / "out")
                shutil.rmtree(directory)
        expected, seconds = self.references[name], self.times[name]
        directory = self.place.folder(self.scratch)
        for _ in range(r.choice([1, 1, 2, 3])):
            who = r.randrange(size)
            what = r.choice([[signal.SIGKILL], [signal.SIGSTOP, signal.SIGKILL], [signal.SIGTERM]])
            results = self.together(size, arguments, directory, (r.uniform(0, 1.1 * seconds), who, what))
            if all(code == 0 for code, _ in results):
                break
            self.add("ranks killed" if signal.SIGKILL in what else "ranks stopped")
            for rank, (code, text) in enumerate(results):
                # One of which a signal is heeded stops all; one that is gone ends all, in a line that names it.
                named = re.search(f"^edm2k: error: .*rank {who}\\b", text, re.M) or "rank 0 at" in text
                well = code in (0, 130) or rank == who or (code == 1 and named)
                if not well:
                    self.fail("ranks", number, f"{what} to rank {who} of {size}: rank {rank} ended by {code}", text)
        results = self.together(size, arguments, directory)
        if any(code != 0 for code, _ in results):
            self.add("lost")
            self.fail("ranks", number, "the run does not go on", "\n".join(text for _, text in results))
        elif essence(directory / "out") != expected:
            self.add("different")
            self.fail("ranks", number, f"the run of {size} ends otherwise", results[0][1])
        shutil.rmtree(directory)

    def disks(self, number, r):
        name = r.choice(list(self.place.writers()))
        arguments = self.place.writers()[name]
        self.reference(name, arguments)
        directory = self.place.folder(self.scratch)
        out = directory / "out"
        size = int(2 ** r.uniform(12, 21))
        mounted = (
            os.geteuid() == 0
            and subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], capture_output=True
            ).returncode
            == 0
        )
        try:
            result = run([self.place.edm2k, *arguments], directory, file_size=None if mounted else size)
            self.add("full disks" if result.code != 0 else "disks that sufficed")
            full = "No space left" in result.text or "File too large" in result.text
            if result.code not in (0, 1) or (result.code == 1 and not full) or "panicked" in result.text:
                self.fail("disks", number, f"{name} on {size} bytes ended by {result.code}", result.text)
            self.half_files("disks", number, name, arguments, directory)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
            self.finish("disks", number, name, arguments, directory)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", out], check=False)
            shutil.rmtree(directory, ignore_errors=True)

    def writers(self, number, r):
        name = r.choice(list(self.place.writers()))
        first = self.place.writers()[name]
        second = list(first)
        expected, seconds = self.reference(name, first)
        ok = [expected]
        if name == "export":
            second += ["--dtype", "f16"]
            ok.append(self.reference("export f16", second)[0])
        if name == "sample" and r.random() < 0.5:
            second[second.index("0-11")] = "12-23"
        directory = self.place.folder(self.scratch)
        results = [None, None]

        def work(i, arguments, delay):
            time.sleep(delay)
            results[i] = run([self.place.edm2k, *arguments], directory)

        threads = [
            threading.Thread(target=work, args=(0, first, 0)),
            threading.Thread(target=work, args=(1, second, r.uniform(0, seconds))),
        ]
        [thread.start() for thread in threads]
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.002)
            if name == "export":
                try:
                    if hashlib.sha256((directory / "out/x").read_bytes()).hexdigest() not in [made["x"] for made in ok]:
                        self.add("half files")
                        self.fail("writers", number, "half a file under its final name")
                        break
                except FileNotFoundError:
                    pass
        [thread.join() for thread in threads]
        self.add("pairs of writers")
        for result in results:
            refused = result.code == 1 and re.search("another (run|process) is writing|exists|meanwhile", result.text)
            if result.code != 0 and not refused:
                self.fail("writers", number, f"{name}: ended by {result.code}", result.text)
        if results[0].code != 0 and results[1].code != 0 and seconds > 0.1:
            self.add("pairs of which both were refused")
        left = [path.name for path in (directory / "out").rglob("*") if unfinished(path)]
        if left:
            self.fail("writers", number, f"{name}: left behind {left}")
        found = essence(directory / "out")
        if any(code.code == 0 for code in results) and not any(
            all(found.get(k) == v or k.startswith("grid") for k, v in made.items()) for made in ok
        ):
            if name != "sample" or second == first:
                self.add("different")
                self.fail("writers", number, f"{name}: not what one of them makes")
        shutil.rmtree(directory)

    def damage(self, number, r):
        place = self.place
        directory = place.folder(self.scratch)
        prepare = PREPARE + "--out out/d "
        sample = SAMPLE + "--steps 1 --outdir out/s "
        danbooru = prepare + "--danbooru dan --metadata posts.json --enlarge"
        checkpoint = max(path.name for path in (place.dir / "run").glob("checkpoint-*"))
        picture = r.choice(["a.png", "a.bmp", *PICTURES])
        (directory / "p.jsonl").write_text(json.dumps({"id": 2, "file": picture, "tags": ["a"]}))
        # What is damaged, and who reads it.
        kinds = {
            "model": (
                "model.safetensors",
                "info model.safetensors",
                sample + "--seeds 0",
                "export model.safetensors --out out/x",
            ),
            "shard": (
                "data/train-00000.safetensors",
                "info data",
                "condition train --data data --epochs 1 --out out/v",
                f"{train('out/r')} --duration 16",
            ),
            "shard of sizes": (
                "sizes/train-00000.safetensors",
                "info sizes",
                "info --check sizes",
                f"{train('out/r', 'sizes')} --duration 16",
            ),
            "archive": (
                "edm2.zip",
                "info edm2.zip",
                "info --check edm2.zip",
                f"{train('out/r', 'edm2.zip')} --duration 16",
            ),
            "vocabulary": ("data/vocabulary.json", "condition tags --data data", "info data"),
            "checkpoint": (f"run/{checkpoint}", f"{train('run')} --duration 72"),
            "statistics": ("run/stats.jsonl", f"{train('run')} --duration 72"),
            "condition model": ("vae.safetensors", "condition sample --model vae.safetensors --count 2"),
            "conditions": ("c.safetensors", sample + "--conditions c.safetensors"),
            "picture": (picture, prepare + "--images . --metadata p.jsonl"),
            "records": ("meta.jsonl", prepare + "--images pics --metadata meta.jsonl"),
            "npy": (
                r.choice(["f.npy", "ids.npy"]),
                prepare + "--images pics --metadata meta.jsonl --features f.npy --feature-ids ids.npy",
            ),
            "features": ("f.safetensors", prepare + "--images pics --metadata meta.jsonl --features f.safetensors"),
            "autoencoder": (
                coder := r.choice(["taesd.safetensors", "sd.safetensors"]),
                prepare + f"--images pics --metadata meta.jsonl --device cpu --vae {coder}",
            ),
            "golden numbers": (f"golden/{r.choice(GOLDEN)}", "verify golden --device cpu"),
            "tar": ("dan/0000.tar", danbooru),
            "posts": ("posts.json", danbooru),
            "pickle": ("snapshot.pkl", "import snapshot.pkl --out out/x"),
            "tagger": (
                "t.onnx",
                prepare + "--images pics --metadata meta.jsonl --tagger t.onnx --tagger-node y --device cpu",
            ),
            "config": ("config.json", f"{train('out/r')} --duration 8 -n"),
        }
        kind = r.choice([kind for kind in kinds if kind != "tagger" or place.has_onnx])
        file, *readers = kinds[kind]
        arguments = r.choice(readers).split()
        path = directory / file
        whole = path.read_bytes()
        if path.parent != directory:
            # A folder of its own. Statistics are appended to; all else is replaced.
            path.parent.unlink()
            path.parent.mkdir()
            for other in (place.dir / path.parent.name).iterdir():
                (shutil.copy if other.name == "stats.jsonl" else os.link)(other, path.parent / other.name)
        path.unlink()
        bad = mutate(r, whole)
        if file == "a.png" and r.random() < 0.7:
            bad = with_checksums(bad)
        path.write_bytes(bad)
        result = run([place.edm2k, *arguments], directory, limit=6 * SECONDS, address_space=4 * BYTES, processor=SECONDS)
        if kind == "checkpoint" and result.code == 0:
            # An older one, or the bits that it had: the run ends as if nothing had been damaged.
            end = "checkpoint-000000072.safetensors"
            if safetensors(directory / "run" / end) != self.undamaged(arguments, end):
                self.add("different")
                self.fail("damage", number, "a run that goes on from a damaged checkpoint ends otherwise", result.text)
        if kind == "archive" and "--check" in arguments and result.code == 0 and not whole_archive(path):
            self.add("different")
            self.fail("damage", number, "a damaged archive is said to be whole", result.text)
        self.add("damaged files")
        self.add("refused" if result.code else "taken")
        what = complaint(result)
        if what:
            self.add(what.kind)
            kept = Path(tempfile.gettempdir()) / f"edm2k-hard-{number}-{path.name}"
            kept.write_bytes(bad)
            self.fail("damage", number, f"{kind}: {what.text}: {' '.join(arguments)} ({kept})", result.text)
        shutil.rmtree(directory)

    def undamaged(self, arguments, end):
        with self.lock:
            if end not in self.references:
                directory = self.place.folder(self.scratch)
                (directory / "run").unlink()
                shutil.copytree(self.place.dir / "run", directory / "run")
                self.place.do(arguments, directory)
                self.references[end] = safetensors(directory / "run" / end)
                shutil.rmtree(directory)
            return self.references[end]

    def options(self, number, r):
        directory = self.place.folder(self.scratch)
        base = {
            **self.place.writers(),
            "info": ["info", "model.safetensors"],
            "condition tags": ["condition", "tags", "--data", "data"],
        }
        for name in ("train", "train on sizes"):
            base[name] = [*base[name], "-n"]
        name = r.choice(list(base))
        arguments = list(base[name])
        words = 2 if name.startswith("condition") else 1
        text = run([self.place.edm2k, *arguments[:words], "--help"], directory).text
        known = re.findall(r"(--[a-zA-Z-]+) <", text)
        numbers = (
            """0 -1 1 nan inf -inf 1e999 1e38 1e-320 18446744073709551616 9223372036854775807 4294967296 65536 0x10 1,1
            0-1 1-0 65536x65536 0x0 1x1 0.5""".split()
        )
        # Some of these will be taken for an output: nothing outside of the round's folder, and no device but by a link.
        os.symlink("/dev/full", directory / "full")
        os.mkfifo(directory / "pipe")
        texts = ". full pipe \x1b[31m é -- - %s model.safetensors meta.jsonl out nowhere/x cuda:99 t1 , t1,,t2".split()
        texts += ["", " ", "a\nb", b"\xff\xfe", "a" * 5000]
        for _ in range(r.randrange(1, 3)):
            option = r.choice(known)
            value = r.choice(numbers if r.random() < 0.6 else texts)
            if option in arguments:
                at = arguments.index(option)
                del arguments[at : at + 2]
            arguments += [option, value]
        # What was asked for may take its time: so long as it is not silent, it is at work.
        result = run([self.place.edm2k, *arguments], directory, limit=6 * SECONDS, address_space=4 * BYTES, processor=SECONDS)
        self.add("odd command lines")
        long = re.search(
            "--(steps|epochs|count|seeds|per-condition|random-conditions|images|size|batch)", str(arguments)
        )
        what = None if result.timed_out and long else complaint(result)
        if not stat.S_ISFIFO(os.stat(directory / "pipe").st_mode) or not (directory / "full").is_symlink():
            self.fail("options", number, f"a pipe or a device was replaced: {arguments}"[:600])
        if what:
            self.add(what.kind)
            self.fail("options", number, f"{what.text}: {arguments}"[:600], result.text[:2000])
        shutil.rmtree(directory)


NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**32, 2**24]
DIGITS = b"""0 -1 1e999 18446744073709551615 9223372036854775807 4294967296 1048576 1.5 65536 null "1" [1]
    99999999999999999999999""".split()
WORDS = [b'""', b'"\\u0000"', b'"' + b"x" * 4000 + b'"', b"null", b"0", b'"\\u001b[2J\\n"', b"{}", b"[]"]


def mutate(r, data):
    """A few changes, most of them near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 3, 8])):
        n = len(data)
        if n == 0:
            break
        at = r.randrange(min(n, 2048)) if r.random() < 0.7 else r.randrange(n)
        length = min(n - at, int(2 ** r.uniform(0, 12)))
        kind = r.randrange(10)
        if kind == 0:
            data[at] ^= 1 << r.randrange(8)
        elif kind == 1:
            data[at] = r.choice([0, 0xFF, 0x7F, 0x80, r.randrange(256)])
        elif kind == 2:
            width, order = r.choice("HIQ"), r.choice("<>")
            value = struct.pack(order + width, r.choice(NUMBERS) % (1 << 8 * struct.calcsize(width)))
            data[at : at + len(value)] = value
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6:
            data[at:at] = r.randbytes(min(length, 64))
        elif kind == 7:
            data[at : at + length] = bytes(length)
        else:
            found = list(re.finditer(rb"\d+" if kind == 8 else rb'"[^"]*"', data[: 1 << 14]))
            if found:
                match = r.choice(found)
                other = DIGITS if kind == 8 else [*WORDS, r.choice(found).group()]
                data[match.start() : match.end()] = r.choice(other)
    return bytes(data)


def whole_archive(path):
    """Whether the contents of a zip's entries have their checksums, as far as Python's reader comes to them."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception:
        return True
    with archive:
        for entry in archive.infolist():
            try:
                archive.read(entry)
            except Exception as why:
                # Of a name beside the contents, which is not that of the directory, it says something else.
                if "CRC" in str(why):
                    return False
    return True


def with_checksums(data):
    """The same PNG with the checksums of its chunks right, so that what is behind them is reached."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        if at + 12 + length > len(data):
            break
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edm2k", nargs="?", default=ROOT / "target/release/edm2k", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SHARES))
    parser.add_argument("--round", type=int)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    parts = args.only.split(",")
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):
        if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.environ.update(RAYON_NUM_THREADS="1", RUST_BACKTRACE="0")
    # In memory, where there is such a place: a process is killed all the same, and syncing takes no time.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="edm2k-hard-", dir=memory) as directory:
        (Path(directory) / "place").mkdir()
        (Path(directory) / "rounds").mkdir()
        campaign = Campaign(
            Place(args.edm2k.resolve(), Path(directory) / "place"), args.seed, Path(directory) / "rounds"
        )
        for part in parts:
            seconds = 60 * args.minutes * SHARES[part] / sum(SHARES[p] for p in parts)
            end = time.monotonic() + seconds
            numbers = iter([args.round] if args.round is not None else range(1 << 60))

            def work(part=part, end=end, numbers=numbers, turn=threading.Lock()):
                while time.monotonic() < end:
                    with turn:
                        number = next(numbers, None)
                    if number is None:
                        return
                    getattr(campaign, part)(number, random.Random(f"{args.seed} {part} {number}"))

            with ThreadPoolExecutor(args.jobs) as pool:
                for future in [pool.submit(work) for _ in range(args.jobs)]:
                    future.result()
    c = campaign.count
    print(
        f"{c['kills of train']} training runs and {c['kills of others']} other commands killed, "
        f"{c['signals']} signals sent, {c['ranks killed']} ranks killed and {c['ranks stopped']} stopped, "
        f"{c['full disks']} disks full: {c['lost']} lost, {c['different']} different"
    )
    print(f"{c['pairs of writers']} pairs of writers: {c['half files']} half files under a final name")
    print(
        f"{c['damaged files']} damaged files ({c['refused']} refused), {c['odd command lines']} odd command lines: "
        f"{c['panics']} panics, "
        f"{c['aborts']} aborts, {c['over 10 s']} over {SECONDS} s, {c['over 2 GB']} over 2 GB, "
        f"{c['bad messages']} with a bad message"
    )
    print(f"{len(campaign.failures)} failures")
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
