"""What a client remembers between the messages of a round: secrets, which never leave its node.

Flower keeps a ClientApp's `context.state` in the SuperNode's memory, until the SuperNode ends or
the client's next attempt replaces it. A message that claims to bring such a memory along does not:
it is replaced by the node's own. A message of an attempt that is over is refused before anything is
changed (`Members`). But Flower reads the state when a message's process starts and writes all of it
when the process ends, so that of two that overlap the one that ends last has its way. A message
that comes late can cost its client the newer keys, and with them the attempt.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, RecordDict

MEMORY = "memory"
"""The record that carries it between the ClientApp and the node's worker."""
_BYTES = "bytes"


def memory_of(content: RecordDict) -> bytes | None:
    """What the client that a message is for remembers, if anything."""
    record = content.get(MEMORY)
    found = record.get(_BYTES) if isinstance(record, ConfigRecord) else None
    return found if isinstance(found, bytes) and found else None


def put_memory(content: RecordDict, memory: bytes | None) -> None:
    """Lay a client's memory beside a message or an answer."""
    content[MEMORY] = ConfigRecord({_BYTES: memory or b""})


def recall(content: RecordDict, context: Context) -> None:
    """Lay what the node knows of a message's client beside it; what came with it is dropped."""
    stored = context.state.get(_key(content))
    known = stored.get(_BYTES) if isinstance(stored, ConfigRecord) else None
    put_memory(content, known if isinstance(known, bytes) else None)


def remember(reply: RecordDict, content: RecordDict, context: Context) -> None:
    """Take the memory from an answer before it leaves the node, and keep it."""
    memory, key = memory_of(reply), _key(content)
    reply.pop(MEMORY, None)
    content.pop(MEMORY, None)
    if memory is not None:
        context.state[key] = ConfigRecord({_BYTES: memory})
    else:
        context.state.pop(key, None)


def _key(content: RecordDict) -> str:
    about = content.get("about")
    client = about.get("client") if isinstance(about, ConfigRecord) else None
    return f"secure.{client if isinstance(client, int) else -1}"
