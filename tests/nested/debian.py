"""Debian's packages, downloaded once and unpacked into a folder: nothing is installed."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import List, Sequence

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def unpacked(cache: Path, name: str, packages: Sequence[str], options: Sequence[str] = ()) -> Path:
    """The folder ``name`` in the cache, with the packages' files; ``options`` are apt's, and say from where."""
    folder = cache / name
    if folder.is_dir():
        return folder
    partial = cache / (name + ".partial")
    shutil.rmtree(str(partial), ignore_errors=True)
    partial.mkdir(parents=True)
    subprocess.run(["apt-get", *options, "download", *packages], cwd=str(partial), check=True)
    for package in partial.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(partial)], check=True)
        package.unlink()
    partial.rename(folder)
    return folder


def backports(cache: Path) -> List[str]:
    """Options that let apt see this release's backports and nothing else."""
    return suite(cache, "{}-backports")


def suite(cache: Path, name: str) -> List[str]:
    """Options that let apt see a suite and nothing else, ``{}`` is this release's name; the host's own lists stay as they are."""
    target = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Component: main"]
    listed = subprocess.run(target, stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    found = re.search(r"^(\S+) ([a-z]+)$", listed, re.MULTILINE)
    if found is None:
        raise RuntimeError("apt knows no release of Debian: run apt-get update")
    name = name.format(found.group(2))
    folder = cache / "apt" / name
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    sources.write_text("deb [signed-by={}] {} {} main\n".format(KEYRING, found.group(1), name))
    settings = (
        ("Dir::Etc::SourceList", sources),
        ("Dir::Etc::SourceParts", "-"),
        ("Dir::State::Lists", folder / "lists"),
        ("Dir::Cache", folder),
        # The lists of a release that is not changed any more have expired.
        ("Acquire::Check-Valid-Until", "false"),
        # Else a suite that is not there leaves apt with an empty list and no error.
        ("APT::Update::Error-Mode", "any"),
    )
    options = ["--option={}={}".format(name, value) for name, value in settings]
    if subprocess.run(["apt-get", *options, "update", "-q"]).returncode != 0:
        raise RuntimeError("apt finds no {} at {}".format(name, found.group(1)))
    return options
