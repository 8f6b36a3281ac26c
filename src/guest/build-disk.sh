#!/bin/sh
# Usage: build-disk.sh OUTPUT
# The small ext4 file system that every VM's disk begins as; the agent grows it to the disk's size. No journal: the disk
# lives as long as its VM. meta_bg lets it grow without reserved blocks, to any size.
set -eu
output=$1
rm -f "$output"
truncate --size=8M "$output"
mke2fs -q -t ext4 -b 4096 -I 256 -N 4096 -m 0 -O ^has_journal,^resize_inode,meta_bg \
    -E lazy_itable_init=1,nodiscard,hash_seed=00000000-0000-4000-8000-000000000001,root_owner=0:0 \
    -U 00000000-0000-4000-8000-000000000002 "$output"
