#!/usr/bin/env python3
"""Makes a wheel of the executable: scripts/wheel.py target/release/edm2k target/wheel

`pip install` then puts `edm2k` on the PATH. Nothing in it is Python's; so one wheel serves every version. On Linux its tag
says which C library it needs at least: the executable's own symbol versions say that, as readelf shows them. Of an
executable for Windows, edm2k.exe, it makes a wheel too; nobody has installed one yet.
"""

import base64
import hashlib
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

# The libraries that manylinux allows, of those that a program of Rust's may need.
ALLOWED = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1",
           "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def readelf(option, path):
    return subprocess.run(["readelf", "--wide", option, path], check=True, capture_output=True, text=True).stdout


def platform(path):
    """The platform tag, such as manylinux_2_34_x86_64."""
    if path.suffix == ".exe":
        return "win_amd64"
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", path)))
    if needed - ALLOWED:
        sys.exit(f"wheel: {path} needs {sorted(needed - ALLOWED)}, which manylinux does not promise")
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", readelf("--version-info", path))
    major, minor = max((int(major), int(minor)) for major, minor in versions)
    machine = {"Advanced Micro Devices X86-64": "x86_64", "AArch64": "aarch64"}
    [name] = re.findall(r"Machine:\s+(.*)", readelf("--file-header", path))
    return f"manylinux_{major}_{minor}_{machine[name]}"


def stripped(program, aside):
    """What an executable of Linux is without its symbols."""
    subprocess.run(["strip", "-o", aside, program], check=True)
    binary = aside.read_bytes()
    aside.unlink()
    return binary


def main():
    program, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    root = pathlib.Path(__file__).resolve().parent.parent
    package = tomllib.loads((root / "Cargo.toml").read_text("utf-8"))["package"]
    name, version = package["name"], package["version"]
    tag = f"py3-none-{platform(program)}"
    out.mkdir(parents=True, exist_ok=True)
    binary = program.read_bytes() if program.suffix == ".exe" else stripped(program, out / "stripped")

    about = f"{name}-{version}.dist-info"
    metadata = f"""Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: {package["description"]}
License: {package["license"]}
Requires-Python: >=3.8
Description-Content-Type: text/markdown

{(root / "README.md").read_text("utf-8")}"""
    wheel = f"Wheel-Version: 1.0\nGenerator: scripts/wheel.py\nRoot-Is-Purelib: false\nTag: {tag}\n"
    files = [
        (f"{name}-{version}.data/scripts/{name}{program.suffix}", binary, 0o755),
        (f"{about}/METADATA", metadata.encode(), 0o644),
        (f"{about}/WHEEL", wheel.encode(), 0o644),
        *((f"{about}/{path.name}", path.read_bytes(), 0o644) for path in sorted(root.glob("LICENSE-*"))),
    ]
    record = ""
    for path, data, _ in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(data)}\n"
    record += f"{about}/RECORD,,\n"
    files.append((f"{about}/RECORD", record.encode(), 0o644))

    for old in out.glob(f"{name}-*.whl"):
        old.unlink()
    made = out / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path, data, mode in files:
            entry = zipfile.ZipInfo(path)  # of 1980: the same parts make the same wheel
            entry.external_attr = (0o100000 | mode) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")


main()
