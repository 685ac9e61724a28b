"""Flower's Grid without its processes: messages go to the ClientApp in this one, one at a time."""

import itertools
import time

from flwr.app import Context, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app


class LocalGrid(Grid):
    """Nodes by id, each with its node config; a node is there while it is in `online`.

    A node that was away when it was last looked for, or `restart`ed, is active anew.
    """

    def __init__(self, node_configs):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = {
            100 + number: Context(1, 100 + number, dict(config), RecordDict(), {})
            for number, config in enumerate(node_configs)
        }
        self.online = set(self.nodes)
        self.keys = {}
        self._active = dict.fromkeys(self.nodes, 0)
        self._seen = set(self.nodes)
        self._replies = {}
        self._ids = itertools.count()

    def get_node_ids(self):
        return sorted(self.online)

    def get_nodes(self):
        for node in self.online - self._seen:
            self._active[node] += 1
        self._seen = set(self.online)
        return [
            NodeInfo(
                node_id=node,
                last_activated_at=f"time {self._active[node]}",
                public_key=self.keys.get(node, b""),
            )
            for node in self.get_node_ids()
        ]

    def restart(self, node, **config):
        """The node's process ends, and another one with this in its node config is there at once.

        What the one before was working on is lost.
        """
        self._active[node] += 1
        self.nodes[node].node_config.update(config)

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message):
        message_id = str(next(self._ids))
        message.metadata.__dict__["_message_id"] = message_id
        message.metadata.__dict__["_delivered_at"] = str(time.time())
        node = message.metadata.dst_node_id
        if node in self.online:
            self._replies[message_id] = app(message, self.nodes[node])
        return message_id

    def pull_messages(self, message_ids):
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def set_run(self, run):
        raise NotImplementedError

    run = property(lambda self: None)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError
