#!/bin/sh
# Becomes a systemd that boots a copy of this machine, whose changes are in memory and gone with it.
# Run in namespaces of its own: unshare --mount --pid --fork --kill-child --uts --ipc --cgroup sh systemd_host.sh DIRECTORY
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p run/lock before
# Not chroot: a user namespace cannot be made from within one.
pivot_root . before
umount -l /before
# Credentials are mounted outside of the unit that gets them.
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=basic.target --log-target=journal
