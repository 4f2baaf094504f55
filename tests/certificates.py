"""Certificates for tests: an authority in a folder, and what it signs for each role."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.security.tls import WORKER_NAME

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates for identities. What it writes goes into one folder."""

    def __init__(self, folder: Path, name: str = "baton test authority") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(self._name, self._key.public_key(), expired=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = folder / "ca.crt"
        self.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, role: str, *, file: str = "", uri: str | None = None, expired: bool = False) -> tuple[Path, Path]:
        """Certificate and key for a role. Those of workers carry the name that clients ask for."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri or f"spiffe://baton/role/{role}")]
        if role in ("prefill", "decode", "aggregated"):
            names.append(x509.DNSName(WORKER_NAME))
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
        certificate = (
            self._builder(subject, key.public_key(), expired=expired)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(usages, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        at = self.folder / f"{file or role}.crt", self.folder / f"{file or role}.key"
        at[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        at[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        at[1].chmod(0o600)
        return at

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, expired: bool) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now - DAY if expired else now + DAY)
        )
