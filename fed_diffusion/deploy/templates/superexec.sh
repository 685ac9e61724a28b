#!/bin/sh
# Runs the ServerApp, in a process of its own: it goes on when the SuperLink is restarted.
set -eu
. "$(dirname "$0")/common.sh"
# which client each node may be, by its key; runs refuse a node that says it is another
export FED_DIFFUSION_NODES="$here/nodes.json"
exec flower-superexec --runtime-api-address "${SUPERLINK:-127.0.0.1}:@PORT_INSIDE@" \
    --root-certificates "$here/ca.crt" --superexec-auth-secret-file "$here/superexec.secret"
