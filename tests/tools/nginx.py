"""Run nginx with the configuration that the documentation gives.

In:     `docs/deploy/nginx.conf`; the ports of an app and of realtime servers
Out:    `Nginx`: what a visitor reaches, over TLS, with HTTP/1.1 and HTTP/2
Owns:   one nginx, its files in a directory of the test's, a certificate that no one else trusts
Never:  changes more of the configuration than ports, paths and the account
"""

import datetime
import getpass
import os
import re
import shutil
import signal
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.tools.clock import eventually
from tests.tools.ports import free_port
from tests.tools.servers import PROJECT, Processes, Served

__all__ = ["CONFIGURATION", "Nginx"]

CONFIGURATION = PROJECT / "docs" / "deploy" / "nginx.conf"
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Nginx:
    """nginx in front of an app and realtime servers.

    Attributes:
        url: where a visitor finds all of it
        plain_url: the same over HTTP, which only redirects
        certificate: its file
    """

    def __init__(self, processes: Processes, directory: Path, app_port: int, realtime_ports: Sequence[int]) -> None:
        self._directory = directory / "nginx"
        self._directory.mkdir()
        _write_certificate(self._directory)
        self.certificate = self._directory / "certificate.pem"
        self.port, self.plain_port = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.plain_url = f"http://127.0.0.1:{self.plain_port}"
        self._path = self._directory / "nginx.conf"
        self.set_upstreams(app_port, realtime_ports)
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "no nginx: install it, or run `make test`, which does"
        command = [program, "-c", str(self._path), "-e", str(self._directory / "error.log"), "-g", "daemon off;"]
        self.served: Served = processes.start(command, port=self.port)

    def set_upstreams(self, app_port: int, realtime_ports: Sequence[int]) -> None:
        """Write the configuration; it counts from the next start or `reload`."""
        here = self._directory
        servers = "\n".join(f"server 127.0.0.1:{port} max_fails=0;" for port in realtime_ports)
        substitutions = {
            r"user www-data;": f"user {getpass.getuser()};",
            r"/run/nginx\.pid": f"{here}/nginx.pid",
            r"/var/log/nginx": f"{here}",
            r"server 127\.0\.0\.1:8000;": f"server 127.0.0.1:{app_port};",
            r"server 127\.0\.0\.1:8001 max_fails=0;": servers,
            r"listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            r"listen 443 ": f"listen 127.0.0.1:{self.port} ",
            r"/etc/letsencrypt/live/example\.org/fullchain\.pem": f"{here}/certificate.pem",
            r"/etc/letsencrypt/live/example\.org/privkey\.pem": f"{here}/key.pem",
            # An account that is not root's may not write where Debian's nginx keeps these.
            r"http \{": "http {\n" + "".join(f"{name}_temp_path {here}/{name};\n" for name in _TEMPORARY),
        }
        text = CONFIGURATION.read_text()
        for pattern, replacement in substitutions.items():
            text, count = re.subn(pattern, replacement, text)
            assert count, f"{pattern} is not in {CONFIGURATION.name}"
        self._path.write_text(text)

    @property
    def trust(self) -> ssl.SSLContext:
        """What a Python client needs to believe the certificate; a fresh one each time, since clients change it."""
        return ssl.create_default_context(cafile=self.certificate)

    def reload(self) -> None:
        """As `systemctl reload nginx`: new processes for new connections, the old ones for those that are open."""
        before = self._children()
        self.served.send_signal(signal.SIGHUP)
        eventually(lambda: self._children() - before, message="nginx did not reload")

    def _children(self) -> set[str]:
        return set(Path(f"/proc/{self.served.pid}/task/{self.served.pid}/children").read_text().split())


def _write_certificate(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
