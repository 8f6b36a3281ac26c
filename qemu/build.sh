#!/bin/sh
# Build our QEMU and its firmware: static, with only what a microVM needs, unmodified.
# usage: build.sh SOURCE_TARBALL WORK_DIR OUTPUT_DIR
# OUTPUT_DIR gets bin/, share/qemu/ and licences/. Meson and what QEMU's configure wants beside it come from qemu/tools.txt.
set -eu

source_tarball=$(realpath "$1") work=$(realpath -m "$2") output=$(realpath -m "$3")
here=$(dirname "$(realpath "$0")")
# What is linked in.
libraries="libc6-dev libglib2.0-dev libpcre2-dev libfdt-dev libseccomp-dev zlib1g-dev"

mkdir -p "$work/tree" "$work/build" "$output/bin" "$output/share/qemu" "$output/licences"
tree=$work/tree
tar -C "$tree" --strip-components=1 -xf "$source_tarball"
"${PYTHON:-python3}" -m venv "$work/python"
"$work/python/bin/pip" install -q -r "$here/tools.txt"
run() { "$@" >"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; echo "failed: $*" >&2; exit 1; }; }

# Reproducible: no path and no time of this build in what is built.
export LC_ALL=C SOURCE_DATE_EPOCH=0
cd "$work/build"
cp "$here/devices.mak" "$tree/configs/devices/x86_64-softmmu/microvm.mak"
# Debian's tarball is without the firmware for PCs, which meson wants to unpack even where none is installed.
sed -i 's/^unpack_edk2_blobs = false$/&\nedk2_targets = []/' "$tree/meson.build"
# The firmware is found at ../share/qemu, seen from the program: QEMU's paths are relative to the prefix.
run "$tree/configure" --python="$work/python/bin/python" --disable-download --with-pkgversion=microvm --prefix=/usr \
    --target-list=x86_64-softmmu --static --enable-pie --enable-stack-protector \
    --extra-cflags="-ffile-prefix-map=$tree=. -ffile-prefix-map=$work/build=build" \
    --without-default-features --without-default-devices --with-devices-x86_64=microvm \
    --disable-user --disable-tools --disable-docs --disable-install-blobs --disable-debug-info --enable-trace-backends=nop \
    --enable-tcg --enable-kvm --enable-fdt=system --enable-seccomp
run ninja qemu-system-x86_64
strip -s -o "$output/bin/qemu-system-x86_64" qemu-system-x86_64
run "$work/python/bin/meson" setup "$work/qboot" "$tree/roms/qboot"
run ninja -C "$work/qboot"
install -m 644 "$work/qboot/bios.bin" "$output/share/qemu/qboot.rom"

cp "$tree/COPYING" "$output/licences/QEMU-COPYING"
cp "$tree/COPYING.LIB" "$output/licences/QEMU-COPYING.LIB"
cp "$tree/LICENSE" "$output/licences/QEMU-LICENSE"
cp "$tree/roms/qboot/LICENSE" "$output/licences/qboot-LICENSE"
for library in $libraries; do cp "/usr/share/doc/$library/copyright" "$output/licences/$library"; done
{
    cat "$here/SOURCE.txt"
    sha256sum "$source_tarball" | sed "s/ .*/  qemu_$(cat "$tree/VERSION")+ds.orig.tar.xz (SHA-256)/"
    dpkg-query -W -f '${source:Package} ${source:Version} (${binary:Package})\n' $libraries
} >"$output/licences/SOURCE.txt"
