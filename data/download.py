"""Download BabyLM's text and BLiMP to data/, clean the text, filter the minimal pairs.

    python data/download.py babylm-2024         the text, raw and cleaned (also: babylm-2023)
    python data/download.py blimp               the pairs, all and those that BabyLM scores
    python data/download.py supplement          BabyLM's own pairs
    python data/download.py clean FROM TO       cleans a folder of text that you have
    python data/download.py filter FROM TO      filters a BLiMP that you have

A download that breaks off stays in NAME.partial. Run the command again to go on.
"""
import functools
import http.client
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import click
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import choobaca as c

PIECE = 2**16           # bytes held at once
ROOM = 4 * 10**9        # bytes unpacked from an archive at most


class Source(NamedTuple):
    """Describe a zip file on the net and the files that we take from it."""
    url: str
    members: dict[str, str]     # our folder: how a member's path ends, its group being our name
    digest: str = ""            # its SHA-256, or MD5 where only that is published; empty: unknown


SOURCES = {                     # the name of a command and of its folder in data/
    "babylm-2023": [Source("https://github.com/babylm/babylm.github.io/raw/main/babylm_data.zip",
                           {"train_10M": r"babylm_10M/(\w+\.train)",
                            "dev": r"babylm_dev/(\w+\.dev)"},
                           "1337771192c61fa38c7eca2ef535f568c19270789b114fe7c60fe23e4314ab57")],
    "babylm-2024": [Source("https://osf.io/download/5mk3x/", {"train_10M": r"(\w+\.train)"},
                           "dc67e5d2db96ed4f76cb072e2504a18c"),
                    Source("https://osf.io/download/m48ed/", {"dev": r"(\w+\.dev)"})],
    "blimp": [Source("https://github.com/alexwarstadt/blimp/raw/"
                     "3e56b06fcabca9b30822fc66435fca6b1aa40bb1/BLiMP.zip",
                     {"": r"data/(\w+\.jsonl)"},
                     "172a1a714d72e72a89e8384dd531483f3d0f8a9aee3d33dccaf7992d8cecbb73")],
    "supplement": [Source("https://files.osf.io/v1/resources/ad7qg/providers/osfstorage/"
                          "66358ec34664da20a0ed6acc/?zip=",
                          {"": r"supplement_filtered/(\w+\.jsonl)"})],
}


