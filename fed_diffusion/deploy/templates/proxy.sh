#!/bin/sh
# nginx in front of the SuperLink: nodes reach /v1/fleet and nothing else.
set -eu
. "$(dirname "$0")/common.sh"
exec nginx -p "$state/" -c "$here/${NGINX_CONF:-nginx.conf}" -e stderr \
    -g "daemon off; pid $state/nginx.pid;"
