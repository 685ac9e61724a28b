"""What carries a run's messages: this process and its pool, or Flower's processes."""
