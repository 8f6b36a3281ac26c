#!/bin/sh
# Usage: fetch-busybox.sh OUTPUT
# Upstream's tarball, as Debian's source package has it: from the mirror that apt is set up with, by an apt configuration of
# our own, as deb-src is not among the default sources. Nothing in /etc is written.
set -eu
version=1.37.0
suite=trixie
sha256=3311dff32e746499f4df0d5df04d7eb396382d7e108bb9250e7b519b837043a4
output=$(realpath -m "$1")

if [ -f "$output" ] && echo "$sha256  $output" | sha256sum --quiet -c - 2>/dev/null; then exit 0; fi
mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n1)
if [ -z "$mirror" ]; then
    echo "busybox $version: apt is set up with no Debian mirror; put busybox_$version.orig.tar.bz2 at $output" >&2
    exit 1
fi
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
# apt drops its privileges for the download.
chmod 755 "$root"
mkdir -p "$root/lists/partial" "$root/archives/partial" "$root/source"
if [ "$(id -u)" = 0 ]; then chown _apt "$root/source" "$root/lists/partial" "$root/archives/partial"; fi
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$root/sources.list"
own="-o Dir::Etc::sourcelist=$root/sources.list -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists=$root/lists
    -o Dir::Cache=$root -o Acquire::Languages=none"
apt-get $own -q update >"$root/log" 2>&1 || { cat "$root/log" >&2; exit 1; }
(cd "$root/source" && apt-get $own -q --tar-only --download-only source "busybox/$suite" >"$root/log" 2>&1) ||
    { cat "$root/log" >&2; exit 1; }
tarball=$root/source/busybox_$version.orig.tar.bz2
if [ ! -f "$tarball" ]; then
    echo "busybox $version: $mirror has another version in $suite: $(ls "$root/source")" >&2
    exit 1
fi
if ! echo "$sha256  $tarball" | sha256sum --quiet -c -; then
    echo "busybox $version: the tarball from $mirror is not the one that this repository was tried with ($sha256)" >&2
    exit 1
fi
mkdir -p "$(dirname "$output")"
cp "$tarball" "$output.tmp"
mv "$output.tmp" "$output"
