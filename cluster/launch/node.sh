#!/usr/bin/env bash
# One machine of a Ray cluster that listens beyond loopback, so behind a token. On the head, then on all others:
#
#   cluster/launch/node.sh head 10.0.0.1             this machine's address, as the other machines reach it
#   cluster/launch/node.sh worker 10.0.0.1 [10.0.0.2]   the head's address, and this machine's own if it has several
#
# What follows is handed to `ray start` as it is (--num-gpus 8, --temp-dir ...). The token comes from RAY_AUTH_TOKEN or
# a file that only you can read, at RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token: make one with `make ray-token`, copy it.
# Every machine has the same checkout and virtual environment; jobs run with this PATH.
set -euo pipefail

refuse() { echo "cluster/launch/node.sh: $*" >&2; exit 2; }

role=${1:-} head=${2:-}
case $role in head|worker) ;; *) refuse "got role '$role', expected head or worker; see the top of this file" ;; esac
case $head in ''|-*|*[/:\ ]*) refuse "got address '$head', expected the head's, without a port, such as 10.0.0.1" ;; esac
shift 2
own=
case $role,${1:-} in worker,|worker,-*) ;; worker,*) own=$1; shift ;; esac

case ${RAY_AUTH_MODE:-token} in
    token) export RAY_AUTH_MODE=token ;;
    *) refuse "got RAY_AUTH_MODE=$RAY_AUTH_MODE, expected token: whoever reaches the ports could run code; unset it" ;;
esac
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    [ -s "$token" ] || refuse "got no token in $token, expected the cluster's; run make ray-token on one machine" \
        "and copy the file to the others"
    [ -z "$(find -L "$token" -perm /077)" ] ||
        refuse "got $token readable by others, expected mode 0600; chmod 600 $token"
fi

export PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
if [ "$role" = head ]; then
    exec ray start --head --node-ip-address "$head" --port "${RAY_HEAD_PORT:-6379}" --dashboard-host "$head" "$@"
fi
exec ray start --address "$head:${RAY_HEAD_PORT:-6379}" ${own:+--node-ip-address "$own"} "$@"
