#!/bin/sh
# Usage: build-initramfs.sh AGENT TOOLS BUSYBOX OUTPUT
# An uncompressed cpio archive (unpacking costs boot time) with the agent as /init, the program that it
# starts for HTML and HTTP, and busybox.
set -eu
agent=$(realpath "$1") tools=$(realpath "$2") busybox=$(realpath "$3") output=$(realpath -m "$4")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cd "$root"
mkdir -p bin usr/lib usr/local/bin usr/local/sbin dev proc sys tmp run data mnt root home etc opt srv
mkdir -p var/cache var/lib var/log var/tmp
# One folder of programs by all its names, as in distributions.
ln -s bin sbin
ln -s ../bin usr/bin
ln -s ../bin usr/sbin
ln -s ../run var/run
ln -s ../run/lock var/lock
chmod 755 .
chmod 700 root
chmod 1777 var/tmp
cp "$agent" init
cp "$tools" usr/lib/microvm-tools
cp "$busybox" bin/busybox
chmod 755 init usr/lib/microvm-tools bin/busybox
for applet in $("$busybox" --list); do
    [ "$applet" = busybox ] || ln -s busybox "bin/$applet"
done
echo 'root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false' >etc/passwd
echo 'root:x:0:
tty:x:5:
nogroup:x:65534:' >etc/group
echo 'passwd: files
group: files
hosts: files dns' >etc/nsswitch.conf
echo '/bin/sh' >etc/shells
echo 'ID=microvm
NAME="microVM guest"
PRETTY_NAME="microVM guest (busybox)"' >etc/os-release
ln -s ../proc/self/mounts etc/mtab
# Of a VM without a network; one with a network has its name servers here.
: >etc/resolv.conf
# The kernel opens this before PID 1 mounts anything.
mknod dev/console c 5 1
find . -exec touch -h -d @0 {} +
find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible >"$output"
