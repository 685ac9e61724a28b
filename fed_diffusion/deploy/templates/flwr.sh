#!/bin/sh
# Flower's own command, with the connection `deployment` of config.toml beside this file.
set -eu
FLWR_HOME=$(cd "$(dirname "$0")" && pwd)
export FLWR_HOME FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flwr "$@"
