#!/bin/sh
# Makes sdist and wheel of a tree, a copy whose permissions it sets: the same bytes in any folder, at any time and under any umask.
#     sh deploy/distributions.sh TREE OUT [OPTION…]      options are those of `python -m build`
set -eu
: "${SOURCE_DATE_EPOCH:?}"
PYTHON=${PYTHON:-python3}
tree=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
# In the wheel setuptools leaves data files as they were, and makes those of Python anew.
chmod -R u=rwX,go=rX "$tree"
umask 022
"$PYTHON" -m build --outdir "$out" "$@" "$tree"

# setuptools leaves the time of the build in the sdist.
cd "$out"
sdist=$(basename kvcensus-*.tar.gz .tar.gz)
tar -xzf "$sdist.tar.gz"
rm "$sdist.tar.gz"
tar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -cf "$sdist.tar" "$sdist"
gzip -n -9 "$sdist.tar"
rm -r "$sdist"
