"""The Flower ClientApp: a message comes in, a worker does the task, a message goes out."""
