#!/bin/sh
# Build the guest's vmlinux from Debian's linux-source package.
# usage: build-kernel.sh SOURCE_TARBALL CONFIG_FRAGMENT WORK_DIR OUTPUT
set -eu

source_tarball=$1 config=$2 work=$3 output=$4

mkdir -p "$work/tree"
# GNU tar keeps the archive's single top folder out of the path.
tar -C "$work/tree" --strip-components=1 -xf "$source_tarball"

cd "$work/tree"
# Reproducible: no build host, user or time in the image.
export KBUILD_BUILD_USER=build KBUILD_BUILD_HOST=microvm KBUILD_BUILD_TIMESTAMP='1970-01-01' LC_ALL=C
make -s tinyconfig
./scripts/kconfig/merge_config.sh -m .config "$config" >"$work/merge.log"
make -s olddefconfig

# A fragment line that Kconfig dropped is a mistake in the fragment, never a detail.
missing=$(grep -E '^CONFIG_[A-Z0-9_]+=[^n]' "$config" | while IFS= read -r line; do
    grep -qxF "$line" .config || printf '%s\n' "$line"
done)
if [ -n "$missing" ]; then
    printf 'kernel config: these lines did not survive olddefconfig:\n%s\n' "$missing" >&2
    exit 1
fi

make -s -j"$(nproc)" vmlinux
strip -s -o "$output.tmp" vmlinux
mv "$output.tmp" "$output"
