"""The Flower ClientApp. A node hosts clients: each message says for which client it is.

A node whose node config names `data-dir` or `dataset` is one client. That client
trains on the node's images.

Flower starts a process for every message and imports this module in it: keep torch out of it.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.memory import recall, remember
from client_app.warm import answer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Run one task of one client."""
    content = message.content
    recall(content, context)
    reply = answer("train", content, context)
    remember(reply, content, context)
    return Message(reply, reply_to=message)


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Load and check everything; answer which partition this node is and what it can carry."""
    return Message(answer("hello", message.content, context), reply_to=message)
