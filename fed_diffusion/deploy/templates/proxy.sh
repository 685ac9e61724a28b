#!/bin/sh
# nginx in front of the SuperLink: nodes reach /v1/fleet and nothing else.
set -eu
. "$(dirname "$0")/common.sh"
prefix=$state
if [ "$(id -u)" = 0 ]; then
    # root's nginx works as another user, who may not enter this folder; what waits is there then
    prefix=/run/fed-diffusion-proxy
    mkdir -p -m 711 "$prefix"
fi
exec nginx -p "$prefix/" -c "$here/${NGINX_CONF:-nginx.conf}" -e stderr \
    -g "daemon off; pid $state/nginx.pid;"
