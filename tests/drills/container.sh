#!/bin/bash
# Builds the image without a container engine, and runs it as a pod would, with a read-only root, as its own user, in a network
# of its own: needs root, and Debian's buildah and mmdebstrap. The base is made of Debian's packages and not the official
# Python image, which needs a registry.  bash tests/drills/container.sh [WORK_DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:-$(mktemp -d)}
mkdir -p "$work"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }

[ -e "$work/base.tar" ] ||
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$work/base.tar"
base=$(buildah from scratch)
buildah add --quiet "$base" "$work/base.tar" / >/dev/null
if [ -n "${PIP_CERT:-}" ]; then # of a proxy that this machine is behind
    buildah copy --quiet "$base" "$PIP_CERT" /etc/ssl/certs/pip.crt >/dev/null
    buildah config --env PIP_CERT=/etc/ssl/certs/pip.crt "$base"
fi
buildah commit --quiet --rm "$base" localhost/python:debian >/dev/null
buildah build --quiet --pull-never --build-arg PYTHON_IMAGE=localhost/python:debian \
    --file deploy/container/Containerfile --tag localhost/kvcensus:drill . >/dev/null

echo "== as buildah runs it"
container=$(buildah from localhost/kvcensus:drill)
buildah run "$container" -- id -u
buildah run "$container" -- kvcensus --version
buildah run "$container" -- python3 -c 'import libvalkey, lmdb, nkeys, rocksdict, zmq; print("every backend can be imported")'
buildah inspect --type image --format '{{.OCIv1.Config.User}} {{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.StopSignal}}{{println}}' \
    localhost/kvcensus:drill

echo "== as a pod runs it"
root=$(buildah mount "$container")
export root
unshare --mount --net --pid --fork --propagation private bash -euo pipefail <<'INSIDE'
mount --bind "$root" "$root"
mount -t tmpfs -o mode=0777 data "$root/var/lib/kvcensus"
mount -t proc proc "$root/proc"
mount -o remount,bind,ro "$root"
python3 - <<'LOOPBACK'
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))
LOOPBACK
env -i PATH=/opt/kvcensus/bin:/usr/bin:/bin:/usr/sbin chroot --userspec=10001:10001 --groups= "$root" \
    setpriv --no-new-privs --inh-caps=-all \
    kvcensus run --engine=tcp://127.0.0.1:5557 --data-dir=/var/lib/kvcensus --http=0.0.0.0:9480 &
daemon=$!
for _ in $(seq 300); do
    status=$(python3 -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:9480/livez").status)' 2>/dev/null) && break
    sleep 0.2
done
echo "/livez $status"
chroot --userspec=10001:10001 --groups= "$root" /bin/sh -c 'touch /tmp/x' 2>&1 && exit 1
kill -TERM "$daemon"
wait "$daemon"
echo "ended with 0"
INSIDE
buildah umount "$container" >/dev/null
buildah rm "$container" >/dev/null
