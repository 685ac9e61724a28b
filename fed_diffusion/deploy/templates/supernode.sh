#!/bin/sh
# This host's SuperNode. Its data, and what it may carry, are in node.toml beside it.
set -eu
. "$(dirname "$0")/common.sh"
cat >&2 <<EOT
Connecting to ${SUPERLINK:-@ADDRESS@}. Should this end with code 2004: either the SuperLink has not
been told to admit this node's key (operator/register.sh does that), or it believes for up to a
minute that an earlier process of this node is alive; start it again then, as a service does.
EOT
exec flower-supernode --superlink "${SUPERLINK:-@ADDRESS@}" --root-certificates "$here/ca.crt" \
    --auth-supernode-private-key "$here/node.key" --node-config "$here/node.toml" \
    --port "${PORT:-9094}"
