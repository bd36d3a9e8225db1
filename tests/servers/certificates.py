"""Certificates for tests: an authority of their own, one certificate for the brokers and one for a client."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make(folder: Path) -> None:
    """Write ca.pem, broker.pem (key and chain), alice.pem and alice.key, valid for a few days."""
    folder.mkdir()
    authority = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "7", "-subj", "/CN=unlost test authority"]
    _openssl(folder, *authority, "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("broker", "alice"):
        request = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
        _openssl(folder, *request, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        sign = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        _openssl(folder, *sign, "-days", "7", "-extfile", "names", "-out", f"{name}.pem")
    own = (folder / "broker.pem").read_text()
    (folder / "broker.pem").write_text((folder / "broker.key").read_text() + own + (folder / "ca.pem").read_text())


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} ended with {done.returncode}\n{done.stderr}")
