#!/bin/sh
# Usage: build-disk.sh OUTPUT
# The small ext4 file system that every VM's disk begins as; the agent grows it to the disk's size. No journal: the disk
# lives as long as its VM. meta_bg lets it grow without reserved blocks, to any size. The folders that the agent mounts
# elsewhere are there: to make them would cost each boot some milliseconds.
set -eu
output=$1
rm -f "$output"
truncate --size=8M "$output"
mke2fs -q -t ext4 -b 4096 -I 256 -N 4096 -m 0 -O ^has_journal,^resize_inode,meta_bg \
    -E lazy_itable_init=1,nodiscard,hash_seed=00000000-0000-4000-8000-000000000001,root_owner=0:0 \
    -U 00000000-0000-4000-8000-000000000002 "$output"
commands=$(mktemp)
trap 'rm -f "$commands"' EXIT
cat >"$commands" <<END
mkdir /.system
mkdir /.system/home
mkdir /.system/root
mkdir /.system/tmp
set_inode_field / mode 041777
set_inode_field /.system mode 040755
set_inode_field /.system/home mode 040755
set_inode_field /.system/root mode 040700
set_inode_field /.system/tmp mode 041777
END
said=$(debugfs -w -f "$commands" "$output" 2>&1 | grep -v -e '^debugfs' -e '^Allocated inode' || true)
if [ -n "$said" ]; then
    echo "debugfs: $said" >&2
    exit 1
fi
checked=$(e2fsck -fn "$output" 2>&1) || { echo "$checked" >&2; exit 1; }
