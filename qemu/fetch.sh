#!/bin/sh
# Usage: fetch.sh OUTPUT
# QEMU's source as Debian's source package has it (upstream's tarball without its firmware), out of the pool of the mirror that
# apt is set up with. The pool has a version for as long as any suite does: a point release may take it away.
set -eu
version=10.0.13
sha256=6a0888e806c2ffc0c5f0733e974f9aea55491950d3c47c98669c8b236dde59ae
tarball=qemu_$version+ds.orig.tar.xz
output=$(realpath -m "$1")

if [ -f "$output" ] && echo "$sha256  $output" | sha256sum --quiet -c - 2>/dev/null; then exit 0; fi
by_hand="https://snapshot.debian.org/package/qemu keeps every version: put $tarball at $output, or set another version and
its SHA-256 in qemu/fetch.sh"
mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n1)
if [ -z "$mirror" ]; then
    echo "QEMU $version: apt is set up with no Debian mirror. $by_hand" >&2
    exit 1
fi
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
# apt drops its privileges for the download.
chmod 755 "$root"
mkdir "$root/pool"
if [ "$(id -u)" = 0 ]; then chown _apt "$root/pool"; fi
if ! /usr/lib/apt/apt-helper download-file "${mirror%/}/pool/main/q/qemu/$tarball" "$root/pool/$tarball" "SHA256:$sha256" \
    >"$root/log" 2>&1; then
    cat "$root/log" >&2
    echo "QEMU $version: $mirror does not have it any more, or as another file than the one that this repository was tried with." \
        "$by_hand" >&2
    exit 1
fi
mkdir -p "$(dirname "$output")"
cp "$root/pool/$tarball" "$output.tmp"
mv "$output.tmp" "$output"
