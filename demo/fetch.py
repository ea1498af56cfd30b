#!/usr/bin/env python3
"""Fetches the demo's images and tags: Noto emoji with their English names.

Two npm packages, by the ordinary client (`npm pack`, which checks their integrity):

  emoji-datasource-google 16.0.0   img/google/64: 3,786 PNGs of 64x64 (Noto emoji, Apache-2.0)
  emojibase-data          17.0.0   en/data.json: names, keywords, groups, skin tones (MIT)

Writes cache/emoji/*.png and cache/emoji.jsonl beside this script, one line an image:
{"id", "file", "tags", "flip", "repeats"}. Ids count the emoji in the order of their code points.

Tags are chosen so that each one is something to be seen, and one word stays one thing
wherever it occurs:
  the words of the name                 "red", "heart", "grinning", "face"
  keywords, but not of people, where    "smile", "farm"
  they name moods that no picture shows
  group: ..., subgroup: ...             "group: food & drink", "subgroup: food fruit"
  skin tone                             "medium skin tone", or "yellow skin tone" where an
                                        emoji that has tones comes without one
  gender, where the data say so         "female", "male"

"flip" says that the mirrored image would have the same tags and look right. It errs on
the side of no: text, clocks, arrows, moon phases, maps, flags, hands, notes are not
flipped.

"repeats" balances what there are many of: people come in so many skin tones and hair colours
that everything else, but for the flags, is shown four times for each time that they are.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"
IMAGES = ("emoji-datasource-google", "16.0.0")
NAMES = ("emojibase-data", "17.0.0")

TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
GENDERS = {0: "female", 1: "male"}
SMALL_WORDS = {"with", "of", "and", "the", "in", "on", "at", "a", "an", "for", "from", "to"}

# Subgroups whose emoji may be mirrored, but for the words below.
FLIP = set(
    """
    face-smiling face-affection face-tongue face-neutral-skeptical face-sleepy face-unwell
    face-hat face-glasses face-concerned face-negative face-costume cat-face monkey-face heart
    emotion person person-gesture person-role person-fantasy person-activity person-sport
    person-resting family animal-mammal animal-bird animal-amphibian animal-reptile
    animal-marine animal-bug plant-flower plant-other food-fruit food-vegetable food-prepared
    food-asian food-sweet drink dishware place-geographic place-other transport-ground
    transport-water transport-air hotel sky-weather event sport arts-crafts clothing
    musical-instrument light-video lock tool medical household geometric
    """.split()
)
KEEP = re.compile(
    r"""\b( left | right | leftwards | rightwards | arrow | pointing | clock | oclock | watch
    | thirty | moon | map | letter | speech | zzz | hundred | anger | symbols | steering
    | taxi | police | bus | minibus | trolleybus | ambulance | fire\ engine | stop | sign
    | fuel | motorway | ticket | tickets | envelope | keyboard | keys | slot | salt | hotel
    | barber | receipt | camera | calendar | exit | dragon\ face | fish\ cake | roller
    | hot\ springs | saluting | carp\ streamer | dotted | soap | thermometer | money | cyclone
    | takeout | white\ flower | x-ray | kimono | martial | lollipop
    )\b""",
    re.X | re.I,
)


def pack(name, version):
    """The package's tarball, fetched once."""
    tarball = CACHE / f"{name}-{version}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("fetch.py: error: npm is needed to fetch the emoji; install Node.js")
    print(f"fetching {name} {version}")
    command = [npm, "pack", "--silent", "--pack-destination", str(CACHE), f"{name}@{version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not tarball.exists():
        sys.exit(f"fetch.py: error: {' '.join(command)}: {done.stderr.strip() or done.stdout}")
    return tarball


def read_json(tarball, member):
    with tarfile.open(tarball) as tar:
        return json.load(tar.extractfile(f"package/{member}"))


def check_version(tarball, version):
    found = read_json(tarball, "package.json")["version"]
    if found != version:
        sys.exit(f"fetch.py: error: {tarball}: version {found}, expected {version}")


def code_points(hexcode):
    """Code points without the variation selector, which the two packages treat differently."""
    return tuple(int(part, 16) for part in hexcode.split("-") if part.lower() != "fe0f")


def words(label):
    label = re.sub(r"(medium-light|medium-dark|light|medium|dark) skin tone", " ", label)
    label = label.lower().replace("“", " ").replace("”", " ")
    found = re.findall(r"[\w'#*+.-]*\w[\w'#*+-]*|#|\*", label)
    return [word for word in found if word not in SMALL_WORDS]


def describe(emoji, variant, meta):
    """Tags of a variant (skin tone) of an emoji, or of the emoji itself."""
    tags = words(emoji["label"])
    if "group" in emoji:
        group = meta["groups"][str(emoji["group"])].replace("-", " & ")
        subgroup = meta["subgroups"][str(emoji["subgroup"])].replace("-", " ")
        tags += [f"group: {group}", f"subgroup: {subgroup}"]
        if group != "people & body":
            tags += [tag.lower().replace(",", " ") for tag in emoji.get("tags", [])]
    if "gender" in emoji:
        tags.append(GENDERS[emoji["gender"]])
    tones = variant.get("tone")
    if tones is not None:
        tones = tones if isinstance(tones, list) else [tones]
        tags += [f"{TONES[tone]} skin tone" for tone in tones]
    elif "skins" in emoji:
        tags.append("yellow skin tone")
    return sorted({" ".join(tag.replace("’", "'").split()) for tag in tags})


def repeats(tags):
    """How often an epoch shows an image."""
    return 1 if {"group: people & body", "group: flags"} & set(tags) else 4


def flip(emoji, meta, directed):
    """`directed`: names of emoji that also exist facing the other way."""
    if "subgroup" not in emoji or emoji["label"] in directed:
        return False
    text = " ".join([emoji["label"]] + emoji.get("tags", []))
    return meta["subgroups"][str(emoji["subgroup"])] in FLIP and not KEEP.search(text)


def main():
    CACHE.mkdir(exist_ok=True)
    images, names = pack(*IMAGES), pack(*NAMES)
    check_version(images, IMAGES[1])
    check_version(names, NAMES[1])
    data = read_json(names, "en/data.json")
    meta = read_json(names, "meta/groups.json")
    known = {}
    for emoji in data:
        for variant in [emoji] + emoji.get("skins", []):
            known[code_points(variant["hexcode"])] = (emoji, variant)

    labels = (emoji["label"] for emoji in data)
    directed = {label.split(":")[0] for label in labels if label.endswith("facing right")}

    folder = CACHE / "emoji"
    folder.mkdir(exist_ok=True)
    files = {}
    with tarfile.open(images) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and str(path.parent) == "package/img/google/64":
                (folder / path.name).write_bytes(tar.extractfile(member).read())
                files[code_points(path.stem)] = path.name

    lines = []
    for number, (code, name) in enumerate(sorted(files.items())):
        if code not in known:
            sys.exit(f"fetch.py: error: {name} has no entry in {NAMES[0]}")
        emoji, variant = known[code]
        tags = describe(emoji, variant, meta)
        record = {
            "id": number,
            "file": name,
            "tags": tags,
            "flip": flip(emoji, meta, directed),
            "repeats": repeats(tags),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    target = CACHE / "emoji.jsonl"
    target.with_suffix(".tmp").write_text("".join(lines), encoding="utf-8")
    target.with_suffix(".tmp").rename(target)
    flips = sum('"flip": true' in line for line in lines)
    print(f"{target}: {len(lines)} images, {flips} of them may be mirrored")


if __name__ == "__main__":
    main()
