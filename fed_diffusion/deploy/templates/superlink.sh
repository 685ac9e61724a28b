#!/bin/sh
# The SuperLink, on loopback behind proxy.sh. Runs and admitted nodes outlive it in its database;
# for models above about 100 MB start it with DATABASE= (empty): see docs/deployment.md.
set -eu
. "$(dirname "$0")/common.sh"
database=${DATABASE-$state/superlink.db}
exec flower-superlink --host "${HOST:-127.0.0.1}" --port @PORT_INSIDE@ \
    --ssl-ca-certfile "$here/ca.crt" --ssl-certfile "$here/server.crt" \
    --ssl-keyfile "$here/server.key" --enable-supernode-auth --isolation process \
    --superexec-auth-secret-file "$here/superexec.secret" \
    --disable-runtime-dependency-installation ${database:+--database "$database"}
