"""Host a reward model for runs that ask by HTTP: `python -m rewards.serve MODEL`.

It listens on 127.0.0.1 unless told otherwise, and on another address with a token alone. Requests that arrive while
the model computes are scored together. `POST /score` takes what `rewards.remote` sends; `GET /health` says whether it
works, `GET /metrics` what it did, in Prometheus' format. Neither prompts nor responses are printed or logged.
SIGINT and SIGTERM let the requests under way finish.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.quiet_server import missing_packages, quiet_config
from rewards.transport import is_loopback, read_token

if TYPE_CHECKING:
    from rewards.serve_app import RewardService

log = logging.getLogger("rewards.serve")

GRACE = 30
"""Seconds that requests under way get when the server stops."""
BACKLOG = 1024
"""Connections that the kernel keeps for a busy server."""
MAX_PORT = 65535
BATCH_TOKENS = {"cpu": 384, "other": 2048}
"""Enough that reading the weights costs little beside the products; more would leave a processor's caches."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="folder or hub name of a decoder with one label, in safetensors")
    parser.add_argument("--revision", help="commit hash of a hub model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8900, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable that holds the token")
    parser.add_argument("--token-file", metavar="PATH", help="file that holds the token, mode 0600")
    parser.add_argument("--tls-cert", metavar="PATH", help="certificate chain, for https")
    parser.add_argument("--tls-key", metavar="PATH", help="its private key")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="do not standardise by statistics saved with the model")
    parser.add_argument("--max-batch-rows", type=int, default=64, help="of a forward (default: %(default)s)")
    parser.add_argument(
        "--max-batch-tokens", type=int, help="that a forward computes (default: 384 on a processor, 2048 elsewhere)"
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=5.0,
        help="for company where several ask (default: %(default)s)",
    )
    parser.add_argument(
        "--max-waiting", type=int, default=8192, help="responses; more are turned away (default: %(default)s)"
    )
    parser.add_argument("--max-responses", type=int, default=1024, help="of a request (default: %(default)s)")
    parser.add_argument("--max-body-mb", type=float, default=16.0, help="of a request (default: %(default)s)")
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> str | None:
    """The token to ask for, if any.

    Raises:
        ValueError: an address that others reach without a token, half of what TLS needs, or what it cannot use, a
            missing package, a model folder or a device that is not there, or a number that cannot be.
    """
    if missing := missing_packages():
        raise ValueError(
            f"rewards.serve: got no {' and no '.join(missing)}, expected them to be installed; run "
            'pip install -e ".[serve]"'
        )
    token = read_token(arguments.token_env, arguments.token_file)
    if token is None and not is_loopback(arguments.host):
        raise ValueError(
            f"--host: got {arguments.host} without a token, expected one where others can reach it; name it with "
            "--token-env or --token-file, or listen on 127.0.0.1"
        )
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise ValueError("--tls-cert, --tls-key: got one of them, expected both or none; add the other")
    if arguments.tls_cert is not None:
        check_tls(arguments.tls_cert, arguments.tls_key)
    check_numbers(arguments)
    check_model(arguments.model)
    check_device(arguments.device)
    return token


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a number that cannot be."""
    if not 0 <= arguments.port <= MAX_PORT:
        raise ValueError(f"--port: got {arguments.port}, expected 0 to {MAX_PORT}; choose one of them")
    numbers = ("max_batch_rows", "max_batch_tokens", "max_waiting", "max_responses", "max_body_mb")
    for name in numbers:
        number = getattr(arguments, name)
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: got {number}, expected more than 0 and finite; correct it")
    if arguments.max_responses > arguments.max_waiting:
        raise ValueError(
            f"--max-waiting: got {arguments.max_waiting} with --max-responses {arguments.max_responses}, expected at "
            "least as many: a full request would never be taken; raise it"
        )
    if not 0 <= arguments.max_wait_ms < math.inf:
        raise ValueError(f"--max-wait-ms: got {arguments.max_wait_ms:g}, expected 0 or more and finite; correct it")


def check_tls(certificate: str, key: str) -> None:
    """Raises ValueError for files that cannot be read, or that do not belong together."""
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        if not Path(path).is_file():
            raise ValueError(f"{option}: got {path!r}, expected a file in PEM format; correct the path")
    try:
        # The empty password keeps a key that has one from asking at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise ValueError(
            f"--tls-cert, --tls-key: got {certificate!r} and {key!r} ({reason}), expected a certificate and its "
            "private key, both in PEM format and without password; correct them"
        ) from error


def check_model(path: str) -> None:
    """Raises ValueError for what can be no hub name and is no folder."""
    there = Path(path)
    if not there.is_dir() and (there.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"model: got {path!r}, expected a model folder; correct the path, or give a hub name")


def check_device(name: str) -> None:
    """Raises ValueError for one that is not on this machine."""
    import torch

    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise ValueError(f"--device: got {name!r}, expected one of {', '.join(there)}, which are here; choose another")


def bind(host: str, port: int, *, key: str = "--host, --port") -> socket.socket:
    """A socket that has its address, and takes nobody yet: who connects while the model loads is refused at once.

    `key`: what the address is called where it was set.

    Raises:
        ValueError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{key}: got {host}:{port} ({error}), expected a free port of this machine; choose another"
        ) from error
    return listening


