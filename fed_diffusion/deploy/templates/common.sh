# Sourced by the scripts beside it; they work wherever this folder lies.
here=$(cd "$(dirname "$0")" && pwd)
state=${STATE:-$here/state}
umask 077
mkdir -p "$state"
export FLWR_HOME="$state/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
# an empty folder: Flower's processes import from where they stand before anything else
mkdir -p "$state/empty"
cd "$state/empty"
