#!/usr/bin/env bash
# llm-serving, as it is in the checkout that this file lies in.
# usage: PEER_MODEL=x.gguf|hf-folder [PEER_PORT=18099] [PEER_THREADS=n] [PEER_SEQS=32] \
#        [PEER_CTX=1024] [PEER_ARGS="--weights int8"] ours.sh VENV
# Without PEER_THREADS the server chooses; the cache holds PEER_SEQS sequences of PEER_CTX tokens.
set -euo pipefail
home=${1:?venv}
PYTHONPATH=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH PYTHONSAFEPATH=1  # this checkout's package, wherever the script is called from
seqs=${PEER_SEQS:-32}
context=${PEER_CTX:-1024}
exec "$home/bin/python" -m llm_serving serve --model "${PEER_MODEL:?}" --served-name model \
  --port "${PEER_PORT:-18099}" ${PEER_THREADS:+--num-threads "$PEER_THREADS"} \
  --max-num-seqs "$seqs" --max-model-len "$context" --num-kv-blocks $((seqs * context / 16)) \
  ${PEER_ARGS:-}
