"""Health check of the server's container: exit code 0 where `serve` answers GET /health at its public port.

Reads the same environment as `serve`: MASKDM_TLS, the server's folder that provision made, and MASKDM_PORT.
"""

import json
import os
import ssl
import urllib.request
from pathlib import Path

folder = os.environ.get("MASKDM_TLS")
port = os.environ.get("MASKDM_PORT")
if folder and not port:
    port = json.loads(Path(folder, "server.json").read_text())["server"].rpartition(":")[2]
context = ssl.create_default_context(cafile=f"{folder}/ca.crt") if folder else None
url = f"{'https' if folder else 'http'}://127.0.0.1:{port or 8000}/health"
# No proxy: this machine asks itself.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
with opener.open(url, timeout=5) as answer:
    print(url, answer.status)
