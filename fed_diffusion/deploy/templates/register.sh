#!/bin/sh
# Tells the SuperLink which nodes to admit: those whose public keys are in nodes/. Once is enough,
# unless the SuperLink keeps no database. A node that is admitted already is only reported.
set -u
here=$(cd "$(dirname "$0")" && pwd)
failed=0
for key in "$here"/nodes/*.pub; do
    name=$(basename "$key" .pub)
    for attempt in 1 2 3 4 5; do  # the SuperLink may be starting
        answer=$("$here/flwr.sh" supernode register "$key" deployment --name "$name" 2>&1) || true
        case $answer in *"is unavailable"*) sleep 2 ;; *) break ;; esac
    done
    case $answer in
        *"registered successfully"*) echo "$name: admitted" ;;
        *"already in use"*) echo "$name: was admitted before" ;;
        *) echo "$name: $answer" >&2; failed=1 ;;
    esac
done
exit $failed
