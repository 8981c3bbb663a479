"""The certificate authority of a federation: its own certificate, the server's, and key pairs for sites."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from maskdm.errors import UsageError
from maskdm.run.runfolder import atomic_write

Key = ec.EllipticCurvePrivateKey

AUTHORITY_DAYS = 3650
# Clocks differ; a certificate counts from a little before it was made.
EARLIER = timedelta(hours=1)
# The server itself, and health checks, reach it on its own machine.
OWN_NAMES = ("localhost", "127.0.0.1")


def new_key() -> Key:
    """NIST P-384, the curve that Flower wants of a node's key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_bytes(key: Key) -> bytes:
    """PEM, PKCS 8, without a passphrase: servers start unattended."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def site_key_bytes(key: Key) -> bytes:
    """OpenSSH, as Flower's nodes read it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def site_public_key(key: Key) -> str:
    """One line of OpenSSH."""
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def write_private(path: Path, content: bytes) -> None:
    """A file that only this user can read, in a folder that is made so too."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(path, content, private=True)


def load_authority(folder: Path) -> tuple[Key, x509.Certificate]:
    """The key and the certificate in a folder.

    Raises:
        UsageError: one is missing or unreadable.
    """
    try:
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--out: the authority in {folder} cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise UsageError(f"--out: {folder}/ca.key does not belong to ca.crt: put the right one there")
    return key, certificate


def make_authority(folder: Path) -> None:
    """Make a new one; its key is the federation's most precious file."""
    key, now = new_key(), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MaskDM federation authority")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key, now, timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_private(folder / "ca.key", key_bytes(key))
    atomic_write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def server_certificate(authority: tuple[Key, x509.Certificate], key: Key, names: Sequence[str], days: int) -> bytes:
    """A certificate for a server that is reached by these names and addresses (PEM)."""
    signer, issuer = authority
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, issuer.subject, key, datetime.now(UTC), timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([general_name(name) for name in dict.fromkeys((*names, *OWN_NAMES))]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def general_name(name: str) -> x509.GeneralName:
    """A host name or an IP address, as a certificate names it."""
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + lifetime)
    )


def _usage(**uses: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: uses.get(name, False) for name in names})
