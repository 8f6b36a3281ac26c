#!/bin/sh
# Usage: build-busybox.sh SOURCE_TARBALL CONFIG_FRAGMENT WORK_DIR OUTPUT
# The guest's busybox: static, with the applets that busybox.config leaves.
set -eu
source_tarball=$1 config=$2 work=$3 output=$4

mkdir -p "$work"
tar -C "$work" --strip-components=1 -xf "$source_tarball"
cd "$work"
# Reproducible: the build's time is part of the banner.
export LC_ALL=C SOURCE_DATE_EPOCH=0 KCONFIG_NOTIMESTAMP=1
make -s defconfig >make.log 2>&1
symbols=$(sed -n 's/^\(CONFIG_[A-Z0-9_]*\)=.*/\1/p' "$config")
for symbol in $symbols; do
    sed -i "/^$symbol=/d; /^# $symbol is not set/d" .config
done
sed -n 's/^\(CONFIG_[A-Z0-9_]*\)=n$/# \1 is not set/p; /^CONFIG_[A-Z0-9_]*=[^n]/p' "$config" >>.config
yes '' | make -s oldconfig >>make.log 2>&1

# A line that Kconfig dropped is a mistake in the fragment, never a detail.
wrong=$(grep -E '^CONFIG_[A-Z0-9_]+=' "$config" | while IFS='=' read -r symbol value; do
    if [ "$value" = n ]; then grep -q "^$symbol=" .config && echo "$symbol=n"; else
        grep -qxF "$symbol=$value" .config || echo "$symbol=$value"; fi; done || true)
if [ -n "$wrong" ]; then
    printf 'busybox config: these lines did not survive oldconfig:\n%s\n' "$wrong" >&2
    exit 1
fi
make -s -j"$(nproc)" busybox >>make.log 2>&1 || { tail -n 40 make.log >&2; exit 1; }
strip -s -o "$output.tmp" busybox_unstripped
mv "$output.tmp" "$output"
