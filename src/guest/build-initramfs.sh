#!/bin/sh
# Usage: build-initramfs.sh AGENT OUTPUT
# An uncompressed cpio archive (unpacking costs boot time) with the agent as /init and busybox for its tools.
set -eu
agent=$(realpath "$1") output=$(realpath -m "$2")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cd "$root"
mkdir -p bin sbin usr/bin usr/sbin dev proc sys tmp run data mnt root etc var
chmod 755 .
cp "$agent" init
cp /bin/busybox bin/busybox
chmod 755 init bin/busybox
for applet in $(/bin/busybox --list); do
    [ "$applet" = busybox ] || ln -s busybox "bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false' >etc/passwd
echo 'root:x:0:
nogroup:x:65534:' >etc/group
# The kernel opens this before PID 1 mounts anything.
mknod dev/console c 5 1
find . -exec touch -h -d @0 {} +
find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible >"$output"
