"""The Flower ClientApp: a message in, a worker does the task, a message out."""
