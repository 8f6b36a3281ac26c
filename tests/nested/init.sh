#!/bin/busybox sh
# PID 1 of the lab's guest, in its initramfs: modules, then the host's root, read-only, below a layer that is memory.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /lower /layer /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" 2>/dev/null || echo "lab: $module was not loaded"
done </modules/order
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 root /lower
mount -t tmpfs -o size=80%,mode=755 layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root
for memory in /run /tmp /var/tmp /var/cache /dev/shm; do
    [ "$memory" = /dev/shm ] || { mkdir -p "/root$memory"; mount -t tmpfs -o mode=1777 tmp "/root$memory"; }
done
chmod 755 /root/run
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
mkdir -p /root/dev/pts /root/dev/shm /root/run/lab
mount -t devpts -o mode=620,ptmxmode=666 pts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t cgroup2 -o nosuid,nodev,noexec cgroup /root/sys/fs/cgroup
mount -t 9p -o rw,trans=virtio,version=9p2000.L,msize=512000 lab /root/run/lab
# As udev leaves them: a group's device, and everybody's.
[ ! -e /root/dev/kvm ] || { chown 0:104 /root/dev/kvm; chmod 660 /root/dev/kvm; }
[ ! -e /root/dev/net/tun ] || chmod 666 /root/dev/net/tun
ip link set lo up
hostname lab
exec switch_root /root /bin/sh /run/lab/main.sh