def receive(url: str, path: Path) -> None:
    """Download an address to a file, from where the file ends if the server allows it."""
    request = urllib.request.Request(url, headers={"User-Agent": "choobaca"})
    if path.exists():
        request.add_header("Range", f"bytes={path.stat().st_size}-")
    try:
        # Status 206: the server sends what we lack. Otherwise it sends the whole file.
        with urllib.request.urlopen(request, timeout=30) as reply, \
                open(path, "ab" if reply.status == 206 else "wb") as file:
            start = file.tell()
            total = None if reply.length is None else start + reply.length
            with tqdm(desc=url.split("/")[2], initial=start, total=total, unit="B",
                      unit_scale=True, leave=False) as bar:
                while piece := reply.read(PIECE):
                    bar.update(file.write(piece))
            if total not in (None, file.tell()):
                raise ConnectionError(f"it broke off after {file.tell():,} of {total:,} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        # Status 416: the server has no more than we have, which need not be the same. Start anew.
        if getattr(error, "code", 0) == 416:
            path.unlink()
        reason = " ".join(str(error).strip("<>").split())
        raise click.ClickException(f"{url} could not be downloaded: {reason}. Run this again to go "
                                   f"on, or put the file there by hand: {path.with_suffix('')}.")


def fetch(source: Source, path: Path) -> None:
    """Download an archive, unless someone put it there by hand, and check its digest."""
    partial = path.with_name(path.name + ".partial")
    if not path.exists():
        receive(source.url, partial)
    file = path if path.exists() else partial

    # A wrong download is deleted, so the next call starts anew; a file put there by hand stays.
    kind = "sha256" if len(source.digest) == 64 else "md5"
    found = c.file_digest(file, kind) if source.digest else ""
    if found != source.digest:
        partial.unlink(missing_ok=True)
        raise click.ClickException(f"{file} of {source.url} has the {kind} {found}: expected "
                                   f"{source.digest}. Run this again, with the right file or none "
                                   f"as {path}.")
    file.replace(path)


def unpack(path: Path, members: dict[str, str], folder: Path) -> None:
    """Write the wanted members of a zip file into a folder, which no name can leave."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A name of ours is a pattern's group: a word and a suffix, so no slash and no "..".
            wanted = {}
            for info in archive.infolist():
                for part, pattern in members.items():
                    if match := re.fullmatch("(?:.*/)?" + pattern, info.filename):
                        wanted[Path(part, match[1])] = info
            size = sum(info.file_size for info in wanted.values())
            if {name.parent for name in wanted} != set(map(Path, members)) or size > ROOM:
                raise ValueError(f"it holds {len(wanted)} wanted files of {size:,} bytes, expected "
                                 f"{' and '.join(members.values())}, {ROOM:,} bytes at most")
            # Reading a member checks its length and its CRC.
            for name, info in wanted.items():
                with archive.open(info) as member, c.written_whole(folder / name) as file:
                    shutil.copyfileobj(member, file, PIECE)
    except Exception as error:                      # a damaged archive raises a dozen kinds
        raise click.ClickException(f"{path} cannot be unpacked: {str(error) or 'it is cut off'}. "
                                   "Make room if the disk is full, else delete it, and run this "
                                   "again.")


def download(name: str, out: Path | None) -> None:
    """Download and unpack a source, then clean its text or filter its pairs."""
    out = Path(os.path.realpath(out or c.HOME / "data" / name))
    if out.is_file() or any(out.glob("*")):
        click.echo(f"{out} is there already. To download it anew, remove it.")
    else:
        # All archives come first: if one fails, the next call finds the others.
        work = out.with_name(out.name + ".partial")
        work.mkdir(parents=True, exist_ok=True)
        archives = {work / f"{i}.zip": source for i, source in enumerate(SOURCES[name], 1)}
        for path, source in archives.items():
            fetch(source, path)
        with tempfile.TemporaryDirectory(dir=work) as new:
            for path, source in archives.items():
                unpack(path, source.members, Path(new, name))
            Path(new, name).replace(out)
        shutil.rmtree(work)
        sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
        click.echo(f"{out}: {len(sizes)} files, {sum(sizes):,} bytes")

    # An earlier call may have stopped before this point.
    for part in ("train_10M", "dev"):
        if name.startswith("babylm") and not (out / f"{part}-clean").exists():
            rewrite(clean_file, out / part, out / f"{part}-clean")
    filtered = out.with_name(f"{out.name}-filtered")
    if name == "blimp" and not filtered.exists():
        rewrite(filter_file, out, filtered)


def rewrite(change, from_dir: Path, to_dir: Path) -> None:
    """Write what `change` makes of a folder's files into a new folder, which appears at once."""
    kinds = (".train", ".dev", ".txt") if change is clean_file else (".jsonl",)
    paths = [path for path in sorted(from_dir.glob("[!.]*"))
             if path.suffix in kinds and path.is_file()]
    c.need(paths, f"{from_dir} holds no {' or '.join(kinds)}: expected a folder of such files.")
    c.need(not to_dir.exists(), f"{to_dir} is there already: remove it or name another folder.")

    # Fill a temporary folder and rename it, so that an error leaves no half of `to_dir`.
    to_dir.parent.mkdir(parents=True, exist_ok=True)
    lines = 0
    with tempfile.TemporaryDirectory(dir=to_dir.parent, suffix=".partial") as new:
        for path in tqdm(paths, to_dir.name, leave=False, unit=" files"):
            content = change(path)
            lines += len(content.splitlines())
            with c.written_whole(Path(new, to_dir.name, path.name)) as file:
                file.write(content)
        Path(new, to_dir.name).replace(to_dir)
    click.echo(f"{to_dir}: {len(paths)} files, {lines:,} lines")


def lower_capitals(match: re.Match) -> str:
    """Turn a line of capitals, where each I was read as l, into sentences; leave other lines."""
    line = match[0]
    letters = re.sub(r"\(.*?\)|[.!?]", "", line)
    if 2 * sum(map(str.isupper, letters)) < max(1, len(letters)):
        return line
    return "".join(map(str.capitalize, re.split(r"([.!?]\s*)", line.replace("l", "I"))))


SPACES = ((r"[ \t\xa0]+", " "), (r" ([.,;!?])", r"\1"))
CLEANING = {        # what BabyLlama's notebook replaces in BabyLM's files, by their names
    "aochildes": SPACES, "childes": SPACES, "bnc_spoken": SPACES,
    "cbt": (*SPACES, (r"(\w) (['’]\w)", r"\1\2")),
    "open_subtitles": ((r"(?im)^.*subtitle.*$", ""),),              # "Subtitles by ..."
    "qed": ((r".+", lower_capitals),),                              # line by line
    "wikipedia": ((r"= = = (.+?) = = =\n", r"\1"),)}


def clean_file(path: Path) -> bytes:
    """Clean text files by their names. A file without a rule stays as it is."""
    if path.stem not in CLEANING:
        return path.read_bytes()
    try:
        text = path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{path} is not UTF-8: {error}. Save the file as UTF-8.")
    for pattern, new in CLEANING[path.stem]:
        text = re.sub(pattern, new, text)
    return text.encode()


def filter_file(path: Path) -> bytes:
    """Keep the pairs that BabyLM scores. They have none of the words that its corpus lacks."""
    rare = set(Path(__file__).with_name("blimp_rare_words.txt").read_text().split())
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.strip():
            continue
        # A word may have hyphens, as "ex-husbands" has, but "dog's" is two.
        try:
            pair = json.loads(line)
            text = pair["sentence_good"] + " " + pair["sentence_bad"]
            if rare.isdisjoint(re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())):
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise click.ClickException(f"{path}, line {number}: expected a JSON object with "
                                       "strings sentence_good and sentence_bad.")
    return b"".join(kept)


cli = c.Cli(help="Download BabyLM's text and BLiMP, clean the text, filter the pairs.",
            context_settings={"help_option_names": ["-h", "--help"]})
FOLDER = click.Path(path_type=Path)
for verb in SOURCES:
    where = [click.Option(["-o", "--out"], type=FOLDER, help="Make this folder instead.")]
    cli.add_command(click.Command(verb, callback=functools.partial(download, verb), params=where,
                                  help=f"Download {verb} to data/{verb}."))
for verb, change in {"clean": clean_file, "filter": filter_file}.items():
    where = [click.Argument(["from_dir"], type=FOLDER), click.Argument(["to_dir"], type=FOLDER)]
    cli.add_command(click.Command(verb, callback=functools.partial(rewrite, change), params=where,
                                  help=change.__doc__))

if __name__ == "__main__":
    cli()