def make_service(arguments: argparse.Namespace, token: str | None) -> RewardService:
    """The model, loaded and tried once, behind a batcher."""
    from rewards.batcher import Batcher
    from rewards.scalar_model import ScalarModel
    from rewards.serve_app import Limits, RewardService
    from rewards.serve_metrics import ServeMetrics

    model = ScalarModel(
        arguments.model,
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
        standardize=not arguments.raw,
    )
    (trial,) = model.score([model.encoder.encode("Hello", "Good day.")])
    if not math.isfinite(trial):
        raise ValueError(
            f"reward model {arguments.model!r}: got {trial} as the score of a trial text, expected a finite number; "
            "its weights or its dtype do not hold: train it again, or pass --dtype float32"
        )
    metrics = ServeMetrics()
    batcher = Batcher(
        model.score,
        layout=model.layout,
        max_rows=arguments.max_batch_rows,
        max_tokens=arguments.max_batch_tokens or BATCH_TOKENS["cpu" if model.device.type == "cpu" else "other"],
        max_wait=arguments.max_wait_ms / 1000,
        max_waiting=arguments.max_waiting,
        on_batch=metrics.batch,
    )
    limits = Limits(body_bytes=int(arguments.max_body_mb * (1 << 20)), responses=arguments.max_responses)
    return RewardService(model, batcher, metrics, token=token, limits=limits)


def serve(arguments: argparse.Namespace) -> None:
    """Answer until a signal comes.

    Raises:
        ValueError: something that a person can correct, before the port is answered.
    """
    token = check_arguments(arguments)
    import uvicorn

    from rewards.admission import LOCAL_NAMES
    from rewards.serve_app import build_app

    listening = bind(arguments.host, arguments.port)
    service = make_service(arguments, token)
    alone = token is None
    config = quiet_config(
        build_app(service, host_names=LOCAL_NAMES if alone else None),
        grace=GRACE,
        log_level="warning",
        certificate=arguments.tls_cert,
        key=arguments.tls_key,
    )
    # uvicorn raises the signal that stopped it once more when it is done, which would end the process here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    scheme = "https" if arguments.tls_cert else "http"
    if not alone and scheme == "http" and not is_loopback(arguments.host):
        log.warning("texts and token travel in the clear: pass --tls-cert and --tls-key, or put TLS in front")
    listening.listen(BACKLOG)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"listening on {scheme}://{host}:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
    service.close()
    log.info("stopped")


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the hub's addresses
    try:
        serve(parse_arguments(arguments))
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
